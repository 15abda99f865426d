/*
 * Matching of a batch: which of its blocks share stored ones, which follow a block that is being written, which are written.
 *
 *   match_stored     when the batch has been collected: places of equal blocks, the threshold's decision (runs.h), their pages read
 *   match_share      when those are there: byte by byte; then the threshold again, over what was confirmed and what is being
 *                    written
 *   match_decide     equal blocks within what is left of the batch
 *
 * The first two do a part of the batch at a time, whole runs of blocks.
 *
 * Where a block's equals are looked for: behind the place that its predecessor matched, and before that of its successor, so
 * that a run goes on at the right one of several copies and over gaps in the fingerprint cache; the block's own old content; the
 * fingerprint cache, of which a print may have several entries.
 *
 * A run ends where its volume's log ends, or at ATOLL_IO_BLOCKS. What stands in sequence beside it counts: blocks before
 * and after it in the volume that are stored, or about to be, at the neighbouring places. And a match that
 * is too short but reaches the run's end waits for the next batch if more of the run is logged or may still come.
 *
 * After a crash: nothing here is kept but each record's choice in its run (link: the cache page, pinned).
 */
#include "services/dedup/datapath_batch.h"

/* Equal blocks taken from the fingerprint cache, per block. */
#define CANDIDATES 4
/* Blocks with the same content that are compared within a batch, per block. */
#define EQUALS 8

_Static_assert(CANDIDATES + 2 <= RUNS_PLACES, "neighbours find room beside the cache's candidates");

static struct dp_record *at(struct datapath *dp, uint32_t record) { return &dp->records[record]; }

/* --- Runs --------------------------------------------------------------------------------------------------------------- */

/* True if records[index] goes on with the run of records[index - 1]. */
static bool goes_on(struct datapath *dp, const uint32_t *records, uint32_t index)
{
    const struct dp_record *before = at(dp, records[index - 1]), *r = at(dp, records[index]);
    return before->volume == r->volume && before->lba + 1 == r->lba && before->state != RECORD_DROPPED && r->state != RECORD_DROPPED;
}

static uint32_t run_end(struct datapath *dp, const uint32_t *records, uint32_t count, uint32_t first)
{
    uint32_t end = first + 1;
    while (end < count && goes_on(dp, records, end))
        end++;
    return end;
}

/* Where `record` is about to be stored, or is expected to be found equal; 0: not known. */
static uint64_t planned_place(const struct datapath *dp, uint32_t record)
{
    if (dp->records[record].state == RECORD_WRITING) {
        uint32_t node = destage_node(dp, record);
        return node == DP_NONE ? 0 : dp->arena->runs[node / DP_RUN_RECORDS].pba + node % DP_RUN_RECORDS;
    }
    for (uint32_t each = 0; each < DP_RUNS; each++) { /* the newest first: what is written in sequence follows it */
        const struct dp_run *run = &dp->arena->runs[(dp->newest_run + each) % DP_RUNS];
        for (uint32_t index = 0; run->state != RUN_FREE && index < run->record_count; index++) {
            if (run->records[index] != record)
                continue;
            if (run->state == RUN_MATCHING)
                return run->link[index] < DP_UNREAD ? dp->pages[run->link[index]].pba : 0;
            return run->pba + (index < run->writer_count ? index : run->link[index]);
        }
    }
    return 0;
}

/* The place of a block that stands beside a run; 0: none, or nobody knows yet. */
static uint64_t place_of(const struct datapath *dp, uint32_t volume, uint64_t lba)
{
    uint64_t value = store_map_get(dp->dedup, volume, lba);
    if (MAP_KIND(value) == MAP_PBA)
        return MAP_NUMBER(value);
    if (MAP_KIND(value) != MAP_LOG)
        return 0;
    uint32_t record = log_record_of(dp, value), state = dp->records[record].state;
    return state == RECORD_MATCHING || state == RECORD_WRITING ? planned_place(dp, record) : 0;
}

