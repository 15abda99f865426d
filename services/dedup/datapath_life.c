/*
 * Life of the datapath: its memory, attaching to it, recovery of what is private, adoption after the death of all.
 *
 * After a crash: datapath_attach makes queues, hash tables and free stacks again from the arena (time: some hundred
 * microseconds; it looks at each cache page, merge page and slot once).
 */
#include <stdio.h>
#include <stdlib.h>

#include "services/dedup/datapath.h"

static uint64_t align(uint64_t bytes, uint64_t to) { return (bytes + to - 1) / to * to; }

struct parts { uint64_t records, pages, held, lookup, tier, end; };

static struct parts parts_of(const struct dp_geometry *geometry)
{
    struct parts parts;
    parts.records = align(sizeof(struct dp_arena), ATOLL_PAGE_BYTES);
    parts.pages = parts.records + (geometry->nic_pages + geometry->merge_pages) * sizeof(struct dp_record);
    uint64_t cached = geometry->cache_pages + geometry->tier_pages;
    parts.held = align(parts.pages + cached * sizeof(struct dp_page), 64);
    parts.lookup = align(parts.held + geometry->nic_pages, ATOLL_PAGE_BYTES);
    parts.tier = parts.lookup + lookup_arena_bytes(geometry->nic_pages + geometry->merge_pages + cached);
    parts.end = align(parts.tier + tier_arena_bytes(geometry->tier_places), ATOLL_PAGE_BYTES);
    return parts;
}

uint64_t datapath_arena_bytes(const struct dp_geometry *geometry) { return parts_of(geometry).end; }

uint64_t datapath_buffer_bytes(const struct dp_geometry *geometry) 
{
    uint64_t staging = geometry->tier_places != 0 ? TIER_STAGING_PAGES * DP_BLOCK : 0;
    return geometry->merge_pages * DP_BLOCK + DP_ZERO_BYTES + staging;
}

/* The buffer area of a peer as its header says, checked against the size that the kernel told. */
static bool buffer_of(const struct atoll_domain *domain, uint32_t role, uint64_t *address, uint64_t *pages)
{
    const struct atoll_arena_header *peer = domain->peers[role];
    if (peer == 0)
        return false;
    uint64_t offset = peer->buffer_offset, bytes = peer->buffer_bytes;
    *address = atoll_arena_address(role) + offset;
    *pages = bytes / DP_BLOCK;
    return offset % DP_BLOCK == 0 && bytes != 0 && atoll_reference_in(domain, role, *address, bytes) &&
           *address >= atoll_arena_address(role);
}

static void *need(uint64_t count, uint64_t size)
{
    void *memory = calloc(count == 0 ? 1 : count, size);
    if (memory == 0)
        abort(); /* a few MiB at the start of a process */
    return memory;
}

static void attach_private(struct datapath *dp)
{
    uint64_t pages = dp->arena->cache_pages + dp->arena->tier_pages;
    uint32_t buckets = 1;
    while (buckets < pages)
        buckets <<= 1;
    dp->cache_mask = buckets - 1;
    dp->cache_heads = need(buckets, sizeof *dp->cache_heads);
    dp->cache_next = need(pages, sizeof *dp->cache_next);
    for (uint32_t number = 0; number < DP_POOLS; number++) {
        dp->pools[number].free = need(dp->pools[number].count, sizeof *dp->pools[number].free);
        dp->pools[number].limbo = need(dp->pools[number].count, sizeof *dp->pools[number].limbo);
        dp->pools[number].queues = s3fifo_open(dp->pools[number].count == 0 ? 1 : dp->pools[number].count);
        if (dp->pools[number].queues == 0)
            abort(); /* as in need */
    }
    dp->page_touched = need(pages, 1);
    dp->page_unasked = need(pages, 1);
    ahead_attach(dp);
    dp->page_waiters = need(pages, sizeof *dp->page_waiters);
    memset(dp->page_waiters, 0xff, pages * sizeof *dp->page_waiters);
    dp->merge_free = need(dp->arena->merge_pages, sizeof *dp->merge_free);
    dp->merge_freed = need(dp->arena->merge_pages, sizeof *dp->merge_freed);
    dp->log_limbo = need(dp->record_count, sizeof *dp->log_limbo);
    dp->inflight_heads = need(DP_INFLIGHT_HEADS, sizeof *dp->inflight_heads);
    dp->retry_head = dp->flush_head = DP_NO_SLOT;
    cache_attach(dp);
    log_attach(dp);
    destage_attach(dp);
}

