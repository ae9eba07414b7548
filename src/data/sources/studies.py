"""The data sets of the fine-grained studies: dogs, birds, aircraft, birds with aircraft, and food."""

from __future__ import annotations

import functools
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from src.data.archives import whole_copy
from src.data.sources.base import Example, check_same, digest_of, some
from src.data.sources.listed import Listed, Totals, parse_images, parse_labels

DOGS_COUNTS = Totals(classes=120, train=12_000, valid=8_580)
BIRDS_COUNTS = Totals(classes=200, train=5_994, valid=5_794)
AIRCRAFT_COUNTS = Totals(classes=100, train=6_667, valid=3_333)
FOOD_COUNTS = Totals(classes=251, train=118_475, valid=11_994, test=28_377)

BANNER = 20  # pixels at the bottom of every aircraft, which name the photographer


class StanfordDogs(Listed):
    """Stanford Dogs (Khosla et al. 2011): `Images/<wnid>-<name>/*.jpg`, `train_list.mat`, `test_list.mat`.

    The lists may be in a folder `lists/`. Classes are numbered by their sorted wnids.
    """

    name = "stanford-dogs"
    marks = ("train_list.mat", "test_list.mat", "lists/*_list.mat", "Images/n[0-9]*-*")
    lists = "train_list.mat and test_list.mat"
    remedy = whole_copy("download_dogs")

    @functools.cached_property
    def breeds(self) -> dict[str, str]:
        """Wnid -> name, from the folders' names, sorted by wnid."""
        folders = sorted({image.split("/")[1] for image in self.present(set())})
        if wrong := [folder for folder in folders if not re.fullmatch(r"n\d{8}-.+", folder)]:
            raise self.error(f"{len(wrong)} names in Images/ are not `<wnid>-<name>`: {some(wrong)}")
        wnids = Counter(folder.partition("-")[0] for folder in folders)
        if twice := [folder for folder in folders if wnids[folder.partition("-")[0]] > 1]:
            raise self.error(f"folders in Images/ share a wnid: {some(twice)}")
        return {wnid: name for wnid, _, name in (folder.partition("-") for folder in folders)}

    @functools.cached_property
    def wnids(self) -> tuple[str, ...]:
        return tuple(self.breeds)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(name.replace("_", " ") for name in self.breeds.values())

    def present(self, listed: set[str]) -> Iterable[str]:
        return self.tree.images("Images")

    def rows(self) -> list[tuple[str, str, str]]:
        splits = {"train": "train_list.mat", "valid": "test_list.mat"}
        return [
            (f"Images/{file}", file.partition("-")[0], split)
            for split, name in splits.items()
            for file in self._file_list(name)
        ]

    def _file_list(self, name: str) -> list[str]:
        """The images that a MATLAB file lists, relative to `Images/`."""
        import scipy.io

        place = next((p for p in (name, f"lists/{name}") if p in self.tree.files), None)
        if place is None:
            raise self.error(f"there is no {name}, neither here nor in lists/")
        try:
            cells = scipy.io.loadmat(io.BytesIO(self.tree.read(place)))["file_list"]
            return [str(cell.item()) for cell in cells.ravel()]
        except Exception as error:  # scipy raises nearly everything on damaged bytes
            reason = f"{type(error).__name__}: {str(error)[:120]}"
            raise self.error(f"{place} cannot be read for its `file_list` ({reason})") from error


class Cub200(Listed):
    """CUB-200-2011 (Wah et al. 2011): `images.txt`, `image_class_labels.txt`, `train_test_split.txt` and
    `classes.txt`, each "id value", and `images/<ccc.Name>/*.jpg`. Classes are numbered as `classes.txt` does.
    """

    name = "cub-200-2011"
    marks = ("image_class_labels.txt", "train_test_split.txt")
    lists = "images.txt"
    remedy = whole_copy("download_birds")

    @functools.cached_property
    def wnids(self) -> tuple[str, ...]:
        return self.numbered("classes.txt", first=1)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(re.sub(r"^\d+\.", "", wnid).replace("_", " ") for wnid in self.wnids)

    def present(self, listed: set[str]) -> Iterable[str]:
        return self.tree.images("images")

    def rows(self) -> list[tuple[str, str, str]]:
        images, labels = self.pairs("images.txt"), self.pairs("image_class_labels.txt")
        splits = self.pairs("train_test_split.txt")
        for name, ids in (("image_class_labels.txt", labels), ("train_test_split.txt", splits)):
            check_same("image ids", {"images.txt": images, name: ids}, self.tree.root, self.remedy)
        classes = {str(number): wnid for number, wnid in enumerate(self.wnids, start=1)}
        rows = []
        for key, image in images.items():
            wnid, split = classes.get(labels[key]), {"1": "train", "0": "valid"}.get(splits[key])
            if wnid is None:
                raise self.error(
                    f"image_class_labels.txt: image {key} has class {labels[key]!r}, not 1 to {len(classes)}"
                )
            if split is None:
                raise self.error(f"train_test_split.txt: image {key} has {splits[key]!r}, not 0 or 1")
            if image.split("/")[0] != wnid:
                raise self.error(f"image {key} is {image!r} in images.txt, but its class is {wnid!r}")
            rows.append((f"images/{image}", wnid, split))
        return rows


