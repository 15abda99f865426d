/*
 * Small reads. What dedup's table names (ipc/lookup.h) is answered here, in the turn in which it has been received: no other domain runs
 * for it. What it does not name dedup is asked for, without nbd: two hand-overs and two turns of others fewer.
 *
 *   - consent: nbd said, when transmission began, whose volume it is, and whether replies are chunks. That the volume is there and large
 *     enough is looked up in dedup's table of volumes
 *   - order: a block that a posted write is on its way to is asked for behind it, on the same ring (posted.c). A write that is not posted has
 *     no reply before dedup has taken the old value from the table. Dedup, which is in no hurry with posted writes, is told by `asking` that
 *     somebody waits behind them
 *   - the pages stay as they are until the slot is free: the use is published in nic's public part, or dedup has pinned them for the slot
 *   - nbd does not know of a read that dedup has been asked for. So what ends the connection waits here until these are answered (receive.c)
 *
 * All else goes to nbd, errors first of all: reads with flags, but for DF; of more blocks; beyond the end; of data and holes, where these are
 * chunks of their own; and everything while a trace is armed, so that it shows all hops. So does what dedup has refused, with its
 * reason, for nbd to tell the client; and what it has answered while the parts of another reply must not be parted, for which nbd asks again.
 *
 * After a crash: what was committed is in the slot, and is sent on from where it was; else the header is parsed again.
 */
#include "drivers/nic/nic.h"

/* So that nobody waits long for a turn of nic's, which all connections share. */
#define ANSWER_BLOCKS 16
_Static_assert(1 + ANSWER_BLOCKS <= NIC_PART_SEGMENTS, "header and a segment per block");

/* Bytes that the request in `slot` asks for, 0: that is not for nic to answer. */
static uint64_t length_of(const struct nic_connection *connection, const struct nic_slot *slot)
{
    return nic_frame_plain_read(connection->framing, connection->mixes, slot->header);
}

/* The place in the slot for a reply's data; before it is one for what stands before them. Of a READ, which has no payload: unreferenced. */
static struct atoll_segment *data_of(const struct nic *nic, const struct nic_slot *slot) { return nic_segments(nic, slot, 0) + 1; }

/* What it reads, if nic may answer it. */
static bool may_answer(struct nic *nic, const struct nic_connection *connection, const struct nic_slot *slot, struct atoll_read *read)
{
    uint64_t offset = slot->volume_offset, length;
    if (slot->payload_bytes != 0 || connection->volume == 0 || connection->streaming != 0 || connection->phase != NIC_OPEN ||
        (length = length_of(connection, slot)) == 0 || length > ANSWER_BLOCKS * ATOLL_BLOCK_BYTES || atoll_trace_armed(nic->domain))
        return false;
    const struct atoll_dedup_public *dedup = atoll_dedup_public(nic->domain);
    if (dedup == 0 || !nic_volume_allows(dedup, connection, offset, length, false))
        return false;
    *read = (struct atoll_read){.slot = (uint32_t)(slot - nic->area->slots),
                                .sequence = slot->sequence,
                                .volume = connection->volume - 1,
                                .generation = connection->generation,
                                .offset = offset,
                                .length = (uint32_t)length};
    return atoll_read_blocks(read) <= ANSWER_BLOCKS;
}

/* The reply to a READ whose data lie in `count` segments at data_of; 0: a chunk that says that all of it is a hole. */
static void answer(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, uint32_t length, uint32_t count)
{
    struct atoll_segment *segments = data_of(nic, slot) - 1;
    uint8_t *header = nic->area->answers + (slot - nic->area->slots) * NIC_ANSWER_BYTES;
    uint32_t before = count == 0 ? nic_frame_hole(connection->framing, slot->header, length, header)
                                 : nic_frame_data(connection->framing, connection->mixes, slot->header, length, header);
    segments[0] = (struct atoll_segment){.address = (uint64_t)(uintptr_t)header, .length = before, .kind = ATOLL_SEGMENT_DATA};
    slot->reply_address = (uint64_t)(uintptr_t)segments; /* not queued: unreferenced */
    slot->reply_length = before + (count == 0 ? 0 : length);
    slot->reply_segments = (uint16_t)(1 + count);
    slot->reply_flags = ATOLL_FLAG_LAST;
    slot->reply_part = 0;
    connection->requests++;
    atoll_count(nic->domain, NIC_REQUESTS, 1);
    nic_set32(nic, &slot->flags, NIC_SLOT_DELIVERED | NIC_SLOT_ANSWERED);
    nic_send_queue(nic, connection, slot);
}

/* --- From memory ------------------------------------------------------------------------------------------------- */

enum found { FOUND_NOT, FOUND, FOUND_MIXED };

