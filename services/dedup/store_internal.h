/*
 * What the parts of the store share: its state in the arena, its process-private pointers, small helpers.
 *
 *   store.c             memory plan, attach, format, close, the step
 *   store_map.c         leaves in frames, hash, persistent changes of entries
 *   store_page.c        what a step needs is in memory, or asked for
 *   store_space.c       reference words, groups, allocation, reservations, fingerprint cache
 *   store_log.c         metadata log's buffer, sync
 *   store_rewrite.c     after a failed flush: what it was for is written again
 *   store_checkpoint.c  copy-on-write of pages, root switch
 *   store_load.c        reading it all back; with store_replay.c, store_sums.c
 *   store_volume.c      volume table, deletion
 *
 * After a crash: struct store_area and everything that it stands before are as at the last commit (transaction.h); struct store is
 * made again by store_attach. While the state is STORE_LOADING memory is filled without a journal, and a successor
 * begins to load anew.
 */
#ifndef ATOLL_DEDUP_STORE_INTERNAL_H
#define ATOLL_DEDUP_STORE_INTERNAL_H

#include "services/dedup/dedup.h"
#include "services/dedup/format.h"

/* --- Bounds ------------------------------------------------------------------------------------------------------ */
#define STORE_LOG_BUFFER_BLOCKS 1024   /* log blocks not yet durable: some 60,000 changes */
#define STORE_LOG_SLACK_BLOCKS 8       /* kept by store_has_room for the volume table's changes */
#define STORE_CHANGE_BYTES 64          /* largest change of one entry: MAP + BLOCK + REFS */
#define STORE_SYNC_OUTSTANDING 8       /* log writes in flight */
#define STORE_BATCHES 4                /* of pages being written by a checkpoint */
#define STORE_BATCH_PAGES 32
#define STORE_SPACE_SLACK 16           /* blocks that a checkpoint may hold beyond its worst case */
#define STORE_GROUP_BLOCKS 1024        /* blocks that one group word sums up */
#define STORE_SET_ENTRIES 8            /* of the fingerprint cache: one cache line */
#define STORE_PLACES_PER_PRINT 4       /* copies of one content that it remembers: where a run threshold keeps several */
#define STORE_RETRY_NS 1000000000u     /* back-off after a failed write */
#define STORE_FRAMES_KEPT 16           /* one in so many is kept for loading: a replay may pass through leaves that are gone at its end */
#define STORE_SWEEP_GROUPS 256         /* looked at in one step */
#define STORE_SWEEP_CONVERT 4          /* cleaned in one step */
#define STORE_FREE_PER_STEP 512        /* old metadata blocks freed in one step */
#define STORE_DELETE_ENTRIES FORMAT_HOLES_MAX /* freed by one record group of a deletion */

_Static_assert(STORE_LOG_BUFFER_BLOCKS * 16 <= ATOLL_JOURNAL_ENTRIES, "room");
_Static_assert(STORE_BATCH_PAGES <= ATOLL_IO_BLOCKS, "a batch is one gather write");
_Static_assert(16 + STORE_DELETE_ENTRIES * 16 <= FORMAT_LOG_RECORD_BYTES, "a deletion's records fit a block");

/* --- Reference words: one u32 per PBA ------------------------------------------------------------------------------
 * 0                         free
 * 1 .. REF_COUNT_MAX        data block with that many references
 * 1 << 31 | epoch           freed in that epoch: free once it is synced
 * the four below            */
#define REF_COUNT_MAX 0x3fffffffu
#define REF_IN_FLIGHT 0x40000001u    /* handed out by store_allocate, not yet placed */
#define REF_METADATA 0x40000002u     /* holds a metadata page */
#define REF_QUARANTINED 0x40000003u  /* late I/O may land there: not in this run */
#define REF_FIXED 0x40000004u        /* superblocks, log */
#define REF_PENDING 0x80000000u
#define REF_IS_COUNT(word) ((word) - 1u < REF_COUNT_MAX)

/* A group word: free blocks, pending blocks, newest epoch of its pending ones. */
#define GROUP_FREE(word) ((uint32_t)((word) & 0xffff))
#define GROUP_PENDING(word) ((uint32_t)((word) >> 16 & 0xffff))
#define GROUP_EPOCH(word) ((uint32_t)((word) >> 32))
#define GROUP(free_count, pending_count, epoch) \
    ((uint64_t)(epoch) << 32 | (uint64_t)(pending_count) << 16 | (uint64_t)(free_count))

