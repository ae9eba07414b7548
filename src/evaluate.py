"""From predictions to numbers: pure functions of a table with one row an image, and a command line.

    python -m src.evaluate A.csv              accuracy by row, its interval, macro F1, best and worst classes
    python -m src.evaluate A.csv B.csv        and the paired difference B - A, its interval, McNemar's test
    python -m src.evaluate A.csv B.csv --json

A file needs the columns `Ground_Truth` and `Prediction`, class indices or class names. No torch in here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_array, vstack
from scipy.special import logsumexp
from sklearn.metrics import f1_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from src import SetupError
from src.files import as_meant, write_csv

N_BINS = 15  # of the calibration error, as in Guo et al. 2017
N_EXTREMES = 5  # best and worst classes that `score` names
EXACT_BELOW = 25  # discordant pairs below which McNemar's test is the exact binomial one
N_RESAMPLES, BOOTSTRAP_SEED = 2000, 0
RESAMPLES_AT_ONCE = 100  # 8 MB of counts at 10,000 rows
NUMBERS = {"Index": int, "Confidence": float, "Calibrated_Confidence": float, "True_Rank": int, "Loss": float}
TRUTH_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def prediction_frame(
    logits_NK: np.ndarray,
    labels_N: np.ndarray,
    image_ids: Sequence[str],
    wnids: Sequence[str],
    class_names: Sequence[str],
) -> pd.DataFrame:
    """One row an image: truth, prediction, confidence, rank of the true class (0 = predicted), cross-entropy.

    The first of equal logits wins, in prediction and rank alike. Computed in float64; confidence and loss
    are rounded to 6 decimals, so that a table read back from its CSV gives the same numbers.
    Raises `SetupError` for logits that are not finite or labels that are no class.
    """
    logits_NK, labels_N = np.asarray(logits_NK, np.float64), np.asarray(labels_N, np.int64)
    if not (logits_NK.shape == (len(labels_N), len(wnids)) == (len(image_ids), len(class_names))):
        raise SetupError(
            f"logits {logits_NK.shape} do not fit {len(labels_N)} labels, {len(image_ids)} image ids and "
            f"{len(wnids)} wnids, {len(class_names)} names of classes."
        )
    _require_usable(logits_NK, labels_N, image_ids)
    predicted_N, rows = logits_NK.argmax(axis=1), np.arange(len(labels_N))
    true_N1 = logits_NK[rows, labels_N][:, None]
    earlier_NK = np.arange(len(wnids)) < labels_N[:, None]
    ranks_N = ((logits_NK > true_N1) | ((logits_NK == true_N1) & earlier_NK)).sum(axis=1)
    total_N = logsumexp(logits_NK, axis=1)
    wnids, class_names = np.asarray(wnids, object), np.asarray(class_names, object)
    return pd.DataFrame(
        {
            "Index": rows,
            "Ground_Truth": labels_N,
            "Prediction": predicted_N,
            "Is_Correct": predicted_N == labels_N,
            "Ground_Truth_Wnid": wnids[labels_N].tolist(),
            "Ground_Truth_Name": class_names[labels_N].tolist(),
            "Prediction_Wnid": wnids[predicted_N].tolist(),
            "Prediction_Name": class_names[predicted_N].tolist(),
            "Confidence": np.exp(logits_NK.max(axis=1) - total_N).round(6),
            "True_Rank": ranks_N,
            "Loss": np.maximum(total_N - true_N1[:, 0], 0.0).round(6),
            "Image_Id": [str(image_id) for image_id in image_ids],
        }
    )


def with_calibrated_confidence(
    frame: pd.DataFrame, logits_NK: np.ndarray, temperature: float
) -> pd.DataFrame:
    """`prediction_frame`'s table with the confidence of the same answers, their logits over `temperature`."""
    scaled_NK = np.asarray(logits_NK, np.float64) / temperature
    confidence_N = np.exp(scaled_NK.max(axis=1) - logsumexp(scaled_NK, axis=1)).round(6)
    frame = frame.copy()
    frame.insert(frame.columns.get_loc("Confidence") + 1, "Calibrated_Confidence", confidence_N)
    return frame


def _require_usable(logits_NK: np.ndarray, labels_N: np.ndarray, image_ids: Sequence[str]) -> None:
    n_rows, n_classes = logits_NK.shape
    if (bad := np.flatnonzero(~np.isfinite(logits_NK).all(axis=1))).size:
        raise SetupError(
            f"the model's output is NaN or infinite for {bad.size} of {n_rows} images, first "
            f"{image_ids[bad[0]]!r}. Train again with a lower learning rate, or without mixed precision."
        )
    if (bad := np.flatnonzero((labels_N < 0) | (labels_N >= n_classes))).size:
        raise SetupError(f"label {labels_N[bad[0]]} of image {image_ids[bad[0]]!r} is none of {n_classes}.")


