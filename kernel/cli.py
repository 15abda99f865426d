"""The command `atoll`: options, exit codes and one-line errors; what it shows is drawn by show.py.

- `serve` runs a server (kernel/init.py); every other command asks a running one over its control socket (client.py),
  except `audit`, which asks the operating system.
- Each command takes `--data DIR` (or ATOLL_DATA) and, where there is something to print, `--json`: one JSON document.
- Whatever fails ends as `atoll: ...`, one line on standard error, with a status of EXIT_CODES.
"""

import errno
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from atoll.kernel import cli_bench_dedup, cli_chaos, cli_store
from atoll.kernel import config as configuration
from atoll.kernel.cli_options import (
    EXIT_INTERRUPTED,
    EXIT_NEGATIVE,
    EXIT_NO_ANSWER,
    EXIT_REFUSED,
    EXIT_SERVER,
    EXIT_USAGE,
    PATH,
    SIGNAL,
    SIZE,
    THRESHOLD,
    TIER_THRESHOLD,
    VOLUME,
    VOLUME_NAME,
    F,
    data_option,
    emit,
    json_option,
    plot_option,
    seconds,
)
from atoll.kernel.client import Client, ControlError, NoAnswer, NoServer, Refused

EXIT_CODES = """\b
Exit status:
  0  done
  1  the answer is no (audit or check found something, trace saw no proof, stop left something in memory), or the
     server failed
  2  wrong usage or configuration
  3  no server runs on the data directory; for serve: one runs already
  4  the server refused
  5  the server did not answer in time
"""


def print_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib import metadata  # slow to import

        click.echo(f"atoll {metadata.version('atoll')}")
        context.exit()


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version, help="The version.")
def cli() -> None:
    """A block-storage server of isolated processes that survives the death of any of them."""


# --- serve ----------------------------------------------------------------------------------------------------------


def serve_options(command: F) -> F:
    """What a configuration file says, as options; they win."""
    for option in reversed(
        (
            click.option(
                "--data",
                metavar="DIR",
                envvar="ATOLL_DATA",
                type=click.Path(),
                help=f"Data directory, made if missing.  [default: ./{configuration.DEFAULT_DATA}]",
            ),
            click.option(
                "--listen",
                metavar="HOST:PORT",
                multiple=True,
                help="Listen on TCP; repeatable; port 0 takes a free one.  "
                f"[default: {configuration.DEFAULT_LISTEN} and the socket DATA/{configuration.DEFAULT_UNIX}]",
            ),
            click.option("--unix", metavar="PATH", multiple=True, help="Listen on a Unix socket; repeatable."),
            click.option(
                "--volume",
                "volumes",
                metavar="NAME=SIZE[,ro]",
                multiple=True,
                type=VOLUME,
                help="Make this volume unless it exists; repeatable.  [default: disk=8GiB where there is none]",
            ),
            click.option(
                "--device", metavar="PATH", help="File or block device to store on.  [default: DATA/device.img]"
            ),
            click.option("--device-size", metavar="SIZE", help="Size of a device file to be made.  [default: 8GiB]"),
            click.option(
                "--fast-device", metavar="PATH", help="File or block device for the fast tier.  [default: none]"
            ),
            click.option("--fast-device-size", metavar="SIZE", help="Size of a fast device file to be made."),
            click.option(
                "--sparse", is_flag=True, default=None, help="Do not preallocate the device file; for trials."
            ),
            click.option(
                "--config", "file", metavar="FILE", type=PATH, help="TOML file that says all of this and more."
            ),
        )
    ):
        command = option(command)
    return command


def read_configuration(options: dict[str, Any]) -> dict[str, Any]:
    file = options.pop("file")
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    activated = os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS", "0") != "0"
    return configuration.load(file, options).as_dict(socket_activated=activated)


@cli.command(epilog=EXIT_CODES)
@serve_options
def serve(**options: Any) -> None:
    """Run a server until it is told to stop (atoll stop, SIGTERM, SIGINT)."""
    checked = read_configuration(options)
    from atoll.kernel import init

    sys.exit(init.run(checked))


