"""Disks that are full, files that may not grow, folders that cannot be written to."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load
from torture.attempts import FULL, tries
from torture.warm import Ended, Warm, command

from src.checkpoint import load_newest, require_whole
from src.files import read_json

# What the warm process runs first: it moves into a namespace of its own, where it may mount, and takes a
# fault as the first argument of every command line.
PREAMBLE = """
import os, resource, subprocess, sys

place, read_only, mounts = {place!r}, {read_only!r}, {mounts}
if mounts and "IN_ITS_NAMESPACE" not in os.environ:
    os.environ["IN_ITS_NAMESPACE"] = "1"
    os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.orig_argv[1:]])
if mounts:
    for folder in (place, read_only):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro", read_only], check=True)
    subprocess.run(["mount", "--bind", "/dev/full", "/dev/full"], check=True)  # nobody may move a file there

from src import commands, report

report.DPI = 40  # figures are most of what a run costs
run, moves = commands.main, 0


def fill(left):
    "Another program takes the whole disk, but for `left` bytes."
    disk = os.statvfs(place)
    ballast = os.open(os.path.join(place, "ballast"), os.O_CREAT | os.O_WRONLY)
    room = disk.f_bavail * disk.f_frsize - left
    if room > 0:
        os.posix_fallocate(ballast, os.fstat(ballast).st_size, room)
    os.close(ballast)


def watch(moment, left):
    "Fill the disk when so many files and folders have been moved into their place."
    # With nothing left it stays full: what the command deletes is taken before it opens the next file.

    waits, filling = True, False

    def hook(event, arguments):
        nonlocal waits, filling
        global moves
        due = waits or (left == 0 and event == "open")
        if due and moves >= moment and not filling:  # at whatever comes after that move
            waits, filling = False, True
            fill(left)
            filling = False
        if event == "os.rename" and str(arguments[1]).startswith(place):
            moves += 1

    sys.addaudithook(hook)


def main(arguments):
    fault, *arguments = arguments
    kind, *numbers = fault.split()
    if kind == "full":
        watch(*map(int, numbers))
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(numbers[0]), resource.RLIM_INFINITY))
    status = run(arguments)
    print("moves", moves)
    return status


commands.main = main
"""
NEVER = 10**6  # moves


@dataclass
class Disk:
    """A warm process with a small disk of its own at `inside`, which is `outside` for everyone else.

    `read_only`: a disk that cannot be written to. `mounts`: whether these two are disks, or plain folders.
    """

    warm: Warm
    inside: Path
    read_only: Path
    mounts: bool
    failed: set[str] = field(default_factory=set)

    @property
    def outside(self) -> Path:
        return Path(f"/proc/{self.warm.process.pid}/root{self.inside}") if self.mounts else self.inside

    def run(self, fault: str, arguments: list[str]) -> Ended:
        return self.warm.run([fault, *arguments])

    def make_room(self) -> None:
        (self.outside / "ballast").unlink(missing_ok=True)

    def refuses(self, ended: Ended) -> str:
        """What an error says: one message that names a file or folder and what to do, and exit status 2."""
        assert ended.statuses == [2], ended.said[-3000:]
        _, *messages = re.split(r"(?:^|[\r\n])error: ", ended.said)
        assert "Traceback" not in ended.said and len(messages) == 1, ended.said[-3000:]
        message = messages[0].rpartition("moves ")[0]
        assert len(message) < 1000 and message.count("\n") <= 3, message
        path = re.search(rf"({self.inside}|{self.read_only})\S*", message)
        assert path, message
        assert re.search("Make room|Choose another|pass another|choose another", message), message
        self.failed.add(kind_of(Path(path[0].rstrip(":,.;"))))
        return message


def arguments_of(folder: Path, inputs: Path) -> list[str]:
    """A frozen backbone, so that features are written as well; the store is no larger than the rest."""
    return command(folder, "baseline", inputs, data__stored_size=32)


def kind_of(path: Path) -> str:
    """What sort of a file it is; a folder's name for a folder."""
    if "stores" in path.parts or "features" in path.parts:
        return "store" if "stores" in path.parts else "features"
    return path.name.split("-")[0] if path.name.startswith("checkpoint") else path.suffix or path.name


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Iterator[Disk]:
    inside, read_only = (tmp_path_factory.mktemp(name) for name in ("small", "read_only"))
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(inside)]
    try:
        mounts = not subprocess.run(probe, capture_output=True).returncode
    except OSError:  # not Linux
        mounts = False
    preamble = PREAMBLE.format(place=str(inside), read_only=str(read_only), mounts=mounts)
    with Warm(tmp_path_factory.mktemp("warm"), preamble) as warm:
        yield Disk(warm, inside, read_only, mounts)


@pytest.fixture
def mounted(disk) -> Disk:
    if not disk.mounts:
        pytest.skip("this machine lets nobody mount: unshare -rm mount -t tmpfs")
    return disk


@dataclass(frozen=True)
class Whole:
    """What a run leaves that nothing disturbed: its results by name, bytes in all, moves into place."""

    results: dict[str, bytes]
    size: int
    moves: int


@pytest.fixture(scope="module")
def whole(disk, inputs) -> Whole:
    ended = disk.run(f"full {NEVER} 0", arguments_of(disk.inside / "whole", inputs))
    assert ended.statuses == [0], ended.said
    folder = disk.outside / "whole"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    results = {path.name: path.read_bytes() for path in (folder / "results" / "Baseline").iterdir()}
    return Whole(results, size, int(ended.said.rpartition("moves ")[2]))


