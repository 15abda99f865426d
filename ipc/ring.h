/*
 * Rings: single-producer single-consumer queues of 64-byte descriptors from one domain to another.
 *
 * The producer half (tail, entries) lies in the producer's arena, the consumer half (head) in the consumer's (I1).
 * Indices are free-running 32-bit counters. Each side counts what a step takes and puts in private memory; the commit
 * settles that as part of the transaction (head_committed, tail_committed), then publishes it; each caches the other's
 * index and looks again only when it must.
 *
 *   producer: slot = atoll_ring_reserve(ring)      room for one more? fill it (atoll_ring_fill), then
 *             atoll_ring_push(ring)                counted in the step
 *   consumer: n = atoll_ring_available(ring)       entries that can be read
 *             copy atoll_ring_entry(ring, i), check, use
 *             atoll_ring_pop(ring, n)              counted in the step
 *   both:     atoll_ring_settle_tail / _head, then atoll_commit(journal), then atoll_ring_publish_tail / _head
 *
 * The tail of few messages is published twice: first in the first of the entries that it completes (`ready`), then by itself. A
 * consumer that found its ring empty looks at the entry at its head before it looks at the tail: it is always there that the next
 * messages begin, and so one line comes over from the producer's core instead of two, one after the other. An entry that is not
 * the first, or is not published, has its own position there, which makes no message ready; nor does what an earlier turn of the
 * ring has left, or a fresh ring's 0. The tail alone is what a successor publishes, and what a sleeper is woken by.
 *
 * After a crash: what a step counted in private memory is gone with the process, what it had settled is rolled back; the
 * successor publishes both; a peer sees each entry exactly once. The producer never overwrites entries that a
 * published head has not passed, so a rolled-back consumer finds them again. One that was killed between the two stores has
 * published what it committed.
 */
#ifndef ATOLL_IPC_RING_H
#define ATOLL_IPC_RING_H

#include <stdbool.h>

#include "ipc/layout.h"
#include "ipc/transaction.h"

/* Entries ahead of the one being filled whose lines are asked for: a step's worth. */
#define ATOLL_RING_AHEAD 32

/* So many messages at most are published in their first entry, too: of more, the tail's line is a small part. */
#define ATOLL_RING_FEW 4

/* Private to the process. */
struct atoll_tx_ring {
    struct atoll_ring_producer *producer;        /* own arena; NULL: no such ring */
    const struct atoll_ring_consumer *consumer;  /* peer's arena */
    struct atoll_descriptor *entries;
    uint32_t mask;
    uint32_t tail;      /* of the step: the next entry to be filled */
    uint32_t limit;     /* up to there is room, by the peer's head as last seen */
    uint32_t published; /* tail as last published */
};

struct atoll_rx_ring {
    const struct atoll_ring_producer *producer;  /* peer's arena */
    struct atoll_ring_consumer *consumer;        /* own arena; NULL: no such ring */
    const struct atoll_descriptor *entries;
    uint32_t mask;
    uint32_t head;        /* of the step: the next entry to be taken */
    uint32_t cached_tail; /* entries before it are complete */
    uint32_t seen_tail;   /* as last loaded, good or bad: what a sleeper compares with (it has then found no entry ready) */
    uint32_t published;   /* head as last published */
    bool idle;            /* nothing was there at the last look */
};

/* Entries that can still be pushed; a peer's head that claims what is not true leaves none (I8). */
static inline uint32_t atoll_ring_room(struct atoll_tx_ring *ring)
{
    if (ring->producer == 0)
        return 0;
    uint32_t room = atoll_load_acquire(&ring->consumer->head) + ring->mask + 1 - ring->tail; /* SP-HEAD */
    if (room > ring->mask + 1)
        return 0;
    ring->limit = ring->tail + room;
    return room;
}

/* True if there is room for `count`. */
static inline bool atoll_ring_has_room(struct atoll_tx_ring *ring, uint32_t count)
{
    return ring->limit - ring->tail >= count || atoll_ring_room(ring) >= count;
}

/* The next free entry, or NULL if the ring is full or there is none. The caller fills it and pushes. */
static inline struct atoll_descriptor *atoll_ring_reserve(struct atoll_tx_ring *ring)
{
    if (ring->tail == ring->limit && atoll_ring_room(ring) == 0)
        return 0;
    return &ring->entries[ring->tail & ring->mask];
}

typedef uint64_t atoll_pair __attribute__((vector_size(16)));

/* Keeps the compiler from putting the load of `value` together with the next one. */
static inline __attribute__((always_inline)) uint64_t atoll_apart(uint64_t value)
{
    if (!__builtin_constant_p(value))
        __asm__("" : "+r"(value));
    return value;
}

/* Copies a message into a reserved entry.
 *
 * A store waits in line until the line it goes to has come over from the consumer's core, and all later ones wait behind it:
 * the fewer stores a message takes, the more of those lines are on their way at once. So a message that its maker writes on the
 * spot never is in memory but there (which is why this is inlined, into atoll_domain_put, too), and it is written in pairs of words.
 * One that does lie in memory is read member by member, as it was written: a wider load of what was just stored in parts waits
 * until those stores have left the processor, behind those to earlier entries, so that the lines would cross one at a time. And
 * the line of an entry to come, which the consumer has long read, is asked for. */
