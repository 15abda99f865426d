"""What lies where on the device, as docs/format.md says it.

A second implementation beside services/dedup/format.h, on purpose: the checker shares no line with the store, so that
an error of one is seen by the other. Everything that depends on the format's version stands in this file.

- dtypes: `SUPER`, `POINTER`, `LOG_HEADER`, `VOLUME`; `Shape(device_blocks, leaf_slots)`
- `seed(kind, store, number)`, `checksum(data, seed)`, `fingerprint(block)`
- `Records(block)`: the records of one block of the metadata log, as arrays
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

VERSION = 1
BLOCK_BYTES = 4096
SUPER_MAGIC = 0x3142534C4C4F5441
LOG_MAGIC = 0x31474C4C4C4F5441
SUPER_BYTES = 512
ROOT_POINTERS = 8
LEVELS_MAX = 6
POINTERS = 128  # in a directory page
VOLUME_PAGES, VOLUMES_PER_PAGE, VOLUME_BYTES = 32, 8, 512
REFS_PER_PAGE, PRINTS_PER_PAGE, LEAF_ENTRIES = 1024, 256, 512
DEVICE_BLOCKS_MIN, DEVICE_BLOCKS_MAX, LOG_BLOCKS_MIN = 1024, 1 << 36, 64
REFERENCES_MAX = 0x3FFFFFFF
CLEAN = 1  # flag of a superblock

SEED_SUPER, SEED_LOG, SEED_PAGE = 1, 2, 3
KIND_HOLE, KIND_PBA, KIND_LOG, KIND_ZERO = 0, 1, 2, 3
VOLUME_FREE, VOLUME_READY, VOLUME_DELETING = 0, 1, 2

MASK64 = (1 << 64) - 1
NUMBER_BITS = np.uint64((1 << 60) - 1)

POINTER = np.dtype([("key", "<u8"), ("primary", "<u8"), ("mirror", "<u8"), ("checksum", "<u8")])
SUPER = np.dtype(
    [
        ("checksum", "<u8"), ("magic", "<u8"), ("version", "<u4"), ("flags", "<u4"), ("uuid", "<u8", 2),
        ("generation", "<u8"), ("device_blocks", "<u8"), ("log_blocks", "<u8"), ("log_start", "<u8"),
        ("log_chain", "<u8"), ("log_durable", "<u8"), ("leaf_slots", "<u8"), ("written_s", "<u8"),
        ("root_count", "<u4"), ("levels", "<u4"), ("reserved", "<u8", 18), ("roots", POINTER, ROOT_POINTERS),
    ]
)  # fmt: skip
LOG_HEADER = np.dtype(
    [
        ("checksum", "<u8"), ("magic", "<u8"), ("sequence", "<u8"), ("chain", "<u8"), ("durable", "<u8"),
        ("generation", "<u8"), ("version", "<u4"), ("used_bytes", "<u4"), ("reserved", "<u8"),
    ]
)  # fmt: skip
VOLUME = np.dtype(
    [
        ("id", "<u4"), ("generation", "<u4"), ("state", "<u4"), ("flags", "<u4"), ("threshold", "<u4"),
        ("name_bytes", "<u4"), ("size_bytes", "<u8"), ("created_s", "<u8"), ("name", "S256"), ("reserved", "V216"),
    ]
)  # fmt: skip
assert (POINTER.itemsize, SUPER.itemsize, LOG_HEADER.itemsize, VOLUME.itemsize) == (32, SUPER_BYTES, 64, VOLUME_BYTES)


def seed(kind: int, store: int, number: int) -> int:
    value = ((store ^ (kind * 0x9E3779B97F4A7C15 & MASK64)) + number) & MASK64
    value = (value ^ value >> 31) * 0xBF58476D1CE4E5B9 & MASK64
    return value ^ value >> 29


def checksum(data: Any, seeded: int) -> int:
    return xxhash.xxh3_64_intdigest(data, seeded)


def fingerprint(block: Any) -> int:
    """Of a data block; the low 64 bits are what the device holds first."""
    return xxhash.xxh3_128_intdigest(block)


def map_key(volume: int, number: int) -> int:
    return volume << 52 | number


def kinds(values: np.ndarray) -> np.ndarray:
    return (values >> np.uint64(60)).astype(np.uint8)


def numbers(values: np.ndarray) -> np.ndarray:
    return values & NUMBER_BITS


@dataclass(frozen=True)
class Shape:
    """The row of metadata pages of a store."""

    device_blocks: int
    leaf_slots: int
    refs_base: int = VOLUME_PAGES
    prints_base: int = field(init=False)
    leaves_base: int = field(init=False)
    end: int = field(init=False)  # of the pages below the directories
    level_base: tuple[int, ...] = field(init=False)
    level_count: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        def up(count: int, unit: int) -> int:
            return -(-count // unit)

        def set_(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        set_("prints_base", self.refs_base + up(self.device_blocks, REFS_PER_PAGE))
        set_("leaves_base", self.prints_base + up(self.device_blocks, PRINTS_PER_PAGE))
        set_("end", self.leaves_base + self.leaf_slots)
        bases, counts = [0], [self.end]
        total = up(self.end, POINTERS) * POINTERS
        while counts[-1] > ROOT_POINTERS and len(bases) <= LEVELS_MAX:
            bases.append(total)
            counts.append(up(counts[-1], POINTERS))
            total += up(counts[-1], POINTERS) * POINTERS
        set_("level_base", tuple(bases))
        set_("level_count", tuple(counts))

    @property
    def levels(self) -> int:
        return len(self.level_base) - 1

    def name(self, page: int, key: int = 0) -> str:
        """What a page is, for people."""
        for level in range(self.levels, 0, -1):
            if page >= self.level_base[level]:
                return f"directory page {page - self.level_base[level]} of level {level}"
        if page < self.refs_base:
            return f"page {page} of the volume table"
        if page < self.prints_base:
            first = (page - self.refs_base) * REFS_PER_PAGE
            return f"page of reference counts of blocks {first} to {first + REFS_PER_PAGE - 1}"
        if page < self.leaves_base:
            first = (page - self.prints_base) * PRINTS_PER_PAGE
            return f"page of fingerprints of blocks {first} to {first + PRINTS_PER_PAGE - 1}"
        first = (key & (1 << 52) - 1) * LEAF_ENTRIES
        return f"map leaf of volume {key >> 52 & 0xFF}, blocks {first} to {first + LEAF_ENTRIES - 1}"


# --- Records of the metadata log ------------------------------------------------------------------------------------

WORDS = {1: 2, 2: 2, 3: 4, 4: 2, 5: 65}  # by type
HOLES_MAX = 64


class RecordError(ValueError):
    """A block of the log with a good checksum whose records mean nothing: a bug of who wrote it."""


@dataclass
class Records:
    """Records of one log block in their order. Map: (key, value); counts: (PBA, count); prints: (PBA, low, high)."""

    map: np.ndarray
    counts: np.ndarray
    prints: np.ndarray
    volumes: list[tuple[int, bytes]]

    @classmethod
    def parse(cls, block: bytes, used_bytes: int) -> Records:
        words = np.frombuffer(block, "<u8", used_bytes // 8, LOG_HEADER.itemsize).tolist()
        entries: list[tuple[int, int]] = []
        counts: list[tuple[int, int]] = []
        prints: list[tuple[int, int, int]] = []
        volumes: list[tuple[int, bytes]] = []
        at = 0
        while at < len(words) and words[at] >> 60:
            kind, rest = words[at] >> 60, words[at] & int(NUMBER_BITS)
            if kind not in WORDS or at + WORDS[kind] > len(words):
                raise RecordError(f"record of type {kind} at word {at}, {len(words)} words are used")
            if kind == 1:
                entries.append((rest, words[at + 1]))
            elif kind == 2:
                counts.append((rest, words[at + 1]))
            elif kind == 3:
                counts.append((rest, words[at + 1]))
                prints.append((rest, words[at + 2], words[at + 3]))
            elif kind == 4:
                count = words[at + 1]
                if not 0 < count <= HOLES_MAX or rest % LEAF_ENTRIES + count > LEAF_ENTRIES:
                    raise RecordError(f"{count} holes from entry {rest % LEAF_ENTRIES} of a leaf on")
                entries.extend((rest + index, 0) for index in range(count))
            else:
                begin = LOG_HEADER.itemsize + 8 * (at + 1)
                volumes.append((rest, block[begin : begin + VOLUME_BYTES]))
            at += WORDS[kind]
        return cls(pairs(entries, 2), pairs(counts, 2), pairs(prints, 3), volumes)


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


def log_base(device_blocks: int, log_blocks: int, copy: int) -> int:
    return 2 if copy == 0 else device_blocks - 2 - log_blocks


def usable(device_blocks: int, log_blocks: int) -> tuple[int, int]:
    """First block that holds data or metadata pages, and the one behind the last."""
    return 2 + log_blocks, device_blocks - 2 - log_blocks


def super_wrong(fields: Any) -> str:
    """What a superblock with a good checksum says that cannot be; empty if nothing."""
    blocks, log_blocks = int(fields["device_blocks"]), int(fields["log_blocks"])
    if not DEVICE_BLOCKS_MIN <= blocks <= DEVICE_BLOCKS_MAX:
        return f"{blocks} blocks of the device"
    if not LOG_BLOCKS_MIN <= log_blocks < blocks // 4:
        return f"{log_blocks} blocks of the log on a device of {blocks}"
    if not 0 < int(fields["leaf_slots"]) < DEVICE_BLOCKS_MAX:
        return f"{int(fields['leaf_slots'])} map leaves"
    shape = Shape(blocks, int(fields["leaf_slots"]))
    if int(fields["levels"]) != shape.levels or int(fields["root_count"]) != shape.level_count[-1]:
        return (
            f"{int(fields['levels'])} levels with {int(fields['root_count'])} roots; its sizes make {shape.levels}"
            f" with {shape.level_count[-1]}"
        )
    if int(fields["log_durable"]) < int(fields["log_start"]):
        return f"the log was durable up to {int(fields['log_durable'])}, before its start {int(fields['log_start'])}"
    return ""
