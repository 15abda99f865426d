"""How a trace is put together from records of all domains; made-up records, so that each outcome is met."""

from typing import Any

import pytest

from atoll.kernel import cli_trace as trace
from atoll.kernel.cli_trace import Message, Range

NIC, NBD, DEDUP, DISK = 2, 3, 4, 5
BASE = {role: trace.MAP_BASE + role * trace.MAP_STRIDE for role in (NIC, NBD, DEDUP, DISK)}
IDENTITY = 7 << 48 | 3 << 32 | 99
IO = 5 << 32 | 17


class Recorder:
    """What the domains would have recorded."""

    def __init__(self) -> None:
        self.time_ns = 1_000_000
        self.memory: dict[int, bytes] = dict.fromkeys(BASE, b"")

    def send(
        self, source: int, target: int, opcode: int, identity: int, ranges: list[Range], *words: int, flags: int = 0
    ) -> None:
        """One message, recorded by both ends."""
        for domain, peer, direction in ((source, target, 1), (target, source, 0)):
            self.time_ns += 300_000
            for low, high in ranges or [(0, 0)]:
                self.time_ns += 50
                record = (self.time_ns, identity, low, high - low, opcode, peer, direction, flags, *words, 0, 0, 0, 0)
                self.memory[domain] += trace.RECORD.pack(*record[:12])

    def messages(self) -> list[Message]:
        found = [m for role, memory in self.memory.items() for m in trace.parse(trace.ROLES[role], memory)]
        return sorted(found, key=lambda m: m.time_ns)


def write(recorder: Recorder, payload: list[Range], at: int = 8192, volume: int = 4) -> None:
    length = trace.total(payload)
    recorder.send(NIC, NBD, trace.REQUEST, IDENTITY, payload)
    recorder.send(NBD, DEDUP, trace.WRITE, IDENTITY, payload, at, length, volume)
    recorder.send(DEDUP, NBD, trace.DONE, IDENTITY, [])
    recorder.send(NBD, NIC, trace.REPLY, IDENTITY, [(BASE[NBD] + 64, BASE[NBD] + 80)], flags=trace.FLAG_LAST)


def destage(recorder: Recorder, ranges: list[Range]) -> None:
    recorder.send(DEDUP, DISK, trace.IO_WRITE, IO, ranges, 1 << 20)
    recorder.send(DISK, DEDUP, trace.IO_DONE, IO, [])


PAYLOAD = [(BASE[NIC] + 4096, BASE[NIC] + 12288), (BASE[NIC] + 65536, BASE[NIC] + 69632)]


def test_a_write_seen_at_one_place_everywhere() -> None:
    recorder = Recorder()
    write(recorder, PAYLOAD)
    destage(recorder, [(BASE[NIC] + 0, BASE[NIC] + 4096), *PAYLOAD])
    messages = recorder.messages()
    assert trace.requests(messages, trace.WRITE, None) == [IDENTITY]
    assert trace.requests(messages, trace.WRITE, 4) == [IDENTITY]
    assert trace.requests(messages, trace.WRITE, 5) == []
    assert trace.requests(messages, trace.READ, None) == []
    assert trace.answered(messages, IDENTITY)
    assert trace.whole(messages, IDENTITY, trace.WRITE)
    document = trace.write_of(messages, IDENTITY)
    assert document["same_address"] is True
    assert (document["offset"], document["length"], document["volume"]) == (8192, 12288, 4)
    assert [(hop["domain"], hop["message"]) for hop in document["hops"]] == [
        ("nic", "REQUEST"), ("nbd", "REQUEST"), ("nbd", "WRITE"), ("dedup", "WRITE"), ("dedup", "DONE"),
        ("nbd", "DONE"), ("nbd", "REPLY"), ("nic", "REPLY"), ("dedup", "IO_WRITE"), ("disk", "IO_WRITE"),
        ("disk", "IO_DONE"), ("dedup", "IO_DONE"),
    ]  # fmt: skip
    disk = next(hop for hop in document["hops"] if hop["domain"] == "disk")
    assert disk["address"] == PAYLOAD[0][0]
    assert (disk["length"], disk["runs"]) == (12288, 2)


