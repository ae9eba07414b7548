"""Miniatures of the studies' data sets: their layouts to the letter, with a few hundred drawn pictures.

A class is a shape with a texture in a hue, drawn at any place, size and angle on a noisy ground: learnable in
a minute, not at a glance. Everything is drawn from fixed seeds, so every copy has the same bytes.
"""

from __future__ import annotations

import colorsys
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import filelock
import numpy as np
from PIL import Image

from src import SetupError
from src.data.sources import Cub200, FgvcAircraft, FoodX251, Listed, StanfordDogs, Totals

# What the layouts' own checks are told.
COUNTS: dict[type[Listed], Totals] = {
    StanfordDogs: Totals(classes=24, train=288, valid=274),
    Cub200: Totals(classes=8, train=112, valid=88),
    FgvcAircraft: Totals(classes=8, train=112, valid=72),
    FoodX251: Totals(classes=8, train=144, valid=56, test=16),
}

ANIMALS = {"antelope": 20, "beaver": 23, "dolphin": 26, "fox": 29, "otter": 32, "zebra": 34}
UNKNOWN_ANIMALS = ("walrus", "bat")  # among the test images alone, as in the challenge
BREEDS = (
    *("n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02085936-Maltese_dog", "n02086079-Pekinese"),
    *("n02086240-Shih-Tzu", "n02086646-Blenheim_spaniel", "n02086910-papillon", "n02087046-toy_terrier"),
    *("n02088094-Afghan_hound", "n02088238-basset", "n02088364-beagle", "n02088466-bloodhound"),
    *("n02089078-black-and-tan_coonhound", "n02090622-borzoi", "n02091134-whippet", "n02091831-Saluki"),
    *("n02092339-Weimaraner", "n02094433-Yorkshire_terrier", "n02099601-golden_retriever"),
    *("n02099712-Labrador_retriever", "n02106662-German_shepherd", "n02110958-pug", "n02112018-Pomeranian"),
    "n02113799-standard_poodle",
)
SMALL_BREEDS = (3, 9, 14, 20)  # the four that are not among the 20 largest
BIRDS = (
    *("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross", "004.Groove_billed_Ani"),
    *("005.Crested_Auklet", "006.Least_Auklet", "007.Parakeet_Auklet", "008.Rhinoceros_Auklet"),
)
VARIANTS = ("707-320", "727-200", "A300B4", "BAE 146-200", "Boeing 717", "F-16A/B", "Model B200", "Saab 2000")
FOOD = ("macaron", "beignet", "cruller", "cockle_food", "samosa", "tiramisu", "tostada", "moussaka")

N_SHAPES, N_TEXTURES = 7, 4
BANNER = 20  # pixels, as under every aircraft

Files = dict[str, bytes]  # relative name -> content


def write_miniature(name: str, folder: Path) -> Path:
    """The miniature `name` in `folder`, drawn and written where it is not there yet; returns `folder`.

    The folder is whole or not there; processes that ask for it at once wait for the one that writes it.
    Raises `SetupError` for an unknown name, and where the folder cannot be written.
    """
    if name not in MINIATURES:
        raise SetupError(f"miniature {name!r} is unknown; choose one of: {', '.join(MINIATURES)}.")
    folder = Path(folder)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                _write(MINIATURES[name](), folder)
    except (OSError, NotImplementedError) as error:
        raise SetupError(
            f"the miniature {folder} cannot be written: {error}. Pass another cache with `--cache DIR`."
        ) from error
    return folder


