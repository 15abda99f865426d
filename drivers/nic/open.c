/*
 * Opening: a fresh arena is laid out; a predecessor's is taken over; one of an earlier run keeps only what dedup holds.
 *
 * After a crash, in this order:
 *   1. the journal is rolled back (atoll_domain_open has done it)
 *   2. the private half is made from the arena: free lists, page lists
 *   3. outcomes in the completion queue are applied, committed, taken out, until there are none
 *   4. intents without outcome did not happen: cleared; an accept among them frees its connection
 *   5. done[] of all free slots is published (a kill may have come between a commit and its publishing)
 *   6. every connection is looked at as if it had just become ready
 * A second kill anywhere here finds the same work, less what was committed.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "drivers/nic/engine.h"

/* For so long nic looks for the next request without giving way (ipc/spin.h). A client sends it 5 to 8 µs after a reply. */
#define HOLD_NS 10000u

/* --- Layout ------------------------------------------------------------------------------------------------------ */

static uint64_t page_up(uint64_t bytes) { return (bytes + ATOLL_PAGE_BYTES - 1) & ~(uint64_t)(ATOLL_PAGE_BYTES - 1); }

static void lay_out(struct nic_area *area, uint64_t buffer_bytes)
{
    area->page_count = buffer_bytes / ATOLL_BLOCK_BYTES;
    area->chunk_count = (area->page_count + NIC_CHUNK_PAGES - 1) / NIC_CHUNK_PAGES;
    area->chunks_offset = page_up(page_up(sizeof(struct atoll_nic_public)) + sizeof(struct nic_area));
    area->segments_offset = page_up(area->chunks_offset + area->chunk_count * sizeof(struct nic_chunk));
    area->streams_offset =
        page_up(area->segments_offset + (uint64_t)ATOLL_SLOT_COUNT * NIC_PART_LISTS * NIC_PART_SEGMENTS * sizeof(struct atoll_segment));
    area->role_bytes = area->streams_offset + (uint64_t)NIC_STREAM_COUNT * NIC_STREAM_BYTES;
}

/* Only the numbers before the tables. */
#define LAYOUT_BYTES offsetof(struct nic_area, stopping)

uint64_t nic_role_bytes(uint64_t buffer_bytes)
{
    union {
        struct nic_area area;
        uint64_t words[LAYOUT_BYTES / 8];
    } *place = malloc(sizeof *place);
    if (place == 0)
        return 0;
    lay_out(&place->area, buffer_bytes);
    uint64_t bytes = place->area.role_bytes;
    free(place);
    return bytes;
}

/* The layout in the arena is a peer-proof copy of nothing: only our own predecessors wrote it, with this same program. */
static bool layout_fits(const struct nic *nic)
{
    const struct atoll_arena_header *self = nic->domain->self;
    return nic->area->page_count == self->buffer_bytes / ATOLL_BLOCK_BYTES && nic->area->role_bytes <= self->role_bytes &&
           nic->area->page_count >= ATOLL_PART_BLOCKS;
}

/* --- Beginning anew ---------------------------------------------------------------------------------------------- */

static void clear_tables(struct nic *nic)
{
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT; index++) {
        struct nic_connection *connection = &nic->area->connections[index];
        uint32_t operation[4];
        memcpy(operation, connection->operation, sizeof operation);
        memset(connection, 0, sizeof *connection);
        for (uint32_t kind = 0; kind < 4; kind++)
            connection->operation[kind] = ((operation[kind] >> 1) + 1) << 1; /* sequences go on */
    }
    for (uint32_t index = 0; index < ATOLL_SLOT_COUNT; index++) {
        struct nic_slot *slot = &nic->area->slots[index];
        uint32_t sequence = slot->sequence;
        memset(slot, 0, sizeof *slot);
        slot->sequence = sequence;
    }
    nic->area->stopping = 0;
    nic->area->stop_call = 0;
}

