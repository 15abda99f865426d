/*
 * Rings: single-producer single-consumer queues of 64-byte descriptors from one domain to another.
 *
 * The producer half (tail, entries) lies in the producer's arena, the consumer half (head) in the consumer's (I1).
 * Indices are free-running 32-bit counters. Each side works on transactional copies (head_committed, tail_committed)
 * and publishes them after its commit; each caches the other's index and looks again only when it must.
 *
 *   producer: slot = atoll_ring_reserve(ring)      room for one more? fill it, then
 *             atoll_ring_push(journal, ring)       counted in the transaction
 *   consumer: n = atoll_ring_available(ring)       entries that can be read
 *             copy atoll_ring_entry(ring, i), check, use
 *             atoll_ring_pop(journal, ring, n)     counted in the transaction
 *   both:     atoll_commit(journal), then atoll_ring_publish_tail / _head
 *
 * After a crash: the successor rolls back, then publishes both; a peer sees each entry exactly once. The producer
 * never overwrites entries that a published head has not passed, so a rolled-back consumer finds them again.
 */
#ifndef ATOLL_IPC_RING_H
#define ATOLL_IPC_RING_H

#include "ipc/layout.h"
#include "ipc/transaction.h"

/* Private to the process. */
struct atoll_tx_ring {
    struct atoll_ring_producer *producer;        /* own arena */
    const struct atoll_ring_consumer *consumer;  /* peer's arena */
    struct atoll_descriptor *entries;
    uint32_t mask;
    uint32_t cached_head;
    uint32_t published; /* tail as last published */
};

struct atoll_rx_ring {
    const struct atoll_ring_producer *producer;  /* peer's arena */
    struct atoll_ring_consumer *consumer;        /* own arena */
    const struct atoll_descriptor *entries;
    uint32_t mask;
    uint32_t cached_tail; /* entries before it are complete */
    uint32_t seen_tail;   /* as last loaded, good or bad: what a sleeper compares with */
};

/* The next free entry, or NULL if the ring is full. The caller fills it and pushes. */
static inline struct atoll_descriptor *atoll_ring_reserve(struct atoll_tx_ring *ring)
{
    uint32_t tail = ring->producer->tail_committed;
    if (tail - ring->cached_head > ring->mask) {
        ring->cached_head = atoll_load_acquire(&ring->consumer->head); /* SP-HEAD */
        if (tail - ring->cached_head > ring->mask)
            return 0;
    }
    return &ring->entries[tail & ring->mask];
}

/* Entries that can still be pushed. */
static inline uint32_t atoll_ring_room(struct atoll_tx_ring *ring)
{
    ring->cached_head = atoll_load_acquire(&ring->consumer->head); /* SP-HEAD */
    return ring->mask + 1 - (ring->producer->tail_committed - ring->cached_head);
}

static inline void atoll_ring_push(struct atoll_journal *journal, struct atoll_tx_ring *ring)
{
    atoll_set32(journal, &ring->producer->tail_committed, ring->producer->tail_committed + 1);
}

/* True if there was something to publish (the peer may have to be woken). */
static inline int atoll_ring_publish_tail(struct atoll_tx_ring *ring)
{
    uint32_t tail = ring->producer->tail_committed;
    if (tail == ring->published)
        return 0;
    atoll_store_release(&ring->producer->tail, tail); /* SP-TAIL */
    ATOLL_STORED();
    ring->published = tail;
    return 1;
}

/* Entries that can be read; a peer's tail that claims more than the ring holds counts as none (I8). */
static inline uint32_t atoll_ring_available(struct atoll_rx_ring *ring)
{
    uint32_t head = ring->consumer->head_committed;
    uint32_t count = ring->cached_tail - head;
    if (count == 0) {
        ring->seen_tail = atoll_load_acquire(&ring->producer->tail); /* SP-TAIL */
        count = ring->seen_tail - head;
        if (count > ring->mask + 1)
            return 0;
        ring->cached_tail = ring->seen_tail;
    }
    return count;
}

/* Entry `index` past the head, 0 <= index < available. Copy it before it is checked and used (I8). */
static inline const struct atoll_descriptor *atoll_ring_entry(const struct atoll_rx_ring *ring, uint32_t index)
{
    return &ring->entries[(ring->consumer->head_committed + index) & ring->mask];
}

static inline void atoll_ring_pop(struct atoll_journal *journal, struct atoll_rx_ring *ring, uint32_t count)
{
    atoll_set32(journal, &ring->consumer->head_committed, ring->consumer->head_committed + count);
}

/* Stores only what has changed: the producer keeps a copy of the line. */
static inline void atoll_ring_publish_head(struct atoll_rx_ring *ring)
{
    uint32_t head = ring->consumer->head_committed;
    if (atoll_load_relaxed(&ring->consumer->head) == head)
        return;
    atoll_store_release(&ring->consumer->head, head); /* SP-HEAD */
    ATOLL_STORED();
}

#endif
