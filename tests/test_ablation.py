"""The ablation: which rows there are, that each is run once, and what is said of the numbers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
from conftest import write_pets
from PIL import Image
from scipy.stats import ttest_rel
from sklearn.metrics import accuracy_score, log_loss
from test_experiment import arguments, paths, refused, small, trained
from test_report import assert_legible, said

from src import NotNow, SetupError
from src.commands import main
from src.config import PROFILES, Config, field_names, get, preset
from src.experiment import configure
from src.figures import study_figure
from src.folders import alone_in
from src.report import write_csv
from src.studies import ABLATION
from src.studies import run as engine
from src.studies.ablation import BUDGETS, LADDER, OF_LARGE_MAPS, RECIPE, SINGLE
from src.studies.run import Plan, run_study
from src.studies.study import Times
from src.studies.table import (
    about,
    markdown,
    paired_difference,
    read_summary,
    read_table,
    summarise,
    write_summary,
    write_words,
)
from src.train import Trainer

GRID = {row.name: row for row in ABLATION.rows}
TEMPERATURE, MIRRORED, PROBE = "after: temperature", "after: mirrored views", "start: linear probe (LP-FT)"
FINE_TUNING, PRETRAINED = "+ full fine-tuning", "start: pretrained classifier's rows"
ROWS = ("baseline", FINE_TUNING, RECIPE, PROBE, MIRRORED, TEMPERATURE)


def configured(name: str, profile: str = "offline", seed: int = 0, **overrides: object) -> Config:
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return Plan(ABLATION, profile, "", changes).config(GRID[name], seed)


def changed(a: Config, b: Config) -> dict[str, object]:
    """The fields in which `a` differs from `b`, with the value in `a`."""
    return {name: get(a, name) for name in field_names() if get(a, name) != get(b, name)}


# ------------------------------------------------------------------------------------------------ grid


def test_rows_have_names_of_their_own_and_are_compared_with_rows_above():
    names = [row.name for row in ABLATION.rows]
    assert len(names) == len(set(names)) == 2 + len(LADDER) + len(SINGLE) + 1
    for place, row in enumerate(ABLATION.rows):
        assert row.against in ["", *names[:place]]
    assert [row.name for row in ABLATION.rows if not row.against] == ["baseline as run", "baseline"]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_row_has_a_valid_configuration_with_its_declared_values(profile):
    for name, row in GRID.items():
        config = configured(name, profile, seed=2)
        assert config.train.seed == 2 and config.profile == profile and config.arm == row.arm
        for field, value in row.changes.items():
            if not isinstance(value, Times):
                assert get(config, field) == value, (name, field)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_rung_of_the_ladder_adds_its_fields_and_nothing_else(profile):
    rungs = list(LADDER)
    for above, name in zip(rungs, rungs[1:], strict=False):
        assert GRID[name].against == above
        difference = changed(configured(name, profile), configured(above, profile))
        if name == FINE_TUNING:  # from cached features, whose epochs cost nothing
            assert difference.pop("train.epochs") == configured(RECIPE, profile).train.epochs
        assert difference == LADDER[name], name


@pytest.mark.parametrize("profile", PROFILES)
def test_a_single_row_changes_its_fields_of_the_recipe_and_nothing_else(profile):
    recipe = configured(RECIPE, profile)
    for name, declared in SINGLE.items():
        assert GRID[name].against == RECIPE
        difference = changed(configured(name, profile), recipe)
        if name == "tested larger":
            size = recipe.model.image_size
            assert difference.keys() == {"model.test_size"}
            assert 1.4 * size < difference["model.test_size"] <= 1.5 * size
            assert difference["model.test_size"] % 32 == 0
        elif name.startswith("learning rate × "):
            factor = float(name.removeprefix("learning rate × "))
            assert difference == {"optim.lr": pytest.approx(factor * recipe.optim.lr)}
        else:
            assert difference == declared, name


@pytest.mark.parametrize("profile", ["offline", "full"])
def test_the_recipe_is_the_improvement_as_written(profile, monkeypatch):
    monkeypatch.delenv("TINY_IMAGENET_DIR", raising=False)
    difference = changed(configured(RECIPE, profile), preset("improvement", profile))
    assert difference.pop("arm") == "baseline"
    budget = {name: value for name, value in BUDGETS[profile].items() if name in difference}
    assert difference == budget


@pytest.mark.parametrize(
    ("profile", "pairs"),
    [
        # With one set of weights and batches of 32 for all, the study's baseline is the baseline.
        ("offline", [["baseline as run", "baseline"]]),
        ("full", []),
    ],
)
def test_rows_are_different_runs(profile, pairs):
    """But for the recipe without its last ingredient, which is the rung below."""
    rows = defaultdict(list)
    for name in GRID:
        config = configured(name, profile)
        rows[str([get(config, field) for field in field_names() if field != "arm"])].append(name)
    same = [names for names in rows.values() if len(names) > 1]
    assert same == [*pairs, ["+ weight decay", "recipe, without label smoothing"]]


def test_what_was_run_stands_beside_what_was_written():
    baseline, improvement = GRID["baseline as run"], GRID["improvement as run"]
    assert (baseline.arm, improvement.arm) == ("as_run_baseline", "as_run_improvement")
    assert improvement.against == baseline.name and not baseline.changes and not improvement.changes
    assert configured(RECIPE).model.head == "attention"
    assert configured("head: one-token attention (as run)").model.head == "as_run"


def test_every_ingredient_of_the_recipe_is_also_left_out_alone():
    rungs = list(LADDER)
    for name in rungs[1 : rungs.index(RECIPE) + 1]:
        off = [
            single
            for single, declared in SINGLE.items()
            if declared.keys() <= LADDER[name].keys()
            and all(value in (0, get(configured("baseline"), field)) for field, value in declared.items())
        ]
        assert off, name


def test_a_row_on_cached_features_trains_as_long_as_its_preset():
    def epochs(name: str, profile: str, **overrides: object) -> int:
        return configured(name, profile, **overrides).train.epochs

    assert epochs("baseline", "offline") == preset("baseline", "offline").train.epochs == 100
    assert epochs("baseline as run", "full") == 100 and epochs("baseline", "quick") == 20
    assert epochs("trained: head alone", "offline") == epochs(RECIPE, "offline") == 2
    assert epochs("baseline", "offline", train__epochs=7) == epochs(RECIPE, "offline", train__epochs=7) == 7


def test_a_row_s_own_fields_come_before_overrides_and_overrides_before_the_budget():
    config = configured("+ flips", model__image_size=96, augment__flip=0.25, optim__lr=0.5)
    assert (config.model.image_size, config.augment.flip, config.optim.lr) == (96, 0.5, 0.5)
    assert configured("tested larger", model__image_size=128).model.test_size == 192


# --------------------------------------------------------------------------------- a miniature, for real


def command(folder, pets, weights, *rows: str, **changes) -> list[str]:
    asked = arguments(folder, "ablation", pets, small(weights, **changes))
    return [*asked, "--seeds", "0,1", "--rows", *rows]


def run_rows(folder, pets, weights, *rows: str, **changes) -> pd.DataFrame:
    """Run the rows -> `ablation.csv`."""
    plan = Plan(ABLATION, "offline", str(pets), small(weights, **changes))
    run_study(plan, paths(folder), rows, (0, 1))
    return read_table(ABLATION, folder / "results" / "ablation")


def counted_steps(patch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step of training."""
    steps, original = [], Trainer.train_step
    patch.setattr(Trainer, "train_step", lambda self, *a: (steps.append(1), original(self, *a))[1])
    return steps


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """The table without what no two runs share."""
    return table.drop(columns="seconds").reset_index(drop=True)


