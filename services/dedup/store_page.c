/*
 * Paging, its interface: what a step is about to look at is in memory, or is asked for. Everything is in memory still, so the
 * answers are simple.
 *
 * After a crash: nothing to do.
 */
#include "services/dedup/store_internal.h"

enum store_want store_want_map(struct dedup *dedup, uint32_t volume, uint64_t lba, uint64_t count, bool change)
{
    (void)dedup, (void)volume, (void)lba, (void)count, (void)change;
    return STORE_HAVE;
}

enum store_want store_want_blocks(struct dedup *dedup, const uint64_t *pbas, uint32_t count)
{
    (void)dedup, (void)pbas, (void)count;
    return STORE_HAVE;
}

enum store_want store_want_prints(struct dedup *dedup, const uint64_t *pbas, uint32_t count)
{
    (void)dedup, (void)pbas, (void)count;
    return STORE_HAVE;
}

enum store_want store_want_candidates(struct dedup *dedup, struct fingerprint print)
{
    (void)dedup, (void)print;
    return STORE_HAVE;
}

enum store_want store_want_space(struct dedup *dedup)
{
    (void)dedup;
    return STORE_HAVE;
}

uint32_t store_want_status(struct dedup *dedup)
{
    (void)dedup;
    return ATOLL_OK;
}

uint64_t store_want_page(struct dedup *dedup)
{
    (void)dedup;
    return 0;
}

bool store_starved(struct dedup *dedup)
{
    (void)dedup;
    return false;
}

void store_urgent(struct dedup *dedup, bool urgent) { (void)dedup, (void)urgent; }

bool store_pressed(struct dedup *dedup)
{
    (void)dedup;
    return false;
}

enum store_want store_next_leaf(struct dedup *dedup, uint32_t volume, uint64_t leaf, uint64_t end, uint64_t *next)
{
    *next = store_map_next_leaf(dedup, volume, leaf, end);
    return STORE_HAVE;
}
