/* See uring.h. */
#define _GNU_SOURCE
#include "ipc/uring.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int fail(char *error, const char *what, int number)
{
    snprintf(error, 256, "%s: %s", what, strerror(number));
    return -number;
}

/* The table may have as many files as the process may open. */
static void raise_file_limit(uint32_t file_count)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < file_count) {
        limit.rlim_cur = file_count;
        if (limit.rlim_max < file_count)
            limit.rlim_max = file_count;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int atoll_uring_create(uint32_t entries, uint32_t completion_entries, uint32_t file_count,
                       struct atoll_uring_parameters *parameters, char *error)
{
    /* No SQPOLL, SINGLE_ISSUER, DEFER_TASKRUN: nothing that binds the ring to one task. */
    struct io_uring_params params = {.flags = IORING_SETUP_CLAMP | IORING_SETUP_CQSIZE, .cq_entries = completion_entries};

    int fd = (int)syscall(__NR_io_uring_setup, entries, &params);
    if (fd < 0)
        return fail(error, "io_uring cannot be used here", errno);
    if (!(params.features & IORING_FEAT_SINGLE_MMAP) || !(params.features & IORING_FEAT_NODROP)) {
        close(fd);
        return fail(error, "this system's io_uring is too old (Linux 5.19 is needed)", ENOSYS);
    }
    if (file_count > 0) {
        struct io_uring_rsrc_register table = {.nr = file_count, .flags = IORING_RSRC_REGISTER_SPARSE};
        raise_file_limit(file_count);
        if (syscall(__NR_io_uring_register, fd, IORING_REGISTER_FILES2, &table, sizeof table) < 0) {
            int number = errno;
            close(fd);
            char what[128];
            snprintf(what, sizeof what, "io_uring: cannot make a table of %u files", file_count);
            return fail(error, what, number == EINVAL ? ENOSYS : number);
        }
    }
    memcpy(parameters, &params, sizeof params);
    return fd;
}

int atoll_uring_attach(struct atoll_uring *ring, int fd, const struct atoll_uring_parameters *parameters, char *error)
{
    struct io_uring_params params;
    struct io_uring *inner = atoll_uring_inner(ring);

    memcpy(&params, parameters, sizeof params);
    memset(ring, 0, sizeof *ring);
    int result = io_uring_queue_mmap(fd, &params, inner);
    if (result < 0)
        return fail(error, "cannot map the queues of an io_uring", -result);
    inner->features = params.features; /* liburing 2.3 leaves it out */
    result = io_uring_ring_dontfork(inner);
    if (result < 0) {
        atoll_uring_detach(ring);
        return fail(error, "cannot keep the queues of an io_uring from children", -result);
    }
    ring->fd = fd;
    for (unsigned index = 0; index < inner->sq.ring_entries; index++)
        inner->sq.array[index] = index;
    /* What the dead one filled in and did not submit must not be executed: tail back to head. */
    uint32_t head = __atomic_load_n(inner->sq.khead, __ATOMIC_ACQUIRE);
    __atomic_store_n(inner->sq.ktail, head, __ATOMIC_RELEASE);
    inner->sq.sqe_head = inner->sq.sqe_tail = head;
    ring->attached_head = head;
    return 0;
}

void atoll_uring_detach(struct atoll_uring *ring)
{
    struct io_uring *inner = atoll_uring_inner(ring);
    munmap(inner->sq.sqes, inner->sq.ring_entries * sizeof(struct io_uring_sqe));
    munmap(inner->sq.ring_ptr, inner->sq.ring_sz);
    if (inner->cq.ring_ptr != inner->sq.ring_ptr && inner->cq.ring_ptr != 0)
        munmap(inner->cq.ring_ptr, inner->cq.ring_sz);
    memset(ring, 0, sizeof *ring);
    ring->fd = -1;
}

uint32_t atoll_uring_next(const struct atoll_uring *ring) { return atoll_uring_inner(ring)->sq.sqe_tail; }

bool atoll_uring_consumed(const struct atoll_uring *ring, uint32_t position)
{
    uint32_t head = __atomic_load_n(atoll_uring_inner(ring)->sq.khead, __ATOMIC_ACQUIRE);
    return (int32_t)(head - position) > 0;
}

uint32_t atoll_uring_room(const struct atoll_uring *ring) { return io_uring_sq_space_left(atoll_uring_inner(ring)); }

struct io_uring_sqe *atoll_uring_sqe(struct atoll_uring *ring)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(atoll_uring_inner(ring));
    if (sqe != 0)
        memset(sqe, 0, sizeof *sqe);
    return sqe;
}

int atoll_uring_submit(struct atoll_uring *ring)
{
    int result;
    do
        result = io_uring_submit(atoll_uring_inner(ring));
    while (result == -EINTR);
    return result;
}

uint32_t atoll_uring_peek(struct atoll_uring *ring, struct atoll_uring_completion *completions, uint32_t maximum)
{
    struct io_uring_cqe *found[64];
    uint32_t count = io_uring_peek_batch_cqe(atoll_uring_inner(ring), found, maximum < 64 ? maximum : 64);
    for (uint32_t index = 0; index < count; index++)
        completions[index] = (struct atoll_uring_completion){
            .user_data = found[index]->user_data, .result = found[index]->res, .flags = found[index]->flags};
    return count;
}

void atoll_uring_advance(struct atoll_uring *ring, uint32_t count)
{
    io_uring_cq_advance(atoll_uring_inner(ring), count);
}

int atoll_uring_wait(struct atoll_uring *ring, int64_t timeout_ns)
{
    struct atoll_uring_completion first;
    if (atoll_uring_peek(ring, &first, 1) != 0)
        return 1;
    struct pollfd poll = {.fd = ring->fd, .events = POLLIN};
    struct timespec timeout = {.tv_sec = (time_t)(timeout_ns / 1000000000), .tv_nsec = (long)(timeout_ns % 1000000000)};
    int result = ppoll(&poll, 1, timeout_ns < 0 ? 0 : &timeout, 0);
    if (result < 0)
        return -errno;
    return atoll_uring_peek(ring, &first, 1) != 0;
}

int atoll_uring_register_file(int uring_fd, uint32_t index, int fd)
{
    struct io_uring_files_update update = {.offset = index, .fds = (uintptr_t)&fd};
    long result = syscall(__NR_io_uring_register, uring_fd, IORING_REGISTER_FILES_UPDATE, &update, 1);
    return result < 0 ? -errno : 0;
}

int atoll_uring_fill_nop(struct atoll_uring *ring, uint64_t user_data)
{
    struct io_uring_sqe *sqe = atoll_uring_sqe(ring);
    if (sqe == 0)
        return 0;
    io_uring_prep_nop(sqe);
    sqe->user_data = user_data;
    return 1;
}

int atoll_uring_fill_read(struct atoll_uring *ring, uint32_t file_index, uint64_t address, uint32_t length,
                          uint64_t offset, uint64_t user_data)
{
    struct io_uring_sqe *sqe = atoll_uring_sqe(ring);
    if (sqe == 0)
        return 0;
    io_uring_prep_read(sqe, (int)file_index, (void *)(uintptr_t)address, length, offset);
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = user_data;
    return 1;
}
