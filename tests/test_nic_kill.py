"""The NIC driver is killed, again and again; its clients see slower replies, and no byte too few, too many or wrong.

The clients check every byte that comes, nbd's stand-in every byte that goes (nicstage.py).
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from nicstage import NIC, PART, READ, WRITE, Stage

from atoll.drivers import nic
from atoll.ipc import crashpoint, physmap
from atoll.ipc._ipc import lib

KILLS = int(os.environ.get("ATOLL_TEST_KILLS", "150"))
SIZES = (0, 1, 512, 3000, 4096, 4096, 4096, 16384, 65536, PART, PART + 4097, 1 << 20)


def feed(stage: Stage, chance: random.Random, depth: int) -> None:
    """Each client gets something to do; now and then one leaves and another comes."""
    for client in list(stage.clients):
        while len(client.expected) < depth:
            kind = chance.choice((READ, WRITE))
            size = chance.choice(SIZES)
            client.request(kind, chance.randrange(1 << 30), max(size, 1) if kind == READ else size)
        if chance.random() < 0.01:
            client.close()
            stage.clients.remove(client)
            stage.connect(chance.choice(("unix", "tcp")))


def drain(stage: Stage) -> None:
    stage.settle()
    stage.check()
    stage.give_all_back()
    for client in stage.clients:
        client.close()
    stage.clients.clear()
    stage.until(lambda: not stage.connections and not stage.uses, "all connections end")
    stage.until(
        lambda: (
            (status := stage.call("status"))["buffer_pages_free"] == status["buffer_pages"]
            and status["slots_in_use"] == status["connections"] == status["stream_buffers_in_use"] == 0
        ),
        "nothing is left behind",
    )
    counters = stage.counters()
    assert counters["bad_message"] == counters["bad_give_back"] == counters["bad_reference"] == 0
    assert counters["lost_messages"] == 0


@pytest.mark.parametrize("mode", ["descriptors", "poll"])
@pytest.mark.parametrize(("clients", "depth"), [(1, 1), (2, 16), (12, 4)])
def test_kills_at_random(clients: int, depth: int, mode: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with Stage(seed, buffer_bytes=8 << 20) as stage:
        stage.config["testing"]["fault"]["nic_poll_in_ring"] = mode == "poll"
        stage.start()
        for index in range(clients):
            stage.connect(("unix", "tcp")[index % 2])
        kills = KILLS // 2 if mode == "poll" else KILLS
        for _ in range(kills):
            until = time.monotonic() + chance.choice((0.0005, 0.003, 0.01)) * chance.random()
            while time.monotonic() < until:
                feed(stage, chance, depth)
                stage.turn()
            stage.kill()
            if chance.random() < 0.5:  # what nbd sends while nobody listens
                stage.turn()
            stage.start(wait=chance.random() < 0.7)
        stage.poll(stage.is_serving)
        drain(stage)
        print(f"{kills} kills, {stage.counters()['recovered_outcomes']} outcomes found by successors")


def test_crash_points() -> None:
    """Each named point of nic is reached, and dying there is noticed by nobody."""
    chance = random.Random(5)
    points = [point for point in crashpoint.points_in(Path(nic.__file__).parent) if point.startswith("nic.")]
    assert len(points) >= 8
    with Stage(5, buffer_bytes=8 << 20) as stage:
        stage.start()
        for index in range(4):
            stage.connect(("unix", "tcp")[index % 2])
        reached = set()
        kernel = physmap.header(lib.ATOLL_ROLE_KERNEL)
        for point in points * 3:
            kernel.crash_sequence += 1
            kernel.crash_point = crashpoint.point_hash(point)
            if "recover" in point:
                stage.kill()
                stage.start(wait=False)
            deadline = time.monotonic() + 10
            while not stage.is_dead():
                feed(stage, chance, 4)
                stage.turn()
                assert time.monotonic() < deadline, f"{point} is not reached"
            assert os.WTERMSIG(stage.last_status) == signal.SIGKILL
            reached.add(point)
            stage.start()
            kernel.crash_point = 0
        assert reached == set(points)
        drain(stage)


def test_kill_between_accept_and_first_byte() -> None:
    with Stage() as stage:
        stage.start()
        for index in range(60):
            client = stage.connect(("unix", "tcp")[index % 2])
            client.request(READ, index, 100)
            stage.kill()
            stage.start(wait=False)
        stage.poll(stage.is_serving)
        stage.settle()
        assert all(client.results == 1 for client in stage.clients)
        drain(stage)


def test_without_io_uring_a_kill_drops_connections_and_nothing_else() -> None:
    with Stage(engine="sockets") as stage:
        stage.start()
        for _ in range(20):
            clients = [stage.connect(kind) for kind in ("unix", "tcp")]
            for client in clients:
                for size in (100, 5000, 400_000):
                    client.request(WRITE, 7, size)
                    client.request(READ, 7, size)
            for _ in range(5):
                stage.turn()
            stage.kill()
            stage.start()
            stage.until(lambda: all(client.closed or not client.expected for client in stage.clients), "dropped")
            for client in clients:  # one may have been accepted by the successor only
                client.close()
            stage.clients.clear()
        stage.until(lambda: not stage.connections and not stage.uses)
        client = stage.connect("tcp")
        client.request(READ, 0, 5000)
        drain(stage)


def test_a_request_that_crashes_nic_twice_costs_its_connection() -> None:
    with Stage() as stage:
        stage.start()
        bad, good = stage.connect("unix"), stage.connect("unix")
        good.request(READ, 0, 10)
        bad.request(READ, 0, 10)
        stage.settle()
        stage.hold = True
        bad.request(READ, 0, 10)
        stage.until(lambda: stage.counters()["requests"] == 3)
        message = stage.peers[lib.ATOLL_ROLE_NBD]
        assert lib.atoll_domain_pending(message.domain, NIC) == 1
        stage.kill()
        for expected in (0, 1):
            # What a crash during the request would have left.
            area = physmap.address(NIC)
            stage._map(NIC, writable=True)
            connection = next(i for i in stage.connections)
            physmap.header(NIC).current = connection << 48 | 1 << 32 | 99
            stage._map(NIC, writable=False)
            assert area
            stage.start(previous_signal=signal.SIGSEGV)
            assert stage.counters()["poisoned"] == expected
            if expected == 0:
                stage.kill()
        stage.hold = False
        stage.until(lambda: len(stage.connections) == 1)
        stage.check()
