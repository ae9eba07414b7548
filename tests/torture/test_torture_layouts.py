"""Folders and tables that contradict themselves are refused before anything is decoded; clutter is harmless.

The faults of the studies' own lists are in tests/test_layouts.py, those of Tiny-ImageNet's in
tests/test_sources.py. They are drawn by seed in this process, without Hypothesis and without caps on memory
and time: a seed repeats a tree, and no tree is larger than a few files.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from conftest import encode, noise
from torture.attempts import tries

from src import SetupError
from src.data import store as store_module
from src.data.sources import Counts, ParquetFolder, TinyImageNetFolder, open_local, trees
from src.data.store import open_store

CLASSES = ("bär", "cat", "dog")
NFC, NFD = (unicodedata.normalize(form, "bär") for form in ("NFC", "NFD"))
ODD = "猫 = +1, \"'\n😀"
PICTURE = encode(noise(1, (16, 16)))
OTHERS = [encode(noise(seed, (16, 16))) for seed in range(2, 8)]


def put(path: Path, data: bytes = PICTURE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tree(root: Path) -> dict[str, tuple[str, str]]:
    """`train/` with 2 and `valid/` with 1 image of each class -> image id -> (class, split)."""
    told = {}
    for split, n in (("train", 2), ("valid", 1)):
        for name in CLASSES:
            for i in range(n):
                put(root / split / name / f"{i}.png", OTHERS[i])
                told[f"{split}/{name}/{i}.png"] = name, split
    return told


def told_by(source) -> dict[str, tuple[str, str]]:
    """Image id -> (class, "" for none; split), of every example; ids must differ."""
    examples = source.examples()
    assert len({example.image_id for example in examples}) == len(examples)
    return {e.image_id: (source.wnids[e.label] if e.label >= 0 else "", e.split) for e in examples}


def link(path: Path, target: Path | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=True)


def listen(path: Path) -> None:
    """A socket; its path may be too long where it lies."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def copied(folder: Path, to: Path) -> None:
    shutil.copytree(folder, to, symlinks=True)


def direct(root: Path) -> None:
    """`<class>/` without splits."""
    for name in CLASSES:
        os.rename(root / "train" / name, root / name)
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "valid")


def renamed(root: Path, old: str, new: str) -> None:
    os.rename(root / old, root / new)


