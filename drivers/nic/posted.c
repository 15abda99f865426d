/*
 * Posted writes: a WRITE of a few whole blocks is answered here, as soon as it has been received, and goes straight to dedup. Its client
 * waits for no other domain; dedup, which dozes meanwhile, is woken for many of them at once, and nbd does not run at all.
 *
 * What makes that an acknowledgement (I7):
 *
 *   - memory: what the write is (atoll_posted), the message to dedup and the reply become visible by one commit; only then is the reply
 *     sent. The message lies in a ring that outlives both its sides, then in dedup's arena. The pages stay as they are until END. After the death
 *     of all, dedup's next incarnation finds what it has not applied in the notes here.
 *   - space: dedup says how many blocks may be on their way, and keeps as many free for them; 0 when it has no more (SP-POST)
 *   - order: dedup takes what was posted before it takes what nbd has passed on since, and lets no later request overtake a posted write
 *     to the same block. A block that one is on its way to is not looked up in memory, but asked for: nic knows which these are, nbd looks
 *     nothing up while `posting` says that there are any.
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
    nic->posted_in_step = 0;
    if (nic->posted_set.blocks == 0)
        publish(nic, 0);
    uint32_t most = nic->posted_most, blocks = nic->posted_set.blocks;
    if (most != 0 && blocks * 4 > most * 3) /* many at a time */
        return;
    for (uint32_t room = most == 0 ? ATOLL_CONNECTION_COUNT : most - blocks; room > 0 && !nic_queue_empty(&nic->post_waiters); room--)
        nic_schedule(nic, nic_queue_take(&nic->post_waiters));
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

static enum nic_posting may_post(struct nic *nic, const struct nic_connection *connection, const struct nic_slot *slot)
{
    uint64_t blocks = slot->payload_bytes / ATOLL_BLOCK_BYTES;
    if (connection->volume == 0 || slot->segments[0] != 1 || slot->part_bytes[0] != slot->payload_bytes ||
        (slot->volume_offset | slot->payload_bytes) % ATOLL_BLOCK_BYTES != 0 || blocks > ATOLL_POSTED_WRITE_BLOCKS ||
        connection->streaming != 0 || connection->phase != NIC_OPEN || !nic_frame_is_plain_write(connection->framing, slot->header) ||
        atoll_trace_armed(nic->domain))
        return NIC_POST_NEVER;
    const struct atoll_dedup_public *dedup = atoll_dedup_public(nic->domain);
    if (dedup == 0)
        return NIC_POST_NEVER;
    if (!nic->posted_looked) {
        nic->posted_most = allowed(nic, dedup);
        nic->posted_looked = true;
    }
    if (blocks > nic->posted_most || !nic_volume_allows(dedup, connection, slot->volume_offset, slot->payload_bytes, true))
        return NIC_POST_NEVER;
    if (nic->posted_set.blocks + blocks <= nic->posted_most)
        return NIC_POST_DONE;
    /* If dedup has no time for more, nbd has not either; and with so many it does not doze. */
    return atoll_load_relaxed(&dedup->crowded) && nic->posted >= ATOLL_DOZE_MESSAGES ? NIC_POST_LATER : NIC_POST_NEVER;
}

enum nic_posting nic_post(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, bool alone)
{
    uint32_t number = (uint32_t)(slot - nic->area->slots);
    struct atoll_posted *posted = &nic->public->posted[number];
    uint8_t *answer = nic->area->answers + number * NIC_ANSWER_BYTES; /* of a slot that was free: unreferenced */
    enum nic_posting may = may_post(nic, connection, slot);
    if (may == NIC_POST_LATER && !nic->post_waiters.member[slot->connection]) {
        nic_queue_add(&nic->post_waiters, slot->connection);
        nic_deadline(nic, nic->now_ns + NIC_RETRY_NS);
        atoll_count(nic->domain, NIC_POSTED_WAITS, 1);
    }
    if (may != NIC_POST_DONE)
        return may;
    struct atoll_descriptor message = {.opcode = ATOLL_OP_WRITE,
                                       .identity = nic_identity(nic, slot),
                                       .address = nic_segments(nic, slot, 0)->address,
                                       .length = slot->payload_bytes};
    message.words[0] = slot->volume_offset;
    message.words[1] = slot->payload_bytes;
    message.halves[4] = connection->volume - 1;
    message.halves[5] = connection->generation;
    if (posted->order != 0) /* of an earlier run; dedup has taken it over */
        atoll_save(nic->journal, posted, sizeof *posted);
    *posted = (struct atoll_posted){.identity = message.identity,
                                    .address = message.address,
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
    nic_pages_change(nic, slot, 0, NIC_PAGE_LEND);
    nic_set32(nic, &slot->lent_part, 0);
    nic_set32(nic, &slot->flags, NIC_SLOT_DELIVERED | NIC_SLOT_ANSWERED | NIC_SLOT_LENT | NIC_SLOT_POSTED);
    nic_posted_count(nic, slot, 1);
    alone = alone && nic->posted_in_step == 0 && nic->free_slot_count + nic->freed_slot_count + nic->posted == ATOLL_SLOT_COUNT;
    nic->posted_in_step++;
    message.flags = (uint8_t)(ATOLL_FLAG_POSTED | (alone ? ATOLL_FLAG_ALONE : 0));
    connection->requests++;
    atoll_count(nic->domain, NIC_REQUESTS, 1);
    atoll_count(nic->domain, NIC_POSTED, 1);
    atoll_count(nic->domain, NIC_POSTED_BYTES, slot->payload_bytes);
    nic_put(nic, ATOLL_ROLE_DEDUP, &message);
    nic_send_queue(nic, connection, slot);
    return NIC_POST_DONE;
}

void nic_posted_end(struct nic *nic, struct nic_slot *slot)
{
    atoll_set64(nic->journal, &nic->public->posted[slot - nic->area->slots].order, 0);
    nic_posted_count(nic, slot, -1);
}

static uint32_t bucket_of(uint32_t volume, uint64_t block)
{
    uint64_t mixed = (block ^ (uint64_t)volume << 40) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(mixed >> 52);
}
_Static_assert(NIC_POSTED_BUCKETS == 1 << 12, "twelve bits");
_Static_assert(ATOLL_SLOT_COUNT * ATOLL_POSTED_WRITE_BLOCKS < 1 << 16, "a bucket holds all of them");

void nic_posted_count(struct nic *nic, const struct nic_slot *slot, int change)
{
    struct nic_posted_set *set = &nic->posted_set;
    uint32_t volume = nic->public->posted[slot - nic->area->slots].volume, blocks = slot->payload_bytes / ATOLL_BLOCK_BYTES;
    nic->hints[slot->connection].posted += (uint32_t)change;
    nic->posted += (uint32_t)change;
    set->blocks += (uint32_t)change * blocks;
    for (uint32_t index = 0; index < blocks; index++) {
        uint16_t *bucket = &set->buckets[bucket_of(volume, slot->volume_offset / ATOLL_BLOCK_BYTES + index)];
        *bucket = (uint16_t)(*bucket + change);
    }
}

bool nic_posted_covers(const struct nic *nic, uint32_t volume, uint64_t first, uint64_t blocks)
{
    if (nic->posted_set.blocks == 0)
        return false;
    for (uint64_t index = 0; index < blocks; index++)
        if (nic->posted_set.buckets[bucket_of(volume, first + index)] != 0)
            return true;
    return false;
}
