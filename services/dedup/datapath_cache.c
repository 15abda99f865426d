/*
 * The read cache: an index over the storage drivers' buffers. Two pools of pages, since what a driver reads lands in its own
 * arena: disk's, minus the store's bounce pages at their end; and llrrm's, minus the tier's, for blocks read from the fast tier.
 *
 *   cache_load           find or begin to read blocks, all or none; pages come back pinned
 *   cache_unpin          a page without pins may be used for another block
 *   cache_drop           the place is about to be rewritten
 *   cache_io_done        check what was read against the fingerprint stored for it
 *   cache_confirmed      ... or, of what destage reads, have it compared byte by byte with a block that has this fingerprint
 *
 * A page belongs to its place (PBA) by its committed entry; the hash and the stack of free pages are private. A page
 * that is being read is never used for anything else; nor is one that nbd gave to a reader by itself: pages without pins are
 * in limbo until a look at nbd's uses (datapath_lookup.c) says that they are free. Content of a place changes only when the place
 * is allocated again,
 * and then cache_drop detaches its page: readers pinned to it keep it, nobody finds it any more.
 *
 * Which page gives way is S3-FIFO's matter (s3fifo.h), per pool; what nbd has read by itself counts as used when a page's turn comes.
 *
 * What is read for destage alone is UNCHECKED: to be equal, byte by byte, to a block whose fingerprint was taken when it was received says
 * no less of both than the fingerprint would, and costs one look at each instead of two. It is checked when they differ, so that it
 * shows which of them is damaged, and before a client gets it.
 *
 * After a crash: cache_attach makes hash, stack and queues again (all free pages are in limbo then); reads in flight complete to
 * the successor.
 */
#include <stdlib.h>

#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

static uint32_t hash_of(const struct datapath *dp, uint64_t pba)
{
    return (uint32_t)(pba * 0x9e3779b97f4a7c15u >> 32) & dp->cache_mask;
}

static void hash_insert(struct datapath *dp, uint32_t page)
{
    uint32_t bucket = hash_of(dp, dp->pages[page].pba);
    dp->cache_next[page] = dp->cache_heads[bucket];
    dp->cache_heads[bucket] = page;
}

static void hash_remove(struct datapath *dp, uint32_t page)
{
    uint32_t *link = &dp->cache_heads[hash_of(dp, dp->pages[page].pba)];
    while (*link != page) {
        assert(*link != DP_NONE);
        link = &dp->cache_next[*link];
    }
    *link = dp->cache_next[page];
}

void cache_prefetch(const struct datapath *dp, uint64_t pba) { __builtin_prefetch(&dp->cache_heads[hash_of(dp, pba)]); }

uint32_t cache_find(const struct datapath *dp, uint64_t pba)
{
    uint32_t page = dp->cache_heads[hash_of(dp, pba)];
    while (page != DP_NONE && dp->pages[page].pba != pba)
        page = dp->cache_next[page];
    return page;
}

uint32_t cache_page_of(const struct datapath *dp, uint64_t address)
{
    for (uint32_t number = 0; number < DP_POOLS; number++) {
        const struct dp_pool *pool = &dp->pools[number];
        uint64_t offset = address - pool->buffer;
        if (address >= pool->buffer && offset < (uint64_t)pool->count * DP_BLOCK)
            return pool->first + (uint32_t)(offset / DP_BLOCK);
    }
    return DP_NONE;
}

static struct dp_pool *pool_of(struct datapath *dp, uint32_t page) { return &dp->pools[page_in_tier(dp, page) ? POOL_TIER : POOL_DISK]; }

/* Its entry says what it holds. */
static void attach(struct datapath *dp, uint32_t page)
{
    struct dp_pool *pool = pool_of(dp, page);
    hash_insert(dp, page);
    s3fifo_enter(pool->queues, page - pool->first, dp->pages[page].pba);
    (void)lookup_was_touched(dp, page); /* from now on */
}

void cache_attach(struct datapath *dp)
{
    for (uint32_t bucket = 0; bucket <= dp->cache_mask; bucket++)
        dp->cache_heads[bucket] = DP_NONE;
    for (uint32_t number = 0; number < DP_POOLS; number++) {
        struct dp_pool *pool = &dp->pools[number];
        pool->free_count = pool->limbo_count = 0;
        for (uint32_t page = pool->first + pool->count; page-- > pool->first;) {
            if (dp->pages[page].state == PAGE_FREE)
                pool->limbo[pool->limbo_count++] = page;
            else if (dp->pages[page].attached)
                attach(dp, page);
        }
    }
}

