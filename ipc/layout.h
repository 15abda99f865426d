/*
 * What lies where in the physical map, and the structures that more than one domain reads.
 *
 *   0x200000000000 + role * 256 GiB    arena of that role, same address in every domain (I2)
 *   0x2f0000000000 + role * 4 KiB      lock page of that role
 *
 * An arena (byte offsets):
 *
 *   0          struct atoll_arena_header                      (2 pages)
 *   8 KiB      counters, uint64_t[ATOLL_COUNTER_COUNT]        (1 page)
 *   12 KiB     suspects (I8)                                  (1 page)
 *   16 KiB     trace records                                  (ATOLL_TRACE_ENTRIES * 64)
 *   then       journal of the transaction in progress
 *   then       producer halves of this role's rings (tx), each page-aligned
 *   then       control reply area (ATOLL_CONTROL_BYTES)
 *   role_offset    what the role keeps for itself and publishes; starts with its public structure
 *   buffer_offset  page-aligned buffers that are lent to others
 *
 * After a crash: the arena stays; the successor maps it writable after it holds the role's lock, rolls the journal
 * back (transaction.h), publishes the committed ring indices again and wakes its peers.
 */
#ifndef ATOLL_IPC_LAYOUT_H
#define ATOLL_IPC_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

#include "ipc/limits.h"

/* cffi:begin */
#define ATOLL_MAP_BASE 0x200000000000
#define ATOLL_MAP_STRIDE 0x4000000000
#define ATOLL_LOCK_BASE 0x2f0000000000
#define ATOLL_ARENA_MAGIC 0x616e6572416c6c41
#define ATOLL_LAYOUT_VERSION 20

/* Numbers reach other processes and stale arenas: never renumber. */
enum atoll_role {
    ATOLL_ROLE_INIT = 0,
    ATOLL_ROLE_KERNEL = 1,
    ATOLL_ROLE_NIC = 2,
    ATOLL_ROLE_NBD = 3,
    ATOLL_ROLE_DEDUP = 4,
    ATOLL_ROLE_DISK = 5,
    ATOLL_ROLE_LLRRM = 6,
    ATOLL_ROLE_COUNT = 16
};

enum atoll_domain_state {
    ATOLL_STATE_NEW = 0,        /* arena fresh, nobody has played the role yet */
    ATOLL_STATE_RECOVERING = 1, /* the active process reads what its predecessor left */
    ATOLL_STATE_SERVING = 2,
    ATOLL_STATE_STOPPED = 3,    /* ended on request, everything handed over */
    ATOLL_STATE_FAILED = 4      /* cannot start; the reason stands in `reason` */
};

/* How a domain is woken. */
enum atoll_wake_kind { ATOLL_WAKE_FUTEX = 0, ATOLL_WAKE_EVENTFD = 1 };

/* One ring message: one cache line. `identity` is (connection << 48 | slot << 32 | sequence) on the data path,
 * (I/O slot << 32 | sequence) between dedup and storage, the call number on control rings. */
struct atoll_descriptor {
    uint8_t opcode;          /* enum atoll_opcode */
    uint8_t flags;           /* enum atoll_descriptor_flag */
    uint16_t segment_count;  /* 0: `address`,`length` is the payload; else `address` is of atoll_segment[segment_count] */
    uint32_t ready;          /* the ring's (ring.h): tail behind the messages that were published with this one */
    uint64_t identity;
    uint64_t address;        /* reference into the physical map, or 0 */
    uint32_t length;         /* payload bytes in all */
    uint16_t status;         /* enum atoll_status in replies */
    uint16_t part;           /* number of the request's part, modulo 65,536; ATOLL_PART_NIC */
    union {
        uint8_t bytes[32];
        uint64_t words[4];
        uint32_t halves[8];
    };
};

/* The part of a READ that nic asks dedup for: before all others. */
#define ATOLL_PART_NIC 0xffff

/* A piece of a scattered payload. */
struct atoll_segment {
    uint64_t address;
    uint32_t length;
    uint32_t kind; /* enum atoll_segment_kind */
};

enum atoll_segment_kind {
    ATOLL_SEGMENT_DATA = 0,
    ATOLL_SEGMENT_HOLE = 1  /* reads as zeros: `address` is of zeros, of at least `length` bytes */
};

