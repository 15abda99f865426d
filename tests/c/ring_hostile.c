/* A peer whose arena holds anything: opening, taking and sleeping stay within bounds, return, and use no entry that cannot be. */
/* link: ipc/domain.c ipc/spin.c */
#define _GNU_SOURCE
#include <time.h>

#include "arena_support.h"

enum { SELF = ATOLL_ROLE_NBD, PEER = ATOLL_ROLE_NIC, ENTRIES = 64 };

int main(int argc, char **argv)
{
    uint64_t random = seed_of(argc, argv), taken = 0, open_rings = 0;
    make_arena(ATOLL_ROLE_KERNEL, 1u << SELF, ENTRIES, 0);
    make_arena(PEER, 1u << SELF, ENTRIES, 0);
    make_arena(SELF, 1u << PEER | 1u << ATOLL_ROLE_KERNEL, ENTRIES, 0);
    char *peer = (char *)(uintptr_t)atoll_arena_address(PEER);
    uint64_t size = arena_bytes[PEER];
    char *good = malloc(size);
    CHECK(good != 0);
    memcpy(good, peer, size);

    for (uint32_t round = 0; round < 3000; round++) {
        struct atoll_arena_header *header = (void *)peer;
        memcpy(peer, good, 8192);
        struct atoll_ring_producer *producer = (void *)(peer + header->tx_offset[SELF]);
        memcpy(producer, good + header->tx_offset[SELF], 4096);
        switch (next_random(&random) % 5) {
        case 0: /* garbage in the header */
            for (uint32_t word = 0; word < 1024; word++)
                if (next_random(&random) % 8 == 0)
                    ((uint64_t *)peer)[word] = next_random(&random);
            break;
        case 1:
            header->tx_offset[SELF] = next_random(&random) % 4 ? size - 4096 * (next_random(&random) % 4) : 0 - 4096ull;
            break;
        case 2:
            producer->entry_count = 1u << next_random(&random) % 32;
            break;
        default:
            break;
        }
        uint32_t head = ((struct atoll_arena_header *)(uintptr_t)atoll_arena_address(SELF))->consumer[PEER].head_committed;
        producer->tail = next_random(&random) % 3 ? (uint32_t)next_random(&random) : head + (uint32_t)next_random(&random) % 70;

        struct atoll_domain domain;
        struct atoll_descriptor message;
        char error[256];
        CHECK(atoll_domain_open(&domain, SELF, round + 1, 1, 0, arena_bytes, error) == 0);
        struct atoll_rx_ring *ring = &domain.rings->rx[PEER];
        open_rings += ring->consumer != 0;
        for (uint32_t count = 0; count < 200 && atoll_domain_take(&domain, PEER, &message); count++)
            taken++;
        CHECK(atoll_domain_pending(&domain, PEER) <= (ring->consumer ? ring->mask + 1 : 0));
        message = (struct atoll_descriptor){.opcode = 1};
        for (uint32_t count = 0; count < 2 * ENTRIES; count++)
            if (!atoll_domain_put(&domain, PEER, &message))
                break;
        atoll_domain_commit(&domain);
        /* An impossible tail that stays is no reason to stay awake: the wait ends by its timeout. */
        if (atoll_domain_pending(&domain, PEER) == 0 && round % 100 == 0)
            CHECK(atoll_domain_sleep(&domain, 0, 100000) == 0);
        free(domain.rings);
        /* Start over with room in our own ring: the peer's head follows. */
        header->consumer[SELF].head = ((struct atoll_ring_producer *)((char *)domain.self + domain.self->tx_offset[PEER]))->tail;
    }
    free(good);
    printf("%llu rings opened, %llu entries taken\n", (unsigned long long)open_rings, (unsigned long long)taken);
    CHECK(taken > 1000 && open_rings > 1000);
    return 0;
}
