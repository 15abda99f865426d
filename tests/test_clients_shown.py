"""What the first release is to show, on a running server with ordinary clients.

1. Two copies of an image take the space of one.  2. Every role is killed with clients connected.  3. The audit is clean
under load.  4. The trace shows one address in all domains.  5. The speed beside nbdkit's memory plugin.
"""

import contextlib
import json
import random
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from libnbd import Libnbd
from serverkit import ATOLL, Server, run, wait_for

MIB, GIB = 1 << 20, 1 << 30
ROLES = ("nic", "nbd", "dedup", "disk", "kernel")


# --- 1 --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_copy_takes_no_space(make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server(
        config={
            "device_size": "3GiB",
            "volumes": [{"name": "one", "size": "1GiB"}, {"name": "two", "size": "1GiB"}],
            "dedup": {"fingerprint_entries": 1 << 20},
        }
    ).start()
    image = tmp_path / "image"
    with open(image, "wb") as stream:
        stream.truncate(GIB)
    run("/sbin/mke2fs", "-q", "-t", "ext4", "-d", sysconfig.get_paths()["stdlib"], image, timeout_s=800)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, server.uri("one"))
    first = flushed(server)
    run("nbdcopy", "--flush", image, server.uri("two"))
    second = flushed(server)
    print("one copy", first, "two copies", second)
    assert first["stored_bytes"] > 20 * MIB
    assert second["stored_bytes"] - first["stored_bytes"] < first["stored_bytes"] / 100
    assert second["ratio"] > 1.9
    server.stop()
    server.start()
    for volume in ("one", "two"):
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, server.uri(volume))


def flushed(server: Server) -> dict[str, Any]:
    """`dedup` of the status once everything written is on the device."""
    with Libnbd(server.uri(server.json("volume", "list")[0]["name"])) as client:
        client.flush()
    return dict(server.json("status")["dedup"])


# --- 2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["KILL", "SEGV"])
def test_every_role_is_killed_with_a_client_connected(module_server: Server, name: str) -> None:
    rng = random.Random(name)
    truth = {}
    with Libnbd(module_server.uri("disk", "unix")) as client, Libnbd(module_server.uri("disk", "tcp")) as other:
        for round_number, role in enumerate(ROLES * 2):
            for _ in range(20):
                offset = rng.randrange(16384) * 4096
                truth[offset] = rng.randbytes(4096)
                client.pwrite(truth[offset], offset)
            before = module_server.row(role)
            killed = module_server.kill(role, name)
            print(killed)
            assert killed["pid"] == before["pid"] != killed["new_pid"]
            assert killed["role"] == role
            assert killed["signal"] == name
            assert killed["serving_ms"] > 0
            after = module_server.row(role)
            assert after["pid"] == killed["new_pid"]
            assert after["incarnation"] > before["incarnation"]
            assert after["restarts"] > before["restarts"]
            for offset, data in truth.items():
                assert (other if round_number % 2 else client).pread(4096, offset) == data
            client.flush()
            wait_for(f"{role} has a standby again", lambda role=role: standby_ready(module_server, role))


def standby_ready(server: Server, role: str) -> bool:
    return role == "kernel" or bool(server.row(role)["standby_pid"])


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_killed_again_and_again_under_load(module_server: Server, role: str, tmp_path: Path) -> None:
    """fio verifies all that it wrote; any error ends it with a status of its own."""
    with load(module_server, tmp_path) as fio:
        kills = 0
        while fio.poll() is None and kills < 10:
            module_server.kill(role)
            kills += 1
        print(role, "killed", kills, "times")
        out, _ = fio.communicate(timeout=120)
        assert fio.returncode == 0, out
        assert kills > 0


def test_what_was_acknowledged_outlives_all_processes(server: Server) -> None:
    rng = random.Random(7)
    truth = {}
    with Libnbd(server.uri()) as client:
        for _ in range(2000):
            offset = rng.randrange(65536) * 4096
            truth[offset] = rng.randbytes(4096)
            client.pwrite(truth[offset], offset)
        server.die()
    server.start()
    with Libnbd(server.uri()) as client:
        for offset, data in truth.items():
            assert client.pread(4096, offset) == data, offset
    server.stop()
    server.start()
    with Libnbd(server.uri()) as client:
        for offset, data in truth.items():
            assert client.pread(4096, offset) == data, offset


