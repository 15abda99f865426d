"""The Promela models of the ring's signalling and of takeovers, checked by spin; each mutation must make its model fail.

The models say what they assume; the code they model is ipc/ring.h, ipc/domain.c (sleep, wake, commit) and kernel/ with
ipc/rolelock.c (who may write an arena).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODELS = Path(__file__).parent / "models"

HOLDS = [("ring_sleep.pml", []), ("ring_sleep.pml", ["-DEVENTFD"]), ("takeover.pml", [])]
FAILS = [
    ("ring_sleep.pml", ["-DNO_PRODUCER_FENCE"]),
    ("ring_sleep.pml", ["-DNO_TAKEOVER_WAKE"]),
    ("ring_sleep.pml", ["-DEVENTFD", "-DNO_PRODUCER_FENCE"]),
    ("ring_sleep.pml", ["-DEVENTFD", "-DNO_CONSUMER_FENCE"]),
    ("ring_sleep.pml", ["-DEVENTFD", "-DNO_SECOND_LOOK"]),
    ("ring_sleep.pml", ["-DEVENTFD", "-DNO_TAKEOVER_WAKE"]),
    ("takeover.pml", ["-DNO_LOCK"]),
]


def errors_of(model: str, defines: list[str], folder: Path) -> int:
    """The errors an exhaustive search finds (spin stops at the first)."""
    assert shutil.which("spin"), "spin is missing: make test installs it"
    shutil.copy(MODELS / model, folder / "model.pml")
    subprocess.run(["spin", "-a", *defines, "model.pml"], cwd=folder, check=True, capture_output=True, timeout=60)
    subprocess.run(["gcc", "-O2", "-DSAFETY", "-w", "-o", "pan", "pan.c"], cwd=folder, check=True, timeout=120)
    search = subprocess.run(["./pan", "-m1000000"], cwd=folder, check=True, capture_output=True, text=True, timeout=120)
    assert "max search depth too small" not in search.stdout, search.stdout
    found = re.search(r"errors: (\d+)", search.stdout)
    assert found is not None, search.stdout
    return int(found[1])


@pytest.mark.parametrize(("model", "defines"), HOLDS, ids=lambda value: "-".join(value) if isinstance(value, list) else value)
def test_model_holds(model: str, defines: list[str], tmp_path: Path) -> None:
    assert errors_of(model, defines, tmp_path) == 0


@pytest.mark.parametrize(("model", "defines"), FAILS, ids=lambda value: "-".join(value) if isinstance(value, list) else value)
def test_mutation_is_found(model: str, defines: list[str], tmp_path: Path) -> None:
    assert errors_of(model, defines, tmp_path) > 0
