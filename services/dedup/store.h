/*
 * The store: dedup's persistent state and its form on the device. Volumes, block maps, reference counts,
 * fingerprints, allocation, metadata log, checkpoints, loading.
 *
 * Memory is ahead of the device: every change is made in the arena at once (transactionally) and noted as a record
 * in the metadata log's buffer; store_sync makes all of it durable. In memory the map may also name write-log records
 * (MAP_LOG); those exist for the datapath only: on the device, that block has the record's *base* value, which the datapath
 * keeps and hands back with each persistent change.
 *
 * All functions run inside the transaction of dedup's current step unless said otherwise. Each is bounded in time.
 * A "block" is ATOLL_BLOCK_BYTES. PBA is the block number on the device (pba * 4096 = byte offset).
 *
 * Map, counts and fingerprints are paged: see Paging, below.
 */
#ifndef ATOLL_DEDUP_STORE_H
#define ATOLL_DEDUP_STORE_H

#include "services/dedup/io.h"

/* --- Map values --------------------------------------------------------------------------------------------------
 * 64 bits: kind in the top 4, the rest a number. Values reach the device (but MAP_LOG): never renumber. */
#define MAP_KIND(value) ((value) >> 60)
#define MAP_NUMBER(value) ((value) & 0x0fffffffffffffffu)
enum map_kind {
    MAP_HOLE = 0,      /* reads as zeros, takes no space; the value is 0 */
    MAP_PBA = 1,       /* number = PBA; holds one reference */
    MAP_LOG = 2,       /* number = write-log record; never on the device */
    MAP_ZERO = 3       /* reads as zeros but its space is promised (WRITE_ZEROES with NO_HOLE): holds one reservation */
};
#define MAP_VALUE(kind, number) ((uint64_t)(kind) << 60 | (uint64_t)(number))

struct fingerprint { uint64_t low, high; }; /* XXH3-128 of the block */
static inline bool print_equal(struct fingerprint a, struct fingerprint b) { return a.low == b.low && a.high == b.high; }

/* --- Sizes and life ---------------------------------------------------------------------------------------------- */
struct store_geometry {
    uint64_t device_blocks;
    uint64_t frames;             /* metadata pages that can be in memory, >= STORE_FRAMES_MIN */
    uint64_t fingerprint_slots;  /* bounded fingerprint cache: entries, a power of two, >= 1024 */
    uint64_t grow;               /* 1: a store that is smaller than its device becomes as large while it is loaded */
    uint64_t log_blocks;         /* metadata log at format, blocks of each copy; 0 = derived from the device's size */
};
#define STORE_FRAMES_MIN 128 /* one change touches some 20 pages with their directories */
/* The last pages of the disk role's buffer area, which the store reads into while it loads. Nobody else may use them. */
#define STORE_BATCH_READS 64  /* of loading, and of writing again after a failed flush */
#define STORE_PAGE_READS 64   /* of metadata pages: at once */
#define STORE_COUNTS_PER_PAGE 1024
#define STORE_BOUNCE_PAGES (STORE_BATCH_READS + STORE_PAGE_READS)
uint64_t store_arena_bytes(const struct store_geometry *geometry); /* of dedup's role area */

/* Attaches to its part of the arena; `fresh` on a zeroed one. After a crash (not fresh) everything is as at the last
 * commit; only private pointers are set. Not in a transaction. */
void store_attach(struct dedup *dedup, void *memory, const struct store_geometry *geometry, bool fresh);

enum store_state {
    STORE_NEW = 0, STORE_LOADING = 1, STORE_READY = 2,
    STORE_BLANK = 3,   /* the device holds zeros where superblocks belong: store_format is allowed */
    STORE_FAILED = 4   /* store_reason() says why: damaged, of another version, too small, not a store */
};
/* After the death of all processes (drivers anew, arena kept) io_adopt sends the store's I/O again as it was: the memory that
 * it refers to is unchanged. Nothing else is needed here. */
