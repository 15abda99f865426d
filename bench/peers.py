"""The servers that `make bench` compares: Atoll as users start it, nbdkit's memory plugin, qemu-nbd, a bare file.

    with Atoll(folder, cpus=None) as server:     cpus: None, or the processors it may run on (taskset)
        server.uri, server.version, server.cpu_s()

Each is a context manager: it serves when entered, and has ended, by pid, when left. All are started the same way and
placed the same way. `cpu_s` is the time that all processes of the server have used so far.

After a crash of the bench: servers get SIGKILL with their parent's death; the folder is left to be looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from atoll.kernel.client import Client, ControlError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
START_S = 60.0
STOP_S = 120.0
ATOLL = Path(sys.executable).parent / "atoll"

_libc = ctypes.CDLL(None)


class BenchError(Exception):
    """One line: what could not be measured and why."""


def need(program: str) -> str:
    """The path of an installed program. BenchError names the remedy."""
    found = shutil.which(program)
    if found is None:
        raise BenchError(f"{program} is missing: say make bench, or as root .ci/system-packages bench")
    return found


# Niceness of the sessions of all servers and clients: -20 keeps what else a machine does out of the figures, of both
# sides alike. Not of the processes: what a server makes of its own priorities shall stay.
niceness = 0


def pinned(command: Sequence[str | os.PathLike[str]], cpus: Sequence[int] | None) -> list[str]:
    """The command, to run on these processors alone (None: on all)."""
    prefix = [] if cpus is None else [need("taskset"), "--cpu-list", ",".join(map(str, cpus))]
    return prefix + [os.fspath(part) for part in command]


def prefer(nice: int) -> None:
    """Sessions of servers and clients started from now on have this niceness. Needs a session of our own."""
    global niceness
    if os.getsid(0) != os.getpid():
        if os.getpgrp() == os.getpid():
            os.setpgid(0, os.getpgid(os.getppid()))
        os.setsid()
    niceness = nice
    prefer_session("self")


def prefer_session(pid: int | str) -> None:
    with contextlib.suppress(OSError):  # an operating system may be built without scheduling by session
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))


def wait_for(what: str, look: Callable[[], Any], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():
        if time.monotonic() > deadline:
            raise BenchError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.01)


def version_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else "unknown"


class Server:
    """One server process and its children; subclasses say how it is started."""

    name = ""

    def __init__(self, folder: Path, cpus: Sequence[int] | None = None) -> None:
        self.folder = folder
        self.cpus = cpus
        self.socket = folder / f"{self.name}.sock"
        self.log = folder / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def command(self) -> list[str]:
        raise NotImplementedError

    def serves(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.socket))
            return True
        return False

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        parent = os.getpid()

        def die_with_us() -> None:
            _libc.prctl(1, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                pinned(self.command(), self.cpus),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_us,
            )
        try:
            wait_for(f"{self.name} serves on {self.socket}", self._serves_or_fails, START_S)
        except BaseException:
            self.__exit__()
            raise
        if niceness:
            for process in self.processes():
                prefer_session(process.pid)
        return self

    def _serves_or_fails(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise BenchError(f"{self.name} ended with {self.process.returncode}: {' | '.join(tail)}")
        return self.serves()

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def processes(self) -> list[psutil.Process]:
        assert self.process is not None
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def cpu_s(self) -> float:
        """Processor time of all its processes and their threads so far; of those only that still live."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


