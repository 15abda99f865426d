/* What a message does to connections and slots (transmission.c), on top of the life of a slot (slot.c). */
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

static inline struct nbd_connection *connection_of(struct nbd *nbd, uint64_t identity)
{
    return &nbd->area->connections[atoll_identity_connection(identity)];
}

static inline struct nbd_slot *slot_of(struct nbd *nbd, uint64_t identity)
{
    return &nbd->area->slots[atoll_identity_slot(identity)];
}

static inline struct nbd_reply *reply_of(struct nbd *nbd, uint64_t identity)
{
    return &nbd->area->replies[atoll_identity_slot(identity)];
}

static inline void peer_fault(struct nbd *nbd) { atoll_count(nbd->domain, NBD_COUNTER_PEER_FAULTS, 1); }

/* Commands that travel in parts of nbd_unit bytes. */
static inline bool nbd_has_parts(uint32_t type) { return type != NBD_CMD_FLUSH && type != NBD_CMD_BLOCK_STATUS; }
uint64_t nbd_unit(uint32_t type);

void nbd_set_state(struct nbd *nbd, struct nbd_connection *connection, uint32_t state);
void nbd_count_error(struct nbd *nbd, uint32_t status);

/* --- slot.c: all in the running transaction --- */
/* A reply without bytes to a message that has no slot's state; `flags` beside LAST. */
void nbd_end_message(struct nbd *nbd, uint64_t identity, uint32_t part, uint32_t flags);
/* The same, and the connection is closed when what was sent before has gone out. */
void nbd_close(struct nbd *nbd, uint64_t identity, uint32_t part, uint32_t flags);

/* Asks dedup for the slot's current part. `payload`: the message that brought it, for WRITE; else NULL. */
void nbd_send_part(struct nbd *nbd, const struct nbd_slot *slot, const struct atoll_descriptor *payload);
/* Goes on to the next part, those before it being `done_bytes` long, and asks for it. */
void nbd_next_part(struct nbd *nbd, struct nbd_slot *slot, uint64_t done_bytes, const struct atoll_descriptor *payload);

/* Sends a reply of `slot`, now or in its turn. With LAST the slot is free then, without it waits for SENT. */
void nbd_send_reply(struct nbd *nbd, struct nbd_slot *slot, const struct atoll_descriptor *reply);
/* For a slot that is to wait, even one whose state is FREE (a request refused at once). */
void nbd_wait_for_turn(struct nbd *nbd, struct nbd_slot *slot, const struct atoll_descriptor *reply);

/* The last reply of `slot`: "done"; or an error, `taken` if dedup has the payload of the current part; or not a byte. */
void nbd_finish_success(struct nbd *nbd, struct nbd_slot *slot);
void nbd_finish_error(struct nbd *nbd, struct nbd_slot *slot, uint32_t status, uint64_t place, int taken);
/* The same where it is known which block of the volume it was: `offset`, in bytes. */
void nbd_finish_error_at(struct nbd *nbd, struct nbd_slot *slot, uint32_t status, uint64_t place, uint64_t offset, int taken);
void nbd_finish_empty(struct nbd *nbd, struct nbd_slot *slot, uint32_t part, uint32_t flags);

/* Sends; there is room (see step in service.c). */
void nbd_put(struct nbd *nbd, uint32_t role, const struct atoll_descriptor *message);

/* --- service.c --- */
/* True if executing this request has crashed the domain twice (service.c). */
bool nbd_poisoned(struct nbd *nbd, uint64_t identity);

#endif