/* Starts reading superblocks, metadata pages and metadata log (I/O of kind IO_STORE; progress in store_step). */
void store_load(struct dedup *dedup);
void store_format(struct dedup *dedup, uint64_t store_uuid_low, uint64_t store_uuid_high);
enum store_state store_state(struct dedup *dedup);
const char *store_reason(struct dedup *dedup); /* 256 bytes at most, in the arena */
/* One bounded step of whatever the store has going on (loading, log write, checkpoint, deletion of volumes). Returns
 * true if it did something and wants to be called again soon. Own transaction steps inside are allowed: called outside
 * of any transaction. */
bool store_step(struct dedup *dedup);
/* The same without what changes volumes, counts or maps: for who looks at all of them, from step to step. */
bool store_step_quiet(struct dedup *dedup);
/* Milliseconds after which store_step must be called again at the latest, for what is tried again after a failure; 0: no limit. */
uint64_t store_wake_ms(struct dedup *dedup);

/* --- Volumes (table in atoll_dedup_public, read by nbd and kernel under `version`) ---------------------------------
 * Return enum atoll_status and leave a text in `reason` (256 bytes). Changes are durable after the next store_sync. */
int store_volume_create(struct dedup *dedup, const char *name, uint32_t name_bytes, uint64_t size_bytes, uint32_t flags,
                        uint32_t threshold, uint32_t tier_threshold, char *reason); /* thresholds: 0 takes the default */
/* Thresholds of a volume (limits.h); 0 leaves one as it is. Blocks that are stored already stay where they are. */
int store_volume_set(struct dedup *dedup, uint32_t volume, uint32_t threshold, uint32_t tier_threshold, char *reason);
int store_volume_resize(struct dedup *dedup, uint32_t volume, uint64_t size_bytes, char *reason); /* up only */
/* Blocks are freed by store_step. Entries that are MAP_LOG are waited for: the datapath ends each record of a volume that
 * is being deleted as usual, with store_place, store_share or store_unmap. No new ones: store_map_log refuses. */
int store_volume_delete(struct dedup *dedup, uint32_t volume, char *reason);

/* --- Paging -------------------------------------------------------------------------------------------------------
 * Map, reference counts and fingerprints lie on the device; a cache of bounded size holds what is in use. Whoever is
 * about to look at or change something asks for it first, in the same step:
 *
 *   STORE_HAVE   it is in memory, until the end of the step
 *   STORE_WAIT   it is being read, or a page or a checkpoint must come first. The request is executed again from its beginning
 *                (OUTCOME_RETRY); whenever waiting may have an end, store_step returns true, which sets dp->retry
 *   STORE_LOST   it cannot be had: store_want_status() says why (ATOLL_ECORRUPT: both copies of the page are bad,
 *                store_want_page() names it; ATOLL_ENOSPC: no place for one more page of metadata). Nothing was changed
 *
 * Many at once need not fit: who asks for more than some hundred blocks at once goes block by block, and what was done stays done
 * (destage: record by record; TRIM: `progress`). In a step, what was asked for stays; so ask for all that one change needs,
 * then make the change. A change (store_place, store_share, store_unmap, store_promise_zero) needs, in the same step:
 *   store_want_map of its lba (STORE_CHANGE), store_want_blocks of `pba` and of the PBA in `base`, and store_has_room. */
enum store_want { STORE_HAVE = 0, STORE_WAIT = 1, STORE_LOST = 2 };
/* The leaves of [lba, lba + count). STORE_CHANGE, STORE_LOG: those that do not exist are made. STORE_LOG is what store_map_log
 * needs; STORE_WAIT then also means that logged entries hold too many pages, or that too much was changed since the last
 * checkpoint. (For persistent changes store_has_room says so.) */
