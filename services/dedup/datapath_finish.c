/*
 * What is being written, by fingerprint, and 5 finish of datapath_destage.c: batches whose write is complete.
 *
 * After a crash: the hash is made again by destage_attach; a run says how far it has been finished (`done`).
 */
#include "ipc/crashpoint.h"
#include "services/dedup/datapath_batch.h"


static struct dp_record *at(struct datapath *dp, uint32_t record) { return &dp->records[record]; }

/* --- What is being written, by fingerprint (private) ---------------------------------------------------------------- */

void inflight_clear(struct datapath *dp)
{
    for (uint32_t bucket = 0; bucket < DP_INFLIGHT_HEADS; bucket++)
        dp->inflight_heads[bucket] = DP_NONE;
}

static uint32_t *inflight_bucket(const struct datapath *dp, struct fingerprint print)
{
    return &dp->inflight_heads[print.low % DP_INFLIGHT_HEADS];
}

void inflight_add(struct datapath *dp, uint32_t run, uint32_t index)
{
    uint32_t node = run * DP_RUN_RECORDS + index;
    uint32_t *head = inflight_bucket(dp, at(dp, dp->arena->runs[run].records[index])->print);
    dp->inflight_next[node] = *head;
    *head = node;
}

void inflight_remove(struct datapath *dp, uint32_t run, uint32_t index)
{
    uint32_t node = run * DP_RUN_RECORDS + index;
    uint32_t *link = inflight_bucket(dp, at(dp, dp->arena->runs[run].records[index])->print);
    while (*link != node) {
        assert(*link != DP_NONE);
        link = &dp->inflight_next[*link];
    }
    *link = dp->inflight_next[node];
}

uint32_t destage_node(const struct datapath *dp, uint32_t record)
{
    uint32_t node = *inflight_bucket(dp, dp->records[record].print);
    while (node != DP_NONE && dp->arena->runs[node / DP_RUN_RECORDS].records[node % DP_RUN_RECORDS] != record)
        node = dp->inflight_next[node];
    return node;
}

void destage_prefetch_inflight(const struct datapath *dp, struct fingerprint print)
{
    __builtin_prefetch(inflight_bucket(dp, print), 1);
}

uint32_t destage_inflight(const struct datapath *dp, struct fingerprint print, uint32_t after)
{
    uint32_t node = after == DP_NONE ? *inflight_bucket(dp, print) : dp->inflight_next[after];
    for (; node != DP_NONE; node = dp->inflight_next[node]) {
        const struct dp_run *run = &dp->arena->runs[node / DP_RUN_RECORDS];
        const struct dp_record *leader = &dp->records[run->records[node % DP_RUN_RECORDS]];
        if (run->state == RUN_WRITING && leader->state == RECORD_WRITING && print_equal(leader->print, print))
            break;
    }
    return node;
}

/* --- 5 finish ------------------------------------------------------------------------------------------------------- */

void destage_io_done(struct datapath *dp, const struct io_slot *slot, uint32_t status)
{
    struct dp_run *run = &dp->arena->runs[slot->argument % DP_RUNS];
    assert(slot->argument < DP_RUNS && run->state == RUN_WRITING);
    ATOLL_CRASH_POINT(dp->domain, "dedup.destage.done");
    if (status == ATOLL_OK)
        dp->shorter_ms = dp->now_ms;
    dp_set32(dp, &run->status, status);
    batch_set_state(dp, (uint32_t)slot->argument, RUN_WRITTEN);
}

/* True if one more record can be finished in this step. */
static bool finish_ready(struct datapath *dp, uint32_t record, uint64_t pba, enum store_want *place)
{
    *place = store_want_blocks(dp->dedup, &pba, 1);
    if (*place == STORE_WAIT || dp->journal->count >= 2 * DP_STEP_JOURNAL || !store_has_room(dp->dedup, 1))
        return false;
    return store_want_base(dp->dedup, at(dp, record)->base) != STORE_WAIT;
}

void destage_freed(struct datapath *dp, uint64_t pba)
{
    for (uint64_t left = dp->runs_in[RUN_WRITTEN]; left != 0; left &= left - 1) {
        struct dp_run *run = &dp->arena->runs[__builtin_ctzll(left)];
        if (pba - run->pba < run->writer_count)
            dp_set32(dp, &run->link[pba - run->pba], DP_REJECTED);
    }
}

/* `lost`: the page of its fingerprint is. */
static void give_up_place(struct datapath *dp, uint64_t pba, bool lost)
{
    if (lost)
        store_lay_aside(dp->dedup, pba);
    else
        store_abandon(dp->dedup, pba, 1, false);
    destage_freed(dp, pba);
}

/* Its place is given up for another one; it goes back to the list, or is set aside, when the run ends. Whoever overwrites it until then takes
 * over the reservation that it has again. */
static void lose_place(struct datapath *dp, const struct dp_run *run, uint32_t index, bool lost)
{
    give_up_place(dp, run->pba + index, lost);
    dp_set32(dp, &at(dp, run->records[index])->state, RECORD_MATCHING);
}

/* A record that has been written. It stays until the followers have compared themselves with its page: DROPPED says that
 * the map does not name it any more, its link that its place is its own no more. */
