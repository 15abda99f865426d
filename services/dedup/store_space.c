/*
 * Space: reference words and their group sums, reservations, allocation of runs, fingerprints and the cache of them.
 *
 * available = usable - stored - quarantined - reserved - what metadata may need at worst, where the last is four blocks
 * for each page that can be dirty: two copies, old and new; and two for each leaf that left the map, until the root that
 * has it is not needed any more. So a checkpoint always finds its places (I7).
 *
 * After a crash: all of it is in the arena and journaled. After power loss: counts come from pages and log, the rest
 * (in flight, pending, quarantined) is free, sums and fingerprint cache are made again.
 */
#include "services/dedup/store_internal.h"

/* --- Words and sums -------------------------------------------------------------------------------------------------- */

static bool synced(const struct store *store, uint32_t epoch)
{
    uint32_t distance = ((uint32_t)store->area->synced_epoch - epoch) & 0x7fffffffu;
    return distance < 0x40000000u;
}

/* True if the block may be handed out: free, or freed by what is durable now. */
static bool takeable(const struct store *store, uint32_t word)
{
    return word == 0 || ((word & REF_PENDING) != 0 && synced(store, word & ~REF_PENDING));
}

bool store_keeps_content(const struct store *store, uint64_t pba)
{
    uint32_t word = store->refs[pba];
    return REF_IS_COUNT(word) || ((word & REF_PENDING) != 0 && !synced(store, word & ~REF_PENDING));
}

static void set_ref(struct store *store, uint64_t pba, uint32_t word) { atoll_set32(store->journal, &store->refs[pba], word); }

static void group_change(struct store *store, uint64_t pba, int32_t free_change, int32_t pending_change)
{
    uint64_t *group = &store->groups[pba / STORE_GROUP_BLOCKS];
    uint32_t epoch = pending_change > 0 ? (uint32_t)store->area->epoch & ~REF_PENDING : GROUP_EPOCH(*group);
    uint32_t free_count = GROUP_FREE(*group) + (uint32_t)free_change;
    uint32_t pending_count = GROUP_PENDING(*group) + (uint32_t)pending_change;
    assert(free_count <= STORE_GROUP_BLOCKS && pending_count <= STORE_GROUP_BLOCKS);
    atoll_set64(store->journal, group, GROUP(free_count, pending_count, epoch));
}

static void make_pending(struct store *store, uint64_t pba)
{
    set_ref(store, pba, REF_PENDING | ((uint32_t)store->area->epoch & ~REF_PENDING));
    group_change(store, pba, 0, 1);
    STORE_ADD(store, pending_blocks, 1);
    STORE_ADD(store, stored_blocks, -1);
    if (!store->area->changed)
        STORE_SET(store, changed, 1);
}

void store_free_metadata(struct store *store, uint64_t pba)
{
    assert(store->refs[pba] == REF_METADATA);
    set_ref(store, pba, 0);
    group_change(store, pba, 1, 0);
    STORE_ADD(store, free_blocks, 1);
    STORE_ADD(store, metadata_blocks, -1);
}

