/* See framing.h. Layouts: NBD protocol, "Newstyle negotiation", "Transmission" ("Simple reply message", "Structured reply chunk message",
 * "Extended reply chunk message"). */
#include "drivers/nic/nic.h"

#include <endian.h>
#include <string.h>

#define MAGIC_OPTION 0x49484156454F5054u /* IHAVEOPT */
#define MAGIC_REQUEST 0x25609513u
#define MAGIC_EXTENDED 0x21e41c71u
#define TYPE_READ 0
#define TYPE_WRITE 1
#define TYPE_DISC 2
#define FLAG_PAYLOAD_LEN 32
#define MAGIC_SIMPLE_REPLY 0x67446698u
#define MAGIC_EXTENDED_REPLY 0x6e8a278cu
#define REPLY_FLAG_DONE 1
#define REPLY_TYPE_NONE 0
#define REPLY_TYPE_OFFSET_DATA 1
#define REPLY_TYPE_OFFSET_HOLE 2
#define FLAG_DF 4
#define MAGIC_STRUCTURED_REPLY 0x668e33efu

static uint16_t read16(const uint8_t *bytes)
{
    uint16_t value;
    memcpy(&value, bytes, sizeof value);
    return be16toh(value);
}

static uint32_t read32(const uint8_t *bytes)
{
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return be32toh(value);
}

static uint32_t part_of(uint64_t length) { return length < ATOLL_PART_BYTES ? (uint32_t)length : ATOLL_PART_BYTES; }

static uint64_t read64(const uint8_t *bytes)
{
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return be64toh(value);
}

uint32_t nic_frame_header_bytes(uint32_t framing)
{
    switch (framing) {
    case ATOLL_FRAMING_CLIENT_FLAGS: return 4;
    case ATOLL_FRAMING_OPTION: return 16;
    case ATOLL_FRAMING_REQUEST: return 28;
    case ATOLL_FRAMING_EXTENDED: return 32;
    }
    return 0;
}

void nic_frame_read(uint32_t framing, const uint8_t *bytes, struct nic_frame *frame)
{
    memset(frame, 0, sizeof *frame);
    frame->header_bytes = nic_frame_header_bytes(framing);
    frame->opcode = framing == ATOLL_FRAMING_CLIENT_FLAGS || framing == ATOLL_FRAMING_OPTION ? ATOLL_OP_OPTION : ATOLL_OP_REQUEST;
    frame->hold = frame->opcode == ATOLL_OP_OPTION; /* negotiation: one frame at a time */
    frame->deliver_payload = true;
    bool header = true;
    uint64_t longest = NIC_OPTION_BYTES;
    switch (framing) {
    case ATOLL_FRAMING_OPTION:
        header = read64(bytes) == MAGIC_OPTION;
        frame->payload_bytes = read32(bytes + 12);
        break;
    case ATOLL_FRAMING_REQUEST:
        longest = ATOLL_REQUEST_BYTES;
        header = read32(bytes) == MAGIC_REQUEST;
        frame->volume_offset = read64(bytes + 16);
        if (read16(bytes + 6) == TYPE_WRITE)
            frame->payload_bytes = read32(bytes + 24);
        else if (read16(bytes + 6) == TYPE_READ)
            frame->reply_bytes = part_of(read32(bytes + 24));
        break;
    case ATOLL_FRAMING_EXTENDED:
        longest = ATOLL_PAYLOAD_BYTES;
        header = read32(bytes) == MAGIC_EXTENDED;
        frame->volume_offset = read64(bytes + 16);
        if (read16(bytes + 4) & FLAG_PAYLOAD_LEN)
            frame->payload_bytes = read64(bytes + 24);
        else if (read16(bytes + 6) == TYPE_READ)
            frame->reply_bytes = part_of(read64(bytes + 24));
        break;
    }
    frame->farewell = header && frame->opcode == ATOLL_OP_REQUEST && read16(bytes + 6) == TYPE_DISC;
    if (!header) {
        frame->payload_bytes = 0;
        frame->hold = true;
    } else if (frame->payload_bytes > longest) {
        frame->deliver_payload = false;
        frame->hold = true;
    }
}

bool nic_frame_is_plain_write(uint32_t framing, const uint8_t *bytes)
{
    return read16(bytes + 6) == TYPE_WRITE && read16(bytes + 4) == (framing == ATOLL_FRAMING_EXTENDED ? FLAG_PAYLOAD_LEN : 0);
}

static uint8_t *put32(uint8_t *at, uint32_t value)
{
    uint32_t big = htobe32(value);
    memcpy(at, &big, sizeof big);
    return at + sizeof big;
}

uint32_t nic_frame_done(uint32_t framing, const uint8_t *bytes, uint8_t *answer)
{
    bool extended = framing == ATOLL_FRAMING_EXTENDED;
    uint8_t *at = put32(answer, extended ? MAGIC_EXTENDED_REPLY : MAGIC_SIMPLE_REPLY);
    at = put32(at, extended ? (uint32_t)REPLY_FLAG_DONE << 16 | REPLY_TYPE_NONE : 0); /* simple: no error */
    memcpy(at, bytes + 8, 8); /* cookie */
    if (!extended)
        return 16;
    memcpy(at + 8, bytes + 16, 8); /* offset */
    memset(at + 16, 0, 8); /* length of the chunk's payload */
    return 32;
}

uint64_t nic_frame_plain_read(uint32_t framing, bool chunks, const uint8_t *bytes)
{
    bool extended = framing == ATOLL_FRAMING_EXTENDED;
    if ((!extended && framing != ATOLL_FRAMING_REQUEST) || read32(bytes) != (extended ? MAGIC_EXTENDED : MAGIC_REQUEST) ||
        read16(bytes + 6) != TYPE_READ || (read16(bytes + 4) & ~(extended || chunks ? FLAG_DF : 0)) != 0)
        return 0;
    return extended ? read64(bytes + 24) : read32(bytes + 24);
}

/* The header of the last chunk of the reply to a READ, and the offset with which its payload of so many bytes begins. */
static uint8_t *put_chunk(bool extended, uint32_t type, const uint8_t *bytes, uint64_t payload, uint8_t *at)
{
    at = put32(at, extended ? MAGIC_EXTENDED_REPLY : MAGIC_STRUCTURED_REPLY);
    at = put32(at, (uint32_t)REPLY_FLAG_DONE << 16 | type);
    memcpy(at, bytes + 8, 8); /* cookie */
    at += 8;
    if (extended) {
        memcpy(at, bytes + 16, 8); /* offset */
        at = put32(at + 8, (uint32_t)(payload >> 32));
    }
    at = put32(at, (uint32_t)payload);
    memcpy(at, bytes + 16, 8); /* offset */
    return at + 8;
}

uint32_t nic_frame_data(uint32_t framing, bool chunks, const uint8_t *bytes, uint64_t length, uint8_t *answer)
{
    bool extended = framing == ATOLL_FRAMING_EXTENDED;
    if (extended || chunks)
        return (uint32_t)(put_chunk(extended, REPLY_TYPE_OFFSET_DATA, bytes, 8 + length, answer) - answer);
    return nic_frame_done(framing, bytes, answer); /* the same, and the data behind it */
}

uint32_t nic_frame_hole(uint32_t framing, const uint8_t *bytes, uint32_t length, uint8_t *answer)
{
    uint8_t *at = put_chunk(framing == ATOLL_FRAMING_EXTENDED, REPLY_TYPE_OFFSET_HOLE, bytes, 12, answer);
    return (uint32_t)(put32(at, length) - answer);
}
