"""The simulation with a theme more: both copies of pages of metadata go bad on the device.

    TortureLost(seed, operations, hooked).run()

- Before a start, after a clean stop or power loss, and while it runs: a page of any tree and level becomes garbage,
  zeros, what lies in another slot, or has one bit flipped (`hurt`). One that is in memory then is not missed before it
  has left it; one that is written anew first, never.
- Now and then the device comes to itself (`heal`), or all is put right offline (`mend`): what the lost pages held comes
  back, or only what `--repair` does not have from the rest.
- The oracle (`legal`): what needs a lost page of the map, or reads a block whose fingerprint is lost, may be told so,
  with the page's name. Writes that were posted there wait: what touches them, and the volume's flushes, may fail. Where
  counts or fingerprints are lost there may be too few places: then flushes may fail. Nothing else fails, everything is
  answered, and a stop ends.
- Nothing that was acknowledged is lost by it: a copy of the device on which what was damaged is as before has counts
  that are too high, perhaps, and nothing else is wrong with it (`inspect`); after `mend` nothing is.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from damagekit import Page, in_memory, pages_of
from dedupkit import BLOCK, Request
from torturekit import ENOSPC, LEAF, MS, Op, Torture, Volume

from atoll.ipc._ipc import lib
from atoll.services.dedup.check import layout
from atoll.services.dedup.check.run import run as check_device

ECORRUPT, EUNFLUSHED = int(lib.ATOLL_ECORRUPT), int(lib.ATOLL_EUNFLUSHED)
READERS = ("read", "ragged", "fua", "zero", "promise")  # may need what a block held
DERIVED = {layout.TREE_GROUPS, layout.TREE_REFS, layout.TREE_SLOTS}  # follow from other trees
PLACES = {layout.TREE_REFS, layout.TREE_PRINTS}  # without which nothing can be placed
NAMES = ["volume table", "groups", "reference counts", "fingerprints", "map", "slots"]  # as the store says them
NEVER = 1 << 62
STOP_MS = 20_000  # then who waits for it gives it up


@dataclass
class Damage:
    page: Page
    good: dict[int, bytes]  # by block
    bad: dict[int, bytes]
    until: int = NEVER  # since then nobody may miss the page

    def is_on(self, memory: Any) -> bool:
        """Both copies are still as they were made. Else their places hold something else by now."""
        return all(memory[block * BLOCK : (block + 1) * BLOCK] == bad for block, bad in self.bad.items())

    def undo(self, memory: Any) -> None:
        if self.is_on(memory):
            for block, good in self.good.items():
                memory[block * BLOCK : (block + 1) * BLOCK] = good

    def follows(self, ready: set[int]) -> bool:
        """What the page held is known without it, or is of no volume that anybody will ask for."""
        tree, *place = self.page
        return tree in DERIVED or (tree == layout.TREE_MAP and ready.isdisjoint(layout.volumes_of(*place)))

    def covers(self, volume: int, first: int, last: int) -> bool:
        """Of these blocks of a volume it is a page of the map."""
        tree, level, number = self.page
        begin, end = number << 8 * level, (number + 1) << 8 * level
        return tree == layout.TREE_MAP and begin <= volume << 39 | last // LEAF and volume << 39 | first // LEAF < end


class TortureLost(Torture):
    def __init__(
        self, seed: int, operations: int, hooked: ModuleType, trace: bool = False, theme: str = "", **settings: Any
    ) -> None:
        theme = theme or random.Random(seed).choice(["lost", "lost", "paging", "full", "crashes", "syncs", "tier"])
        super().__init__(seed, operations, hooked, trace, theme, **settings)
        self.failures = self.failures and self.chance.random() < 0.5
        self.catastrophes = self.chance.choice([1 / 400, 1 / 100])
        self.damages: list[Damage] = []
        self.kept: dict[str, dict[int, int]] = {}  # by volume and LBA: when it was posted where the map may be lost
        self.started = 0
        self.ends = False

    # --- Damage -------------------------------------------------------------------------------------------------------

    def hurt(self) -> None:
        """One page of the newest root, if it is not being written."""
        chance, memory = self.chance, self.device.memory
        found = pages_of(in_memory(memory))
        on = {damage.page for damage in self.damages if damage.is_on(memory)}
        rest = {page: both for page, both in found.items() if page not in on and not self.device.volatile.keys() & both}
        if not rest:
            return
        often = [layout.TREE_MAP, layout.TREE_MAP, layout.TREE_MAP, layout.TREE_REFS, layout.TREE_PRINTS]
        tree = chance.choice([*often, *range(len(NAMES))])
        level = 0 if chance.random() < 0.7 else chance.randrange(1, layout.TOP_LEVEL[tree] + 1)
        some = [page for page in rest if page[:2] == (tree, level)]
        if not some:
            return
        page = chance.choice(some)
        good = {block: memory[block * BLOCK : (block + 1) * BLOCK] for block in rest[page]}
        bad = {block: self.spoiled(content) for block, content in good.items()}
        for block, content in bad.items():
            memory[block * BLOCK : (block + 1) * BLOCK] = content
        self.damages = [damage for damage in self.damages if not damage.good.keys() & good.keys()]
        self.damages.append(Damage(page, good, bad))
        self.lossy = True
        self.note("hurts", page, sorted(bad))
        self.counts[f"hurt {NAMES[tree]} {level}"] += 1
        for op in self.live:
            self.perhaps_kept(op)

    def spoiled(self, good: bytes) -> bytes:
        chance, bad = self.chance, good
        while bad == good:
            match chance.randrange(4):
                case 0:
                    bad = chance.randbytes(BLOCK)
                case 1:
                    bad = bytes(BLOCK)
                case 2:
                    at = chance.randrange(BLOCK)
                    bad = good[:at] + bytes([good[at] ^ 1 << chance.randrange(8)]) + good[at + 1 :]
                case _:  # what it, or another one, was
                    self.region_of(0)
                    assert self.regions is not None
                    at = chance.randrange(self.regions[2], self.regions[3])
                    bad = self.device.memory[at * BLOCK : (at + 1) * BLOCK]
        return bad

    def missed(self, since: int) -> list[Damage]:
        """What somebody who asked then may miss."""
        return [damage for damage in self.damages if damage.until > since]

    def heal(self) -> None:
        """The device comes to itself."""
        self.note("heals")
        self.counts["heals"] += 1
        calm, self.calm = self.calm, True
        healed = self.missed(self.time)
        for damage in healed:
            damage.undo(self.device.memory)
        for wait in (0, 2000 * MS, 2000 * MS):  # what was read before is used; then it is read again
            self.clock += wait
            for _ in range(20):
                self.turn()
        now = self.tick()
        for damage in healed:
            damage.until = now
        self.calm = calm

    def offline(self, healed: Collection[Damage], repair: bool = False) -> dict[str, Any]:
        """What `atoll check` says of a copy of the device on which what was damaged is as before. `repair`: of the
        device itself; it is at rest."""
        image = bytearray(self.device.memory)
        for damage in healed:
            damage.undo(image)
        file = os.memfd_create("device")
        try:
            os.pwrite(file, image, 0)
            found = check_device(Path(f"/proc/self/fd/{file}"), data=bool(healed), repair=repair)
            if repair:
                self.device.memory[:] = os.pread(file, len(image), 0)
                self.device.volatile.clear()
        finally:
            os.close(file)
        return found

    def inspect(self) -> None:
        """The store was stopped: but for what was damaged nothing is wrong with it, except counts that are too high."""
        found = self.offline(self.damages)
        assert not found["fatal"], found["fatal"]
        for one in found["findings"]:
            leak = re.search(r"counts (\d+) references?, (the map has (\d+)|and the map names it nowhere)", one["text"])
            assert leak is not None and int(leak[1]) > int(leak[3] or 0), found["findings"][:20]
            self.counts["leaks found"] += 1

    def mend(self) -> None:
        self.note("mends")
        self.counts["mends"] += 1
        self.settle()
        self.close()
        self.inspect()
        healed = self.damages
        if self.chance.random() < 0.7:
            ready = {volume.number for volume in self.volumes}
            healed = [damage for damage in healed if not damage.follows(ready)]
        found = self.offline(healed, True)
        assert found["ok"], found["findings"][:20]
        self.all_over()
        self.lossy = False
        super().start()
        self.found(True)

    def all_over(self) -> None:
        now = self.tick()
        for damage in self.missed(now):
            damage.until = now

    # --- Starts and stops ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.kept.clear()
        if hasattr(self, "stage"):
            for damage in self.damages:
                if not damage.is_on(self.device.memory):
                    damage.until = min(damage.until, self.time)
            if not self.ends and self.chance.random() < 0.7:
                self.regions = None
                for _ in range(self.chance.choice([1, 1, 2, 5])):
                    self.hurt()
        super().start()
        self.started = self.time

    def refused(self, reason: str) -> None:
        """The start needs a lost page. If it follows from others it is repaired; else the device comes to itself."""
        self.note("is refused", reason)
        said = re.search(r": ([a-z ]+), level (\d+), page (\d+)$", reason)
        assert said is not None, reason
        page = (NAMES.index(said[1]), int(said[2]), int(said[3]))
        lost = {damage.page for damage in self.damages if damage.is_on(self.device.memory)}
        assert page in lost, (reason, lost)
        self.counts[f"refused for {said[1]}"] += 1
        found = self.offline([], True)
        if any(tree not in DERIVED for tree, _, _ in lost):
            found = self.offline(self.damages, True)
            self.all_over()
        assert found["ok"], (lost, found["fatal"], found["findings"][:20])
        super().start()

    def restart(self) -> None:
        if self.chance.random() < 0.5:
            super().restart()
            return
        self.note("stops")
        self.calm = True
        self.until(lambda: not self.live, "answers")
        if self.stopped():
            self.counts["stops"] += 1
            self.inspect()
            self.start()
            self.found(True)
        else:
            self.counts["stops in vain"] += 1
            self.all_die()

    def stopped(self) -> bool:
        """False: what was acknowledged finds no place, it stays in memory."""
        stage = self.stage
        reason = stage.lib.DEDUP_REASON_TIMEOUT
        for _ in range(STOP_MS):
            self.hooked.lib.hook_set_clock(self.clock)
            reason = stage.lib.dedup_run(stage.state, stage.lib.DEDUP_GOAL_CLOSE, 1)
            if reason != stage.lib.DEDUP_REASON_TIMEOUT:
                break
            self.turns += 1
            self.clock += MS
            stage.disk()
            self.take_answers()
        self.calm = False
        if reason == stage.lib.DEDUP_REASON_REACHED:
            return True
        waits = self.kept or self.far or self.rude or self.crashed  # posted writes, or a block that is set aside
        assert self.lacks_places() or (waits and reason == stage.lib.DEDUP_REASON_UNFLUSHED), self.state()
        return False

    def relieve(self, attempt: int) -> None:
        super().relieve(attempt)
        if attempt == 60:
            self.heal()

    def perhaps(self) -> None:
        super().perhaps()
        chance = self.chance.random()
        if chance < 0.005:
            self.hurt()
        elif chance < 0.006:
            self.heal()
        elif chance < 0.0065:
            self.mend()

    def finish(self) -> None:
        self.settle(verify=True)
        self.ends = True
        self.mend()
        super().finish()

    # --- The oracle ---------------------------------------------------------------------------------------------------

    def send(self, op: Op, request: Request) -> int:
        now = super().send(op, request)
        self.perhaps_kept(op)
        return now

    def perhaps_kept(self, op: Op) -> None:
        if op.kind == "post":
            lbas = list(op.changes)
            if any(damage.covers(op.volume.number, min(lbas), max(lbas)) for damage in self.missed(self.time)):
                self.kept.setdefault(op.volume.name, {}).update(dict.fromkeys(lbas, op.sent))

    def flushed(self, volume: Volume, sent: int) -> None:
        super().flushed(volume, sent)
        left = {lba: posted for lba, posted in self.kept.pop(volume.name, {}).items() if posted > sent}
        if left:
            self.kept[volume.name] = left

    def lacks_places(self) -> bool:
        """Since the start there may have been too few, and somebody waits for one: a logged block, or a request, as a
        posted write that dedup keeps is one."""
        figures = self.stage.figures()
        waits = figures.failed_records != 0 or figures.accepted != 0
        return waits and any(damage.page[0] in PLACES for damage in self.damages if damage.until > self.started)

    def legal(self, op: Op, status: int) -> bool:
        if super().legal(op, status):
            return True
        request = op.request
        assert request is not None
        kept = self.kept.get(op.volume.name, {})
        if status == EUNFLUSHED:
            return (op.kind == "flush" and bool(kept)) or (op.kind in ("flush", "fua") and self.lacks_places())
        if status == ENOSPC and op.kind != "post" and self.lacks_places():
            return True  # it comes after a posted write that waits in vain
        if status != ECORRUPT or op.kind in ("post", "flush"):
            return False
        first, last = request.offset // BLOCK, (request.offset + request.length - 1) // BLOCK
        if any(lba in kept for lba in range(first, last + 1)):
            return True
        if op.kind == "cache":
            return False
        page = (request.failed >> 56, request.failed >> 48 & 0xFF, request.failed & (1 << 48) - 1)
        return any(
            damage.page == page
            and (damage.covers(op.volume.number, first, last) or (page[0] == layout.TREE_PRINTS and op.kind in READERS))
            for damage in self.missed(op.sent)
        )

    def leaked(self, text: str) -> bool:
        """What the live check says of pages that it could not read, and of counts that are too high, is all."""
        pages = {damage.page for damage in self.missed(self.time)}
        no_map, no_counts = (any(page[0] == tree for page in pages) for tree in (layout.TREE_MAP, layout.TREE_REFS))
        for line in text.splitlines()[: -1 if len(text) > 65000 else None]:  # the last may be cut off
            words = [int(word) for word in re.findall(r"\d+", line)]
            if named := re.search(r"a page of the map is damaged \(leaf \d+, page ([0-9a-f]+)\)", line):
                page = int(named[1], 16)
                good = (page >> 56, page >> 48 & 0xFF, page & (1 << 48) - 1) in pages
            elif "references, map and log have" in line:
                good = words[1] > words[2]
            elif "blocks are mapped, its entry says" in line:
                good = no_map and words[1] < words[2]
            elif "references, the sum says" in line:
                good = no_counts or words[0] > words[1]
            else:
                good = no_counts and ("its page of counts is damaged" in line or "places are referred to" in line)
            if not good:
                return False
        return True
