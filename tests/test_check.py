"""`atoll check` of a store whose server does not run, `atoll device grow`: what they say, and their exit status."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from damagekit import flip, places
from nbdclient import Connection
from serverkit import ATOLL, Server, run

from atoll.kernel import device as devices
from atoll.kernel import process
from atoll.kernel.instance import EXIT_RUNNING, BootError
from atoll.kernel.offline import open_store
from atoll.services.dedup.check import layout
from atoll.services.dedup.check.image import FileImage
from atoll.services.dedup.check.reader import Report, Store
from atoll.services.dedup.check.repair import append, mapped_records, record, sealed
from atoll.services.dedup.check.run import run as check

BLOCK = 4096
SMALL = {"device_size": "128MiB", "volumes": [{"name": "disk", "size": "64MiB"}],
         "dedup": {"metadata_log_bytes": "1MiB"}}  # fmt: skip


def write(server: Server, seed: int = 1) -> None:
    choose = random.Random(seed)
    with Connection.open(str(server.socket)) as connection:
        connection.negotiate("disk")
        for _ in range(60):
            blocks = choose.randrange(1, 5)
            content = b"".join(random.Random(choose.randrange(40)).randbytes(BLOCK) for _ in range(blocks))
            connection.write(choose.randrange(4000) * BLOCK, content)
        connection.flush()


@pytest.fixture
def stopped(make_server: Callable[..., Server]) -> Server:
    server = make_server(config=SMALL).start()
    write(server)
    server.stop()
    return server


def test_a_store_that_was_stopped_is_clean(stopped: Server) -> None:
    found = stopped.json("check", "--verify-data")
    assert found["ok"] and found["count"] == 0 and found["findings"] == found["notes"] == []
    assert 0 < found["totals"]["stored_bytes"] < found["totals"]["referenced_bytes"]
    assert found["totals"]["verified_bytes"] == found["totals"]["stored_bytes"]
    assert [one["name"] for one in found["totals"]["volumes"]] == ["disk"]
    said = stopped.cli("check").stdout
    assert "everything agrees" in said and str(stopped.data / "device.img") in said


def test_a_running_server_is_left_alone(make_server: Callable[..., Server]) -> None:
    server = make_server(config=SMALL).start()
    for arguments in (("check",), ("check", "--repair"), ("device", "grow", "256MiB")):
        assert "already running" in server.cli(*arguments, status=3).stderr
    assert "atoll stop, atoll device grow, atoll serve" in server.cli("device", "grow", "256MiB", status=3).stderr
    said = run(ATOLL, "check", "--device", server.data / "device.img", status=3)
    assert "in use by process" in said


def test_a_large_device_is_checked_as_it_runs(make_server: Callable[..., Server]) -> None:
    """Most of it has never been written: no page of counts is made for it. All in one step, they were more than it may
    change, and dedup died of the look, and each successor of being asked again."""
    server = make_server(config={**SMALL, "device_size": "64GiB", "sparse": True}).start()
    write(server)
    found = server.json("check", "--live")
    assert found["ok"] and found["count"] == 0
    assert server.row("dedup")["restarts"] == 0


def test_no_server_starts_on_a_device_that_is_being_checked(stopped: Server) -> None:
    """Which was named by itself: the data directory is not held. `--repair` would write beside the server."""
    held = open_store(Path("no such directory"), stopped.data / "device.img", False)
    try:
        stopped.start(wait=False)
        assert stopped.process is not None and stopped.process.wait(30) == 1
        stopped.process = None
        assert f"in use by process {os.getpid()}" in stopped.log_tail()
    finally:
        held.close()
    stopped.start()


def test_a_device_is_left_alone_whose_server_cannot_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, say: its claim is seen."""
    device = tmp_path / "device"
    device.write_bytes(bytes(1 << 20))
    monkeypatch.setattr(process, "holders", lambda path: [])
    monkeypatch.setattr(devices, "CLAIM_WAIT_S", 0.1)
    with open(device, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BootError, match="in use by another server") as refused:
            open_store(tmp_path, device, False)
        assert refused.value.status == EXIT_RUNNING
    open_store(tmp_path, device, False).close()


