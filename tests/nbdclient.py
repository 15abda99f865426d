"""A small NBD client on a raw socket: it can say anything, right or wrong, and shows what came back.

- `Connection.open(address)` connects: (host, port) or the path of a Unix socket. `send`, `receive` move raw bytes.
- Handshake: `greet`, `option` (all replies to one option), or `negotiate` for all of it at once → `Export`.
- Transmission: `submit` sends a request and returns its cookie; `reply()` is the next complete reply, `wait(cookie)`
  the one to that request, others are kept. Several requests may be under way. `read`, `write`, `flush`, `trim`,
  `write_zeroes`, `cache`, `block_status` submit and wait; they raise `NbdError`. `disconnect` says DISC.
- `Decoder` makes replies out of bytes, without a socket: simple, structured and extended ones.

A connection that ends raises `Dropped`; a reply that breaks the protocol raises `BadReply`.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from types import TracebackType

OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC, EXTENDED_REQUEST_MAGIC = 0x25609513, 0x21E41C71
SIMPLE_MAGIC, STRUCTURED_MAGIC, EXTENDED_MAGIC = 0x67446698, 0x668E33EF, 0x6E8A278C

FIXED_NEWSTYLE, NO_ZEROES = 1, 2  # handshake and client flags
DONE = 1  # flag of a chunk
ALLOCATION = "base:allocation"


class Option(IntEnum):
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


class Rep(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_PLATFORM = 2**31 + 4
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_BLOCK_SIZE_REQD = 2**31 + 8
    ERR_TOO_BIG = 2**31 + 9
    ERR_EXT_HEADER_REQD = 2**31 + 10


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    NONE = 0
    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16
    PAYLOAD_LEN = 32


class ErrorCode(IntEnum):
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ChunkType(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


class Dropped(ConnectionError):
    """The server closed the connection, or it broke."""


class BadReply(Exception):
    """What the server sent is not a reply to anything that was asked."""


class NbdError(Exception):
    """A request failed; `code` is the protocol's, `text` the server's (empty in simple replies)."""

    def __init__(self, code: int, text: str = "", offset: int | None = None) -> None:
        super().__init__(f"{ErrorCode(code).name if code in list(ErrorCode) else code}: {text}")
        self.code, self.text, self.offset = code, text, offset


@dataclass(frozen=True)
class OptionReply:
    option: int
    type: int
    data: bytes

    @property
    def is_final(self) -> bool:
        return self.type not in (Rep.SERVER, Rep.INFO, Rep.META_CONTEXT)

    @property
    def is_error(self) -> bool:
        return self.type >= 1 << 31


@dataclass
class Export:
    """What negotiation ended with."""

    size: int
    flags: TransmissionFlag
    structured: bool = False
    extended: bool = False
    allocation: bool = False
    name: str | None = None
    description: str | None = None
    block_sizes: tuple[int, int, int] | None = None  # minimum, preferred, largest payload


@dataclass(frozen=True)
class Request:
    command: int
    flags: int
    cookie: int
    offset: int
    length: int


@dataclass
class Result:
    """A complete reply. `error` is the first one told; data only if a READ went well."""

    request: Request
    error: NbdError | None = None
    data: bytes = b""
    extents: list[tuple[int, int]] = field(default_factory=list)  # (length, state) from the request's offset on
    chunks: list[int] = field(default_factory=list)  # their types; empty for a simple reply
    holes: list[tuple[int, int]] = field(default_factory=list)  # (offset, length) sent as hole chunks

    def check(self) -> Result:
        if self.error is not None:
            raise self.error
        return self


def request_bytes(request: Request, payload: bytes = b"", extended: bool = False, magic: int | None = None) -> bytes:
    """A request as it goes over the wire; nothing is checked."""
    head = struct.pack(
        ">IHHQQ",
        (EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC) if magic is None else magic,
        request.flags,
        request.command,
        request.cookie,
        request.offset,
    )
    return head + struct.pack(">Q" if extended else ">I", request.length) + payload


def parse_option_reply(header: bytes) -> tuple[int, int, int]:
    """Option, type and length of data of a header of 20 bytes."""
    magic, option, kind, length = struct.unpack(">QIII", header)
    if magic != OPTION_REPLY_MAGIC:
        raise BadReply(f"option reply with magic {magic:#x}")
    return option, kind, length


class Decoder:
    """Replies out of a stream of bytes. `expect(request)` first, `feed(bytes)` gives the replies that are complete."""

    def __init__(self, structured: bool = False, extended: bool = False) -> None:
        self.structured, self.extended = structured, extended
        self.outstanding: dict[int, Result] = {}
        self._covered: dict[int, dict[int, bytes]] = {}  # cookie → offset → data, of replies not yet complete
        self._buffer = bytearray()

    @property
    def buffered(self) -> int:
        """Bytes that belong to no complete message yet."""
        return len(self._buffer)

    def expect(self, request: Request) -> None:
        if request.cookie in self.outstanding:
            raise ValueError(f"cookie {request.cookie} is in use")
        self.outstanding[request.cookie] = Result(request)

    def feed(self, data: bytes) -> list[Result]:
        self._buffer += data
        complete = []
        while (step := self._message()) is not None:
            used, result = step
            del self._buffer[:used]
            if result is not None:
                complete.append(result)
        return complete

    def _message(self) -> tuple[int, Result | None] | None:
        """Length of the first message and the reply that it completes; None if it is not all there."""
        buffer = self._buffer
        if len(buffer) < 4:
            return None
        (magic,) = struct.unpack_from(">I", buffer)
        if magic == SIMPLE_MAGIC and not self.extended:
            return self._simple()
        if magic == STRUCTURED_MAGIC and self.structured and not self.extended:
            if len(buffer) < 20:
                return None
            _, flags, kind, cookie, length = struct.unpack_from(">IHHQI", buffer)
            head = 20
        elif magic == EXTENDED_MAGIC and self.extended:
            if len(buffer) < 32:
                return None
            _, flags, kind, cookie, offset, length = struct.unpack_from(">IHHQQQ", buffer)
            head = 32
            if offset != self._result(cookie).request.offset:
                raise BadReply(f"extended reply with offset {offset} to {self._result(cookie).request}")
        else:
            raise BadReply(f"reply with magic {magic:#x}")
        if length > 64 << 20:
            raise BadReply(f"chunk of {length} bytes")
        if len(buffer) < head + length:
            return None
        result = self._result(cookie)
        self._chunk(result, kind, bytes(buffer[head : head + length]))
        return head + length, self._end(cookie) if flags & DONE else None

    def _simple(self) -> tuple[int, Result | None] | None:
        buffer = self._buffer
        if len(buffer) < 16:
            return None
        _, code, cookie = struct.unpack_from(">IIQ", buffer)
        result = self._result(cookie)
        is_read = result.request.command == Command.READ
        if self.structured and is_read:
            raise BadReply("simple reply to READ although structured replies are negotiated")
        length = result.request.length if is_read and code == 0 else 0
        if len(buffer) < 16 + length:
            return None
        if code:
            result.error = NbdError(code)
        result.data = bytes(buffer[16 : 16 + length])
        del self.outstanding[cookie]
        return 16 + length, result

    def _result(self, cookie: int) -> Result:
        if cookie not in self.outstanding:
            raise BadReply(f"reply to cookie {cookie:#x}, which is not outstanding")
        return self.outstanding[cookie]

    def _chunk(self, result: Result, kind: int, payload: bytes) -> None:
        result.chunks.append(kind)
        match kind:
            case ChunkType.NONE:
                if payload:
                    raise BadReply("chunk NONE with a payload")
            case ChunkType.OFFSET_DATA:
                if len(payload) < 9:
                    raise BadReply("data chunk without data")
                self._cover(result, int.from_bytes(payload[:8], "big"), payload[8:])
            case ChunkType.OFFSET_HOLE:
                if len(payload) != 12:
                    raise BadReply(f"hole chunk of {len(payload)} bytes")
                offset, length = struct.unpack(">QI", payload)
                result.holes.append((offset, length))
                self._cover(result, offset, bytes(length))
            case ChunkType.BLOCK_STATUS if not self.extended:
                if len(payload) < 12 or len(payload) % 8 != 4:
                    raise BadReply(f"block status chunk of {len(payload)} bytes")
                result.extents = list(struct.iter_unpack(">II", payload[4:]))
            case ChunkType.BLOCK_STATUS_EXT if self.extended:
                if len(payload) < 24 or int.from_bytes(payload[4:8], "big") * 16 + 8 != len(payload):
                    raise BadReply(f"extended block status chunk of {len(payload)} bytes")
                result.extents = list(struct.iter_unpack(">QQ", payload[8:]))
            case ChunkType.ERROR | ChunkType.ERROR_OFFSET:
                code, length = struct.unpack_from(">IH", payload)
                text = payload[6 : 6 + length].decode()
                tail = payload[6 + length :]
                if code == 0 or len(tail) != (8 if kind == ChunkType.ERROR_OFFSET else 0):
                    raise BadReply(f"error chunk {payload!r}")
                where = int.from_bytes(tail, "big") if tail else None
                result.error = result.error or NbdError(code, text, where)
            case _:
                raise BadReply(f"chunk of type {kind}")

    def _cover(self, result: Result, offset: int, data: bytes) -> None:
        request = result.request
        pieces = self._covered.setdefault(request.cookie, {})
        end = offset + len(data)
        if request.command != Command.READ or offset < request.offset or end > request.offset + request.length:
            raise BadReply(f"content of {len(data)} bytes at {offset} for {request}")
        if any(start < end and offset < start + len(other) for start, other in pieces.items()):
            raise BadReply(f"content at {offset} twice for {request}")
        pieces[offset] = data

    def _end(self, cookie: int) -> Result:
        result = self.outstanding.pop(cookie)
        pieces = self._covered.pop(cookie, {})
        request = result.request
        if result.error is None and request.command == Command.READ:
            result.data = b"".join(data for _, data in sorted(pieces.items()))
            if len(result.data) != request.length:
                raise BadReply(f"{len(result.data)} bytes of content for {request}")
            content = [kind for kind in result.chunks if kind in (ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE)]
            if request.flags & CommandFlag.DF and len(content) > 1:
                raise BadReply(f"{len(content)} chunks of content although DF was set")
        if result.error is None and request.command == Command.BLOCK_STATUS and not result.extents:
            raise BadReply("block status without an extent")
        return result


class Connection:
    """One connection to a server. `timeout_s` bounds each wait for bytes."""

    def __init__(self, sock: socket.socket, timeout_s: float = 30.0) -> None:
        self.sock = sock
        self.sock.settimeout(timeout_s)
        self.export: Export | None = None
        self.decoder = Decoder()
        self._next_cookie = 1
        self._ready: dict[int, Result] = {}

    @classmethod
    def open(cls, address: tuple[str, int] | str, timeout_s: float = 30.0) -> Connection:
        if isinstance(address, str):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout_s)
            sock.connect(address)
        else:
            sock = socket.create_connection(address, timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(sock, timeout_s)

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- Bytes ---

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Dropped(str(error)) from error

    def receive(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        data = bytearray()
        while len(data) < count:
            data += self.receive_some(count - len(data))
        return bytes(data)

    def receive_some(self, limit: int = 1 << 20) -> bytes:
        """At least one byte."""
        try:
            data = self.sock.recv(limit)
        except ConnectionResetError as error:
            raise Dropped(str(error)) from error
        if not data:
            raise Dropped("the server closed the connection")
        return data

    def is_closed_by_server(self) -> bool:
        """Waits for the end of the stream; False if bytes come instead."""
        try:
            self.receive_some(1)
        except Dropped:
            return True
        return False

    # --- Handshake ---

    def greet(self, flags: int | None = FIXED_NEWSTYLE | NO_ZEROES) -> int:
        """Reads the greeting, sends the client's flags (None: does not). Returns the server's flags."""
        greeting = self.receive(18)
        if greeting[:16] != b"NBDMAGIC" + OPTION_MAGIC:
            raise BadReply(f"greeting {greeting!r}")
        if flags is not None:
            self.send(struct.pack(">I", flags))
        return int.from_bytes(greeting[16:], "big")

    def send_option(
        self, option: int, data: bytes = b"", length: int | None = None, magic: bytes = OPTION_MAGIC
    ) -> None:
        self.send(magic + struct.pack(">II", option, len(data) if length is None else length) + data)

    def option_reply(self) -> OptionReply:
        option, kind, length = parse_option_reply(self.receive(20))
        if length > 1 << 20:
            raise BadReply(f"option reply of {length} bytes")
        return OptionReply(option, kind, self.receive(length))

    def option(self, option: int, data: bytes = b"") -> list[OptionReply]:
        """Sends an option and reads all of its replies, the final one last."""
        self.send_option(option, data)
        replies = [self.option_reply()]
        while not replies[-1].is_final:
            replies.append(self.option_reply())
        if any(reply.option != option for reply in replies):
            raise BadReply(f"replies {replies} to option {option}")
        return replies

    def list_exports(self) -> list[str]:
        replies = self.option(Option.LIST)
        _acknowledged(replies[-1])
        names = []
        for reply in replies[:-1]:
            length = int.from_bytes(reply.data[:4], "big")
            names.append(reply.data[4 : 4 + length].decode())
        return names

    def meta_context(
        self, option: int, export: str = "", queries: Sequence[str] = (ALLOCATION,)
    ) -> list[tuple[int, str]]:
        """LIST_ or SET_META_CONTEXT: (id, name) of each context."""
        replies = self.option(option, meta_data(export.encode(), [query.encode() for query in queries]))
        _acknowledged(replies[-1])
        return [(int.from_bytes(reply.data[:4], "big"), reply.data[4:].decode()) for reply in replies[:-1]]

    def negotiate(
        self,
        export: str = "",
        structured: bool = True,
        extended: bool = False,
        allocation: bool = True,
        export_name: bool = False,
        flags: int = FIXED_NEWSTYLE | NO_ZEROES,
    ) -> Export:
        """From the greeting to transmission, by GO (or EXPORT_NAME). NbdError-free: a refusal raises BadReply."""
        self.greet(flags)
        if extended:
            _acknowledged(self.option(Option.EXTENDED_HEADERS)[-1])
        elif structured:
            _acknowledged(self.option(Option.STRUCTURED_REPLY)[-1])
        structured = structured or extended
        contexts: list[tuple[int, str]] = []
        if allocation and structured:
            contexts = self.meta_context(Option.SET_META_CONTEXT, export)
        if export_name:
            self.send_option(Option.EXPORT_NAME, export.encode())
            size, flag_bits = struct.unpack(">QH", self.receive(10))
            if not flags & NO_ZEROES and any(self.receive(124)):
                raise BadReply("124 reserved bytes are not zero")
            found = Export(size, TransmissionFlag(flag_bits))
        else:
            replies = self.option(Option.GO, info_data(export.encode(), list(Info)))
            _acknowledged(replies[-1])
            found = parse_infos(replies)
        found.structured, found.extended, found.allocation = structured, extended, bool(contexts)
        self.start_transmission(found)
        return found

    def start_transmission(self, export: Export) -> None:
        """The server is in transmission mode; for those who negotiate by themselves."""
        self.export = export
        self.decoder = Decoder(export.structured, export.extended)

    # --- Transmission ---

    def submit(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes = b"",
        cookie: int | None = None,
        magic: int | None = None,
    ) -> int:
        """Sends a request; `length` 0 with a payload means its length. Returns the cookie."""
        extended = self.decoder.extended
        if extended and payload:
            flags |= CommandFlag.PAYLOAD_LEN
        if cookie is None:
            cookie = self._next_cookie
            self._next_cookie += 1
        request = Request(command, flags, cookie, offset, length or len(payload))
        if command != Command.DISC:
            self.decoder.expect(request)
        self.send(request_bytes(request, payload, extended, magic))
        return cookie

    def replies(self) -> Iterator[Result]:
        """Replies as they come, for ever: ends with an exception (Dropped, TimeoutError)."""
        while True:
            while self._ready:
                yield self._ready.pop(next(iter(self._ready)))
            self._keep(self.decoder.feed(self.receive_some()))

    def reply(self) -> Result:
        """The next complete reply, whosever it is."""
        return next(self.replies())

    def wait(self, cookie: int) -> Result:
        """The reply to that request; those to others are kept for their own wait."""
        while cookie not in self._ready:
            self._keep(self.decoder.feed(self.receive_some()))
        return self._ready.pop(cookie)

    def _keep(self, results: list[Result]) -> None:
        for result in results:
            self._ready[result.request.cookie] = result

    def call(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Result:
        """Submits and waits; raises NbdError if the request failed."""
        return self.wait(self.submit(command, offset, length, flags, payload)).check()

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        return self.call(Command.READ, offset, length, flags).data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.call(Command.WRITE, offset, flags=flags, payload=data)

    def flush(self) -> None:
        self.call(Command.FLUSH)

    def flushes(self) -> bool:
        """False: it was refused."""
        try:
            self.flush()
        except NbdError:
            return False
        return True

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        self.call(Command.TRIM, offset, length, flags)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.call(Command.WRITE_ZEROES, offset, length, flags)

    def cache(self, offset: int, length: int) -> None:
        self.call(Command.CACHE, offset, length)

    def block_status(self, offset: int, length: int, flags: int = 0) -> list[tuple[int, int]]:
        """(length, state) from `offset` on; may cover less or more than asked."""
        return self.call(Command.BLOCK_STATUS, offset, length, flags).extents

    def disconnect(self) -> None:
        """DISC, then waits until the server has closed."""
        self.submit(Command.DISC)
        if not self.is_closed_by_server():
            raise BadReply("bytes after DISC")
        self.close()


# --- Data of options --------------------------------------------------------------------------------------------------


def info_data(export: bytes, wanted: Sequence[int] = ()) -> bytes:
    """Of INFO and GO."""
    return struct.pack(">I", len(export)) + export + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def meta_data(export: bytes, queries: Sequence[bytes]) -> bytes:
    """Of LIST_META_CONTEXT and SET_META_CONTEXT."""
    strings = b"".join(struct.pack(">I", len(query)) + query for query in queries)
    return struct.pack(">I", len(export)) + export + struct.pack(">I", len(queries)) + strings


def parse_infos(replies: Sequence[OptionReply]) -> Export:
    """What the replies to INFO or GO tell."""
    export: Export | None = None
    rest: dict[int, bytes] = {}
    for reply in replies:
        if reply.type != Rep.INFO:
            continue
        kind = int.from_bytes(reply.data[:2], "big")
        if kind == Info.EXPORT:
            size, flags = struct.unpack(">QH", reply.data[2:])
            export = Export(size, TransmissionFlag(flags))
        else:
            rest[kind] = reply.data[2:]
    if export is None:
        raise BadReply("no NBD_INFO_EXPORT")
    if Info.NAME in rest:
        export.name = rest[Info.NAME].decode()
    if Info.DESCRIPTION in rest:
        export.description = rest[Info.DESCRIPTION].decode()
    if Info.BLOCK_SIZE in rest:
        minimum, preferred, largest = struct.unpack(">III", rest[Info.BLOCK_SIZE])
        export.block_sizes = (minimum, preferred, largest)
    return export


def _acknowledged(reply: OptionReply) -> None:
    if reply.type != Rep.ACK:
        name = Rep(reply.type).name if reply.type in list(Rep) else hex(reply.type)
        raise BadReply(f"{name} to option {reply.option}: {reply.data.decode(errors='replace')}")
