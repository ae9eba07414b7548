"""`make torture`: every fault in full, then the table of what was tried and what survived.

The ordinary suite tries a few of each (tests/torture). Rows of `results/reliability.csv` are replaced by what
ran, where it ran as often as is promised; `python -m tools.torture -k NAME` runs some of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from src.files import write_csv

ROOT = Path(__file__).resolve().parent.parent
TABLE = "results/reliability.csv"
COLUMNS = ("fault", "promise", "tried", "survived")
# Fault, promise and the figure, the number of attempts that is promised, by name; in the table's order.
FAULTS: dict[str, tuple[str, str, int]] = {
    "kill": (
        "kill -9 at any moment of a run",
        "no finished epoch is lost; history, weights and predictions end byte for byte as uninterrupted",
        220,
    ),
    "kill_write": ("kill -9 during a checkpoint's write", "there is always a whole checkpoint", 1000),
    "damaged_checkpoint": (
        "a checkpoint with flipped bits, cut short, torn, of another kind or missing",
        "detected and named; the one before it is used, or the run refused",
        1000,
    ),
    "disk_full": (
        "the disk is full, or a folder cannot be written to",
        "a clear error; what was there stays; a read-only folder fails before the first epoch",
        50,
    ),
    "drive": (
        "a network drive loses, cuts or garbles files",
        "the run works on the local disk; only verified copies come back",
        50,
    ),
    "bad_images": (
        "images that are cut short, mutated, empty, bombs or no images",
        "no crash; each is named with its reason (or left out and counted, on demand), or has the pixels "
        "that Pillow reads: a JPEG has no checksum",
        10_000,
    ),
    "image_modes": (
        "grey, CMYK, transparent, palette, 16-bit, animated, rotated images",
        "the right pixels: RGB, on white, scaled to 8 bits, first frame, upright; without a range, refused",
        150,
    ),
    "layouts": (
        "folders, lists and tables that contradict themselves",
        "refused before training, with the difference; clutter is harmless",
        30,
    ),
    "not_finite": (
        "NaN or infinity in the loss or a gradient",
        "the run stops before the weights change, and says where",
        100,
    ),
    "out_of_memory": (
        "a batch does not fit into the memory",
        "half as many images pass at once; the effective batch stays; recorded",
        20,
    ),
    "downloads": (
        "a server that cuts off, stalls, refuses, redirects or sends other bytes; a hub out of reach",
        "resumed, waited for, verified; nothing partial is used; the cache works offline",
        100,
    ),
    "archives": (
        "pickles with code, archives that point outside or unfold without end",
        "no code runs, nothing lands outside, bytes are bounded",
        2400,
    ),
    "names": (
        "class and file names with commas, quotes, line ends, formulas, any Unicode",
        "tables come back cell for cell; a spreadsheet runs none of it",
        10_000,
    ),
    "two_runs": (
        "several processes on one run's folder",
        "one works, the others end with a clear error",
        100,
    ),
    "batch_sizes": (
        "other batch sizes, another number of processes",
        "metrics are those of the rows, exactly; training agrees to rounding",
        194,
    ),
    "other_weights": (
        "weights of another tag, release or file in a run's folder",
        "refused, with what differs",
        7,
    ),
}


def gathered(records: Iterable[dict]) -> pd.DataFrame:
    """A row a fault from the records of single tests, in the table's order."""
    found = pd.DataFrame(records, columns=["name", "tried", "survived"])
    sums = found.groupby("name")[["tried", "survived"]].sum()
    rows = [(*FAULTS[name][:2], *map(int, sums.loc[name])) for name in FAULTS if name in sums.index]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def updated(before: pd.DataFrame, now: pd.DataFrame) -> pd.DataFrame:
    """The table with the rows of `now` in the place of those of the same fault.

    A fault that was tried less often than promised keeps its row: a test was skipped, left out or broke off.
    """
    now = now[now["tried"] >= now["fault"].map(figures())]
    rows = pd.concat([before[~before["fault"].isin(now["fault"])], now])
    order = {fault: place for place, fault in enumerate(figures())}
    known = rows[rows["fault"].isin(order)]
    return known.sort_values("fault", key=lambda faults: faults.map(order)).reset_index(drop=True)


def figures() -> dict[str, int]:
    """Attempts that are promised, by fault."""
    return {fault: figure for fault, _, figure in FAULTS.values()}


def shortfalls(table: pd.DataFrame, faults: Iterable[str]) -> list[str]:
    """A line for each of the faults that has no row, too few attempts, or attempts that did not survive."""
    rows = {row.fault: row for row in table.itertuples()}
    lines = []
    for fault in faults:
        row, figure = rows.get(fault), figures()[fault]
        if row is None:
            lines.append(f"{fault}: never tried, {figure:,} attempts are promised")
            continue
        if row.tried < figure:
            lines.append(f"{fault}: {row.tried:,} attempts, {figure:,} are promised")
        if row.survived < row.tried:
            lines.append(f"{fault}: {row.survived:,} of {row.tried:,} survived")
    return lines


def read(path: Path) -> pd.DataFrame:
    """The table as written; no row where it is not."""
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(COLUMNS))


def main(arguments: list[str]) -> int:
    """Run pytest over tests/torture in full, then write and print the table.

    Not 0 where pytest failed, or a fault was tried less often than promised: one of those that ran, where
    `arguments` may choose among them.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORTURE": "full", "TORTURE_RECORDS": folder}
        command = [sys.executable, "-m", "pytest", "tests/torture", "-n", "auto", "-q", *arguments]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        records = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("*.json")]
    now = gathered(records)
    table = updated(read(ROOT / TABLE), now)
    write_csv(table, ROOT / TABLE)
    print(table[["fault", "tried", "survived"]].to_string(index=False))
    lacks = shortfalls(now, now["fault"] if arguments else figures())
    kept = now["fault"][now["tried"] < now["fault"].map(figures())]
    for fault in kept:
        print(f"left out of {TABLE}: {fault}: a test was skipped, not chosen, or broke off")
    print(*lacks, sep="\n")
    if status:
        print(f"pytest failed: its exit status is {status}")
    return status or int(bool(lacks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
