"""A search for better rates, dropout and weight decay: TPE (Bergstra et al. 2011) by Optuna.

    python -m src.experiment search --preset improvement --profile offline --data DIR --trials 20

Each trial is a run of its own, from the first epoch to the last. `holdout` alone decides; what a trial says
of `valid` is never read. The first trial is the preset as it is.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from src import NotNow, SetupError
from src.config import Config, field_names, get, preset, with_fields
from src.data.batches import derived_seed
from src.experiment import Setup, prepare, saved_logits, train_and_predict
from src.figures import search_figure
from src.files import read_json, write_json
from src.folders import Paths, require_writable
from src.predict import loss_and_accuracy
from src.report import footer, save, write_csv
from src.studies.run import config_key

if TYPE_CHECKING:
    import optuna

# What is searched: lowest and highest value, and whether the scale is logarithmic.
SPACE = {
    "lr_factor": (0.1, 10.0, True),
    "model.dropout": (0.0, 0.7, False),
    "optim.weight_decay": (1e-5, 0.3, True),
}
RATES = ("optim.lr", "optim.head_lr")  # times `lr_factor`
DIGITS = 3  # significant ones of a value that is tried
STATES = {"COMPLETE": "complete", "PRUNED": "failed"}  # of the trials that count, in Optuna's words and ours


@dataclass(frozen=True)
class Search:
    """A search in motion: its preset, made ready to run, and its trials so far."""

    setup: Setup
    study: optuna.Study

    @property
    def config(self) -> Config:
        return self.setup.config

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that count, in their order: those that ended by themselves."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name in STATES]


def search(config: Config, paths: Paths, n_trials: int = 20) -> tuple[Path, dict]:
    """Run what is missing of `n_trials`; write `search.csv`, `search.json` and `search.png` of the arm.

    Returns their folder and what the JSON holds. A search that was cut off goes on: what each trial tries
    follows from the seed and from the trials before it, and the trial that was under way is run again from
    its newest checkpoint. One that cannot be trained to its end (its loss is not finite) counts as failed.
    No trial is stopped early: `fit` reports to nobody before its end. Raises `SetupError` where Optuna is not
    installed, where there is no `holdout` to choose on, where the preset itself cannot be trained or lies
    outside `SPACE`, and where the database holds another search.
    """
    require_optuna()
    require_searchable(config, n_trials)
    setup, folder = prepare(config, paths), paths.results_of(config)
    require_writable(folder)
    work = paths.runs / f"search-{config.run_name}"
    state = Search(setup, open_study(work / "search.db", setup))
    n_done = len(state.trials)
    with tqdm(total=max(n_trials, n_done), initial=n_done, desc="search", unit="trial") as bar:
        for _ in range(n_done, n_trials):
            run_trial(state, work / "trials")
            write_results(state, folder)
            bar.update()
    shutil.rmtree(work / "trials", ignore_errors=True)
    return folder, write_results(state, folder)


def require_optuna() -> None:
    """Raise `SetupError` where Optuna is not installed; silence what it says of every trial."""
    try:
        import optuna
    except ImportError as error:
        raise SetupError(f"the search needs another package ({error}): pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def require_searchable(config: Config, n_trials: int) -> None:
    """Raise `SetupError` for what cannot be searched."""
    if n_trials < 1:
        raise SetupError(f"--trials {n_trials}: a search needs one trial or more.")
    if config.data.protocol != "holdout":
        raise SetupError(
            f"--protocol {config.data.protocol} holds nothing out of train to choose on, and `valid` is not "
            "for choosing: search with --protocol holdout."
        )
    for name, value in start(config).items():
        low, high, _ = SPACE[name]
        if not low <= value <= high:
            raise SetupError(
                f"{name} = {value} is outside of what is searched, [{low}, {high}]: start from a value in "
                f"it, --set {name}={np.clip(value, low, high)}."
            )


def start(config: Config) -> dict[str, float]:
    """The preset itself as a point of `SPACE`."""
    return {name: 1.0 if name == "lr_factor" else get(config, name) for name in SPACE}


def open_study(path: Path, setup: Setup) -> optuna.Study:
    """The search in the database `path`, made where it is not there.

    A trial that is under way in it was cut off: it is given up, so that it is drawn again. Raises
    `SetupError` for a damaged database and for a search of another configuration, data or weights.
    """
    import optuna
    from sqlalchemy.exc import DatabaseError

    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"study_name": "search", "direction": "maximize", "load_if_exists": True}
    try:
        study = optuna.create_study(storage=f"sqlite:///{path}", **options)
    except (DatabaseError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise SetupError(f"{path} cannot be read ({reason}). Move it away to search anew.") from None
    key = config_key(setup.config, setup.store.fingerprint)
    identity = {"config": key, "weights_sha256": setup.built.weights_sha256}
    if study.user_attrs.get("identity", identity) != identity:
        raise SetupError(
            f"{path} holds a search of another configuration, data or weights, whose trials could not be "
            "compared with these. Delete that folder to search anew, or keep it and pass another one with "
            "--runs DIR."
        )
    study.set_user_attr("identity", identity)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def run_trial(search: Search, work: Path) -> None:
    """Draw the next point, train with it below `work`, and file its accuracy on `holdout`."""
    import optuna

    study, config, n_done = search.study, search.config, len(search.trials)
    waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
    if not n_done and not waiting:
        study.enqueue_trial(start(config))
    # A sampler for each trial needs no state: a search that was cut off draws what it would have drawn.
    study.sampler = optuna.samplers.TPESampler(seed=derived_seed(config.train.seed, n_done) % 2**32)
    space = {
        name: optuna.distributions.FloatDistribution(*SPACE[name][:2], log=SPACE[name][2]) for name in SPACE
    }
    trial = study.ask(space)
    tried = with_fields(config, fields_of(config, trial.params))
    runs = work / config_key(tried, search.setup.store.fingerprint)
    try:
        accuracy, facts = train(tried, replace(search.setup.paths, runs=runs, backup=None))
    except NotNow:  # no fault of the trial: what it has trained stays, and it is drawn again
        raise
    except SetupError as error:
        if not n_done:  # the preset itself: no trial would fare better for the same reason
            raise
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)  # which TPE takes for a bad one
    else:
        trial.set_user_attr("facts", facts)
        study.tell(trial, accuracy)
    shutil.rmtree(runs, ignore_errors=True)


def fields_of(config: Config, point: dict[str, float]) -> dict[str, float]:
    """The fields of the configuration at a point of `SPACE`, with so few digits that they can be typed."""
    fields = {name: point["lr_factor"] * get(config, name) for name in RATES}
    fields |= {name: point[name] for name in SPACE if name != "lr_factor"}
    return {name: float(f"{value:.{DIGITS}g}") for name, value in fields.items()}


def train(config: Config, paths: Paths) -> tuple[float, dict]:
    """An ordinary run -> its accuracy on `holdout` and its facts."""
    setup = prepare(config, paths)
    train_and_predict(setup)
    accuracy = loss_and_accuracy(*saved_logits(setup, "holdout"))["accuracy"]
    return accuracy, read_json(setup.run_folder / "facts.json")


def trial_table(search: Search) -> pd.DataFrame:
    """A row a trial, counted from 1: state, what was tried, accuracy on `holdout`, seconds."""
    return pd.DataFrame(
        {
            "trial": number,
            "state": STATES[trial.state.name],
            "lr_factor": trial.params["lr_factor"],
            **fields_of(search.config, trial.params),
            "holdout_accuracy": np.nan if trial.value is None else trial.value,
            "seconds": trial.user_attrs["facts"]["seconds"]["total"] if trial.value is not None else np.nan,
        }
        for number, trial in enumerate(search.trials, 1)
    )


def write_results(search: Search, folder: Path) -> dict:
    """Table, JSON and figure of the trials so far; what the JSON holds. Of equals the first is best."""
    table, config = trial_table(search), search.config
    best = int(table["holdout_accuracy"].idxmax())
    fields = fields_of(config, search.trials[best].params)
    found = {
        "trials": len(table),
        "failed": {
            str(number): trial.user_attrs["reason"]
            for number, trial in enumerate(search.trials, 1)
            if "reason" in trial.user_attrs
        },
        "preset": {"holdout_accuracy": float(table["holdout_accuracy"][0])},
        "best": {
            "trial": best + 1,
            "holdout_accuracy": float(table["holdout_accuracy"][best]),
            "fields": fields,
        },
        "command": command_of(with_fields(config, fields)),
        "facts": search.trials[best].user_attrs["facts"],
    }
    write_csv(table, folder / "search.csv")
    save(search_figure(table, footer(found["facts"])), folder / "search.png")
    write_json(folder / "search.json", found)
    return found


def in_words(found: dict) -> str:
    """What `search.json` holds: the best trial beside the preset."""
    best, plain = found["best"]["holdout_accuracy"], found["preset"]["holdout_accuracy"]
    fields = ", ".join(f"{name} = {value:g}" for name, value in found["best"]["fields"].items())
    return f"best of {found['trials']} trials: holdout {best:.2%}, the preset's {plain:.2%}, with {fields}"


def command_of(config: Config) -> str:
    """The command line that runs this configuration; local data are called DIR."""
    plain = preset(config.arm, config.profile)
    local = ("data.path", "data.source") if config.data.path else ()
    words = [config.arm, "--profile", config.profile, *(("--data", "DIR") if local else ())]
    words += ["--seed", str(config.train.seed)]
    for name in field_names():
        value = get(config, name)
        if value != get(plain, name) and name not in (*local, "train.seed"):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += ["--set", f"{name}={text}"]
    return f"python -m src.experiment {shlex.join(words)}"
