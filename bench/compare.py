"""`make bench`: Atoll beside servers without isolation and deduplication, one work after the other (works.py).

    python -m atoll.bench.compare [--rows NAME,...] [--settings installed,same,other] [--rounds N] [--runtime S]
                                  [--quick] [--nice N] [--json FILE] [--plot FOLDER] [--folder FOLDER]

For each work and setting both servers are started, placed and filled alike, then measured in turn, A B A B ...; after a
round of writes the server is flushed, so that one's backlog does not burden the other. What is printed are medians over
the rounds and the spread (least to most); a ratio is that of the medians. Exit status: 0, 1 a ratio falls short of its
goal, 2 usage, 4 something could not be measured.

After a crash: the servers end with this process; the folder with device files is removed at exit, or left if killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from atoll.bench import clients, curves, peers, report, ring, system
from atoll.bench.clients import Sample
from atoll.bench.peers import Atoll, BenchError, version_of
from atoll.bench.works import INSTALLED, OTHER, SAME, Goal, Work, works

EXIT_SHORT, EXIT_FAILED = 1, 4
SETTING_OF = {"installed": INSTALLED, "same": SAME, "other": OTHER}


def placement(setting: str) -> tuple[list[int] | None, list[int] | None]:
    """Processors of the server and of the client. BenchError where there are not enough."""
    cpus = sorted(os.sched_getaffinity(0))
    if setting == INSTALLED:
        return None, None
    if setting == OTHER and len(cpus) < 2:
        raise BenchError(f"setting {setting!r} needs two processors, there is {len(cpus)}")
    return [cpus[0]], [cpus[0] if setting == SAME else cpus[1]]


def measure(
    work: Work, setting: str, folder: Path, rounds: int, runtime_s: float, report_round: Any = None
) -> dict[str, list[Sample]]:
    """Samples of "atoll" and "peer", one a round each, in turn."""
    server_cpus, client_cpus = placement(setting)
    here = folder / f"{work.name}-{setting.replace(' ', '-')}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, here, ignore_errors=True)
        here.mkdir(parents=True)
        servers: dict[str, Any] = {"atoll": Atoll(here, server_cpus), "peer": work.peer(here, server_cpus)}
        for server in servers.values():
            stack.enter_context(server)
        return measure_on(servers, work, setting, client_cpus, folder, rounds, runtime_s, report_round)


def measure_on(
    servers: dict[str, Any], work: Work, setting: str, client_cpus: Sequence[int] | None, folder: Path, rounds: int,
    runtime_s: float, report_round: Any = None,
) -> dict[str, list[Sample]]:  # fmt: skip
    """The same on servers that run."""
    found: dict[str, list[Sample]] = {side: [] for side in servers}
    loads = {"atoll": work.load, "peer": work.peer_load or work.load}
    for server in servers.values():
        work.prepare(server, folder)
    if work.restart:
        servers["atoll"].restart()
    for number in range(rounds):
        for side, server in servers.items():
            load = loads[side]
            sample = clients.run(load, server, client_cpus, folder, runtime_s, seed=number)
            found[side].append(sample)
            if report_round is not None:
                report_round(work, setting, side, sample)
            if load.op != "read" and hasattr(server, "uri"):
                clients.flush(server.uri, folder)
            if side == "atoll":
                server.rest()
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def judge(work: Work, goal: Goal, setting: str, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    figures = {side: spread([goal.value(sample) for sample in samples[side]]) for side in ("atoll", "peer")}
    ratio = figures["atoll"]["median"] / figures["peer"]["median"]
    return {
        "work": work.name,
        "title": goal.title,
        "figure": goal.figure,
        "peer": work.peer.name,
        "setting": setting,
        "atoll": figures["atoll"],
        "peer_figure": figures["peer"],
        "ratio": ratio,
        "goal": goal.least[setting],
        "met": goal.met(ratio, setting),
    }


def cross_check(folder: Path, rounds: int, runtime_s: float) -> dict[str, Any]:
    """fio and nbdload in turn, the same reads of the same servers: how far a figure is the client's."""
    work = next(work for work in works() if work.name == "read-32")
    found: dict[str, dict[str, list[float]]] = {}
    with Atoll(folder / "check") as ours, work.peer(folder / "check") as theirs:
        servers = {"atoll": ours, "peer": theirs}
        for server in servers.values():
            work.prepare(server, folder)
        for number in range(rounds):
            for side, server in servers.items():
                for client in ("fio", "nbdload"):
                    load = replace(work.load, client=client)
                    sample = clients.run(load, server, None, folder, runtime_s, seed=number)
                    found.setdefault(side, {}).setdefault(client, []).append(sample.rate)
            ours.rest()
    return {side: {client: spread(rates) for client, rates in by.items()} for side, by in found.items()}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "processor": model,
        "processors": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "fio": version_of("fio", "--version"),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def run(
    names: Sequence[str], settings: Sequence[str], folder: Path, rounds: int, runtime_s: float, progress: Any = None
) -> dict[str, Any]:
    """The document that is printed, written and drawn. BenchError if something could not be measured."""
    document: dict[str, Any] = {
        "machine": machine(),
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "rounds": rounds,
        "runtime_s": runtime_s,
        "niceness": peers.niceness,
        "versions": {},
        "goals": [],
        "samples": [],
    }
    for work in works():
        if work.name not in names:
            continue
        for kind in (Atoll, work.peer):
            document["versions"][kind.name] = kind.version()
        for setting in work.settings:
            if setting not in settings:
                continue
            samples = measure(work, setting, folder, rounds, runtime_s, progress)
            for side, of_side in samples.items():
                document["samples"].append(
                    {"work": work.name, "setting": setting, "side": side, "peer": work.peer.name,
                     "rounds": [sample.plain() for sample in of_side]}
                )  # fmt: skip
            for goal in work.goals:
                if setting in goal.least:
                    document["goals"].append(judge(work, goal, setting, samples))
    return document


