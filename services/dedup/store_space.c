/*
 * Space: reference words and their group sums, reservations, allocation of runs.
 *
 * available = data blocks - stored - quarantined - reserved - those kept for overwrites. Metadata pages have places of
 * their own (store_slot.c).
 *
 * Words lie in pages of counts, which are paged; the sum of each page, its group's word, lies in memory for the whole device. A page
 * with blocks in flight or pending stays in memory.
 *
 * After a crash: all of it is in the arena and journaled. After power loss: counts come from pages and log, the rest
 * (in flight, pending, quarantined) is free, group sums come from the device.
 */
#include "services/dedup/store_internal.h"

#define KEPT_MOST 1024       /* blocks kept for overwrites: 4 MiB, or a 64th of a small device */
#define GROUPS_LOOKED 4      /* for a run of a quarter of what is wanted; then four times as many for any */
#define GIVEN_UP_AT_ONCE 256 /* groups whose page of counts cannot be read */
#define QUARANTINE_RUN 65536 /* blocks in one run of the list at most */

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

static uint32_t refs_frame(struct store *store, uint64_t pba)
{
    return store_find(store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, pba / FORMAT_REFS_PER_PAGE));
}

uint32_t *store_ref(struct store *store, uint64_t pba)
{
    uint32_t frame = refs_frame(store, pba);
    return frame == STORE_NO_FRAME ? 0 : (uint32_t *)store_page_memory(store, frame) + pba % FORMAT_REFS_PER_PAGE;
}

bool store_keeps_content(struct store *store, uint64_t pba)
{
    const uint32_t *word = store_ref(store, pba);
    return word != 0 && (REF_IS_COUNT(*word) || ((*word & REF_PENDING) != 0 && !synced(store, *word & ~REF_PENDING)));
}

static void group_change(struct store *store, uint64_t pba, int32_t free_change, int32_t pending_change, int32_t stored_change)
{
    uint64_t *group = &store->groups[pba / STORE_GROUP_BLOCKS];
    uint32_t epoch = pending_change > 0 ? (uint32_t)store->area->epoch & ~REF_PENDING : GROUP_EPOCH(*group);
    uint32_t free_count = GROUP_FREE(*group) + (uint32_t)free_change;
    uint32_t pending_count = GROUP_PENDING(*group) + (uint32_t)pending_change;
    uint32_t stored_count = GROUP_STORED(*group) + (uint32_t)stored_change;
    assert(free_count + pending_count + stored_count <= STORE_GROUP_BLOCKS);
    atoll_set64(store->journal, group, GROUP(free_count, pending_count, stored_count, epoch));
    if (stored_change != 0)
        store_table_dirty(store, store->tables.groups + pba / STORE_GROUP_BLOCKS / FORMAT_GROUPS_PER_PAGE);
}

/* The last reference is gone, or the block in flight will not be placed: free when what freed it is durable. */
static void make_pending(struct store *store, uint64_t pba, uint32_t frame, uint32_t *word)
{
    bool counted = REF_IS_COUNT(*word);
    atoll_set32(store->journal, word, REF_PENDING | ((uint32_t)store->area->epoch & ~REF_PENDING));
    group_change(store, pba, 0, 1, counted ? -1 : 0);
    store_change_live(store, frame, counted ? 1 : 0);
    STORE_ADD(store, pending_blocks, 1);
    STORE_ADD(store, stored_blocks, -1);
    if (!counted)
        STORE_ADD(store, in_flight_blocks, -1);
    if (!store->area->changed)
        STORE_SET(store, changed, 1);
}

/* A count becomes another; or a block in flight gets its first. */
void store_set_ref(struct store *store, uint64_t pba, uint32_t count)
{
    uint32_t frame = refs_frame(store, pba), *word = store_ref(store, pba);
    assert(word != 0 && (REF_IS_COUNT(*word) || REF_IS_IN_FLIGHT(*word)) && count <= REF_COUNT_MAX);
    store_mark_dirty(store, frame);
    if (count == 0) {
        store_forget_print(store, pba);
        datapath_freed(store->dedup, pba);
        make_pending(store, pba, frame, word);
        return;
    }
    if (REF_IS_IN_FLIGHT(*word)) {
        group_change(store, pba, 0, 0, 1);
        store_change_live(store, frame, -1);
        STORE_ADD(store, in_flight_blocks, -1);
    }
    atoll_set32(store->journal, word, count);
}

