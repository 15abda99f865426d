/* The store between stand-ins: random work against an oracle; killed at any store, after power loss, with flipped bits. */
/* link: -DATOLL_STORE_HOOK ipc/domain.c ipc/spin.c services/dedup/store.c services/dedup/store_cache.c services/dedup/store_page.c services/dedup/store_slot.c services/dedup/store_map.c services/dedup/store_space.c services/dedup/store_print.c services/dedup/store_log.c services/dedup/store_ahead.c services/dedup/store_rewrite.c services/dedup/store_checkpoint.c services/dedup/store_root.c services/dedup/store_load.c services/dedup/store_replay.c services/dedup/store_grow.c services/dedup/store_volume.c services/dedup/store_delete.c */
/*
 *   store_rig [MODE [SEED [ROUNDS]]]     modes: work, kill, power, flip, full, grow, time; without: all of them, briefly
 *
 * Stand-ins and oracle: store_rig.h.
 */
#define _GNU_SOURCE
#include "store_rig.h"

/* --- Checks ---------------------------------------------------------------------------------------------------------- */

/* What a walk over all pages counts. */
static struct {
    uint64_t mapped[ATOLL_VOLUME_COUNT], zeros, map_pages, map_fresh, slots_used;
    uint8_t slots[1 << 16];
    uint32_t *counted;
} walked;

static void walk_leaf(uint64_t number, const uint64_t *entries)
{
    for (uint32_t index = 0; index < FORMAT_LEAF_ENTRIES; index++) {
        uint64_t value = entries[index];
        walked.mapped[FORMAT_LEAF_VOLUME(number)] += MAP_KIND(value) == MAP_PBA || MAP_KIND(value) == MAP_LOG;
        if (MAP_KIND(value) == MAP_LOG)
            value = datapath_record_base(&dedup, MAP_NUMBER(value));
        walked.zeros += MAP_KIND(value) == MAP_ZERO;
        if (MAP_KIND(value) == MAP_PBA)
            walked.counted[MAP_NUMBER(value)]++;
    }
}

/* All that exists below a page, and the page. Pages of the tables lie in no frame. */
static void walk(uint64_t page, struct format_pointer pointer)
{
    uint32_t tree = FORMAT_PAGE_TREE(page), level = FORMAT_PAGE_LEVEL(page);
    if (pointer.slot == 0)
        return;
    bool fresh = pointer.slot == STORE_SLOT_FRESH;
    walked.map_pages += tree == FORMAT_TREE_MAP && !fresh;
    walked.map_fresh += tree == FORMAT_TREE_MAP && fresh;
    if (!fresh) {
        CHECK(pointer.slot < sizeof walked.slots && !walked.slots[pointer.slot]);
        walked.slots[pointer.slot] = 1;
        walked.slots_used += tree != FORMAT_TREE_SLOTS;
    }
    if (level == 0 && (tree == FORMAT_TREE_VOLUMES || tree == FORMAT_TREE_GROUPS || tree == FORMAT_TREE_SLOTS))
        return;
    uint8_t image[ATOLL_BLOCK_BYTES] __attribute__((aligned(8)));
    const void *found = peek(page);
    CHECK(found != 0);
    memcpy(image, found, sizeof image);
    for (uint32_t index = 0; level != 0 && index < FORMAT_POINTERS; index++)
        walk(FORMAT_PAGE(tree, level - 1, FORMAT_PAGE_NUMBER(page) * FORMAT_POINTERS + index),
             ((const struct format_pointer *)(const void *)image)[index]);
    if (level == 0 && tree == FORMAT_TREE_MAP)
        walk_leaf(FORMAT_PAGE_NUMBER(page), (const uint64_t *)(const void *)image);
}

static void check_frames(void)
{
    struct store *store = dedup.store;
    uint64_t frames = geometry.frames, dirty = 0, held = 0, loading = 0;
    uint32_t *children = calloc(frames, sizeof *children), *held_children = calloc(frames, sizeof *held_children);
    for (uint32_t frame = 0; frame < frames; frame++) {
        const struct store_frame *f = &store->frames[frame];
        if (f->state == FRAME_FREE)
            continue;
        loading += f->state == FRAME_LOADING;
        dirty += (f->flags & FRAME_DIRTY) != 0;
        held += (f->flags & FRAME_HELD) != 0;
        if (f->state == FRAME_VALID)
            CHECK(store_find(store, f->page) == frame);
        if (f->parent == STORE_NO_FRAME) {
            CHECK(FORMAT_PAGE_LEVEL(f->page) == format_levels[FORMAT_PAGE_TREE(f->page)]);
            continue;
        }
        CHECK(store->frames[f->parent].state == FRAME_VALID);
        CHECK(store->frames[f->parent].page ==
              FORMAT_PAGE(FORMAT_PAGE_TREE(f->page), FORMAT_PAGE_LEVEL(f->page) + 1, FORMAT_PAGE_NUMBER(f->page) / FORMAT_POINTERS));
        children[f->parent]++;
        held_children[f->parent] += (f->flags & FRAME_HELD) != 0;
    }
    for (uint32_t frame = 0; frame < frames; frame++) {
        const struct store_frame *f = &store->frames[frame];
        if (f->state == FRAME_FREE)
            continue;
        CHECK(f->children == children[frame] && f->held_children == held_children[frame]);
        bool must = (f->flags & (FRAME_DIRTY | FRAME_WRITING | FRAME_WRITTEN)) != 0 || f->live != 0 || held_children[frame] != 0;
        CHECK(must == ((f->flags & FRAME_HELD) != 0));
        if (f->state != FRAME_VALID || FORMAT_PAGE_LEVEL(f->page) != 0)
            continue;
        uint32_t live = 0;
        for (uint32_t index = 0; FORMAT_PAGE_TREE(f->page) == FORMAT_TREE_MAP && index < FORMAT_LEAF_ENTRIES; index++)
            live += MAP_KIND(((const uint64_t *)store_page_memory(store, frame))[index]) == MAP_LOG;
        for (uint32_t index = 0; FORMAT_PAGE_TREE(f->page) == FORMAT_TREE_REFS && index < FORMAT_REFS_PER_PAGE; index++) {
            uint32_t word = ((const uint32_t *)store_page_memory(store, frame))[index];
            live += (word & REF_PENDING) != 0 || REF_IS_IN_FLIGHT(word);
        }
        if (store->area->quarantine_count < STORE_QUARANTINE)
            CHECK(live == f->live);
    }
    CHECK(dirty == store->area->frames_dirty && held == store->area->frames_held);
    CHECK((uint64_t)__builtin_popcountll(store->bounce_busy) == loading);
    free(children);
    free(held_children);
}

