/*
 * Spinning: before a domain sleeps it looks around for a moment longer, because what it waits for often comes at once.
 *
 * A peer that finds it awake need not wake it, and neither of them pays for a sleep and a wake, which cost more than most messages
 * take: a microsecond or two on one processor, some 30 where a virtual one has to be started. Between two looks the processor is
 * offered to whoever else wants it (sched_yield), so domains that share one hand messages over by taking turns.
 *
 * It must not cost what it does not bring. A domain spins only after work, for `spin_ns` at most; where nothing came, it lets
 * more and more of the following sleeps begin at once (up to ATOLL_SPIN_REST), until it is lucky again. It does not spin while all who
 * send to it sleep. And where somebody else computes on the processor, so that a turn is long in coming back, it sleeps: who sleeps is
 * put first when it is woken, who yields is put last.
 *
 * To give way has its price, too: who else spins on the processor takes a turn, which finds nothing and is long enough to miss what comes
 * meanwhile. Where it comes from another processor nobody need run here for it. So a domain that has given way once and found nothing
 * holds the processor for `hold_ns` and looks on. What comes while it does is from elsewhere, and shows that this pays; what runs
 * here cannot send meanwhile, and then it is soon tried rarely.
 *
 * After a crash: nothing; `sleeping` is 0 all the while, and all of this is private to the process.
 */
#ifndef ATOLL_IPC_SPIN_H
#define ATOLL_IPC_SPIN_H

#include "ipc/domain.h"

/* Occasions that are let pass after the most unlucky attempts. */
#define ATOLL_SPIN_REST 255
/* A turn that comes back later than this was taken by somebody who computes; a client that answers takes less. */
#define ATOLL_SPIN_LOST_NS 1000000

/* Whether this occasion is one for an attempt. */
bool atoll_luck_tries(struct atoll_luck *luck);
/* An attempt has brought nothing; `more`: it counts as so many. One that has brought something sets `vain` to 0. */
void atoll_luck_vain(struct atoll_luck *luck, uint32_t more);

/* Looks at what else the domain waits for, beside its rings. True: there is something to do. */
typedef bool atoll_look(void *context);

/* True if something has come meanwhile; false: sleep. `spin` keeps the luck of one kind of waiting. `look` may be NULL. */
bool atoll_domain_spin(struct atoll_domain *domain, struct atoll_spin *spin, uint32_t ignored_roles, atoll_look *look,
                       void *context);

#endif