static void finish_writer(struct datapath *dp, struct dp_run *run, uint32_t index, bool place_lost)
{
    uint32_t record = run->records[index];
    struct dp_record *r = at(dp, record);
    if (r->state == RECORD_DROPPED) {
        give_up_place(dp, run->pba + index, false);
        store_unreserve(dp->dedup, 1); /* who overwrote it has a reservation of its own */
    } else if (r->flags & RECORD_CONDEMNED) {
        lose_place(dp, run, index, place_lost);
        return;
    } else if (run->status != ATOLL_OK || place_lost) { /* the page of its place's fingerprint is damaged: another place */
        lose_place(dp, run, index, place_lost);
        if (!place_lost || dp->backoff_ns != 0) /* else another place does at once; unless the one before was no better */
            log_set_flag(dp, record, RECORD_FAILED);
        atoll_count(dp->domain, DEDUP_COUNTER_DESTAGE_ERRORS, 1);
        return;
    } else {
        store_place(dp->dedup, r->volume, r->lba, r->base, run->pba + index, r->print);
        tier_consider(dp, r->volume, run->pba + index);
        log_clear_flags(dp, record); /* it has its place now, if it had failed before */
        dp_set32(dp, &r->state, RECORD_DROPPED);
        dp_note_leaving(dp, false);
    }
    atoll_count(dp->domain, DEDUP_COUNTER_DESTAGED_BLOCKS, 1);
}

/* Equal to a record that has been written, whose page is still there. */
static void finish_follower(struct datapath *dp, struct dp_run *run, uint32_t record, uint32_t leader_index)
{
    struct dp_record *r = at(dp, record);
    uint32_t leader = run->records[leader_index];
    if (r->state == RECORD_DROPPED) {
        log_release(dp, record);
        return;
    }
    assert(r->state == RECORD_MATCHING);
    if (r->flags & RECORD_CONDEMNED) {
        log_requeue(dp, record);
        batch_set_aside(dp, record);
        return;
    }
    /* Placed leaders have a reference already. The place of one that was overwritten since may hold another block by now. */
    if (run->status == ATOLL_OK && run->link[leader_index] == DP_NONE && store_references(dp->dedup, run->pba + leader_index) != 0 &&
        memcmp(record_page(dp, record), record_page(dp, leader), DP_BLOCK) == 0 &&
        store_share(dp->dedup, r->volume, r->lba, r->base, run->pba + leader_index)) {
        tier_consider(dp, r->volume, run->pba + leader_index);
        destage_settled(dp, record);
        atoll_count(dp->domain, DEDUP_COUNTER_SHARED_BLOCKS, 1);
        return;
    }
    log_requeue(dp, record);
}

/* Cache lines that finishing records[from..] will look at: one after the other the processor would wait for each. */
static void finish_prefetch(struct datapath *dp, const struct dp_run *run, uint32_t from)
{
    uint32_t end = from + BATCH_AHEAD < run->record_count ? from + BATCH_AHEAD : run->record_count;
    for (uint32_t index = from; index < end; index++)
        __builtin_prefetch(at(dp, run->records[index]), 1);
    for (uint32_t index = from; index < end; index++) {
        const struct dp_record *r = at(dp, run->records[index]);
        store_prefetch_map(dp->dedup, r->volume, r->lba);
        store_prefetch_candidates(dp->dedup, r->print);
        destage_prefetch_inflight(dp, r->print);
        if (MAP_KIND(r->base) == MAP_PBA)
            store_prefetch_block(dp->dedup, MAP_NUMBER(r->base));
    }
    for (uint32_t index = from; index < end; index++) {
        const struct dp_record *r = at(dp, run->records[index]);
        if (MAP_KIND(r->base) == MAP_PBA)
            store_prefetch_forget(dp->dedup, MAP_NUMBER(r->base));
    }
}

/* Record by record, as their pages are there; `done` says how far. True if something was done. */
bool batch_finish(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    uint32_t writers = run->writer_count, done = run->done, end = run->record_count;
    if (dp->flush_count == 0 && end - done > batch_piece(dp)) /* nobody waits for all of them */
        end = done + batch_piece(dp);
    ATOLL_CRASH_POINT(dp->domain, "dedup.destage.finish");
    for (; done < end; done++) {
        uint32_t record = run->records[done], leader = done < writers ? done : run->link[done];
        enum store_want place;
        if ((done - run->done) % BATCH_AHEAD == 0)
            finish_prefetch(dp, run, done);
        if (!finish_ready(dp, record, run->pba + leader, &place))
            break;
        batch_handle_none(dp);
        batch_handle(dp, record);
        if (done < writers) {
            inflight_remove(dp, number, done);
            finish_writer(dp, run, done, place == STORE_LOST);
        } else {
            finish_follower(dp, run, record, leader);
        }
    }
    batch_handle_none(dp);
    bool did = done != run->done;
    if (did)
        dp_set32(dp, &run->done, done);
    if (done < run->record_count || dp->journal->count >= 2 * DP_STEP_JOURNAL)
        return did;
    uint32_t errors = 0;
    for (uint32_t index = 0; index < writers; index++) {
        if (at(dp, run->records[index])->state == RECORD_DROPPED) {
            log_release(dp, run->records[index]);
        } else {
            log_requeue(dp, run->records[index]);
            if (at(dp, run->records[index])->flags & RECORD_CONDEMNED)
                batch_set_aside(dp, run->records[index]);
            else
                errors++;
        }
    }
    batch_set_state(dp, number, RUN_FREE);
    if (errors != 0)
        destage_failed(dp);
    else if (run->status == ATOLL_OK)
        dp->backoff_ns = dp->retry_ns = 0;
    dp->retry = true;
    return true;
}
