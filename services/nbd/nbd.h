/*
 * The NBD protocol service: what it keeps per connection and per request, and the interface to its Python.
 *
 *   nbd_attach      finds the state in the arena; after a crash, notes the request that the predecessor may have died of
 *   nbd_run         serves until Python is needed: a control message, or a frame of a negotiation
 *   nbd_frame       the frame that nbd_run stopped at (negotiation.py judges it)
 *   nbd_answer      answers that frame, in one transaction with the connection's new state
 *   nbd_volumes     the volumes as dedup publishes them
 *   nbd_parse, nbd_validate, nbd_code   the rules of a request, without any state
 *
 * READs of one part whose blocks lie in memory are answered without asking dedup (lookup.c).
 *
 * The role's area of the arena, in this order: struct nbd_area (public part first). A reply's headers and segment list
 * lie in the slot's nbd_reply; nic reads them until it has sent them, and only then is the slot used again.
 *
 * After a crash: every step is a transaction (ipc/transaction.h), so connections and slots are as after the last commit and
 * the messages of the step that was under way wait in their rings again. Replies are written to memory that no committed
 * message refers to. All that is private (struct nbd) are copies of the volumes' table and of the list of suspects.
 */
#ifndef ATOLL_NBD_NBD_H
#define ATOLL_NBD_NBD_H

#include "ipc/domain.h"
#include "ipc/lookup.h"
#include "services/nbd/protocol.h"

/* cffi:begin */
/* Bytes of headers and texts of one reply part: the largest is a part of NBD_PART_SEGMENTS alternating data and holes,
 * each with an extended header and 12 bytes; then an error text or NBD_EXTENT_COUNT extents fit as well. */
#define NBD_REPLY_BYTES 6144
/* Segments that dedup may return for a part: two for each block. */
#define NBD_PART_SEGMENTS 130
/* Extents of one BLOCK_STATUS reply; clients ask again for the rest. */
#define NBD_EXTENT_COUNT 376
/* Bytes of a text that explains an error, with its zero byte. */
#define NBD_TEXT_BYTES 384
/* Messages of one step. */
#define NBD_STEP_MESSAGES 64
/* A CACHE request is a hint: this many of its bytes are read ahead at most. */
#define NBD_CACHE_BYTES 33554432

enum nbd_connection_state {
    NBD_CONNECTION_FREE = 0,
    NBD_CONNECTION_GREETED = 1,      /* greeting sent, client flags expected */
    NBD_CONNECTION_OPTIONS = 2,
    NBD_CONNECTION_TRANSMISSION = 3,
    NBD_CONNECTION_DRAINING = 4,     /* DISC received, requests under way */
    NBD_CONNECTION_CLOSING = 5       /* nic was told to close it; nothing more is executed */
};

enum nbd_feature {
    NBD_FEATURE_FIXED = 1,           /* the client speaks fixed newstyle */
    NBD_FEATURE_NO_ZEROES = 2,
    NBD_FEATURE_STRUCTURED = 4,
    NBD_FEATURE_EXTENDED = 8,        /* implies structured chunks */
    NBD_FEATURE_ALLOCATION = 16,     /* base:allocation is selected for the export in use */
    NBD_FEATURE_UNTOLD = 32          /* came by EXPORT_NAME: knows no block size constraints */
};

/* What of a negotiation outlives a process; negotiation.State in Python. */
struct nbd_negotiation {
    uint32_t state;                  /* enum nbd_connection_state */
    uint32_t features;               /* enum nbd_feature */
    uint32_t meta_volume;            /* id + 1 of the volume that base:allocation was selected for, 0 none */
    uint32_t meta_generation;
    uint32_t list_next;              /* LIST under way: id of the next volume to name */
    uint32_t reserved;
};

struct nbd_connection {
    struct nbd_negotiation negotiation;
    uint32_t volume;                 /* id; from TRANSMISSION on */
    uint32_t generation;
    uint32_t in_flight;              /* requests whose last reply is still to be sent */
    uint32_t streaming;              /* simple replies: slot + 1 of the READ whose parts nothing may come between, 0 none */
    uint64_t disc_identity;          /* DRAINING: the DISC that is answered last */
    uint64_t requests;               /* accepted since the connection was opened */
    uint32_t waiting_first;          /* slot + 1 of the first of the replies that wait for `streaming` to end, 0 none */
    uint32_t waiting_last;
};

