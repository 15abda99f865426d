"""Reads that nbd answers by itself out of dedup's look-up table."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from nbdclient import Command, CommandFlag
from nbdstage import BLOCK, PART, Stage, VolumeData, Wire

from atoll.ipc._ipc import lib

MODES = {"simple": (False, False), "structured": (True, False), "extended": (True, True)}
MIB = 1 << 20


@pytest.fixture
def stage() -> Iterator[Stage]:
    data = bytearray(random.Random(1).randbytes(MIB))
    data[4 * BLOCK : 6 * BLOCK] = bytes(2 * BLOCK)
    with Stage([VolumeData(0, b"disk", data)]) as made:
        made.remember = True
        made.start()
        yield made


@pytest.fixture(params=list(MODES))
def wire(stage: Stage, request: pytest.FixtureRequest) -> Wire:
    structured, extended = MODES[request.param]
    return stage.connect().negotiate(structured, extended)


def test_what_is_known_is_read_without_a_message(stage: Stage, wire: Wire) -> None:
    data = stage.volumes[0].data
    for offset, length in ((0, BLOCK), (40 * BLOCK + 512, 1024), (3 * BLOCK + 100, 4 * BLOCK), (8 * BLOCK, 20 * BLOCK)):
        for turn in range(2):
            before = len(stage.log)
            result = wire.call(Command.READ, offset, length).check()
            assert result.data == data[offset : offset + length]
            assert len(stage.log) == before + (turn == 0)
    assert stage.counters()["reads_from_memory"] == 4
    stage.check_quiet()


def test_a_changed_block_is_asked_for(stage: Stage, wire: Wire) -> None:
    for _ in range(2):
        wire.call(Command.READ, 0, 4 * BLOCK)
    wire.call(Command.WRITE, BLOCK, payload=b"n" * BLOCK).check()
    before = len(stage.log)
    assert wire.call(Command.READ, BLOCK, BLOCK).check().data == b"n" * BLOCK
    assert len(stage.log) == before + 1, "it was in no table"
    wire.call(Command.READ, 3 * BLOCK, BLOCK).check()
    assert len(stage.log) == before + 1


def test_nothing_is_looked_up_while_writes_are_posted(stage: Stage, wire: Wire) -> None:
    """To which blocks they are on their way nbd does not know; they were answered before the READ was sent."""
    for _ in range(2):
        wire.call(Command.READ, 0, BLOCK)
    stage.nic_public().posting = 1
    before = len(stage.log)
    wire.call(Command.READ, 0, BLOCK).check()
    assert len(stage.log) == before + 1
    stage.nic_public().posting = 0
    wire.call(Command.READ, 0, BLOCK).check()
    assert len(stage.log) == before + 1


def test_a_page_that_is_something_else_now_is_not_used(stage: Stage, wire: Wire) -> None:
    for _ in range(2):
        wire.call(Command.READ, 0, BLOCK)
    page = (stage.memory._next - 1) % 256
    stage.memory.retire(page)
    before = len(stage.log)
    wire.call(Command.READ, 0, BLOCK).check()
    assert len(stage.log) == before + 1
    assert not any(stage.area().public.uses.use[slot] >> 31 & 1 and slot in stage.uses for slot in range(48))


def test_parts_of_a_long_simple_reply_are_not_torn_apart(stage: Stage) -> None:
    """A reply from memory waits, as others do, until the READ of several parts is through."""
    wire = stage.connect().negotiate(structured=False)
    for _ in range(2):
        wire.call(Command.READ, 7 * BLOCK, BLOCK).check()
    long = wire.submit(Command.READ, 0, 2 * PART)
    stage.settle(until=lambda: len(stage.log) >= 2)
    short = wire.submit(Command.READ, 7 * BLOCK, BLOCK)
    stage.settle()
    data = stage.volumes[0].data
    assert wire.results[long].check().data == data[: 2 * PART]
    assert wire.results[short].check().data == data[7 * BLOCK : 8 * BLOCK]
    stage.check_quiet()


def test_do_not_fragment(stage: Stage) -> None:
    wire = stage.connect().negotiate(structured=True)
    for _ in range(2):
        result = wire.call(Command.READ, 3 * BLOCK, 4 * BLOCK, flags=CommandFlag.DF).check()
        assert result.data == stage.volumes[0].data[3 * BLOCK : 7 * BLOCK]
    assert stage.counters()["reads_from_memory"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_nonsense_in_the_table_hurts_nobody(stage: Stage, seed: int) -> None:
    """A damaged dedup: nbd lives, and refers to nothing outside of the arenas (the stage looks)."""
    chance = random.Random(seed)
    print(f"seed {seed}")
    stage.changes = 1 << 60  # the stage cannot know what nonsense reads as
    wire = stage.connect().negotiate()
    for _ in range(100):
        for lba in range(256):
            value = chance.choice(
                [chance.getrandbits(64), lib.ATOLL_LOOKUP_PAGE << 62 | chance.randrange(300) << 32, 2 << 62, 3 << 62]
            )
            stage.memory.forge(0, 1, lba, value)
        stage.changes += 1
        cookie = wire.submit(Command.READ, chance.randrange(200) * BLOCK, chance.randrange(1, 8) * BLOCK)
        stage.changes += 1
        stage.settle()
        assert wire.results.pop(cookie).error is None
    stage.check_quiet()
