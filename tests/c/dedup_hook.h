/* For tests of dedup's death: compiled with -DATOLL_STORE_HOOK into an extension of their own. */
#ifndef ATOLL_TESTS_DEDUP_HOOK_H
#define ATOLL_TESTS_DEDUP_HOOK_H

#include "services/dedup/dedup_api.h"

/* cffi:begin */
/* SIGKILL after this many more stores of the journal; 0: never. Counts them. */
void hook_die_after(uint64_t stores);
uint64_t hook_stores(void);
/* SIGSEGV at the first store made while the request of this identity is being executed; 0: never. */
void hook_poison(struct atoll_domain *domain, uint64_t identity);
/* SIGSEGV at the first store made while a record of this block, of any volume, is being destaged. */
void hook_poison_block(struct dedup *dedup, uint64_t lba);
/* Time as atoll_now_ns tells it; 0: the real one. (build_hooked wraps clock_gettime.) */
void hook_set_clock(uint64_t ns);
/* dedup_turn, and dedup_open, given up after so many stores (0: never), as if the process had been killed there; its private memory is lost.
 * True, or NULL with an empty `error`: it was. `crashed`: the predecessor died by itself. */
bool hook_turn(struct dedup *dedup, uint64_t stores);
struct dedup *hook_open(struct atoll_domain *domain, const struct dedup_config *config, bool fresh, bool adopted, bool quarantine, uint64_t stores,
                        bool crashed, char *error);
/* Whether dedup has its processor to itself, as far as it knows (place_shared is wrapped, too). */
void hook_set_apart(bool apart);
/* cffi:end */

#endif
