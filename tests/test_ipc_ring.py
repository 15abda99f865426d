"""Rings and transactions: against a deque as oracle, with crashes between any two steps; between two real processes
that are killed under load; sleeping and waking."""

import os
import random
import resource
import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ipc_support import Instance, instance, until

from atoll.ipc import physmap
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.roles import Role

A, B = Role.NIC, Role.NBD
ENTRIES = 8


class RingMachine(RuleBasedStateMachine):
    """Producer and consumer in one process (both arenas writable, which only a test may); a crash is: open again."""

    def __init__(self) -> None:
        super().__init__()
        self.instance = Instance({A: [B], B: []}, entries=ENTRIES)
        self.instance.map_all()
        for role in (A, B):
            physmap.map_arena(role, self.instance.writable_fds[role], self.instance.bytes[role], writable=True)
        self.incarnation = {A: 0, B: 0}
        self.domain = {}
        self.crash_producer()
        self.crash_consumer()
        self.next_number = 0
        self.put: list[int] = []  # in the producer's open step
        self.committed: deque[int] = deque()  # sent, not yet taken for good
        self.taken = 0  # of these, in the consumer's open step
        self.unpublished_room = 0

    def teardown(self) -> None:
        self.instance.close()

    @rule(count=st.integers(1, ENTRIES + 2))
    def send(self, count: int) -> None:
        for _ in range(count):
            message = ffi.new("struct atoll_descriptor *", {"opcode": 3, "identity": self.next_number})
            message.words[2] = self.next_number ^ 0xFFFF
            room = ENTRIES - len(self.committed) - len(self.put)
            assert lib.atoll_domain_put(self.domain[A], B, message) == (room > 0)
            if room > 0:
                self.put.append(self.next_number)
                self.next_number += 1

    @rule()
    def commit_producer(self) -> None:
        lib.atoll_domain_commit(self.domain[A])
        self.committed.extend(self.put)
        self.put = []

    @rule(count=st.integers(1, ENTRIES))
    def take(self, count: int) -> None:
        for _ in range(count):
            message = ffi.new("struct atoll_descriptor *")
            expected = len(self.committed) > self.taken
            assert lib.atoll_domain_take(self.domain[B], A, message) == expected
            if expected:
                assert message.identity == self.committed[self.taken]
                assert message.words[2] == self.committed[self.taken] ^ 0xFFFF
                self.taken += 1

    @rule()
    def commit_consumer(self) -> None:
        lib.atoll_domain_commit(self.domain[B])
        for _ in range(self.taken):
            self.committed.popleft()
        self.taken = 0

    @rule()
    def crash_producer(self) -> None:
        self.incarnation[A] += 1
        self.domain[A] = self.instance.open(A, self.incarnation[A])
        if self.incarnation[A] > 1:
            self.next_number -= len(self.put)
            self.put = []

    @rule()
    def crash_consumer(self) -> None:
        self.incarnation[B] += 1
        self.domain[B] = self.instance.open(B, self.incarnation[B])
        self.taken = 0

    @rule()
    def adopt(self) -> None:
        """All die, and the arenas are taken over: the rings are empty, whatever their entries hold."""
        counts = ffi.new("uint32_t[16]", [ENTRIES] * 16)
        for role, mask in ((A, 1 << B), (B, 0)):
            size = self.instance.bytes[role]
            done = lib.atoll_arena_adopt(
                role, self.instance.number, size, mask, counts, 4096, 0, lib.ATOLL_WAKE_FUTEX, -1
            )
            assert done == 0
        self.put, self.taken = [], 0
        self.committed.clear()
        self.crash_producer()
        self.crash_consumer()

    @precondition(lambda self: self.taken == 0)
    @invariant()
    def pending_is_what_was_sent(self) -> None:
        pending = lib.atoll_domain_pending(self.domain[B], A)
        assert pending <= len(self.committed)
        assert (pending == 0) == (not self.committed)


RingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRing = RingMachine.TestCase


def test_an_adopted_ring_is_empty_at_each_look() -> None:
    """The first looks at the tail, those after it at the entry, where a message of before was ready."""
    machine = RingMachine()
    machine.send(2)
    machine.commit_producer()
    machine.adopt()
    assert [lib.atoll_domain_pending(machine.domain[B], A) for _ in range(4)] == [0, 0, 0, 0]
    machine.teardown()


class Counters:
    """Two words in a role area: sent and received, changed by transaction."""

    def __init__(self, role: Role) -> None:
        self.words = ffi.cast("uint64_t *", physmap.address(role) + int(physmap.header(role).role_offset))

    sent = property(lambda self: self.words[0])
    received = property(lambda self: self.words[1])
    damaged = property(lambda self: self.words[2])

    def add(self, domain: object, word: int) -> None:
        lib.atoll_domain_set64(domain, self.words + word, self.words[word] + 1)


