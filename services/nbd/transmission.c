/*
 * The transmission phase: what each message from nic and from dedup does to a connection and to a slot.
 *
 *   FREE ──REQUEST──► DEDUP ──DONE──► FREE                      one part, or an error: REPLY with LAST
 *                     DEDUP ──DONE──► PAYLOAD ──PART──► DEDUP   WRITE of several parts: NEXT
 *                     DEDUP ──DONE──► SENDING ──SENT──► DEDUP   READ of several parts: REPLY without LAST
 *                     DEDUP ──DONE──► DEDUP                     TRIM, WRITE_ZEROES, CACHE: the next part at once
 *
 * One part of a request is under way at a time. Parts are cut by nbd_part_bytes, as nic cuts payloads.
 *
 * After a crash: all of this happens within a step's transaction; there is nothing to repair.
 */
#include "services/nbd/transmission.h"

/* The payload of a part as nic claims it: the whole part, within nic's arena. dedup checks each segment that it uses. */
static bool payload_fits(struct nbd *nbd, const struct atoll_descriptor *message, uint64_t part_bytes)
{
    if (message->length != part_bytes || message->segment_count > ATOLL_PART_BLOCKS)
        return false;
    uint64_t bytes = message->segment_count != 0 ? message->segment_count * sizeof(struct atoll_segment) : message->length;
    return atoll_reference_in(nbd->domain, ATOLL_ROLE_NIC, message->address, bytes);
}

/* --- From nic ---------------------------------------------------------------------------------------------------- */

/* A request that is refused at once; the slot holds what was received, its state is FREE. */
static void refuse(struct nbd *nbd, struct nbd_slot *slot, int has_payload, uint32_t status, const char *text)
{
    struct nbd_connection *connection = connection_of(nbd, slot->identity);
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY, .identity = slot->identity};
    nbd_count_error(nbd, status);
    nbd_reply_error(slot, reply_of(nbd, slot->identity), status, text, 0, 0, &reply);
    reply.flags = (uint8_t)(ATOLL_FLAG_LAST | (has_payload ? ATOLL_FLAG_DISCARD : 0));
    if (has_payload && (slot->features & NBD_FEATURE_EXTENDED) && slot->length > ATOLL_PAYLOAD_BYTES) {
        /* Section "Request message" of the extension: such a payload is not waited for. */
        reply.flags |= ATOLL_FLAG_CLOSE;
        nbd_set_state(nbd, connection, NBD_CONNECTION_CLOSING);
    }
    if (connection->streaming != 0)
        nbd_wait_for_turn(nbd, slot, &reply);
    else
        nbd_put(nbd, ATOLL_ROLE_NIC, &reply);
}

static void take_disc(struct nbd *nbd, const struct atoll_descriptor *message)
{
    struct nbd_connection *connection = connection_of(nbd, message->identity);
    if (connection->in_flight == 0) {
        nbd_close(nbd, message->identity, message->part, 0);
        return;
    }
    atoll_set64(nbd->domain->journal, &connection->disc_identity, message->identity);
    nbd_set_state(nbd, connection, NBD_CONNECTION_DRAINING);
}

/* A READ of one part is answered at once if its blocks lie in memory: nothing of it needs to be kept. */
static bool read_from_memory(struct nbd *nbd, struct nbd_slot *slot)
{
    struct nbd_connection *connection = connection_of(nbd, slot->identity);
    struct atoll_segment data[ATOLL_PART_BLOCKS];
    uint32_t count;
    if (slot->part_bytes != slot->work_bytes || !nbd_lookup(nbd, slot, data, &count))
        return false;
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY, .identity = slot->identity};
    nbd_reply_read(slot, reply_of(nbd, slot->identity), data, count, 1, &reply);
    reply.flags = ATOLL_FLAG_LAST;
    if (connection->streaming != 0)
        nbd_wait_for_turn(nbd, slot, &reply);
    else
        nbd_put(nbd, ATOLL_ROLE_NIC, &reply);
    atoll_count(nbd->domain, NBD_COUNTER_READS_FROM_MEMORY, 1);
    return true;
}

