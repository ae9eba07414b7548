"""The baseline arm: wall clock of N = 1, 2, 6, 12 epochs, frozen backbone and new classifier, both ways.

Conventional: every image through loader and backbone in every epoch, scored on `valid` after each. Ours:
decoding and features once, then epochs over the features, scored alike, checkpoints included. Same backbone,
same images; importing is left out on both sides.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from bench import conventional
from bench.pair import Round, report_errors, save, take_turns
from bench.workload import arm_config, described, image_folder, parse_arguments
from src import experiment
from src.config import Config
from src.model.build import build_model
from src.train import Trainer

SHOWN = (1, 2, 6, 12)


def conventional_arm(folder: str, epochs: int) -> Round:
    """The study's baseline: one line of augmentation-free input, AdamW 1e-3 on the classifier."""
    config = _config(folder, epochs)
    wnids = tuple(sorted(path.name for path in Path(folder, "train").iterdir()))
    transform = conventional.plain_transform(config.model.image_size)
    train, valid = (
        conventional.loader(Path(folder, split), transform, shuffle=split == "train")
        for split in ("train", "valid")
    )

    def one_round() -> dict[str, float]:
        started = time.perf_counter()
        model = build_model(config.model, wnids, 0).model
        head = [{"params": list(model.classifier.parameters()), "lr": config.optim.head_lr}]
        loop = conventional.Loop(model, head, amp=True)
        history = [(time.perf_counter() - started, a) for a in loop.accuracies(epochs, train, valid)]
        return _numbers([seconds for seconds, _ in history], history[-1][1])

    return one_round


def our_arm(folder: str, epochs: int) -> Round:
    """`src.experiment.run` without the report, from an empty cache."""
    config = _config(folder, epochs)

    def one_round() -> dict[str, float]:
        scratch = Path(tempfile.mkdtemp())
        paths = experiment.Paths(scratch / "results", scratch / "runs", scratch / "cache")
        started, seconds = time.perf_counter(), []
        setup = experiment.prepare(config, paths)
        data, _, _ = experiment.make_batches(setup)
        trainer = Trainer(setup.model, data, config, setup.device, paths.runs)
        while not trainer.finished:
            trainer.train_epoch()
            trainer.end_epoch()
            seconds.append(time.perf_counter() - started)
        shutil.rmtree(scratch)
        return _numbers(seconds, trainer.progress.history[-1]["holdout_accuracy"])

    return one_round


def _config(folder: str, epochs: int) -> Config:
    return arm_config("baseline", folder, {"train.epochs": epochs, "train.patience": 10**5})


def _numbers(seconds: list[float], accuracy: float) -> dict[str, float]:
    added = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    shown = {f"epochs_{n}": seconds[n - 1] for n in SHOWN if n <= len(seconds)}
    return {**shown, "added_epoch": added, "added_share": added / seconds[0], "accuracy": accuracy}


def main() -> None:
    options = parse_arguments(__doc__, train_per_class=4, valid_per_class=2, epochs=12)
    folder = image_folder(options.data, 200, options.train_per_class, options.valid_per_class)
    settings = {"folder": str(folder), "epochs": options.epochs}
    ways = {
        "conventional": ("bench.baseline:conventional_arm", settings),
        "ours": ("bench.baseline:our_arm", settings),
    }
    case = take_turns(ways, options.rounds)
    rows = {
        f"epochs_{n}": case.row(f"epochs_{n}", f"baseline arm, {n} epoch{'s' * (n > 1)}", "s")
        for n in SHOWN
        if n <= options.epochs
    }
    rows["added_epoch"] = case.row("added_epoch", "an added epoch", "s")
    shares = {way: case.summary(way, "added_share") for way in ways}
    accuracies = {way: case.summary(way, "accuracy") for way in ways}
    for way in ways:
        print(
            f"{way}: an added epoch is {shares[way]['median']:.2%} of the first; accuracy {accuracies[way]}"
        )
    config = _config(str(folder), options.epochs)
    model = f"{config.model.backbone}, {config.model.image_size} px"
    save("baseline", described(folder), rows, model=model, added_share=shares, accuracy=accuracies)


if __name__ == "__main__":
    report_errors(main)