@pytest.fixture(scope="module")
def whole(pets, weights, tmp_path_factory):
    """An ablation of six rows and two seeds by the command line -> (folder, steps of training)."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        steps = counted_steps(patch)
        assert main(command(folder, pets, weights, *ROWS)) == 0
    return folder, len(steps)


def test_an_ablation_has_every_row_and_seed_in_the_grid_s_order(whole):
    folder = whole[0] / "results" / "ablation"
    table = read_table(ABLATION, folder)
    in_order = sorted(ROWS, key=list(GRID).index)
    assert list(zip(table["row"], table["seed"], strict=True)) == [(r, s) for r in in_order for s in (0, 1)]
    assert {path.name for path in folder.iterdir()} == {
        "ablation.csv",
        "summary.csv",
        "summary.md",
        "ablation.png",
    }
    assert table["config"].str.fullmatch("[0-9a-f]{12}").all() and table["config"].is_unique
    assert set(table["n_fit"]) == {18} and set(table["image_size"]) == {tiny.SIZE}
    with Image.open(folder / "ablation.png") as image:
        assert image.width == 1170
    assert (folder / "summary.md").read_text().count("\n| ") == 2 + len(ROWS)


def test_nothing_of_the_runs_stays(whole):
    folder, _ = whole
    assert list((folder / "runs").iterdir()) == []


def test_rows_that_differ_in_what_comes_after_share_their_training(whole):
    """18 images in steps of 5, 2 epochs: 8 steps for each of 4 trainings; a probe's 5 epochs are 1 step."""
    folder, steps = whole
    assert steps == 2 * (4 * 8 + 5)
    table = read_table(ABLATION, folder / "results" / "ablation").set_index(["row", "seed"])
    for seed in (0, 1):
        warm, cold = table.loc[TEMPERATURE, seed], table.loc[RECIPE, seed]
        assert warm["valid_accuracy"] == cold["valid_accuracy"] and warm["after"].startswith("temperature")
        assert warm["holdout_loss"] < cold["holdout_loss"] and cold["after"] == ""
    assert table.loc[(PROBE, 0), "valid_loss"] != table.loc[(RECIPE, 0), "valid_loss"]


