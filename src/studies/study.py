"""What a study is: rows, each a preset with some fields changed, that share data, budget and seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from src import SetupError
from src.config import Config, get
from src.folders import study_folder

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Times:
    """A multiple of a field that the profile sets; of a size, to the nearest 32 pixels."""

    factor: float
    field: str

    def of(self, config: Config) -> float | int:
        value = get(config, self.field)
        return round(self.factor * value / 32) * 32 if isinstance(value, int) else self.factor * value


@dataclass(frozen=True)
class Row:
    """A line of a study: a preset with some fields changed, and the row that it is compared with.

    `profiles`: where it can be run, by the weights that it needs (empty: everywhere).
    """

    name: str
    arm: str = "baseline"
    changes: dict[str, object] = field(default_factory=dict)
    against: str = ""
    profiles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """Rows to run under several seeds. `name` is the command, and names the files below results/`folder`.

    `budgets`: by profile, what every row shares. `over_images`: rows differ in how many images they train on,
    and the figure has that as its axis. `timed`: how long a row's model takes to answer is recorded, too.
    `note`: what else all rows share, beside what their table says.
    """

    name: str
    title: str
    folder: str
    rows: tuple[Row, ...]
    budgets: dict[str, dict[str, object]]
    over_images: bool = False
    timed: bool = False
    note: str = ""

    def row(self, name: str) -> Row:
        """The row called `name`. Raises `SetupError` naming all rows where there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise SetupError(f"no row is called {name!r}; the rows are: {'; '.join(r.name for r in self.rows)}.")

    def rows_of(self, profile: str) -> list[Row]:
        """The rows that can be run in `profile`."""
        return [row for row in self.rows if not row.profiles or profile in row.profiles]

    def path(self, results: Path, is_stand_in: bool = False) -> Path:
        """The folder of its results."""
        return study_folder(results / self.folder, is_stand_in)
