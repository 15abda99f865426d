"""Writes that nic answers by itself: which, how many, what it says, and what is kept until they are applied."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from nicstage import (
    BLOCK,
    DEDUP,
    GENERATION,
    LAST,
    MOST,
    NBD,
    READ,
    REQUEST_MAGIC,
    VOLUME,
    WRITE,
    Client,
    Stage,
    pattern,
)

from atoll.ipc import physmap
from atoll.ipc._ipc import lib

EXTENDED_MAGIC, EXTENDED_REPLY_MAGIC = 0x21E41C71, 0x6E8A278C
FUA, PAYLOAD_LEN = 1, 32


@pytest.fixture(params=["io_uring", "sockets"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with Stage(engine=request.param) as made:
        made.posts = MOST
        made.start()
        yield made


def noted(stage: Stage) -> list[Any]:
    return [entry for entry in stage.nic_public().posted if entry.order]


def posted(stage: Stage) -> int:
    return stage.counters()["posted"]


def write(stage: Stage, client: Client, offset: int, blocks: int = 1) -> None:
    """Answered, whoever does it."""
    before = client.results
    client.request(WRITE, offset, blocks * BLOCK)
    stage.until(lambda: client.results == before + 1)


def test_it_holds_slot_and_pages_until_its_end(stage: Stage) -> None:
    stage.take_share, stage.hold_ends = 1.0, True
    client = stage.ready()
    for number in range(80):  # more than a connection may have under way
        client.request(WRITE, number * BLOCK, BLOCK)
    stage.until(lambda: client.results == 80 and len(stage.ends) == 80, "all are answered")
    status = stage.call("status")
    assert status["slots_in_use"] == status["buffer_pages_lent"] == 80 and status["buffer_pages_taken"] == 0
    assert sorted((entry.order, entry.offset) for entry in noted(stage)) == [(n + 1, n * BLOCK) for n in range(80)]
    assert stage.nic_public().posting == 1
    if stage.config["nic"]["engine"] == "io_uring":
        stage.kill()
        stage.start()
        assert stage.nic_public().posting == 1
    client.close()
    stage.hold_ends = False
    stage.until(lambda: stage.closed_count == 1, "the connection ends when its writes have")
    stage.give_all_back()
    stage.until(lambda: stage.call("status")["buffer_pages_free"] == status["buffer_pages"], "no page is left")
    assert not noted(stage) and stage.nic_public().posting == 0
    assert stage.counters()["bad_message"] == stage.counters()["bad_give_back"] == 0
    stage.check()


def test_answered_while_nbd_is_held(stage: Stage) -> None:
    client = stage.ready()
    stage.hold = True
    for number in range(10):
        write(stage, client, number * BLOCK, 3)
    assert posted(stage) == 10
    client.request(READ, 0, 30 * BLOCK)
    for _ in range(100):
        stage.turn()
    assert client.results == 10, "a read is behind them"
    stage.hold = False
    stage.settle()
    assert client.results == 11
    stage.check()


def test_bounded(stage: Stage) -> None:
    """So many blocks as dedup allows, and none when it does not any more."""
    client = stage.ready()
    stage.posts, stage.hold_ends = 8, True
    for number in range(6):
        write(stage, client, number * 2 * BLOCK, 2)
    assert posted(stage) == 4
    stage.hold_ends = False
    stage.until(lambda: not stage.ends)
    stage.hold_ends = True
    write(stage, client, 0)
    assert posted(stage) == 5
    stage.posts = 0
    write(stage, client, BLOCK)
    assert posted(stage) == 5 and stage.nic_public().posting == 1
    stage.hold_ends = False
    stage.settle()
    stage.until(lambda: stage.nic_public().posting == 0)
    stage.check()


def test_it_waits_where_dedup_is_behind(stage: Stage) -> None:
    """Behind as many as may be posted, if dedup says that it applies them one after another; nbd has nothing to do with
    it. Not longer than any may be posted; who waits may go."""
    client, other = stage.ready(), stage.ready()
    stage.dedup_public.crowded, stage.hold_ends = 1, True
    for number in range(MOST + 1):
        client.request(WRITE, number * BLOCK, BLOCK)
    stage.until(lambda: stage.counters()["posted_waits"] == 1 and client.results == MOST)
    other.request(WRITE, 1000 * BLOCK, BLOCK)
    stage.until(lambda: stage.counters()["posted_waits"] == 2)
    for _ in range(100):
        stage.turn()
    assert posted(stage) == MOST and len(stage.uses) == MOST and client.results == MOST and other.results == 0
    if stage.config["nic"]["engine"] == "io_uring":
        stage.kill()
        stage.start()
    other.close()
    stage.hold_ends = False
    stage.until(lambda: client.results == MOST + 1 and stage.closed_count == 1)
    assert posted(stage) == MOST + 2
    stage.settle()

    stage.hold_ends = True
    for number in range(MOST + 1):
        client.request(WRITE, number * BLOCK, BLOCK)
    stage.until(lambda: client.results == 2 * MOST + 1)
    stage.posts = 0
    stage.until(lambda: client.results == 2 * MOST + 2, "by nbd")
    assert posted(stage) == 2 * MOST + 2
    stage.hold_ends = False
    stage.settle()
    stage.check()


def test_few_large_ones_do_not_make_others_wait(stage: Stage) -> None:
    """So few that dedup, if it dozes, is not woken for them."""
    client = stage.ready()
    stage.dedup_public.crowded, stage.hold_ends = 1, True
    for number in range(MOST // 16 + 1):
        write(stage, client, number * 16 * BLOCK, 16)
    assert posted(stage) == MOST // 16 and stage.counters()["posted_waits"] == 0
    stage.hold_ends = False
    stage.settle()
    stage.check()


def test_what_is_not_posted(stage: Stage) -> None:
    """Less than whole blocks, many blocks, what does not fit the volume as it is now, and before dedup has served."""
    client = stage.ready()
    for offset, length in ((512, BLOCK), (0, BLOCK - 512), (0, 17 * BLOCK), (0, 3 * 64 * BLOCK)):
        client.request(WRITE, offset, length)
        stage.settle()
    for fields in (
        {"size_bytes": 5 * BLOCK - 1},
        {"size_bytes": 4 * BLOCK},
        {"size_bytes": 100},
        {"flags": lib.ATOLL_VOLUME_READONLY},
        {"generation": GENERATION + 1},
        {"state": lib.ATOLL_VOLUME_DELETING},
    ):
        stage.publish(**fields)
        write(stage, client, 4 * BLOCK)
    stage.publish()
    stage.dedup_public.volumes[VOLUME].version += 1  # is being changed
    write(stage, client, 0)
    stage.dedup_public.volumes[VOLUME].version += 1
    physmap.header(lib.ATOLL_ROLE_DEDUP).serving_ns = 0
    write(stage, client, 0)
    physmap.header(lib.ATOLL_ROLE_DEDUP).serving_ns = 1
    assert posted(stage) == 0
    write(stage, client, 0, 16)
    assert posted(stage) == 1
    stage.settle()
    stage.check()


@pytest.mark.parametrize("flags", [FUA, 2, 1 << 15, PAYLOAD_LEN])
def test_requests_with_flags_are_not_posted(stage: Stage, flags: int) -> None:
    client = stage.ready()
    client.expected[77] = (WRITE, 0, BLOCK)
    client.out += struct.pack(">IHHQQI", REQUEST_MAGIC, flags, WRITE, 77, 0, BLOCK) + pattern(0, BLOCK)
    stage.settle()
    assert posted(stage) == 0 and client.results == 1


@pytest.mark.parametrize("volume", [0, lib.ATOLL_VOLUME_COUNT + 1, 1 << 31])
def test_only_where_nbd_has_named_a_volume(stage: Stage, volume: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nicstage.VOLUME", volume - 1)
    client = stage.ready()
    write(stage, client, 0)
    stage.settle()
    assert posted(stage) == 0


@pytest.mark.parametrize("mixes", [False, True])
def test_not_between_the_parts_of_a_reply(stage: Stage, mixes: bool) -> None:
    """Unless the framing lets replies be mixed."""
    stage.mixes = mixes
    client = stage.ready()
    client.request(READ, 0, 3 * 64 * BLOCK)
    client.reads = False
    client.turn()
    stage.until(lambda: any(use.type == READ and use.done for use in stage.uses.values()))
    stage.until(lambda: stage.counters()["send_operations"] > 0)
    for _ in range(50):
        stage.turn()
    client.raw = True
    client.request(WRITE, 0, BLOCK)
    stage.until(lambda: stage.counters()["requests"] == 2)
    stage.call("status")  # answered after the step that counts it
    assert posted(stage) == mixes
    if not mixes:
        client.raw, client.reads = False, True
        stage.settle()
        write(stage, client, 0)
        assert posted(stage) == 1


def test_the_answer_with_extended_headers(stage: Stage) -> None:
    stage.framing = lib.ATOLL_FRAMING_EXTENDED
    client = stage.ready()
    client.raw = True
    cookie, offset = 0x1122334455667788, 5 * BLOCK
    header = struct.pack(">IHHQQQ", EXTENDED_MAGIC, PAYLOAD_LEN, WRITE, cookie, offset, BLOCK)
    stage.hold = stage.hold_ends = True
    client.out += header + pattern(offset, BLOCK)
    stage.until(lambda: len(client.into) >= 32)
    assert client.into == struct.pack(">IHHQQQ", EXTENDED_REPLY_MAGIC, 1, 0, cookie, offset, 0)
    stage.hold = False
    stage.until(lambda: len(stage.ends) == 1)
    assert (stage.ends[0][0].offset, stage.ends[0][0].length) == (offset, BLOCK) and posted(stage) == 1
    stage.hold_ends = False
    stage.until(lambda: not stage.uses)
    stage.check()


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random(seed: int) -> None:
    """Answered once, told to nbd once, in order; whenever nic dies."""
    print("seed", seed)
    chance = random.Random(seed)
    with Stage(seed=seed) as stage:
        stage.start()
        clients = [stage.ready() for _ in range(3)]
        for _ in range(90):
            for client in clients:
                for _ in range(chance.randrange(20)):
                    kind = WRITE if chance.random() < 0.8 else READ
                    blocks = chance.choice((1, 1, 1, 2, 16, 70))
                    client.request(kind, chance.randrange(1000) * BLOCK, blocks * BLOCK)
            for _ in range(chance.randrange(12)):
                stage.turn()
            if chance.random() < 0.4:
                stage.kill()
                stage.start()
        stage.settle()
        assert posted(stage) > 100
        stage.until(lambda: stage.nic_public().posting == 0)
        stage.check()


@pytest.mark.parametrize("bad", ["reply", "next", "twice"])
def test_what_others_may_not_say(stage: Stage, bad: str) -> None:
    """It answers what has been answered; it asks for more of it; it ends the same write twice."""
    stage.take_share, stage.hold_ends = 0.0, True
    client = stage.ready()
    write(stage, client, 0)
    stage.until(lambda: len(stage.ends) == 1)
    use, _ = stage.ends[0]
    if bad == "reply":
        stage.put(NBD, opcode=lib.ATOLL_OP_REPLY, identity=use.identity, flags=LAST)
        stage.until(lambda: client.closed and stage.counters()["bad_message"] == 1)
    elif bad == "next":
        stage.put(NBD, opcode=lib.ATOLL_OP_NEXT, identity=use.identity)
        stage.until(lambda: stage.counters()["bad_message"] == 1)
        assert stage.call("status")["buffer_pages_lent"] == 1
    else:
        for _ in range(2):
            stage.put(DEDUP, opcode=lib.ATOLL_OP_END, identity=use.identity)
        stage.ends.clear()
        stage.uses.clear()
        stage.until(lambda: stage.counters()["bad_message"] == 1)
    stage.hold_ends = False
    other = stage.ready()
    write(stage, other, 0)
    stage.settle()
    stage.check()


def quiet_look(stage: Stage) -> Client:
    """One waits, and has looked again since in a step that changed nothing."""
    client = stage.ready()
    stage.dedup_public.crowded, stage.hold_ends = 1, True
    for number in range(MOST + 1):
        client.request(WRITE, number * BLOCK, BLOCK)
    stage.until(lambda: stage.counters()["posted_waits"] == 1 and client.results == MOST and len(stage.ends) == MOST)
    client.request(WRITE, MOST * BLOCK, BLOCK)  # more comes from who waits: nic looks at it again
    turns = stage.counters()["turns"]
    stage.until(lambda: stage.counters()["turns"] > turns + 2)
    return client


def test_who_waits_sees_that_none_may_be_posted(stage: Stage) -> None:
    client = quiet_look(stage)
    stage.posts = 0
    stage.until(lambda: client.results >= MOST + 1, "by nbd")
    assert posted(stage) == MOST


def test_none_is_posted_after_that_was_forbidden(stage: Stage) -> None:
    """SP-POST: what ENDs tell of came after posted_blocks had become 0."""
    client = quiet_look(stage)
    stage.posts = 0
    stage.dedup_public.posted_blocks = 0
    stage.hold_ends = False
    stage.until(lambda: client.results >= MOST + 1)
    assert posted(stage) == MOST
