"""Control calls of dedup about its background jobs: the scrub, and what volumes cost.

    scrub-start   rate_bytes_s (0: no limit)    begins one, or joins the one that runs; the answer is as of scrub-status
    scrub-status                                progress, or the result of the last one; see `scrub`
    scrub-cancel
    du-start                                    {"number": n}; a run before it is given up
    du-status                                   {"number", "running", "done", "volumes": [...], "total": {...}}

After a crash: a scrub goes on in the successor. A du is gone, and its number with it: who asked asks again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from atoll.ipc.runtime import CallError, Context
from atoll.services.dedup._dedup import ffi, lib

BLOCK_BYTES = 4096
SCRUB_STATES = {0: "never", 1: "data", 2: "metadata", 3: "referrers", 4: "done", 5: "cancelled"}  # enum scrub_state
RATE_MAX = 1 << 40


def handlers(state: Any) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    def start(call: dict[str, Any]) -> dict[str, Any]:
        rate = call.get("rate_bytes_s", 0)
        if not isinstance(rate, int) or isinstance(rate, bool) or not 0 <= rate <= RATE_MAX or 0 < rate < BLOCK_BYTES:
            raise CallError(f"rate_bytes_s is {rate!r}: 0, or {BLOCK_BYTES} to {RATE_MAX} bytes a second")
        lib.dedup_scrub_start(state, rate)
        return scrub(state)

    def cancel(call: dict[str, Any]) -> dict[str, Any]:
        lib.dedup_scrub_cancel(state)
        return scrub(state)

    def du_start(call: dict[str, Any]) -> dict[str, Any]:
        number = ffi.new("uint64_t *")
        if lib.dedup_du_start(state, number) != lib.ATOLL_OK:
            raise CallError("no memory to count with")
        return {"number": int(number[0])}

    return {
        "scrub-start": start,
        "scrub-status": lambda call: scrub(state),
        "scrub-cancel": cancel,
        "du-start": du_start,
        "du-status": lambda call: usage(state),
    }


def tell(context: Context, state: Any) -> None:
    """Tells the kernel of damaged places, for the log, and of a scrub that has ended, to be kept. What does not fit the
    ring is dropped; a successor tells of the last scrub again."""
    seen = ffi.new("struct dedup_seen *")
    while lib.dedup_take_damage(state, seen):
        if seen.status == lib.ATOLL_EPOISON:
            what = "dedup crashed twice while it stored a block: kept in memory until it is written again; FLUSH fails"
            fields: dict[str, Any] = {}
        else:
            fault = "is not what was stored" if seen.status == lib.ATOLL_ECORRUPT else "cannot be read"
            what, fields = f"a block on the device {fault}", {"pba": int(seen.pba)}
        if seen.volume < lib.ATOLL_VOLUME_COUNT:
            fields |= {"volume": name_of(state, seen.volume), "lba": int(seen.lba)}
        if seen.dropped:
            fields["more"] = int(seen.dropped)
        context.event(what, **fields)
    if lib.dedup_scrub_untold(state):
        found = scrub(state)
        del found["damaged"], found["rate_bytes_s"], found["number"]
        context.event("scrub-ended", **found)
    context.lib.atoll_domain_commit(context.domain)


def name_of(state: Any, volume: int) -> str:
    entry = lib.dedup_volume(state, volume)
    return bytes(ffi.buffer(entry.name, entry.name_bytes)).decode(errors="replace")


def scrub(state: Any) -> dict[str, Any]:
    """Bytes and Unix times. `damaged`: the first of them, with the first places in volumes that refer to each."""
    its = ffi.new("struct dedup_scrub *")
    lib.dedup_scrub(state, its)
    damaged: list[dict[str, Any]] = []
    one = ffi.new("struct dedup_damage *")
    while lib.dedup_scrub_damage(state, len(damaged), one):
        count = int(one.referrer_count)
        damaged.append(
            {
                "pba": int(one.pba),
                "text": "is not what was stored" if one.status == lib.ATOLL_ECORRUPT else "cannot be read",
                "referrer_count": count,
                "referrers": [
                    {"volume": name_of(state, one.volume[number]), "lba": int(one.lba[number])}
                    for number in range(min(count, len(one.lba)))
                ],
            }
        )
    return {
        "number": int(its.number),
        "state": SCRUB_STATES.get(its.state, str(its.state)),
        "rate_bytes_s": int(its.rate_bytes_s),
        "started_s": int(its.started_s) or None,
        "ended_s": int(its.ended_s) or None,
        "stored_bytes": int(its.stored_blocks) * BLOCK_BYTES,
        "verified_bytes": int(its.verified_blocks) * BLOCK_BYTES,
        "changed_bytes": int(its.changed_blocks) * BLOCK_BYTES,
        "damaged_count": int(its.damaged_count),
        "damaged": damaged,
        "verified_pages": int(its.verified_pages),
        "repaired_pages": int(its.repaired_pages),
        "lost_pages": int(its.lost_pages),
    }


def usage(state: Any) -> dict[str, Any]:
    its = ffi.new("struct du_state *")
    lib.dedup_du(state, its)
    volumes = []
    total = dict.fromkeys(("mapped", "alone", "shared", "freed"), 0)
    for number in range(lib.ATOLL_VOLUME_COUNT):
        entry = lib.dedup_volume(state, number)
        if entry.state != lib.ATOLL_VOLUME_READY:
            continue
        row = its.volumes[number]
        figures = {"mapped": row.mapped, "alone": row.alone, "shared": row.shared, "freed": row.alone - row.shared}
        volumes.append({"name": name_of(state, number), **{f"{key}_bytes": int(its_) * BLOCK_BYTES
                                                           for key, its_ in figures.items()}})  # fmt: skip
        for key, value in figures.items():
            total[key] += int(value)
    leaves = max(1, int(its.leaves))
    share = int(its.windows_done) + min(1.0, int(its.leaves_done) / leaves) if its.running else int(its.windows)
    return {
        "number": int(its.number),
        "running": bool(its.running),
        "done": round(share / max(1, int(its.windows)), 4),
        "lost_leaves": int(its.lost_leaves),
        "volumes": volumes,
        "total": {f"{key}_bytes": value * BLOCK_BYTES for key, value in total.items()},
    }
