"""Tiny-ImageNet: parquet shards, the hub, the original folder and its zip."""

from __future__ import annotations

import functools
import json
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src import SetupError
from src.data.sources.base import (
    Example,
    check_same,
    digest_of,
    imagenet_names,
    some,
    stat_of,
)
from src.data.sources.trees import FolderTree, check_size, is_hidden, is_image
from src.files import hub_sha256, sha256

HUB_REPO = "zh-plus/tiny-imagenet"
HUB_REVISION = "5a77092c28e51558c5586e9c5eb71a7e17a5e43f"
ZIP_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
ZIP_SIZE = 248_100_043
ZIP_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

VALID_FOLDERS = ("valid", "val", "validation")
TINY_REMEDY = (
    "Get a whole copy: `--set data.source=hub` or `--set data.source=download` fetches it, "
    "`--data DIR` reads one that you have."
)


@dataclass(frozen=True)
class Counts:
    """How many classes, and images a class, a complete data set has."""

    classes: int
    train_per_class: int
    valid_per_class: int


TINY_COUNTS = Counts(classes=200, train_per_class=500, valid_per_class=50)


# ------------------------------------------------------------------------------ Tiny-ImageNet: parquet


class ParquetFolder:
    """Tiny-ImageNet as parquet shards in Hugging Face's schema, in `path` or its `data/` subfolder.

    Columns `image` {bytes, path} and `label`; class names come from the schema's `huggingface` metadata.
    """

    name = "tiny-imagenet"

    def __init__(self, path: Path, counts: Counts):
        self.path, self.counts = Path(path), counts

    @functools.cached_property
    def files(self) -> dict[str, list[Path]]:
        """Split -> its shards, by name."""
        for folder in (self.path, self.path / "data"):
            files = {"train": shards(folder, ("train",)), "valid": shards(folder, VALID_FOLDERS)}
            if files["train"] and files["valid"]:
                return files
        raise SetupError(f"{self.path} lacks train-*.parquet or valid-*.parquet. {TINY_REMEDY}")

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest_of("parquet", *(stat_of(f) for files in self.files.values() for f in files))

    @functools.cached_property
    def schema_names(self) -> list[str]:
        """Class ids in the order in which the files number them."""
        return _class_label_names(self.files["train"][0])

    @functools.cached_property
    def wnids(self) -> tuple[str, ...]:
        return tuple(sorted(self.schema_names))

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        return imagenet_names(self.wnids)

    def examples(self) -> list[Example]:
        index = {wnid: label for label, wnid in enumerate(self.wnids)}
        examples = []
        for split, files in self.files.items():
            row = 0
            for file in files:
                if _class_label_names(file) != self.schema_names:
                    first = self.files["train"][0].name
                    raise SetupError(f"{file} numbers its classes unlike {first}. {TINY_REMEDY}")
                _require_columns(file)
                shard = _Shard(file)
                for i, code in enumerate(shard.labels()):
                    if code is None or not 0 <= code < len(self.schema_names):
                        raise SetupError(f"{file}, row {i}: label {code} is not one of {len(index)} classes.")
                    label, image_id = index[self.schema_names[code]], f"{split}/{row:06d}"
                    examples.append(Example(image_id, label, split, functools.partial(shard.read, i)))
                    row += 1
        check_counts(examples, self.wnids, self.counts, self.path)
        return examples


class HubTinyImageNet(ParquetFolder):
    """Tiny-ImageNet from the Hugging Face hub at a pinned revision, fetched when first listed.

    The fingerprint is the revision, so that a store once built needs no network again.
    """

    fingerprint = HUB_REVISION

    def __init__(self, counts: Counts):
        self.counts = counts

    @functools.cached_property
    def path(self) -> Path:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    HUB_REPO, repo_type="dataset", revision=HUB_REVISION, allow_patterns="data/*.parquet"
                )
            )
        except Exception as error:  # the client raises its own, requests' or httpx's, and OSError
            raise SetupError(
                f"{HUB_REPO}@{HUB_REVISION[:8]} could not be had from the Hugging Face hub: "
                f"{type(error).__name__}: {str(error).strip()[:300]}\n"
                "Anonymous use is rate limited: set HF_TOKEN, or wait and try again. Without a network, set "
                "HF_HUB_OFFLINE=1 with a filled cache, or pass `--data DIR` with a local copy."
            ) from error
        files = sorted(folder.glob("data/*.parquet"))  # of which the client itself compares sizes alone
        if damaged := [file for file in files if hub_sha256(file) not in ("", sha256(file))]:
            places = ", ".join(str(file.resolve()) for file in damaged)
            raise SetupError(
                f"{HUB_REPO}@{HUB_REVISION[:8]}: the SHA-256 of {some([file.name for file in damaged])} "
                f"is not the hub's. Delete {places} and run again."
            )
        return folder


