/*
 * Posted writes, as dedup sees them: WRITEs of whole blocks whose clients have been answered when they arrive (drivers/nic/posted.c).
 *
 * Most are applied at once, like any other. One that must wait (for a page of the map, for a flush that covers the block) is in
 * `posted` as long, and no later request overtakes it: those that touch its blocks, and flushes, are executed again after it. One that
 * cannot be applied because the map's page cannot be had is kept in a slot of dedup's own and tried again; meanwhile those that touch its
 * blocks get its status, and its volume's flushes fail, as while a page of the log is unplaced (I7). One that has crashed dedup twice is entered in the log unseen, as a block
 * that can be read and is never destaged.
 *
 * Space: `posted_blocks` in the public part says how many blocks may be on their way; ordinary requests leave as many free. Where space
 * grows short it becomes 0, and when nic has seen that and nothing is on its way any more (SP-POST), the rest is anybody's. It becomes 0 before
 * the answers that made space short can be seen: nic, told of them, would post as many once more. (models/posted.pml) It also becomes 0 where
 * the map may not grow much more, and as long as one cannot be applied; so what cannot be is no more than what was on its way, and the
 * blocks for it stay kept. And where the log is nearly full, because clients are faster than destage: who is answered by dedup waits for its turn.
 * Long before that `crowded` says that destage is behind: then nic posts no faster than writes are applied.
 *
 * After a crash: the list is made again from the slots. After the death of all: what nic has noted as posted and no slot has
 * applied gets a slot of dedup's own, too, before anything else is served.
 */
#include <stdlib.h>

#include "services/dedup/datapath.h"

/* Posting begins with so many times what may be on its way, and ends with half as many. */
#define ROOM_TO_BEGIN 4
/* Eighths of nic's pages in the log. If nic went on it would post until it had no page, and then all clients would wait for a batch to be
 * written. */
#define LOGGED_TO_END 6
#define LOGGED_TO_BEGIN 5
/* Pages by which the map may grow meanwhile: a leaf and a directory for each block, more only if blocks lie far apart. In a small store
 * this part of what it may have at all. */
#define MAP_TO_END (2 * ATOLL_POSTED_BLOCKS)
#define MAP_PART 8

bool posted_request(const struct atoll_descriptor *request)
{
    return request->opcode == ATOLL_OP_WRITE && (request->flags & ATOLL_FLAG_POSTED);
}

void posted_message(struct datapath *dp, const struct atoll_descriptor *message)
{
    uint32_t length = message->length;
    uint64_t at = message->address - dp->nic_buffer, end = dp->arena->nic_pages * DP_BLOCK; /* it may be kept before it is executed */
    if (!posted_request(message) || message->segment_count != 0 || message->part != 0 || length == 0 || message->words[1] != length ||
        length > ATOLL_POSTED_WRITE_BLOCKS * DP_BLOCK || (message->words[0] | length | at) % DP_BLOCK != 0 || at >= end ||
        length > end - at) {
        atoll_count(dp->domain, DEDUP_COUNTER_BAD_REQUESTS, 1);
        return;
    }
    dp->posted_ms = dp->now_ms;
    dp->flush_posted += length / DP_BLOCK;
    datapath_message(dp, ATOLL_ROLE_NIC, message);
}

/* --- Order ------------------------------------------------------------------------------------------------------------ */

void posted_wait(struct datapath *dp, uint32_t number)
{
    for (uint32_t index = 0; index < dp->posted_count; index++)
        if (dp->posted[index] == number)
            return;
    assert(dp->posted_count < DP_SLOTS);
    dp->posted[dp->posted_count++] = (uint16_t)number;
}

void posted_over(struct datapath *dp, uint32_t number)
{
    for (uint32_t index = 0; index < dp->posted_count; index++)
        if (dp->posted[index] == number) {
            dp->posted[index] = dp->posted[--dp->posted_count];
            dp->retry = true; /* who waited for it */
            return;
        }
}

static bool touches(const struct atoll_descriptor *request, const struct atoll_descriptor *posted)
{
    uint64_t begin = posted->words[0], end = begin + posted->words[1];
    return request->halves[4] == posted->halves[4] &&
           (request->opcode == ATOLL_OP_FLUSH || (request->words[0] < end && begin < request->words[0] + request->words[1]));
}

bool posted_before(const struct datapath *dp, const struct dp_slot *slot, const struct atoll_descriptor *request, uint32_t *status)
{
    bool waits = false;
    *status = ATOLL_OK;
    for (uint32_t index = 0; index < dp->posted_count; index++) {
        const struct dp_slot *other = &dp->arena->slots[dp->posted[index]];
        if (other == slot || other->acceptance > slot->acceptance || !touches(request, &other->request))
            continue;
        waits = true;
        if (other->status != ATOLL_OK)
            *status = request->opcode == ATOLL_OP_FLUSH ? ATOLL_EUNFLUSHED : other->status;
    }
    return waits;
}

