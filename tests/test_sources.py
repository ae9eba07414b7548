"""Sources: every layout of the same data means the same; what is wrong or missing is refused."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import MINI_COUNTS, MINI_WNIDS, encode, noise, write_parquet
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from src import SetupError
from src.config import DataConfig
from src.data import sources
from src.data.download import Patience, download
from src.data.sources import (
    Digits,
    HubTinyImageNet,
    ImageFolder,
    ParquetFolder,
    TinyImageNetFolder,
    TinyImageNetZip,
    imagenet_names,
    open_source,
    parse_annotations,
)

ROOT = Path(__file__).resolve().parents[1]


def contents(source) -> set:
    return {(e.split, source.wnids[e.label], e.read()) for e in source.examples()}


def local(path) -> sources.Source:
    return open_source(DataConfig(source="local", path=str(path)), Path("unused"))


# ---------------------------------------------------------------------------------------- all layouts


@pytest.mark.parametrize("layout", ["parquet", "folder", "zip"])
def test_local_layouts_hold_the_same(layout, miniature, mini_counts, tmp_path):
    source = local(getattr(miniature, layout)(tmp_path / "tiny"))
    expected = {(split, wnid, data) for (split, wnid), group in miniature.images.items() for data in group}
    assert source.wnids == tuple(sorted(MINI_WNIDS))
    assert source.class_names[0] == "goldfish"
    assert contents(source) == expected
    ids = [e.image_id for e in source.examples()]
    assert len(set(ids)) == len(ids) == 6 * 16


def test_layout_is_found_one_folder_below_and_in_data_itself(miniature, tmp_path):
    miniature.folder(tmp_path / "a" / "tiny-imagenet-200")
    assert isinstance(local(tmp_path / "a"), TinyImageNetFolder)
    miniature.parquet(tmp_path / "b")
    assert isinstance(local(tmp_path / "b" / "data"), ParquetFolder)


@pytest.mark.parametrize("spelling", ["info", "plain", "class_label"])
def test_parquet_class_label_spellings(spelling, miniature, tmp_path):
    source = ParquetFolder(miniature.parquet(tmp_path, spelling=spelling), MINI_COUNTS)
    assert source.wnids == tuple(sorted(MINI_WNIDS))


def test_parquet_with_unsorted_class_label_is_renumbered(miniature, tmp_path):
    names = list(MINI_WNIDS)
    for split in ("train", "valid"):
        rows = [
            (data, names.index(w))
            for (s, w), group in miniature.images.items()
            if s == split
            for data in group
        ]
        name = "validation" if split == "valid" else split
        write_parquet(tmp_path / f"{name}-00000-of-00001.parquet", rows, names, "info")
    source = ParquetFolder(tmp_path, MINI_COUNTS)
    assert source.wnids == tuple(sorted(names))
    assert ("valid", names[0], miniature.images["valid", names[0]][0]) in contents(source)


def test_zip_reads_from_many_threads(miniature, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    examples = TinyImageNetZip(miniature.zip(tmp_path / "t.zip"), MINI_COUNTS).examples()
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(lambda e: e.read(), examples * 5))
    assert threaded == [e.read() for e in examples] * 5


def test_real_counts_are_the_default(miniature, tmp_path):
    with pytest.raises(SetupError, match=r"6 classes, expected 200.*72 train images, expected 100,000"):
        local(miniature.folder(tmp_path)).examples()


def test_fingerprint_follows_the_files(miniature, tmp_path):
    path = miniature.folder(tmp_path / "t")
    before = TinyImageNetFolder(path, MINI_COUNTS).fingerprint
    assert TinyImageNetFolder(path, MINI_COUNTS).fingerprint == before
    os.utime(path / "val/images/val_3.JPEG", ns=(1, 1))
    assert TinyImageNetFolder(path, MINI_COUNTS).fingerprint != before
    archive = miniature.zip(tmp_path / "t.zip")
    before = TinyImageNetZip(archive, MINI_COUNTS).fingerprint
    os.utime(archive, ns=(1, 1))
    assert TinyImageNetZip(archive, MINI_COUNTS).fingerprint != before


# --------------------------------------------------------------------------------------------- refused


def _edit(path: Path, change) -> None:
    path.write_text(change(path.read_text()))


BROKEN_FOLDERS = {
    "no wnid": (lambda p: _edit(p / "wnids.txt", lambda t: t.split("\n", 1)[1]), "only in train/: n02124075"),
    "train class gone": (lambda p: os.rename(p / "train/n02124075", p / "x"), "only in wnids.txt: n02124075"),
    "train image gone": (
        lambda p: (p / "train/n02124075/images/n02124075_3.JPEG").unlink(),
        "71 train images, expected 72.*n02124075 has 11",
    ),
    "valid image gone": (
        lambda p: (p / "val/images/val_5.JPEG").unlink(),
        "only in val/val_anno.*val_5.JPEG",
    ),
    "no annotations": (lambda p: (p / "val/val_annotations.txt").unlink(), "has no val/val_annotations.txt"),
    "annotation gone": (
        lambda p: _edit(p / "val/val_annotations.txt", lambda t: t.split("\n", 1)[1]),
        "only in val/images/: val/images/val_0.JPEG",
    ),
    "annotated twice": (
        lambda p: _edit(p / "val/val_annotations.txt", lambda t: t + t.split("\n")[0]),
        "line 25: 'val_0.JPEG' is annotated twice",
    ),
    "unknown wnid": (
        lambda p: _edit(p / "val/val_annotations.txt", lambda t: t.replace("n02124075", "n00000001", 1)),
        "only in images: n00000001",
    ),
    "another class": (
        lambda p: _edit(p / "val/val_annotations.txt", lambda t: t.replace("n02124075", "n01443537", 1)),
        "n01443537 has 5, n02124075 has 3",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_FOLDERS)
def test_broken_folder_is_refused_with_the_difference(fault, miniature, tmp_path):
    damage, message = BROKEN_FOLDERS[fault]
    damage(miniature.folder(tmp_path))
    with pytest.raises(SetupError, match=f"(?s){message}.*data.source=hub"):
        TinyImageNetFolder(tmp_path, MINI_COUNTS).examples()


def test_half_parquet_is_refused(miniature, tmp_path):
    miniature.parquet(tmp_path)
    (tmp_path / "data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(SetupError, match="36 train images, expected 72"):
        ParquetFolder(tmp_path, MINI_COUNTS).examples()
    for file in (tmp_path / "data").glob("valid*"):
        file.unlink()
    with pytest.raises(SetupError, match="lacks train.*or valid"):
        ParquetFolder(tmp_path, MINI_COUNTS).examples()


def test_unreadable_parquet_is_refused(miniature, tmp_path):
    file = miniature.parquet(tmp_path) / "data/valid-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SetupError, match=f"{file.name} cannot be read as parquet"):
        ParquetFolder(tmp_path, MINI_COUNTS).examples()


def test_parquet_without_class_names_or_with_a_wrong_label_is_refused(miniature, tmp_path):
    with pytest.raises(SetupError, match="no ClassLabel names"):
        _ = ParquetFolder(miniature.parquet(tmp_path / "a", spelling="none"), MINI_COUNTS).wnids
    miniature.parquet(tmp_path / "b", shards=1)
    file = tmp_path / "b/data/valid-00000-of-00001.parquet"
    write_parquet(file, [(b"", 0), (b"", 6)], sorted(MINI_WNIDS), "info")
    with pytest.raises(SetupError, match="row 1: label 6 is not one of 6 classes"):
        ParquetFolder(tmp_path / "b", MINI_COUNTS).examples()


def test_bad_zip_is_refused(miniature, tmp_path):
    whole = miniature.zip(tmp_path / "t.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SetupError, match="cut.zip cannot be read as a zip"):
        local(tmp_path / "cut.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(SetupError, match="holds no wnids.txt"):
        local(tmp_path / "other.zip")


def test_oversized_member_is_refused_unread(miniature, tmp_path, monkeypatch):
    example = TinyImageNetZip(miniature.zip(tmp_path / "t.zip"), MINI_COUNTS).examples()[0]
    monkeypatch.setattr(sources.trees, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        example.read()


def test_missing_or_unknown_path_is_refused(tmp_path):
    with pytest.raises(SetupError, match=r"--data DIR.*TINY_IMAGENET_DIR"):
        local("")
    with pytest.raises(SetupError, match="nowhere does not exist"):
        local(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SetupError, match=r"(?s)Looked for: train-\*.parquet.*Found: notes.txt"):
        local(tmp_path)


# -------------------------------------------------------------------------------------- annotations

field = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Z")), min_size=1, max_size=12)


@given(st.dictionaries(field, field, max_size=8), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_annotations_round_trip(wnids, newline):
    assert parse_annotations("".join(f"{n}\t{w}\t0\t1\t2\t3{newline}" for n, w in wnids.items())) == wnids


@given(st.lists(field, min_size=1, max_size=6, unique=True), st.data())
def test_duplicate_or_short_annotation_is_named(names, data):
    lines = [f"{name}\tn1" for name in names]
    with pytest.raises(SetupError, match=f"line {len(lines) + 1}: .*twice"):
        parse_annotations("\n".join([*lines, data.draw(st.sampled_from(lines))]))
    with pytest.raises(SetupError, match=f"line {len(lines) + 1}: .*is not"):
        parse_annotations(
            "\n".join([*lines, data.draw(st.sampled_from(["only", "only\t", "\tn1", "a\t \tb"]))])
        )


def test_class_names_are_unique_and_fall_back():
    assert imagenet_names(["n01443537"]) == ("goldfish",)
    assert imagenet_names(["n99999999"], {"n99999999": "thing, object"}) == ("thing",)
    assert imagenet_names(["n99999999"]) == ("n99999999",)
    assert imagenet_names(["x", "y"], {"x": "crane, bird", "y": "crane, machine"}) == (
        "crane (bird)",
        "crane (machine)",
    )
    assert imagenet_names(["x", "y"], {"x": "crane", "y": "crane"}) == ("crane (x)", "crane (y)")
    assert len(set(imagenet_names(["x", "y"], {"x": "crane, bird", "y": "crane, bird"}))) == 2
    # ImageNet's own two cranes and two maillots
    assert len(set(imagenet_names(["n02012849", "n03126707", "n03710637", "n03710721"]))) == 4


# ------------------------------------------------------------------------------------ own images, digits


@pytest.mark.parametrize("direct", [True, False])
def test_image_folder_holds_out_a_stratified_fifth(direct, image_folder):
    (image_folder / "train/cat/.ipynb_checkpoints").mkdir()
    (image_folder / "train/cat/.ipynb_checkpoints/0.png").write_bytes(b"x")
    (image_folder / "train/.ipynb_checkpoints").mkdir()
    (image_folder / "train/.ipynb_checkpoints/0.png").write_bytes(b"x")
    (image_folder / "train/cat/notes.txt").write_text("not an image")
    source = local(image_folder / "train" if direct else image_folder)
    assert isinstance(source, ImageFolder)
    assert source.wnids == source.class_names == ("cat", "dog")
    counts = Counter((e.split, e.label) for e in source.examples())
    assert counts == {("train", 0): 8, ("train", 1): 8, ("valid", 0): 2, ("valid", 1): 2}
    again = local(source.tree.root)
    assert [(e.image_id, e.split) for e in again.examples()] == [
        (e.image_id, e.split) for e in source.examples()
    ]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_image_folder_uses_its_own_valid(name, image_folder):
    for label in ("cat", "dog"):
        (image_folder / name / label).mkdir(parents=True)
        (image_folder / name / label / "v.png").write_bytes(encode(noise(7)))
    examples = local(image_folder).examples()
    assert Counter(e.split for e in examples) == {"train": 20, "valid": 2}
    assert {e.image_id for e in examples if e.split == "valid"} == {f"{name}/cat/v.png", f"{name}/dog/v.png"}


def test_image_folder_with_a_class_in_one_split_only_is_refused(image_folder):
    for label in ("cat", "owl"):
        (image_folder / "val" / label).mkdir(parents=True)
        (image_folder / "val" / label / "v.png").write_bytes(encode(noise(7)))
    with pytest.raises(SetupError, match="1 classes only in train: dog; 1 classes only in valid: owl"):
        local(image_folder).examples()


def test_image_folder_of_wnids_has_readable_names(image_folder):
    os.rename(image_folder / "train/cat", image_folder / "train/n02124075")
    os.rename(image_folder / "train/dog", image_folder / "train/n01443537")
    assert local(image_folder).class_names == ("goldfish", "Egyptian cat")


def test_digits():
    source = open_source(DataConfig(source="digits"), Path("unused"))
    assert isinstance(source, Digits) and source.class_names[3] == "three"
    examples = source.examples()
    counts = Counter((e.split, e.label) for e in examples)
    assert sum(counts.values()) == 1797
    for label in range(10):
        n = counts["train", label] + counts["valid", label]
        assert counts["valid", label] == round(n / 5)
    image = Image.open(io.BytesIO(examples[0].read()))
    assert (image.size, image.mode, image.format) == ((64, 64), "L", "PNG")
    low, high = image.getextrema()
    assert low == 0 and high > 240  # 0 to 16 spread over 0 to 255
    assert [e.split for e in Digits().examples()] == [e.split for e in examples]


# ------------------------------------------------------------------------------------------ hub, download

HUB_SCRIPT = """
from src import SetupError
from src.data.sources import Counts, HubTinyImageNet
source = HubTinyImageNet(Counts(6, 12, 4))
try:
    print(len(source.examples()), len(source.examples()[0].read()) > 0, source.wnids[0], source.fingerprint)
