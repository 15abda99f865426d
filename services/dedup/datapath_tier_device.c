/*
 * The fast tier's device: its superblock and table, its coming and going. See datapath_tier.h.
 *
 * The table on the device is what makes the tier warm after a restart. It is written now and then, in the background: what
 * it says of a place may be old, and then the block that is read there has not the fingerprint that the main store asks for.
 *
 * After a crash: `pending` says that a superblock or some pages of the table are being read; they arrive at the successor.
 * Pages that had arrived and were not taken over are read again.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

/* Good answers after which earlier troubles are forgotten. */
#define GOOD_ANSWERS 256

static void *memory_at(uint64_t address) { return (void *)(uintptr_t)address; }

static void set_state(struct datapath *dp, enum tier_state state)
{
    dp_set64(dp, &dp->tier.area->state, state);
    dp->tier.end = END_UNKNOWN;
    dp->retry = true;
}

/* --- Memory ---------------------------------------------------------------------------------------------------------------- */

struct parts { uint64_t heads, entries, taken, dirty, end, buckets, table_blocks; };

static struct parts parts_of(uint64_t places)
{
    struct parts parts = {.buckets = 64, .table_blocks = format_tier_table_blocks(places)};
    while (parts.buckets < places)
        parts.buckets <<= 1;
    parts.heads = (sizeof(struct tier_area) + 63) / 64 * 64;
    parts.entries = parts.heads + parts.buckets * sizeof(uint32_t);
    parts.taken = parts.entries + places * sizeof(struct tier_entry);
    parts.dirty = parts.taken + (places + 63) / 64 * 8;
    parts.end = parts.dirty + (parts.table_blocks + 63) / 64 * 8;
    return parts;
}

uint64_t tier_arena_bytes(uint64_t places) { return places == 0 ? sizeof(struct tier_area) : parts_of(places).end; }

void tier_attach(struct datapath *dp, void *memory, uint64_t places, bool fresh)
{
    struct tier *tier = &dp->tier;
    struct parts parts = parts_of(places);
    *tier = (struct tier){.area = memory};
    if (places == 0)
        return;
    tier->heads = (void *)((char *)memory + parts.heads);
    tier->entries = (void *)((char *)memory + parts.entries);
    tier->taken = (void *)((char *)memory + parts.taken);
    tier->dirty = (void *)((char *)memory + parts.dirty);
    if (fresh) {
        memset(tier->heads, 0xff, parts.buckets * sizeof(uint32_t));
        tier->area->places = places;
        tier->area->buckets = parts.buckets;
        tier->area->table_blocks = parts.table_blocks;
        tier->area->state = TIER_NEW;
    }
    tier->heard_ns = atoll_now_ns();
    tier->backoff_ns = TIER_RETRY_FIRST_NS;
    for (uint32_t number = 0; number < ATOLL_IO_COUNT; number++)
        tier->in_flight += dp->dedup->io->slots[number].kind != IO_FREE && dp->dedup->io->slots[number].device == ATOLL_ROLE_LLRRM;
}

void tier_adopt(struct datapath *dp)
{
    struct tier *tier = &dp->tier;
    struct tier_area *area = tier->area;
    if (area->places == 0)
        return;
    for (uint32_t number = 0; number < TIER_COPIES; number++) {
        struct tier_copy *copy = &area->copies[number];
        if (copy->state == COPY_WRITING)
            tier_forget_copy(dp, (uint32_t)copy->place);
        atoll_save(dp->journal, copy, sizeof *copy);
        *copy = (struct tier_copy){0};
    }
    for (uint32_t slot = 0; slot < TIER_STAGING_PAGES; slot++)
        if (area->staged[slot] != 0) {
            tier_dirty(dp, (area->staged[slot] - 1) * FORMAT_TIER_ENTRIES);
            dp_set64(dp, &area->staged[slot], 0);
        }
    dp_set64(dp, &area->pending, 0);
    dp_set64(dp, &area->opened, 0);
    tier->in_flight = 0;
    if (area->state != TIER_OFF)
        set_state(dp, TIER_NEW); /* its superblock tells whether it is the same one */
    atoll_domain_commit(dp->domain);
}

/* --- I/O ---------------------------------------------------------------------------------------------------------------------- */

