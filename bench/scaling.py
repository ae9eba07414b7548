"""How time and memory grow with the images, the classes and the resolution: no term may be quadratic.

Each size has a process of its own, and the sizes take turns. `exponent` is the slope of log(time) against
log(size), by least squares over the medians: 1 is proportional; for the resolution the size is the pixels.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.conventional import MEAN, STD
from bench.pair import Round, report_errors, save, spread, take_turns
from bench.workload import arm_config, parse_arguments, profile
from src.data.batches import Batches, Preprocess
from src.data.sources import open_source
from src.data.store import open_store
from src.device import choose_device, set_up_process
from src.evaluate import prediction_frame, score
from src.experiment import Paths, configure
from src.model.build import build_model
from src.train import FitData, Trainer

SERIES = {
    "images": ("an epoch of augmented input at 64 px, by images", (10_000, 20_000, 50_000, 100_000)),
    "features": ("an epoch of the baseline's head, by images", (10_000, 20_000, 50_000, 100_000)),
    "tables": ("predictions table and scores, by images", (10_000, 20_000, 50_000, 100_000)),
    "classes": ("predictions table and scores of 10,000 images, by classes", (20, 50, 100, 200)),
    "resolution": ("augmented input of 512 images, by pixels a side", (64, 96, 128, 224, 288)),
}


def images(size: int, data: str) -> Round:
    """An epoch over the first `size` training images of Tiny-ImageNet."""
    set_up_process()
    cache = Paths.of("full").cache
    config = configure("improvement", profile(), data)
    store = open_store(open_source(config.data, cache), cache, 64)
    rows = np.flatnonzero(store.official_split_N == "train")[:size]
    preprocess = Preprocess(64, MEAN, STD, "bicubic")
    device = choose_device(64, 128).torch_device
    return _epochs(Batches(store.images, store.labels_N, rows, 128, device, preprocess, config.augment))


def features(size: int, data: str) -> Round:
    """An epoch of the linear classifier, loss and update, over `size` random features."""
    set_up_process()
    config = arm_config("baseline", data, {"train.epochs": 10**5})
    wnids = open_source(config.data, Paths.of("full").cache).wnids
    model = build_model(config.model, wnids, 0).model
    device = choose_device(config.model.image_size, config.train.batch_size)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((size, model.classifier.in_features), dtype=np.float32)
    labels_N = rng.integers(0, len(wnids), size)
    fit, holdout = (
        Batches(rows, labels_N, index, 128, device.torch_device)
        for index in (np.arange(size), np.arange(size // 20))
    )
    device = replace(device, micro_batch=config.train.batch_size)
    trainer = Trainer(model, FitData(fit, holdout, cached=True), config, device, Path(tempfile.mkdtemp()))

    def one_round() -> dict[str, float]:
        started = time.perf_counter()
        trainer.train_epoch()
        trainer.end_epoch()
        return {"seconds": time.perf_counter() - started}

    return one_round


def tables(size: int, data: str) -> Round:
    return _scored(size, 200)


def classes(size: int, data: str) -> Round:
    return _scored(10_000, size)


def resolution(size: int, data: str) -> Round:
    """512 random images of `size` x `size` pixels, stored and given at that size."""
    set_up_process()
    rows = np.random.default_rng(0).integers(0, 256, (512, 3, size, size), dtype=np.uint8)
    config = configure("improvement", profile(), data)
    preprocess, labels_N = Preprocess(size, MEAN, STD, "bicubic"), np.zeros(512, np.int64)
    device = choose_device(size, 128).torch_device
    return _epochs(Batches(rows, labels_N, np.arange(512), 128, device, preprocess, config.augment))


def _epochs(batches: Batches) -> Round:
    epoch = 0

    def one_round() -> dict[str, float]:
        nonlocal epoch
        epoch += 1
        started = time.perf_counter()
        for _ in batches.epoch(0, epoch):
            pass
        return {"seconds": time.perf_counter() - started}

    return one_round


def _scored(n: int, n_classes: int) -> Round:
    rng = np.random.default_rng(0)
    logits_NK = rng.standard_normal((n, n_classes), dtype=np.float32)
    labels_N = rng.integers(0, n_classes, n)
    names = [f"class {k}" for k in range(n_classes)]
    image_ids = np.array([f"image_{i}" for i in range(n)])

    def one_round() -> dict[str, float]:
        started = time.perf_counter()
        score(prediction_frame(logits_NK, labels_N, image_ids, names, names))
        return {"seconds": time.perf_counter() - started}

    return one_round


def grown(measured: dict[str, dict[str, list[float]]], sizes: tuple[int, ...], power: int) -> dict:
    """Medians by size and the exponent of their growth; sizes are raised to `power` (2: pixels)."""
    seconds = [float(np.median(measured[str(size)]["seconds"])) for size in sizes]
    exponent = np.polyfit(power * np.log(sizes), np.log(seconds), 1)[0]
    memory = [max(measured[str(size)]["peak_memory_gb"]) for size in sizes]
    return {"sizes": list(sizes), "seconds": seconds, "peak_memory_gb": memory, "exponent": float(exponent)}


def main() -> None:
    options = parse_arguments(__doc__)
    rows = {}
    for name, (label, sizes) in SERIES.items():
        ways = {str(size): (f"bench.scaling:{name}", {"size": size, "data": options.data}) for size in sizes}
        case = take_turns(ways, options.rounds)
        power = 2 if name == "resolution" else 1
        rows[name] = {"what": label, **grown(case.measured, sizes, power)}
        print(f"{label}: grows with exponent {rows[name]['exponent']:.2f}", flush=True)
        for size, memory in zip(sizes, rows[name]["peak_memory_gb"], strict=True):
            print(f"  {size:>7,}: {spread(case.summary(str(size), 'seconds'))} s, peak {memory} GB")
    save("scaling", "Tiny-ImageNet's training images; random features, logits and pixels", rows)


if __name__ == "__main__":
    report_errors(main)
