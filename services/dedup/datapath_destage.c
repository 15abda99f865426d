/*
 * Destage: logged blocks find their place on the device, in batches.
 *
 *   1 collect   whole runs of consecutive blocks around the oldest logged ones and around those equal to them, up to ATOLL_IO_BLOCKS
 *               records, sorted by (volume, lba); each is checked against its fingerprint, here or, where no other piece of work waits
 *               for this one, in 4: then what was shared in 3 need not be; zeros take no space
 *   2 match     stored blocks of equal content, as the volume's run threshold allows, are read (datapath_match.c)
 *   3 share     they are compared byte by byte and shared; equal blocks of the batch, or of a run being
 *               written, follow these
 *   4 write     the rest goes to a run of free places in one gather write
 *   5 finish    completed writes are placed, followers share them, what was overwritten meanwhile is abandoned
 *
 * 1 and 4 are in datapath_batch.c, 5 in datapath_finish.c; here is what is done when.
 *
 * In pieces: where dedup shares a processor with the rest of the data path a step does one of these things to some records of one
 * batch (batch_piece), and while clients ask for something the next ones follow when they have had as much time as the last ones
 * took; so a request waits for a few of them, not for all. What one piece has shared is committed. One batch at a time is being shared,
 * so that what is left of it has no equal that was written meanwhile.
 *
 * When: a record is old enough, a flush waits, so much is logged that it leaves the processor's cache, or that who flushes often would
 * wait for it, or a quarter of the pages (or less, where nothing comes of waiting), or someone asks for all (drain).
 * A failed write leaves its records logged; after a back-off, or when a flush is asked, they go to another place. While one is
 * unplaced, flushes fail (I7).
 *
 * After a crash: runs lie in the arena with their places; writes under way complete to the successor, which finishes
 * them. Private are the hash of what is being written, which is made again, and how far a batch had been collected, matched and
 * shared: it goes on to be shared as it is.
 */
#include <stdlib.h>

#include "services/dedup/datapath_batch.h"

#define BACKOFF_FIRST_NS 100000000u
#define BACKOFF_LAST_NS 5000000000u
/* Pieces of one step where nobody else is held up by it. */
#define STEP_PIECES 16
/* Batches of full size that the cache has room for; with less than that they are half as large, so that there can be several. */
#define BATCH_OF_CACHE 16
/* Clients come first for no longer than this after a piece of work. */
#define GIVE_WAY_NS 500000
/* The part of nic's pages that may be logged before destage begins; and where waiting brings nothing: enough for three batches. */
#define LOGGED_PART 4
#define LOGGED_PART_EAGER 64
/* Of small requests: 4 MiB, and what is under way. So much stays in the processor's last cache until it is looked at again, and the pages
 * that come back from it are still there when nic receives into them. */
#define LOGGED_WARM 1024
/* Where more is logged, clients are faster than destage: it gets its time first, and no more is taken from them than leaves the log meanwhile
 * (dedup.c). A longer log would be in no cache, which costs both of them more than the wait. */
#define LOGGED_CROWDED (2 * LOGGED_WARM)
/* Pieces of one step there, while nobody waits for an answer: each step gives the processor to the others once. */
#define STEP_PIECES_CROWDED 3
/* Unless a log of full length spares this part of the writes. */
#define OVERWRITTEN_PART 4

_Static_assert(DP_RUNS <= 64, "a bit for each in `unmatched`");

static struct dp_record *at(struct datapath *dp, uint32_t record) { return &dp->records[record]; }

