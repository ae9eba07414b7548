"""Run a study, row by row and resumable.

    python -m src.experiment ablation --profile offline --data DIR
    python -m src.experiment ablation --profile offline --data DIR --rows baseline "+ full fine-tuning"

A row that is in the study's table with the same configuration and data is not run again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
from scipy.special import softmax
from tqdm.auto import tqdm

from src import NotNow, SetupError
from src import config as configs
from src.config import AfterConfig, Config
from src.data.batches import Batches
from src.evaluate import calibration_error
from src.experiment import (
    Setup,
    configure,
    open_data,
    prepare,
    recorded_config,
    saved_logits,
    train_and_predict,
)
from src.files import read_json
from src.folders import Paths, alone_in, require_writable
from src.predict import loss_and_accuracy, one_pass
from src.studies.study import SEEDS, Row, Study, Times
from src.studies.table import add_record, read_table, write_summary, write_table

AT_ONCE, PASSES = 32, 5  # images of a timed step, as the studies have them; steps whose median counts


@dataclass(frozen=True)
class Job:
    """A row under a seed. `key` names its configuration and data, `training_key` what training needs."""

    row: Row
    config: Config
    key: str
    training_key: str

    @property
    def seed(self) -> int:
        return self.config.train.seed

    def paths(self, paths: Paths) -> Paths:
        """Where it runs: rows that differ in `after` alone share a folder, and so their training."""
        return replace(paths, runs=paths.runs / self.training_key)

    @classmethod
    def of(cls, row: Row, config: Config, fingerprint: str) -> Job:
        training = replace(config, after=AfterConfig(soup_epochs=config.after.soup_epochs))
        return cls(row, config, config_key(config, fingerprint), config_key(training, fingerprint))


def config_key(config: Config, fingerprint: str) -> str:
    """Twelve hexadecimal digits that name a configuration on the data of that fingerprint.

    Of what differs from the defaults: a field that is added later, and off, leaves the name as it was.
    """
    plain = recorded_config(Config(arm=config.arm))
    changes = [plain["arm"], *configs.differences(recorded_config(config), plain), fingerprint]
    return hashlib.sha256(json.dumps(changes).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """What a study is run on: the profile, the data and what the command line overrides.

    `data` and `fingerprint`: the name of the data that were opened, and of their content.
    """

    study: Study
    profile: str
    data_dir: str = ""
    overrides: dict[str, object] = field(default_factory=dict)
    data: str = ""
    fingerprint: str = ""

    def config(self, row: Row, seed: int) -> Config:
        """The row's configuration: preset, the profile's budget, `overrides`, its own changes and the seed.

        On cached features a row trains as long as its preset says: epochs cost next to nothing there.
        """
        shared = {**self.study.budgets.get(self.profile, {}), **self.overrides}
        plain = configs.preset(row.arm, self.profile, shared)
        own = {
            name: value.of(plain) if isinstance(value, Times) else value
            for name, value in row.changes.items()
        }
        config = configure(row.arm, self.profile, self.data_dir, {**shared, **own, "train.seed": seed})
        if config.caches_features and "train.epochs" not in self.overrides:
            epochs = configs.preset(row.arm, self.profile).train.epochs
            config = configs.with_fields(config, {"train.epochs": epochs})
        return config

    def job(self, name: str, seed: int) -> Job:
        """The job of the study's row `name`."""
        row = self.study.row(name)
        return Job.of(row, self.config(row, seed), self.fingerprint)


def run_study(plan: Plan, paths: Paths, names: Sequence[str] = (), seeds: Sequence[int] = SEEDS) -> Path:
    """Run what is missing of the study, seed by seed; write table, summary and figure as rows come in.

    `names`: these rows alone (all by default). Returns the folder of the results. A row that cannot be run
    is passed over and named at the end. Raises `SetupError` for that, for a name that is no row's, and where
    the folder holds rows of another profile or of other data, or other rows of another configuration.
    """
    study = plan.study
    names = list(dict.fromkeys(names)) or [row.name for row in study.rows_of(plan.profile)]
    rows = [study.row(name) for name in names]
    first = plan.config(rows[0], seeds[0])
    folder = study.path(paths.results, configs.is_stand_in(first))
    for needed in (folder, paths.runs, paths.cache):
        require_writable(needed)
    store = open_data(first, paths)
    plan = replace(plan, data=store.manifest["source"], fingerprint=store.fingerprint)
    work = replace(paths, runs=paths.runs / study.name, backup=None)  # its table is what goes on
    jobs = [plan.job(name, seed) for seed in seeds for name in names]
    with alone_in(work.runs):
        refused = run_jobs(study, missing_jobs(folder, jobs, plan), len(jobs), folder, work)
        write_summary(study, folder)
        for job in jobs:  # also of rows that were done when a call before this one was cut off
            shutil.rmtree(job.paths(work).runs, ignore_errors=True)
        (work.runs / ".lock").unlink(missing_ok=True)
    with suppress(OSError):  # other rows' training may be in there
        work.runs.rmdir()
    if refused:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in refused.items())
        raise SetupError(f"all rows are run but these, which cannot be:\n{reasons}")
    return folder