uint64_t tier_room(const struct datapath *dp)
{
    uint64_t room = io_room(dp->dedup, IO_FILL);
    uint64_t ours = dp->tier.in_flight < TIER_IO_MOST ? TIER_IO_MOST - dp->tier.in_flight : 0;
    return room < ours ? room : ours;
}

bool tier_submit(struct datapath *dp, enum io_kind kind, uint64_t argument, uint32_t opcode, uint64_t block,
                 const struct atoll_segment *segments, uint32_t count)
{
    struct tier *tier = &dp->tier;
    if (tier_room(dp) == 0 ||
        io_submit(dp->dedup, kind, argument, ATOLL_ROLE_LLRRM, opcode, block * DP_BLOCK, segments, count) < 0)
        return false;
    if (tier->in_flight++ == 0)
        tier->heard_ns = atoll_now_ns();
    return true;
}

static bool submit_pages(struct datapath *dp, enum tier_io what, uint64_t number, uint32_t opcode, uint64_t block, uint64_t address,
                         uint32_t pages)
{
    struct atoll_segment segment = {.address = address, .length = pages * DP_BLOCK};
    return tier_submit(dp, IO_TIER, (uint64_t)what << 56 | number, opcode, block, &segment, 1);
}

static void away(struct datapath *dp, const char *reason)
{
    struct tier *tier = &dp->tier;
    atoll_save(dp->journal, tier->area->reason, sizeof tier->area->reason);
    snprintf(tier->area->reason, sizeof tier->area->reason, "%s", reason);
    set_state(dp, TIER_AWAY);
    atoll_count(dp->domain, DEDUP_COUNTER_TIER_AWAYS, 1);
    tier->retry_ns = atoll_now_ns() + tier->backoff_ns;
    tier->backoff_ns = tier->backoff_ns * 2 < TIER_RETRY_LAST_NS ? tier->backoff_ns * 2 : TIER_RETRY_LAST_NS;
    tier->errors = tier->good = tier->bounced = 0;
    cache_abandon_tier(dp);
}
_Static_assert(sizeof(((struct tier_area *)0)->reason) % 8 == 0 && offsetof(struct tier_area, reason) % 8 == 0, "saved by words");

void tier_answered(struct datapath *dp, uint32_t status, bool asked)
{
    struct tier *tier = &dp->tier;
    assert(tier->in_flight != 0);
    tier->in_flight--;
    tier->heard_ns = atoll_now_ns();
    if (status != ATOLL_OK) {
        tier->good = 0;
        tier->errors++;
        /* Is it still the same? A file that was truncated, and that writes have lengthened again, has lost its superblock; what
         * became smaller, its last block. */
        if (tier->area->state == TIER_ONLINE || tier->area->state == TIER_LOADING)
            set_state(dp, TIER_NEW);
        return;
    }
    if (asked)
        return; /* that these are there says nothing about what failed */
    tier->errors = 0;
    if (++tier->good == GOOD_ANSWERS)
        tier->backoff_ns = TIER_RETRY_FIRST_NS;
}

/* --- Superblock ------------------------------------------------------------------------------------------------------------ */

static uint64_t super_checksum(const struct format_tier_super *super)
{
    return XXH3_64bits_withSeed((const char *)super + 8, sizeof *super - 8, FORMAT_TIER_SEED);
}

static bool all_zero(const void *memory, uint64_t bytes)
{
    const uint64_t *words = memory;
    for (uint64_t index = 0; index < bytes / 8; index++)
        if (words[index] != 0)
            return false;
    return true;
}

/* Nothing but what a tier may have left there after its superblock was lost: zeros, pages of its table. */
static bool blank(const void *memory)
{
    for (uint32_t number = 0; number < TIER_BOUNCE_PAGES; number++) {
        const struct format_tier_page *page = (const void *)((const char *)memory + number * DP_BLOCK);
        if (!all_zero(page, DP_BLOCK) && (number == 0 || page->magic != FORMAT_TIER_TABLE_MAGIC))
            return false;
    }
    return true;
}

static void refuse(struct datapath *dp, const char *reason)
{
    struct tier_area *area = dp->tier.area;
    atoll_save(dp->journal, area->reason, sizeof area->reason);
    snprintf(area->reason, sizeof area->reason, "%s", reason);
    set_state(dp, TIER_REFUSED);
}

/* What the device says of itself has been read. Only copies lie on it, so what does not fit is formatted anew; what is not
 * ours is left alone. */