bool store_sweep(struct store *store)
{
    struct store_area *area = store->area;
    uint64_t group_count = (area->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS;
    uint32_t converted = 0, looked = 0;
    uint64_t group = area->sweep_group, left = area->sweep_left;
    while (left != 0 && looked++ < STORE_SWEEP_GROUPS && converted < STORE_SWEEP_CONVERT) {
        if (GROUP_PENDING(store->groups[group]) != 0) {
            int32_t count = 0;
            uint64_t first = group * STORE_GROUP_BLOCKS;
            for (uint64_t pba = first; pba < first + STORE_GROUP_BLOCKS; pba++)
                if ((store->refs[pba] & REF_PENDING) != 0 && takeable(store, store->refs[pba])) {
                    set_ref(store, pba, 0);
                    count++;
                }
            if (count != 0) {
                group_change(store, first, count, -count);
                STORE_ADD(store, free_blocks, count);
                STORE_ADD(store, pending_blocks, -count);
                converted++;
            }
        }
        group = group + 1 == group_count ? 0 : group + 1;
        left--;
    }
    STORE_SET(store, sweep_group, group);
    STORE_SET(store, sweep_left, left);
    return left != 0;
}

/* --- Reservations ---------------------------------------------------------------------------------------------------- */

int64_t store_available(const struct store *store)
{
    const struct store_area *area = store->area;
    uint64_t metadata = 4 * (store->shape.fixed_pages + area->leaves) + 2 * area->leaves_released + STORE_SPACE_SLACK;
    return (int64_t)(area->usable_end - area->usable_first) - (int64_t)area->stored_blocks - (int64_t)area->quarantined_blocks -
           (int64_t)area->reserved_blocks - (int64_t)metadata;
}

bool store_reserve(struct dedup *dedup, uint64_t blocks)
{
    struct store *store = dedup->store;
    int64_t available = store_available(store);
    if (available < 0 || blocks > (uint64_t)available)
        return false;
    if (blocks != 0)
        STORE_ADD(store, reserved_blocks, blocks);
    return true;
}

void store_unreserve(struct dedup *dedup, uint64_t blocks)
{
    struct store *store = dedup->store;
    assert(blocks <= store->area->reserved_blocks - store->area->zero_promises);
    STORE_ADD(store, reserved_blocks, -blocks);
}

void store_space(struct dedup *dedup, struct store_space *space)
{
    const struct store_area *area = dedup->store->area;
    *space = (struct store_space){.device_blocks = area->device_blocks,
                                  .metadata_blocks = area->metadata_blocks + area->device_blocks -
                                                     (area->usable_end - area->usable_first),
                                  .stored_blocks = area->stored_blocks,
                                  .free_blocks = area->free_blocks,
                                  .pending_free_blocks = area->pending_blocks,
                                  .reserved_blocks = area->reserved_blocks,
                                  .references = area->references,
                                  .zero_promises = area->zero_promises,
                                  .quarantined_blocks = area->quarantined_blocks};
    int64_t available = area->state == STORE_READY ? store_available(dedup->store) : 0;
    space->available_blocks = available > 0 ? (uint64_t)available : 0;
}

/* --- Allocation ------------------------------------------------------------------------------------------------------ */

/* A run of at most `want` takeable blocks, looked for from `start` on, around the device; returns its length. With `deep` groups are
 * looked into even if their newest freed block cannot be taken yet. The first long run wins; the longer the search, the shorter
 * a run is good enough. */
static uint32_t find_run(const struct store *store, uint64_t start, uint32_t want, bool deep, uint64_t *found)
{
    const struct store_area *area = store->area;
    uint64_t total = area->usable_end - area->usable_first, visited = 0, looked = 0;
    uint64_t pba = start, run = 0;
    uint32_t length = 0, best = 0;
    while (visited < total) {
        uint64_t group_end = (pba / STORE_GROUP_BLOCKS + 1) * STORE_GROUP_BLOCKS;
        if (group_end > area->usable_end)
            group_end = area->usable_end;
        uint64_t group = store->groups[pba / STORE_GROUP_BLOCKS];
        bool worth = GROUP_FREE(group) != 0 || (GROUP_PENDING(group) != 0 && (deep || synced(store, GROUP_EPOCH(group))));
        if (!worth) {
            length = 0;
            visited += group_end - pba;
            pba = group_end;
        }
        for (; pba < group_end; pba++, visited++, looked++) {
            if (!takeable(store, store->refs[pba])) {
                length = 0;
                continue;
            }
            if (length++ == 0)
                run = pba;
            if (length > best) {
                best = length;
                *found = run;
                if (best == want)
                    return best;
            }
        }
        if ((looked > 4096 && best >= want / 4 && best != 0) || (looked > 16384 && best != 0))
            return best;
        if (pba == area->usable_end) {
            pba = area->usable_first;
            length = 0;
        }
    }
    return best;
}

uint32_t store_take_run(struct store *store, uint32_t cursor, uint32_t want, uint32_t word, uint64_t *pba)
{
    struct store_area *area = store->area;
    uint64_t start = area->cursor[cursor], run = 0;
    if (want == 0 || area->free_blocks + area->pending_blocks == 0)
        return 0;
    if (!store_usable(store, start))
        start = area->usable_first;
    uint32_t length = find_run(store, start, want, false, &run);
    if (length == 0 && area->pending_blocks != 0)
        length = find_run(store, start, want, true, &run);
    if (length == 0)
        return 0;
    uint32_t from_pending = 0;
    for (uint64_t at = run; at < run + length;) {
        int32_t free_change = 0, pending_change = 0;
        uint64_t group_end = (at / STORE_GROUP_BLOCKS + 1) * STORE_GROUP_BLOCKS, first = at;
        for (; at < run + length && at < group_end; at++) {
            if (store->refs[at] == 0)
                free_change--;
            else
                pending_change--;
            set_ref(store, at, word);
        }
        group_change(store, first, free_change, pending_change);
        from_pending += (uint32_t)-pending_change;
    }
    STORE_ADD(store, free_blocks, -(uint64_t)(length - from_pending));
    if (from_pending != 0)
        STORE_ADD(store, pending_blocks, -(uint64_t)from_pending);
    STORE_SET(store, cursor[cursor], run + length == area->usable_end ? area->usable_first : run + length);
    *pba = run;
    return length;
}

uint32_t store_allocate(struct dedup *dedup, uint32_t want, uint64_t *pba)
{
    struct store *store = dedup->store;
    assert(want <= store->area->reserved_blocks - store->area->zero_promises);
    uint32_t length = store_take_run(store, 0, want, REF_IN_FLIGHT, pba);
    if (length == 0)
        return 0;
    for (uint64_t at = *pba; at < *pba + length; at++) {
        atoll_set64(store->journal, &store->prints[at].low, store->area->flush_failures); /* store_rewrite.c */
        store_mark_dirty(store, store->shape.prints_base + at / FORMAT_PRINTS_PER_PAGE);
    }
    STORE_ADD(store, reserved_blocks, -(uint64_t)length);
    STORE_ADD(store, stored_blocks, length);
    return length;
}

void store_abandon(struct dedup *dedup, uint64_t pba, uint32_t count, bool quarantine)
{
    struct store *store = dedup->store;
    for (uint64_t at = pba; at < pba + count; at++) {
        assert(store->refs[at] == REF_IN_FLIGHT);
        if (!quarantine) {
            make_pending(store, at);
            continue;
        }
        set_ref(store, at, REF_QUARANTINED);
        STORE_ADD(store, stored_blocks, -1);
        STORE_ADD(store, quarantined_blocks, 1);
    }
    STORE_ADD(store, reserved_blocks, count);
}

/* --- Fingerprints ---------------------------------------------------------------------------------------------------- */

bool store_pba_valid(struct dedup *dedup, uint64_t pba) { return store_usable(dedup->store, pba); }

uint32_t store_references(struct dedup *dedup, uint64_t pba)
{
    uint32_t word = store_usable(dedup->store, pba) ? dedup->store->refs[pba] : 0;
    return REF_IS_COUNT(word) ? word : 0;
}

bool store_fingerprint(struct dedup *dedup, uint64_t pba, struct fingerprint *print)
{
    if (store_references(dedup, pba) == 0)
        return false;
    *print = dedup->store->prints[pba];
    return true;
}

/* An entry of the cache: tag (24 bits) | age (4) | PBA (36); 0 is empty (PBA 0 holds a superblock). */
#define CACHE_PBA(entry) ((entry) & 0xfffffffffu)
#define CACHE_TAG(entry) ((entry) >> 40)
#define CACHE_AGE(entry) ((uint32_t)((entry) >> 36) & 15)

static uint64_t *cache_set(const struct store *store, struct fingerprint print)
{
    return store->cache + (print.low & store->cache_mask) * STORE_SET_ENTRIES;
}

void store_free_block(struct store *store, uint64_t pba)
{
    uint64_t *set = cache_set(store, store->prints[pba]);
    for (uint32_t index = 0; index < STORE_SET_ENTRIES; index++)
        if (CACHE_PBA(set[index]) == pba)
            atoll_set64(store->journal, &set[index], 0);
    make_pending(store, pba);
}

void store_remember_print(struct store *store, uint64_t pba)
{
    struct fingerprint print = store->prints[pba];
    uint64_t *set = cache_set(store, print);
    uint32_t age = (uint32_t)(store->area->cache_clock >> store->cache_age_shift) & 15;
    uint32_t victim = 0, victim_rank = 0, places = 0;
    for (uint32_t index = 0; index < STORE_SET_ENTRIES; index++)
        places += CACHE_TAG(set[index]) == print.high >> 40 && CACHE_PBA(set[index]) != pba;
    for (uint32_t index = 0; index < STORE_SET_ENTRIES; index++) {
        uint64_t entry = set[index];
        uint32_t rank; /* the highest leaves: this block's old entry, copies beyond their number, empty, no longer
                          stored, unshared and old, shared and old */
        if (entry == 0) {
            rank = 100;
        } else if (CACHE_PBA(entry) == pba) {
            rank = 1000;
        } else {
            uint32_t word = store->refs[CACHE_PBA(entry)];
            rank = 1 + ((age - CACHE_AGE(entry)) & 15) + (REF_IS_COUNT(word) ? (word == 1 ? 20 : 0) : 60);
            if (places >= STORE_PLACES_PER_PRINT && CACHE_TAG(entry) == print.high >> 40)
                rank += 120; /* copies of one content do not push out all others */
        }
        if (rank > victim_rank) {
            victim_rank = rank;
            victim = index;
        }
    }
    if (set[victim] != 0 && CACHE_PBA(set[victim]) != pba && REF_IS_COUNT(store->refs[CACHE_PBA(set[victim])]))
        store_count(store, STORE_COUNTER_CACHE_EVICTIONS, 1);
    atoll_set64(store->journal, &set[victim], print.high >> 40 << 40 | (uint64_t)age << 36 | pba);
    STORE_ADD(store, cache_clock, 1);
}

uint32_t store_candidates(struct dedup *dedup, struct fingerprint print, uint64_t *pbas, uint32_t most)
{
    struct store *store = dedup->store;
    const uint64_t *set = cache_set(store, print);
    uint32_t counts[STORE_SET_ENTRIES], found = 0;
    uint64_t sorted[STORE_SET_ENTRIES];
    for (uint32_t index = 0; index < STORE_SET_ENTRIES; index++) {
        uint64_t pba = CACHE_PBA(set[index]);
        if (set[index] == 0 || CACHE_TAG(set[index]) != print.high >> 40)
            continue;
        uint32_t count = store->refs[pba];
        if (!REF_IS_COUNT(count) || count == REF_COUNT_MAX || store->prints[pba].low != print.low ||
            store->prints[pba].high != print.high)
            continue;
        uint32_t at = found++;
        for (; at > 0 && counts[at - 1] < count; at--) {
            counts[at] = counts[at - 1];
            sorted[at] = sorted[at - 1];
        }
        counts[at] = count;
        sorted[at] = pba;
    }
    if (found > most)
        found = most;
    for (uint32_t index = 0; index < found; index++)
        pbas[index] = sorted[index];
    return found;
}