def test_a_line_holds_what_the_same_run_outside_of_the_ablation_measures(whole, pets, weights, tmp_path):
    line = read_table(ABLATION, whole[0] / "results" / "ablation").set_index(["row", "seed"]).loc[RECIPE, 1]
    setup = trained(Plan(ABLATION, "offline", str(pets), small(weights)).config(GRID[RECIPE], 1), tmp_path)
    for split, rows_N in (("valid", setup.splits.valid_N), ("holdout", setup.splits.holdout_N)):
        logits_NK = np.load(setup.run_folder / f"{split}_logits.npy").astype(float)
        probabilities_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(1, keepdims=True)
        labels_N, right_N = setup.store.labels_N[rows_N], logits_NK.argmax(1) == setup.store.labels_N[rows_N]
        assert line[f"{split}_accuracy"] == pytest.approx(accuracy_score(labels_N, logits_NK.argmax(1)))
        assert line[f"{split}_loss"] == pytest.approx(log_loss(labels_N, probabilities_NK), rel=1e-5)
        ece, confidence_N = 0.0, probabilities_NK.max(1)
        for k in range(15):
            inside = (confidence_N > k / 15) & (confidence_N <= (k + 1) / 15)
            ece += abs(confidence_N[inside].sum() - right_N[inside].sum()) / len(labels_N)
        assert line[f"{split}_ece"] == pytest.approx(ece, rel=1e-5)
    assert line["parameters"] == sum(p.numel() for p in setup.model.parameters())


def test_a_finished_ablation_runs_nothing(whole, pets, weights, monkeypatch):
    folder, _ = whole
    before = (folder / "results" / "ablation" / "ablation.csv").read_bytes()
    monkeypatch.setattr(engine, "run_row", None)
    assert main(command(folder, pets, weights, *ROWS)) == 0
    assert (folder / "results" / "ablation" / "ablation.csv").read_bytes() == before


def test_an_ablation_cut_off_anywhere_goes_on_to_the_same_numbers(
    whole, pets, weights, tmp_path, monkeypatch
):
    """Cut off within a training, after the numbers of a row and before its figure, and between rows that
    share a training."""
    folder, n_steps = whole
    steps, calls = counted_steps(monkeypatch), []
    monkeypatch.setattr(engine, "write_summary", lambda study, folder: None)  # is half of the time

    def cut_off_at(place: int, function):
        def counted(*arguments):
            result = function(*arguments)
            calls.append(1)
            if len(calls) == place:
                raise KeyboardInterrupt
            return result

        return counted

    for target, name, place in (
        (Trainer, "end_epoch", 3),  # of the second row: its first epoch is in a checkpoint
        (engine, "add_record", 1),  # of the second row: done, and its folder is still there
        (engine, "run_row", 2),  # of the fourth: trained, and not in the table
    ):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(target, name, cut_off_at(place, getattr(target, name)))
            with pytest.raises(KeyboardInterrupt):
                run_rows(tmp_path, pets, weights, *ROWS)
    table = run_rows(tmp_path, pets, weights, *ROWS)
    undisturbed = read_table(ABLATION, folder / "results" / "ablation")
    pd.testing.assert_frame_equal(numbers(table), numbers(undisturbed))
    assert len(steps) == n_steps
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_row_that_these_data_do_not_allow_is_passed_over_and_named(pets, weights, tmp_path, capsys):
    message = refused(capsys, command(tmp_path, pets, weights, PRETRAINED, "baseline"))
    assert PRETRAINED in message and "head_init = 'pretrained_rows' needs" in message
    assert set(read_table(ABLATION, tmp_path / "results" / "ablation")["row"]) == {"baseline"}
    assert list((tmp_path / "runs").iterdir()) == []


