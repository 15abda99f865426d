/*
 * The datapath: dedup's volatile half. Requests, write log, destage, read cache. All of it lies in dedup's arena, but
 * for indices that can be made again (struct datapath).
 *
 *   role area:    struct dp_arena          lists, counts, runs, request slots
 *                 struct dp_record[]       write log; record i is page i of nic's buffers, then of dedup's merge pages
 *                 struct dp_page[]         read cache: pages of the disk driver's buffers, then of llrrm's
 *                 uint8_t held[]           published: which of nic's pages the log refers to
 *                 look-up table            published: what nic and nbd answer by themselves (datapath_lookup.c)
 *                 the fast tier            datapath_tier.h
 *   buffer area:  merge pages, then 64 KiB of zeros (what holes are read from), then the tier's staging pages
 *
 * Life of a logged block:
 *
 *   FREE -> LOGGED -> MATCHING -> WRITING -> (place or share it) -> let go
 *             |           |          |
 *             +-----------+----------+--- overwritten or trimmed: LOGGED is let go at once, the others are DROPPED
 *                                         and let go by their run
 *   let go: PINNED until the end of the step, and while a reader sends from the page; then FREE (nic's page is given back;
 *   RETURNING while the ring to nic is full)
 *
 * Each LOGGED or MATCHING record holds one reservation of space; WRITING has turned it into a place (run's pba + index).
 * A new write to a logged block takes over the old record's base value, its reservation and its place in the order
 * of destage, so that a flush never waits behind writes that came after it.
 *
 * A request is applied in one transaction at some moment between its acceptance and its completion, or not at all; the order of
 * outstanding requests among each other is free (NBD). So a request that must wait (for a page to be read, for
 * space) is simply executed again from its beginning, and nothing waits behind it. Only READs that were resolved keep
 * their pins and segments, and large TRIM and ZERO requests go on where they were.
 *
 * After a crash: the journal is rolled back; datapath_attach makes the private indices again (hash of the cache, free
 * pages, queues of waiting requests in the order of acceptance). I/O in flight completes to the successor.
 */
#ifndef ATOLL_DEDUP_DATAPATH_H
#define ATOLL_DEDUP_DATAPATH_H

#include "services/dedup/counters.h"
#include "services/dedup/dedup.h"
#include "services/dedup/datapath_tier.h"
#include "services/dedup/dedup_api.h"
#include "services/dedup/reuse.h"
#include "services/dedup/runs.h"
#include "services/dedup/s3fifo.h"

#define DP_NONE 0xffffffffu
/* Link of a record in a matching run: equal blocks are stored, but too few in sequence. */
#define DP_REJECTED 0xfffffffeu
/* There are equal blocks, but no pages to read them into, or there were: the block is written. */
#define DP_UNREAD 0xfffffffdu
#define DP_BLOCK ATOLL_BLOCK_BYTES

/* Segments of a result: each block one, and holes between. */
#define DP_SEGMENTS (2 * ATOLL_PART_BLOCKS)
/* Zeros that holes refer to. */
#define DP_ZERO_BYTES 65536
/* Batches under way, in comparison or in gather writes; with ATOLL_IO_BLOCKS each this is 64 MiB in flight: with half as many large
 * writes waited for the device while it waited for them. */
#define DP_RUNS 64
/* Records of a run: those written and those found equal to one of them (followers). */
#define DP_RUN_RECORDS (2 * ATOLL_IO_BLOCKS)
/* A step takes no more work when its journal holds this many entries: the largest single piece of work (completion of a
 * run with followers, a slice of a TRIM) stays below the rest. */
#define DP_STEP_JOURNAL (ATOLL_JOURNAL_ENTRIES / 3)
/* Messages of one ring taken in a step. */
#define DP_STEP_MESSAGES 64
/* Blocks of a TRIM or ZERO done in one step of it. */
#define DP_RANGE_BLOCKS 256
/* Map entries looked at by one EXTENTS request. */
#define DP_EXTENTS_LEAVES 64
/* Blocks that one CACHE request reads ahead. */
#define DP_PREFETCH_BLOCKS 256
/* Pages at the end of the driver's buffers, before the store's, that the scrub reads into; damaged blocks that it keeps
 * by name, and places in volumes that it names for each. */
#define DP_SCRUB_PAGES 64
#define DP_SCRUB_DAMAGED 64
#define DP_SCRUB_REFERRERS 4
/* Request slots: nbd's and nic's, and dedup's own for posted writes (datapath_posted.c). */
#define DP_SLOTS (ATOLL_SLOT_COUNT + ATOLL_POSTED_BLOCKS)
/* Records whose sets of equal ones are asked for before they are entered there: those of a large write lie in memory that is in no
 * cache, beside a page that is being asked for at the same time. */
#define DP_EQUAL_LATE 16
/* Blocks that one step can put into the look-up table; more are not put there. */
#define DP_LOOKUP_NOTES 4096
/* Pages that the read cache makes free at once when it has none: one look at who uses them serves all. */
#define DP_EVICTIONS 32
/* Blocks of which the last ones say how many are repeats, and what `repeats` is where all are. */
#define DP_REPEATS_WEIGHT 4096
#define DP_REPEATS_ALL (DP_REPEATS_WEIGHT * DP_REPEATS_WEIGHT)
/* Smallest read cache: two parts of reads at once. */
#define DP_CACHE_MINIMUM 256

enum record_state {
    RECORD_FREE = 0,
    RECORD_LOGGED = 1,
    RECORD_MATCHING = 2,
    RECORD_WRITING = 3,
    RECORD_DROPPED = 4,
    RECORD_PINNED = 5,
    RECORD_RETURNING = 6
};

