"""`make bench` with small numbers, so that it does not rot: each row once, measured and judged; no speed asserted."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.bench import clients, compare, curves, peers, report, system, works
from atoll.bench.clients import CONTENT_BYTES, Load
from atoll.bench.works import Sizes

MIB = 1 << 20
SMALL = Sizes(memory=4 * MIB, write=8 * MIB, far=32 * MIB, cold=16 * MIB, sustained=8 * MIB)
RUNTIME_S = 0.06
SMALL_CONFIG = (
    'device_size = "1GiB"\nsparse = true\n[nic]\nbuffer_bytes = "48MiB"\n[dedup]\nmetadata_log_bytes = "8MiB"\n'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("b")


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        found: dict[str, Any] = {"atoll": peers.Atoll(folder / "s", config=SMALL_CONFIG)}
        for kind in (peers.Nbdkit, peers.QemuNbd, peers.Device):
            found[kind.name] = kind(folder / "s")
            found[kind.name].size_bytes = 8 << 30  # sparse or unwritten: only a number
        for server in found.values():
            stack.enter_context(server)
        yield found


@pytest.mark.parametrize("work", works.works(SMALL), ids=lambda work: work.name)
def test_each_row_is_measured_and_judged(work: works.Work, servers: dict[str, Any], folder: Path) -> None:
    both = {"atoll": servers["atoll"], "peer": servers[work.peer.name]}
    samples = compare.measure_on(both, work, works.INSTALLED, None, folder, 1, RUNTIME_S)
    for side in ("atoll", "peer"):
        assert len(samples[side]) == 1
        for sample in samples[side]:
            assert sample.requests > 0 and 0 < sample.p50_ns <= sample.p99_ns
            assert sample.bytes == sample.requests * work.load.block
            assert not work.load.total_bytes or sample.bytes == work.load.total_bytes
    assert all(sample.server_cpu_s >= 0 for sample in samples["atoll"])  # in ticks of 10 ms
    for goal in work.goals:
        for setting in goal.least:
            judged = compare.judge(work, goal, setting, samples)
            assert judged["atoll"]["lowest"] <= judged["atoll"]["median"] <= judged["atoll"]["highest"]
            better = (
                judged["ratio"] >= goal.least[setting]
                if goal.figure == "rate"
                else judged["ratio"] <= goal.least[setting]
            )
            assert judged["met"] == better


def test_every_row_of_the_goals_is_there() -> None:
    names = {work.name: work for work in works.works()}
    assert {"read-1", "read-32", "write-1-near", "write-1-far", "write-32-near", "write-32-far"} <= set(names)
    assert {"qemu-32-near", "qemu-32-far", "read-256k", "write-256k-near", "write-256k-far"} <= set(names)
    assert {"cold-32", "unique-256k", "mixed-16"} <= set(names)
    for name in ("write-32-near", "write-32-far", "unique-256k"):
        assert names[name].load.total_bytes >= 10 * works.LOG_BYTES
    assert names["read-1"].goals[0].least == {works.INSTALLED: 3.0, works.SAME: 1.1, works.OTHER: 1.1}


def test_halves_are_duplicates_near_or_far() -> None:
    load = Load(
        "write", 4096, 32, 0, 64 * MIB, client="nbdload", contents="near", total_bytes=64 * MIB, far_bytes=16 * MIB
    )
    count = 64 * MIB // 4096
    near = clients.identities(load, count, 3)
    assert len(np.unique(near)) == pytest.approx(count / 2, rel=0.02)
    unique = clients.identities(replace(load, contents="unique"), count, 3)
    assert len(np.unique(unique)) == count
    far = clients.identities(replace(load, contents="far"), count // 8, 3)
    old = clients.written_far(16 * MIB // 4096, again=False)
    assert np.isin(far[1::2], old).all() and not np.isin(far[0::2], old).any()


def test_contents_differ_where_identities_do(servers: dict[str, Any], folder: Path) -> None:
    """What nbdload writes is what it says: block n tells its number, the rest is of the pool."""
    server = servers["nbdkit"]
    clients.fill(server.uri, folder, 0, MIB)
    blocks = np.frombuffer(read_back(server.uri, MIB), np.uint64).reshape(-1, CONTENT_BYTES // 8)
    assert (blocks[:, 0] == np.arange(len(blocks))).all()
    pool = np.fromfile(clients.pool(folder), np.uint64).reshape(-1, CONTENT_BYTES // 8)
    assert (blocks[:, 1:] == pool[np.arange(len(blocks)) % len(pool), 1:]).all()


def read_back(uri: str, size: int) -> bytes:
    program = (
        "import nbd, sys; handle = nbd.NBD(); handle.connect_uri(sys.argv[1])\n"
        "sys.stdout.buffer.write(handle.pread(int(sys.argv[2]), 0))"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-c", program, uri, str(size)], capture_output=True, check=True, timeout=60
    )
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["op=read"], "uri and op are needed"),
        (["uri=nbd://x", "op=steal"], "op is read, write or flush, not: steal"),
        (["uri=nbd://x", "op=read", "depth=0"], "depth: 0"),
        (["uri=nbd://x", "op=read", "block=4k"], "block: 4k"),
        (["uri=nbd://x", "op=read", "plan=/nowhere"], "/nowhere: No such file"),
        (["uri=nbd://x", "op=write", "block=512", "plan=/nowhere"], "whole blocks of 4096"),
        (["deep"], "expected KEY=VALUE, got: deep"),
    ],
)
def test_nbdload_names_what_is_wrong(folder: Path, arguments: list[str], complaint: str) -> None:
    done = subprocess.run([clients.nbdload(folder), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_system_calls_are_judged() -> None:
    good = system.judge_calls("nbd", "x", {"epoll_pwait2": 10, "write": 10}, 100.0)
    assert good["met"] and "2.00 calls a wait" in good["text"]
    assert not system.judge_calls("nbd", "x", {"epoll_pwait2": 10, "write": 11}, 100.0)["met"]
    assert system.judge_calls("nbd", "x", {"epoll_pwait2": 1, "sched_yield": 10, "write": 11}, 100.0)["met"]
    assert not system.judge_calls("dedup", "x", {"epoll_pwait2": 10, "pread64": 1}, 100.0)["met"]
    assert system.judge_calls("dedup", "x", {}, 100.0)["met"]
    assert system.judge_calls("nic", "x", {"epoll_wait": 10, "io_uring_enter": 20}, 100.0)["met"]
    assert not system.judge_calls("disk", "x", {"io_uring_enter": 100}, 100.0)["met"]
    table = " Summary of events:\n\n   epoll_wait           645      0    74.648     0.012\n"
    assert system.CALL.findall(table) == [("epoll_wait", "645")]


def test_stages_of_a_request(servers: dict[str, Any], folder: Path) -> None:
    load = Load("write", 4096, 1, 0, 4 * MIB, client="nbdload")
    sample, hops = curves.traced(servers["atoll"], load, folder, 0.8)
    assert sample["requests"] > 0
    assert hops[0]["domain"] == "nbd" and hops[-1]["domain"] == "nic"
    assert {"nbd", "dedup", "nic"} == {hop["domain"] for hop in hops}
    assert all(hop["us"] >= 0 for hop in hops)


def document() -> dict[str, Any]:
    goal = {
        "work": "read-1", "title": "a read", "figure": "rate", "peer": "nbdkit", "setting": works.INSTALLED,
        "atoll": {"median": 2.0, "lowest": 1.0, "highest": 3.0},
        "peer_figure": {"median": 1.0, "lowest": 1.0, "highest": 1.0}, "ratio": 2.0, "goal": 3.0, "met": False,
    }  # fmt: skip
    point = {"x": 1, "atoll": {"read": {"rate": 1.0, "p50_us": 1.0, "p99_us": 2.0, "cpu_us": 1.0}}}
    return {
        "machine": compare.machine(), "when": "now", "rounds": 1, "runtime_s": 1.0, "niceness": 0,
        "versions": {"atoll": "atoll 1"}, "samples": [],
        "goals": [goal], "curves": {"depth": [point, {**point, "x": 2}], "stored": [point]},
    }  # fmt: skip


def test_what_is_found_is_shown_and_drawn(tmp_path: Path) -> None:
    shown = io.StringIO()
    with redirect_stdout(shown):
        report.show(document())
        report.show_system({"rows": [system.row("idle server", 0.1, "10 %", "< 0.5 %", False)]})
    assert "short" in shown.getvalue() and "2.00 ×" in shown.getvalue() and "idle server" in shown.getvalue()
    report.draw(document(), tmp_path)
    for name in ("compare", "depth", "stored"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_is_filled_between_its_marks() -> None:
    page = "a\n<!-- bench: goals -->\nold\n<!-- bench: end -->\nb\n<!-- bench: system -->\nkept\n<!-- bench: end -->\n"
    filled = report.fill_page(document(), page)
    assert (
        "old" not in filled and "| a read, requests/s | as installed | nbdkit | 2 (1–3) | 1 (1–1) | 2.00 × |" in filled
    )
    assert filled.startswith("a\n<!-- bench: goals -->\n|") and "kept" in filled


def test_the_exit_status_says_whether_goals_are_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = document()
    monkeypatch.setattr(compare, "run", lambda *_: found)
    written = tmp_path / "new" / "json"
    few = ["--no-check", "--no-system", "--no-curves", "--folder", str(tmp_path), "--json", str(written)]
    for met, status in ((False, 1), (True, 0)):
        found["goals"][0]["met"] = met
        with redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as ended:
            compare.main(few)
        assert ended.value.code == status
    assert json.loads(written.read_text()) == found
    done = subprocess.run(
        [sys.executable, "-m", "atoll.bench.compare", "--rows", "none"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "no row 'none'; there are read-1," in done.stderr


def test_a_missing_peer_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert shutil.which("nbdkit") is None
    with pytest.raises(peers.BenchError, match="nbdkit is missing: say make bench"):
        peers.Nbdkit(folder / "s").command()


def test_settings_place_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert compare.placement(works.INSTALLED) == (None, None)
    assert compare.placement(works.SAME) == ([3], [3])
    assert compare.placement(works.OTHER) == ([3], [5])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    with pytest.raises(peers.BenchError, match="two processors"):
        compare.placement(works.OTHER)
