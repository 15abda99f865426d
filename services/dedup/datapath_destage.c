/*
 * Destage: logged blocks find their place on the device, in batches.
 *
 *   1 collect   up to ATOLL_IO_BLOCKS records from the head of the list, sorted by (volume, lba); each is checked against its
 *               fingerprint; zeros take no space
 *   2 match     match_batch asks for candidates of equal content and has them read (run matching comes here: it sees
 *               the whole batch in the order of its addresses)
 *   3 share     candidates are compared byte by byte and shared; equal blocks of the batch, or of a run being
 *               written, follow the first of them
 *   4 write     the rest goes to a run of free places in one gather write
 *   5 finish    completed writes are placed, followers share them, what was overwritten meanwhile is abandoned
 *
 * When: a record is old enough, a flush waits, more than a quarter of the pages is taken, or someone asks for all (drain).
 * A failed write leaves its records logged; after a back-off they go to another place. While one is unplaced, flushes fail (I7).
 *
 * After a crash: runs lie in the arena with their places; writes under way complete to the successor, which finishes
 * them. Only the hash of what is being written is private, and made again.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

#define BACKOFF_FIRST_NS 100000000u
#define BACKOFF_LAST_NS 5000000000u
/* Candidates looked at per block. */
#define CANDIDATES 4

static struct fingerprint zero_print;
static const uint8_t zero_block[DP_BLOCK];

static struct dp_record *at(struct datapath *dp, uint32_t record) { return &dp->records[record]; }

/* --- What is being written, by fingerprint (private) ------------------------------------------------------------------ */

static uint32_t *inflight_bucket(struct datapath *dp, struct fingerprint print)
{
    return &dp->inflight_heads[print.low % DP_INFLIGHT_HEADS];
}

static void inflight_add(struct datapath *dp, uint32_t run, uint32_t index)
{
    uint32_t node = run * DP_RUN_RECORDS + index;
    uint32_t *head = inflight_bucket(dp, at(dp, dp->arena->runs[run].records[index])->print);
    dp->inflight_next[node] = *head;
    *head = node;
}

static void inflight_remove(struct datapath *dp, uint32_t run, uint32_t index)
{
    uint32_t node = run * DP_RUN_RECORDS + index;
    uint32_t *link = inflight_bucket(dp, at(dp, dp->arena->runs[run].records[index])->print);
    while (*link != node) {
        assert(*link != DP_NONE);
        link = &dp->inflight_next[*link];
    }
    *link = dp->inflight_next[node];
}

static uint32_t inflight_find(struct datapath *dp, uint32_t record)
{
    uint32_t node = *inflight_bucket(dp, at(dp, record)->print);
    for (; node != DP_NONE; node = dp->inflight_next[node]) {
        uint32_t leader = dp->arena->runs[node / DP_RUN_RECORDS].records[node % DP_RUN_RECORDS];
        if (at(dp, leader)->state == RECORD_WRITING && print_equal(at(dp, leader)->print, at(dp, record)->print))
            break;
    }
    return node;
}

void destage_attach(struct datapath *dp)
{
    zero_print = dp_fingerprint(zero_block);
    for (uint32_t bucket = 0; bucket < DP_INFLIGHT_HEADS; bucket++)
        dp->inflight_heads[bucket] = DP_NONE;
    for (uint32_t run = 0; run < DP_RUNS; run++)
        if (dp->arena->runs[run].state >= RUN_WRITING)
            for (uint32_t index = 0; index < dp->arena->runs[run].writer_count; index++)
                inflight_add(dp, run, index);
}

/* --- Small things ---------------------------------------------------------------------------------------------------- */

uint64_t destage_pending_order(const struct datapath *dp)
{
    const struct dp_arena *arena = dp->arena;
    uint64_t lowest = arena->log_head == DP_NONE ? UINT64_MAX : dp->records[arena->log_head].order;
    for (uint32_t run = 0; run < DP_RUNS; run++)
        if (arena->runs[run].state != RUN_FREE && arena->runs[run].min_order < lowest)
            lowest = arena->runs[run].min_order;
    return lowest;
}

