/*
 * The checkpoint: dirty metadata pages go to new places, then one superblock makes them the root (store_root.c).
 *
 *   PAGES   stage after stage: pages of level 0 (volume table, groups, counts, fingerprints, leaves); directories, level by level;
 *           then the slot tree, which says where all of these are. An image is taken in one step, its checksum computed, both copies
 *           written in runs; then the pointer changes and the page's directory is dirty
 *   SYNC    the metadata log up to now becomes durable, and with the same flushes the pages
 *
 * Changes go on meanwhile; docs/format.md says why that is right. A failed page write leaves the page dirty and its new
 * place free; PAGES begins anew after a while, and after a failed flush with all pages written so far: these stay in memory until
 * the root switch (FRAME_WRITTEN).
 *
 * After a crash: phase, cursor, batches and their images are in the arena, so a successor goes on. After power loss: either root
 * is whole.
 */
#include "ipc/crashpoint.h"
#include "services/dedup/store_internal.h"

/* Stages: 0 level 0; 1 .. FORMAT_LEVELS directories of that level; then the slot tree's levels. */
#define STAGE_SLOTS (FORMAT_LEVELS + 1)
#define STAGE_LAST (STAGE_SLOTS + 2)
#define LOOK_PER_STEP 8192

/* --- Images ---------------------------------------------------------------------------------------------------------- */

static void directory_image(struct format_pointer *pointers)
{
    for (uint32_t index = 0; index < FORMAT_POINTERS; index++)
        if (pointers[index].slot == STORE_SLOT_FRESH)
            pointers[index] = (struct format_pointer){0};
}

static void leaf_image(const struct store *store, uint64_t *image)
{
    for (uint32_t index = 0; index < FORMAT_LEAF_ENTRIES; index++)
        if (MAP_KIND(image[index]) == MAP_LOG) {
            image[index] = datapath_record_base(store->dedup, MAP_NUMBER(image[index]));
            assert(MAP_KIND(image[index]) != MAP_LOG);
        }
}

void store_page_image(const struct store *store, uint32_t frame, void *image)
{
    uint64_t page = store->frames[frame].page;
    memcpy(image, store_page_memory(store, frame), ATOLL_BLOCK_BYTES);
    if (FORMAT_PAGE_LEVEL(page) != 0) {
        directory_image(image);
    } else if (FORMAT_PAGE_TREE(page) == FORMAT_TREE_MAP) {
        leaf_image(store, image);
    } else if (FORMAT_PAGE_TREE(page) == FORMAT_TREE_REFS) {
        uint32_t *counts = image;
        for (uint32_t index = 0; index < FORMAT_REFS_PER_PAGE; index++)
            counts[index] = REF_IS_COUNT(counts[index]) ? counts[index] : 0;
    }
}

/* --- Pages: those of the tables have the cursor's first numbers, frames follow ------------------------------------------ */

static bool stage_has(uint64_t stage, uint64_t page)
{
    uint32_t tree = FORMAT_PAGE_TREE(page), level = FORMAT_PAGE_LEVEL(page);
    return tree == FORMAT_TREE_SLOTS ? stage == STAGE_SLOTS + level : stage == level;
}

/* Looks at up to `*looks` places from `cursor` on for a dirty page of the stage; returns where it is, or where to go on. */
static uint64_t next_dirty(const struct store *store, uint64_t cursor, uint32_t *looks, bool *found)
{
    uint64_t tables = store->tables.count, end = tables + store->area->geometry.frames;
    *found = false;
    for (; cursor < end && *looks != 0; cursor++, --*looks) {
        bool dirty = cursor < tables ? store->table_dirty[cursor / 64] >> cursor % 64 & 1
                                     : (store->frames[cursor - tables].flags & FRAME_DIRTY) != 0;
        if (dirty && stage_has(store->area->checkpoint_stage,
                               cursor < tables ? store_table_page(store, cursor) : store->frames[cursor - tables].page)) {
            *found = true;
            break;
        }
    }
    return cursor;
}

