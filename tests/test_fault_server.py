"""The whole server on a device that errs, hangs, or lies. Power loss: test_power_loss.py."""

from __future__ import annotations

import json
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from nbdclient import Command, Connection, NbdError
from serverkit import ATOLL, Server, wait_for

from atoll.kernel.client import Client

BLOCK = 4096
MODULES = {"modules": {"disk": "atoll.drivers.fault"}}


def start(make_server, **config) -> Server:
    testing = {**MODULES, **config.pop("testing", {})}
    return make_server(config={"device_size": "512MiB", "volumes": [{"name": "disk", "size": "256MiB"}],
                               "testing": testing, **config}).start()  # fmt: skip


def call(server: Server, role: str, name: str, **fields) -> dict:
    with Client(server.data, timeout_s=30) as client:
        return client.call("call", role=role, message={"call": name, **fields})["answer"]


def fault(server: Server, name: str, **fields) -> dict:
    return call(server, "disk", name, **fields)


def connect(server: Server) -> Connection:
    connection = Connection.open(str(server.socket), timeout_s=60)
    connection.negotiate("disk")
    return connection


def log(server: Server) -> str:
    return server.log.read_text(errors="replace")


def data_of(number: int, blocks: int = 1) -> bytes:
    return random.Random(number).randbytes(blocks * BLOCK)


def forget_cache(server: Server, connection: Connection) -> None:
    """Reads so much that earlier blocks are no longer cached: zeros do, as long as they are stored somewhere."""
    for at in range(0, 48 << 20, 1 << 20):
        connection.write((128 << 20) + at, random.Random(at).randbytes(1 << 20))
    connection.flush()
    for at in range(0, 48 << 20, 1 << 20):
        connection.read((128 << 20) + at, 1 << 20)


def test_a_read_error_reaches_its_request_only(make_server):
    server = start(make_server)
    with connect(server) as connection:
        connection.write(0, data_of(1, 16))
        connection.write(1 << 20, data_of(2, 16))
        connection.flush()
        forget_cache(server, connection)
        fault(server, "fault-set", rules=[{"action": "error", "kinds": ["read"], "count": 4}])
        results = []
        for _ in range(12):
            try:
                assert connection.read(0, 16 * BLOCK) == data_of(1, 16)
                results.append(0)
            except NbdError as error:
                results.append(error.code)
        assert results[-1] == 0, "the device is well again, and so is the read"
        assert set(results) <= {0, 5}
        assert fault(server, "fault-status")["rules"][0]["applied"] == 4
        assert connection.read(1 << 20, 16 * BLOCK) == data_of(2, 16)


def test_a_write_error_is_placed_elsewhere_or_told_by_flush(make_server):
    """No acknowledged write is dropped for an error of the device; a flush that says yes means it."""
    server = start(make_server)
    with connect(server) as connection:
        fault(server, "fault-set", rules=[{"action": "error", "kinds": ["write"], "count": 3}])
        for number in range(32):
            connection.write(number * BLOCK, data_of(number))
        answers = []
        deadline = time.monotonic() + 30
        while not answers or answers[-1] != 0:
            assert time.monotonic() < deadline, answers
            try:
                connection.flush()
                answers.append(0)
            except NbdError as error:
                answers.append(error.code)
        print("flushes", answers)
        for number in range(32):
            assert connection.read(number * BLOCK, BLOCK) == data_of(number)
    server.stop()
    server.start()
    with connect(server) as connection:
        for number in range(32):
            assert connection.read(number * BLOCK, BLOCK) == data_of(number)


def test_a_device_that_fails_every_write_keeps_nothing_secret(make_server):
    """FLUSH and FUA fail while a page is unplaced, and succeed when the device is well; nothing is lost meanwhile."""
    server = start(make_server)
    warnings = server.json("status")["warnings"]
    with connect(server) as connection:
        fault(server, "fault-set", rules=[{"action": "error", "kinds": ["write"]}])
        connection.write(0, data_of(7))
        with pytest.raises(NbdError):
            connection.flush()
        with pytest.raises(NbdError):
            connection.write(BLOCK, data_of(8), flags=1)
        assert connection.read(0, BLOCK) == data_of(7)
        said = "disk: the device failed: Input/output error, request write"
        wait_for("the log names it", lambda: said in log(server))
        wait_for("the status too", lambda: "cannot be stored" in str(server.json("status")["warnings"]))
        server.kill("dedup")
        assert log(server).count("the device failed") == 1, "now and then is enough"
        fault(server, "fault-set", rules=[])
        wait_for("a flush succeeds again", connection.flushes)
        assert server.json("status")["warnings"] == warnings
        assert connection.read(0, BLOCK) == data_of(7)