# ------------------------------------------------------------------------- which rows are run, made up


def record(row: str, seed: int, accuracy: float = 0.5, **more: object) -> dict:
    """A line of `ablation.csv` with made-up numbers."""
    frozen = row.startswith("baseline")
    line = {"row": row, "seed": seed, "holdout_loss": 1.0, "holdout_accuracy": accuracy, "holdout_ece": 0.1}
    line |= {"valid_loss": 1.0, "valid_accuracy": accuracy, "valid_ece": 0.1, "seconds": 60.0}
    line |= {"epochs": 9 if frozen else 2, "best_epoch": 1, "trainable_parameters": 10, "parameters": 100}
    line |= {"gflops": 4.5, "after": "", "backbone": "some_net.in1k", "image_size": 64}
    line |= {
        "profile": "offline",
        "data": "made-up",
        "protocol": "holdout",
        "n_fit": 20_000,
        "hardware": "a CPU (2 CPU cores)",
    }
    return line | {"git_commit": "abc", "config": "0123456789ab"} | more


def made_up(rows=tuple(GRID), seeds=(0, 1, 2)) -> pd.DataFrame:
    """`ablation.csv` of the rows, with accuracies that differ."""
    rng = np.random.default_rng(0)
    return pd.DataFrame([record(row, seed, 0.5 + rng.normal(0, 0.02)) for row in rows for seed in seeds])


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, int]]:
    """Rows and seeds that were run; nothing is trained."""
    jobs = []

    def pretend(job, _paths, _timed=False):
        jobs.append((job.row.name, job.seed))
        return record(job.row.name, job.seed, config=job.key, data="pets")

    monkeypatch.setattr(engine, "run_row", pretend)
    monkeypatch.setattr(engine, "write_summary", lambda study, folder: None)
    return jobs


def test_all_rows_are_run_for_a_seed_before_the_next(ran, pets, weights, tmp_path):
    run_rows(tmp_path, pets, weights)
    rows = [row.name for row in ABLATION.rows_of("offline")]
    assert ran == [(name, seed) for seed in (0, 1) for name in rows]
    assert set(GRID) - set(rows) == set(OF_LARGE_MAPS) and len(ABLATION.rows_of("full")) == len(GRID)


def test_a_row_of_another_profile_is_run_where_it_is_asked_for(ran, pets, weights, tmp_path):
    run_rows(tmp_path, pets, weights, OF_LARGE_MAPS[0])
    assert ran == [(OF_LARGE_MAPS[0], 0), (OF_LARGE_MAPS[0], 1)]


def test_what_a_training_left_goes_when_no_row_needs_it(ran, pets, weights, tmp_path, monkeypatch):
    """Checkpoints of all rows at once would fill a disk."""
    pretend, here = engine.run_row, []

    def train(job, where, _timed):
        job.paths(where).runs.mkdir(parents=True, exist_ok=True)
        here.append(len(list((tmp_path / "runs" / "ablation").glob("[!.]*"))))
        return pretend(job, where)

    monkeypatch.setattr(engine, "run_row", train)
    run_rows(tmp_path, pets, weights, "baseline", RECIPE, FINE_TUNING, MIRRORED, TEMPERATURE, "mixup")
    assert here == 2 * [1, 1, 2, 1, 1, 1]  # the recipe's stays until its last row
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_row_that_is_named_twice_is_run_once(ran, pets, weights, tmp_path):
    run_rows(tmp_path, pets, weights, "baseline", "baseline")
    assert ran == [("baseline", 0), ("baseline", 1)]


