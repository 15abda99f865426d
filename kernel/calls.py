"""Calls of the kernel to domains, in order, one at a time for each; answers go to callbacks.

- `Calls(client, on_event)`; `call(role, message, done, timeout_s)`: `done` gets the answer, or one that is not "ok"
- `poll()` after a wake-up; `served(role)` when an incarnation serves: an open call is repeated to it
- `expire()` returns when it wants to be called again (ns), or None

After a crash of the domain: the call is repeated by its number, and answered once. After a crash of the kernel: the
answer to a call of its predecessor is taken and dropped; whoever asked has lost his connection and asks again.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from atoll.ipc.calls import CallBusy, CallClient
from atoll.ipc.message import MessageError

log = logging.getLogger("atoll.kernel")

Answer = dict[str, Any]
Done = Callable[[Answer], None]


@dataclass(slots=True)
class _Call:
    message: Mapping[str, Any]
    done: Done | None  # None: nobody waits any more
    deadline_ns: int
    number: int = 0


class Calls:
    def __init__(self, client: CallClient, on_event: Callable[[str, Answer], None]) -> None:
        self._client = client
        self._on_event = on_event
        self._queues: dict[str, deque[_Call]] = {}

    def call(self, role: str, message: Mapping[str, Any], done: Done, timeout_s: float) -> None:
        deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        self._queues.setdefault(role, deque()).append(_Call(message, done, deadline_ns))
        self._advance(role)

    def poll(self) -> None:
        for received in self._client.receive():
            if received.kind == "error":
                log.error("%s: %s", received.role, received.message.get("error"))
            elif received.kind == "event":
                self._on_event(received.role, received.message)
            else:
                queue = self._queues.get(received.role)
                if queue and queue[0].number == received.number:
                    done = queue.popleft().done
                    if done is not None:
                        done(received.message)
                self._advance(received.role)

    def served(self, role: str) -> None:
        try:
            self._client.repeat(role)
        except CallBusy as error:
            log.warning("%s", error)
        self._advance(role)

    def expire(self) -> int | None:
        """Gives up on calls whose time is over. One that was sent keeps its place until it is answered."""
        now = time.monotonic_ns()
        wanted: int | None = None
        for role, queue in self._queues.items():
            for call in list(queue):
                if call.done is None:
                    continue
                if call.deadline_ns > now:
                    wanted = call.deadline_ns if wanted is None else min(wanted, call.deadline_ns)
                    continue
                done, call.done = call.done, None
                if call.number == 0:
                    queue.remove(call)
                done({"ok": False, "error": f"{role} did not answer in time"})
        return wanted

    def _advance(self, role: str) -> None:
        """Sends the next call if the domain is free for one."""
        queue = self._queues.get(role)
        while queue and queue[0].number == 0:
            if self._client.outstanding(role):
                return
            try:
                queue[0].number = self._client.start(role, queue[0].message)
            except CallBusy:
                return
            except (MessageError, ValueError) as error:
                done = queue.popleft().done
                if done is not None:
                    done({"ok": False, "error": str(error)})
