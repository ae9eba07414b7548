"""Answers for images without labels: those of the arm, whatever the files are and however they are called."""

from __future__ import annotations

import csv
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import encode, noise, write_pets
from PIL import Image
from safetensors.torch import load_file
from scipy.special import softmax
from test_experiment import arguments, own, paths, refused, small

from src import SetupError, after, answers, experiment
from src.answers import UnlabelledFolder, answer_table, write_answers, write_submission
from src.commands import main
from src.data.store import decode
from src.experiment import run
from src.files import read_json

CLASSES = ("cat", "dog")
# Overrides of each run: cached features; the weights alone; everything that comes after training, kept.
KINDS = {
    "baseline": {},
    "improvement": {},
    "best": {
        "model__head_init": "random",
        "model__test_size": 96,
        "train__start_size": 0,
        "data__stored_size": 48,
        "after__tta": "flip",
        "after__temperature": True,
        "after__soup_epochs": 2,
        "after__wise_ft": True,
    },
}


@dataclass
class Finished:
    """A finished run: what it was asked for, where it lies, the photographs it was trained on."""

    arm: str
    overrides: dict
    folder: Path
    data: Path

    def predict(self, out: Path, *more: str, overrides: dict | None = None) -> list[str]:
        """The command's arguments."""
        command = arguments(self.folder, "predict", self.data, {**self.overrides, **(overrides or {})})
        return [*command, "--preset", self.arm, "--out", str(out), *more]

    @property
    def config(self):
        return experiment.configure(self.arm, "offline", str(self.data), self.overrides)


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """arm -> `Finished`, each on photographs with a folder of unlabelled ones."""
    made = {}

    def get(arm: str) -> Finished:
        if arm not in made:
            folder = tmp_path_factory.mktemp(arm)
            data = write_pets(folder / "pets")
            (data / "test").mkdir()
            for i in range(5):
                (data / "test" / f"{i}.png").write_bytes(encode(noise(5000 + i, (40, 40))))
            overrides = small(weights, optim__lr=1e-3, **KINDS[arm])
            better = itertools.count()
            with pytest.MonkeyPatch.context() as patch:
                if arm == "best":  # each step gains
                    patch.setattr(
                        after,
                        "loss_and_accuracy",
                        lambda *_: {"loss": -(n := next(better)), "accuracy": float(n)},
                    )
                    patch.setattr(after, "best_temperature", lambda *_: 0.5)
                run(own(data, weights, arm, optim__lr=1e-3, **KINDS[arm]), paths(folder))
            made[arm] = Finished(arm, overrides, folder, data)
        return made[arm]

    return get


@pytest.fixture
def photographs(tmp_path) -> Path:
    """A small folder of images below folders."""
    for number, name in enumerate(("a.png", "sub/a.png", "sub/deeper/b.png")):
        (tmp_path / "photographs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photographs" / name).write_bytes(encode(noise(7000 + number, (40, 40))))
    return tmp_path / "photographs"


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------- the arm's own answers


@pytest.mark.parametrize("arm", KINDS)
def test_copies_of_valid_get_the_answers_of_valid(finished, tmp_path, arm, monkeypatch):
    """Class and confidence, with all that came after training; nothing is trained."""
    one = finished(arm)
    shutil.copytree(one.data / "valid", tmp_path / "copies" / "valid")
    monkeypatch.setattr(experiment, "_train_and_predict", None)
    assert main(one.predict(tmp_path / "answers.csv", "--images", str(tmp_path / "copies"))) == 0
    said = {row["image"]: row for row in read(tmp_path / "answers.csv")}
    results = one.folder / "results" / arm.capitalize()
    table = pd.read_csv(results / f"{arm}_validation_predictions.csv")
    assert len(table) == len(said) == 8
    for row in table.itertuples():
        answer = said[row.Image_Id]
        assert (answer["prediction"], answer["name"]) == (row.Prediction_Wnid, row.Prediction_Name)
        assert float(answer["confidence"]) == pytest.approx(row.Confidence, abs=3e-6)
    facts = read_json(next((one.folder / "runs").iterdir()) / "facts.json")
    kept = [step["step"] for step in facts["after"] if step["kept"]]
    assert (facts["temperature"] != 1) == ("flip" in kept) == (arm == "best")


