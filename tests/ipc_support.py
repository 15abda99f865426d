"""A small instance for tests of ipc/: arenas, locks and rings of some roles, children that play them.

All of it is gone afterwards.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from atoll.ipc import objects, physmap, rolelock
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.roles import Role

DEADLINE_S = 60.0


def until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> None:
    """Waits for `condition`, looking every half millisecond."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.0005)


class Instance:
    """Arenas of `rings` (role → roles that it sends to). The kernel's is always there."""

    def __init__(self, rings: dict[Role, list[Role]], entries: int = 64, role_bytes: int = 4096) -> None:
        self.number = secrets.randbits(64)
        self.rings = {Role.KERNEL: [], **rings}
        self.bytes: dict[int, int] = {}
        self.writable_fds: dict[int, int] = {}
        self.read_fds: dict[int, int] = {}
        self.lock_fds: dict[int, int] = {}
        self.lock_read_fds: dict[int, int] = {}
        self.children: set[int] = set()
        counts = ffi.new("uint32_t[16]", [entries] * 16)
        for role, peers in self.rings.items():
            mask = sum(1 << peer for peer in peers)
            size = lib.atoll_arena_size(mask, counts, role_bytes, 0)
            fd = objects.create(objects.arena_name(self.number, role), size)
            with mmap.mmap(fd, size) as memory, memoryview(memory) as view:
                at = ffi.from_buffer(view)
                lib.atoll_arena_format(
                    at, role, self.number, size, mask, counts, role_bytes, 0, lib.ATOLL_WAKE_FUTEX, -1
                )
                ffi.release(at)
            self.bytes[role], self.writable_fds[role] = size, fd
            self.read_fds[role] = objects.open_read_only(objects.arena_name(self.number, role))
            lock = objects.create(objects.lock_name(self.number, role), objects.LOCK_BYTES)
            rolelock.format_lock(lock)
            self.lock_fds[role] = lock
            self.lock_read_fds[role] = objects.open_read_only(objects.lock_name(self.number, role))

    def map_all(self, writable: Role | None = None) -> None:
        for role in self.rings:
            own = role == writable
            physmap.map_arena(role, (self.writable_fds if own else self.read_fds)[role], self.bytes[role], own)
            physmap.map_lock(role, (self.lock_fds if own else self.lock_read_fds)[role], own)

    def open(self, role: Role, incarnation: int) -> Any:
        """struct atoll_domain * of this process as the active one of `role`; its arena is mapped writable."""
        domain = ffi.new("struct atoll_domain *")
        sizes = ffi.new("uint64_t[16]")
        for number, size in self.bytes.items():
            sizes[number] = size
        error = ffi.new("char[256]")
        result = lib.atoll_domain_open(domain, role, incarnation, os.getpid(), 0, sizes, error)
        assert result == 0, ffi.string(error)
        return domain

    def play(self, role: Role | None, main: Callable[[], Any]) -> int:
        """Runs `main` in a child that has mapped everything, `role`'s arena writable; returns its pid."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self.map_all(writable=role)
                main()
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        self.children.add(pid)
        return pid

    def wait(self, pid: int, seconds: float = DEADLINE_S) -> int:
        """The child's exit status, negative: the signal that ended it. A hang is a failure."""
        end = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.children.discard(pid)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"child {pid} did not end within {seconds} s")
            time.sleep(0.0005)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        assert self.wait(pid) == -signal.SIGKILL

    def close(self) -> None:
        for pid in list(self.children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        for role in self.rings:
            physmap.unmap_arena(role)
            physmap.unmap_lock(role)
        for fds in (self.writable_fds, self.read_fds, self.lock_fds, self.lock_read_fds):
            for fd in fds.values():
                os.close(fd)
        for name in objects.list_objects(self.number):
            objects.unlink(name)


@contextlib.contextmanager
def instance(rings: dict[Role, list[Role]], entries: int = 64, role_bytes: int = 4096) -> Iterator[Instance]:
    made = Instance(rings, entries, role_bytes)
    try:
        yield made
    finally:
        made.close()
