"""A reader beside dedupkit's stage: does what nbd does with dedup's look-up table, and watches the pages it was given.

reader = Reader(stage)
reader.take(volume, lba)      looks up, publishes the use, looks again; True if it got the block
reader.check()                no page in use has changed
reader.release()              nic is done with all of them
reader.table()                what the table says: {(volume, generation, lba): content}
reader.verify(volume, bytes)  all that it says of the volume is true
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dedupkit import BLOCK, DEDUP, NBD, NIC, Stage

from atoll.ipc import physmap
from atoll.ipc._ipc import ffi, lib

PAGE, HOLE = lib.ATOLL_LOOKUP_PAGE, lib.ATOLL_LOOKUP_HOLE


@dataclass
class Taken:
    slot: int
    address: int
    content: bytes


class Reader:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.taken: list[Taken] = []
        self.hits = 0

    @property
    def lookup(self) -> Any:
        role_area = physmap.address(DEDUP) + int(physmap.header(DEDUP).role_offset)
        return ffi.addressof(ffi.cast("struct atoll_dedup_public *", role_area), "lookup")

    def uses(self, slot: int) -> Any:
        """Of nbd for the one half of the slots, of nic for the other."""
        role, name = (NBD, "nbd") if slot % 2 == 0 else (NIC, "nic")
        public = ffi.cast(
            f"struct atoll_{name}_public *", physmap.address(role) + int(physmap.header(role).role_offset)
        )
        return public.uses

    def _values(self) -> dict[int, int]:
        lookup = self.lookup
        words = ffi.unpack(
            ffi.cast("uint64_t *", int(lookup.entries_address)), 2 * lib.ATOLL_LOOKUP_WAYS * int(lookup.set_count)
        )
        found: dict[int, int] = {}
        for key, value in zip(words[::2], words[1::2], strict=True):
            if key != 0 and value >> 62 in (PAGE, HOLE):
                assert key not in found, f"key {key:#x} is there twice"
                found[key] = value
        return found

    def _address(self, page: int) -> int:
        lookup = self.lookup
        area = max(number for number in range(4) if page >= lookup.first[number])
        assert page < lookup.page_count
        return int(lookup.address[area]) + (page - int(lookup.first[area])) * BLOCK

    def _current(self, value: int) -> bool:
        """Is the page still what it was when the value was put there?"""
        generations = ffi.cast("uint32_t *", int(self.lookup.generations_address))
        return int(generations[value >> 32 & 0x3FFFFFFF]) == value & 0xFFFFFFFF

    def table(self) -> dict[tuple[int, int, int], bytes]:
        found = {}
        for key, value in self._values().items():
            if value >> 62 == PAGE and not self._current(value):
                continue
            content = bytes(BLOCK)
            if value >> 62 == PAGE:
                content = ffi.buffer(ffi.cast("char *", self._address(value >> 32 & 0x3FFFFFFF)), BLOCK)[:]
            found[key >> 40 & 0xFF, key >> 48 & 0x7FFF, key & (1 << 40) - 1] = content
        return found

    def verify(self, volume: int, expected: bytes | bytearray) -> int:
        generation, count = self.stage.generation(volume), 0
        for (number, its_generation, lba), content in self.table().items():
            if (number, its_generation) == (volume, generation):
                assert content == expected[lba * BLOCK : (lba + 1) * BLOCK], f"volume {volume}, block {lba}"
                count += 1
        return count

    def take(self, volume: int, lba: int) -> bool:
        key = lba | volume << 40 | (self.stage.generation(volume) & 0x7FFF) << 48 | 1 << 63
        value = self._values().get(key, 0)
        if value >> 62 != PAGE or not self.stage.free_slots:
            return False
        slot, page = self.stage.free_slots.pop(), value >> 32 & 0x3FFFFFFF
        self.stage.sequences[slot] += 1
        uses, use = self.uses(slot), self.stage.sequences[slot] << 32 | 1
        uses.pages[slot * lib.ATOLL_USE_PAGES] = page
        uses.used[slot // 64] |= 1 << slot % 64
        uses.use[slot] = use
        if not self._current(value):
            uses.use[slot] = 0
            self.stage.nic_public.done[slot] = self.stage.sequences[slot]
            self.stage.free_slots.append(slot)
            return False
        uses.use[slot] = use | 1 << 31
        address = self._address(page)
        self.taken.append(Taken(slot, address, ffi.buffer(ffi.cast("char *", address), BLOCK)[:]))
        self.hits += 1
        return True

    def check(self) -> None:
        for taken in self.taken:
            assert ffi.buffer(ffi.cast("char *", taken.address), BLOCK)[:] == taken.content, "a page in use changed"
            page = (taken.address - self.stage.nic_buffer) // BLOCK
            assert page not in self.stage.free_pages, "a page in use was given back"

    def release(self) -> None:
        self.check()
        for taken in self.taken:
            self.stage.nic_public.done[taken.slot] = self.stage.sequences[taken.slot]
            self.stage.free_slots.append(taken.slot)
        self.taken.clear()