enum store_use { STORE_LOOK = 0, STORE_CHANGE = 1, STORE_LOG = 2 };
enum store_want store_want_map(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t count, enum store_use use);
/* Counts and fingerprints of these places (any order; those that are no data blocks are skipped). */
enum store_want store_want_blocks(struct dedup *dedup, const uint64_t *pbas, uint32_t count);
/* The count behind a persistent map value: what dropping it needs. STORE_LOST is no reason to stop: its block stays counted. */
enum store_want store_want_base(struct dedup *dedup, uint64_t base);
/* Fingerprints only: what reading them needs (cache_load). */
enum store_want store_want_prints(struct dedup *dedup, const uint64_t *pbas, uint32_t count);
/* What store_candidates looks at for this fingerprint. Those whose pages are not in memory store_candidates leaves out, so
 * nobody has to wait; matching is worth one. */
enum store_want store_want_candidates(struct dedup *dedup, struct fingerprint print);
/* Cache lines on their way, for batches: of what is in memory, and nothing else happens. Fingerprint and count of a place; the set in which
 * store_candidates looks, and that in which the fingerprint of a place stands; a map entry. */
void store_prefetch_block(struct dedup *dedup, uint64_t pba);
void store_prefetch_candidates(struct dedup *dedup, struct fingerprint print);
void store_prefetch_forget(struct dedup *dedup, uint64_t pba);
void store_prefetch_map(struct dedup *dedup, uint32_t volume, uint64_t lba);
/* What store_allocate needs. STORE_WAIT: pages of counts and fingerprints of the next free places are being read. */
enum store_want store_want_space(struct dedup *dedup);
uint32_t store_want_status(struct dedup *dedup);
uint64_t store_want_page(struct dedup *dedup);
/* True if what was asked for last waits for want of a page to put it in, not for the device: then nobody younger may begin. */
bool store_starved(struct dedup *dedup);
/* Who asks now is the oldest that waits (of the requests, or destage's oldest run): it may take the pages that others wait for. */
void store_urgent(struct dedup *dedup, bool urgent);
/* True while so many pages are held by logged entries that destage should not wait for its time. */
bool store_pressed(struct dedup *dedup);

/* --- For the scrub ------------------------------------------------------------------------------------------------- */
/* Counts and fingerprints of these places, to look at only. */
enum store_want store_want_look(struct dedup *dedup, const uint64_t *pbas, uint32_t count);
/* The page of counts that the block is of, to look at only: nothing is made. */
enum store_want store_want_counts(struct dedup *dedup, uint64_t pba);
/* The first place from `pba` on that may hold a stored block: groups without one are passed over. device_blocks if there is none. */
uint64_t store_stored_from(struct dedup *dedup, uint64_t pba);
struct store_page_copies { uint64_t page, checksum, pba[2]; };
/* The next metadata pages that are on the device, from *cursor on (STORE_PAGES_BEGIN at first), which moves behind them.
 * STORE_HAVE with *count == 0: that was all. */
#define STORE_PAGES_BEGIN ((uint64_t)1 << 48) /* the volume table's directory */
enum store_want store_pages(struct dedup *dedup, uint64_t *cursor, struct store_page_copies *found, uint32_t most, uint32_t *count);
bool store_page_right(struct dedup *dedup, uint64_t page, uint64_t checksum, const void *image);
/* One copy of a page, or both, are bad: it is written anew by a checkpoint, which comes at once. */
enum store_repair {
    STORE_REPAIR_DONE = 0,
    STORE_REPAIR_WAIT = 1,
    STORE_REPAIR_CHANGED = 2,  /* it has another content or place by now: nothing to do */
    STORE_REPAIR_LOST = 3      /* no copy is good, and it is not in memory */
};
enum store_repair store_page_repair(struct dedup *dedup, uint64_t page, uint64_t checksum);

/* --- Map ---------------------------------------------------------------------------------------------------------- */
uint64_t store_map_get(struct dedup *dedup, uint32_t volume, uint64_t lba);
/* The 512 entries of leaf lba / 512, or NULL if it is not there: all holes, if it was asked for (store_want_map). Read only; valid
 * until the end of the step. */
const uint64_t *store_map_leaf(struct dedup *dedup, uint32_t volume, uint64_t leaf);
/* *next: first leaf >= `leaf` (< `end`) that exists, else `end`: sparse volumes are skipped quickly. The leaf itself is not read. With
 * STORE_LOST: the first one behind those that the lost directory is about, of which nobody knows which there are. */
