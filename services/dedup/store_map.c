/*
 * The map: leaves of 512 entries, pages of one tree of all volumes; and the persistent changes of entries, each noted in the
 * metadata log as one group of records.
 *
 * A leaf is in memory while the datapath has logged entries in it (the frame's live words). What it looked at in a step
 * it asked for in that step (store_page.c).
 *
 * After a crash: everything here is in frames and journaled.
 */
#include "services/dedup/store_internal.h"

_Static_assert(FORMAT_VOLUME_BYTES_MAX >> ATOLL_BLOCK_SHIFT >> 9 <= (uint64_t)1 << 39, "a leaf's number has 39 bits");
_Static_assert(FORMAT_LEAF_ENTRIES == 512, "an LBA's leaf");

uint32_t store_leaf(struct store *store, uint32_t volume, uint64_t leaf)
{
    if (leaf >> 39 != 0)
        return STORE_NO_FRAME;
    return store_find(store, FORMAT_PAGE(FORMAT_TREE_MAP, 0, FORMAT_LEAF_NUMBER(volume, leaf)));
}

static bool holds_data(uint64_t value) { return MAP_KIND(value) == MAP_PBA || MAP_KIND(value) == MAP_LOG; }

void store_set_entry(struct store *store, uint32_t frame, uint32_t index, uint64_t value)
{
    uint64_t *entry = (uint64_t *)store_page_memory(store, frame) + index, old = *entry;
    if (old == value)
        return;
    atoll_set64(store->journal, entry, value);
    if (MAP_KIND(old) == MAP_LOG && store->delete_logged)
        store->delete_retry_ns = 0; /* perhaps what a deletion waits for */
    store_change_live(store, frame, (MAP_KIND(value) == MAP_LOG) - (MAP_KIND(old) == MAP_LOG));
    if (holds_data(old) != holds_data(value)) {
        uint32_t number = FORMAT_LEAF_VOLUME(FORMAT_PAGE_NUMBER(store->frames[frame].page));
        struct atoll_volume *volume = &store->dedup->public->volumes[number];
        atoll_set64(store->journal, &volume->mapped_blocks, volume->mapped_blocks + (holds_data(value) ? 1 : -(uint64_t)1));
    }
}

uint64_t store_map_get(struct dedup *dedup, uint32_t volume, uint64_t lba)
{
    const uint64_t *leaf = store_map_leaf(dedup, volume, lba / FORMAT_LEAF_ENTRIES);
    return leaf == 0 ? 0 : leaf[lba % FORMAT_LEAF_ENTRIES];
}

const uint64_t *store_map_leaf(struct dedup *dedup, uint32_t volume, uint64_t leaf)
{
    uint32_t frame = store_leaf(dedup->store, volume, leaf);
    return frame == STORE_NO_FRAME ? 0 : store_page_memory(dedup->store, frame);
}

/* First page of level 0 from `number` on (<= `last`) that exists below a directory, or last + 1. */
static enum store_want next_below(struct store *store, uint32_t level, uint64_t directory, uint64_t number, uint64_t last, uint64_t *next)
{
    uint32_t shift = 8 * (level - 1), frame;
    enum store_want want = store_get(store, FORMAT_PAGE(FORMAT_TREE_MAP, level, directory), false, &frame);
    *next = last + 1;
    if (want != STORE_HAVE || frame == STORE_NO_FRAME)
        return want;
    const struct format_pointer *pointers = store_page_memory(store, frame);
    for (uint64_t child = number >> shift; child >> 8 == directory && child <= last >> shift; child++) {
        uint64_t begin = child << shift;
        if (pointers[child % FORMAT_POINTERS].slot == 0)
            continue;
        if (begin < number)
            begin = number;
        if (level == 1)
            *next = begin;
        else
            want = next_below(store, level - 1, child, begin, last, next);
        if (want != STORE_HAVE || *next <= last)
            return want;
    }
    return STORE_HAVE;
}
_Static_assert(FORMAT_POINTERS == 256, "8 bits a level");

