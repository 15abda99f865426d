"""Candidates of destage are read from the device with what lies beside them, where that pays."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from dedupkit import BLOCK, DISK, OK, Stage

from atoll.ipc._ipc import lib

COUNT = 1024
EIO = lib.ATOLL_EIO


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def stage() -> Stage:
    return Stage(nic_pages=2048, cache_pages=2048, device_blocks=16384, prints=1 << 16)  # no fingerprint is evicted


def store(stage: Stage, count: int) -> int:
    """A volume with blocks 0 .. count - 1, stored in this order, of which dedup keeps none in memory."""
    stage.open()
    volume = stage.create_volume("v", 16 * COUNT * BLOCK)
    for number in range(count):
        stage.write(volume, number * BLOCK, block(number))
        if number % 64 == 63:
            stage.drain()
    stage.drain()
    return volume


def write_again(stage: Stage, volume: int, order: Sequence[int]) -> tuple[int, int]:
    """Contents `order`, one after another in places of no sequence. Returns (reads of the device, blocks read)."""
    before, seen = stage.counters(), len(stage.io_log)
    for at, number in enumerate(order):
        stage.write(volume, (8 * COUNT + 2 * at) * BLOCK, block(number))
        if at % 64 == 63:
            stage.drain()
    stage.drain()
    stage.check()
    reads = [io for io in stage.io_log[seen:] if io.opcode == lib.ATOLL_OP_IO_READ and io.role == DISK]
    after = stage.counters()
    assert after["cache_misses"] - before["cache_misses"] == sum(io.length for io in reads) // BLOCK
    return len(reads), sum(io.length for io in reads) // BLOCK


def test_a_neighbourhood_is_read_at_once() -> None:
    """Every block is read once, though never two in sequence are wanted together, and most reads bring many."""
    with stage() as it:
        volume = store(it, COUNT)
        order = random.Random(7).sample(range(COUNT), COUNT)
        reads, blocks = write_again(it, volume, order)
        counters = it.counters()
        assert it.figures().stored_blocks == COUNT and it.figures().references == 2 * COUNT
        assert blocks == COUNT
        assert reads < COUNT // 4, f"{reads} reads of {blocks} blocks"
        assert counters["ahead_read_blocks"] > COUNT // 2
        assert counters["ahead_used_blocks"] == counters["ahead_read_blocks"]
        got = [it.read(volume, (8 * COUNT + 2 * at) * BLOCK, BLOCK) for at in range(0, COUNT, 97)]
        it.run_until_idle()
        assert [request.data for request in got] == [block(order[at]) for at in range(0, COUNT, 97)]


def test_lone_candidates_are_read_alone() -> None:
    with stage() as it:
        volume = store(it, COUNT)
        order = random.Random(7).sample(range(0, COUNT, 32), COUNT // 32)
        reads, blocks = write_again(it, volume, order)
        assert reads == blocks == COUNT // 32 and it.counters()["ahead_read_blocks"] == 0
        assert it.figures().stored_blocks == COUNT


def test_more_neighbourhoods_than_find_room() -> None:
    """They lie on the fast device, for whose blocks there are few pages: each is read once, and destage ends."""
    settings = {"nic_pages": 512, "cache_pages": 4096, "device_blocks": 8192, "fast_blocks": 1200, "fast_pages": 64}
    with Stage(**settings) as it:
        it.open()
        volume = it.create_volume("v", 16 * COUNT * BLOCK, tier=1)
        for number in range(0, COUNT, 64):
            it.write(volume, number * BLOCK, b"".join(block(number + at) for at in range(64)))
            it.drain()
        for _ in range(500):
            it.turn()
            it.disk()
        device, fast = it.close_store(), it.fast[:]
    with Stage(**settings) as it:
        it.device[:], it.fast[:] = device, fast
        it.open()
        for _ in range(500):
            it.turn()
            it.disk()
        assert it.figures().tier_used == COUNT
        for _ in range(200):  # requests come one by one
            it.submit(lib.ATOLL_OP_READ, volume, 0, BLOCK, flags=lib.ATOLL_FLAG_ALONE)
            it.run_until_idle()
        for at in range(64):
            it.write(volume, (8 * COUNT + 2 * at) * BLOCK, block(16 * at), lib.ATOLL_FLAG_ALONE)
        flush = it.flush(volume)
        it.run_until_idle()
        assert flush.status == OK and it.counters()["ahead_read_blocks"] > 64
        assert it.figures().stored_blocks == COUNT


def test_what_does_not_pay_is_tried_less() -> None:
    """Two of each neighbourhood: what is read with them is of no use, and ends."""
    with stage() as it:
        volume = store(it, 8 * COUNT)
        neighbourhoods = random.Random(3).sample(range(8 * COUNT // 32), 8 * COUNT // 32)
        write_again(it, volume, [32 * number + at for number in neighbourhoods for at in (0, 3)])
        counters = it.counters()
        assert COUNT < counters["ahead_read_blocks"] < 3 * COUNT
        assert counters["ahead_used_blocks"] <= 2 * len(neighbourhoods)


@pytest.mark.parametrize("each", [2, 4])
def test_a_batch_whose_neighbourhoods_do_not_fit_into_memory_goes_on(each: int) -> None:
    """One is read after the other, as where requests come one by one, and pushes out what was read before."""
    with Stage(nic_pages=2048, cache_pages=512, device_blocks=16384, prints=1 << 16) as it:
        volume = store(it, 8 * COUNT)
        chance = random.Random(3)
        chosen = chance.sample(range(128, 256), 128 // each)
        order = [32 * number + at for number in chosen for at in chance.sample(range(32), each)]
        chance.shuffle(order)
        for at, number in enumerate(order):
            it.write(volume, (8 * COUNT + 2 * at) * BLOCK, block(number), lib.ATOLL_FLAG_ALONE)
        for _ in range(1000):
            it.turn()
            it.disk()
            it.answers()
        counters = it.counters()
        assert it.figures().log_records == 0 and counters["shared_blocks"] == 128
        assert counters["ahead_read_blocks"] <= 2 * 64 * 32, "two batches at most"
        assert counters["ahead_used_blocks"] <= 128, "what was pushed out was of no use"
        it.check()


@pytest.mark.parametrize("what", ["fails", "rots"])
def test_a_neighbour_that_cannot_be_read_disturbs_nobody(what: str) -> None:
    with stage() as it:
        volume = store(it, COUNT)
        order = random.Random(9).sample(range(64), 64)
        bad = it.device.find(block(13)) // BLOCK
        if what == "fails":
            it.io_rule = lambda io: EIO if io.offset <= bad * BLOCK < io.offset + io.length else OK
        else:
            it.device[bad * BLOCK] ^= 1
        write_again(it, volume, order)
        got = [it.read(volume, (8 * COUNT + 2 * at) * BLOCK, BLOCK) for at in range(64)]
        it.run_until_idle()
        for request, number in zip(got, order, strict=True):
            assert request.status == OK and request.data == block(number)


def test_a_candidate_that_rots_is_named_and_not_shared() -> None:
    """It differs from its equal, and its fingerprint says which of them is damaged."""
    with stage() as it:
        volume = store(it, 1)
        it.device[it.device.find(block(0))] ^= 1
        it.write(volume, 9 * BLOCK, block(0))
        it.drain()
        it.check()
        counters = it.counters()
        assert counters["corrupt_reads"] == 1 and counters["compare_mismatches"] == 0 and counters["shared_blocks"] == 0
        old, new = it.read(volume, 0, BLOCK), it.read(volume, 9 * BLOCK, BLOCK)
        it.run_until_idle()
        assert old.status == lib.ATOLL_ECORRUPT and new.data == block(0)


@pytest.mark.parametrize("crash", [False, True])
def test_what_destage_reads_is_checked_before_a_client_gets_it(crash: bool) -> None:
    with stage() as it:
        volume = store(it, 64)
        place = it.device.find(block(32)) // BLOCK // 32  # a neighbourhood
        beside = [number for number in range(64) if it.device.find(block(number)) // BLOCK // 32 == place]
        rotten, sound = beside[5], beside[6]
        it.device[it.device.find(block(rotten))] ^= 1
        for at in beside[:2]:
            it.write(volume, (8 * COUNT + 2 * at) * BLOCK, block(at))
        it.drain()
        assert it.counters()["ahead_read_blocks"] > 4 and it.counters()["corrupt_reads"] == 0
        if crash:
            it.open(crashed=True)
        seen = len(it.io_log)
        bad, good = it.read(volume, rotten * BLOCK, BLOCK), it.read(volume, sound * BLOCK, BLOCK)
        it.run_until_idle()
        assert bad.status == lib.ATOLL_ECORRUPT and good.data == block(sound)
        again = [io.length for io in it.io_log[seen:] if io.opcode == lib.ATOLL_OP_IO_READ]
        assert again == [BLOCK], "the bad one"
        it.check()


@pytest.mark.parametrize("rots", [False, True])
def test_a_client_may_wait_for_what_destage_reads(rots: bool) -> None:
    with stage() as it:
        volume = store(it, 1)
        if rots:
            it.device[it.device.find(block(0))] ^= 1
        it.write(volume, 9 * BLOCK, block(0), lib.ATOLL_FLAG_FUA)
        seen = len(it.io_log)
        while not it.ios:
            it.turn()
            it.take_ios()
        assert [io.opcode for io in it.ios] == [lib.ATOLL_OP_IO_READ]
        read = it.read(volume, 0, BLOCK)
        it.turn()
        it.run_until_idle()
        assert read.status == lib.ATOLL_ECORRUPT if rots else read.data == block(0)
        assert it.counters()["corrupt_reads"] == (1 if rots else 0)
        assert sum(io.opcode == lib.ATOLL_OP_IO_READ for io in it.io_log[seen:]) == 1
        it.drain()
        it.check()


@pytest.mark.parametrize("turns", range(1, 16))
def test_a_candidate_may_go_before_it_is_read(turns: int) -> None:
    """Between the step that chose it and the one that reads it the last volume that refers to it lets it go."""
    with stage() as it:
        volume = store(it, 64)
        for at in range(64):
            it.write(volume, (8 * COUNT + 2 * at) * BLOCK, block(at), lib.ATOLL_FLAG_ALONE)
        for _ in range(turns):
            it.turn()
        it.trim(volume, 0, 64 * BLOCK)
        it.drain()
        it.check()
        got = [it.read(volume, (8 * COUNT + 2 * at) * BLOCK, BLOCK) for at in range(64)]
        it.run_until_idle()
        assert [request.data for request in got] == [block(at) for at in range(64)]