enum record_flag {
    RECORD_FAILED = 1,  /* its last write failed */
    RECORD_CORRUPT = 2, /* page is not what was acknowledged: kept, never destaged, not in the list */
    RECORD_SUSPECT = 4, /* dedup crashed while it was destaged with others: next time alone */
    RECORD_POISON = 8,  /* dedup crashed while it was destaged alone: as CORRUPT, but can be read */
    RECORD_CONDEMNED = 16 /* POISON as soon as its run, whose write is under way, has ended */
};
#define RECORD_ASIDE (RECORD_CORRUPT | RECORD_POISON)

struct dp_record {
    uint64_t lba;
    uint64_t base;              /* persistent map value underneath */
    struct fingerprint print;   /* of the block as acknowledged */
    uint64_t order;
    uint16_t volume;
    uint16_t flags;             /* enum record_flag */
    uint32_t logged_ms;         /* when, modulo 2^32 */
    uint32_t previous, next;    /* LOGGED: list in the order of destage; RETURNING: next */
    uint32_t state;             /* enum record_state */
    uint32_t pins;              /* of readers */
};
_Static_assert(sizeof(struct dp_record) == 64, "a record is one cache line");

enum run_state { RUN_FREE = 0, RUN_MATCHING = 1, RUN_WRITING = 2, RUN_WRITTEN = 3 };

struct dp_run {
    uint32_t state;
    uint32_t status;            /* RUN_WRITTEN: of the write */
    uint64_t pba;               /* of the first of the written */
    uint32_t writer_count;      /* records[0..writer_count) go to pba + index */
    uint32_t record_count;      /* the rest are followers: equal to records[link[i]] */
    uint32_t done;              /* RUN_WRITTEN: records that have been finished, of both kinds */
    uint32_t reserved;
    uint64_t min_order;
    uint32_t records[DP_RUN_RECORDS];
    uint32_t link[DP_RUN_RECORDS]; /* MATCHING: cache page to compare with, DP_NONE, DP_REJECTED or DP_UNREAD. WRITTEN, of a
                                    * writer: DP_NONE, or DP_REJECTED once its place is not its own any more */
};

enum page_state {
    PAGE_FREE = 0,
    PAGE_LOADING = 1,
    PAGE_VALID = 2,
    PAGE_FAILED = 3,  /* could not be read, `status` says why; free when the last waiter has seen it */
    PAGE_STALE = 4,   /* its place was rewritten while it was read, or the fast tier failed: who waits executes again */
    PAGE_ABANDONED = 5, /* being read by a driver that does not answer: nobody waits for it, and it is not used for anything else */
    PAGE_UNCHECKED = 6 /* read for destage alone, and neither compared with its fingerprint nor with a block: nothing for a client yet */
};

struct dp_page {
    uint64_t pba;
    struct fingerprint print;   /* what was stored there when the read began */
    uint32_t state;             /* enum page_state */
    uint32_t pins;
    uint32_t attached;          /* 1: found by pba */
    uint32_t status;
};

/* Pages of one driver: [first, first + count) of the table. */
enum { POOL_DISK = 0, POOL_TIER = 1, DP_POOLS = 2 };
struct dp_pool {
    uint64_t buffer;            /* address of the first page */
    uint32_t first, count;
    uint32_t *free;             /* stack */
    uint32_t *limbo;            /* free but for readers that dedup does not know: see cache_settle */
    uint32_t free_count, limbo_count;
    struct s3fifo *queues;      /* of attached pages, by number within the pool: which gives way */
};

enum slot_state { SLOT_FREE = 0, SLOT_ACCEPTED = 1, SLOT_DONE = 2 };
enum slot_phase {
    PHASE_START = 0,    /* to be executed (again) from the beginning */
    PHASE_LOADING = 1,  /* READ: resolved, some pages are being read */
    PHASE_RANGE = 2,    /* TRIM, ZERO: goes on at `progress` */
    PHASE_DESTAGE = 3,  /* FLUSH, FUA: until all up to `target` is on the device */
    PHASE_SYNC = 4      /* FLUSH, FUA: until sync `ticket` */
};

struct dp_slot {
    struct atoll_descriptor request; /* ACCEPTED: copied from the ring */
    /* From here to `segments` saved as a whole before a change. */
    uint64_t identity;               /* last accepted */
    uint64_t acceptance;             /* order number */
    uint64_t target;                 /* flush: log order covered; write waiting for space: likewise, 0 none */
    uint64_t ticket;
    uint64_t sync_failures;          /* when the ticket was drawn */
    uint64_t progress;               /* next LBA */
    uint64_t failed_address;         /* PBA that could not be read, or is not right */
    uint64_t failed_lba;             /* + 1; 0: not known */
    uint32_t state, phase;
    uint32_t part, status;
    uint32_t result_bytes;
    uint32_t extent_count;           /* EXTENTS: entries in `segments` */
    uint32_t segment_count;          /* in `segments`; their pages are pinned */
    uint32_t pinned_place;           /* in dp_arena.pinned, or DP_NONE */
    uint32_t posted;                 /* 1: nobody waits for its answer */
    uint32_t asker;                  /* role that does */
    struct atoll_segment segments[DP_SEGMENTS];
};
#define DP_SLOT_HOT_BYTES (offsetof(struct dp_slot, segments) - offsetof(struct dp_slot, identity))
_Static_assert(DP_SLOT_HOT_BYTES % 8 == 0, "saved by words");
_Static_assert(sizeof(struct atoll_extent) == sizeof(struct atoll_segment), "extents lie where segments do");

