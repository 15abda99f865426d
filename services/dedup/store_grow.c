/*
 * Growth: a store that is smaller than its device becomes as large, while it is loaded.
 *
 * The new part gets an extent of metadata slots, copy A at its beginning and copy B at its end, and the superblocks' second copies
 * behind that; the log stays where it is. In memory everything is as if the store had always been so large; a checkpoint follows,
 * and its root switch is what makes it so on the device. Nobody is served before, so no log block is about a place that the old
 * root does not know, and no old root is found with a log that does not fit it.
 *
 * After a crash: the checkpoint goes on. After power loss: either root is whole, and growing is asked for again.
 */
#include "services/dedup/store_load.h"

/* Slots that are new, in the bits. */
static void add_slots(struct store *store, uint64_t before)
{
    struct store_area *area = store->area;
    for (uint64_t slot = before; slot < area->slots; slot++) {
        uint64_t bit = (uint64_t)1 << slot % 64, *word = &store->slot_bits[slot / 64];
        if (slot % FORMAT_SLOTS_PER_PAGE < FORMAT_SLOTS_RESERVED) {
            *word |= bit;
            continue;
        }
        *word &= ~bit;
        area->slots_free++;
    }
    for (uint64_t slot = area->slots; slot % FORMAT_SLOTS_PER_PAGE != 0; slot++)
        store->slot_bits[slot / 64] |= (uint64_t)1 << slot % 64;
}

/* Groups that have more blocks than before: the last of the old ones, and those behind it. */
static void add_groups(struct store *store, uint64_t before)
{
    uint64_t groups = (store->area->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS;
    for (uint64_t group = before / STORE_GROUP_BLOCKS; group < groups; group++) {
        uint32_t blocks = store_group_blocks(store, group), stored = GROUP_STORED(store->groups[group]);
        uint32_t frame = store_find(store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, group));
        store->groups[group] = GROUP(blocks - stored, 0, stored, 0);
        for (uint64_t index = 0; frame != STORE_NO_FRAME && index < STORE_GROUP_BLOCKS; index++) {
            uint32_t *word = (uint32_t *)store_page_memory(store, frame) + index;
            if (*word == REF_FIXED && store_usable(store, group * STORE_GROUP_BLOCKS + index))
                *word = 0;
        }
    }
}

bool store_grow(struct store *store)
{
    struct store_load *load = store->load;
    struct store_area *area = store->area;
    uint64_t before = area->device_blocks, after = area->geometry.device_blocks, slots = area->slots;
    if (!load->grown && (!area->geometry.grow || after < before + STORE_GROUP_BLOCKS))
        return true;
    if (!load->grown) { /* else the directories below were not all there the last time */
        if (area->extent_count == FORMAT_EXTENTS) {
            store_fail(store, "the store has been grown %u times, and cannot be grown again: copy its volumes to a new one", FORMAT_EXTENTS - 1);
            return false;
        }
        uint64_t wanted = format_slots(after), added = wanted > slots ? wanted - slots : 64;
        area->extents[area->extent_count++] = (struct format_extent){
            .first = before, .second = after - FORMAT_SUPER_BLOCKS - added, .count = (uint32_t)added};
        area->device_blocks = after;
        area->slots += added;
        area->spare_slots = format_spare_slots(after);
        store_know_places(store);
        add_slots(store, slots);
        add_groups(store, before);
        /* Numbers have changed: all of the tables are written. */
        memset(store->table_dirty, 0, (store->tables.count + 63) / 64 * 8);
        for (uint64_t number = 0; number < store->tables.count; number++)
            store->table_dirty[number / 64] |= (uint64_t)1 << number % 64;
        load->grown = true;
        store_root_first(store);
    }
    return load_pin(store);
}
