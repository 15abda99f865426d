"""The NIC driver where much happens at once: more outcomes than one look takes, more endings than one step."""

from __future__ import annotations

import struct
import time
from typing import Any

import pytest
from nicstage import DEDUP, DISCARD, LAST, NBD, NIC, PART, READ, REPLY_MAGIC, REQUEST_MAGIC, WRITE, Client, Stage, Use

from atoll.ipc._ipc import ffi, lib

MIB = 1 << 20
CLIENTS = 64


def taken_requests(stage: Stage) -> dict[int, list[Use]]:
    """Requests that wait for nbd, by connection, in their order."""
    message = ffi.new("struct atoll_descriptor *")
    found: dict[int, list[Use]] = {}
    while lib.atoll_domain_take(stage.peers[NBD].domain, NIC, message):
        header = bytes(message.bytes)
        use = Use(int(message.identity), message.opcode, *struct.unpack_from(">H", header, 6), header[8:16])
        stage.uses[use.identity >> 32 & 0xFFFF] = use
        found.setdefault(use.identity >> 48, []).append(use)
    return found


def test_writes_refused_while_many_receives_are_under_way() -> None:
    """A refusal takes the pages of a part away; bytes of a receive that ended before it belong to them all the same.

    Now and then a turn starts a send and a receive on each of 64 connections, twice as many outcomes as are looked at
    at once. After how many replies that is, is nic's own affair: all are tried.
    """
    with Stage(buffer_bytes=64 * MIB) as stage:
        stage.named = False
        stage.start()
        clients = [stage.connect() for _ in range(CLIENTS)]
        stage.until(lambda: not any(client.greeting for client in clients))
        for reads in range(1, 18):
            stage.hold = True
            before = stage.counters()["received_bytes"]
            first = 28 * (reads + 1) + PART + 20_000
            rest = []
            for client in clients:
                for _ in range(reads):
                    client.request(READ, 0, 100)
                client.request(WRITE, 0, MIB)
                rest.append(client.out[first:])
                del client.out[first:]
            stage.until(lambda: stage.counters()["received_bytes"] == before + first * CLIENTS, "a part and a bit")  # noqa: B023
            stage.until(lambda: stage.sent() == CLIENTS * (reads + 1), "the requests")  # noqa: B023
            stage.pause()
            requests = taken_requests(stage).values()
            for turn in range(reads):
                for uses in requests:
                    uses[turn].length = 100
                    stage._read_part(uses[turn])
            for uses in requests:
                stage.reply(uses[reads], struct.pack(">II", REPLY_MAGIC, 0) + uses[reads].cookie, LAST | DISCARD)
            lib.atoll_domain_commit(stage.peers[NBD].domain)
            for client, more in zip(clients, rest, strict=True):
                client.out += more
                client.turn(100_000)
            stage.go_on()
            stage.hold = False
            stage.settle()
        stage.check()
        assert stage.counters()["bad_message"] == 0


def keeps_pages(stage: Stage) -> None:
    """Starts nic. What clients write stays in the log, and its pages are not given back."""
    stage.take_share = 1.0
    stage._give_back = lambda share: None  # type: ignore[method-assign]
    stage.start()


@pytest.mark.parametrize("end", ["timeout", "stop"])
def test_all_connections_end_at_once(end: str) -> None:
    """Each has a part of 64 pages that lie apart: together they are more words than a step may change."""
    with Stage(payload_timeout_s=4.0, buffer_bytes=384 * MIB) as stage:
        keeps_pages(stage)
        filler = stage.connect()
        for _ in range(384):
            filler.request(WRITE, 0, MIB)
        stage.until(lambda: len(stage.taken_pages) >= 384 * 256 - 300, "all pages are taken")
        apart = [page for page in stage.taken_pages if page % 2]
        for first in range(0, len(apart), 8):
            give_back(stage, apart[first : first + 8])
        lib.atoll_domain_commit(stage.peers[DEDUP].domain)
        clients = [stage.connect() for _ in range(700)]
        for client in clients:
            client.out += struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 1, 0, MIB) + bytes(10)
        stage.until(lambda: stage.counters()["received_bytes"] >= 384 * MIB - 300 * 4096 + 700 * 38, "headers")
        stage.until(lambda: stage.call("status")["buffer_pages_free"] < 49152 - 600 * 64, "pages are in use")
        if end == "stop":
            assert stage.call("stop")["connections_left"] == 0
            return
        stage.pause()
        time.sleep(4.1)  # it is the clock that must have passed when nic looks again
        stage.go_on()
        stage.until(lambda: stage.counters()["payload_timeouts"] >= 700 and len(stage.connections) <= 1, "all are gone")
        stage.check()


