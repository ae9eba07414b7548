"""Grad-CAM against its formula, maps where the evidence is known to lie, and numbers counted by hand."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from matplotlib.figure import Figure
from PIL import Image
from test_report import assert_legible, said
from torch import nn
from torch.nn import functional as F

from src import SetupError, analysis, explain, notebook, report
from src.data.batches import Batches, Preprocess
from src.evaluate import compare, prediction_frame
from src.experiment import Paths, configure, run
from src.explain import (
    answers,
    attention_effect,
    attention_map,
    attention_off,
    deletion_drop,
    drawn_rows,
    enlarged,
    grad_cam,
    last_map,
    shuffled,
    without_marked,
    write_explanations,
)
from src.figures.explain import (
    MapColumn,
    attention_over_training,
    attention_sentence,
    findings,
    tint,
    where_it_looks,
)
from src.model.attention import CrossAttention

HEADS = {
    "plain": {"head": "plain"},
    "as_run": {"head": "as_run"},
    "two layers": {"head": "attention", "attention_layers": 2, "attention_gate": 0.5},
    "a query a class": {"head": "cross_attention", "class_queries": True, "attention_gate": 0.5},
}


def batch(n: int = 4, size: int = 128) -> torch.Tensor:
    """Images whose last map has 4x4 positions."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def build(folder, head: str, **fields):
    return tiny.build(folder, **HEADS[head], **fields).model.eval()


# ------------------------------------------------------------------------------------------- Grad-CAM


@pytest.mark.parametrize("trainable", ["none", "all"])
@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
@pytest.mark.parametrize("head", HEADS)
def test_grad_cam_is_its_formula(tmp_path, head, backbone, trainable):
    """relu(sum over channels of mean gradient times map), stretched to [0, 1]; nothing is left behind."""
    model, images = build(tmp_path, head, backbone=backbone, trainable=trainable), batch()
    classes = [1, 0, 3, 3]
    trained = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():  # as in evaluation
        maps = grad_cam(model, images, np.array(classes))
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == trained and not model.training

    features = model.backbone.forward_features(images).detach().requires_grad_()
    if model.attention is None:
        logits = model.classify(model.backbone.forward_head(features, pre_logits=True))
    else:
        logits = model.classify(features)
    torch.testing.assert_close(logits, model(images))
    for i, label in enumerate(classes):
        (gradient,) = torch.autograd.grad(logits[i, label], features, retain_graph=True)
        positive = (gradient[i].mean((1, 2))[:, None, None] * features[i]).sum(0).relu().detach()
        expected = (positive - positive.min()) / (positive.max() - positive.min()).clamp(min=1e-7)
        np.testing.assert_allclose(maps[i], expected.numpy(), atol=1e-4)
    assert maps.shape == (4, 4, 4) and maps.dtype == np.float32 and maps.min() == 0 and maps.max() <= 1
    assert maps.max() > 0.99


def test_grad_cam_of_maps_with_channels_last(tmp_path):
    """The same network in Swin's layout has the same maps."""
    for head in ("plain", "two layers"):
        model, classes = build(tmp_path, head), np.array([0, 1, 2, 3])
        expected = grad_cam(model, batch(), classes)
        expected_attention = attention_map(model, batch()) if head == "two layers" else None
        forward_features, forward_head = model.backbone.forward_features, model.backbone.forward_head
        model.backbone.forward_features = lambda x, f=forward_features: f(x).permute(0, 2, 3, 1)
        model.backbone.forward_head = lambda x, pre_logits, f=forward_head: f(
            x.permute(0, 3, 1, 2), pre_logits=pre_logits
        )
        model.nhwc = True
        np.testing.assert_allclose(grad_cam(model, batch(), classes), expected, atol=1e-5)
        if head == "two layers":
            np.testing.assert_allclose(attention_map(model, batch()), expected_attention, atol=1e-5)


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(SetupError, match="pip install grad-cam"):
        grad_cam(build(tmp_path, "plain"), batch(), np.zeros(4, int))


