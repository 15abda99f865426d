"""The storage devices: a file (made where it is missing) or a block device each.

- `open_device(config)` -> `Device`   opened read-write, direct where it can be; fills in config["device_bytes"]
- `open_fast_device(config)`          likewise that of the fast tier; then `claim(device)`
- `track_bytes(device)`               what it prefers to read and write in one go
- `wait_until_idle(device)`           after an unclean end: no I/O of a dead process is under way any more

Raises BootError naming the path.
"""

import errno
import fcntl
import os
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.kernel.config import DEVICE_BYTES_MIN, FAST_DEVICE_BYTES_MIN, TRACK_BYTES_MAX, TRACK_BYTES_MIN, format_size
from atoll.kernel.instance import EXIT_CONFIG, BootError
from atoll.kernel.process import holders

_BLKGETSIZE64 = 0x80081272
_FALLOC_FL_KEEP_SIZE = 1
BLOCK_BYTES = 4096
# What a dead server has under way holds its claim for as long; of a living one it is believed after the first.
CLAIM_HELD_S = 1.0
CLAIM_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Device:
    fd: int
    path: str
    size_bytes: int  # whole blocks
    direct: bool  # O_DIRECT
    is_block: bool

    @property
    def identity(self) -> str:
        """The same for the same device, as long as the machine runs."""
        its = os.fstat(self.fd)
        return f"block {its.st_rdev}" if self.is_block else f"file {its.st_dev} {its.st_ino}"


def open_device(config: dict[str, Any]) -> Device:
    """The main device."""
    made = _made(config["device"], config["device_bytes"], config["device_size_given"], config["sparse"])
    if made.size_bytes < DEVICE_BYTES_MIN:
        least = format_size(DEVICE_BYTES_MIN)
        raise BootError(f"device {made.path}: {format_size(made.size_bytes)}, too small: at least {least} are needed")
    claim(made)
    config["device_bytes"] = made.size_bytes
    return made


def open_fast_device(config: dict[str, Any]) -> Device:
    """The device of the fast tier; fills in config["fast_device_bytes"]."""
    path, wanted = config["fast_device"], config["fast_device_bytes"]
    if not wanted and not (Path(path).is_block_device() or (Path(path).is_file() and Path(path).stat().st_size)):
        raise BootError(f"device {path}: not there, or empty; to make a file, say its size (fast_device_size)")
    made = _made(path, wanted, wanted != 0, config["sparse"])
    if made.size_bytes < FAST_DEVICE_BYTES_MIN:
        least = format_size(FAST_DEVICE_BYTES_MIN)
        raise BootError(f"device {path}: {format_size(made.size_bytes)}, too small: at least {least} are needed")
    config["fast_device_bytes"] = made.size_bytes
    return made


def claim(device: Device) -> None:
    """Two servers on one file would write over each other. All processes of the instance inherit the claim.

    (A block device is claimed by opening it.)
    """
    began = time.monotonic()
    while not device.is_block:
        try:
            fcntl.flock(device.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError:  # not every file system has them
            return
        waited_s = time.monotonic() - began
        users = holders(device.path)
        if waited_s > CLAIM_WAIT_S or (users and waited_s > CLAIM_HELD_S):
            raise BootError(f"device {device.path}: in use by {f'process {users[0]}' if users else 'another server'}")
        time.sleep(0.02)


def _made(path: str, wanted: int, size_given: bool, sparse: bool) -> Device:
    _make(path, wanted, size_given, sparse)
    descriptor, direct = _open(path)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        size = os.fstat(descriptor).st_size
    elif stat.S_ISBLK(mode):
        size = struct.unpack("=Q", fcntl.ioctl(descriptor, _BLKGETSIZE64, bytes(8)))[0]
    else:
        os.close(descriptor)
        raise BootError(f"device {path}: neither a file nor a block device", EXIT_CONFIG)
    return Device(descriptor, path, size - size % BLOCK_BYTES, direct, stat.S_ISBLK(mode))


def track_bytes(device: Device) -> int:
    """A block device's optimal I/O size (a stripe of an array), else its largest request; 256 KiB for a file.

    A file's place on the medium is the file system's affair. Whole blocks, TRACK_BYTES_MIN to TRACK_BYTES_MAX.
    """
    found = 0
    if device.is_block:
        number = os.fstat(device.fd).st_rdev
        folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        queue = next((path for path in (folder / "queue", folder.resolve().parent / "queue") if path.is_dir()), folder)
        found = _number(queue / "optimal_io_size") or 1024 * _number(queue / "max_sectors_kb")
    return min(max(found - found % BLOCK_BYTES, TRACK_BYTES_MIN), TRACK_BYTES_MAX)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _make(path: str, wanted: int, size_given: bool, sparse: bool) -> None:
    """Makes the file if there is none. One that exists is never shortened, lengthened only if asked for."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise BootError(f"device {path}: {error.strerror}") from None
    if found is not None and not stat.S_ISREG(found.st_mode):
        return
    if found is not None and found.st_size > 0 and (not size_given or found.st_size >= wanted):
        return
    if found is None and Path(path).is_relative_to("/dev"):
        raise BootError(f"device {path}: no such device")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BootError(f"device {path}: {error.strerror}") from None
    try:
        if sparse:
            os.ftruncate(descriptor, wanted)
        else:
            os.posix_fallocate(descriptor, 0, wanted)
    except OSError as error:
        if found is None:
            Path(path).unlink()  # not half a device, which the next start would take for a whole one
        room = os.statvfs(Path(path).parent)
        hint = "" if sparse else "; --sparse makes it as it fills"
        raise BootError(
            f"device {path}: cannot make it {format_size(wanted)} long: {error.strerror}"
            f" ({format_size(room.f_bavail * room.f_frsize >> 20 << 20)} free{hint})"
        ) from None
    finally:
        os.close(descriptor)


def why_not(error: OSError) -> str:
    """Of a device that cannot be opened."""
    return "in use (mounted, or held by another program)" if error.errno == errno.EBUSY else str(error.strerror)


def _open(path: str) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CLOEXEC
    if stat.S_ISBLK(Path(path).stat().st_mode):
        flags |= os.O_EXCL  # a claim against every other user of the device, mounted file systems included
    try:
        return os.open(path, flags | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise BootError(f"device {path}: {why_not(error)}") from None
    try:  # file systems without direct I/O say EINVAL
        return os.open(path, flags), False
    except OSError as error:
        raise BootError(f"device {path}: {why_not(error)}") from None


def wait_until_idle(device: Device) -> bool:
    """True if nothing that a dead process started is under way on the device; False where that cannot be known.

    fallocate over a range that exists changes nothing and waits for the file's direct I/O (inode_dio_wait).
    """
    if device.is_block:
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return bool(libc.fallocate(device.fd, _FALLOC_FL_KEEP_SIZE, 0, BLOCK_BYTES) == 0)
