"""What init, kernel, zygote and standbys need of the operating system's view of processes.

- `look(pid)`             state, parent, start time, exit status from /proc, or None
- `name_of(pid)`          its name
- `outlives(pid, signal)` whether a signal does nothing to it
- `Process`               a pid that cannot be mistaken for another's: pid, start time, pidfd
- `name_this`, `die_with_parent`, `adopt_orphans`, `be_protected`    settings of the calling process
- `silence(stream)`       what is written to it goes nowhere
- `come_first`, `be_ordinary`    how soon a process runs
- `holders(path)`         processes that have a file open

After a crash: a pid is reused sooner or later; nothing here trusts a pid without its start time.
"""

import contextlib
import ctypes
import errno
import os
import select
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)

# What a domain does by itself, as opposed to what others do to it (I8).
OWN_SIGNALS = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}
)

# What continues a process or does nothing to it, unless it asks for more (signal(7)).
_HARMLESS = frozenset({signal.SIGCONT, signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH})


def _prctl(option: int, argument: int | bytes) -> None:
    if isinstance(argument, int):
        result = _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0)
    else:
        result = _libc.prctl(option, ctypes.c_char_p(argument), 0, 0, 0)
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), f"prctl({option})")


def silence(stream: TextIO) -> None:
    """What is written to it from now on goes nowhere, and so does what it still holds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def name_this(name: str) -> None:
    """Names the calling thread as `ps` and `top` show it (15 bytes)."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL for this process when its parent dies; ends it at once if that has happened already.

    The setting holds for the parent of that moment and for every subreaper that the process goes to afterwards.
    """
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent_pid:
        os._exit(1)


def adopt_orphans() -> None:
    """Orphans below this process become its children (subreaper)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def be_protected(score: int) -> bool:
    """Sets oom_score_adj (-1000 never killed .. 1000 first); False where that is not permitted."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(score))
    except OSError:
        return False
    return True


_SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}.get(os.uname().machine, -1)
_SYS_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275, "riscv64": 275}.get(os.uname().machine, -1)
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")  # size, policy, flags, nice, priority, slice in ns, two unused
_FLAG_RESET_ON_FORK = 1
FIRST_NICE = -10
SHORT_SLICE_NS = 100_000
REALTIME_PRIORITY = 1


def come_first(pid: int = 0, threads: bool = False) -> None:
    """Lets a process (0: this one) run as soon as it is woken, as far as that is permitted here.

    For those that run for a millisecond while a client waits: kernel, and a standby until it serves. Real time, since
    a higher nice value counts only within a session where sessions are scheduled as groups (autogroup); else that, or
    a shorter slice. `threads`: those that it makes later come first too.
    """
    flags = 0 if threads else _FLAG_RESET_ON_FORK
    if _schedule(pid, os.SCHED_RR, flags, 0, REALTIME_PRIORITY, 0):
        return
    if not _schedule(pid, os.SCHED_OTHER, flags, FIRST_NICE, 0, SHORT_SLICE_NS):
        _schedule(pid, os.SCHED_OTHER, flags, 0, 0, SHORT_SLICE_NS)  # a larger share is not its own business


def be_ordinary(pid: int = 0, own_slice_ns: int = 0) -> None:
    """Takes back `come_first`; that threads made later are ordinary stays, which takes privileges to change.

    `own_slice_ns`: its time slice (`Role.slice_ns`), 0 for what everybody has. Linux before 6.12 knows no slices of
    one's own and ignores it. To be the same in each call for a process: it may change its policy at any time, when
    Linux reads its slice and writes it back a moment later.
    """
    _schedule(pid, os.SCHED_OTHER, _FLAG_RESET_ON_FORK, 0, 0, own_slice_ns)


def slice_ns(pid: int) -> int:
    """The time slice that a process has from the scheduler; 0 where it has none, or that cannot be known."""
    attributes = ctypes.create_string_buffer(_SCHED_ATTR.size)
    if _SYS_SCHED_GETATTR < 0 or _libc.syscall(_SYS_SCHED_GETATTR, pid, attributes, _SCHED_ATTR.size, 0) != 0:
        return 0
    return int(_SCHED_ATTR.unpack(attributes.raw)[5])


def _schedule(pid: int, policy: int, flags: int, nice: int, priority: int, slice_ns: int) -> bool:
    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, policy, flags, nice, priority, slice_ns, 0, 0)
    return _SYS_SCHED_SETATTR >= 0 and _libc.syscall(_SYS_SCHED_SETATTR, pid, attributes, 0) == 0


@dataclass(frozen=True, slots=True)
class Look:
    """One reading of /proc/PID/stat."""

    state: str  # R S D T t Z X
    parent: int
    start_time: int  # clock ticks since boot
    exit_status: int  # as waitpid gives it; valid once the process is dying; 0 where it may not be read
    cpu_ticks: int = 0  # used so far, in user and system mode

    @property
    def stopped(self) -> bool:
        return self.state in "Tt"

    @property
    def gone(self) -> bool:
        return self.state in "ZX"


def look(pid: int) -> Look | None:
    """None if there is no such process."""
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = os.read(descriptor, 4096)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    # The name in field 2 may hold anything, parentheses too: what counts begins behind the last one.
    fields = text[text.rindex(b")") + 2 :].split()
    return Look(fields[0].decode(), int(fields[1]), int(fields[19]), int(fields[49]), int(fields[11]) + int(fields[12]))


def start_time(pid: int) -> int:
    """Clock ticks since boot; 0 if there is no such process."""
    found = look(pid)
    return 0 if found is None else found.start_time


def outlives(pid: int, number: signal.Signals) -> bool:
    """True if a process of ours goes on after this signal, by itself or because it ignores it (Python: PIPE)."""
    if number in _HARMLESS:
        return True
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    ignored = next((line.split()[1] for line in text.splitlines() if line.startswith("SigIgn:")), "0")
    return bool(int(ignored, 16) >> (number - 1) & 1)


def name_of(pid: int) -> str:
    """As `name_this` set it; "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


