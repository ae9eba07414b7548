"""Figure of what single cells of an image add to an answer, by LIME and by SHAP."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from src.figures.explain import N_ABREAST, draw_pixels, tint, two_lines, with_gaps, worth_of_marked
from src.figures.style import BLUE, ORANGE, blank_figure, styled

LEGEND = (
    "Cells that speak for the answer are orange, those that speak against it blue, each map in full colour "
    "where it is strongest. The frame is blue where the answer is right and orange where it is wrong."
)
NAMES = {"lime": "LIME", "shap": "SHAP"}


@styled
def attribution_figure(
    images_NHWC: np.ndarray, frame: pd.DataFrame, maps: dict[str, np.ndarray], note: str
) -> Figure:
    """Images with their class, each followed by its map of every method (N,h,w), signed; two a line.

    `frame` is the prediction table of the images; the maps may be of more images, these first.
    """
    n_lines, width = -(-len(images_NHWC) // N_ABREAST), 1 + len(maps)
    figure = blank_figure(1.5 + 1.8 * n_lines, "What the answer rests on, cell by cell", f"{LEGEND}\n{note}")
    lines = np.ravel(figure.subfigures(n_lines, 1, squeeze=False))
    widths = with_gaps(width)
    grids = [line.add_gridspec(1, len(widths), width_ratios=widths) for line in lines]
    for number, pixels in enumerate(images_NHWC):
        line, place = divmod(number, N_ABREAST)
        first = place * (width + 1)
        cells = [lines[line].add_subplot(grids[line][first + i]) for i in range(width)]
        row = frame.iloc[number]
        draw_pixels(cells[0], pixels, darkest=0)
        cells[0].set_xlabel(two_lines(row["Ground_Truth_Name"]), fontsize=8, weight="bold")
        for cell, (method, maps_Nhw) in zip(cells[1:], maps.items(), strict=True):
            cell.set_title(NAMES[method], fontsize=8, loc="center", weight="normal")
            _draw_map(cell, pixels, maps_Nhw[number], row)
    return figure


def _draw_map(axes: mpl.axes.Axes, pixels: np.ndarray, map_hw: np.ndarray, row: pd.Series) -> None:
    """The image in grey under the map's tint, and below it the answer that the map is about."""
    right = row["Ground_Truth"] == row["Prediction"]
    colour, mark = (BLUE, "✓") if right else (ORANGE, "✗")
    draw_pixels(axes, pixels @ np.array([0.299, 0.587, 0.114]), 100, colour)
    strongest = np.abs(map_hw).max()
    axes.imshow(tint(map_hw / strongest if strongest else map_hw, relative=False), extent=(0, 1, 0, 1))
    axes.set_xlabel(two_lines(f"{mark} {row['Prediction_Name']}"), fontsize=8, color=colour)


def drop_findings(numbers: dict, methods: Sequence[str]) -> str:
    """What painting over the marked cells costs, a line a method, from `write_attributions`' numbers."""
    share = f"{100 * numbers['share_deleted']:.0f} %"
    return "\n".join(
        worth_of_marked(numbers[method], NAMES[method], share, "that it marks highest") for method in methods
    )
