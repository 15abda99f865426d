"""`atoll bench ring`: Atoll's rings beside other ways for 64-byte messages between two processes.

- `run(seconds, plot)` measures for about `seconds` and returns a document of plain values; `plot` names a PNG to draw.
- `render(document)` is that document as tables.

Two processes, made for each single measurement, use the functions that every domain uses, on arenas mapped as domains
map them. All cases are measured in turn, round by round, so that what the machine does besides falls on all of them;
ratios are medians over the rounds of the ratio within a round.

After a crash: the arenas are memory files without a name; they end with the processes.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import posix_ipc
from cffi import FFI
from rich.console import Group, RenderableType
from rich.table import Table

from atoll.bench import compiled
from atoll.bench._bench import ffi, lib
from atoll.ipc import physmap
from atoll.ipc.roles import Role
from atoll.kernel import process, table
from atoll.kernel.config import Kernel

BATCHES = (1, 8, 32, 256)
ENTRIES = 4096
ASKER, ANSWERER, BETWEEN = Role.NIC, Role.NBD, Role.DEDUP
DEPTHS = (1, 32)  # requests on their way through a path of domains
SAME, TWO = "same core", "two cores"
RING, LINE, DPDK, PIPE, SOCKET, QUEUE, PYTHON = (
    "atoll ring",
    "cache line",
    "DPDK rte_ring",
    "pipe",
    "Unix socket",
    "posix_ipc queue",
    "multiprocessing.Queue",
)


class BenchError(Exception):
    """A measurement failed, and which."""


@dataclass(frozen=True)
class Case:
    kind: str  # "throughput", "round trip", or "path": of domains, with requests on their way
    transport: str
    placement: str
    waiting: str  # "spinning" or "sleeping"; of a path: as the server's domains by default, for a moment by turns
    batch: int = 1  # of a path: its depth
    between: int = 0  # domains in a path between the two ends


def cases(cpu_count: int, dpdk: bool = False) -> list[Case]:
    """`dpdk`: its ring too, which only spins and so needs two processors."""
    placements = (SAME, TWO) if cpu_count > 1 else (SAME,)
    found = []
    for placement in placements:
        waiting = "spinning" if placement == TWO else "sleeping"
        found += [Case("throughput", RING, placement, waiting, batch) for batch in BATCHES]
        for transport, batches in ((PIPE, (1, 32)), (SOCKET, (1, 32)), (QUEUE, (1,)), (PYTHON, (1,))):
            found += [Case("throughput", transport, placement, "sleeping", batch) for batch in batches]
        if placement == TWO:
            found += [Case("round trip", LINE, TWO, "spinning"), Case("round trip", RING, TWO, "spinning")]
            if dpdk:
                found += [Case("throughput", DPDK, TWO, "spinning", batch) for batch in BATCHES]
                found.append(Case("round trip", DPDK, TWO, "spinning"))
        found += [
            Case("round trip", transport, placement, "sleeping") for transport in (RING, PIPE, SOCKET, QUEUE, PYTHON)
        ]
        found += [Case("path", RING, placement, "by turns", depth, more) for depth in DEPTHS for more in (0, 1)]
    return found


# --- One measurement ------------------------------------------------------------------------------------------------


class Arenas:
    """Kernel and three roles with rings to each other; the same for all measurements, each a new incarnation."""

    def __init__(self) -> None:
        self.incarnation = 0
        self.sizes: dict[Role, int] = {}
        self.fds: dict[Role, int] = {}
        self.eventfds: list[int] = []
        counts = ffi.new("uint32_t[16]", [ENTRIES] * 16)
        ends = (ASKER, ANSWERER, BETWEEN)
        for role in (Role.KERNEL, *ends):
            mask = sum(1 << peer for peer in ends if role in ends and peer != role)
            size = lib.atoll_arena_size(mask, counts, 0, 0)
            fd = os.memfd_create(f"atoll-bench-{role.text}", os.MFD_CLOEXEC)
            os.posix_fallocate(fd, 0, size)
            eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # all domains are woken by one
            self.eventfds.append(eventfd)
            with mmap.mmap(fd, size) as memory, memoryview(memory) as view:
                at = ffi.from_buffer(view)
                lib.atoll_arena_format(at, role, 1, size, mask, counts, 0, 0, lib.ATOLL_WAKE_EVENTFD, eventfd)
                ffi.release(at)
            self.sizes[role], self.fds[role] = size, fd

    def open(self, own: Role) -> Any:
        """This process becomes the active one of `own`: its arena writable, the others read-only."""
        sizes = ffi.new("uint64_t[16]")
        for role, size in self.sizes.items():
            sizes[role] = size
            fd = self.fds[role] if role == own else os.open(f"/proc/self/fd/{self.fds[role]}", os.O_RDONLY)
            physmap.map_arena(role, fd, size, writable=role == own)
            physmap.populate(role)
        domain, error = ffi.new("struct atoll_domain *"), ffi.new("char[256]")
        if lib.atoll_domain_open(domain, own, self.incarnation, os.getpid(), 0, sizes, error) < 0:
            raise BenchError(ffi.string(error).decode())
        return domain

    def close(self) -> None:
        for fd in (*self.fds.values(), *self.eventfds):
            os.close(fd)


class Shared:
    """Memory of both processes: the result, the cache lines, the word on which they meet."""

    def __init__(self) -> None:
        self.result_bytes = ffi.sizeof("struct bench_result")
        self.memory = mmap.mmap(-1, self.result_bytes + 8192)
        self.base = ffi.from_buffer(self.memory)
        self.result = ffi.cast("struct bench_result *", self.base)
        self.lines = ffi.cast("struct bench_lines *", self.base + self.result_bytes + 4096 - self.result_bytes % 4096)
        self.arrived = ffi.cast("uint32_t *", self.base + self.result_bytes)

    def clear(self) -> None:
        ffi.memmove(self.base, bytes(32), 32)
        ffi.memmove(self.lines, bytes(256), 256)
        self.arrived[0] = 0


class Dpdk:
    """DPDK's ring, compiled where libdpdk is installed; two of them in memory that both processes share."""

    DECLARATIONS = """
        int64_t rte_bench_bytes(uint32_t entries);
        int rte_bench_make(void *memory, uint32_t entries);
        void rte_bench_produce(void *ring, uint32_t batch, uint64_t duration_ns);
        void rte_bench_consume(void *ring, uint32_t batch, void *result);
        void rte_bench_ask(void *there, void *back, uint64_t duration_ns, void *result);
        void rte_bench_answer(void *there, void *back);
    """

    def __init__(self) -> None:
        """Raises compiled.Missing."""
        own = FFI()
        own.cdef(self.DECLARATIONS)
        with tempfile.TemporaryDirectory(prefix="atoll-bench-") as folder:
            path = compiled.library("rte_ring", Path(folder), "libdpdk", ("rte_ring", "rte_eal"))
            self.lib = cast(Any, own.dlopen(str(path)))
        size = (self.lib.rte_bench_bytes(ENTRIES) + 4095) // 4096 * 4096
        self.memories = [mmap.mmap(-1, size) for _ in range(2)]
        self.rings = [own.from_buffer(memory) for memory in self.memories]

    def make(self) -> None:
        for ring in self.rings:
            checked(self.lib.rte_bench_make(ring, ENTRIES))

    def ends(self, case: Case, shared: Shared, duration_ns: int) -> list[Callable[[], None]]:
        self.make()
        there, back = self.rings
        at = shared.base
        if case.kind == "throughput":
            return [
                lambda: self.lib.rte_bench_produce(there, case.batch, duration_ns),
                lambda: self.lib.rte_bench_consume(there, case.batch, at),
            ]
        return [
            lambda: self.lib.rte_bench_ask(there, back, duration_ns, at),
            lambda: self.lib.rte_bench_answer(there, back),
        ]


