/*
 * Receiving: headers are parsed in a window of unparsed bytes, payloads land in their pages.
 *
 * The window lies in a stream buffer, attached while there is something to receive or to parse, or in the connection's own
 * small buffer (what is left of a header while nothing comes; and when all stream buffers are in use, so that slow
 * clients hold up nobody). Payload bytes that came together with their header are copied into the pages (counted); the
 * rest is received straight into them. A part's payload gets all its pages at once or waits for them, first come first
 * served: who holds pages never waits for more of them, so there is always progress. (But for the data of a long option, which want
 * a run: they go last while there is none.) The data of a short one, as clients send them, have a place of their connection's: who
 * connects while a device that is full or slow keeps all pages can negotiate, and read.
 *
 * After a crash: window, state and what each part has received are in the arena. A receive that was intended has its outcome in
 * the completion queue or did not happen; the plan of where its bytes landed follows from the state, which does not
 * change while it is pending.
 */
#include "drivers/nic/nic.h"

#include <errno.h>

#include "drivers/nic/engine.h"

/* --- The window -------------------------------------------------------------------------------------------------- */

#define OWN_HALF (NIC_OWN_BYTES / 2)

static uint8_t *buffer_of(struct nic *nic, uint32_t connection, uint32_t buffer)
{
    if (buffer < 2)
        return nic->area->own + (uint64_t)connection * NIC_OWN_BYTES + buffer * OWN_HALF;
    return nic->streams + (uint64_t)(buffer - 2) * NIC_STREAM_BYTES;
}

void nic_window_set(struct nic *nic, struct nic_connection *connection, struct nic_window window)
{
    uint64_t word = nic_window_make(window);
    if (connection->window != word)
        atoll_set64(nic->journal, &connection->window, word);
}

static void free_stream(struct nic *nic, uint32_t buffer)
{
    if (buffer >= 2)
        nic->freed_streams[nic->freed_stream_count++] = (uint16_t)(buffer - 2);
}

void nic_window_release(struct nic *nic, struct nic_connection *connection)
{
    free_stream(nic, nic_window_of(connection->window).buffer);
    nic_window_set(nic, connection, (struct nic_window){0, 0, 0});
}

/* Moves what is left (a partial header) to another buffer, which no committed word refers to. */
static void move_window(struct nic *nic, struct nic_connection *connection, uint32_t buffer)
{
    uint32_t index = nic_index(nic, connection);
    struct nic_window window = nic_window_of(connection->window);
    uint32_t left = window.end - window.begin;
    assert(buffer != window.buffer && left <= OWN_HALF);
    memcpy(buffer_of(nic, index, buffer), buffer_of(nic, index, window.buffer) + window.begin, left);
    free_stream(nic, window.buffer);
    nic_window_set(nic, connection, (struct nic_window){buffer, 0, left});
}

/* Room for at least a header's rest behind the window. The window holds less than a header. */
static void make_room(struct nic *nic, struct nic_connection *connection)
{
    struct nic_window window = nic_window_of(connection->window);
    uint32_t left = window.end - window.begin;
    if (window.buffer >= 2) {
        if (left == 0)
            nic_window_set(nic, connection, (struct nic_window){window.buffer, 0, 0});
        else if (NIC_STREAM_BYTES - window.end < NIC_STREAM_BYTES / 8)
            move_window(nic, connection, nic->free_stream_count > 0 ? 2u + nic->free_streams[--nic->free_stream_count] : 0);
        return;
    }
    if (nic->free_stream_count > 0) {
        move_window(nic, connection, 2u + nic->free_streams[--nic->free_stream_count]);
    } else if (left == 0) {
        nic_window_set(nic, connection, (struct nic_window){window.buffer, 0, 0});
    } else if (window.begin != 0) {
        move_window(nic, connection, window.buffer ^ 1);
    }
}

static uint32_t room_behind(struct nic_window window)
{
    return (window.buffer < 2 ? OWN_HALF : NIC_STREAM_BYTES) - window.end;
}

