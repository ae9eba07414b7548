"""Zero-shot classification with CLIP: images against the names of the classes, without any training.

The package open_clip_torch is optional; its weights come from the Hugging Face hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from src import SetupError
from src.device import Device, choose_device
from src.predict import autocast, image_bar

MODEL, PRETRAINED = "ViT-B-32", "laion2b_s34b_b79k"
IMAGE_SIZE, BATCH = 224, 64  # what the images that pass at once are reckoned from, on a GPU


def zero_shot_logits(
    images_NHWC: np.ndarray,
    class_names: Sequence[str],
    model: str = MODEL,
    pretrained: str = PRETRAINED,
) -> np.ndarray:
    """uint8 images (N,H,W,3) and the names of K classes -> float32 logits (N,K) of a CLIP model.

    Radford et al. 2021: the cosine of image and class, times the learned scale. A class is the mean of the
    normalised embeddings of the paper's 80 prompts for ImageNet with its name, normalised again; `_` and `+`
    in a name are spaces. Runs on the GPU where there is one. Raises `SetupError` where open_clip_torch is not
    installed, and where `pretrained` weights of `model` cannot be had.
    """
    clip, device = _open_clip(), choose_device(IMAGE_SIZE, BATCH)
    network, preprocess, tokenizer = _load(clip, model, pretrained, device)

    def prompts(name: str) -> torch.Tensor:
        name = re.sub(r"[_+\s]+", " ", name).strip()
        return tokenizer([template(name) for template in clip.OPENAI_IMAGENET_TEMPLATES])

    with torch.inference_mode():
        means_KD = torch.stack(
            [embedded(network.encode_text, prompts(name), device).mean(0) for name in class_names]
        )
        directions_DK = network.logit_scale.exp().float() * F.normalize(means_KD, dim=1).T
        logits = []
        with image_bar(len(images_NHWC), "zero-shot") as bar:
            for start in range(0, len(images_NHWC), device.eval_batch):
                part = images_NHWC[start : start + device.eval_batch]
                inputs = torch.stack([preprocess(Image.fromarray(image_HWC)) for image_HWC in part])
                logits.append((embedded(network.encode_image, inputs, device) @ directions_DK).cpu())
                bar.update(len(part))
    return torch.cat(logits).numpy()


def embedded(
    encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, device: Device
) -> torch.Tensor:
    """What `encode` makes of a batch, as float32 vectors of length one (B,D) on the device."""
    with autocast(device):
        vectors_BD = encode(inputs.to(device.torch_device))
    return F.normalize(vectors_BD.float(), dim=1)


def _open_clip() -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise SetupError(f"CLIP needs another package ({error}): pip install open_clip_torch") from None
    return open_clip


def _load(
    clip: ModuleType, model: str, pretrained: str, device: Device
) -> tuple[nn.Module, Callable[[Image.Image], torch.Tensor], Callable[[list[str]], torch.Tensor]]:
    """Network in eval mode on the device, the transform of an image in prediction, the tokenizer."""
    try:
        network, _, preprocess = clip.create_model_and_transforms(
            model, pretrained=pretrained, device=device.torch_device
        )
        tokenizer = clip.get_tokenizer(model)
    except Exception as error:  # RuntimeError for unknown names, and whatever the hub's client raises
        raise SetupError(
            f"CLIP {model!r} with weights {pretrained!r} cannot be had: {type(error).__name__}: "
            f"{str(error).strip()[:300]}\nopen_clip.list_pretrained() names what there is; without a "
            "network, set HF_HUB_OFFLINE=1 with a filled cache."
        ) from error
    return network.eval(), preprocess, tokenizer
