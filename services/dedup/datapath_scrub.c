/*
 * The scrub: reads every stored block from the device, past the cache, and compares it with its fingerprint. Online,
 * paced, and behind all requests: it reads only while few of them wait.
 *
 *   scrub_start / scrub_cancel   by control calls; its state is read from dp_arena.scrub
 *   scrub_step                   a bounded step; in dedup's turn
 *   scrub_io_done                a read of the batch is complete
 *
 * Phases: DATA, in windows of 256 places (one page of fingerprints), batches of up to 64 blocks into pages of their own at the
 * end of the driver's buffers; METADATA, both copies of each page, where a bad one has the page written anew; REFERRERS, if
 * something is damaged: one pass over the map for who refers to it; DONE. A block that is not right, or could not be read, is read
 * once more before it counts as damaged. One that was freed or rewritten meanwhile shows another fingerprint, or none, when its
 * read completes: it is passed over, whoever wrote it knows it.
 *
 * After a crash: position, batch and findings are part of dedup's transactions. A batch that is being read completes to the
 * successor; a repeated start finds the scrub running and joins it. After an adoption the batch is read again.
 */
#include <stdlib.h>
#include <time.h>

#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

#define WINDOW_PLACES 256        /* those of one page of fingerprints */
#define WINDOWS_PER_STEP 32      /* without a stored block */
#define LEAVES_PER_STEP 4
#define WAITING_MAX 4            /* with more requests waiting nothing is read */

static bool running(const struct dp_scrub *scrub)
{
    return scrub->state == SCRUB_DATA || scrub->state == SCRUB_METADATA || scrub->state == SCRUB_REFERRERS;
}

/* State and cursor, not the lists. */
static struct dp_scrub *change(struct datapath *dp)
{
    atoll_save(dp->journal, &dp->arena->scrub, offsetof(struct dp_scrub, batch));
    return &dp->arena->scrub;
}

bool scrub_untold(const struct datapath *dp)
{
    const struct dp_scrub *scrub = &dp->arena->scrub;
    return scrub->ended_s != 0 && scrub->number != dp->scrub_told;
}

void scrub_start(struct datapath *dp, uint64_t rate_bytes_s)
{
    struct store_space space;
    dp->scrub_due_ns = 0;
    if (running(&dp->arena->scrub)) {
        dp_set64(dp, &dp->arena->scrub.rate_bytes_s, rate_bytes_s);
        return;
    }
    store_space(dp->dedup, &space);
    struct dp_scrub *scrub = change(dp);
    uint64_t number = scrub->number + 1, outstanding = scrub->outstanding;
    memset(scrub, 0, offsetof(struct dp_scrub, batch));
    scrub->number = number;
    scrub->outstanding = outstanding; /* of one that was cancelled: its pages are not read into before that is over */
    scrub->state = SCRUB_DATA;
    scrub->rate_bytes_s = rate_bytes_s;
    scrub->started_s = (uint64_t)time(0);
    scrub->stored_blocks = space.stored_blocks;
}

void scrub_cancel(struct datapath *dp)
{
    if (!running(&dp->arena->scrub))
        return;
    struct dp_scrub *scrub = change(dp);
    scrub->state = SCRUB_CANCELLED;
    scrub->batch_count = 0;
    scrub->ended_s = (uint64_t)time(0);
}

void scrub_adopt(struct datapath *dp)
{
    struct dp_scrub *scrub = &dp->arena->scrub;
    dp_set64(dp, &scrub->outstanding, 0);
    for (uint32_t index = 0; index < DP_SCRUB_PAGES; index++)
        if (scrub->batch[index].state == SCRUB_READING)
            dp_set32(dp, &scrub->batch[index].state, SCRUB_UNREAD);
}

/* --- Reading -------------------------------------------------------------------------------------------------------- */

