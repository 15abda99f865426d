"""Death of the nbd service: at each store of its journal, at each crash point, at random instants, and by a request.

The stand-ins of nbdstage see to it that nothing is lost, repeated or half done: a slot gets replies until the last one
and none after, each part reaches dedup once, replies are whole, a READ shows what dedup read, pages have one owner.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from sysconfig import get_path
from typing import Any

import pytest
from nbdclient import Command, CommandFlag, ErrorCode
from nbdstage import BLOCK, PART, Stage, VolumeData

from atoll.ipc import physmap
from atoll.ipc._ipc import ffi as ipc_ffi
from atoll.ipc._ipc import lib
from atoll.ipc.crashpoint import point_hash, points_in
from atoll.services import nbd
from atoll.services.nbd.negotiation import Option

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path.stem for path in (ROOT / "services/nbd").glob("*.c") if path.stem != "_nbd")
MIB = 1 << 20
NBD, KERNEL, NIC = lib.ATOLL_ROLE_NBD, lib.ATOLL_ROLE_KERNEL, lib.ATOLL_ROLE_NIC


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The extension with a hook behind each store of the journal."""
    folder = tmp_path_factory.mktemp("nbd")
    cbuild = load("atoll_cbuild", ROOT / "ipc/cbuild.py")
    sources = [*(f"services/nbd/{name}.c" for name in SOURCES), *cbuild.DOMAIN_SOURCES, "tests/c/nbd_hook.c"]
    ffi = cbuild.make_ffi(
        "nbd_hooked",
        headers=["protocol.h", "nbd.h", "tests/c/nbd_hook.h"],
        sources=sources,
        here=ROOT / "services/nbd",
        include=["ipc/build_ipc.py"],
    )
    ffi.emit_c_code(str(folder / "nbd_hooked.c"))
    command = ["cc", *cbuild.COMPILE_ARGS, "-DATOLL_STORE_HOOK", "-fPIC", "-shared", "-I.", f"-I{get_path('include')}"]
    command += [str(folder / "nbd_hooked.c"), *sources, "-o", str(folder / "nbd_hooked.so")]
    subprocess.run(command, cwd=ROOT, check=True)
    module = load("nbd_hooked", folder / "nbd_hooked.so")
    return module.ffi, module.lib


def volumes() -> list[VolumeData]:
    return [
        VolumeData(0, b"disk", bytearray(2 * MIB)),
        *(VolumeData(i, b"%03d" % i * 80, bytearray(1)) for i in range(9, 40)),
    ]


def scenario(stage: Stage) -> None:
    """A little of everything, several things at a time. Never waits for anything but the stage itself."""
    stage.remember = True
    first, second, third = stage.connect(), stage.connect(), stage.connect()
    third.negotiate(extended=True)
    first.negotiate(structured=False)
    second.stage.settle()
    second.take_stream()
    second.send_flags()
    stage.settle()
    second.send_option(Option.LIST)
    writes = [
        first.submit(Command.WRITE, 5, payload=b"a" * (PART + 77)),
        third.submit(Command.WRITE, MIB, payload=b"b" * BLOCK, flags=CommandFlag.FUA),
        first.submit(Command.WRITE_ZEROES, MIB + 7 * BLOCK, BLOCK),
    ]
    refused = third.submit(Command.READ, 2 * MIB, 1)
    stage.settle()
    reads = [first.submit(Command.READ, 0, PART + 500), third.submit(Command.READ, MIB - BLOCK, 3 * BLOCK)]
    status = third.submit(Command.BLOCK_STATUS, 0, 2 * MIB)
    flush = first.submit(Command.FLUSH)
    stage.settle()
    again = [first.submit(Command.READ, 7 * BLOCK, BLOCK), third.submit(Command.READ, MIB - BLOCK, 3 * BLOCK)]
    first.submit(Command.DISC)
    stage.settle()
    assert all(wire.results[cookie].error is None for wire, cookie in zip((first, third, first), writes, strict=True))
    assert first.results[reads[0]].check().data == bytes(5) + b"a" * (PART + 77) + bytes(500 - 82)
    assert third.results[reads[1]].check().data == bytes(BLOCK) + b"b" * BLOCK + bytes(BLOCK)
    assert first.results[again[0]].check().data == b"a" * BLOCK
    assert third.results[again[1]].check().data == bytes(BLOCK) + b"b" * BLOCK + bytes(BLOCK)
    assert third.results[refused].error is not None and third.results[status].extents[1][1] == 3
    assert first.results[flush].error is None and first.is_closed
    assert len(second.take_stream()) > nbd.lib.NBD_REPLY_BYTES
    for wire in (first, second, third):
        wire.leave()
    stage.check_quiet()


