"""Fixtures for every test: a miniature Tiny-ImageNet, written in each layout from the same bytes."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torture.attempts import Tally
from torture.warm import Warm

from src.data import sources
from src.data.sources import Counts

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each: threads of several workers would wait for each other
    torch.set_num_threads(1)

MINI_COUNTS = Counts(classes=6, train_per_class=12, valid_per_class=4)
MINI_WNIDS = (
    "n02124075",
    "n01443537",
    "n07734744",
    "n04067472",
    "n02099601",
    "n12267677",
)  # as unsorted as real


@dataclass
class Miniature:
    """Six real classes with 12 + 4 JPEGs of 64x64 each; one of eight is grey.

    `images`: (split, wnid) -> its files, encoded.
    """

    images: dict[tuple[str, str], list[bytes]]

    def folder(self, path: Path) -> Path:
        """tiny-imagenet-200 as distributed: validation images shuffled over classes in one folder."""
        for name, data in self.files().items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path

    def zip(self, path: Path) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in self.files().items():
                archive.writestr(f"tiny-imagenet-200/{name}", data)
        return path

    def files(self) -> dict[str, bytes]:
        """Every file of the original layout by relative name."""
        words = "\n".join(f"{wnid}\tname of {wnid}, alias" for wnid in MINI_WNIDS)
        files = {"wnids.txt": "\n".join(MINI_WNIDS).encode(), "words.txt": words.encode()}
        valid = [
            (data, wnid) for (split, wnid), group in self.images.items() if split == "valid" for data in group
        ]
        order = np.random.default_rng(1).permutation(len(valid))
        lines = []
        for number, i in enumerate(order):
            files[f"val/images/val_{number}.JPEG"] = valid[i][0]
            lines.append(f"val_{number}.JPEG\t{valid[i][1]}\t0\t0\t63\t63\n")
        files["val/val_annotations.txt"] = "".join(lines).encode()
        for (split, wnid), group in self.images.items():
            if split == "train":
                files |= {f"train/{wnid}/images/{wnid}_{i}.JPEG": data for i, data in enumerate(group)}
                files[f"train/{wnid}/{wnid}_boxes.txt"] = b"0 0 63 63\n"
        files["test/images/test_0.JPEG"] = valid[0][0]
        return files

    def parquet(self, path: Path, shards: int = 2, spelling: str = "info") -> Path:
        """Parquet shards in Hugging Face's schema below `path/data`, rows ordered by class."""
        for split in ("train", "valid"):
            rows = [
                (data, label)
                for label, wnid in enumerate(sorted(MINI_WNIDS))
                for data in self.images[split, wnid]
            ]
            for shard, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
                file = path / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
                write_parquet(file, [rows[i] for i in part], sorted(MINI_WNIDS), spelling)
        return path

    def hub_cache(self, path: Path) -> Path:
        """A Hugging Face cache folder as the client leaves it."""
        repo = path / "datasets--zh-plus--tiny-imagenet"
        self.parquet(repo / "snapshots" / sources.HUB_REVISION, shards=1)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(sources.HUB_REVISION)
        return path


def write_parquet(file: Path, rows: list[tuple[bytes, int]], names: list[str], spelling: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    label = {
        "info": {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}},
        "plain": {"label": {"_type": "ClassLabel", "names": {str(i): name for i, name in enumerate(names)}}},
        "class_label": {"label": {"class_label": {"names": {str(i): name for i, name in enumerate(names)}}}},
        "none": {},
    }[spelling]
    images = pa.array([{"bytes": data, "path": None} for data, _ in rows])
    schema = {"huggingface": json.dumps(label)}
    table = pa.table({"image": images, "label": pa.array([code for _, code in rows], pa.int64())})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(schema), file)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(seed: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> Image.Image:
    """A smooth random picture, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope="session")
def miniature() -> Miniature:
    images, seed = {}, 0
    for wnid in MINI_WNIDS:
        for split, n in (("train", MINI_COUNTS.train_per_class), ("valid", MINI_COUNTS.valid_per_class)):
            images[split, wnid] = []
            for _ in range(n):
                seed += 1
                images[split, wnid].append(encode(noise(seed, mode="L" if seed % 8 == 0 else "RGB"), "JPEG"))
    return Miniature(images)


@pytest.fixture
def mini_counts(monkeypatch) -> Counts:
    """Makes the miniature count as complete."""
    monkeypatch.setattr(sources, "TINY_COUNTS", MINI_COUNTS)
    return MINI_COUNTS


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Own images: `train/{cat,dog}` with 10 PNGs each, no validation images."""
    for number, name in enumerate(("cat", "dog")):
        folder = tmp_path / "pets" / "train" / name
        folder.mkdir(parents=True)
        for i in range(10):
            (folder / f"{i}.png").write_bytes(encode(noise(1000 * number + i, (70, 50))))
    return tmp_path / "pets"


def write_pets(folder: Path, first: int = 0) -> Path:
    """Own images: two classes of 12 for train and 4 for valid; another `first` gives other images."""
    for number, name in enumerate(("cat", "dog")):
        for split, n in (("train", 12), ("valid", 4)):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                image = noise(first + 1000 * number + 100 * (split == "valid") + i, (40, 40))
                (folder / split / name / f"{i}.png").write_bytes(encode(image))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors", n_classes=7)


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    return write_pets(tmp_path_factory.mktemp("data") / "pets")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Tally]]:
    """`tally(name)` -> the `Tally` of a fault of `FAULTS`; judged when the test ends."""
    tallies: list[Tally] = []

    def start(name: str) -> Tally:
        tallies.append(Tally(name))
        return tallies[-1]

    yield start
    for each in tallies:
        each.finish(request.node.nodeid)


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Iterator[Warm]:
    """A process that starts runs as forks of itself, with a checkpoint at every second step."""
    reads = "from src import train; train.STEPS_BETWEEN_READS, train.SECONDS_BETWEEN_BACKUPS = 2, 0"
    with Warm(tmp_path_factory.mktemp("warm"), reads) as process:
        yield process


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What `torture.warm.command` trains on."""
    folder = tmp_path_factory.mktemp("inputs")
    write_pets(folder / "pets")
    tiny.write_weights(folder / "weights.safetensors", n_classes=7)
    return folder
