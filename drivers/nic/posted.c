/*
 * Posted writes: a WRITE of a few whole blocks is answered here, as soon as it has been received. Its client waits for no other domain, and
 * nbd and dedup, which doze meanwhile, are woken for many of them at once.
 *
 * What makes that an acknowledgement (I7):
 *
 *   - memory: what the write is (atoll_posted), the message to nbd and the reply become visible by one commit; only then is the reply sent.
 *     The message lies in rings that outlive both their sides, then in dedup's arena. The pages stay as they are until END. After the death
 *     of all, dedup's next incarnation finds what it has not applied in the notes here.
 *   - space: dedup says how many blocks may be on their way, and keeps as many free for them; 0 when it has no more (SP-POST)
 *   - order: messages arrive in their order, and dedup lets no later request overtake a posted write to the same block. Nor does nbd: a
 *     block that a posted write is on its way to is not looked up in memory, but asked for.
 *   - consent: nbd said, when transmission began, whose volume it is and whether a reply may come between the parts of another one; that the
 *     volume is there, may be written and is large enough is looked up in dedup's table
 *
 * Requests with flags, ragged and large writes are not posted, nor is anything while a trace is armed, so that it shows all hops.
 *
 * After a crash: counts are made again from the slots. `posting` in the public part may say that something is on its way when nothing is, never
 * the reverse.
 */
#include "drivers/nic/nic.h"

static void publish(struct nic *nic, uint32_t posting)
{
    uint32_t *word = &nic->public->posting;
    if (atoll_load_relaxed(word) != posting)
        atoll_store_release(word, posting);
}

void nic_posted_open(struct nic *nic) { publish(nic, nic->posted_set.blocks != 0); }

void nic_posted_committed(struct nic *nic)
{
    nic->posted_looked = false;
    nic->posted_in_step = 0;
    if (nic->posted_set.blocks == 0)
        publish(nic, 0);
}

/* How many blocks may be on their way. */
static uint32_t allowed(struct nic *nic, const struct atoll_dedup_public *dedup)
{
    /* Not before it has served in this run: until then it may have an earlier one's posted writes to apply first. */
    if (atoll_load_acquire(&nic->domain->peers[ATOLL_ROLE_DEDUP]->serving_ns) == 0 || atoll_load_acquire(&dedup->posted_blocks) == 0)
        return 0;
    publish(nic, 1);
    atoll_full_fence(); /* SP-POST */
    uint64_t blocks = atoll_load_acquire(&dedup->posted_blocks);
    return blocks < ATOLL_POSTED_BLOCKS ? (uint32_t)blocks : ATOLL_POSTED_BLOCKS;
}

bool nic_volume_allows(const struct atoll_dedup_public *dedup, const struct nic_connection *connection, uint64_t offset, uint64_t length,
                       bool change)
{
    const struct atoll_volume *volume = &dedup->volumes[connection->volume - 1];
    uint32_t version = atoll_load_acquire(&volume->version);
    uint32_t generation = atoll_load_relaxed(&volume->generation), state = atoll_load_relaxed(&volume->state);
    uint32_t flags = atoll_load_relaxed(&volume->flags);
    uint64_t size = atoll_load_relaxed(&volume->size_bytes);
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return (version & 1) == 0 && atoll_load_relaxed(&volume->version) == version && state == ATOLL_VOLUME_READY &&
           generation == connection->generation && !(change && flags & ATOLL_VOLUME_READONLY) && offset <= size && length <= size - offset;
}

bool nic_may_post(struct nic *nic, const struct nic_connection *connection, const struct nic_slot *slot)
{
    uint64_t blocks = slot->payload_bytes / ATOLL_BLOCK_BYTES;
    if (connection->volume == 0 || slot->part != 0 || slot->segments[0] != 1 || slot->part_bytes[0] != slot->payload_bytes ||
        (slot->volume_offset | slot->payload_bytes) % ATOLL_BLOCK_BYTES != 0 || blocks > ATOLL_POSTED_WRITE_BLOCKS ||
        connection->streaming != 0 || connection->phase != NIC_OPEN || !nic_frame_is_plain_write(connection->framing, slot->header) ||
        atoll_trace_armed(nic->domain))
        return false;
    const struct atoll_dedup_public *dedup = atoll_dedup_public(nic->domain);
    if (dedup == 0)
        return false;
    if (!nic->posted_looked) {
        nic->posted_most = allowed(nic, dedup);
        nic->posted_looked = true;
    }
    return nic->posted_set.blocks + blocks <= nic->posted_most &&
           nic_volume_allows(dedup, connection, slot->volume_offset, slot->payload_bytes, true);
}

void nic_post(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, struct atoll_descriptor *message, bool alone)
{
    uint32_t number = (uint32_t)(slot - nic->area->slots);
    struct atoll_posted *posted = &nic->public->posted[number];
    uint8_t *answer = nic->area->answers + number * NIC_ANSWER_BYTES; /* of a slot that was free: unreferenced */
    if (posted->order != 0) /* of an earlier run; dedup has taken it over */
        atoll_save(nic->journal, posted, sizeof *posted);
    *posted = (struct atoll_posted){.identity = message->identity,
                                    .address = message->address,
                                    .offset = slot->volume_offset,
                                    .length = slot->payload_bytes,
                                    .volume = connection->volume - 1,
                                    .generation = connection->generation};
    atoll_set64(nic->journal, &nic->public->posted_order, nic->public->posted_order + 1);
    atoll_set64(nic->journal, &posted->order, nic->public->posted_order);
    slot->reply_length = nic_frame_done(connection->framing, slot->header, answer);
    slot->reply_address = (uint64_t)(uintptr_t)answer;
    slot->reply_segments = 0;
    slot->reply_flags = ATOLL_FLAG_LAST;
    slot->reply_part = 0;
    nic_posted_count(nic, slot, 1);
    alone = alone && nic->posted_in_step == 0 && nic->free_slot_count + nic->freed_slot_count + nic->posted == ATOLL_SLOT_COUNT;
    nic->posted_in_step++;
    message->flags = (uint8_t)(ATOLL_FLAG_POSTED | (alone ? ATOLL_FLAG_ALONE : 0));
    atoll_count(nic->domain, NIC_POSTED, 1);
}

void nic_posted_end(struct nic *nic, struct nic_slot *slot)
{
    atoll_set64(nic->journal, &nic->public->posted[slot - nic->area->slots].order, 0);
    nic_posted_count(nic, slot, -1);
}

void nic_posted_count(struct nic *nic, const struct nic_slot *slot, int change)
{
    nic->hints[slot->connection].posted += (uint32_t)change;
    nic->posted += (uint32_t)change;
    atoll_posted_change(&nic->posted_set, nic->public->posted[slot - nic->area->slots].volume, slot->volume_offset / ATOLL_BLOCK_BYTES,
                        slot->payload_bytes / ATOLL_BLOCK_BYTES, change);
}
