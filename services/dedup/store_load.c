/*
 * Reading the store back: superblocks, tables and sums here, the metadata log in store_replay.c.
 *
 * What is read is bounded by the log: superblocks; volume table, groups and slots (some 0.8 MiB for a device of 1 TiB); the log; and the
 * pages that it is about. The others are read when somebody asks for them.
 *
 * Superblocks and log are read in batches of *wants*, neighbours in one request first, each alone if that fails. They land in the disk
 * driver's buffer area (STORE_BATCH_READS pages near its end), are copied from there, checked, then used (I8). Pages come through
 * store_cache.c. What is bad in one copy is taken from the other and written anew by the checkpoint that follows; what loading
 * needs and is bad in both: the store is refused with a reason, never guessed.
 *
 * After a crash: everything here is private or begun anew: a successor starts from the superblocks, when no read is in flight any
 * more, with memory zeroed in bounded steps.
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

void load_want(struct store_load *load, uint64_t pba, uint64_t place)
{
    assert(load->count < LOAD_WANTS);
    load->wants[load->count++] = (struct want){.pba = pba, .place = place};
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
               load->wants[first + count].attempt == 0 && load->wants[first + count].pba == head->pba + count)
            count++;
        if (!store_submit(store, STORE_IO_LOAD, (uint64_t)first << 16 | count, ATOLL_OP_IO_READ, head->pba,
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
    want->attempt++; /* at first it was perhaps a neighbour's fault */
    return want->attempt == 1;
}

bool load_all_done(const struct store_load *load)
{
    bool done = true;
    for (uint32_t index = 0; index < load->count; index++)
        done &= load->wants[index].done;
    return done;
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
    if (!format_version_read(super.version)) {
        load->other_version = super.version;
        return;
    }
    if (checksum != super.checksum || (super.generation & 1) != (place & 1))
        return;
    if (place >= 2 && pba != super.device_blocks - 4 + place)
        return; /* the end of another device size */
    load->older_version |= super.version != FORMAT_VERSION;
    if (!load->found || super.generation > load->super.generation) {
        load->super = super;
        load->copies = 0;
    }
    load->copies += super.generation == load->super.generation;
    load->found = true;
}

static bool super_sane(const struct store *store, const struct format_super *super)
{
    uint64_t slots = 0, end = FORMAT_SUPER_BLOCKS + super->log_blocks;
    if (super->device_blocks < FORMAT_DEVICE_BLOCKS_MIN || super->log_blocks < FORMAT_LOG_BLOCKS_MIN ||
        super->log_blocks > super->device_blocks / 4 || super->log_start == 0 || super->log_durable < super->log_start ||
        super->extent_count == 0 || super->extent_count > FORMAT_EXTENTS || super->slots % 64 != 0 ||
        super->slots > store->slot_capacity || super->spare_slots > format_spare_slots(store->area->geometry.device_blocks) ||
        super->spare_slots < FORMAT_LOG_BLOCKS_MIN || super->zero_promises > super->device_blocks || super->stored_blocks > super->device_blocks)
        return false;
    for (uint32_t index = 0; index < super->extent_count; index++) {
        const struct format_extent *extent = &super->extents[index];
        if (extent->count == 0 || extent->first != end || extent->second < extent->first + extent->count ||
            extent->second >= super->device_blocks || extent->count > super->device_blocks - extent->second)
            return false;
        slots += extent->count;
        end = extent->second + extent->count + FORMAT_SUPER_BLOCKS + (index == 0 ? super->log_blocks : 0);
        if (index == 0 && super->log_second != extent->second + extent->count)
            return false;
    }
    for (uint32_t tree = 0; tree < FORMAT_TREES; tree++)
        if (super->roots[tree].slot >= super->slots)
            return false;
    return end == super->device_blocks && slots == super->slots;
}

