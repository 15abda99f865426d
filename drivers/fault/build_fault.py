"""Builds atoll.drivers.fault._fault: the storage driver's C with the faults in front of it. Run by setup.py."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("atoll_cbuild", HERE.parent.parent / "ipc" / "cbuild.py")
cbuild = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cbuild)

DISK = ("disk.c", "io.c", "engine_uring.c", "engine_threads.c", "place.c")

ffi = cbuild.make_ffi(
    "atoll.drivers.fault._fault",
    headers=["drivers/disk/disk.h", "fault.h"],
    sources=["fault.c", *(f"drivers/disk/{name}" for name in DISK), *cbuild.DOMAIN_SOURCES, "ipc/uring.c"],
    here=HERE,
    libraries=["uring"],
    include=["ipc/build_ipc.py"],
)