static void release_private(struct datapath *dp)
{
    free(dp->cache_heads);
    free(dp->cache_next);
    for (uint32_t number = 0; number < DP_POOLS; number++) {
        free(dp->pools[number].free);
        free(dp->pools[number].limbo);
        s3fifo_close(dp->pools[number].queues);
    }
    free(dp->page_touched);
    free(dp->page_unasked);
    ahead_release(dp);
    free(dp->page_waiters);
    free(dp->merge_free);
    free(dp->merge_freed);
    free(dp->equal_sets);
    free(dp->equal_next);
    free(dp->log_limbo);
    free(dp->inflight_heads);
}

/* The fast tier's part of memory; without a driver for it there is none to read from. */
static void attach_tier(struct datapath *dp, void *memory, bool fresh)
{
    struct dp_pool *pool = &dp->pools[POOL_TIER];
    uint64_t buffer = 0, pages = 0;
    pool->first = (uint32_t)dp->arena->cache_pages;
    tier_attach(dp, memory, dp->arena->tier_places, fresh);
    if (dp->arena->tier_places == 0)
        return;
    dp->tier.staging = dp->zero_buffer + DP_ZERO_BYTES;
    if (!buffer_of(dp->domain, ATOLL_ROLE_LLRRM, &buffer, &pages) || pages <= TIER_BOUNCE_PAGES ||
        dp->domain->rings->tx[ATOLL_ROLE_LLRRM].producer == 0) {
        dp->tier.area->state = TIER_OFF; /* outside of transactions; nobody has looked yet */
        return;
    }
    pages -= TIER_BOUNCE_PAGES;
    dp->tier.bounce = buffer + pages * DP_BLOCK;
    pool->buffer = buffer;
    pool->count = (uint32_t)(pages < dp->arena->tier_pages ? pages : dp->arena->tier_pages);
    if (dp->tier.area->state == TIER_OFF)
        dp->tier.area->state = TIER_NEW;
}

struct datapath *datapath_attach(struct dedup *dedup, void *memory, const struct dp_geometry *geometry, bool fresh, char *error)
{
    struct dp_arena *arena = memory;
    struct atoll_domain *domain = dedup->domain;
    uint64_t nic_pages = 0, cache_pages = 0;
    if (fresh) {
        arena->nic_pages = geometry->nic_pages;
        arena->merge_pages = geometry->merge_pages;
        arena->cache_pages = geometry->cache_pages;
        arena->tier_pages = geometry->tier_pages;
        arena->tier_places = geometry->tier_places;
        arena->next_order = arena->next_acceptance = 1;
        arena->log_head = arena->log_tail = arena->returning = DP_NONE;
        for (uint32_t number = 0; number < DP_SLOTS; number++)
            arena->slots[number].pinned_place = DP_NONE;
    }
    struct dp_geometry kept = {arena->nic_pages, arena->merge_pages, arena->cache_pages, arena->tier_pages, arena->tier_places};
    struct parts parts = parts_of(&kept);
    struct datapath *dp = need(1, sizeof *dp);
    dp->dedup = dedup;
    dp->domain = domain;
    dp->journal = domain->journal;
    dp->arena = arena;
    dp->records = (void *)((char *)memory + parts.records);
    dp->pages = (void *)((char *)memory + parts.pages);
    dp->held = (uint8_t *)memory + parts.held;
    dp->record_count = arena->nic_pages + arena->merge_pages;
    dp->merge_buffer = atoll_arena_address(ATOLL_ROLE_DEDUP) + domain->self->buffer_offset;
    dp->zero_buffer = dp->merge_buffer + arena->merge_pages * DP_BLOCK;
    dedup->public->held_address = (uint64_t)(uintptr_t)dp->held;
    dedup->public->held_count = arena->nic_pages;

