/*
 * Loading, the metadata log: replay of both copies from log_start on, and where it may end.
 *
 * It ends at the first block that is right in neither copy. That must be at or after the end that the superblock saw
 * durable, and no block anywhere in the log may have been sealed when the ending one was durable: else the store is refused (docs/format.md).
 *
 * After a crash: as store_load.c.
 */
#include "services/dedup/store_load.h"

/* `sequence` 0: whatever the block says. */
static bool log_block_good(const struct store *store, const uint8_t *block, uint64_t sequence, struct format_log_header *header)
{
    memcpy(header, block, sizeof *header);
    if (header->magic != FORMAT_LOG_MAGIC || header->version != FORMAT_VERSION || header->used_bytes == 0 ||
        header->used_bytes > FORMAT_LOG_RECORD_BYTES || header->used_bytes % 8 != 0 ||
        (sequence != 0 && header->sequence != sequence))
        return false;
    return header->checksum == store_checksum(store, FORMAT_SEED_LOG, header->sequence, block + 8, ATOLL_BLOCK_BYTES - 8);
}

/* Leaves that the log has emptied so far leave the map, as they did while it was written: others have their frames now. */
static bool release_empty(struct store *store)
{
    bool did = false;
    for (uint64_t frame = 0; frame < store->area->frames_high; frame++) {
        if (store->frame_key[frame] == 0 || store->frame_used[frame] != 0)
            continue;
        store_release_frame(store, frame);
        did = true;
        if (store->journal->count > ATOLL_JOURNAL_ENTRIES / 2)
            atoll_domain_commit(store->dedup->domain);
    }
    return did;
}

static bool replay_map(struct store *store, uint32_t volume, uint64_t lba, uint64_t count, uint64_t value)
{
    bool sane = volume < ATOLL_VOLUME_COUNT && count <= FORMAT_HOLES_MAX && count <= FORMAT_LEAF_ENTRIES - lba % FORMAT_LEAF_ENTRIES &&
                lba < FORMAT_VOLUME_BYTES_MAX / ATOLL_BLOCK_BYTES &&
                (value == 0 || value == MAP_VALUE(MAP_ZERO, 0) ||
                 (MAP_KIND(value) == MAP_PBA && store_usable(store, MAP_NUMBER(value))));
    if (!sane)
        return false;
    uint64_t frame = store_find_frame(store, volume, lba / FORMAT_LEAF_ENTRIES, value != 0);
    if (frame == UINT64_MAX && value != 0 && release_empty(store))
        frame = store_find_frame(store, volume, lba / FORMAT_LEAF_ENTRIES, true);
    if (frame == UINT64_MAX)
        return value == 0; /* nothing to make a hole of; or no frame */
    for (uint64_t index = 0; index < count; index++)
        store_set_entry(store, frame, (uint32_t)((lba + index) % FORMAT_LEAF_ENTRIES), value);
    store_mark_dirty(store, store->shape.leaves_base + frame);
    return true;
}

static bool replay(struct store *store, const uint64_t *words, uint32_t count)
{
    for (uint32_t at = 0; at < count;) {
        uint64_t rest = FORMAT_RECORD_REST(words[at]);
        uint32_t left = count - at, type = FORMAT_RECORD_TYPE(words[at]);
        uint32_t length = type == FORMAT_RECORD_BLOCK ? 4 : type == FORMAT_RECORD_VOLUME ? 65 : 2;
        if (length > left)
            return false;
        switch (type) {
        case FORMAT_RECORD_MAP:
            if (!replay_map(store, FORMAT_KEY_VOLUME(rest), FORMAT_KEY_NUMBER(rest), 1, words[at + 1]))
                return false;
            break;
        case FORMAT_RECORD_HOLES:
            if (!replay_map(store, FORMAT_KEY_VOLUME(rest), FORMAT_KEY_NUMBER(rest), words[at + 1], 0))
                return false;
            break;
        case FORMAT_RECORD_BLOCK:
            if (!store_usable(store, rest))
                return false;
            store->prints[rest].low = words[at + 2];
            store->prints[rest].high = words[at + 3];
            store_mark_dirty(store, store->shape.prints_base + rest / FORMAT_PRINTS_PER_PAGE);
            /* fall through */
        case FORMAT_RECORD_REFS:
            if (!store_usable(store, rest) || words[at + 1] > REF_COUNT_MAX)
                return false;
            store->refs[rest] = (uint32_t)words[at + 1];
            store_mark_dirty(store, store->shape.refs_base + rest / FORMAT_REFS_PER_PAGE);
            break;
        case FORMAT_RECORD_VOLUME: {
            struct format_volume volume;
            memcpy(&volume, words + at + 1, sizeof volume);
            if (rest != volume.id || !store_volume_take(store, &volume))
                return false;
            store_mark_dirty(store, volume.id / FORMAT_VOLUMES_PER_PAGE);
            break;
        }
        default: return false;
        }
        at += length;
    }
    return true;
}

