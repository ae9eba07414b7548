"""What two models get wrong: pure functions of their prediction tables, and the writer of `results/analysis`.

`a` is the baseline's table and `b` the improvement's, of the same images in the same order
(`src.evaluate.paired`), classes as integers. Rows are numbers of rows in either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from src import SetupError, figures, report
from src.evaluate import (
    N_RESAMPLES,
    accuracy,
    calibration_error,
    class_texts,
    compare,
    confusion,
    is_right,
    paired,
    paired_bootstrap,
    per_class,
    reliability,
)
from src.figures import Images, similarity_order
from src.files import sha256, write_atomically, write_json

ARMS = ("baseline", "improvement")
N_EXAMPLES = 3  # images of either direction of a confused pair
HISTOGRAM_BINS = 20
LEFT_OUT = np.arange(20) / 20  # shares of the least confident answers
QUOTED = (0.1, 0.2, 0.5)  # of them in analysis.json
SURE = 0.5  # a confidence above which one class has more than all others together
ALPHA = 0.05
N_NAMED, N_WRITTEN = 10, 200  # rows of a long table in analysis.json and in its CSV
GALLERY_RIGHT, GALLERY_WRONG, GALLERY_SEED = 2, 3, 0  # images a class
THUMBNAIL, COLUMNS, QUALITY = 64, 40, 55  # of the gallery's sheet: pixels, images a line, WebP's 0 to 100
SUPERCLASSES = Path(__file__).resolve().parent / "data" / "superclasses.csv"
OF_SUPERCLASSES = ("superclasses.csv", "superclasses.png", "confusion_blocks.png")

# fmt: off
PAIR_COLUMNS = (
    "first", "second", "first_name", "second_name", "first_as_second", "second_as_first", "n", "share",
    "n_first", "n_second", "first_rows", "second_rows",
)
# fmt: on


def confused_pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """A row an unordered pair of classes that are taken for each other, the most confused first.

    `first_as_second` counts images of the first that are taken for the second, `share` is that of all
    errors, `n_first` the first's images, `first_rows` the rows of its most confident such mistakes.
    """
    names, sizes = class_texts(frame), frame["Ground_Truth"].value_counts()
    wrong = frame.assign(row=np.arange(len(frame)))[~is_right(frame)]
    wrong = wrong.sort_values("Confidence", ascending=False, kind="stable")
    rows_of = wrong.groupby(["Ground_Truth", "Prediction"])["row"].agg(list).to_dict()
    pairs = []
    for first, second in sorted({(min(pair), max(pair)) for pair in rows_of}):
        there, back = rows_of.get((first, second), []), rows_of.get((second, first), [])
        n = len(there) + len(back)
        ends = (first, second, names[first], names[second])
        counts = (len(there), len(back), n, n / len(wrong), sizes.get(first, 0), sizes.get(second, 0))
        pairs.append((*ends, *counts, there[:N_EXAMPLES], back[:N_EXAMPLES]))
    table = pd.DataFrame(pairs, columns=PAIR_COLUMNS)
    return table.sort_values("n", ascending=False, kind="stable", ignore_index=True)


def changes_by_class(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """A row a class: both accuracies, images only b has right (`fixed`), only a (`broken`), net, p.

    `p` is McNemar's exact one for the class alone, `p_holm` adjusted for all classes (Holm 1979): among 200
    classes that nothing changed, ten would have p < 0.05. The largest net gain stands first.
    """
    right_a, right_b, truth = is_right(a), is_right(b), a["Ground_Truth"].to_numpy()
    flips = pd.DataFrame({"fixed": right_b & ~right_a, "broken": right_a & ~right_b}).groupby(truth).sum()
    table = report.class_changes(a, b).drop(columns="change").join(flips)
    table.insert(0, "wnid", table.index.map(class_texts(a, "Wnid")))
    table["net"] = table["fixed"] - table["broken"]
    tests = [mcnemar([[0, row.broken], [row.fixed, 0]], exact=True) for row in table.itertuples()]
    table["p"] = np.minimum([test.pvalue for test in tests], 1.0)
    table["p_holm"] = multipletests(table["p"], method="holm")[1]
    return table.reset_index().sort_values("net", ascending=False, kind="stable", ignore_index=True)


def changes_by_pair(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """A row a kind, truth and wrong answer, the most images first.

    `fixed`: a gives the wrong answer, b the right one. `broken`: a gives the right answer, b the wrong one.
    `n` images, `of` all that a (fixed) or b (broken) gets wrong in this way.
    """
    names, parts = class_texts(a) | class_texts(b), []
    for kind, wrong, other in (("fixed", a, b), ("broken", b, a)):
        keys = wrong[["Ground_Truth", "Prediction"]].set_axis(["class", "wrong"], axis=1)
        errors = keys.assign(right=is_right(other))[~is_right(wrong)]
        counts = errors.groupby(["class", "wrong"])["right"].agg(n="sum", of="size").reset_index()
        parts.append(counts[counts["n"] > 0].assign(kind=kind))
    table = pd.concat(parts, ignore_index=True)
    table["name"], table["wrong_name"] = table["class"].map(names), table["wrong"].map(names)
    columns = ["kind", "class", "name", "wrong", "wrong_name", "n", "of"]
    return table[columns].sort_values("n", ascending=False, kind="stable", ignore_index=True)


def confidence_histogram(frame: pd.DataFrame) -> pd.DataFrame:
    """Right and wrong answers by confidence, in equal bins from 0 to 1; `low` is a bin's lower bound."""
    right, edges = is_right(frame), np.linspace(0, 1, HISTOGRAM_BINS + 1)
    counts = [np.histogram(frame["Confidence"][rows], edges)[0] for rows in (right, ~right)]
    return pd.DataFrame({"low": edges[:-1], "right": counts[0], "wrong": counts[1]})


