/*
 * Reading the store back: superblocks, directories, pages, metadata log, sums.
 *
 * Reads land in the disk driver's buffer area (STORE_BOUNCE_PAGES at its end), are copied from there, checked, then used (I8). What is
 * bad in one copy is taken from the other and written anew by the checkpoint that follows; bad in both: the store is
 * refused with a reason, never guessed.
 *
 * A batch of *wants* is read at a time: neighbours in one request first; each alone if that fails; then the mirror.
 *
 * After a crash: everything here is private or not journaled, and a successor begins anew, when no read is in flight any more, with
 * memory zeroed in bounded steps.
 */
#include <stdio.h>
#include <stdlib.h>

#include "ipc/crashpoint.h"
#include "services/dedup/store_internal.h"

#define WANTS STORE_BOUNCE_PAGES
#define RESET_BYTES (8u << 20)      /* of memory zeroed in one step */
#define FINISH_BLOCKS (256u << 10)  /* reference words summed up in one step */
#define FINISH_FRAMES 512
#define HEAD_BLOCKS 16              /* looked at to tell a blank device from a damaged one */

enum load_phase {
    LOAD_RESET, LOAD_HEAD, LOAD_SUPER, LOAD_PAGES, LOAD_LOG, LOAD_TAIL, LOAD_POINTERS, LOAD_FRAMES, LOAD_BLOCKS, LOAD_CACHE, LOAD_FLUSH
};

struct want {
    uint64_t primary, mirror; /* mirror 0: none */
    uint64_t page;            /* number in the row, or what the phase wants */
    uint32_t attempt;         /* 0 with neighbours, 1 alone, 2 mirror, 3 given up */
    uint32_t status;
    bool submitted, done;
};

struct store_load {
    enum load_phase phase;
    uint64_t cursor;
    uint64_t level;
    uint32_t count;           /* wants in the running batch */
    bool collected;           /* all pages of this level have been asked for */
    struct want wants[WANTS];
    bool nonzero;             /* something other than zeros where a store has its superblocks and log */
    bool magic;               /* a superblock's or log block's magic was seen */
    uint32_t other_version;
    bool unreadable;          /* a superblock's block could not be read */
    struct format_super super;
    bool found;
    uint32_t copies;          /* of that superblock */
    uint64_t chain, sequence; /* log: checksum before, and number of, the next block */
    bool repair;
    uint64_t sum, entries;
    uint64_t flush_status;
    bool flush_sent;
};

void store_load_begin(struct store *store)
{
    free(store->load);
    store->load = calloc(1, sizeof *store->load);
    assert(store->load != 0);
    store->load->phase = LOAD_RESET;
}

static void give_up(struct store *store)
{
    free(store->load);
    store->load = 0;
}

/* --- Batches of reads ------------------------------------------------------------------------------------------------ */

static void want(struct store_load *load, uint64_t primary, uint64_t mirror, uint64_t page)
{
    assert(load->count < WANTS);
    load->wants[load->count++] = (struct want){.primary = primary, .mirror = mirror, .page = page};
}

/* Submits all wants that are neither done nor submitted. Returns true if something was sent. */
static bool send_wants(struct store *store)
{
    struct store_load *load = store->load;
    const uint8_t *memory = store_bounce(store);
    bool did = false;
    if (memory == 0) {
        store_fail(store, "the disk driver's buffer area is too small: %u pages are needed to load", STORE_BOUNCE_PAGES);
        return true;
    }
    for (uint32_t first = 0; first < load->count;) {
        struct want *head = &load->wants[first];
        uint32_t count = 1;
        if (head->done || head->submitted) {
            first++;
            continue;
        }
        while (head->attempt == 0 && first + count < load->count && !load->wants[first + count].done &&
               load->wants[first + count].attempt == 0 && load->wants[first + count].primary == head->primary + count)
            count++;
        uint64_t pba = head->attempt == 2 ? head->mirror : head->primary;
        if (!store_submit(store, STORE_IO_LOAD, (uint64_t)first << 16 | count, ATOLL_OP_IO_READ, pba,
                          memory + first * ATOLL_BLOCK_BYTES, (uint64_t)count * ATOLL_BLOCK_BYTES))
            break;
        for (uint32_t index = first; index < first + count; index++)
            load->wants[index].submitted = true;
        first += count;
        did = true;
    }
    return did;
}

