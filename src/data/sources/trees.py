"""Files below a folder: what is there, and what of it is an image."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_FILE_BYTES = 256 * 2**20  # no single image is larger: bounds what a crafted archive may unpack


class FolderTree:
    """Files below a folder, hidden ones left out: relative name -> (size, mtime in ns)."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.files = dict(sorted(_scan(self.root)))

    def images(self, folder: str) -> list[str]:
        """Names of the images below `folder`, at any depth."""
        return [name for name in self.files if name.startswith(f"{folder}/") and is_image(name)]

    def read(self, name: str) -> bytes:
        check_size(self.files[name][0])
        return (self.root / name).read_bytes()


def check_size(n_bytes: int) -> None:
    """Raise `ValueError` for a file larger than any image."""
    if n_bytes > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def subfolders(path: Path) -> list[Path]:
    """The visible folders right below `path`, by name."""
    return sorted(Path(e.path) for e in os.scandir(path) if e.is_dir() and not is_hidden(e.name))


def has_class_folders(path: Path) -> bool:
    """True where two or more folders right below `path` hold images."""

    def holds_images(folder: Path) -> bool:
        return any(is_image(e.name) and not is_hidden(e.name) for e in os.scandir(folder))

    return sum(map(holds_images, subfolders(path))) >= 2


def _scan(folder: Path | str, prefix: str = "", depth: int = 5) -> Iterable[tuple[str, tuple[int, int]]]:
    """Each visible file below `folder`: relative name, (size, mtime in ns); at most `depth` folders deep."""
    for entry in os.scandir(folder):
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            if depth > 1:
                yield from _scan(entry.path, f"{prefix}{entry.name}/", depth - 1)
        else:
            stat = entry.stat(follow_symlinks=entry.is_file())  # a dangling link fails when it is read
            yield prefix + entry.name, (stat.st_size, stat.st_mtime_ns)
