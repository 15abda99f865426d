"""A stand-in for all four domains, for tests of the supervisor: numbers go round and are counted.

nic sends REQUEST n to nbd, nbd sends it on to dedup, dedup to disk, and the answers come back the same way. nic knows
the next number to send and the next answer to expect (both in its arena, changed by transactions), so that a number
that is lost or repeated over any death is seen. Calls to nic: "ping" with a count;
to all: "crash", "hang", "exit".
"""

import os
import select
import signal
import time
from pathlib import Path
from typing import Any

from atoll.ipc._ipc import ffi, lib
from atoll.ipc.roles import Role

COUNTERS = ("turns", "copied_inside_bytes")
NEXT, PREVIOUS = {"nic": "nbd", "nbd": "dedup", "dedup": "disk"}, {"nbd": "nic", "dedup": "nbd", "disk": "dedup"}
WINDOW = 16


def plan(config: dict[str, Any], role: str = "") -> tuple[int, int]:
    return 1 << 20, config["testing"]["fault"].get("buffer_bytes", 1 << 20)


class State:
    """Words behind the role's public structure."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.words = ffi.cast("uint64_t *", context.role_area + (1 << 19))

    def get(self, index: int) -> int:
        return int(self.words[index])

    def set(self, index: int, value: int) -> None:
        lib.atoll_domain_set64(self.context.domain, self.words + index, value)


MADE, TO_SEND, SENT, ANSWERED, WRONG, STARTS, SIGNALS = range(7)


def main(context: Any) -> None:
    fault = context.config["testing"]["fault"]
    if fault.get("fail") == context.role:
        context.fail(f"stand-in {context.role} was told to fail")
    if fault.get("raise") == context.role:
        raise RuntimeError("stand-in was told to raise")
    while "hold" in fault and not Path(fault["hold"]).exists():
        time.sleep(0.005)  # the test says when the service may come up
    state = State(context)
    if context.fresh:
        assert state.get(MADE) == 0, "a fresh arena is all zeros"
        if fault.get("die_fresh") == context.role and context.incarnation == 1:
            state.set(MADE, 7)
            lib.atoll_domain_commit(context.domain)
            os.kill(os.getpid(), signal.SIGKILL)
    elif not context.adopted or context.role in ("nic", "dedup"):
        assert state.get(MADE) == 1, "what a predecessor made is there"
    state.set(MADE, 1)
    state.set(STARTS, state.get(STARTS) + 1)
    state.set(SIGNALS, context.previous_signal)
    if context.adopted:
        state.set(SENT, 0)
        state.set(ANSWERED, 0)
        state.set(TO_SEND, 0)
    context.serving()
    message = ffi.new("struct atoll_descriptor *")
    poll = select.poll()
    if context.header.wake_kind == lib.ATOLL_WAKE_EVENTFD:
        poll.register(context.header.eventfd, select.POLLIN)
    handlers = {
        "ping": lambda call: ping(state, call["count"]),
        "report": lambda call: report(context, state),
        "status": lambda call: {"role": context.role, "logical_bytes": 0, "space": {"free_bytes": 1}},
        "crash": lambda call: os.kill(os.getpid(), call.get("signal", signal.SIGSEGV)),
        "hang": lambda call: hang(),
        "exit": lambda call: os._exit(call.get("status", 3)),
        "volume-create": lambda call: create_volume(context, call),
    }
    while not context.stopping:
        context.header.progress += 1
        step(context, state, message)
        if lib.atoll_domain_pending(context.domain, Role.KERNEL):
            context.serve_control(handlers)
            continue
        if context.header.wake_kind != lib.ATOLL_WAKE_EVENTFD:
            lib.atoll_domain_sleep(context.domain, 0, -1)
        elif lib.atoll_domain_may_sleep(context.domain, 0):
            poll.poll()
            lib.atoll_domain_awake(context.domain)
            try:
                os.eventfd_read(context.header.eventfd)
            except BlockingIOError:
                pass


def step(context: Any, state: State, message: Any) -> None:
    domain, role = context.domain, context.role
    if role in PREVIOUS:
        while lib.atoll_domain_take(domain, Role.of(PREVIOUS[role]), message):
            to = NEXT.get(role, PREVIOUS[role])
            assert lib.atoll_domain_put(domain, Role.of(to), message)
    if role in NEXT:
        while lib.atoll_domain_take(domain, Role.of(NEXT[role]), message):
            if role == "nic":
                answered = state.get(ANSWERED)
                if message.identity != answered:
                    state.set(WRONG, state.get(WRONG) + 1)
                state.set(ANSWERED, answered + 1)
            else:
                assert lib.atoll_domain_put(domain, Role.of(PREVIOUS[role]), message)
    if role == "nic":
        while state.get(SENT) < state.get(TO_SEND) and state.get(SENT) - state.get(ANSWERED) < WINDOW:
            message[0] = ffi.new("struct atoll_descriptor *")[0]
            message.opcode = lib.ATOLL_OP_REQUEST
            message.identity = state.get(SENT)
            assert lib.atoll_domain_put(domain, Role.NBD, message)
            state.set(SENT, state.get(SENT) + 1)
    lib.atoll_domain_commit(domain)


def ping(state: State, count: int) -> dict[str, Any]:
    state.set(TO_SEND, state.get(TO_SEND) + count)
    return {}


def report(context: Any, state: State) -> dict[str, Any]:
    return {
        "to_send": state.get(TO_SEND),
        "answered": state.get(ANSWERED),
        "wrong": state.get(WRONG),
        "starts": state.get(STARTS),
        "previous_signal": state.get(SIGNALS),
        "adopted": context.adopted,
        "incarnation": context.incarnation,
    }


def hang() -> dict[str, Any]:
    while True:
        time.sleep(1000)


def create_volume(context: Any, call: dict[str, Any]) -> dict[str, Any]:
    public = ffi.cast("struct atoll_dedup_public *", context.role_area)
    index = next(i for i in range(256) if public.volumes[i].state == lib.ATOLL_VOLUME_FREE)
    volume = public.volumes[index]
    name = call["name"].encode()
    volume.version += 1
    ffi.memmove(volume.name, name, len(name))
    volume.name_bytes, volume.size_bytes, volume.state = len(name), call["size_bytes"], lib.ATOLL_VOLUME_READY
    volume.version += 1
    return {}
