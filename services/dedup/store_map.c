/*
 * The map: leaves of 512 entries in frames, found through one hash; and the persistent changes of entries, each noted in
 * the metadata log as one group of records.
 *
 * Keys of the hash: (level + 1) << 56 | volume << 48 | number, open addressing, linear probing, deletion by moving back.
 *   level 0      number = leaf          value = frame
 *   level k >= 1 number = leaf >> 6k    value = mask of which of its 64 children exist; never 0
 * so that store_map_next_leaf skips what is not there by climbing and descending.
 *
 * After a crash: everything here is in the arena and journaled; only the last leaf found is remembered privately.
 */
#include "services/dedup/store_internal.h"

#define LEVEL_TOP 7 /* 6 * 7 bits: leaves of the largest volume */
#define NO_FRAME UINT64_MAX

_Static_assert(FORMAT_VOLUME_BYTES_MAX >> ATOLL_BLOCK_SHIFT >> 9 <= (uint64_t)1 << 42, "one node at the top level");

static uint64_t hash_key(uint32_t level, uint32_t volume, uint64_t leaf)
{
    return (uint64_t)(level + 1) << 56 | (uint64_t)volume << 48 | leaf >> 6 * level;
}

static uint64_t hash_home(const struct store *store, uint64_t key) { return key * 0x9e3779b97f4a7c15u >> store->hash_shift; }

static struct store_hash_entry *hash_find(const struct store *store, uint64_t key)
{
    for (uint64_t at = hash_home(store, key);; at = (at + 1) & store->hash_mask) {
        struct store_hash_entry *entry = &store->hash[at];
        if (entry->key == key)
            return entry;
        if (entry->key == 0)
            return 0;
    }
}

static void hash_insert(struct store *store, uint64_t key, uint64_t value)
{
    uint64_t at = hash_home(store, key);
    while (store->hash[at].key != 0)
        at = (at + 1) & store->hash_mask;
    atoll_set64(store->journal, &store->hash[at].key, key);
    atoll_set64(store->journal, &store->hash[at].value, value);
    STORE_ADD(store, hash_entries, 1);
}

static void hash_remove(struct store *store, struct store_hash_entry *entry)
{
    uint64_t hole = (uint64_t)(entry - store->hash);
    for (uint64_t at = hole;;) {
        at = (at + 1) & store->hash_mask;
        uint64_t key = store->hash[at].key;
        if (key == 0)
            break;
        uint64_t home = hash_home(store, key);
        if (((at - home) & store->hash_mask) < ((at - hole) & store->hash_mask))
            continue; /* it would move before its home */
        atoll_set64(store->journal, &store->hash[hole].key, key);
        atoll_set64(store->journal, &store->hash[hole].value, store->hash[at].value);
        hole = at;
    }
    atoll_set64(store->journal, &store->hash[hole].key, 0);
    STORE_ADD(store, hash_entries, -1);
}

/* --- Leaves ---------------------------------------------------------------------------------------------------------- */

