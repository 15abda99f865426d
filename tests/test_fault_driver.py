"""The fault-injecting stand-in: each action, its counts, its record, and that a kill changes none of it."""

from __future__ import annotations

import io
import os
import random
import signal
import time

import pytest
from diskkit import BLOCK, DISCARD, EIO, ENOSPC, OK, READ, SYNC, WRITE, Stage, open_device

from atoll.drivers import fault
from atoll.drivers.fault.record import RecordError, apply, power_loss, read_accesses, read_record
from atoll.ipc import uring
from atoll.ipc._ipc import lib

ENGINE = "io_uring" if uring.available()[0] else "threads"
BLOCKS = 256


def stage_with(tmp_path, *rules, **more):
    testing = {"fault": {"rules": list(rules), **more}}
    fd = open_device(tmp_path / "device", BLOCKS * BLOCK)
    stage = Stage(fd, ENGINE, "atoll.drivers.fault", testing=testing)
    stage.start()
    return stage


def test_without_rules_it_is_the_driver(tmp_path):
    with stage_with(tmp_path) as stage:
        assert stage.write(0, b"a" * BLOCK) == (OK, 0)
        assert stage.read(0, BLOCK) == (OK, 0, b"a" * BLOCK)
        assert stage.complete(stage.submit(SYNC)) == (OK, 0)


def test_error_by_place_count_and_kind(tmp_path):
    rule = {"action": "error", "kinds": ["write"], "offset": 8 * BLOCK, "length": BLOCK, "skip": 1, "count": 2}
    with stage_with(tmp_path, rule) as stage:
        assert stage.write(9 * BLOCK, b"x" * BLOCK) == (OK, 0)  # beside it
        assert stage.read(8 * BLOCK, BLOCK)[0] == OK  # another kind
        answers = [stage.write(7 * BLOCK, bytes([number]) * 2 * BLOCK)[0] for number in range(1, 5)]
        assert answers == [OK, EIO, EIO, OK]
        assert stage.call("fault-status")["rules"] == [{"action": "error", "matched": 4, "applied": 2}]
        assert stage.read(8 * BLOCK, BLOCK)[2] == b"\4" * BLOCK


def test_errors_have_their_names(tmp_path):
    with stage_with(tmp_path, {"action": "error", "errno": "ENOSPC", "kinds": ["write"]}) as stage:
        assert stage.write(0, bytes(BLOCK)) == (ENOSPC, 28)
        assert stage.call("fault-set", rules=[{"action": "error", "errno": "ENOMEM", "kinds": ["sync"]}])["ok"]
        assert stage.write(0, bytes(BLOCK)) == (OK, 0)
        assert stage.complete(stage.submit(SYNC)) == (EIO, 12)


def test_delay(tmp_path):
    with stage_with(tmp_path, {"action": "delay", "ms": 60, "count": 1}) as stage:
        began = time.monotonic()
        assert stage.write(0, b"d" * BLOCK) == (OK, 0)
        assert time.monotonic() - began >= 0.06
        assert stage.read(0, BLOCK)[2] == b"d" * BLOCK


def test_hang_and_release(tmp_path):
    with stage_with(tmp_path, {"action": "hang", "kinds": ["read"], "count": 2}) as stage:
        hung = [stage.submit(READ, 0, [(stage.buffers + at * BLOCK, BLOCK)]) for at in range(2)]
        assert stage.write(0, b"h" * BLOCK) == (OK, 0)  # others go on
        stage.kill()
        stage.start()
        assert stage.write(BLOCK, b"i" * BLOCK) == (OK, 0)  # and a successor does not let go
        assert stage.completions(0.05) == []
        assert stage.call("status")["queued"] == 2
        assert stage.call("fault-release")["released"] == 2
        found = stage.completions(10)
        while len(found) < 2:
            found += stage.completions(10)
        assert sorted(found) == sorted((identity, OK, 0) for identity in hung)
        assert bytes(stage.buffer_block(1)) == b"h" * BLOCK


