"""The studies' layouts: read to exactly what is there, refused by name and value where they are broken."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import torchvision
from conftest import encode, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from src import SetupError
from src.config import CHOICES, DataConfig
from src.data import miniature, sources
from src.data.miniature import (
    BIRDS,
    BREEDS,
    COUNTS,
    FOOD,
    MINIATURES,
    SMALL_BREEDS,
    VARIANTS,
    write_miniature,
)
from src.data.sources import (
    BirdsAndAircraft,
    Cub200,
    FgvcAircraft,
    FoodX251,
    ImageFolder,
    StanfordDogs,
    open_source,
    parse_labels,
    parse_pairs,
)
from src.data.store import decode, open_store

LAYOUTS = ("mini_dogs", "mini_birds", "mini_birds_aircraft", "mini_food")


def local(path) -> sources.Source:
    return open_source(DataConfig(source="local", path=str(path)), Path("unused"))


def facts(source) -> set[tuple[str, str | None, str]]:
    """(image id, wnid or None, split) of every example; ids must differ."""
    examples = source.examples()
    assert len({e.image_id for e in examples}) == len(examples)
    return {(e.image_id, source.wnids[e.label] if e.label >= 0 else None, e.split) for e in examples}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder with every miniature, in a cache; not to be changed."""
    folder = tmp_path_factory.mktemp("cache") / "miniatures"
    for name in MINIATURES:
        assert write_miniature(name, folder / name) == folder / name
    return folder


@pytest.fixture(scope="module")
def copies(whole, tmp_path_factory) -> Path:
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("copies") / "miniatures"))


@pytest.fixture
def copy(whole, copies):
    """A function that gives the copy of a miniature, to be damaged; it is mended after the test."""
    used = []
    yield lambda name: used.append(name) or copies / name
    for name in used:
        mend(copies / name, whole / name)


def mend(path: Path, whole: Path) -> None:
    """Make `path` what `whole` is, touching only what differs: thousands of files are slow to write."""
    names = {p.relative_to(whole) for p in whole.rglob("*")}
    for place in sorted(path.rglob("*"), reverse=True):
        if place.relative_to(path) not in names:
            place.rmdir() if place.is_dir() else place.unlink()
    for name in sorted(names):
        before, after = whole / name, path / name
        if before.is_dir():
            after.mkdir(exist_ok=True)
        elif not after.exists() or after.stat().st_mtime_ns != before.stat().st_mtime_ns:
            shutil.copy2(before, after)


@pytest.fixture
def small_counts(monkeypatch) -> None:
    """Makes the miniatures count as complete."""
    for name, kind in (
        ("DOGS", StanfordDogs),
        ("BIRDS", Cub200),
        ("AIRCRAFT", FgvcAircraft),
        ("FOOD", FoodX251),
    ):
        monkeypatch.setattr(sources, f"{name}_COUNTS", COUNTS[kind])


# --------------------------------------------------------------------------- what was written is what is read


def expected_dogs(path: Path) -> set:
    found = set()
    for split, name in (("train", "train_list.mat"), ("valid", "test_list.mat")):
        mat = scipy.io.loadmat(path / name, squeeze_me=True)
        for file, label in zip(mat["file_list"], mat["labels"], strict=True):
            assert file.startswith(BREEDS[label - 1] + "/")
            found.add((f"Images/{file}", file[:9], split))
    return found


def expected_birds(path: Path, prefix: str = "") -> set:
    names = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    tables = [pd.read_csv(path / name, sep=" ", header=None, index_col=0)[1] for name in names]
    return {
        (f"{prefix}images/{image}", BIRDS[label - 1], "train" if is_train else "valid")
        for image, label, is_train in zip(*tables, strict=True)
    }


def expected_aircraft(path: Path, prefix: str = "") -> set:
    found = set()
    for split, part in (("train", "trainval"), ("valid", "test")):
        for line in (path / f"data/images_variant_{part}.txt").read_text().splitlines():
            found.add((f"{prefix}data/images/{line[:7]}.jpg", line[8:], split))
    return found


def expected_food(path: Path) -> set:
    found = {(f"test_set/{p.name}", None, "test") for p in (path / "test_set").iterdir()}
    for split, part in (("train", "train"), ("valid", "val")):
        table = pd.read_csv(path / f"{part}_info.csv", names=["image", "label"])
        found |= {(f"{part}_set/{r.image}", FOOD[r.label], split) for r in table.itertuples()}
    return found


def expected_both(path: Path) -> set:
    birds = expected_birds(path / "CUB_200_2011", "birds/")
    return birds | expected_aircraft(path / "fgvc-aircraft-2013b", "aircraft/")


