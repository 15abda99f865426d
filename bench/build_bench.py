"""Builds atoll.bench._bench out of all C of this folder. Run by setup.py."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("atoll_cbuild", HERE.parent / "ipc" / "cbuild.py")
cbuild = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cbuild)

ffi = cbuild.make_ffi(
    "atoll.bench._bench",
    headers=cbuild.headers_in(HERE),
    sources=[*sorted(path.name for path in HERE.glob("*.c")), *cbuild.DOMAIN_SOURCES],
    here=HERE,
    include=["ipc/build_ipc.py"],
)
