"""A soup of seeds: the mean of finished runs, scored like each of them and chosen on `holdout`."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, log_loss
from test_experiment import arguments, own, paths, refused, small, trained

from src import SetupError, experiment, soup
from src.commands import main
from src.config import with_fields
from src.experiment import FINISHED
from src.soup import soup_of_seeds

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {
        tag: tiny.write_weights(folder / f"{tag}.safetensors", tag, 7)
        for tag in (tiny.CONVNEXT, tiny.EFFICIENTNET)
    }


@pytest.fixture(scope="module")
def finished(pets, weights, tmp_path_factory):
    """Two finished runs by kind -> (config, folder, setups)."""
    made = {}

    def get(tag: str, arm: str = "improvement"):
        if (tag, arm) not in made:
            folder = tmp_path_factory.mktemp("runs")
            config = own(pets, weights[tag], arm, model__backbone=tag, optim__lr=1e-3)
            setups = [trained(with_fields(config, {"train.seed": seed}), folder) for seed in SEEDS]
            for setup in setups:  # the last of what a run leaves is written with its report
                assert all((setup.run_folder / name).exists() for name in FINISHED)
            made[tag, arm] = config, folder, setups
        return made[tag, arm]

    return get


def scored(logits_NK: np.ndarray, labels_N: np.ndarray) -> dict:
    probabilities_NK = torch.from_numpy(logits_NK).double().softmax(1).numpy()
    return {
        "loss": pytest.approx(log_loss(labels_N, probabilities_NK, labels=[0, 1]), rel=1e-4),
        "accuracy": accuracy_score(labels_N, logits_NK.argmax(1)),
    }


@pytest.mark.parametrize("tag", [tiny.CONVNEXT, tiny.EFFICIENTNET])
def test_each_run_is_scored_as_it_was_left(finished, tag):
    """The statistics of batch normalisation are each run's own, not the soup's."""
    config, folder, setups = finished(tag)
    _, scores = soup_of_seeds(config, SEEDS, paths(folder))
    assert list(scores) == ["seed 0", "seed 1", "soup", "chosen"]
    for seed, setup in zip(SEEDS, setups, strict=True):
        for split, rows_N in (("holdout", setup.splits.holdout_N), ("valid", setup.splits.valid_N)):
            logits_NK = np.load(setup.run_folder / f"{split}_logits.npy")
            assert scores[f"seed {seed}"][split] == scored(logits_NK, setup.store.labels_N[rows_N])


def test_the_soup_is_the_mean_of_the_weights(finished, weights):
    config, folder, setups = finished(tiny.CONVNEXT)
    _, scores = soup_of_seeds(config, SEEDS, paths(folder))
    states = [load_file(setup.run_folder / "model.safetensors") for setup in setups]
    mean = {name: np.mean([state[name].numpy() for state in states], axis=0) for name in states[0]}
    assert any(not np.allclose(mean[name], tensor) for name, tensor in states[0].items())
    built = tiny.build(folder, ("cat", "dog"), head="attention", weights=str(weights[tiny.CONVNEXT]))
    built.model.load_state_dict({name: torch.from_numpy(value) for name, value in mean.items()})
    store, splits = setups[0].store, setups[0].splits
    for split, rows_N in (("holdout", splits.holdout_N), ("valid", splits.valid_N)):
        with torch.no_grad():
            logits_NK = built.model.eval()(built.preprocess(torch.from_numpy(store.images[rows_N]))).numpy()
        assert scores["soup"][split] == scored(logits_NK, store.labels_N[rows_N])


def test_batch_statistics_are_measured_for_the_soup_alone(finished, monkeypatch):
    """They belong to no mean of weights; the runs have their own."""
    config, folder, setups = finished(tiny.EFFICIENTNET)
    weights, original = [], soup.measure_statistics

    def spy(model, data):
        weights.append(model.classifier.weight.detach().clone())
        original(model, data)

    monkeypatch.setattr(soup, "measure_statistics", spy)
    soup_of_seeds(config, SEEDS, paths(folder))
    states = [load_file(setup.run_folder / "model.safetensors")["classifier.weight"] for setup in setups]
    assert len(weights) == 1
    torch.testing.assert_close(weights[0], sum(states) / len(states))


def test_a_soup_of_heads_on_cached_features(finished):
    config, folder, _ = finished(tiny.EFFICIENTNET, "baseline")
    assert config.caches_features
    where, scores = soup_of_seeds(config, SEEDS, paths(folder))
    assert where == folder / "results" / "Baseline"
    assert json.loads((where / "soup.json").read_text()) == scores


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [
        ([0.5, 0.7, 0.6], "seed 1"),
        ([0.5, 0.6, 0.7], "soup"),
        ([0.6, 0.6, 0.6], "seed 0"),
        ([0.5, 0.6, 0.6], "seed 1"),
    ],
)
def test_holdout_chooses_and_of_equals_the_simpler(finished, monkeypatch, accuracies, chosen):
    config, folder, _ = finished(tiny.CONVNEXT)
    holdout_then_valid = iter([value for holdout in accuracies for value in (holdout, 1 - holdout)])
    monkeypatch.setattr(
        soup, "loss_and_accuracy", lambda *_: {"loss": 1.0, "accuracy": next(holdout_then_valid)}
    )
    assert soup_of_seeds(config, SEEDS, paths(folder))[1]["chosen"] == chosen


def test_a_seed_that_is_named_twice_counts_once(finished):
    config, folder, _ = finished(tiny.CONVNEXT)
    assert soup_of_seeds(config, (0, 1, 0), paths(folder)) == soup_of_seeds(config, SEEDS, paths(folder))


@pytest.mark.parametrize("seeds", [(), (0,), (1, 1)])
def test_one_run_makes_no_soup(finished, seeds):
    config, folder, _ = finished(tiny.CONVNEXT)
    with pytest.raises(SetupError, match="two runs or more"):
        soup_of_seeds(config, seeds, paths(folder))


@pytest.mark.parametrize("missing", FINISHED)
def test_a_run_that_is_not_finished_is_named(finished, tmp_path, missing):
    config, folder, setups = finished(tiny.CONVNEXT)
    for setup in setups:
        shutil.copytree(setup.run_folder, tmp_path / "runs" / setup.run_folder.name)
    (tmp_path / "runs" / setups[1].run_folder.name / missing).unlink()
    where = experiment.Paths(tmp_path / "results", tmp_path / "runs", folder / "cache")
    with pytest.raises(SetupError, match=f"seed1 holds no finished run.*{missing}.*--seed 1"):
        soup_of_seeds(config, SEEDS, where)


def test_a_run_of_another_configuration_is_refused(finished):
    config, folder, _ = finished(tiny.CONVNEXT)
    with pytest.raises(SetupError, match="another configuration"):
        soup_of_seeds(with_fields(config, {"optim.lr": 0.5}), SEEDS, paths(folder))


def test_the_command_says_what_it_found(finished, pets, weights, capsys):
    _, folder, _ = finished(tiny.CONVNEXT)
    same = small(weights[tiny.CONVNEXT], optim__lr=1e-3)
    command = arguments(folder, "soup", pets, same)
    assert main([*command, "--seeds", "0,1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" holdout")[0].strip() for line in lines[:3]] == ["seed 0", "seed 1", "soup"]
    assert lines[3].startswith("chosen on holdout: ")
    assert "seed2 holds no finished run" in refused(capsys, [*command, "--seeds", "0,2"])
    assert "--seeds '0;1' cannot be read" in refused(capsys, [*command, "--seeds", "0;1"])