@cli.group()
def config() -> None:
    """The configuration."""


@config.command("show")
@serve_options
def config_show(**options: Any) -> None:
    """Print, as JSON, what serve would run with: the file, the options and the defaults, checked."""
    emit(read_configuration(options))


cli.add_command(cli_chaos.chaos)
cli.add_command(cli_store.check)
cli.add_command(cli_store.device)
cli.add_command(cli_store.scrub)
cli.add_command(cli_store.du)


# --- Looking --------------------------------------------------------------------------------------------------------


@cli.command()
@data_option
@json_option
def status(data: Path, as_json: bool) -> None:
    """Volumes and their URIs, space, write log, engines, counters."""
    with Client(data) as client:
        document = client.call("status")
    if as_json:
        emit(document)
        return
    from atoll.kernel import show

    show.status(document)


@cli.command()
@data_option
@json_option
@click.option("--watch", is_flag=True, help="Refresh until interrupted.")
@click.option("--interval", metavar="SECONDS", type=seconds(0.05), default=1.0, show_default=True)
def ps(data: Path, as_json: bool, watch: bool, interval: float) -> None:
    """The processes: role, pid, incarnation, state, standby, restarts, uptime, CPU, memory."""
    with Client(data) as client:
        if not watch:
            rows = client.call("ps")["domains"]
            if as_json:
                emit(rows)
            else:
                from atoll.kernel import show

                show.processes(rows)
            return
        if as_json:
            while True:
                click.echo(json.dumps(client.call("ps")["domains"]))
                time.sleep(interval)
        from atoll.kernel import show

        show.watch_processes(lambda: client.call("ps")["domains"], interval)


# --- Killing and stopping -------------------------------------------------------------------------------------------


@cli.command()
@data_option
@json_option
@click.argument("role")
@click.option(
    "--signal",
    "number",
    metavar="NAME",
    default="KILL",
    show_default=True,
    type=SIGNAL,
    help="KILL, SEGV, STOP, ...",
)
def kill(data: Path, as_json: bool, role: str, number: signal.Signals) -> None:
    """Kill the process that plays ROLE; say how long until that was noticed and until its successor served.

    A signal that ends nobody (CONT, WINCH) is sent, and nothing waited for. Who is stopped (STOP) is replaced once work
    waits for it.
    """
    from atoll.kernel import cli_kill

    with Client(data, timeout_s=60.0) as client:
        document = cli_kill.kill(client, role, number)
    if as_json:
        emit(document)
        return
    if document["new_pid"] is None:
        click.echo(f"{role}: process {document['pid']} was sent {document['signal']}, which does not end it")
        return
    noticed = "" if document["detect_ms"] is None else f"noticed after {document['detect_ms']:.2f} ms, "
    click.echo(
        f"{role}: process {document['pid']} ended by {document['signal']}; {noticed}"
        f"process {document['new_pid']} served after {document['serving_ms']:.2f} ms"
    )


@cli.command()
@data_option
@json_option
@click.option(
    "--timeout", "timeout_s", metavar="SECONDS", type=seconds(0), default=60.0, show_default=True,
    help="Wait no longer than this; the server goes on stopping.",
)  # fmt: skip
def stop(data: Path, as_json: bool, timeout_s: float) -> None:
    """Stop the server: what was acknowledged is on the device then.

    Exit status 1 if it is not, because the device failed or the server was ended at once: the next start goes on from
    shared memory.
    """
    from atoll.kernel import cli_kill

    with Client(data) as client:
        took_s, left = cli_kill.stop(client, timeout_s, lambda line: click.echo(f"atoll: {line}", err=True))
    if as_json:
        emit({"stopped": True, "seconds": round(took_s, 3), "left_in_memory": left})
    else:
        click.echo(f"stopped after {took_s:.1f} s")
    if left:
        click.echo(f"atoll: {left}", err=True)
        sys.exit(EXIT_NEGATIVE)


# --- Volumes --------------------------------------------------------------------------------------------------------


@cli.group()
def volume() -> None:
    """Make, list, enlarge, tune and delete volumes."""


