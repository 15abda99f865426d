"""Fits the parameters of a `duplicates.Profile` to a histogram of a real data set, and says how well they fit.

    python -m atoll.bench.fit_duplicates [--name NAME] FILE...

FILE: lines "D N", N different blocks have D duplicates each (0: none), as DEDISbench has them.

How: `unique` and `hot` are read off. Of the body, the exponent is chosen so that the mean (and with it the savings) is
right, for each of a range of cutoffs; of these the one with the least difference of the distributions is taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atoll.bench.duplicates import BODY_MOST, HOT_CONTENTS, Profile

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    profile: Profile
    blocks: int
    savings: float  # of the data set
    difference: (
        float  # between the shares of blocks with at most D duplicates, at the D <= BODY_MOST where it is largest
    )


def read_histogram(path: Path) -> dict[int, int]:
    """Contents by number of duplicates. ValueError names the line."""
    histogram: dict[int, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            duplicates, contents = map(int, line.split())
            if duplicates < 0 or contents < 0:
                raise ValueError
        except ValueError:
            raise ValueError(f"{path}:{number}: not two counts: {line!r}") from None
        histogram[duplicates] = histogram.get(duplicates, 0) + contents
    if not histogram or not any(0 < duplicates <= BODY_MOST for duplicates in histogram):
        raise ValueError(f"{path}: no content with 1 to {BODY_MOST} duplicates")
    return histogram


def fit(name: str, histogram: dict[int, int]) -> Fit:
    blocks = sum((duplicates + 1) * count for duplicates, count in histogram.items())
    body = np.array([histogram.get(duplicates, 0) for duplicates in range(BODY_MOST + 1)], float)
    unique = body[0] / body.sum()
    tail = body[1:] / body[1:].sum()
    hot = {duplicates: count for duplicates, count in histogram.items() if duplicates > BODY_MOST and count}
    hot_blocks = sum((duplicates + 1) * count for duplicates, count in hot.items())
    hot_exponent = top_exponent((max(hot) + 1) / hot_blocks) if hot else 1.0
    mean = float((tail * np.arange(1, BODY_MOST + 1)).sum())
    candidates = []
    for cutoff in (*np.geomspace(2, 1000, 200), np.inf):
        exponent = body_exponent(mean, float(cutoff))
        if exponent is not None:
            profile = Profile(name, float(unique), exponent, float(cutoff), hot_blocks / blocks, hot_exponent)
            candidates.append((difference(profile, body, blocks), profile))
    if not candidates:
        raise ValueError(f"{name}: no body of D**-exponent * exp(-D / cutoff) has a mean of {mean:.2f} duplicates")
    least, best = min(candidates, key=lambda candidate: candidate[0])
    return Fit(best, blocks, 1 - sum(histogram.values()) / blocks, least)


def difference(profile: Profile, body: Floats, blocks: int) -> float:
    sizes = np.arange(1, len(body) + 1)
    model = profile.body() * sizes
    model *= (1 - profile.hot) / model.sum()
    return float(np.abs(np.cumsum(model) - np.cumsum(body * sizes) / blocks).max())


def body_exponent(mean: float, cutoff: float) -> float | None:
    """The exponent with which the contents that have duplicates have `mean` of them; None: no such from -2 to 8."""

    def mean_of(exponent: float) -> float:
        shares = Profile("", 0.0, exponent, cutoff).body()
        return float((shares * np.arange(len(shares))).sum())

    return falling(mean_of, mean, -2.0, 8.0)


def top_exponent(share: float) -> float:
    """The exponent with which the first hot content has `share` of all hot ones have; 0: of equal parts or less."""
    numbers = np.arange(1, HOT_CONTENTS + 1, dtype=float)
    return -(falling(lambda negative: float(1 / (numbers**negative).sum()), share, -16.0, 0.0) or 0.0)


def falling(function: Callable[[float], float], value: float, low: float, high: float) -> float | None:
    """Where a falling function has `value`, by bisection."""
    if not function(high) <= value <= function(low):
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > value else (low, middle)
    return low


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", help="of the profile; default: the file's")
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    for path in options.files:
        try:
            found = fit(options.name or path.stem, read_histogram(path))
        except (OSError, ValueError) as error:
            print(f"fit_duplicates: {error}", file=sys.stderr)
            return 1
        profile = found.profile
        print(
            f'Profile("{profile.name}", unique={profile.unique:.4f}, exponent={profile.exponent:.3f}, '
            f"cutoff={profile.cutoff:.1f}, hot={profile.hot:.5f}, hot_exponent={profile.hot_exponent:.3f})"
        )
        print(
            f"    {found.blocks} blocks; savings {found.savings:.2%}, of the profile {profile.savings:.2%}; "
            f"distributions differ by {found.difference:.4f} at most"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