/* The page of counts of a group that was given up can be read now: what is free there comes back. */
static void take_group_back(struct store *store, uint64_t group, const uint32_t *words)
{
    uint64_t word = store->groups[group];
    uint32_t count = 0, known = GROUP_FREE(word), counted = known + GROUP_PENDING(word) + GROUP_STORED(word);
    uint32_t blocks = store_group_blocks(store, group), left = counted < blocks ? blocks - counted : 0;
    for (uint32_t index = 0; index < FORMAT_REFS_PER_PAGE; index++)
        count += words[index] == 0;
    count = count > known ? count - known : 0;
    if (count > left) /* the group's word came from the device, too */
        count = left;
    if (count > store->area->given_up_blocks)
        count = (uint32_t)store->area->given_up_blocks;
    group_change(store, group * STORE_GROUP_BLOCKS, (int32_t)count, 0, 0);
    STORE_ADD(store, free_blocks, count);
    STORE_ADD(store, quarantined_blocks, -(uint64_t)count);
    STORE_ADD(store, given_up_blocks, -(uint64_t)count);
}

/* Words that no page on the device has: blocks that hold no data, and quarantined ones. */
void store_refs_loaded(struct store *store, uint32_t frame)
{
    uint64_t first = FORMAT_PAGE_NUMBER(store->frames[frame].page) * FORMAT_REFS_PER_PAGE, end = first + FORMAT_REFS_PER_PAGE;
    uint32_t *words = store_page_memory(store, frame); /* nobody has looked at it yet: written directly */
    if (store_group_blocks(store, first / STORE_GROUP_BLOCKS) != FORMAT_REFS_PER_PAGE)
        for (uint64_t pba = first; pba < end; pba++)
            if (!store_usable(store, pba))
                words[pba - first] = REF_FIXED;
    for (uint64_t index = 0; index < store->area->quarantine_count; index++) {
        const struct store_quarantine *run = &store->area->quarantine[index];
        uint64_t from = run->pba > first ? run->pba : first, to = run->pba + run->count < end ? run->pba + run->count : end;
        for (; from < to; from++)
            words[from - first] = REF_QUARANTINED;
    }
    if (store->area->given_up_blocks != 0)
        take_group_back(store, first / STORE_GROUP_BLOCKS, words);
}

bool store_sweep(struct store *store)
{
    struct store_area *area = store->area;
    uint32_t converted = 0, looked = 0;
    uint64_t at = area->sweep_frame, left = area->sweep_left;
    while (left != 0 && looked++ < STORE_SWEEP_FRAMES && converted < STORE_SWEEP_CONVERT) {
        uint32_t frame = (uint32_t)at;
        const struct store_frame *f = &store->frames[frame];
        at = at + 1 == area->geometry.frames ? 0 : at + 1;
        left--;
        if (f->state != FRAME_VALID || f->live == 0 || FORMAT_PAGE_TREE(f->page) != FORMAT_TREE_REFS || FORMAT_PAGE_LEVEL(f->page) != 0)
            continue;
        uint64_t first = FORMAT_PAGE_NUMBER(f->page) * FORMAT_REFS_PER_PAGE;
        uint32_t *words = store_page_memory(store, frame);
        int32_t count = 0;
        for (uint32_t index = 0; index < FORMAT_REFS_PER_PAGE; index++)
            if ((words[index] & REF_PENDING) != 0 && takeable(store, words[index])) {
                atoll_set32(store->journal, &words[index], 0);
                count++;
            }
        if (count == 0)
            continue;
        group_change(store, first, count, -count, 0);
        store_change_live(store, frame, -count);
        STORE_ADD(store, free_blocks, count);
        STORE_ADD(store, pending_blocks, -count);
        converted++;
    }
    STORE_SET(store, sweep_frame, at);
    STORE_SET(store, sweep_left, left);
    return left != 0;
}

/* --- Reservations ---------------------------------------------------------------------------------------------------- */

static int64_t kept_for_overwrites(const struct store *store)
{
    uint64_t part = store->area->data_blocks / 64;
    return (int64_t)(part < KEPT_MOST ? part : KEPT_MOST);
}