@pytest.mark.parametrize(
    ("name", "kind", "expected", "n_classes", "splits"),
    [
        ("mini_dogs", StanfordDogs, expected_dogs, 24, {"train": 288, "valid": 274}),
        ("mini_birds", Cub200, expected_birds, 8, {"train": 112, "valid": 88}),
        ("mini_birds_aircraft", BirdsAndAircraft, expected_both, 16, {"train": 224, "valid": 160}),
        ("mini_food", FoodX251, expected_food, 8, {"train": 144, "valid": 56, "test": 16}),
    ],
)
def test_layout_is_read_to_what_is_there(name, kind, expected, n_classes, splits, whole, small_counts):
    source = local(whole / name)
    assert isinstance(source, kind) and not source.name.startswith("mini")
    found = facts(source)
    assert found == expected(whole / name) and Counter(split for *_, split in found) == splits
    assert len(set(source.wnids)) == len(set(source.class_names)) == n_classes
    places = {"birds/": "CUB_200_2011/", "aircraft/": "fgvc-aircraft-2013b/"}
    for example in source.examples()[::7]:
        top = example.image_id.split("/")[0] + "/"
        file = whole / name / example.image_id.replace(top, places.get(top, top), 1)
        if top == "aircraft/":  # without the banner, to the last bit
            with Image.open(file) as image:
                expected_HWC = np.asarray(image)[:-20]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(example.read()))), expected_HWC)
        else:
            assert example.read() == file.read_bytes()


def test_aircraft_agree_with_torchvision(whole, small_counts):
    source = local(whole / "mini_birds_aircraft" / "fgvc-aircraft-2013b")
    assert isinstance(source, FgvcAircraft)
    ours = {(e.image_id, e.split): e for e in source.examples()}
    for split, part in (("train", "trainval"), ("valid", "test")):
        theirs = torchvision.datasets.FGVCAircraft(whole / "mini_birds_aircraft", split=part)
        assert tuple(theirs.classes) == source.wnids
        for file, label in zip(theirs._image_files, theirs._labels, strict=True):
            key = str(Path(file).relative_to(whole / "mini_birds_aircraft" / "fgvc-aircraft-2013b"))
            assert ours.pop((key, split)).label == label
    assert not ours


def test_banner_is_gone_and_an_image_that_is_all_banner_is_bad(copy, small_counts):
    path = copy("mini_birds_aircraft") / "fgvc-aircraft-2013b"
    example = local(path).examples()[0]
    file = path / example.image_id
    cut = Image.open(io.BytesIO(example.read()))
    whole_image = Image.open(file)
    assert cut.size == (whole_image.width, whole_image.height - 20)
    # The drawn banner is white on grey, and nothing of it is left.
    assert np.asarray(whole_image)[-14:-6, 4:-4:2].mean() > 200
    for colour in ("L", "CMYK"):
        file.write_bytes(encode(whole_image.convert(colour), "JPEG"))
        other = np.asarray(Image.open(file).convert("RGB"))[:-20]
        assert np.array_equal(decode(example.read(), 40), decode(encode(Image.fromarray(other)), 40))
    file.write_bytes(encode(noise(1, (64, 20)), "JPEG"))
    with pytest.raises(ValueError, match="20 pixels high, of which 20 are a banner"):
        example.read()


def test_order_of_the_classes(copy, small_counts):
    dogs, birds, both, food = (copy(name) for name in LAYOUTS)
    assert local(dogs).wnids == tuple(breed[:9] for breed in sorted(BREEDS))
    assert local(dogs).class_names[4:6] == ("Shih-Tzu", "Blenheim spaniel")
    assert "black-and-tan coonhound" in local(dogs).class_names
    assert local(food).wnids == FOOD != tuple(sorted(FOOD)) and local(food).class_names[3] == "cockle food"
    # birds: as classes.txt numbers them, whatever their names or the lines' order
    before = {(image, wnid) for image, wnid, _ in facts(local(birds))}
    edit(birds / "classes.txt", lambda t: "".join(reversed(t.splitlines(True))))
    assert local(birds).wnids == BIRDS and local(birds).class_names[0] == "Black footed Albatross"
    swap = str.maketrans("12", "21")
    edit(birds / "classes.txt", lambda t: "".join(x[0].translate(swap) + x[1:] for x in t.splitlines(True)))
    edit(
        birds / "image_class_labels.txt",
        lambda t: "".join(x[:-2] + x[-2:].translate(swap) for x in t.splitlines(True)),
    )
    assert local(birds).wnids[:3] == (BIRDS[1], BIRDS[0], BIRDS[2])
    assert {(image, wnid) for image, wnid, _ in facts(local(birds))} == before
    # aircraft: by name, even where variants.txt is in another order or missing; birds are first
    edit(both / "fgvc-aircraft-2013b/data/variants.txt", lambda t: "".join(reversed(t.splitlines(True))))
    assert local(both).wnids == BIRDS + VARIANTS == BIRDS + tuple(sorted(VARIANTS))
    (both / "fgvc-aircraft-2013b/data/variants.txt").unlink()
    assert local(both).wnids == BIRDS + VARIANTS


