/*
 * WRITE, TRIM, ZERO and FLUSH: requests that change blocks or wait for the device.
 *
 * A WRITE part is applied in one transaction: whole blocks by reference to nic's pages, ragged ends composed in merge pages
 * of dedup out of the old content and the payload (the only copy between arenas, counted). What it needs is
 * had before anything is changed: old content of ragged ends, merge pages, space. Else it waits and is executed again.
 *
 * Who flushes does not wait for too much: while that is logged a write waits (datapath_flush.c).
 *
 * Space: each block needs a reservation unless it overwrites a logged one. If none can be had while the log holds some
 * (which a match or an overwrite may give back), the request waits until what was logged before it has been destaged; only
 * then it is ENOSPC. So it is if it waits for pages that logged blocks hold which find no place.
 *
 * TRIM and ZERO go in slices of DP_RANGE_BLOCKS; `progress` says how far. Ragged ends of a TRIM are left alone, those
 * of a ZERO are merged with zeros like a write's.
 *
 * After a crash: a slice that was committed is not done again.
 */
#include "services/dedup/datapath.h"

#include "ipc/crashpoint.h"

/* --- Payload ---------------------------------------------------------------------------------------------------------- */

/* The nic pages under a WRITE's payload, one per block; false if it is not as the contract says (nothing may be
 * trusted of it then) or a page is in the log already. */
static bool payload_pages(struct datapath *dp, const struct atoll_descriptor *request, uint32_t *pages, uint32_t *page_count)
{
    struct atoll_segment segments[ATOLL_PART_BLOCKS];
    struct { uint64_t first, last; } runs[ATOLL_PART_BLOCKS]; /* pages of each segment */
    uint32_t count = request->segment_count, pages_found = 0;
    uint64_t offset = request->words[0], total = 0;
    if (count > ATOLL_PART_BLOCKS || request->length != request->words[1] || request->length == 0 ||
        request->length > ATOLL_PART_BYTES)
        return false;
    if (count == 0) {
        segments[0] = (struct atoll_segment){.address = request->address, .length = request->length};
        count = 1;
    } else {
        if (request->address % 8 != 0 ||
            !atoll_reference_in(dp->domain, ATOLL_ROLE_NIC, request->address, count * sizeof segments[0]))
            return false;
        memcpy(segments, (const void *)(uintptr_t)request->address, count * sizeof segments[0]);
    }
    for (uint32_t index = 0; index < count; index++) {
        uint64_t at = segments[index].address - dp->nic_buffer, length = segments[index].length;
        if (segments[index].address < dp->nic_buffer || length == 0 || length > request->length - total ||
            at + length > dp->arena->nic_pages * DP_BLOCK || at % DP_BLOCK != offset % DP_BLOCK ||
            (index != 0 && offset % DP_BLOCK != 0))
            return false;
        uint64_t first = at / DP_BLOCK, last = (at + length - 1) / DP_BLOCK;
        for (uint32_t earlier = 0; earlier < index; earlier++)
            if (first <= runs[earlier].last && runs[earlier].first <= last)
                return false;
        runs[index].first = first;
        runs[index].last = last;
        for (uint64_t page = first; page <= last; page++) {
            if (pages_found == ATOLL_PART_BLOCKS || dp->records[page].state != RECORD_FREE || dp->records[page].pins != 0)
                return false;
            pages[pages_found++] = (uint32_t)page;
        }
        total += length;
        offset += length;
    }
    *page_count = pages_found;
    return total == request->length;
}

void write_refuse_payload(struct datapath *dp, const struct atoll_descriptor *request)
{
    uint32_t pages[ATOLL_PART_BLOCKS], count;
    if (!payload_pages(dp, request, pages, &count)) {
        atoll_count(dp->domain, DEDUP_COUNTER_BAD_REQUESTS, 1);
        return;
    }
    for (uint32_t index = 0; index < count; index++)
        give_back(dp, pages[index]);
}

/* --- Ragged blocks ------------------------------------------------------------------------------------------------------ */

/* A block of which only [start, start + bytes) is written. */
struct ragged {
    uint64_t lba, value;
    uint32_t start, bytes;
    const void *payload;  /* of `bytes`; NULL: zeros */
    const void *old;      /* whole block; NULL: zeros */
    uint32_t page;        /* cache page pinned for `old`, or DP_NONE */
};

enum prepared { PREPARED = 0, PREPARED_WAIT = 1, PREPARED_FAILED = 2 };

