"""A drive that loses, cuts and garbles files while the machine with the local disk goes away."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
from pathlib import Path

import pytest
from torture.attempts import tries
from torture.warm import command, outputs

from src import NotNow, backup
from src.backup import restore, save
from src.files import sha256


def lose(path: Path, rng: random.Random) -> None:
    path.unlink()


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def rename(path: Path, rng: random.Random) -> None:
    path.rename(path.with_name(path.name.replace(".tar", " (1).tar")))


FAULTS = (lose, cut, flip, empty, rename)


def test_the_machine_goes_and_the_drive_is_faulty(warm, inputs, tmp_path, tally):
    """The newest snapshot damaged, or both; the local disk gone: the run ends as an uninterrupted one."""
    attempts = tally("drive")
    whole = warm.run(command(tmp_path / "whole", "improvement", inputs))
    assert whole.statuses == [0], whole.said
    expected, rng = outputs(tmp_path / "whole", "improvement"), random.Random(0)
    for number in range(tries(50, 1)):
        folder, drive = tmp_path / str(number), tmp_path / f"drive{number}"
        arguments = [*command(folder, "improvement", inputs), "--backup", str(drive)]
        share, fault, n_damaged = (
            rng.uniform(0.3, 1.1),
            FAULTS[number % len(FAULTS)],
            rng.choice((0, 1, 1, 2)),
        )
        with attempts.attempt(f"killed after {share:.2f}, {fault.__name__} of the newest {n_damaged}"):
            warm.run(arguments, kill=0, after=share * whole.seconds)
            shutil.rmtree(folder / "runs")
            snapshots = sorted(drive.glob("*/snapshot-*.tar"))
            assert len(snapshots) <= 3  # two, and one whose write was cut off before the oldest went
            for path in snapshots[len(snapshots) - n_damaged :]:
                fault(path, rng)
            again = warm.run(arguments)
            assert again.statuses == [0], again.said
            assert ("restored improvement" in again.said) == (len(snapshots) > n_damaged), again.said
            assert outputs(folder, "improvement") == expected


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with two checkpoints, a probe's, and what does not belong into a snapshot."""
    folder = tmp_path / "runs" / "improvement-full"
    (folder / "probe").mkdir(parents=True)
    for name in ("run.json", "checkpoint-000000001.pt", "checkpoint-000000001.json", ".lock"):
        (folder / name).write_text(name)
    for name in ("checkpoint-000000002.pt", "checkpoint-000000002.json", "probe/checkpoint-000000009.pt"):
        (folder / name).write_text(name)
    (folder / ".checkpoint-000000003.pt.77.partial").write_text("half")
    return folder


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_snapshot_has_what_going_on_needs(run, tmp_path):
    assert save(run, tmp_path / "drive")
    there = files(run)
    shutil.rmtree(run)
    assert restore(tmp_path / "drive", run)
    names = (
        "run.json",
        "checkpoint-000000002.pt",
        "checkpoint-000000002.json",
        "probe/checkpoint-000000009.pt",
    )
    assert files(run) == {name: there[name] for name in names}


def test_two_are_kept_and_the_newest_comes_back(run, tmp_path):
    for number in range(11):
        (run / "run.json").write_text(str(number))
        assert save(run, tmp_path / "drive")
    assert len(list((tmp_path / "drive" / run.name).iterdir())) == 2
    shutil.rmtree(run)
    assert restore(tmp_path / "drive", run) and (run / "run.json").read_text() == "10"


def test_a_copy_that_reads_otherwise_removes_nothing(run, tmp_path, monkeypatch, capsys):
    """The drive says that all is well, and gives other bytes back."""
    for _ in range(2):
        assert save(run, tmp_path / "drive")
    before = {path.name for path in (tmp_path / "drive" / run.name).iterdir()}

    def garble(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:-7] + b"garbled")

    with monkeypatch.context() as patches:
        patches.setattr(backup.shutil, "copyfile", garble)
        assert not save(run, tmp_path / "drive")
    said = capsys.readouterr().out
    assert "does not read as it was written" in said and "the run goes on" in said
    assert before <= {path.name for path in (tmp_path / "drive" / run.name).iterdir()}
    shutil.rmtree(run)
    assert restore(tmp_path / "drive", run) and files(run)
    assert "is damaged" in capsys.readouterr().out


def test_a_drive_that_is_gone_does_not_stop_the_run(run, tmp_path, capsys):
    (tmp_path / "drive").write_text("not a folder any more")
    assert not save(run, tmp_path / "drive")
    assert "no snapshot in" in capsys.readouterr().out
    assert not list(run.parent.glob("tmp*")), "nothing is left behind"


def test_a_drive_that_does_not_answer_costs_no_snapshot(run, tmp_path, monkeypatch):
    """To pass over what cannot be read just now would start anew and, two snapshots later, lose it."""
    assert save(run, tmp_path / "drive")
    before = files(tmp_path / "drive")
    shutil.rmtree(run)

    def fail(source: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patches:
        patches.setattr(backup.shutil, "copyfile", fail)
        with pytest.raises(NotNow, match="Input/output error.*the drive is mounted"):
            restore(tmp_path / "drive", run)
    assert files(tmp_path / "drive") == before
    assert restore(tmp_path / "drive", run)


def test_a_snapshot_that_does_not_say_whose_it_is_stays_where_it_is(run, tmp_path, capsys):
    assert save(run, tmp_path / "drive")
    (run / "run.json").unlink()
    assert save(run, tmp_path / "drive")
    shutil.rmtree(run)
    assert restore(tmp_path / "drive", run) and (run / "run.json").exists()
    assert "does not say whose run it is" in capsys.readouterr().out


def test_nothing_to_restore(tmp_path):
    assert not restore(tmp_path / "drive", tmp_path / "runs" / "improvement-full")
    assert not (tmp_path / "runs" / "improvement-full").exists()


def test_a_foreign_archive_lands_nowhere_else(tmp_path):
    """A whole snapshot by its hash, made by somebody else: no path leaves the run's folder."""
    place = tmp_path / "drive" / "improvement-full"
    place.mkdir(parents=True)
    for number, name in enumerate(("../evil", str(tmp_path / "evil"), "a/../../evil")):
        with tarfile.open(place / "new.tar", "w") as archive:
            for each in (name, "run.json"):
                archive.addfile(tarfile.TarInfo(each), io.BytesIO())
        digest = sha256(place / "new.tar")
        (place / "new.tar").rename(place / f"snapshot-{number:06d}-{digest}.tar")
    run = tmp_path / "runs" / "improvement-full"
    restore(tmp_path / "drive", run)
    assert not list(tmp_path.rglob("evil")) or all(run in path.parents for path in tmp_path.rglob("evil"))
