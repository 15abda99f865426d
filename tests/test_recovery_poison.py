"""A request that crashes or hangs its domain by itself costs itself: tried again alone, then refused; all others go on.
And a role that cannot start says why, with bounded back-off."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nbdclient import Command, CommandFlag, Connection, ErrorCode, request_bytes
from nbdclient import Request as NbdRequest
from recoverybugs import CRASH, ENDLESS
from recoverykit import Eyes, Load, check_all, check_nothing_left, patiently, rows, settled
from serverkit import Server, wait_for

HANG_S = 0.5


@pytest.fixture
def trapped(make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return make_server(
        config={
            "testing": {"modules": {"dedup": "recoverybugs.dedup"}},
            "nic": {"payload_timeout_s": 600},
            "kernel": {"hang_s": HANG_S, "restart_backoff_s": 1.0},
        }
    ).start()


@pytest.mark.parametrize("posted", [False, True], ids=["awaited", "posted"])
@pytest.mark.parametrize("text", [CRASH, ENDLESS], ids=["crash", "hang"])
def test_a_write_that_crashes_dedup(trapped: Server, text: bytes, posted: bool) -> None:
    """Its first page arrives, the trap is set on it, then the rest arrives and dedup executes it.

    One that its client waits for (here: FUA) is refused. One that has been answered is kept, unseen: it can be read,
    and no flush succeeds before it is overwritten."""
    server = trapped
    with (
        Eyes(server) as eyes,
        Connection.open(str(server.socket), timeout_s=60) as culprit,
        Connection.open(str(server.socket), timeout_s=60) as bystander,
    ):
        culprit.negotiate("disk")
        bystander.negotiate("disk")
        bystander.write(1 << 20, b"innocent" * 512)
        began = eyes.incarnation("dedup")
        poison = text.ljust(8192, b"!")
        request = NbdRequest(Command.WRITE, 0 if posted else CommandFlag.FUA, 77, 0, len(poison))
        culprit.decoder.expect(request)
        # Before the load: its pages follow each other while free ones do. Nobody posts what lies in two places.
        culprit.send(request_bytes(request, poison[:-1]))
        wait_for("the trap is set", lambda: call_bug(server, "trap")["pages"] >= 1)
        with Load(server, size=24 << 20, rate=200, odd=False) as load:
            reads = [bystander.submit(Command.READ, 1 << 20, 4096) for _ in range(20)]
            writes = [
                bystander.submit(Command.WRITE, (2 << 20) + at * 4096, payload=b"%4096d" % at) for at in range(20)
            ]
            culprit.send(poison[-1:])
            result = culprit.wait(77)
            assert (result.error is None) == posted
            assert posted or result.error.code == ErrorCode.EIO
            for cookie in reads:
                assert bystander.wait(cookie).check().data == b"innocent" * 512
            for cookie in writes:
                bystander.wait(cookie).check()
            assert bystander.read(2 << 20, 20 * 4096) == b"".join(b"%4096d" % at for at in range(20))
            assert bystander.read(0, 8192) == (poison if posted else bytes(8192))
            if posted:
                assert flushed(culprit) == ErrorCode.EIO
            assert eyes.incarnation("dedup") - began == 2
            load.goes_on("the poison")
            culprit.write(0, b"well" * 1024)
            assert culprit.read(0, 4096) == b"well" * 1024
            if posted:
                assert flushed(culprit) == ErrorCode.EIO, "half of it is still there"
                culprit.write(4096, b"well" * 1024)
            assert flushed(culprit) is None
            load.goes_on("the end of the trap")
    check_all(server)
    check_nothing_left(server)


def flushed(connection: Connection) -> ErrorCode | None:
    error = connection.wait(connection.submit(Command.FLUSH)).error
    return None if error is None else ErrorCode(error.code)


def call_bug(server: Server, kind: str) -> dict:
    return patiently(server, "call", role="dedup", message={"call": "bug", "kind": kind})["answer"]


@pytest.mark.parametrize("role", ["disk", "nbd"])
def test_a_role_that_cannot_start_says_why(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """After its first life it fails at each start; when the cause is gone it serves, and clients have waited."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    server = make_server(
        config={"testing": {"modules": {role: f"recoverybugs.{role}"}}, "kernel": {"restart_backoff_s": 0.4}}
    ).start()
    settled(server)
    cause = server.data / f"fails-{role}"
    with Eyes(server) as eyes, Load(server, size=24 << 20, rate=200, odd=False) as load:
        cause.write_text("the test says so")
        eyes.kill(role)
        wait_for("its reason is told", lambda: "the test says so" in (rows(server)[role]["reason"] or ""))
        assert rows(server)[role]["state"] in ("failed", "waiting", "starting", "recovering")
        assert "the test says so" in server.cli("ps").stdout, "also while the next one starts"
        began, first = time.monotonic(), rows(server)[role]["restarts"]
        wait_for("six more tries", lambda: rows(server)[role]["restarts"] >= first + 6, 20)
        assert time.monotonic() - began < 10, "back-off is bounded"
        assert time.monotonic() - began > 0.8, "back-off exists"
        assert f"{role}: process" in server.log_tail(400) and "the test says so" in server.log_tail(400)
        before = {role: eyes.incarnation(role) - 1}
        cause.unlink()
        eyes.wait_serving(before, 10)
        load.goes_on("the cause is gone")
        assert rows(server)[role]["reason"] is None
    check_nothing_left(server)
