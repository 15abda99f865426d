/*
 * What dedup's Python asks for between two runs of the loop (dedup.c): volumes, figures, the check, scrub and du.
 */
#include "services/dedup/datapath.h"

/* --- Volumes and figures --------------------------------------------------------------------------------------------------- */

void dedup_format(struct dedup *dedup, uint64_t uuid_low, uint64_t uuid_high)
{
    store_format(dedup, uuid_low, uuid_high);
    atoll_domain_commit(dedup->domain);
}

int dedup_store_state(struct dedup *dedup)
{
    if (store_state(dedup) == STORE_NEW) {
        store_load(dedup);
        atoll_domain_commit(dedup->domain);
    }
    return (int)store_state(dedup);
}

const char *dedup_store_reason(struct dedup *dedup) { return store_reason(dedup); }

static int note_call(struct dedup *dedup, int status, uint64_t call)
{
    if (status == ATOLL_OK)
        atoll_set64(dedup->domain->journal, &dedup->datapath->arena->control_number, call);
    return status;
}

int dedup_volume_create(struct dedup *dedup, const char *name, uint32_t name_bytes, uint64_t size_bytes, uint32_t flags,
                        uint32_t threshold, uint32_t tier_threshold, uint64_t call, char *reason)
{
    return note_call(dedup, store_volume_create(dedup, name, name_bytes, size_bytes, flags, threshold, tier_threshold, reason), call);
}

int dedup_volume_set(struct dedup *dedup, uint32_t volume, uint32_t threshold, uint32_t tier_threshold, uint64_t call, char *reason)
{
    return note_call(dedup, store_volume_set(dedup, volume, threshold, tier_threshold, reason), call);
}

int dedup_volume_resize(struct dedup *dedup, uint32_t volume, uint64_t size_bytes, uint64_t call, char *reason)
{
    return note_call(dedup, store_volume_resize(dedup, volume, size_bytes, reason), call);
}

int dedup_volume_delete(struct dedup *dedup, uint32_t volume, uint64_t call, char *reason)
{
    return note_call(dedup, store_volume_delete(dedup, volume, reason), call);
}

uint64_t dedup_last_call(struct dedup *dedup) { return dedup->datapath->arena->control_number; }

const struct atoll_volume *dedup_volume(struct dedup *dedup, uint32_t volume)
{
    return volume < ATOLL_VOLUME_COUNT ? &dedup->public->volumes[volume] : 0;
}

uint32_t dedup_volume_users(struct dedup *dedup, uint32_t volume)
{
    const struct atoll_nbd_public *public = atoll_nbd_public(dedup->domain);
    uint32_t users = 0;
    if (public == 0)
        return 0;
    for (uint32_t connection = 0; connection < ATOLL_CONNECTION_COUNT; connection++)
        users += atoll_load_relaxed(&public->volume[connection]) == volume + 1;
    return users;
}

void dedup_figures(struct dedup *dedup, struct dedup_figures *figures)
{
    struct datapath *dp = dedup->datapath;
    struct store_space space;
    uint32_t status;
    memset(figures, 0, sizeof *figures);
    figures->store_state = (uint64_t)store_state(dedup);
    if (store_state(dedup) == STORE_READY) {
        store_space(dedup, &space);
        figures->device_blocks = space.device_blocks;
        figures->metadata_blocks = space.metadata_blocks;
        figures->stored_blocks = space.stored_blocks;
        figures->free_blocks = space.free_blocks;
        figures->pending_free_blocks = space.pending_free_blocks;
        figures->reserved_blocks = space.reserved_blocks;
        figures->references = space.references;
        figures->zero_promises = space.zero_promises;
        figures->quarantined_blocks = space.quarantined_blocks;
        figures->available_blocks = space.available_blocks;
        figures->metadata_used_blocks = space.metadata_used_blocks;
        figures->metadata_cache_pages = space.cache_pages;
        figures->metadata_cache_held = space.cache_held_pages;
        figures->metadata_cache_dirty = space.cache_dirty_pages;
        figures->sync_failures = store_sync_failures(dedup, &status);
    }
    figures->nic_pages = dp->arena->nic_pages;
    figures->merge_pages = dp->arena->merge_pages;
    figures->cache_pages = dp->pools[POOL_DISK].count;
    figures->tier_pages = dp->pools[POOL_TIER].count;
    const struct tier_area *tier = dp->tier.area;
    figures->tier_state = tier->state;
    figures->tier_places = tier->places;
    figures->tier_used = tier->used;
    figures->tier_queued = tier->queue_tail - tier->queue_head;
    figures->tier_in_flight = dp->tier.in_flight;
    figures->tier_table_blocks = tier->table_blocks;
    figures->tier_loaded = tier->loaded;
    for (uint32_t copy = 0; copy < TIER_COPIES; copy++)
        figures->tier_copies += tier->copies[copy].state != COPY_FREE;
    figures->log_records = dp->arena->log_records;
    figures->failed_records = dp->arena->failed_records;
    figures->pinned_records = dp->arena->pinned_records;
    figures->merge_free = dp->merge_free_count + dp->merge_freed_count;
    for (uint64_t page = 0; page < dp->pools[POOL_DISK].count; page++) {
        figures->cache_valid += dp->pages[page].state == PAGE_VALID || dp->pages[page].state == PAGE_UNCHECKED;
        figures->cache_loading += dp->pages[page].state == PAGE_LOADING;
        figures->cache_pinned += dp->pages[page].pins != 0;
    }
    figures->waiting = dp->retry_count;
    figures->flushing = dp->flush_count;
    for (uint32_t slot = 0; slot < ATOLL_SLOT_COUNT; slot++)
        figures->accepted += dp->arena->slots[slot].state == SLOT_ACCEPTED;
    for (uint32_t run = 0; run < DP_RUNS; run++)
        figures->active_runs += dp->arena->runs[run].state != RUN_FREE;
}

