"""Fetching one large file: resumable, checked by its size and a checksum, in place only when whole."""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC
from email.message import Message
from pathlib import Path

import filelock
from tqdm.auto import tqdm

from src import SetupError
from src.files import flush

ALGORITHMS = {32: "md5", 64: "sha256"}  # by the number of a checksum's digits
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be others after a while
BLOCK = 2**18


@dataclass(frozen=True)
class Patience:
    """When to give up: after so many `attempts` in a row that bring nothing new.

    Seconds: `pause` after a failure, twice as long after each further one; `timeout` without a byte is a
    failure; a server that asks for more than `longest_wait` is not waited for.
    """

    attempts: int = 5
    pause: float = 1.0
    timeout: float = 60.0
    longest_wait: float = 120.0


PATIENCE = Patience()


class WrongAnswer(Exception):
    """An answer that is not the file, or not the part of it that was asked for."""


def download(url: str, path: Path, size: int, checksum: str, patience: Patience = PATIENCE) -> None:
    """Fetch `url` to `path`, resuming `<path>.partial`; nothing is at `path` until size and checksum agree.

    `size`: bytes, 0 where none is published. `checksum`: MD5 or SHA-256 in hexadecimal. Processes that ask
    for the same file at once wait for the one that fetches it. Raises `SetupError` when the file cannot be
    had or is another one; what came of it is kept for the next call.
    """
    if _is_there(path, size):
        return
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(path.name + ".lock")):
            if not _is_there(path, size):
                _collect(url, partial, size, checksum, patience)
                flush(partial)
                os.replace(partial, path)
                _tag_file(partial).unlink(missing_ok=True)
    except (OSError, NotImplementedError) as error:
        raise SetupError(
            f"{path} cannot be written: {error}. Make room there, or pass another folder with `--cache DIR`. "
            f"What came is kept. URL: {url}"
        ) from error


def _collect(url: str, partial: Path, size: int, checksum: str, patience: Patience) -> None:
    """Bring the whole file to `partial`. Raises `SetupError` where it cannot be had or is another one."""
    reason = _fetch_all(url, partial, size, patience)
    remedy = (
        "Fetch it by hand and pass `--data FILE` (of a tar the folder that it unpacks to); Tiny-ImageNet is "
        f"on the hub as well, `--set data.source=hub`. URL: {url}"
    )
    have = _length(partial)
    if reason and (not size or have < size):
        of = f"{have:,} of {size:,} bytes" if size else f"{have:,} bytes"
        raise SetupError(f"{partial.stem}: {of} came ({reason}); run again to go on. {remedy}")
    algorithm = ALGORITHMS[len(checksum)]
    with partial.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if have != (size or have) or found != checksum:
        partial.unlink()
        _tag_file(partial).unlink(missing_ok=True)
        name = {"md5": "MD5", "sha256": "SHA-256"}[algorithm]
        expected = f"{size:,} bytes, {name} {checksum}" if size else f"{name} {checksum}"
        raise SetupError(
            f"{partial.stem}: got {have:,} bytes, {name} {found}; expected {expected}. "
            f"The file is removed. {remedy}"
        )


def _fetch_all(url: str, partial: Path, size: int, patience: Patience) -> str:
    """Ask for what is missing until all of it is there ("") or patience ends: the last failure's reason."""
    reason, failures, most = "", 0, _length(partial)
    while (not size or _length(partial) < size) and failures < patience.attempts:
        asked = 0.0
        try:
            _fetch(url, partial, size, patience.timeout)
            return ""
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and not size:  # nothing is left to send: the checksum tells
                return ""
            reason, asked = f"HTTP {error.code} {error.reason}", _asked_wait(error.headers)
            if error.code not in TRANSIENT:
                break
            if asked > patience.longest_wait:
                return f"{reason}: the server asks for {asked:,.0f} s of patience"
        except (WrongAnswer, urllib.error.URLError, ConnectionError) as error:
            reason = f"{type(error).__name__}: {error}"
        have = _length(partial)
        failures = 1 if have > most else failures + 1
        most = max(most, have)
        if failures < patience.attempts:
            time.sleep(max(asked, patience.pause * 2 ** (failures - 1)))
    return reason