def test_a_sync_comes_after_what_it_names(tmp_path):
    """And after nothing else; a successor knows, too."""
    with stage_with(tmp_path, {"action": "hang", "kinds": ["write"], "count": 3}) as stage:
        held = [stage.submit(WRITE, at * BLOCK, [(stage.source, BLOCK)]) for at in range(3)]
        over = stage.submit(READ, 8 * BLOCK, [(stage.buffers, BLOCK)])
        assert stage.complete(over)[0] == OK
        assert stage.complete(stage.submit(SYNC)) == (OK, 0)
        assert stage.complete(stage.submit(SYNC, after=[over, over + 1])) == (OK, 0)  # done; never asked for
        behind = stage.submit(SYNC, after=[held[0], over, held[2]])
        after_one = stage.submit(SYNC, after=[held[1]])
        again = stage.submit(SYNC, after=[behind])  # one that waits itself
        stage.kill()
        stage.start()
        assert stage.write(BLOCK * 9, b"i" * BLOCK) == (OK, 0)
        assert stage.completions(0.05) == []
        assert stage.call("status")["queued"] == 6
        stage.call("fault-release")
        found = stage.completions(10)
        while len(found) < 6:
            found += stage.completions(10)
        order = [identity for identity, status, code in found if (status, code) == (OK, 0)]
        assert sorted(order) == sorted([*held, behind, after_one, again])
        at = {identity: index for index, identity in enumerate(order)}
        assert max(at[held[0]], at[held[2]]) < at[behind] < at[again]
        assert at[held[1]] < at[after_one]


def test_tear_and_forget(tmp_path):
    rules = [
        {"action": "tear", "bytes": BLOCK + 512, "kinds": ["write"], "count": 1},
        {"action": "forget", "kinds": ["write"], "count": 1},
        {"action": "tear", "bytes": 512, "errno": "EIO", "kinds": ["write"], "count": 1},
    ]
    with stage_with(tmp_path, *rules) as stage:
        assert stage.write(0, b"1" * 3 * BLOCK) == (OK, 0)
        assert stage.read(0, 3 * BLOCK)[2] == b"1" * (BLOCK + 512) + bytes(2 * BLOCK - 512)
        assert stage.write(0, b"2" * 3 * BLOCK) == (OK, 0)
        assert stage.read(0, BLOCK)[2] == b"1" * BLOCK
        assert stage.write(0, b"3" * BLOCK) == (EIO, 5)
        assert stage.read(0, BLOCK)[2] == b"3" * 512 + b"1" * (BLOCK - 512)
        assert stage.write(0, b"4" * BLOCK) == (OK, 0)


def test_poison(tmp_path):
    """A request that crashes the driver twice is refused; those beside it are not, and a kill blames nobody."""
    rule = {"action": "crash", "kinds": ["read"], "offset": 8 * BLOCK, "length": BLOCK}
    with stage_with(tmp_path, rule) as stage:
        stage.kill()
        before = stage.submit(WRITE, 0, [(stage.source, BLOCK)])
        poison = stage.submit(READ, 8 * BLOCK, [(stage.buffers, BLOCK)])
        after = [stage.submit(READ, at * BLOCK, [(stage.buffers + at * BLOCK, BLOCK)]) for at in (1, 2, 3)]
        crashes, found = 0, []
        deadline = time.monotonic() + 20
        while len(found) < 5:
            assert time.monotonic() < deadline
            if stage.pid == 0:
                stage.start(wait=False)
            found += stage.take()
            pid, status = os.waitpid(stage.pid, os.WNOHANG)
            if pid:
                assert os.waitstatus_to_exitcode(status) == -signal.SIGABRT
                stage.pid, stage.last_status = 0, status
                crashes += 1
        assert crashes == 2
        assert sorted(found) == sorted(
            [(before, OK, 0), (poison, lib.ATOLL_EPOISON, 5), *((identity, OK, 0) for identity in after)]
        )
        assert stage.counters()["poisoned"] == 1


def test_chance_is_repeatable_over_kills(tmp_path):
    """The same seed gives the same faults, whether or not the driver dies in between."""
    rule = {"action": "error", "probability": 0.3, "kinds": ["read"]}

    def run(folder, kill):
        folder.mkdir()
        with stage_with(folder, rule, seed=99) as stage:
            answers = []
            for number in range(60):
                if kill and number % 10 == 5:
                    stage.kill()
                    stage.start()
                answers.append(stage.read(0, BLOCK)[0])
        return answers

    quiet = run(tmp_path / "quiet", False)
    assert 5 <= quiet.count(EIO) <= 40
    assert run(tmp_path / "killed", True) == quiet


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"action": "explode"}, "rule 1: action 'explode' is none of error"),
        ({"action": "error", "when": 1}, "rule 1: unknown key 'when'"),
        ({"action": "error", "kinds": ["write", "erase"]}, "only read, write, sync, discard exist"),
        ({"action": "error", "probability": 2}, "probability 2 is not between 0 and 1"),
        ({"action": "error", "errno": "EWHAT"}, "errno 'EWHAT' is no name of an error"),
        ({"action": "tear", "bytes": 100}, "bytes 100 is not a multiple of 512"),
        ({"action": "error", "offset": -1}, "rule 1"),
    ],
)
def test_wrong_rules_are_named(tmp_path, row, text):
    with pytest.raises(fault.RuleError, match=".*".join(text.split())):
        fault.parse_rules([row])


