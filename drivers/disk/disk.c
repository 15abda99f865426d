/* The driver's main loop and its sleep; see disk.h. What a single request goes through stands in io.c. */
#define _GNU_SOURCE
#include "drivers/disk/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "drivers/disk/io.h"
#include "ipc/crashpoint.h"
#include "ipc/spin.h"

_Static_assert(sizeof(struct disk_slot) % 8 == 0 && sizeof(struct iovec) == sizeof(struct atoll_segment), "slot layout");
_Static_assert(DISK_STEP_MESSAGES * 16 < ATOLL_JOURNAL_ENTRIES, "a step's words fit the journal");
_Static_assert(DISK_COUNTER_COUNT <= ATOLL_COUNTER_COUNT, "counters");
_Static_assert(ATOLL_IO_COUNT <= 0x10000, "an identity leaves the upper 16 bits of user_data to the attempt");

/* Turns on the processor that it leaves to others before it starts what no client waits for. */
#define GIVE_WAY_TURNS 3
/* Small reads that clients wait for are gathered while the device has at least GATHER_BUSY requests to work on: until there are
 * GATHER_ENOUGH, for GATHER_TURNS turns of the others at most. */
#define GATHER_BUSY 4
#define GATHER_ENOUGH 8
#define GATHER_TURNS 8
/* After turns that took longer than ATOLL_SPIN_LOST_NS together. */
#define GATHER_REST_NS 100000000

uint64_t disk_role_bytes(void) { return sizeof(struct disk_table); }

/* --- Starting ---------------------------------------------------------------------------------------------------- */

/* Size and kind of the device; 0 or a negative errno. */
static int examine(struct disk *disk, char *error)
{
    struct stat about;
    if (fstat(disk->device_fd, &about) != 0) {
        int code = errno;
        snprintf(error, 256, "device descriptor %d: %s", disk->device_fd, strerror(code));
        return -code;
    }
    if (S_ISBLK(about.st_mode)) {
        disk->block_device = true;
        if (ioctl(disk->device_fd, BLKGETSIZE64, &disk->device_bytes) != 0) {
            int code = errno;
            snprintf(error, 256, "size of the block device: %s", strerror(code));
            return -code;
        }
    } else if (S_ISREG(about.st_mode)) {
        disk->device_bytes = (uint64_t)about.st_size;
    } else {
        snprintf(error, 256, "the device is neither a file nor a block device (mode %o)", (unsigned)about.st_mode);
        return -EINVAL;
    }
    disk->device_bytes -= disk->device_bytes % ATOLL_BLOCK_BYTES;
    int flags = fcntl(disk->device_fd, F_GETFL);
    disk->direct = flags >= 0 && (flags & O_DIRECT) != 0;
    return 0;
}

struct disk *disk_create(struct atoll_domain *domain, int device_fd, bool pass_discards, bool crashed, char *error)
{
    struct atoll_arena_header *self = domain->self;
    struct disk *disk = calloc(1, sizeof *disk);
    if (disk == 0) {
        snprintf(error, 256, "out of memory");
        return 0;
    }
    disk->domain = domain;
    disk->device_fd = device_fd;
    disk->eventfd = self->eventfd;
    disk->discards = pass_discards;
    disk->next_due_ns = UINT64_MAX;
    if (self->role_bytes < sizeof(struct disk_table)) {
        snprintf(error, 256, "role area of %llu bytes, the table needs %zu", (unsigned long long)self->role_bytes,
                 sizeof(struct disk_table));
        free(disk);
        return 0;
    }
    if (examine(disk, error) != 0) {
        free(disk);
        return 0;
    }
    disk->table = (void *)((char *)self + self->role_offset);
    if (crashed)
        io_note_suspect(disk);
    self->current = 0;
    return disk;
}

int disk_attach_uring(struct disk *disk, int uring_fd, const void *parameters, char *error)
{
    assert(disk->engine == DISK_ENGINE_NONE);
    disk->uring = uring_open(uring_fd, parameters, error);
    if (disk->uring == 0)
        return -EIO;
    disk->engine = DISK_ENGINE_URING;
    io_take_over(disk);
    return 0;
}

