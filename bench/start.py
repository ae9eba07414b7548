"""The second start of a run: from the command to the end of the first training step, all data on disk.

Conventional: import, list the folder, build the model, start the loader's workers. Ours: import, open the
decoded store and the splits, build the same model. Both over all of Tiny-ImageNet, 32 images in the step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from bench.pair import ROOT, Round, report_errors, save, take_turns
from bench.workload import described, image_folder, parse_arguments

LABELS = {
    "total": "second start: command to end of first step",
    "libraries": "of it importing (torch, torchvision, timm)",
    "model": "of it building the model",
    "data_and_step": "of it data and first step",
}


def whole_process(way: str, data: str) -> Round:
    """A round is a process of `bench.first_step`; `interpreter` is what its own stopwatch did not see."""

    def one_round() -> dict[str, float]:
        started = time.time()
        command = [sys.executable, "-m", "bench.first_step", way, data]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        stamps = json.loads(done.stdout.splitlines()[-1])
        total = stamps.pop("end") - started
        ours = stamps["data"] + stamps["first_step"]
        return {**stamps, "interpreter": total - sum(stamps.values()), "total": total, "data_and_step": ours}

    return one_round


def main() -> None:
    options = parse_arguments(__doc__)
    folder = image_folder(options.data, 200, 500, 50)
    start = "bench.start:whole_process"
    ways = {
        "conventional": (start, {"way": "conventional", "data": str(folder)}),
        "ours": (start, {"way": "ours", "data": options.data}),
    }
    case = take_turns(ways, options.rounds)
    rows = {name: case.row(name, label, "s") for name, label in LABELS.items()}
    save("start", described(folder), rows)


if __name__ == "__main__":
    report_errors(main)
