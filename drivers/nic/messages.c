/*
 * Messages from nbd (REPLY, NEXT) and dedup (GIVE_BACK, END, DONE): copied, checked against the slot they name, applied.
 *
 * A message that fits no slot, or comes out of turn, is refused and counted; it changes nothing (I8).
 *
 * After a crash: messages of a step that did not commit are in the ring again.
 */
#include "drivers/nic/nic.h"

/* The longest reply that is believed: a request's data and its headers. */
#define REPLY_BYTES (ATOLL_REQUEST_BYTES + ATOLL_PART_BYTES)

static void refuse(struct nic *nic) { atoll_count(nic->domain, NIC_BAD_MESSAGE, 1); }

/* nbd has done with the part that was lent to it. */
static void part_returned(struct nic *nic, struct nic_slot *slot, bool taken)
{
    uint32_t bank = slot->lent_part % NIC_PART_LISTS;
    nic_pages_change(nic, slot, slot->lent_part, taken ? NIC_PAGE_TAKEN : NIC_PAGE_FREE);
    nic_set32(nic, &slot->segments[bank], 0);
    nic_set32(nic, &slot->flags, slot->flags & ~(uint32_t)NIC_SLOT_LENT);
}

static void on_next(struct nic *nic, struct nic_slot *slot, const struct atoll_descriptor *message)
{
    bool lent = (slot->flags & (NIC_SLOT_LENT | NIC_SLOT_POSTED)) == NIC_SLOT_LENT; /* a posted part is lent until END */
    if (!lent || message->part != (uint16_t)slot->lent_part) {
        refuse(nic);
        return;
    }
    part_returned(nic, slot, message->flags & ATOLL_FLAG_TAKEN);
    nic_receive_next(nic, slot);
}

static void on_end(struct nic *nic, struct nic_slot *slot, const struct atoll_descriptor *message)
{
    if (!(slot->flags & NIC_SLOT_POSTED)) {
        refuse(nic);
        return;
    }
    part_returned(nic, slot, message->flags & ATOLL_FLAG_TAKEN);
    nic_set32(nic, &slot->flags, slot->flags & ~(uint32_t)NIC_SLOT_POSTED);
    nic_posted_end(nic, slot);
    if (!(slot->flags & NIC_SLOT_QUEUED))
        nic_slot_free(nic, slot);
}

/* Whose writes may be posted from now on. */
static void begin_transmission(struct nic *nic, struct nic_connection *connection, const struct atoll_descriptor *message)
{
    nic_set32(nic, &connection->volume, message->halves[1] <= ATOLL_VOLUME_COUNT ? message->halves[1] : 0);
    nic_set32(nic, &connection->generation, message->halves[2]);
    nic_set32(nic, &connection->mixes, message->halves[3]);
}

static void on_reply(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, const struct atoll_descriptor *message)
{
    bool last = message->flags & ATOLL_FLAG_LAST;
    uint32_t place = (uint32_t)(slot - nic->area->slots) + 1;
    if ((slot->flags & (NIC_SLOT_QUEUED | NIC_SLOT_ANSWERED | NIC_SLOT_ASKED)) || message->length > REPLY_BYTES ||
        message->segment_count > ATOLL_REPLY_SEGMENTS) {
        refuse(nic);
        nic_gone(nic, connection);
        return;
    }
    if ((slot->flags & NIC_SLOT_LENT) && (last || (message->flags & ATOLL_FLAG_TAKEN)))
        part_returned(nic, slot, message->flags & ATOLL_FLAG_TAKEN);
    slot->reply_address = message->address; /* not queued: unreferenced */
    slot->reply_length = message->length;
    slot->reply_segments = message->segment_count;
    slot->reply_flags = message->flags;
    slot->reply_part = message->part;

    if (last) {
        nic_set32(nic, &slot->flags, slot->flags | NIC_SLOT_ANSWERED);
        if (slot->state == NIC_SLOT_OPEN || slot->state == NIC_SLOT_OPTION) {
            nic_handshake_goes_on(nic, connection);
            uint32_t framing = message->halves[0];
            if (framing != ATOLL_FRAMING_KEEP && nic_frame_header_bytes(framing) != 0)
                nic_set32(nic, &connection->framing, framing);
            if (nic_frame_header_bytes(connection->framing) == 0) { /* nbd did not say how to go on */
                if (!(message->flags & ATOLL_FLAG_CLOSE))
                    refuse(nic);
                slot->reply_flags |= ATOLL_FLAG_CLOSE;
            }
            if (connection->framing == ATOLL_FRAMING_REQUEST || connection->framing == ATOLL_FRAMING_EXTENDED)
                begin_transmission(nic, connection, message);
        }
    }
    if (!last && !connection->mixes)
        nic_set32(nic, &connection->streaming, place);
    else if (last && connection->streaming == place)
        nic_set32(nic, &connection->streaming, 0);
    if (slot->reply_flags & ATOLL_FLAG_CLOSE)
        nic_end(nic, connection);
    else if ((last || (message->flags & ATOLL_FLAG_DISCARD)) && nic_receive_discard(nic, connection, slot) && last) {
        /* Clients (libnbd among them) know no answer to a request that they have not sent to its end. */
        nic_set32(nic, &connection->held_slot, place);
        return;
    }

    if (connection->phase == NIC_OPEN || connection->phase == NIC_ENDING)
        nic_send_queue(nic, connection, slot);
    else
        nic_reply_done(nic, connection, slot); /* swallowed */
    nic_schedule(nic, slot->connection);
}

