"""All processes die at once, init too: the next start has every acknowledged write, whatever was under way."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
from libnbd import Libnbd
from recoverykit import LONG, Load, check_all, check_live, check_nothing_left
from serverkit import Server, wait_for

from atoll.ipc import uring

SEED = 3
UNIX = {"transport": "unix", "mortal": True, "size": 32 << 20, "read_percent": 25.0}


def test_all_die_under_load(make_server: Callable[..., Server]) -> None:
    server = make_server().start()
    with Load(server, rate=1500, **UNIX) as load:
        for number in range(2 * LONG):
            server.die()
            server.start()
            assert server.json("status")["adopted"]
            load.goes_on(f"death {number} of all")
            check_all(server)
        server.stop()
        server.start()
        assert not server.json("status")["adopted"]
        load.goes_on("the clean stop")
    check_nothing_left(server)


@pytest.mark.parametrize("pinned", [True, False])
def test_adopted_arenas_are_written_from(make_server: Callable[..., Server], pinned: bool) -> None:
    """What was acknowledged before the death of all reaches the device out of old arenas, by a new init's io_uring."""
    config = {"disk": {"pin_arenas": pinned}, "dedup": {"destage_delay_ms": 60000}}
    server = make_server(config=config).start()
    content = random.Random(SEED).randbytes(1 << 20)
    with Libnbd(server.uri()) as client:
        client.pwrite(content, 0)
    server.die()
    server.start()
    assert server.json("status")["adopted"]
    with Libnbd(server.uri()) as client:
        client.flush()
        assert client.pread(len(content), 0) == content
    counters = server.json("status")["counters"]["disk"]
    assert counters["write_bytes"] >= len(content)
    if pinned and uring_takes_sources():
        assert counters["pinned"] > 0
    else:
        assert counters["pinned"] == 0


def uring_takes_sources() -> bool:
    """Whether this system can do it at all (Linux 6.15, and none of the ways in which io_uring is forbidden)."""
    try:
        handle = uring.create_storage(4, 8)
    except uring.UringError:
        return False
    try:
        return handle.takes_sources
    finally:
        handle.close()


def test_again_while_it_starts(make_server: Callable[..., Server]) -> None:
    """Deaths at chance moments of the start that adopts; nothing is lost by any number of them."""
    chance = random.Random(SEED)
    server = make_server().start()
    with Load(server, **UNIX) as load:
        for _ in range(LONG):
            server.die()
            for _ in range(8):
                server.start(wait=False)
                time.sleep(chance.random() * 1.2)
                server.die()
            server.start()
            load.goes_on("many deaths in a row")
        check_all(server)
    check_nothing_left(server)


def test_init_alone(make_server: Callable[..., Server]) -> None:
    """Its children die with it."""
    server = make_server().start()
    with Load(server, **UNIX) as load:
        for _ in range(2 * LONG):
            assert server.process is not None
            server.note_instance()
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait(10)
            server.process = None
            wait_for("all are gone", lambda: not server.pids(), 10)
            server.start()
            load.goes_on("the death of init")
        check_all(server)
    check_nothing_left(server)


def test_with_writes_on_their_way_to_the_device(make_server: Callable[..., Server]) -> None:
    """Each device write waits 0.2 s before it is done, so that some are under way at each death."""
    fault = {"rules": [{"action": "delay", "kinds": ["write"], "ms": 200, "probability": 0.7}]}
    server = make_server(config={"testing": {"modules": {"disk": "atoll.drivers.fault"}, "fault": fault}}).start()
    with Load(server, rate=1500, **UNIX) as load:
        for number in range(2 * LONG):
            wait_for("writes are under way", lambda: server.json("status")["log"]["runs"] > 0)
            server.die()
            server.start()
            load.goes_on(f"death {number} of all")
            check_live(server)
    check_nothing_left(server)
    with Load(server, rate=1500, **UNIX) as load:
        server.stop()
        server.start()
        load.goes_on("the clean stop")
    check_nothing_left(server)


def test_volumes_are_changed_after_the_death_of_all(make_server: Callable[..., Server]) -> None:
    """The new kernel numbers its calls from the beginning; none is taken for one of the dead."""
    server = make_server().start()
    for name in ("a", "b", "c"):
        server.cli("volume", "create", name, "8MiB")
    for number in range(2):
        server.die()
        server.start()
        for name in ("a", "b", "c"):
            server.cli("volume", "delete", name)
            server.cli("volume", "create", name, f"{16 + number}MiB")
            found = {volume["name"]: volume["size_bytes"] for volume in server.json("volume", "list")}
            assert found[name] == (16 + number) << 20
