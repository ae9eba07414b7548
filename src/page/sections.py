"""What each section of the page shows, as values that its layout takes over."""

from __future__ import annotations

import base64

import numpy as np
import pandas as pd

from src.analysis import confused_pairs, superclass_order, superclass_scores
from src.evaluate import is_right, paired_interval, per_class, wilson
from src.figures import similarity_order
from src.page.charts import HALVES, Axis, Dot, calibration, curves, every_class, tick_in_points
from src.page.read import Arm, Results

N_PAIRS = 15  # confusions named
PROVENANCE = {
    "backbone": "Backbone",
    "weights_sha256": "Its weights, SHA-256",
    "data": "Data",
    "data_fingerprint": "Fingerprint of the data",
    "protocol": "Protocol",
    "profile": "Profile",
    "seed": "Seed",
    "git_commit": "Commit of the code that ran",
    "hardware": "Hardware",
    "precision": "Precision",
}
SHOWN = 0.85  # of the ablation's intervals lie within its axis; one large step would flatten all others


def context(found: Results) -> dict:
    """Every section by its name in the layout; None where what it needs is not there."""
    classes, counts = class_table(found), [arm.counts(len(found.names)) for arm in found.arms]
    compared = [found.comparison["a"], found.comparison["b"]] if found.pair else [found.main.name]
    return {
        "headline": headline(found),
        "curves": [curves(found.arms, kind) for kind in ("accuracy", "loss")],
        "difference": difference(found),
        "every_class": every_class(classes, compared),
        "every_class_first": compared[0],
        "classes": [row | {"dots": _class_dots(row, found)} for row in classes.to_dict("records")],
        "superclasses": superclasses(found),
        "pairs": pairs(found, counts),
        "calibration": calibration(found.arms),
        "ablation": ablation(found.ablation),
        "provenance": PROVENANCE,
        "shares": HALVES,
        "dot": Dot,
        "data": embedded(found, counts),
        "sheet": base64.b64encode(found.gallery.sheet).decode() if found.gallery else None,
    }


def headline(found: Results) -> dict:
    """Accuracies of the arms, the study's first, and the axis that they share."""
    reported = [_reported(arm, found.study[arm]) for arm in ("baseline", "improvement") if arm in found.study]
    rows = reported + [_measured(arm) for arm in found.arms]
    bounds = [row["dot"].low for row in rows] + [row["dot"].high for row in rows]
    return {"rows": rows, "axis": Axis.over(bounds)}


def _reported(name: str, facts: dict) -> dict:
    """A row of the study's own numbers; the interval is by row, from its prediction files."""
    said = {key: fact["value"] for key, fact in facts.items()}
    low, high = wilson(said["n_correct"], said["n"])
    return {
        "arm": name,
        "reported": True,
        "dot": Dot(f"{name} reported", said["valid_accuracy"], low, high),
        "by_row": said["n_correct"] / said["n"],
        "n": said["n"],
        "backbone": said["backbone"],
        "sizes": [said["image_size"]],
        "chosen_by": said["monitor"],
        "epochs": (said["best_epoch"], said["epochs"]),
        "hardware": said["hardware"],
        "seconds": 60 * said["minutes"],
    }


def _measured(arm: Arm) -> dict:
    m = arm.metrics
    chosen_on = "valid" if m["protocol"] == "published" else "holdout"
    return {
        "arm": arm.name,
        "reported": False,
        "dot": Dot(arm.name, m["accuracy"], m["wilson_low"], m["wilson_high"]),
        "by_row": m["accuracy"],
        "n": m["n"],
        "backbone": m["backbone"],
        "sizes": list(dict.fromkeys([m["image_size"], m.get("test_size", m["image_size"])])),
        "chosen_by": f"{chosen_on} {m['config']['train']['monitor']}",
        "epochs": (m["best_epoch"], m["epochs"]),
        "hardware": m["hardware"],
        "seconds": m["seconds"]["total"],
    }


def difference(found: Results) -> dict | None:
    """The paired difference, and how the images divide among what either arm has right."""
    c = found.comparison
    if c is None:
        return None
    parts, start = [], 0.0
    for key, style, says in (
        ("both_correct", "both", "both right"),
        ("only_b_correct", c["b"], f"only the {c['b']} right"),
        ("only_a_correct", c["a"], f"only the {c['a']} right"),
        ("both_wrong", "neither", "both wrong"),
    ):
        share = c[key] / c["n"]
        parts.append({"style": style, "says": says, "n": c[key], "start": start, "share": share})
        start += share
    dot = Dot("difference", c["difference"], c["difference_low"], c["difference_high"])
    return {"parts": parts, "dot": dot, "axis": Axis.over([0, dot.low, dot.high], tick_in_points)}


