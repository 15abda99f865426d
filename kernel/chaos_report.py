"""What a run of `atoll chaos` comes to: figures out of the replies' times and the kills, a table, a picture.

- `evaluate(...)`      the figures, plain data
- `table(result)`      rich renderables for a person
- `plot(result, file)` throughput over time, kills marked

Silence: time in which a connection, with requests outstanding, hears nothing. Of a kill: the longest one that any
connection saw between the kill and a quarter of a second after the successor served (or the next kill). To
compare with: the same where nobody dies. Trouble counts for the role that was killed last before it.

Throughput lost: within the one run, replies in a window after each kill against the quiet stretch between that
window and the next kill, and that before. A kill's loss is the replies missing in its window; the share is the sum of
losses over what the quiet rate would have given in the whole time. Its interval comes from resampling the kills.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.kernel.chaos_kill import Kill
from atoll.kernel.chaos_load import Report, Trouble

AFTER_SERVING_NS = 250_000_000
# The window after a kill in which its loss is looked for, at most half of the time to the next one.
WINDOW_NS = 1_000_000_000
RESAMPLES = 2000


def evaluate(
    options: Any, reports: Sequence[Report], totals: dict[str, int], kills: Sequence[Kill], began: int, ended: int
) -> dict[str, Any]:
    load = [report for report in reports if report.times_ns is not None]
    busy = [report for report in load if report.worker != len(reports) - 1 or not options.churn]
    churn = [report for report in load if report not in busy]
    connections = _connections(busy, began, ended)
    times = np.sort(np.concatenate([*(own for own, _ in connections), np.zeros(0, np.int64)]))
    troubles = sorted((trouble for report in reports for trouble in report.troubles), key=lambda each: each.time_ns)
    silences = [_silence(kill, kills, connections, ended) for kill in kills]
    quiet = _quiet_silences(kills, connections, began, ended)
    lost = _throughput_lost(kills, times, began, ended)
    counts: dict[str, int] = {}
    for report in busy:
        for name, count in report.counts.items():
            counts[name] = counts.get(name, 0) + count
    latency = np.concatenate([report.latency_us for report in busy] or [np.zeros(0, np.int64)]) / 1000
    failures = [f"worker {report.worker}: {report.failure}" for report in reports if report.failure]
    missing = [kill for kill in kills if kill.serving_ms is None and not kill.error.startswith("no successor is")]
    bad = {name: totals[name] for name in ("drops", "errors", "wrong_sectors", "lost_sectors")}
    return {
        "ok": not failures and not missing and not any(bad.values()),
        "load": {
            "replies": totals["replies"],
            "bytes": totals["bytes"],
            "checked_bytes": totals["checked_bytes"],
            "replies_per_s": round(totals["replies"] * 1e9 / max(1, ended - began), 1),
            "by_command": counts,
            "latency_ms": _percentiles(latency),
            "new_connections": totals["churns"],
            "new_connection_ms": _percentiles(np.concatenate([r.latency_us for r in churn]) / 1000) if churn else None,
            "connection_drops": totals["drops"],
            "errors": totals["errors"],
            "wrong_bytes": sum(report.wrong_bytes for report in reports),
            "wrong_sectors": totals["wrong_sectors"],
            "lost_writes": totals["lost_sectors"],
        },
        "roles": {role: _of_role(role, kills, silences, troubles) for role in sorted({kill.role for kill in kills})},
        "kills": len(kills),
        "silence_ms": _percentiles(np.array(silences)),
        "quiet_silence_ms": _percentiles(quiet),
        "throughput_lost": lost,
        "failures": failures
        + [f"{kill.role}: {kill.error}" for kill in missing]
        + [f"{(trouble.time_ns - began) / 1e9:.3f} s: {trouble.text}" for trouble in troubles[:50]],
        "events": [
            {**kill.as_dict(began), "silence_ms": round(silence, 3)}
            for kill, silence in zip(kills, silences, strict=True)
        ],
        "timeline": _timeline(times, began, ended, options.timeline_bin_ms),
    }


def _percentiles(values: NDArray[Any]) -> dict[str, float] | None:
    if not len(values):
        return None
    low, median, high, most = np.percentile(values, [10, 50, 99, 100])
    return {"p10": round(low, 3), "p50": round(median, 3), "p99": round(high, 3), "max": round(most, 3)}


def _of_role(
    role: str, kills: Sequence[Kill], silences: Sequence[float], troubles: Sequence[Trouble]
) -> dict[str, Any]:
    def known(values: list[float | None]) -> NDArray[Any]:
        return np.array([value for value in values if value is not None])

    own = [kill for kill in kills if kill.role == role]
    blamed = [trouble for trouble in troubles if _killed_before(kills, trouble.time_ns) == role]
    return {
        "kills": len(own),
        "detect_ms": _percentiles(known([kill.detect_ms for kill in own])),
        "serving_ms": _percentiles(known([kill.serving_ms for kill in own])),
        "silence_ms": _percentiles(np.array([s for kill, s in zip(kills, silences, strict=True) if kill.role == role])),
        "connection_drops": sum(trouble.kind == "drop" for trouble in blamed),
        "errors": sum(trouble.kind == "error" for trouble in blamed),
        "wrong_sectors": sum(trouble.kind == "wrong" for trouble in blamed),
        "lost_writes": sum(trouble.kind == "lost" for trouble in blamed),
    }


def _killed_before(kills: Sequence[Kill], time_ns: int) -> str | None:
    earlier = [kill for kill in kills if kill.time_ns <= time_ns]
    return max(earlier, key=lambda kill: kill.time_ns).role if earlier else None


# --- Silence ---------------------------------------------------------------------------------------------------------


Heard = tuple[NDArray[Any], NDArray[Any]]  # of a connection: when replies came, and how long it was silent before each


def _connections(reports: Sequence[Report], began: int, ended: int) -> list[Heard]:
    """Of the run itself, one per connection."""
    found = []
    for report in reports:
        inside = (report.times_ns >= began) & (report.times_ns <= ended)
        for number in np.unique(report.connections):
            own = inside & (report.connections == number)
            found.append((report.times_ns[own], report.silence_us[own]))
    return found


def _longest(heard: Heard, start: int, end: int) -> float:
    """The longest silence that touches [start, end], in ms."""
    times, silences = heard
    first = int(np.searchsorted(times, start, "left"))
    last = int(np.searchsorted(times, end, "right"))
    longest = int(silences[first:last].max()) if last > first else 0
    if last < len(times) and times[last] - int(silences[last]) * 1000 <= end:
        longest = max(longest, int(silences[last]))
    return longest / 1000


def _silence(kill: Kill, kills: Sequence[Kill], connections: Sequence[Heard], ended: int) -> float:
    end = kill.time_ns + int((kill.serving_ms or 1000.0) * 1e6) + AFTER_SERVING_NS
    later = [other.time_ns for other in kills if other.time_ns > kill.time_ns and other.paired_with is None]
    end = min([end, ended, *later])
    return max((_longest(heard, kill.time_ns, end) for heard in connections), default=0.0)


def _quiet_silences(kills: Sequence[Kill], connections: Sequence[Heard], began: int, ended: int) -> NDArray[Any]:
    """What connections see where nobody dies: the longest silence in stretches as long as those after kills."""
    found = []
    edges = [(began, began)]
    edges += [
        (kill.time_ns, kill.time_ns + int((kill.serving_ms or 1000.0) * 1e6) + AFTER_SERVING_NS) for kill in kills
    ]
    for (start, over), (end, _) in itertools.pairwise([*edges, (ended, ended)]):
        middle = max(over, start + (end - start) // 2)
        stretch_end = min(end - 20_000_000, middle + AFTER_SERVING_NS)
        if stretch_end - middle >= AFTER_SERVING_NS // 2:
            found.append(max((_longest(heard, middle, stretch_end) for heard in connections), default=0.0))
    return np.array(found)


# --- Throughput ------------------------------------------------------------------------------------------------------


def _throughput_lost(kills: Sequence[Kill], times: NDArray[Any], began: int, ended: int) -> dict[str, Any] | None:
    moments = sorted({kill.time_ns for kill in kills if kill.paired_with is None} | _first_of_pairs(kills))
    rows = []
    for at, moment in enumerate(moments):
        before = moments[at - 1] if at else began
        after = moments[at + 1] if at + 1 < len(moments) else ended
        window = min(WINDOW_NS, (after - moment) // 2)
        quiet_before = moment - min(WINDOW_NS, (moment - before) // 2)
        if window < 50_000_000 or moment - quiet_before < 50_000_000:
            continue
        quiet_span = (moment - quiet_before) + (after - moment - window)
        quiet_count = _count(times, quiet_before, moment) + _count(times, moment + window, after)
        rate = quiet_count / quiet_span
        rows.append((rate * window - _count(times, moment, moment + window), rate * (after - moment)))
    if len(rows) < 3:
        return None
    table = np.array(rows)
    chance = np.random.default_rng(1)
    picks = chance.integers(0, len(table), (RESAMPLES, len(table)))
    sums = table[picks].sum(axis=1)
    low, high = np.percentile(sums[:, 0] / np.maximum(1e-9, sums[:, 1]), [2.5, 97.5])
    return {
        "share": round(float(table[:, 0].sum() / max(1e-9, table[:, 1].sum())), 5),
        "low": round(float(low), 5),
        "high": round(float(high), 5),
        "kills": len(rows),
        "quiet_replies_per_s": round(float(table[:, 1].sum() / max(1, moments[-1] - moments[0])) * 1e9, 1)
        if len(moments) > 1
        else None,
    }


def _first_of_pairs(kills: Sequence[Kill]) -> set[int]:
    """Kills of several at once count as one moment: that of the first."""
    found: set[int] = set()
    last = -(10**18)
    for kill in kills:
        if kill.paired_with is None:
            continue
        if kill.time_ns - last > 20_000_000:
            found.add(kill.time_ns)
        last = kill.time_ns
    return found


def _count(times: NDArray[Any], start: int, end: int) -> int:
    return int(np.searchsorted(times, end) - np.searchsorted(times, start))


def _timeline(times: NDArray[Any], began: int, ended: int, bin_ms: float) -> dict[str, Any]:
    """Replies per bin since the start."""
    width = int(bin_ms * 1e6)
    bins = np.arange(began, max(ended, began + width) + 1, width)
    return {"bin_ms": bin_ms, "replies": np.histogram(times, bins)[0].tolist()}


# --- For a person ----------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> list[Any]:
    from rich.table import Table

    load = result["load"]
    rows = Table(title=f"{result['kills']} kills in {result['duration_s']:.0f} s, seed {result['options']['seed']}")
    rows.add_column("role")
    for head in ("kills", "noticed ms", "serving ms", "silence p50", "p99", "max"):
        rows.add_column(head, justify="right")

    def pair(figures: dict[str, float] | None) -> str:
        return "-" if figures is None else f"{figures['p50']:.2f} / {figures['max']:.2f}"

    for role, figures in result["roles"].items():
        silence = figures["silence_ms"] or {"p50": 0, "p99": 0, "max": 0}
        rows.add_row(
            role, str(figures["kills"]), pair(figures["detect_ms"]), pair(figures["serving_ms"]),
            *(f"{silence[key]:.1f}" for key in ("p50", "p99", "max")),
        )  # fmt: skip
    quiet = result["quiet_silence_ms"]
    if quiet:
        rows.add_row("(nobody)", "", "", "", *(f"{quiet[key]:.1f}" for key in ("p50", "p99", "max")))
    lines: list[Any] = [rows]
    lost = result["throughput_lost"]
    lines.append(
        f"{load['replies']} replies, {load['bytes'] / 1e9:.2f} GB, {load['checked_bytes'] / 1e9:.2f} GB checked, "
        f"{load['new_connections']} new connections; "
        f"drops {load['connection_drops']}, errors {load['errors']}, wrong bytes {load['wrong_bytes']}, "
        f"lost writes {load['lost_writes']}"
    )
    if lost:
        lines.append(
            f"throughput lost: {100 * lost['share']:.2f} % (95 %: {100 * lost['low']:.2f} to {100 * lost['high']:.2f})"
        )
    lines += result["failures"]
    return lines


def plot(result: dict[str, Any], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timeline = result["timeline"]
    figure, axes = pyplot.subplots(figsize=(14, 5))
    rate = np.array(timeline["replies"]) * 1000.0 / timeline["bin_ms"]
    axes.plot(np.arange(len(rate)) * timeline["bin_ms"] / 1000, rate, linewidth=0.6, color="0.35")
    roles = sorted(result["roles"])
    top = 1.1 * max(rate, default=1.0)
    for number, role in enumerate(roles):
        moments = [event["at_s"] for event in result["events"] if event["role"] == role]
        axes.vlines(moments, 0, top, colors=f"C{number}", linewidth=0.8, alpha=0.6, label=f"{role} ({len(moments)})")
    axes.set_xlabel("seconds")
    axes.set_ylabel(f"replies/s, in {timeline['bin_ms']:g} ms")
    axes.set_ylim(0, top)
    axes.set_title("Throughput while domains are killed")
    if roles:
        axes.legend(loc="upper right", ncols=len(roles))
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