/* Nothing to receive for the time being: a stream buffer that holds (almost) nothing goes back. */
static void rest(struct nic *nic, struct nic_connection *connection)
{
    struct nic_window window = nic_window_of(connection->window);
    if (window.buffer < 2 || window.end - window.begin > 32)
        return;
    if (window.end == window.begin)
        nic_window_release(nic, connection);
    else
        move_window(nic, connection, 0); /* the own buffer was unused at the last commit: the window was in a stream buffer */
}

/* --- Parts ------------------------------------------------------------------------------------------------------- */

static uint32_t part_bytes(const struct nic_slot *slot)
{
    uint32_t left = slot->payload_bytes - slot->part_begin;
    uint32_t most = ATOLL_PART_BYTES;
    if (slot->part == 0)
        most -= (uint32_t)(slot->volume_offset % ATOLL_BLOCK_BYTES);
    return left < most ? left : most;
}

void nic_deliver(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, const struct atoll_descriptor *failure)
{
    struct atoll_descriptor message = failure == 0 ? (struct atoll_descriptor){0} : *failure;
    message.identity = nic_identity(nic, slot);
    uint32_t bank = slot->part % NIC_PART_LISTS;
    uint32_t flags = slot->flags & ~(uint32_t)(NIC_SLOT_WANTED | NIC_SLOT_COMPLETE);
    if (slot->segments[bank] != 0) {
        struct atoll_segment *segments = nic_segments(nic, slot, slot->part);
        nic_pages_change(nic, slot, slot->part, NIC_PAGE_LEND);
        message.length = slot->part_bytes[bank];
        if (slot->segments[bank] == 1) {
            message.address = segments[0].address;
        } else {
            message.address = (uint64_t)(uintptr_t)segments;
            message.segment_count = (uint16_t)slot->segments[bank];
        }
        flags |= NIC_SLOT_LENT;
        nic_set32(nic, &slot->lent_part, slot->part);
    }
    message.part = (uint16_t)slot->part;
    if (!(slot->flags & NIC_SLOT_DELIVERED)) {
        message.opcode = slot->state == NIC_SLOT_OPTION ? ATOLL_OP_OPTION : ATOLL_OP_REQUEST;
        memcpy(message.bytes, slot->header, sizeof message.bytes);
        if (slot->state == NIC_SLOT_OPTION)
            message.halves[5] = nic_frame_header_bytes(connection->framing);
        connection->requests++;
        atoll_count(nic->domain, NIC_REQUESTS, 1);
        flags |= NIC_SLOT_DELIVERED;
    } else {
        message.opcode = ATOLL_OP_PART;
    }
    nic_set32(nic, &slot->flags, flags);
    nic_put(nic, ATOLL_ROLE_NBD, &message);
}

/* To whom it is for. `alone`: nothing else of the client's has been received yet. False: later. */
static bool deliver(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, bool alone)
{
    if (!(slot->flags & NIC_SLOT_DELIVERED) && slot->state == NIC_SLOT_REQUEST) {
        if (nic_answer(nic, connection, slot))
            return true;
        enum nic_posting posting = nic_post(nic, connection, slot, alone);
        if (posting != NIC_POST_NEVER)
            return posting == NIC_POST_DONE;
    }
    nic_deliver(nic, connection, slot, 0);
    return true;
}

static void put_aborted_part(struct nic *nic, struct nic_slot *slot)
{
    struct atoll_descriptor message = {
        .opcode = ATOLL_OP_PART, .identity = nic_identity(nic, slot), .part = (uint16_t)slot->part, .status = ATOLL_EIO};
    nic_put(nic, ATOLL_ROLE_NBD, &message);
}

static void leave_page_queue(struct nic *nic, uint32_t connection)
{
    struct nic_queue *waiters = &nic->page_waiters;
    if (!waiters->member[connection])
        return;
    if (nic_queue_first(waiters) == connection) {
        nic_queue_take(waiters);
    } else { /* rare: turns the queue round once without it */
        for (uint32_t count = nic_queue_count(waiters); count > 0; count--) {
            uint32_t first = nic_queue_take(waiters);
            if (first != connection)
                nic_queue_add(waiters, first);
        }
    }
    if (!nic_queue_empty(waiters))
        nic_schedule(nic, nic_queue_first(waiters));
}

