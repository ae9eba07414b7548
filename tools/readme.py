"""`make readme`: the tables of both README files, each written anew between two markers.

Accuracies come from `results/*/metrics.json`, the study's own from `results/study.json`, the audit from
`results/data/audit.json`, a study from the table of its runs (its summary is written anew as well), speeds
from `bench/results/<hardware>/*.json`.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pandas as pd

from bench.tables import growth, hotspots, speed, steps
from src import strangers
from src.config import STUDY_ARMS, preset
from src.evaluate import wilson
from src.files import write_csv
from src.studies import ABLATION, ANIMALS, FINE_GRAINED, STUDIES, TRANSFER, reported
from src.studies.fine_grained import costs
from src.studies.study import Study
from src.studies.table import about, markdown, read_summary, read_table, write_summary
from tools import torture

ARMS = ("Baseline", "Improvement", "Best")
HEADER = (
    "| arm | accuracy, 95 % interval | backbone and weights | resolution | data, protocol | epochs "
    "| hardware, time |\n| --- | --- | --- | --- | --- | --- | --- |"
)
COSTS = "costs.csv"  # of the study of fine-grained classes
PLACES = ("within_train", "within_valid", "between")
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
    said = json.loads((root / "results" / "study.json").read_text(encoding="utf-8"))
    of_study = [_reported(arm, said[arm.lower()]) for arm in ARMS if arm.lower() in said]
    return "\n".join([HEADER, *of_study, *rows])


def pretraining(root: Path) -> str:
    """What the weights that this repository ships reached, and in how long."""
    path = root / "results" / "Pretrain" / "metrics.json"
    if not path.exists():
        return "not run yet: `python -m src.experiment pretrain --profile offline --data DIR`"
    said = json.loads(path.read_text(encoding="utf-8"))
    low, high = 100 * said["wilson_low"], 100 * said["wilson_high"]
    return (
        f"**{100 * said['accuracy']:.2f} %** [{low:.2f}, {high:.2f}] of `valid`, "
        f"{100 * said['holdout_accuracy']:.2f} % of `holdout` ({said['n_holdout']:,} images); "
        f"`{said['backbone']}`, {said['image_size']} px, best {said['best_epoch']} of {said['epochs']} "
        f"epochs, {said['hardware']}, {said['seconds']['total'] / 60:.1f} min."
    )


def study(of: Study, root: Path, is_stand_in: bool = False) -> str:
    """What all rows of a study share, then a line a row."""
    folder = of.path(root / "results", is_stand_in)
    if not (folder / "summary.csv").exists():
        return f"not run yet: `python -m src.experiment {of.name} --profile offline --data DIR`"
    table = markdown(read_summary(folder / "summary.csv"), ("row", "valid", "ECE", "difference", "verdict"))
    return f"{about(of, read_table(of, folder))}.\n\n{table}"


def family(of: Study, root: Path) -> str:
    """What a study reports beside what was measured here; below it all rows, where they have been run.

    Then what was found of unknown classes, in the stand-in that has them, or what SCRA costs.
    """
    parts = [reported.markdown(reported.beside_reported(of, root / "results"))]
    for is_stand_in in (False, True):
        if (of.path(root / "results", is_stand_in) / "summary.csv").exists():
            parts.append(study(of, root, is_stand_in))
    if of is ANIMALS:  # whose test set has classes that training has not
        parts.append(strangers.said(of.path(root / "results", is_stand_in=True), of.name))
    if (table := of.path(root / "results") / COSTS).exists():
        parts.append(reported.markdown(pd.read_csv(table, dtype=str)))
    return "\n\n".join(parts)


def audit(root: Path) -> str:
    """Copies among the images, and what the untouched pretrained classifier makes of them."""
    path = root / "results" / "data" / "audit.json"
    if not path.exists():
        return "not run yet: `make audit`"
    found = json.loads(path.read_text(encoding="utf-8"))
    exact, near = found["copies"]["exact"], found["copies"]["near"]
    conflicting = sum(exact[place]["conflicting_labels"] for place in PLACES)
    all_or_some = "all of which" if conflicting == exact["groups"] else f"of which {conflicting}"
    lines = [
        f"- **Copies.** {exact['images']} of {found['n']:,} images have a twin with exactly the same pixels: "
        f"{exact['groups']} groups, {all_or_some} carry two different labels; "
        f"{exact['between']['groups']} span train and `valid`. {near['images']} more are near copies. "
        f"{found['valid_copied_from_train']['either']} `valid` images are in train, too; without them "
        + ", ".join(_without(arm, part) for arm, part in found["arms"].items())
        + "."
    ]
    if found["pretraining"]:
        known = found["pretraining"]["all"]
        low, high = 100 * known["difference_low"], 100 * known["difference_high"]
        lines.append(
            f"- **What the weights know.** The untouched 1000-way classifier of `{found['backbone']}`, "
            f"restricted to the data's classes, has {100 * known['train']['accuracy']:.2f} % of train and "
            f"{100 * known['valid']['accuracy']:.2f} % of `valid` right at {found['image_size']} px: "
            f"{100 * known['difference']:+.2f} points [{low:+.2f}, {high:+.2f}]."
        )
    return "\n".join(lines)


def _without(arm: str, part: dict) -> str:
    before, after = (f"{100 * part[name]['accuracy']:.2f} %" for name in ("all", "without_copies"))
    return f"{arm} stays at {after}" if before == after else f"{arm} has {after} instead of {before}"


def reliability(root: Path) -> str:
    """What `make torture` provoked, and how often nothing was lost."""
    table = torture.read(root / torture.TABLE)
    if table.empty:
        return "not run yet: `make torture`"
    rows = [
        f"| {row.fault} | {row.promise} | {row.tried:,} | {row.survived:,} |" for row in table.itertuples()
    ]
    return "\n".join(["| fault | promise | tried | survived |", "| --- | --- | ---: | ---: |", *rows])


PAGES = {
    "README.md": {
        "results": results,
        "audit": audit,
        "ablation": partial(study, ABLATION),
        "pretrain": pretraining,
        "transfer40": partial(study, TRANSFER),
        **{name: partial(family, STUDIES[name]) for name in STUDY_ARMS},
        "speed": speed,
        "reliability": reliability,
    },
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


def _reported(arm: str, facts: dict) -> str:
    """An arm as the study reports it; its interval is by row, from its prediction file."""
    said = {key: fact["value"] for key, fact in facts.items()}
    low, high = (100 * bound for bound in wilson(said["n_correct"], said["n"]))
    reported, by_row = f"{said['valid_accuracy']:.2%}", f"{said['n_correct'] / said['n']:.2%}"
    interval = f"[{low:.2f}, {high:.2f}]"
    accuracy = f"{reported} {interval}" if reported == by_row else f"{reported} ({by_row} by row {interval})"
    cells = (
        f"{arm}, reported by the study",
        accuracy.replace("%", " %"),
        f"`{said['backbone']}` ({TRAINED[said['trained']]})",
        f"{said['image_size']} px",
        "tiny-imagenet, `published`",
        f"best {said['best_epoch']} of {said['epochs']}",
        f"{said['hardware']}, {said['minutes']:.1f} min",
    )
    return f"| {' | '.join(cells)} |"


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
    for of in STUDIES.values():
        for is_stand_in in (False, True):
            write_summary(of, of.path(root / "results", is_stand_in))
        if of.name in STUDY_ARMS:
            reported.write_beside_reported(of, root / "results")
        if of is FINE_GRAINED:
            write_csv(costs(preset(of.name, "full")), of.path(root / "results") / COSTS)
    for page in PAGES:
        path = root / page
        path.write_text(rewritten(path.read_text(encoding="utf-8"), root, page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
