"""The storage driver: a domain that does dedup's I/O on one device, straight from and into arenas. The work: disk.h.

- `COUNTERS`: names of its counters, in the order of `enum disk_counter`.
- `plan(config)`: bytes of its role area and of its buffers, which are the read cache that dedup manages.
- `main(context)`: the domain's life. Control calls: "status", "stop".
- `serve(context, disk, lib, ffi, handlers)`: the loop, for the fault-injecting stand-in too.

Any storage role can be played (disk, llrrm): the section of the configuration is found by the role's name.

After a crash: the table of requests lies in the arena, the outcomes in the outliving io_uring; see disk.h.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from typing import Any, NoReturn

from atoll.drivers.disk._disk import ffi, lib

COUNTERS = (
    "reads",
    "read_bytes",
    "writes",
    "write_bytes",
    "syncs",
    "discards",
    "discards_ignored",
    "errors",
    "refused",
    "dropped",
    "repeated",
    "short",
    "stale",
    "adopted",
    "enters",
    "sleeps",
    "poisoned",
    "pinned",
    "background_held",
)
assert len(COUNTERS) == lib.DISK_COUNTER_COUNT

ENGINES = {lib.DISK_ENGINE_NONE: "none", lib.DISK_ENGINE_URING: "io_uring", lib.DISK_ENGINE_THREADS: "threads"}

REQUESTS = {lib.ATOLL_OP_IO_READ: "read", lib.ATOLL_OP_IO_WRITE: "write", lib.ATOLL_OP_IO_SYNC: "sync",
            lib.ATOLL_OP_IO_DISCARD: "discard"}  # fmt: skip

# Signals that a process brings upon itself.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}

Handlers = dict[str, Callable[[dict[str, Any]], dict[str, Any]]]


def plan(config: dict[str, Any], role: str = "disk") -> tuple[int, int]:
    return lib.disk_role_bytes(), config[role]["cache_bytes"]


def main(context: Any) -> None:
    error = ffi.new("char[256]")
    disk = lib.disk_create(context.domain, context.device_fd, passes_discards(context), crashed(context), error)
    if not disk:
        fail(context, ffi.string(error).decode(errors="replace"))
    serve(context, disk, lib, ffi, {})


def serve(context: Any, disk: Any, lib: Any, ffi: Any, handlers: Handlers) -> None:
    """Chooses the engine, takes up what a predecessor left, and works until it is told to stop. Owns `disk`.

    `lib`, `ffi`: of the C library that made `disk`, which is the driver's or its stand-in's.
    """
    error = ffi.new("char[256]")
    engine = context.config[context.role]["engine"]
    if engine == "io_uring":
        if context.uring is None:
            fail(context, f"engine {engine}: this process was given no io_uring")
        parameters = context.uring.parameters
        failed = lib.disk_attach_uring(disk, context.uring.fd, ffi.from_buffer(parameters), error)
    elif engine == "threads":
        failed = lib.disk_attach_threads(disk, error)
    else:
        fail(context, f"no storage engine is called {engine!r}")
    if failed:
        fail(context, ffi.string(error).decode(errors="replace"))

    def status(message: dict[str, Any]) -> dict[str, Any]:
        pinned = context.uring.source_bytes if context.uring is not None else 0
        return {**status_of(disk, lib, ffi), "pinned_bytes": pinned}

    # The table is as the predecessor's last commit left it; what it had under way goes on.
    everything = {"status": status, **handlers}
    path_cpu = context.config.get("kernel", {}).get("path_cpu")
    if path_cpu is not None:
        lib.disk_set_path_cpu(disk, path_cpu)
    context.serving()
    while (reason := lib.disk_run(disk)) != lib.ATOLL_REASON_STOP:
        if reason == lib.DISK_REASON_TELL:
            tell(context, disk, lib, ffi)
            continue
        context.serve_control(everything)
        if context.stopping:
            lib.disk_stop(disk)  # the loop ends once nothing is in flight
    lib.disk_destroy(disk)


def tell(context: Any, disk: Any, lib: Any, ffi: Any) -> None:
    """A failing device is named in the log: now and then, for it may fail at every request."""
    failure = ffi.new("struct disk_failure *")
    lib.disk_take_failure(disk, failure)
    context.event(
        f"the device failed: {os.strerror(failure.code)}",
        request=REQUESTS[failure.opcode],
        offset=int(failure.offset_bytes),
        length=int(failure.length_bytes),
        errors=int(failure.count),
    )
    context.lib.atoll_domain_commit(context.domain)


def crashed(context: Any) -> bool:
    """The predecessor ended by its own fault."""
    return context.previous_signal in CRASHES


def passes_discards(context: Any) -> bool:
    """A preallocated file keeps its blocks: they were promised to later writes."""
    return bool(context.config["sparse"]) or stat.S_ISBLK(os.fstat(context.device_fd).st_mode)


def status_of(disk: Any, lib: Any, ffi: Any) -> dict[str, Any]:
    status = ffi.new("struct disk_status *")
    lib.disk_status(disk, status)
    return {
        "engine": ENGINES[status.engine],
        "direct": bool(status.direct),
        "block_device": bool(status.block_device),
        "discards": bool(status.discards),
        "queued": status.queued,
        "in_flight": status.submitted,
        "device_bytes": status.device_bytes,
        "requests": status.taken,
    }


def fail(context: Any, reason: str) -> NoReturn:
    context.fail(reason)
    raise AssertionError("Context.fail does not return")
