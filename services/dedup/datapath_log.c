/*
 * The write log: records, their list in the order of destage, and what becomes of their pages.
 *
 *   log_append, log_drop              a block gets new content; loses it
 *   log_equal                         another block with the same content
 *   log_unlink, log_requeue           into a run; back
 *   log_release, log_unpin            nobody needs the record; a reader has finished with it
 *   log_settle                        frees what nobody uses
 *   give_back, give_flush             nic's pages to nic, 8 per message
 *   merge_take, merge_put             dedup's own pages
 *
 * After a crash: everything here is transactional; the stack of free merge pages and the list of those to be settled are made
 * again from the records.
 */
#include <stdlib.h>

#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

/* Records of one content that log_equal looks at. */
#define EQUALS_LOOKED 8

static void set_state(struct datapath *dp, uint32_t record, enum record_state state)
{
    dp_set32(dp, &dp->records[record].state, state);
}

static struct dp_record *at(struct datapath *dp, uint32_t record)
{
    assert(record < dp->record_count);
    return &dp->records[record];
}

uint32_t log_record_of(const struct datapath *dp, uint64_t value)
{
    uint64_t number = MAP_NUMBER(value);
    assert(MAP_KIND(value) == MAP_LOG && number < dp->record_count);
    return (uint32_t)number;
}

bool log_has_reservation(const struct datapath *dp, uint64_t value)
{
    if (MAP_KIND(value) != MAP_LOG)
        return false;
    uint32_t state = dp->records[log_record_of(dp, value)].state;
    return state == RECORD_LOGGED || state == RECORD_MATCHING;
}

uint64_t datapath_record_base(struct dedup *dedup, uint64_t record)
{
    struct datapath *dp = dedup->datapath;
    assert(record < dp->record_count);
    return dp->records[record].base;
}

/* --- List ---------------------------------------------------------------------------------------------------------- */

static void set_next(struct datapath *dp, uint32_t record, uint32_t next)
{
    dp_set32(dp, record == DP_NONE ? &dp->arena->log_head : &at(dp, record)->next, next);
}

static void set_previous(struct datapath *dp, uint32_t record, uint32_t previous)
{
    dp_set32(dp, record == DP_NONE ? &dp->arena->log_tail : &at(dp, record)->previous, previous);
}

/* Links `record`, whose own links may be written directly or not: they are journaled here. */
static void link_between(struct datapath *dp, uint32_t record, uint32_t previous, uint32_t next)
{
    dp_set32(dp, &at(dp, record)->previous, previous);
    dp_set32(dp, &at(dp, record)->next, next);
    set_next(dp, previous, record);
    set_previous(dp, next, record);
}

/* In the list, and to be destaged together with others. */
static bool is_listed(const struct dp_record *r)
{
    return r->state == RECORD_LOGGED && !(r->flags & (RECORD_ASIDE | RECORD_SUSPECT));
}

uint32_t log_find(const struct datapath *dp, struct log_cursor *cursor, uint32_t volume, uint64_t lba)
{
    if (cursor->leaf_end == 0 || cursor->volume != volume || lba - (cursor->leaf_end - 512) >= 512)
        *cursor = (struct log_cursor){.volume = volume, .leaf_end = (lba | 511) + 1, .leaf = store_map_leaf(dp->dedup, volume, lba / 512)};
    uint64_t value = cursor->leaf == 0 ? 0 : cursor->leaf[lba % 512];
    if (MAP_KIND(value) != MAP_LOG)
        return DP_NONE;
    uint32_t record = log_record_of(dp, value);
    return is_listed(&dp->records[record]) ? record : DP_NONE;
}

/* --- Equal blocks -----------------------------------------------------------------------------------------------------
 *
 * Sets of one cache line: a tag of the fingerprint and the newest record that had it; from there through equal_next to older ones.
 * Nothing is taken out: an entry counts for what its record is now. */

#define EQUAL_WAYS 8

static uint64_t *equal_set(const struct datapath *dp, struct fingerprint print)
{
    return &dp->equal_sets[(print.low & dp->equal_mask) * EQUAL_WAYS];
}

