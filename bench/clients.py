"""The clients that `make bench` measures with: fio, and `nbdload` of bench/extra, which decides what is duplicate.

- `Load`                what is asked of a server
- `run(load, target, cpus, folder)`   one measurement: a `Sample`
- `fill`, `flush`       around measurements

nbdload is compiled when first needed (libnbd's header is needed by nothing else of Atoll).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from atoll.bench import compiled, duplicates
from atoll.bench.peers import MIB, BenchError, need, pinned

CONTENT_BYTES = 4096
POOL_BLOCKS = 256  # lies in a processor's cache; each block is made different by a number in it
FILL_BYTES = 256 << 10
# No server does more in a second: what a plan for a time must have.
RATE_MOST, BYTES_RATE_MOST = 600_000, 16 << 30
# Far duplicates: so much lies between a content and its duplicate, more than write log and read cache hold together.
FAR_BYTES = 1 << 30
PATIENCE_S = 300.0  # a run that takes so much longer than planned hangs

STEP = np.dtype([("offset", "<u8"), ("identity", "<u8")])


@dataclass(frozen=True)
class Load:
    """One kind of work. Offsets and sizes are bytes."""

    op: str  # read, write, mixed (70 % reads)
    block: int
    depth: int
    offset: int = 0
    size: int = 32 * MIB
    sequential: bool = False
    connections: int = 1
    client: str = "fio"
    contents: str = "unique"  # nbdload's writes: "unique", or half duplicates, "near" or "far" ones
    total_bytes: int = 0  # ends when so much has been read or written, instead of by time
    flush: bool = False  # the time until all of it is on the device counts
    far_bytes: int = FAR_BYTES  # of "far" loads


@dataclass(frozen=True)
class Sample:
    requests: int
    seconds: float
    bytes: int
    p50_ns: float
    p99_ns: float
    server_cpu_s: float
    client_cpu_s: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    @property
    def cpu_us(self) -> float:
        """Server processor time per request."""
        return self.server_cpu_s / self.requests * 1e6

    def plain(self) -> dict[str, float]:
        return {**asdict(self), "rate": self.rate, "cpu_us": self.cpu_us}


class Target(Protocol):
    name: str

    def cpu_s(self) -> float: ...


def run(load: Load, target: Target, cpus: Sequence[int] | None, folder: Path, seconds: float, seed: int) -> Sample:
    """Measures once, the client on `cpus`. BenchError if the client fails or sees an error."""
    before = target.cpu_s()
    if load.client == "fio":
        measured = run_fio(load, target, cpus, folder, seconds, seed)
    else:
        measured = run_nbdload(load, target, cpus, folder, seconds, seed)
    return Sample(**measured, server_cpu_s=target.cpu_s() - before)


def client_run(command: list[str], folder: Path, seconds: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=seconds + PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{command[0]}: not done {PATIENCE_S:g} s after its time") from None
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command)}: {' | '.join((done.stderr or done.stdout).strip().splitlines()[-3:])}")
    return done.stdout


# --- fio ------------------------------------------------------------------------------------------------------------

FIO_MODES = {
    ("read", False): "randread",
    ("write", False): "randwrite",
    ("mixed", False): "randrw",
    ("read", True): "read",
    ("write", True): "write",
}


def run_fio(
    load: Load, target: Any, cpus: Sequence[int] | None, folder: Path, seconds: float, seed: int
) -> dict[str, Any]:
    command = [
        need("fio"), "--name=bench", f"--rw={FIO_MODES[load.op, load.sequential]}", f"--bs={load.block}",
        f"--iodepth={load.depth}", f"--offset={load.offset}", f"--size={load.size}", f"--randseed={seed}",
        "--norandommap", "--output-format=json",
        "--percentile_list=50:99", "--group_reporting", f"--numjobs={load.connections}",
    ]  # fmt: skip
    command += (
        [f"--io_size={load.total_bytes}"]
        if load.total_bytes
        else ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
    )
    if load.flush:
        command.append("--end_fsync=1")
    if load.op == "mixed":
        command.append("--rwmixread=70")
    if target.name == "device":
        command += ["--ioengine=io_uring", "--direct=1", f"--filename={target.image}", "--allow_file_create=0"]
        if load.op == "read":
            command.append("--readonly")
    else:
        command += ["--ioengine=nbd", f"--uri={target.uri}"]
    out = client_run(pinned(command, cpus), folder, seconds)
    job = json.loads(out[out.index("{") :])["jobs"][0]
    if job["error"]:
        raise BenchError(f"fio: error {job['error']} of {target.name}")
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides:
        raise BenchError(f"fio: not one request answered by {target.name} in {seconds:g} s")
    requests, elapsed = sum(side["total_ios"] for side in sides), max(side["runtime"] for side in sides) / 1e3
    return {
        "requests": requests,
        "seconds": elapsed,
        "bytes": sum(side["io_bytes"] for side in sides),
        # Of mixed work the slower half's.
        "p50_ns": max(side["clat_ns"]["percentile"]["50.000000"] for side in sides),
        "p99_ns": max(side["clat_ns"]["percentile"]["99.000000"] for side in sides),
        "client_cpu_s": (job["usr_cpu"] + job["sys_cpu"]) / 100 * elapsed * load.connections,
    }


# --- nbdload --------------------------------------------------------------------------------------------------------


def nbdload(folder: Path) -> str:
    try:
        return str(compiled.program("nbdload", folder, ("nbd",)))
    except compiled.Missing as error:
        raise BenchError(f"{error}: say make bench, or as root .ci/system-packages bench") from None


def pool(folder: Path) -> Path:
    path = folder / "pool"
    if not path.exists():
        path.write_bytes(np.random.default_rng(1).bytes(POOL_BLOCKS * CONTENT_BYTES))
    return path


def run_nbdload(
    load: Load, target: Any, cpus: Sequence[int] | None, folder: Path, seconds: float, seed: int
) -> dict[str, Any]:
    steps = plan(load, seconds, seed)
    file = folder / "plan"
    steps.tofile(file)
    # With a total the plan ends the run, not the clock.
    limit = 0.0 if load.total_bytes else seconds
    found = drive(target.uri, folder, cpus, load.op, file, load.block, load.depth, limit, load.flush)
    if found["requests"] == len(steps) and not load.total_bytes:
        raise BenchError(f"nbdload: the plan of {len(steps)} requests was over before {seconds:g} s")
    return {
        "requests": found["requests"],
        "seconds": found["seconds"],
        "bytes": found["bytes"],
        "p50_ns": found["p50_ns"],
        "p99_ns": found["p99_ns"],
        "client_cpu_s": found["cpu_s"],
    }


def plan(load: Load, seconds: float, seed: int) -> NDArray[Any]:
    """What nbdload shall do: places at random (or one after the other), contents as the load says."""
    count = -(-load.total_bytes // load.block) or round(seconds * min(RATE_MOST, BYTES_RATE_MOST / load.block)) + 1
    places = load.size // load.block
    steps = np.zeros(count, STEP)
    if load.sequential:
        chosen = np.arange(count) % places
    else:
        chosen = np.random.default_rng(seed).integers(0, places, count)
    steps["offset"] = load.offset + chosen * load.block
    if load.op == "write":
        steps["identity"] = identities(load, count, seed)
    return steps


def identities(load: Load, count: int, seed: int) -> duplicates.Ids:
    if load.contents == "far":  # every second one is of what `fill_far` wrote, in its order
        old = written_far(load.far_bytes // load.block, again=True)
        new = np.concatenate(list(duplicates.Stream(duplicates.PROFILES["unique"], count // 2 + 1, seed=seed + 1)))
        mixed = np.empty(count, np.uint64)
        mixed[0::2] = new[: len(mixed[0::2])]
        mixed[1::2] = np.resize(old, len(mixed[1::2]))
        return mixed
    profile = duplicates.PROFILES["half" if load.contents == "near" else "unique"]
    stream = duplicates.Stream(profile, count, distance="near", seed=seed + 1)
    return np.resize(np.concatenate(list(stream)), count)


def written_far(count: int, again: bool) -> duplicates.Ids:
    """The first copies of far duplicates, or the second ones: as many of them, each as far from the first."""
    stream = duplicates.Stream(duplicates.PROFILES["half"], 2 * count, distance="far", seed=0)
    half = len(stream) // 2
    return np.concatenate([stream[window] for window in (range(half, 2 * half) if again else range(half))])


def fill_far(uri: str, folder: Path, offset: int, block: int, far_bytes: int) -> None:
    """Writes the contents that "far" loads repeat; they must not lie where the load writes."""
    ids = written_far(far_bytes // block, again=False)
    steps = np.zeros(len(ids), STEP)
    steps["offset"] = offset + np.arange(len(ids), dtype=np.uint64) * block
    steps["identity"] = ids
    write_all(uri, folder, steps, block, 32)


def drive(
    uri: str,
    folder: Path,
    cpus: Sequence[int] | None,
    op: str,
    plan_file: Path,
    block: int,
    depth: int,
    seconds: float,
    flush: bool = False,
) -> dict[str, Any]:
    command = [
        nbdload(folder), f"uri={uri}", f"op={op}", f"plan={plan_file}", f"pool={pool(folder)}", f"block={block}",
        f"depth={depth}", f"seconds={seconds}",
    ]  # fmt: skip
    if flush:
        command.append("end=flush")
    return dict(json.loads(client_run(pinned(command, cpus), folder, seconds)))


def fill(uri: str, folder: Path, offset: int, size: int) -> None:
    """Writes contents that occur nowhere else: of block n (4 KiB) of the volume, identity n."""
    steps = np.zeros(size // FILL_BYTES, STEP)
    steps["offset"] = offset + np.arange(len(steps), dtype=np.uint64) * FILL_BYTES
    steps["identity"] = steps["offset"] // FILL_BYTES
    write_all(uri, folder, steps, FILL_BYTES, 8)


def read_once(uri: str, folder: Path, offset: int, size: int) -> None:
    """So that what can be in memory is there."""
    steps = np.zeros(size // FILL_BYTES, STEP)
    steps["offset"] = offset + np.arange(len(steps), dtype=np.uint64) * FILL_BYTES
    file = folder / "once"
    steps.tofile(file)
    drive(uri, folder, None, "read", file, FILL_BYTES, 8, 0)
    file.unlink()


def write_all(uri: str, folder: Path, steps: NDArray[Any], block: int, depth: int) -> None:
    file = folder / "fill"
    steps.tofile(file)
    drive(uri, folder, None, "write", file, block, depth, 0)
    file.unlink()
    flush(uri, folder)


def flush(uri: str, folder: Path) -> float:
    """Seconds until all that was written is on the device, where there is one."""
    return float(json.loads(client_run([nbdload(folder), f"uri={uri}", "op=flush"], folder, 60))["flush_s"])
