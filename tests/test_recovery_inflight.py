"""What is in flight at a kill is in use until its completion: no place on the device is written for anybody else, no
page lent with it is received into, before that; and the contents are right afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nbdclient import Connection
from recoverykit import LONG, MIB, Eyes, Load, check_live, check_nothing_left, patiently
from serverkit import Server, wait_for

from atoll.drivers.fault.record import Event, read_record

SEED = 9
BLOCK = 4096


def start(make_server: Callable[..., Server], record: Path, **config: Any) -> Server:
    fault = {"record": str(record)}
    testing = {"modules": {"disk": "atoll.drivers.fault"}, "fault": fault}
    small = {"device_size": "512MiB", "disk": {"cache_bytes": "4MiB"}}  # so that reads come from the device
    return make_server(config={**small, "testing": testing, **config}).start()


def rules(server: Server, *rows: dict[str, Any]) -> None:
    patiently(server, "call", role="disk", message={"call": "fault-set", "rules": list(rows)})


def recorded(server: Server, record: Path) -> list[Event]:
    size = patiently(server, "call", role="disk", message={"call": "fault-status"})["answer"]["record_bytes"]
    return read_record(record, size)


def assert_no_place_twice(events: list[Event]) -> int:
    """No two writes of different requests overlap in time and place. An I/O done again after a kill has the same
    identity and data. Returns how many were."""
    flying: dict[int, Event] = {}
    repeated = 0
    for event in events:
        if event.kind == "done":
            flying.pop(event.identity, None)
            continue
        if event.kind not in ("write", "discard"):
            continue
        if event.identity in flying:
            assert event == flying[event.identity], f"{event.identity:#x} is another write than before"
            repeated += 1
            continue
        for other in flying.values():
            assert (
                event.offset_bytes >= other.offset_bytes + other.length_bytes
                or other.offset_bytes >= event.offset_bytes + event.length_bytes
            ), f"place {event.offset_bytes} is written while {other.offset_bytes}+{other.length_bytes} is in flight"
        flying[event.identity] = event
    return repeated


@pytest.mark.parametrize("roles", [("disk",), ("dedup",), ("disk", "dedup"), ("nic", "nbd", "disk", "dedup")], ids=str)
def test_kills_with_slow_io_in_flight(
    make_server: Callable[..., Server], tmp_path: Path, roles: tuple[str, ...]
) -> None:
    """I/O that waits 50 to 400 ms on its way; blocks are overwritten meanwhile, so that places become free early."""
    server = start(make_server, tmp_path / "record")
    with Eyes(server) as eyes, Load(server, size=12 * MIB, rate=1500, read_percent=40, odd=False) as load:
        rules(
            server,
            {"action": "delay", "kinds": ["write", "discard"], "ms": 400, "probability": 0.2},
            {"action": "delay", "kinds": ["write", "discard"], "ms": 50, "probability": 0.6},
            {"action": "delay", "kinds": ["read"], "ms": 60, "probability": 0.5},
        )
        for _ in range(12 * LONG):
            wait_for("writes are in flight", lambda: patiently(server, "status")["log"]["runs"] >= 2)
            eyes.wait_serving(eyes.kill(*roles))
            check_live(server)
            load.goes_on(f"the kill of {roles}")
        rules(server)
    check_nothing_left(server)
    events = recorded(server, tmp_path / "record")
    print(f"{len(events)} events, {assert_no_place_twice(events)} done again")


@pytest.mark.parametrize("role", ["disk", "dedup", "nic"])
def test_a_hanging_write_keeps_its_place_and_its_pages(
    make_server: Callable[..., Server], tmp_path: Path, role: str
) -> None:
    """A write that the device keeps: its blocks are overwritten, its domain dies, much else is written; its place and
    its pages are touched by nobody until it is let go."""
    server = start(make_server, tmp_path / "record", nic={"buffer_bytes": "16MiB"})
    chance = random.Random(SEED)
    old, new = chance.randbytes(16 * BLOCK), chance.randbytes(16 * BLOCK)
    with Eyes(server) as eyes, Connection.open(str(server.socket), timeout_s=60) as connection:
        connection.negotiate("disk")
        connection.write(64 * MIB, b"other" * 1000)
        connection.flush()
        began = len(recorded(server, tmp_path / "record"))
        rules(server, {"action": "hang", "kinds": ["write"], "count": 1})
        connection.write(0, old)
        wait_for("a write hangs", lambda: hanging(server) == 1)
        connection.write(0, new)  # the hanging one is of no use any more
        eyes.wait_serving(eyes.kill(role))
        check_live(server)
        for at in range(40):  # more than all pages, so that a free one is received into
            connection.write((2 + at) * MIB, chance.randbytes(MIB))
        eyes.wait_serving(eyes.kill(role))
        assert connection.read(0, len(new)) == new
        lent = patiently(server, "status")["domains"]["nic"]
        assert lent["buffer_pages_taken"] + lent["buffer_pages_lent"] >= 16
        assert held_back(recorded(server, tmp_path / "record")[began:], old) is None, "another write hangs"
        patiently(server, "call", role="disk", message={"call": "fault-release"})
        connection.flush()
        assert connection.read(0, len(new)) == new
        rules(server)
        events = recorded(server, tmp_path / "record")
    assert_no_place_twice(events)
    hung = held_back(events[began:], old)
    assert hung is not None, "the write that hung was never done with its own data"
    check_nothing_left(server)
    server.stop()
    server.start()
    with Connection.open(str(server.socket)) as connection:
        connection.negotiate("disk")
        assert connection.read(0, len(new)) == new


def hanging(server: Server) -> int:
    answer = patiently(server, "call", role="disk", message={"call": "fault-status"})["answer"]
    return sum(rule["applied"] for rule in answer["rules"])


def held_back(events: list[Event], data: bytes) -> Event | None:
    """The write that holds `data`, whole: its pages were not used for anything else while it hung."""
    return next((event for event in events if event.kind == "write" and data in event.data), None)
