"""What the studies of the family report, beside what was measured here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from src.evaluate import wilson
from src.files import read_json, write_csv
from src.studies.study import Study
from src.studies.table import read_summary, read_table

FILE = Path(__file__).resolve().parents[2] / "results" / "studies" / "reported.json"
HEADER = ("row", "reported", "here", "here, on the stand-in")
NOT_RUN = "not run"


def write_beside_reported(study: Study, results: Path) -> pd.DataFrame:
    """`beside_reported`, which is written into the study's folder as `beside_reported.csv`, too."""
    table = beside_reported(study, results)
    write_csv(table, study.path(results) / "beside_reported.csv")
    return table


def beside_reported(study: Study, results: Path) -> pd.DataFrame:
    """A line for each row that the study reports, and the row measured under `results`.

    Accuracies are words: those reported on n images with Wilson's interval, those measured, on the study's
    own images and on its stand-in, as mean ± sd over seeds; where the study reports loss and time a step (32
    images), all have them. What has not been run says with which command it would be.
    """
    by_row: dict[str, list[dict]] = {}
    for line in read_json(FILE)[study.name]["lines"]:
        by_row.setdefault(line["row"], []).append(line)
    lines = []
    for row, said in by_row.items():
        reported = "; ".join(f"{line['images']}: {in_words(line)}" for line in said)
        stand_in = said[0].get("stand_in", row)
        measured = (
            measured_in(study, study.path(results, profile == "offline"), name, said[0])
            or f"{NOT_RUN}: {command(study, name, profile)}"
            for name, profile in ((row, "full"), (stand_in, "offline"))
        )
        lines.append(dict(zip(HEADER, (row, reported, *measured), strict=True)))
    return pd.DataFrame(lines)


def measured_in(study: Study, folder: Path, row: str, said: Mapping[str, object]) -> str:
    """What the study's results in `folder` have of a row, in words, and on what; empty if it has not run."""
    path = folder / "summary.csv"
    summary = read_summary(path).set_index("row") if path.exists() else pd.DataFrame()
    if row not in summary.index:
        return ""
    runs = read_table(study, folder).query("row == @row")
    name = f"{row}: " if row != said["row"] else ""
    return f"{name}{words(summary.loc[row])}{loss_and_time(measured_as(said, runs))}; {where(runs.iloc[0])}"


def in_words(line: dict) -> str:
    """A reported accuracy, with the interval that its number of images allows; loss and time, if reported."""
    accuracy = f"{100 * line['accuracy']:.2f} %"
    if "n" not in line:
        return accuracy + loss_and_time(line)
    n_correct = line.get("n_correct", round(line["accuracy"] * line["n"]))
    low, high = wilson(n_correct, line["n"])
    return f"{accuracy} [{100 * low:.2f}, {100 * high:.2f}] of {line['n']:,}{loss_and_time(line)}"


def loss_and_time(line: Mapping[str, float]) -> str:
    """Loss and milliseconds a step in words, as far as the line has them."""
    loss = f", loss {line['loss']:.4f}" if "loss" in line else ""
    return f"{loss}, {line['ms_per_step']:.0f} ms a step" if "ms_per_step" in line else loss


def measured_as(said: Mapping[str, object], runs: pd.DataFrame) -> dict[str, float]:
    """Of what the study says beside accuracy, what was measured: means over a row's runs."""
    columns = {"loss": "valid_loss", "ms_per_step": "predict_ms"}
    names = {key: name for key, name in columns.items() if key in said and name in runs}
    means = {key: pd.to_numeric(runs[name], errors="coerce").mean() for key, name in names.items()}
    return {key: mean for key, mean in means.items() if not pd.isna(mean)}


def words(line: pd.Series) -> str:
    """Mean and spread over seeds of a summary's line, in percent."""
    spread = "" if pd.isna(line["valid_sd"]) else f" ± {100 * line['valid_sd']:.2f}"
    n = int(line["seeds"])
    return f"{100 * line['valid_mean']:.2f}{spread} % ({n} seed{'s' if n > 1 else ''})"


def where(run: pd.Series) -> str:
    """Data, weights, size and hardware of a run."""
    return f"{run['data']}; `{run['backbone']}`, {run['image_size']} px, {run['hardware']}"


def command(study: Study, row: str, profile: str) -> str:
    """What runs the row."""
    asked = f"--preset {study.name} --profile {profile}"
    return f'`python -m src.experiment ablation {asked} --data DIR --rows "{row}"`'


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
