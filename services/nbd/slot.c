/*
 * What happens to a slot: its parts go to dedup, its replies to nic, and in the end it is free again.
 *
 * Chunks of several replies may be mixed in the stream, simple replies may not: while a READ of several parts is being sent
 * on a connection with simple replies (`streaming`), other replies of that connection are WAITING in a list through the slots.
 *
 * After a crash: all of this happens within a step's transaction; there is nothing to repair.
 */
#include "services/nbd/transmission.h"

void nbd_put(struct nbd *nbd, uint32_t role, const struct atoll_descriptor *message)
{
    bool there_was_room = atoll_domain_put(nbd->domain, role, message);
    assert(there_was_room); /* a step takes no message whose consequences have no place */
}

void nbd_set_state(struct nbd *nbd, struct nbd_connection *connection, uint32_t state)
{
    if (connection->negotiation.state != state)
        atoll_set32(nbd->domain->journal, &connection->negotiation.state, state);
}

/* A reply without bytes to a message that has no slot's state; sent at once. */
void nbd_end_message(struct nbd *nbd, uint64_t identity, uint32_t part, uint32_t flags)
{
    struct atoll_descriptor reply = {
        .opcode = ATOLL_OP_REPLY, .identity = identity, .part = (uint16_t)part, .flags = (uint8_t)(ATOLL_FLAG_LAST | flags)};
    nbd_put(nbd, ATOLL_ROLE_NIC, &reply);
}

void nbd_close(struct nbd *nbd, uint64_t identity, uint32_t part, uint32_t flags)
{
    nbd_set_state(nbd, connection_of(nbd, identity), NBD_CONNECTION_CLOSING);
    nbd_end_message(nbd, identity, part, ATOLL_FLAG_CLOSE | flags);
}

void nbd_count_error(struct nbd *nbd, uint32_t status)
{
    static const uint8_t COUNTERS[] = {[NBD_EPERM] = NBD_COUNTER_EPERM,         [NBD_EIO] = NBD_COUNTER_EIO,
                                       [NBD_ENOMEM] = NBD_COUNTER_ENOMEM,       [NBD_EINVAL] = NBD_COUNTER_EINVAL,
                                       [NBD_ENOSPC] = NBD_COUNTER_ENOSPC,       [NBD_EOVERFLOW] = NBD_COUNTER_EOVERFLOW,
                                       [NBD_ENOTSUP] = NBD_COUNTER_ENOTSUP,     [NBD_ESHUTDOWN] = NBD_COUNTER_ESHUTDOWN};
    atoll_count(nbd->domain, COUNTERS[nbd_code(status)], 1);
    if (status == ATOLL_EPOISON)
        atoll_count(nbd->domain, NBD_COUNTER_POISONED, 1);
}

/* --- A slot's parts ---------------------------------------------------------------------------------------------- */

uint64_t nbd_unit(uint32_t type)
{
    return type == NBD_CMD_TRIM || type == NBD_CMD_WRITE_ZEROES ? ATOLL_RANGE_PART_BYTES : ATOLL_PART_BYTES;
}

/* The slot is free again; a DISC that waited for it is answered. */
static void release(struct nbd *nbd, struct nbd_slot *slot)
{
    struct atoll_journal *journal = nbd->domain->journal;
    struct nbd_connection *connection = connection_of(nbd, slot->identity);
    atoll_set32(journal, &slot->state, NBD_SLOT_FREE);
    if (connection->in_flight == 0)
        return; /* forgotten by CLOSED, which came too early */
    atoll_set32(journal, &connection->in_flight, connection->in_flight - 1);
    if (connection->in_flight == 0 && connection->negotiation.state == NBD_CONNECTION_DRAINING)
        nbd_close(nbd, connection->disc_identity, 0, 0);
}

/* Sends a reply of `slot`, whose turn it is: the last one frees the slot, another one waits for SENT. */
static void send_now(struct nbd *nbd, struct nbd_slot *slot, const struct atoll_descriptor *reply)
{
    struct atoll_journal *journal = nbd->domain->journal;
    struct nbd_connection *connection = connection_of(nbd, slot->identity);
    uint32_t place = atoll_identity_slot(slot->identity) + 1;
    nbd_put(nbd, ATOLL_ROLE_NIC, reply);
    if (reply->flags & ATOLL_FLAG_LAST) {
        if (connection->streaming == place)
            atoll_set32(journal, &connection->streaming, 0);
        release(nbd, slot);
    } else {
        atoll_set32(journal, &slot->state, NBD_SLOT_SENDING);
        if (!nbd_uses_chunks(slot) && connection->streaming != place)
            atoll_set32(journal, &connection->streaming, place);
    }
}