/* The blocks that stand in sequence from `lba` on, away from the run: at most threshold - 1, which is all that can be missing. */
static struct runs_neighbour neighbour(const struct datapath *dp, uint32_t volume, uint64_t lba, bool before, uint32_t threshold)
{
    struct runs_neighbour found = {.place = place_of(dp, volume, lba)};
    uint64_t track = found.place / dp->track_blocks, place = found.place;
    if (place == 0)
        return found;
    for (found.length = 1; found.length < threshold - 1; found.length++) {
        if (before ? lba-- == 0 : lba == UINT64_MAX)
            break;
        lba += before ? 0 : 1;
        place += before ? (uint64_t)-1 : 1;
        if (place / dp->track_blocks != track || place_of(dp, volume, lba) != place)
            break;
    }
    return found;
}

static void rule_of(struct datapath *dp, const uint32_t *records, uint32_t count, const struct runs_block *blocks,
                    struct runs_rule *rule)
{
    const struct dp_record *first = at(dp, records[0]), *last = at(dp, records[count - 1]);
    uint32_t threshold = dp->dedup->public->volumes[first->volume].threshold;
    *rule = (struct runs_rule){.threshold = threshold == 0 ? 1 : threshold, .track_blocks = dp->track_blocks};
    if (rule->threshold == 1)
        return;
    if (blocks[0].count != 0 && first->lba != 0)
        rule->before = neighbour(dp, first->volume, first->lba - 1, true, rule->threshold);
    if (blocks[count - 1].count != 0)
        rule->after = neighbour(dp, last->volume, last->lba + 1, false, rule->threshold);
}

/* How many blocks at the end of a run may wait for what follows: all that runs_open_tail names, or none. */
static uint32_t held_back(struct datapath *dp, const uint32_t *records, uint32_t count, uint32_t tail)
{
    const struct dp_record *last = tail == 0 ? 0 : at(dp, records[count - 1]);
    struct log_cursor cursor = {0};
    if (last == 0 || (last->flags & RECORD_SUSPECT)) /* a suspect stays alone, whatever follows it */
        return 0;
    if (log_find(dp, &cursor, last->volume, last->lba + 1) != DP_NONE)
        return tail; /* the run goes on in the log: with that the next batch takes them */
    if (destage_pressed(dp)) /* or they would be taken again at once, until they have their age */
        return 0;
    for (uint32_t index = count - tail; index < count; index++) {
        const struct dp_record *r = at(dp, records[index]);
        if ((uint32_t)dp->now_ms - r->logged_ms >= dp->destage_delay_ms || r->order <= dp->flush_target || r->order <= dp->space_target)
            return 0;
    }
    return tail;
}

/* --- Candidates --------------------------------------------------------------------------------------------------------- */

static bool add_place(struct runs_block *block, uint64_t place, bool free)
{
    for (uint32_t index = 0; index < block->count; index++)
        if (block->places[index] == place)
            return false;
    if (block->count == RUNS_PLACES)
        return false;
    block->free |= (uint32_t)free << block->count;
    block->places[block->count++] = place;
    return true;
}

/* The same content again where it was costs nothing; nor does a read of it from the fast tier. */
static bool free_of_rule(const struct datapath *dp, const struct dp_record *r, uint64_t place)
{
    return r->base == MAP_VALUE(MAP_PBA, place) || tier_readable(dp, place) != TIER_NONE;
}

static void add_if_equal(struct datapath *dp, const struct dp_record *r, struct runs_block *block, uint64_t place)
{
    struct fingerprint stored;
    if (place != 0 && store_fingerprint(dp->dedup, place, &stored) && print_equal(stored, r->print))
        add_place(block, place, free_of_rule(dp, r, place));
}

