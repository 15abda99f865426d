/*
 * Limits in time, per connection: negotiation, payload (or rest of a header), unread replies, idleness, lingering.
 *
 * All connections are looked at when the nearest deadline may have passed; whoever begins to wait for something calls
 * nic_deadline. An idle server has no deadline.
 *
 * What is received and what is sent hold pages and slots that others may lack. So that nobody keeps them by moving a byte
 * now and then, a part has payload_ns for each NIC_SLOW_BYTES of it, from the moment it has its pages. And while somebody
 * who holds nothing cannot go on for want of them, whoever has moved nothing, or less than at that rate, for crowded_ns is
 * dropped.
 *
 * Nobody is dropped for what nic has not seen: bytes that wait in a socket, or room in it, after nic was stopped, or late. Nor for
 * the time that others take: while nbd has the word (it may be dead), or no page is free for a long option's data (the device may be
 * slow, or full), negotiation does not take the client's time.
 *
 * After a crash: the clocks are in the arena, so a successor does not give a slow client its time anew.
 */
#include "drivers/nic/nic.h"

/* Drops the connection if `since + limit` has passed, else notes the deadline. True: dropped. */
static bool passed(struct nic *nic, struct nic_connection *connection, uint64_t since, uint64_t limit, uint32_t counter)
{
    if (limit == 0)
        return false;
    if (nic->now_ns >= since + limit) {
        atoll_count(nic->domain, counter, 1);
        nic_gone(nic, connection);
        return true;
    }
    nic_deadline(nic, since + limit);
    return false;
}

struct crowd {
    bool pages, replies; /* somebody has nothing and waits for pages; for a slot or his share of what replies may hold */
};

static bool waits_long(const struct nic *nic, uint32_t connection)
{
    return nic->now_ns >= nic->area->connections[connection].received_ns + NIC_CROWDED_AFTER_NS;
}

/* For crowded_ns nothing has moved, or less than NIC_SLOW_BYTES in payload_ns on average: `bytes` since `since`, the last of
 * them at `last`. (The average alone would count what a socket's buffer takes at once.) */
static bool crawls(const struct nic *nic, uint64_t since, uint64_t bytes, uint64_t last)
{
    uint64_t time = nic->now_ns - since;
    if (time < nic->limits.crowded_ns)
        return false;
    return nic->now_ns >= last + nic->limits.crowded_ns ||
           (double)bytes * (double)nic->limits.payload_ns < (double)NIC_SLOW_BYTES * (double)time;
}

static bool crawls_in(const struct nic *nic, const struct nic_connection *connection)
{
    if (connection->phase != NIC_OPEN || connection->receive_state != NIC_RX_PAYLOAD)
        return false;
    const struct nic_slot *slot = &nic->area->slots[connection->receive_slot - 1];
    return !nic_is_short_option(slot) &&
           crawls(nic, connection->part_ns, slot->payload_received - slot->part_begin, connection->received_ns);
}

static bool crawls_out(const struct nic *nic, const struct nic_connection *connection)
{
    return (connection->phase == NIC_OPEN || connection->phase == NIC_ENDING) && connection->send_head != 0 &&
           crawls(nic, connection->head_ns, connection->send_offset, connection->sent_ns);
}

/* It is a crowd if those who crawl hold a quarter of what there is: else others are in the way, a slow device for one. */
static struct crowd look_for_crowds(struct nic *nic)
{
    const struct nic_queue *pages = &nic->page_waiters, *slots = &nic->slot_waiters;
    if (nic_queue_empty(pages) && nic_queue_empty(slots))
        return (struct crowd){0};
    nic_deadline(nic, nic->now_ns + NIC_CROWDED_AFTER_NS);
    bool lacks_pages = !nic_queue_empty(pages) && waits_long(nic, nic_queue_first(pages)), lacks_replies = false;
    for (uint32_t at = slots->head; at != slots->tail && !lacks_replies; at++) {
        uint32_t connection = slots->items[at % ATOLL_CONNECTION_COUNT];
        lacks_replies = nic->area->connections[connection].outstanding == 0 && waits_long(nic, connection);
    }
    uint64_t part_pages = 0, reply_pages = 0, reply_slots = 0;
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT && (lacks_pages || lacks_replies); index++) {
        const struct nic_connection *connection = &nic->area->connections[index];
        if (crawls_in(nic, connection)) {
            const struct nic_slot *slot = &nic->area->slots[connection->receive_slot - 1];
            part_pages += slot->part_bytes[slot->part % NIC_PART_LISTS] / ATOLL_BLOCK_BYTES + 1;
        }
        if (crawls_out(nic, connection)) {
            reply_pages += nic->hints[index].reply_pages;
            reply_slots += connection->outstanding;
        }
    }
    return (struct crowd){
        .pages = lacks_pages && part_pages * 4 >= nic->area->page_count,
        .replies = lacks_replies && (reply_pages * 4 >= nic->limits.reply_pages || reply_slots * 4 >= ATOLL_SLOT_COUNT),
    };
}

/* Within a payload, what is thrown away, or a header. */
static bool waits_for_client(const struct nic_connection *connection)
{
    struct nic_window window = nic_window_of(connection->window);
    return connection->receive_state == NIC_RX_PAYLOAD || connection->receive_state == NIC_RX_DISCARD ||
           (connection->receive_state == NIC_RX_HEADER && window.end - window.begin > 0 &&
            window.end - window.begin < nic_frame_header_bytes(connection->framing));
}

