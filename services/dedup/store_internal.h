/*
 * What the parts of the store share: its state in the arena, its process-private pointers, small helpers.
 *
 *   store.c             memory plan, attach, format, close, the step
 *   store_cache.c       frames: finding pages, reading them, letting them go
 *   store_scrub.c       metadata pages for the scrub
 *   store_page.c        what a step needs is in memory, or asked for (store_want_*)
 *   store_slot.c        places for metadata pages; which blocks hold data
 *   store_map.c         leaves; persistent changes of entries
 *   store_space.c       reference words, groups, allocation, reservations
 *   store_print.c       fingerprints and the cache of them
 *   store_log.c         metadata log's buffer, sync; store_ahead.c: what of it is written together with its data
 *   store_rewrite.c     after a failed flush: what it was for is written again
 *   store_checkpoint.c  copy-on-write of pages; store_root.c: the root switch
 *   store_load.c        reading it all back; with store_replay.c, store_grow.c
 *   store_volume.c      volume table; store_delete.c: deletion
 *
 * After a crash: struct store_area and everything that it stands before are as at the last commit (transaction.h); struct store is
 * made again by store_attach. While the state is STORE_LOADING a successor begins to load anew.
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
#define STORE_GROUP_BLOCKS FORMAT_GROUP_BLOCKS /* blocks that one group word sums up */
#define STORE_SET_ENTRIES 8            /* of the fingerprint cache: one cache line */
#define STORE_PLACES_PER_PRINT 4       /* copies of one content that it remembers: where a run threshold keeps several */
#define STORE_RETRY_NS 1000000000u     /* back-off after a failed write, or read of a page */
#define STORE_ROOTS 2                  /* superblocks of different generations on the device: so many, and no older root is found any more */
#define STORE_FOLLOW_NS 1000000000u    /* store_log.c */
#define STORE_QUARANTINE 1024          /* runs of places that late I/O may hit */
#define STORE_SWEEP_FRAMES 1024        /* looked at in one step */
#define STORE_REGAIN_LAST_NS 30000000000u /* longest pause between two attempts at pages of counts that could not be read */
#define STORE_REGAIN_GROUPS 4096       /* looked at in one step of it */
#define STORE_SWEEP_CONVERT 4          /* cleaned in one step */
#define STORE_FREE_PER_STEP 512        /* old places of metadata pages freed in one step */
#define STORE_DELETE_ENTRIES FORMAT_HOLES_MAX /* freed by one record group of a deletion */

_Static_assert(STORE_LOG_BUFFER_BLOCKS * 16 <= ATOLL_JOURNAL_ENTRIES, "room");
_Static_assert(STORE_BATCH_PAGES <= ATOLL_IO_BLOCKS, "a batch is one gather write");
_Static_assert(16 + STORE_DELETE_ENTRIES * 16 <= FORMAT_LOG_RECORD_BYTES, "a deletion's records fit a block");

/* --- Reference words: one u32 per PBA ------------------------------------------------------------------------------
 * (in memory; on the device only counts)
 * 0                         free
 * 1 .. REF_COUNT_MAX        data block with that many references
 * 1 << 31 | epoch           freed in that epoch: free once it is synced
 * 3 << 29 | failures        handed out by store_allocate, not yet placed; failed flushes until then: store_rewrite.c
 * the three below           */
#define REF_COUNT_MAX 0x3fffffffu
#define REF_QUARANTINED 0x40000003u  /* late I/O may land there: not in this run */
#define REF_FIXED 0x40000004u        /* no data block */
#define REF_LAID_ASIDE 0x40000005u   /* free, but its fingerprint could not be noted: that page is lost. In memory as long as its own page */
#define REF_PENDING 0x80000000u
#define REF_IS_COUNT(word) ((word) - 1u < REF_COUNT_MAX)
#define REF_IN_FLIGHT(failures) (0x60000000u | ((uint32_t)(failures) & 0x1fffffffu))
#define REF_IS_IN_FLIGHT(word) ((word) >> 29 == 3)

