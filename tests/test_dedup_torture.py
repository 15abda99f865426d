"""dedup against an oracle, in a world in which one seed decides everything: requests that overlap, a disk that holds,
reorders, fails and forgets, deaths at any store, power loss (torturekit.py).

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

SEED = int(os.environ.get("ATOLL_TORTURE_SEED", "1"))
SEEDS = int(os.environ.get("ATOLL_TORTURE_SEEDS", "16"))
OPERATIONS = int(os.environ.get("ATOLL_TORTURE_OPERATIONS", "700"))


def in_child(seed: int, hooked: ModuleType) -> int:
    """A failed assertion of the C ends a process. Its exit status."""
    pid = os.fork()
    if pid == 0:
        faulthandler.cancel_dump_traceback_later()
        try:
            Torture(seed, OPERATIONS, hooked).run()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_torture(hooked: ModuleType) -> None:
    failed = []
    for seed in range(SEED, SEED + SEEDS):
        if (status := in_child(seed, hooked)) != 0:
            print(f"seed {seed}, {OPERATIONS} operations (ATOLL_TORTURE_SEED, _OPERATIONS): ended with {status}")
            failed.append(seed)
    assert not failed, f"seeds {failed}"
