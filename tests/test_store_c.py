"""The store's C rig (tests/c/store_rig.c) with its seeds: work, kills at any store, power loss, flips, a full device.

Built once under the sanitizers and once as shipped, where it is fast enough for thousands of states.
"""

import random
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests/c/store_rig.c"
FLAGS = ["-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-UNDEBUG", "-fno-strict-aliasing", "-I."]
SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def needs() -> list[str]:
    """What the program is linked of: its own line says it, as for all C tests."""
    for line in SOURCE.read_text(encoding="utf-8").splitlines()[:10]:
        if line.startswith("/* link:"):
            return line.removeprefix("/* link:").removesuffix("*/").split()
    raise AssertionError("no link line")


def build(folder: Path, name: str, flags: list[str]) -> Path:
    program = folder / name
    subprocess.run(["gcc", *flags, *FLAGS, "-o", str(program), str(SOURCE), *needs()], cwd=ROOT, check=True)
    return program


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("rig"), "sanitized", SANITIZED)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("rig"), "fast", ["-O2"])


def run(program: Path, mode: str, rounds: int) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    done = subprocess.run([program, mode, str(seed), str(rounds)], capture_output=True, text=True, timeout=800)
    print(done.stdout[-2000:])
    assert done.returncode == 0, f"{mode} {seed} {rounds}: {done.stderr[-4000:]}"


MODES = [("work", 3), ("full", 2), ("kill", 3), ("power", 1), ("flip", 1), ("grow", 1)]


@pytest.mark.parametrize(("mode", "rounds"), MODES)
def test_sanitized(sanitized: Path, mode: str, rounds: int) -> None:
    run(sanitized, mode, rounds)


def test_work(fast: Path) -> None:
    run(fast, "work", 20)


def test_full_device(fast: Path) -> None:
    run(fast, "full", 20)


def test_killed_at_any_store(fast: Path) -> None:
    """800 kills; each successor finds the state of the last commit."""
    run(fast, "kill", 80)


def test_power_loss(fast: Path) -> None:
    """2,304 power losses, sector by sector; failed flushes that drop what was to be flushed."""
    run(fast, "power", 8)


def test_flipped_bits(fast: Path) -> None:
    """600 damaged stores: repaired from the other copy, or refused."""
    run(fast, "flip", 10)


def test_growing(fast: Path) -> None:
    """70 devices that became larger, with power losses while the store follows."""
    run(fast, "grow", 10)