/* A group word: blocks that are free, pending, stored (the rest is in flight or quarantined); newest epoch of its pending ones. */
#define GROUP_FREE(word) ((uint32_t)(word) & 0x7ff)
#define GROUP_PENDING(word) ((uint32_t)((word) >> 11) & 0x7ff)
#define GROUP_STORED(word) ((uint32_t)((word) >> 22) & 0x7ff)
#define GROUP_EPOCH(word) ((uint32_t)((word) >> 33))
#define GROUP(free_count, pending_count, stored_count, epoch) \
    ((uint64_t)(epoch) << 33 | (uint64_t)(stored_count) << 22 | (uint64_t)(pending_count) << 11 | (uint64_t)(free_count))

enum sync_phase { SYNC_IDLE = 0, SYNC_FLUSH_DATA = 1, SYNC_WRITE = 2, SYNC_FLUSH_LOG = 3, SYNC_REWRITE = 4, SYNC_AHEAD = 5 };
enum checkpoint_phase {
    CHECKPOINT_IDLE = 0,
    CHECKPOINT_PAGES = 1,  /* dirty pages, stage by stage, go to new places */
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
    STORE_IO_REWRITE = 9,
    STORE_IO_PAGE = 10,       /* a metadata page is read: number = frame */
    STORE_IO_AHEAD = 11,
    STORE_IO_AHEAD_FLUSH = 12
};

/* Pages on their way to the device; their images lie in the staging area. */
struct store_batch {
    uint64_t count;        /* 0: batch free */
    uint64_t outstanding;
    uint64_t error;
    uint64_t slot;         /* of the first; they are a run */
    uint64_t page[STORE_BATCH_PAGES];
    uint64_t frame[STORE_BATCH_PAGES]; /* STORE_NO_FRAME: a page that lies in no frame */
    uint64_t checksum[STORE_BATCH_PAGES];
};

/* --- Frames: metadata pages in memory ------------------------------------------------------------------------------ */
#define STORE_NO_FRAME 0xffffffffu
#define STORE_SLOT_FRESH 0xffffffffu /* in a directory in memory: the page below exists in memory only */

enum frame_state {
    FRAME_FREE = 0,
    FRAME_LOADING = 1,
    FRAME_VALID = 2,
    FRAME_BAD = 3      /* could not be had; stays a while so that who asked is told, and is read again for who asks later */
};
enum frame_flag {
    FRAME_DIRTY = 1,   /* differs from what was written last */
    FRAME_WRITING = 2, /* an image is on its way */
    FRAME_WRITTEN = 4, /* in the running checkpoint: stays until that is the root, so that it can be written again */
    FRAME_HELD = 8     /* must stay: one of the above, words that exist in memory only, or a page below is held */
};

struct store_frame {
    uint64_t page;       /* FORMAT_PAGE */
    uint32_t state;      /* enum frame_state */
    uint32_t flags;      /* enum frame_flag */
    uint32_t parent;     /* frame of its directory page, or STORE_NO_FRAME: the superblock points to it */
    uint32_t children;   /* frames of pages below it */
    uint32_t held_children;
    uint32_t live;       /* words that exist in memory only: logged entries; blocks in flight, pending */
    uint32_t attempt;    /* LOADING: copy that is being read; BAD: status */
    uint32_t bounce;     /* LOADING: bounce page; BAD: since when, in ms modulo 2^32 */
};
_Static_assert(sizeof(struct store_frame) == 40, "a frame's entry");

/* Pages that lie in no frame but in tables of their own, by number: volume table, groups, slots. */
struct store_tables { uint64_t groups, slots, count; }; /* first numbers of the latter two; all */

/* A range of data blocks. */
struct store_range { uint64_t first, end; };
#define STORE_RANGES (FORMAT_EXTENTS + 1)

