"""READs that nic answers by itself out of dedup's table, or asks dedup for: which, what it says, and what is kept until
it is sent."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from nicstage import (
    BLOCK,
    DEDUP,
    GENERATION,
    LISTS_AT,
    MOST,
    NBD,
    NIC,
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
from atoll.ipc._ipc import ffi, lib

EXTENDED_MAGIC, EXTENDED_REPLY_MAGIC, CHUNK_MAGIC = 0x21E41C71, 0x6E8A278C, 0x668E33EF
FUA, DF, DISC = 1, 4, 2
DONE, DATA, HOLE = lib.ATOLL_OP_DONE, lib.ATOLL_SEGMENT_DATA, lib.ATOLL_SEGMENT_HOLE
DOZING = 2  # ipc/domain.c
COOKIE = 0x1122334455667788
MEMORY, ASKED, TO_NBD = "from memory", "asked", "to nbd"  # how nic has come by an answer


@pytest.fixture(params=["io_uring", "sockets"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with Stage(engine=request.param) as made:
        made.posts = 0
        made.refuses = 0
        made.put_in_memory(0, 32 * BLOCK)
        made.start()
        yield made


def from_memory(stage: Stage) -> int:
    return stage.counters()["reads_from_memory"]


def asked(stage: Stage) -> int:
    return stage.counters()["reads_asked"]


def read(stage: Stage, client: Client, offset: int, length: int = BLOCK, flags: int = 0) -> str:
    """Answered, and with the right bytes, which the client sees to; how."""
    before, results = (from_memory(stage), asked(stage)), client.results
    client.expected[client.next_cookie] = (READ, offset, length)
    client.out += struct.pack(">IHHQQI", REQUEST_MAGIC, flags, READ, client.next_cookie, offset, length)
    client.next_cookie += 1
    stage.until(lambda: client.results == results + 1)
    memory, dedup = from_memory(stage) - before[0], asked(stage) - before[1]
    assert (memory, dedup) in ((0, 0), (1, 0), (0, 1))
    return MEMORY if memory else ASKED if dedup else TO_NBD


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
        assert read(stage, client, offset, length) == MEMORY
    counters = stage.counters()
    assert (counters["reads_from_memory"], counters["requests"]) == (6, 6)
    assert counters["bytes_from_memory"] == sum(length for _, length in ranges)
    wait_unused(stage)
    status = stage.call("status")
    assert status["slots_in_use"] == 0
    stage.check()


def test_what_goes_to_nbd(stage: Stage) -> None:
    """Large reads, flags, and what does not fit the volume as it is now."""
    client = stage.ready()
    assert read(stage, client, 8 * BLOCK, 16 * BLOCK + 1) == TO_NBD
    assert read(stage, client, 8 * BLOCK + 1, 16 * BLOCK) == TO_NBD  # touches one more
    for flags in (FUA, DF, 8, 1 << 15):  # without structured replies DF is an error, which nbd tells
        assert read(stage, client, 0, BLOCK, flags) == TO_NBD
    fields: dict[str, int]
    for fields in (
        {"size_bytes": 5 * BLOCK - 1},
        {"size_bytes": 100},
        {"generation": GENERATION + 1},
        {"state": lib.ATOLL_VOLUME_DELETING},
    ):
        stage.publish(**fields)
        assert read(stage, client, 4 * BLOCK) == TO_NBD
    stage.publish(size_bytes=5 * BLOCK, flags=lib.ATOLL_VOLUME_READONLY)
    assert read(stage, client, 4 * BLOCK) == MEMORY
    stage.publish()
    stage.dedup_public.volumes[VOLUME].version += 1  # is being changed
    assert read(stage, client, 0) == TO_NBD
    stage.dedup_public.volumes[VOLUME].version += 1
    kernel = physmap.header(lib.ATOLL_ROLE_KERNEL)
    kernel.trace_armed = 1
    assert read(stage, client, 0) == read(stage, client, 100 * BLOCK) == TO_NBD
    kernel.trace_armed = 0
    assert read(stage, client, 0) == MEMORY
    stage.check()


@pytest.mark.parametrize("volume", [0, lib.ATOLL_VOLUME_COUNT + 1, 1 << 31])
def test_only_where_nbd_has_named_a_volume(stage: Stage, volume: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nicstage.VOLUME", volume - 1)
    assert read(stage, stage.ready(), 0) == TO_NBD


def chunk(extended: bool, kind: int, offset: int, length: int) -> bytes:
    """The only one of a reply, up to the offset in its payload of so many bytes."""
    begin = struct.pack(">IHHQ", EXTENDED_REPLY_MAGIC if extended else CHUNK_MAGIC, 1, kind, COOKIE)  # 1: done
    begin += struct.pack(">QQ", offset, length) if extended else struct.pack(">I", length)
    return begin + struct.pack(">Q", offset)


def hole(mixes: bool, extended: bool, offset: int, length: int) -> bytes:
    """The reply that tells of one: a chunk of its own, or zeros among simple replies."""
    if not mixes:
        return struct.pack(">IIQ", REPLY_MAGIC, 0, COOKIE) + bytes(length)
    return chunk(extended, 2, offset, 12) + struct.pack(">I", length)


def raw_client(stage: Stage, mixes: bool, extended: bool) -> Client:
    """One whose replies are such, and are only collected; from now on nbd and dedup are held."""
    stage.mixes = mixes
    if extended:
        stage.framing = lib.ATOLL_FRAMING_EXTENDED
    client = stage.ready()
    client.raw = stage.hold = True
    return client


def raw_read(client: Client, extended: bool, offset: int, length: int, flags: int = 0) -> None:
    head = struct.pack(">IHHQQ", EXTENDED_MAGIC if extended else REQUEST_MAGIC, flags, READ, COOKIE, offset)
    client.out += head + struct.pack(">Q" if extended else ">I", length)


HOLES = pytest.mark.parametrize(("mixes", "extended"), [(False, False), (True, False), (True, True)])


@HOLES
def test_holes(stage: Stage, mixes: bool, extended: bool) -> None:
    """One after another; beside data, where replies are chunks, they are nbd's business."""
    for lba in (200, 201, 203):
        stage.memory.put(VOLUME, GENERATION, lba, bytes(BLOCK))
    stage.memory.put(VOLUME, GENERATION, 202, b"x" * BLOCK)
    client = raw_client(stage, mixes, extended)
    offset, length = 200 * BLOCK + 5, BLOCK + 1000
    raw_read(client, extended, offset, length)
    expected = hole(mixes, extended, offset, length)
    stage.until(lambda: len(client.into) == len(expected))
    assert client.into == expected
    assert from_memory(stage) == 1
    raw_read(client, extended, 201 * BLOCK, 3 * BLOCK)
    stage.until(lambda: stage.sent() == 1 if mixes else from_memory(stage) == 2)
    stage.check()


