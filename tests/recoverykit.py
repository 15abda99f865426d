"""What the recovery tests share: a load that checks every byte, a view on who plays which role, and kills.

    with Eyes(server) as eyes, Load(server) as load:
        eyes.kill("disk"); eyes.wait_serving("disk", after)
        load.goes_on("after the kill of disk")
    # leaving the block ends the load, checks every byte of its volume, and fails if a client noticed anything
    check_live(server)

The load is that of `atoll chaos` (chaos_load.py: large and small, ragged, flush, FUA, trim, zeroes, reads, over TCP and
Unix) on a volume of its own, its coming and going connections, and `oddities` here: options (LIST, INFO, contexts),
extended headers, CACHE, BLOCK_STATUS, connections that end in the middle of what they say.

ATOLL_LONG=N makes the rounds of these tests N times as many.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nbdclient import ALLOCATION, Command, Connection, Info, Option, info_data
from serverkit import Server, wait_for

from atoll.ipc import objects
from atoll.ipc._ipc import lib
from atoll.ipc.physmap import Elsewhere
from atoll.kernel import chaos
from atoll.kernel.chaos_load import Report, Shared, Target, churn, work
from atoll.kernel.client import Client, ControlError

ROLES = ("nic", "nbd", "dedup", "disk", "kernel")
DOMAINS = ROLES[:4]
FAST = "llrrm"  # only where a fast device is configured
LONG = int(os.environ.get("ATOLL_LONG", "1"))
MIB = 1 << 20
HEADER_BYTES = 8192
# A test says so when something took longer.
SLOW_S = 3.0


class Eyes:
    """The arenas' headers, read-only: pid, incarnation, state and crash_seen of each role at this moment."""

    def __init__(self, server: Server) -> None:
        self.server = server
        instance = int(json.loads((server.data / "instance.json").read_text())["instance"], 16)
        self.views: dict[str, Elsewhere] = {}
        present = {row["role"] for row in patiently(server, "ps")["domains"]}
        for role in [*ROLES, *({FAST} & present)]:
            descriptor = objects.open_read_only(objects.arena_name(instance, role))
            try:
                self.views[role] = Elsewhere(descriptor, HEADER_BYTES)
            finally:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for view in self.views.values():
            view.close()

    def pid(self, role: str) -> int:
        return int(self.views[role].header.pid)

    def incarnation(self, role: str) -> int:
        return int(self.views[role].header.incarnation)

    def serving(self, role: str) -> bool:
        return bool(self.views[role].header.state == lib.ATOLL_STATE_SERVING)

    def crash_seen(self, role: str) -> int:
        return int(self.views[role].header.crash_seen)

    def kill(self, *roles: str, number: signal.Signals = signal.SIGKILL) -> dict[str, int]:
        """At once, as the headers say now; returns the incarnations before."""
        victims = {role: (self.pid(role), self.incarnation(role)) for role in roles}
        for pid, _ in victims.values():
            send(pid, number)
        return {role: incarnation for role, (_, incarnation) in victims.items()}

    def wait_serving(self, before: dict[str, int], timeout_s: float = 30.0) -> None:
        """Until each role is served by a later incarnation than `before` says."""
        for role, incarnation in before.items():
            with told_if_slow(f"a successor of {role}"):
                wait_for(
                    f"a successor of {role} {incarnation} serves",
                    lambda role=role, incarnation=incarnation: (
                        self.incarnation(role) > incarnation and self.serving(role)
                    ),
                    timeout_s,
                )


