"""The training step of full fine-tuning: images a second, waiting for data, copies, memory, and the roofline.

Conventional: the study's loop, batches of 32, and (`partial`) with its stage 4 alone trained. Ours at several
batches, precisions, memory formats, compiled or not; each beside the same step on one batch that stays where
it is, and beside the least time that the device's own rates allow.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bench import conventional, roofline
from bench.pair import Round, report_errors, save, take_turns
from bench.workload import arm_config, described, image_folder, parse_arguments
from src import experiment
from src.config import Config
from src.data.sources import open_source
from src.device import choose_device
from src.model.build import build_model
from src.train import Trainer

BATCHES = (32, 128, 256, 512)
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def conventional_step(folder: str, images: int, partial: bool = False) -> Round:
    """Steps of the study's loop; `partial` trains the last stage and the head alone."""
    config = _config(folder, conventional.BATCH)
    wnids = tuple(sorted(path.name for path in Path(folder, "train").iterdir()))
    model = build_model(config.model, wnids, 0).model
    if partial:
        model.backbone.requires_grad_(False)
        stages = getattr(model.backbone, "stages", None) or model.backbone.blocks
        stages[-1].requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loop = conventional.Loop(model, [{"params": parameters, "lr": config.optim.lr}], amp=False)
    loop.model.train()
    transform = conventional.training_transform(config.model.image_size)
    batches = conventional.loader(Path(folder, "train"), transform, shuffle=True)
    return _timed(_endless(lambda: iter(batches)), loop.step, images, loop.device)


def our_step(
    folder: str,
    images: int,
    batch: int,
    precision: str = "",
    contiguous: bool = False,
    compiled: bool = False,
    resident: bool = False,
) -> Round:
    """Steps of `Trainer` on its own batches, or on one batch again and again (`resident`)."""
    trainer = ready_trainer(_config(folder, batch, compiled), precision)
    config, device, data = trainer.config, trainer.device.torch_device, trainer.data.fit
    step = trainer.train_step
    if contiguous:
        trainer.model.to(memory_format=torch.contiguous_format)

        def step(inputs, labels_B, step=trainer.train_step):
            return step(inputs.contiguous(), labels_B)

    trainer.model.train()
    first = next(data.epoch(config.train.seed, 0))
    started = time.perf_counter()
    step(*first)
    _wait(device)
    first_step = time.perf_counter() - started
    epochs = iter(range(10**9))
    source = _endless(lambda: iter([first]) if resident else data.epoch(config.train.seed, next(epochs)))
    one_round = _timed(source, step, max(images, batch), device)
    copies = _copies(lambda: step(*next(source))) if device.type == "cuda" else {}
    return lambda: {**one_round(), **copies, "first_step_s": first_step}


def _config(folder: str, batch: int, compiled: bool = False) -> Config:
    return arm_config("improvement", folder, {"train.batch_size": batch, "train.compile": compiled})


def ready_trainer(config: Config, precision: str = "") -> Trainer:
    """A run that is ready for its first step, in a scratch folder."""
    scratch = Path(tempfile.mkdtemp())
    cache = experiment.Paths.of("full").cache / "bench" / "train_step"
    setup = experiment.prepare(config, experiment.Paths(scratch, scratch, cache))
    device = replace(setup.device, precision=precision) if precision else setup.device
    data, _, _ = experiment.make_batches(setup)
    return Trainer(setup.model, data, config, device, scratch)


def _endless(epoch: Callable[[], Iterator]) -> Iterator:
    while True:
        yield from epoch()


def _timed(source: Iterator, step: Callable, images: int, device: torch.device) -> Round:
    """A round of steps over at least `images` images; `waited` is the share of it spent in the iterator."""

    def one_round() -> dict[str, float]:
        seen, waited, started = 0, 0.0, time.perf_counter()
        while seen < images:
            asked = time.perf_counter()
            inputs, labels = next(source)
            waited += time.perf_counter() - asked
            step(inputs, labels)
            seen += len(labels)
        _wait(device)
        seconds = time.perf_counter() - started
        return {"images_per_s": seen / seconds, "waited": waited / seconds}

    return one_round


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copies(step: Callable[[], object]) -> dict[str, float]:
    """Copies between host and device, and waits of the host for it, in one step."""
    with torch.profiler.profile() as profile:
        step()
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    return {
        "copies_to_device": sum(n for key, n in counts.items() if key.startswith("Memcpy HtoD")),
        "copies_to_host": sum(n for key, n in counts.items() if key.startswith("Memcpy DtoH")),
        "waits": counts.get("cudaStreamSynchronize", 0),
    }


