"""More pages of metadata are wanted at once than find room in memory: who waits takes none from who is waited for."""

from __future__ import annotations

import random
from typing import Any

from dedupkit import BLOCK, OK, Stage

from atoll.ipc._ipc import lib

LEAF = 512 * BLOCK  # what one page of the map says
FAR = 17 * LEAF
SETTINGS: dict[str, Any] = {"device_blocks": 24576, "nic_pages": 1500, "frames": 128, "destage_delay_ms": 10_000_000}


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def test_what_waits_for_destage_leaves_it_the_pages_it_needs() -> None:
    """Blocks that lie far apart are written at once, when no page of counts is in memory."""
    with Stage(**SETTINGS) as stage:
        stage.open()
        volume = stage.create_volume("v", 200 * FAR)
        for at in range(0, 1024, 16):
            stage.write(volume, at * BLOCK, b"".join(block(at + index) for index in range(16)))
            stage.run_until_idle()
        device = stage.close_store()
    with Stage(**SETTINGS) as stage:
        stage.device[:] = device
        stage.open()
        requests = [stage.write(volume, number * FAR, block(10_000 + number)) for number in range(130)]
        for _ in range(3000):
            stage.turn()
            stage.disk()
            stage.answers()
            if not stage.requests:
                break
        assert all(request.status == OK for request in requests), f"{len(stage.requests)} writes are not answered"
        stage.check()


def test_it_sleeps_while_the_device_does_nothing() -> None:
    with Stage(**SETTINGS) as stage:
        stage.open()
        volume = stage.create_volume("v", 200 * FAR)
        stage.run_until_idle()
        requests = [stage.write(volume, number * FAR, block(number)) for number in range(100)]
        assert any(not stage.turn() for _ in range(200)), "it does not rest"
        assert stage.figures().waiting != 0
        stage.run_until_idle()
        assert all(request.status == OK for request in requests)


def test_what_the_map_no_longer_needs_can_be_used_again() -> None:
    """As many pages of the map as may be are used, far fewer than memory has room for. Then all is trimmed."""
    with Stage(device_blocks=2304, nic_pages=1024, frames=1024) as stage:
        stage.open()
        volume = stage.create_volume("v", 4000 * LEAF)
        count = 0
        while True:
            request = stage.write(volume, count * LEAF, block(count))
            stage.run_until_idle()
            if request.status != OK:
                break
            count += 1
        assert request.status == lib.ATOLL_ENOSPC and stage.figures().available_blocks > 1000
        stage.drain()
        for number in range(count):
            stage.trim(volume, number * LEAF, LEAF)
        stage.run_until_idle()
        statuses = []
        for number in range(count):  # the first one that finds no room asks for the checkpoint that makes it
            request = stage.write(volume, (1024 + number) * LEAF, block(number))
            stage.drain()
            statuses.append(request.status)
        assert statuses[1:] == [OK] * (count - 1)
        stage.check()