@pytest.mark.parametrize("flags", [0, DF])
@pytest.mark.parametrize("extended", [False, True])
def test_the_answer_in_chunks(stage: Stage, extended: bool, flags: int) -> None:
    client = raw_client(stage, True, extended)
    offset, length = 5 * BLOCK + 512, 2 * BLOCK
    raw_read(client, extended, offset, length, flags)
    begin = chunk(extended, 1, offset, 8 + length)
    stage.until(lambda: len(client.into) >= len(begin) + length)
    assert client.into == begin + pattern(offset, length)
    assert from_memory(stage) == 1
    stage.check()


def test_a_page_that_is_something_else_now_is_asked_for(stage: Stage) -> None:
    client = stage.ready()
    assert read(stage, client, 3 * BLOCK, 2 * BLOCK) == MEMORY
    stage.memory.retire(4)
    assert read(stage, client, 3 * BLOCK, 2 * BLOCK) == ASKED
    assert read(stage, client, 3 * BLOCK) == MEMORY
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
        assert read(stage, each, 4 * BLOCK) == ASKED
        assert read(stage, each, 2 * BLOCK, 4 * BLOCK) == ASKED
        assert read(stage, each, 5 * BLOCK) == MEMORY
    if stage.config["nic"]["engine"] == "io_uring":
        stage.kill()
        stage.start()
        assert read(stage, other, 4 * BLOCK) == ASKED
    stage.hold_ends = False
    stage.until(lambda: not stage.ends)
    stage.until(lambda: stage.nic_public().posting == 0)
    assert read(stage, other, 4 * BLOCK) == MEMORY
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
    assert read(stage, client, 0) == MEMORY
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
        identity = wait_asked(stage)
        assert not used_pages(stage) and from_memory(stage) == 0
        answer(stage, identity, 0, 4 * BLOCK)
        stage.settle()
        stage.check()


def test_dedup_is_dead_and_another_comes(stage: Stage) -> None:
    """What lies in memory is read meanwhile; its successor's table is found."""
    client = stage.ready()
    assert read(stage, client, 0) == MEMORY
    header = physmap.header(DEDUP)
    lookup = stage.dedup_public.lookup
    entries = int(lookup.entries_address)
    lookup.entries_address = 0
    assert read(stage, client, 0) == MEMORY, "looked up once in its life"
    header.incarnation += 1
    assert read(stage, client, 0) == ASKED, "its successor has none"
    lookup.entries_address = entries
    assert read(stage, client, 0) == ASKED
    header.incarnation += 1
    assert read(stage, client, 0) == MEMORY


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
        stage.refuses = 0
        stage.start()
        client = stage.ready()
        assert read(stage, client, 0) == ASKED
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

