/* See uring.h. */
#define _GNU_SOURCE
#include "ipc/uring.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
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

static int create(uint32_t entries, uint32_t completion_entries, uint32_t file_count, uint32_t flags,
                  struct atoll_uring_parameters *parameters, char *error)
{
    /* No SQPOLL, SINGLE_ISSUER, DEFER_TASKRUN: nothing that binds the ring to one task. */
    struct io_uring_params params = {.flags = IORING_SETUP_CLAMP | IORING_SETUP_CQSIZE | flags, .cq_entries = completion_entries};

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
    *parameters = (struct atoll_uring_parameters){0};
    memcpy(parameters->words, &params, sizeof params);
    return fd;
}

int atoll_uring_create(uint32_t entries, uint32_t completion_entries, uint32_t file_count,
                       struct atoll_uring_parameters *parameters, char *error)
{
    return create(entries, completion_entries, file_count, 0, parameters, error);
}

/* --- Storage ------------------------------------------------------------------------------------------------------- */

static bool has_operation(int fd, uint32_t operation)
{
    struct { struct io_uring_probe probe; struct io_uring_probe_op ops[256]; } known = {0};
    return syscall(__NR_io_uring_register, fd, IORING_REGISTER_PROBE, &known, 256) == 0 &&
           operation <= known.probe.last_op && (known.ops[operation].flags & IO_URING_OP_SUPPORTED);
}

/* From now on no operation writes to a registered buffer. In a ring that is not enabled yet. */
static bool make_sources(int fd)
{
    static const uint8_t operations[] = {IORING_OP_NOP, IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE, IORING_OP_WRITEV,
                                         IORING_OP_WRITE_FIXED, ATOLL_URING_WRITEV_FIXED, IORING_OP_FSYNC, IORING_OP_FALLOCATE};
    enum { COUNT = sizeof operations + 1 };
    struct io_uring_restriction rules[COUNT] = {
        {.opcode = IORING_RESTRICTION_REGISTER_OP, .register_op = IORING_REGISTER_BUFFERS_UPDATE}};
    struct io_uring_rsrc_register table = {.nr = ATOLL_URING_PIECES, .flags = IORING_RSRC_REGISTER_SPARSE};
    uint32_t count = 1;

    if (!has_operation(fd, ATOLL_URING_WRITEV_FIXED) ||
        syscall(__NR_io_uring_register, fd, IORING_REGISTER_BUFFERS2, &table, sizeof table) < 0)
        return false;
    for (uint32_t index = 0; index < sizeof operations; index++)
        rules[count++] = (struct io_uring_restriction){.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = operations[index]};
    return syscall(__NR_io_uring_register, fd, IORING_REGISTER_RESTRICTIONS, rules, count) == 0;
}

int atoll_uring_create_storage(uint32_t entries, uint32_t completion_entries, struct atoll_uring_parameters *parameters, char *error)
{
    int fd = create(entries, completion_entries, 0, IORING_SETUP_R_DISABLED, parameters, error);
    if (fd < 0)
        return fd;
    parameters->takes_sources = make_sources(fd);
    if (syscall(__NR_io_uring_register, fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) < 0) {
        int number = errno;
        close(fd);
        return fail(error, "io_uring: a ring for storage cannot be enabled", number);
    }
    return fd;
}

int atoll_uring_register_source(int uring_fd, struct atoll_uring_parameters *parameters, uint32_t role, uint64_t bytes, char *error)
{
    assert(role < ATOLL_ROLE_COUNT && bytes <= ATOLL_MAP_STRIDE);
    if (!parameters->takes_sources) {
        snprintf(error, 256, "the system cannot write from registered buffers as this needs it (Linux 6.15)");
        return -ENOSYS;
    }
    uint64_t *done = &parameters->source_bytes[role];
    while (*done < bytes) {
        uint64_t address = atoll_arena_address(role) + *done, left = bytes - *done;
        struct iovec piece = {.iov_base = (void *)(uintptr_t)address,
                              .iov_len = left < ATOLL_URING_PIECE_BYTES ? left : ATOLL_URING_PIECE_BYTES};
        struct io_uring_rsrc_update2 update = {
            .offset = (uint32_t)((address - ATOLL_MAP_BASE) / ATOLL_URING_PIECE_BYTES), .data = (uintptr_t)&piece, .nr = 1};
        if (syscall(__NR_io_uring_register, uring_fd, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof update) < 0) {
            int number = errno;
            char what[128];
            snprintf(what, sizeof what, "cannot pin %zu bytes at %#llx for the device", piece.iov_len, (unsigned long long)address);
            return fail(error, what, number);
        }
        *done += piece.iov_len;
    }
    return 0;
}

/* --- Using ----------------------------------------------------------------------------------------------------------- */

int atoll_uring_attach(struct atoll_uring *ring, int fd, const struct atoll_uring_parameters *parameters, char *error)
{
    struct io_uring_params params;
    struct io_uring *inner = atoll_uring_inner(ring);

    memcpy(&params, parameters->words, sizeof params);
    memset(ring, 0, sizeof *ring);
    memcpy(ring->source_bytes, parameters->source_bytes, sizeof ring->source_bytes);
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
