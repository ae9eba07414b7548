"""A run's folder that was begun with other weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from src import SetupError
from src.experiment import Paths, claim_run_folder, configure, prepare


def claim(inputs: Path, folder: Path, weights: Path, **changes) -> None:
    overrides = {
        "model.backbone": tiny.CONVNEXT,
        "model.weights": str(weights),
        "model.image_size": tiny.SIZE,
        "data.holdout_per_class": 3,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    config = configure("improvement", "offline", str(inputs / "pets"), overrides)
    claim_run_folder(prepare(config, Paths(*(folder / name for name in ("results", "runs", "cache")))))


def variants(weights: Path, folder: Path) -> dict[str, tuple[Path, dict, str]]:
    """Other weights: file, changed fields, and what the refusal names."""
    values = load_file(weights)
    name = next(name for name, value in values.items() if value.ndim > 1)
    nudged = values | {name: values[name].clone()}
    nudged[name].view(-1)[0] = torch.nextafter(values[name].view(-1)[0], torch.tensor(torch.inf))
    save_file(nudged, folder / "nudged.safetensors")
    save_file(dict(values), folder / "relabelled.safetensors", metadata={"release": "2"})
    other = tiny.write_weights(folder / "other.safetensors", tiny.EFFICIENTNET, n_classes=7)
    return {
        "another tag": (other, {"model.backbone": tiny.EFFICIENTNET}, tiny.EFFICIENTNET),
        "one bit of one number": (folder / "nudged.safetensors", {}, "weights_sha256"),
        "the same numbers in another file": (folder / "relabelled.safetensors", {}, "weights_sha256"),
        "none": (weights, {"model.weights": "random", "model.backbone": "test_convnext"}, "model.weights"),
        "another head": (weights, {"model.head": "plain"}, "model.head"),
        "another resolution": (weights, {"model.image_size": 32}, "model.image_size"),
    }


def test_other_weights_are_refused(inputs, tmp_path, tally):
    """The message names the field, and the folder stays what it was."""
    attempts = tally("other_weights")
    weights, folder = inputs / "weights.safetensors", tmp_path / "run"
    claim(inputs, folder, weights)
    before = {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}
    for what, (file, changes, named) in variants(weights, tmp_path).items():
        with attempts.attempt(what):
            with pytest.raises(SetupError, match="another configuration") as refused:
                claim(inputs, folder, file, **changes)
            assert named in str(refused.value) and "Delete that folder" in str(refused.value)
            assert {path: path.read_bytes() for path in before} == before
    with attempts.attempt("the same file under another name is the same"):
        copied = tmp_path / "copied.safetensors"
        copied.write_bytes(weights.read_bytes())
        claim(inputs, folder, copied)