static void unpin_ragged(struct datapath *dp, struct ragged *list, uint32_t count)
{
    for (uint32_t index = 0; index < count; index++)
        if (list[index].page != DP_NONE)
            cache_unpin(dp, list[index].page);
}

/* Finds the old content of ragged blocks. WAIT: it is being read (the slot keeps the pages pinned meanwhile) or pages are short.
 * FAILED: slot's status says why. */
static enum prepared prepare_ragged(struct datapath *dp, struct dp_slot *slot, struct ragged *list, uint32_t count)
{
    struct atoll_segment kept[2];
    uint32_t kept_count = 0;
    bool waits = false;
    assert(count <= 2);
    for (uint32_t index = 0; index < count; index++)
        list[index].page = DP_NONE;

    for (uint32_t index = 0; index < slot->segment_count; index++) { /* what it has been waiting for */
        uint32_t page = cache_page_of(dp, slot->segments[index].address);
        if (page != DP_NONE && dp->pages[page].state == PAGE_FAILED) {
            slot->status = dp->pages[page].status;
            slot->failed_address = dp->pages[page].pba;
            return PREPARED_FAILED;
        }
    }
    for (uint32_t index = 0; index < count; index++) {
        struct ragged *ragged = &list[index];
        uint64_t pba = MAP_NUMBER(ragged->value), failed = 0;
        ragged->old = 0;
        if (MAP_KIND(ragged->value) == MAP_LOG) {
            uint32_t record = log_record_of(dp, ragged->value);
            if (dp->records[record].flags & RECORD_CORRUPT) {
                slot->status = ATOLL_ECORRUPT;
                slot->failed_address = ragged->lba;
                unpin_ragged(dp, list, count);
                return PREPARED_FAILED;
            }
            ragged->old = record_page(dp, record);
            continue;
        }
        if (MAP_KIND(ragged->value) != MAP_PBA)
            continue;
        enum store_want want = cache_find(dp, pba) != DP_NONE ? STORE_HAVE : store_want_prints(dp->dedup, &pba, 1);
        if (want != STORE_HAVE) {
            ragged->page = DP_NONE;
            if (dp_want_outcome(dp, slot, want) == OUTCOME_DONE) {
                unpin_ragged(dp, list, count);
                return PREPARED_FAILED;
            }
            waits = true;
            break;
        }
        bool have = !(dp->blocked & RESOURCE_CACHE) && cache_load(dp, IO_FILL, &pba, 1, &ragged->page, &failed);
        if (!have) {
            ragged->page = DP_NONE;
            if (failed != 0) {
                slot->status = ATOLL_ECORRUPT;
                slot->failed_address = failed;
                unpin_ragged(dp, list, count);
                return PREPARED_FAILED;
            }
            dp->blocked |= RESOURCE_CACHE;
            dp_sweep(dp);
            waits = true;
            break;
        }
        ragged->old = page_memory(dp, ragged->page);
        waits = waits || dp->pages[ragged->page].state != PAGE_VALID;
    }
    slot_unpin(dp, slot);
    if (!waits)
        return PREPARED;
    for (uint32_t index = 0; index < count; index++)
        if (list[index].page != DP_NONE)
            kept[kept_count++] = (struct atoll_segment){.address = page_address(dp, list[index].page), .length = DP_BLOCK};
    slot_set_segments(dp, slot, kept, kept_count);
    return PREPARED_WAIT;
}

/* Composes the block in a merge page that the caller has made sure of, and returns its record number. */
static uint32_t merge(struct datapath *dp, const struct ragged *ragged)
{
    uint32_t record = merge_take(dp);
    assert(record != DP_NONE);
    uint8_t *block = (uint8_t *)(uintptr_t)record_address(dp, record); /* free in the last commit too: written directly */
    if (ragged->old != 0)
        memcpy(block, ragged->old, DP_BLOCK);
    else
        memset(block, 0, DP_BLOCK);
    if (ragged->payload != 0)
        memcpy(block + ragged->start, ragged->payload, ragged->bytes);
    else
        memset(block + ragged->start, 0, ragged->bytes);
    atoll_count(dp->domain, DEDUP_COUNTER_COPIED_BETWEEN_BYTES,
                (ragged->old != 0 ? DP_BLOCK - ragged->bytes : 0) + (ragged->payload != 0 ? ragged->bytes : 0));
    return record;
}

/* --- What both need ------------------------------------------------------------------------------------------------------ */

static enum dp_outcome wait_for(struct datapath *dp, enum dp_resource resource)
{
    dp->blocked |= resource;
    return OUTCOME_RETRY;
}

