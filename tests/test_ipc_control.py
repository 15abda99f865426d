"""Control messages and crash points: status, msgpack, calls between a kernel and a domain that dies at chosen
points."""

import ctypes
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ipc_support import Instance, instance, until

from atoll.ipc import message, physmap, rolelock
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.calls import CallBusy, CallClient, Received
from atoll.ipc.crashpoint import point_hash, points_in
from atoll.ipc.roles import Role
from atoll.ipc.runtime import CallError, Context, Deferred, DomainError, start_time
from atoll.ipc.status import Status

ROOT = Path(__file__).resolve().parent.parent
RINGS = {Role.KERNEL: [Role.DEDUP], Role.DEDUP: [Role.KERNEL]}

# --- Status, messages ---


def test_status_is_total_and_as_in_c() -> None:
    for status in Status:
        assert getattr(lib, f"ATOLL_{status.name}") == status
        assert status.text
        assert status.errno in errno.errorcode or status is Status.OK
    assert Status.of(4) is Status.ENOSPC and Status.of(60000) is Status.EIO


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "v"), VALUES, max_size=6))
def test_messages_come_back(content: dict[str, Any]) -> None:
    assert message.decode(message.encode(content)) == content


@given(st.binary(max_size=300))
def test_garbage_is_a_message_error(data: bytes) -> None:
    try:
        assert isinstance(message.decode(data), dict)
    except message.MessageError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not a msgpack message"),
        (b"\x93\x01\x02\x03", "a map with text keys, not list"),
        (b"\x80", "version None"),
        (b"\x81\xa1v\x09", "version 9; this program speaks version 1"),
        (b"\x81\x01\x02", "not allowed for map key"),
        (bytes(300_000), "at most 262144 are accepted"),
    ],
)
def test_a_bad_message_is_refused_with_its_reason(data: bytes, text: str) -> None:
    with pytest.raises(message.MessageError, match=text):
        message.decode(data)


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(message.MessageError, match="cannot be sent"):
        message.encode({"x": object()})
    with pytest.raises(message.MessageError, match="at most 100 can be sent"):
        message.encode({"x": "y" * 200}, 100)


# --- Calls ---


class Kernel:
    """The kernel, played by the test's own process."""

    def __init__(self, made: Instance) -> None:
        made.map_all(writable=Role.KERNEL)
        self.made = made
        self.incarnation = 0
        self.domain_incarnation = 0
        self.restart()

    def restart(self) -> None:
        """As its successor would find it."""
        self.incarnation += 1
        self.domain = self.made.open(Role.KERNEL, self.incarnation)
        self.client = CallClient(self.domain)
        lib.atoll_domain_serving(self.domain)

    def results(self, count: int = 1) -> list[Received]:
        found: list[Received] = []

        def take() -> bool:
            found.extend(self.client.receive())
            return len(found) >= count

        until(take, f"{count} messages to the kernel")
        return found

    def arm(self, name: str) -> None:
        header = self.domain.self
        header.crash_sequence += 1
        header.crash_point = point_hash(name)

    def start_domain(self, main: Callable[[Context], None]) -> int:
        self.domain_incarnation += 1
        incarnation = self.domain_incarnation

        def run() -> None:
            rolelock.acquire(Role.DEDUP, 30)
            context = Context(
                "dedup", incarnation, incarnation == 1, False, 0, {"kernel": {}}, dict(self.made.bytes), [], -1, None
            )
            context.open(os.getpid())
            context.serving()
            main(context)
            context.stopped()

        pid = self.made.play(Role.DEDUP, run)
        until(lambda: physmap.header(Role.DEDUP).incarnation == incarnation, "the takeover")
        return pid


def loop(context: Context, handlers: dict[str, Callable[..., Any]]) -> None:
    while not context.stopping:
        lib.atoll_domain_sleep(context.domain, 0, -1)
        context.serve_control(handlers)


