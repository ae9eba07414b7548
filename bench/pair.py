"""Two processes, one for each way of doing the same thing, that take turns: the harness of every benchmark.

A *way* is a function that sets up and returns another one, the round: `way(**settings) -> round`, where
`round() -> {name: number}`. Each way lives in a process of its own, set up once as its user would have it;
its rounds alternate with the other's, so that a change in the machine's speed falls on both.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.tables import short
from src import SetupError
from src.device import choose_device, git_commit, peak_memory_gb, versions
from src.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
ROUNDS = 5
Round = Callable[[], dict[str, float]]


@dataclass
class Case:
    """What one comparison measured: for each way and name the numbers, one a round."""

    measured: dict[str, dict[str, list[float]]]

    def summary(self, way: str, name: str) -> dict[str, float]:
        """Median, smallest and largest over the rounds."""
        return _summary(self.measured[way][name])

    def row(self, name: str, what: str, unit: str, ways: tuple[str, str] = ("conventional", "ours")) -> dict:
        """One line of a table, printed too: `name` both ways and, round by round, how much the second gains.

        Seconds are better small, rates large.
        """
        slow, fast = (self.measured[way][name] for way in ways)
        ratios = [a / b if unit == "s" else b / a for a, b in zip(slow, fast, strict=True)]
        both = {way: self.summary(way, name) for way in ways}
        ratio = _summary(ratios)
        told = ", ".join(f"{way} {spread(values)}" for way, values in both.items())
        print(f"{what}: {told} {unit}: {spread(ratio)} times", flush=True)
        return {"what": what, "unit": unit, "rounds": len(ratios), **both, "ratio": ratio}


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


class Worker:
    """One way in a process of its own: requests and answers are lines of JSON on its stdin and stdout."""

    def __init__(self, way: str, settings: dict) -> None:
        self.way = way
        command = [sys.executable, "-m", "bench.pair", way, json.dumps(settings)]
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        self._answer()

    def round(self) -> dict[str, float]:
        """One round. Raises `SetupError` where the worker ended; its own words are on stderr."""
        with contextlib.suppress(BrokenPipeError):  # it died since; the answer tells
            self.process.stdin.write("round\n")
            self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the process and wait for it."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise SetupError(f"{self.way} ended with exit status {self.process.wait()}, as told above.")
        return json.loads(line)


def serve(way: str, settings: dict) -> None:
    """In the worker: set up, then a round for every line on stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    module, function = way.split(":")
    one_round: Round = getattr(importlib.import_module(module), function)(**settings)
    print("{}", file=answers, flush=True)
    for _ in sys.stdin:
        numbers = one_round()
        peak = peak_memory_gb(choose_device(224, 1).torch_device)
        print(json.dumps({**numbers, "peak_memory_gb": round(peak, 3)}), file=answers, flush=True)


def take_turns(ways: dict[str, tuple[str, dict]], rounds: int = ROUNDS, warmup: int = 1) -> Case:
    """`rounds` rounds of every way in turn, after `warmup` that are not counted.

    `ways`: label -> ("module:function", the settings that it is called with).
    """
    case = Case({label: {} for label in ways})
    workers: dict[str, Worker] = {}
    try:
        for label, (way, settings) in ways.items():
            workers[label] = Worker(way, settings)
        for number in range(-warmup, rounds):
            for label, worker in workers.items():
                for name, value in worker.round().items():
                    if number >= 0:
                        case.measured[label].setdefault(name, []).append(value)
    finally:
        for worker in workers.values():
            worker.stop()
    return case


def spread(summary: dict[str, float]) -> str:
    """`median [low, high]` to three digits."""
    return "{} [{}, {}]".format(*(short(summary[key]) for key in ("median", "low", "high")))


def hardware_folder() -> Path:
    """`bench/results/<hardware>`: results of different machines stand side by side."""
    name = choose_device(224, 1).name.lower()
    return RESULTS / "-".join("".join(c if c.isalnum() else " " for c in name).split())


def save(benchmark: str, data: str, rows: dict[str, dict], **more: object) -> Path:
    """Write `<hardware>/<benchmark>.json`: what was measured, on what, with which versions."""
    path = hardware_folder() / f"{benchmark}.json"
    write_json(
        path,
        {
            "benchmark": benchmark,
            "command": f"python -m bench.{benchmark}",
            "hardware": choose_device(224, 1).name,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "git_commit": git_commit(),
            "data": data,
            **more,
            "rows": rows,
        },
    )
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def report_errors(main: Callable[[], None]) -> None:
    """Run a benchmark's `main`; a `SetupError` is one message and exit status 2."""
    try:
        main()
    except SetupError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
