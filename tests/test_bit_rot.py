"""Bytes of the device that changed by themselves: each is harmless, or named with the block it hit, and never served.

Offline every byte of the small structures is flipped and a sample of the large ones, and the checker asked; then a
server runs on such devices: it reads the second copies, says EIO where there is none, and its scrub repairs.
`ATOLL_BITROT_FLIPS` makes the samples larger.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from damagekit import flip, places
from flushkit import log_blocks
from nbdclient import Connection, NbdError
from powerlosskit import block_digests
from serverkit import Server, wait_for, write_device

from atoll.services.dedup.check import layout
from atoll.services.dedup.check.audit import Totals, audit, compare_counts, verify_data
from atoll.services.dedup.check.image import FileImage, MemoryImage
from atoll.services.dedup.check.reader import LogReader, Report, Store, read_supers

BLOCK = 4096
FLIPS = int(os.environ.get("ATOLL_BITROT_FLIPS", "40"))  # of each class that is sampled
CONFIG = {"device_size": "128MiB", "volumes": [{"name": "disk", "size": "64MiB"}, {"name": "two", "size": "64MiB"}],
          "dedup": {"metadata_log_bytes": "1MiB"}}  # fmt: skip
BLOCKS = 1500  # that are written, from block 200 of each volume on


def content(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK)


def number_of(volume: str, lba: int) -> int:
    """Half of the blocks of the second volume are those of the first."""
    return lba if volume == "disk" or lba % 2 else 10000 + lba


@dataclass
class Devices:
    """The same store as its log tells it, and closed: all in pages."""

    live: np.ndarray
    closed: np.ndarray


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devices]:
    server = Server(tmp_path_factory.mktemp("r"), CONFIG).start()
    try:
        for volume in ("disk", "two"):
            with Connection.open(str(server.socket), timeout_s=60) as connection:
                connection.negotiate(volume)
                for lba in range(200, 200 + BLOCKS, 50):
                    connection.write(lba * BLOCK, b"".join(content(number_of(volume, lba + at)) for at in range(50)))
                    connection.flush()
        image = server.data / "device.img"
        wait_for("a log block vouches for the data of the last sync", lambda: is_vouched(image.read_bytes()))
        live = np.fromfile(image, np.uint8)
        server.stop()
        yield Devices(live, np.fromfile(server.data / "device.img", np.uint8))
    finally:
        assert not server.end()


def is_vouched(device: bytes) -> bool:
    """The last block of the log is not one that counts only if its data are there."""
    blocks = log_blocks(device)
    header = np.frombuffer(device, layout.LOG_HEADER, 1, blocks[max(blocks)][0])[0]
    return not int(header["flags"]) & layout.UNFLUSHED


def look(device: np.ndarray, reader: LogReader) -> tuple[Report, Store | None]:
    report = Report()
    store = Store.read(MemoryImage(device), report, reader)
    if store is not None:
        verify_data(store, report, audit(store, report))
    return report, store


def used_slots(store: Store) -> dict[int, str]:
    """Block → which copy of which metadata page."""
    found = {}
    for (tree, level), pages in store.trees.items():
        for copy, blocks in enumerate(store.places.of_slots(pages.pointers["slot"])):
            for place, number in zip(blocks, pages.numbers, strict=True):
                found[int(place)] = f"copy {copy} of the {layout.page_name(tree, level, int(number))}"
    return found


def flips(store: Store, choose: random.Random) -> list[tuple[str, int, int]]:
    """(class, block, byte) of what is tried."""
    tried = [
        ("superblock", layout.super_block(store.root.device_blocks, place), byte)
        for place in range(4)
        for byte in range(512)
    ]
    pages = sorted(used_slots(store))
    counts = store.counts(0, store.root.device_blocks)
    data = [int(block) for block in np.flatnonzero(counts)]
    kinds = [("page", pages), ("data", data)]
    replayed = range(store.root.log_start, store.log.end)
    kinds.append(("log", [first + at % store.root.log_blocks for first in store.places.log for at in replayed]))
    unused = set(range(store.root.device_blocks)) - set(pages) - set(data) - {block for _, block, _ in tried}
    kinds.append(("unused", sorted(unused - set(kinds[2][1]))))
    for kind, blocks in kinds:
        tried += [(kind, choose.choice(blocks), choose.randrange(BLOCK)) for _ in range(FLIPS if blocks else 0)]
    return tried


@pytest.mark.parametrize("which", ["live", "closed"])
def test_every_flip_is_harmless_or_named(devices: Devices, which: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose, reader = random.Random(seed), LogReader()
    device = getattr(devices, which).copy()
    report, store = look(device, reader)
    assert store is not None and not report.count
    before = block_digests(store)
    named = dict.fromkeys(("superblock", "page", "data", "log", "unused"), 0)
    for kind, block, byte in flips(store, choose):
        device[block * BLOCK + byte] ^= 1 << choose.randrange(8)
        if kind == "superblock" and byte % 128:  # the same root, then the same of everything
            report = Report()
            root, _ = read_supers(MemoryImage(device), report)
            found = store if root is not None and root.generation == store.root.generation else None
        else:
            report, found = look(device, reader)
        blocks = {finding.fields.get("block") for finding in report.findings}
        what = f"{kind} block {block} byte {byte}: {[finding.text for finding in report.findings]} {report.fatal}"
        assert found is not None, what  # there is a second copy of everything but data
        if kind in ("page", "data") or (kind == "superblock" and report.count):
            assert blocks == {block}, what
        elif kind == "superblock":  # only where there was none before
            assert not device[block * BLOCK : block * BLOCK + byte].any(), what
        elif kind == "log":
            assert blocks <= {block}, what
        else:
            assert not report.count, what
        named[kind] += bool(report.count)
        if kind != "data" and found is not store:
            assert block_digests(found) == before, what
        device[block * BLOCK : (block + 1) * BLOCK] = getattr(devices, which)[block * BLOCK : (block + 1) * BLOCK]
    print(named)
    assert named["superblock"] >= 1024
    assert named["page"] == named["data"] == FLIPS or which == "live"


class Anything(int):
    """A checksum that agrees with every other: whatever stands on the device is believed."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def test_the_checker_survives_what_has_good_checksums(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of superblocks, log and pages hold anything, as if it had been written so: findings, no exception."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    real = layout.checksum
    images = [(device.copy(), look(device, LogReader())[1]) for device in (devices.live, devices.closed)]
    monkeypatch.setattr(layout, "checksum", lambda data, seeded: Anything(real(data, seeded)))
    for _ in range(FLIPS * 2):
        device, store = choose.choice(images)
        assert store is not None
        log = [first + at % store.root.log_blocks for first in store.places.log
               for at in range(store.root.log_start, store.log.end)]  # fmt: skip
        supers = [layout.super_block(store.root.device_blocks, place) for place in range(4)] * 4
        chosen = [choose.choice([*supers, *used_slots(store), *log]) for _ in range(choose.choice((1, 1, 3)))]
        before = {block: device[block * BLOCK : (block + 1) * BLOCK].copy() for block in chosen}
        for block in chosen:
            at = block * BLOCK + 8 * choose.randrange(64 if choose.random() < 0.6 else 512)
            word = choose.choice(
                (0, 1, 1 << 32, 1 << 63, (1 << 64) - 1, choose.getrandbits(20), choose.getrandbits(64))
            )
            device[at : at + 8] = np.frombuffer(word.to_bytes(8, "little"), np.uint8)
        look(device, LogReader())
        for block, content_ in before.items():
            device[block * BLOCK : (block + 1) * BLOCK] = content_


