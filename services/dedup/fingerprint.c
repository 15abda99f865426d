/* See fingerprint.h. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "services/dedup/datapath.h"
#include "services/dedup/fingerprint.h"

struct fingerprint fingerprint_sse2(const void *block)
{
    XXH128_hash_t hash = XXH3_128bits(block, ATOLL_BLOCK_BYTES);
    return (struct fingerprint){.low = hash.low64, .high = hash.high64};
}

struct fingerprint dp_fingerprint(const void *block)
{
    static struct fingerprint (*widest)(const void *block);
    if (__builtin_expect(widest == 0, 0))
        widest = __builtin_cpu_supports("avx512f") ? fingerprint_avx512
                 : __builtin_cpu_supports("avx2")  ? fingerprint_avx2
                                                   : fingerprint_sse2;
    return widest(block);
}
