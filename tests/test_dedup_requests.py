"""dedup's requests against a plain bytearray per volume: every kind, every alignment, in log, cache and store."""

from __future__ import annotations

import random
import struct
import time

import pytest
from dedupkit import BLOCK, FUA, NO_HOLE, OK, ONE, Io, Request, Stage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serverkit import wait_for

from atoll.ipc._ipc import lib

WRITE = lib.ATOLL_OP_IO_WRITE

SIZE = 96 * BLOCK


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def verify(stage: Stage, volume: int, expected: bytes) -> None:
    step = 64 * BLOCK
    requests = [stage.read(volume, at, min(step, len(expected) - at)) for at in range(0, len(expected), step)]
    stage.run_until_idle()
    for request in requests:
        assert request.status == OK
        assert request.data == expected[request.offset : request.offset + request.length]


def test_what_is_written_is_read() -> None:
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        expected = bytearray(SIZE)
        for offset, data in (
            (0, block(1)),
            (BLOCK, block(2) + block(3)),
            (5 * BLOCK + 100, block(4)[:200]),
            (8 * BLOCK - 7, block(5) + block(6)),
            (8 * BLOCK, block(5)),
            (0, block(1)[:512]),
            (SIZE - 1, b"x"),
        ):
            request = stage.write(volume, offset, data)
            stage.run_until_idle()
            assert request.status == OK
            expected[offset : offset + len(data)] = data
            stage.check()
        verify(stage, volume, bytes(expected))
        flush = stage.flush(volume)
        stage.run_until_idle()
        assert flush.status == OK
        verify(stage, volume, bytes(expected))
        stage.drain()
        stage.check()
        assert stage.free_pages == set(range(stage.nic_pages))
        assert stage.figures().log_records == 0