bool posted_waits_for(const struct datapath *dp, uint32_t volume, uint64_t lba)
{
    for (uint32_t index = 0; index < dp->posted_count; index++) {
        const struct atoll_descriptor *request = &dp->arena->slots[dp->posted[index]].request;
        uint64_t first = request->words[0] / DP_BLOCK;
        if (request->halves[4] == volume && lba >= first && lba - first < request->length / DP_BLOCK)
            return true;
    }
    return false;
}

struct posted_failing posted_failing(const struct datapath *dp)
{
    struct posted_failing failing = {0};
    for (uint32_t index = 0; index < dp->posted_count; index++) {
        const struct dp_slot *slot = &dp->arena->slots[dp->posted[index]];
        failing.count += slot->status != ATOLL_OK;
        failing.blocks += slot->status != ATOLL_OK ? slot->request.length / DP_BLOCK : 0;
    }
    return failing;
}

bool posted_on_their_way(const struct datapath *dp, uint64_t last)
{
    for (uint32_t number = 0; number < ATOLL_SLOT_COUNT; number++) {
        const struct atoll_posted *posted = &dp->nic_public->posted[number];
        uint64_t order = atoll_load_acquire(&posted->order), identity = atoll_load_acquire(&posted->identity);
        if (order == 0 || order > last || order <= dp->dedup->public->posted_adopted || atoll_load_relaxed(&posted->order) != order)
            continue;
        if (dp->arena->slots[number].identity != identity) /* nic does not use the slot again before END */
            return true;
    }
    return false;
}

/* --- Space ------------------------------------------------------------------------------------------------------------ */

static void allow(struct datapath *dp, uint64_t blocks)
{
    if (dp->dedup->public->posted_blocks != blocks)
        atoll_store_release(&dp->dedup->public->posted_blocks, blocks);
}

void posted_attach(struct datapath *dp)
{
    dp->posted_keeps = true;
    store_keep_posted(dp->dedup, ATOLL_POSTED_BLOCKS);
}

bool posted_shut(struct datapath *dp)
{
    struct posted_failing failing = posted_failing(dp);
    if (dp->posted_keeps) {
        allow(dp, 0);
        atoll_full_fence(); /* SP-POST */
        if (failing.count != dp->posted_count || atoll_load_acquire(&dp->nic_public->posting) != 0)
            return false;
        dp->posted_keeps = false;
    }
    store_keep_posted(dp->dedup, failing.blocks);
    return true;
}

/* Less than `times` what posting ends with. */
static bool lacks_room(const struct datapath *dp, uint32_t times)
{
    uint64_t most, room = store_map_room(dp->dedup, &most), pages = most / MAP_PART < MAP_TO_END ? most / MAP_PART : MAP_TO_END;
    return store_unpromised(dp->dedup) < times * (ROOM_TO_BEGIN / 2) * ATOLL_POSTED_BLOCKS || room < times * pages;
}

/* More than so many eighths of the pages that payloads arrive in are in the log. */
static bool is_logged(const struct datapath *dp, uint64_t eighths)
{
    return dp->arena->log_records * 8 > dp->arena->nic_pages * eighths;
}

void posted_end(struct datapath *dp)
{
    /* Where many wait for a page of the map it is not for want of the processor's time: nobody else is to wait with them. */
    uint64_t crowded = destage_crowded(dp) && dp->posted_count < ATOLL_DOZE_MESSAGES;
    if (dp->dedup->public->crowded != crowded)
        atoll_store_relaxed(&dp->dedup->public->crowded, crowded);
    if (dp->posted_most == 0 || dp->posted_ends || posted_failing(dp).count != 0 || lacks_room(dp, 1) || is_logged(dp, LOGGED_TO_END))
        allow(dp, 0);
}

void posted_begin(struct datapath *dp)
{
    if (dp->posted_most != 0 && !dp->posted_ends && dp->dedup->public->posted_blocks == 0 && dp->lookup.uses[0] != 0 &&
        dp->posted_count == 0 && !lacks_room(dp, 2) && !is_logged(dp, LOGGED_TO_BEGIN)) { /* those that wait have what was kept */
        posted_attach(dp); /* first they are kept */
        allow(dp, dp->posted_most);
    }
}

/* --- Slots of dedup's own ------------------------------------------------------------------------------------------------ */

/* From `number` on; DP_SLOTS: none is free. */
static uint32_t free_slot(const struct datapath *dp, uint32_t number)
{
    while (number < DP_SLOTS && dp->arena->slots[number].state != SLOT_FREE)
        number++;
    return number;
}

/* A posted write, out of nic's reach. Its pages are dedup's from now on. */
static void own(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request, uint64_t acceptance, uint32_t status)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    uint32_t page = (uint32_t)((request->address - dp->nic_buffer) / DP_BLOCK);
    slot_save(dp, slot);
    atoll_save(dp->journal, &slot->request, sizeof slot->request);
    slot->request = *request;
    slot->identity = request->identity;
    slot->part = request->part;
    slot->state = SLOT_ACCEPTED;
    slot->phase = PHASE_START;
    slot->status = status;
    slot->posted = 1;
    slot->acceptance = acceptance;
    slot->target = slot->ticket = slot->progress = 0;
    slot->result_bytes = slot->extent_count = 0;
    for (uint32_t end = page + request->length / DP_BLOCK; page < end; page++)
        log_hold(dp, page, true);
}

