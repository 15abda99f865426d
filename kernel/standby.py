"""A standby: a process that waits to be the next incarnation of its role, and then is it.

- `run(world, role_name)`   never returns: waits, takes over, plays the role, ends

It closes what the role has no right to, waits for the one message that is meant for it, takes the role lock (and ends
if somebody alive holds it), maps the role's arena writable, and calls the role's module.

After a crash before the lock is taken: nothing has happened, the kernel sends another. After it: the next incarnation
finds the arena as at the last commit.
"""

import faulthandler
import logging
import os
import signal
import time
from typing import Any, NoReturn

from atoll.ipc import physmap, rolelock
from atoll.ipc._ipc import ffi
from atoll.ipc.runtime import Context
from atoll.kernel import messages, placement, process, table
from atoll.kernel.world import World

log = logging.getLogger("atoll")

EXIT_NOT_NEEDED = 75  # somebody alive plays the role
EXIT_CRASHED = 70  # an exception of the role's own

# Arenas of at most so many bytes before their buffers get their page tables beforehand.
POPULATE_BYTES_MAX = 32 << 20
LOCK_WAIT_S = 0.05


def run(world: World, role_name: str) -> NoReturn:
    status = EXIT_CRASHED
    role = table.ROLES[role_name]
    try:
        _become_child_of_init(world)
        process.name_this(f"atoll-{role_name}+")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        channel = world.promotion[role_name][1]
        _close_all_but(_rights(world, role))
        faulthandler.enable()
        for name, arena in world.arenas.items():
            if name != role_name and arena.arena_bytes - arena.buffer_bytes <= POPULATE_BYTES_MAX:
                physmap.populate(table.ROLES[name].number)
        context = _prepared(world, role)
        started = process.start_time(os.getpid())
        context.processors = placement.usable(world.config, os.sched_getaffinity(0))
        placement.settle(world.config, role_name)
        process.come_first()  # until it serves: the kernel takes it back
        order, descriptors = _wait(channel)
        if order["fresh"]:
            # Nobody waits yet, and a store may be long in loading.
            process.be_ordinary(0, role.slice_ns(world.slice_ns))
        status = _play(world, role, context, started, order, descriptors)
    except messages.EndOfChannel:
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else EXIT_CRASHED
    except BaseException:
        log.exception("%s: process %d ends", role_name, os.getpid())
    finally:
        logging.shutdown()
        os._exit(status)


def _become_child_of_init(world: World) -> None:
    """The process in between is about to end; only then does dying with the parent mean dying with init."""
    deadline = time.monotonic() + 5
    while os.getppid() != world.init_pid:
        init = process.look(world.init_pid)
        if init is None or init.gone or time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0002)
    process.die_with_parent(world.init_pid)


def _rights(world: World, role: table.Role) -> set[int]:
    """Descriptors that a process in the role may hold."""
    held = {0, 1, 2, world.directory.lock_fd, world.promotion[role.name][1].fileno()}
    held |= set(world.eventfds.values())  # to wake its peers
    if table.LISTENERS in role.rights:
        held |= {listener.fd for listener in world.listeners}
    device = world.device_of(role.name)
    if table.DEVICE in role.rights and device is not None:
        held.add(device.fd)
    if table.URING in role.rights and role.name in world.urings:
        held.add(world.urings[role.name].fd)
    if table.LATENCY in role.rights and world.latency.fd >= 0:
        held.add(world.latency.fd)
    return held


def _close_all_but(kept: set[int]) -> None:
    last = -1
    for descriptor in sorted(kept):
        if descriptor > last + 1:  # Python 3.11 takes an empty range for an endless one
            os.closerange(last + 1, descriptor)
        last = descriptor
    os.closerange(last + 1, 1 << 20)


def _wait(channel: Any) -> tuple[dict[str, Any], list[int]]:
    """The promotion that is meant for this process."""
    pid = os.getpid()
    own_start_time = process.start_time(pid)
    while True:
        received = messages.receive(channel, wait=True)
        assert received is not None
        order, descriptors = received
        if order.get("pid") == pid and order.get("start_time") == own_start_time and len(descriptors) == 2:
            return order, descriptors
        messages.close_all(descriptors)


def _prepared(world: World, role: table.Role) -> Context:
    """All that is known beforehand: what a forked process touches first it copies, and then a client waits."""
    device = world.device_of(role.name)
    return Context(
        role=role.name,
        incarnation=0,
        fresh=False,
        adopted=False,
        previous_signal=0,
        config=world.config,
        arena_bytes=world.arena_bytes(),
        listeners=world.listeners if table.LISTENERS in role.rights else [],
        device_fd=device.fd if table.DEVICE in role.rights and device is not None else -1,
        uring=world.urings.get(role.name),
        latency_fd=world.latency.fd if table.LATENCY in role.rights else -1,
    )


def _play(
    world: World, role: table.Role, context: Context, started: int, order: dict[str, Any], descriptors: list[int]
) -> int:
    arena_fd, lock_fd = descriptors
    number = role.number
    physmap.map_lock(number, lock_fd, writable=True)
    try:
        rolelock.acquire(number, timeout=LOCK_WAIT_S)
    except rolelock.LockError as error:
        log.warning("%s: process %d was promoted, but the role is played already (%s)", role.name, os.getpid(), error)
        return EXIT_NOT_NEEDED
    # From here on nobody else writes to the arena.
    physmap.map_arena(number, arena_fd, world.arenas[role.name].arena_bytes, writable=True)
    messages.close_all(descriptors)
    process.name_this(f"atoll-{role.name}")
    # A predecessor may have served and died before the kernel saw it.
    fresh = bool(order["fresh"]) and physmap.header(number).serving_ns == 0
    half_made = fresh and physmap.header(number).incarnation != 0
    context.incarnation, context.fresh, context.adopted = order["incarnation"], fresh, order["adopted"]
    context.previous_signal = order["previous_signal"]
    context.open(os.getpid(), started)
    if half_made:
        _wipe(context.role_area, world.arenas[role.name].role_bytes)
    table.module_of(role, world.config).main(context)
    return _end(context, number)


def _wipe(address: int, size: int) -> None:
    """A predecessor died before the role had ever served: what it has half made is made again from zeros.

    The rings keep their indices: they are part of the common header, and consistent.
    """
    zeros = bytes(1 << 20)
    start = ffi.cast("char *", address)
    for offset in range(0, size, len(zeros)):
        ffi.memmove(start + offset, zeros, min(len(zeros), size - offset))


def _end(context: Context, number: int) -> int:
    """main() returned: on a stop that is an orderly end, else a failure."""
    if not context.stopping:
        log.error("%s: process %d returned without being asked to stop", context.role, os.getpid())
        return EXIT_CRASHED
    context.stopped()
    rolelock.release(number)
    return 0
