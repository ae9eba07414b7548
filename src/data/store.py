"""Decode once: every image of a source in one uint8 array on disk, opened as a memory map.

A store is the folder `<cache>/stores/<name>-<fingerprint>-<size>` (`-squash` where images are resized whole)
with `images.npy` (N,3,S,S), `rows.npz` (labels, official split, image ids, pixel digests) and
`manifest.json`. It is written beside its place and renamed when whole, so that no half-built store is ever
opened.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from src import SetupError
from src.data.sources import Example, Source
from src.data.sources.trees import FORMATS
from src.files import flush

FORMAT = 1
CHUNK = 128  # images a task: large enough that the pool's overhead does not show
MAX_PIXEL_SCANS = 2**34  # of a JPEG, 20 seconds: each of its scans may pass over all pixels in a few bytes
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """Decoded images and what is known of them; row i of each array is the same image.

    `images` uint8 (N,3,S,S), read-only memory map. `official_split_N` holds "train", "valid" or "test";
    the label of an unlabelled image is -1. `digests_N`: first 8 bytes of SHA-256 of the decoded pixels
    (H,W,3), so that equal images are equal. `true_labels_N`, where test images have an answer key: the label
    of each; from K on they number `unknown_names`, classes that no other split has.
    """

    path: Path
    images: np.memmap = field(repr=False)
    labels_N: np.ndarray = field(repr=False)
    official_split_N: np.ndarray = field(repr=False)
    image_ids_N: np.ndarray = field(repr=False)
    digests_N: np.ndarray = field(repr=False)
    manifest: dict = field(repr=False)
    true_labels_N: np.ndarray | None = field(default=None, repr=False)

    @property
    def wnids(self) -> tuple[str, ...]:
        return tuple(c["wnid"] for c in self.manifest["classes"])

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(c["name"] for c in self.manifest["classes"])

    @property
    def unknown_names(self) -> tuple[str, ...]:
        """Names of the classes that test images alone have."""
        return tuple(c["name"] for c in self.manifest.get("unknown_classes", ()))

    @property
    def size(self) -> int:
        """Side S of the stored images in pixels."""
        return self.manifest["size"]

    @property
    def fingerprint(self) -> str:
        """Short hash of the content: equal data from different layouts have equal ones."""
        return self.manifest["sha256"][:12]

    def __len__(self) -> int:
        return len(self.labels_N)

    def pictures(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (n,S,S,3) of these rows, as figures show them."""
        return self.images[rows].transpose(0, 2, 3, 1)


class DamagedStore(Exception):
    """A store on disk that is not what its manifest says."""


def open_store(
    source: Source, cache_dir: Path, size: int, resize: str = "crop", skip_bad: bool = False
) -> Store:
    """The decoded `source` at `size` x `size` pixels, built below `cache_dir` when it is not there yet.

    `resize`: as for `decode`; stores of both kinds stand side by side. Processes that ask for the same store
    at once wait for the one that builds it. Raises `SetupError` for unreadable images (unless `skip_bad`,
    which leaves them out and lists them in `manifest["bad_files"]`), for a cache that cannot be written and
    for too little disk space.
    """
    kind = "" if resize == "crop" else f"-{resize}"
    path = Path(cache_dir) / "stores" / f"{source.name}-{source.fingerprint[:12]}-{size}{kind}"
    store = _load_if_whole(path)
    if store is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_name(path.name + ".lock")):
                store = _load_if_whole(path) or _build(source, path, size, resize, skip_bad)
        except (OSError, NotImplementedError) as error:
            raise SetupError(
                f"the store {path} cannot be built: {error}. "
                "If the cache is at fault, pass another with `--cache DIR`."
            ) from error
    if store.manifest["bad_files"] and not skip_bad:
        raise _bad_files_error(store.manifest["bad_files"], source.name)
    return store


