/*
 * Requests of dedup: acceptance, waiting, completion; life of the datapath. See datapath.h for the whole picture.
 *
 *   datapath_message     accepts one request and executes it; most are finished in the same step
 *   datapath_step        waiting requests, flushes, destage
 *   slot_*               a request's pins and its waiting for pages
 *
 * A waiting request is in one queue: retry (executed again when something has changed), flush, or that of a cache page.
 *
 * After a crash: queues are made again out of the ACCEPTED slots, in the order of acceptance; completed requests stay
 * completed, and a repeat of one is answered again without being applied again (I6).
 */
#include "services/dedup/datapath.h"

#include <stdio.h>
#include <stdlib.h>

#include "ipc/crashpoint.h"

/* --- Suspects (I8) --------------------------------------------------------------------------------------------------- */

static struct atoll_suspect *suspects(struct datapath *dp)
{
    return (void *)((char *)dp->domain->self + ATOLL_SUSPECTS_OFFSET);
}

static struct atoll_suspect *find_suspect(struct datapath *dp, uint64_t identity, uint32_t part)
{
    struct atoll_suspect *table = suspects(dp);
    for (uint32_t index = 0; index < ATOLL_SUSPECT_COUNT; index++)
        if (table[index].crashes != 0 && table[index].identity == identity && table[index].part == part)
            return &table[index];
    return 0;
}

void datapath_note_suspect(struct datapath *dp)
{
    struct atoll_suspect *table = suspects(dp), *found;
    uint64_t identity = dp->domain->self->current;
    uint32_t part = dp->arena->current_part;
    if (identity == 0) {
        destage_blame(dp);
        return;
    }
    found = find_suspect(dp, identity, part);
    if (found == 0) {
        found = &table[0];
        for (uint32_t index = 0; index < ATOLL_SUSPECT_COUNT; index++)
            if (table[index].crashes < found->crashes)
                found = &table[index];
        found->crashes = 0; /* not a suspect while it is being filled */
        atoll_compiler_barrier();
        found->identity = identity;
        found->part = part;
    }
    atoll_compiler_barrier();
    found->crashes++;
    atoll_compiler_barrier();
    dp->domain->self->current = 0;
}

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

static void queue_retry(struct datapath *dp, uint32_t number)
{
    queue_put(dp, &dp->retry_head, &dp->retry_tail, &dp->retry_count, number);
    if (posted_request(&dp->arena->slots[number].request))
        posted_wait(dp, number);
}

static void queue_flush(struct datapath *dp, uint32_t number)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    queue_put(dp, &dp->flush_head, &dp->flush_tail, &dp->flush_count, number);
    if (slot->phase == PHASE_DESTAGE && slot->target > dp->flush_target)
        dp->flush_target = slot->target;
}

/* A flush is asked: what failed before may be well again, so it fails for what is tried from now on. */
static void begin_flush(struct datapath *dp, uint32_t number)
{
    dp->flush_since[number] = dp->destage_failures;
    destage_hurry(dp);
    queue_flush(dp, number);
}

/* --- Slots ------------------------------------------------------------------------------------------------------------- */

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
        if ((int32_t)(done - atoll_identity_sequence(slot->identity)) >= 0)
            slot_unpin(dp, slot);
    }
}

/* --- Completion ---------------------------------------------------------------------------------------------------------- */

static void send_done(struct datapath *dp, uint32_t number)
{
    struct dp_slot *slot = &dp->arena->slots[number];
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
    if (slot->status != ATOLL_OK)
        atoll_count(dp->domain, DEDUP_COUNTER_ERRORS, 1);
    bool sent = atoll_domain_put(dp->domain, ATOLL_ROLE_NBD, &message);
    if (!sent) /* one message per slot is outstanding and the ring has two places for each: nbd broke the rule */
        atoll_count(dp->domain, DEDUP_COUNTER_BAD_REQUESTS, 1);
}

/* The slot's hot part has been saved. Its status and result are set. */
static void finish(struct datapath *dp, uint32_t number)
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
    send_done(dp, number);
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
            stale = stale || dp->pages[page].state == PAGE_STALE || dp->pages[page].state == PAGE_ABANDONED;
            if (dp->pages[page].state == PAGE_FAILED && failed == DP_NONE) {
                failed = page;
                failed_bytes = bytes + (address > slot->segments[index].address ? address - slot->segments[index].address : 0);
            }
        }
        bytes += slot->segments[index].length;
    }
    if (dp->journal->count >= DP_STEP_JOURNAL) { /* all slots may have waited for this page: the others in later steps */
        queue_retry(dp, number);
        dp->retry = true;
        return;
    }
    slot_save(dp, slot);
    if (stale) {
        slot_unpin(dp, slot);
        slot->phase = PHASE_START;
        slot->result_bytes = 0;
        queue_retry(dp, number);
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
    finish(dp, number);
}

