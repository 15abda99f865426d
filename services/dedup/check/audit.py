"""Holds a store's metadata against itself: everything that is said twice must agree.

- `audit(store, report, ...)` -> `Totals`: volumes, leaves, map values, reference counts, places of metadata pages
- `verify_data(store, report, ...)`: every stored block against its fingerprint
- `usage(store, ...)`: what each volume costs (`atoll du` of a device)

Memory: reference counts are recounted in windows of WINDOW_BLOCKS, the leaves are read once for each; so a device of
any size is checked in some 300 MB and time in proportion to leaves × windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atoll.services.dedup.check import layout
from atoll.services.dedup.check.layout import BLOCK_BYTES
from atoll.services.dedup.check.reader import PAGES_AT_ONCE, Progress, Report, Store, Volume, silent, slice_of

WINDOW_BLOCKS = 1 << 24  # 64 GiB of device: 128 MB of recounted references and as much of stored ones
DATA_RUN_BLOCKS = 256
NAMED_MAX = 16  # places in volumes that are named for one damaged block


@dataclass
class Totals:
    """What was counted, in blocks."""

    stored: int = 0
    references: int = 0
    promised_zeros: int = 0
    metadata: int = 0
    leaves: int = 0
    volumes: dict[int, Volume] = field(default_factory=dict)
    mapped: dict[int, int] = field(default_factory=dict)  # by volume
    wrong_counts: dict[int, int] = field(default_factory=dict)  # PBA: references that were found; for repair
    wrong_groups: dict[int, int] = field(default_factory=dict)  # a block of each group whose sum is wrong: its count
    map_pages: int = 0
    wrong_mapped: dict[int, int] = field(default_factory=dict)  # volume: what its sum lacks
    verified: int = 0
    damaged: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "stored_bytes": self.stored * BLOCK_BYTES,
            "referenced_bytes": self.references * BLOCK_BYTES,
            "promised_zero_bytes": self.promised_zeros * BLOCK_BYTES,
            "metadata_bytes": self.metadata * BLOCK_BYTES,
            "leaves": self.leaves,
            "volumes": [
                {"id": one.id, "name": one.name, "size_bytes": one.size_bytes,
                 "mapped_bytes": self.mapped.get(one.id, 0) * BLOCK_BYTES}
                for one in self.volumes.values()
            ],
            "verified_bytes": self.verified * BLOCK_BYTES,
            "damaged_blocks": self.damaged,
        }  # fmt: skip


def block_of(key: int) -> tuple[int, int]:
    """Volume and LBA of a map key."""
    return key >> 52 & 0xFF, key & (1 << 52) - 1


def windows(first: int, end: int, size: int = WINDOW_BLOCKS) -> Iterator[tuple[int, int]]:
    for begin in range(first, end, size):
        yield begin, min(begin + size, end)


def audit(store: Store, report: Report, progress: Progress = silent, window: int = WINDOW_BLOCKS) -> Totals:
    totals = Totals(volumes=store.volumes())
    check_slots(store, report, totals)
    check_volumes(store, report, totals)
    totals.leaves = len(store.trees[layout.TREE_MAP, 0].numbers)
    ranges = list(windows(0, store.root.device_blocks, window))
    read_prints(store, progress)
    for index, (first, end) in enumerate(ranges):
        found = np.zeros(end - first, np.uint32)
        for done, (keys, values) in enumerate(store.leaves()):
            progress("block map", index * max(1, totals.leaves) + done * 2048, len(ranges) * max(1, totals.leaves))
            if index == 0:
                check_values(store, report, totals, keys, values)
            places = layout.numbers(values[layout.kinds(values) == layout.KIND_PBA])
            places = places[(places >= first) & (places < end)]
            named, times = np.unique(places - np.uint64(first), return_counts=True)
            found[named.astype(np.int64)] += times.astype(np.uint32)
        compare_counts(store, report, totals, first, end, found)
    compare_sums(store, report, totals)
    derived = store.derived()
    report.mend({text for (tree, _, _), text in store.lost.items() if tree in derived})
    return totals


# --- Places of metadata -----------------------------------------------------------------------------------------------


def check_slots(store: Store, report: Report, totals: Totals) -> None:
    """Each page has a slot of its own, and the bits say which slots are in use."""
    slots = store.places.slots
    users = np.zeros(slots, np.uint8)
    for (tree, level), pages in store.trees.items():
        mine = pages.pointers["slot"].astype(np.int64)
        totals.metadata += 2 * len(mine)
        for number, slot in zip(pages.numbers, mine, strict=True):
            kept = slot % layout.SLOTS_PER_PAGE < layout.SLOTS_RESERVED
            if tree == layout.TREE_SLOTS:
                wrong = slot not in layout.own_slots(level, int(number))
            else:
                wrong = kept
            if wrong or not 0 < slot < slots:
                name = layout.page_name(tree, level, int(number))
                report.add("page", f"the {name} is said to be in slot {slot}, where it cannot be", slot=int(slot))
        if tree != layout.TREE_SLOTS:
            mine = mine[(mine > 0) & (mine < slots)]
            np.add.at(users, mine, 1)
    for slot in np.flatnonzero(users > 1):
        report.add("page", f"slot {slot} holds {users[slot]} pages", slot=int(slot))
    if store.whole(layout.TREE_MAP):
        map_pages = sum(len(pages.numbers) for (tree, _), pages in store.trees.items() if tree == layout.TREE_MAP)
        totals.map_pages = map_pages
        if map_pages != store.root.map_pages:
            report.add("total", f"the map has {map_pages} pages, the superblock says {store.root.map_pages}", True)
    bits = np.unpackbits(store.table(layout.TREE_SLOTS, BLOCK_BYTES, np.uint8, 0, -(-slots // 8)), bitorder="little")
    if any(level for _, level, _ in store.lost) or not store.whole(layout.TREE_SLOTS):
        return  # what they lead to, or say, is not known
    repairable = not np.any(users > 1)
    for slot in np.flatnonzero(bits[:slots] != (users != 0)):
        text = "is free, and a page lies there" if users[slot] else "is in use, and no page lies there"
        report.add("page", f"slot {slot}: its bit says that it {text}", repairable, slot=int(slot))
        store.wrong_slots |= repairable


def read_prints(store: Store, progress: Progress) -> None:
    """Both copies of the pages of fingerprints: nothing but stored blocks can be held against what they say."""
    pages = store.trees[layout.TREE_PRINTS, 0]
    for begin in range(0, len(pages.numbers), PAGES_AT_ONCE):
        progress("fingerprints", begin, len(pages.numbers))
        some = slice(begin, begin + PAGES_AT_ONCE)
        store.pages(layout.TREE_PRINTS, 0, pages.numbers[some], pages.pointers[some])


# --- Volumes and leaves -----------------------------------------------------------------------------------------------


def check_volumes(store: Store, report: Report, totals: Totals) -> None:
    names: dict[str, int] = {}
    for number, volume in totals.volumes.items():
        what = f"volume {number} ({volume.name!r})"
        if volume.id != number:
            report.add("volume", f"{what}: its entry says that it is volume {volume.id}", volume=number)
        if volume.state not in (layout.VOLUME_READY, layout.VOLUME_DELETING):
            report.add("volume", f"{what}: state {volume.state}", volume=number)
        if volume.generation == 0:
            report.add("volume", f"{what}: generation 0 means that it was never made", volume=number)
        if not volume.name or len(volume.name.encode(errors="replace")) > 255:
            report.add("volume", f"{what}: no valid name", volume=number)
        if not 0 < volume.size_bytes <= 1 << 60:
            report.add("volume", f"{what}: {volume.size_bytes} bytes", volume=number)
        if volume.state == layout.VOLUME_READY:
            if volume.name in names:
                report.add("volume", f"{what}: volume {names[volume.name]} has the same name", volume=number)
            names[volume.name] = number


def check_values(store: Store, report: Report, totals: Totals, keys: np.ndarray, values: np.ndarray) -> None:
    """Map values of some leaves by themselves: kinds, ranges, and whether a volume is there for them."""
    kinds, numbers = layout.kinds(values), layout.numbers(values)
    totals.promised_zeros += int(np.count_nonzero(kinds == layout.KIND_ZERO))
    placed = kinds == layout.KIND_PBA
    for volume in np.unique(keys >> np.uint64(52)):
        rows = keys >> np.uint64(52) == volume
        number = int(volume)
        used = np.flatnonzero((values[rows] != 0).any(axis=1))
        totals.mapped[number] = totals.mapped.get(number, 0) + int(np.count_nonzero(placed[rows]))
        if number not in totals.volumes:
            if len(used) and store.whole(layout.TREE_VOLUMES):
                first = block_of(int(keys[rows][used[0]]))[1]
                report.add(
                    "map", f"volume {number} is not there, but blocks of it from {first} on are mapped", volume=number
                )
            continue
        size = -(-totals.volumes[number].size_bytes // BLOCK_BYTES)
        lbas = (keys[rows] & np.uint64((1 << 52) - 1))[:, None] + np.arange(512, dtype=np.uint64)
        for lba in lbas[(values[rows] != 0) & (lbas >= size)][:NAMED_MAX]:
            report.add(
                "map", f"volume {number}, block {lba}: mapped, the volume has {size}", volume=number, lba=int(lba)
            )
    wrong = (
        (kinds > layout.KIND_ZERO) | (kinds == layout.KIND_LOG)
        | ((kinds == layout.KIND_HOLE) & (numbers != 0))
        | (placed & ~store.places.hold_data(numbers))
    )  # fmt: skip
    for row, column in np.argwhere(wrong):
        volume_, lba_ = block_of(int(keys[row]) + int(column))
        value = int(values[row, column])
        text = (
            f"names block {value & int(layout.NUMBER_BITS)}, where no data can be"
            if placed[row, column]
            else f"value {value:#x}"
        )
        report.add("map", f"volume {volume_}, block {lba_}: {text}", volume=volume_, lba=lba_)


def can_be_recounted(store: Store) -> bool:
    """Without its fingerprint a block counts all the same."""
    return all(tree == layout.TREE_PRINTS for tree, _, _ in store.lost)


# --- Counts -----------------------------------------------------------------------------------------------------------


def compare_counts(store: Store, report: Report, totals: Totals, first: int, end: int, found: np.ndarray) -> None:
    counts = store.counts(first, end)
    totals.stored += int(np.count_nonzero(counts))
    totals.references += int(counts.sum(dtype=np.uint64))
    if not can_be_recounted(store):
        return
    data = store.places.data_mask(first, end)
    for index in np.flatnonzero(counts != found):
        block, has, says = int(first + index), int(found[index]), int(counts[index])
        if not data[index]:
            text = f"block {block} can hold no data and counts {says} references"
        elif says == 0:
            text = f"block {block} is free, and the map names it {has} time{'s' if has > 1 else ''}"
        elif has == 0:
            text = f"block {block} counts {says} reference{'s' if says > 1 else ''}, and the map names it nowhere"
        else:
            text = f"block {block} counts {says} references, the map has {has}"
        # Derivable from the map wherever the block still holds what the map means; one that was free may not.
        repairable = says != 0 and bool(data[index])
        if repairable:
            totals.wrong_counts[block] = has
        report.add("count", text, repairable, block=block)
    # Sums of groups; those of which the log speaks follow from the counts.
    low, high = first // layout.GROUP_BLOCKS, -(-end // layout.GROUP_BLOCKS)
    says_ = store.table(layout.TREE_GROUPS, layout.GROUPS_PER_PAGE, "<u2", low, high)
    if not store.whole(layout.TREE_GROUPS):
        return
    padded = np.zeros((high - low) * layout.GROUP_BLOCKS, bool)
    padded[: end - first] = counts != 0
    sums = padded.reshape(-1, layout.GROUP_BLOCKS).sum(axis=1)
    logged = np.unique(slice_of(store.log.counts, first, end)[:, 0] // np.uint64(layout.GROUP_BLOCKS)).astype(np.int64)
    same = sums == says_
    same[logged - low] = True
    for group in np.flatnonzero(~same):
        begin = int(low + group) * layout.GROUP_BLOCKS
        within = slice(begin - first, begin - first + layout.GROUP_BLOCKS)
        mine = counts[within]
        inside = np.flatnonzero(mine if mine.any() else data[within])
        report.add(
            "total", f"{sums[group]} of the blocks {begin} to {begin + layout.GROUP_BLOCKS - 1} are counted, their sum"
            f" says {says_[group]}", len(inside) > 0, block=begin,
        )  # fmt: skip
        if len(inside):  # a record of any of its blocks has the sum counted anew
            totals.wrong_groups[begin + int(inside[0])] = int(mine[inside[0]])


def compare_sums(store: Store, report: Report, totals: Totals) -> None:
    if not can_be_recounted(store):
        report.notes.append("pages are lost: counts and sums were not compared")
        return
    for number, volume in totals.volumes.items():
        mapped = totals.mapped.get(number, 0)
        if mapped != volume.mapped_blocks:
            text = f"volume {number} ({volume.name!r}) maps {mapped} blocks, its entry says {volume.mapped_blocks}"
            report.add("total", text, True, volume=number)
            totals.wrong_mapped[number] = mapped - volume.mapped_blocks
    stored = store.root.stored_blocks + store.log.stored
    if stored != totals.stored:
        report.add("total", f"{totals.stored} blocks are stored, the sum says {stored}", True)
    zeros = store.root.zero_promises + store.log.zeros
    if zeros != totals.promised_zeros:
        report.add("total", f"{totals.promised_zeros} blocks are promised zeros, the sum says {zeros}", True)


# --- Data -------------------------------------------------------------------------------------------------------------


def verify_data(store: Store, report: Report, totals: Totals, progress: Progress = silent) -> None:
    """Reads every stored block and compares its fingerprint; damaged ones are reported with who refers to them."""
    damaged: dict[int, str] = {}
    done = 0
    for first, end in windows(0, store.root.device_blocks, 1 << 18):
        counts = store.counts(first, end)
        stored = np.flatnonzero(counts)
        if not len(stored):
            continue
        prints = store.prints(first, end)
        for begin in range(0, len(stored), DATA_RUN_BLOCKS):
            progress("data", done, totals.stored)
            some = stored[begin : begin + DATA_RUN_BLOCKS]
            blocks, readable = store.image.gather((first + some).astype(np.uint64))
            for index, offset in enumerate(some):
                low, high = prints[offset]
                if not readable[index]:
                    damaged[int(first + offset)] = "cannot be read"
                elif layout.fingerprint(blocks[index]) != int(high) << 64 | int(low):
                    damaged[int(first + offset)] = "is not what was stored"
            done += len(some)
    totals.verified, totals.damaged = done, len(damaged)
    users = referrers(store, np.array(sorted(damaged), np.uint64), progress)
    for block, text in damaged.items():
        named, count = users.get(block, ([], 0))
        where = ", ".join(f"{totals.volumes[v].name if v in totals.volumes else v} block {lba}" for v, lba in named)
        more = f" and {count - len(named)} more" if count > len(named) else ""
        report.add(
            "data", f"block {block} {text}; it is {where or 'nowhere in a volume'}{more}", block=block,
            referrers=[{"volume": v, "lba": lba} for v, lba in named], referrer_count=count,
        )  # fmt: skip


def referrers(
    store: Store, blocks: np.ndarray, progress: Progress = silent
) -> dict[int, tuple[list[tuple[int, int]], int]]:
    """Of each of `blocks` (sorted): the first places in volumes that the map has for it, and how many there are."""
    found: dict[int, tuple[list[tuple[int, int]], int]] = {}
    if not len(blocks):
        return found
    for keys, values in store.leaves():
        placed = layout.kinds(values) == layout.KIND_PBA
        hit = placed & np.isin(layout.numbers(values), blocks)
        for row, column in np.argwhere(hit):
            block = int(layout.numbers(values[row, column]))
            named, count = found.get(block, ([], 0))
            if len(named) < NAMED_MAX:
                named.append(block_of(int(keys[row]) + int(column)))
            found[block] = (named, count + 1)
    return found


# --- What volumes cost ------------------------------------------------------------------------------------------------


def usage(store: Store, totals: Totals, window: int = WINDOW_BLOCKS) -> list[dict[str, Any]]:
    """By volume, in bytes: mapped; alone: its distinct blocks; shared: of these also in others; freed if deleted."""
    rows = {n: {"mapped": 0, "alone": 0, "shared": 0} for n in totals.volumes}
    for first, end in windows(0, store.root.device_blocks, window):
        owners = np.zeros(end - first, np.uint16)  # volumes that name the block, as many as there are
        for number in rows:
            seen = seen_by(store, number, first, end, rows[number])
            owners += seen
        for number in rows:
            seen = seen_by(store, number, first, end, None)
            rows[number]["alone"] += int(np.count_nonzero(seen))
            rows[number]["shared"] += int(np.count_nonzero(seen & (owners > 1)))
    return [
        {
            "name": totals.volumes[number].name,
            "mapped_bytes": row["mapped"] * BLOCK_BYTES,
            "alone_bytes": row["alone"] * BLOCK_BYTES,
            "shared_bytes": row["shared"] * BLOCK_BYTES,
            "freed_bytes": (row["alone"] - row["shared"]) * BLOCK_BYTES,
        }
        for number, row in rows.items()
    ]


def seen_by(store: Store, volume: int, first: int, end: int, row: dict[str, int] | None) -> np.ndarray:
    """Which blocks of [first, end) a volume names."""
    seen = np.zeros(end - first, bool)
    for keys, values in store.leaves():
        mine = values[keys >> np.uint64(52) == np.uint64(volume)]
        places = layout.numbers(mine[layout.kinds(mine) == layout.KIND_PBA])
        places = places[(places >= first) & (places < end)]
        if row is not None:
            row["mapped"] += len(places)
        seen[(places - np.uint64(first)).astype(np.int64)] = True
    return seen