# Fault -> what is done to a tree, and what the refusal says.
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "class in train alone": (lambda p: shutil.rmtree(p / "valid/dog"), "1 classes only in train: dog"),
    "class in valid alone": (lambda p: put(p / "valid/owl/0.png"), "1 classes only in valid: owl"),
    "class under two names": (
        lambda p: renamed(p, "valid/dog", "valid/hound"),
        "1 classes only in train: dog; 1 classes only in valid: hound",
    ),
    "empty class folder": (lambda p: (p / "train/owl").mkdir(), r"without images \(.jpg .*: train/owl"),
    "class folders empty in both": (
        lambda p: [(p / split / "owl").mkdir() for split in ("train", "valid")],
        "class folders without images .*: train/owl, valid/owl",
    ),
    "class folder of notes": (lambda p: put(p / "train/owl/notes.txt"), "without images .*: train/owl"),
    "class folder of hidden files": (lambda p: put(p / "train/owl/.x.png"), "without images .*: train/owl"),
    "class folder of an empty folder": (lambda p: (p / "train/owl/a.png").mkdir(parents=True), "train/owl"),
    "valid is empty": (lambda p: empty(p / "valid"), "no images in class folders of: valid"),
    "valid is flat": (
        lambda p: empty(p / "valid") or put(p / "valid/0.png"),
        "no images in class folders of: valid",
    ),
    "train is empty": (lambda p: empty(p / "train"), "only in valid: bär, cat, dog"),
    "train and valid are empty": (
        lambda p: empty(p / "train") or shutil.rmtree(p / "valid"),
        r"two class folders are needed, found \[\]",
    ),
    "one class": (
        lambda p: shutil.rmtree(p / "valid") or [shutil.rmtree(p / "train" / c) for c in CLASSES[1:]],
        r"two class folders are needed, found \['bär'\]",
    ),
    "train is a file": (lambda p: shutil.rmtree(p / "train") or put(p / "train"), "no layout that is known"),
    "image without a label": (lambda p: put(p / "train/x.png"), "1 images are in no class folder: train/x"),
    "image to validate without a label": (lambda p: put(p / "valid/x.png"), "in no class folder: valid/x"),
    "two folders of validation images": (
        lambda p: copied(p / "valid", p / "val"),
        "several folders of validation images: val, valid",
    ),
    "split in capitals": (lambda p: renamed(p, "valid", "Val"), "look like splits are not read: Val"),
    "valid without train": (
        lambda p: direct(p) or put(p / "valid/0.png"),
        "a folder of validation images, but no train/: valid",
    ),
    "class in a class": (
        lambda p: copied(p / "train/dog", p / "train/cat/dog"),
        "2 images are below the folders of two classes: train/cat/dog/0.png, train/cat/dog/1.png",
    ),
    "loop of links": (lambda p: link(p / "train/cat/loop", p), "are one folder: its images would count"),
    "loop to itself": (lambda p: link(p / "train/cat/loop", "."), "train/cat/loop and .*cat are one folder"),
    "class that is a link to another": (lambda p: link(p / "train/owl", "dog"), "are one folder"),
    "valid is train": (lambda p: shutil.rmtree(p / "valid") or link(p / "valid", "train"), "are one folder"),
    "image without a suffix": (
        lambda p: put(p / "train/cat/photo"),
        "1 files are images, but not by their names: train/cat/photo. Rename or convert",
    ),
    "images of a suffix that is not read": (
        lambda p: [put(p / f"train/cat/{name}") for name in ("a.heic", "b.jfif", "c.data")],
        "3 files are images, but not by their names: train/cat/",
    ),
    "classes that differ in case": (
        lambda p: copied(p / "train/cat", p / "train/Cat"),
        "differ by case, blanks or the encoding of letters alone: 'Cat', 'cat'",
    ),
    "classes that differ in a blank": (lambda p: put(p / "train/cat /0.png"), "alone: 'cat', 'cat '"),
    "classes that differ in Unicode's form": (
        lambda p: put(p / "train" / NFD / "0.png"),
        r"alone: 'ba\\u0308r', 'b\\xe4r'",
    ),
    "splits that differ in Unicode's form": (
        lambda p: renamed(p, f"valid/{NFC}", f"valid/{NFD}"),
        r"alone: 'ba\\u0308r', 'b\\xe4r'",
    ),
    "file name that is not UTF-8": (lambda p: put(p / "train/cat/\udcff.png"), r"udcff.png' is not UTF-8"),
    "class that is not UTF-8": (lambda p: put(p / "train/\udce9/0.png"), r"udce9' is not UTF-8"),
    "pipe": (lambda p: os.mkfifo(p / "train/cat/p.png"), "p.png is neither a file nor a folder"),
    "socket": (lambda p: listen(p / "train/cat/s.png"), "s.png is neither a file nor a folder"),
    "device": (lambda p: link(p / "train/cat/z.png", "/dev/zero"), "z.png is neither a file nor a folder"),
    "direct: image without a label": (
        lambda p: direct(p) or put(p / "x.png"),
        "1 images are in no class folder: x.png",
    ),
    "direct: empty class folder": (lambda p: direct(p) or (p / "owl").mkdir(), "without images .*: owl"),
    "nothing at all": (lambda p: empty(p), "no layout that is known.*Found: an empty directory"),
}


def outside(root: Path, name: str) -> Path:
    return put(root.parent / "outside" / name / "far.png", OTHERS[3])


