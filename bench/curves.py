"""How the cost of a request grows with depth, connections, size of the volume and stored data; and where its time goes.

- `run(folder, seconds)`     the document: one curve each, points {x, read: {...}, write: {...}}
- `breakdown(folder, ...)`   medians, over many traced requests, of the time between a request's hops

All on Atoll as installed, requests of 4 KiB: reads of data in memory, writes half of which are near duplicates. For
depth and connections nbdkit's memory plugin is measured beside it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from atoll.bench import clients
from atoll.bench.clients import Load
from atoll.bench.peers import GIB, KIB, Atoll, BenchError, Nbdkit
from atoll.bench.system import client_command
from atoll.bench.works import FAR_OFFSET, WRITE_OFFSET, Sizes, in_memory
from atoll.kernel import cli_trace
from atoll.kernel.client import Client

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
CONNECTIONS = (1, 4, 16, 64, 256)
VOLUMES_GIB = (1, 16, 256, 4096, 65536)
STORED_GIB = (0, 1, 2, 4)
WRITTEN_BYTES = 256 << 20  # where random writes go

READ = Load("read", 4 * KIB, 32, 0, Sizes.memory)
WRITE = Load("write", 4 * KIB, 32, WRITE_OFFSET, WRITTEN_BYTES, client="nbdload", contents="near")
MANY = Load("mixed", 4 * KIB, 4, 0, Sizes.memory)

Point = dict[str, Any]


def measured(server: Any, load: Load, folder: Path, seconds: float) -> dict[str, float]:
    sample = clients.run(load, server, None, folder, seconds, seed=1)
    if load.op != "read":
        clients.flush(server.uri, folder)
    return {"rate": sample.rate, "p50_us": sample.p50_ns / 1e3, "p99_us": sample.p99_ns / 1e3, "cpu_us": sample.cpu_us}


def prepared(server: Any, folder: Path) -> None:
    clients.fill(server.uri, folder, WRITE_OFFSET, WRITTEN_BYTES)
    in_memory(server, folder)


def beside_nbdkit(folder: Path, xs: Sequence[int], loads: Callable[[int], list[Load]], seconds: float) -> list[Point]:
    points: list[Point] = [{"x": x, "atoll": {}, "nbdkit": {}} for x in xs]
    with Atoll(folder) as ours, Nbdkit(folder) as theirs:
        for server in (ours, theirs):
            prepared(server, folder)
        for point in points:
            for server in (ours, theirs):
                for load in loads(point["x"]):
                    point[server.name][load.op] = measured(server, load, folder, seconds)
    return points


def by_depth(folder: Path, seconds: float) -> list[Point]:
    return beside_nbdkit(
        folder / "depth", DEPTHS, lambda depth: [replace(load, depth=depth) for load in (READ, WRITE)], seconds
    )


def by_connections(folder: Path, seconds: float) -> list[Point]:
    return beside_nbdkit(folder / "connections", CONNECTIONS, lambda count: [replace(MANY, connections=count)], seconds)


def by_volume_size(folder: Path, seconds: float) -> list[Point]:
    """Thin volumes: as much is written, at the end of a longer and longer block map."""
    points: list[Point] = []
    for size in VOLUMES_GIB:
        with Atoll(folder / "volume", options=["--volume", f"disk={size}GiB"]) as server:
            in_memory(server, folder)
            at_end = replace(WRITE, offset=size * GIB - WRITTEN_BYTES)
            points.append({"x": size, "atoll": {
                "read": measured(server, READ, folder, seconds),
                "write": measured(server, at_end, folder, seconds),
            }})  # fmt: skip
    return points


def by_stored_data(folder: Path, seconds: float) -> list[Point]:
    points: list[Point] = []
    with Atoll(folder / "stored", options=["--device-size", "12GiB"]) as server:
        prepared(server, folder)
        have = 0
        for size in STORED_GIB:
            if size > have:
                clients.fill(server.uri, folder, FAR_OFFSET + have * GIB, (size - have) * GIB)
                have = size
                in_memory(server, folder)
            points.append({"x": size, "atoll": {
                "read": measured(server, READ, folder, seconds),
                "write": measured(server, WRITE, folder, seconds),
            }})  # fmt: skip
    return points


# --- Where the time of one request goes -------------------------------------------------------------------------------


def breakdown(folder: Path, seconds: float) -> dict[str, Any]:
    """Of reads and of writes, at depth 1: the hops between domains, each with the median time since the last one; at
    depth 32: the processor time of each domain per request. (While a trace is armed neither nic nor nbd answers by
    itself.)"""
    found: dict[str, Any] = {}
    with Atoll(folder / "stages") as server:
        prepared(server, folder)
        for load in (replace(READ, client="nbdload"), WRITE):
            sample, hops = traced(server, replace(load, depth=1), folder, seconds)
            inside = sum(hop["us"] for hop in hops)
            found[load.op] = {
                "p50_us": sample["p50_ns"] / 1e3,
                "hops": hops,
                "outside_us": sample["p50_ns"] / 1e3 - inside,  # client, socket, operating system
                "cpu_us": cpu_by_domain(server, load, folder, seconds),
            }
            clients.flush(server.uri, folder)
    return found


def traced(server: Atoll, load: Load, folder: Path, seconds: float) -> tuple[dict[str, Any], list[Point]]:
    """The client's figures, and the commonest sequence of hops of a request among those recorded meanwhile."""
    sequences: dict[tuple[tuple[str, str, str], ...], list[list[int]]] = {}
    with Client(server.data) as control:
        armed = control.call("trace", action="arm")  # until the client has ended: its figures are of traced requests
        runner = subprocess.Popen(
            client_command(load, server, folder, seconds + 1), stdout=subprocess.PIPE, text=True, cwd=folder
        )
        deadline = time.monotonic() + seconds
        time.sleep(0.5)
        while time.monotonic() < deadline:
            armed = control.call("trace", action="arm")  # anew: what is collected is from here on
            time.sleep(0.002)  # the domains keep their last few thousand messages
            messages, _ = cli_trace.collect(control)
            for path in paths(messages):
                key = tuple((m.domain, "from" if m.received else "to", m.peer) for m in path)
                sequences.setdefault(key, []).append([m.time_ns for m in path])
        out, _ = runner.communicate(timeout=clients.PATIENCE_S)
        control.call("trace", action="disarm", trace=armed["trace"])
    if runner.returncode != 0 or not sequences:
        raise BenchError(f"no request could be followed: the client ended with {runner.returncode}")
    commonest, times = max(sequences.items(), key=lambda entry: len(entry[1]))
    hops = []
    for at, (domain, direction, peer) in enumerate(commonest[1:], start=1):
        us = statistics.median((each[at] - each[at - 1]) / 1e3 for each in times)
        hops.append({"domain": domain, "what": f"{direction} {peer}", "us": us, "requests": len(times)})
    return json.loads(out), hops