def produce(made: Instance, incarnation: int, total: int) -> None:
    domain, counters = made.open(A, incarnation), Counters(A)
    lib.atoll_domain_serving(domain)
    message = ffi.new("struct atoll_descriptor *", {"opcode": 3})
    while counters.sent < total:
        for _ in range(7):
            message.identity = counters.sent
            message.words[1] = counters.sent * 3
            if counters.sent == total or not lib.atoll_domain_put(domain, B, message):
                break
            counters.add(domain, 0)
        lib.atoll_domain_commit(domain)


def consume(made: Instance, incarnation: int, total: int) -> None:
    domain, counters = made.open(B, incarnation), Counters(B)
    lib.atoll_domain_serving(domain)
    message = ffi.new("struct atoll_descriptor *")
    while counters.received < total:
        for _ in range(5):
            if not lib.atoll_domain_take(domain, A, message):
                break
            if message.identity != counters.received or message.words[1] != counters.received * 3:
                counters.add(domain, 2)
            counters.add(domain, 1)
        lib.atoll_domain_commit(domain)
        if counters.received < total:
            lib.atoll_domain_sleep(domain, 0, -1)  # no timeout: a lost wake-up is a hang


@pytest.mark.parametrize("victims", [(A,), (B,), (A, B)])
def test_each_message_arrives_once_though_the_processes_are_killed(victims: tuple[Role, ...]) -> None:
    seed = int(time.time())
    print("seed", seed)
    chance = random.Random(seed)
    kills = 0
    while kills < 10:  # where a test is slow to look, all may be there after few
        kills += all_arrive(victims, chance, 40_000)


def all_arrive(victims: tuple[Role, ...], chance: random.Random, total: int) -> int:
    """How many were killed meanwhile."""
    kills = 0
    with instance({A: [B], B: []}, entries=32) as made:
        made.map_all()
        received = Counters(B)
        incarnation = {A: 0, B: 0}
        pids: dict[Role, int] = {}

        def start(role: Role) -> None:
            incarnation[role] += 1
            main = produce if role == A else consume
            pids[role] = made.play(role, lambda: main(made, incarnation[role], total))

        start(A)
        start(B)
        while received.received < total:
            seen = int(received.received)
            goal = min(total, seen + chance.randrange(300, 2500))
            until(lambda goal=goal: received.received >= goal, f"{goal} messages (incarnations {incarnation})")
            victim = chance.choice(victims)
            os.kill(pids[victim], signal.SIGKILL)
            kills += made.wait(pids[victim]) == -signal.SIGKILL
            start(victim)
        assert made.wait(pids[A]) == 0
        assert made.wait(pids[B]) == 0
        assert (received.received, received.damaged, Counters(A).sent) == (total, 0, total)
    return kills


def test_a_sleeper_is_woken_by_each_message() -> None:
    """A message at a time there and back, everybody asleep in between: a lost wake-up would be a hang."""
    rounds = 3000
    with instance({A: [B], B: [A]}) as made:
        made.map_all()

        def answer() -> None:
            domain = made.open(B, 1)
            message = ffi.new("struct atoll_descriptor *")
            for _ in range(rounds):
                while not lib.atoll_domain_take(domain, A, message):
                    lib.atoll_domain_sleep(domain, 0, -1)
                assert lib.atoll_domain_put(domain, A, message)
                lib.atoll_domain_commit(domain)

        def ask() -> None:
            domain = made.open(A, 1)
            message = ffi.new("struct atoll_descriptor *", {"opcode": 3})
            for number in range(rounds):
                message.identity = number
                assert lib.atoll_domain_put(domain, B, message)
                lib.atoll_domain_commit(domain)
                while not lib.atoll_domain_take(domain, B, message):
                    lib.atoll_domain_sleep(domain, 0, -1)
                assert message.identity == number
                lib.atoll_domain_commit(domain)

        pids = [made.play(B, answer), made.play(A, ask)]
        assert [made.wait(pid) for pid in pids] == [0, 0]


def test_a_sleeper_wakes_by_timeout_and_ignores_what_it_cannot_take() -> None:
    with instance({A: [B], B: []}) as made:
        made.map_all(writable=B)
        sender = made.play(A, lambda: produce(made, 1, 1))
        assert made.wait(sender) == 0
        domain = made.open(B, 1)
        assert lib.atoll_domain_sleep(domain, 0, -1) == 1
        assert lib.atoll_domain_sleep(domain, 1 << A | 1 << Role.KERNEL, 1_000_000) == 0
        assert not lib.atoll_domain_may_sleep(domain, 0)
        assert lib.atoll_domain_may_sleep(domain, 1 << A)
        assert domain.self.sleeping == 1
        lib.atoll_domain_awake(domain)
        assert domain.self.sleeping == 0