enum atoll_descriptor_flag {
    ATOLL_FLAG_FUA = 1,          /* acknowledge when on stable storage */
    ATOLL_FLAG_NO_HOLE = 2,      /* WRITE_ZEROES: allocate */
    ATOLL_FLAG_FAST = 4,         /* WRITE_ZEROES: fail rather than be slow */
    ATOLL_FLAG_ONE = 8,          /* BLOCK_STATUS: one extent */
    ATOLL_FLAG_LAST = 16,        /* reply: the slot is free once this is sent */
    ATOLL_FLAG_CLOSE = 32,       /* reply: close the connection once this is sent */
    ATOLL_FLAG_DISCARD = 64,     /* reply: throw away what is still to come of this request's payload */
    ATOLL_FLAG_TAKEN = 128,      /* reply: the part's payload pages were lent on to dedup, which gives them back itself */
    ATOLL_FLAG_AWAITED = 1,      /* IO_READ: a client waits for it (a hint) */
    ATOLL_FLAG_POSTED = 2,       /* nic's WRITE: its client has been answered before; END follows, no DONE */
    ATOLL_FLAG_ALONE = 128       /* nic -> dedup, a WRITE: no other request came with it; nbd -> dedup: no other waited when it was taken;
                                    dedup -> storage driver: clients' requests come one by one, and none waits for this (hints) */
};

enum atoll_opcode {
    /* nic -> nbd. Each holds a slot until nbd's answer with ATOLL_FLAG_LAST. */
    ATOLL_OP_OPEN = 1,       /* a new connection; halves[0] = listener index */
    ATOLL_OP_OPTION = 2,     /* negotiation: bytes = header (4 bytes of client flags, or 16 of an option),
                                halves[5] = header length; address,length = option data (contiguous) */
    ATOLL_OP_REQUEST = 3,    /* transmission: bytes = 28-byte or 32-byte header as received;
                                address,length,segments = first part of the payload, part = 0. A READ that dedup has refused to nic:
                                status, address = words[0] of its DONE, length = number of the failed block in it, from 1 on, 0: not known */
    ATOLL_OP_PART = 4,       /* next part of a payload */
    ATOLL_OP_CLOSED = 5,     /* the connection is gone; no other slot of it is in use any more */
    ATOLL_OP_SENT = 6,       /* a reply without ATOLL_FLAG_LAST is in the socket: `part` as in the reply */
    /* nbd -> nic */
    ATOLL_OP_REPLY = 16,     /* send address,length,segments (length 0: nothing to send), then act on flags;
                                if it is an answer to OPEN or OPTION: halves[0] = enum atoll_framing to continue with; where that is of
                                requests, halves[1] = id + 1 of the volume that nic may answer for, 0 none, halves[2] = its generation,
                                halves[3] = 1: replies may come between the parts of another one */
    ATOLL_OP_NEXT = 17,      /* write part `part` is taken: deliver the next part (no bytes, no flags but TAKEN) */
    /* nbd -> dedup, and nic -> dedup a WRITE with POSTED and a READ: words[0] = offset in the volume (bytes), words[1] = length (bytes),
     * halves[4] = volume id, halves[5] = volume generation */
    ATOLL_OP_READ = 32,      /* nic's has part ATOLL_PART_NIC: nbd may ask once more, with part 0 */
    ATOLL_OP_WRITE = 33,     /* payload: nic's pages; a block's bytes lie at their offset within the page */
    ATOLL_OP_FLUSH = 34,
    ATOLL_OP_TRIM = 35,
    ATOLL_OP_ZERO = 36,
    ATOLL_OP_CACHE = 37,
    ATOLL_OP_EXTENTS = 38,   /* answer: address,length = atoll_extent[] in dedup's arena */
    /* dedup -> nbd, or nic: to whom has asked */
    ATOLL_OP_DONE = 48,      /* same identity and part; status; data by segments; words[0] = LBA or PBA that failed */
    /* dedup -> nic */
    ATOLL_OP_GIVE_BACK = 49, /* halves[0..7] = page indices of nic's buffers, segment_count of them */
    ATOLL_OP_END = 50,       /* a posted write, which nic has answered, is applied: the slot is free (no flags but TAKEN) */
    /* dedup -> disk: words[0] = device offset (bytes); address,length,segments = where to or from */
    ATOLL_OP_IO_READ = 64,
    ATOLL_OP_IO_WRITE = 65,
    ATOLL_OP_IO_SYNC = 66,   /* begins when the requests of identity words[0..2] are done that were sent before it; 0: none */
    ATOLL_OP_IO_DISCARD = 67, /* words[1] = length (bytes): contents no longer needed, a hint */
    /* disk -> dedup */
    ATOLL_OP_IO_DONE = 80,   /* same identity; status; halves[0] = errno of the operating system */
    /* control, any role <-> kernel: address,length = msgpack, in the sender's arena */
    ATOLL_OP_CALL = 96,
    ATOLL_OP_RESULT = 97,
    ATOLL_OP_EVENT = 98      /* domain -> kernel, no answer expected */
};

