"""An ensemble (Lakshminarayanan et al. 2017): the mean of the probabilities that finished runs gave.

    python -m src.experiment ensemble --preset improvement --profile offline --data DIR --seeds 0,1,2
    python -m src.experiment ensemble --preset improvement,best --profile offline --data DIR --seeds 0,1

Nothing is computed anew: the runs' saved logits are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import log_softmax, logsumexp

from src import SetupError
from src.after import best_temperature
from src.config import Config, with_fields
from src.evaluate import (
    BOOTSTRAP_SEED,
    N_RESAMPLES,
    accuracy,
    compare,
    is_right,
    prediction_frame,
    with_calibrated_confidence,
    write_predictions,
)
from src.experiment import Setup, claim_run_folder, finished_run, prepare
from src.files import read_array, write_json
from src.folders import Paths, require_writable

ENSEMBLE = "ensemble"  # its name among its members'


def ensemble_of(configs: Sequence[Config], seeds: Sequence[int], paths: Paths) -> tuple[Path, dict]:
    """Score the finished runs of `configs`, each under every one of `seeds`, and the mean of their answers.

    Writes `ensemble.json` and `ensemble_validation_predictions.csv`, in the arms' own format, into `ensemble`
    in the arm's folder (that of several arms has all their names). `gain` is accuracy over the mean of the
    members; `best_member` is chosen on `holdout`, of equals the first, and compared with the ensemble on
    `valid`. Raises `SetupError` for fewer than two runs, for a run that is not finished, is damaged or is one
    of another configuration, and for runs that did not predict the same images.
    """
    seeds, configs = list(dict.fromkeys(seeds)), list({config.arm: config for config in configs}.values())
    if len(seeds) * len(configs) < 2:
        raise SetupError(f"an ensemble needs two runs or more; {configs[0].arm} with --seeds {seeds} is one.")
    members = {
        f"{config.arm} seed {seed}": with_fields(config, {"train.seed": seed})
        for config in configs
        for seed in seeds
    }
    runs = {name: finished_run(config, paths) for name, config in members.items()}
    together = paths.results / "_".join(config.arm for config in configs).capitalize()
    folder = (paths.results_of(configs[0]) if len(configs) == 1 else together) / ENSEMBLE
    require_writable(folder)
    setup = require_same_images(members, paths)
    logits = {
        split: {name: read_logits(run / f"{split}_logits.npy", shape) for name, run in runs.items()}
        for split, shape in shapes_of(setup).items()
    }
    for of_split in logits.values():
        of_split[ENSEMBLE] = log_mean_probabilities(np.stack(list(of_split.values())))
    frames = {split: frames_of(of_split, setup, split) for split, of_split in logits.items()}
    numbers = {"protocol": setup.splits.protocol, "data": setup.store.manifest["source"], **scores_of(frames)}
    write_predictions(
        calibrated(frames["valid"][ENSEMBLE], logits, setup),
        folder / f"{ENSEMBLE}_validation_predictions.csv",
    )
    write_json(folder / "ensemble.json", numbers)
    return folder, numbers


def require_same_images(members: dict[str, Config], paths: Paths) -> Setup:
    """The setup of the first member's arm, once every run is what its config says, on the same splits."""
    setups: dict[str, Setup] = {}
    for config in members.values():
        if config.arm not in setups:
            setups[config.arm] = prepare(config, paths)
        claim_run_folder(replace(setups[config.arm], config=config))
    first, *others = setups.values()
    for other in others:
        if image_ids(other) != image_ids(first) or other.store.wnids != first.store.wnids:
            raise SetupError(
                f"{first.config.arm} and {other.config.arm} did not predict the same images; only runs "
                "on the same data with the same splits make an ensemble."
            )
    return first


def image_ids(setup: Setup) -> list[list[str]]:
    """The images of `holdout` and of `valid`."""
    return [setup.store.image_ids_N[rows].tolist() for rows in (setup.splits.holdout_N, setup.splits.valid_N)]


