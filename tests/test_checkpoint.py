"""Checkpoints: whole or absent, two generations, damage seen and named."""

from __future__ import annotations

import json
import os

import pytest
import torch

from src import SetupError, checkpoint
from src.checkpoint import load_newest, save
from src.files import read_json, write_atomically, write_json


def payload(step: int) -> dict:
    return {"progress": {"epoch": step}, "model": {"weight": torch.full((3,), float(step))}, "best": {}}


def three(folder):
    for step in (1, 2, 3):
        save(folder, step, payload(step))
    return folder


def test_round_trip_and_two_generations(tmp_path):
    assert load_newest(tmp_path) is None
    three(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"checkpoint-{step:09d}.{kind}" for step in (2, 3) for kind in ("json", "pt")
    ]
    loaded = load_newest(tmp_path)
    assert loaded["progress"] == {"epoch": 3}
    assert torch.equal(loaded["model"]["weight"], torch.full((3,), 3.0))


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip_a_byte,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "other hash": lambda path: path.with_suffix(".json").write_text(json.dumps({"sha256": "0" * 64})),
    "torn manifest": lambda path: path.with_suffix(".json").write_text('{"step": 3, "sha'),
    "no hash": lambda path: path.with_suffix(".json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_named_and_the_one_before_it_used(tmp_path, damage, capsys):
    DAMAGES[damage](three(tmp_path) / "checkpoint-000000003.pt")
    assert load_newest(tmp_path)["progress"] == {"epoch": 2}
    said = capsys.readouterr()
    assert "checkpoint-000000003.pt is damaged" in said.out + said.err


def test_all_damaged_is_none_and_said(tmp_path, capsys):
    assert load_newest(tmp_path) is None and capsys.readouterr().out == ""
    for path in three(tmp_path).glob("*.pt"):
        flip_a_byte(path)
    assert load_newest(tmp_path) is None
    assert f"no checkpoint in {tmp_path} is whole: training starts anew" in capsys.readouterr().out


def test_a_new_start_after_damage_keeps_what_it_saves(tmp_path):
    for path in three(tmp_path).glob("*.pt"):
        flip_a_byte(path)
    save(tmp_path, 1, payload(1))
    assert load_newest(tmp_path)["progress"] == {"epoch": 1}


def test_a_damaged_one_is_no_generation(tmp_path):
    """A run that passed over number 3 has two whole ones again with its first save."""
    flip_a_byte(three(tmp_path) / "checkpoint-000000003.pt")
    save(tmp_path, 4, payload(4))
    assert sorted(path.stem[-1] for path in tmp_path.glob("*.pt")) == ["2", "4"]
    flip_a_byte(tmp_path / "checkpoint-000000004.pt")
    assert load_newest(tmp_path)["progress"] == {"epoch": 2}


def test_what_people_keep_beside_checkpoints_stays(tmp_path):
    (tmp_path / "checkpoint-000000001.pt").mkdir()
    for name in ("checkpoint-before.pt", "checkpoint-000000001.pt/notes", "checkpoint-1.json"):
        (tmp_path / name).write_text("mine")
    for step in (2, 3, 4):
        save(tmp_path, step, payload(step))
    assert (tmp_path / "checkpoint-000000001.pt" / "notes").exists()
    assert (tmp_path / "checkpoint-before.pt").exists() and (tmp_path / "checkpoint-1.json").exists()
    assert load_newest(tmp_path)["progress"] == {"epoch": 4}


def test_a_checkpoint_without_manifest_is_not_one(tmp_path):
    (three(tmp_path) / "checkpoint-000000003.json").unlink()
    assert load_newest(tmp_path)["progress"] == {"epoch": 2}


def test_a_failing_write_leaves_the_old_file_and_no_partial(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fails(partial):
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(SetupError, match=r"file cannot be written \(disk full; .* MB are free there\)"):
        write_atomically(path, fails)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failing_save_leaves_the_checkpoints_before_it(tmp_path, monkeypatch):
    three(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def fails(_, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", fails)
    with pytest.raises(SetupError, match="checkpoint-000000004.pt cannot be written"):
        save(tmp_path, 4, payload(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert load_newest(tmp_path)["progress"] == {"epoch": 3}


def test_the_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """Whoever looks at the path sees the old file or the whole new one."""
    path, seen = tmp_path / "file", []
    path.write_text("old")
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append("fsync") or fsync(handle))
    monkeypatch.setattr(
        os, "replace", lambda a, b: seen.append(("replace", path.read_text())) or replace(a, b)
    )
    write_atomically(path, lambda partial: partial.write_text("new"))
    in_the_folder = ["fsync"] if os.name == "posix" else []  # the new name
    assert seen == ["fsync", ("replace", "old"), *in_the_folder] and path.read_text() == "new"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_loading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1, {"model": Evil()})
    with pytest.raises(SetupError, match="checkpoint-000000001.pt cannot be loaded"):
        load_newest(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_json_is_readable(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Köln", "values": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"name": "Köln", "values": [1, 2.5, None]}
    assert "Köln" in (tmp_path / "a.json").read_text(encoding="utf-8")
