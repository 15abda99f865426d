/*
 * Crash points: named places where a test makes a domain die by SIGKILL, compiled in always, armed by nobody but tests.
 *
 *   ATOLL_CRASH_POINT(domain, "nic.send.before")     a place in the code of one role
 *   ATOLL_CRASH_POINT_EACH(domain, "commit.after")   a place in common code; its name is "nic:commit.after" in nic, ...
 *
 * The kernel arms one by storing the hash of its name (ipc/crashpoint.py: `point_hash`) in its own header's crash_point, after it
 * has raised crash_sequence; 0 disarms. Not armed, a point is one relaxed load and one comparison with a constant.
 * The names are found by grep (ipc/crashpoint.py: `points_in`), so they are literals.
 *
 * After a crash: crash_seen in the dead domain's arena equals crash_sequence, so its successor passes the point, once
 * per arming.
 */
#ifndef ATOLL_IPC_CRASHPOINT_H
#define ATOLL_IPC_CRASHPOINT_H

#include <signal.h>
#include <unistd.h>

#include "ipc/domain.h"

/* Characters of a point's name at most: the hash below is unrolled, so that the compiler computes it. */
#define ATOLL_CRASH_NAME_BYTES 48
#define ATOLL_CRASH_ROLE_FACTOR 0x9e3779b97f4a7c15u

static inline __attribute__((always_inline)) uint64_t atoll_crash_step(uint64_t hash, const char *name, size_t bytes, size_t index)
{
    return index < bytes ? (hash ^ (uint8_t)name[index]) * 0x100000001b3u : hash;
}

/* FNV-1a, 64 bits. */
static inline __attribute__((always_inline)) uint64_t atoll_crash_hash(const char *name, size_t bytes)
{
    uint64_t hash = 0xcbf29ce484222325u;
#define ATOLL_CRASH_STEP(index) hash = atoll_crash_step(hash, name, bytes, (index))
#define ATOLL_CRASH_STEPS(index) \
    ATOLL_CRASH_STEP(index);     \
    ATOLL_CRASH_STEP(index + 1); \
    ATOLL_CRASH_STEP(index + 2); \
    ATOLL_CRASH_STEP(index + 3); \
    ATOLL_CRASH_STEP(index + 4); \
    ATOLL_CRASH_STEP(index + 5); \
    ATOLL_CRASH_STEP(index + 6); \
    ATOLL_CRASH_STEP(index + 7)
    ATOLL_CRASH_STEPS(0);
    ATOLL_CRASH_STEPS(8);
    ATOLL_CRASH_STEPS(16);
    ATOLL_CRASH_STEPS(24);
    ATOLL_CRASH_STEPS(32);
    ATOLL_CRASH_STEPS(40);
#undef ATOLL_CRASH_STEPS
#undef ATOLL_CRASH_STEP
    return hash;
}

/* Dies, unless this arming has already had its victim. */
static __attribute__((noinline, cold, unused)) void atoll_crash_now(struct atoll_domain *domain)
{
    uint64_t sequence = atoll_load_relaxed(&domain->peers[ATOLL_ROLE_KERNEL]->crash_sequence);
    if (domain->self->crash_seen == sequence)
        return;
    atoll_store_relaxed(&domain->self->crash_seen, sequence);
    kill(getpid(), SIGKILL);
}

#define ATOLL_CRASH_POINT_IF(domain, name, salt)                                                                     \
    do {                                                                                                             \
        _Static_assert(sizeof(name) <= ATOLL_CRASH_NAME_BYTES + 1, "name of a crash point is too long");             \
        if (__builtin_expect(atoll_load_relaxed(&(domain)->peers[ATOLL_ROLE_KERNEL]->crash_point) ==                 \
                                 (atoll_crash_hash((name), sizeof(name) - 1) ^ (salt)),                              \
                             0))                                                                                     \
            atoll_crash_now(domain);                                                                                 \
    } while (0)

#define ATOLL_CRASH_POINT(domain, name) ATOLL_CRASH_POINT_IF(domain, name, 0)
#define ATOLL_CRASH_POINT_EACH(domain, name) \
    ATOLL_CRASH_POINT_IF(domain, name, (uint64_t)(domain)->role * ATOLL_CRASH_ROLE_FACTOR)

#endif
