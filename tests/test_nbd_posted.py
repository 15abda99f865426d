"""Writes that nic has answered before nbd has seen them: they are passed on, whatever happens, and not overtaken."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest
from nbdclient import Command, Request, request_bytes
from nbdstage import BLOCK, Stage, VolumeData, Wire

from atoll.ipc import physmap
from atoll.ipc._ipc import ffi, lib

MIB = 1 << 20
MODES = {"simple": (False, False), "structured": (True, False), "extended": (True, True)}


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage([VolumeData(0, b"disk", bytearray(random.Random(1).randbytes(MIB)))]) as made:
        made.remember = made.together = made.posts = True
        made.start()
        yield made


@pytest.fixture(params=list(MODES))
def wire(stage: Stage, request: pytest.FixtureRequest) -> Wire:
    structured, extended = MODES[request.param]
    return stage.connect().negotiate(structured, extended)


@pytest.fixture
def plain(stage: Stage) -> Wire:
    return stage.connect().negotiate()


def answered(stage: Stage, wire: Wire, cookie: int) -> None:
    """It is on its way to dedup."""
    use = next(use for use in stage.uses.values() if use.request is not None and use.request.cookie == cookie)
    stage.settle(until=lambda: bool(use.executed))
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
    assert len(stage.waiting) == 1
    reads = [wire.submit(Command.READ, offset, 1000) for offset in (BLOCK, 2 * BLOCK, 3 * BLOCK + 5, 4 * BLOCK)]
    stage.settle(until=lambda: {reads[0], reads[3]} <= wire.results.keys() and len(stage.waiting) == 3)
    assert wire.results[reads[0]].check().data == stage.volumes[0].data[BLOCK : BLOCK + 1000], "from memory"
    stage.hold = False
    stage.settle()
    for cookie in reads[1:3]:
        assert wire.results[cookie].check().data == b"n" * 1000
    assert posted(stage) == 1
    stage.check_quiet()


def test_its_counts_outlive_it(stage: Stage, plain: Wire) -> None:
    for _ in range(2):
        plain.call(Command.READ, 0, 8 * BLOCK)
    stage.hold = True
    for number in range(4):
        answered(stage, plain, plain.submit(Command.WRITE, number * BLOCK, payload=b"%d" % number * BLOCK))
    stage.settle(until=lambda: len(stage.waiting) == 4)
    stage.kill()
    stage.start()
    reads = [plain.submit(Command.READ, number * BLOCK, BLOCK) for number in range(4)]
    stage.settle(until=lambda: len(stage.waiting) == 8)
    assert not set(reads) & plain.results.keys()
    stage.hold = False
    stage.settle()
    for number, cookie in enumerate(reads):
        assert plain.results[cookie].check().data == b"%d" % number * BLOCK
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
        stage.posts = chance.random() < 0.7
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


def test_one_that_has_crashed_nbd_twice_is_passed_on(stage: Stage, plain: Wire) -> None:
    """Its client has been told that it is done."""
    stage.kill()
    plain.submit(Command.WRITE, 0, payload=b"p" * BLOCK)
    (slot,) = stage.uses
    stage._map(lib.ATOLL_ROLE_NBD, writable=True)
    suspects = ffi.cast("struct atoll_suspect *", physmap.address(lib.ATOLL_ROLE_NBD) + 12288)
    suspects[3].identity, suspects[3].crashes = stage.identity(slot), 2
    stage._map(lib.ATOLL_ROLE_NBD, writable=False)
    stage.start(previous_signal=signal.SIGKILL)
    stage.settle()
    assert stage.volumes[0].data[:BLOCK] == b"p" * BLOCK
    assert stage.counters()["poisoned"] == 0 and posted(stage) == 1
    stage.check_quiet()


def test_behind_a_clients_last_word(stage: Stage, plain: Wire) -> None:
    """nic does not know what DISC means, and answers what follows it: it is applied, then the connection ends."""
    stage.hold = True
    answered(stage, plain, plain.submit(Command.WRITE, 0, payload=b"a" * BLOCK))
    plain.submit(Command.DISC)
    answered(stage, plain, plain.submit(Command.WRITE, BLOCK, payload=b"b" * BLOCK))
    assert not plain.is_closed
    stage.hold = False
    stage.settle()
    assert plain.is_closed and stage.volumes[0].data[: 2 * BLOCK] == b"a" * BLOCK + b"b" * BLOCK
    stage.check_quiet()


@pytest.mark.parametrize("bad", ["read", "ragged", "long", "length", "outside", "again", "unknown"])
def test_what_nic_may_not_post(stage: Stage, plain: Wire, bad: str) -> None:
    """Another domain's descriptor is checked like any other; dedup sees nothing of it."""
    length = {"ragged": 1000, "long": 17 * BLOCK}.get(bad, BLOCK)
    command = Command.READ if bad == "read" else Command.WRITE
    head = request_bytes(Request(command, 0, 1, 0, length))
    fields = {"address": stage.page_address(0), "length": length - (bad == "length")}
    if bad == "outside":
        fields["address"] = stage.page_address(0) + (1 << 38)
    stage.hold = bad == "again"
    if bad == "again":
        answered(stage, plain, plain.submit(Command.WRITE, 0, payload=b"a" * BLOCK))
        identity = stage.waiting[0].identity
    else:
        identity = (99 if bad == "unknown" else plain.number) << 48 | 7 << 32 | 1000
    stage.put(
        lib.ATOLL_ROLE_NIC, opcode=lib.ATOLL_OP_REQUEST, identity=identity, flags=lib.ATOLL_FLAG_POSTED,
        bytes=dict(enumerate(head)), **fields,
    )  # fmt: skip
    lib.atoll_domain_commit(stage.peers[lib.ATOLL_ROLE_NIC].domain)
    stage.settle(until=lambda: stage.counters()["peer_faults"] == 1)
    stage.hold = False
    stage.settle()
    assert len(stage.log) == (bad == "again")
    assert plain.call(Command.READ, 0, 1).error is None
