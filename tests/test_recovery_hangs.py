"""Who hangs is noticed within about `hang_s`, killed and replaced, busy or not; who waits for a slow device is
let be; a death that takes its time is `dying`."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nbdclient import Command, Connection
from recoverykit import DOMAINS, Eyes, Load, check_all, patiently, rows, send, settled
from serverkit import Server, wait_for

from atoll.ipc._ipc import ffi
from atoll.kernel import table

HANG_S = 0.5
MODULES = {role: f"recoverybugs.{role}" for role in DOMAINS}


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose domains can be told to misbehave."""
    from conftest import end

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        server = Server(
            tmp_path_factory.mktemp("h"), config={"testing": {"modules": MODULES}, "kernel": {"hang_s": HANG_S}}
        )
        try:
            yield server.start()
        finally:
            end([server])


def noticed(eyes: Eyes, before: dict[str, int], bound_s: float) -> None:
    began = time.monotonic()
    eyes.wait_serving(before, 30)
    took = time.monotonic() - began
    print(f"{before} replaced after {took:.2f} s")
    assert took < bound_s


def test_stopped_under_load(hanging: Server) -> None:
    with Eyes(hanging) as eyes, Load(hanging, volume="stop", size=32 << 20) as load:
        for role in (*DOMAINS, "kernel"):
            before = eyes.kill(role, number=signal.SIGSTOP)
            noticed(eyes, before, 8 * HANG_S + 2)
            load.goes_on(f"SIGSTOP of {role}")
    assert load.longest_silence_s() < 8 * HANG_S + 2
    check_all(hanging)


@pytest.mark.parametrize("role", DOMAINS)
def test_stopped_while_idle(hanging: Server, role: str) -> None:
    """Nothing waits when it is stopped; then somebody comes, connected before or new."""
    settled(hanging)
    with Eyes(hanging) as eyes, Connection.open(str(hanging.socket)) as old:
        old.negotiate("disk")
        old.write(0, role.encode() * 1024)
        old.flush()
        before = eyes.kill(role, number=signal.SIGSTOP)
        with Connection.open(str(hanging.socket)) as new:
            began = time.monotonic()
            assert old.read(0, 8192)[:2] == role.encode()[:2]
            old.write(4096, b"x" * 4096, flags=1)
            new.negotiate("disk")
            assert new.read(4096, 4096) == b"x" * 4096
            assert time.monotonic() - began < 8 * HANG_S + 2
        eyes.wait_serving(before)


@pytest.mark.parametrize("kind", ["loop", "block", "segv", "abort"])
def test_bugs_in_control_code(hanging: Server, kind: str) -> None:
    """The call is answered by the successor; clients see nothing but a pause."""
    with Eyes(hanging) as eyes, Load(hanging, volume=kind, size=32 << 20, odd=False) as load:
        for role in DOMAINS:
            before = {role: eyes.incarnation(role)}
            message = {"call": "bug", "kind": kind, "incarnation": before[role]}
            answer = patiently(hanging, "call", role=role, message=message, timeout_s=20.0)["answer"]
            assert answer["incarnation"] > before[role]
            noticed(eyes, before, 8 * HANG_S + 2)
            load.goes_on(f"{kind} of {role}")
    check_all(hanging)


@pytest.mark.parametrize(("sender", "reader"), [("nic", "nbd"), ("dedup", "disk")])
def test_who_publishes_what_it_has_not_is_replaced(hanging: Server, sender: str, reader: str) -> None:
    """A tail that its ring cannot have: the reader takes nothing, and it is not the reader that is killed."""
    settled(hanging)
    with Eyes(hanging) as eyes, Connection.open(str(hanging.socket)) as connection:
        connection.negotiate("disk")
        connection.write(0, b"m" * 4096, flags=1)
        settled(hanging)
        before = {sender: eyes.incarnation(sender)}
        left_alone = {role: eyes.pid(role) for role in DOMAINS if role != sender}
        publish(hanging, sender, reader, beyond=1000)
        noticed(eyes, before, 8 * HANG_S + 2)
        assert connection.read(0, 4096) == b"m" * 4096
        connection.write(4096, b"n" * 4096, flags=1)
        assert connection.read(4096, 4096) == b"n" * 4096
        assert {role: eyes.pid(role) for role in left_alone} == left_alone
    assert f"messages to {reader} in a ring of " in hanging.log.read_text()
    check_all(hanging)


