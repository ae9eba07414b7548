"""The epoch iterator: rows of the store -> device -> augmentation -> resize -> normalise.

All randomness is derived from (seed, epoch, step), so an iterator holds no state: any step of any epoch
can be made again alone. There are no worker processes; at these sizes tensors are faster. Rows that are not
resident on the device are read one batch ahead, by a thread, so that a disk works while the device does.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from src.config import AugmentConfig
from src.data.augment import augment
from src.device import send

# Share of the free device memory that the data may take to stay resident there.
RESIDENT_SHARE = 0.4
ROWS_AT_ONCE = 4096
# Bytes read from a memory map before the pages that they came from are given back.
MAPPED_BYTES = 2**30


def derived_seed(*numbers: int) -> int:
    """One 63-bit seed out of several small numbers, e.g. (run seed, epoch, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Preprocess:
    """Stored uint8 images to what the weights were trained on: size, interpolation, mean and std.

    The whole image is resized (no centre crop), antialiased as Pillow does it, rounded to uint8, then
    normalised to float32 in channels-last memory.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B,3,S,S) -> float32 (B,3,size,size)."""
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        if images_BCHW.shape[-2:] != (self.size, self.size):
            mode = InterpolationMode(self.interpolation)
            images_BCHW = F.resize(images_BCHW, [self.size, self.size], interpolation=mode, antialias=True)
        mean_row, std_row = _mean_std_rows(self.mean, self.std, self.size, images_BCHW.device)
        rows_BHR = images_BCHW.permute(0, 2, 3, 1).flatten(2).float()
        images_BHWC = rows_BHR.sub_(mean_row).div_(std_row).unflatten(2, (self.size, len(self.mean)))
        return images_BHWC.permute(0, 3, 1, 2)

    @property
    def fill(self) -> tuple[int, ...]:
        """The mean colour, which normalises to zero: what erasing paints with."""
        return tuple(round(255 * value) for value in self.mean)


@lru_cache(maxsize=8)
def _mean_std_rows(
    mean: tuple[float, ...], std: tuple[float, ...], size: int, device: torch.device
) -> torch.Tensor:
    """(2, size * 3): mean and std in levels, repeated along a row of pixels.

    A CPU takes whole rows three times faster than three channels at a time; a GPU need not be sent
    them with every batch.
    """
    return (255 * torch.tensor([mean, std])).repeat(1, size).to(device)


def to_device(rows: np.ndarray, device: torch.device) -> np.ndarray | torch.Tensor:
    """The whole array as a tensor on a CUDA device where it fits; else as it is (memory-mapped)."""
    if device.type != "cuda" or rows.nbytes > RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
        return rows
    return sent_in_parts(rows, device)


def sent_in_parts(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on `device`, a part at a time: a machine may have less memory than its GPU."""
    kind = torch.from_numpy(np.empty(0, rows.dtype)).dtype
    whole = torch.empty(rows.shape, dtype=kind, device=device)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = np.array(rows[start : start + ROWS_AT_ONCE])  # a copy: torch wants writable memory
        whole[start : start + ROWS_AT_ONCE] = torch.from_numpy(part)
    return whole


def balanced_order(
    index_M: np.ndarray, labels_M: np.ndarray, n_draws: int, rng: np.random.Generator
) -> np.ndarray:
    """So many draws (D,) of the examples, each class equally often (to within one).

    An image comes again only when all of its class have come, so balanced data are merely shuffled.
    """
    classes, labels_M, counts = np.unique(labels_M, return_inverse=True, return_counts=True)
    quotas = np.full(len(classes), n_draws // len(classes))
    quotas[rng.permutation(len(classes))[: n_draws % len(classes)]] += 1
    drawn_labels_D = rng.permutation(np.repeat(np.arange(len(classes)), quotas))
    order_D = np.empty(n_draws, index_M.dtype)
    for label, (count, quota) in enumerate(zip(counts, quotas, strict=True)):
        rounds = [rng.permutation(index_M[labels_M == label]) for _ in range(-(-quota // count))]
        order_D[drawn_labels_D == label] = np.concatenate(rounds)[:quota]
    return order_D


@dataclass(frozen=True)
class Batches:
    """Batches of one split. `rows` is the store's images (N,3,S,S) or cached features, `index_M` the split.

    Steps of an epoch differ in size by at most one, so no example is dropped and no batch is tiny. Images
    have a `preprocess`, features none. `augmentation` changes the images of `epoch`, `balanced` draws
    every class equally often there, `draws_per_class` times or (0) as often as there are images for.
    """

    rows: np.ndarray | torch.Tensor
    labels_N: np.ndarray
    index_M: np.ndarray
    batch_size: int
    device: torch.device
    preprocess: Preprocess | None = None
    augmentation: AugmentConfig = AugmentConfig()
    balanced: bool = False
    draws_per_class: int = 0

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self._n_steps(self.n_examples)

    def _n_steps(self, n_examples: int) -> int:
        return -(-n_examples // self.batch_size)

    @cached_property
    def n_examples(self) -> int:
        """Examples an epoch sees."""
        if self.balanced and self.draws_per_class:
            return self.draws_per_class * len(np.unique(self.labels_N[self.index_M]))
        return len(self.index_M)

    def at_size(self, size: int) -> Batches:
        """The same images resized to another side; features stay as they are."""
        return replace(self, preprocess=replace(self.preprocess, size=size)) if self.preprocess else self

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Shuffled, augmented (inputs, labels_B) of one epoch from step `start` on."""
        rng = np.random.default_rng([seed, epoch])
        if self.balanced:
            order_D = balanced_order(self.index_M, self.labels_N[self.index_M], self.n_examples, rng)
        else:
            order_D = rng.permutation(self.index_M)
        parts = np.array_split(order_D, len(self))[start:]
        for step, (inputs, labels_B) in enumerate(self._taken(parts), start):
            if not self.augmentation.is_identity:
                generator = torch.Generator().manual_seed(derived_seed(seed, epoch, step))
                inputs = augment(inputs, self.augmentation, generator, self.preprocess.fill)
            yield self._prepare(inputs), labels_B

    def in_order(
        self, some_of: Callable[[list[np.ndarray]], list[np.ndarray]] = list
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(inputs, labels_B) once through the split in its own order, never augmented; or `some_of` them."""
        parts = np.array_split(self.index_M, self._n_steps(len(self.index_M)))
        for inputs, labels_B in self._taken(some_of(parts)):
            yield self._prepare(inputs), labels_B

    def _prepare(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.preprocess(inputs) if self.preprocess else inputs

    def _taken(self, parts: Sequence[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(rows, labels_B) of each part on the device."""
        labels_N = torch.from_numpy(self.labels_N).to(self.device)
        read = None if isinstance(self.rows, torch.Tensor) else self._read_ahead(parts)
        for part_B in parts:
            index_B = send(torch.from_numpy(part_B), self.device)
            yield (
                next(read) if read else self.rows.index_select(0, index_B),
                labels_N.index_select(0, index_B),
            )

    def _read_ahead(self, parts: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """Rows read from the array by a thread, the next part while this one is used, then sent."""
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        read = _reader(self.rows, pinned=stream is not None)
        with ThreadPoolExecutor(1) as thread:
            coming = None
            for index_B in parts:
                ready, coming = coming, thread.submit(read, index_B)
                if ready:
                    yield _send_aside(ready.result(), self.device, stream)
            if coming:
                yield _send_aside(coming.result(), self.device, stream)


def _reader(rows: np.ndarray, pinned: bool) -> Callable[[np.ndarray], torch.Tensor]:
    """`rows[index]` as a tensor. Of a memory map not more than about `MAPPED_BYTES` stay in the process.

    What was read remains in the system's page cache, which gives way to whoever needs the memory.
    """
    n_bytes = 0

    def read(index_B: np.ndarray) -> torch.Tensor:
        nonlocal n_bytes
        taken = torch.from_numpy(rows[index_B])
        n_bytes += taken.nbytes
        if n_bytes > MAPPED_BYTES and isinstance(rows, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
            rows._mmap.madvise(mmap.MADV_DONTNEED)
            n_bytes = 0
        return taken.pin_memory() if pinned else taken

    return read


def _send_aside(rows_B: torch.Tensor, device: torch.device, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """`send`, on a stream of its own where there is one: the copy passes while the device computes."""
    if stream is None:
        return send(rows_B, device)
    with torch.cuda.stream(stream):
        sent = send(rows_B, device)
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    sent.record_stream(current)  # its memory is not reused before the computation is done with it
    return sent
