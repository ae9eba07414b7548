"""Small networks and data for tests of training: nothing is downloaded, nothing takes long."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file

from src.config import IMPROVEMENT, Config, ModelConfig, with_fields
from src.data.batches import Batches
from src.device import Device
from src.model.build import Built, build_model
from src.train import FitData

CONVNEXT, EFFICIENTNET = "test_convnext.r160_in1k", "test_efficientnet.r160_in1k"
SIZE = 64  # both networks end with 2x2 positions


@functools.cache
def state(tag: str, n_classes: int = 1000) -> dict[str, torch.Tensor]:
    """Seeded random weights in which no branch is switched off, as ConvNeXt's 1e-6 layer scale would."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = timm.create_model(tag, pretrained=False, num_classes=n_classes).state_dict()
        for name, value in values.items():
            if name.endswith("gamma"):
                value.uniform_(0.5, 1.0)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(std=0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
    return values


def write_weights(path: Path, tag: str = CONVNEXT, n_classes: int = 1000) -> Path:
    """A safetensors file as timm's hub repositories hold them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state(tag, n_classes), path)
    return path


def build(folder: Path, wnids: tuple[str, ...] = ("a", "b", "c", "d", "e"), seed: int = 0, **fields) -> Built:
    """`build_model` with a tiny backbone; `fields` replace those of its ModelConfig."""
    tag = fields.pop("backbone", CONVNEXT)
    if "weights" not in fields:
        fields["weights"] = str(write_weights(folder / f"{tag}.safetensors", tag))
    return build_model(ModelConfig(backbone=tag, image_size=SIZE, **fields), wnids, seed)


def images(n: int, n_classes: int = 5, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N,3,size,size) of a colour per class under noise, and labels_N."""
    rng = np.random.default_rng(0)
    colours_K3 = np.random.default_rng(1).integers(40, 216, (n_classes, 3))
    labels_N = rng.integers(0, n_classes, n)
    noise = rng.integers(-40, 41, (n, 3, size, size))
    return (colours_K3[labels_N][:, :, None, None] + noise).astype(np.uint8), labels_N


def device(micro_batch: int = 64) -> Device:
    return Device(torch.device("cpu"), "no", micro_batch, 16, "a CPU")


def config(**changes) -> Config:
    """The improvement arm, small; keys with `__` for the dot."""
    small = {"train.epochs": 2, "train.batch_size": 8, "model.image_size": SIZE, "model.backbone": CONVNEXT}
    return with_fields(IMPROVEMENT, {**small, **{k.replace("__", "."): v for k, v in changes.items()}})


def fit_data(built: Built, config: Config, n: int = 23, n_holdout: int = 11) -> FitData:
    """`images` divided into fit and holdout."""
    rows, labels_N = images(n + n_holdout)
    cpu, order = torch.device("cpu"), np.arange(n + n_holdout)
    batch, size = config.train.batch_size, config.model.predicts_at
    balanced = config.data.sampling == "balanced"
    return FitData(
        Batches(rows, labels_N, order[:n], batch, cpu, built.preprocess, config.augment, balanced),
        Batches(rows, labels_N, order[n:], 4, cpu, built.preprocess).at_size(size),
    )


def small(weights: Path, **changes) -> dict[str, object]:
    """Overrides that make a run tiny."""
    return {
        "model.backbone": CONVNEXT,
        "model.weights": str(weights),
        "model.image_size": SIZE,
        "data.holdout_per_class": 3,
        "train.epochs": 2,
        "train.batch_size": 5,
        "train.checkpoint_minutes": 0.0,
        "optim.head_lr": 0.01,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }


def arguments(folder: Path, arm: str, data: Path, overrides: dict[str, object]) -> list[str]:
    where = [item for name in ("results", "runs", "cache") for item in (f"--{name}", str(folder / name))]
    pairs = [item for name, value in overrides.items() for item in ("--set", f"{name}={value}")]
    return [arm, "--profile", "offline", "--data", str(data), *where, *pairs]