static uint32_t equal_tag(struct fingerprint print) { return (uint32_t)print.high | 1; /* 0: an empty entry */ }

static void equal_attach(struct datapath *dp)
{
    uint64_t sets = 1;
    while (sets * EQUAL_WAYS < dp->record_count)
        sets *= 2;
    dp->equal_mask = sets - 1;
    dp->equal_sets = aligned_alloc(64, sets * EQUAL_WAYS * sizeof *dp->equal_sets);
    dp->equal_next = calloc(dp->record_count, sizeof *dp->equal_next);
    for (uint32_t turn = 0; turn < DP_EQUAL_LATE; turn++)
        dp->equal_late[turn] = DP_NONE;
    if (dp->equal_sets == 0 || dp->equal_next == 0)
        abort(); /* less than a MiB at the start of a process */
    memset(dp->equal_sets, 0, sets * EQUAL_WAYS * sizeof *dp->equal_sets);
}

static void equal_enter(struct datapath *dp, uint32_t record)
{
    struct fingerprint print = at(dp, record)->print;
    uint64_t *set = equal_set(dp, print);
    uint32_t tag = equal_tag(print), way = 0;
    while (way < EQUAL_WAYS && set[way] >> 32 != tag)
        way++;
    uint32_t older = way < EQUAL_WAYS ? (uint32_t)set[way] : DP_NONE;
    dp->equal_next[record] = older != record ? older : DP_NONE;
    if (way == EQUAL_WAYS) /* in the place of any: which one is chance enough */
        way = record % EQUAL_WAYS;
    set[way] = (uint64_t)tag << 32 | record;
}

/* Its set is asked for now, and looked at when some more records have come. */
static void equal_add(struct datapath *dp, uint32_t record)
{
    uint32_t *late = &dp->equal_late[dp->equal_turn++ % DP_EQUAL_LATE];
    __builtin_prefetch(equal_set(dp, at(dp, record)->print), 1);
    if (*late != DP_NONE)
        equal_enter(dp, *late);
    *late = record;
}

void log_know_equals(struct datapath *dp)
{
    for (uint32_t each = 0; each < DP_EQUAL_LATE; each++) { /* the oldest first: the newest is found first */
        uint32_t *late = &dp->equal_late[(dp->equal_turn + each) % DP_EQUAL_LATE];
        if (*late != DP_NONE)
            equal_enter(dp, *late);
        *late = DP_NONE;
    }
}

void log_prefetch_equal(const struct datapath *dp, struct fingerprint print) { __builtin_prefetch(equal_set(dp, print)); }

uint32_t log_equal(const struct datapath *dp, struct fingerprint print)
{
    const uint64_t *set = equal_set(dp, print);
    uint32_t tag = equal_tag(print), record = DP_NONE;
    for (uint32_t way = 0; way < EQUAL_WAYS && record == DP_NONE; way++)
        if (set[way] >> 32 == tag)
            record = (uint32_t)set[way];
    for (uint32_t looked = 0; record != DP_NONE && looked < EQUALS_LOOKED; looked++, record = dp->equal_next[record])
        if (is_listed(&dp->records[record]) && print_equal(dp->records[record].print, print))
            return record;
    return DP_NONE;
}

void log_unlink(struct datapath *dp, uint32_t record)
{
    struct dp_record *r = at(dp, record);
    assert(r->state == RECORD_LOGGED && !(r->flags & RECORD_ASIDE));
    set_next(dp, r->previous, r->next);
    set_previous(dp, r->next, r->previous);
}

void log_requeue(struct datapath *dp, uint32_t record)
{
    struct dp_record *r = at(dp, record);
    uint32_t previous = DP_NONE, next = dp->arena->log_head;
    assert(r->state == RECORD_MATCHING || r->state == RECORD_WRITING);
    /* It was taken out of the middle perhaps: its neighbour of then may still be there, or another that comes before it. */
    if (r->previous < dp->record_count && is_listed(at(dp, r->previous)) && at(dp, r->previous)->order < r->order) {
        previous = r->previous;
        next = at(dp, previous)->next;
    }
    while (next != DP_NONE && at(dp, next)->order < r->order) {
        previous = next;
        next = at(dp, next)->next;
    }
    link_between(dp, record, previous, next);
    set_state(dp, record, RECORD_LOGGED);
}