enum store_want store_next_leaf(struct dedup *dedup, uint32_t volume, uint64_t leaf, uint64_t end, uint64_t *next)
{
    uint64_t most = FORMAT_VOLUME_BYTES_MAX / ATOLL_BLOCK_BYTES / FORMAT_LEAF_ENTRIES, found;
    if (end > most)
        end = most;
    *next = end;
    if (leaf >= end)
        return STORE_HAVE;
    enum store_want want = next_below(dedup->store, format_levels[FORMAT_TREE_MAP], 0, FORMAT_LEAF_NUMBER(volume, leaf),
                                      FORMAT_LEAF_NUMBER(volume, end - 1), &found);
    if (want == STORE_LOST) {
        uint64_t directory = dedup->store->want_page;
        found = (FORMAT_PAGE_NUMBER(directory) + 1) << 8 * FORMAT_PAGE_LEVEL(directory);
    }
    if (want != STORE_WAIT && found - FORMAT_LEAF_NUMBER(volume, 0) < end)
        *next = found - FORMAT_LEAF_NUMBER(volume, 0);
    return want;
}

int store_map_log(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t record, uint64_t *old)
{
    struct store *store = dedup->store;
    if (dedup->public->volumes[volume].state != ATOLL_VOLUME_READY)
        return ATOLL_ENOENT;
    uint32_t frame = store_leaf(store, volume, lba / FORMAT_LEAF_ENTRIES);
    assert(frame != STORE_NO_FRAME); /* asked for in this step */
    *old = ((const uint64_t *)store_page_memory(store, frame))[lba % FORMAT_LEAF_ENTRIES];
    store_set_entry(store, frame, lba % FORMAT_LEAF_ENTRIES, MAP_VALUE(MAP_LOG, record));
    return ATOLL_OK;
}

/* --- Persistent changes ---------------------------------------------------------------------------------------------- */

/* Sums of persistent values. A volume's is on the device in its entry of the table. */
static void change_mapped(struct store *store, uint32_t volume, int64_t change)
{
    STORE_ADD(store, references, change);
    STORE_ADD(store, mapped[volume], change);
    store_table_dirty(store, volume / FORMAT_VOLUMES_PER_PAGE);
}

uint32_t store_drop_value(struct store *store, uint32_t volume, uint64_t value, uint64_t *records)
{
    if (MAP_KIND(value) == MAP_ZERO) {
        STORE_ADD(store, zero_promises, -1);
        STORE_ADD(store, reserved_blocks, -1);
        return 0;
    }
    if (MAP_KIND(value) != MAP_PBA)
        return 0;
    uint64_t pba = MAP_NUMBER(value);
    const uint32_t *word = store_ref(store, pba);
    change_mapped(store, volume, -1);
    if (word == 0) /* its page of counts is damaged in both copies: the block stays counted, which loses no more than its space */
        return 0;
    assert(REF_IS_COUNT(*word));
    uint32_t count = *word - 1;
    store_set_ref(store, pba, count);
    records[0] = FORMAT_RECORD(FORMAT_RECORD_REFS, pba);
    records[1] = count;
    return 2;
}

static void map_record(uint64_t *records, uint32_t volume, uint64_t lba, uint64_t base, uint64_t value)
{
    records[0] = FORMAT_RECORD(FORMAT_RECORD_MAP, FORMAT_KEY(volume, lba | (uint64_t)MAP_KIND(base) << 50));
    records[1] = value;
}

static void block_record(uint64_t *records, uint64_t pba, struct fingerprint print)
{
    records[0] = FORMAT_RECORD(FORMAT_RECORD_BLOCK, pba);
    records[1] = 1;
    records[2] = print.low;
    records[3] = print.high;
}

/* Sets the entry to a persistent value and notes it; `records` has room for the MAP record. */
static void set_persistent(struct store *store, uint32_t volume, uint64_t lba, uint32_t frame, uint64_t base, uint64_t value,
                           uint64_t *records)
{
    assert(frame != STORE_NO_FRAME); /* a leaf with a logged or persistent entry, asked for in this step */
    store_mark_dirty(store, frame);
    store_set_entry(store, frame, lba % FORMAT_LEAF_ENTRIES, value);
    map_record(records, volume, lba, base, value);
}