/* What is logged finds no place, and who waits for it to be destaged would wait until somebody gives up some blocks: ENOSPC. */
static bool waits_in_vain(const struct datapath *dp, struct dp_slot *slot)
{
    if (dp->arena->failed_records == dp->arena->aside_records || !store_exhausted(dp->dedup))
        return false;
    slot->status = ATOLL_ENOSPC;
    return true;
}

/* As dp_want_outcome, of a page of the map that is to name logged blocks (STORE_LOG). */
static enum dp_outcome leaf_outcome(struct datapath *dp, struct dp_slot *slot, enum store_want want)
{
    if (want == STORE_WAIT && store_pressed(dp->dedup) && waits_in_vain(dp, slot))
        return OUTCOME_DONE;
    return dp_want_outcome(dp, slot, want);
}

/* Does writing these blocks free as many as it takes? True of each that needs a reservation: what it names has no other reference,
 * or is being written (and will be abandoned). */
static enum store_want frees_as_much(struct datapath *dp, const uint64_t *values, uint32_t count, bool *frees)
{
    enum store_want worst = STORE_HAVE;
    *frees = true;
    for (uint32_t index = 0; index < count; index++) {
        uint64_t value = values[index];
        if (log_has_reservation(dp, value) || MAP_KIND(value) == MAP_ZERO || MAP_KIND(value) == MAP_LOG)
            continue;
        enum store_want want = store_want_base(dp->dedup, value);
        worst = want == STORE_WAIT ? STORE_WAIT : worst;
        *frees = *frees && MAP_KIND(value) == MAP_PBA && store_references(dp->dedup, MAP_NUMBER(value)) == 1;
    }
    return worst;
}

/* Reserves space for `blocks`, which are those of `values` that need it. DONE: reserved, or the slot's status is ENOSPC. */
static enum dp_outcome reserve(struct datapath *dp, struct dp_slot *slot, bool posted, uint64_t blocks, const uint64_t *values,
                               uint32_t count)
{
    bool frees = false;
    if (blocks == 0 || (!(dp->blocked & RESOURCE_SPACE) && store_reserve(dp->dedup, blocks)))
        return OUTCOME_DONE;
    if (posted) /* never refused for want of space */
        return store_reserve_posted(dp->dedup, blocks) ? OUTCOME_DONE : OUTCOME_RETRY;
    if (!posted_shut(dp)) /* what is kept for posted writes can be had soon */
        return wait_for(dp, RESOURCE_SPACE);
    if (!(dp->blocked & RESOURCE_SPACE) && store_reserve(dp->dedup, blocks))
        return OUTCOME_DONE;
    if (frees_as_much(dp, values, count, &frees) == STORE_WAIT)
        return dp_want_outcome(dp, slot, STORE_WAIT);
    if (frees && store_reserve_overwrite(dp->dedup, blocks))
        return OUTCOME_DONE;
    if (slot->target == 0)
        slot->target = dp->arena->next_order - 1;
    /* Behind one that waits already, even if what it waits for has come in this very step: its turn is first. */
    if ((dp->blocked & RESOURCE_SPACE) || (dp->arena->failed_records == 0 && destage_pending_order(dp) <= slot->target)) {
        if (slot->target > dp->space_target)
            dp->space_target = slot->target;
        return wait_for(dp, RESOURCE_SPACE);
    }
    slot->status = ATOLL_ENOSPC;
    return OUTCOME_DONE;
}

/* True if `value` names a record in a run that a waiting flush covers. */
static bool protected(const struct datapath *dp, uint64_t value)
{
    return MAP_KIND(value) == MAP_LOG && destage_protected(dp, log_record_of(dp, value));
}

static enum dp_outcome applied(const struct atoll_descriptor *request)
{
    return request->flags & ATOLL_FLAG_FUA ? OUTCOME_FLUSH : OUTCOME_DONE;
}

/* --- WRITE ---------------------------------------------------------------------------------------------------------------- */

static enum dp_outcome refuse_write(struct datapath *dp, struct dp_slot *slot, const uint32_t *pages, uint32_t count)
{
    slot_unpin(dp, slot);
    for (uint32_t index = 0; index < count; index++)
        give_back(dp, pages[index]);
    return OUTCOME_DONE;
}

