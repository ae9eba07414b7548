"""A uniform soup (Wortsman et al. 2022): the mean of the weights of runs that differ in their seed alone.

python -m src.experiment soup --preset improvement --profile offline --data DIR --seeds 0,1,2
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from src import SetupError
from src.after import Predictor, measure_statistics
from src.average import load, mean
from src.config import Config, with_fields
from src.experiment import Paths, make_batches, prepare, require_writable, shown
from src.files import write_json
from src.predict import loss_and_accuracy


def soup_of_seeds(config: Config, seeds: Sequence[int], paths: Paths) -> tuple[Path, dict]:
    """Average the finished runs of `seeds`, score each and the soup; write the arm's `soup.json`.

    All are scored as they are, without what `after` did to them. `chosen` is what `holdout` prefers. Raises
    `SetupError` for fewer than two seeds and for a run that is not finished.
    """
    if len(set(seeds)) < 2:
        raise SetupError(f"a soup needs two runs or more; --seeds gave {list(seeds)}.")
    files = [_weights(with_fields(config, {"train.seed": seed}), paths) for seed in seeds]
    setup = prepare(with_fields(config, {"train.seed": seeds[0]}), paths)
    data, valid, _ = make_batches(setup)
    model = setup.model.to(setup.device.torch_device)
    live, states = model.learned_state(), [load_file(file) for file in files]
    predictor = Predictor(model.classify if data.cached else model, setup.device)

    def score(state: dict) -> dict:
        load(live, state)
        if state is soup:
            measure_statistics(model, data)
        model.eval()
        return {
            name: loss_and_accuracy(predictor.logits(split, name), split.labels_N[split.index_M])
            for name, split in (("holdout", data.holdout), ("valid", valid))
        }

    soup = mean(states)
    named = {**{f"seed {seed}": state for seed, state in zip(seeds, states, strict=True)}, "soup": soup}
    scores = {name: score(state) for name, state in named.items()}
    scores["chosen"] = max(named, key=lambda name: scores[name]["holdout"]["accuracy"])
    folder = paths.results / config.arm.capitalize()
    require_writable(folder)
    write_json(folder / "soup.json", scores)
    return folder, scores


def _weights(config: Config, paths: Paths) -> Path:
    file = paths.runs / config.run_name / "model.safetensors"
    if not file.exists():
        raise SetupError(
            f"{shown(file)} does not exist: run that seed first, e.g. `python -m src.experiment {config.arm} "
            f"--profile {config.profile} --seed {config.train.seed}`."
        )
    return file