def shapes_of(setup: Setup) -> dict[str, tuple[int, int]]:
    """(N,K) of the logits of each split."""
    splits, n_classes = setup.splits, len(setup.store.wnids)
    return {"holdout": (len(splits.holdout_N), n_classes), "valid": (len(splits.valid_N), n_classes)}


def read_logits(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The logits (N,K) that a run left. Raises `SetupError` for a damaged file."""
    logits_NK = read_array(path)
    if logits_NK.shape != shape:
        raise SetupError(
            f"{path} is damaged (its shape is {logits_NK.shape}, not {shape}). Delete it and run again."
        )
    return logits_NK


def log_mean_probabilities(logits_MNK: np.ndarray) -> np.ndarray:
    """Logits of M members -> (N,K) logarithm of the mean of their probabilities, in float64."""
    log_probabilities_MNK = log_softmax(logits_MNK.astype(np.float64), axis=2)
    return logsumexp(log_probabilities_MNK, axis=0) - np.log(len(logits_MNK))


def frames_of(logits: dict[str, np.ndarray], setup: Setup, split: str) -> dict[str, pd.DataFrame]:
    """The prediction table of every member and of the ensemble."""
    store, rows_N = setup.store, getattr(setup.splits, f"{split}_N")
    labels_N, ids_N = store.labels_N[rows_N], store.image_ids_N[rows_N]
    return {
        name: prediction_frame(logits_NK, labels_N, ids_N, store.wnids, store.class_names)
        for name, logits_NK in logits.items()
    }


def calibrated(frame: pd.DataFrame, logits: dict[str, dict[str, np.ndarray]], setup: Setup) -> pd.DataFrame:
    """The ensemble's table with the calibrated confidence that the arms' tables have."""
    if setup.splits.protocol != "holdout":
        return frame
    labels_N = setup.store.labels_N[setup.splits.holdout_N]
    temperature = best_temperature(logits["holdout"][ENSEMBLE], labels_N)
    return with_calibrated_confidence(frame, logits["valid"][ENSEMBLE], temperature)


def scores_of(frames: dict[str, dict[str, pd.DataFrame]]) -> dict:
    """Accuracy and loss by name and split, gains over the mean member, comparison with the best member."""
    names = [name for name in frames["valid"] if name != ENSEMBLE]
    scores = {
        name: {
            split: accuracy(is_right(of_split[name])) | {"loss": float(of_split[name]["Loss"].mean())}
            for split, of_split in frames.items()
        }
        for name in (*names, ENSEMBLE)
    }
    gains = {
        split: gain(np.stack([is_right(of_split[name]) for name in names]), is_right(of_split[ENSEMBLE]))
        for split, of_split in frames.items()
    }
    best = max(names, key=lambda name: scores[name]["holdout"]["accuracy"])
    against = compare(frames["valid"][best], frames["valid"][ENSEMBLE])
    return {
        "scores": scores,
        "gain": gains,
        "best_member": best,
        "best_member_to_ensemble": {"a": best, "b": ENSEMBLE}
        | {key: value for key, value in against.items() if key not in ("a", "b")},
    }


def in_words(numbers: dict) -> str:
    """What `ensemble.json` holds of `valid`: the ensemble's accuracy, and what it gains."""
    score, gained = numbers["scores"][ENSEMBLE]["valid"], numbers["gain"]["valid"]
    points, low, high = (f"{100 * gained[key]:+.2f}" for key in ("difference", "low", "high"))
    return (
        f"{len(numbers['scores']) - 1} runs together {score['accuracy']:.2%} of valid; gain over the mean "
        f"member: {points} points, 95 % interval [{low}, {high}]"
    )


def gain(right_MN: np.ndarray, right_N: np.ndarray) -> dict[str, float]:
    """Accuracy of the ensemble minus the mean of its members', with its paired 95 % interval.

    Percentile bootstrap over images (Efron and Tibshirani 1993, chapter 13): it speaks of other images, for
    these members, not of other members.
    """
    gain_N, n = right_N - right_MN.mean(axis=0), len(right_N)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    resampled = [gain_N[rng.integers(n, size=n)].mean() for _ in range(N_RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"difference": float(gain_N.mean()), "low": float(low), "high": float(high)}
