"""Domains that look around before they sleep (`kernel.spin_us`): whatever comes meanwhile is seen."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
from nbdclient import Command, Connection, Request, request_bytes
from serverkit import Server, wait_for

from atoll.kernel import process

ROUNDS = 300
READS = 2000


def test_a_client_that_comes_while_nic_spins(make_server: Callable[..., Server]) -> None:
    """Just after a request nic spins; that somebody connects is told once only. It has no other reason to wake up."""
    server = make_server(config={"kernel": {"spin_us": 1000}, "volumes": [{"name": "disk", "size": "16MiB"}]}).start()
    with Connection.open(str(server.socket), timeout_s=20) as busy:
        busy.negotiate("disk")
        for _ in range(ROUNDS):
            assert busy.read(0, 4096) == bytes(4096)
            with Connection.open(str(server.socket), timeout_s=20) as guest:
                guest.greet()


def test_who_waits_for_a_connection_has_it_when_one_is_free(make_server: Callable[..., Server]) -> None:
    """Nothing else wakes nic then: the last thing that it does for the one before makes room."""
    config = {
        "kernel": {"cpu_latency_us": -1},
        "nic": {"max_connections": 1, "handshake_timeout_s": 600},  # a deadline would wake nic, too
        "volumes": [{"name": "disk", "size": "16MiB"}],
    }
    server = make_server(config=config).start()
    before = Connection.open(str(server.socket), timeout_s=20)
    before.negotiate("disk")
    for _ in range(5):
        after = Connection.open(str(server.socket), timeout_s=20)
        before.close()
        after.negotiate("disk")
        before = after
    before.close()


def counted_reads(server: Server, connection: Connection, counter: str) -> Callable[[], int]:
    """Reads READS times, one by one; nic's counter since before that."""
    request = request_bytes(Request(Command.READ, 0, 1, 0, 512))
    reply = bytearray(16 + 512)
    connection.negotiate("disk", structured=False, allocation=False)
    connection.sock.settimeout(None)  # with a timeout Python polls before each call: too slow

    def value() -> int:
        return int(server.json("status")["counters"]["nic"][counter])

    def read() -> int:
        before = value()
        for _ in range(READS):
            connection.sock.sendall(request)
            assert connection.sock.recv_into(reply, len(reply), socket.MSG_WAITALL) == len(reply)
        return value() - before

    return read


@pytest.mark.parametrize(("own", "counter"), [(1, "held"), (0, "guessed")])
def test_nic_expects_a_client_where_it_is(make_server: Callable[..., Server], own: int, counter: str) -> None:
    """Seen before nic gives way a second time: what a client on another processor sends at once. Received without
    asking epoll for it: what one on nic's own has sent meanwhile."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one processor")
    config = {"kernel": {"cpus": allowed[:1]}, "volumes": [{"name": "disk", "size": "16MiB"}]}
    server = make_server(config=config).start()
    with Connection.open(str(server.socket), timeout_s=20) as connection:
        read = counted_reads(server, connection, counter)
        os.sched_setaffinity(0, allowed[own : own + 1])
        try:
            wait_for("requests that came as expected", read)
        finally:
            os.sched_setaffinity(0, allowed)


def test_with_several_connections_nic_does_not_guess(make_server: Callable[..., Server]) -> None:
    """Whom it guessed would come first, again and again."""
    allowed = sorted(os.sched_getaffinity(0))
    server = make_server(
        config={"kernel": {"cpus": allowed[:1]}, "volumes": [{"name": "disk", "size": "16MiB"}]}
    ).start()
    with Connection.open(str(server.socket), timeout_s=20) as connection, Connection.open(str(server.socket)) as other:
        other.negotiate("disk")
        read = counted_reads(server, connection, "guessed")
        os.sched_setaffinity(0, allowed[:1])
        try:
            assert read() == 0
        finally:
            os.sched_setaffinity(0, allowed)


def test_nic_has_two_turns_where_nbd_has_one(make_server: Callable[..., Server]) -> None:
    """Both give the processor to each other while they spin: who needs it twice for a request has half of the slice."""
    server = make_server(config={"volumes": [{"name": "disk", "size": "16MiB"}]}).start()
    if process.slice_ns(server.row("nbd")["pid"]) == 0:
        pytest.skip("this Linux does not tell slices (before 6.12)")

    def halved() -> bool:
        return 0 < 2 * process.slice_ns(server.row("nic")["pid"]) <= process.slice_ns(server.row("nbd")["pid"])

    wait_for("nic's slice", halved)
    for role in ("nic", "kernel"):  # a successor came first until it served; the kernel's calls everybody ordinary
        dead = server.row(role)["pid"]
        server.kill(role)
        wait_for(f"a new {role}", lambda role=role, dead=dead: server.serves() and server.row(role)["pid"] != dead)
        wait_for("nic's slice", halved)


CHANGES = """
import os, sys
sys.stdin.readline()
while True:
    os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
"""


def test_a_process_that_changes_its_policy_keeps_its_slice() -> None:
    """Linux reads the slice and writes it back: what has been set in between is gone, so it must be the same."""
    short = process.slice_ns(0) // 2
    if short == 0:
        pytest.skip("this Linux does not tell slices (before 6.12)")
    with subprocess.Popen([sys.executable, "-c", CHANGES], stdin=subprocess.PIPE, text=True) as changing:
        try:
            process.be_ordinary(changing.pid, short)
            print(file=changing.stdin, flush=True)
            wait_for("its first change", lambda: os.sched_getscheduler(changing.pid) & ~os.SCHED_RESET_ON_FORK)
            for _ in range(50_000):
                process.be_ordinary(changing.pid, short)
                assert process.slice_ns(changing.pid) == short
        finally:
            changing.kill()
