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
 * Chunks of several replies may be mixed in the stream, simple replies may not: while a READ of several parts is being sent
 * on a connection with simple replies (`streaming`), other replies of that connection are WAITING in a list.
 *
 * After a crash: all of this happens within a step's transaction; there is nothing to repair.
 */
#include "services/nbd/transmission.h"

void nbd_put(struct nbd *nbd, uint32_t role, const struct atoll_descriptor *message)
{
    bool there_was_room = atoll_domain_put(nbd->domain, role, message);
    assert(there_was_room); /* nbd_step takes no message whose consequences have no place */
}

static struct nbd_connection *connection_of(struct nbd *nbd, uint64_t identity)
{
    return &nbd->area->connections[atoll_identity_connection(identity)];
}

static struct nbd_slot *slot_of(struct nbd *nbd, uint64_t identity) { return &nbd->area->slots[atoll_identity_slot(identity)]; }

static struct nbd_reply *reply_of(struct nbd *nbd, uint64_t identity) { return &nbd->area->replies[atoll_identity_slot(identity)]; }

static void peer_fault(struct nbd *nbd) { atoll_count(nbd->domain, NBD_COUNTER_PEER_FAULTS, 1); }

static void set_state(struct nbd *nbd, struct nbd_connection *connection, uint32_t state)
{
    if (connection->negotiation.state != state)
        atoll_set32(nbd->domain->journal, &connection->negotiation.state, state);
}

/* A reply without bytes to a message that has no slot's state; sent at once. */
static void reply_empty(struct nbd *nbd, uint64_t identity, uint32_t part, uint32_t flags)
{
    struct atoll_descriptor reply = {
        .opcode = ATOLL_OP_REPLY, .identity = identity, .part = (uint16_t)part, .flags = (uint8_t)(ATOLL_FLAG_LAST | flags)};
    nbd_put(nbd, ATOLL_ROLE_NIC, &reply);
}

static void close_connection(struct nbd *nbd, uint64_t identity, uint32_t part, uint32_t flags)
{
    set_state(nbd, connection_of(nbd, identity), NBD_CONNECTION_CLOSING);
    reply_empty(nbd, identity, part, ATOLL_FLAG_CLOSE | flags);
}

static void count_error(struct nbd *nbd, uint32_t status)
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

static uint64_t unit_of(uint32_t type)
{
    return type == NBD_CMD_TRIM || type == NBD_CMD_WRITE_ZEROES ? ATOLL_RANGE_PART_BYTES : ATOLL_PART_BYTES;
}

static bool has_parts(uint32_t type) { return type != NBD_CMD_FLUSH && type != NBD_CMD_BLOCK_STATUS; }

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
        close_connection(nbd, connection->disc_identity, 0, 0);
}

static bool uses_chunks(const struct nbd_slot *slot)
{
    return (slot->features & (NBD_FEATURE_STRUCTURED | NBD_FEATURE_EXTENDED)) != 0;
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
        if (!uses_chunks(slot) && connection->streaming != place)
            atoll_set32(journal, &connection->streaming, place);
    }
}

static void wait_for_turn(struct nbd *nbd, struct nbd_slot *slot, const struct atoll_descriptor *reply)
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
static void send_reply(struct nbd *nbd, struct nbd_slot *slot, const struct atoll_descriptor *reply)
{
    struct nbd_connection *connection = connection_of(nbd, slot->identity);
    if (connection->streaming != 0 && connection->streaming != atoll_identity_slot(slot->identity) + 1) {
        wait_for_turn(nbd, slot, reply);
        return;
    }
    send_now(nbd, slot, reply);
    send_waiting(nbd, connection);
}

/* Ends a slot without another byte; `flags` beside LAST. */
static void finish_empty(struct nbd *nbd, struct nbd_slot *slot, uint32_t part, uint32_t flags)
{
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY,
                                     .identity = slot->identity,
                                     .part = (uint16_t)part,
                                     .flags = (uint8_t)(ATOLL_FLAG_LAST | flags)};
    send_now(nbd, slot, &reply);
    send_waiting(nbd, connection_of(nbd, slot->identity));
}

static void finish_success(struct nbd *nbd, struct nbd_slot *slot)
{
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY, .identity = slot->identity, .part = (uint16_t)slot->part};
    nbd_reply_success(slot, reply_of(nbd, slot->identity), &reply);
    reply.flags = ATOLL_FLAG_LAST | (slot->type == NBD_CMD_WRITE ? ATOLL_FLAG_TAKEN : 0);
    send_reply(nbd, slot, &reply);
}

