"""`atoll chaos`: a verifying load on the running server while its domains are killed by plan.

- `Options`             what the command line says
- `run(options, say)`   -> the result, one JSON document; `say(line)` is called about once a second

The load (chaos_load.py) runs in processes of its own; here are the plan of kills (chaos_kill.py), the clock, and
what is computed from all replies afterwards (chaos_report.py). The volume is made for the run and deleted
after it, unless one is named.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from atoll.kernel import chaos_nbd as nbd
from atoll.kernel import chaos_report, process
from atoll.kernel.chaos_kill import Kill, Killer, choose, roles_of
from atoll.kernel.chaos_load import PATIENCE_S, Plan, Report, Shared, Target, churn, work
from atoll.kernel.chaos_model import BLOCK, PER_BLOCK, SECTOR
from atoll.kernel.client import Client, ControlError, Refused

WARM_UP_S = 0.5
WORD_NS = 1_000_000_000  # from one word about the progress to the next


@dataclass(frozen=True)
class Options:
    data: Path
    target: str = "any"
    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)
    interval_s: float = 1.0
    duration_s: float = 60.0
    seed: int = 1
    connections: int = 8
    depth: int = 8
    transport: str = "both"
    read_percent: float = 50.0
    duplicate_percent: float = 50.0
    small: bool = False  # no request above 32 KiB
    rate: float = 0.0  # requests per second in all; 0: as fast as they are answered
    size_bytes: int = 256 << 20
    volume: str | None = None  # an existing one; all its contents are lost
    workers: int | None = None
    churn: bool = True
    timeline_bin_ms: float = field(default=10.0)


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Raises ControlError if there is no server or it cannot be used; what goes wrong under kills is in the result."""
    with Client(options.data, timeout_s=60.0) as client:
        roles = roles_of(client)
        if options.target not in ("any", "pairs", *roles):
            raise Refused(f"no role {options.target!r} here; there are {', '.join(roles)}")
        name = options.volume or f"chaos-{options.seed}-{os.getpid()}"
        if options.volume is None:
            client.call("volume-create", name=name, size_bytes=options.size_bytes, read_only=False)
        try:
            targets, size = _targets(client, name, options.transport)
            _look_for_places(client, options.connections, _workers(options))
            return _run(options, client, targets, min(size, options.size_bytes), say)
        finally:
            if options.volume is None:
                with contextlib.suppress(ControlError):
                    client.call("volume-delete", name=name, force=True)


def _targets(client: Client, name: str, transport: str) -> tuple[list[Target], int]:
    for volume in client.call("volume-list")["volumes"]:
        if volume["name"] == name:
            found = [nbd.parse_uri(uri) for uri in volume["uris"]]
            wanted = [Target(*each) for each in found if transport in ("both", each[0])]
            if not wanted or (transport == "both" and len({target.transport for target in wanted}) < 2):
                raise Refused(
                    f"the server does not listen on {'both transports' if transport == 'both' else transport}"
                )
            return wanted, int(volume["size_bytes"])
    raise Refused(f"no volume is called {name!r}")


def _workers(options: Options) -> int:
    return options.workers or max(1, min(os.cpu_count() or 1, options.connections, 4))


def _look_for_places(client: Client, connections: int, workers: int) -> None:
    """One connection too many would wait for its place until others end."""
    nic = client.call("status")["domains"].get("nic", {})
    most, used = nic.get("connections_most"), nic.get("connections", 0)
    if most is not None and used + connections + workers > most:
        raise Refused(
            f"the server takes {most} connections (nic.max_connections) and has {used}:"
            f" there is no place for {connections} and {workers} more for the check at the end"
        )


def _run(
    options: Options, client: Client, targets: list[Target], size_bytes: int, say: Callable[[str], None]
) -> dict[str, Any]:
    count = _workers(options)
    shared = Shared(count + 1)
    plans = _plans(options, targets, size_bytes, count)
    jobs = [_start(work, (plan, shared)) for plan in plans]
    if options.churn:
        jobs.append(_start(churn, (count, targets, shared)))
    kills: list[Kill] = []
    interrupted = False
    killer = Killer(client, options.data)
    began = time.monotonic_ns()
    try:
        _kill_by_plan(options, killer, kills, shared, began, jobs, say)
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted: the load ends and everything is checked")
    finally:
        ended = time.monotonic_ns()
        killer.close()
        reports = _end(jobs, say)
    result: dict[str, Any] = {
        "options": {
            **{
                key: value
                for key, value in asdict(options).items()
                if key not in ("data", "signals", "timeline_bin_ms")
            },
            "signals": [number.name.removeprefix("SIG") for number in options.signals],
            "workers": count,
        },
        "interrupted": interrupted,
        "duration_s": round((ended - began) / 1e9, 3),
        "began_ns": began,
    }
    result |= chaos_report.evaluate(options, reports, shared.totals(), kills, began, ended)
    return result