def missing_jobs(folder: Path, jobs: list[Job], plan: Plan) -> list[Job]:
    """The jobs that are not in the folder's table as they are asked for; stale lines of theirs go from it."""
    table, known = read_table(plan.study, folder), {row.name for row in plan.study.rows}
    require_same_data(folder, table, plan)
    lines = [(line.row, line.seed, line.config) for line in table.itertuples() if line.row in known]
    done = {(name, seed) for name, seed, key in lines if plan.job(name, seed).key == key}
    wanted = {(job.row.name, job.seed) for job in jobs}
    others = [(name, seed) for name, seed, _ in lines if (name, seed) not in done | wanted]
    if others:
        raise SetupError(
            f"{folder} holds rows of another configuration or data ({others[0][0]!r}, {len(others)} in all), "
            "which these could not be compared with. Run all rows anew, or pass another folder with "
            "--results DIR."
        )
    if len(done) < len(table):
        stay = [pair in done for pair in zip(table["row"], table["seed"], strict=True)]
        write_table(plan.study, folder, table[stay])
    return [job for job in jobs if (job.row.name, job.seed) not in done]


def require_same_data(folder: Path, table: pd.DataFrame, plan: Plan) -> None:
    """Raise `SetupError` where the table is of another profile or of other data: it is somebody's work."""
    for column, asked in (("profile", plan.profile), ("data", plan.data)):
        if others := sorted(set(table.get(column, ())) - {asked}):
            raise SetupError(
                f"{folder / plan.study.name}.csv holds rows of {column} {others[0]!r}, not {asked!r}. They "
                "stay as they are: pass another folder with --results DIR, or move the file away."
            )


def run_jobs(study: Study, jobs: list[Job], n_rows: int, folder: Path, paths: Paths) -> dict[str, str]:
    """Run the jobs, the last of `n_rows`, into the folder's table; rows that cannot be run, with the reason.

    Raises `SetupError` where two rows give the same reason: then it is no row's own.
    """
    refused: dict[str, str] = {}
    with tqdm(total=n_rows, initial=n_rows - len(jobs), desc=study.name, unit="row") as bar:
        for i, job in enumerate(jobs):
            bar.set_postfix_str(f"{job.row.name}, seed {job.seed}")
            if job.row.name not in refused:
                try:
                    add_record(study, folder, run_row(job, paths, study.timed))
                except NotNow:  # no fault of the row: what it has trained stays
                    raise
                except SetupError as error:
                    if str(error) in refused.values():
                        raise
                    refused[job.row.name] = str(error)
                write_summary(study, folder)
            if job.training_key not in {later.training_key for later in jobs[i + 1 :]}:
                shutil.rmtree(job.paths(paths).runs, ignore_errors=True)
            bar.update()
    return refused


def run_row(job: Job, paths: Paths, timed: bool = False) -> dict:
    """Train and predict one row -> its record; with `timed`, `predict_ms` is in it."""
    setup = prepare(job.config, job.paths(paths))
    train_and_predict(setup)
    facts, scores = read_json(setup.run_folder / "facts.json"), {}
    for name in ("holdout", "valid"):
        logits_NK, labels_N = saved_logits(setup, name)
        confidence_N, right_N = softmax(logits_NK, axis=1).max(axis=1), logits_NK.argmax(axis=1) == labels_N
        scores |= {f"{name}_{key}": value for key, value in loss_and_accuracy(logits_NK, labels_N).items()}
        scores[f"{name}_ece"] = calibration_error(confidence_N, right_N)
    if timed:
        scores["predict_ms"] = milliseconds_a_step(setup)
    return {
        "row": job.row.name,
        "seed": job.seed,
        **scores,
        "seconds": facts["seconds"]["total"],
        **{
            key: facts[key]
            for key in ("epochs", "best_epoch", "trainable_parameters", "parameters", "gflops")
        },
        "after": "; ".join(step["step"] for step in facts["after"] if step["kept"]),
        **{key: facts[key] for key in ("backbone", "image_size", "profile", "data", "protocol", "n_fit")},
        "hardware": facts["hardware"],
        "git_commit": facts["git_commit"],
        "config": job.key,
    }


def milliseconds_a_step(setup: Setup) -> float:
    """Milliseconds in which the model in `setup` answers `AT_ONCE` stored images, resized: a median.

    Cached features and views are not used: it is the way of an image that comes for the first time.
    """
    store, device = setup.store, setup.device
    model = setup.model.to(device.torch_device).eval()
    rows_N = np.resize(setup.splits.valid_N, AT_ONCE)
    batches = Batches(
        store.images, store.labels_N, rows_N, AT_ONCE, device.torch_device, setup.built.preprocess
    ).at_size(setup.config.model.predicts_at)
    seconds = []
    for _ in range(1 + PASSES):  # the first one warms up
        started = time.perf_counter()
        one_pass(model, batches, device, "a step")
        seconds.append(time.perf_counter() - started)
    return round(1000 * median(seconds[1:]), 1)
