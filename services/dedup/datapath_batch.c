/*
 * A batch of destage until it is written: 1 collect and 4 write of datapath_destage.c, and what is in hand meanwhile.
 *
 * After a crash: see datapath_destage.c; `handled` says which records the dead process had in hand.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "ipc/crashpoint.h"
#include "services/dedup/datapath_batch.h"

/* Steps that wait for the pages that say what may be equal to a batch. */
#define LOOKUPS 64
/* Records ahead in the list whose cache lines are asked for. */
#define LIST_AHEAD 8

static struct fingerprint zero_print;
static const uint8_t zero_block[DP_BLOCK];

static struct dp_record *at(struct datapath *dp, uint32_t record) { return &dp->records[record]; }

void batch_attach(void) { zero_print = dp_fingerprint(zero_block); }

/* --- What is in hand, for whoever comes after a crash (I8) ---------------------------------------------------------- */

void batch_handle_none(struct datapath *dp)
{
    atoll_compiler_barrier();
    dp->arena->handled_count = 0;
    atoll_compiler_barrier();
}

void batch_handle(struct datapath *dp, uint32_t record)
{
    struct dp_arena *arena = dp->arena;
    assert(arena->handled_count < DP_RUN_RECORDS);
    arena->handled[arena->handled_count] = record;
    atoll_compiler_barrier();
    arena->handled_count++;
    atoll_compiler_barrier();
}

void batch_handle_all(struct datapath *dp, const uint32_t *records, uint32_t count)
{
    batch_handle_none(dp);
    for (uint32_t index = 0; index < count; index++)
        batch_handle(dp, records[index]);
}

/* Logged, and never destaged. */
void batch_set_aside(struct datapath *dp, uint32_t record)
{
    const struct dp_record *r = at(dp, record);
    log_set_flag(dp, record, RECORD_POISON);
    atoll_count(dp->domain, DEDUP_COUNTER_POISONED, 1);
    dp_note_damage(dp, 0, ATOLL_EPOISON, r->volume, r->lba);
}

/* --- 1 collect ------------------------------------------------------------------------------------------------------ */

static int by_address(const void *a, const void *b, void *context)
{
    const struct datapath *dp = context;
    const struct dp_record *x = &dp->records[*(const uint32_t *)a], *y = &dp->records[*(const uint32_t *)b];
    if (x->volume != y->volume)
        return x->volume < y->volume ? -1 : 1;
    return x->lba < y->lba ? -1 : x->lba > y->lba;
}

enum taken { TAKEN = 0, TAKEN_SETTLED = 1, TAKEN_WAITS = 2 };

bool batch_intact(struct datapath *dp, uint32_t record)
{
    struct dp_record *r = at(dp, record);
    if (print_equal(dp_fingerprint(record_page(dp, record)), r->print))
        return true;
    atoll_count(dp->domain, DEDUP_COUNTER_CORRUPT_PAGES, 1);
    log_set_flag(dp, record, RECORD_CORRUPT);
    dp_set32(dp, &r->state, RECORD_LOGGED);
    dp->destage_failures++;
    return false;
}

/* Looks at a record that is off the list, with `check` at its content, too; zeros and blocks of volumes being deleted are settled at once.
 * TAKEN_WAITS: the pages for that are missing, it is to go back. */
static enum taken take(struct datapath *dp, uint32_t record, bool check)
{
    const struct dp_record *r = at(dp, record);
    batch_handle(dp, record);
    bool zero = print_equal(r->print, zero_print) && memcmp(record_page(dp, record), zero_block, DP_BLOCK) == 0;
    bool settle = zero || dp->dedup->public->volumes[r->volume].state != ATOLL_VOLUME_READY;
    if (settle && store_want_base(dp->dedup, r->base) == STORE_WAIT)
        return TAKEN_WAITS;
    if (check && !batch_intact(dp, record))
        return TAKEN_SETTLED;
    if (!settle)
        return TAKEN;
    store_unmap(dp->dedup, r->volume, r->lba, r->base);
    destage_settled(dp, record);
    atoll_count(dp->domain, DEDUP_COUNTER_ZERO_BLOCKS, zero);
    return TAKEN_SETTLED;
}

