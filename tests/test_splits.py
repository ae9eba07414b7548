"""Splits: exact, stratified, seeded, and the same for every layout of the same data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import MINI_COUNTS, encode, noise

from src import SetupError
from src.config import DataConfig
from src.data.sources import ImageFolder, ParquetFolder, TinyImageNetFolder, TinyImageNetZip
from src.data.splits import make_splits
from src.data.store import open_store

CONFIG = DataConfig(holdout_per_class=3)


@pytest.fixture
def store(miniature, tmp_path):
    return open_store(ParquetFolder(miniature.parquet(tmp_path / "p"), MINI_COUNTS), tmp_path, 16)


def test_holdout_is_exact_and_disjoint(store):
    splits = make_splits(store, CONFIG)
    parts = (splits.fit_N, splits.holdout_N, splits.valid_N)
    assert [len(p) for p in parts] == [54, 18, 24] and all(p.dtype == np.int64 for p in parts)
    assert sorted(np.concatenate(parts)) == list(range(96))
    for part, n in zip(parts, (9, 3, 4), strict=True):
        assert np.bincount(store.labels_N[part]).tolist() == [n] * 6
    assert set(store.official_split_N[splits.valid_N]) == {"valid"}
    assert set(store.official_split_N[np.concatenate(parts[:2])]) == {"train"}


def test_published_selects_on_valid(store):
    splits = make_splits(store, replace(CONFIG, protocol="published"))
    assert len(splits.fit_N) == 72 and set(store.official_split_N[splits.fit_N]) == {"train"}
    assert (splits.holdout_N == splits.valid_N).all() and len(splits.valid_N) == 24
    assert (splits.valid_N == make_splits(store, CONFIG).valid_N).all()


def test_seed_decides(store):
    first, again = make_splits(store, CONFIG), make_splits(store, CONFIG)
    other = make_splits(store, replace(CONFIG, split_seed=1))
    assert (first.holdout_N == again.holdout_N).all()
    assert set(first.holdout_N) != set(other.holdout_N)


def test_larger_holdout_contains_the_smaller(store):
    larger = make_splits(store, replace(CONFIG, holdout_per_class=5)).holdout_N
    assert set(make_splits(store, CONFIG).holdout_N) < set(larger)


def test_holdout_is_spread_over_the_files(miniature, tmp_path):
    """Chosen by hash, not by place: some class has held-out images among its first and its last files."""
    store = open_store(TinyImageNetFolder(miniature.folder(tmp_path / "t"), MINI_COUNTS), tmp_path, 16)
    holdout_N = make_splits(store, CONFIG).holdout_N
    numbers = [int(i.rsplit("_")[-1].split(".")[0]) for i in store.image_ids_N[holdout_N]]
    assert min(numbers) < 3 and max(numbers) > 8 and len(set(numbers)) > 6


def test_layouts_split_alike(miniature, tmp_path):
    layouts = [
        ParquetFolder(miniature.parquet(tmp_path / "p"), MINI_COUNTS),
        TinyImageNetFolder(miniature.folder(tmp_path / "f"), MINI_COUNTS),
        TinyImageNetZip(miniature.zip(tmp_path / "t.zip"), MINI_COUNTS),
    ]
    saved = []
    for source in layouts:
        store = open_store(source, tmp_path, 16)
        splits = make_splits(store, CONFIG)
        splits.save(tmp_path / "splits.json")
        saved.append((tmp_path / "splits.json").read_text())
        for rows_N in (splits.fit_N, splits.holdout_N, splits.valid_N):
            pairs = list(zip(store.labels_N[rows_N], store.digests_N[rows_N], strict=True))
            assert pairs == sorted(pairs)
    assert saved[0] == saved[1] == saved[2]


def test_save_tells_what_was_split(store, tmp_path):
    splits = make_splits(store, CONFIG)
    splits.save(tmp_path / "splits.json")
    data = json.loads((tmp_path / "splits.json").read_text())
    assert data["protocol"] == "holdout" and data["split_seed"] == 0
    assert data["counts"] == {"fit": 54, "holdout": 18, "valid": 24}
    assert [int(d, 16) for d in data["holdout"]] == store.digests_N[splits.holdout_N].tolist()
    assert not list(tmp_path.glob("*.json.partial"))


def test_too_small_a_class_is_named(store):
    assert len(make_splits(store, replace(CONFIG, holdout_per_class=11)).fit_N) == 6
    with pytest.raises(
        SetupError, match=r"n01443537 \(goldfish\) has 12 train images; holding out 12 needs 13"
    ):
        make_splits(store, replace(CONFIG, holdout_per_class=12))


def test_copies_stay_on_one_side(image_folder, tmp_path):
    for name in ("cat", "dog"):
        (image_folder / "val" / name).mkdir(parents=True)
        (image_folder / "val" / name / "v.png").write_bytes(encode(noise(77)))
        for i in range(0, 10, 2):  # every second image twice
            data = (image_folder / f"train/{name}/{i}.png").read_bytes()
            (image_folder / f"train/{name}/copy{i}.png").write_bytes(data)
    store = open_store(ImageFolder(image_folder), tmp_path, 16)
    for seed in range(20):
        splits = make_splits(store, DataConfig(holdout_per_class=5, split_seed=seed))
        assert np.bincount(store.labels_N[splits.holdout_N]).tolist() == [5, 5]
        assert not set(store.digests_N[splits.fit_N]) & set(store.digests_N[splits.holdout_N])


def test_nothing_but_copies_is_refused(image_folder, tmp_path):
    data = encode(noise(5))
    for file in (image_folder / "train/dog").iterdir():
        file.write_bytes(data)
    store = open_store(ImageFolder(image_folder), tmp_path, 16)
    with pytest.raises(SetupError, match=r"dog \(dog\) has too many copies"):
        make_splits(store, CONFIG)
