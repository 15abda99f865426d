"""The dedup service alone on a stage: real arenas and rings, the real store on a device in memory; the test plays nic,
nbd, disk and the kernel.

with Stage() as stage:
    stage.open()                                  an incarnation of dedup in this process
    volume = stage.create_volume("a", 1 << 20)
    request = stage.write(volume, offset, data)   -> Request; also read, trim, zero, flush, extents, cache
    stage.run_until_idle()                        turns of dedup and disk until nothing is under way
    request.status, request.data

    stage.turns_in_child(die_after=n)             an incarnation in a child process, which dies after n stores

The stand-ins are strict: a page given back must have been lent, a completion must belong to a request, every request
is answered exactly once. Each step can be followed by `check()`: dedup's own recount.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import mmap
import os
import random
import secrets
import signal
import subprocess
import sysconfig
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from atoll.ipc import objects, physmap
from atoll.ipc._ipc import ffi, lib

ROOT = Path(__file__).resolve().parent.parent
KERNEL, NIC, NBD, DEDUP, DISK, LLRRM = (
    lib.ATOLL_ROLE_KERNEL,
    lib.ATOLL_ROLE_NIC,
    lib.ATOLL_ROLE_NBD,
    lib.ATOLL_ROLE_DEDUP,
    lib.ATOLL_ROLE_DISK,
    lib.ATOLL_ROLE_LLRRM,
)
RINGS: dict[int, dict[int, int]] = {
    KERNEL: {DEDUP: 64},
    NIC: {DEDUP: 4096},
    NBD: {DEDUP: 4096},
    DEDUP: {KERNEL: 64, NBD: 4096, NIC: 512, DISK: 1024},
    DISK: {DEDUP: 1024},
}
FAST_RINGS = RINGS | {DEDUP: RINGS[DEDUP] | {LLRRM: 1024}, LLRRM: {DEDUP: 1024}}
BLOCK = 4096
LIST_BYTES = 2048  # per slot: segments of a payload, in nic's arena
NIC_PUBLIC_BYTES = ffi.sizeof("struct atoll_nic_public")
FUA, NO_HOLE, ONE = lib.ATOLL_FLAG_FUA, lib.ATOLL_FLAG_NO_HOLE, lib.ATOLL_FLAG_ONE
OK = lib.ATOLL_OK


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_hooked(folder: Path, sanitize: str = "") -> ModuleType:
    """dedup's extension with a hook behind each store of the journal."""
    cbuild = load("atoll_cbuild", ROOT / "ipc" / "cbuild.py")
    here = ROOT / "services" / "dedup"
    sources = [f"services/dedup/{path.name}" for path in sorted(here.glob("*.c"))]
    sources += [*cbuild.DOMAIN_SOURCES, "tests/c/dedup_hook.c"]
    headers = [*cbuild.headers_in(here), "tests/c/dedup_hook.h"]
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        builder = cbuild.make_ffi("dedup_hooked", headers, sources, here, include=["ipc/build_ipc.py"])
    finally:
        os.chdir(before)
    builder.emit_c_code(str(folder / "dedup_hooked.c"))
    command = ["gcc", "-shared", "-fPIC", "-O1", "-g", "-std=gnu11", "-UNDEBUG"]
    command += ["-fno-strict-aliasing", "-fvisibility=hidden", "-Wl,--wrap=clock_gettime,--wrap=place_shared"]
    command += ["-DATOLL_STORE_HOOK", f"-I{ROOT}", f"-I{sysconfig.get_paths()['include']}"]
    command += [f"-fsanitize={sanitize}"] if sanitize else []
    command += [str(folder / "dedup_hooked.c"), *sources, "-o", str(folder / "dedup_hooked.so")]
    subprocess.run(command, cwd=ROOT, check=True)
    return load("dedup_hooked", folder / "dedup_hooked.so")


