/* When nic lets a client alone that has replies to read, and for how long: by a clock and counters of the test's own. */
/* link: ipc/domain.c ipc/spin.c */
#define _GNU_SOURCE
#include <time.h>

#include "arena_support.h"
#include "drivers/nic/nic.h"

static struct atoll_domain domain, peer;
static struct nic *nic;
static bool more_there;
static uint64_t pauses, paused_ns;

static int pause_for(clockid_t clock, int flags, const struct timespec *time, struct timespec *left)
{
    CHECK(clock == CLOCK_MONOTONIC && flags == 0 && time->tv_sec == 0 && left == 0);
    CHECK(domain.self->sleeping == 1); /* nbd wakes whom it has an answer for */
    pauses++;
    paused_ns = (uint64_t)time->tv_nsec;
    return 0;
}

bool nic_look(struct nic *its, int timeout_ms)
{
    CHECK(its == nic && timeout_ms == 0);
    return more_there;
}

uint32_t nic_connections(const struct nic *its) { return ATOLL_CONNECTION_COUNT - its->free_connection_count; }

#define clock_nanosleep pause_for
#include "drivers/nic/coalesce.c"

/* `replies` more, of requests of `bytes` each, in `ns`; true if nic paused. */
static bool pauses_after(uint64_t replies, uint64_t bytes, uint64_t ns)
{
    uint64_t before = pauses;
    domain.counters[NIC_REPLIES] += replies;
    domain.counters[NIC_RECEIVED_BYTES] += replies * bytes;
    nic->now_ns += ns;
    bool again = nic_coalesce(nic, 0);
    CHECK(pauses == before || again);
    CHECK(domain.self->sleeping == 0);
    return pauses != before;
}

int main(void)
{
    char error[256];
    nic = calloc(1, sizeof *nic);
    CHECK(nic != 0);
    make_arena(ATOLL_ROLE_KERNEL, 1u << ATOLL_ROLE_NBD | 1u << ATOLL_ROLE_NIC, 64, 0);
    make_arena(ATOLL_ROLE_NIC, 1u << ATOLL_ROLE_NBD | 1u << ATOLL_ROLE_KERNEL, 64, 0);
    make_arena(ATOLL_ROLE_NBD, 1u << ATOLL_ROLE_NIC | 1u << ATOLL_ROLE_KERNEL, 64, 0);
    CHECK(atoll_domain_open(&domain, ATOLL_ROLE_NIC, 1, 1, 0, arena_bytes, error) == 0);
    CHECK(atoll_domain_open(&peer, ATOLL_ROLE_NBD, 1, 1, 0, arena_bytes, error) == 0);
    nic->domain = &domain;
    nic->free_connection_count = ATOLL_CONNECTION_COUNT - 1;
    nic->now_ns = 1000000;
    more_there = true;

    CHECK(!pauses_after(16, 28, 80000)); /* idle processors may sleep */
    nic->latency.held = true;
    CHECK(!pauses_after(16, 28, UINT32_MAX)); /* what came before may have taken any time */
    CHECK(pauses_after(16, 28, 80000) && paused_ns == PAUSE_NS);
    CHECK(pauses_after(16, 28, 16 * PACE_MOST_NS) && pauses_after(16, 28, 16 * PACE_LEAST_NS));

    CHECK(!pauses_after(3, 28, 10000) && pauses_after(6, 28, 35000)); /* few replies are added to the next ones */
    CHECK(!pauses_after(16, 28, 16 * PACE_MOST_NS + 1));              /* a client that waits for its replies is slower */
    CHECK(!pauses_after(16, 28, 16 * PACE_LEAST_NS - 1));             /* one that is faster than nic sends many at a time */
    CHECK(!pauses_after(16, 28 + 4096, 80000));                       /* writes */
    CHECK(pauses_after(16, 28, 80000));
    more_there = false; /* it has had no chance to send, or waits for its replies */
    CHECK(!pauses_after(16, 28, 80000));
    more_there = true;
    CHECK(pauses_after(16, 28, 80000));

    /* Of a client with eight requests a pause never brings nine together: more and more occasions are let pass. */
    for (uint32_t rest = 1; rest <= ATOLL_SPIN_REST; rest = 2 * rest + 1) {
        for (uint32_t passed = 0; passed < rest; passed++)
            CHECK(!pauses_after(8, 28, 40000));
        CHECK(pauses_after(8, 28, 40000));
    }
    CHECK(pauses_after(16, 28, 80000) && pauses_after(16, 28, 80000)); /* but when many come they are */

    nic->free_connection_count = ATOLL_CONNECTION_COUNT - 4; /* four share what there is */
    CHECK(!pauses_after(12, 28, 60000) && pauses_after(28, 28, 60000));
    nic->free_connection_count = ATOLL_CONNECTION_COUNT; /* the last one has just gone */
    CHECK(!pauses_after(16, 28, 80000));
    nic->free_connection_count = ATOLL_CONNECTION_COUNT - 1;
    CHECK(pauses_after(16, 28, 80000));

    struct atoll_descriptor message = {.opcode = ATOLL_OP_REPLY}; /* nbd has an answer: it goes first */
    CHECK(atoll_domain_put(&peer, ATOLL_ROLE_NIC, &message));
    atoll_domain_commit(&peer);
    CHECK(!pauses_after(16, 28, 80000));
    CHECK(domain.counters[NIC_PAUSES] == pauses && pauses > 10);
    free(nic);
    puts("coalesce: ok");
    return 0;
}
