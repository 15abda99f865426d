"""Which processors a domain may run on.

- `cores(config, role, allowed)`   those of the role, or None: wherever the process may run
- `usable(config, allowed)`        those of `allowed` on which Atoll may run
- `settle(config, role)`           lets this process run there and nowhere else
- `check(config)`                  raises BootError where the configuration names processors that cannot be used
- `choose(config, instance)`       which processor the data path shares: init's, once, into `config`

A request crosses the domains of the data path one after the other, so where processors are few these share one: to hand
a message over on it is a switch of 2 µs, while an idle processor, above all a virtual one, takes some 30 µs to wake.
Storage drivers work beside the path, on any processor, but for reads that clients wait for: drivers/disk/place.c. And
dedup leaves the path's while it has large writes to do: services/dedup/place.c. Where
there are more than FEW processors the scheduler decides.

Which one it is, is chosen at the start: that with the least to do, and by lot where several have as little, so that
several servers on a machine do not all take the same.

What the process was allowed when it was made (taskset, cpusets of a container) is never exceeded.
"""

import logging
import os
import time
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from atoll.kernel.instance import EXIT_CONFIG, BootError

log = logging.getLogger("atoll")

PATH = ("nic", "nbd", "dedup")
SAMPLE_S = 0.05
NOISE_TICKS = 1  # of 10 ms each
FEW = 3  # with 4 and more the path's domains and a client can have one each


def usable(config: Mapping[str, Any], allowed: Set[int]) -> frozenset[int]:
    return frozenset(allowed & set(config["kernel"].get("cpus") or allowed))


def cores(config: Mapping[str, Any], role: str, allowed: Set[int]) -> frozenset[int] | None:
    kernel, those = config["kernel"], usable(config, allowed)
    if not those:
        return None
    if _together(kernel, len(those)) and role in PATH:
        chosen = kernel.get("path_cpu")
        return frozenset([chosen if chosen in those else max(those)])
    return those if kernel.get("cpus") else None


def _together(kernel: Mapping[str, Any], count: int) -> bool:
    placement = kernel.get("placement", "none")
    return bool(placement == "together" or (placement == "auto" and count <= FEW))


def settle(config: Mapping[str, Any], role: str) -> None:
    allowed = os.sched_getaffinity(0)
    wanted = cores(config, role, allowed)
    if wanted is None or wanted == allowed:
        return
    try:
        os.sched_setaffinity(0, wanted)
    except OSError as error:  # a cpuset has just changed: the scheduler decides
        log.warning("%s: cannot be bound to processors %s: %s", role, sorted(wanted), error.strerror)


def _idle_ticks() -> dict[int, int]:
    """Processor → clock ticks that it has been idle; empty where that cannot be read."""
    found = {}
    try:
        for line in Path("/proc/stat").read_text().splitlines():
            if line.startswith("cpu") and line[3].isdigit():
                fields = line.split()
                found[int(fields[0][3:])] = int(fields[4]) + int(fields[5])
    except (OSError, ValueError, IndexError):
        return {}
    return found


def choose(config: dict[str, Any], instance: int) -> None:
    """`instance`: the run's random number. Looks at the processors for SAMPLE_S."""
    allowed = sorted(os.sched_getaffinity(0) & set(config["kernel"].get("cpus") or range(os.cpu_count() or 1)))
    if len(allowed) < 2 or not _together(config["kernel"], len(allowed)):
        return
    before = _idle_ticks()
    time.sleep(SAMPLE_S)
    after = _idle_ticks()
    idle = {cpu: after.get(cpu, 0) - before.get(cpu, 0) for cpu in allowed}
    best = [cpu for cpu in allowed if idle[cpu] >= max(idle.values()) - NOISE_TICKS]
    config["kernel"]["path_cpu"] = best[(instance >> 1) % len(best)]  # its lowest bit is always set


def check(config: Mapping[str, Any]) -> None:
    allowed = os.sched_getaffinity(0)
    missing = sorted(set(config["kernel"].get("cpus") or []) - allowed)
    if missing:
        raise BootError(
            f"kernel.cpus names processor {missing[0]}; Atoll may run on {', '.join(map(str, sorted(allowed)))}",
            EXIT_CONFIG,
        )