/* The store's memory agrees with itself, with the device and with the rig. Between transactions only. */
static void check_memory(void)
{
    struct store *store = dedup.store;
    struct store_area *area = store->area;
    uint64_t in_flight = 0;
    check_frames();
    memset(&walked, 0, sizeof walked);
    walked.counted = calloc(geometry.device_blocks, sizeof *walked.counted);
    for (uint32_t tree = 0; tree < FORMAT_TREES; tree++)
        walk(FORMAT_PAGE(tree, format_levels[tree], 0), area->roots[tree]);
    CHECK(walked.map_pages == area->map_pages && walked.map_fresh == area->map_fresh);
    for (uint32_t volume = 0; volume < VOLUMES; volume++)
        CHECK(walked.mapped[volume] == rig->public.volumes[volume].mapped_blocks);
    /* Slots: the pages of a batch that is on its way have places that nobody points to yet. */
    for (uint32_t number = 0; number < STORE_BATCHES; number++)
        for (uint64_t index = 0; index < area->batches[number].count; index++) {
            uint64_t slot = area->batches[number].slot + index;
            walked.slots[slot] = 1;
        }
    uint64_t free_slots = 0, retired = 0;
    for (uint64_t slot = 0; slot < area->slots; slot++) {
        bool bit = store->slot_bits[slot / 64] >> slot % 64 & 1, next = store->slot_next[slot / 64] >> slot % 64 & 1;
        bool own = slot % FORMAT_SLOTS_PER_PAGE < FORMAT_SLOTS_RESERVED;
        CHECK(own ? bit && !next : next == walked.slots[slot]);
        CHECK(bit || !next);
        free_slots += !bit;
        retired += bit && !next && !own;
    }
    CHECK(free_slots == area->slots_free && retired == area->previous_count);
    for (uint32_t number = 0; number < RECORDS; number++)
        in_flight += rig->records[number].state >= 2;
    CHECK(walked.zeros == area->zero_promises && area->reserved_blocks == walked.zeros + rig->reserved);
    uint64_t sums[6] = {0}, references = 0, mapped = 0;
    for (uint64_t group = 0; group < (area->device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS; group++) {
        uint32_t free_count = 0, pending_count = 0, stored_count = 0;
        uint32_t frame = store_find(store, FORMAT_PAGE(FORMAT_TREE_REFS, 0, group));
        const uint32_t *words = peek(FORMAT_PAGE(FORMAT_TREE_REFS, 0, group));
        for (uint64_t pba = group * STORE_GROUP_BLOCKS; pba < (group + 1) * STORE_GROUP_BLOCKS; pba++) {
            uint32_t word = words == 0 ? 0 : words[pba % STORE_GROUP_BLOCKS];
            if (frame == STORE_NO_FRAME) { /* as it will be when it is read */
                CHECK(word == 0 || REF_IS_COUNT(word));
                if (!store_usable(store, pba))
                    word = REF_FIXED;
                for (uint64_t run = 0; run < area->quarantine_count; run++)
                    if (pba - area->quarantine[run].pba < area->quarantine[run].count)
                        word = REF_QUARANTINED;
            }
            free_count += word == 0;
            pending_count += (word & REF_PENDING) != 0;
            stored_count += REF_IS_COUNT(word);
            sums[4] += word == REF_QUARANTINED;
            sums[5] += REF_IS_IN_FLIGHT(word);
            references += REF_IS_COUNT(word) ? word : 0;
            if (pba < area->device_blocks)
                CHECK((REF_IS_COUNT(word) ? word : 0) == walked.counted[pba]);
            CHECK(store_usable(store, pba) == (word != REF_FIXED));
        }
        CHECK(free_count == GROUP_FREE(store->groups[group]) && pending_count == GROUP_PENDING(store->groups[group]) &&
              stored_count == GROUP_STORED(store->groups[group]));
        sums[0] += free_count;
        sums[1] += pending_count;
        sums[2] += stored_count;
    }
    for (uint32_t volume = 0; volume < ATOLL_VOLUME_COUNT; volume++)
        mapped += area->mapped[volume];
    CHECK(sums[0] == area->free_blocks && sums[1] == area->pending_blocks && sums[2] + sums[5] == area->stored_blocks);
    CHECK(sums[4] == area->quarantined_blocks && sums[5] == in_flight && sums[5] == area->in_flight_blocks);
    CHECK(references == area->references && mapped == references);
    free(walked.counted);
}

/* Every key's persistent value is the oracle's. */
static void check_now(void)
{
    for (uint64_t key = 0; key < VOLUMES * KEYS; key++) {
        uint64_t base;
        logged(key, &base);
        CHECK(content_of(base) == rig->now[key / KEYS][key % KEYS]);
    }
}

/* After loading: the state is that of what was written ahead, which nobody was told of; it becomes the oracle's. */
static bool is_ahead(void)
{
    uint64_t expected[VOLUMES * KEYS] = {0};
    if (rig->ahead_count == 0 || rig->synced_operation >= rig->ahead_operation)
        return false;
    for (uint64_t index = 0; index < rig->event_count && rig->events[index].operation <= rig->ahead_operation; index++)
        expected[rig->events[index].key] = rig->events[index].content;
    for (uint64_t index = 0; index < rig->ahead_count; index++)
        expected[rig->ahead[index].key] = rig->ahead[index].content;
    for (uint64_t key = 0; key < VOLUMES * KEYS; key++)
        if (expected[key] != content_of(peek_value(key_volume(key), key_lba(key))))
            return false;
    while (rig->event_count > 0 && rig->events[rig->event_count - 1].operation > rig->ahead_operation)
        rig->event_count--;
    rig->operation = rig->ahead_operation;
    for (uint64_t index = 0; index < rig->ahead_count; index++)
        note(rig->ahead[index].key, rig->ahead[index].content);
    return true;
}

/* After loading: the state is that after one operation in [synced_operation, operation]; it becomes the oracle's. */
static void check_past(void)
{
    uint64_t first = rig->synced_operation, count = rig->operation - first + 1;
    uint8_t *possible = malloc(count), *fits = malloc(count);
    memset(possible, 1, count);
    /* Of all keys at once: the value that each had, and the operations after which it had it. */
    uint64_t (*spans)[3] = malloc((rig->event_count + VOLUMES * KEYS) * sizeof *spans);
    for (uint64_t key = 0; key < VOLUMES * KEYS; key++) {
        uint64_t found = content_of(peek_value(key_volume(key), key_lba(key))), used = 0;
        uint64_t from = 0, content = 0;
        memset(fits, 0, count);
        for (uint64_t index = 0; index < rig->event_count; index++) {
            if (rig->events[index].key != key)
                continue;
            spans[used][0] = from, spans[used][1] = rig->events[index].operation - 1, spans[used++][2] = content;
            from = rig->events[index].operation;
            content = rig->events[index].content;
        }
        spans[used][0] = from, spans[used][1] = rig->operation, spans[used++][2] = content;
        for (uint64_t index = 0; index < used; index++)
            for (uint64_t at = spans[index][0] > first ? spans[index][0] : first; spans[index][2] == found && at <= spans[index][1]; at++)
                fits[at - first] = 1;
        for (uint64_t at = 0; at < count; at++)
            possible[at] &= fits[at];
    }
    uint64_t state = 0;
    while (state < count && !possible[state])
        state++;
    CHECK(state < count || is_ahead());
    rig->ahead_count = 0;
    if (state < count) { /* the future did not happen */
        rig->operation = first + state;
        while (rig->event_count > 0 && rig->events[rig->event_count - 1].operation > rig->operation)
            rig->event_count--;
    }
    for (uint64_t key = 0; key < VOLUMES * KEYS; key++)
        rig->now[key / KEYS][key % KEYS] = content_of(peek_value(key_volume(key), key_lba(key)));
    free(possible);
    free(fits);
    free(spans);
}

static enum store_want want_leaf(uint64_t volume, uint64_t lba, uint64_t unused)
{
    (void)unused;
    return store_want_map(&dedup, (uint32_t)volume, lba, 1, STORE_LOOK);
}

static enum store_want want_block(uint64_t pba, uint64_t b, uint64_t c)
{
    (void)b, (void)c;
    return store_want_prints(&dedup, &pba, 1);
}

/* Reads all keys as a reader would: each is what it should be, or the store says that it is lost. */
static void read_all(void)
{
    for (uint64_t key = 0; key < VOLUMES * KEYS; key++) {
        uint64_t content = rig->now[key / KEYS][key % KEYS];
        store_urgent(&dedup, true);
        if (!wait_for(want_leaf, key_volume(key), key_lba(key), 0)) {
            CHECK(store_want_status(&dedup) == ATOLL_ECORRUPT);
            continue;
        }
        uint64_t value = store_map_get(&dedup, key_volume(key), key_lba(key));
        CHECK((value == 0) == (content == 0) && (MAP_KIND(value) == MAP_ZERO) == (content == ZERO_CONTENT));
        if (content <= ZERO_CONTENT)
            continue;
        if (!wait_for(want_block, MAP_NUMBER(value), 0, 0)) {
            CHECK(store_want_status(&dedup) == ATOLL_ECORRUPT);
            continue;
        }
        struct fingerprint print, wanted = content_print(content);
        CHECK(store_fingerprint(&dedup, MAP_NUMBER(value), &print) && print.low == wanted.low && print.high == wanted.high);
    }
    commit();
}

static void close_store(void)
{
    for (uint32_t turns = 0; turns < 100; turns++) {
        for (uint32_t number = 0; number < RECORDS; number++) {
            if (rig->records[number].state >= 2)
                place(&rig->records[number]);
            else
                destage(&rig->records[number]);
            commit();
        }
        settle();
    }
    for (uint32_t number = 0; number < RECORDS; number++)
        CHECK(rig->records[number].state == 0);
    store_close(&dedup);
    commit();
    settle();
    CHECK(store_closed(&dedup));
}

static void start(uint64_t seed, uint64_t blocks, uint64_t frames, bool shared)
{
    make_rig(seed, blocks, frames, shared);
    format();
    make_volumes();
    settle();
    look_at_syncs();
    commit();
}

/* --- Modes ----------------------------------------------------------------------------------------------------------- */

static void report(void)
{
    const struct store_area *area = dedup.store->area;
    printf("operations %llu, events %llu, syncs %llu (failed %llu), checkpoints %llu, pages %llu, log blocks %llu, map pages %llu, stored %llu, "
           "references %llu, free %llu, quarantined %llu, metadata %llu, ahead %llu\n",
           (unsigned long long)rig->operation, (unsigned long long)rig->event_count, (unsigned long long)rig->counters[64],
           (unsigned long long)rig->counters[65], (unsigned long long)rig->counters[67], (unsigned long long)rig->counters[68],
           (unsigned long long)rig->counters[66], (unsigned long long)area->map_pages, (unsigned long long)area->stored_blocks,
           (unsigned long long)area->references, (unsigned long long)area->free_blocks,
           (unsigned long long)area->quarantined_blocks, (unsigned long long)(area->slots - area->slots_free),
           (unsigned long long)rig->counters[64 + STORE_COUNTER_SYNCS_AHEAD]);
}

/* Work, with errors of the device now and then, clean close and reload. */
static void mode_work(uint64_t seed)
{
    start(seed, 4096, 128 + seed % 130, false);
    for (uint32_t round = 0; round < 3; round++) {
        rig->fail_one_in = round == 1 ? 30 : 0;
        for (uint32_t index = 0; index < 4000; index++) {
            if (index % 1000 == 0)
                turn_knobs();
            operate();
        }
        rig->fail_one_in = 0;
        check_memory();
        check_now();
        report();
        close_store();
        check_memory();
        check_now();
        struct store_space before, after;
        store_space(&dedup, &before);
        fresh_arena();
        load();
        CHECK(store_state(&dedup) == STORE_READY);
        check_memory();
        check_now();
        store_space(&dedup, &after);
        CHECK(after.stored_blocks == before.stored_blocks && after.references == before.references &&
              after.metadata_blocks == before.metadata_blocks);
        rig->event_count = 0; /* room for more */
    }
    drop_rig();
}

/* A child works and dies at some store; the parent takes over, in the state of the last commit; ten times. */
static void mode_kill(uint64_t seed)
{
    start(seed, 2048, 128, true);
    rig->volatile_cache = 0;
    for (uint32_t life = 0; life < 10; life++) {
        uint64_t limit = 1 + (seed * 7919 + life * 104729) % 60000;
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            attach(false);
            hook_left = limit;
            if (life == 3) { /* dies while loading */
                hook_left = UINT64_MAX;
                close_store();
                rig->random += 2;
                fresh_arena();
                hook_left = limit % 5000;
                load();
            }
            turn_knobs();
            for (;;)
                operate();
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status));
        if (WTERMSIG(status) != SIGKILL)
            exit(3);
        attach(false);
        if (store_state(&dedup) == STORE_NEW)
            load();
        if (store_state(&dedup) == STORE_LOADING)
            settle();
        CHECK(store_state(&dedup) == STORE_READY);
        check_memory();
        check_now();
        if (rig->event_count > HISTORY / 2)
            RIG_SET(event_count, 0);
        commit();
    }
    close_store();
    check_memory();
    check_now();
    fresh_arena();
    load();
    CHECK(store_state(&dedup) == STORE_READY);
    check_memory();
    check_now();
    drop_rig();
}