def all_reliability(frame: pd.DataFrame) -> pd.DataFrame:
    """`reliability` of the confidence as it is, and of the calibrated one where the table has it."""
    columns = [name for name in ("Confidence", "Calibrated_Confidence") if name in frame]
    tables = [reliability(frame, name).assign(calibrated=name != "Confidence") for name in columns]
    return pd.concat(tables, ignore_index=True)


def error_auroc(frame: pd.DataFrame) -> float | None:
    """How well low confidence tells errors: the chance that a right answer is surer than a wrong one.

    Hendrycks and Gimpel 2017. None where all answers are right, or all wrong.
    """
    right = is_right(frame)
    return None if right.all() or not right.any() else float(roc_auc_score(right, frame["Confidence"]))


def risk_coverage(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of what is left where the share `left_out` of the least confident answers is not given.

    El-Yaniv and Wiener 2010. `lowest` is the least confidence that is left.
    """
    surest = frame.sort_values("Confidence", ascending=False, kind="stable")
    right, rows = is_right(surest), []
    for share in LEFT_OUT:
        n = len(frame) - int(share * len(frame))
        rows.append({"left_out": share, "lowest": surest["Confidence"].iloc[n - 1]} | accuracy(right[:n]))
    return pd.DataFrame(rows)


def label_suspects(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Images that both arms put into the same other class with confidence above `SURE`, the surest first.

    They are ordered by the lesser confidence (`both`). This finds candidates to look at, no more: a wrong
    label, an image of two things, or a mistake that both make. The arms share weights and training labels,
    so that their agreement is not independent evidence, and the count is no estimate of wrong labels.
    Confident learning (Northcutt et al. 2021) sets a threshold a class from all its probabilities; saved
    tables hold those of the answer alone.
    """
    names = class_texts(a)
    table = pd.DataFrame(
        {
            "Index": np.arange(len(a)),
            "class": a["Ground_Truth"],
            "name": a["Ground_Truth"].map(names),
            "said": a["Prediction"],
            "said_name": a["Prediction"].map(names),
            "baseline_confidence": a["Confidence"].to_numpy(),
            "improvement_confidence": b["Confidence"].to_numpy(),
        }
    )
    table["both"] = table[["baseline_confidence", "improvement_confidence"]].min(axis=1)
    agree = ~is_right(a) & (a["Prediction"].to_numpy() == b["Prediction"].to_numpy())
    table = table[agree & (table["both"] > SURE).to_numpy()]
    return table.sort_values("both", ascending=False, kind="stable", ignore_index=True)


def read_superclasses() -> dict[str, str]:
    """Wnid -> superclass, of Tiny-ImageNet's classes; see `tools/superclasses.py`."""
    table = pd.read_csv(SUPERCLASSES)
    return dict(zip(table["wnid"], table["superclass"], strict=True))


def superclass_of_class(a: pd.DataFrame, b: pd.DataFrame, superclasses: dict[str, str]) -> dict[int, str]:
    """Class -> superclass, by wnid; empty where a class has none."""
    wnids = class_texts(a, "Wnid") | class_texts(b, "Wnid")
    if not set(wnids.values()) <= set(superclasses):
        return {}
    return {label: superclasses[wnid] for label, wnid in sorted(wnids.items())}


def superclass_scores(a: pd.DataFrame, b: pd.DataFrame, superclass_of: dict[int, str]) -> pd.DataFrame:
    """A row a superclass of the truth: accuracies with intervals, paired difference, errors that stay inside.

    `<arm>_within` is the share of the arm's errors that name another class of the superclass (NaN without
    errors), `chance_within` that of errors spread evenly over all other classes.
    """
    groups = a["Ground_Truth"].map(superclass_of).to_numpy()
    sizes, rows = pd.Series(superclass_of).value_counts(), []
    for superclass in dict.fromkeys(superclass_of.values()):
        inside, n_classes = groups == superclass, int(sizes[superclass])
        compared = compare(a[inside], b[inside])
        row = {"superclass": superclass, "n_classes": n_classes, "n": compared["n"]}
        for arm, frame, scores in zip(ARMS, (a, b), (compared["a"], compared["b"]), strict=True):
            errors = inside & ~is_right(frame)
            within = (frame["Prediction"].map(superclass_of) == superclass).to_numpy()[errors]
            row |= {
                f"{arm}_accuracy": scores["accuracy"],
                f"{arm}_low": scores["wilson_low"],
                f"{arm}_high": scores["wilson_high"],
                f"{arm}_errors": int(errors.sum()),
                f"{arm}_within": within.mean() if errors.any() else np.nan,
            }
        row |= {
            key: compared[key] for key in ("difference", "difference_low", "difference_high", "mcnemar_p")
        }
        rows.append(row | {"chance_within": (n_classes - 1) / max(len(superclass_of) - 1, 1)})
    return pd.DataFrame(rows)


def superclass_order(counts_KK: np.ndarray, superclass_of: dict[int, str]) -> tuple[np.ndarray, list]:
    """Classes by superclass, and the blocks they form as (superclass, number of classes).

    Superclasses stand beside those they are taken for, and so do the classes within one (`similarity_order`).
    """
    labels = np.array(list(superclass_of))
    codes, found = pd.factorize(pd.Series(superclass_of))
    member_KG = np.eye(len(found), dtype=int)[codes]
    counts_KK = counts_KK[np.ix_(labels, labels)]
    order, blocks = [], []
    for group in similarity_order(member_KG.T @ counts_KK @ member_KG):
        inside = np.flatnonzero(codes == group)
        order.append(labels[inside[similarity_order(counts_KK[np.ix_(inside, inside)])]])
        blocks.append((str(found[group]), len(inside)))
    return np.concatenate(order), blocks


def errors_within(scores: pd.DataFrame, arm: str) -> dict[str, float] | None:
    """Share of all errors of an arm that stay in the superclass, and by chance; None without errors.

    `scores` is `superclass_scores`'s table.
    """
    errors = scores[f"{arm}_errors"]
    if not errors.any():
        return None
    shares = {"share": scores[f"{arm}_within"].fillna(0), "by_chance": scores["chance_within"]}
    return {name: float(np.average(values, weights=errors)) for name, values in shares.items()}


def gallery_rows(b: pd.DataFrame) -> np.ndarray:
    """Rows by class: up to 2 that b has right, then up to 3 that it has wrong, drawn with a fixed seed."""
    drawn = pd.DataFrame({"class": b["Ground_Truth"].to_numpy(), "wrong": ~is_right(b)})
    drawn = drawn.sample(frac=1, random_state=GALLERY_SEED)
    place = drawn.groupby(["class", "wrong"]).cumcount()
    kept = drawn[place < np.where(drawn["wrong"], GALLERY_WRONG, GALLERY_RIGHT)]
    return kept.sort_values(["class", "wrong"], kind="stable").index.to_numpy()


def gallery_table(a: pd.DataFrame, b: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """What the page says of each image of the sheet; `position` counts along lines of 40."""
    table = pd.DataFrame(
        {"position": np.arange(len(rows)), "Index": rows, "class": a["Ground_Truth"].to_numpy()[rows]}
    )
    table["name"] = a["Ground_Truth_Name"].to_numpy()[rows]
    for arm, frame in zip(ARMS, (a, b), strict=True):
        table[arm] = frame["Prediction"].to_numpy()[rows]
        table[f"{arm}_name"] = frame["Prediction_Name"].to_numpy()[rows]
        table[f"{arm}_confidence"] = frame["Confidence"].to_numpy()[rows]
    return table


def sprite_sheet(pixels: np.ndarray) -> Image.Image:
    """One picture of all images (n,H,W,3), each `THUMBNAIL` pixels wide and high, 40 a line."""
    sheet = Image.new("RGB", (COLUMNS * THUMBNAIL, -(-len(pixels) // COLUMNS) * THUMBNAIL), "white")
    for position, image in enumerate(pixels):
        small = Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        line, column = divmod(position, COLUMNS)
        sheet.paste(small, (column * THUMBNAIL, line * THUMBNAIL))
    return sheet


def write_analysis(results: Path, images: Images, superclasses: dict[str, str]) -> dict:
    """Write `results/analysis` from both arms under `results`, and return what `analysis.json` holds.

    `images` gives the pixels of rows of the tables, `superclasses` the superclass of a wnid; where a class
    has none, what needs them is left out. Raises `SetupError` where an arm is missing or they do not compare.
    """
    results = Path(results)
    folder = results / "analysis"
    a, b, abouts = read_arms(results)
    superclass_of = superclass_of_class(a, b, superclasses)
    if not superclass_of:
        for name in OF_SUPERCLASSES:
            (folder / name).unlink(missing_ok=True)
    tables = make_tables(a, b, superclass_of)
    rows = gallery_rows(b)
    for name, table in {**tables, "gallery": gallery_table(a, b, rows)}.items():
        report.write_csv(table.map(_as_text), folder / f"{name}.csv")
    for name, figure in draw(a, b, tables, images, abouts, superclass_of).items():
        report.save(figure, folder / f"{name}.png")
    sheet = sprite_sheet(images(rows))
    write_atomically(
        folder / "gallery.webp", lambda path: sheet.save(path, "WEBP", quality=QUALITY, method=6)
    )
    best = best_against_improvement(results, b)
    read = ARMS if best is None else (*ARMS, "best")
    found = {"source_sha256": sources(results, read), **headlines(a, b, tables), "best": best}
    found = report.rounded(found)
    write_json(folder / "analysis.json", found)
    return found


def read_arms(results: Path) -> tuple[pd.DataFrame, pd.DataFrame, tuple[dict, dict]]:
    """Both arms' tables, row by row the same image in the order of `Index`, and what is known of the runs."""
    try:
        (a, about_a), (b, about_b) = (report.read_arm(results, arm) for arm in ARMS)
    except FileNotFoundError as error:
        raise SetupError(f"{error}. The analysis is of both arms: run the one that is missing.") from None
    a = a.sort_values("Index", ignore_index=True)
    if (a["Index"] != a.index).any():
        raise SetupError(
            f"Index in the predictions under {results} is not 0 to {len(a) - 1}, so that images cannot be "
            "found. Run the arm again."
        )
    a, b, _ = paired(a, b)
    return a, b, (about_a, about_b)


def best_against_improvement(results: Path, b: pd.DataFrame) -> dict | None:
    """`compare` of the improvement and the arm `best`; None where that has not run on the same images."""
    try:
        best, _ = report.read_arm(results, "best")
        compared = compare(b, best)
    except (FileNotFoundError, SetupError):
        return None
    return {key: value for key, value in compared.items() if key not in ("a", "b")}


def sources(results: Path, arms: Iterable[str] = ARMS) -> dict[str, str]:
    """Arm -> SHA-256 of its prediction file, of those that exist."""
    paths = {arm: results / arm.capitalize() / f"{arm}_validation_predictions.csv" for arm in arms}
    return {arm: sha256(path) for arm, path in paths.items() if path.exists()}


def make_tables(a: pd.DataFrame, b: pd.DataFrame, superclass_of: dict[int, str]) -> dict[str, pd.DataFrame]:
    """Every table that is written, by the name of its CSV; the long ones of pairs cut to the largest."""

    def of_both(make: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
        made = [make(frame) for frame in (a, b)]
        for arm, table in zip(ARMS, made, strict=True):
            table.insert(0, "arm", arm)
        return pd.concat(made, ignore_index=True)

    tables = {
        "confused_pairs": of_both(lambda frame: confused_pairs(frame).head(N_WRITTEN)),
        "class_changes": changes_by_class(a, b),
        "pair_changes": changes_by_pair(a, b).groupby("kind").head(N_WRITTEN),
        "label_suspects": label_suspects(a, b),
        "reliability": of_both(all_reliability),
        "risk_coverage": of_both(risk_coverage),
    }
    return tables | ({"superclasses": superclass_scores(a, b, superclass_of)} if superclass_of else {})


def _of(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    return table[table["arm"] == arm]


def _as_text(cell: object) -> object:
    return " ".join(map(str, cell)) if isinstance(cell, list) else cell


def draw(
    a: pd.DataFrame,
    b: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    images: Images,
    abouts: tuple[dict, dict],
    superclass_of: dict[int, str],
) -> dict[str, Figure]:
    """Every figure by the name of its file."""
    notes = [report.footer(about) for about in abouts]
    note = "\n".join(dict.fromkeys(notes))
    by_arm = dict(zip(ARMS, (a, b), strict=True))
    drawn = {
        "reliability": figures.reliability_figure(
            {arm: _of(tables["reliability"], arm) for arm in ARMS}, note
        ),
        "confidence": figures.confidence_figure(
            {arm: confidence_histogram(frame) for arm, frame in by_arm.items()},
            {arm: _of(tables["risk_coverage"], arm) for arm in ARMS},
            {arm: error_auroc(frame) for arm, frame in by_arm.items()},
            note,
        ),
        "confused_pairs": figures.confused_pairs_figure(
            _of(tables["confused_pairs"], "improvement"), images, notes[1], "Improvement"
        ),
        "class_accuracy": figures.class_accuracy_figure(per_class(a), per_class(b), note),
        "changes": figures.changes_figure(tables["class_changes"], tables["pair_changes"], note),
        "label_suspects": figures.suspects_figure(tables["label_suspects"], images, note),
    }
    if superclass_of:
        drawn["superclasses"] = figures.superclass_figure(tables["superclasses"], note)
        n_classes = report.n_classes_of(b, abouts[1])
        counts_KK, names = confusion(b, n_classes), report.class_names_of(b, n_classes)
        order, blocks = superclass_order(counts_KK, superclass_of)
        drawn["confusion_blocks"] = figures.confusion_blocks(
            counts_KK[np.ix_(order, order)], [names[i] for i in order], blocks, notes[1], "Improvement"
        )
    return drawn


def headlines(a: pd.DataFrame, b: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> dict:
    """Every number that a text would quote."""
    right_a, right_b = is_right(a), is_right(b)
    same = a["Prediction"].to_numpy() == b["Prediction"].to_numpy()
    pairs, suspects = tables["pair_changes"], tables["label_suspects"]
    found = {
        "n": len(a),
        "fixed": int((right_b & ~right_a).sum()),
        "broken": int((right_a & ~right_b).sum()),
        "wrong_in_both": int((~right_a & ~right_b).sum()),
        "wrong_in_both_alike": int((~right_a & same).sum()),
        "differences": paired_bootstrap(a, b),
        "differences_method": f"95 % percentile interval, {N_RESAMPLES:,} resamples of pairs",
        **{arm: arm_headlines(frame, tables, arm) for arm, frame in zip(ARMS, (a, b), strict=True)},
        "classes": class_headlines(tables["class_changes"]),
        "pairs": {
            kind: pairs[pairs["kind"] == kind].head(N_NAMED).to_dict("records")
            for kind in ("fixed", "broken")
        },
        "label_suspects": {
            "n": len(suspects),
            "confidence_above": SURE,
            "first": suspects.head(N_NAMED).to_dict("records"),
        },
        "gallery": {"columns": COLUMNS, "thumbnail": THUMBNAIL},
    }
    if "superclasses" in tables:
        table = tables["superclasses"]
        within = {f"{arm}_errors_within": errors_within(table, arm) for arm in ARMS}
        found["superclasses"] = {"n": len(table), **within, "table": table.to_dict("records")}
    return found


def class_headlines(classes: pd.DataFrame) -> dict:
    """How many classes gain and lose, how many of them surely, and which most, from `changes_by_class`."""
    gained, lost = classes[classes["net"] > 0], classes[classes["net"] < 0].iloc[::-1]
    return {
        "n": len(classes),
        "n_gained": len(gained),
        "n_lost": len(lost),
        "n_gained_surely": int((gained["p_holm"] < ALPHA).sum()),
        "n_lost_surely": int((lost["p_holm"] < ALPHA).sum()),
        "surely": f"exact McNemar p < {ALPHA} after Holm's adjustment for all classes",
        "gained": gained.head(N_NAMED).to_dict("records"),
        "lost": lost.head(N_NAMED).to_dict("records"),
    }


def arm_headlines(frame: pd.DataFrame, tables: dict[str, pd.DataFrame], arm: str) -> dict:
    """The numbers of one arm alone, beside those in its metrics.json."""
    right, sure = is_right(frame), frame["Confidence"].to_numpy()
    pairs, curve = _of(tables["confused_pairs"], arm), _of(tables["risk_coverage"], arm)
    quoted = curve[np.isin(curve["left_out"], QUOTED)]
    return {
        **accuracy(right),
        "n_errors": int((~right).sum()),
        "ece": calibration_error(sure, right),
        "ece_calibrated": (
            calibration_error(frame["Calibrated_Confidence"].to_numpy(), right)
            if "Calibrated_Confidence" in frame
            else None
        ),
        "mean_confidence": sure.mean(),
        "mean_confidence_right": sure[right].mean() if right.any() else None,
        "mean_confidence_wrong": sure[~right].mean() if not right.all() else None,
        "error_auroc": error_auroc(frame),
        "accuracy_without_least_confident": {
            f"{share:g}": value for share, value in zip(quoted["left_out"], quoted["accuracy"], strict=True)
        },
        "confused_pairs": pairs.drop(columns=["arm", "first_rows", "second_rows"])
        .head(N_NAMED)
        .to_dict("records"),
    }
