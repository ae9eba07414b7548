"""Store: right pixels, decoded once, never half built, never a substituted image."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import MINI_COUNTS, MINI_WNIDS, encode, noise
from PIL import Image, ImageFile
from torchvision.transforms import v2

from src import SetupError
from src.data import store as store_module
from src.data.sources import (
    Example,
    HubTinyImageNet,
    ImageFolder,
    ParquetFolder,
    TinyImageNetFolder,
    TinyImageNetZip,
)
from src.data.store import decode, load_store, open_store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tiny(miniature, tmp_path):
    return TinyImageNetFolder(miniature.folder(tmp_path / "tiny"), MINI_COUNTS)


def stores(cache: Path) -> list[str]:
    """Names below `stores/`, without the lock files."""
    return sorted(p.name for p in (cache / "stores").iterdir() if p.suffix != ".lock")


# ---------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("turn", [False, True])
def test_central_square_is_kept(turn):
    image = Image.new("RGB", (96, 64), "lime")
    image.paste((255, 0, 0), (0, 0, 16, 64))
    image.paste((0, 0, 255), (80, 0, 96, 64))
    if turn:
        image = image.transpose(Image.Transpose.ROTATE_90)
    assert (decode(encode(image), 64) == (0, 255, 0)).all()


def test_resize_is_antialiased_bicubic():
    image = noise(3, (300, 200))
    expected = image.resize((96, 64), Image.Resampling.BICUBIC).crop((16, 0, 80, 64))
    difference = np.abs(decode(encode(image), 64).astype(int) - np.asarray(expected))
    assert difference[:, 2:-2].max() <= 2
    checks = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.ptp(decode(encode(checks), 64)) < 30  # without antialiasing: 0 to 255


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_right_size_is_left_alone(resize):
    data = encode(noise(4), "JPEG")
    assert (decode(data, 64, resize) == np.asarray(Image.open(io.BytesIO(data)))).all()


@pytest.mark.parametrize("size", [(300, 200), (90, 140), (64, 40), (20, 33), (150, 150)])
def test_squashed_images_are_torchvision_s(size):
    """Whole, whatever their shape, larger or smaller: `Resize` to a pair of sides, pixel by pixel."""
    image = noise(6, size)
    expected = v2.Resize((64, 64), v2.InterpolationMode.BICUBIC)(image)
    assert (decode(encode(image), 64, "squash") == np.asarray(expected)).all()
    square = size[0] == size[1]
    assert (decode(encode(image), 64) == np.asarray(expected)).all() == square


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(12, 12), (64, 64)])
def test_decompression_bomb_is_refused(size, monkeypatch):
    data = encode(noise(5, size))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises((ValueError, Image.DecompressionBombError), match="pixels"):
        decode(data, 64)


# ------------------------------------------------------------------------------------------- contents


def test_store_holds_the_source(tiny, tmp_path):
    store = open_store(tiny, tmp_path, 64)
    assert store.images.shape == (96, 3, 64, 64) and store.images.dtype == np.uint8
    assert not store.images.flags.writeable
    assert store.wnids == tiny.wnids and store.class_names == tiny.class_names and store.size == 64
    for i, example in enumerate(tiny.examples()):
        pixels_HWC = decode(example.read(), 64)
        assert (store.images[i] == pixels_HWC.transpose(2, 0, 1)).all()
        assert store.digests_N[i] == int.from_bytes(hashlib.sha256(pixels_HWC.tobytes()).digest()[:8], "big")
        row = (store.image_ids_N[i], store.labels_N[i], store.official_split_N[i])
        assert row == (example.image_id, example.label, example.split)
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest["counts"] == {"train": [12] * 6, "valid": [4] * 6} and manifest["bad_files"] == []
    assert manifest["classes"][0] == {"index": 0, "wnid": "n01443537", "name": "goldfish"}


def test_layouts_have_equal_content(miniature, tmp_path, monkeypatch):
    monkeypatch.setattr(HubTinyImageNet, "path", miniature.parquet(tmp_path / "hub", shards=1))
    layouts = [
        ParquetFolder(miniature.parquet(tmp_path / "parquet"), MINI_COUNTS),
        TinyImageNetFolder(miniature.folder(tmp_path / "folder"), MINI_COUNTS),
        TinyImageNetZip(miniature.zip(tmp_path / "t.zip"), MINI_COUNTS),
        HubTinyImageNet(MINI_COUNTS),
    ]
    built = [open_store(source, tmp_path, 32) for source in layouts]
    assert len({store.path for store in built}) == 4
    assert len({store.fingerprint for store in built}) == 1
    rows = [set(zip(s.official_split_N, s.labels_N, s.digests_N, strict=True)) for s in built]
    assert rows[0] == rows[1] == rows[2] == rows[3] and len(rows[0]) == 96


def test_fingerprint_sees_labels_splits_and_pixels(tiny, tmp_path):
    base = open_store(tiny, tmp_path, 32).fingerprint
    files = list(tiny.tree.root.glob("train/n02124075/images/*_[01].JPEG"))
    other = tiny.tree.root / "train/n01443537/images/n01443537_0.JPEG"
    first, second = files[0].read_bytes(), other.read_bytes()
    files[0].write_bytes(second)
    other.write_bytes(first)  # the same pixels with two labels swapped
    swapped = open_store(TinyImageNetFolder(tiny.tree.root, MINI_COUNTS), tmp_path, 32).fingerprint
    files[0].write_bytes(encode(noise(999), "JPEG"))
    changed = open_store(TinyImageNetFolder(tiny.tree.root, MINI_COUNTS), tmp_path, 32).fingerprint
    assert len({base, swapped, changed}) == 3


@dataclasses.dataclass
class Unsorted:
    """Two classes of three images in train and one in valid, and `n_test` images that nobody has labelled."""

    n_test: int = 4
    name: str = "unsorted"
    wnids: tuple[str, ...] = ("a", "b")
    class_names: tuple[str, ...] = ("cat", "dog")

    @property
    def fingerprint(self) -> str:
        return 16 * f"{self.n_test:02x}"

    def examples(self) -> list[Example]:
        rows = [("train", 0), ("train", 1), ("valid", 0), ("train", 0), ("train", 1), ("valid", 1)]
        rows = [("test", -1)] * (self.n_test // 2) + rows + [("test", -1)] * (self.n_test - self.n_test // 2)
        return [
            Example(f"{i}.png", label, split, lambda i=i: encode(noise(i, (40, 30))))
            for i, (split, label) in enumerate(rows)
        ]


def test_unlabelled_images_are_stored_as_the_others(tmp_path):
    """Among them, in the source's order, with label -1; they count for no class, and in the fingerprint."""
    source = Unsorted()
    store = open_store(source, tmp_path, 16)
    assert store.official_split_N.tolist() == [example.split for example in source.examples()]
    assert store.labels_N.tolist() == [-1, -1, 0, 1, 0, 0, 1, 1, -1, -1]
    assert store.labels_N.dtype == np.int64 and len(set(store.digests_N)) == len(store) == 10
    for i, example in enumerate(source.examples()):
        assert (store.images[i] == decode(example.read(), 16).transpose(2, 0, 1)).all()
    assert store.manifest["counts"] == {"test": [0, 0], "train": [2, 2], "valid": [1, 1]}
    again = load_store(store.path)
    assert (again.labels_N == store.labels_N).all() and again.fingerprint == store.fingerprint
    assert open_store(Unsorted(n_test=6), tmp_path, 16).fingerprint != store.fingerprint