/* Work, then the lights go out in many ways; each is loaded, checked, worked on and closed. */
static void load_after_loss(uint64_t mode)
{
    bool doomed = !store_all_zero(rig->doomed, sizeof rig->doomed);
    if (mode != 7 || doomed) /* 7: only the processes died, the device's cache lives */
        power_loss(mode != 7 ? mode : 1);
    fresh_arena();
    load();
    if (store_state(&dedup) != STORE_READY)
        fprintf(stderr, "%s: %s\n", rig_context, store_reason(&dedup));
    CHECK(store_state(&dedup) == STORE_READY);
    check_memory();
    check_past();
    rig->synced_operation = rig->operation; /* loading flushed */
}

static void mode_power(uint64_t seed, uint32_t states)
{
    start(seed, 2048, 128 + seed % 100, false);
    for (uint32_t round = 0; round < 12; round++) {
        rig->fail_one_in = round % 4 == 3 ? 50 : 0;
        rig->fail_flush_one_in = round % 4 == 1 ? 3 : 0;
        uint64_t operations = 50 + chance(1500);
        turn_knobs();
        if (round % 3 == 2) /* the log fills up while a checkpoint does not end */
            rig->hold = 1 + (chance(2) == 0 ? STORE_IO_PAGES : STORE_IO_SUPER);
        commit();
        if (rig->fail_flush_one_in != 0)
            rig->sync_one_in = rig->checkpoint_one_in = 1;
        for (uint64_t index = 0; index < operations; index++)
            operate();
        if (round % 2 == 1) { /* a flush, tried until it is good, and then nothing */
            for (uint32_t number = 0; number < RECORDS; number++)
                for (uint32_t half = 0; half < 2; half++)
                    place(&rig->records[number]);
            ask_sync();
            commit();
            settle();
            look_at_syncs();
            commit();
        }
        for (uint32_t trial = 0; trial < states; trial++) {
            pid_t child = fork();
            CHECK(child >= 0);
            if (child == 0) {
                rig->fail_one_in = rig->fail_flush_one_in = 0;
                rig->random += 2 * trial + 2;
                for (int warm = 0; warm < 8; warm++)
                    chance(2);
                snprintf(rig_context, sizeof rig_context, "power: seed %llu round %u trial %u", (unsigned long long)seed, round, trial);
                load_after_loss((trial + round) % 8);
                for (uint32_t again = 0; again < 2; again++) { /* and again, from what that left */
                    turn_knobs();
                    for (uint64_t index = chance(chance(2) == 0 ? 20 : 200); index > 0; index--)
                        operate();
                    if (chance(2) == 0) {
                        ask_sync();
                        commit();
                        settle();
                        look_at_syncs();
                    }
                    load_after_loss(chance(8));
                }
                for (uint32_t index = 0; index < 100; index++)
                    operate();
                close_store();
                fresh_arena();
                load();
                CHECK(store_state(&dedup) == STORE_READY);
                check_now();
                _exit(0);
            }
            int status;
            CHECK(waitpid(child, &status, 0) == child);
            if (status != 0) {
                fprintf(stderr, "power: seed %llu round %u trial %u failed\n", (unsigned long long)seed, round, trial);
                exit(1);
            }
        }
    }
    drop_rig();
}

