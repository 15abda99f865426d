"""What a longer write log would spare: the miniature beside both logs in full length, for typical streams of writes."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from random import Random

import pytest

_dedup = importlib.import_module("atoll.services.dedup._dedup")
ffi, lib = _dedup.ffi, _dedup.lib
SHORTER, LONGER, STAY_MS = 1024, 12288, 100
SECONDS = 1e-5  # between two blocks: a longer log's worth of them passes in 123 ms
EXACT = 0.06


class Log:
    """Blocks wait in the order in which they came; one that is overwritten keeps its place."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.arrived: OrderedDict[int, float] = OrderedDict()

    def spares(self, block: int, now_s: float) -> bool:
        while self.arrived and next(iter(self.arrived.values())) + STAY_MS / 1000 <= now_s:
            self.arrived.popitem(last=False)
        if block in self.arrived:
            return True
        if len(self.arrived) == self.length:
            self.arrived.popitem(last=False)
        self.arrived[block] = now_s
        return False


def loop(length: int) -> Iterator[int]:
    while True:
        yield from range(length)


def at_random(length: int) -> Iterator[int]:
    chance = Random(length)
    while True:
        yield chance.randrange(length)


def once() -> Iterator[int]:
    yield from range(1 << 40)


def hot_among_others() -> Iterator[int]:
    """Half of the writes go to 200 blocks, the others to each block once: the shorter log spares as many."""
    chance = Random(3)
    for block in range(1 << 40):
        yield chance.randrange(200)
        yield 1000 + block


def spared(writes: Iterable[int], volume: int = 0, seconds: float = SECONDS) -> tuple[float, float]:
    """As counted in the miniature, and in truth: of the last count's time."""
    reuse = lib.reuse_open(SHORTER, LONGER, STAY_MS)
    logs = Log(SHORTER), Log(LONGER)
    more, stream = 0, iter(writes)
    first = 3 * LONGER  # until it is as it stays
    for number in range(5 * LONGER):
        block, now_s = next(stream), number * seconds
        lib.reuse_note(reuse, volume, block, int(now_s * 1000))
        shorter, longer = (log.spares(block, now_s) for log in logs)
        if number >= first:
            more += longer - shorter
    counted = lib.reuse_spared(reuse) / lib.REUSE_ALL
    lib.reuse_close(reuse)
    return counted, more / (2 * LONGER)


@pytest.mark.parametrize(
    "writes",
    [
        once(), loop(800), loop(2048), loop(4096), loop(9000), loop(20000),
        at_random(800), at_random(1500), at_random(4096), at_random(12288), at_random(100000), hot_among_others(),
    ],
    ids=[
        "once", "short-loop", "loop-2048", "loop-4096", "loop-9000", "long-loop",
        "random-800", "random-1500", "random-4096", "random-12288", "random-100000", "hot-among-others",
    ],
)  # fmt: skip
def test_the_miniature_tells_what_the_logs_would_spare(writes: Iterator[int]) -> None:
    counted, truth = spared(writes)
    assert abs(counted - truth) <= EXACT, (counted, truth)


def test_what_is_spared_ends_where_blocks_get_too_old() -> None:
    fast, _ = spared(loop(4096))
    slow, truth = spared(loop(4096), seconds=5e-5)  # a turn takes 205 ms
    assert fast > 0.5 and slow == truth == 0


def test_volumes_are_told_apart() -> None:
    reuse = lib.reuse_open(SHORTER, LONGER, STAY_MS)
    for number in range(4 * LONGER):
        lib.reuse_note(reuse, number // 4096 % 12, number % 4096, 0)
    assert lib.reuse_spared(reuse) == 0
    lib.reuse_close(reuse)


def test_nothing_is_spared_by_a_log_that_is_no_longer_than_the_other() -> None:
    for longer in (0, SHORTER // 2, SHORTER):
        reuse = lib.reuse_open(SHORTER, longer, STAY_MS)
        for number in range(8 * SHORTER):
            lib.reuse_note(reuse, 0, number % 700, 0)
        assert lib.reuse_spared(reuse) == 0
        lib.reuse_close(reuse)
