/*
 * The checkpoint: dirty metadata pages go to new places, then one superblock makes them the root.
 *
 *   PAGES   page after page (volume table, counts, fingerprints, leaves; then directories, level by level): an image is taken in
 *           one step, its checksum computed, both copies written in runs; then the pointer changes and the page's directory is dirty
 *   SYNC    the metadata log up to now becomes durable, and with the same flushes the pages
 *   SUPER   both copies of the superblock of the next generation, in the places of the one before the last
 *   FLUSH   its end is the root switch: the log before checkpoint_log_start is not needed any more
 *   FREE    places of the old root's pages become free
 *
 * Changes go on meanwhile; docs/format.md says why that is right. A failed page write leaves the page dirty and its new
 * place free; PAGES begins anew after a while, and after a failed flush with all pages written so far. A failed superblock write is repeated as it was: once tried, it may count.
 *
 * After a crash: phase, cursor, batches and their images are in the arena, so a successor goes on. After power loss: either root
 * is whole.
 */
#include <time.h>

#include "ipc/crashpoint.h"
#include "services/dedup/store_internal.h"

static uint64_t level_end(const struct store *store, uint64_t level)
{
    return store->shape.level_base[level] + store->shape.level_count[level];
}

/* --- Images ---------------------------------------------------------------------------------------------------------- */

static void leaf_image(const struct store *store, uint64_t frame, uint64_t *image)
{
    memcpy(image, store_frame(store, frame), ATOLL_BLOCK_BYTES);
    for (uint32_t index = 0; index < FORMAT_LEAF_ENTRIES; index++)
        if (MAP_KIND(image[index]) == MAP_LOG) {
            image[index] = datapath_record_base(store->dedup, MAP_NUMBER(image[index]));
            assert(MAP_KIND(image[index]) != MAP_LOG);
        }
}

uint64_t store_page_level(const struct store *store, uint64_t page)
{
    uint64_t level = 0;
    while (level < store->shape.levels && page >= store->shape.level_base[level + 1])
        level++;
    return level;
}

void store_page_image(const struct store *store, uint64_t page, void *image)
{
    const struct format_shape *shape = &store->shape;
    uint64_t level = store_page_level(store, page);
    if (level != 0) {
        uint64_t first = shape->level_base[level - 1] + (page - shape->level_base[level]) * FORMAT_POINTERS;
        memcpy(image, &store->pointers[first], ATOLL_BLOCK_BYTES);
    } else if (page < shape->refs_base) {
        for (uint32_t index = 0; index < FORMAT_VOLUMES_PER_PAGE; index++)
            store_volume_image(store, (uint32_t)page * FORMAT_VOLUMES_PER_PAGE + index, (struct format_volume *)image + index);
    } else if (page < shape->prints_base) {
        const uint32_t *refs = store->refs + (page - shape->refs_base) * FORMAT_REFS_PER_PAGE;
        uint32_t *counts = image;
        for (uint32_t index = 0; index < FORMAT_REFS_PER_PAGE; index++)
            counts[index] = REF_IS_COUNT(refs[index]) ? refs[index] : 0;
    } else if (page < shape->leaves_base) {
        memcpy(image, store->prints + (page - shape->prints_base) * FORMAT_PRINTS_PER_PAGE, ATOLL_BLOCK_BYTES);
    } else if (store->frame_key[page - shape->leaves_base] != 0) {
        leaf_image(store, page - shape->leaves_base, image);
    } else {
        memset(image, 0, ATOLL_BLOCK_BYTES);
    }
}

uint64_t store_page_key(const struct store *store, uint64_t page)
{
    if (page < store->shape.leaves_base || page >= store->shape.level_count[0])
        return 0;
    uint64_t key = store->frame_key[page - store->shape.leaves_base];
    return key == 0 ? 0 : key - 1;
}

/* --- Pages ----------------------------------------------------------------------------------------------------------- */

/* The page's newest place. The durable root's place is kept until the root switch; one in between is free at once. */
static void install(struct store *store, uint64_t page, uint64_t level, const struct format_pointer *pointer)
{
    struct format_pointer *place = &store->pointers[page];
    if (place->primary != 0) {
        if (store->previous[page][0] == 0) {
            atoll_set64(store->journal, &store->previous[page][0], place->primary);
            atoll_set64(store->journal, &store->previous[page][1], place->mirror);
        } else {
            store_free_metadata(store, place->primary);
            store_free_metadata(store, place->mirror);
        }
    }
    atoll_save(store->journal, place, sizeof *place);
    *place = *pointer;
    uint64_t *word = &store->written[page / 64], bit = (uint64_t)1 << page % 64;
    if (!(*word & bit))
        atoll_set64(store->journal, word, *word | bit);
    if (level < store->shape.levels)
        store_mark_dirty(store, store->shape.level_base[level + 1] + (page - store->shape.level_base[level]) / FORMAT_POINTERS);
}

