/* See dedup_hook.h. */
#include "tests/c/dedup_hook.h"

#include <signal.h>
#include <unistd.h>

static uint64_t stores, last_store, poison;
static struct atoll_domain *poisoned;

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

void atoll_store_hook(void)
{
    if (++stores == last_store)
        kill(getpid(), SIGKILL);
    if (poison != 0 && poisoned->self->current == poison) {
        signal(SIGSEGV, SIG_DFL);
        kill(getpid(), SIGSEGV);
    }
}