def test_a_store_whose_server_died_is_read_and_not_written(make_server: Callable[..., Server]) -> None:
    """What was acknowledged and not flushed is in shared memory: the device is consistent; repair is too early."""
    server = make_server(config=SMALL).start()
    write(server)
    server.die()
    found = server.json("check", "--verify-data")
    assert found["ok"] and "shared memory" in found["notes"][-1]
    for arguments in (("check", "--repair"), ("device", "grow", "256MiB")):
        assert "shared memory" in server.cli(*arguments, status=2 if arguments[0] == "check" else 1).stderr
    server.start()  # takes the memory over
    server.stop()
    assert not server.json("check")["notes"]


def test_what_is_no_store(tmp_path: Path, stopped: Server) -> None:
    device = tmp_path / "device"
    device.write_bytes(random.Random(1).randbytes(1 << 20))
    said = stopped.cli("check", "--device", str(device), status=2)
    assert "holds no store of ours" in said.stdout
    assert "no such file" in stopped.cli("check", "--device", str(tmp_path / "none"), status=2).stderr
    assert "no server has ever run there" in stopped.cli("check", str(tmp_path), status=2).stderr


def test_a_shortened_device_is_named(tmp_path: Path, stopped: Server) -> None:
    device = tmp_path / "device"
    shutil.copy(stopped.data / "device.img", device)
    with open(device, "r+b") as file:
        file.truncate(100 << 20)
    said = stopped.cli("check", "--device", str(device), status=1).stdout
    assert "the device has 25600 blocks, its store 32768: the device was shortened" in " ".join(said.split())


# --- What is wrong, and what can be put right -------------------------------------------------------------------------


@dataclass
class Case:
    """A store whose log was given one more change that no store makes."""

    name: str
    forge: Callable[[Forge], None]
    says: str
    repairable: bool


class Forge:
    """Writes records and sums that do not agree, behind the end of the log of a device file."""

    def __init__(self, device: Path) -> None:
        self.image = FileImage(device, writable=True)
        report = Report()
        store = Store.read(self.image, report)
        assert store is not None and not report.count
        self.store = store
        counts = store.counts(0, store.root.device_blocks)
        data = store.places.hold_data(np.arange(len(counts), dtype=np.uint64))
        self.stored = int(np.flatnonzero(counts)[0])
        self.count = int(counts[self.stored])
        self.free = int(np.flatnonzero(data & (counts == 0))[7])

    def write(self, *records: tuple[int, ...], **base: int) -> None:
        append(self.image, self.store, [records] if records else [], base)
        self.image.close()


def volume_entry(number: int, name: str) -> tuple[int, ...]:
    entry = np.zeros(1, layout.VOLUME)
    entry["id"], entry["generation"], entry["state"], entry["size_bytes"] = number, 1, 1, 1 << 20
    entry["name"], entry["name_bytes"] = name.encode(), len(name)
    return record(5, number, *np.frombuffer(entry.tobytes(), "<u8").tolist())


