"""What is done to a trained model without training it, each step kept only where `holdout` gains by it.

Weights: the mean over epochs (soup), the line back to the first weights (WiSE-FT). Prediction: averages over
mirrored or cropped images, and a temperature. `valid` is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms.v2 import functional as transforms

from src.average import State, between, copied, load
from src.config import AfterConfig
from src.data.batches import Batches
from src.device import Device
from src.model.build import Classifier
from src.predict import loss_and_accuracy, one_pass
from src.train import FitData

SHARES = tuple(round(0.1 * i, 1) for i in range(1, 10))  # of the trained weights, on WiSE-FT's line
STATISTICS_BATCHES = 20  # that batch normalisation is measured anew on, for weights that were never trained
CROP = 0.875  # side of the ten crops, of the image's
Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Predictor:
    """How a finished model predicts, what it says of `holdout`, and the steps that were tried (in order)."""

    function: Function
    device: Device
    temperature: float = 1.0
    tried: list[dict] = field(default_factory=list)
    holdout_NK: np.ndarray | None = None

    def logits(self, batches: Batches, label: str) -> np.ndarray:
        """Logits (N,K) of a split, over the temperature."""
        return one_pass(self.function, batches, self.device, label) / self.temperature


def improve(
    model: Classifier, start: State, soup: State | None, data: FitData, config: AfterConfig, device: Device
) -> Predictor:
    """Try what `config` asks for and leave `model` with the weights that predict `holdout` best.

    `start`: the learned state before training; `soup`: the mean over its last epochs. Ties go to the
    simpler: the step that was there before.
    """
    predictor = Predictor(model.classify if data.cached else model, device)
    predictor.holdout_NK = predictor.logits(data.holdout, "holdout")
    labels_N = data.holdout.labels_N[data.holdout.index_M]
    best, live = loss_and_accuracy(predictor.holdout_NK, labels_N), model.learned_state()
    best_state = trained = copied(live)

    def attempt(name: str, state: State | None = None, function: Function | None = None) -> None:
        nonlocal best, best_state
        if state is not None:
            load(live, state)
            measure_statistics(model, data)
        tried = Predictor(function or predictor.function, device)
        tried.holdout_NK = tried.logits(data.holdout, "holdout")
        result = loss_and_accuracy(tried.holdout_NK, labels_N)
        kept = result["accuracy"] > best["accuracy"]
        predictor.tried.append({"step": name, **result, "kept": kept})
        if kept:
            best, best_state = result, copied(live)
            predictor.function, predictor.holdout_NK = tried.function, tried.holdout_NK
        load(live, best_state)

    if soup is not None:
        attempt(f"soup of {config.soup_epochs} epochs", soup)
        trained = best_state
    if config.wise_ft:
        for share in SHARES:
            attempt(f"WiSE-FT {share}", between(start, trained, share))
    if config.tta != "none":
        attempt(config.tta, function=averaged_views(predictor.function, config.tta))
    if config.temperature:
        set_temperature(predictor, labels_N, best["loss"])
    return predictor


def set_temperature(predictor: Predictor, labels_N: np.ndarray, loss: float) -> None:
    """Divide the logits by what fits `holdout` best, if that makes its `loss` smaller."""
    temperature = best_temperature(predictor.holdout_NK, labels_N)
    scaled_NK = predictor.holdout_NK / temperature
    result = loss_and_accuracy(scaled_NK, labels_N)
    kept = result["loss"] < loss  # the accuracy is the same
    predictor.tried.append({"step": f"temperature {temperature:.4f}", **result, "kept": kept})
    if kept:
        predictor.temperature, predictor.holdout_NK = temperature, scaled_NK


@torch.no_grad()
def measure_statistics(model: Classifier, data: FitData) -> None:
    """Batch normalisation's means and variances anew, on training batches, where training changes them.

    Nothing for other networks. Like torch's `update_bn`, but frozen layers keep what they have, features may
    stand for images, and dropout is off, as in prediction.
    """
    model.train()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    model.eval()
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # each batch counts alike
        norm.train()
    function = model.classify if data.cached else model
    for inputs, _ in islice(data.fit.epoch(seed=0, epoch=0), STATISTICS_BATCHES):
        function(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def averaged_views(function: Function, kind: str) -> Function:
    """`function` averaged over an image and its mirror image, or over ten crops at their own size."""

    def views(images_BCHW: torch.Tensor) -> list[torch.Tensor]:
        if kind == "flip":
            return [images_BCHW, images_BCHW.flip(-1)]
        side = round(CROP * images_BCHW.shape[-1])
        return list(transforms.ten_crop(images_BCHW, [side, side]))

    return lambda images_BCHW: torch.stack([function(view).float() for view in views(images_BCHW)]).mean(0)


def best_temperature(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """The divisor of the logits that minimises cross-entropy (Guo et al. 2017), between 1/20 and 20."""

    def loss(log_temperature: float) -> float:
        return loss_and_accuracy(logits_NK / np.exp(log_temperature), labels_N)["loss"]

    bounds = (-np.log(20), np.log(20))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x))