@dataclass
class Request:
    opcode: int
    identity: int
    slot: int
    part: int
    offset: int
    length: int
    volume: int
    payload: bytes = b""
    done: bool = False
    status: int = -1
    data: bytes = b""
    extents: list[tuple[int, int]] = field(default_factory=list)
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    failed: int = 0
    lba: int = 0  # + 1, of the block that failed; 0 not known
    message: bytes = b""


@dataclass
class Io:
    """A request of dedup to its driver, not answered yet."""

    opcode: int
    identity: int
    offset: int
    length: int
    segments: list[tuple[int, int]]
    role: int = DISK
    flags: int = 0
    after: frozenset[int] = frozenset()  # of a sync: identities of those that it begins behind

    def know_order(self, message: Any) -> None:
        if self.opcode == lib.ATOLL_OP_IO_SYNC:
            self.offset, self.after = 0, frozenset(int(message.words[index]) for index in range(3))


def _inherit(role: int, size: int) -> None:
    """Writable arenas are not inherited by children; those of the stage are."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.madvise(ctypes.c_void_p(physmap.address(role)), ctypes.c_size_t(size), 11) == 0  # MADV_DOFORK


class Stage:
    def __init__(
        self,
        device_blocks: int = 8192,
        nic_pages: int = 512,
        merge_pages: int = 32,
        cache_pages: int = 512,
        destage_delay_ms: int = 0,
        extension: ModuleType | None = None,
        seed: int = 0,
        log_blocks: int = 0,
        track_blocks: int = 64,
        frames: int = 1024,
        fast_blocks: int = 0,
        fast_pages: int = 64,
        tier_entries: int = 1 << 20,
        prints: int = 4096,
        asks: float = 0.0,
    ) -> None:
        if extension is None:
            extension = importlib.import_module("atoll.services.dedup._dedup")
        self.ffi, self.lib = extension.ffi, extension.lib
        self.random = random.Random(seed)
        self.nic_pages, self.device_blocks = nic_pages, device_blocks
        self.config = self.ffi.new("struct dedup_config *")
        self.config.nic_pages, self.config.merge_pages, self.config.cache_pages = nic_pages, merge_pages, cache_pages
        self.config.device_blocks, self.config.fingerprint_slots = device_blocks, prints
        self.config.metadata_frames, self.config.log_blocks = frames, log_blocks
        self.config.destage_delay_ms, self.config.track_blocks = destage_delay_ms, track_blocks
        self.fast_blocks, self.rings = fast_blocks, FAST_RINGS if fast_blocks else RINGS
        if fast_blocks:
            self.config.tier_places = self.lib.dedup_tier_places(fast_blocks, tier_entries)
            self.config.tier_pages = fast_pages
        self.instance = secrets.randbits(64)
        self.sizes: dict[int, int] = {}
        lists = NIC_PUBLIC_BYTES + lib.ATOLL_SLOT_COUNT * LIST_BYTES
        self.shapes = {
            KERNEL: (4096, 0),
            NIC: (lists, nic_pages * BLOCK),
            NBD: (ffi.sizeof("struct atoll_nbd_public"), 0),
            DEDUP: (self.lib.dedup_role_bytes(self.config), self.lib.dedup_buffer_bytes(self.config)),
            DISK: (4096, cache_pages * BLOCK),
        }
        if fast_blocks:
            self.shapes[LLRRM] = (4096, fast_pages * BLOCK)
        for role, (role_bytes, buffer_bytes) in self.shapes.items():
            self._make(role, role_bytes, buffer_bytes)
        self.drivers = (DISK, LLRRM) if fast_blocks else (DISK,)
        self.domains = {role: self._open_domain(role, 1) for role in (KERNEL, NIC, NBD, *self.drivers)}
        self.fast = mmap.mmap(-1, max(fast_blocks, 1) * BLOCK)
        self.device = mmap.mmap(-1, device_blocks * BLOCK)
        self.incarnation = 0
        self.state: Any = None
        self.domain: Any = None
        self.sequences = [0] * lib.ATOLL_SLOT_COUNT
        self.free_slots = list(range(lib.ATOLL_SLOT_COUNT - 1, -1, -1))
        self.free_pages = set(range(nic_pages))
        self.lent_pages: set[int] = set()
        self.requests: dict[int, Request] = {}  # by slot, until answered
        self.unsent: list[Request] = []  # answered reads whose slots nic has not finished
        self.asks = asks  # share of reads that nic asks for
        self.ios: list[Io] = []
        self.io_rule: Callable[[Io], int] | None = None  # status instead of doing it
        self.io_log: list[Io] = []
        self.message = ffi.new("struct atoll_descriptor *")
        nic = physmap.header(NIC)
        self.nic_buffer = physmap.address(NIC) + int(nic.buffer_offset)
        self.nic_public = ffi.cast("struct atoll_nic_public *", physmap.address(NIC) + int(nic.role_offset))
        self.nic_lists = physmap.address(NIC) + int(nic.role_offset) + NIC_PUBLIC_BYTES
        self.posted_order = 0
        self.posted_pages: set[int] = set()  # when all died
        self.repeated: set[int] = set()  # requests that may be answered more than once

    # --- Arenas -----------------------------------------------------------------------------------------------------

    def _make(self, role: int, role_bytes: int, buffer_bytes: int) -> None:
        entries = ffi.new("uint32_t[16]")
        mask = 0
        for peer, count in self.rings[role].items():
            entries[peer] = count
            mask |= 1 << peer
        size = self.sizes[role] = lib.atoll_arena_size(mask, entries, role_bytes, buffer_bytes)
        name = objects.arena_name(self.instance, role)
        fd = objects.create(name, size)
        try:
            physmap.map_arena(role, fd, size, writable=True)
        finally:
            objects.unlink(name)
        _inherit(role, size)
        lib.atoll_arena_format(
            ffi.cast("void *", physmap.address(role)), role, self.instance, size, mask, entries, role_bytes,
            buffer_bytes, lib.ATOLL_WAKE_FUTEX, -1,
        )  # fmt: skip
        os.close(fd)

    def _open_domain(self, role: int, incarnation: int) -> Any:
        domain = ffi.new("struct atoll_domain *")
        sizes = ffi.new("uint64_t[16]")
        for number, size in self.sizes.items():
            sizes[number] = size
        error = ffi.new("char[256]")
        assert lib.atoll_domain_open(domain, role, incarnation, os.getpid(), 0, sizes, error) == 0, ffi.string(error)
        if role != DEDUP:
            lib.atoll_domain_serving(domain)
        return domain

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for role in self.rings:
            physmap.unmap_arena(role)
        self.device.close()
        self.fast.close()

    # --- Incarnations -----------------------------------------------------------------------------------------------

    def attach(self, crashed: bool = False, adopted: bool = False, quarantine: bool = False) -> None:
        """Becomes the next incarnation of dedup, in this process."""
        self.incarnation += 1
        self.domain = self._open_domain(DEDUP, self.incarnation)
        error = self.ffi.new("char[256]")
        here = self.ffi.cast("struct atoll_domain *", int(ffi.cast("uintptr_t", self.domain)))
        fresh = self.incarnation == 1
        self.state = self.lib.dedup_open(here, self.config, fresh, adopted, crashed, quarantine, error)
        assert self.state != self.ffi.NULL, self.ffi.string(error)
        lib.atoll_domain_serving(self.domain)

    def open(self, crashed: bool = False) -> None:
        """An incarnation in this process, its store loaded or made."""
        self.attach(crashed)
        deadline = time.monotonic() + 20
        while (found := self.lib.dedup_store_state(self.state)) != 2:
            if found == 3:
                self.lib.dedup_format(self.state, 1, 2)
            assert found != 4, self.ffi.string(self.lib.dedup_store_reason(self.state))
            assert time.monotonic() < deadline
            self.lib.dedup_turn(self.state)
            self.disk()

    def close_store(self) -> bytes:
        """An orderly end; what the device holds then."""
        deadline = time.monotonic() + 20
        while self.lib.dedup_run(self.state, self.lib.DEDUP_GOAL_CLOSE, 1) != self.lib.DEDUP_REASON_REACHED:
            assert time.monotonic() < deadline
            self.disk()
        return bytes(self.device)

    def everybody_dies(self) -> None:
        """All processes of the server are gone and a new run of init adopts the arenas of dedup and nic."""
        entries = ffi.new("uint32_t[16]")
        for role in (KERNEL, NBD, *self.drivers):
            physmap.unmap_arena(role)
            self._make(role, *self.shapes[role])
        for role in (DEDUP, NIC):
            mask = 0
            for peer, count in self.rings[role].items():
                entries[peer] = count
                mask |= 1 << peer
            role_bytes, buffer_bytes = self.shapes[role]
            size, futex = self.sizes[role], lib.ATOLL_WAKE_FUTEX
            found = lib.atoll_arena_adopt(role, self.instance, size, mask, entries, role_bytes, buffer_bytes, futex, -1)
            assert found == 0
        self.domains = {role: self._open_domain(role, 1) for role in (KERNEL, NBD, *self.drivers)}
        role_area = physmap.address(DEDUP) + int(physmap.header(DEDUP).role_offset)
        public = ffi.cast("struct atoll_dedup_public *", role_area)
        self.posted_pages = {
            (int(entry.address) - self.nic_buffer) // BLOCK + index
            for entry in self.nic_public.posted
            if entry.order > public.posted_adopted
            for index in range(entry.length // BLOCK)
        }
        self.ios.clear()
        self.requests.clear()
        self.unsent.clear()
        self.sequences = [0] * lib.ATOLL_SLOT_COUNT
        self.free_slots = list(range(lib.ATOLL_SLOT_COUNT - 1, -1, -1))
        for slot in range(lib.ATOLL_SLOT_COUNT):
            self.nic_public.done[slot] = self.nic_public.uses.use[slot] = 0  # as nic when it starts

    def nic_starts_anew(self) -> None:
        """After everybody_dies: nic takes from dedup which of its pages are lent."""
        role_area = physmap.address(DEDUP) + int(physmap.header(DEDUP).role_offset)
        public = ffi.cast("struct atoll_dedup_public *", role_area)
        held = ffi.buffer(ffi.cast("char *", int(public.held_address)), int(public.held_count))[:]
        self.lent_pages = {page for page in range(self.nic_pages) if held[page]}
        assert self.lent_pages >= self.posted_pages, "dedup has taken them over"
        self.free_pages = set(range(self.nic_pages)) - self.lent_pages
        self.domains[NIC] = self._open_domain(NIC, 2)

    def create_volume(self, name: str, size_bytes: int, flags: int = 0, threshold: int = 0, tier: int = 0) -> int:
        reason = self.ffi.new("char[256]")
        data = name.encode()
        status = self.lib.dedup_volume_create(
            self.state, data, len(data), size_bytes, flags, threshold, tier, 0, reason
        )
        assert status == OK, self.ffi.string(reason)
        lib.atoll_domain_commit(self.domain)
        for number in range(256):
            volume = self.lib.dedup_volume(self.state, number)
            if volume.state == 1 and self.ffi.buffer(volume.name, volume.name_bytes)[:] == data:
                return number
        raise AssertionError("volume not in the table")

    def generation(self, volume: int) -> int:
        return int(self.lib.dedup_volume(self.state, volume).generation)

    def turns_in_child(
        self,
        die_after: int = 0,
        poison: int = 0,
        turns: int = 1,
        crashed: bool = False,
        count: Any = None,
        poison_block: int | None = None,
    ) -> int:
        """A new incarnation in a child makes `turns` turns. Returns its exit status, negative: the signal it died of.
        `count`: a shared word that receives how many stores it made."""
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)  # the test's watchdog
                if die_after:
                    self.lib.hook_die_after(die_after)
                self.attach(crashed=crashed)
                if poison:
                    here = self.ffi.cast("struct atoll_domain *", int(ffi.cast("uintptr_t", self.domain)))
                    self.lib.hook_poison(here, poison)
                if poison_block is not None:
                    self.lib.hook_poison_block(self.state, poison_block)
                for _ in range(turns):
                    self.lib.dedup_turn(self.state)
                if count is not None:
                    count[0] = self.lib.hook_stores()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        self.incarnation += 1
        _, ended = os.waitpid(pid, 0)
        result = os.waitstatus_to_exitcode(ended)
        assert result in (0, -signal.SIGKILL, -signal.SIGSEGV), f"dedup ended with {result}"
        return result

    # --- nbd --------------------------------------------------------------------------------------------------------

    def submit(
        self, opcode: int, volume: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0,
        scattered: bool = False, generation: int | None = None, part: int = 0,
    ) -> Request:  # fmt: skip
        slot = self.free_slots.pop()
        self.sequences[slot] = (self.sequences[slot] + 1) % (1 << 32)
        identity = 3 << 48 | slot << 32 | self.sequences[slot]
        request = Request(opcode, identity, slot, part, offset, length, volume, payload)
        message = self.message
        ffi.memmove(message, bytes(64), 64)
        message.opcode, message.flags, message.identity, message.part = opcode, flags, identity, part
        message.words[0], message.words[1] = offset, length
        message.halves[4] = volume
        message.halves[5] = self.generation(volume) if generation is None else generation
        if opcode == lib.ATOLL_OP_WRITE:
            segments = self._lay_out(offset, payload, scattered)
            message.length = length
            if len(segments) == 1:
                message.address = segments[0][0]
            else:
                address = self.nic_lists + slot * LIST_BYTES
                table = ffi.cast("struct atoll_segment *", address)
                for index, (where, size) in enumerate(segments):
                    table[index].address, table[index].length, table[index].kind = where, size, 0
                message.address, message.segment_count = address, len(segments)
        request.message = ffi.buffer(message, 64)[:]
        self._send(message)
        self.requests[slot] = request
        return request

    def _send(self, message: Any) -> None:
        """From nbd; posted writes, and what has nic's part, from nic."""
        posted = message.opcode == lib.ATOLL_OP_WRITE and message.flags & lib.ATOLL_FLAG_POSTED
        sender = self.domains[NIC if posted or message.part == lib.ATOLL_PART_NIC else NBD]
        assert lib.atoll_domain_put(sender, DEDUP, message)
        lib.atoll_domain_commit(sender)

    def repeat(self, request: Request) -> None:
        """The same message once more, as after a crash of a domain that forgot."""
        ffi.memmove(self.message, request.message, 64)
        self._send(self.message)

    def _lay_out(self, offset: int, payload: bytes, scattered: bool) -> list[tuple[int, int]]:
        """Puts a payload into nic's pages as nic would: a block's bytes lie at their offset within the page."""
        first, last = offset // BLOCK, (offset + len(payload) - 1) // BLOCK
        count = last - first + 1
        assert len(self.free_pages) >= count, "the test lends more pages than nic has"
        free = sorted(self.free_pages)
        if scattered:
            pages = self.random.sample(free, count)
        else:
            runs = (free[at : at + count] for at in range(len(free) - count + 1))
            pages = next((run for run in runs if run[-1] - run[0] == count - 1), free[:count])
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

    def write(self, volume: int, offset: int, data: bytes, flags: int = 0, scattered: bool = False) -> Request:
        return self.submit(lib.ATOLL_OP_WRITE, volume, offset, len(data), data, flags, scattered)

    def post(self, volume: int, offset: int, data: bytes) -> Request:
        """A write of whole blocks whose client is answered now; nic notes it, until END."""
        request = self.submit(lib.ATOLL_OP_WRITE, volume, offset, len(data), data, lib.ATOLL_FLAG_POSTED)
        message = ffi.from_buffer("struct atoll_descriptor *", request.message)
        assert message.segment_count == 0, "pages that follow each other"
        entry = self.nic_public.posted[request.slot]
        self.posted_order += 1
        self.nic_public.posted_order = self.posted_order
        entry.order, entry.identity, entry.address = self.posted_order, request.identity, message.address
        entry.offset, entry.length, entry.volume = offset, len(data), volume
        entry.generation = self.generation(volume)
        return request

    def read(self, volume: int, offset: int, length: int) -> Request:
        """By chance (`asks`) nic's."""
        by_nic = self.asks > 0 and self.random.random() < self.asks
        return (self.ask if by_nic else self.read_by_nbd)(volume, offset, length)

    def read_by_nbd(self, volume: int, offset: int, length: int) -> Request:
        return self.submit(lib.ATOLL_OP_READ, volume, offset, length)

    def ask(self, volume: int, offset: int, length: int) -> Request:
        """A read that nic asks for."""
        return self.submit(lib.ATOLL_OP_READ, volume, offset, length, part=lib.ATOLL_PART_NIC)

    def ask_again(self, request: Request) -> None:
        """By nbd, for what nic could not send."""
        request.done, request.part = False, 0
        self.requests[request.slot] = request
        ffi.memmove(self.message, request.message, 64)
        self.message.part = 0
        request.message = ffi.buffer(self.message, 64)[:]
        self.repeat(request)

    def trim(self, volume: int, offset: int, length: int, flags: int = 0) -> Request:
        return self.submit(lib.ATOLL_OP_TRIM, volume, offset, length, flags=flags)

    def zero(self, volume: int, offset: int, length: int, flags: int = 0) -> Request:
        return self.submit(lib.ATOLL_OP_ZERO, volume, offset, length, flags=flags)

    def flush(self, volume: int) -> Request:
        return self.submit(lib.ATOLL_OP_FLUSH, volume)

    def cache(self, volume: int, offset: int, length: int) -> Request:
        return self.submit(lib.ATOLL_OP_CACHE, volume, offset, length)

    def extents(self, volume: int, offset: int, length: int, flags: int = 0) -> Request:
        return self.submit(lib.ATOLL_OP_EXTENTS, volume, offset, length, flags=flags)

    def answers(self, send: bool = True, repeated: bool = False) -> int:
        """Takes what dedup has answered. `send`: nic finishes the replies at once, so that their pages are free."""
        found = 0
        message = ffi.new("struct atoll_descriptor *")
        while lib.atoll_domain_take(self.domains[NBD], DEDUP, message):
            assert message.opcode == lib.ATOLL_OP_DONE and message.part != lib.ATOLL_PART_NIC
            found += self._done(message, repeated)
        if found:
            lib.atoll_domain_commit(self.domains[NBD])
        found += self.given_back(repeated)
        if send:
            self.send_all()
        return found

    def _done(self, message: Any, repeated: bool) -> bool:
        request = self._answered(message, repeated)
        if request is None:
            return False
        request.status, request.failed, request.lba = int(message.status), int(message.words[0]), int(message.words[1])
        if request.opcode == lib.ATOLL_OP_READ and request.status == OK:
            self._take_data(request, message)
        if request.opcode == lib.ATOLL_OP_EXTENTS and request.status == OK:
            table = ffi.cast("struct atoll_extent *", int(message.address))
            count = int(message.length) // 16
            request.extents = [(int(table[i].length_bytes), int(table[i].state)) for i in range(count)]
        self.unsent.append(request)
        return True

    def _answered(self, message: Any, repeated: bool) -> Request | None:
        """The request that the message is an answer to. None: another one, which may be."""
        slot = int(message.identity) >> 32 & 0xFFFF
        request = self.requests.get(slot)
        known = request is not None and request.identity == message.identity
        if (request is None and repeated) or (not known and int(message.identity) in self.repeated):
            return None
        assert request is not None and request.identity == message.identity, "an answer to nothing"
        assert int(message.part) == request.part and not request.done
        del self.requests[slot]
        request.done = True
        return request

    def _take_data(self, request: Request, message: Any) -> None:
        if message.segment_count == 0:
            request.segments = [(int(message.address), int(message.length), 0)] if message.length else []
        else:
            table = ffi.cast("struct atoll_segment *", int(message.address))
            request.segments = [
                (int(table[i].address), int(table[i].length), int(table[i].kind)) for i in range(message.segment_count)
            ]
        request.data = self.content(request)
        assert len(request.data) == request.length == int(message.length)

    def content(self, request: Request) -> bytes:
        return b"".join(ffi.buffer(ffi.cast("char *", at), size)[:] for at, size, _ in request.segments)

    def send_all(self) -> None:
        """nic has sent the replies that are there; what they refer to must still be what it was."""
        for request in self.unsent:
            assert self.content(request) == request.data or request.opcode != lib.ATOLL_OP_READ, "a pinned page changed"
            self.nic_public.done[request.slot] = self.sequences[request.slot]
            self.free_slots.append(request.slot)
        self.unsent.clear()

    def given_back(self, repeated: bool = False) -> int:
        """Pages, the ends of posted writes, and reads that nic has asked for. How many of the latter two there were."""
        found = 0
        message = ffi.new("struct atoll_descriptor *")
        while lib.atoll_domain_take(self.domains[NIC], DEDUP, message):
            if message.opcode == lib.ATOLL_OP_END:
                assert message.flags == lib.ATOLL_FLAG_TAKEN
                request = self._answered(message, repeated)
                if request is not None:
                    request.status = OK
                    self.nic_public.posted[request.slot].order = 0
                    self.unsent.append(request)
                    found += 1
                continue
            if message.opcode == lib.ATOLL_OP_DONE:
                assert message.part == lib.ATOLL_PART_NIC
                found += self._done(message, repeated)
                continue
            assert message.opcode == lib.ATOLL_OP_GIVE_BACK
            for index in range(message.segment_count):
                page = int(message.halves[index])
                assert page in self.lent_pages, f"page {page} given back but not lent"
                self.lent_pages.discard(page)
                self.free_pages.add(page)
                for request in self.unsent:
                    for at, size, _ in request.segments:
                        first = (at - self.nic_buffer) // BLOCK
                        last = (at + size - 1 - self.nic_buffer) // BLOCK
                        assert not first <= page <= last, "a page a reader needs was given back"
        lib.atoll_domain_commit(self.domains[NIC])
        return found

    # --- disk -------------------------------------------------------------------------------------------------------

    def take_ios(self) -> None:
        for role in self.drivers:
            self._take_ios(role)

    def _take_ios(self, role: int) -> None:
        message = ffi.new("struct atoll_descriptor *")
        while lib.atoll_domain_take(self.domains[role], DEDUP, message):
            if message.segment_count:
                table = ffi.cast("struct atoll_segment *", int(message.address))
                segments = [(int(table[i].address), int(table[i].length)) for i in range(message.segment_count)]
            else:
                segments = [(int(message.address), int(message.length))] if message.length else []
            io = Io(int(message.opcode), int(message.identity), int(message.words[0]), int(message.length), segments)
            io.role, io.flags = role, int(message.flags)
            io.know_order(message)
            assert all(other.identity != io.identity for other in self.ios), "an I/O slot used twice"
            self.ios.append(io)
        lib.atoll_domain_commit(self.domains[role])

    def payload(self, io: Io) -> bytes:
        """What it writes."""
        return b"".join(ffi.buffer(ffi.cast("char *", address), size)[:] for address, size in io.segments)

    def may_begin(self, io: Io) -> bool:
        """Not a sync that comes after others which are not done."""
        return not any(other.identity in io.after for other in self.ios)

    def complete(self, io: Io, status: int | None = None) -> None:
        """Does an I/O and answers it."""
        assert self.may_begin(io), "a sync before what it comes after"
        self.ios.remove(io)
        self.io_log.append(io)
        if status is None:
            status = self.io_rule(io) if self.io_rule is not None else OK
        if status == OK:
            self._do(io)
        message = self.message
        ffi.memmove(message, bytes(64), 64)
        message.opcode, message.identity, message.status = lib.ATOLL_OP_IO_DONE, io.identity, status
        assert lib.atoll_domain_put(self.domains[io.role], DEDUP, message)
        lib.atoll_domain_commit(self.domains[io.role])

    def _do(self, io: Io) -> None:
        at, device = io.offset, self.device if io.role == DISK else self.fast
        for address, size in io.segments:
            memory = ffi.buffer(ffi.cast("char *", address), size)
            if io.opcode == lib.ATOLL_OP_IO_READ:
                base, end = self.buffer_of(io.role)
                assert base <= address and address + size <= end
                memory[:] = device[at : at + size]
            elif io.opcode == lib.ATOLL_OP_IO_WRITE:
                device[at : at + size] = memory[:]
            at += size

    def disk(self, shuffle: bool = False) -> int:
        """Takes and does all I/O there is."""
        self.take_ios()
        ios = list(self.ios)
        if shuffle:
            self.random.shuffle(ios)
        for _ in ios:
            self.complete(next(io for io in ios if io in self.ios and self.may_begin(io)))
        return len(ios)

    def buffer_of(self, role: int) -> tuple[int, int]:
        """First address and end of a role's buffer area."""
        header = physmap.header(role)
        base = physmap.address(role) + int(header.buffer_offset)
        return base, base + int(header.buffer_bytes)

    # --- All of them ------------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        return bool(self.lib.dedup_turn(self.state))

    def run_until_idle(self, send: bool = True, shuffle: bool = False, timeout_s: float = 30.0) -> None:
        """Until all requests are answered and nothing is being written. Background destage may still be due."""
        deadline = time.monotonic() + timeout_s
        while True:
            busy = self.turn()
            busy |= self.disk(shuffle) != 0
            self.answers(send)
            if not self.requests and not busy:
                return
            assert time.monotonic() < deadline, f"not answered: {list(self.requests.values())[:3]}"

    def drain(self, timeout_s: float = 30.0) -> None:
        """Until everything logged is destaged and all pages are back."""
        deadline = time.monotonic() + timeout_s
        self.run_until_idle()
        while self.lent_pages:
            self.turn()
            self.disk()
            self.answers()
            assert time.monotonic() < deadline, f"pages {sorted(self.lent_pages)[:10]} do not come back"

    def check(self) -> None:
        text = self.ffi.new("char[]", 65536)
        while (count := self.lib.dedup_check(self.state, text, 65536)) == self.lib.DEDUP_CHECK_WAITS:
            if not self.disk():
                self.lib.dedup_check_turn(self.state, False)
        assert count == 0, self.ffi.string(text).decode()

    def figures(self) -> Any:
        figures = self.ffi.new("struct dedup_figures *")
        self.lib.dedup_figures(self.state, figures)
        return figures

    def counters(self) -> dict[str, int]:
        from atoll.services.dedup import COUNTERS

        words = ffi.cast("uint64_t *", physmap.address(DEDUP) + 8192)
        return {name: int(words[index]) for index, name in enumerate(COUNTERS)}