/* Bits flip in metadata blocks: in one copy it is repaired, in both it is refused or (end of the log) an earlier durable state. */
static void mode_flip(uint64_t seed, uint32_t trials)
{
    start(seed, 2048, 128, false);
    for (uint32_t index = 0; index < 3000; index++)
        operate();
    ask_sync();
    commit();
    settle();
    look_at_syncs();
    commit();
    check_now();
    flush_device();
    for (uint32_t trial = 0; trial < trials; trial++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            const struct store *store = dedup.store;
            struct store_area area = *store->area;
            rig->random += 2 * trial + 2;
            for (int warm = 0; warm < 8; warm++)
                chance(2);
            snprintf(rig_context, sizeof rig_context, "flip: seed %llu trial %u", (unsigned long long)seed, trial);
            uint64_t places[2] = {0, 0}, kind = chance(3), slots = 0, slot;
            bool both = chance(2) == 0;
            /* A page of the root that is durable: any slot in use, and those of the slot tree. */
            for (slot = 0; slot < area.slots; slot++)
                slots += store->slot_bits[slot / 64] >> slot % 64 & 1;
            if (kind == 1 && area.log_durable > area.log_start) {
                uint64_t sequence = area.log_start + chance(area.log_durable - area.log_start);
                places[0] = FORMAT_SUPER_BLOCKS + sequence % area.log_blocks;
                places[1] = area.log_second + sequence % area.log_blocks;
            } else if (kind == 0) {
                places[0] = area.generation & 1;
                places[1] = area.device_blocks - 2 + places[0];
            } else {
                uint64_t left = chance(slots);
                for (slot = 1; left != 0 || slot == 1; slot++)
                    left -= left != 0 && (store->slot_bits[slot / 64] >> slot % 64 & 1);
                places[0] = store_slot_pba(store, slot - 1, 0);
                places[1] = store_slot_pba(store, slot - 1, 1);
                kind = 2;
            }
            flipped = true;
            uint64_t copy = chance(2), flips = 1 + chance(3);
            uint64_t span = kind == 0 ? FORMAT_SUPER_BYTES : ATOLL_BLOCK_BYTES;
            for (uint64_t each = 0; each < 2; each++)
                if (both || each == copy)
                    for (uint64_t flip = 0; flip < flips; flip++)
                        device[places[each] * ATOLL_BLOCK_BYTES + chance(span)] ^= (uint8_t)(1u << chance(8));
            if (both && chance(4) == 0) /* not even a trace */
                for (uint64_t each = 0; each < 2; each++)
                    memset(device + places[each] * ATOLL_BLOCK_BYTES, 0, ATOLL_BLOCK_BYTES);
            fresh_arena();
            load();
            if (!both) {
                CHECK(store_state(&dedup) == STORE_READY);
                check_memory();
                read_all();
                close_store();
                for (uint64_t place = 0; place < 2; place++) { /* what was repaired no longer needs the other copy */
                    fresh_arena();
                    load();
                    CHECK(store_state(&dedup) == STORE_READY);
                    CHECK(rig->counters[DEDUP_COUNTER_STORE_FIRST + STORE_COUNTER_PAGES_REPAIRED] <= 1);
                }
            } else if (store_state(&dedup) == STORE_READY) {
                if (kind == 1) { /* the last sync's blocks have nobody to vouch for them */
                    check_memory();
                    rig->synced_operation = 0;
                    check_past();
                } else {
                    read_all(); /* what lies in a damaged page is refused, the rest is right */
                }
            } else {
                CHECK(store_state(&dedup) == STORE_FAILED && store_reason(&dedup)[0] != 0);
            }
            _exit(0);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child);
        if (status != 0) {
            fprintf(stderr, "flip: seed %llu trial %u failed\n", (unsigned long long)seed, trial);
            exit(1);
        }
    }
    drop_rig();
}

