"""A run's folder a second time, on a drive that may lose, cut or garble files (Google Drive in Colab).

The run works on the local disk. A snapshot is one tar file with all that going on needs, named by its own
SHA-256, so that whatever is not whole is known as such; the newest two are kept.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

from src import NotNow, SetupError
from src.files import sha256, write_atomically

GENERATIONS = 2
NAME = re.compile(r"snapshot-(\d{6})-([0-9a-f]{64})\.tar")


def save(run: Path, backup: Path) -> bool:
    """Put a snapshot of the folder `run` below `backup`; whether it is there and reads as it was written.

    A drive that cannot be written to is said, and the run goes on without.
    """
    place = backup / run.name
    try:
        with tempfile.TemporaryDirectory(dir=run.parent) as scratch:
            packed = Path(scratch) / "snapshot.tar"
            _pack(run, packed)
            digest = sha256(packed)
            number = max((n for n, _, _ in _snapshots(place)), default=0) + 1
            path = place / f"snapshot-{number:06d}-{digest}.tar"
            write_atomically(path, lambda partial: shutil.copyfile(packed, partial))
        if sha256(path) != digest:
            raise OSError(f"{path.name} does not read as it was written")
        for _, _, old in _snapshots(place)[:-GENERATIONS]:
            old.unlink(missing_ok=True)
    except (OSError, SetupError) as error:
        tqdm.write(f"no snapshot in {place} ({error}): the run goes on, and tries again later")
        return False
    return True


def restore(backup: Path, run: Path) -> bool:
    """Unpack the newest whole snapshot into the folder `run`, run.json last; whether there was one.

    Raises `NotNow` where a snapshot, or the folder, is out of reach: an older one would lose what is newer.
    """
    for _, digest, path in reversed(_snapshots(backup / run.name)):
        try:
            with tempfile.TemporaryDirectory(dir=_made(run.parent)) as scratch:
                local = Path(scratch) / path.name
                shutil.copyfile(path, local)  # read once: the drive may answer otherwise the second time
                if sha256(local) != digest:
                    raise tarfile.TarError("its SHA-256 does not match its name")
                with tarfile.open(local) as archive:
                    members = sorted(archive.getmembers(), key=lambda member: member.name == "run.json")
                    if not members or members[-1].name != "run.json":
                        raise tarfile.TarError("it does not say whose run it is")
                    archive.extractall(run, members, filter="data")
        except tarfile.TarError as error:
            tqdm.write(f"{path} is damaged ({error}); trying the one before it")
            continue
        except OSError as error:
            raise NotNow(
                f"{path} cannot be restored to {run} ({error}). See that the drive is mounted and that there "
                "is room, and give the same command again; without --backup the run starts anew."
            ) from error
        tqdm.write(f"restored {run.name} from {path}")
        return True
    return False


def _pack(run: Path, target: Path) -> None:
    """A tar of the run's files; of checkpoints the newest, and no locks and leavings of writes."""
    newest = max((path.stem for path in run.glob("checkpoint-*.json")), default="")
    with tarfile.open(target, "w") as archive:
        for path in sorted(run.rglob("*")):
            name = path.relative_to(run)
            older = len(name.parts) == 1 and path.stem.startswith("checkpoint-") and path.stem != newest
            if path.is_file() and not path.name.startswith(".") and not older:
                archive.add(path, str(name))


def _snapshots(place: Path) -> list[tuple[int, str, Path]]:
    """Number, SHA-256 and path of every snapshot in a folder, the newest last."""
    found = [(NAME.fullmatch(path.name), path) for path in place.glob("snapshot-*.tar")]
    return sorted((int(match[1]), match[2], path) for match, path in found if match)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
