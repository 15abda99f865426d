/*
 * What every domain's C has in common: its own arena, its rings, its transaction, waking and sleeping, counters, trace.
 *
 *   atoll_domain_open        once, by the active process: arena is mapped writable, peers read-only
 *   atoll_domain_receive     messages from a peer
 *   atoll_domain_send        reserve an entry to a peer
 *   atoll_domain_commit      commit the step, publish indices, wake peers that sleep
 *   atoll_domain_sleep       until a peer publishes or the timeout ends
 *   atoll_domain_doze        until a peer publishes something that cannot wait, or many messages, or the timeout ends
 *   atoll_domain_may_sleep / atoll_domain_awake   the same around a wait of one's own (epoll, io_uring)
 *
 * After a crash: atoll_domain_open of the successor rolls back, publishes, and wakes all peers, because the dead may
 * have published without waking.
 */
#ifndef ATOLL_IPC_DOMAIN_H
#define ATOLL_IPC_DOMAIN_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "ipc/ring.h"

/* cffi:begin */
struct atoll_domain {
    uint32_t role;
    uint32_t incarnation;
    struct atoll_arena_header *self;
    const struct atoll_arena_header *peers[16]; /* NULL: no such role in this instance */
    uint64_t peer_bytes[16];                    /* arena sizes as told by the kernel, never read from shared memory */
    uint64_t *counters;                         /* own; indices are the role's own enum */
    struct atoll_journal *journal;
    struct atoll_rings *rings;
};

/* What a domain's C loop returns to its Python. Role-specific reasons start at 16. */
enum atoll_reason {
    ATOLL_REASON_CONTROL = 1,  /* a control message waits on the ring from the kernel */
    ATOLL_REASON_STOP = 2
};

/* Lays out the common part of a fresh arena and returns role_offset. `rings_to` is a bit mask of roles that this role
 * sends to, `entries[role]` the ring sizes. `role_bytes` and `buffer_bytes` are what the role asked for. Called once, by init,
 * on the still zeroed object. */
uint64_t atoll_arena_format(void *arena, uint32_t role, uint64_t instance, uint64_t arena_bytes, uint32_t rings_to,
                            const uint32_t *entries, uint64_t role_bytes, uint64_t buffer_bytes, uint32_t wake_kind,
                            int32_t eventfd);
/* Bytes of an arena of such a layout (page-aligned). */
uint64_t atoll_arena_size(uint32_t rings_to, const uint32_t *entries, uint64_t role_bytes, uint64_t buffer_bytes);

/* Returns 0 or a negative errno with the reason in `error` (256 bytes). `arena_bytes[role]` is 0 for absent roles. */
int atoll_domain_open(struct atoll_domain *domain, uint32_t role, uint32_t incarnation, uint32_t pid,
                      uint64_t start_time, const uint64_t *arena_bytes, char *error);
void atoll_domain_serving(struct atoll_domain *domain);
void atoll_domain_commit(struct atoll_domain *domain);
void atoll_domain_wake_all(struct atoll_domain *domain);
/* Sleeps until a message comes (by the own eventfd, or without one on the tails of all inbound rings); returns at once if one waits. timeout_ns < 0: no limit.
 * `ignored_roles`: bit mask of rings whose messages cannot be taken now (a limit is reached); they neither wake nor
 * keep awake (by eventfd they do wake); give a timeout then (100 ms), so that `progress` shows that this is no hang.
 * Returns 1 if there may be something to do, 0 on timeout. */
int atoll_domain_sleep(struct atoll_domain *domain, uint32_t ignored_roles, int64_t timeout_ns);
/* As atoll_domain_sleep, but messages from `roles` (bit mask) that were put with atoll_domain_put_unhurried neither wake nor keep awake before there
 * are ATOLL_DOZE_MESSAGES from one of them: they are looked at when the timeout ends. 0 <= timeout_ns. Does not spin. */