void cache_pin(struct datapath *dp, uint32_t page)
{
    struct dp_pool *pool = pool_of(dp, page);
    if (!ahead_first_use(dp, page)) /* as one that was read when it was wanted */
        s3fifo_use(pool->queues, page - pool->first);
    dp_set32(dp, &dp->pages[page].pins, dp->pages[page].pins + 1);
}

/* Nobody finds the page any more; the queues have been told already. */
static void forget(struct datapath *dp, uint32_t page)
{
    hash_remove(dp, page);
    dp_set32(dp, &dp->pages[page].attached, 0);
}

static void detach(struct datapath *dp, uint32_t page)
{
    struct dp_pool *pool = pool_of(dp, page);
    s3fifo_leave(pool->queues, page - pool->first);
    forget(dp, page);
}

static void into_limbo(struct datapath *dp, uint32_t page)
{
    lookup_retire(dp, (uint32_t)dp->record_count + page);
    struct dp_pool *pool = pool_of(dp, page);
    dp_set32(dp, &dp->pages[page].state, PAGE_FREE);
    pool->limbo[pool->limbo_count++] = page;
}

static void free_page(struct datapath *dp, uint32_t page)
{
    into_limbo(dp, page);
    dp->retry = true;
}

/* Pages in limbo that nobody uses are free. */
static void cache_settle(struct datapath *dp, struct dp_pool *pool)
{
    uint32_t kept = 0;
    if (pool->limbo_count == 0)
        return;
    lookup_uses(dp);
    for (uint32_t index = 0; index < pool->limbo_count; index++) {
        uint32_t page = pool->limbo[index];
        if (lookup_in_use(dp, (uint32_t)dp->record_count + page))
            pool->limbo[kept++] = page;
        else
            pool->free[pool->free_count++] = page;
    }
    pool->limbo_count = kept;
}

/* Its driver may still write to it. */
static bool is_loading(const struct dp_page *p) { return p->state == PAGE_LOADING || p->state == PAGE_ABANDONED; }

void cache_unpin(struct datapath *dp, uint32_t page)
{
    struct dp_page *p = &dp->pages[page];
    assert(p->pins != 0);
    dp_set32(dp, &p->pins, p->pins - 1);
    if (p->pins == 0 && !is_loading(p)) {
        dp->retry = dp->retry || dp->blocked != 0;
        if (!p->attached)
            free_page(dp, page);
    }
}

void cache_drop(struct datapath *dp, uint64_t pba)
{
    uint32_t page = cache_find(dp, pba);
    if (page == DP_NONE)
        return;
    detach(dp, page);
    if (dp->pages[page].pins == 0 && !is_loading(&dp->pages[page]))
        free_page(dp, page);
}

/* Makes up to DP_EVICTIONS pages free, in limbo. Each page gets at most two turns: one if it has been used, one to go. */
static void evict(struct datapath *dp, struct dp_pool *pool)
{
    struct s3fifo *queues = pool->queues;
    struct s3fifo_busy busy = {0};
    uint32_t evicted = 0;
    for (uint32_t turn = 0; turn < 2 * pool->count && evicted < DP_EVICTIONS; turn++) {
        uint32_t number = s3fifo_candidate(queues, &busy), page = pool->first + number;
        if (number == S3FIFO_NONE)
            break;
        struct dp_page *p = &dp->pages[page];
        assert(p->attached);
        if (p->pins != 0 || (p->state != PAGE_VALID && p->state != PAGE_UNCHECKED)) {
            s3fifo_pass(queues, number, &busy);
            continue;
        }
        bool touched = lookup_was_touched(dp, page);
        if (touched || s3fifo_used(queues, number)) {
            s3fifo_keep(queues, number);
            continue;
        }
        s3fifo_evict(queues, number);
        forget(dp, page);
        into_limbo(dp, page);
        evicted++;
    }
    atoll_count(dp->domain, DEDUP_COUNTER_CACHE_EVICTIONS, evicted);
}

