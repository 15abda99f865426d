/*
 * Coalescing: a client on another processor that has replies to read is let alone for a moment.
 *
 * Such a client sends its next requests one by one while it reads, and a nic that takes up each at once does all of its work per
 * request: a receive, two hand-overs to nbd, a send that wakes. As network cards moderate their interrupts, so nic sleeps here
 * after it has sent several replies to a client, for less than the client needs to read them: then many requests are there
 * together, nobody has waited, and the processor was free meanwhile.
 *
 * That a client is such a one shows by its pace, which no client has that waits for each of its replies, and when nic has done all
 * that it knew of and more is there already: one that shares nic's processor has had no chance to send.
 * Not for writes, whose replies are read in no time. Not where idle processors may sleep (latency.c): waking ours would cost more
 * than is gained.
 *
 * After a crash: nothing; it sleeps as any domain does, between two transactions, with `sleeping` set.
 */
#define _GNU_SOURCE
#include <sys/prctl.h>
#include <time.h>

#include "drivers/nic/nic.h"

/* Replies to each connection from one look to the next, and the most time that each may have taken. */
#define REPLIES_LEAST 4
#define PACE_NS 8000u
/* Above that, on the average, requests bring data along: the client has next to nothing to read, and nic much to do. */
#define REQUEST_BYTES 1024
/* A client needs more for one: fio 4.2 µs, a bare libnbd 3.9. */
#define REPLY_NS 3000u
/* Bounds what a request can wait that comes from somebody else. */
#define PAUSE_MOST_NS 20000u
/* Linux lets a sleep last up to 50 µs longer, if it is not told otherwise. */
#define SLACK_NS 1u

void nic_coalesce_open(void) { prctl(PR_SET_TIMERSLACK, SLACK_NS); }

bool nic_coalesce(struct nic *nic, uint32_t ignored_roles)
{
    struct nic_coalesce *coalesce = &nic->coalesce;
    uint64_t all = nic->domain->counters[NIC_REPLIES], connections = nic_connections(nic);
    uint64_t received = nic->domain->counters[NIC_RECEIVED_BYTES];
    uint64_t replies = connections == 0 ? 0 : (all - coalesce->replies) / connections;

    if (!nic->latency.held || replies < REPLIES_LEAST)
        return false;
    uint64_t took_ns = nic->now_ns - coalesce->since_ns;
    bool writes = received - coalesce->received_bytes > replies * connections * REQUEST_BYTES;
    coalesce->replies = all;
    coalesce->received_bytes = received;
    coalesce->since_ns = nic->now_ns;
    if (writes || took_ns > replies * PACE_NS || !nic_look(nic, 0))
        return false;
    if (!atoll_domain_may_sleep(nic->domain, ignored_roles))
        return true;
    uint64_t pause_ns = replies * REPLY_NS;
    struct timespec pause = {.tv_nsec = (long)(pause_ns < PAUSE_MOST_NS ? pause_ns : PAUSE_MOST_NS)};
    atoll_count(nic->domain, NIC_PAUSES, 1);
    clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, 0);
    atoll_domain_awake(nic->domain);
    return true;
}
