"""What a domain's Python stands on: `Context`, its life from promotion to end, and the answering of control messages.

The kernel's standby code makes a `Context`, takes the role lock, maps the arena writable, calls `open()`, then the
module's `main(context)`; `stopped()` when that returns. A module uses:

- `role` (name), `number`, `incarnation`, `fresh`, `adopted`, `previous_signal`, `config`, `listeners`, `device_fd`,
  `uring`, `latency_fd`
- `domain` (struct atoll_domain *), `ffi`, `lib` of atoll.ipc._ipc; `role_area`, `buffer_area` (addresses), `header`
- `serving()` once it has recovered; `serve_control(handlers)` on ATOLL_REASON_CONTROL; `stopping`
- `event(name, **fields)` to the kernel; `fail(reason)` if it cannot start; `reply(number, result)` for a `Deferred`

A handler is `handlers[name](message: dict) -> dict | Deferred`; it refuses by raising `CallError(text)` before it has
changed anything. Call "stop" is answered here; the loop then ends when it sees `stopping`.

After a crash: taking a call, what its handler changed, and its result are one transaction (if the handler does not
commit itself), so the successor finds the call again or has answered it. A call that is repeated after its result was
committed gets that result again and its handler does not run. A handler that commits or defers notes `call_number` with
its change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from atoll.ipc import physmap
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.crashpoint import crash_point_each
from atoll.ipc.message import MessageError, decode, encode
from atoll.ipc.roles import Role
from atoll.ipc.uring import UringHandle

RESULT_LIMIT = lib.ATOLL_CONTROL_EVENTS_OFFSET - lib.ATOLL_CONTROL_HEADER_BYTES
EXIT_FAILED = 78  # sysexits.h: EX_CONFIG; a domain that could not start and has said why in its header

Handler = Callable[[dict[str, Any]], "dict[str, Any] | Deferred"]


class CallError(Exception):
    """A call is refused; the text is for the person who asked."""


class Deferred:
    """A handler's answer comes later, by `context.reply(number, result)`."""


class DomainError(Exception):
    """The arena cannot be opened."""


