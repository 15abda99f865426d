"""`atoll bench dedup`: what sharing saves and what it costs those who read, by threshold, fingerprint cache, fast tier.

- `Options`, `run(options, say)`   a server of its own for each combination; the result is a document of plain values
- `render(document)`, `draw(document, path)`   are in dedup_show.py

For each combination a real server takes the workload's writes over NBD, destages all, and is asked how much it stores
and where each block lies. Then it is started anew, so that nothing is cached, and all is read back in the original
requests, one at a time: by address; and, after another start, in an order of chance. Every byte is compared. Where the
device was read is recorded by the driver (drivers/fault, which errs only by rule and has none here); how long a
spinning drive would have needed for that is computed (diskmodel.py) and called a model wherever it appears.

After a crash: the data directories lie in a temporary folder, which whoever runs this may remove.
"""

from __future__ import annotations

import itertools
import select
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.bench.diskmodel import Drive
from atoll.bench.duplicates import BLOCK
from atoll.bench.peers import BenchError, wait_for
from atoll.bench.server import Server, ServerError
from atoll.bench.workload import Place, Unshared, Workload
from atoll.drivers.fault.record import read_accesses
from atoll.ipc._ipc import lib
from atoll.kernel import chaos_nbd as nbd

__all__ = ["BenchError", "Cell", "MeasurementError", "Options", "ServerError", "measure", "run"]

VOLUME = "bench"
MAP_BLOCKS = 8192  # of one call
MAP_PBA = 1  # enum map_kind of services/dedup/store.h
RANDOM_READS = 4000  # of the second pass, at most
COPIES_S = 60.0  # for copies to the fast device, after the last write
# Metadata, and what overwritten blocks hold until their places are free again.
DEVICE_LEAST, DEVICE_PER_BLOCK = 256 << 20, 1.3


class MeasurementError(Exception):
    """What came back is not what was written, or a request failed."""


@dataclass(frozen=True)
class Options:
    workload: Workload
    thresholds: tuple[int, ...] = (1, 2, 4, 8)
    tiers: tuple[bool, ...] = (False, True)  # with a fast device?
    tier_threshold: int = 8  # references from which on a block goes there
    entries: tuple[int, ...] = ()  # of the fingerprint cache; none: all contents fit, and an eighth of them
    folder: Path | None = None  # for data directories; none: the system's temporary one
    depth: int = 16  # of the writing client
    read_cache_bytes: int = 64 << 20
    drive: Callable[[int], Drive] = field(default=Drive)


@dataclass(frozen=True)
class Cell:
    """One combination. `threshold` 0: nothing that is written is equal."""

    threshold: int
    entries: int
    tier: bool = False


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """BenchError, MeasurementError, ServerError, ControlError, OSError."""
    scan = options.workload.scan()
    entries = options.entries or chosen_entries(scan.distinct)
    cells = [
        Cell(0, max(entries)),
        *(Cell(*pair) for pair in itertools.product(options.thresholds, entries, options.tiers)),
    ]
    rows = []
    for number, cell in enumerate(cells, 1):
        began = time.monotonic()
        rows.append(measure(options, cell, scan.blocks))
        say(f"{number} of {len(cells)}: {described(cell)}: {time.monotonic() - began:.1f} s")
    return {
        "workload": options.workload.name,
        "blocks": scan.blocks,
        "distinct_blocks": scan.distinct,
        "possible": scan.possible,
        "depth": options.depth,
        "tier_threshold": options.tier_threshold,
        "read_cache_bytes": options.read_cache_bytes,
        "drive": asdict(options.drive(device_bytes(options.workload))),
        "rows": [{**row, "of_possible": row["saved"] / scan.possible if scan.possible else None} for row in rows],
    }


def described(cell: Cell) -> str:
    if cell.threshold == 0:
        return "nothing equal"
    return f"threshold {cell.threshold}, {cell.entries} fingerprints, {'with' if cell.tier else 'no'} fast tier"


