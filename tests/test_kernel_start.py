"""init with stand-in domains: start, stop, start after a death, and all that keeps a service from starting."""

import contextlib
import errno
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from kernelkit import ROLES, RUNNER, Service, alive, wait_for

from atoll.ipc import objects
from atoll.ipc._ipc import ffi
from atoll.kernel import world
from atoll.kernel.client import ControlError, NoServer
from atoll.kernel.init import Init
from atoll.kernel.instance import BootError, Record
from atoll.kernel.listeners import open_all
from atoll.kernel.offline import enlarge, left_in_memory, open_store
from atoll.kernel.verbs import TRACE_BOUND_NS, Verbs


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    try:
        yield made
        left = made.end()
        assert not left
    finally:
        made.end()


def fails(service: Service) -> tuple[int, str]:
    """Exit status and what it said; nothing of it is left."""
    service.start(wait=False)
    assert service.process is not None
    status = service.process.wait(30)
    return status, service.log_text()


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_start_and_stop(service: Service) -> None:
    service.start()
    assert stat.S_IMODE((service.data / "control.sock").stat().st_mode) == 0o600
    said = service.output.read_text()
    assert "nbd+unix:///disk?socket=" in said and "nbd://127.0.0.1:" in said
    assert service.call("volume-list")["volumes"][0]["name"] == "disk"
    assert service.stop() == 0
    assert json.loads((service.data / "instance.json").read_text())["clean"] is True
    assert [objects.list_objects(instance) for instance in service.instances] == [[]]
    assert not (service.data / "control.sock").exists() and not (service.data / "nbd.sock").exists()
    assert "taken over" not in service.log_text()
    assert all(service.log_text().count(f"{role}: process") == 1 for role in ROLES), "nobody was replaced by the stop"
    service.start()
    assert service.ask("nic", "report")["starts"] == 1  # fresh arenas
    assert service.stop() == 0


def test_signals_stop_it(service: Service) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        service.start()
        assert service.process is not None
        service.process.send_signal(number)
        assert service.process.wait(20) == 0


def test_after_the_death_of_init_its_arenas_are_taken_over(service: Service) -> None:
    service.start()
    service.ping(500)
    for turn in range(3):
        rows = service.rows()
        service.round_trip()
        service.die()
        assert not any(alive(row["pid"]) for row in rows.values())
        service.start()
        report = service.ask("nic", "report")
        assert report["adopted"] is True
        assert report["starts"] == turn + 2
        assert service.ask("dedup", "report")["starts"] == turn + 2
        assert service.ask("nbd", "report")["starts"] == 1
        assert [volume["name"] for volume in service.call("volume-list")["volumes"]] == ["disk"]
        service.ping(500)
    service.round_trip()
    assert "taken over" in service.log_text()
    # A takeover after that is one like any other.
    service.call("kill", role="nic", signal="KILL")
    assert service.ask("nic", "report")["adopted"] is False
    assert service.stop() == 0
    service.start()
    assert service.ask("nic", "report")["starts"] == 1


def test_killed_again_while_it_takes_over(service: Service) -> None:
    """The record says that something was acknowledged, whatever a start that was cut short has done to the arenas."""
    service.start()
    service.die()
    for number in range(5):
        service.start(wait=False)
        assert service.process is not None
        deadline = 0.05 * number

        def late() -> bool:
            assert service.process is not None
            try:
                service.process.wait(deadline)  # noqa: B023
            except subprocess.TimeoutExpired:
                return True
            return True

        wait_for("some time", late)
        service.process.kill()
        service.process.wait()
    service.start()
    assert service.ask("dedup", "report")["adopted"] is True
    assert service.stop() == 0


def test_shared_memory_that_is_gone_is_said(service: Service) -> None:
    service.start()
    service.die()
    for instance in service.instances:
        for name in objects.list_objects(instance):
            objects.unlink(name)
    service.start()
    assert "acknowledged but not flushed are lost" in service.log_text()
    assert service.ask("nic", "report")["starts"] == 1


