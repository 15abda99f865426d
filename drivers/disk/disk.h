/*
 * The storage driver: executes dedup's reads, writes, flushes and discards on one device, straight from and into arenas.
 *
 *   disk_create(domain, ...)      checks the arena's size, finds the table in it; nothing is started
 *   disk_attach_uring / _threads  the engine; takes up what a predecessor left
 *   disk_run(disk)                the steady state; returns an enum atoll_reason
 *   disk_status(disk, &status)    for the control call
 *   disk_destroy(disk)            ends the engine's threads, frees what is private
 *
 * One message of dedup is one entry of the table, at its I/O slot number (identity >> 32):
 *
 *   FREE ──taken, checked──► QUEUED ──place in the submission queue──► SUBMITTED ──completion──► answer, FREE
 *                               ▲                                          │
 *                               └───── short, interrupted, not consumed ───┘
 *
 * Each arrow is part of one transaction. The I/O itself happens between two transactions: SUBMITTED with the position
 * is committed first, then the entry of the submission queue is written and the operating system called; the outcome
 * stands in the completion queue, which outlives the process; the completion queue's head moves after the commit.
 * `user_data` of an I/O is the identity and the attempt, so an outcome that is seen twice is applied once.
 *
 * After a crash: the table is as of the last commit. An I/O whose position the operating system did not consume is
 * done again; one that it consumed is still under way or complete, and its outcome arrives in the outliving ring. With
 * threads, all that is not answered is done again (the supervisor waits for the end of the whole process first). dedup
 * notices nothing. A buffer named by an entry that is not FREE belongs to the I/O. A request during whose taking the
 * process crashed by itself is taken once more, alone, and then refused.
 */
#ifndef ATOLL_DISK_H
#define ATOLL_DISK_H

#include <sys/uio.h>

#include "ipc/domain.h"

/* cffi:begin */
/* States reach a successor: never renumber. */
enum disk_state {
    DISK_FREE = 0,
    DISK_QUEUED = 1,    /* taken, not given to the engine */
    DISK_SUBMITTED = 2  /* given to the engine at `position` */
};

/* What is started first. */
enum disk_rank {
    DISK_AWAITED = 0,    /* reads that clients wait for */
    DISK_SMALL = 1,      /* other reads of a block, syncs, discards */
    DISK_BACKGROUND = 2, /* other reads: destage waits for them, and a client may come to */
    DISK_DESTAGE = 3,    /* writes; in the background, too */
    DISK_RANKS
};

enum disk_engine { DISK_ENGINE_NONE = 0, DISK_ENGINE_URING = 1, DISK_ENGINE_THREADS = 2 };

/* Counters, in the order of COUNTERS in __init__.py. */
enum disk_counter {
    DISK_READS, DISK_READ_BYTES, DISK_WRITES, DISK_WRITE_BYTES, DISK_SYNCS, DISK_DISCARDS, DISK_DISCARDS_IGNORED,
    DISK_ERRORS,        /* requests that the device failed */
    DISK_REFUSED,       /* malformed requests, answered with EINVAL */
    DISK_DROPPED,       /* messages without an answer: of a request that is in flight already, or of no known opcode */
    DISK_REPEATED,      /* I/Os done again: interrupted, or not consumed when the predecessor died */
    DISK_SHORT,         /* I/Os that were continued after a short transfer */
    DISK_STALE,         /* completions that belong to no I/O under way */
    DISK_ADOPTED,       /* I/Os that a predecessor started and this incarnation finished */
    DISK_ENTERS,        /* system calls that start I/O */
    DISK_SLEEPS,
    DISK_POISONED,      /* requests refused because they crashed this role twice */
    DISK_PINNED,        /* writes of which the operating system had pinned all pages before */
    DISK_BACKGROUND_HELD, /* steps in which transfers in the background waited, because clients wait for reads */
    DISK_COUNTER_COUNT
};

struct disk;

struct disk_status {
    uint32_t engine;        /* enum disk_engine */
    uint32_t direct;        /* 1: past the page cache */
    uint32_t block_device;  /* 1: block device, 0: file */
    uint32_t discards;      /* 1: discards are passed on */
    uint32_t queued;
    uint32_t submitted;
    uint64_t device_bytes;
    uint64_t taken;         /* requests taken since the arena was made */
};

