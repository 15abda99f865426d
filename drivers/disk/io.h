/* The way of one request through the driver: taken and checked, placed, started, its outcome applied, answered. */
#ifndef ATOLL_DISK_IO_H
#define ATOLL_DISK_IO_H

#include "drivers/disk/disk.h"

/* The request that a predecessor crashed at counts as suspect. Commits. */
void io_note_suspect(struct disk *disk);
/* True while a request is suspect: then one message is taken at a time, so that no other is blamed. */
bool io_any_suspect(const struct disk *disk);
/* After a predecessor: counts what is under way, queues what must be done again, oldest first. Commits. */
void io_take_over(struct disk *disk);
/* One message of dedup, in the running transaction: entered into the table, or answered with EINVAL. The caller has made
 * sure that the answer has a place. */
void io_take(struct disk *disk, const struct atoll_descriptor *message);
/* Marks queued requests as submitted, as many as the engine has room for, and lists them in `started` (ATOLL_IO_COUNT
 * places). `*answered`: requests that ended here because nothing is to be done. In the running transaction. */
uint32_t io_place(struct disk *disk, struct disk_slot **started, uint32_t *answered);
/* Requests that are QUEUED. */
uint32_t io_queued(const struct disk *disk);
/* Gives placed requests to the engine. Outside of transactions: this starts I/O. */
void io_start(struct disk *disk, struct disk_slot *const *started, uint32_t count);

#endif
