"""Test images of classes that training did not have, from a finished run to what is said of them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import tiny
from conftest import MINI_WNIDS
from test_experiment import arguments, paths, refused, small

from src import strangers
from src.commands import main
from src.data import subsets
from src.experiment import configure, finished_run, run
from src.strangers import in_words

ANIMALS = sorted(wnid for wnid in MINI_WNIDS if wnid < subsets.ANIMALS_END)


@pytest.fixture
def asked(miniature, mini_counts, tmp_path, monkeypatch):
    """Two of the miniature's three animals are known; the command line's arguments for a command."""
    monkeypatch.setattr(subsets, "N_KNOWN", 2)
    monkeypatch.setattr(subsets, "TRAIN_IMAGES", (9, 12))
    data = miniature.folder(tmp_path / "tiny-imagenet-200")
    weights = tiny.write_weights(tmp_path / "weights.safetensors")
    changes = small(weights) | {"data.classes": "animals40", "data.holdout_per_class": 2}
    return lambda command: arguments(tmp_path, command, data, changes)


def test_strangers_of_a_finished_run(asked, tmp_path, capsys):
    assert len(ANIMALS) == 3
    assert main(asked("baseline")) == 0
    assert main([*asked("strangers"), "--preset", "baseline"]) == 0
    folder = tmp_path / "results" / "Baseline" / "strangers"
    found = json.loads((folder / "unknown.json").read_text())
    metrics = json.loads((tmp_path / "results" / "Baseline" / "metrics.json").read_text())
    assert found["fall"]["n_unknown"] == 4 and found["fall"]["known"]["n"] == 8
    assert found["valid"]["accuracy"] == pytest.approx(metrics["accuracy"])
    assert metrics["n_classes"] == 2 and metrics["data"].endswith("a stand-in of 2 animals")
    assert sorted(path.name for path in folder.iterdir()) == [
        "unknown.json",
        "unknown.png",
        "unknown_roc.csv",
    ]
    said = in_words(found)
    assert f"{found['fall']['test']['accuracy']:.2%}" in said and "those 4 are of classes" in said
    assert "strangers" in capsys.readouterr().out


def test_the_logits_of_test_images_are_those_of_the_same_images_in_valid(asked, tmp_path, monkeypatch):
    """Where the official validation images are `valid` as well, their logits are the run's own."""
    assert main(asked("baseline")) == 0
    command = asked("baseline")
    config = configure("baseline", "offline", command[command.index("--data") + 1], dict(
        item.split("=", 1) for item in command if "=" in item
    ))  # fmt: skip
    result = run(config, paths(tmp_path))
    valid_N = result.setup.splits.valid_N
    own = np.load(finished_run(config, paths(tmp_path)) / "valid_logits.npy")
    np.testing.assert_allclose(strangers.logits_of(result.setup, result.setup.store, valid_N), own, atol=1e-5)


def test_data_without_labelled_test_images_are_refused(pets, weights, tmp_path, capsys):
    asked = lambda command: arguments(tmp_path, command, pets, small(weights))  # noqa: E731
    assert main(asked("baseline")) == 0
    message = refused(capsys, [*asked("strangers"), "--preset", "baseline"])
    assert "no labelled test images" in message and "`predict`" in message


def test_a_run_that_is_not_finished_is_named(asked, capsys):
    assert "holds no finished run" in refused(capsys, [*asked("strangers"), "--preset", "baseline"])


def test_clip_is_told_the_names_of_the_classes(asked, tmp_path, monkeypatch):
    """CLIP's logits take the place of the run's; here they know every class by its number."""
    assert main(asked("baseline")) == 0
    told = []

    def logits(images_NHWC, names):
        told.append((images_NHWC.shape, tuple(names)))
        return np.random.default_rng(0).normal(size=(len(images_NHWC), len(names))).astype(np.float32)

    monkeypatch.setattr(strangers, "zero_shot_logits", logits)
    assert main([*asked("zero_shot"), "--preset", "baseline"]) == 0
    assert [shape[0] for shape, _ in told][1] == 12 and told[0][0][1:] == (64, 64, 3)
    assert len(told[0][1]) == 2 and told[0][1] == told[1][1]
    assert (tmp_path / "results" / "Baseline" / "zero_shot" / "unknown.json").exists()


def test_without_open_clip_the_message_says_what_to_install(asked, monkeypatch, capsys):
    assert main(asked("baseline")) == 0
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install open_clip_torch" in refused(capsys, [*asked("zero_shot"), "--preset", "baseline"])
