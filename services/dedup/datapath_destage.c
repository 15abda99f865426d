/*
 * Destage: logged blocks find their place on the device, in batches.
 *
 *   1 collect   whole runs of consecutive blocks around the oldest logged ones and around those equal to them, up to ATOLL_IO_BLOCKS
 *               records, sorted by (volume, lba); each is checked against its fingerprint; zeros take no space
 *   2 match     stored blocks of equal content, as the volume's run threshold allows, are read (datapath_match.c)
 *   3 share     they are compared byte by byte and shared; equal blocks of the batch, or of a run being
 *               written, follow these
 *   4 write     the rest goes to a run of free places in one gather write
 *   5 finish    completed writes are placed, followers share them, what was overwritten meanwhile is abandoned
 *
 * In pieces: where dedup shares a processor with the rest of the data path a step does one of these things to one batch, in some
 * 50 microseconds, and while clients ask for something the next one follows when they have had as much time; so a request waits for
 * one of them, not for all.
 *
 * When: a record is old enough, a flush waits, more than a quarter of the pages is taken, or someone asks for all (drain).
 * A failed write leaves its records logged; after a back-off, or when a flush is asked, they go to another place. While one is
 * unplaced, flushes fail (I7).
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
/* Steps that wait for the pages that say what may be equal to a batch. */
#define LOOKUPS 64
/* Records whose cache lines are asked for together. */
#define FINISH_AHEAD 32
/* Pieces of one step where nobody else is held up by it. */
#define STEP_PIECES 16
/* Records that are checked in one piece. */
#define COLLECT_MOST 48
/* Clients come first for no longer than this after a piece of work. */
#define GIVE_WAY_NS 500000
/* Records finished in one piece, if nobody waits for them. */
#define FINISH_MOST 64

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

void destage_prefetch_inflight(const struct datapath *dp, struct fingerprint print)
{
    __builtin_prefetch(&dp->inflight_heads[print.low % DP_INFLIGHT_HEADS], 1);
}

uint32_t destage_inflight(const struct datapath *dp, struct fingerprint print, uint32_t after)
{
    uint32_t node = after == DP_NONE ? dp->inflight_heads[print.low % DP_INFLIGHT_HEADS] : dp->inflight_next[after];
    for (; node != DP_NONE; node = dp->inflight_next[node]) {
        const struct dp_run *run = &dp->arena->runs[node / DP_RUN_RECORDS];
        const struct dp_record *leader = &dp->records[run->records[node % DP_RUN_RECORDS]];
        if (run->state == RUN_WRITING && leader->state == RECORD_WRITING && print_equal(leader->print, print))
            break;
    }
    return node;
}

static void count_pages(struct datapath *dp, uint32_t number)
{
    const struct dp_run *run = &dp->arena->runs[number];
    dp->run_pages[number] = dp->run_loaded[number] = 0;
    for (uint32_t index = 0; index < run->record_count; index++)
        dp->run_pages[number] += run->link[index] < DP_UNREAD;
}

void destage_attach(struct datapath *dp)
{
    dp->collecting = DP_RUNS;
    zero_print = dp_fingerprint(zero_block);
    for (uint32_t bucket = 0; bucket < DP_INFLIGHT_HEADS; bucket++)
        dp->inflight_heads[bucket] = DP_NONE;
    for (uint32_t run = 0; run < DP_RUNS; run++)
        if (dp->arena->runs[run].state == RUN_MATCHING)
            count_pages(dp, run);
        else if (dp->arena->runs[run].state >= RUN_WRITING)
            for (uint32_t index = dp->arena->runs[run].done; index < dp->arena->runs[run].writer_count; index++)
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

void destage_save_run(struct datapath *dp, struct dp_run *run, uint32_t count)
{
    save_words(dp, &run->state, offsetof(struct dp_run, records) / sizeof(uint32_t));
    save_words(dp, run->records, count);
    save_words(dp, run->link, count);
}

static void set_run_state(struct datapath *dp, uint32_t run, enum run_state state)
{
    dp_set32(dp, &dp->arena->runs[run].state, state);
}

/* A record of a run has its persistent value; its reservation is not needed. */
void destage_settled(struct datapath *dp, uint32_t record)
{
    store_unreserve(dp->dedup, 1);
    log_release(dp, record);
}

static void failed(struct datapath *dp)
{
    dp->destage_failures++;
    dp->backoff_ns = dp->backoff_ns == 0 ? BACKOFF_FIRST_NS : dp->backoff_ns * 2;
    if (dp->backoff_ns > BACKOFF_LAST_NS)
        dp->backoff_ns = BACKOFF_LAST_NS;
    dp->retry_ns = atoll_now_ns() + dp->backoff_ns;
}

void destage_hurry(struct datapath *dp) { dp->retry_ns = 0; }

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
        store_pressed(dp->dedup) || arena->log_records * 4 > arena->nic_pages || (uint64_t)dp->merge_free_count * 4 < arena->merge_pages)
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

