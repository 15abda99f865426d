/*
 * The store's life: its plan of memory, attaching, formatting, closing, and the step that drives all its parts.
 * Interface: store.h; parts: store_internal.h; form on the device: format.h.
 *
 * Memory, in this order, each part page-aligned: struct store_area, log buffer, log block ahead, staging pages, superblock images, groups, bits of
 * slots and tables, previous places, frames' entries, fingerprint cache, frames. All but the groups (8 bytes for 4 MiB of the device) and
 * the bits of the slots (2 for each) is of configured size.
 *
 * After a crash: store_attach sets pointers. What was in flight stays in flight; completions come to store_io_done.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "ipc/crashpoint.h"
#include "services/dedup/store_internal.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

/* --- Memory -------------------------------------------------------------------------------------------------------- */

static void *carve(uint8_t **next, uint64_t bytes)
{
    void *memory = *next;
    *next += (bytes + ATOLL_BLOCK_BYTES - 1) & ~(uint64_t)(ATOLL_BLOCK_BYTES - 1);
    return memory;
}

void store_lay_out(struct store *store, void *memory, const struct store_geometry *geometry)
{
    uint64_t groups = (geometry->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS;
    uint64_t group_pages = (groups + FORMAT_GROUPS_PER_PAGE - 1) / FORMAT_GROUPS_PER_PAGE;
    /* A device that was grown in steps has a few more slots than one that was made so large. */
    uint64_t slot_pages = (format_slots(geometry->device_blocks) + FORMAT_EXTENTS * 64 + FORMAT_SLOTS_PER_PAGE - 1) / FORMAT_SLOTS_PER_PAGE;
    uint64_t table_words = (FORMAT_VOLUME_PAGES + group_pages + slot_pages + 63) / 64;
    uint64_t sets = geometry->fingerprint_slots / STORE_SET_ENTRIES;
    uint8_t *next = memory;

    next += -(uintptr_t)memory & (ATOLL_BLOCK_BYTES - 1); /* direct I/O wants aligned memory */
    store->area = carve(&next, sizeof *store->area);
    store->log_buffer = carve(&next, (uint64_t)STORE_LOG_BUFFER_BLOCKS * ATOLL_BLOCK_BYTES);
    store->ahead = carve(&next, ATOLL_BLOCK_BYTES);
    store->staging = carve(&next, (uint64_t)STORE_BATCHES * STORE_BATCH_PAGES * ATOLL_BLOCK_BYTES);
    store->super_buffer = carve(&next, 2 * ATOLL_BLOCK_BYTES);
    store->tables_begin = next;
    store->groups = carve(&next, group_pages * FORMAT_GROUPS_PER_PAGE * sizeof *store->groups);
    store->slot_bits = carve(&next, slot_pages * ATOLL_BLOCK_BYTES);
    store->slot_next = carve(&next, slot_pages * ATOLL_BLOCK_BYTES);
    store->table_dirty = carve(&next, table_words * 8);
    store->table_written = carve(&next, table_words * 8);
    store->previous = carve(&next, format_spare_slots(geometry->device_blocks) * sizeof *store->previous);
    store->frames = carve(&next, geometry->frames * sizeof *store->frames);
    store->cache = carve(&next, geometry->fingerprint_slots * sizeof *store->cache);
    store->tables_end = next;
    store->pages = carve(&next, geometry->frames * ATOLL_BLOCK_BYTES);
    store->arena_bytes = (uint64_t)(next - (uint8_t *)memory);

    store->slot_capacity = slot_pages * FORMAT_SLOTS_PER_PAGE;
    store->cache_mask = sets - 1;
    store->cache_age_shift = (uint32_t)__builtin_ctzll(geometry->fingerprint_slots) - 3;
}

uint64_t store_arena_bytes(const struct store_geometry *geometry)
{
    struct store store = {0};
    store_lay_out(&store, 0, geometry);
    return store.arena_bytes + ATOLL_BLOCK_BYTES;
}

void store_attach(struct dedup *dedup, void *memory, const struct store_geometry *geometry, bool fresh)
{
    assert(((uintptr_t)memory & 7) == 0);
    assert(geometry->fingerprint_slots >= 1024 && (geometry->fingerprint_slots & (geometry->fingerprint_slots - 1)) == 0);
    assert(geometry->frames >= STORE_FRAMES_MIN && geometry->device_blocks <= FORMAT_DEVICE_BLOCKS_MAX);
    struct store *store = calloc(1, sizeof *store);
    assert(store != 0);
    store->dedup = dedup;
    store->journal = dedup->domain->journal;
    store_lay_out(store, memory, geometry);
    dedup->store = store;
    struct store_area *area = store->area;
    if (fresh) {
        area->geometry = *geometry; /* the last store of a fresh arena's set-up, harmless to repeat */
        store_cache_attach(store);
        return;
    }
    assert(memcmp(&area->geometry, geometry, sizeof *geometry) == 0); /* an arena is laid out once */
    store_know_places(store);
    store_cache_attach(store);
    if (area->state == STORE_LOADING && area->format_phase == FORMAT_NONE)
        store_load_begin(store);
    store_volumes_publish(store);
}

enum store_state store_state(struct dedup *dedup)
{
    const struct store_area *area = dedup->store->area;
    return area->state == STORE_READY && area->root_first ? STORE_LOADING : (enum store_state)area->state;
}
const char *store_reason(struct dedup *dedup) { return dedup->store->area->reason; }

void store_fail(struct store *store, const char *format, ...)
{
    char text[sizeof store->area->reason] = {0};
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    atoll_save(store->journal, store->area->reason, sizeof store->area->reason);
    memcpy(store->area->reason, text, sizeof text);
    STORE_SET(store, state, STORE_FAILED);
}

bool store_all_zero(const void *memory, uint64_t bytes)
{
    const uint8_t *byte = memory;
    return bytes == 0 || (byte[0] == 0 && memcmp(byte, byte + 1, bytes - 1) == 0);
}

uint64_t store_checksum(const struct store *store, enum format_seed_kind kind, uint64_t number, const void *bytes, uint64_t count)
{
    return XXH3_64bits_withSeed(bytes, count, format_seed(kind, store == 0 ? 0 : store_identity(store), number));
}

struct fingerprint store_print_of(const void *block)
{
    XXH128_hash_t hash = XXH3_128bits(block, ATOLL_BLOCK_BYTES);
    return (struct fingerprint){.low = hash.low64, .high = hash.high64};
}

const uint8_t *store_bounce(const struct store *store)
{
    const struct atoll_arena_header *disk = store->dedup->domain->peers[ATOLL_ROLE_DISK];
    uint64_t offset = disk->buffer_offset, bytes = disk->buffer_bytes, arena = store->dedup->domain->peer_bytes[ATOLL_ROLE_DISK];
    if (bytes < STORE_BOUNCE_PAGES * ATOLL_BLOCK_BYTES || offset > arena || bytes > arena - offset)
        return 0;
    return (const uint8_t *)disk + offset + bytes - STORE_BOUNCE_PAGES * ATOLL_BLOCK_BYTES;
}

/* --- I/O ------------------------------------------------------------------------------------------------------------ */

static uint64_t submitted(struct store *store, int number)
{
    if (number < 0)
        return 0;
    STORE_ADD(store, io_inflight, 1);
    return io_identity(store->dedup->io, number);
}

uint64_t store_submit(struct store *store, enum store_io what, uint64_t number, uint32_t opcode, uint64_t pba, const void *memory,
                      uint64_t bytes)
{
    struct atoll_segment segment = {.address = (uint64_t)(uintptr_t)memory, .length = (uint32_t)bytes};
    uint64_t argument = (uint64_t)what << 56 | number;
    return submitted(store, io_submit(store->dedup, IO_STORE, argument, ATOLL_ROLE_DISK, opcode, pba * ATOLL_BLOCK_BYTES, &segment, 1));
}

bool store_submit_flush(struct store *store, enum store_io what, const uint64_t *after, uint32_t count)
{
    return submitted(store, io_submit_sync(store->dedup, IO_STORE, (uint64_t)what << 56, after, count)) != 0;
}

void store_seal_super(struct format_super *super, uint64_t place, void *block)
{
    super->checksum = store_checksum(0, FORMAT_SEED_SUPER, place, (uint8_t *)super + 8, sizeof *super - 8);
    memset(block, 0, ATOLL_BLOCK_BYTES);
    memcpy(block, super, sizeof *super);
}

static void format_io(struct store *store, uint32_t status);

bool store_io_stands(struct dedup *dedup, struct io_slot *slot, bool late)
{
    struct store *store = dedup->store;
    enum store_io what = (enum store_io)(slot->argument >> 56);
    const uint64_t bounce = (uint64_t)(uintptr_t)store_bounce(store), bytes = STORE_BOUNCE_PAGES * ATOLL_BLOCK_BYTES;
    if (what == STORE_IO_REWRITE) /* what was read lies in memory that is made anew */
        return false;
    if (what == STORE_IO_SYNC_FLUSH || what == STORE_IO_SUPER_FLUSH || what == STORE_IO_AHEAD_FLUSH) /* if it has failed, which nobody was told, the next one says nothing of it */
        return false;
    if (what == STORE_IO_LOG && store->area->sync_phase == SYNC_FLUSH_LOG) /* the flush that came with it has failed */
        return false;
    if (what == STORE_IO_AHEAD) {
        if (late) /* it must not take the place of what is acknowledged from now on: first the log begins behind it */
            store_root_first(store);
        return false;
    }
    if (what == STORE_IO_PAGE) {
        uint64_t address = store_cache_io_address(store, slot->argument & 0x00ffffffffffffffu);
        if (address != 0 && address != slot->segments[0].address) /* the driver's buffers are of another size */
            atoll_set64(store->journal, &slot->segments[0].address, address);
        return address != 0;
    }
    for (uint32_t index = 0; index < slot->segment_count; index++) {
        uint64_t address = slot->segments[index].address, length = slot->segments[index].length;
        if (slot->opcode == ATOLL_OP_IO_READ ? bounce == 0 || address - bounce > bytes || length > bytes - (address - bounce)
                                             : !atoll_reference_in(dedup->domain, ATOLL_ROLE_DEDUP, address, length))
            return false;
    }
    return true;
}

void store_io_done(struct dedup *dedup, const struct io_slot *slot, uint32_t status)
{
    struct store *store = dedup->store;
    enum store_io what = (enum store_io)(slot->argument >> 56);
    uint64_t number = slot->argument & 0x00ffffffffffffffu;
    assert(store->area->io_inflight > 0);
    STORE_ADD(store, io_inflight, -1);
    if (status != ATOLL_OK)
        store_count(store, STORE_COUNTER_IO_ERRORS, 1);
    switch (what) {
    case STORE_IO_LOAD:
    case STORE_IO_LOAD_FLUSH: store_load_io(store, what, number, status); break;
    case STORE_IO_PAGE: store_cache_io(store, number, status); break;
    case STORE_IO_FORMAT: format_io(store, status); break;
    case STORE_IO_SYNC_FLUSH:
    case STORE_IO_REWRITE:
    case STORE_IO_LOG: store_sync_io(store, what, status); break;
    case STORE_IO_AHEAD:
    case STORE_IO_AHEAD_FLUSH: store_ahead_io(store, what, status); break;
    case STORE_IO_PAGES:
    case STORE_IO_SUPER:
    case STORE_IO_SUPER_FLUSH: store_checkpoint_io(store, what, number, status); break;
    default: assert(!"an argument of ours");
    }
}

/* --- Formatting: the first superblock, written; then the store is loaded like any other ----------------------------- */

static uint64_t derived_log_blocks(const struct store_geometry *geometry)
{
    uint64_t blocks = geometry->log_blocks != 0 ? geometry->log_blocks : geometry->device_blocks / 64;
    if (blocks > geometry->device_blocks / 8)
        blocks = geometry->device_blocks / 8;
    if (blocks > 4096 && geometry->log_blocks == 0)
        blocks = 4096;
    return blocks < FORMAT_LOG_BLOCKS_MIN ? FORMAT_LOG_BLOCKS_MIN : blocks;
}

void store_format(struct dedup *dedup, uint64_t store_uuid_low, uint64_t store_uuid_high)
{
    struct store *store = dedup->store;
    const struct store_geometry *geometry = &store->area->geometry;
    assert(store->area->state == STORE_BLANK);
    struct format_super super = {
        .magic = FORMAT_SUPER_MAGIC,
        .version = FORMAT_VERSION,
        .flags = FORMAT_SUPER_CLEAN,
        .uuid_low = store_uuid_low,
        .uuid_high = store_uuid_high,
        .generation = 1,
        .device_blocks = geometry->device_blocks,
        .log_blocks = derived_log_blocks(geometry),
        .log_start = 1,
        .log_durable = 1,
        .written_s = (uint64_t)time(0),
        .slots = format_slots(geometry->device_blocks),
        .spare_slots = format_spare_slots(geometry->device_blocks),
        .extent_count = 1,
    };
    super.log_second = super.device_blocks - FORMAT_SUPER_BLOCKS - super.log_blocks;
    super.extents[0] = (struct format_extent){.first = FORMAT_SUPER_BLOCKS + super.log_blocks,
                                              .second = super.log_second - super.slots,
                                              .count = (uint32_t)super.slots};
    store_seal_super(&super, 1, store->super_buffer);
    store_seal_super(&super, 3, store->super_buffer + ATOLL_BLOCK_BYTES);
    STORE_SET(store, state, STORE_LOADING);
    STORE_SET(store, format_phase, FORMAT_WRITE);
    STORE_SET(store, format_error, 0);
    STORE_SET(store, checkpoint_cursor, 0); /* copies submitted */
}

static void format_io(struct store *store, uint32_t status)
{
    if (status != ATOLL_OK)
        STORE_SET(store, format_error, status);
}

static bool format_step(struct store *store)
{
    struct store_area *area = store->area;
    if (area->format_phase == FORMAT_WRITE && area->checkpoint_cursor < 2) {
        uint64_t copy = area->checkpoint_cursor;
        uint64_t pba = copy == 0 ? 1 : area->geometry.device_blocks - 1;
        if (!store_submit(store, STORE_IO_FORMAT, 0, ATOLL_OP_IO_WRITE, pba, store->super_buffer + copy * ATOLL_BLOCK_BYTES,
                          ATOLL_BLOCK_BYTES))
            return false;
        STORE_ADD(store, checkpoint_cursor, 1);
        return true;
    }
    if (area->io_inflight != 0)
        return false;
    if (area->format_error != ATOLL_OK) {
        store_fail(store, "the device refused the first superblock (status %llu)", (unsigned long long)area->format_error);
        return true;
    }
    if (area->format_phase == FORMAT_WRITE) {
        if (!store_submit_flush(store, STORE_IO_FORMAT, 0, 0))
            return false;
        STORE_SET(store, format_phase, FORMAT_FLUSH);
        return true;
    }
    STORE_SET(store, checkpoint_cursor, 0);
    STORE_SET(store, format_phase, FORMAT_NONE);
    atoll_domain_commit(store->dedup->domain);
    store_load_begin(store);
    return true;
}

/* --- The step -------------------------------------------------------------------------------------------------------- */

void store_load(struct dedup *dedup)
{
    struct store *store = dedup->store;
    assert(store->area->state == STORE_NEW);
    STORE_SET(store, state, STORE_LOADING);
    store_load_begin(store);
}

static bool close_step(struct store *store)
{
    struct store_area *area = store->area;
    if (!area->closing || area->closed || area->checkpoint_phase != CHECKPOINT_IDLE || area->checkpoint_wanted)
        return false;
    if (area->super_clean && area->log_fill == 0 && area->log_next == area->log_start)
        STORE_SET(store, closed, 1);
    else
        store_want_checkpoint(store);
    return true;
}

/* The parts that change nothing that anybody sees: pages come and go, what was changed before becomes durable. */
static bool quiet_step(struct store *store)
{
    bool did = store_cache_step(store);
    did |= store_sync_step(store);
    did |= store_checkpoint_step(store);
    if (store->area->sweep_left != 0)
        did |= store_sweep(store);
    return did;
}

static bool ready_step(struct store *store)
{
    struct store_area *area = store->area;
    bool did = quiet_step(store);
    if (area->closing)
        did |= close_step(store);
    else if (area->root_first == 0) /* else what they log might stand behind a block that does not count the next time */
        did |= store_regain_step(store) || store_delete_step(store) || store_warm_step(store);
    return did;
}

bool store_step(struct dedup *dedup)
{
    struct store *store = dedup->store;
    bool did = false;
    assert(store->journal->count == 0);
    store_volumes_publish(store);
    if (store->area->state == STORE_LOADING)
        did = store->area->format_phase != FORMAT_NONE ? format_step(store) : store_load_step(store);
    else if (store->area->state == STORE_READY)
        did = ready_step(store);
    if (did)
        ATOLL_CRASH_POINT(dedup->domain, "dedup.store.step.commit");
    atoll_domain_commit(dedup->domain);
    if (did)
        ATOLL_CRASH_POINT(dedup->domain, "dedup.store.step.committed");
    return did;
}

bool store_step_quiet(struct dedup *dedup)
{
    struct store *store = dedup->store;
    assert(store->journal->count == 0);
    bool did = store->area->state == STORE_READY && quiet_step(store);
    atoll_domain_commit(dedup->domain);
    return did;
}

uint64_t store_wake_ms(struct dedup *dedup)
{
    const struct store_area *area = dedup->store->area;
    uint64_t due = area->sync_wanted && area->sync_phase == SYNC_IDLE ? area->sync_retry_ns : 0;
    if (area->follow_ns != 0 && area->sync_phase == SYNC_IDLE && !area->closing && (due == 0 || area->follow_ns < due))
        due = area->follow_ns;
    if (area->checkpoint_retry_ns != 0 && (due == 0 || area->checkpoint_retry_ns < due))
        due = area->checkpoint_retry_ns;
    if (area->given_up_blocks != 0 && !area->closing && (due == 0 || dedup->store->regain_ns < due))
        due = dedup->store->regain_ns + 1; /* 0 means none */
    if (dedup->store->delete_retry_ns != 0 && (due == 0 || dedup->store->delete_retry_ns < due))
        due = dedup->store->delete_retry_ns;
    if (due == 0)
        return 0;
    uint64_t now = atoll_now_ns();
    return due <= now ? 1 : (due - now) / 1000000 + 1;
}

void store_close(struct dedup *dedup)
{
    if (!dedup->store->area->closing)
        STORE_SET(dedup->store, closing, 1);
}

void store_reopen(struct dedup *dedup)
{
    struct store *store = dedup->store;
    STORE_SET(store, closing, 0);
    STORE_SET(store, closed, 0);
    if (store->area->sync_phase == SYNC_REWRITE) /* it fails, and the next one begins to write again from the start */
        STORE_SET(store, sync_error, ATOLL_EIO);
    if (store->area->sync_phase != SYNC_IDLE && store->area->sync_error != 0 && store->area->sync_outstanding == 0)
        store_sync_fail(store, (uint32_t)store->area->sync_error); /* before anybody joins it */
}

bool store_closed(struct dedup *dedup)
{
    const struct store_area *area = dedup->store->area;
    return area->closed || area->state == STORE_BLANK || area->state == STORE_FAILED || area->state == STORE_NEW;
}

void store_uuid(struct dedup *dedup, uint64_t *low, uint64_t *high)
{
    *low = dedup->store->area->uuid_low;
    *high = dedup->store->area->uuid_high;
}
