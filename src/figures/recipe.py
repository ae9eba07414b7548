"""Figures of the recipe: what each ingredient is worth, and which learning rates train."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from src.figures.style import BLUE, DARK, GREY, ORANGE, blank_figure, percent, signed, styled

COLOURS = {"helps": BLUE, "hurts": ORANGE}


@styled
def ablation_figure(summary: pd.DataFrame, note: str) -> Figure:
    """A line a row: accuracy over seeds on the left, the paired difference with its interval on the right."""
    n = len(summary)
    figure = blank_figure(1.8 + 0.26 * n, "What each ingredient is worth: accuracy on valid", note)
    accuracy, difference = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.25])
    places = np.arange(n)
    accuracy.errorbar(
        summary["valid_mean"],
        places,
        xerr=summary["valid_sd"].fillna(0),
        fmt="o",
        ms=5,
        color=DARK,
        capsize=2,
    )
    accuracy.set_yticks(places, summary["row"], fontsize=9)
    accuracy.set_ylim(n - 0.4, -0.6)
    accuracy.xaxis.set_major_formatter(percent)
    accuracy.set_title("mean ± sd over seeds", fontsize=10.5)
    difference.axvline(0, color=GREY, lw=1.2)
    for place, line in zip(places, summary.itertuples(), strict=True):
        _draw_difference(difference, place, line)
    difference.set_title("difference in points, 95 % interval", fontsize=10.5)
    difference.tick_params(labelleft=False)
    difference.margins(x=0.3)
    for axes in (accuracy, difference):
        for place in _section_starts(summary["against"]):
            axes.axhline(place - 0.5, color=GREY, lw=0.8, ls=":")
    return figure


def _draw_difference(axes: mpl.axes.Axes, place: int, line: tuple) -> None:
    if np.isnan(line.difference):
        return
    colour = COLOURS.get(line.verdict, GREY)
    value, low, high = (100 * x for x in (line.difference, line.low, line.high))
    bar = None if np.isnan(low) else [[value - low], [high - value]]
    axes.errorbar(value, place, xerr=bar, fmt="o", ms=6, lw=2, capsize=3, color=colour)
    axes.text(
        1.0,
        place,
        signed(line.difference, 2),
        transform=axes.get_yaxis_transform(),
        va="center",
        ha="right",
        fontsize=8.5,
        color=colour,
    )


def _section_starts(against: pd.Series) -> list[int]:
    """Where a row is compared with nothing, or many rows begin to be compared with the same one."""
    shared = against.duplicated(keep=False) & (against != "")
    return [
        i
        for i in range(1, len(against))
        if against.iloc[i] == "" or (shared.iloc[i] and not shared.iloc[i - 1])
    ]


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
