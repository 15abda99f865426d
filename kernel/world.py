"""All that outlives every other process: made by init before it forks, inherited by all, the same for the whole run.

- `build(config, directory)` -> `World`
- `World.close(keep)`   removes the shared objects (all, or all but those that hold acknowledged writes)

What is made: arenas and lock pages (POSIX shared memory), eventfds, io_urings, promotion channels, channels between
init, zygote and kernel, the control socket, the listeners, the device, the CPU latency request.

After a crash of everybody: if the last run did not come to a clean end and left the arenas of nic and dedup, these two
are *adopted*: kept with all they hold and with the sizes that every role had; rolled back to their last commit, their
rings emptied, since peers, sockets and clients are gone. Everything else is made anew, so that what the dead still have
under way lands in memory that nobody uses.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.ipc import objects, physmap, rolelock, uring
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.runtime import Listener
from atoll.kernel import device as devices
from atoll.kernel import lastrun, placement, process, records, table
from atoll.kernel import listeners as sockets
from atoll.kernel.instance import EXIT_CONFIG, BootError, Directory, Record, boot_id
from atoll.kernel.lastrun import LAYOUT_VERSION
from atoll.kernel.latency import Request
from atoll.kernel.offline import left_in_memory

log = logging.getLogger("atoll")

CONTROL_SOCKET = "control.sock"
_SUSPECTS_OFFSET = 12288  # ipc/layout.h


@dataclass(frozen=True, slots=True)
class Arena:
    """Sizes of a role's arena in bytes, as init planned them: never read back from shared memory."""

    arena_bytes: int
    role_bytes: int
    buffer_bytes: int


@dataclass(slots=True)
class World:
    """Descriptors keep their numbers in all processes."""

    config: dict[str, Any]
    directory: Directory
    instance: int
    adopted: bool
    arenas: dict[str, Arena]
    record: Record
    init_pid: int
    slice_ns: int  # init's, an ordinary process's; 0 where Linux does not tell
    started_ns: int
    zygote_starts: int = 0  # counted by init, told by the zygote
    eventfds: dict[str, int] = field(default_factory=dict)
    urings: dict[str, uring.UringHandle] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)
    promotion: dict[str, tuple[socket.socket, socket.socket]] = field(default_factory=dict)  # kernel's end, standby's
    listeners: list[Listener] = field(default_factory=list)
    device: devices.Device | None = None
    fast_device: devices.Device | None = None
    fast_error: str = ""  # why there is no fast device although one is configured
    latency: Request = field(default_factory=Request)
    zygote_channel: tuple[socket.socket, socket.socket] | None = None  # kernel's end, zygote's
    init_channel: tuple[socket.socket, socket.socket] | None = None  # init's end, kernel's
    control: socket.socket | None = None

    def device_of(self, role: str) -> devices.Device | None:
        return {"disk": self.device, "llrrm": self.fast_device}.get(role)

    def arena_bytes(self) -> dict[int, int]:
        return {table.ROLES[name].number: arena.arena_bytes for name, arena in self.arenas.items()}

    def close(self, keep: Iterable[str] = ()) -> None:
        """Removes the shared objects but the arenas of the roles in `keep`, and the Unix sockets."""
        kept = {objects.arena_name(self.instance, role) for role in keep}
        for name in objects.list_objects(self.instance):
            if name not in kept:
                objects.unlink(name)
        paths = [listener.address for listener in self.listeners if listener.kind == "unix"]
        paths = [path for path in paths if path in self.config["unix"]]  # not those that were handed over
        if self.control is not None:
            paths.append(str(self.directory.path / CONTROL_SOCKET))
        for path in paths:
            try:
                Path(path).unlink()
            except OSError:
                pass


