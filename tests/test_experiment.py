"""The command line from end to end on a miniature, a run that is killed and started again, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import MINI_COUNTS, MINI_WNIDS
from PIL import Image
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.metrics import log_loss
from tiny import arguments, small

from src import SetupError, checkpoint, experiment, train
from src.average import copied
from src.commands import main
from src.config import preset, with_fields
from src.data import sources
from src.data.batches import Batches
from src.data.store import load_store
from src.experiment import (
    Paths,
    alone_in,
    claim_run_folder,
    complete,
    configure,
    make_batches,
    prepare,
    run,
    start_from_probe,
)
from src.files import read_json, write_json
from src.model.build import Classifier, gmacs
from src.train import Trainer

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("baseline", "improvement")
FILES = (
    "training_curve.png", "8_correct_8_wrong.png", "per_class.png", "confusion_matrix.png",
    "confusion_matrix.csv", "validation_predictions.csv", "history.csv", "per_class_accuracy.csv",
)  # fmt: skip


def paths(folder: Path) -> Paths:
    return Paths(folder / "results", folder / "runs", folder / "cache")


def own(pets: Path, weights: Path, arm: str = "improvement", **changes):
    return configure(arm, "offline", str(pets), small(weights, **changes))


def trained(config, folder: Path):
    """Everything of `run` but the report."""
    setup = prepare(config, paths(folder))
    complete(setup)
    return setup


def times(folder: Path) -> dict[Path, int]:
    """When each file below `folder` was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def both_arms(miniature, weights, tmp_path_factory):
    """Both arms through the command line on a miniature Tiny-ImageNet -> (folder, exit codes)."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "TINY_COUNTS", MINI_COUNTS)
        data = miniature.folder(folder / "tiny-imagenet-200")
        codes = [main(arguments(folder, arm, data, small(weights))) for arm in ARMS]
    return folder, codes


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_writes_every_file(both_arms, arm):
    folder, codes = both_arms
    assert codes == [0, 0]
    results = folder / "results" / arm.capitalize()
    assert {path.name for path in results.iterdir()} == {f"{arm}_{name}" for name in FILES} | {"metrics.json"}
    for path in results.glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 400 and path.stat().st_size < 1_000_000


@pytest.mark.parametrize("arm", ARMS)
def test_metrics_are_those_of_the_csv(both_arms, arm):
    folder, _ = both_arms
    results = folder / "results" / arm.capitalize()
    table = pd.read_csv(results / f"{arm}_validation_predictions.csv")
    metrics = json.loads((results / "metrics.json").read_text())
    history = pd.read_csv(results / f"{arm}_history.csv")
    correct = table["Ground_Truth"] == table["Prediction"]
    assert metrics["accuracy"] == pytest.approx(correct.mean(), rel=1e-7) and metrics["n"] == len(table) == 24
    assert (table["Is_Correct"] == correct).all()
    assert sorted(table["Ground_Truth_Wnid"].value_counts()) == [4] * 6
    assert set(table["Ground_Truth_Wnid"]) == set(MINI_WNIDS)
    assert len(history) == metrics["epochs"] == 2 and metrics["best_epoch"] in (1, 2)
    assert (metrics["n_fit"], metrics["n_holdout"], metrics["protocol"]) == (6 * 9, 6 * 3, "holdout")
    assert metrics["precision"] == "fp32" and metrics["seconds"]["total"] > 0
    assert (metrics["trainable_parameters"] == metrics["parameters"]) == (arm == "improvement")
    assert "runs" not in json.dumps(metrics["config"]["data"])  # nothing of this machine's folders of data


def test_predictions_are_the_saved_model_s(both_arms, weights):
    """The CSV is what the best weights say of valid, row by row, computed here from the stored pieces."""
    folder, _ = both_arms
    built = tiny.build(folder, wnids=tuple(sorted(MINI_WNIDS)), head="attention", weights=str(weights))
    state = load_file(next((folder / "runs").glob("improvement*/model.safetensors")))
    built.model.load_state_dict(state)
    store = load_store(next(path for path in (folder / "cache" / "stores").iterdir() if path.is_dir()))
    table = pd.read_csv(folder / "results" / "Improvement" / "improvement_validation_predictions.csv")
    where = {name: row for row, name in enumerate(store.image_ids_N.tolist())}
    with torch.no_grad():
        rows = [where[name] for name in table["Image_Id"]]
        logits = built.model.eval()(built.preprocess(torch.from_numpy(store.images[rows])))
    assert (logits.argmax(1).numpy() == table["Prediction"]).all()
    assert (store.labels_N[rows] == table["Ground_Truth"]).all()
    np.testing.assert_allclose(logits.softmax(1).max(1).values, table["Confidence"], atol=1e-4)


def test_comparison_and_summary(both_arms, capsys):
    folder, _ = both_arms
    comparison = json.loads((folder / "results" / "comparison.json").read_text())
    written = [folder / "results" / arm.capitalize() / "metrics.json" for arm in ARMS]
    accuracies = [json.loads(path.read_text())["accuracy"] for path in written]
    assert [comparison[arm]["accuracy"] for arm in ARMS] == accuracies
    assert comparison["same_setup"] and (folder / "results" / "comparison.png").exists()
    assert main(["summary", "--results", str(folder / "results")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(f"{a:.2%}" in line for a, line in zip(accuracies, lines[1:], strict=True))


@pytest.mark.parametrize("arm", ARMS)
def test_the_calibrated_confidence_is_of_a_temperature_fitted_on_holdout(both_arms, arm):
    folder, _ = both_arms
    run_folder = next((folder / "runs").glob(f"{arm}*"))
    holdout_NK, valid_NK = (np.load(run_folder / f"{name}_logits.npy") for name in ("holdout", "valid"))
    store = load_store(next(path for path in (folder / "cache" / "stores").iterdir() if path.is_dir()))
    label_of = {f"{d:016x}": k for d, k in zip(store.digests_N.tolist(), store.labels_N, strict=True)}
    labels_N = [label_of[digest] for digest in read_json(run_folder / "splits.json")["holdout"]]
    assert len(labels_N) == len(holdout_NK) == 18

    def loss(log_temperature: float) -> float:
        return log_loss(labels_N, softmax(holdout_NK / np.exp(log_temperature), axis=1))

    fitted = np.exp(minimize_scalar(loss, bounds=np.log([1 / 20, 20]), method="bounded").x)
    results = folder / "results" / arm.capitalize()
    temperature = read_json(results / "metrics.json")["calibration_temperature"]
    assert temperature == pytest.approx(fitted, rel=1e-3) and temperature != 1
    table = pd.read_csv(results / f"{arm}_validation_predictions.csv")
    expected = softmax(valid_NK / temperature, axis=1).max(axis=1)
    np.testing.assert_allclose(table["Calibrated_Confidence"], expected, atol=1e-5)


def test_the_temperature_is_holdout_s_where_valid_has_another(pets, weights, tmp_path):
    """One of n answers is wrong, all are as sure: at the best temperature with odds of n - 1 to 1."""
    setup = trained(own(pets, weights, train__epochs=1), tmp_path)
    for split, sure in (("holdout", 3.0), ("valid", 12.0)):
        _, labels_N = experiment.saved_logits(setup, split)
        logits_NK = sure * np.eye(2)[labels_N]
        logits_NK[0] = logits_NK[0, ::-1]
        np.save(setup.run_folder / f"{split}_logits.npy", logits_NK)
    n = len(setup.splits.holdout_N)
    found = experiment.write_results(setup).metrics["calibration_temperature"]
    assert found == pytest.approx(3 / np.log(n - 1), rel=1e-3)


def test_under_the_published_protocol_nothing_is_left_to_fit_a_temperature_on(pets, weights, tmp_path):
    result = run(own(pets, weights, data__protocol="published"), paths(tmp_path))
    assert "Calibrated_Confidence" not in result.predictions
    assert "calibration_temperature" not in result.metrics and "ece_calibrated" not in result.metrics


def test_what_is_made_of_both_arms(both_arms, mini_counts, weights, capsys):
    """Audit, analysis, maps and page, by the command line, from what the two runs left."""
    folder, _ = both_arms
    data, results = folder / "tiny-imagenet-200", folder / "results"
    for command, written in (
        ("audit", "data/audit.json"),
        ("analysis", "analysis/analysis.json"),
        ("explain", "explain/where_it_looks.png"),
        ("report", "report.html"),
    ):
        assert main(arguments(folder, command, data, small(weights))) == 0
        assert (results / written).exists() and "see " in capsys.readouterr().out
    used = read_json(results / "analysis" / "analysis.json")["source_sha256"]
    assert used == read_json(results / "explain" / "explain.json")["source_sha256"] and len(used) == 2


def test_what_is_made_of_other_data_is_refused(both_arms, pets, weights, tmp_path, capsys):
    folder, _ = both_arms
    said = refused(capsys, arguments(folder, "analysis", pets, small(weights)))
    assert "not of the images of" in said and "--data" in said
    said = refused(capsys, arguments(tmp_path, "explain", pets, small(weights)))
    assert "holds no finished run" in said and "src.experiment baseline" in said


def test_a_finished_run_is_loaded_not_trained(both_arms, mini_counts, weights, monkeypatch):
    folder, _ = both_arms
    table = folder / "results" / "Improvement" / "improvement_validation_predictions.csv"
    before = table.read_bytes()
    table.unlink()
    monkeypatch.setattr(experiment, "_train_and_predict", None)
    assert main(arguments(folder, "improvement", folder / "tiny-imagenet-200", small(weights))) == 0
    assert table.read_bytes() == before


def test_a_run_of_another_configuration_is_not_taken_over(both_arms, mini_counts, weights, capsys):
    folder, _ = both_arms
    before = times(folder / "runs")
    changed = small(weights, optim__lr=0.5)
    assert main(arguments(folder, "improvement", folder / "tiny-imagenet-200", changed)) == 2
    said = capsys.readouterr().err
    assert "config.optim.lr: 0.0005 -> 0.5" in said and "--runs DIR" in said and "head_lr" not in said
    assert before == times(folder / "runs")


def test_a_run_on_other_data_or_weights_is_not_taken_over(both_arms, pets, weights, tmp_path, capsys):
    folder, _ = both_arms
    assert main(arguments(folder, "improvement", pets, small(weights))) == 2
    assert "data: " in capsys.readouterr().err
    other = tiny.write_weights(tmp_path / "other.safetensors", n_classes=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "TINY_COUNTS", MINI_COUNTS)
        assert main(arguments(folder, "improvement", folder / "tiny-imagenet-200", small(other))) == 2
    assert "weights_sha256: " in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- methods


def test_baseline_with_cached_features_is_the_baseline_without(pets, weights, tmp_path):
    logits, histories = [], []
    for cached in (True, False):
        config = own(pets, weights, "baseline", train__cache_features=cached, train__epochs=4)
        folder = trained(config, tmp_path / str(cached)).run_folder
        logits.append(np.load(folder / "valid_logits.npy"))
        histories.append(read_json(folder / "history.json"))
    assert list((tmp_path / "True" / "cache" / "features").glob("*.npy"))
    assert not (tmp_path / "False" / "cache" / "features").exists()
    assert (logits[0].argmax(1) == logits[1].argmax(1)).all()
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
    for ours, theirs in zip(*histories, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_features_are_computed_once_and_anew_for_other_weights(pets, weights, tmp_path, monkeypatch):
    calls, original = [], Classifier.features
    monkeypatch.setattr(Classifier, "features", lambda self, x: calls.append(len(x)) or original(self, x))
    config = own(pets, weights, "baseline")
    setup = prepare(config, paths(tmp_path))
    make_batches(setup)
    assert sum(calls) == 32
    make_batches(prepare(with_fields(config, {"train.seed": 1}), paths(tmp_path)))
    assert sum(calls) == 32
    other = tiny.write_weights(tmp_path / "other.safetensors", n_classes=8)
    make_batches(prepare(with_fields(config, {"model.weights": str(other)}), paths(tmp_path)))
    make_batches(prepare(with_fields(config, {"model.image_size": 96}), paths(tmp_path)))
    assert sum(calls) == 96


def test_deleted_features_are_made_again(pets, weights, tmp_path):
    """Large files go first where a disk is full; the note beside them does not say that they are there."""
    setup = prepare(own(pets, weights, "baseline"), paths(tmp_path))
    before = np.array(experiment.frozen_features(setup)[0])
    [path] = (tmp_path / "cache" / "features").glob("*.npy")
    path.unlink()
    assert np.array_equal(experiment.frozen_features(setup)[0], before) and path.exists()


def test_a_batch_of_cached_features_takes_one_pass(pets, weights, tmp_path, monkeypatch):
    """Images go through the model in parts that fit; features are small."""
    monkeypatch.setattr(
        experiment, "choose_device", lambda size, batch, micro_batch: tiny.device(micro_batch or 2)
    )
    uncached = {
        "not cached": {"train__cache_features": False},
        "augmented": {"augment__flip": 0.5},
        "trained": {"model__trainable": "all"},
    }
    for name, changes in uncached.items():
        config = own(pets, weights, "baseline", **changes)
        assert not config.caches_features, name
        assert prepare(config, paths(tmp_path)).device.micro_batch == 2, name
    improvement = own(pets, weights, "improvement")
    assert not improvement.caches_features
    assert prepare(improvement, paths(tmp_path)).device.micro_batch == 2
    asked_for = with_fields(improvement, {"train.micro_batch": 3})
    assert prepare(asked_for, paths(tmp_path)).device.micro_batch == 3

    passes, original = [], Classifier.classify
    monkeypatch.setattr(
        Classifier,
        "classify",
        lambda self, x: (passes.append(len(x)) if self.training else None, original(self, x))[1],
    )
    config = own(pets, weights, "baseline", train__epochs=1)
    assert config.caches_features
    setup = trained(config, tmp_path)
    assert setup.device.micro_batch == 5 and setup.device.eval_batch == tiny.device().eval_batch
    assert passes == [5, 5, 4, 4]
    assert read_json(setup.run_folder / "facts.json")["micro_batch"] == 5


def test_augmented_or_trained_images_are_not_cached(pets, weights, tmp_path):
    for changes in ({"augment__flip": 0.5}, {"model__trainable": "all"}):
        data, _, _ = make_batches(prepare(own(pets, weights, "baseline", **changes), paths(tmp_path)))
        assert not data.cached
        inputs, _ = next(data.fit.epoch(0, 0))
        assert inputs.shape[1:] == (3, tiny.SIZE, tiny.SIZE)


@pytest.mark.parametrize("protocol", ["holdout", "published"])
def test_valid_is_scored_once_and_trained_on_never(pets, weights, tmp_path, monkeypatch, protocol):
    taken, original = [], Batches._taken
    monkeypatch.setattr(Batches, "_taken", lambda self, parts: taken.extend(parts) or original(self, parts))
    fitted, original_fit = [], experiment.fit
    monkeypatch.setattr(experiment, "fit", lambda *a: (original_fit(*a), fitted.append(len(taken)))[0])
    setup = trained(own(pets, weights, data__protocol=protocol), tmp_path)
    in_training, after = np.concatenate(taken[: fitted[0]]), np.concatenate(taken[fitted[0] :])
    valid, epochs = setup.splits.valid_N, 2
    assert len(valid) == 8 and after[-8:].tolist() == valid.tolist()
    assert np.isin(after[:-8], setup.splits.holdout_N).all()  # what comes after is chosen there, too
    if protocol == "holdout":
        assert not np.isin(in_training, valid).any() and not np.isin(after[:-8], valid).any()
        assert len(in_training) == epochs * (18 + 6 + 6)  # holdout for its score and for attention's entropy
    else:  # chosen on valid, as the study did: once an epoch, and all of train is trained on
        assert np.isin(in_training, valid).sum() == epochs * (8 + 8)
        assert len(in_training) == epochs * (24 + 8 + 8)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_lp_ft_starts_from_the_classifier_that_the_baseline_trains(pets, weights, tmp_path, scale):
    """The probe is a run of the baseline as written, `probe_epochs` long; nothing of the recipe is in it."""
    as_written = {"train__batch_size": 128, "optim__head_lr": 1e-3}
    baseline = trained(own(pets, weights, "baseline", train__epochs=3, **as_written), tmp_path / "baseline")
    config = own(pets, weights, model__head_init="probe", model__head_init_scale=scale, train__probe_epochs=3)
    setup = prepare(config, paths(tmp_path))
    before = setup.model.classifier.weight.detach().clone()
    seconds = start_from_probe(setup)
    expected = load_file(baseline.run_folder / "model.safetensors")
    assert read_json(baseline.run_folder / "facts.json")["epochs"] == 3 and seconds > 0
    assert not torch.equal(before, setup.model.classifier.weight)
    for name, tensor in setup.model.classifier.state_dict().items():
        torch.testing.assert_close(tensor, scale * expected[f"classifier.{name}"], rtol=1e-6, atol=0)
    assert checkpoint.load_newest(setup.run_folder / "probe")["progress"]["epoch"] == 3


def test_training_begins_where_the_probe_ended(pets, weights, tmp_path, monkeypatch):
    """After the model is built and before its first step, in time that the run is charged for."""
    seen, original = [], experiment.fit
    monkeypatch.setattr(
        experiment, "fit", lambda model, *a: (seen.append(copied(model.state_dict())), original(model, *a))[1]
    )
    setup = trained(own(pets, weights, model__head_init="probe", train__probe_epochs=2), tmp_path)
    assert len(seen) == 2  # the probe's start, and the run's
    probe = checkpoint.load_newest(setup.run_folder / "probe")["best"]
    assert torch.equal(seen[1]["classifier.weight"], probe["classifier.weight"])
    assert not torch.equal(seen[0]["classifier.weight"], probe["classifier.weight"])
    facts = read_json(setup.run_folder / "facts.json")["seconds"]
    assert facts["probe"] > 0 and facts["total"] > facts["probe"] + sum(facts["epochs"])


@pytest.mark.parametrize("epoch_ends", [1, 3], ids=["in the probe", "after it"])
def test_lp_ft_cut_off_goes_on_to_the_same_result(pets, weights, tmp_path, monkeypatch, epoch_ends):
    config = own(pets, weights, model__head_init="probe", train__probe_epochs=2)
    expected = trained(config, tmp_path / "whole").run_folder
    ends, original = [], Trainer.end_epoch

    def end_epoch(self):
        original(self)
        ends.append(1)
        if len(ends) == epoch_ends:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "end_epoch", end_epoch)
    with pytest.raises(KeyboardInterrupt):
        trained(config, tmp_path / "cut")
    found = trained(config, tmp_path / "cut").run_folder
    assert len(ends) == 4  # two epochs of each, none of them twice
    assert np.array_equal(*(np.load(folder / "valid_logits.npy") for folder in (found, expected)))
    assert read_json(found / "history.json") == read_json(expected / "history.json")


def test_the_saved_model_is_the_one_that_predicts(pets, weights, tmp_path):
    """Whatever comes after training is kept or not: weights, temperature and logits belong together."""
    for name, after in {
        "weights": {"after__soup_epochs": 2, "after__wise_ft": True, "after__temperature": True},
        "plain": {},
    }.items():
        setup = trained(own(pets, weights, train__epochs=3, optim__lr=1e-3, **after), tmp_path / name)
        facts = read_json(setup.run_folder / "facts.json")
        assert [step["step"].split()[0] for step in facts["after"]] == (
            ["soup", *9 * ["WiSE-FT"], "temperature"] if after else []
        )
        assert (facts["temperature"] != 1) == bool(after)
        built = tiny.build(tmp_path, ("cat", "dog"), head="attention", weights=str(weights))
        built.model.load_state_dict(load_file(setup.run_folder / "model.safetensors"))
        for split, rows_N in (("holdout", setup.splits.holdout_N), ("valid", setup.splits.valid_N)):
            with torch.no_grad():
                images = built.preprocess(torch.from_numpy(setup.store.images[rows_N]))
                logits_NK = built.model.eval()(images) / facts["temperature"]
            written = np.load(setup.run_folder / f"{split}_logits.npy")
            np.testing.assert_allclose(written, logits_NK, atol=1e-4)


def test_images_are_larger_in_prediction_alone(pets, weights, tmp_path):
    config = own(pets, weights, model__test_size=96, data__sampling="balanced")
    assert not own(pets, weights, "baseline", model__test_size=96).caches_features
    setup = prepare(config, paths(tmp_path))
    data, valid, _ = make_batches(setup)
    sides = [next(iter(part.in_order()))[0].shape[-1] for part in (data.fit, data.holdout, valid)]
    assert sides == [tiny.SIZE, 96, 96]
    assert [part.balanced for part in (data.fit, data.holdout, valid)] == [True, False, False]
    assert [part.augmentation == config.augment for part in (data.fit, data.holdout, valid)] == [
        True, False, False,
    ]  # fmt: skip
    setup = trained(config, tmp_path)
    facts = read_json(setup.run_folder / "facts.json")
    assert (facts["image_size"], facts["test_size"]) == (tiny.SIZE, 96)
    assert facts["gflops"] == pytest.approx(gmacs(setup.model, 96), abs=1e-4)


@pytest.mark.parametrize(
    ("arm", "head", "trainable"),
    [("as_run_baseline", "plain", "none"), ("as_run_improvement", "as_run", "last_stage")],
)
def test_what_the_study_ran_runs(pets, weights, tmp_path, capsys, arm, head, trainable):
    assert main(arguments(tmp_path, arm, pets, small(weights))) == 0
    folder = tmp_path / "results" / arm.capitalize()
    assert {path.name for path in folder.iterdir()} == {f"{arm}_{name}" for name in FILES} | {"metrics.json"}
    metrics = read_json(folder / "metrics.json")
    model = metrics["config"]["model"]
    assert (metrics["arm"], model["head"], model["trainable"], metrics["n"]) == (arm, head, trainable, 8)
    assert 0 < metrics["trainable_parameters"] < metrics["parameters"]
    header, line = capsys.readouterr().out.splitlines()[-2:]
    assert line.startswith(f"{arm} ")
    assert header.index("accuracy") + len("accuracy") == line.index("%") + 1


def test_libraries_of_the_report_wait_for_it():
    """They take seconds to import, and the first step of training needs none of them."""
    late = {"matplotlib", "pandas", "sklearn", "statsmodels", "src.evaluate", "src.figures", "src.report"}
    script = "import sys, src.experiment; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "src.train" in loaded and not late & loaded


# ------------------------------------------------------------- cut off between stages (kills: tests/torture)


@pytest.mark.parametrize("stage", ["end_epoch", "save_file", "write_results"])
def test_a_run_cut_off_between_its_stages(pets, weights, tmp_path, monkeypatch, stage):
    """After the last epoch, before the weights are saved, before the report: nothing is trained again."""

    def stop(*_):
        raise KeyboardInterrupt

    config = own(pets, weights, train__epochs=1)
    expected = np.load(trained(config, tmp_path / "whole").run_folder / "valid_logits.npy")
    with monkeypatch.context() as patch:
        if stage == "end_epoch":
            original = Trainer.end_epoch
            patch.setattr(Trainer, stage, lambda self: (original(self), stop()))
        else:
            patch.setattr(experiment, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            run(config, paths(tmp_path / "cut"))
    monkeypatch.setattr(Trainer, "train_step", None)
    result = run(config, paths(tmp_path / "cut"))
    assert np.array_equal(np.load(result.setup.run_folder / "valid_logits.npy"), expected)
    assert result.metrics["n"] == len(result.predictions) == 8 and result.folder.name == "Improvement"


# ------------------------------------------------------------------------------------------ bad input


def refused(capsys, arguments: list[str]) -> str:
    """What the command line says of bad input: one screen, no traceback, exit status 2."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    bars, _, message = said.rpartition("error: ")
    assert not bars or bars[-1] in "\r\n"
    assert 0 < message.count("\n") <= 20 and len(message) < 2000 and "Traceback" not in said
    return message


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--profile", "fast"], "'fast' is unknown"),
        (["--protocol", "mine"], "data.protocol = 'mine'"),
        (["--seed", "-1"], "train.seed = -1"),
        (["--set", "train.epoch=3"], "'train.epoch' is unknown"),
        (["--set", "train.epochs"], "train.epochs = '' cannot be read as int"),
        (["--set", "train.epochs=three"], "train.epochs = 'three' cannot be read as int"),
        (["--set", "model.dropout=2"], "model.dropout = 2.0 is out of range"),
        (["--set", "model.backbone=no_such_net"], "no_such_net"),
        (["--set", "model.backbone=no_such_net.in1k"], "no_such_net"),
        (["--set", "model.weights=nowhere.safetensors"], "nowhere.safetensors"),
        (["--set", "model.attention_heads=7"], "attention_heads = 7"),
        (["--set", "model.head_init=pretrained_rows"], "pretrained_rows"),
        (["--set", "data.holdout_per_class=12"], "holdout_per_class"),
        (["--data", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_bad_input_is_refused_before_training(pets, weights, tmp_path, capsys, monkeypatch, extra, said):
    monkeypatch.setattr(experiment, "_train_and_predict", None)
    assert said in refused(capsys, [*arguments(tmp_path, "improvement", pets, small(weights)), *extra])
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("name", ["results", "runs", "cache"])
def test_folder_that_cannot_be_written(pets, weights, tmp_path, capsys, name):
    file = tmp_path / "file"
    file.write_text("")
    command = [*arguments(tmp_path, "improvement", pets, small(weights)), f"--{name}", str(file / "below")]
    said = refused(capsys, command)
    assert str(file / "below") in said and f"--{name}" in said


def test_unknown_arm_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["improved"])
    assert caught.value.code == 2 and "baseline" in capsys.readouterr().err


def test_summary_of_nothing(tmp_path, capsys):
    assert str(tmp_path) in refused(capsys, ["summary", "--results", str(tmp_path)])


def test_exit_status_of_the_command_itself(tmp_path):
    command = [sys.executable, "-m", "src.experiment", "baseline", "--profile", "fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: profile 'fast' is unknown")
    assert "Traceback" not in done.stderr


def test_loss_that_is_not_finite_is_one_message(pets, weights, tmp_path, capsys, monkeypatch):
    original = Classifier.classify
    monkeypatch.setattr(Classifier, "classify", lambda self, x: original(self, x) * float("nan"))
    assert "the loss is nan at epoch 1" in refused(
        capsys, arguments(tmp_path, "improvement", pets, small(weights))
    )
    assert not (tmp_path / "results" / "Improvement").exists()


# ------------------------------------------------------------------------------------------ data folder


def test_variable_names_local_data(monkeypatch):
    monkeypatch.setenv("TINY_IMAGENET_DIR", "/some/where")
    for profile in ("offline", "full"):
        data = configure("baseline", profile).data
        assert (data.source, data.path) == ("local", "/some/where")
    assert configure("baseline", "quick").data.source == "digits"
    assert configure("baseline", "offline", "/given").data.path == "/given"
    assert configure("baseline", "quick", "/given").data.source == "local"
    assert configure("baseline", "offline", "", {"data.path": "/set"}).data.path == "/set"
    assert configure("baseline", "full", "", {"data.source": "hub"}).data.source == "hub"
    assert configure("animals40", "offline").data.path == "/some/where"  # the stand-in is cut from it
    assert configure("animals40", "full").data.path == ""  # the study's images are others
    monkeypatch.delenv("TINY_IMAGENET_DIR")
    assert configure("baseline", "full") == preset("baseline", "full")


def test_where_the_data_lay_is_no_part_of_a_run(pets, weights, tmp_path):
    """The same images in another place: the run goes on."""
    config = own(pets, weights)
    setup = prepare(config, paths(tmp_path))
    claim_run_folder(setup)
    moved = tmp_path / "elsewhere" / "pets"
    moved.parent.mkdir()
    moved.symlink_to(pets)
    claim_run_folder(prepare(with_fields(config, {"data.path": str(moved)}), paths(tmp_path)))
    with pytest.raises(SetupError, match="config.train.batch_size: 5 -> 6"):
        claim_run_folder(prepare(with_fields(config, {"train.batch_size": 6}), paths(tmp_path)))


def test_a_run_from_before_a_field_was_there_goes_on(pets, weights, tmp_path):
    """The field is off at its default; with another value, or gone from this version, the run is another."""
    config = own(pets, weights)
    setup = prepare(config, paths(tmp_path))
    claim_run_folder(setup)
    record = setup.run_folder / "run.json"
    earlier = read_json(record)
    del earlier["config"]["data"]["imbalance"], earlier["config"]["after"]
    write_json(record, earlier)
    claim_run_folder(setup)
    write_json(record, earlier)
    with pytest.raises(SetupError, match="config.data.imbalance: 1.0 -> 2.0"):
        claim_run_folder(replace(setup, config=with_fields(config, {"data.imbalance": 2.0})))
    earlier["config"]["data"]["oversampled"] = True
    write_json(record, earlier)
    with pytest.raises(SetupError, match="config.data.oversampled: True -> None"):
        claim_run_folder(setup)


def test_two_processes_do_not_work_on_one_run(pets, weights, tmp_path):
    """The second is refused at once and changes nothing; the run goes on when the first has ended."""
    setup = prepare(own(pets, weights), paths(tmp_path))
    setup.run_folder.mkdir(parents=True)
    held = (
        "import filelock, sys\n"
        "with filelock.FileLock(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", held, str(setup.run_folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SetupError, match="another process is at work .*--runs DIR"):
            complete(setup)  # nor does it say whose run it is
        assert [path.name for path in setup.run_folder.iterdir()] == [".lock"]
        other.kill()  # a lock does not outlive its process
    complete(setup)
    assert (setup.run_folder / "valid_logits.npy").exists()


def test_a_drive_without_locks_is_worked_on_all_the_same(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with alone_in(tmp_path):
        pass
    assert "no flock here" in capsys.readouterr().out


def test_quick_never_overwrites_real_results():
    assert Paths.of("quick").results != Paths.of("full").results == Paths.of("offline").results
    assert Paths.of("quick", "a", "b", "c") == Paths(Path("a"), Path("b"), Path("c"))


def test_the_loop_is_where_the_tests_patch_it():
    assert experiment.fit is train.fit
