/* See dedup_hook.h. */
#include "tests/c/dedup_hook.h"

#include <signal.h>
#include <unistd.h>

#include "services/dedup/datapath.h"

static uint64_t stores, last_store, poison;
static struct atoll_domain *poisoned;
static struct dedup *poisoned_dedup;
static uint64_t poisoned_lba;

void atoll_store_hook(void);

void hook_die_after(uint64_t count)
{
    stores = 0;
    last_store = count;
}

uint64_t hook_stores(void) { return stores; }

void hook_poison(struct atoll_domain *domain, uint64_t identity)
{
    poisoned = domain;
    poison = identity;
}

void hook_poison_block(struct dedup *dedup, uint64_t lba)
{
    poisoned_dedup = dedup;
    poisoned_lba = lba;
}

static bool destages_poison(void)
{
    const struct datapath *dp = poisoned_dedup->datapath;
    for (uint32_t index = 0; index < dp->arena->handled_count; index++)
        if (dp->records[dp->arena->handled[index]].lba == poisoned_lba)
            return true;
    return false;
}

void atoll_store_hook(void)
{
    if (++stores == last_store)
        kill(getpid(), SIGKILL);
    if ((poison != 0 && poisoned->self->current == poison) || (poisoned_dedup != 0 && destages_poison())) {
        signal(SIGSEGV, SIG_DFL);
        kill(getpid(), SIGSEGV);
    }
}
