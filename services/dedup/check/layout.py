"""What lies where on the device, as docs/format.md says it.

A second implementation beside services/dedup/format.h, on purpose: the checker shares no line with the store, so that
an error of one is seen by the other. Everything that depends on the format's version stands in this file.

- dtypes: `SUPER`, `POINTER`, `EXTENT`, `LOG_HEADER`, `VOLUME`; `Places(superblock)`: what each block is
- `seed(kind, store, number)`, `checksum(data, seed)`, `fingerprint(block)`
- `Records(block)`: the records of one block of the metadata log, as arrays
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

VERSION = 3
VERSIONS = (2, 3)  # that are read
BLOCK_BYTES = 4096
SUPER_MAGIC = 0x3142534C4C4F5441
LOG_MAGIC = 0x31474C4C4C4F5441
SUPER_BYTES = 512
POINTERS = 256  # in a directory page
EXTENTS = 8
VOLUME_PAGES, VOLUMES_PER_PAGE, VOLUME_BYTES = 32, 8, 512
REFS_PER_PAGE, PRINTS_PER_PAGE, LEAF_ENTRIES, GROUPS_PER_PAGE = 1024, 256, 512, 2048
GROUP_BLOCKS = 1024
SLOTS_PER_PAGE, SLOTS_RESERVED = 32768, 8
DEVICE_BLOCKS_MIN, DEVICE_BLOCKS_MAX, LOG_BLOCKS_MIN = 1024, 1 << 36, 64
CLEAN = 1  # flag of a superblock

SEED_SUPER, SEED_LOG, SEED_PAGE = 1, 2, 3
KIND_HOLE, KIND_PBA, KIND_LOG, KIND_ZERO = 0, 1, 2, 3
VOLUME_FREE, VOLUME_READY, VOLUME_DELETING = 0, 1, 2

# The trees of metadata pages, and the level of the one page that the superblock points to.
TREE_VOLUMES, TREE_GROUPS, TREE_REFS, TREE_PRINTS, TREE_MAP, TREE_SLOTS = range(6)
TOP_LEVEL = (1, 2, 4, 4, 6, 2)

MASK64 = (1 << 64) - 1
NUMBER_BITS = np.uint64((1 << 60) - 1)

POINTER = np.dtype([("checksum", "<u8"), ("slot", "<u4"), ("reserved", "<u4")])
EXTENT = np.dtype([("first", "<u8"), ("second", "<u8"), ("count", "<u4"), ("reserved", "<u4")])
SUPER = np.dtype(
    [
        ("checksum", "<u8"), ("magic", "<u8"), ("version", "<u4"), ("flags", "<u4"), ("uuid", "<u8", 2),
        ("generation", "<u8"), ("device_blocks", "<u8"), ("log_blocks", "<u8"), ("log_start", "<u8"),
        ("log_chain", "<u8"), ("log_durable", "<u8"), ("log_second", "<u8"), ("written_s", "<u8"),
        ("slots", "<u8"), ("spare_slots", "<u8"), ("map_pages", "<u8"), ("stored_blocks", "<u8"),
        ("zero_promises", "<u8"), ("extent_count", "<u4"), ("reserved", "V44"),
        ("roots", POINTER, 6), ("extents", EXTENT, EXTENTS), ("tail", "V32"),
    ]
)  # fmt: skip
LOG_HEADER = np.dtype(
    [
        ("checksum", "<u8"), ("magic", "<u8"), ("sequence", "<u8"), ("chain", "<u8"), ("durable", "<u8"),
        ("generation", "<u8"), ("version", "<u4"), ("used_bytes", "<u4"), ("flags", "<u4"), ("reserved", "<u4"),
    ]
)  # fmt: skip
VOLUME = np.dtype(
    [
        ("id", "<u4"), ("generation", "<u4"), ("state", "<u4"), ("flags", "<u4"), ("threshold", "<u4"),
        ("name_bytes", "<u4"), ("size_bytes", "<u8"), ("created_s", "<u8"), ("name", "S256"),
        ("tier_threshold", "<u4"), ("reserved_word", "<u4"), ("mapped_blocks", "<u8"), ("reserved", "V200"),
    ]
)  # fmt: skip
assert (POINTER.itemsize, EXTENT.itemsize, SUPER.itemsize, LOG_HEADER.itemsize) == (16, 24, SUPER_BYTES, 64)
assert VOLUME.itemsize == VOLUME_BYTES and SUPER.fields is not None
assert [SUPER.fields[name][1] for name in ("extent_count", "roots", "extents", "tail")] == [144, 192, 288, 480]


def seed(kind: int, store: int, number: int) -> int:
    value = ((store ^ (kind * 0x9E3779B97F4A7C15 & MASK64)) + number) & MASK64
    value = (value ^ value >> 31) * 0xBF58476D1CE4E5B9 & MASK64
    return value ^ value >> 29


def checksum(data: Any, seeded: int) -> int:
    return xxhash.xxh3_64_intdigest(data, seeded)


def fingerprint(block: Any) -> int:
    """Of a data block; the low 64 bits are what the device holds first."""
    return xxhash.xxh3_128_intdigest(block)


def kinds(values: np.ndarray) -> np.ndarray:
    return (values >> np.uint64(60)).astype(np.uint8)


def numbers(values: np.ndarray) -> np.ndarray:
    return values & NUMBER_BITS


def page_id(tree: int, level: int, number: int) -> int:
    return tree << 56 | level << 48 | number


def page_name(tree: int, level: int, number: int) -> str:
    """What a page is, for people."""
    if level:
        names = ("volume table", "group sums", "reference counts", "fingerprints", "block map", "slots")
        return f"directory page {number} of level {level} of the {names[tree]}"
    if tree == TREE_VOLUMES:
        return f"page {number} of the volume table"
    if tree == TREE_GROUPS:
        return f"page {number} of the group sums"
    if tree == TREE_SLOTS:
        return f"page {number} of the slots"
    if tree == TREE_MAP:
        first = (number & (1 << 39) - 1) * LEAF_ENTRIES
        return f"map leaf of volume {number >> 39}, blocks {first} to {first + LEAF_ENTRIES - 1}"
    each = REFS_PER_PAGE if tree == TREE_REFS else PRINTS_PER_PAGE
    what = "reference counts" if tree == TREE_REFS else "fingerprints"
    return f"page of {what} of blocks {number * each} to {(number + 1) * each - 1}"


def volumes_of(level: int, number: int) -> range:
    """Those that a page of the map is about."""
    return range(number << 8 * level >> 39, ((number + 1 << 8 * level) - 1 >> 39) + 1)


def leaf_keys(numbers: np.ndarray) -> np.ndarray:
    """Map key of the first entry of each leaf of the map, by the leaf's number in its tree."""
    found: np.ndarray = (numbers >> np.uint64(39)) << np.uint64(52) | (numbers & np.uint64((1 << 39) - 1)) * np.uint64(
        512
    )
    return found


