"""`atoll bench ring` with small numbers: every case measured, nothing lost, drawn and shown."""

import io
import json
import math
import os
from pathlib import Path

import pytest
from rich.console import Console

from atoll.bench import ring


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    picture = tmp_path_factory.mktemp("bench") / "ring.png"
    return ring.run(0.3, str(picture)), picture


def test_every_case_is_measured(document: tuple[dict, Path]) -> None:
    found, picture = document
    assert json.loads(json.dumps(found)) == found
    batches = {entry["batch"] for entry in found["throughput"] if entry["transport"] == ring.RING}
    assert batches == {1, 8, 32, 256}
    others = {entry["transport"] for entry in found["throughput"]}
    assert others - {ring.DPDK} == {ring.RING, ring.PIPE, ring.SOCKET, ring.QUEUE, ring.PYTHON}
    for entry in found["throughput"]:
        assert entry["lowest"] > 0 and entry["ratio_to_ring"] > 0
    for entry in found["round_trip"]:
        assert 0 < entry["p50_ns"] <= entry["p99_ns"] and not math.isnan(entry["p50_ns"])
    if found["cpus"] > 1:
        trips = {(entry["transport"], entry["placement"], entry["waiting"]) for entry in found["round_trip"]}
        assert {
            (ring.LINE, ring.TWO, "spinning"),
            (ring.RING, ring.TWO, "spinning"),
            (ring.RING, ring.TWO, "sleeping"),
            (ring.RING, ring.SAME, "sleeping"),
        } <= trips
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_processor_is_enough() -> None:
    assert {case.placement for case in ring.cases(1)} == {ring.SAME}
    assert all(case.waiting != "spinning" for case in ring.cases(1))


def test_it_can_be_read(document: tuple[dict, Path]) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(ring.render(document[0]))
    text = console.export_text()
    for word in ("atoll ring", "cache line", "p99", "same core", "Unix socket"):
        assert word in text


def test_a_failing_end_is_an_error_not_a_hang() -> None:
    case = ring.Case("round trip", ring.PIPE, ring.SAME, "sleeping")
    shared = ring.Shared()
    shared.arrived[0] = 1  # the other one is there already
    pid = ring.child(lambda: ring.checked(-5), shared, min(os.sched_getaffinity(0)))
    with pytest.raises(ring.BenchError, match="ended with 1"):
        ring.wait_for([pid], case, 20)
    os.waitpid(pid, 0)
