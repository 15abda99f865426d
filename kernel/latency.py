"""The service's CPU latency request (PM QoS: "CPU latency" in the Linux kernel's power management documentation).

An idle processor sleeps, and to wake up takes time: some microseconds on bare metal, 15 to 25 µs where a hypervisor has
to start it again. As long as somebody has FILE open, the number last written to it bounds how long waking up may take,
on every processor of the machine; 0: the idle ones poll.

- `Request.open(config)`   init's, once; asks for nothing yet
- `Request.let_go()`       the kernel's, when nic is dead: it may have died while it asked

nic asks while clients send, and lets go soon after (drivers/nic/latency.c): it alone sees them. init opens the file,
because that takes privileges, and the descriptor outlives nic.

After a crash: of nic: the kernel lets go, the successor asks again. Of all: nobody has the file open any more, which
ends the request.
"""

import contextlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FILE = "/dev/cpu_dma_latency"
NO_LIMIT = -1  # PM_QOS_DEFAULT_VALUE; as kernel.cpu_latency_us: do not ask


@dataclass(frozen=True, slots=True)
class Request:
    fd: int = -1  # -1: there is none
    us: int = NO_LIMIT  # what is asked for under load, µs
    error: str = ""  # why there is none although the configuration wants it

    @classmethod
    def open(cls, config: Mapping[str, Any]) -> "Request":
        """`testing.fault` may name another file, on which nothing depends."""
        us = int(config["kernel"].get("cpu_latency_us", NO_LIMIT))
        if us == NO_LIMIT:
            return cls()
        path = str(config["testing"].get("fault", {}).get("cpu_latency_file", FILE))
        try:
            return cls(os.open(path, os.O_WRONLY | os.O_CLOEXEC), us)
        except OSError as error:
            return cls(us=us, error=f"{path}: {error.strerror}")

    def let_go(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):  # what nic could write, the kernel can
                os.pwrite(self.fd, struct.pack("=i", NO_LIMIT), 0)

    def status(self, nic: Mapping[str, Any]) -> dict[str, Any]:
        """For `atoll status`. `nic`: its own answer, empty where it has not given one."""
        error = self.error or str(nic.get("cpu_latency_error") or "")
        if self.us == NO_LIMIT:
            state = "off"
        elif error:
            state = "unavailable"
        else:
            state = "held" if nic.get("cpu_latency_held") else "not held"
        return {"us": None if self.us == NO_LIMIT else self.us, "state": state, "error": error or None}
