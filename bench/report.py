"""What `make bench` found: tables for people, pictures and tables for docs/performance.md.

python -m atoll.bench.report JSON docs/performance.md      puts the tables of a run between the page's marks
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

UNITS = {"rate": "requests/s", "p99": "µs", "cpu": "µs"}


def progress(work: Any, setting: str, side: str, sample: Any) -> None:
    """One line a run, as it ends."""
    who = "atoll" if side == "atoll" else work.peer.name
    print(
        f"{work.name:<16}{setting:<14}{who:<10}{sample.rate:>12,.0f}/s   p50 {sample.p50_ns / 1e3:>9,.1f} µs   "
        f"p99 {sample.p99_ns / 1e3:>9,.1f} µs   server {sample.cpu_us:>7.2f} µs/request   "
        f"client {sample.client_cpu_s / sample.seconds:>5.0%} of a processor",
        file=sys.stderr,
    )


def figure(value: dict[str, float], kind: str) -> str:
    form = "{:,.0f}" if kind == "rate" else "{:,.1f}" if kind == "p99" else "{:.2f}"
    return f"{form.format(value['median'])} ({form.format(value['lowest'])}–{form.format(value['highest'])})"


def cells(goal: dict[str, Any]) -> tuple[str, ...]:
    """Of a goal's row in a table, all but the verdict."""
    sign = "≥" if goal["figure"] == "rate" else "≤"
    return (
        f"{goal['title']}, {UNITS[goal['figure']]}",
        goal["setting"],
        goal["peer"],
        figure(goal["atoll"], goal["figure"]),
        figure(goal["peer_figure"], goal["figure"]),
        f"{goal['ratio']:.2f} ×",
        f"{sign} {goal['goal']:g} ×",
    )


def show(document: dict[str, Any]) -> None:
    table = Table(title=f"Atoll beside others: medians of {document['rounds']} interleaved rounds (least–most)")
    for name in ("work", "setting", "against"):
        table.add_column(name)
    for name in ("Atoll", "peer", "ratio", "goal", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for goal in document["goals"]:
        table.add_row(*cells(goal), "[green]met[/]" if goal["met"] else "[red]short[/]")
    console().print(table)
    for side, by_client in document.get("cross_check", {}).items():
        both = ", ".join(f"{client} {figure(value, 'rate')}" for client, value in by_client.items())
        console().print(f"same work, two clients, on {side}: {both} requests/s")
    machine = document["machine"]
    console().print(
        f"{document['when']}: {machine['processors']} × {machine['processor']}, {machine['memory_gib']:g} GiB, "
        f"Linux {machine['kernel']}, {machine['fio']}; " + "; ".join(document["versions"].values())
    )


def show_system(found: dict[str, Any]) -> None:
    table = Table(title="Without a peer")
    for name in ("what", "measured", "goal", ""):
        table.add_column(name, overflow="fold")
    for row in found["rows"]:
        table.add_row(row["title"], row["text"], row["goal"], "[green]met[/]" if row["met"] else "[red]short[/]")
    console().print(table)


def show_breakdown(found: dict[str, Any]) -> None:
    for kind, entry in found.items():
        table = Table(title=f"Where a 4 KiB {kind} spends its time, depth 1: {entry['p50_us']:.1f} µs for the client")
        table.add_column("domain")
        table.add_column("message")
        table.add_column("µs since the last", justify="right")
        for hop in entry["hops"]:
            table.add_row(hop["domain"], hop["what"], f"{hop['us']:.1f}")
        table.add_row("", "client, socket, nic's receiving and sending", f"{entry['outside_us']:.1f}")
        used = ", ".join(f"{role} {us:.2f}" for role, us in entry["cpu_us"].items() if us >= 0.005)
        console().print(table, f"processor time per {kind} at depth 32, µs: {used}")


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200)


