/*
 * Loading, the metadata log: replay of both copies from log_start on, and where it may end.
 *
 * It ends at the first block that is right in neither copy. That must be at or after the end that the superblock saw
 * durable, and no block anywhere in the log may have been sealed when the ending one was durable: else the store is refused (docs/format.md).
 *
 * The last block may have been written before its data were flushed (store_log.c). Then it counts only if they are there; that another
 * one stands behind it says that they were flushed. If it does not count, a root that no block of this log fits is durable before anybody is served.
 *
 * A block is replayed when the pages that it is about are in memory. They stay there, dirty: all pages that were changed since log_start
 * find room, because at most half of the frames may be held while changes are made (docs/format.md).
 *
 * After a crash: as store_load.c.
 */
#include "services/dedup/store_load.h"

/* `sequence` 0: whatever the block says. */
static bool log_block_good(const struct store *store, const uint8_t *block, uint64_t sequence, struct format_log_header *header)
{
    memcpy(header, block, sizeof *header);
    if (header->magic != FORMAT_LOG_MAGIC || !format_version_read(header->version) || header->used_bytes == 0 ||
        header->used_bytes > FORMAT_LOG_RECORD_BYTES || header->used_bytes % 8 != 0 ||
        (sequence != 0 && header->sequence != sequence))
        return false;
    return header->checksum == store_checksum(store, FORMAT_SEED_LOG, header->sequence, block + 8, ATOLL_BLOCK_BYTES - 8);
}

/* --- Records --------------------------------------------------------------------------------------------------------- */

static bool map_sane(const struct store *store, uint64_t rest, uint64_t count, uint64_t value)
{
    uint64_t lba = FORMAT_KEY_NUMBER(rest);
    return FORMAT_KEY_VOLUME(rest) < ATOLL_VOLUME_COUNT && count >= 1 && count <= FORMAT_HOLES_MAX &&
           count <= FORMAT_LEAF_ENTRIES - lba % FORMAT_LEAF_ENTRIES && lba < FORMAT_VOLUME_BYTES_MAX / ATOLL_BLOCK_BYTES &&
           (value == 0 || value == MAP_VALUE(MAP_ZERO, 0) || (MAP_KIND(value) == MAP_PBA && store_usable(store, MAP_NUMBER(value))));
}

static bool record_sane(const struct store *store, const uint64_t *words)
{
    uint64_t rest = FORMAT_RECORD_REST(words[0]);
    switch (FORMAT_RECORD_TYPE(words[0])) {
    case FORMAT_RECORD_MAP: return map_sane(store, rest, 1, words[1]);
    case FORMAT_RECORD_HOLES: return map_sane(store, rest, words[1] & 0xffff, 0);
    case FORMAT_RECORD_BLOCK: return store_usable(store, rest) && words[1] == 1;
    case FORMAT_RECORD_REFS: return store_usable(store, rest) && words[1] <= REF_COUNT_MAX;
    case FORMAT_RECORD_VOLUME:  /* store_volume_take */
    case FORMAT_RECORD_NOTHING: return true;
    default: return false;
    }
}

static uint64_t leaf_page(uint64_t rest)
{
    return FORMAT_PAGE(FORMAT_TREE_MAP, 0, FORMAT_LEAF_NUMBER(FORMAT_KEY_VOLUME(rest), FORMAT_KEY_NUMBER(rest) / FORMAT_LEAF_ENTRIES));
}

/* The pages that a record is about. */
static enum store_want want_record(struct store *store, const uint64_t *words)
{
    uint64_t rest = FORMAT_RECORD_REST(words[0]);
    uint32_t frame, type = FORMAT_RECORD_TYPE(words[0]);
    enum store_want want = STORE_HAVE, more;
    if (type == FORMAT_RECORD_MAP || type == FORMAT_RECORD_HOLES)
        return store_get(store, leaf_page(rest), type == FORMAT_RECORD_MAP && words[1] != 0, &frame);
    if (type == FORMAT_RECORD_VOLUME || type == FORMAT_RECORD_NOTHING)
        return STORE_HAVE;
    want = store_get(store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, rest / FORMAT_REFS_PER_PAGE), true, &frame);
    if (type != FORMAT_RECORD_BLOCK || want == STORE_LOST)
        return want;
    more = store_get(store, FORMAT_PAGE(FORMAT_TREE_PRINTS, 0, rest / FORMAT_PRINTS_PER_PAGE), true, &frame);
    return more > want ? more : want;
}