/* Dedup has failed at the slot's part. `block`: its LBA + 1, or 0; believed where it lies in the request. */
static void finish_failed(struct nbd *nbd, struct nbd_slot *slot, uint32_t status, uint64_t place, uint64_t block)
{
    uint64_t first = slot->offset >> ATOLL_BLOCK_SHIFT, lba = block - 1, offset = slot->offset + slot->done_bytes;
    if (block != 0 && slot->length != 0 && lba >= first && lba <= (slot->offset + slot->length - 1) >> ATOLL_BLOCK_SHIFT)
        offset = lba == first ? slot->offset : lba << ATOLL_BLOCK_SHIFT;
    nbd_finish_error_at(nbd, slot, status, place, offset, 1);
}

static enum nbd_outcome take_request(struct nbd *nbd, const struct atoll_descriptor *message)
{
    struct atoll_journal *journal = nbd->domain->journal;
    struct nbd_connection *connection = connection_of(nbd, message->identity);
    struct nbd_slot *slot = slot_of(nbd, message->identity);
    struct nbd_request request;
    uint32_t features = connection->negotiation.features;

    if (connection->negotiation.state == NBD_CONNECTION_DRAINING || connection->negotiation.state == NBD_CONNECTION_CLOSING) {
        nbd_end_message(nbd, message->identity, message->part, ATOLL_FLAG_DISCARD); /* nothing may follow a DISC */
        return NBD_OUTCOME_TAKEN;
    }
    if (connection->negotiation.state != NBD_CONNECTION_TRANSMISSION) {
        peer_fault(nbd);
        nbd_close(nbd, message->identity, message->part, ATOLL_FLAG_DISCARD);
        return NBD_OUTCOME_TAKEN;
    }
    if (nbd_parse(message->bytes, features, &request) != 0) {
        atoll_count(nbd->domain, NBD_COUNTER_BAD_MAGIC, 1);
        nbd_close(nbd, message->identity, message->part, ATOLL_FLAG_DISCARD);
        return NBD_OUTCOME_TAKEN;
    }

    const struct atoll_volume *volume;
    enum nbd_look look = nbd_look(nbd, connection->volume, connection->generation, &volume);
    if (look == NBD_LOOK_UNSTABLE)
        return NBD_OUTCOME_UNSTABLE;
    if (request.type <= NBD_CMD_BLOCK_STATUS)
        atoll_count(nbd->domain, NBD_COUNTER_READS + request.type, 1);
    if (request.type == NBD_CMD_DISC && !request.has_payload) {
        take_disc(nbd, message);
        return NBD_OUTCOME_TAKEN;
    }
    if (slot->state != NBD_SLOT_FREE) { /* nic uses it again before it was answered: what is under way goes on */
        peer_fault(nbd);
        nbd_close(nbd, message->identity, message->part, ATOLL_FLAG_DISCARD);
        return NBD_OUTCOME_TAKEN;
    }