# --- Records of the metadata log ------------------------------------------------------------------------------------

WORDS = {1: 2, 2: 2, 3: 4, 4: 2, 5: 65, 6: 2}  # by type
UNFLUSHED = 1  # flag of a block: written before the device had been flushed
HOLES_MAX = 64


class RecordError(ValueError):
    """A block of the log with a good checksum whose records mean nothing: a bug of who wrote it."""


@dataclass
class Records:
    """Records of one log block in their order. Map: (key, value); counts: (PBA, count); prints: (PBA, low, high).

    Sums: what the records add to the blocks that are stored, to promised zeros, and to what each volume maps.
    """

    map: np.ndarray
    counts: np.ndarray
    prints: np.ndarray
    volumes: list[tuple[int, bytes]]
    stored: int
    zeros: int
    mapped: dict[int, int]

    @classmethod
    def parse(cls, block: bytes, used_bytes: int) -> Records:
        words = np.frombuffer(block, "<u8", used_bytes // 8, LOG_HEADER.itemsize).tolist()
        entries: list[tuple[int, int]] = []
        counts: list[tuple[int, int]] = []
        prints: list[tuple[int, int, int]] = []
        volumes: list[tuple[int, bytes]] = []
        mapped: dict[int, int] = {}
        stored = zeros = at = 0
        while at < len(words) and words[at] >> 60:
            kind, rest = words[at] >> 60, words[at] & int(NUMBER_BITS)
            if kind not in WORDS or at + WORDS[kind] > len(words):
                raise RecordError(f"record of type {kind} at word {at}, {len(words)} words are used")
            if kind == 1:
                before, after = rest >> 50 & 3, words[at + 1] >> 60
                entries.append((rest & ~(3 << 50), words[at + 1]))
                mapped[rest >> 52] = mapped.get(rest >> 52, 0) + (after == KIND_PBA) - (before == KIND_PBA)
                zeros += (after == KIND_ZERO) - (before == KIND_ZERO)
            elif kind == 2:
                counts.append((rest, words[at + 1]))
                stored -= words[at + 1] == 0
            elif kind == 3:
                counts.append((rest, words[at + 1]))
                prints.append((rest, words[at + 2], words[at + 3]))
                stored += 1
            elif kind == 4:
                count, named, promised = words[at + 1] & 0xFFFF, words[at + 1] >> 16 & 0xFFFF, words[at + 1] >> 32
                if not 0 < count <= HOLES_MAX or rest % LEAF_ENTRIES + count > LEAF_ENTRIES or named + promised > count:
                    raise RecordError(
                        f"{count} holes, {named} and {promised} of them, from entry {rest % 512} of a leaf on"
                    )
                entries.extend((rest + index, 0) for index in range(count))
                mapped[rest >> 52] = mapped.get(rest >> 52, 0) - named
                zeros -= promised
            elif kind == 5:
                begin = LOG_HEADER.itemsize + 8 * (at + 1)
                volumes.append((rest, block[begin : begin + VOLUME_BYTES]))
            at += WORDS[kind]
        return cls(pairs(entries, 2), pairs(counts, 2), pairs(prints, 3), volumes, stored, zeros, mapped)


def pairs(rows: list[Any], width: int) -> np.ndarray:
    return np.array(rows, dtype=np.uint64).reshape(-1, width)


def last_wins(rows: list[np.ndarray], width: int) -> np.ndarray:
    """Rows by first column, ascending, of each the last one given."""
    joined = np.concatenate(rows) if rows else np.empty((0, width), np.uint64)
    if not len(joined):
        return joined
    _, index = np.unique(joined[::-1, 0], return_index=True)
    found: np.ndarray = joined[::-1][index]
    return found


# --- Places -----------------------------------------------------------------------------------------------------------


class Places:
    """What each block of a device is, as a superblock says."""

    def __init__(self, fields: Any) -> None:
        self.blocks, self.log_blocks = int(fields["device_blocks"]), int(fields["log_blocks"])
        self.log = (2, int(fields["log_second"]))  # first blocks of both copies
        self.slots = int(fields["slots"])
        self.extents = [
            (int(one["first"]), int(one["second"]), int(one["count"]))
            for one in fields["extents"][: int(fields["extent_count"])]
        ]
        # Intervals that hold no data, in order; behind the pages' second copies lie the superblocks of that time.
        reserved = [(0, 2 + self.log_blocks)]
        for number, (first, second, count) in enumerate(self.extents):
            behind = 2 + (self.log_blocks if number == 0 else 0)
            reserved += [(first, first + count), (second, second + count + behind)]
        self.reserved = sorted(reserved)
        self._starts = np.cumsum([0, *(count for _, _, count in self.extents)])

    def hold_data(self, places: np.ndarray) -> np.ndarray:
        good: np.ndarray = places < self.blocks
        for first, end in self.reserved:
            good &= (places < first) | (places >= end)
        return good

    def data_mask(self, first: int, end: int) -> np.ndarray:
        """Which of the blocks [first, end) hold data, if anything."""
        mask = np.ones(end - first, bool)
        for begin, behind in self.reserved:
            mask[max(begin - first, 0) : max(behind - first, 0)] = False
        return mask

    def of_slots(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """PBAs of both copies; of a slot that is none: of no block."""
        slots = slots.astype(np.int64)
        extent = np.searchsorted(self._starts, slots, "right") - 1
        inside = (slots > 0) & (slots < min(self.slots, int(self._starts[-1])))
        extent = np.where(inside, extent, 0)
        within = slots - self._starts[extent]
        both = []
        for copy in (0, 1):
            base = np.array([one[copy] for one in self.extents] or [0], np.int64)
            both.append(np.where(inside, base[extent] + within, DEVICE_BLOCKS_MAX).astype(np.uint64))
        return both[0], both[1]


def super_block(device_blocks: int, place: int) -> int:
    """Block of the superblock at a place, 0 to 3."""
    return place if place < 2 else device_blocks - 4 + place


def own_slots(level: int, number: int) -> tuple[int, int]:
    """The two slots that a page of the slot tree may use."""
    if level == 2:
        return 5, 6
    base = SLOTS_PER_PAGE * number + 1 if level == 0 else SLOTS_PER_PAGE * POINTERS * number + 3
    return base, base + 1


def super_wrong(fields: Any) -> str:
    """What a superblock with a good checksum says that cannot be; empty if nothing."""
    places = Places(fields)
    if not DEVICE_BLOCKS_MIN <= places.blocks <= DEVICE_BLOCKS_MAX:
        return f"{places.blocks} blocks of the device"
    if not LOG_BLOCKS_MIN <= places.log_blocks < places.blocks // 4:
        return f"{places.log_blocks} blocks of the log on a device of {places.blocks}"
    if not 1 <= int(fields["extent_count"]) <= EXTENTS:
        return f"{int(fields['extent_count'])} extents of slots"
    if sum(count for _, _, count in places.extents) != places.slots or places.slots % 64:
        return f"{places.slots} slots, its extents have {sum(count for _, _, count in places.extents)}"
    end = 0
    for first, last in places.reserved:
        if first < end or last > places.blocks:
            return f"blocks {first} to {last - 1} have two uses, or are not there"
        end = last
    if end != places.blocks:
        return f"the last extent of slots ends before block {end}, the device has {places.blocks}"
    if places.log[1] != places.extents[0][1] + places.extents[0][2]:
        return f"the log's second copy at block {places.log[1]}"
    if int(fields["log_durable"]) < int(fields["log_start"]):
        return f"the log was durable up to {int(fields['log_durable'])}, before its start {int(fields['log_start'])}"
    return ""
