"""Two at once and more: each pair of roles, a death in the middle of a recovery, successors killed one after another,
all roles at the same moment, the kernel in the middle of a promotion."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Callable

import pytest
from recoverykit import (
    DOMAINS,
    LONG,
    ROLES,
    Eyes,
    Load,
    check_all,
    check_nothing_left,
    patiently,
    rows,
    send,
    settled,
)
from serverkit import Server, wait_for

SEED = 5


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_each_pair(module_server: Server, transport: str) -> None:
    with Eyes(module_server) as eyes, Load(module_server, transport=transport, size=32 << 20) as load:
        for pair in list(itertools.combinations(ROLES, 2)) * 2 * LONG:
            eyes.wait_serving(eyes.kill(*pair))
            load.goes_on(f"deaths of {pair}", 20)
    check_nothing_left(module_server)


def test_the_second_dies_while_the_first_recovers(module_server: Server) -> None:
    """The second is killed as soon as the first has a new process, or a little later."""
    chance = random.Random(SEED)
    with Eyes(module_server) as eyes, Load(module_server, size=32 << 20) as load:
        for first, second in list(itertools.permutations(ROLES, 2)) * LONG:
            old = eyes.pid(first)
            before = eyes.kill(first)
            wait_for(f"a new {first}", lambda old=old, first=first: eyes.pid(first) not in (0, old))
            spin(chance.random() * 0.002)
            before |= eyes.kill(second)
            eyes.wait_serving(before)
            load.goes_on(f"{second} after {first}", 20)
    check_nothing_left(module_server)


def spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


@pytest.mark.parametrize("role", ROLES)
def test_ten_successors_die_recovering(module_server: Server, role: str) -> None:
    """Each as soon as its pid appears."""
    with Eyes(module_server) as eyes, Load(module_server, volume=f"ten-{role}", size=24 << 20) as load:
        for _ in range(LONG):
            began, known = eyes.incarnation(role), eyes.pid(role)
            send(known, signal.SIGKILL)
            for _ in range(10):
                deadline = time.monotonic() + 30
                while eyes.pid(role) in (0, known):
                    assert time.monotonic() < deadline, f"no successor of {role}"
                known = eyes.pid(role)
                send(known, signal.SIGKILL)
            eyes.wait_serving({role: began + 10})
            load.goes_on(f"ten deaths of {role}", 40)
    check_nothing_left(module_server)


def test_all_but_init_at_once(module_server: Server) -> None:
    with Eyes(module_server) as eyes, Load(module_server, size=32 << 20) as load:
        for number in range(6 * LONG):
            before = eyes.kill(*(ROLES if number % 2 else reversed(ROLES)))
            if number % 3 == 2:
                send(rows(module_server)["zygote"]["pid"] or 0, signal.SIGKILL)
            eyes.wait_serving(before)
            load.goes_on("the death of all", 40)
    check_nothing_left(module_server)
    settled(module_server)
    check_all(module_server)


@pytest.mark.parametrize("point", ["kernel.promote.before", "kernel.promote.after"])
def test_a_promotion_that_a_dead_kernel_began(make_server: Callable[..., Server], point: str) -> None:
    """It ends with one active process and one writer of the arena."""
    server = make_server(config={"testing": {"crash_points": True}}).start()
    settled(server)
    with Eyes(server) as eyes, Load(server, size=24 << 20) as load:
        for role in DOMAINS:
            armed = patiently(server, "crash-point", name=point)["sequence"]
            before = eyes.kill(role)
            wait_for("the kernel dies in the promotion", lambda armed=armed: eyes.crash_seen("kernel") == armed)
            eyes.wait_serving(before)
            patiently(server, "crash-point", name="")
            assert eyes.incarnation(role) == before[role] + 1
            load.goes_on(f"{point} of {role}", 40)
            settled(server)
            found = server.json("audit", status=None)
            assert found["ok"], found["findings"]
            writers = {
                entry["name"]: entry["mapped_writable"] for entry in found["objects"] if entry["kind"] == "arena"
            }
            (its,) = next(who for name, who in writers.items() if name.endswith(f"-{role}"))
            assert its["pid"] == eyes.pid(role)
    check_nothing_left(server)