bool destage_protected(const struct datapath *dp, uint32_t record)
{
    const struct dp_record *r = &dp->records[record];
    return (r->state == RECORD_MATCHING || r->state == RECORD_WRITING) && r->order <= dp->flush_target;
}

static void save_words(struct datapath *dp, uint32_t *words, uint32_t count)
{
    atoll_save(dp->journal, words, (uint64_t)((count + 1) & ~1u) * sizeof words[0]);
}
_Static_assert(offsetof(struct dp_run, records) % 8 == 0 && DP_RUN_RECORDS % 2 == 0, "saved by words");

static void set_run_state(struct datapath *dp, uint32_t run, enum run_state state)
{
    dp_set32(dp, &dp->arena->runs[run].state, state);
}

/* A record of a run has its persistent value; its reservation is not needed. */
static void settled(struct datapath *dp, uint32_t record)
{
    store_unreserve(dp->dedup, 1);
    log_release(dp, record);
}

static void failed(struct datapath *dp)
{
    dp->backoff_ns = dp->backoff_ns == 0 ? BACKOFF_FIRST_NS : dp->backoff_ns * 2;
    if (dp->backoff_ns > BACKOFF_LAST_NS)
        dp->backoff_ns = BACKOFF_LAST_NS;
    dp->retry_ns = atoll_now_ns() + dp->backoff_ns;
}

/* --- 1 collect --------------------------------------------------------------------------------------------------------- */

static bool wanted(const struct datapath *dp, uint64_t now_ns, uint64_t *wake_ms)
{
    const struct dp_arena *arena = dp->arena;
    if (arena->log_head == DP_NONE)
        return false;
    if (now_ns < dp->retry_ns) {
        *wake_ms = (dp->retry_ns - now_ns) / 1000000 + 1;
        return false;
    }
    if (dp->space_ticket != 0) /* free places come with this sync; its completion wakes */
        return false;
    const struct dp_record *head = &dp->records[arena->log_head];
    if (dp->drain || head->order <= dp->flush_target || head->order <= dp->space_target ||
        arena->log_records * 4 > arena->nic_pages || (uint64_t)dp->merge_free_count * 4 < arena->merge_pages)
        return true;
    uint32_t age = (uint32_t)dp->now_ms - head->logged_ms;
    if (age >= dp->destage_delay_ms)
        return true;
    *wake_ms = dp->destage_delay_ms - age;
    return false;
}

static int by_address(const void *a, const void *b, void *context)
{
    const struct datapath *dp = context;
    const struct dp_record *x = &dp->records[*(const uint32_t *)a], *y = &dp->records[*(const uint32_t *)b];
    if (x->volume != y->volume)
        return x->volume < y->volume ? -1 : 1;
    return x->lba < y->lba ? -1 : x->lba > y->lba;
}

/* Takes a batch off the list into `run`; zeros and blocks of volumes being deleted are settled at once. */
static void collect(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    uint32_t taken[ATOLL_IO_BLOCKS], count = 0, record = dp->arena->log_head;
    uint64_t lowest = UINT64_MAX;
    while (record != DP_NONE && count < ATOLL_IO_BLOCKS) {
        struct dp_record *r = at(dp, record);
        uint32_t next = r->next;
        const void *page = record_page(dp, record);
        if (!print_equal(dp_fingerprint(page), r->print)) {
            atoll_count(dp->domain, DEDUP_COUNTER_CORRUPT_PAGES, 1);
            log_set_flag(dp, record, RECORD_CORRUPT);
        } else {
            log_unlink(dp, record);
            bool zero = print_equal(r->print, zero_print) && memcmp(page, zero_block, DP_BLOCK) == 0;
            if (zero || dp->dedup->public->volumes[r->volume].state != ATOLL_VOLUME_READY) {
                dp_set32(dp, &r->state, RECORD_MATCHING);
                store_unmap(dp->dedup, r->volume, r->lba, r->base);
                settled(dp, record);
                atoll_count(dp->domain, DEDUP_COUNTER_ZERO_BLOCKS, zero);
            } else {
                dp_set32(dp, &r->state, RECORD_MATCHING);
                lowest = r->order < lowest ? r->order : lowest;
                taken[count++] = record;
            }
        }
        record = next;
    }
    if (count == 0)
        return;
    qsort_r(taken, count, sizeof taken[0], by_address, dp);
    save_words(dp, &run->state, offsetof(struct dp_run, records) / sizeof(uint32_t));
    save_words(dp, run->records, count);
    save_words(dp, run->link, count);
    memcpy(run->records, taken, count * sizeof taken[0]);
    for (uint32_t index = 0; index < count; index++)
        run->link[index] = DP_NONE;
    run->state = RUN_MATCHING;
    run->status = ATOLL_OK;
    run->pba = 0;
    run->writer_count = 0;
    run->record_count = count;
    run->min_order = lowest;
}

