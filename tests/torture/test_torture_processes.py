"""One run in several processes, several runs on one folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
from torture.attempts import FULL, tries
from torture.warm import ROOT, command, outputs

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


@pytest.mark.parametrize("setting", SETTINGS if FULL else ["improvement, mixed, penalty", "baseline"])
def test_processes_agree(setting, warm, inputs, tmp_path, tally):
    """Two and three processes have the losses of one to a ten-thousandth, and its answers."""
    attempts = tally("batch_sizes")
    arm = setting.partition(",")[0]
    found = {}
    for n in range(1, tries(4, 3)):
        arguments = command(tmp_path / str(n), arm, inputs, **SETTINGS[setting])
        ended = warm.run(arguments, processes=n)
        assert ended.statuses == [0] * n, ended.said
        folder = tmp_path / str(n) / "results" / arm.capitalize()
        found[n] = (
            pd.read_csv(folder / f"{arm}_history.csv"),
            pd.read_csv(folder / f"{arm}_validation_predictions.csv"),
        )
        assert json.loads((folder / "metrics.json").read_text())["processes"] == n
        assert ended.said.count("epoch   1/") == 1, "one process speaks"
    for n in set(found) - {1}:
        with attempts.attempt(f"{setting} in {n} processes"):
            for ours, alone in zip(found[n], found[1], strict=True):
                numbers = alone.select_dtypes("number").columns
                np.testing.assert_allclose(ours[numbers], alone[numbers], rtol=1e-4, atol=1e-5)
                texts = alone.columns.difference(numbers)
                pd.testing.assert_frame_equal(ours[texts], alone[texts])


def test_one_of_two_processes_is_killed(warm, inputs, tmp_path, tally):
    """The other ends with a clear error, and the same command goes on to the same result."""
    attempts = tally("kill")
    changes = SETTINGS["improvement"] | {"train.epochs": 3}
    whole = warm.run(command(tmp_path / "whole", "improvement", inputs, **changes), processes=2)
    assert whole.statuses == [0, 0], whole.said
    expected = outputs(tmp_path / "whole", "improvement")
    rng = random.Random(0)
    for number in range(tries(20, 1)):
        which, share = rng.choice((0, 1)), rng.uniform(0.05, 0.5)
        with attempts.attempt(f"process {which} of 2 killed after {share:.2f} of the run"):
            arguments = command(tmp_path / f"cut{number}", "improvement", inputs, **changes)
            ended = warm.run(arguments, processes=2, kill=which, after=share * whole.seconds)
            if -9 in ended.statuses:  # not, where the run was done before
                assert ended.statuses[1 - which] == 2 and "lost the others" in ended.said, ended
                assert "Start the same command again" in ended.said
            again = warm.run(arguments, processes=2)
            assert again.statuses == [0, 0], again.said
            assert outputs(tmp_path / f"cut{number}", "improvement") == expected


@pytest.mark.skipif(not FULL, reason="the same through a slower door (make torture)")
def test_accelerate_launch_starts_two(inputs, tmp_path):
    """The documented command."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    arguments = command(tmp_path, "improvement", inputs, **SETTINGS["improvement"])
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    done = subprocess.run([*launch, "src.experiment", *arguments], capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "results" / "Improvement" / "metrics.json").read_text())
    assert metrics["processes"] == 2


def test_what_needs_one_process_says_so(warm):
    ended = warm.run(["summary"], processes=2)
    assert ended.statuses == [2, 2] and "summary works in one process" in ended.said


def test_several_runs_on_one_folder(warm, inputs, tmp_path, tally):
    """One works, the others say so and leave its files alone."""
    attempts = tally("two_runs")
    whole = warm.run(command(tmp_path / "whole", "improvement", inputs))
    assert whole.statuses == [0], whole.said
    expected = outputs(tmp_path / "whole", "improvement")
    for number in range(tries(100, 2)):
        copies = 2 + number % 7
        with attempts.attempt(f"{copies} at once"):
            ended = warm.run(command(tmp_path / str(number), "improvement", inputs), copies=copies)
            assert sorted(ended.statuses) == [0] + [2] * (copies - 1), ended.statuses
            assert ended.said.count("error: another process is at work on the run in") == copies - 1
            assert outputs(tmp_path / str(number), "improvement") == expected


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
