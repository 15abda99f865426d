"""The handshake of NBD, without I/O and without memory: a state and a frame in, reply bytes and the new state out.

- `State` is all that is kept of a connection; it is small enough to lie in the arena (struct nbd_negotiation).
- `opened()` greets; `client_flags(state, frame)` and `option(state, header, data, volumes)` answer a frame;
  `more(state, volumes)` goes on with an answer too long for one piece (LIST). Each returns an `Answer`.
- `TRANSITIONS` says which state takes which frame; `OPTIONS` which function answers which option.

Section names are those of doc/proto.md of the reference implementation; EXTENDED_HEADERS is its branch
extension-ext-header.

After a crash: the frame is still in the ring and the state is that of the last commit: the same call is made again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag

GREETING_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9

FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2  # sections "Handshake flags" and "Client flags": the same bits

OPTION_LIMIT_BYTES = 65536  # of an option's data; nic delivers no more
STRING_LIMIT_BYTES = 4096  # section "String": names longer than this are not to be supported
NAME_LIMIT_BYTES = 255  # a volume's name: VOLUME_NAME_BYTES in kernel/config.py
PIECE_BYTES = 6144  # NBD_REPLY_BYTES: of a reply that goes out in one piece

MINIMUM_BLOCK, PREFERRED_BLOCK, MAXIMUM_PAYLOAD = 1, 4096, 32 << 20

ALLOCATION = b"base:allocation"
ALLOCATION_ID = 1  # the id under which replies to BLOCK_STATUS name it


class Phase(IntEnum):
    """As enum nbd_connection_state, as far as Python sees it."""

    FREE = 0
    GREETED = 1
    OPTIONS = 2
    TRANSMISSION = 3
    CLOSING = 5


class Feature(IntFlag):
    """As enum nbd_feature."""

    FIXED = 1
    NO_ZEROES = 2
    STRUCTURED = 4
    EXTENDED = 8
    ALLOCATION = 16
    UNTOLD = 32


NO_FEATURES = Feature(0)


class Framing(IntEnum):
    """As enum atoll_framing: what nic cuts out of the stream next."""

    KEEP = 0
    CLIENT_FLAGS = 1
    OPTION = 2
    REQUEST = 3
    EXTENDED = 4


class Option(IntEnum):
    """Section "Option types"."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """Section "Option reply types"."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_UNKNOWN = 2**31 + 6
    ERR_TOO_BIG = 2**31 + 9
    ERR_EXT_HEADER_REQD = 2**31 + 10


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Flag(IntFlag):
    """Section "Transmission flags"."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


@dataclass(frozen=True)
class Volume:
    """An export, as dedup publishes it now."""

    id: int
    generation: int
    name: bytes
    size_bytes: int
    read_only: bool = False


@dataclass(frozen=True)
class State:
    phase: Phase = Phase.FREE
    features: Feature = NO_FEATURES
    meta_volume: int = 0  # id + 1 of the volume for which base:allocation is selected, 0: for none
    meta_generation: int = 0
    list_next: int = 0  # LIST under way: id of the next volume to name


@dataclass(frozen=True)
class Answer:
    state: State
    data: bytes = b""  # at most PIECE_BYTES
    framing: Framing = Framing.OPTION
    close: bool = False  # the connection is closed when `data` is sent
    more: bool = False  # `more()` is to be called when `data` is sent
    volume: Volume | None = None  # phase TRANSMISSION: the export in use


class _Refused(Exception):
    """An option cannot be granted; the client is told why and may go on."""

    def __init__(self, reply: Reply, text: str) -> None:
        super().__init__(text)
        self.reply, self.text = reply, text


Volumes = Sequence[Volume]


# --- Frames ---------------------------------------------------------------------------------------------------------


def opened() -> Answer:
    """A new connection. Section "Newstyle negotiation"."""
    greeting = GREETING_MAGIC + OPTION_MAGIC + struct.pack(">H", FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
    return Answer(State(Phase.GREETED), greeting, Framing.CLIENT_FLAGS)


def client_flags(state: State, frame: bytes) -> Answer:
    """The client's 4 bytes of flags. Unknown ones end the connection (section "Client flags")."""
    if len(frame) != 4 or "client_flags" not in TRANSITIONS[state.phase]:
        return _hang_up(state)
    (flags,) = struct.unpack(">I", frame)
    if flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
        return _hang_up(state)
    features = NO_FEATURES
    if flags & FLAG_FIXED_NEWSTYLE:
        features |= Feature.FIXED
    if flags & FLAG_NO_ZEROES:
        features |= Feature.NO_ZEROES
    return Answer(State(Phase.OPTIONS, features), framing=Framing.OPTION)