uint64_t dedup_tier_places(uint64_t device_blocks, uint64_t most) { return format_tier_places(device_blocks, most); }

const char *dedup_tier_reason(struct dedup *dedup) { return dedup->datapath->tier.area->reason; }

uint32_t dedup_check(struct dedup *dedup, char *text, uint64_t bytes)
{
    uint32_t count = datapath_check(dedup->datapath, text, bytes);
    atoll_domain_commit(dedup->domain); /* pages that it asked for */
    return count;
}

void dedup_check_cancel(struct dedup *dedup) { datapath_check_cancel(dedup->datapath); }

/* --- Scrub, du -------------------------------------------------------------------------------------------------------------- */

bool dedup_take_damage(struct dedup *dedup, struct dedup_seen *seen)
{
    struct datapath *dp = dedup->datapath;
    if (dp->damage_count == 0)
        return false;
    const struct dp_damage *first = &dp->damage[0];
    *seen = (struct dedup_seen){.pba = first->pba, .lba = first->lba, .volume = first->volume, .status = first->status};
    memmove(dp->damage, dp->damage + 1, --dp->damage_count * sizeof dp->damage[0]);
    if (dp->damage_count == 0) {
        seen->dropped = dp->damage_dropped;
        dp->damage_dropped = 0;
    }
    return true;
}

bool dedup_scrub_untold(struct dedup *dedup)
{
    bool untold = scrub_untold(dedup->datapath);
    if (untold)
        dedup->datapath->scrub_told = dedup->datapath->arena->scrub.number;
    return untold;
}

void dedup_scrub_start(struct dedup *dedup, uint64_t rate_bytes_s)
{
    scrub_start(dedup->datapath, rate_bytes_s);
    atoll_domain_commit(dedup->domain);
}

void dedup_scrub_cancel(struct dedup *dedup)
{
    scrub_cancel(dedup->datapath);
    atoll_domain_commit(dedup->domain);
}

void dedup_scrub(struct dedup *dedup, struct dedup_scrub *scrub)
{
    const struct dp_scrub *its = &dedup->datapath->arena->scrub;
    struct store_space space = {0};
    if (store_state(dedup) == STORE_READY)
        store_space(dedup, &space);
    *scrub = (struct dedup_scrub){.number = its->number, .state = its->state, .rate_bytes_s = its->rate_bytes_s,
                                  .started_s = its->started_s, .ended_s = its->ended_s, .position = its->position,
                                  .device_blocks = space.device_blocks, .stored_blocks = its->stored_blocks,
                                  .verified_blocks = its->verified_blocks, .changed_blocks = its->changed_blocks,
                                  .damaged_count = its->damaged_count, .verified_pages = its->verified_pages,
                                  .repaired_pages = its->repaired_pages, .lost_pages = its->lost_pages};
}

_Static_assert(sizeof(((struct dedup_damage *)0)->lba) / 8 == DP_SCRUB_REFERRERS, "those that are named");

bool dedup_scrub_damage(struct dedup *dedup, uint32_t index, struct dedup_damage *damage)
{
    const struct dp_scrub *its = &dedup->datapath->arena->scrub;
    if (index >= DP_SCRUB_DAMAGED || index >= its->damaged_count)
        return false;
    const struct dp_scrub_damage *found = &its->damaged[index];
    *damage = (struct dedup_damage){.pba = found->pba, .status = found->status, .referrer_count = found->referrer_count};
    for (uint32_t number = 0; number < DP_SCRUB_REFERRERS; number++) {
        damage->volume[number] = (uint32_t)(found->referrers[number] >> 52);
        damage->lba[number] = found->referrers[number] & (((uint64_t)1 << 52) - 1);
    }
    return true;
}

int dedup_du_start(struct dedup *dedup, uint64_t *number) { return du_start(dedup->datapath, number); }

void dedup_du(struct dedup *dedup, struct du_state *state) { du_state(dedup->datapath, state); }