/* Framing rules of nic. */
enum atoll_framing {
    ATOLL_FRAMING_KEEP = 0,
    ATOLL_FRAMING_CLIENT_FLAGS = 1, /* 4 bytes */
    ATOLL_FRAMING_OPTION = 2,       /* 16 bytes: magic, option, length; then length bytes */
    ATOLL_FRAMING_REQUEST = 3,      /* 28 bytes; WRITE (type 1) is followed by `length` bytes */
    ATOLL_FRAMING_EXTENDED = 4      /* 32 bytes (NBD extended headers); flag PAYLOAD_LEN tells of a payload */
};

/* Errors of the world, one closed list; names in ipc/status.py, NBD codes in nbd. Numbered by hand. */
enum atoll_status {
    ATOLL_OK = 0,
    ATOLL_EPERM = 1,      /* volume is read-only */
    ATOLL_EIO = 2,        /* the device failed */
    ATOLL_EINVAL = 3,     /* malformed */
    ATOLL_ENOSPC = 4,     /* store full, or past the end of the volume on a write */
    ATOLL_ENOTSUP = 5,    /* cannot be done fast */
    ATOLL_ESHUTDOWN = 6,  /* the server stops */
    ATOLL_ENOENT = 7,     /* no such volume (any more) */
    ATOLL_ECORRUPT = 8,   /* fingerprint mismatch */
    ATOLL_EPOISON = 9,    /* this request crashed its domain twice */
    ATOLL_ENOMEM = 10,    /* a stated limit is reached and waiting would not help */
    ATOLL_EOVERFLOW = 11,
    ATOLL_EUNFLUSHED = 12 /* an acknowledged write could not be placed; flush fails until it is */
};

/* BLOCK_STATUS answer of dedup. */
struct atoll_extent {
    uint64_t length_bytes;
    uint32_t state; /* bit 0: hole, bit 1: reads as zeros (as base:allocation) */
    uint32_t reserved;
};

/* One observed hop while a trace is armed (arena of the domain that saw it). */
struct atoll_trace_record {
    uint64_t time_ns;    /* CLOCK_MONOTONIC */
    uint64_t identity;
    uint64_t address;    /* of the payload's first byte */
    uint32_t length;
    uint8_t opcode;      /* of the message */
    uint8_t peer;        /* role it came from or goes to */
    uint8_t direction;   /* 0 received, 1 sent */
    uint8_t flags;
    uint64_t words[4];   /* of the descriptor */
};

/* Consumer half of a ring, in the consumer's arena: one line each for the peer and for oneself. */
struct atoll_ring_consumer {
    uint32_t head;            /* published: entries before it may be overwritten (SP-HEAD) */
    uint32_t reserved_a[15];
    uint32_t head_committed;  /* transactional */
    uint32_t reserved_b[15];
};

/* Producer half, page-aligned in the producer's arena; entries follow at +4096. */
struct atoll_ring_producer {
    uint32_t tail;            /* published: entries before it are complete (SP-TAIL); futex word */
    uint32_t reserved_a[15];
    uint32_t tail_committed;  /* transactional */
    uint32_t entry_count;     /* a power of two */
    uint32_t consumer_role;
    uint32_t reserved_b[13];
};

