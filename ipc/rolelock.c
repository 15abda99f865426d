/* See rolelock.h. */
#define _GNU_SOURCE
#include "ipc/rolelock.h"

#include <assert.h>
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "ipc/atomics.h"

_Static_assert(offsetof(pthread_mutex_t, __data.__lock) == 0, "the mutex starts with its futex word");

/* While an owner has not yet set FUTEX_WAITERS (a few instructions after it took the lock), nobody is woken should it die:
 * look again after this time. */
#define UNMARKED_NS 1000000

static pthread_mutex_t *lock_of(uint32_t role)
{
    return (pthread_mutex_t *)(uintptr_t)(ATOLL_LOCK_BASE + (uint64_t)role * ATOLL_PAGE_BYTES);
}

static const uint32_t *word_of(uint32_t role) { return (const uint32_t *)lock_of(role); }

int atoll_lock_format(int fd)
{
    pthread_mutexattr_t attributes;
    pthread_mutex_t *mutex = mmap(0, ATOLL_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mutex == MAP_FAILED)
        return -errno;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    int result = pthread_mutex_init(mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    munmap(mutex, ATOLL_PAGE_BYTES);
    return -result;
}

static struct timespec after(clockid_t clock, int64_t timeout_ns)
{
    struct timespec at;
    clock_gettime(clock, &at);
    int64_t ns = at.tv_nsec + timeout_ns % 1000000000;
    at.tv_sec += (time_t)(timeout_ns / 1000000000 + ns / 1000000000);
    at.tv_nsec = (long)(ns % 1000000000);
    return at;
}

int atoll_lock_acquire(uint32_t role, int64_t timeout_ns)
{
    pthread_mutex_t *mutex = lock_of(role);
    int result;
    if (timeout_ns < 0) {
        result = pthread_mutex_lock(mutex);
    } else {
        struct timespec until = after(CLOCK_MONOTONIC, timeout_ns);
        result = pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &until);
    }
    if (result != 0 && result != EOWNERDEAD)
        return -result;
    __atomic_fetch_or((uint32_t *)mutex, (uint32_t)FUTEX_WAITERS, __ATOMIC_SEQ_CST);
    if (result != EOWNERDEAD)
        return ATOLL_LOCK_TAKEN;
    result = pthread_mutex_consistent(mutex); /* killed before this: the next one is told again */
    assert(result == 0);
    return ATOLL_LOCK_PREDECESSOR_DIED;
}

int atoll_lock_release(uint32_t role) { return -pthread_mutex_unlock(lock_of(role)); }

uint32_t atoll_lock_word(uint32_t role) { return atoll_load_acquire(word_of(role)); }

static uint32_t owner_in(uint32_t word) { return word & FUTEX_OWNER_DIED ? 0 : word & FUTEX_TID_MASK; }

uint32_t atoll_lock_owner(uint32_t role) { return owner_in(atoll_lock_word(role)); }

static int64_t until_ns(const struct timespec *at)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)(at->tv_sec - now.tv_sec) * 1000000000 + (at->tv_nsec - now.tv_nsec);
}

int64_t atoll_lock_wait(uint32_t roles, const uint32_t *expected, const uint32_t *interrupt, uint32_t interrupt_seen,
                        int64_t timeout_ns)
{
    struct timespec deadline = {0};
    if (timeout_ns >= 0)
        deadline = after(CLOCK_MONOTONIC, timeout_ns);
    for (;;) {
        struct futex_waitv waiters[ATOLL_ROLE_COUNT + 1];
        uint32_t count = 0, changed = 0;
        int64_t slice_ns = timeout_ns < 0 ? -1 : until_ns(&deadline);

        for (uint32_t role = 1; role < ATOLL_ROLE_COUNT; role++) {
            if (!(roles >> role & 1))
                continue;
            uint32_t word = atoll_lock_word(role);
            if (owner_in(word) == 0 || owner_in(word) != expected[role])
                changed |= 1u << role;
            if (!(word & FUTEX_WAITERS) && (slice_ns < 0 || slice_ns > UNMARKED_NS))
                slice_ns = UNMARKED_NS;
            /* A death after the look above changes the word: the wait then returns at once. */
            waiters[count++] = (struct futex_waitv){.val = word, .uaddr = (uintptr_t)word_of(role), .flags = FUTEX_32};
        }
        if (changed != 0)
            return changed;
        if (interrupt != 0) {
            if (atoll_load_acquire(interrupt) != interrupt_seen)
                return 0;
            waiters[count++] = (struct futex_waitv){
                .val = interrupt_seen, .uaddr = (uintptr_t)interrupt, .flags = FUTEX_32 | FUTEX_PRIVATE_FLAG};
        }
        if (timeout_ns >= 0 && until_ns(&deadline) <= 0)
            return 0;
        struct timespec until = {0};
        if (slice_ns >= 0)
            until = after(CLOCK_MONOTONIC, slice_ns);
        if (count == 0) { /* nothing to watch: only time passes */
            clock_nanosleep(CLOCK_MONOTONIC, slice_ns >= 0 ? TIMER_ABSTIME : 0,
                            slice_ns >= 0 ? &until : &(struct timespec){.tv_sec = 3600}, 0);
            return 0;
        }
        long result = syscall(SYS_futex_waitv, waiters, count, 0, slice_ns >= 0 ? &until : 0, CLOCK_MONOTONIC);
        if (result < 0 && errno == EINTR) { /* one more look, then back to Python, which handles the signal */
            timeout_ns = 0;
            deadline = after(CLOCK_MONOTONIC, 0);
        } else if (result < 0 && errno != EAGAIN && errno != ETIMEDOUT) {
            return -errno;
        }
    }
}

void atoll_lock_interrupt(uint32_t *interrupt)
{
    __atomic_fetch_add(interrupt, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, interrupt, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
}
