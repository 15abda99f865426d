"""`atoll audit` finds what it is there to find, in processes that know nothing of it."""

import ctypes  # noqa: F401  what `look` imports must be there before its process is nobody's
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serverkit import ATOLL

from atoll.kernel import audit as auditing
from atoll.kernel import show
from atoll.kernel.audit import look

HOLD = """
import mmap, os, sys
path, how = sys.argv[1:]
descriptor = os.open(path, os.O_RDWR if how in ("write", "hold-write", "private") else os.O_RDONLY)
if how in ("write", "read", "private"):
    kind = mmap.MAP_PRIVATE if how == "private" else mmap.MAP_SHARED
    view = mmap.mmap(descriptor, 4096, kind, mmap.PROT_READ | (mmap.PROT_WRITE if how != "read" else 0))
    os.close(descriptor)
print("ready", flush=True)
sys.stdin.read()
"""

Hold = Callable[[str, str], int]


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[str]:
    """Objects of an instance that no server made."""
    number = secrets.token_hex(8)
    names = [f"atoll-{number}-nic", f"atoll-{number}-dedup", f"atoll-{number}-lock-nic"]
    for name in names:
        (Path("/dev/shm") / name).write_bytes(bytes(4096))
    (tmp_path / "instance.json").write_text(json.dumps({"objects": ["/" + name for name in names]}))
    yield f"/dev/shm/atoll-{number}-"
    for name in names:
        (Path("/dev/shm") / name).unlink(missing_ok=True)


@pytest.fixture
def hold() -> Iterator[Hold]:
    started = []

    def start(path: str, how: str) -> int:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, path, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process.pid

    yield start
    for process in started:
        process.communicate(timeout=10)


def audit(data: Path, status: int) -> Any:
    done = subprocess.run(
        [str(ATOLL), "audit", "--data", str(data), "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, (done.stdout, done.stderr)
    return json.loads(done.stdout)


def pids(document: Any, name: str, how: str) -> list[int]:
    entry = next(entry for entry in document["objects"] if entry["name"][23:] == name)
    return sorted(who["pid"] for who in entry[how])


def test_readers_and_one_writer_are_right(instance: str, hold: Hold, tmp_path: Path) -> None:
    writer, reader, other = (
        hold(instance + "nic", "write"),
        hold(instance + "nic", "read"),
        hold(instance + "dedup", "write"),
    )
    private, holder = hold(instance + "nic", "private"), hold(instance + "nic", "hold-write")
    seen = audit(tmp_path, 0)
    assert seen["ok"] and seen["findings"] == []
    assert pids(seen, "nic", "mapped_writable") == [writer]
    assert pids(seen, "nic", "mapped_readable") == [reader]
    assert pids(seen, "dedup", "mapped_writable") == [other]
    assert holder in pids(seen, "nic", "held_writable")
    assert private not in pids(seen, "nic", "mapped_writable")


def test_two_writers_of_an_arena_are_found(instance: str, hold: Hold, tmp_path: Path) -> None:
    writers = sorted([hold(instance + "nic", "write"), hold(instance + "nic", "write")])
    seen = audit(tmp_path, 1)
    assert pids(seen, "nic", "mapped_writable") == writers
    assert len(seen["findings"]) == 1
    assert all(str(pid) in seen["findings"][0] for pid in writers)
    done = subprocess.run([str(ATOLL), "audit", "--data", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "is writable in 2 processes" in done.stdout


def test_a_lock_page_may_be_writable_in_two_but_not_three(instance: str, hold: Hold, tmp_path: Path) -> None:
    hold(instance + "lock-nic", "write")
    hold(instance + "lock-nic", "write")
    audit(tmp_path, 0)
    hold(instance + "lock-nic", "write")
    audit(tmp_path, 1)


def test_an_unlinked_object_is_seen_too(instance: str, hold: Hold, tmp_path: Path) -> None:
    writers = sorted([hold(instance + "nic", "write"), hold(instance + "nic", "write")])
    Path(instance + "nic").unlink()
    seen = audit(tmp_path, 1)
    assert pids(seen, "nic (unlinked)", "mapped_writable") == writers


def test_another_name_of_an_object_hides_nothing(instance: str, hold: Hold, tmp_path: Path) -> None:
    other = instance.replace("atoll-", "other-") + "nic"
    os.link(instance + "nic", other)
    try:
        hold(instance + "nic", "write")
        hold(other, "write")
        audit(tmp_path, 1)
    finally:
        Path(other).unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's processes are looked at as nobody")
def test_what_may_not_be_looked_into_is_named(instance: str, hold: Hold, capsys: pytest.CaptureFixture[str]) -> None:
    holder = hold(instance + "nic", "write")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            os.write(writing, json.dumps(look(instance[15:31])).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        seen = json.loads(pipe.read())
    os.waitpid(child, 0)
    entry = next(each for each in seen["unseen"] if each["pid"] == holder)
    assert entry == {"pid": holder, "name": Path(f"/proc/{holder}/comm").read_text().strip(), "user": "root",
                     "shared_bytes": 0}  # fmt: skip
    assert pids(seen, "nic", "mapped_writable") == []
    document = {"instance": instance[15:31], "findings": [], "objects": [], "unseen": [entry]}
    show.audit(document)
    assert f"1 process could not be looked into: {entry['name']} {holder} of root\n" in capsys.readouterr().out
    document["unseen"] = [{"pid": 2, "name": "b", "user": None, "shared_bytes": None}] * 5 + [
        {"pid": 7, "name": "a[b]", "user": "me", "shared_bytes": 2048}
    ]
    show.audit(document)
    named = "a[b] 7 of me with 2 KiB of shared memory, b 2, b 2, b 2, b 2, …"
    assert f"6 processes could not be looked into: {named}\n" in capsys.readouterr().out


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "instance.json").write_text("{}")
    done = subprocess.run([str(ATOLL), "audit", "--data", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"atoll: {tmp_path}/instance.json: names no shared-memory object\n"


def test_what_processes_call_themselves_does_not_reach_the_terminal() -> None:
    own = Path("/proc/self/comm")
    before = own.read_text()
    try:
        own.write_text("\x1b[8mhidden")
        assert auditing._name(os.getpid()) == "?[8mhidden"
    finally:
        own.write_text(before)