enum dp_outcome exec_write(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    uint32_t pages[ATOLL_PART_BLOCKS], count, volume = request->halves[4], zero_count = 0, ragged_count = 0;
    uint64_t values[ATOLL_PART_BLOCKS], offset = request->words[0], end = offset + request->words[1], needed = 0;
    struct ragged ragged[2];

    bool held = !posted_request(request) && !(request->flags & ATOLL_FLAG_FUA); /* one with FUA is a flush, too */
    if (held && ((dp->blocked & RESOURCE_SHORT_LOG) || flush_crowded(dp, false)))
        return wait_for(dp, RESOURCE_SHORT_LOG);
    if (!payload_pages(dp, request, pages, &count)) {
        atoll_count(dp->domain, DEDUP_COUNTER_BAD_REQUESTS, 1);
        slot->status = ATOLL_EINVAL;
        return OUTCOME_DONE;
    }
    if (dp_volume(dp, request, &slot->status) == 0)
        return refuse_write(dp, slot, pages, count);
    uint64_t first = offset / DP_BLOCK;
    enum store_want want = store_want_map(dp->dedup, volume, first, count, STORE_LOG);
    if (want != STORE_HAVE) {
        enum dp_outcome waits = leaf_outcome(dp, slot, want);
        if (posted_request(request)) /* it is kept, and tried again; meanwhile the slot's status is what flushes and others are told */
            return OUTCOME_RETRY;
        return waits == OUTCOME_RETRY ? waits : refuse_write(dp, slot, pages, count);
    }
    map_values(dp, volume, first, count, values);
    for (uint32_t index = 0; index < count; index++) {
        lookup_prefetch(dp, volume, first + index);
        if (protected(dp, values[index]))
            return wait_for(dp, RESOURCE_RUN);
        zero_count += MAP_KIND(values[index]) == MAP_ZERO;
        needed += !log_has_reservation(dp, values[index]);
        uint32_t start = index == 0 ? (uint32_t)(offset % DP_BLOCK) : 0;
        uint32_t stop = index + 1 == count ? (uint32_t)((end - 1) % DP_BLOCK + 1) : DP_BLOCK;
        if (start != 0 || stop != DP_BLOCK)
            ragged[ragged_count++] =
                (struct ragged){.lba = first + index,
                                .value = values[index],
                                .start = start,
                                .bytes = stop - start,
                                .payload = (const uint8_t *)record_page(dp, pages[index]) + start};
    }
    if (ragged_count > dp->merge_free_count || (ragged_count != 0 && (dp->blocked & RESOURCE_MERGE)))
        return waits_in_vain(dp, slot) ? refuse_write(dp, slot, pages, count) : wait_for(dp, RESOURCE_MERGE);
    if (zero_count != 0 && !store_has_room(dp->dedup, zero_count))
        return wait_for(dp, RESOURCE_LOG_ROOM);
    if (ragged_count != 0) {
        enum prepared prepared = prepare_ragged(dp, slot, ragged, ragged_count);
        if (prepared == PREPARED_WAIT)
            return OUTCOME_RETRY;
        if (prepared == PREPARED_FAILED)
            return refuse_write(dp, slot, pages, count);
    }
    enum dp_outcome outcome = reserve(dp, slot, posted_request(request), needed - zero_count, values, count);
    /* A promised block (MAP_ZERO) has its space: the promise is given up and the space taken at once. */
    for (uint32_t index = 0; outcome == OUTCOME_DONE && slot->status == ATOLL_OK && zero_count != 0 && index < count; index++) {
        if (MAP_KIND(values[index]) != MAP_ZERO)
            continue;
        store_unmap(dp->dedup, volume, first + index, values[index]);
        store_reserve_promised(dp->dedup, 1);
        values[index] = 0;
        zero_count--;
    }
    if (outcome != OUTCOME_DONE || slot->status != ATOLL_OK) {
        unpin_ragged(dp, ragged, ragged_count);
        return outcome != OUTCOME_DONE ? outcome : refuse_write(dp, slot, pages, count);
    }

    ATOLL_CRASH_POINT(dp->domain, "dedup.write.apply");
    uint32_t done = 0;
    for (uint32_t which = 0; done < count; done++) {
        uint32_t record = pages[done];
        if (done + 1 < count && !dp->unseen)
            dp_prefetch(record_page(dp, pages[done + 1]));
        bool merged = which < ragged_count && ragged[which].lba == first + done;
        if (merged)
            record = merge(dp, &ragged[which++]);
        bool had = log_has_reservation(dp, values[done]);
        struct fingerprint print = dp->unseen ? (struct fingerprint){0} : dp_fingerprint(record_page(dp, record));
        slot->status = log_append(dp, record, volume, first + done, print);
        if (slot->status == ATOLL_OK && dp->unseen)
            log_set_flag(dp, record, RECORD_POISON);
        if (slot->status != ATOLL_OK) {
            if (merged)
                merge_put(dp, record);
            break;
        }
        needed -= !had;
        if (merged)
            give_back(dp, pages[done]);
    }
    unpin_ragged(dp, ragged, ragged_count);
    if (slot->status != ATOLL_OK) { /* no map leaf: what was applied stays, as an error allows */
        store_unreserve(dp->dedup, needed);
        return refuse_write(dp, slot, pages + done, count - done);
    }
    atoll_count(dp->domain, DEDUP_COUNTER_WRITES, 1);
    atoll_count(dp->domain, DEDUP_COUNTER_WRITE_BYTES, request->length);
    return applied(request);
}

