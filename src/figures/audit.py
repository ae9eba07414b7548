"""The figure of the audit: images that the data set has more than once, or nearly so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from src.figures.style import BLUE, DARK, ORANGE, Images, blank_figure, clean, styled

COLUMNS = {1: 6, 2: 4}  # by the images of a cell
TEXT_WIDTH = {1: 22, 2: 32}  # characters below a cell at `TEXT_SIZE`
TEXT_SIZE, SMALL_TEXT = 8.5, 7.5  # where a line is longer


class Cell(NamedTuple):
    """Images that stand side by side, the lines below them, and whether their frame is orange."""

    rows: np.ndarray
    text: str
    marked: bool


@styled
def copies_figure(cells: Sequence[Cell], images: Images, title: str, note: str) -> Figure:
    """A grid of cells, all with one image or all with two."""
    n_images = len(cells[0].rows)
    n_columns, n_text = COLUMNS[n_images], max(cell.text.count("\n") + 1 for cell in cells)
    n_lines = -(-len(cells) // n_columns)
    height = (8.6 / n_columns - 0.15) / n_images + 0.16 * n_text + 0.15
    figure = blank_figure(1.1 + height * n_lines, title, note)
    places = figure.subplots(n_lines, n_columns, squeeze=False).ravel()
    for axes in places:
        axes.set_axis_off()
    for axes, cell in zip(places, cells, strict=False):
        _draw_cell(axes, cell, np.concatenate(images(cell.rows), axis=1))
    return figure


def _draw_cell(axes: mpl.axes.Axes, cell: Cell, pixels: np.ndarray) -> None:
    axes.set_axis_on()
    axes.grid(False)
    axes.imshow(pixels, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=ORANGE if cell.marked else BLUE, linewidth=2.5)
    lines, width = cell.text.split("\n"), TEXT_WIDTH[len(cell.rows)]
    size = TEXT_SIZE if max(map(len, lines)) <= width else SMALL_TEXT
    lines = [clean(line, int(width * TEXT_SIZE / size)) for line in lines]
    axes.set_xlabel("\n".join(lines), fontsize=size, color=DARK)
