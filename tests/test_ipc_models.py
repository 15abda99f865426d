"""Models of the signalling and of the takeover, checked by Spin in all their interleavings; and that they can fail."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parent.parent / "models"

pytestmark = pytest.mark.skipif(shutil.which("spin") is None, reason="spin is not installed (make test-setup does)")


def errors(model: str, defines: list[str], folder: Path) -> int:
    """Errors that Spin finds in all states of the model; 0 only if it has seen them all."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("spin", *defines, "-a", str(MODELS / model))
    run("cc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c")
    report = run("./pan", "-m1000000")
    found = re.search(r"errors: (\d+)", report)
    assert found is not None, report
    if found[1] == "0":
        assert "max search depth too small" not in report and "Search not completed" not in report, report
    else:
        assert "invalid end state" in report, report  # a sleeper that nobody wakes, not a mistake in the model
    print(re.findall(r"(\d+) states, stored", report), "states")
    return int(found[1])


@pytest.mark.parametrize("waiting", [[], ["-DFUTEX"]], ids=["eventfd", "futex"])
def test_nobody_sleeps_while_a_message_waits(waiting: list[str], tmp_path: Path) -> None:
    assert errors("ring_sleep.pml", waiting, tmp_path) == 0


@pytest.mark.parametrize(
    "defines",
    [
        ["-DNO_PRODUCER_FENCE"],
        ["-DNO_CONSUMER_FENCE"],
        ["-DNO_SECOND_LOOK"],
        ["-DNO_WAKE_ALL"],
        ["-DFUTEX", "-DNO_PRODUCER_FENCE"],
        ["-DFUTEX", "-DNO_CONSUMER_FENCE"],
        ["-DFUTEX", "-DNO_WAKE_ALL"],
    ],
    ids=" ".join,
)
def test_each_part_of_the_signalling_is_needed(defines: list[str], tmp_path: Path) -> None:
    assert errors("ring_sleep.pml", defines, tmp_path) > 0
