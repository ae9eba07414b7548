"""The page's charts as plain values: what lies where, and what a reader hears of it.

`report.html` draws them in percent of the plotting area, so that text keeps its size at any width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
from matplotlib.ticker import MaxNLocator

from src.evaluate import reliability
from src.figures.style import percent
from src.page.read import Arm
from src.page.text import in_percent


@dataclass(frozen=True)
class Axis:
    """A linear scale with its ticks: (value, label)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    @classmethod
    def over(cls, values: Sequence[float], label: Callable[[float], str] = percent) -> Axis:
        """From the round number below the least value to the one above the largest."""
        ticks = _round_numbers(min(values), max(values))
        return cls(ticks[0], ticks[-1], tuple((tick, label(tick)) for tick in ticks))

    @classmethod
    def around_zero(cls, end: float) -> Axis:
        """From -end to end, in points; ticks at the round numbers between."""
        ticks = [tick for tick in _round_numbers(-end, end) if abs(tick) <= end]
        return cls(-end, end, tuple((tick, tick_in_points(tick)) for tick in ticks))

    def at(self, value: float) -> str:
        """The place of a value from the start of the axis; values beyond it lie on its ends."""
        return f"{100 * self._share(value):.2f}%"

    def up(self, value: float) -> str:
        """The same from the end of the axis: the top of a chart."""
        return f"{100 * (1 - self._share(value)):.2f}%"

    def _share(self, value: float) -> float:
        return min(max((value - self.low) / (self.high - self.low), 0), 1)


def _round_numbers(low: float, high: float) -> list[float]:
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [round(float(tick), 9) for tick in ticks]


def tick_in_points(share: float) -> str:
    """A tick of an axis of differences."""
    return f"{round(100 * share, 6):+g}".replace("-", "−") if share else "0"


SHARES = Axis(0, 1, tuple((k / 5, percent(k / 5)) for k in range(6)))
HALVES = Axis(0, 1, tuple((k / 2, percent(k / 2)) for k in range(3)))


@dataclass(frozen=True)
class Dot:
    """A value with its interval, if it has one; `style` are classes of style.css."""

    style: str
    value: float
    low: float | None = None
    high: float | None = None
    x: float | None = None


@dataclass(frozen=True)
class Mark:
    """What is read out together: all dots between two places of the x axis."""

    left: float
    right: float
    says: str
    dots: tuple[Dot, ...]

    def width(self, x: Axis) -> str:
        return f"{100 * (self.right - self.left) / (x.high - x.low):.2f}%"


@dataclass(frozen=True)
class Line:
    """Points (x, y) that are joined."""

    style: str
    points: tuple[tuple[float, float], ...]

    @property
    def steps(self) -> tuple:
        """From each point to the next."""
        return tuple(pairwise(self.points))


@dataclass(frozen=True)
class Chart:
    """Lines and marks between two axes."""

    label: str
    x: Axis
    y: Axis
    x_title: str
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...]


def curves(arms: Sequence[Arm], kind: str) -> Chart:
    """`accuracy` or `loss` of every arm by epoch, on fit and on held-out images, the best epoch as a ring."""
    label = percent if kind == "accuracy" else "{:g}".format
    lines, epochs, values = [], {}, []
    for arm in arms:
        for side, column in (("fit", f"fit_{kind}"), ("held-out", f"holdout_{kind}")):
            points = list(zip(arm.history["epoch"].tolist(), arm.history[column].tolist(), strict=True))
            lines.append(Line(f"{arm.name} {side}", tuple(points)))
            values += [value for _, value in points]
            for epoch, value in points:
                epochs.setdefault(epoch, {}).setdefault(arm, []).append((side, value))
    last = max(epochs)
    step = -(-last // 12)  # every epoch has a tick while there are no more than 12
    x = Axis(0.5, last + 0.5, tuple((epoch, str(epoch)) for epoch in range(1, last + 1, step)))
    marks = tuple(_epoch_mark(epoch, of_arm, kind) for epoch, of_arm in sorted(epochs.items()))
    return Chart(f"{kind.capitalize()} by epoch", x, Axis.over(values, label), "epoch", tuple(lines), marks)


def _epoch_mark(epoch: int, of_arm: dict[Arm, list[tuple[str, float]]], kind: str) -> Mark:
    parts, dots = [f"epoch {epoch}"], []
    for arm, sides in of_arm.items():
        best = epoch == arm.metrics["best_epoch"]
        said = [
            f"{side} {in_percent(value) if kind == 'accuracy' else f'{value:.4f}'}" for side, value in sides
        ]
        parts.append(f"{arm.name.capitalize()}{' (best epoch)' if best else ''}: {', '.join(said)}")
        for side, value in sides:
            chosen = " chosen" if best and side == "held-out" else ""
            dots.append(Dot(f"{arm.name} {side}{chosen}", value, x=epoch))
    return Mark(epoch - 0.5, epoch + 0.5, ". ".join(parts), tuple(dots))


def calibration(arms: Sequence[Arm]) -> Chart:
    """Accuracy against confidence by bin, with intervals (`src.evaluate.reliability`)."""
    lines, by_bin = [Line("diagonal", ((0, 0), (1, 1)))], {}
    for arm in arms:
        table = reliability(arm.predictions)
        points = zip(table["confidence"].tolist(), table["accuracy"].tolist(), strict=True)
        lines.append(Line(f"{arm.name} held-out", tuple(points)))
        for row in table.itertuples():
            dot = Dot(f"{arm.name} held-out", row.accuracy, row.wilson_low, row.wilson_high, x=row.confidence)
            said = f"{arm.name.capitalize()}: {in_percent(row.accuracy, 1)} right of {row.n:,}"
            by_bin.setdefault((row.low, row.high), []).append((said, dot))
    marks = tuple(
        Mark(
            low,
            high,
            f"confidence {percent(round(low, 3))} to {percent(round(high, 3))}. "
            + ". ".join(said for said, _ in found),
            tuple(dot for _, dot in found),
        )
        for (low, high), found in sorted(by_bin.items())
    )
    return Chart("Accuracy by confidence", SHARES, SHARES, "confidence", tuple(lines), marks)


def every_class(classes: pd.DataFrame, arms: Sequence[str]) -> Chart:
    """Each class as a column, from one arm's accuracy to the other's, the hardest for the first arm left.

    `classes` has a column of accuracies for each of `arms`, two or one.
    """
    ordered = classes.sort_values(list(arms), kind="stable")
    marks = []
    for place, row in enumerate(ordered.to_dict("records")):
        dots = tuple(Dot(arm, row[arm], x=place + 0.5) for arm in arms)
        said = ", ".join(f"{arm.capitalize()} {in_percent(row[arm], 0)}" for arm in arms)
        marks.append(Mark(place, place + 1, f"{row['name']}: {said}", dots))
    places = Axis(0, max(len(marks), 1), ())
    return Chart("Accuracy of every class", places, SHARES, "classes", (), tuple(marks))
