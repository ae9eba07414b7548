"""What `results/` holds for the page; parts that are not there are None or empty."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from src import SetupError
from src.analysis import read_superclasses, sources, superclass_of_class
from src.evaluate import class_texts, confusion, paired, read_predictions
from src.files import as_meant, read_json
from src.studies import ABLATION
from src.studies.table import about, read_summary, read_table

ARMS = ("baseline", "improvement", "best")
FALLBACK = "Fine-tuning, measured"  # the page's title where the study's would promise another network


@dataclass(frozen=True, eq=False)
class Arm:
    """A run's results: metrics.json, a row an epoch, a row an image."""

    name: str
    metrics: dict
    history: pd.DataFrame
    predictions: pd.DataFrame

    def counts(self, n_classes: int) -> np.ndarray:
        """Confusion counts (K,K), row = truth."""
        return confusion(self.predictions, n_classes)


@dataclass(frozen=True)
class Gallery:
    """A sheet of thumbnails as WebP, `columns` a line, and a row an image."""

    sheet: bytes
    columns: int
    table: pd.DataFrame


@dataclass(frozen=True)
class Results:
    """Everything the page shows."""

    arms: tuple[Arm, ...]
    names: tuple[str, ...]
    superclass_of: dict[int, str]
    study: dict
    comparison: dict | None
    gallery: Gallery | None
    gallery_is_old: bool
    ablation: pd.DataFrame | None
    ablation_note: str

    @property
    def main(self) -> Arm:
        """The improvement, or else the last arm there is."""
        return next((arm for arm in self.arms if arm.name == "improvement"), self.arms[-1])

    @property
    def title(self) -> str:
        """The study's title where every arm is a ConvNeXt, as the study's were; else what was done."""
        is_convnext = all(arm.metrics["backbone"].startswith("convnext") for arm in self.arms)
        return self.study.get("title", FALLBACK) if is_convnext else FALLBACK

    @property
    def has_best(self) -> bool:
        return any(arm.name == "best" for arm in self.arms)

    @property
    def pair(self) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """Predictions of baseline and improvement, row by row of the same image, where they compare."""
        if self.comparison is None:
            return None
        by_name = {arm.name: arm.predictions for arm in self.arms}
        return paired(by_name[self.comparison["a"]], by_name[self.comparison["b"]])[:2]


def read_results(results: Path) -> Results:
    """Read `results`. Raises `SetupError` where no arm is there, or its files or classes do not fit."""
    arms = tuple(_read_arm(results / name.capitalize(), name) for name in ARMS if _has_run(results, name))
    if not arms:
        raise SetupError(f"no metrics.json in the folders of {results}: run an arm first.")
    names = _class_names(arms, results)
    both = {"baseline", "improvement"} <= {arm.name for arm in arms}
    gallery, gallery_is_old = _read_gallery(results) if both else (None, False)
    folder = ABLATION.path(results)
    table = read_table(ABLATION, folder)
    return Results(
        arms=arms,
        names=names,
        superclass_of=superclass_of_class(arms[0].predictions, arms[-1].predictions, read_superclasses()),
        study=_json_if_there(results / "study.json") or {},
        comparison=_json_if_there(results / "comparison.json") if both else None,
        gallery=gallery,
        gallery_is_old=gallery_is_old,
        ablation=read_summary(folder / "summary.csv") if (folder / "summary.csv").exists() else None,
        ablation_note=about(ABLATION, table) if len(table) else "",
    )


def _has_run(results: Path, name: str) -> bool:
    return (results / name.capitalize() / "metrics.json").exists()


def _read_arm(folder: Path, name: str) -> Arm:
    history = folder / f"{name}_history.csv"
    if not history.exists():
        raise SetupError(f"{history} does not exist, though metrics.json beside it does. Run the arm again.")
    predictions = read_predictions(folder / f"{name}_validation_predictions.csv")
    metrics = _json_if_there(folder / "metrics.json")
    return Arm(name, metrics, pd.read_csv(history), predictions.sort_values("Index", ignore_index=True))


def _json_if_there(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise SetupError(f"{path} is not JSON ({error}). Write it anew, or move it away.") from None


def _class_names(arms: tuple[Arm, ...], results: Path) -> tuple[str, ...]:
    """Class names in class order. Raises `SetupError` unless all arms answer the same images."""
    found, truth_N = {}, arms[0].predictions["Ground_Truth"]
    for arm in arms:
        named = class_texts(arm.predictions)
        if not arm.predictions["Ground_Truth"].equals(truth_N) or (named | found) != (found | named):
            raise SetupError(
                f"{arms[0].name} and {arm.name} in {results} were scored on different images or classes. "
                "Run both on the same data."
            )
        found |= named
    return tuple(found.get(label, f"class {label}") for label in range(max(found) + 1))


def _read_gallery(results: Path) -> tuple[Gallery | None, bool]:
    """The gallery, and whether it is left out because its arms have been run again since."""
    found = _json_if_there(results / "analysis" / "analysis.json")
    sheet, table = (results / "analysis" / f"gallery.{kind}" for kind in ("webp", "csv"))
    if found is None or not (sheet.exists() and table.exists()):
        return None, False
    if found["source_sha256"] != sources(results, found["source_sha256"]):
        return None, True
    return Gallery(
        sheet.read_bytes(), found["gallery"]["columns"], pd.read_csv(table, na_filter=False).map(as_meant)
    ), False
