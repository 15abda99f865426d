/*
 * Reading the store back: superblocks, directories and pages here, metadata log in store_replay.c, sums in store_sums.c.
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
#include "services/dedup/store_load.h"

#define RESET_BYTES (8u << 20)      /* of memory zeroed in one step */
#define HEAD_BLOCKS 16              /* looked at to tell a blank device from a damaged one */

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

void load_want(struct store_load *load, uint64_t primary, uint64_t mirror, uint64_t page)
{
    assert(load->count < LOAD_WANTS);
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

bool load_try_on(struct want *want)
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

const char *load_page_kind(const struct store *store, uint64_t page)
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
        } else if (!load_try_on(want)) {
            store_fail(store, "both copies of a metadata page are damaged or cannot be read: %s, page %llu, blocks %llu and %llu",
                       load_page_kind(store, want->page), (unsigned long long)want->page, (unsigned long long)pointer->primary,
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
    while (load->cursor < end && load->count < LOAD_WANTS) {
        const struct format_pointer *pointer = &store->pointers[load->cursor];
        if (!pointer_good(store, load->cursor, pointer)) {
            store_fail(store, "the pointer to metadata page %llu (%s) makes no sense", (unsigned long long)load->cursor,
                       load_page_kind(store, load->cursor));
            return;
        }
        if (pointer->primary != 0)
            load_want(load, pointer->primary, pointer->mirror, load->cursor);
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
        load_want(store->load, pba, 0, pba);
    for (uint64_t pba = blocks - HEAD_BLOCKS; pba < blocks; pba++)
        load_want(store->load, pba, 0, pba);
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
        want->done = want->status == ATOLL_OK || !load_try_on(want);
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
        load_want(load, own - 2, 0, 2);
        load_want(load, own - 1, 0, 3);
        return;
    }
    if (!take_super(store))
        return;
    load->phase = LOAD_PAGES;
    load->level = store->shape.levels;
    load->cursor = store->shape.level_base[load->level];
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

static bool ask(struct store *store)
{
    struct store_load *load = store->load;
    switch (load->phase) {
    case LOAD_RESET: reset_step(store); break;
    case LOAD_HEAD: ask_head(store); break;
    case LOAD_SUPER: break;
    case LOAD_PAGES: ask_pages(store); break;
    case LOAD_LOG: load_ask_log(store); break;
    case LOAD_TAIL: load_ask_tail(store); break;
    case LOAD_POINTERS: load_pointers_step(store); break;
    case LOAD_FRAMES: load_frames_step(store); break;
    case LOAD_BLOCKS: load_blocks_step(store); break;
    case LOAD_CACHE: load_cache_step(store); break;
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
        case LOAD_LOG: load_take_log(store); break;
        case LOAD_TAIL: load_take_tail(store); break;
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