uint32_t posted_keep(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request)
{
    const struct dp_slot *slot = &dp->arena->slots[number];
    uint32_t kept = free_slot(dp, ATOLL_SLOT_COUNT);
    if (number >= ATOLL_SLOT_COUNT || kept == DP_SLOTS)
        return DP_NO_SLOT;
    own(dp, kept, request, slot->acceptance, slot->status);
    /* nic, told that it is over, looks its blocks up again: it must not find what was there before. */
    uint64_t first = request->words[0] / DP_BLOCK, end = first + request->length / DP_BLOCK;
    uint32_t status;
    if (dp_volume(dp, request, &status) != 0)
        for (uint64_t lba = first; lba < end; lba++)
            lookup_forget(dp, request->halves[4], lba);
    return kept;
}

/* --- After the death of all --------------------------------------------------------------------------------------------- */

static int by_order(const void *a, const void *b)
{
    const struct atoll_posted *x = a, *y = b;
    return x->order < y->order ? -1 : x->order > y->order;
}

/* As nic posts them; anything else is its memory gone wrong. */
static bool is_sound(const struct datapath *dp, const struct atoll_posted *posted, uint32_t number)
{
    uint64_t at = posted->address - dp->nic_buffer;
    return atoll_identity_slot(posted->identity) == number && posted->address >= dp->nic_buffer && posted->length != 0 &&
           posted->length <= ATOLL_POSTED_WRITE_BLOCKS * DP_BLOCK && (at | posted->offset | posted->length) % DP_BLOCK == 0 &&
           at + posted->length <= dp->arena->nic_pages * DP_BLOCK;
}

bool posted_holds(const struct datapath *dp, uint32_t page)
{
    for (uint32_t number = ATOLL_SLOT_COUNT; number < DP_SLOTS; number++) {
        const struct dp_slot *slot = &dp->arena->slots[number];
        uint64_t at = record_address(dp, page) - slot->request.address;
        if (slot->state == SLOT_ACCEPTED && at < slot->request.length)
            return true;
    }
    return false;
}

/* It has an answer: what of its pages is neither in the log nor kept, because it cannot be applied yet, goes back to nic, which has kept them
 * for us. */
static void give_pages(struct datapath *dp, const struct atoll_posted *posted)
{
    uint32_t page = (uint32_t)((posted->address - dp->nic_buffer) / DP_BLOCK);
    for (uint32_t end = page + posted->length / DP_BLOCK; page < end; page++)
        if (dp->records[page].state == RECORD_FREE && !posted_holds(dp, page))
            give_back(dp, page);
}

/* One that nic has noted and that is not applied. */
static void take_over(struct datapath *dp, const struct atoll_posted *posted, uint32_t number)
{
    struct atoll_descriptor request = {.opcode = ATOLL_OP_WRITE,
                                       .flags = ATOLL_FLAG_POSTED,
                                       .identity = posted->identity,
                                       .address = posted->address,
                                       .length = posted->length};
    request.words[0] = posted->offset;
    request.words[1] = posted->length;
    request.halves[4] = posted->volume;
    request.halves[5] = posted->generation;
    own(dp, number, &request, dp->arena->next_acceptance, ATOLL_OK);
    dp_set64(dp, &dp->arena->next_acceptance, dp->arena->next_acceptance + 1);
    atoll_count(dp->domain, DEDUP_COUNTER_POSTED_ADOPTED, 1);
}

void posted_adopt(struct datapath *dp)
{
    const struct atoll_nic_public *nic = dp->nic_public;
    uint64_t adopted = dp->dedup->public->posted_adopted, last = adopted;
    struct atoll_posted *found = malloc(ATOLL_SLOT_COUNT * sizeof *found);
    uint32_t count = 0, number = ATOLL_SLOT_COUNT;
    if (found == 0)
        abort(); /* 128 KiB at the start of a process */
    for (uint32_t index = 0; index < ATOLL_SLOT_COUNT; index++) {
        found[count] = nic->posted[index];
        if (found[count].order > adopted && is_sound(dp, &found[count], index))
            count++;
    }
    qsort(found, count, sizeof *found, by_order);
    for (uint32_t index = 0; index < count; index++) {
        const struct atoll_posted *posted = &found[index];
        const struct dp_slot *slot = &dp->arena->slots[atoll_identity_slot(posted->identity)];
        last = posted->order;
        if (slot->identity == posted->identity && slot->state == SLOT_DONE) {
            give_pages(dp, posted);
            continue;
        }
        number = free_slot(dp, number);
        if (number == DP_SLOTS) /* nic never posts so many */
            atoll_count(dp->domain, DEDUP_COUNTER_BAD_REQUESTS, 1);
        else
            take_over(dp, posted, number++);
    }
    give_flush(dp);
    dp_set64(dp, &dp->dedup->public->posted_adopted, last);
    allow(dp, 0);
    free(found);
    atoll_domain_commit(dp->domain);
    log_committed(dp);
}