enum scrub_state { SCRUB_IDLE = 0, SCRUB_DATA = 1, SCRUB_METADATA = 2, SCRUB_REFERRERS = 3, SCRUB_DONE = 4, SCRUB_CANCELLED = 5 };
enum scrub_block_state { SCRUB_UNREAD = 0, SCRUB_READING = 1, SCRUB_RIGHT = 2, SCRUB_WRONG = 3 };

struct dp_scrub_block {
    uint64_t pba;
    struct fingerprint print;  /* when its read began; of a metadata page: checksum, page */
    uint32_t state;            /* enum scrub_block_state */
    uint32_t attempts;
    uint32_t status;           /* of the last read */
    uint32_t reserved;
};
struct dp_scrub_damage {
    uint64_t pba, status, referrer_count;
    uint64_t referrers[DP_SCRUB_REFERRERS]; /* volume << 52 | LBA */
};
struct dp_scrub {
    uint64_t number;           /* of the last one begun */
    uint64_t state;            /* enum scrub_state */
    uint64_t rate_bytes_s;     /* 0: as fast as it goes */
    uint64_t started_s, ended_s; /* Unix time */
    uint64_t position;         /* next PBA; in METADATA store_pages' cursor; in REFERRERS volume << 52 | leaf */
    uint64_t stored_blocks;    /* when it began */
    uint64_t verified_blocks, changed_blocks, damaged_count;
    uint64_t verified_pages, repaired_pages, lost_pages; /* of metadata */
    uint64_t outstanding;      /* reads under way */
    uint64_t batch_count;
    struct dp_scrub_block batch[DP_SCRUB_PAGES];       /* block i is read into the scrub's page i */
    struct dp_scrub_damage damaged[DP_SCRUB_DAMAGED];  /* by PBA */
};

struct dp_arena {
    uint64_t nic_pages, merge_pages, cache_pages, tier_pages; /* sizes of the tables (the last two: of which the pools' are used) */
    uint64_t tier_places;
    uint64_t next_order, next_acceptance;
    uint64_t log_records;        /* not FREE and not RETURNING */
    uint64_t failed_records;     /* FAILED, CORRUPT or POISON */
    uint64_t aside_records;      /* of these: CORRUPT or POISON */
    uint64_t pinned_records;     /* RECORD_PINNED */
    uint64_t control_number;     /* last control call that changed something */
    uint64_t adopting;           /* 1: adoption has begun and is to be begun again */
    uint32_t log_head, log_tail; /* LOGGED, in the order of destage */
    uint32_t returning;          /* head of the RETURNING list */
    uint32_t pinned_count;
    uint32_t pinned[ATOLL_SLOT_COUNT]; /* slots with pins */
    uint32_t aside[ATOLL_VOLUME_COUNT]; /* aside_records by volume: of no concern to the flushes of others */
    uint32_t current_part;       /* with header.current: not transactional */
    /* Records that are being destaged at this moment, for whoever finds out what crashed: not transactional. */
    uint32_t handled_count;
    uint32_t handled[DP_RUN_RECORDS];
    struct dp_scrub scrub;
    struct dp_run runs[DP_RUNS];
    struct dp_slot slots[DP_SLOTS];
};

/* A damaged or unreadable place, for the log. */
#define DP_DAMAGE_NOTES 16
struct dp_damage { uint64_t pba, lba; uint32_t volume, status; }; /* volume: ATOLL_VOLUME_COUNT if none asked for it */

/* What a step wants to be seen in the look-up table after its commit. */
struct dp_note {
    struct atoll_lookup_entry *entry;
    uint64_t key, value;
};

/* Private to the process: the look-up table's places, and what datapath_lookup.c remembers within a step. */
#define DP_USERS 2
struct dp_lookup {
    struct atoll_lookup_entry *entries;  /* arena */
    uint32_t *generations;               /* arena */
    uint64_t set_count, page_count;
    const struct atoll_uses *uses[DP_USERS]; /* nbd's and nic's; NULL: nobody looks anything up */
    uint64_t *in_use;                    /* bit per page, as lookup_uses found it */
    uint32_t *marked, marked_count;      /* those set */
    uint32_t next_way;
    uint32_t noted_count;
    struct dp_note noted[DP_LOOKUP_NOTES];
};

/* Private to the process: pointers, and indices that datapath_attach makes again. */
struct datapath {
    struct dedup *dedup;
    struct atoll_domain *domain;
    struct atoll_journal *journal;
    struct dp_arena *arena;
    struct dp_record *records;
    struct dp_page *pages;
    uint8_t *held;
    uint64_t record_count;
    uint64_t nic_buffer, merge_buffer, zero_buffer, scrub_buffer; /* addresses */
    struct dp_pool pools[DP_POOLS];
    struct tier tier;
    const struct atoll_nic_public *nic_public;
    uint64_t destage_delay_ms;
    uint32_t batch_blocks;      /* records of a batch of destage, at most ATOLL_IO_BLOCKS */
    uint64_t track_blocks;      /* a run that is shared stands on one track of so many */

    /* queues of waiting slots: singly linked through slot_next */
    uint16_t slot_next[DP_SLOTS];
    uint32_t retry_head, retry_tail, retry_count;
    uint32_t flush_head, flush_tail, flush_count;
    uint64_t flush_since[DP_SLOTS]; /* destage_failures when the flush was asked: one that came before is not its own */
    uint16_t *page_waiters;     /* per cache page: head of the READs that wait for it, DP_NO_SLOT none */
    bool retry;                 /* something happened for which waiting requests may have waited */
    bool ranges;                /* a TRIM or ZERO goes on in the next step */
    uint64_t retry_ms;          /* when waiting requests were last tried */
    uint32_t blocked;           /* bit mask of enum dp_resource that an earlier waiter lacks */