def _write(files: Files, folder: Path) -> None:
    """Write beside `folder`, then rename. The caller holds the lock, so what is beside it is of the dead."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ------------------------------------------------------------------------------------------- layouts


def animals() -> Files:
    """`train/<class>/`, and `test/` with 18 images of these classes and 6 of two others, mixed."""
    images: dict[str, Iterator[bytes]] = {
        name: _pictures(kind, seed=1) for kind, name in enumerate((*ANIMALS, *UNKNOWN_ANIMALS))
    }
    files = {
        f"train/{name}/{name}_{10001 + i}.jpg": next(images[name])
        for name, n in ANIMALS.items()
        for i in range(n)
    }
    shown = [name for name in ANIMALS for _ in range(3)] + [
        name for name in UNKNOWN_ANIMALS for _ in range(3)
    ]
    order = _shuffled(len(shown), seed=1)
    return files | {f"test/img-{i:04d}.jpg": next(images[shown[k]]) for i, k in enumerate(order)}


def dogs() -> Files:
    """`Images/` and the MATLAB lists: 12 train images a breed and 7 to 15 test images."""
    files: Files = {}
    train, test = [], []
    for kind, breed in enumerate(BREEDS):
        n_test = 7 if kind in SMALL_BREEDS else 10 + 5 * kind % 6
        images = [f"{breed}/{breed[:9]}_{100 + 37 * i}.jpg" for i in range(12 + n_test)]
        files |= {
            f"Images/{image}": data for image, data in zip(images, _pictures(kind, seed=2), strict=False)
        }
        mixed = [images[i] for i in _shuffled(len(images), seed=kind)]
        train += [(image, kind + 1) for image in mixed[:12]]
        test += [(image, kind + 1) for image in mixed[12:]]
    lists = {"train_list.mat": train, "test_list.mat": test, "file_list.mat": sorted(train + test)}
    return files | {name: _matlab_list(rows) for name, rows in lists.items()}


def birds() -> Files:
    """`images/` and the four numbered lists: 14 train and 11 test images a class, ids in order."""
    files: Files = {}
    images, labels, splits = [], [], []
    for kind, name in enumerate(BIRDS):
        place = _shuffled(25, seed=kind)
        for i, data in zip(range(25), _pictures(kind, seed=3), strict=False):
            image = f"{name}/{name[4:]}_{i + 1:04d}_{3000 + 25 * kind + i}.jpg"
            files[f"images/{image}"] = data
            images.append(image)
            labels.append(str(kind + 1))
            splits.append(str(int(place[i] < 14)))
    lists = {
        "classes.txt": BIRDS,
        "images.txt": images,
        "image_class_labels.txt": labels,
        "train_test_split.txt": splits,
    }
    return files | {
        name: _lines(f"{n} {v}" for n, v in enumerate(values, 1)) for name, values in lists.items()
    }


def aircraft() -> Files:
    """`data/images/` with a banner under each and the variants' lists: 14 train and 9 test images a class."""
    files: Files = {}
    keys = iter(_shuffled(8 * 23, seed=4))
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    for kind, variant in enumerate(VARIANTS):
        pictures = _pictures(len(BIRDS) + kind, seed=4, banner=BANNER)
        for i, data in zip(range(23), pictures, strict=False):
            key = f"{34309 + 7919 * next(keys):07d}"
            files[f"data/images/{key}.jpg"] = data
            lists["trainval" if i < 14 else "test"].append(f"{key} {variant}")
    files |= {f"data/images_variant_{part}.txt": _lines(sorted(lines)) for part, lines in lists.items()}
    return files | {"data/variants.txt": _lines(VARIANTS)}


def birds_and_aircraft() -> Files:
    """Both, each in the folder that its archive unpacks to."""
    parts = {"CUB_200_2011": birds(), "fgvc-aircraft-2013b": aircraft()}
    return {f"{folder}/{name}": data for folder, files in parts.items() for name, data in files.items()}


def food() -> Files:
    """Three folders of images and their CSV lists: 18 train and 7 test images a class, 16 without a label."""
    files: Files = {"class_list.txt": _lines(f"{k} {name}" for k, name in enumerate(FOOD))}
    pictures = [_pictures(kind, seed=5) for kind in range(len(FOOD))]
    for part, per_class in (("train", 18), ("val", 7), ("test", 2)):
        labels = [k % len(FOOD) for k in _shuffled(per_class * len(FOOD), seed=per_class)]
        names = [f"{part}_{i:06d}.jpg" for i in range(len(labels))]
        for name, label in zip(names, labels, strict=True):
            files[f"{part}_set/{name}"] = next(pictures[label])
        rows = names if part == "test" else [f"{n},{k}" for n, k in zip(names, labels, strict=True)]
        files[f"{part}_info.csv"] = _lines(rows)
    return files


MINIATURES: dict[str, Callable[[], Files]] = {
    "mini_animals": animals,
    "mini_dogs": dogs,
    "mini_birds": birds,
    "mini_birds_aircraft": birds_and_aircraft,
    "mini_food": food,
}


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _matlab_list(rows: list[tuple[str, int]]) -> bytes:
    """A MATLAB 5 file of (image, class from 1) with the variables of Stanford Dogs' lists."""
    import scipy.io

    def cells(values: Iterable[str]) -> np.ndarray:
        return np.array([[value] for value in values], dtype=object)

    buffer = io.BytesIO()
    variables = {
        "file_list": cells(image for image, _ in rows),
        "annotation_list": cells(image.removesuffix(".jpg") for image, _ in rows),
        "labels": np.array([[label] for _, label in rows], np.uint8),
    }
    scipy.io.savemat(buffer, variables, do_compression=True)
    header = b"MATLAB 5.0 MAT-file"  # scipy writes the time of day here
    return header.ljust(116) + buffer.getvalue()[116:]


