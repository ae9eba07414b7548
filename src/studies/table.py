"""A study's results: the table of rows and seeds, what follows from it, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student

from src import SetupError
from src.config import PRESETS
from src.figures import study_figure, transfer_figure
from src.files import write_atomically
from src.report import save, write_csv
from src.studies.study import Study

# Columns of a study in words, and how each is aligned.
COLUMNS = {
    "row": "---",
    "valid": "---:",
    "ECE": "---:",
    "seeds": "---:",
    "against": "---",
    "difference": "---:",
    "verdict": "---",
}
# Of rows that leave an ingredient out ("without" is in their names), the verdict on the ingredient.
WITHOUT = {"helps": "better without it", "hurts": "worse without it"}


def read_table(study: Study, folder: Path) -> pd.DataFrame:
    """The study's CSV in `folder`, or an empty table."""
    path = folder / f"{study.name}.csv"
    if not path.exists():
        return pd.DataFrame(columns=["row", "seed", "profile", "data", "config"])
    try:
        names = dict.fromkeys(("config", "git_commit"), str)  # hexadecimal, and some look like numbers
        return pd.read_csv(path, keep_default_na=False, dtype=names)
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} cannot be read ({error}). Move it away to start anew.") from None


def write_table(study: Study, folder: Path, table: pd.DataFrame) -> None:
    """The study's CSV in the order of its rows, without those that it no longer has."""
    order = {row.name: place for place, row in enumerate(study.rows)}
    table = table[table["row"].isin(order)]
    table = table.sort_values(["row", "seed"], key=lambda c: c.map(order) if c.name == "row" else c)
    write_csv(table, folder / f"{study.name}.csv", inert=False)  # names of rows are ours, and start with +


def add_record(study: Study, folder: Path, record: dict) -> None:
    """Write the record into the study's CSV."""
    table, line = read_table(study, folder), pd.DataFrame([record])
    write_table(study, folder, pd.concat([table, line]) if len(table) else line)


def summarise(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """A line a row: mean and sd over seeds, and the difference on `valid` to the row compared with.

    The difference is paired by seed, its 95 % interval Student's over the seeds that both have (none for one
    seed). It speaks of training again on these images, not of other images.
    """
    by_row = {name: group.set_index("seed") for name, group in table.groupby("row")}
    lines = []
    for row in (row for row in study.rows if row.name in by_row):
        own, other = by_row[row.name], by_row.get(row.against)
        valid = own["valid_accuracy"]
        line = {
            "row": row.name,
            "against": row.against,
            "seeds": len(own),
            "valid_mean": valid.mean(),
            "valid_sd": valid.std(),
            "holdout_mean": own["holdout_accuracy"].mean(),
            "loss_mean": own["valid_loss"].mean(),
            "ece_mean": own["valid_ece"].mean(),
            "seconds_mean": own["seconds"].mean(),
            "parameters": own["parameters"].iloc[0],
            "gflops": own["gflops"].iloc[0],
        }
        paired = valid[:0] if other is None else (valid - other["valid_accuracy"]).dropna()
        lines.append(line | paired_difference(paired.to_numpy(float)))
    return pd.DataFrame(lines)


def paired_difference(differences: np.ndarray) -> dict[str, object]:
    """Mean of the seeds' differences, its 95 % interval, and what that says."""
    n = len(differences)
    if not n:
        return {"difference": np.nan, "low": np.nan, "high": np.nan, "verdict": ""}
    mean = differences.mean()
    if n == 1:
        return {"difference": mean, "low": np.nan, "high": np.nan, "verdict": "one seed: not judged"}
    half = student.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)
    if not differences.any():
        verdict = "changes nothing"
    elif abs(mean) <= half:
        verdict = "cannot be told apart from noise"
    else:
        verdict = "helps" if mean > 0 else "hurts"
    return {"difference": mean, "low": mean - half, "high": mean + half, "verdict": verdict}


