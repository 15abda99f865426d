"""Metadata larger than memory: the server on the device of a full store, with a cache for a small part of its metadata.

ATOLL_PAGING_GIB=1024 (make paging) takes 4.5 GB of disk and a minute: a volume of 1 TiB, the default configuration,
and the budget of memory that README.md states.
"""

import os
import random
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import forgekit
import pytest
import xxhash
from memorykit import memory
from nbdclient import CommandFlag, Connection, NbdError
from recoverykit import patiently
from serverkit import Server

BLOCK = 4096
GIB = 1 << 30
BUDGET = 512 << 20
LARGE_GIB = int(os.environ.get("ATOLL_PAGING_GIB", "0"))


def content(number: int) -> bytes:
    return struct.pack("<Q", number) * (BLOCK // 8)


class Model:
    """What the volume holds: zeros, but for what was written since."""

    def __init__(self, server: Server, blocks: int, seed: int) -> None:
        self.server, self.blocks, self.random = server, blocks, random.Random(seed)
        self.written: dict[int, bytes] = {}
        print("seed", seed)

    def connect(self) -> Connection:
        connection = Connection.open(str(self.server.socket), timeout_s=60)
        connection.negotiate("disk")
        return connection

    def expected(self, lba: int, count: int) -> bytes:
        return b"".join(self.written.get(each, bytes(BLOCK)) for each in range(lba, lba + count))

    def work(self, connection: Connection, operations: int) -> None:
        for _ in range(operations):
            lba, what = self.random.randrange(self.blocks - 64), self.random.randrange(10)
            if what < 5:
                count = self.random.choice([1, 1, 1, 16, 64])
                data = b"".join(
                    content(self.random.randrange(1, 50) if what == 0 else self.random.getrandbits(63))
                    for _ in range(count)
                )
                connection.write(lba * BLOCK, data)
                self.written.update({lba + each: data[each * BLOCK : (each + 1) * BLOCK] for each in range(count)})
            elif what < 6:
                count = self.random.choice([1, 700])
                count = min(count, self.blocks - lba)
                connection.trim(lba * BLOCK, count * BLOCK)
                for each in range(lba, lba + count):
                    self.written.pop(each, None)
            else:
                assert connection.read(lba * BLOCK, 64 * BLOCK) == self.expected(lba, 64)

    def verify(self, connection: Connection) -> None:
        for lba in self.random.sample(sorted(self.written), min(len(self.written), 300)):
            assert connection.read(lba * BLOCK, BLOCK) == self.written[lba], f"block {lba}"


def forged(folder: Path, gib: int, distinct: int) -> str:
    path = folder / "device.img"
    forgekit.forge(path, gib * GIB + (GIB if gib < 1024 else 0), gib * GIB, distinct)
    return str(path)


@pytest.mark.slow
def test_a_cache_far_smaller_than_the_metadata(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """512 pages of memory for 4,096 leaves, and as many of counts and fingerprints; kills, a death of all, a stop."""
    config = {
        "device": forged(tmp_path, 8, 1 << 20),
        "volumes": [],
        "dedup": {"metadata_cache_bytes": "2MiB"},
        "testing": {"crash_points": True},
    }
    server = make_server(config=config).start()
    model = Model(server, 8 * GIB // BLOCK, random.randrange(1 << 32))
    with model.connect() as connection:
        for number in range(4):
            if number == 1:
                patiently(server, "crash-point", name="dedup.store.page.read")
            model.work(connection, 120)
            server.kill("dedup")
        connection.flush()
        model.verify(connection)
    rows = {row["role"]: row for row in patiently(server, "ps")["domains"]}
    assert rows["dedup"]["incarnation"] == 1 + 4 + 1, "it died where a page is read, too"
    assert server.json("check", "--live")["count"] == 0
    server.die()
    server.start()
    with model.connect() as connection:
        model.verify(connection)
        model.work(connection, 80)
    server.stop()
    server.start()
    with model.connect() as connection:
        model.verify(connection)
    assert server.json("check", "--live")["count"] == 0


def damage(path: str, slot: int, copies: int) -> None:
    """Flips bits of a metadata page, in one copy or in both."""
    with open(path, "r+b") as file:
        file.seek(BLOCK)
        fields = file.read(512)
        first, second = struct.unpack_from("<QQ", fields, 288)
        for base in (first, second)[:copies]:
            file.seek((base + slot) * BLOCK + 100)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0x40]))


def test_a_damaged_page_is_repaired_or_named(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """The first leaves lie in the first slots of the forged store: 8, 9, ..."""
    path = forged(tmp_path, 8, 1 << 16)
    damage(path, 8, 1)
    damage(path, 9, 2)
    server = make_server(config={"device": path, "volumes": []}).start()
    with Connection.open(str(server.socket), timeout_s=60) as connection:
        connection.negotiate("disk")
        assert connection.read(0, BLOCK) == bytes(BLOCK)  # from the other copy
        for call in (
            lambda: connection.read(512 * BLOCK, BLOCK),
            lambda: connection.write(600 * BLOCK, content(1), CommandFlag.FUA),  # one that is not awaited: test_bit_rot
        ):
            with pytest.raises(NbdError) as error:
                call()
            assert (
                error.value.code == 5
                and "page of metadata" in str(error.value)
                and "0x400000000000001" in str(error.value)
            )
        assert connection.read(1024 * BLOCK, BLOCK) == bytes(BLOCK)  # its neighbours are as they were
        connection.write(5 * BLOCK, content(5))
        connection.flush()
        assert connection.read(5 * BLOCK, BLOCK) == content(5)
    assert server.json("check", "--live", status=1)["inconsistencies"] != []


def test_a_store_of_the_first_release_is_refused(make_server: Callable[..., Server], tmp_path: Path) -> None:
    path = forged(tmp_path, 2, 1 << 16)
    with open(path, "r+b") as file:
        for place, block in ((1, 1), (3, 3 * GIB // BLOCK - 1)):
            file.seek(block * BLOCK)
            fields = bytearray(file.read(512))
            struct.pack_into("<I", fields, 16, 1)
            struct.pack_into("<Q", fields, 0, xxhash.xxh3_64_intdigest(bytes(fields[8:]), forgekit.seed(1, 0, place)))
            file.seek(block * BLOCK)
            file.write(fields)
    server = make_server(config={"device": path, "volumes": []})
    done = subprocess.run(server.command(), capture_output=True, text=True, timeout=60)
    text = done.stdout + done.stderr
    assert done.returncode != 0
    assert "format version 1" in text and "0.1.0" in text and "nbdcopy" in text


@pytest.mark.skipif(LARGE_GIB == 0, reason="make paging")
def test_memory_stays_within_the_budget(make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server()
    server.config = {"device": forged(tmp_path, LARGE_GIB, 1 << 22), "volumes": []}  # all else by default
    begin = time.monotonic()
    server.start()
    print(f"\nstart: {time.monotonic() - begin:.1f} s")
    model = Model(server, LARGE_GIB * GIB // BLOCK, random.randrange(1 << 32))
    for _ in range(4):
        with model.connect() as connection:
            model.work(connection, 3000)
            connection.flush()
            model.verify(connection)
        print(memory(server))
        assert memory(server).total <= BUDGET
    server.die()
    begin = time.monotonic()
    server.start()
    print(f"start after the death of all: {time.monotonic() - begin:.1f} s; {memory(server)}")
    with model.connect() as connection:
        model.verify(connection)
    assert memory(server).total <= BUDGET
