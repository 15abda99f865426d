"""What `make bench` measures: works, and the goals that each is judged by.

A work is one kind of load on Atoll and on a peer, in up to three settings. Its preparation is the same on both sides. A
goal compares one figure of a work (requests per second, p99, server processor time per request) with the peer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.bench.clients import Load, Sample, fill, fill_far, read_once
from atoll.bench.peers import GIB, KIB, MIB, Device, Nbdkit, QemuNbd

INSTALLED, SAME, OTHER = "as installed", "same core", "other core"
SETTINGS = (INSTALLED, SAME, OTHER)

# Fits Atoll's read cache (disk.cache_bytes, 64 MiB by default) with room for what else is cached.
MEMORY_BYTES = 32 * MIB
# nic.buffer_bytes, 192 MiB by default: the write log's pages. Sustained loads write ten times as much.
LOG_BYTES = 192 * MIB
SUSTAINED_BYTES = 10 * LOG_BYTES
# Random writes go here; contents that far duplicates repeat lie elsewhere.
WRITE_OFFSET, WRITE_BYTES, FAR_OFFSET = 1 * GIB, 1 * GIB, 2 * GIB
# Thirty times the read cache: three of a hundred reads may still hit it.
COLD_BYTES = 2 * GIB

Prepare = Callable[[Any, Path], None]


@dataclass(frozen=True)
class Goal:
    """`least`: by setting, the least ratio in Atoll's favour (rate: ours / theirs; p99, cpu: see `ratio`)."""

    title: str
    figure: str  # rate, p99, cpu
    least: dict[str, float]

    def value(self, sample: Sample) -> float:
        return {"rate": sample.rate, "p99": sample.p99_ns / 1e3, "cpu": sample.cpu_us}[self.figure]

    @property
    def higher_is_better(self) -> bool:
        return self.figure == "rate"

    def met(self, ratio: float, setting: str) -> bool:
        """`ratio` is Atoll's figure divided by the peer's."""
        return ratio >= self.least[setting] if self.higher_is_better else ratio <= self.least[setting]


@dataclass(frozen=True)
class Work:
    name: str
    load: Load
    peer: type[Any]
    settings: tuple[str, ...]
    goals: tuple[Goal, ...]
    prepare: Prepare = field(default=lambda server, folder: None)
    restart: bool = False  # Atoll starts again after the preparation, with nothing in memory
    peer_load: Load | None = None  # where the peer is given other work than Atoll: the device itself


def in_memory(server: Any, folder: Path) -> None:
    fill(server.uri, folder, 0, MEMORY_BYTES)
    read_once(server.uri, folder, 0, MEMORY_BYTES)


def overwritten(server: Any, folder: Path) -> None:
    """Writes meet blocks that exist, on both sides: no memory has to be found for them."""
    fill(server.uri, folder, WRITE_OFFSET, WRITE_BYTES)


def overwritten_far(block: int) -> Prepare:
    def prepare(server: Any, folder: Path) -> None:
        overwritten(server, folder)
        fill_far(server.uri, folder, FAR_OFFSET, block)

    return prepare


def on_device(server: Any, folder: Path) -> None:
    if isinstance(server, Device):
        server.fill(COLD_BYTES)
    else:
        fill(server.uri, folder, 0, COLD_BYTES)


def every(least: float) -> dict[str, float]:
    return dict.fromkeys(SETTINGS, least)


def no_worse(title: str) -> Goal:
    return Goal(f"{title}, p99", "p99", every(1.0))


def write(depth: int, contents: str, sustained: bool) -> Load:
    return Load(
        "write", 4 * KIB, depth, WRITE_OFFSET, WRITE_BYTES, client="nbdload", contents=contents,
        total_bytes=SUSTAINED_BYTES if sustained else 0,
    )  # fmt: skip


def large_write(contents: str) -> Load:
    return Load("write", 256 * KIB, 8, WRITE_OFFSET, WRITE_BYTES, client="nbdload", contents=contents)