static uint64_t table_number(const struct store *store, uint64_t page)
{
    uint32_t tree = FORMAT_PAGE_TREE(page);
    return FORMAT_PAGE_NUMBER(page) + (tree == FORMAT_TREE_SLOTS ? store->tables.slots : tree == FORMAT_TREE_GROUPS ? store->tables.groups : 0);
}

static void mark_dirty_again(struct store *store, uint64_t page, uint64_t frame)
{
    if (frame == STORE_NO_FRAME)
        store_table_dirty(store, table_number(store, page));
    else
        store_set_flags(store, (uint32_t)frame, FRAME_DIRTY, FRAME_WRITING);
}

/* The directory that points to a page, or STORE_NO_FRAME: the superblock does. */
static uint32_t directory_of(struct store *store, uint64_t page, uint64_t frame)
{
    if (frame != STORE_NO_FRAME)
        return store->frames[frame].parent;
    uint32_t above = store_find(store, FORMAT_PAGE(FORMAT_PAGE_TREE(page), 1, FORMAT_PAGE_NUMBER(page) / FORMAT_POINTERS));
    assert(above != STORE_NO_FRAME); /* they stay in memory: store_load.c */
    return above;
}

/* The page's newest place; slot 0: it is zeros. The durable root's place is kept until the root switch; one in between is free at once. */
static void install(struct store *store, uint64_t page, uint64_t frame, uint64_t slot, uint64_t checksum)
{
    uint32_t tree = FORMAT_PAGE_TREE(page), above = directory_of(store, page, frame);
    uint64_t number = frame == STORE_NO_FRAME ? table_number(store, page) : 0;
    struct format_pointer *pointer = frame != STORE_NO_FRAME
                                         ? store_pointer(store, (uint32_t)frame)
                                         : (struct format_pointer *)store_page_memory(store, above) + FORMAT_PAGE_NUMBER(page) % FORMAT_POINTERS;
    bool written = frame != STORE_NO_FRAME ? (store->frames[frame].flags & FRAME_WRITTEN) != 0
                                           : store->table_written[number / 64] >> number % 64 & 1;
    bool was = pointer->slot != 0 && pointer->slot != STORE_SLOT_FRESH;
    if (was && tree != FORMAT_TREE_SLOTS) {
        if (written)
            store_free_slot(store, pointer->slot);
        else
            store_retire_slot(store, pointer->slot);
    }
    if (tree == FORMAT_TREE_MAP && was != (slot != 0)) {
        STORE_ADD(store, map_pages, slot != 0 ? 1 : -(uint64_t)1);
        STORE_ADD(store, map_fresh, slot != 0 ? -(uint64_t)1 : 1);
    }
    if (was || slot != 0) {
        atoll_save(store->journal, pointer, sizeof *pointer);
        *pointer = (struct format_pointer){.checksum = checksum, .slot = (uint32_t)slot};
        if (slot == 0 && frame != STORE_NO_FRAME)
            pointer->slot = STORE_SLOT_FRESH;
        if (above != STORE_NO_FRAME)
            store_mark_dirty(store, above);
    }
    if (frame != STORE_NO_FRAME)
        store_set_flags(store, (uint32_t)frame, FRAME_WRITTEN, FRAME_WRITING);
    else
        store_set_bit(store, store->table_written, number, true);
}

