"""dedup dies: after each store of its journal, again and again, by itself, together with everybody else."""

from __future__ import annotations

import mmap
import random
import signal
from types import ModuleType

import pytest
from dedupkit import BLOCK, FUA, NO_HOLE, OK, Request, Stage
from lookupkit import Reader

from atoll.ipc._ipc import lib

SIZE = 64 * BLOCK


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


class Load:
    """Requests on ranges that do not meet, so that what each must see is known; checked when all are answered."""

    def __init__(self, stage: Stage, volume: int, seed: int) -> None:
        self.stage, self.volume, self.random = stage, volume, random.Random(seed)
        self.expected = bytearray(SIZE)
        self.requests: list[tuple[Request, bytes | None]] = []
        self.reader = Reader(stage)

    def submit(self, count: int) -> None:
        cuts = sorted(self.random.sample(range(1, SIZE // BLOCK), count - 1))
        for first, end in zip([0, *cuts], [*cuts, SIZE // BLOCK], strict=True):
            self.one(first * BLOCK, min((end - first), 20) * BLOCK)
        if self.random.random() < 0.5:
            self.requests.append((self.stage.flush(self.volume), None))
        for _ in range(4):  # what is read from memory must stay, whoever dies
            self.reader.take(self.volume, self.random.randrange(SIZE // BLOCK))

    def one(self, start: int, room: int) -> None:
        chance = self.random
        offset = start + (chance.randrange(BLOCK) if chance.random() < 0.3 else 0)
        length = room - (offset - start) - (chance.randrange(BLOCK - 1) if chance.random() < 0.3 else 0)
        length = max(1, min(length, start + room - offset))
        stage, volume, data = self.stage, self.volume, None
        kinds = ["write", "write", "write", "fua", "posted", "posted", "read", "read"]
        kinds += ["trim", "zero", "promise", "cache"]
        match chance.choice(kinds):
            case "posted":
                payload = b"".join(block(chance.randrange(400)) for _ in range(min(room // BLOCK, 16)))
                request = stage.write(volume, start, payload, lib.ATOLL_FLAG_POSTED)
                self.expected[start : start + len(payload)] = payload
            case "write" | "fua" as kind:
                content = chance.randrange(4)
                payload = b"".join(block(content * 100 + i % 3) for i in range(length // BLOCK + 1))[:length]
                request = stage.write(volume, offset, payload, FUA if kind == "fua" else 0, chance.random() < 0.3)
                self.expected[offset : offset + length] = payload
            case "read":
                request = stage.read(volume, offset, length)
                data = bytes(self.expected[offset : offset + length])
            case "trim":
                request = stage.trim(volume, offset, length)
                first, end = -(-offset // BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK
                if first < end:
                    self.expected[first:end] = bytes(end - first)
            case "cache":
                request = stage.cache(volume, offset, length)
            case kind:
                request = stage.zero(volume, offset, length, NO_HOLE if kind == "promise" else 0)
                self.expected[offset : offset + length] = bytes(length)
        self.requests.append((request, data))

    def verify(self) -> None:
        """All are answered, as they must be."""
        for request, data in self.requests:
            assert request.done and request.status == OK, request
            assert data is None or request.data == data, request
        self.requests.clear()

    def verify_all(self) -> None:
        request = self.stage.read(self.volume, 0, SIZE)
        self.stage.run_until_idle()
        assert request.data == self.expected


def finish(stage: Stage, load: Load) -> None:
    """A successor in this process finishes what is under way; everything is as it must be."""
    stage.attach()
    stage.check()
    stage.run_until_idle(shuffle=True)
    load.verify()
    stage.check()
    load.reader.verify(load.volume, load.expected)
    load.reader.check()
    if load.random.random() < 0.5 or len(stage.free_pages) < 3 * SIZE // BLOCK:
        load.reader.release()
        stage.run_until_idle()


@pytest.mark.slow
def test_death_after_each_store(hooked: ModuleType) -> None:
    """The same kinds of requests round by round; in round n each phase's first process dies after its n-th store."""
    shared = mmap.mmap(-1, 8)
    count = memoryview(shared).cast("Q")
    kills = 0
    with Stage(nic_pages=256, merge_pages=16, extension=hooked, seed=1, asks=0.5) as stage:
        stage.open()
        load = Load(stage, stage.create_volume("v", SIZE), seed=1)
        stage.run_until_idle()
        nth, phase_stores = 1, 1
        while nth < 1.5 * phase_stores and nth < 9000:
            load.submit(8)
            for _ in range(4):  # taking, destage, completion, sync
                kills += stage.turns_in_child(die_after=nth, turns=4) != 0
                phase_stores = max(phase_stores, 1)
                assert stage.turns_in_child(turns=4, count=count) == 0
                phase_stores = max(phase_stores, count[0])
                stage.disk(shuffle=True)
                stage.answers()
            finish(stage, load)
            if nth % 8 == 0:
                load.verify_all()
            if len(stage.free_pages) < 2 * SIZE // BLOCK:
                stage.flush(load.volume)
                stage.drain()
            nth += 1 if nth < 30 else 1 + nth // 12
        load.verify_all()
        stage.flush(load.volume)
        stage.drain()
        stage.check()
    count.release()
    print(f"{kills} kills, up to store {nth} of a phase with {phase_stores}")
    assert kills > 60


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_death_again_and_again(hooked: ModuleType, seed: int) -> None:
    """Successors die too, some while they recover; I/O completes late, to whoever plays dedup then."""
    chance = random.Random(seed)
    with Stage(device_blocks=2048, nic_pages=256, merge_pages=16, extension=hooked, seed=seed, asks=0.5) as stage:
        stage.open()
        load = Load(stage, stage.create_volume("v", SIZE), seed)
        stage.run_until_idle()
        kills = 0
        for _ in range(25):
            load.submit(chance.randrange(2, 12))
            for _ in range(chance.randrange(1, 12)):
                kills += stage.turns_in_child(die_after=int(chance.paretovariate(0.5)), turns=3) != 0
                stage.answers(send=chance.random() < 0.7)
                stage.take_ios()
                for io in list(stage.ios):
                    if chance.random() < 0.6 and stage.may_begin(io):
                        stage.complete(io)
            finish(stage, load)
            if len(stage.free_pages) < 2 * SIZE // BLOCK:
                stage.flush(load.volume)
                stage.drain()
        load.verify_all()
        stage.flush(load.volume)
        stage.drain()
        stage.check()
        assert stage.free_pages == set(range(stage.nic_pages))
        print(f"seed {seed}: {kills} kills")


def test_dies_where_a_batch_ends_and_the_next_begins(hooked: ModuleType) -> None:
    """With a processor of its own dedup does both in one step; what the first batch held must be there again."""
    hooked.lib.hook_set_apart(True)
    shared = mmap.mmap(-1, 8)
    count = memoryview(shared).cast("Q")
    try:
        with Stage(nic_pages=256, merge_pages=16, extension=hooked, asks=0.5) as stage:
            stage.open()
            volume = stage.create_volume("v", SIZE)
            expected, nth = bytearray(SIZE), 1
            while not count[0]:
                for first, blocks in ((0, 8), (20, 3)):  # the second comes when the first is written
                    data = b"".join(block(100 * nth + first + index) for index in range(blocks))
                    expected[first * BLOCK : (first + blocks) * BLOCK] = data
                    stage.write(volume, first * BLOCK, data)
                    if first == 0:
                        assert stage.turns_in_child(turns=4) == 0
                        stage.disk()
                        stage.answers()
                stage.turns_in_child(die_after=nth, count=count)
                stage.attach()
                stage.check()
                stage.run_until_idle()
                stage.drain()
                stage.check()
                request = stage.read(volume, 0, SIZE)
                stage.run_until_idle()
                assert request.data == expected
                nth += 7
    finally:
        count.release()
        hooked.lib.hook_set_apart(False)
    assert nth > 100


def test_dies_between_the_pieces_of_a_batch(hooked: ModuleType) -> None:
    """A batch is collected, matched and shared in pieces, each committed: whoever comes then finds blocks that are
    shared already beside others that are not."""
    chance = random.Random(11)
    count = 48
    with Stage(device_blocks=2048, nic_pages=512, extension=hooked, seed=11, asks=0.5) as stage:
        stage.open()
        volume = stage.create_volume("v", 8 * count * BLOCK)
        expected: dict[int, bytes] = {4 * i: block(i) for i in range(count)}
        for lba, data in expected.items():
            stage.write(volume, lba * BLOCK, data)
        stage.drain()
        kills = 0
        for round_number in range(5):
            for i in range(count):  # every second one is stored, one of three of the rest twice in the batch
                fresh = block(1000 * (round_number + 1) + (i if i % 3 else 0))
                lbas = (4 * count + 2 * i, 4 * count + 2 * i + 96)
                for lba, data in zip(lbas, (block(i), fresh), strict=True):
                    stage.write(volume, lba * BLOCK, data)
                    expected[lba] = data
            died = True
            while died:  # the next one dies as well, unless it comes to the end
                died = stage.turns_in_child(die_after=chance.randrange(100, 20_000), turns=60) != 0
                kills += died
                stage.attach()
                stage.answers()
                stage.disk()
            stage.drain()
            stage.check()
            reads = {lba: stage.read(volume, lba * BLOCK, BLOCK) for lba in expected}
            stage.run_until_idle()
            assert all(read.data == expected[lba] for lba, read in reads.items())
        assert kills >= 5
        assert stage.counters()["shared_blocks"] >= 5 * count


def test_places_in_flight_are_not_used_before_they_complete(hooked: ModuleType) -> None:
    with Stage(device_blocks=1024, nic_pages=256, extension=hooked, seed=5, asks=0.5) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.write(volume, 0, b"".join(block(i) for i in range(4)))
        assert stage.turns_in_child(turns=4) == 0  # taken, collected, matched, written
        stage.take_ios()
        late = [io for io in stage.ios if io.opcode == lib.ATOLL_OP_IO_WRITE and io.length == 4 * BLOCK]
        assert len(late) == 1
        stage.ios.remove(late[0])
        stage.answers()
        pages = {(at - stage.nic_buffer) // BLOCK for at, _ in late[0].segments}
        for round_number in range(60):
            data = b"".join(block(1000 * round_number + i + 10) for i in range(16))
            stage.write(volume, 0, data)
            stage.flush(volume)
            stage.turns_in_child(die_after=50 + 97 * round_number, turns=6)
            stage.attach()
            stage.turn()
            for _ in range(200):
                stage.turn()
                stage.take_ios()
                for io in stage.ios:
                    if io.opcode == lib.ATOLL_OP_IO_WRITE:
                        assert io.offset + io.length <= late[0].offset or late[0].offset + late[0].length <= io.offset
                stage.disk()
                stage.answers()
                if not stage.requests:
                    break
            assert pages <= stage.lent_pages, "a page in flight was given back"
        stage.ios.append(late[0])
        stage.complete(late[0])
        stage.run_until_idle()
        stage.drain()
        stage.check()
        read = stage.read(volume, 0, 16 * BLOCK)
        stage.run_until_idle()
        assert read.data == data


def test_poison(hooked: ModuleType) -> None:
    """A request that crashes dedup is tried once more alone, then refused; a SIGKILL counts against nobody."""
    with Stage(extension=hooked, destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.run_until_idle()
        before = stage.write(volume, 0, block(1))
        poison = stage.write(volume, BLOCK, block(2))
        after = stage.write(volume, 2 * BLOCK, block(3))
        for _ in range(3):
            assert stage.turns_in_child(die_after=60) == -signal.SIGKILL
        assert stage.turns_in_child(poison=poison.identity) == -signal.SIGSEGV
        assert stage.turns_in_child(poison=poison.identity, crashed=True, turns=2) == -signal.SIGSEGV
        stage.attach(crashed=True)
        stage.run_until_idle()
        assert (before.status, poison.status, after.status) == (OK, lib.ATOLL_EPOISON, OK)
        assert stage.counters()["poisoned"] == 1
        read = stage.read(volume, 0, 3 * BLOCK)
        stage.run_until_idle()
        assert read.data == block(1) + bytes(BLOCK) + block(3)
        stage.flush(volume)
        stage.drain()
        stage.check()
        assert stage.free_pages == set(range(stage.nic_pages)), "its pages too"


@pytest.mark.parametrize("written", [False, True])
def test_poison_in_destage(hooked: ModuleType, written: bool) -> None:
    """A block that crashes dedup while it is stored, with others and then alone, is set aside: kept and readable, and
    flushes fail until it is written again. All others are stored. `written`: the crash comes when it has its place."""
    with Stage(extension=hooked, destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.run_until_idle()
        blocks = [block(seed) for seed in range(10)]
        for number, content in enumerate(blocks):
            stage.write(volume, number * BLOCK, content)
        stage.run_until_idle()
        flush = stage.flush(volume)
        if written:
            while not any(io.opcode == lib.ATOLL_OP_IO_WRITE and io.length == 10 * BLOCK for io in stage.ios):
                stage.turn()
                stage.take_ios()
            stage.disk()
        assert stage.turns_in_child(poison_block=4, turns=5) == -signal.SIGSEGV
        stage.disk()
        assert stage.turns_in_child(poison_block=4, crashed=True, turns=40) == -signal.SIGSEGV
        stage.attach(crashed=True)
        stage.run_until_idle()
        assert flush.status == lib.ATOLL_EUNFLUSHED
        figures = stage.figures()
        assert (figures.failed_records, figures.log_records) == (1, 1), "all others are stored"
        seen = stage.ffi.new("struct dedup_seen *")
        assert stage.lib.dedup_take_damage(stage.state, seen)
        assert (seen.status, seen.volume, seen.lba) == (lib.ATOLL_EPOISON, volume, 4)
        read = stage.read(volume, 0, 10 * BLOCK)
        stage.run_until_idle()
        assert read.data == b"".join(blocks)
        stage.check()
        again = stage.flush(volume)
        stage.run_until_idle()
        assert again.status == lib.ATOLL_EUNFLUSHED
        stage.write(volume, 4 * BLOCK, block(99))
        flush = stage.flush(volume)
        stage.run_until_idle()
        assert flush.status == OK
        stage.drain()
        stage.check()
        assert stage.free_pages == set(range(stage.nic_pages))


def test_a_suspect_is_not_held_back_for_what_follows_it(hooked: ModuleType) -> None:
    """It is stored alone: a run that would be long enough to be shared with the blocks behind it does not come."""
    with Stage(extension=hooked, destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE, threshold=8)
        stage.write(volume, 0, b"".join(block(seed) for seed in range(16)))
        stage.flush(volume)
        stage.run_until_idle()
        stage.write(volume, 30 * BLOCK, block(3))
        stage.run_until_idle()
        flushes = [stage.flush(volume)]
        assert stage.turns_in_child(poison_block=30, turns=9) == -signal.SIGSEGV
        stage.write(volume, 31 * BLOCK, block(4))
        stage.attach(crashed=True)
        stage.run_until_idle()
        flushes.append(stage.flush(volume))
        stage.run_until_idle()
        assert [flush.status for flush in flushes] == [OK, OK]
        read = stage.read(volume, 30 * BLOCK, 2 * BLOCK)
        stage.run_until_idle()
        assert read.data == block(3) + block(4)
        stage.check()


def test_an_innocent_request_is_carried_out_at_the_second_try(hooked: ModuleType) -> None:
    with Stage(extension=hooked) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.run_until_idle()
        request = stage.write(volume, 0, block(1))
        assert stage.turns_in_child(poison=request.identity) == -signal.SIGSEGV
        stage.attach(crashed=True)
        stage.run_until_idle()
        assert request.status == OK
        stage.drain()
        stage.check()


@pytest.mark.parametrize("quarantine", [False, True])
@pytest.mark.parametrize("seed", [21, 22])
def test_everybody_dies(hooked: ModuleType, seed: int, quarantine: bool) -> None:
    """Arenas of nic and dedup are adopted: what was acknowledged is there."""
    chance = random.Random(seed)
    with Stage(device_blocks=4096, nic_pages=256, merge_pages=16, extension=hooked, seed=seed, asks=0.5) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.run_until_idle()
        expected = bytearray(SIZE)
        for _ in range(12):
            for _ in range(6):
                if chance.random() < 0.5:  # as many as there is room for; most are not applied when all die
                    first, blocks = chance.randrange(SIZE // BLOCK - 3), chance.randint(1, 3)
                    data = b"".join(block(chance.randrange(500)) for _ in range(blocks))
                    stage.post(volume, first * BLOCK, data)
                    expected[first * BLOCK : first * BLOCK + len(data)] = data
                    continue
                offset = chance.randrange(SIZE - 1)
                length = min(chance.randrange(1, 9 * BLOCK), SIZE - offset)
                data = b"".join(block(chance.randrange(500)) for _ in range(9))[:length]
                request = stage.write(volume, offset, data)
                while not request.done:  # destage goes on beside it
                    stage.turn()
                    stage.take_ios()
                    for io in list(stage.ios):
                        if io.opcode == lib.ATOLL_OP_IO_READ or (chance.random() < 0.3 and stage.may_begin(io)):
                            stage.complete(io)
                    stage.answers(send=chance.random() < 0.5)
                assert request.status == OK
                expected[offset : offset + len(data)] = data
            stage.turns_in_child(die_after=chance.randrange(1, 400), turns=3)
            stage.take_ios()
            stage.everybody_dies()
            stage.attach(adopted=True, quarantine=quarantine)
            if chance.random() < 0.5:
                stage.turn()  # nothing may be given back before nic has looked
            stage.nic_starts_anew()
            stage.check()
            read = stage.read(volume, 0, SIZE)
            stage.run_until_idle()
            assert read.data == expected
            stage.flush(volume)
            stage.drain()
            stage.check()
            assert stage.free_pages == set(range(stage.nic_pages))
            read = stage.read(volume, 0, SIZE)
            stage.run_until_idle()
            assert read.data == expected


def test_adopted_after_it_was_closed(hooked: ModuleType) -> None:
    """All die between dedup's end and the service's: the next run makes volumes, deletes them and closes again."""
    with Stage(device_blocks=4096, extension=hooked) as stage:
        stage.open()
        first = stage.create_volume("first", SIZE)
        stage.write(first, 0, block(1))
        for run in range(2):
            stage.close_store()
            stage.answers()
            stage.everybody_dies()
            stage.attach(adopted=True)
            stage.nic_starts_anew()
            volume = stage.create_volume(f"volume {run}", SIZE)
            stage.write(volume, 0, block(run + 2))
            reason = stage.ffi.new("char[256]")
            if run == 0:
                assert stage.lib.dedup_volume_delete(stage.state, first, 0, reason) == OK, stage.ffi.string(reason)
                lib.atoll_domain_commit(stage.domain)
            stage.drain()
            stage.check()
        assert stage.generation(first) == 2, "deleted, and its place in the table used again"
        assert stage.figures().stored_blocks == 2


def test_a_death_soon_after_an_adoption_drops_no_request(hooked: ModuleType) -> None:
    """The next incarnation is told of the adoption too, and nothing has been sent to the disk yet."""
    with Stage(device_blocks=4096, extension=hooked) as stage:
        stage.open()
        volume = stage.create_volume("v", 1024 * BLOCK)
        for at in range(0, 640, 32):
            stage.write(volume, at * BLOCK, b"".join(block(at + index) for index in range(32)))
            stage.flush(volume)
            stage.drain()
        stage.everybody_dies()
        stage.attach(adopted=True)
        stage.nic_starts_anew()
        trim = stage.trim(volume, 0, 640 * BLOCK)
        stage.turn()
        stage.take_ios()
        assert not trim.done and not stage.ios, "more than a step's work, and nothing of it goes to the disk"
        stage.attach(adopted=True)
        stage.run_until_idle()
        assert trim.status == OK
        stage.check()
