"""The nbd service as a process between stand-ins for nic and dedup: commands, kinds of replies, errors, limits."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator

import pytest
from nbdclient import ChunkType, Command, CommandFlag, ErrorCode, Rep, parse_option_reply
from nbdstage import BLOCK, PART, RANGE_PART, Stage, VolumeData, Wire

from atoll.ipc import physmap
from atoll.ipc._ipc import lib
from atoll.services import nbd
from atoll.services.nbd.negotiation import Framing, Option

MIB = 1 << 20
MODES = {"simple": (False, False), "structured": (True, False), "extended": (False, True)}


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes that are nowhere zero and differ from block to block."""
    return bytes((i * 7 + i // BLOCK + seed) % 255 + 1 for i in range(length))


@pytest.fixture
def stage() -> Iterator[Stage]:
    volumes = [
        VolumeData(0, b"disk", bytearray(4 * MIB)),
        VolumeData(5, b"fixed", bytearray(b"r" * 9000), read_only=True),
    ]
    with Stage(volumes) as made:
        made.start()
        yield made


@pytest.fixture(params=list(MODES))
def wire(stage: Stage, request: pytest.FixtureRequest) -> Wire:
    structured, extended = MODES[request.param]
    return stage.connect().negotiate(structured, extended)


def test_counters_have_names() -> None:
    assert len(nbd.COUNTERS) == lib_count() <= lib.ATOLL_COUNTER_COUNT


def lib_count() -> int:
    return int(nbd.lib.NBD_COUNTER_COUNT)


# --- Commands ---


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (0, 4096),
        (5, 4091),
        (4095, 2),
        (1, 3 * BLOCK),
        (100, PART),
        (0, PART),
        (4095, 2 * PART + 3),
        (7, 2 * MIB),
    ],
)
def test_write_then_read(stage: Stage, wire: Wire, offset: int, length: int) -> None:
    data = pattern(length)
    assert wire.call(Command.WRITE, offset, payload=data).error is None
    assert stage.volumes[0].data[offset : offset + length] == data
    assert wire.call(Command.READ, offset, length).check().data == data
    parts = [work for work in stage.log if work.opcode == lib.ATOLL_OP_WRITE]
    assert len(parts) == (offset % BLOCK + length + PART - 1) // PART
    assert all(work.segment_count <= 65 for work in parts)
    stage.check_quiet()


def test_payload_goes_by_reference(stage: Stage, wire: Wire) -> None:
    wire.submit(Command.WRITE, 8192, payload=pattern(BLOCK))
    (use,) = stage.uses.values()
    (page,) = use.pages
    stage.settle()
    assert stage.log[-1].address == stage.page_address(page) and page in stage.lent_pages


def test_holes(stage: Stage, wire: Wire) -> None:
    wire.call(Command.WRITE, 2 * BLOCK, payload=pattern(BLOCK))
    result = wire.call(Command.READ, 0, 5 * BLOCK).check()
    assert result.data == bytes(2 * BLOCK) + pattern(BLOCK) + bytes(2 * BLOCK)
    if wire.has_chunks:
        assert result.holes == [(0, 2 * BLOCK), (3 * BLOCK, 2 * BLOCK)]
        assert result.chunks == [ChunkType.OFFSET_HOLE, ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE]
        whole = wire.call(Command.READ, 0, 5 * BLOCK, CommandFlag.DF).check()
        assert whole.data == result.data and whole.chunks == [ChunkType.OFFSET_DATA]
        assert wire.call(Command.READ, 0, BLOCK, CommandFlag.DF).check().chunks == [ChunkType.OFFSET_HOLE]


def test_data_and_holes_in_turn_fill_the_largest_reply(stage: Stage, wire: Wire) -> None:
    for block in range(0, 64, 2):
        stage.volumes[0].data[block * BLOCK : (block + 1) * BLOCK] = pattern(BLOCK, block)
    result = wire.call(Command.READ, 0, 64 * BLOCK).check()
    assert result.data == stage.volumes[0].data[: 64 * BLOCK]
    assert wire.call(Command.READ, 1, 64 * BLOCK - 2).check().data == stage.volumes[0].data[1 : 64 * BLOCK - 1]


