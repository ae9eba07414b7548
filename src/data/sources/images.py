"""Your own images in class folders, and scikit-learn's digits."""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from src import SetupError
from src.data.sources.base import (
    FIFTH,
    Example,
    check_same,
    digest_of,
    hold_out,
    imagenet_names,
    name_of,
    some,
)
from src.data.sources.tiny_imagenet import VALID_FOLDERS
from src.data.sources.trees import (
    FORMATS,
    IMAGE_SUFFIXES,
    FolderTree,
    is_hidden,
    is_image,
    missed_images,
    subfolders,
)

ANIMALS_SHARE = 0.15
LOOKED_AT = 8, 4  # class folders, and images of each, whose sizes tell the others'
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class ImageFolder:
    """Your own images: `train/<class>/` and optionally `valid/<class>/` (or `val/`), or just `<class>/`.

    Images right below `test/` are the unlabelled split `test`. Images at any depth below a class folder are
    of that class, as in torchvision. Classes are numbered by their sorted names.
    Without validation images a part of each class becomes the official split `valid`: a fifth, or 15 % where
    there are `train/<class>/` and unlabelled images. That is the layout of the 40 animals of the VLG
    Recruitment Challenge '24, and the share that their study held out.
    """

    def __init__(self, path: Path):
        self.tree = FolderTree(path)
        self.name = name_of(Path(path))
        self.images: dict[str, dict[str, str]] = defaultdict(dict)  # split -> name -> class
        self.unlabelled = [n for n in self.tree.images("test") if n.count("/") == 1]
        self.has_train = "train" in self.tree.folders
        for name in filter(is_image, self.tree.files):
            split, folder, file = self._place(name)
            if split and file:
                self.images[split][name] = folder
        self.wnids = tuple(sorted(set(self.images["train"].values())))

    def _place(self, name: str) -> tuple[str, str, str]:
        """Split, class folder and the rest of a labelled file's name; no split for any other file."""
        top, _, rest = name.partition("/")
        folder, _, file = (rest if self.has_train else name).partition("/")
        if not self.has_train:
            return "train" if top != "test" else "", folder, file
        split = "valid" if top in VALID_FOLDERS else "train" if top == "train" else ""
        return split, folder, file

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest_of("images", *self.tree.files.items())

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        all_wnids = all(re.fullmatch(r"n\d{8}", name) for name in self.wnids)
        return imagenet_names(self.wnids) if all_wnids else self.wnids

    def examples(self) -> list[Example]:
        """Every image. Raises `SetupError` where folders and names leave open what is which."""
        self._check_splits()
        self._check_classes()
        self._check_files()
        index = {wnid: label for label, wnid in enumerate(self.wnids)}
        examples = [
            Example(name, index[folder], split, functools.partial(self.tree.read, name))
            for split, images in self.images.items()
            for name, folder in images.items()
        ]
        if not self.images["valid"]:
            share = ANIMALS_SHARE if self.has_train and self.unlabelled else FIFTH
            examples = hold_out(examples, share)
        test = [Example(n, -1, "test", functools.partial(self.tree.read, n)) for n in self.unlabelled]
        return examples + test

    def error(self, problem: str, names: Sequence[str], remedy: str) -> SetupError:
        return SetupError(f"{self.tree.root}: {problem}: {some(names)}. {remedy}")

    def _check_splits(self) -> None:
        """Raise `SetupError` where it is open which folder is which split."""
        top = sorted(folder for folder in self.tree.folders if "/" not in folder)
        valid = [folder for folder in top if folder in VALID_FOLDERS]
        if valid and not self.has_train:
            raise self.error("there is a folder of validation images, but no train/", valid, "Add train/.")
        if len(valid) > 1:
            raise self.error("there are several folders of validation images", valid, "Keep one of them.")
        known = ("train", "test", *VALID_FOLDERS)
        like = [folder for folder in top if folder.lower() in known and folder not in known]
        if like and self.has_train:
            raise self.error("folders that look like splits are not read", like, "Write them small.")

    def _check_classes(self) -> None:
        """Raise `SetupError` for classes that are not the same in all splits, or not clearly apart."""
        splits = ("train", "valid") if self.images["valid"] else ("train",)
        used = {split: set(self.images[split].values()) for split in splits}
        alike = defaultdict(set)
        for name in set().union(*used.values()):
            alike[unicodedata.normalize("NFC", name).casefold().strip()].add(name)
        if same := [ascii(name) for names in alike.values() if len(names) > 1 for name in sorted(names)]:
            remedy = "Give each class one name, in one way of writing."
            raise self.error("classes differ by case, blanks or the encoding of letters alone", same, remedy)
        if "valid" in used:
            check_same("classes", used, self.tree.root, "Each class needs a folder with images in both.")
        depth = 1 if self.has_train else 0
        folders = {name for name in self.tree.folders if name.count("/") == depth and self._place(name)[0]}
        full = {"/".join(name.split("/")[: depth + 1]) for images in self.images.values() for name in images}
        if empty := sorted(folders - full):
            suffixes = " ".join(IMAGE_SUFFIXES)
            raise self.error(f"class folders without images ({suffixes})", empty, "Fill or remove them.")
        if "valid" not in used and (valid := [f for f in self.tree.folders if f in VALID_FOLDERS]):
            raise self.error("there are no images in class folders of", valid, "Fill or remove the folder.")
        if len(self.wnids) < 2:
            raise SetupError(f"{self.tree.root}: two class folders are needed, found {list(self.wnids)}.")

    def _check_files(self) -> None:
        """Raise `SetupError` for images that would be left out, or given a class that they may not have."""
        places = {name: self._place(name) for name in self.tree.files}
        loose = [n for n, (split, _, file) in places.items() if split and not file and is_image(n)]
        if loose:
            raise self.error(f"{len(loose)} images are in no class folder", loose, "Move or remove them.")
        classes, nested = set(self.wnids), []
        for images in self.images.values():
            nested += [n for n, own in images.items() if classes & set(n.split("/")[1:-1]) - {own}]
        if nested:
            problem = f"{len(nested)} images are below the folders of two classes"
            raise self.error(problem, nested, "Move each class folder out of the other.")
        others = [n for n, (split, _, file) in places.items() if split and file and not is_image(n)]
        if missed := missed_images(self.tree.root, others):
            remedy = f"Rename or convert them to one of {' '.join(IMAGE_SUFFIXES)}, or remove them."
            raise self.error(f"{len(missed)} files are images, but not by their names", missed, remedy)


