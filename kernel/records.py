"""What one kernel leaves for the next: the role area of the kernel's own arena.

    0                struct row[16]     one per role, by role number
    16 * ROW_BYTES   struct row         the service as a whole

    row   word 0         which of the two copies holds (0 or 1): the commit point of each change
          words 1..15    unused
          words 16..47   copy 0
          words 48..79   copy 1

- `Rows(pointer)`   `read(index)` -> list of words, `write(index, words)`

A change is written to the copy that does not hold, then word 0 is set: after a crash the next kernel finds either the
old row or the new one. Only the kernel writes here (I1).
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from atoll.ipc._ipc import ffi

COPY_WORDS = 32
_FIRST = (16, 16 + COPY_WORDS)
ROW_WORDS = 16 + 2 * COPY_WORDS
ROW_BYTES = ROW_WORDS * 8
ROW_COUNT = 17
SERVICE = 16  # index of the service's own row
AREA_BYTES = ROW_COUNT * ROW_BYTES


class Word(IntEnum):
    """Words of a role's row. Times are CLOCK_MONOTONIC in nanoseconds."""

    PHASE = 0  # life.Phase
    PID = 1  # of the active process, or of the standby that was sent to be it
    START_TIME = 2
    INCARNATION = 3  # of that process
    STANDBY_PID = 4
    STANDBY_START_TIME = 5
    PREVIOUS_SIGNAL = 6  # that ended the predecessor
    RESTARTS = 7
    CRASHES = 8  # by itself, in a row
    PROMOTED_NS = 9
    SERVED = 10  # 1: an incarnation of this instance has served
    BLAME = 11  # signal to report for a process that the kernel itself killed
    NOT_BEFORE_NS = 12


class ServiceWord(IntEnum):
    """Words of the service's row."""

    BOOTED = 0  # all roles have served
    STOPPING = 1
    TRACE = 2  # last number given to a trace


class Rows:
    """The rows at `pointer` (the role area of the kernel's arena, mapped writable)."""

    def __init__(self, pointer: Any) -> None:
        self._words = ffi.cast("uint64_t *", pointer)

    def read(self, index: int) -> list[int]:
        row = index * ROW_WORDS
        first = row + _FIRST[self._words[row] & 1]
        return [int(self._words[first + word]) for word in range(COPY_WORDS)]

    def write(self, index: int, words: Sequence[int]) -> None:
        row = index * ROW_WORDS
        other = 1 - (self._words[row] & 1)
        first = row + _FIRST[other]
        for word, value in enumerate(words):
            self._words[first + word] = value
        self._words[row] = other  # COMMIT POINT of a change of the kernel's records
