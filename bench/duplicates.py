"""Streams of blocks with duplicates like those of real data: how often, in runs of which length, how far apart.

- `Profile(...)`, `PROFILES`               how often a content is repeated, by a few fitted parameters
- `Runs(mean, lone)`, `IDEDUP_RUNS`        how many blocks in sequence are repeated together
- `Stream(profile, blocks, ...)`           content ids, in windows; `stream[window]` needs no window before it
  - `stream.blocks`, `.distinct`, `.possible`   exactly: blocks, different ones, share that can be saved
  - `stream.batches(count)`                arrays of `count` ids, the last may be shorter
- `contents(ids)`                          their bytes, (blocks, 512) words: incompressible, each block tells its id

How: a *segment* is a run of fresh contents that is written 1 + D times as a whole. Segments of equal D are a class. The
stream is cut into windows of equal shares: each holds for each class and each k the k-th copies of some segments, in an
order of its own. Where those lie is a formula, so memory does not grow with the stream, every block's content can be
known again later without a record of it, and the histogram is that of the profile, not a sample of it.

A profile's parameters come from `python -m atoll.bench.fit_duplicates FILE`, which also says how well they fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from atoll.kernel.chaos_model import contents

__all__ = ["BLOCK", "IDEDUP_RUNS", "PROFILES", "Ids", "Profile", "Runs", "Stream", "contents"]

BLOCK = 4096
# Contents with more duplicates than this are "hot": what they are is told by their share of all blocks.
BODY_MOST = 64
HOT_CONTENTS = 64
# No run is longer; a segment's number and the place in it make the content id.
RUN_MOST = 256
# Blocks per window: at least what can be called shuffled, at most what lies within the write log and every cache.
# Between these a stream has WINDOWS, so that 65 copies can be far apart.
WINDOW_LEAST, WINDOW_MOST, WINDOWS = 64, 1 << 14, 512

Ids = NDArray[np.uint64]
Counts = NDArray[np.int64]

_GOLDEN = 0.6180339887498949
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class Profile:
    """How many duplicates contents have. Of the contents that are not hot, `unique` have none; the share with D = 1 ..
    BODY_MOST falls as D**-exponent * exp(-D / cutoff). `hot` is the share of all blocks that falls on HOT_CONTENTS hot
    contents, the n-th of which has a part in it that falls as n**-hot_exponent."""

    name: str
    unique: float
    exponent: float
    cutoff: float = float("inf")
    hot: float = 0.0
    hot_exponent: float = 1.0
    most: int = BODY_MOST

    def __post_init__(self) -> None:
        if not 0 <= self.unique <= 1 or not 0 <= self.hot < 1 or self.cutoff <= 0 or self.most < 1:
            raise ValueError(f"no profile of duplicates: {self}")

    def body(self) -> NDArray[np.float64]:
        """Share of the contents that have 0, 1, ... duplicates; the hot ones apart."""
        duplicates = np.arange(1, self.most + 1, dtype=float)
        weights = duplicates**-self.exponent * np.exp(-duplicates / self.cutoff)
        return np.concatenate(([self.unique], (1 - self.unique) * weights / weights.sum()))

    def hot_shares(self) -> NDArray[np.float64]:
        """Share of all blocks that each hot content has."""
        weights = np.arange(1, HOT_CONTENTS + 1, dtype=float) ** -self.hot_exponent
        return self.hot * weights / weights.sum()

    @property
    def savings(self) -> float:
        """Share of the blocks that need not be stored, in an endless stream."""
        body = self.body()
        return float(1 - (1 - self.hot) / (body * np.arange(1, len(body) + 1)).sum())


# The first three are fitted to histograms of real data sets that DEDISbench (github.com/jtpaulo/dedisbench) publishes;
# docs/deduplication.md says how well they fit.
PROFILES = {
    profile.name: profile
    for profile in (
        Profile("archival", unique=0.9599, exponent=2.856, hot=0.01182, hot_exponent=2.702),
        Profile("personalfiles", unique=0.9248, exponent=1.667, cutoff=12.2, hot=0.02333, hot_exponent=1.279),
        Profile("kernels", unique=0.5766, exponent=1.144, cutoff=10.8, hot=0.00244, hot_exponent=0.290),
        Profile("unique", unique=1.0, exponent=1.0),
        Profile("half", unique=0.0, exponent=1.0, most=1),  # each content twice
    )
}


@dataclass(frozen=True)
class Runs:
    """Lengths of the runs that are repeated together: `lone` of the blocks are runs of one, the other runs are
    geometric with the given mean (at most RUN_MOST)."""

    mean: float
    lone: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.mean <= RUN_MOST / 4 or not 0 <= self.lone <= 1:
            raise ValueError(
                f"runs have a mean of 1 to {RUN_MOST // 4} blocks and a share of lone blocks of 0 to 1: {self}"
            )

    def lengths(self, uniform: NDArray[np.float64]) -> Counts:
        """Lengths of runs for numbers that are equally distributed over [0, 1)."""
        lone = self.lone * self.mean / (1 - self.lone + self.lone * self.mean)  # of the runs
        if self.mean == 1 or lone == 1:
            return np.ones(len(uniform), np.int64)
        rest = np.clip((uniform - lone) / (1 - lone), 0, 1 - 1e-12)
        lengths = 1 + np.floor(np.log1p(-rest) / np.log1p(-1 / self.mean))
        lengths[uniform < lone] = 1
        return np.minimum(lengths, RUN_MOST).astype(np.int64)

    @property
    def mean_of_all(self) -> float:
        """Of all runs, lone ones too."""
        return float(self.lengths((np.arange(1 << 16) + 0.5) / (1 << 16)).mean())


# Runs with which a threshold of 2, 4, 8 blocks forgoes 20, 29, 50 % of the duplicates. iDedup (Srinivasan et al., FAST
# 2012) found 18-24, 25-33, 50-53 % in its traces.
IDEDUP_RUNS = Runs(mean=6.0, lone=0.18)


@dataclass
class Stream:
    """About `blocks` blocks (the next possible number; `self.blocks` is exact).

    `distance`: blocks between one copy of a run and the next. "near": in the same window; "far": as far as the stream's
    length allows, a (D + 1)-th part of it; a number: that many (in steps of a window), or "far" where that is less.
    Hot contents are everywhere. `window`: blocks in one window, about; 0: chosen. Equal arguments, equal stream.
    """

    profile: Profile
    size: int
    runs: Runs = field(default_factory=lambda: Runs(1.0))
    distance: int | str = "far"
    seed: int = 1
    window: int = 0

    def __post_init__(self) -> None:
        if self.window == 0:
            self.window = min(max(self.size // WINDOWS, WINDOW_LEAST), WINDOW_MOST)
        if self.size < 1 or self.window < 1:
            raise ValueError(f"a stream of {self.size} blocks in windows of {self.window}")
        if isinstance(self.distance, str) and self.distance not in ("near", "far"):
            raise ValueError(f"the distance of duplicates is near, far, or a number of blocks, not {self.distance!r}")
        body = self.profile.body()
        copies = np.arange(1, len(body) + 1)
        segments = self.size * (1 - self.profile.hot) / self.runs.mean_of_all / (body * copies).sum()
        # Rounded sums, so that the rare classes at the end get together what each alone would lose.
        sums = np.round(np.cumsum(np.concatenate(([0.0], body * segments)))).astype(np.int64)
        self._counts: Counts = sums[1:] - sums[:-1]
        self.windows = max(1, round(self.size / self.window))
        self._classes = np.repeat(np.arange(len(body)), copies)  # one row per class and copy
        self._copies = np.concatenate([np.arange(count) for count in copies])
        self._firsts = np.concatenate(([0], np.cumsum(self._counts)))  # number of each class's first segment
        lengths = self._lengths(self._firsts[-1] + np.arange(HOT_CONTENTS))
        hot = np.round(self.profile.hot_shares() * self.size / lengths).astype(np.int64)
        self._hot: Counts = hot  # writes of each hot segment
        self._shifts = self._copies * self._shift(copies)[self._classes]
        self._salt = np.uint64(np.random.SeedSequence((self.seed, 0xD0B1E)).generate_state(1, np.uint64)[0])
        self._measure()

    def _shift(self, copies: Counts) -> Counts:
        """Windows from a copy to the next, by class."""
        far = self.windows // copies
        if self.distance == "near":
            return np.zeros_like(copies)
        if self.distance == "far":
            return far
        return np.minimum(far, int(self.distance) // self.window)

    def _measure(self) -> None:
        total = distinct = 0
        for duplicates, count in enumerate(self._counts):
            for first in range(0, int(count), 1 << 20):
                numbers = self._firsts[duplicates] + np.arange(first, min(int(count), first + (1 << 20)))
                length = int(self._lengths(numbers).sum())
                distinct += length
                total += length * (duplicates + 1)
        lengths = self._lengths(self._firsts[-1] + np.arange(len(self._hot)))
        self.blocks = total + int((lengths * self._hot).sum())
        self.distinct = distinct + int(lengths[self._hot > 0].sum())
        self.possible = 1 - self.distinct / self.blocks if self.blocks else 0.0

    def _lengths(self, segments: Counts) -> Counts:
        """Low discrepancy: any few neighbours have together nearly the mean."""
        return self.runs.lengths(np.asarray(segments * _GOLDEN % 1.0, np.float64))

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, window: int) -> Ids:
        """Content ids of one window, in the order in which they are written."""
        if not 0 <= window < self.windows:
            raise IndexError(window)
        counts, of = self._counts[self._classes], self.windows
        source = (window - self._shifts) % of
        begin, end = source * counts // of, (source + 1) * counts // of
        segments = [_ranges(self._firsts[self._classes] + begin, end - begin)]
        hot = (window + 1) * self._hot // of - window * self._hot // of
        segments.append(np.repeat(self._firsts[-1] + np.arange(len(hot)), hot))
        chosen = np.concatenate(segments)
        np.random.default_rng((self.seed, window)).shuffle(chosen)
        lengths = self._lengths(chosen)
        return self._mixed(_ranges(chosen * RUN_MOST, lengths).astype(np.uint64))

    def _mixed(self, numbers: Ids) -> Ids:
        """One to one, so that streams of two seeds have no content in common but by chance."""
        numbers = numbers ^ self._salt
        for shift, factor in zip((30, 27), _MIX, strict=True):
            numbers = (numbers ^ (numbers >> np.uint64(shift))) * factor
        return numbers ^ (numbers >> np.uint64(31))

    def __iter__(self) -> Iterator[Ids]:
        return (self[window] for window in range(self.windows))

    def batches(self, count: int) -> Iterator[Ids]:
        """All ids in arrays of `count`; the last may be shorter."""
        rest = np.empty(0, np.uint64)
        for ids in self:
            rest = np.concatenate((rest, ids))
            whole = len(rest) // count * count
            yield from rest[:whole].reshape(-1, count)
            rest = rest[whole:]
        if len(rest):
            yield rest


def _ranges(firsts: Counts, counts: Counts) -> Counts:
    """firsts[0], firsts[0] + 1, ... (counts[0] numbers), firsts[1], ..."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(firsts - (ends - counts), counts)
