"""Servers that cut off, stall, refuse, redirect or send other bytes; a hub that does, or is out of reach."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import importlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny
from torture.attempts import FULL, tries

from src import SetupError
from src.config import ModelConfig
from src.data import download as downloading
from src.data.download import Patience, download
from src.files import sha256
from src.model.build import build_model

ROOT = Path(__file__).resolve().parents[2]
CONTENT, OTHER = (random.Random(seed).randbytes(300_000) for seed in (1, 2))
MD5 = hashlib.md5(CONTENT).hexdigest()
BOTH = ("Range", "If-Range")
STALL = 0.3  # seconds; twice as long as the patience below


# ------------------------------------------------------------------------------------------ one large file


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as `server.plan` says, a fault a request; then as it should."""

    def do_GET(self) -> None:
        self.server.asked.append((self.headers.get("Range"), self.headers.get("If-Range")))
        plan = self.server.plan if self.path == "/file.zip" else []
        answer = circle if self.path == "/circle" else plan.pop(0) if plan else send
        try:
            answer(self)
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def send(
    handler: Handler,
    content: bytes = CONTENT,
    tag: str | None = '"one"',
    stop: int | None = None,
    ignores: tuple[str, ...] = (),
    **headers: str | None,
) -> None:
    """What a server should answer; up to byte `stop`, with some of the client's headers ignored."""
    asked, condition = (
        None if name in ignores else handler.headers.get(name) for name in ("Range", "If-Range")
    )
    start = int(asked[6:-1]) if asked and condition in (None, tag) else 0
    if start >= len(content):
        return handler.send_error(416)
    handler.send_response(206 if start else 200)
    part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
    own = {"Content-Length": str(len(content) - start), "ETag": tag, **part}
    own |= {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in own.items():
        if value is not None:
            handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content[start:stop])


new_version = functools.partial(send, content=OTHER, tag='"two"')


def stall(handler: Handler, stop: int) -> None:
    send(handler, stop=stop)
    handler.wfile.flush()
    threading.Event().wait(STALL)