void destage_attach(struct datapath *dp)
{
    dp->collecting = dp->deciding = DP_RUNS;
    dp->batch_blocks = dp->pools[POOL_DISK].count >= BATCH_OF_CACHE * ATOLL_IO_BLOCKS ? ATOLL_IO_BLOCKS : ATOLL_IO_BLOCKS / 2;
    batch_attach();
    inflight_clear(dp);
    for (uint32_t run = 0; run < DP_RUNS; run++)
        dp->runs_in[dp->arena->runs[run].state] |= (uint64_t)1 << run;
    for (uint32_t run = 0; run < DP_RUNS; run++)
        if (dp->arena->runs[run].state == RUN_MATCHING)
            batch_count_pages(dp, run);
        else if (dp->arena->runs[run].state >= RUN_WRITING)
            for (uint32_t index = dp->arena->runs[run].done; index < dp->arena->runs[run].writer_count; index++)
                inflight_add(dp, run, index);
}

void destage_configure(struct datapath *dp, uint64_t delay_ms)
{
    dp->destage_delay_ms = delay_ms;
    dp->reuse = reuse_open(LOGGED_WARM, dp->arena->nic_pages / LOGGED_PART, delay_ms);
    if (dp->reuse == 0)
        abort(); /* 48 KiB at the start of a process */
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

void batch_enter_state(struct datapath *dp, uint32_t run, enum run_state state)
{
    uint64_t bit = (uint64_t)1 << run;
    dp->runs_in[dp->arena->runs[run].state] &= ~bit;
    dp->runs_in[state] |= bit;
    dp->runs_left |= state == RUN_FREE ? bit : 0;
    dp->arena->runs[run].state = state;
}

void batch_set_state(struct datapath *dp, uint32_t run, enum run_state state)
{
    atoll_journal_push(dp->journal, (uintptr_t)&dp->arena->runs[run].state | 1, dp->arena->runs[run].state);
    batch_enter_state(dp, run, state);
}

/* A record of a run has its persistent value; its reservation is not needed. */
void destage_settled(struct datapath *dp, uint32_t record)
{
    store_unreserve(dp->dedup, 1);
    log_release(dp, record);
    dp_note_leaving(dp, true);
    dp->shorter_ms = dp->now_ms;
}

void destage_failed(struct datapath *dp)
{
    dp->destage_failures++;
    dp->backoff_ns = dp->backoff_ns == 0 ? BACKOFF_FIRST_NS : dp->backoff_ns * 2;
    if (dp->backoff_ns > BACKOFF_LAST_NS)
        dp->backoff_ns = BACKOFF_LAST_NS;
    dp->retry_ns = atoll_now_ns() + dp->backoff_ns;
}

void destage_hurry(struct datapath *dp) { dp->retry_ns = 0; }

/* Whether blocks need not wait in the log for more of them: large writes, which dedup has left the path's processor for, and hardly any of
 * them is overwritten or equal to another. Then the device may as well begin at once, and a flush finds it done; and what is destaged is in the
 * processor's cache yet. Where there are equal blocks, those that are logged together need not be read again. */
static bool is_eager(const struct datapath *dp) { return !dp->shared && dp->repeats < DP_REPEATS_ALL / 16; }

/* On the processor of the path little is logged, so that pages are in the processor's cache when they are destaged and when nic has them back;
 * unless a longer log would spare the device more than a quarter of the writes, because blocks are overwritten in it. */
static bool is_short(const struct datapath *dp) { return dp->shared && reuse_spared(dp->reuse) <= REUSE_ALL / OVERWRITTEN_PART; }

/* Records that destage has in hand. */
static uint64_t in_runs(const struct datapath *dp)
{
    uint64_t count = 0;
    uint64_t left = dp->runs_in[RUN_MATCHING] | dp->runs_in[RUN_WRITING] | dp->runs_in[RUN_WRITTEN];
    for (; left != 0; left &= left - 1) {
        const struct dp_run *run = &dp->arena->runs[__builtin_ctzll(left)];
        count += run->record_count - run->done;
    }
    return count;
}

bool destage_due(const struct datapath *dp)
{
    uint64_t logged = dp->arena->log_records, waiting = logged - dp->arena->pinned_records, enough = flush_allows(dp) / 2;
    if (is_short(dp) && enough > LOGGED_WARM)
        enough = LOGGED_WARM;
    return (waiting > enough && waiting > enough + in_runs(dp)) || /* mostly there are not so many, and runs need not be counted */
           logged * (is_eager(dp) ? LOGGED_PART_EAGER : LOGGED_PART) > dp->arena->nic_pages;
}

bool destage_crowded(struct datapath *dp)
{
    return (is_short(dp) && dp->arena->log_records > LOGGED_CROWDED) || flush_crowded(dp, true);
}

bool destage_pressed(const struct datapath *dp)
{
    return dp->drain || store_pressed(dp->dedup) || destage_due(dp) || (uint64_t)dp->merge_free_count * 4 < dp->arena->merge_pages;
}

/* --- The step ------------------------------------------------------------------------------------------------------------ */

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
    if (head->order <= dp->flush_target || head->order <= dp->space_target || destage_pressed(dp))
        return true;
    uint32_t age = (uint32_t)dp->now_ms - head->logged_ms;
    if (age >= dp->destage_delay_ms)
        return true;
    *wake_ms = dp->destage_delay_ms - age;
    return false;
}