/* --- 2 match ------------------------------------------------------------------------------------------------------------- */

/* Chooses for each record of the batch the stored block that it may be equal to, and has those read: link[i] is the cache
 * page to compare with, pinned. */
static void match_batch(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    uint64_t pbas[ATOLL_IO_BLOCKS], unknown;
    uint32_t where[ATOLL_IO_BLOCKS], pages[ATOLL_IO_BLOCKS], count = 0;
    for (uint32_t index = 0; index < run->record_count; index++) {
        uint64_t candidates[CANDIDATES];
        uint32_t found = store_candidates(dp->dedup, at(dp, run->records[index])->print, candidates, CANDIDATES);
        if (found == 0)
            continue;
        uint32_t best = 0;
        for (uint32_t each = 0; each < found; each++) {
            if (count != 0 && candidates[each] == pbas[count - 1] + 1) { /* keeps a sequence in sequence */
                best = each;
                break;
            }
            if (cache_find(dp, candidates[each]) != DP_NONE && cache_find(dp, candidates[best]) == DP_NONE)
                best = each;
        }
        where[count] = index;
        pbas[count++] = candidates[best];
    }
    if (count == 0)
        return;
    if (!cache_load(dp, pbas, count, pages, &unknown)) {
        /* Readers hold the pages: unique copies cost space, waiting could cost the flush. */
        dp_sweep(dp);
        if (!cache_load(dp, pbas, count, pages, &unknown)) {
            atoll_count(dp->domain, DEDUP_COUNTER_MATCH_SKIPPED, count);
            return;
        }
    }
    for (uint32_t each = 0; each < count; each++)
        run->link[where[each]] = pages[each]; /* saved by collect in this transaction */
}

static bool match_loaded(const struct datapath *dp, uint32_t number)
{
    const struct dp_run *run = &dp->arena->runs[number];
    for (uint32_t index = 0; index < run->record_count; index++)
        if (run->link[index] != DP_NONE && dp->pages[run->link[index]].state == PAGE_LOADING)
            return false;
    return true;
}

/* --- 3 share ------------------------------------------------------------------------------------------------------------- */

/* The fingerprint was a hint; what is stored now, and every byte of it, decides. */
static bool share(struct datapath *dp, uint32_t record, uint32_t page)
{
    struct dp_record *r = at(dp, record);
    struct dp_page *p = &dp->pages[page];
    struct fingerprint stored;
    if (p->state != PAGE_VALID || !p->attached || !store_fingerprint(dp->dedup, p->pba, &stored))
        return false;
    if (!print_equal(stored, r->print) || memcmp(page_memory(dp, page), record_page(dp, record), DP_BLOCK) != 0) {
        atoll_count(dp->domain, DEDUP_COUNTER_COMPARE_MISMATCHES, 1);
        return false;
    }
    if (!store_share(dp->dedup, r->volume, r->lba, r->base, p->pba))
        return false;
    settled(dp, record);
    atoll_count(dp->domain, DEDUP_COUNTER_SHARED_BLOCKS, 1);
    return true;
}