def test_every_kind_of_file_is_decoded_as_training_images_are(finished, weights, tmp_path):
    one, folder = finished("improvement"), tmp_path / "kinds"
    folder.mkdir()
    picture = noise(1, (90, 50))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    holes = picture.convert("RGBA")
    holes.putalpha(noise(2, (90, 50), "L"))
    files = {
        "plain.jpeg": encode(picture, "JPEG"),
        "turned.JPG": encode(picture, "JPEG", exif=exif),
        "grey.png": encode(noise(3, (20, 300), "L")),
        "deep.png": encode(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16)),
        "transparent.png": encode(holes),
        "palette.gif": encode(picture.convert("P"), "GIF"),
        "one.png": encode(noise(4, (1, 1))),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    write_answers(one.config, paths(one.folder), str(folder), tmp_path / "answers.csv")
    built = tiny.build(tmp_path, CLASSES, head="attention", weights=str(weights))
    built.model.load_state_dict(load_file(next(one.folder.glob("runs/*/model.safetensors"))))
    pixels = np.stack([decode(files[name], 64).transpose(2, 0, 1) for name in sorted(files)])
    with torch.no_grad():
        expected_NK = built.model.eval()(built.preprocess(torch.from_numpy(pixels))).softmax(1).numpy()
    rows = read(tmp_path / "answers.csv")
    assert [row["image"] for row in rows] == sorted(files)
    assert [row["prediction"] for row in rows] == [CLASSES[k] for k in expected_NK.argmax(1)]
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], expected_NK.max(1), atol=1e-5)
    np.testing.assert_allclose([float(r["second_confidence"]) for r in rows], expected_NK.min(1), atol=1e-5)
    assert all(row["second"] != row["prediction"] and row["third"] == "" for row in rows)


def test_a_large_folder_is_answered_in_parts(finished, tmp_path, monkeypatch):
    one = finished("baseline")
    shutil.copytree(one.data / "train", tmp_path / "many")
    whole, parts = tmp_path / "whole.csv", tmp_path / "parts.csv"
    write_answers(one.config, paths(one.folder), str(tmp_path / "many"), whole)
    sizes, original = [], answers.logits_of

    def counted(setup, store, rows_M):
        sizes.append(len(rows_M))
        return original(setup, store, rows_M)

    monkeypatch.setattr(answers, "AT_ONCE", 7)
    monkeypatch.setattr(answers, "logits_of", counted)
    write_answers(one.config, paths(one.folder), str(tmp_path / "many"), parts)
    assert sum(sizes) == 24 and max(sizes) <= 7
    pd.testing.assert_frame_equal(pd.read_csv(whole), pd.read_csv(parts), atol=2e-6)


# ---------------------------------------------------------------------------- the data set's test images


def test_the_data_sets_test_images_become_a_submission(finished, tmp_path, capsys):
    one = finished("improvement")
    assert main(one.predict(tmp_path / "answers.csv")) == 0
    said = capsys.readouterr().out
    assert "5 images answered by improvement-offline-holdout-seed0" in said and "submission.csv" in said
    rows, submitted = read(tmp_path / "answers.csv"), read(tmp_path / "submission.csv")
    assert [row["image"] for row in rows] == [f"test/{i}.png" for i in range(5)]
    assert [list(row.values()) for row in submitted] == [
        [Path(row["image"]).name, row["prediction"]] for row in rows
    ]
    assert list(submitted[0]) == ["image_id", "class"]
    again = tmp_path / "again.csv"
    write_answers(one.config, paths(one.folder), str(one.data / "test"), again)
    assert [row["confidence"] for row in read(again)] == [row["confidence"] for row in rows]