def test_a_stop_says_what_stayed_in_memory(make_server):
    """The device fails for good, so the operator ends the server at once."""
    server = start(make_server)
    with connect(server) as connection:
        connection.flush()
        fault(server, "fault-set", rules=[{"action": "error", "kinds": ["write", "sync"]}])
        connection.write(0, data_of(7))
    stop = subprocess.Popen(
        [ATOLL, "stop", "--json", "--data", str(server.data)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for("it is being stopped", lambda: "stopping: asked by a control client" in server.log_tail())

    def ended() -> bool:
        server.process.terminate()  # the first one asks, the next says "at once"
        return server.process.poll() is not None

    wait_for("it is ended at once", ended)
    out, err = stop.communicate(timeout=60)
    assert server.process.returncode != 0
    server.process = None
    assert stop.returncode == 1 and "in shared memory" in json.loads(out)["left_in_memory"], err
    assert "in shared memory" in err
    server.start()
    with connect(server) as connection:
        connection.flush()
        assert connection.read(0, BLOCK) == data_of(7)


def test_a_slow_device_is_no_hang(make_server):
    server = start(make_server, kernel={"hang_s": 0.5})
    with connect(server) as connection:
        connection.write(0, data_of(1, 8))
        connection.flush()
        fault(server, "fault-set", rules=[{"action": "delay", "ms": 1500, "count": 4}])
        connection.write(BLOCK, data_of(2))
        connection.flush()
        assert connection.read(BLOCK, BLOCK) == data_of(2)
        rows = server.json("ps")
        assert {row["role"]: row["restarts"] for row in rows if row["role"] != "zygote"} == dict.fromkeys(
            ("init", "kernel", "nic", "nbd", "dedup", "disk"), 0
        )


def test_a_request_that_hangs_holds_up_nobody_else(make_server):
    server = start(make_server)
    with connect(server) as connection, connect(server) as other:
        connection.write(0, data_of(1))
        connection.flush()
        fault(server, "fault-set", rules=[{"action": "hang", "kinds": ["sync"], "count": 1}])
        connection.write(BLOCK, data_of(2))
        cookie = connection.submit(Command.FLUSH)
        other.write(2 * BLOCK, data_of(3))
        assert other.read(2 * BLOCK, BLOCK) == data_of(3)
        server.kill("disk")
        assert other.read(0, BLOCK) == data_of(1)
        wait_for("the flush hangs", lambda: fault(server, "fault-status")["rules"][0]["applied"] == 1)
        assert fault(server, "fault-release")["released"] == 1
        connection.wait(cookie).check()


def test_who_connects_while_a_device_keeps_all_pages_can_read(make_server):
    """A device that is dead or full keeps what was written in nic's pages. Negotiation and reads need none."""
    server = start(make_server, nic={"buffer_bytes": "4MiB"})
    with connect(server) as connection, ThreadPoolExecutor(1) as pool:
        connection.write(0, data_of(1))
        connection.flush()
        fault(server, "fault-set", rules=[{"action": "hang", "kinds": ["write"]}])

        def write() -> None:
            cookies = [
                connection.submit(Command.WRITE, number << 18, payload=data_of(number, 64)) for number in range(8, 40)
            ]
            for cookie in cookies:
                connection.wait(cookie).check()

        try:
            writes = pool.submit(write)
            wait_for("all pages are taken", lambda: call(server, "nic", "status")["waiting_for_pages"] == 1)
            with connect(server) as other:
                assert other.read(0, BLOCK) == data_of(1)
                assert other.read(8 << 18, BLOCK) == data_of(8, 64)[:BLOCK], "what is only in memory"
        finally:
            fault(server, "fault-set", rules=[])
            fault(server, "fault-release")
        writes.result(timeout=60)
        connection.flush()
        assert connection.read(39 << 18, 64 * BLOCK) == data_of(39, 64)


@pytest.mark.parametrize("action", [{"action": "forget"}, {"action": "tear", "bytes": 512}])
def test_a_lying_device_is_caught(make_server, action):
    """A write that the device did not do is an error at the read, never other bytes (I8)."""
    server = start(make_server)
    with connect(server) as connection:
        connection.write(0, data_of(1))
        connection.flush()
        # Writes of several blocks at once are data; metadata has its own checksums and copies.
        rule = {**action, "kinds": ["write"], "count": 1, "offset": 64 << 20, "length": 448 << 20}
        fault(server, "fault-set", rules=[rule])
        connection.write(1 << 20, data_of(2, 64))
        connection.flush()
        fault(server, "fault-set", rules=[])
        forget_cache(server, connection)
        try:
            assert connection.read(1 << 20, 64 * BLOCK) == data_of(2, 64)
        except NbdError as error:
            assert error.code == 5
