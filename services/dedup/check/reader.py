"""Reads a store from its device as docs/format.md tells: superblock, metadata log, tree of pages.

- `Report`                 what was found, as `Finding`s
- `Store.read(image, report)`   the newest root with the log replayed over it, or None (the report says why)
- `Store.leaves(...)`, `counts(window)`, `prints(window)`: the replayed metadata, in slices of bounded size

Both copies of everything are read. A copy that is bad is a finding (repairable, if the other is good), except where
power loss may leave one so: log blocks that were not durable yet, one copy of a superblock that was being switched to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atoll.services.dedup.check import layout
from atoll.services.dedup.check.image import Image
from atoll.services.dedup.check.layout import BLOCK_BYTES, Shape

FINDINGS_KEPT = 1000  # beyond these they are only counted
PAGES_AT_ONCE = 2048  # 8 MiB

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Finding:
    kind: str  # superblock, log, page, map, count, volume, total, data, store
    text: str
    repairable: bool  # from what else is on the device
    fields: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "text": self.text, "repairable": self.repairable, **self.fields}


@dataclass
class Report:
    findings: list[Finding] = field(default_factory=list)
    count: int = 0
    beyond_repair: int = 0
    notes: list[str] = field(default_factory=list)  # no inconsistencies
    fatal: str = ""  # why there is no store to speak of
    damaged: bool = True  # with `fatal`: there was one, of this version

    def add(self, kind: str, text: str, repairable: bool = False, **fields: Any) -> None:
        self.count += 1
        self.beyond_repair += not repairable
        if len(self.findings) < FINDINGS_KEPT:
            self.findings.append(Finding(kind, text, repairable, fields))


@dataclass
class Super:
    """A valid superblock."""

    place: int  # 0 … 3: blocks 0, 1, N−2, N−1
    fields: Any  # of layout.SUPER

    def __getattr__(self, name: str) -> int:
        return int(self.fields[name])

    @property
    def store(self) -> int:
        low, high = self.fields["uuid"]
        return int(low) ^ int(high)


def parse_super(data: bytes, place: int) -> Super | str | None:
    """None: not one of ours; text: ours, but not valid."""
    fields = np.frombuffer(data, layout.SUPER, 1)[0]
    if int(fields["magic"]) != layout.SUPER_MAGIC:
        return None
    if int(fields["version"]) != layout.VERSION:
        return f"of format version {int(fields['version'])}, this program reads version {layout.VERSION}"
    seeded = layout.seed(layout.SEED_SUPER, 0, place)
    if layout.checksum(data[8 : layout.SUPER_BYTES], seeded) != int(fields["checksum"]):
        return "its checksum is wrong"
    found = Super(place, fields)
    if found.generation & 1 != place & 1:
        return f"generation {found.generation} does not belong there"
    return found


def read_supers(image: Image, report: Report) -> Super | None:
    """The newest valid superblock; what is wrong with the others is reported."""
    found: dict[int, Super] = {}
    wrong: dict[int, str] = {}

    def look(place: int, block: int) -> None:
        data = image.read(block, 1)
        if data is None:
            wrong[place] = "cannot be read"
            return
        parsed = parse_super(data, place)
        if isinstance(parsed, Super):
            found[place] = parsed
            if any(data[layout.SUPER_BYTES :]):
                report.add(
                    "superblock", f"superblock {place}, block {block}: bytes behind it are not zero", block=block
                )
        else:
            wrong[place] = parsed or ("is blank" if not any(data) else "holds something else")

    look(0, 0)
    look(1, 1)
    ends = {one.device_blocks for one in found.values()} or {image.blocks}
    blocks = max(ends)
    if blocks > image.blocks:
        report.fatal = f"the device has {image.blocks} blocks, its store {blocks}: the device was shortened"
        return None
    look(2, blocks - 2)
    look(3, blocks - 1)
    if not found:
        ours = [text for text in wrong.values() if text not in ("is blank", "holds something else", "cannot be read")]
        versions = [text for text in ours if "version" in text]
        if versions:
            report.fatal, report.damaged = f"the store is {versions[0]}", False
        elif ours:
            report.fatal = f"the store is damaged: no superblock is valid ({ours[0]})"
        else:
            report.fatal, report.damaged = "the device holds no store of ours", False
        return None
    newest = max(found.values(), key=lambda one: one.generation)
    for place, text in sorted(wrong.items()):
        block = (0, 1, blocks - 2, blocks - 1)[place]
        pair = found.get(place ^ 2)
        if text == "is blank" and (pair is None or pair.generation <= 2):
            continue  # a young store has one pair only, or was cut off while it wrote the second
        report.add("superblock", f"superblock {place}, block {block}, {text}", repairable=True, block=block)
    if newest.place < 2 and newest.place + 2 in found and found[newest.place + 2].generation != newest.generation:
        report.notes.append(f"superblock copy 1 of generation {newest.generation} was not written when power failed")
    if newest.place >= 2:
        report.notes.append(f"superblock copy 0 of generation {newest.generation} is not there")
    others = {one.store for one in found.values()}
    if len(others) > 1:
        report.add("superblock", "the superblocks are of different stores")
    return newest


@dataclass
class Log:
    """What replay of the metadata log gives: last values, sorted by first column."""

    end: int = 0  # sequence where it ended
    blocks: int = 0
    map: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.uint64))
    counts: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.uint64))
    prints: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.uint64))
    volumes: dict[int, bytes] = field(default_factory=dict)


class LogReader:
    """Blocks of the log that are right by themselves; parsed once, by their checksum."""

    def __init__(self) -> None:
        self._parsed: dict[int, layout.Records] = {}

    def header(self, data: bytes | None, store: int) -> Any:
        """The header of a valid block, or None."""
        if data is None:
            return None
        header = np.frombuffer(data, layout.LOG_HEADER, 1)[0]
        if int(header["magic"]) != layout.LOG_MAGIC or int(header["version"]) != layout.VERSION:
            return None
        if int(header["used_bytes"]) > BLOCK_BYTES - layout.LOG_HEADER.itemsize or int(header["used_bytes"]) % 8:
            return None
        seeded = layout.seed(layout.SEED_LOG, store, int(header["sequence"]))
        return header if layout.checksum(data[8:], seeded) == int(header["checksum"]) else None

    def records(self, header: Any, data: bytes) -> layout.Records:
        key = int(header["checksum"])
        if key not in self._parsed:
            if len(self._parsed) > 8192:
                self._parsed.clear()
            self._parsed[key] = layout.Records.parse(data, int(header["used_bytes"]))
        return self._parsed[key]


def written(chunk: bytes | None, count: int) -> list[int]:
    """Which of the blocks may be of the log; all of them if they could not be read together."""
    if chunk is None:
        return list(range(count))
    magics = np.frombuffer(chunk, "<u8").reshape(count, -1)[:, 1]
    return [int(index) for index in np.flatnonzero(magics == layout.LOG_MAGIC)]


def read_log(image: Image, root: Super, report: Report, reader: LogReader, progress: Progress = silent) -> Log | None:
    """None: the log does not lead to a consistent end (report.fatal)."""
    count = root.log_blocks
    bases = (layout.log_base(root.device_blocks, count, 0), layout.log_base(root.device_blocks, count, 1))
    durable = root.log_durable  # blocks before this sequence were durable, so both copies are
    good: dict[int, list[tuple[Any, bytes] | None]] = {}  # sequence: of each copy
    for copy, base in enumerate(bases):
        for first in range(0, count, PAGES_AT_ONCE):
            progress("metadata log", copy * count + first, 2 * count)
            size = min(PAGES_AT_ONCE, count - first)
            chunk = image.read(base + first, size)
            for index in written(chunk, size):
                at = index * BLOCK_BYTES
                data = image.read(base + first + index, 1) if chunk is None else chunk[at : at + BLOCK_BYTES]
                header = reader.header(data, root.store)
                if data is None or header is None or int(header["sequence"]) % count != first + index:
                    continue
                sequence = int(header["sequence"])
                good.setdefault(sequence, [None, None])[copy] = (header, data)
                durable = max(durable, int(header["durable"]) if sequence >= root.log_start else 0)
    log, chain, sequence = Log(), root.log_chain, root.log_start
    maps: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    prints: list[np.ndarray] = []
    while sequence - root.log_start < count:
        copies = [
            one if one is not None and int(one[0]["chain"]) == chain else None
            for one in good.get(sequence, [None, None])
        ]
        chosen = copies[0] or copies[1]
        if chosen is None:
            break
        for copy in (0, 1):
            if copies[copy] is None and sequence < durable:
                block = bases[copy] + sequence % count
                report.add("log", f"log block {sequence}, copy {copy} (block {block}) is damaged", True, block=block)
        try:
            records = reader.records(*chosen)
        except layout.RecordError as error:
            report.add("log", f"log block {sequence} (block {bases[0] + sequence % count}): {error}")
            records = layout.Records.parse(chosen[1], 0)
        maps.append(records.map)
        counts.append(records.counts)
        prints.append(records.prints)
        for volume, image_ in records.volumes:
            log.volumes[volume] = image_
        chain = int(chosen[0]["checksum"])
        sequence += 1
    log.end, log.blocks = sequence, sequence - root.log_start
    if sequence < durable:
        places = ", ".join(str(base + sequence % count) for base in bases)
        report.fatal = (
            f"the metadata log ends at block {sequence} (blocks {places} of the device), it was durable to {durable}:"
            " flushed changes are lost"
        )
        return None
    log.map = layout.last_wins(maps, 2)
    log.counts = layout.last_wins(counts, 2)
    log.prints = layout.last_wins(prints, 3)
    return log


@dataclass
class Volume:
    id: int
    generation: int
    state: int
    flags: int
    threshold: int
    name: str
    size_bytes: int
    created_s: int


class Store:
    """The replayed metadata of one store. Pages are read and verified when they are asked for."""

    def __init__(self, image: Image, root: Super, log: Log, report: Report) -> None:
        self.image, self.root, self.log, self.report = image, root, log, report
        self.shape = Shape(root.device_blocks, root.leaf_slots)
        self.first, self.end = layout.usable(root.device_blocks, root.log_blocks)
        self.row = np.zeros(0, layout.POINTER)  # of the pages below the directories
        self.directories = np.zeros(0, layout.POINTER)
        self.bad_copies: list[tuple[int, int]] = []  # (bad block, good block): repairable

    @classmethod
    def read(
        cls, image: Image, report: Report, reader: LogReader | None = None, progress: Progress = silent
    ) -> Store | None:
        root = read_supers(image, report)
        if root is None:
            return None
        if wrong := layout.super_wrong(root.fields):
            report.fatal = f"superblock {root.place}, generation {root.generation}: {wrong}"
            return None
        log = read_log(image, root, report, reader or LogReader(), progress)
        if log is None:
            return None
        store = cls(image, root, log, report)
        return store if store._read_tree() else None

    # --- Pages ------------------------------------------------------------------------------------------------------

    def _read_tree(self) -> bool:
        """The pointers of all pages. False: some directory page is lost in both copies (report.fatal)."""
        shape, found = self.shape, []
        pointers = self.root.fields["roots"][: self.root.root_count].copy()
        for level in range(shape.levels, 0, -1):
            found.append(pointers)
            pages = self.pages(pointers, shape.level_base[level])
            if pages is None:
                self.report.fatal = self.report.findings[-1].text if self.report.findings else "a directory is lost"
                return False
            pointers = pages.reshape(-1).view(layout.POINTER)[: shape.level_count[level - 1]].copy()
        self.row = pointers
        self.directories = np.concatenate(found) if found else np.zeros(0, layout.POINTER)
        return True

    def pages(self, pointers: np.ndarray, first_page: int | np.ndarray) -> np.ndarray | None:
        """Contents of the pages `first_page`... (or of those numbers) that these point to; None if one of them is lost
        in both copies. Damage is reported, once for each reading."""
        contents = np.zeros((len(pointers), BLOCK_BYTES), np.uint8)
        stored = np.flatnonzero(pointers["primary"])
        numbers = first_page + stored if isinstance(first_page, int) else first_page[stored]
        if not len(stored):
            return contents
        lost = False
        wanted = pointers[stored]
        copies = []
        for name in ("primary", "mirror"):
            inside = wanted[name] < self.image.blocks
            blocks, readable = self.image.gather(np.where(inside, wanted[name], 0))
            copies.append((blocks, readable & inside))
        for index in range(len(stored)):
            number, key = int(numbers[index]), int(wanted["key"][index])
            seeded = layout.seed(layout.SEED_PAGE, self.root.store, number ^ key)
            expected = int(wanted["checksum"][index])
            good = [
                readable[index] and layout.checksum(blocks[index], seeded) == expected for blocks, readable in copies
            ]
            if good[0] or good[1]:
                contents[stored[index]] = copies[0 if good[0] else 1][0][index]
            places = [int(wanted["primary"][index]), int(wanted["mirror"][index])]
            for copy in (0, 1):
                if not good[copy] and good[1 - copy]:
                    self.bad_copies.append((places[copy], places[1 - copy]))
                    self.report.add(
                        "page", f"block {places[copy]}, copy {copy} of the {self.shape.name(number, key)}, is damaged;"
                        f" the other copy, block {places[1 - copy]}, is good", True, block=places[copy],
                    )  # fmt: skip
            if not good[0] and not good[1]:
                lost = True
                self.report.add(
                    "page", f"the {self.shape.name(number, key)} is lost: blocks {places[0]} and {places[1]} are both"
                    " damaged", block=places[0], mirror=places[1],
                )  # fmt: skip
        return None if lost else contents

    def table(self, base: int, per_page: int, dtype: str, first: int, end: int) -> np.ndarray:
        """Entries [first, end) of a table of pages, of one dtype; of lost pages zeros."""
        low, high = first // per_page, -(-end // per_page)
        pages = self.pages(self.row[base + low : base + high], base + low)
        if pages is None:
            pages = np.zeros((high - low, BLOCK_BYTES), np.uint8)
        entries = pages.reshape(-1).view(dtype)
        return entries[first - low * per_page : end - low * per_page]

    # --- Replayed metadata ------------------------------------------------------------------------------------------

    def counts(self, first: int, end: int) -> np.ndarray:
        """Reference counts (u32) of the blocks [first, end)."""
        found = self.table(self.shape.refs_base, layout.REFS_PER_PAGE, "<u4", first, end).copy()
        logged = slice_of(self.log.counts, first, end)
        found[(logged[:, 0] - np.uint64(first)).astype(np.int64)] = logged[:, 1].astype(np.uint32)
        return found

    def prints(self, first: int, end: int) -> np.ndarray:
        """Fingerprints of the blocks [first, end): rows of low, high."""
        both = np.dtype([("low", "<u8"), ("high", "<u8")])
        found = self.table(self.shape.prints_base, layout.PRINTS_PER_PAGE, both, first, end)  # type: ignore[arg-type]
        rows = found.view("<u8").reshape(-1, 2).copy()
        logged = slice_of(self.log.prints, first, end)
        rows[(logged[:, 0] - np.uint64(first)).astype(np.int64)] = logged[:, 1:]
        return rows

    def volumes(self) -> dict[int, Volume]:
        """Those that are not free."""
        pages = self.pages(self.row[: layout.VOLUME_PAGES], 0)
        if pages is None:
            pages = np.zeros((layout.VOLUME_PAGES, BLOCK_BYTES), np.uint8)
        table = pages.reshape(-1).view(layout.VOLUME).copy()
        for number, image in self.log.volumes.items():
            if number >= len(table):
                self.report.add("volume", f"the log speaks of volume {number}, there are {len(table)}")
                continue
            table[number] = np.frombuffer(image, layout.VOLUME, 1)[0]
        found = {}
        for number in map(int, np.flatnonzero(table["state"])):
            entry = table[number]
            name = bytes(entry["name"].item() if hasattr(entry["name"], "item") else entry["name"])
            found[number] = Volume(
                int(entry["id"]), int(entry["generation"]), int(entry["state"]), int(entry["flags"]),
                int(entry["threshold"]), name[: int(entry["name_bytes"])].decode(errors="replace"),
                int(entry["size_bytes"]), int(entry["created_s"]),
            )  # fmt: skip
        return found

    def leaves(self, at_once: int = PAGES_AT_ONCE) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All leaves by key, in slices: (first map key of each, its 512 values). Lost leaves are left out."""
        base = self.shape.leaves_base
        pointers = self.row[base:]
        stored = np.flatnonzero(pointers["primary"])
        in_tree = pointers["key"][stored]
        firsts = (in_tree & np.uint64(0xFF << 52)) | (in_tree & np.uint64((1 << 52) - 1)) * np.uint64(512)
        order = np.argsort(firsts, kind="stable")
        stored, firsts = stored[order], firsts[order]
        logged = self.log.map[:, 0] & ~np.uint64(511)
        everything = np.union1d(firsts, logged)
        for begin in range(0, len(everything), at_once):
            keys = everything[begin : begin + at_once]
            values = np.zeros((len(keys), layout.LEAF_ENTRIES), np.uint64)
            low, high = int(np.searchsorted(firsts, keys[0])), int(np.searchsorted(firsts, keys[-1], "right"))
            if high > low:
                numbers = stored[low:high]
                pages = self.pages(pointers[numbers], base + numbers)
                if pages is None:
                    pages = np.zeros((len(numbers), BLOCK_BYTES), np.uint8)
                values[np.searchsorted(keys, firsts[low:high])] = pages.view("<u8")
            changed = self.log.map[
                np.searchsorted(self.log.map[:, 0], keys[0]) : np.searchsorted(
                    self.log.map[:, 0], keys[-1] + np.uint64(511), "right"
                )
            ]
            rows = np.searchsorted(keys, changed[:, 0] & ~np.uint64(511))
            values[rows, (changed[:, 0] & np.uint64(511)).astype(np.int64)] = changed[:, 1]
            yield keys, values


def slice_of(rows: np.ndarray, first: int, end: int) -> np.ndarray:
    """Rows whose first column is in [first, end); they are sorted by it."""
    found: np.ndarray = rows[np.searchsorted(rows[:, 0], first) : np.searchsorted(rows[:, 0], end)]
    return found
