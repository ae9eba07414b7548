"""Checkpoints that are damaged, foreign, of another version, or whose writer is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from conftest import encode, noise
from safetensors.torch import save
from torture.attempts import tries

from src import SetupError, checkpoint, train
from src.checkpoint import load_newest
from src.config import with_fields
from src.files import read_json, sha256, write_json
from src.train import Trainer

ROOT = Path(__file__).resolve().parents[2]
OLDER, NEWEST = "checkpoint-000000002", "checkpoint-000000003"


# ----------------------------------------------------------------------------------------------- damaged


def payload(step: int) -> dict:
    weight = torch.arange(500, dtype=torch.float32) * step
    return {"progress": {"epoch": step}, "model": {"weight": weight}, "best": {}}


def is_payload(found: dict | None, step: int) -> bool:
    expected = payload(step)
    return (
        found is not None
        and found["progress"] == expected["progress"]
        and torch.equal(found["model"]["weight"], expected["model"]["weight"])
    )


@pytest.fixture
def three(tmp_path) -> Callable[[], Path]:
    """`three()` -> a folder after three saves: checkpoints 2 and 3 are there, and 2 seems to be the later."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "whole", step, payload(step))

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
        for path in folder.glob(f"{OLDER}.*"):
            os.utime(path, (2**32, 2**32))
        return folder

    return fresh


def files_of(folder: Path) -> dict[str, bytes]:
    """What the files say: a manifest's last line end says nothing."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return {p.name: p.read_bytes().rstrip(b"\n" if p.suffix == ".json" else b"") for p in files}


def flipped(data: bytes, rng: random.Random, share: float) -> bytes:
    """One bit the other way, `share` into the file."""
    changed = bytearray(data)
    changed[int(share * len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def half_old(data: bytes, old: bytes, share: float) -> bytes:
    """Torn: new until `share`, then what lay there before."""
    place = int(share * len(data))
    return data[:place] + old[place : len(data)].ljust(len(data) - place, b"\0")


FOREIGN = {
    "an image": lambda: encode(noise(1)),
    "safetensors": lambda: save({"weight": torch.zeros(10)}),
    "text": lambda: b"step 3\n",
    "HTML": lambda: b"<!doctype html><title>Sign in</title>",
    "zeros": lambda: b"\0" * 4096,
    "nothing": lambda: b"",
}


def damages(rng: random.Random, n: int) -> list[tuple[str, Callable[[Path], None]]]:
    """What is done to the newest checkpoint, each a text that repeats it and a function of the folder."""

    def rewrite(suffix: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
        def act(folder: Path) -> None:
            path = folder / f"{NEWEST}.{suffix}"
            path.write_bytes(change(path.read_bytes()))

        return act

    def old(folder: Path) -> bytes:
        return (folder / f"{OLDER}.pt").read_bytes()

    def torn(share: float) -> Callable[[Path], None]:
        return lambda folder: rewrite("pt", lambda data: half_old(data, old(folder), share))(folder)

    found = []
    for i in range(n):
        share = (i + rng.random()) / n
        seed = rng.randrange(10**6)
        for suffix in ("pt", "json"):

            def flip(data: bytes, seed: int = seed, share: float = share) -> bytes:
                return flipped(data, random.Random(seed), share)

            def cut(data: bytes, share: float = share) -> bytes:
                return data[: int(share * len(data))]

            found.append((f"{suffix}: a bit flipped at {share:.4f}, seed {seed}", rewrite(suffix, flip)))
            found.append((f"{suffix}: cut at {share:.4f}", rewrite(suffix, cut)))

        def zeros(data: bytes, share: float = share) -> bytes:
            return data[: int(share * len(data))].ljust(len(data), b"\0")

        def longer(data: bytes, seed: int = seed) -> bytes:
            return data + random.Random(seed).randbytes(1 + seed % 999)

        found.append((f"pt: zeros from {share:.4f}", rewrite("pt", zeros)))
        found.append((f"pt: longer, seed {seed}", rewrite("pt", longer)))
        found.append((f"pt: torn at {share:.4f}, then the one before it", torn(share)))
    for name, content in FOREIGN.items():
        for suffix in ("pt", "json"):
            found.append((f"{suffix}: {name}", rewrite(suffix, lambda _, content=content: content())))
    return found + list(ODD.items())


def swapped(folder: Path) -> None:
    """Each manifest with the other's file."""
    a, b = (folder / f"{stem}.json" for stem in (OLDER, NEWEST))
    shutil.copy(a, b)


def renamed(folder: Path) -> None:
    for suffix in ("pt", "json"):
        shutil.copy(folder / f"{OLDER}.{suffix}", folder / f"{NEWEST}.{suffix}")


def in_its_place(suffix: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / f"{NEWEST}.{suffix}").unlink()
        (folder / f"{NEWEST}.{suffix}").mkdir()

    return act


def manifest_of(about: object) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / f"{NEWEST}.json", about)


