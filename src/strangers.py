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
from src.evaluate import accuracy
from src.experiment import Result, saved_logits
from src.files import read_json, write_json
from src.report import footer, rounded
from src.unknown import max_softmax, threshold_keeping, write_unknown
from src.zero_shot import MODEL, PRETRAINED, zero_shot_logits

FOLDER, ZERO_SHOT = "strangers", "zero_shot"


def test_rows(result: Result) -> np.ndarray:
    """Rows of the labelled test images. Raises `SetupError` where the data have none."""
    store = result.setup.store
    rows_N = np.flatnonzero(store.official_split_N == "test")
    if store.true_labels_N is None or not len(rows_N):
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
    """What CLIP makes of them, which has trained on none of the images, in the folder `zero_shot`.

    `unknown.json` is of CLIP with the names that training has, as `write_strangers` is of the run;
    `zero_shot.json` of CLIP with the names of all classes, alone and beside the run (see `named`).
    """
    setup, rows_N = result.setup, test_rows(result)
    store, valid_N, n_known = setup.store, setup.splits.valid_N, len(setup.store.wnids)
    names = (*store.class_names, *store.unknown_names)
    valid_MA, clip_NA = (zero_shot_logits(store.pictures(rows), names) for rows in (valid_N, rows_N))
    valid = valid_MA[:, :n_known], store.labels_N[valid_N]
    test = clip_NA[:, :n_known], store.labels_N[rows_N]
    folder = result.folder / ZERO_SHOT
    about = {"backbone": f"CLIP {MODEL} ({PRETRAINED}), zero-shot", "data": store.manifest["source"]}
    note = footer(about | {"hardware": setup.device.name})
    write_unknown(folder, valid, test, note)
    own_NK, (own_valid_MK, _) = logits_of(setup, store, rows_N), saved_logits(setup, "valid")
    found = named(clip_NA, own_NK, own_valid_MK, store.true_labels_N[rows_N])
    beside = f"{note}; beside {footer(result.metrics)}"
    write_json(folder / "zero_shot.json", rounded({"about": beside, **found}))
    return folder


def named(
    clip_NA: np.ndarray, own_NK: np.ndarray, own_valid_MK: np.ndarray, labels_N: np.ndarray
) -> dict[str, dict]:
    """Right names for test images of all A classes, the first K of which training has.

    `clip`: CLIP's answers; `network`: the run's, which cannot be right on the others; `both`: the run's where
    its maximum softmax reaches the threshold that keeps 95 % of `valid`, else CLIP's among the names that
    training does not have. Each has `all`, `known` and `unknown` images, as `accuracy` counts them. That
    score, not the one that serves this test set best, as nobody could choose that beforehand.
    """
    n_known = own_NK.shape[1]
    kept_N = max_softmax(own_NK) >= threshold_keeping(max_softmax(own_valid_MK))
    own_N, others_N = own_NK.argmax(axis=1), n_known + clip_NA[:, n_known:].argmax(axis=1)
    answers = {"clip": clip_NA.argmax(axis=1), "network": own_N, "both": np.where(kept_N, own_N, others_N)}
    images = {"all": labels_N >= 0, "known": labels_N < n_known, "unknown": labels_N >= n_known}
    scores = {
        answer: {name: accuracy(said_N[of_N] == labels_N[of_N]) for name, of_N in images.items()}
        for answer, said_N in answers.items()
    }
    return {"classes": {"known": n_known, "unknown": clip_NA.shape[1] - n_known}, **scores}


def said(folder: Path, arm: str) -> str:
    """What was found of strangers in the results of the arm in `folder`, in Markdown; else the commands."""
    words = []
    for command, title, name, tell in (
        (FOLDER, "Strangers in the test set.", "unknown.json", in_words),
        (ZERO_SHOT, "CLIP, told the names.", "zero_shot.json", zero_shot_in_words),
    ):
        path = folder / command / name
        told = f"not run: `python -m src.experiment {command} --preset {arm} --profile offline --data DIR`"
        if path.exists():
            found = read_json(path)
            told = f"{tell(found)}\n\n({found['about']})"
        words.append(f"**{title}** {told}")
    return "\n\n".join(words)


def zero_shot_in_words(found: dict) -> str:
    """What `zero_shot.json` holds, in sentences."""

    def right(answer: str, of: str = "all") -> str:
        part = found[answer][of]
        return f"{part['accuracy']:.2%} [{part['wilson_low']:.2%}, {part['wilson_high']:.2%}]"

    n_known, n_unknown = found["classes"]["known"], found["classes"]["unknown"]
    return (
        f"With the names of all {n_known + n_unknown} classes CLIP has **{right('clip')}** of the "
        f"{found['clip']['all']['n']:,} test images right: {right('clip', 'known')} of the {n_known} classes "
        f"that training has, {right('clip', 'unknown')} of the {n_unknown} others. The trained network has "
        f"{right('network')}, and none of the others. Its answer where its maximum softmax reaches the "
        f"threshold that keeps 95 % of `valid`, CLIP's among the {n_unknown} other names where it does not: "
        f"**{right('both')}** ({right('both', 'known')} and {right('both', 'unknown')})."
    )


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
        f"Of {len(found['scores'])} scores the {name} tells them best from the others (AUROC "
        f"{score['auroc']:.3f} [{score['low']:.3f}, {score['high']:.3f}]). Refusing to answer below a "
        "threshold that keeps 95 % of `valid` turns "
        f"{refused['answer_all']['accuracy']:.2%} into **{refused['accuracy']:.2%}**, "
        'counting "unknown" as the right answer for a stranger '
        f"({refused['in_hindsight']['accuracy']:.2%} with the best threshold in hindsight, which nobody can "
        "choose beforehand)."
    )
