"""A user's own folder: one command trains, evaluates and answers new photographs; bad files are named."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from conftest import encode, noise, write_pets
from tiny import arguments, small

from src import SetupError
from src.commands import main
from src.config import DataConfig
from src.data.sources import OWN_SIZE, open_source, stored_size_of
from src.data.store import decode, load_store
from src.experiment import configure
from src.files import read_json
from src.studies import ABLATION
from src.studies.run import Plan

BROKEN = "dog/torn.jpg"


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Two classes of 11: JPEGs, PNGs and grey ones of several sizes, and one JPEG that is cut short."""
    kinds = (("JPEG", "jpg", "RGB"), ("PNG", "png", "RGB"), ("JPEG", "JPG", "L"), ("PNG", "png", "RGBA"))
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "my photos" / name).mkdir(parents=True)
        for i in range(11):
            kind, suffix, mode = kinds[i % 4]
            image = noise(1000 * number + i, (90 + 10 * i, 120), mode)
            (tmp_path / "my photos" / name / f"{i}.{suffix}").write_bytes(encode(image, kind))
    torn = encode(noise(9, (100, 100)), "JPEG")
    (tmp_path / "my photos" / BROKEN).write_bytes(torn[: len(torn) // 2])
    return tmp_path / "my photos"


@pytest.fixture
def new(tmp_path) -> Path:
    """Three images without a class, one of them below a folder, and one that is none."""
    (tmp_path / "new" / "more").mkdir(parents=True)
    for name, mode in (("a.jpg", "RGB"), ("b.png", "L"), ("more/c.png", "RGBA")):
        image = noise(len(name), (130, 80), mode)
        (tmp_path / "new" / name).write_bytes(encode(image, "JPEG" if name == "a.jpg" else "PNG"))
    return tmp_path / "new"


def command(folder: Path, data: Path, weights: Path, *more: str) -> list[str]:
    overrides = small(weights, train__epochs=1, data__holdout_per_class=2)
    return [*arguments(folder, "improvement", data, overrides), *more]


def test_one_command_trains_evaluates_and_answers(photographs, new, weights, tmp_path, capsys):
    answers = tmp_path / "out" / "answers.csv"
    given = command(tmp_path, photographs, weights, "--images", str(new), "--out", str(answers))
    assert main(given) == 2
    said = capsys.readouterr().err
    assert BROKEN in said and "1 image(s)" in said and not answers.exists()

    assert main([*given, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    metrics = read_json(tmp_path / "results" / "Improvement" / "metrics.json")
    # A fifth of 11 is set aside, and 2 of a class are held out.
    assert (metrics["n"], metrics["n_holdout"], metrics["n_fit"]) == (4, 4, 14)
    assert (metrics["n_unreadable"], metrics["stored_size"]) == (1, OWN_SIZE)
    assert f"{metrics['accuracy']:.2%}" in said and "3 images answered" in said
    with open(answers, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a.jpg", "b.png", "more/c.png"]
    assert {row["prediction"] for row in rows} <= {"cat", "dog"}

    stores = [path for path in (tmp_path / "cache" / "stores").iterdir() if path.is_dir()]
    store = next(store for path in stores if len(store := load_store(path)) == 22)
    assert [bad["image_id"] for bad in store.manifest["bad_files"]] == [BROKEN]
    for row in range(0, 22, 5):
        pixels_HWC = decode((photographs / store.image_ids_N[row]).read_bytes(), OWN_SIZE)
        assert (store.images[row] == pixels_HWC.transpose(2, 0, 1)).all()

    (new / "d.png").write_bytes(encode(noise(4, (80, 80))))  # the run is finished: it answers alone
    assert main([*given, "--skip-bad"]) == 0
    assert "4 images answered" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["no folder", "no images", "out is a folder"])
def test_what_cannot_be_answered_is_said_before_training(wrong, photographs, new, weights, tmp_path, capsys):
    (photographs / BROKEN).unlink()
    (tmp_path / "empty").mkdir()
    images = {"no folder": tmp_path / "none", "no images": tmp_path / "empty"}.get(wrong, new)
    out = tmp_path if wrong == "out is a folder" else tmp_path / "answers.csv"
    assert main(command(tmp_path, photographs, weights, "--images", str(images), "--out", str(out))) == 2
    said = capsys.readouterr().err
    assert ("--out" if wrong == "out is a folder" else "--images") in said
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_a_place_for_answers_without_images_is_refused(pets, weights, tmp_path, capsys):
    assert main(command(tmp_path, pets, weights, "--out", "somewhere.csv")) == 2
    said = capsys.readouterr().err
    assert "--images FOLDER" in said and not (tmp_path / "runs").exists()


def test_too_few_images_of_a_class_name_the_option(photographs, weights, tmp_path, capsys):
    (photographs / BROKEN).unlink()
    few = small(weights)
    del few["data.holdout_per_class"]
    assert main(arguments(tmp_path, "improvement", photographs, few)) == 2
    said = capsys.readouterr().err
    assert "class cat" in said and "--set data.holdout_per_class=N` (now 25)" in said


# ------------------------------------------------------------------------------------------- stored size


def size_of(folder: Path, arm: str = "improvement", **overrides: object) -> int:
    changes = {name.replace("__", "."): value for name, value in overrides.items()}
    return configure(arm, "offline", str(folder), changes).data.stored_size


def test_photographs_are_stored_larger_than_tiny_imagenet(photographs, tmp_path):
    assert size_of(photographs) == size_of(photographs, "baseline") == OWN_SIZE == 256
    assert size_of(photographs, data__stored_size=64) == 64
    assert size_of(photographs, data__stored_size="128") == 128
    row = ABLATION.rows[0]
    assert Plan(ABLATION, "offline", str(photographs)).config(row, 0).data.stored_size == OWN_SIZE
    moved = tmp_path / "split" / "train"  # the other layout of class folders
    moved.parent.mkdir()
    photographs.rename(moved)
    assert size_of(moved.parent) == OWN_SIZE


def test_small_images_and_other_data_keep_the_size(miniature, mini_counts, tmp_path, monkeypatch):
    monkeypatch.delenv("TINY_IMAGENET_DIR", raising=False)
    for layout in ("folder", "parquet"):
        assert size_of(getattr(miniature, layout)(tmp_path / layout)) == 64
    assert size_of(miniature.zip(tmp_path / "tiny.zip")) == 64
    assert size_of(write_pets(tmp_path / "pets")) == 64  # 40 x 40
    assert size_of(tmp_path / "nothing") == size_of("") == 64  # which opening it says
    assert configure("improvement", "full").data == DataConfig()


def test_a_study_s_own_data_keep_its_size(tmp_path):
    data = tmp_path / "cache"
    open_source(DataConfig(source="mini_birds"), data)
    birds = data / "miniatures" / "mini_birds"
    assert stored_size_of(birds, 32) == 32  # larger images, but not a user's own
    assert size_of(birds, "fine_grained") == 64
    assert configure("fine_grained", "full", str(birds)).data.stored_size == 256


def test_the_size_is_that_of_most_and_damaged_ones_have_none(photographs, tmp_path):
    for number in range(9):
        name = photographs / "cat" / f"-{number}.png"  # first by name
        name.write_bytes(encode(noise(number, (30, 30))))
        assert stored_size_of(photographs, 64) == (OWN_SIZE if number < 3 else 64)
    for path in (photographs / "dog").iterdir():
        path.write_bytes(b"no image")
    assert stored_size_of(photographs, 64) == 64
    for path in (photographs / "cat").iterdir():
        path.write_bytes(b"no image")
    assert stored_size_of(photographs, 64) == 64


def test_a_folder_that_cannot_be_opened_is_left_to_who_opens_it(tmp_path):
    (tmp_path / "odd").write_text("no folder")
    assert stored_size_of(tmp_path / "odd", 64) == 64
    with pytest.raises(SetupError):
        open_source(DataConfig(source="local", path=str(tmp_path / "odd")), tmp_path)