def threshold_options(command: F) -> F:
    for option in reversed(
        (
            click.option(
                "--threshold",
                metavar="N",
                type=THRESHOLD,
                help="Share a run of blocks only where N in sequence match blocks stored in sequence (1 to 64).",
            ),
            click.option(
                "--tier-threshold",
                metavar="N",
                type=TIER_THRESHOLD,
                help="References from which on a stored block moves to the fast device.",
            ),
        )
    ):
        command = option(command)
    return command


@volume.command("create")
@data_option
@json_option
@click.argument("name", type=VOLUME_NAME)
@click.argument("size", type=SIZE)
@click.option("--read-only", is_flag=True, help="Clients may not write.")
@threshold_options
def volume_create(
    data: Path, as_json: bool, name: str, size: int, read_only: bool, threshold: int | None, tier_threshold: int | None
) -> None:
    """Make a thin volume NAME of SIZE (such as 8GiB)."""
    configuration.check_volume_size(size)
    with Client(data) as client:
        client.call(
            "volume-create",
            name=name,
            size_bytes=int(size),
            read_only=read_only,
            threshold=threshold or 0,
            tier_threshold=tier_threshold or 0,
        )
        report_volume(client, name, as_json, "created")


@volume.command("set")
@data_option
@json_option
@click.argument("name", type=VOLUME_NAME)
@threshold_options
def volume_set(data: Path, as_json: bool, name: str, threshold: int | None, tier_threshold: int | None) -> None:
    """Change how volume NAME shares blocks, from its next writes on."""
    if threshold is None and tier_threshold is None:
        raise click.UsageError("say what to change: --threshold, --tier-threshold")
    with Client(data) as client:
        client.call("volume-set", name=name, threshold=threshold or 0, tier_threshold=tier_threshold or 0)
        report_volume(client, name, as_json, "changed")


@volume.command("list")
@data_option
@json_option
def volume_list(data: Path, as_json: bool) -> None:
    """List the volumes."""
    with Client(data) as client:
        volumes = client.call("volume-list")["volumes"]
    if as_json:
        emit(volumes)
        return
    from atoll.kernel import show

    show.volumes(volumes)


@volume.command("resize")
@data_option
@json_option
@click.argument("name", type=VOLUME_NAME)
@click.argument("size", type=SIZE)
def volume_resize(data: Path, as_json: bool, name: str, size: int) -> None:
    """Enlarge volume NAME to SIZE."""
    configuration.check_volume_size(size)
    with Client(data) as client:
        client.call("volume-resize", name=name, size_bytes=int(size))
        report_volume(client, name, as_json, "resized")


@volume.command("delete")
@data_option
@json_option
@click.argument("name", type=VOLUME_NAME)
@click.option("--force", is_flag=True, help="Even while a client uses it.")
def volume_delete(data: Path, as_json: bool, name: str, force: bool) -> None:
    """Delete volume NAME and all that it holds."""
    with Client(data) as client:
        client.call("volume-delete", name=name, force=force)
    if as_json:
        emit({"name": name, "deleted": True})
    else:
        click.echo(f"volume {name} deleted")


def report_volume(client: Client, name: str, as_json: bool, done: str) -> None:
    found = [entry for entry in client.call("volume-list")["volumes"] if entry["name"] == name]
    if as_json:
        emit(found[0] if found else {"name": name})
    elif found:
        size = configuration.format_size(found[0]["size_bytes"])
        click.echo(f"volume {name} {done}: {size}{''.join('  ' + uri for uri in found[0].get('uris', []))}")
    else:
        click.echo(f"volume {name} {done}")


# --- Proofs ---------------------------------------------------------------------------------------------------------