    uint16_t posted[DP_SLOTS];  /* slots of posted writes that wait (datapath_posted.c) */
    uint32_t posted_count;
    uint32_t posted_most;       /* blocks of them that may be on their way; configuration */
    uint64_t posted_ms;         /* when one last came */
    bool posted_keeps;          /* space is kept for them */
    bool posted_ends;           /* the store is about to be closed: no more of them */

    uint32_t *merge_free;
    uint32_t merge_free_count;
    uint32_t *merge_freed;      /* freed in this step: the last commit still refers to them, so they are free after the next */
    uint32_t merge_freed_count;

    uint32_t *cache_heads, *cache_next;  /* hash of attached pages by pba */
    uint32_t cache_mask;
    uint8_t *page_touched;      /* as nbd had it when last looked at */
    uint8_t *page_unasked;      /* being read for destage, and no client has asked for it */
    struct dp_ahead *ahead;     /* datapath_ahead.c */

    uint64_t *equal_sets;       /* records by fingerprint, as a hint: see log_equal */
    uint64_t equal_mask;        /* of sets */
    uint32_t *equal_next;       /* an older record with the same content */
    uint32_t equal_late[DP_EQUAL_LATE], equal_turn; /* the newest records, whose sets are on their way */
    uint32_t *log_limbo;        /* PINNED records without pins: see log_settle */
    uint32_t log_limbo_count;
    struct dp_lookup lookup;

    uint32_t *inflight_heads;   /* hash of the records being written, by fingerprint: node = run * DP_RUN_RECORDS + index */
    uint32_t inflight_next[DP_RUNS * DP_RUN_RECORDS];

    /* Of batches that are being matched: pages of candidates, which they pin; records before the first whose page is still to come. */
    uint32_t run_pages[DP_RUNS], run_loaded[DP_RUNS];
    uint32_t newest_run;        /* the one collected last */

    uint32_t give[8];
    uint32_t give_count;
    bool swept;                 /* in this step */
    uint64_t sweep_age;         /* steps since the last sweep */
    bool drain;                 /* destage everything */
    uint32_t lookups;           /* times that the next batch has waited for pages of metadata */
    uint32_t looked;            /* records of the next batch that have been looked up this time */
    bool look_waits;            /* some of them wait */
    uint64_t flush_target;      /* largest of waiting flushes */
    uint64_t flush_asked_ms;    /* when the first of those that wait, or did last, began */
    uint64_t flushed_ms;        /* when all that some waited for was destaged; 0: none has waited, in this process */
    uint64_t flush_gap_ms;      /* from that to the next one asked for, lately; or what allows as much as was logged when nothing left the log */
    uint64_t flush_posted;      /* blocks of posted writes since */
    uint64_t shorter_ms;        /* when the log was last so short that destage was not due, or something of it was written or shared */
    uint64_t space_target;      /* largest of writes that wait for the reservations of what was logged before them */
    uint64_t destage_failures;  /* failed writes, damaged pages; counted by this process */
    uint64_t failures_told;     /* to the flushes that wait */
    uint64_t retry_ns;          /* after a failed write: no destage before */
    uint64_t backoff_ns;
    uint64_t space_ticket;      /* free blocks exist only after this sync; 0 none */
    uint64_t space_failures;    /* of syncs, when it was drawn */
    struct check *check;        /* that has not come to its end */
    uint64_t runs_in[4];        /* bit per run, by enum run_state */
    uint64_t runs_left;         /* free since the last commit: a rollback brings back what they hold */
    uint64_t checked;           /* bit per run: its records have been checked against their fingerprints; else each is before it is written */
    uint64_t unmatched;         /* bit per run: collected, and its candidates are still to be looked for */
    uint32_t collecting;        /* run that is being collected; DP_RUNS: none */
    uint32_t matched;           /* records of the run that is being matched for which it has been done */
    uint64_t wanted[ATOLL_IO_BLOCKS]; /* places that these may be equal to; 0: none */
    uint32_t deciding, decided; /* run that is being shared (DP_RUNS: none), and how many of its records are left to be written so far */
    bool asked;                 /* requests have come in this step */
    bool unseen;                /* a posted write that has crashed dedup is being entered in the log */
    bool alone;                 /* requests come one by one */
    bool shared;                /* who else works for them runs on this processor */
    struct reuse *reuse;        /* what a long log would spare of the writes taken there */
    uint32_t repeats;           /* how many of DP_REPEATS_ALL blocks that left the log had been overwritten there or had an equal, on average */
    uint64_t piece_ns;          /* when the step's piece of destage began; 0: none */
    uint64_t worked_ns;         /* pieces since clients have had their time */
    uint64_t resume_ns;         /* the next one, while requests come */
    uint64_t now_ms;
    struct du *du;              /* what `atoll du` counts; NULL before the first time */
    struct dp_damage damage[DP_DAMAGE_NOTES]; /* seen and not told to the log yet */
    uint32_t damage_count, damage_dropped;
    uint64_t scrub_told;        /* number of the last scrub whose end was told to the kernel, by this process */
    uint64_t scrub_due_ns;      /* its rate: no read before */
};

#define DP_NO_SLOT 0xffff
#define DP_INFLIGHT_HEADS 16384

