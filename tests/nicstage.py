"""The NIC driver alone on a stage: real arenas, rings, sockets and a real process; the test plays nbd and dedup.

with Stage() as stage:
    stage.start()                         a process that plays nic; kill() ends it, start() is the successor
    client = stage.connect("unix")        a socket; client.write/read queue requests, client.results is filled by turns
    stage.settle()                        turns until nothing is under way

The stand-in for nbd is strict: identities must be new, parts must come in order and hold the pattern's bytes, no slot
may be used beyond its end. All data follow one pattern: the byte at volume offset o is PATTERN[o % period]. Pages are
taken over by dedup at random and given back later, sometimes before the reply. Some writes nic posts (answers by
itself, as dedup lets it at random, see `posts`): their END comes later. Blocks that were read are put into its table by
chance (see `remember`; nbdmemory.py), so that nic answers by itself when they are read again. Reads that it asks dedup
for are refused by chance (see `refuses`), and come to nbd then. Single-threaded;
sockets do not block.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from nbdmemory import TABLE_BYTES, TABLE_PAGES, Memory

from atoll.drivers import nic
from atoll.ipc import objects, physmap, uring
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.calls import CallClient
from atoll.ipc.runtime import Context, Listener

KERNEL, NIC, NBD, DEDUP = lib.ATOLL_ROLE_KERNEL, lib.ATOLL_ROLE_NIC, lib.ATOLL_ROLE_NBD, lib.ATOLL_ROLE_DEDUP
NAMES = {KERNEL: "kernel", NIC: "nic", NBD: "nbd", DEDUP: "dedup"}
RINGS = {  # role: {peer: entries}
    KERNEL: {NIC: 64, NBD: 64, DEDUP: 64},
    NIC: {KERNEL: 64, NBD: 4096, DEDUP: 4096},
    NBD: {KERNEL: 64, NIC: 4096, DEDUP: 4096},
    DEDUP: {KERNEL: 64, NBD: 4096, NIC: 4096},
}
BLOCK, PART = lib.ATOLL_BLOCK_BYTES, lib.ATOLL_PART_BYTES
LAST, CLOSE, DISCARD, TAKEN = (
    lib.ATOLL_FLAG_LAST,
    lib.ATOLL_FLAG_CLOSE,
    lib.ATOLL_FLAG_DISCARD,
    lib.ATOLL_FLAG_TAKEN,
)
POSTED, ALONE = lib.ATOLL_FLAG_POSTED, lib.ATOLL_FLAG_ALONE
MOST = lib.ATOLL_POSTED_BLOCKS
READ, WRITE = 0, 1
VOLUME, GENERATION = 3, 9  # that all connections use
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
_PERIOD = 65521
_ONCE = random.Random(20).randbytes(_PERIOD)
PATTERN = _ONCE * 18  # a part from any offset within a period
SLOT_BYTES = 4096  # of the stand-in's area: header and segment list of one reply
TABLE_AT = 1 << 18  # of dedup's look-up table in its role area
LISTS_AT = TABLE_AT + TABLE_BYTES  # of its answers' segment lists
LIST_BYTES = 1024  # of each
GREETING = b"NBDMAGIC-this-is-a-stand-in"
CONFIG: dict[str, Any] = {
    "max_connections": 1500,
    "requests_per_connection": 64,
    "buffer_bytes": 16 << 20,
    "engine": "io_uring",
    "handshake_timeout_s": 10,
    "payload_timeout_s": 30,
    "reply_timeout_s": 60,
    "idle_timeout_s": 0,
    "crowded_timeout_s": 10,
}


def pattern(offset: int, length: int) -> bytes:
    begin = offset % _PERIOD
    if begin + length <= len(PATTERN):
        return PATTERN[begin : begin + length]
    return (_ONCE * (length // _PERIOD + 2))[begin : begin + length]


@dataclass
class Use:
    """A slot between its first message and LAST."""

    identity: int
    opcode: int
    type: int = READ
    cookie: bytes = b""
    offset: int = 0
    length: int = 0
    done: int = 0  # payload bytes seen, or data bytes sent
    part: int = 0
    pages: list[int] = field(default_factory=list)


class Client:
    def __init__(self, sock: socket.socket, greeting: bytes = GREETING) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.out = bytearray()
        self.into = bytearray()
        self.greeting = greeting
        self.expected: dict[int, tuple[int, int, int]] = {}  # cookie: type, offset, length
        self.next_cookie = 1
        self.results = 0
        self.closed = False
        self.reads = True
        self.raw = False  # what comes is only collected

    def request(self, kind: int, offset: int, length: int) -> None:
        cookie = self.next_cookie
        self.next_cookie += 1
        self.expected[cookie] = (kind, offset, length)
        self.out += struct.pack(">IHHQQI", REQUEST_MAGIC, 0, kind, cookie, offset, length)
        if kind == WRITE:
            self.out += pattern(offset, length)

    def turn(self, most: int = 1 << 20) -> bool:
        busy = False
        try:
            if self.out and not self.closed:
                sent = self.socket.send(self.out[:most])
                del self.out[:sent]
                busy = True
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.out.clear()
        try:
            if self.reads and not self.closed:
                data = self.socket.recv(1 << 20)
                busy = True
                self.closed = not data
                self.into += data
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self.closed = True
        if busy and not self.raw:
            self._parse()
        return busy

    def _parse(self) -> None:
        if self.greeting:
            if len(self.into) < len(self.greeting):
                return
            assert self.into[: len(self.greeting)] == self.greeting
            del self.into[: len(self.greeting)]
            self.greeting = b""
        while len(self.into) >= 16:
            magic, error, cookie = struct.unpack_from(">IIQ", self.into)
            assert magic == REPLY_MAGIC, f"the stream is out of step: {bytes(self.into[:32]).hex()}"
            assert error == 0
            kind, offset, length = self.expected[cookie]
            size = length if kind == READ else 0
            if len(self.into) < 16 + size:
                return
            assert self.into[16 : 16 + size] == pattern(offset, size), "wrong bytes"
            del self.into[: 16 + size]
            del self.expected[cookie]
            self.results += 1

    def close(self) -> None:
        self.socket.close()
        self.closed = True


class Stage:
    def __init__(self, seed: int = 1, **settings: Any) -> None:
        self.random = random.Random(seed)
        self.config: dict[str, Any] = {
            "nic": {**CONFIG, **settings},
            "disk": {"cache_bytes": 64 << 20},
            "testing": {"fault": {}},
        }
        self.instance = secrets.randbits(63) + 1
        self.incarnation = self.pid = self.last_status = 0
        self.folder = tempfile.mkdtemp(prefix="nic")
        self.eventfd, self.bell = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))  # nic's, dedup's
        self.uring = uring.create(4096, 8192, lib.ATOLL_CONNECTION_COUNT)
        self.sizes: dict[int, int] = {}
        shapes = {
            KERNEL: (4096, 0),
            NIC: nic.plan(self.config),
            NBD: (16384 + lib.ATOLL_SLOT_COUNT * SLOT_BYTES, len(PATTERN)),
            DEDUP: (LISTS_AT + lib.ATOLL_SLOT_COUNT * LIST_BYTES, (TABLE_PAGES + 1) * BLOCK),
        }
        for role, (role_bytes, buffer_bytes) in shapes.items():
            self._make(role, role_bytes, buffer_bytes)
        self.peers = {role: self._open(role) for role in (KERNEL, NBD, DEDUP)}
        self.calls = CallClient(self.peers[KERNEL].domain)
        self.list_area = self.peers[NBD].role_area + 16384
        self.pattern_area = self.peers[NBD].buffer_area
        ffi.memmove(ffi.cast("char *", self.pattern_area), PATTERN, len(PATTERN))
        self.dedup_public = ffi.cast("struct atoll_dedup_public *", self.peers[DEDUP].role_area)
        pages = self.peers[DEDUP].buffer_area
        self.memory = Memory(
            self.dedup_public,
            table=self.peers[DEDUP].role_area + TABLE_AT,
            pages=pages,
            zeros=pages + TABLE_PAGES * BLOCK,
            uses=self.nic_public().uses,
            done=self.nic_public().done,
        )
        physmap.header(DEDUP).serving_ns = 1
        self.publish()
        self.message = ffi.new("struct atoll_descriptor *")
        self.uses: dict[int, Use] = {}
        self.seen: dict[int, int] = {}  # slot: last sequence
        self.connections: set[int] = set()
        self.closed_count = 0
        self.taken_pages: list[int] = []
        self.hold = False  # nbd answers nothing
        self.take_share = 0.5
        self.remember = 0.0  # share of reads whose blocks lie in memory afterwards
        self.posts: int | None = None  # blocks of posted writes that may be on their way; None: MOST or 0, by chance
        self.mixes = False  # the framing's replies may be mixed
        self.named = True  # nbd names the volume: without a name all requests are its own
        self.refuses = 0.2  # share of reads that dedup has no data for
        self.refusals = 0
        self.failures: dict[int, tuple[int, int, int]] = {}  # identity: what nbd is to be told of a read that failed
        self.asked: dict[int, int] = {}  # slot: identity of a read that dedup has answered: nbd may get it yet
        self.hold_ends = False
        self.ends: list[tuple[Use, int]] = []  # posted writes, and the flags of their END
        self.service: Any = None  # (ffi, lib) of an extension that takes the real one's place in the child
        self.before: Callable[[Any], None] | None = None  # called with the driver's lib in the new process
        self.framing = lib.ATOLL_FRAMING_REQUEST
        self.log: list[Any] = []
        self.mixing: dict[int, int] = {}  # connection: identity whose reply has parts to come
        self.deferred: dict[int, list[tuple[Any, ...]]] = {}
        self.on_option: Callable[[Any, bytes], dict[str, Any]] | None = None
        self.on_request: Callable[[Any], dict[str, Any] | None] | None = None
        self.clients: list[Client] = []
        self.tcp = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix_path = str(Path(self.folder) / "s")
        self.unix.bind(self.unix_path)
        self.unix.listen(1024)
        self.listeners = [self.tcp, self.unix]
        for listener in self.listeners:
            listener.setblocking(False)

    # --- Arenas (as in nbdstage) ---

    def _name(self, role: int) -> str:
        return objects.arena_name(self.instance, role)

    def _make(self, role: int, role_bytes: int, buffer_bytes: int) -> None:
        entries = ffi.new("uint32_t[16]")
        mask = 0
        for peer, count in RINGS[role].items():
            entries[peer] = count
            mask |= 1 << peer
        size = self.sizes[role] = lib.atoll_arena_size(mask, entries, role_bytes, buffer_bytes)
        fd = objects.create(self._name(role), size)
        physmap.map_arena(role, fd, size, writable=True)
        base = ffi.cast("void *", physmap.address(role))
        eventfd = {NIC: self.eventfd, DEDUP: self.bell}.get(role, -1)
        kind = lib.ATOLL_WAKE_FUTEX if eventfd < 0 else lib.ATOLL_WAKE_EVENTFD
        lib.atoll_arena_format(base, role, self.instance, size, mask, entries, role_bytes, buffer_bytes, kind, eventfd)
        os.close(fd)
        if role == NIC:
            self._map(role, writable=False)

    def _map(self, role: int, writable: bool) -> None:
        fd = objects.open_writable(self._name(role)) if writable else objects.open_read_only(self._name(role))
        physmap.map_arena(role, fd, self.sizes[role], writable=writable)
        os.close(fd)

    def _open(self, role: int, incarnation: int = 1, previous_signal: int = 0) -> Context:
        context = Context(
            role=NAMES[role],
            incarnation=incarnation,
            fresh=incarnation == 1,
            adopted=False,
            previous_signal=previous_signal,
            config=self.config,
            arena_bytes=self.sizes,
        )
        if role == NIC:
            context.uring = self.uring if self.config["nic"]["engine"] == "io_uring" else None
            kinds = {socket.AF_UNIX: "unix"}
            context.listeners = [Listener(s.fileno(), kinds.get(s.family, "tcp"), "") for s in self.listeners]
        context.open(os.getpid())
        return context

    def publish(self, **fields: int) -> None:
        """The entry of the volume in dedup's table."""
        entry = self.dedup_public.volumes[VOLUME]
        entry.version += 1
        entry.state, entry.generation, entry.flags = lib.ATOLL_VOLUME_READY, GENERATION, 0
        entry.size_bytes = 1 << 60
        for name, value in fields.items():
            setattr(entry, name, value)
        entry.version += 1

    def counters(self) -> dict[str, int]:
        words = ffi.cast("uint64_t *", physmap.address(NIC) + 8192)
        return {name: int(words[index]) for index, name in enumerate(nic.COUNTERS)}

    def sent(self, role: int = NBD) -> int:
        """Messages to it that are published and not taken. (What atoll_domain_pending says is how many its first look
        found.)"""
        place = physmap.address(NIC) + int(physmap.header(NIC).tx_offset[role])
        tail = int(ffi.cast("struct atoll_ring_producer *", place).tail)
        return (tail - int(physmap.header(role).consumer[NIC].head)) & 0xFFFFFFFF

    def nic_public(self) -> Any:
        return ffi.cast("struct atoll_nic_public *", physmap.address(NIC) + int(physmap.header(NIC).role_offset))

    # --- nic's process ---

    def start(self, previous_signal: int = 0, wait: bool = True) -> None:
        assert self.pid == 0
        self.incarnation += 1
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._play(previous_signal)
        if wait:
            self.poll(self.is_serving)

    def is_serving(self) -> bool:
        return physmap.serves(physmap.header(NIC), self.incarnation)

    def _play(self, previous_signal: int) -> None:
        status = 70
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for client in self.clients:
                client.socket.close()  # else a close by the client would not end the connection
            for role in (KERNEL, NBD, DEDUP):
                self._map(role, writable=False)
            self._map(NIC, writable=True)
            if self.service is not None:
                nic.ffi, nic.lib = self.service
            context = self._open(NIC, self.incarnation, previous_signal)
            if self.before is not None:
                self.before(nic.lib)
            nic.main(context)
            context.stopped()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def is_dead(self) -> bool:
        if self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid, self.last_status = 0, status
        return self.pid == 0

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)
        _, self.last_status = os.waitpid(self.pid, 0)
        self.pid = 0

    def dies(self, timeout_s: float = 60.0) -> None:
        """Turns until nic has ended by itself."""
        deadline = time.monotonic() + timeout_s
        while not self.is_dead():
            if not self.turn():
                time.sleep(0.0002)
            assert time.monotonic() < deadline, "nic lives"

    def pause(self) -> None:
        """It is stopped when this returns, until `go_on`."""
        os.kill(self.pid, signal.SIGSTOP)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"nic ended by itself, wait status {status:#x}"

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def poll(self, look: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not look():
            assert not self.is_dead(), f"nic ended by itself, wait status {self.last_status:#x}"
            assert time.monotonic() < deadline, "deadline"
            time.sleep(0.0002)

    # --- Clients ---

    def connect(self, kind: str = "unix", greeting: bytes = GREETING) -> Client:
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.unix_path)
        else:
            sock = socket.create_connection(self.tcp.getsockname())
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = Client(sock, greeting)
        self.clients.append(client)
        return client

    def ready(self) -> Client:
        """A client whose negotiation, as far as there is one, is over."""
        client = self.connect("unix")
        self.until(lambda: not client.greeting)
        return client

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        self.calls.start("nic", {"call": name, **arguments})
        answers: list[Any] = []

        def answered() -> bool:
            self.turn()
            answers.extend(self.calls.receive())
            return any(each.kind == "result" for each in answers)

        deadline = time.monotonic() + 20
        while not answered():
            assert time.monotonic() < deadline, f"no answer to {name}"
            time.sleep(0.0002)
        return next(each.message for each in answers if each.kind == "result")

    def check(self) -> None:
        result = self.call("check")
        assert result["ok"] and not result["problems"], result

    # --- The stand-ins ---

    def put(self, sender: int, to: int = NIC, **fields: Any) -> None:
        message = self.message
        ffi.memmove(message, bytes(64), 64)
        for name, value in fields.items():
            if name in ("bytes", "words", "halves"):
                for index, item in enumerate(value):
                    getattr(message, name)[index] = item
            else:
                setattr(message, name, value)
        assert lib.atoll_domain_put(self.peers[sender].domain, to, message)

    def turn(self) -> bool:
        """Everything that clients, nbd and dedup can do now. True if there was anything."""
        busy = False
        if self.posts is not None:
            self.dedup_public.posted_blocks = self.posts
        elif self.random.random() < 0.1:
            self.dedup_public.posted_blocks = self.random.choice((0, MOST))
            self.dedup_public.crowded = self.random.choice((0, 1))
        for client in self.clients:
            busy |= client.turn()
        message = ffi.new("struct atoll_descriptor *")
        while not self.hold and lib.atoll_domain_take(self.peers[NBD].domain, NIC, message):
            busy = True
            self.take(message)
        while not self.hold and lib.atoll_domain_take(self.peers[DEDUP].domain, NIC, message):
            busy = True
            self._take_read(message) if message.opcode == lib.ATOLL_OP_READ else self._take_posted(message)
        self._give_back(0.3)
        self.end_posted(0.3)
        for role in (NBD, DEDUP):
            lib.atoll_domain_commit(self.peers[role].domain)
        return busy

    def until(self, condition: Callable[[], bool], what: str = "", seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.turn():
                time.sleep(0.0002)
            assert not self.is_dead(), f"nic ended by itself, wait status {self.last_status:#x}"
            assert time.monotonic() < deadline, f"not in time: {what}"

    def settle(self) -> None:
        self.until(
            lambda: (
                not self.ends and not any(client.expected or client.out for client in self.clients if not client.closed)
            ),
            "settle",
        )

    def end_posted(self, share: float = 2.0) -> None:
        while self.ends and not self.hold_ends and self.random.random() < share:
            use, flags = self.ends.pop(self.random.randrange(len(self.ends)))
            del self.uses[use.identity >> 32 & 0xFFFF]
            self.put(DEDUP, opcode=lib.ATOLL_OP_END, identity=use.identity, flags=flags)

    def _give_back(self, share: float) -> None:
        while self.taken_pages and self.random.random() < share:
            self.random.shuffle(self.taken_pages)
            pages, self.taken_pages = self.taken_pages[:8], self.taken_pages[8:]
            self.put(DEDUP, opcode=lib.ATOLL_OP_GIVE_BACK, segment_count=len(pages), halves=pages)

    def give_all_back(self) -> None:
        self._give_back(2.0)
        lib.atoll_domain_commit(self.peers[DEDUP].domain)

    def payload(self, message: Any) -> bytes:
        """The message's payload; each block must lie at its place in its page."""
        if message.segment_count == 0:
            runs = [(message.address, message.length)]
        else:
            segments = ffi.cast("struct atoll_segment *", message.address)
            runs = [(segments[i].address, segments[i].length) for i in range(message.segment_count)]
        for address, length in runs:
            assert address >= lib.ATOLL_MAP_BASE + NIC * lib.ATOLL_MAP_STRIDE
            assert all(a % BLOCK == 0 for a, _ in runs[1:]) and length > 0
        data = b"".join(bytes(ffi.buffer(ffi.cast("char *", address), length)) for address, length in runs if length)
        assert len(data) == message.length
        return data

    def pages(self, message: Any) -> list[int]:
        base = physmap.address(NIC) + int(physmap.header(NIC).buffer_offset)
        if message.length == 0:
            return []
        if message.segment_count == 0:
            runs = [(message.address, message.length)]
        else:
            segments = ffi.cast("struct atoll_segment *", message.address)
            runs = [(segments[i].address, segments[i].length) for i in range(message.segment_count)]
        return [
            page
            for address, length in runs
            for page in range((address - base) // BLOCK, (address + length - 1 - base) // BLOCK + 1)
        ]

    def _use(self, message: Any) -> Use:
        """A slot's first message."""
        identity = int(message.identity)
        slot, sequence = identity >> 32 & 0xFFFF, identity & 0xFFFFFFFF
        assert slot not in self.uses, f"slot {slot} is in use"
        again = self.asked.pop(slot, 0) == identity and message.opcode == lib.ATOLL_OP_REQUEST
        assert sequence > self.seen.get(slot, 0) - again, "a sequence came twice"
        self.seen[slot] = sequence
        use = self.uses[slot] = Use(identity, message.opcode)
        return use

    def take(self, message: Any) -> None:
        identity = int(message.identity)
        slot, connection = identity >> 32 & 0xFFFF, identity >> 48
        opcode = message.opcode
        if opcode in (lib.ATOLL_OP_OPEN, lib.ATOLL_OP_OPTION, lib.ATOLL_OP_REQUEST, lib.ATOLL_OP_CLOSED):
            use = self._use(message)
        else:
            use = self.uses[slot]
            assert use.identity == identity
        if opcode == lib.ATOLL_OP_OPEN:
            assert connection not in self.connections
            self.connections.add(connection)
            self.reply(use, GREETING, LAST, framing=self.framing)
        elif opcode == lib.ATOLL_OP_CLOSED:
            self.connections.remove(connection)
            assert [u for u in self.uses.values() if u.identity >> 48 == connection] == [use], "slots are left"
            self.closed_count += 1
            self.reply(use, b"", LAST)
        elif opcode == lib.ATOLL_OP_OPTION:
            assert self.on_option is not None
            data = self.payload(message) if message.length else b""
            self.log.append((bytes(message.bytes)[: message.halves[5]], data))
            self.reply(use, **self.on_option(message, data))
        elif opcode == lib.ATOLL_OP_REQUEST:
            assert connection in self.connections
            failure = self.failures.pop(identity, None)
            assert message.status == (failure[0] if failure else lib.ATOLL_OK)
            assert failure is None or (message.status, message.address, message.length) == failure
            header = bytes(message.bytes)
            magic, _, use.type = struct.unpack_from(">IHH", header)
            if self.on_request is not None:
                use.pages = self.pages(message)
                answer = self.on_request(message)
                if answer is not None:
                    self.reply(use, **answer)
                return
            assert magic == REQUEST_MAGIC
            use.cookie = header[8:16]
            use.offset, use.length = struct.unpack_from(">QI", header, 16)
            if use.type == READ:
                self._read_part(use)
            else:
                self._write_part(use, message)
        elif opcode == lib.ATOLL_OP_PART:
            if message.status != 0:
                assert message.length == 0
                self.reply(use, b"", LAST)
            else:
                self._write_part(use, message)
        elif opcode == lib.ATOLL_OP_SENT:
            assert message.part == use.part
            use.part += 1
            self._read_part(use)
        else:
            raise AssertionError(f"opcode {opcode}")

    def _take_read(self, message: Any) -> None:
        use = self._use(message)
        slot = use.identity >> 32 & 0xFFFF
        assert use.identity >> 48 in self.connections
        use.offset, use.length = int(message.words[0]), int(message.words[1])
        assert (message.flags & ~ALONE, message.part) == (0, lib.ATOLL_PART_NIC)
        assert message.address == message.length == message.segment_count == 0
        assert (message.halves[4], message.halves[5]) == (VOLUME, GENERATION)
        assert 0 < use.length <= 16 * BLOCK
        del self.uses[slot]
        self.asked[slot] = use.identity
        if self.random.random() < self.refuses:
            self.refusals += 1
            first, last = use.offset // BLOCK, (use.offset + use.length - 1) // BLOCK
            lba = self.random.randint(first - 1, last + 1) if first else 0
            fields = self.random.choice(
                (
                    {"status": lib.ATOLL_EIO},
                    {"status": lib.ATOLL_ECORRUPT, "words": [77, lba + 1]},
                    {"length": use.length - 1, "address": self.pattern_area},
                    {"length": use.length, "segment_count": 2, "address": self.pattern_area},
                    {"length": use.length, "segment_count": 66, "address": self.peers[DEDUP].role_area + LISTS_AT},
                )
            )
            if fields.get("status"):
                place, block = fields.get("words", [0, 0])
                known = first < block <= last + 1
                self.failures[use.identity] = (fields["status"], place, block - first if known else 0)
        else:
            fields = self.data_of(slot, use.offset, use.length)
            if self.random.random() < self.remember:
                self.put_in_memory(use.offset, use.length)
        self.put(DEDUP, opcode=lib.ATOLL_OP_DONE, identity=use.identity, part=lib.ATOLL_PART_NIC, **fields)

    def data_of(self, slot: int, offset: int, length: int) -> dict[str, int]:
        """Of a DONE with the pattern's bytes, scattered by chance."""
        runs = self._runs(self.pattern_area + offset % _PERIOD, length, 16)
        if len(runs) == 1:
            return {"address": runs[0][0], "length": length}
        address = self.peers[DEDUP].role_area + LISTS_AT + slot * LIST_BYTES
        self._list(address, runs)
        return {"address": address, "length": length, "segment_count": len(runs)}

    def _runs(self, begin: int, left: int, most: int) -> list[tuple[int, int]]:
        runs = []
        while left:
            length = min(left, self.random.choice((left, left, self.random.randint(1, left))))
            if len(runs) == most - 1:
                length = left
            runs.append((begin, length))
            begin, left = begin + length, left - length
        return runs

    @staticmethod
    def _list(address: int, runs: list[tuple[int, int]]) -> None:
        segments = ffi.cast("struct atoll_segment *", address)
        for index, (begin, length) in enumerate(runs):
            segments[index].address, segments[index].length, segments[index].kind = begin, length, 0

    def _take_posted(self, message: Any) -> None:
        use = self._use(message)
        assert use.identity >> 48 in self.connections
        use.type, use.offset, use.length = WRITE, int(message.words[0]), int(message.words[1])
        assert (message.opcode, message.flags & POSTED) == (lib.ATOLL_OP_WRITE, POSTED)
        assert (message.halves[4], message.halves[5]) == (VOLUME, GENERATION)
        assert message.segment_count == message.part == 0
        assert (use.offset | use.length | message.address) % BLOCK == 0 and message.length == use.length <= 16 * BLOCK
        assert self.payload(message) == pattern(use.offset, use.length), "payload differs"
        note = self.nic_public().posted[use.identity >> 32 & 0xFFFF]
        assert (note.order != 0, note.identity, note.address) == (True, use.identity, message.address)
        assert (note.offset, note.length) == (use.offset, use.length)
        assert (note.volume, note.generation) == (VOLUME, GENERATION)
        assert self.nic_public().posting
        self.ends.append((use, self._take_pages(message)))

    def _take_pages(self, message: Any) -> int:
        """By chance, for dedup; the flags that say so."""
        if not message.length or self.random.random() >= self.take_share:
            return 0
        self.taken_pages += self.pages(message)
        if self.random.random() < 0.3:  # some are back before the word that they were taken
            self._give_back(0.9)
            lib.atoll_domain_commit(self.peers[DEDUP].domain)
        return int(TAKEN)

    def _write_part(self, use: Use, message: Any) -> None:
        assert message.part == use.part, f"part {message.part} instead of {use.part}"
        begin = use.offset + use.done
        most = PART - use.offset % BLOCK if use.part == 0 else PART
        assert message.length == min(most, use.length - use.done)
        if message.length:
            assert self.payload(message) == pattern(begin, message.length), "payload differs"
            first = message.address
            if message.segment_count:
                first = ffi.cast("struct atoll_segment *", message.address)[0].address
            assert first % BLOCK == begin % BLOCK
        use.done += message.length
        flags = self._take_pages(message)
        if use.done == use.length:
            self.reply(use, struct.pack(">II", REPLY_MAGIC, 0) + use.cookie, LAST | flags)
        else:
            self.put(NBD, opcode=lib.ATOLL_OP_NEXT, identity=use.identity, part=use.part, flags=flags)
            use.part += 1

    def _read_part(self, use: Use) -> None:
        length = min(PART, use.length - use.done)
        header = b"" if use.done else struct.pack(">II", REPLY_MAGIC, 0) + use.cookie
        begin, use.done = use.offset + use.done, use.done + length
        last = LAST if use.done == use.length else 0
        if self.remember and last and use.length <= 16 * BLOCK and self.random.random() < self.remember:
            self.put_in_memory(use.offset, use.length)
        self.reply(use, header, last, data=(begin, length))

    def put_in_memory(self, offset: int, length: int) -> None:
        for lba in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
            self.memory.put(VOLUME, GENERATION, lba, pattern(lba * BLOCK, BLOCK))

    def reply(
        self, use: Use, header: bytes = b"", flags: int = LAST, framing: int = 0, data: tuple[int, int] = (0, 0)
    ) -> None:
        """Sends `header`, then `data` bytes of the pattern, cut into segments; parts of replies do not mix."""
        connection = use.identity >> 48
        if self.mixing.get(connection, use.identity) != use.identity:
            self.deferred.setdefault(connection, []).append((use, header, flags, framing, data))
            return
        if flags & LAST:
            self.mixing.pop(connection, None)
        else:
            self.mixing[connection] = use.identity
        self._reply(use, header, flags, framing, data)
        while connection not in self.mixing and self.deferred.get(connection):
            self.reply(*self.deferred[connection].pop(0))

    def _reply(self, use: Use, header: bytes, flags: int, framing: int, data: tuple[int, int]) -> None:
        slot = use.identity >> 32 & 0xFFFF
        area = self.list_area + slot * SLOT_BYTES
        ffi.memmove(ffi.cast("char *", area), header, len(header))
        assert len(header) <= 1024
        runs = [(area, len(header))] if header else []
        runs += self._runs(self.pattern_area + data[0] % _PERIOD, data[1], 100)
        if flags & LAST:
            del self.uses[slot]
        fields: dict[str, Any] = {"segment_count": 0, "address": 0, "length": sum(length for _, length in runs)}
        if len(runs) == 1:
            fields["address"] = runs[0][0]
        elif runs:
            self._list(area + 1024, runs)
            fields.update(address=area + 1024, segment_count=len(runs))
        self.put(
            NBD,
            opcode=lib.ATOLL_OP_REPLY,
            identity=use.identity,
            flags=flags,
            part=use.part & 0xFFFF,
            halves=[framing, VOLUME + 1 if self.named else 0, GENERATION, int(self.mixes)],
            **fields,
        )

    # --- The end ---

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid and not self.is_dead():
            self.kill()
        for client in self.clients:
            client.socket.close()
        for listener in self.listeners:
            listener.close()
        self.uring.close()
        os.close(self.eventfd)
        os.close(self.bell)
        Path(self.unix_path).unlink()
        Path(self.folder).rmdir()
        for role in RINGS:
            physmap.unmap_arena(role)
            objects.unlink(self._name(role))