# Clutter -> what is done to a tree -> what more is told of it.
HARMLESS: dict[str, Callable[[Path], dict[str, tuple[str, str]] | None]] = {
    "notebook's checkpoints": lambda p: [
        put(p / f"{at}.ipynb_checkpoints/x.png") for at in ("", "train/", "train/cat/")
    ] and None,
    "hidden files": lambda p: [
        put(p / f"train/cat/{name}") for name in (".DS_Store", "._0.png", "@eaDir/0.png/SYNOPHOTO.jpg")
    ] and None,
    "what macOS packs": lambda p: put(p / "__MACOSX/train/cat/._0.png") and None,
    "notes": lambda p: [
        put(p / f"train/cat/{name}", b"a note")
        for name in ("Thumbs.db", "desktop.ini", "notes.txt", "boxes.xml", "labels.csv", "LICENSE")
    ] and None,
    "capital suffixes": lambda p: {
        put(p / f"train/cat/{name}").relative_to(p).as_posix(): ("cat", "train")
        for name in ("A.PNG", "b.Png", "C.JPEG", "d.JPG", "e.Tiff")
    },
    "folders in a class": lambda p: {
        put(p / "train/dog" / f"{'deeper/' * depth}{depth}.png").relative_to(p).as_posix(): ("dog", "train")
        for depth in (1, 2, 60)
    },
    "folder named as an image": lambda p: {
        put(p / "train/dog/9.png/8.png").relative_to(p).as_posix(): ("dog", "train")
    },
    "empty folder named as an image": lambda p: (p / "train/dog/7.png").mkdir(),
    "link to an image elsewhere": lambda p: link(p / "train/cat/l.png", outside(p, "a")) or {
        "train/cat/l.png": ("cat", "train")
    },
    "class folders that are links": lambda p: [
        link(p / f"{split}/fox", outside(p, split).parent) for split in ("train", "valid")
    ] and {f"{split}/fox/far.png": ("fox", split) for split in ("train", "valid")},
    "link to itself": lambda p: link(p / "train/cat/self", "self"),
    "long names": lambda p: {
        put(p / split / ("c" * 255) / ("i" * 251 + ".png")).relative_to(p).as_posix(): ("c" * 255, split)
        for split in ("train", "valid")
    },
    "test images": lambda p: put(p / "test/cat/labelled.png") and {
        put(p / "test/t.png").relative_to(p).as_posix(): ("", "test")
    },
    "what is beside the splits": lambda p: put(p / "preview.png") and put(p / "masks/cat/0.png") and None,
    "names of many scripts": lambda p: {
        put(p / split / ODD / "-@\t.png").relative_to(p).as_posix(): (ODD, split)
        for split in ("train", "valid")
    },
}  # fmt: skip


def require_refused(path: Path, message: str, cache: Path, monkeypatch) -> None:
    """By a message that names the folder, and before anything is decoded."""
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "decode", lambda *_: pytest.fail("decoded"))
        with pytest.raises(SetupError) as error:
            open_store(open_local(path), cache, 16)
    assert re.search(message, str(error.value), re.DOTALL), str(error.value)
    assert str(path) in str(error.value) and not list(cache.glob("stores/*/manifest.json"))


@pytest.mark.parametrize("fault", REFUSED)
def test_contradictions_are_refused(fault, tmp_path, tally, monkeypatch):
    damage, message = REFUSED[fault]
    with tally("layouts").attempt(fault):
        write_tree(tmp_path / "data")
        damage(tmp_path / "data")
        require_refused(tmp_path / "data", message, tmp_path / "cache", monkeypatch)


@pytest.mark.parametrize("clutter", HARMLESS)
def test_clutter_is_harmless(clutter, tmp_path, tally):
    """Every image is there with its class and split, and nothing else; all are decoded."""
    with tally("layouts").attempt(clutter):
        told = write_tree(tmp_path / "data") | (HARMLESS[clutter](tmp_path / "data") or {})
        source = open_local(tmp_path / "data")
        assert told_by(source) == told
        assert len(open_store(source, tmp_path / "cache", 16)) == len(told)


@pytest.mark.parametrize("clutter", ["capital suffixes", "folders in a class", "long names"])
def test_classes_are_torchvision_s(clutter, tmp_path):
    write_tree(tmp_path)
    HARMLESS[clutter](tmp_path)
    theirs = torchvision.datasets.ImageFolder(tmp_path / "train")
    named = {Path(file).relative_to(tmp_path).as_posix(): theirs.classes[k] for file, k in theirs.samples}
    ours = {image: name for image, (name, split) in told_by(open_local(tmp_path)).items() if split == "train"}
    assert ours == named