def test_wrong_rules_by_call_change_nothing(tmp_path):
    with stage_with(tmp_path, {"action": "error", "kinds": ["read"]}) as stage:
        answer = stage.call("fault-set", rules=[{"action": "explode"}])
        assert not answer["ok"] and "explode" in answer["error"]
        assert stage.read(0, BLOCK)[0] == EIO


def test_record_and_power_loss(tmp_path):
    """Flushed writes are on every device that a power loss can leave; the others may be, sector by sector."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    record = tmp_path / "record"
    with stage_with(tmp_path, record=str(record)) as stage:
        flushed_at: list[tuple[int, dict[int, bytes]]] = []  # bytes of the record, blocks that are there from then on
        state: dict[int, bytes] = {}
        for number in range(80):
            place, count = choose.randrange(BLOCKS - 4), choose.randrange(1, 4)
            data = number.to_bytes(2, "little") * (BLOCK // 2)
            identity = None
            for at in range(count):
                stage.source_block(at)[:] = data
            identity = stage.submit(WRITE, place * BLOCK, [(stage.source, count * BLOCK)])
            if choose.random() < 0.2:
                stage.kill()
                stage.start()
            assert stage.complete(identity) == (OK, 0)
            state.update({place + at: data for at in range(count)})
            if choose.random() < 0.1 or number == 40:
                assert stage.complete(stage.submit(DISCARD, 0, length=BLOCK)) == (OK, 0)
                state[0] = bytes(BLOCK)
            if choose.random() < 0.15:
                assert stage.complete(stage.submit(SYNC)) == (OK, 0)
                flushed_at.append((stage.call("fault-status")["record_bytes"], dict(state)))
        end = stage.call("fault-status")["record_bytes"]
    device = (tmp_path / "device").read_bytes()
    events = read_record(record, end)
    assert {event.kind for event in events} == {"write", "sync", "discard", "done"}
    everything = image_of(power_loss(events, len(events), seed, kept=1.0))
    assert everything == device, "all kept: the device itself"
    for size, durable in flushed_at:
        cut = len(read_record(record, size))
        image = image_of(power_loss(events, cut, choose.randrange(1 << 30), kept=choose.choice([0.0, 0.5])))
        for block, data in durable.items():
            assert image[block * BLOCK : (block + 1) * BLOCK] == data, f"block {block} was flushed"


def test_a_record_of_accesses_tells_where_reads_and_writes_go(tmp_path):
    record = tmp_path / "record"
    with stage_with(tmp_path, record=str(record), record_accesses=True) as stage:
        assert stage.write(7 * BLOCK, bytes(BLOCK))[0] == OK
        between = stage.call("fault-status")["record_bytes"]
        assert stage.read(3 * BLOCK, 2 * BLOCK)[0] == OK
        assert stage.complete(stage.submit(SYNC)) == (OK, 0)
        end = stage.call("fault-status")["record_bytes"]
    found = [(row["opcode"], row["offset_bytes"], row["length_bytes"]) for row in read_accesses(record, 0, end)]
    assert found == [(WRITE, 7 * BLOCK, BLOCK), (READ, 3 * BLOCK, 2 * BLOCK)]
    assert len(read_accesses(record, between, end)) == 1
    record.write_bytes(record.read_bytes()[:-40] + bytes(40))
    with pytest.raises(RecordError, match="no access at byte 40"):
        read_accesses(record)


@pytest.mark.parametrize("awaited", [True, False])
def test_reads_that_clients_wait_for_come_before_what_is_written(tmp_path, awaited):
    """What came last is started first, and of eight times as much as the device may have beside it not all at once."""
    record, large = tmp_path / "record", BLOCKS * BLOCK
    with stage_with(tmp_path, record=str(record), record_accesses=True) as stage:
        asked = [stage.submit(WRITE, 0, [(stage.source, large)], commit=False) for _ in range(8)]
        flags = lib.ATOLL_FLAG_AWAITED if awaited else 0
        asked.append(stage.submit(READ, 0, [(stage.buffers, 2 * BLOCK)], flags=flags, commit=False))
        stage.commit()
        stage.complete_all(asked)
        end = stage.call("fault-status")["record_bytes"]
        assert (stage.counters()["background_held"] != 0) == awaited
    order = [int(row["opcode"]) for row in read_accesses(record, 0, end)]
    assert order == [READ] + [WRITE] * 8


def image_of(sectors):
    image = io.BytesIO(bytes(BLOCKS * BLOCK))
    apply(image, sectors)
    return image.getvalue()