def count_calls(context: Context) -> dict[str, Callable[..., Any]]:
    """A handler that counts, transactionally, how often it was carried out."""
    word = ffi.cast("uint64_t *", context.role_area)

    def add(call: dict[str, Any]) -> dict[str, Any]:
        if call["amount"] < 0:
            raise CallError("cannot add less than nothing")
        lib.atoll_domain_set64(context.domain, word, word[0] + call["amount"])
        return {"sum": word[0]}

    return {"add": add, "large": lambda call: {"text": "x" * call["bytes"]}, "bug": lambda call: {}["missing"]}


@pytest.fixture
def kernel():
    with instance(RINGS) as made:
        yield Kernel(made)


def serve(context: Context) -> None:
    loop(context, count_calls(context))


def test_calls_results_and_refusals(kernel: Kernel) -> None:
    pid = kernel.start_domain(serve)
    asked = [
        ({"call": "add", "amount": 3}, {"ok": True, "sum": 3}),
        ({"call": "add", "amount": -1}, {"ok": False, "error": "cannot add less than nothing"}),
        ({"call": "nothing"}, {"ok": False, "error": "dedup knows no call 'nothing'"}),
        ({"call": 7}, {"ok": False, "error": "dedup knows no call 7"}),
        ({"call": "bug"}, {"ok": False, "error": "internal error in dedup: KeyError: 'missing'"}),
        ({"call": "large", "bytes": 200_000}, {"ok": True, "text": "x" * 200_000}),
        ({"call": "add", "amount": 4}, {"ok": True, "sum": 7}),
    ]
    for number, (call, result) in enumerate(asked, start=1):
        assert kernel.client.start("dedup", call) == number
        assert kernel.results() == [Received("dedup", "result", number, result)]
    kernel.client.start("dedup", {"call": "large", "bytes": 300_000})
    assert "cannot send its answer: message of 3000" in kernel.results()[0].message["error"]
    with pytest.raises(message.MessageError, match="at most"):
        kernel.client.start("dedup", {"call": "add", "text": "x" * 20_000})
    assert kernel.client.start("dedup", {"call": "stop"})
    assert kernel.results()[0].message == {"ok": True}
    assert kernel.made.wait(pid) == 0
    assert physmap.header(Role.DEDUP).state == lib.ATOLL_STATE_STOPPED


def test_a_call_the_domain_cannot_read_is_refused_not_followed(kernel: Kernel) -> None:
    pid = kernel.start_domain(serve)
    base = physmap.address(Role.KERNEL)
    for address, length in [(0, 8), (base - 8, 16), (base + kernel.made.bytes[Role.KERNEL] - 4, 8), (2**64 - 8, 64)]:
        lib.atoll_domain_put(
            kernel.domain,
            Role.DEDUP,
            ffi.new(
                "struct atoll_descriptor *",
                {"opcode": lib.ATOLL_OP_CALL, "identity": 1000, "address": address, "length": length},
            ),
        )
        lib.atoll_domain_commit(kernel.domain)
        until(lambda: kernel.client.receive() == [], "nothing: nobody asked with that number")
    kernel.client.start("dedup", {"call": "add", "amount": 1})
    assert kernel.results()[-1].message == {"ok": True, "sum": 1}
    kernel.made.kill(pid)


def test_one_call_is_outstanding_and_the_domain_that_died_with_it_answers(kernel: Kernel) -> None:
    """At each point around taking, executing, committing and publishing: carried out once, answered once."""
    pid, total = kernel.start_domain(serve), 0
    for point in ("call.before", "commit.before", "commit.after", "publish.after", "wake.after"):
        name = f"dedup:{point}"
        lib.atoll_domain_wake_all(kernel.domain)
        kernel.arm(name)
        number = kernel.client.start("dedup", {"call": "add", "amount": 5})
        with pytest.raises(CallBusy):
            kernel.client.start("dedup", {"call": "add", "amount": 100})
        assert kernel.made.wait(pid) == -signal.SIGKILL, name
        pid = kernel.start_domain(serve)
        total += 5
        assert kernel.results() == [Received("dedup", "result", number, {"ok": True, "sum": total})], name
        assert kernel.client.receive() == []
    kernel.made.kill(pid)