class Process:
    """A process of ours: pid and start time, and a pidfd that becomes readable when it is gone for good.

    The pidfd belongs to this object; `close` gives it back.
    """

    __slots__ = ("pid", "pidfd", "start_time")

    def __init__(self, pid: int, start_time: int, pidfd: int) -> None:
        self.pid = pid
        self.start_time = start_time
        self.pidfd = pidfd

    def __repr__(self) -> str:
        return f"Process({self.pid})"

    @classmethod
    def open(cls, pid: int, start_time: int) -> "Process | None":
        """None if that very process is gone, even where its pid is in use again."""
        if pid <= 0:
            return None
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.EINVAL):
                return None
            raise
        found = look(pid)  # after the pidfd: the two are of the same process if the start time is right
        if found is None or found.start_time != start_time:
            os.close(pidfd)
            return None
        return cls(pid, start_time, pidfd)

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def send(self, number: int) -> bool:
        """Sends a signal; False if the process is gone."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def gone(self, timeout_s: float = 0.0) -> bool:
        """True once no thread of it runs any more (its memory is unmapped, it may still be a zombie)."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def look(self) -> Look | None:
        found = look(self.pid)
        return found if found is not None and found.start_time == self.start_time else None


def signal_of(status: int) -> int:
    """The signal that ended a process of this wait status, 0 if it exited by itself."""
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def describe(status: int) -> str:
    """`killed by SIGSEGV`, `exited with 3`."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(number).name}"
        return f"killed by signal {number}"
    return f"exited with {os.WEXITSTATUS(status)}"


def every_pid() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def children(parent: int) -> list[int]:
    """All child processes of `parent`."""
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:  # not every kernel offers it
        found = ((pid, look(pid)) for pid in every_pid())
        return [pid for pid, its in found if its is not None and its.parent == parent]
    return [int(word) for word in text.split()]


def holders(path: str | os.PathLike[str]) -> list[int]:
    """All processes but this one that have the file at `path` open (as far as this user may see)."""
    wanted = Path(path).stat()
    found = []
    for pid in every_pid():
        if pid == os.getpid():
            continue
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        its = entry.stat()
                        if (its.st_dev, its.st_ino) == (wanted.st_dev, wanted.st_ino):
                            found.append(pid)
                            break
        except OSError:
            continue
    return found
