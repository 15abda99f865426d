"""Client of the control socket DATA/control.sock.

    with Client(data) as client:
        client.call("status")                   -> dict
        client.call("kill", role="disk")

On the wire both directions carry frames: the length of what follows (32 bits, big-endian, FRAME_BYTES_MAX at most),
then one msgpack map.

    request  {"version": 1, "number": int, "call": verb, ...arguments}
    reply    {"version": 1, "number": the request's, "ok": true, ...results}
             {"version": 1, "number": the request's, "ok": false, "error": one line}

A connection carries any number of requests, one at a time.

After the death of the kernel: the listening socket is init's, so the client connects again and, unless the verb is one
of NOT_REPEATED, asks again; the successor answers. Errors: NoServer, Refused, NoAnswer, all of them ControlError.
"""

import os
import socket
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack

VERSION = 1
SOCKET_NAME = "control.sock"
FRAME_BYTES_MAX = 16 << 20
LENGTH = struct.Struct(">I")

# Doing these twice is not the same as doing them once; the caller decides.
NOT_REPEATED = frozenset({"kill", "volume-create", "volume-delete", "call", "crash-point"})


class ControlError(Exception):
    """One line for the user."""


class NoServer(ControlError):
    """Nobody listens."""


class Refused(ControlError):
    """The server's answer is an error."""


class NoAnswer(ControlError):
    """No answer in time, or the connection was lost where the request must not be repeated."""


class Client:
    """A connection to the server of a data directory, made at the first call."""

    def __init__(self, data: str | os.PathLike[str], timeout_s: float = 15.0) -> None:
        self.data = Path(data).absolute()
        self.timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def call(self, verb: str, /, timeout_s: float | None = None, **arguments: Any) -> dict[str, Any]:
        """The reply's results. Raises ControlError."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        self._number += 1
        request = {"version": VERSION, "number": self._number, "call": verb, **arguments}
        frame = msgpack.packb(request)
        while True:
            sent = False
            try:
                connection = self._connect(deadline)
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                sent = True  # from here on the server may have seen it
                connection.sendall(LENGTH.pack(len(frame)) + frame)
                reply = self._receive(connection, deadline)
                break
            except TimeoutError:
                self.close()
                raise NoAnswer(f"no answer to {verb!r} in time by the server on {self.data}") from None
            except (ConnectionError, EOFError):
                self.close()
                if sent and verb in NOT_REPEATED:
                    raise NoAnswer(
                        f"the kernel on {self.data} was replaced while {verb!r} was under way: see atoll status"
                    ) from None
                if time.monotonic() >= deadline:
                    raise NoAnswer(f"no answer to {verb!r} in time by the server on {self.data}") from None
                time.sleep(0.005)  # the next kernel is being made
        if reply.get("version") != VERSION:
            raise Refused(f"the server on {self.data} speaks control version {reply.get('version')}, not {VERSION}")
        if reply.get("ok") is not True:
            raise Refused(str(reply.get("error") or "refused without a reason"))
        return {key: value for key, value in reply.items() if key not in ("version", "number", "ok")}

    def _connect(self, deadline: float) -> socket.socket:
        if self._socket is not None:
            if not _closed_by_peer(self._socket):
                return self._socket
            self.close()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Through the directory's descriptor: a socket's path is short, a data directory's need not be.
            folder = os.open(self.data, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                connection.connect(f"/proc/self/fd/{folder}/{SOCKET_NAME}")
            finally:
                os.close(folder)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            connection.close()
            raise NoServer(f"no server runs on {self.data} (start one: atoll serve --data {self.data})") from None
        except PermissionError:
            connection.close()
            raise NoServer(
                f"{self.data / SOCKET_NAME}: permission denied: the server belongs to another user"
            ) from None
        except BaseException:
            connection.close()
            raise
        self._socket = connection
        return connection

    def _receive(self, connection: socket.socket, deadline: float) -> dict[str, Any]:
        while True:
            (length,) = LENGTH.unpack(_receive_exactly(connection, LENGTH.size, deadline))
            if length > FRAME_BYTES_MAX:
                raise NoAnswer(f"the server on {self.data} announced an answer of {length} bytes")
            body = _receive_exactly(connection, length, deadline)
            try:
                reply = msgpack.unpackb(body)
            except (ValueError, msgpack.UnpackException):
                raise NoAnswer(f"the server on {self.data} sent an answer that is not msgpack") from None
            if isinstance(reply, dict) and reply.get("number") in (None, self._number):
                return reply


def _receive_exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    parts = []
    while count:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _closed_by_peer(connection: socket.socket) -> bool:
    """Between two calls nothing comes but the end."""
    try:
        connection.setblocking(False)
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
