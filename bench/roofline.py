"""The least time a training step can take: each operation's arithmetic or its bytes, whichever is slower.

Counted on tensors without data (device `meta`), divided by rates that are measured on this device: a large
copy and a large matrix product. After Williams et al. (2009), operation by operation.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ADAMW_BYTES = 28  # a parameter's step in float32: value, gradient and two moments read, three written


@dataclass(frozen=True)
class Rates:
    """What the device does at best: FLOP/s of a matrix product, bytes/s of a copy (read plus written)."""

    flops: float
    bytes: float


class Tally(TorchDispatchMode):
    """Every operation's FLOPs and the bytes of its tensors, in and out; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[float, float, bool]] = []  # FLOPs, bytes, pointwise

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not _moves_nothing(func):
            tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
            n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
            flops = _flops(func._overloadpacket, args, kwargs, out)
            self.operations.append((flops, n_bytes, torch.Tag.pointwise in func.tags))
        return out

    def seconds(self, rates: Rates, fused: bool = False) -> float:
        """Sum over operations of max(FLOPs / rate, bytes / rate). `fused`: pointwise ones cost nothing."""
        return sum(
            max(flops / rates.flops, n_bytes / rates.bytes)
            for flops, n_bytes, pointwise in self.operations
            if not (fused and pointwise)
        )


def _flops(packet, args: tuple, kwargs: dict, out: object) -> float:
    """torch's own count, but for the backward pass of a convolution, which it counts as if it had no groups.

    Gradients of input and weight cost as much as the forward pass each.
    """
    if packet is torch.ops.aten.convolution_backward:
        grad_out, _, weight, *_, output_mask = args
        return 2 * grad_out.numel() * weight[0].numel() * sum(output_mask[:2])
    count = flop_registry.get(packet)
    return count(*args, **kwargs, out_val=out) if count else 0


def _moves_nothing(func) -> bool:
    """Views and allocations."""
    aliases = [value.alias_info for value in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or func._overloadpacket.__name__.startswith(("empty", "new_empty", "_unsafe_view"))


def count_step(model: torch.nn.Module, batch: int, size: int, dtype: torch.dtype) -> Tally:
    """Forward and backward of one batch, on a copy of `model` without data. The optimizer comes on top."""
    model = copy.deepcopy(model).to(device="meta", dtype=dtype).train()
    images = torch.empty(batch, 3, size, size, device="meta", dtype=dtype)
    labels = torch.zeros(batch, device="meta", dtype=torch.long)
    with Tally() as tally:
        F.cross_entropy(model(images), labels).backward()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tally.operations.append((0, ADAMW_BYTES * trained, False))
    return tally


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Medians of eleven large copies and eleven matrix products on random numbers."""
    large = device.type == "cuda"
    source = torch.rand(2**28 if large else 2**26, device=device)
    target = torch.empty_like(source)
    copied = _median_seconds(lambda: target.copy_(source), device)
    side = 8192 if large else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    multiplied = _median_seconds(lambda: a @ b, device)
    return Rates(flops=2 * side**3 / multiplied, bytes=2 * source.nbytes / copied)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    def times() -> Iterator[float]:
        for _ in range(13):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield time.perf_counter() - started

    return statistics.median(list(times())[2:])
