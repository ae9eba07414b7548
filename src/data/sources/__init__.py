"""Where images and labels are: one small class a data set, yielding encoded bytes.

No pixels are decoded here, but to cut the banner off an aircraft. A source lists `Example`s; `src.data.store`
reads and decodes each once. Listing checks the whole layout, so a missing, half or mislabelled data set never
reaches training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from src import SetupError
from src.config import DataConfig
from src.data.archives import ARCHIVES, fetch
from src.data.download import download
from src.data.sources.base import Example, Source, imagenet_names, some
from src.data.sources.images import Digits, ImageFolder, usual_side
from src.data.sources.listed import Listed, Totals, parse_labels, parse_pairs
from src.data.sources.studies import (
    AIRCRAFT_COUNTS,
    BIRDS_COUNTS,
    DOGS_COUNTS,
    FOOD_COUNTS,
    BirdsAndAircraft,
    Cub200,
    FgvcAircraft,
    FoodX251,
    StanfordDogs,
)
from src.data.sources.tiny_imagenet import (
    HUB_REVISION,
    TINY_COUNTS,
    ZIP_MD5,
    ZIP_SIZE,
    ZIP_URL,
    Counts,
    HubTinyImageNet,
    ParquetFolder,
    TinyImageNetFolder,
    TinyImageNetZip,
    parse_annotations,
    shards,
)
from src.data.sources.trees import IMAGE_SUFFIXES, has_class_folders, subfolders, visible

__all__ = [
    "AIRCRAFT_COUNTS",
    "BIRDS_COUNTS",
    "BirdsAndAircraft",
    "Counts",
    "Cub200",
    "DOGS_COUNTS",
    "Digits",
    "Example",
    "FOOD_COUNTS",
    "FgvcAircraft",
    "FoodX251",
    "HUB_REVISION",
    "HubTinyImageNet",
    "ImageFolder",
    "ParquetFolder",
    "Source",
    "StanfordDogs",
    "TINY_COUNTS",
    "TinyImageNetFolder",
    "TinyImageNetZip",
    "Totals",
    "ZIP_MD5",
    "ZIP_SIZE",
    "ZIP_URL",
    "imagenet_names",
    "open_local",
    "open_source",
    "parse_annotations",
    "parse_labels",
    "parse_pairs",
    "stored_size_of",
]

OWN_SIZE = 256  # pixels: side of a user's own images in the store


def open_source(config: DataConfig, cache_dir: Path) -> Source:
    """The source that `config.source` and `config.path` name; downloads and miniatures go below `cache_dir`.

    Raises `SetupError` for a missing path, an unknown layout or a failed download.
    """
    if config.source == "hub":
        return HubTinyImageNet(TINY_COUNTS)
    if config.source == "digits":
        return Digits()
    if config.source.startswith("mini_"):
        return _open_miniature(config.source, Path(cache_dir) / "miniatures" / config.source)
    if config.source == "download":
        path = Path(cache_dir) / "tiny-imagenet-200.zip"
        download(ZIP_URL, path, ZIP_SIZE, ZIP_MD5)
        return TinyImageNetZip(path, TINY_COUNTS)
    if config.source in ARCHIVES:
        return _open_fetched(fetch(config.source, Path(cache_dir)))
    if not config.path:
        raise SetupError(
            "data.source = 'local' needs a directory: pass `--data DIR`, or for Tiny-ImageNet set the "
            "environment variable TINY_IMAGENET_DIR; or let `--set data.source=NAME` fetch one of: "
            f"{', '.join(ARCHIVES)}."
        )
    return open_local(Path(config.path).expanduser())


def open_local(path: Path) -> Source:
    """The source whose layout `path` has: a zip, parquet, tiny-imagenet-200, a study's or class folders."""
    if not path.exists():
        raise SetupError(f"{path} does not exist. Pass `--data DIR` naming a directory or zip file.")
    if opened := _layout_of(path):
        return opened()
    found, counts = [entry.name for entry in visible(path)], _study_counts()
    raise SetupError(
        f"{path} has no layout that is known. Looked for: train-*.parquet and valid-*.parquet (here or in "
        "data/); wnids.txt, train/ and val/ (tiny-imagenet-200, here or in a folder of that name); "
        + "".join(f"{' or '.join(kind.marks)} ({kind.name}, here or one folder below); " for kind in counts)
        + f"train/<class>/ or <class>/ with images ({' '.join(IMAGE_SUFFIXES)}). "
        f"Found: {some(found) if found else 'an empty directory'}."
    )


