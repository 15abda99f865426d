/*
 * The root switch: one superblock makes the pages of a checkpoint the root.
 *
 *   SUPER   both copies of the superblock of the next generation, in the places of the one before the last
 *   FLUSH   its end is the root switch: the log before checkpoint_log_start is not needed any more
 *   FREE    places of the old root's pages become free, pages written may leave memory
 *
 * A failed superblock write is repeated as it was: once tried, it may count.
 *
 * After a crash: phase and image are in the arena; a successor goes on. After power loss: a superblock is one sector, so either the
 * old or the new one is there.
 */
#include <time.h>

#include "ipc/crashpoint.h"
#include "services/dedup/store_internal.h"

#define LOOK_PER_STEP 8192

static bool send_super(struct store *store)
{
    struct store_area *area = store->area;
    if (store->dedup->io->free_count < 2)
        return false;
    ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.super");
    bool clean = area->log_next == area->checkpoint_log_start && area->log_fill == 0;
    struct format_super super = {.magic = FORMAT_SUPER_MAGIC,
                                 .version = FORMAT_VERSION,
                                 .flags = clean ? FORMAT_SUPER_CLEAN : 0,
                                 .uuid_low = area->uuid_low,
                                 .uuid_high = area->uuid_high,
                                 .generation = area->generation + 1,
                                 .device_blocks = area->device_blocks,
                                 .log_blocks = area->log_blocks,
                                 .log_start = area->checkpoint_log_start,
                                 .log_chain = area->checkpoint_log_chain,
                                 .log_durable = area->log_durable,
                                 .log_second = area->log_second,
                                 .written_s = (uint64_t)time(0),
                                 .slots = area->slots,
                                 .spare_slots = area->spare_slots,
                                 .map_pages = area->map_pages,
                                 .stored_blocks = area->checkpoint_stored,
                                 .zero_promises = area->checkpoint_zero_promises,
                                 .extent_count = (uint32_t)area->extent_count};
    memcpy(super.extents, area->extents, sizeof super.extents);
    for (uint32_t tree = 0; tree < FORMAT_TREES; tree++)
        if (area->roots[tree].slot != STORE_SLOT_FRESH)
            super.roots[tree] = area->roots[tree];
    uint64_t pair = super.generation & 1;
    store_seal_super(&super, pair, store->super_buffer);
    store_seal_super(&super, 2 + pair, store->super_buffer + ATOLL_BLOCK_BYTES);
    bool sent = store_submit(store, STORE_IO_SUPER, 0, ATOLL_OP_IO_WRITE, pair, store->super_buffer, ATOLL_BLOCK_BYTES) &&
                store_submit(store, STORE_IO_SUPER, 1, ATOLL_OP_IO_WRITE, area->device_blocks - 2 + pair,
                             store->super_buffer + ATOLL_BLOCK_BYTES, ATOLL_BLOCK_BYTES);
    assert(sent);
    STORE_SET(store, super_clean, clean);
    STORE_SET(store, checkpoint_outstanding, 2);
    STORE_SET(store, checkpoint_cursor, 1);
    return true;
}

void store_root_io(struct store *store, enum store_io what, uint32_t status)
{
    struct store_area *area = store->area;
    STORE_ADD(store, checkpoint_outstanding, -1);
    if (status != ATOLL_OK)
        STORE_SET(store, checkpoint_error, status);
    if (status != ATOLL_OK && what == STORE_IO_SUPER_FLUSH)
        store_flush_failed(store, status);
    if (area->checkpoint_outstanding != 0)
        return;
    STORE_SET(store, checkpoint_cursor, 0);
    if (area->checkpoint_error != 0) {
        store_checkpoint_failed(store);
        STORE_SET(store, checkpoint_phase, CHECKPOINT_SUPER);
    } else if (area->checkpoint_phase == CHECKPOINT_SUPER) {
        STORE_SET(store, checkpoint_phase, CHECKPOINT_FLUSH);
    } else {
        ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.root");
        STORE_ADD(store, generation, 1); /* COMMIT POINT of the checkpoint: this root is durable */
        STORE_SET(store, log_start, area->checkpoint_log_start);
        STORE_SET(store, checkpoint_phase, CHECKPOINT_FREE);
        if (area->root_first != 0)
            STORE_ADD(store, root_first, -1);
        if (area->root_first != 0)
            store_want_checkpoint(store);
        store_count(store, STORE_COUNTER_CHECKPOINTS, 1);
    }
}

static bool free_step(struct store *store)
{
    struct store_area *area = store->area;
    uint64_t at = area->checkpoint_cursor, frames = area->geometry.frames;
    if (store_free_retired(store))
        return true;
    for (uint32_t looked = 0, cleared = 0; looked < LOOK_PER_STEP && cleared < STORE_FREE_PER_STEP && at < frames; looked++, at++)
        if (store->frames[at].flags & FRAME_WRITTEN) {
            store_set_flags(store, (uint32_t)at, 0, FRAME_WRITTEN);
            cleared++;
        }
    STORE_SET(store, checkpoint_cursor, at);
    if (at != frames)
        return true;
    for (uint64_t word = 0; word < (store->tables.count + 63) / 64; word++)
        if (store->table_written[word] != 0)
            atoll_set64(store->journal, &store->table_written[word], 0);
    STORE_SET(store, checkpoint_phase, CHECKPOINT_IDLE);
    store_look_for_empty(store);
    store->woken = true; /* who waited for pages to be let go */
    return true;
}

bool store_root_step(struct store *store)
{
    struct store_area *area = store->area;
    if (area->checkpoint_phase == CHECKPOINT_SUPER)
        return area->checkpoint_cursor == 0 && send_super(store);
    if (area->checkpoint_phase == CHECKPOINT_FREE)
        return free_step(store);
    assert(area->checkpoint_phase == CHECKPOINT_FLUSH);
    if (area->checkpoint_error != 0 && area->checkpoint_outstanding == 0) { /* somebody else's flush failed */
        store_checkpoint_failed(store);
        STORE_SET(store, checkpoint_cursor, 0);
        STORE_SET(store, checkpoint_phase, CHECKPOINT_SUPER);
        return false;
    }
    if (area->checkpoint_cursor != 0 || !store_submit_flush(store, STORE_IO_SUPER_FLUSH, 0, 0))
        return false;
    STORE_SET(store, checkpoint_outstanding, 1);
    STORE_SET(store, checkpoint_cursor, 1);
    return true;
}
