"""The data directory: whose it is, what the last run left, and what this run writes down for the next one.

    DATA/lock            flock held by init and, by inheritance, by every process of the instance; pid, start time
    DATA/version         version of the directory's layout
    DATA/instance.json   what init made, and whether it came to a clean end (struct `Record`)
    DATA/control.sock    control socket (kernel/control.py)
    DATA/device.img      the device, unless the configuration names another
    DATA/scrub.json      what the last scrub found, for the status
    DATA/grow            the next start enlarges the store to its device (kernel/offline.py)

- `Directory.open(path)`   checks and locks it; ends the survivors of a dead init first
- `Record.read`, `.write`  the instance record
- `boot_id()`

After a crash of init: its children die with it (PR_SET_PDEATHSIG); one that is stuck in the operating system keeps the
lock open and is found and awaited here, because nothing of it may move once the next instance maps its memory.
"""

import fcntl
import json
import logging
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atoll.kernel import process

log = logging.getLogger("atoll")

VERSION = 1
SURVIVORS_WAIT_S = 30.0

EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_RUNNING = 3


class BootError(Exception):
    """Why the service cannot start: one line for the operator, and the exit status."""

    def __init__(self, text: str, status: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.status = status


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(slots=True)
class Record:
    """DATA/instance.json. Sizes in bytes."""

    instance: int
    pid: int
    start_time: int
    boot_id: str
    layout_version: int
    device_bytes: int = 0
    device: str = ""  # Device.identity
    device_path: str = ""
    # Sections of the configuration by which the arenas were laid out.
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    # role: {"bytes", "role_bytes", "buffer_bytes"}
    arenas: dict[str, dict[str, int]] = field(default_factory=dict)
    clean: bool = False
    served: bool = False  # clients were served: something may have been acknowledged
    version: int = VERSION

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """None if there was no run, or if its record is unreadable (then it counts as unclean without objects)."""
        try:
            plain: dict[str, Any] = json.loads((folder / "instance.json").read_text())
            plain["instance"] = int(plain["instance"], 16)
            return cls(**{key: plain[key] for key in cls.__dataclass_fields__ if key in plain})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: not readable (%s): nothing of the last run is taken over", folder / "instance.json", error)
            return None

    def write(self, folder: Path) -> None:
        """Replaces the record at once and for good."""
        plain = asdict(self) | {
            "instance": f"{self.instance:016x}",
            "objects": {role: f"/atoll-{self.instance:016x}-{role}" for role in self.arenas},
        }
        fresh = folder / "instance.json.new"
        with open(fresh, "w", encoding="utf-8") as file:
            json.dump(plain, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(folder / "instance.json")


class Directory:
    """A data directory, locked. The descriptor of the lock is inherited by all processes of the instance."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.lock_fd = lock_fd

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Directory":
        """Makes it if it is not there. Raises BootError."""
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock_fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BootError(f"data directory {folder}: not writable: {error.strerror}", EXIT_CONFIG) from None
        try:
            cls._take(folder, lock_fd)
            cls._check_version(folder)
        except OSError as error:
            os.close(lock_fd)
            raise BootError(f"data directory {folder}: {error.strerror} ({error.filename})", EXIT_CONFIG) from None
        except BootError:
            os.close(lock_fd)
            raise
        return cls(folder, lock_fd)

    @property
    def grow_wanted(self) -> bool:
        """The store is to be enlarged to its device."""
        return (self.path / "grow").exists()

    def want_grow(self, wanted: bool) -> None:
        if wanted:
            (self.path / "grow").touch()
        else:
            (self.path / "grow").unlink(missing_ok=True)

    def keep_scrub(self, found: dict[str, Any]) -> None:
        fresh = self.path / "scrub.json.new"
        try:
            fresh.write_text(json.dumps(found))
            fresh.replace(self.path / "scrub.json")
        except OSError as error:
            log.warning("%s: %s: the scrub's result is not kept", fresh, error.strerror)

    def last_scrub(self) -> dict[str, Any] | None:
        """Of this run or an earlier one, without the list of what is damaged."""
        try:
            found = json.loads((self.path / "scrub.json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("state"), str) else None

    @staticmethod
    def _take(folder: Path, lock_fd: int) -> None:
        deadline = time.monotonic() + SURVIVORS_WAIT_S
        said: set[int] = set()
        while True:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            owner = _owner(lock_fd)
            if owner is not None:
                raise BootError(f"data directory {folder}: already running, pid {owner}", EXIT_RUNNING)
            # Held, but not by its init: by what a dead one left behind; or by a start that has not signed it yet.
            survivors = process.holders(folder / "lock")
            for pid in survivors:
                if time.monotonic() < deadline - SURVIVORS_WAIT_S + 0.2:
                    break
                if pid not in said:
                    log.warning("process %d of an earlier run is still there: killed", pid)
                    said.add(pid)
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                except PermissionError:
                    raise BootError(
                        f"data directory {folder}: in use by process {pid} of another user", EXIT_RUNNING
                    ) from None
            if time.monotonic() > deadline:
                names = ", ".join(str(pid) for pid in survivors) or "a process that cannot be seen from here"
                raise BootError(
                    f"data directory {folder}: still held by {names}, which does not end (stuck in the operating"
                    " system?)",
                    EXIT_RUNNING,
                )
            time.sleep(0.02)
        signature = f"{os.getpid()} {process.start_time(os.getpid())}\n".encode()
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, signature, 0)

    @staticmethod
    def _check_version(folder: Path) -> None:
        path = folder / "version"
        try:
            text = path.read_text().strip()
        except FileNotFoundError:
            path.write_text(f"{VERSION}\n")
            return
        if text != str(VERSION):
            raise BootError(
                f"data directory {folder}: version {text!r}, this program reads version {VERSION}", EXIT_CONFIG
            )


def _owner(lock_fd: int) -> int | None:
    """Pid of the living init that signed the lock."""
    try:
        pid, start = (int(word) for word in os.pread(lock_fd, 64, 0).split())
    except ValueError:
        return None
    found = process.look(pid)
    return pid if found is not None and found.start_time == start and not found.gone else None
