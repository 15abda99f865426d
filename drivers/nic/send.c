/*
 * Replies: queued per connection in the order of their arrival, gathered from wherever their segments lie.
 *
 * The position in the outgoing stream is (send_head, send_offset): the reply being sent and how much of it is in the socket.
 * A send takes as many queued replies as fit; its outcome, a number of bytes, moves the position. Segments are read,
 * checked and used anew for each send: they are nbd's memory.
 *
 * After a crash: the outcome of the predecessor's send, if it happened, stands in the completion queue; the position is
 * then exact to the byte.
 */
#include "drivers/nic/nic.h"

#include <errno.h>

#include "drivers/nic/engine.h"

void nic_send_queue(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot)
{
    slot->next = 0; /* not in a queue: unreferenced */
    nic_set32(nic, &slot->flags, slot->flags | NIC_SLOT_QUEUED);
    uint32_t number = (uint32_t)(slot - nic->area->slots) + 1;
    if (connection->send_head == 0) {
        nic_set32(nic, &connection->send_head, number);
        nic_set32(nic, &connection->send_offset, 0);
        connection->sent_ns = connection->head_ns = nic->now_ns;
        nic_deadline(nic, nic->now_ns + nic->limits.reply_ns);
    } else {
        atoll_set32(nic->journal, &nic->area->slots[connection->send_tail - 1].next, number);
    }
    nic_set32(nic, &connection->send_tail, number);
    nic_schedule(nic, slot->connection);
}

void nic_reply_done(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot)
{
    (void)connection;
    nic_set32(nic, &slot->flags, slot->flags & ~(uint32_t)NIC_SLOT_QUEUED);
    if (slot->reply_flags & ATOLL_FLAG_LAST) {
        if (!(slot->flags & NIC_SLOT_POSTED)) /* else END frees it */
            nic_slot_free(nic, slot);
        return;
    }
    struct atoll_descriptor message = {.opcode = ATOLL_OP_SENT, .identity = nic_identity(nic, slot), .part = slot->reply_part};
    nic_put(nic, ATOLL_ROLE_NBD, &message);
}

/* Takes the head off the queue. True if the connection is to be closed now. */
static bool head_done(struct nic *nic, struct nic_connection *connection)
{
    struct nic_slot *slot = &nic->area->slots[connection->send_head - 1];
    uint32_t next = slot->next;
    bool close = (slot->reply_flags & ATOLL_FLAG_CLOSE) != 0;
    nic_set32(nic, &connection->send_head, next);
    if (next == 0)
        nic_set32(nic, &connection->send_tail, 0);
    nic_set32(nic, &connection->send_offset, 0);
    connection->head_ns = nic->now_ns;
    atoll_count(nic->domain, NIC_REPLIES, 1);
    nic_reply_done(nic, connection, slot);
    return close;
}

void nic_send_flush(struct nic *nic, struct nic_connection *connection)
{
    uint32_t number = connection->send_head;
    nic_set32(nic, &connection->send_head, 0);
    nic_set32(nic, &connection->send_tail, 0);
    nic_set32(nic, &connection->send_offset, 0);
    while (number != 0) {
        struct nic_slot *slot = &nic->area->slots[number - 1];
        number = slot->next;
        nic_reply_done(nic, connection, slot);
    }
}

/* Adds [address, address + length) without the first *skip bytes; false if it lies in no arena. */
static bool add_vector(struct nic *nic, uint64_t address, uint32_t length, uint32_t *skip, uint32_t *count)
{
    if (length == 0)
        return true;
    if (atoll_reference_role(nic->domain, address, length) == 0)
        return false;
    if (*skip >= length) {
        *skip -= length;
        return true;
    }
    nic->vectors[nic->vector_count + (*count)++] = (struct iovec){.iov_base = (void *)(uintptr_t)(address + *skip), .iov_len = length - *skip};
    *skip = 0;
    return true;
}

/* Vectors of one reply from `skip` on; false: a reference is wrong. */
static bool add_reply(struct nic *nic, const struct nic_slot *slot, uint32_t skip, uint32_t *count)
{
    if (slot->reply_segments == 0)
        return add_vector(nic, slot->reply_address, slot->reply_length, &skip, count);
    if (atoll_reference_role(nic->domain, slot->reply_address, slot->reply_segments * sizeof(struct atoll_segment)) == 0 ||
        slot->reply_address % 8 != 0)
        return false;
    const struct atoll_segment *segments = (const void *)(uintptr_t)slot->reply_address;
    uint64_t total = 0;
    for (uint32_t index = 0; index < slot->reply_segments; index++) {
        struct atoll_segment segment = {.address = *(const volatile uint64_t *)&segments[index].address,
                                        .length = *(const volatile uint32_t *)&segments[index].length};
        total += segment.length;
        if (!add_vector(nic, segment.address, segment.length, &skip, count))
            return false;
    }
    return total == slot->reply_length;
}