/* Places for pages of the map run out: who needs one more is refused, others go on; emptied leaves give theirs back. */
static void run_out_of_pages(uint64_t seed)
{
    uint64_t old, pba, leaves = 0;
    make_rig(seed, 2048, 128, false);
    rig->volatile_cache = 0;
    format();
    make_volumes();
    settle();
    for (uint32_t round = 0; round < 3; round++) {
        uint64_t made = 0;
        for (;; made++) {
            uint64_t at = made * FORMAT_LEAF_ENTRIES;
            if (!have_change(0, at, STORE_LOG, 0, 0))
                break;
            CHECK(store_reserve(&dedup, 1) && store_map_log(&dedup, 0, at, 0, &old) == ATOLL_OK);
            set_record(&rig->records[0], (struct record){1, 0, 0, 0, 0}); /* its base, should a checkpoint ask */
            CHECK(wait_for(want_space, 0, 0, 0) && store_allocate(&dedup, 1, &pba) == 1);
            CHECK(have_change(0, at, STORE_CHANGE, 0, pba) && store_has_room(&dedup, 1));
            store_place(&dedup, 0, at, 0, pba, content_print(made + 2));
            set_record(&rig->records[0], (struct record){0});
            commit();
            store_step(&dedup);
            run_io();
        }
        CHECK(store_want_status(&dedup) == ATOLL_ENOSPC && made >= 40 && (leaves == 0 || made == leaves));
        leaves = made;
        CHECK(have_change(0, 1, STORE_LOG, 0, 0)); /* an entry of a leaf that is there */
        commit(); /* who finds no place for a page asks for a checkpoint */
        settle();
        for (uint64_t leaf = 0; leaf < made; leaf++) {
            uint64_t base = peek_value(0, leaf * FORMAT_LEAF_ENTRIES);
            while (!store_has_room(&dedup, 1)) {
                commit();
                settle();
            }
            CHECK(have_change(0, leaf * FORMAT_LEAF_ENTRIES, STORE_LOOK, base, 0));
            store_unmap(&dedup, 0, leaf * FORMAT_LEAF_ENTRIES, base);
            commit();
        }
        settle();
        for (uint32_t each = 0; each < 2; each++) { /* the first writes zeros, the second has no more of the old root */
            STORE_SET(dedup.store, checkpoint_wanted, 1);
            commit();
            settle();
        }
        CHECK(dedup.store->area->map_pages <= 1);
    }
    drop_rig();
}