uint64_t store_find_frame(struct store *store, uint32_t volume, uint64_t leaf, bool create)
{
    uint64_t key = FORMAT_KEY(volume, leaf) + 1;
    if (store->last_key == key)
        return store->last_frame;
    struct store_hash_entry *entry = hash_find(store, hash_key(0, volume, leaf));
    uint64_t frame = entry != 0 ? entry->value : NO_FRAME;
    if (entry == 0) {
        struct store_area *area = store->area;
        if (!create)
            return NO_FRAME;
        /* While loading, what is on the device has its place already. */
        if (area->state == STORE_READY && store_available(store) < 4)
            return NO_FRAME;
        /* A leaf needs up to LEVEL_TOP + 1 entries, how many depends on who was there before: so that leaves that once had room have
         * it in whatever order they are loaded, an eighth is kept free for that. */
        if (area->hash_entries + LEVEL_TOP + 1 > (area->state == STORE_READY ? store->hash_mask / 8 * 7 : store->hash_mask)) {
            if (area->state == STORE_READY && !area->checkpoint_wanted) /* it gives empty leaves back */
                STORE_SET(store, checkpoint_wanted, 1);
            return NO_FRAME;
        }
        if (area->state == STORE_READY && area->leaves >= area->leaf_slots - area->leaf_slots / STORE_FRAMES_KEPT) {
            if (!area->checkpoint_wanted) /* it gives empty leaves back */
                STORE_SET(store, checkpoint_wanted, 1);
            return NO_FRAME;
        }
        if (area->frames_free != 0) {
            frame = store->frame_stack[area->frames_free - 1];
            STORE_ADD(store, frames_free, -1);
        } else if (area->frames_high < area->leaf_slots) {
            frame = area->frames_high;
            STORE_ADD(store, frames_high, 1);
        } else {
            return NO_FRAME;
        }
        assert(store->frame_key[frame] == 0 && store->frame_used[frame] == 0);
        atoll_set64(store->journal, &store->frame_key[frame], key);
        hash_insert(store, hash_key(0, volume, leaf), frame);
        for (uint32_t level = 1; level <= LEVEL_TOP; level++) {
            uint64_t bit = (uint64_t)1 << (leaf >> 6 * (level - 1) & 63);
            struct store_hash_entry *node = hash_find(store, hash_key(level, volume, leaf));
            if (node != 0) {
                atoll_set64(store->journal, &node->value, node->value | bit);
                break; /* its ancestors know it */
            }
            hash_insert(store, hash_key(level, volume, leaf), bit);
        }
        STORE_ADD(store, leaves, 1);
        store_count(store, STORE_COUNTER_LEAVES_MADE, 1);
    }
    store->last_key = key;
    store->last_frame = frame;
    return frame;
}

void store_release_frame(struct store *store, uint64_t frame)
{
    uint64_t key = store->frame_key[frame] - 1, leaf = FORMAT_KEY_NUMBER(key);
    uint32_t volume = FORMAT_KEY_VOLUME(key);
    assert(store->frame_key[frame] != 0 && store->frame_used[frame] == 0);
    hash_remove(store, hash_find(store, hash_key(0, volume, leaf)));
    for (uint32_t level = 1; level <= LEVEL_TOP; level++) {
        struct store_hash_entry *node = hash_find(store, hash_key(level, volume, leaf));
        uint64_t mask = node->value & ~((uint64_t)1 << (leaf >> 6 * (level - 1) & 63));
        if (mask != 0) {
            atoll_set64(store->journal, &node->value, mask);
            break;
        }
        hash_remove(store, node);
    }
    atoll_set64(store->journal, &store->frame_key[frame], 0);
    atoll_set32(store->journal, &store->frame_stack[store->area->frames_free], (uint32_t)frame);
    STORE_ADD(store, frames_free, 1);
    STORE_ADD(store, leaves, -1);
    STORE_ADD(store, leaves_released, 1);
    store->last_key = 0;
}

static bool holds_data(uint64_t value) { return MAP_KIND(value) == MAP_PBA || MAP_KIND(value) == MAP_LOG; }

void store_set_entry(struct store *store, uint64_t frame, uint32_t index, uint64_t value)
{
    uint64_t *entry = &store_frame(store, frame)[index], old = *entry;
    if (old == value)
        return;
    atoll_set64(store->journal, entry, value);
    if ((old != 0) != (value != 0))
        atoll_set32(store->journal, &store->frame_used[frame], store->frame_used[frame] + (value != 0 ? 1u : -1u));
    if (holds_data(old) != holds_data(value)) {
        struct atoll_volume *volume = &store->dedup->public->volumes[FORMAT_KEY_VOLUME(store->frame_key[frame] - 1)];
        atoll_set64(store->journal, &volume->mapped_blocks, volume->mapped_blocks + (holds_data(value) ? 1 : -(uint64_t)1));
    }
}

uint64_t store_map_get(struct dedup *dedup, uint32_t volume, uint64_t lba)
{
    uint64_t frame = store_find_frame(dedup->store, volume, lba / FORMAT_LEAF_ENTRIES, false);
    return frame == NO_FRAME ? 0 : store_frame(dedup->store, frame)[lba % FORMAT_LEAF_ENTRIES];
}

