"""A search: what it tries, that one that is cut off goes on as if it had not been, and what it leaves."""

from __future__ import annotations

import json
import shlex
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_experiment import arguments, own, paths, refused, small
from test_report import assert_legible, said

from src import NotNow, SetupError, search
from src.commands import main
from src.config import get, preset, with_fields
from src.figures import search_figure
from src.files import read_json, write_json
from src.search import DIGITS, RATES, SPACE, command_of, fields_of

pytest.importorskip("optuna")

COLUMNS = [
    "trial", "state", "lr_factor", "optim.lr", "optim.head_lr", "model.dropout", "optim.weight_decay",
    "holdout_accuracy", "seconds",
]  # fmt: skip


@pytest.fixture
def config(pets, weights):
    return own(pets, weights, "baseline")


def accuracy_of(config) -> float:
    """What a pretended training gives: best at low dropout and a head's rate of 0.03."""
    return 0.9 - 0.1 * abs(np.log10(config.optim.head_lr / 0.03)) - 0.2 * config.model.dropout


class Pretended:
    """Stands in for training; `at` are events of the calls, counted from 0, that end otherwise."""

    def __init__(self, at: dict[int, BaseException] | None = None) -> None:
        self.at, self.tried = at or {}, []

    def __call__(self, config, paths) -> tuple[float, dict]:
        self.tried.append(config)
        paths.runs.mkdir(parents=True, exist_ok=True)
        if error := self.at.get(len(self.tried) - 1):
            raise error
        return accuracy_of(config), {"seconds": {"total": 2.5}, "backbone": "some_net.in1k"}


def pretend(monkeypatch, at: dict[int, BaseException] | None = None) -> Pretended:
    training = Pretended(at)
    monkeypatch.setattr(search, "train", training)
    monkeypatch.setattr(search, "save", lambda figure, path: None)
    return training


def table_of(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "results" / "Baseline" / "search.csv")


