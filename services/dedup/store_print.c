/*
 * Fingerprints, by place; and the cache that finds places by fingerprint.
 *
 * The cache is bounded: sets of one cache line; unshared old entries leave first. Its entries are hints: what they say is looked
 * at in the pages of counts and fingerprints before anybody relies on it.
 *
 *   store_remember_print   a block has been placed, or is shared now; store_forget_print: its last reference is gone
 *   store_candidates       places whose pages are in memory (store_want_candidates asks for them)
 *   store_warm_step        after loading the cache is empty: it is filled in the background with what is stored, from the last
 *                          stored group down, until it is full
 *
 * After a crash: in the arena and journaled.
 */
#include "services/dedup/store_internal.h"

/* An entry of the cache: tag (23 bits) | shared (1) | age (4) | PBA (36); 0 is empty (PBA 0 holds a superblock). */
#define CACHE_PBA(entry) ((entry) & 0xfffffffffu)
#define CACHE_TAG(entry) ((entry) >> 41)
#define CACHE_SHARED(entry) ((entry) >> 40 & 1)
#define CACHE_AGE(entry) ((uint32_t)((entry) >> 36) & 15)
#define WARM_AHEAD 4 /* groups whose pages are being read */

struct fingerprint *store_print(struct store *store, uint64_t pba)
{
    uint32_t frame = store_find(store, FORMAT_PAGE(FORMAT_TREE_PRINTS, 0, pba / FORMAT_PRINTS_PER_PAGE));
    return frame == STORE_NO_FRAME ? 0 : (struct fingerprint *)store_page_memory(store, frame) + pba % FORMAT_PRINTS_PER_PAGE;
}

bool store_fingerprint(struct dedup *dedup, uint64_t pba, struct fingerprint *print)
{
    const struct fingerprint *found = store_usable(dedup->store, pba) ? store_print(dedup->store, pba) : 0;
    const uint32_t *word = found == 0 ? 0 : store_ref(dedup->store, pba);
    if (found == 0 || (word != 0 && !REF_IS_COUNT(*word)))
        return false;
    *print = *found;
    return true;
}

static uint64_t *cache_set(const struct store *store, struct fingerprint print)
{
    return store->cache + (print.low & store->cache_mask) * STORE_SET_ENTRIES;
}

void store_forget_print(struct store *store, uint64_t pba)
{
    const struct fingerprint *print = store_print(store, pba);
    uint64_t *set = print == 0 ? 0 : cache_set(store, *print); /* not in memory: the entry leaves in its time */
    for (uint32_t index = 0; set != 0 && index < STORE_SET_ENTRIES; index++)
        if (CACHE_PBA(set[index]) == pba)
            atoll_set64(store->journal, &set[index], 0);
}

void store_remember_print(struct store *store, uint64_t pba, uint32_t count)
{
    struct fingerprint print = *store_print(store, pba);
    uint64_t *set = cache_set(store, print);
    uint32_t age = (uint32_t)(store->area->cache_clock >> store->cache_age_shift) & 15;
    uint32_t victim = 0, victim_rank = 0, places = 0;
    for (uint32_t index = 0; index < STORE_SET_ENTRIES; index++)
        places += CACHE_TAG(set[index]) == print.high >> 41 && CACHE_PBA(set[index]) != pba;
    for (uint32_t index = 0; index < STORE_SET_ENTRIES; index++) {
        uint64_t entry = set[index];
        uint32_t rank; /* the highest leaves: this block's old entry, copies beyond their number, empty, unshared and old, shared and old */
        if (entry == 0) {
            rank = 100;
        } else if (CACHE_PBA(entry) == pba) {
            rank = 1000;
        } else {
            rank = 1 + ((age - CACHE_AGE(entry)) & 15) + (CACHE_SHARED(entry) ? 0 : 20);
            if (places >= STORE_PLACES_PER_PRINT && CACHE_TAG(entry) == print.high >> 41)
                rank += 120; /* copies of one content do not push out all others */
        }
        if (rank > victim_rank) {
            victim_rank = rank;
            victim = index;
        }
    }
    if (set[victim] != 0 && CACHE_PBA(set[victim]) != pba)
        store_count(store, STORE_COUNTER_CACHE_EVICTIONS, 1);
    atoll_set64(store->journal, &set[victim], print.high >> 41 << 41 | (uint64_t)(count > 1) << 40 | (uint64_t)age << 36 | pba);
    STORE_ADD(store, cache_clock, 1);
}

