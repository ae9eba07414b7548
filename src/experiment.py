"""`run(config, paths) -> Result`: an arm from data to report; `src.commands` is the command line.

    python -m src.experiment baseline --profile quick
    python -m src.experiment improvement --profile offline --data DIR
    python -m src.experiment --help

The order of things, and nothing else: data, model, training, what comes after it, prediction, report.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from src import SetupError, backup, processes
from src import config as configs
from src.after import best_temperature, improve
from src.average import copied
from src.config import Config
from src.data.batches import Batches, to_device
from src.data.sources import open_source, stored_size_of
from src.data.splits import Splits, make_splits
from src.data.store import Store, open_store
from src.data.subsets import part_of
from src.device import Device, choose_device, git_commit, peak_memory_gb, set_up_process, versions
from src.files import read_array, read_json, sha256, write_array, write_atomically, write_json
from src.folders import Paths, alone_in, require_writable, shown
from src.model.build import Built, Classifier, build_model, gmacs, start_classifier
from src.predict import cached_features, loss_and_accuracy
from src.train import FitData, Progress, fit

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

DATA_VARIABLE = "TINY_IMAGENET_DIR"
# What a run leaves.
FINISHED = ("model.safetensors", "facts.json", "history.json", "holdout_logits.npy", "valid_logits.npy")


@dataclass(frozen=True)
class Setup:
    """A run before it starts: everything that bad input could break has been opened."""

    config: Config
    paths: Paths
    store: Store
    splits: Splits
    built: Built
    device: Device
    git_commit: str

    @property
    def model(self) -> Classifier:
        return self.built.model

    @property
    def run_folder(self) -> Path:
        return self.paths.runs / self.config.run_name

    def snapshot(self) -> None:
        """Back the run's folder up, where that was asked for."""
        if self.paths.backup:
            backup.save(self.run_folder, self.paths.backup)


@dataclass(frozen=True)
class Result:
    """A finished run: its setup, with the best weights in `setup.model`, and what was measured."""

    setup: Setup
    metrics: dict
    predictions: pd.DataFrame
    history: pd.DataFrame
    folder: Path


def prepare(config: Config, paths: Paths) -> Setup:
    """Open data, splits, weights and folders. Raises `SetupError` for whatever is wrong with them."""
    set_up_process()
    for folder in (paths.results, paths.runs, paths.cache, *filter(None, [paths.backup])):
        require_writable(folder)
    with processes.main_first():  # one downloads and decodes, the others find what it left
        store = open_data(config, paths)
        splits = make_splits(store, config.data)
        built = build_model(config.model, store.wnids, config.train.seed)
    return Setup(config, paths, store, splits, built, device_for(config), git_commit())


def open_data(config: Config, paths: Paths) -> Store:
    """The decoded images that `config` asks for; `SetupError` where they are not what they should be."""
    source = open_source(config.data, paths.cache)
    data = config.data
    store = open_store(source, paths.cache, data.stored_size, resize=data.resize, skip_bad=data.skip_bad)
    return part_of(store, config.data.classes)


def device_for(config: Config) -> Device:
    """The machine's device; features of a frozen backbone are small, so that their batches pass at once."""
    train, largest = config.train, max(config.model.image_size, config.model.predicts_at)
    micro_batch = train.batch_size if config.caches_features else train.micro_batch
    return choose_device(largest, train.batch_size, micro_batch)


def run(config: Config, paths: Paths) -> Result:
    """Train (or go on, or load what a finished run left), score `valid` once, write the arm's results."""
    setup = prepare(config, paths)
    complete(setup)
    processes.wait_for_all()
    weights = setup.run_folder / "model.safetensors"
    try:
        setup.model.load_state_dict(load_file(weights), strict=False)
    except SafetensorError as error:
        raise SetupError(f"{weights} is damaged ({error}). Delete it and run again.") from None
    setup.model.eval()
    with processes.main_first():
        return write_results(setup) if processes.is_main() else read_results(setup)


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds all that a run leaves."""
    return all((folder / name).exists() for name in FINISHED)


def saved_logits(setup: Setup, split: str) -> tuple[np.ndarray, np.ndarray]:
    """What a finished run said of `holdout` or `valid`: logits_NK, and the labels_N of the same images."""
    rows_N = {"holdout": setup.splits.holdout_N, "valid": setup.splits.valid_N}[split]
    return read_array(setup.run_folder / f"{split}_logits.npy"), setup.store.labels_N[rows_N]


def finished_run(config: Config, paths: Paths) -> Path:
    """The run's folder. Raises `SetupError` with the command to run where the run is not finished."""
    folder = paths.runs / config.run_name
    if missing := [name for name in FINISHED if not (folder / name).exists()]:
        raise SetupError(
            f"{shown(folder)} holds no finished run ({missing[0]} is missing): run it first, "
            f"`python -m src.experiment {config.arm} --profile {config.profile} "
            f"--protocol {config.data.protocol} --seed {config.train.seed}`, "
            "with the same --data, --runs and --set."
        )
    return folder


