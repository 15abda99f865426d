"""What the service manager and the machine around the service mean for it.

- `notify(text)`   sd_notify: to the socket that NOTIFY_SOCKET names, if any
- `warnings()`     where acknowledged writes may not outlive what one expects them to (the survival table of the README)
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

FIRST_ORDINARY_USER = 1000


def notify(text: str, environment: Mapping[str, str] = os.environ) -> None:
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            sender.send(text.encode(), socket.MSG_NOSIGNAL)
        except OSError:
            pass  # whoever asked to be told is gone


def warnings(root: Path = Path("/")) -> Iterator[str]:
    if os.getuid() >= FIRST_ORDINARY_USER and (root / "run/systemd/system").is_dir() and _remove_ipc(root):
        yield (
            "logind removes this user's shared memory at the last logout (RemoveIPC): a service that has ended without"
            " a stop by then loses writes that were acknowledged but not flushed; set RemoveIPC=no or use a system user"
        )
    in_container = (root / ".dockerenv").exists() or (root / "run/.containerenv").exists() or "container" in os.environ
    if in_container:
        yield (
            "in a container shared memory goes when the container is removed, and with it writes that were acknowledged"
            " but not flushed, unless the service was stopped; to keep them, mount a named tmpfs volume on /dev/shm"
        )


def _remove_ipc(root: Path) -> bool:
    """logind's setting; yes where nobody says otherwise."""
    value = True
    for file in (root / "etc/systemd/logind.conf", *sorted((root / "etc/systemd/logind.conf.d").glob("*.conf"))):
        try:
            found = re.findall(r"^\s*RemoveIPC\s*=\s*(\S+)", file.read_text(), re.MULTILINE)
        except OSError:
            continue
        if found:
            value = found[-1].lower() in ("yes", "true", "on", "1")
    return value
