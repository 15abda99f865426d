"""A worker of `atoll chaos`: a process with some connections that keeps them busy and checks every byte it gets back.

- `Plan`            what to do; the same seed does the same
- `Shared`          figures that all workers count up while they run; the watching process only reads
- `work(...)`       the process: load until told to stop, then a check of the whole region; returns a `Report`
- `churn(...)`      another one: connects, negotiates, reads one block, leaves, again and again

All of a worker's connections write to and read from the same region (model.py), so a block written over TCP is read
over a Unix socket. A connection that ends by itself is counted and made anew; its writes in flight are then uncertain.
"""

import contextlib
import multiprocessing
import random
import select
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from atoll.kernel import chaos_nbd as nbd
from atoll.kernel.chaos_model import POOL, SECTOR, Finding, Ids, Model, Span, block_ids, payload

# Nothing is silent for so long by right: what is outstanding then is given up and counted as a drop.
PATIENCE_S = 60.0
TROUBLES_MAX = 10_000

_FIGURES = ("replies", "bytes", "errors", "drops", "wrong_sectors", "lost_sectors", "checked_bytes", "churns")


@dataclass(frozen=True, slots=True)
class Target:
    """One connection."""

    transport: str  # "tcp" or "unix"
    address: nbd.Address
    export: str


