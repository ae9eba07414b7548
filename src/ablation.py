"""What each ingredient is worth: runs that differ by one ingredient, on the same seeds.

    python -m src.experiment ablation --profile offline --data DIR
    python -m src.experiment ablation --profile offline --data DIR --rows baseline "+ full fine-tuning"

`grid` declares the rows. A row that is in `ablation.csv` with the same configuration is not run again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax
from scipy.stats import t as student
from tqdm.auto import tqdm

from src import SetupError
from src import config as configs
from src.config import AfterConfig, Config
from src.evaluate import calibration_error
from src.experiment import (
    Paths,
    configure,
    open_data,
    prepare,
    recorded_config,
    require_writable,
    train_and_predict,
)
from src.files import read_json, write_atomically
from src.predict import loss_and_accuracy

SEEDS = (0, 1, 2)
# What every row of a profile shares: small enough for all rows and seeds, and the same for each.
BUDGETS = {
    "quick": {"train.epochs": 2, "data.fit_per_class": 20},
    "offline": {"model.image_size": 64, "train.epochs": 2, "data.fit_per_class": 100},
    "full": {"train.epochs": 12},
}
# The improvement as written: single ingredients are added to it or taken from it.
RECIPE = "+ label smoothing (recipe)"


@dataclass(frozen=True)
class Row:
    """A line of the ablation: a preset with some fields changed, and the row that it is compared with."""

    name: str
    arm: str = "baseline"
    changes: dict[str, object] = field(default_factory=dict)
    against: str = ""


AS_RUN = (
    Row("baseline as run", "as_run_baseline"),
    Row("improvement as run", "as_run_improvement", against="baseline as run"),
)
# Each of these adds to the one above it.
LADDER = {
    "baseline": {},
    "+ full fine-tuning": {
        "model.trainable": "all",
        "optim.schedule": "cosine",
        "optim.warmup_fraction": 0.05,
        "optim.clip_norm": 1.0,
        "train.monitor": "accuracy",
    },
    "+ spatial attention": {"model.head": "attention"},
    "+ flips": {"augment.flip": 0.5},
    "+ RandAugment": {"augment.randaugment_ops": 2},
    "+ erasing": {"augment.erasing": 0.15},
    "+ dropout": {"model.dropout": 0.2},
    "+ weight decay": {"optim.weight_decay": 0.05},
    "+ label smoothing (recipe)": {"optim.label_smoothing": 0.1},
    "+ balanced sampling": {"data.sampling": "balanced"},
}
# Each of these changes the recipe alone. Those of the last lines share its training.
SINGLE = {
    "recipe, without attention": {"model.head": "plain"},
    "recipe, without flips": {"augment.flip": 0.0},
    "recipe, without RandAugment": {"augment.randaugment_ops": 0},
    "recipe, without erasing": {"augment.erasing": 0.0},
    "recipe, without dropout": {"model.dropout": 0.0},
    "recipe, without weight decay": {"optim.weight_decay": 0.0},
    "recipe, without label smoothing": {"optim.label_smoothing": 0.0},
    "head: one-token attention (as run)": {"model.head": "as_run"},
    "head: gate starts at 0.1": {"model.attention_gate": 0.1},
    "head: two attention layers": {"model.attention_layers": 2},
    "head: position bias": {"model.relative_position": True},
    "head: cross-attention, one query": {"model.head": "cross_attention"},
    "head: cross-attention, a query a class": {"model.head": "cross_attention", "model.class_queries": True},
    "head: MLP": {"model.head": "mlp"},
    "head: SCRA gate in the backbone": {"model.scra": True},
    "start: pretrained classifier's rows": {"model.head_init": "pretrained_rows"},
    "start: linear probe (LP-FT)": {"model.head_init": "probe"},
    "trained: head alone": {"model.trainable": "none"},
    "trained: last stage": {"model.trainable": "last_stage"},
    "trained: last two blocks": {"model.trainable": "last_two_blocks"},
    "layer decay 0.8": {"optim.layer_decay": 0.8},
    "TrivialAugment for RandAugment": {"augment.randaugment_ops": 0, "augment.trivial_augment": True},
    "random resized crops": {"augment.crop_scale": (0.35, 1.0)},
    "cutout for erasing": {"augment.erasing": 0.0, "augment.cutout": 16},
    "mixup": {"augment.mixup": 0.2},
    "CutMix": {"augment.cutmix": 1.0},
    "stochastic depth": {"model.drop_path": 0.1},
    "L2-SP": {"optim.l2_sp": 0.01},
    "moving average of weights": {"train.ema_decay": 0.99},
    "progressive resizing": {"train.start_size": 32},
    "tested larger": {"model.test_size": "x1.5"},
    "after: soup of epochs": {"after.soup_epochs": 2},
    "after: WiSE-FT": {"after.wise_ft": True},
    "after: mirrored views": {"after.tta": "flip"},
    "after: ten crops": {"after.tta": "ten_crop"},
    "after: temperature": {"after.temperature": True},
}
# Columns of the ablation in words, and how each is aligned.
COLUMNS = {
    "row": "---",
    "valid": "---:",
    "ECE": "---:",
    "seeds": "---:",
    "against": "---",
    "difference": "---:",
    "verdict": "---",
}


def grid() -> tuple[Row, ...]:
    """Every row, each with all of its changes."""
    rows, changes, above = list(AS_RUN), {}, ""
    for name, added in LADDER.items():
        changes = changes | added
        rows.append(Row(name, "baseline", changes, above))
        above = name
    recipe = next(row for row in rows if row.name == RECIPE)
    rows += [Row(name, "baseline", recipe.changes | change, RECIPE) for name, change in SINGLE.items()]
    return tuple(rows)


def config_of(row: Row, profile: str, data_dir: str, seed: int, overrides: dict[str, object]) -> Config:
    """The row's configuration: preset, the profile's budget, `overrides`, its own changes and the seed.

    On cached features a row trains as long as its preset says: epochs cost next to nothing there.
    """
    shared = {**BUDGETS.get(profile, {}), **overrides}
    changes = {**shared, **row.changes, "train.seed": seed}
    if changes.get("model.test_size") == "x1.5":
        size = configs.preset(row.arm, profile, shared).model.image_size
        changes["model.test_size"] = round(1.5 * size / 32) * 32
    config = configure(row.arm, profile, data_dir, changes)
    if config.caches_features and "train.epochs" not in overrides:
        epochs = configs.preset(row.arm, profile).train.epochs
        config = configs.with_fields(config, {"train.epochs": epochs})
    return config


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
        return replace(paths, runs=paths.runs / "ablation" / self.training_key)

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
    """What an ablation is run on: the profile, the data and what the command line overrides."""

    profile: str
    data_dir: str
    overrides: dict[str, object]
    fingerprint: str

    def job(self, name: str, seed: int) -> Job:
        """The job of the grid's row `name`."""
        row = next(row for row in grid() if row.name == name)
        config = config_of(row, self.profile, self.data_dir, seed, self.overrides)
        return Job.of(row, config, self.fingerprint)