ODD: dict[str, Callable[[Path], None]] = {
    "the manifest is that of the one before": swapped,
    "the one before, under the newest's name": renamed,
    "a folder in the place of the file": in_its_place("pt"),
    "a folder in the place of the manifest": in_its_place("json"),
    "no file": lambda folder: (folder / f"{NEWEST}.pt").unlink(),
    "no manifest": lambda folder: (folder / f"{NEWEST}.json").unlink(),
    "a manifest that is a list": manifest_of([3, "abc"]),
    "a manifest that is a number": manifest_of(3),
    "a manifest without a hash": manifest_of({"step": 3}),
    "a manifest of no step": manifest_of({"sha256": "0" * 64}),
    "a manifest of a text": manifest_of({"step": "3", "sha256": None}),
    "a manifest without end": lambda folder: (folder / f"{NEWEST}.json").write_text("[" * 100_000),
}


def test_damaged_is_named_and_the_one_before_it_used(three, tally, capsys):
    """And the next save leaves two whole ones again, whatever lay in between."""
    attempts = tally("damaged_checkpoint")
    for what, damage in damages(random.Random(0), tries(140, 3)):
        with attempts.attempt(what):
            folder = three()
            whole = files_of(folder)
            damage(folder)
            found, said = load_newest(folder), capsys.readouterr().out
            if files_of(folder) == whole:  # torn where the old end is the new one, say
                assert is_payload(found, 3)
                continue
            assert is_payload(found, 2)
            assert f"{NEWEST}.pt is damaged" in said and "Traceback" not in said
            checkpoint.save(folder, 4, payload(4))
            assert is_payload(load_newest(folder), 4)
            assert (folder / f"{OLDER}.pt").exists() and (folder / f"{OLDER}.json").exists()


def test_both_damaged_starts_anew_and_says_so(three, tally, capsys):
    attempts = tally("damaged_checkpoint")
    rng = random.Random(1)
    for _ in range(tries(20, 3)):
        share = rng.random()
        with attempts.attempt(f"both cut at {share:.4f}"):
            folder = three()
            for path in folder.glob("*.pt"):
                path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
            assert load_newest(folder) is None
            said = capsys.readouterr().out
            assert f"{OLDER}.pt is damaged" in said and f"{NEWEST}.pt is damaged" in said
            assert "training starts anew" in said


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_content_with_its_own_hash_is_refused(name, three, tally):
    """Whoever wrote file and manifest, it was not this program: the run stops before anything is lost."""
    with tally("damaged_checkpoint").attempt(name):
        folder = three()
        path = folder / f"{NEWEST}.pt"
        path.write_bytes(FOREIGN[name]())
        write_json(path.with_suffix(".json"), {"step": 3, "sha256": sha256(path)})
        with pytest.raises(SetupError) as caught:
            load_newest(folder)
        assert str(path) in str(caught.value) and "Delete it" in str(caught.value)
        assert len(str(caught.value)) < 1000


# -------------------------------------------------------------------------------------- another version


def without(section: str, key: str) -> Callable[[dict], None]:
    return lambda saved: saved[section].pop(key)


def other_shape(saved: dict) -> None:
    saved["model"]["classifier.weight"] = torch.zeros(7, 3)


def fewer_groups(saved: dict) -> None:
    saved["optimizer"]["param_groups"].pop()


def fewer_parameters(saved: dict) -> None:
    saved["optimizer"]["param_groups"][0]["params"].pop()


def other_moments(saved: dict) -> None:
    state = saved["optimizer"]["state"]
    state[next(iter(state))]["exp_avg"] = torch.zeros(3)


