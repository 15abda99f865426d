"""nbd: the domain that speaks the NBD protocol. Requests are C's (nbd.h); negotiation and control are Python's.

- `COUNTERS`, `plan(config)`, `main(context)`: what the kernel needs of a domain (docs/domains.md, section 2).
- Control calls: "connections" (per connection: volume, state, features, requests), "status" (connections and slots by
  state), "stop".

The empty export name stands for the volume "disk", or if there is none, for the one with the lowest id. A request of
length 0 is refused with EINVAL; FLUSH and DISC take no range.

After a crash: the state lies in the arena (nbd.h); a frame that was being negotiated is in its ring again.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any

from atoll.ipc.runtime import CallError, Context
from atoll.services.nbd import negotiation
from atoll.services.nbd._nbd import ffi, lib
from atoll.services.nbd.negotiation import Answer, Feature, Phase, State, Volume

COUNTERS: tuple[str, ...] = (
    *("reads", "writes", "disconnects", "flushes", "trims", "caches", "write_zeroes", "block_statuses"),
    *("read_bytes", "write_bytes"),
    *("errors_eperm", "errors_eio", "errors_enomem", "errors_einval", "errors_enospc", "errors_eoverflow"),
    *("errors_enotsup", "errors_eshutdown"),
    *("connections_opened", "connections_closed", "options", "bad_magic"),
    *("poisoned", "stale_messages", "peer_faults", "steps", "messages", "reads_from_memory"),
)

CONNECTION_STATES = ("free", "greeted", "options", "transmission", "draining", "closing")
SLOT_STATES = ("free", "dedup", "payload", "sending", "listing", "waiting")


def plan(config: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the role's area and of buffers to lend: none of the latter, data are passed on by reference."""
    return int(lib.nbd_area_bytes()), 0


def main(context: Context) -> None:
    """Serves until it is told to stop. The context's arena is writable and rolled back."""
    reset = context.adopted and not context.fresh
    state = lib.nbd_attach(context.domain, context.previous_signal, reset)
    if state == ffi.NULL:
        context.fail("out of memory")
    try:
        Service(state, context).run()
    finally:
        lib.nbd_detach(state)


class TableUnstable(Exception):
    """dedup died while it changed the volumes, and its successor has not finished that yet."""


class Service:
    """The Python side of one incarnation."""

    def __init__(self, state: Any, context: Context) -> None:
        self._state, self._context = state, context
        self._volumes = ffi.new("struct atoll_volume[]", lib.ATOLL_VOLUME_COUNT)
        self._handlers = {"connections": self._connections, "status": self._status}

    def run(self) -> None:
        context = self._context
        context.serving()
        while not context.stopping:
            reason = lib.nbd_run(self._state)
            if reason == lib.ATOLL_REASON_CONTROL:
                context.serve_control(self._handlers)
            elif reason == lib.NBD_REASON_FRAME:
                self.negotiate()
            else:
                return

    # --- Negotiation ---

    def negotiate(self) -> None:
        """Answers the frame at which C stopped."""
        frame = lib.nbd_frame(self._state)
        kept = frame.negotiation
        state = State(Phase(kept.state), Feature(kept.features), kept.meta_volume, kept.meta_generation, kept.list_next)
        try:
            answer = self._judge(frame, state)
        except TableUnstable:
            lib.nbd_postpone(self._state)
            return
        except Exception:
            # A bug of ours; it costs this connection, not all the others.
            traceback.print_exc(file=sys.stderr)
            answer = Answer(state, framing=negotiation.Framing.KEEP, close=True)
        self._send(answer)

    def _judge(self, frame: Any, state: State) -> Answer:
        if frame.opcode == lib.ATOLL_OP_OPEN:
            return negotiation.opened()
        if frame.opcode == lib.ATOLL_OP_SENT:
            return negotiation.more(state, self.volumes())
        header = bytes(ffi.buffer(frame.header, min(frame.header_bytes, 16)))
        if len(header) == 4:
            return negotiation.client_flags(state, header)
        length = min(frame.data_bytes, negotiation.OPTION_LIMIT_BYTES)
        data = bytes(ffi.buffer(frame.data, length)) if length else b""
        return negotiation.option(state, header, data, self.volumes())

    def _send(self, answer: Answer) -> None:
        data = ffi.from_buffer(answer.data)
        out = ffi.new("struct nbd_answer *")
        out.negotiation.state = answer.state.phase
        out.negotiation.features = answer.state.features
        out.negotiation.meta_volume = answer.state.meta_volume
        out.negotiation.meta_generation = answer.state.meta_generation
        out.negotiation.list_next = answer.state.list_next
        out.framing, out.close, out.more = answer.framing, answer.close, answer.more
        out.data, out.length = ffi.cast("uint8_t *", data), len(answer.data)
        if answer.volume is not None:
            out.volume, out.generation = answer.volume.id, answer.volume.generation
        lib.nbd_answer(self._state, out)

    def volumes(self) -> Sequence[Volume]:
        """The volumes now, in the order of their ids."""
        count = lib.nbd_volumes(self._state, self._volumes)
        if count < 0:
            raise TableUnstable
        return [
            Volume(
                entry.id,
                entry.generation,
                bytes(ffi.buffer(entry.name, entry.name_bytes)),
                entry.size_bytes,
                bool(entry.flags & lib.ATOLL_VOLUME_READONLY),
            )
            for entry in self._volumes[0:count]
        ]

    # --- Control ---

    def _connections(self, call: dict[str, Any]) -> dict[str, Any]:
        try:
            names = {volume.id: volume.name.decode(errors="replace") for volume in self.volumes()}
        except TableUnstable:
            raise CallError("the table of volumes is being changed and dedup is away; try again") from None
        connections = lib.nbd_area(self._state).connections
        found = []
        for number in range(lib.ATOLL_CONNECTION_COUNT):
            connection = connections[number]
            state = connection.negotiation.state
            if state == lib.NBD_CONNECTION_FREE:
                continue
            used = state in (lib.NBD_CONNECTION_TRANSMISSION, lib.NBD_CONNECTION_DRAINING)
            features = Feature(connection.negotiation.features)
            found.append(
                {
                    "connection": number,
                    "state": _name(CONNECTION_STATES, state),
                    "volume": names.get(connection.volume) if used else None,
                    "features": [str(feature.name).lower() for feature in Feature if feature in features],
                    "in_flight": connection.in_flight,
                    "requests": connection.requests,
                }
            )
        return {"connections": found}

    def _status(self, call: dict[str, Any]) -> dict[str, Any]:
        area = lib.nbd_area(self._state)
        connections = Counter(area.connections[i].negotiation.state for i in range(lib.ATOLL_CONNECTION_COUNT))
        slots = Counter(area.slots[i].state for i in range(lib.ATOLL_SLOT_COUNT))
        return {
            "connections": {_name(CONNECTION_STATES, state): count for state, count in sorted(connections.items())},
            "slots": {_name(SLOT_STATES, state): count for state, count in sorted(slots.items())},
        }


def _name(names: tuple[str, ...], number: int) -> str:
    return names[number] if number < len(names) else str(number)