def run_ablation(
    profile: str,
    data_dir: str,
    paths: Paths,
    names: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    overrides: dict | None = None,
) -> Path:
    """Run what is missing of the grid, seed by seed, and write table, summary and figure as rows come in.

    `names`: these rows alone (all by default). Returns the folder of the results. A row that cannot be run
    is passed over and named at the end. Raises `SetupError` for that, for a name that is no row's, and where
    the folder holds other rows of another configuration or of other data.
    """
    known = [row.name for row in grid()]
    if unknown := [name for name in names if name not in known]:
        raise SetupError(f"no row is called {unknown[0]!r}; the rows are: {'; '.join(known)}.")
    folder = paths.results / "ablation"
    for needed in (folder, paths.runs, paths.cache):
        require_writable(needed)
    recipe = configure("improvement", profile, data_dir, overrides)
    plan = Plan(profile, data_dir, overrides or {}, open_data(recipe, paths).fingerprint)
    jobs = [plan.job(name, seed) for seed in seeds for name in dict.fromkeys(names or known)]
    missing = missing_jobs(folder, jobs, plan)
    refused = run_jobs(folder, missing, len(jobs), paths)
    write_summary(folder)
    for job in jobs:  # also of rows that were done when a call before this one was cut off
        shutil.rmtree(job.paths(paths).runs, ignore_errors=True)
    with suppress(OSError):  # other rows' training may be in there
        (paths.runs / "ablation").rmdir()
    if refused:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in refused.items())
        raise SetupError(f"all rows are run but these, which cannot be:\n{reasons}")
    return folder