void nbd_wait_for_turn(struct nbd *nbd, struct nbd_slot *slot, const struct atoll_descriptor *reply)
{
    struct atoll_journal *journal = nbd->domain->journal;
    struct nbd_connection *connection = connection_of(nbd, slot->identity);
    uint32_t place = atoll_identity_slot(slot->identity) + 1;
    if (slot->state == NBD_SLOT_FREE) /* refused at once, so not yet counted */
        atoll_set32(journal, &connection->in_flight, connection->in_flight + 1);
    atoll_save(journal, slot, sizeof *slot);
    slot->state = NBD_SLOT_WAITING;
    slot->waiting_next = 0;
    slot->reply_address = reply->address;
    slot->reply_length = reply->length;
    slot->reply_segment_count = reply->segment_count;
    slot->reply_flags = reply->flags;
    if (connection->waiting_last == 0)
        atoll_set32(journal, &connection->waiting_first, place);
    else
        atoll_set32(journal, &nbd->area->slots[connection->waiting_last - 1].waiting_next, place);
    atoll_set32(journal, &connection->waiting_last, place);
    atoll_set32(journal, &nbd->area->waiting, nbd->area->waiting + 1);
}

static void send_waiting(struct nbd *nbd, struct nbd_connection *connection)
{
    struct atoll_journal *journal = nbd->domain->journal;
    while (connection->streaming == 0 && connection->waiting_first != 0) {
        struct nbd_slot *slot = &nbd->area->slots[connection->waiting_first - 1];
        struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY,
                                         .flags = (uint8_t)slot->reply_flags,
                                         .identity = slot->identity,
                                         .part = (uint16_t)slot->part,
                                         .address = slot->reply_address,
                                         .length = slot->reply_length,
                                         .segment_count = slot->reply_segment_count};
        atoll_set32(journal, &nbd->area->waiting, nbd->area->waiting - 1);
        atoll_set32(journal, &connection->waiting_first, slot->waiting_next);
        if (slot->waiting_next == 0)
            atoll_set32(journal, &connection->waiting_last, 0);
        send_now(nbd, slot, &reply);
    }
}

/* Sends a reply of `slot`, now or when it may. The slot's state follows. */
void nbd_send_reply(struct nbd *nbd, struct nbd_slot *slot, const struct atoll_descriptor *reply)
{
    struct nbd_connection *connection = connection_of(nbd, slot->identity);
    if (connection->streaming != 0 && connection->streaming != atoll_identity_slot(slot->identity) + 1) {
        nbd_wait_for_turn(nbd, slot, reply);
        return;
    }
    send_now(nbd, slot, reply);
    send_waiting(nbd, connection);
}

/* Ends a slot without another byte; `flags` beside LAST. */
void nbd_finish_empty(struct nbd *nbd, struct nbd_slot *slot, uint32_t part, uint32_t flags)
{
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY,
                                     .identity = slot->identity,
                                     .part = (uint16_t)part,
                                     .flags = (uint8_t)(ATOLL_FLAG_LAST | flags)};
    send_now(nbd, slot, &reply);
    send_waiting(nbd, connection_of(nbd, slot->identity));
}

void nbd_finish_success(struct nbd *nbd, struct nbd_slot *slot)
{
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY, .identity = slot->identity, .part = (uint16_t)slot->part};
    nbd_reply_success(slot, reply_of(nbd, slot->identity), &reply);
    reply.flags = ATOLL_FLAG_LAST | (slot->type == NBD_CMD_WRITE ? ATOLL_FLAG_TAKEN : 0);
    nbd_send_reply(nbd, slot, &reply);
}

/* `taken`: dedup has the payload of the current part. */
void nbd_finish_error(struct nbd *nbd, struct nbd_slot *slot, uint32_t status, uint64_t place, int taken)
{
    nbd_finish_error_at(nbd, slot, status, place, slot->offset + slot->done_bytes, taken);
}