@pytest.mark.parametrize("name", MINIATURES)
def test_hidden_files_are_neither_classes_nor_images(name, copy, small_counts):
    path = copy(name)
    before = facts(local(path)), local(path).wnids
    for folder in [path, *(p for p in path.rglob("*") if p.is_dir())]:
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "a.jpg").write_bytes(b"x")
        (folder / "._b.jpg").write_bytes(b"x")
        (folder / ".DS_Store").write_bytes(b"x")
    assert (facts(local(path)), local(path).wnids) == before


def test_fingerprint_follows_the_files(copy, small_counts):
    for name in LAYOUTS:
        path = copy(name)
        before = local(path).fingerprint
        assert local(path).fingerprint == before
        os.utime(next(path.rglob("*.jpg")), ns=(1, 1))
        assert local(path).fingerprint != before


# ------------------------------------------------------------------------------------------ other spellings


def test_lists_of_dogs_may_be_in_their_own_folder(copy, small_counts):
    path = copy("mini_dogs")
    before = facts(local(path))
    (path / "lists").mkdir()
    for name in ("train_list.mat", "test_list.mat"):
        os.rename(path / name, path / "lists" / name)
    assert facts(local(path)) == before


def test_food_under_kaggles_names(copy, small_counts):
    path = copy("mini_food")
    before = facts(local(path))
    for part in ("train", "val"):
        os.rename(path / f"{part}_info.csv", path / f"{part}_labels.csv")
        edit(path / f"{part}_labels.csv", lambda t: "img_name,label\n" + t.replace("\n", "\r\n"))
        os.rename(path / f"{part}_set", path / part)
    (path / "test_info.csv").unlink()
    assert facts(local(path)) == {
        (i.replace("train_set/", "train/").replace("val_set/", "val/"), w, s) for i, w, s in before
    }
    shutil.rmtree(path / "test_set")
    assert Counter(e.split for e in local(path).examples()) == {"train": 144, "valid": 56}


def test_food_that_no_list_names_is_left_out(copy, small_counts):
    path = copy("mini_food")
    before = facts(local(path))
    for part in ("train", "val", "test"):
        (path / f"{part}_set" / "dropped.jpg").write_bytes(b"x")
    assert facts(local(path)) == before


def test_a_data_set_is_found_one_folder_below_and_two_are_not_mixed(whole, tmp_path, small_counts):
    both = whole / "mini_birds_aircraft"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "b").symlink_to(both / "CUB_200_2011")
    assert isinstance(local(tmp_path / "one"), Cub200)
    (tmp_path / "one" / "a").symlink_to(both / "fgvc-aircraft-2013b")  # under any names
    assert isinstance(local(tmp_path / "one"), BirdsAndAircraft)
    assert facts(local(tmp_path / "one")) == facts(local(both))
    (tmp_path / "one" / "c").symlink_to(whole / "mini_food")
    with pytest.raises(
        SetupError, match=r"several data sets: .*one/b \(cub-200-2011\).*one/c \(foodx-251\).*--data DIR"
    ):
        local(tmp_path / "one")


# -------------------------------------------------------------------------------------------------- refused


def edit(path: Path, change) -> None:
    path.write_bytes(change(path.read_text()).encode())


def line(number: int, text: str | None):
    """A change of one line of a file, from 1; None takes it out."""

    def change(old: str) -> str:
        lines = old.splitlines(True)
        lines[number - 1 : number] = [] if text is None else [text + "\n"]
        return "".join(lines)

    return change


def file_list(path: Path, name: str) -> list[str]:
    return scipy.io.loadmat(path / name, squeeze_me=True)["file_list"].tolist()


def relist(path: Path, name: str, change) -> None:
    """Write a MATLAB list anew with `change` of its files."""
    cells = np.array([[file] for file in change(file_list(path, name))], dtype=object)
    scipy.io.savemat(path / name, {"file_list": cells})


def drop(path: Path, name: str, image: int) -> str:
    """Take an image out of a MATLAB list; its name."""
    gone = []
    relist(path, name, lambda files: gone.append(files.pop(image)) or files)
    return gone[0]


def rename_breed(path: Path, new: str) -> None:
    os.rename(path / "Images" / BREEDS[1], path / "Images" / new)
    for name in ("train_list.mat", "test_list.mat"):
        relist(path, name, lambda files: [f.replace(BREEDS[1] + "/", new + "/") for f in files])


def all_to_test(path: Path) -> None:
    """No Chihuahua to train on."""
    moved = []
    relist(path, "train_list.mat", lambda f: moved.extend(f[:12]) or f[12:])
    relist(path, "test_list.mat", lambda f: moved + f)


