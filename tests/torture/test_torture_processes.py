"""One run in several processes, several runs on one folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from torture.attempts import FULL, tries
from torture.warm import ROOT, Warm, command, outputs

from src.predict import loss_and_accuracy, one_pass

SETTINGS = {
    "improvement": {"model.dropout": 0.0, "train.batch_size": 6},
    "baseline": {"model.dropout": 0.0, "train.batch_size": 6},
    "improvement, mixed, penalty": {
        "model.dropout": 0.0,
        "augment.mixup": 0.5,
        "optim.l2_sp": 0.1,
        "optim.clip_norm": 0.0,
        "train.ema_decay": 0.9,
        "train.batch_size": 7,
    },
}


@pytest.mark.parametrize("setting", SETTINGS if FULL else ["improvement, mixed, penalty"])
def test_processes_agree(setting, warm, inputs, tmp_path, tally):
    """Two and three processes have the losses of one to a ten-thousandth, and its answers."""
    attempts = tally("batch_sizes")
    arm = setting.partition(",")[0]
    found = {}
    for n in range(1, tries(4, 3)):
        arguments = command(tmp_path / str(n), arm, inputs, **SETTINGS[setting])
        ended = warm.run(arguments, processes=n)
        assert ended.statuses == [0] * n, ended.said
        found[n] = tables(tmp_path / str(n), arm, n)
        assert ended.said.count("epoch   1/") == 1, "one process speaks"
    for n in set(found) - {1}:
        with attempts.attempt(f"{setting} in {n} processes"):
            require_same(found[n], found[1])


def tables(folder: Path, arm: str, n_processes: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """History and predictions that a run in so many processes left."""
    results = folder / "results" / arm.capitalize()
    assert json.loads((results / "metrics.json").read_text())["processes"] == n_processes
    return (
        pd.read_csv(results / f"{arm}_history.csv"),
        pd.read_csv(results / f"{arm}_validation_predictions.csv"),
    )


def require_same(ours: tuple[pd.DataFrame, ...], alone: tuple[pd.DataFrame, ...]) -> None:
    """The same rows and texts; numbers to a ten-thousandth."""
    for our, one in zip(ours, alone, strict=True):
        numbers = one.select_dtypes("number").columns
        np.testing.assert_allclose(our[numbers], one[numbers], rtol=1e-4, atol=1e-5)
        texts = one.columns.difference(numbers)
        pd.testing.assert_frame_equal(our[texts], one[texts])


@pytest.mark.skipif(not FULL, reason="five runs (make torture)")
def test_processes_with_batch_normalisation(warm, inputs, tmp_path, tally):
    """Each normalises its own share: they learn what one process learns that passes the shares in turn.

    The running statistics are another mean of the same, and so are not compared; they are equal in all
    processes, or their answers would not be those of the weights that the main process wrote.
    """
    attempts = tally("batch_sizes")
    weights = tiny.write_weights(tmp_path / "weights.safetensors", tiny.EFFICIENTNET, n_classes=7)
    changes = {"model.backbone": tiny.EFFICIENTNET, "model.weights": str(weights)}
    changes |= {"model.dropout": 0.0, "train.batch_size": 6}
    learned = ["epoch", "fit_loss", "fit_accuracy", "gate"]
    for n in (2, 3):
        with attempts.attempt(f"batch normalisation in {n} processes"):
            folder = tmp_path / f"{n} processes"
            arguments = command(folder, "improvement", inputs, **changes)
            ended = warm.run(arguments, processes=n)
            assert ended.statuses == [0] * n, ended.said
            history, predictions = tables(folder, "improvement", n)
            in_turn = {**changes, "train.micro_batch": 6 // n}
            ended = warm.run(command(tmp_path / f"{n} in turn", "improvement", inputs, **in_turn))
            assert ended.statuses == [0], ended.said
            expected, answers = tables(tmp_path / f"{n} in turn", "improvement", 1)
            np.testing.assert_allclose(history[learned], expected[learned], rtol=1e-3, atol=1e-5)
            pd.testing.assert_series_equal(predictions["Image_Id"], answers["Image_Id"])
            require_answers_of_the_weights(warm, arguments, inputs, folder, predictions)


def require_answers_of_the_weights(
    warm: Warm, arguments: list[str], inputs: Path, folder: Path, predictions: pd.DataFrame
) -> None:
    """One process answers `valid` by the weights of the finished run as its processes did."""
    again = ["predict", "--preset", *arguments, "--images", str(inputs / "pets" / "valid")]
    ended = warm.run([*again, "--out", str(folder / "answers.csv")])
    assert ended.statuses == [0], ended.said
    answers = pd.read_csv(folder / "answers.csv").set_index("image").loc
    names = predictions["Image_Id"].str.removeprefix("valid/")
    found = answers[names]
    np.testing.assert_allclose(found["confidence"], predictions["Confidence"], rtol=1e-4)
    assert found["prediction"].tolist() == predictions["Prediction_Wnid"].tolist()


def test_one_of_two_processes_is_killed(warm, inputs, tmp_path, tally):
    """The other ends with a clear error, and the same command goes on to the same result.

    Killed once they have met: before, the other waits for it as long as torch does.
    """
    attempts = tally("kill")
    changes = SETTINGS["improvement"] | {"train.epochs": 3}
    whole = warm.run(command(tmp_path / "whole", "improvement", inputs, **changes), processes=2)
    assert whole.statuses == [0, 0], whole.said
    expected = outputs(tmp_path / "whole", "improvement")
    rng = random.Random(0)
    for number in range(tries(20, 1)):
        which, share = rng.choice((0, 1)), rng.uniform(0.05, 0.5)
        with attempts.attempt(f"process {which} of 2 killed after {share:.2f} of the run, or earlier"):
            folder = tmp_path / f"cut{number}"
            arguments = command(folder, "improvement", inputs, **changes)
            met = {"processes": 2, "kill": which, "when": str(folder / "runs" / "*" / "run.json")}
            ended = warm.run(arguments, **met, after=share * whole.seconds)
            for _ in range(10):
                if -9 in ended.statuses:
                    break
                shutil.rmtree(folder)  # the run was done before
                share *= 0.7
                ended = warm.run(arguments, **met, after=share * whole.seconds)
            assert ended.statuses[which] == -9 and ended.statuses[1 - which] == 2, ended
            assert "lost the others" in ended.said and "Start the same command again" in ended.said
            again = warm.run(arguments, processes=2)
            assert again.statuses == [0, 0], again.said
            assert outputs(folder, "improvement") == expected


@pytest.mark.skipif(not FULL, reason="the same through a slower door (make torture)")
def test_accelerate_launch_starts_two(warm, inputs, tmp_path, tally):
    """The documented command has the losses and answers of one process."""
    attempts = tally("batch_sizes")
    changes = SETTINGS["improvement"]
    alone = warm.run(command(tmp_path / "alone", "improvement", inputs, **changes))
    assert alone.statuses == [0], alone.said
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    arguments = command(tmp_path / "two", "improvement", inputs, **changes)
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    with attempts.attempt("accelerate launch --num_processes 2"):
        done = subprocess.run([*launch, "src.experiment", *arguments], capture_output=True, **options)
        assert done.returncode == 0, done.stderr
        require_same(tables(tmp_path / "two", "improvement", 2), tables(tmp_path / "alone", "improvement", 1))


def test_what_needs_one_process_says_so(warm):
    ended = warm.run(["summary"], processes=2)
    assert ended.statuses == [2, 2] and "summary works in one process" in ended.said


def test_several_runs_on_one_folder(warm, inputs, tmp_path, tally):
    """One works, the others say so and leave its files alone."""
    attempts = tally("two_runs")
    whole = warm.run(command(tmp_path / "whole", "improvement", inputs))
    assert whole.statuses == [0], whole.said
    expected = outputs(tmp_path / "whole", "improvement")
    for number in range(tries(100, 1)):
        copies = 2 + number % 7
        with attempts.attempt(f"{copies} at once"):
            ended = warm.run(command(tmp_path / str(number), "improvement", inputs), copies=copies)
            assert sorted(ended.statuses) == [0] + [2] * (copies - 1), ended.statuses
            assert ended.said.count("error: another process is at work on the run in") == copies - 1
            assert outputs(tmp_path / str(number), "improvement") == expected


def test_several_configurations_on_one_folder(warm, inputs, tmp_path, tally):
    """One finishes, with results of its own; the others are told, and never get what is not theirs."""
    attempts = tally("two_runs")
    for number in range(tries(20, 1)):
        copies = 2 + number % 3
        rates = [["--set", f"optim.lr={(rank + 1) * 1e-4:g}"] for rank in range(copies)]
        with attempts.attempt(f"{copies} learning rates at once"):
            arguments = command(tmp_path / str(number), "improvement", inputs)
            ended = warm.run(arguments, more=rates, pause=1)
            assert sorted(ended.statuses) == [0] + [2] * (copies - 1), ended
            told = ended.said.count("error: another process is at work on the run in")
            told += ended.said.count("holds a run of another configuration")
            assert told == copies - 1, ended.said
            before = outputs(tmp_path / str(number), "improvement")
            metrics = tmp_path / str(number) / "results" / "Improvement" / "metrics.json"
            for rate, status in zip(rates, ended.statuses, strict=True):
                assert (
                    f"optim.lr={json.loads(metrics.read_text())['config']['optim']['lr']:g}" == rate[1]
                ) == (status == 0)
                again = warm.run([*arguments, *rate])
                assert again.statuses == [status], again.said
                assert ("holds a run of another configuration" in again.said) == (status == 2)
                assert "optim.lr" in again.said or status == 0
            assert outputs(tmp_path / str(number), "improvement") == before


@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
def test_prediction_of_any_batch_size(backbone, tmp_path, tally):
    """1 to 97 images at once: every row is there, the metrics are those of the rows."""
    attempts = tally("batch_sizes")
    built = tiny.build(tmp_path, backbone=backbone)
    batches = tiny.fit_data(built, tiny.config(model__backbone=backbone), n=8, n_holdout=90).holdout
    labels_N = batches.labels_N[batches.index_M]
    built.model.eval()
    alone_NK = one_pass(built.model, batches, tiny.device(), "alone")
    expected = loss_and_accuracy(alone_NK, labels_N)
    for size in range(1, 98) if FULL else (1, 7, 89, 97):
        with attempts.attempt(f"{backbone}, {size} at once"):
            logits_NK = one_pass(built.model, replace(batches, batch_size=size), tiny.device(), "in parts")
            np.testing.assert_allclose(logits_NK, alone_NK, rtol=1e-4, atol=1e-5)
            found = loss_and_accuracy(logits_NK, labels_N)
            assert found["accuracy"] == expected["accuracy"]
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
