"""The sockets on which clients arrive: opened, or taken from whoever started the service.

- `open_all(config)`   TCP and Unix listeners of the configuration, after those handed over by socket activation
- `uris(listeners, volume)`

All are non-blocking and close-on-exec; TCP ones ask in time (tcp_keepalive_time) whether the peer is still there.
Raises BootError naming the address.
"""

import errno
import os
import socket
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from atoll.ipc.runtime import Listener
from atoll.kernel.config import parse_listen
from atoll.kernel.instance import BootError

BACKLOG = 4096
FIRST_ACTIVATED_FD = 3


def open_all(config: Mapping[str, Any]) -> list[Listener]:
    """The order is kept for the life of the instance: a connection names its listener by index."""
    listeners = [_listener(each) for each in activated()]
    for address in config["listen"]:
        listeners += [_listener(each) for each in _open_tcp(address)]
    listeners += [_listener(_open_unix(path)) for path in config["unix"]]
    if not listeners:
        raise BootError("no socket to listen on: name one with listen or unix")
    return listeners


def activated(environment: Mapping[str, str] = os.environ) -> list[socket.socket]:
    """Sockets handed over by systemd's protocol (LISTEN_PID, LISTEN_FDS), nbdinfo -- [ ... ] among its users."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        count = int(environment.get("LISTEN_FDS", "0"))
    except ValueError:
        raise BootError(f"LISTEN_FDS is not a number: {environment['LISTEN_FDS']!r}") from None
    found = []
    for descriptor in range(FIRST_ACTIVATED_FD, FIRST_ACTIVATED_FD + count):
        try:
            mode = os.fstat(descriptor).st_mode
            each = socket.socket(fileno=descriptor) if stat.S_ISSOCK(mode) else None
        except OSError as error:
            raise BootError(f"LISTEN_FDS: descriptor {descriptor}: {error.strerror}") from None
        if each is None or each.type != socket.SOCK_STREAM or not _listens(each):
            raise BootError(f"LISTEN_FDS: descriptor {descriptor} is no listening stream socket")
        found.append(each)
    return found


def _listens(each: socket.socket) -> bool:
    return bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _open_tcp(address: str) -> list[socket.socket]:
    host, port = parse_listen(address)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise BootError(f"listen {address}: {error.strerror}") from None
    opened: list[socket.socket] = []
    for family, kind, protocol, _, where in found:
        if port == 0 and opened:  # a free port was chosen: the other addresses of the name get the same
            where = (where[0], opened[0].getsockname()[1], *where[2:])
        try:
            each = socket.socket(family, kind, protocol)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT and len(found) > 1:
                continue
            raise BootError(f"listen {address}: {error.strerror}") from None
        try:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            each.bind(where)
            each.listen(BACKLOG)
        except OSError as error:
            each.close()
            if error.errno == errno.EADDRNOTAVAIL and len(found) > 1:
                continue  # a name with an address of a family that is switched off here
            raise BootError(f"listen {address}: {os.strerror(error.errno or 0)}") from None
        opened.append(each)
    if not opened:
        raise BootError(f"listen {address}: no usable address")
    return opened


def _open_unix(path: str) -> socket.socket:
    each = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        remove_stale_socket(path)
        each.bind(path)
        each.listen(BACKLOG)
    except OSError as error:
        each.close()
        raise BootError(f"unix {path}: {error.strerror}") from None
    except BootError:
        each.close()
        raise
    return each


def remove_stale_socket(path: str) -> None:
    """Removes the file of a Unix socket that nobody listens on any more. Raises BootError if somebody does."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BootError(f"unix {path}: exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody listens
    raise BootError(f"unix {path}: another process listens there")


def _listener(each: socket.socket) -> Listener:
    each.setblocking(False)
    name = each.getsockname()
    if each.family == socket.AF_UNIX:
        kind, address = "unix", str(Path(os.fsdecode(name)).absolute()) if name else ""
    else:
        kind = "tcp"
        # Those who are accepted have it from here. A client whose machine is gone says nothing, as an idle one does.
        each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        host = f"[{name[0]}]" if each.family == socket.AF_INET6 else name[0]
        address = f"{host}:{name[1]}"
    return Listener(fd=each.detach(), kind=kind, address=address)


def uri(listener: Listener, volume: str) -> str:
    """As nbdinfo and qemu take it."""
    export = quote(volume, safe="/")
    if listener.kind == "unix":
        return f"nbd+unix:///{export}?socket={quote(listener.address, safe='/')}"
    host, _, port = listener.address.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"nbd://{host}:{port}/{export}"


def uris(listeners: Sequence[Listener], volume: str) -> list[str]:
    return [uri(listener, volume) for listener in listeners if listener.address]
