"""Pages of metadata that are bad in both copies: what is not lost goes on, and everything comes to an end."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection
from typing import Any

import pytest
from damagekit import flip, in_memory, places
from dedupkit import BLOCK, OK, Stage

from atoll.ipc._ipc import lib
from atoll.services.dedup.check import layout

FAR = 262144  # blocks: behind what the first directory of level 1 of a map is about


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def blocks_of(device: Any, tree: int, level: int, numbers: Collection[int] | None = None) -> list[int]:
    """Of both copies of some pages of a tree, all of that level if none are named."""
    return [block for both in places(in_memory(device), tree, level, numbers).values() for block in both]


def made(size: int, *writes: tuple[int, int], **settings: Any) -> bytes:
    """A device with a volume on which (LBA, blocks) were written, and whose run was ended."""
    with Stage(**settings) as stage:
        stage.open()
        volume = stage.create_volume("v", size)
        for lba, count in writes:
            for at in range(lba, lba + count, 64):
                stage.write(volume, at * BLOCK, b"".join(block(lba) for lba in range(at, min(at + 64, lba + count))))
                stage.drain()
        return stage.close_store()


def turns_until(stage: Stage, reached: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        stage.turn()
        stage.disk()
        stage.answers()


def flush_until_it_succeeds(stage: Stage, volume: int, seconds: float = 20) -> None:
    flush = stage.flush(volume)

    def flushed() -> bool:
        nonlocal flush
        if flush.done and flush.status != OK:
            flush = stage.flush(volume)
        return flush.done and flush.status == OK

    turns_until(stage, flushed, seconds)


def test_a_lost_directory_is_passed_by() -> None:
    """By the live check, du and the scrub: what lies behind it is looked at, and it counts once."""
    device = bytearray(made(1 << 59, (0, 10), (FAR, 300)))
    lost = blocks_of(device, layout.TREE_MAP, 1, [0])
    flip(in_memory(device), lost)
    rotten = device.find(block(FAR + 7))
    device[rotten] ^= 1
    flip(in_memory(device), blocks_of(device, layout.TREE_MAP, 0, [FAR // 512])[1:])  # one copy of a leaf
    with Stage() as stage:
        stage.device[:] = bytes(device)
        stage.open()
        text = stage.ffi.new("char[]", 65536)
        while (count := stage.lib.dedup_check(stage.state, text, 65536)) == stage.lib.DEDUP_CHECK_WAITS:
            if not stage.disk():
                stage.lib.dedup_check_turn(stage.state, False)
        found = stage.ffi.string(text).decode().splitlines()
        assert sum("a page of the map is damaged" in line for line in found) == 1
        assert count == 12, found  # that page, its ten blocks, and the volume's sum

        number, du = stage.ffi.new("uint64_t *"), stage.ffi.new("struct du_state *")
        assert stage.lib.dedup_du_start(stage.state, number) == OK

        def counted() -> bool:
            stage.lib.dedup_du(stage.state, du)
            return not du.running

        turns_until(stage, counted)
        assert (du.volumes[0].mapped, du.lost_leaves) == (300, 1)

        scrub, damage = stage.ffi.new("struct dedup_scrub *"), stage.ffi.new("struct dedup_damage *")
        stage.lib.dedup_scrub_start(stage.state, 0)
        lib.atoll_domain_commit(stage.domain)

        def scrubbed() -> bool:
            stage.lib.dedup_scrub(stage.state, scrub)
            return int(scrub.state) == 4

        turns_until(stage, scrubbed)
        assert (scrub.lost_pages, scrub.repaired_pages, scrub.damaged_count) == (1, 1, 1)
        assert stage.lib.dedup_scrub_damage(stage.state, 0, damage)
        assert (damage.pba, damage.referrer_count, damage.lba[0]) == (rotten // BLOCK, 1, FAR + 7)


def test_a_flush_behind_a_posted_write_that_waits() -> None:
    """No place can be used, and so much is logged that one more page of the map finds no room: the write waits, the
    flush fails. When the device comes to itself both succeed."""
    device = bytearray(made(1 << 40, (0, 64)))
    lost = blocks_of(device, layout.TREE_PRINTS, 4)
    flip(in_memory(device), lost)
    with Stage(frames=128) as stage:
        stage.device[:] = bytes(device)
        stage.open()
        volume = stage.create_volume("w", 1 << 40)
        posted = [stage.post(volume, number * 512 * BLOCK, block(number)) for number in range(60)]
        turns_until(stage, lambda: stage.figures().failed_records != 0)
        assert not all(request.done for request in posted)
        flush = stage.flush(volume)
        turns_until(stage, lambda: flush.done)
        assert flush.status == lib.ATOLL_EUNFLUSHED
        flip(in_memory(stage.device), lost)
        flush_until_it_succeeds(stage, volume)
        assert all(request.done and request.status == OK for request in posted)
        stage.check()


@pytest.mark.parametrize("level", [0, 1])
def test_places_whose_fingerprints_are_lost_come_back(level: int) -> None:
    """One page of them: others are taken. All: flushes fail, however often they are asked for, and cost no place."""
    device = bytearray(made(1 << 30, (0, 64)))
    lost = blocks_of(device, layout.TREE_PRINTS, level)
    flip(in_memory(device), lost)
    with Stage() as stage:
        stage.device[:] = bytes(device)
        stage.open()
        before = stage.figures().available_blocks
        written = [stage.write(0, (1000 + at) * BLOCK, block(5000 + at)) for at in range(40)]
        turns_until(stage, lambda: all(request.done for request in written))
        for _ in range(300):
            flush = stage.flush(0)
            turns_until(stage, lambda: flush.done)  # noqa: B023
            assert flush.status == (OK if level == 0 else lib.ATOLL_EUNFLUSHED)
        assert stage.figures().quarantined_blocks != 0
        flip(in_memory(stage.device), lost)
        flush_until_it_succeeds(stage, 0, 60)
        turns_until(stage, lambda: stage.figures().quarantined_blocks == 0, 60)
        stage.drain()
        stage.check()
        assert stage.figures().available_blocks == before - 40
        read = stage.read(0, 1000 * BLOCK, 40 * BLOCK)
        stage.run_until_idle()
        assert read.data == b"".join(block(5000 + at) for at in range(40))


def test_who_waits_for_what_finds_no_place_is_answered() -> None:
    """For its page of the map, or for a page to merge a block in."""
    device = bytearray(made(1 << 40, (0, 64)))
    flip(in_memory(device), blocks_of(device, layout.TREE_PRINTS, 1))
    with Stage(frames=128, merge_pages=8) as stage:
        stage.device[:] = bytes(device)
        stage.open()
        volume = stage.create_volume("w", 1 << 40)
        requests = [stage.write(volume, number * 512 * BLOCK, block(number)) for number in range(60)]
        requests += [stage.write(volume, number * BLOCK + 100, b"ragged") for number in range(20)]
        requests += [stage.zero(0, number * BLOCK + 100, 100) for number in range(20)]
        stage.post(volume, 500 * 512 * BLOCK, block(1))
        turns_until(stage, lambda: all(request.done for request in requests))
        assert {request.status for request in requests} == {OK, lib.ATOLL_ENOSPC}
        flush = stage.flush(volume)
        turns_until(stage, lambda: flush.done)
        assert flush.status == lib.ATOLL_EUNFLUSHED
        trims = [stage.trim(0, number * BLOCK, BLOCK) for number in range(0, 64, 2)]
        turns_until(stage, lambda: all(request.done and request.status == OK for request in trims))
        for number, request in enumerate(requests[:60]):
            if request.status == OK:
                read = stage.read(volume, number * 512 * BLOCK, BLOCK)
                turns_until(stage, lambda: read.done)  # noqa: B023
                assert read.data[200:] == block(number)[200:]


def test_a_candidate_whose_counts_are_lost_is_given_up() -> None:
    """There is another one that the run threshold does not allow: the block is written, not looked at for ever."""
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", 1 << 30, threshold=8)
        for first in (0, *range(1000, 2200, 64)):
            stage.write(volume, first * BLOCK, b"".join(block(first + at) for at in range(64)))
            stage.drain()
        stage.write(volume, 5000 * BLOCK, block(5))
        stage.drain()
        device = bytearray(stage.close_store())
    first, second = device.find(block(5)), device.rfind(block(5))
    assert first // BLOCK // 1024 != second // BLOCK // 1024
    flip(in_memory(device), blocks_of(device, layout.TREE_REFS, 0, [first // BLOCK // 1024]))
    with Stage() as stage:
        stage.device[:] = bytes(device)
        stage.open()
        stage.run_until_idle()
        write = stage.write(0, 5 * BLOCK, block(5))
        turns_until(stage, lambda: write.done)
        flush = stage.flush(0)
        turns_until(stage, lambda: flush.done)
        assert write.status == flush.status == OK
        read = stage.read(0, 0, 64 * BLOCK)
        stage.run_until_idle()
        assert read.data == b"".join(block(at) for at in range(64))
