"""The physical map of this process; see physmap.h.

- `map_arena(role, fd, size, writable=False)`, `map_lock(role, fd, writable=False)`: at the role's own address.
- `unmap_arena(role)`, `unmap_lock(role)`.
- `populate(role)`: page tables made beforehand, in each standby.
- `header(role)`: struct atoll_arena_header * of a mapped arena.
- `Elsewhere(fd, size)`: an old or foreign arena anywhere, read-only, for tools; a context manager.

A descriptor may be closed once it is mapped. Errors are MapError with a text that says what could not be mapped.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from atoll.ipc._ipc import ffi, lib


class MapError(OSError):
    """`errno` is the operating system's."""


def _checked(result: int, error: Any) -> None:
    if result < 0:
        raise MapError(-result, ffi.string(error).decode(errors="replace"))


def map_arena(role: int, fd: int, size: int, writable: bool = False) -> None:
    """Maps `size` bytes of `fd` at the address of `role`'s arena, in place of this process's earlier view of it.

    A writable map is not inherited by children: they have a hole there.
    """
    error = ffi.new("char[256]")
    _checked(lib.atoll_map_arena(role, fd, size, writable, error), error)


def unmap_arena(role: int) -> None:
    error = ffi.new("char[256]")
    _checked(lib.atoll_unmap_arena(role, error), error)


def populate(role: int) -> None:
    """Makes the page tables of a mapped arena, all but its buffers."""
    error = ffi.new("char[256]")
    _checked(lib.atoll_populate_arena(role, error), error)


def map_lock(role: int, fd: int, writable: bool = False) -> None:
    error = ffi.new("char[256]")
    _checked(lib.atoll_map_lock(role, fd, writable, error), error)


def unmap_lock(role: int) -> None:
    error = ffi.new("char[256]")
    _checked(lib.atoll_unmap_lock(role, error), error)


def address(role: int) -> int:
    return int(lib.ATOLL_MAP_BASE + role * lib.ATOLL_MAP_STRIDE)


def header(role: int) -> Any:
    """struct atoll_arena_header * of a mapped arena; MapError if it is not mapped."""
    if lib.atoll_mapped_bytes(role) == 0:
        raise MapError(0, f"the arena of role {role} is not mapped")
    return ffi.cast("struct atoll_arena_header *", address(role))


def serves(header: Any, incarnation: int) -> bool:
    """Whether that incarnation serves. It is read before the state: a process says that it recovers before it writes
    its incarnation (atoll_domain_open), so that its predecessor's state cannot be taken for its own."""
    return bool(header.incarnation == incarnation and header.state == lib.ATOLL_STATE_SERVING)


class Elsewhere:
    """`size` bytes of `fd`, read-only: `address` and `bytes` (a buffer that copies nothing) until closed."""

    def __init__(self, fd: int, size: int) -> None:
        error = ffi.new("char[256]")
        self.size = size
        self.pointer = lib.atoll_map_elsewhere(fd, size, error)
        if self.pointer == ffi.NULL:
            raise MapError(0, ffi.string(error).decode(errors="replace"))

    @property
    def address(self) -> int:
        return int(ffi.cast("uintptr_t", self.pointer))

    @property
    def header(self) -> Any:
        return ffi.cast("struct atoll_arena_header *", self.pointer)

    @property
    def bytes(self) -> Any:
        return ffi.buffer(self.pointer, self.size)

    def close(self) -> None:
        if self.pointer != ffi.NULL:
            lib.atoll_unmap_elsewhere(self.pointer, self.size)
            self.pointer = ffi.NULL

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