/* A block that cannot take one more reference is not offered, and not shared: its content is written again. */
static void reach_the_reference_limit(void)
{
    uint64_t key = key_of(0, 0), base, pba[4];
    make_rig(1, 2048, 128, false);
    format();
    make_volumes();
    write_key(key, 7);
    for (uint32_t turns = 0; turns < 40; turns++) {
        destage(&rig->records[0]);
        place(&rig->records[0]);
        commit();
        settle();
    }
    CHECK(logged(key, &base) == 0 && content_of(base) == 7);
    CHECK(store_candidates(&dedup, content_print(7), pba, 4) == 1 && pba[0] == MAP_NUMBER(base));
    uint32_t *word = store_ref(dedup.store, pba[0]);
    *word = REF_COUNT_MAX;
    CHECK(have_change(0, key_lba(1), STORE_CHANGE, 0, pba[0]));
    CHECK(store_candidates(&dedup, content_print(7), pba, 4) == 0);
    CHECK(!store_share(&dedup, 0, key_lba(1), 0, MAP_NUMBER(base)) && *word == REF_COUNT_MAX);
    *word = REF_COUNT_MAX - 1;
    CHECK(store_share(&dedup, 0, key_lba(1), 0, MAP_NUMBER(base)) && *word == REF_COUNT_MAX);
    commit();
    drop_rig();
}