struct store_quarantine { uint64_t pba, count; };

/* --- In the arena. Changed through the journal only, but for the state STORE_LOADING. ------------------------------ */
struct store_area {
    struct store_geometry geometry;
    uint64_t state;             /* enum store_state */
    char reason[256];
    uint64_t load_resets;       /* loading has filled the big tables before: another one zeroes them first */
    uint64_t volumes_open;      /* not journaled: some volume's version may be odd until the next step */

    /* From the superblock; constant while STORE_READY but for `generation`. */
    uint64_t uuid_low, uuid_high;
    uint64_t device_blocks, log_blocks, log_second, slots, spare_slots;
    uint64_t extent_count;
    struct format_extent extents[FORMAT_EXTENTS];
    struct format_pointer roots[FORMAT_TREES]; /* newest */
    uint64_t generation;        /* of the durable root */
    uint64_t root_first;        /* roots that are to be durable before anybody is served: they know what the old one does not */
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
    uint64_t follow_ns;         /* a block is to follow the last one of the log then; 0: there is no need */
    uint64_t changed;           /* since the last sync began */
    uint64_t data_unflushed;    /* blocks were placed since the last good flush began */
    uint64_t sync_failures;
    uint64_t sync_status;       /* of the last one */

    /* The log block that was written ahead of its sync. */
    uint64_t ahead_sequence;    /* of the block; 0: none is on the device whose place has not been written again */
    uint64_t ahead_outstanding;
    uint64_t ahead_error;       /* of its writes or its flush */

    /* After a failed flush. */
    uint64_t rewrite_wanted;    /* the next sync begins by writing data again */
    uint64_t flush_failures;    /* noted in a block's fingerprint while it is in flight, compared when it is placed */
    uint64_t rewrite_sequence, rewrite_word; /* cursor: log block, word of its records */
    uint64_t rewrite_stage;     /* 0 collect, 1 being read, 2 being written */
    uint64_t rewrite_lost;      /* blocks that are not what they should be */
    uint64_t rewrite_count;
    uint64_t rewrite_pba[STORE_BATCH_READS];

    /* Checkpoint. */
    uint64_t checkpoint_redo;   /* a flush failed: pages written in this checkpoint are to be written again */
    uint64_t checkpoint_phase;
    uint64_t checkpoint_wanted;
    uint64_t checkpoint_cursor;
    uint64_t checkpoint_stage;  /* 0: pages; 1..6: directories of that level; then the slot tree */
    uint64_t checkpoint_log_start, checkpoint_log_chain;
    uint64_t checkpoint_ticket;
    uint64_t checkpoint_outstanding;
    uint64_t checkpoint_error;
    uint64_t checkpoint_retry_ns;
    uint64_t checkpoint_stored, checkpoint_zero_promises, checkpoint_mapped[ATOLL_VOLUME_COUNT]; /* at its beginning */
    uint64_t previous_count;    /* places that the durable root needs and the next one does not */
    uint64_t super_clean;       /* the durable superblock says so, and nothing was logged since */
    struct store_batch batches[STORE_BATCHES];

    /* Space, blocks. */
    uint64_t data_blocks;       /* that can hold data */
    uint64_t free_blocks, pending_blocks, stored_blocks /* in flight included */, in_flight_blocks, quarantined_blocks;
    uint64_t given_up_blocks;   /* of the quarantined: free, as far as is known, but their page of counts or fingerprints cannot be read */
    uint64_t reserved_blocks;   /* promises included */
    uint64_t references, zero_promises;
    uint64_t mapped[ATOLL_VOLUME_COUNT]; /* entries whose persistent value names a block */
    uint64_t cursor;            /* next place to look for free blocks */
    uint64_t sweep_frame, sweep_left;
    uint64_t cache_clock;       /* insertions into the fingerprint cache */
    uint64_t warm_group, warm_left; /* the fingerprint cache is being filled: next group + 1, entries to come */
    uint64_t quarantine_count;
    struct store_quarantine quarantine[STORE_QUARANTINE];

