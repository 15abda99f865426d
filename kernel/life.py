"""The state of one role as the supervisor keeps it, and how it is written down for the next kernel.

    EMPTY ──promotion sent──► PROMOTING ──lock taken──► RECOVERING ──header says so──► SERVING
      ▲                           │                         │                            │
      └────── dead for sure ──────┴───────── DYING ◄────────┴──────── killed, or dead ───┘
                                                                                     └─stop─► STOPPED

DYING: killed by the supervisor and not dead yet (perhaps stuck in the operating system), or dead by its lock while its
threads may still run. Only from EMPTY is anybody promoted.

After a crash of the kernel: each change was recorded before what it stands for was done (`Life.record`).
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from atoll.kernel.process import Process
from atoll.kernel.records import Rows, Word
from atoll.kernel.table import Role


class Phase(IntEnum):
    """Numbers reach the next kernel: never renumber."""

    EMPTY = 0
    PROMOTING = 1
    RECOVERING = 2
    SERVING = 3
    DYING = 4
    STOPPED = 5


@dataclass(slots=True)
class Life:
    role: Role
    threaded: bool
    phase: Phase = Phase.EMPTY
    active: Process | None = None
    standby: Process | None = None
    incarnation: int = 0
    previous_signal: int = 0
    restarts: int = 0
    crashes: int = 0
    promoted_ns: int = 0
    served: bool = False
    blame: int = 0
    not_before_ns: int = 0
    # Not recorded: clocks of this kernel.
    standby_asked_ns: int = 0
    standby_failures: int = 0
    standby_not_before_ns: int = 0
    detected_ns: int = 0
    start_progress: int = -1
    hang_progress: int = -1
    hang_since_ns: int = 0
    hang_ticks: int = -1  # processor time at its bound, if it was running then
    resend_ns: int = 0
    reason: str = ""
    last_end: str = ""
    waiting_kills: list[Any] = field(default_factory=list)

    def record(self, rows: Rows) -> None:
        words = [0] * len(Word)
        words[Word.PHASE] = self.phase
        if self.active is not None:
            words[Word.PID], words[Word.START_TIME] = self.active.pid, self.active.start_time
        if self.standby is not None:
            words[Word.STANDBY_PID], words[Word.STANDBY_START_TIME] = self.standby.pid, self.standby.start_time
        words[Word.INCARNATION] = self.incarnation
        words[Word.PREVIOUS_SIGNAL] = self.previous_signal
        words[Word.RESTARTS] = self.restarts
        words[Word.CRASHES] = self.crashes
        words[Word.PROMOTED_NS] = self.promoted_ns
        words[Word.SERVED] = self.served
        words[Word.BLAME] = self.blame
        words[Word.NOT_BEFORE_NS] = self.not_before_ns
        rows.write(self.role.number, words)

    def restore(self, rows: Rows) -> tuple[int, int]:
        """Reads the record; returns pid and start time of the active process, which may be gone (`active` is not set).

        The standby is set if it is still there.
        """
        words = rows.read(self.role.number)
        self.phase = Phase(words[Word.PHASE])
        self.incarnation = words[Word.INCARNATION]
        self.previous_signal = words[Word.PREVIOUS_SIGNAL]
        self.restarts = words[Word.RESTARTS]
        self.crashes = words[Word.CRASHES]
        self.promoted_ns = words[Word.PROMOTED_NS]
        self.served = bool(words[Word.SERVED])
        self.blame = words[Word.BLAME]
        self.not_before_ns = words[Word.NOT_BEFORE_NS]
        self.standby = Process.open(words[Word.STANDBY_PID], words[Word.STANDBY_START_TIME])
        return words[Word.PID], words[Word.START_TIME]
