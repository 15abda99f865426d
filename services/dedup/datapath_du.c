/*
 * What volumes cost (`atoll du`): one pass over the map for each window of places, in bounded memory.
 *
 *   du_start    begins anew; the last result is gone
 *   du_step     a bounded step; in dedup's turn, behind everything else
 *
 * A word per place of the window says which volume was the last to name it, and whether another one had before. So for each
 * volume, taken in order: its distinct places (what it would cost alone), and how many of these others name too. What
 * is being written meanwhile is counted or not; blocks in the write log have no place yet and count as mapped only.
 *
 * After a crash: all of it is private to the process and gone; who asked asks again (the number tells).
 */
#include <stdlib.h>

#include "services/dedup/datapath.h"

#define WINDOW_PLACES ((uint64_t)1 << 25) /* 128 GiB of device, 64 MiB of memory while it runs */
#define LEAVES_PER_STEP 8
#define OWNER_SEVERAL 0x8000u             /* the rest: volume + 1 */

struct du {
    uint64_t number;
    bool running;
    uint16_t *owners;
    uint64_t window, device_blocks; /* window: its first place */
    uint32_t volume;
    uint64_t leaf;
    uint64_t leaves_done, leaves_before; /* in this window, and in the first one: for the progress */
    uint64_t lost_leaves;
    uint32_t generation[ATOLL_VOLUME_COUNT];
    struct du_volume volumes[ATOLL_VOLUME_COUNT];
};

static struct du *du_of(struct datapath *dp)
{
    if (dp->du == 0)
        dp->du = calloc(1, sizeof *dp->du);
    return dp->du;
}

static void stop(struct du *du)
{
    free(du->owners);
    du->owners = 0;
    du->running = false;
}

int du_start(struct datapath *dp, uint64_t *number)
{
    struct du *du = du_of(dp);
    struct store_space space;
    if (du == 0)
        return ATOLL_ENOMEM;
    stop(du);
    store_space(dp->dedup, &space);
    uint64_t places = space.device_blocks < WINDOW_PLACES ? space.device_blocks : WINDOW_PLACES;
    uint64_t before = du->number;
    *du = (struct du){.number = before + 1, .running = true, .device_blocks = space.device_blocks};
    du->owners = calloc(places, sizeof *du->owners);
    if (du->owners == 0) {
        du->running = false;
        return ATOLL_ENOMEM;
    }
    for (uint32_t volume = 0; volume < ATOLL_VOLUME_COUNT; volume++)
        du->generation[volume] = dp->dedup->public->volumes[volume].generation;
    *number = du->number;
    return ATOLL_OK;
}

static void count_leaf(struct du *du, uint32_t volume, const uint64_t *entries)
{
    struct du_volume *mine = &du->volumes[volume];
    uint16_t me = (uint16_t)(volume + 1);
    bool first_window = du->window == 0;
    for (uint32_t index = 0; index < 512; index++) {
        uint64_t value = entries[index];
        mine->mapped += first_window && (MAP_KIND(value) == MAP_PBA || MAP_KIND(value) == MAP_LOG);
        mine->logged += first_window && MAP_KIND(value) == MAP_LOG;
        uint64_t place = MAP_NUMBER(value) - du->window;
        if (MAP_KIND(value) != MAP_PBA || MAP_NUMBER(value) < du->window || place >= WINDOW_PLACES ||
            MAP_NUMBER(value) >= du->device_blocks)
            continue;
        uint16_t owner = du->owners[place];
        uint32_t last = owner & ~OWNER_SEVERAL;
        if (last == me)
            continue;
        mine->alone++;
        if (last != 0) {
            mine->shared++;
            if (!(owner & OWNER_SEVERAL))
                du->volumes[last - 1].shared++;
            du->owners[place] = me | OWNER_SEVERAL;
        } else {
            du->owners[place] = me;
        }
    }
}

bool du_step(struct datapath *dp)
{
    struct du *du = dp->du;
    if (du == 0 || !du->running || store_state(dp->dedup) != STORE_READY)
        return false;
    for (uint32_t leaves = 0; leaves < LEAVES_PER_STEP; leaves++) {
        if (du->volume >= ATOLL_VOLUME_COUNT) {
            if (du->window == 0)
                du->leaves_before = du->leaves_done;
            du->window += WINDOW_PLACES;
            du->volume = 0;
            du->leaf = du->leaves_done = 0;
            if (du->window >= du->device_blocks) {
                stop(du);
                return true;
            }
            memset(du->owners, 0, WINDOW_PLACES * sizeof *du->owners);
            return true;
        }
        const struct atoll_volume *entry = &dp->dedup->public->volumes[du->volume];
        uint64_t last = 0, next = 0;
        if (entry->state == ATOLL_VOLUME_READY && entry->generation == du->generation[du->volume])
            last = (entry->size_bytes + 512 * DP_BLOCK - 1) / (512 * DP_BLOCK);
        enum store_want want = du->leaf < last ? store_next_leaf(dp->dedup, du->volume, du->leaf, last, &next) : STORE_HAVE;
        if (want == STORE_WAIT)
            return false;
        if (want == STORE_LOST) { /* a directory counts as one */
            du->lost_leaves += du->window == 0;
            du->leaf = next;
            continue;
        }
        if (du->leaf >= last || next >= last) {
            du->volume++;
            du->leaf = 0;
            continue;
        }
        want = store_want_map(dp->dedup, du->volume, next * 512, 512, STORE_LOOK);
        if (want == STORE_WAIT)
            return false;
        const uint64_t *entries = want == STORE_HAVE ? store_map_leaf(dp->dedup, du->volume, next) : 0;
        du->lost_leaves += want == STORE_LOST && du->window == 0;
        if (entries != 0)
            count_leaf(du, du->volume, entries);
        du->leaf = next + 1;
        du->leaves_done++;
    }
    return true;
}

void du_state(struct datapath *dp, struct du_state *state)
{
    const struct du *du = dp->du;
    memset(state, 0, sizeof *state);
    if (du == 0)
        return;
    state->number = du->number;
    state->running = du->running;
    state->windows = (du->device_blocks + WINDOW_PLACES - 1) / WINDOW_PLACES;
    state->windows_done = du->running ? du->window / WINDOW_PLACES : state->windows;
    state->leaves_done = du->leaves_done;
    state->leaves = du->leaves_before;
    state->lost_leaves = du->lost_leaves;
    memcpy(state->volumes, du->volumes, sizeof state->volumes);
}
