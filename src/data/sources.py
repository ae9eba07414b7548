"""Where images and labels are: one small class a data set, yielding encoded bytes.

No pixels are decoded here. A source lists `Example`s; `src.data.store` reads and decodes each once.
Listing checks the whole layout, so a missing, half or mislabelled data set never reaches training.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import threading
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from src import SetupError
from src.config import DataConfig
from src.data.download import download

HUB_REPO = "zh-plus/tiny-imagenet"
HUB_REVISION = "5a77092c28e51558c5586e9c5eb71a7e17a5e43f"
ZIP_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
ZIP_SIZE = 248_100_043
ZIP_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
VALID_FOLDERS = ("valid", "val", "validation")
MAX_FILE_BYTES = 256 * 2**20  # no single image is larger: bounds what a crafted archive may unpack
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

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


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled image; `split` is `train`, `valid` or `test` (label -1); `read` gives encoded bytes."""

    image_id: str
    label: int
    split: str
    read: Callable[[], bytes]


class Source(Protocol):
    """A data set: `wnids[label]` is a class's id, `class_names[label]` what people read.

    `fingerprint` (hex) changes with the files; it is cheap, while `examples` lists and checks them all.
    """

    name: str
    wnids: tuple[str, ...]
    class_names: tuple[str, ...]
    fingerprint: str

    def examples(self) -> list[Example]: ...


def open_source(config: DataConfig, cache_dir: Path) -> Source:
    """The source that `config.source` and `config.path` name; downloads go below `cache_dir`.

    Raises `SetupError` for a missing path, an unknown layout or a failed download.
    """
    if config.source == "hub":
        return HubTinyImageNet()
    if config.source == "digits":
        return Digits()
    if config.source == "download":
        path = Path(cache_dir) / "tiny-imagenet-200.zip"
        download(ZIP_URL, path, ZIP_SIZE, ZIP_MD5)
        return TinyImageNetZip(path)
    if not config.path:
        raise SetupError(
            "data.source = 'local' needs a directory: pass `--data DIR` or set the environment variable "
            "TINY_IMAGENET_DIR."
        )
    return open_local(Path(config.path).expanduser())


def open_local(path: Path) -> Source:
    """The source whose layout `path` has: zip, parquet, tiny-imagenet-200 or class folders."""
    if not path.exists():
        raise SetupError(f"{path} does not exist. Pass `--data DIR` naming a directory or zip file.")
    if path.is_file():
        return TinyImageNetZip(path)
    if any(_shards(folder, ("train",)) for folder in (path, path / "data")):
        return ParquetFolder(path)
    for folder in (path, path / "tiny-imagenet-200"):
        if (folder / "wnids.txt").is_file() and (folder / "train").is_dir():
            return TinyImageNetFolder(folder)
    found = sorted(entry.name for entry in os.scandir(path) if not _hidden(entry.name))
    if (path / "train").is_dir() or _has_class_folders(path):
        return ImageFolder(path)
    raise SetupError(
        f"{path} has no layout that is known. Looked for: train-*.parquet and valid-*.parquet (here or in "
        "data/); wnids.txt, train/ and val/ (tiny-imagenet-200, here or in a folder of that name); "
        f"train/<class>/ or <class>/ with images ({' '.join(IMAGE_SUFFIXES)}). "
        f"Found: {_some(found) if found else 'an empty directory'}."
    )


# ------------------------------------------------------------------------------ Tiny-ImageNet: parquet