static int make_fresh(struct nic *nic, char *error)
{
    lay_out(nic->area, nic->domain->self->buffer_bytes);
    if (!layout_fits(nic)) {
        snprintf(error, 256, "nic: %llu buffer pages are too few, or the role area of %llu bytes is too small",
                 (unsigned long long)nic->area->page_count, (unsigned long long)nic->domain->self->role_bytes);
        return -EINVAL;
    }
    nic->chunks = (void *)((char *)nic->public + nic->area->chunks_offset);
    clear_tables(nic);
    nic_pages_adopt(nic, 0, 0);
    return 0;
}

/* Posted writes that the dedup of the earlier run had perhaps not applied: its successor does so, and their pages are its own. What it has
 * taken over already, in an adoption that was cut short, it holds. */
static void keep_posted(struct nic *nic, uint64_t adopted)
{
    for (uint32_t index = 0; index < ATOLL_SLOT_COUNT; index++) {
        const struct atoll_posted *posted = &nic->public->posted[index];
        if (posted->order > adopted)
            nic_pages_keep(nic, posted->address, posted->length);
    }
}

/* All of an earlier run are dead: sockets and peers' tables are gone, pages are dedup's exactly where it says so, and where it will. */
static int adopt(struct nic *nic, char *error)
{
    struct atoll_domain *domain = nic->domain;
    const struct atoll_arena_header *dedup = domain->peers[ATOLL_ROLE_DEDUP];
    if (!layout_fits(nic)) {
        snprintf(error, 256, "nic: the arena of the earlier run has another size than the configuration");
        return -EINVAL;
    }
    const uint8_t *held = 0;
    uint64_t count = 0, adopted = UINT64_MAX;
    if (dedup != 0) {
        uint64_t offset = dedup->role_offset;
        const struct atoll_dedup_public *public = (const void *)((const char *)dedup + offset);
        if (offset > domain->peer_bytes[ATOLL_ROLE_DEDUP] || sizeof *public > domain->peer_bytes[ATOLL_ROLE_DEDUP] - offset) {
            snprintf(error, 256, "nic: dedup's public area lies outside of its arena");
            return -EINVAL;
        }
        uint64_t address = public->held_address;
        adopted = atoll_load_acquire(&public->posted_adopted); /* before `held`: what it counts stands there */
        count = public->held_count;
        if (count > nic->area->page_count)
            count = nic->area->page_count;
        if (count != 0 && !atoll_reference_in(domain, ATOLL_ROLE_DEDUP, address, count)) {
            snprintf(error, 256, "nic: dedup's table of held pages lies outside of its arena");
            return -EINVAL;
        }
        held = (const void *)(uintptr_t)address;
    }
    nic->chunks = (void *)((char *)nic->public + nic->area->chunks_offset);
    clear_tables(nic);
    nic_pages_adopt(nic, held, count);
    keep_posted(nic, adopted);
    return 0;
}

/* --- Taking over ------------------------------------------------------------------------------------------------- */

static void make_lists(struct nic *nic)
{
    bool stream_used[NIC_STREAM_COUNT] = {false};
    for (uint32_t index = ATOLL_CONNECTION_COUNT; index-- > 0;) {
        const struct nic_connection *connection = &nic->area->connections[index];
        if (connection->phase == NIC_FREE)
            nic->free_connections[nic->free_connection_count++] = (uint16_t)index;
        uint32_t buffer = nic_window_of(connection->window).buffer;
        if (buffer >= 2)
            stream_used[buffer - 2] = true;
    }
    for (uint32_t index = ATOLL_SLOT_COUNT; index-- > 0;) {
        const struct nic_slot *slot = &nic->area->slots[index];
        if (slot->state == NIC_SLOT_FREE) {
            nic->free_slots[nic->free_slot_count++] = (uint16_t)index;
        } else {
            nic->reply_pages += slot->reply_pages;
            nic->hints[slot->connection].reply_pages += slot->reply_pages;
            if (slot->flags & NIC_SLOT_POSTED)
                nic_posted_count(nic, slot, 1);
            if (slot->flags & NIC_SLOT_ASKED)
                nic_asked_count(nic, slot, 1);
        }
    }
    for (uint32_t index = NIC_STREAM_COUNT; index-- > 0;)
        if (!stream_used[index])
            nic->free_streams[nic->free_stream_count++] = (uint16_t)index;
}

