"""Errors of the world: one closed list (enum atoll_status in layout.h), with total functions on it.

- `Status.errno`, `Status.text`; NBD's codes are nbd's.
"""

from __future__ import annotations

import errno
from enum import IntEnum


class Status(IntEnum):
    OK = 0
    EPERM = 1
    EIO = 2
    EINVAL = 3
    ENOSPC = 4
    ENOTSUP = 5
    ESHUTDOWN = 6
    ENOENT = 7
    ECORRUPT = 8
    EPOISON = 9
    ENOMEM = 10
    EOVERFLOW = 11
    EUNFLUSHED = 12

    @property
    def errno(self) -> int:
        """The operating system's number; 0 for OK."""
        return _ERRNO[self]

    @property
    def text(self) -> str:
        return _TEXT[self]

    @classmethod
    def of(cls, value: int) -> Status:
        """The status of that number; what is none (another process wrote it) is EIO."""
        try:
            return cls(value)
        except ValueError:
            return cls.EIO


_ERRNO = {
    Status.OK: 0,
    Status.EPERM: errno.EPERM,
    Status.EIO: errno.EIO,
    Status.EINVAL: errno.EINVAL,
    Status.ENOSPC: errno.ENOSPC,
    Status.ENOTSUP: errno.EOPNOTSUPP,
    Status.ESHUTDOWN: errno.ESHUTDOWN,
    Status.ENOENT: errno.ENOENT,
    Status.ECORRUPT: errno.EIO,
    Status.EPOISON: errno.EIO,
    Status.ENOMEM: errno.ENOMEM,
    Status.EOVERFLOW: errno.EOVERFLOW,
    Status.EUNFLUSHED: errno.EIO,
}

_TEXT = {
    Status.OK: "done",
    Status.EPERM: "the volume is read-only",
    Status.EIO: "the device failed",
    Status.EINVAL: "malformed request",
    Status.ENOSPC: "no space left: the store is full, or the request ends past the end of the volume",
    Status.ENOTSUP: "this cannot be done fast",
    Status.ESHUTDOWN: "the server stops",
    Status.ENOENT: "no such volume",
    Status.ECORRUPT: "stored data is damaged: its fingerprint does not match",
    Status.EPOISON: "this request has crashed the service that executed it twice",
    Status.ENOMEM: "a limit of the server is reached",
    Status.EOVERFLOW: "too large",
    Status.EUNFLUSHED: "an acknowledged write could not be placed on the device yet",
}
