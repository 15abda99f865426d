/*
 * Metadata pages for the scrub: where both copies of each are, and what is done about one that is bad.
 *
 *   store_pages         the next pages that the newest root has on the device, tree by tree, directories first
 *   store_page_right    is an image what is expected there?
 *   store_page_repair   a page with a bad copy is written anew: from memory, or from its good copy
 *   store_stored_from   passes over groups of blocks that hold nothing
 *   store_want_look     counts and fingerprints, to look at only: nothing is made
 *
 * After a crash: nothing of its own.
 */
#include "services/dedup/store_internal.h"

_Static_assert(STORE_PAGES_BEGIN == FORMAT_PAGE(FORMAT_TREE_VOLUMES, 1, 0), "the first page is that directory");

/* First page of `level` from `number` on that is below directory page `above` of level `at` and stored; UINT64_MAX: none. */
static enum store_want next_below(struct store *store, uint32_t tree, uint32_t at, uint64_t above, uint32_t level, uint64_t number,
                                  uint64_t *found)
{
    uint32_t frame, shift = 8 * (at - 1 - level); /* 256 pointers in each */
    enum store_want want = store_get(store, FORMAT_PAGE(tree, at, above), false, &frame);
    *found = UINT64_MAX;
    if (want != STORE_HAVE || frame == STORE_NO_FRAME)
        return want;
    for (uint64_t child = number >> shift; child / FORMAT_POINTERS == above; child++) {
        const struct format_pointer *pointer =
            (const struct format_pointer *)store_page_memory(store, frame) + child % FORMAT_POINTERS;
        if (pointer->slot == 0 || (pointer->slot == STORE_SLOT_FRESH && level == at - 1))
            continue;
        if (level == at - 1) {
            *found = child;
            return STORE_HAVE;
        }
        uint64_t first = child << shift > number ? child << shift : number;
        want = next_below(store, tree, at - 1, child, level, first, found);
        if (want != STORE_HAVE || *found != UINT64_MAX)
            return want;
    }
    return STORE_HAVE;
}

/* The pointer to a page, in memory; STORE_HAVE with NULL: it has none any more. */
static enum store_want find_pointer(struct store *store, uint64_t page, struct format_pointer **pointer)
{
    uint32_t frame, tree = FORMAT_PAGE_TREE(page), level = FORMAT_PAGE_LEVEL(page);
    uint64_t number = FORMAT_PAGE_NUMBER(page);
    *pointer = &store->area->roots[tree];
    if (level == format_levels[tree])
        return STORE_HAVE;
    enum store_want want = store_get(store, FORMAT_PAGE(tree, level + 1, number / FORMAT_POINTERS), false, &frame);
    *pointer = frame == STORE_NO_FRAME
                   ? 0
                   : (struct format_pointer *)store_page_memory(store, frame) + number % FORMAT_POINTERS;
    return want;
}

enum store_want store_pages(struct dedup *dedup, uint64_t *cursor, struct store_page_copies *found, uint32_t most, uint32_t *count)
{
    struct store *store = dedup->store;
    for (*count = 0; *count < most;) {
        uint32_t tree = FORMAT_PAGE_TREE(*cursor), level = FORMAT_PAGE_LEVEL(*cursor);
        uint64_t number = FORMAT_PAGE_NUMBER(*cursor), next = UINT64_MAX;
        struct format_pointer *pointer = 0;
        enum store_want want = STORE_HAVE;
        if (tree >= FORMAT_TREES)
            return STORE_HAVE;
        if (level == format_levels[tree]) {
            next = number == 0 && store->area->roots[tree].slot != 0 && store->area->roots[tree].slot != STORE_SLOT_FRESH
                       ? 0 : UINT64_MAX;
        } else {
            want = next_below(store, tree, format_levels[tree], 0, level, number, &next);
        }
        if (want == STORE_WAIT)
            return *count != 0 ? STORE_HAVE : STORE_WAIT;
        if (want == STORE_LOST) { /* a directory, which was found by itself, higher up */
            uint32_t at = FORMAT_PAGE_LEVEL(store->want_page);
            uint64_t behind = (FORMAT_PAGE_NUMBER(store->want_page) + 1) << 8 * (at - level);
            if (at != format_levels[tree] && behind >> 8 * (format_levels[tree] - level) == 0) {
                *cursor = FORMAT_PAGE(tree, level, behind);
                continue;
            }
        }
        if (want == STORE_LOST || next == UINT64_MAX) {
            *cursor = level != 0 ? FORMAT_PAGE(tree, level - 1, 0)
                                 : FORMAT_PAGE(tree + 1, tree + 1 < FORMAT_TREES ? format_levels[tree + 1] : 0, 0);
            continue;
        }
        uint64_t page = FORMAT_PAGE(tree, level, next);
        want = find_pointer(store, page, &pointer);
        if (want == STORE_HAVE && pointer != 0)
            found[(*count)++] = (struct store_page_copies){.page = page,
                                                           .checksum = pointer->checksum,
                                                           .pba = {store_slot_pba(store, pointer->slot, 0),
                                                                   store_slot_pba(store, pointer->slot, 1)}};
        *cursor = FORMAT_PAGE(tree, level, next + 1);
    }
    return STORE_HAVE;
}

