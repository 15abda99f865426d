"""Real file trees in real file systems, copied in by nbdcopy: saved is what a scan of all blocks says is possible."""

import filecmp
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from serverkit import Server, run

from atoll.bench.realdata import RealDataError, make_image, tool
from atoll.bench.workload import Images

BLOCK = 4096
# Of the standard library; what else lies there differs much from one Python to the next.
FOLDERS = (
    "asyncio",
    "collections",
    "ctypes",
    "email",
    "encodings",
    "html",
    "http",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "unittest",
)


def standard_library(into: Path, *leave_out: str) -> None:
    source = Path(sysconfig.get_paths()["stdlib"])
    for name in FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, into / name, ignore=shutil.ignore_patterns(*leave_out))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two versions of a tree: what differs moves everything behind it to other places."""
    folder = tmp_path_factory.mktemp("images")
    standard_library(folder / "first")
    standard_library(folder / "second", "t*.py", "*b*.pyc")
    made = []
    for name in ("first", "second"):
        made.append(folder / f"{name}.image")
        make_image(folder / name, made[-1])
    return made


@pytest.mark.slow
def test_savings_are_what_is_possible(images: list[Path], make_server: Callable[..., Server], tmp_path: Path) -> None:
    """Within 3 % (relative) at threshold 1; a higher one saves less, and what is read is right at each."""
    possible = Images(images).scan()
    assert possible.blocks > 3000 and possible.possible > 0.2, possible
    saved = []
    for threshold in (1, 8):
        volumes = [
            {"name": f"v{number}", "size": path.stat().st_size, "threshold": threshold}
            for number, path in enumerate(images)
        ]
        server = make_server(config={"volumes": volumes}).start()
        for number, image in enumerate(images):
            run("nbdcopy", "--flush", image, server.uri(f"v{number}"))
        stored = server.json("status")["dedup"]["stored_bytes"] // BLOCK
        saved.append((possible.blocks - stored) / (possible.blocks - possible.distinct))
        for number, image in enumerate(images):
            run("nbdcopy", server.uri(f"v{number}"), tmp_path / "back")
            assert filecmp.cmp(image, tmp_path / "back", shallow=False)
        server.cli("check", "--live")
        server.stop()
    print(f"of {possible}: {saved}")
    assert abs(saved[0] - 1) < 0.03, saved
    assert 0.3 < saved[1] < saved[0], saved


def test_a_tool_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RealDataError, match="mke2fs"):
        make_image(tmp_path / "nosuch", tmp_path / "image")
    with pytest.raises(RealDataError, match="nosuch: No such file"):
        tool("nosuch")