/* Follows a record that is being written with the same content, if there is one and its run has a place. */
static bool follow_inflight(struct datapath *dp, uint32_t record)
{
    uint32_t node = inflight_find(dp, record);
    if (node == DP_NONE)
        return false;
    struct dp_run *run = &dp->arena->runs[node / DP_RUN_RECORDS];
    uint32_t place = run->record_count;
    if (run->state != RUN_WRITING || place == DP_RUN_RECORDS)
        return false;
    dp_set32(dp, &run->records[place], record);
    dp_set32(dp, &run->link[place], node % DP_RUN_RECORDS);
    dp_set32(dp, &run->record_count, place + 1);
    if (at(dp, record)->order < run->min_order)
        dp_set64(dp, &run->min_order, at(dp, record)->order);
    return true;
}

/* --- 4 write -------------------------------------------------------------------------------------------------------------- */

static void submit_run(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    struct atoll_segment segments[ATOLL_IO_BLOCKS];
    uint32_t count = 0;
    for (uint32_t index = 0; index < run->writer_count; index++) {
        uint64_t address = record_address(dp, run->records[index]);
        if (count != 0 && segments[count - 1].address + segments[count - 1].length == address)
            segments[count - 1].length += DP_BLOCK;
        else
            segments[count++] = (struct atoll_segment){.address = address, .length = DP_BLOCK};
    }
    ATOLL_CRASH_POINT(dp->domain, "dedup.destage.submit");
    int slot = io_submit(dp->dedup, IO_DESTAGE, number, ATOLL_ROLE_DISK, ATOLL_OP_IO_WRITE, run->pba * DP_BLOCK, segments, count);
    assert(slot >= 0); /* go_on looked for room */
    atoll_count(dp->domain, DEDUP_COUNTER_RUNS, 1);
}

/* All candidates of a batch are there: shares what is equal and writes the rest. False: not now. */
static bool go_on(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    uint32_t writers[ATOLL_IO_BLOCKS], writer_count = 0, count = run->record_count;
    uint32_t followers[ATOLL_IO_BLOCKS], leaders[ATOLL_IO_BLOCKS], follower_count = 0;
    uint32_t heads[256], next[ATOLL_IO_BLOCKS];
    uint64_t lowest = UINT64_MAX;
    if (!store_has_room(dp->dedup, count) || io_room(dp->dedup, IO_DESTAGE) == 0)
        return false;
    memset(heads, 0xff, sizeof heads);

    for (uint32_t index = 0; index < count; index++) {
        uint32_t record = run->records[index], page = run->link[index];
        bool over = at(dp, record)->state == RECORD_DROPPED;
        if (over)
            log_release(dp, record); /* who overwrote it took its reservation */
        else if (page != DP_NONE)
            over = share(dp, record, page);
        if (page != DP_NONE)
            cache_unpin(dp, page);
        if (over || follow_inflight(dp, record))
            continue;
        /* Equal to an earlier block of this batch? */
        uint32_t *head = &heads[at(dp, record)->print.low % 256], same = *head;
        while (same != DP_NONE && !print_equal(at(dp, writers[same])->print, at(dp, record)->print))
            same = next[same];
        if (same != DP_NONE) {
            leaders[follower_count] = same;
            followers[follower_count++] = record;
        } else {
            next[writer_count] = *head;
            *head = writer_count;
            writers[writer_count++] = record;
        }
    }
    uint64_t pba = 0;
    uint32_t placed = writer_count == 0 ? 0 : store_allocate(dp->dedup, writer_count, &pba);
    if (placed == 0 && writer_count != 0) {
        uint32_t status;
        dp->space_ticket = store_sync(dp->dedup);
        dp->space_failures = store_sync_failures(dp->dedup, &status);
    }
    uint32_t total = placed;
    for (uint32_t index = placed; index < writer_count; index++)
        log_requeue(dp, writers[index]);
    for (uint32_t index = 0; index < follower_count; index++) {
        if (leaders[index] >= placed) {
            log_requeue(dp, followers[index]);
            continue;
        }
        followers[total - placed] = followers[index];
        leaders[total - placed] = leaders[index];
        total++;
    }
    if (placed == 0) {
        set_run_state(dp, number, RUN_FREE);
        return true;
    }
    save_words(dp, &run->state, offsetof(struct dp_run, records) / sizeof(uint32_t));
    save_words(dp, run->records, total);
    save_words(dp, run->link, total);
    for (uint32_t index = 0; index < total; index++) {
        uint32_t record = index < placed ? writers[index] : followers[index - placed];
        run->records[index] = record;
        run->link[index] = index < placed ? DP_NONE : leaders[index - placed];
        lowest = at(dp, record)->order < lowest ? at(dp, record)->order : lowest;
        if (index < placed) {
            dp_set32(dp, &at(dp, record)->state, RECORD_WRITING);
            cache_drop(dp, pba + index);
        }
    }
    run->state = RUN_WRITING;
    run->pba = pba;
    run->writer_count = placed;
    run->record_count = total;
    run->min_order = lowest;
    for (uint32_t index = 0; index < placed; index++)
        inflight_add(dp, number, index);
    submit_run(dp, number);
    return true;
}