int disk_attach_threads(struct disk *disk, char *error)
{
    assert(disk->engine == DISK_ENGINE_NONE);
    disk->threads = threads_open(disk->device_fd, disk->eventfd, error);
    if (disk->threads == 0)
        return -EAGAIN;
    disk->engine = DISK_ENGINE_THREADS;
    io_take_over(disk);
    return 0;
}

void disk_destroy(struct disk *disk)
{
    if (disk->uring != 0)
        uring_close(disk->uring);
    if (disk->threads != 0)
        threads_close(disk->threads);
    place_close(disk);
    free(disk);
}

void disk_status(struct disk *disk, struct disk_status *status)
{
    *status = (struct disk_status){.engine = disk->engine,
                                   .direct = disk->direct,
                                   .block_device = disk->block_device,
                                   .discards = disk->discards,
                                   .queued = io_queued(disk),
                                   .submitted = disk->submitted,
                                   .device_bytes = disk->device_bytes,
                                   .taken = disk->table->taken};
}

void disk_stop(struct disk *disk) { disk->stopping = true; }

/* --- The loop ---------------------------------------------------------------------------------------------------- */

static uint32_t complete(struct disk *disk)
{
    if (disk->engine == DISK_ENGINE_URING)
        return uring_complete(disk->uring, disk, DISK_STEP_MESSAGES);
    return threads_complete(disk->threads, disk, DISK_STEP_MESSAGES);
}

/* Messages that can be taken: each needs a place for its answer, beside those of the requests in flight. */
static uint32_t takeable(struct disk *disk)
{
    uint32_t room = atoll_ring_room(&disk->domain->rings->tx[ATOLL_ROLE_DEDUP]);
    return room > disk->in_flight ? room - disk->in_flight : 0;
}

static uint32_t take(struct disk *disk)
{
    struct atoll_descriptor message;
    uint32_t most = takeable(disk), count = 0;
    bool gives_way = true;
    if (most > DISK_STEP_MESSAGES)
        most = DISK_STEP_MESSAGES;
    if (most > 1 && io_any_suspect(disk))
        most = 1;
    while (count < most && atoll_domain_take(disk->domain, ATOLL_ROLE_DEDUP, &message)) {
        disk->domain->self->current = message.identity;
        place_note(disk, &message);
        gives_way = gives_way && (message.flags & ATOLL_FLAG_ALONE) != 0;
        disk->gathers = message.opcode == ATOLL_OP_IO_READ && message.length <= ATOLL_BLOCK_BYTES &&
                        (message.flags & ATOLL_FLAG_AWAITED) != 0;
        io_take(disk, &message);
        count++;
    }
    disk->gives_way = gives_way && count != 0; /* what waited in a queue has waited for long enough */
    return count;
}

/* To hand requests over takes tens of microseconds of system call, and who is woken up runs before those who spin. Where no client waits
 * for them, those for whom clients wait come first: a turn each, the rest of the path and the client. */
static void give_way(const struct disk *disk)
{
    for (uint32_t turn = 0; turn < GIVE_WAY_TURNS && disk->gives_way; turn++)
        sched_yield();
}

static bool outcomes_ready(struct disk *disk)
{
    return disk->engine == DISK_ENGINE_URING ? uring_ready(disk->uring) : threads_ready(disk->threads);
}

/* To start reads costs some ten microseconds a time, for one as for many: a system call and the notification of the device. Who is woken
 * up runs first, so that reads which come one after the other through the path would be started in ones and twos. While the
 * device is busy that gains them nothing; so the others, who bring more, have their turns before. What is done is answered at once, and
 * where somebody computes on this processor, so that turns are long in coming back, there is no gathering for a while. Nor is there
 * where the server has no other processor: clients beside it send many at a time anyway. */