def test_shared_memory_of_another_release_is_left_alone(service: Service) -> None:
    """Nothing but that release can put on the device what was acknowledged: a start must not throw it away."""
    service.start()
    service.die()
    record = Record.read(service.data)
    assert record is not None
    mine = record.layout_version
    record.layout_version = mine - 1
    record.write(service.data)
    there = set(objects.list_objects(record.instance))
    status, said = fails(service)
    assert status == 1 and f"layout is {mine - 1}, and this program's is {mine}" in last_line(said)
    assert set(objects.list_objects(record.instance)) == there
    assert "the release that made it" in left_in_memory(Record.read(service.data))

    record.layout_version = mine
    record.write(service.data)
    service.start()
    assert service.ask("dedup", "report")["adopted"] is True
    service.die()
    record.layout_version = mine - 1
    record.write(service.data)
    for name in objects.list_objects(record.instance):
        objects.unlink(name)
    service.start()
    assert "acknowledged but not flushed are lost" in service.log_text()
    assert service.stop() == 0


def test_a_record_that_could_not_be_written_hides_no_writes(service: Service) -> None:
    """When the first clients came the file system was full: the device is the next start's all the same."""
    service.start()
    service.die()
    path = service.data / "instance.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"served": False}))
    store = open_store(service.data, None, folder_given=True)
    try:
        assert "may still be in shared memory" in store.unflushed
        with pytest.raises(BootError, match="may still be in shared memory"):
            enlarge(store, 256 << 20, sparse=True)
    finally:
        store.close()
    service.start()
    assert service.ask("dedup", "report")["adopted"] is True
    service.die()

    # Nobody had ever served: nothing waits, and the next start is a fresh one.
    path.write_text(json.dumps(record | {"served": False}))
    with open(objects.FOLDER / f"atoll-{record['instance']}-dedup", "r+b") as arena:
        arena.seek(ffi.offsetof("struct atoll_arena_header", "serving_ns"))
        arena.write(bytes(8))
    store = open_store(service.data, None, folder_given=True)
    store.close()
    assert store.unflushed == ""
    service.start()
    assert service.ask("dedup", "report")["adopted"] is False
    assert service.stop() == 0


def test_another_device_or_other_sizes_while_writes_wait(service: Service, tmp_path: Path) -> None:
    service.config["nbd"] = {"colour": "blue"}
    service.start()
    service.die()
    device = service.config["device"]
    service.config["device"] = str(tmp_path / "other.img")
    status, said = fails(service)
    assert status == 1 and "not the one of the last run" in last_line(said)
    service.config["device"] = device
    service.config["nbd"] = {"colour": "red"}
    service.start()
    assert "nbd: what has changed in its configuration takes effect after" in service.log_text()
    assert service.ask("dedup", "report")["adopted"] is True
    assert service.stop() == 0


def test_a_second_instance(service: Service, tmp_path: Path) -> None:
    service.start()
    assert service.process is not None
    second = Service(tmp_path)
    second.log = tmp_path / "second"
    status, said = fails(second)
    assert status == 3
    assert f"already running, pid {service.process.pid}" in last_line(said)
    assert service.rows()["nic"]["state"] == "serving"


def test_survivors_of_a_dead_init_are_ended(service: Service) -> None:
    """A process that holds the lock of the data directory and is no init: left over from a run."""
    service.start()
    assert service.stop() == 0
    program = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.flock(f, 2); print(flush=True); time.sleep(999)"
    )
    left = subprocess.Popen([sys.executable, "-c", program, str(service.data / "lock")], stdout=subprocess.PIPE)
    try:
        assert left.stdout is not None
        left.stdout.readline()
        service.start()
        assert left.wait(5) == -signal.SIGKILL
        assert f"process {left.pid} of an earlier run" in service.log_text()
    finally:
        left.kill()
        left.wait()
        assert left.stdout is not None
        left.stdout.close()


