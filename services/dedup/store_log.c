/*
 * The metadata log: its buffer in the arena, and the sync that makes it durable.
 *
 *   store_log_append     records of one change into the open block
 *   store_sync           asks; store_synced tells
 *   store_sync_step      IDLE -> (after a failed flush: store_rewrite.c) -> device flush (data placed so far) -> log blocks, both copies -> device flush -> IDLE
 *
 * A flush goes with the log blocks where they are one write for each copy: the driver begins it when they are done.
 *
 * What fits one log block does without the first of these flushes: that block says so, and a loader that finds no other behind it looks
 * whether the data are there (store_replay.c). So that this is never asked of data that were acknowledged long ago, a block with nothing
 * in it follows where nothing else does for a second. It may have been written before its sync (AHEAD: store_ahead.c).
 *
 * A sync seals the open block at its beginning, so that it covers no change whose data had not been placed by then. Its end is the
 * commit point of everything noted before: log_durable, and with synced_epoch the blocks freed by it may be used again.
 * A failed write or flush leaves log_durable where it was, so the next sync writes all of it again.
 *
 * After a crash: phase, positions and requests in flight are in the arena; completions go on where they were.
 * After power loss: store_load.c replays.
 */
#include "ipc/crashpoint.h"
#include "services/dedup/store_internal.h"

uint8_t *store_log_block(const struct store *store, uint64_t sequence)
{
    return store->log_buffer + sequence % STORE_LOG_BUFFER_BLOCKS * ATOLL_BLOCK_BYTES;
}

uint64_t store_log_finish(const struct store *store, uint8_t *block, uint64_t used_bytes, uint32_t flags)
{
    const struct store_area *area = store->area;
    struct format_log_header header = {.magic = FORMAT_LOG_MAGIC,
                                       .sequence = area->log_next,
                                       .chain = area->log_chain,
                                       .durable = area->log_durable,
                                       .generation = area->generation,
                                       .version = FORMAT_VERSION,
                                       .used_bytes = (uint32_t)used_bytes,
                                       .flags = flags};
    memcpy(block, &header, sizeof header);
    memset(block + sizeof header + used_bytes, 0, FORMAT_LOG_RECORD_BYTES - used_bytes);
    header.checksum = store_checksum(store, FORMAT_SEED_LOG, area->log_next, block + 8, ATOLL_BLOCK_BYTES - 8);
    memcpy(block, &header.checksum, sizeof header.checksum);
    return header.checksum;
}

static void seal(struct store *store, uint32_t flags)
{
    struct store_area *area = store->area;
    if (area->log_fill == 0)
        return;
    /* Written directly: it counts only once log_next has passed it. */
    STORE_SET(store, log_chain, store_log_finish(store, store_log_block(store, area->log_next), area->log_fill, flags));
    STORE_ADD(store, log_next, 1);
    STORE_SET(store, log_fill, 0);
}

void store_log_seal(struct store *store) { seal(store, 0); }

void store_log_append(struct store *store, const uint64_t *records, uint32_t words)
{
    struct store_area *area = store->area;
    uint64_t bytes = (uint64_t)words * 8;
    assert(words != 0 && bytes <= FORMAT_LOG_RECORD_BYTES);
    if (area->log_fill + bytes > FORMAT_LOG_RECORD_BYTES)
        store_log_seal(store);
    /* The open block has a place in the buffer and in the log: callers ask store_has_room. */
    assert(area->log_next - area->log_durable < STORE_LOG_BUFFER_BLOCKS && area->log_next - area->log_start < area->log_blocks);
    /* Beyond log_fill nothing is committed: written directly. */
    memcpy(store_log_block(store, area->log_next) + sizeof(struct format_log_header) + area->log_fill, records, bytes);
    STORE_ADD(store, log_fill, bytes);
    if (!area->changed)
        STORE_SET(store, changed, 1);
}

void store_log_nothing(struct store *store)
{
    static const uint64_t nothing[2] = {FORMAT_RECORD(FORMAT_RECORD_NOTHING, 0), 0};
    store_log_append(store, nothing, 2);
}

