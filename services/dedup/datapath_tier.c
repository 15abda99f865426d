/* The fast tier's entries: finding, entering, leaving, copying. See datapath_tier.h; the device itself: datapath_tier_device.c. */
#include "services/dedup/datapath_tier.h"

#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

/* Of an entry that was read from the device: as of a block that has just got 8 references. */
#define LOADED_WEIGHT 4

static uint32_t *bucket_of(const struct tier *tier, uint64_t pba)
{
    return &tier->heads[(pba * 0x9e3779b97f4a7c15u >> 32) & (tier->area->buckets - 1)];
}

static bool readable(const struct tier *tier) { return tier->area->state == TIER_LOADING || tier->area->state == TIER_ONLINE; }

uint32_t tier_find(const struct datapath *dp, uint64_t pba)
{
    const struct tier *tier = &dp->tier;
    if (tier->area->places == 0)
        return TIER_NONE;
    uint32_t place = *bucket_of(tier, pba);
    while (place != TIER_NONE && tier->entries[place].pba != pba)
        place = tier->entries[place].next;
    return place;
}

uint32_t tier_readable(const struct datapath *dp, uint64_t pba)
{
    if (!readable(&dp->tier))
        return TIER_NONE;
    uint32_t place = tier_find(dp, pba);
    return place != TIER_NONE && dp->tier.entries[place].state == TIER_VALID ? place : TIER_NONE;
}

void tier_served(struct datapath *dp, uint32_t place)
{
    struct tier_entry *entry = &dp->tier.entries[place];
    uint32_t credit = (uint32_t)entry->credit + entry->weight;
    entry->credit = (uint8_t)(credit < TIER_CREDIT_MAX ? credit : TIER_CREDIT_MAX);
}

/* --- Entering and leaving ------------------------------------------------------------------------------------------------ */

void tier_dirty(struct datapath *dp, uint64_t place)
{
    uint64_t page = place / FORMAT_TIER_ENTRIES, *word = &dp->tier.dirty[page / 64], bit = (uint64_t)1 << page % 64;
    if (!(*word & bit))
        dp_set64(dp, word, *word | bit);
}

static void enter(struct datapath *dp, uint32_t place, uint64_t pba, struct fingerprint print, enum tier_entry_state state,
                  uint32_t weight)
{
    struct tier *tier = &dp->tier;
    struct tier_entry *entry = &tier->entries[place];
    uint32_t *head = bucket_of(tier, pba);
    assert(entry->state == TIER_FREE);
    atoll_save(dp->journal, entry, sizeof *entry);
    *entry = (struct tier_entry){.pba = pba, .print = print, .next = *head, .state = (uint16_t)state,
                                 .credit = (uint8_t)weight, .weight = (uint8_t)weight};
    dp_set32(dp, head, place);
    dp_set64(dp, &tier->taken[place / 64], tier->taken[place / 64] | (uint64_t)1 << place % 64);
    dp_set64(dp, &tier->area->used, tier->area->used + 1);
}

static void set_free(struct datapath *dp, uint32_t place)
{
    struct tier *tier = &dp->tier;
    atoll_save(dp->journal, &tier->entries[place], sizeof tier->entries[place]);
    tier->entries[place] = (struct tier_entry){.next = TIER_NONE};
    dp_set64(dp, &tier->taken[place / 64], tier->taken[place / 64] & ~((uint64_t)1 << place % 64));
    dp_set64(dp, &tier->area->used, tier->area->used - 1);
}

/* Nobody finds the copy any more. Its place is free at once, or when the write that is under way has ended. */
static void leave(struct datapath *dp, uint32_t place)
{
    struct tier *tier = &dp->tier;
    struct tier_entry *entry = &tier->entries[place];
    assert(entry->state == TIER_VALID || entry->state == TIER_COPYING);
    uint32_t *link = bucket_of(tier, entry->pba);
    while (*link != place) {
        assert(*link != TIER_NONE);
        link = &tier->entries[*link].next;
    }
    dp_set32(dp, link, entry->next);
    if (entry->state == TIER_VALID) {
        set_free(dp, place);
        tier_dirty(dp, place);
        return;
    }
    atoll_save(dp->journal, entry, sizeof *entry);
    *entry = (struct tier_entry){.next = TIER_NONE, .state = TIER_LEAVING};
}