/* --- What is in hand, for whoever comes after a crash (I8) --- */

static void handle_none(struct datapath *dp)
{
    atoll_compiler_barrier();
    dp->arena->handled_count = 0;
    atoll_compiler_barrier();
}

static void handle(struct datapath *dp, uint32_t record)
{
    struct dp_arena *arena = dp->arena;
    assert(arena->handled_count < DP_RUN_RECORDS);
    arena->handled[arena->handled_count] = record;
    atoll_compiler_barrier();
    arena->handled_count++;
    atoll_compiler_barrier();
}

static void handle_run(struct datapath *dp, const struct dp_run *run)
{
    handle_none(dp);
    for (uint32_t index = 0; index < run->record_count; index++)
        handle(dp, run->records[index]);
}

/* Logged, and never destaged. */
static void set_aside(struct datapath *dp, uint32_t record)
{
    const struct dp_record *r = at(dp, record);
    log_set_flag(dp, record, RECORD_POISON);
    atoll_count(dp->domain, DEDUP_COUNTER_POISONED, 1);
    dp_note_damage(dp, 0, ATOLL_EPOISON, r->volume, r->lba);
}

enum taken { TAKEN = 0, TAKEN_SETTLED = 1, TAKEN_WAITS = 2 };

/* Looks at the content of a record that is off the list; zeros and blocks of volumes being deleted are settled at once. TAKEN_WAITS: the
 * pages for that are missing, it is to go back. */
static enum taken take(struct datapath *dp, uint32_t record)
{
    struct dp_record *r = at(dp, record);
    const void *page = record_page(dp, record);
    handle(dp, record);
    bool zero = print_equal(r->print, zero_print) && memcmp(page, zero_block, DP_BLOCK) == 0;
    bool settle = zero || dp->dedup->public->volumes[r->volume].state != ATOLL_VOLUME_READY;
    if (settle && store_want_base(dp->dedup, r->base) == STORE_WAIT)
        return TAKEN_WAITS;
    if (!print_equal(dp_fingerprint(page), r->print)) {
        atoll_count(dp->domain, DEDUP_COUNTER_CORRUPT_PAGES, 1);
        log_set_flag(dp, record, RECORD_CORRUPT);
        dp_set32(dp, &r->state, RECORD_LOGGED);
        dp->destage_failures++;
        return TAKEN_SETTLED;
    }
    if (!settle)
        return TAKEN;
    store_unmap(dp->dedup, r->volume, r->lba, r->base);
    destage_settled(dp, record);
    atoll_count(dp->domain, DEDUP_COUNTER_ZERO_BLOCKS, zero);
    return TAKEN_SETTLED;
}

/* What the blocks of the next batch may be equal to, and what they replace, is in memory. True as well if that has been waited for
 * often enough: matching saves space, waiting for ever costs more. */
static bool looked_up(struct datapath *dp)
{
    uint32_t records[ATOLL_IO_BLOCKS], count = 0;
    bool waits = false;
    for (uint32_t record = dp->arena->log_head; record != DP_NONE && count < ATOLL_IO_BLOCKS; record = at(dp, record)->next) {
        records[count++] = record;
        store_prefetch_candidates(dp->dedup, at(dp, record)->print);
        log_prefetch_equal(dp, at(dp, record)->print);
    }
    for (uint32_t index = 0; index < count; index++) {
        const struct dp_record *r = at(dp, records[index]);
        store_prefetch_map(dp->dedup, r->volume, r->lba);
        waits |= store_want_candidates(dp->dedup, r->print) == STORE_WAIT;
        waits |= store_want_base(dp->dedup, r->base) == STORE_WAIT;
        if (store_starved(dp->dedup))
            break;
    }
    if (waits && !store_starved(dp->dedup) && dp->lookups++ < LOOKUPS)
        return false;
    dp->lookups = 0;
    return true;
}

