/*
 * Loading, the sums: what pages and log say must agree, and what is not on the device is made from it: metadata places, group
 * sums, space, mapped blocks of each volume, the fingerprint cache. Each function is a bounded step.
 *
 * After a crash: as store_load.c.
 */
#include "services/dedup/store_load.h"

#define FINISH_BLOCKS (256u << 10) /* reference words summed up in one step */
#define FINISH_FRAMES 512

void load_pointers_step(struct store *store)
{
    struct store_load *load = store->load;
    for (uint64_t work = 0; work < FINISH_BLOCKS && load->cursor < store->shape.total; work++, load->cursor++) {
        const struct format_pointer *pointer = &store->pointers[load->cursor];
        if (pointer->primary == 0)
            continue;
        const uint64_t places[2] = {pointer->primary, pointer->mirror};
        for (uint32_t copy = 0; copy < 2; copy++) {
            uint32_t word = store->refs[places[copy]];
            if (word != 0) {
                store_fail(store, "block %llu holds a metadata page (%s, page %llu) and is counted as %s",
                           (unsigned long long)places[copy], load_page_kind(store, load->cursor), (unsigned long long)load->cursor,
                           word == REF_METADATA ? "another one" : "data");
                return;
            }
            store->refs[places[copy]] = REF_METADATA;
        }
    }
    if (load->cursor == store->shape.total) {
        load->phase = LOAD_FRAMES;
        load->cursor = 0;
        for (uint32_t number = 0; number < ATOLL_VOLUME_COUNT; number++)
            store->dedup->public->volumes[number].mapped_blocks = 0; /* the replay changed it from nothing */
    }
}

void load_frames_step(struct store *store)
{
    struct store_load *load = store->load;
    struct store_area *area = store->area;
    for (uint32_t work = 0; work < FINISH_FRAMES && load->cursor < area->frames_high; work++, load->cursor++) {
        uint64_t frame = load->cursor;
        if (store->frame_key[frame] == 0)
            continue;
        uint64_t key = store->frame_key[frame] - 1;
        struct atoll_volume *volume = &store->dedup->public->volumes[FORMAT_KEY_VOLUME(key)];
        uint64_t mapped = 0, zeros = 0, used = 0;
        for (uint32_t index = 0; index < FORMAT_LEAF_ENTRIES; index++) {
            uint64_t value = store_frame(store, frame)[index];
            used += value != 0;
            if (value == 0)
                continue;
            if (value == MAP_VALUE(MAP_ZERO, 0)) {
                zeros++;
            } else if (MAP_KIND(value) == MAP_PBA && store_usable(store, MAP_NUMBER(value)) &&
                       REF_IS_COUNT(store->refs[MAP_NUMBER(value)])) {
                mapped++;
            } else {
                store_fail(store, "block %llu of volume %u is mapped to %llx, which holds no data",
                           (unsigned long long)(FORMAT_KEY_NUMBER(key) * FORMAT_LEAF_ENTRIES + index), FORMAT_KEY_VOLUME(key),
                           (unsigned long long)value);
                return;
            }
        }
        if (used != 0 && volume->state == ATOLL_VOLUME_FREE) {
            store_fail(store, "leaf %llu of volume %u holds data, and there is no such volume",
                       (unsigned long long)FORMAT_KEY_NUMBER(key), FORMAT_KEY_VOLUME(key));
            return;
        }
        assert(used == store->frame_used[frame]);
        volume->mapped_blocks += mapped;
        area->zero_promises += zeros;
        area->reserved_blocks += zeros;
        load->entries += mapped;
    }
    if (load->cursor == area->frames_high) {
        load->phase = LOAD_BLOCKS;
        load->cursor = 0;
    }
}

void load_blocks_step(struct store *store)
{
    struct store_load *load = store->load;
    struct store_area *area = store->area;
    uint64_t blocks_up = (area->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS * STORE_GROUP_BLOCKS;
    for (uint64_t work = 0; work < FINISH_BLOCKS && load->cursor < blocks_up; work += STORE_GROUP_BLOCKS) {
        uint32_t free_count = 0;
        uint64_t group = load->cursor / STORE_GROUP_BLOCKS;
        for (uint64_t end = load->cursor + STORE_GROUP_BLOCKS; load->cursor < end; load->cursor++) {
            uint64_t pba = load->cursor;
            uint32_t word = store->refs[pba];
            if (!store_usable(store, pba)) {
                if (word != 0) {
                    store_fail(store, "block %llu belongs to the superblocks or the log, and has a reference count",
                               (unsigned long long)pba);
                    return;
                }
                store->refs[pba] = REF_FIXED;
            } else if (word == 0) {
                free_count++;
            } else if (word == REF_METADATA) {
                area->metadata_blocks++;
            } else if (REF_IS_COUNT(word)) {
                area->stored_blocks++;
                area->references += word;
            } else {
                store_fail(store, "the reference count of block %llu is %x", (unsigned long long)pba, word);
                return;
            }
        }
        store->groups[group] = GROUP(free_count, 0, 0);
        area->free_blocks += free_count;
    }
    if (load->cursor < blocks_up)
        return;
    if (area->references != load->entries) {
        store_fail(store, "the reference counts add up to %llu, the maps name %llu blocks", (unsigned long long)area->references,
                   (unsigned long long)load->entries);
        return;
    }
    load->phase = LOAD_CACHE;
    load->cursor = area->usable_first;
}

void load_cache_step(struct store *store)
{
    struct store_load *load = store->load;
    for (uint32_t work = 0; work < ATOLL_JOURNAL_ENTRIES / 4 && load->cursor < store->area->usable_end; work++, load->cursor++)
        if (REF_IS_COUNT(store->refs[load->cursor]))
            store_remember_print(store, load->cursor);
    if (load->cursor == store->area->usable_end)
        load->phase = LOAD_FLUSH;
}
