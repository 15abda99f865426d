/*
 * The few lines that nic knows of a protocol: how long a header is, how many bytes follow it, how a write is answered that is done, and
 * a read whose data are at hand.
 *
 *   nic_frame_header_bytes(framing)     bytes of a header
 *   nic_frame_read(framing, bytes, &frame)
 *   nic_frame_is_plain_write(framing, bytes), nic_frame_done(framing, bytes, answer)     for posted writes (posted.c)
 *   nic_frame_plain_read(framing, chunks, bytes), nic_frame_data(framing, chunks, bytes, length, answer),
 *   nic_frame_hole(framing, bytes, length, answer)          for small reads (answer.c)
 *
 * What the bytes mean is nbd's business. A header that is not one (wrong magic) is passed on without payload and
 * nothing behind it is parsed before nbd has answered.
 */
#ifndef ATOLL_NIC_FRAMING_H
#define ATOLL_NIC_FRAMING_H

#include <stdbool.h>
#include <stdint.h>

#include "ipc/layout.h"

/* cffi:begin */
struct nic_frame {
    uint32_t header_bytes;
    uint32_t opcode;         /* ATOLL_OP_OPTION or ATOLL_OP_REQUEST */
    uint64_t payload_bytes;  /* as the client says */
    uint64_t volume_offset;  /* bytes of a request; 0 for an option */
    bool hold;               /* nothing behind it is parsed before nbd's answer */
    bool deliver_payload;    /* false: too long, or not a header; delivered alone */
    bool farewell;           /* a DISC: nothing is answered after it */
    uint8_t reserved[1];
    uint32_t reply_bytes;    /* data that one reply to it may refer to: a part of a READ */
};

/* 0: the framing awaits no header. */
uint32_t nic_frame_header_bytes(uint32_t framing);
/* `bytes` holds a whole header. */
void nic_frame_read(uint32_t framing, const uint8_t *bytes, struct nic_frame *frame);
/* A header of requests asks for a WRITE and for nothing else: it has no flags but those that say that a payload follows. */
bool nic_frame_is_plain_write(uint32_t framing, const uint8_t *bytes);
/* Writes the reply to it that says that it is done, at most 32 bytes, and returns how many. */
uint32_t nic_frame_done(uint32_t framing, const uint8_t *bytes, uint8_t *answer);
/* `chunks`: structured replies were negotiated. Bytes that it asks for, if it is a READ with no flags but, with chunks, DF; 0: it is not. */
uint64_t nic_frame_plain_read(uint32_t framing, bool chunks, const uint8_t *bytes);
/* Writes what stands before its `length` bytes of data in the one reply to it, at most 40 bytes, and returns how many. */
uint32_t nic_frame_data(uint32_t framing, bool chunks, const uint8_t *bytes, uint64_t length, uint8_t *answer);
/* Where replies are chunks: writes the one reply that says that all of its `length` bytes are a hole, at most 44 bytes, and returns how many. */
uint32_t nic_frame_hole(uint32_t framing, const uint8_t *bytes, uint32_t length, uint8_t *answer);
/* cffi:end */

#endif
