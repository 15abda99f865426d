"""Builds atoll.drivers.disk._disk. Run by setup.py."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("atoll_cbuild", HERE.parent.parent / "ipc" / "cbuild.py")
cbuild = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cbuild)

ffi = cbuild.make_ffi(
    "atoll.drivers.disk._disk",
    headers=["disk.h"],
    sources=["disk.c", "io.c", "engine_uring.c", "engine_threads.c", "place.c", *cbuild.DOMAIN_SOURCES, "ipc/uring.c"],
    here=HERE,
    libraries=["uring"],
    include=["ipc/build_ipc.py"],
)
