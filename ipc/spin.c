/* See spin.h. */
#define _GNU_SOURCE
#include "ipc/spin.h"

#include <sched.h>

#define VAIN_MOST 8
_Static_assert((1 << VAIN_MOST) - 1 == ATOLL_SPIN_REST, "rests double");

static void in_vain(struct atoll_spin *spin, uint32_t more)
{
    spin->vain = spin->vain + more < VAIN_MOST ? spin->vain + more : VAIN_MOST;
    spin->rest = (1u << spin->vain) - 1;
}

/* Work has been done since the last attempt: was it what the attempt waited for? Then a new one begins, unless it is to rest. */
static void begin(struct atoll_rings *rings, struct atoll_spin *spin, uint64_t now)
{
    if (rings->lucky != 0)
        rings->lucky->vain = 0;
    rings->lucky = 0;
    rings->worked = false;
    rings->spin_until = spin->rest == 0 ? now + rings->spin_ns : 0;
    spin->rest -= spin->rest != 0;
}

/* Nobody who sends to the domain is awake, so nothing comes before somebody is woken. (The kernel wakes whom it calls.) */
static bool all_sleep(const struct atoll_domain *domain)
{
    for (uint32_t left = domain->rings->rx_roles & ~(1u << ATOLL_ROLE_KERNEL); left != 0; left &= left - 1)
        if (!atoll_load_relaxed(&domain->peers[__builtin_ctz(left)]->sleeping))
            return false;
    return true;
}

bool atoll_domain_spin(struct atoll_domain *domain, struct atoll_spin *spin, uint32_t ignored_roles, atoll_look *look,
                       void *context)
{
    struct atoll_rings *rings = domain->rings;
    if (rings->spin_ns == 0 || (!rings->worked && rings->spin_until == 0))
        return false;
    uint64_t last = atoll_now_ns();
    if (rings->worked)
        begin(rings, spin, last);
    if (rings->spin_until == 0) /* it rests */
        return false;
    for (bool first = true;; first = false) { /* who begins to spin has just looked at what else there is */
        if (atoll_domain_anything_pending(domain, ignored_roles) || (look != 0 && !first && look(context))) {
            rings->lucky = spin; /* if it turns out to be work */
            return true;
        }
        if (look == 0 && all_sleep(domain))
            break;
        if (last >= rings->spin_until) {
            in_vain(spin, 1);
            break;
        }
        sched_yield();
        uint64_t now = atoll_now_ns();
        if (now - last > ATOLL_SPIN_LOST_NS) { /* what has come meanwhile is seen by who is about to sleep */
            in_vain(spin, VAIN_MOST / 2);
            break;
        }
        last = now;
    }
    rings->spin_until = 0;
    rings->lucky = 0;
    return false;
}
