"""One process up to its first training step, with a stopwatch: what `bench.start` times, way by way.

`python -m bench.first_step ours DATA`, `python -m bench.first_step conventional FOLDER`: seconds as JSON.
Nothing is imported before the stopwatch runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path


class Stopwatch:
    """Seconds of each part, summed over its laps."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.at = time.time()

    def lap(self, part: str) -> None:
        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.at
        self.at = now


def conventional_first_step(data: str, watch: Stopwatch) -> None:
    """What the study's improvement notebook does before its first step is over."""
    from bench import conventional
    from bench.workload import arm_config
    from src.model.build import build_model

    watch.lap("libraries")
    config = arm_config("improvement", data)
    folder = Path(data)
    wnids = tuple(sorted(path.name for path in (folder / "train").iterdir()))
    model = build_model(config.model, wnids, 0).model
    watch.lap("model")
    transform = conventional.training_transform(config.model.image_size)
    batches = conventional.loader(folder / "train", transform, shuffle=True)
    images, labels = next(iter(batches))
    watch.lap("data")
    conventional.Loop(model, [{"params": list(model.parameters())}], amp=False).step(images, labels)
    watch.lap("first_step")


def our_first_step(data: str, watch: Stopwatch) -> None:
    """`src.experiment.run` up to its first step."""
    import src.experiment as experiment
    from bench.workload import arm_config
    from src.train import Trainer

    watch.lap("libraries")
    config = arm_config("improvement", data, {"train.batch_size": 32})
    scratch = Path(tempfile.mkdtemp())
    paths = experiment.Paths(scratch, scratch, experiment.Paths.of("full").cache)
    build_model = experiment.build_model

    def timed(*arguments):
        watch.lap("data")
        built = build_model(*arguments)
        watch.lap("model")
        return built

    experiment.build_model = timed
    setup = experiment.prepare(config, paths)
    experiment.claim_run_folder(setup)
    data, _, _ = experiment.make_batches(setup)
    inputs, labels_B = next(data.fit.epoch(0, 0))
    watch.lap("data")
    trainer = Trainer(setup.model, data, config, setup.device, setup.run_folder)
    trainer.model.train()
    trainer.train_step(inputs, labels_B)
    watch.lap("first_step")


if __name__ == "__main__":
    stopwatch = Stopwatch()
    {"conventional": conventional_first_step, "ours": our_first_step}[sys.argv[1]](sys.argv[2], stopwatch)
    print(json.dumps({**stopwatch.parts, "end": time.time()}))