/* --- 5 finish -------------------------------------------------------------------------------------------------------------- */

void destage_io_done(struct datapath *dp, const struct io_slot *slot, uint32_t status)
{
    struct dp_run *run = &dp->arena->runs[slot->argument % DP_RUNS];
    assert(slot->argument < DP_RUNS && run->state == RUN_WRITING);
    ATOLL_CRASH_POINT(dp->domain, "dedup.destage.done");
    dp_set32(dp, &run->status, status);
    dp_set32(dp, &run->state, RUN_WRITTEN);
}

/* Followers first: their leaders' pages are still there. */
static void finish_follower(struct datapath *dp, struct dp_run *run, uint32_t record, uint32_t leader_index)
{
    struct dp_record *r = at(dp, record);
    uint32_t leader = run->records[leader_index];
    if (r->state == RECORD_DROPPED) {
        log_release(dp, record);
        return;
    }
    assert(r->state == RECORD_MATCHING);
    /* Placed leaders have a reference already; a leader that was overwritten is abandoned. */
    if (run->status == ATOLL_OK && store_references(dp->dedup, run->pba + leader_index) != 0 &&
        memcmp(record_page(dp, record), record_page(dp, leader), DP_BLOCK) == 0 &&
        store_share(dp->dedup, r->volume, r->lba, r->base, run->pba + leader_index)) {
        settled(dp, record);
        atoll_count(dp->domain, DEDUP_COUNTER_SHARED_BLOCKS, 1);
        return;
    }
    log_requeue(dp, record);
}

static void finish_run(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    uint32_t writers = run->writer_count, errors = 0;
    bool placed[ATOLL_IO_BLOCKS];
    ATOLL_CRASH_POINT(dp->domain, "dedup.destage.finish");
    for (uint32_t index = 0; index < writers; index++) {
        uint32_t record = run->records[index];
        struct dp_record *r = at(dp, record);
        inflight_remove(dp, number, index);
        placed[index] = false;
        if (r->state == RECORD_DROPPED) {
            store_abandon(dp->dedup, run->pba + index, 1, false);
            store_unreserve(dp->dedup, 1); /* who overwrote it has a reservation of its own */
        } else if (run->status == ATOLL_OK) {
            store_place(dp->dedup, r->volume, r->lba, r->base, run->pba + index, r->print);
            placed[index] = true;
        } else {
            store_abandon(dp->dedup, run->pba + index, 1, false);
            log_set_flag(dp, record, RECORD_FAILED);
            errors++;
        }
    }
    for (uint32_t index = writers; index < run->record_count; index++)
        finish_follower(dp, run, run->records[index], run->link[index]);
    for (uint32_t index = 0; index < writers; index++) {
        if (placed[index] || at(dp, run->records[index])->state == RECORD_DROPPED)
            log_release(dp, run->records[index]);
        else
            log_requeue(dp, run->records[index]);
    }
    set_run_state(dp, number, RUN_FREE);
    atoll_count(dp->domain, DEDUP_COUNTER_DESTAGED_BLOCKS, writers - errors);
    atoll_count(dp->domain, DEDUP_COUNTER_DESTAGE_ERRORS, errors);
    if (errors != 0)
        failed(dp);
    else if (run->status == ATOLL_OK)
        dp->backoff_ns = dp->retry_ns = 0;
    dp->retry = true;
}