def test_only_what_is_missing_is_run(ran, pets, weights, tmp_path):
    run_rows(tmp_path, pets, weights, "baseline")
    table = run_rows(tmp_path, pets, weights, "baseline", FINE_TUNING)
    assert ran == [("baseline", 0), ("baseline", 1), (FINE_TUNING, 0), (FINE_TUNING, 1)]
    assert len(table) == 4


def test_another_configuration_is_run_anew_and_takes_the_place_of_the_old(ran, pets, weights, tmp_path):
    rows = ("baseline", FINE_TUNING)
    first = run_rows(tmp_path, pets, weights, *rows)
    second = run_rows(tmp_path, pets, weights, *rows, optim__head_lr=0.5)
    assert len(ran) == 8 and len(second) == 4
    assert not set(first["config"]) & set(second["config"])


def test_rows_of_another_configuration_are_gone_before_the_first_new_one(
    ran, pets, weights, tmp_path, monkeypatch
):
    """So that no summary compares an old row with a new one."""
    rows = ("baseline", FINE_TUNING)
    run_rows(tmp_path, pets, weights, *rows)
    tables = []
    monkeypatch.setattr(engine, "write_summary", lambda *where: tables.append(read_table(*where)))
    run_rows(tmp_path, pets, weights, *rows, optim__head_lr=0.5)
    assert [len(table) for table in tables[:4]] == [1, 2, 3, 4]


def test_rows_that_could_not_be_compared_are_refused(ran, pets, weights, tmp_path):
    """Some rows of another configuration, beside others that stay: nothing runs, nothing is lost."""
    run_rows(tmp_path, pets, weights, "baseline", FINE_TUNING)
    before = (tmp_path / "results" / "ablation" / "ablation.csv").read_bytes()
    with pytest.raises(
        SetupError, match=r"another configuration.*'\+ full fine-tuning', 2 in all.*--results"
    ):
        run_rows(tmp_path, pets, weights, "baseline", optim__head_lr=0.5)
    assert len(ran) == 4 and (tmp_path / "results" / "ablation" / "ablation.csv").read_bytes() == before


@pytest.mark.parametrize(("column", "other"), [("profile", "full"), ("data", "wolves")])
def test_rows_of_another_profile_or_of_other_data_are_never_thrown_away(
    ran, pets, weights, tmp_path, column, other
):
    """Also where all of them are asked for anew."""
    run_rows(tmp_path, pets, weights, "baseline")
    path = tmp_path / "results" / "ablation" / "ablation.csv"
    write_csv(read_table(ABLATION, path.parent).assign(**{column: other}), path, inert=False)
    before = path.read_bytes()
    with pytest.raises(SetupError, match=rf"ablation.csv holds rows of {column} '{other}'.*--results DIR"):
        run_rows(tmp_path, pets, weights, "baseline")
    assert len(ran) == 2 and path.read_bytes() == before


def test_a_table_from_before_profiles_were_recorded_goes_on(ran, pets, weights, tmp_path):
    first = run_rows(tmp_path, pets, weights, "baseline")
    write_csv(first.drop(columns="profile"), tmp_path / "results/ablation/ablation.csv", inert=False)
    assert len(run_rows(tmp_path, pets, weights, "baseline", FINE_TUNING)) == 4 and len(ran) == 4


def test_other_images_are_another_ablation(ran, pets, weights, tmp_path):
    run_rows(tmp_path, pets, weights, "baseline")
    other = write_pets(tmp_path / "pets", first=7)
    run_rows(tmp_path, other, weights, "baseline")
    assert len(ran) == 4
    moved = tmp_path / "elsewhere" / "pets"
    moved.parent.mkdir()
    moved.symlink_to(other)
    run_rows(tmp_path, moved, weights, "baseline")
    assert len(ran) == 4


def test_a_row_that_fails_is_tried_once_and_the_others_are_run(ran, pets, weights, tmp_path, monkeypatch):
    pretend, tried = engine.run_row, []

    def fail(job, where, _timed):
        tried.append(job.row.name)
        if job.row.name == FINE_TUNING:
            raise SetupError("the loss is nan")
        return pretend(job, where)

    monkeypatch.setattr(engine, "run_row", fail)
    with pytest.raises(SetupError, match=r"\+ full fine-tuning: the loss is nan"):
        run_rows(tmp_path, pets, weights, FINE_TUNING, "baseline")
    assert tried.count(FINE_TUNING) == 1 and ran == [("baseline", 0), ("baseline", 1)]


