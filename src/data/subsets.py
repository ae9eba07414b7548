"""Parts of a data set (`data.classes`): some classes of a store, its rows dealt out anew.

Nothing is decoded again, so that a part shares the store and the cached features of the whole. Three parts of
Tiny-ImageNet stand in for data sets of photographs that are not at hand; their names say so wherever they
appear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from src import SetupError
from src.data.store import Store

TARGET_EVERY = 5  # classes: one is of the target, the others are of the source
LARGEST = 20
ANIMALS_END = "n0260"  # Tiny-ImageNet's 59 animals are the WordNet ids below it
N_KNOWN = 40
N_TEST = 3000  # unlabelled images of the animals' challenge
TRAIN_IMAGES = (150, 250)  # of a class, as in the study of animals
VALID_SHARE = 0.15
DOGS = ("n02085620", "n02094433", "n02099601", "n02099712", "n02106662", "n02113799")
# Animals with a close relative among them, by kind.
LOOK_ALIKES = (
    *DOGS,
    *("n02123045", "n02123394", "n02124075", "n02125311", "n02129165"),  # cats, small and large
    *("n01629819", "n01641577", "n01644900"),  # amphibians
    *("n01770393", "n01774384", "n01774750", "n01784675"),  # spiders, scorpion, centipede
    *("n01983481", "n01984695"),  # lobsters
    *("n02226429", "n02231487", "n02233338", "n02236044"),  # insects with long legs
    *("n02279972", "n02281406"),  # butterflies
    *("n02403003", "n02410509", "n02415577", "n02423022"),  # bovids
    *("n02480495", "n02481823", "n02486410"),  # primates
)


def part_of(store: Store, name: str) -> Store:
    """The part `name` of the store. Raises `SetupError` where the store lacks a class that it needs."""
    return PARTS[name](store)


def keep_classes(store: Store, kept_K: np.ndarray, name: str = "") -> Store:
    """The same rows with some classes, numbered anew; rows of others lose class (-1) and split ("")."""
    number = np.full(len(store.wnids) + 1, -1)  # the last for rows without a class
    number[kept_K] = np.arange(len(kept_K))
    labels_N = number[store.labels_N]
    classes = [store.manifest["classes"][label] for label in kept_K]
    named = {"source": f"{store.manifest['source']}, {name}"} if name else {}
    return replace(
        store,
        labels_N=labels_N,
        official_split_N=np.where((labels_N >= 0) | (store.labels_N < 0), store.official_split_N, ""),
        manifest=store.manifest | {"classes": classes} | named,
    )


def transfer_part(target: bool) -> Callable[[Store], Store]:
    """Every fifth class in the order of their ids, or the other four of five."""

    def part(store: Store) -> Store:
        number_K = np.arange(len(store.wnids))
        is_target_K = number_K % TARGET_EVERY == TARGET_EVERY - 1
        return keep_classes(store, number_K[is_target_K == target])

    return part


def largest(store: Store) -> Store:
    """The 20 classes with most images, train and valid together; of equals the first."""
    counts_K = np.bincount(store.labels_N[store.labels_N >= 0], minlength=len(store.wnids))
    order_K = np.argsort(-counts_K, kind="stable")[:LARGEST]
    return keep_classes(store, np.sort(order_K), f"{LARGEST} largest classes")


def dogs(store: Store) -> Store:
    """Tiny-ImageNet's six breeds, for the study of dogs."""
    return keep_classes(store, _numbers(store, DOGS), f"a stand-in of {len(DOGS)} breeds")


def challenge(store: Store) -> Store:
    """The whole store. Raises `SetupError` unless it is the animals' challenge, test images and all."""
    bad = store.manifest.get("bad_files", [])
    n_test = int((store.official_split_N == "test").sum()) + len(bad)
    if len(store.wnids) != N_KNOWN or n_test < N_TEST:
        raise SetupError(
            f"{store.manifest['source']} has {len(store.wnids)} classes and {n_test:,} images right below "
            f"test/; the animals' challenge has {N_KNOWN} and {N_TEST:,}. Unpack all of it. To train on "
            "other images, take the preset `improvement`, or `--set data.classes=all`."
        )
    return store


def look_alikes(store: Store) -> Store:
    """Classes of Tiny-ImageNet that look alike, for the study of fine-grained classes."""
    kept_K = _numbers(store, LOOK_ALIKES)
    return keep_classes(store, kept_K, f"a stand-in of {len(kept_K)} look-alikes")


def animals(store: Store) -> Store:
    """Forty of Tiny-ImageNet's animals, for the study of animals; the test set has the others as well.

    Classes are drawn with a fixed seed, and so is how many train images each has (150 to 250). 15 % of those
    are `valid`, as in the study. `test` is the official validation split of every animal; its rows have a
    label where training has the class, and -1 where it has not. `true_labels_N` numbers all animals, those
    that training has first.
    """
    rng = np.random.default_rng(0)
    animals_K = np.array([i for i, wnid in enumerate(store.wnids) if wnid < ANIMALS_END])
    if len(animals_K) <= N_KNOWN:
        raise SetupError(
            f"data.classes = 'animals40' cuts {N_KNOWN} animals and more from Tiny-ImageNet; "
            f"{store.manifest['source']} has {len(animals_K)} classes with WordNet ids below {ANIMALS_END}."
        )
    known_K = np.sort(rng.choice(animals_K, N_KNOWN, replace=False))
    name = f"a stand-in of {N_KNOWN} animals"
    part = keep_classes(store, known_K, name)
    split_N = np.full(len(store), "", dtype="<U5")
    of_animals_N = np.isin(store.labels_N, animals_K) & (store.official_split_N == "valid")
    split_N[of_animals_N] = "test"
    for label in range(N_KNOWN):
        rows = np.flatnonzero((part.labels_N == label) & (store.official_split_N == "train"))
        rows = rows[np.lexsort((store.image_ids_N[rows], store.digests_N[rows]))]
        rows = rng.permutation(rows)[: rng.integers(TRAIN_IMAGES[0], TRAIN_IMAGES[1], endpoint=True)]
        n_valid = round(VALID_SHARE * len(rows))
        split_N[rows[:n_valid]], split_N[rows[n_valid:]] = "valid", "train"
    unknown_K = np.setdiff1d(animals_K, known_K)
    everyone = keep_classes(store, np.concatenate([known_K, unknown_K]))
    unknown = everyone.manifest["classes"][N_KNOWN:]
    return replace(
        part,
        official_split_N=split_N,
        true_labels_N=everyone.labels_N,
        manifest=part.manifest | {"unknown_classes": unknown},
    )


def _numbers(store: Store, wnids: tuple[str, ...]) -> np.ndarray:
    """Places of the classes, in the store's order."""
    if missing := sorted(set(wnids) - set(store.wnids)):
        raise SetupError(
            f"{store.manifest['source']} lacks {len(missing)} of the classes that data.classes asks for: "
            f"{', '.join(missing[:5])}. This part is cut from Tiny-ImageNet."
        )
    return np.flatnonzero(np.isin(store.wnids, wnids))


PARTS: dict[str, Callable[[Store], Store]] = {
    "all": lambda store: store,
    "source": transfer_part(target=False),
    "target": transfer_part(target=True),
    "challenge40": challenge,
    "largest20": largest,
    "dogs6": dogs,
    "look_alikes": look_alikes,
    "animals40": animals,
}
