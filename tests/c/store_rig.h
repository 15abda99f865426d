/*
 * The stand-ins and the oracle of the store's tests; see store_rig.c.
 *
 * Stand-ins: an I/O table that the rig itself executes, in any order, with errors by chance; a device with a volatile cache
 * (any sector written since the last flush may be lost at power loss); a datapath of records with bases. The oracle is a
 * history: for each key (volume, lba) the values it had, with the number of the operation that set each. The log keeps the
 * order of changes, so whatever comes back from the device must be the state after one certain operation, at or after the last
 * one that a sync covered. All of it lies in one mapping, and the rig's own state is journaled like the store's.
 */
#ifndef ATOLL_TESTS_STORE_RIG_H
#define ATOLL_TESTS_STORE_RIG_H

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "services/dedup/store_internal.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

enum {
    VOLUMES = 3, KEYS = 300, RECORDS = 256, HISTORY = 1 << 16, PENDING = 1 << 14, CONTENTS = 400, SYNCS = 64,
    DISK_PAGES = STORE_BOUNCE_PAGES + 4, AHEAD = 4
};
#define SECTOR 512
#define ZERO_CONTENT 1 /* MAP_ZERO; 0 is a hole; from 2 on: contents */

static char rig_context[300];

#ifdef STORE_RIG_LIBRARY
#include <setjmp.h>
static jmp_buf failed;
#define CHECK(condition)                                                                               \
    do {                                                                                               \
        if (!(condition)) {                                                                            \
            snprintf(rig_context, sizeof rig_context, "%s:%d: not true: %s", __FILE__, __LINE__, #condition); \
            longjmp(failed, 1);                                                                        \
        }                                                                                              \
    } while (0)
#else
#define CHECK(condition)                                                                                \
    do {                                                                                                \
        if (!(condition)) {                                                                             \
            fprintf(stderr, "%s:%d: not true: %s   (%s)\n", __FILE__, __LINE__, #condition, rig_context); \
            abort();                                                                                    \
        }                                                                                               \
    } while (0)
#endif

struct record { /* of the write log's stand-in */
    uint64_t state; /* 0 free, 1 logged, 2 to be written to pba, 3 written there */
    uint64_t key, base, content, pba;
};
struct event { uint64_t operation, key, content; };
struct disk_area {
    struct atoll_arena_header header;
    uint8_t buffer[DISK_PAGES * ATOLL_BLOCK_BYTES] __attribute__((aligned(4096)));
};
struct pending { uint64_t pba; uint8_t data[ATOLL_BLOCK_BYTES]; };

/* Everything that outlives the "process". */
struct rig {
    struct atoll_journal journal;
    struct disk_area disk;
    struct atoll_arena_header self;    /* and kernel's: crash points look there */
    uint64_t counters[ATOLL_COUNTER_COUNT];
    struct atoll_dedup_public public;
    struct io_table io;
    /* state of the stand-ins, journaled */
    uint64_t random;
    uint64_t operation;                /* number of the last one */
    uint64_t now[VOLUMES][KEYS];       /* content of the persistent value */
    struct record records[RECORDS];
    uint64_t reserved;                 /* the rig's own reservations */
    uint64_t event_count;
    uint64_t sync_count;
    struct { uint64_t ticket, operation; } syncs[SYNCS];
    uint64_t synced_operation;
    uint64_t ahead_operation, ahead_count; /* written ahead by the last operation that did so, and not noted by it */
    struct event ahead[AHEAD];
    uint64_t deleting[VOLUMES];
    /* not journaled */
    uint64_t sync_one_in, checkpoint_one_in, io_percent; /* how the work is mixed */
    uint64_t hold;                     /* 1 + enum store_io of requests that the device does not get to; 0: none */
    uint64_t fail_one_in;              /* writes and flushes; 0 never */
    uint64_t fail_flush_one_in;
    uint64_t volatile_cache;           /* keep what is needed for power loss */
    uint64_t pending_count;
    uint8_t doomed[1 << 15];           /* blocks whose flush failed: never on the device unless written again */
    struct event events[HISTORY];
    struct pending pending[PENDING];
};

static struct rig *rig;
static uint8_t *device, *stable, *memory;
static bool shared_memory;
static uint64_t device_room, memory_bytes;
static struct store_geometry geometry;
static struct atoll_domain domain;
static struct dedup dedup;
static uint64_t hook_left = UINT64_MAX;
static bool flipped; /* one copy of some page is damaged */

void atoll_store_hook(void)
{
    if (hook_left != UINT64_MAX && hook_left-- == 0)
        kill(getpid(), SIGKILL);
}

#define RIG_SET(field, value) atoll_set64(&rig->journal, &rig->field, (value))

static uint64_t chance(uint64_t bound)
{
    uint64_t state = rig->random;
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    RIG_SET(random, state);
    return (state * 0x2545f4914f6cdd1du >> 20) % bound;
}

/* --- Set-up ---------------------------------------------------------------------------------------------------------- */

static void *map(uint64_t bytes, bool shared)
{
    void *at = mmap(0, bytes, PROT_READ | PROT_WRITE, (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    return at;
}

static void attach(bool fresh)
{
    atoll_roll_back(&rig->journal);
    free(domain.rings);
    if (dedup.store != 0) {
        struct store *store = dedup.store;
        void *own[] = {store->load, store->hash_heads, store->hash_next, store->free_frames, store->freed_frames, store->used,
                       store->fresh, store->urgent_stamp, store};
        for (uint32_t index = 0; index < sizeof own / sizeof own[0]; index++)
            free(own[index]);
    }
    memset(&domain, 0, sizeof domain);
    memset(&dedup, 0, sizeof dedup);
    domain.role = ATOLL_ROLE_DEDUP;
    domain.self = &rig->self;
    domain.peers[ATOLL_ROLE_KERNEL] = &rig->self;
    domain.peers[ATOLL_ROLE_DISK] = &rig->disk.header;
    domain.peer_bytes[ATOLL_ROLE_DISK] = sizeof rig->disk;
    domain.counters = rig->counters;
    domain.journal = &rig->journal;
    domain.rings = calloc(1, sizeof *domain.rings);
    dedup.domain = &domain;
    dedup.public = &rig->public;
    dedup.io = &rig->io;
    store_attach(&dedup, memory, &geometry, fresh);
}

static void commit(void) { atoll_domain_commit(&domain); }

/* A fresh arena over the device as it is. */
static void fresh_arena(void)
{
    memset(&rig->public, 0, sizeof rig->public);
    memset(&rig->io, 0, sizeof rig->io);
    for (uint32_t index = 0; index < ATOLL_IO_COUNT; index++)
        rig->io.free[index] = ATOLL_IO_COUNT - 1 - index;
    rig->io.free_count = ATOLL_IO_COUNT;
    CHECK(store_arena_bytes(&geometry) <= memory_bytes);
    CHECK(madvise(memory, memory_bytes, shared_memory ? MADV_REMOVE : MADV_DONTNEED) == 0); /* zeros */
    memset(rig->records, 0, sizeof rig->records);
    rig->reserved = 0;
    rig->sync_count = 0;
    rig->journal.count = 0;
    attach(true);
}

/* `room`: blocks that the device may grow to. */
static void make_growing_rig(uint64_t seed, uint64_t blocks, uint64_t room, uint64_t frames, bool shared)
{
    geometry = (struct store_geometry){.device_blocks = room, .frames = frames, .fingerprint_slots = 1024, .log_blocks = 64};
    shared_memory = shared;
    rig = map(sizeof *rig, shared);
    device_room = room;
    device = map(room * ATOLL_BLOCK_BYTES, shared);
    stable = map(room * ATOLL_BLOCK_BYTES, shared);
    memory_bytes = store_arena_bytes(&geometry);
    memory = map(memory_bytes, shared);
    geometry.device_blocks = blocks;
    rig->random = seed * 2 + 1;
    for (int warm = 0; warm < 8; warm++)
        chance(2);
    rig->disk.header.buffer_offset = offsetof(struct disk_area, buffer);
    rig->disk.header.buffer_bytes = sizeof rig->disk.buffer;
    rig->volatile_cache = 1;
    rig->sync_one_in = 1;
    rig->checkpoint_one_in = 8;
    rig->io_percent = 8;
    fresh_arena();
}

static void make_rig(uint64_t seed, uint64_t blocks, uint64_t frames, bool shared)
{
    make_growing_rig(seed, blocks, blocks, frames, shared);
}

static void drop_rig(void)
{
    munmap(rig, sizeof *rig);
    munmap(device, device_room * ATOLL_BLOCK_BYTES);
    munmap(stable, device_room * ATOLL_BLOCK_BYTES);
    munmap(memory, memory_bytes);
}

/* --- Device ---------------------------------------------------------------------------------------------------------- */

static void write_block(uint64_t pba, const void *data)
{
    CHECK(pba < geometry.device_blocks);
    memcpy(device + pba * ATOLL_BLOCK_BYTES, data, ATOLL_BLOCK_BYTES);
    if (!rig->volatile_cache)
        return;
    rig->doomed[pba] = 0;
    if (rig->pending_count == PENDING) { /* the cache writes its oldest back by itself */
        for (uint64_t index = 0; index < PENDING / 2; index++)
            memcpy(stable + rig->pending[index].pba * ATOLL_BLOCK_BYTES, rig->pending[index].data, ATOLL_BLOCK_BYTES);
        memmove(rig->pending, rig->pending + PENDING / 2, PENDING / 2 * sizeof rig->pending[0]);
        rig->pending_count = PENDING / 2;
    }
    rig->pending[rig->pending_count].pba = pba;
    memcpy(rig->pending[rig->pending_count++].data, data, ATOLL_BLOCK_BYTES);
}

/* A flush fails as Linux has it: what was to be flushed is dropped, but reads still find it, and the next flush is a success. */
static void fail_flush(void)
{
    for (uint64_t index = 0; index < rig->pending_count; index++)
        rig->doomed[rig->pending[index].pba] = 1;
    rig->pending_count = 0;
}

static void flush_device(void)
{
    for (uint64_t index = 0; index < rig->pending_count; index++)
        memcpy(stable + rig->pending[index].pba * ATOLL_BLOCK_BYTES, rig->pending[index].data, ATOLL_BLOCK_BYTES);
    rig->pending_count = 0;
}

/* What is on the device after the lights went out: of each sector any of its versions since the last flush. */
static void power_loss(uint64_t mode)
{
    for (uint64_t index = 0; index < rig->pending_count; index++) /* elsewhere they are equal */
        memcpy(device + rig->pending[index].pba * ATOLL_BLOCK_BYTES, stable + rig->pending[index].pba * ATOLL_BLOCK_BYTES,
               ATOLL_BLOCK_BYTES);
    for (uint64_t pba = 0; pba < geometry.device_blocks && pba < sizeof rig->doomed; pba++)
        if (rig->doomed[pba])
            memcpy(device + pba * ATOLL_BLOCK_BYTES, stable + pba * ATOLL_BLOCK_BYTES, ATOLL_BLOCK_BYTES);
    memset(rig->doomed, 0, sizeof rig->doomed);
    bool whole = false; /* mode 6: blocks land whole */
    uint64_t prefix = rig->pending_count != 0 ? chance(rig->pending_count + 1) : 0;
    for (uint64_t index = 0; index < rig->pending_count; index++)
        for (uint64_t sector = 0; sector < ATOLL_BLOCK_BYTES / SECTOR; sector++) {
            bool lands = mode == 0   ? false
                         : mode == 1 ? true
                         : mode == 2 ? index < prefix
                         : mode == 3 ? chance(2) == 0
                         : mode == 4 ? index < prefix || (index == prefix && chance(2) == 0)
                         : mode == 5 ? chance(20) != 0
                         : sector == 0 ? (whole = chance(2) == 0)
                                       : whole;
            if (lands)
                memcpy(device + rig->pending[index].pba * ATOLL_BLOCK_BYTES + sector * SECTOR,
                       rig->pending[index].data + sector * SECTOR, SECTOR);
        }
    for (uint64_t index = 0; index < rig->pending_count; index++)
        memcpy(stable + rig->pending[index].pba * ATOLL_BLOCK_BYTES, device + rig->pending[index].pba * ATOLL_BLOCK_BYTES,
               ATOLL_BLOCK_BYTES);
    rig->pending_count = 0;
}

int io_submit(struct dedup *unused, enum io_kind kind, uint64_t argument, uint32_t role, uint32_t opcode, uint64_t offset_bytes,
              const struct atoll_segment *segments, uint32_t segment_count)
{
    struct io_table *table = unused->io;
    CHECK(kind == IO_STORE && role == ATOLL_ROLE_DISK && segment_count <= ATOLL_IO_BLOCKS);
    if (table->free_count == 0)
        return -1;
    uint32_t number = table->free[table->free_count - 1];
    struct io_slot *slot = &table->slots[number];
    CHECK(slot->kind == IO_FREE);
    uint64_t length = 0;
    for (uint32_t index = 0; index < segment_count; index++) {
        slot->segments[index] = segments[index];
        length += segments[index].length;
        CHECK(segments[index].address % 4096 == 0 && segments[index].length % 4096 == 0);
    }
    CHECK(offset_bytes + length <= geometry.device_blocks * ATOLL_BLOCK_BYTES && length <= ATOLL_IO_BLOCKS * ATOLL_BLOCK_BYTES);
    slot->opcode = opcode;
    slot->sequence++;
    slot->argument = argument;
    slot->offset_bytes = offset_bytes;
    slot->length_bytes = (uint32_t)length;
    slot->segment_count = segment_count;
    atoll_set32(&rig->journal, &slot->kind, kind);
    atoll_set32(&rig->journal, &table->free_count, table->free_count - 1);
    return (int)number;
}

int io_submit_sync(struct dedup *unused, enum io_kind kind, uint64_t argument, const uint64_t *after, uint32_t count)
{
    int number = io_submit(unused, kind, argument, ATOLL_ROLE_DISK, ATOLL_OP_IO_SYNC, 0, 0, 0);
    if (number >= 0)
        memset(unused->io->slots[number].after, 0, sizeof unused->io->slots[number].after);
    if (number >= 0 && count != 0)
        memcpy(unused->io->slots[number].after, after, count * sizeof after[0]);
    return number;
}

/* True if it must wait for another one. */
static bool comes_after(const struct io_slot *slot)
{
    for (uint32_t index = 0; slot->opcode == ATOLL_OP_IO_SYNC && index < IO_AFTER; index++) {
        const struct io_slot *other = &rig->io.slots[slot->after[index] >> 32];
        if (slot->after[index] != 0 && other->kind != IO_FREE && other->sequence == (uint32_t)slot->after[index])
            return true;
    }
    return false;
}

/* Executes one request in flight, picked by chance. False: there is none. */
static bool run_io(void)
{
    uint32_t busy[ATOLL_IO_COUNT], count = 0;
    for (uint32_t number = 0; number < ATOLL_IO_COUNT; number++)
        if (rig->io.slots[number].kind != IO_FREE && (rig->hold == 0 || rig->io.slots[number].argument >> 56 != rig->hold - 1) &&
            !comes_after(&rig->io.slots[number]))
            busy[count++] = number;
    if (count == 0)
        return false;
    uint32_t number = busy[chance(count)];
    struct io_slot *slot = &rig->io.slots[number];
    uint64_t one_in = slot->opcode == ATOLL_OP_IO_SYNC && rig->fail_flush_one_in != 0 ? rig->fail_flush_one_in
                      : slot->opcode != ATOLL_OP_IO_READ                              ? rig->fail_one_in
                                                                                      : 0;
    uint32_t status = one_in != 0 && chance(one_in) == 0 ? ATOLL_EIO : ATOLL_OK;
    uint64_t pba = slot->offset_bytes / ATOLL_BLOCK_BYTES;
    commit();
    if (slot->opcode == ATOLL_OP_IO_SYNC) {
        if (status == ATOLL_OK)
            flush_device();
        else
            fail_flush();
    } else {
        for (uint32_t index = 0; index < slot->segment_count; index++) {
            uint8_t *address = (uint8_t *)(uintptr_t)slot->segments[index].address;
            for (uint64_t block = 0; block < slot->segments[index].length / ATOLL_BLOCK_BYTES; block++, pba++) {
                if (slot->opcode == ATOLL_OP_IO_READ)
                    memcpy(address + block * ATOLL_BLOCK_BYTES, device + pba * ATOLL_BLOCK_BYTES, ATOLL_BLOCK_BYTES);
                else if (status == ATOLL_OK || chance(2) == 0) /* a failed write may have landed */
                    write_block(pba, address + block * ATOLL_BLOCK_BYTES);
            }
        }
    }
    commit();
    store_io_done(&dedup, slot, status);
    atoll_set32(&rig->journal, &slot->kind, IO_FREE);
    atoll_set32(&rig->journal, &rig->io.free[rig->io.free_count], number);
    atoll_set32(&rig->journal, &rig->io.free_count, rig->io.free_count + 1);
    commit();
    return true;
}

void datapath_io_done(struct dedup *unused, const struct io_slot *slot, uint32_t status) { (void)unused, (void)slot, (void)status; }

void datapath_freed(struct dedup *unused, uint64_t pba)
{
    (void)unused;
    (void)pba;
}

uint64_t datapath_record_base(struct dedup *unused, uint64_t number)
{
    (void)unused;
    CHECK(number < RECORDS && rig->records[number].state != 0);
    return rig->records[number].base;
}

/* What waits for its time to be tried again may be. */
static void time_flies(void)
{
    if (dedup.store->area->sync_retry_ns != 0)
        dedup.store->area->sync_retry_ns = 1;
    if (dedup.store->area->checkpoint_retry_ns != 0)
        dedup.store->area->checkpoint_retry_ns = 1;
    if (dedup.store->delete_retry_ns != 0)
        dedup.store->delete_retry_ns = 1;
}

/* Steps and I/O until nothing is left to do. */
static void settle(void)
{
    rig->hold = 0;
    for (uint64_t turns = 0;; turns++) {
        CHECK(turns < 1000000);
        struct store_area *area = dedup.store->area;
        bool did = store_step(&dedup);
        bool waits = area->sync_retry_ns > 1 || area->checkpoint_retry_ns > 1 || dedup.store->delete_retry_ns > 1;
        if (!run_io() && !did && !waits)
            break;
        time_flies();
    }
}

static void load(void)
{
    store_load(&dedup);
    commit();
    settle();
}

static void format(void)
{
    load();
    CHECK(store_state(&dedup) == STORE_BLANK);
    store_format(&dedup, 0x1234567, 0x89abcdef);
    commit();
    settle();
    CHECK(store_state(&dedup) == STORE_READY);
}

/* --- Pages as they are, in memory or on the device, without asking the store for them -------------------------------------- */

/* The page's newest content, in a buffer that lives until the end of the program; NULL: zeros. Checks what lies on the device. */
static const void *peek(uint64_t page)
{
    static uint8_t buffers[64][ATOLL_BLOCK_BYTES] __attribute__((aligned(8)));
    static uint32_t next_buffer;
    struct store *store = dedup.store;
    uint32_t tree = FORMAT_PAGE_TREE(page), level = FORMAT_PAGE_LEVEL(page);
    uint64_t number = FORMAT_PAGE_NUMBER(page);
    uint8_t *image = buffers[next_buffer++ % 64];
    uint32_t frame = store_find(store, page);
    struct format_pointer pointer = store->area->roots[tree];
    if (level != format_levels[tree]) {
        const struct format_pointer *above = peek(FORMAT_PAGE(tree, level + 1, number / FORMAT_POINTERS));
        if (above == 0) {
            CHECK(frame == STORE_NO_FRAME);
            return 0;
        }
        pointer = above[number % FORMAT_POINTERS];
    }
    bool fresh = pointer.slot == STORE_SLOT_FRESH;
    if (frame != STORE_NO_FRAME) {
        const struct store_frame *f = &store->frames[frame];
        CHECK(pointer.slot != 0);
        store_page_image(store, frame, image);
        if (!(f->flags & (FRAME_DIRTY | FRAME_WRITING)))
            CHECK(store_all_zero(image, ATOLL_BLOCK_BYTES)
                      ? fresh
                      : !fresh && pointer.checksum == store_checksum(store, FORMAT_SEED_PAGE, page, image, ATOLL_BLOCK_BYTES));
        return store_page_memory(store, frame);
    }
    if (pointer.slot == 0)
        return 0;
    CHECK(!fresh);
    uint32_t good = 0;
    for (uint32_t copy = 2; copy-- > 0;) {
        const uint8_t *block = device + store_slot_pba(store, pointer.slot, copy) * ATOLL_BLOCK_BYTES;
        if (store_checksum(store, FORMAT_SEED_PAGE, page, block, ATOLL_BLOCK_BYTES) != pointer.checksum)
            continue;
        memcpy(image, block, ATOLL_BLOCK_BYTES);
        good++;
    }
    CHECK(good == 2 || (good == 1 && flipped));
    CHECK(!store_all_zero(image, ATOLL_BLOCK_BYTES));
    return image;
}

static uint64_t peek_value(uint32_t volume, uint64_t lba)
{
    const uint64_t *leaf = peek(FORMAT_PAGE(FORMAT_TREE_MAP, 0, FORMAT_LEAF_NUMBER(volume, lba / FORMAT_LEAF_ENTRIES)));
    return leaf == 0 ? 0 : leaf[lba % FORMAT_LEAF_ENTRIES];
}

static struct fingerprint peek_print(uint64_t pba)
{
    const struct fingerprint *prints = peek(FORMAT_PAGE(FORMAT_TREE_PRINTS, 0, pba / FORMAT_PRINTS_PER_PAGE));
    return prints == 0 ? (struct fingerprint){0, 0} : prints[pba % FORMAT_PRINTS_PER_PAGE];
}

/* --- What an operation needs: steps and I/O until it is there, or for a while ------------------------------------------- */

#define PATIENCE 200

static bool wait_for(enum store_want (*want)(uint64_t, uint64_t, uint64_t), uint64_t a, uint64_t b, uint64_t c)
{
    for (uint32_t turn = 0; turn < PATIENCE; turn++) {
        store_urgent(&dedup, turn > 10);
        enum store_want have = want(a, b, c);
        store_urgent(&dedup, false);
        if (have == STORE_LOST)
            CHECK(store_want_status(&dedup) == ATOLL_ENOSPC || store_want_status(&dedup) == ATOLL_ECORRUPT);
        if (have != STORE_WAIT)
            return have == STORE_HAVE;
        commit();
        time_flies();
        store_step(&dedup);
        run_io();
    }
    return false;
}

/* For one change of an entry: its leaf, the block that it shall name (0: none), the one that it named. */
static enum store_want want_change(uint64_t volume_use, uint64_t lba, uint64_t packed)
{
    uint64_t pba = packed & 0xfffffffffu, base = packed >> 36 == 0 ? 0 : MAP_VALUE(MAP_PBA, packed >> 36 & 0xfffffff);
    enum store_want want = store_want_map(&dedup, (uint32_t)(volume_use >> 8), lba, 1, (enum store_use)(volume_use & 255)), more;
    more = pba == 0 ? STORE_HAVE : store_want_blocks(&dedup, &pba, 1);
    want = more > want ? more : want;
    more = store_want_base(&dedup, base);
    return more > want ? more : want;
}

static bool have_change(uint32_t volume, uint64_t lba, enum store_use use, uint64_t base, uint64_t pba)
{
    uint64_t packed = pba | (MAP_KIND(base) == MAP_PBA ? MAP_NUMBER(base) << 36 : 0);
    return wait_for(want_change, (uint64_t)volume << 8 | use, lba, packed);
}

static enum store_want want_print(uint64_t low, uint64_t high, uint64_t unused)
{
    (void)unused;
    return store_want_candidates(&dedup, (struct fingerprint){low, high});
}

static enum store_want want_space(uint64_t a, uint64_t b, uint64_t c)
{
    (void)a, (void)b, (void)c;
    return store_want_space(&dedup);
}

/* --- Keys and contents ----------------------------------------------------------------------------------------------- */

static uint64_t key_of(uint64_t volume, uint64_t number) { return volume * KEYS + number; }
static uint32_t key_volume(uint64_t key) { return (uint32_t)(key / KEYS); }
static uint64_t key_lba(uint64_t key)
{
    uint64_t number = key % KEYS;
    return number < 200 ? number * 5 : (uint64_t)1 << (10 + (number - 200) % 36) | (number % 7);
}

static void content_bytes(uint64_t content, uint64_t *block)
{
    for (uint32_t index = 0; index < ATOLL_BLOCK_BYTES / 8; index++)
        block[index] = content * 0x9e3779b97f4a7c15u + index;
}
static struct fingerprint content_print(uint64_t content)
{
    uint64_t block[ATOLL_BLOCK_BYTES / 8];
    content_bytes(content, block);
    XXH128_hash_t hash = XXH3_128bits(block, sizeof block);
    return (struct fingerprint){hash.low64, hash.high64};
}

/* The content that a map value stands for, looked up on the device. */
static uint64_t content_of(uint64_t value)
{
    if (value == 0)
        return 0;
    if (MAP_KIND(value) == MAP_ZERO)
        return ZERO_CONTENT;
    if (MAP_KIND(value) == MAP_LOG)
        return content_of(datapath_record_base(&dedup, MAP_NUMBER(value)));
    uint64_t block[ATOLL_BLOCK_BYTES / 8], expected[ATOLL_BLOCK_BYTES / 8], pba = MAP_NUMBER(value);
    CHECK(store_pba_valid(&dedup, pba));
    memcpy(block, device + pba * ATOLL_BLOCK_BYTES, sizeof block);
    uint64_t content = block[0] * 0xf1de83e19937733du; /* inverse of the factor above */
    content_bytes(content, expected);
    CHECK(memcmp(block, expected, sizeof block) == 0);
    struct fingerprint print = peek_print(pba), wanted = content_print(content);
    CHECK(print.low == wanted.low && print.high == wanted.high);
    return content;
}

/* The persistent value of a key changed, in the running transaction. */
static void note(uint64_t key, uint64_t content)
{
    RIG_SET(operation, rig->operation + 1);
    CHECK(rig->event_count < HISTORY);
    rig->events[rig->event_count] = (struct event){rig->operation, key, content};
    RIG_SET(event_count, rig->event_count + 1);
    RIG_SET(now[key / KEYS][key % KEYS], content);
}

/* --- The datapath's stand-in ----------------------------------------------------------------------------------------- */

static void set_record(struct record *record, struct record value)
{
    atoll_save(&rig->journal, record, sizeof *record);
    *record = value;
}

static void drop_record(struct record *record)
{
    CHECK(record->state == 1);
    set_record(record, (struct record){0});
    store_unreserve(&dedup, 1);
    RIG_SET(reserved, rig->reserved - 1);
}

/* The record that a key's entry names, or NULL; *base is the persistent value under it, or the value itself. */
static struct record *logged(uint64_t key, uint64_t *base)
{
    uint64_t value = peek_value(key_volume(key), key_lba(key));
    *base = value;
    if (MAP_KIND(value) != MAP_LOG)
        return 0;
    struct record *record = &rig->records[MAP_NUMBER(value)];
    CHECK(record->state != 0 && record->key == key);
    *base = record->base;
    return record;
}

static bool ready(uint64_t key) { return rig->public.volumes[key_volume(key)].state == ATOLL_VOLUME_READY; }

static void write_key(uint64_t key, uint64_t content)
{
    uint64_t base, old, number = 0;
    while (number < RECORDS && rig->records[number].state != 0)
        number++;
    if (number == RECORDS || !ready(key) || !have_change(key_volume(key), key_lba(key), STORE_LOG, 0, 0) || !ready(key))
        return;
    struct record *before = logged(key, &base);
    if ((before != 0 && before->state >= 2) || !store_reserve(&dedup, 1)) /* being written: this rig does not overtake it */
        return;
    RIG_SET(reserved, rig->reserved + 1);
    CHECK(store_map_log(&dedup, key_volume(key), key_lba(key), number, &old) == ATOLL_OK);
    set_record(&rig->records[number], (struct record){1, key, base, content, 0});
    if (before != 0)
        drop_record(before);
}

/* First half: shares, drops or hands out a place. */
static void destage(struct record *record)
{
    if (record->state != 1)
        return;
    uint64_t key = record->key, content = record->content, candidates[4], pba = 0;
    uint32_t volume = key_volume(key);
    struct fingerprint print = content_print(content);
    wait_for(want_print, print.low, print.high, 0);
    uint32_t found = store_candidates(&dedup, print, candidates, 4);
    if (record->state != 1 || !have_change(volume, key_lba(key), STORE_CHANGE, record->base, found != 0 && content != 0 ? candidates[0] : 0) ||
        !store_has_room(&dedup, 1))
        return;
    found = store_candidates(&dedup, print, candidates, 4);
    if (content == 0) {
        store_unmap(&dedup, volume, key_lba(key), record->base);
        if (rig->now[volume][key % KEYS] != 0)
            note(key, 0);
        drop_record(record);
    } else if (found != 0 && chance(8) != 0) {
        CHECK(content_of(MAP_VALUE(MAP_PBA, candidates[0])) == content);
        CHECK(store_share(&dedup, volume, key_lba(key), record->base, candidates[0]));
        if (record->base != MAP_VALUE(MAP_PBA, candidates[0]))
            note(key, content);
        drop_record(record);
    } else if (!wait_for(want_space, 0, 0, 0)) {
        return;
    } else if (store_allocate(&dedup, 1, &pba) == 1) {
        CHECK(store_references(&dedup, pba) == 0);
        RIG_SET(reserved, rig->reserved - 1);
        atoll_set64(&rig->journal, &record->state, 2);
        atoll_set64(&rig->journal, &record->pba, pba);
    } else {
        store_sync(&dedup);
    }
}

/* Second half: it is written, or the write fails; then placed, perhaps much later. */
static void place(struct record *record)
{
    uint64_t block[ATOLL_BLOCK_BYTES / 8];
    if (record->state < 2)
        return;
    if (record->state == 2 && chance(16) == 0) {
        store_abandon(&dedup, record->pba, 1, chance(50) == 0);
        RIG_SET(reserved, rig->reserved + 1);
        atoll_set64(&rig->journal, &record->state, 1);
        return;
    }
    if (record->state == 2) {
        content_bytes(record->content, block);
        write_block(record->pba, block);
        atoll_set64(&rig->journal, &record->state, 3);
        return;
    }
    if (!have_change(key_volume(record->key), key_lba(record->key), STORE_CHANGE, record->base, record->pba) || !store_has_room(&dedup, 1))
        return;
    store_place(&dedup, key_volume(record->key), key_lba(record->key), record->base, record->pba, content_print(record->content));
    note(record->key, record->content);
    set_record(record, (struct record){0});
}

static void ask_sync(void);

/* Some records that are written are announced, then placed and synced as was said, or something else is done. */
static void place_ahead(void)
{
    struct record *records[AHEAD];
    struct store_placing placings[AHEAD];
    struct event events[AHEAD];
    uint32_t count = 0, most = 1 + (uint32_t)chance(AHEAD);
    for (uint32_t number = 0; number < RECORDS && count < most; number++) {
        struct record *record = &rig->records[number];
        if (record->state != 3 || !have_change(key_volume(record->key), key_lba(record->key), STORE_CHANGE, record->base, record->pba) ||
            record->state != 3)
            continue;
        placings[count] = (struct store_placing){key_volume(record->key), key_lba(record->key), record->base, record->pba,
                                                 content_print(record->content)};
        events[count] = (struct event){0, record->key, record->content};
        records[count++] = record;
    }
    if (count == 0 || !store_place_ahead(&dedup, placings, count, 0))
        return;
    RIG_SET(operation, rig->operation + 1); /* of nothing: who is told of a sync from now on is not told of these */
    RIG_SET(ahead_operation, rig->operation);
    RIG_SET(ahead_count, count);
    atoll_save(&rig->journal, rig->ahead, sizeof rig->ahead);
    memcpy(rig->ahead, events, sizeof events);
    if (chance(4) == 0)
        return;
    for (uint32_t index = 0; index < count; index++)
        if (records[index]->state == 3)
            place(records[index]);
    if (chance(4) != 0)
        ask_sync();
}

static void unmap(uint64_t key, bool promise)
{
    uint64_t base;
    logged(key, &base);
    if (!ready(key) || !have_change(key_volume(key), key_lba(key), promise ? STORE_CHANGE : STORE_LOOK, base, 0) ||
        !store_has_room(&dedup, 1))
        return;
    uint64_t again;
    struct record *record = logged(key, &again);
    if (again != base || !ready(key) || (record != 0 && record->state >= 2))
        return;
    if (promise) {
        if (!store_reserve(&dedup, 1))
            return;
        CHECK(store_promise_zero(&dedup, key_volume(key), key_lba(key), base) == ATOLL_OK);
        note(key, ZERO_CONTENT);
    } else {
        store_unmap(&dedup, key_volume(key), key_lba(key), base);
        if (base != 0)
            note(key, 0);
    }
    if (record != 0)
        drop_record(record);
}

static void ask_sync(void)
{
    if (rig->sync_count == SYNCS)
        return;
    uint64_t ticket = store_sync(&dedup);
    atoll_save(&rig->journal, &rig->syncs[rig->sync_count], sizeof rig->syncs[0]);
    rig->syncs[rig->sync_count].ticket = ticket;
    rig->syncs[rig->sync_count].operation = rig->operation;
    RIG_SET(sync_count, rig->sync_count + 1);
}

static void look_at_syncs(void)
{
    for (uint64_t index = 0; index < rig->sync_count;) {
        if (rig->syncs[index].ticket > store_synced(&dedup)) {
            index++;
            continue;
        }
        if (rig->syncs[index].operation > rig->synced_operation)
            RIG_SET(synced_operation, rig->syncs[index].operation);
        atoll_save(&rig->journal, &rig->syncs[index], sizeof rig->syncs[0]);
        rig->syncs[index] = rig->syncs[rig->sync_count - 1];
        RIG_SET(sync_count, rig->sync_count - 1);
    }
}

static void make_volumes(void)
{
    char name[] = "volume 0", reason[256];
    for (uint32_t volume = 0; volume < VOLUMES; volume++) {
        name[7] = (char)('0' + volume);
        CHECK(store_volume_create(&dedup, name, 8, (uint64_t)1 << 59, 0, 0, 0, reason) == ATOLL_OK);
        CHECK(store_volume_create(&dedup, name, 8, 4096, 0, 0, 0, reason) == ATOLL_EINVAL);
    }
    ask_sync();
    commit();
}

/* Another mix of work: how often somebody flushes, how fast the device is beside the datapath. */
static void turn_knobs(void)
{
    rig->sync_one_in = 1 + chance(12);
    rig->checkpoint_one_in = 1 + chance(12);
    rig->io_percent = 1 + chance(13);
    commit();
}

/* One random operation: one transaction, but for steps and I/O, which are some. */
static void operate(void)
{
    uint64_t key = key_of(chance(VOLUMES), chance(2) == 0 ? chance(40) : chance(KEYS));
    struct record *record = &rig->records[chance(RECORDS)];
    uint64_t what = chance(100);
    if (what >= 85 && what < 100 - rig->io_percent) {
        commit();
        time_flies();
        store_step(&dedup);
    } else if (what < 25) {
        write_key(key, chance(20) == 0 ? 0 : 2 + chance(CONTENTS));
    } else if (what < 60) {
        for (uint32_t index = 0; index < RECORDS && record->state != 1; index++)
            record = &rig->records[(index * 7 + what) % RECORDS];
        destage(record);
    } else if (what < 78) {
        for (uint32_t index = 0; index < RECORDS && record->state < 2; index++)
            record = &rig->records[(index * 7 + what) % RECORDS];
        if (chance(6) == 0)
            place_ahead();
        else
            place(record);
    } else if (what < 82) {
        unmap(key, false);
    } else if (what < 84) {
        unmap(key, true);
    } else if (what < 85) {
        if (chance(rig->sync_one_in) == 0)
            ask_sync();
        if (chance(rig->checkpoint_one_in) == 0)
            STORE_SET(dedup.store, checkpoint_wanted, 1);
    } else {
        run_io();
    }
    if (rig->hold != 0) { /* many syncs: the log fills up */
        if (chance(5) == 0)
            ask_sync();
        commit();
        store_step(&dedup);
        run_io();
        run_io();
    }
    look_at_syncs();
    commit();
}

#endif
