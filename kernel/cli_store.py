"""`atoll check`, `atoll scrub`, `atoll du`, `atoll device`: their options. The offline work is done by the checker of
services/dedup/check (named as text: the kernel imports no service), the online work by the running dedup.
"""

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from atoll.kernel import config as configuration
from atoll.kernel.cli_options import EXIT_NEGATIVE, EXIT_SERVER, EXIT_USAGE, PATH, SIZE, emit, json_option, seconds
from atoll.kernel.client import Client, NoAnswer, NoServer

CHECKER = "atoll.services.dedup.check.run"

POLL_S = 0.2
LINES_SHOWN = 100

data_option = click.option(
    "--data", metavar="DIR", envvar="ATOLL_DATA", type=PATH,
    help=f"Data directory of the server.  [env var: ATOLL_DATA; default: ./{configuration.DEFAULT_DATA}]",
)  # fmt: skip
device_option = click.option(
    "--device", metavar="PATH", type=PATH,
    help="The device, where the data directory does not tell; without a data directory it is looked at by itself.",
)  # fmt: skip


def fail(text: str, status: int) -> None:
    click.echo("atoll: " + " ".join(text.split()), err=True)
    sys.exit(status)


@contextmanager
def offline(folder: Path | None, device: Path | None, hint: str) -> Iterator[Any]:
    """The store of a server that does not run; ends the program with its status if it cannot be had. `hint`: what to do
    if one runs."""
    from atoll.kernel.instance import BootError
    from atoll.kernel.offline import open_store

    try:
        opened = open_store(folder or Path(configuration.DEFAULT_DATA), device, folder is not None)
    except BootError as error:
        fail(f"{error} ({hint})" if error.status == EXIT_SERVER else str(error), error.status)
        return
    try:
        yield opened
    except BootError as error:
        fail(str(error), error.status)
    finally:
        opened.close()


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, if people look at it."""
    if not wanted or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=max(1, total))

        yield show


# --- check ------------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("folder", metavar="[DIR]", required=False, type=PATH)
@data_option
@json_option
@device_option
@click.option("--verify-data", is_flag=True, help="Also read every stored block and compare its fingerprint.")
@click.option("--repair", is_flag=True, help="Write what follows from the rest of the device; nothing is invented.")
@click.option("--live", is_flag=True, help="Instead: recount what the running server holds in memory.")
@click.option(
    "--timeout", "timeout_s", metavar="SECONDS", type=seconds(0.1), default=60.0, show_default=True,
    help="With --live: how long the recount may take; requests wait meanwhile.",
)  # fmt: skip
def check(
    folder: Path | None, data: Path | None, as_json: bool, device: Path | None, verify_data: bool, repair: bool,
    live: bool, timeout_s: float,
) -> None:  # fmt: skip
    """Check the store of a server that does not run: everything on the device that is said twice must agree.

    Reads superblocks, metadata log and all metadata pages, both copies of each, and recounts map, reference counts and
    sums. Only --repair writes. Exit status 1 if anything is wrong, 2 if there is no store.
    """
    folder = folder or data
    if live:
        if device is not None or verify_data or repair:
            raise click.UsageError("--live looks at the memory of a running server: it takes no --device, --verify-data"
                                   " or --repair (the device of a running server: atoll scrub)")  # fmt: skip
        check_live(folder or Path(configuration.DEFAULT_DATA), as_json, timeout_s)
        return
    with offline(folder, device, "stop it, or look at it as it runs: atoll check --live, atoll scrub") as store:
        if repair and store.unflushed:
            fail(f"{store.unflushed}; then check and repair", EXIT_USAGE)
        with progress_bar(not as_json) as progress:
            document = call_checker(store.device, data=verify_data, repair=repair, progress=progress)
        if store.unflushed:
            document["notes"].append(store.unflushed)
    if as_json:
        emit(document)
    else:
        from atoll.kernel import show_store

        show_store.check(document, LINES_SHOWN)
    if document["fatal"]:
        sys.exit(EXIT_NEGATIVE if document["damaged"] else EXIT_USAGE)
    sys.exit(0 if document["ok"] else EXIT_NEGATIVE)


def call_checker(device: Path, **options: Any) -> dict[str, Any]:
    checker = importlib.import_module(CHECKER)
    try:
        found: dict[str, Any] = checker.run(device, **options)
    except ValueError as error:
        fail(str(error), EXIT_USAGE)
        raise AssertionError("fail does not return") from None
    return found


def check_live(folder: Path, as_json: bool, timeout_s: float) -> None:
    with Client(folder, timeout_s=timeout_s) as client:
        answer = client.call("call", role="dedup", message={"call": "check"}, timeout_s=timeout_s)["answer"]
    document = {"ok": answer["count"] == 0, "count": answer["count"], "inconsistencies": answer["inconsistencies"]}
    if as_json:
        emit(document)
    else:
        for line in document["inconsistencies"]:
            click.echo(line)
        if len(document["inconsistencies"]) < document["count"]:
            click.echo(f"... {document['count'] - len(document['inconsistencies'])} more")
        if document["ok"]:
            click.echo("map, counts, log, lent pages and pins agree")
    sys.exit(0 if document["ok"] else EXIT_NEGATIVE)


# --- device -----------------------------------------------------------------------------------------------------------


@click.group()
def device() -> None:
    """The storage device."""


@device.command("grow")
@data_option
@json_option
@device_option
@click.argument("size", type=SIZE)
@click.option("--sparse", is_flag=True, help="Do not preallocate what is added to the device file.")
def device_grow(data: Path | None, as_json: bool, device: Path | None, size: int, sparse: bool) -> None:
    """Enlarge the device to SIZE: the file is made longer, and the next `atoll serve` uses all of it.

    The server must have been stopped. The store is checked first. Of a block device, which must have been enlarged
    before, all is used; SIZE is what it must have at least.
    """
    folder = data or Path(configuration.DEFAULT_DATA)
    if size == 0 or size % 4096:
        raise click.UsageError(f"SIZE is {size} bytes, no multiple of 4096")
    with offline(folder, device, "atoll stop, atoll device grow, atoll serve") as store:
        with progress_bar(not as_json) as progress:
            document = call_checker(store.device, progress=progress)
        if document["fatal"] or not document["ok"]:
            what = document["fatal"] or f"{document['count']} inconsistencies"
            fail(f"{store.device}: not grown: {what} (atoll check {folder})", EXIT_NEGATIVE)
        used = document["device_bytes"] if store.device.is_block_device() else size
        if used >= document["device_bytes"] and (why := cannot_grow(document["store"], used)):
            fail(f"{store.device}: not grown: {why}", EXIT_NEGATIVE)
        from atoll.kernel.offline import enlarge

        before, after = enlarge(store, size, sparse)
    if as_json:
        emit({"device": str(store.device), "bytes_before": before, "device_bytes": after})
    else:
        click.echo(
            f"{store.device}: {configuration.format_size(before)} before, {configuration.format_size(after)} now;"
            " the next atoll serve uses all of it"
        )


def cannot_grow(store: dict[str, Any], size: int) -> str:
    """Why the next start would not use a device of that size; empty if it will."""
    shown = configuration.format_size
    if store["growths_left"] == 0:
        return "it was grown as often as a store can be: copy its volumes to a new one"
    if size < store["grows_from_bytes"]:
        return f"of less than {shown(store['grows_from_bytes'])} a store of {shown(store['store_bytes'])} makes no use"
    if size > store["grows_to_bytes"]:
        return f"a store has at most {shown(store['grows_to_bytes'])}"
    return ""


# --- scrub, du --------------------------------------------------------------------------------------------------------


def ask(client: Client, call: str, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = client.call("call", role="dedup", message={"call": call, **fields}, timeout_s=30)["answer"]
    return {key: value for key, value in found.items() if key not in ("ok", "v")}


def patiently(client: Client, call: str, **fields: Any) -> dict[str, Any]:
    """Asked again if the kernel is replaced meanwhile: for calls that may be repeated."""
    for attempt in range(5):
        try:
            return ask(client, call, **fields)
        except NoAnswer:
            if attempt == 4:
                raise
            time.sleep(POLL_S)
    raise AssertionError("the last attempt returns or raises")


@click.command()
@data_option
@json_option
@click.option(
    "--rate", metavar="SIZE", default="64MiB", show_default=True, type=SIZE,
    help="Bytes read in a second at most; 0: no limit.",
)  # fmt: skip
@click.option("--background", is_flag=True, help="Do not wait for its end: atoll status shows it.")
@click.option("--cancel", is_flag=True, help="End the scrub that runs.")
def scrub(data: Path | None, as_json: bool, rate: int, background: bool, cancel: bool) -> None:
    """Read every stored block from the device of the running server and compare it with its fingerprint.

    Client requests come first. A scrub that runs already is joined, and goes on at the new rate; it goes on over kills
    of any domain, and when this command is interrupted. Exit status 1 if anything is damaged.
    """
    folder = data or Path(configuration.DEFAULT_DATA)
    if 0 < rate < 4096:
        raise click.BadParameter("at least 4096 bytes a second, or 0", param_hint="--rate")
    with Client(folder, timeout_s=30.0) as client:
        if cancel:
            document = patiently(client, "scrub-cancel")
        else:
            document = patiently(client, "scrub-start", rate_bytes_s=rate)
        number = document["number"]
        with progress_bar(not as_json and not background and not cancel) as progress:
            while not background and not cancel and document["state"] not in ("done", "cancelled"):
                seen = document["verified_bytes"] + document["changed_bytes"] + 4096 * document["damaged_count"]
                progress(f"scrub: {document['state']}", seen, document["stored_bytes"])
                time.sleep(POLL_S)
                document = patiently(client, "scrub-status")
                if document["number"] != number:
                    fail("the server was started anew meanwhile: the scrub is gone", EXIT_NEGATIVE)
    if as_json:
        emit(document)
    else:
        from atoll.kernel import show_store

        show_store.scrub(document)
    sys.exit(EXIT_NEGATIVE if document["damaged_count"] or document["lost_pages"] else 0)


@click.command()
@data_option
@json_option
@device_option
def du(data: Path | None, as_json: bool, device: Path | None) -> None:
    """What each volume costs: mapped; alone: its distinct blocks; shared: those that others have too; freed if deleted.

    Of a running server it is counted in the background (64 MiB of memory, one pass over the block map for each 128 GiB
    of device); of one that does not run it is read from the device.
    """
    folder = data or Path(configuration.DEFAULT_DATA)
    try:
        document = du_online(folder, as_json)
    except NoServer:
        with offline(data, device, "it is starting or stopping") as store, progress_bar(not as_json) as progress:
            checked = call_checker(store.device, volumes=True, progress=progress)
        if not checked["ok"]:
            fail(f"{store.device}: {checked['fatal'] or 'not consistent'} (atoll check)", EXIT_NEGATIVE)
        document = {"volumes": checked["usage"], "total": sums(checked["usage"]), "stored_bytes":
                    checked["totals"]["stored_bytes"]}  # fmt: skip
    if as_json:
        emit(document)
        return
    from atoll.kernel import show_store

    show_store.usage(document)


def sums(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {
        key: sum(row[key] for row in rows) for key in ("mapped_bytes", "alone_bytes", "shared_bytes", "freed_bytes")
    }


def du_online(folder: Path, as_json: bool) -> dict[str, Any]:
    with Client(folder, timeout_s=60.0) as client:
        client.call("ps")
        with progress_bar(not as_json) as progress:
            while True:  # a dedup that dies loses its count: it is begun again
                patiently(client, "flush")  # what is in the write log only has no place yet
                number = patiently(client, "du-start")["number"]
                document = patiently(client, "du-status")
                while document["running"] and document["number"] == number:
                    progress("block map", int(1000 * document["done"]), 1000)
                    time.sleep(POLL_S / 4)
                    document = patiently(client, "du-status")
                if document["number"] == number:
                    break
        stored = client.call("status")["dedup"]["stored_bytes"]
    return {"volumes": document["volumes"], "total": document["total"], "stored_bytes": stored,
            "lost_leaves": document["lost_leaves"]}  # fmt: skip
