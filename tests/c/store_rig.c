/* The store between stand-ins: random work against an oracle; killed at any store, after power loss, with flipped bits. */
/* link: -DATOLL_STORE_HOOK ipc/domain.c services/dedup/store.c services/dedup/store_map.c services/dedup/store_space.c services/dedup/store_log.c services/dedup/store_rewrite.c services/dedup/store_checkpoint.c services/dedup/store_load.c services/dedup/store_replay.c services/dedup/store_sums.c services/dedup/store_volume.c */
/*
 *   store_rig [MODE [SEED [ROUNDS]]]     modes: work, kill, power, flip, full, time; without: all of them, briefly
 *
 * Stand-ins: an I/O table that the rig itself executes, in any order, with errors by chance; a device with a volatile cache
 * (any sector written since the last flush may be lost at power loss); a datapath of records with bases. The oracle is a
 * history: for each key (volume, lba) the values it had, with the number of the operation that set each. The log keeps the
 * order of changes, so whatever comes back from the device must be the state after one certain operation, at or after the last
 * one that a sync covered. All of it lies in one mapping, and the rig's own state is journaled like the store's.
 */
#define _GNU_SOURCE
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
    DISK_PAGES = STORE_BOUNCE_PAGES + 4
};
#define SECTOR 512
#define ZERO_CONTENT 1 /* MAP_ZERO; 0 is a hole; from 2 on: contents */

#define CHECK(condition)                                                                                \
    do {                                                                                                \
        if (!(condition)) {                                                                             \
            fprintf(stderr, "%s:%d: not true: %s   (%s)\n", __FILE__, __LINE__, #condition, rig_context); \
            abort();                                                                                    \
        }                                                                                               \
    } while (0)
static char rig_context[200];

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
    uint64_t deleting[VOLUMES];
    /* not journaled */
    uint64_t sync_one_in, checkpoint_one_in, io_percent; /* how the work is mixed */
    uint64_t fail_one_in;              /* writes and flushes; 0 never */
    uint64_t fail_flush_one_in;
    uint64_t volatile_cache;           /* keep what is needed for power loss */
    uint64_t pending_count;
    uint8_t doomed[1 << 13];           /* blocks whose flush failed: never on the device unless written again */
    struct event events[HISTORY];
    struct pending pending[PENDING];
};

static struct rig *rig;
static uint8_t *device, *stable, *memory;
static bool shared_memory;
static struct store_geometry geometry;
static struct atoll_domain domain;
static struct dedup dedup;
static uint64_t hook_left = UINT64_MAX;

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
        free(dedup.store->load);
        free(dedup.store);
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
    CHECK(madvise(memory, store_arena_bytes(&geometry), shared_memory ? MADV_REMOVE : MADV_DONTNEED) == 0); /* zeros */
    memset(rig->records, 0, sizeof rig->records);
    rig->reserved = 0;
    rig->sync_count = 0;
    rig->journal.count = 0;
    attach(true);
}