def refuse(handler: Handler, status: int, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(b"no")


def circle(handler: Handler) -> None:
    refuse(handler, 302, Location="/circle")


def reset(handler: Handler) -> None:
    """Closed by a reset instead of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.wfile.close()
    handler.connection.close()


def page(handler: Handler, with_length: bool) -> None:
    """What a portal answers in place of everything."""
    text = b"<!doctype html><title>Sign in</title>" * 50
    length = str(len(text)) if with_length else None
    send(handler, text, None, None, BOTH, Content_Type="text/html", Content_Length=length)


def packed(handler: Handler) -> None:
    whole = gzip.compress(CONTENT)
    send(handler, whole, None, None, BOTH, Content_Encoding="gzip", Content_Length=None)


def other_part(handler: Handler) -> None:
    """Not from where it was asked for."""
    rest = CONTENT[7:]
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes 7-{len(CONTENT) - 1}/{len(CONTENT)}")
    handler.send_header("Content-Length", str(len(rest)))
    handler.end_headers()
    handler.wfile.write(rest)


def garbage(handler: Handler) -> None:
    handler.wfile.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")


part = functools.partial
# Faults after which the next answer may be right: the same call gets the file.
PASSING: dict[str, Callable[[random.Random], Callable[[Handler], None]]] = {
    "cut off": lambda rng: part(send, stop=rng.randrange(len(CONTENT))),
    "cut off without a length": lambda rng: part(send, stop=rng.randrange(300_000), Content_Length=None),
    "cut off without a tag": lambda rng: part(send, stop=rng.randrange(300_000), tag=None),
    "cut off, ranges ignored": lambda rng: part(send, stop=rng.randrange(300_000), ignores=BOTH),
    "stall": lambda rng: part(stall, stop=rng.randrange(len(CONTENT))),
    "429": lambda rng: part(refuse, status=429),
    "429, seconds": lambda rng: part(refuse, status=429, Retry_After=str(rng.randrange(100))),
    "429, a date": lambda rng: part(refuse, status=429, Retry_After=formatdate(time.time() + 9, usegmt=True)),
    "429, nonsense": lambda rng: part(refuse, status=429, Retry_After="soon"),
    "500": lambda rng: part(refuse, status=500),
    "503": lambda rng: part(refuse, status=503, Retry_After="3"),
    "shorter": lambda rng: part(send, content=CONTENT[:1000], ignores=BOTH),
    "longer": lambda rng: part(send, content=CONTENT + b"more", ignores=BOTH),
    "another part": lambda rng: other_part,
    "a part of a larger file": lambda rng: part(send, content=CONTENT + OTHER[:1000]),
    "ranges ignored": lambda rng: part(send, ignores=BOTH),
    "redirected": lambda rng: part(refuse, status=rng.choice((301, 302, 303, 307, 308)), Location="/there"),
    "redirected to nonsense": lambda rng: part(refuse, status=302, Location="http://[nowhere"),
    "redirected to a closed port": lambda rng: part(refuse, status=302, Location="http://127.0.0.1:1/x"),
    "packed": lambda rng: packed,
    "reset": lambda rng: reset,
    "a page": lambda rng: part(page, with_length=True),
    "a page without a length": lambda rng: part(page, with_length=False),
    "garbage": lambda rng: garbage,
}
# Faults that end the call: nothing better is to be expected, or the bytes are known to be others at the end.
ENDING: dict[str, Callable[[random.Random], Callable[[Handler], None]]] = {
    "403": lambda rng: part(refuse, status=403),
    "404": lambda rng: part(refuse, status=404),
    "410": lambda rng: part(refuse, status=410),
    "429 until tomorrow": lambda rng: part(refuse, status=429, Retry_After="86400"),
    "redirected in a circle": lambda rng: circle,
    "redirected to a file": lambda rng: part(refuse, status=302, Location="file:///etc/passwd"),
    "another file": lambda rng: new_version,
    "another file without a tag": lambda rng: part(send, content=OTHER, tag=None, ignores=BOTH),
    "longer without a length": lambda rng: part(
        send, content=CONTENT + b"more", ignores=BOTH, Content_Length=None
    ),
}
# A new version in the middle: the old one's part may not be joined to it.
CHANGING: dict[str, Callable[[random.Random], Callable[[Handler], None]]] = {
    "a new version, cut off": lambda rng: part(new_version, stop=rng.randrange(1000, 300_000)),
    "a new version, If-Range ignored": lambda rng: part(
        new_version, stop=rng.randrange(1000, 300_000), ignores=("If-Range",)
    ),
}


class Server(http.server.ThreadingHTTPServer):
    """`plan`: what to answer to the next requests; `asked`: their Range and If-Range."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, handler: type = Handler) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.plan, self.asked, self.broken = [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError | ValueError):  # a client that has gone is no matter
            self.broken.append(error)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server
        server.shutdown()
        assert not server.broken


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that `download` would have waited."""
    found: list[float] = []
    monkeypatch.setattr(downloading, "time", SimpleNamespace(sleep=found.append, time=time.time))
    return found


def fetch(server: Server, folder: Path, **patience: float) -> None:
    """`download` of `CONTENT` to file.zip; an error names URL, reason and remedy, and nothing is there."""
    path, url = folder / "file.zip", f"{server.url}/file.zip"
    try:
        download(url, path, len(CONTENT), MD5, Patience(**{"attempts": 3, "timeout": STALL / 2, **patience}))
    except SetupError as error:
        said = str(error)
        assert not path.exists() and url in said and len(said) < 1000
        assert "--data FILE" in said and ("run again" in said or "is removed" in said)
        raise
    assert path.read_bytes() == CONTENT
    assert {each.name for each in folder.iterdir()} <= {"file.zip", "file.zip.lock"}


def came(folder: Path) -> bytes:
    """What is kept for the next try."""
    partial = folder / "file.zip.partial"
    return partial.read_bytes() if partial.exists() else b""


def start_over(server: Server, *plan: Callable[[Handler], None]) -> None:
    server.plan, server.asked = list(plan), []


def test_one_fault_is_got_over_in_the_same_call(server, waits, tmp_path, tally):
    """With nothing there yet, and with a part."""
    attempts, rng = tally("downloads"), random.Random(0)
    for name, fault in PASSING.items():
        for before in ([], [part(send, stop=100_000)]):
            with attempts.attempt(f"{name}, {'a part' if before else 'nothing'} there"):
                start_over(server, *before, fault(rng))
                fetch(server, tmp_path / f"{name}{len(before)}")


def test_what_cannot_be_got_over_is_one_error(server, waits, tmp_path, tally):
    attempts, rng = tally("downloads"), random.Random(0)
    for name, fault in ENDING.items():
        with attempts.attempt(name):
            start_over(server, fault(rng))
            with pytest.raises(SetupError):
                fetch(server, tmp_path / name)
            start_over(server)
            fetch(server, tmp_path / name)


def test_any_sequence_of_faults(server, waits, tmp_path, tally):
    """Called until it is there: never anything else, what came is kept, two versions are never joined."""
    attempts = tally("downloads")
    kinds = {**PASSING, **ENDING, **CHANGING}
    for seed in range(tries(100, 12)):
        rng = random.Random(seed)
        names = rng.choices(list(kinds), k=rng.randint(1, 8))
        folder, most = tmp_path / str(seed), 0
        with attempts.attempt(f"seed {seed}: {', '.join(names)}"):
            start_over(server, *(kinds[name](rng) for name in names))
            for _ in range(len(names) + 2):
                try:
                    fetch(server, folder)
                    break
                except SetupError:
                    part_of_it = came(folder)
                    assert CONTENT.startswith(part_of_it) or OTHER.startswith(part_of_it)
                    if set(names) <= {"cut off", "stall", "429", "500", "503", "404", "reset", "a page"}:
                        assert len(part_of_it) >= most
                        most = len(part_of_it)
            assert (folder / "file.zip").exists()


def test_cut_off_again_and_again_with_a_little_more_each_time(server, waits, tmp_path, tally):
    """Attempts count only while they bring nothing."""
    with tally("downloads").attempt("30 answers of 10,000 bytes"):
        start_over(server, *(part(send, stop=stop) for stop in range(10_000, 300_001, 10_000)))
        fetch(server, tmp_path / "new", attempts=2)
        assert [asked for asked, _ in server.asked[1:]] == [
            f"bytes={n}-" for n in range(10_000, 300_000, 10_000)
        ]


def test_what_the_server_asks_for_is_waited(server, waits, tmp_path, tally):
    with tally("downloads").attempt("Retry-After"):
        date = formatdate(time.time() + 9, usegmt=True)
        asked = [part(refuse, status=429, Retry_After=text) for text in ("7", date, "soon")]
        start_over(server, *asked, part(refuse, status=503))
        fetch(server, tmp_path / "new", attempts=5)
        assert waits[0] == 7 and 7 < waits[1] <= 9 and waits[2:] == [4, 8]
    with tally("downloads").attempt("Retry-After beyond patience"):
        waits.clear()
        start_over(server, part(refuse, status=429, Retry_After="3600"))
        with pytest.raises(SetupError, match=r"HTTP 429 .* asks for 3,600 s"):
            fetch(server, tmp_path / "newer")
        assert not waits and len(server.asked) == 1


def test_parts_of_two_versions_are_never_joined(server, waits, tmp_path, tally):
    """The part that is there is of the version before; whether the server heeds If-Range or not."""
    attempts = tally("downloads")
    for ignores in ((), ("If-Range",)):
        folder = tmp_path / f"ignores {len(ignores)}"
        with attempts.attempt(f"{ignores or 'nothing'} ignored"):
            start_over(server, part(new_version, stop=200_000))
            with pytest.raises(SetupError):
                fetch(server, folder, attempts=1)
            assert came(folder) == OTHER[:200_000]
            start_over(server, part(send, ignores=ignores))
            fetch(server, folder)
            assert server.asked[0] == ("bytes=200000-", '"two"')


def test_two_at_once_fetch_it_once(server, waits, tmp_path, tally):
    with tally("downloads").attempt("three threads"):
        start_over(server)
        threads = [threading.Thread(target=fetch, args=(server, tmp_path / "new")) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (tmp_path / "new" / "file.zip").read_bytes() == CONTENT and len(server.asked) == 1


# ------------------------------------------------------------------------------------------------- the hub


class HubHandler(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks for to fetch `server.files` (path in its repository -> bytes)."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        kind = "list" if path.startswith("/api/") else self.command
        fault = self.server.faults.get(kind, [])
        try:
            if fault:
                fault.pop(0)(self)
            elif kind == "list":
                self.list(path)
            else:
                send_hub(self)
        except OSError:
            self.close_connection = True

    def list(self, path: str) -> None:
        """The files at a revision, for clients that ask for a tree and for those that ask for siblings."""
        if "/tree/" in path:
            data = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": lfs(content)}
                for name, content in self.server.files.items()
            ]
        else:
            commit = path.rpartition("/")[2]
            data = {
                "id": "a/b",
                "sha": commit,
                "siblings": [{"rfilename": name} for name in self.server.files],
            }
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def lfs(content: bytes) -> dict:
    return {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}


def send_hub(handler: HubHandler, stop: int | None = None, content: bytes | None = None) -> None:
    """A file with the headers that its client needs; up to byte `stop`, or other content."""
    _, _, rest = handler.path.partition("/resolve/")
    commit, _, name = rest.partition("/")
    whole = handler.server.files[name]
    sent = content or whole
    asked = handler.headers.get("Range", "")
    start = int(asked[6:].partition("-")[0]) if asked else 0
    handler.send_response(206 if asked else 200)
    if asked:
        handler.send_header("Content-Range", f"bytes {start}-{len(sent) - 1}/{len(sent)}")
    handler.send_header("X-Repo-Commit", commit)
    handler.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
    handler.send_header("Content-Length", str(len(sent) - start))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(sent[start:stop])


def flipped(handler: HubHandler) -> None:
    """The right size, one byte another."""
    name = handler.path.partition("/resolve/")[2].partition("/")[2]
    content = bytearray(handler.server.files[name])
    content[len(content) // 2] ^= 1
    send_hub(handler, content=bytes(content))


def stall_hub(handler: HubHandler) -> None:
    send_hub(handler, stop=500)
    handler.wfile.flush()
    threading.Event().wait(1.5)


def every(kind: str, fault: Callable[[HubHandler], None], n: int = 99) -> dict[str, list]:
    """The fault in the answers to so many requests of a kind."""
    return {kind: [fault] * n}


def all_kinds(fault: Callable[[HubHandler], None]) -> dict[str, list]:
    return every("list", fault) | every("HEAD", fault) | every("GET", fault)


# By name: the faults of the first call, and whether the client gets over them by itself.
HUB_FAULTS: dict[str, tuple[Callable[[], dict[str, list]], bool]] = {
    "wrong bytes": (lambda: every("GET", flipped), False),
    "cut off": (lambda: every("GET", part(send_hub, stop=700), 2), True),
    "429, waited for": (lambda: every("GET", part(refuse, status=429, Retry_After="1"), 3), True),
    "429 for ever": (lambda: all_kinds(part(refuse, status=429)), False),
    "503 at the list": (lambda: every("list", part(refuse, status=503)), False),
    "503 at the file": (lambda: every("GET", part(refuse, status=503)), False),
    "404": (lambda: all_kinds(part(refuse, status=404)), False),
    "401": (lambda: all_kinds(part(refuse, status=401)), False),
    "cut off for ever": (lambda: every("GET", part(send_hub, stop=700)), False),
    "shorter": (lambda: every("GET", part(send_hub, content=b"PAR1" * 100)), False),
    "stall": (lambda: every("GET", stall_hub, 1), True),
    "reset": (lambda: all_kinds(reset), False),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Server]:
    with Server(HubHandler) as server:
        server.files, server.faults = {}, {}
        yield server
        server.shutdown()
        assert not server.broken


LISTER = """
import json, os, sys
import pyarrow.parquet
from src import SetupError
from src.data.sources import Counts, HubTinyImageNet

for line in sys.stdin:
    pid = os.fork()
    if not pid:  # the hub's client reads its environment when it is imported
        os.environ.update(json.loads(line))
        import time
        time.sleep = lambda seconds: None
        try:
            found = [source.read() for source in HubTinyImageNet(Counts(6, 12, 4)).examples()]
            said = f"found {len(found)}"
        except SetupError as error:
            said = f"SetupError {error}"
        except BaseException as error:
            said = f"{type(error).__name__} {error}"
        print(json.dumps(said), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def lister() -> Iterator[Callable[..., str]]:
    """`lister(HF_ENDPOINT=..., ...)`: what comes of listing and reading the hub's Tiny-ImageNet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    plain = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", LISTER], cwd=ROOT, env={**kept, **plain}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(**environment: str) -> str:
        process.stdin.write(json.dumps(environment) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait(60)


def do_what_it_says(said: str) -> None:
    """Delete the files that an error asks to delete."""
    if "Delete " in said:
        for path in said.rpartition("Delete ")[2].partition(" and ")[0].split(", "):
            Path(path).unlink()


def whole_snapshots(cache: Path) -> bool:
    """Whether every file under its own name is what the hub's hash says."""
    files = [path for path in cache.glob("*/snapshots/*/**/*") if path.is_file()]
    return all(sha256(path) == path.resolve().name for path in files)


@pytest.mark.parametrize("name", HUB_FAULTS if FULL else ["wrong bytes"])
def test_the_hub_s_images(name, hub, lister, miniature, tmp_path, tally):
    """With the fault, after it, and then without a network from the cache."""
    faults, client_gets_over_it = HUB_FAULTS[name]
    miniature.parquet(tmp_path / "made", shards=1)
    hub.files = {f"data/{path.name}": path.read_bytes() for path in (tmp_path / "made" / "data").iterdir()}
    hub.faults, cache = faults(), tmp_path / "cache"
    where = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HOME": str(tmp_path / "home")}
    attempts = tally("downloads")
    with attempts.attempt(f"{name}: the first call"):
        said = lister(**where)
        if client_gets_over_it:
            assert said == "found 96"
        else:
            assert said.startswith("SetupError") and ("Delete" in said or "--data DIR" in said), said
        assert whole_snapshots(cache) or "Delete" in said
        do_what_it_says(said)
    hub.faults = {}
    with attempts.attempt(f"{name}: the next call"):
        said = lister(**where)
        assert said == "found 96", said
        assert whole_snapshots(cache)
    with attempts.attempt(f"{name}: offline"):
        hub.asked = []
        assert lister(**where, HF_HUB_OFFLINE="1") == "found 96" and not hub.asked


def test_a_hub_out_of_reach(hub, lister, tmp_path, tally):
    """Nothing listens there, and nothing is cached; with HF_HUB_OFFLINE and without."""
    attempts = tally("downloads")
    where = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    for offline in ("0", "1"):
        with attempts.attempt(f"HF_HUB_OFFLINE={offline}"):
            said = lister(**where, HF_HUB_OFFLINE=offline)
            assert said.startswith("SetupError") and "HF_HUB_OFFLINE=1 with a filled cache" in said
            assert "--data DIR" in said


@pytest.fixture
def hub_client(hub, monkeypatch, tmp_path) -> Iterator[Callable[..., None]]:
    """The client in this process, with another environment; `hub_client(HF_HUB_OFFLINE="1")` changes it."""
    constants = huggingface_hub.constants
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)

        def set_up(**environment: str) -> None:
            for name, value in environment.items():
                patch.setenv(name, value)
            importlib.reload(constants)

        timeouts = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "NO_PROXY": "127.0.0.1"}
        set_up(HF_ENDPOINT=hub.url, HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="0", **timeouts)
        yield set_up
    importlib.reload(constants)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("name", HUB_FAULTS if FULL else ["wrong bytes", "cut off", "503 at the file"])
