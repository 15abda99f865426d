"""Ordinary NBD clients, none of them ours, do what they do: qemu, nbdcopy, nbdinfo, libnbd, fio, nbdfuse with ext4."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from libnbd import Libnbd, LibnbdError
from serverkit import ATOLL, Server, run, wait_for

MIB = 1 << 20


@pytest.fixture
def volume(module_server: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """A volume of 64 MiB of this test alone."""
    name = f"{request.node.name}"[:60].replace("[", "-").replace("]", "").replace("/", "-")
    module_server.cli("volume", "create", name, "64MiB")
    yield name
    module_server.cli("volume", "delete", name, "--force")


def image(path: Path, seed: int, size: int = 64 * MIB) -> Path:
    """Random runs, repeated runs and holes."""
    print("image seed", seed)
    rng = random.Random(seed)
    pattern = rng.randbytes(64 << 10)
    with open(path, "wb") as stream:
        stream.truncate(size)
        for _ in range(60):
            stream.seek(rng.randrange(size // 4096) * 4096)
            kind = rng.randrange(3)
            length = min(rng.randrange(1, 1 * MIB), size - stream.tell())
            stream.write(rng.randbytes(length) if kind else (pattern * (length // len(pattern) + 1))[:length])
    return path


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_qemu_img_both_ways(module_server: Server, volume: str, transport: str, tmp_path: Path) -> None:
    uri = module_server.uri(volume, transport)
    source = image(tmp_path / "in.raw", 1)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "out.raw")
    run("cmp", source, tmp_path / "out.raw")
    info = json.loads(run("qemu-img", "info", "--output=json", uri))
    assert info["virtual-size"] == 64 * MIB
    mapped = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", uri))
    assert any(entry["zero"] for entry in mapped)
    assert any(not entry["zero"] for entry in mapped)


def test_qemu_io(module_server: Server, volume: str) -> None:
    uri = module_server.uri(volume)

    def qemu_io(*commands: str, status: int = 0) -> str:
        return run("qemu-io", "-f", "raw", *(part for c in commands for part in ("-c", c)), uri, status=status)

    qemu_io("write -P 0x11 0 1M", "write -P 0x22 4096 4096", "write -P 0x33 5000 100", "flush")
    qemu_io("read -P 0x11 0 4096", "read -P 0x22 4096 904", "read -P 0x33 5000 100", "read -P 0x22 5100 3092")
    qemu_io("write -f -P 0x44 0 512", "read -P 0x44 0 512", "read -P 0x11 512 3584")
    qemu_io("write -z 64k 64k", "read -P 0 64k 64k", "write -z -u 128k 64k", "read -P 0 128k 64k")
    qemu_io("discard 256k 256k", "read -P 0 256k 256k", "read -P 0x11 512k 512k")
    qemu_io("write -P 0x55 63M 1M", "read -P 0x55 63M 1M")
    assert "Pattern verification failed" in qemu_io("read -P 0x99 63M 1M", status=1)
    qemu_io(
        "aio_write -P 0x66 1M 1M", "aio_write -P 0x77 2M 32M", "aio_flush", "read -P 0x66 1M 1M", "read -P 0x77 2M 32M"
    )


@pytest.mark.parametrize(
    "options", [(), ("--connections=4", "--requests=16"), ("--synchronous",), ("--flush",)], ids=str
)
def test_nbdcopy(module_server: Server, volume: str, tmp_path: Path, options: tuple[str, ...]) -> None:
    uri = module_server.uri(volume)
    source = image(tmp_path / "in.raw", 2)
    run("nbdcopy", *options, source, uri)
    run("nbdcopy", *options, uri, tmp_path / "out.raw")
    run("cmp", source, tmp_path / "out.raw")


def test_nbdcopy_from_volume_to_volume(module_server: Server, volume: str, tmp_path: Path) -> None:
    source = image(tmp_path / "in.raw", 3)
    module_server.cli("volume", "create", "other", "64MiB")
    run("nbdcopy", source, module_server.uri(volume))
    run("nbdcopy", module_server.uri(volume), module_server.uri("other", "tcp"))
    run("nbdcopy", module_server.uri("other"), tmp_path / "out.raw")
    run("cmp", source, tmp_path / "out.raw")
    # The server may not have seen the last client go yet.
    wait_for("nobody uses it", lambda: module_server.cli("volume", "delete", "other", status=None).returncode == 0)


def test_nbdinfo(module_server: Server, volume: str) -> None:
    uri = module_server.uri(volume)
    export = json.loads(run("nbdinfo", "--json", uri))["exports"][0]
    assert export["export-size"] == 64 * MIB
    for feature in (
        "can_multi_conn", "can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_df", "can_cache"
    ):  # fmt: skip
        assert export[feature] is True, feature
    assert export["is_read_only"] is False
    assert export["is_rotational"] is False
    assert "base:allocation" in export["contexts"]
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] == 32 * MIB
    assert run("nbdinfo", "--size", uri).strip() == str(64 * MIB)
    run("nbdinfo", "--is", "tls", uri, status=2)
    run("nbdinfo", "--can", "multi-conn", uri)
    names = {entry["name"] for entry in module_server.json("volume", "list")}
    listed = json.loads(run("nbdinfo", "--list", "--json", uri))["exports"]
    assert {entry["export-name"] for entry in listed} == names


def test_nbdinfo_map(module_server: Server, volume: str) -> None:
    uri = module_server.uri(volume)
    with Libnbd(uri) as client:
        client.pwrite(b"\x01" * 65536, 1 * MIB)
        client.pwrite(b"\x02" * 4096, 8 * MIB)
        client.zero(65536, 16 * MIB)
    entries = json.loads(run("nbdinfo", "--map", "--json", uri))
    assert sum(entry["length"] for entry in entries) == 64 * MIB
    data = [(entry["offset"], entry["length"]) for entry in entries if entry["type"] == 0]
    assert data == [(1 * MIB, 65536), (8 * MIB, 4096)]
    assert all(entry["type"] in (0, 2, 3) for entry in entries)


def test_libnbd(module_server: Server, volume: str) -> None:
    rng = random.Random(4)
    with Libnbd(module_server.uri(volume)) as client, Libnbd(module_server.uri(volume, "tcp")) as other:
        assert client.get_size() == 64 * MIB
        truth = bytearray(64 * MIB)
        fua = 1
        for _ in range(120):
            offset = rng.randrange(64 * MIB)
            length = min(rng.choice((1, 511, 512, 4095, 4096, 4097, 65536, 300_000, 2 * MIB)), 64 * MIB - offset)
            match rng.randrange(5):
                case 0 | 1:
                    data = rng.randbytes(length)
                    client.pwrite(data, offset, rng.choice((0, fua)))
                    truth[offset : offset + length] = data
                case 2:
                    client.zero(length, offset)
                    truth[offset : offset + length] = bytes(length)
                case 3:
                    client.flush()
                case 4:
                    assert client.pread(length, offset) == truth[offset : offset + length]
        for offset in range(0, 64 * MIB, 16 * MIB):
            # Two connections, one content: that is what multi-conn means.
            assert other.pread(16 * MIB, offset) == truth[offset : offset + 16 * MIB]
        for call in (
            lambda: client.pread(4096, 64 * MIB - 1),
            lambda: client.pwrite(b"x" * 4096, 64 * MIB - 1),
            lambda: client.trim(4096, 64 * MIB),
        ):
            with pytest.raises(LibnbdError):
                call()
        assert client.pread(1, 0) == truth[:1]


def test_errors_carry_the_protocols_codes(module_server: Server, volume: str) -> None:
    with Libnbd(module_server.uri(volume)) as client:
        client.set_strict_mode(0)  # the server is to refuse, not the library
        with pytest.raises(LibnbdError) as past_end:
            client.pread(4096, 64 * MIB)
        assert past_end.value.errno == 22  # EINVAL
        with pytest.raises(LibnbdError) as no_space:
            client.pwrite(bytes(4096), 64 * MIB)
        assert no_space.value.errno == 28  # ENOSPC
        # Refused at its header, answered behind its payload: libnbd knows no answer to what it is still sending.
        with pytest.raises(LibnbdError) as large:
            client.pwrite(bytes(24 * MIB), 64 * MIB - 4096)
        assert large.value.errno == 28
        assert client.pread(4096, 0) == bytes(4096)


def test_a_read_only_volume(module_server: Server, tmp_path: Path) -> None:
    module_server.cli("volume", "create", "ro", "1MiB", "--read-only")
    try:
        with Libnbd(module_server.uri("ro")) as client:
            assert client.is_read_only() is True
            client.set_strict_mode(0)
            for call in (
                lambda: client.pwrite(b"x" * 512, 0),
                lambda: client.trim(4096, 0),
                lambda: client.zero(4096, 0),
            ):
                with pytest.raises(LibnbdError) as refused:
                    call()
                assert refused.value.errno == 1  # EPERM
            with pytest.raises(LibnbdError) as large:
                client.pwrite(bytes(1 * MIB), 0)
            assert large.value.errno == 1
            assert client.pread(512, 0) == bytes(512)
    finally:
        module_server.cli("volume", "delete", "ro", "--force")


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_fio_verifies(module_server: Server, volume: str, transport: str, tmp_path: Path) -> None:
    out = run(
        "fio", "--name=v", "--ioengine=nbd", f"--uri={module_server.uri(volume, transport)}", "--rw=randrw",
        "--bsrange=4k-128k", "--bs_unaligned=0", "--size=32m", "--iodepth=16", "--verify=crc32c",
        "--verify_state_save=0", "--verify_fatal=1",
        "--do_verify=1", "--randseed=5", "--output-format=normal", cwd=tmp_path,
    )  # fmt: skip
    assert "err= 0" in out, out


def test_a_file_system(module_server: Server, volume: str, tmp_path: Path) -> None:
    if not Path("/dev/fuse").exists() or not Path("/dev/loop-control").exists() or run("id", "-u").strip() != "0":
        pytest.skip("needs root, FUSE and loop devices")
    fuse, mount = tmp_path / "fuse", tmp_path / "mnt"
    fuse.mkdir()
    mount.mkdir()
    mounted, loop = False, ""
    nbdfuse = subprocess.Popen(["nbdfuse", str(fuse), module_server.uri(volume)])
    try:
        wait_for("nbdfuse has mounted", lambda: (fuse / "nbd").exists() or nbdfuse.poll() is not None)
        assert nbdfuse.poll() is None
        loop = run("losetup", "--find", "--show", fuse / "nbd").strip()
        run("mkfs.ext4", "-q", "-F", loop)
        run("mount", loop, mount)
        mounted = True
        source = Path(__file__).resolve().parent
        for copy in ("one", "two"):
            shutil.copytree(source, mount / copy, ignore=shutil.ignore_patterns("__pycache__"))
        run("sync", "-f", mount)
        run("umount", mount)
        mounted = False
        run("e2fsck", "-f", "-n", loop)
        run("mount", "-o", "ro", loop, mount)
        mounted = True
        run("diff", "-r", "-x", "__pycache__", source, mount / "two")
    finally:
        if mounted:
            run("umount", mount)
        if loop:
            run("losetup", "--detach", loop)
        if nbdfuse.poll() is None:
            run("fusermount3", "-u", fuse, status=None)
        nbdfuse.wait(30)


def test_a_server_for_one_command(make_server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Socket activation: nbdinfo makes the socket, starts the server, asks, and ends it."""
    server: Server = make_server(config={"volumes": [{"name": "disk", "size": "32MiB"}]})
    command = [part for part in server.command() if part not in ("--listen", "127.0.0.1:0")]
    at = command.index("--unix")
    del command[at : at + 2]
    out = run("nbdinfo", "--size", "--", "[", *command, "]")
    assert out.splitlines()[-1] == str(32 * MIB), out
    wait_for("the server has ended", lambda: not server.pids())
    # And once more: what it left behind is no hindrance.
    assert run("nbdinfo", "--size", "--", "[", *command, "]").splitlines()[-1] == str(32 * MIB)
    wait_for("the server has ended", lambda: not server.pids())
    server.note_instance()


