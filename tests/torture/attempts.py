"""Counting what was tried and what survived."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tools.torture import FAULTS

FULL = os.environ.get("TORTURE") == "full"
SHOWN = 5  # failures in the message


class Tally:
    """Attempts at one fault. `with tally.attempt("what")`: one of them, survived where nothing is raised."""

    def __init__(self, name: str) -> None:
        assert name in FAULTS, name
        self.name, self.tried, self.failures = name, 0, []

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        self.tried += 1
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            self.failures.append(f"{what}: {type(error).__name__}: {error}")

    def finish(self, test: str) -> None:
        """Leave a record where `make torture` asks for it; fail where an attempt failed, or none was made."""
        if folder := os.environ.get("TORTURE_RECORDS"):
            record = {
                "name": self.name,
                "tried": self.tried,
                "survived": self.tried - len(self.failures),
            }
            path = Path(folder) / f"{self.name}-{re.sub(r'[^A-Za-z0-9]+', '-', test)}.json"
            path.write_text(json.dumps(record), encoding="utf-8")
        assert self.tried, f"{self.name}: nothing was tried"
        lines = "\n".join(self.failures[:SHOWN])
        assert not self.failures, f"{len(self.failures)} of {self.tried} did not survive:\n{lines}"


def tries(full: int, few: int) -> int:
    """How often: `full` in `make torture`, `few` in the ordinary suite."""
    return full if FULL else few