    /* To be kept; nothing committed refers to it while the state is FREE. */
    *slot = (struct nbd_slot){.identity = message->identity,
                              .features = features,
                              .cookie = request.cookie,
                              .offset = request.offset,
                              .length = request.length,
                              .work_bytes = request.length,
                              .type = request.type,
                              .flags = request.flags,
                              .volume = connection->volume,
                              .generation = connection->generation};
    char text[NBD_TEXT_BYTES];
    uint32_t status;
    if (look == NBD_LOOK_GONE) {
        status = ATOLL_ENOENT;
        nbd_explain(slot, status, 0, slot->offset, "", text);
    } else if (nbd_poisoned(nbd, message->identity)) {
        status = ATOLL_EPOISON;
        nbd_explain(slot, status, 0, slot->offset + slot->done_bytes, nbd_volume_name(nbd, slot->volume, slot->generation), text);
    } else {
        status = (uint32_t)nbd_validate(&request, features, volume->size_bytes, (volume->flags & ATOLL_VOLUME_READONLY) != 0,
                                        nbd->volumes[slot->volume].name, text);
    }
    if (status == ATOLL_OK && request.type == NBD_CMD_DISC) { /* with a payload, which it may not have */
        nbd_close(nbd, message->identity, message->part, ATOLL_FLAG_DISCARD);
        return NBD_OUTCOME_TAKEN;
    }
    if (status != ATOLL_OK) {
        refuse(nbd, slot, (int)request.has_payload, status, text);
        return NBD_OUTCOME_TAKEN;
    }

    if (request.type == NBD_CMD_CACHE && slot->work_bytes > NBD_CACHE_BYTES)
        slot->work_bytes = NBD_CACHE_BYTES;
    if (nbd_has_parts(request.type))
        slot->part_bytes = (uint32_t)nbd_part_bytes(slot->offset, slot->work_bytes, 0, nbd_unit(request.type));
    if (request.type == NBD_CMD_WRITE && !payload_fits(nbd, message, slot->part_bytes)) {
        peer_fault(nbd);
        nbd_explain(slot, ATOLL_EIO, 0, slot->offset + slot->done_bytes, nbd_volume_name(nbd, slot->volume, slot->generation), text);
        refuse(nbd, slot, 1, ATOLL_EIO, text);
        return NBD_OUTCOME_TAKEN;
    }
    if (request.type == NBD_CMD_READ)
        atoll_count(nbd->domain, NBD_COUNTER_READ_BYTES, request.length);
    if (request.type == NBD_CMD_WRITE)
        atoll_count(nbd->domain, NBD_COUNTER_WRITE_BYTES, request.length);
    atoll_set64(journal, &connection->requests, connection->requests + 1);
    bool failed = request.type == NBD_CMD_READ && message->status != ATOLL_OK; /* nic has asked dedup */
    if (request.type == NBD_CMD_READ && !failed && read_from_memory(nbd, slot))
        return NBD_OUTCOME_TAKEN;
    atoll_set32(journal, &slot->state, NBD_SLOT_DEDUP);
    atoll_set32(journal, &connection->in_flight, connection->in_flight + 1);
    if (failed)
        finish_failed(nbd, slot, message->status, message->address,
                      message->length == 0 ? 0 : (slot->offset >> ATOLL_BLOCK_SHIFT) + message->length);
    else
        nbd_send_part(nbd, slot, request.type == NBD_CMD_WRITE ? message : 0);
    return NBD_OUTCOME_TAKEN;
}

/* The slot that a PART, SENT or DONE belongs to, or NULL. */
static struct nbd_slot *slot_in(struct nbd *nbd, const struct atoll_descriptor *message, uint32_t state, uint32_t part_offset)
{
    struct nbd_slot *slot = slot_of(nbd, message->identity);
    if (slot->state == state && slot->identity == message->identity && (uint16_t)(slot->part + part_offset) == message->part)
        return slot;
    atoll_count(nbd->domain, NBD_COUNTER_STALE, 1);
    return 0;
}

static void take_payload(struct nbd *nbd, const struct atoll_descriptor *message)
{
    struct nbd_slot *slot = slot_in(nbd, message, NBD_SLOT_PAYLOAD, 1);
    if (slot == 0)
        return;
    if (message->status != ATOLL_OK || message->length == 0) { /* the connection is gone, the rest will not come */
        nbd_finish_empty(nbd, slot, slot->part + 1, ATOLL_FLAG_DISCARD);
        return;
    }
    uint64_t expected = nbd_part_bytes(slot->offset, slot->work_bytes, slot->done_bytes, ATOLL_PART_BYTES);
    uint32_t status = nbd_poisoned(nbd, slot->identity) ? ATOLL_EPOISON : ATOLL_OK;
    if (status == ATOLL_OK && !payload_fits(nbd, message, expected)) {
        peer_fault(nbd);
        status = ATOLL_EIO;
    }
    if (status == ATOLL_OK) {
        nbd_next_part(nbd, slot, slot->done_bytes, message);
    } else {
        atoll_set32(nbd->domain->journal, &slot->part, slot->part + 1);
        nbd_finish_error(nbd, slot, status, 0, 0);
    }
}

