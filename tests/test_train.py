"""The loop: sums over rows, accumulation, early stopping, and a resume that nothing shows."""

from __future__ import annotations

import copy
import math
import traceback

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from src import SetupError, checkpoint, train
from src.config import AugmentConfig, with_fields
from src.data.batches import Batches
from src.train import Trainer, best_epoch, fit

PLAIN = {"augment__flip": 0.0, "augment__randaugment_ops": 0, "augment__erasing": 0.0, "model__dropout": 0.0}


class Killed(BaseException):
    """Not an Exception: nothing in between may swallow it."""


def trainer(tmp_path, config, micro_batch: int = 64, head: str = "attention", **fields) -> Trainer:
    built = tiny.build(tmp_path, head=head, dropout=config.model.dropout, **fields)
    folder = tmp_path / f"run{micro_batch}"
    folder.mkdir(exist_ok=True)
    return Trainer(built.model, tiny.fit_data(built, config), config, tiny.device(micro_batch), folder)


def run(tmp_path, config, name: str = "run", **fields):
    """A fit from scratch or from what the folder holds -> (model, progress)."""
    fields = {"head": config.model.head, "trainable": config.model.trainable, **fields}
    built = tiny.build(tmp_path, dropout=config.model.dropout, **fields)
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    progress, _ = fit(built.model, tiny.fit_data(built, config), config, tiny.device(5), folder)
    return built.model, progress


def same_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 8, 64])
def test_accumulated_gradients_are_the_full_batch_s(tmp_path, micro_batch):
    """Eight images in parts of 3, 3 and 2: the parts are weighted by their sizes."""
    config = tiny.config(**PLAIN, optim__clip_norm=0.0)
    subject = trainer(tmp_path, config, micro_batch)
    torch.nn.init.constant_(subject.model.attention.layers[0].gate, 0.1)
    reference = copy.deepcopy(subject.model).train()
    inputs, labels_B = next(subject.data.fit.epoch(0, 0))
    subject.optimizer.step = lambda: None
    subject.optimizer.zero_grad = lambda **_: None
    loss_sum, n_correct = subject.train_step(inputs, labels_B).tolist()

    logits_BK = reference(inputs)
    loss = F.cross_entropy(logits_BK, labels_B, label_smoothing=0.1)
    loss.backward()
    assert loss_sum == pytest.approx(loss.item() * len(labels_B), rel=1e-5)
    assert n_correct == (logits_BK.argmax(1) == labels_B).sum().item()
    for (name, ours), theirs in zip(subject.model.named_parameters(), reference.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4 * scale + 1e-8, rtol=1e-3, msg=name)


def test_a_step_is_adamw_on_the_clipped_gradient_at_the_scheduled_rate(tmp_path):
    config = tiny.config(**PLAIN, optim__clip_norm=0.5, optim__warmup_fraction=0.5)
    subject = trainer(tmp_path, config)
    reference = copy.deepcopy(subject.model).train()
    inputs, labels_B = next(subject.data.fit.epoch(0, 0))
    subject.train_step(inputs, labels_B)

    F.cross_entropy(reference(inputs), labels_B, label_smoothing=0.1).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters()))
    assert norm > 0.5
    n_steps = config.train.epochs * len(subject.data.fit)
    factor = 1 / round(0.5 * n_steps)
    for (name, ours), p in zip(subject.model.named_parameters(), reference.parameters(), strict=True):
        gradient = p.grad * (0.5 / norm)
        lr = factor * (config.optim.lr if name.startswith("backbone.") else config.optim.head_lr)
        decay = config.optim.weight_decay if p.ndim > 1 else 0.0
        expected = p.detach() * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
        clear = gradient.abs() > 1e-6  # below, Adam's first step is the sign of rounding noise
        torch.testing.assert_close(ours.detach()[clear], expected[clear], atol=lr * 0.02, rtol=0, msg=name)
    assert all(p.grad is None for p in subject.model.parameters())


# ------------------------------------------------------------------------ speed and memory, nothing else


def gradients_of_a_step(tmp_path, config, micro_batch: int):
    """(sums, gradients by name, passes through the first block) of one step, with dropout in every block."""
    subject = trainer(tmp_path, config, micro_batch)
    torch.nn.init.constant_(subject.model.attention.layers[0].gate, 0.1)
    blocks = [block for stage in subject.model.backbone.stages for block in stage.blocks]
    for block in blocks:
        block.drop_path = torch.nn.Dropout(0.3)
    subject.model.train()
    subject.optimizer.step = lambda: None
    subject.optimizer.zero_grad = lambda **_: None
    passes = []
    blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    sums = subject.train_step(*next(subject.data.fit.epoch(0, 0)))
    return sums, {name: p.grad for name, p in subject.model.named_parameters()}, len(passes)


