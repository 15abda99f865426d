"""A real server for tests: `.venv/bin/atoll serve` on a directory of its own, and what tests do with it.

server = Server(folder, config={"nic": {"idle_timeout_s": 5}}).start()
server.cli("volume", "create", "x", "64M"); server.json("status"); server.kill("disk")
server.uri("disk")                      nbd+unix:///disk?socket=...
server.stop(); server.start()           the same data directory again
server.die()                            SIGKILL for all its processes at once
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from atoll.bench.server import toml
from atoll.kernel.client import Client, ControlError

ATOLL = Path(sys.executable).parent / "atoll"
START_S = 60.0
STOP_S = 60.0

# Small, so that many servers fit beside each other and a test reaches the limits.
SMALL: dict[str, Any] = {
    "device_size": "2GiB",
    "sparse": True,
    "volumes": [{"name": "disk", "size": "1GiB"}],
    "nic": {"buffer_bytes": "48MiB"},
    "dedup": {"fingerprint_entries": 131072, "metadata_log_bytes": "8MiB", "merge_buffer_bytes": "4MiB"},
    "disk": {"cache_bytes": "16MiB"},
}

_libc = ctypes.CDLL(None)


def wait_for(what: str, look: Any, timeout_s: float = 30.0) -> Any:
    """Polls until `look()` is true, which it returns; fails with `what` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)


class Server:
    alive: ClassVar[list["Server"]] = []

    def __init__(self, folder: Path, config: dict[str, Any] | None = None, args: tuple[str, ...] = ()) -> None:
        """`config`: as in a configuration file, on top of SMALL (tables are merged). `args`: more options of serve."""
        self.folder = folder
        self.data = folder / "d"
        self.log = folder / "log"
        self.args = args
        self.config = dict(SMALL)
        for key, value in (config or {}).items():
            self.config[key] = {**self.config.get(key, {}), **value} if isinstance(value, dict) else value
        self.process: subprocess.Popen[bytes] | None = None
        self.output = folder / "out"
        self.instances: set[str] = set()

    # --- Life -----------------------------------------------------------------------------------------------------

    def command(self) -> list[str]:
        file = self.folder / "atoll.toml"
        file.write_text(toml(self.config))
        listen = [] if {"listen", "unix"} & self.config.keys() else [
            "--listen", "127.0.0.1:0", "--unix", str(self.data / "nbd.sock")
        ]  # fmt: skip
        return [str(ATOLL), "serve", "--data", str(self.data), "--config", str(file), *listen, *self.args]

    def start(self, wait: bool = True) -> Self:
        assert self.process is None
        parent = os.getpid()

        def die_with_us() -> None:
            _libc.prctl(1, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        Server.alive.append(self)
        with open(self.log, "ab") as log, open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=output, stderr=log, preexec_fn=die_with_us
            )
        if wait:
            wait_for("the server serves", self.serves, START_S)
        return self

    def serves(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"serve ended with {self.process.returncode}:\n{self.log_tail()}"
        try:
            with Client(self.data, timeout_s=5) as client:
                rows = client.call("ps")["domains"]
                client.call("status")
        except ControlError:
            return False
        self.note_instance()
        return all(row["state"] == "serving" for row in rows if row["role"] in ("nic", "nbd", "dedup", "disk"))

    def note_instance(self) -> None:
        with contextlib.suppress(OSError):
            text = (self.data / "instance.json").read_text()
            self.instances.update(re.findall(r"atoll-([0-9a-f]{16})-", text))

    def stop(self) -> None:
        """A clean stop."""
        assert self.process is not None
        self.note_instance()
        self.cli("stop")
        assert self.process.wait(STOP_S) == 0, self.log_tail()
        self.process = None

    def die(self) -> None:
        """All processes at once, without warning.

        Each is stopped before the first is killed: else the supervisor may outlive a domain by the milliseconds in
        which it puts a successor in its place.
        """
        assert self.process is not None
        self.note_instance()
        stopped: set[int] = set()
        # At its beginning init does not hold the lock yet; from when it and the kernel are stopped, none is added.
        while fresh := {*self.pids(), self.process.pid} - stopped:
            for pid in fresh:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            stopped |= fresh
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(STOP_S)
        wait_for("all processes are gone", lambda: not self.pids())
        self.process = None

    def pids(self) -> list[int]:
        """All processes that hold the data directory's lock."""
        found = []
        lock = str(self.data / "lock")
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if any(str(fd.readlink()) == lock for fd in (entry / "fd").iterdir()):
                        found.append(int(entry.name))
        return found

    def end(self) -> list[str]:
        """Ends whatever runs and returns what should not have been there, a line each."""
        left = []
        self.note_instance()
        if self.process is not None:
            if self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    left.append(f"{self.data}: the server does not stop by SIGTERM:\n{self.log_tail()}")
            else:
                left.append(f"{self.data}: the server ended by itself with {self.process.returncode}")
        deadline = time.monotonic() + 2
        while (pids := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in pids:
            with contextlib.suppress(OSError):
                left.append(f"process {pid}: {Path(f'/proc/{pid}/comm').read_text().strip()}")
                os.kill(pid, signal.SIGKILL)
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process = None
        for instance in self.instances:
            for path in Path("/dev/shm").glob(f"atoll-{instance}-*"):
                left.append(f"shared memory {path.name}")
                path.unlink()
        shutil.rmtree(self.data, ignore_errors=True)
        if self in Server.alive:
            Server.alive.remove(self)
        return left

    def log_tail(self, lines: int = 60) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    # --- Asking ---------------------------------------------------------------------------------------------------

    def cli(self, *arguments: str, status: int | None = 0, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Runs `atoll ARGUMENTS --data DATA`; `status`: the exit status it must have (None: any)."""
        done = subprocess.run(
            [str(ATOLL), *arguments, "--data", str(self.data)], capture_output=True, text=True, timeout=timeout_s
        )
        assert status is None or done.returncode == status, (done.args, done.returncode, done.stdout, done.stderr)
        return done

    def json(self, *arguments: str, status: int | None = 0) -> Any:
        return json.loads(self.cli(*arguments, "--json", status=status).stdout)

    def row(self, role: str) -> dict[str, Any]:
        """The row of `ps` for a role."""
        with Client(self.data) as client:
            return next(row for row in client.call("ps")["domains"] if row["role"] == role)

    def kill(self, role: str, name: str = "KILL") -> dict[str, Any]:
        return self.json("kill", role, "--signal", name)

    def uri(self, volume: str = "disk", transport: str = "unix") -> str:
        entry = next(entry for entry in self.json("status")["volumes"] if entry["name"] == volume)
        prefix = "nbd+unix://" if transport == "unix" else "nbd://"
        return str(next(uri for uri in entry["uris"] if uri.startswith(prefix)))

    @property
    def socket(self) -> Path:
        """The Unix socket for clients."""
        return self.data / "nbd.sock"


def write_device(path: Path, image: np.ndarray) -> None:
    """A sparse device file with that content."""
    with open(path, "wb") as file:
        file.truncate(image.nbytes)
        blocks = image.reshape(-1, 4096)
        for number in np.flatnonzero(blocks.any(axis=1)):
            file.seek(int(number) * 4096)
            file.write(blocks[number].tobytes())


def run(*command: str | os.PathLike[str], status: int | None = 0, timeout_s: float = 600.0, **more: Any) -> str:
    """Runs a client and returns what it printed, both streams; `status`: the exit status it must have."""
    done = subprocess.run(
        [os.fspath(part) for part in command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, **more,
    )  # fmt: skip
    assert status is None or done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}"
    return done.stdout