/* The stored blocks of the window that the position is in, from it on. STORE_HAVE: `count` of them, none if there are none. */
static enum store_want look(struct datapath *dp, struct dp_scrub_block *found, uint32_t *count)
{
    uint64_t pbas[WINDOW_PLACES], first = dp->arena->scrub.position, end = (first / WINDOW_PLACES + 1) * WINDOW_PLACES;
    struct store_space space;
    uint32_t places = 0;
    *count = 0;
    store_space(dp->dedup, &space);
    for (uint64_t pba = first; pba < end && pba < space.device_blocks; pba++)
        if (store_pba_valid(dp->dedup, pba))
            pbas[places++] = pba;
    enum store_want want = places == 0 ? STORE_HAVE : store_want_look(dp->dedup, pbas, places);
    for (uint32_t index = 0; want == STORE_HAVE && index < places && *count < DP_SCRUB_PAGES; index++) {
        struct dp_scrub_block block = {.pba = pbas[index]};
        if (store_references(dp->dedup, block.pba) != 0 && store_fingerprint(dp->dedup, block.pba, &block.print))
            found[(*count)++] = block;
    }
    return want;
}

static void note_damage(struct datapath *dp, const struct dp_scrub_block *block)
{
    struct dp_scrub *scrub = &dp->arena->scrub;
    uint64_t number = scrub->damaged_count;
    dp_set64(dp, &scrub->damaged_count, number + 1);
    atoll_count(dp->domain, DEDUP_COUNTER_CORRUPT_READS, 1);
    dp_note_damage(dp, block->pba, block->status, ATOLL_VOLUME_COUNT, 0);
    if (number >= DP_SCRUB_DAMAGED)
        return;
    atoll_save(dp->journal, &scrub->damaged[number], sizeof scrub->damaged[number]);
    scrub->damaged[number] = (struct dp_scrub_damage){.pba = block->pba, .status = block->status};
}

/* Reads blocks [first, end) of the batch that lie in sequence. False: no I/O slot is free. */
static bool submit(struct datapath *dp, uint32_t first, uint32_t end)
{
    const struct dp_scrub *scrub = &dp->arena->scrub;
    struct atoll_segment segment = {.address = dp->scrub_buffer + (uint64_t)first * DP_BLOCK,
                                    .length = (end - first) * DP_BLOCK,
                                    .kind = ATOLL_SEGMENT_DATA};
    if (io_submit(dp->dedup, IO_SCRUB, scrub->number << 8 | first, ATOLL_ROLE_DISK, ATOLL_OP_IO_READ,
                  scrub->batch[first].pba * DP_BLOCK, &segment, 1) < 0)
        return false;
    dp_set64(dp, &dp->arena->scrub.outstanding, scrub->outstanding + 1);
    return true;
}

/* Sends what of the batch is unread. */
static void read_batch(struct datapath *dp)
{
    struct dp_scrub *scrub = &dp->arena->scrub;
    for (uint32_t first = 0, end; first < scrub->batch_count; first = end) {
        end = first + 1;
        if (scrub->batch[first].state != SCRUB_UNREAD)
            continue;
        while (end < scrub->batch_count && scrub->batch[end].state == SCRUB_UNREAD &&
               scrub->batch[end].pba == scrub->batch[end - 1].pba + 1)
            end++;
        if (!submit(dp, first, end))
            return; /* the rest when these are back */
        for (uint32_t index = first; index < end; index++)
            dp_set32(dp, &scrub->batch[index].state, SCRUB_READING);
    }
}