static void clear_dirty(struct store *store, uint64_t page)
{
    atoll_set64(store->journal, &store->dirty[page / 64], store->dirty[page / 64] & ~((uint64_t)1 << page % 64));
}

/* First dirty page from `page` on, or `end`. */
static uint64_t next_dirty(const struct store *store, uint64_t page, uint64_t end)
{
    while (page < end) {
        uint64_t word = store->dirty[page / 64] >> page % 64;
        if (word != 0) {
            page += (uint64_t)__builtin_ctzll(word);
            return page < end ? page : end;
        }
        page = (page / 64 + 1) * 64;
    }
    return end;
}

/* A page of zeros takes no place; a leaf without entries leaves the map. */
static void install_zero(struct store *store, uint64_t page, uint64_t level)
{
    struct format_pointer none = {0};
    install(store, page, level, &none);
    if (level != 0 || page < store->shape.leaves_base)
        return;
    uint64_t frame = page - store->shape.leaves_base;
    if (store->frame_key[frame] != 0 && store->frame_used[frame] == 0)
        store_release_frame(store, frame);
}

static uint32_t take_places(struct store *store, uint32_t want, uint64_t *primary, uint64_t *mirror)
{
    uint32_t first = store_take_run(store, 1, want, REF_METADATA, primary);
    STORE_ADD(store, metadata_blocks, first);
    uint32_t second = first == 0 ? 0 : store_take_run(store, 2, first, REF_METADATA, mirror);
    STORE_ADD(store, metadata_blocks, second);
    for (; first > second; first--)
        store_free_metadata(store, *primary + first - 1);
    return second;
}

/* Takes images of the next dirty pages and sends them off. Returns true if the cursor moved. */
static bool send_batch(struct store *store)
{
    struct store_area *area = store->area;
    ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.pages");
    uint64_t level = area->checkpoint_level, end = level_end(store, level), cursor = area->checkpoint_cursor;
    struct store_batch *batch = 0;
    for (uint32_t index = 0; index < STORE_BATCHES && batch == 0; index++)
        if (area->batches[index].count == 0)
            batch = &area->batches[index];
    if (batch == 0 || store->dedup->io->free_count < 2)
        return false;
    uint64_t number = (uint64_t)(batch - area->batches);
    uint8_t *staging = store->staging + number * STORE_BATCH_PAGES * ATOLL_BLOCK_BYTES;

    /* Images first: the batch is free, so its images and lists may be written directly. */
    uint32_t count = 0;
    uint64_t scanned = cursor;
    for (uint32_t looked = 0; looked < STORE_BATCH_PAGES; looked++) {
        uint64_t page = next_dirty(store, scanned, end);
        scanned = page;
        if (page == end)
            break;
        scanned++;
        uint8_t *image = staging + count * ATOLL_BLOCK_BYTES;
        store_page_image(store, page, image);
        clear_dirty(store, page);
        if (store_all_zero(image, ATOLL_BLOCK_BYTES)) {
            install_zero(store, page, level);
            continue;
        }
        batch->page[count] = page;
        batch->key[count] = store_page_key(store, page);
        batch->checksum[count] = store_checksum(store, FORMAT_SEED_PAGE, page ^ batch->key[count], image, ATOLL_BLOCK_BYTES);
        count++;
    }
    if (count != 0) {
        uint64_t primary = 0, mirror = 0;
        uint32_t places = take_places(store, count, &primary, &mirror);
        for (uint32_t index = places; index < count; index++)
            store_mark_dirty(store, batch->page[index]);
        if (places < count)
            scanned = batch->page[places];
        if (places == 0) {
            store_sync(store->dedup); /* what is pending becomes free */
            STORE_SET(store, checkpoint_cursor, scanned);
            return scanned != cursor;
        }
        atoll_save(store->journal, batch, offsetof(struct store_batch, page));
        batch->count = places;
        batch->outstanding = 2;
        batch->error = 0;
        batch->primary = primary;
        batch->mirror = mirror;
        bool sent = store_submit(store, STORE_IO_PAGES, number, ATOLL_OP_IO_WRITE, primary, staging,
                                 (uint64_t)places * ATOLL_BLOCK_BYTES) &&
                    store_submit(store, STORE_IO_PAGES, number, ATOLL_OP_IO_WRITE, mirror, staging,
                                 (uint64_t)places * ATOLL_BLOCK_BYTES);
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
        struct format_pointer pointer = {.key = batch->key[index],
                                         .primary = batch->primary + index,
                                         .mirror = batch->mirror + index,
                                         .checksum = batch->checksum[index]};
        if (batch->error == 0) {
            install(store, batch->page[index], store_page_level(store, batch->page[index]), &pointer);
        } else {
            store_mark_dirty(store, batch->page[index]);
            store_free_metadata(store, pointer.primary);
            store_free_metadata(store, pointer.mirror);
        }
    }
    if (batch->error != 0)
        STORE_SET(store, checkpoint_error, batch->error);
    else
        store_count(store, STORE_COUNTER_PAGES_WRITTEN, batch->count);
    atoll_set64(store->journal, &batch->count, 0);
    STORE_ADD(store, checkpoint_outstanding, -1);
}