def claim_run_folder(setup: Setup) -> None:
    """Make the run's folder, or check that the run in it is this one; a finished one is left as it is."""
    identity = {
        "config": recorded_config(setup.config),
        "data": setup.store.fingerprint,
        "weights_sha256": setup.built.weights_sha256,
    }
    path = setup.run_folder / "run.json"
    if setup.paths.backup and not path.exists():
        backup.restore(setup.paths.backup, setup.run_folder)
    if path.exists():
        before = read_json(path)
        # A field that came later is off at its default.
        plain = recorded_config(Config(arm=setup.config.arm))
        before["config"] = configs.completed(before["config"], plain)
        if changed := configs.differences(identity, before):
            raise SetupError(_another_run(setup, changed))
    if not (path.exists() and is_finished(setup.run_folder)):
        setup.splits.save(setup.run_folder / "splits.json")
        write_json(path, identity)


def _another_run(setup: Setup, changed: list[str]) -> str:
    """What stands in the way of a run whose folder holds another one, and what to do."""
    delete, options = "that folder", "--runs DIR"
    if setup.paths.backup:
        delete += f" and its snapshots in {setup.paths.backup / setup.run_folder.name}"
        options += " and --backup DIR"
    listed = "\n  ".join(changed[:12])
    return (
        f"{setup.run_folder} holds a run of another configuration (there -> here):\n  {listed}\n"
        f"Delete {delete} to start anew, or keep it and pass another one with {options}."
    )


def complete(setup: Setup) -> None:
    """Do what is left of a run; nothing where it is finished.

    Raises `SetupError` where another process works in the run's folder, or another run lies there.
    """
    folder = setup.run_folder
    busy = processes.is_main() and not is_finished(folder)
    with alone_in(folder) if busy else nullcontext():  # two that begin at once: one of them owns the folder
        if processes.is_main():
            claim_run_folder(setup)
        processes.wait_for_all()
        if not (folder / "run.json").exists():
            raise SetupError(
                f"process {processes.process_index()} does not see {folder}, which the main process made: "
                "several machines must share the disk with --runs, --results and --cache."
            )
        if is_finished(folder):
            processes.say(f"run {folder.name} is finished: its results are loaded, nothing is trained")
        else:
            _train_and_predict(setup)


def train_and_predict(setup: Setup) -> None:
    """Fit, try what comes after, score `valid` once, while no other process works in the run's folder.

    Raises `SetupError` where one does.
    """
    with alone_in(setup.run_folder) if processes.is_main() else nullcontext():
        _train_and_predict(setup)


def _train_and_predict(setup: Setup) -> None:
    """The stages of a run. The logits of `valid`, written last, mark a finished one."""
    config, model, folder = setup.config, setup.model, setup.run_folder
    probe_seconds = start_from_probe(setup) if config.model.head_init == "probe" else 0.0
    start = copied(model.learned_state())
    data, valid, feature_seconds = make_batches(setup)
    progress, soup = fit(model, data, config, setup.device, folder, setup.snapshot)
    started = time.perf_counter()
    predictor = improve(model, start, soup, data, config.after, setup.device)
    improved = time.perf_counter()
    valid_NK = predictor.logits(valid, "valid")
    if not processes.is_main():
        return
    seconds = {
        "probe": probe_seconds,
        "features": feature_seconds,
        "after": improved - started,
        "valid": time.perf_counter() - improved,
    }
    total = sum(progress.seconds) + sum(seconds.values())
    seconds |= {"epochs": progress.seconds, "total": total}
    facts = run_facts(setup, progress) | {
        "after": predictor.tried,
        "temperature": predictor.temperature,
        "seconds": seconds,
    }
    state = {name: value.contiguous() for name, value in model.learned_state().items()}
    write_atomically(folder / "model.safetensors", lambda partial: save_file(state, partial))
    write_json(folder / "facts.json", facts)
    write_json(folder / "history.json", progress.history)
    write_array(folder / "holdout_logits.npy", predictor.holdout_NK)
    write_array(folder / "valid_logits.npy", valid_NK)
    setup.snapshot()


