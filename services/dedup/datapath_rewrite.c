/*
 * What a failed sync may have lost is written again (I7): a failed flush stays failed until everything since the last good
 * one has been written again.
 *
 *   rewrite_note       a run has been written: places that no sync covers yet
 *   rewrite_pending    a sync has failed and not all such places have been written again; until then no other flush of the
 *                      device begins (io.c holds IO_SYNC back), so none of them is freed for other use either
 *   rewrite_step       forgets what has been synced; after a failure reads each place (from the cache if it is there),
 *                      checks it against its fingerprint and writes it to where it was
 *
 * A place whose content is gone is counted; reading it is ECORRUPT.
 *
 * After a crash: list, position and pinned pages lie in the arena; writes under way complete to the successor.
 */
#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

#define RETRY_MS 1000

bool rewrite_pending(const struct datapath *dp)
{
    return store_sync_failures(dp->dedup, 0) != dp->arena->sync_failures_seen || dp->arena->rewrite_at < dp->arena->rewrite_end;
}

bool rewrite_failing(const struct datapath *dp) { return rewrite_pending(dp) && dp->arena->rewrite.status != ATOLL_OK; }

bool rewrite_room(struct datapath *dp)
{
    uint64_t used = dp->arena->placed_tail - dp->arena->placed_head;
    if (used >= DP_PLACED / 2)
        store_sync(dp->dedup);
    return used < DP_PLACED;
}

void rewrite_note(struct datapath *dp, uint64_t pba, uint32_t count)
{
    struct dp_arena *arena = dp->arena;
    struct dp_placed *placed = &arena->placed[arena->placed_tail % DP_PLACED];
    assert(arena->placed_tail - arena->placed_head < DP_PLACED);
    atoll_save(dp->journal, placed, sizeof *placed);
    *placed = (struct dp_placed){.pba = pba, .epoch = store_epoch(dp->dedup), .count = count};
    dp_set64(dp, &arena->placed_tail, arena->placed_tail + 1);
}

/* Has the places of the entry that are still in use read. False: not now. */
static bool begin(struct datapath *dp)
{
    struct dp_arena *arena = dp->arena;
    struct dp_rewrite *rewrite = &arena->rewrite;
    const struct dp_placed *placed = &arena->placed[arena->rewrite_at % DP_PLACED];
    uint64_t pbas[ATOLL_IO_BLOCKS], unknown;
    uint32_t pages[ATOLL_IO_BLOCKS], count = 0;
    for (uint32_t index = 0; index < placed->count; index++)
        if (store_references(dp->dedup, placed->pba + index) != 0)
            pbas[count++] = placed->pba + index;
    if (count != 0 && !cache_load(dp, pbas, count, pages, &unknown)) {
        dp_sweep(dp);
        return false;
    }
    atoll_save(dp->journal, rewrite, sizeof *rewrite);
    rewrite->state = REWRITE_LOADING;
    rewrite->count = count;
    rewrite->status = ATOLL_OK;
    memcpy(rewrite->pages, pages, count * sizeof pages[0]);
    return true;
}

static void end_entry(struct datapath *dp)
{
    struct dp_rewrite *rewrite = &dp->arena->rewrite;
    for (uint32_t index = 0; index < rewrite->count; index++)
        cache_unpin(dp, rewrite->pages[index]);
    dp_set32(dp, &rewrite->count, 0);
    dp_set32(dp, &rewrite->state, REWRITE_IDLE);
    if (rewrite->status == ATOLL_OK)
        dp_set64(dp, &dp->arena->rewrite_at, dp->arena->rewrite_at + 1);
    else
        dp->rewrite_ms = dp->now_ms + RETRY_MS;
}