def _plans(options: Options, targets: list[Target], size_bytes: int, count: int) -> list[Plan]:
    """Connections are dealt out over the workers, transports over connections, the volume over the workers."""
    region = size_bytes // BLOCK // count * PER_BLOCK
    if region * SECTOR < 4 << 20:
        raise Refused(f"a volume of {size_bytes} bytes is too small: 4 MiB are needed per worker, there are {count}")
    dealt: list[list[Target]] = [[] for _ in range(count)]
    for number in range(options.connections):
        dealt[number % count].append(targets[(number // count + number) % len(targets)])
    return [
        Plan(worker, options.seed, dealt[worker], worker * region, region, options.depth, options.read_percent,
             options.duplicate_percent, options.small, options.rate / count)
        for worker in range(count)
    ]  # fmt: skip


Job = tuple[Any, Connection]


def _start(function: Callable[..., None], arguments: tuple[Any, ...]) -> Job:
    ours, theirs = multiprocessing.Pipe()
    job = multiprocessing.get_context("fork").Process(
        target=_work_below, args=(os.getpid(), function, (*arguments, theirs)), daemon=True
    )
    job.start()
    theirs.close()
    return job, ours


def _work_below(parent_pid: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """The process: the parent decides when it ends, and it does not outlive it."""
    process.die_with_parent(parent_pid)
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal and timeout(1) send them to all
        signal.signal(number, signal.SIG_IGN)
    function(*arguments)


def _kill_by_plan(
    options: Options, killer: Killer, kills: list[Kill], shared: Shared, began: int, jobs: list[Job],
    say: Callable[[str], None],
) -> None:  # fmt: skip
    order = choose(options.target, options.signals, options.seed, killer.roles)
    until = began + int(options.duration_s * 1e9)
    next_kill = began + int(max(WARM_UP_S, options.interval_s) * 1e9)
    said, last = began, shared.totals()
    while (now := time.monotonic_ns()) < until and all(job.is_alive() for job, _ in jobs):
        if now >= next_kill and now + int(0.2e9) < until:
            roles, number = next(order)
            kills += killer.kill(roles, number)
            # On the plan's beat; a beat that was missed while a successor was awaited is left out.
            beat = int(options.interval_s * 1e9)
            next_kill += beat * max(1, -(-(time.monotonic_ns() - next_kill) // beat))
        elif now >= said + WORD_NS:
            totals = shared.totals()
            say(_word(totals, last, kills, now - began, now - said))
            said, last = now, totals
        else:
            time.sleep(max(0.0, min(next_kill, said + WORD_NS, until) - now) / 1e9)


def _word(totals: dict[str, int], last: dict[str, int], kills: list[Kill], since_ns: int, over_ns: int) -> str:
    """`over_ns`: how long it has been since `last`; while a successor is awaited that may be seconds."""
    replies, size = ((totals[name] - last[name]) * 1e9 / over_ns for name in ("replies", "bytes"))
    text = f"{since_ns / 1e9:6.1f} s  {replies:6.0f} replies/s  {size / 1e6:7.1f} MB/s  {len(kills):5d} kills"
    if kills:
        kill = kills[-1]
        text += f"  last {kill.role} {kill.signal}: " + (
            kill.error if kill.serving_ms is None else f"served after {kill.serving_ms:.1f} ms"
        )
    bad = {name: totals[name] for name in ("drops", "errors", "wrong_sectors", "lost_sectors") if totals[name]}
    return text + "".join(f"  {name.upper()} {count}" for name, count in bad.items())


def _end(jobs: list[Job], say: Callable[[str], None]) -> list[Report]:
    """Stops the load, waits for the final check, and collects what each saw."""
    say("the load ends, every byte is checked")
    for _, pipe in jobs:
        with contextlib.suppress(OSError):
            pipe.send("stop")
    reports = []
    for number, (job, pipe) in enumerate(jobs):
        report = Report(number, failure="the worker ended without a report")
        with contextlib.suppress(EOFError, OSError):
            if pipe.poll(3 * PATIENCE_S):
                report = pipe.recv()
        job.join(1)
        if job.is_alive():
            job.kill()
            job.join()
        reports.append(report)
    return reports
