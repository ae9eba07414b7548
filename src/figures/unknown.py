"""The figure of unknown classes: how a score lies on known and unknown images, and what it tells apart."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from src.figures.style import BLUE, DARK, GREY, ORANGE, blank_figure, percent, styled

LINES = ((BLUE, "-"), (ORANGE, "--"), ("#009E73", "-."), ("#CC79A7", ":"))  # Okabe & Ito
BINS = 40


@styled
def unknown_figure(
    scores: dict[str, np.ndarray],
    known_N: np.ndarray,
    curves: pd.DataFrame,
    found: dict[str, dict],
    note: str,
) -> Figure:
    """Left the first score on known and unknown test images, right every score's ROC curve.

    `scores`: name -> (N,); `curves`: score, fpr, tpr; `found`: name -> auroc, low, high and the threshold of
    its `refusal`, as `write_unknown` puts them.
    """
    n_unknown, n = int((~known_N).sum()), len(known_N)
    title = f"Classes that training did not have: {n_unknown:,} of {n:,} test images"
    figure = blank_figure(4.9, title, note)
    left, right = figure.subplots(1, 2)
    name = next(iter(scores))
    _draw_scores(left, scores[name], known_N, found[name]["refusal"]["threshold"])
    left.set(title=f"{name.capitalize()} of test images", xlabel=name, ylabel="share of its images")
    right.plot([0, 1], [0, 1], color=GREY, lw=1.2, ls="--")
    for number, (name, numbers) in enumerate(found.items()):
        colour, style = LINES[number % len(LINES)]
        label = f"{name}: {numbers['auroc']:.3f} [{numbers['low']:.3f}, {numbers['high']:.3f}]"
        curve = curves[curves["score"] == name]
        right.plot(curve["fpr"], curve["tpr"], style, lw=1.8, color=colour, label=label)
    right.set(
        title="Which score tells them apart",
        xlabel="unknown images that are taken for known",
        ylabel="known images that are kept",
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
    )
    right.legend(loc="lower right", title="AUROC, 95 % interval", fontsize=9, title_fontsize=9)
    for axis in (left.yaxis, right.xaxis, right.yaxis):
        axis.set_major_formatter(percent)
    return figure


def _draw_scores(axes: mpl.axes.Axes, scores_N: np.ndarray, known_N: np.ndarray, threshold: float) -> None:
    """Histograms of either kind, each of height one in sum, and where images are refused."""
    edges = np.histogram_bin_edges(scores_N, BINS)
    for is_kind_N, colour, kind in ((known_N, BLUE, "known"), (~known_N, ORANGE, "unknown")):
        counts = np.histogram(scores_N[is_kind_N], edges)[0]
        label = f"{kind} classes: {counts.sum():,} images"
        axes.stairs(counts / counts.sum(), edges, fill=True, color=colour, alpha=0.4, label=label)
    axes.axvline(threshold, color=DARK, lw=1.4, ls="--", label="refused below: keeps 95 % of valid")
    axes.legend(loc="upper center", fontsize=9)
    axes.margins(y=0.35)