@pytest.mark.parametrize(
    ("written", "note"),
    [
        ([], "has not been written from there"),
        ([(BASE[DEDUP] + 4096, BASE[DEDUP] + 16384)], "has not been written from there"),  # a copy
        ([PAYLOAD[0]], "8192 of 12288 bytes went to the device"),
    ],
)
def test_a_write_that_reached_the_device_from_elsewhere_or_not_at_all(written: list[Range], note: str) -> None:
    recorder = Recorder()
    write(recorder, PAYLOAD)
    if written:
        destage(recorder, written)
    document = trace.write_of(recorder.messages(), IDENTITY)
    assert document["same_address"] is False
    assert note in document["note"]


def test_a_copy_between_nbd_and_dedup_is_found() -> None:
    recorder = Recorder()
    recorder.send(NIC, NBD, trace.REQUEST, IDENTITY, PAYLOAD)
    copy = [(BASE[NBD] + 4096, BASE[NBD] + 4096 + 12288)]
    recorder.send(NBD, DEDUP, trace.WRITE, IDENTITY, copy, 0, 12288, 4)
    destage(recorder, copy)
    document = trace.write_of(recorder.messages(), IDENTITY)
    assert document["same_address"] is False
    assert document["note"] == "nbd and dedup saw different places"


def read(recorder: Recorder, data: list[Range], sent: list[Range]) -> None:
    recorder.send(NIC, NBD, trace.REQUEST, IDENTITY, [])
    recorder.send(NBD, DEDUP, trace.READ, IDENTITY, [], 0, 8192, 4)
    if trace.owner(data[0][0]) == "disk":
        recorder.send(DEDUP, DISK, trace.IO_READ, IO, data)
        recorder.send(DISK, DEDUP, trace.IO_DONE, IO, [])
    recorder.send(DEDUP, NBD, trace.DONE, IDENTITY, data)
    header = (BASE[NBD] + 64, BASE[NBD] + 80)
    recorder.send(NBD, NIC, trace.REPLY, IDENTITY, [header, *sent], flags=trace.FLAG_LAST)


DATA = [(BASE[DISK] + 8192, BASE[DISK] + 16384)]
ELSEWHERE = [(BASE[NBD] + 8192, BASE[NBD] + 16384)]


@pytest.mark.parametrize(
    ("data", "sent", "same", "note"),
    [
        (DATA, DATA, True, ""),
        (DATA, ELSEWHERE, False, "nbd and nic saw different places"),
        ([(BASE[DEDUP] + 8192, BASE[DEDUP] + 16384)], [], False, "a hole, answered as one: there is no data to follow"),
        ([(BASE[NIC] + 8192, BASE[NIC] + 16384)],) * 2 + (True, "answered from memory of nic: the write log, or zeros"),
    ],
)
def test_reads(data: list[Range], sent: list[Range], same: bool, note: str) -> None:
    recorder = Recorder()
    read(recorder, data, sent)
    messages = recorder.messages()
    assert trace.requests(messages, trace.READ, 4) == [IDENTITY]
    assert trace.whole(messages, IDENTITY, trace.READ)
    document = trace.read_of(messages, IDENTITY)
    assert document["same_address"] is same
    assert document["note"] == note
    if note == "":
        assert {hop["domain"] for hop in document["hops"]} == {"nic", "nbd", "dedup", "disk"}
        assert next(hop for hop in document["hops"] if hop["message"] == "REPLY")["address"] == DATA[0][0]


def test_a_request_whose_beginning_was_not_seen_is_passed_over() -> None:
    recorder = Recorder()
    write(recorder, PAYLOAD)
    recorder.memory[NBD] = recorder.memory[NBD][2 * trace.RECORD.size :]  # of REQUEST, two segments
    assert not trace.whole(recorder.messages(), IDENTITY, trace.WRITE)


def test_an_unanswered_request_is_waited_for() -> None:
    recorder = Recorder()
    recorder.send(NBD, NIC, trace.REPLY, IDENTITY, [DATA[0]])  # a part, not the last
    assert not trace.answered(recorder.messages(), IDENTITY)


