/* I/O requests of dedup to its storage drivers; see io.h. Entering, sending and releasing are journal changes only. */
#include "services/dedup/io.h"

#include "services/dedup/counters.h"
#include "services/dedup/dedup.h"

void io_format(struct io_table *table)
{
    for (uint32_t index = 0; index < ATOLL_IO_COUNT; index++)
        table->free[index] = ATOLL_IO_COUNT - 1 - index;
    table->free_count = ATOLL_IO_COUNT;
}

uint32_t io_room(const struct dedup *dedup, enum io_kind kind)
{
    uint32_t kept = kind == IO_STORE ? 0 : kind == IO_DESTAGE ? IO_STORE_SHARE : IO_STORE_SHARE + IO_DESTAGE_SHARE;
    return dedup->io->free_count > kept ? dedup->io->free_count - kept : 0;
}

/* Puts the request of `slot` on the ring to its driver. The ring has a place for each I/O slot, so it cannot be full. */
static bool io_send(struct dedup *dedup, uint32_t number, uint32_t flags)
{
    struct io_slot *slot = &dedup->io->slots[number];
    struct atoll_descriptor message = {.opcode = (uint8_t)slot->opcode,
                                       .flags = (uint8_t)flags,
                                       .segment_count = (uint16_t)slot->segment_count,
                                       .identity = (uint64_t)number << 32 | slot->sequence,
                                       .address = slot->segment_count != 0 ? (uint64_t)(uintptr_t)slot->segments : 0,
                                       .length = slot->length_bytes};
    message.words[0] = slot->offset_bytes;
    message.words[1] = slot->length_bytes;
    if (slot->opcode == ATOLL_OP_IO_SYNC)
        memcpy(message.words, slot->after, sizeof slot->after);
    if (slot->segment_count == 1) {
        message.segment_count = 0;
        message.address = slot->segments[0].address;
    }
    return atoll_domain_put(dedup->domain, slot->device, &message);
}

/* Enters a request that is yet to be sent; returns its number, or -1. */
static int enter(struct dedup *dedup, enum io_kind kind, uint64_t argument, uint32_t device, uint32_t opcode, uint64_t offset_bytes,
                 const struct atoll_segment *segments, uint32_t segment_count)
{
    struct atoll_journal *journal = dedup->domain->journal;
    struct io_table *table = dedup->io;
    assert(segment_count <= ATOLL_IO_BLOCKS);
    if (io_room(dedup, kind == IO_FILL || kind == IO_TIER ? IO_DESTAGE : kind) == 0) /* for whom IO_FILL is, its caller has looked */
        return -1;
    uint32_t number = table->free[table->free_count - 1];
    struct io_slot *slot = &table->slots[number];
    assert(number < ATOLL_IO_COUNT && slot->kind == IO_FREE);

    /* The slot may have been released in this very transaction, and then it is in flight again after a rollback. */
    atoll_save(journal, slot, offsetof(struct io_slot, segments) + segment_count * sizeof slot->segments[0]);
    uint64_t length = 0;
    for (uint32_t index = 0; index < segment_count; index++) {
        slot->segments[index] = segments[index];
        length += segments[index].length;
    }
    slot->opcode = opcode;
    slot->device = device;
    slot->argument = argument;
    slot->offset_bytes = offset_bytes;
    slot->length_bytes = (uint32_t)length;
    slot->segment_count = segment_count;
    slot->sequence += slot->sequence == UINT32_MAX ? 2 : 1;
    slot->kind = kind;
    memset(slot->after, 0, sizeof slot->after);
    atoll_set32(journal, &table->free_count, table->free_count - 1);
    return (int)number;
}

static int send_entered(struct dedup *dedup, int number, uint32_t flags)
{
    if (number < 0)
        return number;
    bool sent = io_send(dedup, (uint32_t)number, flags);
    assert(sent); /* ATOLL_STORAGE_RING_ENTRIES >= ATOLL_IO_COUNT, and a completed one has left the ring */
    atoll_count(dedup->domain, DEDUP_COUNTER_IO_SUBMITTED, 1);
    return number;
}

