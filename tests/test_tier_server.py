"""The fast tier of a real server: what is served there, and what becomes of it when its device or a process goes."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nbdclient import Connection
from recoverykit import Eyes, Load, check_all, check_live, patiently, send
from serverkit import Server, wait_for
from test_clients_shown import follow

from atoll.kernel.client import Client

BLOCK = 4096
MIB = 1 << 20
HOT = 256  # blocks, each written twice

Make = Callable[..., Server]


def start(make_server: Make, folder: Path, **config: Any) -> Server:
    """Blocks with two references move; the main device's cache is small."""
    server = make_server(
        config={
            "device_size": "512MiB",
            "fast_device": str(folder / "fast"),
            "fast_device_size": "16MiB",
            "volumes": [{"name": "disk", "size": "256MiB", "tier_threshold": 2}],
            "disk": {"cache_bytes": "4MiB"},
            "llrrm": {"cache_bytes": "1MiB"},
            "kernel": {"restart_backoff_s": 0.2},
            **config,
        }
    )
    return server.start()


@contextmanager
def connected(server: Server) -> Iterator[Connection]:
    with Connection.open(str(server.socket), timeout_s=60) as connection:
        connection.negotiate("disk")
        yield connection


def hot(index: int) -> bytes:
    return random.Random(index).randbytes(BLOCK)


def fill(server: Server) -> None:
    """Hot blocks at 2 i and 100,000 + 2 i of some MiB of others, so that each lies by itself."""
    with connected(server) as connection:
        for at in range(0, 16 * MIB, MIB):
            connection.write(64 * MIB + at, random.Random(at).randbytes(MIB))
        for copy in (0, 32 * MIB):
            connection.write(copy, b"".join(hot(index) for index in range(HOT)))
        connection.flush()


def tier(server: Server) -> dict[str, Any]:
    with Client(server.data, timeout_s=30) as client:
        return dict(client.call("status")["tier"])


def counters(server: Server) -> dict[str, int]:
    with Client(server.data, timeout_s=30) as client:
        return dict(client.call("status")["counters"]["dedup"])


def settled(server: Server, blocks: int = HOT) -> None:
    wait_for("the blocks have moved", lambda: tier(server)["used_bytes"] == blocks * BLOCK, 20)