def chosen_entries(distinct: int) -> tuple[int, ...]:
    enough = 1 << max(10, (max(distinct, 1) - 1).bit_length())
    return (enough, enough // 8) if enough >= 8192 else (enough,)


def device_bytes(workload: Workload) -> int:
    return DEVICE_LEAST + int(workload.volume_blocks * BLOCK * DEVICE_PER_BLOCK) // BLOCK * BLOCK


def configuration(options: Options, cell: Cell, folder: Path) -> dict[str, Any]:
    volume = {
        "name": VOLUME,
        "size": options.workload.volume_blocks * BLOCK,
        "threshold": max(cell.threshold, 1),
        "tier_threshold": options.tier_threshold,
    }
    fast = {"fast_device": str(folder / "fast"), "fast_device_size": device_bytes(options.workload)}
    return {
        **(fast if cell.tier else {}),
        "listen": [],
        "unix": [str(folder / "data" / "nbd.sock")],
        "device_size": device_bytes(options.workload),
        "sparse": True,
        "volumes": [volume],
        "dedup": {"fingerprint_entries": cell.entries},
        "disk": {"cache_bytes": options.read_cache_bytes},
        "testing": {
            "modules": {"disk": "atoll.drivers.fault"},
            "fault": {"record": str(folder / "accesses"), "record_accesses": True},
        },
    }


def measure(options: Options, cell: Cell, blocks: int) -> dict[str, Any]:
    """One row of the table."""
    workload = options.workload if cell.threshold else Unshared(options.workload)
    with tempfile.TemporaryDirectory(prefix="atoll-bench-", dir=options.folder) as name:
        folder = Path(name)
        with Server(folder, configuration(options, cell, folder)) as server:
            cpu = server.cpu_s("dedup")
            began = time.monotonic()
            writes_us = transfer(server.address, write_requests(workload), options.depth)
            server.ask("dedup", "flush", timeout_s=60.0)
            written_s = time.monotonic() - began
            cpu = server.cpu_s("dedup") - cpu
            if cell.tier:
                wait_for("the fast device has its blocks", lambda: copied(server), COPIES_S)
            stored = server.call("status")["dedup"]
            places = workload.places()
            values, in_tier = block_map(server, workload.volume_blocks)
            runs = mean_run(places, values, in_tier)
            chance = np.random.default_rng(1).permutation(len(places))[:RANDOM_READS]
            drive = options.drive(device_bytes(workload))
            scan = read_back(server, folder / "accesses", workload, places, drive)
            random = read_back(server, folder / "accesses", workload, [places[index] for index in chance], drive)
    return {
        "threshold": cell.threshold,
        "entries": cell.entries,
        "tier": cell.tier,
        "read_from_tier": float(in_tier.mean()),
        "stored_blocks": stored["stored_bytes"] // BLOCK,
        "saved": 1 - stored["stored_bytes"] / BLOCK / blocks,
        "mean_run_blocks": runs,
        "scan": scan,
        "random": random,
        "write_us": quantiles(writes_us),
        "write_bytes_per_s": workload.volume_blocks * BLOCK / written_s,
        "dedup_cpu_us_per_block": cpu * 1e6 / blocks,
    }


def copied(server: Server) -> bool:
    """Whether all that belongs on the fast device is there."""
    tier = server.call("status")["tier"]
    return not tier["queued_blocks"] and not tier["copying_blocks"]


def read_back(server: Server, record: Path, workload: Workload, places: list[Place], drive: Drive) -> dict[str, Any]:
    """Reads `places` in their order, with nothing cached before."""
    server.restart()
    begin = server.ask("disk", "fault-status")["record_bytes"]
    times_us = transfer(server.address, read_requests(workload, places), 1)
    accesses = read_accesses(record, begin, server.ask("disk", "fault-status")["record_bytes"])
    reads = accesses[accesses["opcode"] == lib.ATOLL_OP_IO_READ]
    served = drive.serve(reads["offset_bytes"].astype(np.int64), reads["length_bytes"].astype(np.int64))
    return {
        "requests": len(times_us),
        "device_reads_per_request": len(reads) / len(times_us),
        "model_seeks_per_request": float(served.seeks.sum()) / len(times_us),
        "model_ms_per_request": float(served.ms.sum()) / len(times_us),
        "us": quantiles(times_us),
    }


def quantiles(times_us: NDArray[np.float64]) -> dict[str, float]:
    return {f"p{part}": float(np.quantile(times_us, part / 100)) for part in (50, 99)}


# --- Where blocks lie -----------------------------------------------------------------------------------------------


def block_map(server: Server, blocks: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The map values of a volume, and which of its blocks are read from the fast tier."""
    parts, fast = [], []
    for first in range(0, blocks, MAP_BLOCKS):
        count = min(MAP_BLOCKS, blocks - first)
        answer = server.ask("dedup", "map", name=VOLUME, first=first, count=count)
        parts.append(np.frombuffer(answer["values"], "<u8"))
        fast.append(np.frombuffer(answer["fast"], np.bool_))
    return np.concatenate(parts), np.concatenate(fast)


def mean_run(requests: Iterable[Place], values: NDArray[np.uint64], in_tier: NDArray[np.bool_]) -> float:
    """Blocks of a request that lie in sequence on the device, on average over all runs. Holes and blocks that are read
    from the fast tier end none, and do not count."""
    blocks = runs = 0
    for first, count in requests:
        places = values[first : first + count]
        places = places[(places >> np.uint64(60) == MAP_PBA) & ~in_tier[first : first + count]]
        if len(places):
            blocks += len(places)
            runs += 1 + int((places[1:] != places[:-1] + np.uint64(1)).sum())
    return blocks / runs if runs else 0.0


# --- The client -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Operation:
    command: int
    offset: int
    payload: Any = None  # of a write
    expected: Any = None  # of a read


def write_requests(workload: Workload) -> Iterator[Operation]:
    for first, data in workload.writes():
        yield Operation(nbd.WRITE, first * BLOCK, payload=memoryview(data).cast("B"))


def read_requests(workload: Workload, places: list[Place]) -> Iterator[Operation]:
    for first, count in places:
        yield Operation(nbd.READ, first * BLOCK, expected=memoryview(workload.data(first, count)).cast("B"))


@contextmanager
def connected(address: str) -> Iterator[nbd.Link]:
    link = nbd.connect(address, VOLUME, structured=False)
    try:
        yield link
    finally:
        link.close()


def transfer(address: str, operations: Iterator[Operation], depth: int) -> NDArray[np.float64]:
    """Does all, `depth` at a time, and compares what is read. Returns the µs that each took, as answers come."""
    times: list[int] = []
    flights: dict[int, tuple[int, Operation]] = {}
    cookies = itertools.count(1)
    with connected(address) as link:
        poll = select.poll()
        while True:
            while len(flights) < depth and (operation := next(operations, None)) is not None:
                data = operation.expected if operation.payload is None else operation.payload
                cookie = next(cookies)
                flights[cookie] = (time.monotonic_ns(), operation)
                link.submit(cookie, operation.command, operation.offset, len(data), payload=operation.payload)
            if not flights:
                return np.array(times, np.float64) / 1000
            link.pump_out()
            poll.register(link.fileno(), select.POLLIN | (select.POLLOUT if link.wants_out else 0))
            if not poll.poll(60_000):
                raise MeasurementError(f"no answer for 60 s, {len(flights)} requests wait")
            for reply in link.pump_in():
                began, operation = flights.pop(reply.cookie)
                times.append(time.monotonic_ns() - began)
                check(operation, reply)


def check(operation: Operation, reply: nbd.Reply) -> None:
    name = nbd.NAMES[operation.command]
    if reply.error:
        raise MeasurementError(f"{name} at {operation.offset}: error {reply.error}")
    if operation.expected is not None and reply.data != operation.expected:
        found, wanted = (struct.unpack_from("<Q", data)[0] for data in (reply.data, operation.expected))
        raise MeasurementError(
            f"{name} at {operation.offset}: begins with {found:#x} instead of {wanted:#x}, or differs later"
        )
