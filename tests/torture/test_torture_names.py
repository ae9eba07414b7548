"""Tables come back cell for cell, whatever classes and files are called."""

from __future__ import annotations

import csv
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pytest
from conftest import encode, noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from test_experiment import own, paths
from torture.attempts import FULL, tries

from src import files, report
from src.answers import PLACES, answer_table, write_answers, write_submission
from src.evaluate import confusion, per_class, prediction_frame, read_predictions, write_predictions
from src.experiment import run
from src.files import as_meant, write_csv

# What programs take for a number, a missing value, a formula, the end of a cell or of a row.
ODD = (
    *("a,b", ";", "\t", '"', '""', '"quoted"', "'", 'say "so", twice', "a\nb", "a\rb", "a\r\nb", "\n", "\r"),
    *("=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(A1)", "=HYPERLINK(\"x\")", "\t=1", "\ufeff=1", "|", "%0A"),
    *("NA", "N/A", "nan", "NaN", "null", "None", "inf", "-inf", "True", "false", "#N/A", "<NA>", "1e5"),
    *("007", "1.0", "0x1F", "1_000", "1,5", "٣", "²", "2024-01-01", " lead", "trail ", " ", "\u3000"),
    *("\x0b", "\x0c", "\x1a", "\x1b[31m", "\x1c", "\x7f", "\x85", "\u2028", "\u200b", "\u202e", "\ufeff"),
    *("é", "e\u0301", "猫", "😀", "👩\u200d👧", "\U0010fffd", "a\\b", "\\n", "\\", "$\\frac$", "<b>", "%"),
)  # fmt: skip
piece = st.sampled_from(ODD) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
text = st.lists(piece, max_size=3).map("".join)
name = text.filter(bool)
file_name = st.tuples(name.map(lambda each: each.replace("/", "")), st.sampled_from([".png", ".JPG"])).map(
    "".join
)
in_a_folder = st.tuples(st.sampled_from(["", "test/", "a,b/"]), file_name).map("".join)


def by_csv(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def by_pandas(path: Path) -> list[list[str]]:
    """As `src.evaluate` reads: every cell as text."""
    options = {"dtype": str, "na_filter": False, "encoding": "utf-8-sig", "header": None}
    return pd.read_csv(path, **options).to_numpy().tolist()


def inert(cell: object) -> str:
    """What may not run in a spreadsheet has an apostrophe in front, and stays apart from what had one."""
    is_formula = isinstance(cell, str) and cell.lstrip("'").startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if is_formula else str(cell)


def cells(table: pd.DataFrame) -> list[list[str]]:
    """A table's header and rows as text; what is missing is empty."""
    rows = table.astype(object).where(table.notna(), "").to_numpy().tolist()
    return [[inert(cell) for cell in row] for row in ([*table.columns], *rows)]


def require_same(path: Path, expected: list[list[str]]) -> None:
    assert by_csv(path) == expected
    assert by_pandas(path) == expected


def logits(n: int, n_classes: int) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, n_classes)).round(1)


def predictions(path: Path, ids: list[str], wnids: list[str], names: list[str]) -> None:
    labels_N = np.arange(len(ids)) % len(wnids)
    frame = prediction_frame(logits(len(ids), len(wnids)), labels_N, ids, wnids, names)
    write_predictions(frame, path)
    assert_frame_equal(read_predictions(path), frame)
    require_same(path, cells(frame))


def per_class_tables(path: Path, ids: list[str], wnids: list[str], names: list[str]) -> None:
    """Accuracy by class, and the counts of one class taken for another, whose header names the classes."""
    labels_N = np.arange(len(ids)) % len(wnids)
    frame = prediction_frame(logits(len(ids), len(wnids)), labels_N, ids, wnids, names)
    table = per_class(frame)
    write_csv(table, path)
    require_same(path, cells(table))
    counted = pd.DataFrame(confusion(frame, len(names)), names, names).rename_axis("truth")
    write_csv(counted, path, index=True)
    require_same(path, cells(counted.reset_index(allow_duplicates=True)))


def answers(path: Path, ids: list[str], wnids: list[str], names: list[str]) -> None:
    table = answer_table(ids, logits(len(ids), len(wnids)), wnids, names)
    write_csv(table, path)
    require_same(path, cells(table))


def submission(path: Path, ids: list[str], wnids: list[str], names: list[str]) -> None:
    by_name = {PurePosixPath(image).name: image for image in ids}
    said = {image: wnids[i % len(wnids)] for i, image in enumerate(by_name)}
    write_submission(path, list(by_name.values()), list(said.values()))
    require_same(path, [["image_id", "class"], *(list(row) for row in sorted(said.items()))])


@pytest.fixture
def unflushed(monkeypatch) -> None:
    """Tables are not brought to the disk: they are many, and read at once."""
    monkeypatch.setattr(files, "flush", lambda path: None)