/* The slot tree's pages have two places each: that which the durable root does not use. */
static uint64_t own_place(struct store *store, uint64_t page, uint64_t frame)
{
    uint64_t number = FORMAT_PAGE_NUMBER(page), level = FORMAT_PAGE_LEVEL(page), table = frame == STORE_NO_FRAME ? table_number(store, page) : 0;
    uint32_t above = directory_of(store, page, frame);
    const struct format_pointer *pointer = frame != STORE_NO_FRAME
                                               ? store_pointer(store, (uint32_t)frame)
                                               : (struct format_pointer *)store_page_memory(store, above) + number % FORMAT_POINTERS;
    bool written = frame != STORE_NO_FRAME ? (store->frames[frame].flags & FRAME_WRITTEN) != 0
                                           : store->table_written[table / 64] >> table % 64 & 1;
    uint64_t span = level == 0 ? FORMAT_SLOTS_PER_PAGE : level == 1 ? (uint64_t)FORMAT_SLOTS_PER_PAGE * FORMAT_POINTERS : 0;
    uint64_t first = number * span + 1 + 2 * level;
    if (written && pointer->slot != 0 && pointer->slot != STORE_SLOT_FRESH)
        return pointer->slot;
    return pointer->slot == first ? first + 1 : first;
}

/* Takes images of the next dirty pages and sends them off. Returns true if the cursor moved. */
static bool send_batch(struct store *store)
{
    struct store_area *area = store->area;
    ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.pages");
    uint64_t cursor = area->checkpoint_cursor, tables = store->tables.count, where[STORE_BATCH_PAGES];
    bool slots = area->checkpoint_stage >= STAGE_SLOTS;
    struct store_batch *batch = 0;
    for (uint32_t index = 0; index < STORE_BATCHES && batch == 0; index++)
        if (area->batches[index].count == 0)
            batch = &area->batches[index];
    if (batch == 0 || store->dedup->io->free_count < 2)
        return false;
    uint64_t number = (uint64_t)(batch - area->batches);
    uint8_t *staging = store->staging + number * STORE_BATCH_PAGES * ATOLL_BLOCK_BYTES;

    /* Images first: the batch is free, so its images and lists may be written directly. */
    uint32_t count = 0, looks = LOOK_PER_STEP, most = slots ? 1 : STORE_BATCH_PAGES;
    uint64_t scanned = cursor;
    for (uint32_t taken = 0; taken < STORE_BATCH_PAGES && count < most; taken++) {
        bool found;
        scanned = next_dirty(store, scanned, &looks, &found);
        if (!found)
            break;
        uint64_t at = scanned++, frame = at < tables ? STORE_NO_FRAME : at - tables;
        uint64_t page = at < tables ? store_table_page(store, at) : store->frames[frame].page;
        uint8_t *image = staging + count * ATOLL_BLOCK_BYTES;
        if (at < tables) {
            store_table_image(store, at, image);
            store_set_bit(store, store->table_dirty, at, store_table_behind(store, at));
        } else {
            store_page_image(store, (uint32_t)frame, image);
            store_set_flags(store, (uint32_t)frame, FRAME_WRITING, FRAME_DIRTY);
        }
        if (store_all_zero(image, ATOLL_BLOCK_BYTES)) {
            install(store, page, frame, 0, 0);
            continue;
        }
        where[count] = at;
        batch->page[count] = page;
        batch->frame[count] = frame;
        batch->checksum[count] = store_checksum(store, FORMAT_SEED_PAGE, page, image, ATOLL_BLOCK_BYTES);
        count++;
    }
    if (count != 0) {
        uint64_t slot = 0;
        uint32_t places = 1;
        if (slots)
            slot = own_place(store, batch->page[0], batch->frame[0]);
        else
            places = store_take_slots(store, count, &slot);
        for (uint32_t index = places; index < count; index++)
            mark_dirty_again(store, batch->page[index], batch->frame[index]);
        if (places < count)
            scanned = where[places];
        assert(places != 0); /* spare slots are kept for this: store_held_limit */
        atoll_save(store->journal, batch, offsetof(struct store_batch, page));
        batch->count = places;
        batch->outstanding = 2;
        batch->error = 0;
        batch->slot = slot;
        bool sent = true;
        for (uint32_t copy = 0; copy < 2; copy++)
            sent &= store_submit(store, STORE_IO_PAGES, number, ATOLL_OP_IO_WRITE, store_slot_pba(store, slot, copy), staging,
                                 (uint64_t)places * ATOLL_BLOCK_BYTES) != 0;
        assert(sent); /* free_count was looked at */
        STORE_ADD(store, checkpoint_outstanding, 1);
    }
    STORE_SET(store, checkpoint_cursor, scanned);
    return true;
}

