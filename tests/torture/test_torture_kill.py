"""kill -9 at any moment: in training, in a checkpoint's write, in the store's build, in the report."""

from __future__ import annotations

import random

import pytest
from torture.attempts import FULL, tries
from torture.warm import command, outputs

SETTINGS = {
    "baseline": {},
    "baseline in images": {"train.cache_features": False, "train.batch_size": 7},
    "improvement": {},
    "improvement in parts": {"train.micro_batch": 3, "train.batch_size": 8},
    "average and soup": {"train.ema_decay": 0.9, "after.soup_epochs": 2, "after.wise_ft": True},
    "linear probe first": {"model.head_init": "probe", "train.epochs": 1},
}


@pytest.mark.parametrize("setting", SETTINGS if FULL else ["baseline in images", "average and soup"])
def test_killed_until_done(setting, warm, inputs, tmp_path, tally):
    """SIGKILL at a random moment, up to three times, then the same command to its end."""
    attempts = tally("kill")
    arm = setting.split()[0] if setting.startswith(("baseline", "improvement")) else "improvement"
    whole = warm.run(command(tmp_path / "whole", arm, inputs, **SETTINGS[setting]))
    assert whole.statuses == [0], whole.said
    expected = outputs(tmp_path / "whole", arm)
    rng = random.Random(setting)
    for number in range(tries(34, 1)):
        moments = [round(rng.uniform(0, whole.seconds), 3) for _ in range(rng.choice((1, 1, 2, 3)))]
        with attempts.attempt(f"{setting}, killed after {moments} s"):
            arguments = command(tmp_path / f"cut{number}", arm, inputs, **SETTINGS[setting])
            for moment in moments:
                assert warm.run(arguments, kill=0, after=moment).statuses[0] in (-9, 0)
            last = warm.run(arguments)
            assert last.statuses == [0], last.said
            assert outputs(tmp_path / f"cut{number}", arm) == expected
