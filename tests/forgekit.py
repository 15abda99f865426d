"""Makes the device of a large, full store without writing its data: what a year of use leaves, in a minute.

- `forge(path, device_bytes, volume_bytes, distinct)`: a store of format 2 (docs/format.md) with a volume "disk" of
  which each block is mapped, to one of `distinct` places in turn. The data blocks are holes of the file, so they read
  as zeros, and their fingerprints are those of zeros. The file is sparse: it takes twice the size of the metadata.
"""

import os
import struct
from pathlib import Path

import numpy as np
import xxhash

BLOCK = 4096
MASK = (1 << 64) - 1
STORE = 0x0123456789ABCDEF ^ 0xFEDCBA987654321F
VOLUMES, GROUPS, REFS, PRINTS, MAP, SLOTS = range(6)
LEVELS = {VOLUMES: 1, GROUPS: 2, REFS: 4, PRINTS: 4, MAP: 6, SLOTS: 2}
POINTER = np.dtype([("checksum", "<u8"), ("slot", "<u4"), ("reserved", "<u4")])
CHUNK_PAGES = 4096
LOG_BLOCKS = 4096


def seed(kind: int, store: int, number: int) -> int:
    value = ((store ^ kind * 0x9E3779B97F4A7C15 & MASK) + number) & MASK
    value = (value ^ value >> 31) * 0xBF58476D1CE4E5B9 & MASK
    return value ^ value >> 29


