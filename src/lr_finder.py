"""Learning-rate finder (Smith 2017): the loss while the rate grows from step to step.

    python -m src.experiment find_lr --preset improvement --profile offline --data DIR

The rates of the preset keep their ratios; what grows is their common factor.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

import numpy as np
import pandas as pd

from src import SetupError
from src.config import Config, with_fields
from src.experiment import make_batches, prepare, start_from_probe
from src.folders import Paths, require_writable
from src.predict import image_bar
from src.train import Trainer

STEPS = 100
FACTORS = (1e-3, 1e2)  # of the preset's rates, first and last
SMOOTHING = 0.9  # of the running mean of the loss
DIVERGED = 3.0  # the sweep ends at so many times the smallest smoothed loss


def find_lr(config: Config, paths: Paths) -> tuple[Path, float]:
    """Sweep the rate over `STEPS` steps; write `lr_finder.csv` and `.png`; return their folder and the factor
    of the preset's rates at which the loss fell fastest."""
    from src.figures import lr_figure
    from src.report import footer, save, write_csv

    config = with_fields(config, {"train.compile": False, "after.soup_epochs": 0})
    setup = prepare(config, paths)
    folder = paths.results_of(config)
    require_writable(folder)
    with tempfile.TemporaryDirectory() as scratch:  # a probe's checkpoints go with it
        setup = replace(setup, paths=replace(paths, runs=Path(scratch), backup=None))
        if config.model.head_init == "probe":
            start_from_probe(setup)
        data, _, _ = make_batches(setup)
        table = sweep(Trainer(setup.model, data, config, setup.device, Path(scratch)))
    best = steepest(table)
    about = {
        "backbone": setup.built.weights_tag,
        "image_size": config.model.image_size,
        "data": setup.store.manifest["source"],
        "protocol": config.data.protocol,
        "hardware": setup.device.name,
    }
    write_csv(table, folder / "lr_finder.csv")
    save(lr_figure(table, best, footer(about)), folder / "lr_finder.png")
    return folder, best


def sweep(trainer: Trainer) -> pd.DataFrame:
    """A row a step: factor of the rates, loss, smoothed loss (bias-corrected running mean)."""
    rows, running, smallest = [], 0.0, math.inf
    factors = np.geomspace(*FACTORS, STEPS)
    seed, fit = trainer.config.train.seed, trainer.data.fit
    trainer.model.train()
    batches = chain.from_iterable(fit.epoch(seed, epoch) for epoch in count())
    with image_bar(STEPS * fit.batch_size, "learning rates") as bar:
        for step, (factor, (inputs, labels_B)) in enumerate(zip(factors, batches, strict=False)):
            trainer.progress.step = step
            loss = trainer.train_step(inputs, labels_B, factor)[0].item() / len(labels_B)
            running = SMOOTHING * running + (1 - SMOOTHING) * loss
            smoothed = running / (1 - SMOOTHING ** (step + 1))
            rows.append({"factor": factor, "loss": loss, "smoothed_loss": smoothed})
            smallest = min(smallest, smoothed)
            bar.update(len(labels_B))
            if not math.isfinite(loss) or smoothed > DIVERGED * smallest:
                break
    return pd.DataFrame(rows)


def steepest(table: pd.DataFrame) -> float:
    """The factor at which the smoothed loss falls fastest over the logarithm of the rate.

    Raises `SetupError` for a loss that is not finite from the start.
    """
    finite = table[np.isfinite(table["smoothed_loss"])]
    if len(finite) < 2:
        raise SetupError(
            f"the loss is not finite at {FACTORS[0]:g} times the rates of the preset: nothing trains."
        )
    slope = np.gradient(finite["smoothed_loss"], np.log(finite["factor"]))
    return float(finite["factor"].iloc[int(np.argmin(slope))])