/* The data of a long option, which lie in one run. */
static bool waits_for_run(const struct nic *nic, uint32_t connection)
{
    uint32_t slot = nic->area->connections[connection].receive_slot;
    return slot != 0 && nic->area->slots[slot - 1].state == NIC_SLOT_OPTION;
}

/* There are pages, but no run of them: whoever takes any goes first, or a client that negotiates would hold up all. */
static void let_others_go_first(struct nic *nic)
{
    struct nic_queue *waiters = &nic->page_waiters;
    for (uint32_t count = nic_queue_count(waiters); count > 0 && waits_for_run(nic, nic_queue_first(waiters)); count--)
        nic_queue_add(waiters, nic_queue_take(waiters));
    if (!waits_for_run(nic, nic_queue_first(waiters)))
        nic_schedule(nic, nic_queue_first(waiters));
}

/* A place for the slot's part, pages but for a short option; false: it waits. */
static bool take_pages(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot)
{
    uint32_t index = nic_index(nic, connection);
    struct nic_queue *waiters = &nic->page_waiters;
    uint32_t bytes = part_bytes(slot), bank = slot->part % NIC_PART_LISTS;
    uint32_t in_page = slot->part == 0 ? (uint32_t)(slot->volume_offset % ATOLL_BLOCK_BYTES) : 0;
    uint32_t pages = (in_page + bytes + ATOLL_BLOCK_BYTES - 1) / ATOLL_BLOCK_BYTES;
    struct atoll_segment *segments = nic_segments(nic, slot, slot->part);

    if (nic_is_short_option(slot)) {
        uint64_t address = (uint64_t)(uintptr_t)nic->area->options + (uint64_t)index * NIC_SHORT_OPTION_BYTES;
        segments[0] = (struct atoll_segment){.address = address, .length = bytes};
        nic_set32(nic, &slot->segments[bank], 1);
        nic_set32(nic, &slot->part_bytes[bank], bytes);
        return true;
    }
    uint32_t count = 0;
    bool run = slot->state == NIC_SLOT_OPTION;
    if (nic_queue_empty(waiters) || nic_queue_first(waiters) == index || (!run && waits_for_run(nic, nic_queue_first(waiters))))
        count = nic_pages_take(nic, pages, run, segments);
    if (count == 0) {
        if (!waiters->member[index])
            atoll_count(nic->domain, NIC_PAGE_WAITS, 1);
        nic_queue_add(waiters, index);
        nic_deadline(nic, nic->now_ns + NIC_CROWDED_AFTER_NS);
        if (run && nic_queue_first(waiters) == index && nic_pages_available(nic) >= pages)
            let_others_go_first(nic);
        return false;
    }
    if (run && waiters->member[index]) { /* nor is this wait the client's */
        nic_handshake_goes_on(nic, connection);
        connection->received_ns = nic->now_ns;
    }
    leave_page_queue(nic, index);
    segments[0].address += in_page;
    segments[0].length -= in_page;
    segments[count - 1].length -= pages * ATOLL_BLOCK_BYTES - in_page - bytes;
    nic_set32(nic, &slot->segments[bank], count);
    nic_set32(nic, &slot->part_bytes[bank], bytes);
    connection->part_ns = nic->now_ns;
    nic_deadline(nic, nic->now_ns + nic->limits.payload_ns);
    return true;
}

/* `count` more bytes of the current part are in its pages. */
static void part_received(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, uint32_t count)
{
    nic_set32(nic, &slot->payload_received, slot->payload_received + count);
    uint32_t bytes = slot->part_bytes[slot->part % NIC_PART_LISTS];
    assert(slot->payload_received - slot->part_begin <= bytes);
    if (slot->payload_received - slot->part_begin < bytes)
        return;
    nic_set32(nic, &slot->flags, slot->flags | NIC_SLOT_COMPLETE);
    nic_set32(nic, &connection->receive_state, NIC_RX_PART);
}

