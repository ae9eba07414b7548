"""LIME and SHAP where what each cell adds is known, and against Shapley's formula."""

from __future__ import annotations

import itertools
import json
import math
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_explain import batches, frame_of
from test_report import assert_legible, said
from torch import nn

from src import SetupError, attributions, report
from src.attributions import METHODS, grid, write_attributions
from src.experiment import Paths, configure, run
from src.explain import deletion_drop, ready
from src.figures import attribution_figure
from src.figures.attributions import drop_findings

pytest.importorskip("captum")

SIDE, DOTS = 64, ((2, 5), (6, 1))  # the cells that the classes look at, of 8x8


class Dots(nn.Module):
    """The logit of a class is three times the mean colour of one cell of 8x8, where that is not negative."""

    def forward(self, images_BCHW):
        cells_B88 = nn.functional.avg_pool2d(images_BCHW, SIDE // 8).mean(1)
        return 3 * torch.stack([cells_B88[:, y, x] for y, x in DOTS], dim=1).relu()


class Linear(nn.Module):
    """Two logits, linear in the pixels, with an intercept."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_KCHW = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) / SIDE

    def forward(self, images_BCHW):
        return torch.einsum("bchw,kchw->bk", images_BCHW, self.weight_KCHW) + 5


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(60, 256, (n, 3, SIDE, SIDE), dtype=np.uint8))


def by_cell(values_HW: np.ndarray, n: int = 8) -> np.ndarray:
    """Sums over n x n cells."""
    side = SIDE // n
    return values_HW.reshape(n, side, n, side).sum((1, 3))


PREPROCESS = batches(np.zeros((1, 3, SIDE, SIDE), np.uint8), np.zeros(1, int)).preprocess


@pytest.mark.parametrize("method", METHODS)
def test_the_cell_that_a_class_looks_at_is_marked(method):
    pictures, classes = images(2), np.array([1, 0])
    maps = attributions.attributions(Dots(), PREPROCESS, pictures, classes, method)
    assert maps.shape == (2, 8, 8) and maps.dtype == np.float32
    for map_88, picture, label in zip(maps, pictures / 255, classes, strict=True):
        y, x = DOTS[label]
        worth = 3 * picture[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean()
        assert np.unravel_index(map_88.argmax(), (8, 8)) == (y, x)
        assert map_88[y, x] == pytest.approx(worth.item(), rel=0.02)
        others = np.delete(np.abs(map_88), 8 * y + x)
        assert others.max() < 0.02 * worth


def test_shap_of_a_linear_model_is_exact():
    model, picture = Linear(), images(1)
    inputs = PREPROCESS(picture)
    maps = attributions.attributions(model, PREPROCESS, picture, np.array([1]), "shap")
    expected = by_cell((model.weight_KCHW[1] * inputs[0]).sum(0).numpy())
    np.testing.assert_allclose(maps[0], expected, atol=1e-3)
    difference = model(inputs)[0, 1] - model(torch.zeros_like(inputs))[0, 1]
    assert maps[0].sum() == pytest.approx(difference.item(), abs=1e-3) and abs(difference) > 0.1


def test_lime_of_a_linear_model_is_its_weights_but_for_the_ridge():
    model, picture = Linear(), images(1)
    maps = attributions.attributions(model, PREPROCESS, picture, np.array([0]), "lime", 2000)
    expected = by_cell((model.weight_KCHW[0] * PREPROCESS(picture)[0]).sum(0).numpy())
    np.testing.assert_allclose(maps[0], expected, atol=0.02 * np.abs(expected).max())


def test_shap_of_cells_that_act_together_is_shapley_s_formula(monkeypatch):
    """2x2 cells of one colour each; the logit is a product, a maximum and a sum of theirs."""
    monkeypatch.setattr(attributions, "CELLS", 2)
    levels = np.array([[255, 153], [102, 204]], np.uint8)

    def logit(cells_22: torch.Tensor) -> torch.Tensor:
        a, b, c, d = cells_22.flatten(-2).unbind(-1)
        return 2 * a * b + torch.maximum(c, a) + d + c * d

    class Together(nn.Module):
        def forward(self, images_BCHW):
            return logit(nn.functional.avg_pool2d(images_BCHW[:, 0], SIDE // 2))[:, None]

    picture = torch.from_numpy(np.kron(levels, np.ones((SIDE // 2, SIDE // 2), np.uint8)))
    picture = picture.expand(1, 3, SIDE, SIDE)
    maps = attributions.attributions(Together(), PREPROCESS, picture, np.array([0]), "shap", 3000)
    values = levels.flatten() / 255

    def worth(kept: tuple[int, ...]) -> float:
        return logit(torch.from_numpy(np.where(np.isin(range(4), kept), values, 0).reshape(2, 2))).item()

    expected = np.zeros(4)
    for order in itertools.permutations(range(4)):
        for place, cell in enumerate(order):
            expected[cell] += (worth(order[: place + 1]) - worth(order[:place])) / math.factorial(4)
    np.testing.assert_allclose(maps[0].flatten(), expected, atol=0.03)
    assert maps[0].sum() == pytest.approx(worth((0, 1, 2, 3)), abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_map_depends_on_its_own_image_alone(method):
    pictures, state = images(3), torch.random.get_rng_state()
    together = attributions.attributions(Dots(), PREPROCESS, pictures, np.zeros(3, int), method, 100)
    alone = attributions.attributions(Dots(), PREPROCESS, pictures[2:], np.zeros(1, int), method, 100)
    assert np.array_equal(together[2], alone[0]) and not np.array_equal(together[0], together[2])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 37), (32, 1024)])
def test_cells_are_numbered_row_by_row_and_of_one_size_but_for_a_row_of_pixels(height, width):
    cells = grid(height, width).numpy()
    assert cells.shape == (height, width) and (cells[0, 0], cells[0, -1], cells[-1, 0]) == (0, 7, 56)
    assert (np.diff(cells, axis=1) >= 0).all() and (np.diff(cells, axis=0) >= 0).all()
    rows, columns = np.bincount(cells[:, 0] // 8), np.bincount(cells[0])
    assert rows.max() - rows.min() <= 1 and columns.max() - columns.min() <= 1
    counts = np.bincount(cells.ravel()).reshape(8, 8)
    np.testing.assert_array_equal(counts, np.outer(rows, columns))


def test_bad_input_is_one_message(monkeypatch):
    with pytest.raises(SetupError, match="'gradcam' is unknown.*lime, shap"):
        attributions.attributions(Dots(), PREPROCESS, images(1), np.zeros(1, int), "gradcam")
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(SetupError, match="pip install captum"):
        attributions.attributions(Dots(), PREPROCESS, images(1), np.zeros(1, int), "lime")


# ------------------------------------------------------------------------------------ figure and run


def numbers(**accuracies: float) -> dict:
    drop = {
        "n": 50,
        "accuracy": 0.7,
        "accuracy_without_marked": 0.3,
        "accuracy_without_random": 0.5,
        "difference": 0.2,
        "difference_low": 0.05,
        "difference_high": 0.35,
    }
    return {"share_deleted": 0.25, **{method: drop | accuracies for method in METHODS}}


def test_the_figure_tints_evidence_for_and_against():
    frame = frame_of([0, 1, 2], [0, 1, 3])
    maps = {method: np.zeros((4, 8, 8), np.float32) for method in METHODS}
    maps["lime"][0, 0, 7], maps["lime"][0, 7, 0] = 4, -2
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    note = f"{drop_findings(numbers(), METHODS)}\nsome_net.in1k"
    figure = attribution_figure(pixels, frame, maps, note)
    assert_legible(figure, "attributions")
    text = said(figure)
    assert (
        text.split("\n").count("LIME") == text.split("\n").count("SHAP") == 3 and text.count("✗ crane") == 2
    )
    assert "some_net.in1k" in text and text.count("✓") == 4
    first, second = figure.subfigs
    assert (len(first.axes), len(second.axes)) == (6, 3)
    tinted = np.asarray(first.axes[1].get_images()[1].get_array())
    (red, _, blue, strongest), against = tinted[0, 7], tinted[7, 0]
    assert red > blue and against[2] > against[0] and against[3] == pytest.approx(strongest / 2)
    assert np.count_nonzero(tinted[..., 3]) == 2
    assert not np.asarray(first.axes[2].get_images()[1].get_array())[..., 3].any()


def test_findings_say_the_numbers():
    lime, shap = drop_findings(numbers(), METHODS).split("\n")
    assert lime == (
        "LIME, 50 images of valid: 70.0 % right; 30.0 % without the 25 % of pixels that it marks highest, "
        "50.0 % without a random 25 %; the marked ones are worth +20.0 points (95 % interval +5.0 to +35.0) "
        "more."
    )
    assert shap == lime.replace("LIME", "SHAP")


def test_what_is_written_of_a_run(pets, weights, tmp_path, monkeypatch):
    small = {"model.backbone": tiny.CONVNEXT, "model.weights": str(weights), "model.image_size": tiny.SIZE}
    small |= {"data.holdout_per_class": 3, "train.epochs": 2, "train.batch_size": 8, "optim.head_lr": 0.01}
    with monkeypatch.context() as patch:
        patch.setattr(report, "save", lambda figure, path: None)  # the arm's own figures
        folders = (tmp_path / name for name in ("results", "runs", "cache"))
        result = run(configure("baseline", "offline", str(pets), small), Paths(*folders))
    calls, original = [], attributions.attributions

    def spy(model, preprocess, images_BCHW, classes_B, method):
        maps = original(model, preprocess, images_BCHW, classes_B, method, 80)
        calls.append((method, images_BCHW.numpy(), classes_B, maps))
        return maps

    monkeypatch.setattr(attributions, "attributions", spy)
    found = write_attributions(result, tmp_path / "explain", n_images=7)
    assert sorted(path.name for path in (tmp_path / "explain").iterdir()) == [
        "attributions.json",
        "attributions.png",
    ]
    assert found == json.loads((tmp_path / "explain" / "attributions.json").read_text())
    with Image.open(tmp_path / "explain" / "attributions.png") as picture:
        assert picture.width == 1170
    drawn_N = np.random.default_rng(0).permutation(8)[:7]
    store, valid_N = result.setup.store, result.setup.splits.valid_N[drawn_N]
    model, data = ready(result, drawn_N)
    assert [method for method, *_ in calls] == ["lime", "shap"]
    for method, pictures, classes, maps in calls:
        assert np.array_equal(pictures, store.images[valid_N])
        assert classes.tolist() == result.predictions["Prediction"].iloc[drawn_N].tolist()
        assert found[method] == deletion_drop(model, data, maps) and found[method]["n"] == 7
