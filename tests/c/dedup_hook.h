/* For tests of dedup's death: compiled with -DATOLL_STORE_HOOK into an extension of their own. */
#ifndef ATOLL_TESTS_DEDUP_HOOK_H
#define ATOLL_TESTS_DEDUP_HOOK_H

#include "ipc/domain.h"

/* cffi:begin */
/* SIGKILL after this many more stores of the journal; 0: never. Counts them. */
void hook_die_after(uint64_t stores);
uint64_t hook_stores(void);
/* SIGSEGV at the first store made while the request of this identity is being executed; 0: never. */
void hook_poison(struct atoll_domain *domain, uint64_t identity);
struct dedup;
/* SIGSEGV at the first store made while a record of this block, of any volume, is being destaged. */
void hook_poison_block(struct dedup *dedup, uint64_t lba);
/* cffi:end */

#endif