bool store_page_right(struct dedup *dedup, uint64_t page, uint64_t checksum, const void *image)
{
    return store_checksum(dedup->store, FORMAT_SEED_PAGE, page, image, ATOLL_BLOCK_BYTES) == checksum;
}

/* Pages of the trees that lie in tables of their own are all in memory. */
static bool in_table(const struct store *store, uint64_t page, uint64_t *number)
{
    *number = FORMAT_PAGE_NUMBER(page);
    if (FORMAT_PAGE_LEVEL(page) != 0)
        return false;
    switch (FORMAT_PAGE_TREE(page)) {
    case FORMAT_TREE_VOLUMES: return true;
    case FORMAT_TREE_GROUPS: *number += store->tables.groups; return true;
    case FORMAT_TREE_SLOTS: *number += store->tables.slots; return true;
    default: return false;
    }
}

enum store_repair store_page_repair(struct dedup *dedup, uint64_t page, uint64_t checksum)
{
    struct store *store = dedup->store;
    struct format_pointer *pointer;
    uint64_t number;
    uint32_t frame;
    enum store_want want = find_pointer(store, page, &pointer);
    if (want == STORE_WAIT)
        return STORE_REPAIR_WAIT;
    if (want == STORE_LOST)
        return STORE_REPAIR_LOST;
    if (pointer == 0 || pointer->slot == 0 || pointer->slot == STORE_SLOT_FRESH || pointer->checksum != checksum)
        return STORE_REPAIR_CHANGED; /* written to another place meanwhile */
    if (in_table(store, page, &number)) {
        store_table_dirty(store, number);
    } else {
        want = store_get(store, page, false, &frame); /* reads the good copy, if it is not in memory */
        if (want == STORE_WAIT)
            return STORE_REPAIR_WAIT;
        if (want == STORE_LOST || frame == STORE_NO_FRAME)
            return STORE_REPAIR_LOST;
        store_mark_dirty(store, frame);
    }
    store_count(store, STORE_COUNTER_PAGES_REPAIRED, 1);
    store_want_checkpoint(store);
    return STORE_REPAIR_DONE;
}

enum store_want store_want_look(struct dedup *dedup, const uint64_t *pbas, uint32_t count)
{
    enum store_want worst = STORE_HAVE;
    uint32_t frame;
    for (uint32_t index = 0; index < count; index++) {
        if (!store_usable(dedup->store, pbas[index]))
            continue;
        enum store_want refs = store_get(dedup->store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, pbas[index] / FORMAT_REFS_PER_PAGE), false, &frame);
        enum store_want prints =
            store_get(dedup->store, FORMAT_PAGE(FORMAT_TREE_PRINTS, 0, pbas[index] / FORMAT_PRINTS_PER_PAGE), false, &frame);
        worst = refs > worst ? refs : worst;
        worst = prints > worst ? prints : worst;
    }
    return worst;
}

uint64_t store_stored_from(struct dedup *dedup, uint64_t pba)
{
    const struct store *store = dedup->store;
    uint64_t blocks = store->area->device_blocks, group = pba / STORE_GROUP_BLOCKS;
    if (pba >= blocks || GROUP_STORED(store->groups[group]) != 0)
        return pba;
    while (group * STORE_GROUP_BLOCKS < blocks && GROUP_STORED(store->groups[group]) == 0)
        group++;
    return group * STORE_GROUP_BLOCKS < blocks ? group * STORE_GROUP_BLOCKS : blocks;
}
