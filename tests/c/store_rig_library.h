/* The store's rig as a library for tests/test_store_state.py: one call, one step; -1 and rig_error() if a check failed. */
#ifndef ATOLL_TESTS_STORE_RIG_LIBRARY_H
#define ATOLL_TESTS_STORE_RIG_LIBRARY_H

#define EXPORT __attribute__((visibility("default")))

/* Runs `body`; a failed CHECK comes back here. */
#define TRY(body)           \
    do {                    \
        if (setjmp(failed)) \
            return -1;      \
        body;               \
        commit();           \
        return 0;           \
    } while (0)

EXPORT const char *rig_error(void) { return rig_context; }
EXPORT int rig_start(uint64_t seed, uint64_t blocks, uint64_t frames) { TRY(start(seed, blocks, frames, false)); }
EXPORT void rig_end(void) { drop_rig(); }
EXPORT int rig_write(uint64_t key, uint64_t content) { TRY(write_key(key, content)); }
EXPORT int rig_unmap(uint64_t key, int promise) { TRY(unmap(key, promise)); }
EXPORT int rig_step(void) { TRY(commit(); store_step(&dedup)); }
EXPORT int rig_io(void) { TRY(run_io()); }
EXPORT int rig_settle(void) { TRY(commit(); settle()); }
EXPORT int rig_die(void) { TRY(attach(false); check_memory()); }
EXPORT int rig_check(void) { TRY(check_memory()); }

/* Brings one record to its end: 1, or 0 if there is none for which that can be done now. */
EXPORT int rig_destage(void)
{
    if (setjmp(failed))
        return -1;
    for (uint32_t number = 0; number < RECORDS; number++) {
        struct record *record = &rig->records[number];
        for (uint32_t turn = 0; record->state != 0 && turn < 40; turn++) {
            destage(record);
            place(record);
            commit();
            if (record->state == 0)
                return 1;
        }
    }
    return 0;
}

EXPORT int rig_checkpoint(void) { TRY(STORE_SET(dedup.store, checkpoint_wanted, 1)); }
EXPORT int64_t rig_sync(void)
{
    uint64_t ticket = store_sync(&dedup);
    commit();
    return (int64_t)ticket;
}
EXPORT int64_t rig_synced(void) { return (int64_t)store_synced(&dedup); }

EXPORT int rig_power_loss(uint64_t mode)
{
    TRY({
        power_loss(mode);
        fresh_arena();
        load();
        CHECK(store_state(&dedup) == STORE_READY);
        check_memory();
    });
}

/* Of the persistent value of a key: 0 hole, 1 promised zeros, else its content, read from the device. */
EXPORT int64_t rig_get(uint64_t key)
{
    uint64_t base;
    if (setjmp(failed))
        return -1;
    logged(key, &base);
    return (int64_t)content_of(base);
}

#endif
