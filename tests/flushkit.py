"""Flushes on a stage that plays the devices, and devices as a power loss may leave them: cut by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap

import numpy as np
from dedupkit import BLOCK, OK, Io, Stage

from atoll.ipc._ipc import lib
from atoll.services.dedup.check import layout
from atoll.services.dedup.check.audit import audit, verify_data
from atoll.services.dedup.check.image import MemoryImage
from atoll.services.dedup.check.reader import Report, Store

A, B, C, D = (random.Random(seed).randbytes(BLOCK) for seed in range(4))
VOLUME_BYTES = 256 * BLOCK
SECOND_NS = 1_000_000_000


def synced(stage: Stage, volume: int, *blocks: tuple[int, bytes]) -> int:
    """Writes them, and flushes; how often the device was flushed for that."""
    for lba, data in blocks:
        stage.write(volume, lba * BLOCK, data)
    stage.drain()
    before = syncs(stage)
    flush = stage.flush(volume)
    stage.run_until_idle()
    assert flush.status == OK
    return syncs(stage) - before


def syncs(stage: Stage) -> int:
    return sum(io.opcode == lib.ATOLL_OP_IO_SYNC for io in stage.io_log)


@contextmanager
def served(device: bytes, rule: Callable[[Io], int] | None = None, asked: bool = True) -> Iterator[Stage]:
    """A server that finds this device. What the offline reader finds is compared when `asked`."""
    with Stage() as stage:
        stage.device[:] = device
        stage.io_rule = rule
        stage.open()
        stage.io_rule = None
        yield stage
        stage.check()
        if asked:
            notes = offline(device)[0]
            assert len(notes) == stage.counters()["log_blocks_dropped"], notes


def place(device: bytes, data: bytes) -> int:
    """Where on the device it is."""
    assert device.count(data) == 1
    return device.index(data)


def with_bytes(device: bytes, at: int, data: bytes) -> bytes:
    return device[:at] + data + device[at + len(data) :]


def without(device: bytes, *contents: bytes) -> bytes:
    for data in contents:
        device = with_bytes(device, place(device, data), bytes(BLOCK))
    return device


def without_newest_root(device: bytes) -> bytes:
    """Both copies of the newest superblock are damaged."""
    newest = newest_root(device)["generation"]
    for at, fields in zip(super_places(device), supers(device), strict=True):
        if fields["generation"] == newest:
            device = with_bytes(device, at, bytes(BLOCK))
    return device


def unreadable(*places: int) -> Callable[[Io], int]:
    """A rule by which what lies there cannot be read."""

    def rule(io: Io) -> int:
        overlaps = any(io.offset <= at < io.offset + io.length for at in places)
        return int(lib.ATOLL_EIO) if io.opcode == lib.ATOLL_OP_IO_READ and overlaps else OK

    return rule


def found(stage: Stage, lba: int) -> bytes | int:
    """What is read there, or the status."""
    read = stage.read(0, lba * BLOCK, BLOCK)
    stage.run_until_idle()
    return read.data if read.status == OK else read.status


def offline(device: bytes) -> tuple[list[str], list[str]]:
    """Notes and findings of the offline reader."""
    report = Report()
    store = Store.read(MemoryImage(np.frombuffer(bytearray(device), np.uint8)), report)
    assert store is not None, report.fatal
    verify_data(store, report, audit(store, report))
    return report.notes, [finding.text for finding in report.findings]


def is_log(stage: Stage, io: Io) -> bool:
    """A write of a log block."""
    return io.opcode == lib.ATOLL_OP_IO_WRITE and stage.payload(io)[8:16] == layout.LOG_MAGIC.to_bytes(8, "little")


def super_places(device: bytes | mmap) -> list[int]:
    """Of the superblocks: of the even generation and of the odd one, then their copies."""
    return [layout.super_block(len(device) // BLOCK, number) * BLOCK for number in range(4)]


def supers(device: bytes) -> list[np.void]:
    return [np.frombuffer(device, layout.SUPER, 1, at)[0] for at in super_places(device)]


def newest_root(device: bytes) -> np.void:
    return max(supers(device), key=lambda fields: int(fields["generation"]))


def log_blocks(device: bytes) -> dict[int, list[int]]:
    """Sequence: where its copies begin on the device."""
    blocks: dict[int, list[int]] = {}
    magics = np.frombuffer(device, "<u8").reshape(-1, BLOCK // 8)[:, 1]
    for block in map(int, np.flatnonzero(magics == layout.LOG_MAGIC)):
        header = np.frombuffer(device, layout.LOG_HEADER, 1, block * BLOCK)[0]
        blocks.setdefault(int(header["sequence"]), []).append(block * BLOCK)
    return blocks
