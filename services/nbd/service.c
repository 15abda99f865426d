/*
 * The steps of the NBD service: attach, run, and the answer to a negotiation's frame. What a message does is in transmission.c.
 *
 * A step takes messages from dedup first (they finish requests), then from nic, up to NBD_STEP_MESSAGES, and commits once. Room
 * for all that they can cause is looked for before, so putting a message never fails.
 *
 * After a crash: nbd_attach finds connections and slots as of the last commit (the common part has rolled back) and notes the
 * suspect: the request named by `header.current`, if its domain died of a signal of its own making. As long as there are
 * suspects, a step is one message; a suspect that is executed in peace is forgotten, one that crashes again is refused (I8).
 */
#include <stdlib.h>

#include "services/nbd/transmission.h"

_Static_assert(sizeof(struct atoll_suspect) == 16, "suspects");

uint64_t nbd_area_bytes(void) { return sizeof(struct nbd_area); }
struct nbd_area *nbd_area(struct nbd *nbd) { return nbd->area; }

/* --- Suspects ---------------------------------------------------------------------------------------------------- */

static struct atoll_suspect *find_suspect(struct nbd *nbd, uint64_t identity)
{
    for (uint32_t i = 0; i < ATOLL_SUSPECT_COUNT; i++)
        if (nbd->suspects[i].crashes != 0 && nbd->suspects[i].identity == identity)
            return &nbd->suspects[i];
    return 0;
}

static void note_suspect(struct nbd *nbd, uint64_t identity)
{
    struct atoll_suspect *suspect = find_suspect(nbd, identity);
    for (uint32_t i = 0; suspect == 0 && i < ATOLL_SUSPECT_COUNT; i++)
        if (nbd->suspects[i].crashes == 0)
            suspect = &nbd->suspects[i];
    if (suspect == 0)
        suspect = &nbd->suspects[0]; /* sixteen others: the oldest gets another chance */
    uint32_t crashes = suspect->identity == identity ? suspect->crashes : 0;
    atoll_save(nbd->domain->journal, suspect, sizeof *suspect);
    *suspect = (struct atoll_suspect){.identity = identity, .crashes = crashes + 1};
}

static void count_suspects(struct nbd *nbd)
{
    nbd->suspect_count = 0;
    for (uint32_t i = 0; i < ATOLL_SUSPECT_COUNT; i++)
        nbd->suspect_count += nbd->suspects[i].crashes != 0;
}

bool nbd_poisoned(struct nbd *nbd, uint64_t identity)
{
    if (__builtin_expect(nbd->suspect_count == 0, 1))
        return false;
    const struct atoll_suspect *suspect = find_suspect(nbd, identity);
    return suspect != 0 && suspect->crashes >= 2;
}

static void absolve(struct nbd *nbd, uint64_t identity)
{
    struct atoll_suspect *suspect = nbd->suspect_count == 0 ? 0 : find_suspect(nbd, identity);
    if (suspect == 0)
        return;
    atoll_save(nbd->domain->journal, suspect, sizeof *suspect);
    *suspect = (struct atoll_suspect){0};
    count_suspects(nbd);
}

static void set_current(struct nbd *nbd, uint64_t identity)
{
    *(volatile uint64_t *)&nbd->domain->self->current = identity;
    atoll_compiler_barrier();
}

/* --- Attaching --------------------------------------------------------------------------------------------------- */

/* Connections, slots and suspects of processes that are all gone. In the running transaction; at most three words of each. */
static void forget_all(struct nbd *nbd)
{
    struct atoll_journal *journal = nbd->domain->journal;
    for (uint32_t i = 0; i < ATOLL_CONNECTION_COUNT; i++) {
        struct nbd_connection *connection = &nbd->area->connections[i];
        if (connection->negotiation.state != NBD_CONNECTION_FREE)
            atoll_set32(journal, &connection->negotiation.state, NBD_CONNECTION_FREE);
        if (connection->in_flight != 0)
            atoll_set32(journal, &connection->in_flight, 0);
        if (nbd->area->public.volume[i] != 0)
            atoll_set32(journal, &nbd->area->public.volume[i], 0);
    }
    for (uint32_t i = 0; i < ATOLL_SLOT_COUNT; i++)
        if (nbd->area->slots[i].state != NBD_SLOT_FREE)
            atoll_set32(journal, &nbd->area->slots[i].state, NBD_SLOT_FREE);
    atoll_set32(journal, &nbd->area->waiting, 0);
    for (uint32_t i = 0; i < ATOLL_SUSPECT_COUNT; i++)
        if (nbd->suspects[i].crashes != 0)
            atoll_set32(journal, &nbd->suspects[i].crashes, 0);
}

