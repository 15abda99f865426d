"""Posted writes in dedup: what waits is not overtaken, and what cannot be applied is kept."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from dedupkit import BLOCK, DEDUP, KERNEL, NBD, NIC, OK, Request, Stage
from lookupkit import Reader

from atoll.ipc._ipc import ffi, lib
from atoll.ipc.crashpoint import point_hash

SIZE = 64 * BLOCK
PART = 16  # blocks of a posted write, at most
LEAF = 512 * BLOCK  # what one page of the map says


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def until_written(stage: Stage) -> None:
    """Blocks are on their way to the device, and stay there."""
    while not any(io.opcode == lib.ATOLL_OP_IO_WRITE and io.length == 10 * BLOCK for io in stage.ios):
        stage.turn()
        stage.take_ios()


def public_of(stage: Stage) -> Any:
    arena = stage.domains[NBD].peers[DEDUP]
    return ffi.cast("struct atoll_dedup_public *", ffi.cast("char *", arena) + arena.role_offset)


def posting(stage: Stage, size: int) -> tuple[int, Any]:
    """A new store in which as much may be posted as can be, a volume on it, and dedup's public part."""
    stage.config.posted_blocks = int(lib.ATOLL_POSTED_BLOCKS)
    stage.open()
    volume = stage.create_volume("v", size)
    stage.run_until_idle()
    return volume, public_of(stage)


def turns(stage: Stage, count: int = 20) -> None:
    for _ in range(count):
        stage.turn()
        stage.answers()


