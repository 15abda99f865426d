"""What every sector of a region may hold at each moment, and the contents that go with it.

- `contents(ids)`                    blocks of 4 KiB, made of 64-bit content ids; id 0 is zeros
- `Model(first_sector, sectors)`     of one worker's region; all connections of the worker share it
  - `begin_write / end_write`        in flight: old or new; after success exactly the new one
  - `begin_read / check`             against all that the sectors may have held while the read was in flight
  - `free_for_write`               so that at most one write meets a read, and none meets another

A sector is 512 bytes. Sector s of a block with content id c is the s-th eighth of contents(c), so whole blocks with the
same id are duplicates wherever they lie, and yet every byte of every sector is known. Each sector starts with its id:
a wrong one tells what it is, an older content of the same place (a lost write) or something else.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SECTOR = 512
BLOCK = 4096
PER_BLOCK = BLOCK // SECTOR
WORDS = BLOCK // 8
# Content ids up to here are a pool that all workers draw their duplicates from, in sequence, so that runs repeat.
POOL = 4096
NONE = np.uint64(0xFFFFFFFFFFFFFFFF)
# Contents that a sector may have after failed writes, one after the other, beside the last one.
ALTERNATIVES = 6

Ids = NDArray[np.uint64]

_BASE: Ids = np.random.default_rng(0xA7011).integers(1, 1 << 63, WORDS, dtype=np.uint64)
_ODD = np.uint64(0x9E3779B97F4A7C15)


def contents(ids: Ids) -> Ids:
    """(blocks, 512) words: the content of each id. 1 MiB takes about 0.3 ms."""
    words = _BASE[None, :] * (ids * _ODD | np.uint64(1))[:, None]
    words ^= words >> np.uint64(29)
    words[:, :: SECTOR // 8] = ids[:, None]
    words[ids == 0] = 0
    return words


@dataclass(slots=True, eq=False)
class Span:
    """A request in flight on sectors [first, end) of the region."""

    kind: str  # "read", "write", "trim", "zero"
    first: int
    end: int
    new: Ids | None = None  # per sector, of writes
    old: Ids | None = None  # per sector, of reads: what was there when it began
    also: Ids | None = None
    pending: Ids | None = None
    met: bool = False  # a read that met a write


@dataclass(slots=True)
class Finding:
    """A sector that holds what it must not."""

    sector: int
    expected: int
    found: int
    lost: bool  # an older content of the same place: an acknowledged write is gone
    wrong_bytes: int


@dataclass
class Model:
    first_sector: int
    sectors: int
    now: Ids = field(init=False)
    also: Ids = field(init=False)  # (ALTERNATIVES, sectors): other contents that are right as well, or NONE
    pending: Ids = field(init=False)  # of the write in flight, or NONE
    past: list[Ids] = field(init=False)  # the two contents before `now`: only to tell a lost write from other damage
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.now = np.zeros(self.sectors, np.uint64)
        self.also = np.full((ALTERNATIVES, self.sectors), NONE)
        self.pending = np.full(self.sectors, NONE)
        self.past = [np.full(self.sectors, NONE), np.full(self.sectors, NONE)]

    # --- Where a request may go ---

    def free_for_write(self, first: int, end: int) -> bool:
        """No write meets another; a read in flight meets at most one."""
        for span in self.spans:
            if span.first < end and first < span.end and (span.kind != "read" or span.met):
                return False
        return True

    # --- Writes ---

    def begin_write(self, kind: str, first: int, end: int, ids: Ids | None) -> Span:
        """`ids`: per sector; None: zeros (of a trim: or what is there)."""
        new = np.zeros(end - first, np.uint64) if ids is None else ids
        span = Span(kind, first, end, new)
        for other in self.spans:
            if other.kind == "read" and other.first < end and first < other.end:
                other.met = True
        self.pending[first:end] = new
        self.spans.append(span)
        return span

    def end_write(self, span: Span, certain: bool) -> None:
        """`certain`: it was acknowledged. Otherwise (an error, a lost connection) old and new are both right."""
        first, end = span.first, span.end
        assert span.new is not None
        if span.kind == "trim":
            certain = False  # a server need not
        if certain:
            self.also[:, first:end] = NONE
        else:
            self.also[1:, first:end] = self.also[:-1, first:end].copy()
            self.also[0, first:end] = self.now[first:end]
        self.past[1][first:end] = self.past[0][first:end]
        self.past[0][first:end] = self.now[first:end]
        self.now[first:end] = span.new
        self.pending[first:end] = NONE
        self.spans.remove(span)

    def settled(self, first: int, end: int) -> bool:
        """Each sector can hold one content only: a write of uncertain outcome may be added."""
        return bool((self.also[:, first:end] == NONE).all())

    # --- Reads ---

    def begin_read(self, first: int, end: int) -> Span:
        span = Span(
            "read", first, end, None, self.now[first:end].copy(), self.also[:, first:end].copy(),
            self.pending[first:end].copy(),
        )  # fmt: skip
        span.met = any(other.kind != "read" and other.first < end and first < other.end for other in self.spans)
        self.spans.append(span)
        return span

    def end_read(self, span: Span, data: Any) -> list[Finding]:
        """Checks every byte; `data` None: it failed, nothing is known."""
        self.spans.remove(span)
        return [] if data is None else self.check(span, data)

    def check(self, span: Span, data: Any) -> list[Finding]:
        first, end = span.first, span.end
        words = np.frombuffer(data, np.uint64).reshape(end - first, SECTOR // 8)
        found = words[:, 0]
        assert span.old is not None and span.also is not None and span.pending is not None
        right = found == self.now[first:end]
        if not right.all():
            for candidate in (*self.also[:, first:end], self.pending[first:end], span.old, *span.also, span.pending):
                right |= (found == candidate) & (candidate != NONE)
        whole = (words == self._expected(found, first)).all(axis=1)
        if right.all() and whole.all():
            if not span.met:
                self._pin(first, end, found)
            return []
        return self._findings(first, words, found, right & whole)

    def check_all(self, first: int, data: Any) -> list[Finding]:
        """Sectors from `first` on with nothing in flight."""
        end = first + len(data) // SECTOR
        span = Span("read", first, end, None, self.now[first:end], self.also[:, first:end], self.pending[first:end])
        return self.check(span, data)

    def _expected(self, ids: Ids, first: int) -> Ids:
        """Words of the sectors from region sector `first` on, if they hold `ids`."""
        index = (np.arange(first, first + len(ids)) + self.first_sector) % PER_BLOCK
        base = _BASE.reshape(PER_BLOCK, SECTOR // 8)[index]
        words = base * (ids * _ODD | np.uint64(1))[:, None]
        words ^= words >> np.uint64(29)
        words[:, 0] = ids
        words[ids == 0] = 0
        return words

    def _pin(self, first: int, end: int, found: Ids) -> None:
        """What was read is what is there, where two contents were right."""
        unsure = (self.also[:, first:end] != NONE).any(axis=0)
        if unsure.any():
            self.now[first:end][unsure] = found[unsure]
            self.also[:, first:end][:, unsure] = NONE

    def _findings(self, first: int, words: Ids, found: Ids, right: Any) -> list[Finding]:
        findings = []
        for at in np.flatnonzero(~right):
            sector = first + int(at)
            expected = int(self.now[sector])
            want = self._expected(self.now[sector : sector + 1], sector)[0].view(np.uint8)
            wrong = int((words[at].view(np.uint8) != want).sum())
            was = int(found[at])
            whole = bool((words[at] == self._expected(found[at : at + 1], sector)[0]).all())
            lost = whole and was in (int(self.past[0][sector]), int(self.past[1][sector]))
            findings.append(Finding(sector, expected, was, lost, wrong))
        return findings


def block_ids(sector_first: int, sector_end: int, ids: Ids) -> Ids:
    """Per sector ids of absolute sectors [first, end), from the ids of the blocks they touch."""
    first_block = sector_first // PER_BLOCK
    index = np.arange(sector_first, sector_end) // PER_BLOCK - first_block
    return ids[index]


def payload(sector_first: int, sector_end: int, ids: Ids) -> Any:
    """The bytes of absolute sectors [first, end), from the ids of the blocks they touch."""
    words = contents(ids).reshape(-1)
    start = sector_first % PER_BLOCK * (SECTOR // 8)
    return words[start : start + (sector_end - sector_first) * (SECTOR // 8)].view(np.uint8)