# ------------------------------------------------------------------------------------ opened, not rebuilt


def test_second_open_decodes_nothing(tiny, tmp_path, monkeypatch):
    first = open_store(tiny, tmp_path, 32)
    monkeypatch.setattr(store_module, "decode", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr(type(tiny), "examples", lambda self: pytest.fail("listed again"))
    again = open_store(tiny, tmp_path, 32)
    assert again.fingerprint == first.fingerprint and (again.images[5] == first.images[5]).all()


def test_another_size_or_changed_source_is_another_store(tiny, tmp_path):
    open_store(tiny, tmp_path, 32)
    open_store(tiny, tmp_path, 16)
    os.utime(tiny.tree.root / "val/images/val_0.JPEG", ns=(1, 1))
    open_store(TinyImageNetFolder(tiny.tree.root, MINI_COUNTS), tmp_path, 32)
    assert len(stores(tmp_path)) == 3


def test_squashed_images_are_another_store(image_folder, tmp_path):
    """In a folder of its own; that of cropped ones has the name that it has always had."""
    source = ImageFolder(image_folder)
    crop, squash = (open_store(source, tmp_path, 32, resize) for resize in ("crop", "squash"))
    assert crop.path.name == f"pets-{source.fingerprint[:12]}-32"
    assert squash.path.name == f"pets-{source.fingerprint[:12]}-32-squash"
    assert stores(tmp_path) == [crop.path.name, squash.path.name]
    assert (crop.manifest["resize"], squash.manifest["resize"]) == ("crop", "squash")
    assert crop.fingerprint != squash.fingerprint
    for store in (crop, squash):
        for i, example in enumerate(source.examples()):
            pixels_HWC = decode(example.read(), 32, store.manifest["resize"])
            assert (store.images[i] == pixels_HWC.transpose(2, 0, 1)).all()


def test_a_store_from_before_images_were_squashed_is_still_good(tiny, tmp_path, monkeypatch):
    """Its manifest does not say how images were resized."""
    store = open_store(tiny, tmp_path, 32)
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest.pop("resize") == "crop"
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(store_module, "decode", lambda *_: pytest.fail("decoded again"))
    again = open_store(tiny, tmp_path, 32)
    assert again.path == store.path and again.fingerprint == store.fingerprint


DAMAGE = {
    "images cut": lambda p: os.truncate(p / "images.npy", 1000),
    "images gone": lambda p: (p / "images.npy").unlink(),
    "images of another shape": lambda p: np.save(p / "images.npy", np.zeros((95, 3, 32, 32), np.uint8)),
    "rows gone": lambda p: (p / "rows.npz").unlink(),
    "rows flipped": lambda p: _flip(p / "rows.npz"),
    "manifest cut": lambda p: os.truncate(p / "manifest.json", 50),
    "manifest of another version": lambda p: _set(p / "manifest.json", format=0),
    "manifest of other data": lambda p: _set(p / "manifest.json", sha256="0" * 64),
}


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _set(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_store_is_built_again(damage, tiny, tmp_path, caplog):
    store = open_store(tiny, tmp_path, 32)
    fingerprint, images = store.fingerprint, np.array(store.images)
    DAMAGE[damage](store.path)
    with pytest.raises(store_module.DamagedStore):
        load_store(store.path)
    again = open_store(tiny, tmp_path, 32)
    assert again.fingerprint == fingerprint and (again.images == images).all()
    assert "is damaged and will be built again" in caplog.text
    assert stores(tmp_path) == [store.path.name]


# ------------------------------------------------------------------------------------------ bad images


@pytest.fixture
def bad_folder(image_folder) -> Path:
    cat = image_folder / "train" / "cat"
    (cat / "cut.jpg").write_bytes(encode(noise(1), "JPEG")[:-300])
    (cat / "empty.png").touch()
    (cat / "text.jpg").write_text("not an image at all")
    return image_folder


def test_unreadable_images_are_all_named(bad_folder, tmp_path):
    with pytest.raises(SetupError) as error:
        open_store(ImageFolder(bad_folder), tmp_path, 32)
    text = str(error.value)
    assert text.startswith("3 image(s) of pets cannot be read")
    assert all(f"train/cat/{name}: " in text for name in ("cut.jpg", "empty.png", "text.jpg"))
    assert "truncated" in text and "data.skip_bad=true" in text
    assert stores(tmp_path) == []


def test_an_image_cut_short_is_bad_whatever_pillow_was_told(bad_folder, tmp_path, monkeypatch):
    """Many a notebook tells it to fill up what is missing."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    store = open_store(ImageFolder(bad_folder), tmp_path, 32, skip_bad=True)
    assert "cut.jpg" in store.manifest["bad_files"][0]["image_id"] and len(store) == 20
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_many_unreadable_images_fit_a_screen(bad_folder, tmp_path):
    for i in range(40):
        (bad_folder / f"train/dog/bad{i}.png").touch()
    with pytest.raises(SetupError, match="43 image.*") as error:
        open_store(ImageFolder(bad_folder), tmp_path, 32)
    assert "and 33 more" in str(error.value) and len(str(error.value).splitlines()) < 15


def test_skip_bad_leaves_them_out_and_lists_them(bad_folder, tmp_path):
    store = open_store(ImageFolder(bad_folder), tmp_path, 32, skip_bad=True)
    assert len(store) == 20
    assert [b["image_id"].split("/")[-1] for b in store.manifest["bad_files"]] == [
        "cut.jpg",
        "empty.png",
        "text.jpg",
    ]
    for i, image_id in enumerate(store.image_ids_N):
        expected = decode((bad_folder / image_id).read_bytes(), 32)
        assert (store.images[i] == expected.transpose(2, 0, 1)).all()
        assert store.labels_N[i] == ("dog" in image_id)
    assert open_store(ImageFolder(bad_folder), tmp_path, 32, skip_bad=True).fingerprint == store.fingerprint
    with pytest.raises(SetupError, match="3 image"):  # a store that lacks images is not taken for a whole one
        open_store(ImageFolder(bad_folder), tmp_path, 32)


# ------------------------------------------------------------------------------------------- the build


def test_failed_build_leaves_nothing(tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module, "_write_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        open_store(tiny, tmp_path, 32)
    assert stores(tmp_path) == []


KILLED = """
import sys, time
from pathlib import Path
from src.data import store
from src.data.sources import Counts, TinyImageNetFolder
if sys.argv[3] == "slow":
    decode = store.decode
    store.decode = lambda *a: (time.sleep(0.2), decode(*a))[1]
store.open_store(TinyImageNetFolder(Path(sys.argv[1]), Counts(6, 12, 4)), Path(sys.argv[2]), 32)
"""


def test_killed_build_is_cleaned_up_by_the_next(tiny, tmp_path):
    def start(speed: str) -> subprocess.Popen:
        command = [sys.executable, "-c", KILLED, str(tiny.tree.root), str(tmp_path / "cache"), speed]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    process = start("slow")
    deadline = time.time() + 60
    while not list((tmp_path / "cache").glob("stores/*.partial/images.npy")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [name.endswith(".partial") for name in stores(tmp_path / "cache")] == [True]
    store = open_store(tiny, tmp_path / "cache", 32)
    assert stores(tmp_path / "cache") == [store.path.name] and len(store) == 96


def test_builders_at_once_decode_once(tiny, tmp_path, monkeypatch):
    builds, build = [], store_module._build

    def counted(*args):
        builds.append(args)
        time.sleep(0.2)
        return build(*args)

    monkeypatch.setattr(store_module, "_build", counted)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_store(tiny, tmp_path, 32), range(4)))
    assert len(builds) == 1 and len({s.fingerprint for s in opened}) == 1


def test_cache_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="--cache DIR"):
        open_store(tiny, tmp_path / "file", 32)


def test_too_little_space_is_said_before_decoding(tiny, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**12, 10**12, 96 * 3 * 32 * 32 - 1)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(store_module, "decode", lambda *_: pytest.fail("began to decode"))
    with pytest.raises(SetupError, match=r"GB free.*--cache DIR"):
        open_store(tiny, tmp_path, 32)
    assert stores(tmp_path) == []


def test_source_failing_while_it_is_read_is_not_a_bad_image(tiny, tmp_path, monkeypatch):
    def broken():
        raise SetupError("shard lost")

    examples = [dataclasses.replace(e, read=broken) for e in tiny.examples()]
    monkeypatch.setattr(type(tiny), "examples", lambda self: examples)
    with pytest.raises(SetupError, match="^shard lost"):
        open_store(tiny, tmp_path, 32, skip_bad=True)


def test_miniature_has_grey_images(miniature):
    modes = {Image.open(io.BytesIO(d)).mode for group in miniature.images.values() for d in group}
    assert modes == {"L", "RGB"} and len(MINI_WNIDS) == MINI_COUNTS.classes
