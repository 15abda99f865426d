"""The storage driver on a stage of its own: every operation, both engines, everything malformed, full devices."""

from __future__ import annotations

import errno
import os
import random
import resource
from pathlib import Path

import pytest
from diskkit import BLOCK, DISCARD, EINVAL, EIO, ENOSPC, IO_COUNT, OK, READ, SYNC, WRITE, Stage, open_device

from atoll.ipc import physmap, uring
from atoll.ipc._ipc import lib

DEVICE_BLOCKS = 4096

ENGINES = ["io_uring", "threads"] if uring.available()[0] else ["threads"]


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture
def stage(tmp_path, engine):
    with Stage(open_device(tmp_path / "device", DEVICE_BLOCKS * BLOCK), engine) as stage:
        stage.start()
        yield stage


def test_write_read_sync_discard(stage):
    data = random.Random(1).randbytes(8 * BLOCK)
    assert stage.write(16 * BLOCK, data) == (OK, 0)
    assert stage.complete(stage.submit(SYNC)) == (OK, 0)
    assert stage.read(16 * BLOCK, len(data)) == (OK, 0, data)
    assert stage.complete(stage.submit(DISCARD, 16 * BLOCK, length=4 * BLOCK)) == (OK, 0)
    assert stage.read(16 * BLOCK, len(data))[2] == bytes(4 * BLOCK) + data[4 * BLOCK :]
    counters = stage.counters()
    assert (counters["reads"], counters["writes"], counters["syncs"], counters["discards"]) == (2, 1, 1, 1)
    assert counters["read_bytes"] == 2 * len(data) and counters["write_bytes"] == len(data)