def test_one_who_dozes_is_woken_for_what_cannot_wait_and_for_many() -> None:
    """The waker looks at what it sends and how much waits; the dozer looks at what is there before it sleeps."""
    many, posted = lib.ATOLL_DOZE_MESSAGES, ffi.new("struct atoll_descriptor *", {"flags": lib.ATOLL_FLAG_POSTED})
    urgent, taken = ffi.new("struct atoll_descriptor *"), ffi.new("struct atoll_descriptor *")
    with instance({A: [B], B: []}, entries=256) as made:
        made.map_all(writable=A)
        physmap.map_arena(B, made.writable_fds[B], made.bytes[B], writable=True)
        header, eventfd = physmap.header(B), os.eventfd(0, os.EFD_NONBLOCK)
        header.wake_kind, header.eventfd = lib.ATOLL_WAKE_EVENTFD, eventfd
        sender, dozer = made.open(A, 1), made.open(B, 1)

        def woken() -> bool:
            try:
                return os.eventfd_read(eventfd) > 0
            except BlockingIOError:
                return False

        def send(message: Any, put: Callable[[Any, int, Any], bool]) -> bool:
            header.sleeping = 2
            assert put(sender, B, message)
            lib.atoll_domain_commit(sender)
            header.sleeping = 0
            return woken()

        def take(count: int) -> None:
            assert all(lib.atoll_domain_take(dozer, A, taken) for _ in range(count))
            lib.atoll_domain_commit(dozer)

        for number in range(1, 2 * many):
            assert send(posted, lib.atoll_domain_put_unhurried) == (number >= many), number
        assert lib.atoll_domain_doze(dozer, 1 << A, 60_000_000_000) == 1, "so many wait that it does not sleep at all"
        take(many)
        assert lib.atoll_domain_doze(dozer, 1 << A, 1_000_000) == 0
        assert send(posted, lib.atoll_domain_put), "in a hurry"
        take(many)
        assert not send(posted, lib.atoll_domain_put_unhurried)
        assert send(urgent, lib.atoll_domain_put)
        assert lib.atoll_domain_doze(dozer, 1 << A, 60_000_000_000) == 1, "one of them cannot wait"
        take(2)
        assert lib.atoll_domain_doze(dozer, 1 << A, 1_000_000) == 0 and header.sleeping == 0
        zero = {"opcode": lib.ATOLL_OP_ZERO, "flags": lib.ATOLL_FLAG_NO_HOLE}  # whose flag is the same bit
        assert lib.atoll_domain_put(sender, B, ffi.new("struct atoll_descriptor *", zero))
        lib.atoll_domain_commit(sender)
        assert not woken() and lib.atoll_domain_doze(dozer, 1 << A, 1_000_000) == 1, "it came while the dozer was awake"
        take(1)

        # Without a descriptor for its epoll set it looks again after a moment, and does not spin.
        poor, limits = made.open(B, 2), resource.getrlimit(resource.RLIMIT_NOFILE)
        assert send(posted, lib.atoll_domain_put_unhurried) is False
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            before = time.monotonic_ns()
            assert lib.atoll_domain_doze(poor, 1 << A, 60_000_000_000) == 1
            assert time.monotonic_ns() - before >= 1_000_000
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(eventfd)


def test_a_peer_is_woken_by_its_eventfd_but_nothing_else_is_written_to(tmp_path: Path) -> None:
    """A damaged header that names a descriptor of ours does no harm."""
    with instance({A: [B], B: []}) as made:
        made.map_all(writable=A)
        physmap.map_arena(B, made.writable_fds[B], made.bytes[B], writable=True)
        header = physmap.header(B)
        eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        file = os.open(tmp_path / "device", os.O_CREAT | os.O_RDWR)
        header.wake_kind, header.sleeping = lib.ATOLL_WAKE_EVENTFD, 1
        for fd in (eventfd, file, 9999, -5):
            header.eventfd = fd
            domain = made.open(A, 1)
            header.eventfd = file  # later damage does no harm either
            assert lib.atoll_domain_put(domain, B, ffi.new("struct atoll_descriptor *", {"opcode": 3}))
            lib.atoll_domain_commit(domain)
        assert os.eventfd_read(eventfd) == 1
        assert os.fstat(file).st_size == 0
        os.close(eventfd)
        os.close(file)


def test_an_arena_of_another_layout_is_refused() -> None:
    with instance({A: [B], B: []}) as made:
        made.map_all(writable=A)
        physmap.header(A).layout_version = 77
        domain, error, sizes = ffi.new("struct atoll_domain *"), ffi.new("char[256]"), ffi.new("uint64_t[16]")
        sizes[A], sizes[Role.KERNEL] = made.bytes[A], made.bytes[Role.KERNEL]
        assert lib.atoll_domain_open(domain, A, 1, os.getpid(), 0, sizes, error) < 0
        assert b"layout version 77" in ffi.string(error)
