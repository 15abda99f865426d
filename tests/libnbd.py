"""libnbd's Python binding as a client in a process of its own; Debian's belongs to /usr/bin/python3, not to ours.

    with Libnbd(uri) as client:
        client.pwrite(b"...", 0); client.flush(); client.pread(4096, 0)
        client.extents(length, offset)      [(length, flags), ...] of base:allocation
        client.get_size() ...               any method of nbd.NBD with plain arguments

A failed call raises LibnbdError(errno, text). This file is also what runs in that process.
"""

import os
import pickle
import struct
import subprocess
import sys
from typing import Any, BinaryIO

PYTHON = "/usr/bin/python3"
LENGTH = struct.Struct(">I")


class LibnbdError(Exception):
    def __init__(self, errno: int, text: str) -> None:
        super().__init__(f"{text} ({os.strerror(errno) if errno else 'no errno'})")
        self.errno = errno
        self.text = text


class Libnbd:
    def __init__(self, uri: str, timeout_s: float = 60.0) -> None:
        self.process = subprocess.Popen(
            ["timeout", "-k", "1", str(4 * timeout_s), PYTHON, __file__, uri],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Libnbd":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.wait(30)
        self.process.stdout.close()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.start(name, *arguments)
            return self._answer()

        return call

    def start(self, name: str, *arguments: Any) -> None:
        """Asks without waiting; `finish` waits."""
        assert self.process.stdin is not None
        put(self.process.stdin, (name, arguments))

    def finish(self) -> Any:
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        answer = get(self.process.stdout)
        if answer is None:
            raise LibnbdError(0, "the client process has ended")
        if isinstance(answer, tuple) and answer[:1] == ("error",):
            raise LibnbdError(*answer[1:])
        return answer[1]


def put(stream: BinaryIO, thing: Any) -> None:
    data = pickle.dumps(thing, protocol=4)
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


def get(stream: BinaryIO) -> Any:
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    return pickle.loads(stream.read(LENGTH.unpack(header)[0]))


def serve(uri: str) -> None:
    import nbd

    def plain(error: Any) -> tuple[str, int, str]:
        return "error", error.errnum, error.string

    stdout, stdin = sys.stdout.buffer, sys.stdin.buffer
    handle = nbd.NBD()
    try:
        handle.add_meta_context("base:allocation")
        handle.connect_uri(uri)
    except nbd.Error as error:
        put(stdout, plain(error))
        return
    put(stdout, ("ok", None))

    def extents(length: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []

        def callback(context: str, at: int, entries: list[int], error: Any) -> int:
            found.extend(zip(entries[::2], entries[1::2], strict=True))
            return 0

        handle.block_status(length, offset, callback, flags)
        return found

    while (asked := get(stdin)) is not None:
        name, arguments = asked
        try:
            result = extents(*arguments) if name == "extents" else getattr(handle, name)(*arguments)
            put(stdout, ("ok", bytes(result) if isinstance(result, bytearray) else result))
        except nbd.Error as error:
            put(stdout, plain(error))
        except (TypeError, AttributeError, ValueError) as error:
            put(stdout, ("error", 22, repr(error)))
    try:
        handle.shutdown()
    except nbd.Error:
        pass


if __name__ == "__main__":
    serve(sys.argv[1])
