"""Images of classes that training did not have: how well they are told apart, what they cost, what refusing
wins back.

Pure functions of logits and of scores. A score says how *known* an image looks; higher is more known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import entr, logsumexp, softmax
from sklearn.metrics import roc_curve

from src import SetupError
from src.evaluate import BOOTSTRAP_SEED, N_RESAMPLES, accuracy
from src.figures.unknown import unknown_figure
from src.files import write_json
from src.report import rounded, save, write_csv

KEPT = 0.95  # of known images, by the threshold that refuses the others
UNKNOWN = -1  # label of an image whose class training did not have


def max_softmax(logits_NK: np.ndarray) -> np.ndarray:
    """Probability (N,) of the class that is answered (Hendrycks & Gimpel 2017)."""
    return softmax(np.asarray(logits_NK, np.float64), axis=1).max(axis=1)


def max_logit(logits_NK: np.ndarray) -> np.ndarray:
    """The largest logit (N,), which probabilities forget (Hendrycks et al. 2022)."""
    return np.asarray(logits_NK, np.float64).max(axis=1)


def energy(logits_NK: np.ndarray) -> np.ndarray:
    """log Σ exp of the logits (N,), the negative of the free energy at temperature 1 (Liu et al. 2020)."""
    return logsumexp(np.asarray(logits_NK, np.float64), axis=1)


def negative_entropy(logits_NK: np.ndarray) -> np.ndarray:
    """Σ p log p (N,) of the softmax, in nats: 0 where one class has it all, -log K where all are equal."""
    return -entr(softmax(np.asarray(logits_NK, np.float64), axis=1)).sum(axis=1)


SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "maximum softmax": max_softmax,
    "maximum logit": max_logit,
    "energy": energy,
    "negative entropy": negative_entropy,
}


def detection(known_N: np.ndarray, unknown_M: np.ndarray) -> dict:
    """How well a score tells N known images from M unknown ones.

    `auroc` with `low` and `high`: see `auroc_interval`. `fpr_at_95_tpr`: share of the unknown images that the
    threshold lets through which keeps 95 % of the known. `roc`: a table of threshold, fpr and tpr with the
    corners of the curve; its first threshold is infinite. Raises `SetupError` for scores that are none or not
    finite.
    """
    known_N, unknown_M = _usable(known_N, "known"), _usable(unknown_M, "unknown")
    n, m = len(known_N), len(unknown_M)
    auroc, low, high = auroc_interval(known_N, unknown_M)
    fpr, tpr, thresholds = roc_curve(np.repeat([1, 0], [n, m]), np.concatenate([known_N, unknown_M]))
    return {
        "n_known": n,
        "n_unknown": m,
        "auroc": auroc,
        "low": low,
        "high": high,
        "fpr_at_95_tpr": float((unknown_M >= threshold_keeping(known_N)).mean()),
        "roc": pd.DataFrame({"threshold": thresholds, "fpr": fpr, "tpr": tpr}),
    }


def auroc_interval(known_N: np.ndarray, unknown_M: np.ndarray) -> tuple[float, float, float]:
    """The probability that a known image scores higher than an unknown one, and its 95 % interval.

    Ties count half. Percentile bootstrap (Efron & Tibshirani 1993) from a fixed seed; known and unknown
    images are drawn apart.
    """
    n, m = len(known_N), len(unknown_M)
    scores, codes = np.unique(np.concatenate([known_N, unknown_M]), return_inverse=True)

    def auroc(known_codes: np.ndarray, unknown_codes: np.ndarray) -> float:
        known_S, unknown_S = (np.bincount(c, minlength=len(scores)) for c in (known_codes, unknown_codes))
        below_S = np.cumsum(unknown_S) - unknown_S / 2  # unknown images below each score, ties half
        return float(known_S @ below_S / (n * m))

    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = [
        auroc(codes[:n][rng.integers(n, size=n)], codes[n:][rng.integers(m, size=m)])
        for _ in range(N_RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return auroc(codes[:n], codes[n:]), float(low), float(high)


def threshold_keeping(scores_N: np.ndarray) -> float:
    """The largest score such that 95 % of the images, or more, score as high or higher."""
    kept = math.ceil(KEPT * len(scores_N))
    return float(np.sort(scores_N)[len(scores_N) - kept])


def fall(
    logits_known_NK: np.ndarray, labels_known_N: np.ndarray, n_unknown: int, valid_accuracy: float
) -> dict:
    """How far `n_unknown` images of unknown classes explain that a test set scores lower than `valid`.

    With v the accuracy on `valid`, a that on the N known test images and u = `n_unknown`: no answer is right
    for an unknown image, so all test images together score t = a·N / (N + u). The fall divides into two,
    v - t = (a - t) + (v - a): what taking the unknown images away wins back, a - t = a·u / (N + u), and what
    remains on known classes, v - a, which may be negative. `share_unknown` = (a - t) / (v - t), None where
    nothing falls. `known` and `test` hold a and t with 95 % Wilson intervals. Raises `SetupError` without
    known images.
    """
    right_N = np.asarray(logits_known_NK).argmax(axis=1) == np.asarray(labels_known_N)
    known = accuracy(right_N)
    test = accuracy(np.concatenate([right_N, np.zeros(n_unknown, bool)]))
    by_unknown, whole = known["accuracy"] - test["accuracy"], valid_accuracy - test["accuracy"]
    return {
        "valid_accuracy": valid_accuracy,
        "known": known,
        "n_unknown": n_unknown,
        "test": test,
        "fall": whole,
        "fall_by_unknown": by_unknown,
        "fall_on_known": valid_accuracy - known["accuracy"],
        "share_unknown": by_unknown / whole if whole > 0 else None,
    }


def refusal(
    scores_valid_M: np.ndarray, scores_N: np.ndarray, right_N: np.ndarray, known_N: np.ndarray
) -> dict:
    """What a test set scores when images below a threshold are refused: answered "unknown", a class K+1.

    `scores_valid_M`: of `valid`, all known, which alone choose the threshold: 95 % of them are kept.
    `right_N`, `known_N` (bool): whether the class that is answered is right, and training had the image's
    class; refusing is right for an unknown image. Accuracies come with counts and Wilson intervals, beside
    `answer_all`, where nothing is refused. `in_hindsight` has the threshold that serves the test set best, of
    equals the one that refuses fewest: a bound which nobody can choose beforehand, not a result.
    """
    scores_N, right_N, known_N = np.asarray(scores_N), np.asarray(right_N), np.asarray(known_N)
    threshold = threshold_keeping(scores_valid_M)
    kept_N = scores_N >= threshold
    # Candidates: every score, and one above all, which refuses everything.
    candidates_T, codes_N = np.unique(scores_N, return_inverse=True)
    candidates_T = np.append(candidates_T, np.nextafter(candidates_T[-1], np.inf))
    gains_T = np.bincount(codes_N + 1, ~known_N, len(candidates_T))  # refused from the next candidate on
    losses_T = np.bincount(codes_N + 1, right_N & known_N, len(candidates_T))
    best = candidates_T[np.argmax(np.cumsum(gains_T - losses_T))]
    return {
        "threshold": threshold,
        "chosen_on": f"valid, {KEPT:.0%} of it kept",
        "kept_of_known": float(kept_N[known_N].mean()) if known_N.any() else None,
        "refused_of_unknown": float((~kept_N[~known_N]).mean()) if (~known_N).any() else None,
        **_with_refusal(kept_N, right_N, known_N),
        "answer_all": accuracy(right_N & known_N),
        "in_hindsight": {"threshold": float(best), **_with_refusal(scores_N >= best, right_N, known_N)},
    }


def _with_refusal(kept_N: np.ndarray, right_N: np.ndarray, known_N: np.ndarray) -> dict:
    """Accuracy in K+1 classes."""
    return accuracy(np.where(known_N, kept_N & right_N, ~kept_N))


def _usable(scores_N: np.ndarray, kind: str) -> np.ndarray:
    scores_N = np.asarray(scores_N, np.float64)
    if not len(scores_N) or not np.isfinite(scores_N).all():
        raise SetupError(
            f"the scores of {kind} images are none, NaN or infinite; {len(scores_N)} were given. Both known "
            "and unknown images are needed, and logits that are finite."
        )
    return scores_N


def write_unknown(
    folder: Path, valid: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], note: str
) -> dict:
    """Write `unknown.json`, `unknown_roc.csv` and `unknown.png` into `folder`; return what the JSON holds.

    `valid`, `test`: logits (N,K) and labels (N,); a test image of a class that training did not have is
    labelled `UNKNOWN`. `note`: the figure's footer, and `about` in the JSON. Raises `SetupError` where
    the test set lacks known or unknown images, or logits are not finite.
    """
    (valid_MK, valid_labels_M), (logits_NK, labels_N) = valid, test
    known_N, right_N = labels_N != UNKNOWN, logits_NK.argmax(axis=1) == labels_N
    scores = {name: score(logits_NK) for name, score in SCORES.items()}
    of_valid = {name: _usable(score(valid_MK), "valid") for name, score in SCORES.items()}
    found = {name: detection(scores[name][known_N], scores[name][~known_N]) for name in SCORES}
    curves = pd.concat([found[name].pop("roc").assign(score=name) for name in SCORES], ignore_index=True)
    for name in SCORES:
        found[name]["refusal"] = refusal(of_valid[name], scores[name], right_N, known_N)
    valid_accuracy = accuracy(valid_MK.argmax(axis=1) == valid_labels_M)
    fallen = fall(logits_NK[known_N], labels_N[known_N], int((~known_N).sum()), valid_accuracy["accuracy"])
    said = rounded({"about": note, "valid": valid_accuracy, "fall": fallen, "scores": found})
    folder = Path(folder)
    write_csv(curves[["score", "threshold", "fpr", "tpr"]], folder / "unknown_roc.csv")
    save(unknown_figure(scores, known_N, curves, said["scores"], note), folder / "unknown.png")
    write_json(folder / "unknown.json", said)
    return said