/* Waited for often enough: matching saves space, waiting for ever costs more. */
enum batch_looked batch_look_up(struct datapath *dp)
{
    uint32_t records[ATOLL_IO_BLOCKS], count = 0, record = dp->arena->log_head, piece = batch_piece(dp);
    for (uint32_t skipped = 0; record != DP_NONE && skipped < dp->looked; skipped++)
        record = at(dp, record)->next;
    for (; record != DP_NONE && count < piece; record = at(dp, record)->next) {
        records[count++] = record;
        if (record + LIST_AHEAD < dp->record_count) /* where it is likely to go on: a large write's records stand in sequence */
            __builtin_prefetch(at(dp, record + LIST_AHEAD));
        store_prefetch_candidates(dp->dedup, at(dp, record)->print);
        log_prefetch_equal(dp, at(dp, record)->print);
    }
    for (uint32_t index = 0; index < count; index++) {
        const struct dp_record *r = at(dp, records[index]);
        store_prefetch_map(dp->dedup, r->volume, r->lba);
        dp->look_waits |= store_want_candidates(dp->dedup, r->print) == STORE_WAIT;
        dp->look_waits |= store_want_base(dp->dedup, r->base) == STORE_WAIT;
        if (store_starved(dp->dedup))
            break;
    }
    dp->looked += count;
    if (record != DP_NONE && dp->looked < dp->batch_blocks && !store_starved(dp->dedup))
        return LOOKED_ON;
    bool waits = dp->look_waits && !store_starved(dp->dedup) && dp->lookups++ < LOOKUPS;
    dp->looked = 0;
    dp->look_waits = false;
    if (waits)
        return LOOKED_WAITS;
    dp->lookups = 0;
    return LOOKED_UP;
}

/* The record around which the batch goes on: one equal to what it has taken, so that it need not be read from the device later; else
 * the oldest, or none at the end of a piece. taken[0..*looked_after) have no equals any more. */
static uint32_t next_oldest(struct datapath *dp, const uint32_t *taken, uint32_t count, uint32_t *looked_after)
{
    for (; *looked_after < count; ++*looked_after) {
        uint32_t equal = log_equal(dp, at(dp, taken[*looked_after])->print);
        if (equal != DP_NONE)
            return equal;
    }
    return count < batch_piece(dp) ? dp->arena->log_head : DP_NONE;
}

/* Takes a piece of records off the list, or somewhat more, for a batch that has `room`. A run of blocks is not cut but where it is
 * longer than a batch: its matches would be too. A suspect is a batch of its own. */