class ParquetFolder:
    """Tiny-ImageNet as parquet shards in Hugging Face's schema, in `path` or its `data/` subfolder.

    Columns `image` {bytes, path} and `label`; class names come from the schema's `huggingface` metadata.
    """

    name = "tiny-imagenet"

    def __init__(self, path: Path, counts: Counts | None = None):
        self.path, self.counts = Path(path), counts or TINY_COUNTS

    @functools.cached_property
    def files(self) -> dict[str, list[Path]]:
        """Split -> its shards, by name."""
        for folder in (self.path, self.path / "data"):
            files = {"train": _shards(folder, ("train",)), "valid": _shards(folder, VALID_FOLDERS)}
            if files["train"] and files["valid"]:
                return files
        raise SetupError(f"{self.path} lacks train-*.parquet or valid-*.parquet. {TINY_REMEDY}")

    @functools.cached_property
    def fingerprint(self) -> str:
        return _hash("parquet", *(_stat(f.name, f) for files in self.files.values() for f in files))

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

    def __init__(self, counts: Counts | None = None):
        self.counts = counts or TINY_COUNTS

    @functools.cached_property
    def path(self) -> Path:
        from huggingface_hub import snapshot_download

        try:
            return Path(
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


def _class_label_names(file: Path) -> list[str]:
    """Names of ClassLabel `label` in the `huggingface` metadata, in any of its spellings."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = json.loads((pyarrow.parquet.read_schema(file).metadata or {}).get(b"huggingface", b"{}"))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise SetupError(f"{file} cannot be read as parquet: {error}. {TINY_REMEDY}") from error
    feature = metadata.get("info", metadata).get("features", metadata).get("label", {})
    names = feature.get("class_label", feature).get("names", [])
    if isinstance(names, dict):  # {"0": ..., "1": ...}
        names = [names[key] for key in sorted(names, key=int)]
    if not names or len(set(names)) != len(names):
        raise SetupError(
            f"{file}: the schema's `huggingface` metadata has no ClassLabel names for `label`, or one twice."
        )
    return names


def _shards(folder: Path, prefixes: Sequence[str]) -> list[Path]:
    pattern = re.compile(rf"({'|'.join(prefixes)})(-.*)?\.parquet")
    return sorted(f for f in folder.glob("*.parquet") if pattern.fullmatch(f.name))


# ------------------------------------------------------- Tiny-ImageNet: the original folder and its zip


class FolderTree:
    """Files below a folder, hidden ones left out: relative name -> (size, mtime in ns)."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.files = dict(sorted(_scan(self.root)))

    def read(self, name: str) -> bytes:
        if self.files[name][0] > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        return (self.root / name).read_bytes()


class ZipTree:
    """The same view of a zip, names relative to the folder of `wnids.txt`; nothing is extracted."""

    def __init__(self, path: Path):
        self.root, self.lock = Path(path), threading.Lock()
        try:
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise SetupError(f"{path} cannot be read as a zip file: {error}. {TINY_REMEDY}") from error
        names = self.zip.namelist()
        marker = min((n for n in names if re.search(r"(^|/)wnids\.txt$", n)), key=len, default=None)
        if marker is None:
            raise SetupError(f"{path} holds no wnids.txt, so it is not tiny-imagenet-200. {TINY_REMEDY}")
        self.prefix = marker.removesuffix("wnids.txt")
        inside = (n.removeprefix(self.prefix) for n in names if n.startswith(self.prefix) and n[-1] != "/")
        self.files = dict.fromkeys(sorted(n for n in inside if not any(map(_hidden, n.split("/")))))

    def read(self, name: str) -> bytes:
        with self.lock:  # ZipFile counts its open members without a lock of its own
            info = self.zip.getinfo(self.prefix + name)
            if info.file_size > MAX_FILE_BYTES:
                raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
            return self.zip.read(info)


class _TinyImageNetTree:
    """tiny-imagenet-200 as distributed: `wnids.txt` (unsorted), `train/<wnid>/images/`, `val/images/` with
    `val/val_annotations.txt`. Read in place; `test/` is ignored."""

    name = "tiny-imagenet"

    def __init__(self, tree: FolderTree | ZipTree, counts: Counts | None = None):
        self.tree, self.counts = tree, counts or TINY_COUNTS

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
        _same("classes", {"wnids.txt": index, "train/": folders}, self.tree.root, TINY_REMEDY)
        _same("classes", {"wnids.txt": index, "images": labels.values()}, self.tree.root, TINY_REMEDY)
        split = {True: "train", False: "valid"}
        examples = [
            Example(n, index[w], split[n.startswith("train/")], functools.partial(self.tree.read, n))
            for n, w in labels.items()
        ]
        check_counts(examples, self.wnids, self.counts, self.tree.root)
        return examples

    def _train_wnids(self) -> dict[str, str]:
        parts = (n.split("/") for n in self.tree.files if n.startswith("train/") and _is_image(n))
        return {"/".join(p): p[1] for p in parts if len(p) == 4 and p[2] == "images"}

    def _valid_wnids(self) -> dict[str, str]:
        file = "val/val_annotations.txt"
        wnids = {f"val/images/{n}": w for n, w in parse_annotations(self._text(file), file).items()}
        images = [n for n in self.tree.files if n.startswith("val/images/") and _is_image(n)]
        _same("images", {file: wnids, "val/images/": images}, self.tree.root, TINY_REMEDY)
        return wnids

    def _text(self, name: str) -> str:
        if name not in self.tree.files:
            raise SetupError(f"{self.tree.root} has no {name}. {TINY_REMEDY}")
        return self.tree.read(name).decode("utf-8", errors="replace")


class TinyImageNetFolder(_TinyImageNetTree):
    """An unpacked tiny-imagenet-200; see `_TinyImageNetTree`."""

    def __init__(self, path: Path, counts: Counts | None = None):
        super().__init__(FolderTree(path), counts)

    @functools.cached_property
    def fingerprint(self) -> str:
        return _hash("folder", *self.tree.files.items())


class TinyImageNetZip(_TinyImageNetTree):
    """tiny-imagenet-200.zip, never extracted; see `_TinyImageNetTree`."""

    def __init__(self, path: Path, counts: Counts | None = None):
        super().__init__(ZipTree(path), counts)

    @functools.cached_property
    def fingerprint(self) -> str:
        return _hash("zip", _stat(self.tree.root.name, self.tree.root))


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


# ------------------------------------------------------------------------- own images, and the digits


class ImageFolder:
    """Your own images: `train/<class>/` and optionally `valid/<class>/` (or `val/`), or just `<class>/`.

    Without a folder of validation images a fifth of each class becomes the official split `valid`.
    """

    def __init__(self, path: Path):
        self.tree = FolderTree(path)
        self.name = re.sub(r"[^a-z0-9]+", "-", Path(path).resolve().name.lower()).strip("-") or "images"
        self.images: dict[str, dict[str, str]] = defaultdict(dict)  # split -> name -> class
        has_train = any(n.startswith("train/") for n in self.tree.files)
        for name in filter(_is_image, self.tree.files):
            top, _, rest = name.partition("/")
            folder, _, file = (rest if has_train else name).partition("/")
            split = "valid" if has_train and top in VALID_FOLDERS else "train"
            if file and (split == "valid" or not has_train or top == "train"):
                self.images[split][name] = folder
        self.wnids = tuple(sorted(set(self.images["train"].values())))

    @functools.cached_property
    def fingerprint(self) -> str:
        return _hash("images", *self.tree.files.items())

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        all_wnids = all(re.fullmatch(r"n\d{8}", name) for name in self.wnids)
        return imagenet_names(self.wnids) if all_wnids else self.wnids

    def examples(self) -> list[Example]:
        if len(self.wnids) < 2:
            raise SetupError(f"{self.tree.root}: two class folders are needed, found {list(self.wnids)}.")
        if self.images["valid"]:
            used = {split: images.values() for split, images in self.images.items()}
            _same("classes", used, self.tree.root, "Each class needs a folder with images in both.")
        index = {wnid: label for label, wnid in enumerate(self.wnids)}
        examples = [
            Example(name, index[folder], split, functools.partial(self.tree.read, name))
            for split, images in self.images.items()
            for name, folder in images.items()
        ]
        return examples if self.images["valid"] else hold_out_fifth(examples)


class Digits:
    """scikit-learn's 1,797 grey 8x8 digits (bundled, no network), enlarged to 64x64 (bicubic)."""

    name = "digits"
    wnids = tuple("0123456789")
    class_names = DIGIT_NAMES
    size = 64

    @functools.cached_property
    def fingerprint(self) -> str:
        import sklearn

        return _hash("digits", sklearn.__version__, self.size, "bicubic")

    def examples(self) -> list[Example]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return hold_out_fifth(
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


def hold_out_fifth(examples: Iterable[Example]) -> list[Example]:
    """The examples with a fifth of each class (at least one of two) marked `valid`, chosen by hashed id."""
    by_class = defaultdict(list)
    for example in examples:
        by_class[example.label].append(example)
    out = []
    for label in sorted(by_class):
        ranked = sorted(by_class[label], key=lambda e: _hash(e.image_id))
        n_valid = max(round(len(ranked) / 5), int(len(ranked) > 1))
        out += [replace(e, split="valid" if rank < n_valid else "train") for rank, e in enumerate(ranked)]
    return sorted(out, key=lambda e: e.image_id)


# -------------------------------------------------------------------------------------------- helpers


def imagenet_names(wnids: Sequence[str], words: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Readable, unique class names: the first ImageNet synonym, else `words`', else the wnid itself.

    Two classes of one name are told apart by their second synonym, or their wnid.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    known = set(info.label_names())
    words = words or {}
    texts = [info.label_name_to_description(w) if w in known else words.get(w, w) for w in wnids]
    synonyms = [[part.strip() for part in text.split(",")] for text in texts]
    names = [s[0] or wnid for s, wnid in zip(synonyms, wnids, strict=True)]
    for second in (lambda s, wnid: s[1] if len(s) > 1 else wnid, lambda s, wnid: wnid):
        shared = {name for name, n in Counter(names).items() if n > 1}
        names = [
            f"{s[0]} ({second(s, wnid)})" if name in shared else name
            for name, s, wnid in zip(names, synonyms, wnids, strict=True)
        ]
    return tuple(names)


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
            problems.append(f"not {expected} {split} images in {len(wrong)} classes: {_some(wrong, 5)}")
    if problems:
        raise SetupError(f"{place} is not all of Tiny-ImageNet: {'; '.join(problems)}. {TINY_REMEDY}")


def _same(what: str, sets: Mapping[str, Iterable[str]], place: Path, remedy: str) -> None:
    """Raise `SetupError` printing the difference unless both named sets hold the same."""
    (name_a, a), (name_b, b) = ((name, set(values)) for name, values in sets.items())
    lines = [
        f"{len(only)} {what} only in {name}: {_some(sorted(only))}"
        for name, only in ((name_a, a - b), (name_b, b - a))
        if only
    ]
    if lines:
        raise SetupError(f"{place}: {'; '.join(lines)}. {remedy}")


def _some(names: Sequence[str], n: int = 10) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _stat(name: str, path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return name, stat.st_size, stat.st_mtime_ns


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _has_class_folders(path: Path) -> bool:
    folders = [e.path for e in os.scandir(path) if e.is_dir() and not _hidden(e.name)]
    return sum(any(_is_image(e.name) for e in os.scandir(folder)) for folder in folders) >= 2


def _scan(folder: Path | str, prefix: str = "", depth: int = 5) -> Iterable[tuple[str, tuple[int, int]]]:
    """Each visible file below `folder`: relative name, (size, mtime in ns); at most `depth` folders deep."""
    for entry in os.scandir(folder):
        if _hidden(entry.name):
            continue
        if entry.is_dir():
            if depth > 1:
                yield from _scan(entry.path, f"{prefix}{entry.name}/", depth - 1)
        else:
            stat = entry.stat(follow_symlinks=entry.is_file())  # a dangling link fails when it is read
            yield prefix + entry.name, (stat.st_size, stat.st_mtime_ns)
