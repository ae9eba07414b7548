"""Pretraining from random weights, the file that it ships, and the classes of a study of transfer."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import MINI_WNIDS
from safetensors.torch import load_file
from test_experiment import arguments, own, paths, small

from src import SetupError, embedded
from src.commands import main
from src.config import ModelConfig, with_fields
from src.experiment import configure, frozen_features, open_data, prepare, run
from src.files import sha256
from src.model import build
from src.model.build import build_model
from src.studies import transfer
from tools import check

ARCHITECTURE = tiny.CONVNEXT.split(".")[0]
SHIPPED = f"{ARCHITECTURE}.tinyimagenet{tiny.SIZE}"


def untrained(seed: int, **fields):
    config = ModelConfig(backbone=ARCHITECTURE, weights="random", image_size=tiny.SIZE, **fields)
    return build_model(config, ("a", "b"), seed)


def test_random_weights_follow_from_the_seed():
    first, again, other = (untrained(seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.stem.0.weight"], other["backbone.stem.0.weight"])
    assert untrained(0).weights_sha256 == ""


@pytest.mark.parametrize("name", ["no_such_net", tiny.CONVNEXT])
def test_random_weights_are_of_an_architecture_without_a_tag(name):
    with pytest.raises(SetupError, match="architecture"):
        build_model(ModelConfig(backbone=name, weights="random", image_size=tiny.SIZE), ("a", "b"), 0)


def test_random_weights_have_no_classifier_to_start_from():
    with pytest.raises(SetupError, match="pretrained_rows"):
        untrained(0, head_init="pretrained_rows")


@pytest.fixture(scope="module")
def shipped(miniature, tmp_path_factory):
    """A pretraining on the miniature Tiny-ImageNet, its weights exported -> (result, weights, SHA-256)."""
    folder = tmp_path_factory.mktemp("pretrain")
    data = miniature.folder(folder / "tiny-imagenet-200")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.data.sources.TINY_COUNTS", tiny_counts())
        changes = small("", model__backbone=ARCHITECTURE, model__weights="random", optim__lr=1e-3)
        result = run(configure("pretrain", "offline", str(data), changes), paths(folder))
    path, digest = embedded.export(result, folder / "weights")
    return result, path, digest


def tiny_counts():
    from conftest import MINI_COUNTS

    return MINI_COUNTS


@pytest.fixture
def known(shipped, monkeypatch):
    _, path, digest = shipped
    monkeypatch.setattr(build, "WEIGHTS_FOLDER", path.parent)
    monkeypatch.setattr(build, "EMBEDDED_WEIGHTS", {SHIPPED: (path.name, digest)})


def embedded_model(wnids: tuple[str, ...], **fields):
    config = ModelConfig(backbone=SHIPPED, weights="embedded", image_size=tiny.SIZE, **fields)
    return build_model(config, wnids, 0)


def test_the_file_is_timms_in_half_precision(shipped):
    result, path, digest = shipped
    state = load_file(path)
    assert path.name == f"{ARCHITECTURE}_tinyimagenet{tiny.SIZE}.safetensors" and sha256(path) == digest
    assert set(state) == set(build.timm.create_model(ARCHITECTURE, num_classes=6).state_dict())
    assert all(tensor.dtype == torch.float16 for tensor in state.values())
    again, same = embedded.export(result, path.parent)
    assert (again, same) == (path, digest)


def test_the_embedded_weights_with_their_rows_answer_like_the_pretraining(shipped, known):
    result, _, digest = shipped
    built = embedded_model(result.setup.store.wnids, head_init="pretrained_rows")
    assert (built.weights_tag, built.weights_sha256) == (SHIPPED, digest)
    images = result.setup.built.preprocess(torch.from_numpy(np.array(result.setup.store.images[:16])))
    with torch.no_grad():
        ours, theirs = built.model.eval()(images), result.setup.model.eval()(images)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-2)
    assert theirs.std(0).mean() > 10 * (ours - theirs).abs().mean()


def test_rows_go_by_their_class_not_by_their_place(shipped, known):
    wnids = shipped[0].setup.store.wnids
    forward = embedded_model(wnids, head_init="pretrained_rows").model.classifier.weight
    some = embedded_model(wnids[4:1:-1], head_init="pretrained_rows").model.classifier.weight
    assert torch.equal(some, forward[[4, 3, 2]])
    with pytest.raises(SetupError, match="n00000000"):
        embedded_model((*wnids[:2], "n00000000"), head_init="pretrained_rows")


def test_other_bytes_than_those_shipped_are_refused(shipped, known, tmp_path, monkeypatch):
    _, path, _ = shipped
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    (tmp_path / path.name).write_bytes(data)
    monkeypatch.setattr(build, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(SetupError, match="SHA-256 is .*git checkout"):
        embedded_model(("a", "b"))
    monkeypatch.setattr(build, "EMBEDDED_WEIGHTS", {})
    with pytest.raises(SetupError, match="embedded"):
        embedded_model(("a", "b"))


@pytest.mark.parametrize("changes", [{"weights": "hub"}, {"head": "attention"}, {"scra": True}])
def test_what_is_no_pretraining_is_not_exported(shipped, tmp_path, changes):
    """A head with more than a classifier would be lost, and the card would not be true."""
    result, _, _ = shipped
    config = replace(result.setup.config, model=replace(result.setup.config.model, **changes))
    with pytest.raises(SetupError, match="no pretraining"):
        embedded.export(replace(result, setup=replace(result.setup, config=config)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_random_backbones_of_two_seeds_share_no_features(pets, tmp_path):
    changes = {"model__backbone": ARCHITECTURE, "model__weights": "random"}
    first, other = (
        frozen_features(prepare(own(pets, "", "baseline", **changes, train__seed=seed), paths(tmp_path)))[0]
        for seed in (0, 1)
    )
    assert first.shape == other.shape and not np.allclose(first, other)


def test_the_card_says_the_numbers_of_the_metrics(shipped):
    result, path, digest = shipped
    card, metrics = (path.parent / "README.md").read_text(), result.metrics
    written = json.loads((result.folder / "metrics.json").read_text())
    assert f"{written['accuracy']:.2%} of `valid`" in card and digest in card
    assert f"{written['holdout_accuracy']:.2%} of `holdout`" in card
    assert written["holdout_accuracy"] == pytest.approx(max(result.history["holdout_accuracy"]))
    assert f"{metrics['n_fit']:,} training images" in card and f"`{metrics['git_commit']}`" in card


def test_the_cards_command_gives_the_configuration_that_ran(shipped):
    result, path, _ = shipped
    [line] = [line for line in (path.parent / "README.md").read_text().splitlines() if "Made by" in line]
    command = line.split("`")[1].split()
    assert "--profile" in command and "train.epochs=2" in command and "train.seed=0" not in command
    sets = {name: value for name, _, value in (word.partition("=") for word in command) if "." in name}
    del sets["src.experiment"]
    ran = result.setup.config
    assert configure("pretrain", "offline", ran.data.path, sets) == ran


def test_make_check_holds_weights_and_card_against_code_and_metrics(shipped, tmp_path, monkeypatch):
    result, path, digest = shipped
    monkeypatch.setattr(check, "EMBEDDED_WEIGHTS", {SHIPPED: (path.name, digest)})
    shutil.copytree(path.parent, tmp_path / "weights")
    shutil.copytree(result.folder, tmp_path / "results" / "Pretrain")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    assert check.weights(tmp_path) == []
    metrics, card = tmp_path / "results" / "Pretrain" / "metrics.json", tmp_path / "weights" / "README.md"
    for file, old, new in (
        (metrics, f'"n_fit": {result.metrics["n_fit"]}', '"n_fit": 12345'),
        (card, f"{result.metrics['accuracy']:.2%} of", "99.99% of"),
    ):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        [failure] = check.weights(tmp_path)
        assert failure.startswith("weights/README.md: is not of")
        file.write_text(text)
    monkeypatch.setattr(check, "EMBEDDED_WEIGHTS", {})
    assert "the code knows none" in check.weights(tmp_path)[0]


def test_source_and_target_share_no_class_and_keep_every_image(miniature, mini_counts, tmp_path):
    data = miniature.folder(tmp_path / "tiny-imagenet-200")
    config = configure("baseline", "offline", str(data), {"data.holdout_per_class": 3})
    whole = open_data(config, paths(tmp_path))
    parts = {
        name: open_data(with_fields(config, {"data.classes": name}), paths(tmp_path))
        for name in ("source", "target")
    }
    assert parts["target"].wnids == (sorted(MINI_WNIDS)[4],)
    assert set(parts["source"].wnids) | set(parts["target"].wnids) == set(whole.wnids)
    for part in parts.values():
        kept = part.labels_N >= 0
        ids = np.array(part.wnids)[part.labels_N[kept]]
        assert (ids == np.array(whole.wnids)[whole.labels_N[kept]]).all()
        assert (part.official_split_N[~kept] == "").all() and len(part) == len(whole)
    assert sum((part.labels_N >= 0).sum() for part in parts.values()) == len(whole)
    setup = prepare(
        configure("baseline", "offline", str(data), small(tiny_weights(tmp_path), data__classes="source")),
        paths(tmp_path),
    )
    used = np.concatenate([setup.splits.fit_N, setup.splits.holdout_N, setup.splits.valid_N])
    assert len(used) == 5 * 16 and (setup.store.labels_N[used] >= 0).all()


def tiny_weights(folder):
    return tiny.write_weights(folder / "weights.safetensors")


def test_transfer_runs_both_arms_on_the_target_classes(miniature, mini_counts, tmp_path, monkeypatch, capsys):
    """Three classes of six each; a second call runs nothing and says the same."""
    monkeypatch.setattr("src.data.subsets.TARGET_EVERY", 2)
    monkeypatch.setattr(transfer, "EPOCHS", {2: 2, 0: 1})
    shared = {"offline": transfer.SHARED | {"model.image_size": tiny.SIZE, "optim.head_lr": 0.01}}
    study = replace(transfer.TRANSFER, rows=transfer.rows(), budgets=shared)
    monkeypatch.setattr(transfer, "TRANSFER", study)
    sized = {"model.backbone": ARCHITECTURE, "model.image_size": tiny.SIZE, "train.epochs": 1}
    original = transfer.configure
    monkeypatch.setattr(transfer, "configure", lambda *args: with_fields(original(*args), sized))
    data = miniature.folder(tmp_path / "tiny-imagenet-200")
    where = arguments(tmp_path, "transfer40", data, {"data.holdout_per_class": 3})
    assert main([*where, "--seeds", "0,1"]) == 0
    folder = tmp_path / "results" / "studies" / "transfer40"
    table = pd.read_csv(folder / "transfer40.csv")
    assert [(line.row, line.n_fit, line.seed) for line in table.itertuples()] == [
        (f"{arm}, {images} images a class", n, seed)
        for images, n in ((2, 6), ("all", 27))
        for arm in ("frozen", "fine-tuned")
        for seed in (0, 1)
    ]
    assert set(table["backbone"]) == {SHIPPED}
    said = capsys.readouterr().out
    summary = pd.read_csv(folder / "summary.csv").set_index("row")
    means = table.groupby("row")["valid_accuracy"].mean()
    tuned, frozen = "fine-tuned, all images a class", "frozen, all images a class"
    assert summary.loc[tuned, "difference"] == pytest.approx(means[tuned] - means[frozen])
    assert f"| {frozen} | {100 * means[frozen]:.2f}" in said and (folder / "transfer40.png").exists()
    (tmp_path / "runs").rename(tmp_path / "moved")
    monkeypatch.setattr("src.studies.run.run_row", None)
    assert main([*where, "--seeds", "0,1", "--runs", str(tmp_path / "moved")]) == 0
    again = capsys.readouterr().out
    assert again[again.index("# Transfer") :] == said[said.index("# Transfer") :]
