"""The NIC driver: a domain that owns the sockets, cuts what comes into frames, sends what nbd answers. The work: nic.h.

- `COUNTERS`: names of its counters, in the order of `enum nic_counter`.
- `plan(config)`: bytes of its role area and of its buffers, which are the payload pages.
- `main(context)`: the domain's life. Control calls: "status", "connections", "check", "stop".

After a crash: sockets stay in the file table of the io_uring that init holds; everything else lies in the arena.
With the engine "sockets" all connections end with the process.
"""

from __future__ import annotations

import ipaddress
import os
import time
from typing import Any

from atoll.drivers.nic._nic import ffi, lib
from atoll.ipc.runtime import Deferred

COUNTERS = (
    "accepted",
    "closed",
    "requests",
    "replies",
    "received_bytes",
    "sent_bytes",
    "copied_inside_bytes",
    "receive_operations",
    "send_operations",
    "empty_receives",
    "submits",
    "waits",
    "turns",
    "page_waits",
    "slot_waits",
    "bad_give_back",
    "bad_message",
    "bad_reference",
    "handshake_timeouts",
    "payload_timeouts",
    "reply_timeouts",
    "idle_timeouts",
    "recovered_outcomes",
    "accept_failures",
    "socket_errors",
    "poisoned",
    "lost_messages",
    "courtesy_ended",
    "latency_requests",
    "pauses",
    "held",
    "guessed",
    "posted",
    "reads_from_memory",
    "bytes_from_memory",
    "posted_bytes",
    "posted_waits",
    "reads_asked",
    "bytes_asked",
)
assert len(COUNTERS) == lib.NIC_COUNTER_COUNT

ENGINES = {"io_uring": lib.NIC_ENGINE_URING, "sockets": lib.NIC_ENGINE_SOCKETS}
PHASES = {
    lib.NIC_ACCEPTING: "accepting",
    lib.NIC_OPEN: "open",
    lib.NIC_ENDING: "ending",
    lib.NIC_LINGER: "lingering",
    lib.NIC_GONE: "gone",
    lib.NIC_REPORTED: "gone",
}
# A stop waits this long for requests in flight to be answered and for connections to end.
STOP_S = 5.0
# Least buffer: one part of each of a few connections.
LEAST_BUFFER_BYTES = 4 << 20
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10


def plan(config: dict[str, Any]) -> tuple[int, int]:
    buffer_bytes = max(int(config["nic"]["buffer_bytes"]), LEAST_BUFFER_BYTES)
    return int(lib.nic_role_bytes(buffer_bytes)), buffer_bytes


def limits_of(config: dict[str, Any]) -> Any:
    """struct nic_limits * of the configuration."""
    settings = config["nic"]

    def nanoseconds(name: str) -> int:
        return int(settings[name] * 1_000_000_000)

    return ffi.new(
        "struct nic_limits *",
        {
            "max_connections": min(settings["max_connections"], lib.ATOLL_CONNECTION_COUNT),
            "requests_per_connection": min(settings["requests_per_connection"], lib.ATOLL_SLOT_COUNT),
            # Replies refer to what the device's cache holds: three quarters of it at most, so that it can be read into.
            "reply_pages": config["disk"]["cache_bytes"] // 2 // lib.ATOLL_BLOCK_BYTES,
            "handshake_ns": nanoseconds("handshake_timeout_s"),
            "payload_ns": nanoseconds("payload_timeout_s"),
            "reply_ns": nanoseconds("reply_timeout_s"),
            "idle_ns": nanoseconds("idle_timeout_s"),
            "crowded_ns": nanoseconds("crowded_timeout_s"),
        },
    )


def main(context: Any) -> None:
    engine = context.config["nic"]["engine"]
    nic = open_nic(context, engine)

    def status(message: dict[str, Any]) -> dict[str, Any]:
        return status_of(nic, engine) | {"connections_most": int(limits_of(context.config).max_connections)}

    def connections(message: dict[str, Any]) -> dict[str, Any]:
        return {"connections": connections_of(nic)}

    def check(message: dict[str, Any]) -> dict[str, Any]:
        error = ffi.new("char[256]")
        if lib.nic_check(nic, error) == 0:
            return {"problems": []}
        return {"problems": [ffi.string(error).decode()]}

    def stop(message: dict[str, Any]) -> Any:
        lib.nic_stop(nic, context.call_number)
        return Deferred()

    context.serving()
    handlers = {"status": status, "connections": connections, "check": check, "stop": stop}
    while lib.nic_stop_call(nic) == 0:  # else a predecessor was told to stop
        lib.nic_run(nic, 0, 0)
        context.serve_control(handlers)
    finish(context, nic)