# ------------------------------------------------------------------------- where the evidence is known


class Means(nn.Module):
    """As a backbone: the mean colour of each of 4x4 cells."""

    def forward_features(self, images_BCHW):
        return F.avg_pool2d(images_BCHW, 16)

    def forward_head(self, map_BCHW, pre_logits):
        return map_BCHW.mean((2, 3))


class Colours(nn.Module):
    """Says 0 for red, 1 for green, 2 for neither, and finds a colour wherever it is in 64x64 pixels."""

    def __init__(self, attention: CrossAttention | None = None) -> None:
        super().__init__()
        self.backbone, self.attention, self.nhwc = Means(), attention, False
        self.classifier = nn.Linear(3, 3)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 0.0])))
            self.classifier.bias.copy_(torch.tensor([0.0, 0.0, 1e-3]))

    def classify(self, features):
        if self.attention is not None:
            features = self.attention(features).flatten(1)
        return self.classifier(features)

    def forward(self, images_BCHW):
        map_BCHW = self.backbone.forward_features(images_BCHW)
        return self.classify(map_BCHW.mean((2, 3)) if self.attention is None else map_BCHW)


def spotted(spots: list[tuple[int, int, int]]) -> np.ndarray:
    """uint8 images (N,3,64,64), black but for a cell (channel, row, column) each."""
    images = np.zeros((len(spots), 3, 64, 64), np.uint8)
    for image, (channel, y, x) in zip(images, spots, strict=True):
        image[channel, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = 255
    return images


def batches(images: np.ndarray, labels: np.ndarray, size: int = 3) -> Batches:
    preprocess = Preprocess(images.shape[-1], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic")
    return Batches(images, labels, np.arange(len(images)), size, torch.device("cpu"), preprocess)


def one_hot(cells: list[tuple[int, int]]) -> np.ndarray:
    maps = np.zeros((len(cells), 4, 4), np.float32)
    for map_, cell in zip(maps, cells, strict=True):
        map_[cell] = 1
    return maps


def test_grad_cam_marks_the_evidence_for_the_class_that_was_asked_for():
    images = torch.from_numpy(spotted([(0, 1, 2)]) + spotted([(1, 3, 0)])) / 255  # one red, one green cell
    model = Colours().eval()
    np.testing.assert_allclose(grad_cam(model, images, np.array([0])), one_hot([(1, 2)]), atol=1e-5)
    np.testing.assert_allclose(grad_cam(model, images, np.array([1])), one_hot([(3, 0)]), atol=1e-5)
    assert not grad_cam(model, images, np.array([2])).any()


def looking_for_red() -> CrossAttention:
    """One head whose query is far nearer to a red token than to a black one."""
    attention = CrossAttention(3, 1, 1, gate=1.0)
    with torch.no_grad():
        attention.kv.weight.copy_(torch.cat([20 * torch.eye(3), torch.eye(3)]))
        attention.query.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
    return attention.eval()


def test_attention_map_is_the_share_of_each_position_times_their_number(tmp_path):
    images = torch.from_numpy(spotted([(0, 1, 2), (0, 3, 3)])) / 255
    maps = attention_map(Colours(looking_for_red()), images)
    np.testing.assert_allclose(maps, 16 * one_hot([(1, 2), (3, 3)]), atol=1e-3)
    model = build(tmp_path, "two layers")
    ours = attention_map(model, batch())
    weights = [w.detach() for w in model.attention.weights(last_map(model, batch()))]
    assert ours.shape == (4, 4, 4)
    for b in range(4):
        for token in range(16):
            shares = [w[b, head, query, token] for w in weights for head in range(8) for query in range(16)]
            assert ours[b, token // 4, token % 4] == pytest.approx(16 * np.mean(shares), rel=1e-4)
    with pytest.raises(SetupError, match="no attention.*model.head"):
        attention_map(build(tmp_path, "plain"), batch())


# ------------------------------------------------------------------------------------------ deletion


def test_maps_are_enlarged_between_the_centres_of_their_cells():
    expected = [[0, 2.5, 7.5, 10], [0.25, 2.75, 7.75, 10.25], [0.75, 3.25, 8.25, 10.75], [1, 3.5, 8.5, 11]]
    np.testing.assert_allclose(enlarged(np.array([[[0, 10], [1, 11]]], np.float32), 4), [expected])


def test_the_marked_quarter_is_painted_over():
    images = torch.arange(1.0, 97).view(2, 3, 4, 4)
    painted = without_marked(images, np.array([[[0, 10], [1, 11]], [[0, 1], [10, 11]]], np.float32))
    expected = images.clone()
    expected[0, :, :, 3] = 0  # the right column
    expected[1, :, 3] = 0  # the lowest row
    assert torch.equal(painted, expected) and images.min() == 1


def test_shuffled_maps_keep_their_values():
    maps = np.arange(800, dtype=np.float32).reshape(50, 4, 4)
    moved = shuffled(maps)
    assert np.array_equal(np.sort(moved.reshape(50, -1)), maps.reshape(50, -1)) and moved.dtype == maps.dtype
    places = [np.argwhere(map_ == map_.max())[0].tolist() for map_ in moved]
    assert len({tuple(place) for place in places}) > 10
    assert np.array_equal(shuffled(maps), moved)


def test_deleting_the_evidence_costs_every_answer_and_deleting_elsewhere_none():
    """The quarter of an image around an inner cell covers it; around another cell, half of it at most."""
    rng = np.random.default_rng(0)
    cells = [tuple(cell) for cell in rng.integers(1, 3, (60, 2)).tolist()]
    labels = rng.integers(0, 2, 60)
    data = batches(spotted([(k, *cell) for k, cell in zip(labels, cells, strict=True)]), labels, size=7)
    maps, model = one_hot(cells), Colours().eval()
    missed = np.array([map_[cell] == 0 for map_, cell in zip(shuffled(maps), cells, strict=True)])
    assert 40 < missed.sum() < 60
    result = deletion_drop(model, data, maps)
    assert (result["n"], result["accuracy"], result["accuracy_without_marked"]) == (60, 1.0, 0.0)
    assert result["accuracy_without_random"] == result["difference"] == pytest.approx(missed.mean())
    assert result["difference_low"] < result["difference"] < result["difference_high"]
    nothing = deletion_drop(model, data, np.zeros_like(maps))
    assert nothing["accuracy_without_marked"] == nothing["accuracy_without_random"]
    assert nothing["difference"] == 0


def test_differences_are_those_of_the_comparison():
    rng = np.random.default_rng(0)
    a_N, b_N = rng.random(90) < 0.5, rng.random(90) < 0.8
    frames = [pd.DataFrame({"Ground_Truth": 1, "Prediction": right.astype(int)}) for right in (a_N, b_N)]
    ours, theirs = explain._paired_difference(a_N, b_N), compare(*frames)
    assert list(ours) == ["difference", "difference_low", "difference_high"]
    assert ours == {name: theirs[name] for name in ours}


# ------------------------------------------------------------------------------- with and without it


def test_the_attention_is_off_inside_the_block_alone(tmp_path):
    model, plain = build(tmp_path, "two layers"), build(tmp_path, "plain")
    plain.classifier.load_state_dict(model.classifier.state_dict())
    with torch.no_grad():
        before = model(batch())
        with pytest.raises(KeyError), attention_off(model):
            torch.testing.assert_close(model(batch()), plain(batch()))
            raise KeyError
        assert torch.equal(model(batch()), before) and not torch.equal(before, plain(batch()))
    assert [gate.item() for gate in model.attention.gates] == [0.5, 0.5]


def test_effect_of_the_attention():
    """Green and faint red: the mean is green, but the attention looks for red alone."""
    images = spotted([(0, 1, 1), (1, 2, 2), (1, 0, 0), (1, 3, 1), (1, 1, 3)])
    labels = np.array([0, 0, 0, 1, 1])
    images[1:4] += spotted([(0, 3, 3)]) // 2
    result = attention_effect(Colours(looking_for_red()).eval(), batches(images, labels, size=2))
    low, high = result.pop("difference_low"), result.pop("difference_high")
    assert low < 0.2 < high
    assert result == {
        "n": 5,
        "gates": [1.0],
        "accuracy": pytest.approx(4 / 5),  # red, red, red, red, green
        "accuracy_without": pytest.approx(3 / 5),  # red and green four times
        "answers_changed": 3,
        "difference": pytest.approx(1 / 5),
    }
    assert answers(Colours().eval(), batches(images, labels)).tolist() == [0, 1, 1, 1, 1]


# ------------------------------------------------------------------------------------------- figures

LONG = "a class, with a very long name that no margin can hold"
NAMES = ["golden retriever", LONG, r"$\frac{ $5 bill", "crane"]


def frame_of(labels: list[int], predicted: list[int]) -> pd.DataFrame:
    logits = np.zeros((len(labels), 4))
    logits[np.arange(len(labels)), predicted] = 1.5
    return prediction_frame(logits, labels, [f"i{i}" for i in range(len(labels))], [*"abcd"], NAMES)


def history(n_layers: int = 1, n_epochs: int = 4) -> pd.DataFrame:
    table = pd.DataFrame({"epoch": np.arange(1, n_epochs + 1), "holdout_loss": 1.0})
    for layer in range(1, n_layers + 1):
        number = f"_{layer}" if n_layers > 1 else ""
        table[f"gate{number}"] = -0.01234 * layer * table["epoch"]
        table[f"attention_entropy{number}"] = 1 - 0.0125 * table["epoch"] / layer
    return table


def measured(difference: float, **other) -> dict:
    near = {"difference_low": difference - 0.012, "difference_high": difference + 0.012}
    return {"n": 500, "accuracy": 0.702, "difference": difference, **near, **other}


def drop(marked: float = 0.311, random: float = 0.522, **other) -> dict:
    parts = {"accuracy_without_marked": marked, "accuracy_without_random": random}
    return measured(random - marked, **parts, **other)


NUMBERS = {
    "share_deleted": 0.25,
    "baseline": {"grad_cam": drop(accuracy=0.55)},
    "improvement": {
        "grad_cam": drop(),
        "attention_map": drop(marked=0.5),
        "attention": measured(-0.004, answers_changed=17, gates=[0.2]),
    },
}


def looks() -> Figure:
    """Three images: both right, the baseline alone, neither."""
    coarse = np.random.default_rng(0).random((6, 4, 4)).astype(np.float32)
    maps = enlarged(coarse, 160).reshape(2, 3, 160, 160)
    a, b = frame_of([0, 1, 2], [0, 1, 1]), frame_of([0, 1, 2], [0, 3, 3])
    columns = [
        MapColumn("baseline", maps[0], a, maps[1]),
        MapColumn("improvement", maps[0], b, maps[1]),
        MapColumn("attention", 2 * maps[0]),
    ]
    images = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    return where_it_looks([("One", 1), ("Two", 2)], images, columns, findings(NUMBERS) + "\nfooter")


def test_figure_of_where_it_looks():
    figure = looks()
    assert_legible(figure, "where it looks")
    text = said(figure)
    assert text.count("✓ golden\nretriever\n60 % sure") == 2 and text.count("✗ crane\n60 % sure") == 2
    assert text.count("baseline") == text.count("improvement") == 3  # above every image
    assert findings(NUMBERS).split()[-12:] == text[: text.index("footer")].split()[-12:]
    panels = [axes for part in figure.subfigs for axes in part.axes if axes.get_images()]
    assert len(panels) == 12
    dashed = np.reshape([len(axes.collections) for axes in panels], (3, 4))
    assert dashed.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]]  # where the answer is wrong
    assert [len(axes.get_images()) for axes in panels] == [1, 2, 2, 2] * 3


def test_the_dashed_line_lies_where_the_truth_s_map_does():
    """The upper left quarter, in a picture whose first row is on top."""
    truth = np.zeros((1, 160, 160), np.float32)
    truth[:, :80, :80] = 1
    column = MapColumn("baseline", truth, frame_of([0], [1]), truth)
    figure = where_it_looks([("One", 1)], np.zeros((1, 64, 64, 3), np.uint8), [column], "note")
    (line,) = figure.subfigs[0].axes[1].collections
    low, high = line.get_paths()[0].get_extents().get_points()
    assert (low[0], high[1]) == pytest.approx((0, 1), abs=0.02)
    assert (high[0], low[1]) == pytest.approx((0.5, 0.5), abs=0.02)


def test_tints():
    shares = tint(np.array([[1.0, 0.5, 0.0]]), relative=False)[0]
    assert shares[:, 3].tolist() == pytest.approx([0.65, 0.325, 0.0])
    tints = tint(np.array([[8.0, 2.0, 2**0.5, 1.0, 0.5**0.5, 0.5, 0.0]]), relative=True)[0]
    assert tints[:, 3].tolist() == pytest.approx([0.65, 0.65, 0.325, 0.0, 0.325, 0.65, 0.65])
    orange, blue = tints[0, :3], tints[-1, :3]
    assert orange[0] > orange[2] and blue[2] > blue[0]
    assert (shares[:2, :3] == orange).all() and (tints[:3, :3] == orange).all()
    assert (tints[4:, :3] == blue).all()


def test_findings_say_the_numbers():
    lines = findings(NUMBERS).split("\n")
    assert lines[0] == (
        "Baseline, 500 images of valid: 55.0 % right; 31.1 % without the 25 % of pixels that Grad-CAM marks, "
        "52.2 % without a random 25 %; the marked ones are worth +21.1 points (95 % interval +19.9 to "
        "+22.3) more."
    )
    assert "70.2 % right; 50.0 % without the 25 % of pixels with most attention, 52.2 % without" in lines[2]
    assert lines[3] == (
        "Switching the attention off (gate 0.2 to 0) changes 17 of 500 answers; having it on is worth −0.4 "
        "points (95 % interval −1.6 to +0.8)."
    )
    assert len(lines) == 4
    assert "attention" not in findings({**NUMBERS, "improvement": {"grad_cam": drop()}})


@pytest.mark.parametrize(("n_layers", "n_epochs"), [(1, 1), (1, 12), (2, 4)])
def test_figure_of_attention_over_training(n_layers, n_epochs):
    table = history(n_layers, n_epochs)
    figure = attention_over_training(table, 1, "some_net.in1k · 96 px")
    assert_legible(figure, "attention over training")
    text = said(figure)
    assert ("layer 2" in text) == (n_layers == 2) and "0: adds nothing" in text
    assert " ".join(attention_sentence(table, 1).split()) in " ".join(text.split())
    gate, entropy = figure.axes
    drawn = [line.get_ydata().tolist() for line in gate.lines if len(line.get_xdata()) == n_epochs]
    assert table[[c for c in table if c.startswith("gate")]].to_numpy().T.tolist() == drawn[-n_layers:]
    assert gate.get_ylim()[0] < 0 < gate.get_ylim()[1] and entropy.get_ylim()[0] == 0


def test_the_sentence_is_about_the_chosen_epoch():
    assert "epoch 3, the one chosen, the gate is −0.037;" in attention_sentence(history(), 3)
    assert "entropy of its weights is 0.963 of the largest" in attention_sentence(history(), 3)
    assert "gate is −0.0247 and −0.0494;" in attention_sentence(history(2), 2)


# -------------------------------------------------------------------------------- both arms together


def test_rows_are_drawn_of_every_kind():
    truth = [0] * 40
    a = frame_of(truth, [0] * 10 + [1] * 10 + [0] * 10 + [1] * 10)
    b = frame_of(truth, [0] * 10 + [0] * 10 + [1] * 10 + [1] * 10)
    groups = drawn_rows([a, b])
    assert [heading for heading, _ in groups] == [
        "Both are right: 2 of 10 images",
        "Only the improvement is right: 2 of 10 images",
        "Only the baseline is right: 2 of 10 images",
        "Both are wrong: 2 of 10 images",
    ]
    for start, (_, rows) in zip((0, 10, 20, 30), groups, strict=True):
        assert len(set(rows)) == 2 and all(start <= row < start + 10 for row in rows)
    again = drawn_rows([a, b])
    assert all(np.array_equal(x, y) for (_, x), (_, y) in zip(groups, again, strict=True))
    few = drawn_rows([a.iloc[:11], b.iloc[:11]])
    assert [heading for heading, _ in few] == [
        "Both are right: 2 of 10 images",
        "Only the improvement is right: 1 of 1 images",
    ]
    with pytest.raises(SetupError, match="same images"):
        drawn_rows([a, b.iloc[::-1]])
    alone = drawn_rows([a])
    assert [heading for heading, _ in alone] == [
        "The answer is right: 2 of 20 images",
        "The answer is wrong: 2 of 20 images",
    ]
    for (_, rows), right in zip(alone, (True, False), strict=True):
        assert (a["Is_Correct"].iloc[rows] == right).all()


def test_both_arms_explained(pets, weights, tmp_path, monkeypatch):
    """Accuracies are those of the tables: all eight images are measured."""
    small = {"model.backbone": tiny.CONVNEXT, "model.weights": str(weights), "model.image_size": tiny.SIZE}
    small |= {"data.holdout_per_class": 3, "train.epochs": 2, "train.batch_size": 8, "optim.head_lr": 0.01}
    paths = Paths(*(tmp_path / name for name in ("results", "runs", "cache")))
    with monkeypatch.context() as patch:
        patch.setattr(report, "save", lambda figure, path: None)  # the arms' own figures
        arms = ("baseline", "improvement")
        results = [run(configure(arm, "offline", str(pets), small), paths) for arm in arms]
    folder = write_explanations(results)
    assert folder == paths.results / "explain"
    names = ["attention_over_training.png", "explain.json", "where_it_looks.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    numbers = json.loads((folder / "explain.json").read_text())
    assert set(numbers) == {"source_sha256", "share_deleted", "baseline", "improvement"}
    assert numbers["source_sha256"] == analysis.sources(paths.results)
    assert set(numbers["baseline"]) == {"map", "grad_cam"} and numbers["baseline"]["map"] == [2, 2]
    assert set(numbers["improvement"]) == {"map", "grad_cam", "attention_map", "attention"}
    for result in results:
        measured = numbers[result.setup.config.arm]
        assert measured["grad_cam"]["n"] == 8
        for name in measured.keys() - {"map"}:
            assert measured[name]["accuracy"] == pytest.approx(result.metrics["accuracy"])
    best = results[1].history.set_index("epoch").loc[results[1].metrics["best_epoch"]]
    assert numbers["improvement"]["attention"]["gates"] == [pytest.approx(best["gate"])]
    for name in names[::2]:
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.width == 1170
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(notebook, "configure", lambda arm, *_: results[arm == "improvement"].setup.config)
    assert [type(shown).__name__ for shown in notebook.where_it_looks(results[1])] == ["Image", "Image"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (results[0].setup.run_folder / "valid_logits.npy").unlink()
    (hint,) = notebook.where_it_looks(results[1])
    assert "needs both arms" in hint.data and "src.experiment baseline" in hint.data
