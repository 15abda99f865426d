/* What a single message does to connections and slots (transmission.c), and what service.c lends it. */
#ifndef ATOLL_NBD_TRANSMISSION_H
#define ATOLL_NBD_TRANSMISSION_H

#include "ipc/crashpoint.h"
#include "services/nbd/nbd.h"

enum nbd_outcome {
    NBD_OUTCOME_TAKEN = 0,    /* done: the message may leave the ring */
    NBD_OUTCOME_FRAME = 1,    /* Python answers it: nbd->frame is set, nothing is changed */
    NBD_OUTCOME_UNSTABLE = 2  /* the volume cannot be read just now; nothing is changed */
};

/* In the running transaction. `message` is a private copy. */
void nbd_take_done(struct nbd *nbd, const struct atoll_descriptor *message);
enum nbd_outcome nbd_take_nic(struct nbd *nbd, const struct atoll_descriptor *message);

/* Sends; there is room (see nbd_step). */
void nbd_put(struct nbd *nbd, uint32_t role, const struct atoll_descriptor *message);
/* True if executing this request has crashed the domain twice (service.c). */
bool nbd_poisoned(struct nbd *nbd, uint64_t identity);

#endif