/* --- Flags ---------------------------------------------------------------------------------------------------------- */

static void set_flags(struct datapath *dp, uint32_t record, uint16_t flags)
{
    struct dp_record *r = at(dp, record);
    const uint16_t no_failure = RECORD_SUSPECT | RECORD_CONDEMNED;
    bool was = (r->flags & ~no_failure) != 0, is = (flags & ~no_failure) != 0;
    if (r->flags == flags)
        return;
    bool was_aside = (r->flags & RECORD_ASIDE) != 0, is_aside = (flags & RECORD_ASIDE) != 0;
    uint64_t *word = (uint64_t *)(void *)&r->volume; /* volume, flags and logged_ms share an aligned word */
    atoll_save(dp->journal, word, 8);
    r->flags = flags;
    if (was != is)
        dp_set64(dp, &dp->arena->failed_records, dp->arena->failed_records + (is ? 1 : (uint64_t)-1));
    if (was_aside != is_aside) {
        dp_set64(dp, &dp->arena->aside_records, dp->arena->aside_records + (is_aside ? 1 : (uint64_t)-1));
        dp_set32(dp, &dp->arena->aside[r->volume], dp->arena->aside[r->volume] + (is_aside ? 1 : (uint32_t)-1));
    }
}
_Static_assert(offsetof(struct dp_record, volume) % 8 == 0, "saved as a word");

void log_clear_flags(struct datapath *dp, uint32_t record) { set_flags(dp, record, 0); }

void log_set_flag(struct datapath *dp, uint32_t record, uint16_t flag)
{
    struct dp_record *r = at(dp, record);
    if ((flag & RECORD_ASIDE) && r->state == RECORD_LOGGED && !(r->flags & RECORD_ASIDE))
        log_unlink(dp, record); /* it will never be destaged; it stays what the map names */
    if (flag == RECORD_CORRUPT)
        lookup_retire(dp, record); /* who reads it must be told */
    set_flags(dp, record, r->flags | flag);
}

/* --- Pages that are not needed ------------------------------------------------------------------------------------------ */

static void set_held(struct datapath *dp, uint32_t page, uint8_t value)
{
    uint8_t *byte = &dp->held[page];
    uint64_t *word = (uint64_t *)(uintptr_t)((uintptr_t)byte & ~(uintptr_t)7);
    uint64_t mask = (uint64_t)0xff << 8 * ((uintptr_t)byte & 7);
    uint64_t bits = (uint64_t)value << 8 * ((uintptr_t)byte & 7);
    dp_set64(dp, word, (*word & ~mask) | bits); /* little-endian, as is every machine Atoll runs on */
}
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "set_held");

void log_hold(struct datapath *dp, uint32_t page, bool hold) { set_held(dp, page, hold); }

static bool give_message(struct datapath *dp, const uint32_t *pages, uint32_t count)
{
    struct atoll_descriptor message = {.opcode = ATOLL_OP_GIVE_BACK, .segment_count = (uint16_t)count};
    for (uint32_t index = 0; index < count; index++)
        message.halves[index] = pages[index];
    /* After an adoption nic learns from `held` which pages it has lent, once, before it serves (0 until then). */
    if (atoll_load_acquire(&dp->domain->peers[ATOLL_ROLE_NIC]->serving_ns) == 0)
        return false;
    struct atoll_tx_ring *ring = &dp->domain->rings->tx[ATOLL_ROLE_NIC];
    if (!atoll_ring_has_room(ring, ring->mask / 2 + 2)) /* the other half is for posted writes, each of which has an END */
        return false;
    ATOLL_CRASH_POINT(dp->domain, "dedup.give_back");
    if (!atoll_domain_put(dp->domain, ATOLL_ROLE_NIC, &message))
        return false;
    atoll_count(dp->domain, DEDUP_COUNTER_GIVEN_BACK_PAGES, count);
    return true;
}