def test_what_no_row_can_help_stops_the_ablation(ran, pets, weights, tmp_path, monkeypatch):
    tried = []

    def fail(job, _paths, _timed):
        tried.append(job.row.name)
        raise SetupError("no space is left")

    monkeypatch.setattr(engine, "run_row", fail)
    with pytest.raises(SetupError, match="^no space is left$"):
        run_rows(tmp_path, pets, weights)
    assert len(tried) == 2


def test_what_is_no_fault_of_a_row_leaves_its_training(ran, pets, weights, tmp_path, monkeypatch):
    """A full disk or another process: nothing is deleted, no other row is tried."""
    tried = []

    def fail(job, where, _timed):
        tried.append(job.row.name)
        (job.paths(where).runs / "half").mkdir(parents=True)
        raise NotNow(f"{job.row.name}: no space is left")

    monkeypatch.setattr(engine, "run_row", fail)
    with pytest.raises(NotNow, match="^baseline as run: no space is left$"):
        run_rows(tmp_path, pets, weights)
    assert len(tried) == 1 and len(list((tmp_path / "runs" / "ablation").glob("*/half"))) == 1


def test_two_processes_do_not_run_one_study(ran, pets, weights, tmp_path):
    """Their lines would be lost, and their training deleted."""
    with alone_in(tmp_path / "runs" / "ablation"), pytest.raises(NotNow, match="another process is at work"):
        run_rows(tmp_path, pets, weights, "baseline")
    assert not ran
    assert len(run_rows(tmp_path, pets, weights, "baseline")) == 2


def test_rows_are_no_snapshots_of_the_arms(pets, weights, tmp_path, capsys):
    """They have the arms' names, and would take the place of theirs."""
    drive = tmp_path / "drive"
    plan = Plan(ABLATION, "offline", str(pets), small(weights))
    run_study(plan, replace(paths(tmp_path), backup=drive), ["baseline"], [0])
    assert not list(drive.rglob("*"))
    message = refused(capsys, [*command(tmp_path, pets, weights, "baseline"), "--backup", str(drive)])
    assert "ablation makes no snapshots" in message


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--rows", "baseline", "+ magic"], "no row is called '+ magic'"),
        (["--data", "nowhere/at/all"], "nowhere/at/all"),
        (["--profile", "fast"], "'fast' is unknown"),
        (["--set", "train.epoch=3"], "'train.epoch' is unknown"),
    ],
)
def test_bad_input_is_refused_before_the_first_row(ran, pets, weights, tmp_path, capsys, extra, said):
    message = refused(capsys, [*command(tmp_path, pets, weights, "baseline"), *extra])
    assert said in message and not ran
    if "magic" in said:
        assert RECIPE in message


def test_keys_that_look_like_numbers_stay_text(tmp_path):
    keys = ["012345678901", "12345e678901"]
    for key in keys:
        write_csv(
            pd.DataFrame([record("baseline", 0, config=key, git_commit=key)]), tmp_path / "ablation.csv"
        )
        assert read_table(ABLATION, tmp_path)[["config", "git_commit"]].iloc[0].tolist() == [key, key]


def test_a_table_that_cannot_be_read_is_one_message(ran, pets, weights, tmp_path):
    path = tmp_path / "results" / "ablation" / "ablation.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(SetupError, match=r"ablation.csv cannot be read.*Move it away"):
        run_rows(tmp_path, pets, weights, "baseline")


# ------------------------------------------------------------------------------------------- statistics


def test_mean_spread_and_paired_interval_over_the_seeds_that_both_rows_have():
    a = {seed: 0.5 + 0.01 * seed**1.5 for seed in (4, 1, 0, 2)}
    b = {seed: 0.55 + 0.013 * seed for seed in (0, 1, 3, 4)}
    lines = [record("baseline", seed, value) for seed, value in a.items()]
    lines += [record(FINE_TUNING, seed, value) for seed, value in b.items()]
    summary = summarise(ABLATION, pd.DataFrame(lines)).set_index("row")
    line = summary.loc[FINE_TUNING]
    both = sorted(a.keys() & b.keys())
    test = ttest_rel([b[seed] for seed in both], [a[seed] for seed in both])
    interval = test.confidence_interval(0.95)
    assert (line["low"], line["high"]) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert line["difference"] == pytest.approx(np.mean([b[s] - a[s] for s in both]), rel=1e-12)
    assert line["seeds"] == 4 and line["against"] == "baseline"
    assert line["valid_mean"] == pytest.approx(np.mean(list(b.values())), rel=1e-12)
    assert line["valid_sd"] == pytest.approx(np.std(list(b.values()), ddof=1), rel=1e-12)
    alone = summary.loc["baseline"]
    assert np.isnan(alone["difference"]) and alone["verdict"] == "" and alone["against"] == ""