def finish(context: Any, nic: Any) -> None:
    """Serves until all connections have ended, at most STOP_S; then answers the call that asked for the stop."""
    deadline = time.monotonic_ns() + int(STOP_S * 1e9)
    while lib.nic_connections(nic) and (now := time.monotonic_ns()) < deadline:
        lib.nic_run(nic, min(deadline, now + 20_000_000), 1)
    context.stopping = True
    context.reply(int(lib.nic_stop_call(nic)), {"ok": True, "connections_left": lib.nic_connections(nic)})
    context.lib.atoll_domain_commit(context.domain)
    lib.nic_close(nic)


def open_nic(context: Any, engine: str) -> Any:
    """Recovers; struct nic *. Ends the process with the reason if it cannot."""
    if engine not in ENGINES:
        context.fail(f"no network engine is called {engine!r}")
    if engine == "io_uring" and context.uring is None:
        context.fail("engine io_uring: this process was given no io_uring")
    if len(context.listeners) > lib.NIC_LISTENER_COUNT:
        context.fail(f"{len(context.listeners)} listeners, at most {lib.NIC_LISTENER_COUNT} are possible")
    options = ffi.new("struct nic_options *")
    options.engine = ENGINES[engine]
    options.previous_signal = context.previous_signal
    options.uring_fd = context.uring.fd if context.uring is not None else -1
    options.listener_count = len(context.listeners)
    options.listeners[0 : len(context.listeners)] = [listener.fd for listener in context.listeners]
    options.latency_fd = context.latency_fd
    options.latency_us = context.config.get("kernel", {}).get("cpu_latency_us", -1)
    options.courtesy = bool(context.config["nic"].get("courtesy", False))
    options.poll_in_ring = bool(context.config["testing"].get("fault", {}).get("nic_poll_in_ring", False))
    parameters = (
        ffi.from_buffer("struct atoll_uring_parameters *", context.uring.parameters)
        if context.uring is not None
        else ffi.NULL
    )
    error = ffi.new("char[256]")
    nic = lib.nic_open(context.domain, limits_of(context.config), options, parameters, error)
    if not nic:
        context.fail(ffi.string(error).decode(errors="replace"))
    return nic


def status_of(nic: Any, engine: str) -> dict[str, Any]:
    status = ffi.new("struct nic_status *")
    lib.nic_get_status(nic, status)
    return {
        "engine": engine,
        "survives_kill": engine == "io_uring",
        "connections": status.connections,
        "slots_in_use": status.slots_in_use,
        "stream_buffers_in_use": status.streams_in_use,
        "waiting_for_pages": status.waiting_for_pages,
        "waiting_for_slots": status.waiting_for_slots,
        "stopping": bool(status.stopping),
        "buffer_pages": status.pages,
        "buffer_pages_free": status.pages_free,
        "buffer_pages_lent": status.pages_lent,
        "buffer_pages_taken": status.pages_taken,
        "cpu_latency_held": bool(status.latency_held),
        "cpu_latency_error": os.strerror(status.latency_error) if status.latency_error else None,
    }


def connections_of(nic: Any) -> list[dict[str, Any]]:
    found = []
    connection = ffi.new("struct nic_connection *")
    now = time.monotonic_ns()
    for index in range(lib.ATOLL_CONNECTION_COUNT):
        if not lib.nic_get_connection(nic, index, connection):
            continue
        found.append(
            {
                "connection": index,
                "peer": peer_of(bytes(connection.address), connection.address_length),
                "listener": connection.listener,
                "state": PHASES[connection.phase],
                "outstanding": connection.outstanding,
                "requests": connection.requests,
                "received_bytes": connection.received_bytes,
                "sent_bytes": connection.sent_bytes,
                "age_s": max(0.0, (now - connection.accepted_ns) / 1e9),
            }
        )
    return found


def peer_of(address: bytes, length: int) -> str:
    """A struct sockaddr as a person would write it; "unix" for a Unix socket."""
    family = int.from_bytes(address[:2], "little") if length >= 2 else 0
    if family == AF_INET:
        return f"{ipaddress.IPv4Address(address[4:8])}:{int.from_bytes(address[2:4], 'big')}"
    if family == AF_INET6:
        return f"[{ipaddress.IPv6Address(address[8:24])}]:{int.from_bytes(address[2:4], 'big')}"
    return "unix" if family in (0, AF_UNIX) else f"family {family}"
