/* Where dedup runs: see place.c. Private to the process. */
#ifndef ATOLL_DEDUP_PLACE_H
#define ATOLL_DEDUP_PLACE_H

#include "ipc/layout.h"
#include "ipc/place.h"

struct dedup_place {
    struct atoll_place *where; /* NULL: where the kernel has put it */
    uint32_t requests;         /* taken since the last decision */
    uint64_t bytes;            /* that they wrote */
    uint64_t until_ms;         /* no decision before */
};

void place_note(struct dedup_place *place, const struct atoll_descriptor *message); /* a request has been taken */
bool place_shared(const struct dedup_place *place);                                 /* it is, or may be, on the path's processor */
void place_settle(struct dedup_place *place, uint64_t now_ms);                      /* between steps */

#endif
