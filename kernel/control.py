"""The control socket, DATA/control.sock (mode 0600): how the command line and programs talk to the kernel.

    frame     length of what follows (32 bits, big-endian), then one msgpack map
    request   {"version": 1, "number": any, "call": verb, ...arguments}      at most REQUEST_BYTES_MAX
    reply     {"version": 1, "number": the request's, "ok": true, ...results}
              {"version": 1, "number": the request's, "ok": false, "error": one line}

A connection carries any number of requests, answered one after another. Verbs: verbs.py. Client: client.py.

- `Server(loop, listener, answer)`; `answer(verb, arguments, reply)` calls `reply(map)` now or later

Nobody is waited for: what a client does not read is kept for it up to REPLY_BYTES_MAX, then it is dropped. After a
crash of the kernel its connections are closed, the listening socket is init's, and clients ask the successor.
"""

import logging
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import msgpack

from atoll.kernel.loop import Loop

log = logging.getLogger("atoll.kernel")

VERSION = 1
LENGTH = struct.Struct(">I")
REQUEST_BYTES_MAX = 1 << 20
REPLY_BYTES_MAX = 16 << 20
CLIENTS_MAX = 128
# Of one client, before others and the deaths of domains are looked at again.
REQUESTS_PER_TURN = 16
ACCEPT_AGAIN_NS = 100_000_000

Reply = Callable[[dict[str, Any]], None]
Answer = Callable[[str, dict[str, Any], Reply], None]


class Refused(Exception):
    """A request is refused; one line for who asked."""


class Server:
    def __init__(self, loop: Loop, listener: socket.socket, answer: Answer) -> None:
        self.loop = loop
        self.answer = answer
        self._listener = listener
        self._clients: set[_Client] = set()
        self._listen()

    def _listen(self) -> None:
        self.loop.add(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptors: it would be told again at once
            self.loop.remove(self._listener.fileno())
            self.loop.at(time.monotonic_ns() + ACCEPT_AGAIN_NS, self._listen)
            return
        if len(self._clients) >= CLIENTS_MAX:
            connection.close()
            return
        self._clients.add(_Client(self, connection))

    def drop(self, client: "_Client") -> None:
        self._clients.discard(client)

    def flush(self) -> None:
        """Sends what can be sent at once; before the kernel ends."""
        for client in list(self._clients):
            client.write()


class _Client:
    def __init__(self, server: Server, connection: socket.socket) -> None:
        self._server = server
        self._connection = connection
        self._received = bytearray()
        self._to_send = bytearray()
        self._busy = False
        self._advancing = False  # `_next` is at work, perhaps further up the stack
        self._later = False  # it goes on in the loop's next turn
        self._open = True
        connection.setblocking(False)
        server.loop.add(connection.fileno(), self._read)

    def _read(self) -> None:
        if self._later:
            return
        try:
            data = self._connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close()
            return
        self._received += data
        if len(self._received) > REQUEST_BYTES_MAX + LENGTH.size:
            self._refuse_and_close(f"a request has at most {REQUEST_BYTES_MAX} bytes")
            return
        self._next()

    def _next(self) -> None:
        """Starts the next whole requests, one after another, as far as they are answered at once."""
        if self._advancing:  # called by an answer: the loop below goes on
            return
        self._advancing = True
        try:
            for _ in range(REQUESTS_PER_TURN):
                if not self._next_one():
                    return
        finally:
            self._advancing = False
        if self._open and not self._later:
            self._later = True
            self._server.loop.at(time.monotonic_ns(), self._go_on)

    def _go_on(self) -> None:
        self._later = False
        self._next()

    def _next_one(self) -> bool:
        """False if there is no whole request, or one is under way."""
        if not self._open or self._busy or len(self._received) < LENGTH.size:
            return False
        (length,) = LENGTH.unpack_from(self._received)
        if length > REQUEST_BYTES_MAX:
            self._refuse_and_close(f"request of {length} bytes, at most {REQUEST_BYTES_MAX} are accepted")
            return False
        if len(self._received) < LENGTH.size + length:
            return False
        body = bytes(self._received[LENGTH.size : LENGTH.size + length])
        del self._received[: LENGTH.size + length]
        self._start(body)
        return True

    def _start(self, body: bytes) -> None:
        try:
            request = msgpack.unpackb(body, raw=False, strict_map_key=True)
        except Exception as error:  # msgpack raises ValueError, UnpackException, and what its hooks raise
            self._refuse_and_close(f"a request is one msgpack map: {error or type(error).__name__}")
            return
        if not isinstance(request, dict) or not all(isinstance(key, str) for key in request):
            self._refuse_and_close("a request is one msgpack map with text keys")
            return
        number = request.pop("number", None)
        version, verb = request.pop("version", None), request.pop("call", None)
        self._busy = True
        answered = False

        def reply(message: dict[str, Any]) -> None:
            nonlocal answered
            if answered:
                return
            answered = True
            self._busy = False
            self._send({"version": VERSION, "number": number, "ok": True, **message})
            self._next()

        if version != VERSION:
            reply({"ok": False, "error": f"control version {version!r}; this server speaks version {VERSION}"})
        elif not isinstance(verb, str):
            reply({"ok": False, "error": "a request names its verb as text in `call`"})
        else:
            try:
                self._server.answer(verb, request, reply)
            except Refused as refused:
                reply({"ok": False, "error": str(refused)})
            except Exception as error:
                log.exception("control: %s", verb)
                reply({"ok": False, "error": f"internal error in the kernel: {type(error).__name__}: {error}"})

    def _refuse_and_close(self, text: str) -> None:
        self._send({"version": VERSION, "number": None, "ok": False, "error": text})
        self._close()

    def _send(self, message: dict[str, Any]) -> None:
        if not self._open:
            return
        body = msgpack.packb(message)
        if len(body) + len(self._to_send) > REPLY_BYTES_MAX:
            log.warning("control: a client does not read its replies: dropped")
            self._close()
            return
        self._to_send += LENGTH.pack(len(body)) + body
        self.write()

    def write(self) -> None:
        if not self._open:
            return
        try:
            while self._to_send:
                sent = self._connection.send(self._to_send, socket.MSG_NOSIGNAL)
                del self._to_send[:sent]
        except BlockingIOError:
            self._server.loop.writable(self._connection.fileno(), self.write)
            return
        except OSError:
            self._close()
            return
        self._server.loop.writable(self._connection.fileno(), None)

    def _close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._server.loop.remove(self._connection.fileno())
        self._connection.close()
        self._server.drop(self)
