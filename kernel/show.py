"""What the command line shows to people: tables of status, processes, volumes, trace and audit, drawn with rich.

Takes the documents that `--json` prints, so both say the same. Values that a document lacks are shown as `-`.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from atoll.kernel.config import format_size

# Processes that could not be looked into, named by `atoll audit`: those first that have most shared memory in use.
UNSEEN_SHOWN = 5
STATE_STYLE = {"serving": "green", "standby": "cyan", "failed": "red", "dying": "red", "stopped": "dim"}


def console() -> Console:
    """As wide as the terminal; what goes to a file or a pipe is not cut."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 240)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        drawn.add_column(
            column, justify="right" if column in right else "left", no_wrap=column in right, overflow="fold"
        )
    return drawn


def size(size_bytes: Any) -> str:
    """About three digits: 1.2 GiB."""
    if size_bytes is None:
        return "-"
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def duration(seconds: Any) -> str:
    if seconds is None:
        return "-"
    whole = int(seconds)
    if whole < 120:
        return f"{float(seconds):.1f}s"
    if whole < 7200:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def text(value: Any) -> str:
    return "-" if value is None or value == "" else escape(str(value))


# --- status, volumes ------------------------------------------------------------------------------------------------


def status(document: Mapping[str, Any]) -> None:
    out = console()
    volumes(document.get("volumes", []), out)
    out.print()
    facts = table("", "")
    facts.show_header = False
    dedup = document.get("dedup", {})
    if dedup:
        ratio = dedup.get("ratio")
        facts.add_row(
            "stored",
            f"{size(dedup.get('logical_bytes'))} of data in {size(dedup.get('stored_bytes'))}, "
            f"{size(dedup.get('shared_bytes'))} shared, ratio {'-' if ratio is None else format(ratio, '.2f')}",
        )
    for name in ("space", "log", "cache", "tier"):
        if isinstance(document.get(name), Mapping):
            facts.add_row(name, text(", ".join(f"{key} {amount(key, v)}" for key, v in document[name].items())))
    if isinstance(document.get("scrub"), Mapping):
        from atoll.kernel.show_store import scrub_line

        facts.add_row("scrub", scrub_line(document["scrub"]))
    copies = document.get("copies", {})
    facts.add_row(
        "copied",
        f"{size(copies.get('inside_bytes'))} inside domains, {size(copies.get('between_bytes'))} between them",
    )
    engines = document.get("engines", document.get("engine", {}))
    if isinstance(engines, Mapping):
        engines = ", ".join(f"{role} {engine}" for role, engine in engines.items())
    facts.add_row("engines", text(engines))
    if isinstance(document.get("cpu_latency"), Mapping):
        facts.add_row("cpu latency", latency(document["cpu_latency"]))
    for warning in document.get("warnings", []):
        facts.add_row("[yellow]warning[/]", text(warning))
    out.print(facts)
    counters = document.get("counters", {})
    shown = {role: {k: v for k, v in values.items() if v} for role, values in counters.items()}
    if any(shown.values()):
        out.print()
        counted = table("domain", "counter", "value", right=("value",))
        for role, values in shown.items():
            for index, (name, value) in enumerate(values.items()):
                counted.add_row(role if index == 0 else "", text(name), f"{value:,}")
        out.print(counted)


def latency(request: Mapping[str, Any]) -> str:
    if request.get("state") == "off":
        return "not asked for (kernel.cpu_latency_us)"
    line = f"{text(request.get('us'))} µs while clients send: {text(request.get('state'))}"
    return f"{line} ({text(request['error'])})" if request.get("error") else line


def amount(key: str, value: Any) -> str:
    return size(value) if key.endswith("_bytes") or key == "bytes" else text(value)


def volumes(entries: Sequence[Mapping[str, Any]], out: Console | None = None) -> None:
    out = out or console()
    if not entries:
        out.print("no volumes (atoll volume create NAME SIZE)")
        return
    right = ("size", "mapped", "thn", "tier", "clients")
    drawn = table("volume", "size", "mapped", "thn", "tier", "access", "clients", "uri", right=right)
    for entry in entries:
        uris = entry.get("uris") or [None]
        drawn.add_row(
            escape(entry["name"]),
            format_size(entry["size_bytes"]),
            size(entry.get("mapped_bytes")),
            text(entry.get("threshold")),
            text(entry.get("tier_threshold")),
            "read-only" if entry.get("read_only") else "read-write",
            text(entry.get("connections")),
            text(uris[0]),
        )
        for uri in uris[1:]:
            drawn.add_row("", "", "", "", "", "", "", text(uri))
    out.print(drawn)


# --- ps -------------------------------------------------------------------------------------------------------------


def numbers(values: Sequence[int] | None) -> str:
    """Ascending numbers with runs drawn together: 0-2,5."""
    runs: list[list[int]] = []
    for value in values or ():
        if runs and runs[-1][1] + 1 == value:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "-"