def build(config: dict[str, Any], directory: Directory) -> World:
    """Makes everything. Raises BootError, with what was made removed again."""
    device = devices.open_device(config)
    config["dedup"]["track_bytes"] = config["dedup"].get("track_bytes") or devices.track_bytes(device)
    listeners = sockets.open_all(config)
    last = Record.read(directory.path)
    adoptable = last is not None and _adoptable(last)
    if last is not None:
        _remove_stale(last, keep=table.KEPT if adoptable else ())
    if adoptable and last is not None:
        _keep_to(last, device, config)
    fast, fast_error = _fast_device(config, device, last if adoptable else None)
    table.select(fast=fast is not None or (adoptable and last is not None and "llrrm" in last.arenas))
    config["device_quarantine"] = adoptable and not devices.wait_until_idle(device)
    config["grow"] = not adoptable and directory.grow_wanted

    placement.check(config)
    engines, urings = _engines(config)
    if adoptable:
        assert last is not None
        instance = last.instance
        arenas = {
            name: Arena(each["bytes"], each["role_bytes"], each["buffer_bytes"]) for name, each in last.arenas.items()
        }
    else:
        instance = secrets.randbits(63) | 1
        arenas = {name: _plan(role, config) for name, role in table.ROLES.items()}
    placement.choose(config, instance)
    record = Record(
        instance=instance,
        pid=os.getpid(),
        start_time=process.start_time(os.getpid()),
        boot_id=boot_id(),
        layout_version=LAYOUT_VERSION,
        device_bytes=config["device_bytes"],
        device=device.identity,
        device_path=str(Path(device.path).absolute()),
        sections={role.name: dict(config[role.name]) for role in table.DOMAINS},
        served=adoptable,
        arenas={
            name: {"bytes": each.arena_bytes, "role_bytes": each.role_bytes, "buffer_bytes": each.buffer_bytes}
            for name, each in arenas.items()
        },
    )
    world = World(
        config=config,
        directory=directory,
        instance=instance,
        adopted=adoptable,
        arenas=arenas,
        record=record,
        init_pid=os.getpid(),
        slice_ns=process.slice_ns(0),
        started_ns=time.monotonic_ns(),
        urings=urings,
        engines=engines,
        listeners=listeners,
        device=device,
        fast_device=fast,
        fast_error=fast_error,
        latency=Request.open(config),
    )
    if world.latency.error:
        log.info("idle processors are not kept awake for clients (kernel.cpu_latency_us): %s", world.latency.error)
    try:
        record.write(directory.path)  # before the first object exists: the next start finds all of them by it
    except OSError as error:
        world.close(keep=table.KEPT)
        raise BootError(f"{directory.path / 'instance.json'} cannot be written: {error.strerror}") from None
    try:
        _make_descriptors(world)
        _make_objects(world)
        _register_sources(world)
    except (objects.ObjectError, OSError) as error:
        if not adoptable:
            _give_up(world)
        raise BootError(str(error)) from None
    if adoptable:
        log.info(
            "the last run ended without a stop: its write log and tables are taken over, nothing acknowledged is lost"
        )
    return world


def _give_up(world: World) -> None:
    """Removes what was made. What cannot be done of that must not hide why: the next start finds it by the record."""
    try:
        world.close()
        world.record.clean = True
        world.record.write(world.directory.path)
    except (objects.ObjectError, OSError) as error:
        log.error("%s: what was made is not wholly removed: %s", world.directory.path, error)


def _fast_device(
    config: dict[str, Any], main: devices.Device, adopted: Record | None
) -> tuple[devices.Device | None, str]:
    """The fast device, or why there is none: the service does without. Roles and rings are as in the adopted run."""
    present = None if adopted is None else "llrrm" in adopted.arenas
    device: devices.Device | None = None
    why = ""
    configured = bool(config.get("fast_device"))
    if configured and present is not False:
        try:
            device = devices.open_fast_device(config)
        except BootError as error:
            why = f"no fast tier until the next start: {error}"
        if device is not None and device.identity == main.identity:
            os.close(device.fd)
            why = f"no fast tier until the next start: device {device.path} is the main device"
            device = None
        if device is not None:
            try:
                devices.claim(device)
            except BootError as error:
                os.close(device.fd)
                why = f"no fast tier until the next start: {error}"
                device = None
    elif configured:
        why = "no fast tier until the next orderly stop and start: the last run, which is taken over, had none"
    if device is None:
        config["fast_device_bytes"] = 0
    if why:
        log.warning("%s", why)
    return device, why


# --- The last run ---------------------------------------------------------------------------------------------------


def _adoptable(last: Record) -> bool:
    """True if the last run left acknowledged writes in shared memory and all of it is there; says so if not all is.
    Raises BootError if all of it is there and only another release can read it."""
    if last.clean:
        return False
    if lastrun.there(last):
        if last.layout_version != LAYOUT_VERSION:
            raise BootError(left_in_memory(last))
        served = lastrun.served(last)
        if served is not None:
            return served
    if not last.served:
        return False
    if last.boot_id != boot_id():
        reason = "the machine was restarted"
    else:
        reason = "its shared memory is gone"
    log.warning(
        "the last run ended without a stop and %s: writes that were acknowledged but not flushed are lost,"
        " what was flushed is there",
        reason,
    )
    return False


# What a start that adopts arenas may have otherwise.
_FREE = ("engine", "pin_arenas")