enum store_want store_next_leaf(struct dedup *dedup, uint32_t volume, uint64_t leaf, uint64_t end, uint64_t *next);
/* Points an entry at a write-log record (or, for a superseded record, at a newer one). Its leaf was asked for (STORE_LOG).
 * Notes nothing for the device. `old` is what the entry held. Keeps mapped_blocks. */
int store_map_log(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t record, uint64_t *old);

/* --- Persistent changes of one entry. `base`: the persistent value (HOLE, PBA or ZERO) under it, which loses its reference
 * or promise. The entry itself is set to the new value only if it is `expected` now (else a newer record is there: then
 * the caller must not call these). Each notes metadata log records with absolute values. ---------------------------- */
void store_place(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base, uint64_t pba, struct fingerprint print);
struct store_placing {
    uint32_t volume;
    uint64_t lba, base, pba;
    struct fingerprint print;
};
/* These are about to be placed, in this order, when the write of identity `write` is done, and then a sync will be asked for. If nothing else
 * is noted before it, it need not write anything: its log block is written now, beside their data, and the device flushed behind both. A hint;
 * true if it was taken. */
bool store_place_ahead(struct dedup *dedup, const struct store_placing *placings, uint32_t count, uint64_t write);
/* False if the block cannot take one more reference (then write a new copy). */
bool store_share(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base, uint64_t pba);
void store_unmap(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base);      /* -> HOLE */
int store_promise_zero(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base); /* -> ZERO; takes over one reservation of the caller's */

/* --- Space (I7) ---------------------------------------------------------------------------------------------------
 * Reserve before acknowledging; hand back what was not needed. A reservation counts free blocks and those that become free
 * with the next sync. Freed blocks are not allocated again before the metadata that freed them is durable. */
bool store_reserve(struct dedup *dedup, uint64_t blocks);
/* The same for blocks whose persistent value names a place with one reference, which becomes free when they are placed: a few
 * blocks are kept for these, so that a full device can be overwritten. */
bool store_reserve_overwrite(struct dedup *dedup, uint64_t blocks);
/* For a posted write, whose client has been answered: what was kept for it (store_keep_posted), even if places were lost since. False: more
 * were posted than may be, and nobody's space is left for them. */
bool store_reserve_posted(struct dedup *dedup, uint64_t blocks);
/* For an entry that gives up its promise for it. */
void store_reserve_promised(struct dedup *dedup, uint64_t blocks);
/* So many blocks are promised to nobody but posted writes; private to the process, 0 at first. */
void store_keep_posted(struct dedup *dedup, uint64_t blocks);
/* What store_reserve would grant if nothing were kept for posted writes; may be negative. */
int64_t store_unpromised(struct dedup *dedup);
/* Pages that the map may still grow by; *most: that it may have. */
uint64_t store_map_room(const struct dedup *dedup, uint64_t *most);
void store_unreserve(struct dedup *dedup, uint64_t blocks);
/* A run of at most `want` free blocks in sequence, after the last one handed out where possible; consumes as many reservations;
 * *pba is its start; the blocks are "in flight" (in use, no reference) until store_place or store_abandon. 0 if free blocks exist only after a
 * sync (caller asks for one). */
uint32_t store_allocate(struct dedup *dedup, uint32_t want, uint64_t *pba);
/* True if store_allocate cannot find any, nor after a sync: there are fewer places than reservations. */
bool store_exhausted(struct dedup *dedup);
/* Back to free (at the next sync) and to the caller's reservation. `quarantine`: never again in this run (late I/O may land there). */
void store_abandon(struct dedup *dedup, uint64_t pba, uint32_t count, bool quarantine);
/* One place, whose write is over, and whose fingerprint cannot be noted because its page is lost. The reservation goes back to the
 * caller; nobody gets the place before that page can be read. */
