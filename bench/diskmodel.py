"""A model of a 7,200 rpm drive: how long it would need for a sequence of accesses. No measurement.

- `Drive()`, `drive.serve(offsets, lengths)` -> `Served(ms, seeks)`, one number per access

An access that goes on where the last one ended costs its transfer alone. One a little further on the same track waits
for the gap to pass below the head. Any other costs a seek, half a turn, and its transfer. The time of a seek is a
constant and a part that grows with the root of the distance, as Ruemmler and Wilkes (An introduction to disk drive
modeling, IEEE Computer 27(3), 1994) found for all but the longest seeks; the device is taken to span the drive, so
distances count in parts of it. Accesses are served in their order, one at a time. No cache of the drive, no zones.

Default figures: 7,200 rpm and an average seek of 8.2 ms are those of the Ultrastar 7K4000 (HGST's specification,
section 4.4: typical, of a read); 150 MB/s as a mean over the zones and 1 ms from a track to the next are typical of
the class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
# The mean of the root of the distance between two random places, as a part of the whole.
_MEAN_ROOT = 8 / 15


@dataclass(frozen=True)
class Served:
    ms: Floats  # per access
    seeks: NDArray[np.bool_]


@dataclass(frozen=True)
class Drive:
    device_bytes: int
    rpm: float = 7200.0
    seek_track_ms: float = 1.0
    seek_average_ms: float = 8.2
    bytes_per_s: float = 150e6

    @property
    def turn_ms(self) -> float:
        return 60_000 / self.rpm

    @property
    def track_bytes(self) -> float:
        return self.bytes_per_s * self.turn_ms / 1000

    def serve(self, offsets: Counts, lengths: Counts) -> Served:
        """Of accesses in their order, from a head that is at the start of the device."""
        ends = np.concatenate(([0], (offsets + lengths)[:-1])) if len(offsets) else np.empty(0, np.int64)
        gaps = offsets - ends
        passes = (gaps > 0) & (gaps < self.track_bytes)
        seeks = (gaps != 0) & ~passes
        root = (self.seek_average_ms - self.seek_track_ms) / _MEAN_ROOT
        ms = lengths / self.bytes_per_s * 1000
        ms = ms + np.where(passes, gaps / self.bytes_per_s * 1000, 0.0)
        seek_ms = self.seek_track_ms + root * np.sqrt(np.abs(gaps) / self.device_bytes) + self.turn_ms / 2
        return Served(ms + np.where(seeks, seek_ms, 0.0), seeks)