def test_a_row_whose_other_row_has_not_run_is_not_compared():
    line = summarise(ABLATION, pd.DataFrame([record(FINE_TUNING, 0)])).iloc[0]
    assert np.isnan(line["difference"]) and line["verdict"] == "" and line["against"] == "baseline"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.02, 0.021, 0.019], "helps"),
        ([-0.02, -0.021, -0.019], "hurts"),
        ([0.02, -0.01, 0.03], "cannot be told apart from noise"),
        ([0.0, 0.0, 0.001], "cannot be told apart from noise"),
        ([0.01, 0.01], "helps"),
        ([0.3], "one seed: not judged"),
        ([0.0], "one seed: not judged"),
        ([0.0, 0.0, 0.0], "changes nothing"),
        ([], ""),
    ],
)
def test_verdicts(differences, verdict):
    assert paired_difference(np.array(differences))["verdict"] == verdict


def test_a_verdict_is_a_test_at_five_percent():
    rng = np.random.default_rng(0)
    for _ in range(200):
        differences = rng.normal(0.01, 0.01, 3)
        p = ttest_rel(differences, np.zeros(3)).pvalue
        verdict = paired_difference(differences)["verdict"]
        assert (verdict in ("helps", "hurts")) == (p < 0.05), differences


# ------------------------------------------------------------------------------------- words and figure


