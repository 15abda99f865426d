/*
 * A log block that is written ahead of its sync, beside the data that it speaks of.
 *
 * A flush that waits for one batch of writes waits for the device three times: for the data, for the log block and for its flush. But what the log
 * block will say is known when the data are given to the device, unless something else happens meanwhile. So it is written with them, marked as one
 * that needs its data (FORMAT_LOG_UNFLUSHED), and the driver flushes behind all of it. The sync, when it comes, compares what it has to write with
 * what was written.
 *
 * If that is not the same the sync does what it always does, and its block takes the place of this one. Until then this one may be found by a loader:
 * a sync that was cut off, if its data are there; else nothing. But what is asked for and acknowledged after it must not be: a sync that has nothing
 * to say writes a block that says so in its place (store_ahead_settle).
 *
 * After a crash: the block and what is known of it are in the arena; a successor goes on.
 */
#include "ipc/crashpoint.h"
#include "services/dedup/store_internal.h"

bool store_place_ahead(struct dedup *dedup, const struct store_placing *placings, uint32_t count, uint64_t write)
{
    struct store *store = dedup->store;
    struct store_area *area = store->area;
    uint8_t *block = store->ahead;
    uint64_t *records = (uint64_t *)(void *)(block + sizeof(struct format_log_header)), after[3] = {write};
    uint32_t words = (uint32_t)(area->log_fill / 8);
    if (area->ahead_sequence != 0 || area->ahead_outstanding != 0 || area->log_next != area->log_durable || area->sync_phase != SYNC_IDLE ||
        area->sync_wanted || area->sync_forced || area->rewrite_wanted || area->checkpoint_phase != CHECKPOINT_IDLE || area->closing ||
        store_log_room(area) <= STORE_LOG_SLACK_BLOCKS || dedup->io->free_count < 3)
        return false;
    /* No sync compares it before it has a number: written directly. */
    memcpy(records, store_log_block(store, area->log_next) + sizeof(struct format_log_header), area->log_fill);
    for (uint32_t index = 0; index < count; index++) {
        if (words * 8 + STORE_CHANGE_BYTES > FORMAT_LOG_RECORD_BYTES)
            return false;
        uint32_t more = store_place_records(store, &placings[index], records, words);
        if (more == 0)
            return false;
        words += more;
    }
    ATOLL_CRASH_POINT(dedup->domain, "dedup.store.ahead");
    store_log_finish(store, block, (uint64_t)words * 8, FORMAT_LOG_UNFLUSHED);
    for (uint32_t copy = 0; copy < 2; copy++)
        after[1 + copy] = store_submit(store, STORE_IO_AHEAD, 0, ATOLL_OP_IO_WRITE, store_log_pba(area, area->log_next, copy), block,
                                       ATOLL_BLOCK_BYTES);
    bool sent = after[1] != 0 && after[2] != 0 && store_submit_flush(store, STORE_IO_AHEAD_FLUSH, after, 3);
    assert(sent); /* free_count was looked at */
    STORE_SET(store, ahead_sequence, area->log_next);
    STORE_SET(store, ahead_outstanding, 3);
    STORE_SET(store, ahead_error, 0);
    store_count(store, STORE_COUNTER_LOG_BLOCKS, 2);
    return true;
}

void store_ahead_io(struct store *store, enum store_io what, uint32_t status)
{
    struct store_area *area = store->area;
    assert(area->ahead_outstanding != 0);
    STORE_ADD(store, ahead_outstanding, -1);
    if (status != ATOLL_OK)
        STORE_SET(store, ahead_error, status);
    if (status != ATOLL_OK && what == STORE_IO_AHEAD_FLUSH)
        store_flush_failed(store, status);
}

void store_ahead_settle(struct store *store)
{
    struct store_area *area = store->area;
    if (area->ahead_sequence == area->log_next && area->log_fill == 0)
        store_log_nothing(store);
}

bool store_ahead_is(const struct store *store, uint64_t sequence)
{
    return store->area->ahead_sequence == sequence && store->area->ahead_error == 0 &&
           memcmp(store->ahead, store_log_block(store, sequence), ATOLL_BLOCK_BYTES) == 0;
}

void store_ahead_over(struct store *store)
{
    if (store->area->ahead_sequence != 0 && store->area->ahead_sequence < store->area->log_durable)
        STORE_SET(store, ahead_sequence, 0);
}
