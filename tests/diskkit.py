"""A storage driver alone on a stage: real arenas, rings and device; the test plays dedup and the kernel.

with Stage(folder, engine="io_uring") as stage:
    stage.start()                            a process that plays disk
    stage.submit(opcode, offset, segments)   -> identity
    done = stage.completions(timeout)        [(identity, status, errno)]
    stage.kill()                             SIGKILL and wait; stage.start() is the successor
"""

from __future__ import annotations

import faulthandler
import importlib
import mmap
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from atoll.ipc import objects, physmap, uring
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.calls import CallClient
from atoll.ipc.runtime import Context

KERNEL, DEDUP, DISK = lib.ATOLL_ROLE_KERNEL, lib.ATOLL_ROLE_DEDUP, lib.ATOLL_ROLE_DISK
NAMES = {KERNEL: "kernel", DEDUP: "dedup", DISK: "disk"}
RINGS = {  # role: {peer: entries}
    KERNEL: {DISK: 64, DEDUP: 64},
    DEDUP: {DISK: 1024, KERNEL: 64},
    DISK: {DEDUP: 1024, KERNEL: 64},
}
BLOCK = lib.ATOLL_BLOCK_BYTES
IO_COUNT = lib.ATOLL_IO_COUNT
OK, EIO, EINVAL, ENOSPC = (
    lib.ATOLL_OK,
    lib.ATOLL_EIO,
    lib.ATOLL_EINVAL,
    lib.ATOLL_ENOSPC,
)
READ, WRITE, SYNC, DISCARD = (
    lib.ATOLL_OP_IO_READ,
    lib.ATOLL_OP_IO_WRITE,
    lib.ATOLL_OP_IO_SYNC,
    lib.ATOLL_OP_IO_DISCARD,
)


def open_device(path: Path, size: int | None = None) -> int:
    """Past the page cache where the file system allows it. `size`: makes a sparse file of that size."""
    if size is not None:
        with open(path, "wb") as file:
            file.truncate(size)
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)


