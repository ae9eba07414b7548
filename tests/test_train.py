"""The loop: sums over rows, accumulation, early stopping, and a resume that nothing shows."""

from __future__ import annotations

import copy
import math
import traceback
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from src import SetupError, checkpoint, train
from src.average import copied
from src.config import AugmentConfig, with_fields
from src.data.batches import Batches
from src.optim import lr_at
from src.predict import loss_and_accuracy
from src.train import FitData, Trainer, best_epoch, fit

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
    return run_with_soup(tmp_path, config, name, **fields)[:2]


def run_with_soup(tmp_path, config, name: str = "run", **fields):
    """`run` -> (model, progress, soup)."""
    same = ("head", "trainable", "dropout", "drop_path")
    fields = {**{field: getattr(config.model, field) for field in same}, **fields}
    built = tiny.build(tmp_path, **fields)
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    progress, soup = fit(built.model, tiny.fit_data(built, config), config, tiny.device(5), folder)
    return built.model, progress, soup


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
    loss_sum, n_correct, _ = subject.train_step(inputs, labels_B).tolist()

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


# --------------------------------------------------------------------- mixing, class weights and penalty

MIXES = {"mixup": {"augment__mixup": 1.0}, "cutmix": {"augment__cutmix": 1.0}}
MIXES["both"] = MIXES["mixup"] | MIXES["cutmix"]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_parts_of_a_mixed_weighted_and_penalised_step_are_the_whole_batch(tmp_path, micro_batch, mix):
    """Mixed over all eight images, weighed by class, and with one penalty whatever the number of parts."""
    losses = {"optim__class_weights": True, "optim__l2_sp": 0.5, "optim__clip_norm": 0.0}
    subject = trainer(tmp_path, tiny.config(**PLAIN, **MIXES[mix], **losses), micro_batch)
    torch.nn.init.constant_(subject.model.attention.layers[0].gate, 0.1)
    start = [p.detach().clone() for p in subject.model.backbone.parameters()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in subject.model.backbone.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    reference, mixed, mix_ = copy.deepcopy(subject.model).train(), [], subject.mix
    subject.mix = lambda *batch: mixed.append(mix_(*batch)) or mixed[-1]
    subject.optimizer.step = lambda: None
    subject.optimizer.zero_grad = lambda **_: None
    inputs, labels_B = next(subject.data.fit.epoch(0, 0))
    loss_sum, n_correct, _ = subject.train_step(inputs, labels_B).tolist()

    [(images, y_BK)] = mixed
    assert images.shape == inputs.shape and y_BK.shape == (8, 5) and not torch.equal(images, inputs)
    assert ((y_BK > 0).sum(1) == 2).any()  # two classes in one image
    fit_labels = subject.data.fit.labels_N[subject.data.fit.index_M]
    weights_K = torch.tensor(compute_class_weight("balanced", classes=np.arange(5), y=fit_labels)).float()
    logits_BK = reference(images)
    loss = -((0.9 * y_BK + 0.1 / 5) * weights_K * logits_BK.log_softmax(1)).sum() / 8
    now = reference.backbone.parameters()
    penalty = 0.25 * sum((p - p0).square().sum() for p, p0 in zip(now, start, strict=True))
    (loss + penalty).backward()
    assert loss_sum == pytest.approx(8 * loss.item(), rel=1e-5)  # the penalty has no place in it
    assert n_correct == (logits_BK.argmax(1) == y_BK.argmax(1)).sum().item()
    for (name, ours), theirs in zip(subject.model.named_parameters(), reference.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4 * scale + 1e-8, rtol=1e-3, msg=name)


def test_every_step_is_mixed_by_its_own_draw(tmp_path):
    """From (seed, epoch, step): the same again after a restart, another in the next step."""
    subject = trainer(tmp_path, tiny.config(**PLAIN, **MIXES["both"]))
    mixed, mix = [], subject.mix
    subject.mix = lambda *batch: mixed.append(mix(*batch)) or mixed[-1]
    batch = next(subject.data.fit.epoch(0, 0))
    for epoch, step in [(0, 0), (0, 0), (0, 1), (1, 0)]:
        torch.manual_seed(len(mixed))
        subject.progress.epoch, subject.progress.step = epoch, step
        subject.train_step(*batch)
    (_, first), (_, again), (_, next_step), (_, next_epoch) = mixed
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step) and not torch.equal(first, next_epoch)


