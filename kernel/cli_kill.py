"""`atoll kill` and `atoll stop`: what they ask of the kernel, and what they see to themselves.

- A domain is killed by the kernel, which measures. Kernel and zygote are killed from here by their pid, since nobody
  can report its own death: noticed is when the operating system tells of the end, serving when a successor answers.
- Stopping ends when the process of init has ended; what it waits for is shown meanwhile. Whether all is on the device
  then, init has written into the record of the instance.
"""

import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from atoll.kernel.client import Client, ControlError, NoAnswer, NoServer, Refused

# A stop that takes longer than this says what it waits for (seconds).
PATIENCE_S = 10.0


def process_row(client: Client, role: str) -> dict[str, Any] | None:
    """The row of `ps` for a role."""
    return next((row for row in client.call("ps")["domains"] if row["role"] == role), None)


def playing(client: Client, role: str, dead: int = 0) -> dict[str, Any] | None:
    """The row of a process of that role other than `dead`; None if there is none until the client's patience ends."""
    deadline = time.monotonic() + client.timeout_s
    while (row := process_row(client, role)) is None or row.get("pid") in (None, 0, dead):
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)
    return row


def kill(client: Client, role: str, number: signal.Signals) -> dict[str, Any]:
    """Kills the process of a role and waits for its successor. Raises ControlError.

    Returns role, signal, pid, new_pid, detect_ms (None if nobody measured it) and serving_ms; new_pid and serving_ms
    are None, and nothing is waited for, where the signal ends no process.
    """
    if role == "init":
        raise Refused("the death of init is the end of the service: atoll stop")
    if role not in ("kernel", "zygote"):
        return client.call("kill", role=role, signal=number.name.removeprefix("SIG"))
    row = playing(client, role)  # a kernel that has just begun has not heard of the zygote yet
    if row is None:
        raise Refused(f"no process plays {role} now")
    from atoll.kernel.process import outlives  # slow to import

    pid = int(row["pid"])
    killed = {"role": role, "signal": number.name.removeprefix("SIG"), "pid": pid}
    harmless = outlives(pid, number)
    start_ns = time.monotonic_ns()
    try:
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, number)
            if harmless:
                return killed | {"new_pid": None, "detect_ms": None, "serving_ms": None}
            ended = wait_readable(descriptor, client.timeout_s)
            detect_ns = time.monotonic_ns() - start_ns
        finally:
            os.close(descriptor)
    except ProcessLookupError:
        raise Refused(f"{role}, process {pid}, ended by itself a moment ago") from None
    except PermissionError:
        raise Refused(f"{role}, process {pid}, belongs to another user") from None
    if not ended:
        raise NoAnswer(f"{role}, process {pid}, has not ended {client.timeout_s:g} s after {number.name}")
    client.close()
    row = playing(client, role, pid)
    if row is None:
        raise NoAnswer(f"{role} has no successor {client.timeout_s:g} s after the death of process {pid}")
    return killed | {
        "new_pid": row["pid"],
        "detect_ms": round(detect_ns / 1e6, 3),
        "serving_ms": round((time.monotonic_ns() - start_ns) / 1e6, 3),
    }


def stop(client: Client, timeout_s: float, say: Callable[[str], None]) -> tuple[float, str]:
    """Stops the server: the seconds it took, and why not all that was acknowledged is on the device ("": it is). Raises
    ControlError, NoAnswer after `timeout_s`."""
    from atoll.kernel.instance import Record  # slow to import, and `kill` needs neither
    from atoll.kernel.offline import left_in_memory

    before = Record.read(client.data)
    seconds = end(client, timeout_s, say)
    after = Record.read(client.data)
    same = before is not None and after is not None and before.instance == after.instance  # else one runs again
    return seconds, left_in_memory(after) if same else ""


def end(client: Client, timeout_s: float, say: Callable[[str], None]) -> float:
    """Asks the server to stop; the seconds until init has ended."""
    start = time.monotonic()
    row = process_row(client, "init")
    if row is None:
        raise ControlError("the server does not say which process init is")
    try:
        descriptor = os.pidfd_open(int(row["pid"]))
    except ProcessLookupError:
        return time.monotonic() - start
    try:
        client.call("stop")
        spoken = 0.0
        while True:
            left = start + timeout_s - time.monotonic()
            if wait_readable(descriptor, max(0.0, min(left, 1.0))):
                return time.monotonic() - start
            waited = time.monotonic() - start
            if left <= 0:
                raise NoAnswer(f"not stopped after {waited:.0f} s; it goes on; waiting for {waiting_for(client)}")
            if waited - spoken >= PATIENCE_S:
                spoken = waited
                say(f"not stopped after {waited:.0f} s, waiting for {waiting_for(client)}")
    finally:
        os.close(descriptor)


def waiting_for(client: Client) -> str:
    """Which roles have not stopped yet, as far as the kernel still answers."""
    try:
        reply = client.call("ps", timeout_s=2.0)
    except NoServer:
        return "init to end"
    except ControlError:
        return "the kernel, which does not answer"
    if reply.get("stopping"):
        return str(reply["stopping"])
    rows = [row for row in reply["domains"] if row["role"] not in ("init", "kernel", "zygote")]
    waiting = [f"{row['role']} ({row['state']})" for row in rows if row["state"] != "stopped"]
    return ", ".join(waiting) or "init to end"


def wait_readable(descriptor: int, timeout_s: float) -> bool:
    """A pidfd is readable once its process has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