def start_from_probe(setup: Setup) -> float:
    """Give the model the classifier of a linear probe (its features are cached); seconds that took."""
    config = configs.probe_of(setup.config)
    built = build_model(config.model, setup.store.wnids, config.train.seed)
    probe = replace(setup, config=config, built=built, device=device_for(config))
    data, _, seconds = make_batches(probe)
    folder = setup.run_folder / "probe"
    progress, _ = fit(built.model, data, config, probe.device, folder, setup.snapshot)
    start_classifier(setup.model, built.model.classifier, setup.config.model.head_init_scale)
    return seconds + sum(progress.seconds)


def make_batches(setup: Setup) -> tuple[FitData, Batches, float]:
    """Training data, `valid`, and the seconds that features took (0 where none are cached)."""
    config, store, splits, device = setup.config, setup.store, setup.splits, setup.device
    cached = config.caches_features
    # Images that are looked at once, or not at all, need no place on the device.
    rows = store.images if cached else to_device(store.images, device.torch_device)
    preprocess, seconds = setup.built.preprocess, 0.0
    used_U = np.arange(len(store))  # rows of the store that `rows` holds
    if cached:
        features, seconds = frozen_features(setup)
        rows, preprocess = to_device(features, device.torch_device), None
        used_U = used_rows(store)

    def batches(index_M: np.ndarray) -> Batches:
        size, index_M = device.eval_batch, np.searchsorted(used_U, index_M)
        return Batches(rows, store.labels_N[used_U], index_M, size, device.torch_device, preprocess)

    fit_on = replace(
        batches(splits.fit_N),
        batch_size=config.train.batch_size,
        augmentation=config.augment,
        balanced=config.data.sampling == "balanced",
        draws_per_class=config.data.draws_per_class,
    )
    size = config.model.predicts_at
    data = FitData(fit_on, batches(splits.holdout_N).at_size(size), cached)
    return data, batches(splits.valid_N).at_size(size), seconds


def used_rows(store: Store) -> np.ndarray:
    """Rows of the store that are in a split: all, but where it is a part of a data set."""
    return np.flatnonzero(store.official_split_N != "")


def frozen_features(setup: Setup) -> tuple[np.ndarray, float]:
    """What the frozen backbone makes of the store's `used_rows`, cached, and the seconds that took."""
    config, store, device, built = setup.config, setup.store, setup.device, setup.built
    model = setup.model.to(device.torch_device).eval()
    used_U = used_rows(store)
    images = Batches(
        store.images, store.labels_N, used_U, device.eval_batch, device.torch_device, built.preprocess
    )
    identity = {
        "weights": built.weights_sha256,
        "backbone": built.weights_tag,
        "store": store.path.name,
        "data": store.fingerprint,
        "image_size": config.model.image_size,
        "map": config.model.head in ("attention", "cross_attention"),
        "precision": device.precision,
        "device": device.torch_device.type,
    }
    if len(used_U) < len(store):
        identity["classes"] = config.data.classes
    if not built.weights_sha256:  # random, and drawn with the seed
        identity["seed"] = config.train.seed
    return cached_features(model.features, images, device, setup.paths.cache / "features", identity)


def run_facts(setup: Setup, progress: Progress) -> dict:
    """What is recorded of a run beside its accuracy."""
    config, model, device = setup.config, setup.model, setup.device
    parameters = list(model.parameters())
    return {
        "arm": config.arm,
        "profile": config.profile,
        "protocol": config.data.protocol,
        "data": setup.store.manifest["source"],
        "data_fingerprint": setup.store.fingerprint,
        "n_classes": len(setup.store.wnids),
        "n_fit": len(setup.splits.fit_N),
        "n_holdout": len(setup.splits.holdout_N),
        "n_unreadable": len(setup.store.manifest["bad_files"]),  # left out on demand
        "backbone": setup.built.weights_tag,
        "weights_sha256": setup.built.weights_sha256,
        "head": config.model.head,
        "image_size": config.model.image_size,
        "test_size": config.model.predicts_at,
        "stored_size": config.data.stored_size,
        "seed": config.train.seed,
        "epochs": len(progress.history),
        "best_epoch": progress.best_epoch,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "gflops": round(gmacs(model, config.model.predicts_at), 4),
        "batch_size": config.train.batch_size,
        "micro_batch": progress.micro_batch or device.micro_batch,
        "processes": processes.n_processes(),
        "precision": {"no": "fp32"}.get(device.precision, device.precision),
        "peak_memory_gb": round(peak_memory_gb(device.torch_device), 2),
        "hardware": device.name,
        "versions": versions(),
        "git_commit": setup.git_commit,  # of the code that ran, not of what was checked out since
        "config": recorded_config(config),
    }