static inline __attribute__((always_inline)) void atoll_ring_fill(const struct atoll_tx_ring *ring, struct atoll_descriptor *entry,
                                                                  const struct atoll_descriptor *message)
{
    atoll_pair *pairs = (atoll_pair *)entry;
    struct atoll_descriptor *ahead = &ring->entries[(ring->tail + ATOLL_RING_AHEAD) & ring->mask];
#ifdef __x86_64__
    __asm__ __volatile__("prefetchw %0" : : "m"(*ahead)); /* __builtin_prefetch would only ask for a copy to read */
#else
    __builtin_prefetch(ahead, 1);
#endif
    uint64_t first = atoll_apart(message->opcode) | atoll_apart(message->flags) << 8 |
                     atoll_apart(message->segment_count) << 16 | (uint64_t)ring->tail << 32; /* `ready`: not yet */
    uint64_t fourth = atoll_apart(message->length) | atoll_apart(message->status) << 32 | atoll_apart(message->part) << 48;
    pairs[0] = (atoll_pair){first, atoll_apart(message->identity)};
    pairs[1] = (atoll_pair){atoll_apart(message->address), fourth};
    pairs[2] = (atoll_pair){atoll_apart(message->words[0]), atoll_apart(message->words[1])};
    pairs[3] = (atoll_pair){atoll_apart(message->words[2]), atoll_apart(message->words[3])};
}

static inline void atoll_ring_push(struct atoll_tx_ring *ring) { ring->tail++; }

static inline void atoll_ring_settle_tail(struct atoll_journal *journal, struct atoll_tx_ring *ring)
{
    if (ring->tail != ring->published)
        atoll_set32(journal, &ring->producer->tail_committed, ring->tail);
}

/* True if there was something to publish (the peer may have to be woken). */
static inline int atoll_ring_publish_tail(struct atoll_tx_ring *ring)
{
    if (ring->tail == ring->published)
        return 0;
    if (ring->tail - ring->published <= ATOLL_RING_FEW) {
        atoll_store_release(&ring->entries[ring->published & ring->mask].ready, ring->tail); /* SP-TAIL */
        ATOLL_STORED();
    }
    atoll_store_release(&ring->producer->tail, ring->tail); /* SP-TAIL */
    ATOLL_STORED();
    ring->published = ring->tail;
    return 1;
}

/* Entries that can be read; a peer's `ready` or tail that claims more than the ring holds counts as none (I8). */
static inline uint32_t atoll_ring_available(struct atoll_rx_ring *ring)
{
    uint32_t count = ring->cached_tail - ring->head;
    if (count == 0 && ring->consumer != 0) {
        /* Not at the first look: in a stream the producer would lose the line that it fills. */
        uint32_t ready = ring->idle ? atoll_load_acquire(&ring->entries[ring->head & ring->mask].ready) : ring->head; /* SP-TAIL */
        count = ready - ring->head;
        if (count != 0 && count <= ring->mask + 1) {
            ring->cached_tail = ready;
            ring->idle = false;
            return count;
        }
        ring->seen_tail = atoll_load_acquire(&ring->producer->tail); /* SP-TAIL */
        count = ring->seen_tail - ring->head;
        if (count > ring->mask + 1)
            return 0;
        ring->cached_tail = ring->seen_tail;
        ring->idle = count == 0;
    }
    return count;
}

/* Entries that the tail itself says there are, whatever has been looked at before; 0 if it claims more than the ring holds (I8). */
static inline uint32_t atoll_ring_waiting(const struct atoll_rx_ring *ring)
{
    uint32_t count = ring->consumer == 0 ? 0 : atoll_load_acquire(&ring->producer->tail) - ring->head; /* SP-TAIL */
    return count > ring->mask + 1 ? 0 : count;
}

/* Entry `index` past the head, 0 <= index < available. Copy it before it is checked and used (I8). */
static inline const struct atoll_descriptor *atoll_ring_entry(const struct atoll_rx_ring *ring, uint32_t index)
{
    return &ring->entries[(ring->head + index) & ring->mask];
}

static inline void atoll_ring_pop(struct atoll_rx_ring *ring, uint32_t count) { ring->head += count; }

static inline void atoll_ring_settle_head(struct atoll_journal *journal, struct atoll_rx_ring *ring)
{
    if (ring->head != ring->published)
        atoll_set32(journal, &ring->consumer->head_committed, ring->head);
}

/* Stores only what has changed: the producer keeps a copy of the line. */
static inline void atoll_ring_publish_head(struct atoll_rx_ring *ring)
{
    if (ring->head == ring->published)
        return;
    atoll_store_release(&ring->consumer->head, ring->head); /* SP-HEAD */
    ATOLL_STORED();
    ring->published = ring->head;
}

/* After a roll back in a living process: both sides go on from what was committed last. */
static inline void atoll_ring_return_tail(struct atoll_tx_ring *ring) { ring->tail = ring->producer->tail_committed; }
static inline void atoll_ring_return_head(struct atoll_rx_ring *ring) { ring->head = ring->consumer->head_committed; }

#endif