void dp_note_damage(struct datapath *dp, uint64_t pba, uint32_t status, uint32_t volume, uint64_t lba)
{
    if (dp->damage_count == DP_DAMAGE_NOTES) {
        dp->damage_dropped++;
        return;
    }
    dp->damage[dp->damage_count++] = (struct dp_damage){.pba = pba, .lba = lba, .volume = volume, .status = status};
}

/* --- Execution ------------------------------------------------------------------------------------------------------------ */

struct atoll_volume *dp_volume(struct datapath *dp, const struct atoll_descriptor *request, uint32_t *status)
{
    uint32_t id = request->halves[4];
    uint64_t offset = request->words[0], length = request->words[1];
    struct atoll_volume *volume = &dp->dedup->public->volumes[id < ATOLL_VOLUME_COUNT ? id : 0];
    bool changes = request->opcode == ATOLL_OP_WRITE || request->opcode == ATOLL_OP_TRIM || request->opcode == ATOLL_OP_ZERO;
    *status = ATOLL_OK;
    if (id >= ATOLL_VOLUME_COUNT || volume->state != ATOLL_VOLUME_READY || volume->generation != request->halves[5])
        *status = ATOLL_ENOENT;
    else if (changes && (volume->flags & ATOLL_VOLUME_READONLY))
        *status = ATOLL_EPERM;
    else if (length > volume->size_bytes || offset > volume->size_bytes - length)
        *status = changes && request->opcode != ATOLL_OP_TRIM ? ATOLL_ENOSPC : ATOLL_EINVAL;
    return *status == ATOLL_OK ? volume : 0;
}

enum dp_outcome dp_want_outcome(struct datapath *dp, struct dp_slot *slot, enum store_want want)
{
    if (want == STORE_WAIT) {
        if (store_starved(dp->dedup))
            dp->blocked |= RESOURCE_PAGE;
        return OUTCOME_RETRY;
    }
    slot->status = store_want_status(dp->dedup);
    slot->failed_address = store_want_page(dp->dedup);
    return OUTCOME_DONE;
}

/* What the request touches, a posted write is still to change. DONE: that one cannot be applied, and its status is this one's, too; a
 * posted write that comes after it is kept like it. */
static enum dp_outcome come_after(struct datapath *dp, struct dp_slot *slot, const struct atoll_descriptor *request, uint32_t status)
{
    slot->status = status;
    if (status == ATOLL_OK || posted_request(request))
        return OUTCOME_RETRY;
    if (request->opcode == ATOLL_OP_WRITE)
        write_refuse_payload(dp, request);
    return OUTCOME_DONE;
}

static enum dp_outcome dispatch(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request)
{
    if (dp->blocked & RESOURCE_PAGE) /* one that is older lacks pages of metadata */
        return OUTCOME_RETRY;
    if (__builtin_expect(dp->posted_count != 0, 0)) {
        struct dp_slot *slot = &dp->arena->slots[number];
        uint32_t status;
        if (posted_before(dp, slot, request, &status))
            return come_after(dp, slot, request, status);
    }
    switch (request->opcode) {
    case ATOLL_OP_READ: return exec_read(dp, number, request);
    case ATOLL_OP_WRITE: return exec_write(dp, number, request);
    case ATOLL_OP_TRIM:
    case ATOLL_OP_ZERO: return exec_range(dp, number, request);
    case ATOLL_OP_FLUSH: return exec_flush(dp, number, request);
    case ATOLL_OP_CACHE: return exec_cache(dp, number, request);
    case ATOLL_OP_EXTENTS: return exec_extents(dp, number, request);
    }
    dp->arena->slots[number].status = ATOLL_EINVAL;
    return OUTCOME_DONE;
}

/* Executes the request of an ACCEPTED slot whose hot part has been saved, and sees to what comes of it. */
static void execute(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    bool posted = posted_request(request);
    if (posted)
        slot->status = ATOLL_OK; /* why the last attempt failed is history */
    dp->arena->current_part = slot->part;
    atoll_compiler_barrier();
    dp->domain->self->current = slot->identity;
    atoll_compiler_barrier();
    enum dp_outcome outcome = dispatch(dp, number, request);
    atoll_compiler_barrier();
    dp->domain->self->current = 0;

    if (outcome == OUTCOME_DONE) {
        finish(dp, number);
        return;
    }
    if (posted && slot->status != ATOLL_OK) {
        uint32_t kept = posted_keep(dp, number, request);
        if (kept != DP_NO_SLOT) {
            queue_retry(dp, kept);
            slot->status = ATOLL_OK;
            finish(dp, number);
            return;
        }
    }
    if (request != &slot->request) {
        atoll_save(dp->journal, &slot->request, sizeof slot->request);
        slot->request = *request;
        atoll_count(dp->domain, DEDUP_COUNTER_WAITS, 1);
    }
    switch (outcome) {
    case OUTCOME_RETRY:
        queue_retry(dp, number);
        break;
    case OUTCOME_LOADING:
        slot->phase = PHASE_LOADING;
        slot_wait_page(dp, number);
        break;
    case OUTCOME_RANGE:
        slot->phase = PHASE_RANGE;
        queue_retry(dp, number);
        dp->ranges = dp->retry = true;
        break;
    default:
        slot->phase = PHASE_DESTAGE;
        slot->target = dp->arena->next_order - 1;
        begin_flush(dp, number);
    }
}

