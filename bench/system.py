"""What of the goals has no peer: an idle server, system calls at steady load, the rings, one more domain in the path.

- `run(folder, seconds)`   the document; each goal is a row {title, value, text, goal, met}

System calls are counted by `perf trace`, which does not stop a process at each call as strace would: a server that is
traced so batches differently. Where perf is missing or not permitted, that row says so and is not met.

A *wake cycle* of a domain is one wait for messages: a sleep, or a turn that it gives to the others on its processor
while it spins (ipc/spin.h). What else it may call is the waking of a peer.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.bench import clients, ring
from atoll.bench.clients import Load
from atoll.bench.peers import KIB, Atoll, BenchError, need
from atoll.bench.works import WRITE_OFFSET, Sizes, in_memory, overwritten
from atoll.kernel.client import Client

DOMAINS = ("nic", "nbd", "dedup", "disk")
WAITS = frozenset({"epoll_wait", "epoll_pwait", "epoll_pwait2", "futex_waitv", "futex_wait", "sched_yield"})
WAKES = frozenset({"write", "futex"})  # of an eventfd; of a futex word
TRACED_S = 1.0
SETTLE_S = 2.0

Row = dict[str, Any]


def row(title: str, value: float | None, text: str, goal: str, met: bool) -> Row:
    return {"title": title, "value": value, "text": text, "goal": goal, "met": met}


# --- Idle -----------------------------------------------------------------------------------------------------------


def running_ns(server: Atoll) -> int:
    """Time on a processor so far of all threads of all its processes, to the nanosecond."""
    total = 0
    for process in server.processes():
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0])
    return total


def idle(folder: Path, seconds: float) -> Row:
    with Atoll(folder / "idle") as server:
        time.sleep(SETTLE_S)  # standbys are made, the device is at rest
        before, begin = running_ns(server), time.monotonic()
        time.sleep(seconds)
        share = (running_ns(server) - before) / 1e9 / (time.monotonic() - begin)
        count = len(server.processes())
    text = f"{share:.2%} of a processor, {count} processes, over {seconds:g} s"
    return row("idle server", share, text, "< 0.5 %", share < 0.005)


# --- System calls ---------------------------------------------------------------------------------------------------

CALL = re.compile(r"^\s+([a-z_0-9]+)\s+(\d+)\s+\d+\s+[\d.]+", re.MULTILINE)


def traced(pid: int, seconds: float) -> dict[str, int]:
    """Calls of a process by name, counted for a while. BenchError where that is not permitted."""
    command = [need("perf"), "trace", "--summary", "--pid", str(pid), "--", "sleep", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(f"perf trace: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    return {name: int(count) for name, count in CALL.findall(done.stdout + done.stderr)}


def system_calls(folder: Path, load: Load, prepare: Any, what: str) -> list[Row]:
    """Under one steady load: which calls each domain makes, for each request and each wait."""
    here = folder / "calls"
    with Atoll(here) as server:
        prepare(server, folder)
        with Client(server.data) as control:
            pids = {entry["role"]: entry["pid"] for entry in control.call("ps")["domains"]}
        calls, requests = {}, {}
        for domain in DOMAINS:  # one after the other: each is observed alone
            runner = subprocess.Popen(
                client_command(load, server, folder, TRACED_S * 3), stdout=subprocess.PIPE, text=True, cwd=folder
            )
            try:
                time.sleep(TRACED_S)
                before, begin = requests_done(server), time.monotonic()
                calls[domain] = traced(pids[domain], TRACED_S)
                after, took = requests_done(server), time.monotonic() - begin
                requests[domain] = (after - before) * TRACED_S / took
            finally:
                runner.communicate(timeout=clients.PATIENCE_S)
            clients.flush(server.uri, folder)
    return [judge_calls(domain, what, calls[domain], requests[domain]) for domain in DOMAINS]


def client_command(load: Load, server: Atoll, folder: Path, seconds: float) -> list[str]:
    steps = clients.plan(load, seconds, seed=1)
    file = folder / "plan"
    steps.tofile(file)
    return [
        clients.nbdload(folder), f"uri={server.uri}", f"op={load.op}", f"plan={file}", f"pool={clients.pool(folder)}",
        f"block={load.block}", f"depth={load.depth}", f"seconds={seconds}",
    ]  # fmt: skip


def requests_done(server: Atoll) -> int:
    counters = server.status()["counters"]["nic"]
    return int(counters["requests"])


def judge_calls(domain: str, what: str, calls: dict[str, int], requests: float) -> Row:
    waits = sum(count for name, count in calls.items() if name in WAITS)
    total = sum(calls.values())
    others = sorted(set(calls) - WAITS - WAKES)
    listed = ", ".join(f"{name} {count / requests:.3f}" for name, count in sorted(calls.items())) or "none at all"
    text = f"{listed} a request"
    if waits:
        text += f"; {total / waits:.2f} calls a wait"
    title = f"system calls of {domain}, {what}"
    if domain in ("nbd", "dedup"):
        met = not others and total <= 2 * waits
        return row(title, total / requests, text, "only sleep and wake, ≤ 2 a cycle", met)
    moving = calls.get("io_uring_enter", 0)
    batch = requests / moving if moving else float("inf")
    text += f"; {batch:.1f} requests each io_uring_enter" if moving else ""
    return row(title, total / requests, text, "batches of more than one", batch > 1)


# --- Rings ----------------------------------------------------------------------------------------------------------


def rings(seconds: float) -> tuple[list[Row], dict[str, Any]]:
    document = ring.run(seconds)
    if document["cpus"] < 2:
        raise BenchError("the rings' goals need two processors")
    trip = next(
        entry for entry in document["round_trip"] if entry["transport"] == ring.RING and entry["waiting"] == "spinning"
    )
    text = f"{trip['ratio_to_line']:.2f} × a bare cache line's, {trip['p50_ns'] / 1e3:.2f} µs"
    found = [row("ring, spinning round trip", trip["ratio_to_line"], text, "≤ 1.3 ×", trip["ratio_to_line"] <= 1.3)]
    batched = [entry for entry in document["throughput"] if entry["placement"] == ring.TWO and entry["batch"] == 32]
    own = next(entry for entry in batched if entry["transport"] == ring.RING)
    # Those that have no batches are compared with the best that they can.
    others = batched + [
        entry for entry in document["throughput"] if entry["placement"] == ring.TWO and entry["batch"] == 1
    ]
    for entry in others:
        if entry["transport"] == ring.RING or (entry["batch"] == 1 and is_batched(entry["transport"], batched)):
            continue
        ratio = own["messages_per_s"] / entry["messages_per_s"] if entry["batch"] == 1 else 1 / entry["ratio_to_ring"]
        ours, theirs = own["messages_per_s"] / 1e6, entry["messages_per_s"] / 1e6
        text = f"{ours:.1f} M/s, {theirs:.2f} there; {ratio:.2f} × (median of the rounds)"
        found.append(row(f"ring, batches of 32, beside {entry['transport']}", ratio, text, "> 1 ×", ratio > 1))
    if not any(entry["transport"] == ring.DPDK for entry in batched):
        found.append(row("ring, batches of 32, beside DPDK's", None, "libdpdk is not installed", "> 1 ×", False))
    hop = next(entry for entry in document["path"] if entry["placement"] == ring.SAME and entry["depth"] == 32)
    text = f"{hop['added_us']:.2f} µs a request at depth 32, all on one core"
    found.append(row("one more domain in the path", hop["added_us"], text, "≤ 0.3 µs", hop["added_us"] <= 0.3))
    return found, document


def is_batched(transport: str, batched: Sequence[dict[str, Any]]) -> bool:
    return any(entry["transport"] == transport for entry in batched)


def run(folder: Path, idle_s: float, ring_s: float) -> dict[str, Any]:
    found = [idle(folder, idle_s)]
    reads = Load("read", 4 * KIB, 32, 0, Sizes.memory, client="nbdload")
    writes = Load("write", 4 * KIB, 32, WRITE_OFFSET, Sizes.write, client="nbdload", contents="near")
    try:
        found += system_calls(folder, reads, in_memory, "4 KiB reads in memory, depth 32")
        found += system_calls(folder, writes, overwritten(writes), "4 KiB writes, depth 32")
    except BenchError as error:
        found.append(row("system calls", None, str(error), "only sleep and wake, ≤ 2 a cycle", False))
    more, document = rings(ring_s)
    return {"rows": found + more, "ring": document}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="bench-", dir="build" if Path("build").is_dir() else ".") as name:
        for each in run(Path(name).absolute(), 10.0, 20.0)["rows"]:
            print(f"{'met  ' if each['met'] else 'SHORT'} {each['title']}: {each['text']} ({each['goal']})")
