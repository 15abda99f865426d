"""What a measurement writes and reads back: requests of whole blocks at places of a volume, each time the same.

- `Generated(stream, ...)`   a stream of duplicates, in sequence
- `Images(paths, ...)`       files as they are, one after the other
- `Trace(path)`              the writes of an FIU trace (SNIA's format of blkios with MD5 sums per block)
- `Unshared(workload)`       the same places, but no two blocks are equal: what reading costs without any sharing

Each has `writes()` and `reads()`, iterators of (first block, bytes): what to write, and what must come back
afterwards, by address and in the original request sizes; and `scan()`: blocks that are not zero, and how many
different ones.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from atoll.bench.duplicates import BLOCK, Ids, Stream, contents

# Requests are cut there: what NBD servers take at once, and Atoll's destage sees at once.
REQUEST_MOST = 64
Request = tuple[int, Any]  # first block, a buffer of whole blocks


@dataclass(frozen=True)
class Scan:
    """`blocks` are not zero; `distinct` of them differ. A perfect deduplicator saves `possible` of them."""

    blocks: int
    distinct: int

    @property
    def possible(self) -> float:
        return 1 - self.distinct / self.blocks if self.blocks else 0.0


class Workload(ABC):
    """`name`: for tables. `volume_blocks`: a volume that holds it."""

    name: str
    volume_blocks: int

    @abstractmethod
    def writes(self) -> Iterator[Request]: ...

    def reads(self) -> Iterator[Request]:
        return self.writes()

    @abstractmethod
    def scan(self) -> Scan: ...


def request_sizes(mean: float, seed: int) -> Iterator[int]:
    """Blocks per request: geometric, at most REQUEST_MOST; no end."""
    chance = np.random.default_rng((seed, 0x512E5))
    while True:
        yield from np.minimum(chance.geometric(1 / mean, 4096), REQUEST_MOST).tolist()


@dataclass
class Generated(Workload):
    stream: Stream
    request_mean: float = 16.0
    seed: int = 1

    def __post_init__(self) -> None:
        self.name, self.volume_blocks = self.stream.profile.name, self.stream.blocks

    def writes(self) -> Iterator[Request]:
        sizes, first = request_sizes(self.request_mean, self.seed), 0
        rest = np.empty(0, np.uint64)
        for ids in self.stream:
            rest, at = np.concatenate((rest, ids)), 0
            while len(rest) - at >= REQUEST_MOST:
                size = next(sizes)
                yield first, contents(rest[at : at + size])
                first, at = first + size, at + size
            rest = rest[at:]
        while len(rest):
            size = next(sizes)
            yield first, contents(rest[:size])
            first, rest = first + min(size, len(rest)), rest[size:]

    def scan(self) -> Scan:
        return Scan(self.stream.blocks, self.stream.distinct)


@dataclass
class Images(Workload):
    paths: Sequence[Path]
    request_mean: float = 16.0
    seed: int = 1

    def __post_init__(self) -> None:
        self.name = self.paths[0].name if len(self.paths) == 1 else f"{len(self.paths)} images"
        self.volume_blocks = sum(-(-path.stat().st_size // BLOCK) for path in self.paths)
        if self.volume_blocks == 0:
            raise ValueError(f"nothing is in {', '.join(map(str, self.paths))}")

    def writes(self) -> Iterator[Request]:
        first, sizes = 0, request_sizes(self.request_mean, self.seed)
        for path in self.paths:
            with path.open("rb") as file:
                while data := file.read(next(sizes) * BLOCK):
                    data += bytes(-len(data) % BLOCK)
                    yield first, data
                    first += len(data) // BLOCK

    def scan(self) -> Scan:
        return scan(data for _, data in self.writes())


def scan(buffers: Iterator[Any]) -> Scan:
    """Counts blocks by a strong sum of each."""
    seen: set[bytes] = set()
    blocks, zero = 0, bytes(BLOCK)
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        for at in range(0, len(view), BLOCK):
            block = view[at : at + BLOCK]
            if block != zero:
                blocks += 1
                seen.add(hashlib.blake2b(block, digest_size=16).digest())
    return Scan(blocks, len(seen))


class Trace(Workload):
    """Lines "time pid process lba size W|R major minor md5": lba and size in sectors of 512 bytes, one block per line.
    Writes that go on where the last one ended, at the same time, are one request. Addresses are moved together, so
    that the volume is no larger than what is written. ValueError names the line that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        times, lbas, ids = [], [], []
        numbers: dict[str, int] = {}
        with path.open() as lines:
            for number, line in enumerate(lines, 1):
                parts = line.split()
                try:
                    time, lba, size, kind, content = parts[0], int(parts[3]), int(parts[4]), parts[5], parts[8]
                except (IndexError, ValueError):
                    raise ValueError(f"{path}:{number}: no access of a block trace: {line.strip()[:100]!r}") from None
                if kind.upper().startswith("W") and size == 8 and lba % 8 == 0:
                    times.append(time)
                    lbas.append(lba // 8)
                    ids.append(numbers.setdefault(content, len(numbers) + 1))
        if not ids:
            raise ValueError(f"{path}: no write of a whole block")
        places, where = np.unique(np.array(lbas), return_inverse=True)
        self.volume_blocks = len(places)
        self._lbas, self._ids = where, np.array(ids, np.uint64)
        # A request ends where the next write is elsewhere, at another time, or would make it too long.
        self._starts = [0]
        for index in range(1, len(ids)):
            follows = lbas[index] == lbas[index - 1] + 1 and times[index] == times[index - 1]
            if not follows or index - self._starts[-1] == REQUEST_MOST:
                self._starts.append(index)
        self._starts.append(len(ids))

    @cached_property
    def _final(self) -> Ids:
        final = np.zeros(self.volume_blocks, np.uint64)
        final[self._lbas] = self._ids  # the last of several wins
        return final

    def writes(self) -> Iterator[Request]:
        for begin, end in zip(self._starts, self._starts[1:], strict=False):
            yield int(self._lbas[begin]), contents(self._ids[begin:end])

    def reads(self) -> Iterator[Request]:
        places = {
            (int(self._lbas[begin]), end - begin) for begin, end in zip(self._starts, self._starts[1:], strict=False)
        }
        for first, count in sorted(places):
            yield first, contents(self._final[first : first + count])

    def scan(self) -> Scan:
        return Scan(self.volume_blocks, len(np.unique(self._final)))


@dataclass
class Unshared(Workload):
    workload: Workload

    def __post_init__(self) -> None:
        self.name, self.volume_blocks = f"{self.workload.name}, nothing equal", self.workload.volume_blocks

    def _replaced(self, requests: Iterator[Request]) -> Iterator[Request]:
        for first, data in requests:
            words = np.frombuffer(data, np.uint64).reshape(-1, BLOCK // 8)
            ids = np.arange(first, first + len(words), dtype=np.uint64) + np.uint64(1 << 48)
            ids[~words.any(axis=1)] = 0
            yield first, contents(ids)

    def writes(self) -> Iterator[Request]:
        return self._replaced(self.workload.writes())

    def reads(self) -> Iterator[Request]:
        return self._replaced(self.workload.reads())

    def scan(self) -> Scan:
        blocks = self.workload.scan().blocks
        return Scan(blocks, blocks)