/* Sends what has been collected; if the ring is full the pages go to the RETURNING list. */
static void give_send(struct datapath *dp)
{
    struct dp_arena *arena = dp->arena;
    if (dp->give_count == 0)
        return;
    bool sent = arena->returning == DP_NONE && give_message(dp, dp->give, dp->give_count);
    for (uint32_t index = 0; index < dp->give_count; index++) {
        uint32_t page = dp->give[index];
        if (sent) {
            if (dp->held[page])
                set_held(dp, page, 0);
            continue;
        }
        if (!dp->held[page])
            set_held(dp, page, 1);
        dp_set32(dp, &at(dp, page)->next, arena->returning);
        set_state(dp, page, RECORD_RETURNING);
        dp_set32(dp, &arena->returning, page);
    }
    dp->give_count = 0;
}

void give_back(struct datapath *dp, uint32_t page)
{
    assert(page < dp->arena->nic_pages && at(dp, page)->state == RECORD_FREE);
    dp->give[dp->give_count++] = page;
    if (dp->give_count == 8)
        give_send(dp);
}

void give_flush(struct datapath *dp)
{
    struct dp_arena *arena = dp->arena;
    while (arena->returning != DP_NONE && dp->journal->count < DP_STEP_JOURNAL) {
        uint32_t pages[8], count = 0;
        for (uint32_t page = arena->returning; page != DP_NONE && count < 8; page = at(dp, page)->next)
            pages[count++] = page;
        uint32_t rest = at(dp, pages[count - 1])->next;
        if (!give_message(dp, pages, count))
            break;
        for (uint32_t index = 0; index < count; index++) {
            set_state(dp, pages[index], RECORD_FREE);
            set_held(dp, pages[index], 0);
        }
        dp_set32(dp, &arena->returning, rest);
    }
    give_send(dp);
}

static void free_record(struct datapath *dp, uint32_t record)
{
    set_state(dp, record, RECORD_FREE);
    dp_set64(dp, &dp->arena->log_records, dp->arena->log_records - 1);
    if (record < dp->arena->nic_pages)
        give_back(dp, record);
    else
        merge_put(dp, record);
}

void log_release(struct datapath *dp, uint32_t record)
{
    log_clear_flags(dp, record);
    lookup_retire(dp, record);
    set_state(dp, record, RECORD_PINNED);
    dp_set64(dp, &dp->arena->pinned_records, dp->arena->pinned_records + 1);
    if (at(dp, record)->pins == 0)
        dp->log_limbo[dp->log_limbo_count++] = record;
}

bool log_settle(struct datapath *dp)
{
    uint32_t kept = 0;
    if (dp->log_limbo_count == 0)
        return false;
    lookup_uses(dp);
    for (uint32_t index = 0; index < dp->log_limbo_count; index++) {
        uint32_t record = dp->log_limbo[index];
        if (lookup_in_use(dp, record) || dp->journal->count >= 2 * DP_STEP_JOURNAL) {
            dp->log_limbo[kept++] = record;
            continue;
        }
        assert(at(dp, record)->state == RECORD_PINNED && at(dp, record)->pins == 0);
        dp_set64(dp, &dp->arena->pinned_records, dp->arena->pinned_records - 1);
        free_record(dp, record);
    }
    dp->log_limbo_count = kept;
    return dp->journal->count >= 2 * DP_STEP_JOURNAL;
}

void log_unpin(struct datapath *dp, uint32_t record)
{
    struct dp_record *r = at(dp, record);
    assert(r->pins != 0);
    dp_set32(dp, &r->pins, r->pins - 1);
    if (r->pins == 0 && r->state == RECORD_PINNED)
        dp->log_limbo[dp->log_limbo_count++] = record;
}

/* --- Content ---------------------------------------------------------------------------------------------------------- */

/* `old` is not what the map names any more. Its order and list place go to `heir` (DP_NONE: none) if it was in the list;
 * returns true in that case. */