def test_accuracy_of_mixed_images_counts_the_larger_share(tmp_path):
    subject = trainer(tmp_path, tiny.config(**PLAIN, **MIXES["mixup"], optim__class_weights=False))
    y_BK = torch.tensor([[0.6, 0.4, 0, 0, 0], [0.3, 0.7, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0.2, 0, 0, 0.8]])
    predicted = torch.tensor([0, 0, 2, 1])  # larger, smaller, whole, smaller
    subject.mix = lambda inputs, labels_B: (inputs, y_BK)
    subject.forward = lambda x: 5 * F.one_hot(predicted, 5).float().requires_grad_()
    loss_sum, n_correct, _ = subject.train_step(torch.zeros(4, 1), torch.tensor([0, 1, 2, 1])).tolist()
    assert n_correct == 2 and math.isfinite(loss_sum)


def test_class_weights_of_equal_classes_change_nothing(tmp_path):
    states = {}
    for equal in (True, False):
        for weighted in (True, False):
            config = tiny.config(**PLAIN, train__epochs=1, optim__class_weights=weighted)
            built = tiny.build(tmp_path, head="plain")
            data = tiny.fit_data(built, config, n=20, n_holdout=5)
            labels_N = np.arange(25) % 5 if equal else np.minimum(np.arange(25) % 7, 4)
            data = FitData(replace(data.fit, labels_N=labels_N), data.holdout)
            folder = tmp_path / f"{equal}{weighted}"
            folder.mkdir()
            fit(built.model, data, config, tiny.device(), folder)
            states[equal, weighted] = built.model.state_dict()["classifier.weight"]
    torch.testing.assert_close(states[True, True], states[True, False], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(states[False, True], states[False, False], rtol=1e-3, atol=1e-4)


def test_the_penalty_holds_the_backbone_at_its_pretrained_weights(tmp_path):
    """The head, which has no pretrained weights, still learns."""
    distances = {}
    for weight in (0.0, 100.0):
        config = tiny.config(**PLAIN, optim__l2_sp=weight, optim__lr=1e-3, train__epochs=3)
        before = tiny.build(tmp_path).model.state_dict()
        model, _ = run(tmp_path, config, f"run{weight}", head="plain")
        moved = {"backbone": 0.0, "classifier": 0.0}
        for name, value in model.state_dict().items():
            moved[name.split(".")[0]] += (value - before[name]).square().sum().item()
        distances[weight] = moved
    assert distances[100.0]["backbone"] < 0.3 * distances[0.0]["backbone"]
    assert distances[100.0]["classifier"] > 0.5 * distances[0.0]["classifier"] > 0


def test_a_penalty_without_anything_to_hold_is_refused(tmp_path):
    with pytest.raises(SetupError, match="l2_sp = 1.0.*trainable"):
        trainer(tmp_path, tiny.config(optim__l2_sp=1.0), trainable="none")


def test_images_have_the_size_of_their_epoch(tmp_path):
    """Growing in training; the same in every prediction."""
    config = tiny.config(train__epochs=6, train__start_size=32, train__patience=6, model__image_size=96)
    config = with_fields(config, {"model.test_size": 128})
    subject = trainer(tmp_path, config)
    seen = []
    subject.model.register_forward_pre_hook(
        lambda model, inputs: seen.append(
            (subject.progress.epoch, model.training, inputs[0].shape[-2:], len(inputs[0]))
        )
    )
    while not subject.finished:
        subject.train_epoch()
        subject.end_epoch()
    trained = {(epoch, tuple(size)) for epoch, training, size, _ in seen if training}
    assert trained == {(epoch, (side, side)) for epoch, side in enumerate([32, 64, 64, 64, 96, 96])}
    assert {tuple(size) for _, training, size, _ in seen if not training} == {(128, 128)}
    for epoch in range(6):
        assert sum(n for at, training, _, n in seen if training and at == epoch) == 23


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


def attention_columns(tmp_path, config, change=lambda model: None, **fields) -> list[dict]:
    """What the history says of the attention of a model that `change` was done to."""
    subject = trainer(tmp_path, config, **fields)
    change(subject.model)
    while not subject.finished:
        subject.train_epoch()
        subject.end_epoch()
    known = {"epoch", "fit_loss", "fit_accuracy", "holdout_loss", "holdout_accuracy", "lr_factor"}
    assert all(known <= row.keys() for row in subject.progress.history)
    return [{k: row[k] for k in row.keys() - known} for row in subject.progress.history]


def set_queries(model, value: float) -> None:
    """Let all tokens ask for the same, `value` in every channel; open the gates."""
    for layer in model.attention.layers:
        torch.nn.init.zeros_(layer.qkv.weight[: layer.qkv.in_features])
        torch.nn.init.constant_(layer.gate, 0.3)
        with torch.no_grad():
            layer.qkv.bias[: layer.qkv.in_features] = value


STILL = {"optim__lr": 0.0, "optim__head_lr": 0.0, "train__epochs": 2}


def test_history_says_where_attention_stands(tmp_path, monkeypatch):
    """At a rate of zero the gate stays and the entropy is that of torch's own module, over chosen images."""
    monkeypatch.setattr(train, "ATTENTION_IMAGES", 3)  # the first, the middle and the last of 11
    config, built = tiny.config(**PLAIN, **STILL), tiny.build(tmp_path, head="attention")
    set_queries(built.model, 40.0)
    layer, holdout = built.model.eval().attention.layers[0], tiny.fit_data(built, config).holdout
    rows = holdout.index_M[[0, 5, 10]]
    with torch.no_grad():
        features = built.model.features(holdout.preprocess(torch.from_numpy(holdout.rows[rows])))
        tokens = layer.norm(features.flatten(2).transpose(1, 2))
        C = tokens.shape[2]
        module = torch.nn.MultiheadAttention(C, layer.heads, batch_first=True).eval()
        module.in_proj_weight.copy_(layer.qkv.weight)
        module.in_proj_bias.copy_(layer.qkv.bias)
        _, weights = module(tokens, tokens, tokens, average_attn_weights=False)
    entropy = scipy.stats.entropy(weights.double().numpy(), axis=-1) / np.log(4)
    assert entropy.mean() < 0.99 and np.ptp(entropy.mean((1, 2))) > 1e-4  # not uniform, nor the same in all
    said = attention_columns(tmp_path, config, lambda model: set_queries(model, 40.0))
    expected = {"gate": pytest.approx(0.3), "attention_entropy": pytest.approx(entropy.mean(), rel=1e-5)}
    assert said == [expected, expected]


def test_uniform_attention_has_an_entropy_of_one_in_every_layer(tmp_path):
    one = {"gate": pytest.approx(0.3), "attention_entropy": pytest.approx(1.0, abs=1e-6)}
    config = tiny.config(**PLAIN, **{**STILL, "train__epochs": 1})
    assert attention_columns(tmp_path, config, lambda model: set_queries(model, 0.0)) == [one]
    two = {f"{name}_{layer}": value for name, value in one.items() for layer in (1, 2)}
    (tmp_path / "two").mkdir()
    uniform = attention_columns(
        tmp_path / "two", config, lambda model: set_queries(model, 0.0), attention_layers=2
    )
    assert uniform == [two]


@pytest.mark.parametrize(("head", "said"), [("cross_attention", True), ("plain", False), ("as_run", False)])
def test_only_attention_over_positions_has_a_gate_in_the_history(tmp_path, head, said):
    config = tiny.config(train__epochs=1, optim__head_lr=1e-2)
    (row,) = attention_columns(tmp_path, config, head=head)
    assert set(row) == ({"gate", "attention_entropy"} if said else set())
    if said:
        assert row["gate"] != 0 and row["attention_entropy"] == pytest.approx(1, abs=1e-3)  # small queries


def test_the_gate_in_the_history_is_the_average_s(tmp_path):
    config = tiny.config(train__epochs=1, train__ema_decay=0.6, optim__head_lr=1e-2)
    subject = trainer(tmp_path, config, backbone=tiny.EFFICIENTNET)
    subject.train_epoch()
    subject.end_epoch()
    own = subject.model.attention.layers[0].gate.item()
    kept = subject.best_state["attention.layers.0.gate"].item()
    assert subject.progress.history[0]["gate"] == kept != own


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
        loss, accuracy = next(remaining)
        return {"loss": loss, "accuracy": accuracy}

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


# ------------------------------------------------------------------------------------------- averages


def watched(monkeypatch) -> tuple[list[dict], list[dict]]:
    """States of the whole model after every step, and at every score of `holdout`."""
    after_steps, scored = [], []
    step, score = Trainer.train_step, Trainer.score_holdout

    def train_step(self, *arguments):
        result = step(self, *arguments)
        after_steps.append(copied(self.model.state_dict()))
        return result

    def score_holdout(self):
        scored.append(copied(self.model.state_dict()))
        return score(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(Trainer, "score_holdout", score_holdout)
    return after_steps, scored


@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
def test_the_average_is_scored_and_kept_and_training_goes_on_from_the_own_weights(
    tmp_path, monkeypatch, backbone
):
    config = tiny.config(train__ema_decay=0.6, optim__lr=1e-3, optim__head_lr=1e-2)
    start = copied(tiny.build(tmp_path, head="attention", backbone=backbone).model.state_dict())
    with monkeypatch.context() as patch:
        own, scored = watched(patch)
        model, progress = run(tmp_path, config, backbone=backbone)
    with monkeypatch.context() as patch:
        plain, plainly_scored = watched(patch)
        run(tmp_path, with_fields(config, {"train.ema_decay": 0.0}), "plain", backbone=backbone)
    assert len(own) == 6 and all(same_state(a, b) for a, b in zip(own, plain, strict=True))
    assert same_state(plainly_scored[-1], own[-1]) and not same_state(scored[-1], own[-1])

    average = {name: value.double() for name, value in start.items()}
    expected = []
    for n, state in enumerate(own):
        d = min(0.6, (1 + n) / (10 + n))
        for name, value in state.items():
            whole = not value.is_floating_point()
            average[name] = value if whole else d * average[name] + (1 - d) * value.double()
        if n in (2, 5):
            expected.append(dict(average))
    for ours, theirs in zip(scored, expected, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name].double(), value.double(), rtol=1e-4, atol=1e-6, msg=name)
    assert same_state(copied(model.state_dict()), scored[progress.best_epoch - 1])
    holdout = tiny.fit_data(tiny.build(tmp_path, backbone=backbone), config).holdout
    with torch.no_grad():
        logits_NK = model(holdout.preprocess(torch.from_numpy(holdout.rows[holdout.index_M])))
    labels_N = torch.from_numpy(holdout.labels_N[holdout.index_M])
    best = progress.history[progress.best_epoch - 1]
    assert best["holdout_loss"] == pytest.approx(F.cross_entropy(logits_NK, labels_N).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("ema_decay", "soup_epochs", "averaged"),
    [(0.0, 1, [3]), (0.6, 1, [3]), (0.0, 2, [2, 3]), (0.6, 10, [0, 1, 2, 3])],
)
def test_soup_is_the_mean_of_what_was_scored_in_the_last_epochs(
    tmp_path, monkeypatch, ema_decay, soup_epochs, averaged
):
    config = tiny.config(train__epochs=4, train__ema_decay=ema_decay, after__soup_epochs=soup_epochs)
    config = with_fields(config, {"train.batch_size": 12, "optim.lr": 1e-3})
    own, scored = watched(monkeypatch)
    model, progress, soup = run_with_soup(tmp_path, config, backbone=tiny.EFFICIENTNET)
    assert soup.keys() == model.learned_state().keys()
    for name, value in soup.items():
        states = [scored[epoch][name] for epoch in averaged]
        expected = torch.stack(states).double().mean(0) if value.is_floating_point() else states[-1]
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-6, msg=name)
    assert same_state(copied(model.state_dict()), scored[progress.best_epoch - 1])
    assert same_state(scored[-1], own[-1]) == (not ema_decay)


