"""Puts right what follows from the rest of the device; invents nothing.

- `repair(image, store, totals, report)` -> how many things were changed

A bad copy is written again from the good one.
"""

from __future__ import annotations

from atoll.services.dedup.check.audit import Totals
from atoll.services.dedup.check.image import FileImage
from atoll.services.dedup.check.reader import Report, Store


def repair(image: FileImage, store: Store, totals: Totals, report: Report) -> int:
    done = 0
    for bad, good in store.bad_copies:
        data = image.read(good, 1)
        if data is not None:
            image.write(bad, data)
            done += 1
    image.flush()
    return done