def _layout_of(path: Path) -> Callable[[], Source] | None:
    """What opens `path` by its layout; None where it has none that is known. Its images are not listed."""
    if path.is_file():
        return partial(TinyImageNetZip, path, TINY_COUNTS)
    if any(shards(folder, ("train",)) for folder in (path, path / "data")):
        return partial(ParquetFolder, path, TINY_COUNTS)
    for folder in (path, path / "tiny-imagenet-200"):
        if (folder / "wnids.txt").is_file() and (folder / "train").is_dir():
            return partial(TinyImageNetFolder, folder, TINY_COUNTS)
    if _has_study([path]):
        return partial(_study_in, [path], _study_counts())
    if (path / "train").is_dir() or has_class_folders(path):
        return partial(ImageFolder, path)
    places = subfolders(path)
    return partial(_study_in, places, _study_counts()) if _has_study(places) else None


def stored_size_of(path: Path, size: int) -> int:
    """`OWN_SIZE` where `path` holds a user's own images that are usually larger than `size` pixels; `size`
    for any other data, and for what cannot be opened."""
    try:
        own = path.is_dir() and getattr(_layout_of(path), "func", None) is ImageFolder
        return OWN_SIZE if own and usual_side(path) > size else size
    except (SetupError, OSError):  # which opening it says again, with its remedy
        return size


def _study_counts() -> dict[type[Listed], Totals]:
    return {
        StanfordDogs: DOGS_COUNTS,
        Cub200: BIRDS_COUNTS,
        FgvcAircraft: AIRCRAFT_COUNTS,
        FoodX251: FOOD_COUNTS,
    }


def _has_study(folders: Iterable[Path]) -> bool:
    return any(kind.is_in(folder) for folder in folders for kind in _study_counts())


def _study_in(
    folders: Iterable[Path], counts: Mapping[type[Listed], Totals], remedy: str = ""
) -> Source | None:
    """The study's data set that is in one of the `folders`; birds in one and aircraft in another are one set.

    Raises `SetupError` where there are several.
    """
    places = list(folders)
    found = [(kind, folder) for kind in counts for folder in places if kind.is_in(folder)]
    sources = [kind(folder, counts[kind], remedy) for kind, folder in found]
    if [kind for kind, _ in found] == [Cub200, FgvcAircraft]:
        return BirdsAndAircraft(*sources)
    if len(found) > 1:
        names = ", ".join(f"{folder} ({kind.name})" for kind, folder in found)
        raise SetupError(f"there are several data sets: {names}. Pass one of them with `--data DIR`.")
    return sources[0] if sources else None


def _open_fetched(folder: Path) -> Source:
    """The study's data set that `folder` was unpacked to."""
    remedy = f"Remove {folder}, and it is fetched anew."
    source = _study_in([folder], _study_counts(), remedy) or _study_in(
        subfolders(folder), _study_counts(), remedy
    )
    if source is None:
        raise SetupError(f"{folder} is not the data set that was fetched. {remedy}")
    return source


def _open_miniature(name: str, folder: Path) -> Source:
    """The miniature `name`, written to `folder` first where it is not there yet."""
    from src.data.miniature import COUNTS, write_miniature  # which needs `Totals` of this package

    write_miniature(name, folder)
    remedy = f"This is a miniature: remove {folder}, and it is drawn anew."
    source = (
        _study_in([folder], COUNTS, remedy)
        or _study_in(subfolders(folder), COUNTS, remedy)
        or ImageFolder(folder)
    )
    source.name = name.replace("_", "-")  # so that no result of it is taken for one of the data set
    return source
