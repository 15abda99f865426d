"""Shared-memory objects of an instance: POSIX shared memory that outlives every process.

    /atoll-<instance, 16 hex digits>-<role>        the role's arena
    /atoll-<instance, 16 hex digits>-lock-<role>   its lock page

- `create(name, size)` allocates all of it at once, in huge pages where they are to be had, and returns a writable
  descriptor (mode 0600).
- `open_read_only(name)`, `open_writable(name)`: descriptors; the first really cannot be mapped writable.
- `unlink(name)`, `list_objects(instance)`, `list_instances()`; `available()` bytes for more.

Errors are ObjectError with the object's name. After a crash: objects stay until somebody unlinks them; the next start
finds them by `list_instances`.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import posix_ipc

from atoll.ipc._ipc import lib
from atoll.ipc.roles import Role

FOLDER = Path("/dev/shm")  # where Linux keeps them
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LOCK_BYTES = 4096
_NAME = re.compile(r"atoll-([0-9a-f]{16})-(lock-)?([a-z]+)")


class ObjectError(Exception):
    """What could not be done with which object, with sizes where they matter."""


def arena_name(instance: int, role: Role | int | str) -> str:
    return f"/atoll-{instance:016x}-{Role.of(role).text}"


def lock_name(instance: int, role: Role | int | str) -> str:
    return f"/atoll-{instance:016x}-lock-{Role.of(role).text}"


def create(name: str, size: int) -> int:
    """A new object of `size` bytes, zeroed, every page allocated (no SIGBUS later); returns a writable descriptor."""
    free = available()
    if free is not None and size > free:
        raise _too_small(name, size, free)
    try:
        fd = int(posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600).fd)
    except posix_ipc.ExistentialError as error:
        raise ObjectError(f"shared-memory object {name} exists already") from error
    except (OSError, posix_ipc.Error) as error:
        raise ObjectError(f"cannot create shared-memory object {name}: {error}") from error
    try:
        if _huge_allowed():
            os.ftruncate(fd, size)
            lib.atoll_make_huge(fd, size)
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        unlink(name)
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise _too_small(name, size, available() or 0) from error
        raise ObjectError(f"cannot allocate {size} bytes for {name}: {error.strerror}") from error
    return fd


def _huge_allowed() -> bool:
    """False where there are none, or the administrator wants none (Linux comes with "always [madvise] never")."""
    try:
        return "[never]" not in HUGE.read_text()
    except OSError:
        return False


def available() -> int | None:
    """Bytes free for shared memory; None if that cannot be told."""
    try:
        found = os.statvfs(FOLDER)
    except OSError:
        return None
    return None if found.f_blocks == 0 else found.f_bavail * found.f_frsize  # 0 blocks: tmpfs without a limit


def _too_small(name: str, size: int, free: int) -> ObjectError:
    return ObjectError(
        f"{FOLDER} is too small for shared-memory object {name}: {size} bytes wanted, {free} available"
        f" (containers: give more with --shm-size)"
    )


def open_read_only(name: str) -> int:
    """A descriptor of which no writable map can be made."""
    return _open(name, read_only=True)


def open_writable(name: str) -> int:
    return _open(name, read_only=False)


def _open(name: str, read_only: bool) -> int:
    try:
        return int(posix_ipc.SharedMemory(name, read_only=read_only).fd)
    except posix_ipc.ExistentialError as error:
        raise ObjectError(f"there is no shared-memory object {name}") from error
    except (OSError, ValueError, posix_ipc.Error) as error:
        raise ObjectError(f"cannot open shared-memory object {name}: {error}") from error


def size_of(fd: int) -> int:
    return os.fstat(fd).st_size


def unlink(name: str) -> None:
    """Removes the name; nothing happens if it is gone already. Maps and descriptors stay good."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        pass
    except (OSError, posix_ipc.Error) as error:
        raise ObjectError(f"cannot remove shared-memory object {name}: {error}") from error


def list_objects(instance: int) -> list[str]:
    """Names of the instance's objects, in order."""
    return list_instances().get(instance, [])


def list_instances() -> dict[int, list[str]]:
    """All instances of this machine that have objects, dead ones too: instance → names."""
    found: dict[int, list[str]] = {}
    try:
        files = sorted(entry.name for entry in os.scandir(FOLDER))
    except OSError as error:
        raise ObjectError(f"cannot list {FOLDER}: {error.strerror}") from error
    for file in files:
        match = _NAME.fullmatch(file)
        if match:
            found.setdefault(int(match[1], 16), []).append("/" + file)
    return found
