/* Two threads: an entry of the look-up table is given to another block, and back, while its first block is looked up. What is found of a
 * block is never another's. */
/* link: ipc/domain.c ipc/spin.c */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "ipc/lookup.c"

enum { CHANGES = 400000, APART = 200 };

#define CHECK(condition) \
    ((condition) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition), exit(1)))

static struct atoll_lookup_entry set[ATOLL_LOOKUP_WAYS] __attribute__((aligned(64)));
static bool over;

/* As services/dedup/datapath_lookup.c does it: place_for, then, after a commit, lookup_committed. */
static void *give(void *context)
{
    const uint64_t *keys = context;
    for (uint64_t change = 0; change < CHANGES; change++) {
        struct atoll_lookup_entry *entry = &set[0];
        atoll_store_relaxed(&entry->value, 0);
        atoll_store_release(&entry->key, keys[change % 2]);
        atoll_store_release(&entry->value, atoll_lookup_value(ATOLL_LOOKUP_PAGE, (uint32_t)(change % 2), (uint32_t)change));
        for (uint32_t pause = 0; pause < APART; pause++)
            atoll_compiler_barrier();
    }
    atoll_store_release(&over, true);
    return 0;
}

int main(void)
{
    uint64_t keys[2] = {atoll_lookup_key(0, 1, 5), atoll_lookup_key(0, 1, 77)};
    struct atoll_looker looker = {.entries = set, .table.set_count = 1};
    uint64_t looks = 0, found = 0;
    pthread_t giver;
    CHECK(pthread_create(&giver, 0, give, keys) == 0);
    for (; !atoll_load_acquire(&over); looks++) {
        uint64_t value = find(&looker, keys[looks % 2]);
        found += value != 0;
        CHECK(value == 0 || atoll_lookup_page(value) == looks % 2);
    }
    CHECK(pthread_join(giver, 0) == 0);
    printf("%llu looks, %llu found\n", (unsigned long long)looks, (unsigned long long)found);
    CHECK(found != 0);
    return 0;
}
