"""Parameter groups, schedule and penalties against torch's, timm's, scikit-learn's and the formulas."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import timm
import tiny
import torch
from sklearn.utils.class_weight import compute_class_weight
from timm.optim import param_groups_layer_decay
from torch import nn

from src import SetupError
from src.config import ModelConfig, OptimConfig
from src.model.build import Classifier
from src.optim import (
    L2SP,
    build_optimizer,
    class_weights,
    group_of_layers,
    lr_at,
    parameter_groups,
    set_lr,
)

CONFIG = OptimConfig(lr=1e-3, head_lr=1e-2, weight_decay=0.3, schedule="cosine", warmup_fraction=0.2)
DECAYING = OptimConfig(lr=1e-3, head_lr=1e-2, weight_decay=0.3, layer_decay=0.7)
HEADS = (
    {"head": "plain"},
    {"head": "attention", "attention_layers": 2, "relative_position": True},
    {"head": "cross_attention", "class_queries": True},
    {"head": "mlp", "scra": True},
    {"head": "as_run"},
)


def on_meta(tag: str, **fields) -> Classifier:
    """A model without memory: names and shapes are what groups depend on."""
    with torch.device("meta"):
        backbone = timm.create_model(tag, pretrained=False, num_classes=0)
        return Classifier(backbone, 10, ModelConfig(**fields), (backbone.num_features, 7, 7))


def by_name(model: Classifier, groups: list[dict]) -> dict[str, dict]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("config", [CONFIG, DECAYING], ids=["one rate", "layer decay"])
@pytest.mark.parametrize("head", HEADS, ids=lambda fields: fields["head"])
@pytest.mark.parametrize("trainable", ["none", "last_stage", "last_two_blocks", "all"])
def test_groups_hold_every_trainable_parameter_once(trainable, head, config):
    model = on_meta("test_convnext", trainable=trainable, **head)
    groups = parameter_groups(model, config)
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable_ids = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable_ids) and len(set(grouped)) == len(grouped)
    assert all(group["params"] for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)
    parts = {group["name"].split("/")[0].split(" ")[0] for group in groups}
    assert parts == ({"head"} if trainable == "none" else {"backbone", "head"})


@pytest.mark.parametrize("head", HEADS, ids=lambda fields: fields["head"])
def test_rates_and_decay_by_name(head):
    model = on_meta("test_convnext", **head)
    grouped = by_name(model, parameter_groups(model, CONFIG))
    exempt_ends = (".bias", ".gate", ".gamma", ".query", ".position_bias", "norm.weight", "neck.2.weight")
    for name, group in grouped.items():
        on_backbone = name.startswith("backbone.")
        assert group["lr"] == group["base_lr"] == (CONFIG.lr if on_backbone else CONFIG.head_lr), name
        exempt = name.endswith(exempt_ends) or (on_backbone and "downsample.0" in name or ".stem.1" in name)
        assert group["weight_decay"] == (0.0 if exempt else CONFIG.weight_decay), name
    decayed = {name for name, group in grouped.items() if group["weight_decay"]}
    own = {name for name in decayed if not name.startswith("backbone.")}
    assert (
        own
        == {"classifier.weight"}
        | {
            "plain": set(),
            "attention": {f"attention.layers.{i}.{kind}.weight" for i in (0, 1) for kind in ("qkv", "proj")},
            "cross_attention": {"attention.kv.weight"},
            "mlp": {"neck.1.weight", "scra.conv.weight"},
            "as_run": {"neck.value.weight"},
        }[head["head"]]
    )


def test_a_backbone_s_own_exemptions_from_decay():
    """Swin names its tables of position biases, which are matrices."""
    model = on_meta("swin_tiny_patch4_window7_224")
    grouped = by_name(model, parameter_groups(model, CONFIG))
    tables = [name for name in grouped if name.endswith("relative_position_bias_table")]
    assert len(tables) == 12 and not any(grouped[name]["weight_decay"] for name in tables)
    decayed = {name for name, group in grouped.items() if group["weight_decay"]}
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert decayed == matrices - set(tables)


# --------------------------------------------------------------------------------------- layer decay


def timm_layers(model: Classifier, decay: float = 0.5) -> dict[str, int]:
    """Layers counted from the top, as timm's optimizer has them, for every parameter of the backbone."""
    groups = param_groups_layer_decay(model.backbone, layer_decay=decay)
    names = {id(p): f"backbone.{name}" for name, p in model.backbone.named_parameters()}
    return {
        names[id(p)]: round(math.log(group["lr_scale"], decay)) for group in groups for p in group["params"]
    }