def revive(stage: Stage) -> None:
    """From now on the stage starts a successor whenever nbd is dead."""
    is_dead = stage.is_dead

    def is_dead_for_good() -> bool:
        if is_dead():
            assert stage.last_status == signal.SIGKILL, f"nbd ended by itself, wait status {stage.last_status:#x}"
            stage.start(previous_signal=signal.SIGKILL, wait=False)
        return False

    stage.is_dead = is_dead_for_good  # type: ignore[method-assign]


def test_the_scenario_without_a_death() -> None:
    with Stage(volumes()) as stage:
        stage.start()
        scenario(stage)


def test_death_after_each_store(hooked: tuple[Any, Any]) -> None:
    """Incarnation k dies after its k-th store, so each distance from a commit is somebody's last, many times."""
    with Stage(volumes(), service=hooked) as stage:
        revive(stage)
        stage.before = lambda service: service.nbd_die_after(stage.incarnation)
        stage.start(wait=False)
        while stage.incarnation < 250:
            scenario(stage)
        print(f"{stage.incarnation} incarnations, {len(stage.wires)} connections")


@pytest.mark.parametrize("seed", range(6))
def test_death_after_few_stores_again_and_again(hooked: tuple[Any, Any], seed: int) -> None:
    """Few live for long (a step takes up to some hundred stores); dedup answers out of order."""
    with Stage(volumes(), service=hooked, seed=seed) as stage:
        revive(stage)
        stage.shuffle = True

        def before(service: Any) -> None:
            service.nbd_die_after(
                random.Random(seed * 100003 + stage.incarnation).choice([1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 610])
            )

        stage.before = before
        stage.start(wait=False)
        while stage.incarnation < 100:
            scenario(stage)
        print(f"{stage.incarnation} incarnations, {len(stage.wires)} connections")


POINTS = sorted(points_in(ROOT / "services/nbd"))


@pytest.mark.parametrize("point", POINTS)
def test_death_at_each_crash_point(point: str) -> None:
    with Stage(volumes()) as stage:
        revive(stage)
        header = stage.peers[KERNEL].header
        stage.start()
        for _ in range(3):
            header.crash_sequence += 1
            header.crash_point = point_hash(point)
            before = stage.incarnation
            scenario(stage)
            assert stage.incarnation == before + 1, f"{point} was not reached"