uint64_t store_log_room(const struct store_area *area)
{
    uint64_t buffer = STORE_LOG_BUFFER_BLOCKS - (area->log_next - area->log_durable);
    uint64_t log = area->log_blocks - (area->log_next - area->log_start);
    return buffer < log ? buffer : log;
}

bool store_has_room(struct dedup *dedup, uint32_t records)
{
    struct store *store = dedup->store;
    struct store_area *area = store->area;
    uint64_t needed = (uint64_t)records / (FORMAT_LOG_RECORD_BYTES / STORE_CHANGE_BYTES) + 2 + STORE_LOG_SLACK_BLOCKS;
    bool room = store_log_room(area) > needed && !store_full_of_changes(store);
    if (!room || area->log_next - area->log_durable > STORE_LOG_BUFFER_BLOCKS / 2)
        if (!area->sync_wanted && area->sync_phase == SYNC_IDLE && area->changed)
            STORE_SET(store, sync_wanted, 1);
    return room;
}

/* --- Sync ------------------------------------------------------------------------------------------------------------ */

uint64_t store_sync(struct dedup *dedup)
{
    struct store *store = dedup->store;
    struct store_area *area = store->area;
    if (!area->changed && !area->data_unflushed && !area->sync_forced && area->ahead_sequence == 0)
        return area->sync_phase != SYNC_IDLE ? area->sync_epoch : area->epoch - 1;
    if (!area->sync_wanted)
        STORE_SET(store, sync_wanted, 1);
    if (area->sync_phase == SYNC_IDLE && area->sync_retry_ns != 0)
        STORE_SET(store, sync_retry_ns, 0); /* somebody asks: at once */
    return area->epoch;
}

uint64_t store_synced(struct dedup *dedup) { return dedup->store->area->synced_epoch; }

uint64_t store_sync_failures(struct dedup *dedup, uint32_t *last_status)
{
    if (last_status != 0)
        *last_status = (uint32_t)dedup->store->area->sync_status;
    return dedup->store->area->sync_failures;
}

void store_flush_failed(struct store *store, uint32_t status)
{
    struct store_area *area = store->area;
    if (area->sync_phase != SYNC_IDLE)
        STORE_SET(store, sync_error, status); /* a good flush after it would say nothing */
    if (area->checkpoint_phase == CHECKPOINT_FLUSH || (area->checkpoint_phase == CHECKPOINT_SUPER && area->checkpoint_cursor != 0))
        STORE_SET(store, checkpoint_error, status);
    STORE_SET(store, rewrite_wanted, 1);
    STORE_ADD(store, flush_failures, 1);
    STORE_SET(store, data_unflushed, 1);
    if (area->checkpoint_phase == CHECKPOINT_PAGES || area->checkpoint_phase == CHECKPOINT_SYNC)
        STORE_SET(store, checkpoint_redo, 1);
}

void store_sync_fail(struct store *store, uint32_t status)
{
    if (store->area->sync_phase == SYNC_REWRITE)
        STORE_SET(store, rewrite_wanted, 1);
    STORE_SET(store, sync_status, status);
    STORE_ADD(store, sync_failures, 1);
    STORE_SET(store, sync_error, 0);
    STORE_SET(store, sync_phase, SYNC_IDLE);
    STORE_SET(store, data_unflushed, 1);
    STORE_SET(store, changed, 1);
    STORE_SET(store, sync_wanted, 1); /* tried again after a while, or as soon as somebody asks */
    STORE_SET(store, sync_retry_ns, atoll_now_ns() + STORE_RETRY_NS);
    store_count(store, STORE_COUNTER_SYNC_FAILURES, 1);
}

/* A sealed block of the buffer counts as the last one only if its data are there. */
static bool needs_data(const struct store *store, uint64_t sequence)
{
    struct format_log_header header;
    memcpy(&header, store_log_block(store, sequence), sizeof header);
    return header.flags & FORMAT_LOG_UNFLUSHED;
}