def _shuffled(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(n).tolist()


# ------------------------------------------------------------------------------------------ pictures


def _pictures(kind: int, seed: int, banner: int = 0) -> Iterator[bytes]:
    """JPEGs of class `kind` without end, 72x60 to 96x80 pixels, and below each a grey `banner`, in pixels."""
    rng = np.random.default_rng([seed, kind])
    while True:
        picture_HWC = _draw(rng, kind, height=int(rng.integers(60, 81)), width=int(rng.integers(72, 97)))
        ground_HWC = np.full((banner, picture_HWC.shape[1], 3), 128, np.uint8)
        ground_HWC[4 : banner - 4, 4:-4:2] = 255  # as good as writing
        buffer = io.BytesIO()
        Image.fromarray(np.concatenate([picture_HWC, ground_HWC])).save(buffer, "JPEG", quality=85)
        yield buffer.getvalue()


def _draw(rng: np.random.Generator, kind: int, height: int, width: int) -> np.ndarray:
    """uint8 (H,W,3): the shape, texture and hue of class `kind`, jittered, on a cloudy ground with noise."""
    size = min(height, width) * rng.uniform(0.24, 0.38)
    angle = rng.uniform(-0.5, 0.5)
    y_HW, x_HW = np.mgrid[:height, :width].astype(float)
    x_HW = (x_HW - rng.uniform(size, width - size)) / size
    y_HW = (y_HW - rng.uniform(size, height - size)) / size
    u_HW = x_HW * np.cos(angle) + y_HW * np.sin(angle)
    v_HW = y_HW * np.cos(angle) - x_HW * np.sin(angle)
    hue = (0.618 * kind + rng.normal(0, 0.05)) % 1.0
    light, dark = (np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 0.9), v)) for v in (0.95, 0.5))
    texture_HW1 = _texture(kind // 2 % N_TEXTURES, u_HW, v_HW)[..., None]
    inside_HW1 = _shape(kind % N_SHAPES, u_HW, v_HW)[..., None]
    coarse = Image.fromarray(rng.integers(40, 216, (5, 6, 3), dtype=np.uint8))
    ground_HWC = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 255
    colour_HWC = np.where(texture_HW1, light, dark) * rng.uniform(0.75, 1.05)
    picture_HWC = np.where(inside_HW1, colour_HWC, ground_HWC) + rng.normal(0, 0.07, (height, width, 3))
    return (picture_HWC.clip(0, 1) * 255).astype(np.uint8)


def _shape(kind: int, u_HW: np.ndarray, v_HW: np.ndarray) -> np.ndarray:
    """True inside: disc, ring, square, diamond, triangle, cross or star, all within the unit circle."""
    r_HW, phi_HW = np.hypot(u_HW, v_HW), np.arctan2(u_HW, -v_HW)
    spike_HW = np.abs((phi_HW * 5 / (2 * np.pi)) % 1 - 0.5)  # 0.5 where a star of five points out
    triangle_HW = np.cos(np.pi / 3) / np.cos(phi_HW % (2 * np.pi / 3) - np.pi / 3)
    a_HW, b_HW = np.abs(u_HW), np.abs(v_HW)
    return (
        lambda: r_HW < 0.85,
        lambda: (r_HW < 1) & (r_HW > 0.5),
        lambda: np.maximum(a_HW, b_HW) < 0.7,
        lambda: a_HW + b_HW < 1,
        lambda: r_HW < triangle_HW,
        lambda: (np.maximum(a_HW, b_HW) < 0.9) & (np.minimum(a_HW, b_HW) < 0.28),
        lambda: r_HW < 0.4 + 1.2 * spike_HW,
    )[kind]()


def _texture(kind: int, u_HW: np.ndarray, v_HW: np.ndarray) -> np.ndarray:
    """True where light: stripes one way or the other, checks, or dots."""
    wave_u, wave_v = np.sin(9 * u_HW), np.sin(9 * v_HW)
    return (wave_u > 0, wave_v > 0, wave_u * wave_v > 0, wave_u * wave_v > 0.35)[kind]