class Stage:
    def __init__(
        self,
        device_fd: int,
        engine: str = "io_uring",
        module: str = "atoll.drivers.disk",
        buffer_blocks: int = 1024,
        source_blocks: int = 1024,
        sparse: bool = True,
        testing: dict[str, Any] | None = None,
        path_cpu: int | None = None,
        pinned: bool = True,
    ) -> None:
        """`pinned`: arenas are registered with the driver's io_uring, where the system can."""
        self.module = importlib.import_module(module)
        self.config = {
            "disk": {"engine": engine, "cache_bytes": buffer_blocks * BLOCK},
            "sparse": sparse,
            "testing": testing or {},
            "kernel": {} if path_cpu is None else {"path_cpu": path_cpu},
        }
        self.device_fd = device_fd
        self.instance = secrets.randbits(64)
        self.incarnation = 0
        self.pid = 0
        self.last_status = 0
        self.eventfds = {KERNEL: os.eventfd(0, os.EFD_NONBLOCK), DISK: os.eventfd(0, os.EFD_NONBLOCK)}
        self.uring = uring.create_storage(1024, 2048) if engine == "io_uring" else None
        self.pinned = pinned and self.uring is not None and self.uring.takes_sources
        self.sizes: dict[int, int] = {}
        role_bytes, buffer_bytes = self.module.plan(self.config)
        shapes = {KERNEL: (4096, 0), DEDUP: (IO_COUNT * 4096, source_blocks * BLOCK), DISK: (role_bytes, buffer_bytes)}
        for role, (role_size, buffer_size) in shapes.items():
            self._make(role, role_size, buffer_size)
        self.dedup = self._open(DEDUP)
        self.kernel = self._open(KERNEL)
        self.calls = CallClient(self.kernel.domain)
        self.events: list[Any] = []  # what the driver told
        fd = objects.open_writable(self._name(DISK))
        # A second view of the driver's arena that only a test may have: to see whether somebody writes late.
        self.disk_memory = mmap.mmap(fd, self.sizes[DISK])
        os.close(fd)
        self.buffers = physmap.address(DISK) + int(physmap.header(DISK).buffer_offset)
        self.buffers_offset = int(physmap.header(DISK).buffer_offset)
        self.source = physmap.address(DEDUP) + int(self.dedup.header.buffer_offset)
        self.lists = physmap.address(DEDUP) + int(self.dedup.header.role_offset)
        self.sequences = [0] * IO_COUNT
        self.free = list(range(IO_COUNT))
        self.message = ffi.new("struct atoll_descriptor *")

    # --- Arenas -------------------------------------------------------------------------------------------------

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
        wake = lib.ATOLL_WAKE_EVENTFD if role in self.eventfds else lib.ATOLL_WAKE_FUTEX
        lib.atoll_arena_format(
            ffi.cast("void *", physmap.address(role)), role, self.instance, size, mask, entries, role_bytes,
            buffer_bytes, wake, self.eventfds.get(role, -1),
        )  # fmt: skip
        os.close(fd)
        if self.pinned and self.uring and role != KERNEL:
            self.uring.register_source(role, size)
        if role == DISK:
            self._map(role, writable=False)

    def _map(self, role: int, writable: bool) -> None:
        fd = objects.open_writable(self._name(role)) if writable else objects.open_read_only(self._name(role))
        physmap.map_arena(role, fd, self.sizes[role], writable=writable)
        os.close(fd)

    def _open(self, role: int, incarnation: int = 1) -> Context:
        context = Context(
            role=NAMES[role], incarnation=incarnation, fresh=incarnation == 1, adopted=False,
            previous_signal=self.last_status & 0x7F,
            config=self.config, arena_bytes=self.sizes, device_fd=self.device_fd, uring=self.uring,
        )  # fmt: skip
        context.open(os.getpid())
        return context

    # --- The driver's process -------------------------------------------------------------------------------------

    def start(self, wait: bool = True) -> None:
        assert self.pid == 0
        self.incarnation += 1
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)  # the test's watchdog
                faulthandler.disable()
                for role in (KERNEL, DEDUP):
                    self._map(role, writable=False)
                self._map(DISK, writable=True)
                context = self._open(DISK, self.incarnation)
                self.module.main(context)
                context.stopped()
                status = 0
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 70
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        if wait:
            self.poll(lambda: physmap.serves(self.header(), self.incarnation))

    def poll(self, look: Any, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.has_ended()  # asked first: what it did last, its answer to a stop, say, is there then
            if look():
                return
            if ended:
                self.check_alive()
            assert time.monotonic() < deadline, "deadline"
            time.sleep(0.0005)

    def has_ended(self) -> bool:
        return self.pid != 0 and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def check_alive(self) -> None:
        if self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid, self.last_status = 0, status
                raise AssertionError(f"the driver ended by itself, wait status {status:#x}: {self.reason()}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)
        self.wait()

    def wait(self) -> int:
        _, self.last_status = os.waitpid(self.pid, 0)
        self.pid = 0
        return self.last_status

    def header(self) -> Any:
        return physmap.header(DISK)

    def state(self) -> int:
        return int(self.header().state)

    def reason(self) -> str:
        return ffi.string(self.header().reason).decode()

    def counters(self) -> dict[str, int]:
        words = ffi.cast("uint64_t *", physmap.address(DISK) + 8192)
        return {name: int(words[index]) for index, name in enumerate(self.module.COUNTERS)}

    # --- Playing dedup ------------------------------------------------------------------------------------------------

    def source_block(self, block: int) -> Any:
        """Writable view of a block of dedup's buffers."""
        return ffi.buffer(ffi.cast("char *", self.source + block * BLOCK), BLOCK)

    def buffer_block(self, block: int) -> memoryview:
        start = self.buffers_offset + block * BLOCK
        return memoryview(self.disk_memory)[start : start + BLOCK]

    def identity(self) -> int:
        slot = self.free.pop()
        self.sequences[slot] += 1
        return slot << 32 | self.sequences[slot]

    def submit(
        self, opcode: int, offset: int = 0, segments: list[tuple[int, int]] | None = None, length: int | None = None,
        identity: int | None = None, commit: bool = True, flags: int = 0, after: Sequence[int] = (),
    ) -> int:  # fmt: skip
        """`segments`: (address, bytes); one is sent inline, several as a list in dedup's arena. `after`: of a sync, the
        requests that it comes after, at most three."""
        identity = self.identity() if identity is None else identity
        segments = segments or []
        message = self.message
        ffi.memmove(message, bytes(64), 64)
        message.opcode, message.identity, message.flags = opcode, identity, flags
        message.words[0] = offset
        for index, other in enumerate(after):
            message.words[index] = other
        total = sum(size for _, size in segments)
        if opcode == DISCARD:
            message.words[1] = length or 0
        else:
            message.length = total if length is None else length
        if len(segments) == 1:
            message.address = segments[0][0]
        elif segments:
            address = self.lists + (identity >> 32) * 4096
            table = ffi.cast("struct atoll_segment *", address)
            for index, (where, size) in enumerate(segments):
                table[index].address, table[index].length, table[index].kind = where, size, 0
            message.address, message.segment_count = address, len(segments)
        assert lib.atoll_domain_put(self.dedup.domain, DISK, message)
        if commit:
            self.commit()
        return identity

    def submit_raw(self, **fields: Any) -> None:
        message = self.message
        ffi.memmove(message, bytes(64), 64)
        for name, value in fields.items():
            if name == "words":
                for index, word in enumerate(value):
                    message.words[index] = word
            else:
                setattr(message, name, value)
        assert lib.atoll_domain_put(self.dedup.domain, DISK, message)
        self.commit()

    def commit(self) -> None:
        lib.atoll_domain_commit(self.dedup.domain)

    def take(self) -> list[tuple[int, int, int]]:
        found = []
        message = ffi.new("struct atoll_descriptor *")
        while lib.atoll_domain_take(self.dedup.domain, DISK, message):
            assert message.opcode == lib.ATOLL_OP_IO_DONE
            found.append((int(message.identity), int(message.status), int(message.halves[0])))
        if found:
            self.commit()
        return found

    def completions(self, timeout_s: float = 0.0) -> list[tuple[int, int, int]]:
        """All that are there; waits until `timeout_s` for the first."""
        found = self.take()
        deadline = time.monotonic() + timeout_s
        while not found and time.monotonic() < deadline:
            lib.atoll_domain_sleep(self.dedup.domain, 0, int(2e6))
            found = self.take()
            if not found:
                self.check_alive()
        return found

    def complete(self, identity: int, timeout_s: float = 20.0) -> tuple[int, int]:
        """Waits for this one completion; no other may come."""
        found = self.completions(timeout_s)
        assert [each[0] for each in found] == [identity], (identity, found)
        self.release(identity)
        return found[0][1], found[0][2]

    def complete_all(self, identities: Iterable[int]) -> None:
        """Waits until each of them has succeeded, once; no other completion may come."""
        asked, answered = sorted(identities), []
        while len(answered) < len(asked):
            found = self.completions(10)
            assert found and all(status == OK for _, status, _ in found)
            answered += [identity for identity, _, _ in found]
        assert sorted(answered) == asked
        for identity in answered:
            self.release(identity)

    def release(self, identity: int) -> None:
        self.free.append(identity >> 32)

    def write(self, offset: int, data: bytes, at: int = 0) -> tuple[int, int]:
        """Writes `data` (whole blocks) from dedup's buffers and waits."""
        ffi.memmove(ffi.cast("char *", self.source + at * BLOCK), data, len(data))
        return self.complete(self.submit(WRITE, offset, [(self.source + at * BLOCK, len(data))]))

    def read(self, offset: int, length: int, at: int = 0) -> tuple[int, int, bytes]:
        status, code = self.complete(self.submit(READ, offset, [(self.buffers + at * BLOCK, length)]))
        return status, code, ffi.buffer(ffi.cast("char *", self.buffers + at * BLOCK), length)[:]

    # --- Playing the kernel -------------------------------------------------------------------------------------------

    def call(self, name: str, **fields: Any) -> dict[str, Any]:
        self.calls.start(DISK, {"call": name, **fields})
        found: list[Any] = []

        def answered() -> bool:
            for received in self.calls.receive():
                (self.events if received.kind == "event" else found).append(received)
            return bool(found)

        self.poll(answered)
        assert found[0].kind == "result"
        return found[0].message

    # --- The end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self.pid:
            self.kill()
        for role in NAMES:
            physmap.unmap_arena(role)
            objects.unlink(self._name(role))
        self.disk_memory.close()
        for fd in self.eventfds.values():
            os.close(fd)
        if self.uring:
            self.uring.close()
        os.close(self.device_fd)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
