"""When destage begins: with large writes at once, unless something comes of waiting in the log; with small ones when
the log is longer than what stays in the processor's cache. And damage in the log is found in time."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from dedupkit import BLOCK, OK, Stage

from atoll.ipc._ipc import lib

NIC_PAGES = 2048
PART = 64  # blocks of a write
WARM = 1024  # logged on the processor of the path, at most
FEW, MANY = NIC_PAGES // 64, 256  # logged where destage is eager, at most; less than the quarter where it is not


@pytest.fixture
def stage() -> Iterator[Stage]:
    """None of its blocks is ever old enough to be destaged for its age."""
    shape = {"nic_pages": NIC_PAGES, "cache_pages": 2048, "device_blocks": 16384, "prints": 1 << 15}
    with Stage(destage_delay_ms=10_000_000, **shape) as it:
        it.open()
        yield it


def go_elsewhere(stage: Stage) -> None:
    """As dedup does for large writes; this process may run on several processors and is bound to none."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("needs two processors")
    stage.lib.dedup_set_places(stage.state, allowed[0], stage.ffi.NULL, 0)


def write(stage: Stage, volume: int, contents: list[bytes], first: int = 0) -> None:
    for at in range(0, len(contents), PART):
        request = stage.write(volume, (first + at) * BLOCK, b"".join(contents[at : at + PART]))
        stage.run_until_idle()
        assert request.status == OK


def blocks(count: int, seed: int) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(BLOCK) for _ in range(count)]


def empty(stage: Stage, volume: int) -> None:
    flush = stage.flush(volume)
    stage.run_until_idle()
    assert flush.status == OK and stage.figures().log_records == 0


def test_unique_blocks_do_not_wait(stage: Stage) -> None:
    go_elsewhere(stage)
    volume = stage.create_volume("v", 4096 * BLOCK)
    write(stage, volume, blocks(MANY, 1))
    assert stage.figures().log_records <= FEW
    assert stage.counters()["destaged_blocks"] >= MANY - FEW
    stage.check()


def test_they_wait_on_the_processor_of_the_path(stage: Stage) -> None:
    volume = stage.create_volume("v", 4096 * BLOCK)
    write(stage, volume, blocks(MANY, 2))
    assert stage.figures().log_records == MANY


