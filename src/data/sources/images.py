"""Your own images in class folders, and scikit-learn's digits."""

from __future__ import annotations

import functools
import io
import re
from collections import defaultdict
from pathlib import Path

from src import SetupError
from src.data.sources.base import FIFTH, Example, check_same, digest_of, hold_out, imagenet_names
from src.data.sources.tiny_imagenet import VALID_FOLDERS
from src.data.sources.trees import FolderTree, is_image

ANIMALS_SHARE = 0.15
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class ImageFolder:
    """Your own images: `train/<class>/` and optionally `valid/<class>/` (or `val/`), or just `<class>/`.

    Images right below `test/` are the unlabelled split `test`. Classes are numbered by their sorted names.
    Without validation images a part of each class becomes the official split `valid`: a fifth, or 15 % where
    there are `train/<class>/` and unlabelled images. That is the layout of the 40 animals of the VLG
    Recruitment Challenge '24, and the share that their study held out.
    """

    def __init__(self, path: Path):
        self.tree = FolderTree(path)
        self.name = re.sub(r"[^a-z0-9]+", "-", Path(path).resolve().name.lower()).strip("-") or "images"
        self.images: dict[str, dict[str, str]] = defaultdict(dict)  # split -> name -> class
        self.unlabelled = [n for n in self.tree.images("test") if n.count("/") == 1]
        self.has_train = any(n.startswith("train/") for n in self.tree.files)
        for name in filter(is_image, self.tree.files):
            top, _, rest = name.partition("/")
            folder, _, file = (rest if self.has_train else name).partition("/")
            split = "valid" if self.has_train and top in VALID_FOLDERS else "train"
            is_labelled = split == "valid" or (top == "train" if self.has_train else top != "test")
            if file and is_labelled:
                self.images[split][name] = folder
        self.wnids = tuple(sorted(set(self.images["train"].values())))

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest_of("images", *self.tree.files.items())

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        all_wnids = all(re.fullmatch(r"n\d{8}", name) for name in self.wnids)
        return imagenet_names(self.wnids) if all_wnids else self.wnids

    def examples(self) -> list[Example]:
        if len(self.wnids) < 2:
            raise SetupError(f"{self.tree.root}: two class folders are needed, found {list(self.wnids)}.")
        if self.images["valid"]:
            used = {split: images.values() for split, images in self.images.items()}
            check_same("classes", used, self.tree.root, "Each class needs a folder with images in both.")
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
