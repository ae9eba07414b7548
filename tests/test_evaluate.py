"""Numbers from predictions, each against another way to compute it."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.calibration import calibration_curve

from src import SetupError, evaluate
from src.evaluate import compare, prediction_frame, read_predictions, score, write_predictions

# fmt: off
COLUMNS = [
    "Index", "Ground_Truth", "Prediction", "Is_Correct", "Ground_Truth_Wnid", "Ground_Truth_Name",
    "Prediction_Wnid", "Prediction_Name", "Confidence", "True_Rank", "Loss", "Image_Id",
]
# fmt: on


def make(
    n: int = 300, n_classes: int = 12, seed: int = 0, gain: float = 1.5
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(n_classes, size=n)
    logits_NK = rng.normal(size=(n, n_classes)).astype(np.float32)
    logits_NK[np.arange(n), labels_N] += gain
    return logits_NK, labels_N


def frame_of(logits_NK: np.ndarray, labels_N: np.ndarray, names: list[str] | None = None) -> pd.DataFrame:
    n_classes = logits_NK.shape[1]
    ids = [f"valid/{i:05}" for i in range(len(labels_N))]
    return prediction_frame(
        logits_NK,
        labels_N,
        ids,
        [f"n{k:08}" for k in range(n_classes)],
        names or [f"name {k}" for k in range(n_classes)],
    )


def tables(both: int, only_a: int, only_b: int, neither: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two plain tables with the given counts of rows right in both, one or neither."""
    right_a = np.repeat([1, 1, 0, 0], [both, only_a, only_b, neither])
    right_b = np.repeat([1, 0, 1, 0], [both, only_a, only_b, neither])
    return tuple(pd.DataFrame({"Ground_Truth": 1, "Prediction": right}) for right in (right_a, right_b))


def test_frame_columns_and_consistency():
    frame = frame_of(*make())
    assert list(frame.columns) == COLUMNS
    assert (frame["Index"] == np.arange(300)).all()
    assert ((frame["True_Rank"] == 0) == frame["Is_Correct"]).all()
    assert 0 < frame["Is_Correct"].sum() < 300
    assert (frame["Ground_Truth_Name"] == "name " + frame["Ground_Truth"].astype(str)).all()
    assert (frame["Prediction_Wnid"] == frame["Prediction"].map("n{:08}".format)).all()


def test_frame_against_torch():
    logits_NK, labels_N = make()
    frame, logits = frame_of(logits_NK, labels_N), torch.from_numpy(logits_NK).double()
    loss_N = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels_N), reduction="none")
    np.testing.assert_allclose(frame["Loss"], loss_N, atol=1e-6)
    np.testing.assert_allclose(frame["Confidence"], logits.softmax(1).amax(1), atol=1e-6)
    in_top5 = (logits.topk(5).indices == torch.from_numpy(labels_N)[:, None]).any(1)
    numbers = score(frame)
    assert numbers["top5_accuracy"] == pytest.approx(in_top5.double().mean().item())
    assert numbers["loss"] == pytest.approx(loss_N.mean().item(), abs=1e-6)


def test_ties_go_to_the_first_class_in_prediction_and_rank():
    frame = frame_of(np.zeros((4, 4), np.float32), np.arange(4))
    assert frame["Prediction"].tolist() == [0] * 4 and frame["True_Rank"].tolist() == [0, 1, 2, 3]
    assert frame["Is_Correct"].tolist() == [True, False, False, False]