static void make_rig(uint64_t seed, uint64_t blocks, uint64_t frames, bool shared)
{
    geometry = (struct store_geometry){.device_blocks = blocks, .map_frames = frames, .fingerprint_slots = 1024, .log_blocks = 64};
    shared_memory = shared;
    rig = map(sizeof *rig, shared);
    device = map(blocks * ATOLL_BLOCK_BYTES, shared);
    stable = map(blocks * ATOLL_BLOCK_BYTES, shared);
    memory = map(store_arena_bytes(&geometry), shared);
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

static void drop_rig(void)
{
    munmap(rig, sizeof *rig);
    munmap(device, geometry.device_blocks * ATOLL_BLOCK_BYTES);
    munmap(stable, geometry.device_blocks * ATOLL_BLOCK_BYTES);
    munmap(memory, store_arena_bytes(&geometry));
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
    slot->argument = argument;
    slot->offset_bytes = offset_bytes;
    slot->length_bytes = (uint32_t)length;
    slot->segment_count = segment_count;
    atoll_set32(&rig->journal, &slot->kind, kind);
    atoll_set32(&rig->journal, &table->free_count, table->free_count - 1);
    return (int)number;
}

/* Executes one request in flight, picked by chance. False: there is none. */
static bool run_io(void)
{
    uint32_t busy[ATOLL_IO_COUNT], count = 0;
    for (uint32_t number = 0; number < ATOLL_IO_COUNT; number++)
        if (rig->io.slots[number].kind != IO_FREE)
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
}

/* Steps and I/O until nothing is left to do. */
static void settle(void)
{
    for (uint64_t turns = 0;; turns++) {
        CHECK(turns < 1000000);
        struct store_area *area = dedup.store->area;
        bool did = store_step(&dedup);
        bool waits = area->sync_retry_ns > 1 || area->checkpoint_retry_ns > 1;
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
    struct fingerprint print = {0, 0}, wanted = content_print(content);
    CHECK(store_fingerprint(&dedup, pba, &print) && print.low == wanted.low && print.high == wanted.high);
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
    uint64_t value = store_map_get(&dedup, key_volume(key), key_lba(key));
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
    if (number == RECORDS || !ready(key) || !store_reserve(&dedup, 1))
        return;
    RIG_SET(reserved, rig->reserved + 1);
    struct record *before = logged(key, &base);
    if (before != 0 && before->state >= 2) { /* being written: this rig does not overtake it */
        store_unreserve(&dedup, 1);
        RIG_SET(reserved, rig->reserved - 1);
        return;
    }
    int status = store_map_log(&dedup, key_volume(key), key_lba(key), number, &old);
    if (status != ATOLL_OK) {
        CHECK(status == ATOLL_ENOSPC && before == 0);
        store_unreserve(&dedup, 1);
        RIG_SET(reserved, rig->reserved - 1);
        return;
    }
    set_record(&rig->records[number], (struct record){1, key, base, content, 0});
    if (before != 0)
        drop_record(before);
}

/* First half: shares, drops or hands out a place. */
static void destage(struct record *record)
{
    if (record->state != 1 || !store_has_room(&dedup, 1))
        return;
    uint64_t key = record->key, content = record->content, candidates[4], pba = 0;
    uint32_t volume = key_volume(key);
    uint32_t found = store_candidates(&dedup, content_print(content), candidates, 4);
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
    if (record->state < 2 || !store_has_room(&dedup, 1))
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
    store_place(&dedup, key_volume(record->key), key_lba(record->key), record->base, record->pba, content_print(record->content));
    note(record->key, record->content);
    set_record(record, (struct record){0});
}

static void unmap(uint64_t key, bool promise)
{
    uint64_t base;
    struct record *record = logged(key, &base);
    if (!ready(key) || (record != 0 && record->state >= 2) || !store_has_room(&dedup, 1))
        return;
    if (promise) {
        if (!store_reserve(&dedup, 1))
            return;
        int status = store_promise_zero(&dedup, key_volume(key), key_lba(key), base);
        if (status != ATOLL_OK) {
            CHECK(status == ATOLL_ENOSPC);
            store_unreserve(&dedup, 1);
            return;
        }
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
        CHECK(store_volume_create(&dedup, name, 8, (uint64_t)1 << 59, 0, reason) == ATOLL_OK);
        CHECK(store_volume_create(&dedup, name, 8, 4096, 0, reason) == ATOLL_EINVAL);
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
    look_at_syncs();
    commit();
}

/* --- Checks ---------------------------------------------------------------------------------------------------------- */

/* The store's memory agrees with itself and with the rig. Between transactions only. */
static void check_memory(void)
{
    struct store *store = dedup.store;
    struct store_area *area = store->area;
    uint32_t *counted = calloc(geometry.device_blocks, sizeof *counted);
    uint64_t mapped[VOLUMES] = {0}, zeros = 0, leaves = 0, in_flight = 0;
    for (uint64_t frame = 0; frame < area->frames_high; frame++) {
        uint64_t used = 0;
        const uint64_t *entries = store_frame(store, frame);
        for (uint32_t index = 0; index < FORMAT_LEAF_ENTRIES; index++)
            used += entries[index] != 0;
        CHECK(used == store->frame_used[frame]);
        if (store->frame_key[frame] == 0) {
            CHECK(used == 0);
            continue;
        }
        leaves++;
        uint64_t key = store->frame_key[frame] - 1;
        uint32_t volume = FORMAT_KEY_VOLUME(key);
        store->last_key = 0;
        CHECK(store_find_frame(store, volume, FORMAT_KEY_NUMBER(key), false) == frame);
        CHECK(store_map_next_leaf(&dedup, volume, FORMAT_KEY_NUMBER(key), UINT64_MAX) == FORMAT_KEY_NUMBER(key));
        for (uint32_t index = 0; index < FORMAT_LEAF_ENTRIES; index++) {
            uint64_t value = entries[index];
            mapped[volume] += MAP_KIND(value) == MAP_PBA || MAP_KIND(value) == MAP_LOG;
            if (MAP_KIND(value) == MAP_LOG)
                value = datapath_record_base(&dedup, MAP_NUMBER(value));
            zeros += MAP_KIND(value) == MAP_ZERO;
            if (MAP_KIND(value) == MAP_PBA)
                counted[MAP_NUMBER(value)]++;
        }
    }
    CHECK(leaves == area->leaves && leaves + area->frames_free == area->frames_high);
    for (uint32_t volume = 0; volume < VOLUMES; volume++) {
        CHECK(mapped[volume] == rig->public.volumes[volume].mapped_blocks);
        uint64_t seen = 0, end = (uint64_t)1 << 48;
        for (uint64_t leaf = store_map_next_leaf(&dedup, volume, 0, end); leaf < end;
             leaf = store_map_next_leaf(&dedup, volume, leaf + 1, end))
            seen++;
        for (uint64_t frame = 0; frame < area->frames_high; frame++)
            seen -= store->frame_key[frame] != 0 && FORMAT_KEY_VOLUME(store->frame_key[frame] - 1) == volume;
        CHECK(seen == 0);
    }
    for (uint32_t number = 0; number < RECORDS; number++)
        in_flight += rig->records[number].state >= 2;
    CHECK(zeros == area->zero_promises && area->reserved_blocks == zeros + rig->reserved);
    uint64_t sums[6] = {0}, references = 0;
    for (uint64_t group = 0; group < (geometry.device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS; group++) {
        uint32_t free_count = 0, pending_count = 0;
        for (uint64_t pba = group * STORE_GROUP_BLOCKS; pba < (group + 1) * STORE_GROUP_BLOCKS; pba++) {
            uint32_t word = store->refs[pba];
            free_count += word == 0;
            pending_count += (word & REF_PENDING) != 0;
            sums[2] += REF_IS_COUNT(word);
            sums[3] += word == REF_METADATA;
            sums[4] += word == REF_QUARANTINED;
            sums[5] += word == REF_IN_FLIGHT;
            references += REF_IS_COUNT(word) ? word : 0;
            if (pba < geometry.device_blocks)
                CHECK((REF_IS_COUNT(word) ? word : 0) == counted[pba]);
            CHECK(store_usable(store, pba) == (word != REF_FIXED));
        }
        CHECK(free_count == GROUP_FREE(store->groups[group]) && pending_count == GROUP_PENDING(store->groups[group]));
        sums[0] += free_count;
        sums[1] += pending_count;
    }
    CHECK(sums[0] == area->free_blocks && sums[1] == area->pending_blocks && sums[2] + sums[5] == area->stored_blocks);
    CHECK(sums[3] == area->metadata_blocks && sums[4] == area->quarantined_blocks && sums[5] == in_flight);
    CHECK(references == area->references);
    free(counted);
    /* A page that is neither dirty nor on its way is on the device as it is in memory. */
    for (uint64_t page = 0; page < store->shape.total; page++) {
        uint8_t image[ATOLL_BLOCK_BYTES];
        bool dirty = store->dirty[page / 64] >> page % 64 & 1;
        uint64_t level = store_page_level(store, page);
        if (page - store->shape.level_base[level] >= store->shape.level_count[level])
            continue; /* a gap in the row */
        for (uint32_t number = 0; number < STORE_BATCHES; number++)
            for (uint64_t index = 0; index < area->batches[number].count; index++)
                dirty |= area->batches[number].page[index] == page;
        if (dirty)
            continue;
        store_page_image(store, page, image);
        const struct format_pointer *pointer = &store->pointers[page];
        if (store_all_zero(image, sizeof image))
            CHECK(pointer->primary == 0);
        else
            CHECK(pointer->checksum == store_checksum(store, FORMAT_SEED_PAGE, page ^ pointer->key, image, sizeof image) &&
                  (page < store->shape.leaves_base || page >= store->shape.level_count[0] ||
                   pointer->key == store_page_key(store, page)));
    }
}

/* Every key's persistent value is the oracle's. */
static void check_now(void)
{
    for (uint64_t key = 0; key < VOLUMES * KEYS; key++) {
        uint64_t base;
        logged(key, &base);
        CHECK(content_of(base) == rig->now[key / KEYS][key % KEYS]);
    }
}

/* After loading: the state is that after one operation in [synced_operation, operation]; it becomes the oracle's. */
static void check_past(void)
{
    uint64_t first = rig->synced_operation, count = rig->operation - first + 1;
    uint8_t *possible = malloc(count), *fits = malloc(count);
    memset(possible, 1, count);
    /* Of all keys at once: the value that each had, and the operations after which it had it. */
    uint64_t (*spans)[3] = malloc((rig->event_count + VOLUMES * KEYS) * sizeof *spans);
    for (uint64_t key = 0; key < VOLUMES * KEYS; key++) {
        uint64_t found = content_of(store_map_get(&dedup, key_volume(key), key_lba(key))), used = 0;
        uint64_t from = 0, content = 0;
        memset(fits, 0, count);
        for (uint64_t index = 0; index < rig->event_count; index++) {
            if (rig->events[index].key != key)
                continue;
            spans[used][0] = from, spans[used][1] = rig->events[index].operation - 1, spans[used++][2] = content;
            from = rig->events[index].operation;
            content = rig->events[index].content;
        }
        spans[used][0] = from, spans[used][1] = rig->operation, spans[used++][2] = content;
        for (uint64_t index = 0; index < used; index++)
            for (uint64_t at = spans[index][0] > first ? spans[index][0] : first; spans[index][2] == found && at <= spans[index][1]; at++)
                fits[at - first] = 1;
        for (uint64_t at = 0; at < count; at++)
            possible[at] &= fits[at];
    }
    uint64_t state = 0;
    while (state < count && !possible[state])
        state++;
    CHECK(state < count);
    /* The future did not happen. */
    rig->operation = first + state;
    while (rig->event_count > 0 && rig->events[rig->event_count - 1].operation > rig->operation)
        rig->event_count--;
    for (uint64_t key = 0; key < VOLUMES * KEYS; key++)
        rig->now[key / KEYS][key % KEYS] = content_of(store_map_get(&dedup, key_volume(key), key_lba(key)));
    free(possible);
    free(fits);
    free(spans);
}

static void close_store(void)
{
    for (uint32_t turns = 0; turns < 100; turns++) {
        for (uint32_t number = 0; number < RECORDS; number++) {
            if (rig->records[number].state >= 2)
                place(&rig->records[number]);
            else
                destage(&rig->records[number]);
            commit();
        }
        settle();
    }
    for (uint32_t number = 0; number < RECORDS; number++)
        CHECK(rig->records[number].state == 0);
    store_close(&dedup);
    commit();
    settle();
    CHECK(store_closed(&dedup));
}

static void start(uint64_t seed, uint64_t blocks, uint64_t frames, bool shared)
{
    make_rig(seed, blocks, frames, shared);
    format();
    make_volumes();
    settle();
    look_at_syncs();
    commit();
}

/* --- Modes ----------------------------------------------------------------------------------------------------------- */

static void report(void)
{
    const struct store_area *area = dedup.store->area;
    printf("operations %llu, events %llu, syncs %llu (failed %llu), checkpoints %llu, pages %llu, log blocks %llu, leaves %llu, stored %llu, "
           "references %llu, free %llu, quarantined %llu, metadata %llu\n",
           (unsigned long long)rig->operation, (unsigned long long)rig->event_count, (unsigned long long)rig->counters[64],
           (unsigned long long)rig->counters[65], (unsigned long long)rig->counters[67], (unsigned long long)rig->counters[68],
           (unsigned long long)rig->counters[66], (unsigned long long)area->leaves, (unsigned long long)area->stored_blocks,
           (unsigned long long)area->references, (unsigned long long)area->free_blocks,
           (unsigned long long)area->quarantined_blocks, (unsigned long long)area->metadata_blocks);
}

/* Work, with errors of the device now and then, clean close and reload. */
static void mode_work(uint64_t seed)
{
    start(seed, 4096, 256, false);
    for (uint32_t round = 0; round < 3; round++) {
        rig->fail_one_in = round == 1 ? 30 : 0;
        for (uint32_t index = 0; index < 4000; index++) {
            if (index % 1000 == 0)
                turn_knobs();
            operate();
        }
        rig->fail_one_in = 0;
        check_memory();
        check_now();
        report();
        close_store();
        check_memory();
        check_now();
        struct store_space before, after;
        store_space(&dedup, &before);
        fresh_arena();
        load();
        CHECK(store_state(&dedup) == STORE_READY);
        check_memory();
        check_now();
        store_space(&dedup, &after);
        CHECK(after.stored_blocks == before.stored_blocks && after.references == before.references &&
              after.metadata_blocks == before.metadata_blocks);
        rig->event_count = 0; /* room for more */
    }
    drop_rig();
}

/* A child works and dies at some store; the parent takes over, in the state of the last commit; ten times. */
static void mode_kill(uint64_t seed)
{
    start(seed, 2048, 128, true);
    rig->volatile_cache = 0;
    for (uint32_t life = 0; life < 10; life++) {
        uint64_t limit = 1 + (seed * 7919 + life * 104729) % 60000;
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            attach(false);
            hook_left = limit;
            if (life == 3) { /* dies while loading */
                hook_left = UINT64_MAX;
                close_store();
                rig->random += 2;
                fresh_arena();
                hook_left = limit % 5000;
                load();
            }
            turn_knobs();
            for (;;)
                operate();
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status));
        if (WTERMSIG(status) != SIGKILL)
            exit(3);
        attach(false);
        if (store_state(&dedup) == STORE_NEW)
            load();
        if (store_state(&dedup) == STORE_LOADING)
            settle();
        CHECK(store_state(&dedup) == STORE_READY);
        check_memory();
        check_now();
        if (rig->event_count > HISTORY / 2)
            RIG_SET(event_count, 0);
        commit();
    }
    close_store();
    check_memory();
    check_now();
    fresh_arena();
    load();
    CHECK(store_state(&dedup) == STORE_READY);
    check_memory();
    check_now();
    drop_rig();
}

/* Work, then the lights go out in many ways; each is loaded, checked, worked on and closed. */
static void load_after_loss(uint64_t mode)
{
    bool doomed = !store_all_zero(rig->doomed, sizeof rig->doomed);
    if (mode != 7 || doomed) /* 7: only the processes died, the device's cache lives */
        power_loss(mode != 7 ? mode : 1);
    fresh_arena();
    load();
    if (store_state(&dedup) != STORE_READY)
        fprintf(stderr, "%s: %s\n", rig_context, store_reason(&dedup));
    CHECK(store_state(&dedup) == STORE_READY);
    check_memory();
    check_past();
    rig->synced_operation = rig->operation; /* loading flushed */
}

static void mode_power(uint64_t seed, uint32_t states)
{
    start(seed, 2048, seed % 2 == 0 ? 128 : 16 + seed % 48, false); /* with few frames, leaves make room for others */
    for (uint32_t round = 0; round < 12; round++) {
        rig->fail_one_in = round % 4 == 3 ? 50 : 0;
        rig->fail_flush_one_in = round % 4 == 1 ? 3 : 0;
        uint64_t operations = 50 + chance(1500);
        turn_knobs();
        if (rig->fail_flush_one_in != 0)
            rig->sync_one_in = rig->checkpoint_one_in = 1;
        for (uint64_t index = 0; index < operations; index++)
            operate();
        for (uint32_t trial = 0; trial < states; trial++) {
            pid_t child = fork();
            CHECK(child >= 0);
            if (child == 0) {
                rig->fail_one_in = rig->fail_flush_one_in = 0;
                rig->random += 2 * trial + 2;
                for (int warm = 0; warm < 8; warm++)
                    chance(2);
                snprintf(rig_context, sizeof rig_context, "power: seed %llu round %u trial %u", (unsigned long long)seed, round, trial);
                load_after_loss((trial + round) % 8);
                for (uint32_t again = 0; again < 2; again++) { /* and again, from what that left */
                    turn_knobs();
                    for (uint64_t index = chance(200); index > 0; index--)
                        operate();
                    load_after_loss(chance(8));
                }
                for (uint32_t index = 0; index < 100; index++)
                    operate();
                close_store();
                fresh_arena();
                load();
                CHECK(store_state(&dedup) == STORE_READY);
                check_now();
                _exit(0);
            }
            int status;
            CHECK(waitpid(child, &status, 0) == child);
            if (status != 0) {
                fprintf(stderr, "power: seed %llu round %u trial %u failed\n", (unsigned long long)seed, round, trial);
                exit(1);
            }
        }
    }
    drop_rig();
}

/* Bits flip in metadata blocks: in one copy it is repaired, in both it is refused or (end of the log) an earlier durable state. */
static void mode_flip(uint64_t seed, uint32_t trials)
{
    start(seed, 2048, 128, false);
    for (uint32_t index = 0; index < 3000; index++)
        operate();
    ask_sync();
    commit();
    settle();
    look_at_syncs();
    commit();
    check_now();
    flush_device();
    for (uint32_t trial = 0; trial < trials; trial++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            const struct store *store = dedup.store;
            struct store_area area = *store->area;
            rig->random += 2 * trial + 2;
            for (int warm = 0; warm < 8; warm++)
                chance(2);
            snprintf(rig_context, sizeof rig_context, "flip: seed %llu trial %u", (unsigned long long)seed, trial);
            uint64_t places[2] = {0, 0}, kind = chance(3);
            bool both = chance(2) == 0;
            if (kind == 0) {
                places[0] = area.generation & 1;
                places[1] = area.device_blocks - 2 + places[0];
            } else if (kind == 1 && area.log_durable > area.log_start) {
                uint64_t sequence = area.log_start + chance(area.log_durable - area.log_start);
                places[0] = FORMAT_SUPER_BLOCKS + sequence % area.log_blocks;
                places[1] = area.usable_end + sequence % area.log_blocks;
            } else {
                uint64_t page = chance(store->shape.total);
                while (store->pointers[page].primary == 0)
                    page = page + 1 == store->shape.total ? 0 : page + 1;
                places[0] = store->pointers[page].primary;
                places[1] = store->pointers[page].mirror;
            }
            uint64_t copy = chance(2), flips = 1 + chance(3);
            uint64_t span = kind == 0 ? FORMAT_SUPER_BYTES : ATOLL_BLOCK_BYTES;
            for (uint64_t each = 0; each < 2; each++)
                if (both || each == copy)
                    for (uint64_t flip = 0; flip < flips; flip++)
                        device[places[each] * ATOLL_BLOCK_BYTES + chance(span)] ^= (uint8_t)(1u << chance(8));
            if (both && chance(4) == 0) /* not even a trace */
                for (uint64_t each = 0; each < 2; each++)
                    memset(device + places[each] * ATOLL_BLOCK_BYTES, 0, ATOLL_BLOCK_BYTES);
            fresh_arena();
            load();
            if (!both) {
                CHECK(store_state(&dedup) == STORE_READY);
                check_memory();
                for (uint64_t key = 0; key < VOLUMES * KEYS; key++)
                    CHECK(content_of(store_map_get(&dedup, key_volume(key), key_lba(key))) == rig->now[key / KEYS][key % KEYS]);
                close_store();
                for (uint64_t place = 0; place < 2; place++) { /* what was repaired no longer needs the other copy */
                    fresh_arena();
                    load();
                    CHECK(store_state(&dedup) == STORE_READY);
                    CHECK(rig->counters[DEDUP_COUNTER_STORE_FIRST + STORE_COUNTER_PAGES_REPAIRED] <= 1);
                }
            } else if (store_state(&dedup) == STORE_READY) {
                check_memory();
                if (kind == 1) /* the last sync's blocks have nobody to vouch for them */
                    rig->synced_operation = 0;
                check_past();
            } else {
                CHECK(store_state(&dedup) == STORE_FAILED && store_reason(&dedup)[0] != 0);
            }
            _exit(0);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child);
        if (status != 0) {
            fprintf(stderr, "flip: seed %llu trial %u failed\n", (unsigned long long)seed, trial);
            exit(1);
        }
    }
    drop_rig();
}

/* While a checkpoint lets go of emptied leaves, whose places the old root still has, all that is granted is written: it must not take
 * the places of the pages to come. */
static void fill_while_leaves_go(uint64_t seed)
{
    enum { LEAVES = 200 };
    uint64_t old, pba, lba = LEAVES * FORMAT_LEAF_ENTRIES;
    make_rig(seed, 2048, 300, false);
    rig->volatile_cache = 0;
    format();
    make_volumes();
    settle();
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint64_t leaf = 0; leaf < LEAVES; leaf++) {
            uint64_t at = leaf * FORMAT_LEAF_ENTRIES;
            if (pass == 0) {
                CHECK(store_reserve(&dedup, 1) && store_map_log(&dedup, 0, at, 0, &old) == ATOLL_OK);
                CHECK(store_allocate(&dedup, 1, &pba) == 1);
                store_place(&dedup, 0, at, 0, pba, content_print(leaf + 2));
            } else {
                store_unmap(&dedup, 0, at, store_map_get(&dedup, 0, at));
            }
            commit();
        }
        store_sync(&dedup);
        STORE_SET(dedup.store, checkpoint_wanted, pass == 0);
        commit();
        settle();
    }
    STORE_SET(dedup.store, checkpoint_wanted, 1);
    commit();
    while (dedup.store->area->leaves != 0) {
        store_step(&dedup);
        run_io();
    }
    for (bool more = true; more; lba++) {
        more = store_reserve(&dedup, 1) && store_map_log(&dedup, 0, lba, 0, &old) == ATOLL_OK;
        if (more) {
            CHECK(store_allocate(&dedup, 1, &pba) == 1);
            store_place(&dedup, 0, lba, 0, pba, (struct fingerprint){lba * 0x9e3779b97f4a7c15u, lba * 0xbf58476d1ce4e5b9u});
        }
        commit();
        while (!store_has_room(&dedup, 1)) {
            commit();
            store_step(&dedup);
            run_io();
        }
    }
    commit();
    settle();
    CHECK(dedup.store->area->checkpoint_phase == CHECKPOINT_IDLE && dedup.store->area->leaves_released == 0);
    drop_rig();
}

