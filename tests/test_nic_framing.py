"""Framing: each header against an oracle in Python; streams of frames, cut anywhere, against the messages made."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nicstage import BLOCK, LAST, Stage

from atoll.drivers import nic
from atoll.ipc._ipc import lib

FLAGS, OPTION, REQUEST, EXTENDED = (
    lib.ATOLL_FRAMING_CLIENT_FLAGS,
    lib.ATOLL_FRAMING_OPTION,
    lib.ATOLL_FRAMING_REQUEST,
    lib.ATOLL_FRAMING_EXTENDED,
)
SIZES = {FLAGS: 4, OPTION: 16, REQUEST: 28, EXTENDED: 32}


@dataclass
class Frame:
    payload: int = 0
    offset: int = 0
    hold: bool = False
    deliver: bool = True
    farewell: bool = False


def oracle(framing: int, header: bytes) -> Frame:
    if framing == FLAGS:
        return Frame(hold=True)
    if framing == OPTION:
        if header[:8] != b"IHAVEOPT":
            return Frame(hold=True)
        length = int.from_bytes(header[12:16], "big")
        return Frame(length, hold=True, deliver=length <= 65536)
    offset = int.from_bytes(header[16:24], "big")
    if framing == REQUEST:
        if header[:4] != bytes.fromhex("25609513"):
            return Frame(offset=offset, hold=True)
        length = int.from_bytes(header[24:28], "big") if header[6:8] == b"\0\1" else 0
    else:
        if header[:4] != bytes.fromhex("21e41c71"):
            return Frame(offset=offset, hold=True)
        length = int.from_bytes(header[24:32], "big") if header[5] & 32 else 0
    too_long = length > (64 << 20 if framing == REQUEST else 32 << 20)
    return Frame(length, offset, too_long, not too_long, header[6:8] == b"\0\2")


@st.composite
def headers(draw: st.DrawFn) -> tuple[int, bytes]:
    framing = draw(st.sampled_from(list(SIZES)))
    data = bytearray(draw(st.binary(min_size=SIZES[framing], max_size=SIZES[framing])))
    magic = {FLAGS: b"", OPTION: b"IHAVEOPT", REQUEST: b"\x25\x60\x95\x13", EXTENDED: b"\x21\xe4\x1c\x71"}[framing]
    if draw(st.booleans()) or draw(st.booleans()):
        data[: len(magic)] = magic
        if framing == REQUEST:
            data[6:8] = struct.pack(">H", draw(st.integers(0, 3)))
    if draw(st.booleans()) and framing != FLAGS:
        at = {OPTION: 12, REQUEST: 24, EXTENDED: 28}[framing]
        limits = [65536, 32 << 20, 64 << 20]
        length = draw(st.sampled_from([0, 1, *limits, *(limit + 1 for limit in limits)]))
        data[at : at + 4] = struct.pack(">I", length)
        if framing == EXTENDED:
            data[24:28] = bytes(4)
    return framing, bytes(data)


@given(headers())
def test_headers(case: tuple[int, bytes]) -> None:
    framing, header = case
    frame = nic.ffi.new("struct nic_frame *")
    nic.lib.nic_frame_read(framing, header, frame)
    expected = oracle(framing, header)
    assert frame.header_bytes == SIZES[framing] == nic.lib.nic_frame_header_bytes(framing)
    assert frame.opcode == (lib.ATOLL_OP_OPTION if framing in (FLAGS, OPTION) else lib.ATOLL_OP_REQUEST)
    found = Frame(frame.payload_bytes, frame.volume_offset, frame.hold, frame.deliver_payload, frame.farewell)
    assert found == expected


def test_no_framing_has_no_header() -> None:
    assert nic.lib.nic_frame_header_bytes(0) == nic.lib.nic_frame_header_bytes(77) == 0


@dataclass
class Seen:
    frames: list[tuple[bytes, bytes]] = field(default_factory=list)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as made:
        made.posts = 0  # all of it is for nbd: a whole block, posted, would go to dedup
        made.start()
        yield made


def write(length: int, offset: int) -> tuple[bytes, bytes]:
    return struct.pack(">IHHQQI", 0x25609513, 0, 1, 7, offset, length), bytes(i * 31 % 251 for i in range(length))


def other(kind: int, offset: int) -> tuple[bytes, bytes]:
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, 7, offset, 100_000), b""


frames = st.lists(
    st.one_of(
        st.builds(write, st.one_of(st.integers(0, 200), st.sampled_from([4096, 20_000, 70_000])), st.integers(0, 9000)),
        st.builds(other, st.sampled_from([0, 2, 3, 4, 6, 7]), st.integers(0, 1 << 60)),
    ),
    max_size=30,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames, st.lists(st.one_of(st.integers(1, 40), st.integers(1, 50_000)), min_size=1, max_size=20))
def test_streams_cut_anywhere(stage: Stage, sent: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    seen: list[tuple[bytes, bytes]] = []

    def collect(message: Any) -> dict[str, Any]:
        header = bytes(message.bytes)
        data = stage.payload(message) if message.length else b""
        if message.length and message.segment_count == 0:
            assert message.address % BLOCK == int.from_bytes(header[16:24], "big") % BLOCK
        seen.append((header[:28], data))
        return {"header": b"", "flags": LAST}

    stage.on_request = collect
    client = stage.connect("unix")
    stage.until(lambda: not client.greeting)
    client.raw = True  # what is answered is not looked at
    stream = b"".join(header + payload for header, payload in sent)
    position, turn = 0, 0
    while position < len(stream):
        cut = cuts[turn % len(cuts)]
        turn += 1
        if turn > 300:
            cut = len(stream)
        client.out += stream[position : position + cut]
        position += cut
        stage.until(lambda: not client.out)
    stage.until(lambda: len(seen) == len(sent))
    assert seen == sent
    client.close()
    stage.clients.remove(client)
    stage.until(lambda: not stage.connections)
    stage.check()
