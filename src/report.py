"""The one writer of results: CSV, JSON and figures from predictions and history. No model, no GPU."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from src import SetupError, files
from src.evaluate import (
    class_texts,
    compare,
    confusion,
    per_class,
    read_predictions,
    score,
    write_predictions,
)
from src.figures import (
    N_SAMPLES,
    Images,
    class_samples,
    clean,
    comparison_figure,
    confusion_figure,
    right_and_wrong,
    training_curve,
)
from src.files import read_json, write_atomically, write_json

DPI = 130  # of figures 9 inches wide: 1170 pixels, still legible at a README's 900
SETUP_KEYS = ("backbone", "weights_sha256", "image_size", "data", "data_fingerprint", "protocol")
DIGITS = 8  # significant ones in metrics.json: accuracies recomputed from the CSV are equal

log = logging.getLogger(__name__)


def write_arm(
    folder: Path, prefix: str, frame: pd.DataFrame, history: pd.DataFrame, metadata: dict, images: Images
) -> dict:
    """Write everything people read about an arm into `folder` and return what `metrics.json` holds.

    `frame` is `prediction_frame`'s table, `history` a row an epoch (epoch, fit_loss, fit_accuracy,
    holdout_loss, holdout_accuracy), `metadata` what is known of the run. metrics.json is written last.
    """
    scores = score(frame)
    metrics = rounded({"arm": prefix, **scores, **metadata, **scores})  # scores first, and never overwritten
    table, n_classes = per_class(frame), n_classes_of(frame, metadata)
    names = class_names_of(frame, n_classes)
    counts_KK = confusion(frame, n_classes)
    note = footer(metadata)

    def path(name: str) -> Path:
        return Path(folder) / f"{prefix}_{name}"

    write_predictions(frame, path("validation_predictions.csv"))
    write_csv(history, path("history.csv"))
    write_csv(table, path("per_class_accuracy.csv"))
    counted = pd.DataFrame(counts_KK, names, names).rename_axis("truth")
    write_csv(counted, path("confusion_matrix.csv"), index=True)
    title = prefix.replace("_", " ").capitalize()
    figures = {
        "training_curve": training_curve(history, metadata, note, title),
        "8_correct_8_wrong": right_and_wrong(frame, images, note, title),
        "per_class": class_samples(frame, images, note, title),
        "confusion_matrix": confusion_figure(counts_KK, names, note, title),
    }
    for name, figure in figures.items():
        save(figure, path(f"{name}.png"))
    write_json(Path(folder) / "metrics.json", metrics)
    return metrics


def write_comparison(results: Path) -> dict | None:
    """`comparison.json` and `comparison.png` from both arms under `results`.

    None, and no such files, where an arm is missing or the arms did not predict the same images. `same_setup`
    says whether they share weights, resolution, data and protocol, `setup_differences` where they do not.
    """
    results = Path(results)
    json_path, png_path = results / "comparison.json", results / "comparison.png"
    try:
        (a, about_a), (b, about_b) = (read_arm(results, arm) for arm in ("baseline", "improvement"))
        compared = compare(a, b)
    except (FileNotFoundError, SetupError) as error:
        for stale in (json_path, png_path):
            stale.unlink(missing_ok=True)
        level = logging.INFO if isinstance(error, FileNotFoundError) else logging.WARNING
        log.log(level, "no comparison of the arms in %s: %s", results, error)
        return None
    differing = [key for key in SETUP_KEYS if about_a.get(key) != about_b.get(key)]
    changes = class_changes(a, b)
    comparison = {
        "a": "baseline",
        "b": "improvement",
        "same_setup": not differing,
        "setup_differences": [f"{key}: {about_a.get(key)} / {about_b.get(key)}" for key in differing],
        "baseline": {key: about_a.get(key) for key in SETUP_KEYS} | compared.pop("a"),
        "improvement": {key: about_b.get(key) for key in SETUP_KEYS} | compared.pop("b"),
        **compared,
        "classes_gained": changes[changes["change"] > 0].head(N_SAMPLES).to_dict("records"),
        "classes_lost": changes[changes["change"] < 0].iloc[::-1].head(N_SAMPLES).to_dict("records"),
    }
    comparison = rounded(comparison)
    notes = list(dict.fromkeys(footer(about) for about in (about_a, about_b)))
    save(comparison_figure(comparison, "\n".join(notes)), png_path)
    write_json(json_path, comparison)
    return comparison


def read_arm(results: Path, arm: str) -> tuple[pd.DataFrame, dict]:
    """Predictions and metrics of an arm. Raises `FileNotFoundError` where it has not run."""
    folder = results / arm.capitalize()
    predictions, metrics = folder / f"{arm}_validation_predictions.csv", folder / "metrics.json"
    for path in (predictions, metrics):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
    try:
        about = read_json(metrics)
    except ValueError as error:
        raise SetupError(f"{metrics} is not JSON ({error}). Run the arm again.") from None
    return read_predictions(predictions), about


def class_changes(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """name, n, accuracy in both tables and change = b - a, the largest gain first."""
    left, right = per_class(a).set_index("class"), per_class(b).set_index("class")
    table = left[["name", "n"]].assign(baseline=left["accuracy"], improvement=right["accuracy"])
    table["change"] = table["improvement"] - table["baseline"]
    return table.sort_values("change", ascending=False, kind="stable")


def footer(metadata: dict) -> str:
    """What every figure says of its run: weights by their full tag, resolution, data, protocol, hardware."""
    parts = [
        metadata.get("backbone"),
        f"{metadata['image_size']} px" if "image_size" in metadata else None,
        f"data: {metadata['data']}" if "data" in metadata else None,
        f"protocol: {metadata['protocol']}" if "protocol" in metadata else None,
        f"{metadata['n_unreadable']:,} unreadable images left out" if metadata.get("n_unreadable") else None,
        metadata.get("hardware"),
    ]
    return " · ".join(clean(part) for part in parts if part)


def save(figure: Figure, path: Path) -> None:
    """The figure as PNG, atomically."""
    options = {"format": "png", "dpi": DPI, "pil_kwargs": {"optimize": True}}
    write_atomically(path, lambda partial: figure.savefig(partial, **options))


def write_csv(table: pd.DataFrame, path: Path, index: bool = False, inert: bool = True) -> None:
    """The table with numbers of `DIGITS` significant digits."""
    files.write_csv(table, path, index, inert, float_format=f"%.{DIGITS}g")


def rounded(value: object) -> object:
    """The same data with plain Python values and floats of `DIGITS` significant digits."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None  # JSON has no NaN
    return value


def n_classes_of(frame: pd.DataFrame, metadata: dict) -> int:
    largest = int(frame[["Ground_Truth", "Prediction"]].to_numpy().max())
    return max(int(metadata.get("n_classes", 0)), largest + 1)


def class_names_of(frame: pd.DataFrame, n_classes: int) -> list[str]:
    names = class_texts(frame)
    return [names.get(label, f"class {label}") for label in range(n_classes)]
