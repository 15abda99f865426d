"""Damage to pages of metadata at rest: where both copies of each lie on a device, and a bit of them that is flipped.

- `pages_of(image)`                        {(tree, level, number): both places of it}
- `places(image, tree, level, numbers)`    {number: both places}, of one level of a tree; all, if none are named
- `flip(image, blocks)`                    once more undoes it
- `in_memory(device)`                      a device that lies in memory, as these take it
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from atoll.services.dedup.check.image import FileImage, MemoryImage
from atoll.services.dedup.check.reader import Report, Store

Page = tuple[int, int, int]  # tree, level, number
AnyImage = FileImage | MemoryImage


def in_memory(device: Any) -> MemoryImage:
    return MemoryImage(np.frombuffer(device, np.uint8))


def pages_of(image: AnyImage) -> dict[Page, tuple[int, int]]:
    """Of the newest root; none if there is no store."""
    found: dict[Page, tuple[int, int]] = {}
    store = Store.read(image, Report())
    if store is None:
        return found
    for (tree, level), pages in store.trees.items():
        first, second = store.places.of_slots(pages.pointers["slot"])
        for number, *both in zip(pages.numbers.tolist(), first.tolist(), second.tolist(), strict=True):
            found[tree, level, number] = (both[0], both[1])
    return found


def places(
    image: AnyImage, tree: int, level: int, numbers: Collection[int] | None = None
) -> dict[int, tuple[int, int]]:
    found = {
        page[2]: both
        for page, both in pages_of(image).items()
        if page[:2] == (tree, level) and (numbers is None or page[2] in numbers)
    }
    assert found
    return found


def flip(image: AnyImage, blocks: Iterable[int]) -> None:
    for block in blocks:
        data = image.read(block, 1)
        assert data is not None
        image.write(block, data[:77] + bytes([data[77] ^ 1]) + data[78:])
