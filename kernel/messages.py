"""What init, kernel, zygote and standbys say to one another, over socket pairs that outlive them all.

    init -> kernel     {"ended": pid, "status": wait status}   {"stop": reason}
    kernel -> init     {"booted": [lines to print]}   {"failed": reason}   {"stopped": clean, "reason": text}
    kernel -> zygote   {"fork": role}   {"sync": number}
    zygote -> kernel   {"role": role, "pid": pid, "start_time": ticks}   {"hello": true, "pid", "start_time", "starts"}
                       {"synced": number, "pid", "start_time", "starts"}
    kernel -> standby  {"pid", "start_time", "incarnation", "previous_signal", "fresh", "adopted"} and the descriptors
                       of arena and lock, both writable; for another pid or start time: not meant for the reader

- `send(channel, message, descriptors)` -> False if there is no room now
- `receive(channel)` -> (message, descriptors), or None if there is nothing now; EndOfChannel

After a crash: an unread message waits for the successor.
"""

import array
import os
import socket
from collections.abc import Sequence
from typing import Any

import msgpack

MESSAGE_BYTES_MAX = 65536
DESCRIPTORS_MAX = 4


class EndOfChannel(Exception):
    """The other end is closed everywhere: nobody is left."""


def send(channel: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> bool:
    attached = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    try:
        channel.sendmsg([msgpack.packb(message)], attached, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return False
    return True


def receive(channel: socket.socket, wait: bool = False) -> tuple[dict[str, Any], list[int]] | None:
    """The descriptors received are the caller's to close."""
    flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
    try:  # socket.recv_fds takes flags and forgets them
        data, attached, _, _ = channel.recvmsg(MESSAGE_BYTES_MAX, socket.CMSG_SPACE(4 * DESCRIPTORS_MAX), flags)
    except BlockingIOError:
        return None
    descriptors = array.array("i")
    for level, kind, content in attached:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    if not data:
        close_all(descriptors)
        raise EndOfChannel
    return msgpack.unpackb(data), list(descriptors)


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
