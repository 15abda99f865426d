/*
 * The io_uring engine: I/O by the queues that outlive the process (ipc/uring.h).
 *
 *   uring_place      position that the next I/O will have, to be committed as the intent
 *   uring_write      fills that position, after the commit
 *   uring_enter      hands all that is filled to the operating system, one call for the whole batch
 *   uring_complete   applies outcomes in the running transaction; uring_advance lets go of them after its commit
 *
 * What is written lies in arenas that init has registered with the ring, as far as it could: the operating system then need
 * not look up and pin each page of it. *Measured* (a virtual machine of 2 processors, Linux 6.18), system call for a write of scattered
 * blocks: 64: 27 to 16.5 µs, 128: 40 to 19.
 *
 * There are never more outcomes under way than I/O slots: an I/O is repeated only after its outcome was let go of.
 *
 * After a crash: see disk.h. The iovecs that an entry names lie in the arena; the operating system copies them when
 * it consumes the entry (IORING_FEAT_SUBMIT_STABLE).
 */
#define _GNU_SOURCE
#include "drivers/disk/disk.h"

#include <errno.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <stdlib.h>

#include "ipc/crashpoint.h"
#include "ipc/uring.h"

struct uring_engine {
    struct atoll_uring ring;
    uint32_t applied;       /* outcomes applied and not let go of */
    bool unsubmitted;       /* the operating system left entries behind */
};

struct uring_engine *uring_open(int fd, const void *parameters, char *error)
{
    struct uring_engine *engine = calloc(1, sizeof *engine);
    if (engine == 0) {
        snprintf(error, 256, "out of memory");
        return 0;
    }
    if (atoll_uring_attach(&engine->ring, fd, parameters, error) < 0) {
        free(engine);
        return 0;
    }
    struct io_uring *inner = atoll_uring_inner(&engine->ring);
    if (inner->cq.ring_entries < ATOLL_IO_COUNT || !(inner->features & IORING_FEAT_SUBMIT_STABLE)) {
        snprintf(error, 256, "io_uring of %u completion entries, features %x: %u entries and stable submission are needed",
                 inner->cq.ring_entries, inner->features, ATOLL_IO_COUNT);
        uring_close(engine);
        return 0;
    }
    return engine;
}

void uring_close(struct uring_engine *engine)
{
    atoll_uring_detach(&engine->ring);
    free(engine);
}

bool uring_consumed(struct uring_engine *engine, uint32_t position) { return atoll_uring_consumed(&engine->ring, position); }
bool uring_unsubmitted(const struct uring_engine *engine) { return engine->unsubmitted; }
int uring_poll_fd(const struct uring_engine *engine) { return engine->ring.fd; }

bool uring_place(struct uring_engine *engine, uint32_t ahead, uint32_t *position)
{
    if (atoll_uring_room(&engine->ring) <= ahead)
        return false;
    *position = atoll_uring_next(&engine->ring) + ahead;
    return true;
}

/* The registered buffer in which all of it lies, or -1. */
static int32_t source_of(const struct uring_engine *engine, const struct iovec *iovecs, uint32_t count)
{
    int32_t source = -1;
    for (uint32_t index = 0; index < count; index++) {
        int32_t its = atoll_uring_source(&engine->ring, (uintptr_t)iovecs[index].iov_base, iovecs[index].iov_len);
        if (its < 0 || (index != 0 && its != source))
            return -1;
        source = its;
    }
    return source;
}

void uring_write(struct uring_engine *engine, struct disk *disk, struct disk_slot *slot)
{
    assert(atoll_uring_next(&engine->ring) == slot->position);
    struct io_uring_sqe *sqe = atoll_uring_sqe(&engine->ring);
    assert(sqe != 0); /* uring_place saw the room */
    uint64_t offset_bytes = slot->offset_bytes + slot->done_bytes;
    const struct iovec *iovecs = slot->iovecs + slot->iovec_first;
    uint32_t iovec_count = slot->iovec_count - slot->iovec_first;
    int32_t source;

    switch (slot->opcode) {
    case ATOLL_OP_IO_READ:
        if (iovec_count == 1)
            io_uring_prep_read(sqe, disk->device_fd, iovecs->iov_base, (unsigned)iovecs->iov_len, offset_bytes);
        else
            io_uring_prep_readv(sqe, disk->device_fd, iovecs, iovec_count, offset_bytes);
        break;
    case ATOLL_OP_IO_WRITE:
        source = source_of(engine, iovecs, iovec_count);
        if (iovec_count == 1)
            io_uring_prep_write(sqe, disk->device_fd, iovecs->iov_base, (unsigned)iovecs->iov_len, offset_bytes);
        else
            io_uring_prep_writev(sqe, disk->device_fd, iovecs, iovec_count, offset_bytes);
        if (source >= 0) {
            sqe->opcode = iovec_count == 1 ? IORING_OP_WRITE_FIXED : ATOLL_URING_WRITEV_FIXED;
            sqe->buf_index = (uint16_t)source;
            atoll_count(disk->domain, DISK_PINNED, 1);
        }
        break;
    case ATOLL_OP_IO_SYNC: io_uring_prep_fsync(sqe, disk->device_fd, IORING_FSYNC_DATASYNC); break;
    default:
        assert(slot->opcode == ATOLL_OP_IO_DISCARD);
        io_uring_prep_fallocate(sqe, disk->device_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset_bytes,
                                (off_t)slot->length_bytes);
        break;
    }
    sqe->user_data = disk_user_data(slot);
}

void uring_enter(struct uring_engine *engine, struct disk *disk)
{
    uint32_t entries = atoll_uring_inner(&engine->ring)->sq.ring_entries;
    while (atoll_uring_room(&engine->ring) < entries) {
        ATOLL_CRASH_POINT(disk->domain, "disk.submit.before");
        int count = atoll_uring_submit(&engine->ring);
        atoll_count(disk->domain, DISK_ENTERS, 1);
        ATOLL_CRASH_POINT(disk->domain, "disk.submit.after");
        if (count <= 0) { /* EAGAIN, EBUSY: out of means for the moment; the loop comes back */
            assert(count == 0 || count == -EAGAIN || count == -EBUSY);
            engine->unsubmitted = true;
            return;
        }
    }
    engine->unsubmitted = false;
}

uint32_t uring_complete(struct uring_engine *engine, struct disk *disk, uint32_t most)
{
    struct atoll_uring_completion completions[DISK_STEP_MESSAGES];
    assert(engine->applied == 0);
    uint32_t count = atoll_uring_peek(&engine->ring, completions, most < DISK_STEP_MESSAGES ? most : DISK_STEP_MESSAGES);
    for (uint32_t index = 0; index < count; index++)
        disk_apply(disk, completions[index].user_data, completions[index].result);
    engine->applied = count;
    return count;
}

void uring_advance(struct uring_engine *engine)
{
    atoll_uring_advance(&engine->ring, engine->applied);
    engine->applied = 0;
}

bool uring_ready(struct uring_engine *engine)
{
    struct atoll_uring_completion first;
    return atoll_uring_peek(&engine->ring, &first, 1) != 0;
}
