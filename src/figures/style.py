"""What all figures share: colours, fonts, the empty figure with its title and footer, and small helpers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import wraps

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

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


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under `STYLE` without changing anybody's settings."""

    @wraps(function)
    def draw(*args: object, **kwargs: object) -> Figure:
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return draw


def blank_figure(height: float, title: str, note: str) -> Figure:
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


def percent(share: float, _: int | None = None) -> str:
    """A tick of an axis of shares, with no more digits than it needs."""
    return f"{round(100 * share, 6):g} %"


def signed(share: float, digits: int) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.{digits}f}".replace("-", "−")


def interval(axes: mpl.axes.Axes, y: float, value: float, low: float, high: float, colour: str) -> None:
    axes.errorbar(
        value, y, xerr=[[value - low], [high - value]], fmt="o", ms=8, lw=2.5, capsize=5, color=colour
    )
