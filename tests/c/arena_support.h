/* Arenas at their fixed addresses in anonymous shared memory, for the C tests: children made by fork see the same. */
#ifndef ATOLL_TESTS_ARENA_SUPPORT_H
#define ATOLL_TESTS_ARENA_SUPPORT_H

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "ipc/domain.h"

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                  \
        }                                                                             \
    } while (0)

static uint64_t arena_bytes[ATOLL_ROLE_COUNT];

/* A fresh arena of `role`, with rings of `entries` entries to each role of the mask. Returns its role area. */
static inline void *make_arena(uint32_t role, uint32_t rings_to, uint32_t entries, uint64_t role_bytes)
{
    uint32_t counts[ATOLL_ROLE_COUNT];
    for (uint32_t peer = 0; peer < ATOLL_ROLE_COUNT; peer++)
        counts[peer] = entries;
    uint64_t bytes = atoll_arena_size(rings_to, counts, role_bytes, 0);
    void *at = (void *)(uintptr_t)atoll_arena_address(role);
    void *arena = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(arena == at);
    arena_bytes[role] = bytes;
    uint64_t offset = atoll_arena_format(arena, role, 1, bytes, rings_to, counts, role_bytes, 0, ATOLL_WAKE_FUTEX, -1);
    return (char *)arena + offset;
}

/* xorshift64*: the same numbers for the same seed everywhere. */
static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1du;
}

static inline uint64_t seed_of(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], 0, 0) : (uint64_t)time(0);
    printf("seed %llu\n", (unsigned long long)seed);
    return seed | 1;
}

#endif