/* A device is filled to the last block; every reservation is honoured, checkpoints find their places, deletion frees. */
static void mode_full(uint64_t seed)
{
    char reason[256];
    run_out_of_pages(seed);
    reach_the_reference_limit();
    start(seed, 1024, 128, false);
    uint64_t content = 1000, filled = 0, refused = 0, overwritten = 0;
    struct store_space space;
    bool last = false;
    for (uint32_t round = 0; !last; round++) {
        for (uint64_t lba = 0; lba < 2000; lba++) {
            uint64_t old, pba;
            while (!store_has_room(&dedup, 1)) {
                commit();
                settle();
            }
            uint64_t before = peek_value(0, 100000 + lba);
            CHECK(have_change(0, 100000 + lba, STORE_LOG, 0, 0));
            /* A few blocks are kept for what frees one. */
            if (!store_reserve(&dedup, 1) && (before == 0 || !store_reserve_overwrite(&dedup, 1))) {
                refused++;
                continue;
            }
            CHECK(store_map_log(&dedup, 0, 100000 + lba, 0, &old) == ATOLL_OK);
            set_record(&rig->records[0], (struct record){1, 0, before, 0, 0});
            uint32_t turns = 0;
            while (wait_for(want_space, 0, 0, 0) && store_allocate(&dedup, 1, &pba) == 0) {
                CHECK(turns++ < 10);
                store_sync(&dedup);
                commit();
                settle();
            }
            CHECK(have_change(0, 100000 + lba, STORE_CHANGE, before, pba));
            overwritten += before != 0 && dedup.store->area->free_blocks + dedup.store->area->pending_blocks < 20;
            store_place(&dedup, 0, 100000 + lba, before, pba, content_print(content++));
            set_record(&rig->records[0], (struct record){0});
            filled++;
            bool step = chance(5) == 0, io = chance(3) == 0;
            commit();
            if (step)
                store_step(&dedup);
            if (io)
                run_io();
        }
        commit();
        STORE_SET(dedup.store, checkpoint_wanted, 1);
        commit();
        settle();
        check_memory();
        store_space(&dedup, &space);
        CHECK(space.available_blocks == 0 && space.stored_blocks > 300 && refused != 0);
        CHECK(round < 12);
        last = round >= 5 && overwritten > 100; /* one seed of thousands needs another round */
        for (uint64_t lba = 0; !last && lba < 2000; lba++) { /* make room, here and there */
            uint64_t value = peek_value(0, 100000 + lba);
            if (value == 0 || chance(3) != 0)
                continue;
            CHECK(have_change(0, 100000 + lba, STORE_LOOK, value, 0));
            store_unmap(&dedup, 0, 100000 + lba, value);
            commit();
            if (!store_has_room(&dedup, 1)) {
                commit();
                settle();
            }
        }
        commit();
        settle();
    }
    CHECK(filled > 1000 && overwritten > 100);
    CHECK(store_volume_delete(&dedup, 0, reason) == ATOLL_OK);
    commit();
    CHECK(store_volume_delete(&dedup, 0, reason) == ATOLL_ENOENT);
    store_step(&dedup);
    run_io();
    /* Power fails while it is being deleted; then it goes on. */
    uint64_t generation = rig->public.volumes[0].generation;
    store_sync(&dedup);
    commit();
    for (uint32_t turns = 0; turns < 20; turns++) {
        store_step(&dedup);
        run_io();
    }
    flush_device();
    fresh_arena();
    load();
    CHECK(store_state(&dedup) == STORE_READY);
    settle();
    check_memory();
    CHECK(rig->public.volumes[0].state == ATOLL_VOLUME_FREE && rig->public.volumes[0].generation == generation);
    store_sync(&dedup);
    commit();
    settle();
    store_space(&dedup, &space);
    CHECK(space.stored_blocks == 0 && space.references == 0);
    CHECK(store_volume_create(&dedup, "again", 5, 4096, 0, 0, 0, reason) == ATOLL_OK);
    CHECK(rig->public.volumes[0].generation == generation + 1);
    commit();
    drop_rig();
}

/* The device becomes larger, again and again; the lights go out while the store follows. It is then the old one or the new one, whole. */
static void mode_grow(uint64_t seed)
{
    uint64_t blocks = 1024 + seed % 1500, grown = 0;
    make_growing_rig(seed, blocks, 24000, 128 + seed % 100, false);
    format();
    make_volumes();
    settle();
    look_at_syncs();
    commit();
    while (grown < FORMAT_EXTENTS - 1) {
        for (uint32_t index = 0; index < 400; index++)
            operate();
        if (chance(2) == 0)
            close_store();
        if (chance(3) == 0) /* too little to grow by */
            geometry.device_blocks = blocks + chance(1024);
        else
            geometry.device_blocks = blocks + 1024 + chance(2000);
        geometry.grow = 1;
        snprintf(rig_context, sizeof rig_context, "grow: seed %llu, %llu to %llu", (unsigned long long)seed, (unsigned long long)blocks,
                 (unsigned long long)geometry.device_blocks);
        for (uint32_t losses = (uint32_t)chance(5); losses > 0; losses--) { /* at some moment of loading and growing */
            power_loss(chance(7));
            fresh_arena();
            store_load(&dedup);
            commit();
            for (uint64_t steps = chance(150); steps > 0; steps--) {
                commit();
                store_step(&dedup);
                run_io();
            }
        }
        power_loss(chance(7));
        fresh_arena();
        load();
        if (store_state(&dedup) != STORE_READY)
            fprintf(stderr, "%s: %s\n", rig_context, store_reason(&dedup));
        CHECK(store_state(&dedup) == STORE_READY && !dedup.store->area->root_first);
        bool enough = geometry.device_blocks >= blocks + STORE_GROUP_BLOCKS;
        CHECK(dedup.store->area->device_blocks == (enough ? geometry.device_blocks : blocks));
        grown += enough;
        blocks = dedup.store->area->device_blocks;
        check_memory();
        check_past();
        rig->synced_operation = rig->operation;
        if (chance(2) == 0) { /* what a start without growing finds */
            geometry.grow = 0;
            fresh_arena();
            load();
            CHECK(store_state(&dedup) == STORE_READY && dedup.store->area->device_blocks == blocks);
            check_memory();
        }
        commit();
    }
    /* All of it can be used. */
    for (uint32_t index = 0; index < 2000; index++)
        operate();
    check_memory();
    check_now();
    close_store();
    geometry.device_blocks = blocks + 1024;
    geometry.grow = 1;
    fresh_arena();
    load();
    CHECK(store_state(&dedup) == STORE_FAILED && strstr(store_reason(&dedup), "cannot be grown again") != 0);
    geometry.grow = 0;
    fresh_arena();
    load();
    CHECK(store_state(&dedup) == STORE_READY);
    check_memory();
    check_now();
    drop_rig();
}