static void apply_outcomes(struct nic *nic)
{
    nic->recovering = true;
    for (;;) {
        uint32_t count = nic->engine->flush(nic);
        nic->message_budget = NIC_TURN_MESSAGES;
        for (uint32_t index = 0; index < count; index++) {
            if (nic->outcomes[index].user_data >> 56 < NIC_OPERATION_KINDS)
                atoll_count(nic->domain, NIC_RECOVERED_OUTCOMES, 1);
            nic_apply(nic, &nic->outcomes[index]);
        }
        nic_commit(nic);
        nic->engine->retire(nic);
        if (count == 0)
            break;
    }
    nic->recovering = false;
}

static void clear_intents(struct nic *nic, bool sockets_live)
{
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT; index++) {
        struct nic_connection *connection = &nic->area->connections[index];
        for (uint32_t kind = 0; kind < NIC_OPERATION_KINDS; kind++)
            nic_set32(nic, &connection->operation[kind], connection->operation[kind] & ~(uint32_t)1);
        if (connection->phase == NIC_ACCEPTING)
            nic_connection_freed(nic, connection);
        if (!sockets_live && connection->phase != NIC_FREE) {
            nic_set32(nic, &connection->socket_open, 0);
            nic_gone(nic, connection);
        }
        if (nic->journal->count > NIC_JOURNAL_LIMIT)
            nic_commit(nic);
    }
    nic_commit(nic);
}

/* I8: a request, or an outcome, during which nic crashed by itself twice costs its connection. Before outcomes are applied: it
 * may be one of these. */
static void note_suspect(struct nic *nic)
{
    struct atoll_suspect *table = (void *)((char *)nic->domain->self + ATOLL_SUSPECTS_OFFSET), *found = &table[0];
    uint32_t signal = nic->options.previous_signal;
    uint64_t identity = nic->domain->self->current;
    nic->domain->self->current = 0;
    /* SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV: nobody else's doing */
    if (identity == 0 || (signal != 4 && signal != 6 && signal != 7 && signal != 8 && signal != 11))
        return;
    for (uint32_t index = 0; index < ATOLL_SUSPECT_COUNT; index++) {
        if (table[index].identity == identity) {
            found = &table[index];
            break;
        }
        if (table[index].crashes < found->crashes)
            found = &table[index];
    }
    if (found->identity != identity)
        *found = (struct atoll_suspect){.identity = identity};
    found->crashes++;
    uint32_t index = atoll_identity_connection(identity);
    if (found->crashes < 2 || index >= ATOLL_CONNECTION_COUNT)
        return;
    atoll_count(nic->domain, NIC_POISONED, 1);
    nic_gone(nic, &nic->area->connections[index]);
    nic_commit(nic);
}

static void look_at_all(struct nic *nic)
{
    for (uint32_t index = 0; index < ATOLL_SLOT_COUNT; index++)
        if (nic->area->slots[index].state == NIC_SLOT_FREE)
            atoll_store_release(&nic->public->done[index], nic->area->slots[index].sequence); /* SP-DONE */
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT; index++) {
        struct nic_hint *hint = &nic->hints[index];
        hint->readable = hint->writable = hint->speculate = true;
        hint->asked = hint->asked_send = 0;
        uint32_t phase = nic->area->connections[index].phase;
        atoll_store_release(&nic->public->ending[index], phase >= NIC_ENDING);
        if (phase != NIC_FREE)
            nic_schedule(nic, index);
    }
    for (uint32_t listener = 0; listener < nic->options.listener_count; listener++) {
        nic->listener_ready[listener] = true;
        nic->accept_batch[listener] = 1;
    }
}

/* --- Opening ----------------------------------------------------------------------------------------------------- */