static void batch_done(struct store *store, uint64_t number, uint32_t status)
{
    struct store_area *area = store->area;
    struct store_batch *batch = &area->batches[number];
    assert(number < STORE_BATCHES && batch->count != 0 && batch->outstanding != 0);
    atoll_set64(store->journal, &batch->outstanding, batch->outstanding - 1);
    if (status != ATOLL_OK)
        atoll_set64(store->journal, &batch->error, status);
    if (batch->outstanding != 0)
        return;
    for (uint64_t index = 0; index < batch->count; index++) {
        if (batch->error == 0) {
            install(store, batch->page[index], batch->frame[index], batch->slot + index, batch->checksum[index]);
            continue;
        }
        mark_dirty_again(store, batch->page[index], batch->frame[index]);
        if (FORMAT_PAGE_TREE(batch->page[index]) != FORMAT_TREE_SLOTS)
            store_free_slot(store, batch->slot + index);
    }
    if (batch->error != 0)
        STORE_SET(store, checkpoint_error, batch->error);
    else
        store_count(store, STORE_COUNTER_PAGES_WRITTEN, batch->count);
    atoll_set64(store->journal, &batch->count, 0);
    STORE_ADD(store, checkpoint_outstanding, -1);
}

void store_checkpoint_failed(struct store *store)
{
    /* No sync has failed: what it makes durable is the log's, which needs no page. */
    STORE_SET(store, checkpoint_error, 0);
    STORE_SET(store, checkpoint_retry_ns, atoll_now_ns() + STORE_RETRY_NS);
    store_count(store, STORE_COUNTER_SYNC_FAILURES, 1);
}

/* A flush failed while pages were on their way: those written so far are written again, to new places. In bounded steps; a page
 * that is made dirty twice does no harm. */
static bool redo_step(struct store *store)
{
    struct store_area *area = store->area;
    uint64_t tables = store->tables.count, end = tables + area->geometry.frames;
    if (area->checkpoint_outstanding != 0)
        return false;
    if (area->checkpoint_redo == 1) {
        STORE_SET(store, checkpoint_redo, 2);
        STORE_SET(store, checkpoint_cursor, 0);
    }
    uint64_t at = area->checkpoint_cursor;
    for (uint32_t looked = 0, marked = 0; looked < LOOK_PER_STEP && marked < STORE_FREE_PER_STEP && at < end; looked++, at++) {
        bool written = at < tables ? store->table_written[at / 64] >> at % 64 & 1 : (store->frames[at - tables].flags & FRAME_WRITTEN) != 0;
        if (!written)
            continue;
        marked++;
        if (at < tables)
            store_table_dirty(store, at);
        else
            store_mark_dirty(store, (uint32_t)(at - tables));
    }
    STORE_SET(store, checkpoint_cursor, at);
    if (at == end) {
        STORE_SET(store, checkpoint_redo, 0);
        STORE_SET(store, checkpoint_phase, CHECKPOINT_PAGES);
        STORE_SET(store, checkpoint_stage, 0);
        STORE_SET(store, checkpoint_cursor, 0);
    }
    return true;
}