static void refuse(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request, uint32_t status)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    if (request->opcode == ATOLL_OP_WRITE)
        write_refuse_payload(dp, request);
    slot->status = status;
    finish(dp, number);
}

void datapath_expect(struct datapath *dp, const struct atoll_descriptor *message)
{
    uint32_t number = atoll_identity_slot(message->identity), volume = message->halves[4];
    uint64_t lba = message->words[0] / DP_BLOCK, page = (message->address - dp->nic_buffer) / DP_BLOCK;
    if (number >= ATOLL_SLOT_COUNT || volume >= ATOLL_VOLUME_COUNT)
        return;
    const char *slot = (const char *)&dp->arena->slots[number].identity;
    __builtin_prefetch(slot, 1);
    __builtin_prefetch(slot + 64, 1);
    if (message->opcode != ATOLL_OP_READ && message->opcode != ATOLL_OP_WRITE)
        return;
    store_prefetch_map(dp->dedup, volume, lba);
    lookup_prefetch(dp, volume, lba);
    if (message->opcode == ATOLL_OP_WRITE && message->segment_count == 0 && page < dp->arena->nic_pages)
        __builtin_prefetch(&dp->records[page], 1);
}

void datapath_message(struct datapath *dp, const struct atoll_descriptor *message)
{
    struct dp_arena *arena = dp->arena;
    uint32_t number = atoll_identity_slot(message->identity);
    if (number >= ATOLL_SLOT_COUNT || message->identity == 0) {
        atoll_count(dp->domain, DEDUP_COUNTER_BAD_REQUESTS, 1);
        return;
    }
    struct dp_slot *slot = &arena->slots[number];
    if (slot->state == SLOT_DONE && slot->identity == message->identity && slot->part == message->part) {
        atoll_count(dp->domain, DEDUP_COUNTER_REPEATS, 1);
        send_done(dp, number);
        return;
    }
    if (slot->state == SLOT_ACCEPTED) { /* its DONE is still to come */
        atoll_count(dp->domain, slot->identity == message->identity && slot->part == message->part
                                    ? DEDUP_COUNTER_REPEATS : DEDUP_COUNTER_BAD_REQUESTS, 1);
        return;
    }
    int32_t newer = (int32_t)(atoll_identity_sequence(message->identity) - atoll_identity_sequence(slot->identity));
    if (slot->state == SLOT_DONE && (newer < 0 || (newer == 0 && (int16_t)(message->part - slot->part) < 0))) {
        atoll_count(dp->domain, DEDUP_COUNTER_REPEATS, 1); /* answered long ago: the slot is in its next use */
        return;
    }
    slot_unpin(dp, slot);
    slot_save(dp, slot);
    slot->identity = message->identity;
    slot->part = message->part;
    slot->state = SLOT_ACCEPTED;
    slot->phase = PHASE_START;
    slot->status = ATOLL_OK;
    slot->result_bytes = slot->extent_count = 0;
    slot->progress = slot->failed_address = slot->failed_lba = slot->target = 0;
    slot->acceptance = arena->next_acceptance;
    dp_set64(dp, &arena->next_acceptance, arena->next_acceptance + 1);

    if (__builtin_expect(find_suspect(dp, message->identity, message->part) != 0, 0)) {
        atoll_save(dp->journal, &slot->request, sizeof slot->request);
        slot->request = *message;
        queue_retry(dp, number); /* executed alone, in a transaction of its own */
        dp->retry = true;
        return;
    }
    execute(dp, number, message);
}

void datapath_resume(struct datapath *dp, uint32_t number)
{
    switch (dp->arena->slots[number].phase) {
    case PHASE_LOADING:
        slot_wait_page(dp, number);
        break;
    case PHASE_DESTAGE:
    case PHASE_SYNC:
        begin_flush(dp, number);
        break;
    default:
        queue_retry(dp, number);
    }
}

void datapath_commit(struct datapath *dp)
{
    log_settle(dp);
    give_flush(dp);
    atoll_domain_commit(dp->domain);
    log_committed(dp);
}