def test_a_repeated_call_is_answered_again_but_not_carried_out_again(kernel: Kernel) -> None:
    pid = kernel.start_domain(serve)
    number = kernel.client.start("dedup", {"call": "add", "amount": 5})
    until(lambda: lib.atoll_domain_pending(kernel.domain, Role.DEDUP) == 1, "the result")
    assert kernel.client.repeat("dedup") == number
    until(lambda: lib.atoll_domain_pending(kernel.domain, Role.DEDUP) == 2 or kernel.client.receive(), "the second one")
    kernel.restart()
    kernel.results(0)
    assert kernel.client.outstanding("dedup") == 0 and kernel.client.repeat("dedup") == 0
    kernel.client.start("dedup", {"call": "add", "amount": 0})
    assert kernel.results()[-1].message == {"ok": True, "sum": 5}
    kernel.made.kill(pid)


def test_a_new_kernel_gets_the_result_of_its_predecessors_call(kernel: Kernel) -> None:
    number = kernel.client.start("dedup", {"call": "add", "amount": 2})
    kernel.restart()
    assert kernel.client.outstanding(Role.DEDUP) == number
    pid = kernel.start_domain(serve)
    assert kernel.results() == [Received("dedup", "result", number, {"ok": True, "sum": 2})]
    assert kernel.client.start("dedup", {"call": "add", "amount": 2}) == number + 1
    assert kernel.results()[0].message == {"ok": True, "sum": 4}
    kernel.made.kill(pid)


def test_a_deferred_call_is_repeated_to_the_successor_and_events_come(kernel: Kernel) -> None:
    def main(context: Context) -> None:
        waiting: list[int] = []

        def later(call: dict[str, Any]) -> Deferred:
            waiting.append(context.call_number)
            context.event("deferred", number=context.call_number)
            return Deferred()

        while not context.stopping:
            lib.atoll_domain_sleep(context.domain, 0, -1)
            context.serve_control({"later": later})
            if waiting and context.incarnation == 2:
                context.reply(waiting.pop(), {"ok": True, "at": "last"})
                lib.atoll_domain_commit(context.domain)

    pid = kernel.start_domain(main)
    number = kernel.client.start("dedup", {"call": "later"})
    assert kernel.results() == [Received("dedup", "event", 0, {"event": "deferred", "number": number})]
    kernel.made.kill(pid)
    pid = kernel.start_domain(main)
    assert kernel.client.repeat("dedup") == number
    kinds = [received.kind for received in kernel.results(2)]
    assert kinds == ["event", "result"]
    kernel.made.kill(pid)


def test_events_keep_a_place_for_the_result(kernel: Kernel) -> None:
    def main(context: Context) -> None:
        sent = 0
        while context.event("e", number=sent, text="y" * (900 if sent == 1 else 10)):
            sent += 1
        lib.atoll_domain_commit(context.domain)
        loop(context, {"sent": lambda call: {"sent": sent}})

    pid = kernel.start_domain(main)
    kernel.client.start("dedup", {"call": "sent"})
    found = kernel.results(64)
    assert found[-1].message == {"ok": True, "sent": 63} and len(found) == 64
    assert found[1].message == {"event": "e", "text": "(too long)"}
    assert [received.message["number"] for received in found[2:-1]] == list(range(2, 63))
    kernel.made.kill(pid)


def test_a_handler_that_fails_half_way_is_undone_and_the_domain_starts_again(kernel: Kernel) -> None:
    def main(context: Context) -> None:
        word = ffi.cast("uint64_t *", context.role_area)

        def half(call: dict[str, Any]) -> dict[str, Any]:
            lib.atoll_domain_set64(context.domain, word, 99)
            raise ValueError("half way")

        loop(context, {"half": half, **count_calls(context)})

    pid = kernel.start_domain(main)
    kernel.client.start("dedup", {"call": "half"})
    assert kernel.results()[0].message == {"ok": False, "error": "internal error in dedup: ValueError: half way"}
    assert kernel.made.wait(pid) == 1
    pid = kernel.start_domain(main)
    kernel.client.start("dedup", {"call": "add", "amount": 1})
    assert kernel.results()[0].message == {"ok": True, "sum": 1}
    kernel.made.kill(pid)