@pytest.mark.parametrize(
    ("command", "flags", "opcode", "expected"),
    [
        (Command.FLUSH, 0, "FLUSH", 0),
        (Command.FLUSH, CommandFlag.FUA, "FLUSH", "FUA"),
        (Command.TRIM, 0, "TRIM", 0),
        (Command.TRIM, CommandFlag.FUA, "TRIM", "FUA"),
        (Command.CACHE, 0, "CACHE", 0),
        (Command.WRITE_ZEROES, CommandFlag.NO_HOLE, "ZERO", "NO_HOLE"),
        (Command.WRITE_ZEROES, CommandFlag.FAST_ZERO, "ZERO", "FAST"),
        (Command.WRITE, CommandFlag.FUA, "WRITE", "FUA"),
        (Command.READ, CommandFlag.FUA, "READ", "FUA"),
    ],
)
def test_commands_and_flags_reach_dedup(
    stage: Stage, wire: Wire, command: int, flags: int, opcode: str, expected: str | int
) -> None:
    length = 0 if command == Command.FLUSH else 5000
    payload = pattern(5000) if command == Command.WRITE else b""
    assert wire.call(command, 0 if not length else 100, length, flags, payload).error is None
    work = stage.log[-1]
    assert work.opcode == getattr(lib, f"ATOLL_OP_{opcode}")
    assert work.flags == (getattr(lib, f"ATOLL_FLAG_{expected}") if expected else 0)
    assert (work.offset, work.length, work.volume, work.generation) == (100 if length else 0, length, 0, 1)


def test_the_last_part_of_a_write_carries_fua(stage: Stage, wire: Wire) -> None:
    wire.call(Command.WRITE, 0, flags=CommandFlag.FUA, payload=pattern(2 * PART)).check()
    assert [work.flags for work in stage.log] == [0, lib.ATOLL_FLAG_FUA]


def test_block_status(stage: Stage, wire: Wire) -> None:
    wire.call(Command.WRITE, 2 * BLOCK, payload=pattern(2 * BLOCK))
    result = wire.call(Command.BLOCK_STATUS, 100, 8 * BLOCK)
    if not wire.has_chunks:
        assert result.error is not None and result.error.code == ErrorCode.EINVAL
        return
    assert result.check().extents == [(2 * BLOCK - 100, 3), (2 * BLOCK, 0), (4 * BLOCK + 100, 3)]
    assert stage.log[-1].flags == 0
    one = wire.call(Command.BLOCK_STATUS, 100, 8 * BLOCK, CommandFlag.REQ_ONE).check()
    assert one.extents == [(2 * BLOCK - 100, 3)]
    assert stage.log[-1].flags == lib.ATOLL_FLAG_ONE


def test_block_status_of_many_extents_is_cut(stage: Stage, wire: Wire) -> None:
    if not wire.has_chunks:
        return
    for block in range(0, 1024, 2):
        stage.volumes[0].data[block * BLOCK] = 1
    extents = wire.call(Command.BLOCK_STATUS, 0, 4 * MIB).check().extents
    assert extents == [(BLOCK, 3 * (i % 2)) for i in range(nbd.lib.NBD_EXTENT_COUNT)]


def test_long_ranges_travel_in_parts() -> None:
    size = 1 << 40
    with Stage([VolumeData(0, b"disk", bytearray(0))]) as stage:
        stage.volumes[0].data = SizedOnly(size)  # type: ignore[assignment]
        stage.publish()
        stage.start()
        compact = stage.connect().negotiate()
        extended = stage.connect().negotiate(extended=True)
        seen: list[tuple[int, int]] = []

        def rule(work: object) -> int:
            seen.append((work.offset, work.length))  # type: ignore[attr-defined]
            return int(lib.ATOLL_OK)

        stage.rule = rule
        stage._apply = lambda *_: {}  # type: ignore[method-assign]
        compact.call(Command.TRIM, 4097, 2**32 - 1).check()
        assert seen[0] == (4097, RANGE_PART - 1) and seen[1][0] == 4096 + RANGE_PART
        assert sum(length for _, length in seen) == 2**32 - 1 and len(seen) == 64
        seen.clear()
        extended.call(Command.WRITE_ZEROES, 0, 10 << 30).check()
        assert sum(length for _, length in seen) == 10 << 30
        seen.clear()
        extended.call(Command.CACHE, 0, size).check()
        assert sum(length for _, length in seen) == 32 * MIB, "a hint is followed so far"

        def extents(work: object, slot: int, *_: object) -> dict[str, int]:
            nbd.ffi.memmove(nbd.ffi.cast("char *", stage.dedup_list(slot)), struct.pack("<QII", size, 3, 0), 16)
            return {"address": stage.dedup_list(slot), "length": 16}

        stage._apply = extents  # type: ignore[method-assign]
        assert extended.call(Command.BLOCK_STATUS, 0, size).check().extents == [(size, 3)]
        assert compact.call(Command.BLOCK_STATUS, 4096, 2**32 - 1).check().extents == [(2**32 - 1, 3)]
        stage.check_quiet()


