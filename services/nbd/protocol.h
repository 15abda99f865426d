/*
 * The wire format of NBD's transmission phase: constants of doc/proto.md of the reference implementation (and of its
 * branch extension-ext-header), and loads and stores in network byte order.
 *
 *   request, compact (28 bytes)     magic:4 flags:2 type:2 cookie:8 offset:8 length:4
 *   request, extended (32 bytes)    magic:4 flags:2 type:2 cookie:8 offset:8 length:8
 *   reply, simple (16 bytes)        magic:4 error:4 cookie:8, then the data of a READ
 *   reply, structured (20 bytes)    magic:4 flags:2 type:2 cookie:8 length:4, then the payload
 *   reply, extended (32 bytes)      magic:4 flags:2 type:2 cookie:8 offset:8 length:8, then the payload
 *
 * The handshake's format is in negotiation.py.
 */
#ifndef ATOLL_NBD_PROTOCOL_H
#define ATOLL_NBD_PROTOCOL_H

#include <stdint.h>

/* cffi:begin */
#define NBD_REQUEST_MAGIC 0x25609513
#define NBD_EXTENDED_REQUEST_MAGIC 0x21e41c71
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698
#define NBD_STRUCTURED_REPLY_MAGIC 0x668e33ef
#define NBD_EXTENDED_REPLY_MAGIC 0x6e8a278c

/* Section "Request types". */
enum nbd_command {
    NBD_CMD_READ = 0,
    NBD_CMD_WRITE = 1,
    NBD_CMD_DISC = 2,
    NBD_CMD_FLUSH = 3,
    NBD_CMD_TRIM = 4,
    NBD_CMD_CACHE = 5,
    NBD_CMD_WRITE_ZEROES = 6,
    NBD_CMD_BLOCK_STATUS = 7
};

/* Section "Command flags". */
enum nbd_command_flag {
    NBD_CMD_FLAG_FUA = 1,
    NBD_CMD_FLAG_NO_HOLE = 2,
    NBD_CMD_FLAG_DF = 4,
    NBD_CMD_FLAG_REQ_ONE = 8,
    NBD_CMD_FLAG_FAST_ZERO = 16,
    NBD_CMD_FLAG_PAYLOAD_LEN = 32
};

/* Sections "Structured reply flags" and "Structured reply types". */
#define NBD_REPLY_FLAG_DONE 1
enum nbd_reply_type {
    NBD_REPLY_TYPE_NONE = 0,
    NBD_REPLY_TYPE_OFFSET_DATA = 1,
    NBD_REPLY_TYPE_OFFSET_HOLE = 2,
    NBD_REPLY_TYPE_BLOCK_STATUS = 5,
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 6,
    NBD_REPLY_TYPE_ERROR = 32769,
    NBD_REPLY_TYPE_ERROR_OFFSET = 32770
};

/* Section "Error values". */
enum nbd_error {
    NBD_EPERM = 1,
    NBD_EIO = 5,
    NBD_ENOMEM = 12,
    NBD_EINVAL = 22,
    NBD_ENOSPC = 28,
    NBD_EOVERFLOW = 75,
    NBD_ENOTSUP = 95,
    NBD_ESHUTDOWN = 108
};
/* cffi:end */

static inline uint16_t nbd_load16(const uint8_t *bytes) { return (uint16_t)(bytes[0] << 8 | bytes[1]); }

static inline uint32_t nbd_load32(const uint8_t *bytes)
{
    uint32_t value;
    __builtin_memcpy(&value, bytes, 4);
    return __builtin_bswap32(value);
}

static inline uint64_t nbd_load64(const uint8_t *bytes)
{
    uint64_t value;
    __builtin_memcpy(&value, bytes, 8);
    return __builtin_bswap64(value);
}

/* Each returns the place behind what it wrote. */
static inline uint8_t *nbd_store16(uint8_t *bytes, uint16_t value)
{
    bytes[0] = (uint8_t)(value >> 8);
    bytes[1] = (uint8_t)value;
    return bytes + 2;
}

static inline uint8_t *nbd_store32(uint8_t *bytes, uint32_t value)
{
    value = __builtin_bswap32(value);
    __builtin_memcpy(bytes, &value, 4);
    return bytes + 4;
}

static inline uint8_t *nbd_store64(uint8_t *bytes, uint64_t value)
{
    value = __builtin_bswap64(value);
    __builtin_memcpy(bytes, &value, 8);
    return bytes + 8;
}

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the loads and stores above swap");

#endif
