/*
 * The role lock: who plays a role holds it for life, and its death is noticed through it within a fraction of a
 * millisecond, whatever memory the dead had mapped.
 *
 * A process-shared robust mutex on a page of its own, mapped writable only by the active process and by the standby that
 * is being promoted, read-only by who watches. Its first word is a futex:
 *
 *   bits 0..29   thread id of the owner, 0: nobody
 *   bit 30       FUTEX_OWNER_DIED: the owner died holding it (set by the operating system at the very start of the death)
 *   bit 31       FUTEX_WAITERS: wake somebody then. A watcher cannot set it (read-only), so the owner does, at once.
 *
 * The operating system wakes one waiter: a role is watched by one thread at a time (the kernel's).
 *
 * After a crash: the next `acquire` gets the lock and is told that the predecessor died. A watcher that starts after the
 * death sees the bit.
 */
#ifndef ATOLL_IPC_ROLELOCK_H
#define ATOLL_IPC_ROLELOCK_H

#include "ipc/layout.h"

/* cffi:begin */
enum atoll_lock_result { ATOLL_LOCK_TAKEN = 0, ATOLL_LOCK_PREDECESSOR_DIED = 1 };

/* Makes the lock in the zeroed page of `fd` (writable). By init, once. Negative errno on failure. */
int atoll_lock_format(int fd);
/* Takes the lock of `role`, whose page is mapped writable. Waits at most `timeout_ns` (-ETIMEDOUT) for a living owner,
 * < 0: forever. enum atoll_lock_result or negative errno. */
int atoll_lock_acquire(uint32_t role, int64_t timeout_ns);
/* Gives it back, on an orderly end. Negative errno if this thread does not hold it. */
int atoll_lock_release(uint32_t role);
/* The lock word of `role`, whose page is mapped; read-only is enough. */
uint32_t atoll_lock_word(uint32_t role);
/* Thread id of the living owner, 0: nobody, or it died. */
uint32_t atoll_lock_owner(uint32_t role);
/* Waits until a role of the bit mask `roles` is no longer held by `expected[role]` (thread id), until *interrupt differs
 * from `interrupt_seen` (interrupt may be NULL), or for `timeout_ns` (< 0: forever). Returns the mask of roles whose owner is
 * not the expected one, dead or nobody: 0 on timeout, interrupt or a signal. No death between two calls is missed. */
int64_t atoll_lock_wait(uint32_t roles, const uint32_t *expected, const uint32_t *interrupt, uint32_t interrupt_seen,
                        int64_t timeout_ns);
/* Ends a wait on `interrupt`, from another thread of the same process. */
void atoll_lock_interrupt(uint32_t *interrupt);
/* cffi:end */

#endif
