"""Audit of the data: copies, classes, pixels, what weights know; and the table of superclasses."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import MINI_WNIDS, noise
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import pdist, squareform
from scipy.stats import chi2_contingency
from test_experiment import paths, small
from test_report import assert_legible, said

from src import SetupError, audit
from src.config import DataConfig, with_fields
from src.data.sources import open_source
from src.data.splits import Splits, make_splits
from src.data.store import Store
from src.evaluate import wilson, write_predictions
from src.experiment import configure, open_data, prepare
from src.figures.audit import Cell, copies_figure
from tools import superclasses

# Superclasses --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    return pd.read_csv(superclasses.TABLE)


def test_every_class_has_one_superclass(table):
    assert list(table) == ["wnid", "superclass", "path"] and not table.isna().any().any()
    assert len(table) == 200 and table["wnid"].is_unique and table["wnid"].is_monotonic_increasing
    assert table["wnid"].str.fullmatch(r"n\d{8}").all() and set(MINI_WNIDS) <= set(table["wnid"])


def test_groups_are_neither_many_nor_small(table):
    sizes = table["superclass"].value_counts()
    assert 12 <= len(sizes) <= 20 and sizes.min() >= 4 and sizes["other artifact"] <= 35
    assert set(sizes.index) == {superclass for _, superclass in superclasses.RULES}


def test_some_classes_are_where_a_reader_expects_them(table):
    rows = table.set_index("wnid")
    assert rows.loc["n02124075"].tolist() == ["cat", "feline > cat > domestic cat > Egyptian cat"]
    groups = rows["superclass"]
    assert groups["n02099601"] == "dog" and groups["n02504458"] == "other mammal"  # retriever, elephant
    assert groups["n07734744"] == "food" and groups["n04562935"] == "building or structure"


@pytest.mark.slow
@pytest.mark.skipif("WORDNET_DIR" not in os.environ, reason="WORDNET_DIR names no folder with data.noun")
def test_table_is_what_the_rules_say(table):
    told = superclasses.table(table["wnid"].tolist(), Path(os.environ["WORDNET_DIR"]))
    pd.testing.assert_frame_equal(told, table)


@pytest.mark.slow
@pytest.mark.skipif("TINY_IMAGENET_DIR" not in os.environ, reason="TINY_IMAGENET_DIR names no real data")
def test_table_has_the_classes_of_the_data(table, tmp_path):
    source = open_source(DataConfig(source="local", path=os.environ["TINY_IMAGENET_DIR"]), tmp_path)
    assert tuple(table["wnid"]) == source.wnids


def write_wordnet(folder: Path, lines: list[str], version: str = "3.0") -> Path:
    folder.mkdir(exist_ok=True)
    licence = f"  1 This software\n  2 WordNet {version} Copyright 2006 by Princeton University.\n"
    (folder / "data.noun").write_text(licence + "\n".join(lines) + "\n", encoding="ascii")
    return folder


TOY = [  # a spoon is first tableware and then a container; its eleven words are counted in hexadecimal
    "00021939 03 n 01 artifact 0 000 | made by man",
    "04381994 06 n 01 table_ware 0 001 @ 00021939 n 0000 | for tables",
    "03094503 06 n 01 container 0 002 ~ 04381994 n 0000 @ 00021939 n 0000 | holds things; @ 04381994",
    "00000009 06 n 0b spoon 0 " + 10 * "ladle 0 " + "002 @ 03094503 n 0000 @i 04381994 n 0000 | eats",
    "00000010 06 n 01 stone 0 000 | under nothing",
]


def test_first_rule_wins_and_the_path_runs_through_its_synset(tmp_path):
    told = superclasses.table(["n00000009"], write_wordnet(tmp_path / "w", TOY))
    assert told.to_dict("records") == [
        {"wnid": "n00000009", "superclass": "tool or utensil", "path": "table ware > spoon"}
    ]


def test_files_of_another_version_and_classes_without_a_rule_are_refused(tmp_path):
    with pytest.raises(SetupError, match=r"data\.noun.*cannot be read"):
        superclasses.table([], tmp_path)
    with pytest.raises(SetupError, match=r"not of WordNet 3\.0"):
        superclasses.table([], write_wordnet(tmp_path / "old", TOY, "3.1"))
    with pytest.raises(SetupError, match=r"n00000010 \(stone\).*Add one"):
        superclasses.table(["n00000010"], write_wordnet(tmp_path / "w", TOY))


# Copies --------------------------------------------------------------------------------------------


def pictures(*seeds: int) -> np.ndarray:
    """Unlike pictures, uint8 (N,3,64,64)."""
    return np.stack([np.asarray(noise(seed)).transpose(2, 0, 1) for seed in seeds])


def altered(image: np.ndarray, gain: float = 1.0, seed: int = 0) -> np.ndarray:
    """The same picture darker, and with noise of a few levels."""
    grain = np.random.default_rng(seed).normal(0, 4, image.shape)
    return np.clip(gain * image + grain, 0, 255).astype(np.uint8)


def make_store(images: np.ndarray, labels: list[int], splits: list[str]) -> Store:
    digests = [int.from_bytes(hashlib.sha256(i.tobytes()).digest()[:8], "big") for i in images]
    classes = [{"index": k, "wnid": f"n{k}", "name": f"thing {k}"} for k in range(max(labels) + 1)]
    return Store(
        Path("made-up-64"),
        images,
        np.array(labels),
        np.array(splits),
        np.array([f"{split}/{i:06d}" for i, split in enumerate(splits)]),
        np.array(digests, np.uint64),
        {"source": "made up", "size": 64, "sha256": "0123456789abcdef", "classes": classes},
    )


@pytest.fixture(scope="module")
def store() -> Store:
    """Exact: 0 = 7 (between, two labels), 1 = 2 = 3 (within train, one label). Near: 4 ~ 8 (between, one
    label), 9 ~ 10 (within valid, two labels). 5, 6, 11 are alone; 12 and 13 are of one colour each."""
    images = np.concatenate(
        [pictures(0, 1, 1, 1, 2, 3, 4, 0, 2, 5, 5, 6), np.zeros((2, 3, 64, 64), np.uint8)]
    )
    images[8], images[10] = altered(images[8], 0.7), altered(images[10])
    images[13] = 200
    labels = [0, 1, 1, 1, 2, 0, 1, 1, 2, 0, 2, 1, 0, 0]
    return make_store(images, labels, 7 * ["train"] + 5 * ["valid"] + ["train", "valid"])


HASHES = {
    0: "fed818c8f313d4c4",
    1: "8ce7f058b83a27ca",
    2: "bd4c9b8d075b9524",
}  # by ImageHash 4.3.2: `imagehash.phash(noise(seed))`


@pytest.mark.parametrize("seed", HASHES)
def test_hash_is_that_of_the_imagehash_package(seed):
    bits = audit.perceptual_hashes(audit.reduced(pictures(seed)))[0]
    assert f"{int(''.join('01'[int(bit)] for bit in bits), 2):016x}" == HASHES[seed]


def test_details_are_correlations_in_five_windows():
    grey = audit.reduced(pictures(0, 1))
    a, b, other_light, flat = audit.details(
        np.stack([*grey, grey[0] // 2 + 100, np.full((32, 32), 77, np.uint8)])
    )
    assert a.shape == (5, 256) and not flat.any()
    np.testing.assert_allclose((a * a).sum(axis=1), 1, atol=1e-5)
    assert ((a * other_light).sum(axis=1) > 0.98).all()
    fine = grey[:2] - gaussian_filter(grey[:2].astype(float), (0, 2, 2))
    last = fine[:, 16:, 16:].reshape(2, -1)
    assert a[3] @ b[3] == pytest.approx(np.corrcoef(last)[0, 1], abs=1e-5)
    centre = fine[:, 8:24, 8:24].reshape(2, -1)
    assert a[4] @ b[4] == pytest.approx(np.corrcoef(centre)[0, 1], abs=1e-5)


def test_neither_light_from_one_side_nor_a_common_frame_decides():
    a, b = (image // 2 for image in audit.reduced(pictures(3, 4)))
    lit = a + np.linspace(0, 120, 32).astype(np.uint8)
    framed = np.full((2, 32, 32), 255, np.uint8)
    framed[:, 5:-5, 5:-5] = np.stack([a, b])[:, 5:-5, 5:-5]
    images, first = np.stack([a, lit, *framed]), np.array([0, 2])
    alike = audit.correlations(images, first, first + 1)
    assert np.corrcoef(a.ravel(), lit.ravel())[0, 1] < 0.8 < 0.9 < alike[0]
    assert np.corrcoef(framed[0].ravel(), framed[1].ravel())[0, 1] > 0.8 and alike[1] < audit.MIN_CORRELATION


def test_similar_pairs_are_those_of_comparing_all_with_all(monkeypatch):
    base = pictures(*range(40))
    images = np.concatenate([base, [altered(base[i], 0.9, i) for i in range(0, 40, 4)], base[:3]])
    digests_N = np.arange(len(images), dtype=np.uint64)
    digests_N[-3:] = digests_N[:3]
    grey = audit.reduced(images)
    distance = np.rint(64 * squareform(pdist(audit.perceptual_hashes(grey), "hamming")))
    monkeypatch.setattr(audit, "CHUNK", 28)  # so that pairs lie across blocks
    monkeypatch.setattr(audit, "MAX_DISTANCE", 24)
    pairs = audit.similar_pairs(images, digests_N)
    expected = np.argwhere(np.triu((distance <= 24) & (digests_N[:, None] != digests_N), 1))
    assert sorted(pairs[["a", "b"]].to_numpy().tolist()) == expected.tolist() and len(expected) > 20
    assert (pairs["distance"].to_numpy() == distance[pairs["a"], pairs["b"]]).all()
    alike = np.einsum("awp,bwp->abw", *2 * [audit.details(grey)]).min(axis=2)
    np.testing.assert_allclose(pairs["correlation"], alike[pairs["a"], pairs["b"]], atol=1e-5)
    assert pairs["correlation"].is_monotonic_decreasing
    near = pairs[pairs["correlation"] >= audit.MIN_CORRELATION]
    assert {(i, 40 + i // 4) for i in range(0, 40, 4)} <= set(zip(near["a"], near["b"], strict=True))


def tables(store: Store) -> dict[str, pd.DataFrame]:
    similar = audit.similar_pairs(store.images, store.digests_N)
    near = similar[similar["correlation"] >= audit.MIN_CORRELATION]
    return {
        "exact": audit.duplicate_table(store, audit.exact_pairs(store.digests_N), "exact"),
        "near": audit.duplicate_table(store, near, "near"),
    }


def test_table_lists_each_group_once(store):
    exact, near = tables(store).values()
    assert exact[["group", "row"]].to_numpy().tolist() == [[0, 0], [0, 7], [1, 1], [1, 2], [1, 3]]
    assert near[["group", "row"]].to_numpy().tolist() == [[0, 4], [0, 8], [1, 9], [1, 10]]
    assert (
        set(exact["distance"]) == {0} and set(exact["correlation"]) == {1} and set(exact["kind"]) == {"exact"}
    )
    assert near["distance"].le(audit.MAX_DISTANCE).all() and near["correlation"].between(0.55, 1).all()
    assert exact.iloc[1][["split", "image_id", "wnid", "name"]].tolist() == [
        "valid", "valid/000007", "n1", "thing 1",
    ]  # fmt: skip


def test_a_chain_of_near_pairs_is_one_group(store):
    pairs = pd.DataFrame(
        {"a": [0, 5, 4], "b": [5, 9, 6], "distance": [4, 2, 6], "correlation": [0.9, 0.85, 0.8]}
    )
    found = audit.duplicate_table(store, pairs, "near").set_index("row")
    assert found["group"].to_dict() == {0: 0, 5: 0, 9: 0, 4: 1, 6: 1}
    assert found["distance"].to_dict() == {0: 4, 5: 2, 9: 2, 4: 6, 6: 6}
    assert found["correlation"].to_dict() == {0: 0.9, 5: 0.9, 9: 0.85, 4: 0.8, 6: 0.8}


def test_copies_are_counted_by_place_and_label(store):
    exact, near = (audit.count_copies(found) for found in tables(store).values())
    none, one, conflict = ({"groups": n, "conflicting_labels": c} for n, c in ((0, 0), (1, 0), (1, 1)))
    assert exact == {
        "images": 5, "groups": 2, "within_train": one, "within_valid": none, "between": conflict,
    }  # fmt: skip
    assert near == {
        "images": 4, "groups": 2, "within_train": none, "within_valid": conflict, "between": one,
    }  # fmt: skip
    assert audit.copied_from_train(tables(store)["exact"])["row"].tolist() == [7]
    assert audit.copied_from_train(tables(store)["near"])["row"].tolist() == [8]


def test_test_images_that_train_has_are_counted_each_once(store):
    """Row 7 is pixel for pixel row 0, row 8 nearly row 4; here both are test images, 8 without a label."""
    split_N = store.official_split_N.astype("<U5")
    split_N[[7, 8]] = "test"
    labels_N = np.where(np.arange(len(store)) == 8, -1, store.labels_N)
    tested = replace(store, official_split_N=split_N, labels_N=labels_N)
    balance = audit.class_balance(tested, make_splits(tested, DataConfig(protocol="published")))
    found = audit.measure(tested, tables(tested), balance, None, Path("nowhere"))
    assert found["test_copied_from_train"] == 2 and found["valid_copied_from_train"]["either"] == 0
    assert audit.copies_in_words(found).endswith("0 images of `valid` are in train, too, and 2 of `test`")
    both = {kind: tables(tested)["exact"] for kind in ("exact", "near")}  # the same image in both tables
    assert audit.measure(tested, both, balance, None, Path("nowhere"))["test_copied_from_train"] == 1


def test_no_copies_are_no_trouble(tmp_path):
    alone = make_store(pictures(0, 1, 2, 3), [0, 1, 0, 1], ["train", "train", "valid", "valid"])
    for found in tables(alone).values():
        assert found.empty and len(audit.copied_from_train(found)) == 0
        counts = audit.count_copies(found)
        assert counts["groups"] == counts["images"] == counts["between"]["groups"] == 0
    (tmp_path / "stale.png").write_bytes(b"")
    audit.draw(tmp_path / "stale.png", audit.exact_cells(tables(alone)["exact"]), alone, "Title", "note")
    assert not (tmp_path / "stale.png").exists()


# Classes and pixels --------------------------------------------------------------------------------


def test_class_balance(store):
    parts = (np.array(rows) for rows in ([0, 1, 2, 4], [3, 5], [7, 8, 9, 10]))
    balance = audit.class_balance(store, Splits("holdout", *parts, 0, store.digests_N))
    assert balance["wnid"].tolist() == ["n0", "n1", "n2"] and balance["name"][2] == "thing 2"
    assert balance["train"].tolist() == [3, 4, 1] and balance["fit"].tolist() == [1, 2, 1]
    assert balance["holdout"].tolist() == [1, 1, 0] and balance["valid"].tolist() == [1, 1, 2]


def test_pixel_statistics(store, monkeypatch):
    monkeypatch.setattr(audit, "CHUNK", 2)
    images = store.images.copy()
    images[3] = images[3][:1]  # grey
    rows = np.array([0, 3, 5, 13, 8])
    found = audit.pixel_statistics(images, rows)
    chosen = images[rows].transpose(1, 0, 2, 3).reshape(3, -1) / 255
    np.testing.assert_allclose(found["mean"], chosen.mean(axis=1))
    np.testing.assert_allclose(found["std"], chosen.std(axis=1))
    assert (found["n"], found["n_grey"], found["share_grey"]) == (5, 2, 0.4)


# What is known of the images -----------------------------------------------------------------------


def outcomes(n_right: int, n: int) -> np.ndarray:
    return np.arange(n) < n_right


def test_splits_are_compared_by_newcombe_and_z(store):
    found = audit.compare_splits(outcomes(620, 1000), outcomes(120, 250))
    p, q = 0.62, 0.48
    (low_p, high_p), (low_q, high_q) = wilson(620, 1000), wilson(120, 250)
    assert found["difference"] == pytest.approx(p - q)
    assert found["difference_low"] == pytest.approx(p - q - math.hypot(p - low_p, high_q - q))
    assert found["difference_high"] == pytest.approx(p - q + math.hypot(high_p - p, q - low_q))
    chi2 = chi2_contingency([[620, 380], [120, 130]], correction=False)
    assert found["p"] == pytest.approx(chi2.pvalue)
    assert (found["train"]["n"], found["valid"]["n_correct"]) == (1000, 120)


def test_pretraining_scores_each_split_with_and_without_copies(store):
    predicted = store.labels_N.copy()
    predicted[[0, 1, 7, 9]] += 1
    logits_NK = np.eye(4)[predicted]
    copied = pd.DataFrame({"row": [7, 8]})
    found = audit.pretraining(store, logits_NK, copied)
    assert {name: (part["train"]["n_correct"], part["train"]["n"]) for name, part in found.items()} == {
        "all": (6, 8), "without_copies": (6, 8),
    }  # fmt: skip
    assert (found["all"]["valid"]["n_correct"], found["all"]["valid"]["n"]) == (4, 6)
    assert (found["without_copies"]["valid"]["n_correct"], found["without_copies"]["valid"]["n"]) == (3, 4)


def predictions(ids: list[str], right: list[bool]) -> pd.DataFrame:
    return pd.DataFrame(
        {"Ground_Truth": 1, "Prediction": np.where(right, 1, 0), "Is_Correct": right, "Image_Id": ids}
    )


def test_accuracy_without_some_images():
    frame = predictions(["a", "b", "c", "d", "e"], [True, False, True, True, False])
    found = audit.accuracy_without(frame, pd.Series(["b", "d"]))
    assert {name: (part["n_correct"], part["n"]) for name, part in found.items()} == {
        "all": (3, 5), "copied": (1, 2), "without_copies": (2, 3),
    }  # fmt: skip
    assert audit.accuracy_without(frame, pd.Series([], dtype=str))["without_copies"]["n"] == 5
    with pytest.raises(SetupError, match="lack.*'z'"):
        audit.accuracy_without(frame, pd.Series(["b", "z"]))
    with pytest.raises(SetupError, match="Image_Id"):
        audit.accuracy_without(frame.drop(columns="Image_Id"), pd.Series(["b"]))


# The report ----------------------------------------------------------------------------------------


def test_report_holds_every_number_and_leaves_out_strange_arms(store, tmp_path, caplog):
    valid_ids = store.image_ids_N[store.official_split_N == "valid"]
    right = [False, True, True, True, True, True]
    ids = {"Baseline": valid_ids, "Other": [f"val_{i}.JPEG" for i in range(6)]}
    for arm, named in ids.items():
        path = tmp_path / arm / f"{arm.lower()}_validation_predictions.csv"
        write_predictions(predictions(list(named), right), path)
    splits = make_splits(store, DataConfig(holdout_per_class=1, protocol="published"))
    about = {"data": "made up", "data_fingerprint": store.fingerprint}
    told = audit.write_audit(tmp_path / "data", store, splits, None, about)
    folder = tmp_path / "data"
    assert json.loads((folder / "audit.json").read_text()) == told
    assert {path.name for path in folder.iterdir()} == {
        "audit.json", "duplicates.csv", "class_balance.csv", "exact_duplicates.png", "near_duplicates.png",
    }  # fmt: skip
    assert told["n"] == 14 and told["pretraining"] is None and told["data_fingerprint"] == "0123456789ab"
    assert told["valid_copied_from_train"] == {"exact": 1, "near": 1, "either": 2}
    assert told["balance"]["valid"] == {"sum": 6, "min": 2, "max": 2}
    assert told["pixels"]["train"]["n"] == 8 and told["copies"]["exact"]["groups"] == 2
    assert list(told["arms"]) == ["Baseline"] and "Other" in caplog.text
    assert told["arms"]["Baseline"]["without_copies"]["n_correct"] == 4
    found = pd.read_csv(folder / "duplicates.csv")
    assert len(found) == 9 and found.loc[found["kind"] == "near", "row"].tolist() == [4, 8, 9, 10]


def test_cells_show_each_exact_group_once_and_the_most_alike_pairs_of_both_splits(store, monkeypatch):
    cells = audit.exact_cells(tables(store)["exact"])
    assert [(cell.rows.tolist(), cell.marked) for cell in cells] == [([0], True), ([1], False)]
    assert cells[0].text == "train: thing 0\nvalid: thing 1" and cells[1].text.count("thing 1") == 3
    similar = pd.DataFrame(
        {
            "a": [9, 4, 0, 1],
            "b": [10, 8, 11, 9],
            "distance": [2, 4, 6, 8],
            "correlation": [0.9, 0.551, 0.549, 0.3],
        }
    )
    monkeypatch.setattr(audit, "N_PAIRS", 2)
    cells = audit.near_cells(similar, store)
    assert [(cell.rows.tolist(), cell.marked) for cell in cells] == [([4, 8], True), ([0, 11], False)]
    assert cells[0].text == "train: thing 2\nvalid: thing 2\n4 bits, r = 0.55"


@pytest.mark.parametrize("n_images", [1, 2])
@pytest.mark.parametrize("n_cells", [1, 14])
def test_every_cell_has_its_images_and_lines(n_images, n_cells):
    rows = np.arange(n_cells * n_images).reshape(n_cells, n_images)
    text = "train: a name that is far too long for its place\nvalid: short"
    cells = [Cell(chosen, text, bool(i % 2)) for i, chosen in enumerate(rows)]

    def images(chosen: np.ndarray) -> np.ndarray:
        return np.tile(chosen[:, None, None, None], (1, 8, 8, 3)).astype(np.uint8)

    figure = copies_figure(cells, images, "Title\nand more of it", "data: made up")
    assert_legible(figure, f"{n_cells} cells of {n_images}")
    drawn = [axes.get_images()[0].get_array()[0, ::8, 0] for axes in figure.axes if axes.get_images()]
    assert np.array_equal(drawn, rows)
    assert said(figure).count("valid: short") == said(figure).count("train: a name that") == n_cells


def small_config(data: Path, weights: Path):
    return configure("improvement", "offline", str(data), small(weights, data__stored_size=64))


def test_audit_scores_the_untouched_classifier(miniature, mini_counts, tmp_path):
    weights = tiny.write_weights(tmp_path / "weights.safetensors")
    config = small_config(miniature.folder(tmp_path / "tiny-imagenet-200"), weights)
    folder = audit.audit_data(config, paths(tmp_path))
    told = json.loads((folder / "audit.json").read_text())
    assert folder == tmp_path / "results" / "data" and told["backbone"] == tiny.CONVNEXT
    setup = prepare(with_fields(config, audit.UNTOUCHED), paths(tmp_path))
    store, model = setup.store, setup.model.eval()
    with torch.no_grad():
        logits_NK = model(setup.built.preprocess(torch.from_numpy(np.array(store.images)))).numpy()
    correct_N = logits_NK.argmax(axis=1) == store.labels_N
    for split in ("train", "valid"):
        part = told["pretraining"]["all"][split]
        rows = store.official_split_N == split
        assert (part["n"], part["n_correct"]) == (rows.sum(), correct_N[rows].sum())


def test_other_classes_are_audited_without_the_pretraining(pets, weights, tmp_path):
    folder = audit.audit_data(small_config(pets, weights), paths(tmp_path))
    told = json.loads((folder / "audit.json").read_text())
    assert told["pretraining"] is None and told["n"] == 32
    assert told["balance"]["fit"] == {"sum": 18, "min": 9, "max": 9}


@pytest.mark.slow
@pytest.mark.skipif("TINY_IMAGENET_DIR" not in os.environ, reason="TINY_IMAGENET_DIR names no real data")
def test_tiny_imagenet_has_27_images_twice(tmp_path):
    config = configure("baseline", "offline", os.environ["TINY_IMAGENET_DIR"])
    store = open_data(config, paths(tmp_path))
    found = audit.duplicate_table(store, audit.exact_pairs(store.digests_N), "exact")
    for _, group in found.groupby("group"):
        assert (store.images[group["row"]] == store.images[group["row"].iloc[0]]).all()
    counts = audit.count_copies(found)
    assert counts["groups"] == 27 and counts["between"] == {"groups": 7, "conflicting_labels": 7}