def slots_of(blocks: int) -> tuple[int, int]:
    """All slots, and those kept for a checkpoint's copies (format.h: format_slots, format_spare_slots)."""
    refs, prints = -(-blocks // 1024), -(-blocks // 256)
    groups = -(-refs // 2048)
    fixed = 32 + 1 + refs + refs // 255 + 4 + prints + prints // 255 + 4 + groups + groups // 255 + 2
    spare = min(blocks // 1024 + 2 * (blocks // 256), 16384) + 128 + blocks // 1024 // 2048
    slots = fixed + blocks // 256 + blocks // 4096 + 48 + spare
    slots += (slots // 32768 + 1) * 8
    return (slots + 63) // 64 * 64, spare


class Forge:
    def __init__(self, path: Path, blocks: int) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.ftruncate(self.file, blocks * BLOCK)
        self.blocks, self.slots_used = blocks, np.zeros(0, np.uint64)
        self.slots, self.spare = slots_of(blocks)
        self.first = 2 + LOG_BLOCKS
        self.log_second = blocks - 2 - LOG_BLOCKS
        self.second = self.log_second - self.slots
        self.next_slot = 8
        self.used = np.zeros(-(-self.slots // 32768) * 32768, np.uint8)
        self.map_pages = 0

    def put(
        self, tree: int, level: int, numbers: np.ndarray, pages: np.ndarray, slots: np.ndarray | None = None
    ) -> np.ndarray:
        """Writes pages (n x 4096 bytes) to both copies; returns their pointers."""
        pointers = np.zeros(len(numbers), POINTER)
        if slots is None:
            slots = np.empty(len(numbers), np.uint64)
            for index in range(len(numbers)):
                if self.next_slot % 32768 < 8:
                    self.next_slot += 8 - self.next_slot % 32768
                slots[index] = self.next_slot
                self.next_slot += 1
            assert self.next_slot <= self.slots - self.spare, "the store is too small for that"
            self.used[slots] = 1
        for index, number in enumerate(numbers.tolist()):
            identity = tree << 56 | level << 48 | number
            pointers[index] = (xxhash.xxh3_64_intdigest(pages[index], seed(3, STORE, identity)), slots[index], 0)
        breaks = np.flatnonzero(np.diff(slots) != 1) + 1
        for run in np.split(np.arange(len(slots)), breaks):
            for base in (self.first, self.second):
                os.pwrite(self.file, pages[run[0] : run[-1] + 1].tobytes(), (base + int(slots[run[0]])) * BLOCK)
        self.map_pages += len(numbers) if tree == MAP else 0
        return pointers

    def tree(self, tree: int, children: dict[int, np.ndarray] | np.ndarray, first: int = 0) -> np.ndarray:
        """Directories over the pointers of pages `first`, first + 1, ...; returns the pointer to the top page."""
        pointers = children
        for level in range(1, LEVELS[tree] + 1):
            below, last = first, first + len(pointers) - 1
            first = below // 256
            row = np.zeros((last // 256 - first + 1) * 256, POINTER)
            row[below - first * 256 : below - first * 256 + len(pointers)] = pointers
            pages = row.view(np.uint8).reshape(-1, BLOCK)
            numbers = np.arange(first, first + len(pages))
            slots = None
            if tree == SLOTS:
                slots = np.array(
                    [32768 * 256 * number + 3 if level == 1 else 5 for number in numbers.tolist()], np.uint64
                )
            pointers = self.put(tree, level, numbers, pages, slots)
        assert len(pointers) == 1
        return pointers


def forge(path: Path, device_bytes: int, volume_bytes: int, distinct: int) -> None:
    forge = Forge(path, device_bytes // BLOCK)
    lbas, data = volume_bytes // BLOCK, forge.first + forge.slots
    assert lbas % distinct == 0 and distinct % 1024 == 0 and data + distinct <= forge.second
    roots = np.zeros(6, POINTER)
    # Map: block i lies at place data + i % distinct.
    leaves = []
    for begin in range(0, lbas // 512, CHUNK_PAGES):
        end = min(begin + CHUNK_PAGES, lbas // 512)
        values = np.arange(begin * 512, end * 512, dtype=np.uint64) % np.uint64(distinct) + np.uint64(data)
        values |= np.uint64(1 << 60)
        leaves.append(forge.put(MAP, 0, np.arange(begin, end), values.view(np.uint8).reshape(-1, BLOCK)))
    roots[MAP] = forge.tree(MAP, np.concatenate(leaves))[0]
    # Counts, groups and fingerprints of these places.
    group = data // 1024
    counts = np.zeros((-(-(data + distinct) // 1024) - group) * 1024, np.uint32)
    counts[data - group * 1024 : data - group * 1024 + distinct] = lbas // distinct
    pages = counts.view(np.uint8).reshape(-1, BLOCK)
    roots[REFS] = forge.tree(REFS, forge.put(REFS, 0, np.arange(group, group + len(pages)), pages), group)[0]
    stored = np.zeros(-(-forge.blocks // 1024 // 2048) * 2048, np.uint16)
    stored[group : group + len(pages)] = np.count_nonzero(counts.reshape(-1, 1024), axis=1)
    present = stored.view(np.uint8).reshape(-1, BLOCK)
    groups = np.zeros(len(present), POINTER)
    numbers = np.flatnonzero(present.any(axis=1))
    groups[numbers] = forge.put(GROUPS, 0, numbers, present[numbers])
    roots[GROUPS] = forge.tree(GROUPS, groups)[0]
    zeros = xxhash.xxh3_128_intdigest(bytes(BLOCK))
    first_print = data // 256
    prints = np.zeros(((-(-(data + distinct) // 256)) - first_print) * 256, np.dtype([("low", "<u8"), ("high", "<u8")]))
    prints[data - first_print * 256 : data - first_print * 256 + distinct] = (zeros & MASK, zeros >> 64)
    pages = prints.view(np.uint8).reshape(-1, BLOCK)
    roots[PRINTS] = forge.tree(
        PRINTS, forge.put(PRINTS, 0, np.arange(first_print, first_print + len(pages)), pages), first_print
    )[0]
    # The volume.
    entry = struct.pack("<6I2Q256sIIQ", 0, 1, 1, 0, 0, 4, volume_bytes, 1, b"disk", 0, 0, lbas)
    page = np.frombuffer(entry.ljust(BLOCK, b"\0"), np.uint8).reshape(1, BLOCK)
    roots[VOLUMES] = forge.tree(VOLUMES, forge.put(VOLUMES, 0, np.arange(1), page))[0]
    # Slots, last: they say where all of this is.
    bits = np.packbits(forge.used, bitorder="little").reshape(-1, BLOCK)
    numbers = np.flatnonzero(bits.any(axis=1))
    table = np.zeros(len(bits), POINTER)
    own = np.array([32768 * number + 1 for number in numbers.tolist()], np.uint64)
    table[numbers] = forge.put(SLOTS, 0, numbers, bits[numbers], own)
    roots[SLOTS] = forge.tree(SLOTS, table)[0]
    body = struct.pack(
        "<QII2Q13QII5Q", 0x3142534C4C4F5441, 2, 1, 0x0123456789ABCDEF, 0xFEDCBA987654321F, 1, forge.blocks, LOG_BLOCKS,
        1, 0, 1, forge.log_second, 1, forge.slots, forge.spare, forge.map_pages, distinct, 0, 1, 0, *([0] * 5),
    )  # fmt: skip
    body += roots.tobytes() + struct.pack("<2QII", forge.first, forge.second, forge.slots, 0)
    body = body.ljust(504, b"\0")
    for place, block in ((1, 1), (3, forge.blocks - 1)):
        os.pwrite(
            forge.file, struct.pack("<Q", xxhash.xxh3_64_intdigest(body, seed(1, 0, place))) + body, block * BLOCK
        )
    os.close(forge.file)