@pytest.mark.parametrize(
    ("tag", "n_groups", "n_layers"),
    [
        ("convnext_atto", 12, 14),
        ("convnext_tiny", 12, 20),
        ("convnext_base", 12, 38),
        ("tf_efficientnet_lite0", 12, 17),
        ("resnet50", 12, 17),
        ("test_convnext", 11, 11),
        ("test_efficientnet", 6, 6),
    ],
)
def test_rates_fall_from_the_top_of_the_backbone_to_its_stem(tag, n_groups, n_layers):
    model = on_meta(tag, head="attention")
    grouped, from_top = by_name(model, parameter_groups(model, DECAYING)), timm_layers(model)
    assert max(from_top.values()) + 1 == n_layers
    rates = {name: grouped[name]["lr"] for name in from_top}
    assert all(grouped[name]["base_lr"] == rate for name, rate in rates.items())
    expected = [DECAYING.lr * DECAYING.layer_decay**above for above in range(n_groups)]
    assert sorted(set(rates.values()), reverse=True) == pytest.approx(expected, rel=1e-12)
    rate_of_layer = {layer: rates[name] for name, layer in from_top.items()}
    assert all(rates[name] == rate_of_layer[layer] for name, layer in from_top.items())  # none is divided
    from_the_stem = [rate_of_layer[layer] for layer in reversed(range(n_layers))]
    assert from_the_stem == sorted(from_the_stem) and from_the_stem[-1] == DECAYING.lr
    sizes = Counter(from_the_stem).values()
    assert max(sizes) - min(sizes) <= 1
    if n_layers == n_groups:  # nothing to merge: timm's own rates
        theirs = {name: DECAYING.lr * DECAYING.layer_decay**above for name, above in from_top.items()}
        assert rates == pytest.approx(theirs, rel=1e-12)
    others = {group["lr"] for name, group in grouped.items() if not name.startswith("backbone.")}
    assert others == {DECAYING.head_lr}


@pytest.mark.parametrize("trainable", ["last_stage", "last_two_blocks"])
def test_a_layer_s_rate_does_not_depend_on_what_else_learns(trainable):
    whole, part = (on_meta("convnext_tiny", trainable=kind) for kind in ("all", trainable))
    rates, some = (by_name(model, parameter_groups(model, DECAYING)) for model in (whole, part))
    assert 5 < len(some) < len(rates)
    assert all(group["lr"] == rates[name]["lr"] for name, group in some.items())
    assert max(group["lr"] for name, group in some.items() if name.startswith("backbone.")) == DECAYING.lr


def test_decay_of_one_leaves_four_groups():
    model = on_meta("convnext_tiny", head="attention")
    groups = parameter_groups(model, CONFIG)
    summary = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert summary == {
        "backbone/decay": (CONFIG.lr, CONFIG.weight_decay),
        "backbone/no_decay": (CONFIG.lr, 0.0),
        "head/decay": (CONFIG.head_lr, CONFIG.weight_decay),
        "head/no_decay": (CONFIG.head_lr, 0.0),
    }
    names = {group["name"] for group in parameter_groups(model, DECAYING)}
    assert names == {
        f"{part}/{kind}"
        for part in ("head", *(f"backbone {i} of 12" for i in range(1, 13)))
        for kind in ("decay", "no_decay")
    } - {"backbone 12 of 12/decay"}  # a norm alone


def test_groups_of_layers_are_as_even_as_they_can_be():
    depths, n_groups = group_of_layers(on_meta("convnext_tiny").backbone)
    assert n_groups == 12
    assert depths["stem.0.weight"] == 0 and depths["head.norm.weight"] == 11
    assert depths["stages.3.downsample.1.weight"] == depths["stages.3.blocks.0.conv_dw.weight"]


# ------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_one_step_is_the_formula(tmp_path, kind):
    """Loshchilov & Hutter 2019: the first is p (1 - lr wd) - lr g / (|g| + eps); Adam adds wd p to g."""
    model = tiny.build(tmp_path, head="attention").model
    optimizer = build_optimizer(model, replace(CONFIG, optimizer=kind))
    assert all(group["fused"] for group in optimizer.param_groups)
    set_lr(optimizer, 0.5)
    generator, expected = torch.Generator().manual_seed(0), {}
    for name, p in model.named_parameters():
        p.grad = torch.empty_like(p).normal_(generator=generator)  # laid out as p, as autograd does
        lr = 0.5 * (CONFIG.lr if name.startswith("backbone.") else CONFIG.head_lr)
        decay = CONFIG.weight_decay if p.ndim > 1 else 0.0
        shrunk = p.detach() * (1 - lr * decay if kind == "adamw" else 1)
        g = p.grad if kind == "adamw" else p.grad + decay * p.detach()
        expected[name] = shrunk - lr * g / (g.abs() + 1e-8)
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