def process_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    right = ("pid", "inc", "standby", "restarts", "uptime", "cpu", "on", "resident", "shared")
    drawn = table(
        "role", "pid", "inc", "state", "standby", "restarts", "uptime", "cpu", "on", "resident", "shared", right=right
    )
    drawn.columns[0].no_wrap = True
    if console().width < 100:  # a terminal of 80 columns has room for all of it
        drawn.padding = (0, 1, 0, 0)
    for row in rows:
        state = str(row["state"])
        style = STATE_STYLE.get(state, "yellow")
        drawn.add_row(
            row["role"],
            text(row.get("pid")),
            text(row.get("incarnation")),
            f"[{style}]{escape(state)}[/]" + (f" {text(row['reason'])}" if row.get("reason") else ""),
            text(row.get("standby_pid")),
            text(row.get("restarts")),
            duration(row.get("uptime_s")),
            duration(row.get("cpu_s")),
            numbers(row.get("cpu_affinity")),
            size(row.get("resident_bytes")),
            size(row.get("shared_bytes")),
        )
    return drawn


def processes(rows: Sequence[Mapping[str, Any]]) -> None:
    console().print(process_table(rows))


def watch_processes(ask: Callable[[], Sequence[Mapping[str, Any]]], interval_s: float) -> None:
    """Until interrupted, also where SIGINT was ignored at the start, as it is for what a script starts with &."""
    from rich.live import Live

    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        with Live(process_table(ask()), auto_refresh=False) as live:
            while not interrupted.wait(interval_s):
                live.update(process_table(ask()), refresh=True)
    finally:
        signal.signal(signal.SIGINT, before)


# --- trace ----------------------------------------------------------------------------------------------------------


def trace(document: Mapping[str, Any]) -> None:
    out = console()
    for kind in ("write", "read"):
        followed = document.get(kind)
        if followed is None:
            continue
        out.print(
            f"[bold]{kind}[/] of {size(followed['length'])} at {followed['offset']}, volume {text(followed['volume'])}"
        )
        drawn = table(
            "domain", "inc", "message", "address", "length", "since last", right=("inc", "length", "since last")
        )
        for hop in grouped(followed["hops"]):
            address = "-" if hop["address"] is None else f"0x{hop['address']:012x}"
            if hop["runs"] > 1:
                address += f" +{hop['runs'] - 1}"
            drawn.add_row(
                hop["domain"],
                text(hop["incarnation"]),
                f"{hop['message']} {'from' if hop['direction'] == 'received' else 'to'} {hop['peer']}"
                + (f" ×{hop['count']}" if hop["count"] > 1 else ""),
                address,
                str(hop["length"]),
                f"{hop['since_last_us']:,.1f} µs",
            )
        out.print(drawn)
        yes = followed["same_address"]
        where = "nbd, dedup, disk" if kind == "write" else "disk, dedup, nbd, nic"
        out.print(f"same address in {where}: [{'green' if yes else 'red'}]{'yes' if yes else 'no'}[/]", end="")
        out.print(f" ({text(followed['note'])})" if followed["note"] else "")
        out.print()


def grouped(hops: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of one kind that follow one another, as one row: `count`, lengths, runs and times together."""
    rows: list[dict[str, Any]] = []
    for hop in hops:
        if rows and all(rows[-1][key] == hop[key] for key in ("domain", "message", "direction", "peer")):
            for key in ("length", "runs", "since_last_us"):
                rows[-1][key] += hop[key]
            rows[-1]["count"] += 1
        else:
            rows.append({**hop, "count": 1})
    return rows


# --- audit ----------------------------------------------------------------------------------------------------------


def audit(document: Mapping[str, Any]) -> None:
    out = console()
    drawn = table("object", "size", "writable in", "read-only in", "writable descriptor held by", right=("size",))
    for entry in document["objects"]:
        drawn.add_row(
            escape(entry["name"].replace(f"atoll-{document['instance']}-", "")),
            size(entry["bytes"]) if entry["bytes"] else "-",
            people(entry["mapped_writable"]),
            count(entry["mapped_readable"]),
            people(entry["held_writable"]),
        )
    out.print(drawn)
    for finding in document["findings"]:
        out.print(f"[red]{escape(finding)}[/]")
    if document["unseen"]:
        hint = "" if os.geteuid() == 0 else " (run as root to see all)"
        shown = sorted(document["unseen"], key=lambda each: -(each["shared_bytes"] or 0))[:UNSEEN_SHOWN]
        named = ", ".join(unseen(each) for each in shown)
        more = ", …" if len(document["unseen"]) > len(shown) else ""
        out.print(f"{count(document['unseen'])} could not be looked into{hint}: {named}{more}", style="yellow")
    if not document["findings"]:
        out.print("each object is writable in at most one process", style="green")


def unseen(process: Mapping[str, Any]) -> str:
    whose = f" of {escape(process['user'])}" if process["user"] else ""
    uses = f" with {size(process['shared_bytes'])} of shared memory" if process["shared_bytes"] else ""
    return f"{escape(process['name'])} {process['pid']}{whose}{uses}"


def count(entries: Sequence[Any]) -> str:
    return f"{len(entries)} process{'' if len(entries) == 1 else 'es'}"


def people(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{escape(entry['name'])} {entry['pid']}" for entry in entries) or "-"