static uint32_t hint(const struct dedup *dedup) { return dedup->behind ? ATOLL_FLAG_ALONE : 0; }

int io_submit(struct dedup *dedup, enum io_kind kind, uint64_t argument, uint32_t device, uint32_t opcode,
              uint64_t offset_bytes, const struct atoll_segment *segments, uint32_t segment_count)
{
    return send_entered(dedup, enter(dedup, kind, argument, device, opcode, offset_bytes, segments, segment_count), hint(dedup));
}

int io_submit_sync(struct dedup *dedup, enum io_kind kind, uint64_t argument, const uint64_t *after, uint32_t count)
{
    int number = enter(dedup, kind, argument, ATOLL_ROLE_DISK, ATOLL_OP_IO_SYNC, 0, 0, 0);
    assert(count <= IO_AFTER);
    if (number >= 0 && count != 0)
        memcpy(dedup->io->slots[number].after, after, count * sizeof after[0]);
    return send_entered(dedup, number, hint(dedup));
}

int io_submit_awaited(struct dedup *dedup, uint64_t argument, uint64_t offset_bytes, const struct atoll_segment *segments,
                      uint32_t segment_count)
{
    int number = enter(dedup, IO_FILL, argument, ATOLL_ROLE_DISK, ATOLL_OP_IO_READ, offset_bytes, segments, segment_count);
    return send_entered(dedup, number, ATOLL_FLAG_AWAITED);
}

static void io_release(struct dedup *dedup, uint32_t number)
{
    struct atoll_journal *journal = dedup->domain->journal;
    struct io_table *table = dedup->io;
    atoll_set32(journal, &table->slots[number].kind, IO_FREE);
    /* The entry may be committed as the top of the stack before this transaction: journal it. */
    atoll_set32(journal, &table->free[table->free_count], number);
    atoll_set32(journal, &table->free_count, table->free_count + 1);
}

static void io_dispatch(struct dedup *dedup, const struct io_slot *slot, uint32_t status)
{
    if (slot->kind == IO_STORE)
        store_io_done(dedup, slot, status);
    else
        datapath_io_done(dedup, slot, status);
}

uint32_t io_complete(struct dedup *dedup, uint32_t device, const struct atoll_descriptor *message)
{
    uint64_t number = message->identity >> 32;
    struct io_slot *slot = number < ATOLL_IO_COUNT ? &dedup->io->slots[number] : 0;
    if (message->opcode != ATOLL_OP_IO_DONE || slot == 0 || slot->kind == IO_FREE || slot->device != device ||
        slot->sequence != (uint32_t)message->identity) {
        atoll_count(dedup->domain, DEDUP_COUNTER_BAD_COMPLETIONS, 1);
        return 0;
    }
    uint32_t status = message->status, bytes = slot->opcode == ATOLL_OP_IO_READ ? slot->length_bytes : 0;
    if (status != ATOLL_OK)
        atoll_count(dedup->domain, DEDUP_COUNTER_IO_ERRORS, 1);
    /* The handler sees the slot as it was; it is released afterwards, so that a request made within takes another. */
    io_dispatch(dedup, slot, status);
    io_release(dedup, (uint32_t)number);
    return bytes;
}

void io_adopt(struct dedup *dedup, bool late)
{
    bool in_flight[ATOLL_IO_COUNT]; /* a handler may enter new requests meanwhile */
    for (uint32_t number = 0; number < ATOLL_IO_COUNT; number++)
        in_flight[number] = dedup->io->slots[number].kind != IO_FREE;
    for (uint32_t number = 0; number < ATOLL_IO_COUNT; number++) {
        struct io_slot *slot = &dedup->io->slots[number];
        if (!in_flight[number])
            continue;
        if (slot->kind == IO_STORE && store_io_stands(dedup, slot, late)) {
            bool sent = io_send(dedup, number, 0); /* same content to the same place: harmless if it was done before */
            assert(sent);
            continue;
        }
        if (slot->kind == IO_STORE)
            store_io_done(dedup, slot, ATOLL_EIO); /* for the store it has failed, like any other that does */
        io_release(dedup, number);
    }
}
