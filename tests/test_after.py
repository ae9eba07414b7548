"""What is tried on a trained model: each step by hand, and nothing left of a step that did not gain."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torch.optim.swa_utils import update_bn

from src import after
from src.after import Predictor, averaged_views, best_temperature, improve, measure_statistics
from src.average import between, copied
from src.config import AfterConfig, AugmentConfig
from src.data.batches import Batches
from src.train import FitData

CONFIG = replace(tiny.config(), augment=AugmentConfig())
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def trained(tmp_path, n_holdout: int = 11, **fields):
    """(model, its learned state at the start, data): every learned tensor has moved since."""
    built = tiny.build(tmp_path, **fields)
    model, data = built.model.eval(), tiny.fit_data(built, CONFIG, n_holdout=n_holdout)
    nearest_class_mean(model, data.fit)
    start, generator = copied(model.learned_state()), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.3 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
                )
        for name, tensor in model.learned_state().items():
            if "running" in name:
                tensor.mul_(1.1)
            elif name.endswith("num_batches_tracked"):
                tensor.add_(7)
    return model, start, data


@torch.no_grad()
def nearest_class_mean(model, batches: Batches) -> None:
    """A classifier that knows something, so that accuracies differ: x·c - |c|²/2 for the class means c."""
    seen = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batches.preprocess(torch.from_numpy(batches.rows[batches.index_M])))
    hook.remove()
    labels_M = torch.from_numpy(batches.labels_N[batches.index_M])
    middle = seen[0].mean(0)
    means_KD = torch.stack([seen[0][labels_M == label].mean(0) - middle for label in range(5)])
    model.classifier.weight.copy_(means_KD)
    model.classifier.bias.copy_(-means_KD @ middle - means_KD.square().sum(1) / 2)


def another(state: dict) -> dict:
    """A third point, off the line: stands for the mean over epochs."""
    return {
        name: tensor + 0.01 * tensor.abs().sqrt() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits_by_hand(model, batches: Batches, flip: bool = False) -> np.ndarray:
    with torch.no_grad():
        images = batches.preprocess(torch.from_numpy(batches.rows[batches.index_M]))
        return model(images.flip(3) if flip else images).double().numpy()


def scores_by_hand(logits_NK: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    p_NK = np.exp(logits_NK - logsumexp(logits_NK, axis=1, keepdims=True))
    loss = log_loss(labels_N, p_NK, labels=range(logits_NK.shape[1]))
    return {"loss": loss, "accuracy": accuracy_score(labels_N, logits_NK.argmax(1))}


def scripted(monkeypatch, model, accuracies: list[float]) -> list[dict]:
    """Replace the scores of `holdout`; collects the state that each of them stands for."""
    states, remaining = [], iter(accuracies)

    def score(logits_NK, labels_N):
        states.append(copied(model.state_dict()))
        return {"loss": 1.0, "accuracy": next(remaining)}

    monkeypatch.setattr(after, "loss_and_accuracy", score)
    return states


# ------------------------------------------------------------------------------------- what is kept

EVERY_STEP = AfterConfig(soup_epochs=2, wise_ft=True, tta="flip")


@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [  # the start; the soup; two points on the line; the mirror image
        ([0.5, 0.4, 0.3, 0.2, 0.1], []),
        ([0.5, 0.5, 0.5, 0.5, 0.5], []),  # an equal score is no gain
        ([0.5, 0.6, 0.6, 0.5, 0.6], [0]),
        ([0.5, 0.4, 0.5, 0.6, 0.6], [2]),
        ([0.5, 0.6, 0.7, 0.65, 0.7], [0, 1]),  # the second point gains on the soup alone, not on the first
        ([0.5, 0.5, 0.5, 0.5, 0.9], [3]),
        ([0.5, 0.6, 0.7, 0.8, 0.9], [0, 1, 2, 3]),
    ],
)
def test_what_does_not_gain_leaves_nothing(tmp_path, monkeypatch, backbone, accuracies, kept):
    model, start, data = trained(tmp_path, backbone=backbone)
    before = copied(model.state_dict())
    soup = another(copied(model.learned_state()))
    given_start, given_soup = copied(start), copied(soup)
    monkeypatch.setattr(after, "SHARES", (0.2, 0.6))
    states = scripted(monkeypatch, model, accuracies)
    predictor = improve(model, start, soup, data, EVERY_STEP, tiny.device())

    names = ["soup of 2 epochs", "WiSE-FT 0.2", "WiSE-FT 0.6", "flip"]
    assert predictor.tried == [
        {"step": name, "loss": 1.0, "accuracy": accuracy, "kept": number in kept}
        for number, (name, accuracy) in enumerate(zip(names, accuracies[1:], strict=True))
    ]
    of_weights = [number for number in kept if number < 3]
    expected = states[1 + of_weights[-1]] if of_weights else before
    assert same(model.state_dict(), expected)
    end = soup if 0 in kept else {name: before[name] for name in start}
    points = [soup, between(start, end, 0.2), between(start, end, 0.6)]
    for point, scored in zip(points, states[1:], strict=False):
        assert all(torch.equal(scored[name], point[name]) for name, _ in model.named_parameters())
    assert (predictor.function is model) == (3 not in kept)
    np.testing.assert_allclose(predictor.holdout_NK, predictor.logits(data.holdout, ""), rtol=1e-4, atol=1e-5)
    assert same(start, given_start) and same(soup, given_soup)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("head", ["plain", "attention"])
def test_every_step_is_scored_as_by_hand(tmp_path, head):
    """Real scores on 60 images: recorded as they are, and the best of them is where it ends."""
    model, start, data = trained(tmp_path, n_holdout=60, head=head)
    twin, labels_N = copy.deepcopy(model), data.holdout.labels_N[data.holdout.index_M]
    soup = another(copied(model.learned_state()))
    config = AfterConfig(soup_epochs=2, wise_ft=True, tta="flip", temperature=True)
    predictor = improve(model, start, soup, data, config, tiny.device())

    best, best_state = scores_by_hand(logits_by_hand(twin, data.holdout), labels_N), copied(twin.state_dict())
    flipped, expected = False, []

    def attempt(state: dict, flip: bool = False):
        nonlocal best, best_state, flipped
        twin.load_state_dict(state, strict=False)
        logits_NK = logits_by_hand(twin, data.holdout)
        if flip:
            logits_NK = (logits_NK + logits_by_hand(twin, data.holdout, flip=True)) / 2
        result = scores_by_hand(logits_NK, labels_N)
        kept = result["accuracy"] > best["accuracy"]
        expected.append({**result, "kept": kept})
        if kept:
            best, best_state, flipped = result, state, flip

    attempt(soup)
    end = best_state
    for share in range(1, 10):
        attempt({name: start[name] + share / 10 * (end[name] - start[name]) for name in start})
    attempt(best_state, flip=True)
    *tried, temperature = predictor.tried
    assert [step["kept"] for step in tried] == [step["kept"] for step in expected]
    for ours, theirs in zip(tried, expected, strict=True):
        assert (ours["loss"], ours["accuracy"]) == pytest.approx(
            (theirs["loss"], theirs["accuracy"]), rel=1e-4
        )
    assert [step["step"] for step in tried[1:-1]] == [f"WiSE-FT 0.{share}" for share in range(1, 10)]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, best_state[name], rtol=1e-4, atol=1e-5, msg=name)
    assert len({step["accuracy"] for step in tried}) > 2  # so that the test can fail

    logits_NK = predictor.logits(data.holdout, "holdout")
    np.testing.assert_allclose(predictor.holdout_NK, logits_NK, rtol=1e-5, atol=1e-6)  # kept as it went
    result = scores_by_hand(logits_NK.astype(np.float64), labels_N)
    assert result["accuracy"] == pytest.approx(best["accuracy"])
    assert temperature["step"] == f"temperature {predictor.temperature:.4f}" and temperature["kept"]
    assert temperature["loss"] == pytest.approx(result["loss"], rel=1e-5) and result["loss"] < best["loss"]


def test_nothing_asked_for_is_nothing_tried(tmp_path):
    model, start, data = trained(tmp_path, backbone=tiny.EFFICIENTNET)
    before = copied(model.state_dict())
    predictor = improve(model, start, None, data, AfterConfig(), tiny.device())
    assert predictor.tried == [] and predictor.temperature == 1.0 and predictor.function is model
    assert same(model.state_dict(), before)
    np.testing.assert_allclose(
        predictor.logits(data.holdout, ""), logits_by_hand(model, data.holdout), rtol=1e-4, atol=1e-5
    )


def test_without_a_soup_none_is_tried(tmp_path):
    """As where training stopped before the epochs that were to be averaged."""
    model, start, data = trained(tmp_path)
    assert improve(model, start, None, data, AfterConfig(soup_epochs=2), tiny.device()).tried == []


def test_images_outside_fit_and_holdout_are_not_looked_at(tmp_path, monkeypatch):
    """With other `valid` images and labels all ends the same; with another `holdout` it does not."""
    config = AfterConfig(soup_epochs=1, wise_ft=True, tta="ten_crop", temperature=True)
    monkeypatch.setattr(after, "SHARES", (0.3, 0.7))
    rows, labels_N = tiny.images(60)
    outcomes = []
    for first_changed in (60, 36, 12):  # none; what follows `holdout`; what follows `fit`
        rng, rows_N, changed_N = np.random.default_rng(5), rows.copy(), labels_N.copy()
        rows_N[first_changed:] = rng.integers(0, 256, rows_N[first_changed:].shape)
        changed_N[first_changed:] = rng.integers(0, 5, 60 - first_changed)
        model, start, data = trained(tmp_path, backbone=tiny.EFFICIENTNET)
        data = FitData(
            replace(data.fit, rows=rows_N, labels_N=changed_N, index_M=np.arange(12)),
            replace(data.holdout, rows=rows_N, labels_N=changed_N, index_M=np.arange(12, 36)),
        )
        soup = another(copied(model.learned_state()))
        predictor = improve(model, start, soup, data, config, tiny.device())
        outcomes.append((predictor.tried, predictor.temperature, copied(model.state_dict())))
    (tried, temperature, state), again, other = outcomes
    assert (tried, temperature) == again[:2] and same(state, again[2])
    assert tried != other[0]


# ----------------------------------------------------------------------------------- WiSE-FT's line


def test_the_ends_of_the_line_are_the_start_and_the_trained(tmp_path, monkeypatch):
    model, start, data = trained(tmp_path)
    trained_state = copied(model.learned_state())
    before = copy.deepcopy(model)
    before.load_state_dict(start, strict=False)
    ends = [logits_by_hand(before, data.holdout), logits_by_hand(model, data.holdout)]
    monkeypatch.setattr(after, "SHARES", (0.0, 1.0))
    scored = []

    def score(logits_NK, _):
        scored.append((logits_NK, copied(model.learned_state())))
        return {"loss": 1.0, "accuracy": 0.0}

    monkeypatch.setattr(after, "loss_and_accuracy", score)
    improve(model, start, None, data, AfterConfig(wise_ft=True), tiny.device())
    _, *points = scored
    for (logits_NK, state), by_hand_NK, end in zip(points, ends, (start, trained_state), strict=True):
        assert same(state, end)
        np.testing.assert_allclose(logits_NK, by_hand_NK, rtol=1e-4, atol=1e-5)
    assert not np.allclose(*ends, atol=1e-2)


# ------------------------------------------------------------------------------ batch normalisation


def measured_by_hand(model, data: FitData, n_batches: int) -> dict[str, np.ndarray]:
    """Means over batches of the mean and the unbiased variance that each learning norm sees."""
    twin, sums = copy.deepcopy(model).eval(), {}

    def record(name):
        def hook(_, inputs):
            x_CN = inputs[0].detach().double().transpose(0, 1).flatten(1).numpy()
            for kind, value in (("mean", x_CN.mean(1)), ("var", x_CN.var(1, ddof=1))):
                key = f"{name}.running_{kind}"
                sums[key] = sums.get(key, 0) + value / n_batches

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, NORMS) and module.weight.requires_grad:
            module.train().register_forward_pre_hook(record(name))
    with torch.no_grad():
        for (inputs, _), _ in zip(data.fit.epoch(0, 0), range(n_batches), strict=False):
            (twin.classify if data.cached else twin)(inputs)
    return sums


@pytest.mark.parametrize(("trainable", "n_batches"), [("all", 2), ("all", 20), ("last_stage", 20)])
def test_statistics_are_measured_anew_where_they_are_learned(tmp_path, monkeypatch, trainable, n_batches):
    """Three batches of training images, or the first two; a frozen layer keeps its statistics."""
    fields = {"head": "mlp", "dropout": 0.5, "drop_path": 0.5}  # the last two off, as in prediction
    model, _, data = trained(tmp_path, backbone=tiny.EFFICIENTNET, trainable=trainable, **fields)
    monkeypatch.setattr(after, "STATISTICS_BATCHES", n_batches)
    used = min(n_batches, len(data.fit))
    assert len(data.fit) == 3
    expected, before = measured_by_hand(model, data, used), copied(model.state_dict())
    momenta = [m.momentum for m in model.modules() if isinstance(m, NORMS)]
    torch.manual_seed(5)
    measure_statistics(model, data)
    state = model.state_dict()
    learned = {name.rpartition(".")[0] for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(state[name].numpy(), value, rtol=1e-3, atol=1e-4, err_msg=name)
        assert state[name.replace("running_mean", "num_batches_tracked")].sum() > 0
        assert not torch.equal(state[name], before[name])
    for name in state:
        is_statistic = name.rpartition(".")[0] in learned and name.endswith(("mean", "var", "tracked"))
        assert is_statistic or torch.equal(state[name], before[name]), name
    tracked = [state[f"{name}.num_batches_tracked"].item() for name in learned]
    assert tracked and set(tracked) == {used}
    assert momenta == [m.momentum for m in model.modules() if isinstance(m, NORMS)]
    assert not any(module.training for module in model.modules())
    n_norms = sum(isinstance(m, NORMS) for m in model.modules())
    assert len(learned) == n_norms if trainable == "all" else 0 < len(learned) < n_norms


def test_statistics_are_those_of_torch_s_update_bn(tmp_path):
    model, _, data = trained(tmp_path, backbone=tiny.EFFICIENTNET)
    theirs = copy.deepcopy(model)
    update_bn(data.fit.epoch(0, 0), theirs)
    measure_statistics(model, data)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_network_without_batch_normalisation_is_left_alone(tmp_path, monkeypatch):
    model, _, data = trained(tmp_path)
    before = copied(model.state_dict())
    monkeypatch.setattr(Batches, "epoch", None)  # no image is read for it
    measure_statistics(model, data)
    assert same(model.state_dict(), before) and not model.training


def test_the_global_generator_decides_nothing(tmp_path):
    """A run that went on after its last epoch has another one than a run that was not cut off."""
    outcomes = []
    for seed in (1, 2):
        model, start, data = trained(tmp_path, head="mlp", dropout=0.5)
        torch.manual_seed(seed)
        predictor = improve(model, start, None, data, AfterConfig(wise_ft=True), tiny.device())
        outcomes.append((predictor.tried, copied(model.state_dict())))
    assert outcomes[0][0] == outcomes[1][0] and same(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("accuracies", [[0.5] + 9 * [0.4], [0.5] + 9 * [0.6]])
def test_frozen_layers_stay_as_they_are(tmp_path, monkeypatch, accuracies):
    """Their statistics are in no state that is loaded back: measured anew they would be lost."""
    model, start, data = trained(tmp_path, backbone=tiny.EFFICIENTNET, trainable="last_stage")
    before = copied(model.state_dict())
    scripted(monkeypatch, model, accuracies)
    improve(model, start, None, data, AfterConfig(wise_ft=True), tiny.device())
    frozen = before.keys() - model.learned_state().keys()
    assert "backbone.bn1.running_mean" in frozen
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in frozen)


def test_features_do_instead_of_images(tmp_path):
    """A frozen backbone's features, with a head that normalises batches."""
    model, start, data = trained(tmp_path, head="mlp", trainable="none")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        images = data.fit.preprocess(torch.from_numpy(data.fit.rows))
        features = model.features(images).numpy()
    parts = [
        Batches(features, part.labels_N, part.index_M, part.batch_size, part.device)
        for part in (data.fit, data.holdout)
    ]
    config = AfterConfig(soup_epochs=1, wise_ft=True, temperature=True)
    soup = another(copied(model.learned_state()))
    expected = improve(twin, start, soup, data, config, tiny.device())
    model.features = None  # the backbone is not run again
    ours = improve(model, start, soup, FitData(*parts, cached=True), config, tiny.device())
    for step, theirs in zip(ours.tried, expected.tried, strict=True):
        assert (step["step"], step["kept"]) == (theirs["step"], theirs["kept"])
        assert (step["loss"], step["accuracy"]) == pytest.approx(
            (theirs["loss"], theirs["accuracy"]), rel=1e-4
        )
    assert ours.temperature == pytest.approx(expected.temperature, rel=1e-3)
    for name, value in twin.learned_state().items():
        torch.testing.assert_close(model.learned_state()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_weights_between_are_scored_with_statistics_of_their_own(tmp_path, monkeypatch):
    """Those of the line's ends, averaged, would belong to neither network."""
    model, start, data = trained(tmp_path, backbone=tiny.EFFICIENTNET)
    twin, end = copy.deepcopy(model), copied(model.learned_state())
    monkeypatch.setattr(after, "SHARES", (0.5,))
    states = scripted(monkeypatch, model, [0.5, 0.5, 0.6])
    soup = another(end)
    improve(model, start, soup, data, AfterConfig(soup_epochs=2, wise_ft=True), tiny.device())
    assert len(states) == 3
    for scored, point in zip(states[1:], (soup, between(start, end, 0.5)), strict=True):
        twin.load_state_dict(point, strict=False)
        measured = measured_by_hand(twin, data, len(data.fit))
        assert measured
        for name, value in measured.items():
            np.testing.assert_allclose(scored[name].numpy(), value, rtol=1e-3, atol=1e-4, err_msg=name)
            assert not torch.equal(scored[name], point[name])


# ------------------------------------------------------------------------------------ averaged views


def looks(seen: list | None = None):
    """Not linear in the image and different for every place in it; (B,2) in bfloat16."""

    def function(x_BCHW):
        if seen is not None:
            seen.append(tuple(x_BCHW.shape))
        places = torch.arange(x_BCHW[0].numel(), dtype=torch.float32).view(x_BCHW.shape[1:]) / 1e3
        both = [(x_BCHW * places).sin().mean((1, 2, 3)), (x_BCHW.square() * places).cos().mean((1, 2, 3))]
        return torch.stack(both, 1)

    return function


def test_flip_is_the_mean_over_image_and_mirror_image():
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 10)).astype(np.float32)
    f = looks()
    expected = (f(torch.from_numpy(x)) + f(torch.from_numpy(x[:, :, :, ::-1].copy()))) / 2
    torch.testing.assert_close(averaged_views(f, "flip")(torch.from_numpy(x)), expected)
    assert not torch.allclose(expected, f(torch.from_numpy(x)), atol=1e-4)


