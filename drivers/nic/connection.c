/*
 * Slots, and the life of a connection from accept to the last word about it to nbd.
 *
 *   ACCEPTING  the accept is intended             → OPEN when it is seen to have happened, else FREE
 *   OPEN       OPEN is sent as soon as a slot is free; frames are received, replies sent
 *   ENDING     the peer sends nothing more, or nbd said CLOSE, or the server stops; replies are still sent
 *   LINGER     FIN is sent; what the peer had sent meanwhile is thrown away, so that no reset overtakes the last reply
 *   GONE       the socket is closed; replies of outstanding slots are swallowed; then CLOSED is sent
 *   REPORTED   nbd's answer to CLOSED makes the connection number free
 *
 * After a crash: each phase is in the arena, and each is gone on with by nic_connection_life.
 */
#include "drivers/nic/nic.h"

#include "drivers/nic/engine.h"

/* --- Slots ------------------------------------------------------------------------------------------------------- */

void nic_put(struct nic *nic, uint32_t role, const struct atoll_descriptor *message)
{
    if (nic->message_budget > 0)
        nic->message_budget--;
    /* At most one message per slot is unanswered, and the ring holds more: only a wrong index of the peer makes it full. */
    bool unhurried = role == ATOLL_ROLE_DEDUP && (message->flags & ATOLL_FLAG_POSTED);
    if (!(unhurried ? atoll_domain_put_unhurried(nic->domain, role, message) : atoll_domain_put(nic->domain, role, message)))
        atoll_count(nic->domain, NIC_LOST_MESSAGES, 1);
}

bool nic_slot_share(struct nic *nic, const struct nic_connection *connection, uint32_t pages)
{
    uint32_t index = nic_index(nic, connection);
    uint64_t most = nic->limits.reply_pages;
    if (nic->hints[index].reply_pages == 0)
        most += most / 2;
    bool slots = connection->outstanding == 0 || nic->free_slot_count > NIC_KEPT_SLOTS;
    if (slots && (pages == 0 || nic->reply_pages == 0 || nic->reply_pages + pages <= most))
        return true;
    if (!nic->slot_waiters.member[index])
        atoll_count(nic->domain, NIC_SLOT_WAITS, 1);
    nic_queue_add(&nic->slot_waiters, index);
    nic_deadline(nic, nic->now_ns + NIC_CROWDED_AFTER_NS);
    return false;
}

struct nic_slot *nic_slot_take(struct nic *nic, struct nic_connection *connection, uint32_t state)
{
    if (nic->free_slot_count == 0) {
        if (!nic->slot_waiters.member[nic_index(nic, connection)])
            atoll_count(nic->domain, NIC_SLOT_WAITS, 1);
        nic_queue_add(&nic->slot_waiters, nic_index(nic, connection));
        nic_deadline(nic, nic->now_ns + NIC_CROWDED_AFTER_NS);
        return 0;
    }
    struct nic_slot *slot = &nic->area->slots[nic->free_slots[--nic->free_slot_count]];
    assert(slot->state == NIC_SLOT_FREE);
    /* No committed word refers to the contents of a free slot: written directly. */
    slot->sequence++;
    slot->connection = nic_index(nic, connection);
    slot->flags = 0;
    slot->volume_offset = 0;
    slot->payload_bytes = slot->payload_received = 0;
    slot->part = slot->part_begin = slot->lent_part = 0;
    memset(slot->segments, 0, sizeof slot->segments);
    slot->next = 0;
    slot->reply_pages = 0;
    atoll_set32(nic->journal, &slot->state, state);
    atoll_set32(nic->journal, &connection->outstanding, connection->outstanding + 1);
    return slot;
}