/* There is something to receive, or room for what is to be sent, as far as is known: first that, then its time. */
static void unseen(struct nic *nic, uint32_t connection)
{
    nic_schedule(nic, connection);
    nic_deadline(nic, nic->now_ns + NIC_RETRY_NS);
}

static void look_at(struct nic *nic, struct nic_connection *connection, struct crowd crowd)
{
    uint32_t index = nic_index(nic, connection);
    struct nic_hint *hint = &nic->hints[index];

    if (connection->phase == NIC_LINGER && hint->linger_until_ns != 0) {
        if (nic->now_ns >= hint->linger_until_ns)
            nic_gone(nic, connection);
        else
            nic_deadline(nic, hint->linger_until_ns);
        return;
    }
    if (connection->phase != NIC_OPEN && connection->phase != NIC_ENDING)
        return;
    if (connection->send_head != 0 && hint->writable) { /* it has read: sent first */
        unseen(nic, index);
    } else if (connection->send_head != 0) {
        if (passed(nic, connection, connection->sent_ns, nic->limits.reply_ns, NIC_REPLY_TIMEOUTS))
            return;
        if (crowd.replies && crawls_out(nic, connection)) {
            passed(nic, connection, 0, 1, NIC_REPLY_TIMEOUTS);
            return;
        }
    }
    if (connection->phase != NIC_OPEN)
        return;
    if (connection->framing != ATOLL_FRAMING_REQUEST && connection->framing != ATOLL_FRAMING_EXTENDED) {
        if (connection->receive_state != NIC_RX_HOLD && connection->receive_state != NIC_RX_PAGES)
            passed(nic, connection, connection->accepted_ns, nic->limits.handshake_ns, NIC_HANDSHAKE_TIMEOUTS);
        return;
    }
    if (waits_for_client(connection) && hint->readable) {
        unseen(nic, index);
    } else if (waits_for_client(connection)) {
        if (passed(nic, connection, connection->received_ns, nic->limits.payload_ns, NIC_PAYLOAD_TIMEOUTS) ||
            connection->receive_state != NIC_RX_PAYLOAD)
            return;
        const struct nic_slot *slot = &nic->area->slots[connection->receive_slot - 1];
        uint64_t shares = (slot->part_bytes[slot->part % NIC_PART_LISTS] + NIC_SLOW_BYTES - 1) / NIC_SLOW_BYTES;
        if (passed(nic, connection, connection->part_ns, shares * nic->limits.payload_ns, NIC_PAYLOAD_TIMEOUTS))
            return;
        if (crowd.pages && crawls_in(nic, connection))
            passed(nic, connection, 0, 1, NIC_PAYLOAD_TIMEOUTS);
    } else if (connection->outstanding == 0 && connection->receive_state == NIC_RX_HEADER) {
        uint64_t since = connection->received_ns > connection->sent_ns ? connection->received_ns : connection->sent_ns;
        passed(nic, connection, since, nic->limits.idle_ns, NIC_IDLE_TIMEOUTS);
    } else if (nic->limits.idle_ns != 0) {
        nic_deadline(nic, nic->now_ns + nic->limits.idle_ns);
    }
}

void nic_handshake_goes_on(struct nic *nic, struct nic_connection *connection)
{
    connection->accepted_ns += nic->now_ns - connection->received_ns;
    nic_deadline(nic, connection->accepted_ns + nic->limits.handshake_ns);
    if (nic->limits.idle_ns != 0) /* negotiation may be over */
        nic_deadline(nic, nic->now_ns + nic->limits.idle_ns);
}

/* nic was stopped for long, and perhaps everybody else with it: all have their time anew. */
static void begin_anew(struct nic *nic)
{
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT; index++) {
        struct nic_connection *connection = &nic->area->connections[index];
        if (connection->framing != ATOLL_FRAMING_REQUEST && connection->framing != ATOLL_FRAMING_EXTENDED)
            connection->accepted_ns = nic->now_ns;
        connection->received_ns = connection->sent_ns = connection->part_ns = connection->head_ns = nic->now_ns;
    }
}

void nic_timeouts(struct nic *nic)
{
    if (nic->now_ns - nic->next_deadline_ns >= NIC_LATE_NS)
        begin_anew(nic);
    for (uint32_t looks = 0; looks < NIC_MOST_LOOKS && nic_look(nic, 0); looks++)
        ; /* what has come is known before anybody's time is over */
    nic->next_deadline_ns = UINT64_MAX;
    if (nic->accept_retry_ns > nic->now_ns)
        nic_deadline(nic, nic->accept_retry_ns);
    const struct nic_queue *waiters = &nic->post_waiters;
    for (uint32_t at = waiters->head; at != waiters->tail; at++)
        unseen(nic, waiters->items[at % ATOLL_CONNECTION_COUNT]); /* perhaps none may be posted any more */
    struct crowd crowd = look_for_crowds(nic);
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT; index++) {
        look_at(nic, &nic->area->connections[index], crowd);
        if (nic->journal->count >= NIC_JOURNAL_LIMIT) /* all at once (after a pause of the machine) are more than one step */
            nic_commit(nic);
    }
}