void store_load_io(struct store *store, enum store_io what, uint64_t number, uint32_t status)
{
    struct store_load *load = store->load;
    if (load == 0 || load->phase == LOAD_RESET)
        return; /* asked for by a predecessor */
    if (what == STORE_IO_LOAD_FLUSH) {
        load->flush_status = status;
        return;
    }
    uint32_t first = (uint32_t)(number >> 16), count = (uint32_t)(number & 0xffff);
    for (uint32_t index = first; index < first + count && index < load->count; index++)
        load->wants[index].status = status;
}

/* The next way to get at a want whose bytes are bad or were not read. False if there is none. */
static bool try_on(struct want *want)
{
    want->submitted = false;
    if (want->attempt == 0 && want->status != ATOLL_OK)
        want->attempt = 1; /* perhaps a neighbour's fault */
    else if (want->attempt <= 1 && want->mirror != 0)
        want->attempt = 2;
    else
        want->attempt = 3;
    return want->attempt != 3;
}

/* --- Superblocks ----------------------------------------------------------------------------------------------------- */

static void look_at_super(struct store *store, uint64_t pba, uint64_t place, const uint8_t *block)
{
    struct store_load *load = store->load;
    struct format_super super;
    memcpy(&super, block, sizeof super);
    if (super.magic != FORMAT_SUPER_MAGIC)
        return;
    load->magic = true;
    uint64_t checksum = store_checksum(0, FORMAT_SEED_SUPER, place, (uint8_t *)&super + 8, sizeof super - 8);
    if (super.version != FORMAT_VERSION) {
        load->other_version = super.version;
        return;
    }
    if (checksum != super.checksum || (super.generation & 1) != (place & 1))
        return;
    if (place >= 2 && pba != super.device_blocks - 4 + place)
        return; /* the end of another device size */
    if (!load->found || super.generation > load->super.generation) {
        load->super = super;
        load->copies = 0;
    }
    load->copies += super.generation == load->super.generation;
    load->found = true;
}

static bool take_super(struct store *store)
{
    struct store_load *load = store->load;
    struct store_area *area = store->area;
    const struct format_super *super = &load->super;
    if (!load->found) {
        if (load->other_version != 0)
            store_fail(store,
                       "the device holds a store of format version %u, this program reads version %u: serve it with the release that "
                       "wrote it, or copy its volumes from there",
                       load->other_version, FORMAT_VERSION);
        else if (load->magic || load->unreadable)
            store_fail(store, "all copies of the superblock are damaged (blocks 0, 1 and the last two): nothing was changed");
        else if (load->nonzero)
            store_fail(store, "the device holds no store of ours, and is not blank: zero its first and last 64 KiB to have it formatted");
        else
            STORE_SET(store, state, STORE_BLANK);
        return false;
    }
    struct format_shape shape = format_shape(super->device_blocks, super->leaf_slots);
    if (super->device_blocks > area->geometry.device_blocks) {
        store_fail(store, "the store has %llu blocks, the device only %llu", (unsigned long long)super->device_blocks,
                   (unsigned long long)area->geometry.device_blocks);
        return false;
    }
    if (super->leaf_slots > area->geometry.map_frames) {
        store_fail(store, "the store was made for %llu map leaves, map_frames is %llu: set it to that at least",
                   (unsigned long long)super->leaf_slots, (unsigned long long)area->geometry.map_frames);
        return false;
    }
    if (super->device_blocks < FORMAT_DEVICE_BLOCKS_MIN || super->log_blocks < FORMAT_LOG_BLOCKS_MIN ||
        super->log_blocks > super->device_blocks / 4 || super->leaf_slots == 0 || super->levels != shape.levels ||
        super->root_count != shape.level_count[shape.levels] || super->log_start == 0 || super->log_durable < super->log_start) {
        store_fail(store, "the superblock of generation %llu contradicts itself", (unsigned long long)super->generation);
        return false;
    }
    area->load_resets = 1; /* from here on the big tables are filled */
    load->repair = load->copies < 2;
    area->uuid_low = super->uuid_low;
    area->uuid_high = super->uuid_high;
    area->device_blocks = super->device_blocks;
    area->log_blocks = super->log_blocks;
    area->leaf_slots = super->leaf_slots;
    area->generation = super->generation;
    area->usable_first = FORMAT_SUPER_BLOCKS + super->log_blocks;
    area->usable_end = super->device_blocks - FORMAT_SUPER_BLOCKS - super->log_blocks;
    area->log_start = super->log_start;
    area->super_clean = (super->flags & FORMAT_SUPER_CLEAN) != 0;
    store_know_shape(store);
    memcpy(&store->pointers[shape.level_base[shape.levels]], super->roots, super->root_count * sizeof super->roots[0]);
    load->chain = super->log_chain;
    load->sequence = super->log_start;
    return true;
}

