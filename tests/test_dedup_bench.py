"""`atoll bench dedup`: the disk model and the workloads by themselves, and small measurements on real servers."""

import contextlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernelkit import alive
from rich.console import Console
from serverkit import ATOLL, wait_for

from atoll.bench import dedup, dedup_show
from atoll.bench.diskmodel import Drive
from atoll.bench.duplicates import BLOCK, IDEDUP_RUNS, PROFILES, Stream, contents
from atoll.bench.workload import REQUEST_MOST, Generated, Images, Scan, Trace, Unshared, Workload, cut
from atoll.kernel import cli
from atoll.kernel.client import Client, ControlError

GIB = 1 << 30


# --- The model ------------------------------------------------------------------------------------------------------


def served(*accesses: tuple[int, int], drive: Drive | None = None) -> Any:
    offsets, lengths = np.array(accesses, np.int64).reshape(-1, 2).T
    return (drive or Drive(GIB)).serve(offsets, lengths)


def test_a_sequence_costs_its_transfer() -> None:
    found = served((0, 1_500_000), (1_500_000, 3_000_000))
    assert found.ms.tolist() == pytest.approx([10, 20]) and not found.seeks.any()


def test_a_gap_on_the_track_passes_below_the_head() -> None:
    drive = Drive(GIB)
    assert drive.track_bytes == pytest.approx(1_250_000, abs=1)
    found = served((0, 4096), (4096 + 200_000, 4096), drive=drive)
    assert found.ms[1] == pytest.approx((200_000 + 4096) / 150_000) and not found.seeks.any()


