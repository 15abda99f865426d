"""Blocks whose write is complete and that are not entered yet, because a page of counts is still to come."""

from __future__ import annotations

import random
import time

import numpy as np
from dedupkit import BLOCK, OK, Io, Stage

from atoll.ipc._ipc import lib

DEVICE_BLOCKS = 4096
STORED = 2200
SAME = random.Random(1).randbytes(BLOCK)


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def test_a_follower_is_not_shared_with_what_took_its_leaders_place() -> None:
    """Two equal blocks are written as one. Before the second is entered, the first is trimmed, and its place becomes
    another block's."""
    with Stage(device_blocks=DEVICE_BLOCKS, nic_pages=4096) as stage:
        stage.open()
        volume = stage.create_volume("v", 16384 * BLOCK)
        for number in range(STORED):
            stage.write(volume, (1000 + number) * BLOCK, block(100 + number))
            if number % 256 == 255:
                stage.run_until_idle()
        stage.drain()
        device = stage.close_store()
    with Stage(device_blocks=DEVICE_BLOCKS, nic_pages=4096) as stage:
        stage.device[:] = device
        stage.open()
        held: list[Io] = []

        def counts(io: Io) -> bool:
            """A read of a page of counts of blocks that are stored, most of them."""
            if io.opcode != lib.ATOLL_OP_IO_READ or io.length != BLOCK:
                return False
            words = np.frombuffer(stage.device[io.offset : io.offset + BLOCK], np.uint32)
            return bool(words.max() == 1 and words.sum() > 800)

        def step() -> None:
            stage.turn()
            stage.take_ios()
            for io in list(stage.ios):
                if counts(io):
                    stage.ios.remove(io)
                    held.append(io)
                else:
                    stage.complete(io)
            stage.answers()

        def written() -> list[int]:
            """Where on the device SAME is."""
            return [at for at in range(0, DEVICE_BLOCKS * BLOCK, BLOCK) if stage.device[at : at + BLOCK] == SAME]

        overwritten = STORED  # its count lies in the page that is held
        for lba in (0, overwritten):  # pages of the map are there, so that both are written in one batch
            stage.read(volume, lba * BLOCK, BLOCK)
        while stage.requests:
            step()
        stage.write(volume, 0, SAME)
        stage.write(volume, overwritten * BLOCK, SAME)
        for _ in range(10_000):
            step()
            if held and written():
                break
        assert held and len(written()) == 1, "the batch is written, and its end waits for counts"
        place = written()[0]
        for _ in range(50):
            step()
        trim = stage.trim(volume, 0, BLOCK)
        for fresh in range(10_000):
            if stage.device[place : place + BLOCK] != SAME:
                break
            stage.write(volume, (6000 + fresh % 1000) * BLOCK, block(100_000 + fresh))
            if fresh % 50 == 0:
                stage.lib.dedup_run(stage.state, stage.lib.DEDUP_GOAL_SYNC, 1)
            for _ in range(1 if stage.figures().available_blocks > 200 else 5):
                step()
        else:
            raise AssertionError("the place is not used again")
        for _ in range(50):
            step()
        assert trim.status == OK
        for io in held:
            stage.ios.append(io)
        held.clear()
        stage.io_rule = None
        stage.drain()
        read = stage.read(volume, overwritten * BLOCK, BLOCK)
        stage.run_until_idle()
        assert read.status == OK and read.data == SAME
        stage.check()


def test_a_block_that_has_its_place_has_not_failed() -> None:
    """A batch cannot be written, then it can: it is entered piece by piece, and no more missing then."""
    with Stage(device_blocks=DEVICE_BLOCKS) as stage:
        stage.open()
        volume = stage.create_volume("v", 256 * BLOCK)
        stage.run_until_idle()
        stage.write(volume, 0, b"".join(block(number) for number in range(64)))
        fails = iter([int(lib.ATOLL_EIO)])
        stage.io_rule = lambda io: next(fails, OK) if io.length == 64 * BLOCK else OK
        seen = set()
        deadline = time.monotonic() + 10
        while stage.lent_pages:
            stage.turn()
            seen.add(int(stage.figures().failed_records))
            stage.check()
            stage.disk()
            stage.answers()
            assert time.monotonic() < deadline
        assert {0, 64} < seen, "in pieces"
