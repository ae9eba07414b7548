"""kill -9 at any moment: in training, in a checkpoint's write, in the store's build, in the report."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from torture.attempts import FULL
from torture.warm import Warm, command, outputs

SETTINGS = {
    "baseline": {},
    "baseline in images": {"train.cache_features": False, "train.batch_size": 7},
    "improvement": {},
    "improvement in parts": {"train.micro_batch": 3, "train.batch_size": 8},
    "average and soup": {"train.ema_decay": 0.9, "after.soup_epochs": 2, "after.wise_ft": True},
    "linear probe first": {"model.head_init": "probe", "train.epochs": 1},
}


# What appears on the disk as a run goes on: a store that is being built, a checkpoint, weights, results.
STORE, HALF = "cache/stores/*.partial", "runs/*/checkpoint-*2.json"
RESULTS = "results/*/*"
TRACES = (STORE, f"{STORE}/rows.npz", HALF, "runs/*/model.safetensors", RESULTS, f"{RESULTS}.csv")
IN_SHORT = {"baseline in images": (0, [HALF]), "average and soup": (1, [RESULTS])}  # at random, by a trace


def plans(setting: str) -> Iterator[list[dict]]:
    """Where in each attempt the kills come: after a share of the uninterrupted run's time, or `when`."""
    rng = random.Random(setting)
    n_random, traces = (34, TRACES) if FULL else IN_SHORT[setting]
    for _ in range(n_random):
        yield [{"share": round(rng.uniform(0, 1), 4)} for _ in range(rng.choice((1, 1, 2, 3)))]
    for trace in traces:
        yield [{"when": trace}]


def cut_off(warm: Warm, arguments: list[str], folder: Path, plan: list[dict], seconds: float) -> None:
    """Start the command and kill it, as `plan` says. A run that was done before is begun anew, and killed
    earlier: there is no attempt without a kill. One that a trace on the disk triggers must leave the trace.
    """
    for earlier in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        statuses = []
        for kill in plan:
            if "when" in kill:
                ended = warm.run(arguments, kill=0, after=0, when=str(folder / kill["when"]))
            else:
                ended = warm.run(arguments, kill=0, after=kill["share"] * seconds / 2**earlier)
            statuses += ended.statuses
        assert set(statuses) <= {-9, 0}, ended.said
        if -9 in statuses and all(any(folder.glob(kill["when"])) for kill in plan if "when" in kill):
            return
        assert earlier < 20, f"it ended before each kill, or had gone on: {statuses}"


@pytest.mark.parametrize("setting", SETTINGS if FULL else IN_SHORT)
def test_killed_until_done(setting, warm, inputs, tmp_path, tally):
    """SIGKILL at a random moment, up to three times, or while files are written; then the command again."""
    attempts = tally("kill")
    arm = setting.split()[0] if setting.startswith(("baseline", "improvement")) else "improvement"
    whole = warm.run(command(tmp_path / "whole", arm, inputs, **SETTINGS[setting]))
    assert whole.statuses == [0], whole.said
    expected = outputs(tmp_path / "whole", arm)
    for number, plan in enumerate(plans(setting)):
        with attempts.attempt(f"{setting}, killed at {plan}, {whole.seconds:.3f} s in all"):
            folder = tmp_path / f"cut{number}"
            arguments = command(folder, arm, inputs, **SETTINGS[setting])
            cut_off(warm, arguments, folder, plan, whole.seconds)
            last = warm.run(arguments)
            assert last.statuses == [0], last.said
            assert outputs(folder, arm) == expected
