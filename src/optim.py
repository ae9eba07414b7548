"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from src.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Trainable parameters by (backbone or head) × (decayed or not), each with its own `base_lr`.

    Vectors and scalars (norms, biases, gates) are not decayed, as in the ConvNeXt recipe (Liu et al. 2022).
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "backbone" if name.startswith("backbone.") else "head"
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    lrs = {"backbone": config.lr, "head": config.head_lr}
    return [
        {
            "params": parameters,
            "name": f"{part}/{'decay' if decayed else 'no_decay'}",
            "lr": lrs[part],
            "base_lr": lrs[part],
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (part, decayed), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config), fused=True)


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Factor of every group's `base_lr` at `step` of `total_steps`: linear warm-up, then constant or cosine.

    The first step of a warm-up is above zero and the last step of a cosine (Loshchilov & Hutter 2017) is at
    the end of the curve's last segment, also above zero.
    """
    warmup_steps = round(config.warmup_fraction * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate = its `base_lr` × `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