int64_t store_available(const struct store *store)
{
    const struct store_area *area = store->area;
    return (int64_t)area->data_blocks - (int64_t)area->stored_blocks - (int64_t)area->quarantined_blocks -
           (int64_t)area->reserved_blocks - kept_for_overwrites(store);
}

static bool reserve(struct store *store, uint64_t blocks, int64_t available)
{
    if (available < 0 || blocks > (uint64_t)available)
        return false;
    if (blocks != 0)
        STORE_ADD(store, reserved_blocks, blocks);
    return true;
}

bool store_reserve(struct dedup *dedup, uint64_t blocks)
{
    struct store *store = dedup->store;
    return reserve(store, blocks, store_available(store) - store->kept_posted);
}

bool store_reserve_overwrite(struct dedup *dedup, uint64_t blocks)
{
    struct store *store = dedup->store;
    return reserve(store, blocks, store_available(store) - store->kept_posted + kept_for_overwrites(store));
}

bool store_reserve_posted(struct dedup *dedup, uint64_t blocks)
{
    struct store *store = dedup->store;
    return reserve(store, blocks, store_available(store) + kept_for_overwrites(store) + (int64_t)store->area->quarantined_blocks);
}

void store_reserve_promised(struct dedup *dedup, uint64_t blocks)
{
    struct store *store = dedup->store;
    STORE_ADD(store, reserved_blocks, blocks);
}

bool store_exhausted(struct dedup *dedup) { return dedup->store->area->free_blocks + dedup->store->area->pending_blocks == 0; }

void store_keep_posted(struct dedup *dedup, uint64_t blocks) { dedup->store->kept_posted = (int64_t)blocks; }

int64_t store_unpromised(struct dedup *dedup) { return store_available(dedup->store); }

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
                                  .metadata_blocks = area->device_blocks - area->data_blocks,
                                  .metadata_used_blocks = 2 * (area->slots - area->slots_free),
                                  .stored_blocks = area->stored_blocks,
                                  .free_blocks = area->free_blocks,
                                  .pending_free_blocks = area->pending_blocks,
                                  .reserved_blocks = area->reserved_blocks,
                                  .references = area->references,
                                  .zero_promises = area->zero_promises,
                                  .quarantined_blocks = area->quarantined_blocks,
                                  .cache_pages = area->geometry.frames,
                                  .cache_held_pages = area->frames_held,
                                  .cache_dirty_pages = area->frames_dirty};
    int64_t available = area->state == STORE_READY ? store_available(dedup->store) : 0;
    space->available_blocks = available > 0 ? (uint64_t)available : 0;
}

bool store_groups_agree(struct dedup *dedup)
{
    const struct store *store = dedup->store;
    const struct store_area *area = store->area;
    uint64_t free_count = 0, pending_count = 0, stored_count = 0;
    for (uint64_t group = 0; group * STORE_GROUP_BLOCKS < area->device_blocks; group++) {
        uint64_t word = store->groups[group];
        if (GROUP_FREE(word) + GROUP_PENDING(word) + GROUP_STORED(word) > store_group_blocks(store, group))
            return false;
        free_count += GROUP_FREE(word);
        pending_count += GROUP_PENDING(word);
        stored_count += GROUP_STORED(word);
    }
    return free_count == area->free_blocks && pending_count == area->pending_blocks &&
           stored_count + area->in_flight_blocks == area->stored_blocks &&
           free_count + pending_count + area->stored_blocks + area->quarantined_blocks == area->data_blocks;
}

/* --- Allocation ------------------------------------------------------------------------------------------------------ */

/* Blocks that nobody gets until what is told of them can be read; that is tried again from now on. */
static void give_up(struct store *store, uint64_t count)
{
    STORE_ADD(store, quarantined_blocks, count);
    STORE_ADD(store, given_up_blocks, count);
    store->regain_ns = store->regain_pause_ns = 0;
}

/* The page of counts of a group cannot be read: its blocks are not handed out. What was promised of them, destage does not find. */
static void give_group_up(struct store *store, uint64_t group)
{
    uint64_t *word = &store->groups[group];
    uint32_t count = GROUP_FREE(*word);
    atoll_set64(store->journal, word, GROUP(0, GROUP_PENDING(*word), GROUP_STORED(*word), GROUP_EPOCH(*word)));
    STORE_ADD(store, free_blocks, -(uint64_t)count);
    give_up(store, count);
}