static uint32_t choose(struct datapath *dp, uint32_t room, uint32_t *chosen)
{
    uint32_t count = 0, looked_after = 0;
    struct log_cursor cursor = {0};
    bool alone = false;
    for (uint32_t oldest; !alone && (oldest = next_oldest(dp, chosen, count, &looked_after)) != DP_NONE;) {
        uint32_t volume = at(dp, oldest)->volume;
        uint64_t first = at(dp, oldest)->lba, end = first + 1;
        uint32_t before[ATOLL_IO_BLOCKS], after[ATOLL_IO_BLOCKS], before_count = 0, after_count = 0, found;
        alone = (at(dp, oldest)->flags & RECORD_SUSPECT) != 0;
        if (alone && (count != 0 || room < dp->batch_blocks))
            break;
        while (!alone && first != 0 && 1 + before_count < dp->batch_blocks &&
               (found = log_find(dp, &cursor, volume, first - 1)) != DP_NONE) {
            before[before_count++] = found;
            first--;
        }
        while (!alone && 1 + before_count + after_count < dp->batch_blocks &&
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

/* Puts `more` records among records[0..count), which are in order. */
static void sort_in(struct datapath *dp, uint32_t *records, uint32_t count, uint32_t *added, uint32_t more)
{
    qsort_r(added, more, sizeof added[0], by_address, dp);
    while (more != 0) {
        bool before = count != 0 && by_address(&records[count - 1], &added[more - 1], dp) > 0;
        records[count + more - 1] = before ? records[count - 1] : added[more - 1];
        count -= before;
        more -= !before;
    }
}

/* Takes more of a batch off the list into run `number`, which is free or holds the rest of it. False: that was all. */
bool batch_collect(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    uint32_t chosen[ATOLL_IO_BLOCKS], taken[ATOLL_IO_BLOCKS], before = run->state == RUN_FREE ? 0 : run->record_count, count = 0;
    log_know_equals(dp);
    uint32_t chosen_count = choose(dp, dp->batch_blocks - before, chosen);
    uint64_t lowest = before == 0 ? UINT64_MAX : run->min_order;
    bool check = dp->shared; /* else when it is written: the piece that this makes larger holds nobody up */
    bool full = false, alone = chosen_count == 1 && (at(dp, chosen[0])->flags & RECORD_SUSPECT);
    for (uint32_t index = 0; index < chosen_count; index++) {
        uint32_t record = chosen[index];
        if (check && index + 1 < chosen_count)
            dp_prefetch(record_page(dp, chosen[index + 1]));
        enum taken taken_so = full ? TAKEN_WAITS : take(dp, record, check);
        full = full || taken_so == TAKEN_WAITS || dp->journal->count >= 2 * DP_STEP_JOURNAL;
        if (taken_so == TAKEN_WAITS)
            log_requeue(dp, record);
        if (taken_so != TAKEN)
            continue;
        lowest = at(dp, record)->order < lowest ? at(dp, record)->order : lowest;
        taken[count++] = record;
    }
    if (count == 0)
        return false;
    destage_save_run(dp, run, before);
    sort_in(dp, run->records, before, taken, count);
    for (uint32_t index = before; index < before + count; index++)
        run->link[index] = DP_NONE;
    batch_enter_state(dp, number, RUN_MATCHING);
    run->status = ATOLL_OK;
    run->pba = 0;
    run->writer_count = 0;
    run->record_count = before + count;
    run->min_order = lowest;
    if (!check)
        dp->checked &= ~((uint64_t)1 << number);
    else if (before == 0)
        dp->checked |= (uint64_t)1 << number;
    return !full && !alone && run->record_count < dp->batch_blocks && dp->arena->log_head != DP_NONE;
}

/* --- 2 match, 3 share: datapath_match.c ----------------------------------------------------------------------------- */

void batch_count_pages(struct datapath *dp, uint32_t number)
{
    const struct dp_run *run = &dp->arena->runs[number];
    dp->run_pages[number] = dp->run_loaded[number] = 0;
    for (uint32_t index = 0; index < run->record_count; index++)
        dp->run_pages[number] += run->link[index] < DP_UNREAD;
}

bool batch_loaded(struct datapath *dp, uint32_t number)
{
    const struct dp_run *run = &dp->arena->runs[number];
    uint32_t *index = &dp->run_loaded[number]; /* a page that is pinned is read once */
    while (*index < run->record_count &&
           (run->link[*index] >= DP_UNREAD || dp->pages[run->link[*index]].state != PAGE_LOADING))
        ++*index;
    return *index == run->record_count;
}

/* --- 4 write -------------------------------------------------------------------------------------------------------- */

/* Returns the identity of its write. */
static uint64_t submit_run(struct datapath *dp, uint32_t number)
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
    return io_identity(dp->dedup->io, slot);
}

/* All that flushes wait for, and all that is under way, is this batch: then what the store will note of it can be written with it. */
static void note_ahead(struct datapath *dp, uint32_t number, uint64_t write)
{
    const struct dp_run *run = &dp->arena->runs[number];
    struct store_placing placings[ATOLL_IO_BLOCKS];
    uint32_t head = dp->arena->log_head;
    if (dp->flush_count == 0 || run->record_count != run->writer_count || (head != DP_NONE && at(dp, head)->order <= dp->flush_target) ||
        (dp->runs_in[RUN_MATCHING] | dp->runs_in[RUN_WRITING] | dp->runs_in[RUN_WRITTEN]) != (uint64_t)1 << number)
        return;
    for (uint32_t index = 0; index < run->writer_count; index++) {
        const struct dp_record *r = at(dp, run->records[index]);
        if (store_want_base(dp->dedup, r->base) != STORE_HAVE)
            return;
        placings[index] = (struct store_placing){r->volume, r->lba, r->base, run->pba + index, r->print};
    }
    store_place_ahead(dp->dedup, placings, run->writer_count, write);
}

/* The pages that sharing the candidates of records [first, end) changes are there. Those for which no room can be had are given up. */
static bool share_ready(struct datapath *dp, uint32_t number, uint32_t first, uint32_t end)
{
    struct dp_run *run = &dp->arena->runs[number];
    bool waits = false;
    for (uint32_t index = first; index < end; index++) {
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
        dp_set32(dp, &run->link[index], DP_UNREAD); /* no second choice: that would have it chosen again */
        dp->run_pages[number]--;
        atoll_count(dp->domain, DEDUP_COUNTER_MATCH_SKIPPED, 1);
    }
    return !waits;
}

/* What is left of a batch is written. */
static void write_rest(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    struct match_decision decision;
    uint64_t lowest = UINT64_MAX, pba = 0;
    match_decide(dp, number, &decision);
    uint32_t writer_count = decision.writer_count;
    uint32_t placed = writer_count == 0 ? 0 : store_allocate(dp->dedup, writer_count, &pba);
    bool lost = placed == 0 && writer_count != 0 && store_exhausted(dp->dedup); /* what was promised them is not there any more (I7) */
    if (lost) {
        destage_failed(dp);
        atoll_count(dp->domain, DEDUP_COUNTER_DESTAGE_ERRORS, writer_count);
    } else if (placed == 0 && writer_count != 0) {
        uint32_t status;
        dp->space_ticket = store_sync(dp->dedup);
        dp->space_failures = store_sync_failures(dp->dedup, &status);
    }
    for (uint32_t index = placed; index < writer_count; index++) {
        if (lost)
            log_set_flag(dp, decision.writers[index], RECORD_FAILED);
        log_requeue(dp, decision.writers[index]);
    }
    uint32_t total = placed + match_trim(dp, &decision, pba, placed);
    if (placed == 0) {
        batch_set_state(dp, number, RUN_FREE);
        return;
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
    batch_enter_state(dp, number, RUN_WRITING);
    run->pba = pba;
    run->writer_count = placed;
    run->record_count = total;
    run->done = 0;
    run->min_order = lowest;
    for (uint32_t index = 0; index < placed; index++)
        inflight_add(dp, number, index);
    uint64_t write = submit_run(dp, number);
    for (uint32_t index = 0; index < placed; index++) { /* what placing them will need, ahead of time */
        uint64_t place = pba + index;
        if (index == 0 || place % 256 == 0) /* the next page of fingerprints */
            store_want_prints(dp->dedup, &place, 1);
        store_want_base(dp->dedup, at(dp, run->records[index])->base);
    }
    note_ahead(dp, number, write);
}

bool batch_go_on(struct datapath *dp, uint32_t number)
{
    struct dp_run *run = &dp->arena->runs[number];
    if (dp->deciding != number)
        dp->decided = 0;
    uint32_t first = dp->decided, end = first;
    while (end < run->record_count && end - first < batch_piece(dp))
        end = match_run_end(dp, run, end);
    if (!store_has_room(dp->dedup, run->record_count) || io_room(dp->dedup, IO_DESTAGE) == 0 || !share_ready(dp, number, first, end) ||
        store_want_space(dp->dedup) != STORE_HAVE)
        return false;
    batch_handle_all(dp, run->records + first, end - first);
    dp->deciding = number;
    if (first != end) {
        dp->decided += match_share(dp, number, first, end);
        batch_count_pages(dp, number);
        ATOLL_CRASH_POINT(dp->domain, "dedup.destage.share");
        bool whole = first == 0 && dp->decided == run->record_count; /* a batch of one piece */
        if (run->record_count != 0 && !whole)
            return true;
    }
    batch_handle_all(dp, run->records, run->record_count);
    write_rest(dp, number);
    dp->deciding = DP_RUNS;
    return true;
}
