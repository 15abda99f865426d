"""How `atoll chaos` kills, and what it sees of each death.

- `Killer(client, data)`         reads the arenas' headers (read-only) to see successors to the nanosecond
- `Killer.kill(roles, signal)`   one role, or several at the same moment -> one `Kill` each
- `roles_of(client)`             the roles that there are to be killed
- `choose(...)`                  the plan: which role, which signal, when

The kernel measures when it noticed the death of a domain; for kernel, and for several at once, nobody does, and only
the time until the successor serves is known, from the moment before the signal is sent.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atoll.ipc import objects
from atoll.ipc._ipc import lib
from atoll.ipc.physmap import Elsewhere
from atoll.kernel import cli_kill
from atoll.kernel.client import Client, ControlError

SERVING_S = 30.0
DOMAINS = ("nic", "nbd", "dedup", "disk")
FAST = "llrrm"  # only where a fast device is configured
ROLES = (*DOMAINS, "kernel")


@dataclass(slots=True)
class Kill:
    time_ns: int  # CLOCK_MONOTONIC, just before the signal
    role: str
    signal: str
    pid: int
    detect_ms: float | None
    serving_ms: float | None  # None: no successor in time
    paired_with: str | None = None
    error: str = ""

    def as_dict(self, began_ns: int) -> dict[str, Any]:
        plain = asdict(self)
        plain["at_s"] = round((plain.pop("time_ns") - began_ns) / 1e9, 6)
        return plain


def roles_of(client: Client) -> tuple[str, ...]:
    present = {row["role"] for row in client.call("ps")["domains"]}
    return tuple(role for role in (*DOMAINS, FAST, "kernel") if role in present)


class Killer:
    """Owns read-only maps of the headers until `close`."""

    def __init__(self, client: Client, data: Path) -> None:
        self.client, self.data = client, data
        instance = int(client.call("status")["instance"], 16)
        self.views: dict[str, Elsewhere] = {}
        self.roles = roles_of(client)
        for role in self.roles:
            fd = objects.open_read_only(objects.arena_name(instance, role))
            try:
                self.views[role] = Elsewhere(fd, 8192)
            finally:
                os.close(fd)

    def close(self) -> None:
        for view in self.views.values():
            view.close()

    def kill(self, roles: Sequence[str], number: signal.Signals) -> list[Kill]:
        """Sends the signal and waits until successors serve. One role goes through the kernel, which measures."""
        if len(roles) == 1:
            return [self._one(roles[0], number)]
        return self._together(roles, number)

    def _one(self, role: str, number: signal.Signals) -> Kill:
        name = number.name.removeprefix("SIG")
        start = time.monotonic_ns()
        try:
            found = cli_kill.kill(self.client, role, number)
        except ControlError as error:
            return Kill(start, role, name, 0, None, None, error=str(error))
        harmless = "" if found["new_pid"] else f"{name} does not end it"
        return Kill(start, role, name, found["pid"], found["detect_ms"], found["serving_ms"], error=harmless)

    def _together(self, roles: Sequence[str], number: signal.Signals) -> list[Kill]:
        name = number.name.removeprefix("SIG")
        kills, before = [], {}
        for role in roles:
            header = self.views[role].header
            before[role] = (int(header.pid), int(header.incarnation))
        for role in roles:
            others = ", ".join(other for other in roles if other != role)
            kills.append(Kill(time.monotonic_ns(), role, name, before[role][0], None, None, others))
            with contextlib.suppress(ProcessLookupError):
                os.kill(before[role][0], number)
        deadline = time.monotonic() + SERVING_S
        for kill in kills:
            header = self.views[kill.role].header
            while time.monotonic() < deadline:
                if int(header.incarnation) > before[kill.role][1] and header.state == lib.ATOLL_STATE_SERVING:
                    kill.serving_ms = max(0.0, (int(header.serving_ns) - kill.time_ns) / 1e6)
                    break
                time.sleep(0.001)
            else:
                kill.error = f"no successor after {SERVING_S:g} s"
        return kills


def choose(
    target: str, signals: Sequence[signal.Signals], seed: int, among: Sequence[str] = ROLES
) -> Iterator[tuple[tuple[str, ...], signal.Signals]]:
    """Who dies next and of what, for ever. `target`: a role, "any" (each as often) or "pairs" (two at once)."""
    chance = random.Random(seed)
    bag: list[tuple[str, ...]] = []
    while True:
        if not bag:
            if target == "any":
                bag = [(role,) for role in among]
            elif target == "pairs":
                bag = [(first, second) for first in among for second in among if first != second]
            else:
                bag = [(target,)]
            chance.shuffle(bag)
        roles = bag.pop()
        yield roles, chance.choice(list(signals))