class _Shard:
    """One parquet file; the images' column is read when its first image is."""

    def __init__(self, file: Path):
        self.file, self.lock = file, threading.Lock()
        self.bytes = None

    def labels(self) -> list[int | None]:
        return _read_column(self.file, "label").to_pylist()

    def read(self, row: int) -> bytes:
        import pyarrow.compute as pc

        with self.lock:
            if self.bytes is None:
                self.bytes = pc.struct_field(_read_column(self.file, "image"), "bytes")
        data = self.bytes[row].as_py()
        if data is None:
            raise ValueError("the row holds no image bytes")
        return data


def _read_column(file: Path, column: str):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file, columns=[column])[column]
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise SetupError(f"{file}: column {column!r} cannot be read: {error}. {TINY_REMEDY}") from error


def _schema(file: Path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise SetupError(f"{file} cannot be read as parquet: {error}. {TINY_REMEDY}") from error


def _require_columns(file: Path) -> None:
    """Raise `SetupError` unless `label` is an integer and `image` has encoded `bytes`."""
    from pyarrow import types

    found = {column.name: column.type for column in _schema(file)}
    label, image = found.get("label"), found.get("image")
    is_label = label is not None and types.is_integer(label)
    is_image = image is not None and types.is_struct(image) and image.get_field_index("bytes") >= 0
    if is_image:
        encoded = image.field(image.get_field_index("bytes")).type
        is_image = types.is_binary(encoded) or types.is_large_binary(encoded)
    if not (is_label and is_image):
        columns = ", ".join(f"{name}: {kind}" for name, kind in found.items())
        raise SetupError(
            f"{file} needs the columns image: struct<bytes: binary, ...> and label: int64, "
            f"but has {columns or 'none'}. {TINY_REMEDY}"
        )


def _class_label_names(file: Path) -> list[str]:
    """Names of ClassLabel `label` in the `huggingface` metadata, in any of its spellings."""
    names = None
    try:
        metadata = json.loads((_schema(file).metadata or {}).get(b"huggingface", b"{}"))
        feature = metadata.get("info", metadata).get("features", metadata).get("label", {})
        names = feature.get("class_label", feature).get("names", [])
        if isinstance(names, dict):  # {"0": ..., "1": ...}
            names = [names[key] for key in sorted(names, key=int)]
        good = isinstance(names, list) and all(isinstance(name, str) for name in names)
        good = good and 0 < len(names) == len(set(names))
    except (ValueError, AttributeError, TypeError):  # JSON of another form
        good = False
    if not good:
        raise SetupError(
            f"{file}: the schema's `huggingface` metadata has no ClassLabel names for `label`, or one twice. "
            f"{TINY_REMEDY}"
        )
    return names


def shards(folder: Path, prefixes: Sequence[str]) -> list[Path]:
    """The parquet files in `folder` whose names start with one of the `prefixes`, by name."""
    pattern = re.compile(rf"({'|'.join(prefixes)})(-.*)?\.parquet")
    return sorted(f for f in folder.glob("*.parquet") if pattern.fullmatch(f.name))


# ------------------------------------------------------- Tiny-ImageNet: the original folder and its zip


class ZipTree:
    """`FolderTree`'s view of a zip, names relative to the folder of `wnids.txt`; nothing is extracted."""

    def __init__(self, path: Path):
        self.root, self.lock = Path(path), threading.Lock()
        try:
            self.zip = zipfile.ZipFile(path)
        except Exception as error:  # zipfile raises nearly everything on damaged bytes
            raise SetupError(f"{path} cannot be read as a zip file: {error}. {TINY_REMEDY}") from error
        names = self.zip.namelist()
        if twice := sorted(name for name, n in Counter(names).items() if n > 1 and not name.endswith("/")):
            raise SetupError(f"{path} holds {len(twice)} files twice: {some(twice)}. {TINY_REMEDY}")
        if locked := [info.filename for info in self.zip.infolist() if info.flag_bits & 1]:
            raise SetupError(f"{path} holds {len(locked)} encrypted files: {some(locked)}. {TINY_REMEDY}")
        marker = min((n for n in names if re.search(r"(^|/)wnids\.txt$", n)), key=len, default=None)
        if marker is None:
            raise SetupError(f"{path} holds no wnids.txt, so it is not tiny-imagenet-200. {TINY_REMEDY}")
        self.prefix = marker.removesuffix("wnids.txt")
        inside = (
            n.removeprefix(self.prefix) for n in names if n.startswith(self.prefix) and not n.endswith("/")
        )
        self.files = dict.fromkeys(sorted(n for n in inside if not any(map(is_hidden, n.split("/")))))

    def read(self, name: str) -> bytes:
        with self.lock:  # ZipFile counts its open members without a lock of its own
            info = self.zip.getinfo(self.prefix + name)
            check_size(info.file_size)
            with self.zip.open(info) as member:  # `ZipFile.read` would unpack up to 2 GB of a small claim
                return member.read(info.file_size + 1)


class _TinyImageNetTree:
    """tiny-imagenet-200 as distributed: `wnids.txt` (unsorted), `train/<wnid>/images/`, `val/images/` with
    `val/val_annotations.txt`. Read in place; `test/` is ignored."""

    name = "tiny-imagenet"

    def __init__(self, tree: FolderTree | ZipTree, counts: Counts):
        self.tree, self.counts = tree, counts

    @functools.cached_property
    def wnids(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._text("wnids.txt").split())))

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        text = self._text("words.txt") if "words.txt" in self.tree.files else ""
        words = dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
        return imagenet_names(self.wnids, words)

    def examples(self) -> list[Example]:
        index = {wnid: label for label, wnid in enumerate(self.wnids)}
        labels = {**self._train_wnids(), **self._valid_wnids()}
        folders = {n.split("/")[1] for n in labels if n.startswith("train/")}
        check_same("classes", {"wnids.txt": index, "train/": folders}, self.tree.root, TINY_REMEDY)
        check_same("classes", {"wnids.txt": index, "images": labels.values()}, self.tree.root, TINY_REMEDY)
        split = {True: "train", False: "valid"}
        examples = [
            Example(n, index[w], split[n.startswith("train/")], functools.partial(self.tree.read, n))
            for n, w in labels.items()
        ]
        check_counts(examples, self.wnids, self.counts, self.tree.root)
        return examples

    def _train_wnids(self) -> dict[str, str]:
        parts = (n.split("/") for n in self.tree.files if n.startswith("train/") and is_image(n))
        return {"/".join(p): p[1] for p in parts if len(p) == 4 and p[2] == "images"}

    def _valid_wnids(self) -> dict[str, str]:
        file = "val/val_annotations.txt"
        place = f"{self.tree.root / file}"
        wnids = {f"val/images/{n}": w for n, w in parse_annotations(self._text(file), place).items()}
        images = [n for n in self.tree.files if n.startswith("val/images/") and is_image(n)]
        check_same("images", {file: wnids, "val/images/": images}, self.tree.root, TINY_REMEDY)
        return wnids

    def _text(self, name: str) -> str:
        if name not in self.tree.files:
            raise SetupError(f"{self.tree.root} has no {name}. {TINY_REMEDY}")
        try:
            return self.tree.read(name).decode("utf-8", errors="replace")
        except Exception as error:  # zipfile raises nearly everything on damaged bytes
            place = f"{self.tree.root}: {name}"
            raise SetupError(
                f"{place} cannot be read ({type(error).__name__}: {error}). {TINY_REMEDY}"
            ) from error


