"""Checkpoints: written atomically, hashed, two generations, enough for an exact resume.

A checkpoint is a pair: `checkpoint-<step>.pt` (tensors and numbers, loaded with `weights_only`) and
`checkpoint-<step>.json`, written last, which holds its SHA-256. A pair that does not match is passed over.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm.auto import tqdm

from src.files import read_json, sha256, write_atomically, write_json

GENERATIONS = 2


def save(folder: Path, step: int, payload: dict) -> None:
    """Write checkpoint number `step`; of those up to it keep the newest two.

    Later ones, which a resume passed over as damaged, and leavings of a killed write go as well.
    """
    path = folder / f"checkpoint-{step:09d}.pt"
    hashes: list[str] = []

    def write(partial: Path) -> None:
        torch.save(payload, partial)
        hashes.append(sha256(partial))

    write_atomically(path, write)
    write_json(path.with_suffix(".json"), {"step": step, "sha256": hashes[0]})
    numbered = sorted(old.stem for old in folder.glob("checkpoint-*.pt") if old.stem <= path.stem)
    for old in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*.partial")]:
        if old.stem not in numbered[-GENERATIONS:]:
            old.unlink()


def load_newest(folder: Path) -> dict | None:
    """Payload of the newest checkpoint that is whole; None where there is none. Damaged ones are named."""
    for manifest in sorted(folder.glob("checkpoint-*.json"), reverse=True):
        path = manifest.with_suffix(".pt")
        try:
            if read_json(manifest)["sha256"] == sha256(path):
                return torch.load(path, map_location="cpu", weights_only=True)
            reason = "its SHA-256 does not match"
        except (OSError, ValueError, KeyError) as error:
            reason = str(error)
        tqdm.write(f"checkpoint {path.name} is damaged ({reason}); trying the one before it")
    return None
