/* See nic_hook.h. */
#include "tests/c/nic_hook.h"

#include <signal.h>
#include <unistd.h>

static uint64_t stores_left = UINT64_MAX;

void atoll_store_hook(void);

void nic_die_after(uint64_t stores) { stores_left = stores; }

void atoll_store_hook(void)
{
    if (stores_left-- == 0)
        kill(getpid(), SIGKILL);
}
