"""A uniform soup (Wortsman et al. 2022): the mean of the weights of runs that differ in their seed alone.

python -m src.experiment soup --preset improvement --profile offline --data DIR --seeds 0,1,2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from src import SetupError
from src.after import Predictor, measure_statistics
from src.average import load, mean
from src.config import Config, with_fields
from src.experiment import claim_run_folder, finished_run, make_batches, prepare
from src.files import write_json
from src.folders import Paths, require_writable
from src.predict import loss_and_accuracy


def soup_of_seeds(config: Config, seeds: Sequence[int], paths: Paths) -> tuple[Path, dict]:
    """Average the finished runs of `seeds`, score each and the soup; write the arm's `soup.json`.

    Each is scored by its weights alone, without averaged views. `chosen` is what `holdout` prefers, of equals
    the first; the soup comes last. Raises `SetupError` for fewer than two seeds, for a run that is not
    finished and for one of another configuration.
    """
    seeds = list(dict.fromkeys(seeds))
    if len(seeds) < 2:
        raise SetupError(f"a soup needs two runs or more; --seeds gave {seeds}.")
    configs = [with_fields(config, {"train.seed": seed}) for seed in seeds]
    folders = [finished_run(config, paths) for config in configs]
    folder = paths.results_of(config)
    require_writable(folder)
    setup = prepare(configs[0], paths)
    for config in configs:
        claim_run_folder(replace(setup, config=config))
    data, valid, _ = make_batches(setup)
    model = setup.model.to(setup.device.torch_device)
    live, states = model.learned_state(), [load_file(run / "model.safetensors") for run in folders]
    predictor = Predictor(model.classify if data.cached else model, setup.device)
    soup = mean(states)

    def score(state: dict) -> dict:
        load(live, state)
        if state is soup:
            measure_statistics(model, data)
        model.eval()
        return {
            name: loss_and_accuracy(predictor.logits(split, name), split.labels_N[split.index_M])
            for name, split in (("holdout", data.holdout), ("valid", valid))
        }

    named = {**{f"seed {seed}": state for seed, state in zip(seeds, states, strict=True)}, "soup": soup}
    scores = {name: score(state) for name, state in named.items()}
    scores["chosen"] = max(named, key=lambda name: scores[name]["holdout"]["accuracy"])
    write_json(folder / "soup.json", scores)
    return folder, scores
