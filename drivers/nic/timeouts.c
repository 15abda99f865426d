/*
 * Limits in time, per connection: negotiation, payload (or rest of a header), unread replies, idleness, lingering.
 *
 * All connections are looked at when the nearest deadline may have passed; whoever begins to wait for something calls
 * nic_deadline. An idle server has no deadline.
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

static void look_at(struct nic *nic, struct nic_connection *connection)
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
    if (connection->send_head != 0 && passed(nic, connection, connection->sent_ns, nic->limits.reply_ns, NIC_REPLY_TIMEOUTS))
        return;
    if (connection->phase != NIC_OPEN)
        return;
    if (connection->framing != ATOLL_FRAMING_REQUEST && connection->framing != ATOLL_FRAMING_EXTENDED) {
        passed(nic, connection, connection->accepted_ns, nic->limits.handshake_ns, NIC_HANDSHAKE_TIMEOUTS);
        return;
    }
    struct nic_window window = nic_window_of(connection->window);
    bool waits_for_client = connection->receive_state == NIC_RX_PAYLOAD || connection->receive_state == NIC_RX_DISCARD ||
                            (connection->receive_state == NIC_RX_HEADER && window.end - window.begin > 0 &&
                             window.end - window.begin < nic_frame_header_bytes(connection->framing));
    if (waits_for_client) {
        passed(nic, connection, connection->received_ns, nic->limits.payload_ns, NIC_PAYLOAD_TIMEOUTS);
    } else if (connection->outstanding == 0 && connection->receive_state == NIC_RX_HEADER) {
        uint64_t since = connection->received_ns > connection->sent_ns ? connection->received_ns : connection->sent_ns;
        passed(nic, connection, since, nic->limits.idle_ns, NIC_IDLE_TIMEOUTS);
    } else if (nic->limits.idle_ns != 0) {
        nic_deadline(nic, nic->now_ns + nic->limits.idle_ns);
    }
}

void nic_timeouts(struct nic *nic)
{
    nic->next_deadline_ns = UINT64_MAX;
    if (nic->accept_retry_ns > nic->now_ns)
        nic_deadline(nic, nic->accept_retry_ns);
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT; index++) {
        look_at(nic, &nic->area->connections[index]);
        if (nic->journal->count >= NIC_JOURNAL_LIMIT) /* all at once (after a pause of the machine) are more than one step */
            nic_commit(nic);
    }
}
