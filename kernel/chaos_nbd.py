"""The small NBD client of `atoll chaos`: one connection, many requests in flight, nothing hidden: it never reconnects.

- `connect(address, export, structured)` -> `Link`   blocking, through negotiation
- `Link.submit(cookie, command, offset, length, flags, payload)`   queues a request
- `Link.pump_out()`, `Link.pump_in()` -> replies     never wait; for a poll loop over `Link.fileno()`

LinkLost: the connection ended. BadReply: what came is not what the protocol allows. Both say what happened.
"""

import socket
import struct
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA, NO_HOLE = 1, 2
NAMES = {READ: "read", WRITE: "write", FLUSH: "flush", TRIM: "trim", WRITE_ZEROES: "write-zeroes"}

_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST_MAGIC, _SIMPLE_MAGIC, _CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
_OPTION_MAGIC, _OPTION_REPLY_MAGIC = b"IHAVEOPT", 0x3E889045565A9
_STRUCTURED_REPLY, _GO = 8, 7
_ACK, _INFO = 1, 3

Address = tuple[str, int] | str


class LinkLost(Exception):
    """The connection ended."""


class BadReply(Exception):
    """The server broke the protocol."""


@dataclass(frozen=True, slots=True)
class Reply:
    cookie: int
    error: int  # of the protocol, 0: none
    data: bytes | bytearray  # of a read


@dataclass(slots=True)
class _Asked:
    command: int
    offset: int
    length: int
    data: bytearray | None = None
    covered: int = 0
    error: int = 0


def parse_uri(uri: str) -> tuple[str, Address, str]:
    """("tcp" or "unix", address, export) of nbd://host:port/export and nbd+unix:///export?socket=path."""
    parts = urlsplit(uri)
    export = unquote(parts.path[1:])
    if parts.scheme == "nbd+unix":
        return "unix", parse_qs(parts.query)["socket"][0], export
    if parts.scheme == "nbd" and parts.hostname:
        return "tcp", (parts.hostname, parts.port or 10809), export
    raise ValueError(f"no URI of an NBD export: {uri}")