void scrub_io_done(struct datapath *dp, const struct io_slot *slot, uint32_t status)
{
    struct dp_scrub *scrub = &dp->arena->scrub;
    uint32_t first = (uint32_t)slot->argument & 0xff, count = slot->length_bytes / DP_BLOCK;
    ATOLL_CRASH_POINT(dp->domain, "dedup.scrub.done");
    if (scrub->outstanding != 0)
        dp_set64(dp, &scrub->outstanding, scrub->outstanding - 1);
    if (slot->argument >> 8 != scrub->number || (scrub->state != SCRUB_DATA && scrub->state != SCRUB_METADATA))
        return; /* of one that was cancelled */
    for (uint32_t index = first; index < first + count && index < scrub->batch_count; index++) {
        struct dp_scrub_block *block = &scrub->batch[index];
        const void *page = (const void *)(uintptr_t)(dp->scrub_buffer + (uint64_t)index * DP_BLOCK);
        bool right = status == ATOLL_OK && (scrub->state == SCRUB_DATA
                                                ? print_equal(dp_fingerprint(page), block->print)
                                                : store_page_right(dp->dedup, block->print.high, block->print.low, page));
        atoll_save(dp->journal, block, sizeof *block);
        block->status = status == ATOLL_OK ? ATOLL_ECORRUPT : status;
        block->state = right ? SCRUB_RIGHT : block->attempts == 0 ? SCRUB_UNREAD : SCRUB_WRONG;
        block->attempts++;
    }
}

static bool decided(const struct dp_scrub *scrub)
{
    for (uint32_t index = 0; index < scrub->batch_count; index++)
        if (scrub->batch[index].state == SCRUB_UNREAD || scrub->batch[index].state == SCRUB_READING)
            return false;
    return true;
}

/* The batch is gone; the next one not before its time. */
static void pass(struct datapath *dp, struct dp_scrub *scrub)
{
    if (scrub->rate_bytes_s != 0) {
        uint64_t now = atoll_now_ns();
        dp->scrub_due_ns = (dp->scrub_due_ns > now ? dp->scrub_due_ns : now) +
                           scrub->batch_count * DP_BLOCK * 1000000000u / scrub->rate_bytes_s;
    }
    scrub->batch_count = 0;
    ATOLL_CRASH_POINT(dp->domain, "dedup.scrub.counted");
}

/* The blocks are counted, if what is needed to judge the wrong ones is in memory. */
static bool finish_blocks(struct datapath *dp)
{
    struct dp_scrub *scrub = change(dp);
    uint64_t pbas[DP_SCRUB_PAGES];
    uint32_t wrong = 0;
    for (uint32_t index = 0; index < scrub->batch_count; index++)
        if (scrub->batch[index].state == SCRUB_WRONG)
            pbas[wrong++] = scrub->batch[index].pba;
    enum store_want want = wrong == 0 ? STORE_HAVE : store_want_look(dp->dedup, pbas, wrong);
    if (want == STORE_WAIT)
        return false;
    for (uint32_t index = 0; index < scrub->batch_count; index++) {
        const struct dp_scrub_block *block = &scrub->batch[index];
        struct fingerprint now;
        if (block->state == SCRUB_RIGHT)
            scrub->verified_blocks++;
        else if (want == STORE_LOST || (store_references(dp->dedup, block->pba) != 0 &&
                                        store_fingerprint(dp->dedup, block->pba, &now) && print_equal(now, block->print)))
            note_damage(dp, block);
        else
            scrub->changed_blocks++;
    }
    scrub->position = scrub->batch[scrub->batch_count - 1].pba + 1;
    pass(dp, scrub);
    return true;
}

/* Entries 2i and 2i + 1 are the copies of one page. */
static bool finish_pages(struct datapath *dp)
{
    struct dp_scrub *scrub = change(dp);
    for (uint32_t index = 0; index + 1 < scrub->batch_count; index += 2) {
        struct dp_scrub_block *copies = &scrub->batch[index];
        if (copies[0].state == SCRUB_RIGHT && copies[1].state == SCRUB_RIGHT)
            continue;
        enum store_repair repaired = store_page_repair(dp->dedup, copies[0].print.high, copies[0].print.low);
        if (repaired == STORE_REPAIR_WAIT)
            return false;
        scrub->repaired_pages += repaired == STORE_REPAIR_DONE;
        scrub->lost_pages += repaired == STORE_REPAIR_LOST;
        for (uint32_t copy = 0; copy < 2 && repaired != STORE_REPAIR_CHANGED; copy++)
            if (copies[copy].state == SCRUB_WRONG)
                dp_note_damage(dp, copies[copy].pba, copies[copy].status, ATOLL_VOLUME_COUNT, 0);
        /* Not again, if a later one has to wait. */
        atoll_save(dp->journal, copies, 2 * sizeof *copies);
        copies[0].state = copies[1].state = SCRUB_RIGHT;
    }
    scrub->verified_pages += scrub->batch_count / 2;
    pass(dp, scrub);
    return true;
}