def test_a_role_that_cannot_start_says_why(tmp_path: Path) -> None:
    service = Service(tmp_path, fail="dedup")
    try:
        status, said = fails(service)
        assert status == 1
        assert last_line(said) == "atoll: dedup: stand-in dedup was told to fail"
        assert json.loads((service.data / "instance.json").read_text())["clean"] is True
    finally:
        service.end()


def test_a_role_that_dies_before_it_has_served_is_made_again_from_zeros(tmp_path: Path) -> None:
    service = Service(tmp_path, die_fresh="nbd")
    try:
        service.start()
        assert service.rows()["nbd"]["incarnation"] == 2
        assert service.ask("nbd", "report")["starts"] == 1
        assert service.stop() == 0
    finally:
        assert service.end() == []


def test_a_role_that_always_crashes_keeps_the_service_from_starting(tmp_path: Path) -> None:
    service = Service(tmp_path, **{"raise": "nbd"})
    try:
        status, said = fails(service)
        assert status == 1
        assert "RuntimeError: stand-in was told to raise" in said
        assert "atoll: nbd: exited with 70, 4 times in a row" in last_line(said)
    finally:
        assert service.end() == []


def test_bad_data_directories(service: Service, tmp_path: Path) -> None:
    service.data.mkdir()
    (service.data / "version").write_text("99\n")
    status, said = fails(service)
    assert status == 2 and "version '99', this program reads version 1" in last_line(said)
    (service.data / "version").unlink()
    service.config["data"] = str(tmp_path / "file" / "x")
    (tmp_path / "file").write_text("")
    status, said = fails(service)
    assert status == 2 and "not writable" in last_line(said)


def fails_changed(service: Service, change: str) -> tuple[int, str]:
    """As `fails`, of a program that is changed first."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", change + RUNNER, json.dumps(service.config)],
        capture_output=True, text=True, timeout=60, env=environment,
    )  # fmt: skip
    return done.returncode, done.stderr


def put_in_the_way(obstacle: Path) -> None:
    """A directory of that name, which init, while it writes its record, uses for a moment as a file."""

    def made() -> bool:
        with contextlib.suppress(FileExistsError):
            obstacle.mkdir()
        return obstacle.is_dir()

    wait_for(f"{obstacle.name} is a directory", made)


def test_a_record_that_cannot_be_written(service: Service) -> None:
    """As on a full file system, which a sparse device can bring about while the service runs."""
    obstacle = service.data / "instance.json.new"
    obstacle.mkdir(parents=True)
    status, said = fails(service)
    assert status == 1 and "Is a directory" in last_line(said) and "Traceback" not in said
    obstacle.rmdir()
    service.start()
    put_in_the_way(obstacle)
    assert service.stop() == 0
    assert "instance.json cannot be written" in service.log_text() and "Traceback" not in service.log_text()
    obstacle.rmdir()
    service.start()
    assert "taken over" in service.log_text()
    assert service.stop() == 0
    assert [objects.list_objects(instance) for instance in service.instances] == [[]]


DISK_FULL_AT_THE_END = """
import errno
from atoll.kernel.instance import Record
write = Record.write
def write_unless_clean(self, folder):
    if self.clean:
        raise OSError(errno.ENOSPC, "No space left on device")
    write(self, folder)
