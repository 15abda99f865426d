"""The NIC driver is killed, again and again; its clients see slower replies, and no byte too few, too many or wrong.

The clients check every byte that comes, nbd's stand-in every byte that goes (nicstage.py).
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from sysconfig import get_path
from typing import Any

import pytest
from nicstage import BLOCK, DEDUP, MOST, NIC, PART, READ, WRITE, Stage

from atoll.drivers import nic
from atoll.ipc import crashpoint, physmap, uring
from atoll.ipc._ipc import ffi, lib

ROOT = Path(__file__).resolve().parent.parent
STORES = 200  # incarnations that die after a chosen store
KILLS = int(os.environ.get("ATOLL_TEST_KILLS", "150"))
SIZES = (0, 1, 512, 3000, 4096, 4096, 4096, 16384, 65536, PART, PART + 4097, 1 << 20)


def feed(stage: Stage, chance: random.Random, depth: int) -> None:
    """Each client gets something to do; now and then one leaves and another comes."""
    for client in list(stage.clients):
        while len(client.expected) < depth:
            kind = chance.choice((READ, WRITE))
            size = chance.choice(SIZES)
            offset = chance.choice(
                (chance.randrange(1 << 30), chance.randrange(64) * BLOCK)
            )  # the latter again and again
            client.request(kind, offset, max(size, 1) if kind == READ else size)
        # One that was served: else those that come fill the backlog of a nic that dies before it accepts.
        if client.results and chance.random() < 0.01:
            client.close()
            stage.clients.remove(client)
            stage.connect(chance.choice(("unix", "tcp")))


# However slow the machine is: nobody may be dropped, so nobody's time may be over.
PATIENT = {"handshake_timeout_s": 600, "payload_timeout_s": 600, "reply_timeout_s": 600, "crowded_timeout_s": 600}


def drain(stage: Stage) -> None:
    stage.settle()
    assert not any(client.closed or client.expected for client in stage.clients), "somebody was dropped"
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
    with Stage(seed, buffer_bytes=8 << 20, **PATIENT) as stage:
        stage.remember = 0.5
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

        def answered() -> bool:
            feed(stage, chance, depth)
            return stage.counters()["reads_from_memory"] > 0

        stage.until(answered, "a read is answered from memory")  # few lives are long enough to read a block again
        drain(stage)
        counters = stage.counters()
        print(f"{kills} kills, {counters['recovered_outcomes']} outcomes found by successors")
        print(f"{counters['reads_from_memory']} reads answered from memory")


def test_crash_points() -> None:
    """Each named point of nic is reached, and dying there is noticed by nobody."""
    chance = random.Random(5)
    points = [point for point in crashpoint.points_in(Path(nic.__file__).parent) if point.startswith("nic.")]
    assert len(points) >= 8
    with Stage(5, buffer_bytes=8 << 20, **PATIENT) as stage:
        stage.remember = 0.5
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
            deadline = time.monotonic() + 60
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
    with Stage(handshake_timeout_s=0.1) as stage:  # nbd greets nobody meanwhile, which is not their fault
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
        stage.until(lambda: stage.sent(DEDUP) == 1)
        assert stage.counters()["requests"] == 2, "the third counts when it is answered"
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


def test_an_outcome_that_crashes_nic_twice_costs_its_connection(hooked: tuple[Any, Any]) -> None:
    """The second time while the successor applies it in its recovery."""
    with Stage() as stage:
        stage.service = hooked
        stage.start()
        bad = stage.connect("unix")
        bad.request(READ, 0, 10)
        stage.settle()
        (number,) = stage.connections
        good = stage.connect("tcp")
        stage.until(lambda: len(stage.connections) == 2)
        stage.kill()
        stage.before = lambda lib: lib.nic_poison_receives(number)
        stage.start()
        bad.request(READ, 0, 10)
        for _ in range(2):
            stage.dies()
            assert os.WTERMSIG(stage.last_status) == signal.SIGSEGV
            stage.start(previous_signal=signal.SIGSEGV, wait=False)
        stage.poll(stage.is_serving)
        assert stage.counters()["poisoned"] == 1
        good.request(READ, 0, 5000)
        stage.until(lambda: bad.closed and good.results == 1, "the bad one is dropped, the good one served")
        stage.check()


@pytest.mark.parametrize("straight", [False, True])
def test_a_write_that_crashes_nic_twice_costs_its_connection(hooked: tuple[Any, Any], straight: bool) -> None:
    """While nic posts it: when it has come with its header, and when it was received straight into its pages."""
    with Stage() as stage:
        stage.service, stage.posts = hooked, MOST
        stage.before = lambda lib: lib.nic_poison_posting(0)
        stage.start()
        bad, good = stage.connect("unix"), stage.connect("tcp")
        stage.until(lambda: not bad.greeting and not good.greeting)
        bad.request(WRITE, 0, 16 * BLOCK)
        if straight:
            rest = bad.out[100:]
            del bad.out[100:]
            stage.until(lambda: stage.call("status")["slots_in_use"] == 1)
            bad.out += rest
        for _ in range(2):
            stage.dies()
            assert os.WTERMSIG(stage.last_status) == signal.SIGSEGV
            stage.start(previous_signal=signal.SIGSEGV, wait=False)
        stage.poll(stage.is_serving)
        good.request(READ, 0, 5000)
        stage.until(lambda: bad.closed and good.results == 1, "the bad one is dropped, the good one served")
        assert stage.counters()["poisoned"] == 1 and bad.results == 0
        stage.check()


def test_after_the_death_of_all_only_what_dedup_holds_is_kept() -> None:
    """The arena of an earlier run: connections and slots start anew, pages are dedup's where it says so."""
    with Stage() as stage:
        stage.take_share = 1.0
        stage.start()
        client = stage.connect("unix")
        for size in (4096, 300_000, 1 << 20):
            client.request(WRITE, 77, size)
        stage.settle()
        stage.hold = True
        client.request(READ, 0, 100)
        stage.until(lambda: not client.out)
        stage.kill()
        client.close()
        stage.clients.clear()
        stage.connections.clear()
        stage.uses.clear()
        stage.uring.close()
        stage.uring = uring.create(4096, 8192, lib.ATOLL_CONNECTION_COUNT)
        pages = (16 << 20) // 4096
        held = [page for page in stage.taken_pages[: len(stage.taken_pages) // 2] if page < pages]
        public = ffi.cast("struct atoll_dedup_public *", stage.peers[lib.ATOLL_ROLE_DEDUP].role_area)
        public.held_address = stage.peers[lib.ATOLL_ROLE_DEDUP].role_area + ffi.sizeof("struct atoll_dedup_public")
        public.held_count = pages
        table = ffi.cast("uint8_t *", public.held_address)
        for page in held:
            table[page] = 1
        stage._map(NIC, writable=True)
        physmap.header(NIC).instance += 1
        physmap.header(NIC).serving_ns = 0  # as atoll_arena_adopt does
        # It also empties the rings: what the dead sent is nobody's.
        for peer in (lib.ATOLL_ROLE_NBD, lib.ATOLL_ROLE_DEDUP):
            sent = physmap.header(peer)
            ring = ffi.cast("struct atoll_ring_producer *", physmap.address(peer) + sent.tx_offset[NIC])
            mine = physmap.header(NIC).consumer[peer]
            mine.head = mine.head_committed = ring.tail
        stage._map(NIC, writable=False)
        message = ffi.new("struct atoll_descriptor *")
        for peer in (lib.ATOLL_ROLE_NBD, lib.ATOLL_ROLE_DEDUP):
            while lib.atoll_domain_take(stage.peers[peer].domain, NIC, message):
                pass  # of the earlier run
        stage.taken_pages = held
        stage.hold = False
        stage.start()
        status = stage.call("status")
        assert status["connections"] == status["slots_in_use"] == 0
        client = stage.connect("tcp")
        client.request(WRITE, 1, 5000)
        drain(stage)


# --- At each store ---


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The extension with a hook behind each store of the journal."""
    folder = tmp_path_factory.mktemp("nic")
    names = sorted(path.name for path in (ROOT / "drivers/nic").glob("*.c") if path.stem != "_nic")
    cbuild = load("atoll_cbuild", ROOT / "ipc/cbuild.py")
    sources = [*(f"drivers/nic/{name}" for name in names), *cbuild.DOMAIN_SOURCES, "ipc/uring.c", "tests/c/nic_hook.c"]
    ffi = cbuild.make_ffi(
        "nic_hooked",
        headers=["framing.h", "nic.h", "tests/c/nic_hook.h"],
        sources=sources,
        here=ROOT / "drivers/nic",
        include=["ipc/build_ipc.py"],
    )
    ffi.emit_c_code(str(folder / "nic_hooked.c"))
    command = ["cc", *cbuild.COMPILE_ARGS, "-DATOLL_STORE_HOOK", "-fPIC", "-shared", "-I.", f"-I{get_path('include')}"]
    command += [str(folder / "nic_hooked.c"), *sources, "-luring", "-o", str(folder / "nic_hooked.so")]
    subprocess.run(command, cwd=ROOT, check=True)
    module = load("nic_hooked", folder / "nic_hooked.so")
    return module.ffi, module.lib


@pytest.mark.parametrize("seed", [None, 1])
def test_death_after_each_store(hooked: tuple[Any, Any], seed: int | None) -> None:
    """Incarnation k dies after its k-th store, or after few, chosen by the seed; the clients come and go meanwhile."""
    chance = random.Random(seed or 0)
    with Stage(seed or 0, buffer_bytes=4 << 20, **PATIENT) as stage:
        stage.remember = 0.5
        stage.service = hooked

        def before(lib: Any) -> None:
            stores = stage.incarnation
            if seed is not None:
                stores = random.Random(seed * 100003 + stage.incarnation).choice([3, 5, 8, 13, 21, 34, 55, 89, 610])
            lib.nic_die_after(stores if stage.incarnation < STORES else 1 << 62)

        stage.before = before
        stage.start(wait=False)
        for index in range(5):
            stage.connect(("unix", "tcp")[index % 2])
        deadline = time.monotonic() + 60
        while stage.incarnation < STORES:
            feed(stage, chance, 4)
            stage.turn()
            if stage.is_dead():
                assert os.WTERMSIG(stage.last_status) == signal.SIGKILL
                stage.start(wait=False)
                deadline = time.monotonic() + 60
            assert time.monotonic() < deadline, f"incarnation {stage.incarnation} does not die"
        stage.poll(stage.is_serving)
        drain(stage)
