/*
 * Flushes: a flush, or a write with FUA, waits until all that was logged before it is destaged, then for the store's sync.
 *
 * All is what everybody has written. So who flushes often would wait for the log of those who write as fast as they can: for as long as the
 * device takes for three quarters of nic's pages. While somebody flushes the log is short, therefore, and it may be the longer the longer
 * nobody has. Writes that would make it longer wait.
 *
 * It fails for what could not be destaged since it was asked, or for a failed sync; of blocks that were set aside it fails for those of its
 * own volume.
 *
 * After a crash: how far each is lies in its slot; all are asked anew, so that what failed before is tried again.
 */
#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

/* Two batches: the device has one while the other is prepared. */
#define LOGGED_MIN (2 * ATOLL_IO_BLOCKS)
/* What a device of 1 GiB/s takes in a twentieth of the time between flushes. */
#define LOGGED_PER_MS 13
/* When nothing leaves the log for so long (the device, or its driver, is away) it is of no use to flushes that writes wait. A device takes
 * less for a batch. */
#define STALLED_MS 100

/* --- How much is logged -------------------------------------------------------------------------------------------------- */

/* From a flush to the first that waits; how long that waits says nothing of how often it is asked for. */
static uint64_t gap_until(const struct datapath *dp, uint64_t asked_ms) { return asked_ms > dp->flushed_ms ? asked_ms - dp->flushed_ms : 0; }

uint64_t flush_allows(const struct datapath *dp)
{
    uint64_t since_ms = gap_until(dp, dp->flush_count != 0 ? dp->flush_asked_ms : dp->now_ms);
    return LOGGED_MIN + LOGGED_PER_MS * (since_ms > dp->flush_gap_ms ? since_ms : dp->flush_gap_ms);
}

/* Posted writes are never held, only taken more slowly. Where many of them come others may make the log twice as long: else they would wait
 * for what these have made of it. */
bool flush_crowded(struct datapath *dp, bool posted)
{
    const struct dp_arena *arena = dp->arena;
    bool beside = !posted && dp->flush_posted > LOGGED_MIN / 2;
    uint64_t logged = arena->log_records - arena->failed_records - arena->pinned_records, allowed = flush_allows(dp);
    if (logged <= allowed / 2) /* none of it is due */
        dp->shorter_ms = dp->now_ms;
    if (logged <= allowed << beside)
        return false;
    if (dp->now_ms - dp->shorter_ms < STALLED_MS)
        return true;
    dp->flush_gap_ms = logged / LOGGED_PER_MS; /* or all would wait for it when the device is back: flushes make it short again */
    return false;
}

/* A sync for flushes begins. A short gap halves what is remembered: one among long ones is soon forgotten, and a log that many in a row make
 * short becomes so step by step, while writes go on. */
static void note_sync(struct datapath *dp)
{
    uint64_t gap_ms = gap_until(dp, dp->flush_asked_ms), most_ms = dp->arena->nic_pages / LOGGED_PER_MS;
    if (gap_ms > most_ms)
        gap_ms = most_ms;
    dp->flush_gap_ms = gap_ms > dp->flush_gap_ms / 2 ? gap_ms : dp->flush_gap_ms / 2;
    dp->flushed_ms = dp->now_ms;
    dp->flush_posted = 0;
}

/* --- Flushes ------------------------------------------------------------------------------------------------------------- */

void flush_begin(struct datapath *dp, uint32_t number)
{
    dp->flush_since[number] = dp->destage_failures;
    if (dp->flush_count == 0)
        dp->flush_asked_ms = dp->now_ms;
    destage_hurry(dp);
    slot_queue_flush(dp, number);
}

/* A page that the device did not take, or one of this volume that is never to be destaged. (One of another volume is not waited for.) */
static bool is_unflushable(const struct datapath *dp, uint32_t volume)
{
    return dp->arena->failed_records != dp->arena->aside_records || dp->arena->aside[volume % ATOLL_VOLUME_COUNT] != 0;
}

bool flush_in_vain(struct datapath *dp, struct dp_slot *slot, uint32_t volume)
{
    uint32_t number = (uint32_t)(slot - dp->arena->slots);
    if (slot->target == 0) { /* the first time */
        slot->target = 1;
        dp->flush_since[number] = dp->destage_failures;
        destage_hurry(dp);
    }
    return is_unflushable(dp, volume) && dp->destage_failures != dp->flush_since[number];
}

bool flush_step(struct datapath *dp)
{
    uint64_t pending = destage_pending_order(dp), ticket = 0;
    uint32_t number = dp->flush_head, last_status = 0;
    bool did = false;
    dp->flush_head = DP_NO_SLOT;
    dp->flush_count = 0;
    dp->flush_target = 0;
    dp->failures_told = dp->destage_failures;
    while (number != DP_NO_SLOT) {
        struct dp_slot *slot = &dp->arena->slots[number];
        uint32_t next = dp->slot_next[number], status = ATOLL_OK;
        bool over = false, tried = slot->target < pending || dp->destage_failures != dp->flush_since[number];
        if (dp->journal->count >= DP_STEP_JOURNAL) {
            slot_queue_flush(dp, number);
            number = next;
            did = true;
            continue;
        }
        slot_save(dp, slot);
        if (slot->phase == PHASE_DESTAGE && is_unflushable(dp, slot->request.halves[4]) && tried) {
            over = true;
            status = ATOLL_EUNFLUSHED;
        } else if (slot->phase == PHASE_DESTAGE && slot->target < pending) {
            if (ticket == 0) {
                ticket = store_sync(dp->dedup);
                note_sync(dp);
            }
            ATOLL_CRASH_POINT(dp->domain, "dedup.flush.sync");
            slot->phase = PHASE_SYNC;
            slot->ticket = ticket;
            slot->sync_failures = store_sync_failures(dp->dedup, &last_status);
            did = true;
        }
        if (!over && slot->phase == PHASE_SYNC) {
            if (store_synced(dp->dedup) >= slot->ticket) {
                over = true;
            } else if (store_sync_failures(dp->dedup, &last_status) != slot->sync_failures) {
                over = true;
                status = last_status != ATOLL_OK ? last_status : ATOLL_EIO;
            }
        }
        if (over) {
            if (status != ATOLL_OK)
                atoll_count(dp->domain, DEDUP_COUNTER_FLUSH_FAILURES, 1);
            slot->status = status;
            slot_finish(dp, number);
            did = true;
        } else {
            slot_queue_flush(dp, number);
        }
        number = next;
    }
    return did;
}
