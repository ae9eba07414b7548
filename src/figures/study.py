"""Figures of studies: what each row is worth, accuracy by images to train on, learning rates that train."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from src.figures.style import BLUE, DARK, GREY, ORANGE, blank_figure, percent, signed, styled

COLOURS = {"helps": BLUE, "hurts": ORANGE}
ARMS = {"baseline": (BLUE, "frozen backbone"), "improvement": (ORANGE, "all layers trained")}
ROW_HEIGHT = 0.205  # inches: all rows fit a page, and their names can still be read there
SHOWN = 0.85  # of the intervals lie within the axis at least; one large step would flatten all others


@styled
def study_figure(title: str, summary: pd.DataFrame, note: str) -> Figure:
    """A line a row: accuracy over seeds on the left, the paired difference with its interval on the right."""
    n, places = len(summary), np.arange(len(summary))
    figure = blank_figure(2 + ROW_HEIGHT * n, f"{title}: accuracy on valid", note)
    accuracy, difference = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.25])
    spread = summary["valid_sd"].fillna(0)
    accuracy.errorbar(summary["valid_mean"], places, xerr=spread, fmt="o", ms=4.5, color=DARK, capsize=2)
    accuracy.set_yticks(places, summary["row"], fontsize=9)
    accuracy.set_ylim(n - 0.4, -0.6)
    accuracy.xaxis.set_major_formatter(percent)
    accuracy.set_title("mean ± sd over seeds", fontsize=10.5)
    _draw_differences(difference, summary)
    for axes in (accuracy, difference):
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.tick_params(axis="x", labelsize=9)
        for place in _section_starts(summary):
            axes.axhline(place - 0.5, color=GREY, lw=0.8, ls=":")
    return figure


def _draw_differences(axes: mpl.axes.Axes, summary: pd.DataFrame) -> None:
    """Differences in points, each as a number beside the axis, too; an arrow where one goes beyond it."""
    value, low, high = (100 * summary[column].to_numpy() for column in ("difference", "low", "high"))
    reach = np.fmax(np.abs(value), np.fmax(np.abs(low), np.abs(high)))
    reach = reach[np.isfinite(reach)]
    end = 1.1 * np.quantile(reach, SHOWN) if reach.any() else 1.0
    axes.axvline(0, color=GREY, lw=1.2)
    for place in np.flatnonzero(np.isfinite(value)):
        x, colour = value[place], COLOURS.get(summary["verdict"].iloc[place], GREY)
        if np.isfinite(low[place]):
            axes.plot([low[place], high[place]], [place, place], "|-", ms=6, lw=2, color=colour)
        if abs(x) <= end:
            axes.plot(x, place, "o", ms=5.5, color=colour)
        for side in {np.sign(v) for v in (x, low[place], high[place]) if abs(v) > end}:
            axes.plot(side * 0.97 * end, place, ">" if side > 0 else "<", ms=7, color=colour)
        axes.annotate(
            signed(summary["difference"].iloc[place], 2),
            (1, place),
            xytext=(38, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            ha="right",
            fontsize=8.5,
            color=colour,
        )
    axes.set_xlim(-end, end)
    axes.set_title("difference in points, 95 % interval", fontsize=10.5)
    grey = "not told apart from noise"
    if summary["verdict"].str.startswith("one seed").any():
        grey += ", or one seed, not judged"
    axes.set_xlabel(f"blue: helps · orange: hurts · arrow: beyond the axis\ngrey: {grey}", fontsize=8.5)
    axes.tick_params(axis="y", length=0, labelleft=False)


def _section_starts(summary: pd.DataFrame) -> list[int]:
    """Rows that are compared with nothing, and the first after the ladder, whose rows start with a plus."""
    added, alone = summary["row"].str.startswith("+"), summary["against"] == ""
    return [i for i in range(1, len(summary)) if alone[i] or (added[i - 1] and not added[i])]


@styled
def transfer_figure(title: str, table: pd.DataFrame, axis: str, note: str) -> Figure:
    """Both arms over `images`, a logarithmic axis called `axis`: a dot a seed, a line through their means."""
    figure = blank_figure(5.2, f"{title}: accuracy on valid", note)
    axes = figure.subplots()
    for arm, (colour, label) in ARMS.items():
        own = table[table["arm"] == arm]
        means = own.groupby("images")["valid_accuracy"].mean()
        axes.plot(own["images"], own["valid_accuracy"], "o", ms=5, color=colour, alpha=0.45)
        axes.plot(means.index, means, "o-", ms=7, lw=2, color=colour, label=label)
    sizes = sorted(set(table["images"]))
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{n:,.0f}" for n in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(percent)
    axes.set(xlabel=axis, ylabel="accuracy on valid")
    axes.legend(loc="upper left")
    return figure


@styled
def lr_figure(table: pd.DataFrame, best: float, note: str) -> Figure:
    """The loss while the learning rates grow, the steepest fall marked."""
    figure = blank_figure(4.2, "Learning-rate finder: loss against the factor of the preset's rates", note)
    axes = figure.subplots()
    axes.plot(table["factor"], table["loss"], color=GREY, lw=1, alpha=0.6, label="loss of the step")
    axes.plot(table["factor"], table["smoothed_loss"], color=BLUE, lw=2, label="running mean")
    axes.axvline(best, color=ORANGE, lw=1.5, ls="--", label=f"steepest fall: × {best:.2g}")
    axes.axvline(1, color=DARK, lw=1, ls=":", label="the preset's rates")
    shown = table["smoothed_loss"][np.isfinite(table["smoothed_loss"])]
    low, high = shown.min(), shown.max()
    axes.set(
        xscale="log",
        xlabel="factor",
        ylabel="loss",
        ylim=(low - 0.1 * (high - low), high + 0.1 * (high - low)),
    )
    axes.legend()
    return figure
