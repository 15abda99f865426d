"""A simulation of dedup in which one seed decides everything: the real C of dedup and its store on dedupkit's stage,
and a world around it that does its worst within the rules.

    Torture(seed, operations, hooked).run()

- Time is the world's: it goes on by as much as the world likes from turn to turn (hook_set_clock).
- The disk holds each request for as long as it likes and completes them in any order. It fails some, having done a part
  of them. What a failed sync should have made durable can be read until the power is lost, and need not be there then,
  whatever later syncs say, unless it has been written again.
- Each run has a theme (THEMES): flushes that fail, pages of counts that do not come, more metadata than memory has room
  for, a full device, a small fast tier that falls silent, deaths that are dedup's own fault.
- dedup has its processor to itself or not; nbd begins anew and sends again; where the device is full, more may be
  posted than is allowed: who was acknowledged keeps their place all the same.
- Requests overlap. dedup dies between any two stores of its journal, while it recovers, too; everybody dies; the power
  is lost; all is closed and started again.
- The oracle knows for each block what it may hold: of the requests under way each may have been carried out or not, in
  any order, but none twice, and none after its answer (`Block`). What it may hold after a power loss is all it may have
  held since the last flush that was acknowledged was sent.

`trace` prints what is done.
"""

from __future__ import annotations

import mmap
import random
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from dedupkit import BLOCK, DEDUP, DISK, FUA, LLRRM, NO_HOLE, OK, Io, Request, Stage
from lookupkit import Reader

from atoll.ipc import physmap
from atoll.ipc._ipc import ffi, lib

SECTOR = 512
LEAF = 512  # blocks
READ, WRITE, TRIM, ZERO = lib.ATOLL_OP_READ, lib.ATOLL_OP_WRITE, lib.ATOLL_OP_TRIM, lib.ATOLL_OP_ZERO
FLUSH, EXTENTS = lib.ATOLL_OP_FLUSH, lib.ATOLL_OP_EXTENTS
IO_READ, IO_WRITE, IO_SYNC = lib.ATOLL_OP_IO_READ, lib.ATOLL_OP_IO_WRITE, lib.ATOLL_OP_IO_SYNC
EIO, ENOSPC, ENOENT, EPOISON = (
    int(lib.ATOLL_EIO), int(lib.ATOLL_ENOSPC), int(lib.ATOLL_ENOENT), int(lib.ATOLL_EPOISON)
)  # fmt: skip
FAULTS = {EIO, int(lib.ATOLL_EUNFLUSHED)}  # only while the disk fails
POSTED_PART = 16
PENDING_MOST = 3  # requests that change one block at once
PATIENCE = 60_000  # turns in which everything comes to an end once the disk behaves
MS = 1_000_000


# --- Contents ---------------------------------------------------------------------------------------------------------


