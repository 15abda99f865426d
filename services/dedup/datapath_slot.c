/*
 * The slot of a request: the pages that it pins, the queue in which it waits, its answer.
 *
 * A waiting request is in one queue: retry (executed again when something has changed), flush, or that of a cache page.
 *
 * After a crash: pins are in the arena; queues are made again out of the ACCEPTED slots, in the order of acceptance.
 */
#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

/* --- Queues ------------------------------------------------------------------------------------------------------------ */

static void queue_put(struct datapath *dp, uint32_t *head, uint32_t *tail, uint32_t *count, uint32_t number)
{
    dp->slot_next[number] = DP_NO_SLOT;
    if (*head == DP_NO_SLOT)
        *head = number;
    else
        dp->slot_next[*tail] = (uint16_t)number;
    *tail = number;
    ++*count;
}

void slot_queue_retry(struct datapath *dp, uint32_t number)
{
    queue_put(dp, &dp->retry_head, &dp->retry_tail, &dp->retry_count, number);
    if (posted_request(&dp->arena->slots[number].request))
        posted_wait(dp, number);
}

void slot_queue_flush(struct datapath *dp, uint32_t number)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    queue_put(dp, &dp->flush_head, &dp->flush_tail, &dp->flush_count, number);
    if (slot->phase == PHASE_DESTAGE && slot->target > dp->flush_target)
        dp->flush_target = slot->target;
}

/* --- Pins ------------------------------------------------------------------------------------------------------------- */

void slot_save(struct datapath *dp, struct dp_slot *slot) { atoll_save(dp->journal, &slot->identity, DP_SLOT_HOT_BYTES); }

static void pinned_add(struct datapath *dp, struct dp_slot *slot)
{
    struct dp_arena *arena = dp->arena;
    uint64_t *place = (uint64_t *)(void *)&slot->segment_count;
    atoll_save(dp->journal, place, 8); /* segment_count, pinned_place */
    slot->pinned_place = arena->pinned_count;
    dp_set32(dp, &arena->pinned[arena->pinned_count], (uint32_t)(slot - arena->slots));
    dp_set32(dp, &arena->pinned_count, arena->pinned_count + 1);
}
_Static_assert(offsetof(struct dp_slot, segment_count) % 8 == 0 &&
               offsetof(struct dp_slot, pinned_place) == offsetof(struct dp_slot, segment_count) + 4, "saved as a word");

void slot_set_segments(struct datapath *dp, struct dp_slot *slot, const struct atoll_segment *segments, uint32_t count)
{
    bool pins = false;
    assert(count <= DP_SEGMENTS && slot->segment_count == 0 && slot->pinned_place == DP_NONE);
    atoll_save(dp->journal, slot->segments, count * sizeof segments[0]);
    for (uint32_t index = 0; index < count; index++) {
        slot->segments[index] = segments[index];
        pins = pins || segments[index].kind == ATOLL_SEGMENT_DATA;
    }
    if (pins)
        pinned_add(dp, slot);
    dp_set32(dp, &slot->segment_count, count);
}

static void unpin_address(struct datapath *dp, uint64_t address, uint64_t end)
{
    for (address &= ~(uint64_t)(DP_BLOCK - 1); address < end; address += DP_BLOCK) {
        uint32_t page = cache_page_of(dp, address);
        if (page != DP_NONE)
            cache_unpin(dp, page);
        else if (address - dp->nic_buffer < dp->arena->nic_pages * DP_BLOCK)
            log_unpin(dp, (uint32_t)((address - dp->nic_buffer) / DP_BLOCK));
        else
            log_unpin(dp, (uint32_t)(dp->arena->nic_pages + (address - dp->merge_buffer) / DP_BLOCK));
    }
}

void slot_unpin(struct datapath *dp, struct dp_slot *slot)
{
    struct dp_arena *arena = dp->arena;
    if (slot->segment_count == 0)
        return;
    for (uint32_t index = 0; index < slot->segment_count; index++)
        if (slot->segments[index].kind == ATOLL_SEGMENT_DATA)
            unpin_address(dp, slot->segments[index].address, slot->segments[index].address + slot->segments[index].length);
    atoll_save(dp->journal, &slot->segment_count, 8);
    slot->segment_count = 0;
    if (slot->pinned_place != DP_NONE) {
        uint32_t place = slot->pinned_place, last = arena->pinned[arena->pinned_count - 1];
        dp_set32(dp, &arena->pinned[place], last);
        dp_set32(dp, &arena->slots[last].pinned_place, place);
        dp_set32(dp, &arena->pinned_count, arena->pinned_count - 1);
        slot->pinned_place = DP_NONE; /* after the line above: `last` may be this very slot */
    }
}

void dp_sweep(struct datapath *dp)
{
    struct dp_arena *arena = dp->arena;
    if (dp->swept)
        return;
    dp->swept = true;
    dp->sweep_age = 0;
    atoll_count(dp->domain, DEDUP_COUNTER_SWEEPS, 1);
    for (uint32_t place = arena->pinned_count; place-- > 0;) {
        uint32_t number = arena->pinned[place];
        struct dp_slot *slot = &arena->slots[number];
        if (dp->journal->count >= DP_STEP_JOURNAL)
            break;
        if (slot->state != SLOT_DONE)
            continue;
        uint32_t done = atoll_load_acquire(&dp->nic_public->done[number]); /* SP-DONE */
        if (done + 1 != atoll_identity_sequence(slot->identity)) /* as atoll_use_in_force */
            slot_unpin(dp, slot);
    }
}

