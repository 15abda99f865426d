/*
 * I/O requests of dedup to its storage drivers: a table in dedup's arena that outlives the process.
 *
 * A request is entered and sent in one transaction, so either both happened or neither. Its completion arrives on the
 * ring from the driver, whoever plays dedup by then, and is dispatched by `kind`. A slot is not used again before its
 * completion has been handled; neither are the memory and the place on the device that it refers to.
 *
 * After a crash of dedup: requests in flight stay in flight; the successor handles their completions.
 * After a crash of the driver: its successor knows from its own arena and the outliving io_uring which requests
 * are still under way, and does the others; dedup does nothing.
 */
#ifndef ATOLL_DEDUP_IO_H
#define ATOLL_DEDUP_IO_H

#include "ipc/domain.h"

struct dedup;

/* Who asked, so that the completion finds its way after a takeover. Numbered by hand (arena outlives process). */
enum io_kind {
    IO_FREE = 0,
    IO_DESTAGE = 1,    /* datapath: argument = run index */
    IO_FILL = 2,       /* datapath: read into cache pages; argument as datapath wants */
    IO_STORE = 3,      /* store: argument as store wants */
    IO_TIER = 4,       /* fast tier: argument as datapath_tier.h says */
    IO_SCRUB = 8       /* scrub: argument = number of the scrub << 8 | first block of the batch */
};

#define IO_AFTER 3

struct io_slot {
    uint32_t kind;           /* enum io_kind */
    uint32_t sequence;       /* goes up with each use; never 0 in one */
    uint32_t opcode;         /* ATOLL_OP_IO_* */
    uint32_t device;         /* role of the driver */
    uint64_t argument;
    uint64_t offset_bytes;   /* on the device */
    uint32_t length_bytes;
    uint32_t segment_count;
    uint64_t after[IO_AFTER]; /* of a sync: see io_submit_sync */
    struct atoll_segment segments[ATOLL_IO_BLOCKS];
};

struct io_table {
    uint32_t free_count;
    uint32_t reserved;
    uint32_t free[ATOLL_IO_COUNT]; /* stack of free slot numbers */
    struct io_slot slots[ATOLL_IO_COUNT];
};

/* I/O slots that only IO_STORE may take: metadata must be able to move when data fills everything else. */
#define IO_STORE_SHARE 64
/* Slots that clients' reads leave to destage: the reads of one batch, each of whose candidates may lie elsewhere. */
#define IO_DESTAGE_SHARE ATOLL_IO_BLOCKS
/* What is left for those. */
#define IO_FILL_SHARE (ATOLL_IO_COUNT - IO_STORE_SHARE - IO_DESTAGE_SHARE)

/* Enters and sends a request in the running transaction. `segments` (count <= ATOLL_IO_BLOCKS) is copied into the slot.
 * Returns the slot number, or -1 if none is free (IO_STORE may take the last 64, the others leave them). */
int io_submit(struct dedup *dedup, enum io_kind kind, uint64_t argument, uint32_t device, uint32_t opcode,
              uint64_t offset_bytes, const struct atoll_segment *segments, uint32_t segment_count);

/* The same for an IO_FILL read of the main device that a client waits for: its driver may run where the client is answered. */
int io_submit_awaited(struct dedup *dedup, uint64_t argument, uint64_t offset_bytes, const struct atoll_segment *segments,
                      uint32_t segment_count);

/* A sync of the main device that its driver begins when the requests of identity after[0..count) are done, which were submitted before
 * (count <= IO_AFTER). */
int io_submit_sync(struct dedup *dedup, enum io_kind kind, uint64_t argument, const uint64_t *after, uint32_t count);
/* Of a request that has been submitted and is not done. */
static inline uint64_t io_identity(const struct io_table *table, int number)
{
    return (uint64_t)number << 32 | table->slots[number].sequence;
}

/* Takes one completion, checks it, releases the slot and calls the owner below, all in the running transaction.
 * A completion that names no request in flight is counted and dropped (I8). Returns the bytes that were read. */
uint32_t io_complete(struct dedup *dedup, uint32_t device, const struct atoll_descriptor *message);

/* Prepares the table of a fresh (zeroed) arena. */
void io_format(struct io_table *table);
/* Requests that can be submitted now: IO_STORE any, IO_DESTAGE (its writes, and reads to match) all but the store's share,
 * IO_FILL (clients' reads) all but destage's too. */
uint32_t io_room(const struct dedup *dedup, enum io_kind kind);
/* After the death of all (rings and drivers started anew, nothing is in flight): IO_STORE requests that
 * stand are sent again, the others have failed; the datapath's are released, it does its own again. `late`: what the dead have asked the
 * device for may still happen. In the running transaction. */
void io_adopt(struct dedup *dedup, bool late);

/* Owners' handlers. `slot` is valid during the call; submitting new requests from within is allowed. */
void datapath_io_done(struct dedup *dedup, const struct io_slot *slot, uint32_t status);
void store_io_done(struct dedup *dedup, const struct io_slot *slot, uint32_t status);
/* After the death of all, which makes the driver's memory anew: true if the request can be sent again, because what it writes lies in
 * dedup's own arena, or what it reads goes (from now on, if need be) where the store's pages are now. A flush has failed. */
bool store_io_stands(struct dedup *dedup, struct io_slot *slot, bool late);

#endif
