"""A small sync flushes the device once: its log block is written before its data are flushed, and needs them to count.

Devices are cut by hand here: what a power loss may leave of the last sync, and what it may not be taken for. Random
power losses under load are in test_power_loss.py, test_dedup_torture.py and the store's C rig.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from dedupkit import BLOCK, OK, Io, Stage
from flushkit import (
    SECOND_NS,
    VOLUME_BYTES,
    A,
    B,
    C,
    D,
    found,
    is_log,
    log_blocks,
    newest_root,
    offline,
    place,
    served,
    super_places,
    supers,
    synced,
    syncs,
    unreadable,
    with_bytes,
    without,
    without_newest_root,
)

from atoll.ipc._ipc import lib
from atoll.services.dedup.check import layout
from atoll.services.dedup.check.image import FileImage, MemoryImage
from atoll.services.dedup.check.reader import LogReader, Report, Store
from atoll.services.dedup.check.repair import next_root, switch
from atoll.services.dedup.check.run import run

NOW = 1_000_000_000_000_000


@pytest.fixture
def device() -> bytes:
    """A was flushed at block 0 of the first volume, then B over it."""
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", VOLUME_BYTES)
        stage.run_until_idle()
        synced(stage, volume, (0, A))
        assert synced(stage, volume, (0, B)) == 1
        return bytes(stage.device)


def test_what_arrived_whole_counts(device: bytes) -> None:
    with served(device) as stage:
        assert found(stage, 0) == B
        assert stage.counters()["log_blocks_dropped"] == 0
    assert offline(device) == ([], [])


@pytest.mark.parametrize("unreadable", [False, True])
def test_without_its_data_a_last_block_does_not_count(device: bytes, unreadable: bool) -> None:
    at = place(device, B)

    def rule(io: Io) -> int:
        overlaps = io.offset <= at < io.offset + io.length
        return int(lib.ATOLL_EIO) if unreadable and io.opcode == lib.ATOLL_OP_IO_READ and overlaps else OK

    lost = device if unreadable else without(device, B)
    with served(lost, rule, asked=not unreadable) as stage:
        assert stage.counters()["log_blocks_dropped"] == 1
        assert found(stage, 0) == A
        assert synced(stage, 0, (1, C)) == 1  # it goes on
        after = bytes(stage.device)
    assert offline(lost)[1] == offline(after)[1] == []
    with served(after) as stage:
        assert (found(stage, 0), found(stage, 1)) == (A, C)


def test_one_lost_block_of_several_is_enough() -> None:
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", VOLUME_BYTES)
        stage.run_until_idle()
        synced(stage, volume, (0, A))
        assert synced(stage, volume, (0, B), (1, C), (2, D)) == 1
        device = bytes(stage.device)
    for data in (B, C, D):
        lost = without(device, data)
        with served(lost) as stage:
            assert [found(stage, lba) for lba in range(3)] == [A, bytes(BLOCK), bytes(BLOCK)]


def test_what_did_not_count_never_does_again(device: bytes) -> None:
    """Clients have seen that it was lost. Its data may turn up all the same: somebody writes them once more."""
    with served(without(device, B)) as stage:
        assert found(stage, 0) == A
        after = bytes(stage.device)
    late = with_bytes(after, place(device, B), B)
    with served(late) as stage:
        assert found(stage, 0) == A
        assert stage.counters()["log_blocks_dropped"] == 0
    assert offline(late) == ([], [])


def test_a_power_loss_before_anybody_has_seen_it_changes_nothing(device: bytes) -> None:
    """... so that the block may count after all."""
    lost = without(device, B)
    with Stage() as stage:
        stage.device[:] = lost
        stage.io_rule = lambda io: int(lib.ATOLL_EIO) if io.opcode == lib.ATOLL_OP_IO_WRITE else OK
        stage.attach()
        assert stage.lib.dedup_store_state(stage.state) == 1, "it begins to load"
        for _ in range(2000):
            stage.turn()
            stage.disk()
        assert stage.lib.dedup_store_state(stage.state) == 1, "it serves nobody"
        assert any(io.opcode == lib.ATOLL_OP_IO_WRITE for io in stage.io_log), "it has tried to"
        assert bytes(stage.device) == lost
    with served(device) as stage:
        assert found(stage, 0) == B


def test_places_that_are_free_again_are_not_asked_for() -> None:
    """They may have been used again, by what no log block tells of yet."""
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", VOLUME_BYTES)
        stage.run_until_idle()
        synced(stage, volume, (0, A))
        stage.write(volume, BLOCK, B)
        stage.drain()
        stage.trim(volume, BLOCK, BLOCK)
        assert synced(stage, volume, (2, C)) == 1
        device = bytes(stage.device)
    reused = with_bytes(device, place(device, B), D)
    with served(reused) as stage:
        assert stage.counters()["log_blocks_dropped"] == 0
        assert [found(stage, lba) for lba in range(3)] == [A, bytes(BLOCK), C]
    assert offline(reused) == ([], [])


def test_a_block_behind_it_vouches_for_it() -> None:
    """Damage of data that were flushed long ago is an error of that block's readers, and takes nothing else away."""
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", VOLUME_BYTES)
        stage.run_until_idle()
        synced(stage, volume, (0, A))
        assert synced(stage, volume, (1, B)) == 1
        assert synced(stage, volume, (2, C)) == 1
        device = bytes(stage.device)
    damaged = without(device, B)
    with served(damaged) as stage:
        assert stage.counters()["log_blocks_dropped"] == 0
        assert (found(stage, 0), found(stage, 2)) == (A, C)
        assert found(stage, 1) in (lib.ATOLL_EIO, lib.ATOLL_ECORRUPT)
    assert len(offline(damaged)[1]) == 1


