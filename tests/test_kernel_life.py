"""The supervisor with stand-in domains: who dies is replaced, nobody plays twice, no message is lost."""

import contextlib
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernelkit
import pytest
from kernelkit import ROLES, Service, alive, wait_for, writable_maps

from atoll.kernel import cli_kill, messages, process
from atoll.kernel.client import Client, NoAnswer, Refused
from atoll.kernel.supervisor import Supervisor


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    try:
        yield made.start()
        left = made.end()
        assert not left
    finally:
        made.end()


def test_who_is_being_forked_is_no_stray() -> None:
    """A zygote and a kernel begin at once: the zygote answers the kernel's first question, is asked for a standby, and
    answers the second question, which its hello had been for, while the kernel does not get to reading."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asked: list[Any] = []
    supervisor: Any = object.__new__(Supervisor)  # no loop, no arenas: only what it makes of the zygote's words
    supervisor.__dict__.update(
        _to_zygote=one, _sync=0, _zygote_asked_ns=0, zygote=None, zygote_starts=0, synced=False, lives={},
        loop=SimpleNamespace(at=lambda *_: None), world=SimpleNamespace(init_pid=os.getpid()),
    )  # fmt: skip
    itself = {"pid": os.getpid(), "start_time": process.start_time(os.getpid()), "starts": 1}

    def ask() -> None:
        supervisor._ask_sync()
        received = messages.receive(other)
        assert received is not None
        asked.append(received[0]["sync"])

    with one, other:
        ask()
        messages.send(other, {"hello": True, **itself})
        messages.send(other, {"synced": asked[0], **itself})
        supervisor.from_zygote()
        received = messages.receive(other)
        assert received is not None and not supervisor.synced, "the hello was for another question"
        pid = os.fork()
        if pid == 0:
            process.name_this("atoll-disk+")
            signal.pause()
        try:
            wait_for("it has its name", lambda: process.name_of(pid) == "atoll-disk+")
            messages.send(other, {"synced": asked[0], **itself})
            supervisor.from_zygote()
            assert alive(pid) and not supervisor.synced
            messages.send(other, {"synced": received[0]["sync"], **itself})
            supervisor.from_zygote()
            assert supervisor.synced
            wait_for("it is taken for a stray", lambda: not alive(pid))
            supervisor.zygote.close()
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_each_role_in_turn(service: Service) -> None:
    service.ping(100)
    for role in ROLES:
        service.ping(2000)
        before = service.whole()[role]
        answer = service.call("kill", role=role, signal="KILL")
        assert (answer["pid"], answer["new_pid"]) == (before["pid"], before["standby_pid"])
        assert 0 < answer["detect_ms"] < answer["serving_ms"] < 2000
        after = service.whole()[role]
        assert after["incarnation"] == before["incarnation"] + 1
        assert after["restarts"] == before["restarts"] + 1
        assert service.ask(role, "report")["previous_signal"] == signal.SIGKILL
    assert service.round_trip()["answered"] == 8100
    print({role: service.rows()[role]["restarts"] for role in ROLES})


def test_the_successor_is_told_what_ended_its_predecessor(service: Service) -> None:
    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGTERM):
        service.whole()
        service.call("kill", role="nbd", signal=number.name)
        assert service.ask("nbd", "report")["previous_signal"] == number


INIT_AND_KERNEL_ARE_LATE = """
import time
from atoll.kernel import messages, supervisor
send, locks_died = messages.send, supervisor.Supervisor._locks_died
def send_late(channel, message, *descriptors):
    if "ended" in message:
        time.sleep(0.03)
    return send(channel, message, *descriptors)
def notice_late(self, notify):
    time.sleep(0.01)
    locks_died(self, notify)
messages.send, supervisor.Supervisor._locks_died = send_late, notice_late
"""


def test_what_ended_a_process_is_known_at_each_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine: the kernel looks when the dead one is gone already, and init has not told it yet."""
    monkeypatch.setattr(kernelkit, "RUNNER", INIT_AND_KERNEL_ARE_LATE + kernelkit.RUNNER)
    service = Service(tmp_path)
    try:
        service.start()
        for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL):
            service.whole()
            service.call("kill", role="nbd", signal=number.name)
            assert service.ask("nbd", "report")["previous_signal"] == number
    finally:
        assert service.end() == []