/* The slot in use that the message names, or NULL. */
static struct nic_slot *slot_in_use(struct nic *nic, const struct atoll_descriptor *message)
{
    uint32_t number = atoll_identity_slot(message->identity), index = atoll_identity_connection(message->identity);
    struct nic_slot *slot = number < ATOLL_SLOT_COUNT ? &nic->area->slots[number] : 0;
    if (slot != 0 && index < ATOLL_CONNECTION_COUNT && slot->state != NIC_SLOT_FREE &&
        slot->sequence == atoll_identity_sequence(message->identity) && slot->connection == index &&
        (slot->flags & NIC_SLOT_DELIVERED))
        return slot;
    refuse(nic);
    return 0;
}

static void from_nbd(struct nic *nic, const struct atoll_descriptor *message)
{
    struct nic_slot *slot = slot_in_use(nic, message);
    if (slot == 0)
        return;
    nic->domain->self->current = message->identity;
    if (message->opcode == ATOLL_OP_REPLY)
        on_reply(nic, &nic->area->connections[slot->connection], slot, message);
    else if (message->opcode == ATOLL_OP_NEXT)
        on_next(nic, slot, message);
    else
        refuse(nic);
    nic->domain->self->current = 0;
}

/* Dedup has done what nic asked of it. */
static void on_done(struct nic *nic, struct nic_slot *slot, const struct atoll_descriptor *message)
{
    if (slot->flags & NIC_SLOT_ASKED)
        nic_read_done(nic, &nic->area->connections[slot->connection], slot, message);
    else
        refuse(nic);
}

static void from_dedup(struct nic *nic, const struct atoll_descriptor *message)
{
    if (message->opcode == ATOLL_OP_END || message->opcode == ATOLL_OP_DONE) {
        struct nic_slot *slot = slot_in_use(nic, message);
        nic->domain->self->current = message->identity;
        if (slot != 0)
            message->opcode == ATOLL_OP_END ? on_end(nic, slot, message) : on_done(nic, slot, message);
        nic->domain->self->current = 0;
    } else if (message->opcode == ATOLL_OP_GIVE_BACK && message->segment_count <= 8) {
        for (uint32_t index = 0; index < message->segment_count; index++)
            nic_page_give_back(nic, message->halves[index]);
    } else {
        refuse(nic);
    }
}

uint32_t nic_messages(struct nic *nic, uint32_t limit)
{
    struct atoll_descriptor message;
    uint32_t count = 0;
    /* A reply may cause a message (SENT, PART) at once, or CLOSE up to one per slot of the connection. */
    while (count < limit && nic->message_budget > 0 && atoll_domain_take(nic->domain, ATOLL_ROLE_NBD, &message)) {
        from_nbd(nic, &message);
        count++;
    }
    for (uint32_t taken = 0; taken < limit && atoll_domain_take(nic->domain, ATOLL_ROLE_DEDUP, &message); taken++) {
        from_dedup(nic, &message);
        count++;
    }
    return count;
}
