"""SIGKILL of the storage driver with its queue full, again and again: each request is answered once, contents are
right, and nothing moves after an answer.

What would betray a mistake:
- a completion twice or never         the set of requests in flight
- a read answered before it is done   the contents at its answer
- a read landing late                 each buffer is filled with a pattern at its answer and looked at when used again
- a write landing late                its source is spoilt at its answer, the place rewritten; contents at the end
"""

from __future__ import annotations

import os
import random
import time

import pytest
from diskkit import BLOCK, IO_COUNT, OK, READ, SYNC, WRITE, Stage, open_device

from atoll.ipc import physmap, uring
from atoll.ipc._ipc import lib

ENGINES = ["io_uring", "threads"] if uring.available()[0] else ["threads"]
RUN = 8  # blocks of one request
PATTERN = b"\xa5" * BLOCK


class Load:
    """Keeps requests in flight on places that do not overlap, and knows what each place holds."""

    def __init__(self, stage: Stage, seed: int, depth: int, places: int) -> None:
        self.stage, self.random, self.depth = stage, random.Random(seed), depth
        self.version = [0] * places  # of what the device holds
        self.free_places = list(range(places))
        self.flight: dict[int, tuple[int, int, int]] = {}  # identity: (opcode, place, lane)
        self.free_lanes = list(range(depth))  # a run of buffers and one of sources
        self.fresh_lanes = set(self.free_lanes)
        self.before: dict[int, set[int]] = {}  # of syncs: what is done before each
        self.next_version = 1
        self.done = 0

    def content(self, place: int, version: int) -> bytes:
        if version == 0:
            return bytes(RUN * BLOCK)
        return (place << 32 | version).to_bytes(8, "little") * (RUN * BLOCK // 8)

    def fill(self) -> None:
        stage = self.stage
        while len(self.flight) < self.depth:
            lane = self.free_lanes.pop(self.random.randrange(len(self.free_lanes)))
            choice = self.random.random()
            if choice < 0.04:
                after = self.random.sample(sorted(self.flight), self.random.randrange(min(3, len(self.flight)) + 1))
                identity, row = stage.submit(SYNC, commit=False, after=after), (SYNC, -1, lane)
                self.before[identity] = set(after)
            else:
                place = self.free_places.pop(self.random.randrange(len(self.free_places)))
                if choice < 0.5:
                    for block in range(lane * RUN, lane * RUN + RUN):
                        if lane not in self.fresh_lanes:
                            assert stage.buffer_block(block) == PATTERN, f"late read into buffer {block}"
                    where = [(stage.buffers + (lane * RUN + at) * BLOCK, BLOCK) for at in self.order()]
                    flags = self.random.choice([0, lib.ATOLL_FLAG_AWAITED])
                    identity = stage.submit(READ, place * RUN * BLOCK, where, commit=False, flags=flags)
                    row = (READ, place, lane)
                    self.fresh_lanes.discard(lane)
                else:
                    self.version[place] = self.next_version
                    self.next_version += 1
                    data = self.content(place, self.version[place])
                    for at in range(RUN):
                        stage.source_block(lane * RUN + at)[:] = data[at * BLOCK : (at + 1) * BLOCK]
                    where = [(stage.source + (lane * RUN + at) * BLOCK, BLOCK) for at in range(RUN)]
                    identity = stage.submit(WRITE, place * RUN * BLOCK, where, commit=False)
                    row = (WRITE, place, lane)
            self.flight[identity] = row
        stage.commit()

    def order(self) -> list[int]:
        """Mostly in sequence (one run), sometimes scattered."""
        at = list(range(RUN))
        if self.random.random() < 0.5:
            at = at[1::2] + at[::2]
        self.scatter = at
        return at

    def finish(self, timeout_s: float = 0.0) -> None:
        stage = self.stage
        for identity, status, code in stage.completions(timeout_s):
            assert identity in self.flight, f"answered twice, or never asked: {identity:#x}"
            opcode, place, lane = self.flight.pop(identity)
            assert not self.before.pop(identity, set()) & set(self.flight), "a sync before what it comes after"
            assert (status, code) == (OK, 0), (opcode, place, status, code)
            if opcode == READ:
                expected = self.content(place, self.version[place])
                got = b"".join(bytes(stage.buffer_block(lane * RUN + at)) for at in range(RUN))
                assert got == expected, f"place {place} holds other than version {self.version[place]}"
                for at in range(RUN):
                    stage.buffer_block(lane * RUN + at)[:] = PATTERN
            elif opcode == WRITE:
                for at in range(RUN):
                    stage.source_block(lane * RUN + at)[:] = b"\xee" * BLOCK
            if place >= 0:
                self.free_places.append(place)
            self.free_lanes.append(lane)
            stage.release(identity)
            self.done += 1

    def drain(self) -> None:
        deadline = time.monotonic() + 20
        while self.flight:
            self.finish(1.0)
            assert time.monotonic() < deadline, f"{len(self.flight)} requests never answered"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_kills_under_load(tmp_path, engine, direct):
    kills = 150 if engine == "io_uring" else 60
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    depth, places = 96, 256  # more bytes than the device may have beside reads that clients wait for
    path = tmp_path / "device"
    fd = open_device(path, places * RUN * BLOCK)
    if not direct:
        os.close(fd)
        fd = os.open(path, os.O_RDWR)
    with Stage(fd, engine, buffer_blocks=depth * RUN, source_blocks=depth * RUN) as stage:
        load = Load(stage, seed, depth, places)
        stage.start()
        in_flight = 0
        for _ in range(kills):
            until = time.monotonic() + choose.random() * 0.006
            while time.monotonic() < until:
                load.fill()
                load.finish()
            load.fill()
            if choose.random() < 0.5:
                load.finish(0.01)
                load.fill()
            stage.kill()
            in_flight += len(load.flight)
            stage.start(wait=choose.random() < 0.7)  # sometimes killed while it recovers
        stage.poll(lambda: physmap.serves(stage.header(), stage.incarnation))
        load.drain()
        assert stage.completions() == []
        counters = stage.counters()
        print(f"{load.done} requests, {in_flight} in flight at {kills} kills: {counters}")
        assert counters["adopted"] + counters["repeated"] >= kills  # what those who died had begun
        assert counters["background_held"] != 0  # so some were killed with it
        for _ in range(200):  # the stage is whole: every slot and buffer is in use again
            load.fill()
            load.finish(1.0)
        load.drain()
        assert stage.call("status")["in_flight"] == 0
        versions = load.version
    data = path.read_bytes()
    for place, version in enumerate(versions):
        assert data[place * RUN * BLOCK : (place + 1) * RUN * BLOCK] == load.content(place, version), place
    assert len(load.free_places) == places and len(stage.free) == IO_COUNT


POINTS = ["disk.step", "disk.committed", "disk.advanced", "disk.submit.before", "disk.submit.after"]
POINTS += ["disk.recover.before", "disk.recover.after"]


@pytest.mark.skipif("io_uring" not in ENGINES, reason="io_uring is forbidden here")
@pytest.mark.parametrize("point", POINTS)
def test_crash_points(tmp_path, point):
    """Death at each named place, repeatedly, with the same promises."""
    from atoll.ipc.crashpoint import point_hash

    depth, places = 40, 64
    path = tmp_path / "device"
    fd = open_device(path, places * RUN * BLOCK)
    with Stage(fd, "io_uring", buffer_blocks=depth * RUN, source_blocks=depth * RUN) as stage:
        load = Load(stage, 7, depth, places)
        header = stage.kernel.header
        for arming in range(1, 26):
            header.crash_sequence = arming
            header.crash_point = point_hash(point)
            stage.start(wait=False)
            deadline = time.monotonic() + 20
            while True:
                load.fill()
                pid, status = os.waitpid(stage.pid, os.WNOHANG)
                if pid:
                    break
                load.finish()
                assert time.monotonic() < deadline, f"{point} is never reached"
            assert os.waitstatus_to_exitcode(status) == -9
            stage.pid = 0
        header.crash_point = 0
        stage.start()
        load.drain()
        versions = load.version
    data = path.read_bytes()
    for place, version in enumerate(versions):
        assert data[place * RUN * BLOCK : (place + 1) * RUN * BLOCK] == load.content(place, version), place
