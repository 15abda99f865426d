/*
 * Requests of dedup: acceptance, execution. See datapath.h for the whole picture.
 *
 *   datapath_message     accepts one request and executes it; most are finished in the same step
 *   datapath_step        waiting requests, flushes, destage
 *
 * After a crash: completed requests stay completed, and a repeat of one is answered again without being applied again (I6).
 */
#include "services/dedup/datapath.h"

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
    if (request->opcode == ATOLL_OP_FLUSH && status == ATOLL_OK && flush_in_vain(dp, slot, request->halves[4]))
        status = ATOLL_EUNFLUSHED; /* what that one waits for fails */
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
    uint32_t before = slot->status;
    if (posted)
        slot->status = ATOLL_OK;
    dp->arena->current_part = slot->part;
    atoll_compiler_barrier();
    dp->domain->self->current = slot->identity;
    atoll_compiler_barrier();
    enum dp_outcome outcome = dispatch(dp, number, request);
    atoll_compiler_barrier();
    dp->domain->self->current = 0;

    if (outcome == OUTCOME_DONE) {
        slot_finish(dp, number);
        return;
    }
    if (posted && slot->status == ATOLL_OK)
        slot->status = before; /* what failed and is being tried again has not succeeded yet */
    if (posted && slot->status != ATOLL_OK) {
        uint32_t kept = posted_keep(dp, number, request);
        if (kept != DP_NO_SLOT) {
            slot_queue_retry(dp, kept);
            slot->status = ATOLL_OK;
            slot_finish(dp, number);
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
        slot_queue_retry(dp, number);
        break;
    case OUTCOME_LOADING:
        slot->phase = PHASE_LOADING;
        slot_wait_page(dp, number);
        break;
    case OUTCOME_RANGE:
        slot->phase = PHASE_RANGE;
        slot_queue_retry(dp, number);
        dp->ranges = dp->retry = true;
        break;
    default:
        slot->phase = PHASE_DESTAGE;
        slot->target = dp->arena->next_order - 1;
        flush_begin(dp, number);
    }
}

static void refuse(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request, uint32_t status)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    if (request->opcode == ATOLL_OP_WRITE)
        write_refuse_payload(dp, request);
    slot->status = status;
    slot_finish(dp, number);
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

void datapath_message(struct datapath *dp, uint32_t role, const struct atoll_descriptor *message)
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
        slot_answer(dp, number);
        return;
    }
    if (slot->state == SLOT_ACCEPTED) { /* its DONE is still to come */
        atoll_count(dp->domain, slot->identity == message->identity && slot->part == message->part
                                    ? DEDUP_COUNTER_REPEATS : DEDUP_COUNTER_BAD_REQUESTS, 1);
        return;
    }
    uint32_t sequence = atoll_identity_sequence(message->identity);
    int32_t newer = (int32_t)(sequence - atoll_identity_sequence(slot->identity));
    /* Most uses of a slot never come here (nic and nbd read from memory): after 2^31 of them, hours, the next one looks like an older one, but nic
     * has not done with it. */
    if (newer < 0 && (int32_t)(atoll_load_acquire(&dp->nic_public->done[number]) - sequence) < 0) /* SP-DONE */
        newer = 1;
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
    slot->posted = posted_request(message);
    slot->asker = role;
    slot->result_bytes = slot->extent_count = 0;
    slot->progress = slot->failed_address = slot->failed_lba = slot->target = 0;
    slot->acceptance = arena->next_acceptance;
    dp_set64(dp, &arena->next_acceptance, arena->next_acceptance + 1);

    if (__builtin_expect(find_suspect(dp, message->identity, message->part) != 0, 0)) {
        atoll_save(dp->journal, &slot->request, sizeof slot->request);
        slot->request = *message;
        slot_queue_retry(dp, number); /* executed alone, in a transaction of its own */
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
        flush_begin(dp, number);
        break;
    default:
        slot_queue_retry(dp, number);
    }
}

void datapath_commit(struct datapath *dp)
{
    log_settle(dp);
    give_flush(dp);
    posted_end(dp);
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
        datapath_commit(dp); /* before it is forgotten: a successor must not try it again */
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
            slot_queue_retry(dp, number);
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

void dp_note_damage(struct datapath *dp, uint64_t pba, uint32_t status, uint32_t volume, uint64_t lba)
{
    if (dp->damage_count == DP_DAMAGE_NOTES) {
        dp->damage_dropped++;
        return;
    }
    dp->damage[dp->damage_count++] = (struct dp_damage){.pba = pba, .lba = lba, .volume = volume, .status = status};
}

bool datapath_step(struct datapath *dp, uint64_t *wake_ms)
{
    bool did = false;
    uint64_t wake = 0;
    if (++dp->sweep_age >= 1024 || dp->arena->pinned_records > dp->log_limbo_count || dp->blocked != 0)
        dp_sweep(dp);
    if (dp->retry_count == 0)
        dp->retry = false, dp->blocked = 0, dp->space_target = 0;
    else if (dp->retry || dp->now_ms - dp->retry_ms >= 5)
        did |= run_retry(dp);
    if (dp->flush_count != 0)
        did |= flush_step(dp);
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