def test_death_at_random_instants() -> None:
    """Many requests under way on several connections, of every size; the service is killed every few milliseconds."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    chance = random.Random(seed)
    with Stage(volumes(), seed=seed) as stage:
        revive(stage)
        stage.remember = True
        stage.shuffle = True
        stage.start()
        modes = [(False, False), (True, False), (False, True)] * 2
        wires = [stage.connect().negotiate(structured, extended) for structured, extended in modes]
        deadline = time.monotonic() + 6.0
        latest = deadline + 60.0  # on a busy machine six seconds see too little
        requests = kills = 0
        next_kill, early = time.monotonic(), True
        header = physmap.header(NBD)
        while True:
            now = time.monotonic()
            more = now < deadline or (now < latest and (kills <= 50 or requests <= 500))
            if not more and not stage.uses:
                break
            while more and len(stage.free_slots) > 8 and len(stage.free_pages) > 600:
                wire = chance.choice(wires)
                length = chance.choice([1, 512, BLOCK, 3 * BLOCK, chance.randint(1, 3 * PART)])
                offset = chance.randint(0, 2 * MIB - length)
                command = chance.choice(
                    [Command.READ, Command.WRITE, Command.TRIM, Command.WRITE_ZEROES, Command.FLUSH]
                )
                if command == Command.WRITE:
                    wire.submit(command, offset, payload=bytes([chance.randint(0, 2)]) * length)
                else:
                    wire.submit(command, *((0, 0) if command == Command.FLUSH else (offset, length)))
                requests += 1
            if stage.pid and now > next_kill:
                if early or physmap.serves(header, stage.incarnation):
                    os.kill(stage.pid, signal.SIGKILL)
                    kills += 1
                    early = chance.random() < 0.3  # before it serves, too
                next_kill = now + chance.uniform(0.0, 0.02)
            stage.is_dead()
            if not stage.turn():
                time.sleep(0.0001)
            stage.free_pages += stage.lent_pages
            stage.lent_pages.clear()
        print(f"{requests} requests, {kills} kills")
        assert kills > 50 and requests > 500
        assert all(len(wire.results) == wire.next_cookie - 1 for wire in wires)
        assert all(result.error is None for wire in wires for result in wire.results.values())
        stage.check_quiet()


# --- Poison (I8) ---


def die_of(stage: Stage, identity: int, number: int) -> None:
    """As if nbd had died by that signal while it executed the request: the next one finds `current` set."""
    stage.kill()
    stage._map(NBD, writable=True)
    physmap.header(NBD).current = identity
    stage._map(NBD, writable=False)
    stage.start(previous_signal=number)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL])
def test_a_request_that_crashes_twice_is_refused(number: int) -> None:
    with Stage(volumes()) as stage:
        stage.start()
        wire = stage.connect().negotiate()
        stage.hold = True
        guilty, innocent = wire.submit(Command.READ, 0, BLOCK), wire.submit(Command.READ, BLOCK, BLOCK)
        stage.settle(until=lambda: len(stage.waiting) == 2)
        identity = stage.waiting[0].identity
        die_of(stage, identity, number)
        suspects = ipc_ffi.cast("struct atoll_suspect *", physmap.address(NBD) + 12288)
        assert (suspects[0].identity, suspects[0].crashes) == (identity, 1)
        die_of(stage, identity, number)
        assert suspects[0].crashes == 2
        stage.hold = False
        stage.settle()
        error = wire.results[guilty].error
        assert error is not None and error.code == ErrorCode.EIO and "crash twice" in error.text
        assert wire.results[innocent].error is None
        assert suspects[0].crashes == 0 and stage.counters()["poisoned"] == 1, "refused, then forgotten"
        stage.check_quiet()


def test_a_kill_from_outside_counts_against_nobody() -> None:
    with Stage(volumes()) as stage:
        stage.start()
        wire = stage.connect().negotiate()
        stage.hold = True
        cookie = wire.submit(Command.READ, 0, BLOCK)
        stage.settle(until=lambda: len(stage.waiting) == 1)
        for number in (signal.SIGKILL, signal.SIGTERM, 0, signal.SIGKILL):
            die_of(stage, stage.waiting[0].identity, number)
        stage.hold = False
        stage.settle()
        assert wire.results[cookie].error is None and stage.counters()["poisoned"] == 0


def test_once_is_not_twice() -> None:
    with Stage(volumes()) as stage:
        stage.start()
        wire = stage.connect().negotiate()
        for _ in range(3):
            stage.hold = True
            cookie = wire.submit(Command.WRITE, 0, payload=b"x" * BLOCK)
            stage.settle(until=lambda: len(stage.waiting) == 1)
            die_of(stage, stage.waiting[0].identity, signal.SIGSEGV)
            stage.hold = False
            stage.settle()
            assert wire.results[cookie].error is None
        stage.check_quiet()


@pytest.mark.parametrize("what", ["request", "write", "option", "open"])
def test_poison_in_whatever_comes_from_nic(what: str) -> None:
    """The service is dead while the frame comes; two crashes are on its account when it is looked at."""
    with Stage(volumes()) as stage:
        stage.start()
        wire = stage.connect().negotiate()
        other = stage.connect()
        stage.settle()
        other.send_flags()
        stage.settle()
        stage.kill()
        if what == "request":
            cookie = wire.submit(Command.READ, 0, 1)
        elif what == "write":
            cookie = wire.submit(Command.WRITE, 0, payload=b"x" * (PART + 1))
        elif what == "option":
            other.send_option(Option.LIST)
        else:
            victim = stage.connect()
        (slot,) = stage.uses
        stage._map(NBD, writable=True)
        suspects = ipc_ffi.cast("struct atoll_suspect *", physmap.address(NBD) + 12288)
        suspects[3].identity, suspects[3].crashes = stage.identity(slot), 2
        stage._map(NBD, writable=False)
        stage.start(previous_signal=signal.SIGKILL)
        stage.settle()
        if what in ("request", "write"):
            error = wire.results[cookie].error
            assert error is not None and error.code == ErrorCode.EIO
            assert not stage.log and not stage.lent_pages
        else:
            assert (other if what == "option" else victim).is_closed
        assert wire.call(Command.READ, 0, 1).error is None
        assert stage.counters()["poisoned"] == 1 and suspects[3].crashes == 0