PBA = 1 << 60
CASES = [
    Case("a count too high", lambda f: f.write(record(2, f.stored, f.count + 3)), "references, the map has", True),
    Case("a block that nobody names", lambda f: f.write(record(3, f.free, 1, 5, 6)), "the map names it nowhere", True),
    Case("a count of 0 for a block in use", lambda f: f.write(record(2, f.stored, 0)), "is free, and the map", False),
    Case(
        "an entry for a free block",
        lambda f: f.write(record(1, 3000 << 1, PBA | f.free)),
        "is free, and the map",
        False,
    ),
    Case("an entry for the log", lambda f: f.write(record(1, 3001 << 1, PBA | 5)), "where no data can be", False),
    Case("an entry beyond the end", lambda f: f.write(record(1, 1 << 20, 3 << 60)), "mapped, the volume has", False),
    Case("an entry of no volume", lambda f: f.write(record(1, 9 << 52 | 4, 3 << 60)), "volume 9 is not there", False),
    Case("a value of no kind", lambda f: f.write(record(1, 3002 << 1, 7 << 60)), "value 0x7000", False),
    Case("two volumes of one name", lambda f: f.write(volume_entry(5, "disk")), "has the same name", False),
    Case(
        "a sum of stored blocks", lambda f: f.write(stored_blocks=f.store.root.stored_blocks + 9), "the sum says", True
    ),
    Case("a sum of promises", lambda f: f.write(zero_promises=f.store.root.zero_promises + 2), "promised zeros", True),
    Case("a sum of map pages", lambda f: f.write(map_pages=f.store.root.map_pages + 1), "the superblock says", True),
    Case("a volume's sum", lambda f: f.write(*mapped_records(f.store, 0, 4)), "its entry says", True),
    Case("a volume's sum, too low", lambda f: f.write(*mapped_records(f.store, 0, -3)), "its entry says", True),
]


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A device file with a store that was stopped; live.img beside it has a log that speaks of later writes."""
    server = Server(tmp_path_factory.mktemp("c"), SMALL).start()
    try:
        write(server)
        server.stop()
        device = server.folder / "closed.img"
        run("cp", "--sparse=always", server.data / "device.img", device)
        server.start()
        write(server, seed=5)
        run("cp", "--sparse=always", server.data / "device.img", server.folder / "live.img")
        yield device
    finally:
        assert not server.end()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_inconsistency_is_found_and_what_can_be_is_repaired(closed: Path, tmp_path: Path, case: Case) -> None:
    device = tmp_path / "device"
    run("cp", "--sparse=always", closed, device)
    case.forge(Forge(device))
    before = device.stat().st_mtime_ns
    found = check(device)
    assert any(case.says in one["text"] for one in found["findings"]), found["findings"]
    assert all(one["repairable"] for one in found["findings"]) == case.repairable
    assert device.stat().st_mtime_ns == before, "without --repair nothing is written"
    repaired = check(device, repair=True)
    assert repaired["ok"] == case.repairable, repaired["findings"]
    if case.repairable:
        assert repaired["repaired"] >= 1


def damage(device: Path, tree: int, level: int, copies: tuple[int, ...], at: int = 0) -> int:
    """Copies of the page at that place among those of its tree and level are damaged. Returns its number."""
    image = FileImage(device, writable=True)
    number, blocks = list(places(image, tree, level).items())[at]
    flip(image, [blocks[copy] for copy in copies])
    image.close()
    return number


def test_pages_of_fingerprints_are_read(closed: Path, tmp_path: Path) -> None:
    """Though nothing else of the metadata tells what they should hold. Counts do not need them."""
    device = tmp_path / "device"
    run("cp", "--sparse=always", closed, device)
    damage(device, layout.TREE_PRINTS, 0, (1,))
    found = check(device)
    assert [one["repairable"] for one in found["findings"]] == [True], found["findings"]
    assert check(device, repair=True)["ok"]
    forge = Forge(device)
    forge.write(record(2, forge.stored, forge.count + 3))
    for level in (0, 1):
        damage(device, layout.TREE_PRINTS, level, (0, 1))
        found = check(device, repair=level == 1)
        assert [one["kind"] for one in found["findings"]] == (["page", "count"] if level == 0 else ["page"])
        assert "is lost" in found["findings"][0]["text"]


@pytest.mark.parametrize("tree", [layout.TREE_VOLUMES, layout.TREE_GROUPS, layout.TREE_SLOTS])
def test_a_lost_table_is_one_finding(closed: Path, tmp_path: Path, tree: int) -> None:
    """Not one more for each thing that it would have told."""
    device = tmp_path / "device"
    run("cp", "--sparse=always", closed, device)
    damage(device, tree, 0, (0, 1))
    found = check(device)
    assert [one["kind"] for one in found["findings"]] == ["page"], found["findings"]
    assert "is lost" in found["findings"][0]["text"]


@pytest.mark.parametrize("left", [1, 2, 3])
def test_repair_where_the_log_has_no_room(closed: Path, tmp_path: Path, left: int) -> None:
    """`left` blocks of the log are free: nothing that stands in it is written over."""
    device = tmp_path / "device"
    run("cp", "--sparse=always", closed, device)
    forge = Forge(device)
    wrong = [(record(3, forge.free + at, 1, 5, 6),) for at in range(150)]
    append(forge.image, forge.store, wrong, {})
    store = Store.read(forge.image, Report())
    assert store is not None
    fill = (record(2, forge.stored, forge.count),) * 200  # no two of these fit into a block
    append(forge.image, store, [fill] * (store.root.log_blocks - store.log.blocks - left), {})
    forge.image.close()
    found = check(device)
    assert found["count"] == 150 and all(one["repairable"] for one in found["findings"])
    repaired = check(device, repair=True)
    assert repaired["repaired"] == (100 if left == 3 else 0)
    again = check(device)
    assert again["count"] == 150 - repaired["repaired"] and not again["ok"]
    assert again["totals"]["referenced_bytes"] == found["totals"]["referenced_bytes"] - repaired["repaired"] * BLOCK


def test_repair_after_a_log_block_of_which_one_copy_landed(closed: Path, tmp_path: Path) -> None:
    """Power failed before the other one did. It is replayed, so both are there before a root says that it is
    durable."""
    device = tmp_path / "device"
    run("cp", "--sparse=always", closed, device)
    forge = Forge(device)
    root, image = forge.store.root, FileImage(device, writable=True)
    supers = [layout.super_block(root.device_blocks, place) for place in range(4)]
    before = [image.read(block, 1) for block in supers]
    forge.write(record(2, forge.stored, forge.count + 3))
    for block, data in zip(supers, before, strict=True):
        assert data is not None
        image.write(block, data)
    image.write(forge.store.places.log[1] + forge.store.log.end % root.log_blocks, bytes(BLOCK))
    image.close()
    assert [one["kind"] for one in check(device)["findings"]] == ["count"]
    assert check(device, repair=True)["ok"]


def lose(device: Path, choose: random.Random, *pages: tuple[int, int]) -> None:
    """Both copies of one page of each tree and level."""
    image = FileImage(device, writable=True)
    found = {page: list(places(image, *page).values()) for page in pages}
    for blocks in found.values():
        flip(image, choose.choice(blocks))
    image.close()


DERIVED = [(layout.TREE_REFS, level) for level in range(5)]
DERIVED += [(tree, level) for tree in (layout.TREE_GROUPS, layout.TREE_SLOTS) for level in range(3)]


@pytest.mark.parametrize("which", ["closed", "live"])
@pytest.mark.parametrize("pages", [*[[page] for page in DERIVED], "several", "beside"], ids=str)
def test_lost_pages_that_follow_from_others_are_written_anew(
    closed: Path, make_server: Callable[..., Server], pages: list[tuple[int, int]], which: str
) -> None:
    """From then on it is as if they had never been lost, and can be lost again. `live`: with a log that speaks of them.
    `beside`: what cannot be had again stays lost."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    server = make_server(config=SMALL)
    server.data.mkdir()
    device = server.data / "device.img"
    run("cp", "--sparse=always", closed.with_name(f"{which}.img"), device)
    for _ in range(2):
        before = check(device, data=True)
        assert before["ok"]
        if pages == "beside":
            chosen = [(layout.TREE_REFS, 0), (layout.TREE_SLOTS, 0), (layout.TREE_PRINTS, 0)]
        else:
            chosen = [page for page in DERIVED if choose.random() < 0.4] if pages == "several" else pages
        lose(device, choose, *chosen)
        assert chosen == [] or not check(device)["ok"]
        repaired = check(device, data=pages != "beside", repair=True)
        if pages == "beside":
            assert ["fingerprints" in one["text"] for one in repaired["findings"]] == [True]
            return
        assert repaired["ok"], repaired["findings"]
        for key in ("stored_bytes", "referenced_bytes", "metadata_bytes", "volumes", "verified_bytes"):
            assert repaired["totals"][key] == before["totals"][key]
    if pages != "several":
        return
    server.start()
    assert server.json("check", "--live")["ok"]
    write(server, seed=2)
    server.stop()
    assert server.json("check", "--verify-data")["ok"]


