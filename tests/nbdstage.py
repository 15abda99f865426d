"""The nbd service alone on a stage: real arenas and rings and a real process; the test plays nic, dedup and the kernel.

with Stage() as stage:
    stage.start()                         a process that plays nbd; kill() ends it, start() is the successor
    wire = stage.connect()                a client's connection: OPEN is sent
    wire.option(...), wire.submit(...)    frames, as nic would cut them
    stage.settle()                        turns until nothing is under way
    wire.stream                           bytes that nic would have put into the socket

The stand-ins are strict. nic: a reply must belong to a slot in use, its parts must come in order, its bytes must lie in
an arena; pages are counted as lent or given back. dedup: executes on a bytearray per volume, in the order of arrival;
the same part twice is an error. Blocks of zeros are holes. With `remember` it puts what was read into its look-up table
(nbdmemory.py), so that nbd answers by itself when it is read again.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from nbdclient import OPTION_MAGIC, Command, Decoder, Request, Result, info_data, meta_data, request_bytes
from nbdmemory import TABLE_BYTES, TABLE_PAGES, Memory

from atoll.ipc import objects, physmap
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.calls import CallClient
from atoll.ipc.runtime import Context
from atoll.services import nbd
from atoll.services.nbd._nbd import ffi as nbd_ffi
from atoll.services.nbd.negotiation import Framing, Option

KERNEL, NIC, NBD, DEDUP = lib.ATOLL_ROLE_KERNEL, lib.ATOLL_ROLE_NIC, lib.ATOLL_ROLE_NBD, lib.ATOLL_ROLE_DEDUP
NAMES = {KERNEL: "kernel", NIC: "nic", NBD: "nbd", DEDUP: "dedup"}
RINGS = {  # role: {peer: entries}
    KERNEL: {NIC: 64, NBD: 64, DEDUP: 64},
    NIC: {KERNEL: 64, NBD: 4096},
    NBD: {KERNEL: 64, NIC: 4096, DEDUP: 4096},
    DEDUP: {KERNEL: 64, NBD: 4096, NIC: 4096},
}
BLOCK, PART, RANGE_PART = lib.ATOLL_BLOCK_BYTES, lib.ATOLL_PART_BYTES, lib.ATOLL_RANGE_PART_BYTES
SLOTS = 48  # that the stage uses
PAGES = 4096  # of nic's buffers
DEDUP_PAGES = 66  # per slot: the blocks of a part
LIST_BYTES = 8192  # per slot: segments or extents
NIC_PUBLIC_BYTES = ffi.sizeof("struct atoll_nic_public")
ZEROS = 64  # pages of zeros behind dedup's blocks
PUBLIC_BYTES = 1 << 18
CHANGES = (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM)

Rule = Callable[["Work"], int]


@dataclass
class VolumeData:
    id: int
    name: bytes
    data: bytearray
    generation: int = 1
    read_only: bool = False


@dataclass
class Work:
    """A message from nbd that dedup has taken."""

    opcode: int
    identity: int
    part: int
    flags: int  # without the hint
    alone: bool
    offset: int
    length: int
    volume: int
    generation: int
    address: int
    payload_bytes: int
    segment_count: int


@dataclass
class Use:
    """A slot in use."""

    wire: Wire
    sequence: int
    request: Request | None = None
    payload: bytes = field(default=b"", repr=False)
    sent_bytes: int = 0  # of the payload
    part: int = 0  # next part of the payload
    pages: list[int] = field(default_factory=list)  # of the part that nbd has
    reply_part: int = 0
    executed: set[int] = field(default_factory=set)  # parts that dedup has seen
    expected: bytes = field(default=b"", repr=False)  # what dedup has read for it
    failed: int = 0  # first status with which dedup answered, if not OK
    silent: bool = False  # came after the client's last word: no answer is due
    changes: int = 0  # stage.changes when it was submitted


class Stage:
    def __init__(self, volumes: list[VolumeData] | None = None, service: Any = None, seed: int = 1) -> None:
        self.volumes = {v.id: v for v in (volumes or [VolumeData(0, b"disk", bytearray(4 << 20))])}
        self.service = service  # (ffi, lib) of an extension that takes the real one's place in the child
        self.random = random.Random(seed)
        self.config: dict[str, Any] = {"nbd": {}}
        self.instance = secrets.randbits(64)
        self.incarnation = self.pid = self.last_status = 0
        self.before: Callable[[Any], None] | None = None  # called with the service's lib in the new process
        self.sizes: dict[int, int] = {}
        shapes = {
            KERNEL: (4096, 0),
            NIC: (NIC_PUBLIC_BYTES + SLOTS * LIST_BYTES, PAGES * BLOCK),
            NBD: nbd.plan(self.config),
            DEDUP: (
                PUBLIC_BYTES + SLOTS * LIST_BYTES + TABLE_BYTES,
                (SLOTS * DEDUP_PAGES + ZEROS + TABLE_PAGES) * BLOCK,
            ),
        }
        for role, (role_bytes, buffer_bytes) in shapes.items():
            self._make(role, role_bytes, buffer_bytes)
        self.peers = {role: self._open(role) for role in (KERNEL, NIC, DEDUP)}
        self.calls = CallClient(self.peers[KERNEL].domain)
        self.message = ffi.new("struct atoll_descriptor *")
        self.free_slots = list(range(SLOTS))
        self.sequences = [0] * SLOTS
        self.uses: dict[int, Use] = {}  # by slot
        self.free_pages = list(range(PAGES))
        self.lent_pages: set[int] = set()  # taken over by dedup
        self.wires: list[Wire] = []
        self.waiting: list[Work] = []  # taken by dedup, not answered
        self.hold = False  # dedup answers nothing
        self.shuffle = False  # dedup answers in any order, with delays
        self.failed_lba = 0  # + 1, of which dedup tells with an error; 0: of none
        self.rule: Rule | None = None  # status for a piece of work
        self.log: list[Work] = []
        self.remember = False
        self.changes = 0  # requests that change something, executed or under way
        self.memory = Memory(
            public=ffi.cast("struct atoll_dedup_public *", self.peers[DEDUP].role_area),
            table=self.peers[DEDUP].role_area + PUBLIC_BYTES + SLOTS * LIST_BYTES,
            pages=self.zeros() + ZEROS * BLOCK,
            zeros=self.zeros(),
            uses=ffi.cast(
                "struct atoll_nbd_public *", physmap.address(NBD) + int(physmap.header(NBD).role_offset)
            ).uses,
            done=self.nic_public().done,
        )
        self.publish()

    # --- Arenas ---

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
        lib.atoll_arena_format(
            base, role, self.instance, size, mask, entries, role_bytes, buffer_bytes, lib.ATOLL_WAKE_FUTEX, -1
        )
        os.close(fd)
        if role == NBD:
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
        context.open(os.getpid())
        return context

    def publish(self) -> None:
        """Writes dedup's table of volumes."""
        table = ffi.cast("struct atoll_dedup_public *", self.peers[DEDUP].role_area).volumes
        for index in range(lib.ATOLL_VOLUME_COUNT):
            entry, volume = table[index], self.volumes.get(index)
            state = lib.ATOLL_VOLUME_FREE if volume is None else lib.ATOLL_VOLUME_READY
            if volume is None and entry.state == state:
                continue
            entry.version += 1
            entry.state = state
            if volume is not None:
                entry.id, entry.generation, entry.size_bytes = volume.id, volume.generation, len(volume.data)
                entry.flags = lib.ATOLL_VOLUME_READONLY if volume.read_only else 0
                entry.name_bytes = len(volume.name)
                ffi.memmove(entry.name, volume.name, len(volume.name))
            entry.version += 1

    def nic_public(self) -> Any:
        return ffi.cast("struct atoll_nic_public *", self.peers[NIC].role_area)

    def area(self) -> Any:
        """struct nbd_area, read-only."""
        address = physmap.address(NBD) + int(physmap.header(NBD).role_offset)
        return nbd_ffi.cast("struct nbd_area *", address)

    def counters(self) -> dict[str, int]:
        words = ffi.cast("uint64_t *", physmap.address(NBD) + 8192)
        return {name: int(words[index]) for index, name in enumerate(nbd.COUNTERS)}

    # --- nbd's process ---

    def start(self, previous_signal: int = 0, wait: bool = True) -> None:
        assert self.pid == 0
        self.incarnation += 1
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._play(previous_signal)
        if wait:
            header = physmap.header(NBD)
            self.poll(lambda: physmap.serves(header, self.incarnation))

    def _play(self, previous_signal: int) -> None:
        status = 70
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)  # the test's watchdog
            for role in (KERNEL, NIC, DEDUP):
                self._map(role, writable=False)
            self._map(NBD, writable=True)
            if self.service is not None:
                vars(nbd).update(ffi=self.service[0], lib=self.service[1])
            if self.before is not None:
                self.before(vars(nbd)["lib"])
            context = self._open(NBD, self.incarnation, previous_signal)
            nbd.main(context)
            context.stopped()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def is_dead(self) -> bool:
        """True if the process has ended; `last_status` then says how."""
        if self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid, self.last_status = 0, status
        return self.pid == 0

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)
        _, self.last_status = os.waitpid(self.pid, 0)
        self.pid = 0

    def ends(self, timeout_s: float = 60.0) -> None:
        """Turns until nbd has ended."""
        deadline = time.monotonic() + timeout_s
        while not self.is_dead():
            if not self.turn():
                time.sleep(0.0001)
            assert time.monotonic() < deadline, "nbd lives"

    def poll(self, look: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.is_dead()  # asked first: what it did last, its answer to a stop, say, is there then
            if look():
                return
            assert not ended, f"nbd ended by itself, wait status {self.last_status:#x}"
            assert time.monotonic() < deadline, "deadline"
            time.sleep(0.0002)

    # --- Both stand-ins ---

    def put(self, sender: int, to: int = NBD, **fields: Any) -> None:
        message = self.message
        ffi.memmove(message, bytes(64), 64)
        for name, value in fields.items():
            if name in ("bytes", "words", "halves"):
                for index, item in value.items() if isinstance(value, dict) else enumerate(value):
                    getattr(message, name)[index] = item
            else:
                setattr(message, name, value)
        assert lib.atoll_domain_put(self.peers[sender].domain, to, message)

    def take(self, role: int) -> list[Any]:
        found: list[Any] = []
        while True:
            message = ffi.new("struct atoll_descriptor *")
            if not lib.atoll_domain_take(self.peers[role].domain, NBD, message):
                return found
            found.append(message)

    def turn(self) -> bool:
        """Everything that can be done now, by nic and by dedup. True if there was anything."""
        busy = False
        for message in self.take(NIC):
            busy = True
            self._take_reply(message)
        for message in self.take(DEDUP):
            busy = True
            self._take_work(message)
        busy |= self._work()
        for role in (NIC, DEDUP):
            lib.atoll_domain_commit(self.peers[role].domain)
        return busy

    def settle(self, timeout_s: float = 20.0, until: Callable[[], bool] | None = None) -> None:
        """Turns until no slot is in use (or `until`). AssertionError if nbd ends or takes too long."""
        until = until or (lambda: not self.uses)
        deadline = time.monotonic() + timeout_s
        while not until():
            if not self.turn() and not until():
                assert not self.is_dead(), f"nbd ended by itself, wait status {self.last_status:#x}"
                assert time.monotonic() < deadline, f"deadline; in use: {self.uses}"
                time.sleep(0.0001)

    # --- nic ---

    def connect(self) -> Wire:
        wire = Wire(self, len(self.wires))
        self.wires.append(wire)
        self._use(wire, lib.ATOLL_OP_OPEN)
        return wire

    def _use(self, wire: Wire, opcode: int, data: bytes = b"", **fields: Any) -> int:
        slot = self.free_slots.pop()
        self.sequences[slot] = (self.sequences[slot] + 1) & 0xFFFFFFFF
        self.uses[slot] = Use(wire, self.sequences[slot])
        if data:
            assert len(data) <= LIST_BYTES
            fields |= {"address": self.nic_list(slot), "length": len(data)}
            ffi.memmove(ffi.cast("char *", self.nic_list(slot)), data, len(data))
        self.put(NIC, opcode=opcode, identity=self.identity(slot), **fields)
        lib.atoll_domain_commit(self.peers[NIC].domain)
        return slot

    def identity(self, slot: int) -> int:
        use = self.uses[slot]
        return use.wire.number << 48 | slot << 32 | use.sequence

    def nic_list(self, slot: int) -> int:
        return self.peers[NIC].role_area + NIC_PUBLIC_BYTES + slot * LIST_BYTES

    def page_address(self, page: int) -> int:
        return self.peers[NIC].buffer_area + page * BLOCK

    def place_part(self, slot: int) -> dict[str, Any]:
        """The next part of the slot's payload goes into pages; the fields of its message."""
        use = self.uses[slot]
        assert use.request is not None and not use.pages
        at = use.request.offset + use.sent_bytes
        base = use.request.offset // BLOCK * BLOCK
        end = min(base + (use.part + 1) * PART - use.request.offset, len(use.payload))
        part = use.payload[use.sent_bytes : end]
        use.sent_bytes = end
        table = ffi.cast("struct atoll_segment *", self.nic_list(slot))
        count, done = 0, 0
        while done < len(part):
            inside = (at + done) % BLOCK
            piece = part[done : done + BLOCK - inside]
            page = self.free_pages.pop(self.random.randrange(len(self.free_pages)))
            use.pages.append(page)
            address = self.page_address(page) + inside
            ffi.memmove(ffi.cast("char *", address), piece, len(piece))
            table[count].address, table[count].length, table[count].kind = address, len(piece), 0
            count, done = count + 1, done + len(piece)
        if count == 1:
            return {"address": table[0].address, "length": len(part), "segment_count": 0}
        return {"address": self.nic_list(slot), "length": len(part), "segment_count": count}

    def _take_reply(self, message: Any) -> None:
        slot = message.identity >> 32 & 0xFFFF
        assert slot in self.uses, f"reply {message.opcode} to slot {slot}, which is not in use"
        assert message.identity == self.identity(slot), "reply to an earlier use of the slot"
        use, flags = self.uses[slot], message.flags
        if use.pages:
            if flags & lib.ATOLL_FLAG_TAKEN:
                self.lent_pages.update(use.pages)
            else:
                self.free_pages += use.pages
            use.pages = []
        else:
            assert not flags & lib.ATOLL_FLAG_TAKEN
        if message.opcode == lib.ATOLL_OP_NEXT:
            assert message.part == use.part & 0xFFFF and use.sent_bytes < len(use.payload)
            assert flags == lib.ATOLL_FLAG_TAKEN
            use.part += 1
            if use.wire.is_gone:
                fields: dict[str, Any] = {"status": lib.ATOLL_EIO}
            else:
                fields = self.place_part(slot)
            self.put(NIC, opcode=lib.ATOLL_OP_PART, identity=message.identity, part=use.part & 0xFFFF, **fields)
            return
        assert message.opcode == lib.ATOLL_OP_REPLY
        use.wire.receive(self._gather(message), message)
        if flags & lib.ATOLL_FLAG_LAST:
            del self.uses[slot]
            self.nic_public().done[slot] = use.sequence
            self.free_slots.insert(0, slot)
            use.wire.outstanding -= 1
            if use.request is not None:
                use.wire.finished(use)
        else:
            assert message.part == use.reply_part & 0xFFFF
            use.reply_part += 1
            self.put(NIC, opcode=lib.ATOLL_OP_SENT, identity=message.identity, part=message.part)

    def _gather(self, message: Any) -> bytes:
        if message.segment_count == 0:
            segments = [(message.address, message.length)] if message.length else []
        else:
            table = ffi.cast("struct atoll_segment *", message.address)
            assert message.segment_count <= lib.ATOLL_REPLY_SEGMENTS
            segments = [(table[i].address, table[i].length) for i in range(message.segment_count)]
        data = b""
        for address, length in segments:
            role = (address - physmap.address(0)) >> 38
            assert role in NAMES and address + length <= physmap.address(role) + self.sizes[role]
            data += ffi.buffer(ffi.cast("char *", address), length)[:]
        assert len(data) == message.length
        return data

    # --- dedup ---

    def dedup_list(self, slot: int) -> int:
        return self.peers[DEDUP].role_area + PUBLIC_BYTES + slot * LIST_BYTES

    def dedup_page(self, slot: int, index: int) -> int:
        return self.peers[DEDUP].buffer_area + (slot * DEDUP_PAGES + index) * BLOCK

    def zeros(self) -> int:
        return self.peers[DEDUP].buffer_area + SLOTS * DEDUP_PAGES * BLOCK

    def _take_work(self, message: Any) -> None:
        work = Work(
            message.opcode, message.identity, message.part, message.flags & ~lib.ATOLL_FLAG_ALONE,
            bool(message.flags & lib.ATOLL_FLAG_ALONE), message.words[0], message.words[1],
            message.halves[4], message.halves[5], message.address, message.length, message.segment_count,
        )  # fmt: skip
        slot = work.identity >> 32 & 0xFFFF
        use = self.uses[slot]
        assert work.identity == self.identity(slot), "work for an earlier use of the slot"
        assert work.part not in use.executed and work.part == len(use.executed) & 0xFFFF, "a part twice or out of turn"
        use.executed.add(work.part)
        self.waiting.append(work)

    def _work(self) -> bool:
        if self.hold or not self.waiting:
            return False
        if self.shuffle:
            self.random.shuffle(self.waiting)
            count = self.random.randint(1, len(self.waiting))
        else:
            count = len(self.waiting)
        now, self.waiting = self.waiting[:count], self.waiting[count:]
        for work in now:
            self._execute(work)
        return True

    def _execute(self, work: Work) -> None:
        self.log.append(work)
        slot = work.identity >> 32 & 0xFFFF
        use = self.uses[slot]
        volume = self.volumes.get(work.volume)
        status = lib.ATOLL_OK
        if volume is None or volume.generation != work.generation:
            status = lib.ATOLL_ENOENT
        elif self.rule is not None:
            status = self.rule(work)
        fields: dict[str, Any] = {}
        if status == lib.ATOLL_OK:
            assert volume is not None and work.offset + work.length <= len(volume.data)
            fields = self._apply(work, slot, use, volume)
        elif not use.failed:
            use.failed = status
        self.put(
            DEDUP, opcode=lib.ATOLL_OP_DONE, identity=work.identity, part=work.part, status=status,
            words={0: work.offset // BLOCK, 1: self.failed_lba}, **fields,
        )  # fmt: skip

    def _apply(self, work: Work, slot: int, use: Use, volume: VolumeData) -> dict[str, Any]:
        start, end = work.offset, work.offset + work.length
        if work.opcode in (lib.ATOLL_OP_WRITE, lib.ATOLL_OP_ZERO, lib.ATOLL_OP_TRIM):
            self.memory.forget(volume.id, volume.generation, start // BLOCK, -(-end // BLOCK))
        match work.opcode:
            case lib.ATOLL_OP_READ:
                if self.remember:
                    for lba in range(start // BLOCK, -(-end // BLOCK)):
                        block = bytes(volume.data[lba * BLOCK : (lba + 1) * BLOCK])
                        self.memory.put(volume.id, volume.generation, lba, block.ljust(BLOCK, b"\0"))
                use.expected += volume.data[start:end]
                return self._read(slot, start, bytes(volume.data[start:end]))
            case lib.ATOLL_OP_WRITE:
                volume.data[start:end] = self._payload(work)
            case lib.ATOLL_OP_ZERO | lib.ATOLL_OP_TRIM:
                volume.data[start:end] = bytes(work.length)
            case lib.ATOLL_OP_EXTENTS:
                return self._extents(slot, start, end, volume)
        return {}

    def _payload(self, work: Work) -> bytes:
        segments = [(work.address, work.payload_bytes)]
        if work.segment_count:
            table = ffi.cast("struct atoll_segment *", work.address)
            segments = [(table[i].address, table[i].length) for i in range(work.segment_count)]
        data = b"".join(ffi.buffer(ffi.cast("char *", address), length)[:] for address, length in segments)
        assert len(data) == work.length == work.payload_bytes <= PART
        assert (segments[0][0] - work.offset) % BLOCK == 0, "a block's bytes lie at their offset within the page"
        return data

    def _read(self, slot: int, start: int, data: bytes) -> dict[str, Any]:
        assert len(data) <= PART
        table = ffi.cast("struct atoll_segment *", self.dedup_list(slot))
        count = done = 0
        while done < len(data):
            inside = (start + done) % BLOCK
            piece = data[done : done + BLOCK - inside]
            entry = table[count]
            if any(piece):
                address = self.dedup_page(slot, count) + inside
                ffi.memmove(ffi.cast("char *", address), piece, len(piece))
                entry.address, entry.kind = address, lib.ATOLL_SEGMENT_DATA
            else:
                entry.address, entry.kind = self.zeros(), lib.ATOLL_SEGMENT_HOLE
            entry.length = len(piece)
            count, done = count + 1, done + len(piece)
        if count == 1 and table[0].kind == lib.ATOLL_SEGMENT_DATA:
            return {"address": table[0].address, "length": len(data)}
        return {"address": self.dedup_list(slot), "length": len(data), "segment_count": count}

    def _extents(self, slot: int, start: int, end: int, volume: VolumeData) -> dict[str, Any]:
        table = ffi.cast("struct atoll_extent *", self.dedup_list(slot))
        count = 0
        while start < end and count < LIST_BYTES // 16:
            stop = min(end, start // BLOCK * BLOCK + BLOCK)
            table[count].length_bytes, table[count].state = stop - start, 0 if any(volume.data[start:stop]) else 3
            start, count = stop, count + 1
        return {"address": self.dedup_list(slot), "length": count * 16}

    # --- The kernel ---

    def call(self, name: str, **fields: Any) -> dict[str, Any]:
        self.calls.start(NBD, {"call": name, **fields})
        found: list[Any] = []

        def answered() -> bool:
            found.extend(self.calls.receive())
            return bool(found)

        self.poll(answered)
        assert found[0].kind == "result"
        return dict(found[0].message)

    # --- The end ---

    def check_quiet(self) -> None:
        """Nothing is under way and nothing is lost: no slot, no page, no message that belonged to nothing."""
        assert not self.uses and not self.waiting
        assert len(self.free_pages) + len(self.lent_pages) == PAGES
        area = self.area()
        assert not any(area.slots[i].state for i in range(SLOTS)), "a slot is still in use"
        assert not any(area.connections[wire.number].in_flight for wire in self.wires)
        counters = self.counters()
        assert not counters["stale_messages"] and not counters["peer_faults"], counters

    def close(self) -> None:
        if self.pid:
            self.kill()
        for role in NAMES:
            physmap.unmap_arena(role)
            objects.unlink(self._name(role))

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Wire:
    """A client's connection, at the level of frames."""

    def __init__(self, stage: Stage, number: int) -> None:
        self.stage, self.number = stage, number
        self.outstanding = 1  # the OPEN
        self.stream = b""  # in negotiation: bytes not yet looked at
        self.framing = Framing.KEEP
        self.is_closed = False  # the server closes it
        self.is_gone = False  # the client has left
        self.has_ended = False  # the client has sent DISC or what is no request
        self.decoder: Decoder | None = None
        self.results: dict[int, Result] = {}
        self.next_cookie = 1

    def receive(self, data: bytes, message: Any) -> None:
        if self.is_closed or self.is_gone:
            return  # nic swallows it
        if message.flags & lib.ATOLL_FLAG_LAST and message.halves[0]:
            self.framing = Framing(message.halves[0])
        if self.decoder is None:
            self.stream += data
        else:
            for result in self.decoder.feed(data):
                self.results[result.request.cookie] = result
        self.is_closed = bool(message.flags & lib.ATOLL_FLAG_CLOSE)

    def finished(self, use: Use) -> None:
        """A request's last reply has come: it must be whole, and a READ's data those that dedup saw."""
        assert use.request is not None
        if self.decoder is None or self.is_gone or self.is_closed or use.silent:
            return
        assert self.decoder.buffered == 0, "a reply is not whole"
        result = self.results.get(use.request.cookie)
        assert result is not None, "the last reply is sent, but the request has no complete answer"
        if use.request.command in CHANGES:
            self.stage.changes += 1
        if result.error is None and use.request.command == Command.READ and use.executed:
            assert result.data == use.expected
        elif result.error is None and use.request.command == Command.READ and use.changes == self.stage.changes:
            start, end = use.request.offset, use.request.offset + use.request.length
            assert any(result.data == bytes(v.data[start:end]) for v in self.stage.volumes.values()), "from memory"

    @property
    def has_chunks(self) -> bool:
        """Structured replies or extended headers are negotiated."""
        return self.decoder is not None and (self.decoder.structured or self.decoder.extended)

    # --- Negotiation ---

    def send_flags(self, flags: int = 3) -> None:
        self.outstanding += 1
        header = dict(enumerate(struct.pack(">I", flags)))
        self.stage._use(self, lib.ATOLL_OP_OPTION, bytes={**header, 20: 4})

    def send_option(
        self, number: int, data: bytes = b"", length: int | None = None, magic: bytes = OPTION_MAGIC
    ) -> None:
        self.outstanding += 1
        head = magic + struct.pack(">II", number, len(data) if length is None else length)
        self.stage._use(self, lib.ATOLL_OP_OPTION, data, bytes={**dict(enumerate(head)), 20: 16})

    def take_stream(self) -> bytes:
        data, self.stream = self.stream, b""
        return data

    def option(self, number: int, data: bytes = b"") -> bytes:
        self.send_option(number, data)
        self.stage.settle()
        return self.take_stream()

    def negotiate(self, structured: bool = True, extended: bool = False, export: bytes = b"") -> Wire:
        """To the transmission phase, with base:allocation where it is possible."""
        self.stage.settle()
        assert self.take_stream()[:8] == b"NBDMAGIC"
        self.send_flags()
        self.stage.settle()
        if extended:
            self.option(Option.EXTENDED_HEADERS)
        elif structured:
            self.option(Option.STRUCTURED_REPLY)
        if structured or extended:
            self.option(Option.SET_META_CONTEXT, meta_data(export, [b"base:allocation"]))
        self.option(Option.GO, info_data(export))
        assert self.framing == (Framing.EXTENDED if extended else Framing.REQUEST)
        self.decoder = Decoder(structured or extended, extended)
        return self

    # --- Transmission ---

    def submit(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes = b"",
        magic: int | None = None,
        failure: tuple[int, int, int] | None = None,
    ) -> int:
        """Sends a request as nic would; returns its cookie. `failure`: status, place, block that nic was told of."""
        assert self.decoder is not None
        if self.decoder.extended and payload:
            flags |= 32
        cookie = self.next_cookie
        self.next_cookie += 1
        request = Request(command, flags, cookie, offset, length or len(payload))
        if command != Command.DISC and magic is None:
            self.decoder.expect(request)
        self.submit_raw(request, payload, magic, failure)
        return cookie

    def submit_raw(
        self,
        request: Request,
        payload: bytes = b"",
        magic: int | None = None,
        failure: tuple[int, int, int] | None = None,
    ) -> None:
        stage = self.stage
        assert self.decoder is not None
        head = request_bytes(request, b"", self.decoder.extended, magic)
        slot = stage.free_slots.pop()
        stage.sequences[slot] += 1
        self.has_ended |= request.command == Command.DISC or magic is not None
        stage.changes += request.command in CHANGES
        use = stage.uses[slot] = Use(
            self, stage.sequences[slot], request, payload, silent=self.has_ended, changes=stage.changes
        )
        self.outstanding += 1
        fields = stage.place_part(slot) if payload else {}
        if failure is not None:
            use.failed = failure[0]
            fields |= dict(zip(("status", "address", "length"), failure, strict=True))
        assert not use.part
        stage.put(
            NIC, opcode=lib.ATOLL_OP_REQUEST, identity=stage.identity(slot), bytes=dict(enumerate(head)), **fields
        )
        lib.atoll_domain_commit(stage.peers[NIC].domain)

    def call(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Result:
        cookie = self.submit(command, offset, length, flags, payload)
        self.stage.settle()
        return self.results.pop(cookie)

    def leave(self) -> None:
        """The client drops the connection: nic awaits what is outstanding, then says CLOSED."""
        self.is_gone = True
        self.stage.settle(until=lambda: self.outstanding == 0)
        self.outstanding += 1
        self.stage._use(self, lib.ATOLL_OP_CLOSED)
        self.stage.settle(until=lambda: self.outstanding == 0)