void tier_drop(struct datapath *dp, uint64_t pba)
{
    uint32_t place = tier_find(dp, pba);
    if (place == TIER_NONE)
        return;
    ATOLL_CRASH_POINT(dp->domain, "dedup.tier.drop");
    leave(dp, place);
}

void datapath_freed(struct dedup *dedup, uint64_t pba)
{
    if (dedup->datapath == 0)
        return;
    tier_drop(dedup->datapath, pba);
    destage_freed(dedup->datapath, pba);
}

void tier_read_failed(struct datapath *dp, uint64_t pba, uint64_t block, uint32_t status)
{
    uint32_t place = tier_find(dp, pba);
    if (place == TIER_NONE || tier_block(&dp->tier, place) != block)
        return; /* it has left meanwhile, and what was read is of its successor there */
    atoll_count(dp->domain, status == ATOLL_ECORRUPT ? DEDUP_COUNTER_TIER_MISMATCHES : DEDUP_COUNTER_TIER_READ_ERRORS, 1);
    leave(dp, place);
}

bool tier_enter_loaded(struct datapath *dp, uint64_t place, const struct format_tier_entry *found)
{
    struct tier *tier = &dp->tier;
    if (place >= tier->area->places || tier->entries[place].state != TIER_FREE || !store_pba_valid(dp->dedup, found->pba) ||
        tier_find(dp, found->pba) != TIER_NONE)
        return false;
    struct fingerprint print = {.low = found->print_low, .high = found->print_high};
    enter(dp, (uint32_t)place, found->pba, print, TIER_VALID, LOADED_WEIGHT);
    return true;
}

bool tier_clear_some(struct datapath *dp)
{
    struct tier *tier = &dp->tier;
    uint32_t cleared = 0;
    for (uint64_t word = 0; word < (tier->area->places + 63) / 64; word++)
        for (uint64_t bits = tier->taken[word]; bits != 0; bits &= bits - 1) {
            uint32_t place = (uint32_t)(word * 64 + (uint64_t)__builtin_ctzll(bits));
            if (tier->entries[place].state == TIER_LEAVING)
                continue;
            leave(dp, place);
            if (++cleared == 256)
                return true;
        }
    return false;
}

/* --- A place for a newcomer ------------------------------------------------------------------------------------------------ */

static uint32_t free_place(struct datapath *dp)
{
    struct tier *tier = &dp->tier;
    uint64_t words = (tier->area->places + 63) / 64, word = tier->area->free_cursor % words;
    for (uint64_t looked = 0; looked < words; looked++, word = word + 1 == words ? 0 : word + 1) {
        uint64_t bits = ~tier->taken[word];
        uint64_t place = word * 64 + (bits == 0 ? 64 : (uint64_t)__builtin_ctzll(bits));
        if (bits == 0 || place >= tier->area->places)
            continue;
        dp_set64(dp, &tier->area->free_cursor, word);
        return (uint32_t)place;
    }
    return TIER_NONE;
}

/* Somebody reads the copy just now: what takes its place would be read instead, and the reader would have to read again. */
static bool being_read(const struct datapath *dp, const struct tier_entry *entry)
{
    uint32_t page = cache_find(dp, entry->pba);
    return page != DP_NONE && page_in_tier(dp, page) && dp->pages[page].state == PAGE_LOADING;
}