static void super_read(struct datapath *dp)
{
    struct tier_area *area = dp->tier.area;
    struct format_tier_super super;
    uint64_t uuid_low, uuid_high;
    memcpy(&super, memory_at(dp->tier.bounce), sizeof super);
    store_uuid(dp->dedup, &uuid_low, &uuid_high);
    if (super.magic != FORMAT_TIER_MAGIC) {
        if (area->opened || blank(memory_at(dp->tier.bounce)))
            set_state(dp, TIER_FORMATTING);
        else
            refuse(dp, "the fast device holds something that is no tier: zero its first 32 KiB to use it");
        return;
    }
    if (!area->opened && super.checksum == super_checksum(&super) && super.version != FORMAT_TIER_VERSION) {
        refuse(dp, "the fast device was formatted by another version: zero its first 32 KiB to use it");
        return;
    }
    bool ours = super.checksum == super_checksum(&super) && super.uuid_low == uuid_low && super.uuid_high == uuid_high &&
                super.places == area->places && super.table_blocks == area->table_blocks &&
                (area->format_id == 0 || area->format_id == super.format_id);
    if (!ours) {
        set_state(dp, TIER_FORMATTING);
        return;
    }
    dp_set64(dp, &area->format_id, super.format_id);
    dp_set64(dp, &area->opened, 1);
    set_state(dp, area->loaded == area->table_blocks ? TIER_ONLINE : TIER_LOADING);
}

static bool format(struct datapath *dp)
{
    struct tier_area *area = dp->tier.area;
    struct format_tier_super *super = memory_at(dp->tier.staging);
    uint64_t uuid_low, uuid_high;
    if (area->staged[0] != 0 || tier_room(dp) == 0)
        return false;
    ATOLL_CRASH_POINT(dp->domain, "dedup.tier.format");
    store_uuid(dp->dedup, &uuid_low, &uuid_high);
    memset(super, 0, DP_BLOCK);
    *super = (struct format_tier_super){.magic = FORMAT_TIER_MAGIC, .version = FORMAT_TIER_VERSION, .uuid_low = uuid_low,
                                        .uuid_high = uuid_high, .places = area->places, .table_blocks = area->table_blocks,
                                        .written_s = (uint64_t)time(0)};
    super->format_id = XXH3_64bits_withSeed(super, sizeof *super, atoll_now_ns()) | 1;
    super->checksum = super_checksum(super);
    dp_set64(dp, &area->format_id, super->format_id);
    dp_set64(dp, &area->opened, 1);
    dp_set64(dp, &area->loaded, area->table_blocks); /* no page of the table passes any more: all places are free */
    dp_set64(dp, &area->pending, TIER_IO_SUPER_WRITE);
    bool sent = submit_pages(dp, TIER_IO_SUPER_WRITE, 0, ATOLL_OP_IO_WRITE, 0, dp->tier.staging, 1);
    assert(sent);
    return true;
}

/* --- Table -------------------------------------------------------------------------------------------------------------------- */

static uint64_t page_checksum(const struct tier_area *area, const struct format_tier_page *page)
{
    return XXH3_64bits_withSeed((const char *)page + 8, sizeof *page - 8, area->format_id + page->page);
}

/* Takes over the first page in the bounce pages. */
static void take_over(struct datapath *dp)
{
    struct tier *tier = &dp->tier;
    struct tier_area *area = tier->area;
    const struct format_tier_page *page = memory_at(tier->bounce + (area->loaded - tier->bounce_first) * DP_BLOCK);
    if (page->magic == FORMAT_TIER_TABLE_MAGIC && page->page == area->loaded && page->checksum == page_checksum(area, page)) {
        ATOLL_CRASH_POINT(dp->domain, "dedup.tier.load");
        for (uint32_t index = 0; index < FORMAT_TIER_ENTRIES; index++)
            if (page->entries[index].pba != 0)
                tier_enter_loaded(dp, area->loaded * FORMAT_TIER_ENTRIES + index, &page->entries[index]);
    }
    dp_set64(dp, &area->loaded, area->loaded + 1);
    tier->bounced--;
    if (area->loaded == area->table_blocks)
        set_state(dp, TIER_ONLINE);
}