def test_gather_and_scatter(stage):
    """A write of pages that lie apart, from two arenas, and a read into pages that lie apart."""
    count = 128
    for index in range(count):
        stage.source_block(2 * index)[:] = index.to_bytes(4, "little") * (BLOCK // 4)
    pages = [(stage.source + 2 * index * BLOCK, BLOCK) for index in range(count)]
    assert stage.complete(stage.submit(WRITE, 0, pages)) == (OK, 0)
    into = [(stage.buffers + (3 * (count - 1 - index)) * BLOCK, BLOCK) for index in range(count)]
    assert stage.complete(stage.submit(READ, 0, into)) == (OK, 0)
    for index in range(count):
        assert bytes(stage.buffer_block(3 * (count - 1 - index))) == index.to_bytes(4, "little") * (BLOCK // 4)
    # The driver's own pages are as good a source as dedup's.
    assert stage.complete(stage.submit(WRITE, 512 * BLOCK, into[:2])) == (OK, 0)
    assert stage.read(512 * BLOCK, BLOCK, at=900)[2] == bytes(stage.buffer_block(3 * (count - 1)))


@pytest.mark.skipif("io_uring" not in ENGINES, reason="io_uring is forbidden here")
@pytest.mark.parametrize("pinned", [True, False])
def test_writes_from_registered_arenas(tmp_path, pinned):
    """One run, many runs, of one arena and of two: the bytes arrive, and those of one arena are pinned already."""
    draw = random.Random(5)
    with Stage(open_device(tmp_path / "device", DEVICE_BLOCKS * BLOCK), pinned=pinned) as stage:
        stage.start()
        content = [draw.randbytes(BLOCK) for _ in range(200)]
        for index, block in enumerate(content):
            stage.source_block(index)[:] = block
            stage.buffer_block(index)[:] = block

        def at(base, index):
            return (base + index * BLOCK, BLOCK)

        expected = 0
        for count in (1, 2, 127, 128):
            for bases in ([stage.source], [stage.buffers], [stage.source, stage.buffers]):
                chosen = draw.sample(range(200), count)
                runs = [at(draw.choice(bases), index) for index in chosen]
                alone = len({address >= stage.buffers for address, _ in runs}) == 1
                assert stage.complete(stage.submit(WRITE, 0, runs)) == (OK, 0)
                expected += alone
                assert stage.read(0, count * BLOCK, at=800)[2] == b"".join(content[index] for index in chosen)
        assert stage.counters()["pinned"] == (expected if stage.pinned else 0)
        assert (stage.call("status")["pinned_bytes"] != 0) == stage.pinned


def test_whole_table_in_flight(stage):
    """All I/O slots at once, then again: nothing is lost, each answered once."""
    for _ in range(3):
        asked = set()
        while stage.free:
            block = len(asked)
            asked.add(stage.submit(READ, block * BLOCK, [(stage.buffers + block * BLOCK, BLOCK)], commit=False))
        stage.commit()
        assert len(asked) == IO_COUNT
        stage.complete_all(asked)
    assert stage.completions() == []


def test_malformed_requests(stage):
    """Each is refused with EINVAL, counted, and hurts nobody."""
    whole = (DEVICE_BLOCKS * BLOCK, 0)
    page, own = stage.source, stage.buffers
    end = physmap.address(lib.ATOLL_ROLE_DISK) + stage.sizes[lib.ATOLL_ROLE_DISK]
    list_at = stage.lists + 2048

    def segments(*rows):
        table = physmap.ffi.cast("struct atoll_segment *", list_at)
        for index, row in enumerate(rows):
            table[index].address, table[index].length, table[index].kind = row
        return {"address": list_at, "segment_count": len(rows), "length": sum(row[1] for row in rows)}

    cases = {
        "read into dedup's arena": {"opcode": READ, "address": page, "length": BLOCK},
        "read over own table": {"opcode": READ, "address": own - BLOCK, "length": BLOCK},
        "read past own buffers": {"opcode": READ, "address": end - BLOCK, "length": 2 * BLOCK},
        "read into no arena": {"opcode": READ, "address": 4096, "length": BLOCK},
        "address wraps": {"opcode": READ, "address": 2**64 - BLOCK, "length": BLOCK},
        "write from no arena": {"opcode": WRITE, "address": 8 << 20, "length": BLOCK},
        "write from an absent role": {"opcode": WRITE, "address": physmap.address(9), "length": BLOCK},
        "write crosses the end of an arena": {
            "opcode": WRITE,
            "address": physmap.address(lib.ATOLL_ROLE_DEDUP) + stage.sizes[lib.ATOLL_ROLE_DEDUP] - BLOCK,
            "length": 2 * BLOCK,
        },
        "length 0": {"opcode": WRITE, "address": page, "length": 0},
        "odd length": {"opcode": WRITE, "address": page, "length": 100},
        "odd address": {"opcode": WRITE, "address": page + 8, "length": BLOCK},
        "odd offset": {"opcode": WRITE, "address": page, "length": BLOCK, "words": [512]},
        "past the end": {"opcode": WRITE, "address": page, "length": BLOCK, "words": [whole[0]]},
        "across the end": {"opcode": READ, "address": own, "length": 2 * BLOCK, "words": [whole[0] - BLOCK]},
        "offset wraps": {"opcode": READ, "address": own, "length": BLOCK, "words": [2**64 - BLOCK]},
        "too long": {"opcode": READ, "address": own, "length": (lib.ATOLL_IO_BLOCKS + 1) * BLOCK},
        "discard past the end": {"opcode": DISCARD, "words": [whole[0] - BLOCK, 2 * BLOCK]},
        "discard of nothing": {"opcode": DISCARD, "words": [0, 0]},
        "discard wraps": {"opcode": DISCARD, "words": [BLOCK, 2**64 - BLOCK]},
        "unknown opcode": {"opcode": 99},
        "opcode of an answer": {"opcode": lib.ATOLL_OP_IO_DONE},
        "list in the driver's arena": {"opcode": READ, "address": own, "segment_count": 1, "length": BLOCK},
        "list nowhere": {"opcode": READ, "address": 64, "segment_count": 2, "length": 2 * BLOCK},
        "list unaligned": {"opcode": READ, "address": list_at + 4, "segment_count": 2, "length": 2 * BLOCK},
        "list too long": {
            "opcode": READ,
            "address": list_at,
            "segment_count": lib.ATOLL_IO_BLOCKS + 1,
            "length": (lib.ATOLL_IO_BLOCKS + 1) * BLOCK,
        },
        "list crosses the end": {
            "opcode": READ,
            "address": physmap.address(lib.ATOLL_ROLE_DEDUP) + stage.sizes[lib.ATOLL_ROLE_DEDUP] - 16,
            "segment_count": 2,
            "length": 2 * BLOCK,
        },
        "a sync after a slot that does not exist": {"opcode": SYNC, "words": (0, 0, IO_COUNT << 32 | 1)},
        "sum differs": {"opcode": READ, **segments((own, BLOCK, 0), (own + BLOCK, BLOCK, 0)), "length": 3 * BLOCK},
    }
    for name, fields in cases.items():
        identity = stage.identity()
        stage.submit_raw(identity=identity, **fields)
        assert stage.complete(identity) == (EINVAL, EINVAL_NUMBER), name
    late = {
        "segment elsewhere": ((own, BLOCK, 0), (page, BLOCK, 0)),
        "segment of 0 bytes": ((own, BLOCK, 0), (own + BLOCK, 0, 0)),
        "odd segment": ((own, BLOCK, 0), (own + BLOCK, 512, 0)),
        "hole": ((own, BLOCK, 0), (own + BLOCK, BLOCK, 1)),
    }
    for name, rows in late.items():
        identity = stage.identity()
        stage.submit_raw(opcode=READ, identity=identity, **segments(*rows))
        assert stage.complete(identity) == (EINVAL, EINVAL_NUMBER), name
    identity = stage.identity()
    stage.submit(SYNC, identity=identity, after=[identity])
    assert stage.complete(identity) == (EINVAL, EINVAL_NUMBER), "a sync after itself"
    # A slot number that does not exist.
    stage.submit_raw(opcode=SYNC, identity=IO_COUNT << 32 | 1)
    assert stage.completions(10) == [(IO_COUNT << 32 | 1, EINVAL, EINVAL_NUMBER)]
    assert stage.counters()["refused"] == len(cases) + len(late) + 2
    assert stage.write(0, bytes(BLOCK)) == (OK, 0)


EINVAL_NUMBER = 22


def test_same_request_twice(stage):
    """A slot in use takes no other request; the same one again gets the one answer."""
    stage.kill()  # so that both are in the ring before anything is done
    identity = stage.identity()
    other = (identity >> 32) << 32 | 77
    for each in (identity, identity, other):
        stage.submit(READ, 0, [(stage.buffers, BLOCK)], identity=each)
    stage.start()
    found = []
    while len(found) < 2:
        found += stage.completions(10)
    assert sorted(found) == sorted([(identity, OK, 0), (other, EINVAL, EINVAL_NUMBER)])
    assert stage.counters()["dropped"] == 1


def test_shrunken_file(stage, tmp_path):
    """Reads past the end of a file that was cut are errors, not endless short reads."""
    os.truncate(tmp_path / "device", 10 * BLOCK)
    status, code, _ = stage.read(8 * BLOCK, 4 * BLOCK)
    assert status == EIO and code != 0
    assert stage.read(8 * BLOCK, 2 * BLOCK)[:2] == (OK, 0)


def test_full_device(tmp_path, engine):
    """A write that the device has no room for is ENOSPC, and others go on (a file size limit stands in)."""
    limited = 64 * BLOCK
    with Stage(open_device(tmp_path / "device", DEVICE_BLOCKS * BLOCK), engine) as stage:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limited, before[1]))
        try:
            stage.start()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert stage.write(0, bytes(BLOCK)) == (OK, 0)
        status, code = stage.write(limited, bytes(BLOCK))
        assert status == EIO and code == 27  # EFBIG: an error of the device like any other
        assert stage.write(BLOCK, bytes(BLOCK)) == (OK, 0)
        assert stage.counters()["errors"] == 1