enum dp_resource { RESOURCE_CACHE = 1, RESOURCE_MERGE = 2, RESOURCE_LOG_ROOM = 4, RESOURCE_RUN = 8, RESOURCE_SPACE = 16,
                   RESOURCE_PAGE = 32 /* a place in memory for a page of metadata */, RESOURCE_SHORT_LOG = 64 /* see flush_crowded */ };

/* What executing a request ended in. */
enum dp_outcome {
    OUTCOME_DONE = 0,     /* slot's status and result are set */
    OUTCOME_RETRY = 1,    /* to be executed again when something has changed; nothing was applied */
    OUTCOME_LOADING = 2,  /* READ: resolved */
    OUTCOME_RANGE = 3,    /* progress was made and noted; go on soon */
    OUTCOME_FLUSH = 4     /* applied; completion waits for the device */
};

static inline uint64_t record_address(const struct datapath *dp, uint32_t record)
{
    return record < dp->arena->nic_pages ? dp->nic_buffer + (uint64_t)record * DP_BLOCK
                                         : dp->merge_buffer + (record - dp->arena->nic_pages) * DP_BLOCK;
}
static inline const void *record_page(const struct datapath *dp, uint32_t record)
{
    return (const void *)(uintptr_t)record_address(dp, record);
}
static inline bool page_in_tier(const struct datapath *dp, uint32_t page) { return page >= dp->pools[POOL_TIER].first; }
static inline uint64_t page_address(const struct datapath *dp, uint32_t page)
{
    const struct dp_pool *pool = &dp->pools[page_in_tier(dp, page) ? POOL_TIER : POOL_DISK];
    return pool->buffer + (uint64_t)(page - pool->first) * DP_BLOCK;
}
static inline const void *page_memory(const struct datapath *dp, uint32_t page)
{
    return (const void *)(uintptr_t)page_address(dp, page);
}
static inline void dp_set32(struct datapath *dp, uint32_t *word, uint32_t value) { atoll_set32(dp->journal, word, value); }
static inline void dp_set64(struct datapath *dp, uint64_t *word, uint64_t value) { atoll_set64(dp->journal, word, value); }

struct fingerprint dp_fingerprint(const void *block);
/* A block leaves the log. `repeat`: without having been written to the device, so it may have been well that it waited. */
static inline void dp_note_leaving(struct datapath *dp, bool repeat)
{
    dp->repeats += (repeat ? DP_REPEATS_WEIGHT : 0) - dp->repeats / DP_REPEATS_WEIGHT;
}
/* Asks for the cache lines of a block. */
static inline void dp_prefetch(const void *block)
{
    for (uint32_t offset = 0; offset < DP_BLOCK; offset += 64)
        __builtin_prefetch((const char *)block + offset);
}

/* --- datapath_slot.c ------------------------------------------------------------------------------------------------- */
void slot_save(struct datapath *dp, struct dp_slot *slot);            /* before changing its hot part */
/* Gives the slot these segments; each page of DATA segments has been pinned by the caller. */
void slot_set_segments(struct datapath *dp, struct dp_slot *slot, const struct atoll_segment *segments, uint32_t count);
void slot_unpin(struct datapath *dp, struct dp_slot *slot);           /* releases the pages of its segments */
void slot_wait_page(struct datapath *dp, uint32_t number);            /* READ in PHASE_LOADING: queue at its next page, or finish */
void slot_queue_retry(struct datapath *dp, uint32_t number);          /* to be executed again */
void slot_queue_flush(struct datapath *dp, uint32_t number);          /* in PHASE_DESTAGE or PHASE_SYNC */
void slot_answer(struct datapath *dp, uint32_t number);               /* sends, or repeats, the answer of a DONE slot */
/* The request is over. Its slot's hot part has been saved, status and result are set. */
void slot_finish(struct datapath *dp, uint32_t number);
void dp_sweep(struct datapath *dp);                                   /* pins whose replies nic has sent */

/* --- datapath_flush.c ------------------------------------------------------------------------------------------------ */
/* A flush is asked: what failed before may be well again, so it fails for what is tried from now on. */
void flush_begin(struct datapath *dp, uint32_t number);
/* Finishes the flushes that are reached; the others stay queued. True if something was done. */
bool flush_step(struct datapath *dp);
/* Of one of `volume` that comes after a posted write, which waits: true if what was logged could not be destaged since it was asked, so that
 * it fails. */
bool flush_in_vain(struct datapath *dp, struct dp_slot *slot, uint32_t volume);
/* Records that may be logged so that flushes, which wait for them, take little of the time of those who ask for them. */
uint64_t flush_allows(const struct datapath *dp);
/* More is logged than that, and it is becoming less: writes wait; `posted` ones, which are not held, are taken more slowly. */
bool flush_crowded(struct datapath *dp, bool posted);

/* --- datapath.c: acceptance, execution ------------------------------------------------------------------------------- */
void datapath_commit(struct datapath *dp);                            /* in the middle of a step; what is freed is given back in it */
/* What comes of a request whose metadata is not there (`want` is not STORE_HAVE): RETRY, or DONE with the slot's status set. */
enum dp_outcome dp_want_outcome(struct datapath *dp, struct dp_slot *slot, enum store_want want);
/* The volume that a request names, or NULL with *status set. Checks offset and length against its size. */
struct atoll_volume *dp_volume(struct datapath *dp, const struct atoll_descriptor *request, uint32_t *status);

void dp_note_damage(struct datapath *dp, uint64_t pba, uint32_t status, uint32_t volume, uint64_t lba);