def missing_jobs(folder: Path, jobs: list[Job], plan: Plan) -> list[Job]:
    """The jobs that are not in the folder's table as they are asked for; stale lines of theirs go from it."""
    table, known = read_table(folder), {row.name for row in grid()}
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
        write_table(folder, table[[pair in done for pair in zip(table["row"], table["seed"], strict=True)]])
    return [job for job in jobs if (job.row.name, job.seed) not in done]


def run_jobs(folder: Path, jobs: list[Job], n_rows: int, paths: Paths) -> dict[str, str]:
    """Run the jobs, the last of `n_rows`; rows that cannot be run, with the reason.

    Raises `SetupError` where two rows give the same reason: then it is no row's own.
    """
    refused: dict[str, str] = {}
    with tqdm(total=n_rows, initial=n_rows - len(jobs), desc="ablation", unit="row") as bar:
        for i, job in enumerate(jobs):
            bar.set_postfix_str(f"{job.row.name}, seed {job.seed}")
            if job.row.name not in refused:
                try:
                    add_record(folder, run_row(job, paths))
                except SetupError as error:
                    if str(error) in refused.values():
                        raise
                    refused[job.row.name] = str(error)
                write_summary(folder)
            if job.training_key not in {later.training_key for later in jobs[i + 1 :]}:
                shutil.rmtree(job.paths(paths).runs, ignore_errors=True)
            bar.update()
    return refused


def run_row(job: Job, paths: Paths) -> dict:
    """Train and predict one row -> its record."""
    setup = prepare(job.config, job.paths(paths))
    setup.run_folder.mkdir(parents=True, exist_ok=True)
    train_and_predict(setup)
    facts, splits = read_json(setup.run_folder / "facts.json"), setup.splits
    scores = {}
    for name, rows_N in (("holdout", splits.holdout_N), ("valid", splits.valid_N)):
        logits_NK, labels_N = np.load(setup.run_folder / f"{name}_logits.npy"), setup.store.labels_N[rows_N]
        confidence_N, right_N = softmax(logits_NK, axis=1).max(axis=1), logits_NK.argmax(axis=1) == labels_N
        scores |= {f"{name}_{key}": value for key, value in loss_and_accuracy(logits_NK, labels_N).items()}
        scores[f"{name}_ece"] = calibration_error(confidence_N, right_N)
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
        **{key: facts[key] for key in ("backbone", "image_size", "data", "protocol", "n_fit", "hardware")},
        "git_commit": facts["git_commit"],
        "config": job.key,
    }


def read_table(folder: Path) -> pd.DataFrame:
    """`ablation.csv`, or an empty table."""
    path = folder / "ablation.csv"
    if not path.exists():
        return pd.DataFrame(columns=["row", "seed", "config"])
    try:
        names = dict.fromkeys(("config", "git_commit"), str)  # hexadecimal, and some look like numbers
        return pd.read_csv(path, keep_default_na=False, dtype=names)
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} cannot be read ({error}). Move it away to start anew.") from None


def write_table(folder: Path, table: pd.DataFrame) -> None:
    """`ablation.csv` in the grid's order, without rows that the grid no longer has."""
    from src.report import write_csv

    order = {row.name: place for place, row in enumerate(grid())}
    table = table[table["row"].isin(order)]
    table = table.sort_values(["row", "seed"], key=lambda c: c.map(order) if c.name == "row" else c)
    write_csv(table, folder / "ablation.csv")


def add_record(folder: Path, record: dict) -> None:
    """Write the record into `ablation.csv`."""
    table, line = read_table(folder), pd.DataFrame([record])
    write_table(folder, pd.concat([table, line]) if len(table) else line)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """A line a row: mean and sd over seeds, and the difference on `valid` to the row compared with.

    The difference is paired by seed, its 95 % interval Student's over the seeds that both have (none for one
    seed). It speaks of training again on these images, not of other images.
    """
    by_row = {name: group.set_index("seed") for name, group in table.groupby("row")}
    lines = []
    for row in (row for row in grid() if row.name in by_row):
        own, other = by_row[row.name], by_row.get(row.against)
        valid = own["valid_accuracy"]
        line = {
            "row": row.name,
            "against": row.against,
            "seeds": len(own),
            "valid_mean": valid.mean(),
            "valid_sd": valid.std(),
            "holdout_mean": own["holdout_accuracy"].mean(),
            "loss_mean": own["valid_loss"].mean(),
            "ece_mean": own["valid_ece"].mean(),
            "seconds_mean": own["seconds"].mean(),
            "parameters": own["parameters"].iloc[0],
            "gflops": own["gflops"].iloc[0],
        }
        paired = valid[:0] if other is None else (valid - other["valid_accuracy"]).dropna()
        lines.append(line | paired_difference(paired.to_numpy(float)))
    return pd.DataFrame(lines)


