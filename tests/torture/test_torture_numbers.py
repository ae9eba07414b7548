"""NaN and infinity in loss and gradient; memory that runs out."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from torture.attempts import tries

from src import SetupError, checkpoint, train
from src.experiment import Paths, configure, run
from src.predict import one_pass
from src.train import Trainer, fit

STEPS = 6  # of two epochs of three


def ready(folder, micro_batch: int = 64, **changes) -> Trainer:
    """A trainer with whatever uses the gradient: clipping or not, an average, a penalty."""
    config = tiny.config(train__batch_size=8, train__checkpoint_minutes=0.0, **changes)
    backbone, dropout = config.model.backbone, config.model.dropout
    built = tiny.build(folder, backbone=backbone, head="attention", dropout=dropout)
    run_folder = folder / "run"
    run_folder.mkdir(exist_ok=True)
    return Trainer(built.model, tiny.fit_data(built, config), config, tiny.device(micro_batch), run_folder)


def state_of(trainer: Trainer) -> tuple[dict, dict]:
    return copy.deepcopy((dict(trainer.model.named_parameters()), trainer.optimizer.state_dict()["state"]))


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def zeros_like(state: dict) -> dict:
    return {n: {key: torch.zeros_like(value) for key, value in each.items()} for n, each in state.items()}


def break_at(trainer: Trainer, step: int, what: str, value: float, monkeypatch) -> dict:
    """Make the loss, or one parameter's gradient alone, `value` at the step (from 0); notes what it met."""
    met, add_gradients = {}, Trainer.add_gradients

    def broken(self, inputs, labels_B, micro_batch):
        sums = add_gradients(self, inputs, labels_B, micro_batch)
        if self.progress.epoch * 3 + self.progress.step == step:
            met["before"] = state_of(self)
            if what == "loss":
                sums[0] = value
            else:
                gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                random.Random(step).choice(gradients).view(-1)[0] = value
        return sums

    def train_step(self, *arguments):
        row = step_of(self, *arguments)
        if "before" in met and "after" not in met:
            met["after"] = state_of(self)
        return row

    step_of = Trainer.train_step
    monkeypatch.setattr(Trainer, "add_gradients", broken)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    return met


SETTINGS = {
    "clipped": {},
    "not clipped": {"optim__clip_norm": 0.0, "optim__l2_sp": 0.1},
    "batch normalisation, averaged": {"model__backbone": tiny.EFFICIENTNET, "train__ema_decay": 0.9},
    "adam": {"optim__optimizer": "adam", "train__micro_batch": 3},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_not_finite_changes_nothing(setting, tmp_path, monkeypatch, tally):
    """At every step, NaN or infinity: the step is named, and weights and moments are as before it."""
    attempts = tally("not_finite")
    monkeypatch.setattr(train, "STEPS_BETWEEN_READS", 2)
    cases = [
        (step, what, value)
        for step in range(STEPS)
        for what in ("loss", "gradient")
        for value in (math.nan, math.inf, -math.inf)
    ]
    for number, (step, what, value) in enumerate(random.Random(0).sample(cases, tries(len(cases), 2))):
        with attempts.attempt(f"{setting}: {what} {value} at step {step}"), monkeypatch.context() as patches:
            folder = tmp_path / str(number)
            folder.mkdir()
            trainer = ready(folder, **SETTINGS[setting])
            met = break_at(trainer, step, what, value, patches)
            place = f"the {what} is (nan|-?inf) at epoch {step // 3 + 1}, step {step % 3 + 1}: the run stops"
            with pytest.raises(SetupError, match=place):
                fit(trainer.model, trainer.data, trainer.config, trainer.device, trainer.folder)
            assert same(*(met[moment][0] for moment in ("before", "after"))), "weights"
            moments = {moment: met[moment][1] for moment in ("before", "after")}
            if not moments["before"]:  # nothing yet: it is made, all zeros
                moments["before"] = zeros_like(moments["after"])
            assert same(moments["before"], moments["after"]), "the optimizer's state"
            kept = checkpoint.load_newest(trainer.folder)
            assert kept is None or all(
                value.isfinite().all() for value in kept["model"].values() if value.is_floating_point()
            )


def runs_out(limit: int, seen: list[int]):
    """A forward pass in which more than `limit` images do not fit."""

    def wrap(forward):
        def limited(inputs):
            if len(inputs) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            seen.append(len(inputs))
            return forward(inputs)

        return limited

    return wrap


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7])
def test_memory_that_runs_out_changes_no_gradient(limit, tmp_path, tally):
    """Whatever fits: the loss, the gradient and the weights after it are those of the whole batch."""
    attempts = tally("out_of_memory")
    for number in range(tries(4, 1)):
        mixed = {"augment__mixup": 0.5} if number % 2 else {}
        clip = 0.0 if number > 1 else 1.0
        with attempts.attempt(f"{limit} fit, {mixed}, clip {clip}"):
            rows, states = [], []
            for name, wrap in (("whole", lambda f: f), ("limited", runs_out(limit, seen := []))):
                folder = tmp_path / f"{name}{number}"
                folder.mkdir()
                trainer = ready(folder, optim__clip_norm=clip, model__dropout=0.0, **mixed)
                trainer.model.train()
                trainer.forward = wrap(trainer.forward)
                rows.append(trainer.train_step(*next(trainer.data.fit.epoch(0, 0))))
                states.append({k: v.detach().clone() for k, v in trainer.model.state_dict().items()})
            assert max(seen) <= limit and sum(seen) >= 8
            assert trainer.progress.micro_batch == trainer.micro_batch <= limit
            torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(*states, rtol=1e-4, atol=2e-5)