    if (datapath_buffer_bytes(&kept) > domain->self->buffer_bytes || parts.end > domain->self->role_bytes)
        snprintf(error, 256, "arena of dedup is smaller than its tables");
    else if (!buffer_of(domain, ATOLL_ROLE_NIC, &dp->nic_buffer, &nic_pages) || nic_pages < arena->nic_pages)
        snprintf(error, 256, "arena of nic has %llu pages, dedup was made for %llu", (unsigned long long)nic_pages,
                 (unsigned long long)arena->nic_pages);
    else if (!buffer_of(domain, ATOLL_ROLE_DISK, &dp->pools[POOL_DISK].buffer, &cache_pages) ||
             cache_pages < DP_CACHE_MINIMUM + DP_SCRUB_PAGES + STORE_BOUNCE_PAGES)
        snprintf(error, 256, "arena of disk has %llu pages, dedup needs %u", (unsigned long long)cache_pages,
                 DP_CACHE_MINIMUM + DP_SCRUB_PAGES + STORE_BOUNCE_PAGES);
    else
        error[0] = 0;
    /* After the death of all the driver's arena is a new one, and perhaps smaller; the cache is empty then. */
    cache_pages -= STORE_BOUNCE_PAGES + DP_SCRUB_PAGES;
    dp->pools[POOL_DISK].count = (uint32_t)(cache_pages < arena->cache_pages ? cache_pages : arena->cache_pages);
    dp->scrub_buffer = dp->pools[POOL_DISK].buffer + cache_pages * DP_BLOCK;
    dp->nic_public = atoll_nic_public(domain);
    if (error[0] == 0 && dp->nic_public == 0)
        snprintf(error, 256, "arena of nic has no public part");
    if (error[0] != 0) {
        free(dp);
        return 0;
    }
    dp->now_ms = atoll_now_ns() / 1000000;
    dedup->datapath = dp;
    attach_tier(dp, (char *)memory + parts.tier, fresh);
    if (!lookup_attach(dp, (char *)memory + parts.lookup)) {
        snprintf(error, 256, "arena of nbd has no room for what it must publish");
        lookup_release(dp);
        free(dp);
        return 0;
    }
    attach_private(dp);
    return dp;
}

static int by_acceptance(const void *a, const void *b)
{
    const struct dp_slot *x = *(const struct dp_slot *const *)a, *y = *(const struct dp_slot *const *)b;
    return x->acceptance < y->acceptance ? -1 : x->acceptance > y->acceptance;
}

void datapath_recover(struct datapath *dp)
{
    const struct dp_slot *waiting[DP_SLOTS];
    uint32_t count = 0;
    for (uint32_t number = 0; number < DP_SLOTS; number++)
        if (dp->arena->slots[number].state == SLOT_ACCEPTED)
            waiting[count++] = &dp->arena->slots[number];
    qsort(waiting, count, sizeof waiting[0], by_acceptance);
    for (uint32_t index = 0; index < count; index++)
        datapath_resume(dp, (uint32_t)(waiting[index] - dp->arena->slots));
    dp->retry = true;
}

void datapath_adopt(struct datapath *dp, bool quarantine)
{
    struct dp_arena *arena = dp->arena;
    /* In pieces, each a transaction; a successor that finds `adopting` set begins again. */
    *(volatile uint64_t *)&arena->adopting = 1;
    posted_adopt(dp);
    for (uint32_t number = 0; number < ATOLL_SLOT_COUNT; number++) {
        struct dp_slot *slot = &arena->slots[number];
        slot_save(dp, slot);
        slot->state = SLOT_FREE;
        slot->identity = 0;
        slot->phase = PHASE_START;
        slot->segment_count = slot->extent_count = 0;
        slot->pinned_place = DP_NONE;
        if (number % 256 == 255)
            atoll_domain_commit(dp->domain);
    }
    lookup_adopt(dp);
    dp_set32(dp, &arena->pinned_count, 0);
    for (uint64_t page = 0; page < arena->cache_pages + arena->tier_pages; page++) {
        atoll_save(dp->journal, &dp->pages[page], sizeof dp->pages[page]);
        dp->pages[page] = (struct dp_page){0};
        if (page % 1024 == 1023)
            atoll_domain_commit(dp->domain);
    }
    atoll_domain_commit(dp->domain);
    tier_adopt(dp);
    release_private(dp);
    attach_private(dp);
    for (uint64_t record = 0; record < dp->record_count; record++) {
        struct dp_record *r = &dp->records[record];
        if (r->pins != 0) {
            dp_set32(dp, &r->pins, 0);
            if (r->state == RECORD_PINNED) /* those without pins are there already */
                dp->log_limbo[dp->log_limbo_count++] = (uint32_t)record;
        }
        if (dp->journal->count >= DP_STEP_JOURNAL) {
            log_settle(dp);
            give_flush(dp);
            atoll_domain_commit(dp->domain);
            log_committed(dp);
        }
    }
    while (log_settle(dp)) {
        give_flush(dp);
        atoll_domain_commit(dp->domain);
        log_committed(dp);
    }
    give_flush(dp);
    atoll_domain_commit(dp->domain);
    log_committed(dp);
    scrub_adopt(dp);
    destage_adopt(dp, quarantine);
    atoll_domain_commit(dp->domain);
    log_committed(dp);
}