/* Turns out the least useful of those that the hand passes, if it is less so than a newcomer with `credit`. */
static uint32_t evict(struct datapath *dp, uint32_t credit)
{
    struct tier *tier = &dp->tier;
    uint64_t hand = tier->area->hand;
    uint32_t victim = TIER_NONE, least = credit;
    for (uint32_t looked = 0; looked < TIER_HAND_ENTRIES && least != 0; looked++) {
        struct tier_entry *entry = &tier->entries[hand];
        uint32_t place = (uint32_t)hand;
        hand = hand + 1 == tier->area->places ? 0 : hand + 1;
        if (entry->state != TIER_VALID || being_read(dp, entry))
            continue;
        if (entry->credit < least) {
            least = entry->credit;
            victim = place;
        }
        if (entry->credit != 0)
            entry->credit--;
    }
    dp_set64(dp, &tier->area->hand, hand);
    if (victim == TIER_NONE) {
        atoll_count(dp->domain, DEDUP_COUNTER_TIER_KEPT_OUT, 1);
        return TIER_NONE;
    }
    ATOLL_CRASH_POINT(dp->domain, "dedup.tier.evict");
    atoll_count(dp->domain, DEDUP_COUNTER_TIER_EVICTIONS, 1);
    leave(dp, victim);
    return victim;
}

/* --- Copying ---------------------------------------------------------------------------------------------------------------- */

/* `refused`: references that the block would have if short runs were shared. */
static void consider(struct datapath *dp, uint32_t volume, uint64_t pba, uint32_t refused)
{
    struct tier *tier = &dp->tier;
    struct tier_area *area = tier->area;
    if (area->state != TIER_ONLINE || tier->closing || tier->recent[pba % 64] == pba || tier_find(dp, pba) != TIER_NONE)
        return;
    if (store_want_blocks(dp->dedup, &pba, 1) != STORE_HAVE ||
        store_references(dp->dedup, pba) + refused < dp->dedup->public->volumes[volume].tier_threshold)
        return;
    if (area->queue_tail - area->queue_head == TIER_QUEUE) {
        atoll_count(dp->domain, DEDUP_COUNTER_TIER_SKIPPED, 1);
        return;
    }
    tier->recent[pba % 64] = pba;
    dp_set64(dp, &area->queue[area->queue_tail % TIER_QUEUE], pba);
    dp_set64(dp, &area->queue_tail, area->queue_tail + 1);
}

void tier_consider(struct datapath *dp, uint32_t volume, uint64_t pba) { consider(dp, volume, pba, 0); }

void tier_refused(struct datapath *dp, uint32_t volume, uint64_t pba, struct fingerprint print)
{
    struct tier *tier = &dp->tier;
    if (tier->area->state != TIER_ONLINE)
        return;
    uint8_t *demand = &tier->demand[print.low % TIER_DEMAND];
    if (++tier->refused % TIER_DEMAND == 0)
        for (uint32_t index = 0; index < TIER_DEMAND; index++)
            tier->demand[index] /= 2;
    if (*demand != UINT8_MAX)
        ++*demand;
    consider(dp, volume, pba, *demand);
}

static void set_copy(struct datapath *dp, struct tier_copy *copy, struct tier_copy value)
{
    atoll_save(dp->journal, copy, sizeof *copy);
    *copy = value;
}
_Static_assert(sizeof(struct tier_copy) % 8 == 0, "saved by words");

static void give_up_copy(struct datapath *dp, struct tier_copy *copy)
{
    cache_unpin(dp, copy->page);
    set_copy(dp, copy, (struct tier_copy){0});
}