struct nbd *nbd_attach(struct atoll_domain *domain, int previous_signal, int reset)
{
    struct nbd *nbd = calloc(1, sizeof *nbd);
    if (nbd == 0)
        return 0;
    assert(domain->self->role_bytes >= sizeof(struct nbd_area));
    nbd->domain = domain;
    nbd->area = (void *)((char *)domain->self + domain->self->role_offset);
    nbd->suspects = (void *)((char *)domain->self + ATOLL_SUSPECTS_OFFSET);
    uint64_t current = domain->self->current;
    /* SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV: it crashed by itself. Any other signal is nobody's fault. */
    bool by_itself = previous_signal == 4 || previous_signal == 6 || previous_signal == 7 || previous_signal == 8 ||
                     previous_signal == 11;
    if (reset)
        forget_all(nbd);
    else if (by_itself && current != 0)
        note_suspect(nbd, current);
    if (current != 0)
        atoll_set64(domain->journal, &domain->self->current, 0);
    atoll_domain_commit(domain);
    atoll_lookup_attach(nbd->domain, &nbd->looker, &nbd->area->public.uses);
    count_suspects(nbd);
    return nbd;
}

void nbd_detach(struct nbd *nbd) { free(nbd); }

/* --- Steps ------------------------------------------------------------------------------------------------------- */

/* A copy of the next message from `role`; it stays in the ring until accept. */
static bool peek(struct nbd *nbd, uint32_t role, struct atoll_descriptor *message)
{
    if (atoll_domain_pending(nbd->domain, role) == 0)
        return false;
    *message = *atoll_ring_entry(&nbd->domain->rings->rx[role], 0);
    atoll_compiler_barrier(); /* as atoll_domain_take */
    if (atoll_trace_armed(nbd->domain)) /* before what it causes, so that the hops stand in their order */
        atoll_trace_hop(nbd->domain, role, 0, message);
    return true;
}

static void accept(struct nbd *nbd, uint32_t role)
{
    atoll_ring_pop(&nbd->domain->rings->rx[role], 1);
    atoll_count(nbd->domain, NBD_COUNTER_MESSAGES, 1);
}

/* Messages for whose consequences there is room: each causes at most two to nic and one to dedup, and may let all go that
 * wait. */
static uint32_t affordable(struct nbd *nbd, uint32_t messages)
{
    uint32_t nic = atoll_ring_room(&nbd->domain->rings->tx[ATOLL_ROLE_NIC]);
    nic = nic < nbd->area->waiting ? 0 : (nic - nbd->area->waiting) / 2;
    uint32_t dedup = atoll_ring_room(&nbd->domain->rings->tx[ATOLL_ROLE_DEDUP]);
    uint32_t room = nic < dedup ? nic : dedup;
    return messages < room ? messages : room;
}

static void commit_step(struct nbd *nbd)
{
    set_current(nbd, 0);
    ATOLL_CRASH_POINT(nbd->domain, "nbd.before_commit");
    atoll_domain_commit(nbd->domain);
    ATOLL_CRASH_POINT(nbd->domain, "nbd.after_commit");
    atoll_count(nbd->domain, NBD_COUNTER_STEPS, 1);
}

/* At most NBD_STEP_MESSAGES in one transaction; 0 or a reason for Python. */
static int step(struct nbd *nbd)
{
    struct atoll_descriptor message;
    uint32_t limit = affordable(nbd, nbd->suspect_count != 0 ? 1 : NBD_STEP_MESSAGES);
    uint32_t taken = 0;

    if (nbd->framed)
        return NBD_REASON_FRAME;
    if (atoll_lookup_is_stale(nbd->domain, &nbd->looker))
        atoll_lookup_attach(nbd->domain, &nbd->looker, &nbd->area->public.uses);
    nbd->unstable = 0;
    for (; taken < limit && peek(nbd, ATOLL_ROLE_DEDUP, &message); taken++) {
        set_current(nbd, message.identity);
        nbd_take_done(nbd, &message);
        absolve(nbd, message.identity);
        accept(nbd, ATOLL_ROLE_DEDUP);
        ATOLL_CRASH_POINT(nbd->domain, "nbd.done_taken");
    }
    nbd->alone = atoll_ring_waiting(&nbd->domain->rings->rx[ATOLL_ROLE_NIC]) <= 1; /* the entries do not say it all */
    for (; taken < limit && peek(nbd, ATOLL_ROLE_NIC, &message); taken++) {
        set_current(nbd, message.identity);
        enum nbd_outcome outcome = nbd_take_nic(nbd, &message);
        if (outcome != NBD_OUTCOME_TAKEN) {
            nbd->framed = outcome == NBD_OUTCOME_FRAME;
            nbd->unstable = outcome == NBD_OUTCOME_UNSTABLE;
            nbd->message = message;
            break;
        }
        absolve(nbd, message.identity);
        accept(nbd, ATOLL_ROLE_NIC);
        ATOLL_CRASH_POINT(nbd->domain, "nbd.request_taken");
    }
    nbd->taken = taken;
    nbd->stalled = limit == 0;
    if (taken != 0) {
        commit_step(nbd);
        atoll_lookup_tidy(&nbd->looker);
    }
    if (!nbd->framed) {
        set_current(nbd, 0);
        return 0;
    }
    set_current(nbd, nbd->message.identity); /* Python executes it */
    return NBD_REASON_FRAME;
}

