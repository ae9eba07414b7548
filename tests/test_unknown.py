"""Unknown classes: scores against torch, detection against scikit-learn, the rest by count."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest, entropy
from sklearn.metrics import accuracy_score, auc, roc_auc_score
from test_report import assert_legible, said

from src import SetupError, unknown
from src.figures import unknown_figure
from src.unknown import (
    SCORES,
    UNKNOWN,
    auroc_interval,
    detection,
    fall,
    refusal,
    threshold_keeping,
    write_unknown,
)

few = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=30)  # with many ties


def logits(n: int, n_classes: int = 5, seed: int = 0, gain: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(n_classes, size=n)
    logits_NK = rng.normal(size=(n, n_classes)).astype(np.float32)
    logits_NK[np.arange(n), labels_N] += gain * rng.random(n)
    return logits_NK, labels_N


def of_test(n_known: int = 60, n_unknown: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of a test set in which unknown images get less of any class."""
    (known_NK, labels_N), (unknown_MK, _) = logits(n_known, seed=1), logits(n_unknown, seed=2, gain=1.0)
    labels_N = np.concatenate([labels_N, np.full(n_unknown, UNKNOWN)])
    order = np.random.default_rng(3).permutation(n_known + n_unknown)
    return np.concatenate([known_NK, unknown_MK])[order], labels_N[order]


# --------------------------------------------------------------------------------------------- scores


