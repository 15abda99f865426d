/*
 * Places for metadata pages, and which blocks can hold data.
 *
 *   store_know_places   what follows from the superblock's extents
 *   store_take_slots    a run of free slots for a checkpoint's pages
 *   store_retire_slot   the durable root still needs it: free after the root switch (store_free_retired)
 *   store_table_*       pages that lie in no frame: volume table, groups, and the bits of the slots
 *
 * A slot stands for two blocks, one in each copy. Two bits for each: slot_bits says what may be handed out, slot_next what the next
 * root says. They differ while a checkpoint goes on.
 *
 * After a crash: all of it is journaled. After power loss: the bits come from the slot tree of the durable root.
 */
#include "services/dedup/store_internal.h"

/* --- Places ---------------------------------------------------------------------------------------------------------- */

void store_know_places(struct store *store)
{
    const struct store_area *area = store->area;
    uint64_t first = FORMAT_SUPER_BLOCKS + area->log_blocks;
    /* Reserved runs, in the order of the device: copy A of extent 0, its copy B with log and superblocks; then those of the others. */
    store->range_count = 0;
    for (uint64_t index = 0; index < area->extent_count; index++) {
        const struct format_extent *extent = &area->extents[index];
        uint64_t tail = index == 0 ? area->log_blocks + FORMAT_SUPER_BLOCKS : FORMAT_SUPER_BLOCKS;
        first = extent->first + extent->count;
        store->ranges[store->range_count++] = (struct store_range){first, extent->second};
        first = extent->second + extent->count + tail;
    }
    uint64_t groups = (area->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS;
    store->tables.groups = FORMAT_VOLUME_PAGES;
    store->tables.slots = store->tables.groups + (groups + FORMAT_GROUPS_PER_PAGE - 1) / FORMAT_GROUPS_PER_PAGE;
    store->tables.count = store->tables.slots + (area->slots + FORMAT_SLOTS_PER_PAGE - 1) / FORMAT_SLOTS_PER_PAGE;
}

uint32_t store_group_blocks(const struct store *store, uint64_t group)
{
    uint64_t begin = group * STORE_GROUP_BLOCKS, end = begin + STORE_GROUP_BLOCKS, count = 0;
    for (uint32_t index = 0; index < store->range_count; index++) {
        const struct store_range *range = &store->ranges[index];
        uint64_t from = range->first > begin ? range->first : begin, to = range->end < end ? range->end : end;
        count += from < to ? to - from : 0;
    }
    return (uint32_t)count;
}

/* Extent of a slot and the slot's index in it; NULL: there is no such slot. */
static const struct format_extent *extent_of(const struct store *store, uint64_t slot, uint64_t *index)
{
    for (uint64_t each = 0; each < store->area->extent_count; each++) {
        const struct format_extent *extent = &store->area->extents[each];
        if (slot < extent->count) {
            *index = slot;
            return extent;
        }
        slot -= extent->count;
    }
    return 0;
}

uint64_t store_slot_pba(const struct store *store, uint64_t slot, uint32_t copy)
{
    uint64_t index;
    const struct format_extent *extent = slot == 0 ? 0 : extent_of(store, slot, &index);
    return extent == 0 ? 0 : index + (copy == 0 ? extent->first : extent->second);
}

/* --- Slots ----------------------------------------------------------------------------------------------------------- */

static bool in_use(const struct store *store, uint64_t slot) { return store->slot_bits[slot / 64] >> slot % 64 & 1; }

void store_table_dirty(struct store *store, uint64_t number) { store_set_bit(store, store->table_dirty, number, true); }

static void slot_dirty(struct store *store, uint64_t slot)
{
    store_table_dirty(store, store->tables.slots + slot / FORMAT_SLOTS_PER_PAGE);
}

uint32_t store_take_slots(struct store *store, uint32_t want, uint64_t *slot)
{
    const struct store_area *area = store->area;
    uint64_t at = area->slot_cursor < area->slots ? area->slot_cursor : 0, index = 0;
    uint32_t count = 0;
    if (area->slots_free == 0)
        return 0;
    for (uint64_t looked = 0; in_use(store, at); looked++) {
        assert(looked <= 2 * area->slots);
        at = at % 64 == 0 && store->slot_bits[at / 64] == UINT64_MAX ? at + 64 : at + 1;
        if (at >= area->slots)
            at = 0;
    }
    const struct format_extent *extent = extent_of(store, at, &index);
    uint64_t left = extent->count - index;
    *slot = at;
    for (; count < want && count < left && !in_use(store, at); count++, at++) {
        store_set_bit(store, store->slot_bits, at, true);
        store_set_bit(store, store->slot_next, at, true);
        if (count == 0 || at % FORMAT_SLOTS_PER_PAGE == 0)
            slot_dirty(store, at);
    }
    STORE_ADD(store, slots_free, -(uint64_t)count);
    STORE_SET(store, slot_cursor, at);
    return count;
}

void store_free_slot(struct store *store, uint64_t slot)
{
    assert(in_use(store, slot));
    store_set_bit(store, store->slot_bits, slot, false);
    store_set_bit(store, store->slot_next, slot, false);
    slot_dirty(store, slot);
    STORE_ADD(store, slots_free, 1);
}

void store_retire_slot(struct store *store, uint64_t slot)
{
    assert(in_use(store, slot) && store->area->previous_count < store->area->spare_slots);
    store_set_bit(store, store->slot_next, slot, false);
    slot_dirty(store, slot);
    atoll_set32(store->journal, &store->previous[store->area->previous_count], (uint32_t)slot);
    STORE_ADD(store, previous_count, 1);
}

bool store_free_retired(struct store *store)
{
    struct store_area *area = store->area;
    uint32_t freed = 0;
    for (; area->previous_count != 0 && freed < STORE_FREE_PER_STEP; freed++) {
        STORE_ADD(store, previous_count, -1);
        store_set_bit(store, store->slot_bits, store->previous[area->previous_count], false); /* slot_next, and its page, have it so */
    }
    STORE_ADD(store, slots_free, freed);
    return area->previous_count != 0;
}

/* --- Tables ---------------------------------------------------------------------------------------------------------- */

uint64_t store_table_page(const struct store *store, uint64_t number)
{
    if (number < store->tables.groups)
        return FORMAT_PAGE(FORMAT_TREE_VOLUMES, 0, number);
    if (number < store->tables.slots)
        return FORMAT_PAGE(FORMAT_TREE_GROUPS, 0, number - store->tables.groups);
    return FORMAT_PAGE(FORMAT_TREE_SLOTS, 0, number - store->tables.slots);
}

/* Slots that are handed out to nobody: the slot tree's own. */
static bool own_slot(uint64_t slot) { return slot % FORMAT_SLOTS_PER_PAGE < FORMAT_SLOTS_RESERVED; }

void store_table_image(const struct store *store, uint64_t number, void *image)
{
    if (number < store->tables.groups) {
        for (uint32_t index = 0; index < FORMAT_VOLUMES_PER_PAGE; index++)
            store_volume_image(store, (uint32_t)number * FORMAT_VOLUMES_PER_PAGE + index, (struct format_volume *)image + index);
    } else if (number < store->tables.slots) {
        const uint64_t *group = store->groups + (number - store->tables.groups) * FORMAT_GROUPS_PER_PAGE;
        uint16_t *stored = image;
        for (uint32_t index = 0; index < FORMAT_GROUPS_PER_PAGE; index++)
            stored[index] = (uint16_t)GROUP_STORED(group[index]);
    } else {
        uint64_t first = (number - store->tables.slots) * (FORMAT_SLOTS_PER_PAGE / 64);
        memcpy(image, store->slot_next + first, ATOLL_BLOCK_BYTES);
    }
}
_Static_assert(FORMAT_GROUPS_PER_PAGE * sizeof(uint16_t) == ATOLL_BLOCK_BYTES && FORMAT_SLOTS_PER_PAGE / 8 == ATOLL_BLOCK_BYTES,
               "a page");

/* The volume table's sums are those at the beginning of the checkpoint: a page whose sums have changed since is dirty still. */
bool store_table_behind(const struct store *store, uint64_t number)
{
    const struct store_area *area = store->area;
    uint64_t first = number * FORMAT_VOLUMES_PER_PAGE;
    return number < store->tables.groups && memcmp(&area->mapped[first], &area->checkpoint_mapped[first],
                                                   FORMAT_VOLUMES_PER_PAGE * sizeof area->mapped[0]) != 0;
}

static bool take_volumes(struct store *store, uint64_t number, const uint8_t *image)
{
    for (uint32_t index = 0; index < FORMAT_VOLUMES_PER_PAGE; index++) {
        struct format_volume volume;
        memcpy(&volume, image + index * sizeof volume, sizeof volume);
        if (volume.generation == 0)
            continue;
        if (volume.id != number * FORMAT_VOLUMES_PER_PAGE + index || !store_volume_take(store, &volume))
            return false;
        store->area->mapped[volume.id] = volume.mapped_blocks;
        store->area->references += volume.mapped_blocks;
    }
    return true;
}

bool store_table_take(struct store *store, uint64_t number, const void *image)
{
    struct store_area *area = store->area;
    if (number < store->tables.groups)
        return take_volumes(store, number, image);
    if (number < store->tables.slots) {
        const uint16_t *stored = image;
        uint64_t first = (number - store->tables.groups) * FORMAT_GROUPS_PER_PAGE;
        for (uint64_t index = 0; index < FORMAT_GROUPS_PER_PAGE; index++) {
            uint32_t blocks = store_group_blocks(store, first + index);
            if (stored[index] > blocks)
                return false;
            if (first + index < (area->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS)
                store->groups[first + index] = GROUP(blocks - stored[index], 0, stored[index], 0);
        }
        return true;
    }
    uint64_t first = (number - store->tables.slots) * FORMAT_SLOTS_PER_PAGE;
    const uint64_t *bits = image;
    for (uint64_t index = 0; index < FORMAT_SLOTS_PER_PAGE; index++) {
        bool used = bits[index / 64] >> index % 64 & 1, own = own_slot(first + index), there = first + index < area->slots;
        if (used && (own || !there))
            return false;
        uint64_t bit = (uint64_t)1 << index % 64;
        store->slot_bits[(first + index) / 64] |= used || own || !there ? bit : 0;
        store->slot_next[(first + index) / 64] |= used ? bit : 0;
        area->slots_free += !used && !own && there;
    }
    return true;
}
