"""Figures of where a model looks, and of its attention over training."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from src.figures.style import BLUE, GREY, ORANGE, blank_figure, clean, signed, styled

DARKEST = 0.65  # opacity of the tint where a map is strongest
N_ABREAST = 2  # images a line
LEGEND = (
    "Grad-CAM: the stronger the orange, the more evidence for the answer; where that is wrong, the dashed "
    "line goes round the stronger half of the evidence for the truth. Attention: orange where a position "
    "gets up to twice the average, blue down to half of it, no tint where all get the same."
)


@dataclass(frozen=True)
class MapColumn:
    """A column of maps (N,H,W): an arm's Grad-CAM in [0, 1] for its answers, or attention (1: the average).

    Grad-CAM has the arm's prediction table of the rows and its maps for the true classes, too.
    """

    title: str
    maps_NHW: np.ndarray
    frame: pd.DataFrame | None = None
    truth_maps_NHW: np.ndarray | None = None


@styled
def where_it_looks(
    groups: list[tuple[str, int]], images_NHWC: np.ndarray, columns: list[MapColumn], note: str
) -> Figure:
    """Images with their class, each followed by its map of every column; two a line, under headings.

    `groups`: heading and number of images (`N_ABREAST` at most), in the order of images and maps.
    """
    arms = [column.title for column in columns if column.frame is not None]
    title = "Where the two arms look" if len(arms) > 1 else f"Where {arms[0]} looks"
    figure = blank_figure(2.5 + 1.8 * len(groups), title, f"{LEGEND}\n{note}")
    parts = np.ravel(figure.subfigures(len(groups), 1, squeeze=False))
    numbers, width = iter(range(len(images_NHWC))), 1 + len(columns)
    for part, (heading, n_images) in zip(parts, groups, strict=True):
        part.suptitle(heading, x=0.012, ha="left", fontsize=11)
        grid = part.add_gridspec(1, N_ABREAST * (width + 1) - 1, width_ratios=with_gaps(width))
        for place in range(N_ABREAST):
            first = place * (width + 1)
            cells = [part.add_subplot(grid[first + i]) for i in range(width)]
            if place < n_images:
                _draw_image(cells, images_NHWC, columns, next(numbers))
            else:
                for cell in cells:
                    cell.set_axis_off()
    return figure


def with_gaps(width: int) -> list[float]:
    """Widths of the panels of a line, with a narrow gap between one image's and the next one's."""
    return ([1.0] * width + [0.1]) * (N_ABREAST - 1) + [1.0] * width


def _draw_image(
    cells: list[mpl.axes.Axes], images_NHWC: np.ndarray, columns: list[MapColumn], number: int
) -> None:
    """The image with its class, then its maps under their headings."""
    draw_pixels(cells[0], images_NHWC[number], darkest=0)
    name = columns[0].frame["Ground_Truth_Name"].iloc[number]
    cells[0].set_xlabel(two_lines(name), fontsize=8, weight="bold")
    for cell, column in zip(cells[1:], columns, strict=True):
        cell.set_title(column.title, fontsize=8, loc="center", weight="normal")
        _draw_map(cell, images_NHWC[number], column, number)


def draw_pixels(axes: mpl.axes.Axes, pixels: np.ndarray, darkest: int, colour: str = GREY) -> None:
    """An image, enlarged; a grey one with black as light as `darkest` levels, so that tints show on it."""
    axes.grid(False)
    axes.imshow(pixels, "gray", vmin=-darkest, vmax=255, interpolation="nearest", extent=(0, 1, 0, 1))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=1.5)


def _draw_map(axes: mpl.axes.Axes, pixels: np.ndarray, column: MapColumn, number: int) -> None:
    """The image in grey under the map's tint, and below it the answer that the map is about."""
    map_HW, grey = column.maps_NHW[number], pixels @ np.array([0.299, 0.587, 0.114])
    if column.frame is None:
        draw_pixels(axes, grey, 100)
        axes.imshow(tint(map_HW, relative=True), extent=(0, 1, 0, 1))
        return
    row = column.frame.iloc[number]
    right = row["Ground_Truth"] == row["Prediction"]
    colour, mark = (BLUE, "✓") if right else (ORANGE, "✗")
    draw_pixels(axes, grey, 100, colour)
    axes.imshow(tint(map_HW, relative=False), extent=(0, 1, 0, 1))
    truth_HW = column.truth_maps_NHW[number]
    if not right and truth_HW.min() < 0.5 < truth_HW.max():
        centres = (np.arange(len(truth_HW)) + 0.5) / len(truth_HW)
        axes.contour(centres, centres[::-1], truth_HW, [0.5], colors=[BLUE], linestyles="--", linewidths=1.3)
    answer = two_lines(f"{mark} {row['Prediction_Name']}")
    axes.set_xlabel(f"{answer}\n{100 * row['Confidence']:.0f} % sure", fontsize=8, color=colour)