def test_a_domain_that_cannot_start_leaves_its_reason(kernel: Kernel) -> None:
    pid = kernel.start_domain(lambda context: context.fail("device too small: " + "ü" * 200))
    assert kernel.made.wait(pid) == 1  # SystemExit, through the test's own runner
    header = physmap.header(Role.DEDUP)
    assert header.state == lib.ATOLL_STATE_FAILED
    assert ffi.string(header.reason).decode().startswith("device too small: üüü")


def test_without_the_kernels_arena_no_domain_opens(kernel: Kernel) -> None:
    context = Context("dedup", 1, True, False, 0, {}, {Role.DEDUP: kernel.made.bytes[Role.DEDUP]})
    physmap.map_arena(Role.DEDUP, kernel.made.writable_fds[Role.DEDUP], kernel.made.bytes[Role.DEDUP], writable=True)
    with pytest.raises(DomainError, match="dedup: the kernel's arena is missing"):
        context.open(os.getpid())


def test_an_arena_of_an_earlier_run_is_adopted(kernel: Kernel) -> None:
    """Its contents stay; rings, calls, open step and instance are those of the new run."""
    pid = kernel.start_domain(serve)
    kernel.client.start("dedup", {"call": "add", "amount": 11})
    kernel.results()
    kernel.made.kill(pid)
    physmap.map_arena(Role.DEDUP, kernel.made.writable_fds[Role.DEDUP], kernel.made.bytes[Role.DEDUP], writable=True)
    context = Context("dedup", 2, False, True, 0, {}, dict(kernel.made.bytes))
    context.open(os.getpid())
    word = ffi.cast("uint64_t *", context.role_area)
    lib.atoll_domain_set64(context.domain, word, 12)  # a step that never commits
    counts = ffi.new("uint32_t[16]", [64] * 16)
    mask = 1 << Role.KERNEL
    header = context.header

    def adopt(role_bytes: int) -> int:
        size = kernel.made.bytes[Role.DEDUP]
        return lib.atoll_arena_adopt(Role.DEDUP, 4711, size, mask, counts, role_bytes, 0, lib.ATOLL_WAKE_EVENTFD, 9)

    assert adopt(8192) == -errno.EINVAL
    assert word[0] == 12
    assert adopt(4096) == 0
    assert (word[0], header.instance, header.eventfd, header.wake_kind) == (11, 4711, 9, lib.ATOLL_WAKE_EVENTFD)
    assert header.consumer[Role.KERNEL].head_committed == 0
    assert header.state == lib.ATOLL_STATE_NEW


class Opening:
    """The header of a process that served, opened by its successor (atoll_domain_open) between two reads."""

    def __init__(self) -> None:
        self.fields = {"state": lib.ATOLL_STATE_SERVING, "incarnation": 1}

    def __getattr__(self, name: str) -> int:
        value = self.fields[name]
        self.fields = {"state": lib.ATOLL_STATE_RECOVERING, "incarnation": 2}
        return int(value)


def test_what_the_predecessor_said_is_not_taken_for_the_new_process() -> None:
    header = Opening()
    assert not physmap.serves(header, 2) and not physmap.serves(header, 2)
    header.fields["state"] = lib.ATOLL_STATE_SERVING
    assert header.fields["incarnation"] == 2 and not physmap.serves(header, 1)


# --- Crash points ---


def test_crash_points_have_names_of_their_own() -> None:
    found = points_in(ROOT / "ipc")
    assert {":commit.before", ":commit.after", ":publish.after", ":wake.after", ":call.before"} <= set(found)
    hashes = {point_hash(f"nic{name}" if name.startswith(":") else name) for name in found}
    assert len(hashes) == len(found) and 0 not in hashes


def test_python_and_c_agree_on_the_hash() -> None:
    name = b"nic.send.before"
    value = 0xCBF29CE484222325
    for byte in name:
        value = ctypes.c_uint64((value ^ byte) * 0x100000001B3).value
    assert point_hash(name.decode()) == value
    assert point_hash("nic:commit.after") != point_hash("nbd:commit.after")


def test_start_time_names_a_process() -> None:
    assert start_time(os.getpid()) == start_time(os.getpid()) > 0
