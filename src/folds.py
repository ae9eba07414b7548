"""k-fold cross-validation: every train image is answered once, by a run that has not trained on it.

    python -m src.experiment cross_validate --preset animals40 --profile offline --data DIR --folds 5

Each fold is a run of its own (`data.folds`, `data.fold`); a finished one is not repeated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from src import SetupError
from src.config import Config, with_fields
from src.evaluate import accuracy
from src.experiment import complete, prepare, saved_logits
from src.files import read_json, write_json
from src.folders import Paths, require_writable
from src.predict import loss_and_accuracy
from src.report import rounded, write_csv


def cross_validate(config: Config, paths: Paths, n_folds: int) -> tuple[Path, dict]:
    """Run what is missing of the folds; write the arm's `folds.csv` and `folds.json`; their folder, the JSON.

    `pooled`: accuracy over all train images, each answered by the run that did not see it, with Wilson's
    interval; `mean` and `sd` are over folds. Raises `SetupError` for fewer than two folds.
    """
    if n_folds < 2:
        raise SetupError(f"--folds {n_folds}: a cross-validation needs two folds or more.")
    folder = paths.results_of(config)
    require_writable(folder)
    lines, right = [], []
    for fold in range(n_folds):
        line, right_N = run_fold(with_fields(config, {"data.folds": n_folds, "data.fold": fold}), paths)
        lines.append(line)
        right.append(right_N)
        write_csv(pd.DataFrame(lines), folder / "folds.csv")
    table, right_N = pd.DataFrame(lines), np.concatenate(right)
    numbers = {
        "folds": n_folds,
        "mean": float(table["accuracy"].mean()),
        "sd": float(table["accuracy"].std()),
        "pooled": accuracy(right_N),
        **{key: lines[0][key] for key in ("backbone", "data", "image_size", "hardware", "git_commit")},
    }
    write_json(folder / "folds.json", rounded(numbers))
    return folder, numbers


def in_words(found: dict) -> str:
    """What `folds.json` holds: accuracy over folds, and of all images together."""
    pooled = found["pooled"]
    interval = f"[{pooled['wilson_low']:.2%}, {pooled['wilson_high']:.2%}]"
    return (
        f"{found['folds']} folds: {found['mean']:.2%} ± {100 * found['sd']:.2f}; all {pooled['n']:,} images "
        f"{pooled['accuracy']:.2%} {interval}"
    )


def run_fold(config: Config, paths: Paths) -> tuple[dict, np.ndarray]:
    """One fold, or what it left -> its line, and whether each image of its part is answered right."""
    setup = prepare(config, paths)
    complete(setup)
    facts, (logits_NK, labels_N) = read_json(setup.run_folder / "facts.json"), saved_logits(setup, "valid")
    line = {
        "fold": config.data.fold,
        "n": len(labels_N),
        **loss_and_accuracy(logits_NK, labels_N),
        "n_fit": facts["n_fit"],
        "best_epoch": facts["best_epoch"],
        "seconds": facts["seconds"]["total"],
        **{key: facts[key] for key in ("backbone", "data", "image_size", "hardware", "git_commit")},
    }
    return line, logits_NK.argmax(axis=1) == labels_N