def test_all_that_was_posted_before_is_awaited() -> None:
    """A drain covers a write that nic has noted as answered and whose message is still on its way through nbd."""
    with Stage(destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.run_until_idle()
        first = stage.post(volume, 0, block(1))
        stage.run_until_idle()
        note = stage.nic_public.posted[stage.free_slots[-1]]  # of the request to come
        note.identity, note.order = first.identity + 1, 2
        stage.nic_public.posted_order = 2

        def drained() -> bool:
            reason = stage.lib.dedup_run(stage.state, stage.lib.DEDUP_GOAL_DRAIN, time.monotonic_ns() + 20_000_000)
            assert reason in (stage.lib.DEDUP_REASON_REACHED, stage.lib.DEDUP_REASON_TIMEOUT)
            stage.disk()
            return bool(reason == stage.lib.DEDUP_REASON_REACHED)

        assert not any(drained() for _ in range(10))
        second = stage.post(volume, BLOCK, block(2))
        assert (second.identity, second.slot) == (first.identity + 1, first.slot)
        while not drained():
            stage.answers()
        assert stage.figures().log_records == 0
        stage.check()


@pytest.mark.parametrize("dies", [False, True])
def test_nothing_overtakes_one_that_waits(dies: bool) -> None:
    """A flush covers a block that is being written, so a posted write to it waits; so does all that touches it then."""
    with Stage(destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume, other = stage.create_volume("v", SIZE), stage.create_volume("w", SIZE)
        stage.run_until_idle()
        for number in range(10):
            stage.write(volume, number * BLOCK, block(number))
        stage.run_until_idle()
        flush = stage.flush(volume)
        until_written(stage)
        posted = stage.post(volume, 3 * BLOCK, block(100) + block(101))
        behind: list[Request] = [
            stage.read(volume, 2 * BLOCK, 3 * BLOCK),
            stage.write(volume, 4 * BLOCK + 100, b"!" * 100),
            stage.extents(volume, 0, SIZE),
            stage.flush(volume),
            stage.ask(volume, 2 * BLOCK, 3 * BLOCK),
        ]
        turns(stage)  # or `last`, which is posted, would be taken before them
        last = stage.post(volume, 3 * BLOCK, block(102))
        beside = [stage.read(volume, 5 * BLOCK, BLOCK), stage.read(other, 3 * BLOCK, BLOCK)]
        turns(stage)
        if dies:
            stage.attach()
            turns(stage)
        assert [request.done for request in (flush, posted, last, *behind)] == [False] * 8
        assert [request.done for request in beside] == [True] * 2
        stage.run_until_idle()
        assert all(request.status == OK for request in (flush, posted, last, *behind))
        assert behind[0].data == behind[-1].data == block(2) + block(100) + block(101)
        read = stage.read(volume, 2 * BLOCK, 3 * BLOCK)
        stage.run_until_idle()
        assert read.data == block(2) + block(102) + block(101)[:100] + b"!" * 100 + block(101)[200:]
        stage.flush(volume)
        stage.drain()
        stage.check()
        assert stage.free_pages == set(range(stage.nic_pages))


def test_neither_holds_up_the_other() -> None:
    """However many come in each turn, from nic or from nbd: a request waits for those that were there before it."""
    with Stage(destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.run_until_idle()

        def stream(send: Callable[[int], object]) -> None:
            for number in range(64):
                send(number * BLOCK)

        def post(offset: int) -> Request:
            return stage.post(volume, offset, block(offset))

        def read(offset: int) -> Request:
            return stage.read(volume, offset, BLOCK)

        for many, one in ((post, read), (read, post)):
            stream(many)
            request = one(63 * BLOCK)
            for _ in range(10):
                stream(many)
                stage.turn()
                stage.answers()
            assert request.done and request.status == OK
            stage.run_until_idle()


def test_one_that_waits_when_all_die() -> None:
    """It waits for the device, then everybody dies: twice, for it waits for its turn in the next run, too."""
    with Stage(destage_delay_ms=10_000_000, device_blocks=4096) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.run_until_idle()
        for number in range(10):
            stage.write(volume, number * BLOCK, block(number))
        stage.run_until_idle()
        stage.flush(volume)
        until_written(stage)
        for number in range(5):
            stage.post(volume, 3 * BLOCK, block(100 + number))
        turns(stage)
        for _ in range(2):
            stage.take_ios()
            stage.everybody_dies()
            stage.attach(adopted=True)
        stage.nic_starts_anew()
        stage.check()
        assert stage.counters()["posted_adopted"] == 5
        read = stage.read(volume, 2 * BLOCK, 2 * BLOCK)
        stage.run_until_idle()
        assert read.data == block(2) + block(104)
        stage.flush(volume)
        stage.drain()
        stage.check()
        assert stage.free_pages == set(range(stage.nic_pages))


def test_space_of_those_that_come_when_it_has_just_grown_short() -> None:
    """Dedup dies when ordinary and posted writes have taken what was free and have been answered: nbd posts as many
    once more, if it still may. On a small device little else is kept."""
    most = int(lib.ATOLL_POSTED_BLOCKS)
    with Stage(device_blocks=2304, nic_pages=1024, destage_delay_ms=10_000_000) as stage:
        volume, public = posting(stage, 8192 * BLOCK)
        used = 0

        def contents(count: int) -> bytes:
            nonlocal used
            used += count
            return b"".join(block(used + number) for number in range(count))

        def post() -> None:
            for _ in range(most // PART):
                stage.post(volume, used * BLOCK, contents(PART))

        assert public.posted_blocks == most
        while (room := stage.figures().available_blocks) > 2 * most:
            stage.write(volume, used * BLOCK, contents(min(PART, room - 2 * most)))
            stage.run_until_idle()
            stage.flush(volume)
            stage.drain()
        assert public.posted_blocks == most
        for _ in range(most // PART):  # ordinary ones, which leave what is kept for the others
            stage.write(volume, used * BLOCK, contents(PART))
        post()
        header = stage.domains[KERNEL].self
        header.crash_sequence += 1
        header.crash_point = point_hash("dedup.step.committed")
        assert stage.turns_in_child() == -signal.SIGKILL
        header.crash_point = 0
        stage.answers()
        assert not stage.requests
        if public.posted_blocks:
            post()
        stage.attach()
        turns(stage, 1000)
        assert not stage.requests, f"{len(stage.requests)} posted writes find no room"
        flush = stage.flush(volume)
        stage.drain()
        assert flush.status == OK
        stage.check()


def test_they_end_before_the_map_has_no_more_room() -> None:
    """Each of these writes needs another page of the map. Whoever comes too late is refused, and nobody was told before
    that all is well."""
    with Stage(device_blocks=8192, nic_pages=1024) as stage:
        volume, public = posting(stage, 1024 * LEAF)
        posted = 0
        for number in range(1024):
            may = public.posted_blocks != 0
            posted += may
            request = (stage.post if may else stage.write)(volume, number * LEAF, block(number))
            turns(stage, 4)
            stage.run_until_idle()
            if request.status != OK:
                break
        assert request.status == lib.ATOLL_ENOSPC and posted != 0 and not may
        assert stage.figures().waiting == 0
        flush = stage.flush(volume)
        stage.drain()
        assert flush.status == OK
        stage.check()


def test_they_end_before_the_log_is_full() -> None:
    """The device does nothing: nic stops posting while it has pages yet, and goes on when destage has come after it."""
    most = int(lib.ATOLL_POSTED_BLOCKS)
    with Stage(device_blocks=8192, nic_pages=2048, destage_delay_ms=10_000_000) as stage:
        volume, public = posting(stage, 8192 * BLOCK)
        assert public.posted_blocks == most
        for number in range(0, 2048, PART):
            contents = b"".join(block(number + index) for index in range(PART))
            request = (stage.post if public.posted_blocks else stage.write)(volume, number * BLOCK, contents)
            turns(stage, 4)
            stage.take_ios()
            assert request.status == OK
            if not public.posted_blocks:
                break
        logged = stage.figures().log_records
        assert 2048 * 6 // 8 < logged <= 2048 * 6 // 8 + PART
        turns(stage)
        assert not public.posted_blocks
        stage.run_until_idle()  # as far as destage goes by itself, below what it begins again at
        assert stage.figures().log_records * 8 <= 2048 * 5 and public.posted_blocks == most
        stage.drain()
        stage.check()


def test_no_more_are_applied_than_leave_the_log() -> None:
    """The device does nothing, so more is logged than stays in the processor's cache: those who wait for an answer are
    served as ever, those who have it come in small lots, and nic is told to wait. Until destage has come after them."""
    lot, log = 36, 2048
    with Stage(device_blocks=16384, nic_pages=2 * log, prints=1 << 15, destage_delay_ms=10_000_000) as stage:
        volume, public = posting(stage, 2 * log * BLOCK)
        number = 0

        def take(count: int) -> int:
            """Of so many posted writes; how many of them one turn applies."""
            nonlocal number
            late = [stage.post(volume, (number + index) * BLOCK, block(number + index)) for index in range(count)]
            number += count
            stage.turn()
            stage.answers()
            stage.take_ios()
            done = sum(request.done for request in late)
            turns(stage, 10)
            assert all(request.status == OK for request in late)
            return done

        while not public.crowded:
            applied = take(64)
            assert number <= log + 64
        assert applied == 64, "once it is seen that they come many at a time"
        assert log < stage.figures().log_records <= log + 64
        assert take(100) == lot
        read = stage.read(volume, 0, BLOCK)
        assert take(64) > lot and read.status == OK
        for asking, behind in ((1, 70), (0, 70), (1, 0)):
            stage.nic_public.asking = asking
            late = [stage.post(volume, index * BLOCK, block(index)) for index in range(behind)]
            read = stage.ask(volume, 0, BLOCK)
            more = [stage.post(volume, (number + index) * BLOCK, block(number + index)) for index in range(100)]
            number += 100
            stage.turn()
            stage.answers()
            done = sum(request.done for request in (*late, read, *more))
            assert done == (64 if asking else lot), "all that a turn may, where a read is among them"
            stage.take_ios()
            turns(stage, 10)
            assert read.status == OK and all(request.status == OK for request in (*late, *more))
        stage.nic_public.asking = 1  # for the device: nothing of it is on the ring
        assert take(100) == lot
        assert public.crowded == 1 and public.posted_blocks != 0
        stage.run_until_idle()
        assert public.crowded == 0 and stage.figures().log_records <= log
        assert take(64) == 64
        flush = stage.flush(volume)
        stage.drain()
        assert flush.status == OK
        stage.check()


def test_the_log_stays_short_however_fast_they_come() -> None:
    """Each turn finds as many as nic may post; what they bring into the log leaves it, although there is more room."""
    log, size = 2048, 16384
    with Stage(device_blocks=2 * size, nic_pages=4 * log, prints=1 << 16) as stage:
        volume, public = posting(stage, size * BLOCK)
        sent: list[Request] = []
        most = 0
        while len(sent) < size:
            while len(sent) < size and len(stage.requests) < lib.ATOLL_POSTED_BLOCKS:
                sent.append(stage.post(volume, len(sent) * BLOCK, len(sent).to_bytes(8, "little") * (BLOCK // 8)))
            stage.turn()
            stage.disk()
            stage.answers()
            most = max(most, stage.figures().log_records)
            assert public.posted_blocks != 0
        assert log < most < log + log // 4, f"{most} blocks in the log"
        stage.drain()
        assert all(request.status == OK for request in sent)
        stage.check()


def ended_store(settings: dict[str, Any], leaves: int) -> tuple[int, bytes]:
    """A volume and the device of a store that was ended in order: the first block of each of so many leaves."""
    with Stage(**settings) as stage:
        stage.open()
        volume = stage.create_volume("v", 256 * LEAF)
        for leaf in range(leaves):
            stage.write(volume, leaf * LEAF, block(leaf))
            stage.run_until_idle()
        return volume, stage.close_store()


def until_done(stage: Stage, request: Request) -> None:
    while not request.done:
        stage.turn()
        stage.disk()
        stage.answers()


def test_they_end_while_one_cannot_be_applied() -> None:
    """Its page of the map cannot be read: it is kept, no more come, and its blocks are given to nobody else."""
    settings: dict[str, Any] = {"device_blocks": 2304, "nic_pages": 2048}
    volume, device = ended_store(settings, 2)
    with Stage(**settings) as stage:
        stage.config.posted_blocks = int(lib.ATOLL_POSTED_BLOCKS)
        stage.device[:] = device
        stage.open()
        public = public_of(stage)
        stage.write(volume, LEAF, block(2))  # this page of the map has been read
        stage.run_until_idle()
        assert public.posted_blocks != 0
        stage.io_rule = lambda io: lib.ATOLL_EIO if io.opcode == lib.ATOLL_OP_IO_READ else OK
        contents = b"".join(block(10 + number) for number in range(PART))
        kept = stage.post(volume, BLOCK, contents)
        until_done(stage, kept)
        assert stage.figures().waiting == 1
        assert public.posted_blocks == 0
        for number in range(2304 // PART):
            request = stage.write(volume, LEAF + (1 + number) * PART * BLOCK, contents[number:] + contents[:number])
            until_done(stage, request)
            if request.status != OK:
                break
        assert request.status == lib.ATOLL_ENOSPC
        assert stage.figures().available_blocks >= PART


@pytest.mark.parametrize("page", [-(1 << 24), -1, 1024, 1 << 24])
def test_a_payload_that_is_nowhere_is_not_kept(page: int) -> None:
    """nic is damaged: a write that would be kept, as its block has one that is, names no page of its buffers."""
    settings: dict[str, Any] = {"device_blocks": 2304, "nic_pages": 1024}
    volume, device = ended_store(settings, 1)
    with Stage(**settings) as stage:
        stage.config.posted_blocks = int(lib.ATOLL_POSTED_BLOCKS)
        stage.device[:] = device
        stage.open()
        stage.io_rule = lambda io: lib.ATOLL_EIO if io.opcode == lib.ATOLL_OP_IO_READ else OK
        kept = stage.post(volume, 0, block(1))
        until_done(stage, kept)
        bad = stage.counters()["bad_requests"]
        message = ffi.new("struct atoll_descriptor *", ffi.from_buffer("struct atoll_descriptor *", kept.message)[0])
        message.identity += 1
        message.address = stage.nic_buffer + page * BLOCK
        assert lib.atoll_domain_put(stage.domains[NIC], DEDUP, message)
        lib.atoll_domain_commit(stage.domains[NIC])
        turns(stage)
        assert stage.figures().waiting == 1 and stage.counters()["bad_requests"] == bad + 1


@pytest.mark.parametrize("dies", [False, True])
def test_it_is_applied_when_the_device_has_come_to_itself(dies: bool) -> None:
    """Its page of the map cannot be read for a while. As long, what touches it fails, flushes too, and none is posted;
    not even while the page is being tried again."""
    settings: dict[str, Any] = {"device_blocks": 2304, "nic_pages": 1024}
    volume, device = ended_store(settings, 1)
    with Stage(**settings) as stage:
        stage.config.posted_blocks = int(lib.ATOLL_POSTED_BLOCKS)
        stage.device[:] = device
        stage.open()
        public = public_of(stage)
        failed = 0

        def fail(io: Any) -> int:
            nonlocal failed
            failed += io.opcode == lib.ATOLL_OP_IO_READ
            return int(lib.ATOLL_EIO) if io.opcode == lib.ATOLL_OP_IO_READ else OK

        stage.io_rule = fail
        posted = [stage.post(volume, BLOCK * (1 + number), block(1 + number)) for number in range(3)]
        read = stage.read(volume, 0, BLOCK)
        stage.run_until_idle()
        assert read.status == lib.ATOLL_EIO and all(request.done for request in posted)
        tried = failed
        deadline = time.monotonic() + 20
        while failed < tried + 4:  # both copies, twice
            read, flush = stage.read(volume, BLOCK, BLOCK), stage.flush(volume)
            turns(stage)
            assert (read.status, flush.status) == (lib.ATOLL_EIO, lib.ATOLL_EUNFLUSHED)
            assert public.posted_blocks == 0 and stage.figures().waiting == 3
            stage.disk()
            assert time.monotonic() < deadline
        if dies:
            stage.attach()
        stage.io_rule = None
        while stage.figures().waiting:
            stage.turn()
            stage.disk()
            assert time.monotonic() < deadline
        read, flush = stage.read(volume, 0, 4 * BLOCK), stage.flush(volume)
        stage.drain()
        assert read.data == b"".join(block(number) for number in range(4)) and flush.status == OK
        assert public.posted_blocks != 0
        stage.check()


@pytest.mark.parametrize("ended", [False, True])
def test_one_that_is_kept_when_all_die(ended: bool) -> None:
    """It cannot be applied yet and has been answered. Its pages are not nic's, even where nic has not seen that."""
    settings: dict[str, Any] = {"device_blocks": 2304, "nic_pages": 1024}
    volume, device = ended_store(settings, 1)
    with Stage(**settings) as stage:
        stage.device[:] = device
        stage.open()
        stage.io_rule = lambda io: lib.ATOLL_EIO if io.opcode == lib.ATOLL_OP_IO_READ else OK
        stage.post(volume, BLOCK, block(1))
        deadline = time.monotonic() + 20
        while not lib.atoll_domain_pending(stage.domains[NIC], DEDUP):
            stage.turn()
            stage.disk()
            assert time.monotonic() < deadline
        assert stage.figures().waiting == 1
        if ended:
            assert stage.answers() == 1
        stage.take_ios()
        stage.everybody_dies()
        stage.attach(adopted=True)
        stage.nic_starts_anew()
        stage.io_rule = None
        while stage.figures().waiting:
            stage.turn()
            stage.disk()
            stage.given_back()
            assert time.monotonic() < deadline
        read, flush = stage.read(volume, 0, 2 * BLOCK), stage.flush(volume)
        stage.drain()
        assert (read.status, flush.status) == (OK, OK) and read.data == block(0) + block(1)
        stage.check()
        assert stage.free_pages == set(range(stage.nic_pages))


def test_more_than_was_allowed_takes_nobody_elses_space() -> None:
    """nbd posts more than it may: what finds no room waits, and what others have been acknowledged keeps its place."""
    with Stage(device_blocks=2304, nic_pages=4096, destage_delay_ms=10_000_000) as stage:
        stage.config.posted_blocks = int(lib.ATOLL_POSTED_BLOCKS)
        stage.open()
        volume, other = stage.create_volume("v", 4096 * BLOCK), stage.create_volume("w", 8192 * BLOCK)
        stage.run_until_idle()
        for number in range(100):
            stage.write(volume, number * BLOCK, block(number))
        stage.run_until_idle()
        room = int(stage.figures().available_blocks)
        contents = [block(1000 + number) for number in range(room + 200 + PART)]
        for at in range(0, room + 200, PART):
            stage.post(other, at * BLOCK, b"".join(contents[at : at + PART]))
            turns(stage, 2)
        turns(stage, 200)
        assert stage.figures().waiting != 0
        flush = stage.flush(volume)
        for _ in range(1000):
            stage.turn()
            stage.disk()
            stage.answers()
        assert flush.status == OK and stage.figures().failed_records == 0


@pytest.mark.parametrize("stored", [True, False])
def test_what_one_is_kept_for_is_not_looked_up(stored: bool) -> None:
    """The page of the map has left memory and cannot be read any more, while its blocks can be looked up: nbd is told
    that the posted write is over, and must not answer with what was there before."""
    settings: dict[str, Any] = {"device_blocks": 24576, "nic_pages": 1024, "frames": 128}
    volume, device = ended_store(settings, 200)
    with Stage(**settings) as stage:
        stage.config.posted_blocks = int(lib.ATOLL_POSTED_BLOCKS)
        stage.device[:] = device
        stage.open()
        at = 0 if stored else BLOCK
        for _ in range(2):  # the first time the block is not there yet
            before = stage.read(volume, at, BLOCK)
            stage.run_until_idle()
        key = (volume, stage.generation(volume) & 0x7FFF, at // BLOCK)
        reader = Reader(stage)
        assert reader.table()[key] == before.data
        for leaf in range(1, 200):
            stage.read(volume, leaf * LEAF, BLOCK)
            stage.run_until_idle()
        assert reader.table()[key] == before.data
        stage.io_rule = lambda io: lib.ATOLL_EIO if io.opcode == lib.ATOLL_OP_IO_READ else OK
        kept = stage.post(volume, 0, block(1000) + block(1001))
        until_done(stage, kept)
        assert kept.status == OK and stage.figures().waiting == 1
        assert key not in reader.table()


@pytest.mark.parametrize("kind", ["read", "write"])
def test_nor_because_of_a_request_that_came_before_it(kind: str) -> None:
    """Such a one may still be carried out first. What it finds, or puts there, is not what those are to read who know
    of the posted write's end."""
    settings: dict[str, Any] = {"device_blocks": 2304, "nic_pages": 1024, "destage_delay_ms": 10_000_000}
    with Stage(**settings) as stage:
        stage.open()
        volume = stage.create_volume("v", 256 * LEAF)
        for lba in (510, 512):
            stage.write(volume, lba * BLOCK, block(lba))
            stage.run_until_idle()
        device = stage.close_store()
    with Stage(**settings) as stage:
        stage.config.posted_blocks = int(lib.ATOLL_POSTED_BLOCKS)
        stage.device[:] = device
        stage.open()
        stage.write(volume, 500 * BLOCK, b"".join(block(lba) for lba in range(500, 510)))
        stage.run_until_idle()
        stage.flush(volume)
        deadline = time.monotonic() + 10
        lost: set[int] = set()
        while not any(io for io in stage.ios if io.opcode == lib.ATOLL_OP_IO_WRITE and io.length == 10 * BLOCK):
            turns(stage, 1)
            stage.take_ios()
            for io in [io for io in stage.ios if io.opcode == lib.ATOLL_OP_IO_READ]:
                stage.complete(io)
            assert time.monotonic() < deadline, stage.ios
        stage.write(volume, 511 * BLOCK, block(511))
        turns(stage)
        if kind == "read":
            stage.post(volume, 509 * BLOCK, block(0))  # waits for the flush
            before = stage.read(volume, 509 * BLOCK, 3 * BLOCK)
        else:
            before = stage.write(volume, 510 * BLOCK + 512, b"x" * BLOCK)  # waits for what it leaves of block 510
        turns(stage)
        stage.take_ios()
        waits = list(stage.ios)
        waiting = stage.figures().waiting
        assert waiting == (2 if kind == "read" else 1) and not before.done
        kept = stage.post(volume, 511 * BLOCK, block(1000) + block(1001))
        while not kept.done:
            turns(stage, 1)
            stage.take_ios()
            for io in [io for io in stage.ios if io not in waits]:
                lost.add(io.offset)
                stage.complete(io, lib.ATOLL_EIO)
            assert time.monotonic() < deadline
        assert stage.figures().waiting == waiting + 1 and not before.done
        stage.io_rule = lambda io: int(lib.ATOLL_EIO) if io.offset in lost else OK
        while not before.done:
            turns(stage, 1)
            stage.disk()
            assert time.monotonic() < deadline
        assert before.status == OK and stage.figures().waiting == 1
        assert (volume, stage.generation(volume) & 0x7FFF, 511) not in Reader(stage).table()