# --- What dedup is asked for ---


def wait_asked(stage: Stage) -> int:
    """The identity of the one read that dedup, which is held, has been asked for; it is taken."""
    message = ffi.new("struct atoll_descriptor *")
    stage.until(lambda: lib.atoll_domain_take(stage.peers[DEDUP].domain, NIC, message))
    assert message.opcode == lib.ATOLL_OP_READ
    lib.atoll_domain_commit(stage.peers[DEDUP].domain)
    return int(message.identity)


def held(stage: Stage, client: Client) -> int:
    """The identity of a read of block 100 that dedup has been asked for, and keeps."""
    stage.hold = True
    client.request(READ, 100 * BLOCK, BLOCK)
    return wait_asked(stage)


def answer(stage: Stage, identity: int, offset: int, length: int = BLOCK) -> None:
    fields = stage.data_of(identity >> 32 & 0xFFFF, offset, length)
    stage.put(DEDUP, opcode=DONE, identity=identity, part=lib.ATOLL_PART_NIC, **fields)


def test_what_is_not_in_memory_is_asked_for(stage: Stage) -> None:
    """Nbd hears nothing of it. Scattered or not, whole blocks or not."""
    client = stage.ready()
    before = sum(stage.seen.values())
    ranges = ((100 * BLOCK, BLOCK), (31 * BLOCK, 2 * BLOCK), (200 * BLOCK, 16 * BLOCK), (300 * BLOCK + 7, 9000))
    for offset, length in ranges:
        for _ in range(5):
            assert read(stage, client, offset, length) == ASKED
    counters = stage.counters()
    assert counters["reads_asked"] == counters["requests"] == sum(stage.seen.values()) - before == 20
    assert counters["bytes_asked"] == 5 * sum(length for _, length in ranges)
    stage.check()


def test_what_dedup_refuses_nbd_is_asked_for(stage: Stage) -> None:
    """Whatever is wrong with its answer: an error, or data that are too few, too many or nowhere."""
    stage.refuses = 1
    client = stage.ready()
    for number in range(30):
        assert read(stage, client, (100 + number) * BLOCK) == TO_NBD
    counters = stage.counters()
    assert (stage.refusals, counters["requests"]) == (30, 30)
    assert counters["bad_message"] == counters["bad_reference"] == 0
    stage.check()


def test_data_that_lie_nowhere_cost_the_connection(stage: Stage) -> None:
    client, other = stage.ready(), stage.ready()
    identity = held(stage, client)
    stage.put(DEDUP, opcode=DONE, identity=identity, part=lib.ATOLL_PART_NIC, address=1 << 46, length=BLOCK)
    stage.until(lambda: client.closed)
    assert stage.counters()["bad_reference"] == 1
    stage.hold = False
    assert read(stage, other, 0) == MEMORY
    stage.check()


@HOLES
def test_holes_that_dedup_tells_of(stage: Stage, mixes: bool, extended: bool) -> None:
    """As in test_holes."""
    client = raw_client(stage, mixes, extended)
    offset, length = 100 * BLOCK + 5, BLOCK
    area = stage.peers[DEDUP].role_area + LISTS_AT
    segments = ffi.cast("struct atoll_segment *", area)
    for index in range(2):
        segments[index].address, segments[index].length = stage.dedup_public.lookup.zeros_address, length // 2
    for kinds in ((HOLE, HOLE), (HOLE, DATA)):
        segments[0].kind, segments[1].kind = kinds
        raw_read(client, extended, offset, length)
        fields = {"address": area, "segment_count": 2, "length": length}
        stage.put(DEDUP, opcode=DONE, identity=wait_asked(stage), part=lib.ATOLL_PART_NIC, **fields)
        if mixes and DATA in kinds:
            stage.until(lambda: stage.sent() == 1)
            continue
        expected = hole(mixes, extended, offset, length)
        stage.until(lambda: len(client.into) == len(expected))  # noqa: B023
        assert client.into == expected
        client.into.clear()
    stage.check()


