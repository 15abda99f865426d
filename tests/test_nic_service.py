"""The NIC driver as a process between stand-ins: bytes both ways, parts, negotiation, limits, slow clients, ends."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from nicstage import CLOSE, DEDUP, DISCARD, GREETING, LAST, NBD, PART, READ, WRITE, Stage, pattern

from atoll.drivers import nic
from atoll.ipc._ipc import lib

MIB = 1 << 20


def test_counters_have_names() -> None:
    assert len(nic.COUNTERS) == nic.lib.NIC_COUNTER_COUNT <= lib.ATOLL_COUNTER_COUNT


@pytest.fixture(params=["io_uring", "sockets", "poll"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    engine = "sockets" if request.param == "sockets" else "io_uring"
    with Stage(engine=engine) as made:
        made.config["testing"]["fault"]["nic_poll_in_ring"] = request.param == "poll"
        made.start()
        yield made


@pytest.fixture
def uring_stage() -> Iterator[Stage]:
    with Stage() as made:
        made.start()
        yield made


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_reads_and_writes_of_all_sizes(stage: Stage, kind: str) -> None:
    client = stage.connect(kind)
    sizes = [0, 1, 511, 512, 4095, 4096, 4097, 16384, 65536, 100_000, PART - 1, PART, PART + 1, MIB + 5, 3 * MIB]
    for size in sizes:
        for offset in (0, 1, 4095, 123_457):
            if size:
                client.request(READ, offset, size)
            client.request(WRITE, offset, size)
    stage.settle()
    assert client.results == 4 * (2 * len(sizes) - 1)
    stage.check()
    counters = stage.counters()
    assert counters["requests"] == client.results and counters["bad_message"] == counters["bad_give_back"] == 0
    assert counters["copied_inside_bytes"] < counters["received_bytes"] // 3


def test_many_small_requests_from_many_clients(stage: Stage) -> None:
    clients = [stage.connect(("unix", "tcp")[i % 2]) for i in range(20)]
    for round_ in range(4):
        for index, client in enumerate(clients):
            for i in range(50):
                client.request((READ, WRITE)[(i + index) % 2], (i * 7919 + round_) * 512, (i % 9) * 512 + 512)
        stage.settle()
    assert all(client.results == 200 for client in clients)
    stage.check()
    for client in clients:
        client.close()
    stage.until(lambda: not stage.connections and stage.closed_count == 20)
    stage.give_all_back()
    stage.until(lambda: stage.call("status")["buffer_pages_free"] == stage.call("status")["buffer_pages"], "pages")
    assert stage.call("status")["slots_in_use"] == stage.call("status")["stream_buffers_in_use"] == 0


def test_byte_by_byte(uring_stage: Stage) -> None:
    stage = uring_stage
    client = stage.connect("tcp")
    client.request(WRITE, 5, 100)
    client.request(READ, 3, 50)
    while client.out:
        client.turn(most=1)
        stage.turn()
    stage.settle()
    assert client.results == 2
    assert stage.call("status")["stream_buffers_in_use"] == 0  # an idle connection holds none
    stage.check()


def test_negotiation_one_frame_at_a_time(stage: Stage) -> None:
    stage.framing = lib.ATOLL_FRAMING_CLIENT_FLAGS
    answers: list[dict[str, Any]] = [
        {"framing": lib.ATOLL_FRAMING_OPTION},
        {"header": b"first", "framing": 0},
        {"header": b"second", "framing": 0},
        {"header": b"third", "flags": LAST, "framing": 0},
        {"header": b"go", "framing": lib.ATOLL_FRAMING_REQUEST},
    ]
    stage.on_option = lambda message, data: answers.pop(0)
    client = stage.connect("unix")
    long = bytes(range(256)) * 200  # 51,200 bytes: lie in one run
    options = [(7, b"abc"), (3, long), (99, b"x" * 70_000), (1, b"")]  # the third is longer than what is delivered
    client.out += b"\0\0\0\3" + b"".join(
        b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data for option, data in options
    )
    client.greeting = GREETING + b"firstsecondthirdgo"
    client.request(READ, 0, 100)
    stage.settle()
    assert [data for _, data in stage.log] == [b"", b"abc", long, b"", b""]
    assert [len(header) for header, _ in stage.log] == [4, 16, 16, 16, 16]
    stage.check()


def test_nothing_is_parsed_behind_what_is_no_header(uring_stage: Stage) -> None:
    stage = uring_stage
    seen: list[bytes] = []

    def refuse(message: Any) -> dict[str, Any]:
        seen.append(bytes(message.bytes))
        return {"header": b"sorry", "flags": LAST | CLOSE}

    stage.on_request = refuse
    client = stage.connect("tcp")
    client.out += b"\x12" * 5000
    stage.until(lambda: client.closed)
    assert client.into == b"sorry" and len(seen) == 1
    stage.until(lambda: not stage.connections)
    stage.check()


def test_payload_too_long_comes_without_it_and_is_thrown_away(uring_stage: Stage) -> None:
    stage = uring_stage
    lengths: list[int] = []

    def refuse(message: Any) -> dict[str, Any]:
        lengths.append(message.length)
        cookie = bytes(message.bytes)[8:16]
        return {"header": struct.pack(">II", 0x67446698, 0) + cookie, "flags": LAST | DISCARD}

    stage.on_request = refuse
    client = stage.connect("unix")
    client.request(WRITE, 0, 80 * MIB)
    client.request(WRITE, 0, 10)
    stage.settle()
    assert lengths == [0, 10] and client.results == 2
    stage.check()


def test_discard_in_the_middle_of_a_payload(uring_stage: Stage) -> None:
    stage = uring_stage

    def refuse(message: Any) -> dict[str, Any]:
        cookie = bytes(message.bytes)[8:16]
        return {"header": struct.pack(">II", 0x67446698, 0) + cookie, "flags": LAST | DISCARD}

    stage.on_request = refuse
    client = stage.connect("unix")
    for _ in range(5):
        client.request(WRITE, 77, 2 * MIB)
        client.request(WRITE, 77, 100)
    stage.settle()
    assert client.results == 10
    stage.check()
    assert stage.call("status")["buffer_pages_lent"] == 0


def test_peer_that_closes_in_the_middle(stage: Stage) -> None:
    whole = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 100, 600_000) + pattern(100, 600_000)
    for cut in (0, 1, 27, 28, 29, 5000, 300_000, 500_000):
        client = stage.connect(("unix", "tcp")[cut % 2])
        stage.until(lambda: len(stage.connections) == 1)
        client.out += whole[:cut]
        stage.until(lambda client=client: not client.out)
        client.close()
        stage.clients.remove(client)
        stage.until(lambda: not stage.connections, f"closed after {cut} bytes")
    stage.give_all_back()
    stage.check()
    stage.until(lambda: stage.call("status")["buffer_pages_free"] == stage.call("status")["buffer_pages"], "pages")


def test_peer_that_only_ends_its_half_gets_its_answers(stage: Stage) -> None:
    client = stage.connect("tcp")
    for i in range(20):
        client.request(READ, i * 100, 100_000)
    stage.until(lambda: not client.out and bool(stage.connections), "it is accepted")
    (number,) = stage.connections
    ending = stage.nic_public().ending
    assert ending[number] == 0
    client.socket.shutdown(socket.SHUT_WR)
    stage.until(lambda: client.closed)
    assert client.results == 20 and not client.expected
    assert ending[number] == 1, "nbd can know it"
    stage.until(lambda: stage.call("status")["connections"] == 0, "its number is free")
    again = stage.connect("tcp")
    again.request(READ, 0, 100)
    stage.settle()
    assert stage.connections == {number} and ending[number] == 0
    stage.check()


def test_reply_that_closes_is_sent_whole(stage: Stage) -> None:
    stage.named = False
    stage.on_request = lambda message: {"header": b"bye", "data": (0, PART), "flags": LAST | CLOSE}
    for kind in ("unix", "tcp"):
        client = stage.connect(kind)
        stage.until(lambda client=client: not client.greeting)
        client.raw = True
        for _ in range(10):  # more than is answered: unread bytes must not cut the reply
            client.request(READ, 0, 10)
        stage.until(lambda client=client: client.closed)
        assert client.into == b"bye" + pattern(0, PART)
    stage.until(lambda: not stage.connections and not stage.uses)
    stage.check()


def test_slow_reader_is_dropped_and_holds_up_nobody() -> None:
    with Stage(reply_timeout_s=0.5, requests_per_connection=16) as stage:
        stage.start()
        slow = stage.connect("unix")
        slow.reads = False
        for _ in range(40):
            slow.request(READ, 0, MIB)
        other = stage.connect("unix")
        for i in range(200):
            other.request((READ, WRITE)[i % 2], i * 100, 3000)
        stage.until(lambda: other.results == 200)
        stage.until(lambda: len(stage.connections) == 1, "the slow one is dropped")
        assert stage.counters()["reply_timeouts"] == 1
        stage.check()


@pytest.mark.parametrize(
    ("setting", "sends", "counter"),
    [
        ("handshake_timeout_s", None, "handshake_timeouts"),
        ("payload_timeout_s", 10, "payload_timeouts"),
        ("payload_timeout_s", 5000, "payload_timeouts"),
        ("idle_timeout_s", 0, "idle_timeouts"),
    ],
)
def test_timeouts(setting: str, sends: int | None, counter: str) -> None:
    with Stage(**{"handshake_timeout_s": 600, setting: 0.3}) as stage:  # none waits for another's
        if sends is None:
            stage.framing = lib.ATOLL_FRAMING_CLIENT_FLAGS
        stage.start()
        client = stage.connect("tcp")
        client.out += (struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, 10_000) + bytes(10_000))[: sends or 0]
        begin = time.monotonic()
        stage.until(lambda: client.closed)
        assert time.monotonic() - begin >= 0.25
        assert stage.counters()[counter] == 1
        stage.until(lambda: not stage.connections)
        stage.check()


def test_who_waits_for_nbd_is_not_dropped() -> None:
    """Negotiation has its time; what nbd takes (it may be dead, or slow to start) is not the client's. Nor is that time
    over then: it goes on where it was."""
    with Stage(handshake_timeout_s=1.0) as stage:
        stage.framing = lib.ATOLL_FRAMING_CLIENT_FLAGS
        stage.on_option = lambda message, data: {"framing": lib.ATOLL_FRAMING_OPTION}
        stage.start()
        stage.hold = True
        begin = time.monotonic()
        clients = [stage.connect(kind) for kind in ("unix", "tcp")]
        for said in (b"\0\0\0\3", b""):  # it is nbd's turn at once, and after the client's flags
            stage.until(lambda: stage.sent() == len(clients), "nbd is asked")
            time.sleep(1.2)  # it is the clock that must have passed
            stage.hold = False
            stage.until(lambda: not stage.sent() and not any(client.greeting for client in clients), "answered")
            stage.hold = True
            for client in clients:
                client.out += said
        assert stage.counters()["handshake_timeouts"] == 0
        stage.hold = False
        stage.until(lambda: all(client.closed for client in clients), "who says no more is dropped")
        assert time.monotonic() - begin >= 2 * 1.2 + 1
        assert stage.counters()["handshake_timeouts"] == len(clients)
        stage.until(lambda: not stage.connections)
        stage.check()


def test_more_connections_than_allowed_wait_their_turn() -> None:
    with Stage(max_connections=5) as stage:
        stage.start()
        clients = [stage.connect(("unix", "tcp")[i % 2]) for i in range(12)]
        stage.until(lambda: len(stage.connections) == 5)
        for client in clients:
            client.request(READ, 0, 10)
        for _ in range(12):
            stage.until(lambda: any(c.results and not c.closed for c in clients))
            assert len(stage.connections) <= 5
            done = next(c for c in clients if c.results and not c.closed)
            done.close()
        stage.until(lambda: not stage.connections and stage.closed_count == 12)
        stage.check()


def test_thousand_connections_opened_used_and_abandoned(uring_stage: Stage) -> None:
    stage = uring_stage
    clients = [stage.connect("unix") for _ in range(400)]
    for client in clients:
        client.request(READ, 0, 4096)
    stage.settle()
    assert all(client.results == 1 for client in clients)
    for index, client in enumerate(clients):
        if index % 2:
            with contextlib.suppress(BlockingIOError):
                client.socket.send(b"\x25\x60\x95")
        client.close()
    stage.clients.clear()
    for _ in range(600):
        stage.connect("unix").close()
        stage.clients.clear()
        stage.turn()
    stage.until(lambda: not stage.connections and stage.closed_count >= 400, seconds=60)
    stage.check()
    stage.until(lambda: stage.call("status")["connections"] == 0)


def test_payloads_wait_for_pages() -> None:
    with Stage(buffer_bytes=4 * MIB) as stage:
        stage.take_share = 1.0
        stage.start()
        clients = [stage.connect("unix") for _ in range(12)]
        for client in clients:
            for i in range(2):
                client.request(WRITE, i * 13, MIB)
                client.request(WRITE, i * 13, 700)
        stage.settle()
        assert all(client.results == 4 for client in clients)
        stage.check()
        assert stage.counters()["page_waits"] > 0


def test_bad_messages_change_nothing(uring_stage: Stage) -> None:
    stage = uring_stage
    client = stage.connect("unix")
    client.request(WRITE, 0, 5000)
    stage.settle()
    stage.put(NBD, opcode=lib.ATOLL_OP_REPLY, identity=1 << 63 | 5 << 32 | 1, flags=LAST)
    stage.put(NBD, opcode=lib.ATOLL_OP_REPLY, identity=3 << 32 | 77, flags=LAST)
    stage.put(NBD, opcode=lib.ATOLL_OP_NEXT, identity=0)
    stage.put(NBD, opcode=200, identity=0)
    stage.put(DEDUP, opcode=lib.ATOLL_OP_END, identity=3 << 32 | 77, flags=lib.ATOLL_FLAG_TAKEN)
    stage.put(DEDUP, opcode=lib.ATOLL_OP_GIVE_BACK, segment_count=2, halves=[1 << 30, 4000])
    stage.put(DEDUP, opcode=lib.ATOLL_OP_GIVE_BACK, segment_count=9)
    client.request(READ, 0, 100)
    stage.settle()
    stage.until(lambda: stage.counters()["bad_message"] == 6 and stage.counters()["bad_give_back"] == 2)
    stage.check()


@pytest.mark.parametrize("bad", ["outside", "list", "sum", "long"])
def test_bad_reference_costs_the_connection_only(uring_stage: Stage, bad: str) -> None:
    stage = uring_stage
    fields = {
        "outside": {"address": 0x1000, "length": 10},
        "list": {"address": 0x10, "length": 10, "segment_count": 2},
        "sum": {"address": stage.list_area, "length": 10, "segment_count": 2},
        "long": {"address": stage.pattern_area, "length": 0xFFFFFFFF},
    }[bad]
    stage.named = False
    other = stage.connect("unix")
    bad_client = stage.connect("unix")
    stage.until(lambda: len(stage.connections) == 2)

    def answer(message: Any) -> None:
        slot = int(message.identity) >> 32 & 0xFFFF
        del stage.uses[slot]
        stage.put(NBD, opcode=lib.ATOLL_OP_REPLY, identity=int(message.identity), flags=LAST, **fields)

    stage.on_request = answer
    bad_client.request(READ, 0, 10)
    if bad == "long":  # refused on arrival: nbd has to answer once more
        stage.until(lambda: bad_client.closed)
        assert stage.counters()["bad_message"] == 1
        return
    stage.until(lambda: bad_client.closed and len(stage.connections) == 1)
    stage.on_request = None
    other.request(READ, 0, 10)
    stage.until(lambda: other.results == 1)
    stage.check()


def test_bad_reference_in_a_reply_that_had_to_wait(uring_stage: Stage) -> None:
    """For the end of its request's payload, and more follows: nothing is received for a connection that is gone."""
    stage = uring_stage

    def answer(message: Any) -> None:
        del stage.uses[int(message.identity) >> 32 & 0xFFFF]
        bad = {"address": 0x1000, "length": 10, "flags": LAST | DISCARD}
        stage.put(NBD, opcode=lib.ATOLL_OP_REPLY, identity=int(message.identity), **bad)

    stage.on_request = answer
    for _ in range(5):
        client = stage.connect("unix")
        client.request(WRITE, 0, 33 * MIB)
        client.request(WRITE, 0, MIB)
        stage.until(lambda client=client: client.closed and not stage.connections)
    assert stage.counters()["bad_reference"] == 5
    assert stage.call("status")["stream_buffers_in_use"] == 0
    stage.check()