/* --- datapath_log.c: records, list, pages given back ---------------------------------------------------------------- */
/* The record `value` (a MAP_LOG map value) names; checked. */
uint32_t log_record_of(const struct datapath *dp, uint64_t value);
/* True if a write over map value `value` can use a reservation that is there already. */
bool log_has_reservation(const struct datapath *dp, uint64_t value);
/* Enters page `record` (FREE, filled with the block) as the newest content of the block; returns a status (ENOSPC: no map
 * leaf; nothing changed). The caller has reserved space unless log_has_reservation. */
uint32_t log_append(struct datapath *dp, uint32_t record, uint32_t volume, uint64_t lba, struct fingerprint print);
/* The record is not the block's content any more (trimmed); its reservation, if it has one, is the caller's.
 * Returns true if it had one. */
bool log_drop(struct datapath *dp, uint32_t record);
/* The LOGGED record in the list that holds this block, or DP_NONE. `cursor`: {0} at first; it keeps the leaf of the map for the next
 * look, in the same step. */
struct log_cursor { const uint64_t *leaf; uint64_t leaf_end; uint32_t volume; };
uint32_t log_find(const struct datapath *dp, struct log_cursor *cursor, uint32_t volume, uint64_t lba);
/* A LOGGED record in the list whose content has this fingerprint, or DP_NONE. A hint: those of a predecessor are not known. */
uint32_t log_equal(const struct datapath *dp, struct fingerprint print);
void log_know_equals(struct datapath *dp);              /* of those, too, that have just been logged */
void log_prefetch_equal(const struct datapath *dp, struct fingerprint print);
void log_unlink(struct datapath *dp, uint32_t record);
void log_requeue(struct datapath *dp, uint32_t record);  /* back into the list, by its order; state LOGGED */
void log_release(struct datapath *dp, uint32_t record);  /* nobody but readers needs it */
/* Frees the records that were let go and that no reader uses. At the end of a step, before give_flush; true if some are left
 * for want of room in the journal. */
bool log_settle(struct datapath *dp);
void log_unpin(struct datapath *dp, uint32_t record);
void log_clear_flags(struct datapath *dp, uint32_t record);
void log_set_flag(struct datapath *dp, uint32_t record, uint16_t flag);
void give_back(struct datapath *dp, uint32_t page);      /* nic's page, not in the log */
void give_flush(struct datapath *dp);                    /* end of step */
void log_attach(struct datapath *dp);
void log_committed(struct datapath *dp);                 /* after each commit: pages and runs freed before it can be used */
uint32_t merge_take(struct datapath *dp);                /* record number of a free merge page, or DP_NONE */
void merge_put(struct datapath *dp, uint32_t record);    /* back, unused */

/* `held`, for a page that is not in the log. */
void log_hold(struct datapath *dp, uint32_t page, bool hold);

/* --- datapath_posted.c ------------------------------------------------------------------------------------------------- */
bool posted_request(const struct atoll_descriptor *request);
/* What nic has sent: as datapath_message. */
void posted_message(struct datapath *dp, const struct atoll_descriptor *message);
/* The slot's posted write waits; it does not any more. */
void posted_wait(struct datapath *dp, uint32_t number);
void posted_over(struct datapath *dp, uint32_t number);
/* True if `request`, of `slot`, must be executed after a posted write that waits; *status other than OK: that one cannot be had, and
 * neither can this. */
bool posted_before(const struct datapath *dp, const struct dp_slot *slot, const struct atoll_descriptor *request, uint32_t *status);
/* True if one that waits will change the block. */
bool posted_waits_for(const struct datapath *dp, uint32_t volume, uint64_t lba);
/* Those that cannot be applied for the time being. */
struct posted_failing { uint32_t count; uint64_t blocks; };
struct posted_failing posted_failing(const struct datapath *dp);
/* The slot's posted write, whose status says why it cannot be applied, gets a slot that nobody else knows, to be queued there. Returns its number;
 * DP_NO_SLOT: it has one, or none is free. */
uint32_t posted_keep(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request);
/* Space for them is kept. */
void posted_attach(struct datapath *dp);
/* One of nic's notes up to this order has not come yet. */
bool posted_on_their_way(const struct datapath *dp, uint64_t last);
/* Ends posting; true if nothing is on its way any more and their space is anybody's. */
bool posted_shut(struct datapath *dp);
/* Before a commit: no more of them, if room has grown short; and whether destage is behind. After the step: again, if there is enough. */
void posted_end(struct datapath *dp);
void posted_begin(struct datapath *dp);
/* True if the page is of one that was taken over after the death of all and is not applied yet. For the checker. */
bool posted_holds(const struct datapath *dp, uint32_t page);
/* First thing after the death of all, while slots still say what was applied. Commits. */
void posted_adopt(struct datapath *dp);

/* --- datapath_cache.c ------------------------------------------------------------------------------------------------ */
void cache_attach(struct datapath *dp);
uint32_t cache_find(const struct datapath *dp, uint64_t pba);
void cache_prefetch(const struct datapath *dp, uint64_t pba); /* what cache_find looks at first */
void cache_pin(struct datapath *dp, uint32_t page);
void cache_unpin(struct datapath *dp, uint32_t page);
/* Finds or begins to load `count` blocks and pins their pages. All or none: false if pages or I/O slots are short or a place holds
 * no stored block (*failed = its PBA, else 0). `who`: IO_FILL: a client waits; IO_TIER: to be copied; IO_DESTAGE: to match
 * (io_room). */
bool cache_load(struct datapath *dp, enum io_kind who, const uint64_t *pbas, uint32_t count, uint32_t *pages, uint64_t *failed);
/* Of a page that was read for destage: what it holds is equal to a block of its fingerprint; or is not, so it is compared with the
 * fingerprint now. False: it is damaged, and nobody finds it any more. */
