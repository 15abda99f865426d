/*
 * S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction", SOSP '23): which page of a cache
 * gives way. It knows nothing of devices, blocks and pins: pages are numbers, what lies in them are keys.
 *
 *            enter                               used since
 *   new key ───────► small (a tenth) ───────────────────────► main (the rest) ◄──┐ used since
 *                          │ not used                            │      └────────┘
 *                          ▼                                     ▼ not used
 *                    ghost (keys alone, as many as main has pages)   gone
 *                          │ enter
 *                          └──────► main
 *
 *   s3fifo_enter       a key has come into a page, which is in no queue
 *   s3fifo_use         it has been used (again)
 *   s3fifo_leave       it is no longer there
 *   s3fifo_candidate   the page whose turn it is; then one of
 *     s3fifo_keep      it has been used since it was last kept or entered: it stays
 *     s3fifo_pass      it cannot be had at this moment: it waits for its next turn
 *     s3fifo_evict     it gives way
 *
 * Most blocks of a scan are never used again before they leave, so they pass through the small queue and what is in main
 * stays. What comes back while its key is a ghost goes to main at once: so a part of a loop that is larger than the cache is found
 * there at each turn, where a clock (or LRU) finds nothing. A use costs no more than a mark, as with a clock, so uses can be found
 * out late (those that nbd publishes). Unlike in the paper a page has one mark, not a count up to 3: an eviction then looks
 * at each page at most twice.
 *
 * Private memory of a process. After a crash all pages enter anew, and prove themselves in the small queue.
 */
#ifndef ATOLL_DEDUP_S3FIFO_H
#define ATOLL_DEDUP_S3FIFO_H

#include <stdbool.h>
#include <stdint.h>

/* cffi:begin */
#define S3FIFO_NONE 0xffffffff

struct s3fifo;

/* Pages that have been passed over while one to evict was looked for; zeros to begin with. */
struct s3fifo_busy {
    uint32_t in_small, in_main;
};

/* For pages 0 to page_count - 1, at least 1. NULL: no memory. */
struct s3fifo *s3fifo_open(uint32_t page_count);
void s3fifo_close(struct s3fifo *queues);
void s3fifo_prefetch(const struct s3fifo *queues, uint64_t key); /* it will come in: the cache line for that */
void s3fifo_enter(struct s3fifo *queues, uint32_t page, uint64_t key);
void s3fifo_leave(struct s3fifo *queues, uint32_t page);
void s3fifo_use(struct s3fifo *queues, uint32_t page);
bool s3fifo_used(const struct s3fifo *queues, uint32_t page);
/* The oldest page of the small queue if that has its share or more, else of main; not of one whose pages are all busy. S3FIFO_NONE:
 * all are, or none has entered. */
uint32_t s3fifo_candidate(const struct s3fifo *queues, const struct s3fifo_busy *busy);
void s3fifo_keep(struct s3fifo *queues, uint32_t page);
void s3fifo_pass(struct s3fifo *queues, uint32_t page, struct s3fifo_busy *busy);
void s3fifo_evict(struct s3fifo *queues, uint32_t page);
uint32_t s3fifo_small_count(const struct s3fifo *queues);
uint32_t s3fifo_main_count(const struct s3fifo *queues);
/* cffi:end */

#endif