def works() -> list[Work]:
    read_1, read_32 = "4 KiB random read, depth 1, in memory", "4 KiB random read, depth 32, in memory"
    found = [
        Work(
            "read-1", Load("read", 4 * KIB, 1, 0, MEMORY_BYTES), Nbdkit, SETTINGS,
            (Goal(read_1, "rate", {INSTALLED: 3.0, SAME: 1.1, OTHER: 1.1}), no_worse(read_1)), in_memory,
        ),
        Work(
            "read-32", Load("read", 4 * KIB, 32, 0, MEMORY_BYTES), Nbdkit, SETTINGS,
            (Goal(read_32, "rate", every(1.5)), no_worse(read_32),
             Goal(f"{read_32}: server µs per request", "cpu", {INSTALLED: 0.7})), in_memory,
        ),
    ]  # fmt: skip
    for contents in ("near", "far"):
        title = f"4 KiB random write, depth 1, half duplicates ({contents})"
        prepare = overwritten if contents == "near" else overwritten_far(4 * KIB)
        goals = (Goal(title, "rate", {INSTALLED: 2.5, SAME: 1.0, OTHER: 1.0}), no_worse(title))
        found.append(Work(f"write-1-{contents}", write(1, contents, False), Nbdkit, SETTINGS, goals, prepare))
        title = f"4 KiB random write, depth 32, half duplicates ({contents}), 10 × the log"
        goals = (Goal(title, "rate", every(1.0)), no_worse(title))
        found.append(Work(f"write-32-{contents}", write(32, contents, True), Nbdkit, SETTINGS, goals, prepare))
        above_qemu = (Goal(title, "rate", {INSTALLED: 4.0}),)
        found.append(Work(f"qemu-32-{contents}", write(32, contents, True), QemuNbd, (INSTALLED,), above_qemu, prepare))
    title = "256 KiB random read, depth 8, in memory"
    found.append(
        Work("read-256k", Load("read", 256 * KIB, 8, 0, MEMORY_BYTES), Nbdkit, (INSTALLED,),
             (Goal(title, "rate", {INSTALLED: 1.2}),), in_memory)
    )  # fmt: skip
    for contents in ("near", "far"):
        prepare = overwritten if contents == "near" else overwritten_far(256 * KIB)
        title = f"256 KiB random write, depth 8, half duplicates ({contents})"
        found.append(Work(f"write-256k-{contents}", large_write(contents), Nbdkit, (INSTALLED,),
                          (Goal(title, "rate", {INSTALLED: 1.0}),), prepare))  # fmt: skip
    cold = Load("read", 4 * KIB, 32, 0, COLD_BYTES)
    found.append(
        Work("cold-32", cold, Device, (INSTALLED,),
             (Goal("4 KiB random read, depth 32, from the device", "rate", {INSTALLED: 0.8}),), on_device, restart=True)
    )  # fmt: skip
    theirs = Load("write", 256 * KIB, 8, 0, 8 * GIB, sequential=True, total_bytes=SUSTAINED_BYTES, flush=True)
    sustained = Load(
        "write", 256 * KIB, 8, 0, 2 * GIB, sequential=True, client="nbdload", total_bytes=SUSTAINED_BYTES, flush=True
    )
    found.append(
        Work("unique-256k", sustained, Device, (INSTALLED,),
             (Goal("256 KiB write, depth 8, unique, 10 × the log", "rate", {INSTALLED: 0.7}),),
             peer_load=theirs)
    )  # fmt: skip
    found.append(
        Work("mixed-16", Load("mixed", 4 * KIB, 4, 0, MEMORY_BYTES, connections=16), Nbdkit, (INSTALLED,),
             (Goal("4 KiB 70/30, 16 connections of depth 4", "rate", {INSTALLED: 1.0}),), in_memory)
    )  # fmt: skip
    return found