@pytest.mark.parametrize(
    ("soup_epochs", "averaged"), [(0, None), (1, None), (2, None), (3, [2]), (4, [1, 2])]
)
def test_soup_where_training_stopped_early(tmp_path, monkeypatch, soup_epochs, averaged):
    """Three of five epochs: the mean of those of the last that were trained, or none."""
    states = scripted(monkeypatch, [(3, 0), (4, 0), (5, 0)])
    config = tiny.config(train__epochs=5, train__patience=2, train__monitor="loss")
    config = with_fields(config, {"after.soup_epochs": soup_epochs, "train.batch_size": 12})
    _, progress, soup = run_with_soup(tmp_path, config)
    assert len(progress.history) == 3
    if averaged is None:
        assert soup is None
        return
    for name, value in soup.items():
        expected = torch.stack([states[epoch][name] for epoch in averaged]).double().mean(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7, msg=name)


def test_soup_of_a_frozen_backbone_has_no_backbone(tmp_path):
    config = tiny.config(train__epochs=1, after__soup_epochs=1, model__trainable="none", train__ema_decay=0.5)
    model, _, soup = run_with_soup(tmp_path, config)
    assert soup.keys() == model.learned_state().keys()
    assert soup and not [name for name in soup if name.startswith("backbone.")]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), classes=st.integers(2, 8))