static void begin_batch(struct datapath *dp, const struct dp_scrub_block *blocks, uint32_t count)
{
    struct dp_scrub *scrub = &dp->arena->scrub;
    if (count == 0)
        return;
    atoll_save(dp->journal, scrub->batch, count * sizeof scrub->batch[0]);
    memcpy(scrub->batch, blocks, count * sizeof scrub->batch[0]);
    dp_set64(dp, &scrub->batch_count, count);
    read_batch(dp);
}

static void end(struct datapath *dp)
{
    struct dp_scrub *scrub = change(dp);
    scrub->state = SCRUB_DONE;
    scrub->position = 0;
    scrub->ended_s = (uint64_t)time(0);
}

/* Requests come first: nothing is begun while more than a few wait, or most I/O slots are taken. */
static bool others_wait(const struct datapath *dp)
{
    return dp->retry_count > WAITING_MAX || io_room(dp->dedup, IO_SCRUB) < IO_FILL_SHARE / 2;
}

static bool begin_blocks(struct datapath *dp)
{
    struct dp_scrub *scrub = &dp->arena->scrub;
    struct dp_scrub_block found[DP_SCRUB_PAGES];
    struct store_space space;
    uint32_t count = 0;
    store_space(dp->dedup, &space);
    for (uint32_t windows = 0; windows < WINDOWS_PER_STEP && count == 0; windows++) {
        uint64_t from = store_stored_from(dp->dedup, scrub->position);
        if (from != scrub->position)
            dp_set64(dp, &scrub->position, from);
        if (scrub->position >= space.device_blocks) {
            change(dp)->state = SCRUB_METADATA;
            scrub->position = STORE_PAGES_BEGIN;
            return true;
        }
        enum store_want want = look(dp, found, &count);
        if (want == STORE_WAIT)
            return false;
        if (count == 0) /* or its counts or fingerprints are lost: METADATA finds the page */
            dp_set64(dp, &scrub->position, (scrub->position / WINDOW_PLACES + 1) * WINDOW_PLACES);
    }
    begin_batch(dp, found, count);
    return true;
}

static bool begin_pages(struct datapath *dp)
{
    struct dp_scrub *scrub = &dp->arena->scrub;
    struct store_page_copies pages[DP_SCRUB_PAGES / 2];
    struct dp_scrub_block found[DP_SCRUB_PAGES];
    uint64_t cursor = scrub->position;
    uint32_t count;
    if (store_pages(dp->dedup, &cursor, pages, DP_SCRUB_PAGES / 2, &count) == STORE_WAIT)
        return false;
    if (count == 0) {
        change(dp)->state = SCRUB_REFERRERS;
        scrub->position = 0;
        return true;
    }
    for (uint32_t index = 0; index < 2 * count; index++)
        found[index] = (struct dp_scrub_block){.pba = pages[index / 2].pba[index % 2],
                                               .print = {.low = pages[index / 2].checksum, .high = pages[index / 2].page}};
    dp_set64(dp, &scrub->position, cursor);
    begin_batch(dp, found, 2 * count);
    return true;
}

/* DATA and METADATA: one batch after another. */
static bool read_step(struct datapath *dp)
{
    struct dp_scrub *scrub = &dp->arena->scrub;
    bool data = scrub->state == SCRUB_DATA;
    if (scrub->outstanding != 0)
        return false;
    if (scrub->batch_count != 0) {
        if (decided(scrub))
            return data ? finish_blocks(dp) : finish_pages(dp);
        read_batch(dp);
        return scrub->outstanding != 0;
    }
    return data ? begin_blocks(dp) : begin_pages(dp);
}

/* --- Who refers to what is damaged ------------------------------------------------------------------------------------ */

