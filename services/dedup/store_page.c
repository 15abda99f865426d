/*
 * Paging, its interface: what a step is about to look at is in memory, or is asked for. See store.h.
 *
 * All that is missing is asked for at once, so that one wait is for all of it. Cache lines of what is in memory are asked for as well:
 * for a batch of random blocks the processor waits for one of them at a time otherwise.
 *
 * After a crash: nothing to do.
 */
#include "services/dedup/store_internal.h"

#define FEW_DIRTY 8 /* pages: what the end of a batch makes dirty, mostly */

static enum store_want worse(enum store_want a, enum store_want b)
{
    return a == STORE_LOST || b == STORE_LOST ? STORE_LOST : a > b ? a : b;
}

/* Logged entries may hold five eighths of what may be held at all: the rest is for destaging them. */
static bool pressed(const struct store *store)
{
    return store->area->frames_held >= store_held_limit(store) / 8 * 5;
}

bool store_pressed(struct dedup *dedup) { return pressed(dedup->store); }

bool store_full_of_changes(struct store *store)
{
    struct store_area *area = store->area;
    if (area->frames_held < store_held_limit(store))
        return false;
    store_want_clean_pages(store, FEW_DIRTY);
    if (area->changed && !area->sync_wanted && area->sync_phase == SYNC_IDLE) /* pending blocks hold pages too */
        STORE_SET(store, sync_wanted, 1);
    /* With few dirty pages a checkpoint would not help: what is held is logged entries and blocks in flight. These go on, or nobody ever would. */
    return area->checkpoint_phase != CHECKPOINT_IDLE || area->checkpoint_wanted;
}

/* A leaf that is held already does not hold more for one more entry. Others wait, and as long take no page from those who end the waiting. */
static bool holds_leaf(struct store *store, uint32_t volume, uint64_t leaf)
{
    uint32_t frame = store_leaf(store, volume, leaf);
    return frame != STORE_NO_FRAME && (store->frames[frame].flags & FRAME_HELD) != 0;
}

enum store_want store_want_map(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t count, enum store_use use)
{
    struct store *store = dedup->store;
    enum store_want worst = STORE_HAVE;
    uint64_t last = count == 0 ? lba : lba + count - 1;
    for (uint64_t leaf = lba / FORMAT_LEAF_ENTRIES; count != 0 && leaf <= last / FORMAT_LEAF_ENTRIES; leaf++) {
        uint32_t frame;
        if (use == STORE_LOG && pressed(store) && !holds_leaf(store, volume, leaf)) {
            store_want_clean_pages(store, 1);
            worst = worse(worst, STORE_WAIT);
            continue;
        }
        enum store_want want =
            store_get(store, FORMAT_PAGE(FORMAT_TREE_MAP, 0, FORMAT_LEAF_NUMBER(volume, leaf)), use != STORE_LOOK, &frame);
        worst = worse(worst, want);
        if (want == STORE_LOST)
            break;
        if (want == STORE_HAVE && frame != STORE_NO_FRAME && leaf == lba / FORMAT_LEAF_ENTRIES)
            __builtin_prefetch((const uint64_t *)store_page_memory(store, frame) + lba % FORMAT_LEAF_ENTRIES, 1);
    }
    return worst;
}

static enum store_want want_places(struct store *store, const uint64_t *pbas, uint32_t count, bool refs, bool create)
{
    enum store_want worst = STORE_HAVE;
    for (uint32_t index = 0; index < count; index++) {
        uint64_t pba = pbas[index];
        uint32_t frame;
        if (!store_usable(store, pba))
            continue;
        worst = worse(worst, store_get(store, FORMAT_PAGE(FORMAT_TREE_PRINTS, 0, pba / FORMAT_PRINTS_PER_PAGE), create, &frame));
        if (frame != STORE_NO_FRAME)
            __builtin_prefetch((struct fingerprint *)store_page_memory(store, frame) + pba % FORMAT_PRINTS_PER_PAGE);
        if (!refs)
            continue;
        worst = worse(worst, store_get(store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, pba / FORMAT_REFS_PER_PAGE), create, &frame));
        if (frame != STORE_NO_FRAME)
            __builtin_prefetch((uint32_t *)store_page_memory(store, frame) + pba % FORMAT_REFS_PER_PAGE, 1);
    }
    return worst;
}

enum store_want store_want_blocks(struct dedup *dedup, const uint64_t *pbas, uint32_t count)
{
    return want_places(dedup->store, pbas, count, true, true);
}

enum store_want store_want_prints(struct dedup *dedup, const uint64_t *pbas, uint32_t count)
{
    return want_places(dedup->store, pbas, count, false, false);
}

enum store_want store_want_base(struct dedup *dedup, uint64_t base)
{
    uint32_t frame;
    uint64_t pba = MAP_NUMBER(base);
    if (MAP_KIND(base) != MAP_PBA || !store_usable(dedup->store, pba))
        return STORE_HAVE;
    enum store_want want = store_get(dedup->store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, pba / FORMAT_REFS_PER_PAGE), true, &frame);
    if (frame != STORE_NO_FRAME)
        __builtin_prefetch((uint32_t *)store_page_memory(dedup->store, frame) + pba % FORMAT_REFS_PER_PAGE, 1);
    return want;
}

enum store_want store_want_counts(struct dedup *dedup, uint64_t pba)
{
    uint32_t frame;
    return store_get(dedup->store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, pba / FORMAT_REFS_PER_PAGE), false, &frame);
}
_Static_assert(STORE_COUNTS_PER_PAGE == FORMAT_REFS_PER_PAGE, "as they are told to others");

void store_prefetch_block(struct dedup *dedup, uint64_t pba)
{
    const void *print = store_print(dedup->store, pba), *count = store_ref(dedup->store, pba);
    if (print != 0)
        __builtin_prefetch(print);
    if (count != 0)
        __builtin_prefetch(count, 1);
}

void store_prefetch_map(struct dedup *dedup, uint32_t volume, uint64_t lba)
{
    const uint64_t *leaf = store_map_leaf(dedup, volume, lba / FORMAT_LEAF_ENTRIES);
    if (leaf != 0)
        __builtin_prefetch(leaf + lba % FORMAT_LEAF_ENTRIES, 1);
}

uint32_t store_want_status(struct dedup *dedup) { return dedup->store->want_status; }

uint64_t store_want_page(struct dedup *dedup) { return dedup->store->want_page; }

bool store_starved(struct dedup *dedup) { return dedup->store->starved; }

void store_urgent(struct dedup *dedup, bool urgent)
{
    struct store *store = dedup->store;
    if (urgent && !store->urgent)
        store->stamp++;
    store->urgent = urgent;
}
