/*
 * The run matcher: which blocks of a run of consecutive LBAs share which stored copies. A pure function; it knows
 * nothing of devices, volumes and memory.
 *
 *   runs_match       chooses for each block one of the places where an equal block is stored, or none
 *   runs_open_tail   how many of the last blocks to hold back, because what follows them may make their match long enough
 *
 * The rule (the threshold number of iDedup: Srinivasan et al., FAST '12): a *piece* is a row of blocks whose places stand in
 * sequence on one track. A piece is shared if it has at least `threshold` blocks, those counted that already stand in sequence
 * before and after the run; or if each of its blocks is free of the rule (a random read of it costs nothing). Of all
 * choices that keep the rule the one is taken that shares most blocks; of these the one with the fewest pieces; of these the one with
 * the longest; then the one that stays in sequence from piece to piece. Found by dynamic programming over prefixes of the run.
 *
 * Places are block numbers, tracks are `track_blocks` long and begin at multiples of it.
 */
#ifndef ATOLL_DEDUP_RUNS_H
#define ATOLL_DEDUP_RUNS_H

#include <stdint.h>

/* cffi:begin */
/* Blocks of a run: one I/O request (ATOLL_IO_BLOCKS). */
#define RUNS_BLOCKS 256
/* Places of equal blocks that are looked at. */
#define RUNS_PLACES 8
#define RUNS_NONE 255

struct runs_block {
    uint32_t count;                /* of places, all different */
    uint32_t free;                 /* bit i: places[i] is free of the rule */
    uint64_t places[RUNS_PLACES];  /* the better first: only where all else is equal */
};

/* What stands in sequence beside the run already: `length` blocks on one track (0: none), of which `place` is the nearest. */
struct runs_neighbour {
    uint64_t place;
    uint32_t length;
};

struct runs_rule {
    uint32_t threshold;            /* THN: 1..RUNS_BLOCKS */
    uint64_t track_blocks;         /* >= 1 */
    struct runs_neighbour before, after;
};

/* choice[i]: index into blocks[i].places, or RUNS_NONE. `count` is 1..RUNS_BLOCKS. */
void runs_match(const struct runs_block *blocks, uint32_t count, const struct runs_rule *rule, uint8_t *choice);
/* The length of the longest row of unshared blocks at the end of the run that match places in sequence on one track, which goes on
 * behind the run's end: with the next blocks it may reach the threshold. 0: none. Less than the threshold. */
uint32_t runs_open_tail(const struct runs_block *blocks, uint32_t count, const struct runs_rule *rule, const uint8_t *choice);
/* cffi:end */

#endif
