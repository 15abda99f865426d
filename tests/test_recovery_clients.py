"""Ordinary clients, none with a reconnect option, while each role in turn is killed every 0.3 s: nothing fails, every
byte is right."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from recoverykit import LONG, MIB, ROLES, Eyes, check_all, check_nothing_left, send
from serverkit import Server, run, wait_for

INTERVAL_S = 0.3


@pytest.fixture
def volume(module_server: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.name.replace("[", "-").replace("]", "")
    module_server.cli("volume", "create", name, "128MiB")
    yield name
    module_server.cli("volume", "delete", name, "--force")
    check_all(module_server)
    check_nothing_left(module_server)


class Killing:
    """Kills each role in turn, from a thread, until the block ends, which is long enough for `least` kills."""

    def __init__(self, server: Server, least: int = 5) -> None:
        self.server, self.least, self.kills = server, least, 0
        self._end = threading.Event()
        self._eyes = Eyes(server)
        self._thread = threading.Thread(target=self._run, name="killing")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        self._eyes.__exit__()
        print(self.kills, "kills")
        assert kind is not None or self.kills >= self.least, f"the client was done after {self.kills} kills"

    def _run(self) -> None:
        for role in itertools.cycle(ROLES):
            if self._end.wait(INTERVAL_S):
                return
            send(self._eyes.pid(role), signal.SIGKILL)
            self.kills += 1


def image(path: Path, seed: int, size: int = 128 * MIB) -> Path:
    """Random blocks, repeated ones and holes."""
    chance = random.Random(seed)
    repeated = chance.randbytes(256 << 10)
    with open(path, "wb") as stream:
        for _ in range(0, size, MIB):
            kind = chance.randrange(4)
            stream.write(bytes(MIB) if kind == 0 else repeated * 4 if kind == 1 else chance.randbytes(MIB))
    return path


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_qemu_img(module_server: Server, volume: str, transport: str, tmp_path: Path) -> None:
    uri = module_server.uri(volume, transport)
    source = image(tmp_path / "in.raw", 1)
    with Killing(module_server) as killing:
        while True:
            run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "out.raw")
            run("cmp", source, tmp_path / "out.raw")
            if killing.kills >= 6 * LONG:
                break


def test_qemu_io(module_server: Server, volume: str) -> None:
    uri = module_server.uri(volume)
    commands = []
    for number in range(60):
        at, pattern = number * 2, number % 250 + 1
        commands += [f"aio_write -P {pattern} {at}M 1M", f"aio_write -P {pattern} {at}M 64k", "aio_flush"]
        commands += [f"read -P {pattern} {at}M 1M", f"write -z {at}M 4k", f"read -P 0 {at}M 4k", "sleep 30"]
        commands += [f"discard {at + 1}M 512k", "flush"]
    with Killing(module_server):
        printed = run("qemu-io", "-f", "raw", *(part for each in commands for part in ("-c", each)), uri)
    assert "failed" not in printed and "rror" not in printed, printed[-3000:]


def test_nbdcopy(module_server: Server, volume: str, tmp_path: Path) -> None:
    source = image(tmp_path / "in.raw", 2)
    with Killing(module_server) as killing:
        for number in itertools.count():
            uri = module_server.uri(volume, "tcp" if number % 2 else "unix")
            run("nbdcopy", "--flush", source, uri)
            run("nbdcopy", uri, tmp_path / "out.raw")
            run("cmp", source, tmp_path / "out.raw")
            if killing.kills >= 6 * LONG:
                break


def test_fio_with_verify(module_server: Server, volume: str) -> None:
    with Killing(module_server):
        run(
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={module_server.uri(volume)}", "--rw=randwrite",
            "--bsrange=4k-64k", "--size=128M", "--iodepth=16", "--verify=crc32c",
            "--verify_state_save=0", "--verify_fatal=1", "--do_verify=1",
            "--verify_backlog=64", "--fsync=200", "--rate=20M", "--randseed=5",
        )  # fmt: skip


@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="no /dev/fuse")
def test_ext4_on_nbdfuse(module_server: Server, volume: str, tmp_path: Path) -> None:
    """A file system on a file of nbdfuse, mounted by loop where that is permitted; else made, filled and checked."""
    mountpoint, disk = tmp_path / "fuse", tmp_path / "fuse" / "nbd"
    mountpoint.mkdir()
    tree = tmp_path / "tree"
    tree.mkdir()
    chance = random.Random(7)
    for number in range(150):
        (tree / f"f{number}").write_bytes(chance.randbytes(chance.randrange(200_000)))
    with open(tmp_path / "nbdfuse.log", "wb") as log:
        fuse = subprocess.Popen(["nbdfuse", str(mountpoint), module_server.uri(volume)], stdout=log, stderr=log)
    try:
        wait_for("nbdfuse has mounted", lambda: fuse.poll() is not None or disk.exists())
        if fuse.poll() is not None:
            pytest.skip("nbdfuse cannot mount here: " + (tmp_path / "nbdfuse.log").read_text())
        with Killing(module_server) as killing:
            run("mkfs.ext4", "-q", "-F", "-b", "4096", disk)
            if not through_a_mount(disk, tmp_path / "mnt", tree):
                print("not mounted")
                run("mkfs.ext4", "-q", "-F", "-b", "4096", "-d", tree, disk)
            while killing.kills < 6 * LONG:
                run("e2fsck", "-f", "-n", disk)
    finally:
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=False)
        fuse.wait(30)
    assert fuse.returncode == 0, (tmp_path / "nbdfuse.log").read_text()


def through_a_mount(disk: Path, mountpoint: Path, tree: Path) -> bool:
    """Fills a mounted file system, unmounts it, mounts it again and compares. False where mounting is not permitted."""
    mountpoint.mkdir()
    mount = ["mount", "-o", "loop", str(disk), str(mountpoint)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        return False
    try:
        for round_ in range(3):
            shutil.copytree(tree, mountpoint / f"tree{round_}")
            run("sync", "-f", mountpoint)
            if round_:
                shutil.rmtree(mountpoint / f"tree{round_ - 1}")
        run("umount", mountpoint)
        run(*mount)
        run("diff", "-r", tree, mountpoint / "tree2")
    finally:
        subprocess.run(["umount", str(mountpoint)], check=False, capture_output=True)
    return True
