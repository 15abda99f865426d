"""The floors: ipc is the ground; kernel, drivers and services stand on it side by side; a domain imports no other.

Read from the source text, so that an import inside a function counts too. Names in a table (strings) are not imports.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each floor may import besides itself.
MAY_IMPORT = {
    "ipc": set(),
    "kernel": {"ipc"},
    "drivers": {"ipc"},
    "services": {"ipc"},
    "bench": {"ipc", "kernel", "drivers", "services"},
}
# Folders whose packages are domains: these do not import their siblings.
OF_DOMAINS = {"drivers", "services"}
# A stand-in for tests is made of the domain whose place it takes.
MADE_OF = {("drivers", "fault"): ("drivers", "disk")}


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Full names of all that `source`, the text of `module`, may import."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*names, alias.name]) for alias in node.names)


def forbidden(importer: str, imported: str) -> str | None:
    """Why `importer` must not import `imported`, or None."""
    top, *rest = imported.split(".")
    if top in MAY_IMPORT:
        return f"{importer} imports {imported}: write atoll.{imported}"
    if top != "atoll" or not rest or rest[0] not in MAY_IMPORT:
        return None
    here, there = importer.split(".")[1:], rest
    if there[0] != here[0]:
        return None if there[0] in MAY_IMPORT[here[0]] else f"{importer} imports {imported}: another floor"
    if MADE_OF.get(tuple(here[:2])) == tuple(there[:2]):
        return None
    if here[0] in OF_DOMAINS and len(there) > 1 and is_domain(there) and there[1] != "".join(here[1:2]):
        return f"{importer} imports {imported}: another domain"
    return None


def is_domain(names: list[str]) -> bool:
    return (ROOT / names[0] / names[1]).is_dir()


def python_files() -> list[Path]:
    return sorted(path for floor in MAY_IMPORT for path in (ROOT / floor).rglob("*.py"))


def module_of(path: Path) -> str:
    names = ["atoll", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def test_no_floor_imports_another() -> None:
    errors = []
    for path in python_files():
        module = module_of(path)
        source = path.read_text(encoding="utf-8")
        for imported in imported_modules(source, module, path.name == "__init__.py"):
            errors.append(forbidden(module, imported))
    assert [error for error in errors if error] == []


@pytest.mark.parametrize(
    ("source", "module", "imported"),
    [
        ("import atoll.kernel.cli", "atoll.ipc.ring", "atoll.kernel.cli"),
        ("from atoll import kernel", "atoll.drivers.nic.main", "atoll.kernel"),
        ("from atoll.services.nbd import x", "atoll.drivers.nic.main", "atoll.services.nbd.x"),
        ("def f():\n    from ...kernel import cli", "atoll.services.nbd.main", "atoll.kernel.cli"),
        ("import ipc.ring", "atoll.kernel.boot", "ipc.ring"),
    ],
)
def test_a_forbidden_import_is_found(source: str, module: str, imported: str) -> None:
    assert list(imported_modules(source, module, is_package=False)) == [imported]
    assert forbidden(module, imported) is not None


def test_imports_within_the_rules_pass() -> None:
    assert forbidden("atoll.kernel.boot", "atoll.ipc.ring") is None
    assert forbidden("atoll.drivers.nic.main", "atoll.drivers.nic._nic.lib") is None
    assert forbidden("atoll.drivers.nic.main", "os.path") is None
    assert list(imported_modules("from .ring import Ring", "atoll.ipc", is_package=True)) == ["atoll.ipc.ring.Ring"]


def test_c_includes_keep_to_the_floors() -> None:
    """C of a floor includes its own folder's headers and those of ipc/, by their path from the root."""
    errors = []
    for path in sorted(path for floor in MAY_IMPORT for path in (ROOT / floor).rglob("*.[ch]")):
        folder = path.parent.relative_to(ROOT)
        if folder.parts[0] == "bench":
            continue
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            if not (ROOT / name).is_file():
                errors.append(f'{path.relative_to(ROOT)}: "{name}" is not the path of a file from the root')
            elif Path(name).parent not in {folder, Path("ipc"), Path(*MADE_OF.get(folder.parts, ("ipc",)))}:
                errors.append(f'{path.relative_to(ROOT)}: "{name}" is of another floor or domain')
    assert errors == []


@pytest.mark.parametrize("floor", MAY_IMPORT)
def test_a_folder_cannot_be_imported_as_a_package_of_its_own(floor: str) -> None:
    """From the checkout `import ipc` would load a second copy of each module."""
    done = subprocess.run([sys.executable, "-c", f"import {floor}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: '{floor}' is a folder of the package atoll: write 'import atoll.{floor}'" in done.stderr


def test_no_module_is_loaded_twice() -> None:
    modules = [
        module_of(path)
        for path in python_files()
        if path.name != "__main__.py" and not path.name.startswith("build_") and path.name != "cbuild.py"
    ]
    program = """
import collections, importlib, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
names = collections.defaultdict(list)
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and name != "__main__" and name.split(".")[0] in {"atoll", "ipc", "kernel", "drivers", "services", "bench"}:
        names[os.path.realpath(file)].append(name)
twice = {file: found for file, found in names.items() if len(found) > 1}
assert not twice, twice
"""
    done = subprocess.run([sys.executable, "-c", program, *modules], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_layout_that_imports_and_checkers_rely_on() -> None:
    assert not (ROOT / "atoll").exists(), "a root folder named atoll shadows the mapping in setup.py"
    for floor in MAY_IMPORT:
        link = ROOT / "typings" / "atoll" / floor
        assert link.is_symlink(), f"{link} must be a link"
        assert link.resolve() == ROOT / floor
        assert (ROOT / floor / "py.typed").exists()
