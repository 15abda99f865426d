"""Pages that are lost in both copies and follow from what is not: reference counts from the map, the groups' sums from
the counts, the slots in use from the directories. Those of the map that volumes in deletion had are given up.

- `rebuild(image, store)` -> how many pages were written

As a checkpoint does it: pages go to free slots, then their directories, level by level, at last the slot tree and a
superblock of the next generation. So power loss leaves the store as it was, or with the pages. They say how it is at
the end of the log, which changes nothing when it is replayed over them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from atoll.services.dedup.check import layout
from atoll.services.dedup.check.audit import WINDOW_BLOCKS, windows
from atoll.services.dedup.check.image import FileImage
from atoll.services.dedup.check.layout import BLOCK_BYTES, GROUP_BLOCKS, POINTERS, TOP_LEVEL
from atoll.services.dedup.check.reader import Store
from atoll.services.dedup.check.repair import next_root, switch

Page = tuple[int, int, int]  # tree, level, number


class NoSlot(Exception):
    """More pages are lost than free slots are there. What was written is in slots that are free."""


def rebuild(image: FileImage, store: Store) -> int:
    trees = store.derived()
    try:
        return Rebuild(image, store, trees).run() if trees else 0
    except NoSlot:
        return 0


class Rebuild:
    def __init__(self, image: FileImage, store: Store, trees: set[int]) -> None:
        self.image, self.store, self.trees = image, store, trees
        self.fields = next_root(image, store)
        self.known: dict[Page, np.void] = {}  # pointers of the pages that there are
        for (tree, level), pages in store.trees.items():
            for number, pointer in zip(pages.numbers.tolist(), pages.pointers, strict=True):
                self.known[tree, level, number] = pointer
        self.used = self._used()
        self.free = self._free()
        self.written = 0

    def run(self) -> int:
        blocks = self.store.root.device_blocks
        if layout.TREE_MAP in self.trees:
            self._give_up(layout.TREE_MAP)
            self.fields["map_pages"] = sum(tree == layout.TREE_MAP for tree, _, _ in self.known)
        if layout.TREE_REFS in self.trees:
            self._tree(layout.TREE_REFS, self._counts(self._lost(layout.TREE_REFS, -(-blocks // GROUP_BLOCKS))))
        if layout.TREE_GROUPS in self.trees:
            each = GROUP_BLOCKS * layout.GROUPS_PER_PAGE
            self._tree(layout.TREE_GROUPS, self._sums(self._lost(layout.TREE_GROUPS, -(-blocks // each))))
        self._slots()
        self.image.flush()
        switch(self.image, self.fields)
        return self.written

    # --- What they hold ---------------------------------------------------------------------------------------------

    def _lost(self, tree: int, end: int) -> np.ndarray:
        """Numbers of the pages of level 0 that are lost, or behind a lost directory."""
        found = np.zeros(end, bool)
        for other, level, number in self.store.lost:
            if other == tree:
                found[number << 8 * level : (number + 1) << 8 * level] = True
        return np.flatnonzero(found)

    def _recount(self, first: int, end: int) -> np.ndarray:
        found = np.zeros(end - first, "<u4")
        for _, values in self.store.leaves():
            places = layout.numbers(values[layout.kinds(values) == layout.KIND_PBA])
            places = places[(places >= first) & (places < end)]
            named, times = np.unique(places - np.uint64(first), return_counts=True)
            found[named.astype(np.int64)] += times.astype(np.uint32)
        found[~self.store.places.data_mask(first, end)] = 0
        return found

    def _counts(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for first, end in windows(0, len(numbers) and (int(numbers[-1]) + 1) * GROUP_BLOCKS, WINDOW_BLOCKS):
            mine = numbers[(numbers * GROUP_BLOCKS >= first) & (numbers * GROUP_BLOCKS < end)]
            found = self._recount(first, end) if len(mine) else np.zeros(0, "<u4")
            for number in mine.tolist():
                yield number, found[number * GROUP_BLOCKS - first :][:GROUP_BLOCKS].view(np.uint8)

    def _sums(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        blocks, each = self.store.root.device_blocks, GROUP_BLOCKS * layout.GROUPS_PER_PAGE
        lost = set(self._lost(layout.TREE_REFS, -(-blocks // GROUP_BLOCKS)).tolist())
        for number in numbers.tolist():
            first, end = number * each, min((number + 1) * each, blocks)
            counts = np.zeros(each, "<u4")
            counts[: end - first] = self.store.counts(first, end)
            if any(group in lost for group in range(first // GROUP_BLOCKS, -(-end // GROUP_BLOCKS))):
                recounted = self._recount(first, end)
                for group in range(first // GROUP_BLOCKS, -(-end // GROUP_BLOCKS)):
                    within = slice(group * GROUP_BLOCKS - first, min((group + 1) * GROUP_BLOCKS, end) - first)
                    if group in lost:
                        counts[within] = recounted[within]
            yield number, (counts != 0).reshape(-1, GROUP_BLOCKS).sum(axis=1).astype("<u2").view(np.uint8)

    # --- Where they go ----------------------------------------------------------------------------------------------

    def _used(self) -> np.ndarray:
        """A flag per slot that holds a page, by the slot tree or the directories."""
        slots = self.store.places.slots
        table = self.store.table(layout.TREE_SLOTS, BLOCK_BYTES, np.uint8, 0, -(-slots // 8))  # of lost ones zeros
        found: np.ndarray = np.unpackbits(table, bitorder="little")[:slots].astype(bool)
        for (tree, _, _), pointer in self.known.items():
            if tree != layout.TREE_SLOTS and int(pointer["slot"]) < slots:
                found[int(pointer["slot"])] = True
        return found

    def _free(self) -> Iterator[int]:
        """None that the present root uses."""
        for slot in np.flatnonzero(~self.used).tolist():
            if slot % layout.SLOTS_PER_PAGE >= layout.SLOTS_RESERVED:
                yield slot

    def _write(self, page: Page, content: np.ndarray, slot: int) -> np.void:
        padded = np.zeros(BLOCK_BYTES, np.uint8)
        padded[: len(content)] = content
        pointer = np.zeros(1, layout.POINTER)[0]
        seeded = layout.seed(layout.SEED_PAGE, self.store.root.store, layout.page_id(*page))
        pointer["checksum"], pointer["slot"] = layout.checksum(padded, seeded), slot
        for places in self.store.places.of_slots(np.array([slot], np.uint32)):
            self.image.write(int(places[0]), padded.tobytes())
        self.written += 1
        return pointer

    def _put(self, page: Page, content: np.ndarray) -> None:
        """A page of zeros has no place. What was there before is free with the next root."""
        old = self.known.pop(page, None)
        if content.any():
            if (slot := next(self.free, None)) is None:
                raise NoSlot
            self.known[page] = self._write(page, content, slot)
            self.used[int(self.known[page]["slot"])] = True
        if old is not None:
            self.used[int(old["slot"])] = False

    def _directory(self, page: Page) -> np.ndarray:
        """Its pointers, those of the pages below it that there are."""
        tree, level, number = page
        found = np.zeros(POINTERS, layout.POINTER)
        for child in range(number * POINTERS, (number + 1) * POINTERS):
            if (tree, level - 1, child) in self.known:
                found[child % POINTERS] = self.known[tree, level - 1, child]
        return found.view(np.uint8)

    def _tree(self, tree: int, leaves: Iterator[tuple[int, np.ndarray]]) -> None:
        changed = {number for lost, level, number in self.store.lost if lost == tree and level == 1}
        for number, content in leaves:
            self._put((tree, 0, number), content)
            changed.add(number // POINTERS)
        for level in range(1, TOP_LEVEL[tree] + 1):
            for number in sorted(changed):
                self._put((tree, level, number), self._directory((tree, level, number)))
            changed = {number // POINTERS for number in changed}
        top = self.known.get((tree, TOP_LEVEL[tree], 0))
        self.fields["roots"][tree] = top if top is not None else np.zeros(1, layout.POINTER)[0]

    def _give_up(self, tree: int) -> None:
        """Its lost pages, and what they led to: as if they were zeros."""
        lost = [(level, number) for other, level, number in self.store.lost if other == tree]
        for level, number in lost:
            self._put((tree, level, number), np.zeros(0, np.uint8))
        for level in range(1, TOP_LEVEL[tree] + 1):
            for number in sorted({number >> 8 * (level - below) for below, number in lost if below < level}):
                self._put((tree, level, number), self._directory((tree, level, number)))
        top = self.known.get((tree, TOP_LEVEL[tree], 0))
        self.fields["roots"][tree] = top if top is not None else np.zeros(1, layout.POINTER)[0]

    def _slots(self) -> None:
        """Each page goes to that of its two places which the present root does not use."""
        tree = layout.TREE_SLOTS  # where a directory of another tree is lost, what it led to stays in use
        if not any(level for other, level, _ in self.store.lost if other not in self.trees):
            self.used[:] = False
            for (other, _, _), pointer in self.known.items():
                self.used[int(pointer["slot"])] |= other != tree
        bits = np.packbits(self.used, bitorder="little")
        pages = -(-len(bits) // BLOCK_BYTES)
        numbers: set[int] = set(range(pages))
        for level in range(TOP_LEVEL[tree] + 1):
            for number in sorted(numbers):
                page = (tree, level, number)
                content = self._directory(page) if level else bits[number * BLOCK_BYTES :][:BLOCK_BYTES]
                old = self.known.pop(page, None)
                first, second = layout.own_slots(level, number)
                if content.any():
                    self.known[page] = self._write(
                        page, content, second if old is not None and old["slot"] == first else first
                    )
            numbers = {number // POINTERS for number in numbers}
        top = self.known.get((tree, TOP_LEVEL[tree], 0))
        self.fields["roots"][tree] = top if top is not None else np.zeros(1, layout.POINTER)[0]