class TinyImageNetFolder(_TinyImageNetTree):
    """An unpacked tiny-imagenet-200; see `_TinyImageNetTree`."""

    def __init__(self, path: Path, counts: Counts):
        super().__init__(FolderTree(path), counts)

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest_of("folder", *self.tree.files.items())


class TinyImageNetZip(_TinyImageNetTree):
    """tiny-imagenet-200.zip, never extracted; see `_TinyImageNetTree`."""

    def __init__(self, path: Path, counts: Counts):
        super().__init__(ZipTree(path), counts)

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest_of("zip", stat_of(self.tree.root))


def parse_annotations(text: str, file: str = "val_annotations.txt") -> dict[str, str]:
    """Image name -> wnid from the lines `name<TAB>wnid<TAB>box`.

    Raises `SetupError` naming the line where a field is missing or an image is named twice.
    """
    wnids: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, wnid = ([field.strip() for field in line.split("\t")] + [""])[:2]
        if not name or not wnid:
            raise SetupError(f"{file}, line {number}: {line[:80]!r} is not `name<TAB>wnid`. {TINY_REMEDY}")
        if name in wnids:
            raise SetupError(f"{file}, line {number}: {name!r} is annotated twice. {TINY_REMEDY}")
        wnids[name] = wnid
    return wnids


def check_counts(examples: Sequence[Example], wnids: Sequence[str], counts: Counts, place: Path) -> None:
    """Raise `SetupError` naming the difference unless every class has `counts` images in each split."""
    problems = []
    if len(wnids) != counts.classes:
        problems.append(f"{len(wnids)} classes, expected {counts.classes}")
    per_class = Counter((e.split, e.label) for e in examples)
    for split, expected in (("train", counts.train_per_class), ("valid", counts.valid_per_class)):
        n = [per_class[split, label] for label in range(len(wnids))]
        if sum(n) != expected * counts.classes:
            problems.append(f"{sum(n):,} {split} images, expected {expected * counts.classes:,}")
        wrong = [f"{wnid} has {k}" for wnid, k in zip(wnids, n, strict=True) if k != expected]
        if wrong:
            problems.append(f"not {expected} {split} images in {len(wrong)} classes: {some(wrong, 5)}")
    if problems:
        raise SetupError(f"{place} is not all of Tiny-ImageNet: {'; '.join(problems)}. {TINY_REMEDY}")
