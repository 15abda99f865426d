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
 * A ring for storage (atoll_uring_create_storage) knows arenas by their addresses: registered as *sources*, their pages are
 * pinned once and for all, instead of one by one for each write. To register takes a writable map and the ring is one
 * process's, so that a page could be written by a way that its owner's map does not show (I1): the operating system is told, once
 * and before the ring can be used, to refuse all operations that would write to a registered buffer.
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

#include "ipc/layout.h"

/* cffi:begin */
/* Plain bytes to pass on. */
struct atoll_uring_parameters {
    uint32_t words[30];           /* struct io_uring_params as the operating system filled it in */
    uint32_t takes_sources;       /* 1: arenas can be registered */
    uint32_t reserved;
    uint64_t source_bytes[16];    /* registered, of the arena of each role, from its beginning on */
};

struct atoll_uring {
    uint32_t attached_head; /* entries consumed before this domain attached (free-running) */
    int32_t fd;
    uint64_t liburing[28];  /* struct io_uring; in C: atoll_uring_inner */
    uint64_t source_bytes[16];
};

/* What the operating system takes as one buffer at most: arenas are registered in pieces of that. */
#define ATOLL_URING_PIECE_BYTES 0x40000000
/* Pieces of all arenas, the number of each being that of its address. */
#define ATOLL_URING_PIECES 4096

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
/* The same for storage: it takes reads, writes, fsync and fallocate, and writes from registered arenas where the system has vectored
 * ones (Linux 6.15): parameters->takes_sources says whether. */
int atoll_uring_create_storage(uint32_t entries, uint32_t completion_entries, struct atoll_uring_parameters *parameters,
                               char *error);
/* Registers the arena of `role`, which this process has mapped writable, as a source, and notes it in `parameters` for those that
 * attach later. Its pages are pinned for as long as the ring is there: the arena must not be given other ones. Negative errno,
 * reason in `error`: ENOMEM: beyond what may be locked (RLIMIT_MEMLOCK); what came before stays registered. */
int atoll_uring_register_source(int uring_fd, struct atoll_uring_parameters *parameters, uint32_t role, uint64_t bytes, char *error);
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

_Static_assert(sizeof(struct io_uring_params) == sizeof(uint32_t[30]), "parameters");
_Static_assert((uint64_t)ATOLL_URING_PIECES * ATOLL_URING_PIECE_BYTES == (uint64_t)ATOLL_ROLE_COUNT * ATOLL_MAP_STRIDE, "pieces");
_Static_assert(sizeof(struct io_uring) <= sizeof(uint64_t[28]), "liburing's structure fits");

/* For liburing's own functions. */
static inline struct io_uring *atoll_uring_inner(const struct atoll_uring *ring)
{
    return (struct io_uring *)(uintptr_t)ring->liburing;
}

/* IORING_OP_WRITEV_FIXED, which headers before Linux 6.15 do not name. */
#define ATOLL_URING_WRITEV_FIXED 61

/* Number of the registered buffer in which [address, address + length) lies, -1: in none. */
static inline int32_t atoll_uring_source(const struct atoll_uring *ring, uint64_t address, uint64_t length)
{
    uint64_t at = address - ATOLL_MAP_BASE, role = at / ATOLL_MAP_STRIDE, piece = at / ATOLL_URING_PIECE_BYTES;
    if (role >= ATOLL_ROLE_COUNT || length > ring->source_bytes[role] || at % ATOLL_MAP_STRIDE > ring->source_bytes[role] - length ||
        (at + length - 1) / ATOLL_URING_PIECE_BYTES != piece)
        return -1;
    return (int32_t)piece;
}

/* The next entry, zeroed, or NULL if the queue is full. */
struct io_uring_sqe *atoll_uring_sqe(struct atoll_uring *ring);

#endif