static void execute_again(struct datapath *dp, uint32_t number)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    if (slot->phase == PHASE_LOADING) {
        slot_wait_page(dp, number);
        return;
    }
    struct atoll_suspect *suspect = find_suspect(dp, slot->identity, slot->part);
    slot_save(dp, slot);
    if (__builtin_expect(suspect == 0, 1)) {
        execute(dp, number, &slot->request);
        return;
    }
    if (suspect->crashes >= 2 && posted_request(&slot->request)) {
        atoll_count(dp->domain, DEDUP_COUNTER_POISONED, 1);
        dp->unseen = true; /* acknowledged: it is kept, and nobody looks at it */
        execute(dp, number, &slot->request);
        dp->unseen = false;
        datapath_commit(dp);
        if (slot->state != SLOT_ACCEPTED)
            suspect->crashes = 0;
        return;
    }
    if (suspect->crashes >= 2) {
        atoll_count(dp->domain, DEDUP_COUNTER_POISONED, 1);
        refuse(dp, number, &slot->request, ATOLL_EPOISON);
        suspect->crashes = 0;
        return;
    }
    datapath_commit(dp); /* nobody else's work is done again if it crashes */
    slot_save(dp, slot);
    execute(dp, number, &slot->request);
    datapath_commit(dp);
    suspect->crashes = 0;
}

/* Executes waiting requests again, oldest first; a resource that an older one lacks is not given to a younger one. */
static bool run_retry(struct datapath *dp)
{
    uint32_t number = dp->retry_head, count = dp->retry_count;
    bool again = false;
    dp->retry_ms = dp->now_ms;
    dp->ranges = false;
    dp->blocked = 0;
    dp->space_target = 0;
    dp->retry_head = DP_NO_SLOT;
    dp->retry_count = 0;
    store_urgent(dp->dedup, true); /* the oldest */
    while (number != DP_NO_SLOT) {
        uint32_t next = dp->slot_next[number];
        if (dp->journal->count >= DP_STEP_JOURNAL) {
            queue_retry(dp, number);
            again = true;
        } else {
            execute_again(dp, number);
        }
        store_urgent(dp->dedup, false);
        number = next;
    }
    store_urgent(dp->dedup, false);
    dp->retry = again || dp->ranges;
    return dp->retry_count < count || dp->retry;
}

/* A page that the device did not take, or one of this volume that is never to be destaged. (One of another volume is not waited for.) */
static bool is_unflushable(const struct datapath *dp, uint32_t volume)
{
    return dp->arena->failed_records != dp->arena->aside_records || dp->arena->aside[volume % ATOLL_VOLUME_COUNT] != 0;
}

/* Finishes the flushes that are reached; the others stay queued. */
static bool run_flushes(struct datapath *dp)
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
            queue_flush(dp, number);
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
            finish(dp, number);
            did = true;
        } else {
            queue_flush(dp, number);
        }
        number = next;
    }
    return did;
}

bool datapath_step(struct datapath *dp, uint64_t *wake_ms)
{
    bool did = false;
    uint64_t wake = 0;
    if (++dp->sweep_age >= 1024 || dp->arena->pinned_records > dp->log_limbo_count || dp->blocked != 0)
        dp_sweep(dp);
    posted_settle(dp);
    if (dp->retry_count == 0)
        dp->retry = false, dp->blocked = 0, dp->space_target = 0;
    else if (dp->retry || dp->now_ms - dp->retry_ms >= 5)
        did |= run_retry(dp);
    if (dp->flush_count != 0)
        did |= run_flushes(dp);
    did |= destage_step(dp, &wake);
    did |= tier_step(dp, &wake);
    did |= scrub_step(dp, &wake);
    if (!did || dp->sweep_age % 16 == 0)
        did |= du_step(dp);
    if (dp->flush_count != 0 && dp->destage_failures != dp->failures_told)
        did = true; /* a write has just failed: its flushes fail in the next step */
    did |= log_settle(dp);
    /* Nobody tells when a reply has been sent, so look again soon. */
    if ((dp->retry_count != 0 || dp->arena->pinned_records != 0 || dp->arena->returning != DP_NONE) && (wake == 0 || wake > 5))
        wake = 5;
    give_flush(dp);
    dp->swept = false;
    *wake_ms = wake;
    return did || (dp->retry && dp->retry_count != 0);
}

void datapath_io_done(struct dedup *dedup, const struct io_slot *slot, uint32_t status)
{
    if (slot->kind == IO_FILL)
        cache_io_done(dedup->datapath, slot, status);
    else if (slot->kind == IO_SCRUB)
        scrub_io_done(dedup->datapath, slot, status);
    else if (slot->kind == IO_TIER)
        tier_io_done(dedup->datapath, slot, status);
    else
        destage_io_done(dedup->datapath, slot, status);
}
