/*
 * The live checker: recounts what lists, counts and flags say, from the map, the records, the slots and the runs.
 *
 *   datapath_check     between steps; reads only
 *
 * Map and counts are paged, so it goes on where it waited for a page. References are counted in windows of the device, each with a walk
 * over all maps: its memory is bounded, its time is not.
 *
 * After a crash: it is what the tests call after each. One that had not come to its end is forgotten.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "services/dedup/datapath.h"

struct findings {
    char *text;
    uint64_t bytes, used;
    uint32_t count;
};

static void __attribute__((format(printf, 2, 3))) found(struct findings *findings, const char *format, ...)
{
    va_list arguments;
    findings->count++;
    if (findings->used + 1 >= findings->bytes)
        return;
    va_start(arguments, format);
    int length = vsnprintf(findings->text + findings->used, findings->bytes - findings->used, format, arguments);
    va_end(arguments);
    findings->used += length < 0 ? 0 : (uint64_t)length;
    if (findings->used + 1 >= findings->bytes) {
        findings->used = findings->bytes - 1;
        return;
    }
    findings->text[findings->used++] = '\n';
    findings->text[findings->used] = 0;
}

#define U(value) ((unsigned long long)(value))

#define AHEAD STORE_PAGE_READS
#define WINDOW_BLOCKS ((uint64_t)1 << 24) /* 64 MiB of counts */

struct check {
    struct findings findings;
    struct store_space space;
    uint64_t window, window_end;  /* places being counted */
    uint32_t *references;         /* of these, by the maps */
    uint8_t *named;               /* how often the map names a record */
    uint32_t volume;              /* cursor: volume, leaf, then place */
    uint64_t leaf, mapped, place;
    bool maps_done;
    uint64_t reservations, stored, total;
};

static void count_reference(struct check *check, uint64_t pba)
{
    if (pba >= check->window && pba < check->window_end)
        check->references[pba - check->window]++;
}

/* The entries of one leaf. What is not about places is looked at with the first window. */
static void check_leaf(struct datapath *dp, struct check *check, const uint64_t *entries)
{
    struct findings *findings = &check->findings;
    uint32_t id = check->volume;
    bool first = check->window == 0;
    for (uint32_t index = 0; entries != 0 && index < 512; index++) {
        uint64_t value = entries[index], lba = check->leaf * 512 + index;
        check->mapped += MAP_KIND(value) == MAP_PBA || MAP_KIND(value) == MAP_LOG;
        if (MAP_KIND(value) == MAP_PBA && store_pba_valid(dp->dedup, MAP_NUMBER(value))) {
            count_reference(check, MAP_NUMBER(value));
        } else if (MAP_KIND(value) == MAP_PBA && first) {
            found(findings, "volume %u block %llu: place %llu is not on the device", id, U(lba), U(MAP_NUMBER(value)));
        } else if (MAP_KIND(value) == MAP_LOG && first) {
            uint64_t record = MAP_NUMBER(value);
            if (record >= dp->record_count) {
                found(findings, "volume %u block %llu: no log record %llu", id, U(lba), U(record));
                continue;
            }
            const struct dp_record *r = &dp->records[record];
            if (r->volume != id || r->lba != lba || r->state < RECORD_LOGGED || r->state > RECORD_WRITING)
                found(findings, "volume %u block %llu: log record %llu is of volume %u block %llu, state %u", id, U(lba), U(record),
                      r->volume, U(r->lba), r->state);
            if (check->named[record] != 255)
                check->named[record]++;
        }
    }
}

/* Pages that are asked for together: waiting for each alone would take the time of all. */
static uint64_t leaves_ahead(uint64_t left) { return left < AHEAD ? left : AHEAD; }

