"""Where a trained model looks: Grad-CAM, the weights of its attention, and whether either says anything.

    python -m src.experiment explain --profile offline --data DIR                       baseline, improvement
    python -m src.experiment explain --preset animals40 --profile offline --data DIR    one arm

Maps are as large as the last feature map; `enlarged` brings them to the size of an image. Two measurements
stand beside the pictures: how much more the accuracy falls when the marked part of an image is painted over
than when another part is, and how many answers the attention changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from src import SetupError
from src.analysis import ARMS
from src.data.batches import Batches
from src.evaluate import paired_interval
from src.figures.arm import SAMPLE_SEED
from src.figures.explain import (
    N_ABREAST,
    MapColumn,
    attention_over_training,
    findings,
    where_it_looks,
)
from src.files import sha256, write_json
from src.model.build import Classifier
from src.report import footer, save

if TYPE_CHECKING:
    from src.experiment import Result

N_MEASURED, SEED = 500, 0  # images of `valid` that the numbers are over, and how they are drawn
SHARE = 0.25  # of an image that is painted over
SHOWN_PIXELS = 160  # side of a map in the figure


class HeadOnMap(nn.Module):
    """What a `Classifier` does after its last feature map: (B,C,h,w) -> logits_BK."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model, self.map = model, nn.Identity()

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        model, features = self.model, self.map(map_BCHW)
        if model.attention is None:
            feature_map = features.permute(0, 2, 3, 1) if model.nhwc else features
            features = model.backbone.forward_head(feature_map, pre_logits=True)
        return model.classify(features)


@torch.no_grad()
def last_map(model: Classifier, images_BCHW: torch.Tensor) -> torch.Tensor:
    """The backbone's last feature map (B,C,h,w) of normalised images, whatever its layout."""
    feature_map = model.backbone.forward_features(images_BCHW)
    return feature_map.permute(0, 3, 1, 2) if model.nhwc else feature_map