@pytest.mark.parametrize("micro_batch", [3, 64])
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, micro_batch):
    """The blocks that are computed twice drop the same values both times."""
    steps = []
    for checkpointing in (False, True):
        config = tiny.config(optim__clip_norm=0.0, train__grad_checkpointing=checkpointing)
        steps.append(gradients_of_a_step(tmp_path, config, micro_batch))
    (sums, gradients, passes), (sums_again, gradients_again, passes_again) = steps
    assert passes_again == 2 * passes > 0
    torch.testing.assert_close(sums_again, sums, rtol=1e-6, atol=0)
    assert gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_gradient_checkpointing_refuses_batch_normalisation(tmp_path):
    config = tiny.config(train__grad_checkpointing=True)
    with pytest.raises(SetupError, match="grad_checkpointing = True .* batch normalisation"):
        trainer(tmp_path, config, backbone=tiny.EFFICIENTNET)
    trainer(tmp_path, tiny.config(), backbone=tiny.EFFICIENTNET)


@pytest.mark.slow
def test_compiled_steps_are_the_same(tmp_path):
    """Two epochs in parts of unequal size, the scores on `holdout` between them."""
    histories, states, calls = [], [], []
    compile_ = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: calls.append(function) or compile_(function))
        for compiled in (False, True):
            config = tiny.config(**PLAIN, train__compile=compiled, optim__lr=1e-4)
            model, progress = run(tmp_path, config, f"compiled{compiled}")
            histories.append(progress.history)
            states.append(model.state_dict())
    assert len(calls) == 1 and len(histories[0]) == 2
    for ours, theirs in zip(*histories, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="calls are queued where there is no GPU alone")
def test_steps_file_nothing_away(tmp_path, monkeypatch):
    """Without a GPU, torch writes down where each call came from that waits for one."""
    subject = trainer(tmp_path, tiny.config())
    steps = list(subject.data.fit.epoch(0, 0))
    before, stacks, format_stack = len(torch.cuda._queued_calls), [], traceback.format_stack
    monkeypatch.setattr(traceback, "format_stack", lambda *a: stacks.append(1) or format_stack(*a))
    for inputs, labels_B in steps:
        subject.train_step(inputs, labels_B)
    assert len(steps) == 3 and len(torch.cuda._queued_calls) == before and not stacks
    torch.manual_seed(0)
    assert stacks  # so that the test can fail


def test_dropout_is_seeded_as_torch_would():
    def mask():
        return F.dropout(torch.ones(1000), 0.5)

    masks = []
    for seed in (3, 2**63 - 1, 0):
        torch.manual_seed(seed)
        expected = mask()
        mask()
        train.seed_dropout(seed)
        assert torch.equal(mask(), expected) and not torch.equal(mask(), expected)
        masks.append(expected)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


# -------------------------------------------------------------------------------------------- history


def test_history_is_sums_over_rows(tmp_path):
    """With a rate of zero the network stays as it is, so every number can be computed row by row."""
    config = tiny.config(**PLAIN, optim__lr=0.0, optim__head_lr=0.0, train__batch_size=10)
    model, progress = run(tmp_path, config)
    data = tiny.fit_data(tiny.build(tmp_path), config)
    assert {len(y) for _, y in data.fit.epoch(0, 0)} == {7, 8}

    def rows(batches):
        with torch.no_grad():
            inputs = batches.preprocess(torch.from_numpy(batches.rows[batches.index_M]))
            logits_NK = model(inputs).double().numpy()
        logp_NK = logits_NK - np.log(np.exp(logits_NK).sum(1, keepdims=True))
        labels_N = batches.labels_N[batches.index_M]
        nll_N = -logp_NK[np.arange(len(labels_N)), labels_N]
        return nll_N, -logp_NK.mean(1), logits_NK.argmax(1) == labels_N

    fit_nll, fit_uniform, fit_correct = rows(data.fit)
    nll, _, correct = rows(data.holdout)
    assert [row["epoch"] for row in progress.history] == [1, 2] and len(progress.seconds) == 2
    for row in progress.history:
        assert row["fit_loss"] == pytest.approx((0.9 * fit_nll + 0.1 * fit_uniform).mean(), rel=1e-5)
        assert row["fit_accuracy"] == pytest.approx(fit_correct.mean())
        assert row["holdout_loss"] == pytest.approx(nll.mean(), rel=1e-5)
        assert row["holdout_accuracy"] == pytest.approx(correct.mean())


