/*
 * Candidates of destage that are read ahead. What is written again far from its first copy tends to come in the neighbourhood that it
 * had then, if not in the same sequence: after a few blocks of one neighbourhood have been wanted its others will be, and one read of
 * all costs little more than one of a single block (Zhu, Li, Patterson: "Avoiding the disk bottleneck in the Data Domain
 * deduplication file system", FAST '08, which does so with fingerprints).
 *
 *   ahead_read        before candidates are loaded: reads neighbourhoods, and notes what else is not in memory
 *   ahead_first_use   a page is used; was it read ahead, and is this the first time?
 *   ahead_loaded      what was read ahead has come
 *   ahead_entered     a page is for something else
 *
 * A neighbourhood is AHEAD_BLOCKS blocks of the device, aligned, so its fingerprints stand in one page. How many of it must have been
 * wanted is decided by how many of those that were read ahead have been of use.
 *
 * After a crash: private to the process, and begins anew; what was being read then is an ordinary page of the cache.
 */
#include <stdlib.h>

#include "services/dedup/datapath.h"

#define AHEAD_BLOCKS 32
/* Neighbourhoods that are remembered; and those read in one step, at all and where requests come one by one. */
#define AHEAD_REMEMBERED 256
#define AHEAD_MOST 8
#define AHEAD_MOST_ALONE 1
/* Blocks of a neighbourhood that must have been wanted: at first, and at most. */
#define AHEAD_WANTED_LEAST 2
#define AHEAD_WANTED_MOST 16
/* Neighbourhoods read for one batch: its candidates are in no more. What is read for it a second time has been pushed out by others of it. */
#define AHEAD_PER_BATCH (ATOLL_IO_BLOCKS / AHEAD_WANTED_LEAST)
/* So many blocks read ahead show whether it pays. */
#define AHEAD_JUDGED 2048

enum { AHEAD_UNUSED = 1, AHEAD_LOADING = 2 };

struct dp_ahead {
    uint64_t number[AHEAD_REMEMBERED]; /* of a neighbourhood + 1 */
    uint8_t misses[AHEAD_REMEMBERED];
    uint8_t *pages;                    /* per cache page: AHEAD_... */
    uint32_t loading;                  /* pages on their way */
    uint32_t wanted;
    uint32_t batch;                    /* neighbourhoods read for one batch */
    uint32_t read, used;               /* since it was last decided */
};

void ahead_attach(struct datapath *dp)
{
    uint64_t pages = dp->arena->cache_pages + dp->arena->tier_pages;
    dp->ahead = calloc(1, sizeof *dp->ahead);
    if (dp->ahead == 0 || (dp->ahead->pages = calloc(pages, 1)) == 0)
        abort(); /* a few KiB at the start of a process */
    dp->ahead->wanted = AHEAD_WANTED_LEAST;
}

void ahead_release(struct datapath *dp)
{
    free(dp->ahead->pages);
    free(dp->ahead);
}

void ahead_entered(struct datapath *dp, uint32_t page) { dp->ahead->pages[page] = 0; }

bool ahead_loaded(struct datapath *dp, uint32_t page)
{
    bool ahead = dp->ahead->pages[page] & AHEAD_LOADING;
    dp->ahead->loading -= ahead;
    dp->ahead->pages[page] &= (uint8_t)~AHEAD_LOADING;
    return ahead;
}

bool ahead_first_use(struct datapath *dp, uint32_t page)
{
    bool first = dp->ahead->pages[page] & AHEAD_UNUSED;
    dp->ahead->pages[page] &= (uint8_t)~AHEAD_UNUSED;
    dp->ahead->used += first;
    atoll_count(dp->domain, DEDUP_COUNTER_AHEAD_USED, first);
    return first;
}

static void judge(struct dp_ahead *ahead)
{
    if (ahead->read < AHEAD_JUDGED)
        return;
    if (ahead->used < ahead->read / 4 && ahead->wanted < AHEAD_WANTED_MOST)
        ahead->wanted *= 2;
    else if (ahead->used > ahead->read / 2 && ahead->wanted > AHEAD_WANTED_LEAST)
        ahead->wanted /= 2;
    ahead->read = ahead->used = 0;
}

