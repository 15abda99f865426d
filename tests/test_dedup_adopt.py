"""All die while the store has something under way that lies in the driver's memory, which the next run makes anew."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

import pytest
from dedupkit import BLOCK, DISK, KERNEL, OK, Io, Stage

from atoll.ipc._ipc import lib
from atoll.ipc.crashpoint import point_hash

SIZE = 256 * BLOCK


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def until(stage: Stage, what: Callable[[Io], bool]) -> None:
    """Does all I/O up to the first that is so, which stays under way."""
    for _ in range(10_000):
        stage.turn()
        stage.take_ios()
        if any(what(io) for io in stage.ios):
            return
        for io in list(stage.ios):
            stage.complete(io)
        stage.answers()
    raise AssertionError("it does not come")


def from_driver(stage: Stage, io: Io) -> bool:
    base, end = stage.buffer_of(DISK)
    return io.opcode == lib.ATOLL_OP_IO_WRITE and all(base <= address < end for address, _ in io.segments)


def flushed_again(stage: Stage, volume: int) -> None:
    """A flush that succeeds has written all 20 blocks again."""
    stage.io_log.clear()
    for _ in range(6):
        flush = stage.flush(volume)
        stage.run_until_idle()
        if flush.status == OK:
            break
    assert flush.status == OK
    assert sum(io.length for io in stage.io_log if from_driver(stage, io)) == 20 * BLOCK


def writes_again(stage: Stage) -> int:
    """A flush of 20 blocks has failed, and the next one has been asked for: it writes them again."""
    volume = stage.create_volume("v", SIZE)
    stage.run_until_idle()
    for number in range(20):
        stage.write(volume, number * BLOCK, block(number))
    stage.drain()
    fails = iter([int(lib.ATOLL_EIO)])
    stage.io_rule = lambda io: next(fails, OK) if io.opcode == lib.ATOLL_OP_IO_SYNC else OK
    flush = stage.flush(volume)
    stage.run_until_idle()
    assert flush.status == lib.ATOLL_EIO
    stage.io_rule = None
    stage.flush(volume)
    return volume


def dies_after_commit(stage: Stage) -> None:
    """Dedup does one more step."""
    header = stage.domains[KERNEL].self
    header.crash_sequence += 1
    header.crash_point = point_hash("dedup.step.committed")
    assert stage.turns_in_child() == -signal.SIGKILL
    header.crash_point = 0


@pytest.mark.parametrize("opcode", [lib.ATOLL_OP_IO_READ, lib.ATOLL_OP_IO_WRITE])
def test_while_blocks_are_written_again(opcode: int) -> None:
    """After a failed flush blocks are read back and written again, out of the driver's memory."""
    with Stage(device_blocks=4096) as stage:
        stage.open()
        volume = writes_again(stage)
        if opcode == lib.ATOLL_OP_IO_WRITE:
            until(stage, lambda io: from_driver(stage, io))
        else:
            until(stage, lambda io: io.opcode == lib.ATOLL_OP_IO_READ)
        stage.everybody_dies()
        stage.attach(adopted=True)
        stage.nic_starts_anew()
        stage.run_until_idle()
        flush = stage.flush(volume)
        stage.drain()
        assert flush.status == OK
        read = stage.read(volume, 0, 20 * BLOCK)
        stage.run_until_idle()
        assert read.status == OK and read.data == b"".join(block(number) for number in range(20))
        stage.check()


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("pages", [0, -8, 8])
def test_what_was_read_to_be_written_again_is_read_again(read: bool, pages: int) -> None:
    """All die when blocks have been asked for, or have been read and the step that writes them has ended. Their
    contents are gone with the driver's memory: the next flush that succeeds has written each of them again."""
    with Stage(device_blocks=4096) as stage:
        stage.open()
        volume = writes_again(stage)
        until(stage, lambda io: io.opcode == lib.ATOLL_OP_IO_READ)
        if read:
            for io in list(stage.ios):
                stage.complete(io)
            dies_after_commit(stage)
            stage.take_ios()
        stage.shapes[DISK] = (4096, stage.shapes[DISK][1] + pages * BLOCK)
        stage.everybody_dies()
        stage.attach(adopted=True)
        stage.nic_starts_anew()
        flushed_again(stage, volume)
        data = stage.read(volume, 0, 20 * BLOCK)
        stage.run_until_idle()
        assert data.status == OK and data.data == b"".join(block(number) for number in range(20))
        stage.check()


@pytest.mark.parametrize("failed", [False, True])
def test_while_the_device_is_flushed(failed: bool) -> None:
    """Nobody was told how the flush ended, and a failure is told once: it counts as failed, so what it was to make
    durable is written again before another one says that it is."""
    with Stage(device_blocks=4096) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.run_until_idle()
        for number in range(20):
            stage.write(volume, number * BLOCK, block(number))
        stage.drain()
        stage.flush(volume)
        until(stage, lambda io: io.opcode == lib.ATOLL_OP_IO_SYNC)
        if failed:
            stage.complete(stage.ios[0], int(lib.ATOLL_EIO))
        stage.everybody_dies()
        stage.attach(adopted=True)
        stage.nic_starts_anew()
        flushed_again(stage, volume)
        stage.check()


@pytest.mark.parametrize("pages", [512, 540, 640, 1024, 460])
def test_while_a_page_of_metadata_is_read(pages: int) -> None:
    """The driver's buffers are larger in the next run, or smaller: it is not read to where others are now."""
    with Stage(device_blocks=4096) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        for number in range(20):
            stage.write(volume, number * BLOCK, block(number))
        stage.drain()
        device = stage.close_store()
    with Stage(device_blocks=4096) as stage:
        stage.device[:] = device
        stage.open()
        read = stage.read(volume, 0, 20 * BLOCK)
        until(stage, lambda io: io.opcode == lib.ATOLL_OP_IO_READ)
        stage.shapes[DISK] = (4096, pages * BLOCK)
        stage.everybody_dies()
        stage.attach(adopted=True)
        stage.nic_starts_anew()
        stage.take_ios()
        _, end = stage.buffer_of(DISK)
        mine = 128 * BLOCK  # STORE_BOUNCE_PAGES
        assert all(address >= end - mine for io in stage.ios for address, _ in io.segments)
        reads = len(stage.ios)
        stage.run_until_idle()
        read = stage.read(volume, 0, 20 * BLOCK)
        stage.run_until_idle()
        assert read.status == OK and read.data == b"".join(block(number) for number in range(20))
        stage.drain()
        stage.check()
        assert reads != 0 and stage.counters()["pages_repaired"] == 0, "it was read to where it is expected"
