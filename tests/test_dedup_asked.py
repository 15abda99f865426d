"""Reads that nic asks dedup for by itself: answered to nic, whatever comes of them."""

from __future__ import annotations

import random
import signal
from types import ModuleType

import pytest
from dedupkit import BLOCK, DEDUP, NIC, OK, Stage

from atoll.ipc._ipc import ffi, lib

SIZE = 64 * BLOCK


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def stored(stage: Stage) -> int:
    """A volume with ten blocks on the device, which are not in memory, two in the log, and holes."""
    stage.open()
    volume = stage.create_volume("v", SIZE)
    stage.run_until_idle()
    stage.write(volume, 0, b"".join(block(number) for number in range(10)))
    stage.flush(volume)
    stage.drain()
    stage.close_store()
    stage.open()
    return volume


def test_whatever_it_is_it_is_what_nbd_gets() -> None:
    """On the device, in memory, in the log, holes, and any mixture of them. Nic alone is answered."""
    chance = random.Random(1)
    with Stage(destage_delay_ms=10_000_000) as stage:
        volume = stored(stage)
        stage.write(volume, 12 * BLOCK, block(12) + block(13))
        stage.run_until_idle()
        content = b"".join(block(number) for number in range(10)) + bytes(2 * BLOCK) + block(12) + block(13)
        content += bytes(SIZE - len(content))
        for _ in range(100):
            offset = chance.randrange(16 * BLOCK)
            request = stage.ask(volume, offset, chance.randrange(1, 16 * BLOCK))
            assert lib.atoll_domain_pending(stage.domains[NIC], DEDUP) == 0
            stage.run_until_idle(send=chance.random() < 0.5)
            assert (request.status, request.part) == (OK, lib.ATOLL_PART_NIC)
            assert request.data == content[offset : offset + request.length]
        assert stage.counters()["errors"] == 0
        stage.send_all()
        stage.check()


def test_nbd_may_ask_for_what_nic_was_given() -> None:
    """As where the answer came between the parts of another reply: a request of its own, whose pages stay."""
    with Stage() as stage:
        volume = stored(stage)
        asked = stage.ask(volume, 3 * BLOCK, 2 * BLOCK)
        stage.run_until_idle(send=False)
        assert asked.data == block(3) + block(4)
        (request,) = stage.unsent
        stage.unsent.clear()
        reads = stage.counters()["reads"]
        stage.ask_again(request)
        stage.run_until_idle(send=False)
        assert (request.part, request.status, request.data) == (0, OK, block(3) + block(4))
        assert stage.counters()["reads"] == reads + 1
        for number in range(3, 5):
            stage.write(volume, number * BLOCK, block(100 + number))
        stage.flush(volume)
        stage.run_until_idle(send=False)
        stage.send_all()  # which sees that they are what they were
        stage.check()


def test_what_cannot_be_read() -> None:
    """Counted and noted once; nic is told which block it was."""
    with Stage() as stage:
        volume = stored(stage)
        stage.io_rule = lambda io: lib.ATOLL_EIO if io.opcode == lib.ATOLL_OP_IO_READ else OK
        request = stage.ask(volume, 3 * BLOCK + 100, BLOCK)
        stage.run_until_idle()
        assert (request.status, request.part, request.lba) == (lib.ATOLL_EIO, lib.ATOLL_PART_NIC, 3 + 1)
        assert stage.counters()["errors"] == 1
        seen = stage.ffi.new("struct dedup_seen *")
        found = []
        while stage.lib.dedup_take_damage(stage.state, seen):
            found.append((int(seen.volume), int(seen.lba)))
        assert found == [(volume, 3)]
        stage.io_rule = None
        request = stage.ask(volume, 3 * BLOCK + 100, BLOCK)
        stage.run_until_idle()
        assert request.data == (block(3) + block(4))[100 : BLOCK + 100]
        stage.check()


def test_what_is_no_read_of_the_volume_is_refused() -> None:
    with Stage() as stage:
        volume = stored(stage)
        for number, offset in ((volume + 1, 0), (volume, SIZE), (volume, 1 << 63), (999, 0)):
            request = stage.submit(
                lib.ATOLL_OP_READ, number, offset, BLOCK, part=lib.ATOLL_PART_NIC, generation=stage.generation(volume)
            )
            stage.run_until_idle()
            assert request.status in (lib.ATOLL_ENOENT, lib.ATOLL_EINVAL)
        stage.check()


