"""`make readme`: the tables of both README files, each written anew between two markers.

Accuracies come from `results/*/metrics.json`, the ablation from `results/ablation/ablation.csv` (its summary
is written anew as well), speeds from `bench/results/<hardware>/*.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.tables import growth, hotspots, speed, steps
from src.ablation.table import about, markdown, read_summary, read_table, write_summary

ARMS = ("Baseline", "Improvement", "Best")
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
TRAINED = {
    "none": "frozen",
    "last_stage": "last stage trained",
    "last_two_blocks": "last two blocks trained",
    "all": "all layers trained",
}


def results(root: Path) -> str:
    """The study's rows, then one row per arm in `results/`."""
    files = [root / "results" / arm / "metrics.json" for arm in ARMS]
    rows = [_row(json.loads(path.read_text(encoding="utf-8"))) for path in files if path.exists()]
    return "\n".join([HEADER, REPORTED, *rows])


def ablation(root: Path) -> str:
    """What all rows of the ablation share, then a line a row."""
    folder = root / "results" / "ablation"
    if not (folder / "summary.csv").exists():
        return "not run yet: `make ablation`"
    table = markdown(read_summary(folder / "summary.csv"), ("row", "valid", "difference", "verdict"))
    return f"{about(read_table(folder))}.\n\n{table}"


PAGES = {
    "README.md": {"results": results, "ablation": ablation, "speed": speed},
    "bench/README.md": {"steps": steps, "growth": growth, "hotspots": hotspots},
}


def rewritten(text: str, root: Path, page: str = "README.md") -> str:
    """The page's text with its blocks replaced. Raises `ValueError` where a marker is missing."""
    for name, table in PAGES[page].items():
        before, begin, rest = text.partition(f"<!-- {name}:begin -->")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        if not (begin and end):
            raise ValueError(f"{page} lacks the markers <!-- {name}:begin --> ... <!-- {name}:end -->")
        text = f"{before}{begin}\n{table(root)}\n{end}{after}"
    return text


def _row(metrics: dict) -> str:
    low, high = 100 * metrics["wilson_low"], 100 * metrics["wilson_high"]
    size, tested = metrics["image_size"], metrics.get("test_size", metrics["image_size"])
    cells = (
        f"**{metrics['arm'].capitalize()}, here**",
        f"**{100 * metrics['accuracy']:.2f} %** [{low:.2f}, {high:.2f}]",
        f"`{metrics['backbone']}` ({TRAINED[metrics['config']['model']['trainable']]})",
        f"{size} px" if tested == size else f"{size} px, tested at {tested} px",
        f"{metrics['data']}, `{metrics['protocol']}`",
        f"best {metrics['best_epoch']} of {metrics['epochs']}",
        f"{metrics['hardware']}, {metrics['seconds']['total'] / 60:.1f} min",
    )
    return f"| {' | '.join(cells)} |"


def main(root: Path | None = None) -> int:
    root = root or Path(__file__).resolve().parent.parent
    if (root / "results" / "ablation" / "ablation.csv").exists():
        write_summary(root / "results" / "ablation")
    for page in PAGES:
        path = root / page
        path.write_text(rewritten(path.read_text(encoding="utf-8"), root, page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
