/*
 * The thread engine, for machines that forbid io_uring: a pool of threads, a queue of I/Os, a queue of outcomes.
 *
 *   threads_start      the main thread hands over an I/O (never waits: there are as many places as I/O slots)
 *   threads_complete   the main thread applies outcomes
 *
 * The threads touch neither table nor rings, only their own copy of an I/O (the buffers it names are the device's
 * for that time). The first outcome in an empty queue wakes the main thread through its eventfd.
 *
 * After a crash: everything here is gone with the process. The supervisor promotes only when the process has ended
 * altogether (pidfd), so no I/O of it is under way; the successor does all unanswered I/Os again. What an fdatasync of
 * the dead found and did not tell may be lost for buffered devices: the next one reports success (Linux tells an
 * error once); with O_DIRECT each write tells its own error.
 */
#define _GNU_SOURCE
#include "drivers/disk/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

struct thread_io {
    uint64_t user_data;
    uint64_t offset_bytes;
    uint64_t length_bytes;   /* of a discard */
    uint32_t opcode;
    uint32_t iovec_count;
    int64_t result;
    struct iovec iovecs[ATOLL_IO_BLOCKS];
};

struct thread_queue { /* of indices into `ios`; each is in one place at a time, so none overflows */
    uint32_t head, count;
    uint32_t items[ATOLL_IO_COUNT];
};

struct thread_engine {
    int device_fd, eventfd;
    bool stop;
    uint32_t thread_count;
    pthread_t threads[DISK_THREAD_COUNT];
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct thread_queue idle, waiting, done;
    struct thread_io ios[ATOLL_IO_COUNT];
};

static void put(struct thread_queue *queue, uint32_t item)
{
    assert(queue->count < ATOLL_IO_COUNT);
    queue->items[(queue->head + queue->count++) % ATOLL_IO_COUNT] = item;
}

static uint32_t get(struct thread_queue *queue)
{
    assert(queue->count > 0);
    uint32_t item = queue->items[queue->head];
    queue->head = (queue->head + 1) % ATOLL_IO_COUNT;
    queue->count--;
    return item;
}

/* A byte count, or a negative errno. */
static int64_t execute(int fd, const struct thread_io *io)
{
    int64_t result;
    switch (io->opcode) {
    case ATOLL_OP_IO_READ: result = preadv(fd, io->iovecs, (int)io->iovec_count, (off_t)io->offset_bytes); break;
    case ATOLL_OP_IO_WRITE: result = pwritev(fd, io->iovecs, (int)io->iovec_count, (off_t)io->offset_bytes); break;
    case ATOLL_OP_IO_SYNC: result = fdatasync(fd); break;
    case ATOLL_OP_IO_DISCARD:
        result = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)io->offset_bytes, (off_t)io->length_bytes);
        break;
    default: return -EINVAL;
    }
    return result < 0 ? -errno : result;
}

static void *worker(void *argument)
{
    struct thread_engine *engine = argument;
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        while (engine->waiting.count == 0 && !engine->stop)
            pthread_cond_wait(&engine->work, &engine->lock);
        if (engine->stop)
            break;
        uint32_t item = get(&engine->waiting);
        pthread_mutex_unlock(&engine->lock);
        engine->ios[item].result = execute(engine->device_fd, &engine->ios[item]);
        pthread_mutex_lock(&engine->lock);
        put(&engine->done, item);
        if (engine->done.count == 1) {
            uint64_t one = 1;
            ssize_t written = write(engine->eventfd, &one, sizeof one);
            (void)written; /* full: the main thread is woken already */
        }
    }
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

struct thread_engine *threads_open(int device_fd, int eventfd, char *error)
{
    struct thread_engine *engine = calloc(1, sizeof *engine);
    sigset_t all, before;
    if (engine == 0) {
        snprintf(error, 256, "out of memory");
        return 0;
    }
    engine->device_fd = device_fd;
    engine->eventfd = eventfd;
    pthread_mutex_init(&engine->lock, 0);
    pthread_cond_init(&engine->work, 0);
    for (uint32_t item = 0; item < ATOLL_IO_COUNT; item++)
        put(&engine->idle, item);
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* signals are the main thread's */
    int code = 0;
    while (engine->thread_count < DISK_THREAD_COUNT && code == 0) {
        code = pthread_create(&engine->threads[engine->thread_count], 0, worker, engine);
        if (code == 0)
            engine->thread_count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
    if (code != 0) {
        snprintf(error, 256, "thread %u of %u: %s", engine->thread_count + 1, DISK_THREAD_COUNT, strerror(code));
        threads_close(engine);
        return 0;
    }
    return engine;
}

void threads_start(struct thread_engine *engine, const struct disk_slot *slot, uint64_t bytes)
{
    pthread_mutex_lock(&engine->lock);
    uint32_t item = get(&engine->idle);
    pthread_mutex_unlock(&engine->lock);
    struct thread_io *io = &engine->ios[item];
    bool transfer = slot->opcode == ATOLL_OP_IO_READ || slot->opcode == ATOLL_OP_IO_WRITE;
    io->user_data = disk_user_data(slot);
    io->opcode = slot->opcode;
    io->offset_bytes = slot->offset_bytes + slot->done_bytes;
    io->length_bytes = bytes;
    io->iovec_count = transfer ? slot->iovec_count - slot->iovec_first : 0;
    memcpy(io->iovecs, slot->iovecs + slot->iovec_first, io->iovec_count * sizeof io->iovecs[0]);
    pthread_mutex_lock(&engine->lock);
    put(&engine->waiting, item);
    pthread_cond_signal(&engine->work);
    pthread_mutex_unlock(&engine->lock);
}

uint32_t threads_complete(struct thread_engine *engine, struct disk *disk, uint32_t most)
{
    uint32_t items[ATOLL_IO_COUNT], count = 0;
    pthread_mutex_lock(&engine->lock);
    while (engine->done.count != 0 && count < most)
        items[count++] = get(&engine->done);
    pthread_mutex_unlock(&engine->lock);
    for (uint32_t index = 0; index < count; index++)
        disk_apply(disk, engine->ios[items[index]].user_data, engine->ios[items[index]].result);
    if (count != 0) {
        pthread_mutex_lock(&engine->lock);
        for (uint32_t index = 0; index < count; index++)
            put(&engine->idle, items[index]);
        pthread_mutex_unlock(&engine->lock);
    }
    return count;
}

bool threads_ready(struct thread_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    bool ready = engine->done.count != 0;
    pthread_mutex_unlock(&engine->lock);
    return ready;
}

void threads_close(struct thread_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    engine->stop = true;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    for (uint32_t index = 0; index < engine->thread_count; index++)
        pthread_join(engine->threads[index], 0);
    free(engine);
}
