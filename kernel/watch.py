"""The thread that waits for deaths: on the role locks, through read-only maps, without the interpreter's lock.

- `LockWatch(notify_fd)`; `arm(role, pid)`: tell when the lock of that role is no longer held by that process
- `taken()`: the (role, pid) told so far; the eventfd `notify_fd` counts up with each

It decides nothing. A role is told once and then must be armed again. After a crash: it dies with its kernel; the next
one looks at all locks before it waits, so that no death between two kernels is missed.
"""

import os
import threading

from atoll.ipc import rolelock


class LockWatch:
    def __init__(self, notify_fd: int) -> None:
        self._notify_fd = notify_fd
        self._watch = rolelock.Watch()
        self._guard = threading.Lock()
        self._armed: dict[int, int] = {}
        self._dead: list[tuple[int, int]] = []
        self._thread = threading.Thread(target=self._run, name="atoll-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def arm(self, role: int, pid: int) -> None:
        with self._guard:
            self._armed[role] = pid
        self._watch.interrupt()

    def disarm(self, role: int) -> None:
        with self._guard:
            self._armed.pop(role, None)
        self._watch.interrupt()

    def taken(self) -> list[tuple[int, int]]:
        with self._guard:
            dead, self._dead = self._dead, []
        return dead

    def _run(self) -> None:
        while True:
            with self._guard:
                watched = dict(self._armed)
            # Nobody to watch: the interrupt of the next arm() ends the wait.
            found = self._watch.wait(watched, None if watched else 3600.0)
            if not found:
                continue
            with self._guard:
                for role in found:
                    if self._armed.get(role) == watched[role]:
                        del self._armed[role]
                        self._dead.append((role, watched[role]))
            os.eventfd_write(self._notify_fd, 1)
