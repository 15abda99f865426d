"""Shared-memory objects, the physical map, role locks: what the operating system itself says of them."""

import ctypes
import os
import random
import re
import secrets
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest
from ipc_support import instance, until

from atoll.ipc import objects, physmap, rolelock
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.roles import Role

A, B, C = Role.NIC, Role.NBD, Role.DEDUP
MIB = 1 << 20


def maps_of(pid: int | str, address: int) -> str:
    """Permissions of the map at `address`, "" if there is none."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, permissions, *_ = line.split()
        if int(span.split("-")[0], 16) == address:
            return permissions
    return ""


# --- Objects ---


def test_an_object_is_allocated_when_made_and_listed_until_unlinked() -> None:
    number = secrets.randbits(64)
    name = objects.arena_name(number, "nic")
    fd = objects.create(name, MIB)
    try:
        assert os.fstat(fd).st_blocks * 512 == MIB
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert not os.get_inheritable(fd)
        with pytest.raises(objects.ObjectError, match="exists already"):
            objects.create(name, MIB)
        assert objects.list_instances()[number] == [name]
    finally:
        os.close(fd)
        objects.unlink(name)
        objects.unlink(name)
    assert objects.list_objects(number) == []
    with pytest.raises(objects.ObjectError, match=name):
        objects.open_read_only(name)


def test_an_arena_lies_in_huge_pages_where_linux_has_them() -> None:
    size, role = 5 * MIB, Role.NIC  # two huge pages and a rest
    name = objects.arena_name(secrets.randbits(64), role)
    fd = objects.create(name, size)
    try:
        huge = lib.atoll_make_huge(fd, size)  # what is huge already stays so
        assert huge in (0, 2 * lib.ATOLL_HUGE_BYTES)
        assert os.fstat(fd).st_size == os.fstat(fd).st_blocks * 512 == size
        assert os.pread(fd, size + 1, 0) == bytes(size)
        physmap.map_arena(role, fd, size)
        physmap.populate(role)
        blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
        block = next(block for block in blocks if block.startswith(f"{physmap.address(role):x}-"))
        found = {key: int(value.split()[0]) for key, value in re.findall(r"^(\w+): +(\d+ kB)$", block, re.MULTILINE)}
        assert found["ShmemPmdMapped"] * 1024 == huge
        assert found["Rss"] * 1024 == size
    finally:
        physmap.unmap_arena(role)
        os.close(fd)
        objects.unlink(name)


def test_too_small_a_dev_shm_is_named_with_wanted_and_available_bytes() -> None:
    name = objects.arena_name(secrets.randbits(64), "dedup")
    free = os.statvfs("/dev/shm")
    wanted = free.f_bavail * free.f_frsize + 64 * MIB
    with pytest.raises(objects.ObjectError) as caught:
        objects.create(name, wanted)
    assert name in str(caught.value) and str(wanted) in str(caught.value) and "available" in str(caught.value)
    assert not Path(f"/dev/shm{name}").exists()


# --- Maps ---


def test_a_read_only_map_refuses_to_become_writable() -> None:
    with instance({A: [B], B: []}) as made:
        made.map_all(writable=A)
        libc = ctypes.CDLL(None, use_errno=True)
        read_write = 3
        at = ctypes.c_void_p(physmap.address(B))
        assert libc.mprotect(at, ctypes.c_size_t(4096), read_write) == -1
        assert ctypes.get_errno() == 13  # EACCES
        with pytest.raises(physmap.MapError, match="writable: Permission denied"):
            physmap.map_arena(B, made.read_fds[B], made.bytes[B], writable=True)
        assert maps_of("self", physmap.address(B)) == "r--s"  # the failure left it as it was
        assert maps_of("self", physmap.address(A)) == "rw-s"
        assert lib.atoll_mapped_writable(A) == 1 and lib.atoll_mapped_writable(B) == 0


def test_a_writable_map_is_not_inherited_and_no_map_is_dumped() -> None:
    with instance({A: [B], B: []}) as made:
        made.map_all(writable=A)
        flags = Path("/proc/self/smaps").read_text().split(f"{physmap.address(A):x}-")[1].split("VmFlags:")[1]
        assert {"dc", "dd"} <= set(flags.splitlines()[0].split())  # not copied on fork, not dumped
        flags = Path("/proc/self/smaps").read_text().split(f"{physmap.address(B):x}-")[1].split("VmFlags:")[1]
        assert "dd" in flags.splitlines()[0].split()
        pid = os.fork()
        if pid == 0:
            there = maps_of("self", physmap.address(A))
            physmap.map_arena(A, made.read_fds[A], made.bytes[A])  # the hole can be filled
            os._exit(0 if there == "" and maps_of("self", physmap.address(A)) == "r--s" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_nothing_of_others_is_mapped_over() -> None:
    with instance({A: [B], B: []}) as made:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        private_anonymous_fixed = 0x2 | 0x20 | 0x10
        assert libc.mmap(physmap.address(A), 4096, 1, private_anonymous_fixed, -1, 0) == physmap.address(A)
        try:
            with pytest.raises(physmap.MapError, match="File exists"):
                physmap.map_arena(A, made.read_fds[A], made.bytes[A])
        finally:
            libc.munmap(physmap.address(A), 4096)
        physmap.map_arena(A, made.read_fds[A], made.bytes[A])


def test_populate_makes_the_page_tables_but_not_those_of_the_buffers() -> None:
    with instance({A: [B], B: []}, role_bytes=MIB) as made:
        pid = os.fork()  # a fresh page table
        if pid == 0:
            made.map_all()
            physmap.populate(A)
            smaps = Path("/proc/self/smaps").read_text().split(f"{physmap.address(A):x}-")[1]
            rss_kib = int(smaps.split("Rss:")[1].split()[0])
            os._exit(0 if rss_kib * 1024 >= MIB else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_another_instance_can_be_looked_at_elsewhere() -> None:
    with instance({A: [B], B: []}) as made, physmap.Elsewhere(made.read_fds[A], made.bytes[A]) as view:
        assert view.header.instance == made.number
        assert view.address != physmap.address(A)
        assert len(view.bytes) == made.bytes[A]


# --- Role locks ---


def hold(made, role: Role, ready: int):
    def main() -> None:
        result = rolelock.acquire(role)
        os.write(ready, b"t" if result == "taken" else b"d")
        signal.pause()

    return made.play(role, main)


def test_a_death_is_noticed_at_once_and_told_to_the_successor() -> None:
    with instance({A: [], B: []}) as made:
        made.map_all()
        reader, writer = os.pipe()
        latencies = []
        for turn in range(30):
            pid = hold(made, A, writer)
            assert os.read(reader, 1) == (b"d" if turn else b"t")
            assert rolelock.owner(A) == pid
            noticed: list[tuple[set[int], int]] = []
            watch = rolelock.Watch()

            def look(watch=watch, pid=pid, noticed=noticed) -> None:
                noticed.append((watch.wait({A: pid}, 30), time.monotonic_ns()))

            thread = threading.Thread(target=look)
            thread.start()
            killed = time.monotonic_ns()
            os.kill(pid, signal.SIGKILL)
            thread.join()
            assert noticed[0][0] == {A}
            latencies.append((noticed[0][1] - killed) / 1e6)
            assert rolelock.owner(A) == 0 and rolelock.predecessor_died(A)
            made.wait(pid)
        print(f"noticed after ms: median {statistics.median(latencies):.3f}, max {max(latencies):.3f}")
        os.close(reader)
        os.close(writer)


def test_no_death_is_missed_between_look_and_wait() -> None:
    """The owner dies at a random instant around the start of the wait."""
    seed = int(time.time())
    print("seed", seed)
    chance = random.Random(seed)
    with instance({A: [], B: []}) as made:
        made.map_all()
        reader, writer = os.pipe()
        watch = rolelock.Watch()
        for _ in range(150):
            pid = hold(made, A, writer)
            os.read(reader, 1)
            end = time.perf_counter() + chance.random() * 0.0003
            os.kill(pid, signal.SIGKILL)
            while time.perf_counter() < end:
                pass
            assert watch.wait({A: pid}, 20) == {A}
            made.wait(pid)
        os.close(reader)
        os.close(writer)


def test_a_death_before_the_owner_asked_to_be_watched_is_noticed() -> None:
    """FUTEX_WAITERS is missing from the word, as in the instant after the lock was taken."""
    with instance({A: []}) as made:
        made.map_all()
        reader, writer = os.pipe()

        def main() -> None:
            rolelock.acquire(A)
            word = ffi.cast("uint32_t *", lib.ATOLL_LOCK_BASE + A * 4096)
            word[0] &= 0x7FFFFFFF
            os.write(writer, b"x")
            signal.pause()

        pid = made.play(A, main)
        os.read(reader, 1)
        watch = rolelock.Watch()
        assert watch.wait({A: pid}, 0.02) == set()
        killer = threading.Timer(0.02, os.kill, (pid, signal.SIGKILL))
        killer.start()
        assert watch.wait({A: pid}, 20) == {A}
        killer.join()
        os.close(reader)
        os.close(writer)


def test_several_roles_are_watched_at_once_and_a_wait_can_be_interrupted() -> None:
    with instance({A: [], B: [], C: []}) as made:
        made.map_all()
        reader, writer = os.pipe()
        owners = {}
        for role in (A, B, C):
            owners[role] = hold(made, role, writer)
            os.read(reader, 1)
        watch = rolelock.Watch()
        assert watch.wait(owners, 0.01) == set()
        watch.interrupt()
        started = time.monotonic()
        assert watch.wait(owners, 20) == set()
        timer = threading.Timer(0.02, watch.interrupt)
        timer.start()
        assert watch.wait(owners, 20) == set()
        timer.join()
        assert time.monotonic() - started < 10
        made.kill(owners[B])
        assert watch.wait(owners, 20) == {B}
        made.kill(owners[C])
        assert watch.wait(owners, 20) == {B, C}
        new = hold(made, B, writer)
        assert os.read(reader, 1) == b"d"
        assert watch.wait({**owners, C: 1}, 20) == {B, C}  # B has an owner, but another one
        assert watch.wait({A: owners[A], B: new}, 0.01) == set()
        os.close(reader)
        os.close(writer)


def test_a_living_owner_keeps_the_lock() -> None:
    with instance({A: []}) as made:
        made.map_all()
        reader, writer = os.pipe()
        pid = hold(made, A, writer)
        os.read(reader, 1)

        def try_it() -> None:
            with pytest.raises(rolelock.LockError):
                rolelock.acquire(A, 0.02)
            os.kill(pid, signal.SIGKILL)
            assert rolelock.acquire(A, 20) == "predecessor died"
            assert rolelock.owner(A) == os.getpid()
            rolelock.release(A)
            assert rolelock.owner(A) == 0
            assert rolelock.acquire(A) == "taken"

        assert made.wait(made.play(A, try_it)) == 0
        until(lambda: rolelock.owner(A) == 0, "the end of the second owner")
        os.close(reader)
        os.close(writer)