static void sync_complete(struct store *store)
{
    struct store_area *area = store->area;
    ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.synced");
    if (area->log_durable != area->sync_end)
        STORE_SET(store, follow_ns, needs_data(store, area->sync_end - 1) ? atoll_now_ns() + STORE_FOLLOW_NS : 0);
    STORE_SET(store, log_durable, area->sync_end);
    STORE_SET(store, synced_epoch, area->sync_epoch); /* COMMIT POINT of all changes of this epoch, for power loss */
    STORE_SET(store, sync_status, ATOLL_OK);
    STORE_SET(store, sync_phase, SYNC_IDLE);
    STORE_SET(store, sync_retry_ns, 0);
    store_ahead_over(store);
    if (area->pending_blocks != 0)
        STORE_SET(store, sweep_left, area->geometry.frames); /* their pages are in memory */
    store_count(store, STORE_COUNTER_SYNCS, 1);
}

static void sync_begin(struct store *store)
{
    struct store_area *area = store->area;
    ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.sync");
    store_ahead_settle(store);
    bool alone = area->log_next == area->log_durable && area->log_fill != 0;
    bool once = alone && area->data_unflushed && !area->sync_forced && !area->rewrite_wanted;
    /* One that is tried again may have lost some of its data with the flush that failed: these shall not take the others with them. */
    if (area->log_next != area->log_durable && area->log_fill == 0 && needs_data(store, area->log_next - 1) && store_log_room(area) != 0)
        store_log_nothing(store);
    seal(store, once ? FORMAT_LOG_UNFLUSHED : 0);
    STORE_SET(store, sync_wanted, 0);
    STORE_SET(store, changed, 0);
    STORE_SET(store, sync_error, 0);
    STORE_SET(store, sync_epoch, area->epoch);
    STORE_ADD(store, epoch, 1);
    STORE_SET(store, sync_end, area->log_next);
    STORE_SET(store, sync_position[0], area->log_durable);
    STORE_SET(store, sync_position[1], area->log_durable);
    STORE_SET(store, sync_phase, (area->data_unflushed && !once) || area->sync_forced ? SYNC_FLUSH_DATA : SYNC_WRITE);
    if (once && store_ahead_is(store, area->log_next - 1))
        STORE_SET(store, sync_phase, SYNC_AHEAD);
    if (area->rewrite_wanted) {
        STORE_SET(store, rewrite_wanted, 0);
        STORE_SET(store, sync_phase, SYNC_REWRITE);
        store_rewrite_begin(store);
    }
    STORE_SET(store, data_unflushed, 0);
    STORE_SET(store, sync_forced, 0);
}

static bool submit_flush(struct store *store, const uint64_t *after, uint32_t count)
{
    if (!store_submit_flush(store, STORE_IO_SYNC_FLUSH, after, count))
        return false;
    STORE_ADD(store, sync_outstanding, 1);
    return true;
}

/* Submits what can be of the log blocks; returns true if it did something. If that is one write for each copy the flush goes with them. */
static bool sync_write(struct store *store)
{
    struct store_area *area = store->area;
    uint64_t sent[2] = {0};
    bool did = false, short_one = area->sync_outstanding == 0;
    if (area->ahead_outstanding != 0) /* they are written to one of these places */
        return false;
    for (uint32_t copy = 0; copy < 2; copy++) {
        short_one = short_one && area->sync_position[copy] == area->log_durable;
        while (area->sync_position[copy] < area->sync_end && area->sync_outstanding < STORE_SYNC_OUTSTANDING) {
            uint64_t sequence = area->sync_position[copy], count = area->sync_end - sequence;
            uint64_t place = sequence % area->log_blocks, slot = sequence % STORE_LOG_BUFFER_BLOCKS;
            if (count > ATOLL_IO_BLOCKS)
                count = ATOLL_IO_BLOCKS;
            if (count > area->log_blocks - place)
                count = area->log_blocks - place;
            if (count > STORE_LOG_BUFFER_BLOCKS - slot)
                count = STORE_LOG_BUFFER_BLOCKS - slot;
            sent[copy] = store_submit(store, STORE_IO_LOG, 0, ATOLL_OP_IO_WRITE, store_log_pba(area, sequence, copy),
                                      store_log_block(store, sequence), count * ATOLL_BLOCK_BYTES);
            if (sent[copy] == 0)
                return did;
            STORE_ADD(store, sync_position[copy], count);
            STORE_ADD(store, sync_outstanding, 1);
            store_count(store, STORE_COUNTER_LOG_BLOCKS, count);
            did = true;
        }
    }
    if (short_one && did && area->sync_outstanding == 2 && submit_flush(store, sent, 2))
        STORE_SET(store, sync_phase, SYNC_FLUSH_LOG);
    return did;
}

