"""The fast tier on the stage: what moves there, what is served there, and all that can go wrong with its device."""

from __future__ import annotations

import mmap
import random
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from dedupkit import BLOCK, DISK, LLRRM, OK, Io, Request, Stage

from atoll.ipc._ipc import lib

MIB = 1 << 20
EIO = int(lib.ATOLL_EIO)
READ, WRITE = int(lib.ATOLL_OP_IO_READ), int(lib.ATOLL_OP_IO_WRITE)
ONLINE, AWAY, REFUSED = 4, 5, 6  # enum tier_state


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


class Tiered(Stage):
    """A stage with a fast device, a volume whose blocks move at two references, and what they hold."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"fast_blocks": 512, "nic_pages": 1024, "cache_pages": 512, "track_blocks": 4096} | settings)

    def begin(self, tier: int = 2, threshold: int = 1) -> None:
        self.open()
        self.volume = self.create_volume("v", 16 * MIB, threshold=threshold, tier=tier)
        self.held: dict[int, bytes] = {}
        self.until("the tier is there", lambda: self.figures().tier_state == ONLINE)

    def until(self, what: str, look: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not look():
            self.turn()
            self.disk()
            self.answers()
            assert time.monotonic() < deadline, what

    def put(self, lba: int, *blocks: bytes) -> None:
        for at in range(0, len(blocks), 64):
            piece = blocks[at : at + 64]
            self.write(self.volume, (lba + at) * BLOCK, b"".join(piece))
            self.held |= {lba + at + index: data for index, data in enumerate(piece)}
        self.drain()

    def settle(self) -> None:
        self.until("copies are made", lambda: not self.figures().tier_queued and not self.figures().tier_copies)

    def forget_cache(self) -> None:
        """Reads that fill the cache with other blocks, so that the next ones come from a device. Twice, for what is
        read once pushes out nothing that was used."""
        for lba in range(2000, 2000 + 520, 64):
            if lba not in self.held:
                self.put(lba, *(block(9000 + lba + index) for index in range(64)))
        for lba in range(2000, 2000 + 520, 64):
            self.get(lba, 64)
            self.get(lba, 64)

    def get(self, lba: int, count: int = 1) -> Request:
        request = self.read(self.volume, lba * BLOCK, count * BLOCK)
        self.run_until_idle()
        assert request.status == OK, request
        for index in range(count):
            assert request.data[index * BLOCK : (index + 1) * BLOCK] == self.held.get(lba + index, bytes(BLOCK))
        return request

    def reads(self, role: int) -> list[Io]:
        return [io for io in self.io_log if io.role == role and io.opcode == READ]

    def verify(self) -> None:
        for lba in sorted(self.held):
            self.get(lba)
        self.check()

    def restart(self) -> None:
        """An orderly stop, and a new run on the same devices."""
        device, fast = self.close_store(), self.fast[:]
        for role in self.rings:
            self._remake(role)
        self.device[:], self.fast[:] = device, fast
        self.open()

    def _remake(self, role: int) -> None:
        from atoll.ipc import physmap

        physmap.unmap_arena(role)
        self._make(role, *self.shapes[role])
        if role != self.domain.role:
            self.domains[role] = self._open_domain(role, 1)
        else:
            self.incarnation = 0
        self.lent_pages.clear()
        self.free_pages = set(range(self.nic_pages))


@pytest.fixture
def stage() -> Iterator[Tiered]:
    with Tiered() as stage:
        stage.begin()
        yield stage
        stage.verify()


def test_a_block_moves_when_its_references_reach_the_threshold() -> None:
    with Tiered() as stage:
        stage.begin(tier=3)
        data = block(1)
        stage.put(0, data)
        stage.put(10, data)
        stage.settle()
        assert stage.figures().tier_used == 0
        stage.put(20, data)
        stage.settle()
        assert stage.figures().tier_used == 1
        assert stage.counters()["tier_copied_blocks"] == 1
        stage.forget_cache()
        stage.io_log.clear()
        for lba in (0, 10, 20):
            request = stage.get(lba)
            assert all(address >> 38 == (0x200000000000 >> 38) + LLRRM for address, _, _ in request.segments)
        assert len(stage.reads(LLRRM)) == 1, "and then from the pages of the fast device's driver"
        assert stage.reads(DISK) == []
        stage.verify()


def test_refused_duplicates_count_as_references() -> None:
    """A block that always stands alone is never shared at THN 4, so its references alone would not move it."""
    with Tiered() as stage:
        stage.begin(tier=3, threshold=4)
        data = block(1)
        for number in range(3):
            assert stage.figures().tier_used == 0
            stage.put(10 * number, data)
            stage.settle()
        assert stage.figures().tier_used == 1
        stored = stage.figures().stored_blocks
        for number in range(3, 9):
            stage.put(10 * number, data)
        assert stage.figures().stored_blocks == stored
        assert stage.counters()["tier_shared_blocks"] == 6
        stage.verify()


def test_threshold_one_moves_everything() -> None:
    with Tiered() as stage:
        stage.begin(tier=1)
        stage.put(0, *(block(index) for index in range(20)))
        stage.settle()
        assert stage.figures().tier_used == 20
        stage.verify()


def test_a_duplicate_in_the_tier_needs_no_run() -> None:
    """Small duplicates that the run threshold gives up, recovered where a random read costs nothing."""
    with Tiered() as stage:
        stage.begin(tier=2, threshold=8)
        data = block(2)
        stage.put(0, data)
        single = stage.create_volume("single", MIB, threshold=1, tier=2)
        stage.write(single, 0, data)
        stage.drain()
        stage.settle()
        assert stage.figures().tier_used == 1
        before = stage.figures().stored_blocks
        stage.put(50, block(3), data, block(4))
        assert stage.figures().stored_blocks == before + 2
        assert stage.counters()["tier_shared_blocks"] == 1
        stage.verify()


def test_a_read_brings_a_much_referenced_block(stage: Tiered) -> None:
    """Blocks that got their references while the device was away, or left for others."""
    stage.io_rule = lambda io: EIO if io.role == LLRRM else OK
    for index in range(12):
        stage.put(2 * index, block(5))
        stage.put(100 + 2 * index, block(600 + index), block(600 + index))
    stage.until("given up", lambda: stage.figures().tier_state == AWAY)
    stage.io_rule = None
    stage.until("taken back", lambda: stage.figures().tier_state == ONLINE)
    stage.forget_cache()
    for index in range(12):
        stage.get(100 + 2 * index)
    stage.settle()
    used = stage.figures().tier_used
    assert used >= 12
    stage.forget_cache()
    stage.io_log.clear()
    stage.get(100)
    assert len(stage.reads(LLRRM)) == 1


def test_what_is_freed_leaves_before_its_place_is_used_again(stage: Tiered) -> None:
    stage.put(0, block(6))
    stage.put(1, block(6))
    stage.settle()
    assert stage.figures().tier_used == 1
    stage.put(0, block(7))
    assert stage.figures().tier_used == 1
    stage.trim(stage.volume, BLOCK, BLOCK)
    del stage.held[1]
    stage.drain()
    assert stage.figures().tier_used == 0
    for index in range(30):
        stage.put(100, *(block(1000 + index * 64 + each) for each in range(64)))
        stage.flush(stage.volume)
        stage.run_until_idle()
    assert stage.counters()["tier_mismatches"] == 0


def test_full_the_least_useful_leave() -> None:
    """64 places: what is read stays, what is not makes room; a newcomer must be worth more than whom it replaces."""
    with Tiered(tier_entries=64, fast_pages=16) as stage:
        stage.begin(tier=2)
        hot = [block(index) for index in range(32)]
        stage.put(0, *hot)
        stage.put(100, *hot)
        stage.settle()
        cold = [block(50 + index) for index in range(64)]
        for _ in range(3):
            stage.forget_cache()
            for lba in range(32):
                stage.get(lba)
        stage.put(200, *cold)
        stage.put(300, *cold)
        stage.settle()
        counted = stage.counters()
        assert counted["tier_evictions"] + counted["tier_kept_out"] >= 32
        assert stage.figures().tier_used == 64
        stage.forget_cache()
        stage.io_log.clear()
        for lba in range(32):
            stage.get(lba)
        assert len(stage.reads(LLRRM)) >= 28, "most of what was read before is still there"
        stage.verify()


def test_a_wrong_copy_is_not_believed(stage: Tiered) -> None:
    stage.put(0, block(8))
    stage.put(1, block(8))
    stage.settle()
    stage.fast[:] = bytes(len(stage.fast))
    stage.forget_cache()
    stage.get(0)
    assert stage.counters()["tier_mismatches"] == 1
    assert stage.counters()["corrupt_reads"] == 0
    assert stage.counters()["errors"] == 0
    stage.settle()


def comes_back(stage: Tiered, count: int) -> None:
    """The device does again what it is asked for, and so many blocks (0, 2, 4, ...) are read from it."""
    stage.io_rule = None
    stage.until("taken back", lambda: stage.figures().tier_state == ONLINE)
    stage.forget_cache()
    stage.io_log.clear()
    for index in range(count):
        stage.get(2 * index)
    assert stage.reads(LLRRM)


def test_errors_send_readers_to_the_main_device(stage: Tiered) -> None:
    for index in range(20):
        stage.put(2 * index, block(700 + index))
        stage.put(100 + 2 * index, block(700 + index))
    stage.settle()
    assert stage.figures().tier_used == 20
    stage.forget_cache()
    stage.io_rule = lambda io: EIO if io.role == LLRRM else OK
    for index in range(20):
        stage.get(2 * index)
    counted = stage.counters()
    assert 1 <= counted["tier_read_errors"] <= 8, "then it is given up for a while: writes fail, too"
    assert counted["tier_aways"] == 1
    assert counted["errors"] == 0
    assert stage.ffi.string(stage.lib.dedup_tier_reason(stage.state)) == b"its superblock or table cannot be read"
    comes_back(stage, 20)


def test_a_device_that_became_smaller_is_away_until_it_is_whole_again(stage: Tiered) -> None:
    for index in range(20):
        stage.put(2 * index, block(1700 + index))
        stage.put(100 + 2 * index, block(1700 + index))
    stage.settle()
    stage.forget_cache()
    smaller = 1 + 4 + 10  # superblock, table, ten places
    stage.io_rule = lambda io: EIO if io.role == LLRRM and io.offset + io.length > smaller * BLOCK else OK
    stage.io_log.clear()
    for index in range(20):
        stage.get(2 * index)
    stage.until("given up", lambda: stage.figures().tier_state == AWAY)
    assert b"smaller than it was" in stage.ffi.string(stage.lib.dedup_tier_reason(stage.state))
    stage.until("asked again", lambda: stage.counters()["tier_aways"] >= 2)
    assert not [io for io in stage.io_log if (io.role, io.opcode, io.offset) == (LLRRM, WRITE, 0)], "left as it is"
    assert stage.counters()["errors"] == 0
    comes_back(stage, 20)


def test_a_silent_driver_holds_up_nobody(stage: Tiered) -> None:
    """Dead and not replaced: what it was asked for comes late or never; its buffers are not used before."""
    for index in range(6):
        stage.put(2 * index, block(800 + index))
        stage.put(100 + 2 * index, block(800 + index))
    stage.settle()
    stage.forget_cache()
    requests = [stage.read(stage.volume, 2 * index * BLOCK, BLOCK) for index in range(6)]
    stage.turn()
    stage.take_ios()
    held = [io for io in stage.ios if io.role == LLRRM]
    assert len(held) == 6
    deadline = time.monotonic() + 20
    while not all(request.done for request in requests):
        stage.turn()
        stage.take_ios()
        for io in [io for io in stage.ios if io not in held]:
            stage.complete(io)
        stage.answers()
        assert time.monotonic() < deadline
    for index, request in enumerate(requests):
        assert request.status == OK and request.data == block(800 + index)
    assert stage.figures().tier_state == AWAY
    stage.check()
    for io in held:
        stage.complete(io)
    stage.until("taken back", lambda: stage.figures().tier_state == ONLINE)
    stage.io_log.clear()
    stage.forget_cache()
    stage.get(0)
    assert stage.reads(LLRRM)


def test_short_of_its_pages_the_main_device_serves() -> None:
    with Tiered(fast_pages=12) as stage:  # 4 for reads
        stage.begin(tier=1)
        stage.put(0, *(block(900 + index) for index in range(64)))
        stage.settle()
        assert stage.figures().tier_used == 64
        stage.forget_cache()
        stage.io_log.clear()
        stage.get(0, 64)
        assert stage.reads(DISK)
        stage.get(4)
        stage.verify()


def test_it_is_warm_after_a_restart() -> None:
    with Tiered() as stage:
        stage.begin()
        for index in range(30):
            stage.put(2 * index, block(1100 + index))
            stage.put(100 + 2 * index, block(1100 + index))
        stage.settle()
        stage.restart()
        stage.until("loaded", lambda: stage.figures().tier_state == ONLINE)
        assert stage.figures().tier_used == 30
        stage.io_log.clear()
        for index in range(30):
            stage.get(2 * index)
        assert len(stage.reads(LLRRM)) == 30
        assert stage.counters()["tier_mismatches"] == 0
        stage.verify()


def test_an_old_table_does_no_harm() -> None:
    """Power fails: the table is of some earlier time, and the main store has gone on."""
    with Tiered() as stage:
        stage.begin()
        for index in range(30):
            stage.put(2 * index, block(1200 + index))
            stage.put(100 + 2 * index, block(1200 + index))
        stage.settle()
        stage.restart()
        old = stage.fast[:]
        stage.until("loaded", lambda: stage.figures().tier_state == ONLINE)
        for index in range(0, 30, 2):
            stage.put(2 * index, block(1300 + index))
            stage.put(100 + 2 * index, block(1300 + index))
        for _ in range(3):
            stage.flush(stage.volume)
            stage.run_until_idle()
            stage.put(400, *(block(1400 + index) for index in range(64)))
        stage.settle()
        stage.restart()
        stage.fast[:] = old
        stage.until("loaded", lambda: stage.figures().tier_state == ONLINE)
        stage.verify()
        assert stage.counters()["errors"] == 0


@pytest.mark.parametrize(
    ("content", "state"),
    [(b"", ONLINE), (b"\0" * 40000 + b"x", ONLINE), (b"somebody's data", REFUSED), (b"ATOLLFT1 damaged", ONLINE)],
)
def test_what_is_found_on_the_device(content: bytes, state: int) -> None:
    """Blank or once ours: formatted. Anything else is left alone, and the service does without."""
    with Tiered() as stage:
        stage.fast[: len(content)] = content
        if content.startswith(b"ATOLL"):  # the magic stands behind the checksum
            stage.fast[: len(content) + 8] = b"12345678" + content
        stage.open()
        stage.volume, stage.held = stage.create_volume("v", MIB, tier=1), {}
        stage.until("it is decided", lambda: stage.figures().tier_state in (ONLINE, REFUSED))
        assert stage.figures().tier_state == state
        stage.put(0, block(1))
        stage.settle()
        if state == REFUSED:
            assert stage.fast[: len(content)] == content
            assert b"no tier" in stage.ffi.string(stage.lib.dedup_tier_reason(stage.state))
        stage.verify()


def test_a_device_that_lost_all_while_it_is_open_is_formatted(stage: Tiered) -> None:
    stage.put(0, block(1500))
    stage.put(1, block(1500))
    stage.settle()
    stage.fast[:] = b"x" * len(stage.fast)
    stage.io_rule = lambda io: EIO if io.role == LLRRM else OK
    for index in range(16):
        stage.put(10 + 2 * index, block(1600 + index), block(1600 + index))
    stage.until("given up", lambda: stage.figures().tier_state == AWAY)
    stage.io_rule = None
    stage.until("taken back", lambda: stage.figures().tier_state == ONLINE)
    assert bytes(stage.fast[8:16]) == b"ATOLLFT1"
    stage.forget_cache()
    stage.get(0)
    assert stage.counters()["tier_mismatches"] == 0, "what it held before is forgotten"


# --- Deaths ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_death_after_each_store(hooked: ModuleType) -> None:
    """dedup dies after its n-th store of a round in which blocks come, are read, leave and fail; nothing is wrong."""
    chance = random.Random(7)
    shared = mmap.mmap(-1, 8)
    count = memoryview(shared).cast("Q")
    total: dict[str, int] = {}
    with Tiered(extension=hooked, tier_entries=64, fast_pages=16, nic_pages=512, cache_pages=456) as stage:
        stage.begin(tier=2)
        stage.put(1000, *(block(5000 + index) for index in range(512)))
        for index in range(50):
            stage.put(2 * index, block(index), block(index))
        stage.settle()
        nth, kills, most, number = 1, 0, 1, 0
        while nth < 1.2 * most and nth < 700:
            number += 1
            lba = chance.randrange(0, 400, 2)
            stage.write(stage.volume, lba * BLOCK, 2 * block(2000 + number))
            stage.held |= {lba: block(2000 + number), lba + 1: block(2000 + number)}
            wanted = [*chance.sample(range(100), 4), *chance.sample(range(1000, 1512), 40)]
            requests = [(at, stage.read(stage.volume, at * BLOCK, BLOCK)) for at in wanted if at // 2 != lba // 2]
            if nth % 5 == 0:
                stage.io_rule = lambda io: EIO if io.role == LLRRM and chance.random() < 0.2 else OK
            for _ in range(5):
                kills += stage.turns_in_child(die_after=nth) != 0
                assert stage.turns_in_child(turns=2, count=count) == 0
                most = max(most, count[0])
                stage.disk(shuffle=True)
                stage.answers()
            stage.attach()
            stage.check()
            stage.io_rule = None
            stage.run_until_idle(shuffle=True)
            for at, request in requests:
                assert request.done and request.status == OK and request.data == stage.held.get(at, bytes(BLOCK))
            stage.check()
            if len(stage.free_pages) < 64:
                stage.drain()
            nth += 1 if nth < 40 else 1 + nth // 12
        stage.drain()
        total = stage.counters()
        stage.verify()
    count.release()
    print(f"{kills} kills, up to store {nth} of {most}; { {name: n for name, n in total.items() if 'tier' in name} }")
    assert kills > 60 and total["tier_copied_blocks"] > 20 and total["tier_evictions"] and total["tier_read_blocks"]


@pytest.mark.slow
def test_death_while_it_is_loaded_and_formatted(hooked: ModuleType) -> None:
    """Each store of the way from a device that is there to the tier that serves."""
    for blank in (False, True):
        nth, kills = 1, 0
        while True:
            with Tiered(extension=hooked, fast_blocks=2048, nic_pages=256) as stage:
                stage.begin(tier=1)
                stage.put(0, *(block(index) for index in range(20)))
                stage.settle()
                stage.restart()
                if blank:
                    stage.fast[:] = bytes(len(stage.fast))
                while stage.turns_in_child(die_after=nth) == 0 and stage.figures().tier_state != ONLINE:
                    stage.disk()
                died = stage.figures().tier_state != ONLINE
                kills += died
                stage.attach()
                stage.check()
                stage.until("loaded", lambda stage=stage: stage.figures().tier_state == ONLINE)  # type: ignore[misc]
                assert stage.figures().tier_used == (0 if blank else 20)
                stage.verify()
            nth += 1 + nth // 3
            if not died or nth > 300:
                break
        print(f"blank {blank}: {kills} kills")
        assert kills >= 6


def test_everybody_dies() -> None:
    """The arenas of nic and dedup are adopted: the tier goes on from its table in memory."""
    with Tiered() as stage:
        stage.begin()
        for index in range(10):
            stage.put(2 * index, block(1700 + index))
            stage.put(100 + 2 * index, block(1700 + index))
        for _ in range(3):
            stage.turn()
            stage.take_ios()  # copies under way, never answered
        stage.everybody_dies()
        stage.attach(adopted=True)
        stage.nic_starts_anew()
        stage.check()
        stage.until("it is there again", lambda: stage.figures().tier_state == ONLINE)
        for _ in range(2):
            stage.forget_cache()
            stage.verify()
        stage.settle()
        assert stage.figures().tier_used >= 10


def test_its_writes_come_from_pages_of_its_own(stage: Tiered) -> None:
    """Never from nic's pages, which would be lent for longer."""
    stage.put(0, block(1800))
    stage.io_log.clear()
    stage.put(1, block(1800))
    stage.settle()
    writes = [io for io in stage.io_log if io.role == LLRRM and io.opcode == WRITE and io.length == BLOCK]
    assert writes


