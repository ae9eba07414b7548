"""Which parts of an image an answer rests on, by trying: LIME and SHAP over a grid of cells.

Both paint cells over at random, ask the model again, and fit a linear model to what it says: the weight of a
cell is what it adds to the logit. Unlike Grad-CAM they know nothing of the model's inside, and tell evidence
for an answer (positive) from evidence against it (negative). They cost some hundred predictions an image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from src import SetupError
from src.data.batches import Preprocess
from src.device import send
from src.explain import SEED, SHARE, deletion_drop, ready
from src.figures.attributions import attribution_figure, drop_findings
from src.files import write_json
from src.predict import image_bar
from src.report import footer, save

if TYPE_CHECKING:
    from captum.attr import Attribution

    from src.experiment import Result

METHODS = ("lime", "shap")
CELLS = 8  # along either side of an image
N_SAMPLES = 500  # times that an image is asked about with some of its cells painted over
PER_PASS = 50  # of them go through the model at once
KERNEL_WIDTH = 0.25  # of LIME, in cosine distance; this and the ridge of 1 are those of its authors' code
N_IMAGES, N_SHOWN = 50, 6  # of `valid`: measured, and drawn


def attributions(
    model: nn.Module,
    preprocess: Preprocess | Callable[[torch.Tensor], torch.Tensor],
    images_BCHW: torch.Tensor,
    classes_B: np.ndarray,
    method: str,
    n_samples: int = N_SAMPLES,
) -> np.ndarray:
    """What each cell of each image adds to the logit of a class, beside the cell in the mean colour.

    uint8 images on the model's device -> float32 (B,`CELLS`,`CELLS`), in units of the logit. `lime`: LIME
    (Ribeiro et al. 2016), a ridge regression that counts images more the less of them is painted over.
    `shap`: Kernel SHAP (Lundberg & Lee 2017), whose values add up to the logit of the whole image minus that
    of an image all in the mean colour. By the package captum, with the same cells painted over in every
    image. Raises `SetupError` for another method and where the package is not installed.
    """
    explainer, inputs_BCHW = explainer_of(model, method), preprocess(images_BCHW)
    cells_11HW = grid(*inputs_BCHW.shape[-2:])[None, None].to(inputs_BCHW.device)
    maps = []
    with torch.random.fork_rng(), image_bar(len(classes_B), method) as bar:
        for input_CHW, label in zip(inputs_BCHW, classes_B, strict=True):
            torch.manual_seed(SEED)
            weights_1F = explainer.attribute(
                input_CHW[None],
                baselines=0.0,  # the mean colour, normalised
                target=int(label),
                feature_mask=cells_11HW,
                n_samples=n_samples,
                perturbations_per_eval=PER_PASS,
                return_input_shape=False,
            )
            maps.append(weights_1F.float().cpu().numpy().reshape(CELLS, CELLS))
            bar.update()
    return np.stack(maps)


def grid(height: int, width: int) -> torch.Tensor:
    """(H,W) int64: the number of the cell that each pixel lies in, row by row."""
    rows_H, columns_W = (torch.arange(side) * CELLS // side for side in (height, width))
    return rows_H[:, None] * CELLS + columns_W


def explainer_of(model: nn.Module, method: str) -> Attribution:
    """captum's explainer for `method`."""
    if method not in METHODS:
        raise SetupError(f"method {method!r} is unknown; choose one of: {', '.join(METHODS)}.")
    try:
        from captum._utils.models.linear_model import SkLearnRidge
        from captum.attr import KernelShap, Lime
        from captum.attr._core.lime import get_exp_kernel_similarity_function
    except ImportError as error:
        raise SetupError(f"LIME and SHAP need another package ({error}): pip install captum") from None
    if method == "shap":
        return KernelShap(model)
    similarity = get_exp_kernel_similarity_function("cosine", KERNEL_WIDTH)
    return Lime(model, SkLearnRidge(alpha=1.0), similarity)


def write_attributions(result: Result, folder: Path, n_images: int = N_IMAGES) -> dict:
    """`attributions.png` and `attributions.json` of a finished run, over images of `valid` drawn with a seed.

    The maps are those of the predicted classes. Returns what the JSON holds: `deletion_drop` of each method,
    measured as `explain.json` does it for Grad-CAM, on `n_images`.
    """
    drawn_N = np.random.default_rng(SEED).permutation(len(result.predictions))[:n_images]
    model, batches = ready(result, drawn_N)
    frame, store = result.predictions.iloc[drawn_N], result.setup.store
    images_NCHW = send(torch.from_numpy(store.images[batches.index_M]), batches.device)
    predicted_N = frame["Prediction"].to_numpy()
    maps = {
        method: attributions(model, batches.preprocess, images_NCHW, predicted_N, method)
        for method in METHODS
    }
    numbers = {
        "arm": result.setup.config.arm,
        "map": [CELLS, CELLS],
        "samples": N_SAMPLES,
        "share_deleted": SHARE,
        **{method: deletion_drop(model, batches, maps_Nhw) for method, maps_Nhw in maps.items()},
    }
    shown = batches.index_M[:N_SHOWN]
    note = f"{drop_findings(numbers, METHODS)}\n{footer(result.metrics)}"
    figure = attribution_figure(store.pictures(shown), frame.iloc[:N_SHOWN], maps, note)
    save(figure, folder / "attributions.png")
    write_json(folder / "attributions.json", numbers)
    return numbers
