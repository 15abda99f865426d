/*
 * The NIC driver: moves bytes between sockets and the arena, cuts them into frames, gathers replies.
 *
 * Role area of the arena (struct nic_area, then):
 *
 *   0                struct atoll_nic_public     done[] per slot (SP-DONE), posted writes, pages in use
 *   then             struct nic_area             connections, slots, own buffers
 *   chunks_offset    struct nic_chunk[]          who has which payload page (pages.c)
 *   segments_offset  struct atoll_segment[]      three lists per slot, for parts in turn
 *   streams_offset   64 KiB stream buffers       bytes received and not yet parsed
 *
 * The buffer area of the arena holds the payload pages, in chunks of 16.
 *
 * Two kinds of state. What is in the arena changes only through the journal. `struct nic` is private to the process and
 * holds what can be made again from the arena: free lists, ready lists, guesses about readiness.
 *
 * Everything that a step frees (slots, pages, stream buffers, connection numbers) can be taken again only after the
 * commit of that step (`nic_commit`), so a rolled back step finds what it freed untouched.
 *
 * A socket operation is: intent (sequence, what, where) committed; operation; outcome applied and committed; only then
 * is the outcome taken out of the completion queue. One operation per connection and kind is pending at a time, and all
 * end within io_uring_enter.
 *
 * After a crash: `nic_open` of the successor applies the outcomes that stand in the completion queue, clears the
 * intents that have none (they did not happen), and makes the private half again.
 */
#ifndef ATOLL_NIC_NIC_H
#define ATOLL_NIC_NIC_H

#include <sys/uio.h>

#include "drivers/nic/framing.h"
#include "ipc/crashpoint.h"
#include "ipc/domain.h"
#include "ipc/lookup.h"
#include "ipc/uring.h"

/* cffi:begin */
/* Pages of a chunk: 64 KiB, so that large payloads lie in few runs. */
#define NIC_CHUNK_PAGES 16
/* A connection holds a stream buffer only while it receives or has unparsed bytes; without one it uses its own small buffer. */
#define NIC_STREAM_BYTES 65536
#define NIC_STREAM_COUNT 128
/* Two halves of 128 bytes: a partial header (32 at most) and room to receive. */
#define NIC_OWN_BYTES 256
/* A reply that says "done" and no more, at most. */
#define NIC_ANSWER_BYTES 64
/* Slots kept for connections that have none. */
#define NIC_KEPT_SLOTS 256
/* Longest option data that is delivered; a chunk. Longer options are delivered without data. */
#define NIC_OPTION_BYTES 65536
/* Data of an option so short (a volume's name and a query of metadata contexts are 300) have a place of their connection's, and need no page. */
#define NIC_SHORT_OPTION_BYTES 512
/* Listeners at most. */
#define NIC_LISTENER_COUNT 16
/* Segments of a part at most: one per page. */
#define NIC_PART_SEGMENTS 65
/* Lists of segments per slot: the part that nbd has, the one being received, and one that a step may have given up: it is
 * not written before that step is committed. */
#define NIC_PART_LISTS 3