def test_training_learns_with_the_whole_recipe(tmp_path):
    config = tiny.config(train__epochs=8, optim__head_lr=1e-2, optim__lr=1e-3, augment__randaugment_ops=1)
    _, progress = run(tmp_path, config)
    first, last = progress.history[0], progress.history[-1]
    assert last["fit_loss"] < 0.8 * first["fit_loss"]
    assert max(row["holdout_accuracy"] for row in progress.history) > 0.5


def test_frozen_backbone_keeps_parameters_and_buffers(tmp_path):
    fields = {"backbone": tiny.EFFICIENTNET, "head": "attention"}
    before = tiny.build(tmp_path, trainable="none", **fields).model.state_dict()
    changed = {}
    for trainable in ("none", "all"):
        model, _ = run(tmp_path, tiny.config(train__epochs=1), trainable, trainable=trainable, **fields)
        after = model.state_dict()
        changed[trainable] = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed["none"] == {name for name in before if not name.startswith("backbone.")}
    # so that the test can fail
    assert {"backbone.bn1.running_mean", "backbone.conv_stem.weight"} <= changed["all"]
    saved = checkpoint.load_newest(tmp_path / "none")
    assert not [name for part in ("model", "best") for name in saved[part] if name.startswith("backbone.")]


def test_only_the_config_s_seed_matters(tmp_path):
    config = tiny.config(train__epochs=1)
    states = []
    for number, seed in enumerate([0, 0, 1]):
        torch.manual_seed(number)
        model, _ = run(tmp_path, with_fields(config, {"train.seed": seed}), f"run{number}")
        states.append(model.state_dict())
    assert same_state(states[0], states[1]) and not same_state(states[0], states[2])


# ------------------------------------------------------------------------------------- early stopping


def scripted(monkeypatch, scores: list[tuple[float, float]]) -> list[dict]:
    """Replace the scores of `holdout`; collects the state that each of them stands for."""
    states, remaining = [], iter(scores)

    def score(self):
        states.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return next(remaining)

    monkeypatch.setattr(Trainer, "score_holdout", score)
    return states


@pytest.mark.parametrize(
    ("monitor", "scores", "best", "epochs"),
    [
        ("loss", [(3, 0), (2, 0), (2.5, 1), (2.1, 1), (1, 1)], 2, 4),  # patience of 2 ends before the best
        ("loss", [(3, 0), (4, 0), (2, 0), (3, 0), (1, 0)], 5, 5),  # an improvement starts the count anew
        ("accuracy", [(1, 0.1), (2, 0.5), (0, 0.4), (0, 0.3), (0, 1)], 2, 4),
        ("loss", [(2, 0), (2, 0), (2, 0), (1, 0), (1, 0)], 1, 3),  # an equal score is no improvement
        ("accuracy", [(2, 0.5), (1, 0.5), (0, 0.6), (0, 0.6), (0, 0.6)], 3, 5),
    ],
)
def test_early_stopping(tmp_path, monkeypatch, monitor, scores, best, epochs):
    states = scripted(monkeypatch, scores)
    config = tiny.config(train__epochs=5, train__patience=2, train__monitor=monitor, train__batch_size=12)
    model, progress = run(tmp_path, config)
    assert (progress.best_epoch, len(progress.history), len(states)) == (best, epochs, epochs)
    assert same_state(model.state_dict(), states[best - 1])
    assert not model.training
    if best < epochs:
        assert not same_state(states[best - 1], states[-1])


def test_best_epoch_is_the_first_of_equals():
    history = [
        {"epoch": epoch, "holdout_loss": loss, "holdout_accuracy": accuracy}
        for epoch, loss, accuracy in [(1, 2.0, 0.3), (2, 1.0, 0.5), (3, 1.0, 0.9), (4, 1.5, 0.9)]
    ]
    assert (best_epoch(history, "loss"), best_epoch(history, "accuracy")) == (2, 3)


def test_a_stopped_run_does_not_train_again(tmp_path, monkeypatch):
    config = tiny.config(train__epochs=1)
    model, progress = run(tmp_path, config)
    monkeypatch.setattr(Trainer, "train_step", None)
    again, progress_again = run(tmp_path, config)
    assert progress_again.history == progress.history and same_state(model.state_dict(), again.state_dict())