/* State PART: hands the complete part on if it is wanted, then goes on behind it. False: nbd, or what was posted, must come first. */
static bool part_done(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, bool alone)
{
    if (!(slot->flags & NIC_SLOT_WANTED) || !deliver(nic, connection, slot, alone))
        return false;
    if (slot->payload_received < slot->payload_bytes) {
        nic_set32(nic, &slot->part_begin, slot->payload_received);
        nic_set32(nic, &slot->part, slot->part + 1);
        nic_set32(nic, &connection->receive_state, NIC_RX_PAGES);
    } else if (slot->state == NIC_SLOT_OPTION) {
        nic_set32(nic, &connection->receive_state, NIC_RX_HOLD);
    } else {
        nic_set32(nic, &connection->receive_slot, 0);
        nic_set32(nic, &connection->receive_state, NIC_RX_HEADER);
    }
    return true;
}

/* Frees the pages of the part being received, if nbd does not have them. */
static void drop_part(struct nic *nic, struct nic_slot *slot)
{
    uint32_t bank = slot->part % NIC_PART_LISTS;
    if (slot->segments[bank] == 0 || ((slot->flags & NIC_SLOT_LENT) && slot->lent_part == slot->part))
        return;
    nic_pages_change(nic, slot, slot->part, NIC_PAGE_FREE);
    nic_set32(nic, &slot->segments[bank], 0);
}

static bool slot_is_received(const struct nic *nic, const struct nic_connection *connection, const struct nic_slot *slot)
{
    return connection->receive_slot == (uint32_t)(slot - nic->area->slots) + 1;
}

void nic_receive_next(struct nic *nic, struct nic_slot *slot)
{
    struct nic_connection *connection = &nic->area->connections[slot->connection];
    if (slot->flags & NIC_SLOT_ABORTED) {
        put_aborted_part(nic, slot);
        return;
    }
    nic_set32(nic, &slot->flags, slot->flags | NIC_SLOT_WANTED);
    if (slot_is_received(nic, connection, slot))
        nic_schedule(nic, slot->connection);
}

bool nic_receive_discard(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot)
{
    nic_set32(nic, &slot->flags, (slot->flags | NIC_SLOT_ABORTED) & ~(uint32_t)(NIC_SLOT_WANTED | NIC_SLOT_COMPLETE));
    if (!slot_is_received(nic, connection, slot))
        return false;
    nic_schedule(nic, slot->connection);
    nic_set32(nic, &connection->receive_slot, 0);
    uint64_t left = slot->payload_bytes - slot->payload_received;
    switch (connection->receive_state) {
    case NIC_RX_PAGES:
        leave_page_queue(nic, slot->connection);
        break;
    case NIC_RX_PAYLOAD:
    case NIC_RX_PART:
        drop_part(nic, slot);
        break;
    case NIC_RX_HOLD: /* discard_bytes was set with the frame */
        left = connection->discard_bytes;
        break;
    default:
        return false;
    }
    if (left != connection->discard_bytes)
        atoll_set64(nic->journal, &connection->discard_bytes, left);
    nic_set32(nic, &connection->receive_state, left != 0 ? NIC_RX_DISCARD : NIC_RX_HEADER);
    return left != 0;
}

/* The reply that waited for the end of its request's payload can go, or will never go. */
static void release_held(struct nic *nic, struct nic_connection *connection)
{
    if (connection->held_slot == 0)
        return;
    struct nic_slot *slot = &nic->area->slots[connection->held_slot - 1];
    nic_set32(nic, &connection->held_slot, 0);
    if (connection->phase == NIC_OPEN || connection->phase == NIC_ENDING)
        nic_send_queue(nic, connection, slot);
    else
        nic_reply_done(nic, connection, slot); /* swallowed */
}

void nic_receive_abort(struct nic *nic, struct nic_connection *connection)
{
    release_held(nic, connection);
    if (connection->receive_state == NIC_RX_END)
        return;
    if (connection->receive_slot != 0 && connection->receive_state != NIC_RX_HOLD) {
        struct nic_slot *slot = &nic->area->slots[connection->receive_slot - 1];
        leave_page_queue(nic, slot->connection);
        drop_part(nic, slot);
        if (!(slot->flags & NIC_SLOT_DELIVERED)) {
            nic_slot_free(nic, slot);
        } else {
            if (slot->flags & NIC_SLOT_WANTED)
                put_aborted_part(nic, slot);
            nic_set32(nic, &slot->flags, (slot->flags | NIC_SLOT_ABORTED) & ~(uint32_t)(NIC_SLOT_WANTED | NIC_SLOT_COMPLETE));
        }
    }
    nic_set32(nic, &connection->receive_slot, 0);
    nic_set32(nic, &connection->receive_state, NIC_RX_END);
    nic_window_release(nic, connection);
}

