"""The real domains with bugs that tests call for (testing.modules: {role: "recoverybugs.ROLE"}).

A file DATA/fails-ROLE makes each start fail, with its text as reason. Control call "bug", `kind`:
    loop, block         the handler runs for ever, or waits for ever in a system call; `incarnation` alone does so
    segv, abort         dies of it; `incarnation` alone does so
    trap                the pages of nic's buffer that begin with CRASH or ENDLESS become unreadable here, and in the
                        next incarnation: {"pages": how many}. Whoever executes a request with such a payload dies by
                        SIGSEGV, or loops for ever. (The one after it must refuse it; the page is anybody's then.)
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atoll.ipc import physmap
from atoll.ipc._ipc import ffi
from atoll.ipc.roles import Role

CRASH, ENDLESS = b"recovery test: crash here\0", b"recovery test: stay here for ever\0"
PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)


def wrap(real: Any) -> Callable[[Any], None]:
    """`main` of a domain with these bugs."""

    def main(context: Any) -> None:
        serve_control = context.serve_control
        mark = Path(context.config["data"]) / f"bug-{context.role}"

        def bug(message: dict[str, Any]) -> dict[str, Any]:
            kind = message["kind"]
            if kind == "trap":
                mark.touch()
                return {"pages": trap()}
            if context.incarnation == message["incarnation"]:
                misbehave(kind)
            return {"incarnation": context.incarnation}

        context.serve_control = lambda handlers: serve_control({**handlers, "bug": bug})
        fails = Path(context.config["data"]) / f"fails-{context.role}"
        if fails.exists():
            context.fail(fails.read_text())
            sys.exit(1)
        if mark.exists():
            mark.unlink()
            trap()
        real.main(context)

    return main


def misbehave(kind: str) -> None:
    while kind == "loop":
        pass
    if kind == "block":
        os.read(os.pipe()[0], 1)
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV if kind == "segv" else signal.SIGABRT)


def trap() -> int:
    """The interpreter's handler of SIGSEGV notes the signal and returns to the same instruction: an endless loop."""
    header = physmap.header(int(Role.NIC))
    base = physmap.address(int(Role.NIC)) + int(header.buffer_offset)
    memory = ffi.buffer(ffi.cast("char *", base), int(header.buffer_bytes))
    heads = [(at, memory[at : at + 64]) for at in range(0, len(memory), PAGE)]  # all of them before any is closed
    found = 0
    for text, handler in ((CRASH, signal.SIG_DFL), (ENDLESS, lambda *_: None)):
        pages = [at for at, head in heads if head.startswith(text)]
        if pages:
            signal.signal(signal.SIGSEGV, handler)
        for at in pages:
            if _libc.mprotect(ctypes.c_void_p(base + at), PAGE, 0) != 0:
                print("mprotect:", os.strerror(ctypes.get_errno()), file=sys.stderr)
            found += 1
    return found
