"""The kernel's side of control messages: calls to domains, their results, and events from them.

    client = CallClient(context.domain)           # of the kernel, after open()
    number = client.start("dedup", {"call": "volumes"})
    for received in client.receive(): ...         # when the kernel's eventfd fires

- One call per domain is outstanding: `start` raises CallBusy while there is one.
- `repeat(role)` after the domain's takeover: what its predecessor had deferred is asked again, by the
  same number.
- `receive()` takes everything from all rings in one step and commits it.

After a crash: number and blob of each outstanding call lie in the kernel's arena. The successor finds it outstanding,
gets its result (`Received.number` tells which call) and may then call again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atoll.ipc import physmap
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.crashpoint import crash_point
from atoll.ipc.message import MessageError, decode, encode
from atoll.ipc.roles import Role

CALL_LIMIT = lib.ATOLL_CONTROL_CALL_BYTES - lib.ATOLL_CONTROL_HEADER_BYTES


class CallBusy(Exception):
    """The domain has not answered its last call yet."""


@dataclass(frozen=True)
class Received:
    role: str
    kind: str  # "result", "event", or "error": what came cannot be read (message["error"] says why)
    number: int  # of the call, for a result
    message: dict[str, Any]


class CallClient:
    def __init__(self, domain: Any) -> None:
        """`domain`: struct atoll_domain * of the kernel."""
        self._domain = domain

    def _call(self, role: int) -> Any:
        offset = int(self._domain.self.control_offset) + role * lib.ATOLL_CONTROL_CALL_BYTES
        return ffi.cast("struct atoll_control_call *", physmap.address(Role.KERNEL) + offset)

    def outstanding(self, role: Role | int | str) -> int:
        """Number of the call that the domain has still to answer, 0: none."""
        call = self._call(Role.of(role))
        return 0 if call.number == call.answered else int(call.number)

    def start(self, role: Role | int | str, message: Mapping[str, Any]) -> int:
        """Sends a call and returns its number; commits. CallBusy, MessageError."""
        to = Role.of(role)
        data = encode(message, CALL_LIMIT)
        if self.outstanding(to):
            raise CallBusy(f"{to.text} has not answered its last call yet")
        call = self._call(to)
        # Free until the number goes up: the last call is answered.
        ffi.memmove(ffi.cast("char *", call) + lib.ATOLL_CONTROL_HEADER_BYTES, data, len(data))
        lib.atoll_domain_set64(self._domain, ffi.addressof(call, "length"), len(data))
        lib.atoll_domain_set64(self._domain, ffi.addressof(call, "number"), call.number + 1)
        crash_point(self._domain, "kernel.call.before")
        return self._send(to)

    def repeat(self, role: Role | int | str) -> int:
        """Sends the outstanding call again, after the domain's takeover; returns its number, 0: there is none."""
        to = Role.of(role)
        return self._send(to) if self.outstanding(to) else 0

    def _send(self, role: Role) -> int:
        call = self._call(role)
        message = ffi.new("struct atoll_descriptor *")
        message.opcode, message.identity, message.length = lib.ATOLL_OP_CALL, call.number, call.length
        message.address = int(ffi.cast("uintptr_t", call)) + lib.ATOLL_CONTROL_HEADER_BYTES
        number = int(call.number)
        if not lib.atoll_domain_put(self._domain, role, message):
            lib.atoll_domain_roll_back(self._domain)
            raise CallBusy(f"the ring to {role.text} is full or does not exist")
        lib.atoll_domain_commit(self._domain)
        return number

    def receive(self) -> list[Received]:
        """All results and events that wait; each result once, and only that of the outstanding call."""
        found: list[Received] = []
        message = ffi.new("struct atoll_descriptor *")
        for role in Role:
            for _ in range(lib.ATOLL_CONTROL_RING_ENTRIES):  # a step is bounded
                if role in (Role.INIT, Role.KERNEL) or not lib.atoll_domain_take(self._domain, role, message):
                    break
                found.extend(self._received(role, message))
        crash_point(self._domain, "kernel.receive.before")
        lib.atoll_domain_commit(self._domain)
        return found

    def _received(self, role: Role, message: Any) -> list[Received]:
        number = int(message.identity)
        result = message.opcode == lib.ATOLL_OP_RESULT
        if result:
            call = self._call(role)
            if number != call.number or number == call.answered:
                return []  # of a call that was repeated and answered twice
            lib.atoll_domain_set64(self._domain, ffi.addressof(call, "answered"), number)
        elif message.opcode != lib.ATOLL_OP_EVENT:
            return [Received(role.text, "error", 0, {"error": f"{role.text} sent opcode {message.opcode}"})]
        try:
            content = self._read(role, message)
        except MessageError as error:
            text = f"what {role.text} sent cannot be read: {error}"
            if result:
                return [Received(role.text, "result", number, {"ok": False, "error": text})]
            return [Received(role.text, "error", 0, {"error": text})]
        return [Received(role.text, "result" if result else "event", number if result else 0, content)]

    def _read(self, role: Role, message: Any) -> dict[str, Any]:
        """Copied out of the sender's arena and checked."""
        base, size = physmap.address(role), int(self._domain.peer_bytes[role])
        address, length = int(message.address), int(message.length)
        if length > lib.ATOLL_CONTROL_BYTES or length > size or not 0 <= address - base <= size - length:
            raise MessageError(f"{length} bytes at {address:#x}: not in its arena")
        return decode(bytes(ffi.buffer(ffi.cast("char *", address), length)))