/* Numbered by hand: arenas outlive processes. */
enum nbd_slot_state {
    NBD_SLOT_FREE = 0,
    NBD_SLOT_DEDUP = 1,              /* part `part` is with dedup */
    NBD_SLOT_PAYLOAD = 2,            /* a WRITE waits for its next part: NEXT was sent */
    NBD_SLOT_SENDING = 3,            /* a READ waits for SENT(part) */
    NBD_SLOT_LISTING = 4,            /* an option's reply goes on after SENT(part) */
    NBD_SLOT_WAITING = 5             /* its reply is ready and waits for another one's end (nbd_connection.streaming) */
};

struct nbd_slot {
    uint64_t identity;
    uint32_t state;                  /* enum nbd_slot_state */
    uint32_t part;                   /* number of the current part; descriptors carry it modulo 65,536 */
    uint64_t done_bytes;             /* of the parts before the current one */
    uint32_t part_bytes;             /* of the current one */
    uint32_t features;               /* of the connection */
    uint64_t cookie;
    uint64_t offset;                 /* as received */
    uint64_t length;                 /* as received */
    uint64_t work_bytes;             /* to be done in parts: `length`, or less for a hint */
    uint16_t type;                   /* enum nbd_command */
    uint16_t flags;                  /* enum nbd_command_flag */
    uint32_t volume;
    uint32_t generation;
    uint32_t waiting_next;           /* WAITING: slot + 1 of the next one, 0 none */
    uint64_t reply_address;          /* WAITING: the reply's descriptor */
    uint32_t reply_length;
    uint16_t reply_segment_count;
    uint16_t reply_flags;
    uint64_t reserved[4];
};

struct nbd_reply {
    struct atoll_segment segments[160];
    uint8_t bytes[6144];
};

struct nbd_area {
    struct atoll_nbd_public public;
    uint32_t waiting;                /* slots in state WAITING: places in the ring to nic are kept for them */
    uint32_t reserved[15];
    struct nbd_connection connections[2048];
    struct nbd_slot slots[2048];
    struct nbd_reply replies[2048];
};

enum nbd_reason {
    NBD_REASON_FRAME = 16            /* nbd_frame tells which */
};

/* Names in services/nbd/__init__.py, in this order. */
enum nbd_counter {
    NBD_COUNTER_READS = 0,           /* one for each command, in the order of enum nbd_command */
    NBD_COUNTER_READ_BYTES = 8,
    NBD_COUNTER_WRITE_BYTES = 9,
    NBD_COUNTER_EPERM = 10,          /* errors told to clients, by code */
    NBD_COUNTER_EIO = 11,
    NBD_COUNTER_ENOMEM = 12,
    NBD_COUNTER_EINVAL = 13,
    NBD_COUNTER_ENOSPC = 14,
    NBD_COUNTER_EOVERFLOW = 15,
    NBD_COUNTER_ENOTSUP = 16,
    NBD_COUNTER_ESHUTDOWN = 17,
    NBD_COUNTER_OPENED = 18,         /* connections */
    NBD_COUNTER_CLOSED = 19,
    NBD_COUNTER_OPTIONS = 20,
    NBD_COUNTER_BAD_MAGIC = 21,
    NBD_COUNTER_POISONED = 22,       /* requests refused because they crashed this domain (I8) */
    NBD_COUNTER_STALE = 23,          /* messages that belong to nothing under way */
    NBD_COUNTER_PEER_FAULTS = 24,    /* messages that break the contract */
    NBD_COUNTER_STEPS = 25,
    NBD_COUNTER_MESSAGES = 26,
    NBD_COUNTER_READS_FROM_MEMORY = 27, /* answered without asking dedup */
    NBD_COUNTER_COUNT = 28
};

/* A request's header, decoded. */
struct nbd_request {
    uint64_t cookie;
    uint64_t offset;
    uint64_t length;
    uint16_t flags;
    uint16_t type;
    uint32_t has_payload;            /* 1: `length` bytes follow the header */
};

