"""Power loss at any moment: the server under load, its disk's writes and flushes recorded, and from the record each
device that could be left. What a FLUSH or FUA acknowledged is there; the rest is some state that the order of flushes
allows.

Thousands of devices are read by the offline checker (services/dedup/check), a second implementation of the format,
which also finds every inconsistency; a few are served by a whole server as well. `make powerloss` does more of both:
ATOLL_POWERLOSS_STATES, _SERVERS, _OPERATIONS; _SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from nbdclient import Connection
from powerlosskit import BLOCK, History, Load, configuration, digest, volumes_found
from serverkit import Server, write_device

from atoll.drivers.fault.powerloss import LossyDevice
from atoll.drivers.fault.record import Event, read_record
from atoll.services.dedup.check.audit import audit, verify_data
from atoll.services.dedup.check.image import MemoryImage
from atoll.services.dedup.check.reader import LogReader, Report, Store

STATES = int(os.environ.get("ATOLL_POWERLOSS_STATES", "2000"))
SERVERS = int(os.environ.get("ATOLL_POWERLOSS_SERVERS", "6"))
OPERATIONS = int(os.environ.get("ATOLL_POWERLOSS_OPERATIONS", "700"))
SEED = int(os.environ.get("ATOLL_POWERLOSS_SEED", "0")) or random.randrange(1 << 32)


def judge(image: np.ndarray, history: History, position: int, reader: LogReader) -> list[str]:
    """What is wrong with a device that was cut off at that byte of the record."""
    report = Report()
    store = Store.read(MemoryImage(image), report, reader)
    if store is None:
        return [] if position < history.ready else [report.fatal]
    totals = audit(store, report)
    verify_data(store, report, totals)
    return [finding.text for finding in report.findings] + history.judge(store, position)


def recorded(make_server: Callable[..., Server], tmp_path: Path) -> tuple[Server, list[Event], History]:
    record = tmp_path / "record"
    server = make_server(config=configuration(record)).start()
    load = Load(server, record, SEED)
    victims = sorted(load.choose.sample(range(OPERATIONS), 2))
    for number, end in enumerate([*victims, OPERATIONS]):
        load.run(end - load.history.operations, last=end == OPERATIONS)
        if end != OPERATIONS:
            server.kill(("dedup", "disk")[number])
    server.stop()
    return server, read_record(record), load.history


def test_power_loss_at_any_moment(make_server: Callable[..., Server], tmp_path: Path) -> None:
    print(f"seed {SEED} (ATOLL_POWERLOSS_SEED)")
    server, events, history = recorded(make_server, tmp_path)
    size = (server.data / "device.img").stat().st_size
    chance = random.Random(SEED + 1)
    print(f"{history.operations} operations, {history.flushes} flushes")
    image = lose_power(make_server, events, history, np.zeros(size, np.uint8), STATES, SERVERS, chance)

    # And once more on what it left: the start, the replay of the log, the checkpoint after it, a load.
    record = tmp_path / "again"
    again = on_device(make_server, image, record)
    load = Load(again, record, SEED + 2, made=(), found=volumes_found(again, history))
    load.run(OPERATIONS // 5)
    again.stop()
    lose_power(make_server, read_record(record), load.history, image, STATES // 4, SERVERS // 4, chance)


def lose_power(
    make_server: Callable[..., Server],
    events: list[Event],
    history: History,
    base: np.ndarray,
    states: int,
    servers: int,
    chance: random.Random,
) -> np.ndarray:
    """Judges `states` devices, of any moment, and has some served. Returns one of them."""
    device, reader = LossyDevice(base.copy()), LogReader()
    # Where little is volatile there are few devices to tell apart.
    counter = LossyDevice(base.copy())
    weights = []
    for event in events:
        counter.feed(event)
        weights.append(1 + min(counter.volatile_blocks, 8))
    share = states / sum(weights)
    with_server = set(chance.sample(range(len(events)), min(servers, len(events))))
    chosen, kept = chance.randrange(len(events) // 2, len(events)), None
    position, judged, volatile = 0, 0, 0
    for index, event in enumerate(events):
        device.feed(event)
        position += 40 + len(event.data)
        wanted = share * weights[index]
        for _ in range(int(wanted) + (chance.random() < wanted % 1)):
            seeded = chance.getrandbits(32)
            with device.lost(random.Random(seeded)) as how:
                wrong = judge(device.image.reshape(-1), history, position, reader)
            assert not wrong, f"event {index}, state {seeded}, {how}:\n" + "\n".join(wrong[:20])
            judged += 1
            volatile += device.volatile_blocks
        if index in with_server and position >= history.ready:
            with device.lost(chance) as how:
                serve(make_server, device.image, history, position, f"event {index}, {how}")
        if index == chosen:
            with device.lost(chance):
                kept = device.image.reshape(-1).copy()
    print(f"{judged} devices of {len(events)} moments, {volatile / max(1, judged):.1f} volatile blocks in the mean")
    assert judged > states * 0.8 and kept is not None
    return kept


def on_device(make_server: Callable[..., Server], image: np.ndarray, record: Path | None = None) -> Server:
    """A server on a device with that content; with `record` its disk records."""
    server = make_server(config=configuration(record) if record else {**configuration(Path()), "testing": {}})
    server.data.mkdir()
    write_device(server.data / "device.img", image)
    return server.start()


def serve(make_server: Callable[..., Server], image: np.ndarray, history: History, position: int, what: str) -> None:
    """The whole server on that device: it starts, its own check finds nothing, reads return what is allowed."""
    server = on_device(make_server, image)
    assert server.json("check", "--live")["ok"], what
    there = {volume["name"] for volume in server.json("status")["volumes"]}
    for volume in history.volumes:
        if volume.name not in there:
            continue
        with Connection.open(str(server.socket), timeout_s=60) as connection:
            connection.negotiate(volume.name)
            for lba, block in volume.blocks.items():
                found = digest(connection.read(lba * BLOCK, BLOCK))
                assert found in block.allowed(position), f"{what}: {volume.name} {lba}"
    server.stop()
    shutil.rmtree(server.data)


def test_the_oracle_sees_a_lost_flush(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """A device that forgets one sector that was flushed is found out, wherever that is: the test can fail."""
    server, events, history = recorded(make_server, tmp_path)
    chance = random.Random(SEED)
    size = (server.data / "device.img").stat().st_size
    device, position, written = LossyDevice(np.zeros(size, np.uint8)), 0, []
    for event in events:
        device.feed(event)
        position += 40 + len(event.data)
        if event.kind == "write":
            written.append(event)
    assert not judge(device.image.reshape(-1), history, position, LogReader())
    seen = 0
    for event in chance.sample(written, 60):
        sector = device.image[event.offset_bytes // 512]
        kept = sector.copy()
        sector[:] = 0
        seen += bool(judge(device.image.reshape(-1), history, position, LogReader()))
        sector[:] = kept
    assert seen, "not one of 60 lost sectors mattered"