static void take_sent(struct nbd *nbd, const struct atoll_descriptor *message)
{
    struct nbd_slot *slot = slot_in(nbd, message, NBD_SLOT_SENDING, 0);
    if (slot == 0)
        return;
    if (message->status != ATOLL_OK || connection_of(nbd, slot->identity)->negotiation.state == NBD_CONNECTION_CLOSING) {
        nbd_finish_empty(nbd, slot, slot->part + 1, 0);
    } else if (nbd_poisoned(nbd, slot->identity)) {
        atoll_set32(nbd->domain->journal, &slot->part, slot->part + 1);
        nbd_finish_error(nbd, slot, ATOLL_EPOISON, 0, 0);
    } else {
        nbd_next_part(nbd, slot, slot->done_bytes + slot->part_bytes, 0);
    }
}

static void forget_requests(struct nbd *nbd, struct nbd_connection *connection)
{
    struct atoll_journal *journal = nbd->domain->journal;
    while (connection->waiting_first != 0) {
        struct nbd_slot *slot = &nbd->area->slots[connection->waiting_first - 1];
        atoll_set32(journal, &slot->state, NBD_SLOT_FREE);
        atoll_set32(journal, &connection->waiting_first, slot->waiting_next);
        atoll_set32(journal, &nbd->area->waiting, nbd->area->waiting - 1);
    }
    atoll_set32(journal, &connection->waiting_last, 0);
    atoll_set32(journal, &connection->streaming, 0);
    atoll_set32(journal, &connection->in_flight, 0);
}

static void take_closed(struct nbd *nbd, const struct atoll_descriptor *message)
{
    struct nbd_connection *connection = connection_of(nbd, message->identity);
    uint32_t *volume = &nbd->area->public.volume[atoll_identity_connection(message->identity)];
    if (connection->in_flight != 0) { /* nic should have awaited them */
        peer_fault(nbd);
        forget_requests(nbd, connection);
    }
    nbd_set_state(nbd, connection, NBD_CONNECTION_FREE);
    if (*volume != 0)
        atoll_set32(nbd->domain->journal, volume, 0);
    atoll_count(nbd->domain, NBD_COUNTER_CLOSED, 1);
    nbd_end_message(nbd, message->identity, message->part, 0);
}