@pytest.mark.parametrize(("size", "side", "middle"), [(64, 56, 4), (96, 84, 6), (224, 196, 14)])
def test_ten_crops_are_four_corners_the_middle_and_their_mirror_images(size, side, middle):
    x = np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32)
    corners = [(0, 0), (0, size - side), (size - side, 0), (size - side, size - side), (middle, middle)]
    crops = [x[:, :, top : top + side, left : left + side] for top, left in corners]
    crops += [crop[..., ::-1].copy() for crop in crops]
    expected = torch.stack([looks()(torch.from_numpy(crop.copy())) for crop in crops]).mean(0)
    seen = []
    got = averaged_views(looks(seen), "ten_crop")(torch.from_numpy(x))
    assert seen == 10 * [(2, 3, side, side)]
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(expected, looks()(torch.from_numpy(x)), atol=1e-4)


def test_views_are_averaged_in_float32():
    """Under autocast a network gives bfloat16, whose mean would round at the third digit."""
    values = iter([1.0, 1.0078125])  # neighbours in bfloat16
    halves = averaged_views(lambda x: torch.full((1, 2), next(values), dtype=torch.bfloat16), "flip")
    result = halves(torch.zeros(1, 3, 4, 4))
    assert result.dtype == torch.float32 and result[0, 0].item() == 1.00390625