def test_short_transfers_leave_nothing_counted(tmp_path, engine):
    """What is to be continued is not with the device meanwhile: beside a client's read another write is started."""
    large = 256 * BLOCK
    with Stage(open_device(tmp_path / "device", 4 * large), engine) as stage:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (large + large // 2, before[1]))
        try:
            stage.start()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert stage.complete(stage.submit(WRITE, large, [(stage.source, large)])) == (EIO, errno.EFBIG)
        assert stage.counters()["short"] == 1
        read = stage.submit(READ, 0, [(stage.buffers, BLOCK)], flags=lib.ATOLL_FLAG_AWAITED, commit=False)
        stage.complete_all([read, stage.submit(WRITE, 0, [(stage.source, large)])])


def test_writes_are_held_back_only_beside_reads_of_clients(tmp_path, engine):
    large = 256 * BLOCK
    with Stage(open_device(tmp_path / "device", large), engine) as stage:
        stage.start()

        def held(*asked: int) -> int:
            before = stage.counters()["background_held"]
            writes = [stage.submit(WRITE, 0, [(stage.source, large)], commit=False) for _ in range(8)]
            stage.commit()
            stage.complete_all([*asked, *writes])
            return stage.counters()["background_held"] - before

        assert held() == 0
        flags = lib.ATOLL_FLAG_AWAITED
        assert held(stage.submit(READ, 0, [(stage.buffers, BLOCK)], flags=flags, commit=False)) != 0
        stage.poll(lambda: held() == 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_no_space_left(tmp_path, engine):
    """A sparse file on a full file system: ENOSPC at the write, by its name."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=1M none {folder}") != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with Stage(open_device(folder / "device", DEVICE_BLOCKS * BLOCK), engine) as stage:
            stage.start()
            answers = [stage.write(index * 64 * BLOCK, os.urandom(64 * BLOCK)) for index in range(8)]
            assert answers[0] == (OK, 0)
            assert (ENOSPC, 28) in answers and EIO not in {status for status, _ in answers}
            room = stage.complete(stage.submit(DISCARD, 0, length=64 * BLOCK))
            assert room == (OK, 0)
            assert stage.write(0, bytes(BLOCK)) == (OK, 0)
    finally:
        os.system(f"umount {folder}")


def test_preallocated_file_keeps_its_blocks(tmp_path, engine):
    path = tmp_path / "device"
    fd = open_device(path, 0)
    os.posix_fallocate(fd, 0, 64 * BLOCK)
    with Stage(fd, engine, sparse=False) as stage:
        stage.start()
        blocks = path.stat().st_blocks
        assert stage.write(0, b"x" * BLOCK) == (OK, 0)
        assert stage.complete(stage.submit(DISCARD, 0, length=32 * BLOCK)) == (OK, 0)
        assert path.stat().st_blocks >= blocks
        assert stage.counters()["discards_ignored"] == 1
        assert stage.read(0, BLOCK)[2] == b"x" * BLOCK


def test_status_and_stop(stage, engine):
    status = stage.call("status")
    assert status["ok"] and status["engine"] == engine and status["device_bytes"] == DEVICE_BLOCKS * BLOCK
    assert (status["in_flight"], status["queued"]) == (0, 0)
    assert not stage.call("nonsense")["ok"]
    assert stage.write(0, bytes(BLOCK)) == (OK, 0)
    assert stage.call("stop")["ok"]
    assert stage.wait() == 0
    assert stage.state() == lib.ATOLL_STATE_STOPPED


def test_cannot_start(tmp_path):
    pipe = os.pipe()
    with Stage(pipe[0], "threads") as stage:
        stage.start(wait=False)
        assert os.waitstatus_to_exitcode(stage.wait()) == 78
        assert stage.state() == lib.ATOLL_STATE_FAILED and "neither a file nor a block device" in stage.reason()
    os.close(pipe[1])


def test_idle_driver_sleeps(stage):
    assert stage.write(0, bytes(BLOCK)) == (OK, 0)
    ticks = Path(f"/proc/{stage.pid}/stat")

    def used() -> int:
        fields = ticks.read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    stage.poll(lambda: stage.header().sleeping)
    before, turns = used(), int(stage.header().progress)
    assert os.waitid(os.P_PID, stage.pid, os.WEXITED | os.WNOHANG) is None
    import select

    select.select([], [], [], 0.3)
    assert used() - before <= 2 and int(stage.header().progress) - turns <= 2


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor: there is nowhere else to go")
def test_runs_on_the_path_while_clients_wait_for_reads(tmp_path):
    """Reads that clients wait for bring it there, other work takes it away; who else binds it has the last word."""
    everywhere = os.sched_getaffinity(0)
    cpu, other = min(everywhere), max(everywhere)
    with Stage(open_device(tmp_path / "device", DEVICE_BLOCKS * BLOCK), ENGINES[0], path_cpu=cpu) as stage:
        stage.start()

        def load(where: set[int], **fields: int) -> None:
            def turn() -> bool:
                for _ in range(64):
                    identity = stage.identity()
                    stage.submit_raw(identity=identity, words=[0], length=BLOCK, **fields)
                    assert stage.complete(identity) == (OK, 0)
                return os.sched_getaffinity(stage.pid) == where

            stage.poll(turn)

        awaited = {"opcode": READ, "address": stage.buffers, "flags": lib.ATOLL_FLAG_AWAITED}
        write = {"opcode": WRITE, "address": stage.source, "flags": lib.ATOLL_FLAG_AWAITED}  # no flag of writes
        matching = {"opcode": READ, "address": stage.buffers}
        load({cpu}, **awaited)
        load(everywhere, **write)
        load({cpu}, **awaited)
        load(everywhere, **matching)
        load({cpu}, **awaited)
        many = [stage.submit(READ, 0, [(stage.buffers, BLOCK)], flags=lib.ATOLL_FLAG_AWAITED) for _ in range(256)]
        stage.complete_all(many)  # gathered, where the device is not too fast for that: none is left lying
        os.sched_setaffinity(stage.pid, {other})
        for _ in range(2):
            load({other}, **write)
            load({other}, **awaited)
        stage.kill()
        stage.start()
        assert os.sched_getaffinity(stage.pid) == everywhere, "a successor begins beside the path"
        load({cpu}, **awaited)