class Contents:
    """Blocks by number; 0 is zeros. Equal blocks have one number."""

    def __init__(self) -> None:
        self.blocks = [bytes(BLOCK)]
        self.numbers = {self.blocks[0]: 0}

    def number(self, block: bytes) -> int:
        found = self.numbers.get(block)
        if found is None:
            found = self.numbers[block] = len(self.blocks)
            self.blocks.append(block)
        return found

    def fresh(self) -> int:
        return self.number(struct.pack("<Q", len(self.blocks) << 8 | 1) * (BLOCK // 8))

    def merged(self, old: int, start: int, new: bytes) -> int:
        block = self.blocks[old]
        return self.number(block[:start] + new + block[start + len(new) :])


# --- The disk ---------------------------------------------------------------------------------------------------------


class Volatile:
    """A block that was written since the last sync: what is durable, and all versions since, with the time of each."""

    __slots__ = ("clean", "stable", "versions")

    def __init__(self, stable: bytes) -> None:
        self.stable = stable
        self.versions: list[tuple[int, bytes]] = []
        self.clean = 0  # versions up to this time are not made durable by any sync any more


class Device:
    def __init__(self, blocks: int, chance: random.Random) -> None:
        self.memory = mmap.mmap(-1, blocks * BLOCK)
        self.chance = chance
        self.volatile: dict[int, Volatile] = {}
        self.time = 0

    def write(self, offset: int, data: bytes, torn: bool = False) -> None:
        """`torn`: of each block a part, perhaps nothing."""
        self.time += 1
        for at in range(0, len(data), BLOCK):
            pba = (offset + at) // BLOCK
            old = self.memory[pba * BLOCK : (pba + 1) * BLOCK]
            new = data[at : at + BLOCK]
            if torn:
                new = self._torn(old, new)
            block = self.volatile.get(pba)
            if block is None:
                block = self.volatile[pba] = Volatile(old)
            block.versions.append((self.time, new))
            self.memory[pba * BLOCK : (pba + 1) * BLOCK] = new

    def _torn(self, old: bytes, new: bytes) -> bytes:
        match self.chance.randrange(3):
            case 0:
                return old
            case 1:
                return new
        mask = self.chance.getrandbits(BLOCK // SECTOR)
        return b"".join(
            (new if mask >> sector & 1 else old)[sector * SECTOR : (sector + 1) * SECTOR]
            for sector in range(BLOCK // SECTOR)
        )

    def synced(self, since: int) -> None:
        """A sync that was asked for at that time has succeeded."""
        for pba, block in list(self.volatile.items()):
            covered = [version for version in block.versions if version[0] <= since]
            if not covered:
                continue
            if covered[-1][0] > block.clean:
                block.stable = covered[-1][1]
                block.versions = block.versions[len(covered) :]
                if not block.versions:
                    del self.volatile[pba]

    def sync_failed(self) -> None:
        """The operating system may have taken pages for clean that it could not write."""
        share = self.chance.choice([0.0, 0.3, 1.0])
        for block in self.volatile.values():
            if self.chance.random() < share:
                block.clean = block.versions[-1][0]

    def lose_power(self) -> None:
        way = self.chance.choice(["none", "none", "some", "some", "sectors", "all"])
        for pba, block in self.volatile.items():
            what = block.versions[-1][1]
            if way == "none" or block.clean >= block.versions[-1][0]:
                what = block.stable
            elif way != "all":
                what = self.chance.choice([block.stable, *(version for _, version in block.versions)])
            if way == "sectors":
                what = self._torn(block.stable, block.versions[-1][1])
            self.memory[pba * BLOCK : (pba + 1) * BLOCK] = what
        self.volatile.clear()


# --- The oracle -------------------------------------------------------------------------------------------------------

State = tuple[int, int]  # content, and the bits of the requests under way that have been carried out


class Op:
    """A request, and what it does to blocks."""

    __slots__ = ("bits", "born", "changes", "fua", "kind", "ragged", "request", "seen", "sent", "volume")

    def __init__(self, kind: str, volume: Volume, sent: int) -> None:
        self.kind, self.volume, self.sent = kind, volume, sent
        self.request: Request | None = None
        self.changes: dict[int, Callable[[int], int]] = {}  # by LBA
        self.bits: dict[int, int] = {}
        self.seen: dict[int, tuple[set[int], int]] = {}  # of a read: contents, version when it was sent
        self.fua = False

    def __repr__(self) -> str:
        where = f"{self.request.offset / BLOCK:g} + {self.request.length / BLOCK:g}" if self.request is not None else ""
        return f"{self.kind} of {self.volume.name} {where} sent at {self.sent}"


class Block:
    """`states`: what it may be now. `history`: (time, states) since the last acknowledged flush was sent."""

    __slots__ = ("free_bits", "history", "pending", "readers", "states", "version")

    def __init__(self) -> None:
        self.states: frozenset[State] = frozenset([(0, 0)])
        self.pending: dict[int, Callable[[int], int]] = {}  # by bit
        self.readers: list[Op] = []
        self.history: list[tuple[int, frozenset[State]]] = [(0, self.states)]
        self.version = 0

    def contents(self) -> set[int]:
        return {content for content, _ in self.states}

    def close(self) -> None:
        """Each that is under way may be carried out at any time."""
        found, work = set(self.states), list(self.states)
        while work:
            content, mask = work.pop()
            for bit, change in self.pending.items():
                if not mask & bit and (state := (change(content), mask | bit)) not in found:
                    found.add(state)
                    work.append(state)
        self.states = frozenset(found)

    def changed(self, time: int, durable: int) -> None:
        self.version += 1
        history = self.history
        while len(history) > 1 and history[1][0] <= durable:
            del history[0]
        history.append((time, self.states))

    def begin(self, change: Callable[[int], int], time: int, durable: int) -> int:
        bit = next(1 << shift for shift in range(64) if 1 << shift not in self.pending)
        self.pending[bit] = change
        self.close()
        self.changed(time, durable)
        contents = self.contents()
        for reader in self.readers:
            reader_seen(reader, self, contents)
        return bit

    def end(self, bit: int, applied: bool | None, time: int, durable: int) -> None:
        """`applied`: None: nobody knows."""
        del self.pending[bit]
        if applied is not None:
            self.states = frozenset(state for state in self.states if bool(state[1] & bit) == applied)
            assert self.states
        self.states = frozenset((content, mask & ~bit) for content, mask in self.states)
        self.changed(time, durable)

    def ended_durably(self, bit: int, sent: int) -> None:
        """Before `end`, of a write with FUA: what it was when that had been carried out, and since."""
        since = frozenset(state for time, states in self.history if time >= sent for state in states if state[1] & bit)
        self.history = [(sent, since)]

    def abandon(self, time: int, durable: int) -> None:
        """Whoever was under way has been carried out or never will be."""
        self.pending.clear()
        self.readers.clear()
        if any(mask for _, mask in self.states):
            self.states = frozenset((content, 0) for content, _ in self.states)
            self.changed(time, durable)

    def durable_contents(self, durable: int) -> set[int]:
        first = max((index for index, (time, _) in enumerate(self.history) if time <= durable), default=0)
        return {content for _, states in self.history[first:] for content, _ in states}

    def settle(self, contents: Iterable[int], time: int) -> None:
        self.states = frozenset((content, 0) for content in contents)
        self.history = [(time, self.states)]
        self.version += 1

    def narrow(self, content: int) -> None:
        """It is that, and has been since it changed last."""
        self.states = frozenset([(content, 0)])
        self.history[-1] = (self.history[-1][0], self.states)


def reader_seen(reader: Op, block: Block, contents: set[int]) -> None:
    for lba, (seen, _) in reader.seen.items():
        if reader.volume.blocks.get(lba) is block:
            seen |= contents


@dataclass
class Volume:
    name: str
    number: int
    sizes: list[int]  # in blocks; the last is what it is, the others are what it may be again after a power loss
    made: int
    generation: int
    regions: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)
    durable: int = -1  # when the last flush that was acknowledged was sent
    flushed: bool = False  # it is there after a power loss
    gone: int = -1  # when it was deleted

    @property
    def size(self) -> int:
        return self.sizes[-1]

    def block(self, lba: int) -> Block:
        found = self.blocks.get(lba)
        if found is None:
            found = self.blocks[lba] = Block()
        return found


# --- The stage --------------------------------------------------------------------------------------------------------


@dataclass
class Timed(Io):
    due: int = 0  # turn
    since: int = 0  # the disk's time
    region: str = ""
    waits: bool = False  # a sync, for those that it comes after


class World(Stage):
    """dedupkit's stage with a disk of its own and deaths in this process."""

    def __init__(self, device: Device, fast: Device | None, clock: list[int], **settings: Any) -> None:
        super().__init__(asks=0.5, **settings)
        self.device.close()
        self.device, self.disks = device.memory, {DISK: device}
        if fast is not None:
            self.fast.close()
            self.fast = fast.memory
            self.disks[LLRRM] = fast
        self.clock = clock
        self.adopted = False
        self.outcome: Callable[[Io], int] = lambda io: OK
        self.taken: Callable[[Io], None] = lambda io: None
        self.is_alone: Callable[[], bool] = lambda: False
        self.in_order = ffi.new("struct atoll_descriptor *")

    def _role_area(self, role: int) -> int:
        return physmap.address(role) + int(physmap.header(role).role_offset)

    def __exit__(self, *_: Any) -> None:
        for role in self.rings:
            physmap.unmap_arena(role)

    @property
    def public(self) -> Any:
        return ffi.cast("struct atoll_dedup_public *", self._role_area(DEDUP))

    def become(self, stores: int = 0, quarantine: bool = False, crashed: bool = False) -> bool:
        """The next incarnation; False: it has died while it recovered. `crashed`: the one before died by itself."""
        self.incarnation += 1
        self.domain = self._open_domain(DEDUP, self.incarnation)
        error = self.ffi.new("char[256]")
        here = self.ffi.cast("struct atoll_domain *", int(ffi.cast("uintptr_t", self.domain)))
        fresh = self.incarnation == 1
        self.state = self.lib.hook_open(here, self.config, fresh, self.adopted, quarantine, stores, crashed, error)
        assert self.state != self.ffi.NULL or not self.ffi.string(error), self.ffi.string(error)
        if self.state == self.ffi.NULL:
            return False
        lib.atoll_domain_serving(self.domain)
        return True

    def turn_or_death(self, stores: int) -> bool:
        return bool(self.lib.hook_turn(self.state, stores))

    def everybody_dies(self) -> None:
        super().everybody_dies()
        self.adopted = True

    def submit(
        self, opcode: int, volume: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0,
        scattered: bool = False, generation: int | None = None, part: int = 0,
    ) -> Request:  # fmt: skip
        flags |= lib.ATOLL_FLAG_ALONE if self.is_alone() else 0
        return super().submit(opcode, volume, offset, length, payload, flags, scattered, generation, part)

    # --- Faster than the stage's own --------------------------------------------------------------------------------

    def _take_ios(self, role: int) -> None:
        message = self.in_order
        domain = self.domains[role]
        found = False
        while lib.atoll_domain_take(domain, DEDUP, message):
            found = True
            if message.segment_count:
                table = ffi.cast("struct atoll_segment *", int(message.address))
                segments = [(int(table[i].address), int(table[i].length)) for i in range(message.segment_count)]
            else:
                segments = [(int(message.address), int(message.length))] if message.length else []
            io = Timed(int(message.opcode), int(message.identity), int(message.words[0]), int(message.length), segments)
            io.role = role
            io.know_order(message)
            self.ios.append(io)
            self.taken(io)
        if found:
            lib.atoll_domain_commit(domain)

    def complete(self, io: Io, status: int | None = None) -> None:
        assert self.may_begin(io)
        self.ios.remove(io)
        status = self.outcome(io) if status is None else status
        message = self.message
        ffi.memmove(message, bytes(64), 64)
        message.opcode, message.identity, message.status = lib.ATOLL_OP_IO_DONE, io.identity, status
        assert lib.atoll_domain_put(self.domains[io.role], DEDUP, message)
        lib.atoll_domain_commit(self.domains[io.role])

    def fill(self, io: Io) -> None:
        at, memory = io.offset, self.disks[io.role].memory
        base, end = self.buffer_of(io.role)
        for address, size in io.segments:
            assert base <= address and address + size <= end
            ffi.memmove(ffi.cast("char *", address), memory[at : at + size], size)
            at += size

    def disk(self, shuffle: bool = False) -> int:
        self.take_ios()
        ios = list(self.ios)
        for io in ios:
            self.complete(io)
        return len(ios)

    def _lay_out(self, offset: int, payload: bytes, scattered: bool) -> list[tuple[int, int]]:
        count = (offset % BLOCK + len(payload) + BLOCK - 1) // BLOCK
        pages = self.pages(count, scattered)
        assert pages is not None
        segments: list[tuple[int, int]] = []
        at = 0
        for index, page in enumerate(pages):
            self.free_pages.discard(page)
            self.lent_pages.add(page)
            start = offset % BLOCK if index == 0 else 0
            size = min(BLOCK - start, len(payload) - at)
            address = self.nic_buffer + page * BLOCK + start
            ffi.memmove(ffi.cast("char *", address), payload[at : at + size], size)
            if segments and segments[-1][0] + segments[-1][1] == address:
                segments[-1] = (segments[-1][0], segments[-1][1] + size)
            else:
                segments.append((address, size))
            at += size
        return segments

    def pages(self, count: int, scattered: bool = False) -> list[int] | None:
        """Free ones, in a row if there are such."""
        if len(self.free_pages) < count:
            return None
        if scattered:
            return self.random.sample(sorted(self.free_pages), count)
        free, at = self.free_pages, self.random.randrange(self.nic_pages)
        run: list[int] = []
        for index in range(self.nic_pages + count):
            page = (at + index) % self.nic_pages
            run = [*run, page] if page in free and (not run or page == run[-1] + 1) else [page] if page in free else []
            if len(run) == count:
                return run
        return sorted(free)[:count]


# --- What the world is like -------------------------------------------------------------------------------------------


# What a request to the disk is, and how often that is held for long, or fails, where it does at all.
CLASSES = [
    (IO_READ, "pages"),
    (IO_READ, "data"),
    (IO_WRITE, "data"),
    (IO_WRITE, "log"),
    (IO_WRITE, "pages"),
    (IO_WRITE, "super"),
    (IO_SYNC, ""),
    (IO_READ, "rewrite"),
    (IO_WRITE, "rewrite"),
    (IO_READ, "fast"),
    (IO_WRITE, "fast"),
]
THEMES = ["", "", "syncs", "stuck", "paging", "full", "tier", "crashes"]


class Weather:
    """How the disk and the clients behave for a while."""

    def __init__(self, chance: random.Random, failing: bool, theme: str = "") -> None:
        self.typical = chance.choice([0, 0, 1, 3, 10])
        self.held = {each: chance.choice([0.02, 0.2, 0.6]) for each in CLASSES if chance.random() < 0.3}
        self.long = chance.choice([30, 150, 600])
        self.stuck = (
            chance.choice([*CLASSES, (IO_READ, "pages"), (IO_READ, "pages")]) if chance.random() < 0.5 else None
        )
        self.stuck_place: int | None = None  # requests of that class there wait until the weather changes
        self.errors: dict[tuple[int, str], float] = {}
        if failing:
            self.errors = {each: chance.choice([0.02, 0.2, 1.0]) for each in CLASSES if chance.random() < 0.25}
        self.bad_share = chance.choice([0.0, 0.0, 0.1]) if failing else 0.0
        self.bad_seed = chance.randrange(1000)
        self.clock = chance.choice([0, 1_000, 100_000, 3 * MS])
        self.most = chance.choice([2, 10, 30, 60, 150])  # requests under way
        self.pace = chance.choice([0.2, 1.0, 3.0])  # requests a turn
        self.send = chance.choice([0.1, 1.0])
        self.deaths = chance.choice([0.0, 0.0, 0.0, 0.02, 0.2])
        self.unique = chance.choice([0.1, 0.5, 0.9])
        self.kinds = {
            "write": chance.choice([5, 20, 60]), "ragged": chance.choice([0, 3, 15]), "fua": chance.choice([0, 1]),
            "post": chance.choice([0, 5, 30]), "read": chance.choice([2, 10, 40]), "trim": chance.choice([0, 3, 20]),
            "zero": chance.choice([0, 2, 10]), "promise": chance.choice([0, 2, 15]), "flush": chance.choice([0, 1]),
            "cache": chance.choice([0, 1]), "extents": 1,
        }  # fmt: skip
        self.length = chance.choice([2, 8, 40])
        self.hot = chance.choice([1, 3, 1000])  # regions in use
        self.stray = chance.choice([0.0, 0.02])  # requests that go elsewhere
        self.twins = chance.choice([0.0, 0.1])
        self.apart = chance.random() < 0.4  # dedup has its processor to itself
        self.alone = chance.choice([0.0, 0.0, 0.9])  # requests that come one by one
        self.repeats = chance.choice([0.0, 0.0, 0.01])  # nbd is a new one: what is not answered is sent again
        self.rude = False  # more is posted than is allowed
        self.silent = False  # the fast device does not answer
        self.crashing = 0.0  # deaths that are dedup's own fault
        if theme == "syncs":
            self.errors |= {(IO_SYNC, ""): chance.choice([0.1, 0.3])}
            self.kinds |= {"flush": 10, "fua": 5}
        elif theme == "stuck" and chance.random() < 0.8:
            self.stuck, self.held, self.typical = (IO_READ, "pages"), {}, chance.choice([0, 1])
            self.kinds |= {"write": 60, "trim": 20, "read": 2}
            self.length, self.most, self.pace = 8, 150, chance.choice([1.0, 3.0])
            self.unique, self.deaths = 0.6, 0.0
            # Places are used again soon, and nothing waits for the batch that waits.
            self.kinds |= {"flush": 0, "fua": 0, "promise": 0, "zero": 0, "ragged": 3}
            self.hot, self.stray, self.twins = chance.choice([1, 2, 3]), 0.01, 0.1
        elif theme == "paging":
            self.hot = chance.choice([10, 1000, 1000])
            self.stray, self.most = 0.5, chance.choice([30, 150])
        elif theme == "full":
            self.kinds |= {"write": 60, "trim": chance.choice([1, 10]), "read": 2, "flush": chance.choice([0, 0, 1])}
            self.unique, self.hot, self.rude = 0.9, 1000, chance.random() < 0.3
            if chance.random() < 0.5:
                self.held[IO_SYNC, ""], self.long = 0.9, 600
        elif theme == "tier":
            self.silent = chance.random() < 0.2
            self.unique = chance.choice([0.1, 0.3])
        elif theme == "crashes":
            self.deaths, self.crashing = chance.choice([0.01, 0.05, 0.2]), chance.choice([0.2, 1.0])


CALM = Weather(random.Random(0), False)
CALM.typical, CALM.held, CALM.clock, CALM.send, CALM.deaths = 0, {}, MS // 10, 1.0, 0.0
CALM.apart = False


class Torture:
    def __init__(
        self, seed: int, operations: int, hooked: ModuleType, trace: bool = False, theme: str = "", **settings: Any
    ) -> None:
        chance = self.chance = random.Random(seed)
        self.seed, self.operations, self.hooked, self.trace = seed, operations, hooked, trace
        self.counts: Counter[str] = Counter()
        blocks = chance.choice([2304, 3000, 4096, 6000, 6000, 12000])
        self.settings: dict[str, Any] = {
            "device_blocks": blocks,
            "frames": chance.choice([128, 128, 160, 200]),
            "prints": chance.choice([1024, 4096]),
            "nic_pages": chance.choice([192, 300, 512, 1500]),
            "merge_pages": chance.choice([8, 32]),
            "cache_pages": chance.choice([460, 512, 800]),
            "log_blocks": chance.choice([0, 64, 100, 250]),
            "destage_delay_ms": chance.choice([0, 5, 100, 10_000]),
            "track_blocks": 64,
            "fast_blocks": chance.choice([0, 0, 0, 300]),
            "seed": seed,
        } | settings
        self.theme = theme or chance.choice(THEMES)
        match self.theme:
            case "stuck":
                changed = {"device_blocks": 9000, "frames": 400, "nic_pages": 1500, "destage_delay_ms": 0}
            case "paging":
                changed = {"device_blocks": chance.choice([12000, 24000]), "frames": 128}
            case "full":
                changed = {"device_blocks": chance.choice([2304, 3000]), "destage_delay_ms": chance.choice([0, 5])}
            case "tier":
                changed = {"fast_blocks": chance.choice([12, 40, 300])}
            case _:
                changed = {}
        self.settings |= changed | settings
        self.posted_blocks = chance.choice([0, 256, 256])
        self.failures = chance.random() < 0.5
        self.catastrophes = chance.choice([0, 1 / 400, 1 / 100])
        # Blocks that are in use, to those of the device.
        self.extent = chance.choice([0.6, 0.9, 1.3, 2.0]) if self.theme != "stuck" else 0.8
        if self.theme == "full":
            self.extent = chance.choice([1.1, 1.5, 2.0])
        self.contents = Contents()
        self.pool = [self.contents.fresh() for _ in range(chance.choice([4, 40]))]
        self.row = [self.contents.fresh() for _ in range(300)]
        self.device = Device(self.settings["device_blocks"], chance)
        fast = self.settings["fast_blocks"]
        self.fast = Device(fast, chance) if fast else None
        self.clock = 1_000_000_000_000_000
        self.turns = self.time = 0
        self.volumes: list[Volume] = []
        self.ghosts: list[Volume] = []  # deleted, and perhaps there again after a power loss
        self.live: list[Op] = []
        self.late: list[tuple[int, Device, int, bytes]] = []
        self.weather = Weather(chance, self.failures)
        self.rude = False  # more has been posted than is allowed
        self.far = False  # so far apart that the map of a small store may have no page for it
        self.doomed = 0.5 if self.theme == "syncs" else chance.choice([0, 0.3])
        self.doom = 0
        self.lossy = chance.random() < 0.2  # both copies of a page of metadata may fail
        self.unread = False  # a page of metadata, perhaps
        self.crashed = False  # by itself: a block that it died of twice is set aside
        self.plans: list[tuple[int, Callable[[], None]]] = []  # what is done at a turn
        self.faulty = False  # since all was well the last time, something has failed
        self.calm = False
        self.names = 0
        self.stage: World
        self.reader: Reader
        self.initial = 0

    def note(self, *what: Any) -> None:
        if self.trace:
            print(self.turns, self.time, *what, flush=True)

    def tick(self) -> int:
        self.time += 1
        return self.time

    # --- Runs ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._run()
        except Exception:
            self.post_mortem()
            raise
        finally:
            self.hooked.lib.hook_set_clock(0)
            if hasattr(self, "stage"):
                self.stage.__exit__(None, None, None)

    def post_mortem(self) -> None:
        """For who debugs."""

    def _run(self) -> None:
        self.start()
        self.initial = int(self.stage.figures().available_blocks)
        for _ in range(self.chance.choice([1, 3]) if self.theme != "stuck" else 3):
            self.make_volume()
        if self.theme == "stuck" or self.chance.random() < 0.5:
            self.fill()
        left = self.operations
        change = 0
        while left > 0:
            if change <= 0:
                self.weather = Weather(self.chance, self.failures and self.chance.random() < 0.6, self.theme)
                for io in self.stage.ios:
                    io.due = min(io.due, self.turns + self.chance.randrange(100))
                change = self.chance.choice([30, 200, 600]) if self.theme != "stuck" else 500
                self.note("weather", vars(self.weather))
            sent = self.submit_some()
            left -= sent
            for plan in [plan for plan in self.plans if plan[0] <= self.turns]:
                self.plans.remove(plan)
                plan[1]()
            change -= max(sent, 1) if self.chance.random() < 0.5 else sent
            self.turn()
            self.perhaps()
        self.finish()

    def fill(self) -> None:
        """Most of the device, with blocks that all differ; then a restart: no metadata is in memory."""
        self.calm = True
        share = self.chance.choice([0.5, 0.8, 0.9, 0.97])
        for volume in self.volumes:
            for first, count in volume.regions:
                for at in range(first, first + count, 64):
                    if self.stage.figures().available_blocks < (1 - share) * self.initial + 64:
                        break
                    self.until(lambda: len(self.stage.free_pages) > 128, "pages")
                    op = Op("write", volume, 0)
                    material = [self.contents.fresh() for _ in range(min(64, first + count - at))]
                    op.changes = {at + index: self.setter(content) for index, content in enumerate(material)}
                    data = b"".join(self.contents.blocks[content] for content in material)
                    self.send(op, self.stage.write(volume.number, at * BLOCK, data))
                    self.turn()
        self.counts["filled"] += 1
        if self.chance.random() < 0.7:
            self.restart()
        self.calm = False

    def start(self) -> None:
        """A run of the server on the device as it is."""
        if hasattr(self, "stage"):
            self.stage.__exit__(None, None, None)
        self.hooked.lib.hook_set_clock(self.clock)
        self.stage = stage = World(self.device, self.fast, [self.clock], extension=self.hooked, **self.settings)
        stage.config.posted_blocks = self.posted_blocks
        stage.outcome, stage.taken = self.outcome, self.taken
        stage.is_alone = lambda: self.chance.random() < self.weather.alone
        self.live.clear()
        self.reader = Reader(stage)
        self.regions = None
        stage.become()
        calm, self.calm = self.calm, True
        for _ in range(PATIENCE):
            found = stage.lib.dedup_store_state(stage.state)
            if found == 2:
                break
            if found == 3:
                stage.lib.dedup_format(stage.state, 1, 2)
            if found == 4:
                self.refused(stage.ffi.string(stage.lib.dedup_store_reason(stage.state)).decode())
                break
            self.turn(die=self.chance.random() < 0.02 and self.weather.deaths > 0)
        else:
            raise AssertionError("the store is not loaded")
        self.calm = calm

    def refused(self, reason: str) -> None:
        raise AssertionError(f"the store is refused: {reason}")

    def region_of(self, pba: int) -> str:
        if self.regions is None:
            supers = [bytes(self.device.memory[at * BLOCK : at * BLOCK + SECTOR]) for at in (0, 1)]
            found = max(supers, key=lambda image: struct.unpack_from("<Q", image, 40))
            log, second = struct.unpack_from("<Q", found, 56)[0], struct.unpack_from("<Q", found, 88)[0]
            first, other, count = struct.unpack_from("<QQI", found, 288)
            if count == 0:
                return "super"
            self.regions = (2, 2 + log, first, first + count, other, other + count, second, second + log)
        log, log_end, first, first_end, other, other_end, second, second_end = self.regions
        if log <= pba < log_end or second <= pba < second_end:
            return "log"
        if first <= pba < first_end or other <= pba < other_end:
            return "pages"
        return "data" if log_end <= pba < second else "super"

    def is_counts(self, io: Timed) -> bool:
        """A page of counts of blocks that are stored, most of them."""
        words = struct.unpack(f"<{BLOCK // 4}I", self.device.memory[io.offset : io.offset + BLOCK])
        return max(words) < 1000 and words.count(0) < 100

    def is_second(self, io: Timed) -> bool:
        """The page is read from its second place, since it could not be had from the first."""
        assert self.regions is not None
        return io.offset // BLOCK >= self.regions[4]

    # --- The disk -----------------------------------------------------------------------------------------------------

    def taken(self, io: Timed) -> None:
        chance, weather = self.chance, self.weather
        io.region = "" if io.opcode == IO_SYNC else self.region_of(io.offset // BLOCK) if io.role == DISK else "fast"
        if io.region == "data" and self.rewrites(io):
            io.region = "rewrite"
            if not self.calm and chance.random() < self.doomed * 0.2:
                self.doom = self.turns + chance.randrange(6)
        device = self.stage.disks[io.role]
        io.since, io.waits = device.time, not self.stage.may_begin(io)
        if self.calm:
            io.due = self.turns + chance.choice([0, 0, 1])
            return
        if weather.silent and io.role == LLRRM:
            io.due = self.turns + 100_000
            self.counts["silent"] += 1
            return
        io.due = self.turns + (int(chance.expovariate(1 / weather.typical)) if weather.typical else 0)
        if weather.stuck == (io.opcode, io.region):
            likely = 0.3 if self.theme != "stuck" else 0.9 * self.is_counts(io)
            if weather.stuck_place is None and chance.random() < likely:
                weather.stuck_place = io.offset // BLOCK
            if weather.stuck_place == io.offset // BLOCK:
                io.due = self.turns + 100_000
                self.counts["stuck"] += 1
                return
        if chance.random() < weather.held.get((io.opcode, io.region), 0.0):
            io.due = self.turns + chance.randrange(weather.long)
            self.counts["held"] += 1
        elif io.opcode == IO_WRITE and chance.random() < 0.1:
            device.write(io.offset, self.stage.payload(io), torn=True)

    def begins(self, io: Timed) -> bool:
        """A sync that comes after others covers what was done when they were, and takes its time then."""
        if io.waits and self.stage.may_begin(io):
            io.waits, io.since = False, self.stage.disks[io.role].time
            io.due = self.turns + (0 if self.calm else self.chance.choice([0, 0, 1, 5]))
        return not io.waits and (self.calm or io.due <= self.turns)

    def rewrites(self, io: Timed) -> bool:
        """What a failed sync has perhaps lost is read, or written again."""
        _, end = self.stage.buffer_of(DISK)
        return any(end - 128 * BLOCK <= address < end - 64 * BLOCK for address, _ in io.segments)

    def fails(self, io: Timed) -> bool:
        weather = self.weather
        if self.calm or (io.opcode == IO_READ and io.region == "pages" and not self.lossy and self.is_second(io)):
            return False
        if self.chance.random() < weather.errors.get((io.opcode, io.region), 0.0):
            return True
        if weather.bad_share and io.opcode != IO_SYNC:
            for pba in range(io.offset // BLOCK, (io.offset + io.length) // BLOCK):
                if (pba // 8 * 2654435761 + weather.bad_seed * 40503) % 1000 < weather.bad_share * 1000:
                    return True
        return False

    def outcome(self, io: Timed) -> int:
        device = self.stage.disks[io.role]
        failed = self.fails(io)
        self.counts[f"io{io.opcode} {io.region}{' failed' if failed else ''}"] += 1
        if failed:
            self.faulty = True
            self.unread |= io.region == "pages" and io.opcode == IO_READ
            if self.chance.random() < self.doomed * (1 if io.opcode == IO_SYNC else 0.1):
                self.doom = self.turns + self.chance.randrange(1, 40)  # while dedup is busy with that
            self.note("fails", io.opcode, io.region, io.offset // BLOCK, io.length // BLOCK)
            if io.opcode == IO_WRITE:
                device.write(io.offset, self.stage.payload(io), torn=True)
            elif io.opcode == IO_SYNC:
                device.sync_failed()
            return EIO
        if io.opcode == IO_READ:
            self.stage.fill(io)
        elif io.opcode == IO_WRITE:
            device.write(io.offset, self.stage.payload(io))
        elif io.opcode == IO_SYNC:
            device.synced(io.since)
        return OK

    # --- Turns --------------------------------------------------------------------------------------------------------

    def turn(self, die: bool = False) -> None:
        chance, weather, stage = self.chance, CALM if self.calm else self.weather, self.stage
        self.turns += 1
        if weather.clock:
            self.clock += chance.randrange(weather.clock)
        if chance.random() < 0.002:
            self.clock += 1500 * MS
        stage.lib.hook_set_clock(self.clock)
        stage.lib.hook_set_apart(weather.apart)
        if not self.calm and weather.deaths and chance.random() < weather.deaths:
            die = True
        if not self.calm and weather.repeats and chance.random() < weather.repeats:
            self.repeat()
        if die:
            self.die()
        else:
            stage.lib.dedup_turn(stage.state)
        stage.take_ios()
        if stage.ios:
            due = [io for io in stage.ios if io.due <= self.turns or self.calm]
            if len(due) > 1:
                chance.shuffle(due)
            for io in due:
                if self.begins(io):
                    stage.complete(io)
        if self.late:
            self.land()
        self.take_answers()
        if chance.random() < weather.send:
            stage.send_all()

    def repeat(self) -> None:
        """As a new nbd does: it does not know what its predecessor has sent."""
        for op in self.live:
            assert op.request is not None
            self.stage.repeat(op.request)
            self.stage.repeated.add(op.request.identity)
        self.counts["repeats"] += 1

    def die(self) -> None:
        stage, chance = self.stage, self.chance
        stores = int(chance.paretovariate(0.4)) if chance.random() < 0.8 else 0
        died = stage.turn_or_death(stores)
        crashed = chance.random() < self.weather.crashing
        self.note("crashes after" if crashed else "dies after", stores, died)
        self.counts["deaths in a step" if died else "deaths between steps"] += 1
        if crashed:
            self.counts["crashes"] += 1
            self.faulty = self.crashed = True
        while not stage.become(int(chance.paretovariate(0.4)) if chance.random() < 0.4 else 0, crashed=crashed):
            self.counts["deaths while recovering"] += 1

    def land(self, everything: bool = False) -> None:
        """Writes of a run that is dead."""
        for each in list(self.late):
            when, device, offset, data = each
            if everything or when <= self.turns:
                self.late.remove(each)
                self.note("lands", offset // BLOCK, len(data) // BLOCK)
                device.write(offset, data)

    def take_answers(self) -> None:
        stage = self.stage
        before = len(stage.unsent)
        if stage.answers(send=False) == 0:
            return
        done = {id(request) for request in stage.unsent[before:]}
        over = [op for op in self.live if id(op.request) in done]
        self.live = [op for op in self.live if id(op.request) not in done]
        for op in over:
            self.over(op)
        if not any(op.kind == "post" for op in self.live):
            stage.nic_public.posting = 0

    # --- Requests -----------------------------------------------------------------------------------------------------

    def submit_some(self) -> int:
        chance, weather = self.chance, self.weather
        count = int(weather.pace) + (chance.random() < weather.pace % 1)
        sent = 0
        for _ in range(count):
            if len(self.live) < weather.most and self.volumes:
                sent += self.submit()
        return sent

    def place(self, volume: Volume, most: int) -> tuple[int, int]:
        chance = self.chance
        regions = volume.regions
        hot = len(regions) if chance.random() < self.weather.stray else min(len(regions), self.weather.hot)
        first, count = regions[chance.randrange(hot)]
        length = min(1 + int(chance.expovariate(1 / self.weather.length)), most, count)
        if chance.random() < 0.1:
            length = min(most, count)
        return first + chance.randrange(count - length + 1), length

    def twins(self, op: Op, first: int, length: int) -> bool:
        """What no one has written yet, to two places at once: they are written as one."""
        volume = self.chance.choice(self.volumes)
        start, count = self.chance.choice(volume.regions)
        length = min(length, count, 4)
        material = [self.contents.fresh() for _ in range(length)]
        at = start + self.chance.randrange(count - length + 1)
        self.counts["twins"] += 1
        if not self.write(op, first, length, material) or not self.write(Op("write", volume, 0), at, length, material):
            return False
        if self.chance.random() < 0.7:
            where = self.chance.choice([(op.volume, first), (volume, at)])
            self.plans.append((self.turns + self.chance.randrange(60), lambda: self.lose(*where, length)))
        return True

    def lose(self, volume: Volume, first: int, length: int) -> None:
        """What stands there goes: perhaps while it is being written, with others that follow it."""
        if volume not in self.volumes or first + length > volume.size:
            return
        op = Op("trim", volume, 0)
        op.changes = dict.fromkeys(range(first, first + length), self.to_zero)
        if self.room(op):
            self.counts["lost twins"] += 1
            self.send(op, self.stage.trim(volume.number, first * BLOCK, length * BLOCK))

    def material(self, count: int) -> list[int]:
        chance = self.chance
        if chance.random() < self.weather.unique:
            return [self.contents.fresh() for _ in range(count)]
        match chance.randrange(4):
            case 0:
                return [chance.choice(self.pool)] * count
            case 1:
                return [chance.choice(self.pool) for _ in range(count)]
            case 2:
                at = chance.randrange(len(self.row) - min(count, 100))
                return [self.row[(at + index) % len(self.row)] for index in range(count)]
        recent = len(self.contents.blocks)
        return [
            self.contents.fresh() if chance.random() < 0.5 else chance.randrange(max(1, recent - 200), recent)
            for _ in range(count)
        ]

    def submit(self, kind: str = "") -> bool:
        chance, stage = self.chance, self.stage
        if not kind:
            kinds = self.weather.kinds
            kind = chance.choices(list(kinds), list(kinds.values()))[0]
        volume = chance.choice(self.volumes)
        op = Op(kind, volume, 0)
        if kind == "flush":
            self.send(op, stage.flush(volume.number))
            return True
        first, length = self.place(
            volume, POSTED_PART if kind == "post" else 64 if kind in ("write", "ragged", "fua", "read") else 300
        )
        if kind == "write" and chance.random() < self.weather.twins:
            return self.twins(op, first, length)
        if kind in ("write", "ragged", "fua", "post"):
            return self.write(op, first, length)
        offset, size = first * BLOCK, length * BLOCK
        if chance.random() < 0.2:
            offset += chance.randrange(BLOCK)
            size -= offset - first * BLOCK
            size = max(1, size - chance.randrange(BLOCK))
        if kind in ("trim", "zero", "promise"):
            for lba in range(offset // BLOCK, (offset + size - 1) // BLOCK + 1):
                start, stop = max(offset - lba * BLOCK, 0), min(offset + size - lba * BLOCK, BLOCK)
                if start == 0 and stop == BLOCK:
                    op.changes[lba] = self.to_zero
                elif kind != "trim":
                    op.changes[lba] = self.merger(start, bytes(stop - start))
            if not self.room(op):
                return False
            if kind == "trim":
                self.send(op, stage.trim(volume.number, offset, size))
            else:
                self.send(op, stage.zero(volume.number, offset, size, NO_HOLE if kind == "promise" else 0))
        elif kind == "read":
            self.send(op, stage.read(volume.number, offset, size))
        elif kind == "cache":
            self.send(op, stage.cache(volume.number, offset, size))
        else:
            self.send(op, stage.extents(volume.number, first * BLOCK, length * BLOCK))
        return True

    @staticmethod
    def to_zero(old: int) -> int:
        return 0

    def merger(self, start: int, new: bytes) -> Callable[[int], int]:
        return lambda old: self.contents.merged(old, start, new)

    def room(self, op: Op) -> bool:
        """There are not too many yet."""
        blocks = op.volume.blocks
        return all(lba not in blocks or len(blocks[lba].pending) < PENDING_MOST for lba in op.changes)

    def write(self, op: Op, first: int, length: int, given: list[int] | None = None) -> bool:
        chance, stage, volume = self.chance, self.stage, op.volume
        material = given if given is not None else self.material(length)
        data = b"".join(self.contents.blocks[content] for content in material)
        offset = first * BLOCK
        if op.kind == "ragged" or (op.kind == "fua" and chance.random() < 0.3):
            start = chance.randrange(BLOCK)
            data = data[start:]
            offset += start
            data = data[: max(1, len(data) - chance.randrange(BLOCK))]
        for lba in range(offset // BLOCK, (offset + len(data) - 1) // BLOCK + 1):
            at = lba * BLOCK - offset
            if at >= 0 and at + BLOCK <= len(data):
                op.changes[lba] = self.setter(material[lba - first])
            else:
                op.changes[lba] = self.merger(max(-at, 0), data[max(at, 0) : at + BLOCK])
        if not self.room(op) or len(stage.free_pages) < len(op.changes):
            return False
        if op.kind == "post":
            return self.post(op, offset, data)
        op.fua = op.kind == "fua"
        self.send(op, stage.write(volume.number, offset, data, FUA if op.fua else 0, chance.random() < 0.2))
        return True

    @staticmethod
    def setter(content: int) -> Callable[[int], int]:
        return lambda old: content

    def post(self, op: Op, offset: int, data: bytes) -> bool:
        """As nic posts: only what dedup allows, and if it lies in pages in a row."""
        stage = self.stage
        stage.nic_public.posting = 1
        blocks = sum(len(other.changes) for other in self.live if other.kind == "post") + len(op.changes)
        pages = stage.pages(len(op.changes))
        rude = self.weather.rude and not self.calm
        self.rude |= rude
        self.far |= self.theme == "paging" or any(volume.size > 1_000_000 for volume in self.volumes)
        if (
            (blocks > stage.public.posted_blocks and not rude)
            or blocks >= lib.ATOLL_POSTED_BLOCKS
            or pages is None
            or pages[-1] - pages[0] != len(pages) - 1
        ):
            if blocks == len(op.changes):
                stage.nic_public.posting = 0
            return False
        state = stage.random.getstate()
        try:
            request = stage.post(op.volume.number, offset, data)
        except AssertionError:
            stage.random.setstate(state)
            raise
        now = self.send(op, request)
        for lba, bit in op.bits.items():  # answered
            op.volume.blocks[lba].end(bit, True, now, op.volume.durable)
        return True

    def send(self, op: Op, request: Request) -> int:
        volume = op.volume
        op.request, op.sent = request, self.tick()
        self.counts[op.kind] += 1
        self.note(
            op.kind,
            volume.name,
            request.offset / BLOCK,
            request.length / BLOCK,
            [change(-1) if op.kind in ("write", "post") else -1 for change in op.changes.values()][:5]
            if self.trace
            else 0,
        )
        for lba, change in op.changes.items():
            op.bits[lba] = volume.block(lba).begin(change, op.sent, volume.durable)
        if op.kind in ("read", "extents"):
            for lba in range(request.offset // BLOCK, (request.offset + request.length - 1) // BLOCK + 1):
                block = volume.block(lba)
                op.seen[lba] = (block.contents(), block.version)
                block.readers.append(op)
        self.live.append(op)
        return op.sent

    def over(self, op: Op) -> None:
        """It is answered."""
        request, volume, now = op.request, op.volume, self.tick()
        assert request is not None
        status = request.status
        for lba in op.seen:
            volume.blocks[lba].readers.remove(op)
        if volume.gone >= 0:
            return
        self.note("answered", op.kind, volume.name, request.offset / BLOCK, request.length / BLOCK, status)
        if status != OK:
            self.counts[f"{op.kind} status {status}"] += 1
            assert self.legal(op, status), f"{op}: status {status}, {request.failed}"
        if op.bits and op.kind != "post":
            applied = (
                True
                if status == OK
                else False
                if status in (ENOSPC, EPOISON) and op.kind in ("write", "ragged", "fua")
                else None
            )
            for lba, bit in op.bits.items():
                block = volume.blocks[lba]
                if status == OK and op.fua:
                    block.ended_durably(bit, op.sent)
                block.end(bit, applied, now, volume.durable)
        if op.kind == "read" and status == OK:
            self.judge(op, request)
        if op.kind == "extents" and status == OK:
            self.judge_extents(op, request)
        if op.kind == "flush" and status == OK:
            self.flushed(volume, op.sent)

    def legal(self, op: Op, status: int) -> bool:
        """It may fail so."""
        if status in FAULTS and self.faulty and op.kind not in ("post", "cache"):
            return True
        if status in FAULTS and self.faulty and op.kind == "cache" and self.lossy:
            return True  # it comes after a posted write whose page of the map cannot be had
        if status == ENOSPC and op.kind in ("write", "ragged", "fua", "zero", "promise"):
            return True
        if status == EPOISON and op.kind != "post" and self.crashed:
            return True
        if (status in FAULTS and self.far) or (status == ENOSPC and (self.rude or self.far)):
            return True  # of what was posted there, and finds no place in the map
        # or on the device: it is unplaced, and a flush does not wait for somebody to give up some blocks
        return op.kind == "flush" and status in FAULTS and self.rude and self.stage.figures().failed_records != 0

    def flushed(self, volume: Volume, sent: int) -> None:
        volume.durable = max(volume.durable, sent)
        volume.flushed |= volume.made <= sent
        if len(volume.sizes) > 1 and volume.made <= sent:
            volume.sizes = volume.sizes[-1:]
        self.ghosts = [ghost for ghost in self.ghosts if ghost.gone > sent]

    def judge(self, op: Op, request: Request) -> None:
        contents, volume = self.contents, op.volume
        for lba, (seen, version) in op.seen.items():
            block = volume.blocks[lba]
            at = lba * BLOCK - request.offset
            piece = request.data[max(at, 0) : at + BLOCK]
            if len(piece) == BLOCK:
                content = contents.numbers.get(piece, -1)
                if content not in seen:
                    what = contents.number(piece)
                    raise AssertionError(
                        f"{volume.name} block {lba}: read {what}, possible were {sorted(seen)[:20]}; {op}"
                    )
                if version == block.version and not block.pending and len(block.states) > 1:
                    block.narrow(content)
            else:
                start = max(-at, 0)
                ok = any(contents.blocks[each][start : start + len(piece)] == piece for each in seen)
                assert ok, (
                    f"{volume.name} block {lba}: a part of it is {piece[:16]!r}, could be {sorted(seen)[:20]}; {op}"
                )

    def judge_extents(self, op: Op, request: Request) -> None:
        assert request.extents
        at = request.offset // BLOCK
        for length, state in request.extents:
            assert length % BLOCK == 0
            for lba in range(at, at + length // BLOCK):
                if state in (2, 3) and lba in op.seen:
                    assert 0 in op.seen[lba][0], (
                        f"{op.volume.name} block {lba} is said to hold nothing: {sorted(op.seen[lba][0])[:20]}"
                    )
            at += length // BLOCK

    # --- Volumes ------------------------------------------------------------------------------------------------------

    def make_volume(self) -> None:
        chance, stage = self.chance, self.stage
        if len(self.volumes) >= 5:
            return
        size = chance.choice([300, 5_000, 40_000, 4_000_000])
        self.names += 1
        name = f"v{self.names}"
        reason = stage.ffi.new("char[256]")
        status = stage.lib.dedup_volume_create(
            stage.state,
            name.encode(),
            len(name),
            size * BLOCK,
            0,
            chance.choice([1, 1, 2, 8]),
            chance.choice([0, 2]) if self.theme != "tier" else chance.choice([1, 2, 3]),
            0,
            reason,
        )
        lib.atoll_domain_commit(stage.domain)
        if status != OK:
            assert self.faulty or status == ENOSPC, (status, stage.ffi.string(reason))
            return
        number = self.table()[name]
        volume = Volume(name, number, [size], self.tick(), stage.generation(number))
        self.lay_regions(volume)
        self.volumes.append(volume)
        self.note("makes", name, size)

    def lay_regions(self, volume: Volume) -> None:
        """Where its blocks are, over many leaves."""
        chance = self.chance
        budget = int(min(self.settings["device_blocks"], 12000) * self.extent / 3)
        volume.regions = []
        scattered = self.theme == "paging" and volume.size > LEAF
        while budget > 0 and len(volume.regions) < (150 if scattered else 40):
            count = min(chance.choice([1, 4, 20] if scattered else [20, 60, 250, 700]), volume.size)
            first = min(chance.randrange(volume.size), volume.size - count)
            volume.regions.append((first, count))
            budget -= count

    def table(self) -> dict[str, int]:
        stage = self.stage
        found = {}
        for number in range(256):
            entry = stage.lib.dedup_volume(stage.state, number)
            if entry.state == 1:
                found[stage.ffi.buffer(entry.name, entry.name_bytes)[:].decode()] = number
        return found

    def delete_volume(self) -> None:
        if len(self.volumes) < 2:
            return
        stage = self.stage
        volume = self.volumes.pop(self.chance.randrange(len(self.volumes)))
        reason = stage.ffi.new("char[256]")
        assert stage.lib.dedup_volume_delete(stage.state, volume.number, 0, reason) == OK, stage.ffi.string(reason)
        lib.atoll_domain_commit(stage.domain)
        volume.gone = self.tick()
        self.ghosts.append(volume)
        self.note("deletes", volume.name)

    def resize_volume(self) -> None:
        stage, volume = self.stage, self.chance.choice(self.volumes)
        size = volume.size + self.chance.choice([1, 700, 5000])
        reason = stage.ffi.new("char[256]")
        assert stage.lib.dedup_volume_resize(stage.state, volume.number, size * BLOCK, 0, reason) == OK, (
            stage.ffi.string(reason)
        )
        lib.atoll_domain_commit(stage.domain)
        volume.sizes.append(size)
        volume.made = self.tick()
        self.lay_regions(volume)
        self.note("resizes", volume.name, size)

    def set_volume(self) -> None:
        stage, volume, chance = self.stage, self.chance.choice(self.volumes), self.chance
        reason = stage.ffi.new("char[256]")
        threshold, tier = chance.choice([0, 1, 2, 8]), chance.choice([0, 1, 2, 3])
        status = stage.lib.dedup_volume_set(stage.state, volume.number, threshold, tier, 0, reason)
        lib.atoll_domain_commit(stage.domain)
        assert status == OK or self.faulty, stage.ffi.string(reason)

    # --- What happens now and then ------------------------------------------------------------------------------------

    def perhaps(self) -> None:
        chance = self.chance
        if self.doom != 0 and self.turns >= self.doom:
            self.doom = 0
            chance.choice([self.all_die, self.all_die, self.lose_power])()
            return
        if self.faulty and chance.random() < 0.03:
            self.check()
        if chance.random() < 0.03:
            self.look_up()
        if chance.random() < 0.01:
            self.rest()
        if chance.random() > 0.02:
            return
        what = chance.choices(
            ["check", "settle", "make", "delete", "resize", "set", "catastrophe", "scrub", "du"],
            [1, 0.3, 1, 0.5, 0.3, 0.3, 400 * self.catastrophes, 0.3, 0.2],
        )[0]
        match what:
            case "check":
                self.check()
            case "settle":
                self.settle()
            case "make":
                self.make_volume()
            case "delete":
                self.delete_volume()
            case "resize":
                if self.volumes:
                    self.resize_volume()
            case "set":
                if self.volumes:
                    self.set_volume()
            case "scrub":
                if chance.random() < 0.8:
                    self.stage.lib.dedup_scrub_start(self.stage.state, chance.choice([0, 1 << 20, 1 << 30]))
                else:
                    self.stage.lib.dedup_scrub_cancel(self.stage.state)
                lib.atoll_domain_commit(self.stage.domain)
            case "du":
                assert self.stage.lib.dedup_du_start(self.stage.state, self.stage.ffi.new("uint64_t *")) == OK
            case _:
                chance.choice([self.all_die, self.lose_power, self.restart])()
        self.counts[what] += 1

    def rest(self) -> None:
        """The disk does nothing, nobody asks for anything: it goes to sleep, whatever it waits for."""
        stage = self.stage
        for _ in range(20_000):
            if not stage.lib.dedup_turn(stage.state):
                return
        raise AssertionError(f"it does not rest: {self.state()}")

    def look_up(self) -> None:
        """What nbd could read from memory without asking; some of it is being sent for a while."""
        chance, posted = self.chance, set[tuple[str, int]]()
        for op in self.live:
            if op.kind == "post":
                posted |= {(op.volume.name, lba) for lba in op.changes}
        volumes = {(volume.number, volume.generation & 0x7FFF): volume for volume in self.volumes}
        for (number, generation, lba), found in self.reader.table().items():
            volume = volumes.get((number, generation))
            if volume is None or (volume.name, lba) in posted:
                continue
            content = self.contents.numbers.get(found, -1)
            possible = volume.block(lba).contents()
            assert content in possible, f"{volume.name} {lba}: looked up {content}, possible {sorted(possible)[:20]}"
            self.counts["looked up"] += 1
            if chance.random() < 0.02 and len(self.reader.taken) < 20:
                self.reader.take(number, lba)
        self.reader.check()
        if chance.random() < 0.5:
            self.reader.release()

    def check(self) -> None:
        calm, self.calm = self.calm, True
        if self.unread:
            self.stage.lib.dedup_check_turn(self.stage.state, False)  # takes what the disk has answered
            self.clock += 2000 * MS  # pages that could not be read are read again
            self.unread = False
            self.stage.lib.hook_set_clock(self.clock)
        try:
            self.stage.check()
        except AssertionError as error:
            if not (self.lossy and self.leaked(str(error))):
                raise
        self.take_answers()
        self.calm = calm

    def leaked(self, text: str) -> bool:
        """Places whose counts could not be had when they lost a reference stay counted; they are all that is wrong."""
        for line in text.splitlines():
            words = [int(word) for word in re.findall(r"\d+", line)]
            if "references, map and log have" in line and words[1] > words[2]:
                continue
            if "references, the sum says" in line and words[0] > words[1]:
                continue
            if line and line != text.splitlines()[-1]:  # the last may be cut off
                return False
        return True

    def settle(self, verify: bool = False) -> None:
        """The disk behaves; everything comes to an end."""
        self.note("settles")
        self.calm = True
        self.until(lambda: not self.live, "answers")
        self.land(True)
        self.reader.release()
        for volume in self.volumes:
            for attempt in range(200):
                op = Op("flush", volume, 0)
                self.send(op, self.stage.flush(volume.number))
                self.until(lambda: not self.live, "a flush")
                assert op.request is not None
                if op.request.status == OK:
                    break
                self.clock += 300 * MS
                self.relieve(attempt)
            else:
                raise AssertionError(f"flushes do not succeed any more: {op}, {self.state()}")
        stage = self.stage
        self.until(lambda: not stage.lent_pages, "pages that come back")
        self.check()
        self.faulty = self.crashed = False
        self.look_up()
        self.reader.release()
        if verify:
            self.verify()
        self.calm = False

    def relieve(self, attempt: int) -> None:
        """So many flushes in a row have failed."""
        if (self.crashed or self.rude or self.far) and attempt % 20 == 19:
            self.trim_all(self.chance.choice(self.volumes))

    def until(self, reached: Callable[[], bool], what: str) -> None:
        for turn in range(PATIENCE):
            if reached():
                return
            self.turn()
            if turn > 1000:
                self.clock += 10 * MS
            if self.rude and turn % 2000 == 1999 and self.volumes:
                self.counts["reliefs"] += 1  # room for what was posted beyond what is allowed
                self.trim_all(self.chance.choice(self.volumes), wait=False)
        raise AssertionError(f"{what}: not within {PATIENCE} turns; {self.live[:5]}, {self.state()}")

    def trim_all(self, volume: Volume, wait: bool = True) -> None:
        for first in sorted({lba // LEAF * LEAF for lba in volume.blocks}):
            op = Op("trim", volume, 0)
            count = min(LEAF, volume.size - first)
            op.changes = {lba: self.to_zero for lba in range(first, first + count) if lba in volume.blocks}
            if wait:
                self.send(op, self.stage.trim(volume.number, first * BLOCK, count * BLOCK))
                self.until(lambda: not self.live, "trims")
            elif self.room(op):
                self.send(op, self.stage.trim(volume.number, first * BLOCK, count * BLOCK))

    def state(self) -> dict[str, int]:
        figures = self.stage.figures()
        return {name: int(getattr(figures, name)) for name in dir(figures) if getattr(figures, name)}

    def verify(self) -> None:
        """Reads everything."""
        calm, self.calm = self.calm, True
        for volume in self.volumes:
            lbas = sorted(
                lba for lba, block in volume.blocks.items() if block.states != {(0, 0)} or self.chance.random() < 0.1
            )
            first = 0
            while first < len(lbas):
                count = 1
                while count < 64 and first + count < len(lbas) and lbas[first + count] == lbas[first] + count:
                    count += 1
                op = Op("read", volume, 0)
                self.send(op, self.stage.read(volume.number, lbas[first] * BLOCK, count * BLOCK))
                first += count
                if len(self.live) > 8:
                    self.until(lambda: len(self.live) <= 4, "reads")
        self.until(lambda: not self.live, "reads")
        self.calm = calm

    def abandon(self) -> None:
        """Nobody answers what is under way."""
        now = self.tick()
        for volume in self.volumes:
            for block in volume.blocks.values():
                block.abandon(now, volume.durable)
        self.live.clear()

    def in_flight(self, later: bool) -> None:
        """What the disk was told before everybody died. `later`: some of it comes when the next run serves."""
        for io in self.stage.ios:
            device = self.stage.disks[io.role]
            if io.opcode != IO_WRITE:
                continue
            data = self.stage.payload(io)
            if later and io.region in ("data", "log") and self.chance.random() < 0.5:
                self.note("late", io.offset // BLOCK, io.length // BLOCK)
                self.late.append((self.turns + self.chance.randrange(50), device, io.offset, data))
            else:
                device.write(io.offset, data, torn=True)

    def all_die(self) -> None:
        chance, stage = self.chance, self.stage
        quarantine = chance.random() < 0.3
        if chance.random() < 0.7:
            stage.turn_or_death(int(chance.paretovariate(0.4)))
        stage.take_ios()
        self.land(True)
        self.in_flight(quarantine)
        self.note("all die", quarantine, len(stage.ios), len(self.live))
        self.abandon()
        pages = int(stage.config.cache_pages)
        stage.shapes[DISK] = (4096, (pages + chance.choice([0, 0, 8, -8, 100])) * BLOCK)
        stage.everybody_dies()
        self.reader = Reader(stage)
        while not stage.become(int(chance.paretovariate(0.3)) if chance.random() < 0.5 else 0, quarantine):
            self.counts["deaths while adopting"] += 1
        if chance.random() < 0.5:
            stage.lib.dedup_turn(stage.state)
        stage.nic_starts_anew()
        calm, self.calm = self.calm, True
        self.until(lambda: stage.lib.dedup_store_state(stage.state) == 2, "the store")
        self.calm = calm
        self.counts["all die"] += 1
        if chance.random() < 0.5:
            self.check()
        if chance.random() < 0.3:
            self.verify()

    def lose_power(self) -> None:
        self.in_flight(False)
        self.note("loses power")
        self.abandon()
        self.land(True)
        self.device.lose_power()
        if self.fast is not None:
            self.fast.lose_power()
        self.counts["power losses"] += 1
        self.start()
        self.found(False)

    def restart(self) -> None:
        """A clean stop, and a start."""
        self.note("restarts")
        self.settle()
        self.close()
        self.counts["restarts"] += 1
        self.start()
        self.found(True)

    def close(self) -> None:
        stage = self.stage
        self.calm = True
        for _ in range(PATIENCE):
            self.hooked.lib.hook_set_clock(self.clock)
            if stage.lib.dedup_run(stage.state, stage.lib.DEDUP_GOAL_CLOSE, 1) == stage.lib.DEDUP_REASON_REACHED:
                break
            self.turns += 1
            self.clock += MS
            stage.disk()
            self.take_answers()
        else:
            raise AssertionError("it does not close")
        self.calm = False

    def found(self, clean: bool) -> None:
        """The volumes that are there after a start, and what they may hold."""
        table, now = self.table(), self.tick()
        for ghost in self.ghosts:
            if ghost.name in table:
                ghost.gone = -1
                self.volumes.append(ghost)
                self.counts["resurrections"] += 1
        self.ghosts = []
        for volume in list(self.volumes):
            if volume.name not in table:
                assert not volume.flushed and not clean, f"volume {volume.name} is gone"
                self.volumes.remove(volume)
                continue
            number = volume.number = table.pop(volume.name)
            entry = self.stage.lib.dedup_volume(self.stage.state, number)
            volume.generation, size = int(entry.generation), int(entry.size_bytes) // BLOCK
            assert size in volume.sizes, f"{volume.name} has {size} blocks, not one of {volume.sizes}"
            if size != volume.size:
                volume.blocks = {lba: block for lba, block in volume.blocks.items() if lba < size}
            volume.sizes = [size]
            self.lay_regions(volume) if not volume.regions or max(sum(each) for each in volume.regions) > size else None
            for block in volume.blocks.values():
                block.settle(block.contents() if clean else block.durable_contents(volume.durable), now)
            volume.durable, volume.flushed = now, True
        assert not table, f"volumes that nobody made: {table}"
        if self.theme == "stuck":
            return  # what is not looked at is not in memory
        if self.chance.random() < 0.5:
            self.check()
        if self.chance.random() < 0.7:
            self.verify()

    def finish(self) -> None:
        self.settle(verify=True)
        stage = self.stage
        self.calm = True
        for volume in self.volumes:
            self.trim_all(volume)
        self.settle()
        self.calm = True
        self.until(lambda: not self.deleting(), "deletion")
        figures = stage.figures()
        free = int(figures.available_blocks + figures.quarantined_blocks)
        assert self.lossy or free == self.initial, f"{free} blocks are free at the end, {self.initial} at the beginning"
        self.close()
        self.start()
        self.found(True)
        self.calm = True
        self.verify()
        self.check()
        assert self.lossy or int(self.stage.figures().available_blocks) == self.initial

    def deleting(self) -> bool:
        return any(self.stage.lib.dedup_volume(self.stage.state, number).state > 1 for number in range(256))