static bool load(struct datapath *dp)
{
    struct tier *tier = &dp->tier;
    struct tier_area *area = tier->area;
    if (tier->bounced != 0) {
        take_over(dp);
        return true;
    }
    if (area->pending != 0)
        return false;
    uint64_t left = area->table_blocks - area->loaded;
    uint32_t pages = (uint32_t)(left < TIER_BOUNCE_PAGES ? left : TIER_BOUNCE_PAGES);
    if (!submit_pages(dp, TIER_IO_TABLE_READ, area->loaded << 8 | pages, ATOLL_OP_IO_READ, 1 + area->loaded, tier->bounce, pages))
        return false;
    dp_set64(dp, &area->pending, TIER_IO_TABLE_READ);
    return true;
}

/* Writes changed pages of the table, as many as there is leave for. */
static bool write_table(struct datapath *dp, uint64_t now_ns)
{
    struct tier *tier = &dp->tier;
    struct tier_area *area = tier->area;
    uint64_t words = (area->table_blocks + 63) / 64, word = area->table_cursor % words;
    bool did = false;
    if (now_ns >= tier->table_ns) {
        tier->table_ns = now_ns + TIER_TABLE_NS;
        tier->table_left = TIER_TABLE_PAGES;
    }
    for (uint32_t slot = 0; slot < TIER_STAGING_PAGES; slot++) {
        uint64_t looked = 0;
        if (area->staged[slot] != 0 || tier_room(dp) == 0 || (tier->table_left == 0 && !tier->closing))
            continue;
        while (looked < words && tier->dirty[word] == 0) {
            word = word + 1 == words ? 0 : word + 1;
            looked++;
        }
        if (looked == words)
            break;
        uint64_t number = word * 64 + (uint64_t)__builtin_ctzll(tier->dirty[word]), first = number * FORMAT_TIER_ENTRIES;
        struct format_tier_page *page = memory_at(tier->staging + slot * DP_BLOCK);
        ATOLL_CRASH_POINT(dp->domain, "dedup.tier.table");
        memset(page, 0, sizeof *page);
        page->magic = FORMAT_TIER_TABLE_MAGIC;
        page->page = number;
        for (uint32_t index = 0; index < FORMAT_TIER_ENTRIES && first + index < area->places; index++) {
            const struct tier_entry *entry = &tier->entries[first + index];
            if (entry->state == TIER_VALID)
                page->entries[index] = (struct format_tier_entry){entry->pba, entry->print.low, entry->print.high};
        }
        page->checksum = page_checksum(area, page);
        dp_set64(dp, &tier->dirty[word], tier->dirty[word] & (tier->dirty[word] - 1));
        dp_set64(dp, &area->staged[slot], number + 1);
        bool sent = submit_pages(dp, TIER_IO_TABLE_WRITE, slot, ATOLL_OP_IO_WRITE, 1 + number, tier->staging + slot * DP_BLOCK, 1);
        assert(sent);
        tier->table_left -= tier->table_left != 0;
        did = true;
    }
    if (did)
        dp_set64(dp, &area->table_cursor, word);
    return did;
}

/* --- Completions and the step ---------------------------------------------------------------------------------------------- */

void tier_io_done(struct datapath *dp, const struct io_slot *slot, uint32_t status)
{
    struct tier *tier = &dp->tier;
    struct tier_area *area = tier->area;
    uint64_t number = slot->argument & 0x00ffffffffffffffu;
    enum tier_io what = (enum tier_io)(slot->argument >> 56);
    tier_answered(dp, status, what == TIER_IO_SUPER_READ || what == TIER_IO_END_READ);
    if (what == TIER_IO_COPY) {
        tier_copy_done(dp, (uint32_t)number, status);
        return;
    }
    if (what == TIER_IO_TABLE_WRITE) {
        /* After an error it says something old, until it is written for another change. */
        dp_set64(dp, &area->staged[number], 0);
        return;
    }
    if (area->pending == what)
        dp_set64(dp, &area->pending, 0);
    if (area->state == TIER_AWAY)
        return; /* it was silent too long: asked again from the beginning */
    if (what == TIER_IO_END_READ) {
        tier->end = status == ATOLL_OK ? END_GOOD : END_BAD;
        dp->retry = true;
        return;
    }
    if (status != ATOLL_OK) {
        away(dp, what == TIER_IO_SUPER_WRITE ? "its superblock cannot be written" : "its superblock or table cannot be read");
        return;
    }
    if (what == TIER_IO_SUPER_READ && area->state == TIER_NEW && tier->end == END_BAD)
        away(dp, "its last block cannot be read: it may be smaller than it was");
    else if (what == TIER_IO_SUPER_READ && area->state == TIER_NEW)
        super_read(dp);
    else if (what == TIER_IO_SUPER_WRITE && area->state == TIER_FORMATTING)
        set_state(dp, TIER_ONLINE);
    else if (what == TIER_IO_TABLE_READ && area->state == TIER_LOADING && number >> 8 == area->loaded) {
        tier->bounce_first = number >> 8;
        tier->bounced = number & 0xff;
    }
}

