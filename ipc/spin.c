/* See spin.h. */
#define _GNU_SOURCE
#include "ipc/spin.h"

#include <sched.h>

#define VAIN_MOST 8
_Static_assert((1 << VAIN_MOST) - 1 == ATOLL_SPIN_REST, "rests double");

void atoll_luck_vain(struct atoll_luck *luck, uint32_t more)
{
    luck->vain = luck->vain + more < VAIN_MOST ? luck->vain + more : VAIN_MOST;
    luck->rest = (1u << luck->vain) - 1;
}

bool atoll_luck_tries(struct atoll_luck *luck)
{
    if (luck->rest == 0)
        return true;
    luck->rest--;
    return false;
}

/* Work has been done since the last attempt: was it what the attempt waited for? Then a new one begins, unless it is to rest. */
static void begin(struct atoll_rings *rings, struct atoll_spin *spin, uint64_t now)
{
    if (rings->lucky != 0)
        rings->lucky->spins.vain = 0;
    rings->lucky = 0;
    rings->worked = false;
    rings->spin_until = atoll_luck_tries(&spin->spins) ? now + rings->spin_ns : 0;
}

/* Nobody who sends to the domain is awake, so nothing comes before somebody is woken. (The kernel wakes whom it calls.) */
static bool all_sleep(const struct atoll_domain *domain)
{
    for (uint32_t left = domain->rings->rx_roles & ~(1u << ATOLL_ROLE_KERNEL); left != 0; left &= left - 1)
        if (!atoll_load_relaxed(&domain->peers[__builtin_ctz(left)]->sleeping))
            return false;
    return true;
}

/* Looks on without giving way. True if something has come. */
static bool hold(struct atoll_domain *domain, struct atoll_spin *spin, uint32_t ignored_roles, atoll_look *look, void *context)
{
    if (look == 0 || spin->hold_ns == 0 || !atoll_luck_tries(&spin->holds))
        return false;
    uint64_t until = atoll_now_ns() + spin->hold_ns;
    do {
        if (atoll_domain_anything_pending(domain, ignored_roles))
            return true; /* not what it waits for */
        if (look(context)) {
            spin->holds.vain = 0;
            spin->held++;
            return true;
        }
    } while (atoll_now_ns() < until);
    atoll_luck_vain(&spin->holds, 1);
    return false;
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
    for (uint32_t turns = 0;; turns++) { /* who begins to spin has just looked at what else there is */
        if (atoll_domain_anything_pending(domain, ignored_roles) || (look != 0 && turns != 0 && look(context)) ||
            (turns == 1 && hold(domain, spin, ignored_roles, look, context))) {
            rings->lucky = spin; /* if it turns out to be work */
            return true;
        }
        if (look == 0 && all_sleep(domain))
            break;
        if (last >= rings->spin_until) {
            atoll_luck_vain(&spin->spins, 1);
            break;
        }
        sched_yield();
        uint64_t now = atoll_now_ns();
        if (now - last > ATOLL_SPIN_LOST_NS) { /* what has come meanwhile is seen by who is about to sleep */
            atoll_luck_vain(&spin->spins, VAIN_MOST / 2);
            break;
        }
        last = now;
    }
    rings->spin_until = 0;
    rings->lucky = 0;
    return false;
}
