"""dedup: the domain that keeps volumes: block map, write log, read cache, sharing of equal blocks, placement.

- `COUNTERS`, `plan(config)`, `main(context)`: what the kernel needs of a domain (docs/domains.md, section 2).
- Control calls: see control.py.

Requests, destage and the store are C's (datapath.h, store.h); Python opens the arena, has the store loaded or made, and
answers control calls.

After a crash: the state lies in the arena. A store that was being loaded is loaded anew; nothing else is read again.
"""

from __future__ import annotations

import signal
import uuid
from typing import Any

from atoll.ipc.runtime import Context
from atoll.services.dedup import jobs
from atoll.services.dedup._dedup import ffi, lib
from atoll.services.dedup.control import Control

COUNTERS: tuple[str, ...] = (
    *("reads", "read_bytes", "writes", "write_bytes", "flushes", "trims", "zeros", "extents", "prefetches", "errors"),
    *("repeats", "waits", "bad_requests", "bad_completions", "poisoned", "copied_between_bytes", "copied_inside_bytes"),
    *("cache_hits", "cache_misses", "cache_evictions", "corrupt_reads", "corrupt_pages"),
    *("destaged_blocks", "shared_blocks", "zero_blocks", "superseded_blocks", "runs", "destage_errors"),
    *("compare_mismatches", "match_skipped", "given_back_pages", "io_submitted", "io_errors", "steps", "sweeps"),
    *("flush_failures", "threshold_blocks", "held_back_blocks"),
    *("tier_read_blocks", "tier_copied_blocks", "tier_shared_blocks", "tier_evictions", "tier_kept_out"),
    *("tier_skipped", "tier_mismatches", "tier_read_errors", "tier_aways"),
    *("posted_adopted", "ahead_read_blocks", "ahead_used_blocks", "posted_lost"),
    *(f"reserved_{number}" for number in range(lib.DEDUP_COUNTER_DATAPATH_COUNT, 64)),
    *("syncs", "sync_failures", "log_blocks", "checkpoints", "pages_written", "pages_repaired", "store_io_errors"),
    *("leaves_made", "fingerprint_evictions", "log_blocks_dropped", "syncs_ahead"),
)

# Signals that a process brings upon itself (DESIGN, I8); SIGKILL from outside is nobody's fault.
CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})

BLOCK_BYTES = 4096
STORE_READY, STORE_BLANK, STORE_FAILED = 2, 3, 4  # enum store_state


def plan(config: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the role's area and of the buffers (merge pages, zeros). ValueError says which setting is wrong."""
    sizes = _sizes(config)
    return int(lib.dedup_role_bytes(sizes)), int(lib.dedup_buffer_bytes(sizes))


def main(context: Context) -> None:
    """Serves until it is told to stop. The context's arena is writable and rolled back."""
    state = _open(context)
    _load(context, state)
    control = Control(context, state)
    path_cpu = context.config.get("kernel", {}).get("path_cpu")
    if path_cpu is not None:
        lib.dedup_set_places(state, path_cpu, sorted(context.processors), len(context.processors))
    context.serving()
    while not context.stopping:
        reason = lib.dedup_run(state, lib.DEDUP_GOAL_SERVE, 0)
        if reason == lib.ATOLL_REASON_CONTROL:
            context.serve_control(control.handlers)
        elif reason == lib.DEDUP_REASON_TELL:
            jobs.tell(context, state)


def _sizes(config: dict[str, Any]) -> Any:
    dedup = config["dedup"]
    sizes = ffi.new("struct dedup_config *")
    sizes.nic_pages = config["nic"]["buffer_bytes"] // BLOCK_BYTES
    sizes.merge_pages = dedup["merge_buffer_bytes"] // BLOCK_BYTES
    sizes.cache_pages = config["disk"]["cache_bytes"] // BLOCK_BYTES
    sizes.device_blocks = config["device_bytes"] // BLOCK_BYTES
    sizes.metadata_frames = dedup["metadata_cache_bytes"] // BLOCK_BYTES
    sizes.grow = bool(config.get("grow", False))
    sizes.fingerprint_slots = dedup["fingerprint_entries"]
    sizes.log_blocks = dedup.get("metadata_log_bytes", 0) // BLOCK_BYTES
    sizes.destage_delay_ms = dedup["destage_delay_ms"]
    sizes.posted_blocks = dedup.get("posted_blocks", 0)
    if config.get("fast_device_bytes"):
        fast_blocks = config["fast_device_bytes"] // BLOCK_BYTES
        sizes.tier_places = lib.dedup_tier_places(fast_blocks, dedup["tier_entries"])
        sizes.tier_pages = config["llrrm"]["cache_bytes"] // BLOCK_BYTES
    sizes.track_blocks = dedup["track_bytes"] // BLOCK_BYTES
    if sizes.track_blocks < lib.ATOLL_THRESHOLD_MAX:
        raise ValueError(f"dedup.track_bytes is {dedup['track_bytes']}, at least 256 KiB are needed")
    if sizes.posted_blocks > lib.ATOLL_POSTED_BLOCKS:
        raise ValueError(
            f"dedup.posted_blocks is {sizes.posted_blocks}, at most {lib.ATOLL_POSTED_BLOCKS} are possible"
        )
    if sizes.metadata_frames < 512:
        raise ValueError(f"dedup.metadata_cache_bytes is {dedup['metadata_cache_bytes']}, at least 2 MiB are needed")
    if sizes.cache_pages < 512:
        raise ValueError(f"disk.cache_bytes is {config['disk']['cache_bytes']}, at least 2 MiB are needed")
    if sizes.merge_pages < 16:
        raise ValueError(f"dedup.merge_buffer_bytes is {dedup['merge_buffer_bytes']}, at least 64 KiB are needed")
    if sizes.nic_pages < 256:
        raise ValueError(f"nic.buffer_bytes is {config['nic']['buffer_bytes']}, at least 1 MiB is needed")
    if sizes.fingerprint_slots < 1024 or sizes.fingerprint_slots & (sizes.fingerprint_slots - 1):
        raise ValueError(f"dedup.fingerprint_entries is {sizes.fingerprint_slots}, not a power of two from 1024 on")
    return sizes


def _open(context: Context) -> Any:
    error = ffi.new("char[256]")
    try:
        sizes = _sizes(context.config)
    except ValueError as wrong:
        context.fail(str(wrong))
    crashed = context.previous_signal in CRASHES
    quarantine = bool(context.config.get("device_quarantine", False))
    domain = ffi.cast("struct atoll_domain *", int(context.ffi.cast("uintptr_t", context.domain)))
    state = lib.dedup_open(domain, sizes, context.fresh, context.adopted, crashed, quarantine, error)
    if state == ffi.NULL:
        context.fail(ffi.string(error).decode(errors="replace"))
    return state


def _load(context: Context, state: Any) -> None:
    """Has the store read from the device, or made on a blank one; at a takeover it is there already."""
    while (found := lib.dedup_store_state(state)) != STORE_READY:
        if found == STORE_BLANK:
            identity = uuid.uuid4().int
            lib.dedup_format(state, identity & (1 << 64) - 1, identity >> 64)
        elif found == STORE_FAILED:
            context.fail(ffi.string(lib.dedup_store_reason(state)).decode(errors="replace"))
        lib.dedup_run(state, lib.DEDUP_GOAL_LOAD, 0)