def test_reads_while_nothing_is_destaged_come_from_the_log() -> None:
    with Stage(destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.write(volume, 0, block(1))
        stage.run_until_idle()
        request = stage.read(volume, 0, BLOCK)
        stage.run_until_idle()
        assert request.data == block(1)
        (address, length, kind) = request.segments[0]
        assert length == BLOCK and kind == 0
        assert stage.nic_buffer <= address < stage.nic_buffer + stage.nic_pages * BLOCK, "by reference: nic's own page"
        assert len(stage.lent_pages) == 1


def test_equal_blocks_are_stored_once() -> None:
    with Stage() as stage:
        stage.open()
        first, second = stage.create_volume("a", SIZE), stage.create_volume("b", SIZE)
        data = b"".join(block(seed) for seed in range(40))
        stage.write(first, 0, data)
        stage.flush(first)
        stage.drain()
        stored = stage.figures().stored_blocks
        assert stored == 40
        stage.write(second, 3 * BLOCK, data)
        stage.flush(second)
        stage.drain()
        assert stage.figures().stored_blocks == stored and stage.figures().references == 80
        stage.write(second, 0, block(77) * 60)  # equal blocks within one batch
        stage.flush(second)
        stage.drain()
        assert stage.figures().stored_blocks == stored + 1
        verify(stage, second, (block(77) * 60).ljust(SIZE, b"\0"))
        verify(stage, first, data.ljust(SIZE, b"\0"))
        stage.check()


def test_a_slow_device_costs_no_savings() -> None:
    """Candidates that lie apart need a read each: more than there are I/O slots, if all batches ask at once."""
    count, size = 1024, 1024 * BLOCK
    with Stage(nic_pages=2048, cache_pages=4096) as stage:
        stage.open()
        first, second = stage.create_volume("a", size), stage.create_volume("b", size)
        blocks = [block(seed) for seed in range(count)]
        for at in range(0, count, 64):
            stage.write(first, at * BLOCK, b"".join(blocks[at : at + 64]))
        stage.drain()
        assert stage.figures().stored_blocks == count
        scattered = [blocks[at * 37 % count] for at in range(count)]
        for at in range(0, count, 64):
            stage.write(second, at * BLOCK, b"".join(scattered[at : at + 64]))
        for _ in range(100):  # the device answers nothing meanwhile
            stage.turn()
            stage.answers()
        stage.drain()
        counters = stage.counters()
        assert counters["match_skipped"] == 0
        assert stage.figures().stored_blocks - count <= counters["fingerprint_evictions"] < 10
        assert stage.figures().references == 2 * count
        stage.check()
        verify(stage, second, b"".join(scattered))


@pytest.mark.parametrize("alone", [True, False])
def test_destage_goes_in_pieces(alone: bool) -> None:
    """Others on the processor wait for one of them: a step finishes a part of a batch, less of it where requests come
    one by one, or writes one, not both."""
    count = 2 * lib.ATOLL_IO_BLOCKS
    with Stage(nic_pages=2 * count) as stage:
        stage.open()
        volume = stage.create_volume("v", 2 * count * BLOCK)
        for number in range(count):
            stage.write(volume, 2 * number * BLOCK, block(number), lib.ATOLL_FLAG_ALONE if alone else 0)
        for _ in range(1000):
            before = stage.counters()
            stage.turn()
            after = stage.counters()
            finished, written = (after[name] - before[name] for name in ("destaged_blocks", "runs"))
            assert finished <= lib.ATOLL_IO_BLOCKS // (8 if alone else 2)
            assert written <= 1 and not (finished and written)
            stage.disk()
            stage.answers()
            if after["destaged_blocks"] == count:
                break
        stage.drain()
        assert stage.counters()["destaged_blocks"] == count and stage.counters()["runs"] >= 2
        stage.check()


def test_equal_blocks_that_are_logged_are_destaged_together() -> None:
    """However many other blocks were written in between, nothing of them is read from the device, but for the one at
    most for which a batch has no room."""
    count = 400
    order = random.Random(5).sample(range(count), count)
    with Stage(nic_pages=8 * count, destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", 4 * count * BLOCK)
        places = [*range(0, 2 * count, 2), *(2 * count + 2 * at for at in order)]  # no two side by side
        for lba, seed in zip(places, [*range(count), *reversed(range(count))], strict=True):
            stage.write(volume, lba * BLOCK, block(seed))
        stage.run_until_idle()
        assert stage.figures().log_records == 2 * count
        stage.flush(volume)
        stage.run_until_idle()
        assert stage.figures().stored_blocks == count and stage.figures().references == 2 * count
        assert stage.counters()["cache_misses"] <= 2 * count // lib.ATOLL_IO_BLOCKS + 1
        stage.check()
        for lba in (0, 2):
            stage.write(volume, lba * BLOCK, block(count))
        stage.run_until_idle()
        stage.open(crashed=True)  # which are equal the successor does not know; that costs no more than a read
        stage.flush(volume)
        stage.run_until_idle()
        assert stage.figures().references == 2 * count and stage.counters()["shared_blocks"] == count + 1
        stage.check()


def test_what_was_stored_while_a_batch_was_being_read_is_shared() -> None:
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.write(volume, 0, block(1))
        stage.drain()
        stage.write(volume, BLOCK, block(1) + block(2))  # waits for block 0 to be read and compared
        for _ in range(4):  # taken, collected, matched
            stage.turn()
        stage.take_ios()
        reads = [io for io in stage.ios if io.opcode == lib.ATOLL_OP_IO_READ]
        assert len(reads) == 1
        stage.write(volume, 8 * BLOCK, block(2))  # does not
        for _ in range(20):
            stage.turn()
            stage.take_ios()
            for io in [io for io in stage.ios if io not in reads]:
                stage.complete(io)
        assert stage.figures().stored_blocks == 2
        stage.complete(reads[0])
        stage.drain()
        assert stage.figures().stored_blocks == 2 and stage.figures().references == 4
        stage.check()


def test_zeros_take_no_space() -> None:
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.write(volume, 0, bytes(20 * BLOCK))
        stage.flush(volume)
        stage.drain()
        assert stage.figures().stored_blocks == 0
        stage.write(volume, 0, block(1) * 2)
        stage.flush(volume)
        stage.drain()
        stage.write(volume, 0, bytes(BLOCK))
        stage.flush(volume)
        stage.drain()
        request = stage.extents(volume, 0, SIZE)
        stage.run_until_idle()
        assert request.extents == [(BLOCK, 3), (BLOCK, 0), (SIZE - 2 * BLOCK, 3)]
        stage.check()


def test_extents() -> None:
    with Stage(destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", 1 << 40)
        far = (1 << 39) + 5 * BLOCK
        stage.write(volume, 4 * BLOCK, block(1) + block(2))
        stage.zero(volume, 8 * BLOCK, 2 * BLOCK, NO_HOLE)
        stage.write(volume, far, block(3))
        stage.run_until_idle()
        request = stage.extents(volume, 100, (1 << 40) - 100)
        one = stage.extents(volume, 4 * BLOCK + 7, 1 << 30, ONE)
        stage.run_until_idle()
        assert request.extents[:5] == [
            (4 * BLOCK - 100, 3), (2 * BLOCK, 0), (2 * BLOCK, 3), (2 * BLOCK, 2), (far - 10 * BLOCK, 3),
        ]  # fmt: skip
        assert request.extents[5] == (BLOCK, 0)
        assert one.extents == [(2 * BLOCK - 7, 0)]


def test_bad_requests() -> None:
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        readonly = stage.create_volume("r", SIZE, lib.ATOLL_VOLUME_READONLY)
        cases: list[tuple[Request, int]] = [
            (stage.read(volume, SIZE - BLOCK, 2 * BLOCK), lib.ATOLL_EINVAL),
            (stage.read(volume, 1 << 63, 1 << 63), lib.ATOLL_EINVAL),
            (stage.read(volume, 0, 65 * BLOCK), lib.ATOLL_EINVAL),
            (stage.write(volume, SIZE - 10, block(1)), lib.ATOLL_ENOSPC),
            (stage.write(readonly, 0, block(1)), lib.ATOLL_EPERM),
            (stage.trim(readonly, 0, BLOCK), lib.ATOLL_EPERM),
            (stage.submit(lib.ATOLL_OP_READ, 77, 0, BLOCK, generation=1), lib.ATOLL_ENOENT),
            (stage.submit(lib.ATOLL_OP_READ, volume, 0, BLOCK, generation=9), lib.ATOLL_ENOENT),
            (stage.submit(200, volume, 0, BLOCK), lib.ATOLL_EINVAL),
        ]
        stage.run_until_idle()
        for request, status in cases:
            assert request.status == status, (request, status)
        stage.drain()
        stage.check()


def test_a_wrong_payload_is_refused() -> None:
    with Stage(destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        request = stage.write(volume, 0, block(1) + block(2))
        good = bytearray(request.message)
        stage.run_until_idle()
        held = stage.write(volume, 8 * BLOCK, block(3))  # a page that is in the log is offered again
        stage.turn()
        for change in ("address", "outside", "unaligned", "length", "twice"):
            message = bytearray(good)
            if change == "address":
                message[16:24] = (stage.nic_buffer - BLOCK).to_bytes(8, "little")
            elif change == "outside":
                message[16:24] = (stage.nic_buffer + (stage.nic_pages - 1) * BLOCK).to_bytes(8, "little")
            elif change == "unaligned":
                message[16:24] = (stage.nic_buffer + 100).to_bytes(8, "little")
            elif change == "length":
                message[24:28] = (3 * BLOCK).to_bytes(4, "little")
            else:
                message[16:24] = held.message[16:24]
                message[24:28] = BLOCK.to_bytes(4, "little")
                message[40:48] = BLOCK.to_bytes(8, "little")
            bad = stage.read(volume, 0, BLOCK)
            stage.run_until_idle()  # a slot with its sequence; now the same slot says something wrong
            stage.sequences[bad.slot] += 1
            bad.identity += 1
            message[8:16] = bad.identity.to_bytes(8, "little")
            stage.free_slots.remove(bad.slot)
            bad.message, bad.done = bytes(message), False
            stage.requests[bad.slot] = bad
            stage.repeat(bad)
            stage.run_until_idle()
            assert bad.status == lib.ATOLL_EINVAL, change
            stage.check()
        stage.flush(volume)
        stage.drain()


@pytest.mark.parametrize("uses", [1 << 31, (1 << 31) + 7, 3 << 30, (1 << 32) - 2])
def test_a_slot_that_dedup_has_not_seen_for_long_is_answered(uses: int) -> None:
    """Reads from memory do not come here, and a client that sends one request at a time uses one slot."""
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", 64 * BLOCK)
        first = stage.write(volume, 0, block(1))
        stage.run_until_idle()
        slot = first.slot
        assert stage.free_slots[-1] == slot, "the next request uses it"
        stage.sequences[slot] = (stage.sequences[slot] + uses - 1) % (1 << 32)
        stage.nic_public.done[slot] = stage.sequences[slot]
        second = stage.write(volume, 0, block(2))
        stage.run_until_idle()
        assert second.slot == slot and second.status == OK
        third = stage.read(volume, 0, BLOCK)
        stage.run_until_idle()
        assert third.data == block(2)
        stage.drain()


@pytest.mark.parametrize("uses", [1 << 31, 3 << 30, (1 << 32) - 4])
def test_pins_of_long_ago_are_let_go(uses: int) -> None:
    with Stage(destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", 64 * BLOCK)
        stage.write(volume, 0, block(1))
        stage.run_until_idle()
        pinning = stage.read(volume, 0, BLOCK)
        stage.run_until_idle()
        slot = pinning.slot
        stage.free_slots.remove(slot)  # what comes here for it from now on is nothing
        stage.sequences[slot] = (stage.sequences[slot] + uses) % (1 << 32)
        stage.nic_public.done[slot] = stage.sequences[slot]
        stage.write(volume, 0, block(2))
        stage.run_until_idle()
        assert len(stage.lent_pages) == 1 and stage.figures().pinned_records == 0
        stage.check()


def test_promised_space_is_there_when_the_store_is_full() -> None:
    with Stage(device_blocks=2048, nic_pages=2048) as stage:
        stage.open()
        volume = stage.create_volume("v", 4096 * BLOCK)
        promised = stage.zero(volume, 0, 8 * BLOCK, NO_HOLE)
        stage.run_until_idle()
        assert promised.status == OK
        at, status, written = 16, OK, 0
        while status == OK:
            request = stage.write(volume, at * BLOCK, b"".join(block(at + i) for i in range(16)))
            stage.run_until_idle()
            status = request.status
            at += 16
            written += 16
        assert status == lib.ATOLL_ENOSPC and written > 256
        stage.drain()
        stage.check()
        single = stage.write(volume, at * BLOCK, block(1))
        stage.run_until_idle()
        while single.status == OK:  # less than 16 blocks were left
            at += 1
            single = stage.write(volume, at * BLOCK, block(at))
            stage.run_until_idle()
        request = stage.write(volume, 0, b"".join(block(5000 + i) for i in range(8)))
        stage.run_until_idle()
        assert request.status == OK, "the promise"
        duplicate = stage.write(volume, 100 * BLOCK, block(100))
        stage.run_until_idle()
        flush = stage.flush(volume)
        stage.run_until_idle()
        assert flush.status == OK
        stage.trim(volume, 16 * BLOCK, 100 * BLOCK)
        stage.flush(volume)
        stage.drain()
        again = stage.write(volume, 16 * BLOCK, b"".join(block(9000 + i) for i in range(16)))
        stage.run_until_idle()
        assert again.status == OK, "trimmed space is used again"
        assert duplicate.status in (OK, lib.ATOLL_ENOSPC)
        stage.drain()
        stage.check()


def test_a_write_that_comes_while_space_is_coming_back_waits_its_turn() -> None:
    """All that is free is reserved by copies, which give it back; a write each turn meanwhile."""
    with Stage(device_blocks=1024, destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", 4096 * BLOCK)
        used = 0
        while stage.figures().available_blocks > 50:
            stage.write(volume, used * BLOCK, block(used))
            stage.run_until_idle()
            used += 1
        stage.flush(volume)
        stage.run_until_idle()
        while stage.figures().available_blocks:
            stage.write(volume, used * BLOCK, block(0))
            stage.run_until_idle()
            used += 1
        requests = []
        for number in range(40):
            requests.append(stage.write(volume, (used + number) * BLOCK, block(10_000 + number)))
            stage.turn()
            stage.disk()
            stage.answers()
        stage.run_until_idle()
        assert {request.status for request in requests} == {OK}
        stage.check()


def test_more_data_than_pages_and_device() -> None:
    """Duplicates beyond the device's size: reservations wait for the log to be destaged, nothing is refused."""
    with Stage(device_blocks=2048, nic_pages=256, cache_pages=512) as stage:
        stage.open()
        volume = stage.create_volume("v", 16384 * BLOCK)
        data = b"".join(block(i) for i in range(64))
        for at in range(0, 4096, 64):
            request = stage.write(volume, at * BLOCK, data)
            while not request.done or len(stage.free_pages) < 64:
                stage.turn()
                stage.disk()
                stage.answers()
            assert request.status == OK
        stage.flush(volume)
        stage.drain()
        assert stage.figures().stored_blocks == 64 and stage.figures().references == 4096
        stage.check()


def test_a_pinned_page_stays_while_its_block_is_overwritten() -> None:
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.write(volume, 0, block(1))
        stage.turn()
        stage.answers()
        read = stage.read(volume, 0, BLOCK)
        stage.run_until_idle(send=False)
        for seed in range(2, 6):
            stage.write(volume, 0, block(seed))
            stage.flush(volume)
            stage.run_until_idle(send=False)
        assert stage.content(read) == block(1) == read.data
        later = stage.read(volume, 0, BLOCK)
        stage.run_until_idle(send=False)
        assert later.data == block(5)
        stage.check()
        stage.send_all()
        stage.drain()
        stage.check()


def test_repeats_are_not_applied_again() -> None:
    """A, B, A must not come out of one write of A."""
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        a = stage.write(volume, 0, block(1))
        stage.run_until_idle()
        stage.free_slots.remove(a.slot)
        stage.write(volume, 0, block(2))
        stage.run_until_idle()
        for count in range(2):  # the last of its slot, then one of a slot that is in its next use
            stage.repeat(a)
            stage.turn()
            stage.answers(repeated=True)
            read = stage.read(volume, 0, BLOCK)
            stage.run_until_idle()
            assert read.data == block(2)
            assert stage.counters()["repeats"] == count + 1
            stage.free_slots.append(a.slot)
            stage.read(volume, 0, BLOCK)
            stage.run_until_idle()
            stage.free_slots.remove(a.slot)
        stage.drain()
        stage.check()


def test_a_failed_destage_is_kept_and_tried_elsewhere() -> None:
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.drain()
        failing = True
        places: list[int] = []

        def rule(io: Io) -> int:
            if io.opcode == lib.ATOLL_OP_IO_WRITE and io.length >= 3 * BLOCK:  # the three, and whatever goes with them
                places.append(io.offset)
                return int(lib.ATOLL_EIO) if failing else OK
            return OK

        stage.io_rule = rule
        stage.write(volume, 0, block(1) + block(2) + block(3))
        flush = stage.flush(volume)
        stage.run_until_idle()
        assert flush.status == lib.ATOLL_EUNFLUSHED
        again = stage.flush(volume)
        stage.run_until_idle()
        assert again.status == lib.ATOLL_EUNFLUSHED, "a failed flush stays failed"
        read = stage.read(volume, 0, 3 * BLOCK)
        fua = stage.write(volume, 10 * BLOCK, block(9), FUA)
        stage.run_until_idle()
        assert read.data == block(1) + block(2) + block(3), "kept"
        assert fua.status == lib.ATOLL_EUNFLUSHED
        stage.check()
        failing = False
        stage.io_rule = None
        stage.drain()
        final = stage.flush(volume)
        stage.run_until_idle()
        assert final.status == OK and places
        expected = (block(1) + block(2) + block(3)).ljust(10 * BLOCK, b"\0") + block(9)
        verify(stage, volume, expected.ljust(SIZE, b"\0"))
        stage.check()


@pytest.mark.parametrize("how", ["write", "trim"])
def test_overwritten_while_a_failed_destage_is_finished(how: str) -> None:
    """Piece by piece its blocks lose their places. One that has lost its own holds space again, until overwritten."""
    with Stage(cache_pages=2304, nic_pages=1024) as stage:
        stage.open()
        volume = stage.create_volume("v", 256 * BLOCK)
        stage.run_until_idle()
        blocks, deadline = 120, time.monotonic() + 20  # more than a piece
        for number in range(blocks):
            stage.write(volume, number * BLOCK, random.Random(number).randbytes(BLOCK))
        stage.io_rule = lambda io: lib.ATOLL_EIO if io.opcode == lib.ATOLL_OP_IO_WRITE else OK
        stage.io_log.clear()
        while not any(io.opcode == lib.ATOLL_OP_IO_WRITE and io.length > 64 * BLOCK for io in stage.io_log):
            stage.turn()
            stage.disk()
            assert time.monotonic() < deadline
        stage.turn()
        stage.answers()
        assert 0 < stage.figures().failed_records < blocks
        stage.check()
        for number in range(blocks):
            if how == "write":
                stage.write(volume, number * BLOCK, random.Random(1000 + number).randbytes(BLOCK))
            else:
                stage.trim(volume, number * BLOCK, BLOCK)
        while stage.requests:
            stage.turn()
            stage.disk()
            stage.answers()
            stage.check()
        stage.io_rule = None
        flush = stage.flush(volume)
        stage.drain()
        assert flush.status == OK
        stage.check()
        assert stage.figures().reserved_blocks == 0


def test_a_flush_tries_again_at_once_what_has_failed() -> None:
    """However long the back-off has become: the device is well again, and so is the flush."""
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.drain()
        tried = 0

        def rule(io: Io) -> int:
            nonlocal tried
            if io.opcode == lib.ATOLL_OP_IO_WRITE and io.length == 3 * BLOCK:
                tried += 1
                return int(lib.ATOLL_EIO)
            return OK

        stage.io_rule = rule
        stage.write(volume, 0, block(1) + block(2) + block(3))
        for turn in range(1, 9):
            flush = stage.flush(volume)
            stage.run_until_idle()
            assert flush.status == lib.ATOLL_EUNFLUSHED and tried >= turn, "each one has tried"
        stage.io_rule = None
        flush = stage.flush(volume)
        stage.run_until_idle()
        assert flush.status == OK
        stage.check()


def test_a_checkpoint_that_fails_fails_no_flush() -> None:
    """What is flushed lies in the log, twice; that pages cannot be written now is nothing to those who flush."""
    with Stage(log_blocks=64) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.drain()
        behind_data = range(stage.device_blocks * 2 // 3, stage.device_blocks - 64 - 16)  # before the log again
        expected = bytearray(SIZE)
        failed = since = 0
        for number in range(60):  # half of the log is full soon: a checkpoint begins
            at = number % 50 * BLOCK
            expected[at : at + BLOCK] = block(1000 + number)
            stage.write(volume, at, block(1000 + number))
            flush = stage.flush(volume)
            deadline = time.monotonic() + 20
            while not flush.done:
                stage.turn()
                stage.take_ios()
                pages = [io for io in stage.ios if io.opcode == WRITE and io.offset // BLOCK in behind_data]
                for io in [io for io in stage.ios if io not in pages]:
                    while io.opcode == lib.ATOLL_OP_IO_SYNC and pages:  # while the flush waits for it
                        stage.complete(pages.pop(), lib.ATOLL_EIO)
                        failed += 1
                        for _ in range(3):
                            stage.turn()
                    stage.complete(io)
                stage.answers()
                assert time.monotonic() < deadline
            assert flush.status == OK, f"flush {number} with {failed} failed writes"
            since += failed != 0
            if since == 5:
                break
        assert since == 5
        stage.drain()
        verify(stage, volume, bytes(expected))
        stage.check()


def test_a_page_that_changes_after_the_acknowledgement_is_named() -> None:
    with Stage(destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.write(volume, 0, block(1) + block(2))
        stage.run_until_idle()
        page = sorted(stage.lent_pages)[0]
        lib_buffer = stage.ffi.buffer(stage.ffi.cast("char *", stage.nic_buffer + page * BLOCK), BLOCK)
        lib_buffer[7:8] = bytes([lib_buffer[7][0] ^ 1])
        flush = stage.flush(volume)
        stage.run_until_idle()
        assert flush.status == lib.ATOLL_EUNFLUSHED
        assert stage.counters()["corrupt_pages"] == 1
        read = stage.read(volume, 0, BLOCK)
        fine = stage.read(volume, BLOCK, BLOCK)
        stage.run_until_idle()
        assert read.status == lib.ATOLL_ECORRUPT and fine.data == block(2)
        stage.check()
        stage.write(volume, 0, block(3))
        flush = stage.flush(volume)
        stage.run_until_idle()
        assert flush.status == OK
        stage.drain()
        stage.check()


def test_a_store_without_superblocks_is_damaged_not_strange() -> None:
    """Nobody is told to zero it."""
    with Stage(device_blocks=4096) as stage:
        stage.open()
        stage.write(stage.create_volume("v", SIZE), 0, block(1))
        stage.flush(0)
        stage.drain()
        left = bytearray(stage.device)
    for place in (0, 1, 4094, 4095):
        left[place * BLOCK : (place + 1) * BLOCK] = bytes(BLOCK)
    with Stage(device_blocks=4096) as stage:
        stage.device[:] = bytes(left)
        with pytest.raises(AssertionError, match="all copies of the superblock are damaged"):
            stage.open()


def test_a_deletion_goes_on_where_a_page_was_missing() -> None:
    """Counts of some entries of a leaf are in memory, others not: it stops at any entry, and ends with the leaf."""
    count, size = 1100, 1100 * BLOCK  # more than one page of counts is about
    filler = [block(seed) for seed in range(count)]
    with Stage(nic_pages=2048) as stage:
        stage.open()
        first, second = stage.create_volume("first", size), stage.create_volume("second", size)
        for at in range(0, count, 50):
            stage.write(first, at * BLOCK, b"".join(filler[at : at + 50]))
        stage.drain()
        # A leaf of 512 entries, and a part of the next. The page of the last places is read first, for new ones.
        shares = filler[-10:] + (filler[:60] * 9)[:502] + filler[:20]
        for at in range(0, len(shares), 38):
            stage.write(second, at * BLOCK, b"".join(shares[at : at + 38]))
        stage.drain()
        assert stage.figures().stored_blocks == count and stage.figures().references == count + len(shares)
        left = stage.close_store()
    with Stage(nic_pages=2048) as stage:
        stage.device[:] = left
        stage.open()
        reason = stage.ffi.new("char[256]")
        assert stage.lib.dedup_volume_delete(stage.state, second, 0, reason) == OK, stage.ffi.string(reason)
        lib.atoll_domain_commit(stage.domain)

        def first_counts(io: Io) -> bool:
            """It reads the page of counts of the first places: small numbers, those of the device's beginning zero."""
            counts = struct.unpack("<1024I", left[io.offset : io.offset + BLOCK]) if io.length == BLOCK else (0,)
            return 0 < max(counts) < 64 and max(counts[:500]) == 0

        held: list[Io] = []
        for turn in range(400):
            stage.turn()
            stage.take_ios()
            held = [io for io in stage.ios if first_counts(io)]
            for io in [io for io in stage.ios if io not in held or turn > 200]:
                stage.complete(io)
            assert turn != 200 or len(held) == 1, "the deletion waits for it"
        wait_for(
            "the volume is gone",
            lambda: stage.run_until_idle() or stage.lib.dedup_volume(stage.state, second).state == 0,
        )
        stage.drain()
        stage.check()
        assert stage.figures().stored_blocks == stage.figures().references == count
        verify(stage, first, b"".join(filler))


def test_damage_on_the_device_is_found() -> None:
    with Stage(cache_pages=512) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.write(volume, 0, block(1) + block(2))
        stage.flush(volume)
        stage.drain()
        at = stage.device.find(block(1))
        assert at > 0 and at % BLOCK == 0
        stage.device[at : at + 1] = bytes([stage.device[at] ^ 1])
        bad, good = stage.read(volume, 0, BLOCK), stage.read(volume, BLOCK, BLOCK)
        stage.run_until_idle()
        assert bad.status == lib.ATOLL_ECORRUPT and bad.failed == at // BLOCK
        assert good.data == block(2)
        ragged = stage.write(volume, 10, b"abc")
        stage.run_until_idle()
        assert ragged.status == lib.ATOLL_ECORRUPT
        stage.check()
        stage.device[at : at + 1] = bytes([stage.device[at] ^ 1])
        again = stage.read(volume, 0, BLOCK)
        stage.run_until_idle()
        assert again.data == block(1)
        stage.drain()
        stage.check()


def test_a_thousand_reads_wait_for_one_bad_read() -> None:
    """All of them fail, in as many steps as their pins need: the journal of one step does not hold them."""
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.write(volume, 0, b"".join(block(seed) for seed in range(64)))
        stage.flush(volume)
        stage.drain()
        stage.io_rule = lambda io: lib.ATOLL_EIO if io.opcode == lib.ATOLL_OP_IO_READ else OK
        requests = [stage.read(volume, 0, 64 * BLOCK) for _ in range(1000)]
        while stage.figures().accepted < len(requests):
            stage.turn()
        stage.run_until_idle()
        assert {request.status for request in requests} == {lib.ATOLL_EIO}
        stage.check()


def test_reads_survive_the_place_being_used_for_something_else() -> None:
    """A read is under way while its block is overwritten, its place freed and written again."""
    with Stage(device_blocks=1024) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.write(volume, 0, block(1))
        stage.flush(volume)
        stage.drain()
        read = stage.read(volume, 0, BLOCK)
        stage.turn()
        stage.take_ios()
        (held,) = stage.ios
        stage.ios.clear()
        before = stage.device[held.offset : held.offset + BLOCK]
        for seed in range(2, 400):  # the allocator comes round to that place
            stage.write(volume, 0, b"".join(block(seed * 100 + i) for i in range(16)))
            stage.flush(volume)
            deadline = 1000
            while len(stage.requests) > 1 and (deadline := deadline - 1):
                stage.turn()
                stage.disk()
                stage.answers()
            if stage.device[held.offset : held.offset + BLOCK] != before:
                break
        else:
            pytest.fail("the place was never used again")
        stage.ios.append(held)
        stage.complete(held)  # reads what is there now
        stage.run_until_idle()
        assert read.status == OK and read.data == block(seed * 100), "executed again"
        stage.drain()
        stage.check()


def test_deleted_volume() -> None:
    with Stage(destage_delay_ms=10_000_000) as stage:
        stage.open()
        kept, volume = stage.create_volume("k", SIZE), stage.create_volume("v", SIZE)
        stage.write(kept, 0, block(1))
        stage.write(volume, 0, block(1) + block(2) + block(3))
        stage.run_until_idle()
        reason = stage.ffi.new("char[256]")
        assert stage.lib.dedup_volume_delete(stage.state, volume, 0, reason) == OK
        lib.atoll_domain_commit(stage.domain)
        late = stage.write(volume, 0, block(4))
        stage.run_until_idle()
        assert late.status == lib.ATOLL_ENOENT
        stage.flush(kept)
        stage.drain()
        stage.check()
        assert stage.lib.dedup_volume(stage.state, volume).state == 0
        assert stage.figures().stored_blocks == 1


KINDS = ["write", "write", "write", "read", "read", "trim", "zero", "zero!", "flush", "fua", "cache", "turns", "drain"]

operations = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.integers(0, SIZE // 512 - 1),
        st.integers(1, 66 * 8),
        st.integers(0, 5),
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(operations, st.integers(0, 1 << 30), st.sampled_from([0, 10_000_000]))
def test_against_a_bytearray(steps: list[tuple[str, int, int, int, bool]], seed: int, delay: int) -> None:
    with Stage(nic_pages=256, merge_pages=16, destage_delay_ms=delay, seed=seed) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        expected = bytearray(SIZE)
        busy: list[tuple[int, int, Request, bytes]] = []  # ranges under way
        reads: list[tuple[Request, bytes]] = []

        def settle() -> None:
            stage.run_until_idle(shuffle=True)
            for _, _, request, _ in busy:
                assert request.status == OK, request
            for request, wanted in reads:
                assert request.status == OK and request.data == wanted, request
            busy.clear()
            reads.clear()

        for kind, sector, sectors, content, scattered in steps:
            offset = sector * 512 + (content * 37 if content == 5 else 0)
            offset = min(offset, SIZE - 1)
            length = min(sectors * 512, SIZE - offset, 65 * BLOCK - offset % BLOCK, 64 * BLOCK)
            first, last = offset // BLOCK, (offset + length - 1) // BLOCK
            if any(first <= b and a <= last for a, b, *_ in busy) or len(stage.free_pages) < last - first + 2:
                settle()
                if len(stage.free_pages) < last - first + 2:
                    stage.flush(volume)
                    stage.drain()
            if kind in ("write", "fua"):
                data = b"".join(block(content * 100 + i % 3) for i in range(last - first + 2))[:length]
                request = stage.write(volume, offset, data, FUA if kind == "fua" else 0, scattered)
                busy.append((first, last, request, data))
                expected[offset : offset + length] = data
            elif kind == "read":
                reads.append((stage.read(volume, offset, length), bytes(expected[offset : offset + length])))
                busy.append((first, last, reads[-1][0], b""))
            elif kind == "trim":
                busy.append((first, last, stage.trim(volume, offset, length), b""))
                start, stop = -(-offset // BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK
                if start < stop:
                    expected[start:stop] = bytes(stop - start)
            elif kind in ("zero", "zero!"):
                busy.append((first, last, stage.zero(volume, offset, length, NO_HOLE if kind == "zero!" else 0), b""))
                expected[offset : offset + length] = bytes(length)
            elif kind == "flush":
                busy.append((0, -1, stage.flush(volume), b""))
            elif kind == "cache":
                stage.cache(volume, offset, length)
            elif kind == "turns":
                stage.turn()
                if scattered:
                    stage.disk(shuffle=True)
                stage.answers(send=content > 2)
            else:
                settle()
                stage.flush(volume)
                stage.drain()
                stage.check()
        settle()
        stage.check()
        verify(stage, volume, bytes(expected))
        stage.flush(volume)
        stage.drain()
        stage.check()
        verify(stage, volume, bytes(expected))
        assert stage.free_pages == set(range(stage.nic_pages))


@pytest.mark.parametrize("rewrite_fails", [False, True])
def test_after_a_failed_sync_everything_since_the_last_good_one_is_written_again(rewrite_fails: bool) -> None:
    """An operating system may drop what it could not flush and call the next flush a success."""
    with Stage() as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.write(volume, 60 * BLOCK, block(99) + block(98))
        stage.flush(volume)
        stage.drain()
        stage.write(volume, 0, b"".join(block(seed) for seed in range(9)))
        stage.drain()  # destaged, not flushed
        places = {stage.device.find(block(seed)) for seed in range(9)}
        assert min(places) > 0
        doubtful = set(places)
        failures = {"sync": 1, "write": 1 if rewrite_fails else 0}

        def rule(io: Io) -> int:
            if io.opcode == lib.ATOLL_OP_IO_SYNC and failures["sync"]:
                failures["sync"] -= 1
                return int(lib.ATOLL_EIO)
            if io.opcode == lib.ATOLL_OP_IO_SYNC:
                assert not doubtful, "flushed before all was written again"
            covered = set(range(io.offset, io.offset + io.length, BLOCK))
            if io.opcode == lib.ATOLL_OP_IO_WRITE and not failures["sync"] and covered & places:
                if failures["write"]:
                    failures["write"] -= 1
                    return int(lib.ATOLL_EIO)
                doubtful.difference_update(covered)
            return OK

        stage.io_rule = rule
        first = stage.flush(volume)
        stage.run_until_idle()
        assert first.status == lib.ATOLL_EIO
        if rewrite_fails:
            second = stage.flush(volume)
            stage.run_until_idle()
            assert second.status not in (OK, -1), "a failed flush stays failed"
            assert failures["write"] == 0
            stage.check()
        last = stage.flush(volume)
        stage.run_until_idle()
        deadline = time.monotonic() + 10
        while last.status != OK and time.monotonic() < deadline:
            last = stage.flush(volume)
            stage.run_until_idle()
        assert last.status == OK and not doubtful
        stage.check()
        stage.drain()
        expected = b"".join(block(seed) for seed in range(9)).ljust(60 * BLOCK, b"\0") + block(99) + block(98)
        verify(stage, volume, expected.ljust(SIZE, b"\0"))


def test_many_syncs_fail_while_writes_go_on() -> None:
    chance = random.Random(4)
    with Stage(seed=4, nic_pages=256) as stage:
        stage.open()
        volume = stage.create_volume("v", SIZE)
        stage.drain()

        def rule(io: Io) -> int:
            failing = {lib.ATOLL_OP_IO_SYNC: 0.4, lib.ATOLL_OP_IO_WRITE: 0.1}.get(io.opcode, 0.0)
            return int(lib.ATOLL_EIO) if chance.random() < failing else OK

        stage.io_rule = rule
        expected = bytearray(SIZE)
        statuses = set()
        for round_number in range(60):
            at = chance.randrange(SIZE // BLOCK - 8)
            data = b"".join(block(chance.randrange(1000)) for _ in range(8))
            write, flush = stage.write(volume, at * BLOCK, data), stage.flush(volume)
            stage.run_until_idle()
            assert write.status == OK
            statuses.add(flush.status)
            expected[at * BLOCK : (at + 8) * BLOCK] = data
            if round_number % 10 == 0:
                stage.check()
            if len(stage.free_pages) < 64:
                stage.io_rule = None
                stage.drain()
                stage.io_rule = rule
        stage.io_rule = None
        stage.drain()
        flush = stage.flush(volume)
        stage.run_until_idle()
        deadline = time.monotonic() + 20
        while flush.status != OK and time.monotonic() < deadline:  # until the device is tried again
            flush = stage.flush(volume)
            stage.run_until_idle()
        assert flush.status == OK and len(statuses) > 1
        stage.check()
        verify(stage, volume, bytes(expected))
