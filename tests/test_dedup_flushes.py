"""Who flushes often does not wait for a long log of those who write as fast as they can."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from dedupkit import BLOCK, FUA, OK, Request, Stage

PART = 64  # blocks of a write
PARTS = 96
US = 1000


class TimedStage(Stage):
    """What is allowed goes by time, so it is the test's: a turn takes a tenth of a millisecond, all else none."""

    now_ns = 1_000_000_000_000_000

    def turn(self) -> bool:
        self.now_ns += 100 * US
        self.lib.hook_set_clock(self.now_ns)
        return super().turn()

    def turns_until_done(
        self, requests: list[Request], completions: int = 0, every: int = 1, send: bool = True,
        beside: Callable[[], None] | None = None,
    ) -> int:  # fmt: skip
        """In one of `every` turns the device completes so many of its I/Os, or all small ones; `beside` is first."""
        for turns in range(100_000):
            if all(request.done for request in requests):
                assert all(request.status == OK for request in requests)
                return turns
            if beside is not None:
                beside()
            self.turn()
            self.take_ios()
            if completions != 0 and turns % every == 0:
                small = [io for io in self.ios if io.length < PART * BLOCK]
                for io in small or self.ios[:completions]:
                    self.complete(io)
            self.answers(send)
        raise AssertionError("not answered")


@pytest.fixture
def stage(hooked: ModuleType) -> Iterator[TimedStage]:
    with TimedStage(
        extension=hooked, destage_delay_ms=10_000_000, nic_pages=8192, device_blocks=16384, prints=1 << 15
    ) as it:  # fmt: skip
        it.lib.hook_set_clock(it.now_ns)
        it.open()
        yield it
    hooked.lib.hook_set_clock(0)


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


def flushing(stage: Stage, volume: int) -> Callable[[], None]:
    """A client that asks for the next flush when it has been told of the last one."""
    flush = stage.flush(volume)

    def again() -> None:
        nonlocal flush
        if flush.done:
            assert flush.status == OK
            flush = stage.flush(volume)

    return again


def write_beside(
    stage: TimedStage, volume: int, parts: list[bytes], every: int = 4, others: Callable[[], None] | None = None
) -> int:
    """Much more than a slow device, one I/O in so many turns, has written meanwhile; the longest log."""
    longest = 0

    def look() -> None:
        nonlocal longest
        longest = max(longest, stage.figures().log_records)
        if others is not None:
            others()

    stage.turns_until_done(write_all(stage, volume, parts), completions=1, every=every, beside=look)
    longest = max(longest, stage.figures().log_records)
    stage.run_until_idle()
    stage.check()
    return longest


def test_the_log_is_short_while_somebody_flushes(stage: TimedStage) -> None:
    """How short depends on how long a flush takes: 512 blocks, and 13 for each millisecond."""
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush_often(stage, volume)
    assert write_beside(stage, volume, parts, others=flushing(stage, volume)) < 1024


def test_it_is_as_short_where_blocks_are_stored_already(stage: TimedStage) -> None:
    volume, copy = (stage.create_volume(name, 8192 * BLOCK) for name in "vc")
    parts = contents()
    stage.turns_until_done(write_all(stage, volume, parts), completions=100)
    flush_often(stage, volume)
    assert write_beside(stage, copy, parts, every=24, others=flushing(stage, copy)) < 1024


def test_one_flush_now_and_then_makes_no_write_wait(stage: TimedStage) -> None:
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush = stage.flush(volume)
    stage.run_until_idle()
    assert flush.status == OK
    waits = stage.counters()["waits"]
    assert write_beside(stage, volume, parts) > PARTS * PART // 2
    assert stage.counters()["waits"] == waits


def test_a_short_gap_among_long_ones_makes_no_write_wait(stage: TimedStage) -> None:
    """As file systems flush."""
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    for _ in range(2):
        stage.turns_until_done([stage.flush(volume)], completions=1)
    waits = stage.counters()["waits"]
    stage.turns_until_done(write_all(stage, volume, parts[:64]))
    assert stage.counters()["waits"] == waits


def test_destage_begins_early_while_somebody_flushes(stage: TimedStage) -> None:
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush_often(stage, volume)
    stage.turns_until_done(write_all(stage, volume, parts[:6]))
    stage.run_until_idle()
    assert stage.figures().log_records < 6 * PART