CHIHUAHUA = f"Images/{BREEDS[0]}/n02085620_100.jpg"
DOGS_URLS = "images.tar.*a443fc2f9a85.*lists.tar.*34b47cacd9a9"
BROKEN_DOGS = {
    "no train list": (
        lambda p: (p / "train_list.mat").unlink(),
        "there is no train_list.mat, neither here nor in lists/",
    ),
    "no test list": (lambda p: (p / "test_list.mat").unlink(), "there is no test_list.mat"),
    "no images": (
        lambda p: shutil.rmtree(p / "Images"),
        r"562 images only in train_list.mat and test_list.mat: Images/n0",
    ),
    "image gone": (
        lambda p: (p / CHIHUAHUA).unlink(),
        f"1 images only in train_list.mat and test_list.mat: {CHIHUAHUA}",
    ),
    "image not listed": (
        lambda p: (p / CHIHUAHUA.replace("100", "999")).write_bytes(b"x"),
        "1 images only in the folder: .*_999.jpg",
    ),
    "image in both": (
        lambda p: relist(p, "test_list.mat", lambda files: [*files, file_list(p, "train_list.mat")[0]]),
        "1 images are listed twice in train_list.mat and test_list.mat: Images/n02085620",
    ),
    "fewer": (
        lambda p: (p / "Images" / drop(p, "train_list.mat", 0)).unlink(),
        "not all of stanford-dogs: 287 train images, expected 288",
    ),
    "none to train on": (all_to_test, "1 classes without train images: n02085620"),
    "no wnid": (
        lambda p: rename_breed(p, "Japanese_spaniel"),
        "1 names in Images/ are not `<wnid>-<name>`: Japanese_spaniel",
    ),
    "one wnid twice": (
        lambda p: rename_breed(p, "n02085620-spaniel"),
        "share a wnid: n02085620-Chihuahua, n02085620-spaniel",
    ),
    "torn list": (
        lambda p: (p / "test_list.mat").write_bytes((p / "test_list.mat").read_bytes()[:900]),
        "test_list.mat cannot be read for its `file_list`",
    ),
    "another list": (
        lambda p: scipy.io.savemat(p / "test_list.mat", {"x": 1}),
        r"test_list.mat cannot be read .*KeyError",
    ),
}

FIRST = f"{BIRDS[0]}/Black_footed_Albatross_0001_3000.jpg"
BIRDS_URLS = "CUB_200_2011.tgz.*97eceeb19623"
BROKEN_BIRDS = {
    **{
        f"no {name}": (lambda p, name=name: (p / name).unlink(), f"there is no {name}")
        for name in ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
    },
    "id without label": (
        lambda p: edit(p / "image_class_labels.txt", line(5, None)),
        "1 image ids only in images.txt: 5",
    ),
    "id without split": (
        lambda p: edit(p / "train_test_split.txt", line(7, None)),
        "1 image ids only in images.txt: 7",
    ),
    "id without image": (
        lambda p: edit(p / "images.txt", line(9, None)),
        "1 image ids only in image_class_labels.txt: 9",
    ),
    "label too large": (
        lambda p: edit(p / "image_class_labels.txt", line(1, "1 9")),
        "image_class_labels.txt: image 1 has class '9', not 1 to 8",
    ),
    "label zero": (
        lambda p: edit(p / "image_class_labels.txt", line(2, "2 0")),
        "image 2 has class '0', not 1 to 8",
    ),
    "split two": (
        lambda p: edit(p / "train_test_split.txt", line(3, "3 2")),
        "train_test_split.txt: image 3 has '2', not 0 or 1",
    ),
    "another class": (
        lambda p: edit(p / "image_class_labels.txt", line(1, "1 2")),
        f"image 1 is '{FIRST}' in images.txt, but its class is '{BIRDS[1]}'",
    ),
    "id twice": (
        lambda p: edit(p / "images.txt", line(4, f"3 {FIRST}")),
        r"images.txt, line 4: id '3' comes twice",
    ),
    "no value": (lambda p: edit(p / "images.txt", line(4, "4")), "images.txt, line 4: '4' is not `id value`"),
    "image twice": (
        lambda p: edit(p / "images.txt", line(2, f"2 {FIRST}")),
        f"1 images are listed twice in images.txt: images/{FIRST}",
    ),
    "image gone": (lambda p: (p / "images" / FIRST).unlink(), f"1 images only in images.txt: images/{FIRST}"),
    "image not listed": (
        lambda p: (p / "images" / BIRDS[0] / "x.jpg").write_bytes(b"x"),
        "1 images only in the folder: images/001.*x.jpg",
    ),
    "one to test": (
        lambda p: edit(p / "train_test_split.txt", lambda t: t.replace(" 1\n", " 0\n", 1)),
        "not all of cub-200-2011: 111 train images, expected 112; 89 valid images, expected 88",
    ),
    "class without images": (
        lambda p: edit(p / "classes.txt", lambda t: t + "9 009.Brewer_Blackbird\n"),
        "9 classes, expected 8; 1 classes without train images: 009.Brewer_Blackbird; 1 classes",
    ),
    "classes from 0": (
        lambda p: edit(p / "classes.txt", line(8, "0 008.Rhinoceros_Auklet")),
        "classes.txt has 8 classes, but numbers beside 1 to 8: 0",
    ),
    "class name twice": (
        lambda p: edit(p / "classes.txt", line(2, f"2 {BIRDS[0]}")),
        f"one name to several classes: {BIRDS[0]}",
    ),
}