static void look_at_leaf(struct datapath *dp, uint32_t volume, uint64_t leaf)
{
    struct dp_scrub *scrub = &dp->arena->scrub;
    const uint64_t *entries = store_map_leaf(dp->dedup, volume, leaf);
    uint64_t kept = scrub->damaged_count < DP_SCRUB_DAMAGED ? scrub->damaged_count : DP_SCRUB_DAMAGED;
    for (uint32_t index = 0; entries != 0 && index < 512; index++) {
        uint64_t value = entries[index];
        if (MAP_KIND(value) != MAP_PBA)
            continue;
        /* They were found in ascending order. */
        uint64_t low = 0, high = kept;
        while (low < high) {
            uint64_t middle = (low + high) / 2;
            if (scrub->damaged[middle].pba < MAP_NUMBER(value))
                low = middle + 1;
            else
                high = middle;
        }
        if (low == kept || scrub->damaged[low].pba != MAP_NUMBER(value))
            continue;
        struct dp_scrub_damage *damage = &scrub->damaged[low];
        atoll_save(dp->journal, damage, sizeof *damage);
        if (damage->referrer_count < DP_SCRUB_REFERRERS)
            damage->referrers[damage->referrer_count] = (uint64_t)volume << 52 | (leaf * 512 + index);
        damage->referrer_count++;
    }
}

/* `position`: volume << 52 | leaf. */
static bool referrers_step(struct datapath *dp)
{
    struct dp_scrub *scrub = &dp->arena->scrub;
    if (scrub->damaged_count == 0) {
        end(dp);
        return true;
    }
    for (uint32_t leaves = 0; leaves < LEAVES_PER_STEP && dp->journal->count < DP_STEP_JOURNAL; leaves++) {
        uint32_t volume = (uint32_t)(scrub->position >> 52);
        uint64_t leaf = scrub->position & (((uint64_t)1 << 52) - 1), next = 0, last;
        if (volume >= ATOLL_VOLUME_COUNT) {
            end(dp);
            return true;
        }
        const struct atoll_volume *entry = &dp->dedup->public->volumes[volume];
        last = entry->state == ATOLL_VOLUME_FREE ? 0 : (entry->size_bytes + 512 * DP_BLOCK - 1) / (512 * DP_BLOCK);
        enum store_want want = leaf < last ? store_next_leaf(dp->dedup, volume, leaf, last, &next) : STORE_HAVE;
        if (want == STORE_WAIT)
            return false;
        if (leaf >= last || next >= last) {
            dp_set64(dp, &scrub->position, (uint64_t)(volume + 1) << 52);
            continue;
        }
        if (want == STORE_HAVE) {
            want = store_want_map(dp->dedup, volume, next * 512, 512, STORE_LOOK);
            if (want == STORE_WAIT)
                return false;
            if (want == STORE_HAVE)
                look_at_leaf(dp, volume, next);
            next++;
        } /* else a directory, and nobody knows what it leads to */
        dp_set64(dp, &scrub->position, (uint64_t)volume << 52 | next);
    }
    return true;
}

bool scrub_step(struct datapath *dp, uint64_t *wake_ms)
{
    const struct dp_scrub *scrub = &dp->arena->scrub;
    if (!running(scrub) || store_state(dp->dedup) != STORE_READY || dp->journal->count >= DP_STEP_JOURNAL)
        return false;
    uint64_t now = atoll_now_ns();
    if (scrub->batch_count == 0 && (dp->scrub_due_ns > now || others_wait(dp))) {
        uint64_t wait = dp->scrub_due_ns > now ? (dp->scrub_due_ns - now + 999999) / 1000000 : 5;
        *wake_ms = *wake_ms == 0 || wait < *wake_ms ? wait : *wake_ms;
        return false;
    }
    switch (dp->arena->scrub.state) {
    case SCRUB_DATA:
    case SCRUB_METADATA: return read_step(dp);
    case SCRUB_REFERRERS: return referrers_step(dp);
    default: return false;
    }
}