/* A device is filled to the last block; every reservation is honoured, checkpoints find their places, deletion frees. */
static void mode_full(uint64_t seed)
{
    char reason[256];
    fill_while_leaves_go(seed);
    start(seed, 1024, 64, false);
    uint64_t content = 1000, filled = 0;
    struct store_space space;
    for (uint32_t round = 0; round < 6; round++) {
        for (uint64_t lba = 0; lba < 2000; lba++) {
            uint64_t old, pba;
            while (!store_has_room(&dedup, 1)) {
                commit();
                settle();
            }
            uint64_t before = store_map_get(&dedup, 0, 100000 + lba);
            if (!store_reserve(&dedup, 1))
                break;
            if (store_map_log(&dedup, 0, 100000 + lba, 0, &old) != ATOLL_OK) {
                store_unreserve(&dedup, 1);
                break;
            }
            set_record(&rig->records[0], (struct record){1, 0, before, 0, 0});
            uint32_t turns = 0;
            while (store_allocate(&dedup, 1, &pba) == 0) {
                CHECK(turns++ < 10);
                store_sync(&dedup);
                commit();
                settle();
            }
            store_place(&dedup, 0, 100000 + lba, before, pba, content_print(content++));
            set_record(&rig->records[0], (struct record){0});
            filled++;
            bool step = chance(5) == 0, io = chance(3) == 0;
            commit();
            if (step)
                store_step(&dedup);
            if (io)
                run_io();
        }
        commit();
        STORE_SET(dedup.store, checkpoint_wanted, 1);
        commit();
        settle();
        check_memory();
        store_space(&dedup, &space);
        CHECK(space.available_blocks <= 4 && space.stored_blocks > 300);
        for (uint64_t lba = 0; round < 5 && lba < 2000; lba++) { /* make room, here and there */
            uint64_t value = store_map_get(&dedup, 0, 100000 + lba);
            if (value == 0 || chance(3) != 0)
                continue;
            store_unmap(&dedup, 0, 100000 + lba, value);
            commit();
            if (!store_has_room(&dedup, 1)) {
                commit();
                settle();
            }
        }
        commit();
        settle();
    }
    CHECK(filled > 1000);
    CHECK(store_volume_delete(&dedup, 0, reason) == ATOLL_OK);
    commit();
    CHECK(store_volume_delete(&dedup, 0, reason) == ATOLL_ENOENT);
    store_step(&dedup);
    run_io();
    /* Power fails while it is being deleted; then it goes on. */
    uint64_t generation = rig->public.volumes[0].generation;
    store_sync(&dedup);
    commit();
    for (uint32_t turns = 0; turns < 20; turns++) {
        store_step(&dedup);
        run_io();
    }
    flush_device();
    fresh_arena();
    load();
    CHECK(store_state(&dedup) == STORE_READY);
    settle();
    check_memory();
    CHECK(rig->public.volumes[0].state == ATOLL_VOLUME_FREE && rig->public.volumes[0].generation == generation);
    store_sync(&dedup);
    commit();
    settle();
    store_space(&dedup, &space);
    CHECK(space.stored_blocks == 0 && space.references == 0);
    CHECK(store_volume_create(&dedup, "again", 5, 4096, 0, reason) == ATOLL_OK);
    CHECK(rig->public.volumes[0].generation == generation + 1);
    commit();
    drop_rig();
}

