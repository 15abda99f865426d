"""Domains that look around before they sleep (`kernel.spin_us`): whatever comes meanwhile is seen."""

from __future__ import annotations

import os
import socket
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
        "nic": {"max_connections": 1},
        "volumes": [{"name": "disk", "size": "16MiB"}],
    }
    server = make_server(config=config).start()
    before = Connection.open(str(server.socket), timeout_s=20)
    before.negotiate("disk")
    for _ in range(5):
        after = Connection.open(str(server.socket), timeout_s=5)  # a deadline of the connection before ends after 10 s
        before.close()
        after.negotiate("disk")
        before = after
    before.close()


def test_nic_looks_on_for_a_client_on_another_processor(make_server: Callable[..., Server]) -> None:
    """What such a client sends at once is seen before nic gives way a second time."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one processor")
    config = {"kernel": {"cpus": allowed[:1]}, "volumes": [{"name": "disk", "size": "16MiB"}]}
    server = make_server(config=config).start()
    request = request_bytes(Request(Command.READ, 0, 1, 0, 512))
    reply = bytearray(16 + 512)
    with Connection.open(str(server.socket), timeout_s=20) as connection:
        connection.negotiate("disk", structured=False, allocation=False)
        connection.sock.settimeout(None)  # with a timeout Python polls before each call: too slow

        def held() -> int:
            for _ in range(READS):
                connection.sock.sendall(request)
                assert connection.sock.recv_into(reply, len(reply), socket.MSG_WAITALL) == len(reply)
            return int(server.json("status")["counters"]["nic"]["held"])

        os.sched_setaffinity(0, allowed[1:])
        try:
            wait_for("requests that came while nic looked on", held)
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