/* A page for a new block, not attached, or DP_NONE: all are pinned or used by readers. */
static uint32_t take_page(struct datapath *dp, struct dp_pool *pool)
{
    if (pool->free_count == 0)
        cache_settle(dp, pool);
    if (pool->free_count == 0) {
        evict(dp, pool);
        cache_settle(dp, pool);
    }
    return pool->free_count == 0 ? DP_NONE : pool->free[--pool->free_count];
}

/* Where a block is read from: the block number on its device, and which device. */
struct source { uint64_t block; bool tier; };

static bool in_sequence(struct source a, struct source b) { return a.tier == b.tier && a.block + 1 == b.block; }

/* Sends the reads of pages[from..to), whose blocks stand in sequence. */
static void submit(struct datapath *dp, enum io_kind who, const struct source *sources, const uint32_t *pages, uint32_t from, uint32_t to)
{
    struct atoll_segment segments[ATOLL_IO_BLOCKS];
    uint32_t count = 0;
    for (uint32_t index = from; index < to; index++) {
        uint64_t address = page_address(dp, pages[index]);
        if (count != 0 && segments[count - 1].address + segments[count - 1].length == address)
            segments[count - 1].length += DP_BLOCK;
        else
            segments[count++] = (struct atoll_segment){.address = address, .length = DP_BLOCK};
    }
    ATOLL_CRASH_POINT(dp->domain, "dedup.fill.submit");
    uint64_t block = sources[from].block;
    bool sent;
    if (sources[from].tier)
        sent = tier_submit(dp, IO_FILL, block, ATOLL_OP_IO_READ, block, segments, count);
    else if (who == IO_FILL)
        sent = io_submit_awaited(dp->dedup, block, block * DP_BLOCK, segments, count) >= 0;
    else
        sent = io_submit(dp->dedup, IO_FILL, block, ATOLL_ROLE_DISK, ATOLL_OP_IO_READ, block * DP_BLOCK, segments, count) >= 0;
    assert(sent); /* load counted the room */
}

void cache_confirmed(struct datapath *dp, uint32_t page)
{
    if (dp->pages[page].state == PAGE_UNCHECKED)
        dp_set32(dp, &dp->pages[page].state, PAGE_VALID);
}

/* What was read is not what was stored there. */
static void damaged(struct datapath *dp, uint32_t page)
{
    struct dp_page *p = &dp->pages[page];
    atoll_count(dp->domain, DEDUP_COUNTER_CORRUPT_READS, 1);
    dp_set32(dp, &p->status, ATOLL_ECORRUPT);
    dp_set32(dp, &p->state, PAGE_FAILED);
    detach(dp, page);
    dp_note_damage(dp, p->pba, ATOLL_ECORRUPT, ATOLL_VOLUME_COUNT, 0);
    if (p->pins == 0)
        free_page(dp, page);
}

bool cache_check(struct datapath *dp, uint32_t page)
{
    const struct dp_page *p = &dp->pages[page];
    bool right = p->state != PAGE_UNCHECKED || print_equal(dp_fingerprint(page_memory(dp, page)), p->print);
    if (right)
        cache_confirmed(dp, page);
    else if (p->attached)
        damaged(dp, page);
    else /* its place was rewritten, perhaps before it was read */
        dp_set32(dp, &dp->pages[page].state, PAGE_STALE);
    return right;
}

/* A client asks for a page that is there: is it to be had? */
static bool for_client(struct datapath *dp, uint32_t page)
{
    dp->page_unasked[page] = 0; /* it is checked when it comes */
    return cache_check(dp, page);
}