/* Reads what is stored in a neighbourhood and not in memory. False: not now. */
static bool read_all(struct datapath *dp, uint64_t neighbourhood)
{
    uint64_t pbas[AHEAD_BLOCKS], failed;
    uint32_t pages[AHEAD_BLOCKS], count = 0;
    struct fingerprint print;
    for (uint64_t pba = neighbourhood * AHEAD_BLOCKS; pba < (neighbourhood + 1) * AHEAD_BLOCKS; pba++)
        if (store_fingerprint(dp->dedup, pba, &print) && cache_find(dp, pba) == DP_NONE)
            pbas[count++] = pba;
    if (count == 0)
        return true;
    if (!cache_load(dp, IO_DESTAGE, pbas, count, pages, &failed))
        return false;
    for (uint32_t index = 0; index < count; index++) {
        dp->ahead->pages[pages[index]] = AHEAD_UNUSED | AHEAD_LOADING;
        cache_unpin(dp, pages[index]);
    }
    dp->ahead->loading += count;
    dp->ahead->read += count;
    atoll_count(dp->domain, DEDUP_COUNTER_AHEAD_READ, count);
    return true;
}

/* Where what is known of a neighbourhood stands. */
static uint32_t remembered(struct dp_ahead *ahead, uint64_t neighbourhood)
{
    uint32_t place = neighbourhood % AHEAD_REMEMBERED;
    if (ahead->number[place] != neighbourhood + 1) {
        ahead->number[place] = neighbourhood + 1;
        ahead->misses[place] = 0;
    }
    return place;
}

/* Neighbourhoods of those candidates that are not in memory, and how many of each. */
struct wanted { uint64_t neighbourhood; uint32_t blocks; };

static uint32_t sum_up(const struct datapath *dp, const uint64_t *pbas, uint32_t count, struct wanted *wanted)
{
    uint32_t found = 0, each;
    for (uint32_t index = 0; index < count; index++) {
        if (cache_find(dp, pbas[index]) != DP_NONE)
            continue;
        for (each = 0; each < found && wanted[each].neighbourhood != pbas[index] / AHEAD_BLOCKS; each++)
            ;
        if (each == found)
            wanted[found++] = (struct wanted){.neighbourhood = pbas[index] / AHEAD_BLOCKS};
        wanted[each].blocks++;
    }
    return found;
}

bool ahead_read(struct datapath *dp, const uint64_t *pbas, uint32_t count)
{
    struct dp_ahead *ahead = dp->ahead;
    struct wanted wanted[ATOLL_IO_BLOCKS];
    assert(count <= ATOLL_IO_BLOCKS);
    uint32_t found = sum_up(dp, pbas, count, wanted), read = 0, most = dp->dedup->behind ? AHEAD_MOST_ALONE : AHEAD_MOST;
    judge(ahead);
    for (uint32_t index = 0; index < found && ahead->batch < AHEAD_PER_BATCH; index++) {
        uint8_t *misses = &ahead->misses[remembered(ahead, wanted[index].neighbourhood)];
        if (*misses + wanted[index].blocks < ahead->wanted)
            continue;
        /* The candidates themselves come first, readers' pages likewise. */
        if (io_room(dp->dedup, IO_DESTAGE) < count + AHEAD_BLOCKS || 8 * (ahead->loading + AHEAD_BLOCKS) > dp->pools[POOL_DISK].count ||
            !read_all(dp, wanted[index].neighbourhood))
            break;
        *misses = 0;
        wanted[index].blocks = 0;
        ahead->batch++;
        if (++read == most)
            return true;
    }
    ahead->batch = 0;
    for (uint32_t index = 0; index < found; index++) {
        uint8_t *misses = &ahead->misses[remembered(ahead, wanted[index].neighbourhood)];
        uint32_t sum = *misses + wanted[index].blocks;
        *misses = (uint8_t)(sum < AHEAD_WANTED_MOST ? sum : AHEAD_WANTED_MOST);
    }
    return false;
}
