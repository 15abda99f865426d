/*
 * READ, EXTENTS and CACHE: requests that change nothing.
 *
 * A READ is resolved in one step, so that what it returns was the content at one moment: each block is a logged page, a page of the
 * read cache (there, or being read from the device) or zeros. Pages are pinned from then on until nic has sent them;
 * what is overwritten meanwhile leaves the map, not the memory.
 *
 * After a crash: a resolved READ goes on waiting for its pages; others are executed again.
 */
#include "services/dedup/datapath.h"

void map_values(struct datapath *dp, uint32_t volume, uint64_t first, uint32_t count, uint64_t *values)
{
    const uint64_t *leaf = 0;
    for (uint32_t index = 0; index < count; index++) {
        uint64_t lba = first + index;
        if (index == 0 || lba % 512 == 0)
            leaf = store_map_leaf(dp->dedup, volume, lba / 512);
        values[index] = leaf == 0 ? 0 : leaf[lba % 512];
    }
}

/* Fingerprints of the blocks that must be read: of those in the read cache it knows them. */
static enum store_want want_prints(struct datapath *dp, const uint64_t *pbas, uint32_t count)
{
    uint64_t missing[ATOLL_PART_BLOCKS];
    uint32_t missing_count = 0;
    for (uint32_t index = 0; index < count; index++)
        if (cache_find(dp, pbas[index]) == DP_NONE)
            missing[missing_count++] = pbas[index];
    return store_want_prints(dp->dedup, missing, missing_count);
}

static void add_segment(struct atoll_segment *segments, uint32_t *count, uint64_t address, uint32_t length, uint32_t kind)
{
    struct atoll_segment *last = *count == 0 ? 0 : &segments[*count - 1];
    if (last != 0 && last->kind == kind && kind == ATOLL_SEGMENT_DATA && last->address + last->length == address)
        last->length += length;
    else if (last != 0 && last->kind == kind && kind == ATOLL_SEGMENT_HOLE && last->length + length <= DP_ZERO_BYTES)
        last->length += length;
    else
        segments[(*count)++] = (struct atoll_segment){.address = address, .length = length, .kind = kind};
}