/* Its records are written directly, so it is one that was free at the last commit. */
static uint32_t free_run(const struct datapath *dp)
{
    uint64_t free = dp->runs_in[RUN_FREE] & ~dp->runs_left;
    return free == 0 ? DP_RUNS : (uint32_t)__builtin_ctzll(free);
}

/* True if one more batch finds pages for its candidates in the half of the cache that batches may pin, or is the only one. */
static bool pages_left(const struct datapath *dp)
{
    uint32_t pinned = 0;
    for (uint64_t left = dp->runs_in[RUN_MATCHING]; left != 0; left &= left - 1)
        pinned += dp->run_pages[__builtin_ctzll(left)];
    return pinned == 0 || 2 * (pinned + dp->batch_blocks) <= dp->pools[POOL_DISK].count;
}

/* What is written can be followed no more: it is finished first, so that those who go on find it stored. */
static bool finish_one(struct datapath *dp)
{
    bool did = false, urgent = true;
    for (uint64_t left = dp->runs_in[RUN_WRITTEN]; left != 0 && !did; left &= left - 1) {
        store_urgent(dp->dedup, urgent); /* the first of them */
        urgent = false;
        did = batch_finish(dp, (uint32_t)__builtin_ctzll(left)); /* without room a sync is under way and will wake */
    }
    store_urgent(dp->dedup, false);
    return did;
}

/* Batches that have their candidates, or the one that is being shared. */
static uint64_t may_go_on(const struct datapath *dp)
{
    return dp->deciding != DP_RUNS ? (uint64_t)1 << dp->deciding : dp->runs_in[RUN_MATCHING] & ~dp->unmatched;
}

static bool go_on_one(struct datapath *dp)
{
    bool did = false, urgent = true;
    for (uint64_t left = may_go_on(dp); left != 0 && !did; left &= left - 1) {
        uint32_t number = (uint32_t)__builtin_ctzll(left);
        if (!batch_loaded(dp, number))
            continue;
        store_urgent(dp->dedup, urgent);
        urgent = false;
        did = batch_go_on(dp, number);
    }
    store_urgent(dp->dedup, false);
    return did;
}

/* Places of equal blocks for a batch that has been collected. */
static bool match_one(struct datapath *dp)
{
    if (dp->unmatched == 0 || dp->collecting != DP_RUNS)
        return false;
    uint32_t number = (uint32_t)__builtin_ctzll(dp->unmatched);
    dp->newest_run = number;
    if (match_stored(dp, number, batch_piece(dp))) {
        dp->unmatched &= dp->unmatched - 1;
        dp->matched = 0;
        batch_count_pages(dp, number);
    }
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
        if (!store_has_room(dp->dedup, dp->batch_blocks) || io_room(dp->dedup, IO_DESTAGE) < dp->batch_blocks || !pages_left(dp)) {
            *wake_ms = 5; /* without I/O slots and pages to read candidates, equal blocks would be stored again; readers need some, too */
            return false;
        }
        enum batch_looked looked = batch_look_up(dp);
        if (looked == LOOKED_WAITS)
            *wake_ms = 5; /* or as soon as a page has been read */
        if (looked != LOOKED_UP)
            return looked == LOOKED_ON;
    }
    batch_handle_none(dp);
    bool more = batch_collect(dp, number);
    dp->collecting = DP_RUNS;
    if (dp->arena->runs[number].state == RUN_MATCHING) {
        dp->unmatched |= (uint64_t)1 << number;
        batch_count_pages(dp, number);
        if (more)
            dp->collecting = number;
    }
    return true;
}

