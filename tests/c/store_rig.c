/* The store between stand-ins: random work against an oracle; killed at any store, after power loss, with flipped bits. */
/* link: -DATOLL_STORE_HOOK ipc/domain.c services/dedup/store.c services/dedup/store_map.c services/dedup/store_space.c services/dedup/store_log.c services/dedup/store_rewrite.c services/dedup/store_checkpoint.c services/dedup/store_load.c services/dedup/store_replay.c services/dedup/store_sums.c services/dedup/store_volume.c services/dedup/store_page.c */
/*
 *   store_rig [MODE [SEED [ROUNDS]]]     modes: work, kill, power, flip, full, time; without: all of them, briefly
 *
 * Stand-ins and oracle: store_rig.h.
 */
#define _GNU_SOURCE
#include "store_rig.h"

/* --- Checks ---------------------------------------------------------------------------------------------------------- */

/* The store's memory agrees with itself and with the rig. Between transactions only. */
static void check_memory(void)
{
    struct store *store = dedup.store;
    struct store_area *area = store->area;
    uint32_t *counted = calloc(geometry.device_blocks, sizeof *counted);
    uint64_t mapped[VOLUMES] = {0}, zeros = 0, leaves = 0, in_flight = 0;
    for (uint64_t frame = 0; frame < area->frames_high; frame++) {
        uint64_t used = 0;
        const uint64_t *entries = store_frame(store, frame);
        for (uint32_t index = 0; index < FORMAT_LEAF_ENTRIES; index++)
            used += entries[index] != 0;
        CHECK(used == store->frame_used[frame]);
        if (store->frame_key[frame] == 0) {
            CHECK(used == 0);
            continue;
        }
        leaves++;
        uint64_t key = store->frame_key[frame] - 1;
        uint32_t volume = FORMAT_KEY_VOLUME(key);
        store->last_key = 0;
        CHECK(store_find_frame(store, volume, FORMAT_KEY_NUMBER(key), false) == frame);
        CHECK(store_map_next_leaf(&dedup, volume, FORMAT_KEY_NUMBER(key), UINT64_MAX) == FORMAT_KEY_NUMBER(key));
        for (uint32_t index = 0; index < FORMAT_LEAF_ENTRIES; index++) {
            uint64_t value = entries[index];
            mapped[volume] += MAP_KIND(value) == MAP_PBA || MAP_KIND(value) == MAP_LOG;
            if (MAP_KIND(value) == MAP_LOG)
                value = datapath_record_base(&dedup, MAP_NUMBER(value));
            zeros += MAP_KIND(value) == MAP_ZERO;
            if (MAP_KIND(value) == MAP_PBA)
                counted[MAP_NUMBER(value)]++;
        }
    }
    CHECK(leaves == area->leaves && leaves + area->frames_free == area->frames_high);
    for (uint32_t volume = 0; volume < VOLUMES; volume++) {
        CHECK(mapped[volume] == rig->public.volumes[volume].mapped_blocks);
        uint64_t seen = 0, end = (uint64_t)1 << 48;
        for (uint64_t leaf = store_map_next_leaf(&dedup, volume, 0, end); leaf < end;
             leaf = store_map_next_leaf(&dedup, volume, leaf + 1, end))
            seen++;
        for (uint64_t frame = 0; frame < area->frames_high; frame++)
            seen -= store->frame_key[frame] != 0 && FORMAT_KEY_VOLUME(store->frame_key[frame] - 1) == volume;
        CHECK(seen == 0);
    }
    for (uint32_t number = 0; number < RECORDS; number++)
        in_flight += rig->records[number].state >= 2;
    CHECK(zeros == area->zero_promises && area->reserved_blocks == zeros + rig->reserved);
    uint64_t sums[6] = {0}, references = 0;
    for (uint64_t group = 0; group < (geometry.device_blocks + STORE_GROUP_BLOCKS - 1) / STORE_GROUP_BLOCKS; group++) {
        uint32_t free_count = 0, pending_count = 0;
        for (uint64_t pba = group * STORE_GROUP_BLOCKS; pba < (group + 1) * STORE_GROUP_BLOCKS; pba++) {
            uint32_t word = store->refs[pba];
            free_count += word == 0;
            pending_count += (word & REF_PENDING) != 0;
            sums[2] += REF_IS_COUNT(word);
            sums[3] += word == REF_METADATA;
            sums[4] += word == REF_QUARANTINED;
            sums[5] += word == REF_IN_FLIGHT;
            references += REF_IS_COUNT(word) ? word : 0;
            if (pba < geometry.device_blocks)
                CHECK((REF_IS_COUNT(word) ? word : 0) == counted[pba]);
            CHECK(store_usable(store, pba) == (word != REF_FIXED));
        }
        CHECK(free_count == GROUP_FREE(store->groups[group]) && pending_count == GROUP_PENDING(store->groups[group]));
        sums[0] += free_count;
        sums[1] += pending_count;
    }
    CHECK(sums[0] == area->free_blocks && sums[1] == area->pending_blocks && sums[2] + sums[5] == area->stored_blocks);
    CHECK(sums[3] == area->metadata_blocks && sums[4] == area->quarantined_blocks && sums[5] == in_flight);
    CHECK(references == area->references);
    free(counted);
    /* A page that is neither dirty nor on its way is on the device as it is in memory. */
    for (uint64_t page = 0; page < store->shape.total; page++) {
        uint8_t image[ATOLL_BLOCK_BYTES];
        bool dirty = store->dirty[page / 64] >> page % 64 & 1;
        uint64_t level = store_page_level(store, page);
        if (page - store->shape.level_base[level] >= store->shape.level_count[level])
            continue; /* a gap in the row */
        for (uint32_t number = 0; number < STORE_BATCHES; number++)
            for (uint64_t index = 0; index < area->batches[number].count; index++)
                dirty |= area->batches[number].page[index] == page;
        if (dirty)
            continue;
        store_page_image(store, page, image);
        const struct format_pointer *pointer = &store->pointers[page];
        if (store_all_zero(image, sizeof image))
            CHECK(pointer->primary == 0);
        else
            CHECK(pointer->checksum == store_checksum(store, FORMAT_SEED_PAGE, page ^ pointer->key, image, sizeof image) &&
                  (page < store->shape.leaves_base || page >= store->shape.level_count[0] ||
                   pointer->key == store_page_key(store, page)));
    }
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

/* After loading: the state is that after one operation in [synced_operation, operation]; it becomes the oracle's. */
static void check_past(void)
{
    uint64_t first = rig->synced_operation, count = rig->operation - first + 1;
    uint8_t *possible = malloc(count), *fits = malloc(count);
    memset(possible, 1, count);
    /* Of all keys at once: the value that each had, and the operations after which it had it. */
    uint64_t (*spans)[3] = malloc((rig->event_count + VOLUMES * KEYS) * sizeof *spans);
    for (uint64_t key = 0; key < VOLUMES * KEYS; key++) {
        uint64_t found = content_of(store_map_get(&dedup, key_volume(key), key_lba(key))), used = 0;
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
    CHECK(state < count);
    /* The future did not happen. */
    rig->operation = first + state;
    while (rig->event_count > 0 && rig->events[rig->event_count - 1].operation > rig->operation)
        rig->event_count--;
    for (uint64_t key = 0; key < VOLUMES * KEYS; key++)
        rig->now[key / KEYS][key % KEYS] = content_of(store_map_get(&dedup, key_volume(key), key_lba(key)));
    free(possible);
    free(fits);
    free(spans);
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
    printf("operations %llu, events %llu, syncs %llu (failed %llu), checkpoints %llu, pages %llu, log blocks %llu, leaves %llu, stored %llu, "
           "references %llu, free %llu, quarantined %llu, metadata %llu\n",
           (unsigned long long)rig->operation, (unsigned long long)rig->event_count, (unsigned long long)rig->counters[64],
           (unsigned long long)rig->counters[65], (unsigned long long)rig->counters[67], (unsigned long long)rig->counters[68],
           (unsigned long long)rig->counters[66], (unsigned long long)area->leaves, (unsigned long long)area->stored_blocks,
           (unsigned long long)area->references, (unsigned long long)area->free_blocks,
           (unsigned long long)area->quarantined_blocks, (unsigned long long)area->metadata_blocks);
}

/* Work, with errors of the device now and then, clean close and reload. */
static void mode_work(uint64_t seed)
{
    start(seed, 4096, 256, false);
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
    start(seed, 2048, seed % 2 == 0 ? 128 : 16 + seed % 48, false); /* with few frames, leaves make room for others */
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
            uint64_t places[2] = {0, 0}, kind = chance(3), pages = 0;
            bool both = chance(2) == 0;
            for (uint64_t page = 0; page < store->shape.total; page++)
                pages += store->pointers[page].primary != 0;
            if (kind == 0 || (kind == 2 && pages == 0) || (kind == 1 && area.log_durable == area.log_start && pages == 0)) {
                kind = 0; /* a root without pages, all of them zeros, has no page to flip */
                places[0] = area.generation & 1;
                places[1] = area.device_blocks - 2 + places[0];
            } else if (kind == 1 && area.log_durable > area.log_start) {
                uint64_t sequence = area.log_start + chance(area.log_durable - area.log_start);
                places[0] = FORMAT_SUPER_BLOCKS + sequence % area.log_blocks;
                places[1] = area.usable_end + sequence % area.log_blocks;
            } else {
                uint64_t page = chance(store->shape.total);
                while (store->pointers[page].primary == 0)
                    page = page + 1 == store->shape.total ? 0 : page + 1;
                places[0] = store->pointers[page].primary;
                places[1] = store->pointers[page].mirror;
            }
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
                for (uint64_t key = 0; key < VOLUMES * KEYS; key++)
                    CHECK(content_of(store_map_get(&dedup, key_volume(key), key_lba(key))) == rig->now[key / KEYS][key % KEYS]);
                close_store();
                for (uint64_t place = 0; place < 2; place++) { /* what was repaired no longer needs the other copy */
                    fresh_arena();
                    load();
                    CHECK(store_state(&dedup) == STORE_READY);
                    CHECK(rig->counters[DEDUP_COUNTER_STORE_FIRST + STORE_COUNTER_PAGES_REPAIRED] <= 1);
                }
            } else if (store_state(&dedup) == STORE_READY) {
                check_memory();
                if (kind == 1) /* the last sync's blocks have nobody to vouch for them */
                    rig->synced_operation = 0;
                check_past();
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

/* While a checkpoint lets go of emptied leaves, whose places the old root still has, all that is granted is written: it must not take
 * the places of the pages to come. */
static void fill_while_leaves_go(uint64_t seed)
{
    enum { LEAVES = 200 };
    uint64_t old, pba, lba = LEAVES * FORMAT_LEAF_ENTRIES;
    make_rig(seed, 2048, 300, false);
    rig->volatile_cache = 0;
    format();
    make_volumes();
    settle();
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint64_t leaf = 0; leaf < LEAVES; leaf++) {
            uint64_t at = leaf * FORMAT_LEAF_ENTRIES;
            if (pass == 0) {
                CHECK(store_reserve(&dedup, 1) && store_map_log(&dedup, 0, at, 0, &old) == ATOLL_OK);
                CHECK(store_allocate(&dedup, 1, &pba) == 1);
                store_place(&dedup, 0, at, 0, pba, content_print(leaf + 2));
            } else {
                store_unmap(&dedup, 0, at, store_map_get(&dedup, 0, at));
            }
            commit();
        }
        store_sync(&dedup);
        STORE_SET(dedup.store, checkpoint_wanted, pass == 0);
        commit();
        settle();
    }
    STORE_SET(dedup.store, checkpoint_wanted, 1);
    commit();
    while (dedup.store->area->leaves != 0) {
        store_step(&dedup);
        run_io();
    }
    for (bool more = true; more; lba++) {
        more = store_reserve(&dedup, 1) && store_map_log(&dedup, 0, lba, 0, &old) == ATOLL_OK;
        if (more) {
            CHECK(store_allocate(&dedup, 1, &pba) == 1);
            store_place(&dedup, 0, lba, 0, pba, (struct fingerprint){lba * 0x9e3779b97f4a7c15u, lba * 0xbf58476d1ce4e5b9u});
        }
        commit();
        while (!store_has_room(&dedup, 1)) {
            commit();
            store_step(&dedup);
            run_io();
        }
    }
    commit();
    settle();
    CHECK(dedup.store->area->checkpoint_phase == CHECKPOINT_IDLE && dedup.store->area->leaves_released == 0);
    drop_rig();
}

/* A device is filled to the last block; every reservation is honoured, checkpoints find their places, deletion frees. */
static void mode_full(uint64_t seed)
{
    char reason[256];
    fill_while_leaves_go(seed);
    start(seed, 1024, 64, false);
    uint64_t content = 1000, filled = 0;
    struct store_space space;
    for (uint32_t round = 0; round < 6; round++) {
        for (uint64_t lba = 0; lba < 2000; lba++) {
            uint64_t old, pba;
            while (!store_has_room(&dedup, 1)) {
                commit();
                settle();
            }
            uint64_t before = store_map_get(&dedup, 0, 100000 + lba);
            if (!store_reserve(&dedup, 1))
                break;
            if (store_map_log(&dedup, 0, 100000 + lba, 0, &old) != ATOLL_OK) {
                store_unreserve(&dedup, 1);
                break;
            }
            set_record(&rig->records[0], (struct record){1, 0, before, 0, 0});
            uint32_t turns = 0;
            while (store_allocate(&dedup, 1, &pba) == 0) {
                CHECK(turns++ < 10);
                store_sync(&dedup);
                commit();
                settle();
            }
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
        CHECK(space.available_blocks <= 4 && space.stored_blocks > 300);
        for (uint64_t lba = 0; round < 5 && lba < 2000; lba++) { /* make room, here and there */
            uint64_t value = store_map_get(&dedup, 0, 100000 + lba);
            if (value == 0 || chance(3) != 0)
                continue;
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
    CHECK(filled > 1000);
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

static double seconds(void) { return (double)atoll_now_ns() / 1e9; }

static void mode_time(void)
{
    enum { BLOCKS = 1 << 17, COUNT = 60000 };
    make_rig(1, BLOCKS, 1024, false);
    rig->volatile_cache = 0;
    format();
    make_volumes();
    settle();
    uint64_t old, pba;
    double begin = seconds();
    double placing = 0;
    for (uint64_t lba = 0; lba < COUNT; lba++) {
        CHECK(store_reserve(&dedup, 1));
        CHECK(store_map_log(&dedup, 0, lba, 0, &old) == ATOLL_OK);
        CHECK(store_allocate(&dedup, 1, &pba) == 1);
        store_place(&dedup, 0, lba, 0, pba, (struct fingerprint){lba * 0x9e3779b97f4a7c15u, lba * 0xbf58476d1ce4e5b9u});
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
        sum += store_map_get(&dedup, 0, index % COUNT);
    printf("map get in sequence: %.1f ns\n", (seconds() - begin) / COUNT / 10 * 1e9);
    begin = seconds();
    for (uint64_t index = 0; index < 10 * COUNT; index++)
        sum += store_map_get(&dedup, 0, index * 7919 % COUNT);
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
        if (strcmp(mode, "time") == 0)
            mode_time();
    }
    return 0;
}
#endif