def test_arenas_are_writable_in_one_process(service: Service) -> None:
    rows = service.whole()
    service.ping(5000)
    for _ in range(5):
        rows = service.replaced("dedup", service.signal_role("dedup"))
        found = writable_maps(service)
        for role in (*ROLES, "kernel"):
            assert found[role] == [rows[role]["pid"]], (role, found)
            assert found[f"lock-{role}"] == [rows[role]["pid"]], (role, found)
    service.round_trip()


def test_a_domain_holds_only_what_it_may(service: Service) -> None:
    """No domain holds a descriptor of shared memory, nbd and dedup neither sockets nor the device."""
    rows = service.whole()
    for role in ROLES:
        for field in ("pid", "standby_pid"):
            folder = Path(f"/proc/{rows[role][field]}/fd")
            wait_for("a fresh standby has closed the rest", lambda: len(list(folder.iterdir())) < 14)  # noqa: B023
            links = [str(each.readlink()) for each in folder.iterdir()]
            assert not [link for link in links if "/dev/shm" in link or "control.sock" in link], links
            assert any(link.endswith("device.img") for link in links) == (role == "disk")
            assert any("io_uring" in link for link in links) == (role in ("disk", "nic"))
            # Its promotion channel, and for nic two listeners.
            sockets = sum(link.startswith("socket:") for link in links)
            assert sockets == (3 if role == "nic" else 1), (role, links)


def test_kill_the_kernel(service: Service) -> None:
    rows = service.whole()
    service.ping(3000)
    after = service.replaced("kernel", service.signal_role("kernel"))
    assert after["kernel"]["incarnation"] == 2
    for role in ROLES:  # adopted, not replaced
        assert (after[role]["pid"], after[role]["standby_pid"]) == (rows[role]["pid"], rows[role]["standby_pid"])
    service.round_trip()
    assert service.call("kill", role="disk", signal="KILL")["new_pid"] == rows["disk"]["standby_pid"]


def test_kill_kernel_and_domain_at_once(service: Service) -> None:
    service.ping(3000)
    for role in ROLES:
        rows = service.whole()
        os.kill(rows["kernel"]["pid"], signal.SIGKILL)
        os.kill(rows[role]["pid"], signal.SIGKILL)
        after = service.replaced(role, rows[role]["pid"])
        assert after[role]["pid"] == rows[role]["standby_pid"]
    service.round_trip()


def test_kill_the_zygote_and_standbys(service: Service) -> None:
    rows = service.whole()
    service.signal_role("zygote")
    for role in ROLES:
        os.kill(rows[role]["standby_pid"], signal.SIGKILL)
    after = wait_for(
        "other standbys",
        lambda: next(
            (now for now in [service.whole()] if all(now[x]["standby_pid"] != rows[x]["standby_pid"] for x in ROLES)),
            None,
        ),
    )
    assert all(after[role]["pid"] == rows[role]["pid"] for role in ROLES)
    assert after["zygote"]["pid"] != rows["zygote"]["pid"]
    assert after["zygote"]["restarts"] == 1


def test_zygote_that_answers_one_and_then_no_more(service: Service) -> None:
    """What it owes is remembered for each role. Whether it is stopped between two answers is chance: a few tries."""
    for _ in range(5):
        rows = service.whole()
        os.kill(rows["zygote"]["pid"], signal.SIGSTOP)
        for role in ROLES:
            os.kill(rows[role]["standby_pid"], signal.SIGKILL)
        wait_for("no standbys", lambda: not any(service.rows()[role]["standby_pid"] for role in ROLES))
        os.kill(rows["zygote"]["pid"], signal.SIGCONT)
        wait_for("one standby", lambda: any(service.rows()[role]["standby_pid"] for role in ROLES))
        os.kill(rows["zygote"]["pid"], signal.SIGSTOP)
        owes = not all(service.rows()[role]["standby_pid"] for role in ROLES)
        if not owes:
            os.kill(rows["zygote"]["pid"], signal.SIGCONT)
            continue
        wait_for("the other standbys", lambda: all(service.rows()[role]["standby_pid"] for role in ROLES), 20)
        assert service.rows()["zygote"]["pid"] != rows["zygote"]["pid"]
        return


def test_zygote_that_is_silent_when_a_kernel_takes_over(service: Service) -> None:
    """The new kernel has never heard of it."""
    rows = service.whole()
    os.kill(rows["zygote"]["pid"], signal.SIGSTOP)
    service.signal_role("kernel")
    service.replaced("kernel", rows["kernel"]["pid"])
    os.kill(rows["nic"]["pid"], signal.SIGKILL)
    after = service.replaced("nic", rows["nic"]["pid"])
    os.kill(after["nic"]["pid"], signal.SIGKILL)  # there is no standby for it
    wait_for("another zygote", lambda: service.rows()["zygote"]["pid"] not in (0, None, rows["zygote"]["pid"]), 20)
    service.replaced("nic", after["nic"]["pid"])
    service.round_trip()


