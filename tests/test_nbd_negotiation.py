"""The handshake of the nbd service as a pure function: whole conversations, each rule by itself, and garbage."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbdclient import Info, OptionReply, Rep, TransmissionFlag, info_data, meta_data, parse_infos, parse_option_reply

from atoll.services.nbd import negotiation
from atoll.services.nbd._nbd import lib
from atoll.services.nbd.negotiation import (
    OPTION_LIMIT_BYTES,
    PIECE_BYTES,
    TRANSITIONS,
    Answer,
    Feature,
    Framing,
    Option,
    Phase,
    State,
    Volume,
)

DISK = Volume(3, 7, b"disk", 1 << 30)
OTHER = Volume(1, 2, b"other", 5000, read_only=True)
UNICODE = Volume(9, 1, "größe".encode(), 1)
VOLUMES = [OTHER, DISK, UNICODE]


def begin(flags: int = 3) -> State:
    answer = negotiation.client_flags(negotiation.opened().state, struct.pack(">I", flags))
    assert answer.state.phase == Phase.OPTIONS and answer.data == b"" and answer.framing == Framing.OPTION
    return answer.state


def ask(
    state: State, number: int, data: bytes = b"", length: int | None = None, volumes: list[Volume] | None = None
) -> Answer:
    header = b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length)
    return negotiation.option(state, header, data, VOLUMES if volumes is None else volumes)


def replies(data: bytes) -> list[OptionReply]:
    found = []
    while data:
        option, kind, length = parse_option_reply(data[:20])
        assert len(data) >= 20 + length
        found.append(OptionReply(option, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def only(answer: Answer, kind: int, *words: str) -> OptionReply:
    """The one reply of an answer that changes nothing but says why."""
    (reply,) = replies(answer.data)
    assert reply.type == kind, reply
    for word in words:
        assert word in reply.data.decode()
    return reply


# --- Conversations ---


def test_constants_are_those_of_c() -> None:
    assert negotiation.PIECE_BYTES == lib.NBD_REPLY_BYTES
    assert negotiation.NAME_LIMIT_BYTES == lib.ATOLL_VOLUME_NAME_BYTES - 1
    assert negotiation.MAXIMUM_PAYLOAD == lib.ATOLL_PAYLOAD_BYTES
    for feature in Feature:
        assert feature == getattr(lib, f"NBD_FEATURE_{feature.name}")
    for phase in Phase:
        assert phase == getattr(lib, f"NBD_CONNECTION_{phase.name}")
    for framing in Framing:
        assert framing == getattr(lib, f"ATOLL_FRAMING_{framing.name}")


def test_greeting() -> None:
    answer = negotiation.opened()
    assert answer.data == b"NBDMAGICIHAVEOPT\x00\x03"
    assert (answer.state.phase, answer.framing) == (Phase.GREETED, Framing.CLIENT_FLAGS)


def test_go_with_all_informations() -> None:
    answer = ask(begin(), Option.GO, info_data(b"disk", [*Info, 77]))
    assert answer.state.phase == Phase.TRANSMISSION and answer.volume == DISK and answer.framing == Framing.REQUEST
    export = parse_infos(replies(answer.data))
    assert replies(answer.data)[-1].type == Rep.ACK
    assert (export.size, export.name, export.block_sizes) == (1 << 30, "disk", (1, 4096, 32 << 20))
    assert export.description is not None and "1073741824" in export.description
    flags = TransmissionFlag
    assert export.flags == (
        flags.HAS_FLAGS
        | flags.SEND_FLUSH
        | flags.SEND_FUA
        | flags.SEND_TRIM
        | flags.SEND_WRITE_ZEROES
        | flags.CAN_MULTI_CONN
        | flags.SEND_CACHE
        | flags.SEND_FAST_ZERO
    )


def test_info_is_go_without_the_step() -> None:
    state = ask(begin(), Option.STRUCTURED_REPLY).state
    info, go = (ask(state, option, info_data(b"other")) for option in (Option.INFO, Option.GO))
    assert info.state == state and info.volume is None and info.framing == Framing.OPTION
    assert [(r.type, r.data) for r in replies(info.data)] == [(r.type, r.data) for r in replies(go.data)]
    flags = parse_infos(replies(info.data)).flags
    assert TransmissionFlag.READ_ONLY in flags and TransmissionFlag.SEND_DF in flags
    assert TransmissionFlag.SEND_TRIM not in flags and TransmissionFlag.SEND_WRITE_ZEROES not in flags


@pytest.mark.parametrize(("flags", "length"), [(1, 134), (3, 10), (0, 134), (2, 10)])
def test_export_name(flags: int, length: int) -> None:
    answer = ask(begin(flags), Option.EXPORT_NAME, b"disk")
    assert answer.state.phase == Phase.TRANSMISSION and answer.volume == DISK
    assert len(answer.data) == length and not any(answer.data[10:])
    assert struct.unpack(">Q", answer.data[:8]) == (1 << 30,)


@pytest.mark.parametrize("name", [b"nobody", b"\xff", b"x" * 5000])
def test_export_name_has_no_place_for_an_error(name: bytes) -> None:
    answer = ask(begin(), Option.EXPORT_NAME, name)
    assert answer.close and answer.data == b"" and answer.state.phase == Phase.CLOSING


def test_default_export() -> None:
    assert ask(begin(), Option.GO, info_data(b"")).volume == DISK
    assert ask(begin(), Option.GO, info_data(b""), volumes=[UNICODE, OTHER]).volume == OTHER
    only(ask(begin(), Option.GO, info_data(b""), volumes=[]), Rep.ERR_UNKNOWN, "no volumes")


def test_abort() -> None:
    answer = ask(begin(), Option.ABORT, b"some data that is ignored")
    assert answer.close and replies(answer.data) == [OptionReply(Option.ABORT, Rep.ACK, b"")]


def test_list() -> None:
    answer = ask(begin(), Option.LIST)
    names = [reply.data[4 : 4 + int.from_bytes(reply.data[:4], "big")] for reply in replies(answer.data)[:-1]]
    assert names == [b"other", b"disk", "größe".encode()]
    only(ask(begin(), Option.LIST, b"x"), Rep.ERR_INVALID, "no data")


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 18, 19, 20, 21, 22, 256])
def test_list_in_pieces(count: int) -> None:
    volumes = [Volume(i, 1, (b"%03d" % i) * 85, 1 << 40) for i in range(count)]
    answer = ask(begin(), Option.LIST, volumes=volumes)
    stream, pieces = answer.data, 1
    while answer.more:
        assert answer.framing == Framing.KEEP and len(answer.data) <= PIECE_BYTES
        answer = negotiation.more(answer.state, volumes)
        stream, pieces = stream + answer.data, pieces + 1
    found = replies(stream)
    assert [reply.data[4:259] for reply in found[:-1]] == [volume.name for volume in volumes]
    assert found[-1].type == Rep.ACK and answer.framing == Framing.OPTION
    assert answer.state == begin(), "nothing is kept of a LIST that is over"


def test_metadata_contexts() -> None:
    state = ask(begin(), Option.STRUCTURED_REPLY).state

    def contexts(option: Option, *queries: bytes, name: bytes = b"disk") -> tuple[list[bytes], State]:
        answer = ask(state, option, meta_data(name, list(queries)))
        found = replies(answer.data)
        assert found[-1].type == Rep.ACK
        return [reply.data[4:] for reply in found[:-1]], answer.state

    everything = [b"base:allocation"]
    assert contexts(Option.LIST_META_CONTEXT)[0] == everything
    assert contexts(Option.LIST_META_CONTEXT, b"base:")[0] == everything
    assert contexts(Option.LIST_META_CONTEXT, b"x-y:z", b"base:allocation")[0] == everything
    assert contexts(Option.LIST_META_CONTEXT, b"base:other", b"qemu:")[0] == []
    assert contexts(Option.SET_META_CONTEXT)[0] == []
    assert contexts(Option.SET_META_CONTEXT, b"base:")[0] == [], "the wildcard selects nothing"
    found, chosen = contexts(Option.SET_META_CONTEXT, b"base:", b"base:allocation", b"base:allocation")
    assert found == everything
    assert Feature.ALLOCATION in ask(chosen, Option.GO, info_data(b"disk")).state.features
    assert Feature.ALLOCATION in ask(chosen, Option.GO, info_data(b"")).state.features, (
        "the same export by its other name"
    )
    assert Feature.ALLOCATION in ask(chosen, Option.EXPORT_NAME, b"disk").state.features
    assert Feature.ALLOCATION not in ask(chosen, Option.GO, info_data(b"other")).state.features
    forgotten = ask(chosen, Option.SET_META_CONTEXT, meta_data(b"nobody", [b"base:allocation"]))
    only(forgotten, Rep.ERR_UNKNOWN, "nobody")
    assert forgotten.state.meta_volume == 0, "a failed selection replaces the one before"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", Rep.ERR_INVALID),
        (b"\0\0\0", Rep.ERR_INVALID),
        (struct.pack(">I", 5) + b"disk", Rep.ERR_INVALID),
        (struct.pack(">I", 4) + b"disk", Rep.ERR_INVALID),
        (struct.pack(">I", 4) + b"disk" + struct.pack(">I", 1), Rep.ERR_INVALID),
        (struct.pack(">I", 4) + b"disk" + struct.pack(">I", 2**32 - 1), Rep.ERR_INVALID),
        (meta_data(b"disk", [b"base:"]) + b"x", Rep.ERR_INVALID),
        (meta_data(b"disk", [b"nocolon"]), Rep.ERR_INVALID),
        (meta_data(b"disk", [b"base:" + b"x" * 4096]), Rep.ERR_TOO_BIG),
        (meta_data(b"d\xffsk", []), Rep.ERR_INVALID),
    ],
)
@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_malformed_metadata_options(option: Option, data: bytes, kind: Rep) -> None:
    only(ask(ask(begin(), Option.STRUCTURED_REPLY).state, option, data), kind)


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_metadata_needs_structured_replies(option: Option) -> None:
    only(ask(begin(), option, meta_data(b"disk", [])), Rep.ERR_INVALID, "structured")


def test_extended_headers() -> None:
    answer = ask(begin(), Option.EXTENDED_HEADERS)
    only(answer, Rep.ACK)
    only(ask(answer.state, Option.STRUCTURED_REPLY), Rep.ERR_EXT_HEADER_REQD)
    assert ask(answer.state, Option.EXPORT_NAME, b"disk").close
    selected = ask(answer.state, Option.SET_META_CONTEXT, meta_data(b"disk", [b"base:allocation"])).state
    go = ask(selected, Option.GO, info_data(b"disk"))
    assert go.framing == Framing.EXTENDED
    assert go.state.features == Feature.FIXED | Feature.NO_ZEROES | Feature.EXTENDED | Feature.ALLOCATION
    only(ask(begin(), Option.EXTENDED_HEADERS, b"x"), Rep.ERR_INVALID)


# --- Bad input ---


@pytest.mark.parametrize("flags", [4, 0xFFFFFFFF, 1 << 31])
def test_unknown_client_flags_end_it(flags: int) -> None:
    assert negotiation.client_flags(negotiation.opened().state, struct.pack(">I", flags)).close


def test_wrong_option_magic_ends_it() -> None:
    answer = negotiation.option(begin(), b"IHAVEOPS" + bytes(8), b"", VOLUMES)
    assert answer.close and answer.data == b""


@pytest.mark.parametrize("number", [0, 4, 12, 2**32 - 1])
def test_unknown_option(number: int) -> None:
    answer = ask(begin(), number, b"whatever")
    reply = only(answer, Rep.ERR_UNSUP, str(number))
    assert reply.option == number and answer.state == begin() and not answer.close


def test_tls_is_not_supported() -> None:
    only(ask(begin(), Option.STARTTLS), Rep.ERR_UNSUP, "TLS")
    only(ask(begin(), Option.STARTTLS, b"x"), Rep.ERR_INVALID)


@pytest.mark.parametrize("number", [*Option, 99])
def test_option_of_absurd_length(number: int) -> None:
    answer = ask(begin(), number, b"", length=OPTION_LIMIT_BYTES + 1)
    assert answer.close and answer.state.phase == Phase.CLOSING
    if number == Option.EXPORT_NAME:
        assert answer.data == b""
    else:
        only(answer, Rep.ERR_TOO_BIG, str(OPTION_LIMIT_BYTES + 1))


@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [
        (b"nobody", Rep.ERR_UNKNOWN, "nobody"),
        (b"x" * 255, Rep.ERR_UNKNOWN, "x" * 255),
        (b"x" * 256, Rep.ERR_UNKNOWN, "the limit is 255"),
        (b"x" * 257, Rep.ERR_UNKNOWN, "257"),
        (b"x" * 4097, Rep.ERR_TOO_BIG, "4097"),
        (b"ab\xff", Rep.ERR_INVALID, "UTF-8"),
        (b"di\0sk", Rep.ERR_INVALID, "zero byte"),
    ],
)
@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_bad_names(option: Option, name: bytes, kind: Rep, word: str) -> None:
    answer = ask(begin(), option, info_data(name))
    only(answer, kind, word)
    assert answer.state == begin() and not answer.close


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\0\0\0", struct.pack(">I", 1) + b"\0\0", info_data(b"disk", [0])[:-1], info_data(b"disk") + b"\0"],
)
def test_malformed_go(data: bytes) -> None:
    only(ask(begin(), Option.GO, data), Rep.ERR_INVALID, "GO")


def test_without_fixed_newstyle_only_export_name() -> None:
    assert ask(begin(0), Option.LIST).close
    assert ask(begin(2), Option.GO, info_data(b"disk")).close


def test_frames_out_of_turn_end_it() -> None:
    assert negotiation.client_flags(begin(), bytes(4)).close
    assert ask(negotiation.opened().state, Option.LIST).close
    assert ask(ask(begin(), Option.EXPORT_NAME, b"disk").state, Option.LIST).close


# --- Anything at all ---

HEADERS = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.builds(
        lambda number, length: b"IHAVEOPT" + struct.pack(">II", number, length),
        st.sampled_from([*Option, 0, 4, 12, 2**32 - 1]),
        st.one_of(st.none(), st.integers(0, 2**32 - 1)).map(lambda length: -1 if length is None else length).map(abs),
    ),
)
DATA = st.one_of(
    st.binary(max_size=200),
    st.builds(info_data, st.sampled_from([b"", b"disk", b"other", b"x"]), st.lists(st.integers(0, 65535), max_size=5)),
    st.builds(
        meta_data,
        st.sampled_from([b"", b"disk", b"\xff"]),
        st.lists(st.sampled_from([b"base:", b"base:allocation", b"x:y", b"", b"z"]), max_size=4),
    ),
)


@settings(max_examples=400, deadline=None)
@given(flags=st.integers(0, 3), frames=st.lists(st.tuples(HEADERS, DATA, st.booleans()), max_size=12))
def test_any_frames_keep_the_rules(flags: int, frames: list[tuple[bytes, bytes, bool]]) -> None:
    """Every answer is a well-formed sequence of option replies, its transition is in the table, its state survives."""
    state = begin(flags)
    for header, data, honest in frames:
        if honest:
            header = header[:12] + struct.pack(">I", len(data))
        before = state.phase
        answer = negotiation.option(state, header, data, VOLUMES)
        state = answer.state
        assert state.phase in TRANSITIONS[before].get("option", (Phase.CLOSING,)), (before, state.phase)
        assert len(answer.data) <= PIECE_BYTES and answer.close == (state.phase == Phase.CLOSING)
        assert (answer.volume is not None) == (state.phase == Phase.TRANSMISSION)
        number = int.from_bytes(header[8:12], "big")
        if not (number == Option.EXPORT_NAME and state.phase == Phase.TRANSMISSION):
            found = replies(answer.data)
            finals = [reply for reply in found if reply.is_final]
            assert all(reply.option == number for reply in found)
            assert len(finals) == (1 if found else 0) and (not found or found[-1] == finals[0])
            assert found or answer.close, "an option is answered or the connection ends"
        if state.phase != Phase.OPTIONS:
            break
