"""Who can write which memory of an instance, as the operating system tells it (I1).

- `audit(data)` looks at every process of the machine: which of the instance's shared-memory objects and io_urings it
  maps and how (/proc/PID/maps), and which it holds open and how (/proc/PID/fd, fdinfo). It asks no Atoll process.

Rules: an arena is writable in at most one process; a role's lock page in at most two (the active one, and a standby
being promoted); the queue pages of an io_uring are mapped by at most one. Whatever breaks them is looked at a second
time, since a reading of all processes takes a while, in which a successor may have taken over. Private mappings write
nobody's memory and do not count. Zombies have no memory.

Objects are found by name (those of the instance in DATA/instance.json, and what lies beside them in /dev/shm) and told
apart by device and inode, so that one that was unlinked, or opened under another name, is seen as well.
"""

import os
import pwd
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atoll.kernel.client import ControlError, NoServer

SHM = Path("/dev/shm")
INSTANCE_FILE = "instance.json"
# Between the first look and the second.
SECOND_LOOK_S = 0.3

_OBJECT = re.compile(r"atoll-([0-9a-f]{16})-(lock-)?(\w+)")
_MAP = re.compile(
    r"(?P<low>[0-9a-f]+)-(?P<high>[0-9a-f]+) (?P<rights>\S{4}) [0-9a-f]+ "
    r"(?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+)\s*(?P<path>.*)"
)
_URING = "anon_inode:[io_uring]"

Key = tuple[int, int]  # device, inode


def audit(data: str | os.PathLike[str]) -> dict[str, Any]:
    """What was found. Raises NoServer if the directory has never had a server, ControlError if it cannot be read.

    `ok`; `instance`; `findings`, a line each; `objects`, each with `name`, `kind` (arena, lock, io_uring), `bytes`, and
    lists of {pid, name}: `mapped_writable`, `mapped_readable`, `held_writable`, `held_readable`; `unseen`: {pid, name,
    user, shared_bytes} of processes that the operating system does not let this user look into, with what everybody may
    see: whose they are, and how much shared memory of any kind they have in use.
    """
    instance = instance_of(data)
    seen = look(instance)
    suspicious = {subject for subject, _ in judge(seen)}
    findings = []
    if suspicious:
        time.sleep(SECOND_LOOK_S)
        seen = look(instance)
        findings = [text for subject, text in judge(seen) if subject in suspicious]
    return {"ok": not findings, "instance": instance, "findings": findings, **seen}


def instance_of(data: str | os.PathLike[str]) -> str:
    """The 16 hex digits in the names of the instance's objects."""
    path = Path(data) / INSTANCE_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise NoServer(f"no server has run on {Path(data).absolute()}: there is no {INSTANCE_FILE}") from None
    except OSError as error:
        raise ControlError(f"{path}: {error.strerror}") from None
    match = _OBJECT.search(text)
    if match is None:
        raise ControlError(f"{path}: names no shared-memory object")
    return match[1]


def look(instance: str) -> dict[str, Any]:
    """One reading of all processes: `objects` and `unseen`."""
    objects: dict[Key, dict[str, Any]] = {}
    for file in sorted(SHM.glob(f"atoll-{instance}-*")):
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        objects[status.st_dev, status.st_ino] = _entry(file.name, status.st_size)
    unseen = []
    rings_told_apart = _rings_told_apart()
    found: list[tuple[Key, str, str, dict[str, Any], str]] = []
    own: set[int] = set()  # processes of the instance
    for pid in _pids():
        who = {"pid": pid, "name": _name(pid)}
        try:
            seen = [*_maps(pid), *_descriptors(pid)]
        except ProcessLookupError:
            continue
        except PermissionError:
            unseen.append({**who, **_from_outside(pid)})
            continue
        for key, path, how in seen:
            match = _OBJECT.match(path.removeprefix("/dev/shm/"))
            if key in objects or (match is not None and match[1] == instance):
                own.add(pid)
            elif not (path.startswith(_URING) and rings_told_apart):
                continue
            found.append((key, path, how, who, match[0] if match else "io_uring"))
    for key, path, how, who, name in found:
        if path.startswith(_URING) and (who["pid"] not in own or not how.startswith("mapped")):
            continue
        entry = objects.setdefault(key, _entry(name + (" (unlinked)" if "deleted" in path else ""), 0))
        if who not in entry[how]:
            entry[how].append(who)
    return {"objects": list(objects.values()), "unseen": unseen, "io_urings_told_apart": rings_told_apart}


