/* See fingerprint.h. */
#pragma GCC target("avx2")

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "services/dedup/fingerprint.h"

struct fingerprint fingerprint_avx2(const void *block)
{
    XXH128_hash_t hash = XXH3_128bits(block, ATOLL_BLOCK_BYTES);
    return (struct fingerprint){.low = hash.low64, .high = hash.high64};
}