def test_large_logits_do_not_overflow():
    frame = frame_of(np.float32([[3e4, -3e4], [3e4, -3e4]]), np.array([0, 1]))
    assert frame["Loss"].tolist() == [0.0, 60000.0] and frame["Confidence"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    logits_NK, labels_N = make()
    logits_NK[17, 3] = bad
    with pytest.raises(SetupError, match=r"1 of 300 images, first 'valid/00017'"):
        frame_of(logits_NK, labels_N)


def test_labels_and_lengths_that_do_not_fit_are_refused():
    logits_NK, labels_N = make()
    with pytest.raises(SetupError, match="label 12"):
        frame_of(logits_NK, np.where(labels_N == 3, 12, labels_N))
    with pytest.raises(SetupError, match="do not fit 299 labels"):
        frame_of(logits_NK, labels_N[1:])


@pytest.mark.parametrize(("n_correct", "n"), [(8261, 10_000), (0, 7), (7, 7), (3, 8), (1, 1)])
def test_wilson_against_scipy(n_correct, n):
    expected = stats.binomtest(n_correct, n).proportion_ci(0.95, method="wilson")
    assert evaluate.wilson(n_correct, n) == pytest.approx(tuple(expected), abs=1e-12)


def test_the_studys_numbers():
    a, b = tables(7169, 1092, 1462, 277)
    scores = [score(a), score(b)]
    shown = [[round(100 * s[key], 2) for key in ("accuracy", "wilson_low", "wilson_high")] for s in scores]
    assert shown == [[82.61, 81.85, 83.34], [86.31, 85.62, 86.97]]
    result = compare(a, b)
    assert (result["only_a_correct"], result["only_b_correct"]) == (1092, 1462)
    assert result["difference"] == pytest.approx(0.0370)
    statistic = (abs(1092 - 1462) - 1) ** 2 / (1092 + 1462)
    assert result["mcnemar_statistic"] == pytest.approx(statistic)
    assert result["mcnemar_p"] == pytest.approx(stats.chi2.sf(statistic, 1))


def test_macro_f1_by_hand_over_classes_of_the_truth():
    frame = pd.DataFrame({"Ground_Truth": [0, 0, 0, 1, 1, 1], "Prediction": [0, 0, 1, 1, 1, 2]})
    f1_0, f1_1 = 2 * 1 * (2 / 3) / (1 + 2 / 3), 2 / 3  # class 2 is predicted only: not a class of its own
    assert score(frame)["macro_f1"] == pytest.approx((f1_0 + f1_1) / 2)


def test_calibration_error_against_a_plain_loop():
    frame = frame_of(*make(500))
    expected = 0.0
    for k in range(15):
        inside = frame[(frame["Confidence"] > k / 15) & (frame["Confidence"] <= (k + 1) / 15)]
        if len(inside):
            expected += len(inside) / 500 * abs(inside["Is_Correct"].mean() - inside["Confidence"].mean())
    assert score(frame)["ece"] == pytest.approx(expected)
    neighbours = evaluate.calibration_error(np.array([0.99, 0.92]), np.array([False, True]))
    assert neighbours == pytest.approx((0.99 + 0.08) / 2)  # two bins: over- and underconfidence do not cancel
    sure = frame.assign(Confidence=1.0, Prediction=frame["Ground_Truth"])
    assert score(sure)["ece"] == 0


def test_accuracy_is_by_row_and_ignores_what_is_correct_says():
    frame = pd.DataFrame({"Ground_Truth": [0] * 9 + [1], "Prediction": [0] * 9 + [0], "Is_Correct": False})
    assert score(frame)["accuracy"] == 0.9 and score(frame)["n_correct"] == 9


def test_worst_and_best_classes():
    frame = pd.DataFrame({"Ground_Truth": np.repeat(np.arange(8), 8), "Prediction": 99})
    frame["Prediction"] = frame["Prediction"].where(
        np.tile(np.arange(8), 8) >= frame["Ground_Truth"], frame["Ground_Truth"]
    )
    numbers = score(frame)
    assert [c["accuracy"] for c in numbers["worst_classes"]] == [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8]
    assert numbers["best_classes"][0] == {"name": "7", "accuracy": 7 / 8, "n": 8}
    json.dumps(numbers)


def test_per_class_and_confusion_agree():
    frame = frame_of(*make())
    counts_KK, table = evaluate.confusion(frame, 12), evaluate.per_class(frame)
    assert counts_KK.shape == (12, 12) and counts_KK.sum() == 300
    assert counts_KK[3, 5] == ((frame["Ground_Truth"] == 3) & (frame["Prediction"] == 5)).sum()
    assert (np.diag(counts_KK) == table["n_correct"]).all() and (counts_KK.sum(1) == table["n"]).all()
    off = counts_KK - np.diag(np.diag(counts_KK))
    assert table["most_confused_with"].tolist() == [f"name {k}" for k in off.argmax(1)]
    assert evaluate.confusion(pd.DataFrame({"Ground_Truth": [0], "Prediction": [2]}), 3)[0, 2] == 1


def test_mcnemar_is_exact_where_pairs_are_few():
    result = compare(*tables(50, 3, 12, 5))
    assert result["mcnemar_method"] == "exact binomial"
    assert result["mcnemar_p"] == pytest.approx(stats.binomtest(3, 15).pvalue)
    assert compare(*tables(50, 12, 12, 5))["mcnemar_method"] == "exact binomial"
    assert compare(*tables(50, 12, 13, 5))["mcnemar_method"].startswith("chi")
    assert compare(*tables(50, 0, 0, 5))["mcnemar_p"] == 1


@pytest.mark.parametrize("counts", [(700, 60, 110, 130), (30, 5, 9, 6), (0, 40, 60, 0)])
def test_paired_interval_against_the_bootstrap(counts):
    n = sum(counts)
    drawn = np.random.default_rng(0).multinomial(n, np.array(counts) / n, size=20_000)
    expected = np.quantile((drawn[:, 2] - drawn[:, 1]) / n, [0.025, 0.975])
    assert evaluate.paired_interval(*counts) == pytest.approx(expected, abs=0.35 / math.sqrt(n))


def test_paired_interval_uses_the_pairing_and_is_antisymmetric():
    low, high = evaluate.paired_interval(700, 10, 30, 260)
    unpaired = 1.96 * math.sqrt(0.71 * 0.29 / 1000 + 0.73 * 0.27 / 1000)
    assert high - low < unpaired < 2 * unpaired
    assert evaluate.paired_interval(700, 30, 10, 260) == pytest.approx((-high, -low))
    assert low > 0


@pytest.mark.parametrize("counts", [(9, 0, 0, 0), (0, 9, 0, 0), (0, 0, 9, 0), (0, 0, 0, 9), (1, 0, 0, 0)])
def test_paired_interval_at_the_edges(counts):
    low, high = evaluate.paired_interval(*counts)
    assert low <= (counts[2] - counts[1]) / sum(counts) <= high
    assert low >= -1 - 1e-9 and high <= 1 + 1e-9


def test_rows_are_paired_by_image_id():
    a, b = frame_of(*make(seed=1)), frame_of(*make(seed=1, gain=2.0))
    b_shuffled = b.sample(frac=1, random_state=3).reset_index(drop=True)
    assert compare(a, b_shuffled) == compare(a, b)
    assert compare(a, b)["paired_by"] == "Image_Id"
    with pytest.raises(SetupError, match="Ground_Truth differs in"):
        compare(a, b_shuffled.drop(columns="Image_Id"))
    assert compare(a, b.drop(columns="Image_Id"))["paired_by"] == "row order"


def test_tables_of_other_images_are_refused():
    a = frame_of(*make(seed=1))
    with pytest.raises(SetupError, match="300 and 299 rows"):
        compare(a, a.iloc[1:])
    with pytest.raises(
        SetupError, match="1 images of the first table are not in the second, first 'valid/00000'"
    ):
        compare(a, a.assign(Image_Id=["other", *a["Image_Id"].iloc[1:]]))
    with pytest.raises(SetupError, match="twice"):
        compare(a, a.assign(Image_Id="same"))
    with pytest.raises(SetupError, match="Ground_Truth differs in 300 rows"):
        compare(a, a.assign(Ground_Truth=a["Ground_Truth_Name"]))


def test_the_studys_own_columns_and_class_names_as_text(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("Ground_Truth,Prediction,Is_Correct\n0,0,True\n1,0,False\n")
    assert read_predictions(path)["Ground_Truth"].tolist() == [0, 1]
    path.write_text("\ufeffGround_Truth,Prediction\nNA,NA\n007,7\n", encoding="utf-8")
    frame = read_predictions(path)
    assert score(frame)["n_correct"] == 1 and frame["Is_Correct"].tolist() == [True, False]
    assert {c["name"] for c in score(frame)["worst_classes"]} == {"NA", "007"}


GOOD = "Ground_Truth,Prediction,Is_Correct,Confidence\n"
BAD_FILES = {
    "no such file": (None, "does not exist"),
    "zero bytes": ("", "cannot be read"),
    "only a header": (GOOD, "holds no rows"),
    "no column of predictions": ("Ground_Truth,Guess\n1,1\n", "no column Prediction.*'Guess'"),
    "an empty cell": (GOOD + "1,1,True,1\n1,,False,1\n", "Prediction is empty in data row 1"),
    "NaN": (GOOD + "1,1,True,1\nnan,1,False,1\n", "Ground_Truth is empty in data row 1"),
    "another truth": (GOOD + "1,1,True,1\n1,2,True,1\n", "Is_Correct is 'True' in data row 1"),
    "no truth value": (GOOD + "1,1,perhaps,1\n", "Is_Correct is 'perhaps' in data row 0.*True or False"),
    "no number": (GOOD + "1,1,True,high\n", "Confidence is 'high' in data row 0"),
    "infinite": (GOOD + "1,1,True,inf\n", "Confidence is 'inf' in data row 0"),
    "ragged": (GOOD + "1,1,True,1\n1,1,True,1,1,1\n", "cannot be read"),
    "too many cells": (GOOD + "9,1,1,True,1\n", "more cells"),
    "cut off": (GOOD + "1,1,True,1\n1,1\n", "data row 1"),
    "binary": (b"\x89PNG\r\n\x1a\n\xff\xfe", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(name, tmp_path, capsys):
    content, message = BAD_FILES[name]
    path = tmp_path / "p.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert evaluate.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and str(path) in err and err.count("\n") == 1
    assert re.search(message, err), err


def test_a_folder_is_no_file(tmp_path, capsys):
    assert evaluate.main([str(tmp_path)]) == 2 and str(tmp_path) in capsys.readouterr().err


def test_command_line(tmp_path, capsys):
    paths = []
    for name, gain in (("a", 1.0), ("b", 2.0)):
        write_predictions(frame_of(*make(gain=gain)), tmp_path / f"{name}.csv")
        paths.append(str(tmp_path / f"{name}.csv"))
    a, b = map(read_predictions, paths)
    assert evaluate.main([*paths, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["scores"] == [{"file": p, **score(f)} for p, f in zip(paths, (a, b), strict=True)]
    assert said["comparison"] == compare(a, b)
    assert evaluate.main([paths[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": paths[0], **score(a)}
    assert evaluate.main(paths) == 0
    text = capsys.readouterr().out
    assert f"{100 * score(b)['accuracy']:.2f} %" in text and "name 3" in text
    assert f"{100 * compare(a, b)['difference']:+.2f} points" in text and "McNemar" in text
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(paths * 2)
    assert exit_.value.code == 2


def test_reliability_against_scikit_learn_and_the_calibration_error():
    frame = frame_of(*make(500, gain=2.5))
    table = evaluate.reliability(frame)
    accuracy_B, confidence_B = calibration_curve(frame["Is_Correct"], frame["Confidence"], n_bins=15)
    np.testing.assert_allclose(table["accuracy"], accuracy_B)
    np.testing.assert_allclose(table["confidence"], confidence_B)
    ece = np.average((table["confidence"] - table["accuracy"]).abs(), weights=table["n"])
    assert ece == pytest.approx(score(frame)["ece"], abs=1e-12)
    assert table["n"].sum() == 500 and table["n_correct"].sum() == frame["Is_Correct"].sum()
    assert ((table["low"] < table["confidence"]) & (table["confidence"] <= table["high"])).all()
    for row in table.itertuples():
        interval = stats.binomtest(row.n_correct, row.n).proportion_ci(0.95, "wilson")
        assert (row.wilson_low, row.wilson_high) == pytest.approx(tuple(interval))


def test_reliability_leaves_empty_bins_out_and_bounds_belong_to_the_bin_below():
    frame = pd.DataFrame({"Ground_Truth": 0, "Prediction": [0, 1, 0], "Confidence": [0.2, 0.201, 1.0]})
    table = evaluate.reliability(frame)
    assert table[["low", "high"]].to_numpy().tolist() == [[2 / 15, 0.2], [0.2, 4 / 15], [14 / 15, 1]]
    assert table["accuracy"].tolist() == [1, 0, 1] and table["n"].tolist() == [1, 1, 1]


def test_paired_bootstrap_against_scipy_and_the_closed_form():
    a, b = frame_of(*make(1000, seed=1, gain=1.5)), frame_of(*make(1000, seed=1, gain=2.2))
    found = evaluate.paired_bootstrap(a, b)["accuracy"]
    right_a, right_b = evaluate.is_right(a), evaluate.is_right(b)
    expected = stats.bootstrap(
        (right_a, right_b),
        lambda x, y, axis: y.mean(axis) - x.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        random_state=np.random.default_rng(3),
    ).confidence_interval
    assert found["difference"] == pytest.approx(right_b.mean() - right_a.mean(), abs=1e-12)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected), abs=0.0025)
    closed = compare(a, b)
    expected = closed["difference_low"], closed["difference_high"]
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=0.0025)
    unpaired = 2 * 1.96 * math.sqrt(right_a.var() / 1000 + right_b.var() / 1000)
    assert found["high"] - found["low"] < 0.75 * unpaired


def test_paired_bootstrap_of_every_number_against_plain_resampling(monkeypatch):
    monkeypatch.setattr(evaluate, "N_RESAMPLES", 24)
    monkeypatch.setattr(evaluate, "RESAMPLES_AT_ONCE", 12)
    a, b = frame_of(*make(30, 9, seed=4, gain=1.0)), frame_of(*make(30, 9, seed=4, gain=2.0))
    found = evaluate.paired_bootstrap(a, b.sample(frac=1, random_state=0))
    assert sorted(found) == ["accuracy", "ece", "loss", "macro_f1", "top5_accuracy"]
    rows_RN = np.random.default_rng(evaluate.BOOTSTRAP_SEED).integers(30, size=(24, 30))
    drawn = [(score(a.iloc[rows_N]), score(b.iloc[rows_N])) for rows_N in rows_RN]
    for name, value in found.items():
        low, high = np.quantile([after[name] - before[name] for before, after in drawn], [0.025, 0.975])
        expected = {"difference": score(b)[name] - score(a)[name], "low": low, "high": high}
        assert value == pytest.approx(expected, abs=1e-12), name


def test_paired_bootstrap_of_plain_tables():
    a, b = tables(50, 3, 12, 5)
    names = ["cat", "dog"]
    text = [t.assign(**{c: t[c].map(dict(enumerate(names))) for c in t}) for t in (a, b)]
    assert evaluate.paired_bootstrap(a, b) == evaluate.paired_bootstrap(*text)
    assert sorted(evaluate.paired_bootstrap(a, b)) == ["accuracy", "macro_f1"]
    with pytest.raises(SetupError, match="70 and 69 rows"):
        evaluate.paired_bootstrap(a, b.iloc[1:])