def grad_cam(model: Classifier, images_BCHW: torch.Tensor, classes_B: np.ndarray) -> np.ndarray:
    """Where in the last feature map the evidence for a class of each image lies.

    Normalised images -> float32 (B,h,w), each map from 0 to 1. Grad-CAM (Selvaraju et al. 2017) by the
    package grad-cam: mean gradient of the class's logit times the map, summed over channels, its positive
    part. Only what follows the map is differentiated, so the backbone may be frozen.
    Raises `SetupError` where the package is not installed.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise SetupError(f"Grad-CAM needs another package ({error}): pip install grad-cam") from None
    head = HeadOnMap(model)
    targets = [ClassifierOutputTarget(int(label)) for label in classes_B]
    with torch.enable_grad():
        maps_Bhw = GradCAM(head, [head.map])(last_map(model, images_BCHW).requires_grad_(), targets)
    model.zero_grad()
    return maps_Bhw


@torch.no_grad()
def attention_map(model: Classifier, images_BCHW: torch.Tensor) -> np.ndarray:
    """The attention that each position gets, (B,h,w): mean over layers, heads and queries, times h·w.

    1 is what it would get if all got the same. Raises `SetupError` for a head without attention.
    """
    if model.attention is None:
        raise SetupError("this head has no attention; train with model.head = attention or cross_attention.")
    map_BCHW = last_map(model, images_BCHW)
    received_LBT = torch.stack([weights.mean((1, 2)) for weights in model.attention.weights(map_BCHW)])
    times_uniform_BT = received_LBT.mean(0) * received_LBT.shape[-1]
    return times_uniform_BT.unflatten(1, map_BCHW.shape[2:]).cpu().numpy()


def enlarged(maps_Nhw: np.ndarray, size: int) -> np.ndarray:
    """(N,h,w) -> (N,size,size), bilinear."""
    maps_N1hw = torch.from_numpy(maps_Nhw)[:, None]
    return F.interpolate(maps_N1hw, (size, size), mode="bilinear")[:, 0].numpy()


def shuffled(maps_Nhw: np.ndarray) -> np.ndarray:
    """The values of every map at random positions of it."""
    values_NT = maps_Nhw.reshape(len(maps_Nhw), -1)
    return np.random.default_rng(SEED).permuted(values_NT, axis=1).reshape(maps_Nhw.shape)


def without_marked(images_BCHW: torch.Tensor, maps_Bhw: np.ndarray) -> torch.Tensor:
    """Normalised images, the `SHARE` of their pixels that is marked highest in the mean colour (zero).

    Of pixels that are marked alike the upper ones go first.
    """
    marks_BP = torch.from_numpy(enlarged(maps_Bhw, images_BCHW.shape[-1])).flatten(1)
    order_BP = marks_BP.argsort(dim=1, descending=True, stable=True)
    highest = order_BP[:, : round(SHARE * marks_BP.shape[1])]
    mask_BP = torch.zeros_like(marks_BP, dtype=torch.bool).scatter_(1, highest, True)
    mask_B1HW = mask_BP.view(len(images_BCHW), 1, *images_BCHW.shape[2:])
    return images_BCHW.masked_fill(mask_B1HW.to(images_BCHW.device), 0.0)


def deletion_drop(model: Classifier, batches: Batches, maps_Nhw: np.ndarray) -> dict:
    """Accuracy with whole images, without what the maps mark, and without as much at random positions.

    `difference` is what the marked part costs beyond the random one, with its paired 95 % interval: about 0
    for a map that says nothing. Random are the same maps with their positions shuffled. After the deletion
    metric of RISE (Petsiuk et al. 2018), at one share of the pixels.
    """
    labels_N = batches.labels_N[batches.index_M]
    whole_N, marked_N, random_N = (
        answers(model, batches, maps) == labels_N for maps in (None, maps_Nhw, shuffled(maps_Nhw))
    )
    return {
        "n": len(labels_N),
        "accuracy": float(whole_N.mean()),
        "accuracy_without_marked": float(marked_N.mean()),
        "accuracy_without_random": float(random_N.mean()),
        **_paired_difference(marked_N, random_N),
    }


def attention_effect(model: Classifier, batches: Batches) -> dict:
    """What the answers owe to the attention: accuracy with it and with its gates at 0, answers changed.

    `difference` is with minus without, with its paired 95 % interval. The rest of the network was trained
    with the attention, so this is not what training without it gives.
    """
    labels_N = batches.labels_N[batches.index_M]
    with_N = answers(model, batches)
    with attention_off(model):
        without_N = answers(model, batches)
    return {
        "n": len(labels_N),
        "gates": [gate.item() for gate in model.attention.gates],
        "accuracy": float((with_N == labels_N).mean()),
        "accuracy_without": float((without_N == labels_N).mean()),
        "answers_changed": int((with_N != without_N).sum()),
        **_paired_difference(without_N == labels_N, with_N == labels_N),
    }


@contextmanager
def attention_off(model: Classifier) -> Iterator[None]:
    """The gates of the attention are 0 inside the block: it adds nothing."""
    gates = model.attention.gates
    kept = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for gate, value in zip(gates, kept, strict=True):
                gate.copy_(value)


@torch.no_grad()
def answers(model: Classifier, batches: Batches, deleted_Nhw: np.ndarray | None = None) -> np.ndarray:
    """The predicted class of every image, or of what is left of it without what the maps mark."""
    predicted = []
    for rows, images_BCHW in _parts(batches):
        if deleted_Nhw is not None:
            images_BCHW = without_marked(images_BCHW, deleted_Nhw[rows])
        predicted.append(model(images_BCHW).argmax(1).cpu().numpy())
    return np.concatenate(predicted)


def _parts(batches: Batches) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows of the split, normalised images) batch by batch."""
    start = 0
    for images_BCHW, _ in batches.in_order():
        yield slice(start, start + len(images_BCHW)), images_BCHW
        start += len(images_BCHW)


def _paired_difference(a_N: np.ndarray, b_N: np.ndarray) -> dict:
    """Accuracy b - a over the same images with its interval."""
    counts = [int(cell.sum()) for cell in (a_N & b_N, a_N & ~b_N, ~a_N & b_N, ~a_N & ~b_N)]
    low, high = paired_interval(*counts)
    difference = (counts[2] - counts[1]) / len(a_N)
    return {"difference": difference, "difference_low": low, "difference_high": high}


# ------------------------------------------------------------------------------------- of finished runs


def shown_together(arm: str) -> tuple[str, ...]:
    """The arms whose maps stand side by side: baseline and improvement, any other alone."""
    return ARMS if arm in ARMS else (arm,)