enum dp_outcome exec_read(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    uint64_t values[ATOLL_PART_BLOCKS], pbas[ATOLL_PART_BLOCKS], failed = 0;
    uint32_t pages[ATOLL_PART_BLOCKS], pba_count = 0, segment_count = 0;
    struct atoll_segment segments[DP_SEGMENTS];
    bool loading = false;

    struct atoll_volume *volume = dp_volume(dp, request, &slot->status);
    if (volume == 0)
        return OUTCOME_DONE;
    uint64_t offset = request->words[0], length = request->words[1];
    uint64_t first = offset / DP_BLOCK;
    uint64_t blocks = length == 0 ? 0 : (offset + length - 1) / DP_BLOCK - first + 1;
    if (length > ATOLL_PART_BYTES || blocks > ATOLL_PART_BLOCKS) {
        slot->status = ATOLL_EINVAL;
        return OUTCOME_DONE;
    }
    enum store_want want = store_want_map(dp->dedup, request->halves[4], first, blocks, STORE_LOOK);
    if (want != STORE_HAVE)
        return dp_want_outcome(dp, slot, want);
    map_values(dp, request->halves[4], first, (uint32_t)blocks, values);
    for (uint32_t index = 0; index < blocks; index++) {
        if (MAP_KIND(values[index]) == MAP_PBA) {
            pbas[pba_count++] = MAP_NUMBER(values[index]);
        }
        else if (MAP_KIND(values[index]) == MAP_LOG &&
                 (dp->records[log_record_of(dp, values[index])].flags & RECORD_CORRUPT)) {
            slot->status = ATOLL_ECORRUPT;
            slot->failed_address = first + index;
            slot->failed_lba = first + index + 1;
            return OUTCOME_DONE;
        }
    }
    if (pba_count != 0) {
        want = want_prints(dp, pbas, pba_count);
        if (want != STORE_HAVE)
            return dp_want_outcome(dp, slot, want);
        bool have = !(dp->blocked & RESOURCE_CACHE) && cache_load(dp, IO_FILL, pbas, pba_count, pages, &failed);
        if (!have && failed == 0 && !(dp->blocked & RESOURCE_CACHE)) {
            dp_sweep(dp);
            have = cache_load(dp, IO_FILL, pbas, pba_count, pages, &failed);
        }
        if (failed != 0) { /* the map names a place that holds nothing: damage that was loaded */
            slot->status = ATOLL_ECORRUPT;
            slot->failed_address = failed;
            return OUTCOME_DONE;
        }
        if (!have) {
            dp->blocked |= RESOURCE_CACHE;
            return OUTCOME_RETRY;
        }
    }
    pba_count = 0;
    for (uint32_t index = 0; index < blocks; index++) {
        uint64_t start = index == 0 ? offset % DP_BLOCK : 0;
        uint64_t end = index + 1 == blocks ? (offset + length - 1) % DP_BLOCK + 1 : DP_BLOCK;
        uint32_t bytes = (uint32_t)(end - start);
        if (MAP_KIND(values[index]) == MAP_LOG) {
            uint32_t record = log_record_of(dp, values[index]);
            dp_set32(dp, &dp->records[record].pins, dp->records[record].pins + 1);
            add_segment(segments, &segment_count, record_address(dp, record) + start, bytes, ATOLL_SEGMENT_DATA);
            lookup_note(dp, request->halves[4], first + index, record);
        } else if (MAP_KIND(values[index]) == MAP_PBA) {
            uint32_t page = pages[pba_count++];
            loading = loading || dp->pages[page].state != PAGE_VALID;
            if (dp->pages[page].state == PAGE_LOADING && !page_in_tier(dp, page))
                tier_consider(dp, request->halves[4], MAP_NUMBER(values[index]));
            add_segment(segments, &segment_count, page_address(dp, page) + start, bytes, ATOLL_SEGMENT_DATA);
            if (dp->pages[page].state == PAGE_VALID && dp->pages[page].attached)
                lookup_note(dp, request->halves[4], first + index, (uint32_t)dp->record_count + page);
        } else {
            add_segment(segments, &segment_count, dp->zero_buffer, bytes, ATOLL_SEGMENT_HOLE);
            lookup_note_hole(dp, request->halves[4], first + index);
        }
    }
    slot_set_segments(dp, slot, segments, segment_count);
    slot->result_bytes = (uint32_t)length;
    atoll_count(dp->domain, DEDUP_COUNTER_READS, 1);
    atoll_count(dp->domain, DEDUP_COUNTER_READ_BYTES, length);
    return loading ? OUTCOME_LOADING : OUTCOME_DONE;
}

/* --- EXTENTS --------------------------------------------------------------------------------------------------------- */

struct extents {
    struct atoll_extent list[DP_SEGMENTS];
    uint32_t count, most;
};

/* False if the list is full and another state begins. */
static bool add_extent(struct extents *extents, uint32_t state, uint64_t bytes)
{
    if (extents->count != 0 && extents->list[extents->count - 1].state == state) {
        extents->list[extents->count - 1].length_bytes += bytes;
        return true;
    }
    if (extents->count == extents->most)
        return false;
    extents->list[extents->count++] = (struct atoll_extent){.length_bytes = bytes, .state = state};
    return true;
}

static uint32_t extent_state(uint64_t value)
{
    return MAP_KIND(value) == MAP_HOLE ? 3 : MAP_KIND(value) == MAP_ZERO ? 2 : 0;
}

