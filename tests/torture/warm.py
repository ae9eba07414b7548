"""A process that has imported everything and runs each command line as a fork of itself.

A start then takes milliseconds, so that it can be killed hundreds of times.
"""

from __future__ import annotations

import glob
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How the processes of a command ended: statuses (negative: killed by a signal), and what they said."""

    statuses: list[int]
    said: str
    seconds: float


class Warm:
    """The process, for as long as the `with` block lasts. `preamble`: code that it runs first."""

    def __init__(self, folder: Path, preamble: str = "") -> None:
        self.log = folder / "said.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        here = str(Path(__file__).parents[1])
        code = (
            f"import sys; sys.path.insert(0, {here!r})\n{preamble}\nimport torture.warm\ntorture.warm.serve()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(300)

    def run(
        self, arguments: list[str], kill: int | None = None, after: float = 600.0, when: str = "", **how
    ) -> Ended:
        """The command line; process number `kill` gets SIGKILL `after` seconds, from `when` a glob matches.

        `processes=2`: one run in two processes, as `accelerate launch` starts them. `copies=2`: two runs.
        `more=[[...], [...]]`: what the command lines of several copies end with, each its own. `pause=1`:
        each waits a second before it writes its splits, as on a slow drive: several begin at once.
        """
        order = {"processes": 1, "copies": 1, "more": [], "pause": 0, **how, "arguments": arguments}
        order |= {"kill": kill, "after": after, "when": when}
        self.process.stdin.write(json.dumps({**order, "log": str(self.log)}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Ended(answer["statuses"], self.log.read_text(errors="replace"), answer["seconds"])


def command(folder: Path, arm: str, inputs: Path, **changes) -> list[str]:
    """A tiny run of everything, with a checkpoint at every read."""
    overrides = tiny.small(inputs / "weights.safetensors", **changes)
    return tiny.arguments(folder, arm, inputs / "pets", overrides)


def outputs(folder: Path, arm: str) -> dict[str, bytes]:
    """What a run leaves that may not depend on when it was cut off."""
    results, run = folder / "results" / arm.capitalize(), next((folder / "runs").iterdir())
    files = [results / f"{arm}_history.csv", results / f"{arm}_validation_predictions.csv"]
    files += [run / name for name in ("model.safetensors", "history.json", "valid_logits.npy")]
    return {path.name: path.read_bytes() for path in files}


def serve() -> None:
    """Obey orders from standard input, a line each."""
    import torch

    from src.commands import main

    for late in ("pandas", "sklearn.metrics", "src.report", "matplotlib.pyplot", "grad_cam"):
        try:
            __import__(late)
        except ImportError:
            continue
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        order["port"] = free_port()
        started = time.monotonic()
        n = max(order["processes"], order["copies"], len(order["more"]))
        children = [fork(main, order, rank) for rank in range(n)]
        statuses = wait_for(children, order["kill"], order["after"], order["when"])
        print(
            json.dumps({"statuses": statuses, "seconds": time.monotonic() - started}),
            file=answers,
            flush=True,
        )


def fork(main: Callable[[list[str]], int], order: dict, rank: int) -> int:
    """A child that runs the command line, as process `rank` of several where there are; its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        said = os.open(order["log"], mode | (os.O_TRUNC if rank == 0 else 0))
        os.dup2(said, 1)
        os.dup2(said, 2)
        if order["processes"] > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["processes"]}
            place |= {"LOCAL_WORLD_SIZE": order["processes"], "MASTER_PORT": order["port"]}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
        wait_before_splits(order["pause"])
        status = main(order["arguments"] + (order["more"][rank] if order["more"] else []))
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_before_splits(seconds: float) -> None:
    from src.data.splits import Splits

    save = Splits.save

    def save_later(self: Splits, path: Path) -> None:
        time.sleep(seconds)
        save(self, path)

    Splits.save = save_later


def wait_for(children: list[int], kill: int | None, after: float, when: str) -> list[int]:
    """Exit statuses of all; number `kill` is killed `after` seconds, from `when` a glob has a match."""
    statuses: dict[int, int] = {}
    moment = math.inf if when else time.monotonic() + after
    while len(statuses) < len(children):
        for pid in children:
            if pid not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(found[1])
        if moment == math.inf and any(glob.iglob(when, include_hidden=True)):
            moment = time.monotonic() + after
        if kill is not None and time.monotonic() >= moment and children[kill] not in statuses:
            os.kill(children[kill], signal.SIGKILL)
            kill = None
        time.sleep(0.0002 if when else 0.002)
    return [statuses[pid] for pid in children]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