const uint64_t *store_map_leaf(struct dedup *dedup, uint32_t volume, uint64_t leaf)
{
    uint64_t frame = store_find_frame(dedup->store, volume, leaf, false);
    return frame == NO_FRAME ? 0 : store_frame(dedup->store, frame);
}

uint64_t store_map_next_leaf(struct dedup *dedup, uint32_t volume, uint64_t leaf, uint64_t end)
{
    const struct store *store = dedup->store;
    if (leaf >= end || leaf >> 6 * LEVEL_TOP != 0)
        return end;
    if (hash_find(store, hash_key(0, volume, leaf)) != 0)
        return leaf;
    /* Climb until a node has a child behind the path that leads to `leaf`. */
    for (uint32_t level = 1; level <= LEVEL_TOP; level++) {
        const struct store_hash_entry *node = hash_find(store, hash_key(level, volume, leaf));
        uint64_t child = leaf >> 6 * (level - 1);
        uint64_t mask = node == 0 || (child & 63) == 63 ? 0 : node->value & ~(uint64_t)0 << ((child & 63) + 1);
        if (mask == 0)
            continue;
        /* Descend to the first leaf below it. */
        uint64_t number = (child & ~(uint64_t)63) + (uint64_t)__builtin_ctzll(mask);
        for (uint32_t down = level - 1; down > 0; down--) {
            node = hash_find(store, hash_key(down, volume, number << 6 * down));
            number = number * 64 + (uint64_t)__builtin_ctzll(node->value);
        }
        return number < end ? number : end;
    }
    return end;
}

int store_map_log(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t record, uint64_t *old)
{
    struct store *store = dedup->store;
    if (dedup->public->volumes[volume].state != ATOLL_VOLUME_READY)
        return ATOLL_ENOENT;
    uint64_t frame = store_find_frame(store, volume, lba / FORMAT_LEAF_ENTRIES, true);
    if (frame == NO_FRAME)
        return ATOLL_ENOSPC;
    *old = store_frame(store, frame)[lba % FORMAT_LEAF_ENTRIES];
    store_set_entry(store, frame, lba % FORMAT_LEAF_ENTRIES, MAP_VALUE(MAP_LOG, record));
    return ATOLL_OK;
}

/* --- Persistent changes ---------------------------------------------------------------------------------------------- */

uint32_t store_drop_value(struct store *store, uint64_t value, uint64_t *records)
{
    if (MAP_KIND(value) == MAP_ZERO) {
        STORE_ADD(store, zero_promises, -1);
        STORE_ADD(store, reserved_blocks, -1);
        return 0;
    }
    if (MAP_KIND(value) != MAP_PBA)
        return 0;
    uint64_t pba = MAP_NUMBER(value);
    assert(store_usable(store, pba) && REF_IS_COUNT(store->refs[pba]));
    uint32_t count = store->refs[pba] - 1;
    STORE_ADD(store, references, -1);
    if (count == 0)
        store_free_block(store, pba);
    else
        atoll_set32(store->journal, &store->refs[pba], count);
    store_mark_dirty(store, store->shape.refs_base + pba / FORMAT_REFS_PER_PAGE);
    records[0] = FORMAT_RECORD(FORMAT_RECORD_REFS, pba);
    records[1] = count;
    return 2;
}

/* Sets the entry to a persistent value and notes it; `records` has room for the MAP record. */
static void set_persistent(struct store *store, uint32_t volume, uint64_t lba, uint64_t frame, uint64_t value, uint64_t *records)
{
    assert(frame != NO_FRAME); /* a leaf with a logged or persistent entry exists */
    store_set_entry(store, frame, lba % FORMAT_LEAF_ENTRIES, value);
    store_mark_dirty(store, store->shape.leaves_base + frame);
    records[0] = FORMAT_RECORD(FORMAT_RECORD_MAP, FORMAT_KEY(volume, lba));
    records[1] = value;
}