/* The block is in memory: to a place of its own. */
static void write_copy(struct datapath *dp, uint32_t number)
{
    struct tier *tier = &dp->tier;
    struct tier_copy *copy = &tier->area->copies[number];
    const struct dp_page *page = &dp->pages[copy->page];
    uint32_t references = store_want_blocks(dp->dedup, &copy->pba, 1) == STORE_HAVE ? store_references(dp->dedup, copy->pba) : 0;
    if (page->state != PAGE_VALID || !page->attached || page->pba != copy->pba || references == 0 || tier->area->state != TIER_ONLINE ||
        tier_find(dp, copy->pba) != TIER_NONE) {
        give_up_copy(dp, copy);
        return;
    }
    uint32_t weight = 1 + (uint32_t)(31 - __builtin_clz(references));
    uint32_t place = tier->area->used < tier->area->places ? free_place(dp) : evict(dp, weight);
    if (place == TIER_NONE) {
        give_up_copy(dp, copy);
        return;
    }
    struct atoll_segment segment = {.address = page_address(dp, copy->page), .length = DP_BLOCK};
    ATOLL_CRASH_POINT(dp->domain, "dedup.tier.copy");
    enter(dp, place, copy->pba, page->print, TIER_COPYING, weight);
    set_copy(dp, copy, (struct tier_copy){.state = COPY_WRITING, .page = copy->page, .pba = copy->pba, .place = place});
    bool sent = tier_submit(dp, IO_TIER, (uint64_t)TIER_IO_COPY << 56 | number, ATOLL_OP_IO_WRITE, tier_block(tier, place), &segment, 1);
    assert(sent); /* tier_copies_step looked for room */
}

void tier_forget_copy(struct datapath *dp, uint32_t place)
{
    if (dp->tier.entries[place].state == TIER_COPYING)
        leave(dp, place);
    set_free(dp, place);
    tier_dirty(dp, place); /* the device's table may name what was there before */
}

void tier_copy_done(struct datapath *dp, uint32_t number, uint32_t status)
{
    struct tier *tier = &dp->tier;
    struct tier_copy *copy = &tier->area->copies[number];
    uint32_t place = (uint32_t)copy->place;
    struct tier_entry *entry = &tier->entries[place];
    assert(copy->state == COPY_WRITING && (entry->state == TIER_COPYING || entry->state == TIER_LEAVING));
    if (entry->state == TIER_COPYING && status == ATOLL_OK) {
        ATOLL_CRASH_POINT(dp->domain, "dedup.tier.valid");
        atoll_save(dp->journal, entry, sizeof *entry);
        entry->state = TIER_VALID; /* with the commit of this step every reader finds it here */
        tier_dirty(dp, place);
        atoll_count(dp->domain, DEDUP_COUNTER_TIER_COPIED_BLOCKS, 1);
    } else {
        tier_forget_copy(dp, place);
    }
    give_up_copy(dp, copy);
}

bool tier_copies_step(struct datapath *dp)
{
    struct tier *tier = &dp->tier;
    struct tier_area *area = tier->area;
    bool did = false, begin = area->state == TIER_ONLINE && !tier->closing;
    for (uint32_t number = 0; number < TIER_COPIES; number++) {
        struct tier_copy *copy = &area->copies[number];
        if (copy->state == COPY_READING && dp->pages[copy->page].state != PAGE_LOADING && tier_room(dp) != 0) {
            write_copy(dp, number);
            did = true;
        }
        if (!begin || copy->state != COPY_FREE || area->queue_head == area->queue_tail)
            continue;
        uint64_t pba = area->queue[area->queue_head % TIER_QUEUE], failed;
        uint32_t page = DP_NONE;
        enum store_want want = store_want_blocks(dp->dedup, &pba, 1);
        if (want == STORE_WAIT) {
            begin = false; /* a page of counts is being read: later */
            continue;
        }
        if (want == STORE_HAVE && store_references(dp->dedup, pba) != 0 && tier_find(dp, pba) == TIER_NONE &&
            !cache_load(dp, IO_TIER, &pba, 1, &page, &failed)) {
            if (failed == 0) { /* no page or no I/O slot: later */
                begin = false;
                continue;
            }
            page = DP_NONE;
        }
        if (page != DP_NONE)
            set_copy(dp, copy, (struct tier_copy){.state = COPY_READING, .page = page, .pba = pba});
        if (tier->recent[pba % 64] == pba)
            tier->recent[pba % 64] = 0;
        dp_set64(dp, &area->queue_head, area->queue_head + 1);
        did = true;
    }
    return did;
}