struct atoll_arena_header {
    uint64_t magic;
    uint32_t layout_version;
    uint32_t role;
    uint64_t instance;        /* random number of this run of init */
    uint64_t arena_bytes;
    uint32_t incarnation;     /* of the process that plays the role now */
    uint32_t state;           /* enum atoll_domain_state */
    uint32_t pid;
    uint32_t wake_kind;       /* enum atoll_wake_kind */
    int32_t eventfd;          /* descriptor number, the same in every domain */
    uint32_t reserved_a;
    uint64_t start_time;      /* of pid, clock ticks since boot (/proc/pid/stat field 22) */
    uint64_t progress;        /* goes up with every turn of the main loop */
    uint64_t current;         /* identity of the request being executed, 0 none (I8) */
    uint64_t serving_ns;      /* CLOCK_MONOTONIC when this incarnation began to serve */
    uint64_t journal_offset;
    uint64_t control_offset;
    uint64_t role_offset;
    uint64_t role_bytes;
    uint64_t buffer_offset;
    uint64_t buffer_bytes;
    uint64_t tx_offset[16];   /* producer half of the ring to each role; 0: no such ring */
    uint64_t trace_armed;     /* kernel's arena: number of the trace in progress, 0 none */
    uint64_t trace_next;      /* records written so far by this domain */
    char reason[256];         /* why state is FAILED */
    uint64_t crash_point;     /* kernel's arena: FNV-1a of the name of the armed crash point, 0 none */
    uint64_t crash_sequence;  /* kernel's arena: goes up with each arming */
    uint64_t crash_seen;      /* own: the arming that this domain has died of */
    uint8_t reserved_b[3472];
    uint32_t sleeping;        /* SP-SLEEP; a line of its own, peers look at it after every batch */
    uint32_t reserved_c[15];
    struct atoll_ring_consumer consumer[16]; /* rings from each role */
    uint8_t reserved_end[2048];
};

/* A request that was being executed when its domain crashed by itself (I8). */
struct atoll_suspect {
    uint64_t identity;
    uint32_t part;
    uint32_t crashes;
};

/* Start of dedup's role area: the volumes, read by nbd and kernel. A reader takes `version` (even), copies,
 * compares `version`; an odd or changed one means: again. */
struct atoll_volume {
    uint32_t version;
    uint32_t id;              /* index in the table; a request names it with its generation */
    uint32_t generation;      /* goes up when the entry is used for another volume */
    uint32_t state;           /* enum atoll_volume_state */
    uint32_t flags;           /* enum atoll_volume_flag */
    uint32_t threshold;       /* run threshold (THN): 1..ATOLL_THRESHOLD_MAX */
    uint64_t size_bytes;
    uint64_t mapped_blocks;   /* logical blocks that hold data */
    uint64_t created_s;       /* Unix time */
    uint32_t name_bytes;
    char name[256];
    uint32_t tier_threshold;  /* references that move a block to the fast tier: 1..ATOLL_TIER_THRESHOLD_MAX */
    uint8_t reserved[200];
};

enum atoll_volume_state { ATOLL_VOLUME_FREE = 0, ATOLL_VOLUME_READY = 1, ATOLL_VOLUME_DELETING = 2 };
enum atoll_volume_flag { ATOLL_VOLUME_READONLY = 1 };

/* What nic and nbd may answer by themselves: a block that lies in memory. Written by dedup, looked at by them, never waited for.
 *
 *   dedup: takes a value away (0) before the block changes, puts one there after the change is committed, and
 *          adds 1 to a page's generation before it looks who uses the page (SP-USE)
 *   they:  take the value, publish that they use the page, full_fence, and take the page only if its generation is
 *          that of the value
 *
 * A value that is there is true; none says nothing. So neither needs the journal: what a dead dedup has taken away or not
 * yet put there is asked of its successor. */
struct atoll_lookup_entry {
    uint64_t key;             /* atoll_lookup_key */
    uint64_t value;           /* 0: none; atoll_lookup_value */
};

