/* Counters of dedup: index in the arena's counter page. Names in services/dedup/__init__.py, in the same order. */
#ifndef ATOLL_DEDUP_COUNTERS_H
#define ATOLL_DEDUP_COUNTERS_H

/* cffi:begin */
enum dedup_counter {
    DEDUP_COUNTER_READS = 0,
    DEDUP_COUNTER_READ_BYTES = 1,
    DEDUP_COUNTER_WRITES = 2,
    DEDUP_COUNTER_WRITE_BYTES = 3,
    DEDUP_COUNTER_FLUSHES = 4,
    DEDUP_COUNTER_TRIMS = 5,
    DEDUP_COUNTER_ZEROS = 6,
    DEDUP_COUNTER_EXTENTS = 7,
    DEDUP_COUNTER_PREFETCHES = 8,
    DEDUP_COUNTER_ERRORS = 9,              /* requests answered with a status other than OK */
    DEDUP_COUNTER_REPEATS = 10,            /* I6: answered again without being applied again */
    DEDUP_COUNTER_WAITS = 11,              /* requests that could not be finished in the step that took them */
    DEDUP_COUNTER_BAD_REQUESTS = 12,       /* I8: messages that no correct nbd sends */
    DEDUP_COUNTER_BAD_COMPLETIONS = 13,    /* I8: completions that name no request in flight */
    DEDUP_COUNTER_POISONED = 14,           /* requests refused because dedup died of them twice */
    DEDUP_COUNTER_COPIED_BETWEEN_BYTES = 15, /* merged ragged blocks */
    DEDUP_COUNTER_COPIED_INSIDE_BYTES = 16,
    DEDUP_COUNTER_CACHE_HITS = 17,
    DEDUP_COUNTER_CACHE_MISSES = 18,
    DEDUP_COUNTER_CACHE_EVICTIONS = 19,
    DEDUP_COUNTER_CORRUPT_READS = 20,      /* blocks whose content on the device is not what was stored */
    DEDUP_COUNTER_CORRUPT_PAGES = 21,      /* logged pages whose content changed after the acknowledgement */
    DEDUP_COUNTER_DESTAGED_BLOCKS = 22,    /* written */
    DEDUP_COUNTER_SHARED_BLOCKS = 23,      /* found on the device, or in the same batch */
    DEDUP_COUNTER_ZERO_BLOCKS = 24,
    DEDUP_COUNTER_SUPERSEDED_BLOCKS = 25,  /* overwritten before they were destaged */
    DEDUP_COUNTER_RUNS = 26,               /* gather writes */
    DEDUP_COUNTER_DESTAGE_ERRORS = 27,     /* blocks that could not be written and are tried again */
    DEDUP_COUNTER_COMPARE_MISMATCHES = 28, /* equal fingerprints (or stale hints) with unequal content */
    DEDUP_COUNTER_MATCH_SKIPPED = 29,      /* candidates not looked at for want of a cache page */
    DEDUP_COUNTER_GIVEN_BACK_PAGES = 30,
    DEDUP_COUNTER_IO_SUBMITTED = 31,
    DEDUP_COUNTER_IO_ERRORS = 32,
    DEDUP_COUNTER_STEPS = 33,
    DEDUP_COUNTER_SWEEPS = 34,
    DEDUP_COUNTER_FLUSH_FAILURES = 35,
    DEDUP_COUNTER_THRESHOLD_BLOCKS = 36,   /* written although an equal block was stored: their runs were too short */
    DEDUP_COUNTER_HELD_BACK_BLOCKS = 37,   /* left to the next batch: with what follows, their run may be long enough; or an equal block was stored meanwhile */
    DEDUP_COUNTER_TIER_READ_BLOCKS = 38,   /* read from the fast device */
    DEDUP_COUNTER_TIER_COPIED_BLOCKS = 39, /* moved there */
    DEDUP_COUNTER_TIER_SHARED_BLOCKS = 40, /* shared in runs shorter than the threshold, because they lie there */
    DEDUP_COUNTER_TIER_EVICTIONS = 41,
    DEDUP_COUNTER_TIER_KEPT_OUT = 42,      /* newcomers less useful than all that the clock's hand passed */
    DEDUP_COUNTER_TIER_SKIPPED = 43,       /* not queued: the queue was full */
    DEDUP_COUNTER_TIER_MISMATCHES = 44,    /* read there, and not what it should be: read from the main device instead */
    DEDUP_COUNTER_TIER_READ_ERRORS = 45,   /* likewise: the fast device failed */
    DEDUP_COUNTER_TIER_AWAYS = 46,         /* times that the fast device was given up for a while */
    DEDUP_COUNTER_POSTED_ADOPTED = 47,     /* posted writes applied after the death of all */
    DEDUP_COUNTER_AHEAD_READ = 48,         /* blocks beside candidates, read with them */
    DEDUP_COUNTER_AHEAD_USED = 49,         /* of these, those that were wanted later */
    DEDUP_COUNTER_POSTED_LOST = 50,        /* posted writes whose volume was deleted, or has shrunk */
    DEDUP_COUNTER_DATAPATH_COUNT = 51
};
/* cffi:end */

_Static_assert(DEDUP_COUNTER_DATAPATH_COUNT <= 64, "store.c counts from 64 on");

#endif