def test_scores_are_torchs():
    logits_NK, _ = logits(50)
    there = torch.from_numpy(logits_NK).double()
    expected = {
        "maximum softmax": there.softmax(1).amax(1),
        "maximum logit": there.amax(1),
        "energy": there.logsumexp(1),
        "negative entropy": torch.from_numpy(-entropy(there.softmax(1).numpy(), axis=1)),
    }
    assert list(SCORES) == list(expected)
    for name, score in SCORES.items():
        np.testing.assert_allclose(score(logits_NK), expected[name], rtol=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_a_sure_answer_looks_more_known_than_an_even_one(name):
    sure, even = SCORES[name](np.array([[9.0, 0, 0], [1, 1, 1]]))
    assert sure > even


def test_large_logits_overflow_nowhere():
    logits_NK = np.array([[1000.0, 0.0], [-1000.0, -1000.0]], np.float32)
    expected = [[1, 0.5], [1000, -1000], [1000, -1000 + np.log(2)], [0, -np.log(2)]]
    for score, values in zip(SCORES.values(), expected, strict=True):
        np.testing.assert_allclose(score(logits_NK), values, atol=1e-12)


# ------------------------------------------------------------------------------------------ detection


@settings(max_examples=60, deadline=None)
@given(few, few)
def test_detection_is_scikit_learns(known, unknown_scores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unknown, "N_RESAMPLES", 3)
        found = detection(known, unknown_scores)
    truth, scores = [1] * len(known) + [0] * len(unknown_scores), known + unknown_scores
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert auc(found["roc"]["fpr"], found["roc"]["tpr"]) == pytest.approx(found["auroc"], abs=1e-12)
    assert (found["n_known"], found["n_unknown"]) == (len(known), len(unknown_scores))
    rates = [  # of every threshold: unknown images let through, where 95 % of the known are kept
        np.mean([u >= t for u in unknown_scores])
        for t in scores
        if sum(k >= t for k in known) * 100 >= 95 * len(known)
    ]
    assert found["fpr_at_95_tpr"] == min(rates)


def test_the_interval_is_of_resampled_images():
    """The same draws, scored by scikit-learn."""
    rng = np.random.default_rng(5)
    known_N, unknown_M = rng.normal(1, 1, 40).round(1), rng.normal(0, 1, 25).round(1)
    value, low, high = auroc_interval(known_N, unknown_M)
    draws, again = np.random.default_rng(unknown.BOOTSTRAP_SEED), []
    for _ in range(unknown.N_RESAMPLES):
        drawn = [scores[draws.integers(len(scores), size=len(scores))] for scores in (known_N, unknown_M)]
        again.append(roc_auc_score([1] * 40 + [0] * 25, np.concatenate(drawn)))
    np.testing.assert_allclose([low, high], np.quantile(again, [0.025, 0.975]), atol=1e-12)
    assert low < value < high


@pytest.mark.parametrize("bad", [[], [np.nan, 1.0], [np.inf]])
def test_scores_that_cannot_be_compared_are_refused(bad):
    with pytest.raises(SetupError, match="scores of unknown images"):
        detection([1.0, 2.0], bad)
    with pytest.raises(SetupError, match="scores of known images"):
        detection(bad, [1.0])


@given(few)
def test_the_threshold_is_the_largest_that_keeps_enough(scores):
    enough = [t for t in scores if sum(s >= t for s in scores) * 100 >= 95 * len(scores)]
    assert threshold_keeping(scores) == max(enough)


@pytest.mark.parametrize("n", [20, 40, 60, 180, 300, 1900, 10_000])
def test_95_percent_of_a_round_number_is_exact(n):
    assert threshold_keeping(np.arange(n)) == n // 20


# -------------------------------------------------------------------------------- what it costs, and wins


def test_the_fall_by_hand():
    """16 of 20 known images right, 5 unknown: 95 % fall to 64 %, by 31 points, 16 of them the unknown's."""
    labels_N = np.arange(20) % 4
    answers_N = np.where(np.arange(20) < 16, labels_N, (labels_N + 1) % 4)
    result = fall(np.eye(4)[answers_N], labels_N, 5, 0.95)
    assert (result["known"]["accuracy"], result["test"]["accuracy"]) == (0.8, 0.64)
    for name, n in (("known", 20), ("test", 25)):
        expected = binomtest(16, n).proportion_ci(method="wilson")
        found = [result[name][key] for key in ("n", "n_correct", "wilson_low", "wilson_high")]
        assert found == pytest.approx([n, 16, *expected])
    assert result["fall"] == pytest.approx(0.31)
    assert result["fall_by_unknown"] == pytest.approx(0.16) == pytest.approx(0.8 * 5 / 25)
    assert result["fall_on_known"] == pytest.approx(0.15)
    assert result["share_unknown"] == pytest.approx(16 / 31)


@pytest.mark.parametrize(("n_unknown", "valid", "share"), [(0, 0.9, 0.0), (10, 1.0, 1.0), (0, 1.0, None)])
def test_the_share_of_a_fall(n_unknown, valid, share):
    """Nothing without unknown images, all where the known ones are as right as valid, none without a fall."""
    labels_N = np.arange(20) % 4
    known = np.eye(4)[labels_N]
    if valid == 0.9:
        known[:4] = known[1:5]  # 16 of 20
    assert fall(known, labels_N, n_unknown, valid)["share_unknown"] == share


def test_a_fall_needs_known_images():
    with pytest.raises(SetupError, match="no predictions"):
        fall(np.zeros((0, 3)), np.zeros(0, int), 5, 0.9)


images_of_test = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), min_size=1, max_size=25)


@given(few, images_of_test)
def test_refusing_is_classifying_into_one_class_more(of_valid, images):
    scores_N, known_N, right_N = (np.array(column) for column in zip(*images, strict=True))
    truth_N, answers_N = np.where(known_N, 0, 2), np.where(right_N & known_N, 0, 1)

    def with_refusal(threshold: float) -> float:
        return accuracy_score(truth_N, np.where(scores_N >= threshold, answers_N, 2))

    result = refusal(of_valid, scores_N, right_N & known_N, known_N)
    assert result["threshold"] == threshold_keeping(of_valid)
    assert result["accuracy"] == with_refusal(result["threshold"])
    assert result["answer_all"]["accuracy"] == with_refusal(-np.inf)
    every = {t: with_refusal(t) for t in [*scores_N.tolist(), np.inf]}
    best = result["in_hindsight"]
    assert best["accuracy"] == with_refusal(best["threshold"]) == max(every.values())
    lowest = min(t for t, value in every.items() if value == max(every.values()))
    assert best["threshold"] == (lowest if np.isfinite(lowest) else np.nextafter(scores_N.max(), np.inf))
    kept_N = scores_N >= result["threshold"]
    assert result["kept_of_known"] == (kept_N[known_N].mean() if known_N.any() else None)
    assert result["refused_of_unknown"] == ((~kept_N)[~known_N].mean() if (~known_N).any() else None)
    json.dumps(result, allow_nan=False)