/* `taken`: dedup has the payload of the current part. */
static void finish_error(struct nbd *nbd, struct nbd_slot *slot, uint32_t status, uint64_t place, int taken)
{
    uint32_t flags = slot->type == NBD_CMD_WRITE ? ATOLL_FLAG_DISCARD | (taken ? ATOLL_FLAG_TAKEN : 0) : 0;
    count_error(nbd, status);
    if (slot->type == NBD_CMD_READ && slot->part != 0 && !uses_chunks(slot)) {
        /* A simple reply has said "no error" already: only closing is left (section "NBD_CMD_READ", simple replies). */
        set_state(nbd, connection_of(nbd, slot->identity), NBD_CONNECTION_CLOSING);
        finish_empty(nbd, slot, slot->part, ATOLL_FLAG_CLOSE);
        return;
    }
    char text[NBD_TEXT_BYTES];
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY, .identity = slot->identity, .part = (uint16_t)slot->part};
    nbd_explain(slot, status, place, nbd_volume_name(nbd, slot->volume, slot->generation), text);
    nbd_reply_error(slot, reply_of(nbd, slot->identity), status, text,
                    has_parts(slot->type) && (nbd_code(status) == NBD_EIO || nbd_code(status) == NBD_ENOSPC),
                    slot->offset + slot->done_bytes, &reply);
    reply.flags = (uint8_t)(ATOLL_FLAG_LAST | flags);
    send_reply(nbd, slot, &reply);
}

/* Asks dedup for the current part. `payload`: the message that brought it, for WRITE. */
static void send_part(struct nbd *nbd, const struct nbd_slot *slot, const struct atoll_descriptor *payload)
{
    static const uint8_t OPCODES[] = {[NBD_CMD_READ] = ATOLL_OP_READ,         [NBD_CMD_WRITE] = ATOLL_OP_WRITE,
                                      [NBD_CMD_FLUSH] = ATOLL_OP_FLUSH,       [NBD_CMD_TRIM] = ATOLL_OP_TRIM,
                                      [NBD_CMD_CACHE] = ATOLL_OP_CACHE,       [NBD_CMD_WRITE_ZEROES] = ATOLL_OP_ZERO,
                                      [NBD_CMD_BLOCK_STATUS] = ATOLL_OP_EXTENTS};
    struct atoll_descriptor message = {.opcode = OPCODES[slot->type], .identity = slot->identity, .part = (uint16_t)slot->part};
    message.flags = (uint8_t)((slot->flags & NBD_CMD_FLAG_FUA ? ATOLL_FLAG_FUA : 0) |
                              (slot->flags & NBD_CMD_FLAG_NO_HOLE ? ATOLL_FLAG_NO_HOLE : 0) |
                              (slot->flags & NBD_CMD_FLAG_FAST_ZERO ? ATOLL_FLAG_FAST : 0) |
                              (slot->flags & NBD_CMD_FLAG_REQ_ONE ? ATOLL_FLAG_ONE : 0));
    message.words[0] = slot->offset + slot->done_bytes;
    message.words[1] = has_parts(slot->type) ? slot->part_bytes : slot->length;
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
static void next_part(struct nbd *nbd, struct nbd_slot *slot, uint64_t done_bytes, const struct atoll_descriptor *payload)
{
    struct atoll_journal *journal = nbd->domain->journal;
    atoll_set32(journal, &slot->part, slot->part + 1);
    if (slot->done_bytes != done_bytes)
        atoll_set64(journal, &slot->done_bytes, done_bytes);
    atoll_set32(journal, &slot->part_bytes,
                (uint32_t)nbd_part_bytes(slot->offset, slot->work_bytes, done_bytes, slot->part, unit_of(slot->type)));
    if (slot->state != NBD_SLOT_DEDUP)
        atoll_set32(journal, &slot->state, NBD_SLOT_DEDUP);
    send_part(nbd, slot, payload);
}

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
    count_error(nbd, status);
    nbd_reply_error(slot, reply_of(nbd, slot->identity), status, text, 0, 0, &reply);
    reply.flags = (uint8_t)(ATOLL_FLAG_LAST | (has_payload ? ATOLL_FLAG_DISCARD : 0));
    if (has_payload && (slot->features & NBD_FEATURE_EXTENDED) && slot->length > ATOLL_REQUEST_BYTES) {
        /* Section "Request message" of the extension: such a payload is not waited for. */
        reply.flags |= ATOLL_FLAG_CLOSE;
        set_state(nbd, connection, NBD_CONNECTION_CLOSING);
    }
    if (connection->streaming != 0)
        wait_for_turn(nbd, slot, &reply);
    else
        nbd_put(nbd, ATOLL_ROLE_NIC, &reply);
}

static void take_disc(struct nbd *nbd, const struct atoll_descriptor *message)
{
    struct nbd_connection *connection = connection_of(nbd, message->identity);
    if (connection->in_flight == 0) {
        close_connection(nbd, message->identity, message->part, 0);
        return;
    }
    atoll_set64(nbd->domain->journal, &connection->disc_identity, message->identity);
    set_state(nbd, connection, NBD_CONNECTION_DRAINING);
}