/* All maps, leaf by leaf: references of the window's places, and each logged block's record. False: a page must be waited for. */
static bool check_maps(struct datapath *dp, struct check *check)
{
    for (; check->volume < ATOLL_VOLUME_COUNT; check->volume++, check->leaf = check->mapped = 0) {
        const struct atoll_volume *volume = &dp->dedup->public->volumes[check->volume];
        uint64_t leaves = (volume->size_bytes + 512 * DP_BLOCK - 1) / (512 * DP_BLOCK);
        while (volume->state != ATOLL_VOLUME_FREE && check->leaf < leaves) {
            dp->domain->self->progress++; /* not hung */
            uint64_t next;
            enum store_want want = store_next_leaf(dp->dedup, check->volume, check->leaf, leaves, &next);
            if (want == STORE_HAVE) {
                check->leaf = next++;
                if (check->leaf >= leaves)
                    break;
                want = store_want_map(dp->dedup, check->volume, check->leaf * 512, 1, STORE_LOOK);
            }
            if (want == STORE_WAIT) {
                store_want_map(dp->dedup, check->volume, check->leaf * 512, leaves_ahead(leaves - check->leaf) * 512, STORE_LOOK);
                return false;
            }
            if (want == STORE_LOST && check->window == 0)
                found(&check->findings, "volume %u: a page of the map is damaged (leaf %llu, page %llx)", check->volume,
                      U(check->leaf), U(store_want_page(dp->dedup)));
            else if (want == STORE_HAVE)
                check_leaf(dp, check, store_map_leaf(dp->dedup, check->volume, check->leaf));
            check->leaf = next; /* behind a lost directory all that it is about */
        }
        if (volume->state == ATOLL_VOLUME_READY && check->mapped != volume->mapped_blocks && check->window == 0)
            found(&check->findings, "volume %u: %llu blocks are mapped, its entry says %llu", check->volume, U(check->mapped),
                  U(volume->mapped_blocks));
    }
    return true;
}

static void check_records(struct datapath *dp, struct check *check)
{
    struct findings *findings = &check->findings;
    const uint8_t *named = check->named;
    const struct dp_arena *arena = dp->arena;
    uint64_t live = 0, failed = 0, aside = 0, pinned = 0, listed = 0, logged = 0, in_runs = 0, members = 0;
    for (uint64_t record = 0; record < dp->record_count; record++) {
        const struct dp_record *r = &dp->records[record];
        bool current = r->state >= RECORD_LOGGED && r->state <= RECORD_WRITING;
        live += r->state != RECORD_FREE && r->state != RECORD_RETURNING;
        failed += current && (r->flags & ~(RECORD_SUSPECT | RECORD_CONDEMNED)) != 0;
        aside += current && (r->flags & RECORD_ASIDE) != 0;
        pinned += r->state == RECORD_PINNED;
        logged += r->state == RECORD_LOGGED && !(r->flags & RECORD_ASIDE);
        in_runs += r->state == RECORD_MATCHING || r->state == RECORD_WRITING || r->state == RECORD_DROPPED;
        check->reservations += r->state == RECORD_LOGGED || r->state == RECORD_MATCHING;
        if (named[record] != (current ? 1 : 0) &&
            !(current && dp->dedup->public->volumes[r->volume].state != ATOLL_VOLUME_READY))
            found(findings, "log record %llu (state %u) is named %u times by the map", U(record), r->state, named[record]);
        if (record < arena->nic_pages && (dp->held[record] != 0) != (r->state != RECORD_FREE) && !posted_holds(dp, (uint32_t)record))
            found(findings, "page %llu: held says %u, its record's state is %u", U(record), dp->held[record], r->state);
        bool unseen = (r->flags & RECORD_POISON) && print_equal(r->print, (struct fingerprint){0}); /* datapath_posted.c */
        if (current && !(r->flags & RECORD_CORRUPT) && !unseen &&
            !print_equal(dp_fingerprint(record_page(dp, (uint32_t)record)), r->print))
            found(findings, "log record %llu: page is not what was acknowledged", U(record));
    }
    if (live != arena->log_records || failed != arena->failed_records || aside != arena->aside_records || pinned != arena->pinned_records)
        found(findings, "records: %llu live, %llu failed, %llu aside, %llu pinned; counts say %llu, %llu, %llu, %llu", U(live), U(failed),
              U(aside), U(pinned), U(arena->log_records), U(arena->failed_records), U(arena->aside_records), U(arena->pinned_records));
    uint32_t before = DP_NONE;
    for (uint32_t record = arena->log_head; record != DP_NONE && listed <= dp->record_count; record = dp->records[record].next) {
        const struct dp_record *r = &dp->records[record];
        if (r->state != RECORD_LOGGED || r->previous != before ||
            (before != DP_NONE && dp->records[before].order >= r->order))
            found(findings, "list of the log: record %u (state %u, order %llu) after %u", record, r->state, U(r->order), before);
        before = record;
        listed++;
    }
    if (listed != logged || arena->log_tail != before)
        found(findings, "list of the log: %llu records, %llu are logged; tail %u, last %u", U(listed), U(logged), arena->log_tail,
              before);
    for (uint32_t number = 0; number < DP_RUNS; number++) {
        const struct dp_run *run = &arena->runs[number];
        for (uint32_t index = 0; run->state != RUN_FREE && index < run->record_count; index++) {
            const struct dp_record *r = &dp->records[run->records[index]];
            bool writer = run->state >= RUN_WRITING && index < run->writer_count;
            if (run->state >= RUN_WRITING && !writer && index < run->done)
                continue; /* a follower that has been finished */
            members++;
            if (r->state != RECORD_DROPPED && r->state != (writer && index >= run->done ? RECORD_WRITING : RECORD_MATCHING))
                found(findings, "run %u, record %u: state %u", number, run->records[index], r->state);
            if (r->state != RECORD_DROPPED && r->order < run->min_order)
                found(findings, "run %u, record %u: order %llu is below the run's", number, run->records[index], U(r->order));
        }
    }
    if (members != in_runs)
        found(findings, "runs have %llu records, %llu records are in runs", U(members), U(in_runs));
}

