"""A store without its server: who may touch it, where its device is, and what the last run left in shared memory.

- `open_store(folder, device)` -> `Offline`: holds the data directory's lock and the device's claim, so that no server
  starts meanwhile, of this directory or another
- `Offline.unflushed`   why writes that were acknowledged are not on the device; empty if they are
- `enlarge(offline, size_bytes)`   the device file is made longer, and the next start asked to use it

Raises BootError, with an exit status.
"""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from atoll.kernel import device as devices
from atoll.kernel import lastrun, process
from atoll.kernel.config import DEFAULT_DEVICE, format_size
from atoll.kernel.instance import EXIT_CONFIG, EXIT_RUNNING, BootError, Directory, Record


@dataclass(frozen=True, slots=True)
class Offline:
    device: Path
    device_fd: int  # claims it
    directory: Directory | None  # None: only a device was named
    unflushed: str

    def close(self) -> None:
        os.close(self.device_fd)
        if self.directory is not None:
            os.close(self.directory.lock_fd)


def open_store(folder: Path, device: Path | None, folder_given: bool) -> Offline:
    """The store of a data directory, or, where only `device` is named, a device by itself."""
    if device is not None and not folder_given:
        if not device.exists():
            raise BootError(f"device {device}: no such file or device", EXIT_CONFIG)
        return Offline(device, claim(device), None, "")
    if not (folder / "version").is_file():
        raise BootError(f"data directory {folder}: no server has ever run there", EXIT_CONFIG)
    directory = Directory.open(folder)
    try:
        record = Record.read(folder)
        if device is None:
            named = record.device_path if record is not None else ""
            device = Path(named) if named else folder / DEFAULT_DEVICE
        if not device.exists():
            raise BootError(f"device {device}: no such file or device (name it: --device)", EXIT_CONFIG)
        device_fd = claim(device)
    except BaseException:
        os.close(directory.lock_fd)
        raise
    return Offline(device, device_fd, directory, left_in_memory(record))


def claim(device: Path) -> int:
    """A descriptor that holds the device as a server does. One of another directory may use it, or be about to, and one
    in a container need not be seen from here."""
    if users := process.holders(device):
        raise BootError(f"device {device}: in use by process {users[0]}", EXIT_RUNNING)
    is_block = device.is_block_device()
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC | (os.O_EXCL if is_block else 0))
    except OSError as error:
        status = EXIT_RUNNING if error.errno == errno.EBUSY else EXIT_CONFIG
        raise BootError(f"device {device}: {devices.why_not(error)}", status) from None
    try:
        devices.claim(devices.Device(descriptor, str(device), 0, False, is_block))
    except BootError as error:
        os.close(descriptor)
        raise BootError(str(error), EXIT_RUNNING) from None
    return descriptor


def left_in_memory(record: Record | None) -> str:
    if record is None or record.clean:
        return ""
    if not lastrun.there(record):
        return ""  # lost, whatever is done now
    if record.layout_version != lastrun.LAYOUT_VERSION:
        return (
            "the last run ended without a stop: writes that it acknowledged may still be in its shared memory, whose"
            f" layout is {record.layout_version}, and this program's is {lastrun.LAYOUT_VERSION} (to give them up:"
            f" rm /dev/shm/atoll-{record.instance:016x}-*); atoll serve of the release that made it takes them over,"
            " atoll stop puts them on the device"
        )
    if lastrun.served(record) is False:
        return ""  # there is nothing to lose
    return (
        "the last run ended without a stop: writes that it acknowledged may still be in shared memory, not on the"
        " device; atoll serve takes them over, atoll stop puts them on the device"
    )


def enlarge(offline: Offline, size_bytes: int, sparse: bool) -> tuple[int, int]:
    """Bytes before and after. A file becomes `size_bytes` long; a block device must have that size already."""
    path = offline.device
    assert offline.directory is not None
    if offline.unflushed:
        raise BootError(f"device {path}: {offline.unflushed}; then it can be grown")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        before = os.lseek(descriptor, 0, os.SEEK_END)
        if stat.S_ISBLK(found.st_mode):
            if before < size_bytes:
                raise BootError(
                    f"device {path}: it has {format_size(before)}; enlarge the block device first, then name its size",
                    EXIT_CONFIG,
                )
        elif size_bytes < before:
            raise BootError(
                f"device {path}: it has {format_size(before)} already; a device cannot be made smaller", EXIT_CONFIG
            )
        elif size_bytes > before:
            try:
                if sparse or found.st_blocks * 512 < before // 2:  # it was not preallocated
                    os.ftruncate(descriptor, size_bytes)
                else:
                    os.posix_fallocate(descriptor, before, size_bytes - before)
            except OSError as error:
                os.ftruncate(descriptor, before)
                room = os.statvfs(path.parent)
                raise BootError(
                    f"device {path}: cannot make it {format_size(size_bytes)} long: {error.strerror}"
                    f" ({format_size(room.f_bavail * room.f_frsize >> 20 << 20)} free)"
                ) from None
        os.fsync(descriptor)
        after = os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
    offline.directory.want_grow(True)
    return before, after