static void note_failure(struct store *store)
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
    uint64_t words = (store->shape.total + 63) / 64;
    if (area->checkpoint_outstanding != 0)
        return false;
    if (area->checkpoint_redo == 1) {
        STORE_SET(store, checkpoint_redo, 2);
        STORE_SET(store, checkpoint_cursor, 0);
    }
    for (uint32_t work = 0; work < 4096 && area->checkpoint_cursor < words; work++) {
        uint64_t at = area->checkpoint_cursor;
        if (store->written[at] & ~store->dirty[at])
            atoll_set64(store->journal, &store->dirty[at], store->dirty[at] | store->written[at]);
        STORE_ADD(store, checkpoint_cursor, 1);
    }
    if (area->checkpoint_cursor == words) {
        STORE_SET(store, checkpoint_redo, 0);
        STORE_SET(store, checkpoint_phase, CHECKPOINT_PAGES);
        STORE_SET(store, checkpoint_level, 0);
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
        note_failure(store);
        STORE_SET(store, checkpoint_level, 0);
        STORE_SET(store, checkpoint_cursor, 0);
        return false;
    }
    if (area->checkpoint_cursor < level_end(store, area->checkpoint_level))
        return send_batch(store);
    if (area->checkpoint_outstanding != 0)
        return false;
    if (area->checkpoint_level < store->shape.levels) {
        STORE_ADD(store, checkpoint_level, 1);
        STORE_SET(store, checkpoint_cursor, store->shape.level_base[area->checkpoint_level]);
        return true;
    }
    STORE_SET(store, sync_forced, 1);
    STORE_SET(store, checkpoint_ticket, store_sync(store->dedup));
    STORE_SET(store, checkpoint_phase, CHECKPOINT_SYNC);
    return true;
}

/* --- Root switch ----------------------------------------------------------------------------------------------------- */

static bool send_super(struct store *store)
{
    struct store_area *area = store->area;
    const struct format_shape *shape = &store->shape;
    if (store->dedup->io->free_count < 2)
        return false;
    ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.super");
    bool clean = area->log_next == area->checkpoint_log_start && area->log_fill == 0;
    struct format_super super = {.magic = FORMAT_SUPER_MAGIC,
                                 .version = FORMAT_VERSION,
                                 .flags = clean ? FORMAT_SUPER_CLEAN : 0,
                                 .uuid_low = area->uuid_low,
                                 .uuid_high = area->uuid_high,
                                 .generation = area->generation + 1,
                                 .device_blocks = area->device_blocks,
                                 .log_blocks = area->log_blocks,
                                 .log_start = area->checkpoint_log_start,
                                 .log_chain = area->checkpoint_log_chain,
                                 .log_durable = area->log_durable,
                                 .leaf_slots = area->leaf_slots,
                                 .written_s = (uint64_t)time(0),
                                 .root_count = (uint32_t)shape->level_count[shape->levels],
                                 .levels = shape->levels};
    memcpy(super.roots, &store->pointers[shape->level_base[shape->levels]], super.root_count * sizeof super.roots[0]);
    uint64_t pair = super.generation & 1;
    store_seal_super(&super, pair, store->super_buffer);
    store_seal_super(&super, 2 + pair, store->super_buffer + ATOLL_BLOCK_BYTES);
    bool sent = store_submit(store, STORE_IO_SUPER, 0, ATOLL_OP_IO_WRITE, pair, store->super_buffer, ATOLL_BLOCK_BYTES) &&
                store_submit(store, STORE_IO_SUPER, 1, ATOLL_OP_IO_WRITE, area->device_blocks - 2 + pair,
                             store->super_buffer + ATOLL_BLOCK_BYTES, ATOLL_BLOCK_BYTES);
    assert(sent);
    STORE_SET(store, super_clean, clean);
    STORE_SET(store, checkpoint_outstanding, 2);
    STORE_SET(store, checkpoint_cursor, 1);
    return true;
}

