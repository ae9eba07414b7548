"""Figures of one arm: training curves and samples of its predictions."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from src.evaluate import per_class
from src.figures.style import BLUE, GREY, ORANGE, Images, blank_figure, clean, percent, styled

N_SAMPLES, SAMPLE_SEED = 8, 42  # as the study draws them
MAX_NAMED = 60  # classes whose names still fit below their bars


@styled
def training_curve(history: pd.DataFrame, metadata: dict, note: str, title: str) -> Figure:
    """Accuracy and loss by epoch, fit against held-out, the chosen epoch marked, with its reason."""
    published = metadata.get("protocol") == "published"
    images = "valid" if published else "held-out"
    held_out = "valid (chosen and reported on)" if published else "holdout (chosen on)"
    monitor = metadata.get("config", {}).get("train", {}).get("monitor")
    reasons = {"loss": f" (lowest {images} loss)", "accuracy": f" (highest {images} accuracy)"}
    best = int(metadata.get("best_epoch", history.loc[history["holdout_loss"].idxmin(), "epoch"]))
    figure = blank_figure(4.4, f"{title}: training, epoch by epoch", note)
    for axes, kind in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        _draw_history(axes, history, kind, held_out, (best, reasons.get(monitor, "")))
        axes.set_title(f"{kind.capitalize()} on {images} and training images", fontsize=11)
    return figure


def _draw_history(
    axes: mpl.axes.Axes, history: pd.DataFrame, kind: str, held_out: str, chosen: tuple
) -> None:
    """`chosen`: the epoch and, in words, by what."""
    best, reason = chosen
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
        label=f"chosen epoch {best}{reason}: {shown}",
    )
    first, last = history["epoch"].min(), history["epoch"].max()
    axes.set(xlabel="epoch", xlim=(first - 0.5, last + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(y=0.12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=1, handlelength=3, fontsize=9)
    if kind == "accuracy":
        axes.yaxis.set_major_formatter(percent)


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
    figure = blank_figure(1.0 + 2.75 * sum(n_lines) + 0.35 * len(panels), title, note)
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


@styled
def class_counts(counts_K: np.ndarray, names: list[str], title: str, note: str) -> Figure:
    """A bar a class, from the largest: how many images it has."""
    order_K = np.argsort(-counts_K, kind="stable")
    is_named = len(names) <= MAX_NAMED
    figure = blank_figure(5.0 if is_named else 3.4, f"{title}: images of each class", note)
    axes = figure.subplots()
    axes.bar(np.arange(len(names)), counts_K[order_K], color=BLUE)
    axes.set_xticks(np.arange(len(names)) if is_named else [])
    if is_named:
        axes.set_xticklabels([clean(names[k]) for k in order_K], rotation=90, fontsize=9)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="images", xlim=(-0.7, len(names) - 0.3))
    return figure