@pytest.mark.parametrize("opcode", ["READ", "FLUSH", "TRIM", "WRITE", "CACHE", "EXTENTS"])
def test_nothing_else_is_taken_from_nic(opcode: str) -> None:
    """Nor a read with another part, which would be taken for nbd's."""
    with Stage() as stage:
        volume = stored(stage)
        part = 0 if opcode == "READ" else lib.ATOLL_PART_NIC
        message = stage.message
        ffi.memmove(message, bytes(64), 64)
        message.opcode, message.part, message.identity = getattr(lib, f"ATOLL_OP_{opcode}"), part, 3 << 48 | 1
        message.words[1], message.halves[4], message.halves[5] = BLOCK, volume, stage.generation(volume)
        assert lib.atoll_domain_put(stage.domains[NIC], DEDUP, message)
        lib.atoll_domain_commit(stage.domains[NIC])
        before = stage.counters()["bad_requests"]
        stage.run_until_idle()
        assert stage.counters()["bad_requests"] == before + 1
        stage.check()


def test_who_comes_one_by_one_is_seen(hooked: ModuleType) -> None:
    """By what else is on the ring: then what destage gives the driver comes after the clients' requests, unless a flush
    waits for it."""
    try:
        with Stage(extension=hooked, destage_delay_ms=60_000) as stage:
            volume = stored(stage)
            now = 1_000_000_000_000_000
            for many, flushed, alone in ((2, False, False), (1, False, True), (1, True, False), (3, False, False)):
                hooked.lib.hook_set_clock(now)
                for _ in range(300):
                    for _ in range(many):
                        stage.ask(volume, 0, BLOCK)
                    stage.turn()
                    stage.disk()
                    stage.answers()
                stage.write(volume, 20 * BLOCK, block(random.randrange(1 << 30)))
                stage.run_until_idle()
                if flushed:
                    stage.flush(volume)
                else:
                    now += 60_000_000_000
                    hooked.lib.hook_set_clock(now)
                while not (
                    writes := [io for io in stage.ios if io.opcode == lib.ATOLL_OP_IO_WRITE and io.length == BLOCK]
                ):
                    stage.turn()
                    stage.take_ios()
                assert bool(writes[0].flags & lib.ATOLL_FLAG_ALONE) == alone, (many, flushed)
                stage.run_until_idle()
            stage.check()
    finally:
        hooked.lib.hook_set_clock(0)


def test_the_same_once_more() -> None:
    """A nic that forgot is answered again, and nothing is done twice."""
    with Stage() as stage:
        volume = stored(stage)
        request = stage.ask(volume, 0, BLOCK)
        stage.turn()
        stage.repeat(request)  # not answered yet
        stage.run_until_idle(send=False)
        reads = stage.counters()["reads"]
        stage.repeated.add(request.identity)
        stage.repeat(request)
        stage.run_until_idle(send=False)
        assert request.data == block(0) and stage.counters()["reads"] == reads
        stage.send_all()
        stage.check()


@pytest.mark.parametrize("loading", [False, True])
def test_dedup_dies(loading: bool) -> None:
    """Before it has begun, or while the block is being read."""
    with Stage() as stage:
        volume = stored(stage)
        request = stage.ask(volume, 3 * BLOCK, BLOCK)
        if loading:
            while not any(io.opcode == lib.ATOLL_OP_IO_READ and io.length == BLOCK for io in stage.ios):
                stage.turn()
                stage.take_ios()
        stage.attach()
        stage.run_until_idle()
        assert (request.status, request.part, request.data) == (OK, lib.ATOLL_PART_NIC, block(3))
        stage.check()


def test_one_that_crashes_dedup_twice(hooked: ModuleType) -> None:
    with Stage(extension=hooked) as stage:
        volume = stored(stage)
        before = stage.ask(volume, 0, BLOCK)
        poison = stage.ask(volume, BLOCK, BLOCK)
        after = stage.ask(volume, 2 * BLOCK, BLOCK)
        for crashed in (False, True):
            assert stage.turns_in_child(poison=poison.identity, crashed=crashed, turns=20) == -signal.SIGSEGV
        stage.attach(crashed=True)
        stage.run_until_idle()
        assert (before.status, poison.status, after.status) == (OK, lib.ATOLL_EPOISON, OK)
        assert (poison.part, stage.counters()["poisoned"], stage.counters()["errors"]) == (lib.ATOLL_PART_NIC, 1, 1)
        stage.check()


@pytest.mark.parametrize("part", ["nic", "nbd"])
def test_it_is_not_tried_again_whenever_dedup_is_killed(hooked: ModuleType, part: str) -> None:
    """After any store of the step that refuses it."""
    stores = 1
    refused = False
    while not refused:
        with Stage(extension=hooked) as stage:
            volume = stored(stage)
            poison = (stage.ask if part == "nic" else stage.read_by_nbd)(volume, BLOCK, BLOCK)
            for crashed in (False, True):
                assert stage.turns_in_child(poison=poison.identity, crashed=crashed, turns=20) == -signal.SIGSEGV
            refused = stage.turns_in_child(die_after=stores, crashed=True) == 0
            assert stage.turns_in_child(poison=poison.identity, turns=20) == 0, f"tried again, killed after {stores}"
            stage.attach()
            stage.run_until_idle()
            assert poison.status == lib.ATOLL_EPOISON
            stage.check()
        stores += 1
    assert stores > 20