/* --- Pages ----------------------------------------------------------------------------------------------------------- */

static const char *page_kind(const struct store *store, uint64_t page)
{
    return page < store->shape.refs_base     ? "volume table"
           : page < store->shape.prints_base ? "reference counts"
           : page < store->shape.leaves_base ? "fingerprints"
           : page < store->shape.level_count[0] ? "map leaf"
                                                : "directory";
}

/* Where the page's image belongs in memory, or NULL (volume table). */
static void *page_memory(struct store *store, uint64_t page, uint64_t level)
{
    const struct format_shape *shape = &store->shape;
    if (level != 0)
        return &store->pointers[shape->level_base[level - 1] + (page - shape->level_base[level]) * FORMAT_POINTERS];
    if (page < shape->refs_base)
        return 0;
    if (page < shape->prints_base)
        return store->refs + (page - shape->refs_base) * FORMAT_REFS_PER_PAGE;
    if (page < shape->leaves_base)
        return store->prints + (page - shape->prints_base) * FORMAT_PRINTS_PER_PAGE;
    return store_frame(store, page - shape->leaves_base);
}

static bool pointer_good(const struct store *store, uint64_t page, const struct format_pointer *pointer)
{
    if (pointer->primary == 0)
        return pointer->mirror == 0 && pointer->key == 0 && pointer->checksum == 0;
    bool leaf = page >= store->shape.leaves_base && page < store->shape.level_count[0];
    uint64_t leaves = FORMAT_VOLUME_BYTES_MAX / ATOLL_BLOCK_BYTES / FORMAT_LEAF_ENTRIES;
    return store_usable(store, pointer->primary) && store_usable(store, pointer->mirror) && pointer->primary != pointer->mirror &&
           (leaf ? pointer->key < (uint64_t)ATOLL_VOLUME_COUNT << 52 && FORMAT_KEY_NUMBER(pointer->key) < leaves
                 : pointer->key == 0);
}

/* Takes a good image in. False: the store was refused. */
static bool take_page(struct store *store, uint64_t page, uint64_t level, const uint8_t *image)
{
    void *memory = page_memory(store, page, level);
    if (memory != 0) {
        memcpy(memory, image, ATOLL_BLOCK_BYTES);
    } else {
        for (uint32_t index = 0; index < FORMAT_VOLUMES_PER_PAGE; index++) {
            struct format_volume volume;
            memcpy(&volume, image + index * sizeof volume, sizeof volume);
            if (volume.generation == 0)
                continue;
            if (volume.id != page * FORMAT_VOLUMES_PER_PAGE + index || !store_volume_take(store, &volume)) {
                store_fail(store, "entry %llu of the volume table makes no sense",
                           (unsigned long long)(page * FORMAT_VOLUMES_PER_PAGE + index));
                return false;
            }
        }
        atoll_domain_commit(store->dedup->domain);
    }
    if (level != 0 || page < store->shape.leaves_base)
        return true;
    /* The frame of a leaf has the number of its slot, while loading. */
    uint64_t frame = page - store->shape.leaves_base, key = store->pointers[page].key;
    if (store_find_frame(store, FORMAT_KEY_VOLUME(key), FORMAT_KEY_NUMBER(key), false) != UINT64_MAX) {
        store_fail(store, "two map leaves of volume %u are both leaf %llu", FORMAT_KEY_VOLUME(key),
                   (unsigned long long)FORMAT_KEY_NUMBER(key));
        return false;
    }
    uint32_t used = 0;
    for (uint32_t index = 0; index < FORMAT_LEAF_ENTRIES; index++)
        used += store_frame(store, frame)[index] != 0;
    if (frame > store->area->frames_high) { /* slots left out before it are free */
        for (uint64_t free_frame = store->area->frames_high; free_frame < frame; free_frame++)
            store->frame_stack[store->area->frames_free++] = (uint32_t)free_frame;
    }
    store->area->frames_high = frame;
    uint64_t kept = store->area->frames_free;
    store->area->frames_free = 0; /* so that the next one is `frame` */
    uint64_t made = store_find_frame(store, FORMAT_KEY_VOLUME(key), FORMAT_KEY_NUMBER(key), true);
    store->area->frames_free = kept;
    atoll_domain_commit(store->dedup->domain);
    if (made == UINT64_MAX) {
        store_fail(store, "the hash of map leaves is full");
        return false;
    }
    assert(made == frame);
    store->frame_used[frame] = used;
    return true;
}