/* --- TRIM, ZERO ------------------------------------------------------------------------------------------------------------ */

/* Takes the content of one block away. RETRY: not now; DONE: done, or the slot's status says why not. */
static enum dp_outcome clear_block(struct datapath *dp, struct dp_slot *slot, uint32_t volume, uint64_t lba, uint64_t value,
                                   bool promise)
{
    uint64_t base = value;
    bool had = log_has_reservation(dp, value);
    if (protected(dp, value))
        return wait_for(dp, RESOURCE_RUN);
    if (MAP_KIND(value) == MAP_LOG)
        base = dp->records[log_record_of(dp, value)].base;
    if (!store_has_room(dp->dedup, 2))
        return wait_for(dp, RESOURCE_LOG_ROOM);
    if (store_want_base(dp->dedup, base) == STORE_WAIT)
        return dp_want_outcome(dp, slot, STORE_WAIT);
    if (promise && !had) {
        enum dp_outcome outcome = reserve(dp, slot, false, 1, &value, 1);
        if (outcome != OUTCOME_DONE || slot->status != ATOLL_OK)
            return outcome;
    }
    lookup_forget(dp, volume, lba);
    if (MAP_KIND(value) == MAP_LOG)
        log_drop(dp, log_record_of(dp, value));
    if (promise && MAP_KIND(base) == MAP_ZERO) {
        store_unmap(dp->dedup, volume, lba, base); /* one promise goes, the other comes */
        base = 0;
    }
    if (promise) {
        slot->status = (uint32_t)store_promise_zero(dp->dedup, volume, lba, base);
        if (slot->status != ATOLL_OK)
            store_unreserve(dp->dedup, 1);
    } else {
        store_unmap(dp->dedup, volume, lba, base);
        if (had)
            store_unreserve(dp->dedup, 1);
    }
    return OUTCOME_DONE;
}

/* Ragged ends of a ZERO. DONE: merged, or the slot's status says why not. */
static enum dp_outcome zero_ends(struct datapath *dp, struct dp_slot *slot, uint32_t volume, uint64_t offset, uint64_t end)
{
    struct ragged ragged[2];
    uint32_t count = 0;
    uint64_t needed = 0, first = offset / DP_BLOCK, last = (end - 1) / DP_BLOCK;
    for (uint64_t lba = first; lba <= last; lba = lba == last ? last + 1 : last) {
        uint32_t start = lba == first ? (uint32_t)(offset % DP_BLOCK) : 0;
        uint32_t stop = lba == last ? (uint32_t)((end - 1) % DP_BLOCK + 1) : DP_BLOCK;
        enum store_want want = start == 0 && stop == DP_BLOCK ? STORE_HAVE : store_want_map(dp->dedup, volume, lba, 1, STORE_LOG);
        if (want != STORE_HAVE)
            return leaf_outcome(dp, slot, want);
        uint64_t value = store_map_get(dp->dedup, volume, lba);
        if ((start == 0 && stop == DP_BLOCK) || MAP_KIND(value) == MAP_HOLE || MAP_KIND(value) == MAP_ZERO)
            continue; /* a whole block, or zeros already */
        if (protected(dp, value))
            return wait_for(dp, RESOURCE_RUN);
        needed += !log_has_reservation(dp, value);
        ragged[count++] = (struct ragged){.lba = lba, .value = value, .start = start, .bytes = stop - start};
    }
    if (count == 0)
        return OUTCOME_DONE;
    if (count > dp->merge_free_count || (dp->blocked & RESOURCE_MERGE))
        return waits_in_vain(dp, slot) ? OUTCOME_DONE : wait_for(dp, RESOURCE_MERGE);
    switch (prepare_ragged(dp, slot, ragged, count)) {
    case PREPARED_WAIT: return OUTCOME_RETRY;
    case PREPARED_FAILED: return OUTCOME_DONE;
    case PREPARED: break;
    }
    uint64_t values[2] = {ragged[0].value, ragged[count - 1].value};
    enum dp_outcome outcome = reserve(dp, slot, false, needed, values, count);
    for (uint32_t index = 0; outcome == OUTCOME_DONE && slot->status == ATOLL_OK && index < count; index++) {
        uint32_t record = merge(dp, &ragged[index]);
        slot->status = log_append(dp, record, volume, ragged[index].lba, dp_fingerprint(record_page(dp, record)));
        assert(slot->status == ATOLL_OK); /* the entry holds a value, so its leaf exists */
    }
    unpin_ragged(dp, ragged, count);
    return outcome;
}