def dpdk_or_none() -> Dpdk | None:
    try:
        return Dpdk()
    except compiled.Missing:
        return None


def checked(result: int) -> None:
    if result < 0:
        raise BenchError(os.strerror(-result))


@contextlib.contextmanager
def ends(
    case: Case, arenas: Arenas, shared: Shared, duration_ns: int, dpdk: Dpdk | None = None
) -> Iterator[list[Callable[[], None]]]:
    """What the two processes of a measurement do: the asking or producing end first."""
    result, batch = shared.result, case.batch
    produces = case.kind == "throughput"
    if case.transport == LINE:
        yield [
            lambda: lib.bench_line_ask(shared.lines, duration_ns, result),
            lambda: lib.bench_line_answer(shared.lines),
        ]
    elif case.transport == RING:
        wait = lib.BENCH_SPIN if case.waiting == "spinning" else lib.BENCH_SLEEP
        arenas.incarnation += 1

        if case.kind == "path":
            far, near = (BETWEEN, BETWEEN) if case.between else (ANSWERER, ASKER)
            yield [
                lambda: lib.bench_path_ask(served(arenas, ASKER), far, batch, duration_ns, result),
                lambda: lib.bench_path_reply(served(arenas, ANSWERER), near),
                *[lambda: lib.bench_path_pass(served(arenas, BETWEEN, row="nic"), ASKER, ANSWERER)] * case.between,
            ]
            return

        def first(domain: Any) -> None:
            if produces:
                lib.bench_ring_produce(domain, ANSWERER, batch, wait, duration_ns)
            else:
                lib.bench_ring_ask(domain, ANSWERER, wait, duration_ns, result)

        def second(domain: Any) -> None:
            if produces:
                lib.bench_ring_consume(domain, ASKER, batch, wait, result)
            else:
                lib.bench_ring_answer(domain, ASKER, wait)

        yield [lambda: first(arenas.open(ASKER)), lambda: second(arenas.open(ANSWERER))]
    elif case.transport == DPDK:
        assert dpdk is not None
        yield dpdk.ends(case, shared, duration_ns)
    elif case.transport == PYTHON:
        with python_ends(produces, shared, duration_ns) as functions:
            yield functions
    else:
        with descriptors(case.transport) as (there, back):
            kind = lib.BENCH_QUEUE if case.transport == QUEUE else lib.BENCH_STREAM
            if produces:
                yield [
                    lambda: checked(lib.bench_fd_produce(there[1], kind, batch, duration_ns)),
                    lambda: checked(lib.bench_fd_consume(there[0], kind, batch, result)),
                ]
            else:
                yield [
                    lambda: checked(lib.bench_fd_ask(there[1], back[0], kind, duration_ns, result)),
                    lambda: checked(lib.bench_fd_answer(back[1], there[0], kind)),
                ]