/* --- Parsing ----------------------------------------------------------------------------------------------------- */

/* Copies from the window into the part's pages. */
static void copy_payload(struct nic *nic, struct nic_slot *slot, const uint8_t *from, uint32_t count)
{
    const struct atoll_segment *segment = nic_segments(nic, slot, slot->part);
    uint32_t skip = slot->payload_received - slot->part_begin;
    atoll_count(nic->domain, NIC_COPIED_INSIDE_BYTES, count);
    for (; count > 0; segment++) {
        if (skip >= segment->length) {
            skip -= segment->length;
            continue;
        }
        uint32_t length = segment->length - skip;
        if (length > count)
            length = count;
        memcpy((void *)(uintptr_t)(segment->address + skip), from, length);
        from += length;
        count -= length;
        skip = 0;
    }
}

enum parsed { PARSED_ON, PARSED_MORE, PARSED_BLOCKED };

/* State HEADER. */
static enum parsed parse_header(struct nic *nic, struct nic_connection *connection, const uint8_t *base, struct nic_window *window)
{
    uint32_t needed = nic_frame_header_bytes(connection->framing);
    assert(needed != 0);
    if (window->end - window->begin < needed)
        return PARSED_MORE;
    if (connection->outstanding - nic->hints[nic_index(nic, connection)].posted >= nic->limits.requests_per_connection)
        return PARSED_BLOCKED; /* looked at again when a slot of it is freed */
    if (nic->message_budget == 0) {
        nic_schedule(nic, nic_index(nic, connection));
        return PARSED_BLOCKED;
    }
    struct nic_frame frame;
    nic_frame_read(connection->framing, base + window->begin, &frame);
    uint32_t pages = frame.reply_bytes == 0 ? 0 :
        (uint32_t)((frame.volume_offset % ATOLL_BLOCK_BYTES + frame.reply_bytes + ATOLL_BLOCK_BYTES - 1) / ATOLL_BLOCK_BYTES);
    if (frame.farewell && nic->hints[nic_index(nic, connection)].asked_reads != 0)
        return PARSED_BLOCKED; /* looked at again when they are done: nbd, which does not know of them, would close the connection */
    if (!nic_slot_share(nic, connection, pages))
        return PARSED_BLOCKED;
    struct nic_slot *slot =
        nic_slot_take(nic, connection, frame.opcode == ATOLL_OP_OPTION ? NIC_SLOT_OPTION : NIC_SLOT_REQUEST);
    if (slot == 0)
        return PARSED_BLOCKED;
    slot->reply_pages = (uint8_t)pages;
    nic->reply_pages += pages;
    nic->hints[slot->connection].reply_pages += pages;
    memset(slot->header, 0, sizeof slot->header);
    memcpy(slot->header, base + window->begin, needed);
    window->begin += needed;
    slot->volume_offset = frame.volume_offset;
    slot->payload_bytes = frame.deliver_payload ? (uint32_t)frame.payload_bytes : 0;
    slot->flags = NIC_SLOT_WANTED;
    uint32_t number = (uint32_t)(slot - nic->area->slots) + 1;
    if (slot->payload_bytes != 0) {
        nic->hints[slot->connection].large = slot->payload_bytes >= NIC_DIRECT_BYTES;
        nic_set32(nic, &connection->receive_slot, number);
        nic_set32(nic, &connection->receive_state, NIC_RX_PAGES);
        return PARSED_ON;
    }
    nic->hints[slot->connection].large = false;
    bool delivered = deliver(nic, connection, slot, false);
    assert(delivered); /* without a payload nothing is posted */
    if (frame.hold) {
        nic_set32(nic, &connection->receive_slot, number);
        nic_set32(nic, &connection->receive_state, NIC_RX_HOLD);
        if (!frame.deliver_payload)
            atoll_set64(nic->journal, &connection->discard_bytes, frame.payload_bytes);
        return PARSED_BLOCKED;
    }
    return PARSED_ON;
}