TRAINVAL, TESTED = "data/images_variant_trainval.txt", "data/images_variant_test.txt"


def first_aircraft(path: Path) -> str:
    return (path / TRAINVAL).read_text().split("\n")[0]


AIRCRAFT_URLS = "fgvc-aircraft-2013b.tar.gz.*no checksum"
BROKEN_AIRCRAFT = {
    "no trainval": (lambda p: (p / TRAINVAL).unlink(), f"there is no {TRAINVAL}"),
    "no test": (lambda p: (p / TESTED).unlink(), f"there is no {TESTED}"),
    "image gone": (
        lambda p: (p / f"data/images/{first_aircraft(p)[:7]}.jpg").unlink(),
        f"1 images only in {TRAINVAL} and {TESTED}: data/images/0",
    ),
    "image not listed": (
        lambda p: (p / "data/images/0000001.jpg").write_bytes(b"x"),
        "1 images only in the folder: data/images/0000001.jpg",
    ),
    "image in both": (
        lambda p: edit(p / TESTED, line(1, first_aircraft(p))),
        f"1 images are listed twice in {TRAINVAL} and",
    ),
    "id twice": (
        lambda p: edit(p / TRAINVAL, line(2, first_aircraft(p))),
        f"{TRAINVAL}, line 2: id '[0-9]*' comes twice",
    ),
    "id without name": (
        lambda p: edit(p / TRAINVAL, line(2, "0034309 ")),
        f"{TRAINVAL}, line 2: '0034309' is not `id value`",
    ),
    "unknown variant": (
        lambda p: edit(p / TRAINVAL, line(1, first_aircraft(p)[:7] + " Concorde")),
        "1 variants only in the lists: Concorde",
    ),
    "variant not used": (
        lambda p: edit(p / "data/variants.txt", lambda t: t + "Il-76\n"),
        "1 variants only in data/variants.txt: Il-76",
    ),
    "fewer": (
        lambda p: (
            (p / f"data/images/{first_aircraft(p)[:7]}.jpg").unlink() or edit(p / TRAINVAL, line(1, None))
        ),
        "not all of fgvc-aircraft: 111 train images, expected 112",
    ),
    "class without images": (
        lambda p: edit(p / TESTED, lambda t: t.replace("Saab 2000", "A300B4")),
        "1 classes without valid images: Saab 2000",
    ),
}

FOOD_URLS = "annot.tar.*0c632c543cee.*train.tar.*8e56440e365e.*val.tar.*fa9a4c1eb929.*test.tar.*32479146dd08"
BROKEN_FOOD = {
    **{
        f"no {name}": (lambda p, name=name: (p / name).unlink(), f"there is no {name}")
        for name in ("class_list.txt", "train_info.csv", "val_info.csv")
    },
    "no train images": (
        lambda p: shutil.rmtree(p / "train_set"),
        "144 images only in its CSV files: train_set/train_000000.jpg",
    ),
    "image gone": (
        lambda p: (p / "val_set/val_000004.jpg").unlink(),
        "1 images only in its CSV files: val_set/val_000004.jpg",
    ),
    "test image gone": (
        lambda p: (p / "test_set/test_000004.jpg").unlink(),
        "1 images only in its CSV files: test_set/test_000004.jpg",
    ),
    "fewer to test": (
        lambda p: (p / "test_info.csv").unlink() or (p / "test_set/test_000004.jpg").unlink(),
        "not all of foodx-251: 15 test images, expected 16",
    ),
    "label too large": (
        lambda p: edit(p / "train_info.csv", line(3, "train_000002.jpg,8")),
        "train_info.csv, line 3: label '8' of 'train_000002.jpg' is not one of 0 to 7",
    ),
    "label negative": (
        lambda p: edit(p / "val_info.csv", line(1, "val_000000.jpg,-1")),
        "val_info.csv, line 1: label '-1'",
    ),
    "image without label": (
        lambda p: edit(p / "train_info.csv", line(3, "train_000002.jpg")),
        "train_info.csv, line 3: 'train_000002.jpg' is not `img,label`",
    ),
    "image twice": (
        lambda p: edit(p / "train_info.csv", line(3, "train_000001.jpg,1")),
        "line 3: image 'train_000001.jpg' comes twice",
    ),
    "test image twice": (
        lambda p: edit(p / "test_info.csv", line(2, "test_000000.jpg")),
        "1 images are listed twice in its CSV files: test_set/test_000000.jpg",
    ),
    "label in the test list": (
        lambda p: edit(p / "test_info.csv", line(2, "test_000001.jpg,3")),
        "test_info.csv, line 2: 'test_000001.jpg,3' is not one image",
    ),
    "fewer": (lambda p: edit(p / "train_info.csv", line(1, None)), "143 train images, expected 144"),
    "class without images": (
        lambda p: edit(p / "class_list.txt", lambda t: t + "8 dumpling\n"),
        "9 classes, expected 8; 1 classes without train images: dumpling; 1 classes without valid",
    ),
    "classes from 1": (
        lambda p: edit(p / "class_list.txt", line(1, "8 macaron")),
        "class_list.txt has 8 classes, but numbers beside 0 to 7: 8",
    ),
    "number twice": (
        lambda p: edit(p / "class_list.txt", line(1, "1 macaron")),
        "class_list.txt, line 2: id '1' comes twice",
    ),
}

