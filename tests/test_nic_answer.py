"""READs that nic answers by itself out of dedup's table: which, what it says, and what is kept until it is sent."""

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
    NBD,
    PART,
    READ,
    REPLY_MAGIC,
    REQUEST_MAGIC,
    VOLUME,
    WRITE,
    Client,
    Stage,
    pattern,
)

from atoll.ipc import crashpoint, physmap
from atoll.ipc._ipc import lib

EXTENDED_MAGIC, EXTENDED_REPLY_MAGIC, CHUNK_MAGIC = 0x21E41C71, 0x6E8A278C, 0x668E33EF
FUA, DF = 1, 4
COOKIE = 0x1122334455667788


@pytest.fixture(params=["io_uring", "sockets"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with Stage(engine=request.param) as made:
        made.posts = 0
        made.put_in_memory(0, 32 * BLOCK)
        made.start()
        yield made


def from_memory(stage: Stage) -> int:
    return stage.counters()["reads_from_memory"]


def read(stage: Stage, client: Client, offset: int, length: int = BLOCK, flags: int = 0) -> bool:
    """Answered, and with the right bytes, which the client sees to. True: nbd has heard nothing of it."""
    before, results = from_memory(stage), client.results
    client.expected[client.next_cookie] = (READ, offset, length)
    client.out += struct.pack(">IHHQQI", REQUEST_MAGIC, flags, READ, client.next_cookie, offset, length)
    client.next_cookie += 1
    stage.until(lambda: client.results == results + 1)
    return from_memory(stage) > before


def used_pages(stage: Stage) -> set[int]:
    """Those that nobody may put anything else into."""
    return {page for page in range(32) if stage.memory.in_use(page)}


def wait_unused(stage: Stage) -> None:
    """What a client has read may not yet be known to be sent."""
    stage.until(lambda: not used_pages(stage), "no page is in use")


def unread(stage: Stage) -> Client:
    """A client that has been answered from memory and does not read it."""
    client = stage.ready()
    client.reads = False
    for _ in range(40):  # more than a socket takes
        client.request(READ, 16 * BLOCK, 16 * BLOCK)
    stage.until(lambda: from_memory(stage) == 40)
    return client


def test_what_lies_in_memory_needs_no_message(stage: Stage) -> None:
    client = stage.ready()
    stage.hold = True
    ranges = [
        (0, BLOCK),
        (5 * BLOCK + 512, 1024),
        (3 * BLOCK + 100, 4 * BLOCK),
        (8 * BLOCK, 16 * BLOCK),
        (2 * BLOCK - 1, 2),
        (7, 1),
    ]
    for offset, length in ranges:
        assert read(stage, client, offset, length)
    counters = stage.counters()
    assert (counters["reads_from_memory"], counters["requests"]) == (6, 6)
    assert counters["bytes_from_memory"] == sum(length for _, length in ranges)
    wait_unused(stage)
    status = stage.call("status")
    assert status["slots_in_use"] == 0
    stage.check()


def test_what_goes_to_nbd(stage: Stage) -> None:
    """Large reads, what is not in the table, flags, and what does not fit the volume as it is now."""
    client = stage.ready()
    assert not read(stage, client, 8 * BLOCK, 16 * BLOCK + 1)
    assert not read(stage, client, 8 * BLOCK + 1, 16 * BLOCK)  # touches one more
    assert not read(stage, client, 31 * BLOCK, 2 * BLOCK)
    assert not read(stage, client, 100 * BLOCK)
    for flags in (FUA, DF, 8, 1 << 15):  # without structured replies DF is an error, which nbd tells
        assert not read(stage, client, 0, BLOCK, flags)
    fields: dict[str, int]
    for fields in (
        {"size_bytes": 5 * BLOCK - 1},
        {"size_bytes": 100},
        {"generation": GENERATION + 1},
        {"state": lib.ATOLL_VOLUME_DELETING},
    ):
        stage.publish(**fields)
        assert not read(stage, client, 4 * BLOCK)
    stage.publish(size_bytes=5 * BLOCK, flags=lib.ATOLL_VOLUME_READONLY)
    assert read(stage, client, 4 * BLOCK)
    stage.publish()
    stage.dedup_public.volumes[VOLUME].version += 1  # is being changed
    assert not read(stage, client, 0)
    stage.dedup_public.volumes[VOLUME].version += 1
    kernel = physmap.header(lib.ATOLL_ROLE_KERNEL)
    kernel.trace_armed = 1
    assert not read(stage, client, 0)
    kernel.trace_armed = 0
    assert read(stage, client, 0)
    stage.check()


@pytest.mark.parametrize("volume", [0, lib.ATOLL_VOLUME_COUNT + 1, 1 << 31])
def test_only_where_nbd_has_named_a_volume(stage: Stage, volume: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nicstage.VOLUME", volume - 1)
    assert not read(stage, stage.ready(), 0)


def test_holes(stage: Stage) -> None:
    """Zeros, among simple replies; a chunk of another kind, which is nbd's business, where replies are chunks."""
    client = stage.ready()
    zero = stage.memory
    zero.put(VOLUME, GENERATION, 200, bytes(BLOCK))
    client.raw = True
    for mixes in (False, True):
        stage.mixes = mixes
        other = stage.ready() if mixes else client
        other.raw = True
        stage.hold = True
        other.out += struct.pack(">IHHQQI", REQUEST_MAGIC, 0, READ, COOKIE, 200 * BLOCK + 5, 1000)
        stage.until(lambda: stage.counters()["requests"] == 1 + mixes)  # noqa: B023
        if not mixes:
            stage.until(lambda: len(client.into) == 16 + 1000)
            assert client.into == struct.pack(">IIQ", REPLY_MAGIC, 0, COOKIE) + bytes(1000)
        stage.hold = False
    assert from_memory(stage) == 1
    stage.check()


@pytest.mark.parametrize("flags", [0, DF])
@pytest.mark.parametrize("extended", [False, True])
def test_the_answer_in_chunks(stage: Stage, extended: bool, flags: int) -> None:
    stage.mixes = True
    if extended:
        stage.framing = lib.ATOLL_FRAMING_EXTENDED
    client = stage.ready()
    client.raw = stage.hold = True
    offset, length = 5 * BLOCK + 512, 2 * BLOCK
    head = struct.pack(">IHHQQ", EXTENDED_MAGIC if extended else REQUEST_MAGIC, flags, READ, COOKIE, offset)
    client.out += head + struct.pack(">Q" if extended else ">I", length)
    begin = struct.pack(">IHHQ", EXTENDED_REPLY_MAGIC if extended else CHUNK_MAGIC, 1, 1, COOKIE)  # done, offset data
    begin += struct.pack(">QQ", offset, 8 + length) if extended else struct.pack(">I", 8 + length)
    begin += struct.pack(">Q", offset)
    stage.until(lambda: len(client.into) >= len(begin) + length)
    assert client.into == begin + pattern(offset, length)
    assert from_memory(stage) == 1
    stage.check()


def test_a_page_that_is_something_else_now_is_asked_for(stage: Stage) -> None:
    client = stage.ready()
    assert read(stage, client, 3 * BLOCK, 2 * BLOCK)
    stage.memory.retire(4)
    assert not read(stage, client, 3 * BLOCK, 2 * BLOCK)
    assert read(stage, client, 3 * BLOCK)
    wait_unused(stage)


def test_behind_a_posted_write(stage: Stage) -> None:
    """What is on its way to a block is asked for, by every client; what lies beside it is not."""
    stage.posts, stage.hold_ends = None, True
    stage.random.seed(1)
    client, other = stage.ready(), stage.ready()
    while not stage.ends:
        results = client.results
        client.request(WRITE, 3 * BLOCK, 2 * BLOCK)
        stage.until(lambda: client.results == results + 1)  # noqa: B023
    for each in (client, other):
        assert not read(stage, each, 4 * BLOCK)
        assert not read(stage, each, 2 * BLOCK, 4 * BLOCK)
        assert read(stage, each, 5 * BLOCK)
    if stage.config["nic"]["engine"] == "io_uring":
        stage.kill()
        stage.start()
        assert not read(stage, other, 4 * BLOCK)
    stage.hold_ends = False
    stage.until(lambda: not stage.ends)
    stage.until(lambda: stage.nic_public().posting == 0)
    assert read(stage, other, 4 * BLOCK)
    stage.check()


def test_not_between_the_parts_of_a_simple_reply(stage: Stage) -> None:
    client = stage.ready()
    client.request(READ, 0, 3 * PART)
    client.reads = False
    stage.until(lambda: any(use.done for use in stage.uses.values()))
    stage.until(lambda: stage.counters()["send_operations"] > 0)
    client.request(READ, 0, BLOCK)
    stage.until(lambda: stage.counters()["requests"] == 2)
    assert from_memory(stage) == 0
    client.reads = True
    stage.settle()
    assert read(stage, client, 0)
    stage.check()


def test_pages_stay_until_the_reply_is_sent(stage: Stage) -> None:
    """A client that does not read: what it is to get is put to no other use, over deaths of nic too."""
    client = unread(stage)
    stage.until(lambda: stage.counters()["send_operations"] > 0)
    assert used_pages(stage) == set(range(16, 32))
    if stage.config["nic"]["engine"] == "io_uring":
        for _ in range(3):
            stage.kill()
            stage.start()
            stage.check()
            assert used_pages(stage) == set(range(16, 32))
    for lba in range(16, 32):
        stage.memory.put(VOLUME, GENERATION, 1000 + lba, b"x" * BLOCK)
    client.reads = True
    stage.settle()
    wait_unused(stage)
    stage.check()


def test_pages_are_let_go_with_the_client(stage: Stage) -> None:
    client = unread(stage)
    client.close()
    stage.until(lambda: stage.closed_count == 1)
    wait_unused(stage)
    stage.until(lambda: stage.call("status")["slots_in_use"] == 0, "nbd's word about the end is heard")
    stage.check()


def test_a_use_of_a_step_that_died_holds_nothing() -> None:
    with Stage() as stage:
        stage.put_in_memory(0, 32 * BLOCK)
        stage.start()
        client = stage.ready()
        kernel = physmap.header(lib.ATOLL_ROLE_KERNEL)
        kernel.crash_sequence += 1
        kernel.crash_point = crashpoint.point_hash("nic.use.published")
        client.request(READ, 0, 4 * BLOCK)
        stage.dies()
        kernel.crash_point = 0
        assert used_pages(stage) == {0, 1, 2, 3}
        stage.memory.retire(2)
        stage.hold = True
        stage.start()
        stage.until(lambda: stage.counters()["requests"] == 1)
        assert not used_pages(stage) and from_memory(stage) == 0
        stage.hold = False
        stage.settle()
        stage.check()


def test_dedup_is_dead_and_another_comes(stage: Stage) -> None:
    """What lies in memory is read meanwhile; its successor's table is found."""
    client = stage.ready()
    assert read(stage, client, 0)
    header = physmap.header(DEDUP)
    lookup = stage.dedup_public.lookup
    entries = int(lookup.entries_address)
    lookup.entries_address = 0
    assert read(stage, client, 0), "looked up once in its life"
    header.incarnation += 1
    assert not read(stage, client, 0), "its successor has none"
    lookup.entries_address = entries
    assert not read(stage, client, 0)
    header.incarnation += 1
    assert read(stage, client, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"entries_address": 8},
        {"entries_address": 1 << 46},
        {"set_count": 0},
        {"set_count": 1 << 60},
        {"page_count": 1 << 62},
        {"generations_address": 1 << 46},
        {"zeros_bytes": 100},
        {"zeros_address": 1},
    ],
)
def test_a_table_that_lies_nowhere_is_not_looked_at(fields: dict[str, int]) -> None:
    with Stage() as stage:
        stage.put_in_memory(0, BLOCK)
        for name, value in fields.items():
            setattr(stage.dedup_public.lookup, name, value)
        stage.start()
        client = stage.ready()
        assert not read(stage, client, 0)
        stage.check()


@pytest.mark.parametrize("seed", range(3))
def test_nonsense_in_the_table_hurts_nobody(seed: int) -> None:
    """A damaged dedup: clients get wrong bytes, but as many as they asked for, and nic lives."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    with Stage(seed) as stage:
        stage.start()
        client = stage.ready()
        client.raw = True
        stage.posts = 0
        for _ in range(200):
            for lba in range(256):
                value = chance.choice(
                    [
                        chance.getrandbits(64),
                        lib.ATOLL_LOOKUP_PAGE << 62 | chance.randrange(300) << 32,
                        2 << 62,
                        3 << 62,
                    ]
                )
                stage.memory.forge(VOLUME, GENERATION, lba, value)
            length = chance.randrange(1, 8) * BLOCK
            client.request(READ, chance.randrange(200) * BLOCK, length)
            stage.until(lambda: len(client.into) == 16 + length)  # noqa: B023
            client.into.clear()
        assert from_memory(stage) > 0 and stage.counters()["bad_reference"] == 0
        stage.check()


def test_nbd_may_not_answer_it_again(stage: Stage) -> None:
    client = unread(stage)
    slot = next(number for number in range(lib.ATOLL_SLOT_COUNT) if stage.nic_public().uses.use[number])
    sequence = int(stage.nic_public().uses.use[slot]) >> 32
    connection = next(iter(stage.connections))
    stage.put(
        NBD, opcode=lib.ATOLL_OP_REPLY, identity=connection << 48 | slot << 32 | sequence, flags=lib.ATOLL_FLAG_LAST
    )
    stage.until(lambda: stage.counters()["bad_message"] == 1)
    client.close()
    stage.until(lambda: stage.closed_count == 1)
    stage.check()


def test_with_and_without_nbd(stage: Stage) -> None:
    """Requests of both kinds from several clients, in any mixture: all are answered once."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    stage.posts, stage.remember = None, 0.3
    clients: list[Any] = [stage.ready() for _ in range(5)]
    for _ in range(40):
        for client in clients:
            for _ in range(chance.randrange(30)):
                kind = chance.choice((READ, READ, READ, WRITE))
                blocks = chance.choice((1, 1, 1, 2, 16, 70))
                client.request(kind, chance.randrange(100) * BLOCK, blocks * BLOCK)
        for _ in range(chance.randrange(12)):
            stage.turn()
    stage.settle()
    counters = stage.counters()
    assert 0 < counters["reads_from_memory"] < counters["requests"] == sum(client.results for client in clients)
    assert counters["bad_message"] == counters["bad_reference"] == counters["lost_messages"] == 0
    stage.check()