def draw(document: dict[str, Any], folder: Path) -> None:
    """`compare.png`: every ratio beside its goal, as times in Atoll's favour; a picture for each curve."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    draw_goals(document, folder)
    for name, points in document.get("curves", {}).items():
        draw_curve(name, points, folder)


def draw_goals(document: dict[str, Any], folder: Path) -> None:
    from matplotlib import pyplot

    goals = document["goals"][::-1]
    if not goals:
        return
    shown = [goal["ratio"] if goal["figure"] == "rate" else 1 / goal["ratio"] for goal in goals]
    wanted = [goal["goal"] if goal["figure"] == "rate" else 1 / goal["goal"] for goal in goals]
    names = [f"{goal['title']} [{goal['setting']}, {goal['peer']}]" for goal in goals]
    image, axes = pyplot.subplots(figsize=(12, 1 + 0.25 * len(goals)), layout="constrained")
    axes.barh(names, shown, color=["tab:green" if goal["met"] else "tab:red" for goal in goals])
    axes.plot(wanted, names, "k|", markersize=9, label="goal")
    axes.axvline(1, color="gray", linewidth=0.5)
    axes.set_xscale("log")
    ticks = [0.125, 0.25, 0.5, 1, 2, 4]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="times better than the peer (p99 and CPU: peer's / Atoll's)")
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(loc="lower right")
    image.savefig(folder / "compare.png", dpi=90)
    pyplot.close(image)


AXES = {
    "depth": "requests in flight, one connection",
    "connections": "connections, depth 4 each",
    "volume": "size of the volume, GiB",
    "stored": "stored data beside, GiB",
}


def draw_curve(name: str, points: list[dict[str, Any]], folder: Path) -> None:
    """Requests per second, p99 and server processor time per request over the curve's x."""
    from matplotlib import pyplot

    image, panels = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    servers = [server for server in ("atoll", "nbdkit") if server in points[0]]
    for server in servers:
        for kind in points[0][server]:
            xs = [point["x"] for point in points]
            for panel, figure_name in zip(panels, ("rate", "p99_us", "cpu_us"), strict=True):
                panel.plot(
                    xs, [point[server][kind][figure_name] for point in points], marker="o", markersize=3,
                    linestyle="-" if server == "atoll" else "--", label=f"{server}, {kind}",
                )  # fmt: skip
    for panel, title in zip(
        panels, ("requests per second", "p99, µs", "server processor time, µs per request"), strict=True
    ):
        panel.set(title=title, xlabel=AXES[name])
        if name != "stored":
            panel.set_xscale("log", base=2)
            panel.set_xticks([point["x"] for point in points], [f"{point['x']:,}" for point in points])
        panel.tick_params(labelsize=7)
    panels[1].set_yscale("log")
    for panel in (panels[0], panels[2]):
        panel.set_ylim(bottom=0)
    panels[0].legend(fontsize=7)
    image.savefig(folder / f"{name}.png", dpi=80)
    pyplot.close(image)


# --- For the page -----------------------------------------------------------------------------------------------------


def goals_page(document: dict[str, Any]) -> str:
    lines = ["| work | setting | against | Atoll | peer | ratio | goal | |", "|---|---|---|---|---|---|---|---|"]
    for goal in document["goals"]:
        verdict = "met" if goal["met"] else "**short**"
        lines.append("| " + " | ".join((*cells(goal), verdict)) + " |")
    return "\n".join(lines)


def system_page(document: dict[str, Any]) -> str:
    lines = ["| what | measured | goal | |", "|---|---|---|---|"]
    for row in document["system"]["rows"]:
        verdict = "met" if row["met"] else "**short**"
        lines.append(f"| {row['title']} | {row['text']} | {row['goal']} | {verdict} |")
    return "\n".join(lines)


def stages_page(document: dict[str, Any]) -> str:
    lines = []
    for kind, entry in document["breakdown"].items():
        lines += [
            f"A {kind} of 4 KiB, depth 1, {entry['p50_us']:.1f} µs for the client (median):", "",
            "| domain | message | µs since the last |", "|---|---|---|",
        ]  # fmt: skip
        lines += [f"| {hop['domain']} | {hop['what']} | {hop['us']:.1f} |" for hop in entry["hops"]]
        lines.append(f"| | client, socket, nic's receiving and sending | {entry['outside_us']:.1f} |")
        used = ", ".join(f"{role} {us:.2f}" for role, us in entry["cpu_us"].items() if us >= 0.005)
        lines += ["", f"Processor time per {kind} at depth 32, µs: {used}.", ""]
    return "\n".join(lines).rstrip()


def machine_page(document: dict[str, Any]) -> str:
    machine = document["machine"]
    kernel = machine["kernel"].partition("-")[0]
    lines = [
        f"{document['when']}, on a virtual machine of {machine['processors']} processors ({machine['processor']}), "
        f"{machine['memory_gib']:g} GiB, Linux {kernel}, Python {machine['python']}; load average at the beginning "
        f"{machine['load'][0]:g}. {document['rounds']} rounds of {document['runtime_s']:g} s, sessions of servers and "
        f"clients at niceness {document['niceness']}. Client: {machine['fio']}. Peers:",
        *(f"- {text}" for name, text in document["versions"].items() if name != "atoll"),
    ]
    for side, by_client in document.get("cross_check", {}).items():
        name = "Atoll" if side == "atoll" else "nbdkit"
        both = ", ".join(f"{client} {figure(value, 'rate')}" for client, value in by_client.items())
        lines.append(f"- the same reads by two clients, on {name}: {both} requests/s")
    return "\n".join(lines)


END = "<!-- bench: end -->"
PAGES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "machine": ("machine", machine_page),
    "goals": ("goals", goals_page),
    "system": ("system", system_page),
    "stages": ("breakdown", stages_page),
}


def fill_page(document: dict[str, Any], page: str) -> str:
    """The page with what stands between the marks `<!-- bench: NAME -->` and `<!-- bench: end -->` replaced, as far as
    it was measured."""
    for name, (key, write) in PAGES.items():
        if document.get(key):
            before, mark, rest = page.partition(f"<!-- bench: {name} -->\n")
            if mark:
                page = before + mark + write(document) + "\n" + END + rest.partition(END)[2]
    return page


if __name__ == "__main__":
    page_file = Path(sys.argv[2])
    page_file.write_text(fill_page(json.loads(Path(sys.argv[1]).read_text()), page_file.read_text()))
