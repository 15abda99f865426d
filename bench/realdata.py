"""Savings with real data: images of several versions of a package, each a file system of its own, one after the other.

    python -m atoll.bench.realdata [--package NAME --version V --version V ...] [options of `atoll bench dedup`]
    python -m atoll.bench.realdata --tree DIR --tree DIR ...

- `make_image(tree, image)`        an ext4 file system with what the folder `tree` holds (mke2fs -d), in blocks of 4 KiB
- `download(package, versions, folder)`   unpacked wheels, by pip

`atoll bench dedup --image ...` does the rest (dedup.py): savings beside what a scan of all blocks says is possible,
for run thresholds 1, 2, 4 and 8, and what reading it back costs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import click

from atoll.bench.duplicates import BLOCK

PACKAGE = "Django"
VERSIONS = ("4.2", "4.2.8", "5.0", "5.0.6")
# Room for inodes, bitmaps and a journal beside the files.
IMAGE_PER_BYTE, IMAGE_LEAST = 1.15, 16 << 20


class RealDataError(Exception):
    """A tool failed; the text is what it said."""


def tool(*command: str | os.PathLike[str]) -> None:
    try:
        done = subprocess.run([os.fspath(part) for part in command], capture_output=True, text=True)
    except OSError as error:
        raise RealDataError(f"{command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise RealDataError(f"{' '.join(map(str, command))}: {done.stderr.strip() or f'status {done.returncode}'}")


def make_image(tree: Path, image: Path) -> None:
    """Replaces `image`. RealDataError."""
    sizes = [path.lstat().st_size for path in tree.rglob("*")]
    size = int(IMAGE_LEAST + IMAGE_PER_BYTE * sum(-(-size // BLOCK) * BLOCK for size in sizes) + 512 * len(sizes))
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(size // BLOCK * BLOCK)
    tool("mke2fs", "-q", "-t", "ext4", "-b", str(BLOCK), "-d", tree, image)


def download(package: str, versions: Sequence[str], folder: Path) -> list[Path]:
    """A folder for each version. RealDataError."""
    trees = []
    for version in versions:
        wheels, tree = folder / f"wheel-{version}", folder / f"tree-{version}"
        wanted = f"{package}=={version}"
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
        tool(*pip, "--only-binary=:all:", "--dest", wheels, wanted)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(tree)
        trees.append(tree)
    return trees


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--package", default=PACKAGE, show_default=True, help="From the package index.")
@click.option("--version", "versions", multiple=True, default=VERSIONS, show_default=True, help="Repeatable.")
@click.option(
    "--tree", "trees", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Images of these folders instead; repeatable.",
)  # fmt: skip
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(package: str, versions: tuple[str, ...], trees: tuple[Path, ...], options: tuple[str, ...]) -> None:
    """Write images of file trees and say what sharing saves; further OPTIONS are those of `atoll bench dedup`."""
    with tempfile.TemporaryDirectory(prefix="atoll-realdata-") as name:
        folder, images = Path(name), []
        try:
            for number, tree in enumerate(trees or download(package, versions, folder)):
                images.append(folder / f"image-{number}")
                make_image(tree, images[-1])
        except RealDataError as error:
            raise click.ClickException(str(error)) from None
        arguments = [text for image in images for text in ("--image", str(image))]
        sys.exit(
            subprocess.run(
                [sys.executable, "-m", "atoll.kernel.cli", "bench", "dedup", *arguments, *options]
            ).returncode
        )


if __name__ == "__main__":
    main()
