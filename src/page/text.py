"""Numbers and names as the page shows them."""

from __future__ import annotations

NONE = "–"
SPACE = "\u00a0"  # before a unit: no line breaks there


def in_percent(share: float | None, digits: int = 2) -> str:
    """A share as `54.75 %`."""
    return NONE if share is None else f"{100 * share:.{digits}f}{SPACE}%"


def in_points(share: float | None, digits: int = 2) -> str:
    """A difference of shares in points, with its sign."""
    return NONE if share is None else f"{100 * share:+.{digits}f}".replace("-", "−")


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """Bounds of a share in percent."""
    return "" if low is None or high is None else f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def signed_interval(low: float, high: float, digits: int = 2) -> str:
    """Bounds of a difference in points."""
    return f"[{in_points(low, digits)}, {in_points(high, digits)}]"


def count(n: int | None) -> str:
    return NONE if n is None else f"{n:,}"


def short(name: str) -> str:
    """The first of a class's synonyms."""
    return name.split(", ")[0]


def duration(seconds: float | None) -> str:
    """Seconds as minutes, or as they are below two of them."""
    if seconds is None:
        return NONE
    return f"{seconds:.0f}{SPACE}s" if seconds < 120 else f"{seconds / 60:.1f}{SPACE}min"


def probability(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"
