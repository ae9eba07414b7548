"""Figure of a search: accuracy on holdout by trial and over each field that was searched."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from src.figures.style import BLUE, DARK, GREY, ORANGE, blank_figure, percent, styled

# column: title and scale of its axis
AXES = {
    "trial": ("trial", "linear"),
    "lr_factor": ("learning rates, times the preset's", "log"),
    "model.dropout": ("dropout", "linear"),
    "optim.weight_decay": ("weight decay", "log"),
}
LEGEND = (
    "A dot a trial; diamond: the preset; orange: the best; grey crosses: trials that could not be trained to "
    "their end. The best of many was chosen on these images: on others, expect less of it."
)


@styled
def search_figure(table: pd.DataFrame, note: str) -> Figure:
    """Accuracy on `holdout` of a search's trials, `search.csv`'s table, the first of them the preset."""
    figure = blank_figure(6.4, f"Search over {len(table)} trials: accuracy on holdout", f"{LEGEND}\n{note}")
    grid = figure.subplots(2, 2, sharey=True)
    for axes, (column, (label, scale)) in zip(grid.flat, AXES.items(), strict=True):
        axes.set(xscale=scale, xlabel=label)
        if scale == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=column == "trial", min_n_ticks=1))
        else:  # so few that their numbers do not touch
            decades = np.log10(table[column].max() / table[column].min())
            axes.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 3)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        _draw_trials(axes, table, column)
    first = grid[0, 0]
    first.step(table["trial"], table["holdout_accuracy"].cummax().ffill(), color=GREY, lw=1, where="post")
    first.yaxis.set_major_formatter(percent)
    return figure


def _draw_trials(axes: mpl.axes.Axes, table: pd.DataFrame, column: str) -> None:
    """A mark a trial over one column."""
    best, failed = table["holdout_accuracy"].idxmax(), table["holdout_accuracy"].isna()
    axes.plot(table[column], table["holdout_accuracy"], "o", ms=5, color=BLUE, alpha=0.7)
    axes.plot(table[column][0], table["holdout_accuracy"][0], "D", ms=7, mfc="none", color=DARK)
    axes.plot(table[column][best], table["holdout_accuracy"][best], "o", ms=7, color=ORANGE)
    heights = [0.03] * int(failed.sum())
    axes.plot(table[column][failed], heights, "x", ms=6, color=GREY, transform=axes.get_xaxis_transform())