def test_data_without_test_images_says_so(finished, pets, weights, tmp_path, capsys):
    run(own(pets, weights, "baseline"), paths(tmp_path))
    command = arguments(tmp_path, "predict", pets, small(weights))
    message = refused(capsys, [*command, "--preset", "baseline", "--out", str(tmp_path / "answers.csv")])
    assert "pets has no test images" in message and "--images" in message
    assert not (tmp_path / "answers.csv").exists()


def test_a_submission_answers_every_image_once(tmp_path):
    path = tmp_path / "submission.csv"
    write_submission(path, ["test/b.jpg", "test/a.jpg", "test/c"], ["dog", "grizzly+bear", "a, b"])
    assert read(path) == [
        {"image_id": "a.jpg", "class": "grizzly+bear"},
        {"image_id": "b.jpg", "class": "dog"},
        {"image_id": "c", "class": "a, b"},
    ]
    before = path.read_bytes()
    for ids, classes, said in (
        (["a", "b"], ["cat"], "2 images have 1 answers"),
        (["x/a.jpg", "b.jpg", "y/a.jpg"], ["cat", "cat", "dog"], "'a.jpg'"),
        (["test/a.jpg", "test/b.jpg"], ["cat", ""], "1 test images have no answer, first 'b.jpg'"),
    ):
        with pytest.raises(SetupError, match=said):
            write_submission(path, ids, classes)
    assert path.read_bytes() == before


def test_a_test_image_that_cannot_be_read_leaves_no_submission(finished, weights, tmp_path, capsys):
    """The run left it out as well: it has an empty answer, and a submission needs one."""
    data = write_pets(tmp_path / "pets")
    (data / "test").mkdir()
    for name, content in (("good.png", encode(noise(1, (40, 40)))), ("bad.png", b"no image")):
        (data / "test" / name).write_bytes(content)
    overrides = small(weights, data__skip_bad=True)
    run(own(data, weights, "baseline", data__skip_bad=True), paths(tmp_path))
    command = arguments(tmp_path, "predict", data, overrides)
    message = refused(capsys, [*command, "--preset", "baseline", "--out", str(tmp_path / "answers.csv")])
    assert "1 test images have no answer, first 'bad.png'" in message
    assert [(row["image"], row["prediction"] != "") for row in read(tmp_path / "answers.csv")] == [
        ("test/bad.png", False),
        ("test/good.png", True),
    ]
    assert not (tmp_path / "submission.csv").exists()


# ------------------------------------------------------------------------------------ folders of images


def test_folders_are_searched_whole(finished, photographs, tmp_path):
    for name in (".hidden.png", ".folder/x.png", "__MACOSX/x.png", "notes.txt", "sub/.DS_Store", "no_suffix"):
        (photographs / name).parent.mkdir(exist_ok=True)
        (photographs / name).write_bytes(b"not read")
    deep = photographs / "/".join("123456789")
    deep.mkdir(parents=True)
    shutil.copy(photographs / "a.png", deep / 'ein Bär, sagte er: "=1+1".PNG')
    found = UnlabelledFolder(photographs).examples()
    assert [example.image_id for example in found] == [
        '1/2/3/4/5/6/7/8/9/ein Bär, sagte er: "=1+1".PNG', "a.png", "sub/a.png", "sub/deeper/b.png"
    ]  # fmt: skip
    assert {(example.label, example.split) for example in found} == {(-1, "test")}
    one = finished("baseline")
    write_answers(one.config, paths(one.folder), str(photographs), tmp_path / "answers.csv")
    rows = read(tmp_path / "answers.csv")
    assert [row["image"] for row in rows] == [example.image_id for example in found]
    assert rows[0]["confidence"] == rows[1]["confidence"] != rows[2]["confidence"]  # the first is a copy


def test_a_file_that_changes_is_read_again(finished, photographs, tmp_path):
    one, out = finished("baseline"), tmp_path / "answers.csv"
    said = []
    for seed in (1, 2):
        (photographs / "a.png").write_bytes(encode(noise(seed, (40, 40))))
        write_answers(one.config, paths(one.folder), str(photographs), out)
        said.append([row["confidence"] for row in read(out)])
    assert said[0][0] != said[1][0] and said[0][1:] == said[1][1:]