/* --- Completion ---------------------------------------------------------------------------------------------------------- */

/* nic, which has answered it, is told that it is over. */
static bool end_posted(struct datapath *dp, const struct dp_slot *slot)
{
    struct atoll_descriptor message = {.opcode = ATOLL_OP_END, .identity = slot->identity, .flags = ATOLL_FLAG_TAKEN};
    if (slot->status != ATOLL_OK) /* its blocks are no more: the volume was deleted, or has shrunk */
        atoll_count(dp->domain, DEDUP_COUNTER_POSTED_LOST, 1);
    return atoll_domain_put(dp->domain, ATOLL_ROLE_NIC, &message);
}

static bool done(struct datapath *dp, const struct dp_slot *slot)
{
    struct atoll_descriptor message = {.opcode = ATOLL_OP_DONE,
                                       .identity = slot->identity,
                                       .part = (uint16_t)slot->part,
                                       .status = (uint16_t)slot->status};
    message.words[0] = slot->failed_address;
    message.words[1] = slot->failed_lba;
    if (slot->status == ATOLL_OK && slot->extent_count != 0) {
        message.address = (uint64_t)(uintptr_t)slot->segments;
        message.length = slot->extent_count * (uint32_t)sizeof(struct atoll_extent);
    } else if (slot->status == ATOLL_OK && slot->result_bytes != 0) {
        message.length = slot->result_bytes;
        if (slot->segment_count == 1 && slot->segments[0].kind == ATOLL_SEGMENT_DATA) {
            message.address = slot->segments[0].address;
        } else {
            message.address = (uint64_t)(uintptr_t)slot->segments;
            message.segment_count = (uint16_t)slot->segment_count;
        }
    }
    return atoll_domain_put(dp->domain, slot->asker, &message);
}

void slot_answer(struct datapath *dp, uint32_t number)
{
    const struct dp_slot *slot = &dp->arena->slots[number];
    if (slot->status != ATOLL_OK)
        atoll_count(dp->domain, DEDUP_COUNTER_ERRORS, 1);
    /* One message per slot is outstanding and the rings have two places for each (give_message leaves as many): who asked broke the rule. */
    if (!(slot->posted ? end_posted(dp, slot) : done(dp, slot)))
        atoll_count(dp->domain, DEDUP_COUNTER_BAD_REQUESTS, 1);
}

/* The slot's hot part has been saved. Its status and result are set. */
void slot_finish(struct datapath *dp, uint32_t number)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    slot->state = SLOT_DONE;
    slot->phase = PHASE_START;
    if (dp->posted_count != 0)
        posted_over(dp, number);
    if (slot->status != ATOLL_OK)
        slot_unpin(dp, slot);
    if (number >= ATOLL_SLOT_COUNT) { /* nobody waits for it */
        slot->state = SLOT_FREE;
        return;
    }
    ATOLL_CRASH_POINT(dp->domain, "dedup.done.before");
    slot_answer(dp, number);
    ATOLL_CRASH_POINT(dp->domain, "dedup.done.after");
}

void slot_wait_page(struct datapath *dp, uint32_t number)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    assert(slot->state == SLOT_ACCEPTED && slot->phase == PHASE_LOADING);
    bool stale = false;
    uint32_t failed = DP_NONE;
    uint64_t bytes = 0, failed_bytes = 0; /* of the result before the segment; before the failed block */
    for (uint32_t index = 0; index < slot->segment_count; index++) {
        uint64_t address = slot->segments[index].address, end = address + slot->segments[index].length;
        for (address &= ~(uint64_t)(DP_BLOCK - 1); address < end; address += DP_BLOCK) {
            uint32_t page = cache_page_of(dp, address);
            if (page == DP_NONE)
                break; /* the whole segment lies elsewhere */
            if (dp->pages[page].state == PAGE_LOADING) {
                dp->slot_next[number] = dp->page_waiters[page];
                dp->page_waiters[page] = (uint16_t)number;
                return;
            }
            if (dp->pages[page].state == PAGE_UNCHECKED) /* cache_load has seen to it already */
                cache_check(dp, page);
            stale = stale || dp->pages[page].state == PAGE_STALE || dp->pages[page].state == PAGE_ABANDONED;
            if (dp->pages[page].state == PAGE_FAILED && failed == DP_NONE) {
                failed = page;
                failed_bytes = bytes + (address > slot->segments[index].address ? address - slot->segments[index].address : 0);
            }
        }
        bytes += slot->segments[index].length;
    }
    if (dp->journal->count >= DP_STEP_JOURNAL) { /* all slots may have waited for this page: the others in later steps */
        slot_queue_retry(dp, number);
        dp->retry = true;
        return;
    }
    slot_save(dp, slot);
    if (stale) {
        slot_unpin(dp, slot);
        slot->phase = PHASE_START;
        slot->result_bytes = 0;
        slot_queue_retry(dp, number);
        dp->retry = true;
        return;
    }
    if (failed != DP_NONE) {
        slot->status = dp->pages[failed].status;
        slot->failed_address = dp->pages[failed].pba;
        uint64_t lba = (slot->request.words[0] + failed_bytes) / DP_BLOCK;
        if (slot->request.opcode == ATOLL_OP_READ) {
            slot->failed_lba = lba + 1;
            dp_note_damage(dp, slot->failed_address, slot->status, slot->request.halves[4], lba);
        }
    }
    slot_finish(dp, number);
}
