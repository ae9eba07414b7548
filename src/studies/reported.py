"""What the studies of the family report, beside what was measured here."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from src.evaluate import wilson
from src.files import read_json
from src.studies.study import Study
from src.studies.table import read_summary, read_table

FILE = Path(__file__).resolve().parents[2] / "results" / "studies" / "reported.json"
HEADER = ("row", "reported", "here", "run here on")
NOT_RUN = "not run"


def beside_reported(study: Study, results: Path) -> pd.DataFrame:
    """A line for each row that the study reports, and the row measured under `results`.

    Accuracies are words: those reported on n images with Wilson's interval, those measured as mean ± sd over
    seeds. A row that has not been run says with which command it would be.
    """
    folder = study.path(results)
    table = read_table(study, folder)
    path = folder / "summary.csv"
    summary = read_summary(path).set_index("row") if path.exists() else pd.DataFrame()
    by_row: dict[str, list[dict]] = {}
    for line in read_json(FILE)[study.name]["lines"]:
        by_row.setdefault(line["row"], []).append(line)
    lines = []
    for row, said in by_row.items():
        here = next((name for name in (row, said[0].get("stand_in")) if name in summary.index), "")
        measured, run_on = NOT_RUN, command(study, row)
        if here:
            measured = f"{here}: {words(summary.loc[here])}"
            run_on = where(table[table["row"] == here].iloc[0])
        reported = "; ".join(f"{line['images']}: {in_words(line)}" for line in said)
        lines.append(dict(zip(HEADER, (row, reported, measured, run_on), strict=True)))
    return pd.DataFrame(lines)


def in_words(line: dict) -> str:
    """A reported accuracy, with the interval that its number of images allows."""
    accuracy = f"{100 * line['accuracy']:.2f} %"
    if "n" not in line:
        return accuracy
    n_correct = line.get("n_correct", round(line["accuracy"] * line["n"]))
    low, high = wilson(n_correct, line["n"])
    return f"{accuracy} [{100 * low:.2f}, {100 * high:.2f}] of {line['n']:,}"


def words(line: pd.Series) -> str:
    """Mean and spread over seeds of a summary's line, in percent."""
    spread = "" if pd.isna(line["valid_sd"]) else f" ± {100 * line['valid_sd']:.2f}"
    return f"{100 * line['valid_mean']:.2f}{spread} % ({int(line['seeds'])} seeds)"


def where(run: pd.Series) -> str:
    """Data, weights, size and hardware of a run."""
    return f"{run['data']}; `{run['backbone']}`, {run['image_size']} px, {run['hardware']}"


def command(study: Study, row: str) -> str:
    """What runs the row on the study's own images."""
    return f'`python -m src.experiment ablation --preset {study.name} --data DIR --rows "{row}"`'


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