    /* Metadata pages. */
    uint64_t slots_free, slot_cursor;
    uint64_t map_pages;         /* of the map's tree that have a place */
    uint64_t map_fresh;         /* ... that exist in memory only */
    uint64_t frames_dirty, frames_held;

    /* Deletion. */
    uint64_t delete_volume;     /* id + 1 */
    uint64_t delete_leaf, delete_index, delete_again;

    uint64_t closing, closed;
};

/* --- Private to the process --------------------------------------------------------------------------------------- */
/* A page and the frame that it lies in; UINT64_MAX: none. Of its own, so that a page that is looked at often needs no look at the frames. */
struct store_memo { uint64_t page; uint32_t frame; };
#define STORE_MEMO 4096 /* requests and batches go to and fro between pages: fingerprints of 4 GiB of places, old and new; 8 GiB of a volume */

struct store {
    struct dedup *dedup;
    struct atoll_journal *journal;
    struct store_area *area;
    uint64_t arena_bytes;              /* of area and all below */
    int64_t kept_posted;               /* store_keep_posted */
    uint8_t *log_buffer;               /* STORE_LOG_BUFFER_BLOCKS blocks */
    uint8_t *ahead;                    /* 1 block: what was written ahead of its sync */
    uint8_t *staging;                  /* STORE_BATCHES * STORE_BATCH_PAGES pages */
    uint8_t *super_buffer;             /* 2 blocks: the copies */
    uint8_t *tables_begin;             /* what follows is zeroed before loading */
    uint64_t *groups;                  /* per STORE_GROUP_BLOCKS */
    uint64_t *slot_bits;               /* bit per slot: in use, or never to be used */
    uint64_t *slot_next;               /* ... in use by the newest pages: without those that only the durable root needs */
    uint64_t *table_dirty;             /* bit per page of store_tables */
    uint64_t *table_written;           /* ... written in the running checkpoint */
    uint32_t *previous;                /* slots: see previous_count */
    struct store_frame *frames;
    uint64_t *cache;                   /* fingerprint cache */
    uint64_t cache_mask;               /* of sets */
    uint32_t cache_age_shift;
    uint8_t *tables_end;
    uint8_t *pages;                    /* of the frames; no need to zero */

    /* From the area, or made by store_attach. */
    struct store_range ranges[STORE_RANGES];
    uint32_t range_count;
    struct store_tables tables;
    uint64_t slot_capacity;            /* bits that slot_bits has room for */
    uint32_t *hash_heads, *hash_next;  /* frames by page */
    uint32_t hash_mask;
    struct store_memo memo[FORMAT_TREES][STORE_MEMO]; /* last found of level 0, by page number */
    uint32_t *free_frames, free_count; /* free at the last commit: may be filled without the journal */
    uint32_t *freed_frames, freed_count; /* free from the next commit on */
    uint8_t *used;                     /* looked at since the clock came by */
    uint8_t *fresh;                    /* read, and nobody has come for it yet */
    uint32_t *urgent_stamp;            /* when it was wanted by the oldest that waits */
    uint32_t stamp;
    uint32_t clock_hand;
    uint32_t empty_left;               /* frames in which empty pages of the map are still to be looked for */
    uint64_t bounce_busy;              /* bit per bounce page of STORE_PAGE_READS */
    bool urgent, starved, starved_urgent, woken;
    uint64_t delete_retry_ns;
    bool delete_logged;                /* what a deletion waits for: logged entries; else pages that cannot be read */
    uint32_t delete_next;              /* volume at which the next one to delete is looked for */
    uint64_t regain_ns, regain_pause_ns, regain_group; /* store_regain_step: not before; since the last time; where it is */
    bool none_to_delete;               /* since a volume was last changed */
    uint32_t want_status;
    uint64_t want_page;
    struct store_load *load;           /* while loading */
};