static double seconds(void) { return (double)atoll_now_ns() / 1e9; }

static void mode_time(void)
{
    enum { BLOCKS = 1 << 17, COUNT = 60000 };
    make_rig(1, BLOCKS, 1024, false);
    rig->volatile_cache = 0;
    format();
    make_volumes();
    settle();
    uint64_t old, pba;
    double begin = seconds();
    double placing = 0;
    for (uint64_t lba = 0; lba < COUNT; lba++) {
        CHECK(store_reserve(&dedup, 1));
        CHECK(store_map_log(&dedup, 0, lba, 0, &old) == ATOLL_OK);
        CHECK(store_allocate(&dedup, 1, &pba) == 1);
        store_place(&dedup, 0, lba, 0, pba, (struct fingerprint){lba * 0x9e3779b97f4a7c15u, lba * 0xbf58476d1ce4e5b9u});
        atoll_commit(&rig->journal);
        if (lba % 1000 == 999) {
            placing += seconds() - begin;
            settle();
            begin = seconds();
        }
    }
    printf("reserve, log, allocate, place: %.0f ns\n", placing / COUNT * 1e9);
    begin = seconds();
    uint64_t sum = 0;
    for (uint64_t index = 0; index < 10 * COUNT; index++)
        sum += store_map_get(&dedup, 0, index % COUNT);
    printf("map get in sequence: %.1f ns\n", (seconds() - begin) / COUNT / 10 * 1e9);
    begin = seconds();
    for (uint64_t index = 0; index < 10 * COUNT; index++)
        sum += store_map_get(&dedup, 0, index * 7919 % COUNT);
    printf("map get at random: %.1f ns (%llu)\n", (seconds() - begin) / COUNT / 10 * 1e9, (unsigned long long)sum);
    begin = seconds();
    attach(false);
    printf("attach: %.0f us\n", (seconds() - begin) * 1e6);
    close_store();
    fresh_arena();
    begin = seconds();
    load();
    printf("load of %u blocks: %.1f ms\n", BLOCKS, (seconds() - begin) * 1e3);
    drop_rig();
}

#ifndef STORE_RIG_LIBRARY
int main(int count, char **arguments)
{
    const char *mode = count > 1 ? arguments[1] : "all";
    uint64_t seed = count > 2 ? strtoull(arguments[2], 0, 0) : (uint64_t)time(0);
    uint32_t rounds = count > 3 ? (uint32_t)strtoul(arguments[3], 0, 0) : 2;
    bool all = strcmp(mode, "all") == 0;
    printf("store_rig %s %llu %u\n", mode, (unsigned long long)seed, rounds);
    fflush(stdout);
    for (uint32_t round = 0; round < rounds; round++, seed++) {
        snprintf(rig_context, sizeof rig_context, "seed %llu", (unsigned long long)seed);
        if (all || strcmp(mode, "work") == 0)
            mode_work(seed);
        if (all || strcmp(mode, "full") == 0)
            mode_full(seed);
        if (all || strcmp(mode, "kill") == 0)
            mode_kill(seed);
        if (all || strcmp(mode, "power") == 0)
            mode_power(seed, 8);
        if (all || strcmp(mode, "flip") == 0)
            mode_flip(seed, 60);
        if (strcmp(mode, "time") == 0)
            mode_time();
    }
    return 0;
}
#endif
