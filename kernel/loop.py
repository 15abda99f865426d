"""The kernel's one loop: waits for descriptors, timers and rings, and calls who is concerned, one after another.

- `add(fd, ready)`, `remove(fd)`, `writable(fd, ready | None)`
- `at(time_ns, act)`   CLOCK_MONOTONIC; there is no cancelling: what is due looks whether it is still wanted
- `run()`              until `end()`

A callback never waits. An error in one is logged and ends nothing else: domains live on whatever the kernel thinks.
"""

import heapq
import itertools
import logging
import os
import select
import time
from collections.abc import Callable
from typing import Any

from atoll.ipc._ipc import lib

log = logging.getLogger("atoll.kernel")

Act = Callable[[], None]

WAIT_MAX_S = 3600.0  # epoll takes no longer times


class Loop:
    def __init__(self, domain: Any, eventfd: int, on_wake: Act, drain_init: Act) -> None:
        """`domain`: the kernel's own; `eventfd` wakes it."""
        self._domain = domain
        self._eventfd = eventfd
        self._on_wake = on_wake
        self.drain_init = drain_init
        self._epoll = select.epoll()
        self._ready: dict[int, Act] = {}
        self._write_ready: dict[int, Act] = {}
        self._timers: list[tuple[int, int, Act]] = []
        self._order = itertools.count()
        self._ending = False
        self.turns = 0
        self._epoll.register(eventfd, select.EPOLLIN)

    def add(self, descriptor: int, ready: Act) -> None:
        self._ready[descriptor] = ready
        self._epoll.register(descriptor, select.EPOLLIN)

    def remove(self, descriptor: int) -> None:
        """Before the descriptor is closed."""
        if self._ready.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)
        self._write_ready.pop(descriptor, None)

    def writable(self, descriptor: int, ready: Act | None) -> None:
        """Calls `ready` whenever an added descriptor can be written to, until told None."""
        if ready is None:
            self._write_ready.pop(descriptor, None)
            self._epoll.modify(descriptor, select.EPOLLIN)
        else:
            self._write_ready[descriptor] = ready
            self._epoll.modify(descriptor, select.EPOLLIN | select.EPOLLOUT)

    def at(self, time_ns: int, act: Act) -> None:
        heapq.heappush(self._timers, (time_ns, next(self._order), act))

    def end(self) -> None:
        self._ending = True

    def run(self) -> None:
        header = self._domain.self
        while not self._ending:
            self.turns += 1
            header.progress += 1  # init looks at it: a kernel that hangs is replaced
            timeout = self._until_next_timer()
            if not lib.atoll_domain_may_sleep(self._domain, 0):
                timeout = 0.0
            events = self._epoll.poll(timeout)
            lib.atoll_domain_awake(self._domain)
            for descriptor, what in events:
                if descriptor == self._eventfd:
                    try:
                        os.eventfd_read(self._eventfd)
                    except BlockingIOError:
                        pass
                    continue
                if what & select.EPOLLOUT and descriptor in self._write_ready:
                    self._call(self._write_ready[descriptor])
                if what & ~select.EPOLLOUT and descriptor in self._ready:
                    self._call(self._ready[descriptor])
            self._call(self._on_wake)
            now = time.monotonic_ns()
            while self._timers and self._timers[0][0] <= now:
                self._call(heapq.heappop(self._timers)[2])

    def _until_next_timer(self) -> float | None:
        if not self._timers:
            return None
        return min(WAIT_MAX_S, max(0.0, (self._timers[0][0] - time.monotonic_ns()) / 1e9))

    @staticmethod
    def _call(act: Act) -> None:
        try:
            act()
        except Exception:
            log.exception("error in the kernel")
