/*
 * What the parts of loading share: the private state, and batches of reads. See store_load.c.
 *
 *   store_load.c    batches, superblocks, tables, sums, the step
 *   store_replay.c  metadata log
 *   store_grow.c    a store that is smaller than its device
 */
#ifndef ATOLL_DEDUP_STORE_LOAD_H
#define ATOLL_DEDUP_STORE_LOAD_H

#include "services/dedup/store_internal.h"

#define LOAD_WANTS STORE_BATCH_READS
#define LOAD_STARVED 64 /* steps in a row in which no page could leave memory: there is too little of it */

enum load_phase {
    LOAD_RESET, LOAD_HEAD, LOAD_SUPER, LOAD_TABLES, LOAD_PIN, LOAD_LOG, LOAD_DATA, LOAD_TAIL, LOAD_COUNT, LOAD_GROW, LOAD_SUMS, LOAD_FLUSH
};

struct want {
    uint64_t pba;
    uint64_t place;           /* of a superblock */
    uint32_t attempt;         /* 0 with neighbours, 1 alone, 2 given up */
    uint32_t status;
    bool submitted, done;
};

struct store_load {
    enum load_phase phase;
    uint64_t cursor;
    uint32_t count;           /* wants in the running batch */
    uint32_t pairs, pair;     /* log blocks that have been read, and the next of them to replay */
    uint32_t starved;         /* steps in a row */
    struct want wants[LOAD_WANTS];
    bool nonzero;             /* something other than zeros where a store has its superblocks and log */
    bool magic;               /* a superblock's or log block's magic was seen */
    uint32_t other_version;
    bool unreadable;          /* a superblock's block could not be read */
    struct format_super super;
    bool found;
    uint32_t copies;          /* of that superblock */
    bool older_version;       /* one is of another version that can be read */
    uint64_t chain, sequence; /* log: checksum before, and number of, the next block */
    uint64_t last[FORMAT_LOG_WORDS]; /* records of the log's last block, whose data are looked for */
    uint32_t last_count;
    uint64_t last_checksum;
    uint64_t there;           /* the same, once all of them have been found */
    bool last_missing;        /* one has not */
    bool given_up;            /* the number at which the log ends is not used: the next one comes after it, as if there were none of it */
    bool grown;
    bool repair;
    uint64_t stored;
    uint64_t flush_status;
    bool flush_sent;
};

/* --- store_load.c --- */
void load_want(struct store_load *load, uint64_t pba, uint64_t place);
/* Another way to get at a want that was not read. False if there is none. */
bool load_try_on(struct want *want);
bool load_all_done(const struct store_load *load);
/* Both copies of a metadata page are damaged: the store is refused. */
void load_lost(struct store *store);
/* Directories above the tables stay in memory. False: not all yet. */
bool load_pin(struct store *store);

/* --- store_replay.c: ask_ enters wants or changes the phase, take_ handles the batch that was read --- */
void load_ask_log(struct store *store);
void load_take_log(struct store *store);
void load_ask_data(struct store *store);
void load_take_data(struct store *store);
void load_ask_tail(struct store *store);
void load_take_tail(struct store *store);

#endif