/* The page of fingerprints `number` cannot be read: places that it is about are not handed out. Their page of counts is in memory. */
static void lay_aside_free(struct store *store, uint64_t number)
{
    uint64_t first = number * FORMAT_PRINTS_PER_PAGE;
    uint32_t frame = refs_frame(store, first), *words = store_ref(store, first);
    int32_t free_count = 0, pending_count = 0;
    for (uint32_t index = 0; index < FORMAT_PRINTS_PER_PAGE; index++) {
        if (!takeable(store, words[index]))
            continue;
        free_count += words[index] == 0;
        pending_count += words[index] != 0;
        atoll_set32(store->journal, &words[index], REF_LAID_ASIDE);
    }
    group_change(store, first, -free_count, -pending_count, 0);
    store_change_live(store, frame, -pending_count);
    STORE_ADD(store, free_blocks, -(uint64_t)free_count);
    STORE_ADD(store, pending_blocks, -(uint64_t)pending_count);
    give_up(store, (uint64_t)(free_count + pending_count));
}

/* The pages of fingerprints of a run of free places, which lies in one group. */
static enum store_want want_notes(struct store *store, uint64_t pba, uint32_t length)
{
    enum store_want worst = STORE_HAVE;
    uint32_t frame;
    for (uint64_t number = pba / FORMAT_PRINTS_PER_PAGE; number <= (pba + length - 1) / FORMAT_PRINTS_PER_PAGE; number++) {
        enum store_want want = store_get(store, FORMAT_PAGE(FORMAT_TREE_PRINTS, 0, number), true, &frame);
        if (want == STORE_LOST) { /* other places in the next step */
            lay_aside_free(store, number);
            store->woken = true;
        }
        worst = want != STORE_HAVE ? STORE_WAIT : worst;
    }
    return worst;
}

/* Places of a group that were laid aside, and whose pages of fingerprints can be read now, come back. */
static enum store_want take_places_back(struct store *store, uint64_t group, uint32_t *words)
{
    int32_t count = 0;
    enum store_want worst = STORE_HAVE;
    for (uint32_t first = 0; first < FORMAT_REFS_PER_PAGE; first += FORMAT_PRINTS_PER_PAGE) {
        uint32_t index = first, end = first + FORMAT_PRINTS_PER_PAGE, frame;
        while (index < end && words[index] != REF_LAID_ASIDE)
            index++;
        if (index == end)
            continue;
        enum store_want want = store_get(store, FORMAT_PAGE(FORMAT_TREE_PRINTS, 0, (group * FORMAT_REFS_PER_PAGE + first) / FORMAT_PRINTS_PER_PAGE),
                                         true, &frame);
        worst = want == STORE_WAIT ? want : worst;
        for (; want == STORE_HAVE && index < end; index++)
            if (words[index] == REF_LAID_ASIDE) {
                atoll_set32(store->journal, &words[index], 0);
                count++;
            }
    }
    if (count == 0)
        return worst;
    group_change(store, group * STORE_GROUP_BLOCKS, count, 0, 0);
    STORE_ADD(store, free_blocks, count);
    STORE_ADD(store, quarantined_blocks, -(uint64_t)count);
    STORE_ADD(store, given_up_blocks, -(uint64_t)count);
    return worst;
}

bool store_regain_step(struct store *store)
{
    const struct store_area *area = store->area;
    uint64_t groups = (area->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS, now;
    if (area->given_up_blocks == 0 || (now = atoll_now_ns()) < store->regain_ns)
        return false;
    /* Pages that were never there are made: as many as one step may change. */
    for (uint32_t looked = 0; looked < STORE_REGAIN_GROUPS && store->regain_group < groups &&
                              store->journal->count < ATOLL_JOURNAL_ENTRIES / 4; looked++, store->regain_group++) {
        uint64_t group = store->regain_group, word = store->groups[group];
        uint32_t frame;
        bool starved = store->starved;
        if (GROUP_FREE(word) + GROUP_PENDING(word) + GROUP_STORED(word) >= store_group_blocks(store, group))
            continue;
        enum store_want want = store_get(store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, group), true, &frame);
        if (want == STORE_HAVE)
            want = take_places_back(store, group, store_page_memory(store, frame));
        store->starved = starved; /* nobody waits for that one */
        if (want == STORE_WAIT) {
            store->regain_ns = now + STORE_RETRY_NS / 64;
            return false;
        }
    }
    if (store->regain_group < groups)
        return true;
    store->regain_group = 0;
    store->regain_pause_ns = 2 * store->regain_pause_ns;
    if (store->regain_pause_ns < STORE_RETRY_NS)
        store->regain_pause_ns = STORE_RETRY_NS;
    if (store->regain_pause_ns > STORE_REGAIN_LAST_NS)
        store->regain_pause_ns = STORE_REGAIN_LAST_NS;
    store->regain_ns = now + store->regain_pause_ns;
    return false;
}