def connect(address: Address, export: str, structured: bool, timeout_s: float = 30.0) -> "Link":
    """Negotiates with GO. `timeout_s` bounds each wait."""
    try:
        if isinstance(address, str):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout_s)
            sock.connect(address)
        else:
            sock = socket.create_connection(address, timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise LinkLost(f"cannot connect: {error}") from None
    try:
        return Link(sock, *_negotiate(sock, export, structured))
    except OSError as error:
        sock.close()
        raise LinkLost(f"in negotiation: {error}") from None
    except BaseException:
        sock.close()
        raise


def _negotiate(sock: socket.socket, export: str, structured: bool) -> tuple[int, bool]:
    greeting = _exactly(sock, 18)
    if greeting[:16] != b"NBDMAGIC" + _OPTION_MAGIC:
        raise BadReply(f"greeting {greeting!r}")
    sock.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeroes
    if structured:
        sock.sendall(_OPTION_MAGIC + struct.pack(">II", _STRUCTURED_REPLY, 0))
        structured = _option_reply(sock, _STRUCTURED_REPLY)[0] == _ACK
    name = export.encode()
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    sock.sendall(_OPTION_MAGIC + struct.pack(">II", _GO, len(data)) + data)
    size = 0
    while True:
        kind, content = _option_reply(sock, _GO)
        if kind == _ACK:
            return size, structured
        if kind != _INFO:
            raise BadReply(f"export {export!r} is refused: {content.decode(errors='replace')} ({kind:#x})")
        if content[:2] == b"\0\0":
            (size,) = struct.unpack(">Q", content[2:10])


def _option_reply(sock: socket.socket, option: int) -> tuple[int, bytes]:
    magic, about, kind, length = _OPTION_REPLY.unpack(_exactly(sock, _OPTION_REPLY.size))
    if magic != _OPTION_REPLY_MAGIC or about != option or length > 1 << 20:
        raise BadReply(f"option reply {magic:#x}, option {about}, {length} bytes")
    return kind, _exactly(sock, length)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise LinkLost("closed by the server in negotiation")
        data += part
    return data


class Link:
    """A connection in transmission mode. Owns the socket."""

    def __init__(self, sock: socket.socket, size_bytes: int, structured: bool) -> None:
        self.sock, self.size_bytes, self.structured = sock, size_bytes, structured
        self.asked: dict[int, _Asked] = {}
        self._out: list[Any] = []
        self._in = bytearray()
        sock.setblocking(False)

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        self.sock.close()

    @property
    def wants_out(self) -> bool:
        return bool(self._out)

    def submit(self, cookie: int, command: int, offset: int, length: int, flags: int = 0, payload: Any = None) -> None:
        """`payload`: a buffer of `length` bytes that stays as it is until the reply."""
        self._out.append(_REQUEST.pack(_REQUEST_MAGIC, flags, command, cookie, offset, length))
        if payload is not None:
            self._out.append(memoryview(payload).cast("B"))
        if command != DISC:
            self.asked[cookie] = _Asked(command, offset, length)

    def pump_out(self) -> None:
        while self._out:
            try:
                sent = self.sock.sendmsg(self._out[:64])
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkLost(f"sending: {error}") from None
            while sent:
                first = self._out[0]
                if sent < len(first):
                    self._out[0] = memoryview(first)[sent:]
                    break
                sent -= len(first)
                del self._out[0]

    def pump_in(self) -> list[Reply]:
        """All replies that are complete."""
        replies: list[Reply] = []
        while True:
            try:
                part = self.sock.recv(1 << 20)
            except BlockingIOError:
                return replies
            except OSError as error:
                raise LinkLost(f"receiving: {error}") from None
            if not part:
                raise LinkLost("closed by the server")
            self._in += part
            self._parse(replies)
            if len(part) < 1 << 16:
                return replies

    def _parse(self, replies: list[Reply]) -> None:
        buffer, at, end = self._in, 0, len(self._in)
        while end - at >= 16:
            (magic,) = struct.unpack_from(">I", buffer, at)
            if magic == _SIMPLE_MAGIC:
                _, error, cookie = _SIMPLE.unpack_from(buffer, at)
                asked = self._of(cookie)
                size = asked.length if asked.command == READ and error == 0 else 0
                if self.structured and asked.command == READ:
                    raise BadReply("simple reply to a read although structured replies were agreed on")
                if end - at - 16 < size:
                    break
                replies.append(Reply(cookie, error, bytes(memoryview(buffer)[at + 16 : at + 16 + size])))
                del self.asked[cookie]
                at += 16 + size
            elif magic == _CHUNK_MAGIC and self.structured:
                if end - at < _CHUNK.size:
                    break
                _, flags, kind, cookie, size = _CHUNK.unpack_from(buffer, at)
                asked = self._of(cookie)
                if size > asked.length + 4096:
                    raise BadReply(f"chunk of {size} bytes for a request of {asked.length}")
                if end - at - _CHUNK.size < size:
                    break
                start = at + _CHUNK.size
                self._chunk(asked, kind, memoryview(buffer)[start : start + size])
                at = start + size
                if flags & 1:
                    self._finish(cookie, asked, replies)
            else:
                raise BadReply(f"magic {magic:#x} where a reply begins")
        if at:
            del buffer[:at]

    def _of(self, cookie: int) -> _Asked:
        asked = self.asked.get(cookie)
        if asked is None:
            raise BadReply(f"reply to cookie {cookie:#x}, which is not in flight (answered twice?)")
        return asked

    def _chunk(self, asked: _Asked, kind: int, payload: memoryview) -> None:
        if kind & 0x8000:
            (asked.error,) = struct.unpack_from(">I", payload)
            return
        if kind == 0:
            return
        if asked.command != READ or kind not in (1, 2):
            raise BadReply(f"chunk of type {kind} for {NAMES.get(asked.command)}")
        (offset,) = struct.unpack_from(">Q", payload)
        size = len(payload) - 8 if kind == 1 else struct.unpack_from(">I", payload, 8)[0]
        first = offset - asked.offset
        if first < 0 or first + size > asked.length:
            raise BadReply(f"content for [{offset}, {offset + size}), asked was {asked.offset}, {asked.length}")
        if asked.data is None:
            asked.data = bytearray(asked.length)
        if kind == 1:
            asked.data[first : first + size] = payload[8:]
        asked.covered += size

    def _finish(self, cookie: int, asked: _Asked, replies: list[Reply]) -> None:
        if asked.command == READ and not asked.error and asked.covered != asked.length:
            raise BadReply(f"{asked.covered} bytes of content for a read of {asked.length}")
        del self.asked[cookie]
        replies.append(Reply(cookie, asked.error, asked.data or b""))