def two_lines(name: str) -> str:
    return "\n".join(textwrap.wrap(clean(name), 15, max_lines=2, placeholder="…"))


def tint(map_HW: np.ndarray, relative: bool) -> np.ndarray:
    """(H,W) -> RGBA: a share in [0, 1] as the opacity of orange; multiples of the average on a log scale, in
    orange above 1 and in blue below, strongest from 2 up and from ½ down."""
    strength_HW = np.log2(np.clip(map_HW, 0.5, 2)) if relative else map_HW
    colours_HW3 = np.where(strength_HW[..., None] > 0, to_rgb(ORANGE), to_rgb(BLUE))
    return np.concatenate([colours_HW3, DARKEST * np.abs(strength_HW)[..., None]], axis=2)


def findings(numbers: dict) -> str:
    """What was measured beside the pictures, a line each, from `write_explanations`' numbers."""
    share, lines = f"{100 * numbers['share_deleted']:.0f} %", []
    of_arms = {arm: part for arm, part in numbers.items() if isinstance(part, dict) and "grad_cam" in part}
    for arm, measured in of_arms.items():
        for kind, what in (("grad_cam", "that Grad-CAM marks"), ("attention_map", "with most attention")):
            if m := measured.get(kind):
                lines.append(worth_of_marked(m, arm.replace("_", " ").capitalize(), share, what))
        if m := measured.get("attention"):
            lines.append(
                f"Switching the attention off (gate {listed(m['gates'])} to 0) changes "
                f"{m['answers_changed']} of {m['n']} answers; having it on is worth {with_interval(m)}."
            )
    return "\n".join(lines)


def worth_of_marked(m: dict, whose: str, share: str, marked: str) -> str:
    """What painting over the marked share of the pixels costs, and a random share, from `deletion_drop`."""
    whole, without, random = (
        f"{100 * m[name]:.1f} %"
        for name in ("accuracy", "accuracy_without_marked", "accuracy_without_random")
    )
    return (
        f"{whose}, {m['n']} images of valid: {whole} right; {without} without the {share} of pixels "
        f"{marked}, {random} without a random {share}; the marked ones are worth {with_interval(m)} more."
    )


def with_interval(m: dict) -> str:
    value, low, high = (signed(m[f"difference{end}"], 1) for end in ("", "_low", "_high"))
    return f"{value} points (95 % interval {low} to {high})"


@styled
def attention_over_training(history: pd.DataFrame, best_epoch: int, note: str) -> Figure:
    """Gate and entropy of the attention by epoch, with the values at which it does nothing."""
    text = f"{attention_sentence(history, best_epoch)}\n{note}"
    figure = blank_figure(4.8, "The attention, epoch by epoch", text)
    nothing = ((0, "0: adds nothing"), (1, "1: all places alike"))
    titles = ("Gate", "Entropy of the attention, share\nof its largest (1 = all places alike)")
    for axes, kind, title, (value, label) in zip(
        figure.subplots(1, 2), ("gate", "attention_entropy"), titles, nothing, strict=True
    ):
        axes.axhline(value, color=ORANGE, lw=1.5, ls="--", label=label)
        for column, line in zip(_columns(history, kind), ("-", "--", ":", "-.") * 2, strict=False):
            label = column.removeprefix(kind).replace("_", "layer ") or None
            axes.plot(history["epoch"], history[column], f"o{line}", color=BLUE, ms=5, lw=2, label=label)
        axes.axvline(best_epoch, color=GREY, lw=1, ls=":", label=f"epoch {best_epoch}, the one chosen")
        first, last = history["epoch"].min(), history["epoch"].max()
        axes.set(xlabel="epoch", title=title, xlim=(first - 0.5, last + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(y=0.12)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    axes.set_ylim(0, 1.08)
    return figure


def attention_sentence(history: pd.DataFrame, best_epoch: int) -> str:
    """Gate and entropy at the chosen epoch, beside the values that would mean that attention does nothing."""
    row = history.set_index("epoch").loc[best_epoch]
    gates, entropies = (
        listed(row[column] for column in _columns(history, kind)) for kind in ("gate", "attention_entropy")
    )
    return (
        f"At epoch {best_epoch}, the one chosen, the gate is {gates}; at 0 the attention would add nothing. "
        f"The entropy of its weights is {entropies} of the largest; at 1 every position would count the same "
        "in every image, and the attention would be a plain average."
    )


def listed(values: Iterable[float]) -> str:
    """The numbers with three digits."""
    return " and ".join(f"{value:.3g}".replace("-", "−") for value in values)


def _columns(history: pd.DataFrame, kind: str) -> list[str]:
    """`kind` itself, or its columns of several layers."""
    return [column for column in history if column.startswith(kind)]