static void check_pins(struct datapath *dp, struct findings *findings)
{
    const struct dp_arena *arena = dp->arena;
    uint64_t page_count = arena->cache_pages + arena->tier_pages;
    uint32_t *records = calloc(dp->record_count, sizeof *records), *pages = calloc(page_count, sizeof *pages);
    uint64_t slots_with_pins = 0;
    if (records == 0 || pages == 0) {
        found(findings, "out of memory");
        free(records);
        free(pages);
        return;
    }
    for (uint32_t number = 0; number < ATOLL_SLOT_COUNT; number++) {
        const struct dp_slot *slot = &arena->slots[number];
        bool pins = false;
        for (uint32_t index = 0; index < slot->segment_count; index++) {
            const struct atoll_segment *segment = &slot->segments[index];
            if (segment->kind != ATOLL_SEGMENT_DATA)
                continue;
            pins = true;
            for (uint64_t at = segment->address & ~(uint64_t)(DP_BLOCK - 1); at < segment->address + segment->length; at += DP_BLOCK) {
                uint32_t page = cache_page_of(dp, at);
                if (page != DP_NONE)
                    pages[page]++;
                else if (at - dp->nic_buffer < arena->nic_pages * DP_BLOCK)
                    records[(at - dp->nic_buffer) / DP_BLOCK]++;
                else if (at - dp->merge_buffer < arena->merge_pages * DP_BLOCK)
                    records[arena->nic_pages + (at - dp->merge_buffer) / DP_BLOCK]++;
                else
                    found(findings, "slot %u pins %llx, which is no page", number, U(at));
            }
        }
        slots_with_pins += pins;
        if (pins != (slot->pinned_place != DP_NONE) ||
            (pins && (slot->pinned_place >= arena->pinned_count || arena->pinned[slot->pinned_place] != number)))
            found(findings, "slot %u: pins %u, place %u in the list", number, pins, slot->pinned_place);
    }
    if (slots_with_pins != arena->pinned_count)
        found(findings, "%llu slots have pins, the list has %u", U(slots_with_pins), arena->pinned_count);
    for (uint32_t number = 0; number < DP_RUNS; number++)
        for (uint32_t index = 0; arena->runs[number].state == RUN_MATCHING && index < arena->runs[number].record_count; index++)
            if (arena->runs[number].link[index] < DP_UNREAD)
                pages[arena->runs[number].link[index]]++;
    for (uint64_t record = 0; record < dp->record_count; record++)
        if (records[record] != dp->records[record].pins)
            found(findings, "log record %llu: %u pins, slots have %u", U(record), dp->records[record].pins, records[record]);
    for (uint32_t copy = 0; copy < TIER_COPIES; copy++)
        if (dp->tier.area->copies[copy].state != COPY_FREE)
            pages[dp->tier.area->copies[copy].page]++;
    for (uint64_t page = 0; page < page_count; page++) {
        const struct dp_page *p = &dp->pages[page];
        if (pages[page] != p->pins)
            found(findings, "cache page %llu: %u pins, slots, runs and copies have %u", U(page), p->pins, pages[page]);
        if (p->attached != (p->state != PAGE_FREE && cache_find(dp, p->pba) == page))
            found(findings, "cache page %llu: state %u, attached %u, place %llu is found at %u", U(page), p->state, p->attached,
                  U(p->pba), cache_find(dp, p->pba));
        struct fingerprint print;
        bool there = p->attached && (p->state == PAGE_VALID || p->state == PAGE_UNCHECKED);
        if (there && store_fingerprint(dp->dedup, p->pba, &print) && !print_equal(print, p->print))
            found(findings, "cache page %llu holds an old content of place %llu", U(page), U(p->pba));
    }
    free(records);
    free(pages);
}

