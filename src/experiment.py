"""`run(config, paths) -> Result`, and the command line.

    python -m src.experiment baseline --profile quick
    python -m src.experiment improvement --profile offline --data DIR
    python -m src.experiment summary --results results/quick

The order of things, and nothing else: data, model, training, prediction, report.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from src import SetupError
from src import config as configs
from src.config import Config
from src.data.batches import Batches, Transform, to_device, training_transform
from src.data.sources import open_source
from src.data.splits import Splits, make_splits
from src.data.store import Store, open_store
from src.device import Device, choose_device, git_commit, peak_memory_gb, set_up_process, versions
from src.files import read_json, write_array, write_atomically, write_json
from src.model.build import Built, Classifier, build_model, gmacs
from src.predict import cached_features, one_pass
from src.train import FitData, Progress, fit

if TYPE_CHECKING:
    import pandas as pd

DATA_VARIABLE = "TINY_IMAGENET_DIR"
FINISHED = ("model.safetensors", "facts.json", "history.json", "valid_logits.npy")  # what a run leaves


@dataclass(frozen=True)
class Paths:
    """Where a run reads and writes: what people read, what it works on, what can be made again."""

    results: Path
    runs: Path
    cache: Path

    @classmethod
    def of(cls, profile: str, results: str = "", runs: str = "", cache: str = "") -> Paths:
        """Given folders, or the defaults in the checkout: `quick` never overwrites real results."""
        root = Path(__file__).resolve().parent.parent
        default_results = root / "results" / "quick" if profile == "quick" else root / "results"
        return cls(
            Path(results or default_results), Path(runs or root / "runs"), Path(cache or root / "cache")
        )


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
    for folder in (paths.results, paths.runs, paths.cache):
        require_writable(folder)
    source = open_source(config.data, paths.cache)
    store = open_store(source, paths.cache, config.data.stored_size, config.data.skip_bad)
    splits = make_splits(store, config.data)
    built = build_model(config.model, store.wnids, config.train.seed)
    device = choose_device(config.model.image_size, config.train.batch_size)
    if config.caches_features:  # they are small: the whole batch at once
        device = replace(device, micro_batch=config.train.batch_size)
    return Setup(config, paths, store, splits, built, device, git_commit())


def run(config: Config, paths: Paths) -> Result:
    """Train (or go on, or load what a finished run left), score `valid` once, write the arm's results."""
    setup = prepare(config, paths)
    claim_run_folder(setup)
    if all((setup.run_folder / name).exists() for name in FINISHED):
        tqdm.write(f"run {config.run_name} is finished: its results are loaded, nothing is trained")
    else:
        train_and_predict(setup)
    weights = setup.run_folder / "model.safetensors"
    try:
        setup.model.load_state_dict(load_file(weights), strict=False)
    except SafetensorError as error:
        raise SetupError(f"{weights} is damaged ({error}). Delete it and run again.") from None
    setup.model.eval()
    return write_results(setup)


def claim_run_folder(setup: Setup) -> None:
    """Make the run's folder, or check that the run in it is this one."""
    identity = {
        "config": recorded_config(setup.config),
        "data": setup.store.fingerprint,
        "weights_sha256": setup.built.weights_sha256,
    }
    path = setup.run_folder / "run.json"
    if path.exists():
        changed = configs.differences(identity, read_json(path))
        if changed:
            raise SetupError(
                f"{setup.run_folder} holds a run of another configuration (there -> here):\n  "
                + "\n  ".join(changed[:12])
                + "\nDelete that folder to start anew, or keep it and pass another one with --runs DIR."
            )
    setup.run_folder.mkdir(parents=True, exist_ok=True)
    setup.splits.save(setup.run_folder / "splits.json")
    write_json(path, identity)


def train_and_predict(setup: Setup) -> None:
    """Fit, keep the best weights, score `valid` once. The logits, written last, mark a finished run."""
    config, device, model, folder = setup.config, setup.device, setup.model, setup.run_folder
    data, valid, feature_seconds = make_batches(setup)
    progress = fit(model, data, config, device, folder)
    state = {name: value.contiguous() for name, value in model.learned_state().items()}
    write_atomically(folder / "model.safetensors", lambda partial: save_file(state, partial))
    started = time.perf_counter()
    logits_NK = one_pass(model.classify if data.cached else model, valid, device, "valid")
    seconds = {
        "features": feature_seconds,
        "epochs": progress.seconds,
        "valid": time.perf_counter() - started,
    }
    seconds["total"] = feature_seconds + sum(progress.seconds) + seconds["valid"]
    write_json(folder / "facts.json", {**run_facts(setup, progress), "seconds": seconds})
    write_json(folder / "history.json", progress.history)
    write_array(folder / "valid_logits.npy", logits_NK)