def test_candidates_on_both_devices_when_few_reads_can_be_sent() -> None:
    """Clients' reads have taken almost all that is theirs; what destage is to compare with lies on the main device and
    on the fast one, whose reads may take no more than clients' may."""
    left = 8
    with Tiered() as stage:
        stage.begin()
        stage.put(0, *(block(index) for index in range(448)))
        stage.put(1000, *(block(5000 + index) for index in range(8)))
        stage.put(1100, *(block(5000 + index) for index in range(8)))
        stage.settle()
        assert stage.figures().tier_used == 8
        stage.forget_cache()
        most = int(lib.ATOLL_IO_COUNT) - 64 - int(lib.ATOLL_IO_BLOCKS)  # io.h
        waiting = [stage.read(stage.volume, 2 * number * BLOCK, BLOCK) for number in range(most - left)]
        while len(stage.ios) < len(waiting):
            stage.turn()
            stage.take_ios()
        equal = [block(32 * number + 1) for number in range(10)] + [block(5000)]  # far apart: each read alone
        write = stage.write(stage.volume, 1200 * BLOCK, b"".join(equal))
        for _ in range(50):
            stage.turn()
            stage.take_ios()
        assert len(stage.ios) > len(waiting), "candidates are being read"
        stage.held |= {1200 + index: data for index, data in enumerate(equal)}
        stage.run_until_idle()
        assert all(request.status == OK for request in (write, *waiting))
        stage.drain()
        stage.verify()


def test_no_client_waits_for_what_is_read_to_be_copied() -> None:
    with Tiered() as stage:
        stage.begin(tier=3, threshold=4)
        data = [block(7000 + number) for number in range(8)]
        for number, content in enumerate(data):
            stage.put(100 + 2 * number, content)
        stage.forget_cache()
        stage.io_log.clear()
        for copy in range(4):
            for number, content in enumerate(data):
                stage.put(400 + 100 * copy + 2 * number, content)
            stage.settle()
        assert stage.counters()["tier_copied_blocks"] == len(data)
        reads = stage.reads(DISK)
        assert len(reads) == len(data) and not any(io.flags & lib.ATOLL_FLAG_AWAITED for io in reads)
        stage.verify()
