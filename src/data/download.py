"""Fetching one large file: resumable, checked by size and MD5, in place only when whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm.auto import tqdm

from src import SetupError


def download(url: str, path: Path, size: int, md5: str, attempts: int = 5, pause: float = 1.0) -> None:
    """Fetch `url` to `path`, resuming `<path>.partial`; nothing is at `path` until size and MD5 agree.

    Waits `pause` seconds after a failure, twice as long after each further one.
    Raises `SetupError` when the file cannot be had or is another one.
    """
    if path.exists() and path.stat().st_size == size:
        return
    partial = path.with_name(path.name + ".partial")
    manual = f"Fetch it by hand and pass `--data FILE`, or use `--set data.source=hub`. URL: {url}"
    reason = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(attempts):
            time.sleep(pause * 2 ** (attempt - 1) if attempt else 0)
            try:
                _fetch(url, partial, size)
                break
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code not in (408, 425, 429, 500, 502, 503, 504):
                    break
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reason = f"{type(error).__name__}: {error}"
        have = partial.stat().st_size if partial.exists() else 0
        if have < size:
            raise SetupError(
                f"{path.name}: {have:,} of {size:,} bytes came ({reason}); run again to go on. {manual}"
            )
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if have != size or found != md5:
            partial.unlink()
            raise SetupError(
                f"{path.name}: got {have:,} bytes, MD5 {found}; expected {size:,} bytes, MD5 {md5}. "
                f"The file is removed. {manual}"
            )
        os.replace(partial, path)
    except OSError as error:
        raise SetupError(f"{path} cannot be written: {error}.") from error


def _fetch(url: str, partial: Path, size: int) -> None:
    """Append what is missing of `url` to `partial`. Raises `ConnectionError` for an answer cut short."""
    have = partial.stat().st_size if partial.exists() else 0
    if have >= size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        answered = answer.headers.get("Content-Range", "")
        goes_on = answer.status == 206 and answered.startswith(f"bytes {have}-")
        have = have if goes_on else 0  # a server without ranges sends the whole file again
        with (
            partial.open("ab" if goes_on else "wb") as file,
            tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=partial.stem) as bar,
        ):
            while have <= size and (block := answer.read(2**18)):
                have += file.write(block)
                bar.update(len(block))
    if have < size:
        raise ConnectionError(f"the answer ended after {have:,} of {size:,} bytes")
