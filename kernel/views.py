"""What the kernel reads of the domains, through the read-only map: volumes, counters, trace records, rows of `ps`.

All of it was written by others: copied, checked, then used. Nothing here changes anything.
"""

import time
from typing import Any

import psutil

from atoll.ipc import physmap
from atoll.ipc._ipc import ffi, lib
from atoll.kernel import process, table
from atoll.kernel.life import Life, Phase
from atoll.kernel.listeners import uris
from atoll.kernel.process import Process
from atoll.kernel.world import World

COUNTERS_OFFSET = 8192  # ipc/layout.h
TRACE_OFFSET = 16384
RECORD_BYTES = 64
TRIES = 1000


def role_area(world: World, name: str, size: int) -> int:
    """Address of the role area; ValueError if `size` bytes do not lie in the arena there."""
    number, arena = table.ROLES[name].number, world.arenas[name]
    offset = int(physmap.header(number).role_offset)
    if not 0 < offset <= arena.arena_bytes - size:
        raise ValueError(f"role area of {name} at {offset} does not fit its arena")
    return physmap.address(number) + offset


def volumes(world: World) -> list[dict[str, Any]]:
    """The volumes as dedup publishes them, by id."""
    size = ffi.sizeof("struct atoll_dedup_public")
    public = ffi.cast("struct atoll_dedup_public *", role_area(world, "dedup", size))
    uses = connections_by_volume(world)
    found = []
    for index in range(int(lib.ATOLL_VOLUME_COUNT)):
        entry = _copy_volume(public, index)
        if entry is None or entry.state != lib.ATOLL_VOLUME_READY:
            continue
        length = min(int(entry.name_bytes), int(lib.ATOLL_VOLUME_NAME_BYTES))
        name = bytes(ffi.buffer(entry.name, length)).decode(errors="replace")
        found.append(
            {
                "id": index,
                "name": name,
                "size_bytes": int(entry.size_bytes),
                "mapped_bytes": int(entry.mapped_blocks) * int(lib.ATOLL_BLOCK_BYTES),
                "read_only": bool(entry.flags & lib.ATOLL_VOLUME_READONLY),
                "generation": int(entry.generation),
                "threshold": int(entry.threshold),
                "tier_threshold": int(entry.tier_threshold),
                "created_s": int(entry.created_s),
                "connections": uses.get(index, 0),
                "uris": uris(world.listeners, name),
            }
        )
    return found


def _copy_volume(public: Any, index: int) -> Any:
    """A consistent copy of an entry of the table; None while it is being changed all the time."""
    shared = public.volumes[index]
    if shared.state == lib.ATOLL_VOLUME_FREE:
        return None
    copy = ffi.new("struct atoll_volume *")
    for _ in range(TRIES):
        version = int(shared.version)
        if version % 2 == 0:
            ffi.memmove(copy, ffi.addressof(public.volumes, index), ffi.sizeof("struct atoll_volume"))
            if int(shared.version) == version:
                return copy
    return None


def connections_by_volume(world: World) -> dict[int, int]:
    count = int(lib.ATOLL_CONNECTION_COUNT)
    public = ffi.cast("struct atoll_nbd_public *", role_area(world, "nbd", ffi.sizeof("struct atoll_nbd_public")))
    uses: dict[int, int] = {}
    for number in ffi.unpack(public.volume, count):
        if number:
            uses[number - 1] = uses.get(number - 1, 0) + 1
    return uses


def counters(world: World) -> dict[str, dict[str, int]]:
    """Role → name → value."""
    found = {}
    for role in table.DOMAINS:
        names = tuple(table.module_of(role, world.config).COUNTERS)[: int(lib.ATOLL_COUNTER_COUNT)]
        words = ffi.cast("uint64_t *", physmap.address(role.number) + COUNTERS_OFFSET)
        found[role.name] = {name: int(words[index]) for index, name in enumerate(names)}
    return found


def trace_position(name: str) -> int:
    return int(physmap.header(table.ROLES[name].number).trace_next)


def trace_records(name: str, since: int) -> bytes:
    """The domain's trace records from number `since` on, oldest first, as far as still there (64 bytes each)."""
    number, entries = table.ROLES[name].number, int(lib.ATOLL_TRACE_ENTRIES)
    end = trace_position(name)
    first = max(since, end - entries) if 0 <= since <= end else max(0, end - entries)
    memory = ffi.buffer(ffi.cast("char *", physmap.address(number) + TRACE_OFFSET), entries * RECORD_BYTES)
    return b"".join(
        memory[index % entries * RECORD_BYTES : (index % entries + 1) * RECORD_BYTES] for index in range(first, end)
    )


# --- ps -------------------------------------------------------------------------------------------------------------


def state_of(life: Life, may_start: bool) -> str:
    if life.phase is Phase.EMPTY:
        if life.reason:
            return "failed"
        return "waiting" if not may_start or time.monotonic_ns() < life.not_before_ns else "starting"
    return {
        Phase.PROMOTING: "starting",
        Phase.RECOVERING: "recovering",
        Phase.SERVING: "serving",
        Phase.DYING: "dying",
        Phase.STOPPED: "stopped",
    }[life.phase]


def domain_row(life: Life, may_start: bool) -> dict[str, Any]:
    pid = life.active.pid if life.active is not None else None
    return {
        "role": life.role.name,
        "pid": pid,
        "incarnation": life.incarnation,
        "state": state_of(life, may_start),
        "standby_pid": life.standby.pid if life.standby is not None else None,
        "restarts": life.restarts,
        "reason": life.reason or None,
        **usage(pid),
    }


def process_row(role: str, found: Process | None, incarnation: int, restarts: int) -> dict[str, Any]:
    """Of init, kernel or zygote, which have no standby."""
    pid = found.pid if found is not None else None
    return {
        "role": role,
        "pid": pid,
        "incarnation": incarnation,
        "state": "serving" if pid is not None else "starting",
        "standby_pid": None,
        "restarts": restarts,
        "reason": None,
        **usage(pid),
    }


def usage(pid: int | None) -> dict[str, Any]:
    """Uptime, CPU and memory of a process; None where it is gone."""
    if pid is not None:
        try:
            its = psutil.Process(pid)
            with its.oneshot():
                memory, cpu = its.memory_info(), its.cpu_times()
                return {
                    "uptime_s": round(max(0.0, time.time() - its.create_time()), 3),
                    "cpu_s": round(cpu.user + cpu.system, 3),
                    "resident_bytes": memory.rss,
                    "shared_bytes": memory.shared,
                    "cpu_affinity": sorted(its.cpu_affinity()),
                }
        except psutil.Error:
            pass
    return {"uptime_s": None, "cpu_s": None, "resident_bytes": None, "shared_bytes": None, "cpu_affinity": None}


def this_process(pid: int) -> Process | None:
    """For a row of `ps`; holds nothing open."""
    found = Process.open(pid, process.start_time(pid))
    if found is not None:
        found.close()
    return found