int atoll_domain_doze(struct atoll_domain *domain, uint32_t roles, int64_t timeout_ns);
/* For domains that wait in epoll with their eventfd: true if nothing is pending and `sleeping` is set. */
bool atoll_domain_may_sleep(struct atoll_domain *domain, uint32_t ignored_roles);
void atoll_domain_awake(struct atoll_domain *domain);
/* Messages waiting on the ring from `role` (control messages from the kernel: role 1). */
uint32_t atoll_domain_pending(struct atoll_domain *domain, uint32_t role);
/* Copies the next message from `role` and counts it as consumed in the running transaction; false if there is none. */
static inline bool atoll_domain_take(struct atoll_domain *domain, uint32_t role, struct atoll_descriptor *message);
/* Sends one message to `role` in the running transaction; false if the ring is full. */
static inline bool atoll_domain_put(struct atoll_domain *domain, uint32_t role, const struct atoll_descriptor *message);
/* The same for a message that a peer who dozes is not woken for. Its flags have ATOLL_FLAG_POSTED. */
static inline bool atoll_domain_put_unhurried(struct atoll_domain *domain, uint32_t role, const struct atoll_descriptor *message);
uint64_t atoll_now_ns(void);
/* How long the domain may look around for more work before it sleeps (spin.h); 0, as after atoll_domain_open: not at all. */
void atoll_domain_set_spin(struct atoll_domain *domain, uint64_t spin_ns);
/* cffi:end */

/* How something that pays only at times has gone lately (spin.h). */
struct atoll_luck {
    uint32_t vain; /* attempts in a row that brought nothing */
    uint32_t rest; /* occasions for one that are still let pass */
};

/* One kind of waiting. */
struct atoll_spin {
    struct atoll_luck spins, holds;
    uint64_t hold_ns; /* for which it looks around without giving way, 0: it does not */
    uint64_t held;    /* times that it saw something meanwhile */
};

struct atoll_rings {
    struct atoll_tx_ring tx[ATOLL_ROLE_COUNT];
    struct atoll_rx_ring rx[ATOLL_ROLE_COUNT];
    uint32_t tx_roles, rx_roles;       /* bit masks: to and from whom there is a ring */
    uint32_t unhurried[ATOLL_ROLE_COUNT]; /* messages of this step that one who dozes is not woken for */
    int32_t eventfd[ATOLL_ROLE_COUNT]; /* by which a role is woken, oneself too; -1: by futex, -2: by none */
    int32_t epoll;                     /* in which the own eventfd is waited for, -1: not yet made */
    bool worked;                       /* something was changed since it last began to spin */
    uint64_t spin_ns, spin_until;      /* spin_until 0: it does not spin */
    struct atoll_spin *lucky;          /* whose waiting has just brought something, NULL none */
    struct atoll_spin spin;            /* of atoll_domain_sleep */
};

/* True if a message waits on a ring that is not in the bit mask `ignored_roles`. */
bool atoll_domain_anything_pending(struct atoll_domain *domain, uint32_t ignored_roles);

/* True if [address, address + length) lies within the arena of `role`: the check before any use of a reference (I8). */
static inline bool atoll_reference_in(const struct atoll_domain *domain, uint32_t role, uint64_t address, uint64_t length)
{
    uint64_t base = atoll_arena_address(role);
    return address >= base && length <= domain->peer_bytes[role] && address - base <= domain->peer_bytes[role] - length;
}

/* What a role publishes, `bytes` at the start of its role area; NULL if there is no such place in its arena. */
static inline const void *atoll_public(const struct atoll_domain *domain, uint32_t role, uint64_t bytes)
{
    const struct atoll_arena_header *peer = domain->peers[role];
    uint64_t arena_bytes = domain->peer_bytes[role], offset = peer == 0 ? 0 : peer->role_offset;
    if (offset == 0 || offset % ATOLL_PAGE_BYTES != 0 || arena_bytes < bytes || offset > arena_bytes - bytes)
        return 0;
    return (const char *)peer + offset;
}

