"""Files below a folder: what is there, and what of it is an image."""

from __future__ import annotations

import mimetypes
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from src import SetupError

# What files are named, and what they may hold whatever they are named: a suffix often lies. Pillow knows more
# formats, and starts another program for one of them.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
PROBED = 100  # files of one suffix that are looked into
MAX_FILE_BYTES = 256 * 2**20  # no single image is larger: bounds what a crafted archive may unpack

Version = tuple[int, int]


class FolderTree:
    """Files below a folder, hidden ones left out: relative name -> (size, mtime in ns).

    `folders`: relative names of the visible folders. Links are followed. Raises `SetupError` for a folder
    that cannot be listed or that links lead to twice, for a name that is not UTF-8, and for what is neither
    file nor folder.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self.folders: list[str] = []
        self.files = dict(sorted(self._scan()))

    def _scan(self) -> Iterator[tuple[str, Version]]:
        """Each visible file, and each folder into `folders`."""
        left, seen = [""], {}  # prefixes to come; real path -> folder
        while left:
            prefix = left.pop()
            folder = self.root / prefix
            place = os.path.realpath(folder)
            if place in seen:
                raise SetupError(
                    f"{folder} and {seen[place]} are one folder: its images would count twice. "
                    "Remove the link."
                )
            seen[place] = folder
            for entry in visible(folder):
                name = prefix + entry.name
                require_utf8(self.root, name)
                if is_folder(entry):
                    self.folders.append(name)
                    left.append(f"{name}/")
                else:
                    yield name, version(entry.path)

    def images(self, folder: str) -> list[str]:
        """Names of the images below `folder`, at any depth."""
        return [name for name in self.files if name.startswith(f"{folder}/") and is_image(name)]

    def read(self, name: str) -> bytes:
        check_size(self.files[name][0])
        return (self.root / name).read_bytes()


def version(path: Path | str) -> Version:
    """Size and mtime in ns of a file; of the link itself where it leads nowhere, which fails when it is read.

    Raises `SetupError` for a pipe, a socket or a device: reading one may have no end.
    """
    try:
        status = os.stat(path)
    except OSError:
        status = os.lstat(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
        raise SetupError(f"{path} is neither a file nor a folder. Remove it.")
    return status.st_size, status.st_mtime_ns


def require_utf8(root: Path, name: str) -> None:
    """Raise `SetupError` for a name that no table could hold."""
    if name.encode("utf-8", "ignore").decode() != name:
        raise SetupError(f"{root}: the file name {name!r} is not UTF-8. Rename the file.")


def check_size(n_bytes: int) -> None:
    """Raise `ValueError` for a file larger than any image."""
    if n_bytes > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def missed_images(root: Path, names: Sequence[str]) -> list[str]:
    """Those of the `names` without an image's suffix that are images: by another suffix, or by their content.

    Of each suffix that is not an image's, the first `PROBED` files are looked into.
    """
    by_suffix = defaultdict(list)
    for name in names:
        by_suffix[PurePosixPath(name).suffix.lower()].append(name)
    missed = []
    for suffix, files in by_suffix.items():
        if (mimetypes.guess_type(f"a{suffix}")[0] or "").startswith("image/"):
            missed += files
        else:
            missed += [name for name in files[:PROBED] if _holds_image(root / name)]
    return missed


def _holds_image(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # Pillow's plugins raise nearly everything on bytes of another kind
        return False


def is_hidden(name: str) -> bool:
    """True for what systems leave in folders; `@eaDir` holds a network disk's small copies of the images."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def visible(folder: Path) -> list[os.DirEntry]:
    """What is in `folder` and not hidden, by name. Raises `SetupError` where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not is_hidden(e.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise SetupError(f"{folder} cannot be listed ({error.strerror}). Make it readable.") from error


def is_folder(entry: os.DirEntry) -> bool:
    """True for a folder and a link to one; false, and no error, for a link to itself."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def subfolders(path: Path) -> list[Path]:
    """The visible folders right below `path`, by name."""
    return [Path(entry.path) for entry in visible(path) if is_folder(entry)]


def has_class_folders(path: Path) -> bool:
    """True where two or more folders right below `path` hold images."""
    return sum(any(is_image(e.name) for e in visible(folder)) for folder in subfolders(path)) >= 2