/* A frame of a negotiation. Valid until nbd_answer. */
struct nbd_frame {
    uint32_t connection;
    uint32_t opcode;                 /* ATOLL_OP_OPEN, ATOLL_OP_OPTION, or ATOLL_OP_SENT: LIST goes on */
    uint32_t header_bytes;           /* 4: client flags; 16: an option */
    uint32_t data_bytes;             /* as delivered: 0 if the header announces more than nic takes */
    const uint8_t *data;             /* in nic's arena: copy, then look */
    uint8_t header[16];
    struct nbd_negotiation negotiation;
};

struct nbd_answer {
    struct nbd_negotiation negotiation; /* to be kept */
    uint32_t framing;                /* enum atoll_framing */
    uint32_t close;                  /* 1: the connection is closed when the bytes are sent */
    uint32_t more;                   /* 1: another SENT frame is wanted, the reply goes on */
    uint32_t length;                 /* of `data`, at most NBD_REPLY_BYTES */
    const uint8_t *data;
    uint32_t volume;                 /* state TRANSMISSION: id and generation */
    uint32_t generation;
};

struct nbd; /* private to the process */

/* `domain` is open and stays the caller's. `previous_signal`: that ended the predecessor, 0 unknown. `reset`: 1 if nothing that
 * the area tells of exists any more. Not in a transaction. Aborts if the arena is too small; NULL: out of memory. */
struct nbd *nbd_attach(struct atoll_domain *domain, int previous_signal, int reset);
void nbd_detach(struct nbd *nbd);
uint64_t nbd_area_bytes(void);

/* Returns enum atoll_reason or enum nbd_reason. Sleeps when there is nothing to do. */
int nbd_run(struct nbd *nbd);
/* The frame that nbd_run returned NBD_REASON_FRAME for; NULL if there is none. */
const struct nbd_frame *nbd_frame(struct nbd *nbd);
/* Answers it and commits. Must follow each NBD_REASON_FRAME, unless nbd_postpone does. */
void nbd_answer(struct nbd *nbd, const struct nbd_answer *answer);
/* It cannot be answered now (nbd_volumes returned -1): leaves it in the ring, waits a moment or for other messages. */
void nbd_postpone(struct nbd *nbd);

/* Copies the READY volumes, in the order of their ids, to `volumes` (ATOLL_VOLUME_COUNT places). Returns how many, or -1 if the
 * table is being changed by a dedup that does not finish: try again later. */
int nbd_volumes(struct nbd *nbd, struct atoll_volume *volumes);
struct nbd_area *nbd_area(struct nbd *nbd);

/* Decodes a header of 28 bytes, or of 32 if `features` has EXTENDED. 0, or -1: not a request's magic. */
int nbd_parse(const uint8_t *header, uint32_t features, struct nbd_request *request);
/* enum atoll_status for a request on a volume of that size; `text` (NBD_TEXT_BYTES) says which rule is broken. */
int nbd_validate(const struct nbd_request *request, uint32_t features, uint64_t size_bytes, int read_only,
                 const char *volume_name, char *text);
/* enum nbd_error for an enum atoll_status other than ATOLL_OK. Total: what is unknown is EIO. */
uint32_t nbd_code(uint32_t status);
/* Bytes of the part of a request before which parts of `done_bytes` were: parts end where the volume's bytes, counted from
 * the first block touched, reach a multiple of `unit`. */
uint64_t nbd_part_bytes(uint64_t offset, uint64_t work_bytes, uint64_t done_bytes, uint64_t unit);
/* cffi:end */

/* A copy of one volume, good while its version is the one in the table. */
struct nbd_volume {
    uint32_t known;     /* 1: the rest is set */
    char name[257];     /* with its zero byte, for texts */
    struct atoll_volume copy;
};