void store_place(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base, uint64_t pba, struct fingerprint print)
{
    struct store *store = dedup->store;
    uint64_t records[STORE_CHANGE_BYTES / 8];
    uint64_t frame = store_find_frame(store, volume, lba / FORMAT_LEAF_ENTRIES, false);
    assert(store_usable(store, pba) && store->refs[pba] == REF_IN_FLIGHT);
    if (store->prints[pba].low != store->area->flush_failures && !store->area->rewrite_wanted)
        STORE_SET(store, rewrite_wanted, 1); /* perhaps it was written before a flush failed: store_rewrite.c */
    atoll_set32(store->journal, &store->refs[pba], 1);
    atoll_set64(store->journal, &store->prints[pba].low, print.low);
    atoll_set64(store->journal, &store->prints[pba].high, print.high);
    store_mark_dirty(store, store->shape.refs_base + pba / FORMAT_REFS_PER_PAGE);
    store_mark_dirty(store, store->shape.prints_base + pba / FORMAT_PRINTS_PER_PAGE);
    STORE_ADD(store, references, 1);
    if (!store->area->data_unflushed)
        STORE_SET(store, data_unflushed, 1);
    set_persistent(store, volume, lba, frame, MAP_VALUE(MAP_PBA, pba), records);
    records[2] = FORMAT_RECORD(FORMAT_RECORD_BLOCK, pba);
    records[3] = 1;
    records[4] = print.low;
    records[5] = print.high;
    store_log_append(store, records, 6 + store_drop_value(store, base, records + 6));
    store_remember_print(store, pba);
}

bool store_share(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base, uint64_t pba)
{
    struct store *store = dedup->store;
    uint64_t records[STORE_CHANGE_BYTES / 8];
    uint32_t count = store_references(dedup, pba);
    if (count == 0 || count == REF_COUNT_MAX)
        return false;
    uint64_t frame = store_find_frame(store, volume, lba / FORMAT_LEAF_ENTRIES, false);
    assert(frame != NO_FRAME);
    if (base == MAP_VALUE(MAP_PBA, pba)) { /* the same content again: nothing changes for the device */
        store_set_entry(store, frame, lba % FORMAT_LEAF_ENTRIES, base);
        return true;
    }
    atoll_set32(store->journal, &store->refs[pba], count + 1);
    store_mark_dirty(store, store->shape.refs_base + pba / FORMAT_REFS_PER_PAGE);
    STORE_ADD(store, references, 1);
    set_persistent(store, volume, lba, frame, MAP_VALUE(MAP_PBA, pba), records);
    records[2] = FORMAT_RECORD(FORMAT_RECORD_REFS, pba);
    records[3] = count + 1;
    store_log_append(store, records, 4 + store_drop_value(store, base, records + 4));
    return true;
}

void store_unmap(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base)
{
    struct store *store = dedup->store;
    uint64_t records[STORE_CHANGE_BYTES / 8];
    uint64_t frame = store_find_frame(store, volume, lba / FORMAT_LEAF_ENTRIES, false);
    if (MAP_KIND(base) == MAP_HOLE) { /* nothing changes for the device */
        if (frame != NO_FRAME) {
            store_set_entry(store, frame, lba % FORMAT_LEAF_ENTRIES, 0);
            if (store->frame_used[frame] == 0) /* the next checkpoint gives the leaf back */
                store_mark_dirty(store, store->shape.leaves_base + frame);
        }
        return;
    }
    set_persistent(store, volume, lba, frame, 0, records);
    store_log_append(store, records, 2 + store_drop_value(store, base, records + 2));
}

int store_promise_zero(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base)
{
    struct store *store = dedup->store;
    uint64_t records[STORE_CHANGE_BYTES / 8];
    if (dedup->public->volumes[volume].state != ATOLL_VOLUME_READY)
        return ATOLL_ENOENT;
    uint64_t frame = store_find_frame(store, volume, lba / FORMAT_LEAF_ENTRIES, true);
    if (frame == NO_FRAME)
        return ATOLL_ENOSPC;
    assert(store->area->reserved_blocks > store->area->zero_promises);
    STORE_ADD(store, zero_promises, 1);
    set_persistent(store, volume, lba, frame, MAP_VALUE(MAP_ZERO, 0), records);
    store_log_append(store, records, 2 + store_drop_value(store, base, records + 2));
    return ATOLL_OK;
}