/* The record around which the batch goes on: one equal to what it has taken, so that it need not be read from the device later; else
 * the oldest. taken[0..*looked_after) have no equals any more. */
static uint32_t next_oldest(struct datapath *dp, const uint32_t *taken, uint32_t count, uint32_t *looked_after)
{
    for (; *looked_after < count; ++*looked_after) {
        uint32_t equal = log_equal(dp, at(dp, taken[*looked_after])->print);
        if (equal != DP_NONE)
            return equal;
    }
    return dp->arena->log_head;
}

/* Takes COLLECT_MOST records off the list, or somewhat more, for a batch that has `room`. A run of blocks is not cut but where it is
 * longer than a batch: its matches would be too. A suspect is a batch of its own. */
static uint32_t choose(struct datapath *dp, uint32_t room, uint32_t *chosen)
{
    uint32_t count = 0, looked_after = 0;
    struct log_cursor cursor = {0};
    bool alone = false;
    while (dp->arena->log_head != DP_NONE && !alone && count < COLLECT_MOST) {
        uint32_t oldest = next_oldest(dp, chosen, count, &looked_after), volume = at(dp, oldest)->volume;
        uint64_t first = at(dp, oldest)->lba, end = first + 1;
        uint32_t before[ATOLL_IO_BLOCKS], after[ATOLL_IO_BLOCKS], before_count = 0, after_count = 0, found;
        alone = (at(dp, oldest)->flags & RECORD_SUSPECT) != 0;
        if (alone && (count != 0 || room < ATOLL_IO_BLOCKS))
            break;
        while (!alone && first != 0 && 1 + before_count < ATOLL_IO_BLOCKS &&
               (found = log_find(dp, &cursor, volume, first - 1)) != DP_NONE) {
            before[before_count++] = found;
            first--;
        }
        while (!alone && 1 + before_count + after_count < ATOLL_IO_BLOCKS &&
               (found = log_find(dp, &cursor, volume, end)) != DP_NONE) {
            after[after_count++] = found;
            end++;
        }
        if (1 + before_count + after_count > room - count) {
            if (looked_after++ < count) /* an equal block's */
                continue;
            break;
        }
        uint32_t begin = count;
        while (before_count != 0)
            chosen[count++] = before[--before_count];
        chosen[count++] = oldest;
        for (uint32_t index = 0; index < after_count; index++)
            chosen[count++] = after[index];
        for (uint32_t index = begin; index < count; index++) {
            log_unlink(dp, chosen[index]);
            dp_set32(dp, &at(dp, chosen[index])->state, RECORD_MATCHING);
        }
    }
    return count;
}

/* Takes more of a batch off the list into run `number`, which is free or holds the rest of it. False: that was all. */
static bool collect(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    uint32_t chosen[ATOLL_IO_BLOCKS], taken[ATOLL_IO_BLOCKS], before = run->state == RUN_FREE ? 0 : run->record_count, count = before;
    uint32_t chosen_count = choose(dp, ATOLL_IO_BLOCKS - before, chosen);
    uint64_t lowest = before == 0 ? UINT64_MAX : run->min_order;
    bool full = false, alone = chosen_count == 1 && (at(dp, chosen[0])->flags & RECORD_SUSPECT);
    memcpy(taken, run->records, before * sizeof taken[0]);
    for (uint32_t index = 0; index < chosen_count; index++) {
        uint32_t record = chosen[index];
        if (index + 1 < chosen_count)
            dp_prefetch(record_page(dp, chosen[index + 1]));
        enum taken taken_so = full ? TAKEN_WAITS : take(dp, record);
        full = full || taken_so == TAKEN_WAITS || dp->journal->count >= 2 * DP_STEP_JOURNAL;
        if (taken_so == TAKEN_WAITS)
            log_requeue(dp, record);
        if (taken_so != TAKEN)
            continue;
        lowest = at(dp, record)->order < lowest ? at(dp, record)->order : lowest;
        taken[count++] = record;
    }
    if (count == before)
        return false;
    qsort_r(taken, count, sizeof taken[0], by_address, dp);
    destage_save_run(dp, run, count);
    memcpy(run->records, taken, count * sizeof taken[0]);
    for (uint32_t index = 0; index < count; index++)
        run->link[index] = DP_NONE;
    run->state = RUN_MATCHING;
    run->status = ATOLL_OK;
    run->pba = 0;
    run->writer_count = 0;
    run->record_count = count;
    run->min_order = lowest;
    return !full && !alone && count < ATOLL_IO_BLOCKS;
}

