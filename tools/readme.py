"""`make readme`: the README's tables, each written anew between two markers.

Accuracies come from `results/*/metrics.json`, speeds from `bench/results/<hardware>/*.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

UNMEASURED = "not measured yet"
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
    ("arms", "baseline_s"),
    ("arms", "improvement_s"),
    ("arms", "baseline_goal_s"),
    ("arms", "improvement_goal_s"),
)
HEADER = (
    "| arm | accuracy, 95 % interval | backbone and weights | resolution | data, protocol | epochs "
    "| hardware, time |\n| --- | --- | --- | --- | --- | --- | --- |"
)
# As the study reports them; intervals by row from its prediction files, weights as its notebooks load them.
REPORTED = """\
| Baseline, reported by the study | 82.61 % [81.85, 83.34] | `convnext_tiny.in12k_ft_in1k` (frozen) | 224 px \
| tiny-imagenet, `published` | best 1 of 6 | A100, 10.8 min |
| Improvement, reported by the study | 86.30 % (86.31 by row [85.62, 86.97]) | `convnext_tiny.fb_in1k` \
(stage 4 trained) | 224 px | tiny-imagenet, `published` | best 7 of 12 | A100, 52.2 min |"""


def results(root: Path) -> str:
    """The study's rows, then one row per arm in `results/`."""
    files = [root / "results" / arm / "metrics.json" for arm in ("Baseline", "Improvement")]
    rows = [_row(json.loads(path.read_text(encoding="utf-8"))) for path in files if path.exists()]
    return "\n".join([HEADER, REPORTED, *rows])


def speed(root: Path) -> str:
    """One table for each machine that was measured; a GPU's cells say so while none was."""
    folders = sorted(path for path in (root / "bench" / "results").glob("*") if path.is_dir())
    tables = [_speed_table(folder) for folder in folders]
    if not any("cuda" in folder.name or "nvidia" in folder.name for folder in folders):
        stages = [_stage(folders, *stage)["what"] for stage in STAGES if _stage(folders, *stage)]
        cells = f"{UNMEASURED} | {UNMEASURED} | {UNMEASURED}"
        rows = [f"| {what} | {cells} |" for what in stages]
        tables.append("\n".join([_speed_header("A GPU (`make bench` fills this table)"), *rows]))
    return "\n\n".join(tables)


def _speed_table(folder: Path) -> str:
    stages = [row for stage in STAGES if (row := _stage([folder], *stage))]
    hardware = json.loads(next(folder.glob("*.json")).read_text(encoding="utf-8"))["hardware"]
    return "\n".join([_speed_header(hardware), *map(_speed_row, stages)])


def _speed_row(row: dict) -> str:
    ratio = row["ratio"]
    cells = (
        row["what"],
        *(_measured(row[way], row["unit"]) for way in ("conventional", "ours")),
        f"**{ratio['median']:.1f}** [{ratio['low']:.1f}, {ratio['high']:.1f}]",
    )
    return f"| {' | '.join(cells)} |"


def _speed_header(hardware: str) -> str:
    return f"| {hardware} | conventional | here | times faster |\n| --- | --- | --- | --- |"


def _stage(folders: list[Path], benchmark: str, row: str) -> dict | None:
    """The first machine's measurement of a stage."""
    for path in (folder / f"{benchmark}.json" for folder in folders):
        if path.exists() and row in (rows := json.loads(path.read_text(encoding="utf-8"))["rows"]):
            return rows[row]
    return None


def _measured(summary: dict, unit: str) -> str:
    value = summary["median"]
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def rewritten(text: str, root: Path) -> str:
    """README text with the blocks replaced. Raises `ValueError` where a marker is missing."""
    for name, table in (("results", results), ("speed", speed)):
        before, begin, rest = text.partition(f"<!-- {name}:begin -->")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        if not (begin and end):
            raise ValueError(f"README.md lacks the markers <!-- {name}:begin --> ... <!-- {name}:end -->")
        text = f"{before}{begin}\n{table(root)}\n{end}{after}"
    return text


def _row(metrics: dict) -> str:
    low, high = 100 * metrics["wilson_low"], 100 * metrics["wilson_high"]
    trained = {"none": "frozen", "all": "all layers trained"}[metrics["config"]["model"]["trainable"]]
    cells = (
        f"**{metrics['arm'].capitalize()}, here**",
        f"**{100 * metrics['accuracy']:.2f} %** [{low:.2f}, {high:.2f}]",
        f"`{metrics['backbone']}` ({trained})",
        f"{metrics['image_size']} px",
        f"{metrics['data']}, `{metrics['protocol']}`",
        f"best {metrics['best_epoch']} of {metrics['epochs']}",
        f"{metrics['hardware']}, {metrics['seconds']['total'] / 60:.1f} min",
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    readme = root / "README.md"
    readme.write_text(rewritten(readme.read_text(encoding="utf-8"), root), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