def write_predictions(frame: pd.DataFrame, path: Path) -> None:
    """The table as CSV, atomically; `read_predictions` gives the same table back."""
    write_csv(frame, path)


def read_predictions(path: Path) -> pd.DataFrame:
    """A prediction CSV, ours or any with `Ground_Truth` and `Prediction`; class columns as int or as text.

    Adds `Is_Correct` where it is missing. Raises `SetupError` naming file, row, column and remedy.
    """
    path = Path(path)
    frame = _read_text(path)
    if missing := [name for name in ("Ground_Truth", "Prediction") if name not in frame]:
        raise SetupError(
            f"{path} has no column {' and no column '.join(missing)}; its columns are {list(frame)[:12]}. "
            "Rename the columns of truth and prediction to Ground_Truth and Prediction."
        )
    classes = frame[["Ground_Truth", "Prediction"]]
    for name, cells in classes.items():
        if (empty := np.flatnonzero(cells.str.strip().str.lower().isin(["", "nan"]))).size:
            raise SetupError(f"{path}: {name} is empty in data row {empty[0]}. Fill it in or drop the row.")
    if all(cells.str.fullmatch(r"\d+(\.0+)?").all() for _, cells in classes.items()):
        frame[classes.columns] = classes.astype(float).astype(np.int64)
    for name, kind in NUMBERS.items():
        if name in frame:
            values = pd.to_numeric(frame[name], errors="coerce")
            _require(np.isfinite(values.to_numpy(float)), path, frame, name, "a number")
            frame[name] = values.astype(kind)
    correct = frame["Ground_Truth"] == frame["Prediction"]
    if "Is_Correct" in frame:
        said = frame["Is_Correct"].str.strip().str.lower().map(TRUTH_VALUES)
        _require(said.notna().to_numpy(), path, frame, "Is_Correct", "True or False")
        _require((said == correct).to_numpy(), path, frame, "Is_Correct", "what the classes say")
    return frame.assign(Is_Correct=correct)