enum atoll_lookup_kind {
    ATOLL_LOOKUP_NONE = 0,
    ATOLL_LOOKUP_PAGE = 1,
    ATOLL_LOOKUP_HOLE = 2,
    ATOLL_LOOKUP_PENDING = 3  /* dedup's own: to be put there after the commit */
};

/* Pages are numbered through: nic's, dedup's merge pages, disk's, llrrm's. */
struct atoll_lookup {
    uint64_t entries_address; /* of set_count sets of ATOLL_LOOKUP_WAYS entries: one cache line each; 0: none */
    uint64_t set_count;
    uint64_t generations_address; /* uint32_t per page */
    uint64_t page_count;
    uint64_t first[4];        /* page number from which on pages lie at address[], in sequence */
    uint64_t address[4];
    uint64_t zeros_address;
    uint64_t zeros_bytes;
};

/* Start of dedup's role area. `held` is read by nic after the death of all (its own tables start anew then) and by the
 * live checker: byte i is 1 while dedup's write log refers to page i of nic's buffers. */
struct atoll_dedup_public {
    struct atoll_volume volumes[256];
    uint64_t held_address;
    uint64_t held_count;
    struct atoll_lookup lookup;
    uint64_t posted_blocks;   /* of posted writes that may be on their way at once; 0: none is to be posted (SP-POST) */
    uint64_t crowded;         /* 1: dedup applies posted writes as fast as it destages: who would post more than these waits. A hint */
    uint64_t posted_adopted;  /* highest atoll_posted.order that was taken over after the death of all; transactional */
};

/* A posted write: its client has been answered (or is about to be), and dedup has perhaps not applied it yet. Its pages are nic's until
 * END. Only after the death of all does anybody but nic look at it: then dedup applies what it has not. */
struct atoll_posted {
    uint64_t order;           /* of the answers, from 1 on, over all runs; 0: none. Transactional; the rest is written before */
    uint64_t identity;
    uint64_t address;         /* whole blocks, one run of nic's pages */
    uint64_t offset;          /* in the volume, bytes */
    uint32_t length;
    uint32_t volume;
    uint32_t generation;
    uint32_t reserved_a;
    uint64_t reserved_b[2];
};

/* Pages that requests use which their owner has answered from memory (lookup.h). Not transactional: a use that was published and not
 * made use of holds its pages until nic is done with the slot, no more. */
struct atoll_uses {
    uint64_t used[32];        /* a bit per slot: only these need be looked at */
    uint64_t use[2048];       /* per slot: atoll_use, 0 none; in force while its sequence is the one after nic's done[slot] (SP-USE) */
    uint8_t touched[65536];   /* by number of the driver's page, modulo: changes from time to time while the page is read */
    uint32_t pages[135168];   /* ATOLL_USE_PAGES per slot: those that `use` counts */
};

/* Start of nic's role area. */
struct atoll_nic_public {
    uint32_t done[2048];      /* per slot: sequence of its last request that is finished for good (SP-DONE) */
    uint64_t posted_order;    /* transactional: the last one given */
    uint32_t posting;         /* not transactional. 1: posted writes may be on their way, or are just being posted (SP-POST) */
    uint32_t asking;          /* not transactional. 1: clients wait for reads that dedup is asked for, perhaps behind such. A hint */
    uint64_t reserved[6];
    struct atoll_posted posted[2048]; /* per slot */
    uint32_t ending[2048];    /* per connection, published after the commit: 1: nothing more is received from it */
    struct atoll_uses uses;
};

/* Start of nbd's role area. */
struct atoll_nbd_public {
    uint32_t volume[2048];    /* per connection: id + 1 of the volume it uses, 0 none. Transactional */
    uint32_t reserved[16];
    struct atoll_uses uses;
};
/* cffi:end */

#define ATOLL_COUNTERS_OFFSET 8192
#define ATOLL_SUSPECTS_OFFSET 12288
#define ATOLL_TRACE_OFFSET 16384
#define ATOLL_PAGE_BYTES 4096

