"""The machine a run lands on: which device and precision, how many images fit, what to record of it."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from src import SetupError, processes

# Bytes one image takes in training (forward, backward, 16-bit activations) of ConvNeXt-Tiny at 224 px,
# with a margin; other sizes scale with the number of pixels.
BYTES_PER_IMAGE_224 = 45e6
CPU_MICRO_BATCH = 64  # larger ones fall out of the caches
RECORDED_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "scikit-learn")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Device:
    """What was chosen: the torch device, Accelerate's precision name and the images per pass."""

    torch_device: torch.device
    precision: str
    micro_batch: int
    eval_batch: int
    name: str


def choose_device(image_size: int, batch_size: int, micro_batch: int = 0) -> Device:
    """CUDA where there is one (bf16 if the GPU computes it, else fp16 with scaling), else the CPU in fp32.

    `micro_batch` images (0: as many as fit) go through the model at once; gradients accumulate up to
    `batch_size`, so the optimizer sees the same batch on every device.
    """
    if not torch.cuda.is_available():
        at_once = min(micro_batch or CPU_MICRO_BATCH, batch_size)
        return Device(torch.device("cpu"), "no", at_once, 128, cpu_name())
    device = torch.device("cuda", processes.state().local_process_index)
    properties = torch.cuda.get_device_properties(device)
    # A T4 emulates bf16 slowly: emulation does not count.
    native_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    fitting = int(0.6 * properties.total_memory / (BYTES_PER_IMAGE_224 * (image_size / 224) ** 2))
    fitting = max(8, 2 ** (max(fitting, 1).bit_length() - 1))
    precision = "bf16" if native_bf16 else "fp16"
    at_once = min(micro_batch or fitting, batch_size)
    return Device(device, precision, at_once, 2 * min(fitting, batch_size), properties.name)


def halving(work: Callable[[int], Result], at_once: int) -> tuple[Result, int]:
    """`work(at_once)`, with half as many images as often as memory runs out; its result, and the number.

    `work` must be able to start anew. Raises `SetupError` where one image alone is too much.
    """
    while True:
        try:
            return work(at_once), at_once
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            reason = str(error).splitlines()[0]
        # Here the traceback is gone, and with it what the failed attempt held.
        if at_once == 1:
            raise SetupError(
                f"one image alone does not fit into the memory ({reason}). Lower model.image_size, or take a "
                "smaller model.backbone."
            )
        clear_device_cache(garbage_collection=True)
        at_once //= 2
        tqdm.write(f"out of memory: {at_once} images pass at once from here on")


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`; pinned for CUDA, as a pageable copy waits for the queue to drain."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def cpu_name() -> str:
    """Model name of the processor with the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].strip() if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} ({cores} CPU cores)"


def peak_memory_gb(device: torch.device) -> float:
    """Peak of the run so far: allocated CUDA memory, or this process's resident set, in 10⁹ bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would begin at the peak of the process that started this one
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in RECORDED_PACKAGES},
    }


def git_commit() -> str:
    """The checkout's commit, with `-dirty` where a file of `src` differs; `unknown` outside a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--short", "--untracked-files=no", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def set_up_process() -> None:
    """What a run needs of its process: repeatable CUDA convolutions, and fast memory on the CPU."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks instead of returning them to the kernel.

    A CPU training step allocates the same activations again and again; with glibc's defaults each of
    them is mapped, zeroed page by page and unmapped every time, a quarter of the step.
    """
    m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**31 - 1
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, largest)
    except (OSError, AttributeError):
        return  # another C library: its defaults stay