def test_faults_are_found_among_clutter(tmp_path, tally, monkeypatch):
    """Trees with clutter of any kinds: read to what is there, then refused for one fault."""
    attempts = tally("layouts")
    of_few_files = ("empty", "direct", "nothing", "one class")  # which the clutter would mend
    faults = [name for name in REFUSED if not any(word in name for word in of_few_files)]
    for seed in range(tries(150, 6)):
        rng, root = random.Random(seed), tmp_path / str(seed) / "data"
        kinds, fault = rng.sample(sorted(HARMLESS), rng.randint(1, 6)), rng.choice(faults)
        with attempts.attempt(f"random.Random({seed}): {', '.join(kinds)}; then {fault}"):
            told = write_tree(root)
            for kind in kinds:
                told |= HARMLESS[kind](root) or {}
            assert told_by(open_local(root)) == told
            REFUSED[fault][0](root)
            require_refused(root, "", tmp_path / str(seed) / "cache", monkeypatch)
        shutil.rmtree(tmp_path / str(seed))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, tally, monkeypatch):
    """For root every folder can be listed, so that the system's answer is put in its mouth."""
    write_tree(tmp_path / "data")
    listed = os.scandir

    def denied(folder):
        if Path(folder).name == "dog":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(trees.os, "scandir", denied)
    message = r"data/(train|valid)/dog cannot be listed \(Permission denied\)"
    with tally("layouts").attempt("folder without permission"):
        require_refused(tmp_path / "data", message, tmp_path / "cache", monkeypatch)


def test_an_image_that_cannot_be_opened_is_named(tmp_path, tally):
    """As a bad image; root may open every file, so that links lead nowhere and to themselves instead."""
    with tally("layouts").attempt("links"):
        write_tree(tmp_path / "data")
        link(tmp_path / "data/train/cat/gone.png", "nowhere.png")
        link(tmp_path / "data/train/cat/self.png", "self.png")
        with pytest.raises(SetupError, match=r"(?s)2 image.*gone.png: FileNotFound.*self.png: OSError"):
            open_store(open_local(tmp_path / "data"), tmp_path / "cache", 16)
    if os.getuid():  # an ordinary user
        with tally("layouts").attempt("permission"):
            (tmp_path / "data/train/cat/0.png").chmod(0)
            with pytest.raises(SetupError, match=r"train/cat/0.png: PermissionError"):
                open_store(open_local(tmp_path / "data"), tmp_path / "cache", 16)


def test_a_folder_with_a_long_name_has_a_store(tmp_path, tally):
    with tally("layouts").attempt("255 letters"):
        told = write_tree(tmp_path / ("d" * 255))
        store = open_store(open_local(tmp_path / ("d" * 255)), tmp_path / "cache", 16)
        assert len(store) == len(told) and len(store.path.name) < 100


# ------------------------------------------------------------------------------------ parquet's columns

