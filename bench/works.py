"""What `make bench` measures: works, and the goals that each is judged by.

A work is one kind of load on Atoll and on a peer, in up to three settings. Its preparation is the same on both sides. A
goal compares one figure of a work (requests per second, p99, server processor time per request) with the peer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atoll.bench.clients import FAR_BYTES, Load, Sample, fill, fill_far, read_once
from atoll.bench.peers import GIB, KIB, MIB, Device, Nbdkit, QemuNbd

INSTALLED, SAME, OTHER = "as installed", "same core", "other core"
SETTINGS = (INSTALLED, SAME, OTHER)

# nic.buffer_bytes, 192 MiB by default: the write log's pages.
LOG_BYTES = 192 * MIB


@dataclass(frozen=True)
class Sizes:
    """Of the data that works use, bytes; smaller ones are for tests."""

    memory: int = 32 * MIB  # fits the read cache (disk.cache_bytes, 64 MiB) with room for what else is cached
    write: int = GIB  # where random writes go, WRITE_OFFSET on
    far: int = FAR_BYTES  # contents that far duplicates repeat, FAR_OFFSET on
    cold: int = 2 * GIB  # thirty times the read cache: three of a hundred reads may still hit it
    sustained: int = 10 * LOG_BYTES


WRITE_OFFSET, FAR_OFFSET = 1 * GIB, 2 * GIB

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


def in_memory(server: Any, folder: Path, size: int = Sizes.memory) -> None:
    fill(server.uri, folder, 0, size)
    read_once(server.uri, folder, 0, size)


def overwritten(load: Load) -> Prepare:
    """Writes meet blocks that exist, on both sides: no memory has to be found for them."""

    def prepare(server: Any, folder: Path) -> None:
        fill(server.uri, folder, load.offset, load.size)
        if load.contents == "far":
            fill_far(server.uri, folder, FAR_OFFSET, load.block, load.far_bytes)

    return prepare


def on_device(size: int) -> Prepare:
    def prepare(server: Any, folder: Path) -> None:
        if isinstance(server, Device):
            server.fill(size)
        else:
            fill(server.uri, folder, 0, size)

    return prepare


def every(least: float) -> dict[str, float]:
    return dict.fromkeys(SETTINGS, least)


def no_worse(title: str) -> Goal:
    return Goal(f"{title}, p99", "p99", every(1.0))


def works(sizes: Sizes | None = None) -> list[Work]:
    sizes = sizes or Sizes()

    def read(block: int, depth: int) -> Load:
        return Load("read", block, depth, 0, sizes.memory)

    def write(block: int, depth: int, contents: str, total: int = 0) -> Load:
        return Load(
            "write", block, depth, WRITE_OFFSET, sizes.write, client="nbdload", contents=contents, total_bytes=total,
            far_bytes=sizes.far,
        )  # fmt: skip

    def memory(server: Any, folder: Path) -> None:
        in_memory(server, folder, sizes.memory)

    read_1, read_32 = "4 KiB random read, depth 1, in memory", "4 KiB random read, depth 32, in memory"
    found = [
        Work(
            "read-1", read(4 * KIB, 1), Nbdkit, SETTINGS,
            (Goal(read_1, "rate", {INSTALLED: 3.0, SAME: 1.1, OTHER: 1.1}), no_worse(read_1)), memory,
        ),
        Work(
            "read-32", read(4 * KIB, 32), Nbdkit, SETTINGS,
            (Goal(read_32, "rate", every(1.5)), no_worse(read_32),
             Goal(f"{read_32}: server µs per request", "cpu", {INSTALLED: 0.7})), memory,
        ),
    ]  # fmt: skip
    for contents in ("near", "far"):
        load = write(4 * KIB, 1, contents)
        title = f"4 KiB random write, depth 1, half duplicates ({contents})"
        goals = (Goal(title, "rate", {INSTALLED: 2.5, SAME: 1.0, OTHER: 1.0}), no_worse(title))
        found.append(Work(f"write-1-{contents}", load, Nbdkit, SETTINGS, goals, overwritten(load)))
        load = write(4 * KIB, 32, contents, sizes.sustained)
        title = f"4 KiB random write, depth 32, half duplicates ({contents}), 10 × the log"
        goals = (Goal(title, "rate", every(1.0)), no_worse(title))
        found.append(Work(f"write-32-{contents}", load, Nbdkit, SETTINGS, goals, overwritten(load)))
        above_qemu = (Goal(title, "rate", {INSTALLED: 4.0}),)
        found.append(Work(f"qemu-32-{contents}", load, QemuNbd, (INSTALLED,), above_qemu, overwritten(load)))
    title = "256 KiB random read, depth 8, in memory"
    found.append(
        Work("read-256k", read(256 * KIB, 8), Nbdkit, (INSTALLED,), (Goal(title, "rate", {INSTALLED: 1.2}),), memory)
    )
    for contents in ("near", "far"):
        load = write(256 * KIB, 8, contents)
        title = f"256 KiB random write, depth 8, half duplicates ({contents})"
        large = (Goal(title, "rate", {INSTALLED: 1.0}),)
        found.append(Work(f"write-256k-{contents}", load, Nbdkit, (INSTALLED,), large, overwritten(load)))
    cold = Load("read", 4 * KIB, 32, 0, sizes.cold)
    title = "4 KiB random read, depth 32, from the device"
    found.append(
        Work("cold-32", cold, Device, (INSTALLED,), (Goal(title, "rate", {INSTALLED: 0.8}),), on_device(sizes.cold),
             restart=True)
    )  # fmt: skip
    theirs = Load("write", 256 * KIB, 8, 0, 8 * GIB, sequential=True, total_bytes=sizes.sustained, flush=True)
    title = "256 KiB write, depth 8, unique, 10 × the log and a flush"
    found.append(
        Work("unique-256k", replace(theirs, size=2 * GIB, client="nbdload"), Device, (INSTALLED,),
             (Goal(title, "rate", {INSTALLED: 0.7}),), peer_load=theirs)
    )  # fmt: skip
    found.append(
        Work("mixed-16", Load("mixed", 4 * KIB, 4, 0, sizes.memory, connections=16), Nbdkit, (INSTALLED,),
             (Goal("4 KiB 70/30, 16 connections of depth 4", "rate", {INSTALLED: 1.0}),), memory)
    )  # fmt: skip
    return found
