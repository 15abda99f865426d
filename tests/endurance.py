"""Endurance: a server at nine tenths of its device, written, trimmed, zeroed, its volumes made and deleted, for as long
as one likes; every byte known, every recount clean, nothing grows.

    endurance = Endurance(server, seed, say)
    endurance.run(seconds)                 rounds of all phases, then everything is deleted; AssertionError if not right

    python tests/endurance.py --seconds 3600 [--device-size 1GiB] [--seed 7]        (make endurance ARGS=...)

Phases: `overwrite` (writes of every size, half of them duplicates), `discard` (trims and zeroes among them), `volumes`
(some are made and deleted while others are written), `full` (until ENOSPC and back). After each: flush, all volumes
read back, `check --live`, memory and descriptors of every process; after each round a stop, the offline check, and a
new start.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import select
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from serverkit import Server, wait_for

from atoll.kernel import chaos_nbd as nbd
from atoll.kernel.chaos_model import POOL, SECTOR, Model, Span, block_ids, payload
from atoll.kernel.client import Client

BLOCK = 4096
PER_BLOCK = BLOCK // SECTOR
ENOSPC = 28
# Few pages of metadata in memory, and a fast tier for few of the blocks: both are always being changed.
CONFIG = {
    "volumes": [],
    "dedup": {"metadata_cache_bytes": "2MiB"},
    "fast_device": "fast.img",
    "fast_device_size": "16MiB",
}
VOLUMES = 5
DEPTH = 8
# Parts of what can be stored at all that are free: where filling ends, and where writing pauses for trims.
FREE_WANTED, FREE_LEAST = 0.10, 0.06
# Private memory of a process may differ by this: what Python's allocator keeps.
GROWTH_BYTES = 6 << 20
GROWTH_DESCRIPTORS = 2  # a control connection of ours


@dataclass
class Volume:
    name: str
    link: nbd.Link
    model: Model
    flights: dict[int, tuple[Span | None, Any]] = field(
        default_factory=dict
    )  # by cookie; the payload must live so long

    @property
    def sectors(self) -> int:
        return self.model.sectors


@dataclass
class Mix:
    """What is sent, in parts."""

    write: float
    read: float = 1.0
    trim: float = 0.0
    zero: float = 0.0
    flush: float = 0.02
    duplicates: float = 0.5


FILL = Mix(write=10, read=0.2, duplicates=0.2)
WRITES = Mix(write=6)
DISCARDS = Mix(write=5, trim=1, zero=1)
TRIMS = Mix(write=0, trim=3)
UNIQUE = Mix(write=1, read=0, duplicates=0)


class Endurance:
    def __init__(self, server: Server, seed: int, say: Callable[[str], None] = print) -> None:
        self.server, self.say = server, say
        self.choose = random.Random(seed)
        self.cookies, self.names = itertools.count(1), itertools.count(1)
        self.unique = 1 << 40
        self.volumes: list[Volume] = []
        self.refused = 0  # writes that met ENOSPC
        self.requests = 0
        self.memory: dict[int, tuple[str, int, int]] = {}
        self.usable = self.space()["available_bytes"]
        self.volume_sectors = self.usable // 3 // BLOCK * PER_BLOCK  # thin: together more than there is
        say(f"seed {seed}: {self.usable >> 20} MiB can be stored, volumes of {self.volume_sectors * SECTOR >> 20} MiB")

    # --- Asking -----------------------------------------------------------------------------------------------------

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        with Client(self.server.data, timeout_s=120.0) as client:
            return client.call(verb, **arguments)

    def space(self) -> dict[str, int]:
        status = self.call("status")
        assert "space" in status, f"dedup does not answer: {status['warnings']}"
        return status["space"]

    def free(self) -> float:
        """Part of what can be stored at all."""
        return self.space()["available_bytes"] / self.usable

    # --- Volumes ----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        name, size = f"v{next(self.names)}", self.volume_sectors * SECTOR
        thresholds = {"threshold": self.choose.choice((1, 1, 2, 4, 8)), "tier_threshold": self.choose.choice((2, 8))}
        self.call("volume-create", name=name, size_bytes=size, read_only=False, **thresholds)
        self.volumes.append(Volume(name, self.connect(name), Model(0, self.volume_sectors)))

    def connect(self, name: str) -> nbd.Link:
        return nbd.connect(str(self.server.socket), name, structured=self.choose.random() < 0.5)

    def delete(self, volume: Volume) -> None:
        self.finish([volume])
        self.volumes.remove(volume)
        self.leave(volume)
        self.call("volume-delete", name=volume.name, force=True)

    def leave(self, volume: Volume) -> None:
        with contextlib.suppress(nbd.LinkLost):
            volume.link.submit(0, nbd.DISC, 0, 0)
            volume.link.pump_out()
        volume.link.close()

    # --- Requests ---------------------------------------------------------------------------------------------------

    def submit(self, volume: Volume, mix: Mix) -> None:
        """One more, unless its place is busy."""
        kinds = ("write", "read", "trim", "zero", "flush")
        kind = self.choose.choices(kinds, [getattr(mix, name) for name in kinds])[0]
        first, end = self.place(volume, kind)
        model, offset, length = volume.model, first * SECTOR, (end - first) * SECTOR
        if kind == "flush":
            self.send(volume, None, nbd.FLUSH, 0, 0)
        elif kind == "read":
            self.send(volume, model.begin_read(first, end), nbd.READ, offset, length)
        elif not model.free_for_write(first, end):
            return
        elif kind == "write":
            ids = self.ids(-(-end // PER_BLOCK) - first // PER_BLOCK, mix)
            span = model.begin_write("write", first, end, block_ids(first, end, ids))
            flags = nbd.FUA if self.choose.random() < 0.02 else 0
            self.send(volume, span, nbd.WRITE, offset, length, flags, payload(first, end, ids))
        elif kind == "zero":
            flags = self.choose.choice((0, nbd.NO_HOLE))
            self.send(volume, model.begin_write("zero", first, end, None), nbd.WRITE_ZEROES, offset, length, flags)
        elif model.settled(first, end):
            self.send(volume, model.begin_write("trim", first, end, None), nbd.TRIM, offset, length)

    def send(
        self,
        volume: Volume,
        span: Span | None,
        command: int,
        offset: int,
        length: int,
        flags: int = 0,
        data: Any = None,
    ) -> None:
        cookie = next(self.cookies)
        volume.flights[cookie] = (span, data)
        volume.link.submit(cookie, command, offset, length, flags, data)
        self.requests += 1

    def place(self, volume: Volume, kind: str) -> tuple[int, int]:
        """Every size from a sector on; whole blocks three times of four, and always of a trim."""
        most = 2048 if kind == "trim" else 512
        count = int(2 ** self.choose.uniform(0, most.bit_length() - 1))
        if kind == "trim" or self.choose.random() < 0.75:
            blocks = -(-count // PER_BLOCK)
            first = self.choose.randrange(volume.sectors // PER_BLOCK - blocks + 1) * PER_BLOCK
            return first, first + blocks * PER_BLOCK
        first = self.choose.randrange(volume.sectors - count + 1)
        return first, first + count

    def ids(self, blocks: int, mix: Mix) -> Any:
        if self.choose.random() < mix.duplicates:
            start = self.choose.randrange(POOL)
            return np.arange(start, start + blocks, dtype=np.uint64) % np.uint64(POOL) + np.uint64(1)
        self.unique += blocks
        return np.arange(self.unique - blocks, self.unique, dtype=np.uint64)

    def pump(self, volumes: list[Volume], timeout_s: float = 30.0) -> None:
        """Sends what waits and takes what comes; waits for something if anything is under way."""
        poll, by_descriptor = select.poll(), {}
        for volume in volumes:
            volume.link.pump_out()
            if volume.flights:
                by_descriptor[volume.link.fileno()] = volume
                poll.register(volume.link, select.POLLIN | (select.POLLOUT if volume.link.wants_out else 0))
        if not by_descriptor:
            return
        ready = poll.poll(timeout_s * 1000)
        assert ready, f"no answer for {timeout_s:g} s"
        for descriptor, _ in ready:
            volume = by_descriptor[descriptor]
            for reply in volume.link.pump_in():
                self.answered(volume, reply)

    def answered(self, volume: Volume, reply: nbd.Reply) -> None:
        span, _ = volume.flights.pop(reply.cookie)
        full = reply.error == ENOSPC and span is not None and span.kind != "read"
        assert not reply.error or full, f"{volume.name}: {span and span.kind}: error {reply.error}"
        self.refused += full
        if span is None:
            return
        if span.kind == "read":
            findings = volume.model.end_read(span, reply.data)
            assert not findings, f"{volume.name}: {findings[:5]}"
        else:
            volume.model.end_write(span, certain=not reply.error)

    def finish(self, volumes: list[Volume]) -> None:
        while any(volume.flights for volume in volumes):
            self.pump(volumes)

    def load(self, mix: Mix, until: Callable[[], bool]) -> None:
        """Keeps all volumes busy until `until()`, which is asked now and then; makes room where little is left."""
        now = mix
        while not until():
            if mix is not UNIQUE:
                free = self.free()
                now = TRIMS if free < FREE_LEAST else mix if free > FREE_WANTED or now is not TRIMS else now
            for _ in range(8):
                for volume in self.volumes:
                    for _ in range(DEPTH - len(volume.flights)):
                        self.submit(volume, now)
                self.pump(self.volumes)
        self.finish(self.volumes)

    # --- Phases -----------------------------------------------------------------------------------------------------

    def overwrite(self, seconds: float) -> None:
        self.fill()
        end = time.monotonic() + seconds
        self.load(WRITES, lambda: time.monotonic() > end)

    def discard(self, seconds: float) -> None:
        self.fill()
        end = time.monotonic() + seconds
        self.load(DISCARDS, lambda: time.monotonic() > end)

    def volumes_come_and_go(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for volume in self.volumes:
                for _ in range(DEPTH - len(volume.flights)):
                    self.submit(volume, WRITES)
            self.delete(self.choose.choice(self.volumes))  # while the others' requests are under way
            self.create()
            self.fill()
            soon = time.monotonic() + self.choose.uniform(0, seconds / 4)
            self.load(WRITES, lambda soon=soon: time.monotonic() > soon)  # type: ignore[misc]

    def fill(self) -> None:
        """To nine tenths."""
        self.load(FILL, lambda: self.free() < FREE_WANTED)

    def full(self) -> None:
        """Until there is no more; then reads and trims go on, and writes do when something was freed."""
        before = self.refused
        self.load(UNIQUE, lambda: self.refused > before)
        self.read_all()
        volume = self.volumes[0]
        whole = volume.sectors // PER_BLOCK * PER_BLOCK
        for first in range(0, whole, 1 << 15):
            end = min(first + (1 << 15), whole)
            self.send(
                volume,
                volume.model.begin_write("trim", first, end, None),
                nbd.TRIM,
                first * SECTOR,
                (end - first) * SECTOR,
            )
        self.finish([volume])
        wait_for("trimmed space is free", lambda: self.free() > FREE_LEAST)
        refused = self.refused
        for _ in range(50):
            self.submit(volume, UNIQUE)
            self.finish([volume])
        assert self.refused == refused, "writes are refused although there is space"

    # --- Looking ----------------------------------------------------------------------------------------------------

    def read_all(self) -> None:
        """Every sector of every volume."""
        step = (1 << 20) // SECTOR
        for volume in self.volumes:
            for first in range(0, volume.sectors, step):
                end = min(first + step, volume.sectors)
                self.send(volume, volume.model.begin_read(first, end), nbd.READ, first * SECTOR, (end - first) * SECTOR)
                while len(volume.flights) >= 4:
                    self.pump([volume])
        self.finish(self.volumes)

    def quiet(self, phase: str) -> None:
        """All is as it must be, now that nothing is under way."""
        self.read_all()
        self.call("call", role="dedup", message={"call": "flush", "timeout_s": 60.0}, timeout_s=90.0)
        answer = self.call("call", role="dedup", message={"call": "check"}, timeout_s=60.0)["answer"]
        assert answer["inconsistencies"] == [], f"after {phase}: {answer['inconsistencies']}"
        status = self.call("status")
        assert status["log"]["used_bytes"] == 0 and status["log"]["failed_blocks"] == 0, status["log"]
        # Away for a while, if its device was silent for a second: a busy machine has such ones.
        tier = wait_for("the tier is there", self.tier_online, 60)
        assert phase == "deletion" or tier["used_bytes"] > 0, tier
        self.nothing_grew(phase)
        self.say(f"{phase}: {self.requests} requests, {self.refused} refused for space, {self.free():.1%} free")

    def tier_online(self) -> dict[str, Any] | None:
        tier: dict[str, Any] = self.call("status")["domains"]["dedup"]["tier"]
        return tier if tier["state"] == "online" else None

    def nothing_grew(self, phase: str) -> None:
        """Against the first look since the start, of each process by its pid."""
        now = {pid: process(pid) for pid in self.server.pids()}
        if not self.memory:
            self.memory = now
            return
        assert now.keys() == self.memory.keys(), f"after {phase}: processes {now}, before {self.memory}"
        for pid, (name, private, descriptors) in now.items():
            _, private_before, descriptors_before = self.memory[pid]
            grown = f"after {phase}: {name} {pid}"
            assert private <= private_before + GROWTH_BYTES, f"{grown}: {private} bytes, {private_before} before"
            assert descriptors <= descriptors_before + GROWTH_DESCRIPTORS, f"{grown}: {descriptors} descriptors"

    def restart(self) -> None:
        """A clean stop, the offline check, and a new start with the same volumes."""
        objects = shared_objects(self.server)
        for volume in self.volumes:
            self.leave(volume)
        self.server.stop()
        self.server.cli("check")
        self.server.start()
        assert shared_objects(self.server) == objects, "as many shared-memory objects as before"
        self.memory = {}
        for volume in self.volumes:
            volume.link = self.connect(volume.name)
        self.read_all()

    # --- All of it --------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        for _ in range(VOLUMES):
            self.create()
        self.fill()
        self.quiet("fill")
        end = time.monotonic() + seconds
        share = min(60.0, seconds / 8)
        rounds = 0
        while rounds == 0 or time.monotonic() < end:
            self.overwrite(share)
            self.quiet("overwrite")
            self.discard(share)
            self.quiet("discard")
            self.volumes_come_and_go(share)
            self.quiet("volumes")
            self.full()
            self.quiet("full")
            self.restart()
            rounds += 1
            self.say(f"round {rounds}: offline check clean, all read back")
        self.end()

    def end(self) -> None:
        """Nothing is stored when nothing is left."""
        for volume in list(self.volumes):
            self.delete(volume)
        wait_for("deleted blocks are free", lambda: self.call("status")["dedup"]["stored_bytes"] == 0, 60)
        self.quiet("deletion")
        status = self.call("status")
        for name in ("reserved_bytes", "zero_promise_bytes", "quarantined_bytes"):
            assert status["space"][name] == 0, status["space"]
        assert status["dedup"]["logical_bytes"] == 0, status["dedup"]
        self.restart()
        assert self.space()["available_bytes"] >= self.usable, (self.space(), self.usable)


def process(pid: int) -> tuple[str, int, int]:
    """Name, private memory in bytes, open descriptors."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    private = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(("Anonymous:", "Swap:")))
    return Path(f"/proc/{pid}/comm").read_text().strip(), private * 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def shared_objects(server: Server) -> int:
    server.note_instance()
    return sum(
        1 for path in Path("/dev/shm").glob("atoll-*") if any(instance in path.name for instance in server.instances)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--device-size", default="1GiB")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="atoll-endurance-") as folder:
        server = Server(Path(folder), config={**CONFIG, "device_size": options.device_size})
        try:
            server.start()
            Endurance(server, options.seed, lambda line: print(line, flush=True)).run(options.seconds)
        except BaseException:
            print(server.log_tail(), flush=True)
            raise
        finally:
            left = server.end()
    print("\n".join(left) or "nothing left behind")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