def test_each_block_of_a_long_log_is_vouched_for() -> None:
    """Wherever the reads of it begin and end: only the last one is asked for its data."""
    chance = random.Random(5)
    blocks = [(lba, chance.randbytes(BLOCK)) for lba in range(60)]
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", VOLUME_BYTES)
        stage.run_until_idle()
        roots = stage.counters()["checkpoints"]
        for block in blocks:
            assert synced(stage, volume, block) == 1
        assert stage.counters()["checkpoints"] == roots
        device = bytes(stage.device)
    with served(without(device, *(data for _, data in blocks[:-1]))) as stage:
        assert stage.counters()["log_blocks_dropped"] == 0
        assert found(stage, 59) == blocks[59][1]


def test_a_root_vouches_for_it(device: bytes) -> None:
    """A small flush while a checkpoint is under way, whose root stands behind it."""
    copy = super_places(device)[2 + (int(newest_root(device)["generation"]) & 1)]
    with Stage() as stage:
        stage.device[:] = with_bytes(device, copy, bytes(BLOCK))
        stage.attach()
        assert stage.lib.dedup_store_state(stage.state) == 1, "it begins to load"
        held: list[Io] = []  # pages of the checkpoint that mends it
        deadline = time.monotonic() + 20

        def others(hold: bool = False) -> None:
            stage.turn()
            stage.take_ios()
            held.extend(io for io in stage.ios if hold and io.opcode == lib.ATOLL_OP_IO_WRITE)
            for io in [*stage.ios]:
                if io not in held and stage.may_begin(io):
                    stage.complete(io)
            stage.answers()
            assert time.monotonic() < deadline

        while not held:
            others(hold=True)
        stage.write(0, BLOCK, C)
        before, flush = syncs(stage), stage.flush(0)
        while not flush.done:
            others()
        assert flush.status == OK and syncs(stage) == before + 1
        held.clear()
        stage.run_until_idle()
        assert stage.counters()["checkpoints"] == 1
        after = bytes(stage.device)
    vouched_for(after, 1, C)


def test_more_than_one_log_block_is_flushed_twice() -> None:
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", VOLUME_BYTES)
        stage.run_until_idle()
        chance = random.Random(9)
        assert synced(stage, volume, *((lba, chance.randbytes(BLOCK)) for lba in range(150))) == 2


@contextmanager
def clocked(hooked: ModuleType) -> Iterator[Stage]:
    try:
        hooked.lib.hook_set_clock(NOW)
        with Stage(extension=hooked) as stage:
            yield stage
    finally:
        hooked.lib.hook_set_clock(0)


def one_follows(hooked: ModuleType, stage: Stage) -> bytes:
    """Not before a second has passed, one block, and no more; the device then."""
    before = log_blocks(bytes(stage.device))
    hooked.lib.hook_set_clock(NOW + SECOND_NS - 1)
    stage.run_until_idle()
    assert log_blocks(bytes(stage.device)) == before
    for seconds in (1, 2, 3):
        hooked.lib.hook_set_clock(NOW + seconds * SECOND_NS)
        stage.run_until_idle()
        after = log_blocks(bytes(stage.device))
        assert set(after) - set(before) == {max(before) + 1}
        assert len(after[max(after)]) == 2
    stage.check()
    return bytes(stage.device)