static bool supersede(struct datapath *dp, uint32_t old, uint32_t heir)
{
    struct dp_record *r = at(dp, old);
    atoll_count(dp->domain, DEDUP_COUNTER_SUPERSEDED_BLOCKS, 1);
    dp_note_leaving(dp, true);
    if (r->state == RECORD_MATCHING || r->state == RECORD_WRITING) {
        log_clear_flags(dp, old);
        set_state(dp, old, RECORD_DROPPED);
        return false;
    }
    assert(r->state == RECORD_LOGGED);
    bool listed = !(r->flags & RECORD_ASIDE);
    if (listed && heir != DP_NONE) {
        at(dp, heir)->order = r->order; /* saved by log_append */
        at(dp, heir)->logged_ms = r->logged_ms;
        link_between(dp, heir, r->previous, r->next);
    } else if (listed) {
        log_unlink(dp, old);
    }
    log_release(dp, old);
    return listed && heir != DP_NONE;
}

uint32_t log_append(struct datapath *dp, uint32_t record, uint32_t volume, uint64_t lba, struct fingerprint print)
{
    struct dp_arena *arena = dp->arena;
    struct dp_record *r = at(dp, record);
    uint64_t old = 0;
    assert(r->state == RECORD_FREE && r->pins == 0);
    uint32_t status = (uint32_t)store_map_log(dp->dedup, volume, lba, record, &old);
    if (status != ATOLL_OK)
        return status;

    lookup_note(dp, volume, lba, record); /* takes away what was there, too */
    atoll_save(dp->journal, r, sizeof *r);
    r->lba = lba;
    r->volume = (uint16_t)volume;
    r->flags = 0;
    r->print = print;
    r->order = arena->next_order;
    r->logged_ms = (uint32_t)dp->now_ms;
    r->state = RECORD_LOGGED;
    r->pins = 0;
    bool placed = false;
    if (MAP_KIND(old) == MAP_LOG) {
        uint32_t before = log_record_of(dp, old);
        r->base = at(dp, before)->base;
        placed = supersede(dp, before, record);
    } else {
        r->base = old;
    }
    equal_add(dp, record);
    if (dp->shared)
        reuse_note(dp->reuse, volume, lba, dp->now_ms);
    if (!placed) {
        link_between(dp, record, arena->log_tail, DP_NONE);
        dp_set64(dp, &arena->next_order, arena->next_order + 1);
    }
    dp_set64(dp, &arena->log_records, arena->log_records + 1);
    if (record < arena->nic_pages)
        set_held(dp, record, 1);
    return ATOLL_OK;
}

bool log_drop(struct datapath *dp, uint32_t record)
{
    uint32_t state = at(dp, record)->state;
    supersede(dp, record, DP_NONE);
    return state == RECORD_LOGGED || state == RECORD_MATCHING;
}

/* --- Merge pages ------------------------------------------------------------------------------------------------------ */

void log_attach(struct datapath *dp)
{
    equal_attach(dp);
    dp->merge_free_count = dp->merge_freed_count = dp->log_limbo_count = 0;
    for (uint64_t record = 0; dp->arena->pinned_records != 0 && record < dp->record_count; record++)
        if (dp->records[record].state == RECORD_PINNED && dp->records[record].pins == 0)
            dp->log_limbo[dp->log_limbo_count++] = (uint32_t)record;
    for (uint64_t record = dp->record_count; record-- > dp->arena->nic_pages;)
        if (dp->records[record].state == RECORD_FREE)
            dp->merge_free[dp->merge_free_count++] = (uint32_t)record;
}

uint32_t merge_take(struct datapath *dp)
{
    return dp->merge_free_count == 0 ? DP_NONE : dp->merge_free[--dp->merge_free_count];
}

void merge_put(struct datapath *dp, uint32_t record) { dp->merge_freed[dp->merge_freed_count++] = record; }

void log_committed(struct datapath *dp)
{
    lookup_committed(dp);
    dp->runs_left = 0;
    if (dp->merge_freed_count != 0)
        dp->retry = true;
    while (dp->merge_freed_count != 0)
        dp->merge_free[dp->merge_free_count++] = dp->merge_freed[--dp->merge_freed_count];
}