except SetupError as error:
    print("SetupError", error)
"""


def _run_offline(cache: Path) -> str:
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hub_cache_is_read_offline(miniature, tmp_path):
    assert _run_offline(miniature.hub_cache(tmp_path)).split() == [
        "96",
        "True",
        "n01443537",
        sources.HUB_REVISION,
    ]


def test_hub_failure_says_what_to_do(tmp_path):
    said = _run_offline(tmp_path)
    assert said.startswith("SetupError")
    assert all(word in said for word in ("HF_TOKEN", "rate limited", "HF_HUB_OFFLINE", "--data DIR"))


def test_hub_fingerprint_needs_no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("went to the hub"))
    assert open_source(DataConfig(source="hub"), Path("unused")).fingerprint == sources.HUB_REVISION
    assert HubTinyImageNet.name == "tiny-imagenet"


CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` by path, else CONTENT. `server.faults`, one a request: (status,), or after how
    many bytes to stop."""

    def do_GET(self):
        asked, content = self.headers.get("Range"), self.server.files.get(self.path, CONTENT)
        self.server.asked.append(asked)
        start = int(asked[6:-1]) if asked and self.server.ranges else 0
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, tuple) or start >= len(content):
            return self.send_error(fault[0] if fault else 416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:] if fault is None else content[start : start + fault])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    server.asked, server.faults, server.ranges, server.files = [], [], True, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/tiny.zip"
    yield server
    server.shutdown()
    server.server_close()