/* --- 2 match, 3 share: datapath_match.c ------------------------------------------------------------------------------------ */

static bool match_loaded(struct datapath *dp, uint32_t number)
{
    const struct dp_run *run = &dp->arena->runs[number];
    uint32_t *index = &dp->run_loaded[number]; /* a page that is pinned is read once */
    while (*index < run->record_count &&
           (run->link[*index] >= DP_UNREAD || dp->pages[run->link[*index]].state != PAGE_LOADING))
        ++*index;
    return *index == run->record_count;
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

/* The pages that sharing the batch's candidates changes are there. Those for which no room can be had are given up. */
static bool share_ready(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    bool waits = false;
    for (uint32_t index = 0; index < run->record_count; index++) {
        if (run->link[index] >= DP_UNREAD)
            continue;
        uint64_t pba = dp->pages[run->link[index]].pba;
        enum store_want want = store_want_blocks(dp->dedup, &pba, 1), base = store_want_base(dp->dedup, at(dp, run->records[index])->base);
        if (want == STORE_HAVE && base != STORE_WAIT)
            continue;
        if (want != STORE_LOST && !store_starved(dp->dedup)) {
            waits = true;
            continue;
        }
        cache_unpin(dp, run->link[index]);
        dp_set32(dp, &run->link[index], DP_NONE);
        dp->run_pages[number]--;
        atoll_count(dp->domain, DEDUP_COUNTER_MATCH_SKIPPED, 1);
    }
    return !waits;
}

/* All candidates of a batch are there: shares what is equal and writes the rest. False: not now. */
static bool go_on(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    struct match_decision decision;
    uint64_t lowest = UINT64_MAX, pba = 0;
    if (!store_has_room(dp->dedup, run->record_count) || io_room(dp->dedup, IO_DESTAGE) == 0 || !share_ready(dp, number) ||
        store_want_space(dp->dedup) != STORE_HAVE)
        return false;
    handle_run(dp, run);
    match_decide(dp, number, &decision);
    uint32_t writer_count = decision.writer_count;
    uint32_t placed = writer_count == 0 ? 0 : store_allocate(dp->dedup, writer_count, &pba);
    if (placed == 0 && writer_count != 0) {
        uint32_t status;
        dp->space_ticket = store_sync(dp->dedup);
        dp->space_failures = store_sync_failures(dp->dedup, &status);
    }
    for (uint32_t index = placed; index < writer_count; index++)
        log_requeue(dp, decision.writers[index]);
    uint32_t total = placed + match_trim(dp, &decision, pba, placed);
    if (placed == 0) {
        set_run_state(dp, number, RUN_FREE);
        return true;
    }
    destage_save_run(dp, run, total);
    for (uint32_t index = 0; index < placed; index++) {
        cache_prefetch(dp, pba + index);
        destage_prefetch_inflight(dp, at(dp, decision.writers[index])->print);
    }
    for (uint32_t index = 0; index < total; index++) {
        uint32_t record = index < placed ? decision.writers[index] : decision.followers[index - placed];
        run->records[index] = record;
        run->link[index] = index < placed ? DP_NONE : decision.leaders[index - placed];
        lowest = at(dp, record)->order < lowest ? at(dp, record)->order : lowest;
        if (index < placed) {
            dp_set32(dp, &at(dp, record)->state, RECORD_WRITING);
            cache_drop(dp, pba + index);
            tier_drop(dp, pba + index); /* freed places have left; a table read from the device may have named this one */
        }
    }
    run->state = RUN_WRITING;
    run->pba = pba;
    run->writer_count = placed;
    run->record_count = total;
    run->done = 0;
    run->min_order = lowest;
    for (uint32_t index = 0; index < placed; index++)
        inflight_add(dp, number, index);
    submit_run(dp, number);
    for (uint32_t index = 0; index < placed; index++) { /* what placing them will need, ahead of time */
        uint64_t place = pba + index;
        if (index == 0 || place % 256 == 0) /* the next page of fingerprints */
            store_want_prints(dp->dedup, &place, 1);
        store_want_base(dp->dedup, at(dp, run->records[index])->base);
    }
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

/* True if one more record can be finished in this step. */
static bool finish_ready(struct datapath *dp, uint32_t record, uint64_t pba, enum store_want *place)
{
    *place = store_want_blocks(dp->dedup, &pba, 1);
    if (*place == STORE_WAIT || dp->journal->count >= 2 * DP_STEP_JOURNAL || !store_has_room(dp->dedup, 1))
        return false;
    return store_want_base(dp->dedup, at(dp, record)->base) != STORE_WAIT;
}

/* A record that has been written. It stays until the followers have compared themselves with its page: DROPPED says that
 * the map does not name it any more, its link that its place is its own no more. */
static void finish_writer(struct datapath *dp, struct dp_run *run, uint32_t index, bool place_lost)
{
    uint32_t record = run->records[index];
    struct dp_record *r = at(dp, record);
    if (r->state == RECORD_DROPPED) {
        store_abandon(dp->dedup, run->pba + index, 1, false);
        store_unreserve(dp->dedup, 1); /* who overwrote it has a reservation of its own */
    } else if (r->flags & RECORD_CONDEMNED) {
        store_abandon(dp->dedup, run->pba + index, 1, place_lost);
        return; /* set aside when the run ends */
    } else if (run->status != ATOLL_OK || place_lost) { /* the page of its place's fingerprint is damaged: another place */
        store_abandon(dp->dedup, run->pba + index, 1, place_lost);
        if (!place_lost)
            log_set_flag(dp, record, RECORD_FAILED);
        atoll_count(dp->domain, DEDUP_COUNTER_DESTAGE_ERRORS, 1);
        return; /* it goes back to the list when the run ends */
    } else {
        store_place(dp->dedup, r->volume, r->lba, r->base, run->pba + index, r->print);
        tier_consider(dp, r->volume, run->pba + index);
        dp_set32(dp, &r->state, RECORD_DROPPED);
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
        set_aside(dp, record);
        return;
    }
    /* Placed leaders have a reference already; a leader that was overwritten is abandoned. */
    if (run->status == ATOLL_OK && store_references(dp->dedup, run->pba + leader_index) != 0 &&
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
    uint32_t end = from + FINISH_AHEAD < run->record_count ? from + FINISH_AHEAD : run->record_count;
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
static bool finish_run(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    uint32_t writers = run->writer_count, done = run->done, end = run->record_count;
    if (dp->flush_count == 0 && end - done > FINISH_MOST)
        end = done + FINISH_MOST;
    ATOLL_CRASH_POINT(dp->domain, "dedup.destage.finish");
    for (; done < end; done++) {
        uint32_t record = run->records[done], leader = done < writers ? done : run->link[done];
        enum store_want place;
        if ((done - run->done) % FINISH_AHEAD == 0)
            finish_prefetch(dp, run, done);
        if (!finish_ready(dp, record, run->pba + leader, &place))
            break;
        handle_none(dp);
        handle(dp, record);
        if (done < writers) {
            inflight_remove(dp, number, done);
            finish_writer(dp, run, done, place == STORE_LOST);
        } else {
            finish_follower(dp, run, record, leader);
        }
    }
    handle_none(dp);
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
                set_aside(dp, run->records[index]);
            else
                errors++;
        }
    }
    set_run_state(dp, number, RUN_FREE);
    if (errors != 0)
        failed(dp);
    else if (run->status == ATOLL_OK)
        dp->backoff_ns = dp->retry_ns = 0;
    dp->retry = true;
    return true;
}

/* --- The step ------------------------------------------------------------------------------------------------------------------ */

static uint32_t free_run(const struct datapath *dp)
{
    for (uint32_t run = 0; run < DP_RUNS; run++)
        if (dp->arena->runs[run].state == RUN_FREE)
            return run;
    return DP_RUNS;
}

/* True if one more batch finds pages for its candidates in the half of the cache that batches may pin, or is the only one. */
static bool pages_left(const struct datapath *dp)
{
    uint32_t pinned = 0;
    for (uint32_t number = 0; number < DP_RUNS; number++)
        pinned += dp->arena->runs[number].state == RUN_MATCHING ? dp->run_pages[number] : 0;
    return pinned == 0 || 2 * (pinned + ATOLL_IO_BLOCKS) <= dp->pools[POOL_DISK].count;
}

/* What is written can be followed no more: it is finished first, so that those who go on find it stored. */
static bool finish_one(struct datapath *dp)
{
    bool did = false, urgent = true;
    for (uint32_t number = 0; number < DP_RUNS && !did; number++) {
        if (dp->arena->runs[number].state != RUN_WRITTEN)
            continue;
        store_urgent(dp->dedup, urgent); /* the first of them */
        urgent = false;
        did = finish_run(dp, number); /* without room a sync is under way and will wake */
    }
    store_urgent(dp->dedup, false);
    return did;
}

/* True if a batch has its candidates, and their pages are there. */
static bool may_go_on(struct datapath *dp, uint32_t number)
{
    return dp->arena->runs[number].state == RUN_MATCHING && !(dp->unmatched >> number & 1) && match_loaded(dp, number);
}

static bool go_on_one(struct datapath *dp)
{
    bool did = false, urgent = true;
    for (uint32_t number = 0; number < DP_RUNS && !did; number++) {
        if (!may_go_on(dp, number))
            continue;
        store_urgent(dp->dedup, urgent);
        urgent = false;
        did = go_on(dp, number);
    }
    store_urgent(dp->dedup, false);
    return did;
}

/* Places of equal blocks for a batch that was collected in the step before. */
static bool match_one(struct datapath *dp)
{
    if (dp->unmatched == 0 || dp->collecting != DP_RUNS)
        return false;
    uint32_t number = (uint32_t)__builtin_ctzll(dp->unmatched);
    dp->unmatched &= dp->unmatched - 1;
    handle_run(dp, &dp->arena->runs[number]);
    match_stored(dp, number);
    count_pages(dp, number);
    dp->newest_run = number;
    dp->waiting_runs = dp->waiting_runs || may_go_on(dp, number);
    return true;
}

/* A batch is collected piece by piece, then matched. */
static bool collect_one(struct datapath *dp, uint64_t *wake_ms)
{
    uint32_t number = dp->collecting;
    if (number == DP_RUNS) {
        number = dp->arena->log_head == DP_NONE ? DP_RUNS : free_run(dp);
        if (number == DP_RUNS || !wanted(dp, atoll_now_ns(), wake_ms))
            return false;
        if (!store_has_room(dp->dedup, ATOLL_IO_BLOCKS) || io_room(dp->dedup, IO_DESTAGE) < ATOLL_IO_BLOCKS || !pages_left(dp)) {
            *wake_ms = 5; /* without I/O slots and pages to read candidates, equal blocks would be stored again; readers need some, too */
            return false;
        }
        if (!looked_up(dp)) {
            *wake_ms = 5; /* or as soon as a page has been read */
            return false;
        }
    }
    handle_none(dp);
    bool more = collect(dp, number);
    dp->collecting = DP_RUNS;
    if (dp->arena->runs[number].state == RUN_MATCHING) {
        dp->unmatched |= (uint64_t)1 << number;
        count_pages(dp, number);
        if (more)
            dp->collecting = number;
    }
    return true;
}

/* Whether the requests of clients come first for a moment: as long as the last piece of work took, unless somebody waits for destage,
 * or soon will. */
static bool gives_way(const struct datapath *dp, uint64_t now_ns)
{
    const struct dp_arena *arena = dp->arena;
    return dp->shared && dp->asked && now_ns < dp->resume_ns && dp->flush_count == 0 && dp->retry_count == 0 && !dp->drain &&
           arena->log_records * 2 < arena->nic_pages;
}

void destage_step_over(struct datapath *dp)
{
    if (dp->piece_ns == 0)
        return;
    uint64_t now = atoll_now_ns(), took = now - dp->piece_ns;
    dp->resume_ns = now + (took < GIVE_WAY_NS ? took : GIVE_WAY_NS);
    dp->piece_ns = 0;
}

/* One of the things that a batch goes through; true if there was one to be done. */
static bool piece(struct datapath *dp, uint64_t *wake_ms)
{
    bool did = finish_one(dp);
    /* Those that lack room or I/O slots are tried each step; those that are loading, when something was loaded. */
    if (!did && (dp->loaded || dp->waiting_runs)) {
        dp->loaded = false;
        did = go_on_one(dp);
    }
    dp->waiting_runs = false;
    uint32_t active = 0;
    for (uint32_t number = 0; number < DP_RUNS; number++) {
        active += dp->arena->runs[number].state == RUN_WRITTEN;
        dp->waiting_runs = dp->waiting_runs || may_go_on(dp, number);
    }
    if ((active != 0 || dp->waiting_runs) && *wake_ms == 0)
        *wake_ms = 5;
    uint64_t wake = 0;
    did = did || match_one(dp) || collect_one(dp, &wake);
    handle_none(dp);
    dp->retry = dp->retry || did;
    if (wake != 0 && (*wake_ms == 0 || wake < *wake_ms))
        *wake_ms = wake;
    return did;
}

bool destage_step(struct datapath *dp, uint64_t *wake_ms)
{
    uint64_t now = atoll_now_ns();
    bool did;
    if (dp->space_ticket != 0) {
        uint32_t status;
        if (store_synced(dp->dedup) >= dp->space_ticket) {
            dp->space_ticket = 0;
        } else if (store_sync_failures(dp->dedup, &status) != dp->space_failures) {
            dp->space_ticket = 0;
            failed(dp);
        }
    }
    if (gives_way(dp, now)) {
        *wake_ms = 1;
        return false;
    }
    did = piece(dp, wake_ms);
    for (uint32_t more = 1; did && !dp->shared && more < STEP_PIECES && dp->journal->count < DP_STEP_JOURNAL; more++)
        if (!piece(dp, wake_ms))
            break;
    if (did)
        dp->piece_ns = now;
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
            bool writer = run->state >= RUN_WRITING && index < run->writer_count;
            bool dropped = at(dp, record)->state == RECORD_DROPPED;
            if (run->state >= RUN_WRITING && !writer && index < run->done)
                continue; /* a follower that has been finished */
            if (writer && index >= run->done) {
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
        datapath_commit(dp);
    }
}

static bool in_hand(const struct datapath *dp, const struct dp_run *run)
{
    for (uint32_t index = 0; index < run->record_count; index++)
        for (uint32_t each = 0; each < dp->arena->handled_count; each++)
            if (run->records[index] == dp->arena->handled[each])
                return true;
    return false;
}

void destage_blame(struct datapath *dp)
{
    struct dp_arena *arena = dp->arena;
    uint32_t count = arena->handled_count;
    for (uint32_t number = 0; number < DP_RUNS && count != 0; number++) {
        const struct dp_run *run = &arena->runs[number];
        if (run->state != RUN_MATCHING || !in_hand(dp, run))
            continue;
        for (uint32_t index = 0; index < run->record_count; index++) { /* each is collected again, by itself */
            uint32_t record = run->records[index];
            if (run->link[index] < DP_UNREAD)
                cache_unpin(dp, run->link[index]);
            if (at(dp, record)->state == RECORD_DROPPED)
                log_release(dp, record);
            else
                log_requeue(dp, record);
        }
        set_run_state(dp, number, RUN_FREE);
        datapath_commit(dp);
    }
    for (uint32_t index = 0; index < count; index++) {
        uint32_t record = arena->handled[index];
        const struct dp_record *r = at(dp, record);
        bool poison = count == 1 && (r->flags & RECORD_SUSPECT);
        if (r->state < RECORD_LOGGED || r->state > RECORD_WRITING || (r->flags & RECORD_ASIDE))
            continue;
        if (poison && r->state == RECORD_LOGGED)
            set_aside(dp, record);
        else
            log_set_flag(dp, record, poison ? RECORD_CONDEMNED : RECORD_SUSPECT);
    }
    datapath_commit(dp);
    handle_none(dp);
}
