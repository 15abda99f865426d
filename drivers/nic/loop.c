/*
 * The main loop. A turn:
 *
 *   1. messages of nbd and dedup; timeouts; accepts
 *   2. each connection on the work list: parse what is there, intend a send, intend a receive, go on with its life
 *   3. commit; take the outcomes applied last time out of the completion queue
 *   4. perform what was intended, all in one system call
 *   5. apply the outcomes (in the transaction that step 3 of the next turn commits)
 *
 * epoll is asked when there is nothing to do, and now and then otherwise. Nothing here takes time in proportion to
 * the number of connections.
 *
 * After a crash: between 3 and the next 3 all is rolled back and found again: messages in the rings, outcomes in the
 * completion queue.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "drivers/nic/engine.h"
#include "ipc/control.h"
#include "ipc/spin.h"

#define TURN_CONNECTIONS 64
#define TURN_NBD_MESSAGES 64
#define ACCEPT_BATCH 16
#define EVENTS 64

/* --- Steps ------------------------------------------------------------------------------------------------------- */

void nic_commit(struct nic *nic)
{
    nic->posted_looked = false; /* SP-POST: before a step that takes ENDs, also where the last one changed nothing because all wait */
    if (atoll_domain_changes(nic->domain) == 0 && nic->freed_slot_count == 0) /* a message put alone is a change, too */
        return;
    ATOLL_CRASH_POINT(nic->domain, "nic.commit.before");
    atoll_domain_commit(nic->domain);
    ATOLL_CRASH_POINT(nic->domain, "nic.commit.after");
    /* Only now is what was freed free: a rolled back step finds it as it was. */
    for (uint32_t index = 0; index < nic->freed_slot_count; index++) {
        uint32_t slot = nic->freed_slots[index];
        atoll_store_release(&nic->public->done[slot], nic->area->slots[slot].sequence); /* SP-DONE */
        nic->free_slots[nic->free_slot_count++] = (uint16_t)slot;
    }
    ATOLL_CRASH_POINT(nic->domain, "nic.done.after");
    for (uint32_t index = 0; index < nic->ended_count; index++)
        atoll_store_release(&nic->public->ending[nic->ended[index]], 1);
    nic->ended_count = 0;
    for (uint32_t index = 0; index < nic->freed_connection_count; index++)
        nic->free_connections[nic->free_connection_count++] = nic->freed_connections[index];
    for (uint32_t index = 0; index < nic->freed_stream_count; index++)
        nic->free_streams[nic->free_stream_count++] = nic->freed_streams[index];
    while (nic->freed_slot_count != 0 && !nic_queue_empty(&nic->slot_waiters)) /* all: the one that may go on may be the last */
        nic_schedule(nic, nic_queue_take(&nic->slot_waiters));
    nic->freed_slot_count = nic->freed_connection_count = nic->freed_stream_count = 0;
    nic_pages_committed(nic);
    nic_posted_committed(nic);
    atoll_lookup_tidy(&nic->looker);
    if (!nic_queue_empty(&nic->page_waiters))
        nic_schedule(nic, nic_queue_first(&nic->page_waiters));
}

uint64_t nic_intent(struct nic *nic, struct nic_connection *connection, enum nic_operation kind)
{
    uint32_t sequence = (connection->operation[kind] >> 1) + 1;
    assert(!(connection->operation[kind] & 1));
    atoll_set32(nic->journal, &connection->operation[kind], sequence << 1 | 1);
    return nic_user_data(kind, nic_index(nic, connection), sequence & 0x7fffffff);
}

static void accept_seen(struct nic *nic, struct nic_connection *connection, int32_t result)
{
    uint32_t listener = connection->listener;
    if (result >= 0) {
        nic_accepted(nic, connection);
        if (listener < NIC_LISTENER_COUNT && nic->accept_batch[listener] < ACCEPT_BATCH)
            nic->accept_batch[listener] *= 2;
        return;
    }
    nic_connection_freed(nic, connection);
    if (listener >= NIC_LISTENER_COUNT || result == -EINTR || result == -ECONNABORTED)
        return;
    nic->accept_batch[listener] = 1;
    if (result == -EAGAIN) {
        nic->listener_ready[listener] = false;
    } else {
        atoll_count(nic->domain, NIC_ACCEPT_FAILURES, 1);
        nic->accept_retry_ns = nic->now_ns + NIC_RETRY_NS;
        nic_deadline(nic, nic->accept_retry_ns);
    }
}

