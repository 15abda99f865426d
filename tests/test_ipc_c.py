"""The C tests, under the sanitizers: a crash after each store, hostile peers, what threads share."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALONE = ("journal_crash", "ring_crash", "ring_hostile", "spin", "coalesce", "lookup_race")
ELSEWHERE = {"store_rig"}  # test_store_c.py, with its modes


def run(name: str) -> str:
    done = subprocess.run([ROOT / ".ci/c-tests", f"tests/c/{name}.c"], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)  # with the seed
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ALONE)
def test_c(name: str) -> None:
    assert f"ok      tests/c/{name}.c (address,undefined)" in run(name)


def test_threads_of_the_disk_driver() -> None:
    said = run("disk_threads")
    assert all(f"ok      tests/c/disk_threads.c ({each})" in said for each in ("thread", "address,undefined"))


def test_a_data_race_is_found(tmp_path: Path) -> None:
    """The same with a lock taken out."""
    engine = (ROOT / "drivers/disk/engine_threads.c").read_text()
    locked = "pthread_mutex_lock(&engine->lock);\n    bool ready = engine->done.count != 0;\n"
    assert locked in engine
    racy = tmp_path / "racy.c"
    racy.write_text(
        engine.replace(locked, "bool ready = engine->done.count != 0;\n").replace(
            "pthread_mutex_unlock(&engine->lock);\n    return ready;", "return ready;"
        )
    )
    test = tmp_path / "test.c"
    test.write_text(
        (ROOT / "tests/c/disk_threads.c")
        .read_text()
        .replace("drivers/disk/engine_threads.c", str(racy))
        .replace("thread address,undefined", "thread")
        .replace('"arena_support.h"', '"tests/c/arena_support.h"')
    )
    done = subprocess.run([ROOT / ".ci/c-tests", test], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "WARNING: ThreadSanitizer: data race" in done.stderr


def test_none_is_forgotten() -> None:
    files = {path.stem for path in (ROOT / "tests/c").glob("*.c") if not path.stem.endswith("_hook")}
    assert files == {*ALONE, "disk_threads"} | ELSEWHERE
