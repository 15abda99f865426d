/*
 * Deletion of volumes, in bounded steps: leaf after leaf, up to STORE_DELETE_ENTRIES entries in one group of records. Logged entries are
 * left to the datapath, which ends them; the volume is gone over again until there are none.
 *
 * After a crash: the cursor is in the arena. After power loss: the state DELETING is in the table on the device, and what was freed is
 * in the log; it begins anew with what is left.
 */
#include "ipc/crashpoint.h"
#include "services/dedup/store_internal.h"

#define RETRY_NS 20000000u /* until logged entries are looked for again */
/* Why a volume is gone over again. */
#define AGAIN_LOGGED 1 /* logged entries: they end when the datapath has destaged or dropped them */
#define AGAIN_LOST 2   /* pages that cannot be read: perhaps the device comes to itself */
#define STEP_JOURNAL (ATOLL_JOURNAL_ENTRIES / 4)

/* Frees up to STORE_DELETE_ENTRIES entries of a leaf from `first` on whose pages of counts are in memory, asking for the others.
 * Returns the number of entries done; *logged: a logged one was left. */
static uint32_t free_entries(struct store *store, uint32_t number, uint64_t leaf, uint32_t frame, uint32_t first, bool *logged)
{
    uint64_t records[2 + 2 * STORE_DELETE_ENTRIES];
    const uint64_t *entries = store_page_memory(store, frame);
    uint32_t left = FORMAT_LEAF_ENTRIES - first, index = first; /* a page that was missing may have stopped it anywhere */
    uint32_t end = first + (left < STORE_DELETE_ENTRIES ? left : STORE_DELETE_ENTRIES);
    bool have = true;
    for (uint32_t each = first; each < end; each++) /* all are asked for, so that one wait is for all */
        have &= store_want_base(store->dedup, entries[each]) != STORE_WAIT;
    while (index < end) { /* runs of entries without a logged one among them */
        uint32_t words = 2, start = index, named = 0, zeros = 0;
        for (; index < end && MAP_KIND(entries[index]) != MAP_LOG; index++) {
            if (!have && store_want_base(store->dedup, entries[index]) == STORE_WAIT) {
                end = index;
                break;
            }
            named += MAP_KIND(entries[index]) == MAP_PBA;
            zeros += MAP_KIND(entries[index]) == MAP_ZERO;
            words += store_drop_value(store, number, entries[index], records + words);
            store_set_entry(store, frame, index, 0);
        }
        if (named + zeros != 0) {
            uint64_t lba = leaf * FORMAT_LEAF_ENTRIES + start;
            records[0] = FORMAT_RECORD(FORMAT_RECORD_HOLES, FORMAT_KEY(number, lba));
            records[1] = FORMAT_HOLES(index - start, named, zeros);
            store_log_append(store, records, words);
            store_mark_dirty(store, frame);
        }
        for (; index < end && MAP_KIND(entries[index]) == MAP_LOG; index++)
            *logged = true;
    }
    return index - first;
}

/* The next volume to delete, entered; false if there is none. They take turns: one that cannot be ended holds up no other. */
static bool choose(struct store *store)
{
    uint32_t number = store->delete_next, looked = store->none_to_delete ? ATOLL_VOLUME_COUNT : 0;
    for (; looked < ATOLL_VOLUME_COUNT; looked++, number = (number + 1) % ATOLL_VOLUME_COUNT)
        if (store->dedup->public->volumes[number].state == ATOLL_VOLUME_DELETING)
            break;
    store->none_to_delete = looked == ATOLL_VOLUME_COUNT;
    if (store->none_to_delete)
        return false;
    STORE_SET(store, delete_volume, number + 1);
    STORE_SET(store, delete_leaf, 0);
    STORE_SET(store, delete_index, 0);
    STORE_SET(store, delete_again, 0);
    return true;
}

static void again(struct store *store, uint64_t why)
{
    if ((store->area->delete_again & why) == 0)
        STORE_SET(store, delete_again, store->area->delete_again | why);
}

/* All leaves have been gone over. */
static bool end_of_volume(struct store *store, uint32_t number)
{
    if (store->area->delete_again != 0) {
        store->delete_logged = (store->area->delete_again & AGAIN_LOGGED) != 0;
        store->delete_retry_ns = atoll_now_ns() + (store->delete_logged ? RETRY_NS : STORE_RETRY_NS);
        store->delete_next = (number + 1) % ATOLL_VOLUME_COUNT;
        STORE_SET(store, delete_volume, 0);
        return false;
    }
    if (!store_volume_room(store))
        return false;
    store_volume_open(store, number)->state = ATOLL_VOLUME_FREE;
    store_volume_log(store, number);
    STORE_SET(store, delete_volume, 0);
    return true;
}

bool store_delete_step(struct store *store)
{
    struct store_area *area = store->area;
    bool did = false;
    if (store->delete_retry_ns != 0 && atoll_now_ns() < store->delete_retry_ns)
        return false;
    store->delete_retry_ns = 0;
    if (area->delete_volume == 0 && !choose(store))
        return false;
    uint32_t number = (uint32_t)area->delete_volume - 1;
    while (store->journal->count < STEP_JOURNAL) {
        uint64_t next;
        uint32_t frame;
        bool logged = false;
        /* A leaf (or a directory) that is damaged in both copies is passed by: the volume stays in deletion until it is repaired. */
        enum store_want want = store_next_leaf(store->dedup, number, area->delete_leaf, UINT64_MAX, &next);
        if (want == STORE_WAIT)
            return did;
        if (want == STORE_LOST) /* a directory: nobody else gets what it is about */
            again(store, AGAIN_LOST);
        if (next >= FORMAT_VOLUME_BYTES_MAX / ATOLL_BLOCK_BYTES / FORMAT_LEAF_ENTRIES)
            return end_of_volume(store, number);
        if (next != area->delete_leaf) {
            STORE_SET(store, delete_leaf, next);
            STORE_SET(store, delete_index, 0);
            did = true;
        }
        if (want == STORE_LOST)
            continue;
        want = store_get(store, FORMAT_PAGE(FORMAT_TREE_MAP, 0, FORMAT_LEAF_NUMBER(number, next)), false, &frame);
        if (want == STORE_WAIT)
            return did;
        if (want == STORE_LOST)
            again(store, AGAIN_LOST);
        if (want == STORE_LOST || frame == STORE_NO_FRAME || area->delete_index == FORMAT_LEAF_ENTRIES) {
            STORE_ADD(store, delete_leaf, 1);
            STORE_SET(store, delete_index, 0);
            did = true;
            continue;
        }
        if (!store_has_room(store->dedup, 2 * STORE_DELETE_ENTRIES))
            return did;
        ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.delete");
        uint32_t done = free_entries(store, number, next, frame, (uint32_t)area->delete_index, &logged);
        if (logged)
            again(store, AGAIN_LOGGED);
        if (done == 0)
            return did;
        STORE_ADD(store, delete_index, done);
        did = true;
    }
    return did;
}
