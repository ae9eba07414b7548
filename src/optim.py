"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from src import SetupError
from src.config import OptimConfig
from src.model.build import Classifier, layer_numbers

MAX_GROUPS = 12  # of layers with a learning rate of their own


def parameter_groups(model: Classifier, config: OptimConfig) -> list[dict]:
    """Trainable parameters by depth and by whether they decay, each group with its own `base_lr`.

    The head has `head_lr`, the backbone `lr` × `layer_decay` to the power of the groups above (Clark et al.
    2020; in up to 12 groups, as Liu et al. 2022). Vectors and scalars (norms, biases, gates), learned queries
    and position biases are not decayed.
    """
    depths, n_groups = group_of_layers(model.backbone)
    undecayed = model.no_weight_decay()
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, lr = "head", config.head_lr
        if name.startswith("backbone."):
            depth = depths[name.removeprefix("backbone.")]
            lr = config.lr * config.layer_decay ** (n_groups - 1 - depth)
            part = "backbone" if config.layer_decay == 1 else f"backbone {depth + 1} of {n_groups}"
        decayed = parameter.ndim > 1 and name not in undecayed
        group = {
            "params": [],
            "name": f"{part}/{'decay' if decayed else 'no_decay'}",
            "lr": lr,
            "base_lr": lr,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        groups.setdefault((part, decayed), group)["params"].append(parameter)
    return list(groups.values())


def group_of_layers(backbone: nn.Module) -> tuple[dict[str, int], int]:
    """Group of every parameter of the backbone by name, 0 nearest the images, and the number of groups.

    Blocks that follow each other share a group where there are more than `MAX_GROUPS`.
    """
    depths = layer_numbers(backbone)
    n_layers = max(depths.values()) + 1
    n_groups = min(MAX_GROUPS, n_layers)
    return {name: depth * n_groups // n_layers for name, depth in depths.items()}, n_groups


def build_optimizer(model: Classifier, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW, or Adam (whose weight decay is λw in the gradient), over `parameter_groups`."""
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return kind(parameter_groups(model, config), fused=True)


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Factor of every group's `base_lr` at `step` of `total_steps`: linear warm-up, then the schedule.

    The first step of a warm-up is above zero and the last step of a cosine (Loshchilov & Hutter 2017) is at
    the end of the curve's last segment, also above zero. The parts of `step` divide what follows the warm-up.
    """
    warmup_steps = round(config.warmup_fraction * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule == "constant":
        return 1.0
    done, n_steps = step - warmup_steps, max(1, total_steps - warmup_steps)
    if config.schedule == "step":
        return 0.1 ** (done * config.step_parts // n_steps)
    return 0.5 * (1 + math.cos(math.pi * done / n_steps))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate = its `base_lr` × `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def class_weights(labels_M: np.ndarray, n_classes: int) -> torch.Tensor:
    """(K,): M / (K · images of the class), as scikit-learn's `balanced`; 0 for a class without images."""
    counts_K = np.bincount(labels_M, minlength=n_classes)
    weights_K = np.divide(len(labels_M), n_classes * counts_K, where=counts_K > 0, out=np.zeros(n_classes))
    return torch.from_numpy(weights_K).float()


class L2SP:
    """λ/2 · ‖w − w₀‖² over the trained parameters of a backbone, w₀ those of this moment (Li et al. 2018)."""

    def __init__(self, backbone: nn.Module, weight: float) -> None:
        self.weight = weight
        self.parameters = [p for p in backbone.parameters() if p.requires_grad]
        if not self.parameters:
            raise SetupError(
                f"optim.l2_sp = {weight} holds a backbone that learns to its start: "
                "it needs another model.trainable than none."
            )
        self.start = [p.detach().clone() for p in self.parameters]

    def __call__(self) -> torch.Tensor:
        """The penalty, a scalar with gradients."""
        distances = torch._foreach_norm(torch._foreach_sub(self.parameters, self.start))
        return 0.5 * self.weight * torch.stack(distances).square().sum()