def write_summary(study: Study, folder: Path) -> None:
    """`summary.csv`, `summary.md` and the figure from the study's CSV; nothing where that is empty."""
    table = read_table(study, folder)
    if table.empty:
        return
    summary, note = write_words(study, folder, table), about(study, table)
    if study.over_images:
        arms = table["row"].map({row.name: row.arm for row in study.rows})
        n_classes = classes_of(study, table)
        drawn = table.assign(arm=arms, images=table["n_fit"] / n_classes)
        axis = "images a class to train on" if n_classes > 1 else "images to train on"
        figure = transfer_figure(study.title, drawn, axis, note)
    else:
        figure = study_figure(study.title, summary, note)
    save(figure, folder / f"{study.name}.png")


def classes_of(study: Study, table: pd.DataFrame) -> int:
    """Classes of the data, from rows that train on a number of images of each; 1 where none has been run."""
    limits = table["row"].map({row.name: row.changes.get("data.fit_per_class", 0) for row in study.rows})
    n_classes = (table["n_fit"] / limits)[limits > 0]
    return round(n_classes.max()) if len(n_classes) else 1


def write_words(study: Study, folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """`summary.csv` and `summary.md`, which follow from the table to the letter; returns the summary."""
    summary = summarise(study, table)
    words = text(study, summary, about(study, table))
    write_csv(summary, folder / "summary.csv", inert=False)
    write_atomically(folder / "summary.md", lambda p: p.write_text(words, encoding="utf-8"))
    return summary


def read_summary(path: Path) -> pd.DataFrame:
    """What `summarise` gave, from `summary.csv`."""
    words = {"against": str, "verdict": str}  # all empty, they would be read as numbers
    return pd.read_csv(path, dtype=words).fillna(dict.fromkeys(words, ""))


def about(study: Study, table: pd.DataFrame) -> str:
    """What all rows share, for the footer of the figure and the head of the text."""
    arms = {row.name: PRESETS[row.arm].model.trainable for row in study.rows}
    parts = {row.name: row.changes.get("model.trainable", arms[row.name]) for row in study.rows}
    trained = table[table["row"].map(parts) != "none"]

    def shared(column: str, lines: pd.DataFrame = table) -> str:
        values = sorted(set(lines[column]))
        return ", ".join(f"{value:,}" if column == "n_fit" else str(value) for value in values)

    epochs = f"epochs: {shared('epochs', trained)} where the backbone is trained" if len(trained) else ""
    facts = (
        shared("backbone"),
        f"{shared('image_size')} px",
        f"{shared('n_fit')} images to train on",
        epochs,
        f"seeds: {shared('seed')}",
        f"data: {shared('data')}",
        f"protocol: {shared('protocol')}",
        study.note,
        shared("hardware"),
    )
    return " · ".join(fact for fact in facts if fact)


def text(study: Study, summary: pd.DataFrame, note: str) -> str:
    """The study in words: a line a row, generated from the numbers."""
    return "\n".join(
        (
            f"# {study.title}",
            "",
            f"{note}.",
            "",
            "Accuracy on `valid`, mean ± standard deviation over seeds; expected calibration error (ECE); "
            "differences of accuracy in points, paired by seed, with Student's 95 % interval over seeds. One "
            "interval in twenty misses the truth by chance.",
            "",
            markdown(summary),
            "",
        )
    )


def markdown(summary: pd.DataFrame, columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """The summary as a table with some of `COLUMNS`."""
    lines = [columns, [COLUMNS[column] for column in columns]]
    for line in summary.itertuples():
        difference = "" if np.isnan(line.difference) else f"{100 * line.difference:+.2f}"
        if not np.isnan(line.low):
            difference += f" [{100 * line.low:+.2f}, {100 * line.high:+.2f}]"
        spread = "" if np.isnan(line.valid_sd) else f" ± {100 * line.valid_sd:.2f}"
        cells = {
            "row": line.row,
            "valid": f"{100 * line.valid_mean:.2f}{spread}",
            "ECE": f"{100 * line.ece_mean:.2f}",
            "seeds": str(line.seeds),
            "against": line.against,
            "difference": difference,
            "verdict": WITHOUT.get(line.verdict, line.verdict) if "without " in line.row else line.verdict,
        }
        lines.append([cells[column] for column in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