@cli.command()
@data_option
@json_option
@click.option("--volume", "volume_name", metavar="NAME", help="Only requests to this volume.")
@click.option(
    "--timeout", "timeout_s", metavar="SECONDS", type=seconds(0.1), default=60.0, show_default=True,
    help="How long to wait for a write, and for a read.",
)  # fmt: skip
@click.option(
    "--only", type=click.Choice(["write", "read", "both"]), default="both", show_default=True, help="What to wait for."
)
def trace(data: Path, as_json: bool, volume_name: str | None, timeout_s: float, only: str) -> None:
    """Follow the next write and the next read through all domains.

    Each hop shows the domain, its incarnation, where the payload lies, and the time since the hop before. The address
    of a write's payload is the same in nbd, dedup and disk, that of a read from the device is the same from disk to
    nic: nothing is copied between domains. Exit status 1 if that is not what was seen.
    """
    from atoll.kernel import cli_trace

    wanted = ("write", "read") if only == "both" else (only,)
    with Client(data) as client:
        document = cli_trace.follow(
            client, volume_name, timeout_s, wanted, lambda line: click.echo(f"atoll: {line}", err=True)
        )
    if as_json:
        emit(document)
    else:
        from atoll.kernel import show

        show.trace(document)
    sys.exit(0 if all(document[kind]["same_address"] for kind in wanted) else EXIT_NEGATIVE)


@cli.command()
@data_option
@json_option
def audit(data: Path, as_json: bool) -> None:
    """Show who can write which memory, as the operating system says; status 1 if any is writable in two processes."""
    from atoll.kernel import audit as auditing

    document = auditing.audit(data)
    if as_json:
        emit(document)
    else:
        from atoll.kernel import show

        show.audit(document)
    sys.exit(0 if document["ok"] else EXIT_NEGATIVE)


@cli.group()
def bench() -> None:
    """Measurements."""


bench.add_command(cli_bench_dedup.dedup)


@bench.command("ring")
@json_option
@plot_option("Draw the figures.")
@click.option(
    "--seconds", type=seconds(0.01, 86400), default=20.0, show_default=True, help="How long to measure, in all."
)
@click.option("--data", hidden=True, help="Not needed: measures on rings of its own.")
def bench_ring(as_json: bool, plot: str | None, seconds: float, data: str | None) -> None:
    """Throughput and round trips of a ring beside other ways between two processes."""
    ring = importlib.import_module("atoll.bench.ring")  # a floor of its own, known by name
    try:
        result = ring.run(seconds, plot)
    except ring.BenchError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        emit(result)
        return
    from atoll.kernel import show

    show.console().print(ring.render(result))


# --- Errors ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """The command, once all is imported (entry.py)."""
    fill_standard_descriptors()
    sys.exit(run(sys.argv[1:]))


def fill_standard_descriptors() -> None:
    """Where one is closed (>&-), what is opened next would take its number, and all that is printed would go there."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", buffering=1, closefd=False)


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit status; what is wrong is one line on standard error."""
    output, at_interrupt = sys.stdout, signal.getsignal(signal.SIGINT)
    try:
        if at_interrupt == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        result = cli.main(arguments, prog_name="atoll", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return EXIT_USAGE
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        return complain(f"{error.format_message()}{hint}", EXIT_USAGE)
    except configuration.ConfigError as error:
        return complain(str(error), EXIT_USAGE)
    except NoServer as error:
        return complain(str(error), EXIT_SERVER)
    except Refused as error:
        return complain(str(error), EXIT_REFUSED)
    except NoAnswer as error:
        return complain(str(error), EXIT_NO_ANSWER)
    except (ControlError, click.ClickException) as error:
        return complain(str(error), EXIT_NEGATIVE)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return say_no_more()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError) or sys.stdout is not output:  # rich has caught it, or click
            return say_no_more()
        raise
    except OSError as error:
        if error.filename is not None and error.strerror is not None:
            return complain(f"{error.filename}: {error.strerror}", EXIT_NEGATIVE)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # of the output, into a file mostly
            say_no_more()
            return complain(f"cannot write: {error.strerror}", EXIT_NEGATIVE)
        raise
    finally:
        if at_interrupt == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def say_no_more() -> int:
    """Standard output takes nothing: whoever reads it has gone (head, less), which is no error, or its disk is full."""
    from atoll.kernel.process import silence  # slow to import

    silence(sys.stdout)
    return 0


def complain(message: str, status: int) -> int:
    click.echo("atoll: " + " ".join(message.split()), err=True)
    return status


if __name__ == "__main__":
    main()