void nbd_finish_error_at(struct nbd *nbd, struct nbd_slot *slot, uint32_t status, uint64_t place, uint64_t offset, int taken)
{
    uint32_t flags = slot->type == NBD_CMD_WRITE ? ATOLL_FLAG_DISCARD | (taken ? ATOLL_FLAG_TAKEN : 0) : 0;
    nbd_count_error(nbd, status);
    if (slot->type == NBD_CMD_READ && slot->part != 0 && !nbd_uses_chunks(slot)) {
        /* A simple reply has said "no error" already: only closing is left (section "NBD_CMD_READ", simple replies). */
        nbd_set_state(nbd, connection_of(nbd, slot->identity), NBD_CONNECTION_CLOSING);
        nbd_finish_empty(nbd, slot, slot->part, ATOLL_FLAG_CLOSE);
        return;
    }
    char text[NBD_TEXT_BYTES];
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY, .identity = slot->identity, .part = (uint16_t)slot->part};
    nbd_explain(slot, status, place, offset, nbd_volume_name(nbd, slot->volume, slot->generation), text);
    nbd_reply_error(slot, reply_of(nbd, slot->identity), status, text,
                    nbd_has_parts(slot->type) && (nbd_code(status) == NBD_EIO || nbd_code(status) == NBD_ENOSPC),
                    offset, &reply);
    reply.flags = (uint8_t)(ATOLL_FLAG_LAST | flags);
    nbd_send_reply(nbd, slot, &reply);
}

/* Asks dedup for the current part. `payload`: the message that brought it, for WRITE. */
void nbd_send_part(struct nbd *nbd, const struct nbd_slot *slot, const struct atoll_descriptor *payload)
{
    static const uint8_t OPCODES[] = {[NBD_CMD_READ] = ATOLL_OP_READ,         [NBD_CMD_WRITE] = ATOLL_OP_WRITE,
                                      [NBD_CMD_FLUSH] = ATOLL_OP_FLUSH,       [NBD_CMD_TRIM] = ATOLL_OP_TRIM,
                                      [NBD_CMD_CACHE] = ATOLL_OP_CACHE,       [NBD_CMD_WRITE_ZEROES] = ATOLL_OP_ZERO,
                                      [NBD_CMD_BLOCK_STATUS] = ATOLL_OP_EXTENTS};
    struct atoll_descriptor message = {.opcode = OPCODES[slot->type], .identity = slot->identity, .part = (uint16_t)slot->part};
    /* FUA on the last part alone: it is answered when everything logged before it is on stable storage. */
    bool last = !nbd_has_parts(slot->type) || slot->done_bytes + slot->part_bytes == slot->work_bytes;
    message.flags = (uint8_t)((slot->flags & NBD_CMD_FLAG_FUA && last ? ATOLL_FLAG_FUA : 0) |
                              (slot->flags & NBD_CMD_FLAG_NO_HOLE ? ATOLL_FLAG_NO_HOLE : 0) |
                              (slot->flags & NBD_CMD_FLAG_FAST_ZERO ? ATOLL_FLAG_FAST : 0) |
                              (slot->flags & NBD_CMD_FLAG_REQ_ONE ? ATOLL_FLAG_ONE : 0));
    if (nbd->alone)
        message.flags |= ATOLL_FLAG_ALONE;
    message.words[0] = slot->offset + slot->done_bytes;
    message.words[1] = nbd_has_parts(slot->type) ? slot->part_bytes : slot->length;
    message.halves[4] = slot->volume;
    message.halves[5] = slot->generation;
    if (payload != 0) {
        message.address = payload->address;
        message.length = payload->length;
        message.segment_count = payload->segment_count;
    }
    nbd_put(nbd, ATOLL_ROLE_DEDUP, &message);
}

/* The parts before it are done; the state becomes DEDUP. */
void nbd_next_part(struct nbd *nbd, struct nbd_slot *slot, uint64_t done_bytes, const struct atoll_descriptor *payload)
{
    struct atoll_journal *journal = nbd->domain->journal;
    atoll_set32(journal, &slot->part, slot->part + 1);
    if (slot->done_bytes != done_bytes)
        atoll_set64(journal, &slot->done_bytes, done_bytes);
    atoll_set32(journal, &slot->part_bytes,
                (uint32_t)nbd_part_bytes(slot->offset, slot->work_bytes, done_bytes, nbd_unit(slot->type)));
    if (slot->state != NBD_SLOT_DEDUP)
        atoll_set32(journal, &slot->state, NBD_SLOT_DEDUP);
    nbd_send_part(nbd, slot, payload);
}