void cache_confirmed(struct datapath *dp, uint32_t page);
bool cache_check(struct datapath *dp, uint32_t page);
void cache_drop(struct datapath *dp, uint64_t pba);      /* the place is about to be rewritten */
/* The fast device does not answer: who waits for it executes again. */
void cache_abandon_tier(struct datapath *dp);
void cache_io_done(struct datapath *dp, const struct io_slot *slot, uint32_t status);
uint32_t cache_page_of(const struct datapath *dp, uint64_t address); /* or DP_NONE */

/* --- datapath_ahead.c ------------------------------------------------------------------------------------------------- */
void ahead_attach(struct datapath *dp);
void ahead_release(struct datapath *dp);
/* Before cache_load of these candidates of a batch: reads what lies beside them, if that has paid. True if that is enough for a step, to be
 * called again; else they are to be loaded in this step. */
bool ahead_read(struct datapath *dp, const uint64_t *pbas, uint32_t count);
/* Of cache pages, by number: one begins to be used for another block; has been read (true: ahead, so an error may be a neighbour's); is
 * used (true: read ahead, and never used before). */
void ahead_entered(struct datapath *dp, uint32_t page);
bool ahead_loaded(struct datapath *dp, uint32_t page);
bool ahead_first_use(struct datapath *dp, uint32_t page);

/* --- datapath_lookup.c ------------------------------------------------------------------------------------------------ */
uint64_t lookup_arena_bytes(uint64_t page_count);
/* False: nbd's arena has no room for what it must publish. */
bool lookup_attach(struct datapath *dp, void *memory);
void lookup_release(struct datapath *dp);
void lookup_adopt(struct datapath *dp);                  /* nothing in the table is true any more */
/* In a step, when a block is known or gets new content: after the commit nbd can find it. At most DP_LOOKUP_NOTES a step. Page
 * numbers: records, then cache pages. */
void lookup_note(struct datapath *dp, uint32_t volume, uint64_t lba, uint32_t page);
void lookup_note_hole(struct datapath *dp, uint32_t volume, uint64_t lba);
void lookup_prefetch(const struct datapath *dp, uint32_t volume, uint64_t lba);
/* Before a block loses its content. */
void lookup_forget(struct datapath *dp, uint32_t volume, uint64_t lba);
void lookup_committed(struct datapath *dp);
void lookup_retire(struct datapath *dp, uint32_t page);
/* Looks who uses pages that were retired before; takes a full fence and a look at each slot in use. */
void lookup_uses(struct datapath *dp);
static inline bool lookup_in_use(const struct datapath *dp, uint32_t page)
{
    return dp->lookup.in_use[page / 64] >> page % 64 & 1;
}
/* True if nbd or nic has read the cache page since this was last asked (or may have). */
bool lookup_was_touched(struct datapath *dp, uint32_t cache_page);
/* The next use in force that is confirmed, from (*slot, *index) on, which it advances; false: no more. For the checker. */
bool lookup_find_use(const struct datapath *dp, uint32_t user, uint32_t *slot, uint32_t *index, uint32_t *page);

/* --- datapath_read.c, datapath_write.c: executing requests ------------------------------------------------------------ */
enum dp_outcome exec_read(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request);
enum dp_outcome exec_extents(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request);
enum dp_outcome exec_cache(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request);
enum dp_outcome exec_write(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request);
enum dp_outcome exec_range(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request); /* TRIM, ZERO */
enum dp_outcome exec_flush(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request);
/* Map values of the blocks [first, first + count). */
void map_values(struct datapath *dp, uint32_t volume, uint64_t first, uint32_t count, uint64_t *values);
/* Gives the payload pages of a WRITE that is refused back to nic. */
void write_refuse_payload(struct datapath *dp, const struct atoll_descriptor *request);

/* --- datapath_destage.c ------------------------------------------------------------------------------------------------- */
void destage_attach(struct datapath *dp);
void destage_configure(struct datapath *dp, uint64_t delay_ms);         /* before the first step: how old a logged block gets */
/* One bounded step; true if it did something. *wake_ms: when to look again at the latest (0: no timer). */
bool destage_step(struct datapath *dp, uint64_t *wake_ms);
/* The step has been committed, and who was told of it has been woken: this too is time that it took. */
void destage_step_over(struct datapath *dp);
/* Before a run's lists, `count` records of them, are written directly. */
void destage_save_run(struct datapath *dp, struct dp_run *run, uint32_t count);
/* Lowest order that is not on the device yet (UINT64_MAX: all is). */
uint64_t destage_pending_order(const struct datapath *dp);
/* As much is logged as may wait there for more. */
bool destage_due(const struct datapath *dp);
/* Clients are faster than destage, and what is logged is about to leave the processor's cache. */
bool destage_crowded(struct datapath *dp);
/* What is logged is to go, whether more of it would come or not. */
bool destage_pressed(const struct datapath *dp);
/* Somebody asks for what a back-off holds up: tried again at once. */
void destage_hurry(struct datapath *dp);
/* True while a waiting FLUSH covers `record`, which is in a run: then it must not be superseded (the flush would have to
 * wait for its successor, and for that one's). */
bool destage_protected(const struct datapath *dp, uint32_t record);
void destage_io_done(struct datapath *dp, const struct io_slot *slot, uint32_t status);
void destage_adopt(struct datapath *dp, bool quarantine);
/* The predecessor crashed by itself while it destaged (I8): those it had in hand are suspects, and one that it had alone in hand
 * for this reason is set aside. Outside of transactions. */
void destage_blame(struct datapath *dp);