def test_an_unreadable_image_stops_or_is_left_out(finished, photographs, tmp_path, capsys):
    """The run itself was trained without `skip_bad`."""
    one, out = finished("improvement"), tmp_path / "answers.csv"
    (photographs / "sub" / "torn.png").write_bytes((photographs / "a.png").read_bytes()[:99])
    (photographs / "sub" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    message = refused(capsys, one.predict(out, "--images", str(photographs)))
    assert "sub/torn.png: " in message and "sub/gone.jpg: FileNotFoundError" in message
    assert "data.skip_bad=true" in message and not out.exists()
    command = one.predict(out, "--images", str(photographs), overrides={"data.skip_bad": "true"})
    assert main(command) == 0
    said = capsys.readouterr().out.splitlines()[-3:]
    assert said[0].startswith("3 images answered by improvement-offline")
    assert said[1].startswith("left out: sub/gone.jpg: FileNotFoundError")
    assert said[2].startswith("left out: sub/torn.png: ")
    rows = {row["image"]: row for row in read(out)}
    assert len(rows) == 5
    for name, row in rows.items():
        empty = [value == "" for key, value in row.items() if key not in ("image", *list(row)[-3:])]
        assert all(empty) if name in ("sub/torn.png", "sub/gone.jpg") else not any(empty)


def test_what_cannot_be_answered_is_said(finished, photographs, pets, weights, tmp_path, capsys):
    one, out = finished("baseline"), tmp_path / "answers.csv"
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    (tmp_path / "empty" / "readme.txt").touch()
    before = set(tmp_path.rglob("*"))
    for images, said in (
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "nowhere", "is not a folder"),
        (photographs / "a.png", "is not a folder"),
    ):
        message = refused(capsys, one.predict(out, "--images", str(images)))
        assert str(images) in message and said in message and "--images" in message
    message = refused(capsys, [*one.predict(out, "--images", str(photographs)), "--seed", "3"])
    assert "holds no finished run" in message and "--seed 3" in message
    for place in (tmp_path, tmp_path / "submission.csv"):
        assert f"--out {place}" in refused(capsys, one.predict(place))
    assert set(tmp_path.rglob("*")) == before


def test_folders_and_names_that_cannot_be_listed(photographs, monkeypatch):
    (photographs / "sub" / "na\udcefve.png").write_bytes(b"")
    with pytest.raises(SetupError, match=r"na\\udcefve.*UTF-8"):
        UnlabelledFolder(photographs)

    def locked(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/sub"))
        return iter(())

    monkeypatch.setattr(answers.os, "walk", locked)
    with pytest.raises(SetupError, match=r"photographs/sub cannot be listed \(Permission denied\)"):
        UnlabelledFolder(photographs)


# ------------------------------------------------------------------------------------------------ tables


def test_the_three_likeliest_classes():
    rng = np.random.default_rng(0)
    logits_NK = rng.normal(size=(50, 7)).round(1).astype(np.float32)  # with ties
    ids, wnids, names = [f"{i}.png" for i in range(50)], list("ABCDEFG"), list("abcdefg")
    table = answer_table(ids, logits_NK, wnids, names)
    assert table["image"].tolist() == ids
    for row, logits_K in zip(table.itertuples(), logits_NK.astype(float), strict=True):
        order = sorted(range(7), key=lambda k: (-logits_K[k], k))[:3]
        assert [row.prediction, row.second, row.third] == [wnids[k] for k in order]
        assert [row.name, row.second_name, row.third_name] == [names[k] for k in order]
        said = [row.confidence, row.second_confidence, row.third_confidence]
        assert said == softmax(logits_K)[order].round(6).tolist()
    assert answer_table(["x"], np.zeros((1, 2)), CLASSES, CLASSES)["third"].tolist() == [""]


def test_logits_that_are_not_finite_are_refused():
    logits_NK = np.zeros((4, 3))
    logits_NK[2, 1] = np.nan
    with pytest.raises(SetupError, match="1 of 4 images, first 'c'"):
        answer_table(list("abcd"), logits_NK, list("ABC"), list("abc"))
