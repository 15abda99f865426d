"""Puts right what follows from the rest of the device; invents nothing.

- `repair(image, store, totals, report)` -> how many things were changed
- `append(image, store, changes, base)`   records behind the end of the metadata log, under a superblock of the next
  generation

Bad copies are written again from the good ones. Reference counts and sums follow from the block map: they are put right
as the store itself changes them, by records of the metadata log, so no page is rewritten in place; sums that the
superblock holds change with it. Order: log blocks, flush, superblock, flush; so power loss leaves the store as it was,
or repaired, or, where the log blocks are there and the superblock is not, with sums that the next repair puts right.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from atoll.services.dedup.check import layout
from atoll.services.dedup.check.audit import Totals, can_be_recounted
from atoll.services.dedup.check.image import FileImage
from atoll.services.dedup.check.layout import BLOCK_BYTES, HOLES_MAX, KIND_PBA, LEAF_ENTRIES
from atoll.services.dedup.check.reader import Report, Store

RECORDS_PER_BLOCK = 100  # of the log: at least so many fit
MAPPED_MAX = 10000  # blocks by which a volume's sum may be too low and is still put right
Record = tuple[int, ...]  # its words


def repair(image: FileImage, store: Store, totals: Totals, report: Report) -> int:
    done = copy_blocks(image, [*store.bad_copies, *store.log.bad_copies])
    image.flush()
    for place in range(4):
        pair = store.supers.get(place ^ 2)
        if place not in store.supers and pair is not None:
            image.write(layout.super_block(pair.device_blocks, place), sealed(pair.fields, place))
            done += 1
    image.flush()
    if not can_be_recounted(store):
        return done  # nothing can be derived
    sums = [(record(2, block, count),) for block, count in sorted(totals.wrong_groups.items())]
    changes = sums + [(record(2, block, count),) for block, count in sorted(totals.wrong_counts.items())]
    for volume, lacks in totals.wrong_mapped.items():
        changes += [(one,) for one in mapped_records(store, volume, lacks)]
    room = max(0, store.root.log_blocks - store.log.blocks - 2) * RECORDS_PER_BLOCK
    base = {
        "stored_blocks": totals.stored - store.log.stored,
        "zero_promises": totals.promised_zeros - store.log.zeros,
        "map_pages": totals.map_pages,
    }
    # A record of a count of 0 takes one from the sum of stored blocks; of a block that was free it should not.
    base["stored_blocks"] += sum(one[0][1] == 0 for one in sums[:room])
    if changes or any(int(store.root.fields[key]) != value for key, value in base.items()):
        changes = changes[:room]  # the rest when the store has written a checkpoint
        append(image, store, changes, base)
        done += len(changes) + sum(int(store.root.fields[key]) != value for key, value in base.items())
    return done


def copy_blocks(image: FileImage, copies: Sequence[tuple[int, int]]) -> int:
    """(bad block, good block) each."""
    done = 0
    for bad, good in copies:
        data = image.read(good, 1)
        if data is not None:
            image.write(bad, data)
            done += 1
    return done


def record(kind: int, rest: int, *more: int) -> Record:
    return (kind << 60 | rest, *more)


def mapped_records(store: Store, volume: int, lacks: int) -> list[Record]:
    """Records that change nothing but what is counted as mapped: entries' kinds before them are said to be others."""
    if lacks < 0:  # of a leaf that is not there, and of which the log says nothing
        there = {key for keys, _ in store.leaves() for key in keys.tolist() if key >> 52 == volume}
        key = next(key for key in range(volume << 52, volume + 1 << 52, LEAF_ENTRIES) if key not in there)
        parts = [min(HOLES_MAX, -lacks - at) for at in range(0, -lacks, HOLES_MAX)]
        return [record(4, key, HOLES_MAX | named << 16) for named in parts]
    for keys, values in store.leaves() if lacks <= MAPPED_MAX else ():
        mine = keys >> np.uint64(52) == np.uint64(volume)
        for row, column in np.argwhere((layout.kinds(values) == KIND_PBA) & mine[:, None]):
            return [record(1, int(keys[row]) + int(column), int(values[row, column]))] * lacks
    return []


def append(image: FileImage, store: Store, changes: Sequence[Sequence[Record]], base: dict[str, int]) -> None:
    """`changes`: the records of each stand in one block. `base`: fields of the superblock."""
    blocks: list[list[int]] = [[]]
    room = (BLOCK_BYTES - layout.LOG_HEADER.itemsize) // 8
    for change in changes:
        words = [word for one in change for word in one]
        if len(blocks[-1]) + len(words) > room:
            blocks.append([])
        blocks[-1] += words
    sequence, chain = store.log.end, store.log.chain
    fields = next_root(image, store)
    image.flush()  # a block behind another one says that the data of that one were flushed
    for words in blocks if changes else ():
        data = np.zeros(BLOCK_BYTES, np.uint8)
        header = data[: layout.LOG_HEADER.itemsize].view(layout.LOG_HEADER)[0]
        header["magic"], header["sequence"], header["chain"] = layout.LOG_MAGIC, sequence, chain
        header["durable"], header["generation"] = store.log.end, store.root.generation
        header["version"], header["used_bytes"] = layout.VERSION, 8 * len(words)
        data[layout.LOG_HEADER.itemsize :].view("<u8")[: len(words)] = words
        chain = layout.checksum(data[8:], layout.seed(layout.SEED_LOG, store.root.store, sequence))
        header["checksum"] = chain
        for first in store.places.log:
            image.write(first + sequence % store.root.log_blocks, data.tobytes())
        sequence += 1
    image.flush()
    fields["flags"] &= ~np.uint32(layout.CLEAN if changes else 0)
    fields["log_durable"] = sequence
    for key, value in base.items():
        fields[key] = value
    switch(image, fields)


def next_root(image: FileImage, store: Store) -> np.void:
    """A superblock of the next generation, over the same log, of which both copies are there now, not durable yet."""
    copy_blocks(image, [*store.log.bad_copies, *store.log.torn])
    fields: np.void = store.root.fields.copy()
    fields["generation"] += 1
    fields["version"] = layout.VERSION
    fields["log_durable"] = store.log.end
    fields["written_s"] = int(time.time())
    return fields


def switch(image: FileImage, fields: np.void) -> None:
    """Both copies of the superblock. What it names is on the device."""
    for place in (int(fields["generation"]) & 1, 2 + (int(fields["generation"]) & 1)):
        image.write(layout.super_block(int(fields["device_blocks"]), place), sealed(fields, place))
    image.flush()


def sealed(fields: np.void, place: int) -> bytes:
    """The block of a superblock at its place."""
    block = np.zeros(BLOCK_BYTES, np.uint8)
    block[: layout.SUPER_BYTES] = np.frombuffer(fields.tobytes(), np.uint8)
    seeded = layout.seed(layout.SEED_SUPER, 0, place)
    checksum = layout.checksum(block[8 : layout.SUPER_BYTES], seeded)
    block[:8].view("<u8")[0] = checksum
    return block.tobytes()
