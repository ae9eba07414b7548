"""An ensemble of finished runs, from their saved logits: against scikit-learn, scipy and the formula."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, log_loss
from statsmodels.stats.contingency_tables import mcnemar
from test_experiment import arguments, own, paths, refused, small, trained

from src import SetupError, ensemble, experiment
from src.commands import main
from src.config import with_fields
from src.ensemble import ENSEMBLE, ensemble_of, gain, log_mean_probabilities
from src.evaluate import is_right, read_predictions
from src.experiment import FINISHED, Paths, run
from tools import check

SEEDS = (0, 1)
SPLITS = ("holdout", "valid")


@pytest.fixture(scope="module")
def finished(pets, weights, tmp_path_factory):
    """Two finished runs of the baseline, their logits replaced by random ones -> (config, folder, setups)."""
    folder = tmp_path_factory.mktemp("runs")
    config = own(pets, weights, "baseline")
    setups = [trained(with_fields(config, {"train.seed": seed}), folder) for seed in SEEDS]
    for seed, setup in zip(SEEDS, setups, strict=True):
        for split, n in (("holdout", 6), ("valid", 8)):
            logits_NK = np.random.default_rng([seed, n]).normal(size=(n, 2)).astype(np.float32)
            np.save(setup.run_folder / f"{split}_logits.npy", logits_NK)
    return config, folder, setups


def saved(setups, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (M,N,K) of the runs, and the labels."""
    logits_MNK = np.stack([np.load(setup.run_folder / f"{split}_logits.npy") for setup in setups])
    rows_N = getattr(setups[0].splits, f"{split}_N")
    return softmax(logits_MNK.astype(float), axis=2), setups[0].store.labels_N[rows_N]


def test_members_and_their_mean_are_scored(finished):
    config, folder, setups = finished
    where, numbers = ensemble_of([config], SEEDS, paths(folder))
    assert where == folder / "results" / "Baseline" / "ensemble"
    assert json.loads((where / "ensemble.json").read_text()) == numbers
    assert list(numbers["scores"]) == ["baseline seed 0", "baseline seed 1", ENSEMBLE]
    for split in SPLITS:
        probabilities_MNK, labels_N = saved(setups, split)
        every = [*probabilities_MNK, probabilities_MNK.mean(axis=0)]
        scores = [score[split] for score in numbers["scores"].values()]
        for found, probabilities_NK in zip(scores, every, strict=True):
            assert found["accuracy"] == accuracy_score(labels_N, probabilities_NK.argmax(1))
            assert found["loss"] == pytest.approx(log_loss(labels_N, probabilities_NK), abs=1e-6)
            assert found["wilson_low"] < found["accuracy"] < found["wilson_high"]
            assert found["n"] == len(labels_N)
        accuracies = [score["accuracy"] for score in scores]
        expected = accuracies[2] - np.mean(accuracies[:2])
        assert numbers["gain"][split]["difference"] == pytest.approx(expected)


def test_the_table_is_that_of_the_mean_and_has_the_arms_columns(finished, monkeypatch):
    config, folder, setups = finished
    where, numbers = ensemble_of([config], SEEDS, paths(folder))
    table = read_predictions(where / "ensemble_validation_predictions.csv")
    probabilities_NK = saved(setups, "valid")[0].mean(axis=0)
    assert table["Prediction"].tolist() == probabilities_NK.argmax(1).tolist()
    np.testing.assert_allclose(table["Confidence"], probabilities_NK.max(1), atol=1e-6)
    assert is_right(table).mean() == numbers["scores"][ENSEMBLE]["valid"]["accuracy"]
    run(config, paths(folder))
    files = [str(path.relative_to(folder)) for path in folder.glob("results/**/*.*")]
    monkeypatch.setattr(check, "tracked", lambda root: files)
    assert "results/Baseline/metrics.json" in files and check.results(folder) == []
    arm = read_predictions(where.parent / "baseline_validation_predictions.csv")
    assert table.columns.tolist() == arm.columns.tolist()
    assert table["Image_Id"].tolist() == arm["Image_Id"].tolist()


def test_the_best_member_is_chosen_on_holdout_and_compared_on_valid(finished):
    config, folder, setups = finished
    _, numbers = ensemble_of([config], SEEDS, paths(folder))
    holdout = [numbers["scores"][f"baseline seed {seed}"]["holdout"]["accuracy"] for seed in SEEDS]
    valid = [numbers["scores"][f"baseline seed {seed}"]["valid"]["accuracy"] for seed in SEEDS]
    best = int(np.argmax(holdout))
    assert holdout[0] != holdout[1] and np.argmax(valid) != best  # else the splits could be mixed up
    assert numbers["best_member"] == f"baseline seed {best}"
    probabilities_MNK, labels_N = saved(setups, "valid")
    one_N = probabilities_MNK[best].argmax(1) == labels_N
    all_N = probabilities_MNK.mean(axis=0).argmax(1) == labels_N
    against = numbers["best_member_to_ensemble"]
    assert (against["a"], against["b"], against["n"]) == (f"baseline seed {best}", ENSEMBLE, 8)
    assert against["difference"] == pytest.approx(all_N.mean() - one_N.mean())
    cells = [
        [(one_N & all_N).sum(), (one_N & ~all_N).sum()],
        [(~one_N & all_N).sum(), (~one_N & ~all_N).sum()],
    ]
    assert against["mcnemar_p"] == pytest.approx(min(mcnemar(cells, exact=True).pvalue, 1))