#define STORE_SET(store, field, value) atoll_set64((store)->journal, &(store)->area->field, (value))
#define STORE_ADD(store, field, amount) \
    atoll_set64((store)->journal, &(store)->area->field, (store)->area->field + (uint64_t)(amount))

static inline void *store_page_memory(const struct store *store, uint32_t frame)
{
    return store->pages + (uint64_t)frame * ATOLL_BLOCK_BYTES;
}
static inline void store_set_bit(struct store *store, uint64_t *bits, uint64_t number, bool value)
{
    uint64_t *word = &bits[number / 64], bit = (uint64_t)1 << number % 64;
    if (((*word & bit) != 0) != value)
        atoll_set64(store->journal, word, *word ^ bit);
}
static inline void store_count(struct store *store, enum store_counter counter, uint64_t amount)
{
    atoll_count(store->dedup->domain, DEDUP_COUNTER_STORE_FIRST + (uint32_t)counter, amount);
}
static inline uint64_t store_identity(const struct store *store) { return store->area->uuid_low ^ store->area->uuid_high; }
/* True for blocks that can hold data. */
static inline bool store_usable(const struct store *store, uint64_t pba)
{
    for (uint32_t index = 0; index < store->range_count; index++)
        if (pba - store->ranges[index].first < store->ranges[index].end - store->ranges[index].first)
            return true;
    return false;
}

/* Words of the metadata log's record that begins with this one. */
static inline uint32_t store_record_words(uint64_t word)
{
    uint32_t type = FORMAT_RECORD_TYPE(word);
    return type == FORMAT_RECORD_BLOCK ? 4 : type == FORMAT_RECORD_VOLUME ? 1 + sizeof(struct format_volume) / 8 : 2;
}

