/*
 * Looking up what lies in memory: blocks that dedup's table names (layout.h, struct atoll_lookup) are read from there without
 * asking dedup. For nbd and nic, each with the uses that it publishes in its own arena.
 *
 *   atoll_lookup_attach   finds the table; there may be none
 *   atoll_lookup_take     where the blocks lie; publishes that they are used
 *   atoll_lookup_confirm  whether that was in time
 *   atoll_lookup_tidy     forgets uses that are over
 *
 * Look up, publish the use, look again (SP-USE). The read happens at the moment of the first look: what the table says then is
 * the last commit's, and a change is told to its client only after it has left the table. Between the looks a page may be
 * given to something else; then its generation has changed, and dedup is asked. After the second look dedup sees the use, until
 * nic is done with the slot.
 *
 * After a crash: uses stay published. Of a step that was rolled back they hold pages until nic is done with the slot's request,
 * which is executed again.
 */
#ifndef ATOLL_IPC_LOOKUP_H
#define ATOLL_IPC_LOOKUP_H

#include "ipc/domain.h"

/* dedup's table, as checked when dedup's incarnation was last new. Private to the process. */
struct atoll_looker {
    const struct atoll_lookup_entry *entries; /* NULL: there is none */
    const uint32_t *generations;
    const struct atoll_nic_public *nic;
    struct atoll_uses *uses;                  /* own */
    struct atoll_lookup table;
    uint32_t incarnation;                     /* of dedup */
    uint32_t tidy_word;
    uint64_t hits;
};

/* Blocks of a volume that a slot's request reads. */
struct atoll_read {
    uint32_t slot, sequence;
    uint32_t volume, generation;
    uint64_t offset; /* bytes */
    uint32_t length; /* bytes, not 0; at most ATOLL_PART_BLOCKS blocks are touched */
};

static inline uint64_t atoll_read_first(const struct atoll_read *read) { return read->offset / ATOLL_BLOCK_BYTES; }
static inline uint64_t atoll_read_blocks(const struct atoll_read *read)
{
    return (read->offset + read->length - 1) / ATOLL_BLOCK_BYTES - atoll_read_first(read) + 1;
}

void atoll_lookup_attach(const struct atoll_domain *domain, struct atoll_looker *looker, struct atoll_uses *uses);
/* A new dedup may have another table. */
static inline bool atoll_lookup_is_stale(const struct atoll_domain *domain, const struct atoll_looker *looker)
{
    const struct atoll_arena_header *dedup = domain->peers[ATOLL_ROLE_DEDUP];
    return dedup != 0 && atoll_load_relaxed(&dedup->incarnation) != looker->incarnation;
}
/* A segment for each block (ATOLL_SEGMENT_DATA or _HOLE). False: dedup must be asked. `taken` is for atoll_lookup_confirm, before which
 * the data must not be used. */
struct atoll_taken {
    uint32_t pages;
    uint32_t generations[ATOLL_PART_BLOCKS];
};
bool atoll_lookup_take(const struct atoll_domain *domain, struct atoll_looker *looker, const struct atoll_read *read,
                       struct atoll_segment *data, uint32_t *count, struct atoll_taken *taken);
/* True: the pages stay as they are until nic is done with the slot. */
bool atoll_lookup_confirm(struct atoll_looker *looker, const struct atoll_read *read, const struct atoll_taken *taken);
/* Once per step: dedup need not look at slots whose uses are over. */
void atoll_lookup_tidy(struct atoll_looker *looker);

#endif