/* Order of COUNTERS in __init__.py. */
enum nic_counter {
    NIC_ACCEPTED = 0,
    NIC_CLOSED = 1,
    NIC_REQUESTS = 2,          /* and options: delivered to nbd, or answered here */
    NIC_REPLIES = 3,           /* replies that went into a socket whole */
    NIC_RECEIVED_BYTES = 4,
    NIC_SENT_BYTES = 5,
    NIC_COPIED_INSIDE_BYTES = 6,
    NIC_RECEIVE_OPERATIONS = 7,
    NIC_SEND_OPERATIONS = 8,
    NIC_EMPTY_RECEIVES = 9,    /* receives that found nothing */
    NIC_SUBMITS = 10,
    NIC_WAITS = 11,
    NIC_TURNS = 12,
    NIC_PAGE_WAITS = 13,       /* a payload had to wait for pages */
    NIC_SLOT_WAITS = 14,       /* a frame had to wait for a slot, or for its share of what replies may hold */
    NIC_BAD_GIVE_BACK = 15,    /* refused: not lent, or no such page */
    NIC_BAD_MESSAGE = 16,      /* refused: unknown identity or out of turn */
    NIC_BAD_REFERENCE = 17,    /* reply outside of all arenas: connection dropped */
    NIC_HANDSHAKE_TIMEOUTS = 18,
    NIC_PAYLOAD_TIMEOUTS = 19,
    NIC_REPLY_TIMEOUTS = 20,
    NIC_IDLE_TIMEOUTS = 21,
    NIC_RECOVERED_OUTCOMES = 22, /* outcomes found in the completion queue at a takeover */
    NIC_ACCEPT_FAILURES = 23,
    NIC_SOCKET_ERRORS = 24,
    NIC_POISONED = 25,         /* connections dropped because a request or an outcome of theirs crashed nic twice */
    NIC_LOST_MESSAGES = 26,    /* a ring of the contract's size was full: a peer's index is wrong */
    NIC_COURTESY_ENDED = 27,   /* somebody computes on the processor: courtesy.c */
    NIC_LATENCY_REQUESTS = 28, /* times that the processors were asked to stay awake: latency.c */
    NIC_PAUSES = 29,           /* for a client that has replies to read: coalesce.c */
    NIC_HELD = 30,             /* times that a client sent while nic held the processor: ipc/spin.h */
    NIC_GUESSED = 31,          /* receives without asking epoll that brought something: guess.c */
    NIC_POSTED = 32,           /* writes answered before dedup has applied them: posted.c */
    NIC_READS_FROM_MEMORY = 33, /* READs answered out of dedup's table: answer.c */
    NIC_BYTES_FROM_MEMORY = 34, /* of these */
    NIC_POSTED_BYTES = 35,
    NIC_POSTED_WAITS = 36,     /* a write had to wait until others that had been posted were applied */
    NIC_READS_ASKED = 37,      /* READs answered with what dedup had been asked for: answer.c */
    NIC_BYTES_ASKED = 38,      /* of these */
    NIC_COUNTER_COUNT = 39
};

enum nic_phase {
    NIC_FREE = 0,
    NIC_ACCEPTING = 1,
    NIC_OPEN = 2,
    NIC_ENDING = 3,    /* nothing more is received; replies are still sent */
    NIC_LINGER = 4,    /* all sent, FIN sent; what comes is thrown away until the peer closes, bounded */
    NIC_GONE = 5,      /* socket closed or to be closed; replies are swallowed */
    NIC_REPORTED = 6   /* CLOSED is sent to nbd */
};

enum nic_receive_state {
    NIC_RX_HEADER = 0,  /* next bytes are a header */
    NIC_RX_PAGES = 1,   /* receive_slot's part needs pages */
    NIC_RX_PAYLOAD = 2, /* next bytes belong into receive_slot's pages */
    NIC_RX_PART = 3,    /* receive_slot's part is complete and waits for nbd's NEXT */
    NIC_RX_DISCARD = 4, /* discard_bytes are thrown away */
    NIC_RX_HOLD = 5,    /* nothing is parsed before receive_slot's REPLY */
    NIC_RX_END = 6      /* nothing is received any more */
};

/* Kinds of operations on a connection's socket; numbers stand in user_data. */
enum nic_operation {
    NIC_RECEIVE = 0,
    NIC_SEND = 1,
    NIC_LIFE = 2,       /* accept or close, by phase */
    NIC_OPERATION_KINDS = 3,
    NIC_DESCRIPTOR = 3, /* a temporary descriptor; without intent, means nothing to a successor */
    NIC_POLL = 5,       /* readiness; without intent */
    NIC_DRAIN = 4       /* receive into nowhere; without intent, harmless */
};

/* A connection. Words changed through the journal but for those marked. */
struct nic_connection {
    uint32_t phase;
    uint32_t framing;             /* enum atoll_framing */
    uint32_t receive_state;
    uint32_t receive_slot;        /* slot + 1, 0 none */
    uint64_t window;              /* unparsed bytes: nic_window_make */
    uint64_t discard_bytes;
    uint32_t outstanding;         /* slots in use */
    uint32_t send_head;           /* slot + 1 of the reply being sent */
    uint32_t send_tail;
    uint32_t send_offset;         /* bytes of it in the socket */
    uint32_t operation[4];        /* per kind: sequence << 1 | pending; the last is unused */
    uint32_t socket_open;         /* 1: the ring's file table holds a socket */
    uint32_t announced;           /* 1: nbd knows the connection */
    uint32_t end_of_stream;       /* 1: the peer sends nothing more */
    uint32_t listener;
    uint32_t held_slot;           /* slot + 1 whose reply waits until the rest of its payload is thrown away, 0 none */
    uint32_t streaming;           /* slot + 1 of the reply of several parts that no other may come between, 0 none */
    /* Not journaled: statistics and clocks (CLOCK_MONOTONIC). */
    uint64_t accepted_ns;         /* in negotiation later by the time in which nbd had the word, or pages were waited for */
    uint64_t received_ns;         /* last progress in receiving */
    uint64_t sent_ns;             /* last progress in sending, or when there was first something to send */
    uint64_t received_bytes;
    uint64_t sent_bytes;
    uint64_t requests;
    uint32_t address_length;
    uint8_t address[28];          /* struct sockaddr of the peer, cut */
    /* Clocks as above. */
    uint64_t part_ns;             /* when the part being received got its pages */
    uint64_t head_ns;             /* when the reply being sent became the first */
    /* From the answer that began transmission, journaled. */
    uint32_t volume;              /* id + 1: nic may answer for it (posted.c, answer.c), 0 none */
    uint32_t generation;
    uint32_t mixes;               /* 1: replies may come between the parts of another one */
    uint8_t reserved[60];
};

