/* See nic_hook.h. */
#include "tests/c/nic_hook.h"

#include <signal.h>
#include <unistd.h>

#include "drivers/nic/nic.h"

static uint64_t stores_left = UINT64_MAX;
static uint32_t poisoned = UINT32_MAX;
static uint64_t posted_most = UINT64_MAX;

void atoll_store_hook(void);

void nic_die_after(uint64_t stores) { stores_left = stores; }

void nic_poison_receives(uint32_t connection) { poisoned = connection; }

void nic_poison_posting(uint64_t most) { posted_most = most; }

static void crash(void)
{
    signal(SIGSEGV, SIG_DFL);
    kill(getpid(), SIGSEGV);
}

void atoll_store_hook(void)
{
    const struct atoll_arena_header *header = (const void *)(uintptr_t)atoll_arena_address(ATOLL_ROLE_NIC);
    uint64_t current = header->current;
    if (poisoned != UINT32_MAX && atoll_identity_connection(current) == poisoned && atoll_identity_slot(current) == NIC_NO_SLOT &&
        (atoll_identity_sequence(current) & 3) == NIC_RECEIVE)
        crash();
    const struct atoll_nic_public *public = (const void *)((const char *)header + header->role_offset);
    if (public->posted_order > posted_most)
        crash();
    if (stores_left-- == 0)
        kill(getpid(), SIGKILL);
}
