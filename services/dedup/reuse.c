#include "services/dedup/reuse.h"

#include <stdbool.h>
#include <stdlib.h>

/* Blocks in the longer log's miniature, at most; the table has room for many more, so few lose their place to another. */
#define MINIATURE_BLOCKS 256
#define TABLE_BITS 11

enum { SHORTER = 0, LONGER = 1, LOGS = 2 };

/* When a block came into a log. */
struct arrival { uint32_t number, ms; };

struct reuse_entry {
    uint64_t key; /* 0: none */
    struct arrival arrivals[LOGS];
};

struct reuse {
    uint64_t limit;          /* keys above it are not looked at */
    uint32_t shift;          /* one key in 2^shift is */
    uint32_t stay_ms;
    uint32_t lengths[LOGS];  /* of the miniatures */
    uint32_t arrived[LOGS];
    uint32_t spared[LOGS], seen; /* since the last count */
    uint32_t result;
    struct reuse_entry table[1 << TABLE_BITS];
};

struct reuse *reuse_open(uint64_t shorter, uint64_t longer, uint64_t stay_ms)
{
    struct reuse *reuse = calloc(1, sizeof *reuse);
    if (reuse == 0)
        return 0;
    while (longer >> reuse->shift > MINIATURE_BLOCKS)
        reuse->shift++;
    reuse->limit = UINT64_MAX >> reuse->shift;
    reuse->stay_ms = stay_ms < UINT32_MAX ? (uint32_t)stay_ms : UINT32_MAX;
    reuse->lengths[SHORTER] = (uint32_t)(shorter >> reuse->shift);
    reuse->lengths[LONGER] = (uint32_t)(longer >> reuse->shift);
    return reuse;
}

void reuse_close(struct reuse *reuse) { free(reuse); }

uint32_t reuse_spared(const struct reuse *reuse) { return reuse->result; }

/* True if the block is in the log, so that its write is spared; else it comes into it. */
static bool meet(struct reuse *reuse, uint32_t log, struct arrival *arrival, bool known, uint32_t now_ms)
{
    if (known && reuse->arrived[log] - arrival->number < reuse->lengths[log] && now_ms - arrival->ms < reuse->stay_ms)
        return true;
    *arrival = (struct arrival){.number = reuse->arrived[log]++, .ms = now_ms};
    return false;
}

static void look(struct reuse *reuse, uint64_t key, uint32_t now_ms)
{
    struct reuse_entry *entry = &reuse->table[key << reuse->shift >> (64 - TABLE_BITS)];
    bool known = entry->key == key;
    entry->key = key;
    for (uint32_t log = 0; log < LOGS; log++)
        reuse->spared[log] += meet(reuse, log, &entry->arrivals[log], known, now_ms);
    if (++reuse->seen <= reuse->lengths[LONGER]) /* as many as the log holds show it */
        return;
    reuse->result = reuse->spared[LONGER] < reuse->spared[SHORTER]
                        ? 0
                        : (reuse->spared[LONGER] - reuse->spared[SHORTER]) * REUSE_ALL / reuse->seen;
    reuse->spared[SHORTER] = reuse->spared[LONGER] = reuse->seen = 0;
}

void reuse_note(struct reuse *reuse, uint32_t volume, uint64_t lba, uint64_t now_ms)
{
    uint64_t key = (((uint64_t)volume << 52 | lba) + 1) * 0x9e3779b97f4a7c15u; /* 2^64 divided by the golden ratio: Knuth, 6.4 */
    if (key <= reuse->limit)
        look(reuse, key, (uint32_t)now_ms);
}