/* What the device failed at: the first request since it was last told, and how many there were. */
struct disk_failure {
    uint64_t offset_bytes;
    uint64_t length_bytes;
    uint64_t count;
    uint32_t opcode;        /* ATOLL_OP_IO_* */
    uint32_t code;          /* errno */
};

enum disk_reason { DISK_REASON_TELL = 16 };
/* cffi:end */

/* An I/O is at most this often done again before the request fails with the last error (attempts have 16 bits). */
#define DISK_ATTEMPTS_MAX 60000
/* Messages taken, and completions applied, in one step. */
#define DISK_STEP_MESSAGES 64
/* Requests that a sync may come after. */
#define DISK_AFTER 3
/* A device that goes on failing is told of once in this time. */
#define DISK_TELL_NS (60ull * 1000 * 1000 * 1000)
/* Worker threads of the thread engine: enough to keep a disk's queue busy. */
#define DISK_THREAD_COUNT 8

struct disk_slot {
    uint64_t identity;       /* dedup's; the low 32 bits are its sequence number */
    uint32_t state;          /* enum disk_state; all other members mean nothing while FREE */
    uint32_t opcode;         /* ATOLL_OP_IO_* */
    uint64_t offset_bytes;   /* on the device */
    uint64_t length_bytes;
    uint64_t done_bytes;     /* transferred by earlier attempts */
    uint64_t arrival;        /* order of acceptance */
    uint32_t attempt;        /* number of the I/O under way or of the next one */
    uint32_t position;       /* in the submission queue */
    uint32_t incarnation;    /* that started the I/O under way */
    uint32_t iovec_first;    /* first one that is not used up */
    uint32_t iovec_count;
    uint64_t after[DISK_AFTER]; /* a sync begins when those of these identities that arrived before it are done; 0: none */
    /* What the fault-injecting stand-in decided; 0, all, 0 in the driver itself. */
    uint32_t fate_error;     /* errno to report in place of success */
    uint64_t fate_bytes;     /* transfer only so many */
    uint64_t fate_due_ns;    /* not to be started before (CLOCK_MONOTONIC); UINT64_MAX: not until told */
    struct iovec iovecs[ATOLL_IO_BLOCKS];
};

/* The role area of the arena. */
struct disk_table {
    uint64_t taken;          /* requests accepted so far */
    uint64_t reserved[7];
    struct disk_slot slots[ATOLL_IO_COUNT];
};

/* The stand-in's place in the driver (drivers/fault); none in the driver itself. */
struct disk_hook {
    void *context;
    /* In the transaction that takes the request; may set the slot's fate. */
    void (*taken)(void *context, struct disk *disk, struct disk_slot *slot);
    /* Between transactions, before the I/O is given to the engine. May be called again for the same I/O after a crash. */
    void (*starting)(void *context, struct disk *disk, struct disk_slot *slot);
    /* In the transaction that answers, before it is committed. May be called again after a crash. */
    void (*finished)(void *context, struct disk *disk, struct disk_slot *slot, uint32_t status);
};

/* Slots that are QUEUED, oldest first. */
struct disk_queue {
    uint32_t numbers[ATOLL_IO_COUNT];
    uint32_t count;
};

/* Private to the process. */
struct disk {
    struct atoll_domain *domain;
    struct disk_table *table;            /* own arena */
    const struct disk_hook *hook;        /* or NULL */
    uint64_t device_bytes;
    int device_fd;
    int eventfd;                         /* own; peers and worker threads wake with it */
    bool block_device, direct, discards, stopping;
    enum disk_engine engine;
    struct uring_engine *uring;
    struct thread_engine *threads;
    uint32_t in_flight;                  /* slots that are not FREE */
    uint32_t submitted;                  /* of these, SUBMITTED */
    struct disk_queue queues[DISK_RANKS];
    uint8_t ranks[ATOLL_IO_COUNT];       /* enum disk_rank, of slots that are not FREE */
    uint64_t background_bytes;           /* of DISK_BACKGROUND and DISK_DESTAGE, SUBMITTED */
    uint32_t awaited;                    /* slots of the rank DISK_AWAITED */
    uint64_t awaited_ns;                 /* the last of them was answered then (CLOCK_MONOTONIC) */
    uint64_t next_due_ns;                /* of requests that are held back; UINT64_MAX: none */
    bool gives_way;                      /* what was taken in this step comes after the requests of clients */
    bool gathers;                        /* what was taken last was a small read that a client waits for */
    uint64_t gather_from_ns;             /* not before (CLOCK_MONOTONIC) */
    struct disk_failure failure;         /* not told yet; count 0: none */
    uint64_t told_ns;                    /* 0: never */
    struct disk_place *place;            /* where it runs; NULL: where the scheduler wants */
};

