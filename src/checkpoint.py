"""Checkpoints: written atomically, hashed, two generations, enough for an exact resume.

A checkpoint is a pair: `checkpoint-<step>.pt` (tensors and numbers, loaded with `weights_only`) and
`checkpoint-<step>.json`, written last, which holds its SHA-256. A pair that does not match is passed over.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm.auto import tqdm

from src import SetupError
from src.files import read_json, sha256, write_atomically, write_json

NAME = "checkpoint-" + "[0-9]" * 9  # as a pattern: whatever else people keep beside them is let alone


class Damaged(Exception):
    """A checkpoint that is not what was written."""


def save(folder: Path, step: int, payload: dict) -> None:
    """Write checkpoint number `step`, a new one; of those before it keep the newest that is whole.

    All others go, and leavings of a killed write as well. Raises `SetupError` where the disk is full; the
    checkpoints before it then stay.
    """
    path = folder / f"checkpoint-{step:09d}.pt"
    hashes: list[str] = []

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:  # torch's own would not say that the disk is full
            torch.save(payload, file)
        hashes.append(sha256(partial))

    write_atomically(path, write)
    write_json(path.with_suffix(".json"), {"step": step, "sha256": hashes[0]})
    kept = (path.stem, _newest_whole_before(path))
    for pattern in (f"{NAME}.pt", f"{NAME}.json", ".checkpoint-*.partial"):
        for old in folder.glob(pattern):
            if old.stem not in kept and old.is_file():
                old.unlink()


def load_newest(folder: Path) -> dict | None:
    """Payload of the newest checkpoint that is whole; None where there is none. Damaged ones are named.

    Raises `SetupError` for one that is whole and yet cannot be loaded: this program did not write it.
    """
    manifests = _newest_first(folder)
    for manifest in manifests:
        path = manifest.with_suffix(".pt")
        try:
            require_whole(manifest)
        except Damaged as error:
            tqdm.write(f"checkpoint {path} is damaged ({error}); trying the one before it")
            continue
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what others wrote fails in any of pickle's, zipfile's and torch's ways
            reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
            raise SetupError(f"{path} cannot be loaded. Delete it to go on without it. {reason}") from error
    if manifests:
        tqdm.write(f"no checkpoint in {folder} is whole: training starts anew")
    return None


def require_whole(manifest: Path) -> None:
    """Raises `Damaged` where a checkpoint is not the one that its manifest speaks of."""
    try:
        about, found = read_json(manifest), sha256(manifest.with_suffix(".pt"))
        step, expected = about["step"], about["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    if expected != found:
        raise Damaged("its SHA-256 does not match")
    if step != int(manifest.stem.removeprefix("checkpoint-")):
        raise Damaged(f"it is that of step {step}")


def _newest_first(folder: Path) -> list[Path]:
    """Manifests of all checkpoints; one of a pair whose other half is missing counts."""
    stems = {path.stem for suffix in ("pt", "json") for path in folder.glob(f"{NAME}.{suffix}")}
    return [folder / f"{stem}.json" for stem in sorted(stems, reverse=True)]


def _newest_whole_before(path: Path) -> str:
    """Stem of the newest whole checkpoint before the one at `path`; "" where there is none."""
    for manifest in _newest_first(path.parent):
        if manifest.stem < path.stem:
            try:
                require_whole(manifest)
                return manifest.stem
            except Damaged:
                continue
    return ""


def difference(ours: object, theirs: object, name: str) -> str:
    """The first place, as a dotted name, in which payloads differ in keys, types or shapes; "" for none."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if odd := ours.keys() ^ theirs.keys():
            return f"{name}.{min(map(str, odd))}"
        found = (difference(ours[key], theirs[key], f"{name}.{key}") for key in ours)
        return next(filter(None, found), "")
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor) and ours.shape != theirs.shape:
        return f"{name}: {tuple(theirs.shape)} for {tuple(ours.shape)}"
    return "" if isinstance(theirs, type(ours)) else name
