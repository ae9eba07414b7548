"""Test images of classes that training did not have, from a finished run to what is said of them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import tiny
import torch
from conftest import MINI_WNIDS
from matplotlib.figure import Figure
from test_experiment import arguments, paths, refused, small

from src import attributions, audit, figures, notebook, strangers
from src.audit import UNTOUCHED
from src.commands import main
from src.config import with_fields
from src.data import subsets
from src.experiment import configure, finished_run, prepare, run
from src.strangers import in_words
from src.studies import ANIMALS as ANIMALS40
from src.studies import STUDIES
from tools import readme

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
    assert set(told[0][1]) == {"goldfish", "golden retriever", "Egyptian cat"} and told[0][1] == told[1][1]
    folder = tmp_path / "results" / "Baseline"
    unknown, found = (
        json.loads((folder / "zero_shot" / f"{name}.json").read_text()) for name in ("unknown", "zero_shot")
    )
    assert unknown["fall"]["known"]["n"] == found["clip"]["known"]["n"] == 8
    assert found["classes"] == {"known": 2, "unknown": 1} and found["clip"]["unknown"]["n"] == 4
    assert main([*asked("strangers"), "--preset", "baseline"]) == 0
    of_run = json.loads((folder / "strangers" / "unknown.json").read_text())
    assert found["network"]["all"] == pytest.approx(of_run["fall"]["test"])
    refusal = of_run["scores"]["maximum softmax"]["refusal"]  # one name is left where it refuses: "unknown"
    assert found["both"]["all"]["n_correct"] == refusal["n_correct"]
    said = strangers.said(folder, "baseline")
    assert in_words(of_run) in said and strangers.zero_shot_in_words(found) in said
    assert "a stand-in of 2 animals" in said and "not run" not in said


def test_right_names_of_clip_of_the_network_and_of_both():
    """Counted image by image: three known classes, two others."""
    rng = np.random.default_rng(0)
    clip_NA, own_NK, own_valid_MK = (rng.normal(0, 2, shape) for shape in ((200, 5), (200, 3), (60, 3)))
    labels_N = rng.integers(0, 5, 200)
    found = strangers.named(clip_NA, own_NK, own_valid_MK, labels_N)
    sure = lambda logits_K: (np.exp(logits_K) / np.exp(logits_K).sum()).max()  # noqa: E731
    threshold = sorted(map(sure, own_valid_MK))[3]  # 57 of 60 score as high
    right = {(answer, of): 0 for answer in ("clip", "network", "both") for of in ("known", "unknown")}
    for clip_A, own_K, label in zip(clip_NA, own_NK, labels_N, strict=True):
        own, other = int(np.argmax(own_K)), 3 + int(np.argmax(clip_A[3:]))
        answers = {"clip": int(np.argmax(clip_A)), "network": own}
        answers["both"] = own if sure(own_K) >= threshold else other
        for answer, said in answers.items():
            right[answer, "known" if label < 3 else "unknown"] += said == label
    for (answer, of), count in right.items():
        assert found[answer][of]["n_correct"] == count
        assert found[answer]["all"]["n"] == 200 and found[answer]["known"]["n"] == (labels_N < 3).sum()
    assert right["network", "unknown"] == 0 < right["both", "unknown"] < right["clip", "unknown"]
    words = strangers.zero_shot_in_words(found)
    assert "names of all 5 classes" in words and f"{found['both']['all']['accuracy']:.2%}" in words


def test_what_is_not_run_says_how_it_would_be(tmp_path):
    said = readme.family(ANIMALS40, tmp_path)
    for command in ("strangers", "zero_shot"):
        assert (
            f"not run: `python -m src.experiment {command} --preset animals40 --profile offline --data DIR`"
            in said
        )
    assert "src.experiment strangers" not in readme.family(STUDIES["dogs20"], tmp_path)


def test_a_study_s_own_analyses_lie_in_its_folder(asked, tmp_path, monkeypatch):
    """One run of the study: its bars, its audit, its maps, its attributions; nothing in the main folders."""
    main_folder = tmp_path / "results"
    folder = main_folder / "studies" / "animals40" / "stand_in"
    drawn, written = [], []
    monkeypatch.setattr(figures, "class_counts", lambda counts_K, *_: drawn.append(counts_K) or Figure())
    monkeypatch.setattr(attributions, "write_attributions", lambda result, where: written.append(where))
    assert main(asked("animals40")) == 0
    for command in ("audit", "explain", "attributions"):
        assert main([*asked(command), "--preset", "animals40"]) == 0
    assert written == [folder / "explain"] and [path.name for path in main_folder.iterdir()] == ["studies"]
    command = asked("animals40")
    overrides = dict(item.split("=", 1) for item in command if "=" in item)
    config = configure("animals40", "offline", command[command.index("--data") + 1], overrides)
    result = run(config, paths(tmp_path))
    setup, numbers = result.setup, json.loads((folder / "explain" / "explain.json").read_text())
    splits, store = setup.splits, setup.store
    used = [len(rows) for rows in (splits.fit_N, splits.holdout_N, splits.valid_N)]
    assert drawn[0].sum() == sum(used)  # not the labelled test images
    assert set(numbers) == {"source_sha256", "share_deleted", "animals40"}
    assert numbers["animals40"]["grad_cam"]["accuracy"] == pytest.approx(result.metrics["accuracy"])
    assert [type(shown).__name__ for shown in notebook.where_it_looks(result)] == ["Image"]
    audited = json.loads((folder / "data" / "audit.json").read_text())
    assert audited["n"] == sum(used) + 12 < len(store) and list(audited["arms"]) == ["animals40"]
    assert audited["balance"]["fit"]["sum"] == used[0]
    model = prepare(with_fields(config, UNTOUCHED), paths(tmp_path)).model.eval()
    with torch.no_grad():
        logits_NK = model(setup.built.preprocess(torch.from_numpy(store.images[splits.valid_N]))).numpy()
    n_right = int((logits_NK.argmax(1) == store.labels_N[splits.valid_N]).sum())
    assert audited["pretraining"]["all"]["valid"]["n_correct"] == n_right
    told = [shown.data for shown in notebook.further(result) if type(shown).__name__ == "Markdown"]
    assert len(told) == 6 and sum("not run: `python -m src.experiment" in text for text in told) == 5
    assert audit.copies_in_words(audited) in told[5]


def test_without_open_clip_the_message_says_what_to_install(asked, monkeypatch, capsys):
    assert main(asked("baseline")) == 0
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install open_clip_torch" in refused(capsys, [*asked("zero_shot"), "--preset", "baseline"])
