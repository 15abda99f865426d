/*
 * Posted writes, here: nic has answered them (drivers/nic/posted.c, which says what makes that an acknowledgement); they are passed on to dedup in
 * their order, and nic is told when they have been applied (END). Nobody waits for that, so nbd dozes meanwhile, as dedup does, and is woken for
 * many of them at once.
 *
 * A block that a posted write is on its way to is not looked up in memory, but asked for: dedup lets no later request overtake it.
 *
 * After a crash: counts and buckets are made again from the slots.
 */
#include "services/nbd/transmission.h"

static uint32_t bucket_of(uint32_t volume, uint64_t block)
{
    uint64_t mixed = (block ^ (uint64_t)volume << 40) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(mixed >> 52);
}
_Static_assert(NBD_POSTED_BUCKETS == 1 << 12, "twelve bits");

static void count_buckets(struct nbd *nbd, const struct nbd_slot *slot, int change)
{
    uint64_t first = slot->offset / ATOLL_BLOCK_BYTES;
    for (uint32_t index = 0; index < slot->posted; index++) {
        uint16_t *bucket = &nbd->posted.buckets[bucket_of(slot->volume, first + index)];
        *bucket = (uint16_t)(*bucket + change);
    }
}

void nbd_posted_add(struct nbd *nbd, const struct nbd_slot *slot)
{
    nbd->posted.blocks += slot->posted;
    count_buckets(nbd, slot, 1);
}

void nbd_posted_remove(struct nbd *nbd, const struct nbd_slot *slot)
{
    nbd->posted.blocks -= slot->posted;
    count_buckets(nbd, slot, -1);
}

void nbd_posted_attach(struct nbd *nbd)
{
    nbd->posted = (struct nbd_posted){0};
    for (uint32_t number = 0; number < ATOLL_SLOT_COUNT; number++) {
        const struct nbd_slot *slot = &nbd->area->slots[number];
        if (slot->state == NBD_SLOT_DEDUP && slot->posted != 0)
            nbd_posted_add(nbd, slot);
    }
}

bool nbd_posted_covers(const struct nbd *nbd, uint32_t volume, uint64_t first, uint64_t blocks)
{
    if (nbd->posted.blocks == 0)
        return false;
    for (uint64_t index = 0; index < blocks; index++)
        if (nbd->posted.buckets[bucket_of(volume, first + index)] != 0)
            return true;
    return false;
}