/* A record of a run has its persistent value; its reservation is not needed. */
void destage_settled(struct datapath *dp, uint32_t record);
/* A place is free again: records whose write is complete are not shared with what it will hold. */
void destage_freed(struct datapath *dp, uint64_t pba);
/* Next record being written with this content: its node (run * DP_RUN_RECORDS + index), or DP_NONE. `after`: DP_NONE begins. */
uint32_t destage_inflight(const struct datapath *dp, struct fingerprint print, uint32_t after);
/* The node of a record that is being written; DP_NONE: its write could not be finished. */
uint32_t destage_node(const struct datapath *dp, uint32_t record);
void destage_prefetch_inflight(const struct datapath *dp, struct fingerprint print);

/* --- datapath_match.c --------------------------------------------------------------------------------------------------- */
struct match_decision {
    uint32_t rest[ATOLL_IO_BLOCKS], rest_count;          /* neither shared nor following what is being written */
    bool rejected[ATOLL_IO_BLOCKS];                      /* of these: an equal block exists, but its run is too short */
    uint32_t writers[ATOLL_IO_BLOCKS], writer_count;     /* of these: to be written in this order */
    uint32_t followers[ATOLL_IO_BLOCKS], leaders[ATOLL_IO_BLOCKS], follower_count; /* equal to writers[leaders[i]] */
};
/* Chooses what the blocks of a batch that has just been collected may be equal to, and has it read: link[i]; of those from
 * `dp->matched` on, so many as make a piece. Blocks that wait for what follows them go back to the list; the run becomes FREE if all do.
 * True: that was all. */
bool match_stored(struct datapath *dp, uint32_t number, uint32_t most);
/* Shares what is equal among the records [first, end) of the batch, which end where a run of blocks does; what is left of them stays,
 * its links DP_NONE or DP_REJECTED. Returns how many. */
uint32_t match_share(struct datapath *dp, uint32_t number, uint32_t first, uint32_t end);
/* Where the run of blocks ends that records[first] begins. */
uint32_t match_run_end(struct datapath *dp, const struct dp_run *run, uint32_t first);
/* Nothing is left to be shared: what of the batch is written, and what follows that. Overwritten blocks are let go. */
void match_decide(struct datapath *dp, uint32_t number, struct match_decision *decision);
/* The first `placed` writers have got places from `pba` on: followers whose rows do not fit them go back to the list. Returns how
 * many are left. */
uint32_t match_trim(struct datapath *dp, struct match_decision *decision, uint64_t pba, uint32_t placed);

/* --- datapath_scrub.c --------------------------------------------------------------------------------------------------- */
/* Begins a scrub, or gives the one that runs another rate. In a transaction, as all here. */
void scrub_start(struct datapath *dp, uint64_t rate_bytes_s);
void scrub_cancel(struct datapath *dp);
/* A bounded step; true if it did something. *wake_ms: when to look again at the latest, unless it is sooner already. */
bool scrub_step(struct datapath *dp, uint64_t *wake_ms);
void scrub_io_done(struct datapath *dp, const struct io_slot *slot, uint32_t status);
/* It has ended, and this process has not told so. */
bool scrub_untold(const struct datapath *dp);
void scrub_adopt(struct datapath *dp); /* no read is under way any more */

/* --- datapath_du.c ------------------------------------------------------------------------------------------------------ */
int du_start(struct datapath *dp, uint64_t *number); /* enum atoll_status */
bool du_step(struct datapath *dp);
void du_state(struct datapath *dp, struct du_state *state);

/* --- datapath_life.c ----------------------------------------------------------------------------------------------------- */
struct dp_geometry { uint64_t nic_pages, merge_pages, cache_pages, tier_pages, tier_places; };
uint64_t datapath_arena_bytes(const struct dp_geometry *geometry);
uint64_t datapath_buffer_bytes(const struct dp_geometry *geometry);
/* Returns NULL with a reason in `error` (256 bytes). Outside of transactions. */
struct datapath *datapath_attach(struct dedup *dedup, void *memory, const struct dp_geometry *geometry, bool fresh, char *error);
/* All processes died: what was in flight is not any more. Commits as it goes; the caller clears `adopting` at the end. */
void datapath_adopt(struct datapath *dp, bool quarantine);
/* Any takeover but adoption: queues of waiting requests. In a transaction. */
void datapath_recover(struct datapath *dp);
void datapath_resume(struct datapath *dp, uint32_t number); /* one of them */
/* The predecessor crashed by itself: notes the request it was executing, if any (I8). Outside of transactions. */
void datapath_note_suspect(struct datapath *dp);
/* Recounts everything and compares; writes a line per inconsistency to `text` (`bytes`, always ended by 0) and returns how
 * many there are. Takes time in proportion to the device; between steps only. DP_CHECK_WAITS: a page of metadata is being read; to be
 * called again, with nothing but I/O done in between (store_step_quiet). */
#define DP_CHECK_WAITS UINT32_MAX
uint32_t datapath_check(struct datapath *dp, char *text, uint64_t bytes);
void datapath_check_cancel(struct datapath *dp); /* one that waits */
/* A message that will soon be taken: nothing but cache lines on their way. It may be anything. */
void datapath_expect(struct datapath *dp, const struct atoll_descriptor *message);
/* One message, from nbd or from nic. */
void datapath_message(struct datapath *dp, uint32_t role, const struct atoll_descriptor *message);
/* Waiting requests, flushes, destage, pages to give back: end of a step before its commit. True if something was done.
 * *wake_ms as destage_step. */
bool datapath_step(struct datapath *dp, uint64_t *wake_ms);

#endif