struct nbd {
    struct atoll_domain *domain;
    struct nbd_area *area;
    struct atoll_suspect *suspects;
    uint32_t suspect_count;          /* of entries in use */
    uint32_t taken;                  /* messages of the last step */
    uint32_t alone;                  /* nic had one message at most for the last step */
    uint32_t stalled;                /* the last step found no room for what a message may cause */
    uint32_t unstable;               /* the volume table could not be read; nic's messages wait for a moment */
    uint32_t framed;                 /* 1: `frame` and `message` wait for nbd_answer */
    struct nbd_frame frame;
    struct atoll_descriptor message; /* of `frame`, still in the ring */
    struct atoll_looker looker;
    struct nbd_volume volumes[ATOLL_VOLUME_COUNT];
};

enum nbd_look { NBD_LOOK_READY = 0, NBD_LOOK_GONE = 1, NBD_LOOK_UNSTABLE = 2 };

static inline bool nbd_uses_chunks(const struct nbd_slot *slot)
{
    return (slot->features & (NBD_FEATURE_STRUCTURED | NBD_FEATURE_EXTENDED)) != 0;
}

/* --- request.c --- */
const char *nbd_command_name(uint32_t type);
/* Why part of an accepted request failed; `place` is words[0] of dedup's answer. */
void nbd_explain(const struct nbd_slot *slot, uint32_t status, uint64_t place, uint64_t offset, const char *volume_name, char *text);

/* --- volumes.c --- */
/* The volume as published now. It is read again only if its version has changed. */
enum nbd_look nbd_look(struct nbd *nbd, uint32_t id, uint32_t generation, const struct atoll_volume **volume);
/* Its name for texts, "" if it cannot be had. Valid until the table is looked at again. */
const char *nbd_volume_name(struct nbd *nbd, uint32_t id, uint32_t generation);

/* --- lookup.c --- */
/* Data of the READ in `slot`, whose length is not 0: at most ATOLL_PART_BLOCKS segments in `data`, whose pages stay until nic is
 * done with the slot. False: dedup must be asked. */
bool nbd_lookup(struct nbd *nbd, const struct nbd_slot *slot, struct atoll_segment *data, uint32_t *count);

/* --- reply.c --- Each fills address, length and segment_count of `message` with what is to be sent. */
void nbd_reply_success(const struct nbd_slot *slot, struct nbd_reply *reply, struct atoll_descriptor *message);
/* `with_offset`: the error is known to begin at `offset`, which lies within the request. */
void nbd_reply_error(const struct nbd_slot *slot, struct nbd_reply *reply, uint32_t status, const char *text, int with_offset,
                     uint64_t offset, struct atoll_descriptor *message);
/* The current part of a READ. `data` is a private copy of dedup's segments. */
void nbd_reply_read(const struct nbd_slot *slot, struct nbd_reply *reply, const struct atoll_segment *data, uint32_t count,
                    int last, struct atoll_descriptor *message);
/* `extents` is a private copy; at least one has a length. */
void nbd_reply_extents(const struct nbd_slot *slot, struct nbd_reply *reply, const struct atoll_extent *extents, uint32_t count,
                       struct atoll_descriptor *message);

_Static_assert(sizeof(struct nbd_negotiation) == 24, "negotiation");
_Static_assert(sizeof(struct nbd_connection) == 64, "a connection is one cache line");
_Static_assert(sizeof(struct nbd_slot) == 128, "a slot is two cache lines");
_Static_assert(ATOLL_REPLY_SEGMENTS == 160 && ATOLL_SLOT_COUNT == 2048 && ATOLL_CONNECTION_COUNT == 2048, "literals above");
_Static_assert(NBD_PART_SEGMENTS == 2 * ATOLL_PART_BLOCKS && NBD_PART_SEGMENTS + 2 <= ATOLL_REPLY_SEGMENTS,
               "headers between the data of a part have their segments");
_Static_assert(NBD_PART_SEGMENTS * (32 + 12) <= NBD_REPLY_BYTES && 32 + 8 + NBD_EXTENT_COUNT * 16 <= NBD_REPLY_BYTES &&
                   32 + 14 + NBD_TEXT_BYTES <= NBD_REPLY_BYTES,
               "the largest replies fit");
_Static_assert(NBD_CACHE_BYTES % ATOLL_PART_BYTES == 0, "a hint's parts");
_Static_assert(ATOLL_PART_BYTES - ATOLL_BLOCK_BYTES >= 65536, "an unaligned READ of 65,536 bytes is one part (flag DF)");

#endif