def read_hot(server: Server, chance: random.Random, count: int = 200, forget: bool = True) -> None:
    """Random single blocks, after reads that leave none of them in the cache: of others, each twice (what is read once
    pushes out nothing that was used)."""
    with connected(server) as connection:
        if forget:
            for at in range(0, 32 * MIB, MIB):
                connection.read(64 * MIB + at // 2 // MIB * MIB, MIB)
        for _ in range(count):
            index, copy = chance.randrange(HOT), chance.choice((0, 32 * MIB))
            assert connection.read(copy + index * BLOCK, BLOCK) == hot(index)


def served_there(server: Server, seed: int = 1) -> int:
    before = counters(server)["tier_read_blocks"]
    read_hot(server, random.Random(seed))
    return counters(server)["tier_read_blocks"] - before


def test_much_referenced_blocks_are_served_by_the_fast_device(make_server: Make, tmp_path: Path) -> None:
    server = start(make_server, tmp_path)
    fill(server)
    settled(server)
    assert served_there(server) > 50
    row = server.row("llrrm")
    assert row["state"] == "serving" and row["standby_pid"]
    shown = server.cli("status").stdout
    assert "llrrm" in shown and "tier" in shown and "online" in shown
    audit = server.json("audit")
    assert audit["ok"]
    (writers,) = [entry["mapped_writable"] for entry in audit["objects"] if entry["name"].endswith("-llrrm")][-1:]
    assert [process["name"] for process in writers] == ["atoll-llrrm"]
    killed = server.kill("llrrm")
    assert killed["new_pid"] != killed["pid"]
    assert served_there(server, 2) > 50
    check_all(server)
    # A clean stop and a new start: it is warm.
    server.stop()
    server.start()
    wait_for("the table is read", lambda: tier(server)["state"] == "online", 20)
    assert tier(server)["used_bytes"] == HOT * BLOCK
    with connected(server) as connection:
        traced = follow(server, "read", lambda: connection.read(7 * BLOCK, BLOCK))
    assert traced["same_address"] and "llrrm" in {hop["domain"] for hop in traced["hops"]}
    assert served_there(server, 3) > 50
    assert counters(server)["tier_mismatches"] == 0
    # Power fails: what it lacks is copied again, what is old is not believed.
    server.die()
    for path in Path("/dev/shm").glob("atoll-*"):
        if any(instance in path.name for instance in server.instances):
            path.unlink()
    server.start()
    wait_for("the table is read", lambda: tier(server)["state"] == "online", 20)
    read_hot(server, random.Random(4))
    check_all(server)


def test_its_driver_dies_under_load(make_server: Make, tmp_path: Path) -> None:
    """And dedup, and both at once; by signal and by itself."""
    server = start(make_server, tmp_path)
    fill(server)
    settled(server)
    with Eyes(server) as eyes, Load(server, size=24 * MIB) as load:
        patiently(server, "volume-set", name="load", tier_threshold=1)
        for round_number in range(6):
            victims = (("llrrm",), ("dedup", "llrrm"), ("llrrm", "disk"))[round_number % 3]
            number = signal.SIGSEGV if round_number == 3 else signal.SIGKILL
            before = eyes.kill(*victims, number=number)
            read_hot(server, random.Random(round_number), 40, forget=round_number % 2 == 0)
            eyes.wait_serving(before)
            load.goes_on(f"the death of {victims}")
        check_live(server)
    read_hot(server, random.Random(99))
    assert counters(server)["tier_mismatches"] == 0
    check_all(server)


def test_a_driver_that_cannot_start_stops_nothing(
    make_server: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    broken = tmp_path / "broken"
    broken.touch()
    server = start(make_server, tmp_path, testing={"modules": {"llrrm": "tierbroken"}})
    fill(server)
    assert tier(server)["state"] in ("starting", "away")
    assert "told to be broken" in str(server.json("status")["warnings"])
    broken.unlink()
    wait_for("it serves", lambda: server.row("llrrm")["state"] == "serving", 20)
    wait_for("the tier is there", lambda: tier(server)["state"] == "online", 20)
    with connected(server) as connection:
        connection.write(32 * MIB, b"".join(hot(index) for index in range(HOT)))
        connection.write(48 * MIB, b"".join(hot(index) for index in range(HOT)))
        connection.flush()
    settled(server)
    # It serves, then can no more: readers wait a second at most, and everything goes on.
    broken.touch()
    send(int(server.row("llrrm")["pid"]), signal.SIGKILL)
    read_hot(server, random.Random(5))
    wait_for("given up", lambda: tier(server)["state"] == "away", 20)
    assert tier(server)["reason"]
    broken.unlink()
    wait_for("taken back", lambda: tier(server)["state"] == "online", 30)
    assert served_there(server, 6) > 50
    broken.touch()
    send(int(server.row("llrrm")["pid"]), signal.SIGKILL)
    server.stop()


def test_the_file_is_truncated_and_removed(make_server: Make, tmp_path: Path) -> None:
    server = start(make_server, tmp_path)
    fill(server)
    settled(server)
    fast = tmp_path / "fast"
    os.truncate(fast, 0)
    read_hot(server, random.Random(7))
    wait_for("given up", lambda: tier(server)["state"] == "away", 20)
    assert counters(server)["errors"] == 0
    os.truncate(fast, 16 * MIB)
    wait_for("formatted and taken back", lambda: tier(server)["state"] == "online", 30)
    read_hot(server, random.Random(8), 1000)
    wait_for("blocks come again", lambda: tier(server)["used_bytes"] > 20 * BLOCK, 20)
    fast.unlink()
    read_hot(server, random.Random(9))
    server.stop()
    # At the next start it is not there, and cannot be made: a folder has its name.
    fast.mkdir()
    server.start()
    status = server.json("status")
    assert any("no fast tier until the next start" in line for line in status["warnings"])
    server.stop()
    fast.rmdir()
    fast.symlink_to(server.data / "device.img")
    server.start()
    status = server.json("status")
    assert any("is the main device" in line for line in status["warnings"])
    assert "llrrm" not in {row["role"] for row in server.json("ps")}
    read_hot(server, random.Random(10))
    check_all(server)


def test_errors_of_the_device(make_server: Make, tmp_path: Path) -> None:
    """Each read of a bad block is answered by the main device; nobody sees an error."""
    server = start(make_server, tmp_path, testing={"modules": {"llrrm": "atoll.drivers.fault"}})
    fill(server)
    settled(server)

    def fault(rules: list[dict[str, Any]]) -> None:
        with Client(server.data, timeout_s=30) as client:
            client.call("call", role="llrrm", message={"call": "fault-set", "rules": rules})

    fault([{"action": "error", "kinds": ["read"], "probability": 0.2}])
    for seed in range(3):
        read_hot(server, random.Random(20 + seed))
    assert counters(server)["tier_read_errors"] > 0
    fault([{"action": "forget", "kinds": ["write"], "probability": 0.5}])
    wait_for("it serves", lambda: tier(server)["state"] == "online", 20)
    for seed in range(3):
        read_hot(server, random.Random(30 + seed))
    fault([{"action": "error", "kinds": ["read", "write"]}])
    for seed in range(2):
        read_hot(server, random.Random(40 + seed))
    wait_for("given up", lambda: tier(server)["state"] == "away", 20)
    fault([])
    wait_for("taken back", lambda: tier(server)["state"] == "online", 30)
    read_hot(server, random.Random(50))
    assert counters(server)["errors"] == 0
    check_all(server)


def test_a_fast_device_comes_and_goes_between_runs(make_server: Make, tmp_path: Path) -> None:
    """After an end without a stop the arenas are taken over as they are: with the tier, or without it."""
    server = start(make_server, tmp_path)
    fill(server)
    settled(server)
    server.die()
    del server.config["fast_device"], server.config["fast_device_size"]
    server.start()
    read_hot(server, random.Random(60))
    assert server.json("status")["fast_device"] is None
    server.stop()
    server.start()
    assert "llrrm" not in {row["role"] for row in server.json("ps")}
    read_hot(server, random.Random(61))
    server.die()
    server.config |= {"fast_device": str(tmp_path / "fast")}
    server.start()
    assert any("until the next orderly stop" in line for line in server.json("status")["warnings"])
    server.stop()
    server.start()
    wait_for("the tier is there", lambda: tier(server)["state"] == "online", 20)
    read_hot(server, random.Random(62))
    check_all(server)