def test_what_was_flushed_outlives_the_memory(server: Server) -> None:
    rng = random.Random(8)
    truth = {}
    with Libnbd(server.uri()) as client:
        for _ in range(500):
            offset = rng.randrange(65536) * 4096
            truth[offset] = rng.randbytes(4096)
            client.pwrite(truth[offset], offset)
        client.flush()
        server.die()
    for instance in server.instances:
        for path in Path("/dev/shm").glob(f"atoll-{instance}-*"):
            path.unlink()
    server.start()
    with Libnbd(server.uri()) as client:
        for offset, data in truth.items():
            assert client.pread(4096, offset) == data, offset


@contextlib.contextmanager
def load(server: Server, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """fio writing and verifying in the background."""
    fio = subprocess.Popen(
        [
            "fio", "--thread", "--name=load", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=randrw", "--bs=4k",
            "--size=64m", "--io_size=256m", "--iodepth=16", "--verify=crc32c",
            "--verify_state_save=0", "--verify_fatal=1",
            "--verify_backlog=256", *options,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
    )  # fmt: skip
    try:
        yield fio
    finally:
        if fio.poll() is None:
            fio.kill()
            fio.communicate()


# --- 3 --------------------------------------------------------------------------------------------------------------


def test_the_audit_is_clean_under_load(module_server: Server, tmp_path: Path) -> None:
    with load(module_server, tmp_path, "--time_based", "--runtime=600") as fio:  # it is killed
        for role in (None, *ROLES[:-1]):
            if role is not None:
                module_server.kill(role)
            seen = module_server.json("audit")
            assert seen["ok"]
            writers = {
                entry["name"].rpartition("-")[2]: [who["pid"] for who in entry["mapped_writable"]]
                for entry in seen["objects"]
                if entry["kind"] == "arena"
            }
            rows = {row["role"]: row["pid"] for row in module_server.json("ps")}
            for each in ROLES:
                assert writers[each] == [rows[each]], (each, writers, rows)
            rings = [entry for entry in seen["objects"] if entry["kind"] == "io_uring"]
            assert all(len(entry["mapped_writable"]) == 1 for entry in rings)
        assert fio.poll() is None, fio.communicate()[0]


INTRUDER = """
import mmap, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
view = mmap.mmap(descriptor, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_audit_finds_an_intruder(module_server: Server) -> None:
    (instance,) = module_server.instances
    intruder = subprocess.Popen(
        ["/usr/bin/python3", "-c", INTRUDER, f"/dev/shm/atoll-{instance}-nbd"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert intruder.stdout is not None
        intruder.stdout.readline()
        seen = module_server.json("audit", status=1)
        assert any(str(intruder.pid) in finding for finding in seen["findings"])
    finally:
        intruder.communicate()
    assert module_server.json("audit")["ok"]


# --- 4 --------------------------------------------------------------------------------------------------------------


def follow(server: Server, only: str, act: Callable[[], None]) -> dict[str, Any]:
    """`atoll trace` of what `act` does once the trace is armed."""
    trace = subprocess.Popen(
        [str(ATOLL), "trace", "--json", "--only", only, "--volume", "disk", "--data", str(server.data)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert trace.stderr is not None
    line = trace.stderr.readline()
    assert "waiting for a" in line, line + trace.stderr.read()
    act()
    out, err = trace.communicate(timeout=90)
    document = json.loads(out)
    print(json.dumps(document[only], indent=1))
    assert trace.returncode == 0, (document[only]["note"], err)
    return dict(document[only])


@pytest.mark.parametrize("size", [4096, MIB])
def test_one_address_in_all_domains(server: Server, size: int) -> None:
    data = random.Random(size).randbytes(size)
    copied = server.json("status")["copies"]
    with Libnbd(server.uri()) as client:
        written = follow(server, "write", lambda: client.pwrite(data, 8 * MIB))
    assert written["same_address"] is True
    assert written["length"] == size
    assert {hop["domain"] for hop in written["hops"]} >= {"nic", "nbd", "dedup", "disk"}
    for domain, message in (("nbd", "REQUEST"), ("dedup", "WRITE"), ("disk", "IO_WRITE")):
        places = {h["address"] for h in written["hops"] if (h["domain"], h["message"]) == (domain, message)}
        assert places, (domain, message)
        if size == 4096:
            assert places == {written["hops"][0]["address"]}
    after = server.json("status")["copies"]
    assert after["between_bytes"] == copied["between_bytes"]
    assert after["inside_bytes"] >= copied["inside_bytes"]
    server.stop()
    server.start()  # with nothing in memory, a read comes from the device
    with Libnbd(server.uri()) as client:
        got = []
        read = follow(server, "read", lambda: got.append(client.pread(size, 8 * MIB)))
    assert got == [data]
    assert read["same_address"] is True
    assert {hop["domain"] for hop in read["hops"]} >= {"nic", "nbd", "dedup", "disk"}
    assert read["note"] == ""
    shown = follow_for_people(server)
    assert "same address in nbd, dedup, disk: yes" in shown


def follow_for_people(server: Server) -> str:
    trace = subprocess.Popen(
        [str(ATOLL), "trace", "--only", "write", "--data", str(server.data)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert trace.stderr is not None
    trace.stderr.readline()
    with Libnbd(server.uri()) as client:
        client.pwrite(random.randbytes(65536), 0)
        out, _ = trace.communicate(timeout=90)
    print(out)
    return out


def test_a_trace_under_load(module_server: Server, tmp_path: Path) -> None:
    with load(module_server, tmp_path, "--time_based", "--runtime=60"):
        document = module_server.json("trace", "--only", "write")
        assert document["write"]["same_address"] is True


def test_a_trace_that_sees_nothing_says_so(module_server: Server) -> None:
    done = module_server.cli("trace", "--timeout", "0.2", status=5)
    assert "no write seen in 0.2 s" in done.stderr
    assert "no volume 'none'" in module_server.cli("trace", "--volume", "none", status=4).stderr


# --- 5 --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_speed_beside_nbdkit(module_server: Server, tmp_path: Path) -> None:
    """Reported, and above a third of nbdkit's: the best of three short turns each, taken in turn."""
    module_server.cli("volume", "create", "speed", "64MiB")
    uri = module_server.uri("speed")
    run("qemu-io", "-f", "raw", "-c", "write -P 0x5a 0 64M", uri)
    socket = tmp_path / "k"
    nbdkit = subprocess.Popen(["nbdkit", "--foreground", "--unix", str(socket), "memory", "64M"])
    try:
        wait_for("nbdkit listens", socket.exists)
        theirs = f"nbd+unix:///?socket={socket}"
        run("qemu-io", "-f", "raw", "-c", "write -P 0x5a 0 64M", theirs)
        figures: dict[str, list[float]] = {"atoll": [], "nbdkit": []}
        for _ in range(3):
            for name, where in (("atoll", uri), ("nbdkit", theirs)):
                out = run(
                    "fio", "--name=r", "--ioengine=nbd", f"--uri={where}", "--rw=randread", "--bs=4k", "--size=64m",
                    "--iodepth=32", "--time_based", "--runtime=2", "--output-format=json", cwd=tmp_path,
                )  # fmt: skip
                report = json.loads(out[out.index("{") :])
                figures[name].append(report["jobs"][0]["read"]["iops"])
        print("4 KiB random reads, depth 32, requests/s:", figures)
        assert max(figures["atoll"]) > max(figures["nbdkit"]) / 3
    finally:
        nbdkit.send_signal(signal.SIGTERM)
        nbdkit.wait(30)
        module_server.cli("volume", "delete", "speed", "--force")


def test_stopping_takes_little(server: Server) -> None:
    with Libnbd(server.uri()) as client:
        client.pwrite(random.Random(9).randbytes(8 * MIB), 0)
        start = time.monotonic()
        server.stop()
        print(f"stopped in {time.monotonic() - start:.2f} s")
    server.start()
    with Libnbd(server.uri()) as client:
        assert client.pread(8 * MIB, 0) == random.Random(9).randbytes(8 * MIB)
