"""Builds atoll.services.nbd._nbd. Run by setup.py."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("atoll_cbuild", HERE.parent.parent / "ipc" / "cbuild.py")
cbuild = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cbuild)

ffi = cbuild.make_ffi(
    "atoll.services.nbd._nbd",
    headers=["protocol.h", "nbd.h"],
    sources=[
        "request.c",
        "reply.c",
        "volumes.c",
        "lookup.c",
        "slot.c",
        "transmission.c",
        "service.c",
        *cbuild.DOMAIN_SOURCES,
    ],
    here=HERE,
    include=["ipc/build_ipc.py"],
)
