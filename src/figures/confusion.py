"""The confusion matrix: small with every count, large and ordered by likeness, or in blocks."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from src.figures.style import BLUE, DARK, GREY, blank_figure, clean, percent, styled

ANNOTATED_UP_TO = 30  # classes up to which every cell of the confusion matrix has its count
N_LISTED = 15  # confusions named beside a larger matrix


def confusion_figure(counts_KK: np.ndarray, names: list[str], note: str, title: str) -> Figure:
    """The confusion matrix: every cell with its count, or ordered by likeness with the largest named."""
    draw = _small_confusion if len(names) <= ANNOTATED_UP_TO else _large_confusion
    return draw(counts_KK, names, note, f"{title}: which class is taken for which")


@styled
def _small_confusion(counts_KK: np.ndarray, names: list[str], note: str, title: str) -> Figure:
    n_classes = len(names)
    shares_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    figure = blank_figure(7.6 if n_classes <= 15 else 8.6, title, note)
    axes = figure.subplots()
    axes.grid(False)
    drawn = axes.imshow(shares_KK, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    size = 11 if n_classes <= 12 else 9 if n_classes <= 20 else 7.5
    for (i, j), count in np.ndenumerate(counts_KK):
        if count:
            colour = "white" if shares_KK[i, j] > 0.5 else DARK
            axes.text(j, i, f"{count:,}", ha="center", va="center", color=colour, fontsize=size)
    shown = [clean(name, 24) for name in names]
    steep = max(map(len, shown)) * n_classes > 75
    axes.set_xticks(range(n_classes), shown, rotation=60 if steep else 0, fontsize=max(size, 9))
    if steep:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(n_classes), shown, fontsize=max(size, 9))
    axes.set(xlabel="prediction", ylabel="truth")
    axes.tick_params(length=0)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, label="share of the class's images")
    bar.ax.yaxis.set_major_formatter(percent)
    return figure


def similarity_order(counts_KK: np.ndarray) -> np.ndarray:
    """Classes so that those taken for each other stand together.

    Average linkage over 1 - (mean share confused, either way), leaves ordered optimally (Bar-Joseph 2001).
    """
    if len(counts_KK) < 2:
        return np.arange(len(counts_KK))
    shares_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    alike_KK = (shares_KK + shares_KK.T) / 2
    distance_KK = 1 - alike_KK
    np.fill_diagonal(distance_KK, 0)
    return leaves_list(linkage(squareform(distance_KK, checks=False), "average", optimal_ordering=True))


@styled
def _large_confusion(counts_KK: np.ndarray, names: list[str], note: str, title: str) -> Figure:
    order = similarity_order(counts_KK)
    names = [names[i] for i in order]
    figure, axes = _numbered_matrix(counts_KK[np.ix_(order, order)], names, note, title, 2.35)
    ticks = np.arange(0, len(names), -(-len(names) // 25))
    axes.set_yticks(ticks, [clean(names[i], 20) for i in ticks], fontsize=8)
    caption = "Classes stand beside those they are taken for (average linkage, optimal leaf order);"
    caption += f"\none in {ticks[1]} of the {len(names)} is named. Off the grey diagonal: errors."
    axes.set_title(caption, fontsize=9, weight="normal")
    return figure


@styled
def confusion_blocks(
    counts_KK: np.ndarray, names: list[str], blocks: list[tuple[str, int]], note: str, title: str
) -> Figure:
    """A large confusion matrix whose classes stand in `blocks` (superclass, number of classes), in order."""
    figure, axes = _numbered_matrix(counts_KK, names, note, f"{title}: confusion by superclass", 2.05)
    sizes = np.array([size for _, size in blocks])
    starts = np.cumsum(sizes) - sizes - 0.5
    for start, size in zip(starts, sizes, strict=True):
        axes.add_patch(Rectangle((start, start), size, size, fill=False, ec=BLUE, lw=1.1))
    middles = starts + sizes / 2
    places = _apart(middles.tolist(), 0.027 * len(names), len(names) - 1)
    axes.set_yticks(places, [f"{clean(name, 24)}  {size}" for name, size in blocks], fontsize=8.5)
    axes.tick_params(axis="y", length=0, pad=14)
    for middle, place in zip(middles, places, strict=True):
        line = axes.plot([-0.5, -0.025 * len(names)], [middle, place], color=GREY, lw=0.8, clip_on=False)
        line[0].set_in_layout(False)
    block_K = np.repeat(np.arange(len(sizes)), sizes)
    inside = counts_KK[block_K[:, None] == block_K].sum()
    n_right, n = np.trace(counts_KK), counts_KK.sum()
    caption = "Superclasses after WordNet, with their number of classes."
    if n > n_right:
        share = percent(round((inside - n_right) / (n - n_right), 3))
        caption += f"\n{share} of the {n - n_right:,} errors stay inside a frame: the superclass is right."
    axes.set_title(caption, fontsize=9, weight="normal")
    return figure


def _numbered_matrix(
    counts_KK: np.ndarray, names: list[str], note: str, title: str, matrix_width: float
) -> tuple[Figure, mpl.axes.Axes]:
    """The errors as a heat map in the given order, `matrix_width` times as wide as the list beside it."""
    n_classes, totals_K = len(names), counts_KK.sum(axis=1)
    shares_KK = counts_KK / np.maximum(totals_K[:, None], 1)
    wrong_KK = np.ma.masked_where((counts_KK == 0) | np.eye(n_classes, dtype=bool), shares_KK)
    figure = blank_figure(7.5, title, note)
    grid = GridSpec(1, 2, figure, width_ratios=[matrix_width, 1])
    axes, listing = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    smallest = 1 / max(totals_K.max(), 2)
    drawn = axes.imshow(
        wrong_KK,
        cmap="YlOrRd",
        norm=LogNorm(0.8 * smallest, max(wrong_KK.filled(0).max(), 5 * smallest)),
        aspect="equal",
        interpolation="nearest",
    )
    axes.plot([-0.5, n_classes - 0.5], [-0.5, n_classes - 0.5], color="#C8D3DC", lw=1.5, zorder=1.5)
    axes.grid(False)
    axes.set_xticks([])
    axes.set(
        ylabel="truth",
        xlabel="prediction, in the same order",
        xlim=(-0.5, n_classes - 0.5),
        ylim=(n_classes - 0.5, -0.5),
    )
    bar = figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.75, aspect=40, pad=0.01)
    axes.set_anchor("N")
    bar.set_label("share of the true class's images, logarithmic", fontsize=9)
    bar.ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.xaxis.set_major_formatter(percent)
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    listed = _strongest(wrong_KK.filled(0))
    _number_cells(axes, listed, n_classes)
    _list_confusions(listing, [(names[i], names[j], counts_KK[i, j], totals_K[i]) for i, j in listed])
    return figure, axes


def _strongest(wrong_KK: np.ndarray) -> list[tuple[int, int]]:
    """Row and column of the largest shares, at most `N_LISTED`, none of them zero."""
    cells = np.argsort(-wrong_KK, axis=None, kind="stable")[:N_LISTED]
    rows, columns = np.unravel_index(cells, wrong_KK.shape)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if wrong_KK[i, j]]


def _number_cells(axes: mpl.axes.Axes, cells: list[tuple[int, int]], n_classes: int) -> None:
    """Number the cells, a line from each to its number; on either side of the diagonal numbers keep apart.

    `inset` keeps a number's white box off the axes.
    """
    gap, away, inset = (share * n_classes for share in (0.042, 0.06, 0.035))
    for side in (1, -1):
        numbered = [(i + j, j - i, k) for k, (i, j) in enumerate(cells, 1) if (j > i) == (side > 0)]
        numbered.sort()
        places = _apart([along / 2 for along, _, _ in numbered], gap, n_classes - gap)
        for place, (along, across, k) in zip(places, numbered, strict=True):
            half = across / 2 + side * away
            x, y = place + half, place - half
            x, y = np.clip([x, y], inset, n_classes - 1 - inset)
            axes.annotate(
                str(k),
                xy=((along + across) / 2, (along - across) / 2),
                xytext=(x, y),
                fontsize=9,
                weight="bold",
                color=DARK,
                ha="center",
                va="center",
                bbox={"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.8},
                arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.8, "shrinkA": 1, "shrinkB": 1},
            )


def _apart(wanted: list[float], gap: float, end: float) -> list[float]:
    """Places from 0 to `end`, near those wanted (in ascending order) and at least `gap` from each other."""
    places, last, limit = [], -gap, end
    for place in wanted:
        places.append(last := max(place, last + gap))
    for k in reversed(range(len(places))):
        places[k] = min(places[k], limit)
        limit = places[k] - gap
    return places


def _list_confusions(axes: mpl.axes.Axes, confusions: list[tuple[str, str, int, int]]) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(N_LISTED + 0.5, -1))
    heading = "Most frequent confusions" if confusions else "No confusions"
    text = axes.text(0, -0.55, heading, weight="bold", fontsize=11, va="center")
    text.set_in_layout(False)
    for k, (truth, said, count, total) in enumerate(confusions):
        for x, line, style in (
            (0.075, str(k + 1), {"weight": "bold", "ha": "right"}),
            (0.11, f"{clean(truth, 26)}\n→ {clean(said, 22)}  {count} of {total}", {}),
        ):
            text = axes.text(x, k + 0.3, line, fontsize=9, va="center", linespacing=1.25, color=DARK, **style)
            text.set_in_layout(False)