def test_who_does_not_read_leaves_slots_and_pages_to_others() -> None:
    """Clients with all the requests they may have outstanding, and none that reads, use up neither slots nor pages."""
    with Stage() as stage:
        stage.start()
        greedy = [stage.connect() for _ in range(40)]
        for client in greedy:
            client.reads = False
            for _ in range(64):
                client.request(READ, 0, PART)
        stage.until(lambda: not any(client.out for client in greedy), "all is sent")
        stage.until(lambda: stage.call("status")["waiting_for_slots"] >= 30, "they wait for a share")
        others = [stage.connect(("unix", "tcp")[number % 2]) for number in range(8)]
        for other in others:
            for _ in range(20):
                other.request(READ, 100, PART)
                other.request(WRITE, 100, 5000)
        stage.until(lambda: all(other.results == 40 for other in others), "others are served", 20)
        stage.kill()
        stage.start()  # the shares are counted anew
        for other in others:
            other.request(READ, 0, PART)
        stage.until(lambda: all(other.results == 41 for other in others), "and by the successor", 20)
        for client in greedy:
            client.reads = True
        stage.settle()
        stage.check()


def give_back(stage: Stage, pages: list[Any]) -> None:
    domain = stage.peers[DEDUP].domain
    stage.poll(lambda: lib.atoll_domain_room(domain, NIC) > 0 or lib.atoll_domain_commit(domain))
    stage.put(DEDUP, opcode=lib.ATOLL_OP_GIVE_BACK, segment_count=len(pages), halves=pages)


def trickle(stage: Stage, clients: list[Any], done: Any, what: str) -> None:
    """Each client sends a byte now and then, so that none has ever been silent for long."""
    last = 0.0

    def turn() -> bool:
        nonlocal last
        if time.monotonic() - last > 0.1:
            last = time.monotonic()
            for client in clients:
                if not client.closed:
                    client.out += b"x"
        return bool(done())

    stage.until(turn, what, 30)


def test_a_part_that_trickles_in_has_its_time_and_no_more() -> None:
    """Bytes come all the time, so there is never a pause; but 100,000 bytes have two times the payload's time-out."""
    with Stage(payload_timeout_s=1.5) as stage:
        stage.start()
        slow = stage.connect("tcp")
        slow.out += struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 1, 0, 100_000)
        begin = time.monotonic()
        trickle(stage, [slow], lambda: slow.closed, "it is dropped")
        assert time.monotonic() - begin >= 2.95
        assert stage.counters()["payload_timeouts"] == 1
        stage.check()


def test_trickling_writers_do_not_keep_the_pages_from_others() -> None:
    """More of them than there are pages for. Those who wait get theirs long before the payload's time-out; a slow
    writer that moves as much as it must is not dropped."""
    with Stage(payload_timeout_s=20.0, crowded_timeout_s=2.0) as stage:  # 16 MiB of pages: 64 parts
        stage.take_share = 0.0
        stage.start()
        honest = stage.connect("tcp")
        honest.request(WRITE, 0, PART)
        rest = bytes(honest.out[28:])
        del honest.out[28:]
        stage.until(lambda: not honest.out and not honest.greeting, "the honest one has its pages")
        begin, honest_sent = time.monotonic(), [0]
        slow = [stage.connect("unix") for _ in range(63)]
        for client in slow:
            client.out += struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 1, 0, PART)
        stage.until(lambda: stage.call("status")["buffer_pages_free"] < 64, "the pages are in use")
        others = [stage.connect("tcp") for _ in range(4)]
        for client in others:
            for _ in range(3):
                client.request(WRITE, 4096, PART)
        fed = 0

        def done() -> bool:
            nonlocal fed
            fed = min(len(rest), int((time.monotonic() - begin) * 10_000))  # three times what it must
            honest.out += rest[honest_sent[0] : fed]
            honest_sent[0] = fed
            return all(client.results == 3 for client in others)

        trickle(stage, slow, done, "others are served")
        assert stage.counters()["payload_timeouts"] > 0 and not honest.closed
        honest.out += rest[honest_sent[0] :]
        stage.until(lambda: honest.results == 1, "the honest one too")
        stage.check()


