/*
 * io_uring instances that outlive the domain that uses them: made by init, inherited by fork, mapped by one domain at a
 * time. The operating system records each completion in them, whoever is alive.
 *
 *   init:      fd = atoll_uring_create(...)             never maps the queues; passes fd and parameters on through fork
 *   domain:    atoll_uring_attach(&ring, fd, &parameters, error)
 *              position = atoll_uring_next(&ring)         of the entry that comes next: write the intent down, commit
 *              sqe = atoll_uring_sqe(&ring)               NULL: queue full, submit first
 *              atoll_uring_submit(&ring)
 *              count = atoll_uring_peek(&ring, completions, maximum)    copies, takes nothing away
 *              apply, commit, then atoll_uring_advance(&ring, count)
 *   waiting:   the ring's fd is readable (epoll) while there are completions.
 *
 * After a crash: `attach` sets the submission tail back to the head, since entries that the dead one had filled in but not
 * submitted would be executed otherwise. Which of its intents were submitted tells atoll_uring_consumed(&ring, position):
 * those are in flight or completed, and their completions stand or will stand in the queue; the others have not happened
 * and never will. Because their positions are used again, the successor notes for all of them which it is (and
 * commits) before it asks for its first entry. A completion that was applied but not advanced over is seen again: the
 * sequence number in its user_data tells. An operation that a worker thread of the dead one executed (buffered I/O, a direct
 * read of a file with unwritten pages) may complete with -EINTR or -ECANCELED: it is to be repeated.
 */
#ifndef ATOLL_IPC_URING_H
#define ATOLL_IPC_URING_H

#include <liburing.h>
#include <stdbool.h>
#include <stdint.h>

/* cffi:begin */
/* struct io_uring_params as the operating system filled it in; plain bytes to pass on. */
struct atoll_uring_parameters {
    uint32_t words[30];
};

struct atoll_uring {
    uint32_t attached_head; /* entries consumed before this domain attached (free-running) */
    int32_t fd;
    uint64_t liburing[28];  /* struct io_uring; in C: atoll_uring_inner */
};

struct atoll_uring_completion {
    uint64_t user_data;
    int32_t result;
    uint32_t flags;
};

/* Makes an instance of `entries` submission and `completion_entries` completion entries (both become powers of two, at
 * most what the system allows) and, if `file_count` > 0, an empty table of that many files. Returns its descriptor or
 * negative errno with the reason in `error` (256 bytes). EPERM and ENOSYS: io_uring is forbidden or absent here. */
int atoll_uring_create(uint32_t entries, uint32_t completion_entries, uint32_t file_count,
                       struct atoll_uring_parameters *parameters, char *error);
/* Maps the queues; not inherited by children. Negative errno, reason in `error`. */
int atoll_uring_attach(struct atoll_uring *ring, int fd, const struct atoll_uring_parameters *parameters, char *error);
void atoll_uring_detach(struct atoll_uring *ring);
/* Position of the next entry: free-running, 32 bits. */
uint32_t atoll_uring_next(const struct atoll_uring *ring);
/* True if the operating system has taken the entry at `position` (good for 2^31 positions back). */
bool atoll_uring_consumed(const struct atoll_uring *ring, uint32_t position);
/* Entries that are free. */
uint32_t atoll_uring_room(const struct atoll_uring *ring);
/* Hands the filled entries over. Number taken, or negative errno; EAGAIN and EBUSY: take completions, then again. */
int atoll_uring_submit(struct atoll_uring *ring);
/* Copies up to `maximum` completions, oldest first, without taking them away. */
uint32_t atoll_uring_peek(struct atoll_uring *ring, struct atoll_uring_completion *completions, uint32_t maximum);
/* They are applied for good. */
void atoll_uring_advance(struct atoll_uring *ring, uint32_t count);
/* Waits until there is a completion: 1; 0 after `timeout_ns`; negative errno (EINTR: a signal). */
int atoll_uring_wait(struct atoll_uring *ring, int64_t timeout_ns);
/* Puts `fd` into the ring's own table at `index`, -1 empties the place. From any process that has the ring's descriptor. */
int atoll_uring_register_file(int uring_fd, uint32_t index, int fd);
/* Fill the next entry, for tests and tools; 0 if the queue is full. C code fills entries by liburing's io_uring_prep_*. */
int atoll_uring_fill_nop(struct atoll_uring *ring, uint64_t user_data);
int atoll_uring_fill_read(struct atoll_uring *ring, uint32_t file_index, uint64_t address, uint32_t length,
                          uint64_t offset, uint64_t user_data);
/* cffi:end */

_Static_assert(sizeof(struct io_uring_params) == sizeof(struct atoll_uring_parameters), "parameters");
_Static_assert(sizeof(struct io_uring) <= sizeof(uint64_t[28]), "liburing's structure fits");

/* For liburing's own functions. */
static inline struct io_uring *atoll_uring_inner(const struct atoll_uring *ring)
{
    return (struct io_uring *)(uintptr_t)ring->liburing;
}

/* The next entry, zeroed, or NULL if the queue is full. */
struct io_uring_sqe *atoll_uring_sqe(struct atoll_uring *ring);

#endif
