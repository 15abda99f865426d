"""`atoll trace`: follows one write and one read through all domains.

- `follow` arms a trace, collects what the domains recorded until a write and a read are complete, and disarms it.
- `write_of`, `read_of` reconstruct one request from the records of all domains; pure functions.

A domain records each message it takes or puts (struct atoll_trace_record), a scattered payload with a record per
segment. Between nic, nbd and dedup a request is known by its identity. Between dedup and the device driver another one
is used, that of the I/O; so a hop there is found by the payload's address: that it is found is what is to be shown.

The device's part of a write comes later than its answer, with the destage (up to a second); that of a read comes only
where the block is in no memory yet.
"""

import contextlib
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from atoll.kernel.client import Client, ControlError, NoAnswer, Refused

RECORD = struct.Struct("<QQQIBBBB4Q")
assert RECORD.size == 64

# enum atoll_role, enum atoll_opcode
ROLES = {0: "init", 1: "kernel", 2: "nic", 3: "nbd", 4: "dedup", 5: "disk", 6: "llrrm"}
STORAGE = ("disk", "llrrm")
REQUEST, PART, REPLY, NEXT = 3, 4, 16, 17
READ, WRITE, DONE = 32, 33, 48
IO_READ, IO_WRITE, IO_DONE = 64, 65, 80
MESSAGES = {
    REQUEST: "REQUEST", PART: "PART", REPLY: "REPLY", NEXT: "NEXT", READ: "READ", WRITE: "WRITE", DONE: "DONE",
    IO_READ: "IO_READ", IO_WRITE: "IO_WRITE", IO_DONE: "IO_DONE", 6: "SENT", 49: "GIVE_BACK",
}  # fmt: skip
IO_OPCODES = (IO_READ, IO_WRITE, IO_DONE)
FLAG_LAST = 16

MAP_BASE, MAP_STRIDE = 0x200000000000, 0x4000000000

POLL_S = 0.02
# Requests whose records are kept while others pass, and the time in which a request's first records come together.
CANDIDATES = 8
RECENT_NS = 200_000_000
# Within this time two records of a domain about a request are of one step.
AT_ONCE_NS = 1_000
# Destaging waits for more to come, then writes: what has not reached the device after this was not written to it.
DESTAGE_S = 5.0
# The same for a write of which records may have been overwritten before they were seen, while there are others.
DOUBT_NS = 1_000_000_000
COPIED = "nbd and dedup saw different places"

Range = tuple[int, int]  # first address, one past the last