/* Cache lines of what `candidates` will look at in a batch. */
static void prefetch_batch(struct datapath *dp, const uint32_t *records, uint32_t count)
{
    for (uint32_t index = 0; index < count; index++) {
        const struct dp_record *r = at(dp, records[index]);
        uint64_t before = 0, after = 0;
        store_prefetch_candidates(dp->dedup, r->print);
        if (r->lba != 0 && (index == 0 || !goes_on(dp, records, index)))
            before = place_of(dp, r->volume, r->lba - 1);
        if (index + 1 == count || !goes_on(dp, records, index + 1))
            after = place_of(dp, r->volume, r->lba + 1);
        if (before != 0)
            store_prefetch_block(dp->dedup, before + 1);
        if (after != 0)
            store_prefetch_block(dp->dedup, after - 1);
        if (MAP_KIND(r->base) == MAP_PBA)
            store_prefetch_block(dp->dedup, MAP_NUMBER(r->base));
    }
}

static void candidates(struct datapath *dp, const uint32_t *records, uint32_t count, struct runs_block *blocks)
{
    const struct dp_record *first = at(dp, records[0]), *last = at(dp, records[count - 1]);
    for (uint32_t index = 0; index < count; index++) {
        const struct dp_record *r = at(dp, records[index]);
        struct runs_block *block = &blocks[index];
        uint64_t cached[CANDIDATES];
        *block = (struct runs_block){0};
        if (index != 0)
            for (uint32_t each = 0; each < blocks[index - 1].count; each++)
                add_if_equal(dp, r, block, blocks[index - 1].places[each] + 1);
        else if (first->lba != 0) {
            uint64_t place = place_of(dp, first->volume, first->lba - 1);
            add_if_equal(dp, r, block, place == 0 ? 0 : place + 1);
        }
        if (MAP_KIND(r->base) == MAP_PBA)
            add_if_equal(dp, r, block, MAP_NUMBER(r->base));
        uint32_t found = store_candidates(dp->dedup, r->print, cached, CANDIDATES);
        for (uint32_t each = 0; each < found; each++)
            add_place(block, cached[each], free_of_rule(dp, r, cached[each]));
    }
    for (uint32_t index = count; index-- > 0;) {
        const struct dp_record *r = at(dp, records[index]);
        if (index + 1 < count) {
            for (uint32_t each = 0; each < blocks[index + 1].count; each++)
                add_if_equal(dp, r, &blocks[index], blocks[index + 1].places[each] - 1);
        } else {
            uint64_t place = place_of(dp, last->volume, last->lba + 1);
            add_if_equal(dp, r, &blocks[index], place == 0 ? 0 : place - 1);
        }
    }
}

/* The candidates of a whole batch are read together: what the storage driver is woken for costs others on its processor more than what
 * it does. False: to be called again. */
static bool load_wanted(struct datapath *dp, struct dp_run *run)
{
    uint64_t pbas[ATOLL_IO_BLOCKS], unknown;
    uint32_t where[ATOLL_IO_BLOCKS], pages[ATOLL_IO_BLOCKS], count = 0;
    struct fingerprint stored;
    for (uint32_t index = 0; index < run->record_count; index++) {
        const struct dp_record *r = at(dp, run->records[index]);
        if (dp->wanted[index] == 0 || r->state == RECORD_DROPPED)
            continue;
        if (!store_fingerprint(dp->dedup, dp->wanted[index], &stored) || !print_equal(stored, r->print)) {
            run->link[index] = DP_UNREAD; /* it has gone since it was chosen: no second choice, which might go, too */
            continue;
        }
        where[count] = index;
        pbas[count++] = dp->wanted[index];
        cache_prefetch(dp, dp->wanted[index]);
    }
    if (count == 0)
        return true;
    if (ahead_read(dp, pbas, count))
        return false;
    if (!cache_load(dp, IO_DESTAGE, pbas, count, pages, &unknown)) {
        /* Readers hold the pages: unique copies cost space, waiting could cost the flush. */
        dp_sweep(dp);
        if (!cache_load(dp, IO_DESTAGE, pbas, count, pages, &unknown)) {
            atoll_count(dp->domain, DEDUP_COUNTER_MATCH_SKIPPED, count);
            for (uint32_t each = 0; each < count; each++)
                pages[each] = DP_UNREAD;
        }
    }
    for (uint32_t each = 0; each < count; each++)
        run->link[where[each]] = pages[each];
    return true;
}