def option(state: State, header: bytes, data: bytes, volumes: Volumes) -> Answer:
    """An option: its 16 bytes of header, and its data (b"" if the header announces more than OPTION_LIMIT_BYTES)."""
    if len(header) != 16 or header[:8] != OPTION_MAGIC or "option" not in TRANSITIONS[state.phase]:
        return _hang_up(state)
    number, length = struct.unpack(">II", header[8:])
    if number != Option.EXPORT_NAME and not state.features & Feature.FIXED:
        return _hang_up(state)  # "the only valid option in nonfixed newstyle negotiation"
    if length != len(data):
        if number == Option.EXPORT_NAME:
            return _hang_up(state)
        text = f"option {number} with {length} bytes of data: at most {OPTION_LIMIT_BYTES} are taken"
        return replace(_hang_up(state), data=_reply(number, Reply.ERR_TOO_BIG, text.encode()))
    if number not in OPTIONS:
        text = f"option {number} is not known to this server"
        return Answer(state, _reply(number, Reply.ERR_UNSUP, text.encode()))
    try:
        return OPTIONS[Option(number)](state, data, volumes)
    except _Refused as refused:
        if number == Option.EXPORT_NAME:
            return _hang_up(state)  # its reply has no place for an error
        if number == Option.SET_META_CONTEXT:  # replaces what was selected, "including when this command fails"
            state = replace(state, meta_volume=0, meta_generation=0)
        return Answer(state, _reply(number, refused.reply, refused.text.encode()))


def more(state: State, volumes: Volumes) -> Answer:
    """The next piece of the answer to LIST; the piece before it is sent."""
    return _list_from(state, state.list_next, volumes)


def _hang_up(state: State) -> Answer:
    return Answer(replace(state, phase=Phase.CLOSING), framing=Framing.KEEP, close=True)