static void check_use(struct datapath *dp, const char *user, uint32_t slot, uint32_t page, const uint8_t *limbo, struct findings *findings)
{
    if (page < dp->record_count) {
        if (dp->records[page].state == RECORD_FREE || dp->records[page].state == RECORD_RETURNING)
            found(findings, "slot %u: %s uses log record %u, whose state is %u", slot, user, page, dp->records[page].state);
    } else if (page < dp->lookup.page_count) {
        uint32_t state = dp->pages[page - dp->record_count].state;
        if (state == PAGE_LOADING || state == PAGE_ABANDONED || (state == PAGE_FREE && !limbo[page]))
            found(findings, "slot %u: %s uses cache page %llu, whose state is %u", slot, user, U(page - dp->record_count), state);
    } else {
        found(findings, "slot %u: %s uses page %u, there is none", slot, user, page);
    }
}

/* What nbd and nic have given to readers by themselves is not used for anything else; what was let go is not lost. */
static void check_uses(struct datapath *dp, struct findings *findings)
{
    uint8_t *limbo = calloc(dp->lookup.page_count, 1);
    uint64_t without_pins = 0;
    if (limbo == 0) {
        found(findings, "out of memory");
        return;
    }
    for (uint32_t each = 0; each < dp->log_limbo_count; each++)
        limbo[dp->log_limbo[each]] = 1;
    for (uint32_t number = 0; number < DP_POOLS; number++)
        for (uint32_t each = 0; each < dp->pools[number].limbo_count; each++)
            limbo[dp->record_count + dp->pools[number].limbo[each]] = 1;
    for (uint64_t record = 0; record < dp->record_count; record++) {
        const struct dp_record *r = &dp->records[record];
        bool let_go = r->state == RECORD_PINNED && r->pins == 0;
        without_pins += let_go;
        if (let_go != (limbo[record] != 0))
            found(findings, "log record %llu (state %u, %u pins): in limbo %u", U(record), r->state, r->pins, limbo[record]);
    }
    if (without_pins != dp->log_limbo_count)
        found(findings, "%llu records are let go, %u are in limbo", U(without_pins), dp->log_limbo_count);
    for (uint32_t user = 0; user < DP_USERS; user++) {
        uint32_t slot = 0, index = 0, page;
        while (lookup_find_use(dp, user, &slot, &index, &page))
            check_use(dp, user == 0 ? "nbd" : "nic", slot, page, limbo, findings);
    }
    free(limbo);
}

/* What overwritten records still refer to. */
static void check_bases(struct datapath *dp, struct check *check)
{
    for (uint64_t record = 0; record < dp->record_count; record++) {
        const struct dp_record *r = &dp->records[record];
        bool current = r->state >= RECORD_LOGGED && r->state <= RECORD_WRITING;
        if (current && MAP_KIND(r->base) == MAP_PBA && store_pba_valid(dp->dedup, MAP_NUMBER(r->base)))
            count_reference(check, MAP_NUMBER(r->base));
    }
}

/* The window's counts, page by page. None is made: where there is no page nothing is counted. False: one must be waited for. */
static bool check_counts(struct datapath *dp, struct check *check)
{
    while (check->place < check->window_end) {
        uint64_t end = (check->place / STORE_COUNTS_PER_PAGE + 1) * STORE_COUNTS_PER_PAGE;
        enum store_want want = store_want_counts(dp->dedup, check->place);
        bool named = false;
        dp->domain->self->progress++;
        if (want == STORE_WAIT) {
            for (uint64_t ahead = 1; ahead < AHEAD && check->place + ahead * STORE_COUNTS_PER_PAGE < check->window_end; ahead++)
                store_want_counts(dp->dedup, check->place + ahead * STORE_COUNTS_PER_PAGE);
            return false;
        }
        for (end = end < check->window_end ? end : check->window_end; check->place < end; check->place++) {
            uint64_t pba = check->place;
            if (!store_pba_valid(dp->dedup, pba))
                continue;
            uint32_t counted = want == STORE_LOST ? 0 : store_references(dp->dedup, pba);
            check->stored += counted != 0;
            check->total += counted;
            if (want == STORE_LOST && !named)
                found(&check->findings, "place %llu: its page of counts is damaged", U(pba));
            else if (want == STORE_HAVE && check->references[pba - check->window] != counted)
                found(&check->findings, "place %llu: %u references, map and log have %u", U(pba), counted,
                      check->references[pba - check->window]);
            named = true;
        }
    }
    return true;
}