def test_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    config = tiny.config(train__epochs=3)
    subject = trainer(tmp_path, config)
    torch.nn.init.constant_(subject.model.classifier.bias, math.nan)
    monkeypatch.setattr(Trainer, "score_holdout", None)  # never reached
    with pytest.raises(SetupError, match="loss is nan at epoch 1.*lower `optim.lr`"):
        fit(subject.model, subject.data, config, subject.device, subject.folder)
    assert not list(subject.folder.iterdir())


# --------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs that nothing stopped, by backbone."""
    made = {}

    def get(backbone: str):
        if backbone not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[backbone] = run(folder, RECIPE, backbone=backbone)
        return made[backbone]

    return get


RECIPE = tiny.config(
    train__epochs=3, train__checkpoint_minutes=0.0, train__patience=2, optim__head_lr=1e-2, optim__lr=1e-3
)


def kill_after(monkeypatch, method: str, calls: int) -> None:
    """Raise out of the run once `method` of the trainer has returned for the `calls`-th time."""
    original, counted = getattr(Trainer, method), []

    def wrapped(self, *arguments):
        result = original(self, *arguments)
        counted.append(1)
        if len(counted) == calls:
            raise Killed
        return result

    monkeypatch.setattr(Trainer, method, wrapped)


@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
@pytest.mark.parametrize(
    ("method", "calls"),
    [("end_epoch", 1), ("end_epoch", 2), ("end_epoch", 3), ("save", 1), ("save", 3), ("train_step", 5)],
)
def test_a_run_cut_off_anywhere_ends_as_one_that_was_not(
    tmp_path, monkeypatch, uninterrupted, backbone, method, calls
):
    """Three steps an epoch, a checkpoint after every one: `save` 1 and 3 and step 5 lie within epochs."""
    monkeypatch.setattr(train, "STEPS_BETWEEN_READS", 1)
    with monkeypatch.context() as patch:
        kill_after(patch, method, calls)
        with pytest.raises(Killed):
            run(tmp_path, RECIPE, backbone=backbone)
    model, progress = run(tmp_path, RECIPE, backbone=backbone)
    expected_model, expected = uninterrupted(backbone)
    assert progress.history == expected.history and progress.best_epoch == expected.best_epoch
    assert same_state(model.state_dict(), expected_model.state_dict())


def test_a_damaged_checkpoint_costs_time_only(tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        kill_after(patch, "end_epoch", 2)
        with pytest.raises(Killed):
            run(tmp_path, RECIPE)
    newest = max((tmp_path / "run").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    model, progress = run(tmp_path, RECIPE, backbone=tiny.CONVNEXT)
    expected_model, expected = uninterrupted(tiny.CONVNEXT)
    assert progress.history == expected.history
    assert same_state(model.state_dict(), expected_model.state_dict())


def test_checkpoint_interval(tmp_path, monkeypatch):
    """No checkpoint within an epoch before the interval is over; one a step where the interval is zero."""
    monkeypatch.setattr(train, "STEPS_BETWEEN_READS", 1)
    saved = {}
    for minutes in (0.0, 60.0):
        steps = []
        monkeypatch.setattr(checkpoint, "save", lambda _, step, __, steps=steps: steps.append(step))
        run(tmp_path, tiny.config(train__epochs=1, train__checkpoint_minutes=minutes))
        saved[minutes] = steps
    assert saved == {0.0: [1, 2, 3, 3], 60.0: [3]}


def test_cached_features_train_the_same_head(tmp_path, monkeypatch):
    """`Batches` of features instead of images, the backbone never run again."""
    config = tiny.config(**PLAIN, model__trainable="none", model__head="plain")
    assert config.augment == AugmentConfig()
    model, progress = run(tmp_path, config)
    built = tiny.build(tmp_path, head="plain", trainable="none")
    images = tiny.fit_data(built, config)
    with torch.no_grad():
        features = built.model.features(built.preprocess(torch.from_numpy(images.fit.rows))).numpy()
    parts = [
        Batches(features, part.labels_N, part.index_M, part.batch_size, part.device)
        for part in (images.fit, images.holdout)
    ]
    monkeypatch.setattr(built.model, "features", None)
    (tmp_path / "cached").mkdir()
    data = train.FitData(*parts, cached=True)
    cached, _ = fit(built.model, data, config, tiny.device(), tmp_path / "cached")
    for ours, theirs in zip(cached.history, progress.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(built.model.classifier.weight, model.classifier.weight, atol=1e-5, rtol=1e-3)
