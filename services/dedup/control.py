"""Control calls of dedup, as the kernel passes them on.

    status                                      figures: logical and stored bytes, space, write log, read cache
    volume-list                                 {"volumes": [...]}
    volume-create   name, size_bytes, read_only, threshold, tier_threshold   thresholds: 0 or nothing is the default
    volume-set      name, threshold, tier_threshold   0 or nothing leaves one as it is
    volume-resize   name, size_bytes            up only
    volume-delete   name, force                 refused while a connection uses it, unless forced
    flush                                       all that is logged goes to stable storage
    check                                       recounts everything: {"inconsistencies": [...], "count": n}
    map             name, first, count          where blocks lie: {"values": count words of 64 bits, little-endian,
                                                see enum map_kind in store.h, "fast": a byte each, 1 if it is read
                                                from the fast tier}; at most MAP_BLOCKS at a time
    scrub-..., du-...                           background jobs: jobs.py
    stop                                        destages all, closes the store

A volume call is answered when its change is on stable storage.

After a crash: the change and the number of the call that made it are one transaction. A repeat of that number only
waits for stable storage again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from atoll.ipc.runtime import CallError, Context
from atoll.services.dedup import jobs
from atoll.services.dedup._dedup import ffi, lib

BLOCK_BYTES = 4096
TEXT_BYTES = 65536
MAP_BLOCKS = 8192  # 64 KiB, a quarter of what an answer may have
TIER_STATES = ("off", "starting", "formatting", "loading", "online", "away", "refused")  # enum tier_state
STATES = {0: "free", 1: "ready", 2: "deleting"}  # enum atoll_volume_state
MAP_S = 5.0
FLUSH_S = 30.0
CHECK_S = 8.0  # clients wait meanwhile, and the command for ten
STOP_S = 120.0


class Control:
    """The handlers of one incarnation."""

    def __init__(self, context: Context, state: Any) -> None:
        self._context, self._state = context, state
        self.handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "status": self.status,
            "volume-list": self.volume_list,
            "volume-create": self.volume_create,
            "volume-set": self.volume_set,
            "volume-resize": self.volume_resize,
            "volume-delete": self.volume_delete,
            "flush": self.flush,
            "check": self.check,
            "map": self.map,
            "stop": self.stop,
            **jobs.handlers(state),
        }

    # --- Looking ----------------------------------------------------------------------------------------------------

    def status(self, call: dict[str, Any]) -> dict[str, Any]:
        figures = ffi.new("struct dedup_figures *")
        lib.dedup_figures(self._state, figures)
        logical = sum(volume["mapped_bytes"] for volume in self._volumes())
        references, stored = int(figures.references), int(figures.stored_blocks)
        return {
            "logical_bytes": logical,
            "stored_bytes": stored * BLOCK_BYTES,
            "shared_bytes": max(references - stored, 0) * BLOCK_BYTES,
            "ratio": round(references / stored, 4) if stored and references else 1.0,
            "space": {
                "device_bytes": int(figures.device_blocks) * BLOCK_BYTES,
                "metadata_bytes": int(figures.metadata_blocks) * BLOCK_BYTES,
                "metadata_used_bytes": int(figures.metadata_used_blocks) * BLOCK_BYTES,
                "free_bytes": int(figures.free_blocks) * BLOCK_BYTES,
                "pending_free_bytes": int(figures.pending_free_blocks) * BLOCK_BYTES,
                "reserved_bytes": int(figures.reserved_blocks) * BLOCK_BYTES,
                "available_bytes": int(figures.available_blocks) * BLOCK_BYTES,
                "zero_promise_bytes": int(figures.zero_promises) * BLOCK_BYTES,
                "quarantined_bytes": int(figures.quarantined_blocks) * BLOCK_BYTES,
            },
            "log": {
                "used_bytes": int(figures.log_records) * BLOCK_BYTES,
                "capacity_bytes": int(figures.nic_pages + figures.merge_pages) * BLOCK_BYTES,
                "merge_free_bytes": int(figures.merge_free) * BLOCK_BYTES,
                "failed_blocks": int(figures.failed_records),
                "pinned_blocks": int(figures.pinned_records),
                "runs": int(figures.active_runs),
                "sync_failures": int(figures.sync_failures),
            },
            "cache": {
                "capacity_bytes": int(figures.cache_pages) * BLOCK_BYTES,
                "valid_bytes": int(figures.cache_valid) * BLOCK_BYTES,
                "loading_blocks": int(figures.cache_loading),
                "pinned_blocks": int(figures.cache_pinned),
            },
            "scrub": jobs.scrub(self._state),
            "metadata_cache": {
                "capacity_bytes": int(figures.metadata_cache_pages) * BLOCK_BYTES,
                "held_bytes": int(figures.metadata_cache_held) * BLOCK_BYTES,
                "dirty_bytes": int(figures.metadata_cache_dirty) * BLOCK_BYTES,
            },
            "tier": self._tier(figures),
            "requests": {
                "accepted": int(figures.accepted),
                "waiting": int(figures.waiting),
                "flushing": int(figures.flushing),
            },
        }

    def _tier(self, figures: Any) -> dict[str, Any] | None:
        if not figures.tier_places:
            return None
        return {
            "state": TIER_STATES[figures.tier_state],
            "reason": ffi.string(lib.dedup_tier_reason(self._state)).decode(errors="replace"),
            "capacity_bytes": int(figures.tier_places) * BLOCK_BYTES,
            "used_bytes": int(figures.tier_used) * BLOCK_BYTES,
            "queued_blocks": int(figures.tier_queued),
            "copying_blocks": int(figures.tier_copies),
            "in_flight": int(figures.tier_in_flight),
            "table_pages_loaded": int(figures.tier_loaded),
            "table_pages": int(figures.tier_table_blocks),
        }

    def volume_list(self, call: dict[str, Any]) -> dict[str, Any]:
        return {"volumes": self._volumes()}

    def check(self, call: dict[str, Any]) -> dict[str, Any]:
        text = ffi.new("char[]", TEXT_BYTES)
        deadline = time.monotonic() + CHECK_S
        while (count := int(lib.dedup_check(self._state, text, TEXT_BYTES))) == lib.DEDUP_CHECK_WAITS:
            lib.dedup_check_turn(self._state, True)
            if time.monotonic() > deadline:
                lib.dedup_check_cancel(self._state)
                raise CallError(
                    f"the store is too large to be checked within {CHECK_S:g} s, while clients wait: "
                    "atoll stop, then atoll check"
                )
        lines = ffi.string(text).decode(errors="replace").splitlines()
        return {"inconsistencies": lines, "count": count}

    def map(self, call: dict[str, Any]) -> dict[str, Any]:
        volume, first, count = self._find(_text(call, "name")), call.get("first"), _number(call, "count")
        blocks = int(lib.dedup_volume(self._state, volume).size_bytes) // BLOCK_BYTES
        if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first < blocks:
            raise CallError(f"first is {first!r}: no block of the volume, which has {blocks}")
        if count > min(MAP_BLOCKS, blocks - first):
            raise CallError(f"count is {count}: at most {min(MAP_BLOCKS, blocks - first)} blocks can be asked for here")
        values = ffi.new("uint64_t[]", count)
        deadline_ns = time.monotonic_ns() + int(MAP_S * 1e9)
        fast = ffi.new("uint8_t[]", count)
        reached = lib.dedup_map(self._state, volume, first, count, values, fast, deadline_ns)
        if reached != lib.DEDUP_REASON_REACHED:
            why = (
                "in time"
                if reached == lib.DEDUP_REASON_TIMEOUT
                else "from the device: its page is damaged in both copies"
            )
            raise CallError(f"the map of {count} blocks from {first} on cannot be read {why}")
        return {"values": bytes(ffi.buffer(values)), "fast": bytes(ffi.buffer(fast))}

    def _volumes(self) -> list[dict[str, Any]]:
        found = []
        for number in range(lib.ATOLL_VOLUME_COUNT):
            volume = lib.dedup_volume(self._state, number)
            if volume.state == lib.ATOLL_VOLUME_FREE:
                continue
            found.append(
                {
                    "id": number,
                    "generation": int(volume.generation),
                    "name": bytes(ffi.buffer(volume.name, volume.name_bytes)).decode(errors="replace"),
                    "state": STATES.get(volume.state, str(volume.state)),
                    "size_bytes": int(volume.size_bytes),
                    "mapped_bytes": int(volume.mapped_blocks) * BLOCK_BYTES,
                    "read_only": bool(volume.flags & lib.ATOLL_VOLUME_READONLY),
                    "threshold": int(volume.threshold),
                    "tier_threshold": int(volume.tier_threshold),
                    "created_s": int(volume.created_s),
                }
            )
        return found

    # --- Changing ---------------------------------------------------------------------------------------------------

    def volume_create(self, call: dict[str, Any]) -> dict[str, Any]:
        name, size_bytes = _text(call, "name"), _number(call, "size_bytes")
        flags = lib.ATOLL_VOLUME_READONLY if call.get("read_only") else 0
        threshold, tier_threshold = _thresholds(call)
        data = name.encode()
        return self._change(
            lambda number, reason: lib.dedup_volume_create(
                self._state, data, len(data), size_bytes, flags, threshold, tier_threshold, number, reason
            ),
            f"volume {name!r} cannot be made",
        )

    def volume_set(self, call: dict[str, Any]) -> dict[str, Any]:
        name, (threshold, tier_threshold) = _text(call, "name"), _thresholds(call)
        if self._repeated():
            return self._durable()
        volume = self._find(name)
        return self._change(
            lambda number, reason: lib.dedup_volume_set(self._state, volume, threshold, tier_threshold, number, reason),
            f"volume {name!r} cannot be changed",
        )

    def volume_resize(self, call: dict[str, Any]) -> dict[str, Any]:
        name, size_bytes = _text(call, "name"), _number(call, "size_bytes")
        if self._repeated():
            return self._durable()
        volume = self._find(name)
        return self._change(
            lambda number, reason: lib.dedup_volume_resize(self._state, volume, size_bytes, number, reason),
            f"volume {name!r} cannot be resized",
        )

    def volume_delete(self, call: dict[str, Any]) -> dict[str, Any]:
        name = _text(call, "name")
        if self._repeated():
            return self._durable()
        volume = self._find(name)
        users = int(lib.dedup_volume_users(self._state, volume))
        if users and not call.get("force"):
            raise CallError(f"volume {name!r} is in use by {users} connection{'s' if users > 1 else ''}")
        return self._change(
            lambda number, reason: lib.dedup_volume_delete(self._state, volume, number, reason),
            f"volume {name!r} cannot be deleted",
        )

    def _find(self, name: str) -> int:
        for volume in self._volumes():
            if volume["name"] == name and volume["state"] == "ready":
                return int(volume["id"])
        raise CallError(f"there is no volume {name!r}")

    def _repeated(self) -> bool:
        """The call that is being answered has been carried out by a predecessor that died before it could say so."""
        return self._context.call_number != 0 and int(lib.dedup_last_call(self._state)) == self._context.call_number

    def _change(self, change: Callable[[int, Any], int], what: str) -> dict[str, Any]:
        if not self._repeated():
            reason = ffi.new("char[256]")
            status = change(self._context.call_number, reason)
            if status != lib.ATOLL_OK:
                raise CallError(f"{what}: {ffi.string(reason).decode(errors='replace')}")
        return self._durable()

    def _durable(self) -> dict[str, Any]:
        """From here on the call's change is committed: no exception may say that it was not."""
        return self._until(lib.DEDUP_GOAL_SYNC, FLUSH_S, "the change is made but not on stable storage yet")

    def _until(self, goal: int, seconds: float, text: str) -> dict[str, Any]:
        """Requests go on being served meanwhile."""
        deadline_ns = time.monotonic_ns() + int(seconds * 1e9)
        reached = lib.dedup_run(self._state, goal, deadline_ns)
        if reached == lib.DEDUP_REASON_REACHED:
            return {}
        if reached == lib.DEDUP_REASON_UNFLUSHED:
            text += ": a page in the write log is not what was acknowledged"
        return {"ok": False, "error": text}

    def flush(self, call: dict[str, Any]) -> dict[str, Any]:
        return self._until(lib.DEDUP_GOAL_DRAIN, float(call.get("timeout_s", FLUSH_S)), "not all could be written")

    def stop(self, call: dict[str, Any]) -> dict[str, Any]:
        seconds = float(call.get("timeout_s", STOP_S))
        return self._until(lib.DEDUP_GOAL_CLOSE, seconds, "not all that was acknowledged could be written out")


def _text(call: dict[str, Any], key: str) -> str:
    value = call.get(key)
    if not isinstance(value, str) or not value:
        raise CallError(f"{key} is missing or no text")
    return value


def _thresholds(call: dict[str, Any]) -> tuple[int, int]:
    found = []
    for key, most in (("threshold", lib.ATOLL_THRESHOLD_MAX), ("tier_threshold", lib.ATOLL_TIER_THRESHOLD_MAX)):
        value = call.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise CallError(f"{key} is {value!r}, not a whole number from 1 to {most}")
        found.append(value)
    return found[0], found[1]


def _number(call: dict[str, Any], key: str) -> int:
    value = call.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
        raise CallError(f"{key} is missing or no positive number")
    return value
