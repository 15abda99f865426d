/*
 * Coalescing: a client on another processor that has many replies to read is let alone for a moment.
 *
 * Such a client sends its next requests one by one while it reads, and a nic that takes up each at once does all of its work per
 * request: a receive, two hand-overs to nbd, a send that wakes. As network cards moderate their interrupts, so nic sleeps here
 * after it has sent replies to a client, for less than the client needs to read them: then many requests are there together,
 * nobody has waited, and the processor was free meanwhile.
 *
 * That a client is such a one shows by its pace, which no client has that waits for each of its replies, and when nic has done all
 * that it knew of and more is there already: one that shares nic's processor has had no chance to send. That it has enough to read shows
 * afterwards: where a pause did not bring together what makes the next one worth it, pauses are soon tried rarely. (A client with eight
 * requests on their way would be out of replies at the end of each.) Who is faster than nic sends many at a time anyway.
 * Not for writes, whose replies are read in no time. Not where idle processors may sleep (latency.c): waking ours would cost more
 * than is gained.
 *
 * After a crash: nothing; it sleeps as any domain does, between two transactions, with `sleeping` set.
 */
#define _GNU_SOURCE
#include <sys/prctl.h>
#include <time.h>

#include "drivers/nic/nic.h"
#include "ipc/spin.h"

/* Replies to each connection from one look to the next, and the least and the most time that each may have taken: a client needs
 * 3.4 µs (libnbd) to 8 (fio, on a slower machine) for one. */
#define REPLIES_LEAST 4
#define PACE_LEAST_NS 2500u
#define PACE_MOST_NS 16000u
/* So many are read for longer than a pause lasts. */
#define REPLIES_MANY 9
/* Above that, on the average, requests bring data along: the client has next to nothing to read, and nic much to do. */
#define REQUEST_BYTES 1024
/* A request that comes from somebody else waits for so long at most. */
#define PAUSE_NS 40000
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
    if (replies >= REPLIES_MANY)
        coalesce->luck = (struct atoll_luck){0};
    else if (coalesce->paused)
        atoll_luck_vain(&coalesce->luck, 1);
    coalesce->paused = false;
    if (writes || took_ns < replies * PACE_LEAST_NS || took_ns > replies * PACE_MOST_NS ||
        !atoll_luck_tries(&coalesce->luck) || !nic_look(nic, 0))
        return false;
    if (!atoll_domain_may_sleep(nic->domain, ignored_roles))
        return true;
    static const struct timespec pause = {.tv_nsec = PAUSE_NS};
    coalesce->paused = true;
    atoll_count(nic->domain, NIC_PAUSES, 1);
    clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, 0);
    atoll_domain_awake(nic->domain);
    return true;
}
