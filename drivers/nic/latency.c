/*
 * CPU latency: while clients send, the machine's idle processors may not sleep deeper than `latency_us` allows.
 *
 * With few requests under way each of them finds somebody asleep: the client's processor when the reply comes, ours when the
 * next request does. The request to the operating system (PM QoS, kernel/latency.py) costs power and, in a virtual machine, the
 * host's time; so it is made only while requests come in quick succession, and let go soon after.
 *
 * Of NIC_LATENCY_BURST requests in a row it counts how long they took: less than NIC_LATENCY_BEGIN_NS, and it asks; NIC_LATENCY_END_NS,
 * and it lets go. In between nothing changes, so a load near one of the bounds does not make a system call each time.
 *
 * After a crash: the descriptor is init's, and what was asked for stays asked for, so the kernel lets go before it promotes
 * a successor, which begins with nothing asked for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>

#include "drivers/nic/nic.h"

/* 2,000 requests a second, and 640. */
#define NIC_LATENCY_BURST 16
#define NIC_LATENCY_BEGIN_NS 8000000u
#define NIC_LATENCY_END_NS 25000000u
_Static_assert(NIC_LATENCY_END_NS > 2 * NIC_LATENCY_BEGIN_NS, "hysteresis");
/* PM_QOS_DEFAULT_VALUE: as if nobody asked. */
#define NO_LIMIT (-1)

static void ask(struct nic *nic, bool held)
{
    struct nic_latency *latency = &nic->latency;
    int32_t value = held ? nic->options.latency_us : NO_LIMIT;
    latency->held = held;
    if (pwrite(nic->options.latency_fd, &value, sizeof value, 0) == sizeof value)
        return;
    latency->error = errno != 0 ? errno : EIO; /* not tried again: the status says it */
    latency->held = false;
}

static void begin(struct nic *nic, uint64_t requests)
{
    nic->latency.requests = requests;
    nic->latency.since_ns = nic->now_ns;
}

void nic_latency_look(struct nic *nic)
{
    struct nic_latency *latency = &nic->latency;
    uint64_t requests = nic->domain->counters[NIC_REQUESTS], time_ns = nic->now_ns - latency->since_ns;

    if (nic->options.latency_fd < 0 || latency->error != 0)
        return;
    if (requests - latency->requests >= NIC_LATENCY_BURST) {
        if (!latency->held && time_ns < NIC_LATENCY_BEGIN_NS) {
            ask(nic, true);
            atoll_count(nic->domain, NIC_LATENCY_REQUESTS, 1);
        }
        begin(nic, requests);
    } else if (latency->held && time_ns >= NIC_LATENCY_END_NS) {
        ask(nic, false);
        begin(nic, requests);
    }
}

uint64_t nic_latency_until(const struct nic *nic)
{
    return nic->latency.held ? nic->latency.since_ns + NIC_LATENCY_END_NS : UINT64_MAX;
}

void nic_latency_close(struct nic *nic)
{
    if (nic->latency.held)
        ask(nic, false);
}
