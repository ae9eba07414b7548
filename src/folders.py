"""Where a run reads and writes, and the lock on what it works in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
from tqdm.auto import tqdm

from src import NotNow
from src import config as configs
from src.config import Config


@dataclass(frozen=True)
class Paths:
    """Where a run reads and writes: what people read, what it works on, what can be made again.

    `backup`: a drive that gets snapshots of what the run works on.
    """

    results: Path
    runs: Path
    cache: Path
    backup: Path | None = None

    @classmethod
    def of(cls, profile: str, results: str = "", runs: str = "", cache: str = "", backup: str = "") -> Paths:
        """Given folders, or the defaults in the checkout: `quick` never overwrites real results."""
        root = Path(__file__).resolve().parent.parent
        default_results = root / "results" / "quick" if profile == "quick" else root / "results"
        return cls(
            Path(results or default_results),
            Path(runs or root / "runs"),
            Path(cache or root / "cache"),
            Path(backup) if backup else None,
        )

    def results_of(self, config: Config) -> Path:
        """The folder of what people read about an arm; of a study's stand-in one within its study's."""
        if config.arm not in configs.STUDY_ARMS:
            return self.results / config.arm.capitalize()
        return study_folder(self.results / "studies" / config.arm, configs.is_stand_in(config))

    def results_around(self, config: Config) -> Path:
        """The folder of what is not of the arm alone, such as an audit: its study's, or all results."""
        return self.results_of(config) if config.arm in configs.STUDY_ARMS else self.results


def study_folder(folder: Path, is_stand_in: bool) -> Path:
    """Where the results of a study lie whose own images' are in `folder`."""
    return folder / "stand_in" if is_stand_in else folder


def require_writable(folder: Path) -> None:
    """Make `folder` and try to write into it."""
    probe = folder / f".{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x")
        finally:  # a full disk has room for its name
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise NotNow(
            f"folder {folder} cannot be written to ({error.strerror}). "
            "Choose another with --results, --runs, --cache or --backup."
        ) from None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; `NotNow` where another process does. Some network drives know no locks."""
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise NotNow(
            f"another process is at work on the run in {folder}. Wait until it has ended, or pass another "
            "folder with --runs DIR."
        ) from None
    except (NotImplementedError, OSError) as error:
        tqdm.write(f"{shown(folder)} cannot be locked ({error}): start no second run on it")
    try:
        yield
    finally:
        lock.release()


def shown(path: Path) -> str:
    """A path as people read it: relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
