"""The checker as one call, for the command line: `run(path, ...)` -> a document of plain data.

    {"ok": bool, "device": path, "store": {...}, "fatal": text, "count": n, "beyond_repair": n, "findings": [...],
     "notes": [...], "totals": {...}, "usage": [...], "repaired": n, "seconds": s}

`fatal`: there is no store to speak of; then only the findings that led there are in the document.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from atoll.services.dedup.check import repair as repairing
from atoll.services.dedup.check.audit import Totals, audit, usage, verify_data
from atoll.services.dedup.check.image import FileImage
from atoll.services.dedup.check.layout import BLOCK_BYTES, DEVICE_BLOCKS_MAX, EXTENTS, GROUP_BLOCKS
from atoll.services.dedup.check.reader import Progress, Report, Store, silent
from atoll.services.dedup.check.rebuild import rebuild


def run(
    path: Path, *, data: bool = False, repair: bool = False, volumes: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """`data`: every stored block against its fingerprint. `volumes`: what each costs. `repair`: what can be derived is
    written, then all is checked again; the document is of the second check. Raises OSError, ValueError."""
    started = time.monotonic()
    image = FileImage(path, writable=repair)
    try:
        report, store, totals = look(image, data, progress)
        repaired = 0
        if repair and store is not None and totals is not None and report.count:
            for _ in range(3):  # counts first: whether the groups' sums are there is seen then
                if not (done := rebuild(image, store)):
                    break
                repaired += done
                report, store, totals = look(image, False, progress)
                assert store is not None and totals is not None
            repaired += repairing.repair(image, store, totals, report)
            if repaired:
                report, store, totals = look(image, data, progress)
        document: dict[str, Any] = {
            "ok": not report.fatal and not report.count,
            "device": str(path),
            "device_bytes": image.blocks * BLOCK_BYTES,
            "store": None,
            "fatal": report.fatal,
            "damaged": report.damaged,
            "count": report.count,
            "beyond_repair": report.beyond_repair,
            "findings": [finding.as_dict() for finding in report.findings],
            "notes": report.notes,
            "repaired": repaired,
        }
        if store is not None and totals is not None:
            low, high = (int(word) for word in store.root.fields["uuid"])
            document["store"] = {
                "uuid": f"{high << 64 | low:032x}",
                "generation": store.root.generation,
                "store_bytes": store.root.device_blocks * BLOCK_BYTES,
                "grows_from_bytes": (store.root.device_blocks + GROUP_BLOCKS) * BLOCK_BYTES,
                "grows_to_bytes": DEVICE_BLOCKS_MAX * BLOCK_BYTES,
                "growths_left": EXTENTS - store.root.extent_count,
                "log_blocks_replayed": store.log.blocks,
            }
            document["totals"] = totals.as_dict()
            if volumes:
                document["usage"] = usage(store, totals)
        document["seconds"] = round(time.monotonic() - started, 3)
        return document
    finally:
        image.close()


def look(image: FileImage, data: bool, progress: Progress) -> tuple[Report, Store | None, Totals | None]:
    report = Report()
    store = Store.read(image, report, progress=progress)
    if store is None:
        return report, None, None
    totals = audit(store, report, progress)
    if data:
        verify_data(store, report, totals, progress)
    return report, store, totals