def test_slots_that_nobody_uses_are_free_again(closed: Path, tmp_path: Path) -> None:
    """What a lost directory led to keeps its slots as long as another directory is lost."""
    device = tmp_path / "device"
    run("cp", "--sparse=always", closed, device)
    damage(device, layout.TREE_PRINTS, 4, (0, 1))
    damage(device, layout.TREE_REFS, 3, (0, 1))
    assert [one["repairable"] for one in check(device)["findings"]].count(True) == 1
    assert check(device, repair=True)["count"] == 1
    damage(device, layout.TREE_PRINTS, 4, (0, 1))  # undone: the device has come to itself
    found = check(device)
    assert found["count"] > 0 and all("its bit says" in one["text"] for one in found["findings"]), found["findings"]
    assert all(one["repairable"] for one in found["findings"])
    assert check(device, data=True, repair=True)["ok"]


def test_counts_do_not_follow_from_a_map_with_gaps(closed: Path, tmp_path: Path) -> None:
    device = tmp_path / "device"
    run("cp", "--sparse=always", closed, device)
    lose(device, random.Random(1), (layout.TREE_MAP, 0), (layout.TREE_REFS, 0))
    before = device.read_bytes()
    found = check(device, repair=True)
    assert [one["repairable"] for one in found["findings"]] == [False, False] and found["repaired"] == 0
    assert device.read_bytes() == before


