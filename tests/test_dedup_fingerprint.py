"""All variants of the fingerprint say the same: a store outlives the machine that wrote it."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MAIN = r"""
#include <stdio.h>
#define XXH_INLINE_ALL
#include <xxhash.h>
#include "services/dedup/fingerprint.h"

struct fingerprint fingerprint_sse2(const void *block)
{
    XXH128_hash_t hash = XXH3_128bits(block, ATOLL_BLOCK_BYTES);
    return (struct fingerprint){.low = hash.low64, .high = hash.high64};
}

static int differs(struct fingerprint a, struct fingerprint b) { return a.low != b.low || a.high != b.high; }

int main(void)
{
    static unsigned char memory[ATOLL_BLOCK_BYTES + 64];
    int seen = 0;
    for (unsigned round = 0; round < 2000; round++) {
        unsigned char *block = memory + round % 64; /* at any alignment */
        block[(round * 2654435761u) % ATOLL_BLOCK_BYTES] ^= (unsigned char)(round * 37 + 1);
        struct fingerprint expected = fingerprint_sse2(block);
        if (__builtin_cpu_supports("avx2"))
            seen |= 1;
        if (__builtin_cpu_supports("avx512f"))
            seen |= 2;
        if (((seen & 1) && differs(fingerprint_avx2(block), expected)) ||
            ((seen & 2) && differs(fingerprint_avx512(block), expected))) {
            printf("round %u differs\n", round);
            return 1;
        }
    }
    printf("compared %d\n", seen);
    return 0;
}
"""


def test_variants_agree(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(MAIN)
    variants = [f"services/dedup/fingerprint_{width}.c" for width in ("avx2", "avx512")]
    command = ["cc", "-O1", "-std=gnu11", "-I.", str(tmp_path / "main.c"), *variants, "-o", str(tmp_path / "main")]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, timeout=60)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
