"""Figures of predictions and history: each function returns a `matplotlib.figure.Figure`; nothing is saved.

Classes appear by name, and every figure carries the footer (`note`) that says which run it shows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import wraps

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from src.evaluate import per_class

Images = Callable[[np.ndarray], np.ndarray]  # rows of the prediction table -> (n,H,W,3) uint8

# Okabe & Ito: safe for colour-blind eyes
BLUE, ORANGE, GREY, DARK = "#0072B2", "#D55E00", "#8C8C8C", "#333333"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.titlesize": 14,
    "text.parse_math": False,  # a class may be called $100
}
WIDTH = 9.0  # inches
N_SAMPLES, SAMPLE_SEED = 8, 42  # as the study draws them
ANNOTATED_UP_TO = 30  # classes up to which every cell of the confusion matrix has its count
N_LISTED = 15  # confusions named beside a larger matrix


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under `STYLE` without changing anybody's settings."""

    @wraps(function)
    def draw(*args: object, **kwargs: object) -> Figure:
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return draw


def _figure(height: float, title: str, note: str) -> Figure:
    """An empty figure with its title above and its footer below."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    figure.suptitle(title, x=0.012, ha="left", weight="bold")
    lines = [line for part in note.split("\n") for line in textwrap.wrap(part, 125)]
    figure.supxlabel("\n".join(lines), x=0.012, ha="left", fontsize=8.5, color="#666666")
    return figure


def clean(text: object, width: int = 200) -> str:
    """One line of at most `width` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"


def _percent(share: float, _: int | None = None) -> str:
    """A tick of an axis of shares, with no more digits than it needs."""
    return f"{round(100 * share, 6):g} %"


@styled
def training_curve(history: pd.DataFrame, metadata: dict, note: str, title: str) -> Figure:
    """Accuracy and loss by epoch, fit against held-out, the best epoch marked."""
    held_out = (
        "valid (chosen and reported on)" if metadata.get("protocol") == "published" else "holdout (chosen on)"
    )
    best = int(metadata.get("best_epoch", history.loc[history["holdout_loss"].idxmin(), "epoch"]))
    figure = _figure(4.4, f"{title}: training, epoch by epoch", note)
    for axes, kind in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        _draw_history(axes, history, kind, held_out, best)
    return figure


