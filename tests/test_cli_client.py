"""The client of the control socket against a stand-in for the kernel: framing, errors, a kernel that dies."""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from atoll.kernel import cli_kill
from atoll.kernel.client import LENGTH, Client, NoAnswer, NoServer, Refused

Answer = Callable[[dict[str, Any]], bytes | None]  # None: hang up


def frame(reply: Any) -> bytes:
    body = msgpack.packb(reply)
    return LENGTH.pack(len(body)) + body


class StandIn:
    """Accepts connections one after the other; each request is answered by the next of `answers`."""

    def __init__(self, folder: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "control.sock"))
        self.listener.listen(8)
        self.requests: list[dict[str, Any]] = []
        self.answers: list[Answer] = []
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as stream:
                while header := stream.read(4):
                    request = msgpack.unpackb(stream.read(LENGTH.unpack(header)[0]))
                    self.requests.append(request)
                    answer = self.answers.pop(0)(request)
                    if answer is None:
                        break
                    connection.sendall(answer)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path)
    yield stand_in
    stand_in.close()


def ok(**results: Any) -> Answer:
    return lambda request: frame({"version": 1, "number": request["number"], "ok": True, **results})


def dies(request: dict[str, Any]) -> None:
    return None


def test_a_call_and_its_results(kernel: StandIn, tmp_path: Path) -> None:
    kernel.answers = [ok(text="a", data=b"\0" * 3_000_000), ok()]
    with Client(tmp_path) as client:
        assert client.call("status", x=1) == {"text": "a", "data": b"\0" * 3_000_000}
        assert client.call("ps") == {}
    assert kernel.requests == [
        {"version": 1, "number": 1, "call": "status", "x": 1},
        {"version": 1, "number": 2, "call": "ps"},
    ]


def test_a_refusal(kernel: StandIn, tmp_path: Path) -> None:
    kernel.answers = [lambda r: frame({"version": 1, "number": r["number"], "ok": False, "error": "no volume 'x'"})]
    with Client(tmp_path) as client, pytest.raises(Refused, match=r"^no volume 'x'$"):
        client.call("volume-delete", name="x")


def test_the_kernel_dies_and_its_successor_is_asked(kernel: StandIn, tmp_path: Path) -> None:
    kernel.answers = [ok(), dies, dies, ok(found=True)]
    with Client(tmp_path) as client:
        client.call("ps")
        assert client.call("status") == {"found": True}
    assert [request["call"] for request in kernel.requests] == ["ps", "status", "status", "status"]


def test_what_must_not_be_repeated_is_not(kernel: StandIn, tmp_path: Path) -> None:
    kernel.answers = [dies]
    with Client(tmp_path) as client, pytest.raises(NoAnswer, match="was replaced while 'kill' was under way"):
        client.call("kill", role="nic")
    assert len(kernel.requests) == 1


def test_a_connection_that_died_between_two_calls_does_not_count(kernel: StandIn, tmp_path: Path) -> None:
    def answer_and_die(request: dict[str, Any]) -> bytes:
        kernel.answers.insert(0, dies)
        return frame({"version": 1, "number": request["number"], "ok": True})

    kernel.answers = [answer_and_die]
    with Client(tmp_path) as client:
        client.call("ps")
        # A second frame on the same connection, sent behind the client's back, makes the kernel hang up.
        assert client._socket is not None
        client._socket.sendall(frame({"call": "die"}))
        kernel.answers.append(ok(role="nic"))
        client._socket.recv(1, socket.MSG_PEEK)
        assert client.call("kill", role="nic") == {"role": "nic"}


def test_who_is_not_known_yet_is_waited_for(kernel: StandIn, tmp_path: Path) -> None:
    """A kernel that has just begun answers before it has heard of the zygote."""
    with subprocess.Popen(["sleep", "600"]) as zygote:
        kernel.answers = [ok(domains=[{"role": "zygote", "pid": pid}]) for pid in (None, zygote.pid, os.getpid())]
        try:
            with Client(tmp_path) as client:
                killed = cli_kill.kill(client, "zygote", signal.SIGKILL)
        finally:
            zygote.kill()
    assert (killed["pid"], killed["new_pid"]) == (zygote.pid, os.getpid())


def test_no_answer_in_time(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen(1)
        with Client(tmp_path, timeout_s=0.05) as client, pytest.raises(NoAnswer, match="no answer to 'ps' in time"):
            client.call("ps")


def test_nobody_listens(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with Client(folder) as client, pytest.raises(NoServer, match="no server runs on"):
            client.call("ps")


def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    with Client(deep) as client, pytest.raises(NoServer):
        client.call("ps")


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (b"\xff\xff\xff\xff", NoAnswer, "announced an answer of 4294967295 bytes"),
        (LENGTH.pack(1) + b"\xc1", NoAnswer, "not msgpack"),
        (frame({"version": 2, "number": 1, "ok": True}), Refused, "speaks control version 2"),
        (frame({"version": 1, "number": 1, "ok": False}), Refused, "refused without a reason"),
        (frame([]) + frame({"version": 1, "number": 1}), Refused, "refused without a reason"),
    ],
)
def test_nonsense(kernel: StandIn, tmp_path: Path, answer: bytes, error: type[Exception], says: str) -> None:
    kernel.answers = [lambda request: answer]
    with Client(tmp_path) as client, pytest.raises(error, match=says):
        client.call("status")