class Atoll(Server):
    """`atoll serve` with its defaults: an 8 GiB device file, preallocated, one volume, deduplication on."""

    name = "atoll"

    def __init__(
        self, folder: Path, cpus: Sequence[int] | None = None, options: Sequence[str] = (), config: str = ""
    ) -> None:
        """`config`: text of a configuration file, empty for the defaults."""
        super().__init__(folder, cpus)
        self.data = folder / "data"
        self.options = options
        self.config = config

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk?socket={self.socket}"

    @property
    def device(self) -> Path:
        return self.data / "device.img"

    def command(self) -> list[str]:
        more: list[str] = []
        if self.config:
            file = self.folder / "atoll.toml"
            file.write_text(self.config)
            more = ["--config", str(file)]
        return [str(ATOLL), "serve", "--data", str(self.data), "--unix", str(self.socket), *more, *self.options]

    def serves(self) -> bool:
        try:
            with Client(self.data, timeout_s=5) as client:
                rows = client.call("ps")["domains"]
        except ControlError:
            return False
        standbys = all(row["standby_pid"] for row in rows if row["role"] in ("nic", "nbd", "dedup", "disk"))
        return standbys and all(row["state"] == "serving" for row in rows) and super().serves()

    def status(self) -> dict[str, Any]:
        with Client(self.data) as client:
            return client.call("status")

    def rest(self) -> None:
        """Returns when it does not keep idle processors awake any more: what runs next shall have nothing of it."""
        wait_for("Atoll lets idle processors sleep", lambda: self.status()["cpu_latency"]["state"] != "held", START_S)

    def processes(self) -> list[psutil.Process]:
        """All that hold the data directory's lock: children of init and orphans alike."""
        lock = str(self.data / "lock")
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError, psutil.NoSuchProcess):
                    if any(str(fd.readlink()) == lock for fd in (entry / "fd").iterdir()):
                        found.append(psutil.Process(int(entry.name)))
        return found

    def restart(self) -> None:
        """A clean stop and another start on the same data: nothing is in memory then."""
        super().__exit__()
        self.__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        shutil.rmtree(self.data, ignore_errors=True)

    @staticmethod
    def version() -> str:
        from importlib.metadata import version

        return f"atoll {version('atoll')}"


class Nbdkit(Server):
    """nbdkit's memory plugin."""

    name = "nbdkit"
    size_bytes = 8 * GIB

    def command(self) -> list[str]:
        return [need("nbdkit"), "--foreground", "--unix", str(self.socket), "memory", str(self.size_bytes)]

    @staticmethod
    def version() -> str:
        return version_of(need("nbdkit"), "--version") + ", memory plugin"


class QemuNbd(Server):
    """qemu-nbd on a raw preallocated file, io_uring and direct: a server that writes to the device too."""

    name = "qemu-nbd"
    size_bytes = 8 * GIB

    @property
    def image(self) -> Path:
        return self.folder / "qemu.img"

    def command(self) -> list[str]:
        preallocate(self.image, self.size_bytes)
        return [
            need("qemu-nbd"), "--format=raw", "--aio=io_uring", "--cache=none", "--persistent", "--shared=64",
            "--socket", str(self.socket), str(self.image),
        ]  # fmt: skip

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.image.unlink(missing_ok=True)

    @staticmethod
    def version() -> str:
        return version_of(need("qemu-nbd"), "--version") + ", raw file, --aio=io_uring --cache=none"


class Device:
    """The device itself: a preallocated file on the same file system, which fio uses directly. No server."""

    name = "device"

    def __init__(self, folder: Path, cpus: Sequence[int] | None = None) -> None:
        del cpus
        self.folder = folder
        self.image = folder / "bare.img"
        self.size_bytes = 8 * GIB

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        preallocate(self.image, self.size_bytes)
        return self

    def __exit__(self, *_: object) -> None:
        self.image.unlink(missing_ok=True)

    def cpu_s(self) -> float:
        return 0.0

    def fill(self, size_bytes: int) -> None:
        """Writes it, so that reads meet data and not the file system's marks for unwritten blocks."""
        command = [
            need("fio"), "--name=fill", "--ioengine=io_uring", "--direct=1", f"--filename={self.image}", "--rw=write",
            "--bs=1M", "--iodepth=8", f"--size={size_bytes}", "--end_fsync=1",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
        if done.returncode != 0:
            raise BenchError(f"fio cannot fill {self.image}: {done.stderr.strip()}")

    @staticmethod
    def version() -> str:
        return "a preallocated file on the same file system, fio io_uring, direct"


def preallocate(path: Path, size_bytes: int) -> None:
    with open(path, "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, size_bytes)
