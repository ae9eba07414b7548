"""Data sets that come as archives: fetched, verified and unpacked below the cache, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import filelock

from src import SetupError
from src.data.download import ALGORITHMS, download
from src.files import flush


@dataclass(frozen=True)
class Archive:
    """A tar, packed or not. `checksum`: MD5 or SHA-256 in hexadecimal; `size`: bytes, 0: not published."""

    url: str
    checksum: str
    size: int = 0

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        algorithm = {"md5": "MD5", "sha256": "SHA-256"}[ALGORITHMS[len(self.checksum)]]
        size = f"{self.size:,} bytes, " if self.size else ""
        return f"{self.url} ({size}{algorithm} {self.checksum})"


_DOGS, _FOOD = "http://vision.stanford.edu/aditya86/ImageNetDogs", "https://food-x.s3.amazonaws.com"
# By the name that `data.source` has for them; all archives of a data set unpack into one folder.
ARCHIVES = {
    "download_dogs": (
        Archive(f"{_DOGS}/images.tar", "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58"),
        Archive(f"{_DOGS}/lists.tar", "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c"),
    ),
    "download_birds": (
        Archive(
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            "97eceeb196236b17998738112f37df78",
            1_150_585_339,
        ),
    ),
    "download_food": (
        Archive(f"{_FOOD}/annot.tar", "0c632c543ceed0e70f0eb2db58eda3ab"),
        Archive(f"{_FOOD}/train.tar", "8e56440e365ee852dcb0953a9307e27f"),
        Archive(f"{_FOOD}/val.tar", "fa9a4c1eb929835a0fe68734f4868d3b"),
        Archive(f"{_FOOD}/test.tar", "32479146dd081d38895e46bb93fed58f"),
    ),
}


def whole_copy(name: str) -> str:
    """What to do for a whole copy of the data set `name` of `ARCHIVES`, as an error says it."""
    archives = " and ".join(map(str, ARCHIVES[name]))
    return (
        f"Get a whole copy: `--set data.source={name}` fetches it (without --data); or unpack {archives} "
        "into one folder."
    )


def fetch(name: str, cache_dir: Path) -> Path:
    """The folder of the data set `name` of `ARCHIVES`, fetched and unpacked below `cache_dir` at first.

    The folder is whole or not there; processes that ask for it at once wait for the one that makes it. The
    archives are removed once it is whole. Raises `SetupError` for an archive that cannot be had, is another
    one or has members that point out of the folder, and where there is no room.
    """
    folder = Path(cache_dir) / "downloads" / name
    if folder.is_dir():
        return folder
    packed = [(archive, folder.with_name(f"{name}-{archive.name}")) for archive in ARCHIVES[name]]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f"{name}.lock")):
            if not folder.is_dir():
                for archive, path in packed:
                    download(archive.url, path, archive.size, archive.checksum)
                _unpack([path for _, path in packed], folder)
            for _, path in packed:
                path.unlink(missing_ok=True)
    except (OSError, NotImplementedError) as error:
        raise SetupError(
            f"{folder} cannot be written: {error}. Make room there, or pass another folder with "
            "`--cache DIR`. What was fetched is kept."
        ) from error
    return folder


def _unpack(archives: list[Path], folder: Path) -> None:
    """Unpack beside `folder`, then rename. The caller holds the lock, so what is beside it is of the dead."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for path in archives:
            try:
                with tarfile.open(path) as archive:
                    archive.extractall(partial, filter="data")  # nothing outside, no devices, no owners
            except (tarfile.TarError, EOFError) as error:
                raise SetupError(
                    f"{path} cannot be unpacked ({type(error).__name__}: {error}). Delete it and run again."
                ) from error
        os.rename(partial, folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