# --- Command line ---------------------------------------------------------------------------------------------------


def chosen(kind: str, text: str, known: Sequence[str]) -> list[str]:
    if not text:
        return list(known)
    names = text.split(",")
    for name in names:
        if name not in known:
            raise click.BadParameter(f"no {kind} {name!r}; there are {', '.join(known)}")
    return names


@click.command(help="Atoll beside nbdkit, qemu-nbd and the bare device: the goals of docs/performance.md.")
@click.option("--rows", default="", metavar="NAME,...", help="Only these works.")
@click.option("--settings", default="", metavar="SETTING,...", help="Of installed, same, other.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--runtime", "runtime_s", type=click.FloatRange(0.05), default=3.0, show_default=True, help="Seconds a run."
)
@click.option("--quick", is_flag=True, help="3 rounds of 1 s: a first look.")
@click.option("--nice", "niceness", type=click.IntRange(-20, 19), default=0, help="Of servers and clients alike.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Writes all figures there.")
@click.option("--plot", type=click.Path(file_okay=False), help="Draws PNG files into this folder.")
@click.option("--folder", type=click.Path(file_okay=False), help="For device files; default: build/ or here.")
@click.option("--check/--no-check", default=None, help="fio beside our own generator. [default: unless --rows]")
@click.option("--system/--no-system", "with_system", default=None, help="Idle, system calls, rings. [the same]")
@click.option("--curves/--no-curves", "with_curves", default=None, help="How cost grows, where time goes. [the same]")
def main(
    rows: str, settings: str, rounds: int, runtime_s: float, quick: bool, niceness: int, json_file: str | None,
    plot: str | None, folder: str | None, check: bool | None, with_system: bool | None,
    with_curves: bool | None,
) -> None:  # fmt: skip
    names = chosen("row", rows, [work.name for work in works()])
    picked = [SETTING_OF[name] for name in chosen("setting", settings, list(SETTING_OF))]
    check, with_system, with_curves = (
        not rows if given is None else given for given in (check, with_system, with_curves)
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are stopped
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    if niceness:
        peers.prefer(niceness)
    if quick:
        rounds, runtime_s = 3, 1.0
    if json_file:  # before half an hour of measuring, not after it
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
    above = Path(folder) if folder else next((path for path in (Path("build"),) if path.is_dir()), Path())
    with tempfile.TemporaryDirectory(prefix="bench-", dir=above) as name:
        here = Path(name).absolute()
        try:
            document = run(names, picked, here, rounds, runtime_s, report.progress)
            if check:
                document["cross_check"] = cross_check(here, min(rounds, 3), runtime_s)
            if with_system:
                document["system"] = system.run(here, idle_s=10.0, ring_s=20.0)
            if with_curves:
                document["curves"] = curves.run(here, runtime_s)
                document["breakdown"] = curves.breakdown(here, max(2.0, runtime_s))
        except (BenchError, ring.BenchError) as error:
            click.echo(f"bench: {error}", err=True)
            sys.exit(EXIT_FAILED)
    report.show(document)
    if with_system:
        report.show_system(document["system"])
    if with_curves:
        report.show_breakdown(document["breakdown"])
    if json_file:
        Path(json_file).write_text(json.dumps(document, indent=1) + "\n")
    if plot:
        report.draw(document, Path(plot))
    if not all(goal["met"] for goal in (*document["goals"], *document.get("system", {}).get("rows", []))):
        sys.exit(EXIT_SHORT)


if __name__ == "__main__":
    main()
