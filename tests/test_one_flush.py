"""A small sync flushes the device once: its log block is written before its data are flushed, and needs them to count.

Devices are cut by hand here: what a power loss may leave of the last sync, and what it may not be taken for. Random
power losses under load are in test_power_loss.py, test_dedup_torture.py and the store's C rig.
"""

from __future__ import annotations

import random
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
    log_blocks,
    offline,
    place,
    served,
    synced,
    with_bytes,
    without,
)

from atoll.ipc._ipc import lib
from atoll.services.dedup.check import layout
from atoll.services.dedup.check.image import FileImage, MemoryImage
from atoll.services.dedup.check.reader import LogReader, Report, Store
from atoll.services.dedup.check.repair import switch
from atoll.services.dedup.check.run import run


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
        for _ in range(2000):
            stage.turn()
            stage.disk()
        assert stage.lib.dedup_store_state(stage.state) == 1, "it serves nobody"
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


def test_more_than_one_log_block_is_flushed_twice() -> None:
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", VOLUME_BYTES)
        stage.run_until_idle()
        chance = random.Random(9)
        assert synced(stage, volume, *((lba, chance.randbytes(BLOCK)) for lba in range(150))) == 2


def test_a_second_later_a_block_follows(hooked: ModuleType) -> None:
    now = 1_000_000_000_000_000
    try:
        hooked.lib.hook_set_clock(now)
        with Stage(extension=hooked) as stage:
            stage.open()
            volume = stage.create_volume("v", VOLUME_BYTES)
            stage.run_until_idle()
            assert synced(stage, volume, (0, A)) == 1
            before = log_blocks(bytes(stage.device))
            hooked.lib.hook_set_clock(now + SECOND_NS - 1)
            stage.run_until_idle()
            assert log_blocks(bytes(stage.device)) == before
            for seconds in (1, 2, 3):  # one, and nothing more
                hooked.lib.hook_set_clock(now + seconds * SECOND_NS)
                stage.run_until_idle()
                after = log_blocks(bytes(stage.device))
                assert set(after) - set(before) == {max(before) + 1}
                assert len(after[max(after)]) == 2
            stage.check()
            device = bytes(stage.device)
    finally:
        hooked.lib.hook_set_clock(0)
    damaged = without(device, A)
    with served(damaged) as stage:
        assert stage.counters()["log_blocks_dropped"] == 0
        assert found(stage, 0) in (lib.ATOLL_EIO, lib.ATOLL_ECORRUPT)
    assert offline(device) == ([], [])


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
    assert versions(path.read_bytes())[0] == 3
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


def versions(device: bytes) -> list[int]:
    """Of the superblock with the newest generation, and of the log's blocks."""
    found = [
        np.frombuffer(device, layout.SUPER, 1, layout.super_block(len(device) // BLOCK, number) * BLOCK)[0]
        for number in range(4)
    ]
    newest = max(found, key=lambda fields: int(fields["generation"]))
    logged = log_blocks(device)
    headers = [np.frombuffer(device, layout.LOG_HEADER, 1, at)[0] for copies in logged.values() for at in copies]
    return [int(newest["version"]), *sorted({int(header["version"]) for header in headers})]


def test_a_store_of_the_version_before_gets_a_new_root_first(device: bytes) -> None:
    before = as_version(device, 2)
    assert versions(before) == [2, 2]
    assert offline(before) == ([], [])
    with served(before) as stage:
        assert versions(bytes(stage.device)) == [3, 2], "before anybody is served"
        assert found(stage, 0) == B
        assert synced(stage, 0, (1, C)) == 1
        after = bytes(stage.device)
    assert versions(after) == [3, 2, 3]
    with served(after) as stage:
        assert (found(stage, 0), found(stage, 1)) == (B, C)


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