Record.write = write_unless_clean
"""


def test_a_record_that_cannot_be_written_does_not_hide_why_there_is_no_start(tmp_path: Path) -> None:
    service = Service(tmp_path, buffer_bytes=1 << 60)
    try:
        status, said = fails_changed(service, DISK_FULL_AT_THE_END)
        assert status == 1 and "Traceback" not in said
        assert last_line(said).startswith(f"atoll: {objects.FOLDER} is too small: "), said
        assert "not wholly removed: [Errno 28] No space left on device" in said
    finally:
        assert not service.end()
    service.config["testing"]["fault"] = {}
    service.start()
    assert "are lost" not in service.log_text()
    assert service.stop() == 0
    assert not service.end()


def test_shared_memory_that_cannot_be_listed_is_said(service: Service) -> None:
    service.start()
    service.die()
    elsewhere = "from pathlib import Path; from atoll.ipc import objects; objects.FOLDER = Path('/nonexistent')\n"
    status, said = fails_changed(service, elsewhere)
    assert status == 1 and "Traceback" not in said
    assert last_line(said) == "atoll: cannot list /nonexistent: No such file or directory"
    service.start()
    assert service.ask("dedup", "report")["adopted"] is True
    assert service.stop() == 0


def test_a_record_that_cannot_be_written_when_all_serve(tmp_path: Path) -> None:
    """Nobody ends for it, and what the record does not say is seen in the arenas."""
    go = tmp_path / "go"
    service = Service(tmp_path, hold=str(go))
    try:
        service.start(wait=False)
        wait_for("the first record is there", lambda: (service.data / "instance.json").exists())
        obstacle = service.data / "instance.json.new"
        put_in_the_way(obstacle)
        go.touch()
        wait_for("all serve", service.serves)
        wait_for("init has tried", lambda: "instance.json cannot be written" in service.log_text())
        assert json.loads((service.data / "instance.json").read_text())["served"] is False
        assert "Traceback" not in service.log_text()
        rows = service.rows()
        assert all(row["restarts"] == 0 for row in rows.values()), rows
        service.ping(100)
        service.round_trip()
        service.die()
        obstacle.rmdir()
        service.start()
        assert "taken over" in service.log_text() and service.ask("nic", "report")["adopted"] is True
        assert service.stop() == 0
    finally:
        assert service.end() == []


def test_a_device_file_has_one_server(service: Service, tmp_path: Path) -> None:
    """Of which data directory ever, and by which name; after its end the next one has it."""
    service.start()
    other = Service(tmp_path / "other")
    (tmp_path / "other").mkdir()
    link = tmp_path / "link.img"
    link.hardlink_to(service.config["device"])
    other.config["device"] = str(link)
    try:
        status, text = fails(other)
        assert status == 1 and "in use by process" in last_line(text)
        assert service.stop() == 0
        other.start()
        assert other.stop() == 0
    finally:
        assert not other.end()


def test_who_is_gone_without_a_word_is_found_out() -> None:
    """Else its connection stays for ever, and with enough of them nobody else gets one."""
    (listener,) = open_all({"listen": ["127.0.0.1:0"], "unix": []})
    with socket.socket(fileno=listener.fd) as listening, socket.create_connection(listening.getsockname()):
        assert select.select([listening], [], [], 10)[0]
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


def test_bad_devices(service: Service, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(4096))
    service.config["device"] = str(tmp_path / "small")
    status, said = fails(service)
    assert status == 1 and "too small: at least 128MiB" in last_line(said)
    service.config["device"] = "/dev/no-such-device"
    assert "no such device" in last_line(fails(service)[1])
    service.config["device"] = "/dev/null"
    assert "neither a file nor a block device" in last_line(fails(service)[1])
    service.config.update(device=str(tmp_path / "huge"), device_bytes=1 << 60, sparse=False)
    said = last_line(fails(service)[1])
    assert "cannot make it 1EiB long" in said and "--sparse" in said
    assert not (tmp_path / "huge").exists()
    service.config["sparse"] = True  # longer than any file
    said = last_line(fails(service)[1])
    assert "cannot make it 1EiB long" in said and "--sparse" not in said


def test_too_small_a_dev_shm_is_said_with_the_keys_that_ask_for_less(tmp_path: Path) -> None:
    free = os.statvfs(objects.FOLDER)
    service = Service(tmp_path, buffer_bytes=free.f_bavail * free.f_frsize + (1 << 20))
    try:
        status, said = fails(service)
        assert status == 1
        words = last_line(said)
        assert words.startswith(f"atoll: {objects.FOLDER} is too small: ") and "--shm-size" in words, words
        for key in ("nic.buffer_bytes", "disk.cache_bytes", "dedup.metadata_cache_bytes", "dedup.fingerprint_entries"):
            assert key in words, words
        record = json.loads((service.data / "instance.json").read_text())
        assert record["clean"] is True and objects.list_objects(int(record["instance"], 16)) == []
    finally:
        assert not service.end()


def test_each_arena_fits_and_all_together_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    arenas = {name: world.Arena(64 << 20, 32 << 20, 32 << 20) for name in ROLES}
    monkeypatch.setattr(objects, "available", lambda: 256 << 20)
    world._check_room(arenas)
    monkeypatch.setattr(objects, "available", lambda: (256 << 20) - 4096)
    with pytest.raises(objects.ObjectError, match="256 MiB are needed, 255 MiB are available"):
        world._check_room(arenas)
    monkeypatch.setattr(objects, "available", lambda: None)  # a tmpfs without a limit
    world._check_room(arenas)


def test_bad_sockets(service: Service, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        service.config["listen"] = [f"127.0.0.1:{taken.getsockname()[1]}"]
        status, said = fails(service)
    assert status == 1 and "Address already in use" in last_line(said)
    service.config["listen"] = []
    service.config["unix"] = [str(tmp_path / "file")]
    (tmp_path / "file").write_text("")
    assert "exists and is no socket" in last_line(fails(service)[1])
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "taken"))
        taken.listen()
        service.config["unix"] = [str(tmp_path / "taken")]
        assert "another process listens there" in last_line(fails(service)[1])
    service.start()  # nobody listens any more: replaced
    assert service.stop() == 0


def test_many_listeners(service: Service, tmp_path: Path) -> None:
    service.config["listen"] = ["127.0.0.1:0", "[::1]:0"]
    service.config["unix"] = [str(tmp_path / "one"), str(tmp_path / "two")]
    service.start()
    uris = service.call("status")["uris"]
    assert len(uris) == 4
    assert sum(uri.startswith("nbd://[::1]:") for uri in uris) == 1


def test_socket_activation(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "activated"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    service.config.update(listen=[], unix=[])

    program = (
        "import os, sys; os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
        "os.execv(sys.executable, [sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    )
    with open(service.log, "ab") as log, open(service.output, "ab") as output:
        service.process = subprocess.Popen(
            [sys.executable, "-c", program, RUNNER, json.dumps(service.config)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            preexec_fn=lambda: os.dup2(listener.fileno(), 3),
            close_fds=False,
        )
    wait_for("it serves", service.serves)
    assert service.call("status")["uris"] == [f"nbd+unix:///disk?socket={path}"]
    assert service.stop() == 0
    assert path.exists()  # not ours to remove
    listener.close()


def test_readiness_is_told(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(20)
        service.start(environment={"NOTIFY_SOCKET": str(path)})
        assert b"READY=1" in manager.recv(4096)
        assert service.process is not None
        service.process.terminate()
        assert b"STOPPING=1" in manager.recv(4096)
        assert service.process.wait(20) == 0


def test_nobody_to_talk_to_afterwards(service: Service) -> None:
    service.start()
    assert service.stop() == 0
    with pytest.raises(NoServer):
        service.call("ps")


def test_bad_requests(service: Service) -> None:
    """Each gets an answer of one line; the kernel goes on."""
    service.start()
    for verb, arguments in (
        ("nonsense", {}),
        ("kill", {"role": "nobody"}),
        ("kill", {"role": "nbd", "signal": "NONE"}),
        ("kill", {"role": ["nbd"]}),
        ("volume-create", {"name": 5}),
        ("volume-create", {"name": "x", "size_bytes": -1}),
        ("trace", {"action": "dance"}),
        ("crash-point", {"name": 3}),
        ("crash-point", {"name": "nobody:point"}),
        ("call", {"role": "nbd", "message": 3}),
        ("call", {"role": "nbd", "message": {"call": "stop"}}),
        ("call", {"role": "nbd", "message": {"call": "x" * 100_000}}),
    ):
        with pytest.raises(ControlError) as caught:
            service.call(verb, **arguments)
        assert "\n" not in str(caught.value) and "internal error" not in str(caught.value), str(caught.value)
    for data in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x02\x92\x01", b"GET / HTTP/1.0\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(service.data / "control.sock"))
            client.sendall(data)
            client.settimeout(5)
            assert client.recv(65536)
    idle = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    for client in idle:  # who says half a request holds up nobody
        client.connect(str(service.data / "control.sock"))
        client.sendall(b"\x00\x00")
    assert service.rows()["kernel"]["incarnation"] == 1
    for client in idle:
        client.close()


def test_trace_and_crash_points(service: Service) -> None:
    service.start()
    number = service.call("trace", action="arm")["trace"]
    service.ping(50)
    service.round_trip()
    records = service.call("trace", action="collect")["domains"]
    service.call("trace", action="disarm", trace=number)
    assert all(len(records[role]["records"]) >= 50 * 64 for role in ROLES)
    before = service.rows()["disk"]
    service.call("crash-point", name="disk:commit.after")
    service.ping(10)
    assert service.replaced("disk", before["pid"])["disk"]["restarts"] == 1
    service.round_trip()


def test_a_stop_that_a_kernel_dies_of_is_told_to_the_next_one(tmp_path: Path) -> None:
    service = Service(tmp_path)
    try:
        service.start()
        service.ping(10)
        service.call("crash-point", name="kernel.stop.before")
        assert service.process is not None
        service.process.terminate()
        assert service.process.wait(30) == 0
        assert "incarnation 2 took over" in service.log_text()
    finally:
        assert not service.end()


def test_an_init_that_cannot_fork_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on processes, reached by others while a kernel or a zygote is to be replaced, ends nothing."""

    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    init = Init(cast(Any, SimpleNamespace(zygote_starts=1, config={"kernel": {"hang_s": 1.0}})))
    init.kernel.pid = 1  # lives
    init._fork(init.zygote)
    assert init.zygote.pid == 0 and init.world.zygote_starts == 1
    assert 0 < init.zygote.not_before - time.monotonic() <= 1
    assert init._patience_ms() <= 1000