/* --- store.c --- */
void store_lay_out(struct store *store, void *memory, const struct store_geometry *geometry);
/* Ends loading for good; printf-like, in the running transaction or outside of any. */
void store_fail(struct store *store, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Submits one request of kind IO_STORE over `bytes` at `memory`; returns its identity, 0 if no slot is free. */
uint64_t store_submit(struct store *store, enum store_io what, uint64_t number, uint32_t opcode, uint64_t pba, const void *memory,
                      uint64_t bytes);
/* A flush that comes after the requests of these identities (io_submit_sync); false if no slot is free. */
bool store_submit_flush(struct store *store, enum store_io what, const uint64_t *after, uint32_t count);
uint64_t store_checksum(const struct store *store, enum format_seed_kind kind, uint64_t number, const void *bytes, uint64_t count);
/* Fills a superblock copy (4096 bytes); `place` is 0..3: block 0, block 1, block N-2, block N-1. */
void store_seal_super(struct format_super *super, uint64_t place, void *block);
struct fingerprint store_print_of(const void *block);
bool store_all_zero(const void *memory, uint64_t bytes);
/* The STORE_BOUNCE_PAGES in the disk driver's buffer area, or NULL if that is too small. The first half is loading's and
 * store_rewrite.c's, the second store_cache.c's. */
const uint8_t *store_bounce(const struct store *store);

/* --- store_cache.c --- */
void store_cache_attach(struct store *store);
/* The frame of a page that is in memory, or STORE_NO_FRAME. */
uint32_t store_find(struct store *store, uint64_t page);
/* Has the page in memory. STORE_HAVE with *frame == STORE_NO_FRAME: the page is zeros and not there; with `create` it is made. */
enum store_want store_get(struct store *store, uint64_t page, bool create, uint32_t *frame);
void store_cache_io(struct store *store, uint64_t frame, uint32_t status);
/* Where a page that is being read into a frame is expected; 0: none is, or nowhere. */
uint64_t store_cache_io_address(const struct store *store, uint64_t frame);
/* Frames freed before the last commit can be used; keeps some free. True if somebody who waited may go on. */
bool store_cache_step(struct store *store);
void store_drop_frame(struct store *store, uint32_t frame);      /* not held, without children */
void store_look_for_empty(struct store *store);                  /* a checkpoint has ended */
void store_mark_dirty(struct store *store, uint32_t frame);
void store_set_flags(struct store *store, uint32_t frame, uint32_t set, uint32_t clear);
void store_change_live(struct store *store, uint32_t frame, int32_t change);
/* Where the pointer to a page in a frame stands. */
struct format_pointer *store_pointer(struct store *store, uint32_t frame);
/* Frames that may be held before changes must wait; at most half of them, so that a replay finds room: docs/format.md. */
uint64_t store_held_limit(const struct store *store);

/* --- store_page.c --- */
bool store_full_of_changes(struct store *store); /* changes wait for a checkpoint, which is begun */

/* --- store_slot.c --- */
/* Ranges of data blocks and tables from the area's extents. */
void store_know_places(struct store *store);
/* PBA of a slot's copy; 0: no such slot. */
uint64_t store_slot_pba(const struct store *store, uint64_t slot, uint32_t copy);
uint32_t store_take_slots(struct store *store, uint32_t want, uint64_t *slot);  /* a run */
void store_free_slot(struct store *store, uint64_t slot);    /* no durable root has it */
void store_retire_slot(struct store *store, uint64_t slot);  /* the durable root has it, the next one will not */
bool store_free_retired(struct store *store);                /* some of them; true if there are more */
void store_table_dirty(struct store *store, uint64_t number);
/* A page of the tables as it shall be on the device. */
void store_table_image(const struct store *store, uint64_t number, void *image);
bool store_table_behind(const struct store *store, uint64_t number);
uint64_t store_table_page(const struct store *store, uint64_t number);
/* Takes over what was read; false if it makes no sense. */
bool store_table_take(struct store *store, uint64_t number, const void *image);
uint32_t store_group_blocks(const struct store *store, uint64_t group);         /* of them, data blocks */

/* --- store_map.c --- */
/* Frame of a leaf that is in memory, or STORE_NO_FRAME. */
uint32_t store_leaf(struct store *store, uint32_t volume, uint64_t leaf);
/* Changes an entry; keeps the frame's live words and the volume's mapped_blocks. */
void store_set_entry(struct store *store, uint32_t frame, uint32_t index, uint64_t value);
/* The records that store_place of this would note after `before` words of others that are yet to be noted; returns their number, 0: that
 * cannot be told. `records` has room for STORE_CHANGE_BYTES behind those. */
uint32_t store_place_records(struct store *store, const struct store_placing *placing, uint64_t *records, uint32_t before);
/* A persistent value goes: its reference or promise is dropped. Returns words written to `records` (0 or 2). */
uint32_t store_drop_value(struct store *store, uint32_t volume, uint64_t value, uint64_t *records);

/* --- store_space.c --- */
/* The words of the page of counts or the fingerprint of a block, NULL if that page is not in memory. */
uint32_t *store_ref(struct store *store, uint64_t pba);
struct fingerprint *store_print(struct store *store, uint64_t pba);
void store_set_ref(struct store *store, uint64_t pba, uint32_t word); /* and what follows from it */
void store_refs_loaded(struct store *store, uint32_t frame);          /* a page of counts was read or made */
bool store_keeps_content(struct store *store, uint64_t pba);   /* data that cannot be overwritten before the next sync */
int64_t store_available(const struct store *store);            /* blocks that may still be promised to data */
bool store_sweep(struct store *store);                         /* pending blocks of synced epochs become free */
bool store_regain_step(struct store *store);                   /* pages of counts that could not be read are tried again */

/* --- store_print.c --- */
void store_remember_print(struct store *store, uint64_t pba, uint32_t count);  /* into the fingerprint cache */
void store_forget_print(struct store *store, uint64_t pba);
bool store_warm_step(struct store *store);

/* --- store_log.c --- */
/* Adds the records of one change (words <= FORMAT_LOG_RECORD_BYTES / 8). Room is the caller's care: store_has_room. */
void store_log_append(struct store *store, const uint64_t *records, uint32_t words);
void store_log_nothing(struct store *store);                   /* a record that says so */
void store_log_seal(struct store *store);                      /* the open block, if it holds anything */
/* Makes a block of the open block's number of `used_bytes` of records that stand in it; returns its checksum. */
uint64_t store_log_finish(const struct store *store, uint8_t *block, uint64_t used_bytes, uint32_t flags);
uint8_t *store_log_block(const struct store *store, uint64_t sequence); /* in the buffer */
static inline uint64_t store_log_pba(const struct store_area *area, uint64_t sequence, uint32_t copy) /* on the device */
{
    return sequence % area->log_blocks + (copy == 0 ? FORMAT_SUPER_BLOCKS : area->log_second);
}
uint64_t store_log_room(const struct store_area *area);        /* blocks that may be begun before something must become durable */
bool store_sync_step(struct store *store);
void store_sync_io(struct store *store, enum store_io what, uint32_t status);
void store_sync_fail(struct store *store, uint32_t status);    /* the running sync fails */
/* Some device flush failed: all that was written since the last good one is in doubt, whoever wrote it. */
void store_flush_failed(struct store *store, uint32_t status);

/* --- store_ahead.c --- */
void store_ahead_io(struct store *store, enum store_io what, uint32_t status);
/* The open block holds something if there is another one on the device in its place. */
void store_ahead_settle(struct store *store);
/* True if the sealed block `sequence` is what was written ahead. */
bool store_ahead_is(const struct store *store, uint64_t sequence);
void store_ahead_over(struct store *store);                    /* a sync is complete */

/* --- store_rewrite.c --- */
void store_rewrite_begin(struct store *store);
bool store_rewrite_step(struct store *store);

/* --- store_checkpoint.c --- */
void store_want_checkpoint(struct store *store);               /* behind the one that is under way, if one is */
void store_root_first(struct store *store);                    /* nobody is served before no older root can be found */
/* Somebody needs pages that can be let go. A checkpoint under way makes such, and with fewer dirty ones than `least` none would. */
void store_want_clean_pages(struct store *store, uint64_t least);
bool store_checkpoint_step(struct store *store);
void store_checkpoint_io(struct store *store, enum store_io what, uint64_t number, uint32_t status);
/* A frame's page as the device shall hold it now (4096 bytes). */
void store_page_image(const struct store *store, uint32_t frame, void *image);
void store_checkpoint_failed(struct store *store);             /* notes it, and when to go on */

/* --- store_root.c --- */
bool store_root_step(struct store *store);                     /* phases SUPER, FLUSH, FREE */
void store_root_io(struct store *store, enum store_io what, uint32_t status);

/* --- store_load.c --- */
void store_load_begin(struct store *store);
bool store_load_step(struct store *store);
void store_load_io(struct store *store, enum store_io what, uint64_t number, uint32_t status);

/* --- store_grow.c --- */
/* While loading: the store becomes as large as its device, if that was asked for. False: not yet. */
bool store_grow(struct store *store);

/* --- store_volume.c --- */
void store_volume_image(const struct store *store, uint32_t volume, struct format_volume *image);
struct atoll_volume *store_volume_open(struct store *store, uint32_t volume); /* before it is changed */
bool store_volume_room(struct store *store);
void store_volume_log(struct store *store, uint32_t volume);   /* notes it as it is now */
/* Takes over an image that was read; false if it makes no sense. */
bool store_volume_take(struct store *store, const struct format_volume *image);
bool store_delete_step(struct store *store);
void store_volumes_publish(struct store *store);               /* versions become even after the commit */

#endif
