/*
 * How soon blocks are overwritten: what part of the writes a log of some length spares, and what part a shorter one would.
 *
 *   reuse_note      a block is being written
 *   reuse_spared    of REUSE_ALL blocks written, those that the longer log spares and the shorter one does not, as last counted
 *
 * Both logs are simulated in miniature (Waldspurger, Saemundsson, Ahmad, Park: "Cache modeling and optimization using miniature simulations",
 * ATC '17): only blocks are looked at whose number has a hash below a limit, so each of these is seen whenever it is written, and
 * the logs are shorter in the same proportion. As in the write log a block that is overwritten keeps its place, and those leave that came
 * first, or that are old enough. So the result does not depend on how long the log is at the moment, and tells loops from
 * blocks that are hot.
 *
 * Private memory of a process. After a crash it begins anew.
 */
#ifndef ATOLL_DEDUP_REUSE_H
#define ATOLL_DEDUP_REUSE_H

#include <stdint.h>

/* cffi:begin */
#define REUSE_ALL 256

struct reuse;

/* Lengths in blocks, the longest time that a block stays. NULL: no memory. */
struct reuse *reuse_open(uint64_t shorter, uint64_t longer, uint64_t stay_ms);
void reuse_close(struct reuse *reuse);
void reuse_note(struct reuse *reuse, uint32_t volume, uint64_t lba, uint64_t now_ms);
uint32_t reuse_spared(const struct reuse *reuse);
/* cffi:end */

#endif
