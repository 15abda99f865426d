"""A device as the checker sees it: blocks by number, read in runs.

- `FileImage(path, writable)`   a file or a block device
- `MemoryImage(array)`          bytes in memory (tests)

`read(first, count)` returns the bytes, or None where one of them cannot be read. `gather(places)` reads blocks
anywhere, in runs where they are neighbours: an array of blocks, and which of them could be read.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Protocol

import numpy as np

from atoll.services.dedup.check.layout import BLOCK_BYTES

_BLKGETSIZE64 = 0x80081272
RUN_BLOCKS = 256  # read at once


class Image(Protocol):
    blocks: int

    def read(self, first: int, count: int) -> bytes | None: ...

    def gather(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class MemoryImage:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array.reshape(-1, BLOCK_BYTES)
        self.blocks = len(self.array)

    def read(self, first: int, count: int) -> bytes | None:
        return self.array[first : first + count].tobytes() if 0 <= first <= self.blocks - count else None

    def gather(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        good = places < self.blocks
        return self.array[np.where(good, places, 0).astype(np.int64)], good

    def write(self, first: int, data: bytes) -> None:
        blocks = np.frombuffer(data, np.uint8).reshape(-1, BLOCK_BYTES)
        self.array[first : first + len(blocks)] = blocks


class FileImage:
    """Raises OSError if it cannot be opened, ValueError if it is neither a file nor a block device."""

    def __init__(self, path: str | os.PathLike[str], writable: bool = False) -> None:
        self.path = Path(path)
        self.fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        found = os.fstat(self.fd)
        if stat.S_ISREG(found.st_mode):
            size = found.st_size
        elif stat.S_ISBLK(found.st_mode):
            size = struct.unpack("=Q", fcntl.ioctl(self.fd, _BLKGETSIZE64, bytes(8)))[0]
        else:
            os.close(self.fd)
            raise ValueError(f"{path}: neither a file nor a block device")
        self.blocks = size // BLOCK_BYTES
        # What the medium holds counts, not what the operating system has read or written of it once.
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self.fd)

    def read(self, first: int, count: int) -> bytes | None:
        if not 0 <= first <= self.blocks - count:
            return None
        parts, at, end = [], first * BLOCK_BYTES, (first + count) * BLOCK_BYTES
        try:
            while at < end:
                part = os.pread(self.fd, end - at, at)
                if not part:
                    return None
                parts.append(part)
                at += len(part)
        except OSError:
            return None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def gather(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks = np.zeros((len(places), BLOCK_BYTES), np.uint8)
        good = np.zeros(len(places), bool)
        order = np.argsort(places, kind="stable")
        at = 0
        while at < len(order):
            first, end = int(places[order[at]]), at + 1
            while end < len(order) and int(places[order[end]]) - first == end - at and end - at < RUN_BLOCKS:
                end += 1
            data = self.read(first, end - at)
            if data is not None:
                blocks[order[at:end]] = np.frombuffer(data, np.uint8).reshape(-1, BLOCK_BYTES)
                good[order[at:end]] = True
            elif end - at > 1:  # which of them?
                for index in order[at:end]:
                    single = self.read(int(places[index]), 1)
                    if single is not None:
                        blocks[index] = np.frombuffer(single, np.uint8)
                        good[index] = True
            at = end
        return blocks, good

    def write(self, first: int, data: bytes) -> None:
        at = first * BLOCK_BYTES
        while data:
            count = os.pwrite(self.fd, data, at)
            data, at = data[count:], at + count

    def flush(self) -> None:
        os.fsync(self.fd)