def send(pid: int, number: signal.Signals) -> None:
    if pid <= 0:  # would be a whole group
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def told_if_slow(what: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        if time.monotonic() - began > SLOW_S:
            print(f"SLOW: {what} took {time.monotonic() - began:.1f} s, at {time.strftime('%H:%M:%S')}")


class Load:
    """Clients that check everything. Leaving the block is the verdict."""

    def __init__(
        self,
        server: Server,
        volume: str = "load",
        transport: str = "both",
        connections: int = 4,
        depth: int = 6,
        rate: float = 800.0,
        small: bool = False,
        read_percent: float = 50.0,
        size: int = 48 * MIB,
        seed: int = 1,
        odd: bool = True,
        mortal: bool = False,
    ) -> None:
        """`mortal`: the server will end altogether meanwhile: connections drop, what was acknowledged counts."""
        self.mortal = mortal
        self.server, self.volume = server, volume
        options = chaos.Options(
            Path(), connections=connections, depth=depth, small=small, rate=rate, workers=1, read_percent=read_percent,
            seed=seed,
        )  # fmt: skip
        with Client(server.data) as client:
            client.call("volume-create", name=volume, size_bytes=size, read_only=False)
            targets, size = chaos._targets(client, volume, transport)
        self.shared = Shared(3)
        self.jobs = [chaos._start(work, (chaos._plans(options, targets, size, 1)[0], self.shared))]
        if not mortal:
            self.jobs.append(chaos._start(churn, (1, targets, self.shared)))
        if odd and not mortal:
            self.jobs.append(chaos._start(oddities, (2, targets, self.shared, seed)))
        self.reports: list[Report] = []

    def __enter__(self) -> Self:
        self.goes_on("the start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with told_if_slow("the end of the load"):
            self.reports = chaos._end(self.jobs, lambda line: None)
        self.tell()
        if kind is None:
            self.assert_unharmed()
        patiently(self.server, "volume-delete", name=self.volume, force=True)

    def totals(self) -> dict[str, int]:
        return self.shared.totals()

    def tell(self) -> None:
        for report in self.reports:
            for trouble in [each for each in report.troubles if not self.mortal or each.kind != "drop"][:20]:
                print("TROUBLE", round(trouble.time_ns / 1e9, 4), trouble.kind, trouble.text)
            if report.failure:
                print("FAILURE", report.failure)
        print({name: count for name, count in self.totals().items() if count})

    def assert_unharmed(self) -> None:
        assert [report.failure for report in self.reports if report.failure] == []
        allowed = {"drop"} if self.mortal else set()
        troubles = [trouble for report in self.reports for trouble in report.troubles if trouble.kind not in allowed]
        assert [trouble.text for trouble in troubles][:10] == []
        totals = self.totals()
        assert not any(totals[name] for name in ("errors", "wrong_sectors", "lost_sectors")), totals
        assert self.mortal or totals["drops"] == 0, totals

    def goes_on(self, what: str, replies: int = 60, timeout_s: float = 30.0) -> None:
        before = self.totals()

        def look() -> bool:
            now = self.totals()
            return now["replies"] >= before["replies"] + replies and (self.mortal or now["churns"] > before["churns"])

        with told_if_slow(f"replies after {what}"):
            wait_for(f"replies after {what}", look, timeout_s)

    def longest_silence_s(self) -> float:
        """Of a connection with requests outstanding; after the end."""
        return max((float(report.silence_us.max()) / 1e6 for report in self.reports if report.silence_us is not None
                    and len(report.silence_us)), default=0.0)  # fmt: skip


def oddities(worker: int, targets: list[Target], shared: Shared, seed: int, commands: Pipe) -> None:
    """What the other loads do not say. Anything but the right answer is a trouble."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    report = Report(worker)
    chance = random.Random(seed)
    number = 0
    while not commands.poll():
        target = targets[number % len(targets)]
        number += 1
        try:
            with Connection.open(target.address, timeout_s=60) as connection:
                _one_oddity(connection, target.export, number, chance)
        except Exception as error:
            shared.add(worker, "drops")
            report.note("drop", f"odd {target.transport} connection {number}: {type(error).__name__}: {error}")
        time.sleep(0.005)
    with contextlib.suppress(OSError):
        commands.send(report)


def _one_oddity(connection: Connection, export: str, number: int, chance: random.Random) -> None:
    kind = number // 2 % 6
    if kind == 0:  # options only
        connection.greet()
        assert export in connection.list_exports()
        assert connection.option(Option.STRUCTURED_REPLY)[-1].type == 1
        assert connection.option(Option.INFO, info_data(export.encode(), list(Info)))[-1].type == 1
        assert connection.meta_context(Option.LIST_META_CONTEXT, export)[0][1] == ALLOCATION
        assert connection.option(77, b"?" * chance.randrange(300))[-1].is_error
        assert connection.option(Option.ABORT)[-1].type == 1
    elif kind == 1:  # closes in the middle of an option
        connection.greet()
        connection.send_option(Option.LIST, b"", length=5)
    elif kind == 2:
        connection.negotiate(export, structured=False, allocation=False, export_name=True, flags=1)
        connection.read(0, 4096)
        connection.disconnect()
    elif kind == 3:
        connection.negotiate(export, extended=True)
        connection.cache(0, 1 << 20)
        assert sum(length for length, _ in connection.block_status(0, 1 << 20)) > 0
        connection.disconnect()
    elif kind == 4:  # many at once, one message, answered in any order
        found = connection.negotiate(export)
        asked = [
            connection.submit(Command.BLOCK_STATUS if at % 4 == 3 else Command.READ, at * 65536 % found.size, 65536)
            for at in range(16)
        ]
        for cookie in asked:
            connection.wait(cookie).check()
        connection.flush()
    else:  # leaves with replies and half a write under way; that write is not one
        connection.negotiate(export)
        for at in range(8):
            connection.submit(Command.READ, at << 20, 1 << 20)
        connection.send(b"\x25\x60\x95\x13\0\0\0\1")


def patiently(server: Server, verb: str, timeout_s: float = 60.0, **arguments: Any) -> dict[str, Any]:
    """A control call; asked again while the kernel is the one that dies."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with told_if_slow(verb), Client(server.data, timeout_s=timeout_s) as client:
                return client.call(verb, **arguments)
        except ControlError as error:
            if "no volume" in str(error) and verb == "volume-delete":
                return {}
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def check_live(server: Server) -> None:
    """dedup's checker: map, counts, log, held pages and pins agree."""
    answer = patiently(server, "call", role="dedup", message={"call": "check"}, timeout_s=60.0)["answer"]
    assert answer["inconsistencies"] == [], answer


def check_all(server: Server) -> None:
    """dedup's checker, and one writer per arena, as the operating system says."""
    check_live(server)
    audit = server.json("audit", status=None)
    assert audit["ok"], audit["findings"]


def rows(server: Server) -> dict[str, dict[str, Any]]:
    return {row["role"]: row for row in patiently(server, "ps")["domains"]}


def settled(server: Server, roles: Iterable[str] = DOMAINS) -> None:
    """Everybody serves and has a standby."""

    def look() -> bool:
        found = rows(server)
        return all(found[role]["state"] == "serving" and found[role]["standby_pid"] for role in roles)

    wait_for("all serve and have standbys", look, 30)


def check_nothing_left(server: Server) -> None:
    """When the clients are gone and all is written, nothing is in use or lent any more."""
    patiently(server, "call", role="dedup", message={"call": "flush"}, timeout_s=60.0)
    found: dict[str, Any] = {}

    def look() -> bool:
        domains = patiently(server, "status")["domains"]
        names = ("connections", "slots_in_use", "stream_buffers_in_use", "buffer_pages_lent", "buffer_pages_taken")
        found.update({name: domains["nic"][name] for name in names})
        found.update({f"log {name}": domains["dedup"]["log"][name] for name in ("used_bytes", "runs", "pinned_blocks")})
        return not any(found.values())

    try:
        wait_for("nothing is in use", look, 10)
    except AssertionError:
        raise AssertionError(f"still in use without clients: {found}") from None
    check_live(server)