def judge(seen: dict[str, Any]) -> list[tuple[tuple[Any, ...], str]]:
    """Broken rules: what it is about (the same at a second look if nothing has changed) and a line for people."""
    findings = []
    for entry in seen["objects"]:
        writers = entry["mapped_writable"]
        most = {"arena": 1, "lock": 2, "io_uring": 1}[entry["kind"]]
        if len(writers) > most:
            who = ", ".join(f"{writer['pid']} ({writer['name']})" for writer in writers)
            subject = (entry["name"], *sorted(writer["pid"] for writer in writers))
            findings.append((subject, f"{entry['name']} is writable in {len(writers)} processes: {who}"))
    return findings


def _entry(name: str, size: int) -> dict[str, Any]:
    kind = "io_uring" if name.startswith("io_uring") else "lock" if "-lock-" in name else "arena"
    lists: dict[str, list[Any]] = {
        "mapped_writable": [], "mapped_readable": [], "held_writable": [], "held_readable": [],
    }  # fmt: skip
    return {"name": name, "kind": kind, "bytes": size, **lists}


def _pids() -> Iterator[int]:
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid():
            yield int(path.name)


def _name(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
    return "".join(each if each.isprintable() else "?" for each in name)  # whoever it is of chose it


def _from_outside(pid: int) -> dict[str, Any]:
    """What everybody may know of a process; None where it has gone meanwhile."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        text = ""
    user, shared = (re.search(rf"^{field}:\s*(\d+)", text, re.MULTILINE) for field in ("Uid", "RssShmem"))
    return {
        "user": user and _user_name(int(user[1])),
        "shared_bytes": shared and int(shared[1]) << 10,
    }


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _maps(pid: int) -> list[tuple[Key, str, str]]:
    """Shared mappings of files: key, path, mapped_writable or mapped_readable."""
    found = []
    try:
        text = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError from None
    for line in text.splitlines():
        if "/" not in line and _URING not in line:
            continue
        match = _MAP.fullmatch(line)
        if match is None or match["rights"][3] != "s":
            continue
        key = os.makedev(int(match["major"], 16), int(match["minor"], 16)), int(match["inode"])
        found.append((key, match["path"], "mapped_writable" if "w" in match["rights"] else "mapped_readable"))
    return found


def _descriptors(pid: int) -> list[tuple[Key, str, str]]:
    """Open shared-memory files: key, path, held_writable or held_readable."""
    found = []
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        raise ProcessLookupError from None
    for descriptor in descriptors:
        try:
            path = str(descriptor.readlink())
            if not path.startswith("/dev/shm/"):
                continue
            status = descriptor.stat()
            flags = re.search(r"flags:\s*([0-7]+)", Path(f"/proc/{pid}/fdinfo/{descriptor.name}").read_text())
        except OSError:
            continue  # closed meanwhile
        if flags is None or int(flags[1], 8) & os.O_PATH:
            continue
        writable = int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY
        found.append(((status.st_dev, status.st_ino), path, "held_writable" if writable else "held_readable"))
    return found


def _rings_told_apart() -> bool:
    """Whether each io_uring has an inode of its own (Linux 5.12 and later), so that maps say which is which.

    Where it has not, it shares that of an eventfd; then io_urings are left out.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    parameters = (ctypes.c_char * 120)()
    ring = libc.syscall(425, 1, parameters)  # io_uring_setup
    if ring < 0:
        return False
    event = os.eventfd(0)
    try:
        return os.fstat(ring).st_ino != os.fstat(event).st_ino
    finally:
        os.close(event)
        os.close(ring)
