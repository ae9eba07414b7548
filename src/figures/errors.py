"""Figures of both arms' predictions: calibration, confusions, and what the improvement changes.

Functions take the tables that `src.evaluate` and `src.analysis` make.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator

from src.figures.style import (
    BLUE,
    DARK,
    GREY,
    ORANGE,
    Images,
    blank_figure,
    clean,
    interval,
    percent,
    styled,
)

ARMS = {"baseline": BLUE, "improvement": ORANGE}
N_PAIRS, N_EXAMPLES = 6, 3  # confused pairs shown, and images of each direction
N_CLASSES = 15  # best and worst ones
N_CHANGES = 10  # classes gained and lost, pairs fixed and broken
N_SUSPECTS, PER_LINE = 20, 5


@styled
def reliability_figure(tables: dict[str, pd.DataFrame], note: str) -> Figure:
    """Accuracy against confidence by bin (`all_reliability` of each arm), and the answers in each bin."""
    figure = blank_figure(6.6, "How far the models' confidence can be believed", note)
    diagram, strip = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
    diagram.plot([0, 1], [0, 1], color=GREY, lw=1.2, ls="--", label="perfect calibration")
    for arm, table in tables.items():
        for calibrated, bins in table.groupby("calibrated"):
            _draw_bins(diagram, bins, arm, calibrated)
        bins = table[~table["calibrated"]]
        colours = {"color": (ARMS[arm], 0.25), "edgecolor": ARMS[arm]}
        strip.bar(bins["low"], bins["n"], bins["high"] - bins["low"], align="edge", lw=1.2, **colours)
    diagram.set(
        xlim=(0, 1),
        ylim=(-0.02, 1.02),
        ylabel="accuracy",
        title="Above the diagonal: underconfident; below it: overconfident",
    )
    diagram.legend(loc="upper left", fontsize=9.5)
    strip.set(xlabel="confidence: the probability of the class that is answered", ylabel="images")
    for axis in (diagram.yaxis, strip.xaxis):
        axis.set_major_formatter(percent)
    return figure


def _draw_bins(axes: mpl.axes.Axes, bins: pd.DataFrame, arm: str, calibrated: bool) -> None:
    """The confidence as it is with intervals, or thin what a temperature makes of it."""
    ece = np.average((bins["confidence"] - bins["accuracy"]).abs(), weights=bins["n"])
    said = f"{arm}, temperature fitted on holdout" if calibrated else arm
    look = {"color": ARMS[arm], "label": f"{said}: ECE {ece:.3f}"}
    if calibrated:
        axes.plot(bins["confidence"], bins["accuracy"], "o:", ms=4, lw=1.4, mfc="white", **look)
        return
    spread = np.abs([bins["accuracy"] - bins["wilson_low"], bins["wilson_high"] - bins["accuracy"]])
    axes.errorbar(bins["confidence"], bins["accuracy"], spread, fmt="o-", ms=5.5, lw=1.8, capsize=3, **look)


@styled
def confidence_figure(
    histograms: dict[str, pd.DataFrame], curves: dict[str, pd.DataFrame], aurocs: dict[str, float], note: str
) -> Figure:
    """How sure right and wrong answers are, and the accuracy of what is left without the least sure."""
    figure = blank_figure(7.4, "Is the confidence of wrong answers lower?", note)
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    panels = above.subplots(1, 2, sharey=True)
    for axes, (arm, table) in zip(panels, histograms.items(), strict=True):
        edges = np.append(table["low"], 1.0)
        axes.stairs(table["right"], edges, fill=True, color=ARMS[arm], alpha=0.4, label="right answers")
        axes.stairs(table["wrong"], edges, color=DARK, lw=1.8, label="wrong answers")
        auroc = aurocs[arm]
        said = "" if auroc is None else f": AUROC {auroc:.3f}"
        axes.set(title=arm.capitalize() + said, xlabel="confidence", xlim=(0, 1))
        axes.xaxis.set_major_formatter(percent)
        axes.legend(loc="upper center")
    panels[0].set_ylabel("images")
    axes = below.subplots()
    for arm, table in curves.items():
        axes.fill_between(
            table["left_out"], table["wilson_low"], table["wilson_high"], color=ARMS[arm], alpha=0.15
        )
        axes.plot(table["left_out"], table["accuracy"], "o-", ms=4, lw=1.8, color=ARMS[arm], label=arm)
    axes.set(title="Accuracy of the rest, 95 % interval", xlabel="least confident answers left out")
    axes.xaxis.set_major_formatter(percent)
    axes.yaxis.set_major_formatter(percent)
    axes.legend(loc="lower right")
    return figure


@styled
def confused_pairs_figure(pairs: pd.DataFrame, images: Images, note: str, title: str) -> Figure:
    """The most confused pairs of classes, with the most confident mistakes of either direction."""
    pairs = pairs.head(N_PAIRS)
    if pairs.empty:
        return blank_figure(1.6, f"{title}: no class is taken for another", note)
    figure = blank_figure(1.0 + 1.75 * len(pairs), f"{title}: the classes that are confused most", note)
    parts = figure.subfigures(len(pairs), 2, squeeze=False, wspace=0.04)
    for line, (_, pair) in zip(parts, pairs.iterrows(), strict=True):
        for part, side, other in zip(line, ("first", "second"), ("second", "first"), strict=True):
            count = pair[f"{side}_as_{other}"]
            truth, said = clean(pair[f"{side}_name"], 22), clean(pair[f"{other}_name"], 22)
            heading = f"{truth} taken for {said}: {count} of {pair[f'n_{side}']}"
            part.suptitle(heading, x=0.02, ha="left", fontsize=10)
            _draw_images(part.subplots(1, N_EXAMPLES, squeeze=False).ravel(), images, pair[f"{side}_rows"])
    return figure


def _draw_images(cells: np.ndarray, images: Images, rows: list[int]) -> None:
    """Images without axes, as many as there are rows."""
    for cell in cells:
        cell.set_axis_off()
    if len(rows):
        for cell, pixels in zip(cells, images(np.asarray(rows)), strict=False):
            cell.imshow(pixels, interpolation="nearest")


@styled
def class_accuracy_figure(a: pd.DataFrame, b: pd.DataFrame, note: str) -> Figure:
    """The improvement's best and worst classes (`per_class` of both arms), the baseline as hollow dots."""
    b = b.sort_values("accuracy", ascending=False, kind="stable")
    if len(b) > 2 * N_CLASSES:
        b = pd.concat([b.head(N_CLASSES), b.tail(N_CLASSES)])
    before = a.set_index("class").loc[b["class"]]
    places, n = np.arange(len(b)), len(b)
    figure = blank_figure(1.9 + 0.235 * n, "Accuracy by class: the improvement's best and worst", note)
    axes = figure.subplots()
    spread = [b["accuracy"] - b["wilson_low"], b["wilson_high"] - b["accuracy"]]
    label = "improvement, 95 % interval"
    axes.errorbar(
        b["accuracy"],
        places,
        xerr=np.abs(spread),
        fmt="o",
        ms=6,
        lw=1.8,
        capsize=3,
        color=ORANGE,
        label=label,
    )
    axes.plot(before["accuracy"], places, "o", ms=7, mfc="none", mec=BLUE, mew=1.6, ls="", label="baseline")
    axes.set_yticks(places, [clean(name, 30) for name in b["name"]], fontsize=9.5)
    if n == 2 * N_CLASSES:
        axes.axhline(N_CLASSES - 0.5, color=GREY, lw=1, ls=":")
    axes.set(ylim=(n - 0.4, -0.6), xlim=(-0.02, 1.02), xlabel="accuracy in the class")
    axes.xaxis.set_major_formatter(percent)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