def test_several_listeners(make_server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    sockets = [str(tmp_path / "one"), str(tmp_path / "two")]
    server: Server = make_server(config={"listen": ["127.0.0.1:0", "[::1]:0"], "unix": sockets}).start()
    uris = next(entry["uris"] for entry in server.json("volume", "list") if entry["name"] == "disk")
    assert len(uris) == 4
    assert sum("[::1]" in uri for uri in uris) == 1
    for number, uri in enumerate(uris):
        with Libnbd(uri) as client:
            client.pwrite(bytes([number + 1]) * 4096, number * 4096)
    with Libnbd(uris[0]) as client:
        for number in range(4):
            assert client.pread(4096, number * 4096) == bytes([number + 1]) * 4096


def test_ps_watches(module_server: Server) -> None:
    """On a terminal, until interrupted."""
    master, slave = os.openpty()
    command = [str(ATOLL), "ps", "--watch", "--interval", "0.05", "--data", str(module_server.data)]
    watch = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while shown.count(b"dedup") < 3:
            shown += os.read(master, 65536)
        watch.send_signal(signal.SIGINT)
        while watch.poll() is None:
            try:
                os.read(master, 65536)
            except OSError:  # the other end is closed
                break
        assert watch.wait(10) in (0, 130)
        assert b"serving" in shown, "a terminal of 80 columns is wide enough"
    finally:
        watch.kill()
        watch.wait()
        os.close(master)
    assert b"Traceback" not in shown