/* The batch holds both copies of the next log blocks: want 2i copy 0, 2i + 1 copy 1. */
void load_take_log(struct store *store)
{
    struct store_load *load = store->load;
    const uint8_t *memory = store_bounce(store);
    uint8_t block[ATOLL_BLOCK_BYTES];
    for (uint32_t index = 0; index < load->count; index++) {
        struct want *want = &load->wants[index];
        if (want->done || !want->submitted)
            continue;
        want->done = want->status == ATOLL_OK || !load_try_on(want);
    }
    for (uint32_t index = 0; index < load->count; index++)
        if (!load->wants[index].done)
            return;
    uint32_t pairs = load->count / 2;
    load->count = 0;
    for (uint32_t index = 0; index < pairs; index++) {
        struct format_log_header header;
        uint32_t good = 0, which = 0;
        for (uint32_t copy = 0; copy < 2; copy++) {
            uint8_t image[ATOLL_BLOCK_BYTES];
            uint32_t place = index + copy * pairs;
            memcpy(image, memory + place * ATOLL_BLOCK_BYTES, sizeof image);
            if (load->wants[place].status != ATOLL_OK || !log_block_good(store, image, load->sequence, &header) ||
                header.chain != load->chain)
                continue;
            good++;
            which |= 1u << copy;
            memcpy(block, image, sizeof block);
        }
        if (good == 0) {
            load->phase = LOAD_TAIL;
            load->cursor = 0;
            return;
        }
        if (good == 1) {
            load->repair = true;
            store_count(store, STORE_COUNTER_PAGES_REPAIRED, 1);
        }
        memcpy(&header, block, sizeof header);
        if (!replay(store, (const uint64_t *)(const void *)(block + sizeof header), header.used_bytes / 8)) {
            store_fail(store, "log block %llu has a record that makes no sense, or that there is no map leaf for",
                       (unsigned long long)load->sequence);
            return;
        }
        atoll_domain_commit(store->dedup->domain);
        load->chain = header.checksum;
        load->sequence++;
    }
}

void load_ask_log(struct store *store)
{
    struct store_load *load = store->load;
    const struct store_area *area = store->area;
    uint64_t left = area->log_start + area->log_blocks - load->sequence;
    uint32_t pairs = left < LOAD_WANTS / 2 ? (uint32_t)left : LOAD_WANTS / 2;
    for (uint32_t copy = 0; copy < 2; copy++)
        for (uint32_t index = 0; index < pairs; index++)
            load_want(load, (copy == 0 ? FORMAT_SUPER_BLOCKS : area->usable_end) + (load->sequence + index) % area->log_blocks, 0, 0);
    if (pairs == 0) {
        load->phase = LOAD_TAIL;
        load->cursor = 0;
    }
}

/* The log ends before load->sequence. Does anything say that it should not? Every block of it is looked at for that: one that was
 * sealed when blocks from here on were durable. */
void load_take_tail(struct store *store)
{
    struct store_load *load = store->load;
    const uint8_t *memory = store_bounce(store);
    for (uint32_t index = 0; index < load->count; index++) {
        struct want *want = &load->wants[index];
        uint8_t block[ATOLL_BLOCK_BYTES];
        struct format_log_header header;
        if (want->done || !want->submitted)
            continue;
        want->done = want->status == ATOLL_OK || !load_try_on(want);
        memcpy(block, memory + index * ATOLL_BLOCK_BYTES, sizeof block);
        if (want->status == ATOLL_OK && log_block_good(store, block, 0, &header) && header.durable > load->sequence) {
            store_fail(store,
                       "the metadata log is damaged: block %llu is bad in both copies, though blocks up to %llu were durable; "
                       "replaying less would lose flushed data",
                       (unsigned long long)load->sequence, (unsigned long long)header.durable - 1);
            return;
        }
    }
    for (uint32_t index = 0; index < load->count; index++)
        if (!load->wants[index].done)
            return;
    load->count = 0;
}

void load_ask_tail(struct store *store)
{
    struct store_load *load = store->load;
    struct store_area *area = store->area;
    if (load->sequence < load->super.log_durable) {
        store_fail(store,
                   "the metadata log is damaged: block %llu is bad in both copies, though blocks up to %llu were durable; replaying "
                   "less would lose flushed data",
                   (unsigned long long)load->sequence, (unsigned long long)load->super.log_durable - 1);
        return;
    }
    for (; load->cursor < 2 * area->log_blocks && load->count < LOAD_WANTS; load->cursor++) {
        uint64_t place = load->cursor % area->log_blocks;
        load_want(load, place + (load->cursor < area->log_blocks ? FORMAT_SUPER_BLOCKS : area->usable_end), 0, 0);
    }
    if (load->count != 0)
        return;
    load->phase = LOAD_POINTERS;
    load->cursor = 0;
}
