/*
 * Flushes: a flush, or a write with FUA, waits until all that was logged before it is destaged, then for the store's sync.
 *
 * It fails for what could not be destaged since it was asked, or for a failed sync; of blocks that were set aside it fails for those of its
 * own volume.
 *
 * After a crash: how far each is lies in its slot; all are asked anew, so that what failed before is tried again.
 */
#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

void flush_begin(struct datapath *dp, uint32_t number)
{
    dp->flush_since[number] = dp->destage_failures;
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
            if (ticket == 0)
                ticket = store_sync(dp->dedup);
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
