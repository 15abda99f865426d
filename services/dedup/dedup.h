/* The process-private root of the dedup service: where its parts in the arena are. */
#ifndef ATOLL_DEDUP_DEDUP_H
#define ATOLL_DEDUP_DEDUP_H

#include "services/dedup/place.h"
#include "services/dedup/store.h"

struct store;
struct datapath;

struct dedup {
    struct atoll_domain *domain;
    struct atoll_dedup_public *public;
    struct io_table *io;          /* arena */
    struct store *store;          /* process-private, owned by store.c; points into the arena */
    bool behind;                  /* what it does behind the clients' backs should come after their requests, which come one by one */
    struct datapath *datapath;    /* process-private, owned by datapath.c; points into the arena */
    struct dedup_place place;     /* process-private */
    uint32_t ahead, admitted;     /* messages of nic's to be taken before so many of nbd's */
    uint32_t reads;               /* and, where destage is behind, up to the last READ among them; 0: none */
    uint64_t offered_ns;          /* when others were last let go first */
    uint32_t crowd;               /* how many of CROWD_ALL requests were not alone, on average */
};

/* Where destage is behind: somebody waits for an answer to what is still on the rings. */
bool dedup_awaited(const struct dedup *dedup);

/* Counters of dedup (names in services/dedup/__init__.py, same order). store.c uses those from 64 on. */
#define DEDUP_COUNTER_STORE_FIRST 64

#endif
