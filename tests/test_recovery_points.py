"""Each crash point of each role, armed once under a verifying load: whoever comes by dies there, nobody notices."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from nbdclient import Connection
from recoverykit import DOMAINS, FAST, LONG, ROLES, Eyes, Load, check_live, check_nothing_left, patiently, send
from serverkit import Server

from atoll.ipc.crashpoint import points_in

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("ipc", "kernel", "drivers", "services")

NOT_HERE = {
    "kernel.stop.before",  # between a stop and the word about it: tests/test_kernel_start.py
    "kernel:call.before",  # in common code, but nobody calls the kernel
    "dedup.store.load",  # at a start after a clean stop, before anything can be armed
    "dedup.store.page.read",  # where metadata does not fit into memory: test_paging.py
    "dedup.store.rewrite",  # after a failed sync of the device
    "dedup.tier.load",  # while the fast device's table is read at the start: tests/test_dedup_tier.py
    "dedup.tier.format",  # likewise, where it is blank
}


def all_points() -> list[tuple[str, str]]:
    """(role, name as it is armed); a point of common code once per role."""
    found = []
    for folder in SOURCES:
        for name in points_in(ROOT / folder):
            if name.startswith(":"):
                found += [(role, role + name) for role in (*ROLES, FAST)]
            else:
                found.append((name.split(".")[0], name))
    return sorted(found)


def test_points_belong_to_roles() -> None:
    points = all_points()
    assert {role for role, _ in points} == {*ROLES, FAST}
    assert len(points) == len(set(points))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_each_crash_point(make_server, tmp_path: Path, transport: str) -> None:
    """With a fast device for which the load has more blocks than places."""
    server: Server = make_server(
        config={
            "testing": {"crash_points": True},
            "dedup": {"metadata_log_bytes": "1MiB", "metadata_cache_bytes": "2MiB", "tier_entries": 64},
            "fast_device": str(tmp_path / "fast"),
            "fast_device_size": "4MiB",
        }
    ).start()
    reached, passed = [], []
    with Eyes(server) as eyes, Load(server, transport=transport, size=32 << 20) as load:
        patiently(server, "volume-set", name=load.volume, tier_threshold=1)
        for role, name in all_points() * LONG:
            (reached if walk(server, eyes, load, role, name) else passed).append(name)
            if role == "dedup":
                check_live(server)
        print(f"{len(reached)} reached: {', '.join(reached)}")
        print(f"{len(passed)} not reached: {', '.join(passed)}")
    check_nothing_left(server)
    assert set(passed) <= NOT_HERE, f"the load must reach {sorted(set(passed) - NOT_HERE)}"


def walk(server: Server, eyes: Eyes, load: Load, role: str, name: str) -> bool:
    """Arms one point and waits until somebody has died there; False if nobody came by."""
    # Both storage drivers run the same code: one of them dies.
    roles = (role, FAST) if name.startswith("disk.") else (role,)
    before = {role: eyes.incarnation(role) for role in roles}
    sequence = patiently(server, "crash-point", name=name)["sequence"]
    recovering = ".recover" in name
    began, provoked = time.monotonic(), 0
    # All others must be reached: at once mostly, a checkpoint when the log is full, and later on a slow machine.
    deadline = began + (4.0 if name in NOT_HERE else 60.0)
    while not seen(eyes, roles, sequence) and time.monotonic() < deadline:
        if name == "dedup.store.delete":
            delete_a_volume(server)
        if name.startswith("dedup.scrub"):
            patiently(server, "call", role="dedup", message={"call": "scrub-start"})
        if role == "kernel" or recovering or ":call" in name:
            # Promotions, calls and recoveries happen when somebody dies or asks.
            if "promote" not in name and not recovering:
                poke(server)
            elif time.monotonic() - began > 0.4 * provoked:
                provoked += 1
                victim = role if recovering else DOMAINS[provoked % 4]
                send(eyes.pid(victim), signal.SIGKILL)
        time.sleep(0.003)
    died = seen(eyes, roles, sequence)
    if died:
        eyes.wait_serving({victim: before[victim] for victim in died})
    patiently(server, "crash-point", name="")
    load.goes_on(name, 30)
    return bool(died)


def seen(eyes: Eyes, roles: tuple[str, ...], sequence: int) -> list[str]:
    """Who has died there."""
    return [role for role in roles if eyes.crash_seen(role) == sequence]


def delete_a_volume(server: Server) -> None:
    patiently(server, "volume-create", name="short-lived", size_bytes=8 << 20, read_only=False)
    with Connection.open(str(server.socket)) as connection:
        connection.negotiate("short-lived")
        connection.write(0, b"x" * (1 << 20))
    patiently(server, "volume-delete", name="short-lived", force=True)


def poke(server: Server) -> None:
    try:
        patiently(server, "status", timeout_s=5)
    except Exception as error:
        print("status:", error)
