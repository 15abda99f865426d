/*
 * Reads from memory: a READ of few blocks that dedup's table names (ipc/lookup.h) is answered here, in the turn in which it has been
 * received. No other domain runs for it.
 *
 *   - consent: nbd said, when transmission began, whose volume it is, and whether replies are chunks. That the volume is there and large
 *     enough is looked up in dedup's table of volumes
 *   - order: a block that a posted write is on its way to is asked for behind it (posted.c). A write that is not posted has no reply
 *     before dedup has taken the old value from the table
 *   - the pages stay as they are until the slot is free: the use is published in nic's public part
 *
 * All else goes to nbd, errors first of all: reads with flags, but for DF; of more blocks; beyond the end; holes, where they are a chunk of
 * their own; and everything while a trace is armed, so that it shows all hops.
 *
 * After a crash: what was committed is in the slot, and is sent on from where it was; else the header is parsed again.
 */
#include "drivers/nic/nic.h"

/* So that nobody waits long for a turn of nic's, which all connections share. */
#define ANSWER_BLOCKS 16
_Static_assert(1 + ANSWER_BLOCKS <= NIC_PART_SEGMENTS, "header and a segment per block");

bool nic_answer(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot)
{
    uint64_t offset = slot->volume_offset, length;
    if (slot->payload_bytes != 0 || connection->volume == 0 || connection->streaming != 0 || connection->phase != NIC_OPEN ||
        (length = nic_frame_plain_read(connection->framing, connection->mixes, slot->header)) == 0 ||
        length > ANSWER_BLOCKS * ATOLL_BLOCK_BYTES || atoll_trace_armed(nic->domain))
        return false;
    const struct atoll_dedup_public *dedup = atoll_dedup_public(nic->domain);
    if (dedup == 0 || !nic_volume_allows(dedup, connection, offset, length, false))
        return false;
    uint64_t first = offset / ATOLL_BLOCK_BYTES, blocks = (offset + length - 1) / ATOLL_BLOCK_BYTES - first + 1;
    if (blocks > ANSWER_BLOCKS || nic_posted_covers(nic, connection->volume - 1, first, blocks))
        return false;
    if (atoll_lookup_is_stale(nic->domain, &nic->looker))
        atoll_lookup_attach(nic->domain, &nic->looker, &nic->public->uses);
    struct atoll_read read = {.slot = (uint32_t)(slot - nic->area->slots),
                              .sequence = slot->sequence,
                              .volume = connection->volume - 1,
                              .generation = connection->generation,
                              .offset = offset,
                              .length = (uint32_t)length};
    struct atoll_segment *segments = nic_segments(nic, slot, 0); /* it has no payload */
    struct atoll_taken taken;
    uint32_t count;
    if (!atoll_lookup_take(nic->domain, &nic->looker, &read, segments + 1, &count, &taken) || (connection->mixes && taken.pages != count))
        return false;
    ATOLL_CRASH_POINT(nic->domain, "nic.use.published");
    if (!atoll_lookup_confirm(&nic->looker, &read, &taken))
        return false;
    uint8_t *answer = nic->area->answers + read.slot * NIC_ANSWER_BYTES;
    uint32_t before = nic_frame_data(connection->framing, connection->mixes, slot->header, length, answer);
    segments[0] = (struct atoll_segment){.address = (uint64_t)(uintptr_t)answer, .length = before, .kind = ATOLL_SEGMENT_DATA};
    slot->reply_address = (uint64_t)(uintptr_t)segments; /* of a slot that was free: unreferenced */
    slot->reply_length = before + (uint32_t)length;
    slot->reply_segments = (uint16_t)(1 + count);
    slot->reply_flags = ATOLL_FLAG_LAST;
    slot->reply_part = 0;
    connection->requests++;
    atoll_count(nic->domain, NIC_REQUESTS, 1);
    atoll_count(nic->domain, NIC_READS_FROM_MEMORY, 1);
    atoll_count(nic->domain, NIC_BYTES_FROM_MEMORY, length);
    nic->message_budget--; /* as if nbd had got it: a turn, and its journal, have their bounds */
    nic_set32(nic, &slot->flags, NIC_SLOT_DELIVERED | NIC_SLOT_ANSWERED);
    nic_send_queue(nic, connection, slot);
    return true;
}