class FgvcAircraft(Listed):
    """FGVC-Aircraft (Maji et al. 2013), variants: `data/images/*.jpg`, `data/images_variant_trainval.txt` and
    `data/images_variant_test.txt`, each "id name", and perhaps `data/variants.txt`, whose names must be the
    same. Classes are numbered by their sorted names. Images are read without the banner at their bottom.
    """

    name = "fgvc-aircraft"
    marks = ("data/images_variant_trainval.txt", "data/images_variant_test.txt", "data/variants.txt")
    lists = "data/images_variant_trainval.txt and data/images_variant_test.txt"
    remedy = (
        "Get a whole copy: unpack https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/"
        "fgvc-aircraft-2013b.tar.gz (2.75 GB; no checksum is published)."
    )

    @functools.cached_property
    def wnids(self) -> tuple[str, ...]:
        return tuple(sorted({wnid for _, wnid, _ in self.rows()}))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.wnids

    def present(self, listed: set[str]) -> Iterable[str]:
        return self.tree.images("data/images")

    def rows(self) -> list[tuple[str, str, str]]:
        rows = [
            (f"data/images/{key}.jpg", variant, split)
            for split, part in (("train", "trainval"), ("valid", "test"))
            for key, variant in self.pairs(f"data/images_variant_{part}.txt").items()
        ]
        if "data/variants.txt" in self.tree.files:
            variants = [line.strip() for line in self.text("data/variants.txt").split("\n") if line.strip()]
            names = {"data/variants.txt": variants, "the lists": [variant for _, variant, _ in rows]}
            check_same("variants", names, self.tree.root, self.remedy)
        return rows

    def read(self, image: str) -> bytes:
        """The picture above the banner, uncompressed: the bytes live only until they are decoded."""
        from src.data.store import upright_rgb  # which needs this package

        whole = upright_rgb(self.tree.read(image))
        if whole.height <= BANNER:
            raise ValueError(f"{whole.height} pixels high, of which {BANNER} are a banner")
        buffer = io.BytesIO()
        whole.crop((0, 0, whole.width, whole.height - BANNER)).save(buffer, "PPM")
        return buffer.getvalue()


class BirdsAndAircraft:
    """CUB-200-2011 and FGVC-Aircraft as one data set: the birds' classes first, then the aircraft's."""

    name = "cub-aircraft"

    def __init__(self, birds: Cub200, aircraft: FgvcAircraft):
        self.birds, self.aircraft = birds, aircraft

    @functools.cached_property
    def wnids(self) -> tuple[str, ...]:
        return self.birds.wnids + self.aircraft.wnids

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        return self.birds.class_names + self.aircraft.class_names

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest_of(self.birds.fingerprint, self.aircraft.fingerprint)

    def examples(self) -> list[Example]:
        birds = [replace(e, image_id=f"birds/{e.image_id}") for e in self.birds.examples()]
        first = len(self.birds.wnids)
        aircraft = [
            replace(e, image_id=f"aircraft/{e.image_id}", label=first + e.label)
            for e in self.aircraft.examples()
        ]
        return birds + aircraft


class FoodX251(Listed):
    """FoodX-251 (Kaur et al. 2019): `class_list.txt` ("index name"), `train_info.csv` and `val_info.csv`
    ("img,label"; or Kaggle's `train_labels.csv` and `val_labels.csv` with a header), images in `train_set/`
    and `val_set/` (or `train/`, `val/`), and perhaps `test_set/`, unlabelled, with `test_info.csv`.

    Classes are numbered as `class_list.txt` does. Images that no list names are left out: the authors' own
    description counts more images than the lists.
    """

    name = "foodx-251"
    marks = ("class_list.txt", "train_info.csv", "val_info.csv", "train_set")
    lists = "its CSV files"
    remedy = whole_copy("download_food")

    @functools.cached_property
    def wnids(self) -> tuple[str, ...]:
        return self.numbered("class_list.txt", first=0)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(wnid.replace("_", " ") for wnid in self.wnids)

    def present(self, listed: set[str]) -> Iterable[str]:
        return listed & self.tree.files.keys()

    def rows(self) -> list[tuple[str, str, str]]:
        rows = []
        for split, part in (("train", "train"), ("valid", "val")):
            file = f"{part}_labels.csv" if f"{part}_labels.csv" in self.tree.files else f"{part}_info.csv"
            place = f"{self.tree.root / file}"
            labels = parse_labels(self.text(file), place, len(self.wnids), self.remedy)
            folder = self._folder(part)
            rows += [(f"{folder}/{image}", self.wnids[label], split) for image, label in labels.items()]
        return rows + [(image, "", "test") for image in self._unlabelled()]

    def _folder(self, part: str) -> str:
        return next((f for f in (f"{part}_set", part) if self.tree.images(f)), f"{part}_set")

    def _unlabelled(self) -> list[str]:
        """The test images: those of `test_info.csv`, or all that are there; none where there is no image."""
        folder, file = self._folder("test"), "test_info.csv"
        images = self.tree.images(folder)
        if not images or file not in self.tree.files:
            return images
        names = parse_images(self.text(file), f"{self.tree.root / file}", self.remedy)
        return [f"{folder}/{name}" for name in names]