enum nic_slot_state { NIC_SLOT_FREE = 0, NIC_SLOT_OPEN = 1, NIC_SLOT_OPTION = 2, NIC_SLOT_REQUEST = 3, NIC_SLOT_CLOSED = 4 };
enum nic_slot_flag {
    NIC_SLOT_DELIVERED = 1, /* nbd knows it, or it is ASKED */
    NIC_SLOT_WANTED = 2,    /* nbd waits for the next part */
    NIC_SLOT_LENT = 4,      /* nbd has part `lent_part` */
    NIC_SLOT_COMPLETE = 8,  /* part `part` is received */
    NIC_SLOT_ABORTED = 16,  /* no more payload will come */
    NIC_SLOT_QUEUED = 32,   /* its reply is in the send queue */
    NIC_SLOT_ANSWERED = 64, /* nbd sent LAST */
    NIC_SLOT_POSTED = 128,  /* and END is still to come: the part stays lent until then */
    NIC_SLOT_ASKED = 256    /* dedup was asked, and nbd does not know it */
};

struct nic_slot {
    uint32_t state;
    uint32_t sequence;
    uint32_t connection;
    uint32_t flags;
    uint64_t volume_offset;    /* of the request, for the place of bytes in pages */
    uint32_t payload_bytes;
    uint32_t payload_received;
    uint32_t part;             /* being received */
    uint32_t part_begin;       /* payload bytes before it */
    uint32_t lent_part;
    uint32_t next;             /* send queue: slot + 1 */
    uint32_t segments[3];      /* of each list; part n uses list n % 3 */
    uint32_t part_bytes[3];
    uint64_t reply_address;
    uint32_t reply_length;
    uint16_t reply_segments;
    uint8_t reply_flags;
    uint8_t reply_pages;       /* of others, that its reply may refer to */
    uint16_t reply_part;
    uint8_t reserved[6];
    uint8_t header[32];
};

/* Who has the pages of a chunk: four masks of 16 bits, free | lent << 16 | taken << 32 | early << 48. No bit: a slot's
 * own. lent: nbd was told of it. taken: dedup's. early: lent and given back before nbd said that it was taken. */
struct nic_chunk {
    uint64_t masks;
};

struct nic_area {
    uint64_t page_count;
    uint64_t chunk_count;
    uint64_t chunks_offset;   /* from the start of the role area */
    uint64_t segments_offset;
    uint64_t streams_offset;
    uint64_t role_bytes;
    uint32_t stopping;
    uint32_t engine;          /* enum nic_engine_kind */
    uint64_t formed;          /* instance (atoll_arena_header) that made the tables, 0: none yet */
    uint64_t stop_call;       /* number of the control call "stop" that waits for its answer, 0 none */
    struct nic_connection connections[2048];
    struct nic_slot slots[2048];
    uint8_t own[524288];      /* NIC_OWN_BYTES per connection */
    uint8_t answers[131072];  /* NIC_ANSWER_BYTES per slot: of posted writes, and headers of READs answered from memory */
    uint8_t options[1048576]; /* NIC_SHORT_OPTION_BYTES per connection */
};

enum nic_engine_kind { NIC_ENGINE_URING = 1, NIC_ENGINE_SOCKETS = 2 };

