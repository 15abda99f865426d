/*
 * Reads that nbd answers by itself, of blocks that lie in memory (ipc/lookup.h). Which of them posted writes are on their way to nic alone
 * knows (drivers/nic/posted.c): while there are any, dedup is asked, which nobody overtakes.
 */
#include "services/nbd/transmission.h"

bool nbd_lookup(struct nbd *nbd, const struct nbd_slot *slot, struct atoll_segment *data, uint32_t *count)
{
    uint64_t first = slot->offset / ATOLL_BLOCK_BYTES, blocks = (slot->offset + slot->length - 1) / ATOLL_BLOCK_BYTES - first + 1;
    if (blocks > ATOLL_PART_BLOCKS || nbd->looker.entries == 0 || atoll_trace_armed(nbd->domain) || /* a trace shows the long way */
        atoll_load_acquire(&nbd->looker.nic->posting) != 0)
        return false;
    struct atoll_read read = {.slot = atoll_identity_slot(slot->identity),
                              .sequence = atoll_identity_sequence(slot->identity),
                              .volume = slot->volume,
                              .generation = slot->generation,
                              .offset = slot->offset,
                              .length = (uint32_t)slot->length};
    struct atoll_taken taken;
    if (!atoll_lookup_take(nbd->domain, &nbd->looker, &read, data, count, &taken))
        return false;
    ATOLL_CRASH_POINT(nbd->domain, "nbd.use.published");
    return atoll_lookup_confirm(&nbd->looker, &read, &taken);
}
