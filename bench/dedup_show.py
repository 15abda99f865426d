"""The result of `atoll bench dedup` as a table and as a picture.

- `render(document)`         for a console
- `draw(document, path)`     a PNG; with the figures that iDedup's authors published beside ours
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

# Srinivasan et al., iDedup: Latency-aware, inline data deduplication for primary storage (FAST 2012): share of the
# savings that is left at each threshold (middle of what is given for the traces), and blocks read in sequence.
PUBLISHED_SAVED = {1: 1.0, 2: 0.79, 4: 0.71, 8: 0.485}
PUBLISHED_RUN = {1: 12.5, 2: 14.8, 4: 14.9, 8: 15.4}
PUBLISHED_RUN_UNSHARED = 15.8

Row = dict[str, Any]
Value = Callable[[Row], float]


def render(document: dict[str, Any]) -> RenderableType:
    table = Table(title=f"Sharing equal blocks: {document['workload']}", title_justify="left")
    for name in ("threshold", "fingerprints", "tier", "saved", "of the possible", "run read back"):
        table.add_column(name, justify="right")
    for name in (
        "scan: seeks*",
        "ms*",
        "random: seeks*",
        "ms*",
        "µs p50 / p99",
        "write µs p50 / p99",
        "MB/s",
        "CPU µs",
    ):
        table.add_column(name, justify="right")
    for row in document["rows"]:
        nothing = row["threshold"] == 0
        table.add_row(
            "nothing equal" if nothing else str(row["threshold"]),
            f"{row['entries']:,}",
            f"{row['read_from_tier']:.1%}" if row["tier"] else "",
            f"{row['saved']:.1%}",
            "" if nothing or row["of_possible"] is None else f"{row['of_possible']:.1%}",
            f"{row['mean_run_blocks']:.1f}",
            *(
                f"{row[order][f'model_{what}_per_request']:.2f}"
                for order in ("scan", "random")
                for what in ("seeks", "ms")
            ),
            *(f"{times['p50']:,.0f} / {times['p99']:,.0f}" for times in (row["random"]["us"], row["write_us"])),
            f"{row['write_bytes_per_s'] / 1e6:.0f}",
            f"{row['dedup_cpu_us_per_block']:.1f}",
        )
    drive = document["drive"]
    note = (
        f"{document['blocks']:,} blocks that are not zero, {document['distinct_blocks']:,} of them different: "
        f"{document['possible']:.1%} can be saved.\n"
        "Read back in the original requests, one at a time, by address (scan) and in an order of chance; seeks and "
        "times are per request.\ntier: part of the blocks that is read from the fast device "
        f"({document['tier_threshold']} references and more). CPU: of dedup, per block written.\n"
        f"* a model, not a measurement: a drive of {drive['rpm']:.0f} rpm, average seek {drive['seek_average_ms']} ms, "
        f"{drive['bytes_per_s'] / 1e6:.0f} MB/s, for the reads that reached the device (docs/deduplication.md)."
    )
    return Group(table, note)


def draw(document: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    figure.suptitle(f"Sharing equal blocks: {document['workload']}, {document['blocks']:,} blocks")
    panels: tuple[tuple[str, Value, dict[int, float] | None, float | None], ...] = (
        ("of the possible savings", lambda row: row["of_possible"] or 0.0, PUBLISHED_SAVED, None),
        (
            "blocks in sequence per run read back",
            lambda row: row["mean_run_blocks"],
            PUBLISHED_RUN,
            PUBLISHED_RUN_UNSHARED,
        ),
        (
            "ms per random read (model of a 7,200 rpm drive)",
            lambda row: row["random"]["model_ms_per_request"],
            None,
            None,
        ),
        ("µs per random read, median (measured)", lambda row: row["random"]["us"]["p50"], None, None),
    )
    unshared = next(row for row in document["rows"] if row["threshold"] == 0)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        if row["threshold"]:
            lines.setdefault(line_name(row), []).append(row)
    for axis, (title, value, published, published_unshared) in zip(axes.flat, panels, strict=True):
        for name, rows in lines.items():
            axis.plot([str(row["threshold"]) for row in rows], [value(row) for row in rows], marker="o", label=name)
        if title != panels[0][0]:
            axis.axhline(value(unshared), color="black", linestyle="--", label="nothing equal")
        thresholds = {str(row["threshold"]) for row in document["rows"]}
        if published is not None and (known := [key for key in published if str(key) in thresholds]):
            axis.scatter(
                [str(key) for key in known], [published[key] for key in known], color="gray", marker="x", label="iDedup"
            )
        if published_unshared is not None:
            axis.axhline(published_unshared, color="gray", linestyle=":", label="iDedup, nothing shared")
        axis.set(title=title, xlabel="run threshold")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes.flat[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def line_name(row: dict[str, Any]) -> str:
    return f"{row['entries']:,} fingerprints{', fast tier' if row['tier'] else ''}"
