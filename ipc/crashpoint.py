"""Crash points in Python code, and their names; see crashpoint.h.

- `crash_point(domain, "nbd.option.before")`: the twin of ATOLL_CRASH_POINT; `crash_point_each` that of _EACH.
- `point_hash(name)`: what the kernel stores in crash_point to arm it; "nic:commit.after" is ATOLL_CRASH_POINT_EACH's
  "commit.after" in nic.
- `points_in(folder)`: the names in all C and Python below a folder.
"""

from __future__ import annotations

import os
import re
import signal
from functools import cache
from pathlib import Path
from typing import Any

from atoll.ipc.roles import Role

ROLE_FACTOR = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


@cache
def point_hash(name: str) -> int:
    """FNV-1a of the name; that of a common point is mixed with the role's number."""
    role, colon, common = name.partition(":")
    value = 0xCBF29CE484222325
    for byte in (common if colon else name).encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value ^ (Role.of(role) * ROLE_FACTOR & MASK) if colon else value


def crash_point(domain: Any, name: str) -> None:
    """Dies here by SIGKILL if a test has armed `name`, once per arming. `domain`: struct atoll_domain *."""
    armed = domain.peers[Role.KERNEL].crash_point
    if armed and armed == point_hash(name):
        _crash_now(domain)


def crash_point_each(domain: Any, name: str) -> None:
    """The same in common code: what is armed is "role:name"."""
    armed = domain.peers[Role.KERNEL].crash_point
    if armed and armed == point_hash(f"{Role(domain.role).text}:{name}"):
        _crash_now(domain)


def _crash_now(domain: Any) -> None:
    sequence = domain.peers[Role.KERNEL].crash_sequence
    if domain.self.crash_seen != sequence:
        domain.self.crash_seen = sequence
        os.kill(os.getpid(), signal.SIGKILL)


_POINT = re.compile(
    r"\b(?:ATOLL_CRASH_POINT|crash_point)(?P<each>_EACH|_each)?\(\s*[^,;\"]+,\s*\"(?P<name>[^\"]+)\"\s*\)"
)


def points_in(folder: Path) -> dict[str, str]:
    """Name of each crash point below `folder` → the file that holds it. A point of common code is ":name"."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in {".c", ".h", ".py"} or path.stem == "crashpoint":
            continue
        for match in _POINT.finditer(path.read_text(encoding="utf-8")):
            found[(":" if match["each"] else "") + match["name"]] = str(path.relative_to(folder))
    return found