@dataclass(frozen=True, slots=True)
class Plan:
    worker: int
    seed: int
    targets: list[Target]
    first_sector: int  # of the region
    sectors: int
    depth: int  # requests in flight per connection
    read_percent: float
    duplicate_percent: float
    small: bool = False  # at most 32 KiB each
    rate: float = 0.0  # requests per second of this worker; 0: as fast as they are answered


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that must not happen."""

    time_ns: int  # CLOCK_MONOTONIC
    kind: str  # drop, error, wrong, lost
    text: str


@dataclass
class Report:
    worker: int
    counts: dict[str, int] = field(default_factory=dict)  # replies by command
    troubles: list[Trouble] = field(default_factory=list)  # the first TROUBLES_MAX
    wrong_bytes: int = 0
    # One entry per reply: when (monotonic ns), connection of the worker, time since it was asked, and time during which
    # that connection, with requests outstanding, had heard nothing.
    times_ns: Any = None
    connections: Any = None
    latency_us: Any = None
    silence_us: Any = None
    failure: str = ""  # the worker itself failed

    def note(self, kind: str, text: str) -> None:
        if len(self.troubles) < TROUBLES_MAX:
            self.troubles.append(Trouble(time.monotonic_ns(), kind, text))


class Shared:
    """Counters in memory that parent and workers share; each has one writer per worker."""

    def __init__(self, workers: int) -> None:
        self._array = multiprocessing.RawArray("q", workers * len(_FIGURES))
        self._workers = workers

    def add(self, worker: int, figure: str, amount: int = 1) -> None:
        self._array[worker * len(_FIGURES) + _FIGURES.index(figure)] += amount

    def totals(self) -> dict[str, int]:
        count = len(_FIGURES)
        return {name: sum(self._array[at::count]) for at, name in enumerate(_FIGURES)}


@dataclass(slots=True)
class _Flight:
    span: Span | None  # None: a flush
    command: int
    sent_ns: int
    length: int
    payload: Any = None


class Worker:
    def __init__(self, plan: Plan, shared: Shared, commands: Connection) -> None:
        self.plan, self.shared, self.commands = plan, shared, commands
        self.random = random.Random(plan.seed * 1009 + plan.worker)
        self.model = Model(plan.first_sector, plan.sectors)
        self.report = Report(plan.worker)
        self.links: list[nbd.Link | None] = [None] * len(plan.targets)
        self.flights: list[dict[int, _Flight]] = [{} for _ in plan.targets]
        self.last_heard = [time.monotonic()] * len(plan.targets)
        self.poll = select.epoll()
        self.cookie = 0
        self.unique = (plan.worker + 1) << 40
        self.began = time.monotonic()
        self.submitted = 0
        self.heard_ns = [0] * len(plan.targets)
        self.times: list[int] = []
        self.who: list[int] = []
        self.took: list[int] = []
        self.silences: list[int] = []

    # --- Connections ---

    def connect(self, index: int) -> bool:
        target = self.plan.targets[index]
        try:
            link = nbd.connect(target.address, target.export, structured=index % 2 == 0)
        except (nbd.LinkLost, nbd.BadReply) as error:
            self.drop(index, str(error))
            return False
        self.links[index] = link
        self.last_heard[index] = time.monotonic()
        self.poll.register(link.fileno(), select.EPOLLIN)
        return True

    def drop(self, index: int, why: str) -> None:
        """The connection is gone: what was under way has an uncertain outcome."""
        self.shared.add(self.plan.worker, "drops")
        self.report.note("drop", f"{self.plan.targets[index].transport} connection {index}: {why}")
        link = self.links[index]
        if link is not None:
            self.poll.unregister(link.fileno())
            link.close()
            self.links[index] = None
        for flight in self.flights[index].values():
            if flight.span is None:
                continue
            if flight.span.kind == "read":
                self.model.end_read(flight.span, None)
            else:
                self.model.end_write(flight.span, certain=False)
        self.flights[index].clear()

    # --- Requests ---

    def submit(self, index: int) -> bool:
        """One more request on a connection; False if no place was found for it just now."""
        link = self.links[index]
        assert link is not None
        choose = self.random
        self.cookie += 1
        if choose.random() < 0.004:
            self._send(link, index, _Flight(None, nbd.FLUSH, 0, 0), 0, 0)
            return True
        first, end = self._place()
        reading = choose.random() * 100 < self.plan.read_percent
        if reading:
            span = self.model.begin_read(first, end)
            self._send(link, index, _Flight(span, nbd.READ, 0, (end - first) * SECTOR), first, 0)
            return True
        if not self.model.free_for_write(first, end):
            return False
        kind = choose.random()
        flags = nbd.FUA if choose.random() < 0.03 else 0
        if kind < 0.04:
            first, end = -(-first // 8) * 8, end // 8 * 8  # a trim of half a block need not do anything
            if first >= end or not self.model.settled(first, end):
                return False
            span = self.model.begin_write("trim", first, end, None)
            self._send(link, index, _Flight(span, nbd.TRIM, 0, (end - first) * SECTOR), first, flags)
        elif kind < 0.08:
            span = self.model.begin_write("zero", first, end, None)
            flags |= nbd.NO_HOLE if choose.random() < 0.5 else 0
            self._send(link, index, _Flight(span, nbd.WRITE_ZEROES, 0, (end - first) * SECTOR), first, flags)
        else:
            at, until = first + self.plan.first_sector, end + self.plan.first_sector
            ids = self._ids(-(-until // 8) - at // 8)
            span = self.model.begin_write("write", first, end, block_ids(at, until, ids))
            flight = _Flight(span, nbd.WRITE, 0, (end - first) * SECTOR, payload(at, until, ids))
            self._send(link, index, flight, first, flags)
        return True

    def _send(self, link: nbd.Link, index: int, flight: _Flight, first: int, flags: int) -> None:
        flight.sent_ns = time.monotonic_ns()
        self.flights[index][self.cookie] = flight
        offset = (first + self.plan.first_sector) * SECTOR if flight.length else 0
        link.submit(self.cookie, flight.command, offset, flight.length, flags, flight.payload)

    def _place(self) -> tuple[int, int]:
        """Sectors [first, end) of the region: every size from 512 bytes to 1 MiB, most of them a block."""
        choose, sectors = self.random, self.plan.sectors
        kind = choose.random()
        if kind < 0.15:  # ragged
            count = choose.randrange(1, 33)
            first = choose.randrange(sectors - count)
            return first, first + count
        if kind < 0.65:
            blocks = 1
        elif self.plan.small:
            blocks = choose.randrange(2, 9)
        elif kind < 0.95:
            blocks = choose.randrange(2, 33)
        else:
            blocks = choose.randrange(33, 257)
        blocks = min(blocks, sectors // 8)
        first = choose.randrange(sectors // 8 - blocks + 1) * 8
        return first, first + blocks * 8

    def _ids(self, blocks: int) -> Ids:
        """Content ids of that many blocks: a run out of the common pool, or all new."""
        if self.random.random() * 100 < self.plan.duplicate_percent:
            start = self.random.randrange(POOL)
            return (np.arange(start, start + blocks, dtype=np.uint64) % np.uint64(POOL)) + np.uint64(1)
        self.unique += blocks
        return np.arange(self.unique - blocks, self.unique, dtype=np.uint64)

    # --- Replies ---

    def handle(self, index: int, reply: nbd.Reply, now: int) -> None:
        oldest_ns = next(iter(self.flights[index].values())).sent_ns
        flight = self.flights[index].pop(reply.cookie)
        self.times.append(now)
        self.who.append(index)
        self.took.append((now - flight.sent_ns) // 1000)
        self.silences.append((now - max(oldest_ns, self.heard_ns[index])) // 1000)
        self.heard_ns[index] = now
        name = nbd.NAMES[flight.command]
        self.report.counts[name] = self.report.counts.get(name, 0) + 1
        if reply.error:
            self.shared.add(self.plan.worker, "errors")
            self.report.note("error", f"{name}: error {reply.error} on connection {index}")
        span = flight.span
        if span is None:
            return
        if span.kind == "read":
            found = self.model.end_read(span, None if reply.error else reply.data)
            if not reply.error:
                self.shared.add(self.plan.worker, "checked_bytes", flight.length)
            self.found(found, "read")
        else:
            self.model.end_write(span, certain=not reply.error)

    def found(self, findings: list[Finding], when: str) -> None:
        for finding in findings:
            self.shared.add(self.plan.worker, "lost_sectors" if finding.lost else "wrong_sectors")
            self.report.wrong_bytes += finding.wrong_bytes
            sector = finding.sector + self.plan.first_sector
            self.report.note(
                "lost" if finding.lost else "wrong",
                f"{when}, byte {sector * SECTOR}: {'lost write' if finding.lost else 'wrong content'},"
                f" expected {finding.expected:#x}, found {finding.found:#x}",
            )

    # --- The process ---

    def turn(self, timeout_s: float, refill: bool) -> None:
        for index in range(len(self.links)):
            if self.links[index] is None and refill and not self.connect(index):
                time.sleep(0.01)
        handles = {link.fileno(): index for index, link in enumerate(self.links) if link is not None}
        for descriptor, _ in self.poll.poll(timeout_s):
            index = handles[descriptor]
            link = self.links[index]
            assert link is not None
            try:
                replies = link.pump_in()
            except (nbd.LinkLost, nbd.BadReply) as error:
                self.drop(index, str(error))
                continue
            now = time.monotonic_ns()
            done = 0
            for reply in replies:
                done += 0 if reply.error else self.flights[index][reply.cookie].length
                self.handle(index, reply, now)
            if replies:
                self.last_heard[index] = now / 1e9
                self.shared.add(self.plan.worker, "replies", len(replies))
                self.shared.add(self.plan.worker, "bytes", done)
        moment = time.monotonic()
        for index, link in enumerate(self.links):
            if link is None:
                continue
            if not self.flights[index]:
                self.last_heard[index] = moment
            elif moment - self.last_heard[index] > PATIENCE_S:
                self.drop(index, f"no reply for {PATIENCE_S:g} s")
                continue
            tries = 0
            while refill and len(self.flights[index]) < self.plan.depth and tries < self.plan.depth * 4:
                tries += 1
                if self.plan.rate and self.submitted >= (moment - self.began) * self.plan.rate:
                    break
                self.submitted += self.submit(index)
            try:
                link.pump_out()
            except nbd.LinkLost as error:
                self.drop(index, str(error))
                continue
            self.poll.modify(link.fileno(), select.EPOLLIN | (select.EPOLLOUT if link.wants_out else 0))

    def run(self) -> Report:
        for index in range(len(self.links)):
            self.connect(index)
        while not self.commands.poll():
            self.turn(min(0.1, 1 / self.plan.rate) if self.plan.rate else 0.1, refill=True)
        deadline = time.monotonic() + PATIENCE_S + 5
        while any(self.flights) and time.monotonic() < deadline:
            self.turn(0.1, refill=False)
        self.verify()
        for link in self.links:
            if link is not None:
                link.close()
        report = self.report
        report.times_ns = np.array(self.times, np.int64)
        report.connections = np.array(self.who, np.int32)
        report.latency_us = np.array(self.took, np.int64)
        report.silence_us = np.array(self.silences, np.int64)
        return report

    def verify(self) -> None:
        """Every byte of the region, over a connection of its own."""
        at, step = 0, (1 << 20) // SECTOR
        link: nbd.Link | None = None
        tries = 0
        while at < self.plan.sectors:
            count = min(step, self.plan.sectors - at)
            try:
                if link is None:
                    target = self.plan.targets[0]
                    link = nbd.connect(target.address, target.export, structured=True)
                data = self._read_now(link, at, count)
            except (nbd.LinkLost, nbd.BadReply) as error:
                self.shared.add(self.plan.worker, "drops")
                self.report.note("drop", f"at the final check: {error}")
                link, tries = None, tries + 1
                if tries > 20:
                    raise
                continue
            if data is None:
                self.shared.add(self.plan.worker, "errors")
                self.report.note("error", f"final check: byte {(at + self.plan.first_sector) * SECTOR}")
            else:
                self.shared.add(self.plan.worker, "checked_bytes", count * SECTOR)
                self.found(self.model.check_all(at, data), "final check")
            at += count
        if link is not None:
            link.close()

    def _read_now(self, link: nbd.Link, first: int, count: int) -> Any:
        self.cookie += 1
        link.submit(self.cookie, nbd.READ, (first + self.plan.first_sector) * SECTOR, count * SECTOR)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            link.pump_out()
            events = select.POLLIN | (select.POLLOUT if link.wants_out else 0)
            waiter = select.poll()
            waiter.register(link.fileno(), events)
            waiter.poll(100)
            for reply in link.pump_in():
                return None if reply.error else reply.data
            if time.monotonic() > deadline:
                raise nbd.LinkLost(f"no reply for {PATIENCE_S:g} s")


def work(plan: Plan, shared: Shared, commands: Connection) -> None:
    """The process: anything on `commands` ends the load; then the report is sent there."""
    try:
        report = Worker(plan, shared, commands).run()
    except Exception as error:
        import traceback

        traceback.print_exc()
        report = Report(plan.worker, failure=f"{type(error).__name__}: {error}")
    with contextlib.suppress(OSError):
        commands.send(report)


def churn(worker: int, targets: list[Target], shared: Shared, commands: Connection) -> None:
    """Connects, negotiates, reads a block and leaves, so that kills meet connections at their beginning too."""
    report = Report(worker)
    times: list[int] = []
    took: list[int] = []
    number = 0
    while not commands.poll():
        number += 1
        target = targets[number % len(targets)]
        start = time.monotonic_ns()
        try:
            link = nbd.connect(target.address, target.export, structured=number % 2 == 0)
            try:
                _one_read(link)
            finally:
                link.close()
        except (nbd.LinkLost, nbd.BadReply) as error:
            shared.add(worker, "drops")
            report.note("drop", f"new {target.transport} connection: {error}")
        now = time.monotonic_ns()
        times.append(now)
        took.append((now - start) // 1000)
        shared.add(worker, "churns")
        time.sleep(0.002)
    report.times_ns = np.array(times, np.int64)
    report.connections = np.zeros(len(times), np.int32)
    report.latency_us = np.array(took, np.int64)
    report.silence_us = report.latency_us
    with contextlib.suppress(OSError):
        commands.send(report)


def _one_read(link: nbd.Link) -> None:
    link.submit(1, nbd.READ, 0, 4096)
    deadline = time.monotonic() + PATIENCE_S
    waiter = select.poll()
    link.pump_out()
    waiter.register(link.fileno(), select.POLLIN)
    while time.monotonic() < deadline:
        waiter.poll(1000)
        for reply in link.pump_in():
            if reply.error:
                raise nbd.BadReply(f"read of a new connection: error {reply.error}")
            link.submit(2, nbd.DISC, 0, 0)
            link.pump_out()
            return
    raise nbd.LinkLost(f"no reply for {PATIENCE_S:g} s")