FAULTS = [
    (name, below, fault, damage, message, urls)
    for name, below, faults, urls in (
        ("mini_dogs", "", BROKEN_DOGS, DOGS_URLS),
        ("mini_birds", "", BROKEN_BIRDS, BIRDS_URLS),
        ("mini_birds_aircraft", "fgvc-aircraft-2013b", BROKEN_AIRCRAFT, AIRCRAFT_URLS),
        ("mini_food", "", BROKEN_FOOD, FOOD_URLS),
    )
    for fault, (damage, message) in faults.items()
]


@pytest.mark.parametrize(
    ("name", "below", "damage", "message", "urls"),
    [(name, below, damage, message, urls) for name, below, _, damage, message, urls in FAULTS],
    ids=[f"{name.removeprefix('mini_')}: {fault}" for name, _, fault, *_ in FAULTS],
)
def test_broken_layout_is_refused_with_the_value(name, below, damage, message, urls, copy, small_counts):
    path = copy(name) / below
    damage(path)
    with pytest.raises(SetupError, match=f"(?s){message}.*{urls}") as error:
        local(path).examples()
    assert str(path) in str(error.value)


def test_broken_half_of_two_data_sets_is_refused(copy, small_counts):
    path = copy("mini_birds_aircraft")
    (path / "fgvc-aircraft-2013b" / TESTED).unlink()
    with pytest.raises(SetupError, match=f"there is no {TESTED}.*{AIRCRAFT_URLS}"):
        local(path).examples()


@pytest.mark.parametrize(
    ("name", "classes", "train", "valid"),
    [
        ("mini_dogs", "24 .*120", "288 .*12,000", "274 .*8,580"),
        ("mini_birds", "8 .*200", "112 .*5,994", "88 .*5,794"),
        ("mini_birds_aircraft/fgvc-aircraft-2013b", "8 .*100", "112 .*6,667", "72 .*3,333"),
        ("mini_food", "8 .*251", "144 .*118,475", "56 .*11,994; 16 test images, expected 28,377"),
    ],
)
def test_real_counts_are_the_default(name, classes, train, valid, whole):
    numbers = f"{classes}; {train}; {valid}".replace(" .*", " [a-z ]*, expected ")
    with pytest.raises(SetupError, match=f"is not all of .*: {numbers}. Get a whole copy"):
        local(whole / name).examples()


def test_unknown_layout_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        SetupError, match=r"train_list.mat.*train_test_split.txt.*images_variant_test.txt.*class_list.txt"
    ):
        local(tmp_path)


# -------------------------------------------------------------------------------------------------- parsers

key = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Z")), min_size=1, max_size=8)
value = st.lists(key, min_size=1, max_size=3).map(" ".join)


@given(
    st.dictionaries(key, value, max_size=8),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.sampled_from([" ", "\t", "  "]),
)
def test_pairs_round_trip(pairs, newline, blank):
    assert parse_pairs("".join(f"{k}{blank}{v}{newline}" for k, v in pairs.items()), "f.txt") == pairs


@given(st.dictionaries(key, value, min_size=1, max_size=5), st.data())
def test_pair_that_is_short_or_comes_twice_is_named(pairs, data):
    lines = [f"{k} {v}" for k, v in pairs.items()]
    with pytest.raises(SetupError, match=f"f.txt, line {len(lines) + 1}: id .*twice"):
        parse_pairs("\n".join([*lines, data.draw(st.sampled_from(lines))]), "f.txt")
    with pytest.raises(SetupError, match=f"f.txt, line {len(lines) + 1}: .* is not `id value`"):
        parse_pairs("\n".join([*lines, data.draw(key) + "new "]), "f.txt")


names = key.filter(lambda text: "img" not in text)


@given(
    st.dictionaries(names, st.integers(0, 6), max_size=8),
    st.sampled_from(["", "img,label\n", "img_name,label\r\n"]),
    st.booleans(),
)
def test_labels_round_trip(labels, header, windows):
    """As pandas writes them, quotes and all."""
    table = pd.Series(labels, dtype=object).to_csv(header=False, lineterminator="\r\n" if windows else "\n")
    assert parse_labels(header + table, "f.csv", n_classes=7) == labels