def test_the_threshold_is_chosen_without_the_test_set():
    scores_N, known_N = np.arange(10.0), np.arange(10) >= 5
    result = refusal(np.arange(100.0), scores_N, known_N, known_N)
    assert result["threshold"] == 5 and result["accuracy"] == 1
    assert refusal(np.arange(100.0) - 5, scores_N, known_N, known_N)["accuracy"] == 0.5
    assert refusal(np.arange(100.0) - 5, scores_N, known_N, known_N)["in_hindsight"]["accuracy"] == 1


# --------------------------------------------------------------------------------------- what is written


def test_what_is_written(tmp_path):
    valid, test = logits(80), of_test()
    result = write_unknown(tmp_path, valid, test, "a footer")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "unknown.json", "unknown.png", "unknown_roc.csv"
    ]  # fmt: skip
    assert json.loads((tmp_path / "unknown.json").read_text()) == result
    logits_NK, labels_N = test
    curves, known_N = pd.read_csv(tmp_path / "unknown_roc.csv"), labels_N >= 0
    assert list(curves) == ["score", "threshold", "fpr", "tpr"] and set(curves["score"]) == set(SCORES)
    for name, score in SCORES.items():
        expected = roc_auc_score(known_N, score(logits_NK))
        assert result["scores"][name]["auroc"] == pytest.approx(expected, rel=1e-7) and expected > 0.6
        curve = curves[curves["score"] == name]
        assert auc(curve["fpr"], curve["tpr"]) == pytest.approx(expected, rel=1e-6)
        refused = result["scores"][name]["refusal"]
        assert refused["threshold"] == pytest.approx(threshold_keeping(score(valid[0])), rel=1e-7)
        assert refused["n"] == 100
    right = accuracy_score(valid[1], valid[0].argmax(1))
    assert result["fall"]["valid_accuracy"] == pytest.approx(right) == result["valid"]["accuracy"]
    assert result["fall"]["known"]["accuracy"] == pytest.approx(
        accuracy_score(labels_N[known_N], logits_NK[known_N].argmax(1))
    )
    assert result["fall"]["test"]["n"] == 100 and result["fall"]["n_unknown"] == 40
    with Image.open(tmp_path / "unknown.png") as image:
        assert image.width > 1000


def test_the_figure_says_what_was_found(tmp_path):
    logits_NK, labels_N = of_test()
    result = write_unknown(tmp_path, logits(80), (logits_NK, labels_N), "")
    scores = {name: score(logits_NK) for name, score in SCORES.items()}
    curves = pd.read_csv(tmp_path / "unknown_roc.csv")
    figure = unknown_figure(scores, labels_N >= 0, curves, result["scores"], "a footer")
    assert_legible(figure, "unknown")
    text = said(figure)
    assert "40 of 100 test images" in text and "a footer" in text
    assert "known classes: 60 images" in text and "unknown classes: 40 images" in text
    for name in SCORES:
        numbers = result["scores"][name]
        assert f"{name}: {numbers['auroc']:.3f} [{numbers['low']:.3f}, {numbers['high']:.3f}]" in text


@pytest.mark.parametrize("label", [0, UNKNOWN])
def test_a_test_set_of_one_kind_is_refused(tmp_path, label):
    logits_NK, _ = of_test()
    with pytest.raises(SetupError, match="Both known and unknown images are needed"):
        write_unknown(tmp_path, logits(80), (logits_NK, np.full(100, label)), "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["valid", "test"])
def test_logits_that_are_not_finite_are_refused(tmp_path, split):
    given_logits = {"valid": logits(80), "test": of_test()}
    given_logits[split][0][3, 2] = np.nan
    with pytest.raises(SetupError, match="NaN"):
        write_unknown(tmp_path, given_logits["valid"], given_logits["test"], "")