def test_unread_replies_do_not_keep_large_reads_from_others() -> None:
    """As many connections with one unread part each as fill what is kept for those without any: others go on before the
    reply's time-out."""
    with Stage(reply_timeout_s=30.0, crowded_timeout_s=2.0) as stage:
        stage.start()
        deaf = [stage.connect() for _ in range(220)]
        for client in deaf:
            client.reads = False
            for _ in range(4):
                client.request(READ, 0, PART)
        stage.until(lambda: not any(client.out for client in deaf), "all is sent")
        # Half of the cache's 16,384 pages, and half as many again for those without any, at 64 pages each. On a slow
        # machine some of the deaf may have waited so long for the others that these are gone by now.
        stage.until(
            lambda: stage.call("status")["slots_in_use"] >= 192 or stage.counters()["reply_timeouts"] > 0,
            "nothing is left for anybody",
        )
        others = [stage.connect("tcp") for _ in range(4)]
        for client in others:
            client.request(READ, 0, PART)
        stage.until(lambda: all(client.results == 1 for client in others), "others are served", 25)
        assert stage.counters()["reply_timeouts"] > 0
        stage.check()


@pytest.mark.parametrize(("kind", "stopped_s"), [("unix", 4.3), ("tcp", 4.3), ("unix", 7.0)])
def test_who_was_in_time_is_not_dropped_by_a_nic_that_was_stopped(kind: str, stopped_s: float) -> None:
    """Clients go on while nic does not run (a container that is paused); what they did shows in their sockets only."""
    with Stage(payload_timeout_s=4.0, reply_timeout_s=4.0) as stage:
        stage.start()
        clients = [stage.connect(kind) for _ in range(80)]
        writers, readers = clients[:70], clients[70:]
        stage.until(lambda: not any(client.greeting for client in clients))
        for client in readers:
            client.reads = False
            for _ in range(8):
                client.request(READ, 0, MIB)
        rests = []
        for client in writers:
            client.request(WRITE, 0, 60_000)
            rests.append(client.out[30_000:])
            del client.out[30_000:]
        received = 70 * 30_000 + 10 * 8 * 28
        stage.until(lambda: stage.counters()["received_bytes"] >= received, "what comes before")
        stage.pause()
        for client, rest in zip(writers, rests, strict=True):
            client.out += rest
        for client in clients:
            client.reads = True
            client.turn()
        time.sleep(stopped_s)  # it is the clock that must have passed when nic looks again
        stage.go_on()
        stage.settle()
        assert not any(client.closed for client in clients)
        counters = stage.counters()
        assert (counters["payload_timeouts"], counters["reply_timeouts"]) == (0, 0)
        stage.check()


def takes_all_pages(stage: Stage) -> Client:
    """Starts nic. What this client writes stays in the log, and there is no page for anybody else."""
    keeps_pages(stage)
    writer = stage.connect()
    for _ in range(16):
        writer.request(WRITE, 0, MIB)
    stage.until(lambda: not writer.expected, "all pages are taken")
    return writer


