"""Cross-validation: each train image is answered once, by a run that has not trained on it."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from test_experiment import arguments, paths, refused, small

from src import experiment
from src.commands import main
from src.config import with_fields
from src.experiment import configure, prepare


@pytest.fixture(scope="module")
def crossed(pets, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    asked = arguments(folder, "cross_validate", pets, small(weights))
    assert main([*asked, "--preset", "baseline", "--folds", "3"]) == 0
    return folder, asked


def test_folds_and_their_sum(crossed, pets, weights):
    folder, _ = crossed
    results = folder / "results" / "Baseline"
    table, said = pd.read_csv(results / "folds.csv"), json.loads((results / "folds.json").read_text())
    assert list(table["fold"]) == [0, 1, 2] and table["n"].sum() == 24  # all of train, nothing of valid
    assert said["mean"] == pytest.approx(table["accuracy"].mean())
    assert said["sd"] == pytest.approx(table["accuracy"].std())
    n_right = round((table["accuracy"] * table["n"]).sum())
    interval = binomtest(n_right, 24).proportion_ci(method="wilson")
    assert said["pooled"]["accuracy"] == pytest.approx(n_right / 24)
    assert said["pooled"]["wilson_low"] == pytest.approx(interval.low)
    config = configure("baseline", "offline", str(pets), small(weights))
    seen = []
    for fold in range(3):
        setup = prepare(with_fields(config, {"data.folds": 3, "data.fold": fold}), paths(folder))
        trained = np.concatenate([setup.splits.fit_N, setup.splits.holdout_N])
        assert not set(trained) & set(setup.splits.valid_N)
        seen += setup.splits.valid_N.tolist()
        logits_NK = np.load(setup.run_folder / "valid_logits.npy")
        right = (logits_NK.argmax(1) == setup.store.labels_N[setup.splits.valid_N]).mean()
        assert table["accuracy"][fold] == pytest.approx(right)
    assert len(seen) == len(set(seen)) == 24


def test_a_finished_fold_is_not_repeated(crossed, monkeypatch):
    folder, asked = crossed
    before = (folder / "results" / "Baseline" / "folds.csv").read_bytes()
    monkeypatch.setattr(experiment, "_train_and_predict", None)
    assert main([*asked, "--preset", "baseline", "--folds", "3"]) == 0
    assert (folder / "results" / "Baseline" / "folds.csv").read_bytes() == before


def test_one_fold_is_none(crossed, capsys):
    assert "two folds or more" in refused(capsys, [*crossed[1], "--preset", "baseline", "--folds", "1"])