def publish(server: Server, sender: str, reader: str, beyond: int) -> None:
    """Puts the tail of a ring `beyond` what the ring holds."""
    (instance,) = server.instances
    path = f"/dev/shm/atoll-{instance}-{sender}"
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory, ffi.from_buffer(memory) as arena:
        offset = ffi.cast("struct atoll_arena_header *", arena).tx_offset[table.ROLES[reader].number]
        producer = ffi.cast("struct atoll_ring_producer *", arena + offset)
        producer.tail = (producer.tail + producer.entry_count + beyond) % (1 << 32)


def test_a_slow_device_is_no_hang(make_server: Callable[..., Server]) -> None:
    """Three seconds for each I/O, three times hang_s and more: nobody is killed, everybody waits."""
    server = make_server(
        config={"testing": {"modules": {"disk": "atoll.drivers.fault"}}, "kernel": {"hang_s": HANG_S}}
    ).start()
    with Connection.open(str(server.socket), timeout_s=60) as connection:
        connection.negotiate("disk")
        connection.write(0, os.urandom(1 << 20))
        connection.flush()
        before = rows(server)
        rules = [{"action": "delay", "ms": 3000}]
        patiently(server, "call", role="disk", message={"call": "fault-set", "rules": rules})
        began = time.monotonic()
        data = os.urandom(1 << 16)
        cookies = [connection.submit(Command.WRITE, 2 << 20, payload=data), connection.submit(Command.FLUSH)]
        for cookie in cookies:
            connection.wait(cookie).check()
        assert time.monotonic() - began >= 3
        patiently(server, "call", role="disk", message={"call": "fault-set", "rules": []})
        assert connection.read(2 << 20, 1 << 16) == data
    after = rows(server)
    assert {role: after[role]["pid"] for role in DOMAINS} == {role: before[role]["pid"] for role in DOMAINS}


def test_dying_has_no_successor_yet(make_server: Callable[..., Server]) -> None:
    """A killed process that a tracer holds at its exit is not dead: `dying`; requests wait for its end."""
    server = make_server(config={"kernel": {"hang_s": HANG_S}}).start()
    settled(server)
    with Eyes(server) as eyes, Load(server, size=32 << 20, odd=False) as load:
        before = {"disk": eyes.incarnation("disk")}
        with HeldAtExit(eyes.pid("disk")) as held:
            wait_for("disk is dying", lambda: rows(server)["disk"]["state"] == "dying")
            time.sleep(0.3)  # nothing may happen meanwhile
            assert held.pid == eyes.pid("disk") and rows(server)["disk"]["state"] == "dying"
            check = server.json("audit", status=None)
            assert check["ok"], check["findings"]
        eyes.wait_serving(before)
        load.goes_on("dying")
    check_all(server)


PTRACE_SEIZE, PTRACE_O_TRACEEXIT, PTRACE_DETACH = 0x4206, 0x40, 17


class HeldAtExit:
    """Kills a process but keeps it from dying, by a tracer (a child of ours) that it stops for at its exit."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __enter__(self) -> HeldAtExit:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        ours, theirs = os.pipe()
        self._end, wait_end = os.pipe()[::-1]
        self._tracer = os.fork()
        if self._tracer == 0:
            try:
                os.close(self._end)
                failed = libc.ptrace(PTRACE_SEIZE, self.pid, None, ctypes.c_void_p(PTRACE_O_TRACEEXIT))
                os.write(theirs, b"x" if failed else b".")
                os.read(wait_end, 1)
            finally:
                os._exit(0)  # which lets go of the traced process
        os.close(wait_end)
        os.close(theirs)
        said = os.read(ours, 1)
        os.close(ours)
        if said != b".":
            self.__exit__()
            pytest.skip("ptrace is not permitted here")
        send(self.pid, signal.SIGKILL)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._end)
        os.waitpid(self._tracer, 0)
