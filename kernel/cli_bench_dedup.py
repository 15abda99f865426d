"""`atoll bench dedup`: its options; the work is done by a floor of its own, known by name."""

import importlib
from pathlib import Path
from typing import Any

import click

from atoll.kernel.cli_options import (
    SIZE,
    THRESHOLD,
    TIER_THRESHOLD,
    Checked,
    Number,
    emit,
    end_in_order,
    json_option,
    plot_option,
)
from atoll.kernel.config import parse_size


def parse_distance(text: str) -> str | int:
    """near, far, or a size: then in blocks. Raises ConfigError."""
    return text if text in ("near", "far") else parse_size(text) // 4096


@click.command()
@click.option(
    "--profile", default="personalfiles", show_default=True,
    help="How often contents repeat: archival, personalfiles, kernels (fitted to real data), half, unique.",
)  # fmt: skip
@click.option(
    "--size",
    "size_bytes",
    metavar="SIZE",
    default="256MiB",
    show_default=True,
    type=SIZE,
    help="Of what is written.",
)
@click.option(
    "--run", "run_mean", metavar="BLOCKS", type=Number(1, 64), default=6.0, show_default=True,
    help="Mean length of the runs that repeat together.",
)  # fmt: skip
@click.option(
    "--lone", metavar="SHARE", type=Number(0, 1), default=0.18, show_default=True,
    help="Share of the blocks that repeat alone, beside the runs.",
)  # fmt: skip
@click.option(
    "--distance", metavar="near|far|SIZE", default="far", show_default=True, type=Checked("distance", parse_distance),
    help="From one copy to the next.",
)  # fmt: skip
@click.option(
    "--image", "images", metavar="FILE", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Write these files instead, one after the other; repeatable.",
)  # fmt: skip
@click.option(
    "--trace", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Write what an FIU block trace writes instead: lines "time pid process lba size W|R major minor md5".',
)  # fmt: skip
@click.option(
    "--threshold", "thresholds", metavar="N", multiple=True, type=THRESHOLD, default=(1, 2, 4, 8),
    show_default=True, help="Run thresholds to try; repeatable.",
)  # fmt: skip
@click.option(
    "--entries", metavar="N", multiple=True, type=click.IntRange(1024),
    help="Sizes of the fingerprint cache to try, powers of two; repeatable.  [default: enough, and an eighth of it]",
)  # fmt: skip
@click.option(
    "--tier", type=click.Choice(["off", "on", "both"]), default="both", show_default=True,
    help="Without a fast device, with one, or each.",
)  # fmt: skip
@click.option(
    "--tier-threshold", metavar="N", type=TIER_THRESHOLD, default=8,
    show_default=True, help="References from which on a block goes to the fast device.",
)  # fmt: skip
@click.option(
    "--request", "request_mean", metavar="BLOCKS", type=Number(1, 64), default=16.0, show_default=True,
    help="Mean size of the requests.",
)  # fmt: skip
@click.option(
    "--read-cache", "read_cache_bytes", metavar="SIZE", default="64MiB", show_default=True, type=SIZE,
    help="Of the server.",
)  # fmt: skip
@click.option("--depth", type=click.IntRange(1, 64), default=16, show_default=True, help="Writes in flight.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed writes the same.")
@click.option(
    "--folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the servers' data goes meanwhile.  [default: the system's temporary folder]",
)  # fmt: skip
@json_option
@plot_option("Draw the figures.")
@click.option("--data", hidden=True, help="Not needed: measures on servers of its own.")
def dedup(as_json: bool, plot: str | None, data: str | None, **options: Any) -> None:
    """What sharing equal blocks saves, and what it costs those who read.

    For each combination of run threshold, fingerprint cache and fast tier a server of its own takes the same writes;
    then all is read back and compared. Progress goes to standard error.
    """
    measurement = importlib.import_module("atoll.bench.dedup")
    shown = importlib.import_module("atoll.bench.dedup_show")
    try:
        work = _workload(options)
        wanted = measurement.Options(
            work,
            thresholds=options["thresholds"],
            tiers={"off": (False,), "on": (True,), "both": (False, True)}[options["tier"]],
            **{key: options[key] for key in ("entries", "tier_threshold", "folder", "depth", "read_cache_bytes")},
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    end_in_order()
    try:
        document = measurement.run(wanted, lambda line: click.echo(line, err=True))
    except (measurement.BenchError, measurement.MeasurementError, measurement.ServerError) as error:
        raise click.ClickException(str(error)) from None
    if plot:
        shown.draw(document, plot)
    if as_json:
        emit(document)
        return
    from atoll.kernel import show

    show.console().print(shown.render(document))


def _workload(options: dict[str, Any]) -> Any:
    duplicates = importlib.import_module("atoll.bench.duplicates")
    workload = importlib.import_module("atoll.bench.workload")
    if options["images"] and options["trace"]:
        raise click.UsageError("--image or --trace, not both")
    if options["images"]:
        return workload.Images(options["images"], options["request_mean"], options["seed"])
    if options["trace"]:
        return workload.Trace(options["trace"])
    if options["profile"] not in duplicates.PROFILES:
        raise click.UsageError(f"no profile {options['profile']!r}; there are {', '.join(duplicates.PROFILES)}")
    runs = duplicates.Runs(options["run_mean"], options["lone"])
    stream = duplicates.Stream(
        duplicates.PROFILES[options["profile"]],
        options["size_bytes"] // 4096,
        runs,
        options["distance"],
        options["seed"],
    )
    return workload.Generated(stream, options["request_mean"], options["seed"])
