/*
 * The fingerprint of a block: XXH3-128, by the widest vectors that the processor has. All variants give the same result.
 *
 * xxHash chooses its vectors when it is compiled, so each variant is a file of its own, compiled for that width.
 */
#ifndef ATOLL_DEDUP_FINGERPRINT_H
#define ATOLL_DEDUP_FINGERPRINT_H

#include "services/dedup/store.h"

struct fingerprint fingerprint_sse2(const void *block);
struct fingerprint fingerprint_avx2(const void *block);
struct fingerprint fingerprint_avx512(const void *block);

#endif