SHORT = Patience(pause=0.0)
fetch = functools.partial(download, size=len(CONTENT), checksum=MD5, patience=SHORT)


def names(folder: Path) -> list[str]:
    """What a download leaves; some versions of filelock leave the lock's file as well."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_download_whole_then_not_again(server, tmp_path):
    fetch(server.url, tmp_path / "new" / "t.zip")
    assert (tmp_path / "new" / "t.zip").read_bytes() == CONTENT
    fetch(server.url, tmp_path / "new" / "t.zip")
    assert server.asked == [None]
    assert names(tmp_path / "new") == ["t.zip"]


def test_truncated_answers_are_resumed(server, tmp_path):
    server.faults = [300_000, (503,), 1000]
    fetch(server.url, tmp_path / "t.zip")
    assert server.asked == [None, "bytes=300000-", "bytes=300000-", "bytes=301000-"]
    assert (tmp_path / "t.zip").read_bytes() == CONTENT


def test_a_later_run_resumes(server, tmp_path):
    server.faults = [1000]
    with pytest.raises(SetupError, match=r"1,000 of 1,024,000 bytes came.*run again"):
        fetch(server.url, tmp_path / "t.zip", patience=Patience(attempts=1))
    assert not (tmp_path / "t.zip").exists()
    fetch(server.url, tmp_path / "t.zip", patience=Patience(attempts=1))
    assert server.asked == [None, "bytes=1000-"]
    assert (tmp_path / "t.zip").read_bytes() == CONTENT


def test_server_without_ranges_starts_over(server, tmp_path):
    server.ranges, server.faults = False, [300_000]
    fetch(server.url, tmp_path / "t.zip")
    assert server.asked == [None, "bytes=300000-"]
    assert (tmp_path / "t.zip").read_bytes() == CONTENT


def test_wrong_md5_removes_the_file(server, tmp_path):
    (tmp_path / "t.zip.partial").write_bytes(b"x" * 500)
    with pytest.raises(SetupError) as error:
        fetch(server.url, tmp_path / "t.zip")
    assert MD5 in str(error.value) and hashlib.md5(b"x" * 500 + CONTENT[500:]).hexdigest() in str(error.value)
    assert names(tmp_path) == []
    fetch(server.url, tmp_path / "t.zip")


def test_larger_answer_is_refused(server, tmp_path):
    with pytest.raises(SetupError, match="expected 1,000 bytes"):
        download(server.url, tmp_path / "t.zip", 1000, MD5, SHORT)
    assert names(tmp_path) == []


def test_a_size_that_is_not_published_is_the_server_s(server, tmp_path):
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    server.faults = [300_000, 1000]
    fetch(server.url, tmp_path / "t.zip", size=0, checksum=sha256)
    assert server.asked == [None, "bytes=300000-", "bytes=301000-"]
    fetch(server.url, tmp_path / "t.zip", size=0, checksum=sha256)
    assert (tmp_path / "t.zip").read_bytes() == CONTENT and len(server.asked) == 3
    server.faults = [1000]
    with pytest.raises(SetupError, match=r"u: 1,000 bytes came.*run again"):
        fetch(server.url, tmp_path / "u", size=0, patience=Patience(attempts=1))
    assert names(tmp_path) == ["t.zip", "u.partial", "u.partial.etag"]


@pytest.mark.parametrize("whole", [True, False])
def test_all_bytes_are_there_but_not_in_place(whole, server, tmp_path):
    """The server has nothing to add (416) to what a run before this one left."""
    partial = tmp_path / "t.zip.partial"
    partial.write_bytes(CONTENT if whole else CONTENT[:-1] + b"xx")
    if whole:
        fetch(server.url, tmp_path / "t.zip", size=0)
        assert (tmp_path / "t.zip").read_bytes() == CONTENT
    else:
        with pytest.raises(SetupError, match=f"got 1,024,001 bytes, MD5 .*; expected MD5 {MD5}.*is removed"):
            fetch(server.url, tmp_path / "t.zip", size=0)
        assert names(tmp_path) == []
    assert server.asked == [f"bytes={len(CONTENT) + (not whole)}-"]


def test_permanent_error_is_not_repeated(server, tmp_path):
    server.faults = [(404,)] * 5
    with pytest.raises(SetupError, match="HTTP 404"):
        fetch(server.url, tmp_path / "t.zip")
    assert len(server.asked) == 1


def test_download_source(server, miniature, mini_counts, tmp_path, monkeypatch):
    data = miniature.zip(tmp_path / "made.zip").read_bytes()
    monkeypatch.setattr(sys.modules[__name__], "CONTENT", data)
    monkeypatch.setattr(sources, "ZIP_URL", server.url)
    monkeypatch.setattr(sources, "ZIP_SIZE", len(data))
    monkeypatch.setattr(sources, "ZIP_MD5", hashlib.md5(data).hexdigest())
    source = open_source(DataConfig(source="download"), tmp_path / "cache")
    assert len(source.examples()) == 96 and (tmp_path / "cache/tiny-imagenet-200.zip").exists()


# -------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def real() -> Path:
    path = os.environ.get("TINY_IMAGENET_DIR", "")
    if not path or not Path(path).exists():
        pytest.skip("TINY_IMAGENET_DIR does not name a copy of Tiny-ImageNet")
    return Path(path)


def test_real_tiny_imagenet(real):
    from src.data.store import decode

    source = local(real)
    examples = source.examples()
    counts = Counter((e.split, e.label) for e in examples)
    assert counts == {(s, label): n for s, n in (("train", 500), ("valid", 50)) for label in range(200)}
    assert source.wnids[0] == "n01443537" and source.class_names[0] == "goldfish"
    assert list(source.wnids) == sorted(source.wnids) and len(set(source.class_names)) == 200
    for example in examples[::1100]:
        image = Image.open(io.BytesIO(example.read()))
        assert image.size == (64, 64)
        assert decode(example.read(), 64).tobytes() == image.convert("RGB").tobytes()


def test_real_annotations(real):
    file = next(
        (f for f in (real / "val_annotations.txt", real / "val/val_annotations.txt") if f.is_file()), None
    )
    if file is None:
        pytest.skip("this copy has no val_annotations.txt")
    counts = Counter(parse_annotations(file.read_text()).values())
    assert sorted(counts) == list(local(real).wnids) and set(counts.values()) == {50}
