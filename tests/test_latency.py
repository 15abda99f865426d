"""The CPU latency request (`kernel.cpu_latency_us`): asked for while clients send, let go soon after, whoever dies.

A file stands in for /dev/cpu_dma_latency (`testing.fault.cpu_latency_file`); the last test uses the real one where it
may be opened.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nbdclient import Connection
from serverkit import Server, wait_for

from atoll.kernel import latency

MakeServer = Callable[..., Server]
FEW, MANY = 8, 400  # requests one after the other


def asked(file: Path) -> int | None:
    """What was last asked for; None: nothing ever."""
    data = file.read_bytes()
    return int(struct.unpack("=i", data)[0]) if data else None


def state(server: Server) -> dict[str, Any]:
    return dict(server.json("status")["cpu_latency"])


def times(server: Server) -> int:
    return int(server.json("status")["counters"]["nic"]["latency_requests"])


@contextmanager
def client_of(server: Server) -> Iterator[Connection]:
    with Connection.open(str(server.socket), timeout_s=20) as client:
        client.negotiate("disk")
        yield client


def reads(client: Connection, count: int) -> None:
    for _ in range(count):
        assert client.read(0, 4096) == bytes(4096)


def reads_until_held(client: Connection, file: Path, us: int) -> None:
    """A slow machine may need more than one burst to see a quick succession."""

    def held() -> bool:
        reads(client, MANY)
        return asked(file) == us

    wait_for("it is asked for", held)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    file = tmp_path / "cpu_dma_latency"
    file.touch()
    return file


def with_file(file: Path, us: int = 7) -> dict[str, Any]:
    return {"kernel": {"cpu_latency_us": us}, "testing": {"fault": {"cpu_latency_file": str(file)}}}


def test_asked_for_under_load_and_let_go_after_it(make_server: MakeServer, stand_in: Path) -> None:
    server = make_server(config=with_file(stand_in)).start()
    assert state(server) == {"us": 7, "state": "not held", "error": None}
    with client_of(server) as client:
        reads(client, FEW)
        assert asked(stand_in) is None  # too few to tell a load
        reads_until_held(client, stand_in, 7)
        wait_for("it is let go", lambda: asked(stand_in) == latency.NO_LIMIT)  # the client is still there, and silent
        assert state(server)["state"] == "not held"
        before = times(server)
        reads_until_held(client, stand_in, 7)
        assert times(server) > before
    wait_for("it is let go", lambda: asked(stand_in) == latency.NO_LIMIT)


def test_a_nic_that_dies_lets_go(make_server: MakeServer, stand_in: Path) -> None:
    """As if it had died while it asked: the kernel lets go, and the successor asks again when clients send."""
    server = make_server(config=with_file(stand_in)).start()
    with client_of(server) as client:
        for kill in ("nic", "kernel", "nic"):
            if kill == "nic":
                stand_in.write_bytes(struct.pack("=i", 7))
            server.kill(kill)
            if kill == "nic":
                wait_for("the kernel has let go", lambda: asked(stand_in) == latency.NO_LIMIT)
            reads_until_held(client, stand_in, 7)
            wait_for("nic lets go", lambda: asked(stand_in) == latency.NO_LIMIT)


def test_a_stop_lets_go(make_server: MakeServer, stand_in: Path) -> None:
    server = make_server(config=with_file(stand_in)).start()
    with client_of(server) as client:
        reads_until_held(client, stand_in, 7)
    server.stop()
    assert asked(stand_in) == latency.NO_LIMIT


def test_off_if_asked_for(make_server: MakeServer, stand_in: Path) -> None:
    server = make_server(config=with_file(stand_in, latency.NO_LIMIT)).start()
    with client_of(server) as client:
        reads(client, MANY)
    assert asked(stand_in) is None
    assert state(server) == {"us": None, "state": "off", "error": None}
    assert "not asked for" in server.cli("status").stdout


def test_what_is_not_permitted_is_said(make_server: MakeServer, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    server = make_server(config=with_file(absent)).start()
    assert state(server) == {"us": 7, "state": "unavailable", "error": f"{absent}: No such file or directory"}
    assert f"unavailable ({absent}: No such file" in server.cli("status").stdout
    assert f"{absent}: No such file" in server.log_tail()
    with client_of(server) as client:
        reads(client, MANY)


def test_a_request_that_fails_is_said(make_server: MakeServer) -> None:
    server = make_server(config=with_file(Path("/dev/full"))).start()
    with client_of(server) as client:

        def failed() -> bool:
            reads(client, MANY)
            return state(server) == {"us": 7, "state": "unavailable", "error": "No space left on device"}

        wait_for("the status says it", failed)


def test_the_machines_own(make_server: MakeServer) -> None:
    """Of this machine's file: what anybody asks for can be read there, so nobody else may ask for less."""
    try:
        descriptor = os.open(latency.FILE, os.O_RDWR)
    except OSError as error:
        pytest.skip(f"{latency.FILE}: {error.strerror}")
    try:

        def bound_us() -> int:
            return int(struct.unpack("=i", os.pread(descriptor, 4, 0))[0])

        if bound_us() <= 7:
            pytest.skip("somebody else asks for as little already")
        server = make_server(config={"kernel": {"cpu_latency_us": 7}}).start()
        with client_of(server) as client:

            def held() -> bool:
                reads(client, MANY)
                return bound_us() == 7

            for _ in range(2):
                wait_for("it is asked for", held)
                wait_for("it is let go", lambda: bound_us() > 7)
                server.kill("nic")
            wait_for("it is asked for", held)
            server.die()
        # Its files leave /proc, by which `die` knows that it is gone, a moment before they are closed.
        wait_for("it is let go", lambda: bound_us() > 7)
        server.start()  # what it had acknowledged goes the orderly way
    finally:
        os.close(descriptor)
