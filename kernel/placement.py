"""Which processors a domain may run on.

- `cores(config, role, allowed)`   those of the role, or None: wherever the process may run
- `settle(config, role)`           lets this process run there and nowhere else
- `check(config)`                  raises BootError where the configuration names processors that cannot be used

A request crosses the domains of the data path one after the other, so where processors are few these share one: to hand
a message over on it is a switch of 2 µs, while an idle processor, above all a virtual one, takes some 30 µs to wake.
Storage drivers work beside the path, on any processor. Where there are more than FEW the scheduler decides.

What the process was allowed when it was made (taskset, cpusets of a container) is never exceeded.
"""

import logging
import os
from collections.abc import Mapping, Set
from typing import Any

from atoll.kernel.instance import EXIT_CONFIG, BootError

log = logging.getLogger("atoll")

PATH = ("nic", "nbd", "dedup")
FEW = 3  # with 4 and more the path's domains and a client can have one each


def cores(config: Mapping[str, Any], role: str, allowed: Set[int]) -> frozenset[int] | None:
    kernel = config["kernel"]
    named = kernel.get("cpus") or []
    usable = sorted(allowed & set(named)) if named else sorted(allowed)
    placement = kernel.get("placement", "none")
    if placement == "auto":
        placement = "together" if len(usable) <= FEW else "none"
    if not usable:
        return None
    if placement == "together" and role in PATH:
        return frozenset(usable[-1:])  # the last: interrupts mostly go to the first
    return frozenset(usable) if named else None


def settle(config: Mapping[str, Any], role: str) -> None:
    allowed = os.sched_getaffinity(0)
    wanted = cores(config, role, allowed)
    if wanted is None or wanted == allowed:
        return
    try:
        os.sched_setaffinity(0, wanted)
    except OSError as error:  # a cpuset has just changed: the scheduler decides
        log.warning("%s: cannot be bound to processors %s: %s", role, sorted(wanted), error.strerror)


def check(config: Mapping[str, Any]) -> None:
    allowed = os.sched_getaffinity(0)
    missing = sorted(set(config["kernel"].get("cpus") or []) - allowed)
    if missing:
        raise BootError(
            f"kernel.cpus names processor {missing[0]}; Atoll may run on {', '.join(map(str, sorted(allowed)))}",
            EXIT_CONFIG,
        )