struct nic_limits {
    uint32_t max_connections;
    uint32_t requests_per_connection;
    uint64_t reply_pages;     /* that replies of all connections may refer to; half as many again are kept for those without */
    uint64_t handshake_ns;
    uint64_t payload_ns;
    uint64_t reply_ns;
    uint64_t idle_ns;         /* 0: none */
    uint64_t crowded_ns;      /* how long one may keep, and not move, what others lack */
};

struct nic_status {
    uint32_t connections;
    uint32_t slots_in_use;
    uint32_t streams_in_use;
    uint32_t waiting_for_pages;
    uint32_t waiting_for_slots;
    uint32_t stopping;
    uint64_t pages;
    uint64_t pages_free;
    uint64_t pages_lent;
    uint64_t pages_taken;
    uint32_t latency_held;     /* 1: the processors are asked to stay awake */
    uint32_t latency_error;    /* errno of the request that failed, after which none is made; 0 none */
};

struct nic_options {
    uint32_t engine;           /* enum nic_engine_kind */
    uint32_t previous_signal;
    int32_t uring_fd;
    uint32_t poll_in_ring;     /* do as on a kernel without IORING_OP_FIXED_FD_INSTALL */
    uint32_t courtesy;         /* 1: clients on the own processor are not interrupted (courtesy.c) */
    int32_t latency_fd;        /* for the CPU latency request (latency.c), -1: none */
    int32_t latency_us;
    uint32_t listener_count;
    int32_t listeners[16];
};

struct nic;

uint64_t nic_role_bytes(uint64_t buffer_bytes);
/* Recovers and returns the driver's private half, or NULL with the reason in `error` (256 bytes). */
struct nic *nic_open(struct atoll_domain *domain, const struct nic_limits *limits, const struct nic_options *options,
                     const struct atoll_uring_parameters *parameters, char *error);
void nic_close(struct nic *nic);
/* Serves until Python is needed (enum atoll_reason). `until_ns`: returns 0 at that time (CLOCK_MONOTONIC), 0 = never.
 * `ignore_control`: control messages do not end it. */
int nic_run(struct nic *nic, uint64_t until_ns, int ignore_control);
/* Accepts nothing more; connections end when their requests are answered. */
void nic_stop(struct nic *nic, uint64_t call);
uint64_t nic_stop_call(const struct nic *nic);
/* Connections that are not free. */
uint32_t nic_connections(const struct nic *nic);
void nic_get_status(const struct nic *nic, struct nic_status *status);
/* Connection `index` of the table; copies, false if it is free. */
bool nic_get_connection(const struct nic *nic, uint32_t index, struct nic_connection *connection);
/* Checks the arena against itself: every page has one owner, every queue its slots. 0, or -1 with the first difference
 * in `error` (256 bytes). For tests and the live checker. */
int nic_check(const struct nic *nic, char *error);
/* cffi:end */

_Static_assert(sizeof(struct nic_connection) == 256, "connection");
_Static_assert(sizeof(struct nic_slot) == 128, "slot");
_Static_assert(NIC_OWN_BYTES * ATOLL_CONNECTION_COUNT == 524288, "own buffers");
_Static_assert(NIC_ANSWER_BYTES * ATOLL_SLOT_COUNT == 131072, "answers");
_Static_assert(NIC_SHORT_OPTION_BYTES * ATOLL_CONNECTION_COUNT == 1048576, "short options");
_Static_assert(NIC_OPTION_BYTES == NIC_CHUNK_PAGES * ATOLL_BLOCK_BYTES, "option data is one run");
_Static_assert(NIC_KEPT_SLOTS < ATOLL_SLOT_COUNT / 2, "more for use than kept");
_Static_assert(NIC_PART_SEGMENTS >= ATOLL_PART_BLOCKS, "a segment per page of a part");

/* --- Private to the process -------------------------------------------------------------------------------------- */

/* Words of the journal at which a step takes up nothing new; the rest is for what it has begun. */
#define NIC_JOURNAL_LIMIT (ATOLL_JOURNAL_ENTRIES / 2)
/* Messages that one turn may send to nbd, operations it may start, and their vectors. */
#define NIC_TURN_MESSAGES 256
#define NIC_TURN_OPERATIONS 128
#define NIC_TURN_VECTORS 8192
#define NIC_SEND_VECTORS 1024
/* Bytes of one send: bounds the time of a turn. */
#define NIC_SEND_BYTES 1048576
/* From this payload on, the next header is received alone, so that the payload lands in its pages at once. */
#define NIC_DIRECT_BYTES 16384
#define NIC_HEADER_WINDOW 1024
/* Turns between two looks at epoll while there is work. */
#define NIC_TURNS_PER_LOOK 16
/* The slot of a suspect (I8) that is an outcome, not a request. */
#define NIC_NO_SLOT ATOLL_SLOT_COUNT
#define NIC_LINGER_NS 1000000000u
/* Who holds pages moves at least so many bytes in payload_ns: by default 64 KiB in 30 s, 2.2 KB/s, below what any link does
 * that is meant to carry a block device. */
