"""A test set with classes that training did not have: what they cost, and what refusing or CLIP wins back.

    python -m src.experiment strangers --preset animals40 --profile offline --data DIR
    python -m src.experiment zero_shot --preset animals40 --profile offline --data DIR

Both need a finished run whose test images have labels, -1 for a class that training did not have, as the
stand-in of the study of animals has. Test images without labels are answered by `predict`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from src import SetupError
from src.answers import logits_of
from src.experiment import Result, saved_logits
from src.report import footer
from src.unknown import UNKNOWN, write_unknown
from src.zero_shot import zero_shot_logits

FOLDER, ZERO_SHOT = "strangers", "zero_shot"


def test_rows(result: Result) -> np.ndarray:
    """Rows of the labelled test images. Raises `SetupError` where the data have none."""
    store = result.setup.store
    rows_N = np.flatnonzero(store.official_split_N == "test")
    labels_N = store.labels_N[rows_N]
    if not (labels_N != UNKNOWN).any():
        raise SetupError(
            f"{store.manifest['source']} has no labelled test images: which of them are of unknown "
            "classes cannot be said. `predict` answers images without labels."
        )
    return rows_N


def write_strangers(result: Result) -> Path:
    """What the run makes of strangers, in the folder `strangers` beside its results (see `write_unknown`)."""
    setup, rows_N = result.setup, test_rows(result)
    test = logits_of(setup, setup.store, rows_N), setup.store.labels_N[rows_N]
    folder = result.folder / FOLDER
    write_unknown(folder, saved_logits(setup, "valid"), test, footer(result.metrics))
    return folder


def write_zero_shot(result: Result) -> Path:
    """The same of CLIP, which is told the names of the classes and has trained on none of the images."""
    store, rows_N, valid_N = result.setup.store, test_rows(result), result.setup.splits.valid_N
    valid, test = (
        (zero_shot_logits(store.pictures(rows), store.class_names), store.labels_N[rows])
        for rows in (valid_N, rows_N)
    )
    folder = result.folder / ZERO_SHOT
    write_unknown(folder, valid, test, f"CLIP, zero-shot · data: {store.manifest['source']}")
    return folder


def in_words(found: dict) -> str:
    """What `unknown.json` holds, in sentences: the fall, its share, the best score and its refusals."""
    fall = found["fall"]
    name, score = max(found["scores"].items(), key=lambda item: item[1]["auroc"])
    refused = score["refusal"]
    share = "" if fall["share_unknown"] is None else f", {fall['share_unknown']:.0%} of the fall"
    return (
        f"**{fall['valid_accuracy']:.2%}** of `valid` is right, **{fall['test']['accuracy']:.2%}** of the "
        f"test images. Of those {fall['n_unknown']:,} are of classes that training did not have, and no "
        f"answer can be right: without them it is {fall['known']['accuracy']:.2%}. So strangers cost "
        f"{100 * fall['fall_by_unknown']:.1f} points{share}.\n\n"
        f"The score that tells them best from the others is the {name} (AUROC {score['auroc']:.3f} "
        f"[{score['low']:.3f}, {score['high']:.3f}]). Refusing to answer below a threshold that keeps 95 % "
        f"of `valid` turns {refused['answer_all']['accuracy']:.2%} into **{refused['accuracy']:.2%}**, "
        'counting "unknown" as the right answer for a stranger '
        f"({refused['in_hindsight']['accuracy']:.2%} with the best threshold in hindsight, which nobody can "
        "choose beforehand)."
    )