def paths(messages: list[cli_trace.Message]) -> list[list[cli_trace.Message]]:
    """The messages of each request that is there from nic's sending it on to nic's receiving the last reply."""
    by_identity: dict[int, list[cli_trace.Message]] = {}
    for message in sorted(messages, key=lambda m: m.time_ns):
        if not {message.domain, message.peer} & set(cli_trace.STORAGE):
            by_identity.setdefault(message.identity, []).append(message)
    found = []
    for path in by_identity.values():
        ordered = cli_trace.causal(path)
        first, last = ordered[0], ordered[-1]
        begun = first.domain == "nic" and not first.received and first.opcode == cli_trace.REQUEST
        if begun and last.domain == "nic" and last.opcode == cli_trace.REPLY and last.received:
            found.append(ordered)
    return found


def cpu_by_domain(server: Atoll, load: Load, folder: Path, seconds: float) -> dict[str, float]:
    with Client(server.data) as control:
        rows = {entry["role"]: psutil.Process(entry["pid"]) for entry in control.call("ps")["domains"]}
    before = {role: process.cpu_times() for role, process in rows.items()}
    sample = clients.run(load, server, None, folder, seconds, seed=2)
    used = {}
    for role, process in rows.items():
        now = process.cpu_times()
        used[role] = (now.user + now.system - before[role].user - before[role].system) / sample.requests * 1e6
    return used


def run(folder: Path, seconds: float) -> dict[str, list[Point]]:
    curves: dict[str, Callable[[Path, float], list[Point]]] = {
        "depth": by_depth,
        "connections": by_connections,
        "volume": by_volume_size,
        "stored": by_stored_data,
    }
    return {name: curve(folder, seconds) for name, curve in curves.items()}