def test_a_death_while_the_kernel_has_no_descriptors_left(service: Service) -> None:
    """Whatever fails then is tried again when there are some."""
    rows = service.whole()
    kernel = rows["kernel"]["pid"]
    limits = resource.prlimit(kernel, resource.RLIMIT_NOFILE)
    resource.prlimit(kernel, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        for role in ROLES:
            os.kill(rows[role]["pid"], signal.SIGKILL)
        wait_for("it fails", lambda: "Too many open files" in service.log_text())
        wait_for("all have been looked at", lambda: not any(alive(rows[role]["pid"]) for role in ROLES))
        time.sleep(0.5)  # what it does meanwhile is not to be seen from outside
    finally:
        resource.prlimit(kernel, resource.RLIMIT_NOFILE, limits)
    for role in ROLES:
        service.replaced(role, rows[role]["pid"])
    assert service.whole()["kernel"]["pid"] == kernel
    service.round_trip()


def test_who_dies_before_it_plays_is_not_taken_for_who_did(service: Service) -> None:
    """What the request that was being executed is blamed for is the end of the process that executed it."""
    assert service.process is not None
    rows = service.whole()
    service.call("crash-point", name="kernel.promote.before")
    os.kill(service.process.pid, signal.SIGSTOP)  # no other kernel for the time being
    try:
        os.kill(rows["nbd"]["pid"], signal.SIGSEGV)
        wait_for("the kernel has died while it promoted", lambda: not alive(rows["kernel"]["pid"]))
        os.kill(rows["nbd"]["standby_pid"], signal.SIGKILL)
    finally:
        os.kill(service.process.pid, signal.SIGCONT)
    after = service.replaced("nbd", rows["nbd"]["pid"])
    assert after["nbd"]["pid"] != rows["nbd"]["standby_pid"]
    assert service.ask("nbd", "report")["previous_signal"] == signal.SIGSEGV
    service.round_trip()


def test_all_but_init_at_once(service: Service) -> None:
    service.ping(3000)
    for _ in range(3):
        assert service.process is not None
        rows = service.whole()
        init = service.process.pid
        for pid in Path(f"/proc/{init}/task/{init}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):  # standbys end with their zygote
                os.kill(int(pid), signal.SIGKILL)
        for role in ROLES:
            after = service.replaced(role, rows[role]["pid"])
        assert all(after[role]["pid"] != rows[role]["pid"] for role in ROLES)
    service.round_trip()


def test_a_successor_killed_again_and_again(service: Service) -> None:
    service.ping(3000)
    for _ in range(10):
        pid = service.rows()["nbd"]["pid"]
        if pid:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    after = service.whole()
    assert after["nbd"]["restarts"] >= 1
    service.round_trip()


def test_a_stopped_domain_is_missed_when_there_is_work(service: Service) -> None:
    rows = service.whole()
    os.kill(rows["dedup"]["pid"], signal.SIGSTOP)
    with pytest.raises(Refused):  # the call is answered by the successor, after the hang was noticed; or refused
        service.ask("dedup", "no such call")
    after = service.whole()
    assert after["dedup"]["pid"] == rows["dedup"]["standby_pid"]
    assert service.ask("dedup", "report")["previous_signal"] == signal.SIGSTOP


def test_signals_that_end_nobody(service: Service) -> None:
    """What continues, what nothing is done about, what Python ignores: said at once, and the process goes on."""
    rows = service.whole()
    os.kill(rows["nbd"]["pid"], signal.SIGSTOP)
    wait_for("nbd has stopped", lambda: (found := process.look(rows["nbd"]["pid"])) is not None and found.stopped)
    for name in ("CONT", "WINCH", "PIPE"):
        answer = service.call("kill", role="nbd", signal=name)
        assert (answer["pid"], answer["new_pid"]) == (rows["nbd"]["pid"], None)
        with Client(service.data) as client:
            answer = cli_kill.kill(client, "kernel", signal.Signals[f"SIG{name}"])
        assert (answer["pid"], answer["new_pid"]) == (rows["kernel"]["pid"], None)
    service.ping(100)
    service.round_trip()
    after = service.rows()
    assert [after[role]["pid"] for role in ("nbd", "kernel")] == [rows[role]["pid"] for role in ("nbd", "kernel")]


def test_without_work_nobody_is_missed(service: Service) -> None:
    rows = service.whole()
    time.sleep(1.2)  # four times hang_s: this is the case in which nothing must happen
    assert service.rows()["nbd"]["pid"] == rows["nbd"]["pid"]


def test_a_stopped_standby_is_not_promoted(service: Service) -> None:
    rows = service.whole()
    os.kill(rows["nbd"]["standby_pid"], signal.SIGSTOP)
    service.call("kill", role="nbd", signal="KILL")
    after = service.whole()
    assert after["nbd"]["pid"] not in (rows["nbd"]["pid"], rows["nbd"]["standby_pid"])
    assert not alive(rows["nbd"]["standby_pid"])


def test_a_hanging_kernel_is_replaced(service: Service) -> None:
    rows = service.whole()
    after = service.replaced("kernel", service.signal_role("kernel", signal.SIGSTOP))
    assert all(after[role]["pid"] == rows[role]["pid"] for role in ROLES)


def test_back_off_is_for_those_who_die_by_themselves(service: Service) -> None:
    for _ in range(4):
        service.whole()
        service.call("kill", role="nbd", signal="SEGV")
    row = service.rows()["nbd"]
    assert row["restarts"] == 4
    times = []
    for _ in range(4):
        service.whole()
        times.append(service.call("kill", role="dedup", signal="KILL")["serving_ms"])
    assert min(times) < 100, times  # from outside: no waiting


def test_wherever_the_kernel_dies_one_process_is_active(service: Service) -> None:
    """The kernel dies at its crash points, in the middle of a promotion."""
    promoting = [f"kernel.promote.{name}" for name in ("bury", "before", "after", "serving")]
    for point in (*promoting, "kernel.promote.standby", "kernel.call.before", "kernel.receive.before"):
        rows = service.whole()
        service.call("crash-point", name=point)
        os.kill(rows["nbd"]["pid"], signal.SIGKILL)
        after = service.replaced("nbd", rows["nbd"]["pid"])
        assert after["kernel"]["pid"] != rows["kernel"]["pid"] or point not in promoting, point
        found = writable_maps(service)
        assert found["nbd"] == [after["nbd"]["pid"]]
        with contextlib.suppress(NoAnswer):  # the last two points lie on the way of a call
            service.ping(100)
        service.round_trip()


def test_random_kills(service: Service) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    end = time.monotonic() + 6
    service.ping(2000)
    while time.monotonic() < end:
        try:
            rows = service.rows()
        except Exception:
            continue
        victims = chance.sample([*ROLES, "kernel", "zygote"], chance.choice((1, 1, 2, 3)))
        for role in victims:
            pid = rows[role][chance.choice(("pid", "pid", "standby_pid"))]
            if pid:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        time.sleep(chance.random() * 0.05)
    rows = service.whole()
    report = service.round_trip()
    found = writable_maps(service)
    for role in ROLES:
        assert found[role] == [rows[role]["pid"]]
    print(report, {role: rows[role]["restarts"] for role in ROLES})


def test_a_role_with_threads_is_dead_when_its_last_thread_is(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.config["disk"]["engine"] = "threads"
    service.config["nic"]["engine"] = "sockets"
    try:
        service.start()
        service.ping(2000)
        for _ in range(3):
            rows = service.whole()
            answer = service.call("kill", role="disk", signal="KILL")
            assert answer["new_pid"] == rows["disk"]["standby_pid"]
        service.round_trip()
        assert service.call("status")["engines"] == {"disk": "threads", "nic": "sockets"}
    finally:
        assert service.end() == []


@pytest.mark.parametrize("hang_s", [0.02, 365 * 86400.0])
def test_short_and_long_bounds_for_a_hang(tmp_path: Path, hang_s: float) -> None:
    service = Service(tmp_path)
    service.config["kernel"]["hang_s"] = hang_s
    try:
        service.start()
        service.ping(2000)
        service.call("kill", role="disk", signal="KILL")
        service.replaced("kernel", service.signal_role("kernel"))
        service.round_trip()
        assert service.whole()["kernel"]["incarnation"] == 2
    finally:
        assert service.end() == []


def test_idle_costs_nothing(service: Service) -> None:
    service.whole()

    def used() -> float:
        return sum(row["cpu_s"] for row in service.rows().values())

    before = used()
    time.sleep(2)
    assert used() - before < 0.1  # of 2 s, ps itself included
