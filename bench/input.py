"""Input alone: images a second, decoded, augmented, resized, normalised and on the device.

Conventional: Pillow in two DataLoader workers, at 224 px (bilinear, as the study's notebooks resized). Ours:
the decoded store, augmentation of whole batches at the stored size, then ConvNeXt's own bicubic resizing.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torchvision import transforms

from bench import conventional
from bench.pair import Round, report_errors, save, take_turns
from bench.workload import CACHE, described, image_folder, parse_arguments, profile
from src.config import AugmentConfig, DataConfig
from src.data.batches import Batches, Preprocess, to_device
from src.data.sources import open_source
from src.data.store import Store, open_store
from src.device import choose_device, set_up_process
from src.experiment import configure

SIZE = 224
BATCH = 256


class AsStored(Preprocess):
    """No resizing and no normalisation: what augmentation gives."""

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW


PREPROCESS, AS_STORED = (
    kind(SIZE, conventional.MEAN, conventional.STD, "bicubic") for kind in (Preprocess, AsStored)
)
LABELS = {
    "train_224": "training batches, 224 px, normalised float32",
    "plain_224": "the same without augmentation",
    "train_stored": "training batches at the stored size, uint8",
    "decode": "decoding alone: every epoch against once",
}


def conventional_input(folder: str, what: str) -> Round:
    """An epoch of the study's loader."""
    transform = {
        "train_224": conventional.training_transform(SIZE),
        "plain_224": conventional.plain_transform(SIZE),
        "train_stored": conventional.stored_size_transform(),
        "decode": transforms.PILToTensor(),
    }[what]
    batches = conventional.loader(Path(folder, "train"), transform, shuffle=True)
    device = choose_device(SIZE, BATCH).torch_device

    def one_round() -> dict[str, float]:
        started = time.perf_counter()
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
        return {"images_per_s": len(batches.dataset) / _seconds_since(started, device)}

    return one_round


def our_input(folder: str, what: str) -> Round:
    """An epoch of `Batches` over the store of the same files."""
    set_up_process()
    cache = CACHE / "input"
    if what == "decode":
        shutil.rmtree(cache, ignore_errors=True)
    store = _store(folder, cache)
    device = choose_device(SIZE, BATCH).torch_device
    recipe = AugmentConfig() if what == "plain_224" else configure("improvement", profile(), folder).augment
    preprocess = AS_STORED if what == "train_stored" else PREPROCESS
    rows = to_device(store.images, device)
    index_M = np.flatnonzero(store.official_split_N == "train")
    batches = Batches(rows, store.labels_N, index_M, BATCH, device, preprocess, recipe)
    epoch = 0

    def one_round() -> dict[str, float]:
        nonlocal epoch
        epoch += 1
        started = time.perf_counter()
        if what == "decode":
            shutil.rmtree(cache)
            return {"images_per_s": len(_store(folder, cache)) / _seconds_since(started, device)}
        for _inputs, _labels_B in batches.epoch(0, epoch):
            pass
        return {"images_per_s": len(index_M) / _seconds_since(started, device)}

    return one_round


def _store(folder: str, cache: Path) -> Store:
    return open_store(open_source(DataConfig(source="local", path=folder), cache), cache, 64)


def _seconds_since(started: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    options = parse_arguments(__doc__, train_per_class=20)
    folder = image_folder(options.data, 200, options.train_per_class, 10)
    rows = {}
    for what, label in LABELS.items():
        settings = {"folder": str(folder), "what": what}
        ways = {
            "conventional": ("bench.input:conventional_input", settings),
            "ours": ("bench.input:our_input", settings),
        }
        rows[what] = take_turns(ways, options.rounds).row("images_per_s", label, "images/s")
    save("input", described(folder), rows, batch={"conventional": conventional.BATCH, "ours": BATCH})


if __name__ == "__main__":
    report_errors(main)