/* Handles the running batch of pages. */
static void take_pages(struct store *store)
{
    struct store_load *load = store->load;
    const uint8_t *memory = store_bounce(store);
    uint8_t image[ATOLL_BLOCK_BYTES];
    for (uint32_t index = 0; index < load->count; index++) {
        struct want *want = &load->wants[index];
        if (want->done || !want->submitted)
            continue;
        const struct format_pointer *pointer = &store->pointers[want->page];
        bool good = want->status == ATOLL_OK;
        if (good) {
            memcpy(image, memory + index * ATOLL_BLOCK_BYTES, sizeof image);
            good = store_checksum(store, FORMAT_SEED_PAGE, want->page ^ pointer->key, image, sizeof image) == pointer->checksum;
        }
        if (good && want->attempt == 2) {
            store->dirty[want->page / 64] |= (uint64_t)1 << want->page % 64;
            load->repair = true;
            store_count(store, STORE_COUNTER_PAGES_REPAIRED, 1);
        }
        if (good) {
            want->done = true;
        } else if (!try_on(want)) {
            store_fail(store, "both copies of a metadata page are damaged or cannot be read: %s, page %llu, blocks %llu and %llu",
                       page_kind(store, want->page), (unsigned long long)want->page, (unsigned long long)pointer->primary,
                       (unsigned long long)pointer->mirror);
            return;
        }
    }
    for (uint32_t index = 0; index < load->count; index++)
        if (!load->wants[index].done)
            return;
    /* All are there, each in its bounce page; taken in the order of their numbers. */
    for (uint32_t index = 0; index < load->count; index++) {
        const struct format_pointer *pointer = &store->pointers[load->wants[index].page];
        memcpy(image, memory + index * ATOLL_BLOCK_BYTES, sizeof image);
        if (store_checksum(store, FORMAT_SEED_PAGE, load->wants[index].page ^ pointer->key, image, sizeof image) !=
            pointer->checksum) {
            store_fail(store, "a page changed in the disk driver's memory while it was read");
            return;
        }
        if (!take_page(store, load->wants[index].page, load->level, image))
            return;
    }
    load->count = 0;
}

/* Asks for the next pages of the level; goes down a level when all have been taken. */
static void ask_pages(struct store *store)
{
    struct store_load *load = store->load;
    uint64_t end = store->shape.level_base[load->level] + store->shape.level_count[load->level];
    while (load->cursor < end && load->count < WANTS) {
        const struct format_pointer *pointer = &store->pointers[load->cursor];
        if (!pointer_good(store, load->cursor, pointer)) {
            store_fail(store, "the pointer to metadata page %llu (%s) makes no sense", (unsigned long long)load->cursor,
                       page_kind(store, load->cursor));
            return;
        }
        if (pointer->primary != 0)
            want(load, pointer->primary, pointer->mirror, load->cursor);
        load->cursor++;
    }
    if (load->count != 0)
        return;
    if (load->level == 0) {
        load->phase = LOAD_LOG;
        return;
    }
    load->level--;
    load->cursor = store->shape.level_base[load->level];
}

