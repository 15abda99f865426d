/*
 * Every bound of Atoll that more than one domain relies on, with its reason;
 * the relations between them are asserted below (I9). Bounds that a single
 * domain keeps to itself stand in that domain's own header.
 */
#ifndef ATOLL_IPC_LIMITS_H
#define ATOLL_IPC_LIMITS_H

/* cffi:begin */
/* A block: the unit of mapping, sharing and placement; also a page of memory. */
#define ATOLL_BLOCK_BYTES 4096
#define ATOLL_BLOCK_SHIFT 12

/* Requests in flight in the whole server. A slot is one request from its header to its last
 * reply byte; 2,048 serve 1,000 connections with two each, or 64 at depth 32. */
#define ATOLL_SLOT_COUNT 2048

/* Connections at once, including those in negotiation. */
#define ATOLL_CONNECTION_COUNT 2048

/* Data of a request travels between domains in parts of at most this many bytes, one part of a
 * request at a time: large enough for a device's sequential speed, small enough to bound every table. */
#define ATOLL_PART_BYTES 262144
/* Blocks that a part can touch: 64, and one more when it is not aligned. */
#define ATOLL_PART_BLOCKS 65

/* Largest READ or WRITE announced (NBD block size constraint "maximum payload"), and accepted of whoever was told. */
#define ATOLL_PAYLOAD_BYTES 33554432
/* The same of clients that came by EXPORT_NAME, which tells of no constraint: some send more than the 32 MiB that the specification
 * bids them assume. */
#define ATOLL_REQUEST_BYTES 67108864
/* TRIM and WRITE_ZEROES travel in parts of this many bytes (no payload; bounds the time of one step). */
#define ATOLL_RANGE_PART_BYTES 67108864

/* Segments of the largest reply part: a header before and after every data run. */
#define ATOLL_REPLY_SEGMENTS 160

/* Entries of a set of the look-up table: a cache line. */
#define ATOLL_LOOKUP_WAYS 4
/* Pages that one slot can use without dedup's knowing: a part's, and one so that lists begin on a cache line or half of one. */
#define ATOLL_USE_PAGES 66

/* Blocks of posted writes on their way at once (1 MiB): several batches of dedup's, and little to keep free on the device for them. */
#define ATOLL_POSTED_BLOCKS 256
/* Blocks of one posted write at most: larger ones take long enough in themselves. */
#define ATOLL_POSTED_WRITE_BLOCKS 16
/* Messages for which one who dozes is not woken before there are so many. */
#define ATOLL_DOZE_MESSAGES 64

/* Ring entries: one message per slot and direction can be outstanding, so a reply always has its place. */
#define ATOLL_DATA_RING_ENTRIES 4096
/* Entries of rings between dedup and a storage driver: one per I/O slot, with room. */
#define ATOLL_STORAGE_RING_ENTRIES 1024
/* I/O requests of dedup in flight at one storage driver. */
#define ATOLL_IO_COUNT 512
/* Blocks of one I/O request (1 MiB): the device's sequential speed is reached. */
#define ATOLL_IO_BLOCKS 256
/* Entries of the rings to and from the kernel (control only). */
#define ATOLL_CONTROL_RING_ENTRIES 64
/* Bytes of a control message. */
#define ATOLL_CONTROL_BYTES 262144

/* Addresses of failed blocks from here on are pages of metadata (docs/format.md: tree << 56 | level << 48 | number); no device has
 * so many blocks. */
#define ATOLL_METADATA_PLACE 0x1000000000000

/* Volumes in one store and bytes of a volume's name (UTF-8). */
#define ATOLL_VOLUME_COUNT 256
#define ATOLL_VOLUME_NAME_BYTES 256

/* Run threshold (THN) of a volume: blocks in sequence that must match blocks stored in sequence before they are shared.
 * 64 is a whole part; more would leave nothing shared on a track of the smallest size. */
#define ATOLL_THRESHOLD_DEFAULT 1
#define ATOLL_THRESHOLD_MAX 64
/* References from which on a stored block moves to the fast tier. More are no sign of greater use. */
#define ATOLL_TIER_THRESHOLD_DEFAULT 8
#define ATOLL_TIER_THRESHOLD_MAX 1000000

/* Words that one transaction may change: the largest is dedup's step over a part of 65 blocks. */
#define ATOLL_JOURNAL_ENTRIES 32768

/* Records kept of a trace, per domain. */
#define ATOLL_TRACE_ENTRIES 4096

/* Counters per domain. */
#define ATOLL_COUNTER_COUNT 128

/* Requests remembered as having crashed their domain (I8). */
#define ATOLL_SUSPECT_COUNT 16
/* cffi:end */

_Static_assert(ATOLL_BLOCK_BYTES == 1 << ATOLL_BLOCK_SHIFT, "block size and shift agree");
_Static_assert(ATOLL_DATA_RING_ENTRIES >= 2 * ATOLL_SLOT_COUNT, "every slot's message has a place, twice");
_Static_assert(ATOLL_STORAGE_RING_ENTRIES >= ATOLL_IO_COUNT, "every I/O's message has a place");
_Static_assert((ATOLL_PART_BLOCKS - 1) * ATOLL_BLOCK_BYTES == ATOLL_PART_BYTES, "a part's blocks");
_Static_assert(ATOLL_REPLY_SEGMENTS >= 2 * ATOLL_PART_BLOCKS + 2, "a header around every run of a part");
_Static_assert(ATOLL_REQUEST_BYTES % ATOLL_PART_BYTES == 0, "a request is a whole number of parts");

#endif
