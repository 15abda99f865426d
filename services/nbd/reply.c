/*
 * Replies: headers are written into the slot's nbd_reply, data stay where they are and are referred to by segments (I3).
 *
 * After a crash: nothing here is part of a transaction. A reply is written before the message that refers to it is committed,
 * and not touched again until nic has sent it.
 */
#include "services/nbd/nbd.h"

struct writer {
    struct nbd_reply *reply;
    uint32_t segment_count;
    uint32_t used;         /* bytes written */
    uint32_t referred;     /* of these, in segments */
    uint64_t total;
};

static uint8_t *take_bytes(struct writer *writer, uint32_t count)
{
    uint8_t *place = writer->reply->bytes + writer->used;
    writer->used += count;
    assert(writer->used <= NBD_REPLY_BYTES);
    return place;
}

static void push(struct writer *writer, uint64_t address, uint32_t length)
{
    struct atoll_segment *last = &writer->reply->segments[writer->segment_count];
    if (writer->segment_count != 0 && last[-1].address + last[-1].length == address) {
        last[-1].length += length;
    } else {
        assert(writer->segment_count < ATOLL_REPLY_SEGMENTS);
        *last = (struct atoll_segment){.address = address, .length = length, .kind = ATOLL_SEGMENT_DATA};
        writer->segment_count++;
    }
    writer->total += length;
}

static void refer_bytes(struct writer *writer)
{
    if (writer->used != writer->referred)
        push(writer, (uint64_t)(uintptr_t)(writer->reply->bytes + writer->referred), writer->used - writer->referred);
    writer->referred = writer->used;
}

static void refer_data(struct writer *writer, uint64_t address, uint32_t length)
{
    refer_bytes(writer);
    push(writer, address, length);
}

static void finish(struct writer *writer, struct atoll_descriptor *message)
{
    refer_bytes(writer);
    assert(writer->total <= UINT32_MAX);
    message->length = (uint32_t)writer->total;
    if (writer->segment_count <= 1) {
        message->segment_count = 0;
        message->address = writer->segment_count == 0 ? 0 : writer->reply->segments[0].address;
    } else {
        message->segment_count = (uint16_t)writer->segment_count;
        message->address = (uint64_t)(uintptr_t)writer->reply->segments;
    }
}

static void put_simple(struct writer *writer, const struct nbd_slot *slot, uint32_t error)
{
    uint8_t *at = take_bytes(writer, 16);
    at = nbd_store32(at, NBD_SIMPLE_REPLY_MAGIC);
    at = nbd_store32(at, error);
    nbd_store64(at, slot->cookie);
}

