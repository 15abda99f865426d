/*
 * The parts of destage: what datapath_destage.c has done when, datapath_batch.c and datapath_finish.c do. Within a transaction.
 */
#ifndef ATOLL_DEDUP_DATAPATH_BATCH_H
#define ATOLL_DEDUP_DATAPATH_BATCH_H

#include "services/dedup/datapath.h"

/* Records that one piece looks at, or somewhat more: some 10 to 20 microseconds where requests come one by one, of which each would
 * wait for a piece; some 30 otherwise, because a piece costs something by itself; and all of a batch where nobody waits for this
 * processor. */
#define BATCH_PIECE_ALONE 32
#define BATCH_PIECE 64
/* Records whose cache lines are asked for together. */
#define BATCH_AHEAD 32

static inline uint32_t batch_piece(const struct datapath *dp)
{
    return !dp->shared ? dp->batch_blocks : dp->alone ? BATCH_PIECE_ALONE : BATCH_PIECE;
}

/* --- datapath_batch.c --- */
void batch_attach(void);
/* Records that are in hand, for whoever comes after a crash (I8). */
void batch_handle_none(struct datapath *dp);
void batch_handle(struct datapath *dp, uint32_t record);
void batch_handle_all(struct datapath *dp, const uint32_t *records, uint32_t count);
/* Logged, and never destaged. */
void batch_set_aside(struct datapath *dp, uint32_t record);
/* True if the page is what was acknowledged; else the record is set aside, and in no run any more. */
bool batch_intact(struct datapath *dp, uint32_t record);
enum batch_looked { LOOKED_UP, LOOKED_ON, LOOKED_WAITS };
/* Looks whether what the blocks of the next batch may be equal to, and what they replace, is in memory. LOOKED_UP: it is, or was waited
 * for often enough; LOOKED_ON: to be called again for the next of them; LOOKED_WAITS: pages are being read. */
enum batch_looked batch_look_up(struct datapath *dp);
/* Takes more of a batch off the list into run `number`, which is free or holds the rest of it. False: that was all. */
bool batch_collect(struct datapath *dp, uint32_t number);
/* Pages that a batch compares with: counted when they have been chosen; true if all have been read. */
void batch_count_pages(struct datapath *dp, uint32_t number);
bool batch_loaded(struct datapath *dp, uint32_t number);
/* All candidates of a batch are there: shares what is equal, piece by piece, and writes the rest in the last one. False: not now. */
bool batch_go_on(struct datapath *dp, uint32_t number);

/* --- datapath_finish.c --- */
void inflight_clear(struct datapath *dp);
void inflight_add(struct datapath *dp, uint32_t run, uint32_t index);
void inflight_remove(struct datapath *dp, uint32_t run, uint32_t index);
/* A batch that has been written, record by record; true if something was done. */
bool batch_finish(struct datapath *dp, uint32_t number);

/* --- datapath_destage.c --- */
void batch_set_state(struct datapath *dp, uint32_t run, enum run_state state);
/* The same where the run's words have been saved. */
void batch_enter_state(struct datapath *dp, uint32_t run, enum run_state state);
/* Something could not be written: the next attempt comes after a while. */
void destage_failed(struct datapath *dp);

#endif
