"""The look-up table that dedup publishes: what it says is true, and pages that are in use stay what they are."""

from __future__ import annotations

import random

import pytest
from dedupkit import BLOCK, OK, Stage
from lookupkit import Reader

BLOCKS = 96


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


@pytest.mark.parametrize(("seed", "delay_ms"), [(1, 0), (2, 0), (3, 20)])
def test_what_the_table_says_is_true(seed: int, delay_ms: int) -> None:
    """A cache smaller than the data, pages that are always short, readers that keep theirs for long."""
    chance = random.Random(seed)
    print(f"seed {seed}")
    with Stage(nic_pages=300, merge_pages=16, cache_pages=458, seed=seed, destage_delay_ms=delay_ms) as stage:
        stage.open()
        volume = stage.create_volume("v", 8 * BLOCKS * BLOCK)
        other = stage.create_volume("w", BLOCKS * BLOCK)
        reader = Reader(stage)
        expected = bytearray(8 * BLOCKS * BLOCK)
        seen = 0
        for _ in range(250):
            first = chance.randrange(8 * BLOCKS - 20)
            count = chance.randrange(1, 20)
            offset, length = first * BLOCK, count * BLOCK
            if chance.random() < 0.2:  # ragged ends
                offset, length = offset + 512, length - 1024
            match chance.choice(["write", "write", "read", "read", "trim", "zero", "other"]):
                case "write":
                    content = chance.randrange(1000)
                    data = b"".join(block(content * 100 + i) for i in range(length // BLOCK + 1))[:length]
                    stage.write(volume, offset, data)
                    expected[offset : offset + length] = data
                case "read":
                    if chance.random() < 0.5:
                        reader.release()
                        stage.drain()
                    for _ in range(3):  # from the device; known; in the table
                        stage.read(volume, offset, length)
                        stage.run_until_idle()
                    for _ in range(8):  # to push out what is there
                        stage.read(volume, chance.randrange(8 * BLOCKS - 40) * BLOCK, 40 * BLOCK)
                        stage.run_until_idle()
                case "trim":
                    stage.trim(volume, first * BLOCK, count * BLOCK)
                    expected[first * BLOCK : (first + count) * BLOCK] = bytes(count * BLOCK)
                case "zero":
                    stage.zero(volume, offset, length)
                    expected[offset : offset + length] = bytes(length)
                case "other":
                    stage.write(other, first % BLOCKS // 2 * BLOCK, block(chance.randrange(1000)))
            stage.run_until_idle()
            seen += reader.verify(volume, expected)
            for _ in range(3):
                reader.take(volume, first + chance.randrange(count))
            reader.check()
            stage.check()
            if len(stage.free_pages) < 60 or len(reader.taken) > 60:
                reader.release()
                stage.flush(volume)
                stage.drain()
        assert reader.hits > 40 and seen > 1000
        reader.release()
        stage.drain()
        stage.check()
        assert stage.counters()["cache_evictions"] > 50
        assert stage.free_pages == set(range(stage.nic_pages))


def test_a_page_in_use_is_not_given_back_before_nic_is_done() -> None:
    with Stage(destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", BLOCKS * BLOCK)
        reader = Reader(stage)
        stage.write(volume, 0, block(1))
        stage.run_until_idle()
        assert reader.take(volume, 0)
        stage.write(volume, 0, block(2))
        stage.run_until_idle()
        assert len(stage.lent_pages) == 2 and stage.figures().pinned_records == 1
        assert reader.table()[volume, stage.generation(volume), 0] == block(2)
        stage.check()
        reader.release()
        stage.run_until_idle()
        assert len(stage.lent_pages) == 1 and stage.figures().pinned_records == 0
        stage.check()


@pytest.mark.parametrize("uses", [(1 << 31) - 1, 1 << 31, 3 << 30, (1 << 32) - 4])
@pytest.mark.parametrize("user", [0, 1])
def test_a_use_of_long_ago_holds_nothing(user: int, uses: int) -> None:
    """Its owner may see nothing of the slot's next requests: nbd of those that nic answers."""
    with Stage(destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", BLOCKS * BLOCK)
        reader = Reader(stage)
        stage.write(volume, 0, block(1))
        stage.run_until_idle()
        if stage.free_slots[-1] % 2 != user:
            stage.free_slots[-2:] = reversed(stage.free_slots[-2:])
        slot = stage.free_slots[-1]
        assert reader.take(volume, 0) and reader.taken[0].slot == slot
        reader.release()
        stage.sequences[slot] = (stage.sequences[slot] + uses) % (1 << 32)
        stage.nic_public.done[slot] = stage.sequences[slot]
        stage.write(volume, 0, block(2))
        stage.run_until_idle()
        assert len(stage.lent_pages) == 1 and stage.figures().pinned_records == 0
        stage.check()


def test_nothing_is_left_of_a_deleted_volume() -> None:
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", BLOCKS * BLOCK)
        reader = Reader(stage)
        stage.write(volume, 0, block(1))
        stage.run_until_idle()
        stage.drain()
        stage.read(volume, 0, BLOCK)
        stage.run_until_idle()
        stage.read(volume, 0, BLOCK)
        stage.run_until_idle()
        assert reader.take(volume, 0)
        reader.release()
        reason = stage.ffi.new("char[256]")
        assert stage.lib.dedup_volume_delete(stage.state, volume, 0, reason) == OK, stage.ffi.string(reason)
        stage.run_until_idle()
        again = stage.create_volume("w", BLOCKS * BLOCK)
        stage.run_until_idle()
        assert again == volume, "the number is used again, which is what this test is about"
        assert not reader.take(again, 0)


def test_all_pages_of_the_cache_in_use_make_requests_wait_and_nothing_else() -> None:
    with Stage(nic_pages=512, cache_pages=458, seed=4) as stage:
        stage.open()
        volume = stage.create_volume("v", 8 * BLOCKS * BLOCK)
        reader = Reader(stage)
        data = b"".join(block(i) for i in range(400))
        for at in range(0, 400, 50):
            stage.write(volume, at * BLOCK, data[at * BLOCK : (at + 50) * BLOCK])
            stage.flush(volume)
            stage.drain()
        for at in range(300):
            for _ in range(3):
                if not reader.take(volume, at):
                    stage.read(volume, at * BLOCK, BLOCK)
                    for _ in range(8):
                        stage.turn()
                        stage.disk()
                        stage.answers()
        assert len(reader.taken) > 200
        stage.check()
        reader.check()
        reader.release()
        stage.run_until_idle()
        read = stage.read(volume, 350 * BLOCK, 20 * BLOCK)
        stage.run_until_idle()
        assert read.data == data[350 * BLOCK : 370 * BLOCK]
        stage.check()
