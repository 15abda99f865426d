/* See nic_hook.h. */
#include "tests/c/nic_hook.h"

#include <signal.h>
#include <unistd.h>

#include "drivers/nic/nic.h"

static uint64_t stores_left = UINT64_MAX;
static uint32_t poisoned = UINT32_MAX;

void atoll_store_hook(void);

void nic_die_after(uint64_t stores) { stores_left = stores; }

void nic_poison_receives(uint32_t connection) { poisoned = connection; }

void atoll_store_hook(void)
{
    const struct atoll_arena_header *header = (const void *)(uintptr_t)atoll_arena_address(ATOLL_ROLE_NIC);
    uint64_t current = header->current;
    if (poisoned != UINT32_MAX && atoll_identity_connection(current) == poisoned && atoll_identity_slot(current) == NIC_NO_SLOT &&
        (atoll_identity_sequence(current) & 3) == NIC_RECEIVE) {
        signal(SIGSEGV, SIG_DFL);
        kill(getpid(), SIGSEGV);
    }
    if (stores_left-- == 0)
        kill(getpid(), SIGKILL);
}
