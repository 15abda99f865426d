"""A flush that waits for one batch of writes: its log block goes to the device with the data, a flush behind both.

Stages play the device, or what a power loss has left of it. Random work, deaths and power losses with such flushes
are in test_dedup_torture.py and the store's C rig.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
from dedupkit import BLOCK, OK, Io, Request, Stage
from flushkit import (
    VOLUME_BYTES,
    A,
    B,
    C,
    D,
    found,
    is_log,
    log_blocks,
    offline,
    place,
    served,
    super_places,
    synced,
    syncs,
    unreadable,
    with_bytes,
    without,
)

from atoll.ipc._ipc import lib

WRITE, SYNC = lib.ATOLL_OP_IO_WRITE, lib.ATOLL_OP_IO_SYNC
ZEROS = bytes(BLOCK)


@contextmanager
def fresh(**settings: Any) -> Iterator[Stage]:
    """With a volume, of which nothing is written yet. What is written stays in the log until a flush is asked for."""
    with Stage(destage_delay_ms=60_000, **settings) as stage:
        stage.open()
        assert stage.create_volume("v", VOLUME_BYTES) == 0
        stage.run_until_idle()
        flushed(stage)
        yield stage


@pytest.fixture
def stage() -> Iterator[Stage]:
    with fresh() as made:
        yield made
        made.check()


def asked(stage: Stage, *blocks: tuple[int, bytes]) -> Request:
    """Writes them and asks for a flush; what the device shall do for it is in stage.ios."""
    for lba, data in blocks:
        stage.write(0, lba * BLOCK, data)
    flush = stage.flush(0)
    until(stage, lambda: any(io.opcode == SYNC for io in stage.ios))
    return flush


def flushed(stage: Stage, *blocks: tuple[int, bytes]) -> None:
    for lba, data in blocks:
        stage.write(0, lba * BLOCK, data)
    done(stage, stage.flush(0))


def until(stage: Stage, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        stage.turn()
        stage.take_ios()
        stage.answers()
        assert time.monotonic() < deadline, stage.ios


def done(stage: Stage, flush: Request) -> None:
    stage.run_until_idle()
    assert flush.status == OK


def ahead(stage: Stage) -> int:
    return stage.counters()["syncs_ahead"]


def blocks(*lbas: int, seed: int = 0) -> list[tuple[int, bytes]]:
    return [(lba, random.Random(lba + 1000 * seed).randbytes(BLOCK)) for lba in lbas]


# --- What is asked of the device ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lbas", [(0,), (3, 4, 5), (9, 2, 40, 41, 7), tuple(range(60))], ids=len)
def test_all_at_once(lbas: tuple[int, ...]) -> None:
    """Into holes, then over what is there: data, both copies of the log block, a flush that comes after all of them."""
    with fresh() as stage:
        for seed in range(3):
            flush = asked(stage, *blocks(*lbas, seed=seed))
            data, first, second, sync = stage.ios
            assert [io.opcode for io in stage.ios] == [WRITE, WRITE, WRITE, SYNC]
            assert data.length == len(lbas) * BLOCK and stage.payload(first) == stage.payload(second)
            assert sync.after == {data.identity, first.identity, second.identity}
            before = len(stage.io_log)
            done(stage, flush)
            assert len(stage.io_log) == before + 4, "and nothing else"
            assert ahead(stage) == seed + 1
        stage.check()
        device = bytes(stage.device)
    assert offline(device) == ([], [])
    with served(device) as after:
        assert [found(after, lba) for lba in lbas] == [data for _, data in blocks(*lbas, seed=2)]


def test_two_that_drop_the_same_block(stage: Stage) -> None:
    """Its count goes down twice, and it is free."""
    flushed(stage, (0, A), (1, A), (2, A))
    flushed(stage, *blocks(0, 2))
    assert ahead(stage) == 1
    flushed(stage, *blocks(1, 3))
    assert ahead(stage) == 2
    assert stage.figures().stored_blocks == 4


def test_answers_in_any_order(stage: Stage) -> None:
    for seed in range(12):
        flush = asked(stage, *blocks(seed % 5, 7, seed=seed))
        stage.run_until_idle(shuffle=True)
        assert flush.status == OK
    assert ahead(stage) == 12


# --- Something else happens -----------------------------------------------------------------------------------------


def test_others_share_what_is_written(stage: Stage) -> None:
    """Their records are not known before their bytes have been compared."""
    flushed(stage, (0, A), (1, A))
    assert ahead(stage) == 0 and stage.figures().stored_blocks == 1


def test_a_batch_that_is_not_all(stage: Stage) -> None:
    """More than one batch has room for, or more than one log block."""
    flushed(stage, *blocks(*range(150)))
    assert ahead(stage) == 0


@pytest.mark.parametrize("what", ["write", "trim", "zero", "other"])
def test_it_is_changed_meanwhile(what: str) -> None:
    """The flush notes what has become of it."""
    with fresh() as stage:
        flush = asked(stage, (0, A))
        if what == "write":
            stage.write(0, 0, B)
        elif what == "trim":
            stage.trim(0, 0, BLOCK)
        elif what == "zero":
            stage.zero(0, 0, BLOCK)
        else:
            stage.zero(0, 6 * BLOCK, BLOCK, lib.ATOLL_FLAG_NO_HOLE)
        for _ in range(20):
            stage.turn()
            stage.answers()
        stage.complete(next(io for io in stage.ios if io.opcode == WRITE and not is_log(stage, io)))
        done(stage, flush)
        assert ahead(stage) == (what == "write"), "what a flush waits for has its place before what overwrites it"
        flushed(stage)
        stage.check()
        device = bytes(stage.device)
    assert offline(device) == ([], [])
    with served(device) as after:
        assert found(after, 0) == {"write": B, "trim": ZEROS, "zero": ZEROS, "other": A}[what]


@pytest.mark.parametrize("how", ["flush", "close"])
def test_what_was_given_up_never_counts(how: str) -> None:
    """The block is on the device with its data, but the client has made a hole of it again, which changes nothing
    there. A flush and a stop leave another block in its place."""
    with fresh() as stage:
        asked(stage, (0, A))
        stage.trim(0, 0, BLOCK)
        for _ in range(20):
            stage.turn()
            stage.answers()
        last = max(log_blocks(bytes(stage.device)))
        for io in [*stage.ios]:
            stage.complete(io)
        assert max(log_blocks(bytes(stage.device))) == last + 1, "it is there"
        unanswered = bytes(stage.device)
        stage.run_until_idle()
        if how == "close":
            stage.close_store()
        device = bytes(stage.device)
        assert ahead(stage) == 0
    for image in (device, with_bytes(device, device.index(ZEROS, 600 * BLOCK), A)):
        assert offline(image) == ([], [])
        with served(image) as after:
            assert found(after, 0) == ZEROS
            assert after.counters()["log_blocks_dropped"] == 0
    with served(unanswered) as after:
        assert found(after, 0) == A, "nobody was told anything else"


# --- Errors ---------------------------------------------------------------------------------------------------------


def failing(stage: Stage, bad: Callable[[Io], bool]) -> None:
    """The first that is so fails."""
    left = [1]

    def rule(io: Io) -> int:
        if left and bad(io):
            left.clear()
            return int(lib.ATOLL_EIO)
        return OK

    stage.io_rule = rule


def test_its_write_fails(stage: Stage) -> None:
    """It is written again, with a flush of its own."""
    for copy in (0, 1):
        flush = asked(stage, (copy, random.Random(copy).randbytes(BLOCK)))
        chosen = [io for io in stage.ios if is_log(stage, io)][copy]
        failing(stage, lambda io, chosen=chosen: io is chosen)
        before = syncs(stage)
        done(stage, flush)
        assert syncs(stage) - before == 2 and ahead(stage) == 0
        copies = log_blocks(bytes(stage.device))
        assert len(copies[max(copies)]) == 2


def test_its_flush_fails(stage: Stage) -> None:
    """The data are written again, too, and flushed."""
    flush = asked(stage, (0, A))
    failing(stage, lambda io: io.opcode == SYNC)
    before, begun = syncs(stage), len(stage.io_log)
    done(stage, flush)
    at = place(bytes(stage.device), A)
    written = [io for io in stage.io_log[begun:] if io.opcode == WRITE and io.offset <= at < io.offset + io.length]
    assert len(written) == 2 and syncs(stage) - before >= 2
    assert ahead(stage) == 0


def test_its_data_fail() -> None:
    with fresh() as stage:
        flush = asked(stage, (0, A))
        failing(stage, lambda io: io.opcode == WRITE and not is_log(stage, io))
        stage.run_until_idle()
        assert flush.status == lib.ATOLL_EUNFLUSHED
        before = bytes(stage.device)
        flushed(stage)
        stage.check()
        device = bytes(stage.device)
    with served(before) as after:
        assert after.counters()["log_blocks_dropped"] == 1
        assert found(after, 0) == ZEROS
    with served(device) as after:
        assert found(after, 0) == A


# --- Power is lost, processes die -----------------------------------------------------------------------------------


def test_any_part_of_it_may_be_there() -> None:
    """Nobody was told, so either is right; and what is found then stays so."""
    with fresh() as stage:
        flushed(stage, (0, A))
        asked(stage, (0, B))
        before = bytes(stage.device)
        writes = [(io.offset, stage.payload(io)) for io in stage.ios if io.opcode == WRITE]
    for landed in range(1 << len(writes)):
        device = before
        for index, (at, data) in enumerate(writes):
            if landed >> index & 1:
                device = with_bytes(device, at, data)
        whole = landed & 1 and landed > 1
        with served(device) as after:
            assert found(after, 0) == (B if whole else A), f"{landed:b}"
            assert synced(after, 0, (1, C)) == 1
            device = bytes(after.device)
        with served(device) as after:
            assert (found(after, 0), found(after, 1)) == ((B if whole else A), C)


def cut_between_copies(stage: Stage) -> tuple[bytes, int, int]:
    """What the device has been asked for is done, and of the sync's block that takes the place of the one written ahead
    the first copy: the device, and where the copies of that block are."""
    for io in [*stage.ios]:
        stage.complete(io)
    last = max(log_blocks(bytes(stage.device)))
    until(stage, lambda: any(is_log(stage, io) for io in stage.ios))
    stage.complete(next(io for io in stage.ios if is_log(stage, io)))
    device = bytes(stage.device)
    first, second = log_blocks(device)[last]
    assert device[first : first + BLOCK] != device[second : second + BLOCK]
    return device, first, second


@pytest.fixture
def differ() -> tuple[bytes, int, int]:
    """Power failed while the sync's block took the place of the one that was written ahead: the device, and where the
    copies of the last log block are. The first says that block 0 is a hole and 1 is B, the second that 0 is still A."""
    with fresh() as stage:
        flushed(stage, (0, A))
        asked(stage, (1, B))
        stage.trim(0, 0, BLOCK)
        for _ in range(20):
            stage.turn()
            stage.answers()
        return cut_between_copies(stage)


def test_two_copies_that_say_different_things(differ: tuple[bytes, int, int]) -> None:
    """One counts, for ever."""
    device, first, second = differ
    assert offline(device) == ([], [])
    with served(device) as after:
        assert (found(after, 0), found(after, 1)) == (ZEROS, B)
        assert synced(after, 0, (2, C)) == 1
        later = bytes(after.device)
    for copy in (first, second):
        damaged = with_bytes(later, copy, bytes(BLOCK))
        with served(damaged, asked=False) as after:
            assert [found(after, lba) for lba in range(3)] == [ZEROS, B, C]


@pytest.mark.parametrize("bad", [0, 1])
def test_one_of_them_cannot_be_read(differ: tuple[bytes, int, int], bad: int) -> None:
    """What it says does not count either when it can be read again."""
    device, *copies = differ
    state = [A if bad == 0 else ZEROS, B]
    with served(device, unreadable(copies[bad]), asked=False) as after:
        assert [found(after, lba) for lba in range(2)] == state
        later = bytes(after.device)
    with served(later) as after:
        assert [found(after, lba) for lba in range(2)] == state


def test_each_is_asked_for_its_own_data() -> None:
    """The first copy cannot be read, the data of the second are there; when the log is read again after them, the first
    can be read. It says that block 0 is C, which never arrived."""
    with fresh() as stage:
        flushed(stage, (0, A))
        asked(stage, (1, B))
        stage.write(0, 0, C)
        stage.flush(0)
        until(stage, lambda: sum(io.opcode == WRITE and not is_log(stage, io) for io in stage.ios) == 2)
        device, first, _ = cut_between_copies(stage)
    looks = 0

    def rule(io: Io) -> int:
        nonlocal looks
        if io.opcode != lib.ATOLL_OP_IO_READ or not io.offset <= first < io.offset + io.length:
            return OK
        looks += (
            1  # at the device's head; with its neighbours, alone, with its neighbours and the block behind it, alone
        )
        return int(lib.ATOLL_EIO) if looks <= reads else OK

    for reads in range(8):
        looks = 0
        with served(without(device, C), rule, asked=False) as after:
            assert found(after, 0) == A, reads
            assert found(after, 1) in (B, ZEROS)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("noticed", [False, True], ids=["before", "waited for"])
def test_everybody_dies(late: bool, noticed: bool) -> None:
    """`late`: the device does then what the dead have asked it for, when others have been answered."""
    with fresh() as stage:
        device = after_all_died(stage, late, noticed)
    with served(device) as after:
        assert [found(after, lba) for lba in range(3)] == [A, C, D]


def after_all_died(stage: Stage, late: bool, noticed: bool) -> bytes:
    flushed(stage, (0, A))
    asked(stage, (1, B))
    writes = [(io.offset, stage.payload(io)) for io in stage.ios if is_log(stage, io)]
    if noticed:
        stage.complete(next(io for io in stage.ios if io.opcode == WRITE and not is_log(stage, io)))
        for _ in range(20):
            stage.turn()
    stage.take_ios()
    stage.everybody_dies()
    stage.attach(adopted=True, quarantine=late)
    deadline = time.monotonic() + 20
    while stage.lib.dedup_store_state(stage.state) != 2:
        assert late
        stage.turn()
        stage.disk()
        assert time.monotonic() < deadline
    stage.nic_starts_anew()
    flushed(stage)  # does not join what has failed with the dead
    flushed(stage, (1, C), (2, D))
    if late:
        for at, data in writes:
            stage.device[at : at + BLOCK] = data
    stage.check()
    return bytes(stage.device)


def test_a_deletion_waits_for_the_root() -> None:
    """What it logs would stand behind a block that the device may still put another one in the place of."""
    with fresh() as stage:
        doomed = stage.create_volume("w", VOLUME_BYTES)
        flushed(stage, (0, A))
        asked(stage, (1, B))
        reason = stage.ffi.new("char[256]")
        assert stage.lib.dedup_volume_delete(stage.state, doomed, 0, reason) == OK, stage.ffi.string(reason)
        lib.atoll_domain_commit(stage.domain)
        stage.everybody_dies()
        stage.attach(adopted=True, quarantine=True)
        places = super_places(stage.device)
        stage.io_rule = lambda io: int(lib.ATOLL_EIO) if io.opcode == WRITE and io.offset in places else OK
        for _ in range(500):
            stage.turn()
            stage.disk()
        assert stage.lib.dedup_store_state(stage.state) == 1, "nobody is served"
        assert stage.lib.dedup_volume(stage.state, doomed).state == lib.ATOLL_VOLUME_DELETING
        with pytest.raises(AssertionError, match="the store is not open"):
            stage.create_volume("x", VOLUME_BYTES)
        stage.io_rule = None
        deadline = time.monotonic() + 20
        while stage.lib.dedup_volume(stage.state, doomed).state != lib.ATOLL_VOLUME_FREE:
            stage.turn()
            stage.disk()
            assert time.monotonic() < deadline
        stage.check()


def test_dedup_dies_at_any_store(hooked: ModuleType) -> None:
    """Its successor goes on where it was."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance, kills = random.Random(seed), 0
    devices: list[tuple[bytes, int, bytes]] = []
    with fresh(extension=hooked) as stage:
        for number in range(40):
            data = chance.randbytes(BLOCK)
            stage.write(0, number % 7 * BLOCK, data)
            flush = stage.flush(0)
            deadline = time.monotonic() + 20
            while not flush.done:
                kills += stage.turns_in_child(die_after=chance.choice([0, chance.randrange(1, 400)]), turns=2) != 0
                stage.take_ios()
                for io in [*stage.ios]:
                    if stage.may_begin(io) and chance.random() < 0.7:
                        stage.complete(io)
                stage.answers()
                assert time.monotonic() < deadline
            assert flush.status == OK
            if number % 8 == 7:
                devices.append((bytes(stage.device), number % 7, data))
        stage.attach()
        stage.check()
        print(f"{kills} kills")
        assert ahead(stage) > 20 and kills > 20
    for device, lba, data in devices:
        with served(device) as after:
            assert found(after, lba) == data