enum dp_outcome exec_range(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    uint32_t volume = request->halves[4], changed = 0, looked = 0;
    uint64_t offset = request->words[0], end = offset + request->words[1];
    bool promise = request->opcode == ATOLL_OP_ZERO && (request->flags & ATOLL_FLAG_NO_HOLE);
    const uint64_t *leaf = 0;

    if (dp_volume(dp, request, &slot->status) == 0)
        return OUTCOME_DONE;
    if (request->words[1] == 0 || request->words[1] > ATOLL_RANGE_PART_BYTES + (uint64_t)DP_BLOCK) {
        slot->status = request->words[1] == 0 ? ATOLL_OK : ATOLL_EINVAL;
        return OUTCOME_DONE;
    }
    if (slot->phase == PHASE_START) {
        if (request->opcode == ATOLL_OP_ZERO) {
            enum dp_outcome outcome = zero_ends(dp, slot, volume, offset, end);
            if (outcome != OUTCOME_DONE || slot->status != ATOLL_OK)
                return outcome;
        }
        slot->phase = PHASE_RANGE;
        slot->target = 0;
        slot->progress = (offset + DP_BLOCK - 1) / DP_BLOCK;
        atoll_count(dp->domain, request->opcode == ATOLL_OP_TRIM ? DEDUP_COUNTER_TRIMS : DEDUP_COUNTER_ZEROS, 1);
    }
    uint64_t stop = end / DP_BLOCK, lba = slot->progress;
    if (lba < stop && ((dp->blocked & RESOURCE_LOG_ROOM) || !store_has_room(dp->dedup, 2 * DP_RANGE_BLOCKS)))
        return wait_for(dp, RESOURCE_LOG_ROOM);
    for (bool first = true; lba < stop && changed < DP_RANGE_BLOCKS && looked < 16 * DP_RANGE_BLOCKS; first = false) {
        if (dp->journal->count >= 2 * DP_STEP_JOURNAL)
            break;
        if (first || lba % 512 == 0 || leaf == 0) {
            uint64_t next = lba / 512;
            enum store_want want = store_want_map(dp->dedup, volume, lba, 1, promise ? STORE_CHANGE : STORE_LOOK);
            leaf = store_map_leaf(dp->dedup, volume, lba / 512);
            if (want == STORE_HAVE && leaf == 0)
                want = store_next_leaf(dp->dedup, volume, lba / 512, (stop + 511) / 512, &next);
            if (want != STORE_HAVE) {
                slot->progress = lba;
                return dp_want_outcome(dp, slot, want);
            }
            if (leaf == 0) {
                looked++;
                lba = next * 512 < stop ? next * 512 : stop;
                continue;
            }
        }
        looked++;
        uint64_t value = leaf[lba % 512];
        if (MAP_KIND(value) != (promise ? MAP_ZERO : MAP_HOLE)) {
            enum dp_outcome outcome = clear_block(dp, slot, volume, lba, value, promise);
            if (outcome != OUTCOME_DONE || slot->status != ATOLL_OK) {
                slot->progress = lba;
                return outcome;
            }
            slot->target = 0;
            changed++;
        }
        lba++;
    }
    slot->progress = lba;
    ATOLL_CRASH_POINT(dp->domain, "dedup.range.slice");
    return lba < stop ? OUTCOME_RANGE : applied(request);
}

/* --- FLUSH ------------------------------------------------------------------------------------------------------------------- */

enum dp_outcome exec_flush(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request)
{
    (void)number;
    (void)request;
    atoll_count(dp->domain, DEDUP_COUNTER_FLUSHES, 1);
    return OUTCOME_FLUSH;
}