static int watch(struct nic *nic, int fd, uint64_t what, char *error)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = what};
    if (epoll_ctl(nic->epoll, EPOLL_CTL_ADD, fd, &event) == 0)
        return 0;
    snprintf(error, 256, "nic: cannot watch descriptor %d: %s", fd, strerror(errno));
    return -errno;
}

static int open_all(struct nic *nic, const struct atoll_uring_parameters *parameters, char *error)
{
    struct atoll_domain *domain = nic->domain;
    int result = 0;
    /* By the arena's own word, so that a predecessor that died while it laid out is no matter. */
    if (nic->area->formed == 0)
        result = make_fresh(nic, error);
    else if (domain->self->serving_ns == 0) /* nobody has served since init laid this out or adopted it */
        result = adopt(nic, error);
    if (result < 0)
        return result;
    atoll_compiler_barrier();
    nic->area->formed = domain->self->instance;
    nic->chunks = (void *)((char *)nic->public + nic->area->chunks_offset);
    nic->segments = (void *)((char *)nic->public + nic->area->segments_offset);
    nic->streams = (void *)((char *)nic->public + nic->area->streams_offset);
    nic->scratch = malloc(NIC_STREAM_BYTES);
    nic->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (nic->scratch == 0 || nic->epoll < 0) {
        snprintf(error, 256, "nic: %s", nic->scratch == 0 ? "out of memory" : strerror(errno));
        return -ENOMEM;
    }
    if ((result = watch(nic, domain->self->eventfd, NIC_READY_EVENTFD, error)) < 0)
        return result;
    for (uint32_t listener = 0; listener < nic->options.listener_count; listener++)
        if ((result = watch(nic, nic->options.listeners[listener], NIC_READY_LISTENER + listener, error)) < 0)
            return result;
    if ((result = nic->engine->open(nic, parameters, error)) < 0)
        return result;
    make_lists(nic);
    nic_posted_open(nic);
    nic->pages = nic_pages_make(nic);
    if (nic->pages == 0) {
        snprintf(error, 256, "nic: out of memory");
        return -ENOMEM;
    }
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT; index++)
        nic->hints[index].readable = nic->hints[index].writable = true;
    ATOLL_CRASH_POINT(domain, "nic.recover.begin");
    note_suspect(nic);
    apply_outcomes(nic);
    ATOLL_CRASH_POINT(domain, "nic.recover.applied");
    clear_intents(nic, nic->options.engine == NIC_ENGINE_URING);
    ATOLL_CRASH_POINT(domain, "nic.recover.cleared");
    nic->area->engine = nic->options.engine;
    look_at_all(nic);
    nic_courtesy_open(nic);
    nic_coalesce_open();
    nic->client_spin.hold_ns = HOLD_NS;
    nic->next_deadline_ns = nic->now_ns; /* the predecessor's deadlines */
    return 0;
}

struct nic *nic_open(struct atoll_domain *domain, const struct nic_limits *limits, const struct nic_options *options,
                     const struct atoll_uring_parameters *parameters, char *error)
{
    struct nic *nic = calloc(1, sizeof *nic);
    if (nic == 0) {
        snprintf(error, 256, "nic: out of memory");
        return 0;
    }
    nic->domain = domain;
    nic->journal = domain->journal;
    nic->public = (void *)((char *)domain->self + domain->self->role_offset);
    nic->area = (void *)((char *)nic->public + page_up(sizeof *nic->public));
    nic->buffers = (uint8_t *)domain->self + domain->self->buffer_offset;
    nic->limits = *limits;
    nic->options = *options;
    nic->epoll = -1;
    nic->now_ns = atoll_now_ns();
    nic->next_deadline_ns = UINT64_MAX;
    nic->engine = options->engine == NIC_ENGINE_URING ? &nic_engine_uring : &nic_engine_sockets;
    if (open_all(nic, parameters, error) < 0)
        return 0; /* the process ends with the reason */
    return nic;
}

void nic_close(struct nic *nic)
{
    nic->engine->close(nic);
    nic_courtesy_close(nic);
    nic_latency_close(nic);
    nic_pages_free(nic->pages);
    close(nic->epoll);
    free(nic->scratch);
    free(nic);
}