/* Sums follow from the records alone: a page may be ahead of the log. */
static void sum_kind(struct store *store, uint32_t volume, uint32_t kind, uint64_t count)
{
    struct store_area *area = store->area;
    if (kind == MAP_PBA) {
        area->mapped[volume] += count;
        area->references += count;
    } else if (kind == MAP_ZERO) {
        area->zero_promises += count;
    }
}

static void set_entries(struct store *store, uint64_t rest, uint64_t count, uint64_t value)
{
    uint32_t frame = store_find(store, leaf_page(rest));
    if (frame == STORE_NO_FRAME)
        return; /* nothing to make holes of */
    uint64_t *entries = store_page_memory(store, frame);
    store_mark_dirty(store, frame);
    for (uint64_t index = 0; index < count; index++)
        entries[FORMAT_KEY_NUMBER(rest) % FORMAT_LEAF_ENTRIES + index] = value;
}

/* Applies a record whose pages are in memory. Nothing is journaled but what marks pages: a successor begins anew. */
static bool apply(struct store *store, const uint64_t *words)
{
    uint64_t rest = FORMAT_RECORD_REST(words[0]);
    uint32_t type = FORMAT_RECORD_TYPE(words[0]), volume = FORMAT_KEY_VOLUME(rest);
    if (type == FORMAT_RECORD_MAP) {
        sum_kind(store, volume, FORMAT_KEY_BEFORE(rest), (uint64_t)-1);
        sum_kind(store, volume, (uint32_t)MAP_KIND(words[1]), 1);
        set_entries(store, rest, 1, words[1]);
    } else if (type == FORMAT_RECORD_HOLES) {
        sum_kind(store, volume, MAP_PBA, -(words[1] >> 16 & 0xffff));
        sum_kind(store, volume, MAP_ZERO, -(words[1] >> 32 & 0xffff));
        set_entries(store, rest, words[1] & 0xffff, 0);
    } else if (type == FORMAT_RECORD_VOLUME) {
        struct format_volume image;
        memcpy(&image, words + 1, sizeof image);
        if (rest != image.id || !store_volume_take(store, &image))
            return false;
        volume = image.id;
    } else if (type == FORMAT_RECORD_NOTHING) {
        return true;
    } else {
        *store_ref(store, rest) = (uint32_t)words[1];
        store_mark_dirty(store, store_find(store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, rest / FORMAT_REFS_PER_PAGE)));
        store->area->stored_blocks += type == FORMAT_RECORD_BLOCK ? 1 : words[1] == 0 ? (uint64_t)-1 : 0;
        if (type != FORMAT_RECORD_BLOCK)
            return true;
        *store_print(store, rest) = (struct fingerprint){words[2], words[3]};
        store_mark_dirty(store, store_find(store, FORMAT_PAGE(FORMAT_TREE_PRINTS, 0, rest / FORMAT_PRINTS_PER_PAGE)));
        return true;
    }
    store_table_dirty(store, volume / FORMAT_VOLUMES_PER_PAGE);
    return true;
}

enum replayed { REPLAYED, REPLAY_WAITS, REPLAY_SENSELESS };

/* A block whole or not at all: its pages first. */
static enum replayed replay(struct store *store, const uint64_t *words, uint32_t count)
{
    bool waits = false;
    for (uint32_t at = 0; at < count; at += store_record_words(words[at])) {
        if (store_record_words(words[at]) > count - at || !record_sane(store, words + at))
            return REPLAY_SENSELESS;
        enum store_want want = want_record(store, words + at);
        if (want == STORE_LOST) {
            load_lost(store);
            return REPLAY_WAITS;
        }
        waits |= want == STORE_WAIT;
    }
    if (waits)
        return REPLAY_WAITS;
    for (uint32_t at = 0; at < count; at += store_record_words(words[at])) {
        if (!apply(store, words + at))
            return REPLAY_SENSELESS;
        if (store->journal->count > ATOLL_JOURNAL_ENTRIES / 2)
            atoll_domain_commit(store->dedup->domain);
    }
    atoll_domain_commit(store->dedup->domain);
    return REPLAYED;
}

/* --- The end of the log, and the data of its last block ---------------------------------------------------------------- */

static void end_of_log(struct store_load *load)
{
    load->pairs = load->pair = 0;
    load->phase = LOAD_TAIL;
    load->cursor = 0;
}