static void check_sums(struct datapath *dp, struct check *check)
{
    const struct store_space *space = &check->space;
    if (check->total != space->references)
        found(&check->findings, "%llu references, the sum says %llu", U(check->total), U(space->references));
    uint64_t writing = 0;
    for (uint32_t number = 0; number < DP_RUNS; number++) {
        const struct dp_run *run = &dp->arena->runs[number];
        if (run->state >= RUN_WRITING && run->done < run->writer_count)
            writing += run->writer_count - run->done;
    }
    if (check->stored + writing != space->stored_blocks)
        found(&check->findings, "%llu places are referred to, %llu are being written, the store has %llu", U(check->stored), U(writing),
              U(space->stored_blocks));
    if (!store_groups_agree(dp->dedup))
        found(&check->findings, "free, pending and stored blocks of the groups are not what the sums say");
    if (check->reservations + space->zero_promises != space->reserved_blocks)
        found(&check->findings, "%llu logged blocks and %llu promises, %llu reservations", U(check->reservations),
              U(space->zero_promises), U(space->reserved_blocks));
}

static uint32_t end_check(struct datapath *dp)
{
    uint32_t count = dp->check->findings.count;
    free(dp->check->references);
    free(dp->check->named);
    free(dp->check);
    dp->check = 0;
    return count;
}

static bool begin_window(struct check *check, uint64_t from)
{
    check->window = check->place = from;
    check->window_end = check->space.device_blocks - from < WINDOW_BLOCKS ? check->space.device_blocks : from + WINDOW_BLOCKS;
    check->volume = 0;
    check->leaf = check->mapped = 0;
    check->maps_done = false;
    free(check->references);
    check->references = calloc(check->window_end - from, sizeof *check->references);
    return check->references != 0;
}

static void check_tier(struct datapath *dp, struct findings *findings)
{
    const struct tier *tier = &dp->tier;
    uint64_t used = 0, copying = 0, writing = 0;
    for (uint32_t copy = 0; copy < TIER_COPIES; copy++)
        writing += tier->area->copies[copy].state == COPY_WRITING;
    for (uint64_t place = 0; place < tier->area->places; place++) {
        const struct tier_entry *entry = &tier->entries[place];
        bool found_there = entry->pba != 0 && tier_find(dp, entry->pba) == place;
        used += entry->state != TIER_FREE;
        copying += entry->state == TIER_COPYING || entry->state == TIER_LEAVING;
        if (found_there != (entry->state == TIER_COPYING || entry->state == TIER_VALID) ||
            (tier->taken[place / 64] >> place % 64 & 1) != (entry->state != TIER_FREE))
            found(findings, "fast place %llu: state %u, place %llu is found at %u", U(place), entry->state, U(entry->pba),
                  entry->pba == 0 ? TIER_NONE : tier_find(dp, entry->pba));
    }
    if (used != tier->area->used || copying != writing)
        found(findings, "fast tier: %llu places are used, its count says %llu; %llu are being written, %llu copies are", U(used),
              U(tier->area->used), U(copying), U(writing));
}

uint32_t datapath_check(struct datapath *dp, char *text, uint64_t bytes)
{
    struct check *check = dp->check;
    if (check == 0) {
        text[0] = 0;
        check = dp->check = calloc(1, sizeof *check);
        if (check == 0)
            abort(); /* some hundred bytes */
        check->findings = (struct findings){.text = text, .bytes = bytes};
        if (store_state(dp->dedup) != STORE_READY) {
            found(&check->findings, "the store is not loaded");
            return end_check(dp);
        }
        store_space(dp->dedup, &check->space);
        check->named = calloc(dp->record_count, 1);
        if (check->named == 0 || !begin_window(check, 0)) {
            found(&check->findings, "out of memory");
            return end_check(dp);
        }
    }
    for (;;) {
        if (!check->maps_done) {
            if (!check_maps(dp, check))
                return DP_CHECK_WAITS;
            check->maps_done = true;
            check_bases(dp, check);
            if (check->window == 0) {
                check_records(dp, check);
                check_pins(dp, &check->findings);
                check_uses(dp, &check->findings);
                check_tier(dp, &check->findings);
            }
        }
        if (!check_counts(dp, check))
            return DP_CHECK_WAITS;
        if (check->window_end == check->space.device_blocks)
            break;
        if (!begin_window(check, check->window_end)) {
            found(&check->findings, "out of memory");
            return end_check(dp);
        }
    }
    check_sums(dp, check);
    return end_check(dp);
}

void datapath_check_cancel(struct datapath *dp)
{
    if (dp->check != 0)
        end_check(dp);
}
