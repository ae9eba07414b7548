"""Parameter groups and schedule against torch's own and against the formula."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch

from src.config import OptimConfig
from src.optim import build_optimizer, lr_at, parameter_groups, set_lr

CONFIG = OptimConfig(lr=1e-3, head_lr=1e-2, weight_decay=0.3, schedule="cosine", warmup_fraction=0.2)


@pytest.mark.parametrize("head", ["plain", "attention", "as_run"])
@pytest.mark.parametrize("trainable", ["none", "all"])
def test_groups_hold_every_trainable_parameter_once(tmp_path, head, trainable):
    model = tiny.build(tmp_path, head=head, trainable=trainable).model
    groups = parameter_groups(model, CONFIG)
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable_ids = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable_ids) and len(set(grouped)) == len(grouped)
    parts = {group["name"].split("/")[0] for group in groups}
    assert parts == ({"head"} if trainable == "none" else {"backbone", "head"})


def test_rates_and_decay_by_name(tmp_path):
    model = tiny.build(tmp_path, head="attention", trainable="all").model
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, CONFIG)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            on_backbone = name.startswith("backbone.")
            assert group["lr"] == group["base_lr"] == (CONFIG.lr if on_backbone else CONFIG.head_lr), name
            exempt = parameter.ndim < 2 or name.endswith((".bias", "gate", "gamma"))
            assert group["weight_decay"] == (0.0 if exempt else CONFIG.weight_decay), name
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert {"classifier.weight", "attention.layers.0.qkv.weight", "attention.layers.0.proj.weight"} <= decayed
    assert not {"attention.layers.0.gate", "attention.layers.0.norm.weight", "classifier.bias"} & decayed


def test_one_step_is_the_formula(tmp_path):
    """Loshchilov & Hutter 2019: the first step is p (1 - lr wd) - lr g / (|g| + eps)."""
    model = tiny.build(tmp_path, head="attention").model
    optimizer = build_optimizer(model, CONFIG)
    set_lr(optimizer, 0.5)
    generator, expected = torch.Generator().manual_seed(0), {}
    for name, p in model.named_parameters():
        p.grad = torch.empty_like(p).normal_(generator=generator)  # laid out as p, as autograd does
        lr = 0.5 * (CONFIG.lr if name.startswith("backbone.") else CONFIG.head_lr)
        decay = CONFIG.weight_decay if p.ndim > 1 else 0.0
        expected[name] = p.detach() * (1 - lr * decay) - lr * p.grad / (p.grad.abs() + 1e-8)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("total", "warmup"), [(50, 0.2), (37, 0.1), (20, 0), (10, 1), (7, 0.3), (1, 0)])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_schedule_is_torch_s(total, warmup, schedule):
    config = OptimConfig(schedule=schedule, warmup_fraction=warmup)
    steps = round(warmup * total)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    flat = torch.optim.lr_scheduler
    after = (
        flat.CosineAnnealingLR(optimizer, max(1, total - steps))
        if schedule == "cosine"
        else flat.ConstantLR(optimizer, 1.0)
    )
    parts = [after]
    if steps:
        parts.insert(0, flat.LinearLR(optimizer, 1 / steps, 1.0, max(1, steps - 1)))
    scheduler = flat.SequentialLR(optimizer, parts, [steps] if steps else [])
    for step in range(total):
        assert lr_at(step, total, config) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
            scheduler.step()


def test_schedule_rises_then_falls_and_never_reaches_zero():
    factors = [lr_at(step, 100, CONFIG) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 20) and factors[19] == factors[20] == 1.0
    assert factors[:20] == sorted(factors[:20]) and factors[20:] == sorted(factors[20:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    assert lr_at(5, 10, OptimConfig()) == 1.0


def test_set_lr_keeps_the_ratio_and_does_not_compound(tmp_path):
    optimizer = build_optimizer(tiny.build(tmp_path).model, CONFIG)
    for factor in (0.5, 0.5, 0.1):
        set_lr(optimizer, factor)
        rates = {group["name"].split("/")[0]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"backbone": CONFIG.lr * factor, "head": CONFIG.head_lr * factor})