void store_lay_aside(struct dedup *dedup, uint64_t pba);
struct store_space {
    uint64_t device_blocks, metadata_blocks /* kept for metadata */, metadata_used_blocks /* by its pages */, stored_blocks /* with references or in flight */, free_blocks, pending_free_blocks,
        reserved_blocks /* zero promises included */, references /* sum over stored blocks */, zero_promises,
        quarantined_blocks, available_blocks /* what store_reserve would still grant */, cache_pages, cache_held_pages, cache_dirty_pages;
};
void store_space(struct dedup *dedup, struct store_space *space);
/* For the checker: the words of all groups add up to what store_space says. */
bool store_groups_agree(struct dedup *dedup);

/* --- Fingerprints -------------------------------------------------------------------------------------------------- */
/* Of a block whose fingerprint was asked for (store_want_prints); false: not a data block, or never used. If its count is in memory too
 * (store_want_blocks), false as well if it is not stored; else it may be what was stored there before. */
bool store_fingerprint(struct dedup *dedup, uint64_t pba, struct fingerprint *print);
uint32_t store_references(struct dedup *dedup, uint64_t pba);
/* Candidates for equal content, best first (at most `most`): hints, never proofs. */
uint32_t store_candidates(struct dedup *dedup, struct fingerprint print, uint64_t *pbas, uint32_t most);
/* True if pba is a data block of this device (checks values that came from elsewhere). */
bool store_pba_valid(struct dedup *dedup, uint64_t pba);

/* The last reference to a place is gone: it will be used for something else. Provided by the datapath. */
void datapath_freed(struct dedup *dedup, uint64_t pba);
/* Identity of the store, once it is READY. */
void store_uuid(struct dedup *dedup, uint64_t *low, uint64_t *high);

/* --- Durability ----------------------------------------------------------------------------------------------------
 * store_sync asks that all changes made so far become durable: data writes completed so far -> device flush -> metadata log
 * blocks -> device flush. Returns a ticket; it is reached when store_synced() >= ticket. Requests join: one sync runs at a
 * time, the next covers all that came meanwhile. store_failed() counts failures; a failed one is tried again by the next store_sync. */
uint64_t store_sync(struct dedup *dedup);
uint64_t store_synced(struct dedup *dedup);
uint64_t store_sync_failures(struct dedup *dedup, uint32_t *last_status);
/* True if the metadata log's buffer has room for `records` more persistent changes; else wait (a sync is started by itself). */
bool store_has_room(struct dedup *dedup, uint32_t records);
/* Sync, checkpoint, mark the superblock clean; then store_step until it returns false and store_closed() is true. */
void store_close(struct dedup *dedup);
bool store_closed(struct dedup *dedup);
/* A new run serves on from an arena whose last run had begun to close, or had closed, and did not come to its end. */
void store_reopen(struct dedup *dedup);
/* The base value of a write-log record, provided by the datapath: a checkpoint writes it in place of MAP_LOG. */
uint64_t datapath_record_base(struct dedup *dedup, uint64_t record);

/* Counters, from DEDUP_COUNTER_STORE_FIRST on. */
enum store_counter {
    STORE_COUNTER_SYNCS = 0,
    STORE_COUNTER_SYNC_FAILURES = 1,
    STORE_COUNTER_LOG_BLOCKS = 2,       /* written, each copy once */
    STORE_COUNTER_CHECKPOINTS = 3,
    STORE_COUNTER_PAGES_WRITTEN = 4,    /* metadata pages, both copies counted as one */
    STORE_COUNTER_PAGES_REPAIRED = 5,   /* found damaged in one copy */
    STORE_COUNTER_IO_ERRORS = 6,
    STORE_COUNTER_LEAVES_MADE = 7,
    STORE_COUNTER_CACHE_EVICTIONS = 8,  /* fingerprint cache */
    STORE_COUNTER_LOG_BLOCKS_DROPPED = 9, /* the last one, whose data were not there when the store was loaded */
    STORE_COUNTER_SYNCS_AHEAD = 10,     /* whose log block had been written ahead */
    STORE_COUNTER_COUNT = 11
};

#endif