static bool take_super(struct store *store)
{
    struct store_load *load = store->load;
    struct store_area *area = store->area;
    const struct format_super *super = &load->super;
    if (!load->found) {
        if (load->other_version == 1)
            store_fail(store,
                       "the device holds a store of format version 1, this program reads versions %u to %u: serve it with a server of "
                       "version 0.1.0, copy its volumes from there with nbdcopy, and make a new device",
                       FORMAT_VERSION_OLDEST, FORMAT_VERSION);
        else if (load->other_version != 0)
            store_fail(store,
                       "the device holds a store of format version %u, this program reads versions %u to %u: serve it with the release "
                       "that wrote it, or copy its volumes from there",
                       load->other_version, FORMAT_VERSION_OLDEST, FORMAT_VERSION);
        else if (load->magic || load->unreadable)
            store_fail(store, "all copies of the superblock are damaged (blocks 0, 1 and the last two): nothing was changed");
        else if (load->nonzero)
            store_fail(store, "the device holds no store of ours, and is not blank: zero its first and last 64 KiB to have it formatted");
        else
            STORE_SET(store, state, STORE_BLANK);
        return false;
    }
    if (super->device_blocks > area->geometry.device_blocks) {
        store_fail(store, "the store has %llu blocks, the device only %llu", (unsigned long long)super->device_blocks,
                   (unsigned long long)area->geometry.device_blocks);
        return false;
    }
    if (!super_sane(store, super)) {
        store_fail(store, "the superblock of generation %llu contradicts itself", (unsigned long long)super->generation);
        return false;
    }
    area->load_resets = 1; /* from here on the tables are filled */
    load->repair = load->copies < 2;
    area->uuid_low = super->uuid_low;
    area->uuid_high = super->uuid_high;
    area->device_blocks = super->device_blocks;
    area->log_blocks = super->log_blocks;
    area->log_second = super->log_second;
    area->slots = super->slots;
    area->spare_slots = super->spare_slots;
    area->extent_count = super->extent_count;
    memcpy(area->extents, super->extents, sizeof area->extents);
    memcpy(area->roots, super->roots, sizeof area->roots);
    area->generation = super->generation;
    area->log_start = super->log_start;
    area->super_clean = (super->flags & FORMAT_SUPER_CLEAN) != 0;
    area->root_first = load->older_version ? STORE_ROOTS : 0; /* a program that reads that one only would take its newest root */
    area->map_pages = super->map_pages;
    area->stored_blocks = super->stored_blocks;
    area->zero_promises = super->zero_promises;
    store_know_places(store);
    load->chain = super->log_chain;
    load->sequence = super->log_start;
    return true;
}

/* --- Tables ---------------------------------------------------------------------------------------------------------- */

void load_lost(struct store *store)
{
    static const char *const names[FORMAT_TREES] = {"volume table", "groups", "reference counts", "fingerprints", "map", "slots"};
    uint64_t page = store->want_page;
    store_fail(store, "both copies of a metadata page are damaged or cannot be read: %s, level %u, page %llu",
               names[FORMAT_PAGE_TREE(page) % FORMAT_TREES], FORMAT_PAGE_LEVEL(page), (unsigned long long)FORMAT_PAGE_NUMBER(page));
}

static void tables_step(struct store *store)
{
    static const uint8_t zeros[ATOLL_BLOCK_BYTES] __attribute__((aligned(8)));
    struct store_load *load = store->load;
    uint32_t frame;
    for (uint64_t ahead = load->cursor + 1; ahead < load->cursor + STORE_PAGE_READS / 2 && ahead < store->tables.count; ahead++)
        store_get(store, store_table_page(store, ahead), false, &frame);
    for (uint32_t work = 0; work < STORE_PAGE_READS && load->cursor < store->tables.count; work++) {
        uint64_t page = store_table_page(store, load->cursor);
        enum store_want want = store_get(store, page, false, &frame);
        if (want == STORE_WAIT)
            return;
        if (want == STORE_LOST) {
            load_lost(store);
            return;
        }
        if (!store_table_take(store, load->cursor, frame == STORE_NO_FRAME ? zeros : store_page_memory(store, frame))) {
            store_fail(store, "page %llu of the %s makes no sense", (unsigned long long)FORMAT_PAGE_NUMBER(page),
                       load->cursor < store->tables.groups ? "volume table" : load->cursor < store->tables.slots ? "groups" : "slots");
            return;
        }
        if (frame != STORE_NO_FRAME) { /* it lies in its table from here on */
            if (store->frames[frame].flags & FRAME_DIRTY) {
                store_set_flags(store, frame, 0, FRAME_DIRTY);
                store_table_dirty(store, load->cursor);
                load->repair = true;
            }
            store_drop_frame(store, frame);
        }
        load->cursor++;
    }
    if (load->cursor == store->tables.count) {
        load->phase = LOAD_PIN;
        load->cursor = 0;
    }
}