/* --- Metadata log ---------------------------------------------------------------------------------------------------- */

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
static void take_log(struct store *store)
{
    struct store_load *load = store->load;
    const uint8_t *memory = store_bounce(store);
    uint8_t block[ATOLL_BLOCK_BYTES];
    for (uint32_t index = 0; index < load->count; index++) {
        struct want *want = &load->wants[index];
        if (want->done || !want->submitted)
            continue;
        want->done = want->status == ATOLL_OK || !try_on(want);
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

static void ask_log(struct store *store)
{
    struct store_load *load = store->load;
    const struct store_area *area = store->area;
    uint64_t left = area->log_start + area->log_blocks - load->sequence;
    uint32_t pairs = left < WANTS / 2 ? (uint32_t)left : WANTS / 2;
    for (uint32_t copy = 0; copy < 2; copy++)
        for (uint32_t index = 0; index < pairs; index++)
            want(load, (copy == 0 ? FORMAT_SUPER_BLOCKS : area->usable_end) + (load->sequence + index) % area->log_blocks, 0, 0);
    if (pairs == 0) {
        load->phase = LOAD_TAIL;
        load->cursor = 0;
    }
}

/* The log ends before load->sequence. Does anything say that it should not? Every block of it is looked at for that: one that was
 * sealed when blocks from here on were durable. */
static void take_tail(struct store *store)
{
    struct store_load *load = store->load;
    const uint8_t *memory = store_bounce(store);
    for (uint32_t index = 0; index < load->count; index++) {
        struct want *want = &load->wants[index];
        uint8_t block[ATOLL_BLOCK_BYTES];
        struct format_log_header header;
        if (want->done || !want->submitted)
            continue;
        want->done = want->status == ATOLL_OK || !try_on(want);
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

static void ask_tail(struct store *store)
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
    for (; load->cursor < 2 * area->log_blocks && load->count < WANTS; load->cursor++) {
        uint64_t place = load->cursor % area->log_blocks;
        want(load, place + (load->cursor < area->log_blocks ? FORMAT_SUPER_BLOCKS : area->usable_end), 0, 0);
    }
    if (load->count != 0)
        return;
    load->phase = LOAD_POINTERS;
    load->cursor = 0;
}

/* --- Sums: what the pages and the log say must agree ----------------------------------------------------------------- */

static void pointers_step(struct store *store)
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
                           (unsigned long long)places[copy], page_kind(store, load->cursor), (unsigned long long)load->cursor,
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

static void frames_step(struct store *store)
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

static void blocks_step(struct store *store)
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

static void cache_step(struct store *store)
{
    struct store_load *load = store->load;
    for (uint32_t work = 0; work < ATOLL_JOURNAL_ENTRIES / 4 && load->cursor < store->area->usable_end; work++, load->cursor++)
        if (REF_IS_COUNT(store->refs[load->cursor]))
            store_remember_print(store, load->cursor);
    if (load->cursor == store->area->usable_end)
        load->phase = LOAD_FLUSH;
}

/* What was read may not be durable yet (all processes died, not the machine): flush before anything relies on it. */
static bool flush_step(struct store *store)
{
    struct store_load *load = store->load;
    struct store_area *area = store->area;
    if (!load->flush_sent) {
        load->flush_sent = store_submit(store, STORE_IO_LOAD_FLUSH, 0, ATOLL_OP_IO_SYNC, 0, 0, 0);
        return load->flush_sent;
    }
    if (load->flush_status != ATOLL_OK) {
        store_fail(store, "the device could not be flushed (status %llu)", (unsigned long long)load->flush_status);
        return true;
    }
    STORE_SET(store, log_next, load->sequence);
    STORE_SET(store, log_durable, load->sequence);
    STORE_SET(store, log_chain, load->chain);
    STORE_SET(store, log_fill, 0);
    STORE_SET(store, epoch, 1);
    STORE_SET(store, synced_epoch, 0);
    STORE_SET(store, cursor[0], area->usable_first);
    STORE_SET(store, checkpoint_wanted, load->repair);
    STORE_SET(store, state, STORE_READY);
    return true;
}

/* --- The step -------------------------------------------------------------------------------------------------------- */

/* Zeroes a piece of all memory of the store but what says which phase it is in. */
static void reset_step(struct store *store)
{
    struct store_load *load = store->load;
    uint8_t *first = (uint8_t *)store->refs, *end = store->end;
    struct store_area *area = store->area;
    if (load->cursor == 0) {
        struct store_geometry geometry = area->geometry;
        atoll_domain_commit(store->dedup->domain);
        uint8_t *from = (uint8_t *)&area->uuid_low;
        memset(from, 0, (size_t)((uint8_t *)(area + 1) - from)); /* the state stays LOADING: a successor comes here again */
        area->geometry = geometry;
        for (uint32_t number = 0; number < ATOLL_VOLUME_COUNT; number++) {
            struct atoll_volume *volume = &store->dedup->public->volumes[number];
            memset(&volume->generation, 0, sizeof *volume - 8);
            volume->id = number;
        }
    }
    uint64_t total = (uint64_t)(end - first), bytes = total - load->cursor < RESET_BYTES ? total - load->cursor : RESET_BYTES;
    if (!area->load_resets) /* a fresh arena is zeros already */
        bytes = total - load->cursor;
    else
        memset(first + load->cursor, 0, bytes);
    load->cursor += bytes;
    if (load->cursor == total) {
        store->last_key = 0;
        load->phase = LOAD_HEAD;
        load->cursor = 0;
    }
}

static void ask_head(struct store *store)
{
    uint64_t blocks = store->area->geometry.device_blocks;
    for (uint64_t pba = 0; pba < HEAD_BLOCKS; pba++)
        want(store->load, pba, 0, pba);
    for (uint64_t pba = blocks - HEAD_BLOCKS; pba < blocks; pba++)
        want(store->load, pba, 0, pba);
}

/* Head and tail of the device, or the last blocks of a store that is smaller than its device. */
static void take_head(struct store *store)
{
    struct store_load *load = store->load;
    const uint8_t *memory = store_bounce(store);
    uint64_t blocks = store->area->geometry.device_blocks;
    for (uint32_t index = 0; index < load->count; index++) {
        struct want *want = &load->wants[index];
        uint8_t block[ATOLL_BLOCK_BYTES];
        if (want->done || !want->submitted)
            continue;
        want->done = want->status == ATOLL_OK || !try_on(want);
        if (!want->done)
            continue;
        uint64_t pba = want->primary;
        if (want->status != ATOLL_OK) {
            load->unreadable |= pba < 2 || pba >= blocks - 2;
            continue;
        }
        memcpy(block, memory + index * ATOLL_BLOCK_BYTES, sizeof block);
        load->nonzero |= !store_all_zero(block, sizeof block);
        struct format_log_header header;
        memcpy(&header, block, sizeof header);
        load->magic |= pba >= FORMAT_SUPER_BLOCKS && header.magic == FORMAT_LOG_MAGIC; /* a store was here: nobody should zero it */
        if (pba < 2)
            look_at_super(store, pba, pba, block);
        else if (load->phase == LOAD_SUPER)
            look_at_super(store, pba, want->page, block);
        else if (pba >= blocks - 2)
            look_at_super(store, pba, pba - (blocks - 4), block);
    }
    for (uint32_t index = 0; index < load->count; index++)
        if (!load->wants[index].done)
            return;
    load->count = 0;
    uint64_t own = load->super.device_blocks;
    if (load->phase == LOAD_HEAD && load->found && own < blocks && own >= FORMAT_DEVICE_BLOCKS_MIN) {
        load->phase = LOAD_SUPER;
        want(load, own - 2, 0, 2);
        want(load, own - 1, 0, 3);
        return;
    }
    if (!take_super(store))
        return;
    load->phase = LOAD_PAGES;
    load->level = store->shape.levels;
    load->cursor = store->shape.level_base[load->level];
}

static bool ask(struct store *store)
{
    struct store_load *load = store->load;
    switch (load->phase) {
    case LOAD_RESET: reset_step(store); break;
    case LOAD_HEAD: ask_head(store); break;
    case LOAD_SUPER: break;
    case LOAD_PAGES: ask_pages(store); break;
    case LOAD_LOG: ask_log(store); break;
    case LOAD_TAIL: ask_tail(store); break;
    case LOAD_POINTERS: pointers_step(store); break;
    case LOAD_FRAMES: frames_step(store); break;
    case LOAD_BLOCKS: blocks_step(store); break;
    case LOAD_CACHE: cache_step(store); break;
    case LOAD_FLUSH: return flush_step(store);
    }
    return true;
}

bool store_load_step(struct store *store)
{
    struct store_load *load = store->load;
    struct store_area *area = store->area;
    assert(load != 0);
    if (area->io_inflight != 0)
        return false; /* a batch, or what a predecessor asked for */
    if (load->phase == LOAD_RESET && area->geometry.device_blocks < FORMAT_DEVICE_BLOCKS_MIN) {
        store_fail(store, "the device has %llu blocks, a store needs %u", (unsigned long long)area->geometry.device_blocks,
                   FORMAT_DEVICE_BLOCKS_MIN);
        give_up(store);
        return true;
    }
    bool did = true;
    ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.load");
    if (load->count != 0) {
        switch (load->phase) {
        case LOAD_HEAD:
        case LOAD_SUPER: take_head(store); break;
        case LOAD_PAGES: take_pages(store); break;
        case LOAD_LOG: take_log(store); break;
        case LOAD_TAIL: take_tail(store); break;
        default: assert(!"a phase that reads");
        }
    }
    if (area->state == STORE_LOADING && load->count == 0)
        did = ask(store);
    if (area->state == STORE_LOADING && load->count != 0)
        did = send_wants(store);
    if (area->state != STORE_LOADING)
        give_up(store);
    return did;
}