def test_status_and_connections(stage: Stage) -> None:
    stage.connect("unix")
    client = stage.connect("tcp")
    client.request(READ, 0, 10)
    stage.settle()
    stage.until(lambda: len(stage.connections) == 2)
    status = stage.call("status")
    assert status["connections"] == 2 and status["engine"] == stage.config["nic"]["engine"]
    found = stage.call("connections")["connections"]
    address = client.socket.getsockname()
    assert {each["peer"] for each in found} == {"unix", f"{address[0]}:{address[1]}"}
    assert {each["requests"] for each in found} == {0, 1}


def test_stop_answers_what_is_under_way(stage: Stage) -> None:
    client = stage.connect("tcp")
    stage.until(lambda: len(stage.connections) == 1)
    stage.hold = True
    for i in range(10):
        client.request(READ, i, 1000)
    client.request(READ, 0, 1 << 20)  # dedup is asked for the others, nbd for this
    stage.until(lambda: stage.sent(DEDUP) == 10 and stage.sent() == 1)
    stage.calls.start("nic", {"call": "stop"})
    stage.until(lambda: stage.nic_public().ending[next(iter(stage.connections))])
    assert stage.sent(DEDUP) == 10 and stage.sent() == 1
    stage.hold = False
    deadline = time.monotonic() + 10
    while not (client.closed and stage.is_dead()):
        if client.closed:
            client.socket.close()
        stage.turn()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    assert client.results == 11 and stage.last_status == 0
    (result,) = [each for each in stage.calls.receive() if each.kind == "result"]
    assert result.message["ok"] and result.message["connections_left"] == 0


def test_idle_costs_nothing(stage: Stage) -> None:
    client = stage.connect("unix")
    client.request(READ, 0, 100)
    stage.settle()
    stage.turn()

    def quiet() -> bool:
        before = stage.counters()["turns"]
        time.sleep(0.3)
        return stage.counters()["turns"] - before <= 1

    assert any(quiet() for _ in range(10))
