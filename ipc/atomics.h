/*
 * Loads and stores of words that another process reads or writes. Every use names its sync point:
 *
 *   SP-TAIL   producer: entries, then store_release(ready of the first), store_release(tail)
 *             consumer: load_acquire(ready of the next), or load_acquire(tail), then entries
 *   SP-HEAD   consumer: done with entries, then store_release(head)   producer: load_acquire(head), then overwrite
 *   SP-SLEEP  sleeper: sleeping = 1, full_fence, look at the tails again
 *             waker:   store_release(tail), full_fence, look at sleeping
 *             (store-load on both sides: only a full fence keeps both from seeing the old value)
 *   SP-DONE   nic: send complete, then store_release(done)  dedup: load_acquire(done), then reuse the page
 *   SP-USE    nic, nbd: use = pages, full_fence, look at the pages' generations    dedup: generation + 1, full_fence, look at uses
 *             (as SP-SLEEP: one of the two sees the other)
 *   SP-POST   nic:   posting = 1, full_fence, look at posted_blocks again, then post    dedup: posted_blocks = 0, full_fence,
 *             look at posting (likewise)
 *
 * A successor needs compiler order only: its predecessor is dead, and its stores are all in coherent memory.
 */
#ifndef ATOLL_IPC_ATOMICS_H
#define ATOLL_IPC_ATOMICS_H

#define atoll_load_acquire(pointer) __atomic_load_n((pointer), __ATOMIC_ACQUIRE)
#define atoll_load_relaxed(pointer) __atomic_load_n((pointer), __ATOMIC_RELAXED)
#define atoll_store_release(pointer, value) __atomic_store_n((pointer), (value), __ATOMIC_RELEASE)
#define atoll_store_relaxed(pointer, value) __atomic_store_n((pointer), (value), __ATOMIC_RELAXED)
#define atoll_full_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
/* Order of this process's own stores as its successor will find them. */
#define atoll_compiler_barrier() __asm__ __volatile__("" ::: "memory")

#endif
