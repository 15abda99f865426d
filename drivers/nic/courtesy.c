/*
 * Courtesy: nic does not interrupt a client that is still sending.
 *
 * A client on nic's own processor that has many requests to send would be interrupted by nic at the first of them, because who
 * was asleep comes first; then each request has a turn, and two switches of the processor, of its own. Under SCHED_BATCH a
 * process that wakes up waits until the one that runs has to wait for something: so the requests come together, and cost half.
 *
 * Where somebody computes on that processor and waits for nothing, courtesy would cost a time slice with each wake-up. How long nic
 * has waited for the processor is in /proc/self/schedstat: when it is too long nic is ordinary again, and tries once more
 * later, and later still each time that it goes wrong.
 *
 * After a crash: the kernel starts each incarnation under a policy of its own choice; this begins anew.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <unistd.h>

#include "drivers/nic/nic.h"

/* From one look at the waits to the next. */
#define LOOK_NS 20000000u
/* Mean wait for a turn on the processor. A client's burst is 0.1 to 0.3 ms, a time slice 2 ms and more. */
#define WAIT_MOST_NS 700000u
/* After courtesy has gone wrong: until it is tried again, doubled each time; and how long it must go well to be forgotten. */
#define PATIENCE_LEAST_NS 1000000000u
#define PATIENCE_MOST_NS (64ull * PATIENCE_LEAST_NS)

struct waits {
    unsigned long long ran_ns, waited_ns, turns;
};

static bool read_waits(const struct nic_courtesy *courtesy, struct waits *waits)
{
    char text[96];
    ssize_t length = pread(courtesy->schedstat, text, sizeof text - 1, 0);
    if (length <= 0)
        return false;
    text[length] = 0;
    return sscanf(text, "%llu %llu %llu", &waits->ran_ns, &waits->waited_ns, &waits->turns) == 3;
}

/* False: not permitted. `now`: the policy so far, with its flag. */
static bool become(int policy, int now)
{
    struct sched_param parameter = {0};
    return sched_setscheduler(0, policy | (now & SCHED_RESET_ON_FORK), &parameter) == 0;
}

void nic_courtesy_open(struct nic *nic)
{
    nic->courtesy = (struct nic_courtesy){.schedstat = -1, .next_ns = UINT64_MAX, .patience_ns = PATIENCE_LEAST_NS};
    if (!nic->options.courtesy)
        return;
    nic->courtesy.schedstat = open("/proc/self/schedstat", O_RDONLY | O_CLOEXEC);
    if (nic->courtesy.schedstat >= 0) /* without it there is no telling what courtesy costs */
        nic->courtesy.next_ns = atoll_now_ns() + LOOK_NS; /* not while the kernel makes ordinary who came first (process.py) */
}

void nic_courtesy_close(struct nic *nic)
{
    if (nic->courtesy.schedstat >= 0)
        close(nic->courtesy.schedstat);
}

void nic_courtesy_look(struct nic *nic)
{
    struct nic_courtesy *courtesy = &nic->courtesy;
    struct waits waits;
    courtesy->next_ns = nic->now_ns + LOOK_NS;
    if (!read_waits(courtesy, &waits)) {
        courtesy->next_ns = UINT64_MAX;
        return;
    }
    uint64_t waited = waits.waited_ns - courtesy->waited_ns, turns = waits.turns - courtesy->turns;
    courtesy->waited_ns = waits.waited_ns;
    courtesy->turns = waits.turns;
    int now = sched_getscheduler(0);
    switch (now & ~SCHED_RESET_ON_FORK) {
    case SCHED_BATCH:
        if (turns != 0 && waited / turns > WAIT_MOST_NS) {
            become(SCHED_OTHER, now);
            courtesy->again_ns = nic->now_ns + courtesy->patience_ns;
            if (courtesy->patience_ns < PATIENCE_MOST_NS)
                courtesy->patience_ns *= 2;
            atoll_count(nic->domain, NIC_COURTESY_ENDED, 1);
        } else if (nic->now_ns - courtesy->since_ns > PATIENCE_MOST_NS) {
            courtesy->patience_ns = PATIENCE_LEAST_NS;
        }
        break;
    case SCHED_OTHER:
        if (nic->now_ns >= courtesy->again_ns && !become(SCHED_BATCH, now))
            courtesy->next_ns = UINT64_MAX;
        courtesy->since_ns = nic->now_ns;
        break;
    default: /* coming first after a takeover: the kernel ends that */
        break;
    }
}
