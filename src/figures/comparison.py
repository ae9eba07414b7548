"""The improvement against the baseline."""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator

from src.figures.style import (
    BLUE,
    DARK,
    GREY,
    ORANGE,
    blank_figure,
    clean,
    interval,
    percent,
    signed,
    styled,
)


@styled
def comparison_figure(comparison: dict, note: str) -> Figure:
    """Accuracies, their difference, and the classes that changed most, from `write_comparison`'s dict."""
    c = comparison
    title = f"Improvement against baseline, {c['n']:,} images of valid"
    if not c["same_setup"]:
        keys = [difference.split(":")[0] for difference in c["setup_differences"]]
        title += f"\nNot the method alone: the arms also differ in {', '.join(keys)}"
    figure = blank_figure(7.6, title, note)
    grid = GridSpec(2, 2, figure, height_ratios=[1, 2.6])
    accuracies, difference = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    for y, (arm, colour) in enumerate((("baseline", BLUE), ("improvement", ORANGE))):
        m = c[arm]
        interval(accuracies, y, m["accuracy"], m["wilson_low"], m["wilson_high"], colour)
        accuracies.text(
            m["accuracy"],
            y - 0.2,
            f"{100 * m['accuracy']:.2f} %",
            ha="center",
            va="bottom",
            color=colour,
            weight="bold",
        )
    accuracies.set_yticks([0, 1], ["Baseline", "Improvement"])
    accuracies.set(ylim=(1.5, -0.7), title="Accuracy, 95 % interval")
    accuracies.xaxis.set_major_formatter(percent)
    accuracies.xaxis.set_major_locator(MaxNLocator(5))
    accuracies.margins(x=0.15)
    low, high = c["difference_low"], c["difference_high"]
    interval(difference, 0, 100 * c["difference"], 100 * low, 100 * high, DARK)
    difference.axvline(0, color=GREY, lw=1.2)
    difference.set(ylim=(0.6, -0.9), yticks=[], title="Difference in points")
    said = f"{signed(c['difference'], 2)}  [{signed(low, 2)}, {signed(high, 2)}]"
    p = c["mcnemar_p"]
    said += f"\nMcNemar {'p < 0.0001' if p < 1e-4 else f'p = {p:.4f}'}"
    difference.text(0.5, 0.93, said, ha="center", va="top", transform=difference.transAxes, fontsize=10.5)
    difference.margins(x=0.15)
    _draw_changes(figure.add_subplot(grid[1, :]), c)
    return figure


def _draw_changes(axes: mpl.axes.Axes, comparison: dict) -> None:
    """The classes that gained and lost most, as pairs of dots."""
    gained, lost = comparison["classes_gained"], comparison["classes_lost"]
    rows = gained + lost[::-1]
    for y, row in enumerate(rows):
        axes.plot([row["baseline"], row["improvement"]], [y, y], color=GREY, lw=2, alpha=0.45, zorder=1)
        axes.text(
            1.01,
            y,
            signed(row["change"], 0),
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=10,
            color=DARK,
            weight="bold",
        )
    for arm, colour in (("baseline", BLUE), ("improvement", ORANGE)):
        axes.scatter([row[arm] for row in rows], range(len(rows)), s=50, color=colour, label=arm, zorder=2)
    axes.set_yticks(range(len(rows)), [clean(row["name"], 28) for row in rows], fontsize=10)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    if gained and lost:
        axes.axhline(len(gained) - 0.5, color=GREY, lw=1, ls=":")
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(percent)
    axes.set(title="Classes that gained and lost most", xlabel="accuracy in the class")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
