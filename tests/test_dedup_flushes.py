"""Who flushes often does not wait for a long log of those who write as fast as they can."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from dedupkit import BLOCK, OK, Request, Stage

PART = 64  # blocks of a write
PARTS = 96


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage(destage_delay_ms=10_000_000, nic_pages=8192, device_blocks=16384, prints=1 << 15) as it:
        it.open()
        yield it


def flush_often(stage: Stage, volume: int) -> None:
    """So often that flushes of long ago are forgotten."""
    for _ in range(16):
        flush = stage.flush(volume)
        stage.run_until_idle()
        assert flush.status == OK


def contents() -> list[bytes]:
    chance = random.Random(1)
    return [chance.randbytes(PART * BLOCK) for _ in range(PARTS)]


def write_all(stage: Stage, volume: int, parts: list[bytes]) -> list[Request]:
    return [stage.write(volume, number * PART * BLOCK, part) for number, part in enumerate(parts)]


def write_beside(stage: Stage, volume: int, parts: list[bytes], flushing: bool) -> int:
    """Much more than a slow device has written meanwhile; the longest log."""
    writes = write_all(stage, volume, parts)
    flush, longest, turns = stage.flush(volume) if flushing else None, 0, 0
    while not all(write.done for write in writes):
        stage.turn()
        turns += 1
        stage.take_ios()
        if stage.ios and turns % 4 == 0:
            stage.complete(stage.ios[0])
        stage.answers()
        longest = max(longest, stage.figures().log_records)
        if flush is not None and flush.done:
            assert flush.status == OK
            flush = stage.flush(volume)
    assert all(write.status == OK for write in writes)
    stage.run_until_idle()
    stage.check()
    return longest


def test_the_log_is_short_while_somebody_flushes(stage: Stage) -> None:
    """How short depends on how long a flush takes: 512 blocks, and 13 for each millisecond."""
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush_often(stage, volume)
    assert write_beside(stage, volume, parts, flushing=True) < PARTS * PART // 2


def test_one_flush_now_and_then_makes_no_write_wait(stage: Stage) -> None:
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush = stage.flush(volume)
    stage.run_until_idle()
    assert flush.status == OK
    waits = stage.counters()["waits"]
    assert write_beside(stage, volume, parts, flushing=False) > PARTS * PART // 2
    assert stage.counters()["waits"] == waits


def test_nobody_waits_for_a_device_that_takes_nothing(stage: Stage) -> None:
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush_often(stage, volume)
    waits = stage.counters()["waits"]
    writes = write_all(stage, volume, parts)
    while not all(write.done for write in writes):
        stage.turn()
        stage.answers()
    assert all(write.status == OK for write in writes) and stage.figures().log_records == PARTS * PART
    assert stage.counters()["waits"] > waits, "it was not seen at once"
    stage.run_until_idle()
    stage.check()