OTHER_VERSIONS: dict[str, Callable[[dict], object]] = {
    "progress lacks a field": without("progress", "bad_epochs"),
    "progress has another field": lambda saved: saved["progress"].update(patience=3),
    "no progress": lambda saved: saved.pop("progress"),
    "no best state": lambda saved: saved.pop("best"),
    "no optimizer": lambda saved: saved.pop("optimizer"),
    "no averages": lambda saved: saved.pop("averages"),
    "a model without its classifier": without("model", "classifier.weight"),
    "a model with another layer": lambda saved: saved["model"].update({"extra.weight": torch.zeros(2)}),
    "a classifier of other classes": other_shape,
    "a best state without its classifier": without("best", "classifier.weight"),
    "an optimizer of fewer groups": fewer_groups,
    "an optimizer of fewer parameters": fewer_parameters,
    "an optimizer of other shapes": other_moments,
    "an average without its classifier": lambda saved: saved["averages"]["ema"]["state"].pop(
        "classifier.weight"
    ),
    "weights alone": lambda saved: [saved.pop(key) for key in list(saved) if key != "model"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Callable[[Path], Trainer], Path]:
    """A trainer of any folder, and the folder in which one has saved its first epoch."""
    folder = tmp_path_factory.mktemp("versions")
    config = tiny.config(train__ema_decay=0.9)
    built = tiny.build(folder)
    data = tiny.fit_data(built, config)

    def trainer(run: Path) -> Trainer:
        return Trainer(built.model, data, config, tiny.device(), run)

    first = trainer(folder / "run")
    first.train_epoch()
    first.end_epoch()
    return trainer, folder / "run"


def test_a_checkpoint_of_another_version_is_refused(trained, tmp_path, tally):
    attempts = tally("damaged_checkpoint")
    trainer, run = trained
    assert trainer(run).progress.epoch == 1
    saved_path = next(run.glob("*.pt"))
    for what, change in OTHER_VERSIONS.items():
        with attempts.attempt(what):
            saved = torch.load(saved_path, weights_only=True)
            change(saved)
            checkpoint.save(tmp_path / what, 3, saved)
            with pytest.raises(SetupError) as caught:
                trainer(tmp_path / what)
            said = str(caught.value)
            assert str(tmp_path / what) in said and "Traceback" not in said and len(said) < 1500
            assert is_whole(tmp_path / what / f"{NEWEST}.pt")


def is_whole(path: Path) -> bool:
    return read_json(path.with_suffix(".json"))["sha256"] == sha256(path)


def test_no_checkpoint_takes_the_place_of_another(trained, tmp_path, monkeypatch):
    """Not even that of an epoch's end that of its last step: a write over it would be cut off in between."""
    trainer, _ = trained
    numbers = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, saved: numbers.append(step))
    monkeypatch.setattr(train, "STEPS_BETWEEN_READS", 1)
    subject = trainer(tmp_path)
    subject.config = with_fields(subject.config, {"train.checkpoint_minutes": 0.0})
    for _ in range(2):
        subject.train_epoch()
        subject.end_epoch()
    assert len(numbers) == 2 * (len(subject.data.fit) + 1)
    assert numbers == sorted(set(numbers))


# ------------------------------------------------------------------------------- killed while it is written

WRITER = """
import hashlib, io, itertools, json, os, random, signal, struct, sys, time
from pathlib import Path
import torch
from src import checkpoint
from src.files import write_json

torch.set_num_threads(1)


def save_plainly(folder, step, payload):
    "The manifest first, then the file where the last one lies."
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    path = folder / "checkpoint-000000001.pt"
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    write_json(path.with_suffix(".json"), {"step": 1, "sha256": digest})
    with open(path, "wb") as file:
        file.write(buffer.getbuffer())


def payload(step):
    return {"step": step, "weight": torch.full((1_000_000,), float(step))}


def write_on(save, folder, first, pipe):
    for step in itertools.count(first):
        save(folder, step, payload(step))
        os.write(pipe, struct.pack("<q", step))


def killed_after(seconds, *writing):
    "Status of a writer that was killed, and the steps whose save had returned."
    heard, told = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            write_on(*writing, told)
        finally:
            os._exit(1)
    os.close(told)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(heard, "rb") as pipe:
        return status, [step for (step,) in struct.iter_unpack("<q", pipe.read())]


def rows(save, folder, kills):
    "Kill as many writers; a row for each. A plain writer's first loss is the last row."
    folder.mkdir()
    rng, last = random.Random(0), 0
    for number in range(kills):
        seconds = rng.uniform(0, 0.25)
        status, steps = killed_after(seconds, save, folder, last + 1)
        names, returned = sorted(os.listdir(folder)), max([last, *steps])
        found = checkpoint.load_newest(folder) or payload(0)
        last = found["step"]
        whole = torch.equal(found["weight"], payload(last)["weight"])
        row = {"number": number, "seconds": seconds, "status": status, "returned": returned}
        yield {**row, "found": last, "whole": whole, "names": names}
        if save is save_plainly and last < returned:
            return


folder, answer, kills = Path(sys.argv[1]), sys.stdout, int(sys.argv[2])
sys.stdout = open(os.devnull, "w")
ours = list(rows(checkpoint.save, folder / "ours", kills))
checkpoint.save(folder / "ours", 10**6, payload(10**6))
left = sorted(os.listdir(folder / "ours"))
plain = list(rows(save_plainly, folder / "plain", 60))
json.dump({"ours": ours, "left": left, "plain": plain}, answer)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict:
    """What 4 MB writers left that were killed at random moments: by our `save`, and by a plain write."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(folder), str(tries(1000, 10))],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_killed_in_a_write(killed, tally):
    attempts = tally("kill_write")
    for row in killed["ours"]:
        with attempts.attempt(f"kill {row['number']}, after {row['seconds']:.4f} s"):
            assert row["status"] == -9 and row["whole"] and row["found"] >= row["returned"]
    names = [name for row in killed["ours"] for name in row["names"]]
    assert any(name.endswith(".partial") for name in names)  # kills do hit a write
    assert len(killed["left"]) == 4 and not any(name.endswith(".partial") for name in killed["left"])


def test_a_plain_write_loses_a_checkpoint(killed):
    """The test above can fail: a kill tears what is written over the last one."""
    last = killed["plain"][-1]
    assert last["found"] < last["returned"]