def usual_side(path: Path) -> float:
    """Pixels of the shorter side of the images in a folder of class folders: the median of a few.

    Of the first classes by name the first images; unreadable ones are passed over, 0 where all are.
    """
    from PIL import Image

    n_classes, n_images = LOOKED_AT
    sides = []
    for folder in subfolders(path / "train" if (path / "train").is_dir() else path)[:n_classes]:
        for file in itertools.islice(_images_below(folder), n_images):
            try:
                with Image.open(file, formats=FORMATS) as image:
                    sides.append(min(image.size))
            except Exception:  # Pillow's plugins raise nearly everything on damaged bytes
                continue
    return median(sides) if sides else 0


def _images_below(folder: Path) -> Iterator[Path]:
    """The images below a folder, by name, found as they are asked for."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(place, name) for name in sorted(names) if is_image(name) and not is_hidden(name))


class Digits:
    """scikit-learn's 1,797 grey 8x8 digits (bundled, no network), enlarged to 64x64 (bicubic)."""

    name = "digits"
    wnids = tuple("0123456789")
    class_names = DIGIT_NAMES
    size = 64

    @functools.cached_property
    def fingerprint(self) -> str:
        import sklearn

        return digest_of("digits", sklearn.__version__, self.size, "bicubic")

    def examples(self) -> list[Example]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return hold_out(
            Example(f"digit/{i:04d}", int(label), "train", functools.partial(self._png, grey_HW))
            for i, (grey_HW, label) in enumerate(zip(digits.images, digits.target, strict=True))
        )

    def _png(self, grey_HW) -> bytes:
        """PNG of an 8x8 array with values 0 to 16."""
        from PIL import Image

        image = Image.fromarray((grey_HW * (255 / 16)).round().astype("uint8"))
        buffer = io.BytesIO()
        image.resize((self.size, self.size), Image.Resampling.BICUBIC).save(buffer, "PNG")
        return buffer.getvalue()