def test_a_wrong_sum_of_a_group_without_data(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of the group are the store's own: named, and not to be mended by a record of one of its blocks."""
    device = devices.closed.copy()
    report, store = look(device, LogReader())
    assert store is not None and not report.count
    end = store.root.device_blocks
    groups = range(end // layout.GROUP_BLOCKS)
    data = store.places.data_mask(0, end)
    bare = [at for at in groups if not data[at * layout.GROUP_BLOCKS : (at + 1) * layout.GROUP_BLOCKS].any()]
    assert bare
    table = store.table
    sums = table(layout.TREE_GROUPS, layout.GROUPS_PER_PAGE, "<u2", 0, len(groups)).copy()
    sums[bare[0]] = 1
    monkeypatch.setattr(store, "table", lambda tree, *rest: sums if tree == layout.TREE_GROUPS else table(tree, *rest))
    totals = Totals()
    compare_counts(store, report, totals, 0, end, store.counts(0, end))
    assert [(one.kind, one.repairable, one.fields) for one in report.findings] == [
        ("total", False, {"block": bare[0] * layout.GROUP_BLOCKS})
    ]
    assert not totals.wrong_groups


def start(make_server: Callable[..., Server], device: np.ndarray) -> Server:
    server = make_server(config=CONFIG)
    server.data.mkdir()
    write_device(server.data / "device.img", device)
    return server.start()


def read_all(server: Server, volume: str) -> list[int]:
    """LBAs that cannot be read; all others are as they should be."""
    bad = []
    with Connection.open(str(server.socket), timeout_s=60) as connection:
        connection.negotiate(volume)
        for first in range(200, 200 + BLOCKS, 50):
            expected = [content(number_of(volume, lba)) for lba in range(first, first + 50)]
            try:
                assert connection.read(first * BLOCK, 50 * BLOCK) == b"".join(expected), f"{volume} block {first}"
                continue
            except NbdError as error:
                assert error.code == 5
            for lba in range(first, first + 50):
                try:
                    assert connection.read(lba * BLOCK, BLOCK) == expected[lba - first], f"{volume} block {lba}"
                except NbdError as error:
                    assert error.code == 5 and f"at LBA {lba}:" in str(error)
                    bad.append(lba)
    return bad


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("which", ["live", "closed"])
def test_one_copy_of_metadata_is_enough(
    make_server: Callable[..., Server], devices: Devices, which: str, copy: int
) -> None:
    """Superblocks, log and pages: one copy of each is damaged somewhere. All is served; the scrub makes it whole."""
    choose = random.Random(copy)
    device = getattr(devices, which).copy()
    _, store = look(device, LogReader())
    assert store is not None
    blocks = [block for block, name in used_slots(store).items() if name.startswith(f"copy {copy} ")]
    blocks += [layout.super_block(store.root.device_blocks, 2 * copy + pair) for pair in (0, 1)]
    blocks += [store.places.log[copy] + at % store.root.log_blocks for at in range(store.root.log_start, store.log.end)]
    for block in blocks:
        device[block * BLOCK + choose.randrange(512)] ^= 0x41
    server = start(make_server, device)
    assert read_all(server, "disk") == read_all(server, "two") == []
    found = server.json("scrub", "--rate", "0")
    assert found["damaged_count"] == found["lost_pages"] == 0
    server.stop()
    shutil.copy(server.data / "device.img", server.folder / "after.img")
    after = server.json("check", "--verify-data", status=None)
    # A superblock of the generation before is written anew with the next root.
    assert all(finding["kind"] == "superblock" for finding in after["findings"]), after["findings"]
    assert server.json("check", "--repair")["ok"]


def written_and_kept(server: Server, lost: int) -> None:
    """A write that was answered before it was found that its page of the map is lost: no flush of its volume succeeds,
    and what it touches cannot be had; nobody else is concerned. It is kept until its volume is no more."""
    with (
        Connection.open(str(server.socket), timeout_s=60) as connection,
        Connection.open(str(server.socket), timeout_s=60) as other,
    ):
        connection.negotiate("disk")
        other.negotiate("two")

        def posts() -> bool:
            other.write(0, b"p" * BLOCK)
            return int(server.json("status")["counters"]["nic"]["posted"]) > 0

        wait_for("writes are posted", posts)
        connection.write(lost * BLOCK, b"kept" * (BLOCK // 4))
        for action in (
            connection.flush,
            lambda: connection.read(lost * BLOCK, 512),
            lambda: connection.write(lost * BLOCK, b"again" * 100),
            connection.flush,
        ):
            with pytest.raises(NbdError) as caught:
                action()
            assert caught.value.code == 5
        other.write(BLOCK, b"q" * BLOCK)
        other.flush()
    server.die()
    server.start()
    with Connection.open(str(server.socket), timeout_s=60) as connection:
        connection.negotiate("disk")
        with pytest.raises(NbdError):
            connection.flush()
    wait_for("nobody uses it", lambda: server.cli("volume", "delete", "disk", status=None).returncode == 0)


def test_a_page_lost_in_both_copies(make_server: Callable[..., Server], devices: Devices) -> None:
    """What it held cannot be read, and says so; everything else can."""
    device = devices.closed.copy()
    number, blocks = next(iter(places(MemoryImage(device), layout.TREE_MAP, 0).items()))
    assert number >> 39 == 0
    first = (number & (1 << 39) - 1) * 512
    flip(MemoryImage(device), blocks)
    report, _ = look(device, LogReader())
    assert "is lost" in report.findings[0].text and not report.findings[0].repairable
    server = start(make_server, device)
    lost = [lba for lba in range(200, 200 + BLOCKS) if first <= lba < first + 512]
    assert read_all(server, "disk") == lost
    assert read_all(server, "two") == []
    assert server.json("scrub", "--rate", "0", status=1)["lost_pages"] == 1
    written_and_kept(server, lost[0])
    wait_for("it still serves", lambda: server.serves())


def test_counts_of_a_large_device_lost_for_a_while(make_server: Callable[..., Server]) -> None:
    """A directory about all of them. What it is about is given to nobody, and flushes say so; that it is about more
    than one step may change kills nobody, neither then nor when it can be read again."""
    server = make_server(config={**CONFIG, "device_size": "64GiB", "sparse": True}).start()
    with Connection.open(str(server.socket), timeout_s=60) as connection:
        connection.negotiate("disk")
        connection.write(BLOCK, content(0))
    server.stop()
    device = server.data / "device.img"
    image = FileImage(device, writable=True)
    (lost,) = places(image, layout.TREE_REFS, 2).values()
    flip(image, lost)
    image.flush()
    server.start()
    with Connection.open(str(server.socket), timeout_s=60) as connection:
        connection.negotiate("disk")
        connection.write(0, content(1))
        with pytest.raises(NbdError):
            connection.flush()
        wait_for("its space is given to nobody", lambda: server.json("status")["space"]["free_bytes"] == 0)
        flip(image, lost)
        image.flush()
        image.close()
        wait_for("it comes back", lambda: server.json("status")["space"]["quarantined_bytes"] == 0, 60)
        wait_for("a flush succeeds again", connection.flushes)
        assert connection.read(0, BLOCK) == content(1)
    assert server.row("dedup")["restarts"] == 0
    assert server.json("check", "--live")["ok"]
    server.stop()
    assert server.json("check", "--verify-data")["ok"]


def test_places_whose_fingerprints_are_lost(make_server: Callable[..., Server], devices: Devices) -> None:
    """Those of all places: nothing finds one, so flushes fail, and do not wait for ever."""
    device = devices.closed.copy()
    _, store = look(device, LogReader())
    assert store is not None
    pages = store.trees[layout.TREE_PRINTS, 4]
    blocks = [int(copy[0]) for copy in store.places.of_slots(pages.pointers["slot"])]
    for block in blocks:
        device[block * BLOCK + 77] ^= 1
    server = start(make_server, device)
    with Connection.open(str(server.socket), timeout_s=30) as connection:
        connection.negotiate("disk")
        for lba in range(20):
            connection.write(lba * BLOCK, content(20000 + lba))
        with pytest.raises(NbdError):
            connection.flush()
        with open(server.data / "device.img", "r+b") as file:  # the device comes to itself
            for block in blocks:
                file.seek(block * BLOCK)
                file.write(devices.closed[block * BLOCK : (block + 1) * BLOCK].tobytes())
            os.fsync(file.fileno())
        wait_for("a flush succeeds again", connection.flushes)
        assert connection.read(0, 20 * BLOCK) == b"".join(content(20000 + lba) for lba in range(20))
    server.stop()
    report, _ = look(np.fromfile(server.data / "device.img", np.uint8), LogReader())
    assert not report.count


@pytest.mark.parametrize("level", [0, 1, 4])
def test_a_deletion_that_cannot_be_ended_holds_up_no_other(
    make_server: Callable[..., Server], devices: Devices, level: int
) -> None:
    """The volume with a lost leaf or directory stays in deletion with what that leads to; the other one's space comes
    back. `--repair` gives the page up, and the deletion ends."""
    device = devices.closed.copy()
    number, blocks = next(iter(places(MemoryImage(device), layout.TREE_MAP, level).items()))
    assert number >> (39 - 8 * level) == 0, "of the first volume"
    kept = BLOCKS if level else 512
    flip(MemoryImage(device), blocks)
    server = start(make_server, device)
    for volume in ("disk", "two"):
        server.cli("volume", "delete", volume)
    wait_for("no more is kept", lambda: server.json("status")["dedup"]["stored_bytes"] <= kept * BLOCK)
    server.stop()
    (found,) = server.json("check", status=1)["findings"]
    assert "is lost" in found["text"] and found["repairable"]
    repaired = server.json("check", "--repair")
    assert repaired["ok"] and repaired["totals"]["referenced_bytes"] == 0
    server.start()  # which makes them anew, as its configuration says
    server.stop()
    found = server.json("check")
    assert found["ok"] and len(found["totals"]["volumes"]) == 2


def test_data_is_never_served_wrong(make_server: Callable[..., Server], devices: Devices) -> None:
    """Twenty stored blocks are damaged: those that name them get EIO, all of them and nobody else."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    device = devices.closed.copy()
    _, store = look(device, LogReader())
    assert store is not None
    counts = store.counts(0, store.root.device_blocks)
    bad = set(choose.sample([int(block) for block in np.flatnonzero(counts)], 20))
    for block in bad:
        device[block * BLOCK + choose.randrange(BLOCK)] ^= 1 << choose.randrange(8)
    expected: dict[int, list[int]] = {0: [], 1: []}
    for keys, values in store.leaves():
        for row, column in np.argwhere(np.isin(layout.numbers(values), np.array(sorted(bad), np.uint64))):
            if int(values[row, column]) >> 60 == layout.KIND_PBA:
                expected[int(keys[row]) >> 52].append((int(keys[row]) & (1 << 52) - 1) + int(column))
    server = start(make_server, device)
    assert read_all(server, "disk") == sorted(expected[0])
    assert read_all(server, "two") == sorted(expected[1])
    found = server.json("scrub", "--rate", "0", status=1)
    assert {one["pba"] for one in found["damaged"]} == bad
    assert Path(server.data / "device.img").exists()