static inline const struct atoll_dedup_public *atoll_dedup_public(const struct atoll_domain *domain)
{
    return (const struct atoll_dedup_public *)atoll_public(domain, ATOLL_ROLE_DEDUP, sizeof(struct atoll_dedup_public));
}

static inline const struct atoll_nbd_public *atoll_nbd_public(const struct atoll_domain *domain)
{
    return (const struct atoll_nbd_public *)atoll_public(domain, ATOLL_ROLE_NBD, sizeof(struct atoll_nbd_public));
}

static inline const struct atoll_nic_public *atoll_nic_public(const struct atoll_domain *domain)
{
    return (const struct atoll_nic_public *)atoll_public(domain, ATOLL_ROLE_NIC, sizeof(struct atoll_nic_public));
}

/* The role in whose arena [address, address + length) lies, or 0 if it lies in none. */
static inline uint32_t atoll_reference_role(const struct atoll_domain *domain, uint64_t address, uint64_t length)
{
    uint64_t role = address >= ATOLL_MAP_BASE ? (address - ATOLL_MAP_BASE) / ATOLL_MAP_STRIDE : 0;
    if (role == 0 || role >= ATOLL_ROLE_COUNT || !atoll_reference_in(domain, (uint32_t)role, address, length))
        return 0;
    return (uint32_t)role;
}

/* Copies where the data of a DONE of dedup's lie to `data`, at most `most` segments, which make up `bytes`. Returns how many; 0: they are not
 * what they may be. That each lies in an arena is looked at by who uses it. */
uint32_t atoll_copy_data(const struct atoll_domain *domain, const struct atoll_descriptor *message, uint64_t bytes, uint32_t most,
                         struct atoll_segment *data);

/* Counters are statistics: not transactional, a few may be lost or counted twice at a crash. */
static inline void atoll_count(struct atoll_domain *domain, uint32_t counter, uint64_t amount)
{
    domain->counters[counter] += amount;
}

/* One load in the kernel's arena tells whether a trace is armed. */
static inline bool atoll_trace_armed(const struct atoll_domain *domain)
{
    return __builtin_expect(atoll_load_relaxed(&domain->peers[ATOLL_ROLE_KERNEL]->trace_armed) != 0, 0);
}

/* Records one hop; call it only while a trace is armed. atoll_domain_take and _put do so by themselves. */
void atoll_trace_hop(struct atoll_domain *domain, uint32_t peer, uint32_t direction, const struct atoll_descriptor *message);

/* Inline, so that a ring's place is known to the compiler and nothing is passed on the way. */
static inline bool atoll_domain_take(struct atoll_domain *domain, uint32_t role, struct atoll_descriptor *message)
{
    struct atoll_rx_ring *ring = &domain->rings->rx[role];
    if (atoll_ring_available(ring) == 0)
        return false;
    *message = *atoll_ring_entry(ring, 0);
    atoll_compiler_barrier(); /* read once (I8): not later, nor again */
    atoll_ring_pop(ring, 1);
    if (atoll_trace_armed(domain))
        atoll_trace_hop(domain, role, 0, message);
    return true;
}

static inline __attribute__((always_inline)) bool atoll_domain_put(struct atoll_domain *domain, uint32_t role,
                                                                   const struct atoll_descriptor *message)
{
    struct atoll_tx_ring *ring = &domain->rings->tx[role];
    struct atoll_descriptor *entry = atoll_ring_reserve(ring);
    if (entry == 0)
        return false;
    atoll_ring_fill(ring, entry, message);
    atoll_ring_push(ring);
    if (atoll_trace_armed(domain))
        atoll_trace_hop(domain, role, 1, entry);
    return true;
}

static inline bool atoll_domain_put_unhurried(struct atoll_domain *domain, uint32_t role, const struct atoll_descriptor *message)
{
    bool sent = atoll_domain_put(domain, role, message);
    domain->rings->unhurried[role] += sent; /* counted here, and not in the other: that one sends streams */
    return sent;
}

#endif