@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_the_mean_is_of_probabilities_and_is_never_infinite(scale):
    logits_MNK = np.random.default_rng(0).normal(0, scale, (3, 40, 5)).astype(np.float32)
    found = log_mean_probabilities(logits_MNK)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found), softmax(logits_MNK.astype(float), axis=2).mean(0), atol=1e-12)


def test_the_interval_of_the_gain_is_a_paired_bootstrap_over_images():
    """Against scipy's, with other draws: the members' accuracies vary far more than the difference does."""
    rng = np.random.default_rng(0)
    hard_N = rng.random(3000) < 0.4
    right_MN = rng.random((4, 3000)) > 0.1 + 0.8 * hard_N
    right_N = rng.random(3000) > 0.1 + 0.7 * hard_N
    found = gain(right_MN, right_N)
    assert found["difference"] == pytest.approx(right_N.mean() - right_MN.mean())

    def difference(ensemble_N, *members_MN, axis):
        return ensemble_N.mean(axis=axis) - np.mean([one_N.mean(axis=axis) for one_N in members_MN], axis=0)

    expected = bootstrap(
        (right_N, *right_MN), difference, paired=True, vectorized=True, n_resamples=2000, method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1.5e-3)
    assert gain(right_MN, right_N) == found


def test_members_that_agree_gain_nothing():
    right_N = np.arange(10) % 3 > 0
    assert gain(np.stack([right_N] * 3), right_N) == {"difference": 0, "low": 0, "high": 0}


def test_several_presets_make_one_ensemble(finished, pets, weights):
    config, folder, setups = finished
    improvement = own(pets, weights)
    trained(improvement, folder)
    where, numbers = ensemble_of([config, improvement], (0,), paths(folder))
    assert where == folder / "results" / "Baseline_improvement" / "ensemble"
    assert list(numbers["scores"]) == ["baseline seed 0", "improvement seed 0", ENSEMBLE]
    others = with_fields(improvement, {"data.split_seed": 1, "train.seed": 1})
    trained(others, folder)
    with pytest.raises(SetupError, match="baseline and improvement did not predict the same images"):
        ensemble_of([config, with_fields(others, {"train.seed": 0})], (1,), paths(folder))


def test_under_the_published_protocol_there_is_no_calibrated_confidence(pets, weights, tmp_path):
    config = own(pets, weights, "baseline", data__protocol="published")
    for seed in SEEDS:
        trained(with_fields(config, {"train.seed": seed}), tmp_path)
    where, numbers = ensemble_of([config], SEEDS, paths(tmp_path))
    assert numbers["protocol"] == "published"
    assert "Calibrated_Confidence" not in read_predictions(where / "ensemble_validation_predictions.csv")


@pytest.mark.parametrize("seeds", [(), (0,), (1, 1)])
def test_one_run_makes_no_ensemble(finished, seeds):
    config, folder, _ = finished
    with pytest.raises(SetupError, match="two runs or more"):
        ensemble_of([config, config], seeds, paths(folder))


@pytest.mark.parametrize("missing", FINISHED)
def test_a_run_that_is_not_finished_is_named(finished, tmp_path, missing):
    config, folder, setups = finished
    where = copied(setups, folder, tmp_path)
    (tmp_path / "runs" / setups[1].run_folder.name / missing).unlink()
    with pytest.raises(SetupError, match=f"seed1 holds no finished run.*{missing}.*--seed 1"):
        ensemble_of([config], SEEDS, where)


def copied(setups, folder, target) -> Paths:
    for setup in setups:
        shutil.copytree(setup.run_folder, target / "runs" / setup.run_folder.name)
    return experiment.Paths(target / "results", target / "runs", folder / "cache")


def test_damaged_logits_are_named(finished, tmp_path):
    config, folder, setups = finished
    where = copied(setups, folder, tmp_path)
    path = tmp_path / "runs" / setups[1].run_folder.name / "holdout_logits.npy"
    whole = path.read_bytes()
    for damaged in (whole[:-9], b""):
        path.write_bytes(damaged)
        with pytest.raises(SetupError, match="seed1.*holdout_logits.npy is damaged"):
            ensemble_of([config], SEEDS, where)
    np.save(path, np.zeros((5, 2), np.float32))
    with pytest.raises(SetupError, match=r"its shape is \(5, 2\), not \(6, 2\)"):
        ensemble_of([config], SEEDS, where)


def test_a_run_of_another_configuration_is_refused(finished):
    config, folder, _ = finished
    with pytest.raises(SetupError, match="another configuration"):
        ensemble_of([with_fields(config, {"optim.head_lr": 0.5})], SEEDS, paths(folder))


def test_the_command_says_what_it_found(finished, pets, weights, capsys, monkeypatch):
    _, folder, _ = finished
    command = [*arguments(folder, "ensemble", pets, small(weights)), "--preset", "baseline"]
    monkeypatch.setattr(ensemble, "N_RESAMPLES", 20)
    assert main([*command, "--seeds", "0,1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" holdout")[0].strip() for line in lines[:3]] == [
        "baseline seed 0",
        "baseline seed 1",
        ENSEMBLE,
    ]
    assert lines[3].startswith("2 runs together ") and "gain over the mean member: " in lines[3]
    assert lines[4].startswith("see ")
    assert "seed2 holds no finished run" in refused(capsys, [*command, "--seeds", "0,2"])
    assert "'worst' is unknown" in refused(capsys, [*command[:-1], "baseline,worst"])