def load_store(path: Path) -> Store:
    """The store in folder `path`. Raises `DamagedStore` where files are missing or do not fit together."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise DamagedStore(f"format {manifest['format']}, this version reads {FORMAT}")
        images = np.load(path / "images.npy", mmap_mode="r")
        with np.load(path / "rows.npz") as rows:
            store = Store(path, images, rows["labels"], rows["split"], rows["ids"], rows["digests"], manifest)
        n, size = len(store), store.size
        if images.shape != (n, 3, size, size) or images.dtype != np.uint8:
            raise DamagedStore(f"images.npy is {images.dtype} {images.shape}, rows.npz has {n} rows")
        found = _content_hash(store.labels_N, store.official_split_N, store.digests_N, store.wnids)
        if found != manifest["sha256"]:
            raise DamagedStore(f"rows.npz hashes to {found[:12]}, not to {manifest['sha256'][:12]}")
    except DamagedStore:
        raise
    except Exception as error:  # a torn file fails in any of zipfile's, zlib's, numpy's and json's ways
        raise DamagedStore(f"{type(error).__name__}: {error}") from error
    return store


def decode(data: bytes, size: int, resize: str = "crop") -> np.ndarray:
    """Encoded image to uint8 (size, size, 3), as `upright_rgb` reads it.

    Where the image is not `size` x `size`, its central square (`resize`: `crop`) or the whole of it
    (`squash`: the aspect ratio is lost) is resized, bicubic and antialiased. Raises what `upright_rgb` does.
    """
    image = upright_rgb(data)
    if image.size != (size, size):
        to_size = ImageOps.fit if resize == "crop" else Image.Image.resize
        image = to_size(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def upright_rgb(data: bytes) -> Image.Image:
    """Encoded image in RGB: transparency on white, 16 bits scaled to 8, first frame, upright by its EXIF.

    Raises what Pillow raises for damaged bytes and wrong checksums, and `ValueError` for other formats than
    `FORMATS`, images above Pillow's pixel limit, missing parts and colours, and pixels without a range.
    """
    with _opened(data) as image:
        _check_claims(image, data)
        depth = image.tile[0][3] if image.tile else ""  # as "L;4"; loading empties the list
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    _require_palette(image)
    image = _in_8_bits(image, depth)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"no image in one of the formats {', '.join(FORMATS)}") from None


def _check_claims(image: Image.Image, data: bytes) -> None:
    """Raise `ValueError` for an image that is not loaded yet and whose loading would not end, or lack parts.

    Raises Pillow's errors for a PNG with a wrong checksum.
    """
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise ValueError(f"{image.width}x{image.height} pixels exceed the limit of {limit:,}")
    if image.format in ("JPEG", "MPO"):
        n_scans = data.count(b"\xff\xda")
        if n_scans * pixels > MAX_PIXEL_SCANS:
            raise ValueError(f"{n_scans:,} scans of {image.width}x{image.height} pixels would take minutes")
    if image.format == "PNG":
        _opened(data).verify()  # loading skips the checksums of the pixels
    if image.format == "TIFF":  # what no strip covers would be black
        parts = {tuple(tile[1]) for tile in image.tile}
        if sum((right - left) * (low - top) for left, top, right, low in parts) < pixels:
            raise ValueError(f"strips for a part of the {image.width}x{image.height} pixels alone")


def _require_palette(image: Image.Image) -> None:
    """Raise `ValueError` where pixels number colours that the file lacks: Pillow paints them black.

    A GIF's transparent pixels may do so.
    """
    if image.mode == "P" and image.format != "GIF":
        n_colours = len(image.getpalette() or []) // 3
        if image.getextrema()[1] >= n_colours:
            raise ValueError(f"pixels outside the palette of {n_colours} colours")


def _in_8_bits(image: Image.Image, depth: str | tuple) -> Image.Image:
    """The image with at most 8 bits a channel. `depth`: how the file holds a pixel, in Pillow's words."""
    key = image.info.get("transparency")  # as the file has it, while 2 and 4 bits come scaled to 8
    if depth in ("L;2", "L;4") and key is not None:
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[depth]
    if depth == "RGB;16B" and key is not None:
        raise ValueError("a transparent colour of 16 bits is not read")
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode == "F" or (tags and (image.mode == "I" or tags.get(258) != (16,))):
        raise ValueError("only pixels of 8 or 16 bits, without a sign or a floating point, have a range")
    grey_HW = np.asarray(image).astype(np.int64)
    if tags.get(262) == 0:  # white is zero
        grey_HW = 65535 - grey_HW
    if key is not None:
        grey_HW[grey_HW == key] = 65535
    return Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8))


def _load_if_whole(path: Path) -> Store | None:
    if not path.exists():
        return None
    try:
        return load_store(path)
    except DamagedStore as error:
        log.warning("store %s is damaged and will be built again: %s", path, error)
        return None