def test_an_attempt_that_fails_half_way_leaves_no_gradient(tmp_path):
    """Memory runs out at the second of two parts, when the first has its gradient."""
    rows = []
    for fails in (False, True):
        folder = tmp_path / str(fails)
        folder.mkdir()
        trainer = ready(folder, 4, optim__clip_norm=0.0, model__dropout=0.0)
        trainer.model.train()
        forward, seen = trainer.forward, []

        def second_fails(inputs, forward=forward, seen=seen, fails=fails):
            seen.append(len(inputs))
            if fails and len(seen) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(inputs)

        trainer.forward = second_fails
        rows.append(trainer.train_step(*next(trainer.data.fit.epoch(0, 0))))
    assert seen == [4, 4, 2, 2, 2, 2]
    torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-5)  # the gradient's norm among them


def test_what_was_halved_stays_so_after_a_resume(tmp_path):
    trainer = ready(tmp_path, train__epochs=1)
    trainer.forward = runs_out(2, [])(trainer.forward)
    trainer.train_epoch()
    trainer.save()
    again = ready(tmp_path, train__epochs=1)
    assert (trainer.micro_batch, again.micro_batch, again.progress.micro_batch) == (2, 2, 2)


def test_prediction_goes_on_in_parts(tmp_path, capsys):
    built = tiny.build(tmp_path)
    batches = replace(tiny.fit_data(built, tiny.config()).holdout, batch_size=11)
    built.model.eval()
    whole_NK = one_pass(built.model, batches, tiny.device(), "whole")
    seen: list[int] = []
    parts_NK = one_pass(runs_out(3, seen)(built.model), batches, tiny.device(), "in parts")
    np.testing.assert_allclose(parts_NK, whole_NK, rtol=1e-4, atol=1e-5)
    assert max(seen) == 2 and "out of memory: 2 images pass at once" in capsys.readouterr().out


def test_one_image_too_many(tmp_path):
    trainer = ready(tmp_path)
    trainer.forward = runs_out(0, [])(trainer.forward)
    with pytest.raises(SetupError, match="one image alone does not fit.*model.image_size"):
        trainer.train_step(*next(trainer.data.fit.epoch(0, 0)))


def test_other_errors_are_not_taken_for_memory(tmp_path):
    trainer = ready(tmp_path)

    def broken(inputs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trainer.forward = broken
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.train_step(*next(trainer.data.fit.epoch(0, 0)))


def test_it_is_recorded(pets, weights, tmp_path, monkeypatch):
    """metrics.json says how many images passed at once, and that the batch was what it should be."""
    build = Trainer.__init__

    def limited(self, *arguments):
        build(self, *arguments)
        self.forward = runs_out(2, [])(self.forward)

    monkeypatch.setattr(Trainer, "__init__", limited)
    overrides = {
        "model.backbone": tiny.CONVNEXT,
        "model.weights": str(weights),
        "model.image_size": tiny.SIZE,
        "data.holdout_per_class": 3,
        "train.epochs": 1,
        "train.batch_size": 6,
    }
    config = configure("improvement", "offline", str(pets), overrides)
    result = run(config, Paths(*(tmp_path / name for name in ("results", "runs", "cache"))))
    assert (result.metrics["micro_batch"], result.metrics["batch_size"]) == (1, 6)