def require_nothing_torn(folder: Path, whole: Whole) -> None:
    """Every file below `folder` is one that was written to its end; nothing half-written is left behind."""
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert not [name for name in names if "partial" in name], names
    for name, content in whole.results.items():
        path = folder / "results" / "Baseline" / name
        if name != "metrics.json" and path.exists():  # which holds seconds
            assert path.read_bytes() == content, name
    checks = {
        ".json": json.loads,
        ".png": lambda data: Image.open(io.BytesIO(data)).load(),
        ".npy": lambda data: np.load(io.BytesIO(data)),
        ".npz": lambda data: dict(np.load(io.BytesIO(data))),
        ".safetensors": load,
    }
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in checks:
            checks[path.suffix](path.read_bytes())
    for manifest in folder.rglob("checkpoint-*.json"):
        require_whole(manifest)
        assert load_newest(manifest.parent)


def survives(disk: Disk, fault: str, arguments: list[str], folder: Path, whole: Whole) -> None:
    """The command ends with one error, or well; with room it then ends as if nothing had happened."""
    first = disk.run(fault, arguments)
    if first.statuses != [0]:
        disk.refuses(first)
    require_nothing_torn(folder, whole)
    disk.make_room()
    last = disk.run("none", arguments)
    assert last.statuses == [0], last.said[-3000:]
    require_nothing_torn(folder, whole)
    found = {path.name: path.read_bytes() for path in (folder / "results" / "Baseline").iterdir()}
    assert found.keys() == whole.results.keys()
    assert read_json(folder / "results" / "Baseline" / "metrics.json")["n"] == 8


def faults_of_a_full_disk(whole: Whole) -> list[str]:
    """After so many moves into place so many bytes are free: every size of a disk, and every moment."""
    rng = random.Random(0)
    sizes = [f"full 0 {int((i + rng.random()) / 25 * whole.size)}" for i in range(25)]
    moments = [f"full {moment} 0" for moment in range(whole.moves)]
    return [*sizes, *moments] if FULL else sizes[12:13]


def test_a_full_disk(mounted, whole, inputs, tally):
    """The results of an earlier run lie there; the disk fills up; after that there is room again."""
    attempts = tally("disk_full")
    for number, fault in enumerate(faults_of_a_full_disk(whole)):
        with attempts.attempt(f"{fault} of {whole.size} bytes, {whole.moves} moves"):
            name = f"run{number}"
            folder = mounted.outside / name
            (folder / "results" / "Baseline").mkdir(parents=True)
            for file, content in whole.results.items():
                (folder / "results" / "Baseline" / file).write_bytes(content)
            try:
                survives(mounted, fault, arguments_of(mounted.inside / name, inputs), folder, whole)
            finally:
                mounted.make_room()
                shutil.rmtree(folder)
    if FULL:
        kinds = {"store", "features", "checkpoint", ".safetensors", ".npy", ".json", ".csv", ".png"}
        assert kinds <= mounted.failed


def test_files_that_may_not_grow(disk, whole, inputs, tally):
    """RLIMIT_FSIZE: the write that goes beyond fails at any byte, with room on the disk.

    The cache, with the largest files, is there already.
    """
    attempts = tally("disk_full")
    rng = random.Random(1)
    cache = disk.outside / "whole" / "cache"
    for number in range(tries(12, 1)):
        limit = int(1600 * 1.3 ** (number + rng.random()))  # what the command says goes to a file as well
        with attempts.attempt(f"at most {limit} bytes a file"):
            folder = disk.outside / f"limit{number}"
            shutil.copytree(cache, folder / "cache")
            survives(disk, f"limit {limit}", arguments_of(disk.inside / folder.name, inputs), folder, whole)


@pytest.mark.parametrize("name", ["results", "runs", "cache"])
def test_a_read_only_folder_is_refused_before_training(name, mounted, inputs, tally):
    with tally("disk_full").attempt(f"--{name} on a read-only disk"):
        folder = f"read only {name}"
        arguments = arguments_of(mounted.inside / folder, inputs)
        ended = mounted.run("none", [*arguments, f"--{name}", str(mounted.read_only)])
        message = mounted.refuses(ended)
        assert str(mounted.read_only) in message and f"--{name}" in message
        files = [path for path in (mounted.outside / folder).rglob("*") if path.is_file()]
        assert not files and "epoch" not in ended.said


def test_answers_into_a_full_device(mounted, whole, inputs, tally):
    """`--out /dev/full`: the device stays what it is, and nothing is left beside it."""
    with tally("disk_full").attempt("predict --out /dev/full"):
        arguments = ["predict", "--preset", *arguments_of(mounted.inside / "whole", inputs)]
        images = ["--images", str(inputs / "pets" / "valid"), "--out", "/dev/full"]
        ended = mounted.run("none", [*arguments, *images])
        message = ended.said.rpartition("error: ")[2]
        assert ended.statuses == [2] and "Traceback" not in ended.said, ended.said[-3000:]
        assert "/dev" in message and re.search("another|Make room", message), message
        assert Path("/dev/full").is_char_device() and not list(Path("/dev").glob(".*full*.partial"))