/* Longest run of takeable blocks among [pba, end) of one group, at most `want`. */
static uint32_t run_in(const struct store *store, const uint32_t *words, uint64_t pba, uint64_t end, uint32_t want, uint64_t *found)
{
    uint32_t length = 0, best = 0;
    uint64_t first = pba / STORE_GROUP_BLOCKS * STORE_GROUP_BLOCKS;
    for (; pba < end && best < want; pba++) {
        if (!takeable(store, words[pba - first])) {
            length = 0;
        } else if (++length > best) {
            best = length;
            *found = pba + 1 - length;
        }
    }
    return best;
}

/* A run of at most `want` takeable blocks, looked for from the cursor on, around the device. With `deep` groups are looked into even if
 * their newest freed block cannot be taken yet. The longer the search, the shorter a run is good enough. */
static enum store_want find_run(struct store *store, uint32_t want, bool deep, uint64_t *found, uint32_t *length)
{
    struct store_area *area = store->area;
    uint64_t groups = (area->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS, pba = area->cursor;
    uint32_t looked = 0, given_up = 0;
    *length = 0;
    /* The cursor's group twice: what lies behind the cursor comes last. */
    for (uint64_t visited = 0; visited <= groups; visited++) {
        uint64_t group = pba / STORE_GROUP_BLOCKS, word = store->groups[group], run = 0;
        uint64_t end = (group + 1) * STORE_GROUP_BLOCKS;
        bool worth = GROUP_FREE(word) != 0 || (GROUP_PENDING(word) != 0 && (deep || synced(store, GROUP_EPOCH(word))));
        uint32_t frame;
        if (worth) {
            enum store_want have = store_get(store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, group), true, &frame);
            if (have == STORE_WAIT)
                return *length != 0 ? STORE_HAVE : STORE_WAIT;
            if (have == STORE_LOST) {
                give_group_up(store, group);
                if (++given_up == GIVEN_UP_AT_ONCE) { /* a lost directory is about very many: the others in later steps */
                    store->woken = true;
                    return *length != 0 ? STORE_HAVE : STORE_WAIT;
                }
            } else {
                uint32_t best = run_in(store, store_page_memory(store, frame), pba, end, want, &run);
                if (best > *length) {
                    *length = best;
                    *found = run;
                }
                looked++;
            }
            if (*length == want || (looked > GROUPS_LOOKED && *length >= want / 4 && *length != 0) ||
                (looked > 4 * GROUPS_LOOKED && *length != 0))
                return STORE_HAVE;
        }
        pba = group + 1 == groups ? 0 : end;
    }
    return STORE_HAVE;
}

static enum store_want find_space(struct store *store, uint32_t want, uint64_t *found, uint32_t *length)
{
    const struct store_area *area = store->area;
    *length = 0;
    if (want == 0 || area->free_blocks + area->pending_blocks == 0)
        return STORE_HAVE;
    enum store_want have = find_run(store, want, false, found, length);
    if (have == STORE_HAVE && *length == 0 && area->pending_blocks != 0)
        have = find_run(store, want, true, found, length);
    return have;
}

enum store_want store_want_space(struct dedup *dedup)
{
    struct store *store = dedup->store;
    uint64_t found = 0;
    uint32_t length, frame;
    enum store_want want = find_space(store, ATOLL_IO_BLOCKS, &found, &length);
    if (want == STORE_HAVE && length != 0)
        want = want_notes(store, found, length);
    if (want == STORE_HAVE && length != 0) { /* what comes after it, ahead of time */
        uint64_t groups = (store->area->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS;
        uint64_t next = (found / STORE_GROUP_BLOCKS + 1) % groups;
        bool starved = store->starved;
        if (GROUP_FREE(store->groups[next]) != 0 && !starved)
            store_get(store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, next), true, &frame);
        store->starved = starved; /* nobody waits for that one */
    }
    return want;
}