def make_batches(setup: Setup) -> tuple[FitData, Batches, float]:
    """Training data, `valid`, and the seconds that features took (0 where none are cached)."""
    config, store, device = setup.config, setup.store, setup.device
    model = setup.model.to(device.torch_device).eval()
    cached = config.caches_features
    # Images that are looked at once, or not at all, need no place on the device.
    rows = store.images if cached else to_device(store.images, device.torch_device)
    prepared, seconds = setup.built.preprocess, 0.0

    def batches(index_M: np.ndarray, size: int, transform: Transform | None = None) -> Batches:
        return Batches(rows, store.labels_N, index_M, size, device.torch_device, transform, prepared)

    if cached:
        features, seconds = cached_features(
            model.features,
            batches(np.arange(len(store.labels_N)), device.eval_batch),
            device,
            setup.paths.cache / "features",
            {
                "weights": setup.built.weights_sha256,
                "backbone": setup.built.weights_tag,
                "store": store.path.name,
                "data": store.fingerprint,
                "image_size": config.model.image_size,
                "head": config.model.head,
                "precision": device.precision,
                "device": device.torch_device.type,
            },
        )
        rows, prepared = to_device(features, device.torch_device), None
    transform = None if cached or config.augment.is_identity else training_transform(config.augment, prepared)
    splits = setup.splits
    data = FitData(
        fit=batches(splits.fit_N, config.train.batch_size, transform),
        holdout=batches(splits.holdout_N, device.eval_batch),
        cached=cached,
    )
    return data, batches(splits.valid_N, device.eval_batch), seconds


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
        "backbone": setup.built.weights_tag,
        "weights_sha256": setup.built.weights_sha256,
        "head": config.model.head,
        "image_size": config.model.image_size,
        "stored_size": config.data.stored_size,
        "seed": config.train.seed,
        "epochs": len(progress.history),
        "best_epoch": progress.best_epoch,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "gflops": round(gmacs(model, config.model.image_size), 4),
        "batch_size": config.train.batch_size,
        "micro_batch": device.micro_batch,
        "precision": {"no": "fp32"}.get(device.precision, device.precision),
        "peak_memory_gb": round(peak_memory_gb(device.torch_device), 2),
        "hardware": device.name,
        "versions": versions(),
        "git_commit": setup.git_commit,  # of the code that ran, not of what was checked out since
        "config": recorded_config(config),
    }


def recorded_config(config: Config) -> dict:
    """The config without the one field that says nothing about the method: where the data lay."""
    data = configs.to_dict(config)
    del data["data"]["path"]
    return data


def write_results(setup: Setup) -> Result:
    """The arm's folder under `results/`, from what the run left; the comparison where both arms exist."""
    # Tables and figures take seconds to import; the first step of training does not wait for them.
    import pandas as pd

    from src import report
    from src.evaluate import prediction_frame

    store, splits, folder = setup.store, setup.splits, setup.run_folder
    predictions = prediction_frame(
        np.load(folder / "valid_logits.npy"),
        store.labels_N[splits.valid_N],
        store.image_ids_N[splits.valid_N],
        store.wnids,
        store.class_names,
    )
    history = pd.DataFrame(read_json(folder / "history.json"))

    def images(rows: np.ndarray) -> np.ndarray:
        return store.images[splits.valid_N[rows]].transpose(0, 2, 3, 1)

    arm = setup.config.arm
    target = setup.paths.results / arm.capitalize()
    facts = read_json(folder / "facts.json")
    metrics = report.write_arm(target, arm, predictions, history, facts, images)
    report.write_comparison(setup.paths.results)
    return Result(setup, metrics, predictions, history, target)


def require_writable(folder: Path) -> None:
    """Make `folder` and try to write into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.partial"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise SetupError(
            f"folder {folder} cannot be written to ({error.strerror}). "
            "Choose another with --results, --runs or --cache."
        ) from None


def summary(results: Path) -> str:
    """A line an arm: accuracy with its interval, seconds, folder."""
    lines = [f"{'arm':<12} {'accuracy':>8}  {'95 % interval':<18} {'seconds':>7}  folder"]
    for path in sorted(results.glob("*/metrics.json")):
        m = read_json(path)
        interval = f"[{m['wilson_low']:.2%}, {m['wilson_high']:.2%}]"
        seconds = m["seconds"]["total"]
        lines.append(
            f"{m['arm']:<12} {m['accuracy']:>8.2%}  {interval:<18} {seconds:>7.0f}  {shown(path.parent)}"
        )
    if len(lines) == 1:
        raise SetupError(f"no metrics.json in the folders of {results}: run an arm first.")
    return "\n".join(lines)


def shown(path: Path) -> str:
    """A path as people read it: relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def configure(
    arm: str, profile: str, data_dir: str = "", overrides: dict[str, object] | None = None
) -> Config:
    """The preset under the profile; `data_dir`, or else the variable TINY_IMAGENET_DIR, names local data."""
    config = configs.preset(arm, profile, overrides)
    hub_asked_for = (overrides or {}).get("data.source") == "hub"
    replaceable = config.data.source in ("local", "hub") and not hub_asked_for
    if not data_dir and not config.data.path and replaceable:
        data_dir = os.environ.get(DATA_VARIABLE, "")
    if data_dir:
        config = configs.with_fields(config, {"data.source": "local", "data.path": data_dir})
    return config


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m src.experiment", description=__doc__.split("\n")[0])
    parser.add_argument("arm", choices=[*configs.PRESETS, "summary"])
    parser.add_argument(
        "--profile", default="full", help=f"one of: {', '.join(configs.PROFILES)} (default: full)"
    )
    parser.add_argument(
        "--data", default="", help=f"local data instead of the profile's source (or {DATA_VARIABLE})"
    )
    parser.add_argument("--protocol", default="holdout", help="holdout (default) or published")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default="", help="folder for what people read")
    parser.add_argument("--runs", default="", help="folder for checkpoints and logits")
    parser.add_argument("--cache", default="", help="folder for the decoded images and features")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any config field")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line; a `SetupError` is one message and exit status 2."""
    args = parse_arguments(arguments)
    try:
        if args.arm == "summary":
            print(summary(Path(args.results or "results")))
            return 0
        pairs = [item.partition("=") for item in args.set]
        overrides = {"data.protocol": args.protocol, "train.seed": args.seed, **{k: v for k, _, v in pairs}}
        config = configure(args.arm, args.profile, args.data, overrides)
        paths = Paths.of(args.profile, args.results, args.runs, args.cache)
        run(config, paths)
        print(summary(paths.results))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