def test_seeks_have_the_average_of_the_data_sheet() -> None:
    places = np.random.default_rng(1).integers(0, GIB // 4096, 20_000) * 4096
    found = Drive(GIB).serve(places, np.full(len(places), 4096))
    per_access = 8.2 + 60_000 / 7200 / 2 + 4096 / 150_000
    assert found.ms[found.seeks].mean() == pytest.approx(per_access, rel=0.02)
    back = served((0, 4096), (0, 4096))
    assert back.seeks.tolist() == [False, True] and back.ms[1] > 4.16


def test_nothing_takes_no_time() -> None:
    assert served().ms.sum() == 0


# --- Workloads ------------------------------------------------------------------------------------------------------


def consistent(workload: Workload) -> list[bytes]:
    """The blocks of the volume after all writes; requests are whole, within the volume, and of bounded size."""
    blocks = [bytes(BLOCK)] * workload.volume_blocks
    for first, data in workload.writes():
        view = memoryview(data).cast("B")
        assert len(view) % BLOCK == 0 and 0 < len(view) <= REQUEST_MOST * BLOCK
        assert first + len(view) // BLOCK <= workload.volume_blocks
        for at in range(len(view) // BLOCK):
            blocks[first + at] = bytes(view[at * BLOCK : (at + 1) * BLOCK])
    places = workload.places()
    assert places == sorted(places), "by address"
    for first, count in places:
        assert memoryview(workload.data(first, count)).tobytes() == b"".join(blocks[first : first + count])
    data_blocks = [block for block in blocks if any(block)]
    assert workload.scan() == Scan(len(data_blocks), len(set(data_blocks)))
    return blocks


def test_a_generated_workload_is_its_stream_in_requests() -> None:
    stream = Stream(PROFILES["kernels"], 3000, IDEDUP_RUNS)
    workload = Generated(stream, 16.0)
    assert b"".join(consistent(workload)) == contents(np.concatenate(list(stream))).tobytes()
    sizes = [memoryview(data).nbytes // BLOCK for _, data in workload.writes()]
    assert 13 < np.mean(sizes) < 19


def test_images_are_written_as_they_are(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    data = contents(np.arange(1, 60, dtype=np.uint64)).tobytes()
    first.write_bytes(data[:-100])
    second.write_bytes(bytes(7 * BLOCK) + data)
    workload = Images((first, second))
    assert b"".join(consistent(workload)) == data[:-100] + bytes(100 + 7 * BLOCK) + data
    assert workload.scan() == Scan(118, 60), "the last block of the first one ends in zeros"
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        Images((tmp_path / "empty",))


def test_a_trace_is_read(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    lines = ["1 10 p 800 8 W 8 0 aa", "1 10 p 808 8 W 8 0 bb", "2 10 p 816 8 W 8 0 aa"]  # two requests
    lines += ["3 10 p 80 8 R 8 0 zz", "4 10 p 808 8 W 8 0 cc", "5 10 p 80000 8 W 8 0 cc"]
    file.write_text("\n".join(lines) + "\n")
    workload = Trace(file)
    assert [(first, memoryview(data).nbytes // BLOCK) for first, data in workload.writes()] == [
        (0, 2),
        (2, 1),
        (1, 1),
        (3, 1),
    ]
    blocks = consistent(workload)
    assert blocks[0] == blocks[2] and blocks[1] == blocks[3] and len(set(blocks)) == 2
    file.write_text(lines[0] + "\n1 10 p x 8 W 8 0 aa\n")
    with pytest.raises(ValueError, match=r"trace:2: .*'1 10 p x 8"):
        Trace(file)
    file.write_text(lines[3] + "\n")
    with pytest.raises(ValueError, match="no write"):
        Trace(file)


def test_an_unshared_workload_has_the_same_places() -> None:
    workload = Generated(Stream(PROFILES["half"], 2000))
    unshared = Unshared(workload)
    assert len(set(consistent(unshared))) == workload.volume_blocks
    assert unshared.places() == workload.places()


def test_mean_runs_are_counted_within_requests() -> None:
    kind = 1 << 60
    values = np.array([kind | place for place in (5, 6, 7, 3, 4, 8)] + [0, kind | 9], np.uint64)
    tier = np.zeros(8, np.bool_)
    assert dedup.mean_run([(0, 3), (3, 2)], values, tier) == 2.5
    assert dedup.mean_run([(0, 8)], values, tier) == 7 / 3, "a hole ends no run"
    assert dedup.mean_run([(6, 1)], values, tier) == 0.0
    tier[[3, 4]] = True
    assert dedup.mean_run([(0, 8)], values, tier) == 5.0, "what the tier serves ends no run and does not count"


# --- Measurements ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the command, as users call it."""
    plot = tmp_path_factory.mktemp("plot") / "p.png"
    command = [
        ATOLL,
        "bench",
        "dedup",
        "--profile",
        "half",
        "--size",
        "16MiB",
        "--threshold",
        "1",
        "--entries",
        "16384",
    ]
    command += ["--tier", "on", "--tier-threshold", "2"]
    done = subprocess.run([*command, "--json", "--plot", plot], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 2, "progress"
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_a_small_measurement(document: dict[str, Any]) -> None:
    unshared, shared = document["rows"]
    assert unshared["threshold"] == 0 and unshared["saved"] == 0 and unshared["mean_run_blocks"] > 12
    assert shared["tier"] and shared["read_from_tier"] > 0 and not unshared["tier"]
    assert shared["threshold"] == 1 and shared["of_possible"] > 0.97
    assert shared["mean_run_blocks"] < unshared["mean_run_blocks"]
    for row in document["rows"]:
        assert row["scan"]["requests"] == row["random"]["requests"] > 200
        for order in ("scan", "random"):
            assert row[order]["device_reads_per_request"] > 0 and row[order]["model_ms_per_request"] > 0
            assert 0 < row[order]["us"]["p50"] <= row[order]["us"]["p99"]
    assert unshared["random"]["model_seeks_per_request"] > unshared["scan"]["model_seeks_per_request"]


def test_its_server_ends_with_it(tmp_path: Path) -> None:
    run = subprocess.Popen([ATOLL, "bench", "dedup", "--size", "1GiB", "--folder", tmp_path], stderr=subprocess.DEVNULL)

    def init_pid() -> int | None:
        for socket in tmp_path.glob("*/data/control.sock"):
            with contextlib.suppress(ControlError), Client(socket.parent) as client:  # nobody may listen there yet
                return next(row["pid"] for row in client.call("ps")["domains"] if row["role"] == "init")
        return None

    try:
        init = wait_for("its server serves", init_pid)
    finally:
        run.terminate()
        status = run.wait(120)
    assert status == 130 and not alive(init) and list(tmp_path.iterdir()) == []


def test_it_can_be_read(document: dict[str, Any]) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(dedup_show.render(document))
    text = console.export_text()
    for word in ("nothing equal", "threshold", "run read back", "a model, not a measurement"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--profile", "nosuch"), "no profile 'nosuch'"),
        (("--size", "many"), "many"),
        (("--run", "0.5"), "0.5"),
        (("--distance", "afar"), "afar"),
        (("--threshold", "65"), "65"),
        (("--entries", "1000"), "1000"),
        (("--image", "/nosuch"), "/nosuch"),
        (("--trace", "/dev/null"), "/dev/null"),
    ],
)
def test_wrong_options_are_refused(arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "dedup", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_what_comes_back_wrong_is_an_error() -> None:
    operation = dedup.Operation(0, 8192, expected=memoryview(bytes(BLOCK)))
    with pytest.raises(dedup.MeasurementError, match="read at 8192: error 5"):
        dedup.check(operation, dedup.nbd.Reply(1, 5, b""))
    with pytest.raises(dedup.MeasurementError, match="read at 8192: begins with 0x1"):
        dedup.check(operation, dedup.nbd.Reply(1, 0, b"\1" + bytes(BLOCK - 1)))


@pytest.mark.parametrize("blocks", [1, 63, 64, 65, 50_000])
def test_requests_cover_everything_once(blocks: int) -> None:
    places = cut(blocks, 16.0, 3)
    assert [first for first, _ in places] == [0, *(first + count for first, count in places[:-1])]
    sizes = [count for _, count in places]
    assert sum(sizes) == blocks and min(sizes) >= 1 and max(sizes) <= REQUEST_MOST
    assert blocks < 10_000 or 14.5 < np.mean(sizes) < 16.5
