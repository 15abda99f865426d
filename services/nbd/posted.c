/*
 * Posted writes: a WRITE of a few whole blocks is answered here, before dedup has applied it. Its client does not wait for two more
 * domains, and dedup, which dozes meanwhile, is woken for many of them at once.
 *
 * What makes that an acknowledgement (I7):
 *
 *   - memory: the message to dedup and the reply to nic become visible by one commit. The message lies in a ring that outlives both
 *     sides, and then in dedup's arena. nic keeps the pages until END. After the death of all, dedup's next incarnation finds what it
 *     has not applied in nic's arena (atoll_posted).
 *   - space: dedup says how many blocks may be on their way, and keeps as many free for them; 0 when it has no more (SP-POST)
 *   - order: messages arrive in their order, and dedup lets no later request overtake a posted write to the same block. Nor does nbd: a
 *     block that a posted write is on its way to is not looked up in memory, but asked for.
 *
 * FUA, ragged and large writes are not posted, nor is anything while a trace is armed, so that it shows all hops.
 *
 * After a crash: counts and buckets are made again from the slots. `posting` in the public part may say that something is on its way
 * when nothing is, never the reverse.
 */
#include "services/nbd/transmission.h"

static uint32_t bucket_of(uint32_t volume, uint64_t block)
{
    uint64_t mixed = (block ^ (uint64_t)volume << 40) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(mixed >> 52);
}
_Static_assert(NBD_POSTED_BUCKETS == 1 << 12, "twelve bits");
_Static_assert(ATOLL_POSTED_BLOCKS <= 256 && ATOLL_POSTED_WRITE_BLOCKS < ATOLL_POSTED_BLOCKS, "buckets count to 255");

static void count_buckets(struct nbd *nbd, const struct nbd_slot *slot, int change)
{
    uint64_t first = slot->offset / ATOLL_BLOCK_BYTES;
    for (uint32_t index = 0; index < slot->posted; index++) {
        uint8_t *bucket = &nbd->posted.buckets[bucket_of(slot->volume, first + index)];
        *bucket = (uint8_t)(*bucket + change);
    }
}

static void publish(struct nbd *nbd, uint32_t posting)
{
    uint32_t *word = &nbd->area->public.posting;
    if (atoll_load_relaxed(word) != posting)
        atoll_store_release(word, posting);
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
    publish(nbd, nbd->posted.blocks != 0);
}

void nbd_posted_begin(struct nbd *nbd) { nbd->posted.looked = false; }

void nbd_posted_committed(struct nbd *nbd)
{
    if (nbd->posted.blocks == 0)
        publish(nbd, 0);
}

/* How many blocks may be on their way. */
static uint32_t allowed(struct nbd *nbd)
{
    const struct atoll_dedup_public *public = nbd_dedup_public(nbd);
    /* Not before it has served in this run: until then it may have an earlier one's posted writes to apply first. */
    if (public == 0 || atoll_load_acquire(&nbd->domain->peers[ATOLL_ROLE_DEDUP]->serving_ns) == 0 ||
        atoll_load_acquire(&public->posted_blocks) == 0)
        return 0;
    publish(nbd, 1);
    atoll_full_fence(); /* SP-POST */
    uint64_t blocks = atoll_load_acquire(&public->posted_blocks);
    return blocks < ATOLL_POSTED_BLOCKS ? (uint32_t)blocks : ATOLL_POSTED_BLOCKS;
}

bool nbd_may_post(struct nbd *nbd, const struct nbd_slot *slot, const struct atoll_descriptor *message)
{
    struct nbd_posted *posted = &nbd->posted;
    uint64_t blocks = slot->length / ATOLL_BLOCK_BYTES;
    if ((slot->offset | slot->length | message->address) % ATOLL_BLOCK_BYTES != 0 || blocks > ATOLL_POSTED_WRITE_BLOCKS ||
        slot->part_bytes != slot->work_bytes || message->segment_count != 0 || (slot->flags & NBD_CMD_FLAG_FUA) ||
        connection_of(nbd, slot->identity)->streaming != 0 || atoll_trace_armed(nbd->domain))
        return false;
    if (!posted->looked) {
        posted->allowed = allowed(nbd);
        posted->looked = true;
    }
    return posted->blocks + blocks <= posted->allowed && posted->blocks + blocks < ATOLL_POSTED_BLOCKS;
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
