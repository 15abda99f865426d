"""C of bench/extra, compiled when first needed: it stands on libraries that nothing else of Atoll needs.

- `program(name, folder, libraries)`, `library(name, folder, package)`   path of what was built in `folder`
- `Missing`   a compiler or a library is not installed; says which
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

EXTRA = Path(__file__).resolve().parent / "extra"
FLAGS = ("-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror")
COMPILE_S = 120.0


class Missing(Exception):
    """One line: what cannot be built here, and why."""


def program(name: str, folder: Path, libraries: tuple[str, ...]) -> Path:
    return _build(name, folder / name, (), tuple(f"-l{library}" for library in libraries))


def library(name: str, folder: Path, package: str, libraries: tuple[str, ...]) -> Path:
    """A shared object, with the compiler's options from pkg-config for `package`."""
    if shutil.which("pkg-config") is None:
        raise Missing(f"{name}: pkg-config is not installed")
    asked = subprocess.run(["pkg-config", "--cflags", package], capture_output=True, text=True)
    if asked.returncode != 0:
        raise Missing(f"{name}: {package} is not installed")
    flags = ("-shared", "-fPIC", *asked.stdout.split())
    return _build(name, folder / f"{name}.so", flags, tuple(f"-l{each}" for each in libraries))


def _build(name: str, output: Path, flags: tuple[str, ...], libraries: tuple[str, ...]) -> Path:
    source = EXTRA / f"{name}.c"
    if not source.exists():
        raise Missing(f"{name}: {source} is not part of this installation")
    if output.exists() and output.stat().st_mtime >= source.stat().st_mtime:
        return output
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Missing(f"{name}: no C compiler")
    command = [compiler, *FLAGS, *flags, "-o", str(output), str(source), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
    if done.returncode != 0:
        why = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise Missing(f"{name}: {why}")
    return output