static bool pages_step(struct store *store)
{
    struct store_area *area = store->area;
    if (area->checkpoint_error != 0) {
        if (area->checkpoint_outstanding != 0)
            return false;
        store_checkpoint_failed(store);
        STORE_SET(store, checkpoint_stage, 0);
        STORE_SET(store, checkpoint_cursor, 0);
        return false;
    }
    if (area->checkpoint_cursor < store->tables.count + area->geometry.frames)
        return send_batch(store);
    if (area->checkpoint_outstanding != 0)
        return false;
    if (area->checkpoint_stage < STAGE_LAST) {
        STORE_ADD(store, checkpoint_stage, 1);
        STORE_SET(store, checkpoint_cursor, 0);
        return true;
    }
    STORE_SET(store, sync_forced, 1);
    STORE_SET(store, checkpoint_ticket, store_sync(store->dedup));
    STORE_SET(store, checkpoint_phase, CHECKPOINT_SYNC);
    return true;
}

/* --- Its beginning and its course -------------------------------------------------------------------------------------- */

void store_want_checkpoint(struct store *store)
{
    if (!store->area->checkpoint_wanted)
        STORE_SET(store, checkpoint_wanted, 1);
}

void store_root_first(struct store *store)
{
    STORE_SET(store, root_first, STORE_ROOTS);
    STORE_SET(store, follow_ns, 0); /* the root does */
    store_want_checkpoint(store);
}

void store_want_clean_pages(struct store *store, uint64_t least)
{
    if (store->area->checkpoint_phase == CHECKPOINT_IDLE && store->area->frames_dirty >= least)
        store_want_checkpoint(store);
}

static bool wanted(const struct store *store)
{
    const struct store_area *area = store->area;
    uint64_t limit = store_held_limit(store);
    return area->checkpoint_wanted || area->log_next - area->log_start > area->log_blocks / 2 || area->frames_dirty >= limit / 2 ||
           (area->frames_held >= limit / 4 * 3 && area->frames_dirty >= limit / 8);
}

static bool begin(struct store *store)
{
    struct store_area *area = store->area;
    if (!wanted(store))
        return false;
    store_ahead_settle(store); /* the log begins behind it */
    store_log_seal(store);
    STORE_SET(store, checkpoint_wanted, 0);
    STORE_SET(store, checkpoint_log_start, area->log_next);
    STORE_SET(store, checkpoint_log_chain, area->log_chain);
    STORE_SET(store, checkpoint_stored, area->stored_blocks - area->in_flight_blocks);
    STORE_SET(store, checkpoint_zero_promises, area->zero_promises);
    memcpy(area->checkpoint_mapped, area->mapped, sizeof area->mapped); /* nobody reads it before the phase: written directly */
    STORE_SET(store, checkpoint_stage, 0);
    STORE_SET(store, checkpoint_cursor, 0);
    STORE_SET(store, checkpoint_error, 0);
    STORE_SET(store, checkpoint_retry_ns, 0);
    STORE_SET(store, checkpoint_phase, CHECKPOINT_PAGES);
    return true;
}

void store_checkpoint_io(struct store *store, enum store_io what, uint64_t number, uint32_t status)
{
    if (what == STORE_IO_PAGES)
        batch_done(store, number, status);
    else
        store_root_io(store, what, status);
}

bool store_checkpoint_step(struct store *store)
{
    struct store_area *area = store->area;
    if (area->checkpoint_phase == CHECKPOINT_IDLE)
        return begin(store);
    if (area->checkpoint_retry_ns != 0) {
        if (area->checkpoint_outstanding == 0 && atoll_now_ns() < area->checkpoint_retry_ns)
            return false;
        STORE_SET(store, checkpoint_retry_ns, 0);
    }
    if (area->checkpoint_redo != 0 && area->checkpoint_error == 0)
        return redo_step(store);
    if (area->checkpoint_phase == CHECKPOINT_PAGES)
        return pages_step(store);
    if (area->checkpoint_phase == CHECKPOINT_SYNC) {
        if (area->synced_epoch < area->checkpoint_ticket)
            return false;
        STORE_SET(store, checkpoint_cursor, 0);
        STORE_SET(store, checkpoint_phase, CHECKPOINT_SUPER);
        return true;
    }
    return store_root_step(store);
}