def test_a_kept_view_is_what_predicts(tmp_path, monkeypatch):
    model, start, data = trained(tmp_path)
    scripted(monkeypatch, model, [0.5, 0.6])
    predictor = improve(model, start, None, data, AfterConfig(tta="flip"), tiny.device())
    both = [logits_by_hand(model, data.holdout, flip) for flip in (False, True)]
    np.testing.assert_allclose(
        predictor.logits(data.holdout, ""), np.mean(both, axis=0), rtol=1e-4, atol=1e-5
    )


# --------------------------------------------------------------------------------------- temperature


def losses(logits_NK: np.ndarray, labels_N: np.ndarray, temperatures_T: np.ndarray) -> np.ndarray:
    scaled_TNK = logits_NK.astype(np.float64) / temperatures_T[:, None, None]
    picked_TN = scaled_TNK[:, np.arange(len(labels_N)), labels_N]
    return (logsumexp(scaled_TNK, axis=2) - picked_TN).mean(1)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), classes=st.integers(2, 6), scale=st.floats(0.1, 30))
def test_temperature_is_the_lowest_point_of_a_fine_grid(seed, n, classes, scale):
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, classes, n)
    logits_NK = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels_N]
    logits_NK = (scale * logits_NK).astype(np.float32)
    grid = np.exp(np.linspace(-np.log(20), np.log(20), 3001))
    on_grid = losses(logits_NK, labels_N, grid)
    temperature = best_temperature(logits_NK, labels_N)
    assert 0.05 <= temperature <= 20
    found = losses(logits_NK, labels_N, np.array([temperature]))[0]
    # at an end of the range the search stops just before it: by less than a tenth of the grid's step
    slack = 0.1 * max(abs(on_grid[0] - on_grid[1]), abs(on_grid[-1] - on_grid[-2]))
    assert found <= on_grid.min() + slack + 1e-6
    lowest = on_grid.argmin()
    if 0 < lowest < 3000 and on_grid[[lowest - 100, (lowest + 100) % 3001]].min() > on_grid[lowest] + 1e-6:
        assert temperature == pytest.approx(grid[lowest], rel=0.01)


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_temperature_undoes_a_known_scale(scale):
    """Three of four images of each kind are of the class that has probability three quarters."""
    logits_NK = scale * np.log([[0.75, 0.25]] * 4 + [[0.25, 0.75]] * 4).astype(np.float32)
    labels_N = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    assert best_temperature(logits_NK, labels_N) == pytest.approx(scale, rel=1e-3)


