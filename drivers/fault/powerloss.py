"""The devices that a power loss could have left, one after another, from a record of the fault-injecting driver.

    device = LossyDevice(base)                  what the device held when the record began (bytes, a numpy array)
    for event in record.read_record(path):
        device.feed(event)
        with device.lost(chance) as how:        `device.image` is now as power loss may leave it; afterwards as before
            ...

What a device may do (the same as record.power_loss): a write that was answered before a flush started is there once
that flush was answered with success. Of all other writes each sector of 512 bytes may be there or not, whatever their
order was; of two writes to one sector the later one wins, if it is there.

`lost` draws one of the ways in which that happens: everything volatile is there, or nothing; whole writes are, or are
not (reordered); single sectors (torn); all but one; one alone; those up to some moment (in order), the last one torn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from atoll.drivers.fault._fault import lib
from atoll.drivers.fault.record import SECTOR, Event

WAYS = ("all", "none", "writes", "sectors", "all but one", "one", "in order, torn")


@dataclass(frozen=True)
class _Write:
    number: int  # order of the start
    first: int  # sector
    sectors: np.ndarray  # (n, SECTOR)


class LossyDevice:
    def __init__(self, base: np.ndarray) -> None:
        """`base` is used in place."""
        self.image = base.reshape(-1, SECTOR)
        self._winner = np.full(len(self.image), -1, np.int64)  # newest durable write of each sector
        self._volatile: list[_Write] = []
        self._open: dict[int, list[_Write]] = {}  # by identity: not answered
        self._answered: set[int] = set()  # numbers of volatile writes
        self._syncs: dict[int, set[int]] = {}
        self._next = 0

    @property
    def volatile_blocks(self) -> int:
        """Blocks of 4 KiB that are written and may be lost."""
        return sum(len(write.sectors) for write in self._volatile) * SECTOR // 4096

    def feed(self, event: Event) -> None:
        if event.kind in ("write", "discard"):
            data = event.data if event.kind == "write" else bytes(event.length_bytes)
            sectors = np.frombuffer(data, np.uint8).reshape(-1, SECTOR)
            write = _Write(self._next, event.offset_bytes // SECTOR, sectors)
            self._next += 1
            self._volatile.append(write)
            self._open.setdefault(event.identity, []).append(write)
        elif event.kind == "sync":
            self._syncs[event.identity] = set(self._answered)  # done again after a crash: the later start covers more
        elif event.identity in self._syncs:
            covered = self._syncs.pop(event.identity)
            if event.status == lib.ATOLL_OK:
                self._settle(covered)
        else:
            writes = self._open.pop(event.identity, [])
            if event.status == lib.ATOLL_OK:
                self._answered |= {write.number for write in writes}

    def _settle(self, covered: set[int]) -> None:
        for write in self._volatile:
            if write.number in covered:
                there = slice(write.first, write.first + len(write.sectors))
                wins = self._winner[there] < write.number
                self.image[there][wins] = write.sectors[wins]
                self._winner[there][wins] = write.number
        self._volatile = [write for write in self._volatile if write.number not in covered]
        self._answered -= covered

    @contextmanager
    def lost(self, chance: random.Random, way: str | None = None) -> Iterator[str]:
        """The image as power loss now may leave it, one of WAYS."""
        way = way or chance.choice(WAYS)
        before: list[tuple[slice, np.ndarray]] = []
        for write, kept in zip(self._volatile, self._kept(chance, way), strict=True):
            if not kept.any():
                continue
            there = slice(write.first, write.first + len(write.sectors))
            kept = kept & (self._winner[there] < write.number)
            before.append((there, self.image[there].copy()))
            self.image[there][kept] = write.sectors[kept]
        try:
            yield f"{len(self._volatile)} writes volatile, kept: {way}"
        finally:
            for there, content in reversed(before):
                self.image[there] = content

    def _kept(self, chance: random.Random, way: str) -> list[np.ndarray]:
        """Of each volatile write which of its sectors are there."""
        count = len(self._volatile)
        whole = [False] * count
        if way == "all":
            whole = [True] * count
        elif way == "writes":
            share = chance.choice((0.1, 0.5, 0.9))
            whole = [chance.random() < share for _ in range(count)]
        elif way in ("all but one", "one") and count:
            single = chance.randrange(count)
            whole = [(index == single) == (way == "one") for index in range(count)]
        elif way == "in order, torn" and count:
            last = chance.randrange(count)
            whole = [index < last for index in range(count)]
        kept = [np.full(len(write.sectors), is_there) for write, is_there in zip(self._volatile, whole, strict=True)]
        if way == "sectors":
            numpy_chance = np.random.default_rng(chance.getrandbits(64))
            share = chance.choice((0.1, 0.5, 0.9))
            kept = [numpy_chance.random(len(each)) < share for each in kept]
        elif way == "in order, torn" and count:
            kept[last][: chance.randrange(len(kept[last]) + 1)] = True
        return kept
