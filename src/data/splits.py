"""Fit, holdout and valid: who is trained on, chosen on and reported on.

Everything is decided by pixels and labels, never by file names or row order, so that every layout of
the same data gives the same splits in the same order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from src import SetupError
from src.config import DataConfig
from src.data.store import Store
from src.files import write_atomically


@dataclass(frozen=True)
class Splits:
    """Row indices into the store, int64, each sorted by (label, digest, image id).

    `holdout`: fit and holdout divide the official train, valid is untouched until the end.
    `published`: fit is all of train and holdout_N is valid_N, so choices are made on what is reported.
    With `folds`, train is the official one without the part that is valid. `test` is in none of them.
    `fit_per_class` and `imbalance` of the config take images from fit alone.
    """

    protocol: str
    fit_N: np.ndarray = field(repr=False)
    holdout_N: np.ndarray = field(repr=False)
    valid_N: np.ndarray = field(repr=False)
    seed: int
    digests_N: np.ndarray = field(repr=False)

    def save(self, path: Path) -> None:
        """Write protocol, seed, counts and the images' digests as JSON, atomically."""
        rows = {"fit": self.fit_N, "holdout": self.holdout_N, "valid": self.valid_N}
        data = {
            "protocol": self.protocol,
            "split_seed": self.seed,
            "counts": {name: len(rows_N) for name, rows_N in rows.items()},
            **{name: [f"{d:016x}" for d in self.digests_N[rows_N].tolist()] for name, rows_N in rows.items()},
        }
        write_atomically(Path(path), lambda partial: partial.write_text(json.dumps(data), encoding="utf-8"))


def make_splits(store: Store, config: DataConfig) -> Splits:
    """Divide the store by `config.protocol`, `holdout_per_class`, `folds`, `fold` and `split_seed`.

    Raises `SetupError` for a class too small to hold images out, for a fold that does not exist and for
    an empty split.
    """
    train_N = _canonical(store, np.flatnonzero(store.official_split_N == "train"))
    valid_N = _canonical(store, np.flatnonzero(store.official_split_N == "valid"))
    if config.folds or config.fold:
        is_valid_N = _parts(store, train_N, config) == config.fold
        train_N, valid_N = train_N[~is_valid_N], train_N[is_valid_N]
    if not len(train_N) or not len(valid_N):
        raise SetupError(
            f"{store.path.name}: {len(train_N)} train, {len(valid_N)} valid images; both are needed."
        )
    if config.protocol == "published":
        fit_N, holdout_N = train_N, valid_N
    else:
        per_class = [
            _hold_out(store, label, train_N[store.labels_N[train_N] == label], config)
            for label in range(len(store.wnids))
        ]
        holdout_N = np.concatenate(per_class)
        fit_N = train_N[~np.isin(train_N, holdout_N)]
    fit_N = _thin_out(store, fit_N, config)
    return Splits(config.protocol, fit_N, holdout_N, valid_N, config.split_seed, store.digests_N)


def _parts(store: Store, train_N: np.ndarray, config: DataConfig) -> np.ndarray:
    """The part, 0 to `folds` - 1, of every row of `train_N`: a class is dealt out by hashed (seed, digest).

    Parts of a class, and whole parts, differ by at most one image where there are no copies. Copies of an
    image are in one part, whatever their labels.
    """
    if config.folds < 2 or config.fold >= config.folds:
        raise SetupError(
            f"data.fold = {config.fold} is no part to report on with data.folds = {config.folds}: "
            "choose 2 folds or more and a fold below their number, or 0 and 0 for the official valid split."
        )
    part_of: dict[int, int] = {}
    n_whole = [0] * config.folds
    for label in range(len(store.wnids)):
        n_class = [0] * config.folds
        images = _by_image(store, train_N[store.labels_N[train_N] == label], config.split_seed)
        # Single ones come last: they even out what copies leave.
        for rows in sorted(images, key=len, reverse=True):
            smallest = min(range(config.folds), key=lambda part: (n_class[part], n_whole[part]))
            part = part_of.setdefault(int(store.digests_N[rows[0]]), smallest)
            n_class[part] += len(rows)
            n_whole[part] += len(rows)
    return np.array([part_of[digest] for digest in store.digests_N[train_N].tolist()], np.int64)


def _canonical(store: Store, rows_N: np.ndarray) -> np.ndarray:
    order = np.lexsort((store.image_ids_N[rows_N], store.digests_N[rows_N], store.labels_N[rows_N]))
    return rows_N[order].astype(np.int64)


def _thin_out(store: Store, fit_N: np.ndarray, config: DataConfig) -> np.ndarray:
    """At most `fit_per_class` rows a class; `imbalance` times fewer of the last class than of the first."""
    if not config.fit_per_class and config.imbalance == 1:
        return fit_N
    last = max(1, len(store.wnids) - 1)
    kept = []
    for label in range(len(store.wnids)):
        rows = sorted(fit_N[store.labels_N[fit_N] == label].tolist(), key=_rank(store, config.split_seed))
        quota = min(len(rows), config.fit_per_class or len(rows))
        kept += rows[: max(1, round(quota * config.imbalance ** (-label / last)))]
    return _canonical(store, np.array(kept))


def _rank(store: Store, seed: int) -> Callable[[int], bytes]:
    """A sort key that mixes rows by hashed (seed, digest), whatever order they came in."""
    return lambda row: hashlib.sha256(f"{seed}:{store.digests_N[row]}".encode()).digest()


def _by_image(store: Store, rows_N: np.ndarray, seed: int) -> Iterator[list[int]]:
    """The rows of each image (several where there are copies), images in the order of `_rank`."""
    rank = _rank(store, seed)
    for _, copies in groupby(sorted(rows_N.tolist(), key=rank), key=rank):
        yield list(copies)


def _hold_out(store: Store, label: int, rows_N: np.ndarray, config: DataConfig) -> np.ndarray:
    """`holdout_per_class` of the class's rows, by hashed (seed, digest); copies of an image stay together."""
    wanted = config.holdout_per_class
    name = f"class {store.wnids[label]} ({store.class_names[label]})"
    remedy = f"Lower it with `--set data.holdout_per_class=N` (now {wanted}), or add images."
    if len(rows_N) <= wanted:
        n = len(rows_N)
        raise SetupError(f"{name} has {n} train images; holding out {wanted} needs {wanted + 1}. {remedy}")

    chosen: list[int] = []
    for group in _by_image(store, rows_N, config.split_seed):
        if len(chosen) + len(group) <= wanted:
            chosen += group
        if len(chosen) == wanted:
            return _canonical(store, np.array(chosen))
    raise SetupError(f"{name} has too many copies of the same image to hold out exactly {wanted}. {remedy}")