void nic_slot_free(struct nic *nic, struct nic_slot *slot)
{
    struct nic_connection *connection = &nic->area->connections[slot->connection];
    assert(slot->state != NIC_SLOT_FREE && connection->outstanding > 0);
    atoll_set32(nic->journal, &slot->state, NIC_SLOT_FREE);
    atoll_set32(nic->journal, &connection->outstanding, connection->outstanding - 1);
    nic->reply_pages -= slot->reply_pages;
    nic->hints[slot->connection].reply_pages -= slot->reply_pages;
    nic->freed_slots[nic->freed_slot_count++] = (uint16_t)(slot - nic->area->slots);
    nic_schedule(nic, slot->connection);
}

/* --- Phases ------------------------------------------------------------------------------------------------------ */

void nic_accepted(struct nic *nic, struct nic_connection *connection)
{
    struct nic_hint *hint = &nic->hints[nic_index(nic, connection)];
    nic_set32(nic, &connection->phase, NIC_OPEN);
    atoll_store_relaxed(&nic->public->ending[nic_index(nic, connection)], 0); /* nobody knows the connection yet */
    nic_set32(nic, &connection->socket_open, 1);
    nic_set32(nic, &connection->receive_state, NIC_RX_HOLD);
    nic_set32(nic, &connection->framing, ATOLL_FRAMING_KEEP);
    nic_set32(nic, &connection->receive_slot, 0);
    nic_set32(nic, &connection->held_slot, 0);
    nic_set32(nic, &connection->volume, 0);
    nic_set32(nic, &connection->streaming, 0);
    nic_set32(nic, &connection->end_of_stream, 0);
    nic_set32(nic, &connection->announced, 0);
    nic_set32(nic, &connection->send_offset, 0);
    atoll_set64(nic->journal, &connection->window, 0);
    atoll_set64(nic->journal, &connection->discard_bytes, 0);
    assert(connection->outstanding == 0 && connection->send_head == 0);
    connection->accepted_ns = connection->received_ns = connection->sent_ns = nic->now_ns;
    connection->received_bytes = connection->sent_bytes = connection->requests = 0;
    memset(hint, 0, sizeof *hint);
    hint->readable = hint->writable = hint->speculate = true;
    atoll_count(nic->domain, NIC_ACCEPTED, 1);
    nic_deadline(nic, nic->now_ns + nic->limits.handshake_ns);
    if (nic->area->stopping)
        nic_end(nic, connection);
    nic_schedule(nic, nic_index(nic, connection));
}

static void announce(struct nic *nic, struct nic_connection *connection)
{
    struct nic_slot *slot = nic_slot_take(nic, connection, NIC_SLOT_OPEN);
    if (slot == 0)
        return;
    slot->flags = NIC_SLOT_DELIVERED;
    nic_set32(nic, &connection->announced, 1);
    nic_set32(nic, &connection->receive_slot, (uint32_t)(slot - nic->area->slots) + 1);
    struct atoll_descriptor message = {.opcode = ATOLL_OP_OPEN, .identity = nic_identity(nic, slot)};
    message.halves[0] = connection->listener;
    nic_put(nic, ATOLL_ROLE_NBD, &message);
}

static void report(struct nic *nic, struct nic_connection *connection)
{
    struct nic_slot *slot = nic_slot_take(nic, connection, NIC_SLOT_CLOSED);
    if (slot == 0)
        return;
    slot->flags = NIC_SLOT_DELIVERED;
    nic_set32(nic, &connection->phase, NIC_REPORTED);
    struct atoll_descriptor message = {.opcode = ATOLL_OP_CLOSED, .identity = nic_identity(nic, slot)};
    nic_put(nic, ATOLL_ROLE_NBD, &message);
}

void nic_connection_freed(struct nic *nic, struct nic_connection *connection)
{
    nic_set32(nic, &connection->phase, NIC_FREE);
    nic->freed_connections[nic->freed_connection_count++] = (uint16_t)nic_index(nic, connection);
}