@pytest.fixture(scope="module")
def whole(pets, weights, tmp_path_factory):
    """A search that nothing cut off -> its table, and the configurations that it tried."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        training = pretend(patch)
        search.search(own(pets, weights, "baseline"), paths(folder), 24)
    return table_of(folder), training.tried


def test_the_first_trial_is_the_preset_and_later_ones_vary_all_of_the_space(config, whole):
    table, tried = whole
    assert tried[0] == config and len(tried) == 24
    assert list(table) == COLUMNS and table["trial"].tolist() == list(range(1, 25))
    assert set(table["state"]) == {"complete"} and set(table["seconds"]) == {2.5}
    for name, (low, high, _) in SPACE.items():
        assert table[name].between(low, high).all() and table[name].nunique() > 20
    for one, row in zip(tried, table.to_dict("records"), strict=True):
        fields = {name: row[name] for name in COLUMNS[3:7]}
        assert one == with_fields(config, fields)  # the table's values are those that were tried
        assert row["holdout_accuracy"] == pytest.approx(accuracy_of(one))
        for name in RATES:
            assert row[name] == pytest.approx(row["lr_factor"] * get(config, name), rel=10 ** -(DIGITS - 1))


def test_a_search_learns(whole):
    """After the random trials, the mean of what is found is higher."""
    accuracies = whole[0]["holdout_accuracy"]
    assert accuracies[10:].mean() > accuracies[1:10].mean() + 0.02


def test_another_seed_tries_something_else(config, whole, tmp_path, monkeypatch):
    training = pretend(monkeypatch)
    search.search(with_fields(config, {"train.seed": 1}), paths(tmp_path), 2)
    ours, theirs = ([get(one, "model.dropout") for one in tried] for tried in (training.tried, whole[1]))
    assert ours[0] == theirs[0] and ours[1] != theirs[1]


@pytest.mark.parametrize("cut_at", [0, 10])
def test_a_search_that_is_cut_off_goes_on_as_if_it_had_not_been(config, whole, tmp_path, monkeypatch, cut_at):
    """Cut off in the preset, and after the trials that are drawn at random."""
    first = pretend(monkeypatch, {cut_at: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        search.search(config, paths(tmp_path), cut_at + 2)
    work = tmp_path / "runs" / f"search-{config.run_name}"
    (left,) = (work / "trials").iterdir()  # the checkpoints of the trial that was under way
    folders, second = [], pretend(monkeypatch)
    monkeypatch.setattr(search, "train", lambda *a: folders.append(a[1].runs) or second(*a))
    search.search(config, paths(tmp_path), cut_at + 2)
    assert folders[0] == left and first.tried[-1] == second.tried[0] and len(second.tried) == 2
    expected = whole[0][: cut_at + 2]
    pd.testing.assert_frame_equal(table_of(tmp_path), expected, check_exact=True)
    assert [path.name for path in work.iterdir()] == ["search.db"]


def test_more_trials_go_on_from_those_that_are_there(config, whole, tmp_path, monkeypatch):
    pretend(monkeypatch)
    search.search(config, paths(tmp_path), 3)
    for n_trials in (1, 3):
        again = pretend(monkeypatch)
        search.search(config, paths(tmp_path), n_trials)
        assert again.tried == [] and table_of(tmp_path).equals(whole[0][:3])
    further = pretend(monkeypatch)
    search.search(config, paths(tmp_path), 4)
    assert further.tried == [whole[1][3]] and table_of(tmp_path).equals(whole[0][:4])


def test_a_trial_that_cannot_be_trained_counts_as_failed_and_stays_so(config, tmp_path, monkeypatch):
    pretend(monkeypatch, {2: SetupError("the loss is nan at epoch 1")})
    _, found = search.search(config, paths(tmp_path), 4)
    table = table_of(tmp_path)
    assert table["state"].tolist() == ["complete", "complete", "failed", "complete"]
    for column in ("holdout_accuracy", "seconds"):
        assert table[column].isna().tolist() == [False, False, True, False]
    assert found["failed"] == {"3": "the loss is nan at epoch 1"} and found["best"]["trial"] != 3
    again = pretend(monkeypatch)
    search.search(config, paths(tmp_path), 4)
    assert again.tried == []


def test_a_preset_that_cannot_be_trained_is_no_trial(config, tmp_path, monkeypatch):
    pretend(monkeypatch, {0: SetupError("the loss is nan at epoch 1")})
    with pytest.raises(SetupError, match="the loss is nan"):
        search.search(config, paths(tmp_path), 3)
    training = pretend(monkeypatch)
    search.search(config, paths(tmp_path), 1)
    assert training.tried == [config]


def test_what_is_no_fault_of_a_trial_stops_the_search(config, tmp_path, monkeypatch):
    """A full disk, say: what the trial has trained stays, and the next call draws the same trial."""
    pretend(monkeypatch)
    search.search(config, paths(tmp_path), 4)
    expected = table_of(tmp_path)
    pretend(monkeypatch, {2: NotNow("no space is left")})
    with pytest.raises(NotNow):
        search.search(config, paths(tmp_path / "again"), 4)
    assert len(list((tmp_path / "again" / "runs").glob("*/trials/*"))) == 1
    pretend(monkeypatch)
    search.search(config, paths(tmp_path / "again"), 4)
    pd.testing.assert_frame_equal(table_of(tmp_path / "again"), expected)


def test_of_equals_the_first_is_best(config, tmp_path, monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setitem(globals(), "accuracy_of", lambda config: 0.5)
    _, found = search.search(config, paths(tmp_path), 4)
    assert found["best"]["trial"] == 1
    assert found["preset"]["holdout_accuracy"] == found["best"]["holdout_accuracy"] == 0.5


def test_another_configuration_data_or_weights_is_another_search(config, tmp_path, monkeypatch):
    pretend(monkeypatch)
    search.search(config, paths(tmp_path), 1)
    with pytest.raises(SetupError, match=r"search\.db holds a search of another.*--runs DIR"):
        search.search(with_fields(config, {"train.epochs": 3}), paths(tmp_path), 1)
    prepare = search.prepare

    def other_weights(config, paths):
        setup = prepare(config, paths)
        object.__setattr__(setup.built, "weights_sha256", "0" * 64)
        return setup

    monkeypatch.setattr(search, "prepare", other_weights)
    with pytest.raises(SetupError, match="holds a search of another"):
        search.search(config, paths(tmp_path), 1)


def test_a_damaged_database_is_named(config, tmp_path, monkeypatch):
    pretend(monkeypatch)
    path = tmp_path / "runs" / f"search-{config.run_name}" / "search.db"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no database" * 100)
    with pytest.raises(SetupError, match=r"search\.db cannot be read.*Move it away"):
        search.search(config, paths(tmp_path), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.protocol": "published"}, "--protocol published.*--protocol holdout"),
        ({"optim.weight_decay": 0.0}, "optim.weight_decay = 0.0 is outside.*--set optim.weight_decay=1e-05"),
        ({"model.dropout": 0.8}, r"model.dropout = 0.8 is outside of what is searched, \[0.0, 0.7\]"),
    ],
)
def test_what_cannot_be_searched_is_refused(config, tmp_path, changes, message):
    with pytest.raises(SetupError, match=message):
        search.search(with_fields(config, changes), paths(tmp_path), 3)
    assert not list(tmp_path.iterdir())


def test_without_optuna_the_message_says_what_to_install(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SetupError, match="pip install optuna"):
        search.search(config, paths(tmp_path), 3)
    assert not list(tmp_path.iterdir())


def test_the_command_line_names_every_field_that_differs():
    plain = preset("improvement", "offline")
    command = command_of(plain)
    assert command == "python -m src.experiment improvement --profile offline --seed 0"
    fields = {"augment.crop_scale": (0.5, 1.0), "train.compile": True, "model.weights": "my weights.pt"}
    changed = with_fields(plain, {**fields, "data.path": "/somewhere", "train.seed": 3, "optim.lr": 1.5e-7})
    words = shlex.split(command_of(changed))
    assert words[3:9] == ["improvement", "--profile", "offline", "--data", "DIR", "--seed"]
    pairs = dict(word.split("=", 1) for word in words if "=" in word)
    assert with_fields(plain, {**pairs, "data.path": "/somewhere", "train.seed": 3}) == changed
    assert "/somewhere" not in command_of(changed)


def test_values_have_few_digits(config):
    fields = fields_of(
        config, {"lr_factor": 1 / 3, "model.dropout": 0.12345, "optim.weight_decay": 1.23456e-5}
    )
    assert fields == {
        "optim.lr": 0.000167,
        "optim.head_lr": 0.00333,
        "model.dropout": 0.123,
        "optim.weight_decay": 1.23e-5,
    }


# ----------------------------------------------------------------------------------- really trained


def test_holdout_alone_is_looked_at(config, tmp_path, monkeypatch):
    def train_and_predict(setup):
        right_NK = np.eye(2, dtype=np.float32)[setup.store.labels_N[setup.splits.holdout_N]]
        right_NK[0] = 1 - right_NK[0]
        setup.run_folder.mkdir(parents=True)
        np.save(setup.run_folder / "holdout_logits.npy", right_NK)
        write_json(setup.run_folder / "facts.json", {"a": 1})

    monkeypatch.setattr(search, "train_and_predict", train_and_predict)
    assert search.train(config, paths(tmp_path)) == (pytest.approx(5 / 6), {"a": 1})


def test_a_search_from_the_command_line_and_its_best_repeated(pets, weights, tmp_path, capsys):
    """The accuracy is that of `holdout` of an ordinary run; of the trials only the facts are left."""
    command = [*arguments(tmp_path, "search", pets, small(weights)), "--preset", "baseline", "--trials", "3"]
    assert main(command) == 0
    *_, said_, line = capsys.readouterr().out.splitlines()
    results = tmp_path / "results" / "Baseline"
    found = read_json(results / "search.json")
    assert said_.startswith("best of 3 trials: holdout ") and line == found["command"]
    assert sorted(path.name for path in results.iterdir()) == ["search.csv", "search.json", "search.png"]
    with Image.open(results / "search.png") as picture:
        assert picture.width == 1170
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["search-baseline-offline-holdout-seed0"]
    table = pd.read_csv(results / "search.csv")
    assert found["best"]["holdout_accuracy"] == pytest.approx(table["holdout_accuracy"].max())
    assert found["facts"]["n_holdout"] == 6 and "valid_accuracy" not in json.dumps(found)
    for name, value in found["best"]["fields"].items():
        section, field = name.split(".")
        assert found["facts"]["config"][section][field] == value
    third = table.iloc[2]
    again = {name: repr(float(third[name])) for name in COLUMNS[3:7]}
    assert main(arguments(tmp_path / "again", "baseline", pets, {**small(weights), **again})) == 0
    folder = tmp_path / "again" / "runs" / "baseline-offline-holdout-seed0"
    logits_NK = np.load(folder / "holdout_logits.npy")
    labels_N = np.repeat([0, 1], 3)
    assert third["holdout_accuracy"] == pytest.approx((logits_NK.argmax(1) == labels_N).mean())
    assert "--trials 0" in refused(capsys, [*command[:-1], "0"])


# ------------------------------------------------------------------------------------------- figure


@pytest.mark.parametrize("n", [1, 25])
def test_the_figure_marks_preset_best_and_failed(n):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "trial": np.arange(1, n + 1),
            "lr_factor": 10 ** rng.uniform(-1, 1, n),
            "model.dropout": rng.uniform(0, 0.7, n),
            "optim.weight_decay": 10 ** rng.uniform(-5, -0.5, n),
            "holdout_accuracy": rng.uniform(0.5, 0.7, n),
        }
    )
    table.loc[table["trial"].isin((3, 8)), "holdout_accuracy"] = np.nan
    figure = search_figure(table, "some_net.in1k · 96 px")
    assert_legible(figure, "search")
    text = said(figure)
    assert f"Search over {n} trials" in text and "some_net.in1k" in text and "weight decay" in text
    best = table["holdout_accuracy"].idxmax()
    for axes, column in zip(figure.axes, ["trial", *SPACE], strict=True):
        dots, first, marked, crosses = axes.lines[:4]
        assert dots.get_xdata().tolist() == table[column].tolist()
        assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == (
            [table[column][0]],
            [table["holdout_accuracy"][0]],
        )
        assert marked.get_ydata().tolist() == [table["holdout_accuracy"][best]]
        assert crosses.get_xdata().tolist() == table[column][table["holdout_accuracy"].isna()].tolist()
    (running,) = figure.axes[0].lines[4:]
    heights = running.get_ydata()
    assert (np.diff(heights) >= 0).all() and heights[-1] == table["holdout_accuracy"][best]
