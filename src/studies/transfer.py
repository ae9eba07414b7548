"""Transfer to classes that the weights have not met: frozen against full fine-tuning, by images a class.

    python -m src.experiment transfer40 --profile offline --data DIR

A small ConvNeXt is pretrained on four fifths of the classes (`data.classes=source`). Baseline and
improvement, both with a plain head, then start from its weights on the others (`target`), with few images a
class and with all: of 500, the 475 that are not held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from src.embedded import export, tag_of
from src.experiment import configure, run
from src.folders import Paths
from src.studies.run import Plan, run_study
from src.studies.study import Row, Study

# Images a class to train on (0: all), and the improvement's epochs: fewer images, more epochs. None of them
# is cut short: five epochs without a better one, the preset's patience, soon happen on 1,000 held-out images.
EPOCHS = {10: 60, 50: 30, 0: 8}
# Of the pretraining, on four fifths of the images: what two CPU cores do in an hour.
SOURCE = {"data.classes": "source", "train.epochs": 12}


def rows() -> tuple[Row, ...]:
    """Both arms for each number of images a class."""
    pairs = []
    for n, epochs in EPOCHS.items():
        images = f"{n or 'all'} images a class"
        few = {"data.fit_per_class": n}
        frozen = Row(f"frozen, {images}", "baseline", few)
        length = {"train.epochs": epochs, "train.patience": epochs}  # to the end of the cosine
        tuned = Row(f"fine-tuned, {images}", "improvement", few | length, frozen.name)
        pairs += [frozen, tuned]
    return tuple(pairs)


SHARED = {
    **{"data.classes": "target", "model.image_size": 64, "model.head": "plain"},
    **{"train.batch_size": 32, "optim.lr": 5e-4},
}
TRANSFER = Study(
    "transfer40",
    "Transfer to classes that the weights have not met",
    "studies/transfer40",
    rows(),
    dict.fromkeys(("quick", "offline", "full"), SHARED),
    over_images=True,
    note="classes: every fifth (40 of Tiny-ImageNet's 200); the weights have met the others",
)


def run_transfer(plan: Plan, paths: Paths, names: Sequence[str], seeds: Sequence[int]) -> Path:
    """Pretrain on the source classes, then run the study; returns the folder of the results.

    A pretraining that is finished is not repeated.
    """
    changes = {**SOURCE, **plan.overrides, "data.classes": "source"}
    runs = paths.runs / "transfer40-source"
    work = replace(paths, results=TRANSFER.path(paths.results), runs=runs, backup=None)
    source = run(configure("pretrain", plan.profile, plan.data_dir, changes), work)
    weights, _ = export(source, source.setup.run_folder / "weights")
    start = {"model.backbone": tag_of(weights), "model.weights": str(weights)}
    return run_study(replace(plan, overrides=plan.overrides | start), paths, names, seeds)
