"""Roles by name and by number (enum atoll_role)."""

from __future__ import annotations

from enum import IntEnum


class Role(IntEnum):
    INIT = 0
    KERNEL = 1
    NIC = 2
    NBD = 3
    DEDUP = 4
    DISK = 5
    LLRRM = 6

    @property
    def text(self) -> str:
        """As in configuration, messages and object names."""
        return self.name.lower()

    @classmethod
    def of(cls, role: Role | int | str) -> Role:
        """The role of that name or number; ValueError if there is none."""
        if isinstance(role, str):
            try:
                return cls[role.upper()]
            except KeyError:
                raise ValueError(f"no such role: {role!r}") from None
        return cls(role)