#define NIC_SLOW_BYTES 65536
/* Who has waited so long for what others hold is one for whom time is counted (crowded_ns): a log that fills and empties is
 * none. */
#define NIC_CROWDED_AFTER_NS 1000000000u
#define NIC_RETRY_NS 100000000u
/* A nic that looks at a deadline so much later than it was, was stopped meanwhile. */
#define NIC_LATE_NS 1000000000u
/* At epoll, which tells of 64 sockets at a time, before connections are dropped. */
#define NIC_MOST_LOOKS (ATOLL_CONNECTION_COUNT / 64 + 1)
/* So many sends in a row that found room: the socket is not watched for room any more. Watching costs the client a look at our
 * sleep with each reply that it reads, and us a wake-up. */
#define NIC_EASY_SENDS 1000

/* FIFO of connection numbers; each is in it once at most. */
struct nic_queue {
    uint32_t head, tail;
    uint16_t items[ATOLL_CONNECTION_COUNT];
    uint8_t member[ATOLL_CONNECTION_COUNT];
};

static inline bool nic_queue_empty(const struct nic_queue *queue) { return queue->head == queue->tail; }
static inline uint32_t nic_queue_count(const struct nic_queue *queue) { return queue->tail - queue->head; }
static inline void nic_queue_add(struct nic_queue *queue, uint32_t connection)
{
    if (queue->member[connection])
        return;
    queue->member[connection] = 1;
    queue->items[queue->tail++ % ATOLL_CONNECTION_COUNT] = (uint16_t)connection;
}
static inline uint32_t nic_queue_first(const struct nic_queue *queue) { return queue->items[queue->head % ATOLL_CONNECTION_COUNT]; }
static inline uint32_t nic_queue_take(struct nic_queue *queue)
{
    uint32_t connection = nic_queue_first(queue);
    queue->head++;
    queue->member[connection] = 0;
    return connection;
}

/* What is guessed or remembered of a connection. */
struct nic_hint {
    bool readable, writable;   /* until the socket says otherwise */
    bool hangup;               /* the peer's end was seen in epoll, which does not tell it twice: read until it comes */
    bool registered;           /* in this process's epoll set */
    bool blocks;               /* a send did not find room lately: epoll shall say when there is some */
    bool blocks_watched;       /* and has been told to */
    uint16_t easy_sends;       /* that found room, since one did not */
    bool want_shutdown;
    bool descriptor_pending, drain_pending;
    bool speculate;            /* the last receive after a send found something */
    uint8_t speculation_turn;
    bool large;                /* the last payload was large */
    uint32_t asked;            /* bytes that the pending receive asked for; 0 unknown */
    uint32_t asked_send;
    uint32_t reply_pages;      /* of its slots */
    uint32_t posted;           /* of its slots: answered, END to come; they count for none of its limit */
    uint32_t asked_reads;      /* of its slots: NIC_SLOT_ASKED */
    uint64_t linger_until_ns;
    uint64_t poll;             /* user_data of its poll in the ring */
};

struct nic_outcome {
    uint64_t user_data;
    int32_t result;
    uint32_t flags;            /* of the completion */
};

/* See courtesy.c. */
struct nic_courtesy {
    int schedstat;             /* -1: cannot be read */
    uint64_t next_ns;          /* when to look again; UINT64_MAX: never */
    uint64_t since_ns;         /* courteous since */
    uint64_t again_ns;         /* not before */
    uint64_t patience_ns;
    uint64_t waited_ns, turns; /* as last read */
};

/* See guess.c. */
struct nic_guess {
    uint32_t connection;       /* replied to last, with nothing left to send */
    bool due;                  /* nic has not looked for its next request yet */
    bool made;                 /* a receive is intended or under way */
    struct atoll_luck luck;
};

/* See coalesce.c. */
struct nic_coalesce {
    uint64_t replies;          /* NIC_REPLIES as it was at since_ns */
    uint64_t received_bytes;   /* at the last look */
    uint64_t since_ns;
    struct atoll_luck luck;
    bool paused;               /* at the last look: what has come by now tells whether that was worth it */
};