void nic_connection_life(struct nic *nic, struct nic_connection *connection)
{
    uint32_t index = nic_index(nic, connection);
    struct nic_hint *hint = &nic->hints[index];

    if (connection->phase == NIC_FREE || connection->phase == NIC_ACCEPTING)
        return;
    if (nic->engine->room(nic) == 0)
        nic_schedule(nic, index); /* what has no place in this turn has one in the next */
    bool watched = hint->registered && (hint->blocks_watched == hint->blocks || nic->poll_in_ring);
    if ((connection->phase == NIC_OPEN || connection->phase == NIC_ENDING) && connection->socket_open && !watched &&
        !hint->descriptor_pending && nic->engine->room(nic) > 0) {
        hint->descriptor_pending = true;
        nic->engine->watch(nic, index, nic_user_data(NIC_DESCRIPTOR, index, 0));
    }
    if (connection->phase == NIC_OPEN && !connection->announced)
        announce(nic, connection);
    if (connection->phase == NIC_ENDING && connection->outstanding == 0)
        nic_linger(nic, connection);
    if (connection->phase == NIC_LINGER) {
        if (hint->linger_until_ns == 0) { /* begun by a predecessor or just now */
            hint->linger_until_ns = nic->now_ns + NIC_LINGER_NS;
            hint->want_shutdown = true;
            hint->readable = true;
            nic_deadline(nic, hint->linger_until_ns);
        }
        if (hint->want_shutdown && !hint->descriptor_pending && nic->engine->room(nic) > 0) {
            hint->descriptor_pending = true;
            nic->engine->watch(nic, index, nic_user_data(NIC_DESCRIPTOR, index, 0));
        }
        if (hint->readable && !hint->drain_pending && nic->engine->room(nic) > 0) {
            hint->drain_pending = true;
            nic->engine->drain(nic, index, nic_user_data(NIC_DRAIN, index, 0));
        }
    }
    if (connection->phase == NIC_GONE || connection->phase == NIC_REPORTED) {
        if (connection->socket_open && !(connection->operation[NIC_LIFE] & 1) && nic->engine->room(nic) > 0)
            nic->engine->close_socket(nic, index, nic_intent(nic, connection, NIC_LIFE));
        if (connection->phase == NIC_GONE && connection->outstanding == 0) {
            if (connection->announced)
                report(nic, connection);
            else if (!connection->socket_open)
                nic_connection_freed(nic, connection);
        }
        if (connection->phase == NIC_REPORTED && connection->outstanding == 0 && !connection->socket_open)
            nic_connection_freed(nic, connection);
    }
}

static void note_end(struct nic *nic, const struct nic_connection *connection)
{
    if (connection->phase == NIC_OPEN)
        nic->ended[nic->ended_count++] = (uint16_t)nic_index(nic, connection);
}

void nic_end(struct nic *nic, struct nic_connection *connection)
{
    if (connection->phase != NIC_OPEN)
        return;
    note_end(nic, connection);
    nic_set32(nic, &connection->phase, NIC_ENDING);
    nic_receive_abort(nic, connection);
    nic_schedule(nic, nic_index(nic, connection));
}

void nic_linger(struct nic *nic, struct nic_connection *connection)
{
    nic_receive_abort(nic, connection);
    if (connection->end_of_stream) {
        nic_gone(nic, connection);
        return;
    }
    nic_set32(nic, &connection->phase, NIC_LINGER);
    nic->hints[nic_index(nic, connection)].linger_until_ns = 0;
    nic_send_flush(nic, connection);
    nic_schedule(nic, nic_index(nic, connection));
}

void nic_gone(struct nic *nic, struct nic_connection *connection)
{
    if (connection->phase < NIC_OPEN || connection->phase >= NIC_GONE)
        return;
    note_end(nic, connection);
    nic_set32(nic, &connection->phase, NIC_GONE);
    atoll_count(nic->domain, NIC_CLOSED, 1);
    nic_receive_abort(nic, connection);
    nic_send_flush(nic, connection);
    nic_schedule(nic, nic_index(nic, connection));
}