def test_the_hub_s_weights(name, hub, hub_client, tmp_path, tally):
    """Of a commit that is not pinned, so that its hash is the hub's own."""
    faults, client_gets_over_it = HUB_FAULTS[name]
    content = tiny.write_weights(tmp_path / "w.safetensors", n_classes=7).read_bytes()
    hub.files, hub.faults = {"model.safetensors": content}, faults()
    config = ModelConfig(backbone=f"{tiny.CONVNEXT}@{COMMIT}", image_size=tiny.SIZE)
    attempts = tally("downloads")
    with attempts.attempt(f"{name}: the first call"):
        if client_gets_over_it or name == "503 at the list":  # which weights do not ask for
            build_model(config, ("a", "b"), 0)
        else:
            with pytest.raises(SetupError) as caught:
                build_model(config, ("a", "b"), 0)
            said = str(caught.value)
            assert "model.weights=FILE.safetensors" in said or "Delete" in said
            do_what_it_says(said)
    hub.faults = {}
    with attempts.attempt(f"{name}: the next call"):
        built = build_model(config, ("a", "b"), 0)
        assert built.weights_sha256 == hashlib.sha256(content).hexdigest()
        assert whole_snapshots(tmp_path / "cache")
    with attempts.attempt(f"{name}: offline"):
        hub_client(HF_HUB_OFFLINE="1")
        hub.asked = []
        assert build_model(config, ("a", "b"), 0).weights_sha256 == built.weights_sha256 and not hub.asked