def paired_difference(differences: np.ndarray) -> dict[str, object]:
    """Mean of the seeds' differences, its 95 % interval, and what that says."""
    n = len(differences)
    if not n:
        return {"difference": np.nan, "low": np.nan, "high": np.nan, "verdict": ""}
    mean = differences.mean()
    if n == 1:
        return {"difference": mean, "low": np.nan, "high": np.nan, "verdict": "one seed: not judged"}
    half = student.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)
    if not differences.any():
        verdict = "changes nothing"
    elif abs(mean) <= half:
        verdict = "cannot be told apart from noise"
    else:
        verdict = "helps" if mean > 0 else "hurts"
    return {"difference": mean, "low": mean - half, "high": mean + half, "verdict": verdict}


def write_summary(folder: Path) -> None:
    """`summary.csv`, `summary.md` and `ablation.png` from `ablation.csv`; nothing where that is empty."""
    from src.figures import ablation_figure
    from src.report import save

    table = read_table(folder)
    if table.empty:
        return
    save(ablation_figure(write_words(folder, table), about(table)), folder / "ablation.png")


def write_words(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """`summary.csv` and `summary.md`, which follow from the table to the letter; returns the summary."""
    from src.report import write_csv

    summary = summarise(table)
    words = text(summary, about(table))
    write_csv(summary, folder / "summary.csv")
    write_atomically(folder / "summary.md", lambda p: p.write_text(words, encoding="utf-8"))
    return summary


def read_summary(path: Path) -> pd.DataFrame:
    """What `summarise` gave, from `summary.csv`."""
    return pd.read_csv(path).fillna({"against": "", "verdict": ""})


def about(table: pd.DataFrame) -> str:
    """What all rows share, for the footer of the figure and the head of the text."""
    arms = {row.name: configs.PRESETS[row.arm].model.trainable for row in grid()}
    parts = {row.name: row.changes.get("model.trainable", arms[row.name]) for row in grid()}
    trained = table[table["row"].map(parts) != "none"]

    def shared(column: str, lines: pd.DataFrame = table) -> str:
        return ", ".join(str(value) for value in sorted(set(lines[column])))

    epochs = f"epochs: {shared('epochs', trained)} where the backbone is trained" if len(trained) else ""
    facts = (
        shared("backbone"),
        f"{shared('image_size')} px",
        f"{table['n_fit'].iloc[0]:,} images to train on",
        epochs,
        f"seeds: {shared('seed')}",
        f"data: {shared('data')}",
        f"protocol: {shared('protocol')}",
        shared("hardware"),
    )
    return " · ".join(fact for fact in facts if fact)


def text(summary: pd.DataFrame, note: str) -> str:
    """The ablation in words: a line a row, generated from the numbers."""
    return "\n".join(
        (
            "# What each ingredient is worth",
            "",
            f"{note}.",
            "",
            "Accuracy on `valid`, mean ± standard deviation over seeds; expected calibration error (ECE); "
            "differences of accuracy in points, paired by seed, with Student's 95 % interval over seeds. One "
            "interval in twenty misses the truth by chance.",
            "",
            markdown(summary),
            "",
        )
    )


def markdown(summary: pd.DataFrame, columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """The summary as a table with some of `COLUMNS`."""
    lines = [columns, [COLUMNS[column] for column in columns]]
    for line in summary.itertuples():
        difference = "" if np.isnan(line.difference) else f"{100 * line.difference:+.2f}"
        if not np.isnan(line.low):
            difference += f" [{100 * line.low:+.2f}, {100 * line.high:+.2f}]"
        spread = "" if np.isnan(line.valid_sd) else f" ± {100 * line.valid_sd:.2f}"
        cells = {
            "row": line.row,
            "valid": f"{100 * line.valid_mean:.2f}{spread}",
            "ECE": f"{100 * line.ece_mean:.2f}",
            "seeds": str(line.seeds),
            "against": line.against,
            "difference": difference,
            "verdict": line.verdict,
        }
        lines.append([cells[column] for column in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
