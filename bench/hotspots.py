"""What dominates: the operations that take the most time of their own, in each stage of a run."""

from __future__ import annotations

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.conventional import MEAN, STD
from bench.pair import report_errors, save
from bench.train_step import ready_trainer
from bench.workload import arm_config, described, image_folder, parse_arguments
from src.data.augment import augment
from src.data.batches import Preprocess
from src.predict import autocast

SHOWN = 8
STEPS = 4


def main() -> None:
    options = parse_arguments(__doc__, batch=128)
    folder = image_folder(options.data, 200, 20, 5)
    config = arm_config("improvement", str(folder), {"train.batch_size": options.batch})
    trainer = ready_trainer(config)
    device, fit = trainer.device.torch_device, trainer.data.fit
    images = torch.from_numpy(np.array(trainer.data.holdout.rows[: options.batch])).to(device)
    resize = Preprocess(224, MEAN, STD, "bicubic")
    normalised = fit.preprocess(images)
    inputs, labels_B = next(fit.epoch(0, 0))

    def training_step() -> None:
        trainer.model.train()
        trainer.train_step(inputs, labels_B)

    @torch.inference_mode()
    def features() -> None:
        trainer.model.eval()
        with autocast(trainer.device):
            trainer.model.features(normalised)

    stages = {
        "training step": training_step,
        "features": features,
        "augmentation at 64 px": lambda: augment(images, config.augment, torch.Generator(), resize.fill),
        "resizing to 224 px and normalising": lambda: resize(images),
    }
    rows = {}
    for name, work in stages.items():
        rows[name] = dominating(work, device)
        print(f"{name}: {rows[name]['milliseconds']:.1f} ms for {options.batch} images")
        for operation, share in rows[name]["shares"].items():
            print(f"  {share:6.1%}  {operation}")
    model = f"{config.model.backbone}, {config.model.image_size} px, batch {options.batch}"
    save("hotspots", described(folder), rows, model=model)


def dominating(work, device: torch.device) -> dict:
    """Self time of the largest operations of `work`, as shares of the whole; after one run to warm up."""
    on_gpu = device.type == "cuda"
    work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(STEPS):
            work()
        if on_gpu:
            torch.cuda.synchronize(device)
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: getattr(event, name) for event in profiled.key_averages()}
    total = sum(times.values())
    largest = sorted(times, key=times.__getitem__, reverse=True)[:SHOWN]
    return {
        "milliseconds": total / 1000 / STEPS,
        "shares": {key.removeprefix("aten::"): round(times[key] / total, 4) for key in largest},
    }


if __name__ == "__main__":
    report_errors(main)
