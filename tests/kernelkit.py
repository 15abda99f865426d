"""A service of stand-in domains (kernel_standin.py) for the tests of init and kernel: real processes, no storage.

service = Service(folder).start(); service.rows(); service.kill_pid(pid); service.ping(1000); service.end()
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from atoll.ipc import objects
from atoll.kernel.client import Client, ControlError

ROLES = ("nic", "nbd", "dedup", "disk")
RUNNER = """
import json, sys
from atoll.kernel import init
sys.exit(init.run(json.loads(sys.argv[1])))
"""


def wait_for(what: str, look: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


class Service:
    def __init__(self, folder: Path, **testing: Any) -> None:
        self.data = folder / "d"
        self.log = folder / "log"
        self.output = folder / "out"
        self.process: subprocess.Popen[bytes] | None = None
        self.instances: set[int] = set()
        self.config: dict[str, Any] = {
            "data": str(self.data),
            "listen": ["127.0.0.1:0"],
            "unix": [str(self.data / "nbd.sock")],
            "device": str(self.data / "device.img"),
            "device_bytes": 128 << 20,
            "device_size_given": False,
            "sparse": True,
            "volumes": [
                {
                    "name": "disk",
                    "size_bytes": 1 << 30,
                    "read_only": False,
                    "threshold": 0,
                    "tier_threshold": 0,
                    "if_none": True,
                }
            ],
            "nic": {"engine": "auto"},
            "nbd": {},
            "dedup": {},
            "disk": {"engine": "auto", "pin_arenas": True},
            "kernel": {"hang_s": 0.3, "restart_backoff_s": 1.0},
            "testing": {"crash_points": True, "modules": dict.fromkeys(ROLES, "kernel_standin"), "fault": testing},
        }

    def start(self, wait: bool = True, environment: dict[str, str] | None = None, **arguments: Any) -> Self:
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        with open(self.log, "ab") as log, open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUNNER, json.dumps(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, **(environment or {})},
                **arguments,
            )
        if wait:
            wait_for(f"the service serves; log:\n{self.log_text()}", self.serves)
        return self

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def serves(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"init ended with {self.process.returncode}:\n{self.log_text()}"
        try:
            rows = self.rows()
        except ControlError:
            return False
        self.note_instance()
        return all(rows[role]["state"] == "serving" and rows[role]["standby_pid"] for role in ROLES)

    def note_instance(self) -> None:
        self.instances.add(int(json.loads((self.data / "instance.json").read_text())["instance"], 16))

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        with Client(self.data) as client:
            return client.call(verb, **arguments)

    def ask(self, role: str, call: str, **fields: Any) -> dict[str, Any]:
        return self.call("call", role=role, message={"call": call, **fields})["answer"]

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["role"]: row for row in self.call("ps")["domains"]}

    def whole(self) -> dict[str, dict[str, Any]]:
        """Waits until every role serves and has a standby."""

        def look() -> dict[str, dict[str, Any]] | None:
            try:
                rows = self.rows()
            except ControlError:
                return None
            good = all(rows[role]["state"] == "serving" and rows[role]["standby_pid"] for role in ROLES)
            return rows if good and rows["zygote"]["pid"] else None

        found: dict[str, dict[str, Any]] = wait_for(f"all serve; log:\n{self.log_text()}", look)
        return found

    def replaced(self, role: str, pid: int) -> dict[str, dict[str, Any]]:
        """Waits until another process than `pid` plays the role and all is whole again."""

        def look() -> dict[str, dict[str, Any]] | None:
            rows = self.whole()
            return rows if rows[role]["pid"] != pid else None

        found: dict[str, dict[str, Any]] = wait_for(f"another {role}", look)
        return found

    def ping(self, count: int) -> None:
        self.ask("nic", "ping", count=count)

    def round_trip(self, timeout_s: float = 20.0) -> dict[str, Any]:
        """Waits until every number sent has come back; nothing was lost or repeated."""

        def look() -> dict[str, Any] | None:
            try:
                report = self.ask("nic", "report")
            except ControlError:
                return None
            assert report["wrong"] == 0, report
            return report if report["answered"] == report["to_send"] else None

        found: dict[str, Any] = wait_for("all numbers come back", look, timeout_s)
        return found

    def signal_role(self, role: str, number: int = signal.SIGKILL, field: str = "pid") -> int:
        pid = self.rows()[role][field]
        os.kill(pid, number)
        return int(pid)

    def stop(self) -> int:
        assert self.process is not None
        self.call("stop")
        return self.process.wait(30)

    def die(self) -> None:
        """init is killed, and with it everybody."""
        assert self.process is not None
        init = self.process.pid
        children = [int(word) for word in Path(f"/proc/{init}/task/{init}/children").read_text().split()]
        self.process.kill()
        self.process.wait()
        wait_for("all are dead", lambda: not any(alive(pid) for pid in children))

    def end(self) -> list[str]:
        """Ends what is left; returns what should not have been left."""
        left = []
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                left.append(f"init did not end; log:\n{self.log_text()}")
                self.process.kill()
                self.process.wait()
        if (self.data / "instance.json").exists():
            self.note_instance()
        for instance in self.instances:
            for name in objects.list_objects(instance):
                objects.unlink(name)
        return left


def writable_maps(service: Service) -> dict[str, list[int]]:
    """Object name: pids of the service's processes that map it writable, as the operating system says."""
    assert service.process is not None
    init = service.process.pid
    pids = [init, *(int(word) for word in Path(f"/proc/{init}/task/{init}/children").read_text().split())]
    found: dict[str, list[int]] = {}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 5 and fields[5].startswith("/dev/shm/atoll-") and "w" in fields[1]:
                holders = found.setdefault(fields[5].removeprefix("/dev/shm/atoll-").partition("-")[2], [])
                if pid not in holders:
                    holders.append(pid)
    return found