@styled
def changes_figure(classes: pd.DataFrame, pairs: pd.DataFrame, note: str) -> Figure:
    """What the improvement fixes and breaks: classes of the largest net change, and the commonest pairs."""
    gained, lost = classes[classes["net"] > 0], classes[classes["net"] < 0]
    shown = pd.concat([gained.head(N_CHANGES), lost.tail(N_CHANGES)])
    figure = blank_figure(8.6, "What the improvement fixes (blue) and breaks (orange)", note)
    grid = GridSpec(2, 2, figure, width_ratios=[1, 1.02])
    _draw_class_changes(figure.add_subplot(grid[:, 0]), shown)
    for row, kind in enumerate(("fixed", "broken")):
        _draw_pair_changes(figure.add_subplot(grid[row, 1]), pairs[pairs["kind"] == kind], kind)
    return figure


def _draw_class_changes(axes: mpl.axes.Axes, shown: pd.DataFrame) -> None:
    places = np.arange(len(shown))
    axes.barh(places, shown["fixed"], height=0.72, color=BLUE, alpha=0.75)
    axes.barh(places, -shown["broken"], height=0.72, color=ORANGE, alpha=0.75)
    axes.axvline(0, color=DARK, lw=1)
    for place, (_, row) in zip(places, shown.iterrows(), strict=True):
        said = f"{row['net']:+d}".replace("-", "−") + (" *" if row["p_holm"] < 0.05 else "")
        axes.annotate(
            said,
            (row["fixed"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            weight="bold",
            color=DARK,
        )
    axes.set_yticks(places, [clean(name, 22) for name in shown["name"]], fontsize=9.5)
    axes.set_ylim(2 * N_CHANGES - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set_title("Classes that gain and lose most", fontsize=11)
    axes.set_xlabel("images broken | fixed; beside: net,\n* exact McNemar p < 0.05 after Holm", fontsize=9.5)


def _draw_pair_changes(axes: mpl.axes.Axes, pairs: pd.DataFrame, kind: str) -> None:
    """Bars of the images fixed or broken, before all that are taken for the class."""
    title, colour, arm = {
        "fixed": ("Mistakes that it fixes most", BLUE, "baseline"),
        "broken": ("Mistakes that it makes anew", ORANGE, "improvement"),
    }[kind]
    pairs = pairs.head(N_CHANGES)
    places = np.arange(len(pairs))
    axes.barh(places, pairs["of"], height=0.72, color="#E4E4E4")
    axes.barh(places, pairs["n"], height=0.72, color=colour, alpha=0.75)
    names = [_in_line(clean(row.name, 24), clean(row.wrong_name, 24)) for row in pairs.itertuples()]
    axes.set_yticks(places, names, fontsize=8.5, linespacing=0.95)
    axes.set_ylim(N_CHANGES - 0.4, -0.6)
    axes.set_xlim(0, 1.05 * pairs["of"].max() if len(pairs) else 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(f"images; grey: all such mistakes\nof the {arm}", fontsize=9.5)


def _in_line(name: str, wrong_name: str) -> str:
    """Truth and answer beside each other, or where that is too long below each other."""
    return f"{name} →{' ' if len(name) + len(wrong_name) <= 32 else chr(10)}{wrong_name}"


@styled
def superclass_figure(table: pd.DataFrame, note: str) -> Figure:
    """Accuracy, paired difference and the share of errors that stay inside, by superclass of the truth."""
    table = table.sort_values("improvement_accuracy", ascending=False, kind="stable")
    places = np.arange(len(table))
    figure = blank_figure(
        2.2 + 0.29 * len(table), "Accuracy by superclass (WordNet), with its number of classes", note
    )
    accuracy, difference, within = figure.subplots(1, 3, sharey=True, width_ratios=[1.3, 1, 1])
    for (arm, colour), shift in zip(ARMS.items(), (-0.16, 0.16), strict=True):
        value = table[f"{arm}_accuracy"]
        spread = np.abs([value - table[f"{arm}_low"], table[f"{arm}_high"] - value])
        accuracy.errorbar(
            value, places + shift, xerr=spread, fmt="o", ms=5, lw=1.8, capsize=2, color=colour, label=arm
        )
        within.plot(table[f"{arm}_within"], places + shift, "o", ms=5, color=colour)
    within.plot(
        table["chance_within"], places, "|", ms=12, mew=1.8, color=DARK, label="if errors fell anywhere"
    )
    for place, (_, row) in zip(places, table.iterrows(), strict=True):
        low, value, high = (100 * row[f"difference{end}"] for end in ("_low", "", "_high"))
        interval(difference, place, value, low, high, DARK)
    difference.axvline(0, color=GREY, lw=1.2)
    names = [f"{clean(r.superclass, 24)}  {r.n_classes}" for r in table.itertuples()]
    accuracy.set_yticks(places, names, fontsize=10)
    accuracy.set_ylim(len(table) - 0.4, -0.6)
    for axes, title in (
        (accuracy, "accuracy"),
        (difference, "difference in points"),
        (within, "errors inside it"),
    ):
        axes.set_title(title, fontsize=11)
        axes.tick_params(axis="y", length=0)
    accuracy.xaxis.set_major_formatter(percent)
    within.xaxis.set_major_formatter(percent)
    within.set_xlim(left=-0.02)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 2.6}  # in font sizes
    accuracy.legend(ncols=2, **below)
    within.legend(**below)
    return figure


@styled
def suspects_figure(table: pd.DataFrame, images: Images, note: str) -> Figure:
    """Images that both arms surely put into the same other class: label, common answer, both confidences."""
    shown = table.head(N_SUSPECTS)
    if shown.empty:
        return blank_figure(1.6, "No image that both arms surely put into the same other class", note)
    n_lines = -(-len(shown) // PER_LINE)
    title = f"Both arms surely say another class than the label: {len(shown)} of {len(table)}, surest first"
    figure = blank_figure(1.0 + 2.5 * n_lines, title, note)
    cells = figure.subplots(n_lines, PER_LINE, squeeze=False).ravel()
    _draw_images(cells, images, shown["Index"].tolist())
    for cell, row in zip(cells, shown.itertuples(), strict=False):
        cell.set_title(clean(row.name, 20), fontsize=9.5, loc="center", weight="bold")
        said = [
            clean(row.said_name, 20),
            f"baseline {100 * row.baseline_confidence:.0f} %",
            f"improvement {100 * row.improvement_confidence:.0f} %",
        ]
        cell.text(
            0.5,
            -0.04,
            "\n".join(said),
            transform=cell.transAxes,
            ha="center",
            va="top",
            fontsize=9.5,
            color=ORANGE,
        )
    return figure
