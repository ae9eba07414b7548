"""Audit of the data: copies of images, classes, pixels, and whether the pretrained weights know the images.

    python -m src.experiment audit --profile offline --data DIR
    python -m src.experiment audit --preset animals40 --profile offline --data DIR

Copies are looked for among all images, whatever their split: exact ones by the digest of their pixels
(64 bits of SHA-256), near ones by a perceptual hash, confirmed on the pixels. Copies that are mirrored, moved
or cut differently are not found.

What the pretrained weights know: the untouched classifier of the backbone, restricted to the data's classes,
is scored on train and on valid. Where the data's images come from those of the pretraining, train ones may
have been learned by heart. More accuracy on train than on valid, beyond noise, suggests that images of train
were in the pretraining set and images of valid were not. No gap fits both in and both out, and images far
smaller than the pretraining's may hide one: it says that valid is as hard for these weights as train, not
that it is new to them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from statsmodels.stats.proportion import confint_proportions_2indep, proportions_ztest

from src import SetupError
from src.config import Config, with_fields
from src.data.batches import Batches
from src.data.splits import Splits, make_splits
from src.data.store import Store
from src.evaluate import accuracy, read_predictions
from src.experiment import Setup, frozen_features, prepare, used_rows
from src.figures.audit import Cell, copies_figure
from src.files import write_json
from src.folders import Paths
from src.model.build import NoRowsError
from src.predict import one_pass
from src.report import footer, save, write_csv

SIDE, FREQUENCIES = 32, 8  # pixels a side of a reduced image, frequencies a side of its hash
COARSE = 2.0  # standard deviation, in reduced pixels, of the blur above which details lie
WINDOWS = ((0, 0), (0, 16), (16, 0), (16, 16), (8, 8))  # quarters and centre: top, left
MAX_DISTANCE = 14  # bits of 64
# Chosen on Tiny-ImageNet: above it each pair shows one scene, below it come unlike things of one outline.
MIN_CORRELATION = 0.55
CHUNK = 1024  # images read at once
N_GROUPS, N_PAIRS = 30, 12  # drawn at most: images that are there twice, pairs of train and valid
EXACT_NOTE = "Orange: in more than one split; blue: in one."
NEAR_NOTE = (
    f"Orange: near copies. They differ in at most {MAX_DISTANCE} bits of the perceptual hash, and the least "
    f"correlation r of their details in five windows is {MIN_CORRELATION} or more."
)
UNTOUCHED = {
    **{"model.trainable": "none", "model.head": "plain", "model.head_init": "pretrained_rows"},
    "model.scra": False,
}

log = logging.getLogger(__name__)


# Copies --------------------------------------------------------------------------------------------


def reduced(images: np.ndarray) -> np.ndarray:
    """uint8 (N,3,S,S) -> uint8 (N,32,32): Pillow's grey, resized by its Lanczos filter."""
    pictures = (Image.fromarray(image.transpose(1, 2, 0)).convert("L") for image in images)
    return np.stack([np.asarray(p.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for p in pictures])


def perceptual_hashes(reduced_NHW: np.ndarray) -> np.ndarray:
    """`reduced` images -> bool (N,64): which of the 8x8 lowest frequencies exceed their median.

    The pHash of the package ImageHash (`imagehash.phash`), whose DCT-II is done here for all images at once.
    """
    low = [
        dctn(part.astype(np.float64), axes=(1, 2))[:, :FREQUENCIES, :FREQUENCIES]
        for part in _parts(reduced_NHW, np.arange(len(reduced_NHW)))
    ]
    low_NF = np.concatenate(low).reshape(len(reduced_NHW), -1)
    return low_NF > np.median(low_NF, axis=1, keepdims=True)


def _parts(images: np.ndarray, rows_M: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of an array, a little at a time."""
    return (images[rows_M[start : start + CHUNK]] for start in range(0, len(rows_M), CHUNK))


def details(reduced_NHW: np.ndarray) -> np.ndarray:
    """`reduced` images -> float32 (N,5,P): windows of mean 0 and length 1, whose products are correlations.

    The coarse light and dark that unlike photographs share is taken off. A window of one colour has length 0.
    """
    grey = reduced_NHW.astype(np.float32)
    fine = grey - gaussian_filter(grey, (0, COARSE, COARSE))
    side = SIDE // 2
    windows = np.stack([fine[:, y : y + side, x : x + side] for y, x in WINDOWS], axis=1)
    windows_NWP = windows.reshape(len(grey), len(WINDOWS), side * side)
    windows_NWP -= windows_NWP.mean(axis=2, keepdims=True)
    length_NW1 = np.linalg.norm(windows_NWP, axis=2, keepdims=True)
    return np.where(length_NW1 > 1, windows_NWP / np.maximum(length_NW1, 1), 0)


def correlations(reduced_NHW: np.ndarray, a_M: np.ndarray, b_M: np.ndarray) -> np.ndarray:
    """How alike the details of images a and b are: the least of the five windows' correlations, float32 (M,).

    The least, so that a frame or an outline in common is not enough.
    """
    pairs = zip(_parts(reduced_NHW, a_M), _parts(reduced_NHW, b_M), strict=True)
    alike = [np.einsum("nwp,nwp->nw", details(a), details(b)).min(axis=1) for a, b in pairs]
    return np.concatenate([np.zeros(0, np.float32), *alike])


def exact_pairs(digests_N: np.ndarray) -> pd.DataFrame:
    """`a`, `b`, `distance` 0, `correlation` 1: each image with the first one that has the same pixels."""
    rows = pd.Series(np.arange(len(digests_N)))
    first = rows.groupby(digests_N).transform("first")
    copies = rows[rows != first]
    return pd.DataFrame({"a": first[copies], "b": copies, "distance": 0, "correlation": 1.0})


def similar_pairs(images: np.ndarray, digests_N: np.ndarray) -> pd.DataFrame:
    """`a` < `b`, `distance`, `correlation`: all images of different pixels whose hashes are at most
    `MAX_DISTANCE` bits apart, the most alike first. Those of at least `MIN_CORRELATION` are near copies."""
    reduced_NHW = reduced(images)
    signs_NF = np.where(perceptual_hashes(reduced_NHW), 1, -1).astype(np.float32)
    n_bits, found = signs_NF.shape[1], []
    for start in range(0, len(images), CHUNK // 4):
        agreement = signs_NF[start : start + CHUNK // 4] @ signs_NF[start:].T  # n_bits - 2 * distance
        a, b = np.nonzero(agreement >= n_bits - 2 * MAX_DISTANCE)
        distance = ((n_bits - agreement[a, b]) / 2).astype(np.int64)
        pairs = pd.DataFrame({"a": a + start, "b": b + start, "distance": distance})
        found.append(pairs[(a < b) & (digests_N[pairs["a"]] != digests_N[pairs["b"]])])
    pairs = pd.concat(found)
    alike = correlations(reduced_NHW, pairs["a"].to_numpy(), pairs["b"].to_numpy())
    return pairs.assign(correlation=alike).sort_values("correlation", ascending=False, ignore_index=True)


def duplicate_table(store: Store, pairs: pd.DataFrame, kind: str) -> pd.DataFrame:
    """A row an image that has a copy: its group (images joined by pairs), distance to the nearest other.

    Groups are numbered from 0 in the order of their first rows.
    """
    n = len(store)
    joined = coo_array((np.ones(len(pairs)), (pairs["a"], pairs["b"])), shape=(n, n))
    _, component_N = connected_components(joined, directed=False)
    ends = pd.concat([pairs.rename(columns={end: "row"}) for end in ("a", "b")])
    nearest = ends.groupby("row").agg({"distance": "min", "correlation": "max"}).reset_index()
    rows = nearest["row"].to_numpy()
    table = pd.DataFrame(
        {
            "kind": kind,
            "group": pd.factorize(component_N[rows])[0],
            "split": store.official_split_N[rows],
            "row": rows,
            "image_id": store.image_ids_N[rows],
            "wnid": np.array([*store.wnids, ""])[store.labels_N[rows]],  # of unlabelled images, -1: empty
            "name": np.array([*store.class_names, ""])[store.labels_N[rows]],
        }
    )
    table = table.assign(distance=nearest["distance"], correlation=nearest["correlation"])
    return table.sort_values(["group", "row"], ignore_index=True)


def count_copies(table: pd.DataFrame) -> dict:
    """Images and groups of a `duplicate_table`; groups by where they lie, and how many have two labels."""
    groups = table.groupby("group")
    splits = groups["split"].agg(lambda split: " ".join(sorted(set(split))))
    n_labels = groups["wnid"].nunique()
    counts = {"images": len(table), "groups": len(splits)}
    for place, both in (("within_train", "train"), ("within_valid", "valid"), ("between", "train valid")):
        labels = n_labels[splits == both]
        counts[place] = {"groups": len(labels), "conflicting_labels": int((labels > 1).sum())}
    return counts


def copied_from_train(table: pd.DataFrame, split: str = "valid") -> pd.DataFrame:
    """The rows of a `duplicate_table` that are images of the split with a copy in train."""
    with_train = table.loc[table["split"] == "train", "group"]
    return table[table["group"].isin(with_train) & (table["split"] == split)]


# Classes and pixels --------------------------------------------------------------------------------


def class_balance(store: Store, splits: Splits) -> pd.DataFrame:
    """`wnid`, `name` and the images in train, of which in fit and holdout, and in valid; a row a class."""
    rows = {
        "train": np.flatnonzero(store.official_split_N == "train"),
        "fit": splits.fit_N,
        "holdout": splits.holdout_N,
        "valid": splits.valid_N,
    }
    counts = {
        name: np.bincount(store.labels_N[rows_M], minlength=len(store.wnids)) for name, rows_M in rows.items()
    }
    return pd.DataFrame({"wnid": store.wnids, "name": store.class_names, **counts})


def pixel_statistics(images: np.ndarray, rows_M: np.ndarray) -> dict:
    """Images, how many are grey (R = G = B everywhere), mean and standard deviation of R, G, B in [0, 1]."""
    n_grey, sums, squares = 0, np.zeros(3, np.int64), np.zeros(3, np.int64)
    for part in _parts(images, rows_M):
        n_grey += int((part == part[:, :1]).all(axis=(1, 2, 3)).sum())
        sums += part.sum(axis=(0, 2, 3), dtype=np.int64)
        squares += np.square(part, dtype=np.int32).sum(axis=(0, 2, 3), dtype=np.int64)
    n_pixels = len(rows_M) * images.shape[2] * images.shape[3]
    mean, mean_square = sums / n_pixels, squares / n_pixels
    return {
        "n": len(rows_M),
        "n_grey": n_grey,
        "share_grey": n_grey / len(rows_M),
        "mean": (mean / 255).tolist(),
        "std": (np.sqrt(mean_square - mean**2) / 255).tolist(),
    }


# What is known of the images -----------------------------------------------------------------------


def compare_splits(correct_train_N: np.ndarray, correct_valid_M: np.ndarray) -> dict:
    """Accuracies on two sets of other images, their difference train - valid, its interval and z-test."""
    train, valid = accuracy(correct_train_N), accuracy(correct_valid_M)
    counts, sizes = zip(*((part["n_correct"], part["n"]) for part in (train, valid)), strict=True)
    low, high = confint_proportions_2indep(
        counts[0], sizes[0], counts[1], sizes[1], method="newcomb", compare="diff", alpha=0.05
    )
    return {
        "train": train,
        "valid": valid,
        "difference": train["accuracy"] - valid["accuracy"],
        "difference_low": float(low),
        "difference_high": float(high),
        "difference_method": "95 % hybrid score interval of independent proportions (Newcombe 1998)",
        "p": float(proportions_ztest(counts, sizes)[1]),
        "p_method": "two-proportion z-test, pooled",
    }


def pretraining(store: Store, logits_NK: np.ndarray, copied: pd.DataFrame) -> dict:
    """`compare_splits` of predictions for the whole store, with all of valid and without `copied` images."""
    correct_N = logits_NK.argmax(axis=1) == store.labels_N
    train_N, valid_N = (store.official_split_N == split for split in ("train", "valid"))
    new_N = valid_N & ~np.isin(np.arange(len(store)), copied["row"])
    return {
        "all": compare_splits(correct_N[train_N], correct_N[valid_N]),
        "without_copies": compare_splits(correct_N[train_N], correct_N[new_N]),
    }


def accuracy_without(frame: pd.DataFrame, image_ids: pd.Series) -> dict:
    """Accuracy of a prediction table with all rows, with `image_ids` alone, and without them.

    Raises `SetupError` where the table lacks one of these images.
    """
    if "Image_Id" not in frame or (missing := set(image_ids) - set(frame["Image_Id"])):
        named = sorted(missing)[:3] if "Image_Id" in frame else "a column Image_Id"
        raise SetupError(f"the predictions lack {named}: they are not of these data, or of another layout.")
    copied = frame["Image_Id"].isin(image_ids)
    parts = {"all": frame, "copied": frame[copied], "without_copies": frame[~copied]}
    return {name: accuracy(part["Is_Correct"].to_numpy()) for name, part in parts.items() if len(part)}


# The report ----------------------------------------------------------------------------------------


def audit_data(config: Config, paths: Paths) -> Path:
    """Audit the data of `config`, with its backbone as it was pretrained; returns the folder of the report.

    Of a part of a data set (`data.classes`) these are its own images alone, and `row` counts them. Classes
    that are not ImageNet's, and weights without its classifier, leave `pretraining` empty.
    """
    try:
        setup = prepare(with_fields(config, UNTOUCHED), paths)
        logits_NK = untouched_logits(setup)
    except NoRowsError as error:
        log.warning("what the weights know is left out: %s", error)
        setup = prepare(with_fields(config, UNTOUCHED | {"model.head_init": "zero"}), paths)
        logits_NK = None
    about = {
        "backbone": setup.built.weights_tag,
        "weights_sha256": setup.built.weights_sha256,
        "image_size": setup.config.model.image_size,
        "data": setup.store.manifest["source"],
        "data_fingerprint": setup.store.fingerprint,
        "protocol": setup.splits.protocol,
        "hardware": setup.device.name,
    }
    folder = paths.results_around(config) / "data"
    store = without_unused(setup.store)
    write_audit(folder, store, make_splits(store, config.data), logits_NK, about)
    return folder


def untouched_logits(setup: Setup) -> np.ndarray:
    """(N,K) for every image that a split has, from features that a frozen arm uses as well."""
    features, _ = frozen_features(setup)
    device, labels_N = setup.device, setup.store.labels_N[used_rows(setup.store)]
    rows = Batches(features, labels_N, np.arange(len(features)), device.eval_batch, device.torch_device)
    return one_pass(setup.model.classify, rows, device, "untouched classifier")


def without_unused(store: Store) -> Store:
    """The store with the images that a split has; their pixels in memory, unless that is all of them."""
    used_U = used_rows(store)
    if len(used_U) == len(store):
        return store
    arrays = ("images", "labels_N", "official_split_N", "image_ids_N", "digests_N")
    return replace(store, true_labels_N=None, **{name: getattr(store, name)[used_U] for name in arrays})


def write_audit(
    folder: Path, store: Store, splits: Splits, logits_NK: np.ndarray | None, about: dict
) -> dict:
    """Write `audit.json`, tables and figures into `folder`; returns what `audit.json` holds.

    `logits_NK`: of the untouched pretrained classifier for the whole store, or None; `about`: what is
    recorded of it. Arms beside `folder`, or around it, are scored without the images of valid that train has.
    """
    similar = similar_pairs(store.images, store.digests_N)
    pairs = {
        "exact": exact_pairs(store.digests_N),
        "near": similar[similar["correlation"] >= MIN_CORRELATION],
    }
    tables = {kind: duplicate_table(store, found, kind) for kind, found in pairs.items()}
    balance = class_balance(store, splits)
    result = about | measure(store, tables, balance, logits_NK, folder.parent)
    write_csv(pd.concat(tables.values()), folder / "duplicates.csv")
    write_csv(balance, folder / "class_balance.csv")
    title = f"{result['copies']['exact']['groups']} images are there more than once"
    draw(folder / "exact_duplicates.png", exact_cells(tables["exact"]), store, title, EXACT_NOTE)
    title = "The images of different splits that are most alike"
    draw(folder / "near_duplicates.png", near_cells(similar, store), store, title, NEAR_NOTE)
    write_json(folder / "audit.json", result)
    return result


def measure(
    store: Store,
    tables: dict[str, pd.DataFrame],
    balance: pd.DataFrame,
    logits_NK: np.ndarray | None,
    results: Path,
) -> dict:
    """Every number of `audit.json`, as plain Python values."""
    copied = {kind: copied_from_train(table) for kind, table in tables.items()}
    copied["either"] = pd.concat(copied.values()).drop_duplicates("row")
    tested = {}
    if "test" in store.official_split_N:
        rows = pd.concat(copied_from_train(table, "test") for table in tables.values())["row"]
        tested["test_copied_from_train"] = rows.nunique()
    counts = balance.drop(columns=["wnid", "name"])
    splits = {name: np.flatnonzero(store.official_split_N == name) for name in ("train", "valid")}
    return {
        "n": len(store),
        "copies": {kind: count_copies(table) for kind, table in tables.items()},
        "near_if": {"distance_at_most": MAX_DISTANCE, "correlation_at_least": MIN_CORRELATION},
        "valid_copied_from_train": {kind: len(rows) for kind, rows in copied.items()},
        **tested,
        "balance": counts.agg(["sum", "min", "max"]).to_dict(),
        "pixels": {name: pixel_statistics(store.images, rows_M) for name, rows_M in splits.items()},
        "pretraining": None if logits_NK is None else pretraining(store, logits_NK, copied["either"]),
        "arms": arms_without(results, copied["either"]["image_id"]),
    }


def arms_without(results: Path, image_ids: pd.Series) -> dict:
    """Arm -> `accuracy_without` these images; arms with predictions of other images are left out."""
    changes = {}
    own, beside = (sorted(results.glob(f"{where}*_validation_predictions.csv")) for where in ("", "*/"))
    named = {path: path.name.partition("_validation_")[0] for path in own}
    for path, name in (named | {path: path.parent.name for path in beside}).items():
        try:
            changes[name] = accuracy_without(read_predictions(path), image_ids)
        except SetupError as error:
            log.warning("%s is left out: %s", path, error)
    return changes


def copies_in_words(found: dict) -> str:
    """What `audit.json` says of copies."""
    exact, near, both = (*found["copies"].values(), found["valid_copied_from_train"]["either"])
    tested = found.get("test_copied_from_train")
    also = "" if tested is None else f", and {tested} of `test`"
    return (
        f"of {found['n']:,} images {exact['images']} have a twin with the same pixels, {near['images']} more "
        f"a near copy; {both} images of `valid` are in train, too{also}"
    )


def draw(path: Path, cells: list[Cell], store: Store, title: str, note: str) -> None:
    """`copies_figure`; where there is nothing to show, no file, and no stale one."""
    path.unlink(missing_ok=True)
    if cells:
        note = f"{note}\n{footer({'data': store.manifest['source']})}"
        save(copies_figure(cells, store.pictures, title, note), path)


def exact_cells(table: pd.DataFrame) -> list[Cell]:
    """A cell a group: the image, once, and where it is twice; those of both splits first."""
    cells = []
    for _, group in table.groupby("group"):
        text = "\n".join(
            f"{split}: {name}" for split, name in zip(group["split"], group["name"], strict=True)
        )
        cells.append(Cell(group["row"].to_numpy()[:1], text, group["split"].nunique() > 1))
    return sorted(cells, key=lambda cell: not cell.marked)[:N_GROUPS]


def near_cells(similar: pd.DataFrame, store: Store) -> list[Cell]:
    """The pairs of different splits that are most alike, whether they count as copies or not."""
    split_N, label_N = store.official_split_N, store.labels_N
    between = similar[split_N[similar["a"]] != split_N[similar["b"]]]
    cells = []
    for pair in between.head(N_PAIRS).itertuples():
        rows = np.array([pair.a, pair.b])
        class_names = (*store.class_names, "no label")
        names = [f"{split_N[row]}: {class_names[label_N[row]]}" for row in rows]
        text = "\n".join([*names, f"{pair.distance} bits, r = {pair.correlation:.2f}"])
        cells.append(Cell(rows, text, pair.correlation >= MIN_CORRELATION))
    return cells