void nic_apply(struct nic *nic, const struct nic_outcome *outcome)
{
    uint32_t kind = (uint32_t)(outcome->user_data >> 56), index = (uint32_t)(outcome->user_data >> 40) & 0xffff;
    uint32_t sequence = (uint32_t)outcome->user_data;
    if (index >= ATOLL_CONNECTION_COUNT)
        return;
    struct nic_connection *connection = &nic->area->connections[index];
    struct nic_hint *hint = &nic->hints[index];

    if (kind < NIC_OPERATION_KINDS) {
        if (connection->operation[kind] != (sequence << 1 | 1))
            return; /* applied before */
        atoll_set32(nic->journal, &connection->operation[kind], sequence << 1);
        nic->domain->self->current = atoll_identity(index, NIC_NO_SLOT, sequence << 2 | kind);
    } else if (nic->recovering) {
        return; /* a descriptor of the dead process, a poll of its own */
    }
    switch (kind) {
    case NIC_RECEIVE:
        nic_received(nic, connection, outcome->result);
        break;
    case NIC_SEND:
        nic_sent(nic, connection, outcome->result);
        break;
    case NIC_LIFE:
        if (connection->phase == NIC_ACCEPTING) {
            accept_seen(nic, connection, outcome->result);
        } else {
            nic_set32(nic, &connection->socket_open, 0);
            nic_schedule(nic, index);
        }
        break;
    case NIC_DESCRIPTOR:
        hint->descriptor_pending = false;
        if (outcome->result >= 0) {
            nic_watch_descriptor(nic, index, outcome->result);
            close(outcome->result);
        } else if (connection->phase == NIC_OPEN || connection->phase == NIC_ENDING) {
            atoll_count(nic->domain, NIC_SOCKET_ERRORS, 1);
            nic_gone(nic, connection); /* cannot be watched */
        } else {
            hint->want_shutdown = false;
        }
        break;
    case NIC_DRAIN:
        hint->drain_pending = false;
        if (connection->phase != NIC_LINGER)
            break;
        if (outcome->result == -EAGAIN)
            hint->readable = false;
        else if (outcome->result <= 0 && outcome->result != -EINTR)
            nic_gone(nic, connection);
        nic_schedule(nic, index);
        break;
    case NIC_POLL:
        if (sequence == UINT32_MAX || sequence != (uint32_t)hint->poll)
            break;
        if (!(outcome->flags & IORING_CQE_F_MORE))
            hint->registered = false;
        hint->readable = hint->writable = true;
        if (outcome->result > 0 && (outcome->result & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)))
            hint->hangup = true;
        nic_schedule(nic, index);
        break;
    }
    nic->domain->self->current = 0;
}

/* Into the epoll set, or for other events than before. The set knows a socket by the number that its descriptor had, which is the
 * lowest free one and so the same each time; if not, there is a second entry, that says the same twice. */
static int watch_socket(struct nic *nic, uint32_t connection, int fd, bool registered, bool blocks)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET, .data.u64 = connection};
    if (blocks)
        event.events |= EPOLLOUT;
    if (epoll_ctl(nic->epoll, registered ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) == 0)
        return 0;
    if (errno != ENOENT && errno != EEXIST)
        return -errno;
    return epoll_ctl(nic->epoll, errno == ENOENT ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event) < 0 ? -errno : 0;
}