def test_temperature_stays_within_its_bounds():
    logits_NK = np.array([[0.5, 0.0], [0.0, 0.5]], np.float32)
    assert best_temperature(logits_NK, np.array([0, 1])) == pytest.approx(1 / 20, rel=0.01)
    assert best_temperature(logits_NK, np.array([1, 0])) == pytest.approx(20, rel=0.01)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.3, 20.0])
def test_temperature_divides_and_never_changes_the_predicted_class(tmp_path, temperature):
    logits_NK = np.random.default_rng(0).normal(size=(5000, 7)).astype(np.float32) * 10
    every_N = np.arange(len(logits_NK))
    rows = Batches(logits_NK, np.zeros(len(logits_NK), int), every_N, 512, torch.device("cpu"))
    predictor = Predictor(lambda x: x, tiny.device(), temperature)
    cooled_NK = predictor.logits(rows, "")
    assert cooled_NK.dtype == np.float32
    np.testing.assert_allclose(cooled_NK, logits_NK / temperature, rtol=1e-6)
    assert (cooled_NK.argmax(1) == logits_NK.argmax(1)).all()


@pytest.mark.parametrize(("found", "kept"), [(1.5, True), (0.5, False), (1.0, False)])
def test_a_temperature_that_does_not_gain_is_not_kept(monkeypatch, tmp_path, found, kept):
    """The best is near 3: from 1 the loss falls towards it, and at 1 nothing changes."""
    model, start, data = trained(tmp_path)
    n = len(data.holdout.index_M)
    labels_N = data.holdout.labels_N[data.holdout.index_M]
    p_NK = np.full((n, 5), 0.1) + 0.5 * np.eye(5)[(labels_N + (np.arange(n) % 5 < 2)) % 5]
    images = replace(data.holdout, rows=3 * np.log(p_NK).astype(np.float32), labels_N=labels_N)
    images = replace(images, index_M=np.arange(n), preprocess=None)
    model.forward = lambda x: x
    before = copied(model.state_dict())
    monkeypatch.setattr(after, "best_temperature", lambda *_: found)
    data = FitData(data.fit, images)
    predictor = improve(model, start, None, data, AfterConfig(temperature=True), tiny.device())
    np.testing.assert_allclose(predictor.holdout_NK, predictor.logits(images, ""), rtol=1e-6)
    assert predictor.tried[0]["kept"] == kept and predictor.temperature == (found if kept else 1.0)
    expected = scores_by_hand(3 * np.log(p_NK) / found, labels_N)
    assert predictor.tried[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert predictor.tried[0]["step"] == f"temperature {found:.4f}"
    assert same(model.state_dict(), before)