def _build(source: Source, path: Path, size: int, resize: str, skip_bad: bool) -> Store:
    """Decode into a temporary sibling of `path`, then rename. The caller holds the store's lock, so any
    temporary folder found here was left by a process that died."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    examples = source.examples()
    if not examples:
        raise SetupError(f"{source.name} holds no images.")
    _check_space(path.parent, needed=int(len(examples) * (3 * size * size + 300)))
    partial.mkdir()
    try:
        digests_N, bad = _decode_all(examples, partial / "images.npy", size, resize, source.name)
        bad_files = [{"image_id": examples[i].image_id, "reason": bad[i]} for i in sorted(bad)]
        if bad:
            if not skip_bad or len(bad) == len(examples):
                raise _bad_files_error(bad_files, source.name)
            keep = np.array([i for i in range(len(examples)) if i not in bad])
            _keep_rows(partial / "images.npy", keep)
            examples, digests_N = [examples[i] for i in keep], digests_N[keep]
        facts = {"size": size, "resize": resize, "bad_files": bad_files}
        _write_rows(partial, source, examples, digests_N, facts)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one
        os.rename(partial, path)
        flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load_store(path)


def _decode_all(
    examples: Sequence[Example], file: Path, size: int, resize: str, name: str
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode every example into row i of `file`. Returns digests_N and the reasons of unreadable rows."""
    images = np.lib.format.open_memmap(file, "w+", np.uint8, (len(examples), 3, size, size))
    _reserve(file)
    digests_N = np.zeros(len(examples), np.uint64)
    bad: dict[int, str] = {}

    def work(start: int) -> int:
        rows = range(start, min(start + CHUNK, len(examples)))
        for i in rows:
            try:
                pixels_HWC = decode(examples[i].read(), size, resize)
            except SetupError:
                raise  # the source itself cannot be read, not this one image
            except Exception as error:  # Pillow's plugins raise nearly everything on crafted bytes
                bad[i] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                continue
            images[i] = pixels_HWC.transpose(2, 0, 1)
            digests_N[i] = int.from_bytes(hashlib.sha256(pixels_HWC.tobytes()).digest()[:8], "big")
        return len(rows)

    # Pillow releases the GIL while it decodes and resizes, so threads use every core.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with _whole_images_alone(), tqdm(total=len(examples), desc=f"decode {name}", unit="img") as bar:
            for n in pool.map(work, range(0, len(examples), CHUNK)):
                bar.update(n)
    finally:
        pool.shutdown(cancel_futures=True)
    images.flush()
    return digests_N, bad


@contextmanager
def _whole_images_alone() -> Iterator[None]:
    """Images that are cut short are refused, whatever other code has asked of Pillow."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _keep_rows(file: Path, keep: np.ndarray) -> None:
    """Rewrite the array in `file` with the rows `keep` alone."""
    images = np.load(file, mmap_mode="r")
    target = file.with_suffix(".kept")
    kept = np.lib.format.open_memmap(target, "w+", np.uint8, (len(keep), *images.shape[1:]))
    _reserve(target)
    for start in range(0, len(keep), 1024):
        kept[start : start + 1024] = images[keep[start : start + 1024]]
    kept.flush()
    os.replace(target, file)


def _write_rows(
    folder: Path,
    source: Source,
    examples: Sequence[Example],
    digests_N: np.ndarray,
    facts: dict,
) -> None:
    """Write rows.npz and manifest.json (`facts` and more), and bring all three files to the disk."""
    labels_N = np.array([e.label for e in examples], np.int64)
    split_N = np.array([e.split for e in examples])
    ids_N = np.array([e.image_id for e in examples])
    np.savez(folder / "rows.npz", labels=labels_N, split=split_N, ids=ids_N, digests=digests_N)
    n_classes = len(source.wnids)
    manifest = {
        "format": FORMAT,
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        **facts,
        "sha256": _content_hash(labels_N, split_N, digests_N, source.wnids),
        "classes": [
            {"index": i, "wnid": source.wnids[i], "name": source.class_names[i]} for i in range(n_classes)
        ],
        "counts": {  # of labelled images
            str(s): np.bincount(labels_N[(split_N == s) & (labels_N >= 0)], minlength=n_classes).tolist()
            for s in np.unique(split_N)
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in ("images.npy", "rows.npz", "manifest.json", ""):
        flush(folder / name)


def _content_hash(
    labels_N: np.ndarray, split_N: np.ndarray, digests_N: np.ndarray, wnids: Sequence[str]
) -> str:
    """SHA-256 over classes and rows, whatever the rows' order."""
    order = np.lexsort((digests_N, labels_N, split_N))
    content = hashlib.sha256(json.dumps(list(wnids)).encode())
    content.update("\n".join(split_N[order].tolist()).encode())
    content.update(labels_N[order].astype("<i8").tobytes())
    content.update(digests_N[order].astype("<u8").tobytes())
    return content.hexdigest()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"the decoded images need {needed / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free. "
            "Make room, or pass another place with `--cache DIR`."
        )


def _bad_files_error(bad_files: list[dict], name: str) -> SetupError:
    lines = [f"  {b['image_id']}: {b['reason']}" for b in bad_files[:10]]
    more = [f"  and {len(bad_files) - 10} more"] if len(bad_files) > 10 else []
    head = f"{len(bad_files)} image(s) of {name} cannot be read:"
    tail = "Mend or remove them, or leave them out with `--set data.skip_bad=true`."
    return SetupError("\n".join([head, *lines, *more, tail]))


def _reserve(file: Path) -> None:
    """Allocate the file's blocks: a full disk is then an `OSError` here, not a bus error in a page fault."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