def _read_text(path: Path) -> pd.DataFrame:
    """The CSV with every cell as text: a class may be called `NA`, an id may start with zeros."""
    try:
        frame = pd.read_csv(path, dtype=str, na_filter=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise SetupError(
            f"{path} does not exist. Name a prediction CSV, as runs write to results/."
        ) from None
    except (OSError, ValueError) as error:  # pandas' parser errors and a wrong encoding are ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise SetupError(f"{path} cannot be read as a CSV in UTF-8: {reason}. Save it as one.") from None
    if frame.empty:
        raise SetupError(f"{path} holds no rows. Run the arm again, or name another file.")
    if not isinstance(frame.index, pd.RangeIndex):
        raise SetupError(f"{path} has more cells in a row than names of columns. Quote cells with commas.")
    return frame.map(as_meant)


def _require(good_N: np.ndarray, path: Path, frame: pd.DataFrame, name: str, wanted: str) -> None:
    if not good_N.all():
        row = int(np.flatnonzero(~good_N)[0])
        raise SetupError(
            f"{path}: {name} is {frame[name].iloc[row]!r} in data row {row}, which is not {wanted}. "
            f"Correct the cell, or drop the column {name}."
        )


def is_right(frame: pd.DataFrame) -> np.ndarray:
    """(N,) bool, from the classes."""
    return (frame["Ground_Truth"] == frame["Prediction"]).to_numpy()


def wilson(n_correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    low, high = proportion_confint(n_correct, n, alpha=0.05, method="wilson")
    return float(low), float(high)


def accuracy(correct_N: np.ndarray) -> dict:
    """Accuracy by row with its interval and counts."""
    n, n_correct = len(correct_N), int(np.sum(correct_N))
    if not n:
        raise SetupError("there are no predictions to score.")
    low, high = wilson(n_correct, n)
    return {"n": n, "n_correct": n_correct, "accuracy": n_correct / n, "wilson_low": low, "wilson_high": high}


def score(frame: pd.DataFrame) -> dict:
    """All numbers of one prediction table, as plain Python values.

    `macro_f1` is over the classes present in the truth. Where the table has their columns: `top5_accuracy`,
    `loss` (mean cross-entropy), `ece` (expected calibration error, Guo et al. 2017, 15 equal bins) and
    `ece_calibrated`, the same of `Calibrated_Confidence`.
    """
    truth_N, predicted_N = frame["Ground_Truth"], frame["Prediction"]
    scores = accuracy(is_right(frame))
    present = np.unique(truth_N)
    f1 = f1_score(truth_N, predicted_N, labels=present, average="macro", zero_division=0)
    scores["macro_f1"] = float(f1)
    if "True_Rank" in frame:
        scores["top5_accuracy"] = float((frame["True_Rank"] < 5).mean())
    if "Loss" in frame:
        scores["loss"] = float(frame["Loss"].mean())
    for column, name in (("Confidence", "ece"), ("Calibrated_Confidence", "ece_calibrated")):
        if column in frame:
            scores[name] = calibration_error(frame[column].to_numpy(), is_right(frame))
    table = per_class(frame)[["name", "accuracy", "n"]].sort_values("accuracy", kind="stable")
    scores["worst_classes"] = table.head(N_EXTREMES).to_dict("records")
    best = table.sort_values("accuracy", ascending=False, kind="stable")
    scores["best_classes"] = best.head(N_EXTREMES).to_dict("records")
    return scores


def calibration_error(confidence_N: np.ndarray, correct_N: np.ndarray) -> float:
    """Mean distance of confidence and accuracy over bins (low, high], weighted by their rows."""
    gaps = np.bincount(_bins(confidence_N), weights=confidence_N - correct_N, minlength=N_BINS)
    return float(np.abs(gaps).sum() / len(confidence_N))


def _bins(confidence_N: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(confidence_N * N_BINS).astype(int) - 1, 0, N_BINS - 1)


def reliability(frame: pd.DataFrame, column: str = "Confidence") -> pd.DataFrame:
    """A row a bin of `column`'s calibration error, empty ones left out: how sure, and how often right.

    `low` < confidence <= `high`, mean `confidence`, then accuracy with its interval and counts. The mean of
    |confidence - accuracy| weighted by n is `calibration_error`. The table of DeGroot and Fienberg 1983.
    """
    rows = [
        {"low": k / N_BINS, "high": (k + 1) / N_BINS, "confidence": inside[column].mean()}
        | accuracy(is_right(inside))
        for k, inside in frame.groupby(_bins(frame[column].to_numpy()))
    ]
    return pd.DataFrame(rows)


def class_texts(frame: pd.DataFrame, kind: str = "Name") -> dict:
    """Class -> its name (or `Wnid`), from both sides of the table; the class itself as text without them."""
    texts = {}
    for side in ("Prediction", "Ground_Truth"):
        pairs = frame.drop_duplicates(side)
        shown = pairs[f"{side}_{kind}"] if f"{side}_{kind}" in frame else pairs[side].astype(str)
        texts.update(zip(pairs[side].tolist(), shown.tolist(), strict=True))
    return texts


def per_class(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a class of the truth, in class order: accuracy, its interval, the class it is most taken for."""
    names, wnids = class_texts(frame), class_texts(frame, "Wnid")
    rows = []
    for label, predicted in frame.groupby("Ground_Truth")["Prediction"]:
        taken_for = predicted[predicted != label].value_counts().rename_axis("class").reset_index()
        taken_for = taken_for.sort_values(["count", "class"], ascending=[False, True])["class"]
        rows.append(
            {"class": label, "wnid": wnids[label], "name": names[label]}
            | accuracy((predicted == label).to_numpy())
            | {"most_confused_with": names[taken_for.iloc[0]] if len(taken_for) else ""}
        )
    return pd.DataFrame(rows)


def confusion(frame: pd.DataFrame, n_classes: int) -> np.ndarray:
    """Counts (K,K), row = truth, for integer classes."""
    cells_N = frame["Ground_Truth"].to_numpy() * n_classes + frame["Prediction"].to_numpy()
    return np.bincount(cells_N, minlength=n_classes**2).reshape(n_classes, n_classes)


def compare(a: pd.DataFrame, b: pd.DataFrame) -> dict:
    """Two tables over the same images: accuracies, difference b - a with a 95 % interval, McNemar's test.

    Rows are paired by `Image_Id` where both have it, else by order. Raises `SetupError` where they are
    not the same images with the same truth.
    """
    a, b, paired_by = paired(a, b)
    right_a, right_b = is_right(a), is_right(b)
    both, only_a = int((right_a & right_b).sum()), int((right_a & ~right_b).sum())
    only_b, neither = int((~right_a & right_b).sum()), int((~right_a & ~right_b).sum())
    exact = only_a + only_b < EXACT_BELOW
    test = mcnemar([[both, only_a], [only_b, neither]], exact=exact, correction=True)
    low, high = paired_interval(both, only_a, only_b, neither)
    return {
        "n": len(a),
        "paired_by": paired_by,
        "a": accuracy(right_a),
        "b": accuracy(right_b),
        "difference": (only_b - only_a) / len(a),
        "difference_low": low,
        "difference_high": high,
        "difference_method": "95 % hybrid score interval for paired proportions (Newcombe 1998, method 10)",
        "both_correct": both,
        "only_a_correct": only_a,
        "only_b_correct": only_b,
        "both_wrong": neither,
        "mcnemar_p": min(float(test.pvalue), 1.0),
        "mcnemar_statistic": None if exact else float(test.statistic),
        "mcnemar_method": "exact binomial" if exact else "chi-squared with continuity correction",
    }


def paired(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Both tables in the order of `a`, and what paired them; see `compare`."""
    if len(a) != len(b):
        raise SetupError(
            f"the tables have {len(a)} and {len(b)} rows; only those of the same images compare."
        )
    if by_id := "Image_Id" in a and "Image_Id" in b:
        for ids in (a["Image_Id"], b["Image_Id"]):
            if ids.duplicated().any():
                raise SetupError(f"Image_Id {ids[ids.duplicated()].iloc[0]!r} occurs twice in one table.")
        if unknown := sorted(set(a["Image_Id"]) - set(b["Image_Id"])):
            raise SetupError(
                f"{len(unknown)} images of the first table are not in the second, first {unknown[0]!r}; "
                "score both models on the same data."
            )
        b = b.set_index("Image_Id").loc[a["Image_Id"]].reset_index()
    differs = np.flatnonzero(a["Ground_Truth"].to_numpy() != b["Ground_Truth"].to_numpy())
    if differs.size:
        i = differs[0]
        raise SetupError(
            f"Ground_Truth differs in {differs.size} rows, first data row {i}: {a['Ground_Truth'].iloc[i]!r} "
            f"and {b['Ground_Truth'].iloc[i]!r}. These are not the same images, or the class order differs."
        )
    return a, b, "Image_Id" if by_id else "row order"


def paired_interval(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """95 % interval of the accuracy difference b - a on the same rows.

    Newcombe 1998, Statistics in Medicine 17:2635, method 10: Wilson's intervals joined through the
    correlation of the pairs.
    """
    n = both + only_a + only_b + neither
    right_a, right_b = both + only_a, both + only_b
    p_a, p_b = right_a / n, right_b / n
    (low_a, high_a), (low_b, high_b) = wilson(right_a, n), wilson(right_b, n)
    product = right_a * (n - right_a) * right_b * (n - right_b)
    excess = both * neither - only_a * only_b
    phi = (max(excess - n / 2, 0) if excess > 0 else excess) / math.sqrt(product) if product else 0.0

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    difference = p_b - p_a
    return difference - distance(p_b - low_b, high_a - p_a), difference + distance(high_b - p_b, p_a - low_a)


def paired_bootstrap(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, dict]:
    """Numbers of `score` -> `difference` b - a, `low` and `high` of its 95 % percentile interval.

    Efron and Tibshirani 1993, chapters 8 and 13: images are drawn with replacement, `N_RESAMPLES` times from
    a fixed seed, the same ones in both tables, which are paired as in `compare`. Numbers whose columns a
    table lacks are left out. A resample has fewer distinct images, hence a larger calibration error: the
    interval of `ece` is rough.
    """
    a, b, _ = paired(a, b)
    codes_M, classes = pd.factorize(pd.concat([a["Ground_Truth"], a["Prediction"], b["Prediction"]]))
    truth_N, said_by_a_N, said_by_b_N = np.split(codes_M, 3)
    terms_a = _terms(a, truth_N, said_by_a_N, len(classes))
    terms_b = _terms(b, truth_N, said_by_b_N, len(classes))
    shared, n = [name for name in terms_a if name in terms_b], len(a)

    def differences(counts_NR: np.ndarray) -> np.ndarray:
        return np.stack(
            [
                _number(name, terms_b[name], counts_NR) - _number(name, terms_a[name], counts_NR)
                for name in shared
            ]
        )

    rng, drawn = np.random.default_rng(BOOTSTRAP_SEED), []
    for _ in range(0, N_RESAMPLES, RESAMPLES_AT_ONCE):
        rows_RN = rng.integers(n, size=(RESAMPLES_AT_ONCE, n))
        drawn.append(differences(np.stack([np.bincount(rows_N, minlength=n) for rows_N in rows_RN], axis=1)))
    lows, highs = np.quantile(np.concatenate(drawn, axis=1), [0.025, 0.975], axis=1)
    values = differences(np.ones((n, 1)))[:, 0]
    return {
        name: {"difference": float(value), "low": float(low), "high": float(high)}
        for name, value, low, high in zip(shared, values, lows, highs, strict=True)
    }


def _terms(frame: pd.DataFrame, truth_N: np.ndarray, said_N: np.ndarray, n_classes: int) -> dict:
    """What each number of `score` adds up over images: name -> (terms, N)."""
    rows_N, right_N = np.arange(len(frame)), truth_N == said_N

    def by(group_N: np.ndarray, values_N: np.ndarray, n_groups: int) -> csr_array:
        return csr_array((values_N.astype(float), (group_N, rows_N)), shape=(n_groups, len(frame)))

    def total(values_N: np.ndarray) -> csr_array:
        return csr_array(values_N.astype(float)[None, :])

    one_N = np.ones(len(frame))
    hits_truths_answers = [
        by(truth_N, right_N, n_classes),
        by(truth_N, one_N, n_classes),
        by(said_N, one_N, n_classes),
    ]
    terms = {"accuracy": total(right_N), "macro_f1": vstack(hits_truths_answers, format="csr")}
    if "True_Rank" in frame:
        terms["top5_accuracy"] = total((frame["True_Rank"] < 5).to_numpy())
    if "Loss" in frame:
        terms["loss"] = total(frame["Loss"].to_numpy())
    if "Confidence" in frame:
        confidence_N = frame["Confidence"].to_numpy()
        terms["ece"] = by(_bins(confidence_N), confidence_N - right_N, N_BINS)
    return terms


def _number(name: str, terms: csr_array, counts_NR: np.ndarray) -> np.ndarray:
    """(R,) values of a number of `score`, for how often each image occurs in each of R resamples."""
    sums_MR, n = terms @ counts_NR, len(counts_NR)
    if name == "macro_f1":
        hits_KR, truths_KR, answers_KR = np.split(sums_MR, 3)
        f1_KR = 2 * hits_KR / np.maximum(truths_KR + answers_KR, 1)
        present_KR = truths_KR > 0
        return (f1_KR * present_KR).sum(axis=0) / present_KR.sum(axis=0)
    return np.abs(sums_MR).sum(axis=0) / n  # one sum that is not negative, or the gaps of the bins


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def score_text(path: str, scores: dict) -> str:
    """`score` as a table for the terminal."""
    interval = f"[{100 * scores['wilson_low']:.2f}, {100 * scores['wilson_high']:.2f}]"
    lines = [
        ("accuracy", f"{percent(scores['accuracy'])}   95 % Wilson {interval}"),
        ("rows", f"{scores['n_correct']:,} of {scores['n']:,} correct"),
        ("macro F1", f"{scores['macro_f1']:.4f}"),
    ]
    if "top5_accuracy" in scores:
        lines.append(("top-5", percent(scores["top5_accuracy"])))
    lines += [(key, f"{scores[key]:.4f}") for key in ("loss", "ece", "ece_calibrated") if key in scores]
    for kind in ("worst", "best"):
        for i, c in enumerate(scores[f"{kind}_classes"]):
            title = "" if i else f"{kind} classes"
            lines.append(
                (title, f"{100 * c['accuracy']:5.1f} % of {c['n']:<4} {' '.join(c['name'].split())}")
            )
    return "\n".join([path, *(f"  {title:<14} {text}" for title, text in lines)])


def comparison_text(result: dict) -> str:
    """`compare` as a table for the terminal."""
    low, high = 100 * result["difference_low"], 100 * result["difference_high"]
    return "\n".join(
        [
            f"second - first, {result['n']:,} rows paired by {result['paired_by']}",
            f"  difference     {100 * result['difference']:+.2f} points   [{low:+.2f}, {high:+.2f}]",
            f"                 {result['difference_method']}",
            f"  one right only first {result['only_a_correct']:,}, second {result['only_b_correct']:,}",
            f"  McNemar        p = {result['mcnemar_p']:.3g}   {result['mcnemar_method']}",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; a `SetupError` is one message and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m src.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="CSV", help="one prediction CSV, or two to compare")
    parser.add_argument("--json", action="store_true", help="JSON instead of text")
    args = parser.parse_args(arguments)
    if len(args.files) > 2:
        parser.error("at most two files")
    try:
        frames = [read_predictions(Path(name)) for name in args.files]
        scores = [{"file": name, **score(frame)} for name, frame in zip(args.files, frames, strict=True)]
        comparison = compare(*frames) if len(frames) == 2 else None
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        data = scores[0] if comparison is None else {"scores": scores, "comparison": comparison}
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        texts = [score_text(s["file"], s) for s in scores]
        print("\n\n".join(texts + ([comparison_text(comparison)] if comparison else [])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