/* Parses as far as bytes, slots and pages allow. True: more bytes are wanted. */
static bool parse(struct nic *nic, struct nic_connection *connection)
{
    struct nic_window window = nic_window_of(connection->window);
    const uint8_t *base = buffer_of(nic, nic_index(nic, connection), window.buffer);
    enum parsed parsed = PARSED_ON;

    while (parsed == PARSED_ON) {
        uint32_t here = window.end - window.begin;
        struct nic_slot *slot = connection->receive_slot == 0 ? 0 : &nic->area->slots[connection->receive_slot - 1];
        switch (connection->receive_state) {
        case NIC_RX_HEADER:
            parsed = parse_header(nic, connection, base, &window);
            break;
        case NIC_RX_PAGES:
            if (take_pages(nic, connection, slot))
                nic_set32(nic, &connection->receive_state, NIC_RX_PAYLOAD);
            else
                parsed = PARSED_BLOCKED;
            break;
        case NIC_RX_PAYLOAD: {
            uint32_t wanted = slot->part_begin + slot->part_bytes[slot->part % NIC_PART_LISTS] - slot->payload_received;
            uint32_t count = here < wanted ? here : wanted;
            if (count == 0) {
                parsed = PARSED_MORE;
                break;
            }
            copy_payload(nic, slot, base + window.begin, count);
            window.begin += count;
            part_received(nic, connection, slot, count);
            break;
        }
        case NIC_RX_PART:
            if (!part_done(nic, connection, slot, here == 0))
                parsed = PARSED_BLOCKED;
            break;
        case NIC_RX_DISCARD: {
            uint32_t count = here < connection->discard_bytes ? here : (uint32_t)connection->discard_bytes;
            if (count == 0) {
                parsed = PARSED_MORE;
                break;
            }
            window.begin += count;
            atoll_set64(nic->journal, &connection->discard_bytes, connection->discard_bytes - count);
            if (connection->discard_bytes == 0) {
                nic_set32(nic, &connection->receive_state, NIC_RX_HEADER);
                release_held(nic, connection);
            }
            break;
        }
        default:
            parsed = PARSED_BLOCKED;
        }
    }
    if (connection->receive_state != NIC_RX_END)
        nic_window_set(nic, connection, window);
    return parsed == PARSED_MORE;
}

/* --- Operations -------------------------------------------------------------------------------------------------- */

/* Vectors for the rest of the part, then the window. Returns their number; *bytes: what they hold. */
static uint32_t plan(struct nic *nic, struct nic_connection *connection, struct iovec *vectors, uint32_t *bytes)
{
    uint32_t index = nic_index(nic, connection), count = 0;
    struct nic_hint *hint = &nic->hints[index];
    *bytes = 0;
    if (connection->receive_state == NIC_RX_PAYLOAD) {
        const struct nic_slot *slot = &nic->area->slots[connection->receive_slot - 1];
        const struct atoll_segment *segments = nic_segments(nic, slot, slot->part);
        uint32_t skip = slot->payload_received - slot->part_begin;
        for (uint32_t segment = 0; segment < slot->segments[slot->part % NIC_PART_LISTS]; segment++) {
            uint32_t length = segments[segment].length;
            if (skip >= length) {
                skip -= length;
                continue;
            }
            vectors[count++] = (struct iovec){.iov_base = (void *)(uintptr_t)(segments[segment].address + skip), .iov_len = length - skip};
            *bytes += length - skip;
            skip = 0;
        }
        /* Behind this part comes another, or, in negotiation, nothing before the answer. */
        if (slot->payload_received + *bytes < slot->payload_bytes || slot->state == NIC_SLOT_OPTION)
            return count;
    }
    make_room(nic, connection);
    struct nic_window window = nic_window_of(connection->window);
    uint32_t room = room_behind(window);
    if (hint->large && connection->receive_state != NIC_RX_DISCARD && room > NIC_HEADER_WINDOW)
        room = NIC_HEADER_WINDOW;
    vectors[count++] = (struct iovec){.iov_base = buffer_of(nic, index, window.buffer) + window.end, .iov_len = room};
    *bytes += room;
    return count;
}