static enum nbd_outcome take_request(struct nbd *nbd, const struct atoll_descriptor *message)
{
    struct atoll_journal *journal = nbd->domain->journal;
    struct nbd_connection *connection = connection_of(nbd, message->identity);
    struct nbd_slot *slot = slot_of(nbd, message->identity);
    struct nbd_request request;
    uint32_t features = connection->negotiation.features;

    if (connection->negotiation.state == NBD_CONNECTION_DRAINING || connection->negotiation.state == NBD_CONNECTION_CLOSING) {
        reply_empty(nbd, message->identity, message->part, ATOLL_FLAG_DISCARD); /* nothing may follow a DISC */
        return NBD_OUTCOME_TAKEN;
    }
    if (connection->negotiation.state != NBD_CONNECTION_TRANSMISSION) {
        peer_fault(nbd);
        close_connection(nbd, message->identity, message->part, ATOLL_FLAG_DISCARD);
        return NBD_OUTCOME_TAKEN;
    }
    if (nbd_parse(message->bytes, features, &request) != 0) {
        atoll_count(nbd->domain, NBD_COUNTER_BAD_MAGIC, 1);
        close_connection(nbd, message->identity, message->part, ATOLL_FLAG_DISCARD);
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
        close_connection(nbd, message->identity, message->part, ATOLL_FLAG_DISCARD);
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
        nbd_explain(slot, status, 0, "", text);
    } else if (nbd_poisoned(nbd, message->identity)) {
        status = ATOLL_EPOISON;
        nbd_explain(slot, status, 0, nbd_volume_name(nbd, slot->volume, slot->generation), text);
    } else {
        status = (uint32_t)nbd_validate(&request, features, volume->size_bytes, (volume->flags & ATOLL_VOLUME_READONLY) != 0,
                                        nbd_volume_name(nbd, slot->volume, slot->generation), text);
    }
    if (status == ATOLL_OK && request.type == NBD_CMD_DISC) { /* with a payload, which it may not have */
        close_connection(nbd, message->identity, message->part, ATOLL_FLAG_DISCARD);
        return NBD_OUTCOME_TAKEN;
    }
    if (status != ATOLL_OK) {
        refuse(nbd, slot, (int)request.has_payload, status, text);
        return NBD_OUTCOME_TAKEN;
    }

    if (request.type == NBD_CMD_CACHE && slot->work_bytes > NBD_CACHE_BYTES)
        slot->work_bytes = NBD_CACHE_BYTES;
    if (has_parts(request.type))
        slot->part_bytes = (uint32_t)nbd_part_bytes(slot->offset, slot->work_bytes, 0, 0, unit_of(request.type));
    if (request.type == NBD_CMD_WRITE && !payload_fits(nbd, message, slot->part_bytes)) {
        peer_fault(nbd);
        nbd_explain(slot, ATOLL_EIO, 0, nbd_volume_name(nbd, slot->volume, slot->generation), text);
        refuse(nbd, slot, 1, ATOLL_EIO, text);
        return NBD_OUTCOME_TAKEN;
    }
    if (request.type == NBD_CMD_READ)
        atoll_count(nbd->domain, NBD_COUNTER_READ_BYTES, request.length);
    if (request.type == NBD_CMD_WRITE)
        atoll_count(nbd->domain, NBD_COUNTER_WRITE_BYTES, request.length);
    atoll_set32(journal, &slot->state, NBD_SLOT_DEDUP);
    atoll_set32(journal, &connection->in_flight, connection->in_flight + 1);
    atoll_set64(journal, &connection->requests, connection->requests + 1);
    send_part(nbd, slot, request.type == NBD_CMD_WRITE ? message : 0);
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
        finish_empty(nbd, slot, slot->part + 1, ATOLL_FLAG_DISCARD);
        return;
    }
    uint64_t expected = nbd_part_bytes(slot->offset, slot->work_bytes, slot->done_bytes, slot->part + 1ull, ATOLL_PART_BYTES);
    uint32_t status = nbd_poisoned(nbd, slot->identity) ? ATOLL_EPOISON : ATOLL_OK;
    if (status == ATOLL_OK && !payload_fits(nbd, message, expected)) {
        peer_fault(nbd);
        status = ATOLL_EIO;
    }
    if (status == ATOLL_OK) {
        next_part(nbd, slot, slot->done_bytes, message);
    } else {
        atoll_set32(nbd->domain->journal, &slot->part, slot->part + 1);
        finish_error(nbd, slot, status, 0, 0);
    }
}

