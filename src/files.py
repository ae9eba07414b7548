"""Files that are whole or not there: written beside their place, flushed, then moved in one step."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` beside `path`, flush to the disk, then move into place: readers see the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must reach the disk, too
        flush(path.parent)


def flush(path: Path) -> None:
    """Bring a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: object) -> None:
    """Readable JSON, atomically. Raises `ValueError` for NaN, which JSON does not have."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(table: pd.DataFrame, path: Path, index: bool = False, **options: Any) -> None:
    """`DataFrame.to_csv` in UTF-8, atomically; cells come back unchanged through `csv` and pandas.

    A lone carriage return ends a row for whoever reads, and is not quoted by itself: then all text is. A cell
    that starts with = + - or @ is written as it is: let a spreadsheet import its column as text.
    """
    whole = table.reset_index() if index else table
    texts = [*map(str, whole.columns), *whole.select_dtypes(exclude=["number", "bool"]).to_numpy().flat]
    quoting = csv.QUOTE_NONNUMERIC if any("\r" in str(text) for text in texts) else csv.QUOTE_MINIMAL
    options |= {"index": index, "lineterminator": "\n", "quoting": quoting}
    write_atomically(Path(path), lambda partial: table.to_csv(partial, **options))


def write_array(path: Path, array: np.ndarray) -> None:
    """`numpy.save`, atomically and under exactly this name."""

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            np.save(file, array)

    write_atomically(path, write)