/* What cache_load says. With `tier` blocks that have a copy on the fast device are read there; *tiered: some would be. */
static bool load(struct datapath *dp, enum io_kind who, const uint64_t *pbas, uint32_t count, uint32_t *pages, bool tier,
                 bool *tiered, uint64_t *failed)
{
    bool missing[ATOLL_IO_BLOCKS];
    struct source sources[ATOLL_IO_BLOCKS];
    uint32_t places[ATOLL_IO_BLOCKS], missing_count = 0, reads = 0, tier_reads = 0, done;
    struct fingerprint print;
    assert(count <= ATOLL_IO_BLOCKS);
    *failed = 0;
    *tiered = false;

    /* Look first: nothing is changed until it is known that all can be had. */
    for (uint32_t index = 0; index < count; index++) {
        pages[index] = cache_find(dp, pbas[index]);
        if (pages[index] != DP_NONE && who != IO_DESTAGE && !for_client(dp, pages[index]))
            pages[index] = DP_NONE;
        missing[index] = pages[index] == DP_NONE;
        for (uint32_t earlier = 0; missing[index] && earlier < index; earlier++)
            if (pbas[earlier] == pbas[index])
                missing[index] = false; /* the same block twice in one request: loaded once */
        if (!missing[index])
            continue;
        if (!store_pba_valid(dp->dedup, pbas[index]) || !store_fingerprint(dp->dedup, pbas[index], &print)) {
            *failed = pbas[index];
            return false;
        }
        places[index] = tier ? tier_readable(dp, pbas[index]) : TIER_NONE;
        sources[index] = places[index] == TIER_NONE
                             ? (struct source){.block = pbas[index]}
                             : (struct source){.block = tier_block(&dp->tier, places[index]), .tier = true};
        *tiered = *tiered || sources[index].tier;
        s3fifo_prefetch(dp->pools[sources[index].tier ? POOL_TIER : POOL_DISK].queues, pbas[index]);
        missing_count++;
        if (index == 0 || !missing[index - 1] || !in_sequence(sources[index - 1], sources[index])) {
            reads++;
            tier_reads += sources[index].tier;
        }
    }
    /* The tier's reads leave to others what clients' do, and come among those of the main device, which need not. */
    if (reads > io_room(dp->dedup, who) || (tier_reads != 0 && (tier_reads > tier_room(dp) || reads > io_room(dp->dedup, IO_FILL))))
        return false;

    /* Pages that are there must not be evicted for the missing ones. */
    for (uint32_t index = 0; index < count; index++)
        if (pages[index] != DP_NONE)
            cache_pin(dp, pages[index]);
    for (done = 0; done < count; done++) {
        if (!missing[done])
            continue;
        pages[done] = take_page(dp, &dp->pools[sources[done].tier ? POOL_TIER : POOL_DISK]);
        if (pages[done] == DP_NONE)
            break;
        ahead_entered(dp, pages[done]); /* what it held before is no use of this one */
        cache_pin(dp, pages[done]);
    }
    if (done < count) {
        for (uint32_t index = 0; index < count; index++) {
            if (pages[index] == DP_NONE)
                continue;
            if (missing[index]) {
                if (index >= done)
                    continue;
                struct dp_pool *pool = pool_of(dp, pages[index]);
                dp_set32(dp, &dp->pages[pages[index]].pins, 0);
                pool->free[pool->free_count++] = pages[index];
            } else {
                cache_unpin(dp, pages[index]);
            }
        }
        return false;
    }

    for (uint32_t index = 0; index < count; index++) {
        if (!missing[index]) {
            if (pages[index] == DP_NONE) {
                pages[index] = cache_find(dp, pbas[index]);
                cache_pin(dp, pages[index]);
            }
            continue;
        }
        struct dp_page *p = &dp->pages[pages[index]];
        atoll_save(dp->journal, p, sizeof *p);
        p->pba = pbas[index];
        store_fingerprint(dp->dedup, pbas[index], &p->print);
        p->state = PAGE_LOADING;
        p->attached = 1;
        p->status = ATOLL_OK;
        attach(dp, pages[index]);
        dp->page_unasked[pages[index]] = who == IO_DESTAGE && !sources[index].tier;
        if (sources[index].tier) {
            tier_served(dp, places[index]);
            atoll_count(dp->domain, DEDUP_COUNTER_TIER_READ_BLOCKS, 1);
        }
    }
    for (uint32_t from = 0, to; from < count; from = to) {
        to = from + 1;
        if (!missing[from])
            continue;
        while (to < count && missing[to] && in_sequence(sources[to - 1], sources[to]))
            to++;
        submit(dp, who, sources, pages, from, to);
    }
    atoll_count(dp->domain, DEDUP_COUNTER_CACHE_HITS, count - missing_count);
    atoll_count(dp->domain, DEDUP_COUNTER_CACHE_MISSES, missing_count);
    return true;
}
_Static_assert(sizeof(struct dp_page) % 8 == 0, "saved by words");

