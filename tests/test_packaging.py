"""What leaves the checkout is complete: the source distribution can build, the wheel from it can be imported."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ipc", "kernel", "drivers", "services", "bench")


def build(kind: str, source: Path, destination: Path) -> Path:
    """Runs the build back end as pip does; returns the file it made."""
    destination.mkdir()
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(destination)!r}))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ATOLL_")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=source, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return destination / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a copy of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    copy.mkdir()
    for name in (*FOLDERS, "tests", "docs"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    archive = build("sdist", copy, folder / "sdist")
    shutil.unpack_archive(archive, folder / "unpacked")
    (root,) = (folder / "unpacked").iterdir()
    return root


def files_below(root: Path, *patterns: str) -> set[str]:
    found = {path for name in FOLDERS for pattern in patterns for path in (root / name).rglob(pattern)}
    return {path.relative_to(root).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_source_distribution_holds_all_sources(unpacked: Path) -> None:
    patterns = ("*.py", "*.c", "*.h", "py.typed")
    assert files_below(ROOT, *patterns) == files_below(unpacked, *patterns)
    assert {"ipc/cbuild.py", "ipc/build_ipc.py"} <= files_below(unpacked, "*.py")
    assert files_below(unpacked, "*.so", "*.o", "_*.pyi") == set(), "made when it is built"
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        assert (unpacked / name).is_file()


def test_the_wheel_from_it_can_be_imported(unpacked: Path, tmp_path: Path) -> None:
    wheel = build("wheel", unpacked, tmp_path / "wheel")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(installed)
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"atoll"}, "anything else would meet packages of others"
    assert {path.name for path in (installed / "atoll").iterdir()} == set(FOLDERS)

    modules = [
        "atoll." + script.replace("/build_", "/_").removesuffix(".py").replace("/", ".")
        for script in files_below(unpacked, "build_*.py")
    ]
    assert "atoll.ipc._ipc" in modules
    for module in modules:
        assert (installed / (module.replace(".", "/") + ".pyi")).is_file(), "checkers know the extension"
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    module = importlib.import_module(name)\n"
        "    assert module.__file__.startswith(sys.argv[1]), module.__file__\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(installed), *modules],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        check=True,
    )
    entry_points = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "atoll = atoll.kernel.entry:main" in entry_points.read_text()