def test_a_server_runs_on_what_was_repaired(closed: Path, make_server: Callable[..., Server]) -> None:
    server = make_server(config=SMALL)
    server.data.mkdir()
    device = server.data / "device.img"
    run("cp", "--sparse=always", closed, device)
    for case in CASES:
        if case.repairable:
            case.forge(Forge(device))
            assert check(device, repair=True)["ok"]
    server.start()
    assert server.json("check", "--live")["ok"]
    write(server, seed=2)
    server.stop()
    assert server.json("check", "--verify-data")["ok"]


# --- Growing ----------------------------------------------------------------------------------------------------------


def test_a_device_is_grown(stopped: Server) -> None:
    assert "cannot be made smaller" in stopped.cli("device", "grow", "100MiB", status=2).stderr
    assert "multiple of 4096" in stopped.cli("device", "grow", "300000000", status=2).stderr
    assert "the next atoll serve uses all of it" in stopped.cli("device", "grow", "256MiB").stdout
    stopped.start()
    status = stopped.json("status")
    assert status["space"]["device_bytes"] == 256 << 20
    assert not (stopped.data / "grow").exists()
    write(stopped, seed=3)
    stopped.cli("volume", "create", "large", "200MiB")
    stopped.stop()
    found = stopped.json("check", "--verify-data")
    assert found["ok"] and found["store"]["store_bytes"] == 256 << 20
    stopped.json("device", "grow", "300MiB")
    stopped.start()
    assert stopped.json("status")["space"]["device_bytes"] == 300 << 20
    stopped.stop()
    assert stopped.json("check")["ok"]


def grown_to_the_last(device: Path) -> None:
    """As if it had been grown as often as can be: by 4 MiB and 64 slots each time."""
    image, report = FileImage(device, writable=True), Report()
    store = Store.read(image, report)
    assert store is not None and not report.count
    fields = store.root.fields.copy()
    while (count := int(fields["extent_count"])) < layout.EXTENTS:
        first = int(fields["device_blocks"])
        fields["extents"][count] = (first, first + 1024 - 2 - 64, 64, 0)
        fields["extent_count"] += 1
        fields["device_blocks"] += 1024
        fields["slots"] += 64
    fields["generation"] += 1
    os.ftruncate(image.fd, int(fields["device_blocks"]) * BLOCK)
    for place in (int(fields["generation"]) % 2, int(fields["generation"]) % 2 + 2):
        image.write(layout.super_block(int(fields["device_blocks"]), place), sealed(fields, place))
    image.close()


