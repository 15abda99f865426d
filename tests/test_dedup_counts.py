"""A page of counts that cannot be read: nobody knows which of its blocks are free; nobody gets them until it can."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from dedupkit import BLOCK, OK, Stage
from test_dedup_posted import public_of

from atoll.ipc._ipc import lib

SETTINGS: dict[str, Any] = {"device_blocks": 2304, "nic_pages": 2048}


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def stored(count: int) -> tuple[bytes, int]:
    """A device whose store was closed with so many blocks in it, and what is free."""
    with Stage(**SETTINGS) as stage:
        stage.open()
        volume = stage.create_volume("v", 8192 * BLOCK)
        for number in range(count):
            stage.write(volume, number * BLOCK, block(number))
            if number % 256 == 255:
                stage.run_until_idle()
        stage.drain()
        free = int(stage.figures().available_blocks)
        return stage.close_store(), free


def fail_counts(stage: Stage, io: Any) -> int:
    """Reads of pages of counts fail (words that are 0 or 1) that say that more than half of the blocks are free."""
    if io.opcode != lib.ATOLL_OP_IO_READ or io.length != BLOCK:
        return OK
    words = np.frombuffer(stage.device[io.offset : io.offset + BLOCK], np.uint32)
    return int(lib.ATOLL_EIO) if words.max() == 1 and 16 <= words.sum() < 512 else OK


def reopen(stage: Stage, device: bytes) -> int:
    stage.device[:] = device
    stage.open()
    stage.io_rule = partial(fail_counts, stage)
    return next(number for number in range(256) if stage.lib.dedup_volume(stage.state, number).state == 1)


def lbas(first: int, count: int) -> list[int]:
    return [first + number for number in range(count)]


def fill(stage: Stage, volume: int, blocks: list[int], seed: int) -> None:
    for number, lba in enumerate(blocks):
        stage.write(volume, lba * BLOCK, block(seed + lba))
        if number % 256 == 255:
            stage.run_until_idle()
    stage.run_until_idle()


@pytest.mark.parametrize("dies", [False, True])
def test_it_can_be_read_again(dies: bool) -> None:
    """Then its free blocks are there again, each once."""
    device, free = stored(200)
    with Stage(**SETTINGS) as stage:
        volume = reopen(stage, device)
        fill(stage, volume, [4096], 0)
        stage.drain()
        given_up = stage.figures().quarantined_blocks
        assert given_up > 256 and stage.figures().available_blocks + given_up == free - 1
        if dies:
            stage.attach()
        stage.io_rule = None
        deadline = time.monotonic() + 20
        while stage.figures().quarantined_blocks:
            stage.turn()
            stage.disk()
            assert time.monotonic() < deadline
        assert stage.figures().available_blocks == free - 1
        fill(stage, volume, lbas(0, 200), 10000)  # frees some there
        fill(stage, volume, lbas(4097, free - 1), 0)
        full = stage.write(volume, 8000 * BLOCK, block(8000))
        flush = stage.flush(volume)
        stage.drain()
        assert (full.status, flush.status) == (lib.ATOLL_ENOSPC, OK)
        stage.check()
        device = stage.close_store()
    with Stage(**SETTINGS) as stage:  # the sums are right, or it is refused
        stage.device[:] = device
        stage.open()
        stage.check()


@pytest.mark.parametrize("posted", [False, True])
def test_more_is_promised_than_is_left(posted: bool) -> None:
    """Writes have been acknowledged when it turns out that their places cannot be had. They can be read, flushes fail,
    no more are taken; and when blocks become free they are placed."""
    device, free = stored(900)
    with Stage(**SETTINGS, destage_delay_ms=10_000_000) as stage:
        stage.config.posted_blocks = int(lib.ATOLL_POSTED_BLOCKS)
        volume = reopen(stage, device)
        wanted = lbas(4096, min(free, 256))
        if posted:
            for lba in wanted[::16]:
                stage.post(volume, lba * BLOCK, b"".join(block(each) for each in lbas(lba, 16)))
        else:
            fill(stage, volume, wanted, 0)
        stage.run_until_idle()
        for _ in range(2):
            flush = stage.flush(volume)
            stage.run_until_idle()
            assert flush.status == lib.ATOLL_EUNFLUSHED
        assert stage.figures().quarantined_blocks > 256 and public_of(stage).posted_blocks == 0
        more, read = stage.write(volume, 8000 * BLOCK, block(8000)), stage.read(volume, wanted[0] * BLOCK, 16 * BLOCK)
        stage.run_until_idle()
        assert more.status == lib.ATOLL_ENOSPC
        assert read.data == b"".join(block(lba) for lba in wanted[:16])
        stage.trim(volume, 0, len(wanted) * BLOCK)
        stage.run_until_idle()
        flush = stage.flush(volume)
        stage.drain()
        assert flush.status == OK
        for lba in wanted[::16]:
            read = stage.read(volume, lba * BLOCK, 16 * BLOCK)
            stage.run_until_idle()
            assert read.data == b"".join(block(each) for each in lbas(lba, 16))
