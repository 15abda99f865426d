"""Models of the signalling and of the takeover, checked by Spin in all their interleavings; and that they can fail."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parent.parent / "models"

pytestmark = pytest.mark.skipif(shutil.which("spin") is None, reason="spin is not installed (make test-setup does)")


def verdict(model: str, defines: list[str], folder: Path) -> str:
    """ "" if Spin has seen all states of the model and found nothing wrong, else the error."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("spin", *defines, "-a", str(MODELS / model))
    run("cc", "-O1", "-w", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c")
    report = run("./pan", "-m1000000")
    print(re.findall(r"(\d+) states, stored", report), "states")
    found = re.search(r"pan:\d+: (.*) \(at depth", report)
    if found is not None:
        return found[1]
    assert "errors: 0" in report, report
    assert "max search depth too small" not in report and "Search not completed" not in report, report
    return ""


@pytest.mark.parametrize("waiting", [[], ["-DFUTEX"]], ids=["eventfd", "futex"])
def test_nobody_sleeps_while_a_message_waits(waiting: list[str], tmp_path: Path) -> None:
    assert verdict("ring_sleep.pml", waiting, tmp_path) == ""


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
    assert verdict("ring_sleep.pml", defines, tmp_path) == "invalid end state"  # a sleeper that nobody wakes


def test_one_process_plays_a_role_whoever_is_killed(tmp_path: Path) -> None:
    assert verdict("takeover.pml", [], tmp_path) == ""


@pytest.mark.parametrize(
    ("defines", "wrong"),
    [
        (["-DNO_INTENT"], "ordered>played"),
        (["-DIMPATIENT"], "ordered>played"),
        (["-DNO_LOCK", "-DIMPATIENT"], "writers==1"),
        (["-DNO_LOCK", "-DNO_INTENT"], "writers==1"),
        (["-DNO_RESEND"], "invalid end state"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_part_of_the_takeover_is_needed(defines: list[str], wrong: str, tmp_path: Path) -> None:
    assert wrong in verdict("takeover.pml", defines, tmp_path)


@pytest.mark.parametrize("defines", [[], ["-DKEPT", "-DVERSIONS=2"]], ids=" ".join)
def test_a_read_from_memory_sends_what_it_found_and_nothing_old(defines: list[str], tmp_path: Path) -> None:
    assert verdict("lookup.pml", defines, tmp_path) == ""


@pytest.mark.parametrize(
    ("defines", "wrong"),
    [
        (["-DNO_NBD_FENCE"], "content"),
        (["-DNO_DEDUP_FENCE"], "content"),
        (["-DNO_SECOND_LOOK"], "content"),
        (["-DNO_RETIRE"], "content"),
        (["-DNO_USE"], "content"),
        (["-DKEPT", "-DVERSIONS=2", "-DNO_TAKE_AWAY"], "version>=known"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_part_of_the_look_up_is_needed(defines: list[str], wrong: str, tmp_path: Path) -> None:
    assert wrong in verdict("lookup.pml", defines, tmp_path)


def test_a_posted_write_finds_room(tmp_path: Path) -> None:
    assert verdict("posted.pml", [], tmp_path) == ""


@pytest.mark.parametrize("left_out", ["-DNO_NIC_FENCE", "-DNO_DEDUP_FENCE", "-DNO_SECOND_LOOK", "-DNO_COUNT", "-DLATE"])
def test_each_part_of_posting_is_needed(left_out: str, tmp_path: Path) -> None:
    assert "have>0" in verdict("posted.pml", [left_out], tmp_path)


def test_only_what_may_waits_for_the_timer_of_one_who_dozes(tmp_path: Path) -> None:
    assert verdict("doze.pml", [], tmp_path) == ""


DOZING = ["PRODUCER_FENCE", "CONSUMER_FENCE", "SECOND_LOOK", "WAKE_ALL", "HURRY", "KIND", "COUNT", "SECOND_COUNT"]


@pytest.mark.parametrize("left_out", DOZING)
def test_each_part_of_dozing_is_needed(left_out: str, tmp_path: Path) -> None:
    assert verdict("doze.pml", [f"-DNO_{left_out}"], tmp_path) == "invalid end state"
