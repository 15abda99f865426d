"""Reads what the fault-injecting driver recorded, and makes the devices that a power loss could have left.

- `read_record(path, end=None)`       the events, in the order of their start
- `read_accesses(path, begin, end)`   where reads and writes went, of a record of accesses, as an array
- `power_loss(events, cut, seed)`     the sectors a device may hold if power fails after `events[:cut]`
- `apply(image, sectors)`             puts them onto an image of the device as it was when the record began

What a device may do: a write whose answer came before a flush started is there once that flush was answered with
success. Of all other writes each 512-byte sector may be there or not, each on its own.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from atoll.drivers.fault._fault import ffi, lib

HEADER = struct.Struct("<IIQQQII")
assert HEADER.size == ffi.sizeof("struct fault_record")
SECTOR = 512
KINDS = {
    lib.FAULT_RECORD_WRITE: "write",
    lib.FAULT_RECORD_SYNC: "sync",
    lib.FAULT_RECORD_DISCARD: "discard",
    lib.FAULT_RECORD_DONE: "done",
}
# One access: FAULT_RECORD_ACCESS of fault.h.
ACCESS = np.dtype(
    {
        "names": ["magic", "kind", "identity", "offset_bytes", "length_bytes", "status", "opcode"],
        "formats": ["<u4", "<u4", "<u8", "<u8", "<u8", "<u4", "<u4"],
    }
)
assert ACCESS.itemsize == HEADER.size


class RecordError(ValueError):
    """The file is no record, or damaged."""


@dataclass(frozen=True)
class Event:
    kind: str  # write, sync, discard: about to start; done: answered
    identity: int
    offset_bytes: int
    length_bytes: int
    status: int  # of done: enum atoll_status
    data: bytes  # of write


def read_record(path: Path, end: int | None = None) -> list[Event]:
    """All events up to byte `end` ("fault-status": record_bytes); without it up to the first incomplete one."""
    content = path.read_bytes()[:end]
    events: list[Event] = []
    at = 0
    while at + HEADER.size <= len(content):
        magic, kind, identity, offset, length, status, _ = HEADER.unpack_from(content, at)
        if magic != lib.FAULT_RECORD_MAGIC or kind not in KINDS:
            raise RecordError(f"{path}: no event at byte {at}")
        at += HEADER.size
        data = b""
        if KINDS[kind] == "write":
            data = content[at : at + length]
            at += length
        if at > len(content):
            break
        events.append(Event(KINDS[kind], identity, offset, length, status, data))
    return events


def read_accesses(path: Path, begin: int = 0, end: int | None = None) -> NDArray[Any]:
    """An array of ACCESS in the order in which they started, from byte `begin` to `end` of the record ("fault-status":
    record_bytes); `opcode` is ATOLL_OP_IO_READ or _WRITE."""
    size = (path.stat().st_size if end is None else end) - begin
    accesses = np.fromfile(path, ACCESS, count=size // ACCESS.itemsize, offset=begin)
    bad = np.flatnonzero((accesses["magic"] != lib.FAULT_RECORD_MAGIC) | (accesses["kind"] != lib.FAULT_RECORD_ACCESS))
    if len(bad):
        raise RecordError(f"{path}: no access at byte {int(bad[0]) * ACCESS.itemsize}")
    return accesses


def power_loss(events: Sequence[Event], cut: int, seed: int, kept: float = 0.5) -> dict[int, bytes]:
    """Sector number → its content, of what the first `cut` events changed; `kept`: chance of a volatile sector."""
    chance = random.Random(seed)
    started: list[tuple[int, Event]] = []  # writes and discards, with their index
    open_identities: dict[int, list[int]] = {}  # identity → positions in `started` that are not answered
    answered: set[int] = set()  # positions in `started`
    durable: set[int] = set()
    syncs: dict[int, set[int]] = {}  # identity of a flush → what it covers
    for index, event in enumerate(events[:cut]):
        if event.kind in ("write", "discard"):
            open_identities.setdefault(event.identity, []).append(len(started))
            started.append((index, event))
        elif event.kind == "sync":
            syncs[event.identity] = set(answered)  # done again after a crash: the later start covers more
        elif event.identity in syncs:
            covered = syncs.pop(event.identity)
            if event.status == lib.ATOLL_OK:
                durable |= covered
        else:
            positions = open_identities.pop(event.identity, [])
            if event.status == lib.ATOLL_OK:
                answered |= set(positions)
    sectors: dict[int, bytes] = {}
    for position, (_, event) in enumerate(started):
        data = event.data if event.kind == "write" else bytes(event.length_bytes)
        for at in range(0, len(data), SECTOR):
            if position in durable or chance.random() < kept:
                sectors[(event.offset_bytes + at) // SECTOR] = data[at : at + SECTOR]
    return sectors


def apply(image: BinaryIO, sectors: dict[int, bytes] | Iterable[tuple[int, bytes]]) -> None:
    for sector, data in sectors.items() if isinstance(sectors, dict) else sectors:
        image.seek(sector * SECTOR)
        image.write(data)
