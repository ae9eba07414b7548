"""`tally`: the fixture that judges what was tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from attempts import Tally


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Tally]]:
    """`tally(name)` -> the `Tally` of a fault of `FAULTS`; judged when the test ends."""
    tallies: list[Tally] = []

    def start(name: str) -> Tally:
        tallies.append(Tally(name))
        return tallies[-1]

    yield start
    for each in tallies:
        each.finish(request.node.nodeid)
