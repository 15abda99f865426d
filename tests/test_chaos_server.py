"""Kill anything under load: no connection drops, no request fails, no byte is wrong, no acknowledged write is lost.

These are `atoll chaos` runs as a user would start them, short ones. Deaths at named places: test_recovery_points.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from kernelkit import alive
from serverkit import ATOLL, Server, wait_for

from atoll.kernel import chaos
from atoll.kernel.chaos_kill import ROLES
from atoll.kernel.chaos_load import Shared, churn, work
from atoll.kernel.client import Client


def run_chaos(server: Server, *arguments: str, seconds: float = 6.0) -> dict:
    done = server.cli(
        "chaos", "--json", "--size", "64MiB", "--duration", str(seconds), *arguments, status=None, timeout_s=180
    )
    print(done.stderr[-2000:])
    result = json.loads(done.stdout)
    assert done.returncode == (0 if result["ok"] else 1)
    for role, figures in result["roles"].items():
        print(role, figures)
    print("lost", result["throughput_lost"], "silence", result["silence_ms"], "quiet", result["quiet_silence_ms"])
    return result


def assert_nothing_happened(server: Server, result: dict) -> None:
    assert result["ok"] and result["failures"] == []
    load = result["load"]
    assert [load[name] for name in ("connection_drops", "errors", "wrong_bytes", "wrong_sectors", "lost_writes")] == [
        0
    ] * 5
    assert load["checked_bytes"] > 64 << 20 and set(load["by_command"]) >= {"read", "write", "flush", "trim"}
    check(server)


def check(server: Server) -> None:
    """dedup's own checker: map, counts, log and lent buffers agree."""
    with Client(server.data) as client:
        answer = client.call("call", role="dedup", message={"call": "check"}, timeout_s=60)["answer"]
    assert answer["ok"] and answer["inconsistencies"] == [], answer


@pytest.mark.parametrize("target", ["nic", "nbd", "dedup", "disk", "kernel", "any", "pairs"])
def test_kills(module_server, target):
    result = run_chaos(module_server, "--target", target, "--interval", "0.25", "--connections", "6", "--seed", "11")
    assert_nothing_happened(module_server, result)
    assert result["kills"] >= 8
    assert all(event["serving_ms"] is not None for event in result["events"])


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_crashes_by_themselves(module_server, transport):
    """SEGV and ABRT look like bugs of the domain's own: back-off may apply, but nothing is refused."""
    result = run_chaos(
        module_server, "--signal", "SEGV,ABRT", "--interval", "1", "--transport", transport, "--connections", "3"
    )
    assert_nothing_happened(module_server, result)


def test_hangs(module_server):
    """A stopped domain is noticed because work waits for it, a stopped kernel because its loop does not turn."""
    hangs = ["--signal", "STOP", "--interval", "2.5", "--connections", "3", "--seed", "3"]
    result = run_chaos(module_server, *hangs, seconds=9)
    assert_nothing_happened(module_server, result)
    assert {event["signal"] for event in result["events"]} == {"STOP"}
    assert all(event["serving_ms"] is not None for event in result["events"])
    domains = [event for event in result["events"] if event["role"] != "kernel"]
    assert domains and all(event["silence_ms"] < 5000 for event in domains)
    assert len(domains) < len(result["events"])


def test_all_at_once_but_init(module_server):
    """Every role's process at the same moment, several times."""
    with Client(module_server.data) as client:
        client.call("volume-create", name="all", size_bytes=64 << 20, read_only=False)
        shared, jobs = start_load(client, "all")
        try:
            for _ in range(5):
                victims = wait_for("each role has a process", lambda: playing(client))
                before = shared.totals()["replies"]
                for pid in victims:
                    signal_one(pid)
                wait_for("replies go on", lambda before=before: shared.totals()["replies"] > before + 100)
        finally:
            reports = chaos._end(jobs, print)
        client.call("volume-delete", name="all", force=True)
    assert_right(shared, reports)
    check(module_server)


def playing(client: Client) -> list[int]:
    """The pid of each role but init and zygote; none while one has no process."""
    pids = {row["role"]: row["pid"] for row in client.call("ps")["domains"]}
    found = [pids[role] for role in ROLES]
    return found if all(found) else []


def signal_one(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def start_load(client: Client, volume: str, rate: float = 600.0) -> tuple[Shared, list]:
    options = chaos.Options(Path(), connections=4, depth=4, small=True, rate=rate, workers=1)
    targets, size = chaos._targets(client, volume, "both")
    shared = Shared(2)
    plans = chaos._plans(options, targets, size, 1)
    jobs = [chaos._start(work, (plans[0], shared)), chaos._start(churn, (1, targets, shared))]
    wait_for("the load runs", lambda: shared.totals()["replies"] > 100 and shared.totals()["churns"] > 2)
    return shared, jobs


def assert_right(shared: Shared, reports: list) -> None:
    assert [trouble for report in reports for trouble in report.troubles] == []
    assert [report.failure for report in reports if report.failure] == []
    totals = shared.totals()
    assert not any(totals[name] for name in ("drops", "errors", "wrong_sectors", "lost_sectors"))


def test_more_connections_than_the_server_takes(make_server):
    """One too many would wait until another ends. As many as there are places for do."""
    server = make_server(config={"nic": {"max_connections": 4}}).start()
    run = ["chaos", "--size", "16MiB", "--duration", "2", "--workers", "1", "--connections"]
    said = server.cli(*run, "4", status=None, timeout_s=60)
    assert said.returncode == 4
    assert "takes 4 connections (nic.max_connections) and has 0: there is no place for 4 and 1 more" in said.stderr
    server.cli(*run, "3", timeout_s=60)
    assert [volume["name"] for volume in server.json("volume", "list") if volume["name"].startswith("chaos")] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_ends_it_ends_its_load(module_server, number):
    """As timeout(1) does, or an impatient user: no process of the load goes on."""
    run = subprocess.Popen(
        [ATOLL, "chaos", "--data", str(module_server.data), "--size", "16MiB", "--duration", "600", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stderr is not None and "replies/s" in run.stderr.readline()
    children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    assert len(children) >= 2
    run.send_signal(number)
    try:
        out, err = run.communicate(timeout=60)
        wait_for("its processes end", lambda: not any(alive(pid) for pid in children))
    finally:
        for pid in filter(alive, children):
            signal_one(pid)
    left = [each["name"] for each in module_server.json("volume", "list") if each["name"].startswith("chaos")]
    if number == signal.SIGTERM:
        assert run.returncode == 0 and json.loads(out)["interrupted"] and "every byte is checked" in err
        assert left == []
    for name in left:
        module_server.cli("volume", "delete", "--force", name)


def test_a_role_that_is_not_there(module_server):
    said = module_server.cli("chaos", "--target", "llrrm", "--duration", "1", status=4)
    assert "no role 'llrrm' here; there are nic, nbd, dedup, disk, kernel" in said.stderr