static void take_sent(struct nbd *nbd, const struct atoll_descriptor *message)
{
    struct nbd_slot *slot = slot_in(nbd, message, NBD_SLOT_SENDING, 0);
    if (slot == 0)
        return;
    if (message->status != ATOLL_OK || connection_of(nbd, slot->identity)->negotiation.state == NBD_CONNECTION_CLOSING) {
        finish_empty(nbd, slot, slot->part + 1, 0);
    } else if (nbd_poisoned(nbd, slot->identity)) {
        atoll_set32(nbd->domain->journal, &slot->part, slot->part + 1);
        finish_error(nbd, slot, ATOLL_EPOISON, 0, 0);
    } else {
        next_part(nbd, slot, slot->done_bytes + slot->part_bytes, 0);
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
    set_state(nbd, connection, NBD_CONNECTION_FREE);
    if (*volume != 0)
        atoll_set32(nbd->domain->journal, volume, 0);
    atoll_count(nbd->domain, NBD_COUNTER_CLOSED, 1);
    reply_empty(nbd, message->identity, message->part, 0);
}

/* A frame for Python. Only what negotiation.py cannot see is checked here. */
static enum nbd_outcome take_frame(struct nbd *nbd, const struct atoll_descriptor *message)
{
    const struct nbd_connection *connection = connection_of(nbd, message->identity);
    uint32_t state = connection->negotiation.state, header_bytes = message->opcode == ATOLL_OP_OPTION ? message->halves[5] : 0;
    bool fits = true;
    if (message->opcode == ATOLL_OP_OPTION) {
        if (state == NBD_CONNECTION_CLOSING) {
            reply_empty(nbd, message->identity, message->part, 0);
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
        count_error(nbd, ATOLL_EPOISON);
    if (!fits || poisoned) {
        struct nbd_slot *slot = slot_of(nbd, message->identity);
        if (slot->state == NBD_SLOT_LISTING)
            atoll_set32(nbd->domain->journal, &slot->state, NBD_SLOT_FREE);
        close_connection(nbd, message->identity, message->part, 0);
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
    uint32_t count = message->segment_count;
    uint64_t total = 0;
    if (count == 0) {
        data[0] = (struct atoll_segment){.address = message->address, .length = message->length, .kind = ATOLL_SEGMENT_DATA};
        count = 1;
    } else {
        if (count > NBD_PART_SEGMENTS ||
            !atoll_reference_in(nbd->domain, ATOLL_ROLE_DEDUP, message->address, count * sizeof *data))
            return 0;
        memcpy(data, (const void *)(uintptr_t)message->address, count * sizeof *data);
    }
    for (uint32_t i = 0; i < count; i++) {
        if (data[i].length == 0 || data[i].kind > ATOLL_SEGMENT_HOLE ||
            atoll_reference_role(nbd->domain, data[i].address, data[i].length) == 0)
            return 0;
        total += data[i].length;
    }
    return total == slot->part_bytes ? count : 0;
}

static void finish_read(struct nbd *nbd, struct nbd_slot *slot, const struct atoll_descriptor *message)
{
    struct atoll_segment data[NBD_PART_SEGMENTS];
    uint32_t count = copy_data(nbd, slot, message, data);
    if (count == 0) {
        peer_fault(nbd);
        finish_error(nbd, slot, ATOLL_EIO, message->words[0], 0);
        return;
    }
    int last = slot->done_bytes + slot->part_bytes == slot->work_bytes;
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY, .identity = slot->identity, .part = (uint16_t)slot->part};
    nbd_reply_read(slot, reply_of(nbd, slot->identity), data, count, last, &reply);
    reply.flags = last ? ATOLL_FLAG_LAST : 0;
    send_reply(nbd, slot, &reply);
}

static void finish_write_part(struct nbd *nbd, struct nbd_slot *slot)
{
    if (slot->done_bytes + slot->part_bytes == slot->work_bytes) {
        finish_success(nbd, slot);
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
        finish_error(nbd, slot, ATOLL_EIO, message->words[0], 0);
        return;
    }
    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY, .identity = slot->identity, .flags = ATOLL_FLAG_LAST};
    nbd_reply_extents(slot, reply_of(nbd, slot->identity), extents, count, &reply);
    send_reply(nbd, slot, &reply);
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
        finish_error(nbd, slot, status, message->words[0], 1);
        return;
    }
    switch (slot->type) {
    case NBD_CMD_READ: finish_read(nbd, slot, message); break;
    case NBD_CMD_WRITE: finish_write_part(nbd, slot); break;
    case NBD_CMD_BLOCK_STATUS: finish_extents(nbd, slot, message); break;
    default:
        if (has_parts(slot->type) && slot->done_bytes + slot->part_bytes < slot->work_bytes)
            next_part(nbd, slot, slot->done_bytes + slot->part_bytes, 0);
        else
            finish_success(nbd, slot);
    }
}
