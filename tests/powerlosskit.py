"""What the power-loss tests share: a load on a server whose disk driver records, and an oracle of what it may leave.

- `run_load(server, record, seed, operations)` -> `History`: who wrote what, and what was acknowledged when. "When" is a
  number of bytes of the record: a write cannot be on the device before that many were recorded, a flush's promise
  holds from there on.
- `History.judge(store, position)`: a line for each thing that a device cut off at `position` may not hold.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nbdclient import Command, CommandFlag, Connection
from serverkit import Server

from atoll.kernel.client import Client
from atoll.services.dedup.check import layout
from atoll.services.dedup.check.reader import Store

BLOCK = 4096
ZEROS = bytes(BLOCK)
AREA_BLOCKS = 1200  # of each volume: overwrites happen, and three leaves are used
CONTENTS = 60  # that are written again and again
VOLUME_BYTES = 64 << 20
CONNECTIONS, OUTSTANDING = 3, 4


def digest(block: bytes) -> int:
    return 0 if block == ZEROS else layout.fingerprint(block)


@dataclass
class Block:
    """Contents of one block in their order; the first is what it held when the volume was made."""

    submitted: list[int] = field(default_factory=lambda: [0])
    digests: list[int] = field(default_factory=lambda: [0])
    durable: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])  # position, contents that are out of date
    acknowledged: int = 0
    latest: bytes = ZEROS
    busy: bool = False

    def allowed(self, position: int) -> set[int]:
        lower = max(index for at, index in self.durable if at <= position)
        return {d for d, at in zip(self.digests[lower:], self.submitted[lower:], strict=True) if at <= position} | {
            self.digests[lower]
        }


@dataclass
class Volume:
    name: str
    create_sent: int
    create_done: int
    delete_sent: int | None = None
    delete_done: int | None = None
    blocks: dict[int, Block] = field(default_factory=dict)

    def block(self, lba: int) -> Block:
        return self.blocks.setdefault(lba, Block())


@dataclass
class History:
    volumes: list[Volume] = field(default_factory=list)
    ready: int = 0  # from here on there is a store
    operations: int = 0
    flushes: int = 0

    def judge(self, store: Store, position: int) -> list[str]:
        wrong: list[str] = []
        there = {one.name: one for one in store.volumes().values() if one.state == layout.VOLUME_READY}
        contents = block_digests(store)
        known = {volume.name: volume for volume in self.volumes}
        wrong += [f"volume {name!r} was never made" for name in there if name not in known]
        for volume in self.volumes:
            found = there.get(volume.name)
            if found is not None and volume.create_sent > position:
                wrong.append(f"volume {volume.name!r} is there before it was asked for")
            if found is not None and volume.delete_done is not None and volume.delete_done <= position:
                wrong.append(f"volume {volume.name!r} was deleted")
            if found is None:
                if volume.create_done <= position and (volume.delete_sent is None or volume.delete_sent > position):
                    wrong.append(f"volume {volume.name!r} is not there")
                continue
            mine = contents.get(found.id, {})
            wrong += [f"{volume.name}: block {lba} was never written" for lba in mine if lba not in volume.blocks]
            for lba, block in volume.blocks.items():
                if mine.get(lba, 0) not in block.allowed(position):
                    at = block.digests.index(mine[lba]) if mine.get(lba, 0) in block.digests else "none of its"
                    wrong.append(
                        f"{volume.name}: block {lba} has content {at} of {len(block.digests)}; flushed {block.durable},"
                        f" sent at {block.submitted}"
                    )
        return wrong


def block_digests(store: Store) -> dict[int, dict[int, int]]:
    """Volume id → LBA → digest of what a read would return, of what is no hole."""
    found: dict[int, dict[int, int]] = {}
    of: dict[int, int] = {}  # map value: digest
    for keys, values in store.leaves():
        rows, columns = np.nonzero(values)
        for key, value in zip(
            (keys[rows] + columns.astype(np.uint64)).tolist(), values[rows, columns].tolist(), strict=True
        ):
            if value not in of:
                of[value] = (
                    digest(store.image.read(value & int(layout.NUMBER_BITS), 1) or b"")
                    if value >> 60 == layout.KIND_PBA
                    else 0
                )
            found.setdefault(key >> 52, {})[key & (1 << 52) - 1] = of[value]
    return found


@dataclass
class _Operation:
    connection: int
    cookie: int
    blocks: list[tuple[Block, int]]  # and the index of the content that it makes
    fua: bool = False
    covers: list[tuple[Block, int]] | None = None  # of a flush


def volumes_found(server: Server, history: History) -> list[Volume]:
    """Volumes and contents as a server has them that was started on what power loss left: another history begins."""
    there = {volume["name"] for volume in server.json("status")["volumes"]}
    found = []
    for volume in history.volumes:
        if volume.name not in there:
            continue
        again = Volume(volume.name, 0, 0)
        with Connection.open(str(server.socket), timeout_s=60) as connection:
            connection.negotiate(volume.name)
            for lba in volume.blocks:
                content = connection.read(lba * BLOCK, BLOCK)
                again.blocks[lba] = Block(digests=[digest(content)], latest=content)
        found.append(again)
    return found


class Load:
    def __init__(
        self,
        server: Server,
        record: Path,
        seed: int,
        made: Sequence[str] = ("disk", "two"),
        found: Sequence[Volume] | None = None,
    ) -> None:
        """`made`: volumes that the configuration made at this start. `found`: those that were there before."""
        self.server, self.record = server, record
        self.choose = random.Random(seed)
        self.calm = True
        self.history = History(ready=0 if found else self.position())
        self.contents = [self.choose.randbytes(BLOCK) for _ in range(CONTENTS)] + [ZEROS] * 3
        self.connections: list[tuple[Volume, Connection]] = []
        self.outstanding: list[_Operation] = []
        for volume in [*(found or ()), *(Volume(name, 0, self.history.ready) for name in made)]:
            self.history.volumes.append(volume)
            # One for those that may be deleted: no other may have requests outstanding then.
            for _ in range(1 if volume.name.startswith("v") else CONNECTIONS):
                self.connect(volume)

    def position(self) -> int:
        return self.record.stat().st_size

    def connect(self, volume: Volume) -> None:
        connection = Connection.open(str(self.server.socket), timeout_s=60)
        connection.negotiate(volume.name)
        self.connections.append((volume, connection))

    # --- Operations -------------------------------------------------------------------------------------------------

    def run(self, operations: int, last: bool = True) -> History:
        """So many operations; the last time all are awaited and the connections closed."""
        for _ in range(operations):
            self.history.operations += 1
            draw = self.choose.random()
            # In turn many flushes, which fill the log, and few, so that much is volatile.
            self.calm = self.history.operations // 60 % 2 == 0
            flushes, volumes = (0.01, 0.01) if self.calm else (0.35, 0.06)
            if draw < 1 - flushes - volumes:
                self.change()
            elif draw < 1 - volumes:
                self.flush()
            elif draw < 1 - volumes / 2:
                self.create()
            else:
                self.delete()
            while len(self.outstanding) > OUTSTANDING or (self.outstanding and self.choose.random() < 0.35):
                self.finish(self.choose.randrange(len(self.outstanding)))
        while last and self.outstanding:
            self.finish(0)
        for _, connection in self.connections if last else ():
            connection.disconnect()
        return self.history

    def change(self) -> None:
        number = self.choose.randrange(len(self.connections))
        volume, connection = self.connections[number]
        count = self.choose.choice((1, 1, 1, 2, 4, 8, 16))
        # Near each other, so that runs, overwrites and equal runs are common.
        first = self.choose.choice((0, 500, 1020)) + self.choose.randrange(AREA_BLOCKS // 8)
        blocks = [volume.block(first + index) for index in range(count)]
        if any(block.busy for block in blocks):
            return
        fua = self.choose.random() < (0.005 if self.calm else 0.1)
        flags = int(CommandFlag.FUA) if fua else 0
        kind = self.choose.random()
        sent = self.position()
        if kind < 0.75:
            start = self.choose.randrange(CONTENTS)
            payload = b"".join(
                self.contents[(start + index) % len(self.contents)] if self.choose.random() < 0.7
                else self.choose.randbytes(BLOCK) for index in range(count)
            )  # fmt: skip
            offset, end = 0, count * BLOCK
            if self.choose.random() < 0.1:  # ragged: the rest of the block stays
                offset, end = self.choose.randrange(1, 512), end - self.choose.randrange(1, 512)
            old = b"".join(block.latest for block in blocks)
            new = old[:offset] + payload[offset:end] + old[end:]
            cookie = connection.submit(Command.WRITE, first * BLOCK + offset, flags=flags, payload=payload[offset:end])
        else:
            new = bytes(count * BLOCK)
            command = Command.TRIM if kind < 0.88 else Command.WRITE_ZEROES
            if command is Command.WRITE_ZEROES and self.choose.random() < 0.5:
                flags |= int(CommandFlag.NO_HOLE)
            cookie = connection.submit(command, first * BLOCK, count * BLOCK, flags)
        made = []
        for index, block in enumerate(blocks):
            block.latest = new[index * BLOCK : (index + 1) * BLOCK]
            block.submitted.append(sent)
            block.digests.append(digest(block.latest))
            block.busy = True
            made.append((block, len(block.digests) - 1))
        self.outstanding.append(_Operation(number, cookie, made, fua))

    def flush(self) -> None:
        number = self.choose.randrange(len(self.connections))
        covers = [
            (block, block.acknowledged) for volume in self.history.volumes for block in volume.blocks.values()
            if block.durable[-1][1] < block.acknowledged
        ]  # fmt: skip
        cookie = self.connections[number][1].submit(Command.FLUSH)
        self.outstanding.append(_Operation(number, cookie, [], covers=covers))
        self.history.flushes += 1

    def finish(self, at: int) -> None:
        operation = self.outstanding.pop(at)
        self.connections[operation.connection][1].wait(operation.cookie).check()
        position = self.position()
        for block, index in operation.blocks:
            block.busy = False
            block.acknowledged = index
        for block, index in operation.covers or (operation.blocks if operation.fua else ()):
            if block.durable[-1][1] < index:
                block.durable.append((position, index))

    # --- Volumes ----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        if len(self.connections) >= 12:
            return
        volume = Volume(f"v{self.choose.getrandbits(32):08x}", self.position(), 0)
        with Client(self.server.data, timeout_s=60) as client:
            client.call("volume-create", name=volume.name, size_bytes=VOLUME_BYTES)
        volume.create_done = self.position()
        self.history.volumes.append(volume)
        self.connect(volume)

    def delete(self) -> None:
        made = [number for number, (volume, _) in enumerate(self.connections) if volume.name.startswith("v")]
        if not made:
            return
        number = self.choose.choice(made)
        while any(operation.connection == number for operation in self.outstanding):
            self.finish(next(i for i, one in enumerate(self.outstanding) if one.connection == number))
        volume, connection = self.connections.pop(number)
        for operation in self.outstanding:
            operation.connection -= operation.connection > number
        connection.disconnect()
        volume.delete_sent = self.position()
        with Client(self.server.data, timeout_s=60) as client:
            client.call("volume-delete", name=volume.name, force=True)
        volume.delete_done = self.position()


def configuration(record: Path) -> dict[str, Any]:
    """Small: the metadata log is half full, and a checkpoint due, after 128 blocks of it."""
    return {
        "device_size": "128MiB",
        "volumes": [{"name": "disk", "size": "64MiB"}, {"name": "two", "size": "64MiB"}],
        "dedup": {"metadata_log_bytes": "1MiB", "destage_delay_ms": 1},
        "testing": {"modules": {"disk": "atoll.drivers.fault"}, "fault": {"record": str(record)}},
    }