/* See latency.c. */
struct nic_latency {
    bool held;
    int error;
    uint64_t requests;         /* NIC_REQUESTS as it was at since_ns */
    uint64_t since_ns;
};

struct nic_pages;
struct nic_engine;

/* Blocks that posted writes are on their way to, by a hash of twelve bits (posted.c). */
#define NIC_POSTED_BUCKETS 4096
struct nic_posted_set {
    uint32_t blocks;
    uint16_t buckets[NIC_POSTED_BUCKETS];
};

struct nic {
    struct atoll_domain *domain;
    struct atoll_journal *journal;
    struct atoll_nic_public *public;
    struct nic_area *area;
    struct nic_chunk *chunks;
    struct atoll_segment *segments;
    uint8_t *streams;
    uint8_t *buffers;          /* payload pages */
    struct nic_limits limits;
    struct nic_options options;
    const struct nic_engine *engine;
    struct atoll_uring uring;
    bool poll_in_ring;         /* engine_uring: readiness by polls in the ring, not by epoll */
    bool submission_needed;
    bool ring_ready;
    uint16_t accept_flags;
    uint32_t completions_seen; /* applied, not yet taken out of the completion queue */
    int epoll;
    struct nic_sockets *sockets; /* engine_sockets */

    struct nic_courtesy courtesy;
    struct nic_latency latency;
    struct nic_coalesce coalesce;
    struct nic_guess guess;
    struct nic_pages *pages;
    struct nic_queue work;     /* connections to look at */
    struct nic_queue page_waiters;
    struct nic_queue slot_waiters;
    struct nic_queue post_waiters;
    struct nic_hint hints[ATOLL_CONNECTION_COUNT];

    uint64_t reply_pages;      /* of all slots */
    uint32_t posted;           /* slots that are answered, and whose END is to come */
    struct nic_posted_set posted_set; /* their blocks */
    struct atoll_looker looker;
    uint32_t posted_most;      /* that there may be of them, as looked up since the last commit */
    bool posted_looked;
    uint32_t posted_in_step;   /* slots that were posted since then */
    uint32_t asked_reads;      /* slots that it is being asked for */
    uint32_t free_slot_count, free_connection_count, free_stream_count;
    uint16_t free_slots[ATOLL_SLOT_COUNT];
    uint16_t free_connections[ATOLL_CONNECTION_COUNT];
    uint16_t free_streams[NIC_STREAM_COUNT];
    /* Freed in this step. */
    uint32_t freed_slot_count, freed_connection_count, freed_stream_count, ended_count;
    uint16_t freed_slots[ATOLL_SLOT_COUNT];
    uint16_t freed_connections[ATOLL_CONNECTION_COUNT];
    uint16_t freed_streams[NIC_STREAM_COUNT];
    uint16_t ended[ATOLL_CONNECTION_COUNT]; /* no longer OPEN; each once at most */

    bool recovering;           /* outcomes applied are the predecessor's */
    bool listener_ready[NIC_LISTENER_COUNT];
    uint32_t accept_batch[NIC_LISTENER_COUNT];
    uint64_t accept_retry_ns;

    /* Of the turn. */
    uint64_t now_ns;
    uint32_t message_budget;
    uint32_t operation_count;  /* started and without outcome */
    uint32_t vector_count;
    uint32_t message_count;
    struct iovec vectors[NIC_TURN_VECTORS];
    struct msghdr messages[NIC_TURN_OPERATIONS];
    struct nic_outcome outcomes[NIC_TURN_OPERATIONS * 2];
    uint32_t turns_since_look;
    uint64_t replies_at_spin;            /* the counter when it began to spin or sleep */
    struct atoll_spin peer_spin, client_spin; /* requests are under way with nbd or dedup; none is */
    uint64_t next_deadline_ns; /* no timeout can fire before; UINT64_MAX none */
    uint8_t *scratch;          /* NIC_STREAM_BYTES: what is drained */
};

/* Where a connection's unparsed bytes lie. buffer: 0, 1 halves of its own, 2 + n stream buffer n. */
struct nic_window {
    uint32_t buffer, begin, end;
};

static inline uint64_t nic_window_make(struct nic_window window)
{
    return (uint64_t)window.buffer << 48 | (uint64_t)window.begin << 24 | window.end;
}
static inline struct nic_window nic_window_of(uint64_t word)
{
    return (struct nic_window){.buffer = (uint32_t)(word >> 48), .begin = (uint32_t)(word >> 24) & 0xffffff, .end = (uint32_t)word & 0xffffff};
}

