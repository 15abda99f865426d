"""Where domains run: the choice, a server whose data path shares a processor, successors that stay there."""

from __future__ import annotations

import os
from typing import Any

import pytest
from nbdclient import Connection
from serverkit import wait_for

from atoll.kernel import placement
from atoll.kernel.instance import BootError


def config(mode: str, cpus: list[int] | None = None) -> dict[str, Any]:
    return {"kernel": {"placement": mode, "cpus": cpus or []}}


@pytest.mark.parametrize(
    ("mode", "cpus", "role", "allowed", "cores"),
    [
        ("auto", [], "nbd", {0, 1}, {1}),
        ("auto", [], "disk", {0, 1}, None),
        ("auto", [], "nic", {5}, {5}),
        ("auto", [], "nic", {0, 1, 2, 3}, None),
        ("together", [], "dedup", {0, 1, 2, 3}, {3}),
        ("together", [0, 2], "dedup", {0, 1, 2, 3}, {2}),
        ("together", [0, 2], "disk", {0, 1, 2, 3}, {0, 2}),
        ("auto", [0, 2], "nic", {0, 1, 2, 3}, {2}),
        ("none", [0, 2], "nic", {0, 1, 2, 3}, {0, 2}),
        ("none", [], "nic", {0, 1}, None),
        ("together", [7], "nic", {0, 1}, None),
    ],
)
def test_the_choice(mode: str, cpus: list[int], role: str, allowed: set[int], cores: set[int] | None) -> None:
    assert placement.cores(config(mode, cpus), role, allowed) == cores


def test_the_choice_of_init_holds_for_all() -> None:
    made = config("together")
    placement.choose(made, 12345)
    allowed = os.sched_getaffinity(0)
    if len(allowed) > 1:
        assert made["kernel"]["path_cpu"] in allowed
        assert placement.cores(made, "nic", allowed) == {made["kernel"]["path_cpu"]}
        others = allowed - {made["kernel"]["path_cpu"]}
        assert placement.cores(made, "nic", others) == {max(others)}, "it is not allowed there any more"


@pytest.mark.parametrize(
    ("mode", "processors", "shared"), [("auto", 3, True), ("auto", 4, False), ("none", 2, False), ("together", 8, True)]
)
def test_one_is_chosen_where_the_path_shares_one(
    monkeypatch: pytest.MonkeyPatch, mode: str, processors: int, shared: bool
) -> None:
    """Storage drivers take its absence for: the scheduler decides."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    made = config(mode)
    placement.choose(made, 12345)
    assert ("path_cpu" in made["kernel"]) is shared


def test_a_processor_that_cannot_be_used_is_named() -> None:
    with pytest.raises(BootError, match=r"kernel\.cpus names processor 8000; Atoll may run on"):
        placement.check(config("auto", [8000]))


def test_the_path_shares_a_processor_whoever_is_replaced(make_server: Any) -> None:
    mine = sorted(os.sched_getaffinity(0))
    server = make_server(config={"kernel": {"placement": "together"}}).start()
    for _ in range(2):
        rows = {row["role"]: row["cpu_affinity"] for row in server.json("ps")}
        shared = rows["nbd"]
        assert len(shared) == 1 and set(shared) <= set(mine)
        assert {role: rows[role] for role in placement.PATH} == dict.fromkeys(placement.PATH, shared)
        assert rows["disk"] == rows["kernel"] == rows["init"] == mine
        for role in placement.PATH:
            server.cli("kill", role)


def test_anywhere_if_asked_for(make_server: Any) -> None:
    server = make_server(config={"kernel": {"placement": "none"}}).start()
    assert all(row["cpu_affinity"] == sorted(os.sched_getaffinity(0)) for row in server.json("ps"))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor: there is nowhere else to go")
def test_dedup_leaves_the_path_for_large_writes(make_server: Any) -> None:
    """Large writes send it away, small requests bring it back, a successor begins on the path."""
    mine = sorted(os.sched_getaffinity(0))
    volumes = [{"name": "disk", "size": "16MiB"}]
    server = make_server(config={"kernel": {"placement": "together"}, "volumes": volumes}).start()
    path = server.row("nbd")["cpu_affinity"]
    with Connection.open(str(server.socket)) as client:
        client.negotiate("disk")

        def load(where: list[int], payload: bytes) -> None:
            def look() -> bool:
                for turn in range(32):
                    client.write(turn * len(payload), payload)
                return bool(server.row("dedup")["cpu_affinity"] == where)

            wait_for(f"dedup on {where}", look)

        large, small = bytes(range(256)) * 1024, b"s" * 4096
        load(mine, large)
        load(path, small)
        load(mine, large)
        server.cli("kill", "dedup")
        load(path, small)
        load(mine, large)
        other = [cpu for cpu in mine if cpu not in path][:1]
        os.sched_setaffinity(server.row("dedup")["pid"], other)  # who else binds it has the last word
        load(other, small)
        load(other, large)