enum sync_phase { SYNC_IDLE = 0, SYNC_FLUSH_DATA = 1, SYNC_WRITE = 2, SYNC_FLUSH_LOG = 3, SYNC_REWRITE = 4 };
enum checkpoint_phase {
    CHECKPOINT_IDLE = 0,
    CHECKPOINT_PAGES = 1,  /* dirty pages, level by level, go to new places */
    CHECKPOINT_SYNC = 2,   /* log up to here, and the pages, become durable */
    CHECKPOINT_SUPER = 3,  /* superblock, both copies */
    CHECKPOINT_FLUSH = 4,
    CHECKPOINT_FREE = 5    /* old places become free */
};
enum format_phase { FORMAT_NONE = 0, FORMAT_WRITE = 1, FORMAT_FLUSH = 2 };

/* What a completion of kind IO_STORE is of: top byte of its argument. */
enum store_io {
    STORE_IO_LOAD = 1,        /* number = first want << 16 | count */
    STORE_IO_LOAD_FLUSH = 2,
    STORE_IO_FORMAT = 3,
    STORE_IO_SYNC_FLUSH = 4,
    STORE_IO_LOG = 5,
    STORE_IO_PAGES = 6,       /* number = batch */
    STORE_IO_SUPER = 7,
    STORE_IO_SUPER_FLUSH = 8,
    STORE_IO_REWRITE = 9
};

/* Pages on their way to the device; their images lie in the staging area. */
struct store_batch {
    uint64_t count;        /* 0: batch free */
    uint64_t outstanding;
    uint64_t error;
    uint64_t primary;      /* first PBA of each copy: they are runs */
    uint64_t mirror;
    uint64_t page[STORE_BATCH_PAGES];
    uint64_t key[STORE_BATCH_PAGES];
    uint64_t checksum[STORE_BATCH_PAGES];
};

/* --- In the arena. Changed through the journal only, but for the state STORE_LOADING. ------------------------------ */
struct store_area {
    struct store_geometry geometry;
    uint64_t state;             /* enum store_state */
    char reason[256];
    uint64_t load_resets;       /* loading has filled the big tables before: another one zeroes them first */
    uint64_t volumes_open;      /* not journaled: some volume's version may be odd until the next step */

    /* From the superblock; constant while STORE_READY but for `generation`. */
    uint64_t uuid_low, uuid_high;
    uint64_t device_blocks, log_blocks, leaf_slots;
    uint64_t generation;        /* of the durable root */
    uint64_t format_phase;
    uint64_t format_error;

    uint64_t io_inflight;       /* of kind IO_STORE */

    /* Log. Sequences; the open block is log_next, the buffer's slot of a block is sequence % STORE_LOG_BUFFER_BLOCKS. */
    uint64_t log_next;
    uint64_t log_fill;          /* record bytes in the open block */
    uint64_t log_chain;         /* checksum of block log_next - 1 */
    uint64_t log_durable;       /* blocks before this one are durable */
    uint64_t log_start;         /* the durable root replays from here */

    /* Sync. */
    uint64_t epoch;             /* changes made now belong to it */
    uint64_t sync_epoch;        /* of the sync that runs */
    uint64_t synced_epoch;
    uint64_t sync_phase;
    uint64_t sync_end;          /* makes the blocks before this one durable */
    uint64_t sync_position[2];  /* next to submit, of each copy */
    uint64_t sync_outstanding;
    uint64_t sync_error;
    uint64_t sync_wanted;
    uint64_t sync_forced;       /* flush even if nothing changed: pages were written */
    uint64_t sync_retry_ns;     /* not before */
    uint64_t changed;           /* since the last sync began */
    uint64_t data_unflushed;    /* blocks were placed since the last good flush began */
    uint64_t sync_failures;
    uint64_t sync_status;       /* of the last one */

    /* After a failed flush. */
    uint64_t rewrite_wanted;    /* the next sync begins by writing data again */
    uint64_t flush_failures;    /* noted in a block's fingerprint while it is in flight, compared when it is placed */
    uint64_t rewrite_sequence, rewrite_word; /* cursor: log block, word of its records */
    uint64_t rewrite_stage;     /* 0 collect, 1 being read, 2 being written */
    uint64_t rewrite_lost;      /* blocks that are not what they should be */
    uint64_t rewrite_count;
    uint64_t rewrite_pba[STORE_BOUNCE_PAGES];

