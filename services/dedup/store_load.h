/*
 * What the parts of loading share: the private state, and batches of reads. See store_load.c.
 *
 *   store_load.c    batches, superblocks, directories and pages, the step
 *   store_replay.c  metadata log
 *   store_sums.c    what pages and log say must agree; sums and the fingerprint cache
 */
#ifndef ATOLL_DEDUP_STORE_LOAD_H
#define ATOLL_DEDUP_STORE_LOAD_H

#include "services/dedup/store_internal.h"

#define LOAD_WANTS STORE_BOUNCE_PAGES

enum load_phase {
    LOAD_RESET, LOAD_HEAD, LOAD_SUPER, LOAD_PAGES, LOAD_LOG, LOAD_TAIL, LOAD_POINTERS, LOAD_FRAMES, LOAD_BLOCKS, LOAD_CACHE, LOAD_FLUSH
};

struct want {
    uint64_t primary, mirror; /* mirror 0: none */
    uint64_t page;            /* number in the row, or what the phase wants */
    uint32_t attempt;         /* 0 with neighbours, 1 alone, 2 mirror, 3 given up */
    uint32_t status;
    bool submitted, done;
};

struct store_load {
    enum load_phase phase;
    uint64_t cursor;
    uint64_t level;
    uint32_t count;           /* wants in the running batch */
    bool collected;           /* all pages of this level have been asked for */
    struct want wants[LOAD_WANTS];
    bool nonzero;             /* something other than zeros where a store has its superblocks and log */
    bool magic;               /* a superblock's or log block's magic was seen */
    uint32_t other_version;
    bool unreadable;          /* a superblock's block could not be read */
    struct format_super super;
    bool found;
    uint32_t copies;          /* of that superblock */
    uint64_t chain, sequence; /* log: checksum before, and number of, the next block */
    bool repair;
    uint64_t sum, entries;
    uint64_t flush_status;
    bool flush_sent;
};

/* --- store_load.c --- */
void load_want(struct store_load *load, uint64_t primary, uint64_t mirror, uint64_t page);
/* The next way to get at a want whose bytes are bad or were not read. False if there is none. */
bool load_try_on(struct want *want);
const char *load_page_kind(const struct store *store, uint64_t page);

/* --- store_replay.c: ask_ enters wants or changes the phase, take_ handles the batch that was read --- */
void load_ask_log(struct store *store);
void load_take_log(struct store *store);
void load_ask_tail(struct store *store);
void load_take_tail(struct store *store);

/* --- store_sums.c: a bounded step each, which changes the phase at its end --- */
void load_pointers_step(struct store *store);
void load_frames_step(struct store *store);
void load_blocks_step(struct store *store);
void load_cache_step(struct store *store);

#endif
