"""One pass over a split: logits for the report, or the features that a frozen backbone gives."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax
from tqdm.auto import tqdm

from src import processes
from src.data.batches import Batches
from src.device import Device, halving
from src.files import read_array, read_json, write_array, write_json


def one_pass(
    function: Callable[[torch.Tensor], torch.Tensor], batches: Batches, device: Device, label: str
) -> np.ndarray:
    """`function` over the batches in order -> float32 (N, ...). Put its model in eval mode first.

    Of several processes each takes its share of the batches.
    """
    outputs: list[np.ndarray] = []
    at_once = batches.batch_size

    def answers(inputs: torch.Tensor, n: int) -> list[np.ndarray]:
        return [function(part).float().cpu().numpy() for part in inputs.split(n)]

    with torch.inference_mode(), autocast(device), image_bar(batches.n_examples, label) as bar:
        for inputs, _ in batches.in_order(processes.share):
            parts, at_once = halving(partial(answers, inputs), at_once)
            outputs += parts
            bar.update(len(inputs) * processes.n_processes())
    return np.concatenate(processes.gathered(outputs))


def loss_and_accuracy(logits_NK: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """Mean cross-entropy and accuracy over rows, in float64."""
    log_probabilities_NK = log_softmax(logits_NK.astype(np.float64), axis=1)
    loss = -log_probabilities_NK[np.arange(len(labels_N)), labels_N].mean()
    right_N = logits_NK.argmax(axis=1) == labels_N
    return {"loss": float(loss), "accuracy": float(right_N.mean())}


def image_bar(n_images: int, label: str, done: int = 0) -> tqdm:
    """A bar over images, with images a second and the time left; it goes when it is full."""
    options = {"unit": "img", "unit_scale": True, "leave": False, "mininterval": 0.5}
    return tqdm(total=n_images, initial=done, desc=label, disable=not processes.is_main(), **options)


def autocast(device: Device) -> torch.autocast:
    """The device's precision as a context: one place for training, prediction and feature extraction."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[device.precision]
    return torch.autocast(device.torch_device.type, dtype, enabled=device.precision != "no")


def cached_features(
    function: Callable[[torch.Tensor], torch.Tensor],
    batches: Batches,
    device: Device,
    folder: Path,
    identity: dict,
) -> tuple[np.ndarray, float]:
    """`one_pass` done once: the array, memory-mapped from `folder`, and the seconds that computing it took.

    `identity` is all that the features depend on (weights, store, size, precision); its hash names the file.
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{key}.npy"
    note = path.with_suffix(".json")
    if not (note.exists() and path.exists()):
        started = time.perf_counter()
        features = one_pass(function, batches, device, "features of the frozen backbone")
        seconds = time.perf_counter() - started
        if processes.is_main():
            write_array(path, features)
            write_json(note, {**identity, "shape": list(features.shape), "seconds": round(seconds, 3)})
        processes.wait_for_all()
    return read_array(path, mapped=True), read_json(note)["seconds"]
