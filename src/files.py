"""Files that are whole or not there: written beside their place, flushed, then moved in one step."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from src import NotNow, SetupError

if TYPE_CHECKING:
    import pandas as pd

# What a spreadsheet takes for a formula; of such a cell that has apostrophes already, all are kept.
FORMULA = re.compile(r"'*[=+\-@\t\r]")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` beside `path`, flush to the disk, then move into place: readers see the old or the new.

    Raises `NotNow` where that fails, as on a full disk; what is at `path` then stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        flush(partial)
        os.replace(partial, path)
        if os.name == "posix":  # the new name must reach the disk, too
            flush(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # the latter two from torch and safetensors
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # a read-only disk
            partial.unlink(missing_ok=True)


def _cannot_write(path: Path, error: Exception) -> NotNow:
    """What a user reads; libraries' own errors often hide a full disk, so its free space is named as well."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    for known in (error.__context__, error):
        reason = getattr(known, "strerror", None) or reason
    room = ""
    with contextlib.suppress(OSError):
        room = f"; {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there"
    return NotNow(
        f"{path} cannot be written ({reason}{room}). Make room and give the same command again, or choose "
        "another folder with --results, --runs or --cache. What was there before is untouched."
    )


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


def hub_sha256(path: Path) -> str:
    """SHA-256 by which the Hugging Face cache names the large file that `path` leads to; "" for any other."""
    name = path.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else ""


def write_json(path: Path, data: object) -> None:
    """Readable JSON, atomically. Raises `ValueError` for NaN, which JSON does not have."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(
    table: pd.DataFrame, path: Path, index: bool = False, inert: bool = True, **options: Any
) -> None:
    """`DataFrame.to_csv` in UTF-8, atomically; cells come back through `csv` and pandas.

    `inert`: text that a spreadsheet would run as a formula gets an apostrophe in front (OWASP, "CSV
    injection"), which `as_meant` takes off. A lone carriage return ends a row for whoever reads, and is not
    quoted by itself: then all text is.
    """
    whole = table.reset_index(allow_duplicates=True) if index else table.copy()
    places = [place for place, kind in enumerate(whole.dtypes) if kind.kind not in "biuf"]
    if inert:
        whole.columns = [_inert(name) for name in whole.columns]
        for place in places:
            whole.isetitem(place, whole.iloc[:, place].map(_inert))
    texts = [*map(str, whole.columns), *whole.iloc[:, places].to_numpy().flat]
    quoting = csv.QUOTE_NONNUMERIC if any("\r" in str(text) for text in texts) else csv.QUOTE_MINIMAL
    options |= {"index": False, "lineterminator": "\n", "quoting": quoting}
    write_atomically(Path(path), lambda partial: whole.to_csv(partial, **options))


def _inert(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def as_meant(cell: object) -> object:
    """A cell without the apostrophe that `write_csv` puts before what would be a formula."""
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") and FORMULA.match(cell) else cell


def write_array(path: Path, array: np.ndarray) -> None:
    """`numpy.save`, atomically and under exactly this name."""

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            np.save(file, array)

    write_atomically(path, write)


def read_array(path: Path, mapped: bool = False) -> np.ndarray:
    """What `write_array` wrote; `mapped`: left on the disk. Raises `SetupError` for anything else."""
    try:
        array = np.load(path, mmap_mode="c" if mapped else None, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive, not an array")
    except Exception as error:  # foreign bytes fail in any of numpy's, zipfile's and tokenize's ways
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise SetupError(f"{path} is damaged ({reason}). Delete it and run again.") from error
    return array
