/*
 * A domain that changes between two places: the processor that the data path shares ("near"), and wherever else it may run.
 *
 * When it does is each domain's own matter (drivers/disk/place.c, services/dedup/place.c). What is common: it never exceeds what
 * it was allowed, and where somebody else has bound it in the meantime (taskset), it stays where it was put.
 *
 * After a crash: nothing is kept; a successor begins where its role begins.
 */
#ifndef ATOLL_IPC_PLACE_H
#define ATOLL_IPC_PLACE_H

#include <stdbool.h>
#include <stdint.h>

struct atoll_place;

/* `cpu`: the path's. `elsewhere`: where the process may run when it is not near, of which it is told if it is bound to `cpu` already;
 * NULL: where it may run now. Returns NULL if that leaves no choice, or memory is short: then it runs where it does. */
struct atoll_place *atoll_place_open(uint32_t cpu, const uint32_t *elsewhere, uint32_t count);
void atoll_place_close(struct atoll_place *place); /* the process stays where it is */
bool atoll_place_near(const struct atoll_place *place);
/* System calls, a microsecond or two; not in a transaction. */
void atoll_place_come(struct atoll_place *place);
void atoll_place_go(struct atoll_place *place);

#endif