@pytest.mark.parametrize("warmup_epochs", [0, 6])
@pytest.mark.parametrize(("parts", "step_size"), [(6, 5), (3, 10), (1, 30), (30, 1)])
def test_steps_are_torch_s_over_epochs(parts, step_size, warmup_epochs):
    """StepLR with a tenth: 30 epochs in so many parts, after the warm-up where there is one."""
    n_steps, epochs = 7, warmup_epochs + 30
    config = OptimConfig(schedule="step", step_parts=parts, warmup_fraction=warmup_epochs / epochs)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size, gamma=0.1)
    warmup = [lr_at(step, n_steps * epochs, config) for step in range(n_steps * warmup_epochs)]
    assert warmup == pytest.approx(np.arange(1, len(warmup) + 1) / max(1, len(warmup)), rel=1e-12)
    for epoch in range(warmup_epochs, epochs):
        factors = [lr_at(n_steps * epoch + step, n_steps * epochs, config) for step in range(n_steps)]
        assert factors == pytest.approx(n_steps * [optimizer.param_groups[0]["lr"]], rel=1e-9), epoch
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("total", "parts"), [(20, 3), (7, 4), (5, 5), (100, 6), (1, 1)])
def test_parts_are_as_equal_as_they_can_be(total, parts):
    config = OptimConfig(schedule="step", step_parts=parts)
    factors = [lr_at(step, total, config) for step in range(total)]
    sizes = Counter(factors)
    assert sorted(sizes, reverse=True) == pytest.approx([0.1**part for part in range(parts)], rel=1e-12)
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert factors == sorted(factors, reverse=True)


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


# --------------------------------------------------------------------------------- weights of classes


@pytest.mark.parametrize("n_classes", [2, 5, 11])
def test_class_weights_are_scikit_learn_s(n_classes):
    rng = np.random.default_rng(0)
    labels_M = np.concatenate([np.arange(n_classes), rng.zipf(1.7, 200) % n_classes])
    expected = compute_class_weight("balanced", classes=np.arange(n_classes), y=labels_M)
    weights_K = class_weights(labels_M, n_classes)
    assert weights_K.dtype == torch.float32 and expected.max() > 1.5 * expected.min()
    np.testing.assert_allclose(weights_K.numpy(), expected, rtol=1e-6)
    assert weights_K.numpy()[labels_M].mean() == pytest.approx(1, rel=1e-5)  # the rates keep their meaning


def test_class_weights_of_equal_classes_are_one_and_of_absent_ones_zero():
    assert torch.equal(class_weights(np.repeat(np.arange(4), 7), 4), torch.ones(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights_K = class_weights(np.array([0, 0, 0, 2]), 5)
    torch.testing.assert_close(weights_K, torch.tensor([4 / 15, 0.0, 4 / 5, 0.0, 0.0]))


# ------------------------------------------------------------------------------------------- L2-SP


@torch.no_grad()
def move(module: nn.Module) -> None:
    """Every parameter away from where it was."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@pytest.mark.parametrize("trainable", ["all", "last_stage"])
@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
def test_l2_sp_is_the_formula(tmp_path, backbone, trainable):
    """In float64, so that it holds to many digits; of the trained backbone, and neither head nor the rest."""
    model = tiny.build(tmp_path, head="attention", backbone=backbone, trainable=trainable).model.double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalty = L2SP(model.backbone, 0.03)
    move(model)
    value = penalty()
    pulled = {
        name: p for name, p in model.named_parameters() if p.requires_grad and name.startswith("backbone.")
    }
    expected = 0.5 * 0.03 * sum(((p - start[name]) ** 2).sum().item() for name, p in pulled.items())
    assert value.shape == () and value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    for name, parameter in model.named_parameters():
        if name in pulled:
            expected_grad = 0.03 * (parameter.detach() - start[name])
            torch.testing.assert_close(parameter.grad, expected_grad, atol=0, rtol=1e-9, msg=name)
        else:
            assert parameter.grad is None, name
    assert 0 < len(pulled) < len(start)


def test_l2_sp_is_zero_where_it_starts(tmp_path):
    """The first step of training is there: no division by the distance of zero."""
    model = tiny.build(tmp_path).model
    penalty = L2SP(model.backbone, 0.5)
    value = penalty()
    value.backward()
    assert value.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.backbone.parameters())
    only = model.backbone.stem[0].weight
    with torch.no_grad():
        only[0, 0, 0, 0] += 2.0
    model.zero_grad()
    value = penalty()
    value.backward()
    assert value.item() == pytest.approx(0.5 * 0.5 * 4) and only.grad.count_nonzero() == 1
    assert only.grad[0, 0, 0, 0].item() == pytest.approx(0.5 * 2)
    assert all(p.grad.isfinite().all() for p in model.backbone.parameters())


def test_l2_sp_adds_to_the_gradient_of_the_loss(tmp_path):
    model = tiny.build(tmp_path).model.eval()
    penalty = L2SP(model.backbone, 0.1)
    start = [p.detach().clone() for p in model.backbone.parameters()]
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.1)
    x = torch.randn(2, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1]))
    alone = torch.autograd.grad(loss, list(model.backbone.parameters()), retain_graph=True)
    loss.backward()
    penalty().backward()
    for parameter, first, w0 in zip(model.backbone.parameters(), alone, start, strict=True):
        torch.testing.assert_close(parameter.grad, first + 0.1 * (parameter.detach() - w0))


def test_l2_sp_needs_a_backbone_that_learns(tmp_path):
    with pytest.raises(SetupError, match="optim.l2_sp.*model.trainable"):
        L2SP(tiny.build(tmp_path, trainable="none").model.backbone, 0.1)