def _keep_to(last: Record, device: devices.Device, config: dict[str, Any]) -> None:
    """The tables in shared memory were made for one device and one set of sizes: these are kept to."""
    if last.device != device.identity or device.size_bytes < last.device_bytes:
        raise BootError(
            f"device {device.path}: not the one of the last run, or smaller than it was, and acknowledged writes for"
            " that one are still in shared memory: start with the old one, stop in order, then change"
        )
    config["device_bytes"] = last.device_bytes
    for name, section in last.sections.items():
        kept = {key: value for key, value in section.items() if key in config[name] and key not in _FREE}
        if any(config[name][key] != value for key, value in kept.items()):
            log.warning("%s: what has changed in its configuration takes effect after the next orderly stop", name)
        config[name].update(kept)


def _remove_stale(last: Record, keep: Iterable[str]) -> None:
    kept = {objects.arena_name(last.instance, role) for role in keep}
    for name in objects.list_objects(last.instance):
        if name not in kept:
            objects.unlink(name)


# --- Making ---------------------------------------------------------------------------------------------------------


def _engines(config: dict[str, Any]) -> tuple[dict[str, str], dict[str, uring.UringHandle]]:
    """Which engine each driver uses, and the io_urings of those that use one. Fills the engines into `config`."""
    engines: dict[str, str] = {}
    handles: dict[str, uring.UringHandle] = {}
    fallbacks = {"nic": "sockets", "disk": "threads", "llrrm": "threads"}
    meaning = {
        "nic": "a kill of nic drops its connections",
        "disk": "reads and writes go through threads",
        "llrrm": "its reads and writes go through threads",
    }
    for name, role in table.ROLES.items():
        if table.URING not in role.rights:
            continue
        wanted = config[name]["engine"]
        engine = wanted
        if wanted in ("auto", "io_uring"):
            try:
                if table.DEVICE in role.rights:
                    handles[name] = uring.create_storage(role.uring_entries, 4 * role.uring_entries)
                else:
                    handles[name] = uring.create(role.uring_entries, 4 * role.uring_entries, role.uring_files)
                engine = "io_uring"
            except OSError as error:
                if wanted == "io_uring":
                    raise BootError(f"{name}.engine is io_uring, which cannot be used here: {error.strerror}") from None
                engine = fallbacks[name]
                log.warning("%s: no io_uring here (%s): %s", name, error.strerror, meaning[name])
        engines[name] = config[name]["engine"] = engine
    return engines, handles


def _plan(role: table.Role, config: dict[str, Any]) -> Arena:
    if role is table.KERNEL:
        role_bytes, buffer_bytes = records.AREA_BYTES, 0
    else:
        try:
            module = table.module_of(role, config)
            of_device = (role.name,) if table.DEVICE in role.rights else ()
            role_bytes, buffer_bytes = module.plan(config, *of_device)
        except ValueError as error:
            raise BootError(str(error), EXIT_CONFIG) from None
        except AttributeError as error:
            if role.name not in config["testing"]["modules"]:
                raise
            raise BootError(f"testing.modules.{role.name}: {error}", EXIT_CONFIG) from None
    arena_bytes = lib.atoll_arena_size(table.rings_mask(role), table.ring_entries(role), role_bytes, buffer_bytes)
    return Arena(int(arena_bytes), int(role_bytes), int(buffer_bytes))


def _make_descriptors(world: World) -> None:
    for name, role in table.ROLES.items():
        if role.wake == "eventfd":
            world.eventfds[name] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        if role.module:
            world.promotion[name] = _channel()
    world.zygote_channel = _channel()
    world.init_channel = _channel()
    path = str(world.directory.path / CONTROL_SOCKET)
    # The lock of the directory is ours: whoever listened here is dead.
    try:
        Path(path).unlink()
    except FileNotFoundError:
        pass
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    folder = os.open(world.directory.path, os.O_PATH | os.O_DIRECTORY)
    try:
        control.bind(f"/proc/self/fd/{folder}/{CONTROL_SOCKET}")  # a socket's path is short, a directory's need not be
    finally:
        os.close(folder)
        os.umask(previous)
    control.listen(64)
    control.setblocking(False)
    world.control = control