    /* Checkpoint. */
    uint64_t checkpoint_redo;   /* a flush failed: pages written in this checkpoint are to be written again */
    uint64_t checkpoint_phase;
    uint64_t checkpoint_wanted;
    uint64_t checkpoint_cursor;
    uint64_t checkpoint_level;
    uint64_t checkpoint_log_start, checkpoint_log_chain;
    uint64_t checkpoint_ticket;
    uint64_t checkpoint_outstanding;
    uint64_t checkpoint_error;
    uint64_t checkpoint_retry_ns;
    uint64_t super_clean;       /* the durable superblock says so, and nothing was logged since */
    struct store_batch batches[STORE_BATCHES];

    /* Space, blocks. */
    uint64_t usable_first, usable_end;
    uint64_t free_blocks, pending_blocks, stored_blocks, metadata_blocks, quarantined_blocks;
    uint64_t reserved_blocks;   /* promises included */
    uint64_t references, zero_promises;
    uint64_t cursor[3];         /* next place to look: data, pages, their mirrors */
    uint64_t sweep_group, sweep_left;
    uint64_t cache_clock;       /* insertions into the fingerprint cache */

    /* Map. */
    uint64_t frames_high;       /* frames that were ever in use */
    uint64_t frames_free;       /* stack of those that are free again */
    uint64_t leaves;            /* frames in use */
    uint64_t leaves_released;   /* since the durable root: it still has their pages */
    uint64_t hash_entries;

    /* Deletion. */
    uint64_t delete_volume;     /* id + 1 */
    uint64_t delete_frame, delete_index, delete_again;

    uint64_t closing, closed;
};

struct store_hash_entry { uint64_t key, value; };

/* --- Private to the process --------------------------------------------------------------------------------------- */
struct store {
    struct dedup *dedup;
    struct atoll_journal *journal;
    struct store_area *area;
    struct format_shape shape;         /* valid once the superblock is known */
    uint64_t arena_bytes;              /* of area and all below */
    uint8_t *end;
    uint8_t *log_buffer;               /* STORE_LOG_BUFFER_BLOCKS blocks */
    uint8_t *staging;                  /* STORE_BATCHES * STORE_BATCH_PAGES pages */
    uint8_t *super_buffer;             /* 2 blocks: the copies */
    uint32_t *refs;                    /* per PBA */
    uint64_t *groups;                  /* per STORE_GROUP_BLOCKS */
    struct fingerprint *prints;        /* per PBA */
    struct format_pointer *pointers;   /* row of pages: where each is (newest) */
    uint64_t (*previous)[2];           /* ... and was in the durable root, while a checkpoint goes on; 0: as newest */
    uint64_t *dirty;                   /* bit per page of the row */
    uint64_t *written;                 /* bit per page: written in the running checkpoint */
    uint64_t *frames;                  /* FORMAT_LEAF_ENTRIES words each; free ones are all zeros */
    uint64_t *frame_key;               /* FORMAT_KEY(volume, leaf) + 1; 0 free */
    uint32_t *frame_used;              /* entries that are not HOLE */
    uint32_t *frame_stack;
    struct store_hash_entry *hash;     /* leaves, and masks of which exist: store_map.c */
    uint64_t hash_mask;
    uint32_t hash_shift;
    uint64_t *cache;                   /* fingerprint cache */
    uint64_t cache_mask;               /* of sets */
    uint32_t cache_age_shift;
    uint64_t last_key;                 /* last leaf found: FORMAT_KEY + 1, or 0 */
    uint64_t last_frame;
    struct store_load *load;           /* while loading */
};

#define STORE_SET(store, field, value) atoll_set64((store)->journal, &(store)->area->field, (value))
#define STORE_ADD(store, field, amount) \
    atoll_set64((store)->journal, &(store)->area->field, (store)->area->field + (uint64_t)(amount))

static inline uint64_t *store_frame(const struct store *store, uint64_t frame)
{
    return store->frames + frame * FORMAT_LEAF_ENTRIES;
}
static inline void store_mark_dirty(struct store *store, uint64_t page)
{
    uint64_t *word = &store->dirty[page / 64], bit = (uint64_t)1 << page % 64;
    if (!(*word & bit))
        atoll_set64(store->journal, word, *word | bit);
}
static inline void store_count(struct store *store, enum store_counter counter, uint64_t amount)
{
    atoll_count(store->dedup->domain, DEDUP_COUNTER_STORE_FIRST + (uint32_t)counter, amount);
}
static inline uint64_t store_identity(const struct store *store) { return store->area->uuid_low ^ store->area->uuid_high; }
static inline bool store_usable(const struct store *store, uint64_t pba)
{
    return pba >= store->area->usable_first && pba < store->area->usable_end;
}

