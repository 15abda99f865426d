/* See dedup_hook.h. */
#include "tests/c/dedup_hook.h"

#include <setjmp.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "services/dedup/datapath.h"

static uint64_t stores, last_store, poison;
static struct atoll_domain *poisoned;
static struct dedup *poisoned_dedup;
static uint64_t poisoned_lba;
static uint64_t clock_ns;
static jmp_buf killed;
static bool jumps, is_apart;

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

int __real_clock_gettime(clockid_t clock, struct timespec *now);
int __wrap_clock_gettime(clockid_t clock, struct timespec *now);

int __wrap_clock_gettime(clockid_t clock, struct timespec *now)
{
    if (clock_ns == 0)
        return __real_clock_gettime(clock, now);
    *now = (struct timespec){.tv_sec = (time_t)(clock_ns / 1000000000), .tv_nsec = (long)(clock_ns % 1000000000)};
    return 0;
}

void hook_set_clock(uint64_t ns) { clock_ns = ns; }

bool __wrap_place_shared(const struct dedup_place *place);

bool __wrap_place_shared(const struct dedup_place *place) { return !is_apart && place->where == 0; }

void hook_set_apart(bool apart) { is_apart = apart; }

bool hook_turn(struct dedup *dedup, uint64_t count)
{
    bool dies = true;
    hook_die_after(count);
    jumps = count != 0;
    if (setjmp(killed) == 0) {
        dedup_turn(dedup);
        dies = false;
    }
    jumps = false;
    hook_die_after(0);
    return dies;
}

struct dedup *hook_open(struct atoll_domain *domain, const struct dedup_config *config, bool fresh, bool adopted, bool quarantine, uint64_t count,
                        bool crashed, char *error)
{
    struct dedup *volatile dedup = 0;
    error[0] = 0;
    hook_die_after(count);
    jumps = count != 0;
    if (setjmp(killed) == 0)
        dedup = dedup_open(domain, config, fresh, adopted, crashed, quarantine, error);
    jumps = false;
    hook_die_after(0);
    return dedup;
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
    if (++stores == last_store) {
        if (jumps)
            longjmp(killed, 1);
        kill(getpid(), SIGKILL);
    }
    if ((poison != 0 && poisoned->self->current == poison) || (poisoned_dedup != 0 && destages_poison())) {
        signal(SIGSEGV, SIG_DFL);
        kill(getpid(), SIGSEGV);
    }
}
