"""What the benchmarks run on: one folder of image files that both ways read, and the arms' configurations."""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from bench.pair import ROUNDS
from src import SetupError
from src.config import Config, with_fields
from src.data.sources import open_source
from src.experiment import Paths, configure
from src.files import write_atomically

CACHE = Paths.of("full").cache / "bench"


def parse_arguments(about: str, **defaults: int) -> argparse.Namespace:
    """The options that every benchmark has, and one integer option for each of `defaults`."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--data", default="", help="Tiny-ImageNet, as for src.experiment")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser.parse_args()


def profile() -> str:
    """ConvNeXt-Tiny at 224 px where there is a GPU, else EfficientNet-Lite0 at 96 px."""
    return "full" if torch.cuda.is_available() else "offline"


def arm_config(arm: str, data: str, overrides: dict[str, object] | None = None) -> Config:
    """The arm of a user of this machine, all of train trained on, as the study did.

    On a GPU with random weights: speed does not depend on them.
    """
    config = configure(arm, profile(), data, {"data.protocol": "published", **(overrides or {})})
    if config.model.weights == "hub":
        weights = random_weights(config.model.backbone)
        config = with_fields(config, {"model.weights": str(weights)})
    return config


def random_weights(tag: str) -> Path:
    """A file of seeded random weights of timm's model `tag`."""
    path = CACHE / f"{tag}-random.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        state = timm.create_model(tag, pretrained=False).state_dict()
        write_atomically(path, lambda partial: save_file(state, partial))
    return path


def image_folder(data: str, classes: int, train_per_class: int, valid_per_class: int) -> Path:
    """`train/` and `valid/` with class folders: the first images of the first classes, as their own files.

    Raises `SetupError` where the data hold fewer.
    """
    source = open_source(configure("baseline", profile(), data).data, CACHE.parent)
    counts = f"{classes}x{train_per_class}+{valid_per_class}"
    folder = CACHE / source.fingerprint[:12] / f"{source.name}-{counts}"
    if folder.exists():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    room = {"train": train_per_class, "valid": valid_per_class}
    taken: Counter = Counter()
    for example in source.examples():
        key = (example.split, example.label)
        if example.label < classes and taken[key] < room.get(example.split, 0):
            taken[key] += 1
            target = partial / example.split / source.wnids[example.label] / f"{taken[key]:05d}.jpeg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(example.read())
    if taken.total() != classes * (train_per_class + valid_per_class):
        raise SetupError(f"{source.name} has only {taken.total()} of the {counts} images that are wanted.")
    partial.rename(folder)
    return folder


def described(folder: Path) -> str:
    """Which images, in words: `tiny-imagenet, 200 classes x 20 + 10 images`."""
    name, _, counts = folder.name.rpartition("-")
    classes, _, images = counts.partition("x")
    return f"{name}, {classes} classes x {images.replace('+', ' train + ')} valid images"