void store_sync_io(struct store *store, enum store_io what, uint32_t status)
{
    struct store_area *area = store->area;
    assert(area->sync_outstanding > 0);
    STORE_ADD(store, sync_outstanding, -1);
    if (status != ATOLL_OK)
        STORE_SET(store, sync_error, status);
    if (status != ATOLL_OK && what == STORE_IO_SYNC_FLUSH)
        store_flush_failed(store, status);
    if (area->sync_outstanding != 0)
        return;
    if (area->sync_error != 0)
        store_sync_fail(store, (uint32_t)area->sync_error);
    else if (what == STORE_IO_SYNC_FLUSH && area->sync_phase == SYNC_FLUSH_DATA)
        STORE_SET(store, sync_phase, SYNC_WRITE);
    else if (what == STORE_IO_SYNC_FLUSH && area->sync_phase == SYNC_FLUSH_LOG)
        sync_complete(store);
    else if (area->sync_phase == SYNC_FLUSH_LOG)
        STORE_SET(store, sync_phase, SYNC_WRITE); /* the flush was not the last: another one */
}

/* The last block of the log was written before its data were flushed: another one behind it says that they are there. */
static void follow(struct store *store)
{
    struct store_area *area = store->area;
    STORE_SET(store, follow_ns, 0);
    if (area->log_start == area->log_durable)
        return; /* the root does */
    if (area->log_fill == 0 && store_log_room(area) <= STORE_LOG_SLACK_BLOCKS) {
        STORE_SET(store, follow_ns, atoll_now_ns() + STORE_FOLLOW_NS); /* a checkpoint will */
        return;
    }
    if (area->log_fill == 0)
        store_log_nothing(store);
    STORE_SET(store, sync_forced, 1); /* data of a block that others have begun are flushed first */
    store_sync(store->dedup);
}

bool store_sync_step(struct store *store)
{
    struct store_area *area = store->area;
    bool did = false;
    if (area->follow_ns != 0 && area->sync_phase == SYNC_IDLE && !area->closing && atoll_now_ns() >= area->follow_ns) {
        follow(store);
        did = true;
    }
    if (area->sync_phase == SYNC_IDLE && area->sync_wanted &&
        (area->sync_retry_ns == 0 || atoll_now_ns() >= area->sync_retry_ns)) {
        sync_begin(store);
        did = true;
    }
    if (area->sync_phase != SYNC_IDLE && area->sync_error != 0 && area->sync_outstanding == 0)
        store_sync_fail(store, (uint32_t)area->sync_error);
    if (area->sync_phase == SYNC_REWRITE)
        did |= store_rewrite_step(store);
    if (area->sync_phase == SYNC_FLUSH_DATA && area->sync_outstanding == 0)
        did |= submit_flush(store, 0, 0);
    if (area->sync_phase == SYNC_AHEAD && area->ahead_outstanding == 0) {
        store_count(store, STORE_COUNTER_SYNCS_AHEAD, area->ahead_error == 0);
        if (area->ahead_error == 0)
            sync_complete(store);
        else
            STORE_SET(store, sync_phase, SYNC_WRITE);
        did = true;
    }
    if (area->sync_phase == SYNC_WRITE) {
        did |= sync_write(store);
        if (area->sync_outstanding == 0 && area->sync_position[0] == area->sync_end && area->sync_position[1] == area->sync_end) {
            if (area->log_durable == area->sync_end) {
                sync_complete(store); /* there was nothing but data or pages to flush */
                did = true;
            } else if (submit_flush(store, 0, 0)) {
                STORE_SET(store, sync_phase, SYNC_FLUSH_LOG);
                did = true;
            }
        }
    }
    return did;
}
