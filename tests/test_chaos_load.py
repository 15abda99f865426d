"""The load of `atoll chaos` alone: it is content with a server that is right, and finds what a wrong one does."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.kernel import chaos, chaos_report
from atoll.kernel.chaos import Options
from atoll.kernel.chaos_kill import ROLES, Kill, choose
from atoll.kernel.chaos_load import Plan, Shared, Target, Worker, churn
from atoll.kernel.chaos_model import BLOCK, NONE, SECTOR, Model, block_ids, contents, payload

MIB = 1 << 20


# --- The model --------------------------------------------------------------------------------------------------------


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_contents_are_known_and_distinct():
    blocks = contents(ids(0, 1, 2, 1, 1 << 40))
    assert blocks.dtype == np.uint64 and blocks.shape == (5, BLOCK // 8)
    assert not blocks[0].any()
    assert (blocks[1] == blocks[3]).all()
    assert len({blocks[at].tobytes() for at in range(5)}) == 4
    sectors = blocks[1].reshape(8, -1)
    assert len({sector.tobytes() for sector in sectors}) == 8 and (sectors[:, 0] == 1).all()


@given(first=st.integers(0, 40), count=st.integers(1, 40))
def test_payload_of_any_sectors(first, count):
    """Sectors hold the same bytes wherever a request begins."""
    end = first + count
    blocks = -(-end // 8) - first // 8
    values = np.arange(7, 7 + blocks, dtype=np.uint64)
    whole = contents(values).tobytes()
    start = first % 8 * SECTOR
    assert payload(first, end, values).tobytes() == whole[start : start + count * SECTOR]
    assert block_ids(first, end, values).tolist() == [7 + at // 8 - first // 8 for at in range(first, end)]


@given(st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_model_accepts_any_order_that_is_allowed_and_no_other(seed):
    """A little server with a random order of doing things; an oracle that is plain bytes."""
    choose = random.Random(seed)
    sectors = 64
    model = Model(16, sectors)
    store = bytearray(sectors * SECTOR)
    flight = []  # (span, data or None, done)
    for step in range(120):
        first = choose.randrange(sectors)
        end = min(sectors, first + choose.randrange(1, 24))
        action = choose.random()
        if action < 0.35 and model.free_for_write(first, end):
            if choose.random() < 0.2 and model.settled(first, end):
                span, data = model.begin_write("trim", first, end, None), bytes((end - first) * SECTOR)
                if choose.random() < 0.5:
                    data = bytes(store[first * SECTOR : end * SECTOR])  # a server may ignore a trim
            else:
                at, until = first + 16, end + 16
                values = np.arange(step * 100 + 1, step * 100 + 1 - at // 8 - -until // 8, dtype=np.uint64)
                values = np.resize(values, -(-until // 8) - at // 8)
                span = model.begin_write("write", first, end, block_ids(at, until, values))
                data = payload(at, until, values).tobytes()
            flight.append([span, data, False])
        elif action < 0.7:
            flight.append([model.begin_read(first, end), None, False])
        elif flight:
            row = choose.choice(flight)
            span = row[0]
            place = slice(span.first * SECTOR, span.end * SECTOR)
            if not row[2]:  # takes effect some time while it is in flight
                if span.kind == "read":
                    row[1] = bytes(store[place])
                else:
                    store[place] = row[1]
                row[2] = True
            else:
                flight.remove(row)
                if span.kind == "read":
                    assert model.end_read(span, row[1]) == []
                else:
                    model.end_write(span, certain=True)
    for span, data, done in flight:
        if span.kind == "read":
            model.end_read(span, None)
        else:
            if not done and choose.random() < 0.5:
                store[span.first * SECTOR : span.end * SECTOR] = data
            model.end_write(span, certain=False)
    assert model.check_all(0, bytes(store)) == []
    # One flipped bit anywhere is found.
    at = choose.randrange(len(store))
    store[at] ^= 1 << choose.randrange(8)
    findings = model.check_all(0, bytes(store))
    assert [finding.sector for finding in findings] == [at // SECTOR] and findings[0].wrong_bytes >= 1


def test_a_lost_write_is_told_from_other_damage():
    model = Model(0, 8)
    for value in (5, 6):
        model.end_write(model.begin_write("write", 0, 8, np.full(8, value, np.uint64)), certain=True)
    old = contents(ids(5)).tobytes()
    findings = model.check_all(0, old)
    assert len(findings) == 8 and all(finding.lost for finding in findings)
    assert not any(finding.lost for finding in model.check_all(0, contents(ids(77)).tobytes()))
    assert model.check_all(0, contents(ids(6)).tobytes()) == []
    assert (model.also == NONE).all()


# --- The plan of kills and the figures -----------------------------------------------------------------------------


def test_the_plan_is_fair_and_repeatable():
    def first(target, count, seed=3):
        return [next_ for next_, _ in zip(choose(target, [signal.SIGKILL], seed), range(count), strict=False)]

    plan = first("any", 50)
    assert plan == first("any", 50) and plan != first("any", 50, 4)
    assert {roles[0]: sum(each[0] == roles for each in plan) for roles, _ in plan} == dict.fromkeys(ROLES, 10)
    pairs = {roles for roles, _ in first("pairs", 20)}
    assert len(pairs) == 20 and all(a != b for a, b in pairs)
    signals = choose("kernel", [signal.SIGSTOP, signal.SIGKILL], 1)
    assert {number for _, (_, number) in zip(range(20), signals, strict=False)} == {signal.SIGSTOP, signal.SIGKILL}


def test_the_rate_shown_is_per_second_however_long_a_kill_took():
    before = dict.fromkeys(("replies", "bytes", "drops", "errors", "wrong_sectors", "lost_sectors"), 0)
    word = chaos._word(before | {"replies": 300, "bytes": 6_000_000}, before, [], 5_000_000_000, 3_000_000_000)
    assert word.split() == ["5.0", "s", "100", "replies/s", "2.0", "MB/s", "0", "kills"]


def test_throughput_lost_is_what_was_taken_out():
    """A timeline with known holes: 20 ms of silence in each second are 2 %."""
    second, chance = 1_000_000_000, np.random.default_rng(5)
    ended = 40 * second
    times = np.sort(chance.integers(0, ended, 400_000))
    kills = [Kill(at * second + second // 2, "disk", "KILL", 1, 1.0, 5.0) for at in range(1, 39)]
    for kill in kills:
        times = times[(times < kill.time_ns) | (times > kill.time_ns + 20_000_000)]
    lost = chaos_report._throughput_lost(kills, times, 0, ended)
    assert lost["low"] <= 0.02 <= lost["high"] and abs(lost["share"] - 0.02) < 0.003
    assert lost["high"] - lost["low"] < 0.01
    heard = (times, np.diff(times, prepend=times[0]) // 1000)
    silence = chaos_report._silence(kills[3], kills, [heard], ended)
    assert 20 <= silence <= 22
    assert max(chaos_report._quiet_silences(kills, [heard], 0, ended)) < 5


# --- Against real servers ---------------------------------------------------------------------------------------------

# A file served by nbdkit, one request at a time over all connections. Served in parallel, a read that meets a write of
# the same sector returns a mixture of both, down to 16 bytes: the operating system copies out of the page cache while
# it copies into it. NBD allows that; the load does not expect it, since Atoll reads and writes a block whole.
FILE = ("--filter=noparallel", "file", "serialize=all-requests")

needs_nbdkit = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")


@pytest.fixture
def nbdkit(tmp_path):
    """Starts nbdkit with the given plugin and filters on a Unix socket; returns targets."""

    def start(*arguments: str, path: str | None = None) -> list[Target]:
        path = path or str(tmp_path / f"{len(start.processes)}.sock")
        process = subprocess.Popen(["nbdkit", "-f", "-U", path, *arguments], stderr=subprocess.DEVNULL)
        start.processes.append(process)
        deadline = time.monotonic() + 20
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(path) == 0:
                    return [Target("unix", path, "")]
            time.sleep(0.005)

    start.processes = []
    yield start
    for process in start.processes:
        process.kill()
        process.wait()


def run_worker(targets, seconds, enough, each_turn=None):
    """For so long, and as much longer as a slow machine takes until it was `enough(worker)`."""
    plan = Plan(0, 1, [targets[at % len(targets)] for at in range(3)], 0, 16 * MIB // SECTOR, 8, 50.0, 50.0)
    shared = Shared(1)
    began = time.monotonic()

    class Commands:
        def poll(self):
            if each_turn is not None:
                each_turn(worker)
            passed = time.monotonic() - began
            return passed > seconds and (enough(worker) or passed > 120)

    worker = Worker(plan, shared, Commands())
    return worker.run(), shared.totals()


@needs_nbdkit
def test_a_right_server_is_found_right(nbdkit):
    def enough(worker):
        return worker.shared.totals()["replies"] > 500 and len(worker.report.counts) == 5

    report, totals = run_worker(nbdkit("memory", "32M"), 3.0, enough)
    print(totals, report.counts)
    assert (totals["drops"], totals["errors"], totals["wrong_sectors"], totals["lost_sectors"]) == (0, 0, 0, 0)
    assert set(report.counts) == {"read", "write", "flush", "trim", "write-zeroes"}
    assert totals["replies"] > 500 and len(report.times_ns) == totals["replies"]
    assert totals["checked_bytes"] > 16 * MIB


@needs_nbdkit
def test_errors_are_counted(nbdkit):
    report, totals = run_worker(
        nbdkit("--filter=error", "memory", "32M", "error-pwrite=EIO", "error-pwrite-rate=5%"),
        1.5,
        enough=lambda worker: worker.shared.totals()["errors"] > 0,
    )
    assert totals["errors"] > 0 and any("write: error 5" in trouble.text for trouble in report.troubles)
    assert (totals["wrong_sectors"], totals["lost_sectors"], totals["drops"]) == (0, 0, 0)


@needs_nbdkit
def test_damage_is_found(nbdkit, tmp_path):
    """Somebody else writes behind the server's back."""
    image = tmp_path / "image"
    image.write_bytes(bytes(32 * MIB))
    targets = nbdkit(*FILE, str(image))
    done = []

    def damage(worker):
        if not done and worker.shared.totals()["replies"] > 300:
            with image.open("r+b") as file:
                file.seek(4 * MIB)
                file.write(b"\x11" * MIB)
            done.append(True)

    report, totals = run_worker(targets, 1.5, enough=lambda worker: bool(done), each_turn=damage)
    assert done and totals["wrong_sectors"] > 0 and "wrong content" in report.troubles[0].text
    assert report.wrong_bytes >= 500


