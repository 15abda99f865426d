"""THE table: what each role is, whom it sends to, what it may hold, in which order all start.

- `ROLES`             every role of the service, kernel included, by name; llrrm only where a fast device is configured:
- `select(fast)`      says so; init does, once, before it makes anything
- `DOMAINS`           those that are domains with a standby, in boot order
- `module_of(role, config)`, `threaded(role, config)`, `rings_mask(role)`, `ring_entries(role)`

Modules are strings: the kernel imports no driver and no service; zygote and init load them by name. `testing.modules`
of the configuration puts another module in a role's place.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from atoll.ipc._ipc import lib

DATA = int(lib.ATOLL_DATA_RING_ENTRIES)
STORAGE = int(lib.ATOLL_STORAGE_RING_ENTRIES)
CONTROL = int(lib.ATOLL_CONTROL_RING_ENTRIES)

# Rights: what a process in the role inherits besides its arena and the map.
LISTENERS = "listeners"  # the sockets on which clients arrive
DEVICE = "device"  # the descriptor of the storage device
URING = "uring"  # an io_uring of its own that outlives it
LATENCY = "latency"  # the descriptor of the CPU latency request


@dataclass(frozen=True, slots=True)
class Role:
    name: str
    number: int  # enum atoll_role
    rings_to: Mapping[str, int]  # role it sends to: entries of the ring
    wake: str  # "eventfd" or "futex"
    module: str = ""  # the package that plays it; empty: not a domain
    boot: int = 0  # place in the order of starting; stopping is the other way round
    rights: frozenset[str] = frozenset()
    threaded_engine: str = ""  # with this engine the process has threads: its lock alone does not tell that it is dead
    uring_entries: int = 0
    uring_files: int = 0  # entries of the io_uring's own file table
    optional: bool = False  # the service starts, goes on and stops without it
    turns: int = 1  # how often it is to run where others run once
    sized_by: tuple[str, ...] = ()  # keys of the configuration that make its arena larger or smaller

    def slice_ns(self, ordinary_ns: int) -> int:
        """The time slice for that many `turns`; 0: as everybody's, which is `ordinary_ns`.

        Domains on one processor give it to each other while they spin (ipc/spin.h), and who does that forfeits the rest
        of its time slice.
        """
        return ordinary_ns // self.turns if self.turns > 1 else 0


KERNEL = Role(
    "kernel",
    lib.ATOLL_ROLE_KERNEL,
    {"nic": CONTROL, "nbd": CONTROL, "dedup": CONTROL, "disk": CONTROL, "llrrm": CONTROL},
    wake="eventfd",
)

DISK = Role(
    "disk",
    lib.ATOLL_ROLE_DISK,
    {"kernel": CONTROL, "dedup": STORAGE},
    wake="eventfd",
    module="atoll.drivers.disk",
    boot=1,
    rights=frozenset({DEVICE, URING}),
    threaded_engine="threads",
    uring_entries=STORAGE,
    sized_by=("disk.cache_bytes",),
)

_ROWS = (
    KERNEL,
    DISK,
    # The same driver on another device.
    replace(DISK, name="llrrm", number=lib.ATOLL_ROLE_LLRRM, optional=True, sized_by=("llrrm.cache_bytes",)),
    Role(
        "dedup",
        lib.ATOLL_ROLE_DEDUP,
        {"kernel": CONTROL, "nbd": DATA, "nic": DATA, "disk": STORAGE, "llrrm": STORAGE},
        wake="eventfd",
        module="atoll.services.dedup",
        boot=2,
        turns=2,  # as many as nic: behind it, destage would fall back until writes had to wait for room in the log
        sized_by=(
            "dedup.metadata_cache_bytes",
            "dedup.merge_buffer_bytes",
            "dedup.fingerprint_entries",
            "dedup.tier_entries",
        ),
    ),
    Role(
        "nbd",
        lib.ATOLL_ROLE_NBD,
        {"kernel": CONTROL, "nic": DATA, "dedup": DATA},
        wake="eventfd",
        module="atoll.services.nbd",
        boot=3,
    ),
    Role(
        "nic",
        lib.ATOLL_ROLE_NIC,
        {"kernel": CONTROL, "nbd": DATA, "dedup": DATA},
        wake="eventfd",
        module="atoll.drivers.nic",
        boot=4,
        rights=frozenset({LISTENERS, URING, LATENCY}),
        uring_entries=DATA,
        uring_files=int(lib.ATOLL_CONNECTION_COUNT),
        turns=2,  # a request is received in one and answered in another; nbd needs one between them
        sized_by=("nic.buffer_bytes",),
    ),
)

ROLES: dict[str, Role] = {}
DOMAINS: tuple[Role, ...] = ()
# Clients first, so that nobody's request is left in the middle; then what serves them; the devices last.
STOP_ORDER: tuple[Role, ...] = ()
NAMES: dict[int, str] = {}
# Arenas whose contents outlive everybody: acknowledged writes and all that refers to them.
KEPT = ("nic", "dedup")
# Arenas out of which storage drivers write: payloads, metadata, and blocks on their way from device to device.
WRITTEN = ("nic", "dedup", "disk", "llrrm")


def select(fast: bool) -> None:
    """Which roles there are. Every other process of the instance inherits it."""
    global ROLES, DOMAINS, STOP_ORDER, NAMES
    rows = [role for role in _ROWS if fast or role.name != "llrrm"]
    ROLES = {role.name: role for role in rows}
    DOMAINS = tuple(sorted((role for role in rows if role.module), key=lambda role: role.boot))
    STOP_ORDER = tuple(reversed(DOMAINS))
    NAMES = {role.number: role.name for role in rows}


select(fast=False)


def module_name(role: Role, config: Mapping[str, Any]) -> str:
    return str(config["testing"]["modules"].get(role.name, role.module))


def module_of(role: Role, config: Mapping[str, Any]) -> ModuleType:
    """The module that plays `role`; imported at the first call. Raises ImportError."""
    return importlib.import_module(module_name(role, config))


def threaded(role: Role, config: Mapping[str, Any]) -> bool:
    """True if the role's process has threads, so that only its pidfd tells that no instruction of it runs any more."""
    return bool(role.threaded_engine) and config[role.name].get("engine") == role.threaded_engine


def rings_mask(role: Role) -> int:
    return sum(1 << ROLES[peer].number for peer in role.rings_to if peer in ROLES)


def ring_entries(role: Role) -> list[int]:
    """Entries by role number, 16 of them, as atoll_arena_format takes them."""
    entries = [0] * int(lib.ATOLL_ROLE_COUNT)
    for peer, count in role.rings_to.items():
        if peer in ROLES:
            entries[ROLES[peer].number] = count
    return entries