void nic_watch_descriptor(struct nic *nic, uint32_t connection, int fd)
{
    struct nic_hint *hint = &nic->hints[connection];
    if (!hint->registered || hint->blocks_watched != hint->blocks) {
        int on = 1;
        if (!hint->registered)
            (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* a Unix socket has no such option */
        if (watch_socket(nic, connection, fd, hint->registered, hint->blocks) < 0) {
            atoll_count(nic->domain, NIC_SOCKET_ERRORS, 1);
            nic_gone(nic, &nic->area->connections[connection]);
            return;
        }
        hint->registered = true;
        hint->blocks_watched = hint->blocks;
    }
    if (hint->want_shutdown) {
        hint->want_shutdown = false;
        shutdown(fd, SHUT_WR);
    }
}

/* --- Turns ------------------------------------------------------------------------------------------------------- */

static void accept_connections(struct nic *nic)
{
    if (nic->area->stopping || nic->now_ns < nic->accept_retry_ns)
        return;
    for (uint32_t listener = 0; listener < nic->options.listener_count; listener++) {
        if (!nic->listener_ready[listener])
            continue;
        for (uint32_t count = nic->accept_batch[listener]; count > 0; count--) {
            uint32_t used = ATOLL_CONNECTION_COUNT - nic->free_connection_count - nic->freed_connection_count;
            if (nic->free_connection_count == 0 || used >= nic->limits.max_connections || nic->engine->room(nic) == 0)
                return;
            struct nic_connection *connection = &nic->area->connections[nic->free_connections[--nic->free_connection_count]];
            nic_set32(nic, &connection->phase, NIC_ACCEPTING);
            nic_set32(nic, &connection->listener, listener);
            nic->engine->accept(nic, nic_index(nic, connection), nic->options.listeners[listener], nic_intent(nic, connection, NIC_LIFE));
        }
    }
}

static uint32_t work(struct nic *nic)
{
    uint32_t count = nic_queue_count(&nic->work), done = 0;
    if (count > TURN_CONNECTIONS)
        count = TURN_CONNECTIONS;
    for (; done < count && nic->journal->count < NIC_JOURNAL_LIMIT; done++) {
        struct nic_connection *connection = &nic->area->connections[nic_queue_take(&nic->work)];
        nic_send(nic, connection);
        nic_receive(nic, connection);
        nic_connection_life(nic, connection);
    }
    return done;
}

bool nic_look(struct nic *nic, int timeout_ms)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(nic->epoll, events, EVENTS, timeout_ms);
    nic->turns_since_look = 0;
    for (int index = 0; index < count; index++) {
        uint64_t what = events[index].data.u64;
        uint32_t mask = events[index].events;
        if (what < ATOLL_CONNECTION_COUNT) {
            struct nic_hint *hint = &nic->hints[what];
            if (mask & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
                hint->readable = true;
            if (mask & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
                hint->hangup = true;
            if (mask & (EPOLLOUT | EPOLLHUP | EPOLLERR))
                hint->writable = true;
            nic_schedule(nic, (uint32_t)what);
        } else if (what == NIC_READY_RING) {
            nic->ring_ready = true;
        } else if (what >= NIC_READY_LISTENER && what < NIC_READY_LISTENER + NIC_LISTENER_COUNT) {
            nic->listener_ready[what - NIC_READY_LISTENER] = true;
        }
    }
    return count > 0;
}

/* For a spinning nic. Whatever it is: epoll tells it once only. */
static bool look_at_sockets(void *context) { return nic_guess(context) || nic_look(context, 0); }

static int timeout_ms(const struct nic *nic, uint64_t until_ns, bool blocked)
{
    uint64_t at = nic->next_deadline_ns, held_until = nic_latency_until(nic);
    if (held_until < at)
        at = held_until;
    if (until_ns != 0 && until_ns < at)
        at = until_ns;
    if (blocked && nic->now_ns + NIC_RETRY_NS < at)
        at = nic->now_ns + NIC_RETRY_NS;
    if (at == UINT64_MAX)
        return -1;
    if (at <= nic->now_ns)
        return 0;
    uint64_t milliseconds = (at - nic->now_ns + 999999) / 1000000;
    return milliseconds > 60000 ? 60000 : (int)milliseconds;
}

int nic_run(struct nic *nic, uint64_t until_ns, int ignore_control)
{
    struct atoll_domain *domain = nic->domain;
    for (bool flushed = false;;) {
        domain->self->progress++;
        atoll_count(domain, NIC_TURNS, 1);
        if (!flushed) /* it is right, then */
            nic->now_ns = atoll_now_ns();
        flushed = false;
        if (nic->now_ns >= nic->courtesy.next_ns)
            nic_courtesy_look(nic);
        nic_latency_look(nic);
        bool control = !ignore_control && atoll_domain_pending(domain, ATOLL_ROLE_KERNEL) != 0;
        if (control || (until_ns != 0 && nic->now_ns >= until_ns)) {
            nic_commit(nic);
            nic->engine->retire(nic);
            return control ? ATOLL_REASON_CONTROL : 0;
        }
        struct atoll_tx_ring *to_nbd = &domain->rings->tx[ATOLL_ROLE_NBD];
        uint32_t room = to_nbd->producer == 0 ? 0 : atoll_ring_room(to_nbd);
        bool blocked = room < NIC_TURN_MESSAGES; /* never, with as many entries as the contract says */
        nic->message_budget = blocked ? 0 : NIC_TURN_MESSAGES;

        /* Where the bytes of an operation landed follows from the connection's state: nothing may change it (a DISCARD, a
         * timeout) before all outcomes of the last turn are applied, of which `flush` gives 64 at once. */
        uint32_t done = 0;
        if (nic->operation_count == 0) {
            done = nic_messages(nic, TURN_NBD_MESSAGES);
            if (nic->now_ns >= nic->next_deadline_ns)
                nic_timeouts(nic);
            accept_connections(nic);
            done += work(nic);
        }

        bool freed = nic->freed_connection_count != 0; /* somebody may wait for one to be accepted */
        nic_commit(nic);
        nic->engine->retire(nic);

        if (nic->operation_count > 0 || nic->ring_ready || nic->submission_needed) {
            nic->ring_ready = nic->submission_needed = false;
            atoll_count(domain, NIC_SUBMITS, 1);
            uint32_t count = nic->engine->flush(nic);
            nic->now_ns = atoll_now_ns();
            flushed = true;
            for (uint32_t index = 0; index < count; index++) {
                if (nic->outcomes[index].user_data >> 56 != NIC_POLL)
                    nic->operation_count--;
                nic_apply(nic, &nic->outcomes[index]);
            }
        }
        uint32_t ignored = (ignore_control ? 1u << ATOLL_ROLE_KERNEL : 0) | (blocked ? 1u << ATOLL_ROLE_NBD : 0);
        /* The outcomes that were applied are still to be committed. */
        bool more = flushed || freed || !nic_queue_empty(&nic->work);
        if (done > 0 || more) {
            /* Not between an operation and its outcome: "it was empty" would undo "more has come", which is not told again. */
            if (++nic->turns_since_look >= NIC_TURNS_PER_LOOK && nic->operation_count == 0)
                more |= nic_look(nic, 0);
            more |= atoll_domain_anything_pending(domain, ignored);
        }
        if (more)
            continue;
        struct atoll_spin *spin = nic->free_slot_count + nic->posted < ATOLL_SLOT_COUNT ? &nic->peer_spin : &nic->client_spin;
        if (nic_coalesce(nic, ignored))
            continue;
        /* To spin begins with giving way, which is right after a reply: the client has yet to read it. But where it gave way and
         * then only pages came back, what clients sent meanwhile would wait for another turn of others, and that again and again. */
        uint64_t replies = domain->counters[NIC_REPLIES];
        if (spin == &nic->client_spin && replies == nic->replies_at_spin && nic->turns_since_look != 0 && nic_look(nic, 0))
            continue;
        nic->replies_at_spin = replies;
        uint64_t held = spin->held;
        bool came = atoll_domain_spin(domain, spin, ignored, look_at_sockets, nic);
        atoll_count(domain, NIC_HELD, spin->held - held);
        if (came || !atoll_domain_may_sleep(domain, ignored))
            continue;
        atoll_count(domain, NIC_WAITS, 1);
        nic_look(nic, timeout_ms(nic, until_ns, blocked));
        atoll_domain_awake(domain);
    }
}