static inline uint32_t nic_index(const struct nic *nic, const struct nic_connection *connection)
{
    return (uint32_t)(connection - nic->area->connections);
}
static inline uint64_t nic_identity(const struct nic *nic, const struct nic_slot *slot)
{
    return atoll_identity(slot->connection, (uint32_t)(slot - nic->area->slots), slot->sequence);
}
static inline struct atoll_segment *nic_segments(const struct nic *nic, const struct nic_slot *slot, uint32_t part)
{
    return nic->segments + ((uint64_t)(slot - nic->area->slots) * NIC_PART_LISTS + part % NIC_PART_LISTS) * NIC_PART_SEGMENTS;
}
/* Its data do not lie in pages. */
static inline bool nic_is_short_option(const struct nic_slot *slot)
{
    return slot->state == NIC_SLOT_OPTION && slot->payload_bytes <= NIC_SHORT_OPTION_BYTES;
}
static inline void nic_schedule(struct nic *nic, uint32_t connection) { nic_queue_add(&nic->work, connection); }
static inline void nic_deadline(struct nic *nic, uint64_t at_ns)
{
    if (at_ns < nic->next_deadline_ns)
        nic->next_deadline_ns = at_ns;
}
static inline void nic_set32(struct nic *nic, uint32_t *word, uint32_t value)
{
    if (*word != value)
        atoll_set32(nic->journal, word, value);
}

/* pages.c */
struct nic_pages *nic_pages_make(struct nic *nic);
void nic_pages_free(struct nic_pages *pages);
uint64_t nic_pages_available(const struct nic *nic);
/* `count` pages as runs; returns the number of segments (lengths in whole pages), 0 if there are not enough. */
uint32_t nic_pages_take(struct nic *nic, uint32_t count, bool contiguous, struct atoll_segment *segments);
enum nic_page_change { NIC_PAGE_FREE, NIC_PAGE_LEND, NIC_PAGE_TAKEN };
/* All pages of the slot's part. NIC_PAGE_TAKEN frees those that were given back early. */
void nic_pages_change(struct nic *nic, const struct nic_slot *slot, uint32_t part, enum nic_page_change change);
void nic_page_give_back(struct nic *nic, uint32_t page);
void nic_pages_committed(struct nic *nic);
void nic_pages_adopt(struct nic *nic, const uint8_t *held, uint64_t held_count);
/* After that: the pages of these bytes are dedup's, too. Outside of transactions. */
void nic_pages_keep(struct nic *nic, uint64_t address, uint64_t length);
void nic_pages_count(const struct nic *nic, struct nic_status *status);

/* connection.c */
void nic_put(struct nic *nic, uint32_t role, const struct atoll_descriptor *message);
/* A slot in use for the connection, or NULL: none is free. */
/* True if the connection may have one more slot, whose reply refers to `pages` pages; else it waits. Something is kept for
 * those who have nothing yet, so that those who do not read their replies do not hold up all others. */
bool nic_slot_share(struct nic *nic, const struct nic_connection *connection, uint32_t pages);
struct nic_slot *nic_slot_take(struct nic *nic, struct nic_connection *connection, uint32_t state);
void nic_slot_free(struct nic *nic, struct nic_slot *slot);
void nic_accepted(struct nic *nic, struct nic_connection *connection);
/* Tells nbd of a new connection or of a finished one when there is a slot for it; goes on to the next phase when it can. */
void nic_connection_life(struct nic *nic, struct nic_connection *connection);
/* Nothing more is received. */
void nic_end(struct nic *nic, struct nic_connection *connection);
void nic_linger(struct nic *nic, struct nic_connection *connection);
void nic_gone(struct nic *nic, struct nic_connection *connection);
void nic_connection_freed(struct nic *nic, struct nic_connection *connection);

/* receive.c */
void nic_receive(struct nic *nic, struct nic_connection *connection);
void nic_received(struct nic *nic, struct nic_connection *connection, int32_t result);
void nic_receive_next(struct nic *nic, struct nic_slot *slot);
/* Passes the slot's request, or the next part of its payload, on to nbd. `failure`: status, address and length of a READ's (ATOLL_OP_REQUEST), or NULL. */
void nic_deliver(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, const struct atoll_descriptor *failure);
/* nbd wants no more payload of this slot, or the connection will not deliver it. */
bool nic_receive_discard(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot);
void nic_receive_abort(struct nic *nic, struct nic_connection *connection);
void nic_window_set(struct nic *nic, struct nic_connection *connection, struct nic_window window);
void nic_window_release(struct nic *nic, struct nic_connection *connection);

