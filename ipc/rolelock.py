"""Role locks: held for life by who plays the role; how a death is noticed. See rolelock.h.

- `format_lock(fd)`: init, once per role.
- `acquire(role, timeout=None)`: "taken" or "predecessor died"; the page is mapped writable (physmap.map_lock).
- `release(role)`: on an orderly end.
- `owner(role)`: thread id of the living owner, 0 if there is none; a read-only map is enough. For a single-threaded
  process (and the main thread of any) that is its pid.
- `Watch().wait({role: pid, ...}, timeout)`: the roles whose owner is no longer that one. Blocks without the GIL.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from atoll.ipc._ipc import ffi, lib


class LockError(OSError):
    """`errno` is the operating system's: ETIMEDOUT, EPERM (not ours), …"""


def _ns(timeout: float | None) -> int:
    return -1 if timeout is None else max(0, round(timeout * 1e9))


def format_lock(fd: int) -> None:
    """Makes the lock in the zeroed page of a writable descriptor."""
    result = lib.atoll_lock_format(fd)
    if result < 0:
        raise LockError(-result, f"cannot make a role lock: {os.strerror(-result)}")


def acquire(role: int, timeout: float | None = None) -> Literal["taken", "predecessor died"]:
    """Takes the lock for this thread; waits at most `timeout` seconds (None: forever) for a living owner."""
    result = lib.atoll_lock_acquire(role, _ns(timeout))
    if result < 0:
        raise LockError(-result, f"cannot take the lock of role {role}: {os.strerror(-result)}")
    return "predecessor died" if result == lib.ATOLL_LOCK_PREDECESSOR_DIED else "taken"


def release(role: int) -> None:
    result = lib.atoll_lock_release(role)
    if result < 0:
        raise LockError(-result, f"cannot release the lock of role {role}: {os.strerror(-result)}")


def owner(role: int) -> int:
    """Thread id of the living owner, 0: nobody, or it died holding it."""
    return int(lib.atoll_lock_owner(role))


def predecessor_died(role: int) -> bool:
    """True while the lock is marked by the death of its last owner and not yet taken again."""
    return bool(lib.atoll_lock_word(role) & 0x40000000)


class Watch:
    """Waits for deaths; one thread at a time waits, any other may interrupt it."""

    def __init__(self) -> None:
        self._word = ffi.new("uint32_t *")
        self._seen = 0

    def wait(self, owners: Mapping[int, int], timeout: float | None = None) -> set[int]:
        """The roles not held by owners[role] (thread id): at once, or when the first such is noticed.

        Empty after `timeout` seconds (None: no limit), an interrupt or a signal. All lock pages are mapped. Nothing is
        missed between two calls: who died meanwhile is no longer the owner.
        """
        expected = ffi.new("uint32_t[16]")
        mask = 0
        for role, tid in owners.items():
            expected[role] = tid
            mask |= 1 << role
        seen, self._seen = self._seen, self._word[0]
        if seen != self._seen:
            return set()
        result = lib.atoll_lock_wait(mask, expected, self._word, seen, _ns(timeout))
        if result < 0:
            raise LockError(-result, f"cannot wait for role locks: {os.strerror(-result)}")
        self._seen = self._word[0]
        return {role for role in owners if result >> role & 1}

    def interrupt(self) -> None:
        """Ends the present wait, or else the next one, early."""
        lib.atoll_lock_interrupt(self._word)