def _reply(number: int, reply: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", REPLY_MAGIC, number, reply, len(data)) + data


# --- Exports --------------------------------------------------------------------------------------------------------


def default_volume(volumes: Volumes) -> Volume | None:
    """What the empty name means: the volume "disk", else the one with the lowest id."""
    named = [volume for volume in volumes if volume.name == b"disk"]
    return named[0] if named else min(volumes, key=lambda volume: volume.id, default=None)


def transmission_flags(state: State, volume: Volume) -> Flag:
    flags = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_FUA | Flag.CAN_MULTI_CONN | Flag.SEND_CACHE
    if volume.read_only:
        flags |= Flag.READ_ONLY
    else:
        flags |= Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO
    if state.features & (Feature.STRUCTURED | Feature.EXTENDED):
        flags |= Flag.SEND_DF
    return flags


def description(volume: Volume) -> bytes:
    access = "read-only" if volume.read_only else "thin, deduplicated"
    return f"{access} volume of {volume.size_bytes} bytes".encode()


def _find(name: bytes, volumes: Volumes) -> Volume:
    if len(name) > STRING_LIMIT_BYTES:
        raise _Refused(Reply.ERR_TOO_BIG, f"export name of {len(name)} bytes: at most {STRING_LIMIT_BYTES} are allowed")
    try:
        shown = name.decode()
    except UnicodeDecodeError as error:
        raise _Refused(Reply.ERR_INVALID, f"export name is not UTF-8 (byte {error.start} of {len(name)})") from None
    if b"\0" in name:
        raise _Refused(Reply.ERR_INVALID, "export name holds a zero byte")
    if len(name) > NAME_LIMIT_BYTES:
        raise _Refused(Reply.ERR_UNKNOWN, f"no volume has a name of {len(name)} bytes; the limit is {NAME_LIMIT_BYTES}")
    if not name:
        volume = default_volume(volumes)
        if volume is None:
            raise _Refused(Reply.ERR_UNKNOWN, "this server has no volumes")
        return volume
    for volume in volumes:
        if volume.name == name:
            return volume
    raise _Refused(Reply.ERR_UNKNOWN, f'no volume "{shown}" on this server')


def _transmit(state: State, volume: Volume, data: bytes) -> Answer:
    """Into the transmission phase. base:allocation holds only for the export that it was selected for."""
    features = state.features & ~Feature.ALLOCATION
    if (state.meta_volume, state.meta_generation) == (volume.id + 1, volume.generation):
        features |= Feature.ALLOCATION
    framing = Framing.EXTENDED if features & Feature.EXTENDED else Framing.REQUEST
    return Answer(replace(state, phase=Phase.TRANSMISSION, features=features), data, framing, volume=volume)


# --- Options --------------------------------------------------------------------------------------------------------


def _export_name(state: State, data: bytes, volumes: Volumes) -> Answer:
    if state.features & Feature.EXTENDED:
        return _hang_up(state)  # "a client MUST NOT use NBD_OPT_EXPORT_NAME"
    volume = _find(data, volumes)
    reply = struct.pack(">QH", volume.size_bytes, transmission_flags(state, volume))
    untold = replace(state, features=state.features | Feature.UNTOLD)  # of MAXIMUM_PAYLOAD
    return _transmit(untold, volume, reply + (b"" if state.features & Feature.NO_ZEROES else bytes(124)))


def _abort(state: State, _data: bytes, _volumes: Volumes) -> Answer:
    return replace(_hang_up(state), data=_reply(Option.ABORT, Reply.ACK))


def _list(state: State, data: bytes, volumes: Volumes) -> Answer:
    _no_data(Option.LIST, data)
    return _list_from(state, 0, volumes)


def _list_from(state: State, first: int, volumes: Volumes) -> Answer:
    pieces = b""
    for volume in sorted(volumes, key=lambda volume: volume.id):
        if volume.id < first:
            continue
        entry = struct.pack(">I", len(volume.name)) + volume.name + description(volume)
        piece = _reply(Option.LIST, Reply.SERVER, entry)
        if len(pieces) + len(piece) > PIECE_BYTES:
            return Answer(replace(state, list_next=volume.id), pieces, Framing.KEEP, more=True)
        pieces += piece
    ack = _reply(Option.LIST, Reply.ACK)
    if len(pieces) + len(ack) > PIECE_BYTES:
        return Answer(replace(state, list_next=1 << 31), pieces, Framing.KEEP, more=True)
    return Answer(replace(state, list_next=0), pieces + ack)


def _starttls(state: State, data: bytes, _volumes: Volumes) -> Answer:
    _no_data(Option.STARTTLS, data)
    raise _Refused(Reply.ERR_UNSUP, "this server does not support TLS")


def _info(state: State, data: bytes, volumes: Volumes) -> Answer:
    return replace(_information(Option.INFO, state, data, volumes), volume=None)


def _go(state: State, data: bytes, volumes: Volumes) -> Answer:
    answer = _information(Option.GO, state, data, volumes)
    assert answer.volume is not None
    return _transmit(state, answer.volume, answer.data)


def _information(number: Option, state: State, data: bytes, volumes: Volumes) -> Answer:
    """INFO and GO: the same question and the same answer."""
    if len(data) < 6:
        raise _Refused(Reply.ERR_INVALID, f"{number.name} with {len(data)} bytes of data: at least 6 are needed")
    (name_bytes,) = struct.unpack_from(">I", data)
    if name_bytes > len(data) - 6:
        raise _Refused(
            Reply.ERR_INVALID,
            f"{number.name}: a name of {name_bytes} bytes does not fit into {len(data)} bytes of data",
        )
    name = data[4 : 4 + name_bytes]
    (count,) = struct.unpack_from(">H", data, 4 + name_bytes)
    if len(data) != 6 + name_bytes + 2 * count:
        raise _Refused(
            Reply.ERR_INVALID, f"{number.name}: {count} information requests do not fill {len(data)} bytes of data"
        )
    wanted = set(struct.unpack_from(f">{count}H", data, 6 + name_bytes))
    volume = _find(name, volumes)
    items = [struct.pack(">HQH", Info.EXPORT, volume.size_bytes, transmission_flags(state, volume))]
    if Info.NAME in wanted:
        items.append(struct.pack(">H", Info.NAME) + volume.name)
    if Info.DESCRIPTION in wanted:
        items.append(struct.pack(">H", Info.DESCRIPTION) + description(volume))
    if Info.BLOCK_SIZE in wanted:
        items.append(struct.pack(">HIII", Info.BLOCK_SIZE, MINIMUM_BLOCK, PREFERRED_BLOCK, MAXIMUM_PAYLOAD))
    replies = b"".join(_reply(number, Reply.INFO, item) for item in items)
    return Answer(state, replies + _reply(number, Reply.ACK), volume=volume)


def _structured_reply(state: State, data: bytes, _volumes: Volumes) -> Answer:
    _no_data(Option.STRUCTURED_REPLY, data)
    if state.features & Feature.EXTENDED:
        raise _Refused(
            Reply.ERR_EXT_HEADER_REQD, "extended headers are negotiated already and include structured replies"
        )
    return Answer(
        replace(state, features=state.features | Feature.STRUCTURED), _reply(Option.STRUCTURED_REPLY, Reply.ACK)
    )


def _extended_headers(state: State, data: bytes, _volumes: Volumes) -> Answer:
    _no_data(Option.EXTENDED_HEADERS, data)
    return Answer(
        replace(state, features=state.features | Feature.EXTENDED), _reply(Option.EXTENDED_HEADERS, Reply.ACK)
    )


def _list_meta_context(state: State, data: bytes, volumes: Volumes) -> Answer:
    _, queries = _queries(Option.LIST_META_CONTEXT, state, data, volumes)
    found = not queries or any(query in (b"base:", ALLOCATION) for query in queries)
    context = _reply(Option.LIST_META_CONTEXT, Reply.META_CONTEXT, struct.pack(">I", 0) + ALLOCATION)
    return Answer(state, (context if found else b"") + _reply(Option.LIST_META_CONTEXT, Reply.ACK))


def _set_meta_context(state: State, data: bytes, volumes: Volumes) -> Answer:
    volume, queries = _queries(Option.SET_META_CONTEXT, state, data, volumes)
    if ALLOCATION not in queries:  # "base:" selects nothing here
        state = replace(state, meta_volume=0, meta_generation=0)
        return Answer(state, _reply(Option.SET_META_CONTEXT, Reply.ACK))
    state = replace(state, meta_volume=volume.id + 1, meta_generation=volume.generation)
    context = _reply(Option.SET_META_CONTEXT, Reply.META_CONTEXT, struct.pack(">I", ALLOCATION_ID) + ALLOCATION)
    return Answer(state, context + _reply(Option.SET_META_CONTEXT, Reply.ACK))


def _queries(number: Option, state: State, data: bytes, volumes: Volumes) -> tuple[Volume, list[bytes]]:
    """Volume and queries of an option about metadata contexts. Section "Metadata querying"."""
    if not state.features & (Feature.STRUCTURED | Feature.EXTENDED):
        raise _Refused(Reply.ERR_INVALID, f"{number.name}: structured replies must be negotiated first")
    rest = memoryview(data)

    def take(count: int, what: str) -> bytes:
        nonlocal rest
        if count > len(rest):
            raise _Refused(
                Reply.ERR_INVALID,
                f"{number.name}: {what} of {count} bytes goes past the end of {len(data)} bytes of data",
            )
        taken, rest = bytes(rest[:count]), rest[count:]
        return taken

    def take_string(what: str) -> bytes:
        return take(int.from_bytes(take(4, f"length of {what}"), "big"), what)

    name = take_string("export name")
    count = int.from_bytes(take(4, "number of queries"), "big")
    queries = []
    for index in range(count):  # each takes four bytes at least, so the data bound the loop
        query = take_string(f"query {index + 1}")
        if len(query) > STRING_LIMIT_BYTES:
            raise _Refused(Reply.ERR_TOO_BIG, f"{number.name}: query {index + 1} of {len(query)} bytes is too long")
        if b":" not in query:
            raise _Refused(Reply.ERR_INVALID, f"{number.name}: query {index + 1} has no namespace (no colon)")
        queries.append(query)
    if len(rest):
        raise _Refused(Reply.ERR_INVALID, f"{number.name}: {len(rest)} bytes of data behind the last query")
    return _find(name, volumes), queries


def _no_data(number: Option, data: bytes) -> None:
    if data:
        raise _Refused(Reply.ERR_INVALID, f"{number.name} takes no data, but {len(data)} bytes were sent")


# --- Tables ---------------------------------------------------------------------------------------------------------

TRANSITIONS: dict[Phase, dict[str, tuple[Phase, ...]]] = {
    Phase.FREE: {"opened": (Phase.GREETED,)},
    Phase.GREETED: {"client_flags": (Phase.OPTIONS, Phase.CLOSING)},
    Phase.OPTIONS: {
        "option": (Phase.OPTIONS, Phase.TRANSMISSION, Phase.CLOSING),
        "more": (Phase.OPTIONS,),
    },
    Phase.TRANSMISSION: {},
    Phase.CLOSING: {},
}

OPTIONS: dict[Option, Callable[[State, bytes, Volumes], Answer]] = {
    Option.EXPORT_NAME: _export_name,
    Option.ABORT: _abort,
    Option.LIST: _list,
    Option.STARTTLS: _starttls,
    Option.INFO: _info,
    Option.GO: _go,
    Option.STRUCTURED_REPLY: _structured_reply,
    Option.LIST_META_CONTEXT: _list_meta_context,
    Option.SET_META_CONTEXT: _set_meta_context,
    Option.EXTENDED_HEADERS: _extended_headers,
}