void store_place(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base, uint64_t pba, struct fingerprint print)
{
    struct store *store = dedup->store;
    uint64_t records[STORE_CHANGE_BYTES / 8];
    uint32_t *word = store_ref(store, pba), frame = store_leaf(store, volume, lba / FORMAT_LEAF_ENTRIES);
    struct fingerprint *place = store_print(store, pba);
    assert(word != 0 && place != 0 && REF_IS_IN_FLIGHT(*word));
    if (*word != REF_IN_FLIGHT(store->area->flush_failures) && !store->area->rewrite_wanted)
        STORE_SET(store, rewrite_wanted, 1); /* perhaps it was written before a flush failed: store_rewrite.c */
    store_set_ref(store, pba, 1);
    atoll_set64(store->journal, &place->low, print.low);
    atoll_set64(store->journal, &place->high, print.high);
    store_mark_dirty(store, store_find(store, FORMAT_PAGE(FORMAT_TREE_PRINTS, 0, pba / FORMAT_PRINTS_PER_PAGE)));
    change_mapped(store, volume, 1);
    if (!store->area->data_unflushed)
        STORE_SET(store, data_unflushed, 1);
    set_persistent(store, volume, lba, frame, base, MAP_VALUE(MAP_PBA, pba), records);
    block_record(records + 2, pba, print);
    store_log_append(store, records, 6 + store_drop_value(store, volume, base, records + 6));
    store_remember_print(store, pba, 1);
}

uint32_t store_place_records(struct store *store, const struct store_placing *placing, uint64_t *records, uint32_t before)
{
    uint64_t *own = records + before, old = MAP_NUMBER(placing->base);
    map_record(own, placing->volume, placing->lba, placing->base, MAP_VALUE(MAP_PBA, placing->pba));
    block_record(own + 2, placing->pba, placing->print);
    if (MAP_KIND(placing->base) != MAP_PBA)
        return 6;
    const uint32_t *word = store_ref(store, old);
    if (word == 0 || !REF_IS_COUNT(*word))
        return 0;
    uint64_t count = *word;
    own[6] = FORMAT_RECORD(FORMAT_RECORD_REFS, old);
    for (uint32_t at = 0; at < before; at += store_record_words(records[at]))
        if (records[at] == own[6])
            count = records[at + 1];
    own[7] = count - 1;
    return 8;
}

bool store_share(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base, uint64_t pba)
{
    struct store *store = dedup->store;
    uint64_t records[STORE_CHANGE_BYTES / 8];
    uint32_t count = store_references(dedup, pba);
    if (count == 0 || count == REF_COUNT_MAX)
        return false;
    uint32_t frame = store_leaf(store, volume, lba / FORMAT_LEAF_ENTRIES);
    assert(frame != STORE_NO_FRAME);
    if (base == MAP_VALUE(MAP_PBA, pba)) { /* the same content again: nothing changes for the device */
        store_set_entry(store, frame, lba % FORMAT_LEAF_ENTRIES, base);
        return true;
    }
    store_set_ref(store, pba, count + 1);
    change_mapped(store, volume, 1);
    set_persistent(store, volume, lba, frame, base, MAP_VALUE(MAP_PBA, pba), records);
    records[2] = FORMAT_RECORD(FORMAT_RECORD_REFS, pba);
    records[3] = count + 1;
    store_log_append(store, records, 4 + store_drop_value(store, volume, base, records + 4));
    if (count == 1 && store_print(store, pba) != 0)
        store_remember_print(store, pba, 2); /* it is shared now, and stays longer */
    return true;
}

void store_unmap(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base)
{
    struct store *store = dedup->store;
    uint64_t records[STORE_CHANGE_BYTES / 8];
    uint32_t frame = store_leaf(store, volume, lba / FORMAT_LEAF_ENTRIES);
    if (MAP_KIND(base) == MAP_HOLE) { /* nothing changes for the device */
        if (frame != STORE_NO_FRAME)
            store_set_entry(store, frame, lba % FORMAT_LEAF_ENTRIES, 0);
        return;
    }
    set_persistent(store, volume, lba, frame, base, 0, records);
    store_log_append(store, records, 2 + store_drop_value(store, volume, base, records + 2));
}

int store_promise_zero(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t base)
{
    struct store *store = dedup->store;
    uint64_t records[STORE_CHANGE_BYTES / 8];
    if (dedup->public->volumes[volume].state != ATOLL_VOLUME_READY)
        return ATOLL_ENOENT;
    uint32_t frame = store_leaf(store, volume, lba / FORMAT_LEAF_ENTRIES);
    assert(store->area->reserved_blocks > store->area->zero_promises);
    STORE_ADD(store, zero_promises, 1);
    set_persistent(store, volume, lba, frame, base, MAP_VALUE(MAP_ZERO, 0), records);
    store_log_append(store, records, 2 + store_drop_value(store, volume, base, records + 2));
    return ATOLL_OK;
}