/* --- The step ------------------------------------------------------------------------------------------------------------------ */

static uint32_t free_run(const struct datapath *dp)
{
    for (uint32_t run = 0; run < DP_RUNS; run++)
        if (dp->arena->runs[run].state == RUN_FREE)
            return run;
    return DP_RUNS;
}

bool destage_step(struct datapath *dp, uint64_t *wake_ms)
{
    bool did = false, matching = dp->loaded;
    if (dp->space_ticket != 0) {
        uint32_t status;
        if (store_synced(dp->dedup) >= dp->space_ticket) {
            dp->space_ticket = 0;
        } else if (store_sync_failures(dp->dedup, &status) != dp->space_failures) {
            dp->space_ticket = 0;
            failed(dp);
        }
    }
    dp->loaded = false;
    for (uint32_t number = 0; number < DP_RUNS && dp->journal->count < DP_STEP_JOURNAL; number++) {
        struct dp_run *run = &dp->arena->runs[number];
        if (run->state == RUN_WRITTEN) {
            if (!store_has_room(dp->dedup, run->record_count))
                continue; /* a sync is under way and will wake */
            finish_run(dp, number);
            did = true;
        } else if (run->state == RUN_MATCHING && (matching || dp->waiting_runs) && match_loaded(dp, number)) {
            did |= go_on(dp, number);
        }
    }
    if (did)
        dp->retry = true;
    dp->waiting_runs = false;
    uint32_t active = 0;
    for (uint32_t number = 0; number < DP_RUNS; number++) {
        if (dp->arena->runs[number].state == RUN_WRITTEN)
            active++;
        /* Those that lack room or I/O slots are tried each step; those that are loading, when something was loaded. */
        if (dp->arena->runs[number].state == RUN_MATCHING && match_loaded(dp, number))
            dp->waiting_runs = true;
    }
    if ((active != 0 || dp->waiting_runs) && *wake_ms == 0)
        *wake_ms = 5;

    uint64_t wake = 0;
    uint32_t number = dp->arena->log_head == DP_NONE ? DP_RUNS : free_run(dp);
    if (number != DP_RUNS && dp->journal->count < DP_STEP_JOURNAL && wanted(dp, atoll_now_ns(), &wake)) {
        if (!store_has_room(dp->dedup, ATOLL_IO_BLOCKS)) {
            wake = 5;
        } else {
            collect(dp, number);
            if (dp->arena->runs[number].state == RUN_MATCHING) {
                match_batch(dp, number);
                if (!match_loaded(dp, number) || !go_on(dp, number))
                    dp->waiting_runs = dp->waiting_runs || match_loaded(dp, number);
            }
            dp->retry = true;
            did = true;
        }
    }
    if (wake != 0 && (*wake_ms == 0 || wake < *wake_ms))
        *wake_ms = wake;
    return did;
}

void destage_adopt(struct datapath *dp, bool quarantine)
{
    for (uint32_t number = 0; number < DP_RUNS; number++) {
        struct dp_run *run = &dp->arena->runs[number];
        if (run->state == RUN_FREE)
            continue;
        for (uint32_t index = 0; index < run->record_count; index++) {
            uint32_t record = run->records[index];
            bool written = run->state >= RUN_WRITING && index < run->writer_count;
            bool dropped = at(dp, record)->state == RECORD_DROPPED;
            if (written) {
                inflight_remove(dp, number, index);
                store_abandon(dp->dedup, run->pba + index, 1, quarantine);
                if (dropped)
                    store_unreserve(dp->dedup, 1);
            }
            if (dropped)
                log_release(dp, record);
            else
                log_requeue(dp, record);
        }
        set_run_state(dp, number, RUN_FREE);
        give_flush(dp);
        atoll_domain_commit(dp->domain);
        log_committed(dp);
    }
}