uint32_t store_allocate(struct dedup *dedup, uint32_t want, uint64_t *pba)
{
    struct store *store = dedup->store;
    struct store_area *area = store->area;
    uint64_t run = 0;
    uint32_t length, from_pending = 0;
    assert(want <= area->reserved_blocks - area->zero_promises);
    if (find_space(store, want, &run, &length) != STORE_HAVE || length == 0)
        return 0;
    uint32_t frame = refs_frame(store, run), *words = store_ref(store, run);
    for (uint32_t index = 0; index < length; index++) {
        from_pending += words[index] != 0;
        atoll_set32(store->journal, &words[index], REF_IN_FLIGHT(area->flush_failures));
    }
    group_change(store, run, (int32_t)(from_pending - length), -(int32_t)from_pending, 0);
    store_change_live(store, frame, (int32_t)(length - from_pending));
    STORE_ADD(store, free_blocks, -(uint64_t)(length - from_pending));
    if (from_pending != 0)
        STORE_ADD(store, pending_blocks, -(uint64_t)from_pending);
    STORE_SET(store, cursor, run + length < area->device_blocks ? run + length : 0);
    STORE_ADD(store, reserved_blocks, -(uint64_t)length);
    STORE_ADD(store, stored_blocks, length);
    STORE_ADD(store, in_flight_blocks, length);
    *pba = run;
    return length;
}

/* Notes blocks that late I/O may hit, so that their page of counts need not stay in memory. False: the list is full. */
static bool list_quarantined(struct store *store, uint64_t pba)
{
    struct store_area *area = store->area;
    struct store_quarantine *last = &area->quarantine[area->quarantine_count == 0 ? 0 : area->quarantine_count - 1];
    if (area->quarantine_count != 0 && last->pba + last->count == pba && last->count < QUARANTINE_RUN) {
        atoll_set64(store->journal, &last->count, last->count + 1);
        return true;
    }
    if (area->quarantine_count == STORE_QUARANTINE)
        return false;
    last = &area->quarantine[area->quarantine_count];
    atoll_set64(store->journal, &last->pba, pba);
    atoll_set64(store->journal, &last->count, 1);
    STORE_ADD(store, quarantine_count, 1);
    return true;
}

void store_abandon(struct dedup *dedup, uint64_t pba, uint32_t count, bool quarantine)
{
    struct store *store = dedup->store;
    for (uint64_t at = pba; at < pba + count; at++) {
        uint32_t frame = refs_frame(store, at), *word = store_ref(store, at);
        assert(word != 0 && REF_IS_IN_FLIGHT(*word));
        if (!quarantine) {
            make_pending(store, at, frame, word);
            continue;
        }
        atoll_set32(store->journal, word, REF_QUARANTINED);
        if (list_quarantined(store, at))
            store_change_live(store, frame, -1);
        STORE_ADD(store, stored_blocks, -1);
        STORE_ADD(store, in_flight_blocks, -1);
        STORE_ADD(store, quarantined_blocks, 1);
    }
    STORE_ADD(store, reserved_blocks, count);
}

void store_lay_aside(struct dedup *dedup, uint64_t pba)
{
    struct store *store = dedup->store;
    uint32_t frame = refs_frame(store, pba), *word = store_ref(store, pba);
    assert(word != 0 && REF_IS_IN_FLIGHT(*word));
    atoll_set32(store->journal, word, REF_LAID_ASIDE);
    store_change_live(store, frame, -1);
    STORE_ADD(store, stored_blocks, -1);
    STORE_ADD(store, in_flight_blocks, -1);
    STORE_ADD(store, reserved_blocks, 1);
    give_up(store, 1);
}

bool store_pba_valid(struct dedup *dedup, uint64_t pba) { return store_usable(dedup->store, pba); }

uint32_t store_references(struct dedup *dedup, uint64_t pba)
{
    const uint32_t *word = store_usable(dedup->store, pba) ? store_ref(dedup->store, pba) : 0;
    return word != 0 && REF_IS_COUNT(*word) ? *word : 0;
}
