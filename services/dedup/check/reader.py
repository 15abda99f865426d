"""Reads a store from its device as docs/format.md tells: superblock, metadata log, tree of pages.

- `Report`                 what was found, as `Finding`s
- `Store.read(image, report)`   the newest root with the log replayed over it, or None (the report says why)
- `Store.leaves(...)`, `counts(window)`, `prints(window)`: the replayed metadata, in slices of bounded size

Both copies of everything are read. A copy that is bad is a finding (repairable, if the other is good), except where
power loss may leave one so: log blocks that were not durable yet, one copy of a superblock that was being switched to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from atoll.services.dedup.check import layout
from atoll.services.dedup.check.image import Image
from atoll.services.dedup.check.layout import BLOCK_BYTES

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

    def mend(self, texts: set[str]) -> None:
        """What was reported so can be repaired after all."""
        self.beyond_repair -= len(texts)
        self.findings = [replace(one, repairable=True) if one.text in texts else one for one in self.findings]


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


def parse_super(data: bytes, place: int, block: int) -> Super | str | None:
    """None: not one of ours; text: ours, but not valid."""
    fields = np.frombuffer(data, layout.SUPER, 1)[0]
    if int(fields["magic"]) != layout.SUPER_MAGIC:
        return None
    if int(fields["version"]) not in layout.VERSIONS:
        reads = " and ".join(map(str, layout.VERSIONS))
        return f"of format version {int(fields['version'])}, this program reads versions {reads}"
    seeded = layout.seed(layout.SEED_SUPER, 0, place)
    if layout.checksum(data[8 : layout.SUPER_BYTES], seeded) != int(fields["checksum"]):
        return "its checksum is wrong"
    found = Super(place, fields)
    if found.generation & 1 != place & 1:
        return f"generation {found.generation} does not belong there"
    if block != layout.super_block(found.device_blocks, place):
        return f"is of a store of {found.device_blocks} blocks, which does not end there"
    return found


def read_supers(image: Image, report: Report) -> tuple[Super | None, dict[int, Super]]:
    """The newest valid superblock, and all by their places; what is wrong with the others is reported."""
    found: dict[int, Super] = {}
    wrong: dict[int, str] = {}
    looked: dict[int, int] = {}  # block of each place

    def look(place: int, *blocks: int) -> None:
        """The newest at one of the blocks; if there is none, what is wrong with the first."""
        tails = {}
        for block in blocks:
            data = image.read(block, 1)
            parsed = parse_super(data, place, block) if data is not None else "cannot be read"
            if isinstance(parsed, Super):
                if place not in found or parsed.generation > found[place].generation:
                    found[place], looked[place] = parsed, block
                    tails[block] = data is not None and any(data[layout.SUPER_BYTES :])
            elif block == blocks[0]:
                wrong[place] = parsed or ("is blank" if data is not None and not any(data) else "holds something else")
        if place not in found:
            looked[place] = blocks[0]
            return
        wrong.pop(place, None)
        if tails[block := looked[place]]:
            report.add("superblock", f"superblock {place}, block {block}: bytes behind it are not zero", block=block)

    look(0, 0)
    look(1, 1)
    # The second copies stand at the end of the store that each tells of; a growth between two generations moved it. One
    # whose first copy is gone may be at the end of the device, at that of the other generation, or where a store ended
    # before it grew; a newer one than the first copy at the end of the device, if power failed while it was written.
    ends = {one.device_blocks for one in found.values()}
    beyond = [end for end in ends if end > image.blocks]
    if beyond:
        report.fatal = f"the device has {image.blocks} blocks, its store {max(beyond)}: the device was shortened"
        return None, found
    for one in found.values():
        ends.update(first for first, _, _ in layout.Places(one.fields).extents[1:])
    for place in (2, 3):
        own = [found[place - 2].device_blocks] if place - 2 in found else sorted(ends, reverse=True)
        blocks = [layout.super_block(end, place) for end in (*own, image.blocks)]
        look(place, *dict.fromkeys(blocks))
    if not found:
        ours = [text for text in wrong.values() if text not in ("is blank", "holds something else", "cannot be read")]
        versions = [text for text in ours if "version" in text]
        if versions:
            report.fatal, report.damaged = f"the store is {versions[0]}", False
        elif ours:
            report.fatal = f"the store is damaged: no superblock is valid ({ours[0]})"
        else:
            report.fatal, report.damaged = "the device holds no store of ours", False
        return None, found
    newest = max(found.values(), key=lambda one: one.generation)
    for place, text in sorted(wrong.items()):
        block = looked[place]
        pair = found.get(place ^ 2)
        if text == "is blank" and (pair is None or pair.generation <= 2):
            continue  # a young store has one pair only, or was cut off while it wrote the second
        report.add("superblock", f"superblock {place}, block {block}, {text}", pair is not None, block=block)
    if newest.place < 2 and newest.place + 2 in found and found[newest.place + 2].generation != newest.generation:
        report.notes.append(f"superblock copy 1 of generation {newest.generation} was not written when power failed")
    if newest.place >= 2:
        report.notes.append(f"superblock copy 0 of generation {newest.generation} is not there")
    others = {one.store for one in found.values()}
    if len(others) > 1:
        report.add("superblock", "the superblocks are of different stores")
    return newest, found


@dataclass
class Log:
    """What replay of the metadata log gives: last values, sorted by first column."""

    end: int = 0  # sequence where it ended
    chain: int = 0  # checksum of the block before
    blocks: int = 0
    bad_copies: list[tuple[int, int]] = field(default_factory=list)  # (bad block, good block)
    torn: list[tuple[int, int]] = field(default_factory=list)  # the same, of what was not durable yet: no damage
    map: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.uint64))
    counts: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.uint64))
    prints: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.uint64))
    volumes: dict[int, bytes] = field(default_factory=dict)
    stored: int = 0  # sums: layout.Records
    zeros: int = 0
    mapped: dict[int, int] = field(default_factory=dict)


class LogReader:
    """Blocks of the log that are right by themselves; parsed once, by their checksum."""

    def __init__(self) -> None:
        self._parsed: dict[int, layout.Records] = {}

    def header(self, data: bytes | None, store: int) -> Any:
        """The header of a valid block, or None."""
        if data is None:
            return None
        header = np.frombuffer(data, layout.LOG_HEADER, 1)[0]
        if int(header["magic"]) != layout.LOG_MAGIC or int(header["version"]) not in layout.VERSIONS:
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


def data_there(image: Image, records: layout.Records) -> bool:
    """The data blocks that a log block is about and leaves with a reference have the fingerprints that it names."""
    left = layout.last_wins([records.counts], 2)
    prints = layout.last_wins([records.prints], 3)
    prints = prints[np.isin(prints[:, 0], left[left[:, 1] != 0, 0])]
    blocks, readable = image.gather(prints[:, 0])
    return bool(readable.all()) and all(
        layout.fingerprint(block) == int(high) << 64 | int(low)
        for block, (_, low, high) in zip(blocks, prints, strict=True)
    )


def read_log(image: Image, root: Super, report: Report, reader: LogReader, progress: Progress = silent) -> Log | None:
    """None: the log does not lead to a consistent end (report.fatal)."""
    count = root.log_blocks
    bases = layout.Places(root.fields).log
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

    def copies_of(sequence: int, chain: int) -> list[tuple[Any, bytes] | None]:
        both = good.get(sequence, [None, None])
        return [one if one is not None and int(one[0]["chain"]) == chain else None for one in both]

    while sequence - root.log_start < count:
        copies = copies_of(sequence, chain)
        one, other = copies
        if one is not None and other is not None and one[1] != other[1]:
            copies = [one, None]  # Power failed while the second block of that number took the place of the first.
        chosen = copies[0] or copies[1]
        if chosen is None:
            break
        last = not any(copies_of(sequence + 1, int(chosen[0]["checksum"])))
        if last and sequence >= root.log_durable and int(chosen[0]["flags"]) & layout.UNFLUSHED:
            try:
                there = data_there(image, reader.records(*chosen))
            except layout.RecordError:
                there = True  # reported below
            if not there:
                report.notes.append(f"log block {sequence} does not count: power failed before its data were flushed")
                break
        for copy in (0, 1):
            block = bases[copy] + sequence % count
            if copies[copy] is None:
                both = log.bad_copies if sequence < durable else log.torn
                both.append((block, bases[1 - copy] + sequence % count))
            if copies[copy] is None and sequence < durable:
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
        log.stored += records.stored
        log.zeros += records.zeros
        for volume, amount in records.mapped.items():
            log.mapped[volume] = log.mapped.get(volume, 0) + amount
        chain = int(chosen[0]["checksum"])
        sequence += 1
    log.end, log.chain, log.blocks = sequence, chain, sequence - root.log_start
    places = ", ".join(str(base + sequence % count) for base in bases)
    ends = log.blocks < count and chosen is None
    if ends and all(image.read(base + sequence % count, 1) is None for base in bases):
        report.fatal = (
            f"block {sequence} of the metadata log cannot be read in either copy (blocks {places} of the device): it"
            " may say what was flushed last"
        )
        return None
    if sequence < durable:
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
    name: str
    size_bytes: int
    created_s: int
    mapped_blocks: int  # as the store says


@dataclass
class Pages:
    """Pages of one level of a tree that are not all zeros, by number."""

    numbers: np.ndarray
    pointers: np.ndarray


class Store:
    """The replayed metadata of one store. Pages are read and verified when they are asked for."""

    def __init__(self, image: Image, root: Super, log: Log, report: Report) -> None:
        self.image, self.root, self.log, self.report = image, root, log, report
        self.supers: dict[int, Super] = {}  # by place
        self.places = layout.Places(root.fields)
        self.trees: dict[tuple[int, int], Pages] = {}  # by tree and level
        # Pages that are bad in both copies: tree, level, number, and what was reported
        self.lost: dict[tuple[int, int, int], str] = {}
        self.wrong_slots = False  # the slot tree is not what the directories say
        self.bad_copies: list[tuple[int, int]] = []  # (bad block, good block): repairable
        self._seen: set[tuple[int, int, int]] = set()  # pages whose damage was reported
        self._volumes: dict[int, Volume] | None = None

    @classmethod
    def read(
        cls, image: Image, report: Report, reader: LogReader | None = None, progress: Progress = silent
    ) -> Store | None:
        root, supers = read_supers(image, report)
        if root is None:
            return None
        if wrong := layout.super_wrong(root.fields):
            report.fatal = f"superblock {root.place}, generation {root.generation}: {wrong}"
            return None
        log = read_log(image, root, report, reader or LogReader(), progress)
        if log is None:
            return None
        store = cls(image, root, log, report)
        store.supers = supers
        for tree, top in enumerate(layout.TOP_LEVEL):
            store._read_tree(tree, top)
        return store

    # --- Pages ------------------------------------------------------------------------------------------------------

    def _read_tree(self, tree: int, top: int) -> None:
        pointers = self.root.fields["roots"][tree : tree + 1].copy()
        numbers = np.zeros(1, np.uint64)
        for level in range(top, -1, -1):
            there = pointers["slot"] != 0
            for index in np.flatnonzero(~there & (pointers.view("<u8").reshape(-1, 2) != 0).any(axis=1)):
                name = layout.page_name(tree, level, int(numbers[index]))
                self.report.add("page", f"the pointer to the {name} names no slot and is not zero")
            found = Pages(numbers[there], pointers[there])
            self.trees[tree, level] = found
            if level == 0:
                break
            children, below = [], []
            for begin in range(0, len(found.numbers), PAGES_AT_ONCE):
                some = found.numbers[begin : begin + PAGES_AT_ONCE]
                pages = self.pages(tree, level, some, found.pointers[begin : begin + PAGES_AT_ONCE])
                table = pages.view(layout.POINTER).reshape(len(some), layout.POINTERS)
                rows, columns = np.nonzero(table.view("<u8").reshape(len(some), layout.POINTERS, 2).any(axis=2))
                children.append(some[rows] * np.uint64(layout.POINTERS) + columns.astype(np.uint64))
                below.append(table[rows, columns])
            numbers = np.concatenate(children) if children else np.zeros(0, np.uint64)
            pointers = np.concatenate(below) if below else np.zeros(0, layout.POINTER)

    def pages(self, tree: int, level: int, numbers: np.ndarray, pointers: np.ndarray) -> np.ndarray:
        """Contents of stored pages, zeros for lost ones (which `lost` names). Damage is reported once."""
        contents = np.zeros((len(pointers), BLOCK_BYTES), np.uint8)
        if not len(pointers):
            return contents
        both = self.places.of_slots(pointers["slot"])
        copies = [self.image.gather(places) for places in both]
        for index in range(len(pointers)):
            number, expected = int(numbers[index]), int(pointers["checksum"][index])
            seeded = layout.seed(layout.SEED_PAGE, self.root.store, layout.page_id(tree, level, number))
            good = [ok[index] and layout.checksum(blocks[index], seeded) == expected for blocks, ok in copies]
            if good[0] or good[1]:
                contents[index] = copies[0 if good[0] else 1][0][index]
            if (good[0] and good[1]) or (tree, level, number) in self._seen:
                continue
            self._seen.add((tree, level, number))
            places, name = [int(each[index]) for each in both], layout.page_name(tree, level, number)
            if not good[0] and not good[1]:
                slot = int(pointers["slot"][index])
                where = f"slot {slot}, blocks {places[0]} and {places[1]}"
                if places[0] >= layout.DEVICE_BLOCKS_MAX:
                    where = f"slot {slot}, which does not exist"
                text = self.lost[tree, level, number] = f"the {name} is lost ({where}): no copy is good"
                self.report.add("page", text, block=places[0])
                continue
            bad = 0 if good[1] else 1
            self.bad_copies.append((places[bad], places[1 - bad]))
            self.report.add(
                "page", f"block {places[bad]}, copy {bad} of the {name}, is damaged; the other copy, block"
                f" {places[1 - bad]}, is good", True, block=places[bad],
            )  # fmt: skip
        return contents

    def whole(self, *trees: int) -> bool:
        """No page of these trees is lost, as far as they have been read."""
        return not any(tree in trees for tree, _, _ in self.lost)

    def derived(self) -> set[int]:
        """Trees of which pages are lost that follow from others: the sums of groups from reference counts, these from
        the map, and the slots in use from all directories. Of the map those of volumes that are being deleted: nobody
        will read them. None, if places for them cannot be had."""
        found, lost = set(), {tree for tree, _, _ in self.lost}
        if layout.TREE_MAP in lost and self._map_is_of_deleted():
            found.add(layout.TREE_MAP)
        if layout.TREE_REFS in lost and lost & {layout.TREE_MAP} <= found:
            found.add(layout.TREE_REFS)
        if layout.TREE_GROUPS in lost and lost & {layout.TREE_REFS} <= found:
            found.add(layout.TREE_GROUPS)
        if layout.TREE_SLOTS in lost:
            if any(level for tree, level, _ in self.lost if tree not in found | {layout.TREE_SLOTS}):
                return set()  # what they led to has slots that nobody knows
            found.add(layout.TREE_SLOTS)
        return found | ({layout.TREE_SLOTS} if self.wrong_slots else set())

    def _map_is_of_deleted(self) -> bool:
        """Its lost pages are all about volumes that are being deleted."""
        pages = [(level, number) for tree, level, number in self.lost if tree == layout.TREE_MAP]
        volumes = self.volumes()
        wanted = {number for number, one in volumes.items() if one.state != layout.VOLUME_DELETING}
        return self.whole(layout.TREE_VOLUMES) and all(wanted.isdisjoint(layout.volumes_of(*page)) for page in pages)

    def table(self, tree: int, per_page: int, dtype: Any, first: int, end: int) -> np.ndarray:
        """Entries [first, end) of a table of pages, of one dtype; of pages that are not there zeros."""
        low, high = first // per_page, -(-end // per_page)
        level = self.trees[tree, 0]
        begin, after = np.searchsorted(level.numbers, low), np.searchsorted(level.numbers, high)
        some = level.numbers[begin:after]
        pages = np.zeros((high - low, BLOCK_BYTES), np.uint8)
        pages[(some - np.uint64(low)).astype(np.int64)] = self.pages(tree, 0, some, level.pointers[begin:after])
        return pages.reshape(-1).view(dtype)[first - low * per_page : end - low * per_page]

    # --- Replayed metadata ------------------------------------------------------------------------------------------

    def counts(self, first: int, end: int) -> np.ndarray:
        """Reference counts (u32) of the blocks [first, end)."""
        found = self.table(layout.TREE_REFS, layout.REFS_PER_PAGE, "<u4", first, end)
        logged = slice_of(self.log.counts, first, end)
        found[(logged[:, 0] - np.uint64(first)).astype(np.int64)] = logged[:, 1].astype(np.uint32)
        return found

    def prints(self, first: int, end: int) -> np.ndarray:
        """Fingerprints of the blocks [first, end): rows of low, high."""
        both = np.dtype([("low", "<u8"), ("high", "<u8")])
        found = self.table(layout.TREE_PRINTS, layout.PRINTS_PER_PAGE, both, first, end)
        rows = found.view("<u8").reshape(-1, 2).copy()
        logged = slice_of(self.log.prints, first, end)
        rows[(logged[:, 0] - np.uint64(first)).astype(np.int64)] = logged[:, 1:]
        return rows

    def volumes(self) -> dict[int, Volume]:
        """Those that are not free."""
        if self._volumes is not None:
            return self._volumes
        entries = layout.VOLUME_PAGES * layout.VOLUMES_PER_PAGE
        table = self.table(layout.TREE_VOLUMES, layout.VOLUMES_PER_PAGE, layout.VOLUME, 0, entries).copy()
        for number, image in self.log.volumes.items():
            if number >= len(table):
                self.report.add("volume", f"the log speaks of volume {number}, there are {len(table)}")
                continue
            mapped = table[number]["mapped_blocks"]
            table[number] = np.frombuffer(image, layout.VOLUME, 1)[0]
            table[number]["mapped_blocks"] = mapped
        found = {}
        for number in map(int, np.flatnonzero(table["state"])):
            entry = table[number]
            found[number] = Volume(
                int(entry["id"]), int(entry["generation"]), int(entry["state"]), int(entry["flags"]),
                bytes(entry["name"])[: int(entry["name_bytes"])].decode(errors="replace"),
                int(entry["size_bytes"]), int(entry["created_s"]),
                int(entry["mapped_blocks"]) + self.log.mapped.get(number, 0),
            )  # fmt: skip
        self._volumes = found
        return found

    def leaves(self, at_once: int = PAGES_AT_ONCE) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All leaves by key, in slices: (map key of the first entry of each, its 512 values)."""
        level = self.trees[layout.TREE_MAP, 0]
        firsts = layout.leaf_keys(level.numbers)
        everything = np.union1d(firsts, self.log.map[:, 0] & ~np.uint64(511))
        for begin in range(0, len(everything), at_once):
            keys = everything[begin : begin + at_once]
            values = np.zeros((len(keys), layout.LEAF_ENTRIES), np.uint64)
            low, high = int(np.searchsorted(firsts, keys[0])), int(np.searchsorted(firsts, keys[-1], "right"))
            pages = self.pages(layout.TREE_MAP, 0, level.numbers[low:high], level.pointers[low:high])
            values[np.searchsorted(keys, firsts[low:high])] = pages.view("<u8")
            changed = slice_of(self.log.map, int(keys[0]), int(keys[-1]) + layout.LEAF_ENTRIES)
            rows = np.searchsorted(keys, changed[:, 0] & ~np.uint64(511))
            values[rows, (changed[:, 0] & np.uint64(511)).astype(np.int64)] = changed[:, 1]
            yield keys, values


def slice_of(rows: np.ndarray, first: int, end: int) -> np.ndarray:
    """Rows whose first column is in [first, end); they are sorted by it."""
    found: np.ndarray = rows[
        np.searchsorted(rows[:, 0], np.uint64(first)) : np.searchsorted(rows[:, 0], np.uint64(end))
    ]
    return found