NAMES = ["n01", "n02"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PARQUET_COUNTS = Counts(classes=2, train_per_class=1, valid_per_class=1)


def label_names(names: object) -> dict:
    return {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}


def write_shard(path: Path, metadata: object = None, **columns: pa.Array | None) -> None:
    """Two images of two classes; `columns` replace those that are right, None leaves one out."""
    images = pa.array([{"bytes": data, "path": "x"} for data in OTHERS[:2]], IMAGE)
    columns = {"image": images, "label": pa.array([0, 1], pa.int64()), **columns}
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    text = metadata if isinstance(metadata, bytes) else json.dumps(metadata or label_names(NAMES)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({b"huggingface": text}), path)


def typed(values: list, kind: pa.DataType) -> pa.Array:
    return pa.array(values, kind)


COLUMNS = "needs the columns image: struct.*and label: int64, but has"
BAD_SHARDS: dict[str, tuple[dict, str]] = {
    "no label": ({"label": None}, f"{COLUMNS} image: struct"),
    "no image": ({"image": None}, f"{COLUMNS} label: int64"),
    "labels of text": ({"label": typed(["0", "1"], pa.string())}, f"{COLUMNS}.*label: string"),
    "labels with a point": ({"label": typed([0.0, 1.0], pa.float64())}, f"{COLUMNS}.*label: double"),
    "lists of labels": ({"label": typed([[0], [1]], pa.list_(pa.int64()))}, f"{COLUMNS}.*label: list"),
    "truth values": ({"label": typed([False, True], pa.bool_())}, f"{COLUMNS}.*label: bool"),
    "label missing": ({"label": typed([0, None], pa.int64())}, "row 1: label None is not one of 2"),
    "label negative": ({"label": typed([-1, 1], pa.int64())}, "row 0: label -1 is not one of 2 classes"),
    "label too large": ({"label": typed([0, 2], pa.uint8())}, "row 1: label 2 is not one of 2 classes"),
    "bare bytes": ({"image": typed(OTHERS[:2], pa.binary())}, f"{COLUMNS} image: binary"),
    "paths alone": (
        {"image": typed([{"path": "x"}] * 2, pa.struct([("path", pa.string())]))},
        f"{COLUMNS} image: struct<path: string>",
    ),
    "images as text": (
        {"image": typed([{"bytes": "x"}] * 2, pa.struct([("bytes", pa.string())]))},
        f"{COLUMNS} image: struct<bytes: string>",
    ),
    "one label twice": ({"label": typed([1, 1], pa.int64())}, "n01 has 0"),
    "no rows": ({"image": typed([], IMAGE), "label": typed([], pa.int64())}, "0 valid images, expected 2"),
    "names twice": ({"metadata": label_names(["n01", "n01"])}, "no ClassLabel names for `label`, or one"),
    "names that are numbers": ({"metadata": label_names([1, 2])}, "no ClassLabel names"),
    "names without an order": ({"metadata": label_names({"a": "n01", "b": "n02"})}, "no ClassLabel names"),
    "names that are one word": ({"metadata": label_names("ab")}, "no ClassLabel names"),
    "notes in another form": ({"metadata": [1, 2]}, "no ClassLabel names"),
    "notes that are no JSON": ({"metadata": b"{'a'"}, "no ClassLabel names"),
    "another order of names": ({"metadata": label_names(NAMES[::-1])}, "numbers its classes unlike train"),
}


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("fault", BAD_SHARDS)
def test_shards_with_wrong_columns_are_refused(fault, split, tmp_path, tally, monkeypatch):
    changes, message = BAD_SHARDS[fault]
    monkeypatch.setattr(store_module, "decode", lambda *_: pytest.fail("decoded"))
    with tally("layouts").attempt(f"{fault} in {split}"):
        for each in ("train", "valid"):
            write_shard(tmp_path / f"{each}-0.parquet", **(changes if each == split else {}))
        wanted = message.replace("valid", split)
        if fault == "another order of names" and split == "train":
            wanted = "valid-0.parquet numbers its classes unlike train-0.parquet"
        with pytest.raises(SetupError, match=f"(?s){wanted}") as error:
            open_store(ParquetFolder(tmp_path, PARQUET_COUNTS), tmp_path / "cache", 16)
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind", ["folder", "empty", "text"])
def test_a_shard_that_is_no_parquet_is_refused(kind, tmp_path, tally):
    make = {"folder": Path.mkdir, "empty": Path.touch, "text": lambda p: p.write_text("no parquet")}[kind]
    with tally("layouts").attempt(f"shard: {kind}"):
        write_shard(tmp_path / "train-0.parquet")
        make(tmp_path / "valid-0.parquet")
        with pytest.raises(SetupError, match="valid-0.parquet cannot be read as parquet"):
            ParquetFolder(tmp_path, PARQUET_COUNTS).examples()


@pytest.mark.parametrize("null", [None, {"bytes": None, "path": "x"}])
def test_rows_without_an_image_are_named(null, tmp_path, tally):
    """As bad images: only reading a shard whole tells them."""
    with tally("layouts").attempt(f"row of {null}"):
        write_shard(tmp_path / "train-0.parquet")
        images = typed([{"bytes": OTHERS[0], "path": "x"}, null], IMAGE)
        write_shard(tmp_path / "valid-0.parquet", image=images)
        with pytest.raises(SetupError, match="1 image.*\n  valid/000001: ValueError: the row holds no image"):
            open_store(ParquetFolder(tmp_path, PARQUET_COUNTS), tmp_path / "cache", 16)


# ------------------------------------------------------------------- folders in the place of Tiny's lists


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wnids.txt", "has no wnids.txt"),
        ("val/val_annotations.txt", "has no val/val_annotations.txt"),
        ("words.txt", ""),  # only for the names of classes that are not ImageNet's
    ],
)
@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_a_list_that_is_none_is_refused(kind, name, message, miniature, mini_counts, tmp_path, tally):
    path = miniature.folder(tmp_path / "tiny")
    (path / name).unlink()
    (path / name).mkdir() if kind == "folder" else link(path / name, "nowhere")
    with tally("layouts").attempt(f"{name}: {kind}"):
        source = TinyImageNetFolder(path, mini_counts)
        if kind == "folder" and not message:
            assert len(source.examples()) == 96
        else:
            wanted = message if kind == "folder" else f"{name} cannot be read .FileNotFoundError"
            with pytest.raises(SetupError, match=wanted):
                _ = source.examples(), source.class_names