def served(arenas: Arenas, own: Role, row: str = "nbd") -> Any:
    """As `Arenas.open`, and it waits and is scheduled as the domain of that row of the kernel's table: nic's for who is
    between others, since a request and its answer pass both of them."""
    domain = arenas.open(own)
    lib.atoll_domain_set_spin(domain, Kernel().spin_us * 1000)
    process.be_ordinary(own_slice_ns=table.ROLES[row].slice_ns(process.slice_ns(0)))
    return domain


@contextlib.contextmanager
def descriptors(transport: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Two ways, each (read end, write end)."""
    with contextlib.ExitStack() as stack:
        if transport == SOCKET:
            left, right = socket.socketpair()
            stack.enter_context(left)
            stack.enter_context(right)
            yield (right.fileno(), left.fileno()), (left.fileno(), right.fileno())
        elif transport == PIPE:
            ways = []
            for _ in range(2):
                way = os.pipe()
                ways.append(way)
                for fd in way:
                    stack.callback(os.close, fd)
            yield ways[0], ways[1]
        else:
            queues = []
            for _ in range(2):
                queue = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, max_message_size=lib.BENCH_MESSAGE_BYTES)
                queue.unlink()
                stack.callback(queue.close)
                queues.append((queue.mqd, queue.mqd))
            yield queues[0], queues[1]


@contextlib.contextmanager
def python_ends(produces: bool, shared: Shared, duration_ns: int) -> Iterator[list[Callable[[], None]]]:
    context = multiprocessing.get_context("fork")
    there, back = context.Queue(), context.Queue()
    payload = bytes(lib.BENCH_MESSAGE_BYTES - 8)

    def produce() -> None:
        end, number = time.monotonic_ns() + duration_ns, 0
        while time.monotonic_ns() < end:
            for _ in range(16):
                there.put(number.to_bytes(8, "little") + payload)
                number += 1
        there.put(None)
        there.close()
        there.join_thread()

    def consume() -> None:
        message, begin, count = there.get(), time.monotonic_ns(), 0
        while message is not None:
            shared.result.wrong += int.from_bytes(message[:8], "little") != count
            count += 1
            message = there.get()
        shared.result.ns, shared.result.count = time.monotonic_ns() - begin, count

    def ask() -> None:
        result, begin = shared.result, time.monotonic_ns()
        now, number = begin, 0
        while now - begin < duration_ns:
            there.put(number.to_bytes(8, "little") + payload)
            result.wrong += int.from_bytes(back.get()[:8], "little") != number
            then, now = now, time.monotonic_ns()
            if number < lib.BENCH_SAMPLES:
                result.samples_ns[number] = now - then
                result.sample_count = number + 1
            number += 1
        result.count, result.ns = number, now - begin
        there.put(None)
        there.close()
        there.join_thread()

    def answer() -> None:
        while (message := there.get()) is not None:
            back.put(message)
        back.close()
        back.join_thread()

    yield [produce, consume] if produces else [ask, answer]
    for queue in (there, back):
        queue.close()


def measure(
    case: Case, arenas: Arenas, shared: Shared, cpus: list[int], duration_s: float, dpdk: Dpdk | None = None
) -> dict[str, float]:
    """One measurement: {"messages_per_s"} or {"p50_ns", "p99_ns", "middle_ns"}."""
    shared.clear()
    with ends(case, arenas, shared, round(duration_s * 1e9), dpdk) as functions:
        pids = []
        try:
            for index, function in enumerate(functions):
                cpu = cpus[0] if case.placement == SAME or index == 0 else cpus[1]
                with uninterrupted():  # or a child that nobody knows of would go on
                    pids.append(child(function, shared, cpu, len(functions)))
            wait_for(pids, case, duration_s * 20 + 30)
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    result = shared.result
    if result.wrong or not result.count:
        raise BenchError(f"{case}: {result.count} messages, {result.wrong} of them wrong")
    if case.kind in ("throughput", "path"):
        return {"messages_per_s": result.count / (result.ns / 1e9)}
    samples = sorted(ffi.unpack(result.samples_ns, int(result.sample_count)))
    return {
        "p50_ns": float(samples[len(samples) // 2]),
        "p99_ns": float(samples[len(samples) * 99 // 100]),
        # Of the middle half: a clock may count in steps of 10 ns, which is much of a median of 100.
        "middle_ns": statistics.fmean(samples[len(samples) // 4 : max(len(samples) * 3 // 4, len(samples) // 4 + 1)]),
    }


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C comes at the end of the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def child(function: Callable[[], None], shared: Shared, cpu: int, ends: int = 2) -> int:
    """The caller has SIGINT blocked: it ends the child without a word, and the parent in its own way."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        process.die_with_parent(parent)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.sched_setaffinity(0, {cpu})
        lib.bench_meet(shared.arrived, ends)
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait_for(pids: list[int], case: Case, seconds: float) -> None:
    """Until both have ended well; they are left for the caller to reap."""
    end, left = time.monotonic() + seconds, list(pids)
    while left:
        for pid in list(left):
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is None:
                continue
            if ended.si_status != 0:
                raise BenchError(f"{case}: a process ended with {ended.si_status}")
            left.remove(pid)
        if left and time.monotonic() > end:
            raise BenchError(f"{case}: not done after {seconds:.0f} s")
        time.sleep(0.001)


# --- All of them ----------------------------------------------------------------------------------------------------


def run(seconds: float, plot: str | None = None) -> dict[str, Any]:
    """Measures for about `seconds`. BenchError if a message was lost or a process failed."""
    cpus = sorted(os.sched_getaffinity(0))
    dpdk = dpdk_or_none() if len(cpus) > 1 else None
    todo = cases(len(cpus), dpdk is not None)
    # Many short rounds: what is compared must meet the same state of the machine, which changes between seconds.
    rounds = 9 if seconds >= 20 else 5 if seconds >= 10 else 3 if seconds >= 3 else 1
    duration_s = max(0.002, seconds / (len(todo) * rounds) - 0.012)  # making the processes takes some of it
    arenas, shared = Arenas(), Shared()
    found: dict[Case, list[dict[str, float]]] = {case: [] for case in todo}
    try:
        for number in range(rounds):
            start = number * len(todo) // rounds  # each round begins elsewhere
            for case in todo[start:] + todo[:start]:
                found[case].append(measure(case, arenas, shared, cpus, duration_s, dpdk))
    finally:
        arenas.close()
    document = {
        "message_bytes": int(lib.BENCH_MESSAGE_BYTES),
        "cpus": len(cpus),
        "seconds": seconds,
        "rounds": rounds,
        "clock_ns": round(lib.bench_clock_ns(), 1),
        "throughput": [throughput_row(case, found) for case in todo if case.kind == "throughput"],
        "round_trip": [round_trip_row(case, found) for case in todo if case.kind == "round trip"],
        "path": [path_row(case, found) for case in todo if case.kind == "path" and case.between],
    }
    if plot is not None:
        draw(document, plot)
    return document


Found = dict[Case, list[dict[str, float]]]


def ratio(case: Case, reference: Case | None, found: Found, key: str) -> float | None:
    """Median over the rounds of case / reference; None where there is no such case (one core)."""
    if reference is None or reference not in found:
        return None
    return statistics.median(mine[key] / other[key] for mine, other in zip(found[case], found[reference], strict=True))


def row(case: Case) -> dict[str, Any]:
    return {"transport": case.transport, "placement": case.placement, "waiting": case.waiting}


def throughput_row(case: Case, found: Found) -> dict[str, Any]:
    rates = [measured["messages_per_s"] for measured in found[case]]
    waiting = "spinning" if case.placement == TWO else "sleeping"
    reference = Case("throughput", RING, case.placement, waiting, case.batch)
    return {
        **row(case),
        "batch": case.batch,
        "messages_per_s": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "ratio_to_ring": ratio(case, reference, found, "messages_per_s"),
    }


def round_trip_row(case: Case, found: Found) -> dict[str, Any]:
    waiting = "sleeping" if case.transport not in (LINE, DPDK) else "spinning"
    return {
        **row(case),
        "p50_ns": statistics.median(measured["p50_ns"] for measured in found[case]),
        "p99_ns": statistics.median(measured["p99_ns"] for measured in found[case]),
        "ratio_to_ring": ratio(case, Case("round trip", RING, case.placement, waiting), found, "middle_ns"),
        "ratio_to_line": ratio(case, Case("round trip", LINE, TWO, "spinning"), found, "middle_ns"),
    }


def path_row(case: Case, found: Found) -> dict[str, Any]:
    """What one more domain between two others costs each request; median, over the rounds, of the difference."""
    without = found[replace(case, between=0)]
    rates = list(
        zip((one["messages_per_s"] for one in without), (one["messages_per_s"] for one in found[case]), strict=True)
    )
    return {
        **row(case),
        "depth": case.batch,
        "without_per_s": statistics.median(one for one, _ in rates),
        "with_per_s": statistics.median(other for _, other in rates),
        "added_us": statistics.median(1e6 / other - 1e6 / one for one, other in rates),
    }


# --- To be looked at ------------------------------------------------------------------------------------------------


def render(document: dict[str, Any]) -> RenderableType:
    rates = Table(title=f"Throughput, messages of {document['message_bytes']} bytes", title_justify="left")
    for name in ("transport", "placement", "waiting"):
        rates.add_column(name)
    for name in ("batch", "million/s", "lowest", "highest", "of the ring's"):
        rates.add_column(name, justify="right")
    for entry in document["throughput"]:
        rates.add_row(
            entry["transport"],
            entry["placement"],
            entry["waiting"],
            str(entry["batch"]),
            *(f"{entry[key] / 1e6:.3f}" for key in ("messages_per_s", "lowest", "highest")),
            times(entry["ratio_to_ring"], entry["transport"] == RING),
        )
    trips = Table(title="Round trips, one message at a time", title_justify="left")
    for name in ("transport", "placement", "waiting"):
        trips.add_column(name)
    for name in ("p50 µs", "p99 µs", "of the ring's, asleep", "of a cache line's"):
        trips.add_column(name, justify="right")
    for entry in document["round_trip"]:
        itself = entry["transport"] == RING and entry["waiting"] == "sleeping"
        trips.add_row(
            entry["transport"],
            entry["placement"],
            entry["waiting"],
            f"{entry['p50_ns'] / 1e3:.2f}",
            f"{entry['p99_ns'] / 1e3:.2f}",
            "" if entry["transport"] == LINE else times(entry["ratio_to_ring"], itself),
            times(entry["ratio_to_line"], entry["transport"] == LINE),
        )
    paths = Table(title="One more domain between two, which wait as the server's do", title_justify="left")
    paths.add_column("placement")
    for name in ("depth", "thousand/s without", "with", "added µs per request"):
        paths.add_column(name, justify="right")
    for entry in document["path"]:
        paths.add_row(
            entry["placement"],
            str(entry["depth"]),
            *(f"{entry[key] / 1e3:,.0f}" for key in ("without_per_s", "with_per_s")),
            f"{entry['added_us']:.2f}",
        )
    note = (
        f"{document['rounds']} interleaved rounds on {document['cpus']} processors; a round trip includes one reading"
        f" of the clock ({document['clock_ns']} ns). A cache line going there and back is the machine's own limit."
    )
    return Group(rates, trips, paths, note)


def times(value: float | None, itself: bool) -> str:
    return "" if value is None or itself else f"{value:.3g} ×"


def draw(document: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 7), layout="constrained")
    colours = {SAME: "tab:blue", TWO: "tab:orange"}
    entries = document["throughput"][::-1]
    left.barh(
        [f"{entry['transport']}, batch {entry['batch']}, {entry['placement']}" for entry in entries],
        [entry["messages_per_s"] for entry in entries],
        color=[colours[entry["placement"]] for entry in entries],
    )
    left.set(xscale="log", xlabel="messages per second", title="Throughput, 64-byte messages")
    entries = document["round_trip"][::-1]
    names = [f"{entry['transport']}, {entry['waiting']}, {entry['placement']}" for entry in entries]
    right.barh(names, [entry["p99_ns"] / 1e3 for entry in entries], color="lightgray", label="p99")
    right.barh(
        names,
        [entry["p50_ns"] / 1e3 for entry in entries],
        height=0.5,
        color=[colours[entry["placement"]] for entry in entries],
        label="p50",
    )
    right.set(xscale="log", xlabel="µs, there and back: p50 (grey: p99)", title="Round trips")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
