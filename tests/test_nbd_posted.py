"""Writes that nbd answers before dedup has applied them: which, how many, and what is not looked up meanwhile."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest
from nbdclient import Command, CommandFlag
from nbdstage import BLOCK, PART, Stage, VolumeData, Wire

from atoll.ipc import physmap
from atoll.ipc._ipc import lib

MIB = 1 << 20
MOST = lib.ATOLL_POSTED_BLOCKS
MODES = {"simple": (False, False), "structured": (True, False), "extended": (True, True)}


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage([VolumeData(0, b"disk", bytearray(random.Random(1).randbytes(MIB)))]) as made:
        made.remember = made.together = True
        made.start()
        made.post(MOST)
        yield made


@pytest.fixture(params=list(MODES))
def wire(stage: Stage, request: pytest.FixtureRequest) -> Wire:
    structured, extended = MODES[request.param]
    return stage.connect().negotiate(structured, extended)


@pytest.fixture
def plain(stage: Stage) -> Wire:
    return stage.connect().negotiate()


def answered(stage: Stage, wire: Wire, cookie: int) -> None:
    stage.settle(until=lambda: cookie in wire.results)
    wire.results.pop(cookie).check()


def posted(stage: Stage) -> int:
    return stage.counters()["posted_writes"]


def test_dedup_is_told_whether_requests_come_one_by_one(stage: Stage, plain: Wire) -> None:
    stage.hold = True
    answered(stage, plain, plain.submit(Command.WRITE, 0, payload=b"a" * BLOCK))
    assert [work.alone for work in stage.waiting] == [True]
    os.kill(stage.pid, signal.SIGSTOP)
    os.waitpid(stage.pid, os.WUNTRACED)  # it runs no more
    cookies = [plain.submit(Command.WRITE, number * BLOCK, payload=b"b" * BLOCK) for number in range(1, 9)]
    os.kill(stage.pid, signal.SIGCONT)
    for cookie in cookies:
        answered(stage, plain, cookie)
    assert [work.alone for work in stage.waiting] == [True] + [False] * 8
    stage.hold = False
    stage.settle()


def test_answered_before_it_is_applied_and_read_behind_it(stage: Stage, wire: Wire) -> None:
    for _ in range(2):
        wire.call(Command.READ, 0, 8 * BLOCK)
    stage.hold = True
    answered(stage, wire, wire.submit(Command.WRITE, 2 * BLOCK, payload=b"n" * 2 * BLOCK))
    assert stage.area().public.posting == 1 and len(stage.waiting) == 1
    reads = [wire.submit(Command.READ, offset, 1000) for offset in (BLOCK, 2 * BLOCK, 3 * BLOCK + 5, 4 * BLOCK)]
    stage.settle(until=lambda: {reads[0], reads[3]} <= wire.results.keys() and len(stage.waiting) == 3)
    assert wire.results[reads[0]].check().data == stage.volumes[0].data[BLOCK : BLOCK + 1000], "from memory"
    stage.hold = False
    stage.settle()
    for cookie in reads[1:3]:
        assert wire.results[cookie].check().data == b"n" * 1000
    assert posted(stage) == 1 and stage.area().public.posting == 0
    stage.check_quiet()


def test_bounded(stage: Stage, plain: Wire) -> None:
    stage.post(8)
    stage.hold = True
    for number in range(4):
        answered(stage, plain, plain.submit(Command.WRITE, number * 2 * BLOCK, payload=b"p" * 2 * BLOCK))
    waits = plain.submit(Command.WRITE, MIB // 2, payload=b"w" * BLOCK)
    stage.settle(until=lambda: len(stage.waiting) == 5)
    assert waits not in plain.results and posted(stage) == 4
    stage.hold = False
    stage.settle()
    plain.results.pop(waits).check()
    stage.hold = True
    answered(stage, plain, plain.submit(Command.WRITE, 0, payload=b"q" * BLOCK))
    stage.post(0)
    waits = plain.submit(Command.WRITE, BLOCK, payload=b"r" * BLOCK)
    stage.settle(until=lambda: len(stage.waiting) == 2)
    assert waits not in plain.results and stage.area().public.posting == 1
    stage.hold = False
    stage.settle()
    assert stage.area().public.posting == 0
    stage.check_quiet()


def test_what_is_awaited(stage: Stage, plain: Wire) -> None:
    """FUA, less than whole blocks, many blocks, more than a part, and a dedup that has not served yet."""
    for offset, length, flags in (
        (0, BLOCK, CommandFlag.FUA),
        (512, BLOCK, 0),
        (0, BLOCK - 512, 0),
        (0, (lib.ATOLL_POSTED_WRITE_BLOCKS + 1) * BLOCK, 0),
        (0, PART + BLOCK, 0),
    ):
        plain.call(Command.WRITE, offset, flags=flags, payload=b"a" * length).check()
    assert posted(stage) == 0
    with Stage() as fresh:
        fresh.post(MOST)
        physmap.header(lib.ATOLL_ROLE_DEDUP).serving_ns = 0
        fresh.start()
        wire = fresh.connect().negotiate()
        wire.call(Command.WRITE, 0, payload=b"a" * BLOCK).check()
        assert posted(fresh) == 0


def test_its_counts_outlive_it(stage: Stage, plain: Wire) -> None:
    stage.post(4)
    for _ in range(2):
        plain.call(Command.READ, 0, 8 * BLOCK)
    stage.hold = True
    for number in range(4):
        answered(stage, plain, plain.submit(Command.WRITE, number * BLOCK, payload=b"%d" % number * BLOCK))
    stage.settle(until=lambda: len(stage.waiting) == 4)
    stage.kill()
    stage.start()
    reads = [plain.submit(Command.READ, number * BLOCK, BLOCK) for number in range(4)]
    waits = plain.submit(Command.WRITE, 4 * BLOCK, payload=b"w" * BLOCK)
    stage.settle(until=lambda: len(stage.waiting) == 9)
    assert not {waits, *reads} & plain.results.keys() and stage.area().public.posting == 1
    stage.hold = False
    stage.settle()
    for number, cookie in enumerate(reads):
        assert plain.results[cookie].check().data == b"%d" % number * BLOCK
    assert stage.area().public.posting == 0
    stage.check_quiet()


def test_the_end_of_a_connection_awaits_them(stage: Stage, plain: Wire) -> None:
    stage.hold = True
    answered(stage, plain, plain.submit(Command.WRITE, 0, payload=b"p" * BLOCK))
    plain.submit(Command.DISC)
    stage.settle(until=lambda: bool(stage.waiting))
    for _ in range(50):
        stage.turn()
    assert not plain.is_closed
    stage.hold = False
    stage.settle()
    assert plain.is_closed
    stage.check_quiet()


def test_one_that_dedup_refuses_is_counted(stage: Stage, plain: Wire) -> None:
    stage.rule = lambda work: lib.ATOLL_ENOSPC
    plain.call(Command.WRITE, 0, payload=b"p" * BLOCK).check()
    assert stage.counters()["posted_lost"] == stage.counters()["errors_enospc"] == 1
    stage.check_quiet()


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_and_kills(stage: Stage, wire: Wire, seed: int) -> None:
    """Against a plain array, request after request from the client's view; nbd dies now and then, dedup is late."""
    chance = random.Random(seed)
    print("seed", seed)
    oracle = bytearray(stage.volumes[0].data)
    for number in range(150):
        stage.hold, stage.together = chance.random() < 0.5, chance.random() < 0.8
        stage.post(chance.choice((0, 4, MOST)))
        first, blocks = chance.randrange(40), chance.randint(1, 3)
        begin, end = first * BLOCK, (first + blocks) * BLOCK
        if chance.random() < 0.6:
            data = bytes([number % 251 + 1]) * (end - begin)
            cookie = wire.submit(Command.WRITE, begin, payload=data)
            oracle[begin:end] = data
        else:
            cookie = wire.submit(Command.READ, begin, end - begin)
        if chance.random() < 0.05:
            stage.kill()
            stage.start()
        for _ in range(20):
            stage.turn()
        stage.hold = False
        stage.settle(until=lambda cookie=cookie: cookie in wire.results)
        result = wire.results.pop(cookie).check()
        if result.request.command == Command.READ:
            assert result.data == oracle[begin:end]
    stage.settle()
    assert stage.volumes[0].data == oracle
    stage.check_quiet()