def test_a_long_trim_of_who_has_left_ends_soon() -> None:
    """It is a hint. What says that it is kept, or that zeros are there, goes on to its end."""
    with Stage([VolumeData(0, b"disk", bytearray(0))]) as stage:
        stage.volumes[0].data = SizedOnly(1 << 40)  # type: ignore[assignment]
        stage.publish()
        stage.start()
        wire = stage.connect().negotiate(extended=True)
        ending = stage.nic_public().ending
        count = 0

        def rule(work: object) -> int:
            nonlocal count
            count += 1
            ending[wire.number] = count == 3
            return int(lib.ATOLL_OK)

        stage.rule = rule
        stage._apply = lambda *_: {}  # type: ignore[method-assign]
        wire.call(Command.TRIM, 0, 1 << 40).check()
        assert count == 3
        for command, flags in ((Command.TRIM, CommandFlag.FUA), (Command.WRITE_ZEROES, 0)):
            count = 2
            wire.call(command, 0, 10 * RANGE_PART, flags).check()
            assert count == 12
        stage.check_quiet()


class SizedOnly:
    """Stands for a volume too large to be there."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


# --- Errors ---


def expect_error(wire: Wire, code: int, *words: str, **request: object) -> None:
    result = wire.call(**request)  # type: ignore[arg-type]
    assert result.error is not None and result.error.code == code, result
    if wire.has_chunks:
        for word in words:
            assert word in result.error.text, result.error.text


def test_refusals(stage: Stage, wire: Wire) -> None:
    chunks = wire.has_chunks
    end = 4 * MIB
    bad = ErrorCode.EINVAL
    expect_error(wire, bad, "length 0", command=Command.READ, offset=77, length=0)
    expect_error(wire, bad, "past the end", "disk", str(end), command=Command.READ, offset=end - 1, length=2)
    expect_error(wire, bad, "past the end", command=Command.READ, offset=2**64 - 1, length=1)
    expect_error(wire, bad, "past the end", command=Command.TRIM, offset=end, length=1)
    expect_error(wire, bad, "past the end", command=Command.CACHE, offset=end, length=1)
    expect_error(wire, ErrorCode.ENOSPC, "past the end", command=Command.WRITE, offset=end - 3, payload=b"four")
    expect_error(wire, ErrorCode.ENOSPC, "past the end", command=Command.WRITE_ZEROES, offset=1, length=end)
    too_long = ErrorCode.EOVERFLOW if chunks else bad
    expect_error(wire, too_long, "limit", "33554432", command=Command.READ, offset=0, length=32 * MIB + 1)
    expect_error(wire, bad, "command 9", command=9, offset=0, length=1)
    expect_error(wire, bad, "command 65535", command=65535)
    expect_error(wire, bad, "0x0040", command=Command.READ, offset=0, length=1, flags=64)
    expect_error(wire, bad, "flags", command=Command.READ, offset=0, length=1, flags=CommandFlag.NO_HOLE)
    expect_error(wire, bad, "flags", command=Command.WRITE, offset=0, payload=b"x", flags=CommandFlag.DF)
    expect_error(wire, bad, "no range", command=Command.FLUSH, offset=1)
    expect_error(wire, bad, "no range", command=Command.FLUSH, length=1)
    if chunks:
        too_long_for_one = wire.call(Command.READ, 1, PART, CommandFlag.DF)
        assert too_long_for_one.error is not None and too_long_for_one.error.code == ErrorCode.EOVERFLOW
        assert wire.call(Command.READ, 4095, 65536, CommandFlag.DF).error is None
    else:
        expect_error(wire, bad, command=Command.READ, offset=0, length=1, flags=CommandFlag.DF)
    assert not [work for work in stage.log if work.opcode != lib.ATOLL_OP_READ], "nothing refused was executed"
    assert wire.call(Command.READ, 0, 1).check().data == b"\0", "the connection goes on"
    stage.check_quiet()
    assert not stage.lent_pages


def test_read_only_volume(stage: Stage) -> None:
    wire = stage.connect().negotiate(export=b"fixed")
    for command in (Command.TRIM, Command.WRITE_ZEROES):
        expect_error(wire, ErrorCode.EPERM, "read-only", "fixed", command=command, offset=0, length=10)
    expect_error(wire, ErrorCode.EPERM, "read-only", command=Command.WRITE, offset=0, payload=pattern(9000))
    assert wire.call(Command.READ, 8999, 1).check().data == b"r"
    wire.call(Command.FLUSH).check()
    stage.check_quiet()


def test_payload_over_the_limit(stage: Stage) -> None:
    """nic delivers it without the payload; the rest is to be thrown away, or with extended headers not waited for."""
    wire = stage.connect().negotiate()
    cookie = wire.submit(Command.WRITE, 0, 64 * MIB + 1)
    stage.settle()
    error = wire.results.pop(cookie).error
    assert error is not None and error.code == ErrorCode.EINVAL and "67108865" in error.text
    assert wire.call(Command.READ, 0, 1).error is None
    extended = stage.connect().negotiate(extended=True)
    cookie = extended.submit(Command.WRITE, 0, 2**63, CommandFlag.PAYLOAD_LEN)
    stage.settle()
    assert extended.results.pop(cookie).error is not None and extended.is_closed


def test_extended_headers_and_payload_flag(stage: Stage) -> None:
    wire = stage.connect().negotiate(extended=True)
    expect_error(wire, ErrorCode.EINVAL, "PAYLOAD_LEN", command=Command.WRITE, offset=0, length=10)
    expect_error(wire, ErrorCode.EINVAL, "flags", command=Command.READ, offset=0, payload=b"unwanted")
    expect_error(wire, ErrorCode.EINVAL, "flags", command=Command.BLOCK_STATUS, offset=0, payload=bytes(12))
    assert wire.call(Command.READ, 0, 3).error is None
    stage.check_quiet()


@pytest.mark.parametrize(
    ("status", "code", "word"),
    [
        ("EIO", ErrorCode.EIO, "device failed"),
        ("ENOSPC", ErrorCode.ENOSPC, "full"),
        ("ENOTSUP", ErrorCode.ENOTSUP, "fast"),
        ("ECORRUPT", ErrorCode.EIO, "checksum"),
        ("ENOENT", ErrorCode.ESHUTDOWN, "deleted"),
        ("EUNFLUSHED", ErrorCode.EIO, "acknowledged"),
        ("ENOMEM", ErrorCode.ENOMEM, "limit"),
    ],
)
def test_errors_of_dedup(stage: Stage, wire: Wire, status: str, code: int, word: str) -> None:
    stage.rule = lambda _work: int(getattr(lib, f"ATOLL_{status}"))
    expect_error(wire, code, word, "disk", "offset 8192", command=Command.READ, offset=8192, length=100)
    expect_error(wire, code, word, command=Command.WRITE, offset=8192, payload=b"x")
    expect_error(wire, code, word, command=Command.WRITE_ZEROES, offset=8192, length=1)
    expect_error(wire, code, word, command=Command.FLUSH)
    stage.rule = None
    assert wire.call(Command.READ, 8192, 1).error is None
    stage.check_quiet()


@pytest.mark.parametrize("status", ["EIO", "ECORRUPT", "ENOENT", "EPOISON", "EINVAL"])
def test_errors_that_nic_was_told_of(stage: Stage, wire: Wire, status: str) -> None:
    """The same that the client would hear if nbd had asked dedup, which it does not do any more."""
    number = int(getattr(lib, f"ATOLL_{status}"))
    offset, length = 8192 + 100, 3 * BLOCK
    asked = len(stage.log)
    for block, at in ((0, offset), (1, offset), (3, 4 * BLOCK), (4, 5 * BLOCK), (5, offset), (1 << 31, offset)):
        told = wire.submit(Command.READ, offset, length, failure=(number, 2, block))
        stage.settle()
        found = wire.results.pop(told).error
        assert len(stage.log) == asked
        stage.rule = lambda _work: number
        stage.failed_lba = 2 + block if block else 0
        same = wire.call(Command.READ, offset, length).error
        stage.rule, stage.failed_lba, asked = None, 0, len(stage.log)
        assert found is not None and same is not None
        assert (found.code, found.text, found.offset) == (same.code, same.text, same.offset)
        assert not wire.has_chunks or found.code != ErrorCode.EIO or found.offset == at
    assert wire.call(Command.READ, offset, length).error is None
    stage.check_quiet()


def test_error_in_a_later_part(stage: Stage, wire: Wire) -> None:
    stage.rule = lambda work: int(lib.ATOLL_EIO if work.part == 2 else lib.ATOLL_OK)
    expect_error(wire, ErrorCode.EIO, "LBA 128", command=Command.WRITE, offset=5, payload=pattern(4 * PART))
    assert len(stage.log) == 3
    cookie = wire.submit(Command.READ, 5, 4 * PART)
    stage.settle()
    if wire.has_chunks:
        error = wire.results.pop(cookie).error
        assert error is not None and error.code == ErrorCode.EIO and error.offset == 2 * PART
        assert not wire.is_closed
    else:
        assert wire.is_closed and cookie not in wire.results, "a simple reply cannot take back what it promised"
    stage.check_quiet()


def test_unknown_status_is_eio(stage: Stage, wire: Wire) -> None:
    stage.rule = lambda _work: 999
    expect_error(wire, ErrorCode.EIO, "999", command=Command.READ, offset=0, length=1)


# --- Connections ---


def test_wrong_magic_closes(stage: Stage, wire: Wire) -> None:
    other = stage.connect().negotiate()
    wire.submit(Command.READ, 0, 1, magic=0x12345678)
    stage.settle()
    assert wire.is_closed
    wire.leave()
    assert other.call(Command.READ, 0, 1).error is None
    assert stage.counters()["bad_magic"] == 1
    assert stage.area().public.volume[wire.number] == 0 and stage.area().public.volume[other.number] == 1


def test_disc_waits_for_what_is_under_way(stage: Stage, wire: Wire) -> None:
    stage.hold = True
    cookies = [wire.submit(Command.WRITE, i * BLOCK, payload=pattern(BLOCK)) for i in range(5)]
    wire.submit(Command.DISC)
    late = wire.submit(Command.READ, 0, 1)
    stage.settle(until=lambda: len(stage.waiting) == 5)
    for _ in range(20):
        stage.turn()
    assert not wire.is_closed
    stage.hold = False
    stage.settle()
    assert wire.is_closed and all(wire.results[cookie].error is None for cookie in cookies) and late not in wire.results
    wire.leave()
    stage.check_quiet()


def test_dedup_is_told_whether_requests_come_one_by_one(stage: Stage) -> None:
    wire = stage.connect().negotiate()
    stage.hold = True
    wire.submit(Command.WRITE, 0, payload=b"a" * BLOCK)
    stage.settle(until=lambda: len(stage.waiting) == 1)
    # The step of that one is over: in it nbd would have looked already at how many there are.
    stage.poll(lambda: bool(physmap.header(lib.ATOLL_ROLE_NBD).sleeping))
    os.kill(stage.pid, signal.SIGSTOP)
    os.waitpid(stage.pid, os.WUNTRACED)  # it runs no more
    for number in range(1, 9):
        wire.submit(Command.WRITE, number * BLOCK, payload=b"b" * BLOCK)
    os.kill(stage.pid, signal.SIGCONT)
    stage.settle(until=lambda: len(stage.waiting) == 9)
    alone = [work.alone for work in stage.waiting]
    assert alone[0] and not any(alone[1:8]), "the last of a step may be"
    stage.hold = False
    stage.settle()


def test_disc_alone(stage: Stage, wire: Wire) -> None:
    wire.submit(Command.DISC)
    stage.settle()
    assert wire.is_closed


def test_connection_gone_in_the_middle(stage: Stage, wire: Wire) -> None:
    wire.submit(Command.READ, 0, 4 * PART)
    wire.submit(Command.WRITE, 0, payload=pattern(4 * PART))
    stage.settle(until=lambda: len(stage.log) > 1)
    wire.leave()
    stage.check_quiet()
    assert stage.area().connections[wire.number].negotiation.state == nbd.lib.NBD_CONNECTION_FREE


def test_volume_deleted_resized_replaced(stage: Stage, wire: Wire) -> None:
    volume = stage.volumes[0]
    volume.data += bytes(BLOCK)
    expect_error(wire, ErrorCode.EINVAL, command=Command.READ, offset=4 * MIB, length=1)
    stage.publish()
    assert wire.call(Command.READ, 4 * MIB, 1).error is None, "grown"
    volume.generation += 1
    stage.publish()
    expect_error(wire, ErrorCode.ESHUTDOWN, "deleted", command=Command.READ, offset=0, length=1)
    del stage.volumes[0]
    stage.publish()
    expect_error(wire, ErrorCode.ESHUTDOWN, "deleted", command=Command.WRITE, offset=0, payload=b"x")
    stage.check_quiet()


def test_table_of_volumes_being_changed(stage: Stage, wire: Wire) -> None:
    """dedup died in the middle of a change: requests wait until its successor has finished it; others go on."""
    table = nbd.ffi.cast("struct atoll_dedup_public *", stage.peers[lib.ATOLL_ROLE_DEDUP].role_area).volumes
    table[0].version += 1
    cookie = wire.submit(Command.READ, 0, 1)
    newcomer = stage.connect()
    progress = int(stage.area().connections[wire.number].requests)
    for _ in range(50):
        stage.turn()
    assert cookie not in wire.results and stage.area().connections[wire.number].requests == progress
    table[0].version += 1
    stage.settle()
    assert wire.results.pop(cookie).error is None
    newcomer.negotiate()
    table[0].version += 1
    newcomer_two = stage.connect()
    stage.settle()
    newcomer_two.take_stream()
    newcomer_two.send_flags()
    stage.settle()
    newcomer_two.send_option(Option.LIST)
    for _ in range(50):
        stage.turn()
    assert not newcomer_two.stream
    table[0].version += 1
    stage.settle()
    assert newcomer_two.stream


def test_negotiation_goes_through_the_process(stage: Stage) -> None:
    stage.volumes |= {i: VolumeData(i, (b"%03d" % i) * 85, bytearray(1)) for i in range(10, 120)}
    stage.publish()
    wire = stage.connect()
    stage.settle()
    assert wire.take_stream() == b"NBDMAGICIHAVEOPT\x00\x03" and wire.framing == Framing.CLIENT_FLAGS
    wire.send_flags()
    stage.settle()
    assert wire.framing == Framing.OPTION
    listing = wire.option(Option.LIST)
    assert len(listing) > 3 * nbd.lib.NBD_REPLY_BYTES
    count = 0
    while listing:
        _, kind, length = parse_option_reply(listing[:20])
        listing = listing[20 + length :]
        count += kind == Rep.SERVER
    assert count == 112 and kind == Rep.ACK
    wire.send_option(Option.LIST, length=70000)
    stage.settle()
    assert parse_option_reply(wire.take_stream()[:20])[1] == Rep.ERR_TOO_BIG and wire.is_closed
    wire.leave()
    stage.check_quiet()


def test_control(stage: Stage) -> None:
    wire = stage.connect().negotiate(extended=True)
    stage.connect()
    stage.settle()
    wire.call(Command.READ, 0, 1)
    assert stage.call("status")["connections"] == {"free": 2046, "greeted": 1, "transmission": 1}
    first, second = stage.call("connections")["connections"]
    assert first == {
        "connection": 0,
        "state": "transmission",
        "volume": "disk",
        "features": ["fixed", "no_zeroes", "extended", "allocation"],
        "in_flight": 0,
        "requests": 1,
    }
    assert second["state"] == "greeted" and second["volume"] is None
    assert not stage.call("nonsense")["ok"]
    assert stage.call("stop")["ok"]
    stage.ends()
    assert stage.last_status == 0


# --- Peers that break the contract (I8) ---


def test_nonsense_from_peers_is_dropped(stage: Stage, wire: Wire) -> None:
    nic, dedup = lib.ATOLL_ROLE_NIC, lib.ATOLL_ROLE_DEDUP
    good = wire.number << 48 | 40 << 32 | 1
    for sender in (nic, dedup):
        for opcode in range(256):
            if sender == nic and opcode in (
                lib.ATOLL_OP_OPEN,
                lib.ATOLL_OP_OPTION,
                lib.ATOLL_OP_REQUEST,
                lib.ATOLL_OP_CLOSED,
            ):
                continue
            stage.put(sender, opcode=opcode, identity=good, part=opcode)
        stage.put(sender, opcode=lib.ATOLL_OP_DONE, identity=2**64 - 1)
        stage.put(sender, opcode=lib.ATOLL_OP_REQUEST, identity=2**64 - 1)
        lib.atoll_domain_commit(stage.peers[sender].domain)
    stage.settle(until=lambda: stage.counters()["peer_faults"] + stage.counters()["stale_messages"] >= 512)
    assert wire.call(Command.READ, 0, 1).error is None


def test_bad_answers_of_dedup_are_eio(stage: Stage, wire: Wire) -> None:
    good = stage._apply
    outside = 0x123456789000
    answers = [
        {"address": outside, "length": 100},
        {"address": 0, "length": 0},
        {"address": stage.dedup_list(0), "length": 100, "segment_count": 131},
        {"address": outside, "length": 100, "segment_count": 2},
        {"address": stage.dedup_page(0, 0), "length": 99},
        {"address": 2**64 - 50, "length": 100},
    ]
    for answer in answers:
        stage._apply = lambda *_, answer=answer: answer  # type: ignore[method-assign]
        expect_error(
            wire, ErrorCode.EIO, "inside the server" if False else "", command=Command.READ, offset=0, length=100
        )
        expect = ErrorCode.EIO if wire.decoder is not None and wire.decoder.structured else None
        if expect is not None and answer["length"] in (0, 99, 100) and answer["address"] in (0, outside, 2**64 - 50):
            expect_error(wire, expect, command=Command.BLOCK_STATUS, offset=0, length=100)
    for answer in (
        ({"address": outside, "length": 16}, {"address": stage.dedup_list(0), "length": 0}) if wire.has_chunks else ()
    ):
        stage._apply = lambda *_, answer=answer: answer  # type: ignore[method-assign]
        expect_error(wire, ErrorCode.EIO, command=Command.BLOCK_STATUS, offset=0, length=100)
    stage._apply = good  # type: ignore[method-assign]
    assert wire.call(Command.READ, 0, 100).error is None
    assert stage.counters()["peer_faults"] >= len(answers)


def test_simple_replies_are_not_mixed(stage: Stage) -> None:
    """Between the parts of a READ nothing may stand that the client would take for its data; all are answered."""
    wire = stage.connect().negotiate(structured=False)
    stage.volumes[0].data[:] = pattern(4 * MIB)
    first = [wire.submit(Command.READ, 3, 3 * PART), wire.submit(Command.READ, 9, 2 * PART), wire.submit(Command.FLUSH)]
    stage.settle(until=lambda: any(slot.state == nbd.lib.NBD_SLOT_SENDING for slot in stage.area().slots[0:48]))
    late = [wire.submit(Command.WRITE, 0, payload=b"x"), wire.submit(Command.READ, 4 * MIB, 1), wire.submit(99)]
    wire.submit(Command.DISC)
    stage.settle()
    assert [wire.results[cookie].error is None for cookie in first + late] == [True] * 4 + [False] * 2
    assert wire.is_closed and stage.area().waiting == 0
    wire.leave()
    stage.check_quiet()
