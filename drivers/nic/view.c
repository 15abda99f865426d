/*
 * What others may know of nic: its status, its connections, whether its tables agree; and the order to stop.
 *
 * After a crash: that it stops, and the call that asked for it, are in the arena.
 */
#include <stdio.h>
#include <stdlib.h>

#include "drivers/nic/nic.h"

void nic_stop(struct nic *nic, uint64_t call)
{
    nic_set32(nic, &nic->area->stopping, 1);
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT; index++) {
        nic_end(nic, &nic->area->connections[index]);
        if (nic->journal->count >= NIC_JOURNAL_LIMIT)
            nic_commit(nic); /* should we die here, the kernel asks again */
    }
    atoll_set64(nic->journal, &nic->area->stop_call, call);
    nic_commit(nic);
}

uint64_t nic_stop_call(const struct nic *nic) { return nic->area->stop_call; }

uint32_t nic_connections(const struct nic *nic)
{
    return ATOLL_CONNECTION_COUNT - nic->free_connection_count - nic->freed_connection_count;
}

void nic_get_status(const struct nic *nic, struct nic_status *status)
{
    memset(status, 0, sizeof *status);
    status->connections = nic_connections(nic);
    status->slots_in_use = ATOLL_SLOT_COUNT - nic->free_slot_count - nic->freed_slot_count;
    status->streams_in_use = NIC_STREAM_COUNT - nic->free_stream_count - nic->freed_stream_count;
    status->waiting_for_pages = nic_queue_count(&nic->page_waiters);
    status->waiting_for_slots = nic_queue_count(&nic->slot_waiters);
    status->stopping = nic->area->stopping;
    status->latency_held = nic->latency.held;
    status->latency_error = (uint32_t)nic->latency.error;
    nic_pages_count(nic, status);
}

bool nic_get_connection(const struct nic *nic, uint32_t index, struct nic_connection *connection)
{
    if (index >= ATOLL_CONNECTION_COUNT || nic->area->connections[index].phase == NIC_FREE)
        return false;
    *connection = nic->area->connections[index];
    return true;
}

/* --- Check ------------------------------------------------------------------------------------------------------- */

#define DIFFERS(...) return snprintf(error, 256, __VA_ARGS__), -1

/* Marks the pages of a slot's list; -1 if one is not what it should be. */
static int mark(const struct nic *nic, uint32_t index, uint32_t bank, bool lent, uint8_t *owned, char *error)
{
    const struct nic_slot *slot = &nic->area->slots[index];
    if (nic_is_short_option(slot))
        return 0;
    const struct atoll_segment *segments = nic->segments + ((uint64_t)index * NIC_PART_LISTS + bank) * NIC_PART_SEGMENTS;
    for (uint32_t segment = 0; segment < slot->segments[bank]; segment++) {
        uint64_t base = (uint64_t)(uintptr_t)nic->buffers;
        uint64_t first = (segments[segment].address - base) / ATOLL_BLOCK_BYTES;
        uint64_t last = (segments[segment].address + segments[segment].length - 1 - base) / ATOLL_BLOCK_BYTES;
        for (uint64_t page = first; page <= last; page++) {
            if (page >= nic->area->page_count || owned[page]++)
                DIFFERS("slot %u: page %llu is out of range or has two owners", index, (unsigned long long)page);
            uint64_t masks = nic->chunks[page / NIC_CHUNK_PAGES].masks >> page % NIC_CHUNK_PAGES;
            if ((masks & 1) || (masks >> 32 & 1) || (masks >> 16 & 1) != lent)
                DIFFERS("slot %u: page %llu is free, taken, or not as lent as the slot", index, (unsigned long long)page);
        }
    }
    return 0;
}

static int check_slots(const struct nic *nic, uint8_t *owned, uint32_t *outstanding, char *error)
{
    for (uint32_t index = 0; index < ATOLL_SLOT_COUNT; index++) {
        const struct nic_slot *slot = &nic->area->slots[index];
        if (slot->state == NIC_SLOT_FREE)
            continue;
        if (slot->connection >= ATOLL_CONNECTION_COUNT || nic->area->connections[slot->connection].phase < NIC_OPEN)
            DIFFERS("slot %u is in use for connection %u, which is not", index, slot->connection);
        outstanding[slot->connection]++;
        if ((slot->flags & NIC_SLOT_POSTED) && (!(slot->flags & NIC_SLOT_LENT) || nic->public->posted[index].order == 0))
            DIFFERS("slot %u is posted, but its part is not lent or not noted", index);
        for (uint32_t bank = 0; bank < NIC_PART_LISTS; bank++)
            if (mark(nic, index, bank, (slot->flags & NIC_SLOT_LENT) && slot->lent_part % NIC_PART_LISTS == bank, owned, error) < 0)
                return -1;
    }
    return 0;
}

static int check_connections(const struct nic *nic, const uint32_t *outstanding, char *error)
{
    bool used[NIC_STREAM_COUNT] = {false};
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT; index++) {
        const struct nic_connection *connection = &nic->area->connections[index];
        if (connection->outstanding != outstanding[index])
            DIFFERS("connection %u: %u slots, its count says %u", index, outstanding[index], connection->outstanding);
        uint32_t buffer = nic_window_of(connection->window).buffer;
        if (buffer >= 2 && (buffer - 2 >= NIC_STREAM_COUNT || used[buffer - 2]))
            DIFFERS("connection %u: stream buffer %u has two owners", index, buffer - 2);
        if (buffer >= 2)
            used[buffer - 2] = true;
        uint32_t number = connection->send_head, count = 0, last = 0;
        for (; number != 0 && count <= outstanding[index]; count++) {
            const struct nic_slot *slot = &nic->area->slots[number - 1];
            if (slot->connection != index || !(slot->flags & NIC_SLOT_QUEUED))
                DIFFERS("connection %u: slot %u in its send queue is not its own", index, number - 1);
            last = number;
            number = slot->next;
        }
        if (number != 0 || last != connection->send_tail)
            DIFFERS("connection %u: its send queue does not end at its tail", index);
    }
    return 0;
}

int nic_check(const struct nic *nic, char *error)
{
    uint32_t outstanding[ATOLL_CONNECTION_COUNT] = {0};
    uint8_t *owned = calloc(nic->area->page_count, 1);
    if (owned == 0)
        DIFFERS("out of memory");
    int result = check_slots(nic, owned, outstanding, error);
    if (result == 0)
        result = check_connections(nic, outstanding, error);
    for (uint64_t page = 0; result == 0 && page < nic->area->page_count; page++) {
        uint64_t masks = nic->chunks[page / NIC_CHUNK_PAGES].masks >> page % NIC_CHUNK_PAGES;
        if (!owned[page] && !(masks & 1) && !(masks >> 32 & 1)) {
            snprintf(error, 256, "page %llu is neither free nor taken and belongs to no slot", (unsigned long long)page);
            result = -1;
        }
    }
    free(owned);
    return result;
}
