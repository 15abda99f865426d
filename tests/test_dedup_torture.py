"""dedup against an oracle, in a world in which one seed decides everything: requests that overlap, a disk that holds,
reorders, fails and forgets, deaths at any store, power loss (torturekit.py); pages of metadata that are lost
(torturelost.py).

`make torture` does many more: ATOLL_TORTURE_SEEDS, _OPERATIONS; _SEED is the first, so that it repeats a run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from types import ModuleType

import pytest
from torturekit import Torture
from torturelost import TortureLost

SEED = int(os.environ.get("ATOLL_TORTURE_SEED", "1"))
SEEDS = int(os.environ.get("ATOLL_TORTURE_SEEDS", "16"))
OPERATIONS = int(os.environ.get("ATOLL_TORTURE_OPERATIONS", "700"))


def in_child(world: type[Torture], seed: int, hooked: ModuleType) -> int:
    """A failed assertion of the C ends a process. Its exit status."""
    pid = os.fork()
    if pid == 0:
        faulthandler.cancel_dump_traceback_later()
        try:
            world(seed, OPERATIONS, hooked).run()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "seeds"), [(Torture, SEEDS), (TortureLost, -(-SEEDS // 4))], ids=["all", "lost"])
def test_torture(world: type[Torture], seeds: int, hooked: ModuleType) -> None:
    failed = []
    for seed in range(SEED, SEED + seeds):
        if (status := in_child(world, seed, hooked)) != 0:
            print(f"seed {seed}, {OPERATIONS} operations (ATOLL_TORTURE_SEED, _OPERATIONS): ended with {status}")
            failed.append(seed)
    assert not failed, f"seeds {failed}"
