"""Whole arms: time to finish both, and time to a given accuracy on `valid`, on a small part of the data.

Both ways train the same networks on the same images for the same epochs, in batches of 32, and are scored on
`valid` after each. Ours is `src.experiment.run` from an empty cache: decoding, features, checkpoints, the
last prediction, tables and figures included.
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
from src.files import read_json
from src.model.build import build_model

EPOCHS = {"baseline": 6, "improvement": 4}


def conventional_arms(folder: str, goal: float) -> Round:
    """Both notebooks, one after the other."""
    wnids = tuple(sorted(path.name for path in Path(folder, "train").iterdir()))

    def arm(name: str) -> dict[str, float]:
        config, started = _config(name, folder), time.perf_counter()
        size = config.model.image_size
        augmented = name == "improvement"
        transform = conventional.training_transform if augmented else conventional.plain_transform
        train = conventional.loader(Path(folder, "train"), transform(size), shuffle=True)
        valid = conventional.loader(Path(folder, "valid"), conventional.plain_transform(size), shuffle=False)
        model = build_model(config.model, wnids, 0).model
        head = [p for n, p in model.named_parameters() if not n.startswith("backbone.")]
        groups = [{"params": head, "lr": config.optim.head_lr, "weight_decay": config.optim.weight_decay}]
        if augmented:
            backbone = list(model.backbone.parameters())
            groups.append({**groups[0], "params": backbone, "lr": config.optim.lr})
        loop = conventional.Loop(
            model, groups, amp=not augmented, label_smoothing=config.optim.label_smoothing
        )
        accuracies = loop.accuracies(config.train.epochs, train, valid)
        history = [(time.perf_counter() - started, accuracy) for accuracy in accuracies]
        return _numbers(name, history, time.perf_counter() - started, goal)

    return lambda: arm("baseline") | arm("improvement")


def our_arms(folder: str, goal: float) -> Round:
    """`python -m src.experiment baseline`, then `improvement`, in one process."""

    def arm(name: str, scratch: Path) -> dict[str, float]:
        paths = experiment.Paths(scratch / "results", scratch / "runs", scratch / "cache")
        config, started = _config(name, folder), time.perf_counter()
        result = experiment.run(config, paths)
        total = time.perf_counter() - started
        seconds = read_json(result.setup.run_folder / "facts.json")["seconds"]
        at = total - sum(seconds["epochs"]) - seconds["valid"]  # what comes before, and after, the epochs
        history = []
        for spent, accuracy in zip(seconds["epochs"], result.history["holdout_accuracy"], strict=True):
            at += spent
            history.append((at, accuracy))
        return _numbers(name, history, total, goal)

    def one_round() -> dict[str, float]:
        scratch = Path(tempfile.mkdtemp())
        numbers = arm("baseline", scratch) | arm("improvement", scratch)
        shutil.rmtree(scratch)
        return numbers

    return one_round


def _config(arm: str, folder: str) -> Config:
    changes = {"train.epochs": EPOCHS[arm], "train.patience": 10**5, "train.batch_size": conventional.BATCH}
    return arm_config(arm, folder, changes)


def _numbers(arm: str, history: list[tuple[float, float]], total: float, goal: float) -> dict[str, float]:
    """Seconds in all, seconds to `goal` (infinite where it was not reached), last accuracy."""
    reached = next((seconds for seconds, accuracy in history if accuracy >= goal), float("inf"))
    return {f"{arm}_s": total, f"{arm}_goal_s": reached, f"{arm}_accuracy": history[-1][1]}


def main() -> None:
    options = parse_arguments(__doc__, classes=10, train_per_class=40, valid_per_class=20, goal=50)
    folder = image_folder(options.data, options.classes, options.train_per_class, options.valid_per_class)
    settings = {"folder": str(folder), "goal": options.goal / 100}
    ways = {
        "conventional": ("bench.arms:conventional_arms", settings),
        "ours": ("bench.arms:our_arms", settings),
    }
    case = take_turns(ways, options.rounds)
    rows = {}
    for arm, epochs in EPOCHS.items():
        rows[f"{arm}_s"] = case.row(f"{arm}_s", f"{arm} arm, {epochs} epochs", "s")
        reached = all(max(case.measured[way][f"{arm}_goal_s"]) < float("inf") for way in ways)
        if reached:
            what = f"{arm} arm, to {options.goal} % of `valid`"
            rows[f"{arm}_goal_s"] = case.row(f"{arm}_goal_s", what, "s")
        for way in ways:
            print(f"  {way}: {arm} accuracy {case.summary(way, f'{arm}_accuracy')}, goal reached: {reached}")
    accuracy = {arm: {way: case.summary(way, f"{arm}_accuracy") for way in ways} for arm in EPOCHS}
    config = _config("improvement", str(folder))
    model = f"{config.model.backbone}, {config.model.image_size} px"
    save("arms", described(folder), rows, model=model, goal=options.goal / 100, accuracy=accuracy)


if __name__ == "__main__":
    report_errors(main)