@given(st.dictionaries(names, st.integers(0, 6), min_size=1, max_size=5), st.data())
def test_label_that_is_no_class_is_named(labels, data):
    text = pd.Series(labels, dtype=object).to_csv(header=False)
    where = f"f.csv, line {len(labels) + 1}: "
    wrong = data.draw(st.sampled_from(["7", "-1", "1.0", "", "x", "²", "1_0", "٣", "9" * 5000]))
    with pytest.raises(SetupError, match=f"{where}label"):
        parse_labels(f"{text}another,{wrong}", "f.csv", n_classes=7)
    with pytest.raises(SetupError, match=f"{where}image .* comes twice"):
        parse_labels(text + text.split("\n")[0], "f.csv", n_classes=7)
    with pytest.raises(SetupError, match=f"{where}.* is not `img,label`"):
        parse_labels(f"{text}a,1,2", "f.csv", n_classes=7)


junk = st.one_of(
    st.text(max_size=60), st.text(alphabet='a1 ,"\n\r\0\t-', max_size=60), st.just('"' + "x" * 200_000)
)


@given(junk)
def test_junk_never_crashes_a_parser(text):
    for parse in (lambda: parse_pairs(text, "f"), lambda: parse_labels(text, "f", 3)):
        try:
            parsed = parse()
        except SetupError as error:
            assert "f, line " in str(error)
        else:
            assert all(k and (v in (0, 1, 2) or v) for k, v in parsed.items())


AIRCRAFT = "mini_birds_aircraft/fgvc-aircraft-2013b"
LISTS = [
    *(
        ("mini_birds", n)
        for n in ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
    ),
    *((AIRCRAFT, n) for n in (TRAINVAL, TESTED, "data/variants.txt")),
    *(("mini_food", n) for n in ("class_list.txt", "train_info.csv", "val_info.csv", "test_info.csv")),
    *(("mini_dogs", n) for n in ("train_list.mat", "test_list.mat")),
]
KINDS = {"mini_birds": Cub200, AIRCRAFT: FgvcAircraft, "mini_food": FoodX251, "mini_dogs": StanfordDogs}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LISTS), st.binary(max_size=40), st.integers(0, 10**6), st.booleans())
def test_junk_in_a_list_never_crashes(copies, place, data, at, cut):
    """Bytes written over a list, at any place, or instead of all that follows."""
    name, file = place
    before = (copies / name / file).read_bytes()
    at %= len(before) + 1
    try:
        (copies / name / file).write_bytes(before[:at] + data + (b"" if cut else before[at + len(data) :]))
        examples = KINDS[name](copies / name, COUNTS[KINDS[name]]).examples()
    except SetupError as error:
        assert str(copies / name) in str(error)
    else:
        totals = COUNTS[KINDS[name]]
        assert len(examples) == totals.train + totals.valid + totals.test
    finally:
        (copies / name / file).write_bytes(before)


# ---------------------------------------------------------------------------------- folders with a flat test


def test_flat_test_images_are_unlabelled(image_folder):
    (image_folder / "test").mkdir()
    for i in range(3):
        (image_folder / "test" / f"{i}.png").write_bytes(encode(noise(5000 + i)))
    (image_folder / "test" / "cat").mkdir()
    (image_folder / "test" / "cat" / "0.png").write_bytes(b"x")  # a labelled test set is not read
    (image_folder / "test" / "sample.csv").write_text("image_id,class\n")
    source = local(image_folder)
    test = [e for e in source.examples() if e.split == "test"]
    assert [(e.image_id, e.label) for e in test] == [(f"test/{i}.png", -1) for i in range(3)]
    assert test[1].read() == (image_folder / "test" / "1.png").read_bytes()
    assert source.wnids == ("cat", "dog")
    # 15 % of 10 images is 1.5, which rounds to 2
    assert Counter((e.split, e.label) for e in source.examples() if e.label >= 0) == {
        **{("train", 0): 8, ("train", 1): 8, ("valid", 0): 2, ("valid", 1): 2}
    }


@pytest.mark.parametrize("place", ["train", "."])
def test_share_held_out(place, image_folder):
    """15 % of 20 beside unlabelled images, a fifth without them and without train/."""
    for name in ("cat", "dog"):
        for i in range(10, 20):
            (image_folder / "train" / name / f"{i}.png").write_bytes(encode(noise(7000 + i)))
        if place == ".":
            os.rename(image_folder / "train" / name, image_folder / name)

    def n_valid() -> list[int]:
        found = Counter(e.label for e in local(image_folder).examples() if e.split == "valid")
        return [found[0], found[1]]

    if place == ".":
        (image_folder / "train").rmdir()
    assert n_valid() == [4, 4]
    (image_folder / "test").mkdir()
    (image_folder / "test" / "a.png").write_bytes(encode(noise(1)))
    assert local(image_folder).wnids == ("cat", "dog")
    assert n_valid() == ([3, 3] if place == "train" else [4, 4])
    assert [e.image_id for e in local(image_folder).examples() if e.label < 0] == ["test/a.png"]