/* Where it lies: in `count` segments as `answer` takes them. */
static enum found look_up(struct nic *nic, const struct nic_connection *connection, const struct nic_slot *slot, const struct atoll_read *read,
                          uint32_t *count)
{
    struct atoll_taken taken;
    if (nic_posted_covers(nic, read->volume, atoll_read_first(read), atoll_read_blocks(read)))
        return FOUND_NOT;
    if (atoll_lookup_is_stale(nic->domain, &nic->looker))
        atoll_lookup_attach(nic->domain, &nic->looker, &nic->public->uses);
    if (!atoll_lookup_take(nic->domain, &nic->looker, read, data_of(nic, slot), count, &taken))
        return FOUND_NOT;
    if (connection->mixes && taken.pages == 0)
        *count = 0;
    if (connection->mixes && taken.pages != *count)
        return FOUND_MIXED;
    ATOLL_CRASH_POINT(nic->domain, "nic.use.published");
    return atoll_lookup_confirm(&nic->looker, read, &taken) ? FOUND : FOUND_NOT;
}

/* --- From dedup -------------------------------------------------------------------------------------------------- */

void nic_asked_count(struct nic *nic, const struct nic_slot *slot, int change)
{
    nic->hints[slot->connection].asked_reads += (uint32_t)change;
    nic->asked_reads += (uint32_t)change;
    if (nic->public->asking != (nic->asked_reads != 0))
        atoll_store_relaxed(&nic->public->asking, nic->asked_reads != 0);
}

static void ask(struct nic *nic, struct nic_slot *slot, const struct atoll_read *read)
{
    struct atoll_descriptor message = {.opcode = ATOLL_OP_READ,
                                       .identity = nic_identity(nic, slot),
                                       .part = ATOLL_PART_NIC};
    message.words[0] = read->offset;
    message.words[1] = read->length;
    message.halves[4] = read->volume;
    message.halves[5] = read->generation;
    nic_asked_count(nic, slot, 1);
    nic_set32(nic, &slot->flags, NIC_SLOT_DELIVERED | NIC_SLOT_ASKED);
    nic_put(nic, ATOLL_ROLE_DEDUP, &message);
}

bool nic_answer(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot)
{
    struct atoll_read read;
    uint32_t count;
    if (!may_answer(nic, connection, slot, &read))
        return false;
    switch (look_up(nic, connection, slot, &read, &count)) {
    case FOUND_MIXED:
        return false;
    case FOUND_NOT:
        ask(nic, slot, &read);
        return true;
    case FOUND:
        break;
    }
    atoll_count(nic->domain, NIC_READS_FROM_MEMORY, 1);
    atoll_count(nic->domain, NIC_BYTES_FROM_MEMORY, read.length);
    nic->message_budget--; /* as if nbd had got it: a turn, and its journal, have their bounds */
    answer(nic, connection, slot, read.length, count);
    return true;
}

/* Copies where the data lie, in `count` segments as `answer` takes them. False: it is for nbd. */
static bool take_data(struct nic *nic, const struct nic_connection *connection, const struct nic_slot *slot,
                      const struct atoll_descriptor *message, uint64_t length, uint32_t *count)
{
    const struct atoll_segment *data = data_of(nic, slot);
    if (message->status != ATOLL_OK || connection->streaming != 0)
        return false;
    uint32_t copied = atoll_copy_data(nic->domain, message, length, ANSWER_BLOCKS, data_of(nic, slot)), holes = 0;
    for (uint32_t index = 0; index < copied; index++)
        holes += connection->mixes && data[index].kind == ATOLL_SEGMENT_HOLE;
    *count = holes == copied ? 0 : copied;
    return copied != 0 && (holes == 0 || holes == copied);
}

/* What nbd is told of a READ that dedup has refused: `message` says why, and which block it was, if it knows that. */
static struct atoll_descriptor failure_of(const struct nic_slot *slot, uint64_t length, const struct atoll_descriptor *message)
{
    uint64_t first = slot->volume_offset / ATOLL_BLOCK_BYTES, last = (slot->volume_offset + length - 1) / ATOLL_BLOCK_BYTES;
    bool known = message->words[1] > first && message->words[1] <= last + 1; /* the block + 1 */
    return (struct atoll_descriptor){
        .status = message->status, .address = message->words[0], .length = known ? (uint32_t)(message->words[1] - first) : 0};
}

void nic_read_done(struct nic *nic, struct nic_connection *connection, struct nic_slot *slot, const struct atoll_descriptor *message)
{
    uint64_t length = length_of(connection, slot);
    nic_asked_count(nic, slot, -1);
    if (connection->phase != NIC_OPEN && connection->phase != NIC_ENDING) { /* swallowed */
        nic_slot_free(nic, slot);
        return;
    }
    nic_schedule(nic, slot->connection); /* a DISC may have waited */
    uint32_t count;
    if (!take_data(nic, connection, slot, message, length, &count)) {
        struct atoll_descriptor failure = failure_of(slot, length, message);
        nic_set32(nic, &slot->flags, 0);
        nic_deliver(nic, connection, slot, failure.status == ATOLL_OK ? 0 : &failure);
        return;
    }
    atoll_count(nic->domain, NIC_READS_ASKED, 1);
    atoll_count(nic->domain, NIC_BYTES_ASKED, length);
    answer(nic, connection, slot, (uint32_t)length, count);
}