/* send.c */
void nic_send_queue(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot);
void nic_send(struct nic *nic, struct nic_connection *connection);
void nic_sent(struct nic *nic, struct nic_connection *connection, int32_t result);
void nic_send_flush(struct nic *nic, struct nic_connection *connection);
void nic_reply_done(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot);

/* posted.c. After a takeover, when the slots have been counted; after a commit. */
void nic_posted_open(struct nic *nic);
void nic_posted_committed(struct nic *nic);
enum nic_posting { NIC_POST_NEVER, NIC_POST_LATER, NIC_POST_DONE };
/* Answers the request in `slot`, which nobody else has seen, if it is a WRITE that may be answered before; dedup is told. `alone`: nothing
 * else of the client's has been received yet. LATER: the connection is scheduled when there is room for it. */
enum nic_posting nic_post(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, bool alone);
/* A posted write is perhaps on its way to one of these blocks. */
bool nic_posted_covers(const struct nic *nic, uint32_t volume, uint64_t first, uint64_t blocks);
/* END has come. */
void nic_posted_end(struct nic *nic, struct nic_slot *slot);
/* One more of them (1), or one less (-1). */
void nic_posted_count(struct nic *nic, const struct nic_slot *slot, int change);
/* The connection's volume is the one that nbd named, and [offset, offset + length) of it may be read (`change` false) or written. */
bool nic_volume_allows(const struct atoll_dedup_public *dedup, const struct nic_connection *connection, uint64_t offset, uint64_t length,
                       bool change);

/* --- answer.c --- */
/* Answers the request in `slot`, which nobody else has seen, if it is a READ of what lies in memory, or asks dedup. False: it is for nbd. */
bool nic_answer(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot);
/* One more slot is NIC_SLOT_ASKED (1), or one less (-1). */
void nic_asked_count(struct nic *nic, const struct nic_slot *slot, int change);
/* Dedup has done the READ that it was asked for. */
void nic_read_done(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, const struct atoll_descriptor *message);

/* messages.c: takes at most `limit` messages from nbd and dedup; returns how many. */
uint32_t nic_messages(struct nic *nic, uint32_t limit);

/* loop.c */
void nic_commit(struct nic *nic);
void nic_apply(struct nic *nic, const struct nic_outcome *outcome);
/* Starts an operation: counts its sequence up and marks it pending; returns user_data. */
uint64_t nic_intent(struct nic *nic, struct nic_connection *connection, enum nic_operation kind);

/* timeouts.c: looks at all connections; called when a deadline may have passed. */
void nic_timeouts(struct nic *nic);
/* nbd has answered OPEN or an option, or there are pages for one: the time since the client's last bytes is not the client's. */
void nic_handshake_goes_on(struct nic *nic, struct nic_connection *connection);

/* --- courtesy.c --- */
void nic_courtesy_open(struct nic *nic);
void nic_courtesy_close(struct nic *nic);
/* When `courtesy.next_ns` has come. */
void nic_courtesy_look(struct nic *nic);

/* guess.c. `_due`: all replies to the connection are in its socket. nic_guess, when nic is back from giving way: true if it receives on
 * a guess. `_over`: what a receive has brought. */
void nic_guess_due(struct nic *nic, uint32_t connection);
bool nic_guess(struct nic *nic);
void nic_guess_over(struct nic *nic, bool right);

/* loop.c: looks at sockets and listeners, waiting for so long at most (-1: no limit). True if there was something. */
bool nic_look(struct nic *nic, int timeout_ms);

/* --- coalesce.c --- */
void nic_coalesce_open(void);
/* With nothing else to do: may pause for a client that has replies to read. True: there is something to do. */
bool nic_coalesce(struct nic *nic, uint32_t ignored_roles);

/* --- latency.c --- */
/* Once a turn: asks, or lets go, as requests come. */
void nic_latency_look(struct nic *nic);
/* When to look at the latest, CLOCK_MONOTONIC; UINT64_MAX: nothing is held. */
uint64_t nic_latency_until(const struct nic *nic);
void nic_latency_close(struct nic *nic);

#endif