def test_own_valid_images_are_kept_beside_a_flat_test(image_folder):
    for name in ("valid/cat", "valid/dog", "test"):
        (image_folder / name).mkdir(parents=True)
        (image_folder / name / "a.png").write_bytes(encode(noise(1)))
    assert Counter(e.split for e in local(image_folder).examples()) == {"train": 20, "valid": 2, "test": 1}


def test_animals(whole):
    source = local(whole / "mini_animals")
    assert isinstance(source, ImageFolder) and source.wnids == tuple(miniature.ANIMALS)
    counts = Counter((e.label, e.split) for e in source.examples())
    for label, n in enumerate(miniature.ANIMALS.values()):
        assert counts[label, "valid"] == round(0.15 * n)
        assert counts[label, "train"] == n - round(0.15 * n)
    assert (
        counts[-1, "test"] == 24
        and 20 <= min(miniature.ANIMALS.values()) < max(miniature.ANIMALS.values()) <= 34
    )


# ------------------------------------------------------------------------------------------------ miniatures


@pytest.mark.parametrize("name", MINIATURES)
def test_miniature_has_the_same_bytes_and_its_own_name(name, whole):
    source = open_source(DataConfig(source=name), whole.parent)
    assert source.name == name.replace("_", "-")
    assert len(facts(source)) == len(source.examples())
    files = {
        str(p.relative_to(whole / name)): p.read_bytes() for p in (whole / name).rglob("*.*") if p.is_file()
    }
    assert MINIATURES[name]() == files
    assert sum(map(len, files.values())) < 3e6
    images = [data for file, data in files.items() if file.endswith(".jpg")]
    assert len(set(images)) == len(images)  # no picture twice, in no two splits


def test_every_miniature_can_be_asked_for():
    assert set(MINIATURES) == {name for name in CHOICES["data.source"] if name.startswith("mini_")}


def test_matlab_list_has_no_date(whole):
    data = (whole / "mini_dogs" / "train_list.mat").read_bytes()
    assert data[:116].rstrip() == b"MATLAB 5.0 MAT-file"
    every = scipy.io.loadmat(whole / "mini_dogs" / "file_list.mat", squeeze_me=True)["file_list"]
    assert {f"Images/{file}" for file in every} == {image for image, *_ in expected_dogs(whole / "mini_dogs")}


def test_the_twenty_largest_breeds_are_distinct_in_size(whole):
    numbers = Counter(image.parent.name for image in (whole / "mini_dogs" / "Images").rglob("*.jpg"))
    small = {BREEDS[kind] for kind in SMALL_BREEDS}
    assert max(numbers[b] for b in small) < min(n for b, n in numbers.items() if b not in small)


def test_a_miniature_is_written_once_and_whole(tmp_path, monkeypatch):
    calls = []

    def files() -> dict[str, bytes]:
        calls.append(1)
        return {"a/1.jpg": b"1", "b/2.jpg": b"2"}

    monkeypatch.setitem(miniature.MINIATURES, "mini_birds", files)
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "left.jpg").write_bytes(b"by a process that died")
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: write_miniature("mini_birds", tmp_path / "m"), range(8))) == {
            tmp_path / "m"
        }
    assert calls == [1]
    assert sorted(p.name for p in (tmp_path / "m").rglob("*.jpg")) == ["1.jpg", "2.jpg"]
    assert not (tmp_path / "m.partial").exists()


def test_a_miniature_cut_off_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(miniature.MINIATURES, "mini_birds", lambda: {"1.jpg": b"1", "1.jpg/2.jpg": b"2"})
    with pytest.raises(SetupError, match=r"miniature .*m cannot be written: .*--cache DIR"):
        write_miniature("mini_birds", tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    with pytest.raises(
        SetupError, match="miniature 'mini_cats' is unknown; choose one of: mini_animals, mini_dogs"
    ):
        write_miniature("mini_cats", tmp_path / "c")


def test_a_damaged_miniature_says_what_to_do(copy, copies):
    folder = copy("mini_birds_aircraft")
    (folder / "fgvc-aircraft-2013b" / TESTED).unlink()
    with pytest.raises(SetupError, match=f"there is no {TESTED}. This is a miniature: remove {folder}"):
        open_source(DataConfig(source="mini_birds_aircraft"), copies.parent).examples()


def test_store_keeps_what_has_no_label(whole, tmp_path):
    source = open_source(DataConfig(source="mini_food"), whole.parent)
    for _ in range(2):  # built, then loaded with its hash checked
        store = open_store(source, tmp_path, 16)
        assert store.manifest["source"] == "mini-food" and len(store) == 216
        assert Counter(store.official_split_N.tolist()) == {"train": 144, "valid": 56, "test": 16}
        assert np.array_equal(store.labels_N < 0, store.official_split_N == "test")
        assert set(store.labels_N[store.labels_N < 0].tolist()) == {-1}
        assert store.manifest["counts"]["train"] == [18] * 8 and store.manifest["counts"]["valid"] == [7] * 8
