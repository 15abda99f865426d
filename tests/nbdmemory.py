"""The look-up table of nbdstage's and nicstage's dedup: blocks that may be read without asking it (ipc/layout.h)."""

from __future__ import annotations

from typing import Any

from atoll.ipc._ipc import ffi, lib

BLOCK, WAYS = lib.ATOLL_BLOCK_BYTES, lib.ATOLL_LOOKUP_WAYS
TABLE_PAGES = 256
SETS = 64
TABLE_BYTES = SETS * WAYS * 16 + TABLE_PAGES * 4
MASK = (1 << 64) - 1


class Memory:
    def __init__(self, public: Any, table: int, pages: int, zeros: int, uses: Any, done: Any) -> None:
        """`uses`: what the reader publishes; `done`: nic's sequences. Addresses are of dedup's arena."""
        self._pages, self._uses, self._done = pages, uses, done
        self._entries = ffi.cast("struct atoll_lookup_entry *", table)
        self._generations = ffi.cast("uint32_t *", table + SETS * WAYS * 16)
        self._next = 0
        lookup = public.lookup
        lookup.set_count, lookup.page_count = SETS, TABLE_PAGES
        lookup.generations_address = table + SETS * WAYS * 16
        lookup.first = [0, TABLE_PAGES, TABLE_PAGES, TABLE_PAGES]
        lookup.address = [pages, 0, 0, 0]
        lookup.zeros_address, lookup.zeros_bytes = zeros, BLOCK
        lookup.entries_address = table

    def key(self, volume: int, generation: int, lba: int) -> int:
        return lba | volume << 40 | (generation & 0x7FFF) << 48 | 1 << 63

    def _set(self, key: int) -> int:
        return ((key * 0x9E3779B97F4A7C15 & MASK) * SETS >> 64) * WAYS

    def in_use(self, page: int) -> bool:
        for slot in range(lib.ATOLL_SLOT_COUNT):
            if not self._uses.used[slot // 64] >> slot % 64 & 1:
                continue
            use = int(self._uses.use[slot])
            if use == 0 or (int(self._done[slot]) - (use >> 32)) & 0x80000000 == 0:
                continue
            at = slot * lib.ATOLL_USE_PAGES
            if page in [int(self._uses.pages[at + index]) for index in range(use & 0x7F)]:
                return True
        return False

    def retire(self, page: int) -> None:
        self._generations[page] += 1  # whoever looks it up from now on does not get it

    def put(self, volume: int, generation: int, lba: int, content: bytes) -> None:
        self.forget(volume, generation, lba, lba + 1)
        key = self.key(volume, generation, lba)
        entry = self._entries[self._set(key) + self._next % WAYS]
        entry.value, entry.key = 0, key
        if not any(content):
            entry.value = lib.ATOLL_LOOKUP_HOLE << 62
            return
        page = self._next % TABLE_PAGES
        self._next += 1
        self.retire(page)
        if self.in_use(page):
            return
        ffi.memmove(ffi.cast("char *", self._pages + page * BLOCK), content, BLOCK)
        entry.value = lib.ATOLL_LOOKUP_PAGE << 62 | page << 32 | int(self._generations[page])

    def forge(self, volume: int, generation: int, lba: int, value: int) -> None:
        """An entry, whatever it says."""
        self.forget(volume, generation, lba, lba + 1)
        key = self.key(volume, generation, lba)
        entry = self._entries[self._set(key) + lba % WAYS]
        entry.value, entry.key = value, key

    def forget(self, volume: int, generation: int, first: int, end: int) -> None:
        for lba in range(first, end):
            key = self.key(volume, generation, lba)
            at = self._set(key)
            for way in range(WAYS):
                if self._entries[at + way].key == key:
                    self._entries[at + way].key = self._entries[at + way].value = 0