static void look_for_data(struct store_load *load, const struct format_log_header *header, const uint8_t *block)
{
    load->pairs = load->pair = 0;
    load->phase = LOAD_DATA;
    load->cursor = 0;
    load->last_missing = false;
    load->last_count = header->used_bytes / 8;
    load->last_checksum = header->checksum;
    memcpy(load->last, block + sizeof *header, header->used_bytes);
}

/* What the last block leaves to PBA `pba` at its end: it may be free again, and then it may have been used again. */
static bool is_left(const struct store_load *load, uint64_t pba)
{
    bool left = false;
    for (uint32_t at = 0; at < load->last_count; at += store_record_words(load->last[at])) {
        uint32_t type = FORMAT_RECORD_TYPE(load->last[at]);
        if ((type == FORMAT_RECORD_BLOCK || type == FORMAT_RECORD_REFS) && FORMAT_RECORD_REST(load->last[at]) == pba)
            left = load->last[at + 1] != 0;
    }
    return left;
}

void load_ask_data(struct store *store)
{
    struct store_load *load = store->load;
    for (; load->cursor < load->last_count && load->count < LOAD_WANTS; load->cursor += store_record_words(load->last[load->cursor])) {
        uint32_t at = (uint32_t)load->cursor;
        if (store_record_words(load->last[at]) > load->last_count - at || !record_sane(store, load->last + at)) {
            load->last_count = at; /* replay says so */
            break;
        }
        uint64_t pba = FORMAT_RECORD_REST(load->last[at]);
        if (FORMAT_RECORD_TYPE(load->last[at]) == FORMAT_RECORD_BLOCK && is_left(load, pba))
            load_want(load, pba, at);
    }
    if (load->count != 0)
        return;
    load->phase = LOAD_LOG;
    load->there = load->last_checksum;
    if (!load->last_missing)
        return;
    store_count(store, STORE_COUNTER_LOG_BLOCKS_DROPPED, 1);
    load->given_up = true; /* should its data ever be there, it comes before the log's beginning */
    store_root_first(store);
    end_of_log(load);
}

void load_take_data(struct store *store)
{
    struct store_load *load = store->load;
    const uint8_t *memory = store_bounce(store);
    for (uint32_t index = 0; index < load->count; index++) {
        struct want *want = &load->wants[index];
        uint8_t block[ATOLL_BLOCK_BYTES];
        if (want->done || !want->submitted)
            continue;
        want->done = want->status == ATOLL_OK || !load_try_on(want);
        if (!want->done)
            continue;
        memcpy(block, memory + index * ATOLL_BLOCK_BYTES, sizeof block);
        struct fingerprint found = store_print_of(block), wanted = {.low = load->last[want->place + 2], .high = load->last[want->place + 3]};
        load->last_missing |= want->status != ATOLL_OK || !print_equal(found, wanted);
    }
    if (load_all_done(load))
        load->count = 0;
}

/* --- The log --------------------------------------------------------------------------------------------------------- */

/* The batch holds both copies of the next log blocks: the first half copy 0, the second copy 1. */
void load_take_log(struct store *store)
{
    struct store_load *load = store->load;
    for (uint32_t index = 0; index < load->count; index++) {
        struct want *want = &load->wants[index];
        if (want->done || !want->submitted)
            continue;
        want->done = want->status == ATOLL_OK || !load_try_on(want);
    }
    if (!load_all_done(load))
        return;
    load->pairs = load->count / 2;
    load->pair = 0;
    load->count = 0;
}

/* A copy of the block that comes next in the log, of those that have been read; false if it is not good. */
static bool take_copy(const struct store *store, uint32_t pair, uint32_t copy, uint64_t sequence, uint64_t chain, uint8_t *block)
{
    const struct store_load *load = store->load;
    struct format_log_header header;
    uint32_t place = pair + copy * load->pairs;
    memcpy(block, store_bounce(store) + place * ATOLL_BLOCK_BYTES, ATOLL_BLOCK_BYTES);
    return load->wants[place].status == ATOLL_OK && log_block_good(store, block, sequence, &header) && header.chain == chain;
}

/* Another one stands behind this block of pair load->pair. */
static bool goes_on(const struct store *store, const uint8_t *block)
{
    const struct store_load *load = store->load;
    struct format_log_header header;
    uint8_t next[ATOLL_BLOCK_BYTES];
    memcpy(&header, block, sizeof header);
    return load->pair + 1 < load->pairs && (take_copy(store, load->pair + 1, 0, header.sequence + 1, header.checksum, next) ||
                                            take_copy(store, load->pair + 1, 1, header.sequence + 1, header.checksum, next));
}