/* --- When the batch has been collected, in a step of its own ------------------------------------------------------------------------------------ */

bool match_stored(struct datapath *dp, uint32_t number, uint32_t most)
{
    struct dp_run *run = &dp->arena->runs[number];
    struct runs_block blocks[ATOLL_IO_BLOCKS];
    uint8_t choice[ATOLL_IO_BLOCKS];
    uint32_t kept = dp->matched, count = kept, end;
    uint32_t *records = run->records, *link = run->link;

    destage_save_run(dp, run, run->record_count);
    while (count < run->record_count && count - dp->matched < most)
        count = run_end(dp, records, run->record_count, count);
    batch_handle_all(dp, records + dp->matched, count - dp->matched);
    prefetch_batch(dp, records + dp->matched, count - dp->matched);
    for (uint32_t first = dp->matched; first < count; first = end) {
        struct runs_rule rule;
        end = run_end(dp, records, count, first);
        if (at(dp, records[first])->state == RECORD_DROPPED) { /* overwritten since it was collected */
            records[kept] = records[first];
            dp->wanted[kept] = 0;
            link[kept++] = DP_NONE;
            continue;
        }
        candidates(dp, records + first, end - first, blocks + first);
        rule_of(dp, records + first, end - first, blocks + first, &rule);
        runs_match(blocks + first, end - first, &rule, choice + first);
        uint32_t tail = runs_open_tail(blocks + first, end - first, &rule, choice + first);
        uint32_t keep = end - held_back(dp, records + first, end - first, tail);
        for (uint32_t index = first; index < end; index++) {
            if (index >= keep) {
                log_requeue(dp, records[index]);
                atoll_count(dp->domain, DEDUP_COUNTER_HELD_BACK_BLOCKS, 1);
                continue;
            }
            records[kept] = records[index];
            link[kept] = DP_NONE;
            dp->wanted[kept] = choice[index] == RUNS_NONE ? 0 : blocks[index].places[choice[index]];
            if (choice[index] == RUNS_NONE && blocks[index].count != 0) {
                link[kept] = DP_REJECTED;
                tier_refused(dp, at(dp, records[kept])->volume, blocks[index].places[0], at(dp, records[kept])->print);
            }
            kept++;
        }
    }
    bool all = count == run->record_count;
    for (uint32_t index = count; index < run->record_count; index++) { /* over the gap */
        records[kept + index - count] = records[index];
        link[kept + index - count] = link[index];
    }
    run->record_count -= count - kept;
    dp->matched = kept;
    if (run->record_count == 0)
        batch_enter_state(dp, number, RUN_FREE);
    return all && load_wanted(dp, run);
}

/* --- When the candidates are there ------------------------------------------------------------------------------------------ */

/* The fingerprint was a hint; what is stored now, and every byte of it, decides. Returns its place, or 0. */
static uint64_t confirm(struct datapath *dp, uint32_t record, uint32_t page)
{
    const struct dp_record *r = at(dp, record);
    const struct dp_page *p = &dp->pages[page];
    struct fingerprint stored;
    if ((p->state != PAGE_VALID && p->state != PAGE_UNCHECKED) || !p->attached || !store_fingerprint(dp->dedup, p->pba, &stored))
        return 0;
    if (print_equal(stored, r->print) && memcmp(page_memory(dp, page), record_page(dp, record), DP_BLOCK) == 0) {
        cache_confirmed(dp, page);
        return p->pba;
    }
    if (cache_check(dp, page))
        atoll_count(dp->domain, DEDUP_COUNTER_COMPARE_MISMATCHES, 1);
    return 0;
}