def vouched_for(device: bytes, lba: int, data: bytes) -> None:
    """Damage of these data is told to who reads them."""
    with served(without(device, data)) as stage:
        assert stage.counters()["log_blocks_dropped"] == 0
        assert found(stage, lba) in (lib.ATOLL_EIO, lib.ATOLL_ECORRUPT)
    assert offline(device) == ([], [])


def test_a_second_later_a_block_follows(hooked: ModuleType) -> None:
    with clocked(hooked) as stage:
        stage.open()
        volume = stage.create_volume("v", VOLUME_BYTES)
        stage.run_until_idle()
        assert synced(stage, volume, (0, A)) == 1
        after = one_follows(hooked, stage)
    vouched_for(after, 0, A)


def test_a_block_follows_what_was_found(device: bytes, hooked: ModuleType) -> None:
    """The server, or the machine, went down within that second: its successor does it."""
    with clocked(hooked) as stage:
        stage.device[:] = device
        stage.open()
        after = one_follows(hooked, stage)
    vouched_for(after, 0, B)


@pytest.mark.parametrize("what", ["log", "flush"])
def test_a_block_stands_behind_what_was_tried_again(what: str) -> None:
    """Its data were flushed before it was written the second time, and it still says that they may not be there."""
    tried: list[Io] = []

    def rule(io: Io) -> int:
        bad = is_log(stage, io) if what == "log" else io.opcode == lib.ATOLL_OP_IO_SYNC
        tried.extend([io] * bad)
        return int(lib.ATOLL_EIO) if bad and len(tried) == 1 else OK

    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", VOLUME_BYTES)
        stage.run_until_idle()
        stage.write(volume, 0, A)
        stage.drain()
        stage.io_rule = rule
        flush = stage.flush(volume)
        stage.run_until_idle()
        assert flush.status not in (OK, -1) and tried
        assert synced(stage, volume) >= 1
        device = bytes(stage.device)
    vouched_for(device, 0, A)


def test_what_a_failed_flush_has_lost_takes_nothing_else_away() -> None:
    """A block and another were to be flushed together, the flush failed, and one of them is not there any more. That
    flush is told of it; the next one is a success, for the other."""
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", VOLUME_BYTES)
        stage.run_until_idle()
        synced(stage, volume, (0, A))
        for lba, data in ((1, B), (2, C)):
            stage.write(volume, lba * BLOCK, data)
        stage.drain()

        def rule(io: Io) -> int:
            if io.opcode != lib.ATOLL_OP_IO_SYNC:
                return OK
            stage.io_rule = None
            stage.device[:] = without(bytes(stage.device), B)
            return int(lib.ATOLL_EIO)

        stage.io_rule = rule
        for status in (lib.ATOLL_EIO, lib.ATOLL_ECORRUPT, OK):
            flush = stage.flush(volume)
            stage.run_until_idle()
            assert flush.status == status
        stage.check()
        device = bytes(stage.device)
    with served(device) as stage:
        assert stage.counters()["log_blocks_dropped"] == 0
        assert (found(stage, 0), found(stage, 2)) == (A, C)
        assert found(stage, 1) in (lib.ATOLL_EIO, lib.ATOLL_ECORRUPT)


def refused(device: bytes, rule: Callable[[Io], int] | None = None) -> str:
    """Why; nothing of it is changed."""
    with Stage() as stage:
        stage.device[:] = device
        stage.io_rule = rule
        with pytest.raises(AssertionError) as error:
            stage.open()
        assert bytes(stage.device) == device
        return str(error.value)


