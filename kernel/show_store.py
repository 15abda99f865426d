"""What `atoll check`, `atoll scrub` and `atoll du` show to people. Takes the documents that `--json` prints."""

import time
from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from atoll.kernel.config import format_size
from atoll.kernel.show import console, duration, size, table, text


def check(document: Mapping[str, Any], most: int) -> None:
    out = console()
    for finding in document["findings"][:most]:
        style = "yellow" if finding["repairable"] else "red"
        out.print(f"[{style}]{finding['kind']}[/]: {escape(finding['text'])}")
    if document["count"] > most:
        out.print(f"... {document['count'] - most} more")
    for note in document["notes"]:
        out.print(f"note: {escape(note)}", style="dim")
    if document["fatal"]:
        out.print(f"[red]{escape(document['device'])}: {escape(document['fatal'])}[/]")
        return
    totals, store = document["totals"], document["store"]
    out.print(
        f"{escape(document['device'])}: store {store['uuid']}, {format_size(store['store_bytes'])},"
        f" {len(totals['volumes'])} volumes"
    )
    out.print(
        f"{size(totals['referenced_bytes'])} of data in {size(totals['stored_bytes'])}, metadata"
        f" {size(totals['metadata_bytes'])}"
        + (f", {size(totals['verified_bytes'])} compared with their fingerprints" if totals["verified_bytes"] else "")
    )
    if document["repaired"]:
        out.print(f"{document['repaired']} things were repaired, then all was checked again")
    if document["ok"]:
        out.print(f"everything agrees (checked in {duration(document['seconds'])})", style="green")
        return
    count, lost = document["count"], document["beyond_repair"]
    out.print(
        f"{count} inconsistenc{'y' if count == 1 else 'ies'}, {lost} of them beyond repair"
        + ("" if lost == count else "; atoll check --repair puts the others right"),
        style="red",
    )


def usage(document: Mapping[str, Any]) -> None:
    out = console()
    drawn = table("volume", "mapped", "alone", "shared", "freed if deleted",
                  right=("mapped", "alone", "shared", "freed if deleted"))  # fmt: skip
    for row in [*document["volumes"], {"name": "all", **document["total"]}]:
        drawn.add_row(escape(row["name"]), *(size(row.get(f"{key}_bytes")) for key in COLUMNS))
    out.print(drawn)


COLUMNS = ("mapped", "alone", "shared", "freed")


def scrub(document: Mapping[str, Any]) -> None:
    out = console()
    for bad in document["damaged"]:
        where = ", ".join(f"{text(each['volume'])} block {each['lba']}" for each in bad["referrers"])
        more = bad["referrer_count"] - len(bad["referrers"])
        out.print(
            f"[red]block {bad['pba']}[/] {escape(bad['text'])}; it is {where or 'nowhere in a volume'}"
            + (f" and {more} more" if more > 0 else "")
        )
    if document["damaged_count"] > len(document["damaged"]):
        out.print(f"... {document['damaged_count'] - len(document['damaged'])} more")
    out.print(scrub_line(document))


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def scrub_line(document: Mapping[str, Any]) -> str:
    """One line, for `atoll status` too."""
    if document["state"] == "never":
        return "never"
    seen = f"{size(document['verified_bytes'])} of {size(document['stored_bytes'])} are right"
    bad = "none is damaged"
    if document["damaged_count"]:
        bad = f"[red]{_count(document['damaged_count'], 'block is', 'blocks are')} damaged[/]"
    if document["repaired_pages"]:
        pages = _count(document["repaired_pages"], "page of metadata was", "pages of metadata were")
        bad += f", {pages} repaired from the second copy"
    if document["lost_pages"]:
        bad += f", [red]{_count(document['lost_pages'], 'page of metadata is', 'pages of metadata are')} lost[/]"
    when = f" {time.strftime('%Y-%m-%d %H:%M', time.localtime(document['ended_s']))}" if document["ended_s"] else ""
    state = document["state"] if document["ended_s"] else f"running ({document['state']})"
    return f"{state}{when}: {seen}, {bad}"