static bool share(struct datapath *dp, uint32_t record, uint64_t pba)
{
    const struct dp_record *r = at(dp, record);
    if (!store_share(dp->dedup, r->volume, r->lba, r->base, pba))
        return false;
    tier_consider(dp, r->volume, pba);
    destage_settled(dp, record);
    atoll_count(dp->domain, DEDUP_COUNTER_SHARED_BLOCKS, 1);
    return true;
}

/* Has `record` follow one that is being written with the same content, if its run has a place for it. */
static bool follow(struct datapath *dp, uint32_t record, uint32_t node)
{
    struct dp_run *run = &dp->arena->runs[node / DP_RUN_RECORDS];
    uint32_t place = run->record_count;
    if (place == DP_RUN_RECORDS)
        return false;
    dp_set32(dp, &run->records[place], record);
    dp_set32(dp, &run->link[place], node % DP_RUN_RECORDS);
    dp_set32(dp, &run->record_count, place + 1);
    if (at(dp, record)->order < run->min_order)
        dp_set64(dp, &run->min_order, at(dp, record)->order);
    return true;
}

/* The block had no equal when the batch was collected, and has one now: stored while others of the batch were being read. The next
 * batch has it read; that can happen once to a block, since it has an equal from then on. */
static bool came_late(struct datapath *dp, const struct dp_record *r, uint32_t link)
{
    uint64_t place;
    return link == DP_NONE && store_candidates(dp->dedup, r->print, &place, 1) != 0;
}

/* Cache lines of what sharing them looks at and changes: comparing the whole batch has pushed them out again. */
static void prefetch_share(struct datapath *dp, const uint32_t *records, const uint64_t *places, uint32_t count)
{
    for (uint32_t index = 0; index < count; index++) {
        const struct dp_record *r = at(dp, records[index]);
        store_prefetch_candidates(dp->dedup, r->print);
        if (places[index] == 0) {
            destage_prefetch_inflight(dp, r->print);
            continue;
        }
        store_prefetch_map(dp->dedup, r->volume, r->lba);
        store_prefetch_block(dp->dedup, places[index]);
        if (MAP_KIND(r->base) == MAP_PBA)
            store_prefetch_block(dp->dedup, MAP_NUMBER(r->base));
    }
    for (uint32_t index = 0; index < count; index++) {
        const struct dp_record *r = at(dp, records[index]);
        if (places[index] != 0 && MAP_KIND(r->base) == MAP_PBA)
            store_prefetch_forget(dp->dedup, MAP_NUMBER(r->base));
    }
}

/* One run of the batch: shares, follows, holds back. places[i]: confirmed, or 0. What is left goes to `rest`, with its links; returns
 * how many. */