static inline uint64_t disk_user_data(const struct disk_slot *slot)
{
    return slot->identity | (uint64_t)(slot->attempt & 0xffff) << 48;
}

static inline uint32_t disk_slot_number(const struct disk *disk, const struct disk_slot *slot)
{
    return (uint32_t)(slot - disk->table->slots);
}

/* An outcome: `result` is a byte count or a negative errno. In a transaction. False: it belongs to no I/O under way. */
bool disk_apply(struct disk *disk, uint64_t user_data, int64_t result);

/* cffi:begin */
uint64_t disk_role_bytes(void);
/* NULL with the reason in `error` (256 bytes). A fresh arena is zeroed, which is an empty table. `pass_discards`: false
 * for a preallocated file, whose space must not be given back. `crashed`: the predecessor ended by its own fault, so the
 * request that it was taking is suspect (I8). `device_fd` stays the caller's. */
struct disk *disk_create(struct atoll_domain *domain, int device_fd, bool pass_discards, bool crashed, char *error);
/* `parameters`: struct atoll_uring_parameters of the outliving ring. 0 or a negative errno with the reason in `error`. */
int disk_attach_uring(struct disk *disk, int uring_fd, const void *parameters, char *error);
int disk_attach_threads(struct disk *disk, char *error);
/* Returns ATOLL_REASON_CONTROL when a control message waits, ATOLL_REASON_STOP once it was told to stop and no request
 * is in flight, DISK_REASON_TELL when disk_take_failure has something for the log. */
int disk_run(struct disk *disk);
void disk_take_failure(struct disk *disk, struct disk_failure *failure);
void disk_stop(struct disk *disk);
/* The processor on which clients are answered, if the data path shares one and this process may run there: see place.c. */
void disk_set_path_cpu(struct disk *disk, uint32_t cpu);
void disk_status(struct disk *disk, struct disk_status *status);
void disk_destroy(struct disk *disk);
/* cffi:end */

/* --- Engines ------------------------------------------------------------------------------------------------------ */

/* engine_uring.c. `_place` names the position for the next I/O (false: the queue is full); it is written by `_write` after
 * the commit and started by `_enter`. */
bool uring_place(struct uring_engine *engine, uint32_t ahead, uint32_t *position);
void uring_write(struct uring_engine *engine, struct disk *disk, struct disk_slot *slot);
void uring_enter(struct uring_engine *engine, struct disk *disk);
bool uring_consumed(struct uring_engine *engine, uint32_t position);
/* Applies up to `most` outcomes in the running transaction; after the commit `_advance` lets go of them. */
uint32_t uring_complete(struct uring_engine *engine, struct disk *disk, uint32_t most);
void uring_advance(struct uring_engine *engine);
bool uring_ready(struct uring_engine *engine);
/* Entries were left behind: `_enter` is to be called again soon. */
bool uring_unsubmitted(const struct uring_engine *engine);
int uring_poll_fd(const struct uring_engine *engine);
struct uring_engine *uring_open(int fd, const void *parameters, char *error);
void uring_close(struct uring_engine *engine);

/* engine_threads.c */
struct thread_engine *threads_open(int device_fd, int eventfd, char *error);
void threads_start(struct thread_engine *engine, const struct disk_slot *slot, uint64_t bytes);
uint32_t threads_complete(struct thread_engine *engine, struct disk *disk, uint32_t most);
bool threads_ready(struct thread_engine *engine);
void threads_close(struct thread_engine *engine);

/* place.c. `_note`: a message has been taken; `_settle`: at the end of a turn that took messages; `_near`: it has come to the
 * path's processor, and had a choice. */
void place_note(struct disk *disk, const struct atoll_descriptor *message);
void place_settle(struct disk *disk);
bool place_near(const struct disk *disk);
void place_close(struct disk *disk);

/* io.c: bytes to transfer in all attempts together. */
uint64_t disk_target_bytes(const struct disk_slot *slot);

#endif