class Looks:
    """A kernel that is asked for the records again and again."""

    def __init__(self, *looks: dict[int, bytes]) -> None:
        self.looks = list(looks)

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        assert (verb, arguments) == ("trace", {"action": "collect"})
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        entries = {trace.ROLES[role]: {"records": memory, "incarnation": 1} for role, memory in look.items()}
        return {"domains": entries}


def looks(*, lost: bool) -> Looks:
    """A write that goes to the device between two looks, which sees only the second one's client if what was recorded
    meanwhile is `lost`; a second later another one, which is seen."""
    recorder = Recorder()
    write(recorder, PAYLOAD, at=4096)
    first = dict(recorder.memory)
    if lost:
        recorder.memory = dict.fromkeys(BASE, b"")
    recorder.time_ns += trace.DOUBT_NS
    other = [(BASE[NIC] + 1048576, BASE[NIC] + 1060864)]
    recorder.send(NIC, NBD, trace.REQUEST, IDENTITY + 1, other)
    recorder.send(NBD, DEDUP, trace.WRITE, IDENTITY + 1, other, 65536, 12288, 4)
    recorder.send(DEDUP, NBD, trace.DONE, IDENTITY + 1, [])
    recorder.send(NBD, NIC, trace.REPLY, IDENTITY + 1, [(BASE[NBD] + 64, BASE[NBD] + 80)], flags=trace.FLAG_LAST)
    destage(recorder, other)
    return Looks(first, dict(recorder.memory))


@pytest.mark.parametrize(("lost", "offset"), [(True, 65536), (False, 4096)])
def test_a_write_of_which_records_are_lost_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, lost: bool, offset: int
) -> None:
    """Under load they are overwritten before they are seen, which does not say that the device was not written."""
    monkeypatch.setattr(trace, "POLL_S", 0)
    monkeypatch.setattr(trace, "DESTAGE_S", 0.2)
    client: Any = looks(lost=lost)
    document = trace.wait_for(client, "write", None, 20.0)
    assert (document["offset"], document["same_address"]) == (offset, lost)


def test_a_copy_is_told_although_records_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "POLL_S", 0)
    monkeypatch.setattr(trace, "DESTAGE_S", 0.2)
    recorder = Recorder()
    recorder.send(NIC, NBD, trace.REQUEST, IDENTITY, PAYLOAD)
    copy = [(BASE[NBD] + 4096, BASE[NBD] + 4096 + 12288)]
    recorder.send(NBD, DEDUP, trace.WRITE, IDENTITY, copy, 0, 12288, 4)
    recorder.send(NBD, NIC, trace.REPLY, IDENTITY, [(BASE[NBD] + 64, BASE[NBD] + 80)], flags=trace.FLAG_LAST)
    client: Any = Looks(dict(recorder.memory), looks(lost=True).looks[1])
    document = trace.wait_for(client, "write", None, 20.0)
    assert (document["note"], document["same_address"]) == (trace.COPIED, False)


def test_numbers_are_those_of_the_header() -> None:
    from atoll.ipc._ipc import ffi, lib

    assert ffi.sizeof("struct atoll_trace_record") == trace.RECORD.size
    assert (lib.ATOLL_MAP_BASE, lib.ATOLL_MAP_STRIDE) == (trace.MAP_BASE, trace.MAP_STRIDE)
    names: dict[str, Any] = {
        name: getattr(trace, name) for name in ("REQUEST", "PART", "REPLY", "NEXT", "READ", "WRITE")
    }
    names |= {name: getattr(trace, name) for name in ("DONE", "IO_READ", "IO_WRITE", "IO_DONE")}
    for name, value in names.items():
        assert getattr(lib, f"ATOLL_OP_{name}") == value
    assert lib.ATOLL_FLAG_LAST == trace.FLAG_LAST
    for number, role in trace.ROLES.items():
        assert getattr(lib, f"ATOLL_ROLE_{role.upper()}") == number