def write_explanations(results: Sequence[Result]) -> Path:
    """`where_it_looks.png`, `attention_over_training.png` (of an attention head) and `explain.json`.

    `results`: of an arm, or of baseline and improvement. Returns their folder, `explain` within the arm's or
    beside those of both. Raises `SetupError` for arms that did not predict the same images.
    """
    setup, last = results[0].setup, results[-1]
    folder = (setup.paths.results if len(results) > 1 else last.folder) / "explain"
    groups = drawn_rows([result.predictions for result in results])
    shown_N = np.concatenate([rows for _, rows in groups])
    measured_N = np.random.default_rng(SEED).permutation(len(last.predictions))[:N_MEASURED]
    columns, numbers = [], {"source_sha256": sources(results), "share_deleted": SHARE}
    for result in results:
        columns += map_columns(result, shown_N)
        numbers[result.setup.config.arm] = measurements(result, np.sort(measured_N))
    notes = dict.fromkeys(footer(result.metrics) for result in results)
    figure = where_it_looks(
        [(heading, len(rows)) for heading, rows in groups],
        setup.store.pictures(setup.splits.valid_N[shown_N]),
        columns,
        "\n".join([findings(numbers), *notes]),
    )
    save(figure, folder / "where_it_looks.png")
    if "gate" in last.history or "gate_1" in last.history:
        figure = attention_over_training(last.history, last.metrics["best_epoch"], footer(last.metrics))
        save(figure, folder / "attention_over_training.png")
    write_json(folder / "explain.json", numbers)
    return folder


def sources(results: Sequence[Result]) -> dict[str, str]:
    """Arm -> SHA-256 of its prediction file."""
    arms = {result.setup.config.arm: result.folder for result in results}
    return {arm: sha256(folder / f"{arm}_validation_predictions.csv") for arm, folder in arms.items()}


def drawn_rows(frames: Sequence[pd.DataFrame]) -> list[tuple[str, np.ndarray]]:
    """Of images that one, both or none of the arms got right: a heading, and rows drawn with a seed.

    `frames`: the prediction table of an arm, or of baseline and improvement.
    """
    if frames[0]["Image_Id"].tolist() != frames[-1]["Image_Id"].tolist():
        raise SetupError("the arms did not predict the same images; run both on the same data.")
    a, b = (frame["Is_Correct"].to_numpy(bool) for frame in (frames[0], frames[-1]))
    kinds = {
        "Both are right": a & b,
        "Only the improvement is right": ~a & b,
        "Only the baseline is right": a & ~b,
        "Both are wrong": ~a & ~b,
    }
    if len(frames) == 1:
        kinds = {"The answer is right": a, "The answer is wrong": ~a}
    drawn = []
    for kind, is_of_kind in kinds.items():
        rows = pd.Series(np.flatnonzero(is_of_kind))
        chosen = rows.sample(min(N_ABREAST, len(rows)), random_state=SAMPLE_SEED)
        if len(chosen):
            drawn.append((f"{kind}: {len(chosen)} of {len(rows):,} images", chosen.to_numpy()))
    return drawn


def map_columns(result: Result, rows_N: np.ndarray) -> list[MapColumn]:
    """An arm's Grad-CAM for its answers and for the truth, and its attention where it has one."""
    model, batches = ready(result, rows_N)
    frame, arm = result.predictions.iloc[rows_N], result.setup.config.arm
    answer_NHW, truth_NHW = (
        enlarged(_grad_cams(model, batches, frame[of]), SHOWN_PIXELS) for of in ("Prediction", "Ground_Truth")
    )
    columns = [MapColumn(arm, answer_NHW, frame, truth_NHW)]
    if model.attention is not None:
        maps_NHW = enlarged(_attention_maps(model, batches), SHOWN_PIXELS)
        columns.append(MapColumn("attention", maps_NHW))
    return columns


def measurements(result: Result, rows_N: np.ndarray) -> dict:
    """`deletion_drop` of every kind of map, and what the attention does, over rows of `valid`."""
    model, batches = ready(result, rows_N)
    maps_Nhw = _grad_cams(model, batches, result.predictions["Prediction"].iloc[rows_N])
    numbers = {"map": list(maps_Nhw.shape[1:]), "grad_cam": deletion_drop(model, batches, maps_Nhw)}
    if model.attention is not None:
        numbers["attention_map"] = deletion_drop(model, batches, _attention_maps(model, batches))
        numbers["attention"] = attention_effect(model, batches)
    return numbers


def ready(result: Result, rows_N: np.ndarray) -> tuple[Classifier, Batches]:
    """The trained model on its device, and images of `valid`."""
    setup = result.setup
    batches = Batches(
        setup.store.images,
        setup.store.labels_N,
        setup.splits.valid_N[rows_N],
        setup.device.eval_batch,
        setup.device.torch_device,
        setup.built.preprocess,
    )
    model = setup.model.to(setup.device.torch_device).eval()
    return model, batches.at_size(setup.config.model.predicts_at)


def _grad_cams(model: Classifier, batches: Batches, classes: pd.Series) -> np.ndarray:
    classes_N = classes.to_numpy()
    return np.concatenate([grad_cam(model, images, classes_N[rows]) for rows, images in _parts(batches)])


def _attention_maps(model: Classifier, batches: Batches) -> np.ndarray:
    return np.concatenate([attention_map(model, images) for _, images in _parts(batches)])