void nic_send(struct nic *nic, struct nic_connection *connection)
{
    uint32_t index = nic_index(nic, connection);
    struct nic_hint *hint = &nic->hints[index];

    if (connection->phase != NIC_OPEN && connection->phase != NIC_ENDING)
        return;
    /* Replies without bytes are done when they are first. */
    while (connection->send_head != 0 && nic->area->slots[connection->send_head - 1].reply_length == 0)
        if (head_done(nic, connection)) {
            nic_linger(nic, connection);
            return;
        }
    if (connection->send_head == 0 || !hint->writable || (connection->operation[NIC_SEND] & 1))
        return;
    if (nic->engine->room(nic) == 0 || nic->vector_count + NIC_SEND_VECTORS > NIC_TURN_VECTORS) {
        nic_schedule(nic, index);
        return;
    }
    uint32_t count = 0, number = connection->send_head, skip = connection->send_offset;
    uint64_t bytes = 0;
    while (number != 0 && bytes < NIC_SEND_BYTES) {
        const struct nic_slot *slot = &nic->area->slots[number - 1];
        uint32_t needed = slot->reply_segments == 0 ? 1 : slot->reply_segments;
        if (count + needed > NIC_SEND_VECTORS)
            break;
        if (!add_reply(nic, slot, skip, &count)) {
            atoll_count(nic->domain, NIC_BAD_REFERENCE, 1);
            nic_gone(nic, connection);
            return;
        }
        bytes += slot->reply_length - skip;
        skip = 0;
        if (slot->reply_flags & ATOLL_FLAG_CLOSE)
            break;
        number = slot->next;
    }
    assert(count > 0);
    hint->asked_send = (uint32_t)bytes;
    struct iovec *vectors = &nic->vectors[nic->vector_count];
    nic->vector_count += count;
    atoll_count(nic->domain, NIC_SEND_OPERATIONS, 1);
    nic->engine->send(nic, index, vectors, count, nic_intent(nic, connection, NIC_SEND));
}

static void blocked(struct nic_hint *hint)
{
    hint->writable = false;
    hint->blocks = true;
    hint->easy_sends = 0;
}

void nic_sent(struct nic *nic, struct nic_connection *connection, int32_t result)
{
    struct nic_hint *hint = &nic->hints[nic_index(nic, connection)];

    nic_schedule(nic, nic_index(nic, connection));
    if (connection->phase != NIC_OPEN && connection->phase != NIC_ENDING)
        return; /* its queue was flushed */
    if (result <= 0) {
        if (result == -EAGAIN || result == 0)
            blocked(hint);
        else if (result != -EINTR && result != -ENOMEM && result != -ENOBUFS) {
            atoll_count(nic->domain, NIC_SOCKET_ERRORS, 1);
            nic_gone(nic, connection);
        }
        return;
    }
    uint32_t left = (uint32_t)result;
    if (hint->asked_send != 0 && left < hint->asked_send)
        blocked(hint);
    else if (hint->blocks && ++hint->easy_sends >= NIC_EASY_SENDS)
        hint->blocks = false;
    connection->sent_ns = nic->now_ns;
    connection->sent_bytes += left;
    atoll_count(nic->domain, NIC_SENT_BYTES, left);
    bool close = false;
    while (left > 0) {
        assert(connection->send_head != 0);
        struct nic_slot *slot = &nic->area->slots[connection->send_head - 1];
        uint32_t rest = slot->reply_length - connection->send_offset;
        if (left < rest) {
            nic_set32(nic, &connection->send_offset, connection->send_offset + left);
            break;
        }
        left -= rest;
        close = head_done(nic, connection);
        assert(!close || left == 0);
    }
    if (connection->send_head != 0)
        nic_deadline(nic, nic->now_ns + nic->limits.reply_ns);
    else
        nic_guess_due(nic, nic_index(nic, connection));
    if (close)
        nic_linger(nic, connection);
}