/* A chunk's header; `length` is of the payload that the caller puts behind it. */
static void put_chunk(struct writer *writer, const struct nbd_slot *slot, uint32_t type, int done, uint32_t length)
{
    int extended = (slot->features & NBD_FEATURE_EXTENDED) != 0;
    uint8_t *at = take_bytes(writer, extended ? 32 : 20);
    at = nbd_store32(at, extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
    at = nbd_store16(at, done ? NBD_REPLY_FLAG_DONE : 0);
    at = nbd_store16(at, (uint16_t)type);
    at = nbd_store64(at, slot->cookie);
    if (extended) {
        at = nbd_store64(at, slot->offset);
        nbd_store64(at, length);
    } else {
        nbd_store32(at, length);
    }
}

void nbd_reply_success(const struct nbd_slot *slot, struct nbd_reply *reply, struct atoll_descriptor *message)
{
    struct writer writer = {.reply = reply};
    /* With structured replies a simple one is allowed where there is no payload, and shorter; with extended headers it is not. */
    if (slot->features & NBD_FEATURE_EXTENDED)
        put_chunk(&writer, slot, NBD_REPLY_TYPE_NONE, 1, 0);
    else
        put_simple(&writer, slot, 0);
    finish(&writer, message);
}

void nbd_reply_error(const struct nbd_slot *slot, struct nbd_reply *reply, uint32_t status, const char *text, int with_offset,
                     uint64_t offset, struct atoll_descriptor *message)
{
    struct writer writer = {.reply = reply};
    uint32_t text_bytes = (uint32_t)strnlen(text, NBD_TEXT_BYTES - 1);

    if (nbd_uses_chunks(slot)) {
        put_chunk(&writer, slot, with_offset ? NBD_REPLY_TYPE_ERROR_OFFSET : NBD_REPLY_TYPE_ERROR, 1,
                  6 + text_bytes + (with_offset ? 8 : 0));
        uint8_t *at = take_bytes(&writer, 6 + text_bytes);
        at = nbd_store32(at, nbd_code(status));
        at = nbd_store16(at, (uint16_t)text_bytes);
        memcpy(at, text, text_bytes);
        if (with_offset)
            nbd_store64(take_bytes(&writer, 8), offset);
    } else {
        put_simple(&writer, slot, nbd_code(status));
    }
    finish(&writer, message);
}

void nbd_reply_read(const struct nbd_slot *slot, struct nbd_reply *reply, const struct atoll_segment *data, uint32_t count,
                    int last, struct atoll_descriptor *message)
{
    struct writer writer = {.reply = reply};
    uint64_t at = slot->offset + slot->done_bytes;
    uint32_t index = 0;

    if (!nbd_uses_chunks(slot)) {
        if (slot->part == 0)
            put_simple(&writer, slot, 0);
        for (; index < count; index++)
            refer_data(&writer, data[index].address, data[index].length);
        finish(&writer, message);
        return;
    }
    bool whole = false; /* one chunk of data, zeros written out: DF, unless all of it is a hole */
    if (slot->flags & NBD_CMD_FLAG_DF)
        for (uint32_t i = 1; i < count; i++)
            whole |= data[i].kind != data[0].kind;
    while (index < count) {
        uint32_t kind = whole ? ATOLL_SEGMENT_DATA : data[index].kind;
        uint32_t end = index;
        uint32_t length = 0;
        while (end < count && (whole || data[end].kind == kind))
            length += data[end++].length;
        int done = last && end == count;
        if (kind == ATOLL_SEGMENT_HOLE) {
            put_chunk(&writer, slot, NBD_REPLY_TYPE_OFFSET_HOLE, done, 12);
            nbd_store32(nbd_store64(take_bytes(&writer, 12), at), length);
        } else {
            put_chunk(&writer, slot, NBD_REPLY_TYPE_OFFSET_DATA, done, 8 + length);
            nbd_store64(take_bytes(&writer, 8), at);
            for (uint32_t i = index; i < end; i++)
                refer_data(&writer, data[i].address, data[i].length);
        }
        at += length;
        index = end;
    }
    finish(&writer, message);
}

void nbd_reply_extents(const struct nbd_slot *slot, struct nbd_reply *reply, const struct atoll_extent *extents, uint32_t count,
                       struct atoll_descriptor *message)
{
    int extended = (slot->features & NBD_FEATURE_EXTENDED) != 0;
    uint64_t lengths[NBD_EXTENT_COUNT];
    uint32_t states[NBD_EXTENT_COUNT];
    uint32_t used = 0;
    uint64_t left = slot->length;

    for (uint32_t i = 0; i < count && left != 0; i++) {
        uint64_t length = extents[i].length_bytes < left ? extents[i].length_bytes : left;
        uint32_t state = extents[i].state & 3; /* hole, zero: the same bits as NBD_STATE_* */
        if (length == 0)
            continue;
        left -= length;
        if (used != 0 && states[used - 1] == state) {
            lengths[used - 1] += length;
            continue;
        }
        if (used == NBD_EXTENT_COUNT || (used == 1 && (slot->flags & NBD_CMD_FLAG_REQ_ONE)))
            break;
        lengths[used] = length;
        states[used++] = state;
    }
    assert(used != 0);
    if (!extended) /* 32-bit lengths: the first extent that is longer is cut there and is the last */
        for (uint32_t i = 0; i < used; i++)
            if (lengths[i] > UINT32_MAX) {
                lengths[i] = UINT32_MAX - (ATOLL_BLOCK_BYTES - 1);
                used = i + 1;
            }

    struct writer writer = {.reply = reply};
    put_chunk(&writer, slot, extended ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS, 1,
              extended ? 8 + used * 16 : 4 + used * 8);
    uint8_t *at = take_bytes(&writer, extended ? 8 + used * 16 : 4 + used * 8);
    at = nbd_store32(at, 1); /* the id that base:allocation got in the negotiation */
    if (extended)
        at = nbd_store32(at, used);
    for (uint32_t i = 0; i < used; i++) {
        at = extended ? nbd_store64(at, lengths[i]) : nbd_store32(at, (uint32_t)lengths[i]);
        at = extended ? nbd_store64(at, states[i]) : nbd_store32(at, states[i]);
    }
    finish(&writer, message);
}