static void gather(struct disk *disk)
{
    if (!disk->gathers || disk->submitted < GATHER_BUSY || !place_near(disk))
        return;
    uint64_t begin = atoll_now_ns(), now = begin;
    for (uint32_t turn = 0; turn < GATHER_TURNS && now >= disk->gather_from_ns && !outcomes_ready(disk) &&
                            atoll_domain_pending(disk->domain, ATOLL_ROLE_DEDUP) < GATHER_ENOUGH; turn++) {
        sched_yield();
        now = atoll_now_ns();
        if (now - begin > ATOLL_SPIN_LOST_NS)
            disk->gather_from_ns = now + GATHER_REST_NS;
    }
}

static void wait_for_work(struct disk *disk)
{
    struct atoll_domain *domain = disk->domain;
    uint32_t ignored = takeable(disk) == 0 ? 1u << ATOLL_ROLE_DEDUP : 0;
    struct pollfd fds[2] = {{.fd = disk->eventfd, .events = POLLIN}, {.fd = -1, .events = POLLIN}};
    int timeout_ms = ignored != 0 ? 100 : -1;

    if (!atoll_domain_may_sleep(domain, ignored))
        return;
    if (disk->engine == DISK_ENGINE_URING) {
        fds[1].fd = uring_poll_fd(disk->uring);
        if (uring_unsubmitted(disk->uring))
            timeout_ms = 1;
    }
    if (disk->next_due_ns != UINT64_MAX) {
        uint64_t now = atoll_now_ns();
        uint64_t wait_ms = disk->next_due_ns > now ? (disk->next_due_ns - now + 999999) / 1000000 : 0;
        if (timeout_ms < 0 || wait_ms < (uint64_t)timeout_ms)
            timeout_ms = wait_ms < 3600000 ? (int)wait_ms : 3600000;
    }
    if (!outcomes_ready(disk)) {
        atoll_count(domain, DISK_SLEEPS, 1);
        int count = poll(fds, 2, timeout_ms);
        if (count > 0 && (fds[0].revents & POLLIN)) {
            uint64_t ignored_count;
            ssize_t got = read(disk->eventfd, &ignored_count, sizeof ignored_count);
            (void)got; /* a signal, or somebody else's read: then the loop just looks around once more */
        }
    }
    atoll_domain_awake(domain);
}

void disk_take_failure(struct disk *disk, struct disk_failure *failure)
{
    *failure = disk->failure;
    disk->failure = (struct disk_failure){0};
    disk->told_ns = atoll_now_ns();
}

int disk_run(struct disk *disk)
{
    struct atoll_domain *domain = disk->domain;
    struct disk_slot *started[ATOLL_IO_COUNT];

    assert(disk->engine != DISK_ENGINE_NONE);
    for (;;) {
        atoll_store_relaxed(&domain->self->progress, domain->self->progress + 1);
        if (atoll_domain_pending(domain, ATOLL_ROLE_KERNEL) != 0)
            return ATOLL_REASON_CONTROL;
        if (disk->stopping && disk->in_flight == 0 && atoll_domain_pending(domain, ATOLL_ROLE_DEDUP) == 0)
            return ATOLL_REASON_STOP;
        if (disk->failure.count != 0 && (disk->told_ns == 0 || atoll_now_ns() - disk->told_ns >= DISK_TELL_NS))
            return DISK_REASON_TELL;

        gather(disk);
        uint32_t applied = complete(disk);
        uint32_t taken = take(disk);
        uint32_t answered = 0;
        uint32_t count = io_place(disk, started, &answered);
        bool busy = applied + taken + answered + count != 0;
        if (busy) {
            ATOLL_CRASH_POINT(domain, "disk.step");
            atoll_domain_commit(domain);
            domain->self->current = 0;
            ATOLL_CRASH_POINT(domain, "disk.committed");
        }
        if (applied != 0 && disk->engine == DISK_ENGINE_URING) {
            uring_advance(disk->uring);
            ATOLL_CRASH_POINT(domain, "disk.advanced");
        }
        if (count != 0)
            give_way(disk);
        io_start(disk, started, count);
        if (taken != 0)
            place_settle(disk);
        if (!busy)
            wait_for_work(disk);
    }
}