@dataclass(frozen=True)
class Listener:
    fd: int
    kind: str  # "tcp" or "unix"
    address: str  # as a person would write it: "127.0.0.1:10809", "[::1]:10809", a path


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot: with the pid it names a process for good."""
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


@dataclass
class Context:
    role: str
    incarnation: int
    fresh: bool
    adopted: bool
    previous_signal: int
    config: dict[str, Any]
    arena_bytes: dict[int, int]  # role number → bytes, of every arena in the map
    listeners: list[Listener] = field(default_factory=list)
    device_fd: int = -1
    uring: UringHandle | None = None
    processors: frozenset[int] = frozenset()  # on which the role may run, however it is bound now
    latency_fd: int = -1  # of the CPU latency request
    stopping: bool = False
    call_number: int = 0  # of the call whose handler runs

    def __post_init__(self) -> None:
        self.number = int(Role.of(self.role))
        self.ffi, self.lib = ffi, lib
        self.domain = ffi.new("struct atoll_domain *")

    # --- Life ---

    def open(self, pid: int, started: int | None = None) -> None:
        """Becomes the active process of the role: rolls the predecessor's open step back, wires the rings.

        The role lock is held and the own arena mapped writable, all others read-only. DomainError says what is wrong.
        """
        sizes = ffi.new("uint64_t[16]")
        for role, size in self.arena_bytes.items():
            sizes[role] = size
        error = ffi.new("char[256]")
        when = start_time(pid) if started is None else started
        if lib.atoll_domain_open(self.domain, self.number, self.incarnation, pid, when, sizes, error) < 0:
            raise DomainError(f"{self.role}: {ffi.string(error).decode(errors='replace')}")
        lib.atoll_domain_set_spin(self.domain, int(self.config.get("kernel", {}).get("spin_us", 0)) * 1000)

    def serving(self) -> None:
        """Recovered: peers are woken, because the dead may have published without waking."""
        lib.atoll_domain_commit(self.domain)
        lib.atoll_domain_serving(self.domain)

    def fail(self, reason: str) -> NoReturn:
        """Cannot start: leaves the reason (at most 255 bytes of UTF-8 of it) for the kernel and ends the process."""
        text = reason.encode()[:255].decode(errors="ignore").encode()
        header = self.header
        ffi.memmove(header.reason, text + b"\0", len(text) + 1)
        header.state = lib.ATOLL_STATE_FAILED
        print(f"atoll {self.role}: {reason}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_FAILED)

    def stopped(self) -> None:
        """The module's main has returned: everything is handed over."""
        lib.atoll_domain_commit(self.domain)
        self.header.state = lib.ATOLL_STATE_STOPPED
        lib.atoll_domain_wake_all(self.domain)

    # --- The arena ---

    @property
    def header(self) -> Any:
        """struct atoll_arena_header * of the own arena, writable."""
        return self.domain.self

    @property
    def role_area(self) -> int:
        return physmap.address(self.number) + int(self.header.role_offset)

    @property
    def buffer_area(self) -> int:
        return physmap.address(self.number) + int(self.header.buffer_offset)

    def _control(self, offset: int) -> int:
        return physmap.address(self.number) + int(self.header.control_offset) + offset

    # --- Control messages ---

    def serve_control(self, handlers: Mapping[str, Handler]) -> None:
        """Answers all calls that wait on the ring from the kernel, each in a step of its own."""
        lib.atoll_domain_commit(self.domain)  # what the loop has done so far is not the handlers' to undo
        message = ffi.new("struct atoll_descriptor *")
        while lib.atoll_domain_take(self.domain, Role.KERNEL, message):
            if message.opcode == lib.ATOLL_OP_CALL:
                self._serve(message, handlers)
            lib.atoll_domain_commit(self.domain)

    def _serve(self, message: Any, handlers: Mapping[str, Handler]) -> None:
        results = self._results()
        if message.identity == results.number and results.number != 0:
            try:
                self.stopping = self.stopping or _is_stop(self._read_call(message))
            except MessageError:
                pass  # refused before, as the result says
            self._send(int(results.number), int(results.length))  # answered before; the same again
            return
        self.call_number = int(message.identity)
        changes = lib.atoll_domain_changes(self.domain)
        crash_point_each(self.domain, "call.before")
        try:
            result = self._answer(self._read_call(message), handlers)
        except (CallError, MessageError) as error:
            result = {"ok": False, "error": str(error)}
            if lib.atoll_domain_changes(self.domain) != changes:
                self._abandon(result)
                raise
        except Exception as error:
            # A bug of ours. If it left nothing half done it costs this call only; else the successor starts clean.
            result = {"ok": False, "error": f"internal error in {self.role}: {type(error).__name__}: {error}"}
            if lib.atoll_domain_changes(self.domain) != changes:
                self._abandon(result)
                raise
            sys.excepthook(type(error), error, error.__traceback__)
        if not isinstance(result, Deferred):
            self.reply(self.call_number, result)
        self.call_number = 0

    def _read_call(self, message: Any) -> dict[str, Any]:
        """The message of a CALL, copied out of the kernel's arena and checked."""
        base, size = physmap.address(Role.KERNEL), int(self.domain.peer_bytes[Role.KERNEL])
        address, length = int(message.address), int(message.length)
        if length > lib.ATOLL_CONTROL_BYTES or address < base or address - base > size - length:
            raise MessageError(f"call of {length} bytes at {address:#x}: not in the kernel's arena")
        return decode(bytes(ffi.buffer(ffi.cast("char *", address), length)))

    def _answer(self, call: dict[str, Any], handlers: Mapping[str, Handler]) -> dict[str, Any] | Deferred:
        name = call.get("call")
        handler = handlers.get(name) if isinstance(name, str) else None
        if _is_stop(call):
            self.stopping = True
            if handler is None:
                return {"ok": True}
        if handler is None:
            raise CallError(f"{self.role} knows no call {name!r}")
        result = handler(call)
        return result if isinstance(result, Deferred) else {"ok": True, **result}

    def reply(self, call_number: int, result: Mapping[str, Any]) -> None:
        """Sends the result of a call in the running transaction. One outstanding call per domain: there is room."""
        try:
            data = encode(result, RESULT_LIMIT)
        except MessageError as error:
            data = encode({"ok": False, "error": f"{self.role} cannot send its answer: {error}"})
        results = self._results()
        # Not in the journal: nobody reads it before the number names it, nor the old one once a new call has come.
        ffi.memmove(ffi.cast("char *", self._control(lib.ATOLL_CONTROL_HEADER_BYTES)), data, len(data))
        lib.atoll_domain_set64(self.domain, ffi.addressof(results, "number"), call_number)
        lib.atoll_domain_set64(self.domain, ffi.addressof(results, "length"), len(data))
        self._send(call_number, len(data))

    def event(self, name: str, **fields: Any) -> bool:
        """Tells the kernel something that needs no answer, in the running transaction. False: too many wait already."""
        try:
            data = encode({"event": name, **fields}, lib.ATOLL_CONTROL_EVENT_BYTES)
        except MessageError:
            data = encode({"event": name, "text": "(too long)"}, lib.ATOLL_CONTROL_EVENT_BYTES)
        entry = lib.atoll_domain_next_entry(self.domain, Role.KERNEL)
        address = self._control(lib.ATOLL_CONTROL_EVENTS_OFFSET + entry * lib.ATOLL_CONTROL_EVENT_BYTES)
        message = ffi.new("struct atoll_descriptor *")
        message.opcode, message.address, message.length = lib.ATOLL_OP_EVENT, address, len(data)
        if lib.atoll_domain_room(self.domain, Role.KERNEL) < 2:  # the last entry is kept for a result
            return False
        ffi.memmove(ffi.cast("char *", address), data, len(data))
        return bool(lib.atoll_domain_put(self.domain, Role.KERNEL, message))

    def _results(self) -> Any:
        return ffi.cast("struct atoll_control_results *", self._control(0))

    def _send(self, number: int, length: int) -> None:
        message = ffi.new("struct atoll_descriptor *")
        message.opcode, message.identity, message.length = lib.ATOLL_OP_RESULT, number, length
        message.address = self._control(lib.ATOLL_CONTROL_HEADER_BYTES)
        if not lib.atoll_domain_put(self.domain, Role.KERNEL, message):
            raise AssertionError("no room for the result of the one outstanding call")

    def _abandon(self, result: dict[str, Any]) -> None:
        """A handler failed half way: undoes what it changed and answers the call; the process then ends."""
        lib.atoll_domain_roll_back(self.domain)
        message = ffi.new("struct atoll_descriptor *")
        if lib.atoll_domain_take(self.domain, Role.KERNEL, message):  # the call itself is there again
            self.reply(self.call_number, result)
            lib.atoll_domain_commit(self.domain)


def _is_stop(call: Mapping[str, Any]) -> bool:
    return call.get("call") == "stop"