/* Writes what has been read. False: not now. */
static bool write_pages(struct datapath *dp)
{
    struct dp_rewrite *rewrite = &dp->arena->rewrite;
    uint32_t kept[ATOLL_IO_BLOCKS], count = 0, writes = 0;
    for (uint32_t index = 0; index < rewrite->count; index++)
        if (dp->pages[rewrite->pages[index]].state == PAGE_LOADING)
            return false;
    if (io_room(dp->dedup, IO_REWRITE) < rewrite->count)
        return false;
    atoll_save(dp->journal, rewrite, sizeof *rewrite);
    for (uint32_t index = 0; index < rewrite->count; index++) {
        uint32_t page = rewrite->pages[index];
        const struct dp_page *p = &dp->pages[page];
        bool wanted = p->attached && store_references(dp->dedup, p->pba) != 0;
        atoll_count(dp->domain, DEDUP_COUNTER_REWRITE_LOST, p->state == PAGE_FAILED);
        if (wanted && p->state == PAGE_VALID)
            kept[count++] = page;
        else
            cache_unpin(dp, page);
    }
    memcpy(rewrite->pages, kept, count * sizeof kept[0]);
    rewrite->count = count;
    if (count == 0) {
        end_entry(dp);
        return true;
    }
    ATOLL_CRASH_POINT(dp->domain, "dedup.rewrite.submit");
    for (uint32_t from = 0, to; from < count; from = to, writes++) {
        struct atoll_segment segments[ATOLL_IO_BLOCKS];
        uint64_t pba = dp->pages[kept[from]].pba;
        for (to = from; to < count && dp->pages[kept[to]].pba == pba + (to - from); to++)
            segments[to - from] = (struct atoll_segment){.address = page_address(dp, kept[to]), .length = DP_BLOCK};
        int slot = io_submit(dp->dedup, IO_REWRITE, 0, ATOLL_ROLE_DISK, ATOLL_OP_IO_WRITE, pba * DP_BLOCK, segments, to - from);
        assert(slot >= 0); /* looked for room above */
    }
    rewrite->outstanding = writes;
    rewrite->state = REWRITE_WRITING;
    atoll_count(dp->domain, DEDUP_COUNTER_REWRITTEN_BLOCKS, count);
    return true;
}

void rewrite_io_done(struct datapath *dp, uint32_t status)
{
    struct dp_rewrite *rewrite = &dp->arena->rewrite;
    assert(rewrite->state == REWRITE_WRITING && rewrite->outstanding != 0);
    dp_set32(dp, &rewrite->outstanding, rewrite->outstanding - 1);
    if (status != ATOLL_OK)
        dp_set32(dp, &rewrite->status, status);
    if (rewrite->outstanding == 0)
        end_entry(dp);
}

bool rewrite_step(struct datapath *dp, uint64_t *wake_ms)
{
    struct dp_arena *arena = dp->arena;
    uint64_t failures = store_sync_failures(dp->dedup, 0), head = arena->placed_head;
    bool did = false;
    if (arena->rewrite.state == REWRITE_LOADING)
        did = write_pages(dp);
    if (arena->rewrite.state == REWRITE_IDLE && failures != arena->sync_failures_seen) {
        dp_set64(dp, &arena->sync_failures_seen, failures);
        dp_set64(dp, &arena->rewrite_at, head);
        dp_set64(dp, &arena->rewrite_end, arena->placed_tail);
        did = true;
    }
    if (arena->rewrite_at < arena->rewrite_end) {
        if (arena->rewrite.state == REWRITE_IDLE && dp->now_ms >= dp->rewrite_ms)
            did |= begin(dp);
        if (arena->rewrite.state == REWRITE_IDLE && (*wake_ms == 0 || *wake_ms > 5))
            *wake_ms = 5;
        return did;
    }
    while (head != arena->placed_tail && arena->placed[head % DP_PLACED].epoch <= store_synced(dp->dedup))
        head++;
    if (head != arena->placed_head)
        dp_set64(dp, &arena->placed_head, head);
    return did;
}

void rewrite_adopt(struct datapath *dp)
{
    struct dp_rewrite *rewrite = &dp->arena->rewrite;
    atoll_save(dp->journal, rewrite, sizeof *rewrite);
    rewrite->state = REWRITE_IDLE;
    rewrite->count = rewrite->outstanding = 0;
}
