/*
 * Control areas: where the msgpack blobs of control messages lie. Each domain's area (ATOLL_CONTROL_BYTES at
 * header.control_offset) is written by that domain only.
 *
 *   a domain's                                the kernel's
 *   0       struct atoll_control_results      role * 16 KiB   struct atoll_control_call, then the blob
 *   64      its last result
 *   224 KiB events, 64 places of 512 bytes
 *
 * An event's place has the number of its ring entry, so it is used again only when the kernel has taken the entry.
 *
 * After a crash: the words here are changed by transactions (transaction.h). A result that was committed is in the ring; a
 * call that was taken in a step that did not commit is there again.
 */
#ifndef ATOLL_IPC_CONTROL_H
#define ATOLL_IPC_CONTROL_H

#include "ipc/domain.h"

/* cffi:begin */
#define ATOLL_CONTROL_CALL_BYTES 16384
#define ATOLL_CONTROL_HEADER_BYTES 64
#define ATOLL_CONTROL_EVENTS_OFFSET 229376
#define ATOLL_CONTROL_EVENT_BYTES 512

/* In each domain's control area: the last call it answered. */
struct atoll_control_results {
    uint64_t number;     /* 0: none yet */
    uint64_t length;     /* bytes of the blob that follows */
    uint64_t reserved[6];
};

/* In the kernel's control area, one per role: the last call it made. */
struct atoll_control_call {
    uint64_t number;     /* goes up by one with each call of this role */
    uint64_t answered;   /* number of the last call whose result was taken; equal to `number`: none outstanding */
    uint64_t length;     /* bytes of the blob that follows */
    uint64_t reserved[5];
};

/* One 64-bit word of the own control area (or role area), in the running transaction. */
void atoll_domain_set64(struct atoll_domain *domain, uint64_t *word, uint64_t value);
/* Words changed, and messages taken and put, since the last commit. */
uint64_t atoll_domain_changes(const struct atoll_domain *domain);
/* Undoes the running transaction; what the role keeps outside its arena is then out of step with it: end soon. */
void atoll_domain_roll_back(struct atoll_domain *domain);
/* Index of the ring entry to `role` that the next message will take. */
uint32_t atoll_domain_next_entry(const struct atoll_domain *domain, uint32_t role);
/* Messages to `role` that still have a place; 0 if there is no such ring. */
uint32_t atoll_domain_room(struct atoll_domain *domain, uint32_t role);
/* Prepares the arena of an earlier run, mapped writable at its own address, for this run: rolls back, forgets rings and calls,
 * takes the new instance and eventfd. All processes of the earlier run are dead, and none of this run has begun.
 * Layout arguments as in atoll_arena_format; -EINVAL, and nothing is changed, if the arena has another layout. */
int atoll_arena_adopt(uint32_t role, uint64_t instance, uint64_t arena_bytes, uint32_t rings_to,
                      const uint32_t *entries, uint64_t role_bytes, uint64_t buffer_bytes, uint32_t wake_kind,
                      int32_t eventfd);
/* cffi:end */

_Static_assert(sizeof(struct atoll_control_results) == ATOLL_CONTROL_HEADER_BYTES, "results");
_Static_assert(sizeof(struct atoll_control_call) == ATOLL_CONTROL_HEADER_BYTES, "call");
_Static_assert(ATOLL_CONTROL_CALL_BYTES * ATOLL_ROLE_COUNT <= ATOLL_CONTROL_BYTES, "calls fit the kernel's area");
_Static_assert(ATOLL_CONTROL_EVENTS_OFFSET + ATOLL_CONTROL_EVENT_BYTES * ATOLL_CONTROL_RING_ENTRIES <= ATOLL_CONTROL_BYTES,
               "events fit");

#endif
