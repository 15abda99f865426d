"""`atoll chaos`: its options; the work is chaos.py's."""

import sys
from pathlib import Path
from typing import Any

import click

from atoll.kernel.cli_options import (
    SIGNALS,
    SIZE,
    Number,
    data_option,
    emit,
    end_in_order,
    json_option,
    plot_option,
    seconds,
)

ROLES = ("nic", "nbd", "dedup", "disk", "llrrm", "kernel")


@click.command()
@data_option
@click.option(
    "--target", type=click.Choice([*ROLES, "any", "pairs"]), default="any", show_default=True,
    help="Who is killed: one role, each in turn, or two at once.",
)  # fmt: skip
@click.option(
    "--signal", "signals", metavar="NAMES", default="KILL", show_default=True, type=SIGNALS,
    help="KILL, SEGV, STOP, ...; one of them is drawn for each kill.",
)  # fmt: skip
@click.option(
    "--interval", "interval_s", metavar="SECONDS", type=seconds(0.02), default=1.0, show_default=True,
    help="From one kill to the next.",
)  # fmt: skip
@click.option(
    "--duration", "duration_s", metavar="SECONDS", type=seconds(1), default=60.0, show_default=True,
    help="How long the load runs.",
)  # fmt: skip
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed does the same.")
@click.option("--connections", type=click.IntRange(1, 512), default=8, show_default=True, help="Of the load.")
@click.option("--depth", type=click.IntRange(1, 64), default=8, show_default=True, help="Requests per connection.")
@click.option("--transport", type=click.Choice(["tcp", "unix", "both"]), default="both", show_default=True)
@click.option("--read-percent", type=Number(0, 100), default=50.0, show_default=True)
@click.option(
    "--duplicates", "duplicate_percent", metavar="PERCENT", type=Number(0, 100), default=50.0,
    show_default=True, help="Writes whose blocks occur elsewhere too.",
)  # fmt: skip
@click.option("--small", is_flag=True, help="No request above 32 KiB; default is every size up to 1 MiB.")
@click.option(
    "--rate", metavar="PER SECOND", type=Number(0, 1e9), default=0.0,
    help="Requests in all; leaves the machine idle time, so that silences are the server's.  [default: no limit]",
)  # fmt: skip
@click.option(
    "--size", "size_bytes", metavar="SIZE", default="256MiB", show_default=True, type=SIZE,
    help="Of the volume, which is made for the run.",
)  # fmt: skip
@click.option("--volume", metavar="NAME", help="Use this volume: WHAT IT HOLDS IS LOST.")
@click.option("--workers", type=click.IntRange(1, 64), help="Processes of the load.  [default: by the processors]")
@click.option("--churn/--no-churn", default=True, show_default=True, help="Also come and go with new connections.")
@json_option
@plot_option("Draw the throughput over time.")
def chaos(data: Path, as_json: bool, plot: str | None, volume: str | None, **options: Any) -> None:
    """Kill domains under a load that checks every byte.

    The load writes, reads, flushes, trims and zeroes with every size from 512 bytes to 1 MiB and knows what each sector
    may hold at each moment. Progress goes to standard error. Exit status 1 if a connection was dropped, a request
    failed, a byte was wrong or an acknowledged write was lost.
    """
    from atoll.kernel import chaos as chaos_run
    from atoll.kernel import chaos_report

    if volume is not None and volume.startswith("chaos-") is False and sys.stdin.isatty():
        click.confirm(f"What volume {volume} holds will be lost. Go on?", abort=True, err=True)
    end_in_order()
    result = chaos_run.run(
        chaos_run.Options(data=data, volume=volume, **options), lambda line: click.echo(line, err=True)
    )
    if plot:
        chaos_report.plot(result, plot)
    if as_json:
        emit(result)
    else:
        from rich.console import Console

        console = Console(soft_wrap=True)
        for part in chaos_report.table(result):
            console.print(part, highlight=False, markup=False) if isinstance(part, str) else console.print(part)
    sys.exit(0 if result["ok"] else 1)
