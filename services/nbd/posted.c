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

static void change(struct nbd *nbd, const struct nbd_slot *slot, int by)
{
    atoll_posted_change(&nbd->posted.set, slot->volume, slot->offset / ATOLL_BLOCK_BYTES, slot->posted, by);
}

void nbd_posted_add(struct nbd *nbd, const struct nbd_slot *slot) { change(nbd, slot, 1); }
void nbd_posted_remove(struct nbd *nbd, const struct nbd_slot *slot) { change(nbd, slot, -1); }

void nbd_posted_attach(struct nbd *nbd)
{
    nbd->posted = (struct nbd_posted){0};
    for (uint32_t number = 0; number < ATOLL_SLOT_COUNT; number++) {
        const struct nbd_slot *slot = &nbd->area->slots[number];
        if (slot->state == NBD_SLOT_DEDUP && slot->posted != 0)
            nbd_posted_add(nbd, slot);
    }
}