void nic_receive(struct nic *nic, struct nic_connection *connection)
{
    uint32_t index = nic_index(nic, connection);
    struct nic_hint *hint = &nic->hints[index];

    if (connection->phase != NIC_OPEN || (connection->operation[NIC_RECEIVE] & 1))
        return;
    /* I8: not the slot's identity, which is another one when a step that took it is done again. */
    nic->domain->self->current = atoll_identity(index, NIC_NO_SLOT, connection->operation[NIC_RECEIVE] >> 1 << 2 | NIC_RECEIVE);
    bool more = parse(nic, connection);
    nic->domain->self->current = 0;
    nic_send(nic, connection); /* what has been answered at once */
    if (connection->phase != NIC_OPEN)
        return; /* a reference of nbd's was wrong */
    if (!more) {
        rest(nic, connection);
        return;
    }
    if (!hint->readable) {
        /* Soon after a send the peer often has sent more: looked at without waiting for epoll, while that is so. */
        bool sending = connection->operation[NIC_SEND] & 1;
        if (!sending || (!hint->speculate && ++hint->speculation_turn % 16 != 0)) {
            rest(nic, connection);
            return;
        }
    }
    if (nic->engine->room(nic) == 0 || nic->vector_count + NIC_PART_SEGMENTS + 1 > NIC_TURN_VECTORS) {
        nic_schedule(nic, index);
        return;
    }
    struct iovec *vectors = &nic->vectors[nic->vector_count];
    uint32_t bytes, count = plan(nic, connection, vectors, &bytes);
    nic->vector_count += count;
    hint->asked = bytes;
    atoll_count(nic->domain, NIC_RECEIVE_OPERATIONS, 1);
    nic->engine->receive(nic, index, vectors, count, nic_intent(nic, connection, NIC_RECEIVE));
}

void nic_received(struct nic *nic, struct nic_connection *connection, int32_t result)
{
    uint32_t index = nic_index(nic, connection);
    struct nic_hint *hint = &nic->hints[index];

    nic_schedule(nic, index);
    if (connection->phase != NIC_OPEN)
        return; /* what was received meanwhile is for nobody */
    if (result <= 0) {
        if (result == 0) {
            nic_set32(nic, &connection->end_of_stream, 1);
            nic_end(nic, connection);
        } else if (result == -EAGAIN) {
            if (!hint->readable)
                hint->speculate = false;
            hint->readable = false;
            nic_guess_over(nic, false);
            atoll_count(nic->domain, NIC_EMPTY_RECEIVES, 1);
        } else if (result != -EINTR && result != -ENOMEM && result != -ENOBUFS) {
            atoll_count(nic->domain, NIC_SOCKET_ERRORS, 1);
            nic_gone(nic, connection);
        }
        return;
    }
    uint32_t count = (uint32_t)result;
    nic_guess_over(nic, true);
    if (!hint->readable)
        hint->speculate = true;
    /* A short read of a stream empties it; what comes later shows in epoll. */
    hint->readable = hint->hangup || hint->asked == 0 || count == hint->asked;
    connection->received_ns = nic->now_ns;
    connection->received_bytes += count;
    atoll_count(nic->domain, NIC_RECEIVED_BYTES, count);
    nic_deadline(nic, nic->now_ns + nic->limits.payload_ns);
    if (connection->receive_state == NIC_RX_PAYLOAD) {
        struct nic_slot *slot = &nic->area->slots[connection->receive_slot - 1];
        uint32_t wanted = slot->part_begin + slot->part_bytes[slot->part % NIC_PART_LISTS] - slot->payload_received;
        uint32_t landed = count < wanted ? count : wanted;
        part_received(nic, connection, slot, landed);
        count -= landed;
    }
    if (count > 0) {
        struct nic_window window = nic_window_of(connection->window);
        assert(count <= room_behind(window));
        window.end += count;
        nic_window_set(nic, connection, window);
    }
}