bool cache_load(struct datapath *dp, enum io_kind who, const uint64_t *pbas, uint32_t count, uint32_t *pages, uint64_t *failed)
{
    bool tiered;
    if (load(dp, who, pbas, count, pages, true, &tiered, failed))
        return true;
    /* The fast device's pages or slots may be what is short. */
    return *failed == 0 && tiered && load(dp, who, pbas, count, pages, false, &tiered, failed);
}

static void wake_readers(struct datapath *dp, uint32_t page)
{
    uint16_t waiter = dp->page_waiters[page];
    dp->page_waiters[page] = DP_NO_SLOT;
    while (waiter != DP_NO_SLOT) {
        uint16_t next = dp->slot_next[waiter];
        dp->slot_next[waiter] = DP_NO_SLOT;
        slot_wait_page(dp, waiter);
        waiter = next;
    }
}

void cache_abandon_tier(struct datapath *dp)
{
    const struct dp_pool *pool = &dp->pools[POOL_TIER];
    for (uint32_t page = pool->first; page < pool->first + pool->count; page++) {
        if (dp->pages[page].state != PAGE_LOADING)
            continue;
        if (dp->pages[page].attached)
            detach(dp, page);
        dp_set32(dp, &dp->pages[page].state, PAGE_ABANDONED);
        wake_readers(dp, page);
    }
    dp->retry = true;
}

/* `block`: where on its device it was read. */
static void loaded(struct datapath *dp, uint32_t page, uint64_t block, uint32_t status)
{
    struct dp_page *p = &dp->pages[page];
    bool tier = page_in_tier(dp, page), ahead = ahead_loaded(dp, page);
    if (p->state == PAGE_ABANDONED) { /* its readers have gone elsewhere; now its memory is free, too */
        dp_set32(dp, &p->state, PAGE_STALE);
        if (p->pins == 0)
            free_page(dp, page);
        return;
    }
    if (p->state != PAGE_LOADING) { /* only a driver that answers for pages it was not asked for gets here */
        atoll_count(dp->domain, DEDUP_COUNTER_BAD_COMPLETIONS, 1);
        return;
    }
    uint32_t state = PAGE_VALID;
    if (status == ATOLL_OK && dp->page_unasked[page])
        state = PAGE_UNCHECKED;
    else if (status == ATOLL_OK && !print_equal(dp_fingerprint(page_memory(dp, page)), p->print))
        status = ATOLL_ECORRUPT;
    if (status != ATOLL_OK && tier) {
        /* The main device has it: who waits executes again and finds it there. */
        state = PAGE_STALE;
        tier_read_failed(dp, p->pba, block, status);
    } else if (status == ATOLL_ECORRUPT) {
        /* Was the place rewritten meanwhile? Then this was read too late and says nothing about the device. */
        state = p->attached ? PAGE_FAILED : PAGE_STALE;
        if (p->attached)
            atoll_count(dp->domain, DEDUP_COUNTER_CORRUPT_READS, 1);
    } else if (status != ATOLL_OK) {
        state = ahead ? PAGE_STALE : PAGE_FAILED;
    }
    dp_set32(dp, &p->status, status);
    dp_set32(dp, &p->state, state);
    if (state != PAGE_VALID && state != PAGE_UNCHECKED && p->attached)
        detach(dp, page);
    if (state == PAGE_FAILED && dp->page_waiters[page] == DP_NO_SLOT)
        dp_note_damage(dp, p->pba, status, ATOLL_VOLUME_COUNT, 0);
    if (p->pins == 0 && !p->attached)
        free_page(dp, page);

    wake_readers(dp, page);
}

void cache_io_done(struct datapath *dp, const struct io_slot *slot, uint32_t status)
{
    uint64_t block = slot->offset_bytes / DP_BLOCK;
    ATOLL_CRASH_POINT(dp->domain, "dedup.fill.done");
    if (slot->device == ATOLL_ROLE_LLRRM)
        tier_answered(dp, status, false);
    for (uint32_t index = 0; index < slot->segment_count; index++) {
        uint32_t page = cache_page_of(dp, slot->segments[index].address);
        uint32_t count = slot->segments[index].length / DP_BLOCK;
        for (uint32_t each = 0; page != DP_NONE && each < count; each++)
            loaded(dp, page + each, block + each, status);
        block += count;
    }
    dp->retry = true;
}