def test_what_a_store_cannot_grow_to_is_refused_at_once(stopped: Server) -> None:
    """Not by the next start, after which nobody is served any more; nor is it said to be used and is not."""
    device = stopped.data / "device.img"
    for wanted, why in (("131MiB", "less than 132MiB"), ("257TiB", "at most 256TiB")):
        assert why in stopped.cli("device", "grow", "--sparse", wanted, status=1).stderr
    grown_to_the_last(device)
    assert check(device)["store"]["growths_left"] == 0
    size = device.stat().st_size
    assert "as often as a store can be" in stopped.cli("device", "grow", "1GiB", status=1).stderr
    assert device.stat().st_size == size and not (stopped.data / "grow").exists()
    stopped.start()
    assert stopped.json("status")["space"]["device_bytes"] == size
    stopped.stop()
    assert stopped.json("check", "--verify-data")["ok"]


@pytest.mark.parametrize("copy", [0, 1])
def test_a_grown_store_of_which_one_newest_superblock_is_damaged(make_server: Callable[..., Server], copy: int) -> None:
    """The generation before it tells of a smaller store, which is there as well: it is not taken for the newest."""
    server = make_server(config={**SMALL, "volumes": [{"name": "disk", "size": "160MiB"}]}).start()
    content = random.Random(copy).randbytes(130 << 20)

    def put(begin: int, end: int) -> None:
        with Connection.open(str(server.socket), timeout_s=60) as connection:
            connection.negotiate("disk")
            for at in range(begin << 20, end << 20, 1 << 20):
                connection.write(at, content[at : at + (1 << 20)])
            connection.flush()

    put(0, 110)
    server.stop()
    server.cli("device", "grow", "192MiB")
    server.start()
    put(110, 130)  # most of it behind the old end
    server.die()
    for instance in server.instances:  # power fails
        for path in Path("/dev/shm").glob(f"atoll-{instance}-*"):
            path.unlink()
    before = check(server.data / "device.img")
    assert before["ok"] and before["store"]["store_bytes"] == 192 << 20 and not before["notes"]
    block = layout.super_block((192 << 20) // BLOCK, before["store"]["generation"] % 2 + 2 * copy)
    with open(server.data / "device.img", "r+b") as file:
        file.seek(block * BLOCK + 300)
        file.write(b"rot")
    found = server.json("check", status=1)
    assert [(one["block"], one["repairable"]) for one in found["findings"]] == [(block, True)], found
    assert found["store"] == before["store"]
    assert server.json("check", "--verify-data", "--repair")["repaired"] == 1
    server.start()
    with Connection.open(str(server.socket), timeout_s=60) as connection:
        connection.negotiate("disk")
        for at in range(0, len(content), 1 << 20):
            assert connection.read(at, 1 << 20) == content[at : at + (1 << 20)]
    server.stop()
    assert server.json("check")["ok"]


def test_what_was_read_once_is_read_from_the_medium_again(tmp_path: Path) -> None:
    """A block that stands in the operating system's memory says nothing of the device."""

    libc, resident = ctypes.CDLL(None, use_errno=True), ctypes.c_ubyte()

    def in_memory() -> bool:
        """By mincore, which reads nothing: a read with RWF_NOWAIT may have it read ahead, and then finds it there."""
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), BLOCK) as view:
            first = ctypes.c_char.from_buffer(view)
            result = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(1), ctypes.byref(resident))
            del first  # or the mapping cannot go
            assert result == 0, os.strerror(ctypes.get_errno())
        return bool(resident.value & 1)

    path = tmp_path / "device"
    with open(path, "wb") as file:
        file.write(bytes(16 * BLOCK))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory():
        pytest.skip(f"{tmp_path} is on a file system that keeps everything there")
    path.read_bytes()
    assert in_memory()
    image = FileImage(path)
    assert not in_memory()
    assert image.read(0, 16) == bytes(16 * BLOCK)
    image.close()