/* The last block too: else a device that became smaller would be taken for whole after each error, until the next one. */
static bool ask(struct datapath *dp)
{
    struct tier *tier = &dp->tier;
    struct tier_area *area = tier->area;
    bool first = tier->end == END_UNKNOWN;
    enum tier_io what = first ? TIER_IO_END_READ : TIER_IO_SUPER_READ;
    uint64_t block = first ? tier_block(tier, (uint32_t)area->places - 1) : 0;
    if (area->pending != 0 || !submit_pages(dp, what, 0, ATOLL_OP_IO_READ, block, tier->bounce, first ? 1 : TIER_BOUNCE_PAGES))
        return false;
    tier->bounced = 0;
    dp_set64(dp, &area->pending, what);
    return true;
}

static bool work(struct datapath *dp, uint64_t now_ns)
{
    struct tier_area *area = dp->tier.area;
    switch (area->state) {
    case TIER_NEW:
        return ask(dp);
    case TIER_FORMATTING:
        return area->pending == 0 && (tier_clear_some(dp) || format(dp));
    case TIER_LOADING:
        return load(dp);
    case TIER_ONLINE:
        return write_table(dp, now_ns);
    case TIER_AWAY:
        if (dp->tier.in_flight != 0 || now_ns < dp->tier.retry_ns)
            return false;
        dp_set64(dp, &area->pending, 0);
        set_state(dp, TIER_NEW);
        return true;
    default:
        return false;
    }
}

bool tier_step(struct datapath *dp, uint64_t *wake_ms)
{
    struct tier *tier = &dp->tier;
    struct tier_area *area = tier->area;
    if (area->places == 0 || area->state == TIER_OFF || area->state == TIER_REFUSED || store_state(dp->dedup) != STORE_READY ||
        dp->journal->count >= DP_STEP_JOURNAL)
        return false;
    uint64_t now_ns = atoll_now_ns(), wake = 0;
    if (area->state != TIER_AWAY && tier->in_flight != 0 && now_ns - tier->heard_ns > TIER_PATIENCE_NS)
        away(dp, "its driver does not answer");
    else if (area->state != TIER_AWAY && tier->errors >= TIER_ERRORS_MOST)
        away(dp, "it fails again and again");
    bool did = tier_copies_step(dp);
    did |= work(dp, now_ns);
    if (area->state == TIER_AWAY)
        wake = tier->retry_ns > now_ns ? (tier->retry_ns - now_ns) / 1000000 + 1 : 250;
    else if (tier->in_flight != 0)
        wake = 250;
    for (uint64_t word = 0; area->state == TIER_ONLINE && word < (area->table_blocks + 63) / 64; word++)
        if (tier->dirty[word] != 0) {
            uint64_t table = tier->table_ns > now_ns ? (tier->table_ns - now_ns) / 1000000 + 1 : 1;
            wake = wake == 0 || table < wake ? table : wake;
            break;
        }
    if (wake != 0 && (*wake_ms == 0 || wake < *wake_ms))
        *wake_ms = wake;
    return did;
}

bool tier_quiet(struct datapath *dp)
{
    struct tier *tier = &dp->tier;
    const struct tier_area *area = tier->area;
    tier->closing = true;
    if (area->places == 0 || area->state != TIER_ONLINE)
        return true;
    for (uint32_t number = 0; number < TIER_COPIES; number++)
        if (area->copies[number].state == COPY_WRITING)
            return false;
    for (uint32_t slot = 0; slot < TIER_STAGING_PAGES; slot++)
        if (area->staged[slot] != 0)
            return false;
    for (uint64_t word = 0; word < (area->table_blocks + 63) / 64; word++)
        if (tier->dirty[word] != 0)
            return false;
    return true;
}