void store_prefetch_candidates(struct dedup *dedup, struct fingerprint print)
{
    __builtin_prefetch(cache_set(dedup->store, print), 1);
}

void store_prefetch_forget(struct dedup *dedup, uint64_t pba)
{
    const struct fingerprint *print = store_print(dedup->store, pba);
    if (print != 0)
        __builtin_prefetch(cache_set(dedup->store, *print), 1);
}

enum store_want store_want_candidates(struct dedup *dedup, struct fingerprint print)
{
    struct store *store = dedup->store;
    const uint64_t *set = cache_set(store, print);
    enum store_want worst = STORE_HAVE;
    for (uint32_t index = 0; index < STORE_SET_ENTRIES; index++) {
        uint64_t pba = CACHE_PBA(set[index]);
        if (set[index] == 0 || CACHE_TAG(set[index]) != print.high >> 41)
            continue;
        if (store_want_blocks(dedup, &pba, 1) == STORE_WAIT)
            worst = STORE_WAIT;
    }
    return worst;
}

uint32_t store_candidates(struct dedup *dedup, struct fingerprint print, uint64_t *pbas, uint32_t most)
{
    struct store *store = dedup->store;
    const uint64_t *set = cache_set(store, print);
    uint32_t counts[STORE_SET_ENTRIES], found = 0;
    uint64_t sorted[STORE_SET_ENTRIES];
    for (uint32_t index = 0; index < STORE_SET_ENTRIES; index++) {
        uint64_t pba = CACHE_PBA(set[index]);
        if (set[index] == 0 || CACHE_TAG(set[index]) != print.high >> 41)
            continue;
        const struct fingerprint *stored = store_print(store, pba);
        uint32_t count = store_references(dedup, pba);
        if (count == 0 || count == REF_COUNT_MAX || stored == 0 || stored->low != print.low || stored->high != print.high)
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

/* --- Filling the cache after loading ---------------------------------------------------------------------------------- */

/* The pages of a group: counts, and fingerprints of its four quarters. */
static enum store_want want_group(struct store *store, uint64_t group)
{
    uint32_t frame;
    enum store_want worst = store_get(store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, group), false, &frame);
    for (uint64_t part = 0; part < FORMAT_REFS_PER_PAGE / FORMAT_PRINTS_PER_PAGE; part++) {
        uint64_t number = group * (FORMAT_REFS_PER_PAGE / FORMAT_PRINTS_PER_PAGE) + part;
        enum store_want want = store_get(store, FORMAT_PAGE(FORMAT_TREE_PRINTS, 0, number), false, &frame);
        worst = want > worst ? want : worst;
    }
    return worst;
}

bool store_warm_step(struct store *store)
{
    struct store_area *area = store->area;
    /* Its reads must not push out what others need: it waits while pages are short. */
    if (area->warm_left == 0 || store->starved || store->free_count < 2 * WARM_AHEAD)
        return false;
    uint64_t group = area->warm_group;
    while (group != 0 && GROUP_STORED(store->groups[group - 1]) == 0)
        group--;
    if (group == 0) {
        STORE_SET(store, warm_left, 0);
        return true;
    }
    for (uint64_t ahead = 1, next = group - 1; ahead < WARM_AHEAD && next != 0; ahead++, next--)
        if (GROUP_STORED(store->groups[next - 1]) != 0)
            want_group(store, next - 1);
    enum store_want want = want_group(store, group - 1);
    store->starved = false; /* as it was: this is nobody who waits */
    if (want == STORE_WAIT) {
        if (area->warm_group != group)
            STORE_SET(store, warm_group, group);
        return false;
    }
    uint64_t left = area->warm_left;
    for (uint64_t pba = (group - 1) * STORE_GROUP_BLOCKS; pba < group * STORE_GROUP_BLOCKS && left != 0; pba++) {
        const uint32_t *word = store_ref(store, pba);
        if (word == 0 || !REF_IS_COUNT(*word) || store_print(store, pba) == 0)
            continue;
        store_remember_print(store, pba, *word);
        left--;
    }
    STORE_SET(store, warm_left, left);
    STORE_SET(store, warm_group, group - 1);
    return true;
}