static uint32_t share_run(struct datapath *dp, const uint32_t *records, const uint64_t *places, const uint32_t *link, uint32_t count,
                          uint32_t *rest, uint32_t *rest_link)
{
    struct runs_block blocks[ATOLL_IO_BLOCKS];
    uint32_t nodes[ATOLL_IO_BLOCKS][RUNS_PLACES];
    uint8_t choice[ATOLL_IO_BLOCKS];
    struct runs_rule rule;
    assert(count >= 1 && count <= ATOLL_IO_BLOCKS);
    prefetch_share(dp, records, places, count);
    for (uint32_t index = 0; index < count; index++) {
        const struct dp_record *r = at(dp, records[index]);
        struct runs_block *block = &blocks[index];
        *block = (struct runs_block){0};
        if (places[index] != 0) {
            add_place(block, places[index], free_of_rule(dp, r, places[index]));
            nodes[index][0] = DP_NONE;
            continue;
        }
        for (uint32_t node = destage_inflight(dp, r->print, DP_NONE); node != DP_NONE && block->count < RUNS_PLACES;
             node = destage_inflight(dp, r->print, node)) {
            nodes[index][block->count] = node;
            add_place(block, dp->arena->runs[node / DP_RUN_RECORDS].pba + node % DP_RUN_RECORDS, false);
        }
    }
    rule_of(dp, records, count, blocks, &rule);
    runs_match(blocks, count, &rule, choice);
    uint32_t keep = count - held_back(dp, records, count, runs_open_tail(blocks, count, &rule, choice)), piece_end = 0, left = 0;
    bool recovered = false; /* the piece is too short, and shared all the same */
    for (uint32_t index = 0; index < count; index++) {
        if (index >= piece_end && choice[index] != RUNS_NONE) {
            uint64_t place = blocks[index].places[choice[index]];
            piece_end = index + 1;
            while (piece_end < count && choice[piece_end] != RUNS_NONE &&
                   blocks[piece_end].places[choice[piece_end]] == place + (piece_end - index))
                piece_end++;
            recovered = piece_end - index < rule.threshold && tier_readable(dp, place) != TIER_NONE;
        }
        atoll_count(dp->domain, DEDUP_COUNTER_TIER_SHARED_BLOCKS, choice[index] != RUNS_NONE && recovered);
        uint32_t record = records[index], node = choice[index] == RUNS_NONE ? DP_NONE : nodes[index][choice[index]];
        if (index >= keep || (blocks[index].count == 0 && came_late(dp, at(dp, record), link[index]))) {
            log_requeue(dp, record);
            atoll_count(dp->domain, DEDUP_COUNTER_HELD_BACK_BLOCKS, 1);
        } else if (choice[index] == RUNS_NONE || !(node == DP_NONE ? share(dp, record, places[index]) : follow(dp, record, node))) {
            bool rejected = choice[index] == RUNS_NONE && (blocks[index].count != 0 || link[index] == DP_REJECTED);
            rest[left] = record;
            rest_link[left++] = rejected ? DP_REJECTED : DP_NONE;
        }
    }
    return left;
}

/* What is left of the batch: a row of at least threshold blocks that equal blocks written in sequence follows them; the others
 * are written. */
static void decide_rest(struct datapath *dp, struct match_decision *decision, bool checked)
{
    uint32_t heads[256], next[ATOLL_IO_BLOCKS], end = 0;
    const uint32_t *rest = decision->rest;
    memset(heads, 0xff, sizeof heads);
    for (uint32_t index = 0; index < decision->rest_count;) {
        const struct dp_record *r = at(dp, rest[index]);
        uint32_t threshold = dp->dedup->public->volumes[r->volume].threshold, longest = 0, leader = 0, looked = 0;
        uint32_t *head = &heads[r->print.low % 256];
        if (index == end)
            end = run_end(dp, rest, decision->rest_count, index);
        for (uint32_t writer = *head; writer != DP_NONE && looked < EQUALS; writer = next[writer]) {
            if (!print_equal(at(dp, decision->writers[writer])->print, r->print))
                continue;
            uint32_t length = 1;
            while (index + length < end && writer + length < decision->writer_count &&
                   print_equal(at(dp, decision->writers[writer + length])->print, at(dp, rest[index + length])->print))
                length++;
            if (length >= longest) { /* of equals the first: it is likelier to find a place */
                longest = length;
                leader = writer;
            }
            looked++;
        }
        if (longest != 0 && longest >= threshold) {
            for (uint32_t each = 0; each < longest; each++) {
                decision->leaders[decision->follower_count] = leader + each;
                decision->followers[decision->follower_count++] = rest[index + each];
            }
            index += longest;
            continue;
        }
        if (!checked && index + 1 < decision->rest_count)
            dp_prefetch(record_page(dp, rest[index + 1]));
        if (!checked && !batch_intact(dp, rest[index])) {
            index++;
            continue;
        }
        atoll_count(dp->domain, DEDUP_COUNTER_THRESHOLD_BLOCKS, longest != 0 || decision->rejected[index]);
        next[decision->writer_count] = *head;
        *head = decision->writer_count;
        decision->writers[decision->writer_count++] = rest[index++];
    }
}