def test_the_words_have_a_line_a_row_with_its_numbers(tmp_path):
    write_words(ABLATION, tmp_path, made_up())
    words = (tmp_path / "summary.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in words.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines] == ["row", "---", *GRID]
    summary = pd.read_csv(tmp_path / "summary.csv").set_index("row")
    for name, valid, _, seeds, *rest in lines[2:]:
        mean, sd = summary.loc[name, ["valid_mean", "valid_sd"]]
        assert valid == f"{100 * mean:.2f} ± {100 * sd:.2f}" and seeds == "3"
        if summary.loc[name, "against"] == summary.loc[name, "against"]:
            against, difference, verdict = rest
            value, low, high = 100 * summary.loc[name, ["difference", "low", "high"]]
            assert difference == f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
            assert against == summary.loc[name, "against"] and verdict == summary.loc[name, "verdict"]


def test_one_seed_has_no_spread_and_no_interval():
    lines = markdown(summarise(ABLATION, made_up(("baseline", FINE_TUNING), seeds=(0,)))).splitlines()
    assert lines[2] == "| baseline | 50.25 | 10.00 | 1 |  |  |  |"
    assert lines[3].endswith("| 1 | baseline | -0.52 | one seed: not judged |")


def test_the_table_from_the_file_is_that_from_the_numbers(tmp_path):
    for seeds in ((0,), (0, 1, 2)):
        table = made_up(seeds=seeds)
        write_words(ABLATION, tmp_path, table)
        assert markdown(read_summary(tmp_path / "summary.csv")) == markdown(summarise(ABLATION, table))
    columns = ("row", "valid", "difference", "verdict")
    header = markdown(summarise(ABLATION, table), columns).splitlines()[0]
    assert header == "| row | valid | difference | verdict |"


def test_what_all_rows_share_is_said_once():
    table = made_up(("baseline as run", "baseline", FINE_TUNING, "trained: head alone"))
    table.loc[table["row"] == "baseline as run", "backbone"] = "another_net.in12k"
    table.loc[table["row"] == "trained: head alone", "epochs"] = 5  # frozen, like the baselines
    assert about(ABLATION, table) == (
        "another_net.in12k, some_net.in1k · 64 px · 20,000 images to train on · epochs: 2 where the backbone "
        "is trained · seeds: 0, 1, 2 · data: made-up · protocol: holdout · a CPU (2 CPU cores)"
    )
    assert "epochs" not in about(ABLATION, made_up(("baseline",)))


def test_an_empty_table_has_no_summary(tmp_path):
    write_summary(ABLATION, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_figure_names_every_row_and_covers_none(seeds):
    table = made_up(seeds=seeds)
    table.loc[table["row"] == "mixup", "valid_accuracy"] -= 0.2  # one row far from the others
    summary = summarise(ABLATION, table)
    figure = study_figure(ABLATION.title, summary, about(ABLATION, table) + 6 * " · more of it")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(GRID)
    assert_legible(figure, "ablation")
    assert "some_net.in1k" in said(figure)


def test_the_figure_of_a_few_rows():
    for rows in (("baseline",), ("baseline", FINE_TUNING)):
        table = made_up(rows)
        summary, note = summarise(ABLATION, table), about(ABLATION, table)
        assert_legible(study_figure(ABLATION.title, summary, note), str(rows))


def test_the_figure_shows_the_summary_s_numbers():
    table = made_up()
    table.loc[table["row"] == "mixup", "valid_accuracy"] -= 0.3
    uneven = (table["row"] == "CutMix") & (table["seed"] == 0)
    table.loc[uneven, "valid_accuracy"] += 0.05  # a wide interval around a mean within the axis
    summary = summarise(ABLATION, table)
    accuracy, difference = study_figure(ABLATION.title, summary, "note").axes[:2]
    points = accuracy.lines[0].get_xydata()
    np.testing.assert_allclose(points[:, 0], summary["valid_mean"])
    np.testing.assert_allclose(points[:, 1], range(len(summary)))
    drawn, intervals, arrows = {}, {}, {}
    for line in difference.lines:
        if line.get_marker() == "o":
            drawn[round(line.get_ydata()[0])] = line.get_xdata()[0]
        elif line.get_marker() in "<>":
            arrows.setdefault(round(line.get_ydata()[0]), []).append((line.get_marker(), line.get_xdata()[0]))
        elif line.get_marker() == "|":
            intervals[round(line.get_ydata()[0])] = tuple(line.get_xdata())
    numbers = {round(text.xy[1]): text.get_text() for text in difference.texts}
    compared = np.flatnonzero(summary["difference"].notna())
    assert intervals.keys() == numbers.keys() == set(compared)
    left, right = difference.get_xlim()
    n_cut = 0
    for place, line in summary.iloc[compared].iterrows():
        value, low, high = 100 * line[["difference", "low", "high"]]
        assert intervals[place] == pytest.approx((low, high))
        assert numbers[place] == f"{value:+.2f}".replace("-", "−")
        beyond = {"<"} if low < left else set()
        beyond |= {">"} if high > right else set()
        found = arrows.get(place, [])
        assert {marker for marker, _ in found} == beyond and len(found) == len(beyond)
        assert all(0.9 * right < abs(x) < right and (x > 0) == (marker == ">") for marker, x in found)
        if line["row"] == "mixup":  # beyond the axis itself
            assert value < left == -right and place not in drawn
        else:
            assert drawn[place] == pytest.approx(value)
            n_cut += bool(beyond)
    assert n_cut  # an interval that ends beyond the axis, around a difference within it
    assert "arrow: beyond the axis" in difference.get_xlabel()


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_figure_names_unjudged_rows_where_there_are_any(seeds):
    summary = summarise(ABLATION, made_up(seeds=seeds))
    label = study_figure(ABLATION.title, summary, "note").axes[1].get_xlabel()
    assert ("one seed, not judged" in label) == (len(seeds) == 1)


def test_the_figure_divides_the_ladder_from_what_is_above_and_below_it():
    summary = summarise(ABLATION, made_up())
    accuracy = study_figure(ABLATION.title, summary, "note").axes[0]
    lines = [line.get_ydata()[0] + 0.5 for line in accuracy.lines if line.get_linestyle() == ":"]
    assert [summary["row"][int(place)] for place in lines] == ["baseline", "recipe, without attention"]


def test_the_data_folder_and_the_variable_reach_every_row(monkeypatch, tmp_path):
    monkeypatch.setenv("TINY_IMAGENET_DIR", str(tmp_path))
    assert configured(RECIPE, "full").data == configure("improvement", "full").data
    assert configured(RECIPE, "full").data.path == str(tmp_path)
