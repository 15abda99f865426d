"""`atoll check` of a store whose server does not run, `atoll device grow`: what they say, and their exit status."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from nbdclient import Connection
from serverkit import ATOLL, Server, run

BLOCK = 4096
SMALL = {"device_size": "128MiB", "volumes": [{"name": "disk", "size": "64MiB"}],
         "dedup": {"metadata_log_bytes": "1MiB"}}  # fmt: skip


def write(server: Server, seed: int = 1) -> None:
    choose = random.Random(seed)
    with Connection.open(str(server.socket)) as connection:
        connection.negotiate("disk")
        for _ in range(60):
            blocks = choose.randrange(1, 5)
            content = b"".join(random.Random(choose.randrange(40)).randbytes(BLOCK) for _ in range(blocks))
            connection.write(choose.randrange(4000) * BLOCK, content)
        connection.flush()


@pytest.fixture
def stopped(make_server: Callable[..., Server]) -> Server:
    server = make_server(config=SMALL).start()
    write(server)
    server.stop()
    return server


def test_a_store_that_was_stopped_is_clean(stopped: Server) -> None:
    found = stopped.json("check", "--verify-data")
    assert found["ok"] and found["count"] == 0 and found["findings"] == found["notes"] == []
    assert 0 < found["totals"]["stored_bytes"] < found["totals"]["referenced_bytes"]
    assert found["totals"]["verified_bytes"] == found["totals"]["stored_bytes"]
    assert [one["name"] for one in found["totals"]["volumes"]] == ["disk"]
    said = stopped.cli("check").stdout
    assert "everything agrees" in said and str(stopped.data / "device.img") in said


def test_a_running_server_is_left_alone(make_server: Callable[..., Server]) -> None:
    server = make_server(config=SMALL).start()
    for arguments in (("check",), ("check", "--repair"), ("device", "grow", "256MiB")):
        assert "already running" in server.cli(*arguments, status=3).stderr
    said = run(ATOLL, "check", "--device", server.data / "device.img", status=3)
    assert "in use by process" in said


def test_a_store_whose_server_died_is_read_and_not_written(make_server: Callable[..., Server]) -> None:
    """What was acknowledged and not flushed is in shared memory: the device is consistent; repair is too early."""
    server = make_server(config=SMALL).start()
    write(server)
    server.die()
    found = server.json("check", "--verify-data")
    assert found["ok"] and "shared memory" in found["notes"][-1]
    for arguments in (("check", "--repair"), ("device", "grow", "256MiB")):
        assert "shared memory" in server.cli(*arguments, status=2 if arguments[0] == "check" else 1).stderr
    server.start()  # takes the memory over
    server.stop()
    assert not server.json("check")["notes"]


def test_what_is_no_store(tmp_path: Path, stopped: Server) -> None:
    device = tmp_path / "device"
    device.write_bytes(random.Random(1).randbytes(1 << 20))
    said = stopped.cli("check", "--device", str(device), status=2)
    assert "holds no store of ours" in said.stdout
    assert "no such file" in stopped.cli("check", "--device", str(tmp_path / "none"), status=2).stderr
    assert "no server has ever run there" in stopped.cli("check", str(tmp_path), status=2).stderr


def test_a_shortened_device_is_named(tmp_path: Path, stopped: Server) -> None:
    device = tmp_path / "device"
    shutil.copy(stopped.data / "device.img", device)
    with open(device, "r+b") as file:
        file.truncate(100 << 20)
    said = stopped.cli("check", "--device", str(device), status=1).stdout
    assert "the device has 25600 blocks, its store 32768: the device was shortened" in " ".join(said.split())