uint32_t match_run_end(struct datapath *dp, const struct dp_run *run, uint32_t first)
{
    return run_end(dp, run->records, run->record_count, first);
}

uint32_t match_share(struct datapath *dp, uint32_t number, uint32_t first, uint32_t end)
{
    struct dp_run *run = &dp->arena->runs[number];
    uint64_t places[ATOLL_IO_BLOCKS];
    uint32_t rest[ATOLL_IO_BLOCKS], rest_link[ATOLL_IO_BLOCKS], left = 0, stop;
    for (uint32_t index = first; index < end; index++) {
        if (index + 1 < end && run->link[index + 1] < DP_UNREAD) {
            dp_prefetch(page_memory(dp, run->link[index + 1]));
            dp_prefetch(record_page(dp, run->records[index + 1]));
        }
        places[index - first] = run->link[index] < DP_UNREAD && at(dp, run->records[index])->state != RECORD_DROPPED
                                    ? confirm(dp, run->records[index], run->link[index]) : 0;
    }
    for (uint32_t begin = first; begin < end; begin = stop) {
        stop = run_end(dp, run->records, end, begin);
        if (at(dp, run->records[begin])->state == RECORD_DROPPED)
            log_release(dp, run->records[begin]); /* who overwrote it took its reservation */
        else
            left += share_run(dp, run->records + begin, places + begin - first, run->link + begin, stop - begin, rest + left,
                              rest_link + left);
    }
    for (uint32_t index = first; index < end; index++)
        if (run->link[index] < DP_UNREAD)
            cache_unpin(dp, run->link[index]);
    destage_save_run(dp, run, run->record_count);
    memcpy(run->records + first, rest, left * sizeof rest[0]);
    memcpy(run->link + first, rest_link, left * sizeof rest_link[0]);
    memmove(run->records + first + left, run->records + end, (run->record_count - end) * sizeof rest[0]);
    memmove(run->link + first + left, run->link + end, (run->record_count - end) * sizeof rest[0]);
    run->record_count -= end - first - left;
    return left;
}

void match_decide(struct datapath *dp, uint32_t number, struct match_decision *decision)
{
    struct dp_run *run = &dp->arena->runs[number];
    decision->rest_count = decision->writer_count = decision->follower_count = 0;
    for (uint32_t index = 0; index < run->record_count; index++) {
        uint32_t record = run->records[index];
        if (at(dp, record)->state == RECORD_DROPPED) { /* since it was decided */
            log_release(dp, record);
            continue;
        }
        decision->rejected[decision->rest_count] = run->link[index] == DP_REJECTED;
        decision->rest[decision->rest_count++] = record;
    }
    decide_rest(dp, decision, dp->checked >> number & 1);
}

uint32_t match_trim(struct datapath *dp, struct match_decision *decision, uint64_t pba, uint32_t placed)
{
    uint32_t kept = 0;
    for (uint32_t first = 0, end; first < decision->follower_count; first = end) {
        uint32_t threshold = dp->dedup->public->volumes[at(dp, decision->followers[first])->volume].threshold;
        for (end = first + 1; end < decision->follower_count && goes_on(dp, decision->followers, end) &&
                              decision->leaders[end] == decision->leaders[end - 1] + 1 && decision->leaders[end] < placed &&
                              (pba + decision->leaders[end]) / dp->track_blocks == (pba + decision->leaders[first]) / dp->track_blocks;)
            end++;
        for (uint32_t index = first; index < end; index++) {
            if (decision->leaders[index] >= placed || end - first < threshold) {
                log_requeue(dp, decision->followers[index]);
                continue;
            }
            decision->followers[kept] = decision->followers[index];
            decision->leaders[kept++] = decision->leaders[index];
        }
    }
    return decision->follower_count = kept;
}
