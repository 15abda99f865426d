"""Bad circumstances and bad clients: each ends in a clear line, nothing is lost and nobody else is disturbed."""

import errno
import os
import random
import select
import shlex
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
from libnbd import Libnbd, LibnbdError
from serverkit import ATOLL, Server, run, wait_for

from atoll.kernel.client import Client, ControlError

MIB = 1 << 20

MakeServer = Callable[..., Server]


def refused(server: Server, status: int) -> str:
    """serve must end by itself with this status and one line."""
    done = subprocess.run(server.command(), capture_output=True, text=True, timeout=90)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert "Traceback" not in done.stderr
    assert lines, "not a word"
    assert not server.pids()
    return lines[-1]


# --- Starting -------------------------------------------------------------------------------------------------------


def test_a_data_directory_that_cannot_be_written(make_server: MakeServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    server = make_server()
    server.data = tmp_path / "file" / "d"
    assert str(server.data) in refused(server, 2)
    server.data = Path("/proc/nowhere")
    assert "/proc/nowhere" in refused(server, 2)


def test_a_data_directory_of_another_version(make_server: MakeServer) -> None:
    server = make_server().start()
    server.stop()
    (server.data / "version").write_text("99\n")
    line = refused(server, 2)
    assert "99" in line
    assert "version 1" in line


def test_a_second_server_on_the_same_directory(make_server: MakeServer) -> None:
    server = make_server().start()
    assert server.process is not None
    done = subprocess.run(server.command(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert f"already running, pid {server.process.pid}" in done.stderr
    with Libnbd(server.uri()) as client:
        client.pwrite(b"x" * 512, 0)


def test_an_address_in_use(make_server: MakeServer) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert address in refused(make_server(config={"listen": [address]}), 1)


def test_a_device_that_is_not_there(make_server: MakeServer) -> None:
    assert "/nonexistent/device" in refused(make_server(config={"device": "/nonexistent/device"}), 1)


def test_a_foreign_device_is_not_formatted(make_server: MakeServer, tmp_path: Path) -> None:
    """What is not blank and not ours is somebody's data."""
    path = tmp_path / "device"
    content = random.Random(1).randbytes(1 * MIB)
    path.write_bytes(content)
    os.truncate(path, 512 * MIB)
    server = make_server(config={"device": str(path), "device_size": "512MiB"})
    line = refused(server, 1)
    assert "store" in line, line
    with open(path, "rb") as stream:
        assert stream.read(len(content)) == content


SUPERBLOCK = b"ATOLLSB1"  # at byte 8; copies lie at either end of the device


def superblocks(device: Path) -> list[int]:
    """Offsets of what looks like a superblock."""
    size = device.stat().st_size
    with open(device, "rb") as stream:
        found = []
        for offset in (0, 4096, size - 8192, size - 4096):
            stream.seek(offset + 8)
            if stream.read(8) == SUPERBLOCK:
                found.append(offset)
    return found


def test_damaged_superblocks(make_server: MakeServer) -> None:
    server = make_server().start()
    data = random.Random(2).randbytes(1 * MIB)
    with Libnbd(server.uri()) as client:
        client.pwrite(data, 0)
    server.stop()
    device = server.data / "device.img"
    found = superblocks(device)
    assert len(found) >= 2
    # One copy bad, whichever: found out, and another is used.
    for offset in found:
        damage(device, [offset])
        server.start()
        with Libnbd(server.uri()) as client:
            assert client.pread(1 * MIB, 0) == data
        server.stop()
    # All bad: refused, and not formatted anew.
    found = superblocks(device)
    kept = damage(device, found)
    line = refused(server, 1)
    assert "superblock" in line and "damaged" in line, line
    with open(device, "r+b") as stream:
        for offset in found:
            stream.seek(offset)
            assert stream.read(4096) == DAMAGE
            stream.seek(offset)
            stream.write(kept[offset])
    server.start()
    with Libnbd(server.uri()) as client:
        assert client.pread(1 * MIB, 0) == data


DAMAGE = b"\xa5" * 4096


def damage(device: Path, offsets: list[int]) -> dict[int, bytes]:
    """Overwrites these blocks and returns what they held."""
    kept = {}
    with open(device, "r+b") as stream:
        for offset in offsets:
            stream.seek(offset)
            kept[offset] = stream.read(4096)
            stream.seek(offset)
            stream.write(DAMAGE)
    return kept


def test_a_store_of_another_version(make_server: MakeServer) -> None:
    server = make_server().start()
    server.stop()
    device = server.data / "device.img"
    with open(device, "r+b") as stream:
        for offset in superblocks(device):
            stream.seek(offset + 16)
            stream.write((77).to_bytes(4, "little"))
    line = refused(server, 1)
    assert "77" in line, line


# --- Volumes --------------------------------------------------------------------------------------------------------


def test_volumes_and_their_refusals(module_server: Server) -> None:
    server = module_server
    created = server.json("volume", "create", "pool/a b", "10MiB")
    assert created["name"] == "pool/a b"
    assert created["size_bytes"] == 10 * MIB
    assert "there is a volume of that name" in server.cli("volume", "create", "pool/a b", "10MiB", status=4).stderr
    assert "nope" in server.cli("volume", "delete", "nope", status=4).stderr
    assert "nope" in server.cli("volume", "resize", "nope", "1GiB", status=4).stderr
    server.cli("volume", "resize", "pool/a b", "1MiB", status=4)
    assert server.json("volume", "resize", "pool/a b", "20MiB")["size_bytes"] == 20 * MIB
    uri = server.uri("pool/a b")
    with Libnbd(uri) as client:
        assert client.get_size() == 20 * MIB
        client.pwrite(b"x" * 4096, 20 * MIB - 4096)
        assert server.cli("volume", "delete", "pool/a b", status=4).stderr
        assert client.pread(4096, 20 * MIB - 4096) == b"x" * 4096
    # The server may not have seen the client go yet.
    wait_for("the volume is free", lambda: server.cli("volume", "delete", "pool/a b", status=None).returncode == 0)
    assert "pool/a b" not in [entry["name"] for entry in server.json("volume", "list")]
    assert "pool/a b" not in server.cli("volume", "list").stdout


def test_an_unknown_volume(module_server: Server) -> None:
    uri = module_server.uri("disk").replace("/disk", "/unknown")
    with pytest.raises(LibnbdError):
        Libnbd(uri)
    out = run("nbdinfo", uri, status=1)
    assert "unknown" in out
    with Libnbd(module_server.uri("disk")) as client:
        assert client.get_size() == 1 << 30


def test_a_deleted_volume_gives_its_space_back(make_server: MakeServer) -> None:
    server = make_server(config={"device_size": "256MiB"}).start()
    rng = random.Random(3)
    for number in range(4):
        name = f"v{number}"
        server.cli("volume", "create", name, "128MiB")
        with Libnbd(server.uri(name)) as client:
            for offset in range(0, 96 * MIB, 8 * MIB):
                write_when_there_is_room(client, rng.randbytes(8 * MIB), offset)
            client.flush()
        wait_for("deleted", lambda name=name: server.cli("volume", "delete", name, status=None).returncode == 0)


def write_when_there_is_room(client: Libnbd, data: bytes, offset: int, timeout_s: float = 30) -> None:
    """Space is freed behind the answer of a delete or a trim."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            client.pwrite(data, offset)
            return
        except LibnbdError as error:
            assert error.errno == errno.ENOSPC
            assert time.monotonic() < deadline, "the space has not come back"
            time.sleep(0.05)


# --- Full -----------------------------------------------------------------------------------------------------------


def test_a_full_device(make_server: MakeServer) -> None:
    server = make_server(config={"device_size": "256MiB", "volumes": [{"name": "disk", "size": "1GiB"}]}).start()
    rng = random.Random(4)
    written: dict[int, int] = {}
    with Libnbd(server.uri()) as client, Libnbd(server.uri()) as other:
        offset = 0
        with pytest.raises(LibnbdError) as full:
            for seed in range(1024):
                client.pwrite(random.Random(seed).randbytes(MIB), offset)
                written[offset] = seed
                offset += MIB
        assert full.value.errno == errno.ENOSPC
        assert len(written) > 100
        client.flush()  # what was acknowledged has its place
        for at in rng.sample(sorted(written), 10):
            assert other.pread(MIB, at) == random.Random(written[at]).randbytes(MIB)
        # What takes no space still goes: zeros, what is there already, overwriting with the same.
        client.zero(MIB, 900 * MIB)
        # Overwriting blocks that nobody else refers to frees as many as it takes: more than is kept for it at a time.
        for index, at in enumerate(rng.choices(sorted(written), k=24)):
            written[at] = 20_000 + index
            client.pwrite(random.Random(written[at]).randbytes(MIB), at)
        with pytest.raises(LibnbdError) as still:
            client.pwrite(random.Random(30_000).randbytes(8 * MIB), 800 * MIB)
        assert still.value.errno == errno.ENOSPC
        gone = sorted(written)[:20]
        for at in gone:
            client.trim(MIB, at)
            del written[at]
        client.flush()
        for index in range(8):
            write_when_there_is_room(client, random.Random(10_000 + index).randbytes(MIB), 950 * MIB + index * MIB)
        client.flush()
    server.stop()
    server.start()
    with Libnbd(server.uri()) as client:
        for at, seed in written.items():
            assert client.pread(MIB, at) == random.Random(seed).randbytes(MIB), at
        for at in gone:
            assert client.pread(MIB, at) == bytes(MIB)
        for index in range(8):
            assert client.pread(MIB, 950 * MIB + index * MIB) == random.Random(10_000 + index).randbytes(MIB)


# --- Clients --------------------------------------------------------------------------------------------------------


def connect(server: Server) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(str(server.socket))
    return connection


def negotiate(connection: socket.socket, volume: bytes = b"disk") -> None:
    """To the transmission phase, by the oldest way (NBD_OPT_EXPORT_NAME)."""
    greeting = receive(connection, 18)
    assert greeting[:16] == b"NBDMAGICIHAVEOPT"
    connection.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, len(volume)) + volume)
    receive(connection, 10)


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        assert part, f"closed after {len(data)} of {count} bytes"
        data += part
    return data


def still_serves(server: Server) -> None:
    with Libnbd(server.uri()) as client:
        data = os.urandom(4096)
        client.pwrite(data, 512 * MIB)
        assert client.pread(4096, 512 * MIB) == data


def test_thousands_of_connections_opened_and_abandoned(make_server: MakeServer) -> None:
    server = make_server(config={"nic": {"handshake_timeout_s": 2, "max_connections": 1200}}).start()
    for turn in range(10):  # opened and closed at once, some of them in the middle of a word
        connections = [connect(server) for _ in range(300)]
        for index, connection in enumerate(connections):
            if index % 3 == turn % 3:
                connection.sendall(b"\0\0\0\3IHAVEOPT"[: index % 12])
            connection.close()
    still_serves(server)
    held = [connect(server) for _ in range(1000)]  # open, silent, within the limit
    still_serves(server)
    for connection in held:
        connection.close()
    # More than the limit: they wait, and those who say nothing are dropped in time.
    held = [connect(server) for _ in range(1500)]
    still_serves(server)
    for connection in held:
        connection.close()
    wait_for("all places are free", lambda: open_connections(server) == 0)
    assert all(row["restarts"] == 0 for row in server.json("ps"))


def open_connections(server: Server) -> int:
    return sum(int(entry.get("connections") or 0) for entry in server.json("volume", "list"))


def test_a_thousand_connections_at_work(make_server: MakeServer) -> None:
    server = make_server().start()
    connections = [connect(server) for _ in range(1000)]
    for connection in connections:
        negotiate(connection)
    for number, connection in enumerate(connections):
        connection.sendall(
            struct.pack(">IHHQQI", 0x25609513, 0, 1, number, number * 4096, 4096) + bytes([number % 251]) * 4096
        )
    for number, connection in enumerate(connections):
        assert receive(connection, 16) == struct.pack(">IIQ", 0x67446698, 0, number)
        connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, number, number * 4096, 4096))
    for number, connection in enumerate(connections):
        assert receive(connection, 16 + 4096)[16:] == bytes([number % 251]) * 4096
        connection.close()


def test_a_client_that_never_reads(make_server: MakeServer) -> None:
    server = make_server(config={"nic": {"reply_timeout_s": 2}}).start()
    run("qemu-io", "-f", "raw", "-c", "write -P 0x5a 0 64M", server.uri())
    deaf = [connect(server) for _ in range(8)]
    for connection in deaf:
        negotiate(connection)
        request = struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 32 * MIB)
        connection.sendall(request * 16)
    for _ in range(5):
        still_serves(server)  # nobody else waits for the deaf
    for connection in deaf:
        # Dropped in time: what was in the socket comes, then the end.
        poll = select.poll()
        poll.register(connection, select.POLLHUP)
        assert poll.poll(30_000), "the connection is still open"
        connection.close()
    still_serves(server)
    assert all(row["restarts"] == 0 for row in server.json("ps"))


def test_a_payload_that_never_comes(make_server: MakeServer) -> None:
    server = make_server(config={"nic": {"payload_timeout_s": 1}}).start()
    slow = [connect(server) for _ in range(20)]
    for connection in slow:
        negotiate(connection)
        connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 32 * MIB) + b"x" * 100_000)
    still_serves(server)
    for connection in slow:
        assert connection.recv(1) == b""
        connection.close()
    still_serves(server)
    with Libnbd(server.uri()) as client:
        assert client.pread(4096, 16 * MIB) == bytes(4096)


# --- Other ----------------------------------------------------------------------------------------------------------


def test_the_control_socket_is_private_and_takes_no_nonsense(module_server: Server) -> None:
    path = module_server.data / "control.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    for junk in (b"\0", b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", b"\0\0\0\1\x01", b"\0\0\0\x02\x81\xc1", os.urandom(4096)):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(path))
            connection.sendall(junk)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(30)]
    for connection in silent:
        connection.connect(str(path))
    assert module_server.json("ps")
    for connection in silent:
        connection.close()
    assert all(row["restarts"] == 0 for row in module_server.json("ps") if row["role"] == "kernel")


def test_many_control_requests_at_once_are_all_answered(module_server: Server) -> None:
    """In their order, however many stand in the socket when the kernel looks: some answered at once, some later."""
    count = 2000
    verbs = ["status" if number % 500 == 7 else "nonsense" for number in range(count)]
    asked = [msgpack.packb({"version": 1, "number": number, "call": verb}) for number, verb in enumerate(verbs)]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(module_server.data / "control.sock"))
        connection.sendall(b"".join(struct.pack(">I", len(body)) + body for body in asked))
        with connection.makefile("rb") as answers:
            for number in range(count):
                (length,) = struct.unpack(">I", answers.read(4))
                assert msgpack.unpackb(answers.read(length))["number"] == number
    assert all(row["restarts"] == 0 for row in module_server.json("ps") if row["role"] == "kernel")


def test_killing_what_is_no_role(module_server: Server) -> None:
    assert "nonsense" in module_server.cli("kill", "nonsense", status=4).stderr
    assert "init" in module_server.cli("kill", "init", status=4).stderr


@pytest.mark.parametrize("role", ["nic", "kernel"])
def test_a_signal_that_does_not_end_a_process(module_server: Server, role: str) -> None:
    pid = module_server.row(role)["pid"]
    said = module_server.cli("kill", role, "--signal", "CONT").stdout
    assert said == f"{role}: process {pid} was sent CONT, which does not end it\n"
    assert module_server.kill(role, "CONT")["new_pid"] is None
    assert module_server.row(role)["pid"] == pid


def test_stop_by_signal(make_server: MakeServer) -> None:
    server = make_server().start()
    assert server.process is not None
    server.process.terminate()
    assert server.process.wait(30) == 0
    assert not server.pids()
    assert subprocess.run([str(ATOLL), "ps", "--data", str(server.data)], capture_output=True).returncode == 3
    server.process = None


@pytest.mark.parametrize("output", [">/dev/full 2>/dev/full", "2>&1 | true", ">&- 2>&- <&-"])
def test_nobody_reads_what_serve_says(make_server: MakeServer, output: str) -> None:
    """Who started it has gone, or the disk of its log is full: no reason to end, then or when it forks again."""
    server = make_server()
    shell = subprocess.Popen(["bash", "-c", f"set -o pipefail; {shlex.join(server.command())} {output}"])

    def serves() -> bool:
        assert shell.poll() is None, "it has ended"
        try:
            with Client(server.data) as client:
                return client.call("status")["state"] == "serving"
        except ControlError:
            return False

    try:
        wait_for("it serves", serves)
        server.note_instance()
        for role in ("kernel", "zygote", "nic"):
            server.cli("kill", role)
    finally:
        server.cli("stop", status=None)
        assert shell.wait(60) == 0


def test_hanging_up_does_not_end_what_nohup_started(make_server: MakeServer) -> None:
    server = make_server()

    def start(action: signal.Handlers) -> subprocess.Popen[bytes]:
        before = signal.signal(signal.SIGHUP, action)  # inherited; who runs the tests may have started them with nohup
        try:
            process = server.start().process
        finally:
            signal.signal(signal.SIGHUP, before)
        assert process is not None
        return process

    start(signal.SIG_IGN).send_signal(signal.SIGHUP)
    server.kill("kernel")  # whose end init sees after that signal
    assert server.json("status")["state"] == "serving"
    server.stop()
    hung_up = start(signal.SIG_DFL)
    hung_up.send_signal(signal.SIGHUP)
    assert hung_up.wait(60) == 0
    server.process = None
