"""Splits: exact, stratified, seeded, and the same for every layout of the same data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MINI_COUNTS, encode, noise
from hypothesis import given
from hypothesis import strategies as st

from src import SetupError
from src.config import DataConfig
from src.data.sources import ImageFolder, ParquetFolder, TinyImageNetFolder, TinyImageNetZip
from src.data.splits import make_splits
from src.data.store import Store, open_store

CONFIG = DataConfig(holdout_per_class=3)


@pytest.fixture(scope="module")
def store(miniature, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return open_store(ParquetFolder(miniature.parquet(folder / "p"), MINI_COUNTS), folder, 16)


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


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, fit_per_class=7, imbalance=3.0)])
def test_layouts_split_alike(miniature, tmp_path, config):
    layouts = [
        ParquetFolder(miniature.parquet(tmp_path / "p"), MINI_COUNTS),
        TinyImageNetFolder(miniature.folder(tmp_path / "f"), MINI_COUNTS),
        TinyImageNetZip(miniature.zip(tmp_path / "t.zip"), MINI_COUNTS),
    ]
    saved = []
    for source in layouts:
        store = open_store(source, tmp_path, 16)
        splits = make_splits(store, config)
        splits.save(tmp_path / "splits.json")
        saved.append((tmp_path / "splits.json").read_text())
        for rows_N in (splits.fit_N, splits.holdout_N, splits.valid_N):
            pairs = list(zip(store.labels_N[rows_N], store.digests_N[rows_N], strict=True))
            assert pairs == sorted(pairs)
    assert saved[0] == saved[1] == saved[2]


# Fewer images to train on


def counts(store: Store, config: DataConfig) -> list[int]:
    """Images to train on, by class; `holdout` and `valid` must be what they are without thinning."""
    splits, whole = (make_splits(store, c) for c in (config, replace(config, fit_per_class=0, imbalance=1.0)))
    assert (splits.holdout_N == whole.holdout_N).all() and (splits.valid_N == whole.valid_N).all()
    assert splits.fit_N.dtype == np.int64
    assert splits.fit_N.tolist() == [row for row in whole.fit_N if row in splits.fit_N]  # in the same order
    assert len(splits.fit_N) == len(set(splits.fit_N))
    return np.bincount(store.labels_N[splits.fit_N], minlength=len(store.wnids)).tolist()


@pytest.mark.parametrize(("protocol", "n"), [("holdout", 9), ("published", 12)])
def test_fit_per_class_keeps_so_many(store, protocol, n):
    for wanted in (1, 5, n, n + 1, 500):
        config = replace(CONFIG, protocol=protocol, fit_per_class=wanted)
        assert counts(store, config) == [min(wanted, n)] * 6


@pytest.mark.parametrize(
    ("fit_per_class", "imbalance", "expected"),
    [
        (0, 3, [9, 7, 6, 5, 4, 3]),  # 9, 7.22, 5.80, 4.66, 3.74, 3
        (0, 9, [9, 6, 4, 2, 2, 1]),  # 9, 5.80, 3.74, 2.41, 1.55, 1
        (0, 1e6, [9, 1, 1, 1, 1, 1]),  # 9, 0.57, ...: one image remains of every class
        (7, 3, [7, 6, 5, 4, 3, 2]),  # 7, 5.62, 4.51, 3.62, 2.91, 2.33
        (100, 3, [9, 7, 6, 5, 4, 3]),
    ],
)
def test_imbalance_falls_exponentially_from_the_first_class_to_the_last(
    store, fit_per_class, imbalance, expected
):
    """n times imbalance to the power of -k / (K - 1), rounded."""
    config = replace(CONFIG, fit_per_class=fit_per_class, imbalance=imbalance)
    assert counts(store, config) == expected
    n = expected[0]
    exact = n / np.float64(imbalance) ** np.linspace(0, 1, 6)
    assert expected == np.maximum(1, np.round(exact)).astype(int).tolist()


def test_imbalance_thins_the_images_that_a_class_has(image_folder, tmp_path):
    """Of unequal classes each by its own number, and nothing of the only class."""
    for i in range(4, 10):
        (image_folder / f"train/dog/{i}.png").unlink()
    store = open_store(ImageFolder(image_folder), tmp_path, 16)
    config = DataConfig(protocol="published", imbalance=2.0)
    store = replace(store, official_split_N=np.where(np.arange(len(store)) % 14 == 0, "valid", "train"))
    n_cats, n_dogs = np.bincount(store.labels_N[store.official_split_N == "train"])
    assert counts(store, config) == [n_cats, n_dogs // 2]
    cats = replace(store, manifest={**store.manifest, "classes": store.manifest["classes"][:1]})
    cats = rearranged(cats, np.flatnonzero(store.labels_N == 0))
    assert counts(cats, config) == [n_cats]


def rearranged(store: Store, rows_N: np.ndarray) -> Store:
    """The store with these rows alone, in this order, under other file names."""
    return replace(
        store,
        images=store.images[rows_N],
        labels_N=store.labels_N[rows_N],
        official_split_N=store.official_split_N[rows_N],
        image_ids_N=np.array([f"renamed_{i}" for i in range(len(rows_N))]),
        digests_N=store.digests_N[rows_N],
    )


def test_thinning_depends_neither_on_row_order_nor_on_file_names(store):
    config = replace(CONFIG, fit_per_class=6, imbalance=4.0)
    ours = make_splits(store, config)
    for seed in range(5):
        other = rearranged(store, np.random.default_rng(seed).permutation(len(store)))
        theirs = make_splits(other, config)
        assert (store.digests_N[ours.fit_N] == other.digests_N[theirs.fit_N]).all()


@pytest.mark.parametrize("protocol", ["holdout", "published"])
def test_more_images_contain_the_fewer(store, protocol):
    config = replace(CONFIG, protocol=protocol)
    for field, values in (("fit_per_class", (1, 2, 5, 8, 0)), ("imbalance", (100.0, 10.0, 3.0, 1.5, 1.0))):
        kept = [set(make_splits(store, replace(config, **{field: value})).fit_N) for value in values]
        assert all(fewer < more for fewer, more in zip(kept, kept[1:], strict=False))


def test_which_images_are_kept_is_decided_by_the_seed(store):
    """Also where the seed decides nothing else; over some seeds every image is kept and left out."""
    config = replace(CONFIG, protocol="published", fit_per_class=6)
    train_N = make_splits(store, replace(config, fit_per_class=0)).fit_N
    kept = [make_splits(store, replace(config, split_seed=seed)).fit_N for seed in range(30)]
    assert (kept[0] == make_splits(store, config).fit_N).all()
    assert len({tuple(rows) for rows in kept}) == 30
    times = np.bincount(np.concatenate(kept), minlength=len(store))[train_N]
    assert times.min() > 3 and times.max() < 27  # of 30, each with probability a half


# Folds


def parts(store: Store, config: DataConfig) -> list[set[int]]:
    """Rows of `valid` in each fold; the rest of train must be in `fit` and `holdout`, and no other row."""
    train = set(np.flatnonzero(store.official_split_N == "train").tolist())
    found = []
    for fold in range(config.folds):
        splits = make_splits(store, replace(config, fold=fold))
        fit, holdout, valid = (
            set(rows_N.tolist()) for rows_N in (splits.fit_N, splits.holdout_N, splits.valid_N)
        )
        assert (len(fit), len(valid)) == (len(splits.fit_N), len(splits.valid_N))  # no row is there twice
        if config.protocol == "published":
            assert holdout == valid and fit == train - valid
        else:
            assert fit | holdout == train - valid and not fit & holdout
        for rows_N in (splits.fit_N, splits.holdout_N, splits.valid_N):
            assert rows_N.dtype == np.int64
            pairs = list(zip(store.labels_N[rows_N], store.digests_N[rows_N], strict=True))
            assert pairs == sorted(pairs)
        found.append(valid)
    assert sorted(row for part in found for row in part) == sorted(train)  # every image in one part
    return found


@pytest.mark.parametrize("protocol", ["holdout", "published"])
@pytest.mark.parametrize("folds", [2, 5, 7, 12])
def test_folds_are_stratified(store, folds, protocol):
    """12 images a class, in parts that differ by one at most; holding out is as exact as without folds."""
    config = DataConfig(folds=folds, protocol=protocol, holdout_per_class=3)
    found = parts(store, config)
    counts = np.array([np.bincount(store.labels_N[sorted(part)], minlength=6) for part in found])
    assert (counts.max(0) - counts.min(0) <= 1).all() and (counts.sum(0) == 12).all()
    assert max(map(len, found)) - min(map(len, found)) <= 1
    if protocol == "holdout":
        holdout_N = make_splits(store, config).holdout_N
        assert np.bincount(store.labels_N[holdout_N]).tolist() == [3] * 6


@given(sizes=st.lists(st.integers(0, 23), min_size=1, max_size=6), folds=st.integers(2, 8))
def test_parts_differ_by_one_image_at_most_whatever_the_sizes_of_the_classes(sizes, folds):
    labels_N = np.repeat(np.arange(len(sizes)), sizes)
    number_N = np.arange(len(labels_N))
    store = Store(
        Path("made"),
        np.zeros((len(labels_N), 3, 1, 1), np.uint8),
        labels_N,
        np.full(len(labels_N), "train"),
        number_N.astype(str),
        number_N.astype(np.uint64),
        {"classes": [{"wnid": str(k), "name": str(k)} for k in range(len(sizes))]},
    )
    if len(labels_N) < folds:
        with pytest.raises(SetupError, match="valid images"):
            parts(store, DataConfig(folds=folds, protocol="published"))
        return
    found = parts(store, DataConfig(folds=folds, protocol="published"))
    counts = np.array([np.bincount(labels_N[sorted(part)], minlength=len(sizes)) for part in found])
    assert (counts.max(0) - counts.min(0) <= 1).all()
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_folds_depend_on_the_seed_and_on_nothing_but_pixels_and_labels(store):
    config = DataConfig(folds=4, holdout_per_class=2)
    ours = parts(store, config)
    assert ours == parts(store, config) != parts(store, replace(config, split_seed=1))
    other = rearranged(store, np.random.default_rng(0).permutation(len(store)))
    theirs = parts(other, config)
    digests = [
        [set(s.digests_N[sorted(part)].tolist()) for part in found]
        for s, found in ((store, ours), (other, theirs))
    ]
    assert digests[0] == digests[1]


def test_copies_are_in_one_fold_whatever_their_labels(image_folder, tmp_path):
    """One image six times in a class and twice in the other; other images make up for it."""
    data = encode(noise(5))
    for name, n in (("cat", 6), ("dog", 2)):
        for i in range(n):
            (image_folder / f"train/{name}/copy{i}.png").write_bytes(data)
    store = open_store(ImageFolder(image_folder), tmp_path, 16)
    store = replace(store, official_split_N=np.full(len(store), "train"))
    [(digest, n_copies)] = [
        (digest, n)
        for digest, n in zip(*np.unique(store.digests_N, return_counts=True), strict=True)
        if n > 1
    ]
    copies = set(np.flatnonzero(store.digests_N == digest).tolist())
    assert n_copies == 8
    for seed in range(10):
        found = parts(store, DataConfig(folds=3, holdout_per_class=3, split_seed=seed))
        [part] = [part for part in found if copies & part]
        assert copies <= part
        n_cats, n_dogs = np.array([np.bincount(store.labels_N[sorted(part)]) for part in found]).T
        assert sorted(n_cats) == [5, 5, 6] and sorted(n_dogs) == [4, 4, 4]


def test_without_folds_valid_is_the_official_one(store):
    splits = make_splits(store, replace(CONFIG, folds=0))
    assert (splits.valid_N == make_splits(store, CONFIG).valid_N).all()
    assert set(store.official_split_N[splits.valid_N]) == {"valid"}
    folded = make_splits(store, replace(CONFIG, folds=3))
    assert set(store.official_split_N[folded.valid_N]) == {"train"}


def test_folds_need_no_official_valid_split(image_folder, tmp_path):
    store = open_store(ImageFolder(image_folder), tmp_path, 16)
    store = replace(store, official_split_N=np.full(len(store), "train"))
    assert [len(part) for part in parts(store, DataConfig(folds=5, holdout_per_class=2))] == [4] * 5
    with pytest.raises(SetupError, match="20 train, 0 valid"):
        make_splits(store, DataConfig(holdout_per_class=2))


@pytest.mark.parametrize(("folds", "fold"), [(5, 5), (5, 19), (0, 1), (1, 0)])
def test_a_fold_that_does_not_exist_is_refused(store, folds, fold):
    with pytest.raises(SetupError, match=f"data.fold = {fold} is no part .* data.folds = {folds}"):
        make_splits(store, replace(CONFIG, folds=folds, fold=fold))


@pytest.mark.parametrize("changes", [{}, {"folds": 3}, {"protocol": "published"}, {"fit_per_class": 2}])
def test_unlabelled_images_are_in_no_split(store, changes):
    """The others are divided as if they were not there."""
    config = replace(CONFIG, **changes)
    unlabelled_N = np.arange(len(store)) % 5 == 2
    labels_N = np.where(unlabelled_N, -1, store.labels_N)
    split_N = np.where(unlabelled_N, "test", store.official_split_N)
    ours = make_splits(replace(store, labels_N=labels_N, official_split_N=split_N), config)
    without = rearranged(store, np.flatnonzero(~unlabelled_N))
    theirs = make_splits(without, config)
    for name in ("fit_N", "holdout_N", "valid_N"):
        rows_N = getattr(ours, name)
        assert len(rows_N) and not unlabelled_N[rows_N].any()
        assert (store.digests_N[rows_N] == without.digests_N[getattr(theirs, name)]).all()


# What is written, and what is refused


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