bool load_pin(struct store *store)
{
    const uint64_t pages[3][2] = {{FORMAT_TREE_VOLUMES, store->tables.groups},
                                  {FORMAT_TREE_GROUPS, store->tables.slots - store->tables.groups},
                                  {FORMAT_TREE_SLOTS, store->tables.count - store->tables.slots}};
    for (uint32_t index = 0; index < 3; index++)
        for (uint64_t number = 0; number * FORMAT_POINTERS < pages[index][1]; number++) {
            uint32_t frame;
            enum store_want want = store_get(store, FORMAT_PAGE(pages[index][0], 1, number), true, &frame);
            if (want == STORE_LOST)
                load_lost(store);
            if (want != STORE_HAVE)
                return false;
            if (store->frames[frame].live == 0)
                store_change_live(store, frame, 1);
        }
    return true;
}

/* --- Sums ------------------------------------------------------------------------------------------------------------ */

#define SUM_PER_STEP (1u << 18)

/* Groups whose page of counts the log was about: it says what is right. Of the others the sum is that of the root. */
static void count_step(struct store *store)
{
    struct store_load *load = store->load;
    struct store_area *area = store->area;
    for (uint32_t work = 0; work < 256 && load->cursor < area->geometry.frames; load->cursor++) {
        const struct store_frame *f = &store->frames[load->cursor];
        if (f->state != FRAME_VALID || !(f->flags & FRAME_DIRTY) || FORMAT_PAGE_TREE(f->page) != FORMAT_TREE_REFS ||
            FORMAT_PAGE_LEVEL(f->page) != 0)
            continue;
        const uint32_t *words = store_page_memory(store, (uint32_t)load->cursor);
        uint64_t group = FORMAT_PAGE_NUMBER(f->page);
        uint32_t stored = 0, free_count = 0;
        for (uint32_t index = 0; index < FORMAT_REFS_PER_PAGE; index++) {
            stored += REF_IS_COUNT(words[index]);
            free_count += words[index] == 0;
        }
        if (stored != GROUP_STORED(store->groups[group]))
            store_table_dirty(store, store->tables.groups + group / FORMAT_GROUPS_PER_PAGE);
        store->groups[group] = GROUP(free_count, 0, stored, 0);
        work++;
    }
    if (load->cursor == area->geometry.frames) {
        load->phase = LOAD_GROW;
        load->cursor = 0;
    }
}

static void sums_step(struct store *store)
{
    struct store_load *load = store->load;
    struct store_area *area = store->area;
    uint64_t groups = (area->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS;
    for (uint32_t work = 0; work < SUM_PER_STEP && load->cursor < groups; work++, load->cursor++) {
        area->free_blocks += GROUP_FREE(store->groups[load->cursor]);
        load->stored += GROUP_STORED(store->groups[load->cursor]);
    }
    if (load->cursor < groups)
        return;
    if (load->stored != area->stored_blocks) {
        store_fail(store, "the groups hold %llu blocks, superblock and log say %llu", (unsigned long long)load->stored,
                   (unsigned long long)area->stored_blocks);
        return;
    }
    for (uint32_t index = 0; index < store->range_count; index++)
        area->data_blocks += store->ranges[index].end - store->ranges[index].first;
    area->reserved_blocks = area->zero_promises;
    for (uint32_t number = 0; number < ATOLL_VOLUME_COUNT; number++) {
        struct atoll_volume *volume = &store->dedup->public->volumes[number];
        volume->mapped_blocks = area->mapped[number];
        if (area->mapped[number] != 0 && volume->state == ATOLL_VOLUME_FREE) {
            store_fail(store, "%llu blocks of volume %u hold data, and there is no such volume",
                       (unsigned long long)area->mapped[number], number);
            return;
        }
    }
    load->phase = LOAD_FLUSH;
}

/* --- The step -------------------------------------------------------------------------------------------------------- */

/* Zeroes a piece of all memory of the store but what says which phase it is in. */
static void reset_step(struct store *store)
{
    struct store_load *load = store->load;
    uint8_t *first = store->tables_begin, *end = store->tables_end;
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
        store_cache_attach(store);
        store->urgent = true; /* nobody else asks */
        load->phase = LOAD_HEAD;
        load->cursor = 0;
    }
}

