"""The kernel process: supervisor, control socket and the service's start and stop, on one loop.

- `run(world)`   never returns

It is never on the data path: while it is dead, data flows on. After a crash: init forks the next one within a few
milliseconds, which takes the kernel's own role lock, finds its predecessor's records in the arena (records.py), and
adopts what runs (supervisor.py).
"""

import logging
import os
from typing import Any, NoReturn

from atoll.ipc import objects, physmap, rolelock
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.calls import CallClient
from atoll.ipc.crashpoint import crash_point
from atoll.kernel import messages, process, table
from atoll.kernel.calls import Calls
from atoll.kernel.control import Server
from atoll.kernel.loop import Loop
from atoll.kernel.records import Rows
from atoll.kernel.service import Service
from atoll.kernel.supervisor import Supervisor
from atoll.kernel.verbs import Verbs
from atoll.kernel.world import World

log = logging.getLogger("atoll.kernel")

KERNEL = table.KERNEL.number
LOCK_WAIT_S = 5.0


def run(world: World) -> NoReturn:
    process.name_this("atoll-kernel")
    process.die_with_parent(world.init_pid)
    process.come_first(threads=True)  # the one that waits for deaths
    domain = _become_kernel(world)
    header = domain.self
    rows = Rows(ffi.cast("char *", header) + header.role_offset)
    assert world.init_channel is not None and world.control is not None
    init = world.init_channel[1]

    def tell_init(message: dict[str, Any]) -> None:
        if not messages.send(init, message):
            log.error("init does not read: %r is lost", message)

    def from_init() -> None:
        while (received := messages.receive(init)) is not None:
            message, _ = received
            if "ended" in message:
                supervisor.note_ended(message["ended"], message["status"])
            elif "stop" in message:
                crash_point(domain, "kernel.stop.before")
                service.stop(message["stop"])

    def on_wake() -> None:
        calls.poll()
        supervisor.look_around()

    def expire_calls() -> None:
        due = calls.expire()
        now = lib.atoll_now_ns()
        loop.at(now + 500_000_000 if due is None else max(due, now + 100_000_000), expire_calls)

    loop = Loop(domain, world.eventfds["kernel"], on_wake, from_init)
    calls = Calls(CallClient(domain), lambda role, message: _event(world, role, message))
    supervisor = Supervisor(loop, world, domain, rows, calls)
    service = Service(world, supervisor, calls, rows, tell_init)
    verbs = Verbs(world, domain, supervisor, calls, service)
    server = Server(loop, world.control, verbs.answer)
    loop.add(init.fileno(), from_init)
    lib.atoll_domain_serving(domain)
    supervisor.adopt()
    service.begin()
    supervisor.check_hangs()
    expire_calls()
    if domain.incarnation > 1:
        log.warning("incarnation %d took over", domain.incarnation)
    loop.run()
    server.flush()
    os._exit(0)


def _become_kernel(world: World) -> Any:
    """Takes the kernel's role: its lock, its own arena writable, all others read-only. struct atoll_domain *."""
    lock_fd = objects.open_writable(objects.lock_name(world.instance, "kernel"))
    physmap.map_lock(KERNEL, lock_fd, writable=True)
    os.close(lock_fd)
    rolelock.acquire(KERNEL, timeout=LOCK_WAIT_S)
    for name, arena in world.arenas.items():
        number, own = table.ROLES[name].number, name == "kernel"
        arena_name = objects.arena_name(world.instance, name)
        descriptor = objects.open_writable(arena_name) if own else objects.open_read_only(arena_name)
        physmap.map_arena(number, descriptor, arena.arena_bytes, writable=own)
        os.close(descriptor)
        if not own:
            descriptor = objects.open_read_only(objects.lock_name(world.instance, name))
            physmap.map_lock(number, descriptor)
            os.close(descriptor)
    sizes = ffi.new("uint64_t[16]")
    for number, size in world.arena_bytes().items():
        sizes[number] = size
    domain, error = ffi.new("struct atoll_domain *"), ffi.new("char[256]")
    incarnation = int(physmap.header(KERNEL).incarnation) + 1
    pid = os.getpid()
    if lib.atoll_domain_open(domain, KERNEL, incarnation, pid, process.start_time(pid), sizes, error) != 0:
        raise RuntimeError(ffi.string(error).decode(errors="replace"))
    return domain


def _event(world: World, role: str, message: dict[str, Any]) -> None:
    """What a domain wants known: a line in the log; the result of a scrub is kept beyond the run."""
    name = message.pop("event", "?")
    if name == "scrub-ended":
        world.directory.keep_scrub(message)
        return
    log.warning("%s: %s%s", role, name, "".join(f", {key} {value}" for key, value in message.items()))
