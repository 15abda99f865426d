"""`atoll scrub` and `atoll du`: what they find, that they survive kills, and what a damaged block looks like."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from nbdclient import Connection, NbdError
from serverkit import ATOLL, Server, wait_for

from atoll.kernel.client import Client

BLOCK = 4096
CONFIG = {"device_size": "256MiB", "volumes": [{"name": "disk", "size": "64MiB"}, {"name": "two", "size": "64MiB"}],
          "dedup": {"metadata_log_bytes": "1MiB"}}  # fmt: skip


def content(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK)


def write(server: Server, volume: str, at: int, numbers: range) -> None:
    with Connection.open(str(server.socket), timeout_s=60) as connection:
        connection.negotiate(volume)
        for first in range(0, len(numbers), 64):
            some = numbers[first : first + 64]
            connection.write((at + first) * BLOCK, b"".join(map(content, some)))
        connection.flush()


def call(server: Server, verb: str, **fields: Any) -> Any:
    with Client(server.data, timeout_s=30) as client:
        return client.call("call", role="dedup", message={"call": verb, **fields})["answer"]


def place(server: Server, volume: str, lba: int) -> int:
    """PBA of a block that is on the device."""
    (value,) = struct.unpack("<Q", call(server, "map", name=volume, first=lba, count=1)["values"])
    assert value >> 60 == 1
    return value & (1 << 60) - 1


def flip(server: Server, pba: int, byte: int = 1000) -> None:
    with open(server.data / "device.img", "r+b", buffering=0) as device:
        device.seek(pba * BLOCK + byte)
        (old,) = device.read(1)
        device.seek(pba * BLOCK + byte)
        device.write(bytes([old ^ 0x10]))


def test_a_scrub_reads_every_stored_block(make_server: Callable[..., Server]) -> None:
    server = make_server(config=CONFIG).start()
    write(server, "disk", 0, range(1000))
    write(server, "two", 100, range(500, 1200))
    found = server.json("scrub", "--rate", "0")
    assert found["state"] == "done" and found["damaged_count"] == found["lost_pages"] == 0
    assert found["verified_bytes"] == found["stored_bytes"] == 1200 * BLOCK
    assert "none is damaged" in server.cli("scrub", "--rate", "0").stdout
    status = server.json("status")
    assert status["scrub"]["number"] == 2 and status["scrub"]["state"] == "done"
    assert "4.69 MiB of 4.69 MiB are right" in server.cli("status").stdout
    kept = server.data / "scrub.json"
    ended_s = status["scrub"]["ended_s"]
    wait_for("the result is kept", lambda: kept.exists() and json.loads(kept.read_text())["ended_s"] == ended_s)
    server.stop()
    server.start()
    again = server.json("status")["scrub"]
    assert again["state"] == "done" and again["ended_s"] == status["scrub"]["ended_s"]
    assert again["verified_bytes"] == 1200 * BLOCK


def test_a_damaged_block_is_named_and_never_served(make_server: Callable[..., Server]) -> None:
    """Found on the device though the cache still has it; read from there it is an EIO, for all that share it."""
    server = make_server(config=CONFIG).start()
    write(server, "disk", 0, range(300))
    write(server, "two", 50, range(300))
    bad = place(server, "disk", 17)
    assert place(server, "two", 67) == bad
    flip(server, bad)
    found = server.json("scrub", "--rate", "0", status=1)
    assert found["damaged_count"] == 1 and found["verified_bytes"] == 299 * BLOCK
    (damaged,) = found["damaged"]
    assert damaged["pba"] == bad and damaged["referrer_count"] == 2
    assert damaged["referrers"] == [{"volume": "disk", "lba": 17}, {"volume": "two", "lba": 67}]
    assert "1 block is damaged" in server.cli("status").stdout
    said = server.cli("scrub", "--rate", "0", status=1).stdout
    assert f"block {bad} is not what was stored; it is disk block 17, two block 67" in said
    server.stop()
    offline = server.json("check", "--verify-data", status=1)
    assert [one["block"] for one in offline["findings"]] == [bad]
    server.start()  # nothing is cached
    for volume, lba in (("disk", 17), ("two", 67)):
        with Connection.open(str(server.socket)) as connection:
            connection.negotiate(volume)
            with pytest.raises(NbdError) as error:
                connection.read((lba - 5) * BLOCK, 10 * BLOCK)
            assert error.value.code == 5 and error.value.offset == lba * BLOCK
            assert f'volume "{volume}", at LBA {lba}: the stored data' in str(error.value)
            assert f"(address {bad})" in str(error.value)
            assert connection.read((lba + 1) * BLOCK, BLOCK) == content(18)
        line = f"a block on the device is not what was stored, pba {bad}, volume {volume}, lba {lba}"
        wait_for("the log names it", lambda line=line: line in server.log.read_text())


def test_a_scrub_goes_on_over_kills(make_server: Callable[..., Server]) -> None:
    server = make_server(config=CONFIG).start()
    write(server, "disk", 0, range(2000))
    bad = [place(server, "disk", lba) for lba in (5, 1000, 1990)]
    for pba in bad:
        flip(server, pba)
    # A batch of 256 KiB a second: it outlasts the kills, however long they take here.
    number = server.json("scrub", "--rate", "256KiB", "--background")["number"]
    for role in ("dedup", "disk", "dedup", "kernel", "disk", "dedup"):
        seen = call(server, "scrub-status")["verified_bytes"]

        def goes_on(seen: int = seen) -> bool:
            now = call(server, "scrub-status")
            return now["verified_bytes"] > seen or now["state"] == "done"

        wait_for("the scrub goes on", goes_on)
        server.kill(role)
    if call(server, "scrub-status")["state"] != "done":
        server.json("scrub", "--rate", "0", "--background", status=None)  # the same one, faster
    wait_for("the scrub ends", lambda: call(server, "scrub-status")["state"] == "done")
    found = call(server, "scrub-status")
    assert found["number"] == number
    assert sorted(one["pba"] for one in found["damaged"]) == sorted(bad)
    assert found["verified_bytes"] == (2000 - 3) * BLOCK
    assert server.json("check", "--live")["ok"]


def test_a_scrub_under_load_blames_nobody(make_server: Callable[..., Server]) -> None:
    """Blocks that are overwritten and freed while it reads are no damage."""
    server = make_server(config=CONFIG).start()
    write(server, "disk", 0, range(1500))
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    with Connection.open(str(server.socket), timeout_s=60) as connection:
        connection.negotiate("disk")
        server.json("scrub", "--rate", "2MiB", "--background")
        for number in range(400):
            connection.write(choose.randrange(1500) * BLOCK, content(10000 + choose.randrange(500)))
            if number % 20 == 0:
                connection.flush()
        server.json("scrub", "--rate", "0")
    assert server.json("scrub", "--cancel")["state"] == "done"
    server.json("scrub", "--rate", "4096", "--background")
    assert server.json("scrub", "--cancel")["state"] == "cancelled"
    assert server.json("scrub", "--rate", "0")["state"] == "done"


def test_du_tells_what_is_shared(make_server: Callable[..., Server]) -> None:
    server = make_server(config=CONFIG).start()
    write(server, "disk", 0, range(400))
    write(server, "disk", 1000, range(100))  # its own duplicates
    write(server, "two", 3, range(300, 900))
    expected = {
        "disk": {"mapped": 500, "alone": 400, "shared": 100, "freed": 300},
        "two": {"mapped": 600, "alone": 600, "shared": 100, "freed": 500},
    }

    def figures(document: Any) -> Any:
        keys = ("mapped", "alone", "shared", "freed")
        return {row["name"]: {key: row[f"{key}_bytes"] // BLOCK for key in keys} for row in document["volumes"]}

    found = server.json("du")
    assert figures(found) == expected
    assert found["stored_bytes"] == 900 * BLOCK
    rows = {line.split()[0]: line.split()[1:] for line in server.cli("du").stdout.splitlines()}
    assert rows["two"] == ["2.34", "MiB", "2.34", "MiB", "400", "KiB", "1.95", "MiB"]
    assert rows["all"][:4] == ["4.3", "MiB", "3.91", "MiB"]
    server.stop()
    assert figures(server.json("du")) == expected, "the same of the device alone"


def test_du_is_begun_again_after_a_kill(make_server: Callable[..., Server]) -> None:
    server = make_server(config=CONFIG).start()
    write(server, "disk", 0, range(200))
    for _ in range(5):
        asking = subprocess.Popen([str(ATOLL), "du", "--json", "--data", str(server.data)], stdout=subprocess.PIPE)
        server.kill("dedup")
        out, _ = asking.communicate(timeout=60)
        assert asking.returncode == 0 and b'"alone_bytes": 819200' in out