def _draw_history(axes: mpl.axes.Axes, history: pd.DataFrame, kind: str, held_out: str, best: int) -> None:
    for side, label, colour, line in (
        ("fit", "fit (trained on)", BLUE, "--"),
        ("holdout", held_out, ORANGE, "-"),
    ):
        axes.plot(
            history["epoch"],
            history[f"{side}_{kind}"],
            line,
            color=colour,
            label=label,
            marker="o",
            ms=5,
            lw=2,
        )
    value = float(history.loc[history["epoch"] == best, f"holdout_{kind}"].iloc[0])
    shown = f"{value:.2%}".replace("%", " %") if kind == "accuracy" else f"{value:.4f}"
    axes.axvline(best, color=GREY, lw=1, ls=":")
    axes.plot(
        best,
        value,
        "*",
        ms=17,
        color=ORANGE,
        mec="white",
        mew=1.2,
        zorder=5,
        label=f"best epoch {best}: {shown}",
    )
    first, last = history["epoch"].min(), history["epoch"].max()
    axes.set(xlabel="epoch", title=kind.capitalize(), xlim=(first - 0.5, last + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(y=0.12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=1)
    if kind == "accuracy":
        axes.yaxis.set_major_formatter(_percent)


@styled
def right_and_wrong(frame: pd.DataFrame, images: Images, note: str, title: str) -> Figure:
    """Up to 8 rows predicted correctly and 8 predicted wrongly, drawn with the study's seed."""
    right = (frame["Ground_Truth"] == frame["Prediction"]).to_numpy()
    chosen = []
    for group in (np.flatnonzero(right), np.flatnonzero(~right)):
        n = min(N_SAMPLES, len(group))
        chosen.append(pd.Series(group).sample(n, random_state=SAMPLE_SEED).to_numpy() if n else group)
    headings = [
        f"{len(chosen[0])} of {right.sum():,} predicted correctly: truth above, prediction below",
        f"{len(chosen[1])} of {(~right).sum():,} predicted wrongly",
    ]
    panels = [(text, rows) for text, rows in zip(headings, chosen, strict=True) if len(rows)]
    return _image_panels(frame, images, panels, f"{title}: right and wrong on valid", note)


@styled
def class_samples(frame: pd.DataFrame, images: Images, note: str, title: str) -> Figure:
    """One image of each of the first 16 classes, with truth, prediction and the class's accuracy."""
    by_class = pd.Series(np.arange(len(frame))).groupby(frame["Ground_Truth"].to_numpy())
    rows = by_class.sample(1, random_state=SAMPLE_SEED).to_numpy()[: 2 * N_SAMPLES]
    which = "class" if len(by_class) == len(rows) else f"of the first {len(rows)} classes"
    panels = [(f"One image of each {which}, and how many of the class are right", rows)]
    return _image_panels(frame, images, panels, f"{title}: class by class on valid", note, with_class=True)


def _image_panels(
    frame: pd.DataFrame, images: Images, panels: list, title: str, note: str, with_class: bool = False
) -> Figure:
    """Headed grids of images, four a line: what it is, and below what the model said and how surely."""
    n_lines = [-(-len(rows) // 4) for _, rows in panels]
    figure = _figure(1.0 + 2.75 * sum(n_lines) + 0.35 * len(panels), title, note)
    classes = per_class(frame).set_index("class") if with_class else None
    parts = np.ravel(figure.subfigures(len(panels), 1, height_ratios=n_lines, squeeze=False))
    for part, (heading, rows) in zip(parts, panels, strict=True):
        part.suptitle(heading, x=0.012, ha="left", fontsize=12)
        axes = part.subplots(-(-len(rows) // 4), 4, squeeze=False).ravel()
        for cell in axes:
            cell.set_axis_off()
        for cell, pixels, (_, row) in zip(axes, images(rows), frame.iloc[rows].iterrows(), strict=False):
            tally = classes.loc[row["Ground_Truth"]] if with_class else None
            _draw_image(cell, pixels, row, tally)
    return figure


def _draw_image(axes: mpl.axes.Axes, pixels: np.ndarray, row: pd.Series, tally: pd.Series | None) -> None:
    right = row["Ground_Truth"] == row["Prediction"]
    colour, mark = (BLUE, "✓") if right else (ORANGE, "✗")
    axes.set_axis_on()
    axes.grid(False)
    axes.imshow(pixels, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=3)
    axes.set_title(clean(row["Ground_Truth_Name"], 24), fontsize=10, loc="center", weight="bold")
    said = f"{mark} {clean(row['Prediction_Name'], 24)}\n{100 * row['Confidence']:.0f} % sure"
    if tally is not None:
        said += f" · {tally['n_correct']} of {tally['n']} right"
    axes.set_xlabel(said, color=colour, fontsize=10)


def confusion_figure(counts_KK: np.ndarray, names: list[str], note: str, title: str) -> Figure:
    """The confusion matrix: every cell with its count, or ordered by likeness with the largest named."""
    draw = _small_confusion if len(names) <= ANNOTATED_UP_TO else _large_confusion
    return draw(counts_KK, names, note, f"{title}: which class is taken for which")


@styled
def _small_confusion(counts_KK: np.ndarray, names: list[str], note: str, title: str) -> Figure:
    n_classes = len(names)
    shares_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    figure = _figure(7.6 if n_classes <= 15 else 8.6, title, note)
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
    bar.ax.yaxis.set_major_formatter(_percent)
    return figure


def similarity_order(counts_KK: np.ndarray) -> np.ndarray:
    """Classes so that those taken for each other stand together.

    Average linkage over 1 - (mean share confused, either way), leaves ordered optimally (Bar-Joseph 2001).
    """
    shares_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    alike_KK = (shares_KK + shares_KK.T) / 2
    distance_KK = 1 - alike_KK
    np.fill_diagonal(distance_KK, 0)
    return leaves_list(linkage(squareform(distance_KK, checks=False), "average", optimal_ordering=True))


@styled
def _large_confusion(counts_KK: np.ndarray, names: list[str], note: str, title: str) -> Figure:
    order = similarity_order(counts_KK)
    counts_KK, names = counts_KK[np.ix_(order, order)], [names[i] for i in order]
    n_classes, totals_K = len(names), counts_KK.sum(axis=1)
    shares_KK = counts_KK / np.maximum(totals_K[:, None], 1)
    wrong_KK = np.ma.masked_where((counts_KK == 0) | np.eye(n_classes, dtype=bool), shares_KK)
    figure = _figure(7.5, title, note)
    grid = GridSpec(1, 2, figure, width_ratios=[2.35, 1])
    axes, listing = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    smallest = 1 / max(totals_K.max(), 2)
    drawn = axes.imshow(
        wrong_KK,
        cmap="YlOrRd",
        norm=LogNorm(0.8 * smallest, max(wrong_KK.filled(0).max(), 5 * smallest)),
        aspect="equal",
    )
    axes.plot([-0.5, n_classes - 0.5], [-0.5, n_classes - 0.5], color="#C8D3DC", lw=1.5, zorder=1.5)
    axes.grid(False)
    ticks = np.arange(0, n_classes, -(-n_classes // 25))
    axes.set_yticks(ticks, [clean(names[i], 20) for i in ticks], fontsize=8)
    axes.set_xticks([])
    axes.set(
        ylabel="truth",
        xlabel="prediction, in the same order",
        xlim=(-0.5, n_classes - 0.5),
        ylim=(n_classes - 0.5, -0.5),
    )
    caption = "Classes stand beside those they are taken for (average linkage, optimal leaf order);"
    caption += f"\none in {ticks[1]} of the {n_classes} is named. Off the grey diagonal: errors."
    axes.set_title(caption, fontsize=9, weight="normal")
    bar = figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.75, aspect=40, pad=0.01)
    axes.set_anchor("N")
    bar.set_label("share of the true class's images, logarithmic", fontsize=9)
    bar.ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.xaxis.set_major_formatter(_percent)
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    listed = _strongest(wrong_KK.filled(0))
    _number_cells(axes, listed, n_classes)
    _list_confusions(listing, [(names[i], names[j], counts_KK[i, j], totals_K[i]) for i, j in listed])
    return figure


def _strongest(wrong_KK: np.ndarray) -> list[tuple[int, int]]:
    """Row and column of the largest shares, at most `N_LISTED`, none of them zero."""
    cells = np.argsort(-wrong_KK, axis=None, kind="stable")[:N_LISTED]
    rows, columns = np.unravel_index(cells, wrong_KK.shape)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if wrong_KK[i, j]]


def _number_cells(axes: mpl.axes.Axes, cells: list[tuple[int, int]], n_classes: int) -> None:
    """Number the cells, a line from each to its number; on either side of the diagonal numbers keep apart."""
    gap, away = 0.042 * n_classes, 0.06 * n_classes
    for side in (1, -1):
        numbered = [(i + j, j - i, k) for k, (i, j) in enumerate(cells, 1) if (j > i) == (side > 0)]
        places, last = {}, -gap
        for along, _, k in sorted(numbered):
            places[k] = last = max(along / 2, last + gap)
        limit = n_classes - gap
        for _, _, k in sorted(numbered, reverse=True):
            places[k] = min(places[k], limit)
            limit = places[k] - gap
        for along, across, k in numbered:
            half = across / 2 + side * away
            x, y = places[k] + half, places[k] - half
            x, y = np.clip([x, y], 2, n_classes - 3)
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


@styled
def comparison_figure(comparison: dict, note: str) -> Figure:
    """Accuracies, their difference, and the classes that changed most, from `write_comparison`'s dict."""
    c = comparison
    title = f"Improvement against baseline, {c['n']:,} images of valid"
    if not c["same_setup"]:
        keys = [difference.split(":")[0] for difference in c["setup_differences"]]
        title += f"\nNot the method alone: the arms also differ in {', '.join(keys)}"
    figure = _figure(7.6, title, note)
    grid = GridSpec(2, 2, figure, height_ratios=[1, 2.6])
    accuracies, difference = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    for y, (arm, colour) in enumerate((("baseline", BLUE), ("improvement", ORANGE))):
        m = c[arm]
        _interval(accuracies, y, m["accuracy"], m["wilson_low"], m["wilson_high"], colour)
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
    accuracies.xaxis.set_major_formatter(_percent)
    accuracies.xaxis.set_major_locator(MaxNLocator(5))
    accuracies.margins(x=0.15)
    low, high = c["difference_low"], c["difference_high"]
    _interval(difference, 0, 100 * c["difference"], 100 * low, 100 * high, DARK)
    difference.axvline(0, color=GREY, lw=1.2)
    difference.set(ylim=(0.6, -0.9), yticks=[], title="Difference in points")
    said = f"{_signed(c['difference'], 2)}  [{_signed(low, 2)}, {_signed(high, 2)}]"
    p = c["mcnemar_p"]
    said += f"\nMcNemar {'p < 0.0001' if p < 1e-4 else f'p = {p:.4f}'}"
    difference.text(0.5, 0.93, said, ha="center", va="top", transform=difference.transAxes, fontsize=10.5)
    difference.margins(x=0.15)
    _draw_changes(figure.add_subplot(grid[1, :]), c)
    return figure


def _signed(share: float, digits: int) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.{digits}f}".replace("-", "−")


def _interval(axes: mpl.axes.Axes, y: float, value: float, low: float, high: float, colour: str) -> None:
    axes.errorbar(
        value, y, xerr=[[value - low], [high - value]], fmt="o", ms=8, lw=2.5, capsize=5, color=colour
    )


def _draw_changes(axes: mpl.axes.Axes, comparison: dict) -> None:
    """The classes that gained and lost most, as pairs of dots."""
    gained, lost = comparison["classes_gained"], comparison["classes_lost"]
    rows = gained + lost[::-1]
    for y, row in enumerate(rows):
        better = row["change"] > 0
        colour = ORANGE if better else BLUE
        axes.plot([row["baseline"], row["improvement"]], [y, y], color=colour, lw=2, alpha=0.45, zorder=1)
        axes.text(
            1.01,
            y,
            _signed(row["change"], 0),
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=10,
            color=colour,
            weight="bold",
        )
    for arm, colour in (("baseline", BLUE), ("improvement", ORANGE)):
        axes.scatter([row[arm] for row in rows], range(len(rows)), s=50, color=colour, label=arm, zorder=2)
    axes.set_yticks(range(len(rows)), [clean(row["name"], 28) for row in rows], fontsize=10)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    if gained and lost:
        axes.axhline(len(gained) - 0.5, color=GREY, lw=1, ls=":")
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(_percent)
    axes.set(title="Classes that gained and lost most", xlabel="accuracy in the class")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