static void super_done(struct store *store, enum store_io what, uint32_t status)
{
    struct store_area *area = store->area;
    STORE_ADD(store, checkpoint_outstanding, -1);
    if (status != ATOLL_OK)
        STORE_SET(store, checkpoint_error, status);
    if (status != ATOLL_OK && what == STORE_IO_SUPER_FLUSH)
        store_flush_failed(store, status);
    if (area->checkpoint_outstanding != 0)
        return;
    STORE_SET(store, checkpoint_cursor, 0);
    if (area->checkpoint_error != 0) {
        note_failure(store);
        STORE_SET(store, checkpoint_phase, CHECKPOINT_SUPER);
    } else if (area->checkpoint_phase == CHECKPOINT_SUPER) {
        STORE_SET(store, checkpoint_phase, CHECKPOINT_FLUSH);
    } else {
        ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.root");
        STORE_ADD(store, generation, 1); /* COMMIT POINT of the checkpoint: this root is durable */
        STORE_SET(store, log_start, area->checkpoint_log_start);
        STORE_SET(store, checkpoint_phase, CHECKPOINT_FREE);
        store_count(store, STORE_COUNTER_CHECKPOINTS, 1);
    }
}

void store_checkpoint_io(struct store *store, enum store_io what, uint64_t number, uint32_t status)
{
    if (what == STORE_IO_PAGES)
        batch_done(store, number, status);
    else
        super_done(store, what, status);
}

static bool free_step(struct store *store)
{
    struct store_area *area = store->area;
    uint64_t page = area->checkpoint_cursor, end = store->shape.total;
    if (end > page + 32 * STORE_FREE_PER_STEP)
        end = page + 32 * STORE_FREE_PER_STEP;
    for (uint32_t freed = 0; page < end && freed < STORE_FREE_PER_STEP; page++) {
        if (page % 64 == 0 && store->written[page / 64] != 0)
            atoll_set64(store->journal, &store->written[page / 64], 0);
        if (store->previous[page][0] == 0)
            continue;
        store_free_metadata(store, store->previous[page][0]);
        store_free_metadata(store, store->previous[page][1]);
        atoll_set64(store->journal, &store->previous[page][0], 0);
        atoll_set64(store->journal, &store->previous[page][1], 0);
        freed++;
    }
    STORE_SET(store, checkpoint_cursor, page);
    if (page == store->shape.total) {
        STORE_SET(store, leaves_released, 0);
        STORE_SET(store, checkpoint_phase, CHECKPOINT_IDLE);
    }
    return true;
}

static bool begin(struct store *store)
{
    struct store_area *area = store->area;
    if (!area->checkpoint_wanted && area->log_next - area->log_start <= area->log_blocks / 2)
        return false;
    store_log_seal(store);
    STORE_SET(store, checkpoint_wanted, 0);
    STORE_SET(store, checkpoint_log_start, area->log_next);
    STORE_SET(store, checkpoint_log_chain, area->log_chain);
    STORE_SET(store, checkpoint_level, 0);
    STORE_SET(store, checkpoint_cursor, 0);
    STORE_SET(store, checkpoint_error, 0);
    STORE_SET(store, checkpoint_retry_ns, 0);
    /* Pages live together, their copies elsewhere, data comes from the front. */
    uint64_t usable = area->usable_end - area->usable_first;
    STORE_SET(store, cursor[1], area->usable_end - usable / 4);
    STORE_SET(store, cursor[2], area->usable_end - usable / 8);
    STORE_SET(store, checkpoint_phase, CHECKPOINT_PAGES);
    return true;
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
    switch ((enum checkpoint_phase)area->checkpoint_phase) {
    case CHECKPOINT_PAGES: return pages_step(store);
    case CHECKPOINT_SYNC:
        if (area->synced_epoch < area->checkpoint_ticket)
            return false;
        STORE_SET(store, checkpoint_cursor, 0);
        STORE_SET(store, checkpoint_phase, CHECKPOINT_SUPER);
        return true;
    case CHECKPOINT_SUPER: return area->checkpoint_cursor == 0 && send_super(store);
    case CHECKPOINT_FLUSH:
        if (area->checkpoint_error != 0 && area->checkpoint_outstanding == 0) { /* somebody else's flush failed */
            note_failure(store);
            STORE_SET(store, checkpoint_cursor, 0);
            STORE_SET(store, checkpoint_phase, CHECKPOINT_SUPER);
            return false;
        }
        if (area->checkpoint_cursor != 0 || !store_submit(store, STORE_IO_SUPER_FLUSH, 0, ATOLL_OP_IO_SYNC, 0, 0, 0))
            return false;
        STORE_SET(store, checkpoint_outstanding, 1);
        STORE_SET(store, checkpoint_cursor, 1);
        return true;
    case CHECKPOINT_FREE: return free_step(store);
    case CHECKPOINT_IDLE: break;
    }
    return false;
}