@dataclass(slots=True)
class Message:
    """One message as one domain saw it."""

    time_ns: int
    domain: str
    peer: str
    received: bool
    opcode: int
    flags: int
    identity: int
    words: tuple[int, int, int, int]
    ranges: list[Range] = field(default_factory=list)

    def halves(self, index: int) -> int:
        return self.words[index // 2] >> (32 * (index % 2)) & 0xFFFFFFFF


def parse(domain: str, memory: bytes) -> list[Message]:
    """Messages of one domain from its records, oldest first; the segments of a scattered payload are put together."""
    messages: list[Message] = []
    before: tuple[Any, ...] = ()
    for at in range(0, len(memory) - RECORD.size + 1, RECORD.size):
        time_ns, identity, address, length, opcode, peer, direction, flags, *words = RECORD.unpack_from(memory, at)
        if time_ns == 0:
            continue
        same = (identity, opcode, peer, direction, flags, *words)
        # Records of one message follow one another at once; two equal messages do not come that close.
        if same != before or time_ns - messages[-1].time_ns > 200_000:
            messages.append(
                Message(
                    time_ns, domain, ROLES.get(peer, str(peer)), direction == 0, opcode, flags, identity,
                    (words[0], words[1], words[2], words[3]),
                )
            )  # fmt: skip
        before = same
        if address and length:
            ranges = messages[-1].ranges
            if ranges and ranges[-1][1] == address:
                ranges[-1] = ranges[-1][0], address + length
            else:
                ranges.append((address, address + length))
    return messages


# --- Reconstruction -------------------------------------------------------------------------------------------------


def requests(messages: Iterable[Message], opcode: int, volume_id: int | None) -> list[int]:
    """Identities of requests that nbd handed to dedup, in order."""
    found: dict[int, int] = {}
    for message in messages:
        wanted = message.domain == "dedup" and message.received and message.opcode == opcode
        if wanted and message.words[1] and volume_id in (None, message.halves(4)):
            found.setdefault(message.identity, message.time_ns)
    return sorted(found, key=lambda identity: found[identity])


def answered(messages: Iterable[Message], identity: int) -> bool:
    """Whether nic has seen the last reply."""
    return any(
        m.identity == identity and m.domain == "nic" and m.received and m.opcode == REPLY and m.flags & FLAG_LAST
        for m in messages
    )


def whole(messages: Iterable[Message], identity: int, opcode: int) -> bool:
    """Whether nothing of the request is missing: it began after the trace did, and no record was overwritten."""
    own = [m for m in messages if m.identity == identity]
    begun = any(m.domain == "nbd" and m.received and m.opcode == REQUEST for m in own)
    asked = sum({m.words[0]: m.words[1] for m in own if m.opcode == opcode and m.domain == "dedup"}.values())
    # Counted part by part: a later part may land in pages that an earlier one has given back.
    payload = sum(
        total(join(m.ranges)) for m in own if m.domain == "nbd" and m.received and m.opcode in (REQUEST, PART)
    )
    return begun and (opcode != WRITE or payload == asked)


def write_of(messages: Sequence[Message], identity: int) -> dict[str, Any]:
    """One write: hops, and whether nbd, dedup and the device's driver saw its payload at one and the same place."""
    path = [m for m in messages if m.identity == identity and m.peer not in STORAGE and m.domain not in STORAGE]
    in_nbd = ranges_of(path, "nbd", (REQUEST, PART))
    in_dedup = ranges_of(path, "dedup", (WRITE,))
    start_ns = min(m.time_ns for m in path)
    device = device_hops(messages, IO_WRITE, in_dedup, start_ns)
    in_disk = intersect([r for m in device if m.received and m.opcode == IO_WRITE for r in m.ranges], in_dedup)
    covered, wanted = total(in_disk), total(in_dedup)
    same = bool(in_dedup) and in_nbd == in_dedup and covered == wanted
    note = ""
    if in_nbd != in_dedup:
        note = COPIED
    elif covered == 0:
        note = (
            f"the device has not been written from there within {DESTAGE_S:g} s: stored already, zeros, or overwritten"
        )
    elif covered < wanted:
        rest = "the rest was stored already, or is part of ragged blocks"
        note = f"{covered} of {wanted} bytes went to the device from there; {rest}"
    return describe(path, device, same, note, in_dedup)


def read_of(messages: Sequence[Message], identity: int) -> dict[str, Any]:
    """One read: hops, and whether the data lay at one and the same place from where it came to nic."""
    path = [m for m in messages if m.identity == identity and m.peer not in STORAGE and m.domain not in STORAGE]
    data = ranges_of(path, "nbd", (DONE,))
    in_nic = intersect(ranges_of(path, "nic", (REPLY,)), data)
    # What lies in a driver's memory was read by it, now or before.
    from_device = [r for r in data if owner(r[0]) in STORAGE]
    asked_ns = min((m.time_ns for m in path if m.domain == "dedup"), default=0)
    device = device_hops(messages, IO_READ, from_device, asked_ns)
    in_disk = intersect([r for m in device if m.received and m.opcode == IO_READ for r in m.ranges], from_device)
    same = bool(data) and in_nic == data
    if not data:
        note = "no data: the block is a hole, or the read failed"
    elif not in_nic and all(owner(r[0]) == "dedup" for r in data):
        note = "a hole, answered as one: there is no data to follow"
    elif in_nic != data:
        note = "nbd and nic saw different places"
    elif not from_device:
        where = sorted({owner(r[0]) for r in data})
        note = f"answered from memory of {', '.join(where)}: the write log, or zeros"
    elif not in_disk:
        note = f"answered from the read cache, which lies in memory of {owner(from_device[0][0])}"
    elif total(in_disk) < total(data):
        note = f"{total(in_disk)} of {total(data)} bytes were read from the device now, the rest lay in memory"
    else:
        note = ""
    return describe(path, device, same, note, data)


def device_hops(messages: Sequence[Message], opcode: int, ranges: list[Range], after_ns: int) -> list[Message]:
    """What went to a storage driver about these places from `after_ns` on, with its completion."""
    found = []
    identities: dict[tuple[str, int], int] = {}
    for message in messages:
        if message.time_ns < after_ns:
            continue
        pair = (message.domain, message.identity)
        if message.opcode == opcode and intersect(message.ranges, ranges):
            identities[pair] = message.time_ns
            found.append(message)
        elif message.opcode == IO_DONE and pair in identities:
            found.append(message)
            del identities[pair]
    return found


def describe(
    path: Sequence[Message], device: Sequence[Message], same: bool, note: str, payload: list[Range]
) -> dict[str, Any]:
    """The document: `offset`, `length`, `hops`, `same_address`, `note`."""
    asked = [m for m in path if m.domain == "dedup" and m.received and m.opcode in (READ, WRITE)]
    hops: list[dict[str, Any]] = []
    before = min(m.time_ns for m in path)
    for message in causal(sorted([*path, *device], key=lambda m: m.time_ns)):
        # What a message refers to besides the payload (headers of replies) is not the payload.
        ranges = intersect(message.ranges, payload) if payload else []
        hops.append(
            {
                "domain": message.domain,
                "incarnation": None,
                "message": MESSAGES.get(message.opcode, str(message.opcode)),
                "direction": "received" if message.received else "sent",
                "peer": message.peer,
                "address": ranges[0][0] if ranges else None,
                "length": total(ranges),
                "runs": len(ranges),
                "since_last_us": round(max(0, message.time_ns - before) / 1000, 3),
            }
        )
        before = max(before, message.time_ns)
    return {
        "identity": path[0].identity,
        "offset": min(m.words[0] for m in asked),
        "length": sum({m.words[0]: m.words[1] for m in asked}.values()),
        "volume": asked[0].halves(4),
        "hops": hops,
        "same_address": same,
        "note": note,
    }


def causal(messages: list[Message]) -> list[Message]:
    """A domain may note a message when it has dealt with it, just behind what it sent in consequence: cause first."""
    ordered = list(messages)
    for index in range(1, len(ordered)):
        sent, received = ordered[index - 1], ordered[index]
        at_once = received.time_ns - sent.time_ns < AT_ONCE_NS
        if received.received and not sent.received and sent.domain == received.domain and at_once:
            ordered[index - 1 : index + 1] = received, sent
    return ordered


def ranges_of(messages: Iterable[Message], domain: str, opcodes: tuple[int, ...]) -> list[Range]:
    return join([r for m in messages if m.domain == domain and m.received and m.opcode in opcodes for r in m.ranges])


def join(ranges: Iterable[Range]) -> list[Range]:
    """The same places, in order and without overlap."""
    joined: list[Range] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(high, joined[-1][1])
        else:
            joined.append((low, high))
    return joined


def intersect(some: Iterable[Range], others: Sequence[Range]) -> list[Range]:
    return join([(max(a, c), min(b, d)) for a, b in some for c, d in others if max(a, c) < min(b, d)])


def total(ranges: Iterable[Range]) -> int:
    return sum(high - low for low, high in ranges)


def owner(address: int) -> str:
    """The role in whose arena an address lies."""
    return ROLES.get((address - MAP_BASE) // MAP_STRIDE, "?")


# --- The running server ---------------------------------------------------------------------------------------------


def follow(
    client: Client, volume: str | None, timeout_s: float, wanted: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """A document with `write` and `read`, as far as wanted. Raises NoAnswer if none came in time."""
    names = {entry["id"]: entry["name"] for entry in client.call("volume-list")["volumes"]}
    volume_id = next((number for number, name in names.items() if name == volume), None)
    if volume is not None and volume_id is None:
        raise Refused(f"no volume {volume!r}")
    armed = client.call("trace", action="arm", timeout_s=timeout_s + DESTAGE_S)
    found: dict[str, Any] = {}
    try:
        for kind in wanted:
            say(f"waiting for a {kind} (at most {timeout_s:g} s)")
            found[kind] = wait_for(client, kind, volume_id, timeout_s)
    finally:
        with contextlib.suppress(ControlError):
            client.call("trace", action="disarm", trace=armed.get("trace"))
    for document in found.values():
        document["volume"] = names.get(document["volume"], document["volume"])
    return {kind: found[kind] for kind in wanted}


def wait_for(client: Client, kind: str, volume_id: int | None, timeout_s: float) -> dict[str, Any]:
    opcode, build = (WRITE, write_of) if kind == "write" else (READ, read_of)
    deadline = time.monotonic() + timeout_s
    kept: list[Message] = []
    newest: dict[str, int] = {}  # record of each domain that was seen
    doubtful: set[int] = set()  # requests that had begun when records were overwritten before they were seen
    passed: dict[int, dict[str, Any]] = {}  # those of them that were given up
    following: tuple[int, float] | None = None  # a request, and since when it is the first one that is answered
    while True:
        fresh, incarnations = collect(client)
        if overwritten(fresh, newest):
            doubtful.update(requests(kept, opcode, volume_id))
        newest |= {m.domain: m.time_ns for m in fresh}
        known = {(m.domain, m.time_ns, m.identity, m.opcode) for m in kept}
        kept += [m for m in fresh if (m.domain, m.time_ns, m.identity, m.opcode) not in known]
        kept.sort(key=lambda message: message.time_ns)
        identities = [i for i in requests(kept, opcode, volume_id) if i not in passed]
        done = next((i for i in identities if answered(kept, i) and whole(kept, i, opcode)), None)
        now = time.monotonic()
        if done is not None:
            if following is None or following[0] != done:
                following = done, now
            document = build(kept, done)
            sure = kind == "read" or document["same_address"]
            old = kept[-1].time_ns - min(m.time_ns for m in kept if m.identity == done) > DOUBT_NS
            if not sure and done in doubtful and old and document["note"] != COPIED:
                document["note"] += "; or its record was overwritten before it was seen: there is too much going on"
                passed[done] = document
                identities.remove(done)
            elif sure or now - following[1] > DESTAGE_S:
                return with_incarnations(document, incarnations)
        if now >= deadline and (done is None or done in passed):
            if passed:
                return with_incarnations(passed.popitem()[1], incarnations)
            raise NoAnswer(f"no {kind} seen in {timeout_s:g} s: let a client {kind} something")
        # Under load records are many, and each domain keeps the last few thousand: the first requests, what has gone to
        # a device since they began, and what may belong to a request still on its way.
        first = set(identities[:CANDIDATES])
        recent_ns = kept[-1].time_ns - RECENT_NS if kept else 0
        begun_ns = min((m.time_ns for m in kept if m.identity in first), default=recent_ns)
        kept = [
            m
            for m in kept
            if m.identity in first or m.time_ns >= recent_ns or (m.opcode in IO_OPCODES and m.time_ns >= begun_ns)
        ]
        time.sleep(POLL_S)


def overwritten(fresh: Iterable[Message], newest: dict[str, int]) -> bool:
    """Whether a domain's records have come round since the last look: the newest one of then is not there any more."""
    oldest: dict[str, int] = {}
    for message in fresh:
        oldest.setdefault(message.domain, message.time_ns)
    return any(oldest.get(domain, 0) > time_ns for domain, time_ns in newest.items())


def with_incarnations(document: dict[str, Any], incarnations: dict[str, int]) -> dict[str, Any]:
    for hop in document["hops"]:
        hop["incarnation"] = incarnations.get(hop["domain"])
    return document


def collect(client: Client) -> tuple[list[Message], dict[str, int]]:
    """All messages recorded since the trace was armed, as far as still there, and each domain's incarnation."""
    domains = client.call("trace", action="collect")["domains"]
    messages = [message for name, entry in domains.items() for message in parse(name, entry["records"])]
    return messages, {name: entry["incarnation"] for name, entry in domains.items()}
