"""A server for measurements: a real `atoll serve` on a data directory of its own.

    with Server(folder, config) as server:       config: a table of the configuration file, as Python values
        server.call("status")                    the control socket
        server.restart()                         a clean stop and a new start on the same data: nothing is cached
        server.address("volume")                 its Unix socket, for atoll.kernel.chaos_nbd.connect

It ends with the block, and the folder's data with it. ServerError shows the end of its log.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from atoll.kernel.client import Client, ControlError

START_S = 120.0
STOP_S = 180.0


class ServerError(Exception):
    """The server did not start, or ended."""


class Server:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.data, self._log, self._file = folder / "data", folder / "log", folder / "atoll.toml"
        self._file.write_text(toml(config))
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "atoll.kernel.cli",
            "serve",
            "--data",
            str(self.data),
            "--config",
            str(self._file),
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(ControlError), Client(self.data) as client:
                if client.call("status", timeout_s=10)["state"] == "serving":
                    break
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"the server does not serve:\n{self.log_tail()}")
            time.sleep(0.02)
        self._client = Client(self.data, timeout_s=120.0)

    def stop(self) -> None:
        """Clean; everything is on the device then."""
        assert self._process is not None
        if self._client is not None:
            self._client.call("stop")
            self._client.close()
            self._client = None
        if self._process.wait(STOP_S) != 0:
            raise ServerError(f"the server stopped with status {self._process.returncode}:\n{self.log_tail()}")
        self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None
        shutil.rmtree(self.data, ignore_errors=True)

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        assert self._client is not None
        return self._client.call(verb, **arguments)

    def ask(self, role: str, call: str, **fields: Any) -> dict[str, Any]:
        """A control call of a domain."""
        answer = self.call("call", role=role, message={"call": call, **fields})["answer"]
        assert isinstance(answer, dict)
        return answer

    @property
    def address(self) -> str:
        return str(self.data / "nbd.sock")

    def cpu_s(self, role: str) -> float:
        """Processor time that the role's process has used."""
        return float(next(row for row in self.call("ps")["domains"] if row["role"] == role)["cpu_s"])

    def log_tail(self, lines: int = 20) -> str:
        try:
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return str(error)


def toml(table: dict[str, Any]) -> str:
    """Of tables, lists, texts, numbers and truth values, which is all that a configuration has."""
    lines = [f"{key} = {_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{name} = {_value(its)}" for name, its in value.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(its)}" for key, its in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)
