"""The learning-rate finder: a sweep that leaves its curve behind and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from test_experiment import arguments, own, paths, refused, small
from test_report import assert_legible, said

from src import SetupError, lr_finder
from src.commands import main
from src.figures import lr_figure
from src.lr_finder import find_lr, steepest, sweep
from src.train import Trainer


@pytest.fixture
def thirty_steps(monkeypatch):
    monkeypatch.setattr(lr_finder, "STEPS", 30)
    monkeypatch.setattr(lr_finder, "DIVERGED", math.inf)


def sweeping(tmp_path, losses: list[float], monkeypatch) -> pd.DataFrame:
    """A sweep whose mean loss at every step is given."""
    config = tiny.config()
    built = tiny.build(tmp_path, head="attention")
    trainer = Trainer(built.model, tiny.fit_data(built, config), config, tiny.device(), tmp_path)
    remaining = iter(losses)
    monkeypatch.setattr(
        trainer,
        "train_step",
        lambda inputs, labels_B, factor: torch.tensor([next(remaining) * len(labels_B), 0]),
    )
    return sweep(trainer)


@pytest.mark.parametrize("changes", [{}, {"model__head_init": "probe"}], ids=["random", "probe"])
def test_a_sweep_writes_its_curve_and_no_weights(pets, weights, tmp_path, thirty_steps, changes):
    config = own(pets, weights, **changes)
    folder, best = find_lr(config, paths(tmp_path))
    assert folder == tmp_path / "results" / "Improvement"
    assert {path.name for path in folder.iterdir()} == {"lr_finder.csv", "lr_finder.png"}
    assert list((tmp_path / "runs").rglob("*")) == []
    table = pd.read_csv(folder / "lr_finder.csv")
    assert best in table["factor"].to_numpy().round(12) or np.isclose(table["factor"], best, rtol=1e-7).any()
    with Image.open(folder / "lr_finder.png") as image:
        assert image.width == 1170


def test_the_factor_grows_geometrically_from_end_to_end(pets, weights, tmp_path, thirty_steps):
    folder, _ = find_lr(own(pets, weights), paths(tmp_path))
    factors = pd.read_csv(folder / "lr_finder.csv")["factor"]
    assert len(factors) == 30 and (factors.iloc[0], factors.iloc[-1]) == pytest.approx((1e-3, 1e2))
    np.testing.assert_allclose(factors / factors.shift(), [np.nan] + 29 * [1e5 ** (1 / 29)], rtol=1e-6)


def test_the_rates_keep_their_ratio_and_every_epoch_is_shuffled_anew(
    pets, weights, tmp_path, thirty_steps, monkeypatch
):
    rates, labels, original = [], [], Trainer.train_step

    def spy(self, inputs, labels_B, factor):
        sums = original(self, inputs, labels_B, factor)
        rates.append({group["name"].split("/")[0]: group["lr"] for group in self.optimizer.param_groups})
        labels.append(tuple(labels_B.tolist()))
        return sums

    monkeypatch.setattr(Trainer, "train_step", spy)
    config = own(pets, weights)
    folder, _ = find_lr(config, paths(tmp_path))
    table = pd.DataFrame(rates)
    factors = pd.read_csv(folder / "lr_finder.csv")["factor"]
    np.testing.assert_allclose(table["backbone"], factors * config.optim.lr, rtol=1e-6)
    np.testing.assert_allclose(table["head"], factors * config.optim.head_lr, rtol=1e-6)
    epochs = [labels[i : i + 4] for i in range(0, 28, 4)]  # 18 images in steps of 5
    assert all(sorted(sum(epoch, ())) == 9 * [0] + 9 * [1] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_loss_is_that_of_training_and_its_mean_is_corrected_for_its_start(tmp_path):
    """The first loss by hand, on the untrained model; the running mean as pandas has it."""
    config = tiny.config(
        augment__randaugment_ops=0, augment__erasing=0.0, augment__flip=0.0, model__dropout=0.0
    )
    built = tiny.build(tmp_path, head="attention")
    data = tiny.fit_data(built, config)
    inputs, labels_B = next(data.fit.epoch(config.train.seed, 0))
    with torch.no_grad():
        logits_BK = built.model.eval()(inputs)
    expected = torch.nn.functional.cross_entropy(logits_BK, labels_B, label_smoothing=0.1)
    table = sweep(Trainer(built.model, data, config, tiny.device(), tmp_path))
    assert table["loss"][0] == table["smoothed_loss"][0] == pytest.approx(expected.item(), rel=1e-4)
    smoothed = table["loss"].ewm(alpha=0.1, adjust=True).mean()
    np.testing.assert_allclose(table["smoothed_loss"], smoothed, rtol=1e-9)


def test_a_sweep_ends_when_the_loss_has_diverged(tmp_path, monkeypatch):
    losses = [*np.linspace(2, 1, 40), *np.linspace(1, 60, 60)]
    table = sweeping(tmp_path, losses, monkeypatch)
    smoothed = pd.Series(losses).ewm(alpha=0.1, adjust=True).mean()
    ends = next(i for i in range(100) if smoothed[i] > 3 * smoothed[: i + 1].min())
    assert 40 < ends < 60 and len(table) == ends + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sweep_ends_at_a_loss_that_is_not_finite(tmp_path, monkeypatch, bad):
    table = sweeping(tmp_path, [3.0, 2.0, 1.5, bad, 1.0], monkeypatch)
    assert len(table) == 4 and not np.isfinite(table["loss"].iloc[-1])
    assert steepest(table) in table["factor"].iloc[:3].to_numpy()
    assert_legible(lr_figure(table, steepest(table), "note"), "diverged")


def test_the_steepest_fall_is_over_the_logarithm_of_the_rate():
    factors = np.geomspace(1e-3, 1e2, 101)
    loss = 5 - 4 / (1 + np.exp(-4 * np.log(factors / factors[60])))  # falls fastest at factors[60]
    loss[90:] = np.nan
    table = pd.DataFrame({"factor": factors, "loss": loss, "smoothed_loss": loss})
    assert steepest(table) == pytest.approx(factors[60])
    rising = table.assign(smoothed_loss=np.arange(101.0) ** 2)
    assert steepest(rising) == pytest.approx(factors[0])


@pytest.mark.parametrize("losses", [[math.nan], [2.0, math.nan]])
def test_a_loss_that_is_never_finite_is_one_message(losses):
    table = pd.DataFrame({"factor": np.geomspace(1e-3, 1, len(losses)), "smoothed_loss": losses})
    with pytest.raises(SetupError, match="not finite"):
        steepest(table)


def test_a_sweep_over_cached_features(pets, weights, tmp_path, thirty_steps):
    config = own(pets, weights, "baseline")
    assert config.caches_features
    folder, _ = find_lr(config, paths(tmp_path))
    assert len(pd.read_csv(folder / "lr_finder.csv")) == 30


def test_the_command_says_the_rates(pets, weights, tmp_path, thirty_steps, capsys, monkeypatch):
    monkeypatch.setattr(lr_finder, "steepest", lambda table: 3.0)
    assert main(arguments(tmp_path, "find_lr", pets, small(weights, optim__lr=2e-4))) == 0
    assert "optim.lr = 0.0006, optim.head_lr = 0.03; see " in capsys.readouterr().out
    assert main([*arguments(tmp_path, "find_lr", pets, small(weights)), "--preset", "baseline"]) == 0
    assert (tmp_path / "results" / "Baseline" / "lr_finder.png").exists()
    message = refused(capsys, [*arguments(tmp_path, "find_lr", pets, small(weights)), "--preset", "worst"])
    assert "'worst' is unknown" in message


def test_the_figure_marks_the_steepest_fall():
    factors = np.geomspace(1e-3, 1e2, 50)
    table = pd.DataFrame({"factor": factors, "loss": 2 + np.sin(factors), "smoothed_loss": 3 - factors / 100})
    figure = lr_figure(table, 0.25, "some_net.in1k")
    assert_legible(figure, "finder")
    assert "× 0.25" in said(figure) and "some_net.in1k" in said(figure)