def variants() -> dict[str, dict]:
    """Settings to measure: every batch as a run would have it, then one thing changed at batch 128."""
    usual = choose_device(224, 128).precision
    other = "no" if usual != "no" else "bf16"
    return {
        **{f"batch {batch}": {"batch": batch} for batch in BATCHES},
        f"batch 128, {'fp32' if other == 'no' else other}": {"batch": 128, "precision": other},
        "batch 128, contiguous": {"batch": 128, "contiguous": True},
        "batch 128, compiled": {"batch": 128, "compiled": True},
    }


def add_roofline(row: dict, config: Config, settings: dict, measured: dict[str, roofline.Rates]) -> None:
    """Images a second that the device's rates allow at the micro-batch of a run, and the share reached."""
    device = choose_device(config.model.image_size, settings["batch"])
    precision = settings.get("precision") or device.precision
    if precision not in measured:
        measured[precision] = roofline.measure_rates(device.torch_device, DTYPES[precision])
    wnids = open_source(config.data, experiment.Paths.of("full").cache).wnids
    model = build_model(config.model, wnids, 0).model
    tally = roofline.count_step(model, device.micro_batch, config.model.image_size, DTYPES[precision])
    for name, fused in (("roofline", False), ("roofline_fused", True)):
        row[name] = device.micro_batch / tally.seconds(measured[precision], fused)
    row["share_of_roofline_fused"] = row["ours"]["median"] / row["roofline_fused"]
    row["rates"] = {"flops": measured[precision].flops, "bytes": measured[precision].bytes}


def main() -> None:
    options = parse_arguments(__doc__, images=128, train_per_class=20)
    folder = image_folder(options.data, 200, options.train_per_class, 5)
    common = {"folder": str(folder), "images": options.images}
    steps = {label: f"bench.train_step:{label}_step" for label in ("conventional", "our")}
    rows, measured = {}, {}
    # Long rounds: between them the loader's workers prepare four batches in advance.
    longer = {**common, "images": 4 * options.images}
    for partial in (False, True):
        ways = {
            "conventional": (steps["conventional"], {**longer, "partial": partial}),
            "ours": (steps["our"], {**longer, "batch": 128}),
        }
        case = take_turns(ways, options.rounds)
        name = f"training step, conventional {'with stage 4 alone ' if partial else ''}against ours"
        row = case.row("images_per_s", name, "images/s")
        rows["conventional_partial" if partial else "conventional"] = row
        row["waited"] = {way: case.summary(way, "waited") for way in ways}
        row["peak_memory_gb"] = {way: case.summary(way, "peak_memory_gb")["high"] for way in ways}
    for name, settings in variants().items():
        ways = {
            "resident": (steps["our"], {**common, **settings, "resident": True}),
            "ours": (steps["our"], {**common, **settings}),
        }
        case = take_turns(ways, options.rounds)
        rows[name] = row = case.row("images_per_s", f"training step, {name}", "images/s", tuple(ways))
        for key in ("waited", "first_step_s", "copies_to_device", "copies_to_host", "waits"):
            if key in case.measured["ours"]:
                row[key] = case.summary("ours", key)
        row["peak_memory_gb"] = case.summary("ours", "peak_memory_gb")["high"]
        add_roofline(row, _config(str(folder), settings["batch"]), settings, measured)
        shares = f"waited {row['waited']['median']:.1%}, {row['share_of_roofline_fused']:.0%} of the roofline"
        print(
            f"  {shares}, peak {row['peak_memory_gb']} GB, first step {row['first_step_s']['median']:.1f} s"
        )
    config = _config(str(folder), 128)
    model = f"{config.model.backbone}, {config.model.head} head, {config.model.image_size} px"
    save("train_step", described(folder), rows, model=model)


if __name__ == "__main__":
    report_errors(main)