def test_options_that_want_a_run_of_pages_hold_up_nobody() -> None:
    """Where free pages lie apart (log pages that stay) there is no run for a long while, but pages for all others."""
    with Stage(handshake_timeout_s=600) as stage:
        writer = takes_all_pages(stage)
        apart = [page for page in stage.taken_pages if page % 16]
        for first in range(0, len(apart), 8):
            give_back(stage, apart[first : first + 8])
        lib.atoll_domain_commit(stage.peers[DEDUP].domain)
        stage.taken_pages = [page for page in stage.taken_pages if page % 16 == 0]
        stage.until(lambda: stage.call("status")["buffer_pages_free"] == 3840, "15 of each 16 are free")
        stage.on_option = lambda message, data: {"framing": 0}
        framing, stage.framing = stage.framing, lib.ATOLL_FRAMING_OPTION
        for _ in range(3):
            stage.connect().out += b"IHAVEOPT" + struct.pack(">II", 3, 60_000) + bytes(60_000)
        stage.until(lambda: stage.counters()["page_waits"] >= 3, "they wait")
        stage.framing = framing
        others = [writer, stage.connect(), stage.connect()]
        for client in others:
            client.request(WRITE, 0, MIB)
            for _ in range(10):
                client.request(WRITE, 8192, 4096)
        stage.until(lambda: not any(client.expected for client in others), "the others")
        assert not stage.log and stage.counters()["handshake_timeouts"] == 0
        Stage._give_back(stage, 2.0)
        lib.atoll_domain_commit(stage.peers[DEDUP].domain)
        stage.until(lambda: len(stage.log) == 3, "now there are runs")
        assert [len(data) for _, data in stage.log] == [60_000] * 3
        stage.check()


def test_who_negotiates_while_all_pages_are_taken_is_not_dropped() -> None:
    """A slow or full device keeps the log's pages. Who sends a long option then waits, as those do who write."""
    with Stage(handshake_timeout_s=1.0) as stage:
        takes_all_pages(stage)
        stage.on_option = lambda message, data: {"framing": lib.ATOLL_FRAMING_OPTION}
        stage.framing = lib.ATOLL_FRAMING_OPTION
        client = stage.connect()
        client.out += b"IHAVEOPT" + struct.pack(">II", 7, 513) + bytes(512)  # the last byte comes later
        stage.until(lambda: stage.counters()["page_waits"] == 1, "it waits")
        time.sleep(1.5)  # it is the clock that must have passed
        assert not client.closed and stage.counters()["handshake_timeouts"] == 0
        Stage._give_back(stage, 2.0)
        lib.atoll_domain_commit(stage.peers[DEDUP].domain)
        stage.until(lambda: stage.call("status")["waiting_for_pages"] == 0, "it has its page")
        assert not client.closed and not stage.log
        client.out += bytes(1)
        stage.until(lambda: len(stage.log) == 1, "it is heard")
        stage.until(lambda: client.closed, "who says no more is dropped")
        assert stage.counters()["handshake_timeouts"] == 1
        stage.check()


def test_who_only_negotiates_and_reads_needs_no_page() -> None:
    """A dead or full device may keep all pages for as long as it is so: reads would do, and clients get that far."""
    with Stage() as stage:
        takes_all_pages(stage)
        framings = iter([lib.ATOLL_FRAMING_OPTION] * 2 + [lib.ATOLL_FRAMING_REQUEST])
        stage.on_option = lambda message, data: {"framing": next(framings)}
        stage.framing = lib.ATOLL_FRAMING_OPTION
        client = stage.connect()
        options = [stage.random.randbytes(length) for length in (512, 1, 300)]
        client.out += b"".join(b"IHAVEOPT" + struct.pack(">II", 10, len(data)) + data for data in options[:2])
        stage.until(lambda: len(stage.log) == 2, "two options are heard")
        client.out += b"IHAVEOPT" + struct.pack(">II", 7, 300) + options[2][:150]
        stage.until(lambda: not client.out, "half of an option is sent")
        stage.check()
        stage.kill()
        stage.start(previous_signal=9)
        client.out += options[2][150:]
        client.request(READ, 4096, MIB)
        stage.until(lambda: client.results == 1, "it reads")
        assert [data for _, data in stage.log] == options
        assert stage.counters()["page_waits"] == 0
        stage.check()