static double seconds(void) { return (double)atoll_now_ns() / 1e9; }

static void mode_time(void)
{
    enum { BLOCKS = 1 << 17, COUNT = 60000 };
    make_rig(1, BLOCKS, 4096, false);
    rig->volatile_cache = 0;
    format();
    make_volumes();
    settle();
    uint64_t old, pba;
    double begin = seconds();
    double placing = 0;
    for (uint64_t lba = 0; lba < COUNT; lba++) {
        CHECK(store_reserve(&dedup, 1));
        CHECK(have_change(0, lba, STORE_LOG, 0, 0));
        CHECK(store_map_log(&dedup, 0, lba, 0, &old) == ATOLL_OK);
        set_record(&rig->records[0], (struct record){1, 0, 0, 0, 0});
        CHECK(wait_for(want_space, 0, 0, 0) && store_allocate(&dedup, 1, &pba) == 1);
        CHECK(have_change(0, lba, STORE_CHANGE, 0, pba));
        store_place(&dedup, 0, lba, 0, pba, (struct fingerprint){lba * 0x9e3779b97f4a7c15u, lba * 0xbf58476d1ce4e5b9u});
        set_record(&rig->records[0], (struct record){0});
        atoll_commit(&rig->journal);
        if (lba % 1000 == 999) {
            placing += seconds() - begin;
            settle();
            begin = seconds();
        }
    }
    printf("reserve, log, allocate, place: %.0f ns\n", placing / COUNT * 1e9);
    begin = seconds();
    uint64_t sum = 0;
    for (uint64_t index = 0; index < 10 * COUNT; index++)
        sum += store_want_map(&dedup, 0, index % COUNT, 1, STORE_LOOK) == STORE_HAVE ? store_map_get(&dedup, 0, index % COUNT) : 0;
    printf("map get in sequence: %.1f ns\n", (seconds() - begin) / COUNT / 10 * 1e9);
    begin = seconds();
    for (uint64_t index = 0; index < 10 * COUNT; index++)
        sum += store_want_map(&dedup, 0, index * 7919 % COUNT, 1, STORE_LOOK) == STORE_HAVE ? store_map_get(&dedup, 0, index * 7919 % COUNT) : 0;
    printf("map get at random: %.1f ns (%llu)\n", (seconds() - begin) / COUNT / 10 * 1e9, (unsigned long long)sum);
    begin = seconds();
    attach(false);
    printf("attach: %.0f us\n", (seconds() - begin) * 1e6);
    close_store();
    fresh_arena();
    begin = seconds();
    load();
    printf("load of %u blocks: %.1f ms\n", BLOCKS, (seconds() - begin) * 1e3);
    drop_rig();
}

#ifdef STORE_RIG_LIBRARY
#include "store_rig_library.h"
#else
int main(int count, char **arguments)
{
    const char *mode = count > 1 ? arguments[1] : "all";
    uint64_t seed = count > 2 ? strtoull(arguments[2], 0, 0) : (uint64_t)time(0);
    uint32_t rounds = count > 3 ? (uint32_t)strtoul(arguments[3], 0, 0) : 2;
    bool all = strcmp(mode, "all") == 0;
    printf("store_rig %s %llu %u\n", mode, (unsigned long long)seed, rounds);
    fflush(stdout);
    for (uint32_t round = 0; round < rounds; round++, seed++) {
        snprintf(rig_context, sizeof rig_context, "seed %llu", (unsigned long long)seed);
        if (all || strcmp(mode, "work") == 0)
            mode_work(seed);
        if (all || strcmp(mode, "full") == 0)
            mode_full(seed);
        if (all || strcmp(mode, "kill") == 0)
            mode_kill(seed);
        if (all || strcmp(mode, "power") == 0)
            mode_power(seed, 8);
        if (all || strcmp(mode, "flip") == 0)
            mode_flip(seed, 60);
        if (all || strcmp(mode, "grow") == 0)
            mode_grow(seed);
        if (strcmp(mode, "time") == 0)
            mode_time();
    }
    return 0;
}
#endif
