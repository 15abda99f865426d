"""The whole server on a device that errs, hangs, lies, or loses power."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
from nbdclient import Command, Connection, NbdError
from serverkit import Server, wait_for

from atoll.drivers.fault.record import apply, power_loss, read_record
from atoll.kernel.client import Client

BLOCK = 4096
MODULES = {"modules": {"disk": "atoll.drivers.fault"}}


def start(make_server, **config) -> Server:
    testing = {**MODULES, **config.pop("testing", {})}
    return make_server(config={"device_size": "512MiB", "volumes": [{"name": "disk", "size": "256MiB"}],
                               "testing": testing, **config}).start()  # fmt: skip


def fault(server: Server, call: str, **fields) -> dict:
    with Client(server.data, timeout_s=30) as client:
        return client.call("call", role="disk", message={"call": call, **fields})["answer"]


def connect(server: Server) -> Connection:
    connection = Connection.open(str(server.socket), timeout_s=60)
    connection.negotiate("disk")
    return connection


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
    with connect(server) as connection:
        fault(server, "fault-set", rules=[{"action": "error", "kinds": ["write"]}])
        connection.write(0, data_of(7))
        with pytest.raises(NbdError):
            connection.flush()
        with pytest.raises(NbdError):
            connection.write(BLOCK, data_of(8), flags=1)
        assert connection.read(0, BLOCK) == data_of(7)
        fault(server, "fault-set", rules=[])

        def flushed() -> bool:
            try:
                connection.flush()
            except NbdError:
                return False
            return True

        wait_for("a flush succeeds again", flushed)
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


@pytest.mark.slow
def test_power_loss(make_server, tmp_path):
    """After the power went at any moment, what a flush had acknowledged is there, and nothing is that never was."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    record = tmp_path / "record"
    server = start(make_server, testing={"fault": {"record": str(record)}})
    held: dict[int, list[bytes]] = {}  # block: all its contents so far, the last one last
    flushed: list[tuple[int, dict[int, int]]] = []  # bytes of the record, per block how many contents were flushed
    with connect(server) as connection:
        for step in range(120):
            block, count = choose.randrange(512), choose.choice([1, 1, 2, 8])
            number = choose.randrange(30) if choose.random() < 0.4 else 1000 + step
            connection.write(block * BLOCK, data_of(number, count))
            content = data_of(number, count)
            for at in range(count):
                held.setdefault(block + at, [bytes(BLOCK)]).append(content[at * BLOCK : (at + 1) * BLOCK])
            if choose.random() < 0.12:
                connection.flush()
                size = fault(server, "fault-status")["record_bytes"]
                flushed.append((size, {block: len(contents) for block, contents in held.items()}))
            if choose.random() < 0.05:
                server.kill(choose.choice(["disk", "dedup"]))
        end = fault(server, "fault-status")["record_bytes"]
    server.die()
    events = read_record(record, end)
    cuts = sorted(choose.sample(range(len(read_record(record, flushed[0][0]))), 1)) + [
        choose.randrange(len(read_record(record, flushed[0][0])), len(events) + 1) for _ in range(3)
    ]
    sizes = event_ends(record, end)
    for cut in cuts:
        after = sizes[cut - 1] if cut else 0
        durable = next((counts for size, counts in reversed(flushed) if size <= after), None)
        with_power_lost(server, events, cut, choose.randrange(1 << 30))
        if durable is None:
            # Before the first flush: even the store itself may be half made; then it is refused, not guessed.
            continue
        lost = make_server(config=dict(server.config, testing={}))
        lost.data.mkdir()
        for name in ("device.img", "version"):
            if (server.data / name).exists():
                shutil.copy(server.data / name, lost.data / name)
        lost.start()
        with connect(lost) as connection:
            for block, contents in held.items():
                found = connection.read(block * BLOCK, BLOCK)
                count = durable.get(block, 1)
                assert found in contents[count - 1 :], f"cut {cut}: block {block} lost what was flushed"
        lost.stop()
    for path in Path("/dev/shm").glob("atoll-*"):
        if any(instance in path.name for instance in server.instances):
            path.unlink()


def event_ends(record: Path, end: int) -> list[int]:
    """Byte after each event."""
    ends, at = [], 0
    for event in read_record(record, end):
        at += 40 + len(event.data)
        ends.append(at)
    return ends


def with_power_lost(server: Server, events, cut: int, seed: int) -> None:
    """The device as it may be; before the record it held zeros."""
    device = server.data / "device.img"
    size = device.stat().st_size
    device.unlink()
    with device.open("wb") as image:
        image.truncate(size)
        apply(image, power_loss(events, cut, seed, kept=random.Random(seed).choice([0.0, 0.5, 1.0])))