def class_table(found: Results) -> pd.DataFrame:
    """A row a class: accuracies with intervals, the paired change with its interval, what it is taken for."""
    table = per_class(found.main.predictions).set_index("class")
    table = table[["wnid", "name", "n", "most_confused_with"]]
    table.insert(0, "superclass", table.index.map(found.superclass_of) if found.superclass_of else "")
    for arm in found.arms:
        own = per_class(arm.predictions).set_index("class")
        columns = {"accuracy": arm.name, "wilson_low": f"{arm.name}_low", "wilson_high": f"{arm.name}_high"}
        table = table.join(own[list(columns)].rename(columns=columns))
    if found.pair:
        a, b = found.pair
        right_a, right_b = is_right(a), is_right(b)
        cells = [right_a & right_b, right_a & ~right_b, ~right_a & right_b, ~right_a & ~right_b]
        counts = pd.DataFrame(np.stack(cells, axis=1)).groupby(a["Ground_Truth"].to_numpy()).sum()
        bounds = [paired_interval(*map(int, row)) for row in counts.to_numpy()]
        table["change"] = table[found.comparison["b"]] - table[found.comparison["a"]]
        table[["change_low", "change_high"]] = pd.DataFrame(bounds, index=counts.index)
    return table.reset_index()


def _class_dots(row: dict, found: Results) -> list[Dot]:
    return [
        Dot(arm.name, row[arm.name], row[f"{arm.name}_low"], row[f"{arm.name}_high"]) for arm in found.arms
    ]


def superclasses(found: Results) -> list[dict] | None:
    """Both arms by superclass, the one with most right first."""
    if not (found.pair and found.superclass_of):
        return None
    table = superclass_scores(*found.pair, found.superclass_of)
    table = table.sort_values("improvement_accuracy", ascending=False, kind="stable")
    return table.replace({np.nan: None}).to_dict("records")


def pairs(found: Results, counts: list[np.ndarray]) -> dict:
    """The pairs of classes that the main arm takes most for each other, with every arm's counts."""
    table = confused_pairs(found.main.predictions).head(N_PAIRS)
    rows = []
    for first, second in table[["first", "second"]].itertuples(index=False):
        by_arm = {
            arm.name: (int(counts_KK[first, second]), int(counts_KK[second, first]))
            for arm, counts_KK in zip(found.arms, counts, strict=True)
        }
        rows.append({"first": found.names[first], "second": found.names[second], "by_arm": by_arm})
    most = max((sum(both) for row in rows for both in row["by_arm"].values()), default=1)
    return {"rows": rows, "most": most}


def ablation(summary: pd.DataFrame | None) -> dict | None:
    """The rows of the ablation and the axis of their differences, from -end to end."""
    if summary is None:
        return None
    reach = summary[["difference", "low", "high"]].abs().max(axis=1).dropna()
    end = 1.1 * float(reach.quantile(SHOWN)) if reach.any() else 0.01
    return {"rows": summary.replace({np.nan: None}).to_dict("records"), "axis": Axis.around_zero(end)}


def embedded(found: Results, counts: list[np.ndarray]) -> dict:
    """What script.js reads: class names, confusion counts other than 0, the matrix's order, the gallery."""
    counts_KK = counts[found.arms.index(found.main)]
    if found.superclass_of:
        order, blocks = superclass_order(counts_KK, found.superclass_of)
    else:
        order, blocks = similarity_order(counts_KK), []
    cells = [np.argwhere(c) for c in counts]
    gallery = found.gallery
    columns = [
        *("position", "class", "baseline", "improvement", "baseline_confidence", "improvement_confidence")
    ]
    images = gallery.table[columns].sample(frac=1, random_state=0) if gallery else pd.DataFrame()  # mixed
    return {
        "names": found.names,
        "order": order.tolist(),
        "blocks": blocks,
        "arms": [
            {"name": arm.name, "cells": np.column_stack([at, c[tuple(at.T)]]).ravel().tolist()}
            for arm, at, c in zip(found.arms, cells, counts, strict=True)
        ],
        "columns": gallery.columns if gallery else 0,
        "images": images.astype(object).to_numpy().tolist(),
    }