def test_many_posted_writes_leave_room_for_others(stage: TimedStage) -> None:
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush_often(stage, volume)
    posts = [stage.post(volume, number * 16 * BLOCK, parts[number][: 16 * BLOCK]) for number in range(40)]
    stage.turns_until_done(posts)
    assert stage.figures().log_records == 40 * 16
    waits = stage.counters()["waits"]
    stage.turns_until_done([stage.write(volume, 8000 * BLOCK, parts[40])])
    assert stage.counters()["waits"] == waits


def test_a_write_that_waits_is_not_overtaken(stage: TimedStage) -> None:
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush_often(stage, volume)
    first = write_all(stage, volume, parts[:16])
    later: list[Request] = []
    for number in range(1000):
        stage.turn()
        stage.disk()
        stage.answers()
        if all(write.done for write in first):
            break
        assert not any(write.done for write in later)
        later.append(stage.write(volume, (7000 + number) * BLOCK, parts[-1][:BLOCK]))
    assert len(later) > 2
    stage.run_until_idle()
    stage.check()


def test_nobody_waits_for_a_device_that_takes_nothing(stage: TimedStage) -> None:
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush_often(stage, volume)
    waits = stage.counters()["waits"]
    turns = stage.turns_until_done(write_all(stage, volume, parts))
    assert stage.figures().log_records == PARTS * PART
    assert stage.counters()["waits"] > waits, "it was not seen at once"
    assert turns <= 1200, "they waited for more than 120 ms"
    stage.run_until_idle()
    stage.check()


def test_after_that_no_write_waits_until_all_of_it_has_been_written(stage: TimedStage) -> None:
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush_often(stage, volume)
    stage.turns_until_done(write_all(stage, volume, parts[:-1]))
    others = flushing(stage, volume)
    while not stage.ios:
        stage.turn()
        stage.take_ios()
    stage.complete(stage.ios[0])
    stage.turn()
    write = stage.write(volume, 8000 * BLOCK, parts[-1])
    stage.turns_until_done([write], completions=1, every=10, beside=others)  # 1 GiB/s
    assert stage.figures().log_records > PARTS * PART // 2
    stage.run_until_idle()
    stage.check()


def test_pages_that_readers_still_send_from_are_in_no_flushs_way(stage: TimedStage) -> None:
    """Neither do writes wait for them, nor does destage begin with less than else."""
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    stage.turns_until_done(write_all(stage, volume, parts[:16]))
    reads = [stage.read(volume, number * PART * BLOCK, PART * BLOCK) for number in range(16)]
    stage.turns_until_done(reads, send=False)
    for number in range(16):
        write = stage.write(volume, (4000 + number) * BLOCK, parts[40][:BLOCK])
        stage.turns_until_done([write], completions=1, send=False)
        stage.turns_until_done([stage.flush(volume)], completions=1, send=False)
    assert stage.figures().log_records == 16 * PART
    waits = stage.counters()["waits"]
    for number in range(10):
        stage.turns_until_done([stage.write(volume, (5000 + number) * BLOCK, parts[41][:BLOCK])], send=False)
    assert stage.counters()["waits"] == waits and not stage.ios
    stage.run_until_idle()
    stage.check()


def test_a_write_with_fua_does_not_wait_for_those_of_others(stage: TimedStage) -> None:
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush_often(stage, volume)
    writes = write_all(stage, volume, parts[:-1])
    write = stage.write(volume, 8000 * BLOCK, parts[-1][:BLOCK], FUA)
    stage.turns_until_done([write], completions=1)
    assert sum(other.done for other in writes) < len(writes) // 2
    stage.run_until_idle()
    stage.check()


def test_what_is_overwritten_in_the_log_does_not_make_it_shorter(stage: TimedStage) -> None:
    """The device takes nothing, and the same block is written again and again."""
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush_often(stage, volume)
    writes, overwrites = write_all(stage, volume, parts), itertools.count()

    def overwrite() -> None:
        number = next(overwrites)
        if number % 100 == 0:
            stage.post(volume, 8000 * BLOCK, parts[90][number // 100 % PART * BLOCK :][:BLOCK])

    turns = stage.turns_until_done(writes, beside=overwrite)
    assert turns <= 1200, "they waited for more than 120 ms"
    stage.run_until_idle()
    stage.check()


def test_a_slow_device_does_not_make_the_log_longer(stage: TimedStage) -> None:
    """100 MiB/s. How long flushes take then says nothing of how often they are asked for."""
    volume, parts = stage.create_volume("v", 8192 * BLOCK), contents()
    flush_often(stage, volume)
    assert write_beside(stage, volume, parts, every=100, others=flushing(stage, volume)) < 1024