/* Whether the requests of clients come first for a moment: as long as the last pieces of work took, or, one by one, until none comes;
 * unless somebody waits for destage, or soon will. */
static bool gives_way(struct datapath *dp, uint64_t now_ns)
{
    const struct dp_arena *arena = dp->arena;
    return dp->shared && dp->asked && (dp->alone || now_ns < dp->resume_ns) && dp->flush_count == 0 && dp->retry_count == 0 && !dp->drain &&
           arena->log_records * 2 < arena->nic_pages && !destage_crowded(dp);
}

void destage_step_over(struct datapath *dp)
{
    if (dp->piece_ns == 0)
        return;
    uint64_t now = atoll_now_ns();
    dp->worked_ns = (dp->piece_ns < dp->resume_ns ? dp->worked_ns : 0) + now - dp->piece_ns;
    dp->resume_ns = now + (dp->worked_ns < GIVE_WAY_NS ? dp->worked_ns : GIVE_WAY_NS);
    dp->piece_ns = 0;
}

/* One of the things that a batch goes through; true if there was one to be done. */
static bool piece(struct datapath *dp, uint64_t *wake_ms)
{
    bool did = finish_one(dp) || go_on_one(dp);
    /* Those that lack room or I/O slots are tried each step. */
    for (uint64_t left = dp->runs_in[RUN_WRITTEN] | may_go_on(dp); left != 0 && *wake_ms == 0; left &= left - 1) {
        uint32_t number = (uint32_t)__builtin_ctzll(left);
        if (dp->runs_in[RUN_WRITTEN] >> number & 1 || batch_loaded(dp, number))
            *wake_ms = 5;
    }
    uint64_t wake = 0;
    did = did || match_one(dp) || collect_one(dp, &wake);
    batch_handle_none(dp);
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
            destage_failed(dp);
        }
    }
    if (gives_way(dp, now)) {
        *wake_ms = 1;
        return false;
    }
    uint32_t pieces = !dp->shared ? STEP_PIECES : destage_crowded(dp) && !dedup_awaited(dp->dedup) ? STEP_PIECES_CROWDED : 1;
    did = piece(dp, wake_ms);
    for (uint32_t more = 1; did && more < pieces && dp->journal->count < DP_STEP_JOURNAL; more++)
        if (!piece(dp, wake_ms))
            break;
    if (did)
        dp->piece_ns = now;
    return did;
}

/* --- Of predecessors ----------------------------------------------------------------------------------------------------- */

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
        batch_set_state(dp, number, RUN_FREE);
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
        batch_set_state(dp, number, RUN_FREE);
        datapath_commit(dp);
    }
    for (uint32_t index = 0; index < count; index++) {
        uint32_t record = arena->handled[index];
        const struct dp_record *r = at(dp, record);
        bool poison = count == 1 && (r->flags & RECORD_SUSPECT);
        if (r->state < RECORD_LOGGED || r->state > RECORD_WRITING || (r->flags & RECORD_ASIDE))
            continue;
        if (poison && r->state == RECORD_LOGGED)
            batch_set_aside(dp, record);
        else
            log_set_flag(dp, record, poison ? RECORD_CONDEMNED : RECORD_SUSPECT);
    }
    datapath_commit(dp);
    batch_handle_none(dp);
}
