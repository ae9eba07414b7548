"""Data sets whose own files list images, labels and splits; read in place, checked before the first is."""

from __future__ import annotations

import csv
import functools
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from src import SetupError
from src.data.sources.base import Example, check_same, digest_of, some
from src.data.sources.trees import FolderTree


@dataclass(frozen=True)
class Totals:
    """How many classes, and images of all classes together, a complete data set has; `test` is unlabelled."""

    classes: int
    train: int
    valid: int
    test: int = 0


class Listed:
    """A data set in one folder. A subclass gives `wnids`, `class_names` and `rows`.

    `marks`: patterns of files, one of which is enough to tell the layout. `lists`: where images are named.
    The study's test images are `valid`, which is reported on; `test` is for images without a label.
    """

    name: str
    marks: tuple[str, ...]
    lists: str
    remedy: str
    wnids: tuple[str, ...]
    class_names: tuple[str, ...]

    def __init__(self, path: Path, totals: Totals, remedy: str = ""):
        self.tree, self.totals = FolderTree(path), totals
        self.remedy = remedy or self.remedy

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """True where `folder` has one of the layout's files."""
        return any(next(folder.glob(mark), None) is not None for mark in cls.marks)

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest_of(type(self).__name__, *self.tree.files.items())

    def rows(self) -> list[tuple[str, str, str]]:
        """Image, wnid ("" for none) and split of every image that is listed."""
        raise NotImplementedError

    def present(self, listed: set[str]) -> Iterable[str]:
        """Images on the disk, all of which must be `listed`."""
        raise NotImplementedError

    def read(self, image: str) -> bytes:
        return self.tree.read(image)

    def examples(self) -> list[Example]:
        """Every listed image. Raises `SetupError` naming what is missing, listed twice or not listed."""
        rows = self.rows()
        listed = Counter(image for image, _, _ in rows)
        if twice := sorted(image for image, n in listed.items() if n > 1):
            raise self.error(f"{len(twice)} images are listed twice in {self.lists}: {some(twice)}")
        on_disk = self.present(set(listed))
        check_same("images", {self.lists: listed, "the folder": on_disk}, self.tree.root, self.remedy)
        index = {wnid: label for label, wnid in enumerate(self.wnids)}
        examples = [
            Example(image, index[wnid] if wnid else -1, split, functools.partial(self.read, image))
            for image, wnid, split in rows
        ]
        self._check_totals(examples)
        return examples

    def error(self, problem: str) -> SetupError:
        return SetupError(f"{self.tree.root}: {problem}. {self.remedy}")

    def text(self, name: str) -> str:
        """Content of one of the data set's own files. Raises `SetupError` where there is none."""
        if name not in self.tree.files:
            raise self.error(f"there is no {name}")
        try:
            return self.tree.read(name).decode("utf-8-sig", errors="replace")
        except (OSError, ValueError) as error:  # a link that leads nowhere, a file without end
            raise self.error(f"{name} cannot be read ({error})") from error

    def pairs(self, name: str) -> dict[str, str]:
        """`parse_pairs` of a file."""
        return parse_pairs(self.text(name), f"{self.tree.root / name}", self.remedy)

    def numbered(self, name: str, first: int) -> tuple[str, ...]:
        """Class names from a file of "number name", in the order of their numbers, which start at `first`."""
        names = self.pairs(name)
        numbers = [str(first + k) for k in range(len(names))]
        if wrong := sorted(set(names) - set(numbers)):
            last = first + len(names) - 1
            raise self.error(
                f"{name} has {len(names)} classes, but numbers beside {first} to {last}: {some(wrong)}"
            )
        if twice := sorted(wnid for wnid, n in Counter(names.values()).items() if n > 1):
            raise self.error(f"{name} gives one name to several classes: {some(twice)}")
        return tuple(names[number] for number in numbers)

    def _check_totals(self, examples: list[Example]) -> None:
        """Raise `SetupError` naming every number that is not `totals`', and classes without images."""
        splits = Counter(e.split for e in examples)
        numbers = [
            ("classes", len(self.wnids), self.totals.classes),
            ("train images", splits["train"], self.totals.train),
            ("valid images", splits["valid"], self.totals.valid),
        ]
        if splits["test"]:
            numbers.append(("test images", splits["test"], self.totals.test))
        problems = [f"{n:,} {what}, expected {wanted:,}" for what, n, wanted in numbers if n != wanted]
        for split in ("train", "valid"):
            used = {e.label for e in examples if e.split == split}
            empty = [wnid for label, wnid in enumerate(self.wnids) if label not in used]
            if empty:
                problems.append(f"{len(empty)} classes without {split} images: {some(empty)}")
        if problems:
            raise self.error(f"this is not all of {self.name}: {'; '.join(problems)}")


def parse_pairs(text: str, file: str, remedy: str = "") -> dict[str, str]:
    """Id -> value from lines `id value`; a value may hold blanks.

    Raises `SetupError` naming the line where a value is missing or an id comes twice.
    """
    values: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        key, value = (line.split(maxsplit=1) + [""])[:2]
        if not value:
            raise SetupError(f"{file}, line {number}: {line.strip()[:80]!r} is not `id value`. {remedy}")
        if key in values:
            raise SetupError(f"{file}, line {number}: id {key[:80]!r} comes twice. {remedy}")
        values[key] = value.strip()
    return values


def parse_labels(text: str, file: str, n_classes: int, remedy: str = "") -> dict[str, int]:
    """Image name -> label from CSV lines `img,label`, with or without a header that begins with `img`.

    Raises `SetupError` naming the line that is no such pair, has a label outside 0 to `n_classes` - 1, or
    names an image for the second time.
    """
    labels: dict[str, int] = {}
    for number, row in _csv_rows(text, file, remedy):
        if not labels and row in (["img", "label"], ["img_name", "label"]):
            continue
        where = f"{file}, line {number}:"
        if len(row) != 2 or not row[0]:
            raise SetupError(f"{where} {','.join(row)[:80]!r} is not `img,label`. {remedy}")
        image, label = row
        if not (label.isascii() and label.isdigit() and len(label) < 9 and int(label) < n_classes):
            raise SetupError(
                f"{where} label {label[:80]!r} of {image[:80]!r} is not one of 0 to {n_classes - 1}. {remedy}"
            )
        if image in labels:
            raise SetupError(f"{where} image {image[:80]!r} comes twice. {remedy}")
        labels[image] = int(label)
    return labels


def parse_images(text: str, file: str, remedy: str = "") -> list[str]:
    """Image names from CSV lines `img`, with or without a header. Raises `SetupError` for anything else."""
    names = []
    for number, row in _csv_rows(text, file, remedy):
        if not names and row in (["img"], ["img_name"]):
            continue
        if len(row) != 1 or not row[0]:
            raise SetupError(f"{file}, line {number}: {','.join(row)[:80]!r} is not one image. {remedy}")
        names.append(row[0])
    return names


def _csv_rows(text: str, file: str, remedy: str) -> Iterable[tuple[int, list[str]]]:
    """Line number and stripped fields of every line that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            if any(fields := [field.strip() for field in row]):
                yield reader.line_num, fields
    except csv.Error as error:
        raise SetupError(f"{file}, line {reader.line_num}: {error}. {remedy}") from error