@needs_nbdkit
def test_a_server_that_dies_is_noticed(nbdkit, tmp_path):
    """Every connection is counted as dropped and made anew; what was under way is uncertain, not wrong."""
    image = tmp_path / "image"
    image.write_bytes(bytes(32 * MIB))
    targets = nbdkit(*FILE, str(image))
    done = []

    def restart(worker):
        if not done and worker.shared.totals()["replies"] > 300:
            nbdkit.processes[-1].kill()
            nbdkit.processes[-1].wait()
            (tmp_path / "0.sock").unlink()
            done.append(nbdkit(*FILE, str(image), path=str(tmp_path / "0.sock")))

    report, totals = run_worker(targets, 2.0, lambda worker: worker.shared.totals()["drops"] >= 3, restart)
    assert done and totals["drops"] >= 3 and sum(trouble.kind == "drop" for trouble in report.troubles) >= 3
    assert (totals["wrong_sectors"], totals["lost_sectors"], totals["errors"]) == (0, 0, 0)


@needs_nbdkit
def test_churn(nbdkit):
    shared = Shared(1)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=churn, args=(0, nbdkit("memory", "1M"), shared, theirs)
    )
    process.start()
    deadline = time.monotonic() + 20
    while shared.totals()["churns"] < 20:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    ours.send("stop")
    assert ours.poll(20)
    report = ours.recv()
    process.join(10)
    assert report.troubles == [] and len(report.times_ns) >= 20


def test_options_have_sound_defaults(tmp_path):
    options = Options(tmp_path)
    assert options.target == "any" and options.signals == (signal.SIGKILL,)
