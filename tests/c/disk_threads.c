/* The disk driver's thread engine: random reads, writes, syncs and discards of a file, as many at once as there are slots,
 * each outcome once and right; closed with work waiting. Under ThreadSanitizer the point is what the threads share. */
/* link: drivers/disk/engine_threads.c */
/* sanitize: thread address,undefined */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "arena_support.h"
#include "drivers/disk/disk.h"

enum { REGION = 4 * ATOLL_BLOCK_BYTES, IOS = 20000 };

/* Slot n owns the n-th region of the file: what it must hold is known at every moment. */
static struct disk_slot *slots;
static uint8_t (*buffers)[REGION];
static uint8_t filled[ATOLL_IO_COUNT];
static bool busy[ATOLL_IO_COUNT];
static uint64_t finished;

bool disk_apply(struct disk *disk, uint64_t user_data, int64_t result)
{
    (void)disk;
    uint32_t number = (uint32_t)(user_data >> 16) & 0xffff;
    struct disk_slot *slot = &slots[number];
    CHECK(number < ATOLL_IO_COUNT && busy[number] && user_data == disk_user_data(slot));
    busy[number] = false;
    finished++;
    if (slot->opcode == ATOLL_OP_IO_SYNC || slot->opcode == ATOLL_OP_IO_DISCARD) {
        CHECK(result == 0 || result == -EOPNOTSUPP);
        if (slot->opcode == ATOLL_OP_IO_DISCARD && result == 0)
            filled[number] = 0;
        return true;
    }
    CHECK(result == REGION);
    if (slot->opcode == ATOLL_OP_IO_WRITE)
        filled[number] = buffers[number][0];
    else
        for (uint32_t at = 0; at < REGION; at++)
            CHECK(buffers[number][at] == filled[number]);
    return true;
}

static void begin(struct thread_engine *engine, uint32_t number, uint64_t *random)
{
    static const uint32_t opcodes[] = {ATOLL_OP_IO_READ, ATOLL_OP_IO_WRITE, ATOLL_OP_IO_WRITE, ATOLL_OP_IO_READ, ATOLL_OP_IO_SYNC,
                                       ATOLL_OP_IO_DISCARD};
    struct disk_slot *slot = &slots[number];
    uint32_t draw = (uint32_t)(next_random(random) >> 33);
    slot->opcode = opcodes[draw % 64 == 0 ? 4 : draw % 64 == 1 ? 5 : draw % 4];
    slot->identity = (uint64_t)number << 16 | (slot->identity & 0xffff);
    slot->attempt++;
    slot->offset_bytes = (uint64_t)number * REGION;
    slot->done_bytes = 0;
    memset(buffers[number], slot->opcode == ATOLL_OP_IO_WRITE ? (int)(draw >> 8 & 0xff) : 0x5a, REGION);
    slot->iovec_first = 0;
    slot->iovec_count = 2;
    slot->iovecs[0] = (struct iovec){buffers[number], ATOLL_BLOCK_BYTES};
    slot->iovecs[1] = (struct iovec){buffers[number] + ATOLL_BLOCK_BYTES, REGION - ATOLL_BLOCK_BYTES};
    busy[number] = true;
    threads_start(engine, slot, REGION);
}

int main(int argc, char **argv)
{
    uint64_t random = seed_of(argc, argv), started = 0;
    char path[] = "/tmp/atoll-threads-XXXXXX", error[256];
    int file = mkstemp(path), wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    CHECK(file >= 0 && wake >= 0 && unlink(path) == 0);
    CHECK(ftruncate(file, (off_t)ATOLL_IO_COUNT * REGION) == 0);
    slots = calloc(ATOLL_IO_COUNT, sizeof *slots);
    buffers = malloc((size_t)ATOLL_IO_COUNT * sizeof *buffers);
    CHECK(slots != 0 && buffers != 0);

    struct thread_engine *engine = threads_open(file, wake, error);
    CHECK(engine != 0);
    while (finished < IOS) {
        uint64_t most = next_random(&random) % 3 == 0 ? 1 : ATOLL_IO_COUNT; /* a few at a time, then all that there is room for */
        for (uint32_t number = 0; number < ATOLL_IO_COUNT && started - finished < most && started < IOS; number++)
            if (!busy[number]) {
                begin(engine, number, &random);
                started++;
            }
        while (started != finished && !threads_ready(engine)) { /* woken once for an empty queue that got its first outcome */
            struct pollfd woken = {.fd = wake, .events = POLLIN};
            uint64_t count;
            CHECK(poll(&woken, 1, 20000) == 1);
            CHECK(read(wake, &count, sizeof count) == sizeof count);
        }
        threads_complete(engine, 0, 1 + (uint32_t)(next_random(&random) % 64));
    }
    CHECK(started == IOS && finished == IOS);
    for (uint32_t number = 0; number < ATOLL_IO_COUNT; number++)
        begin(engine, number, &random);
    threads_close(engine); /* with work under way and waiting */
    free(slots);
    free(buffers);
    close(file);
    close(wake);
    return 0;
}
