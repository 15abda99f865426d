"""What a measurement writes and reads back: requests of whole blocks at places of a volume, each time the same.

- `Generated(stream, ...)`   a stream of duplicates, in sequence
- `Images(paths, ...)`       files as they are, one after the other
- `Trace(path)`              the writes of an FIU trace (SNIA's format of blkios with MD5 sums per block)
- `Unshared(workload)`       the same places, but no two blocks are equal: what reading costs without any sharing

Each has `writes()`, an iterator of (first block, bytes); `places()`, the original requests (first block, count) by
address, each once; `data(first, count)`, what must be there after all writes; and `scan()`: blocks that are not zero,
and how many different ones.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atoll.bench.duplicates import BLOCK, Ids, Stream, contents

# Requests are cut there: what NBD servers take at once, and Atoll's destage sees at once.
REQUEST_MOST = 64
Place = tuple[int, int]  # first block, blocks


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

    def writes(self) -> Iterator[tuple[int, Any]]:
        """Where each place is written once, in sequence."""
        return ((first, self.data(first, count)) for first, count in self.places())

    @abstractmethod
    def places(self) -> list[Place]: ...

    @abstractmethod
    def data(self, first: int, count: int) -> Any: ...

    @abstractmethod
    def scan(self) -> Scan: ...


def cut(blocks: int, mean: float, seed: int) -> list[Place]:
    """[0, blocks) in requests of geometric sizes, at most REQUEST_MOST blocks."""
    count = int(blocks / mean) + 1
    sizes = np.minimum(np.random.default_rng((seed, 0x512E5)).geometric(1 / mean, 2 * count + 1024), REQUEST_MOST)
    ends = np.minimum(np.cumsum(sizes), blocks)
    ends = ends[: int(np.searchsorted(ends, blocks)) + 1]
    assert ends[-1] == blocks, "twice the mean number of requests, and more, is enough"
    firsts = np.concatenate(([0], ends[:-1]))
    return list(zip(firsts.tolist(), (ends - firsts).tolist(), strict=True))


class Generated(Workload):
    """Keeps 8 bytes per block."""

    def __init__(self, stream: Stream, request_mean: float = 16.0, seed: int = 1) -> None:
        self.name, self.volume_blocks, self._stream = stream.profile.name, stream.blocks, stream
        self._ids: Ids = np.concatenate(list(stream))
        self._places = cut(stream.blocks, request_mean, seed)

    def places(self) -> list[Place]:
        return self._places

    def data(self, first: int, count: int) -> Any:
        return contents(self._ids[first : first + count])

    def scan(self) -> Scan:
        return Scan(self._stream.blocks, self._stream.distinct)


class Images(Workload):
    """ValueError if there is nothing in them."""

    def __init__(self, paths: Sequence[Path], request_mean: float = 16.0, seed: int = 1) -> None:
        self.name = paths[0].name if len(paths) == 1 else f"{len(paths)} images"
        self._paths = paths
        self._places: list[Place] = []
        self._firsts: list[int] = []  # of each file
        end = 0
        for number, path in enumerate(paths):
            self._firsts.append(end)
            blocks = -(-path.stat().st_size // BLOCK)
            if blocks:
                self._places += [(end + first, count) for first, count in cut(blocks, request_mean, seed + number)]
            end += blocks
        self.volume_blocks = end
        if not end:
            raise ValueError(f"nothing is in {', '.join(map(str, paths))}")

    def places(self) -> list[Place]:
        return self._places

    def data(self, first: int, count: int) -> Any:
        """Of one file: as places are."""
        number = int(np.searchsorted(self._firsts, first, side="right")) - 1
        with self._paths[number].open("rb") as file:
            file.seek((first - self._firsts[number]) * BLOCK)
            return file.read(count * BLOCK).ljust(count * BLOCK, b"\0")

    def scan(self) -> Scan:
        return scan(self.data(*place) for place in self.places())


def scan(buffers: Iterable[Any]) -> Scan:
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
        places, self._lbas = np.unique(np.array(lbas), return_inverse=True)
        self.volume_blocks = len(places)
        self._ids = np.array(ids, np.uint64)
        # A request ends where the next write is elsewhere, at another time, or would make it too long.
        self._starts = [0]
        for index in range(1, len(ids)):
            follows = lbas[index] == lbas[index - 1] + 1 and times[index] == times[index - 1]
            if not follows or index - self._starts[-1] == REQUEST_MOST:
                self._starts.append(index)
        self._starts.append(len(ids))
        self._final: Ids = np.zeros(self.volume_blocks, np.uint64)
        self._final[self._lbas] = self._ids  # the last of several wins

    def writes(self) -> Iterator[tuple[int, Any]]:
        for begin, end in zip(self._starts, self._starts[1:], strict=False):
            yield int(self._lbas[begin]), contents(self._ids[begin:end])

    def places(self) -> list[Place]:
        pairs = zip(self._starts, self._starts[1:], strict=False)
        return sorted({(int(self._lbas[begin]), end - begin) for begin, end in pairs})

    def data(self, first: int, count: int) -> Any:
        return contents(self._final[first : first + count])

    def scan(self) -> Scan:
        return Scan(self.volume_blocks, len(np.unique(self._final)))


class Unshared(Workload):
    def __init__(self, workload: Workload) -> None:
        self.name, self.volume_blocks = f"{workload.name}, nothing equal", workload.volume_blocks
        self._workload = workload

    def _replaced(self, first: int, data: Any) -> Any:
        words = np.frombuffer(data, np.uint64).reshape(-1, BLOCK // 8)
        ids = np.arange(first, first + len(words), dtype=np.uint64) + np.uint64(1 << 48)
        ids[~words.any(axis=1)] = 0
        return contents(ids)

    def writes(self) -> Iterator[tuple[int, Any]]:
        return ((first, self._replaced(first, data)) for first, data in self._workload.writes())

    def places(self) -> list[Place]:
        return self._workload.places()

    def data(self, first: int, count: int) -> Any:
        return self._replaced(first, self._workload.data(first, count))

    def scan(self) -> Scan:
        blocks = self._workload.scan().blocks
        return Scan(blocks, blocks)
