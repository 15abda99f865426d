"""Posted writes in the whole server: dedup is held while clients are answered, then things happen to everybody."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest
from nbdclient import Command, CommandFlag, Connection, ErrorCode
from recoverykit import Eyes, check_all, check_nothing_left, send
from serverkit import Server, wait_for

from atoll.drivers import nic
from atoll.ipc import objects
from atoll.ipc._ipc import lib

BLOCK = 4096
COUNTERS_AT = 8192  # in an arena
MOST = lib.ATOLL_POSTED_BLOCKS


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Iterator[Server]:
    yield make_server(config={"kernel": {"hang_s": 60.0}}).start()


def connected(server: Server) -> Connection:
    connection = Connection.open(str(server.socket), timeout_s=60)
    connection.negotiate("disk")
    return connection


def held(server: Server, connection: Connection) -> int:
    """Stops dedup once it lets writes be posted; its process id."""

    def posts() -> bool:
        connection.write(0, bytes(BLOCK))
        return posted(server) > 0

    wait_for("writes are posted", posts)
    connection.flush()
    with Eyes(server) as eyes:
        pid = eyes.pid("dedup")
        send(pid, signal.SIGSTOP)
    return pid


def posted(server: Server) -> int:
    """Writes that nic has answered, as its arena says: whoever is held, nobody need answer."""
    (instance,) = server.instances
    descriptor = objects.open_read_only(objects.arena_name(int(instance, 16), "nic"))
    try:
        return int.from_bytes(os.pread(descriptor, 8, COUNTERS_AT + 8 * nic.COUNTERS.index("posted")), "little")
    finally:
        os.close(descriptor)


def block(text: str) -> bytes:
    return text.encode().ljust(BLOCK, b".")


def test_answered_while_dedup_is_held(server: Server) -> None:
    with connected(server) as one, connected(server) as other:
        pid = held(server, one)
        for number in range(MOST // 2):
            one.write(number * BLOCK, block(f"first {number}"))
        one.write(5 * BLOCK, block("second 5"))
        reads = [other.submit(Command.READ, number * BLOCK, BLOCK) for number in (5, 6, MOST // 2 - 1)]
        flush = other.submit(Command.FLUSH)
        late = [one.submit(Command.WRITE, (MOST + number) * BLOCK, payload=block("late")) for number in range(160)]
        for cookie in late[:120]:
            one.wait(cookie).check()
        wait_for("as many are posted as there may be", lambda: posted(server) >= MOST - 2)
        send(pid, signal.SIGCONT)
        assert other.wait(reads[0]).check().data == block("second 5")
        assert other.wait(reads[1]).check().data == block("first 6")
        assert other.wait(reads[2]).check().data == block(f"first {MOST // 2 - 1}")
        other.wait(flush).check()
        for cookie in late[120:]:
            one.wait(cookie).check()
    check_all(server)
    check_nothing_left(server)


@pytest.mark.parametrize("victims", [("dedup",), ("nbd", "nic"), ("kernel", "dedup"), ("dedup", "nbd", "nic", "disk")])
def test_kept_over_the_death_of(server: Server, victims: tuple[str, ...]) -> None:
    with connected(server) as connection:
        held(server, connection)
        for number in range(100):
            connection.write(number % 60 * BLOCK, block(f"write {number}"))
        with Eyes(server) as eyes:
            # The stopped one, too: it would not end by itself.
            before = eyes.kill("dedup", *(victim for victim in victims if victim != "dedup"))
            eyes.wait_serving(before)
        for number in range(40, 100):
            assert connection.read(number % 60 * BLOCK, BLOCK) == block(f"write {number}")
        connection.flush()
    check_all(server)
    check_nothing_left(server)


@pytest.mark.parametrize("deaths", [1, 3])
def test_kept_over_the_death_of_all(server: Server, deaths: int) -> None:
    """None of them was applied when all died; the next start, or the one after that, applies each once, in order."""
    with connected(server) as connection:
        held(server, connection)
        for number in range(120):
            connection.write(number % 60 * BLOCK, block(f"write {number}"))
        connection.write(100 * BLOCK, b"".join(block(f"long {number}") for number in range(8)))
    for _ in range(deaths):
        server.die()
        server.start()
    assert server.json("status")["adopted"]
    if deaths == 1:
        assert int(server.json("status")["counters"]["dedup"]["posted_adopted"]) == 121
    with connected(server) as connection:
        for number in range(60, 120):
            assert connection.read(number % 60 * BLOCK, BLOCK) == block(f"write {number}")
        assert connection.read(100 * BLOCK, 8 * BLOCK) == b"".join(block(f"long {number}") for number in range(8))
        for number in range(60):
            connection.write(number * BLOCK, block(f"newer {number}"))
        check_all(server)
    server.die()
    server.start()
    with connected(server) as connection:
        for number in range(60):
            assert connection.read(number * BLOCK, BLOCK) == block(f"newer {number}"), "nothing is applied again"
    check_all(server)
    check_nothing_left(server)


def test_applied_and_not_ended_is_not_applied_again(server: Server) -> None:
    """nic is held: dedup has applied all, nic has heard of no end. After the death of all they are where they were."""
    with connected(server) as connection:
        held_pid = held(server, connection)
        before = posted(server)
        for number in range(60):
            connection.write(number % 30 * BLOCK, block(f"write {number}"))
        assert posted(server) == before + 60
        with Eyes(server) as eyes:
            send(eyes.pid("nic"), signal.SIGSTOP)
        send(held_pid, signal.SIGCONT)

        def applied() -> bool:
            counters = server.json("status")["counters"]["dedup"]
            return int(counters["destaged_blocks"]) + int(counters["shared_blocks"]) >= 30

        wait_for("dedup has applied and destaged them", applied)
    server.die()
    server.start()
    assert int(server.json("status")["counters"]["dedup"]["posted_adopted"]) == 0
    with connected(server) as connection:
        for number in range(30, 60):
            assert connection.read(number % 30 * BLOCK, BLOCK) == block(f"write {number}")
    check_all(server)
    check_nothing_left(server)


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGKILL])
def test_a_clean_stop_takes_along_what_dedup_has_not_applied(server: Server, number: signal.Signals) -> None:
    """dedup is held until nic has ended; it, or its successor, told to stop, finds the writes in its ring."""
    with connected(server) as connection:
        pid = held(server, connection)
        with Eyes(server) as eyes:
            first = eyes.pid("nic")
        for index in range(60):
            connection.write(index * BLOCK, block(f"write {index}"))
        stop = threading.Thread(target=server.stop)
        stop.start()
        wait_for("nic has ended", lambda: not psutil.pid_exists(first))
        send(pid, number)
        stop.join()
    server.start()
    assert not server.json("status")["adopted"]
    with connected(server) as connection:
        for index in range(60):
            assert connection.read(index * BLOCK, BLOCK) == block(f"write {index}")
    check_all(server)
    check_nothing_left(server)


def test_a_full_store_refuses_what_it_cannot_keep(make_server: Callable[..., Server]) -> None:
    """Near the end nothing is posted: each write that is answered has its place, and the first without is told so."""
    server = make_server(config={"device_size": "128MiB", "volumes": [{"name": "disk", "size": "1GiB"}]}).start()
    with connected(server) as connection:
        kept = []
        for number in range(128 << 20 >> 16):
            data = b"".join(block(f"unique {number} {index}") for index in range(16))
            result = connection.wait(connection.submit(Command.WRITE, number << 16, payload=data))
            if result.error is not None:
                assert result.error.code == ErrorCode.ENOSPC
                break
            kept.append(number)
        counters = server.json("status")["counters"]
        assert 0 < int(counters["nic"]["posted"]) < len(kept) and int(counters["dedup"]["posted_lost"]) == 0
        connection.flush()
        assert len(kept) > 1000
        for number in kept:
            assert connection.read(number << 16, BLOCK) == block(f"unique {number} 0")
        connection.trim(0, 2000 * BLOCK)
        connection.flush()
        connection.write(0, block("room again"), flags=CommandFlag.FUA)
    check_all(server)
    check_nothing_left(server)
