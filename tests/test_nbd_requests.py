"""The rules of a request, in C, against a second reading of them in Python; parts; the client's decoder."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nbdclient import EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, Command, CommandFlag, Decoder, Request, request_bytes

from atoll.services.nbd._nbd import ffi, lib
from atoll.services.nbd.negotiation import Feature

MIB = 1 << 20
BLOCK, PART, RANGE_PART = lib.ATOLL_BLOCK_BYTES, lib.ATOLL_PART_BYTES, lib.ATOLL_RANGE_PART_BYTES

# Sizes at which something happens, and their neighbours.
EDGES = [0, 1, 511, BLOCK, 65536, PART, RANGE_PART, 32 * MIB, 64 * MIB, 2**32 - 1, 2**32, 2**40, 2**63, 2**64 - 1]
NUMBERS = st.one_of(
    st.builds(lambda edge, shift: min(max(edge + shift, 0), 2**64 - 1), st.sampled_from(EDGES), st.integers(-2, 2)),
    st.integers(0, 2**64 - 1),
)
FLAGS = st.one_of(st.integers(0, 63), st.integers(0, 65535))
TYPES = st.one_of(st.integers(0, 8), st.integers(0, 65535))
FEATURES = st.integers(0, 63).map(Feature)


def oracle(request: Request, features: Feature, size: int, read_only: bool) -> int:
    """doc/proto.md, sections "Request types", "Command flags", "Error values", rule by rule."""
    extended = Feature.EXTENDED in features
    chunks = extended or Feature.STRUCTURED in features
    payload = bool(request.flags & CommandFlag.PAYLOAD_LEN) if extended else request.command == Command.WRITE
    if request.command > Command.BLOCK_STATUS:
        return int(lib.ATOLL_EINVAL)
    command = Command(request.command)
    if command == Command.DISC:
        return int(lib.ATOLL_OK)
    allowed = {
        Command.READ: CommandFlag.DF if chunks else CommandFlag.NONE,
        Command.WRITE: CommandFlag.PAYLOAD_LEN if extended else CommandFlag.NONE,
        Command.WRITE_ZEROES: CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
        Command.BLOCK_STATUS: CommandFlag.REQ_ONE,
    }.get(command, CommandFlag.NONE) | CommandFlag.FUA
    if request.flags & ~int(allowed):
        return int(lib.ATOLL_EINVAL)
    if command == Command.WRITE and not payload:
        return int(lib.ATOLL_EINVAL)
    if command == Command.FLUSH:
        return int(lib.ATOLL_EINVAL if request.offset or request.length else lib.ATOLL_OK)
    if command == Command.BLOCK_STATUS and not (chunks and Feature.ALLOCATION in features):
        return int(lib.ATOLL_EINVAL)
    if request.length == 0:
        return int(lib.ATOLL_EINVAL)
    if read_only and command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES):
        return int(lib.ATOLL_EPERM)
    if command in (Command.READ, Command.WRITE) and request.length > (64 if Feature.UNTOLD in features else 32) * MIB:
        return int(lib.ATOLL_EOVERFLOW if chunks and command == Command.READ else lib.ATOLL_EINVAL)
    if request.offset + request.length > size:
        return int(lib.ATOLL_ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else lib.ATOLL_EINVAL)
    if request.flags & CommandFlag.DF and request.offset % BLOCK + request.length > PART:
        return int(lib.ATOLL_EOVERFLOW)
    return int(lib.ATOLL_OK)


@settings(max_examples=3000, deadline=None)
@given(
    command=TYPES,
    flags=FLAGS,
    cookie=st.integers(0, 2**64 - 1),
    offset=NUMBERS,
    length=NUMBERS,
    features=FEATURES,
    size=NUMBERS,
    read_only=st.booleans(),
)
@example(0, 4, 0, 4095, 65536, Feature.STRUCTURED, 2**40, False)
@example(0, 0, 0, 2**64 - 1, 1, Feature.STRUCTURED, 2**64 - 1, False)
def test_validation_is_the_oracles(
    command: int, flags: int, cookie: int, offset: int, length: int, features: Feature, size: int, read_only: bool
) -> None:
    extended = Feature.EXTENDED in features
    length &= 2**64 - 1 if extended else 2**32 - 1
    sent = Request(command, flags, cookie, offset, length)
    request = ffi.new("struct nbd_request *")
    header = request_bytes(sent, b"", extended)
    assert len(header) == (32 if extended else 28)
    assert lib.nbd_parse(header, features, request) == 0
    assert (request.type, request.flags, request.cookie) == (command, flags, cookie)
    assert (request.offset, request.length) == (offset, length)
    text = ffi.new("char[]", lib.NBD_TEXT_BYTES)
    status = lib.nbd_validate(request, features, size, read_only, "größe".encode() * 50, text)
    assert status == oracle(sent, features, size, read_only)
    assert bool(ffi.string(text)) == (status != lib.ATOLL_OK), "each refusal says why"


@given(st.binary(min_size=32, max_size=32), FEATURES)
def test_only_the_negotiated_magic_is_a_request(header: bytes, features: Feature) -> None:
    wanted = EXTENDED_REQUEST_MAGIC if Feature.EXTENDED in features else REQUEST_MAGIC
    request = ffi.new("struct nbd_request *")
    assert lib.nbd_parse(header, features, request) == (0 if header[:4] == struct.pack(">I", wanted) else -1)
    assert lib.nbd_parse(struct.pack(">I", wanted) + header[4:], features, request) == 0


def test_statuses_have_codes() -> None:
    """Every status, known or not, becomes a code that the protocol allows."""
    allowed = {1, 5, 12, 22, 28, 75, 95, 108}
    assert {lib.nbd_code(status) for status in range(1, 70000)} == allowed
    assert lib.nbd_code(lib.ATOLL_EUNFLUSHED) == 5 and lib.nbd_code(12345) == 5


@settings(max_examples=500, deadline=None)
@given(offset=NUMBERS, length=st.integers(1, 64 * MIB), unit=st.sampled_from([PART, RANGE_PART]))
def test_parts_cover_the_request(offset: int, length: int, unit: int) -> None:
    """In order, without gap; each touches so few blocks as the tables of a part hold; inner ends are whole blocks."""
    done = part = 0
    while done < length:
        piece = lib.nbd_part_bytes(offset, length, done, unit)
        assert 0 < piece <= min(length - done, unit)
        first, last = (offset + done) // BLOCK, (offset + done + piece - 1) // BLOCK
        assert last - first + 1 <= unit // BLOCK + 1
        done, part = done + piece, part + 1
        assert done == length or (offset + done) % BLOCK == 0
    assert done == length and part == -(-(offset % BLOCK + length) // unit)


@pytest.mark.parametrize("parts", [(1 << 32) - 1, 1 << 32, (1 << 32) + 1, (1 << 34) - 1])
def test_parts_are_more_than_a_slot_counts(parts: int) -> None:
    """A volume may have 1 EiB, and one TRIM with extended headers as much; slots number parts with 32 bits."""
    for lead in (0, 1, BLOCK - 1):
        done = parts * RANGE_PART - lead
        assert lib.nbd_part_bytes(lead, (1 << 60) - lead, done, RANGE_PART) == RANGE_PART


@given(st.lists(st.integers(1, 40), min_size=1), st.booleans())
def test_the_clients_decoder_takes_any_pieces(cuts: list[int], extended: bool) -> None:
    """The instrument itself: two interleaved replies, cut anywhere, give the same."""
    decoder = Decoder(structured=True, extended=extended)
    for cookie in (1, 2):
        decoder.expect(Request(Command.READ, 0, cookie, 100, 8))

    def chunk(cookie: int, flags: int, kind: int, payload: bytes) -> bytes:
        if extended:
            return struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, cookie, 100, len(payload)) + payload
        return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload

    stream = (
        chunk(1, 0, 1, struct.pack(">Q", 104) + b"wxyz")
        + chunk(2, 0, 2, struct.pack(">QI", 100, 8))
        + chunk(1, 1, 2, struct.pack(">QI", 100, 4))
        + chunk(2, 1, 0, b"")
    )
    results = []
    at = index = 0
    while at < len(stream):
        step = cuts[index % len(cuts)]
        results += decoder.feed(stream[at : at + step])
        at, index = at + step, index + 1
    assert [(result.request.cookie, result.data) for result in results] == [(1, b"\0\0\0\0wxyz"), (2, bytes(8))]
    assert decoder.buffered == 0