@pytest.mark.parametrize("last", [1, 2])
def test_a_log_whose_end_cannot_be_read_is_refused(device: bytes, last: int) -> None:
    """Nobody knows what it says: it may have been flushed."""
    logged = log_blocks(device)
    bad = sorted(logged)[-last:]
    places = [at for sequence in bad for at in logged[sequence]]
    first, second = (at // BLOCK for at in logged[bad[0]])
    said = (
        f"block {bad[0]} of the metadata log cannot be read in either copy (blocks {first} and {second} of the device)"
    )
    assert said in refused(device, unreadable(*places))
    with served(device) as stage:
        assert found(stage, 0) == B


def test_the_same_offline(device: bytes) -> None:
    places = (logged := log_blocks(device))[max(logged)]

    class Partly(MemoryImage):
        def read(self, first: int, count: int) -> bytes | None:
            return None if any(first <= at // BLOCK < first + count for at in places) else super().read(first, count)

    report = Report()
    assert Store.read(Partly(np.frombuffer(bytearray(device), np.uint8)), report) is None
    assert f"block {max(logged)} of the metadata log cannot be read in either copy" in str(report.fatal)


def test_what_could_not_be_read_never_counts_again(device: bytes) -> None:
    """One copy of the last block is damaged, the other cannot be read at times."""
    copy, other = (logged := log_blocks(device))[max(logged)]
    for _ in range(3):
        device = with_bytes(device, other, bytes(BLOCK))
        with served(device, unreadable(copy), asked=False) as stage:
            assert found(stage, 0) == A
            device = bytes(stage.device)
        with served(device, asked=False) as stage:
            assert found(stage, 0) == A
    with served(device) as stage:
        assert synced(stage, 0, (1, C)) == 1
        device = bytes(stage.device)
    with served(device) as stage:
        assert (found(stage, 0), found(stage, 1)) == (A, C)


@pytest.mark.parametrize("goes_on", [False, True])
def test_no_older_root_is_left_before_what_did_not_count(device: bytes, goes_on: bool) -> None:
    """Both copies of the newest superblock are damaged then. Its data have turned up, if nothing else is there."""
    with served(without(device, B)) as stage:
        assert found(stage, 0) == A
        if goes_on:
            assert synced(stage, 0, (1, C)) == 1
        after = bytes(stage.device)
    damaged = without_newest_root(after)
    with served(damaged if goes_on else with_bytes(damaged, place(device, B), B), asked=False) as stage:
        assert found(stage, 0) == A
        assert found(stage, 1) == (C if goes_on else bytes(BLOCK))


def test_nothing_is_logged_before_the_root(device: bytes, hooked: ModuleType) -> None:
    logged = log_blocks(device)
    bad = unreadable(logged[max(logged)][0])
    with clocked(hooked) as stage:
        stage.device[:] = device
        places = super_places(device)
        writes = lib.ATOLL_OP_IO_WRITE
        stage.io_rule = lambda io: int(lib.ATOLL_EIO) if io.opcode == writes and io.offset in places else bad(io)
        stage.attach()
        assert stage.lib.dedup_store_state(stage.state) == 1, "it begins to load"
        for seconds in range(5):
            hooked.lib.hook_set_clock(NOW + seconds * SECOND_NS)
            for _ in range(300):
                stage.turn()
                stage.disk()
        assert stage.lib.dedup_store_state(stage.state) == 1, "it serves nobody"
        assert set(log_blocks(bytes(stage.device))) == set(logged)
        stage.io_rule = None
        hooked.lib.hook_set_clock(NOW + 10 * SECOND_NS)
        deadline = time.monotonic() + 20
        while stage.lib.dedup_store_state(stage.state) != 2:
            stage.turn()
            stage.disk()
            assert time.monotonic() < deadline


@pytest.mark.parametrize("version", [2, 3])
def test_repair_goes_on_where_the_log_ends(device: bytes, tmp_path: Path, version: int) -> None:
    """A superblock with a wrong sum is replaced by one of this version."""
    path = tmp_path / "device"
    path.write_bytes(without(device, B) if version == 3 else as_version(device, 2))
    image = FileImage(path, writable=True)
    store = Store.read(image, Report())
    assert store is not None
    fields = store.root.fields.copy()
    fields["zero_promises"] += 1
    switch(image, fields)
    image.close()
    repaired = run(path, repair=True)
    assert repaired["ok"] and repaired["repaired"] == 1
    assert int(newest_root(path.read_bytes())["version"]) == 3
    with served(path.read_bytes()) as stage:
        assert found(stage, 0) == (A if version == 3 else B)


# --- The version before ---------------------------------------------------------------------------------------------


def as_version(device: bytes, version: int) -> bytes:
    """The same store as a program of that version would have written it."""
    image = np.frombuffer(bytearray(device), np.uint8)
    blocks = len(image) // BLOCK
    for number in range(4):
        sector = image[(at := layout.super_block(blocks, number) * BLOCK) : at + layout.SUPER_BYTES]
        fields = sector.view(layout.SUPER)[0]
        if int(fields["magic"]) != layout.SUPER_MAGIC:
            continue
        fields["version"] = version
        seeded = layout.seed(layout.SEED_SUPER, 0, number)
        fields["checksum"] = layout.checksum(sector[8:], seeded)
        low, high = map(int, fields["uuid"])
    chain = 0
    for sequence, copies in sorted(log_blocks(device).items()):
        for at in copies:
            block = image[at : at + BLOCK]
            header = block[: layout.LOG_HEADER.itemsize].view(layout.LOG_HEADER)[0]
            header["version"], header["flags"], header["chain"] = version, 0, chain
            header["checksum"] = layout.checksum(block[8:], layout.seed(layout.SEED_LOG, low ^ high, sequence))
        chain = int(header["checksum"])
    return image.tobytes()


def roots(device: bytes) -> list[int]:
    """Versions of the superblocks."""
    return [int(fields["version"]) for fields in supers(device)]


def log_versions(device: bytes) -> list[int]:
    places = [at for copies in log_blocks(device).values() for at in copies]
    return sorted({int(np.frombuffer(device, layout.LOG_HEADER, 1, at)[0]["version"]) for at in places})


def test_a_store_of_the_version_before_gets_new_roots_first(device: bytes) -> None:
    """Two: a program that reads that one only would take the older of them, whose log goes on in this one."""
    before = as_version(device, 2)
    assert set(roots(before)) <= {0, 2} and log_versions(before) == [2]
    assert offline(before) == ([], [])
    with served(before) as stage:
        assert roots(bytes(stage.device)) == [3, 3, 3, 3], "before anybody is served"
        assert log_versions(bytes(stage.device)) == [2]
        assert found(stage, 0) == B
        assert synced(stage, 0, (1, C)) == 1
        after = bytes(stage.device)
    assert log_versions(after) == [2, 3]
    with served(after) as stage:
        assert (found(stage, 0), found(stage, 1)) == (B, C)


def test_power_fails_while_it_gets_them(device: bytes) -> None:
    """After each of the four superblocks. Then it is served and goes on, and no root of the version before is left."""
    cuts = []
    before = as_version(device, 2)
    places = super_places(device)
    with Stage() as stage:
        stage.device[:] = before
        stage.attach()
        deadline = time.monotonic() + 20
        while stage.lib.dedup_store_state(stage.state) != 2:
            stage.turn()
            stage.take_ios()
            for io in [*stage.ios]:
                if stage.may_begin(io):
                    stage.complete(io)
                    if io.opcode == lib.ATOLL_OP_IO_WRITE and io.offset in places:
                        cuts.append(bytes(stage.device))
            assert time.monotonic() < deadline
    assert len(cuts) == 4
    for cut in cuts:
        with served(cut, asked=False) as stage:
            assert 2 not in roots(bytes(stage.device))
            assert synced(stage, 0, (1, C)) == 1
            assert (found(stage, 0), found(stage, 1)) == (B, C)


def test_an_older_root_of_the_version_before_is_replaced_first(device: bytes, tmp_path: Path) -> None:
    """What a repair of such a store leaves."""
    path = tmp_path / "device"
    path.write_bytes(as_version(device, 2))
    image = FileImage(path, writable=True)
    store = Store.read(image, Report())
    assert store is not None
    switch(image, next_root(image, store))
    image.close()
    before = path.read_bytes()
    assert sorted(set(roots(before)) - {0}) == [2, 3]
    with served(before) as stage:
        assert roots(bytes(stage.device)) == [3, 3, 3, 3]
        assert found(stage, 0) == B


def test_its_log_needs_no_data(device: bytes) -> None:
    """There the data were flushed before their log block was written: this one is damaged."""
    before = without(as_version(device, 2), B)
    with served(before) as stage:
        assert found(stage, 0) in (lib.ATOLL_EIO, lib.ATOLL_ECORRUPT)
    assert len(offline(before)[1]) == 1


def test_a_later_version_is_refused(device: bytes) -> None:
    with Stage() as stage:
        stage.device[:] = as_version(device, 4)
        with pytest.raises(AssertionError, match="format version 4, this program reads versions 2 to 3"):
            stage.open()
    report = Report()
    assert (
        Store.read(MemoryImage(np.frombuffer(bytearray(as_version(device, 4)), np.uint8)), report, LogReader()) is None
    )
    assert report.fatal == "the store is of format version 4, this program reads versions 2 and 3"
