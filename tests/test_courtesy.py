"""nic beside a process that computes on its processor: it waits politely for clients, not for who never waits."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

from nbdclient import Connection
from serverkit import Server, wait_for

COMPUTES = "print(flush=True)\nwhile True: pass"


def policy(server: Server) -> int:
    return os.sched_getscheduler(server.row("nic")["pid"]) & ~os.SCHED_RESET_ON_FORK


def ended(server: Server) -> int:
    return int(server.json("status")["counters"]["nic"]["courtesy_ended"])


@contextlib.contextmanager
def computing(cpu: int) -> Iterator[None]:
    """An ordinary process that never waits, there."""
    with subprocess.Popen(
        [sys.executable, "-c", COMPUTES], stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, {cpu})
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline()
            yield
        finally:
            process.kill()


def start(make_server: Callable[..., Server], **nic: bool) -> tuple[Server, int]:
    """A server whose data path has one processor, and that."""
    cpu = min(os.sched_getaffinity(0))
    config = {
        "kernel": {"cpus": [cpu], "cpu_latency_us": -1},
        "nic": nic,
        "volumes": [{"name": "disk", "size": "16MiB"}],
    }
    return make_server(config=config).start(), cpu


def test_courtesy_ends_beside_a_process_that_computes(make_server: Callable[..., Server]) -> None:
    server, cpu = start(make_server)
    with Connection.open(str(server.socket), timeout_s=30) as connection:
        connection.negotiate("disk")
        written = 0

        def asks_and_has(wanted: int) -> bool:
            """One write and one read back, then the policy as the operating system tells it."""
            nonlocal written
            written += 1
            block = written.to_bytes(8, "little") * 512
            connection.write(written % 64 * 4096, block)
            assert connection.read(written % 64 * 4096, 4096) == block
            return policy(server) == wanted

        wait_for("nic to be polite", lambda: asks_and_has(os.SCHED_BATCH))
        with computing(cpu):
            wait_for("nic to be ordinary", lambda: asks_and_has(os.SCHED_OTHER))
            assert ended(server) >= 1
        wait_for("nic to try it once more", lambda: asks_and_has(os.SCHED_BATCH))


def test_courtesy_can_be_off(make_server: Callable[..., Server]) -> None:
    server, cpu = start(make_server, courtesy=False)
    with Connection.open(str(server.socket), timeout_s=30) as connection, computing(cpu):
        connection.negotiate("disk")
        for number in range(200):
            block = number.to_bytes(8, "little") * 512
            connection.write(number % 64 * 4096, block)
            assert connection.read(number % 64 * 4096, 4096) == block
        # Who has just been promoted comes first for a moment.
        wait_for("nic to be ordinary", lambda: policy(server) == os.SCHED_OTHER)
        assert ended(server) == 0
