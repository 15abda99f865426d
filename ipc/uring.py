"""io_uring instances that outlive their domain; see uring.h.

- `create_storage(entries, completion_entries)`: for one that only reads and writes a device.
- `available()`: (True, "") or (False, why).
- `create(entries, completion_entries, file_count=0)`: init; returns a `UringHandle`, which goes through fork.
- `UringHandle.attach()`: the one domain that uses it now maps it; returns struct atoll_uring * (keep it).
- `UringHandle.register_file(index, fd)`: into the ring's own table, from any process.
- `UringHandle.register_source(role, size)`: an arena that this process has mapped writable, for writes to the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from atoll.ipc._ipc import ffi, lib


class UringError(OSError):
    """`errno` is the operating system's; EPERM and ENOSYS mean that io_uring cannot be used here."""


@dataclass(frozen=True)
class UringHandle:
    """What a process needs to use the ring: the inherited descriptor and the parameters of its making."""

    fd: int
    parameters: bytearray

    def c_parameters(self) -> Any:
        """struct atoll_uring_parameters *, owned by the caller."""
        return ffi.from_buffer("struct atoll_uring_parameters *", self.parameters)

    def attach(self) -> Any:
        ring = ffi.new("struct atoll_uring *")
        error = ffi.new("char[256]")
        result = lib.atoll_uring_attach(ring, self.fd, self.c_parameters(), error)
        if result < 0:
            raise UringError(-result, ffi.string(error).decode(errors="replace"))
        return ring

    def register_file(self, index: int, fd: int) -> None:
        """Puts `fd` in place `index` of the table; -1 empties it."""
        result = lib.atoll_uring_register_file(self.fd, index, fd)
        if result < 0:
            raise UringError(-result, f"cannot register file {fd} as {index}: {os.strerror(-result)}")

    def register_source(self, role: int, size: int) -> None:
        """The first `size` bytes of the arena of `role`, whose memory stays pinned; ENOSYS: before Linux 6.15."""
        error = ffi.new("char[256]")
        result = lib.atoll_uring_register_source(self.fd, self.c_parameters(), role, size, error)
        if result < 0:
            raise UringError(-result, ffi.string(error).decode(errors="replace"))

    @property
    def takes_sources(self) -> bool:
        return bool(self.c_parameters().takes_sources)

    @property
    def source_bytes(self) -> int:
        """Registered, of all arenas together."""
        return int(sum(self.c_parameters().source_bytes))

    def close(self) -> None:
        os.close(self.fd)


def create(entries: int, completion_entries: int, file_count: int = 0) -> UringHandle:
    return _made(
        lambda parameters, error: lib.atoll_uring_create(entries, completion_entries, file_count, parameters, error)
    )


def create_storage(entries: int, completion_entries: int) -> UringHandle:
    """Sources are registered later, if the system can (`takes_sources`)."""
    return _made(
        lambda parameters, error: lib.atoll_uring_create_storage(entries, completion_entries, parameters, error)
    )


def _made(make: Callable[[Any, Any], int]) -> UringHandle:
    parameters = bytearray(ffi.sizeof("struct atoll_uring_parameters"))
    error = ffi.new("char[256]")
    fd = make(ffi.from_buffer("struct atoll_uring_parameters *", parameters), error)
    if fd < 0:
        raise UringError(-fd, ffi.string(error).decode(errors="replace"))
    return UringHandle(fd, parameters)


def available() -> tuple[bool, str]:
    """Whether io_uring can be used here, and if not, why."""
    try:
        create(4, 8, 4).close()
    except UringError as error:
        return False, error.strerror or str(error)
    return True, ""
