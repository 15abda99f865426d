/* The NIC driver with a death after a chosen store into its journal (tests/test_nic_kill.py). */
#ifndef ATOLL_TESTS_NIC_HOOK_H
#define ATOLL_TESTS_NIC_HOOK_H

#include <stdint.h>

/* cffi:begin */
/* The process dies by SIGKILL after that many more stores. */
void nic_die_after(uint64_t stores);
/* SIGSEGV at the first store made while the outcome of a receive of this connection is being applied. */
void nic_poison_receives(uint32_t connection);
/* SIGSEGV while a write is being posted, after that many. */
void nic_poison_posting(uint64_t most);
/* cffi:end */

#endif
