"""The tables of README.md and bench/README.md about speed, from `bench/results/<hardware>/*.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

UNMEASURED = "not measured yet"
PREFIXES = {"arms": "from an empty cache to the last figure: "}  # of what a benchmark's rows are called
# A benchmark's rows in words, where the speed table says what their images were.
TOPICS = {
    "input": "batches and decoding",
    "start": "second start",
    "baseline": "epochs of the baseline arm",
    "train_step": "training step",
    "arms": "from an empty cache to the last figure",
}
# benchmark, row: the stages of the speed table
STAGES = (
    ("input", "train_224"),
    ("input", "plain_224"),
    ("input", "train_stored"),
    ("input", "decode"),
    ("start", "total"),
    ("baseline", "epochs_1"),
    ("baseline", "epochs_6"),
    ("baseline", "epochs_12"),
    ("baseline", "added_epoch"),
    ("train_step", "conventional"),
    ("train_step", "conventional_partial"),
    ("arms", "baseline_s"),
    ("arms", "improvement_s"),
    ("arms", "baseline_goal_s"),
    ("arms", "improvement_goal_s"),
)


def speed(root: Path) -> str:
    """One table for each machine that was measured, under the images it took; a line while no GPU was."""
    folders = sorted(path for path in (root / "bench" / "results").glob("*") if path.is_dir())
    tables = [_speed_table(folder) for folder in folders]
    if all("cpu-core" in folder.name for folder in folders):
        tables.append(f"On a GPU: {UNMEASURED}; `make bench` there adds a table.")
    return "\n\n".join(tables)


def _speed_table(folder: Path) -> str:
    stages = [row for stage in STAGES if (row := _stage([folder], *stage))]
    hardware = json.loads(next(folder.glob("*.json")).read_text(encoding="utf-8"))["hardware"]
    header = f"| {hardware} | conventional | here | times faster |\n| --- | --- | --- | --- |"
    return _taken(folder) + "\n".join([header, *map(_speed_row, stages)])


def _taken(folder: Path) -> str:
    """Which images every benchmark of the speed table took, as its file says."""
    taken = []
    for benchmark, topic in TOPICS.items():
        path = folder / f"{benchmark}.json"
        if path.exists() and (data := json.loads(path.read_text(encoding="utf-8")).get("data")):
            taken.append(f"{topic} ({data})")
    return f"Images behind the rows, so many of each class: {'; '.join(taken)}.\n\n" if taken else ""


def _speed_row(row: dict) -> str:
    ratio = row["ratio"]
    cells = (
        row["what"],
        *(_measured(row[way], row["unit"]) for way in ("conventional", "ours")),
        f"**{ratio['median']:.1f}** [{ratio['low']:.1f}, {ratio['high']:.1f}]",
    )
    return f"| {' | '.join(cells)} |"


def _stage(folders: list[Path], benchmark: str, row: str) -> dict | None:
    """The first machine's measurement of a stage."""
    for path in (folder / f"{benchmark}.json" for folder in folders):
        if path.exists() and row in (rows := json.loads(path.read_text(encoding="utf-8"))["rows"]):
            measured = rows[row]
            return measured | {"what": PREFIXES.get(benchmark, "") + measured["what"]}
    return None


def _measured(summary: dict, unit: str) -> str:
    return f"{short(summary['median'])} {unit}"


def short(value: float) -> str:
    """Three digits, or whole thousands."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def steps(root: Path) -> str:
    """The training step at every batch and setting, machine by machine."""
    head = (
        "images/s | the same without input | waiting for data | share of roofline | peak memory | first step"
    )
    tables = []
    for hardware, rows in _measurements(root, "train_step"):
        lines = [f"| {hardware} | {head} |", "| --- " * 7 + "|"]
        for name, row in rows.items():
            if "resident" in row:
                cells = (
                    name,
                    f"{row['ours']['median']:.3g}",
                    f"{row['resident']['median']:.3g}",
                    f"{row['waited']['median']:.1%}",
                    f"{row['share_of_roofline_fused']:.0%} of {row['roofline_fused']:.3g}",
                    f"{row['peak_memory_gb']:.2f} GB",
                    f"{row['first_step_s']['median']:.1f} s",
                )
                lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def growth(root: Path) -> str:
    """How time and memory grow, and the large store, machine by machine."""
    tables = []
    for hardware, rows in _measurements(root, "scaling"):
        lines = [f"| {hardware} | sizes | seconds | peak memory, GB | exponent |", "| --- " * 5 + "|"]
        for row in rows.values():
            cells = [
                " · ".join(f"{value:,.3g}" for value in row[key]) for key in ("seconds", "peak_memory_gb")
            ]
            sizes = " · ".join(f"{size:,}" for size in row["sizes"])
            lines.append(f"| {row['what']} | {sizes} | {cells[0]} | {cells[1]} | {row['exponent']:.2f} |")
        tables.append("\n".join(lines))
    for hardware, rows in _measurements(root, "large_store"):
        lines = [f"| {hardware}: 20 GB store | images/s | own memory | files mapped |", "| --- " * 4 + "|"]
        for row in rows.values():
            peaks = " | ".join(f"{row[key]['high']:.2f} GB" for key in ("own_gb", "mapped_gb"))
            lines.append(f"| {row['what']} | {row['images_per_s']['median']:,.0f} | {peaks} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def hotspots(root: Path) -> str:
    """The operations that dominate each stage, machine by machine."""
    tables = []
    for hardware, rows in _measurements(root, "hotspots"):
        lines = [f"| {hardware} | time of its own |", "| --- | --- |"]
        for name, row in rows.items():
            shares = [f"`{op}` {share:.0%}" for op, share in row["shares"].items() if share >= 0.03]
            lines.append(f"| {name} | {', '.join(shares)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _measurements(root: Path, benchmark: str) -> Iterator[tuple[str, dict]]:
    """(hardware, rows) of every machine that a benchmark ran on."""
    for path in sorted((root / "bench" / "results").glob(f"*/{benchmark}.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        yield measured["hardware"], measured["rows"]