/* A frame for Python. Only what negotiation.py cannot see is checked here. */
static enum nbd_outcome take_frame(struct nbd *nbd, const struct atoll_descriptor *message)
{
    const struct nbd_connection *connection = connection_of(nbd, message->identity);
    uint32_t state = connection->negotiation.state, header_bytes = message->opcode == ATOLL_OP_OPTION ? message->halves[5] : 0;
    bool fits = true;
    if (message->opcode == ATOLL_OP_OPTION) {
        if (state == NBD_CONNECTION_CLOSING) {
            nbd_end_message(nbd, message->identity, message->part, 0);
            return NBD_OUTCOME_TAKEN;
        }
        fits = (state == NBD_CONNECTION_GREETED && header_bytes == 4) || (state == NBD_CONNECTION_OPTIONS && header_bytes == 16);
        fits = fits && (message->length == 0 || (message->segment_count == 0 &&
                                                 atoll_reference_in(nbd->domain, ATOLL_ROLE_NIC, message->address, message->length)));
    }
    if (!fits)
        peer_fault(nbd);
    bool poisoned = nbd_poisoned(nbd, message->identity);
    if (poisoned)
        nbd_count_error(nbd, ATOLL_EPOISON);
    if (!fits || poisoned) {
        struct nbd_slot *slot = slot_of(nbd, message->identity);
        if (slot->state == NBD_SLOT_LISTING)
            atoll_set32(nbd->domain->journal, &slot->state, NBD_SLOT_FREE);
        nbd_close(nbd, message->identity, message->part, 0);
        return NBD_OUTCOME_TAKEN;
    }
    nbd->frame = (struct nbd_frame){.connection = atoll_identity_connection(message->identity),
                                    .opcode = message->opcode,
                                    .header_bytes = header_bytes,
                                    .negotiation = connection->negotiation};
    if (message->opcode == ATOLL_OP_OPTION) {
        nbd->frame.data_bytes = message->length;
        nbd->frame.data = (const uint8_t *)(uintptr_t)message->address;
        memcpy(nbd->frame.header, message->bytes, sizeof nbd->frame.header);
    }
    return NBD_OUTCOME_FRAME;
}

enum nbd_outcome nbd_take_nic(struct nbd *nbd, const struct atoll_descriptor *message)
{
    if (atoll_identity_connection(message->identity) >= ATOLL_CONNECTION_COUNT ||
        atoll_identity_slot(message->identity) >= ATOLL_SLOT_COUNT) {
        peer_fault(nbd);
        return NBD_OUTCOME_TAKEN;
    }
    switch (message->opcode) {
    case ATOLL_OP_REQUEST: return take_request(nbd, message);
    case ATOLL_OP_PART: take_payload(nbd, message); break;
    case ATOLL_OP_SENT: {
        const struct nbd_slot *slot = slot_of(nbd, message->identity);
        if (slot->state == NBD_SLOT_LISTING && slot->identity == message->identity && (uint16_t)slot->part == message->part)
            return take_frame(nbd, message);
        take_sent(nbd, message);
        break;
    }
    case ATOLL_OP_CLOSED: take_closed(nbd, message); break;
    case ATOLL_OP_OPEN:
    case ATOLL_OP_OPTION: return take_frame(nbd, message);
    default: peer_fault(nbd); break;
    }
    return NBD_OUTCOME_TAKEN;
}

/* --- From dedup -------------------------------------------------------------------------------------------------- */

/* Copies the data of a READ's part, checked. Returns how many segments, 0 if they are not what a part may be. */
static uint32_t copy_data(struct nbd *nbd, const struct nbd_slot *slot, const struct atoll_descriptor *message,
                          struct atoll_segment *data)
{
    uint32_t count = atoll_copy_data(nbd->domain, message, slot->part_bytes, NBD_PART_SEGMENTS, data);
    for (uint32_t i = 0; i < count; i++)
        if (atoll_reference_role(nbd->domain, data[i].address, data[i].length) == 0)
            return 0;
    return count;
}

static void finish_read(struct nbd *nbd, struct nbd_slot *slot, const struct atoll_descriptor *message)
{
    struct atoll_segment data[NBD_PART_SEGMENTS];
    uint32_t count = copy_data(nbd, slot, message, data);
    if (count == 0) {
        peer_fault(nbd);
        nbd_finish_error(nbd, slot, ATOLL_EIO, message->words[0], 0);
        return;
    }
    int last = slot->done_bytes + slot->part_bytes == slot->work_bytes;
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY, .identity = slot->identity, .part = (uint16_t)slot->part};
    nbd_reply_read(slot, reply_of(nbd, slot->identity), data, count, last, &reply);
    reply.flags = last ? ATOLL_FLAG_LAST : 0;
    nbd_send_reply(nbd, slot, &reply);
}

