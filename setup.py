"""Packages and C extensions of Atoll; metadata and tool settings stand in pyproject.toml.

- The folders ipc/, kernel/, ... are the packages atoll.ipc, atoll.kernel, ... A root folder named atoll would shadow
  that mapping: there must be none.
- Each extension has a build script beside its C, made of one call of ipc/cbuild.py.

ATOLL_EXTENSIONS="_ipc _nic" builds only those, ATOLL_EXTENSIONS="" none (default: all).
ATOLL_SANITIZE=address,undefined builds with these sanitizers.
"""

import os
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("ipc", "kernel", "drivers", "services", "bench")

BUILD_SCRIPTS = (
    "ipc/build_ipc.py",
    "drivers/nic/build_nic.py",
    "drivers/disk/build_disk.py",
    "drivers/fault/build_fault.py",
    "services/nbd/build_nbd.py",
    "services/dedup/build_dedup.py",
    "bench/build_bench.py",
)

# While the first release is being written a missing build script is named and passed over; then this becomes True.
ALL_EXTENSIONS_REQUIRED = True

ROOT = Path(__file__).resolve().parent


def build_scripts() -> list[str]:
    """Those of BUILD_SCRIPTS to run now, as cffi wants them."""
    only = os.environ.get("ATOLL_EXTENSIONS")
    wanted = []
    for script in BUILD_SCRIPTS:
        name = Path(script).stem.removeprefix("build")  # ipc/build_ipc.py builds ..._ipc
        if only is not None and name not in only.split():
            continue
        if (ROOT / script).exists():
            wanted.append(f"{script}:ffi")
        elif ALL_EXTENSIONS_REQUIRED:
            raise SystemExit(f"setup.py: {script} is missing")
        else:
            print(f"setup.py: {script} does not exist yet, extension {name} is passed over")
    return wanted


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    packages=[f"atoll.{p}" for p in find_packages(include=[*FOLDERS, *(f"{f}.*" for f in FOLDERS)])],
    package_dir={f"atoll.{f}": f for f in FOLDERS},
    package_data={"": ["*.pyi", "py.typed"], "atoll.bench": ["extra/*.c"]},
    cffi_modules=build_scripts(),
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