def test_a_kernel_that_was_stopped_together_with_init_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """As all are that run on a machine which stands still for seconds; init may be the first to go on."""
    killed: list[float] = []
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("atoll.kernel.init.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("atoll.kernel.init.os", SimpleNamespace(kill=lambda *_: killed.append(clock.now)))
    monkeypatch.setattr("atoll.kernel.init.physmap", SimpleNamespace(header=lambda _: SimpleNamespace(progress=7)))
    init = Init(cast(Any, SimpleNamespace(config={"kernel": {"hang_s": 1.0}})))
    init.kernel.pid = 1
    for clock.now in (100.0, 101.0, 104.0, 105.0, 106.0, 106.5):  # its patience is a second
        init._look_at_kernel()
    assert killed == [106.5], "104.0: both may have stood still; 106.5: init has looked all the time"


def test_a_trace_that_a_dead_kernel_armed_ends() -> None:
    """Else all reads and writes would take the long way from then on."""
    timers: list[tuple[int, Callable[[], None]]] = []
    loop = SimpleNamespace(at=lambda time_ns, act: timers.append((time_ns, act)))
    header = SimpleNamespace(trace_armed=7)  # as its successor finds it
    nothing: Any = None
    Verbs(nothing, SimpleNamespace(self=header), cast(Any, SimpleNamespace(loop=loop)), nothing, nothing)
    assert len(timers) == 1 and timers[0][0] <= time.monotonic_ns() + TRACE_BOUND_NS
    timers[0][1]()
    assert header.trace_armed == 0
    header.trace_armed = 0
    Verbs(nothing, SimpleNamespace(self=header), cast(Any, SimpleNamespace(loop=loop)), nothing, nothing)
    assert len(timers) == 1