static void finish_write_part(struct nbd *nbd, struct nbd_slot *slot)
{
    if (slot->done_bytes + slot->part_bytes == slot->work_bytes) {
        nbd_finish_success(nbd, slot);
        return;
    }
    struct atoll_descriptor next = {
        .opcode = ATOLL_OP_NEXT, .identity = slot->identity, .part = (uint16_t)slot->part, .flags = ATOLL_FLAG_TAKEN};
    nbd_put(nbd, ATOLL_ROLE_NIC, &next);
    atoll_set64(nbd->domain->journal, &slot->done_bytes, slot->done_bytes + slot->part_bytes);
    atoll_set32(nbd->domain->journal, &slot->state, NBD_SLOT_PAYLOAD);
}

static void finish_extents(struct nbd *nbd, struct nbd_slot *slot, const struct atoll_descriptor *message)
{
    struct atoll_extent extents[NBD_EXTENT_COUNT];
    uint32_t count = message->length / sizeof *extents;
    if (count > NBD_EXTENT_COUNT)
        count = NBD_EXTENT_COUNT;
    bool any = false;
    if (message->segment_count == 0 &&
        atoll_reference_in(nbd->domain, ATOLL_ROLE_DEDUP, message->address, count * sizeof *extents)) {
        memcpy(extents, (const void *)(uintptr_t)message->address, count * sizeof *extents);
        for (uint32_t i = 0; i < count; i++)
            any |= extents[i].length_bytes != 0;
    }
    if (!any) {
        peer_fault(nbd);
        nbd_finish_error(nbd, slot, ATOLL_EIO, message->words[0], 0);
        return;
    }
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY, .identity = slot->identity, .flags = ATOLL_FLAG_LAST};
    nbd_reply_extents(slot, reply_of(nbd, slot->identity), extents, count, &reply);
    nbd_send_reply(nbd, slot, &reply);
}

/* nic receives nothing more of the connection: its client has left, or the server stops. */
static bool is_ending(struct nbd *nbd, uint32_t connection)
{
    const struct atoll_nic_public *nic = atoll_nic_public(nbd->domain);
    return nic != 0 && atoll_load_acquire(&nic->ending[connection]) != 0;
}

/* A TRIM is a hint: who has sent one of many GiB and has left holds up nothing, neither the server's stop nor the volume's deletion. With FUA
 * it says that what was done is kept, which the last part alone sees to. */
static bool is_enough(struct nbd *nbd, const struct nbd_slot *slot)
{
    return slot->type == NBD_CMD_TRIM && !(slot->flags & NBD_CMD_FLAG_FUA) && is_ending(nbd, atoll_identity_connection(slot->identity));
}

void nbd_take_done(struct nbd *nbd, const struct atoll_descriptor *message)
{
    if (message->opcode != ATOLL_OP_DONE || atoll_identity_connection(message->identity) >= ATOLL_CONNECTION_COUNT ||
        atoll_identity_slot(message->identity) >= ATOLL_SLOT_COUNT) {
        peer_fault(nbd);
        return;
    }
    struct nbd_slot *slot = slot_in(nbd, message, NBD_SLOT_DEDUP, 0);
    if (slot == 0)
        return;
    uint32_t status = nbd_poisoned(nbd, slot->identity) ? ATOLL_EPOISON : message->status;
    if (status != ATOLL_OK) {
        finish_failed(nbd, slot, status, message->words[0], message->words[1]);
        return;
    }
    switch (slot->type) {
    case NBD_CMD_READ: finish_read(nbd, slot, message); break;
    case NBD_CMD_WRITE: finish_write_part(nbd, slot); break;
    case NBD_CMD_BLOCK_STATUS: finish_extents(nbd, slot, message); break;
    default:
        if (nbd_has_parts(slot->type) && slot->done_bytes + slot->part_bytes < slot->work_bytes && !is_enough(nbd, slot))
            nbd_next_part(nbd, slot, slot->done_bytes + slot->part_bytes, 0);
        else
            nbd_finish_success(nbd, slot);
    }
}