def _channel() -> tuple[socket.socket, socket.socket]:
    """Messages keep their boundaries; what is sent while nobody reads is there for the next one who does."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return one, other


def _check_room(arenas: Mapping[str, Arena]) -> None:
    """All of them before the first: who is told of one alone finds the next one too large afterwards."""
    wanted, available = sum(arena.arena_bytes for arena in arenas.values()), objects.available()
    if available is None or wanted <= available:
        return
    each = [
        f"{name} {_mebibytes(arena.arena_bytes)} ({', '.join(table.ROLES[name].sized_by)})"
        for name, arena in sorted(arenas.items(), key=lambda item: -item[1].arena_bytes)
        if table.ROLES[name].sized_by
    ]
    raise objects.ObjectError(
        f"{objects.FOLDER} is too small: {_mebibytes(wanted)} are needed, {available >> 20} MiB are available; give"
        f" it more (containers: --shm-size), or let less be needed: {', '.join(each)}"
    )


def _mebibytes(size_bytes: int) -> str:
    return f"{-(-size_bytes >> 20)} MiB"


def _make_objects(world: World) -> None:
    made = {name: each for name, each in world.arenas.items() if not (world.adopted and name in table.KEPT)}
    _check_room(made)
    for name, arena in made.items():
        role = table.ROLES[name]
        descriptor = objects.create(objects.arena_name(world.instance, name), arena.arena_bytes)
        try:
            physmap.map_arena(role.number, descriptor, arena.arena_bytes, writable=True)
            lib.atoll_arena_format(
                physmap.header(role.number),
                role.number,
                world.instance,
                arena.arena_bytes,
                table.rings_mask(role),
                table.ring_entries(role),
                arena.role_bytes,
                arena.buffer_bytes,
                _wake_kind(role),
                world.eventfds.get(name, -1),
            )
            physmap.unmap_arena(role.number)
        finally:
            os.close(descriptor)
    for name in table.ROLES:
        lock_name = objects.lock_name(world.instance, name)
        descriptor = objects.create(lock_name, objects.LOCK_BYTES)
        try:
            rolelock.format_lock(descriptor)
        finally:
            os.close(descriptor)
    if world.adopted:
        for name in table.KEPT:
            _adopt_in_child(world, table.ROLES[name])


def _register_sources(world: World) -> None:
    """What is written to a device lies in these arenas. Their pages, all allocated already, are pinned from here on.

    Without the right to that, or on an older system, each write pins its pages for itself, which takes longer.
    """
    rings = {
        name: ring
        for name, ring in world.urings.items()
        if table.DEVICE in table.ROLES[name].rights and world.config[name]["pin_arenas"]
    }
    for name in table.WRITTEN if rings else ():
        if name not in table.ROLES:
            continue
        number, size = table.ROLES[name].number, world.arenas[name].arena_bytes
        descriptor = objects.open_writable(objects.arena_name(world.instance, name))
        try:
            physmap.map_arena(number, descriptor, size, writable=True)
            for driver, ring in list(rings.items()):
                try:
                    ring.register_source(number, size)
                except uring.UringError as error:
                    log.info("%s: each write pins its pages by itself: %s", driver, error.strerror)
                    del rings[driver]
            physmap.unmap_arena(number)
        finally:
            os.close(descriptor)


def _wake_kind(role: table.Role) -> int:
    return int(lib.ATOLL_WAKE_EVENTFD if role.wake == "eventfd" else lib.ATOLL_WAKE_FUTEX)


def _adopt_in_child(world: World, role: table.Role) -> None:
    """What lies in an old arena is not trusted to leave init alive: a child does it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _adopt(world, role)
            status = 0
        except BaseException as error:
            log.error("arena of %s: %s", role.name, error)
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise OSError(
            f"the arena of {role.name} cannot be taken over ({process.describe(status)}): it stays where it is;"
            f" to start without what it holds, remove {world.directory.path / 'instance.json'}"
        )


def _adopt(world: World, role: table.Role) -> None:
    """Rolls an old arena back to its last commit and empties its rings. Harmless if done twice."""
    arena = world.arenas[role.name]
    descriptor = objects.open_writable(objects.arena_name(world.instance, role.name))
    physmap.map_arena(role.number, descriptor, arena.arena_bytes, writable=True)
    header = physmap.header(role.number)
    # Requests of clients that are gone crash nobody any more, and their identities will be used again.
    ffi.memmove(ffi.cast("char *", header) + _SUSPECTS_OFFSET, bytes(4096), 4096)
    result = lib.atoll_arena_adopt(
        role.number,
        world.instance,
        arena.arena_bytes,
        table.rings_mask(role),
        table.ring_entries(role),
        arena.role_bytes,
        arena.buffer_bytes,
        _wake_kind(role),
        world.eventfds.get(role.name, -1),
    )
    if result != 0:
        raise ValueError(f"its layout is not this program's: {os.strerror(-result)}")
