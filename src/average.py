"""Averages of the weights over training: an exponential moving average over steps, a mean over epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

State = dict[str, torch.Tensor]


class WeightAverage:
    """Running average of a state (its tensors stay those of the model), parameters and statistics alike.

    With a `decay` exponential, else uniform; by torch's own update rules. Early on the decay is at most
    (1 + n) / (10 + n) after n updates, so that a short run forgets where it started (as TensorFlow's and
    timm's averages do). Whole numbers are copied.
    """

    def __init__(self, live: State, decay: float = 0.0) -> None:
        self.live, self.decay = live, decay
        self.n_updates = 0
        self.state = {name: tensor.detach().clone() for name, tensor in live.items()}
        self.floats = [name for name, tensor in live.items() if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's weights of this moment in."""
        for name in self.state.keys() - set(self.floats):
            self.state[name].copy_(self.live[name])
        average, current = ([state[name] for name in self.floats] for state in (self.state, self.live))
        if self.decay:
            decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
            get_ema_multi_avg_fn(decay)(average, current, self.n_updates)
        elif self.n_updates:
            get_swa_multi_avg_fn()(average, current, self.n_updates)
        else:
            torch._foreach_copy_(average, current)
        self.n_updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside the block and its own again after it."""
        own = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        load(self.live, self.state)
        try:
            yield
        finally:
            load(self.live, own)

    def payload(self) -> dict:
        """What a checkpoint keeps."""
        return {"n_updates": self.n_updates, "state": self.state}

    def restore(self, payload: dict) -> None:
        """The inverse of `payload`."""
        self.n_updates = payload["n_updates"]
        load(self.state, payload["state"])


@torch.no_grad()
def load(live: State, state: State) -> None:
    """Copy every tensor of `state` into the tensor of that name in `live`."""
    for name, tensor in state.items():
        live[name].copy_(tensor)


def copied(state: State) -> State:
    """The state apart from its model, in the host's memory."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def between(start: State, end: State, share: float) -> State:
    """(1 - share) · start + share · end; whole numbers from `end`."""
    return {
        name: torch.lerp(start[name], tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }


def mean(states: list[State]) -> State:
    """Uniform mean of several states; whole numbers from the first."""
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in states[0].items()
    }
