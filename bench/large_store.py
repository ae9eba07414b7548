"""Data larger than one would hold in memory: a synthetic store of 20 GB on disk, read in random order.

One process reads it through `Batches`, 128 images of 288 px at a time. Shown: images a second, and the most
resident memory of the process, its own and the pages of files mapped into it apart. `cold`: the system was
told to forget the file before the round. Linux only; needs the disk space.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np

from bench.conventional import MEAN, STD
from bench.pair import Round, report_errors, save, spread, take_turns
from bench.workload import CACHE, parse_arguments
from src import SetupError
from src.config import IMPROVEMENT
from src.data.batches import Batches, Preprocess
from src.device import choose_device, set_up_process

SIZE = 288
SERIES = {
    "cold": ("read from the disk, the whole store", {"share": 1.0, "cold": True}),
    "warm": ("read again, as much as fits in the page cache", {"share": 1.0, "cold": False}),
    "augmented": ("a tenth of the store, read and augmented", {"share": 0.1, "augmented": True}),
}


def read(file: str, share: float, cold: bool = False, augmented: bool = False) -> Round:
    """A round is an epoch over a random `share` of the store's images."""
    set_up_process()
    rows = np.load(file, mmap_mode="r")
    # Without augmentation, reading alone is timed.
    recipe = (Preprocess(SIZE, MEAN, STD, "bicubic"), IMPROVEMENT.augment) if augmented else ()
    device = choose_device(SIZE, 128).torch_device
    index = np.random.default_rng(0).permutation(len(rows))[: int(share * len(rows))]
    batches = Batches(rows, np.zeros(len(rows), np.int64), index, 128, device, *recipe)

    def one_round() -> dict[str, float]:
        if cold:
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        own, mapped, started = 0.0, 0.0, time.perf_counter()
        for _ in batches.epoch(0, 0):
            own, mapped = max(own, resident_gb("RssAnon")), max(mapped, resident_gb("RssFile"))
        seconds = time.perf_counter() - started
        return {"images_per_s": len(index) / seconds, "own_gb": own, "mapped_gb": mapped}

    return one_round


def resident_gb(kind: str) -> float:
    """This process's resident memory of one kind (RssAnon: its own, RssFile: mapped files) in 10⁹ bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(kind))


def write_store(gigabytes: int) -> Path:
    """A .npy of random uint8 images (N,3,288,288), written in pieces."""
    n_images = int(gigabytes * 1e9) // (3 * SIZE * SIZE)
    free = shutil.disk_usage(CACHE).free / 1e9
    if free < gigabytes + 1:
        raise SetupError(f"{CACHE} has {free:.1f} GB free, the store takes {gigabytes}; pass --gigabytes.")
    file = CACHE / "large_store.npy"
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(file, "w+", np.uint8, (n_images, 3, SIZE, SIZE))
    for start in range(0, n_images, 256):
        rows[start : start + 256] = rng.integers(0, 256, rows[start : start + 256].shape, dtype=np.uint8)
    rows.flush()
    return file


def main() -> None:
    options = parse_arguments(__doc__, gigabytes=20)
    CACHE.mkdir(parents=True, exist_ok=True)
    file, rows = write_store(options.gigabytes), {}
    try:
        for name, (label, settings) in SERIES.items():
            case = take_turns(
                {"ours": ("bench.large_store:read", {"file": str(file), **settings})}, options.rounds
            )
            rows[name] = {"what": label, **{key: case.summary("ours", key) for key in case.measured["ours"]}}
            own, mapped = (rows[name][key]["high"] for key in ("own_gb", "mapped_gb"))
            print(
                f"{label}: {spread(rows[name]['images_per_s'])} images/s, own memory {own:.2f} GB, "
                f"mapped {mapped:.2f} GB",
                flush=True,
            )
    finally:
        file.unlink()
    save("large_store", f"{options.gigabytes} GB of random images, {SIZE} px", rows)


if __name__ == "__main__":
    report_errors(main)