@pytest.mark.parametrize("extended", [False, True])
def test_the_farewell_waits_for_them(stage: Stage, extended: bool) -> None:
    """Nbd, which does not know of them, would close the connection. Over a death of nic, too."""
    magic, length = (EXTENDED_MAGIC, ">Q") if extended else (REQUEST_MAGIC, ">I")
    client = raw_client(stage, extended, extended)
    raw_read(client, extended, 100 * BLOCK, BLOCK)
    client.out += struct.pack(">IHHQQ", magic, 0, DISC, COOKIE, 0) + struct.pack(length, 0)
    identity = wait_asked(stage)
    if stage.config["nic"]["engine"] == "io_uring":
        stage.kill()
        stage.start()
    stage.check()  # nic has had turns
    assert stage.sent() == 0
    answer(stage, identity, 100 * BLOCK)
    size = (32 + 8 if extended else 16) + BLOCK
    stage.until(lambda: len(client.into) == size and stage.sent() == 1)
    assert client.into.endswith(pattern(100 * BLOCK, BLOCK))
    kinds = []

    def goodbye(message: Any) -> dict[str, Any]:
        kinds.append(int.from_bytes(bytes(message.bytes)[6:8], "big"))
        return {"flags": lib.ATOLL_FLAG_LAST | lib.ATOLL_FLAG_CLOSE}

    stage.on_request, stage.hold = goodbye, False
    stage.until(lambda: client.closed and stage.closed_count == 1)
    assert kinds == [DISC]
    stage.check()


def test_a_client_that_leaves_before_the_answer(stage: Stage) -> None:
    client, other = stage.ready(), stage.ready()
    identity = held(stage, client)
    client.close()
    stage.hold = False
    assert read(stage, other, 0) == MEMORY
    assert stage.closed_count == 0, "its slot is still in use"
    answer(stage, identity, 100 * BLOCK)
    stage.until(lambda: stage.closed_count == 1)
    stage.until(lambda: stage.call("status")["slots_in_use"] == 0)
    stage.check()


def test_an_answer_between_the_parts_of_a_simple_reply(stage: Stage) -> None:
    """It must not go there; nbd, which puts replies in order, asks again."""
    client = stage.ready()
    identity = held(stage, client)
    client.request(READ, 0, 3 * PART)
    client.reads = False
    sends = stage.counters()["send_operations"]
    stage.until(lambda: stage.sent() == 1)
    stage.hold = False
    stage.until(lambda: stage.counters()["send_operations"] > sends)
    answer(stage, identity, 100 * BLOCK)
    stage.until(lambda: stage.counters()["requests"] == 2)
    client.reads = True
    stage.settle()
    assert (client.results, asked(stage)) == (2, 0)
    stage.check()


def test_answers_out_of_turn_are_refused(stage: Stage) -> None:
    client = stage.ready()
    identity = held(stage, client)
    stage.put(DEDUP, opcode=lib.ATOLL_OP_END, identity=identity)  # it is not posted
    answer(stage, identity ^ 1, 100 * BLOCK)  # another use of the slot
    answer(stage, identity, 100 * BLOCK)
    stage.until(lambda: client.results == 1)
    answer(stage, identity, 100 * BLOCK)  # twice
    stage.until(lambda: stage.counters()["bad_message"] == 3)
    client.request(READ, 8 * BLOCK, 17 * BLOCK)
    message = ffi.new("struct atoll_descriptor *")
    stage.until(lambda: lib.atoll_domain_take(stage.peers[NBD].domain, NIC, message))
    answer(stage, message.identity, 8 * BLOCK)  # nbd has it
    stage.until(lambda: stage.counters()["bad_message"] == 4)
    stage.take(message)
    stage.hold = False
    stage.settle()
    stage.check()


def test_nbd_may_not_answer_what_dedup_was_asked_for(stage: Stage) -> None:
    client = stage.ready()
    identity = held(stage, client)
    stage.put(NBD, opcode=lib.ATOLL_OP_REPLY, identity=identity, flags=lib.ATOLL_FLAG_LAST)
    stage.until(lambda: client.closed)
    assert stage.counters()["bad_message"] == 1
    answer(stage, identity, 100 * BLOCK)
    stage.hold = False
    stage.until(lambda: stage.closed_count == 1)
    stage.check()


def test_dedup_does_not_doze_over_it(stage: Stage) -> None:
    """As it does over posted writes."""
    stage.posts, stage.hold_ends = MOST, True
    client = stage.ready()
    rung(stage)  # when nic began
    stage.hold = True
    physmap.header(DEDUP).sleeping = DOZING
    client.request(WRITE, 0, BLOCK)
    stage.until(lambda: client.results == 1)
    assert (stage.sent(DEDUP), stage.nic_public().asking, rung(stage)) == (1, 0, False)
    client.request(READ, 100 * BLOCK, BLOCK)
    stage.until(lambda: stage.sent(DEDUP) == 2)
    stage.until(lambda: rung(stage))
    assert stage.nic_public().asking
    physmap.header(DEDUP).sleeping = 0
    if stage.config["nic"]["engine"] == "io_uring":
        stage.kill()
        stage.start()
        assert stage.nic_public().asking
    stage.hold = stage.hold_ends = False
    stage.settle()
    stage.until(lambda: not stage.nic_public().asking)
    stage.check()


def rung(stage: Stage) -> bool:
    """Dedup was woken since the last look."""
    try:
        return os.eventfd_read(stage.bell) > 0
    except BlockingIOError:
        return False