_Static_assert(sizeof(struct atoll_descriptor) == 64, "a descriptor is one cache line");
_Static_assert(sizeof(struct atoll_segment) == 16, "segment");
_Static_assert(sizeof(struct atoll_trace_record) == 64, "trace record");
_Static_assert(sizeof(struct atoll_posted) == 64, "a posted write is one cache line");
_Static_assert(sizeof(struct atoll_ring_consumer) == 128, "consumer half");
_Static_assert(sizeof(struct atoll_ring_producer) == 128, "producer half");
_Static_assert(sizeof(struct atoll_arena_header) == 8192, "arena header");
_Static_assert(sizeof(struct atoll_volume) == 512, "volume");
_Static_assert(ATOLL_ROLE_COUNT == 16 && ATOLL_SLOT_COUNT == 2048 && ATOLL_CONNECTION_COUNT == 2048 &&
               ATOLL_VOLUME_NAME_BYTES == 256, "literals in the structures above");
_Static_assert(ATOLL_LOOKUP_WAYS * sizeof(struct atoll_lookup_entry) == 64, "a set is one cache line");
_Static_assert(sizeof(((struct atoll_uses *)0)->pages) == ATOLL_SLOT_COUNT * ATOLL_USE_PAGES * sizeof(uint32_t) &&
               ATOLL_USE_PAGES >= ATOLL_PART_BLOCKS, "a part's pages");
_Static_assert(ATOLL_COUNTER_COUNT * 8 <= 4096 && ATOLL_SUSPECT_COUNT * 16 <= 4096, "counters and suspects fit their page");

static inline uint64_t atoll_identity(uint32_t connection, uint32_t slot, uint32_t sequence)
{
    return (uint64_t)connection << 48 | (uint64_t)(slot & 0xffff) << 32 | sequence;
}
static inline uint32_t atoll_identity_connection(uint64_t identity) { return (uint32_t)(identity >> 48); }
static inline uint32_t atoll_identity_slot(uint64_t identity) { return (uint32_t)(identity >> 32) & 0xffff; }
static inline uint32_t atoll_identity_sequence(uint64_t identity) { return (uint32_t)identity; }

/* Of a block of a volume, 0 if such a block is not looked up: entries of a deleted volume fit no other's. */
static inline uint64_t atoll_lookup_key(uint32_t volume, uint32_t generation, uint64_t lba)
{
    return lba >> 40 != 0 ? 0 : (uint64_t)(generation & 0x7fff) << 48 | (uint64_t)(volume & 0xff) << 40 | lba | (uint64_t)1 << 63;
}
static inline uint64_t atoll_lookup_set(uint64_t key, uint64_t set_count)
{
    return (uint64_t)((unsigned __int128)(key * 0x9e3779b97f4a7c15u) * set_count >> 64);
}
static inline uint64_t atoll_lookup_value(uint32_t kind, uint32_t page, uint32_t generation)
{
    return (uint64_t)kind << 62 | (uint64_t)(page & 0x3fffffff) << 32 | generation;
}
static inline uint32_t atoll_lookup_kind(uint64_t value) { return (uint32_t)(value >> 62); }
static inline uint32_t atoll_lookup_page(uint64_t value) { return (uint32_t)(value >> 32) & 0x3fffffff; }
static inline uint32_t atoll_lookup_generation(uint64_t value) { return (uint32_t)value; }

/* A slot's use of `count` pages. Confirmed: all of them were there, the reply refers to them. */
static inline uint64_t atoll_use(uint32_t sequence, bool confirmed, uint32_t count)
{
    return (uint64_t)sequence << 32 | (uint64_t)confirmed << 31 | count;
}
static inline uint32_t atoll_use_sequence(uint64_t use) { return (uint32_t)(use >> 32); }
static inline bool atoll_use_confirmed(uint64_t use) { return use >> 31 & 1; }
static inline uint32_t atoll_use_count(uint64_t use) { return (uint32_t)use & 0x7fffffff; }
/* nic gives a slot's request the number after `done`. Another one's use is over, however long ago: one may stay published for 2^31 requests,
 * hours, if its owner sees none of these. */
static inline bool atoll_use_in_force(uint64_t use, uint32_t done) { return use != 0 && atoll_use_sequence(use) == done + 1; }

static inline uint64_t atoll_arena_address(uint32_t role)
{
    return (uint64_t)ATOLL_MAP_BASE + (uint64_t)role * (uint64_t)ATOLL_MAP_STRIDE;
}

#endif