def recorded_config(config: Config) -> dict:
    """The config without what says nothing about the method: where the data lay, and a file of weights.

    A file of weights is named by its content.
    """
    data = configs.to_dict(config)
    del data["data"]["path"]
    path = Path(config.model.weights).expanduser()
    if config.model.weights not in configs.WEIGHTS and path.is_file():
        stat = path.stat()
        data["model"]["weights"] = f"sha256:{_sha256_once(path, stat.st_size, stat.st_mtime_ns)}"
    return data


@lru_cache(maxsize=8)
def _sha256_once(path: Path, _size: int, _mtime_ns: int) -> str:
    """`sha256` of a file that has not changed since: a study asks for it with every row and seed."""
    return sha256(path)


def write_results(setup: Setup) -> Result:
    """The arm's folder under `results/`, from what the run left; the comparison where both arms exist."""
    # Tables and figures take seconds to import; the first step of training does not wait for them.
    import pandas as pd

    from src import report
    from src.evaluate import prediction_frame, with_calibrated_confidence

    store, splits, folder = setup.store, setup.splits, setup.run_folder
    facts, (valid_NK, labels_N) = read_json(folder / "facts.json"), saved_logits(setup, "valid")
    image_ids_N = store.image_ids_N[splits.valid_N]
    predictions = prediction_frame(valid_NK, labels_N, image_ids_N, store.wnids, store.class_names)
    holdout = saved_logits(setup, "holdout")
    facts["holdout_accuracy"] = loss_and_accuracy(*holdout)["accuracy"]
    if splits.protocol == "holdout":  # else the images that would fit the temperature are those it is told of
        temperature = best_temperature(*holdout)
        predictions = with_calibrated_confidence(predictions, valid_NK, temperature)
        facts["calibration_temperature"] = temperature
    history = pd.DataFrame(read_json(folder / "history.json"))

    def images(rows: np.ndarray) -> np.ndarray:
        return store.pictures(splits.valid_N[rows])

    arm = setup.config.arm
    target = setup.paths.results_of(setup.config)
    if arm in configs.STUDY_ARMS:
        report.save(class_counts_of(setup), target / f"{arm}_images_per_class.png")
    metrics = report.write_arm(target, arm, predictions, history, facts, images)
    report.write_comparison(setup.paths.results)
    return Result(setup, metrics, predictions, history, target)


def read_results(setup: Setup) -> Result:
    """What `write_results` of another process wrote."""
    import pandas as pd

    from src.evaluate import read_predictions

    arm, target = setup.config.arm, setup.paths.results_of(setup.config)
    predictions = read_predictions(target / f"{arm}_validation_predictions.csv")
    history = pd.read_csv(target / f"{arm}_history.csv")
    return Result(setup, read_json(target / "metrics.json"), predictions, history, target)


def class_counts_of(setup: Setup) -> Figure:
    """The figure of how many images each class has in train and `valid`."""
    from src.figures import class_counts
    from src.report import footer

    store, config = setup.store, setup.config
    # Test images may have labels, as a stand-in's do, but nothing is learned or chosen by them.
    known_N = np.isin(store.official_split_N, ("train", "valid")) & (store.labels_N >= 0)
    counts_K = np.bincount(store.labels_N[known_N], minlength=len(store.wnids))
    about = {"data": store.manifest["source"], "protocol": config.data.protocol}
    return class_counts(counts_K, store.class_names, config.arm.replace("_", " ").capitalize(), footer(about))


def configure(
    arm: str, profile: str, data_dir: str = "", overrides: dict[str, object] | None = None
) -> Config:
    """The preset under the profile; `data_dir`, or else the variable TINY_IMAGENET_DIR, names local data.

    The variable says nothing of the other studies' own images: there it counts for the stand-ins alone.
    A user's own images are stored larger than Tiny-ImageNet's, where neither preset nor `overrides` says how.
    """
    config = configs.preset(arm, profile, overrides)
    hub_asked_for = (overrides or {}).get("data.source") == "hub"
    own_images = arm in configs.STUDY_ARMS and profile != "offline"
    replaceable = config.data.source in ("local", "hub") and not hub_asked_for and not own_images
    if not data_dir and not config.data.path and replaceable:
        data_dir = os.environ.get(DATA_VARIABLE, "")
    if data_dir:
        config = configs.with_fields(config, {"data.source": "local", "data.path": data_dir})
    size = config.data.stored_size
    said = "data.stored_size" in (overrides or {}) or size != configs.DataConfig().stored_size
    if config.data.source == "local" and config.data.path and not said:
        size = stored_size_of(Path(config.data.path).expanduser(), size)
        config = configs.with_fields(config, {"data.stored_size": size})
    return config


if __name__ == "__main__":
    from src.commands import main

    sys.exit(main())