static void ask_head(struct store *store)
{
    uint64_t blocks = store->area->geometry.device_blocks;
    for (uint64_t pba = 0; pba < HEAD_BLOCKS; pba++)
        load_want(store->load, pba, 0);
    for (uint64_t pba = blocks - HEAD_BLOCKS; pba < blocks; pba++)
        load_want(store->load, pba, 0);
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
        uint64_t pba = want->pba;
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
            look_at_super(store, pba, want->place, block);
        else if (pba >= blocks - 2)
            look_at_super(store, pba, pba - (blocks - 4), block);
    }
    if (!load_all_done(load))
        return;
    load->count = 0;
    uint64_t own = load->super.device_blocks;
    if (load->phase == LOAD_HEAD && load->found && own < blocks && own >= FORMAT_DEVICE_BLOCKS_MIN) {
        load->phase = LOAD_SUPER;
        load_want(load, own - 2, 2);
        load_want(load, own - 1, 3);
        return;
    }
    if (!take_super(store))
        return;
    load->phase = LOAD_TABLES;
    load->cursor = 0;
}

/* What was read may not be durable yet (all processes died, not the machine): flush before anything relies on it. */
static bool flush_step(struct store *store)
{
    struct store_load *load = store->load;
    struct store_area *area = store->area;
    if (!load->flush_sent) {
        load->flush_sent = store_submit_flush(store, STORE_IO_LOAD_FLUSH, 0, 0);
        return load->flush_sent;
    }
    if (load->flush_status != ATOLL_OK) {
        store_fail(store, "the device could not be flushed (status %llu)", (unsigned long long)load->flush_status);
        return true;
    }
    uint64_t next = load->sequence + load->given_up;
    STORE_SET(store, log_next, next);
    STORE_SET(store, log_durable, next);
    STORE_SET(store, log_chain, load->chain);
    STORE_SET(store, log_fill, 0);
    STORE_SET(store, follow_ns, area->root_first == 0 && load->there != 0 && load->there == load->chain ? atoll_now_ns() + STORE_FOLLOW_NS : 0);
    STORE_SET(store, epoch, 1);
    STORE_SET(store, synced_epoch, 0);
    STORE_SET(store, cursor, store->ranges[0].first);
    STORE_SET(store, checkpoint_wanted, load->repair || area->checkpoint_wanted || area->root_first ||
                                            area->frames_held >= store_held_limit(store) / 2);
    STORE_SET(store, warm_group, (area->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS);
    STORE_SET(store, warm_left, area->geometry.fingerprint_slots);
    store->urgent = false;
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
    case LOAD_TABLES: tables_step(store); break;
    case LOAD_PIN:
        if (load_pin(store))
            load->phase = LOAD_LOG;
        break;
    case LOAD_LOG: load_ask_log(store); break;
    case LOAD_DATA: load_ask_data(store); break;
    case LOAD_TAIL: load_ask_tail(store); break;
    case LOAD_COUNT: count_step(store); break;
    case LOAD_GROW:
        if (store_grow(store))
            load->phase = LOAD_SUMS;
        break;
    case LOAD_SUMS: sums_step(store); break;
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
    if (load->phase > LOAD_SUPER) {
        bool starved = store->starved;
        store_cache_step(store);
        load->starved = starved && store->free_count + store->freed_count == 0 ? load->starved + 1 : 0;
        if (load->starved > LOAD_STARVED) {
            store_fail(store, "the metadata log is about more pages than %llu, which is what dedup.metadata_cache_bytes holds: start with "
                              "as much as the last time, a clean stop makes any size possible",
                       (unsigned long long)area->geometry.frames);
            give_up(store);
            return true;
        }
    }
    if (load->count != 0) {
        switch (load->phase) {
        case LOAD_HEAD:
        case LOAD_SUPER: take_head(store); break;
        case LOAD_LOG: load_take_log(store); break;
        case LOAD_DATA: load_take_data(store); break;
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
