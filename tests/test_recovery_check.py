"""`atoll check --live`: agrees after kills, and says what does not agree."""

from __future__ import annotations

import os

from recoverykit import DOMAINS, Eyes, Load
from serverkit import Server

from atoll.ipc import objects
from atoll.ipc._ipc import ffi


def test_after_each_kill(module_server: Server) -> None:
    with Eyes(module_server) as eyes, Load(module_server, size=32 << 20) as load:
        for role in DOMAINS * 3:
            eyes.wait_serving(eyes.kill(role))
            assert "agree" in module_server.cli("check", "--live").stdout
            load.goes_on(role, 20)
    assert module_server.json("check", "--live") == {"ok": True, "count": 0, "inconsistencies": []}


def test_usage(module_server: Server) -> None:
    assert "atoll check --live" in module_server.cli("check", status=3).stderr
    assert "--repair" in module_server.cli("check", "--live", "--repair", status=2).stderr


def test_it_says_what_is_wrong(module_server: Server) -> None:
    """A count is changed behind dedup's back, and put right again."""
    with Eyes(module_server) as eyes:
        header = eyes.views["dedup"].header
        place = int(header.role_offset) + ffi.offsetof("struct atoll_dedup_public", "volumes")
    place += ffi.offsetof("struct atoll_volume", "mapped_blocks")
    instance = int(module_server.json("status")["instance"], 16)
    descriptor = objects.open_writable(objects.arena_name(instance, "dedup"))
    try:
        right = os.pread(descriptor, 8, place)
        os.pwrite(descriptor, (int.from_bytes(right, "little") + 5).to_bytes(8, "little"), place)
        answer = module_server.cli("check", "--live", status=1).stdout
        found = module_server.json("check", "--live", status=1)
        os.pwrite(descriptor, right, place)
    finally:
        os.close(descriptor)
    assert "volume 0" in answer and found["count"] == 1 and found["inconsistencies"] == answer.splitlines()
    module_server.cli("check", "--live")