def test_on_the_processor_of_the_path_no_more_waits_than_stays_in_the_cache() -> None:
    with Stage(destage_delay_ms=10_000_000, nic_pages=8 * WARM, device_blocks=16384, prints=1 << 15) as stage:
        stage.open()
        volume = stage.create_volume("v", 4096 * BLOCK)
        write(stage, volume, blocks(WARM, 5))
        assert stage.figures().log_records == WARM
        write(stage, volume, blocks(WARM // 2, 6), first=WARM)
        assert stage.figures().log_records <= WARM
        assert stage.counters()["destaged_blocks"] >= WARM // 2
        stage.check()


@pytest.mark.parametrize("order", ["at random", "in turn"])
def test_on_the_processor_of_the_path_blocks_wait_that_are_overwritten_again_and_again(order: str) -> None:
    """Of 1,800 blocks many would be written to the device in vain; in turn, all. Until others come."""
    with Stage(destage_delay_ms=10_000_000, nic_pages=8 * WARM, device_blocks=16384, prints=1 << 16) as stage:
        stage.open()
        volume = stage.create_volume("v", 8192 * BLOCK)
        chance = random.Random(8)

        def overwrite(count: int) -> None:
            for number in range(count):
                block = number % 1800 if order == "in turn" else chance.randrange(1800)
                request = stage.write(volume, block * BLOCK, chance.randbytes(BLOCK))
                if number % PART == PART - 1:
                    stage.run_until_idle()
                    assert request.status == OK

        overwrite(2 * 4096)
        before = stage.counters()["destaged_blocks"]
        overwrite(4096)
        assert stage.figures().log_records > WARM
        assert stage.counters()["destaged_blocks"] == before
        for number in range(4):
            write(stage, volume, blocks(4 * WARM, 300 + number), first=2048)
        assert stage.figures().log_records <= WARM
        stage.check()


def test_what_is_overwritten_elsewhere_says_nothing_of_the_path() -> None:
    """After large writes that overwrite one another small ones find a short log, as ever."""
    allowed = os.sched_getaffinity(0)
    try:
        with Stage(destage_delay_ms=10_000_000, nic_pages=8 * WARM, device_blocks=16384, prints=1 << 16) as stage:
            stage.open()
            volume = stage.create_volume("v", 8192 * BLOCK)
            go_elsewhere(stage)
            for number in range(3 * 4096 // (4 * PART)):
                for again in range(4):  # all four are logged in one step
                    stage.write(volume, number * PART * BLOCK, b"".join(blocks(PART, 4 * number + again)))
                stage.run_until_idle()
            assert stage.counters()["superseded_blocks"] > 4096
            for number in range(2 * WARM):
                request = stage.write(volume, (4096 + number) * BLOCK, blocks(1, 10_000 + number)[0])
                if number % PART == PART - 1:
                    stage.run_until_idle()
                    assert request.status == OK
                    stage.lib.dedup_run(stage.state, stage.lib.DEDUP_GOAL_SERVE, 1)  # looks where it is to be
            assert len(os.sched_getaffinity(0)) == 1, "it has not come back to the path's processor"
            assert stage.figures().log_records <= WARM
            stage.check()
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("kind", ["equal", "overwritten"])
def test_they_wait_where_others_were_repeats(stage: Stage, kind: str) -> None:
    go_elsewhere(stage)
    volume = stage.create_volume("v", 16384 * BLOCK)
    for number in range(4):  # 1,024 blocks, of which 768 repeat others
        once = blocks(PART, 100 + number)
        for again in range(4):
            contents = blocks(PART, 200 + 4 * number + again) if kind == "overwritten" else once
            place = number if kind == "overwritten" else 4 * number + again
            stage.write(volume, place * PART * BLOCK, b"".join(contents))  # all four are logged in one step
        empty(stage, volume)
    write(stage, volume, blocks(MANY, 3), first=4096)
    assert stage.figures().log_records == MANY
    for number in range(40):  # and no more when that is long ago: 10,240 others
        write(stage, volume, blocks(MANY, 1000 + number), first=4096)
        empty(stage, volume)
    write(stage, volume, blocks(MANY, 4), first=4096)
    assert stage.figures().log_records <= FEW
    stage.check()


@pytest.mark.parametrize("kind", ["unique", "stored", "logged"])
def test_damage_in_the_log_is_named(stage: Stage, kind: str) -> None:
    """Whether the damaged block would be written, or shared with an equal one that is stored, or logged beside it."""
    go_elsewhere(stage)
    volume = stage.create_volume("v", 4096 * BLOCK)
    equal, others = blocks(1, 5)[0], blocks(3, 6)
    if kind == "stored":
        write(stage, volume, [equal], first=1024)
        empty(stage, volume)
    before = set(stage.lent_pages)
    write(stage, volume, [equal])
    page = next(iter(stage.lent_pages - before))
    write(stage, volume, [*others, equal] if kind == "logged" else others, first=8)
    memory = stage.ffi.buffer(stage.ffi.cast("char *", stage.nic_buffer + page * BLOCK), BLOCK)
    memory[7:8] = bytes([memory[7][0] ^ 1])
    for _ in range(2):  # one that is to follow an equal one is found when it is tried by itself
        flush = stage.flush(volume)
        stage.run_until_idle()
        assert flush.status == lib.ATOLL_EUNFLUSHED
    assert stage.counters()["corrupt_pages"] == 1
    damaged = stage.read(volume, 0, BLOCK)
    fine = stage.read(volume, 8 * BLOCK, len(others) * BLOCK)
    stage.run_until_idle()
    assert damaged.status == lib.ATOLL_ECORRUPT and fine.data == b"".join(others)
    stage.check()
    write(stage, volume, blocks(1, 7))
    empty(stage, volume)
    stage.check()