struct taken {
    uint8_t block[ATOLL_BLOCK_BYTES] __attribute__((aligned(8)));
    struct format_log_header header;
    uint32_t good;   /* copies */
    bool needs_data; /* if it is the last one */
    bool last;       /* where that decides something: none stands behind it */
};

/*
 * The next block of the log. Two good copies that say different things are what a sync was cut off at that took the place of what had been written
 * ahead of it (store_ahead.c): the first counts. If one of them cannot be read now it may be so a second time and not a third. In both cases nobody is
 * served before the log begins behind it, or the other one would count the next time. Where neither can be read nobody knows whether the log ends.
 * False: what stands behind it is to be read, too.
 */
static bool take_pair(struct store *store, struct taken *taken)
{
    struct store_load *load = store->load;
    uint8_t other[ATOLL_BLOCK_BYTES];
    bool first = take_copy(store, load->pair, 0, load->sequence, load->chain, taken->block);
    bool second = take_copy(store, load->pair, 1, load->sequence, load->chain, first ? other : taken->block);
    bool differ = first && second && memcmp(taken->block, other, sizeof other) != 0;
    uint32_t unread = (load->wants[load->pair].status != ATOLL_OK) + (load->wants[load->pair + load->pairs].status != ATOLL_OK);
    memcpy(&taken->header, taken->block, sizeof taken->header);
    taken->good = (uint32_t)first + second;
    taken->needs_data = taken->header.flags & FORMAT_LOG_UNFLUSHED && load->sequence >= load->super.log_durable;
    bool asked = taken->good != 0 && (unread != 0 || taken->needs_data);
    if (asked && load->pair + 1 == load->pairs && load->pair != 0)
        return false;
    taken->last = asked && !goes_on(store, taken->block);
    if (unread == 2)
        store_fail(store,
                   "block %llu of the metadata log cannot be read in either copy (blocks %llu and %llu of the device): it may say what was "
                   "flushed last; nothing was changed, try again when they can be read, or give it up by writing zeros over both",
                   (unsigned long long)load->sequence, (unsigned long long)load->wants[load->pair].pba,
                   (unsigned long long)load->wants[load->pair + load->pairs].pba);
    if (differ || (unread == 1 && (taken->last || taken->good == 0)))
        store_root_first(store);
    if (unread == 1 && taken->good == 0)
        load->given_up = true;
    return true;
}

/* Replays what has been read, until the next block's pages must be waited for. */
static void replay_batch(struct store *store)
{
    struct store_load *load = store->load;
    for (; load->pair < load->pairs; load->pair++) {
        struct taken taken;
        if (!take_pair(store, &taken)) {
            load->pairs = load->pair;
            return;
        }
        if (taken.good == 0) {
            if (store->area->state == STORE_LOADING)
                end_of_log(load);
            return;
        }
        if (taken.needs_data && taken.last && taken.header.checksum != load->there) {
            look_for_data(load, &taken.header, taken.block);
            return;
        }
        enum replayed replayed =
            replay(store, (const uint64_t *)(const void *)(taken.block + sizeof taken.header), taken.header.used_bytes / 8);
        if (replayed == REPLAY_SENSELESS)
            store_fail(store, "log block %llu has a record that makes no sense", (unsigned long long)load->sequence);
        if (replayed != REPLAYED)
            return;
        if (taken.good == 1) {
            load->repair = true;
            store_count(store, STORE_COUNTER_PAGES_REPAIRED, 1);
        }
        load->chain = taken.header.checksum;
        load->sequence++;
    }
}

void load_ask_log(struct store *store)
{
    struct store_load *load = store->load;
    const struct store_area *area = store->area;
    if (load->pair < load->pairs) {
        replay_batch(store);
        return;
    }
    uint64_t left = area->log_start + area->log_blocks - load->sequence;
    uint32_t pairs = left < LOAD_WANTS / 2 ? (uint32_t)left : LOAD_WANTS / 2;
    for (uint32_t copy = 0; copy < 2; copy++)
        for (uint32_t index = 0; index < pairs; index++)
            load_want(load, (copy == 0 ? FORMAT_SUPER_BLOCKS : area->log_second) + (load->sequence + index) % area->log_blocks, 0);
    if (pairs == 0)
        end_of_log(load);
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
    if (load_all_done(load))
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
        load_want(load, place + (load->cursor < area->log_blocks ? FORMAT_SUPER_BLOCKS : area->log_second), 0);
    }
    if (load->count != 0)
        return;
    load->phase = LOAD_COUNT;
    load->cursor = 0;
}