int nbd_run(struct nbd *nbd)
{
    struct atoll_domain *domain = nbd->domain;
    for (;;) {
        atoll_store_relaxed(&domain->self->progress, domain->self->progress + 1);
        if (atoll_domain_pending(domain, ATOLL_ROLE_KERNEL) != 0)
            return ATOLL_REASON_CONTROL;
        int reason = step(nbd);
        if (reason != 0)
            return reason;
        if (nbd->taken != 0)
            continue;
        if (nbd->stalled) /* a peer does not empty its ring: look again soon */
            atoll_domain_sleep(domain, 1u << ATOLL_ROLE_NIC | 1u << ATOLL_ROLE_DEDUP, 1000000);
        else if (nbd->unstable) /* dedup died while it changed the volumes: its successor finishes it */
            atoll_domain_sleep(domain, 1u << ATOLL_ROLE_NIC, 1000000);
        else
            atoll_domain_sleep(domain, 0, -1);
    }
}

/* --- Negotiation: what Python decided ---------------------------------------------------------------------------- */

const struct nbd_frame *nbd_frame(struct nbd *nbd) { return nbd->framed ? &nbd->frame : 0; }

void nbd_answer(struct nbd *nbd, const struct nbd_answer *answer)
{
    struct atoll_journal *journal = nbd->domain->journal;
    struct atoll_descriptor *message = &nbd->message;
    uint32_t number = atoll_identity_connection(message->identity), place = atoll_identity_slot(message->identity);
    struct nbd_connection *connection = &nbd->area->connections[number];
    struct nbd_slot *slot = &nbd->area->slots[place];

    assert(nbd->framed && answer->length <= NBD_REPLY_BYTES && !(answer->more && answer->close));
    atoll_save(journal, connection, sizeof *connection);
    if (message->opcode == ATOLL_OP_OPEN)
        *connection = (struct nbd_connection){0};
    connection->negotiation = answer->negotiation;
    if (answer->close)
        connection->negotiation.state = NBD_CONNECTION_CLOSING;
    if (connection->negotiation.state == NBD_CONNECTION_TRANSMISSION) {
        assert(answer->volume < ATOLL_VOLUME_COUNT);
        connection->volume = answer->volume;
        connection->generation = answer->generation;
        atoll_set32(journal, &nbd->area->public.volume[number], answer->volume + 1);
    }

    struct atoll_descriptor reply = {.opcode = ATOLL_OP_REPLY, .identity = message->identity, .length = answer->length};
    if (answer->length != 0) {
        memcpy(nbd->area->replies[place].bytes, answer->data, answer->length);
        reply.address = (uint64_t)(uintptr_t)nbd->area->replies[place].bytes;
    }
    uint32_t part = message->opcode == ATOLL_OP_SENT ? slot->part + 1 : 0;
    reply.part = (uint16_t)part;
    if (answer->more) {
        atoll_save(journal, slot, sizeof *slot);
        slot->identity = message->identity;
        slot->part = part;
        slot->state = NBD_SLOT_LISTING;
    } else {
        if (slot->state != NBD_SLOT_FREE)
            atoll_set32(journal, &slot->state, NBD_SLOT_FREE);
        reply.flags = (uint8_t)(ATOLL_FLAG_LAST | (answer->close ? ATOLL_FLAG_CLOSE : 0));
        reply.halves[0] = answer->framing;
        if (connection->negotiation.state == NBD_CONNECTION_TRANSMISSION) {
            reply.halves[1] = answer->volume + 1;
            reply.halves[2] = answer->generation;
            reply.halves[3] = (answer->negotiation.features & (NBD_FEATURE_STRUCTURED | NBD_FEATURE_EXTENDED)) != 0;
        }
    }
    nbd_put(nbd, ATOLL_ROLE_NIC, &reply);
    atoll_count(nbd->domain, message->opcode == ATOLL_OP_OPEN ? NBD_COUNTER_OPENED : NBD_COUNTER_OPTIONS, 1);
    absolve(nbd, message->identity);
    accept(nbd, ATOLL_ROLE_NIC);
    nbd->framed = 0;
    ATOLL_CRASH_POINT(nbd->domain, "nbd.frame_answered");
    commit_step(nbd);
}

void nbd_postpone(struct nbd *nbd)
{
    assert(nbd->framed);
    nbd->framed = 0;
    set_current(nbd, 0);
    atoll_domain_sleep(nbd->domain, 1u << ATOLL_ROLE_NIC, 1000000);
}