/* --- store.c --- */
void store_lay_out(struct store *store, void *memory, const struct store_geometry *geometry);
/* Directory levels and limits become those of the superblock in `area`. */
void store_know_shape(struct store *store);
/* Ends loading for good; printf-like, in the running transaction or outside of any. */
void store_fail(struct store *store, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Submits one request of kind IO_STORE over `bytes` at `memory` (0 for a flush); false if no slot is free. */
bool store_submit(struct store *store, enum store_io what, uint64_t number, uint32_t opcode, uint64_t pba, const void *memory,
                  uint64_t bytes);
uint64_t store_checksum(const struct store *store, enum format_seed_kind kind, uint64_t number, const void *bytes, uint64_t count);
/* Fills a superblock copy (4096 bytes); `place` is 0..3: block 0, block 1, block N-2, block N-1. */
void store_seal_super(struct format_super *super, uint64_t place, void *block);
bool store_all_zero(const void *memory, uint64_t bytes);
/* The STORE_BOUNCE_PAGES in the disk driver's buffer area, or NULL if that is too small. */
const uint8_t *store_bounce(const struct store *store);

/* --- store_map.c --- */
/* Frame of a leaf or UINT64_MAX; with `create` a new one of all holes (UINT64_MAX: no frame, or no space for it). */
uint64_t store_find_frame(struct store *store, uint32_t volume, uint64_t leaf, bool create);
/* Changes an entry; keeps frame_used and the volume's mapped_blocks. */
void store_set_entry(struct store *store, uint64_t frame, uint32_t index, uint64_t value);
/* Takes an empty leaf out of the map; its frame becomes free. */
void store_release_frame(struct store *store, uint64_t frame);
/* A persistent value goes: its reference or promise is dropped. Returns words written to `records` (0 or 2). */
uint32_t store_drop_value(struct store *store, uint64_t value, uint64_t *records);

/* --- store_space.c --- */
void store_free_block(struct store *store, uint64_t pba);      /* last reference gone: pending */
bool store_keeps_content(const struct store *store, uint64_t pba); /* data that cannot be overwritten before the next sync */
void store_free_metadata(struct store *store, uint64_t pba);   /* free at once: no durable root has it any more */
uint32_t store_take_run(struct store *store, uint32_t cursor, uint32_t want, uint32_t word, uint64_t *pba);
int64_t store_available(const struct store *store);            /* blocks that may still be promised to data */
void store_remember_print(struct store *store, uint64_t pba);  /* into the fingerprint cache */
bool store_sweep(struct store *store);                         /* pending blocks of synced epochs become free */

/* --- store_log.c --- */
/* Adds the records of one change (words <= FORMAT_LOG_RECORD_BYTES / 8). Room is the caller's care: store_has_room. */
void store_log_append(struct store *store, const uint64_t *records, uint32_t words);
void store_log_seal(struct store *store);                      /* the open block, if it holds anything */
bool store_sync_step(struct store *store);
void store_sync_io(struct store *store, enum store_io what, uint32_t status);
void store_sync_fail(struct store *store, uint32_t status);    /* the running sync fails */
/* Some device flush failed: all that was written since the last good one is in doubt, whoever wrote it. */
void store_flush_failed(struct store *store, uint32_t status);

/* --- store_rewrite.c --- */
void store_rewrite_begin(struct store *store);
bool store_rewrite_step(struct store *store);

/* --- store_checkpoint.c --- */
bool store_checkpoint_step(struct store *store);
/* A page of the row as the device shall hold it now (4096 bytes), its pointer's key, its directory level (0: no directory). */
void store_page_image(const struct store *store, uint64_t page, void *image);
uint64_t store_page_key(const struct store *store, uint64_t page);
uint64_t store_page_level(const struct store *store, uint64_t page);
void store_checkpoint_io(struct store *store, enum store_io what, uint64_t number, uint32_t status);

/* --- store_load.c --- */
void store_load_begin(struct store *store);
bool store_load_step(struct store *store);
void store_load_io(struct store *store, enum store_io what, uint64_t number, uint32_t status);

/* --- store_volume.c --- */
void store_volume_image(const struct store *store, uint32_t volume, struct format_volume *image);
/* Takes over an image that was read; false if it makes no sense. */
bool store_volume_take(struct store *store, const struct format_volume *image);
bool store_delete_step(struct store *store);
void store_volumes_publish(struct store *store);               /* versions become even after the commit */

#endif
