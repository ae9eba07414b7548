"""Zero-shot logits by hand, with a stand-in of open_clip that has its interface and no weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import noise
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

from src import SetupError, zero_shot
from src.zero_shot import zero_shot_logits

TEMPLATES = (lambda c: f"a photo of a {c}.", lambda c: f"a {c}!", lambda c: f"itap of my {c}.")
NAMES = ("zebra", "killer+whale", "Black_footed_Albatross")
LENGTH, WIDTH = 40, 6


class Network(nn.Module):
    """Texts and images to vectors of any length; `logit_scale` is the logarithm of the scale, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.of_text = nn.Parameter(torch.randn(LENGTH, WIDTH, generator=generator))
        self.of_pixels = nn.Parameter(torch.randn(3 * 8 * 8, WIDTH, generator=generator))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.dropout = nn.Dropout(0.5)

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return self.dropout(text.float()) @ self.of_text

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return self.dropout(image.flatten(1)) @ self.of_pixels


def preprocess(image) -> torch.Tensor:
    assert image.mode == "RGB"
    return pil_to_tensor(image.resize((8, 8))).float() / 255


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[*text.encode(), *[0] * LENGTH][:LENGTH] for text in texts])


@pytest.fixture
def open_clip(monkeypatch):
    """The module, in place; what it was asked for is in its `asked`."""
    module, network = ModuleType("open_clip"), Network()
    module.asked, module.OPENAI_IMAGENET_TEMPLATES, module.network = [], TEMPLATES, network

    def create_model_and_transforms(model_name, pretrained=None, load_weights=True, *, device="cpu"):
        module.asked.append((model_name, pretrained, torch.device(device).type))
        return network.train().to(device), None, preprocess

    def get_tokenizer(model_name="", context_length=None, cache_dir=None):
        module.asked.append(model_name)
        return tokenize

    module.create_model_and_transforms, module.get_tokenizer = create_model_and_transforms, get_tokenizer
    monkeypatch.setitem(sys.modules, "open_clip", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return module


def images(n: int) -> np.ndarray:
    return np.stack([np.asarray(noise(i, (20, 30))) for i in range(n)])


def by_hand(network: Network, images_NHWC: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """exp(scale) * cosine(image, mean of the prompts' directions), in float64 and loops."""

    def unit(vector: np.ndarray) -> np.ndarray:
        return vector / np.sqrt((vector**2).sum())

    text, pixels = (p.detach().double().numpy() for p in (network.of_text, network.of_pixels))
    rows = []
    for image_HWC in images_NHWC:
        image = unit(preprocess(Image.fromarray(image_HWC)).double().numpy().ravel() @ pixels)
        row = []
        for name in names:
            prompts = [unit(tokenize([t(name)])[0].double().numpy() @ text) for t in TEMPLATES]
            row.append(np.exp(network.logit_scale.item()) * image @ unit(np.mean(prompts, axis=0)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("batch", [1, 3, 128])
def test_logits_by_hand(open_clip, monkeypatch, batch):
    original = zero_shot.choose_device
    monkeypatch.setattr(zero_shot, "choose_device", lambda *size: _with_batch(original(*size), batch))
    given = images(7)
    logits_NK = zero_shot_logits(given, NAMES)
    expected = by_hand(open_clip.network, given, ("zebra", "killer whale", "Black footed Albatross"))
    assert logits_NK.dtype == np.float32 and logits_NK.shape == (7, 3)
    np.testing.assert_allclose(logits_NK, expected, rtol=1e-5, atol=1e-5)
    assert not open_clip.network.training
    assert open_clip.asked == [("ViT-B-32", "laion2b_s34b_b79k", "cpu"), "ViT-B-32"]


def _with_batch(device, batch: int):
    return replace(device, eval_batch=batch)


def test_another_model_is_asked_for_by_name(open_clip):
    zero_shot_logits(images(1), NAMES[:1], "ViT-L-14", "datacomp_xl_s13b_b90k")
    assert open_clip.asked == [("ViT-L-14", "datacomp_xl_s13b_b90k", "cpu"), "ViT-L-14"]


def test_without_the_package_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SetupError, match="pip install open_clip_torch"):
        zero_shot_logits(images(1), NAMES)


def test_weights_that_cannot_be_had_are_named(open_clip, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such tag")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", fail)
    with pytest.raises(SetupError, match=r"'ViT-B-32' with weights 'mine'.*RuntimeError: no such tag"):
        zero_shot_logits(images(1), NAMES, pretrained="mine")