@pytest.mark.usefixtures("unflushed")
@pytest.mark.parametrize("kind", [predictions, per_class_tables, answers, submission])
def test_tables_come_back_cell_for_cell(kind: Callable, tmp_path, tally):
    """A table of one to four images an attempt; classes may be told apart by a blank alone."""
    attempts = tally("names")
    classes = st.lists(
        st.tuples(name, name), min_size=2, max_size=4, unique_by=(lambda c: c[0], lambda c: c[1])
    )
    images = st.lists(in_a_folder, min_size=1, max_size=4, unique=True)

    @settings(
        max_examples=tries(2500, 25),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(images, classes)
    def attempted(ids, pairs):
        wnids, names = map(list, zip(*pairs, strict=True))
        with attempts.attempt(f"{kind.__name__}({ids!r}, {wnids!r}, {names!r})"):
            kind(tmp_path / "table.csv", ids, wnids, names)

    attempted()


@given(text)
def test_nothing_runs_and_everything_comes_back(each):
    """What OWASP lists as the beginning of a formula."""
    written = files._inert(each)
    assert not written.startswith(("=", "+", "-", "@", "\t", "\r")) and as_meant(written) == each


@pytest.mark.usefixtures("unflushed")
@pytest.mark.parametrize("column", range(5))
def test_each_odd_cell_comes_back_at_each_place(column, tmp_path, tally):
    """First, last, beside numbers, in the header."""
    attempts = tally("names")
    for each in ODD:
        table = pd.DataFrame({"a": ["x", "y"], "n": [1, 2], "b": ["x", "y"], "f": [0.5, 1.5]})
        if column == 4:
            table = table.rename(columns={"b": each})
        else:
            table.isetitem(column, [each, "y"])
        with attempts.attempt(f"{each!r} at {column}"):
            write_csv(table, tmp_path / "t.csv")
            require_same(tmp_path / "t.csv", cells(table))


# ----------------------------------------------------------------------------------------- on the disk


def possible(names: tuple[str, ...]) -> list[str]:
    """Those that a folder or file can have, and that do not hide it."""
    return [each for each in names if each.strip() and "/" not in each and not each.startswith(".")]


def differing(names: list[str]) -> list[str]:
    """One of each group that only case, blanks or the form of letters tell apart: those are refused."""
    return list({unicodedata.normalize("NFC", n).casefold().strip(): n for n in names}.values())


FIGURES = ("training_curve", "right_and_wrong", "class_samples", "confusion_figure", "save")


def without_figures(monkeypatch) -> None:
    """They are most of a report's time."""
    for function in FIGURES:
        monkeypatch.setattr(report, function, lambda *arguments: None)


def write_odd(
    data: Path, unlabelled: Path, classes: list[str], images: list[str], rng: random.Random
) -> None:
    """In `data` 7 of the `images` a class, and all below `test/`; each in a folder in `unlabelled`."""
    for k, each in enumerate(classes):
        for split, n in (("train", 5), ("valid", 2)):
            folder = data / split / each
            folder.mkdir(parents=True)
            for i, file in enumerate(rng.sample(images, n)):
                (folder / f"{file}.png").write_bytes(encode(noise(100 * k + 10 * (n == 2) + i, (24, 24))))
    (data / "test").mkdir()
    for i, file in enumerate(images):
        (data / "test" / f"{file}.png").write_bytes(encode(noise(9000 + i, (24, 24))))
        (unlabelled / file).mkdir(parents=True)
        (unlabelled / file / f"{file}.png").write_bytes(encode(noise(9000 + i, (24, 24))))


def test_odd_classes_and_files_go_from_the_disk_to_every_table(weights, tmp_path, tally, monkeypatch):
    """A run and its answers, with classes and images of odd names; the disk says which is which."""
    attempts, rng = tally("names"), random.Random(0)
    if not FULL:
        without_figures(monkeypatch)
    classes = sorted(rng.sample(differing(possible(ODD)), tries(40, 7)))
    images = possible(ODD)
    data, unlabelled = tmp_path / "data", tmp_path / "unlabelled"
    write_odd(data, unlabelled, classes, images, rng)
    config = own(data, weights, "baseline", train__epochs=1)
    results = run(config, paths(tmp_path)).folder
    without_figures(monkeypatch)
    with attempts.attempt("the run's predictions"):
        frame = read_predictions(results / "baseline_validation_predictions.csv")
        named = [PurePosixPath(image).parts[1] for image in frame["Image_Id"]]
        assert frame["Ground_Truth_Name"].tolist() == frame["Ground_Truth_Wnid"].tolist() == named
        on_disk = {path.relative_to(data).as_posix() for path in (data / "valid").glob("*/*")}
        assert set(frame["Image_Id"]) == on_disk and len(frame) == len(on_disk)
    with attempts.attempt("the run's classes"):
        rows = by_csv(results / "baseline_per_class_accuracy.csv")
        assert [row[2] for row in rows[1:]] == list(map(inert, classes))
        rows = by_csv(results / "baseline_confusion_matrix.csv")
        assert rows[0][1:] == [row[0] for row in rows[1:]] == list(map(inert, classes))
    for place in ("", str(unlabelled)):
        with attempts.attempt(f"answers for {place or 'the test images'}"):
            out = tmp_path / f"answers{len(place)}.csv"
            write_answers(config, paths(tmp_path), place, out)
            header, *rows = by_csv(out)
            assert by_pandas(out) == [header, *rows] and header[1] == PLACES[0][0]
            expected = sorted(f"{f}/{f}.png" if place else f"test/{f}.png" for f in images)
            assert [row[0] for row in rows] == list(map(inert, expected))
            assert {row[1] for row in rows} <= set(map(inert, classes))
    with attempts.attempt("the submission"):
        rows = by_csv(tmp_path / "submission.csv")
        assert [row[0] for row in rows[1:]] == sorted(f"{file}.png" for file in images)