def _fetch(url: str, partial: Path, size: int, timeout: float) -> None:
    """Append what is missing of `url` to `partial`.

    Bytes of two versions are never joined: the server's tag of the version stands beside `partial`. Raises
    `ConnectionError` for an answer cut short, `WrongAnswer` for one that is not of the file.
    """
    have, tag_file = _length(partial), _tag_file(partial)
    known_tag = tag_file.read_text(encoding="utf-8", errors="replace") if have and tag_file.exists() else ""
    headers = {"Range": f"bytes={have}-"} if have else {}
    if known_tag:
        headers["If-Range"] = known_tag
    with _answer(urllib.request.Request(url, headers=headers), timeout) as answer:
        at = have if answer.status == 206 else 0  # of the answer's next byte
        _require_part(answer, at, size)
        whole = size or _claimed_size(answer)
        tag = _tag(answer.headers)
        if at and known_tag and tag and tag != known_tag:
            partial.unlink()
            raise WrongAnswer(f"the file has changed from {known_tag} to {tag}: starting anew")
        keep = have if at or (tag and tag == known_tag) else 0  # a server without ranges sends all of it
        with (
            partial.open("ab" if keep else "wb") as file,
            tqdm(total=whole or None, initial=keep, unit="B", unit_scale=True, desc=partial.stem) as bar,
        ):
            if not keep:
                tag_file.write_text(tag, encoding="utf-8")
            for block in _blocks(answer):
                bar.update(file.write(block[max(0, keep - at) :]))
                at += len(block)
                if at > whole > 0:
                    return
    if at < whole:
        raise ConnectionError(f"the answer ended after {at:,} of {whole:,} bytes")


def _answer(request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    """The server's answer; whatever the network or a redirect does wrong is a `ConnectionError`."""
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.URLError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def _blocks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """The answer's bytes as they come, so that none is lost with a connection."""
    while True:
        try:
            block = answer.read1(BLOCK)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        if not block:
            return
        yield block


def _require_part(answer: http.client.HTTPResponse, start: int, size: int) -> None:
    """Refuse an error page, a packed answer, a file of another size, and another part than from `start`.

    `size`: 0 where it is not known.
    """
    headers = answer.headers
    if headers.get_content_type() == "text/html":
        raise WrongAnswer(f"a web page came in place of the file (HTTP {answer.status}, text/html)")
    packing = headers.get("Content-Encoding", "identity")
    if packing.lower() != "identity":
        raise WrongAnswer(f"the answer is packed (Content-Encoding: {packing})")
    if start:
        part = headers.get("Content-Range", "")
        if not (part.startswith(f"bytes {start}-") and part.endswith((f"/{size}" if size else "", "/*"))):
            asked = f"{start}-{size - 1}/{size}" if size else f"{start}-"
            raise WrongAnswer(f"asked for bytes {asked}, got Content-Range {part!r}")
    elif size and answer.length is not None and answer.length != size:
        raise WrongAnswer(f"the server's file has {answer.length:,} bytes, expected {size:,} bytes")


def _claimed_size(answer: http.client.HTTPResponse) -> int:
    """Bytes of the whole file, as the server says; 0 where it does not."""
    if answer.status == 206:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if total.isascii() and total.isdigit() else 0
    return answer.length or 0


def _asked_wait(headers: Message) -> float:
    """Seconds that `Retry-After` asks for, as a number or as a date; 0 without one that can be read."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time())


def _tag(headers: Message) -> str:
    """What names the version of the file for certain: a strong ETag; "" without one."""
    tag = headers.get("ETag", "").strip()
    return tag if tag.startswith('"') else ""


def _tag_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".etag")


def _is_there(path: Path, size: int) -> bool:
    """Whether `path` is the file: it is put there when it is whole."""
    return path.is_file() and path.stat().st_size == (size or path.stat().st_size)


def _length(path: Path) -> int:
    """Bytes of the file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0