enum dp_outcome exec_extents(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    struct extents extents = {.most = request->flags & ATOLL_FLAG_ONE ? 1 : DP_SEGMENTS};
    if (dp_volume(dp, request, &slot->status) == 0)
        return OUTCOME_DONE;
    if (request->words[1] == 0) {
        slot->status = ATOLL_EINVAL;
        return OUTCOME_DONE;
    }
    uint32_t volume = request->halves[4];
    uint64_t at = request->words[0], end = at + request->words[1];
    uint64_t last_leaf = (end - 1) / DP_BLOCK / 512;
    bool going = true;
    for (uint32_t leaves = 0; going && at < end && leaves < DP_EXTENTS_LEAVES; leaves++) {
        uint64_t lba = at / DP_BLOCK, index = lba / 512, next;
        enum store_want want = store_want_map(dp->dedup, volume, lba, 1, STORE_LOOK);
        const uint64_t *leaf = store_map_leaf(dp->dedup, volume, index);
        if (want == STORE_HAVE && leaf == 0)
            want = store_next_leaf(dp->dedup, volume, index, last_leaf + 1, &next);
        if (want != STORE_HAVE && extents.count != 0)
            break; /* an answer may be about less than was asked for */
        if (want != STORE_HAVE)
            return dp_want_outcome(dp, slot, want);
        if (leaf == 0) {
            next *= 512 * DP_BLOCK;
            next = next < end ? next : end;
            going = add_extent(&extents, 3, next - at);
            at = next;
            continue;
        }
        for (; going && at < end && at / DP_BLOCK / 512 == index; at = going ? next : at) {
            next = (at / DP_BLOCK + 1) * DP_BLOCK;
            next = next < end ? next : end;
            going = add_extent(&extents, extent_state(leaf[at / DP_BLOCK % 512]), next - at);
        }
    }
    atoll_save(dp->journal, slot->segments, extents.count * sizeof extents.list[0]);
    memcpy(slot->segments, extents.list, extents.count * sizeof extents.list[0]);
    slot->extent_count = extents.count;
    atoll_count(dp->domain, DEDUP_COUNTER_EXTENTS, 1);
    return OUTCOME_DONE;
}

/* --- CACHE ------------------------------------------------------------------------------------------------------------ */

enum dp_outcome exec_cache(struct datapath *dp, uint32_t number, const struct atoll_descriptor *request)
{
    struct dp_slot *slot = &dp->arena->slots[number];
    uint64_t pbas[ATOLL_PART_BLOCKS - 1], failed;
    uint32_t pages[ATOLL_PART_BLOCKS - 1], wanted = 0;
    if (dp_volume(dp, request, &slot->status) == 0 || request->words[1] == 0)
        return OUTCOME_DONE;
    atoll_count(dp->domain, DEDUP_COUNTER_PREFETCHES, 1);
    uint64_t first = request->words[0] / DP_BLOCK, last = (request->words[0] + request->words[1] - 1) / DP_BLOCK;
    if (last - first >= DP_PREFETCH_BLOCKS)
        last = first + DP_PREFETCH_BLOCKS - 1; /* a hint: reading ahead more would push out what was read ahead */
    enum store_want want = store_want_map(dp->dedup, request->halves[4], first, last - first + 1, STORE_LOOK);
    if (want == STORE_WAIT)
        return dp_want_outcome(dp, slot, want);
    for (uint64_t lba = first; lba <= last; lba++) {
        uint64_t value = store_map_get(dp->dedup, request->halves[4], lba);
        if (MAP_KIND(value) == MAP_PBA)
            pbas[wanted++] = MAP_NUMBER(value);
        if (wanted != 0 && (wanted == sizeof pbas / sizeof pbas[0] || lba == last)) {
            want = want_prints(dp, pbas, wanted);
            if (want == STORE_WAIT && !store_starved(dp->dedup))
                return dp_want_outcome(dp, slot, want);
            if (want != STORE_HAVE)
                break; /* it is a hint */
            if (dp->blocked & RESOURCE_CACHE || !cache_load(dp, IO_FILL, pbas, wanted, pages, &failed))
                break;
            for (uint32_t index = 0; index < wanted; index++)
                cache_unpin(dp, pages[index]);
            wanted = 0;
        }
    }
    return OUTCOME_DONE;
}