def test_loss_and_accuracy_are_torch_s(seed, n, classes):
    rng = np.random.default_rng(seed)
    logits_NK = rng.normal(scale=rng.choice([0.1, 3, 300]), size=(n, classes)).astype(np.float32)
    labels_N = rng.integers(0, classes, n)
    logits, labels = torch.from_numpy(logits_NK), torch.from_numpy(labels_N)
    result = loss_and_accuracy(logits_NK, labels_N)
    assert result["loss"] == pytest.approx(
        F.cross_entropy(logits.double(), labels).item(), rel=1e-12, abs=1e-12
    )
    assert result["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert all(type(value) is float for value in result.values())  # as JSON has it


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


EVERYTHING = tiny.config(
    train__epochs=4,
    train__patience=4,
    train__checkpoint_minutes=0.0,
    train__ema_decay=0.8,
    train__start_size=32,
    after__soup_epochs=2,
    data__sampling="balanced",
    augment__mixup=0.4,
    augment__cutmix=1.0,
    augment__trivial_augment=True,
    augment__cutout=8,
    model__dropout=0.2,
    model__drop_path=0.2,
    optim__lr=1e-3,
    optim__head_lr=1e-2,
    optim__layer_decay=0.8,
    optim__class_weights=True,
    optim__l2_sp=0.1,
    optim__clip_norm=1.0,
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Uninterrupted runs of `EVERYTHING`, by backbone."""
    made = {}

    def get(backbone: str):
        if backbone not in made:
            torch.manual_seed(1)
            made[backbone] = run_with_soup(tmp_path_factory.mktemp("all"), EVERYTHING, backbone=backbone)
        return made[backbone]

    return get


@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
@pytest.mark.parametrize(("method", "calls"), [("train_step", 5), ("save", 14)])
def test_everything_at_once_cut_off_and_resumed(tmp_path, monkeypatch, everything, backbone, method, calls):
    """Three steps and a score an epoch, all saved: the 14th checkpoint lies within the last epoch, with one
    of two epochs in the soup."""
    monkeypatch.setattr(train, "STEPS_BETWEEN_READS", 1)
    with monkeypatch.context() as patch:
        kill_after(patch, method, calls)
        with pytest.raises(Killed):
            run(tmp_path, EVERYTHING, backbone=backbone)
    torch.manual_seed(2)
    model, progress, soup = run_with_soup(tmp_path, EVERYTHING, backbone=backbone)
    expected_model, expected, expected_soup = everything(backbone)
    assert progress.history == expected.history and progress.best_epoch == expected.best_epoch
    assert same_state(model.state_dict(), expected_model.state_dict())
    assert same_state(soup, expected_soup)


@pytest.mark.parametrize("part", ["ema", "soup"])
def test_a_resume_needs_the_averages_of_the_checkpoint(tmp_path, monkeypatch, everything, part):
    """So that the test above can fail: without one of them the run ends elsewhere."""
    monkeypatch.setattr(train, "STEPS_BETWEEN_READS", 1)
    with monkeypatch.context() as patch:
        kill_after(patch, "save", 14)
        with pytest.raises(Killed):
            run(tmp_path, EVERYTHING)
    restore = Trainer.restore

    def forgetful(self, payload):
        forgotten = copy.deepcopy(self.averages[part].payload())
        restore(self, payload)
        self.averages[part].restore(forgotten)

    monkeypatch.setattr(Trainer, "restore", forgetful)
    _, _, soup = run_with_soup(tmp_path, EVERYTHING)
    assert not same_state(soup, everything(tiny.CONVNEXT)[2])


def test_every_step_has_the_rate_of_its_place_in_all_of_the_training(tmp_path, monkeypatch):
    """The schedule runs over the epochs, and goes on where a run was cut off."""
    rates, set_rates = [], train.set_lr
    monkeypatch.setattr(train, "set_lr", lambda *both: rates.append(both[1]) or set_rates(*both))
    config = tiny.config(**PLAIN, optim__warmup_fraction=0.4, train__epochs=3)
    with monkeypatch.context() as patch:
        kill_after(patch, "end_epoch", 1)
        with pytest.raises(Killed):
            run(tmp_path, config)
    run(tmp_path, config)
    assert rates == [lr_at(step, 9, config.optim) for step in range(9)] and len(set(rates)) > 5


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


@pytest.mark.parametrize("began_with", ["bf16", "fp16"])
def test_a_run_goes_on_where_the_precision_is_another(tmp_path, monkeypatch, began_with):
    """An A100 takes bf16, a T4 fp16 with a gradient scaler: the next machine may be the other one."""
    with monkeypatch.context() as patch:
        kill_after(patch, "end_epoch", 1)
        with pytest.raises(Killed):
            run(tmp_path, RECIPE)
    payload = checkpoint.load_newest(tmp_path / "run")
    assert payload["scaler"] == {}
    fields = {name: getattr(RECIPE.model, name) for name in ("head", "trainable", "dropout", "drop_path")}
    built = tiny.build(tmp_path / "other", **fields)
    trainer = Trainer(built.model, tiny.fit_data(built, RECIPE), RECIPE, tiny.device(), tmp_path / "other")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    if began_with == "fp16":
        payload["scaler"] = scaler.state_dict()
    else:
        trainer.accelerator.scaler = scaler
    trainer.restore(payload)
    assert trainer.progress.epoch == 1 and scaler.get_scale() == 8.0


def test_checkpoint_interval(tmp_path, monkeypatch):
    """No checkpoint within an epoch before the interval is over; one a step where the interval is zero."""
    monkeypatch.setattr(train, "STEPS_BETWEEN_READS", 1)
    saved = {}
    for minutes in (0.0, 60.0):
        steps = []
        monkeypatch.setattr(checkpoint, "save", lambda _, step, __, steps=steps: steps.append(step))
        run(tmp_path, tiny.config(train__epochs=1, train__checkpoint_minutes=minutes))
        saved[minutes] = steps
    assert saved == {0.0: [1, 2, 3, 4], 60.0: [4]}  # the last is the epoch's end


@pytest.mark.parametrize("head", ["plain", "attention"])
def test_cached_features_train_the_same_head(tmp_path, monkeypatch, head):
    """`Batches` of features instead of images, the backbone never run again."""
    config = tiny.config(**PLAIN, model__trainable="none", model__head=head)
    assert config.augment == AugmentConfig()
    model, progress = run(tmp_path, config)
    built = tiny.build(tmp_path, head=head, trainable="none")
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
