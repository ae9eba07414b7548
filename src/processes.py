"""One run in several processes, started by `accelerate launch` or `notebook_launcher`; nothing in one alone.

All walk the same path with the same seeds. A process passes its share of every batch through the model, the
gradients' sum is everyone's, and the main process alone writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from tqdm.auto import tqdm

from src import NotNow

Items = TypeVar("Items", bound=Sequence)


@cache
def state() -> PartialState:
    """Accelerate's view of the processes; without a GPU they are the CPU's. Asked for in every step.

    The others wait for the main process while it downloads and decodes: half an hour on GPUs as well, where
    torch allows ten minutes.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=30))


def n_processes() -> int:
    """Of this run, on all machines."""
    return state().num_processes


def process_index() -> int:
    """0 is the main process."""
    return state().process_index


def is_main() -> bool:
    """Whether this process writes."""
    return state().is_main_process


def share(items: Items) -> Items:
    """This process's part of a sequence or of a tensor's rows; in the processes' order they are the whole."""
    n, index = n_processes(), process_index()
    return items[len(items) * index // n : len(items) * (index + 1) // n]


def gathered(parts: list) -> list:
    """The lists of all processes, one after the other."""
    with _together():
        return gather_object(parts)


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the processes, the same bits in each."""
    with _together():
        return reduce(tensor, "sum")


def sum_in_place(tensors: list[torch.Tensor]) -> None:
    """`summed` for many tensors at once."""
    if n_processes() == 1 or not tensors:
        return
    whole = summed(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = whole.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


def wait_for_all() -> None:
    """Return when every process has come here."""
    with _together():
        state().wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """The others enter when the main process has left."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


@contextmanager
def _together() -> Iterator[None]:
    """Raise `NotNow` where another process has ended: nothing can be exchanged with it."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if n_processes() == 1:
            raise
        raise NotNow(
            f"process {process_index()} of {n_processes()} lost the others: one of them was ended, or the "
            f"network is down ({str(error).splitlines()[0][:200]}). "
            "Start the same command again: the run goes on from its last checkpoint."
        ) from error


def say(text: str) -> None:
    """A line above the bars, from the main process."""
    if is_main():
        tqdm.write(text)


def end() -> None:
    """Say goodbye to the others, before the process ends."""
    if n_processes() > 1:
        state().destroy_process_group()
