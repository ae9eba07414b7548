"""Crafted archives, pickles and headers: no code runs, nothing lands outside, bytes are bounded."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import random
import resource
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tiny
import torch
from conftest import encode, noise
from safetensors.torch import load_file, save
from torture.attempts import tries

from src import SetupError, predict
from src.checkpoint import load_newest
from src.data.sources import DOGS_COUNTS, Counts, StanfordDogs, TinyImageNetZip, open_local
from src.data.store import DamagedStore, load_store, open_store
from src.ensemble import read_logits
from src.files import sha256, write_json

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = 300 * 2**20  # bytes beyond what the process has, while an archive is read


@contextmanager
def bounded(more: int = ALLOWED) -> Iterator[None]:
    """The process may map `more` bytes and no more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def tree(folder: Path) -> dict[str, int]:
    """What lies below a folder, the stores aside, and how large it is."""
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return {name: size for name, size in files.items() if not name.startswith("cache/")}


# ------------------------------------------------------------------------------------------- crafted zips


@dataclass(frozen=True)
class Member:
    """A file in a zip with the fields of its headers; None: what they should be."""

    name: str
    data: bytes  # as it lies in the archive
    method: int = 0
    size: int | None = None
    crc: int | None = None
    flags: int = 0
    mode: int = 0o100644
    at: int | None = None  # where the directory says that it lies
    local_name: str | None = None


def zip_of(members: list[Member]) -> bytes:
    """A zip, byte by byte."""
    body, directory = b"", b""
    for m in members:
        name, local = m.name.encode(), (m.local_name or m.name).encode()
        size = len(m.data) if m.size is None else m.size
        crc = zlib.crc32(m.data) if m.crc is None else m.crc
        numbers = struct.pack("<HHHHIII", m.flags, m.method, 0, 33, crc, len(m.data), size & 0xFFFFFFFF)
        at = len(body) if m.at is None else m.at
        tail = struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, m.mode << 16, at)
        directory += b"PK\1\2" + struct.pack("<HH", 0x314, 20) + numbers + tail + name
        body += (
            b"PK\3\4" + struct.pack("<H", 20) + numbers + struct.pack("<HH", len(local), 0) + local + m.data
        )
    n = len(members)
    return body + directory + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, n, n, len(directory), len(body), 0)


def inflating(n_bytes: int) -> bytes:
    """Raw deflate data of so many zeros: one packed block again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(10**7)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (n_bytes // 10**7) + b"\3\0"


WNIDS = ("n01443537", "n02124075")
ZIP_COUNTS = Counts(classes=2, train_per_class=2, valid_per_class=1)
TOP = "tiny-imagenet-200/"
IMAGE = f"{TOP}train/{WNIDS[0]}/images/{WNIDS[0]}_1.JPEG"


def members() -> list[Member]:
    """A whole data set of six images."""
    pictures = iter([encode(noise(seed, (16, 16)), "JPEG") for seed in range(6)])
    notes = "".join(f"val_{k}.JPEG\t{wnid}\t0\t0\t9\t9\n" for k, wnid in enumerate(WNIDS))
    files = {"wnids.txt": "\n".join(WNIDS).encode(), "val/val_annotations.txt": notes.encode()}
    files |= {f"val/images/val_{k}.JPEG": next(pictures) for k in range(2)}
    files |= {f"train/{w}/images/{w}_{i}.JPEG": next(pictures) for w in WNIDS for i in range(2)}
    return [Member(TOP + name, data) for name, data in files.items()]


def with_changed(name: str, **fields) -> list[Member]:
    return [replace(m, **fields) if m.name == name else m for m in members()]


def evil(name: str) -> list[Member]:
    return [*members(), Member(name, encode(noise(9, (16, 16)), "JPEG"))]


BOMB = inflating(800_000_000)
OF_100_ZEROS = {"method": 8, "data": BOMB, "size": 100, "crc": zlib.crc32(bytes(100))}
LINK = {"data": b"../../../../etc/passwd", "mode": 0o120777}
LIST = f"{TOP}val/val_annotations.txt"

# A zip -> "read" (all six images), what the refusal says, or (after "bad:") the reason of its one bad image.
ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "whole": (lambda: zip_of(members()), "read"),
    **{
        f"slip {name!r}": (lambda name=name: zip_of(evil(name)), "read")
        for name in (
            *("../evil.JPEG", "../../../evil.JPEG", "/evil.JPEG", "..\\evil.JPEG", "C:\\evil.JPEG"),
            *(
                f"{TOP}../evil.JPEG",
                f"{TOP}train/../../evil.JPEG",
                "",
                "a/",
                "//evil",
                "~/evil",
                "evil\0.JPEG",
            ),
            f"{TOP}train/{WNIDS[0]}/images/../../../../evil.JPEG",
        )
    },
    "slip as an image": (
        lambda: zip_of(evil(f"{TOP}train/{WNIDS[0]}/images/a\\..\\..\\evil.JPEG")),
        "5 train images, expected 4",
    ),
    "link to a file outside as an image": (
        lambda: zip_of(with_changed(IMAGE, **LINK)),
        "bad:no image in one",
    ),
    "link as a list": (lambda: zip_of(with_changed(LIST, **LINK)), "is not `name<TAB>wnid`"),
    "bomb that claims little": (lambda: zip_of(with_changed(IMAGE, **OF_100_ZEROS)), "bad:no image in one"),
    "bomb that claims little, wrongly": (
        lambda: zip_of(with_changed(IMAGE, **OF_100_ZEROS | {"crc": 1})),
        "bad:Bad CRC-32",
    ),
    "bomb that says so": (
        lambda: zip_of(with_changed(IMAGE, method=8, data=BOMB, size=800_000_000)),
        "bad:larger than",
    ),
    "claims more than there is": (lambda: zip_of(with_changed(IMAGE, size=200_000_000)), "read"),
    "claims more than memory": (lambda: zip_of(with_changed(IMAGE, size=2**32 - 2)), "bad:larger than"),
    "bomb as the list": (lambda: zip_of(with_changed(LIST, **OF_100_ZEROS)), "is not `name<TAB>wnid`"),
    "bomb as the list, honest": (
        lambda: zip_of(with_changed(LIST, method=8, data=BOMB, size=800_000_000)),
        "val_annotations.txt cannot be read .ValueError: larger than",
    ),
    "bomb as the list of classes": (
        lambda: zip_of(with_changed(f"{TOP}wnids.txt", method=8, data=BOMB, size=10**8)),
        "wnids.txt cannot be read .BadZipFile",
    ),
    "zip in a zip": (lambda: zip_of(with_changed(IMAGE, data=zip_of(members()))), "bad:no image in one"),
    "two members at one place": (lambda: zip_of(with_changed(IMAGE, at=0)), "bad:File name in directory"),
    "overlapping": (
        lambda: zip_of(with_changed(IMAGE, data=zip_of([Member("x", BOMB[:1000])]))),
        "bad:no image in one",
    ),
    "names that differ": (
        lambda: zip_of(with_changed(IMAGE, local_name="other")),
        "bad:File name in directory",
    ),
    "member twice": (lambda: zip_of([*members(), *members()[-1:]]), "holds 1 files twice: .*JPEG"),
    "list twice": (
        lambda: zip_of([*members(), Member(LIST, b"val_0.JPEG\tn02124075\n")]),
        "holds 1 files twice: .*val_annotations",
    ),
    "encrypted image": (lambda: zip_of(with_changed(IMAGE, flags=1)), "holds 1 encrypted files: .*_1.JPEG"),
    "encrypted list": (lambda: zip_of(with_changed(LIST, flags=1)), "holds 1 encrypted files"),
    "unknown packing": (lambda: zip_of(with_changed(IMAGE, method=99)), "bad:NotImplementedError"),
    "unknown packing of the list": (lambda: zip_of(with_changed(LIST, method=99)), "cannot be read .NotImpl"),
    "garbage in a member": (lambda: zip_of(with_changed(IMAGE, method=8, size=500)), "bad:"),
    "wrong checksum": (lambda: zip_of(with_changed(IMAGE, crc=7)), "bad:Bad CRC-32"),
    "wrong checksum of the list": (lambda: zip_of(with_changed(LIST, crc=7)), "cannot be read .BadZipFile"),
    "lies outside": (lambda: zip_of(with_changed(IMAGE, at=2**31)), "bad:BadZipFile"),
    "cut in the directory": (lambda: zip_of(members())[:-40], "cannot be read as a zip file"),
    "without its end": (lambda: zip_of(members())[:-22], "cannot be read as a zip file"),
    "empty": (lambda: b"", "cannot be read as a zip file"),
    "empty zip": (lambda: zip_of([]), "holds no wnids.txt"),
    "tar": (lambda: tar("w"), "cannot be read as a zip file"),
    "tar.gz": (lambda: tar("w:gz"), "cannot be read as a zip file"),
    "text": (lambda: b"<html>404 Not Found</html>", "cannot be read as a zip file"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(100), "cannot be read as a zip file"),
}


def tar(mode: str) -> bytes:
    """The data set as a tar, with a member that points outside."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for member in evil("../evil.JPEG"):
            info = tarfile.TarInfo(member.name)
            info.size = len(member.data)
            archive.addfile(info, io.BytesIO(member.data))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ZIPS)
def test_crafted_zips_are_refused_or_read_in_place(kind, tmp_path, tally, monkeypatch):
    """With 300 MB more memory; nothing but the zip, and the store in its cache, is on the disk afterwards."""
    make, expected = ZIPS[kind]
    here = tmp_path / "deep" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    (here / "t.zip").write_bytes(make())
    before = tree(tmp_path)
    with tally("archives").attempt(kind):
        if expected == "read" or expected.startswith("bad:"):
            with bounded():
                source = TinyImageNetZip(here / "t.zip", ZIP_COUNTS)
                store = open_store(source, tmp_path / "cache", 16, skip_bad=True)
            reasons = [item["reason"] for item in store.manifest["bad_files"]]
            assert len(reasons) == (expected != "read") and len(store) == 6 - len(reasons)
            for reason in reasons:
                assert expected.removeprefix("bad:") in reason and "MemoryError" not in reason, reason
        else:
            with bounded(), pytest.raises(SetupError, match=f"(?s)t.zip.*{expected}"):
                open_store(TinyImageNetZip(here / "t.zip", ZIP_COUNTS), tmp_path / "cache", 16)
        assert tree(tmp_path) == before and not Path("/evil.JPEG").exists()


def test_mutated_zips_are_refused_or_give_what_was_packed(tmp_path, tally):
    """An image has the bytes and the class that it was packed with, or cannot be read; none goes missing."""
    attempts = tally("archives")
    whole = zip_of(members())
    (tmp_path / "whole.zip").write_bytes(whole)
    told = contents(tmp_path / "whole.zip")
    assert len(told) == 6 and None not in {data for *_, data in told.values()}
    for seed in range(tries(2000, 60)):
        rng, data = random.Random(seed), bytearray(whole)
        start = rng.choice((0, whole.index(b"PK\1\2"), len(whole) - 22))  # all, the directory, its end
        for _ in range(rng.choice((1, 1, 2, 8))):
            place = rng.randrange(start, len(data))
            data[place] = rng.choice((rng.randrange(256), 0, 255))
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        path = tmp_path / f"{seed}.zip"
        path.write_bytes(data)
        with attempts.attempt(f"random.Random({seed})"), bounded():
            try:
                found = contents(path)
            except SetupError as error:
                assert str(path) in str(error)
            else:
                assert len(found) == 6
                assert all(facts == told.get(image) or facts[2] is None for image, facts in found.items())
        path.unlink()


def contents(path: Path) -> dict[str, tuple[str, str, bytes | None]]:
    """Image -> wnid, split, bytes (None where they cannot be read)."""
    source = TinyImageNetZip(path, ZIP_COUNTS)
    found = {}
    for example in source.examples():
        try:
            data = example.read()
        except Exception:  # as the store takes it
            data = None
        found[example.image_id] = source.wnids[example.label], example.split, data
    return found


# ------------------------------------------------------------------------------------- pickles with code


class Evil:
    """Unpickled, it makes the folder `marker`."""

    def __init__(self, marker: Path, by: str) -> None:
        self.marker, self.by = str(marker), by

    def __reduce__(self) -> tuple:
        return {
            "os": (os.mkdir, (self.marker,)),
            "system": (os.system, (f"mkdir {self.marker}",)),
            "eval": (eval, (f"__import__('os').mkdir({self.marker!r})",)),
            "exec": (exec, (f"import os; os.mkdir({self.marker!r})",)),
            "torch": (torch.jit.load, (self.marker,)),
        }[self.by]


def torch_file(payload: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer, **options)
    return buffer.getvalue()


def array_file(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def boxed(payload: object) -> np.ndarray:
    box = np.empty(1, object)
    box[0] = payload
    return box


def corpus(marker: Path) -> dict[str, bytes]:
    """Files that run code where they are unpickled."""
    files: dict[str, bytes] = {}
    for by in ("os", "system", "eval", "exec", "torch"):
        one = Evil(marker, by)
        files |= {
            f"{by} in a pickle": pickle.dumps({"weight": one}),
            f"{by} in an old pickle": pickle.dumps(one, protocol=0),
            f"{by} by torch.save": torch_file({"weight": one, "bias": torch.zeros(2)}),
            f"{by} by torch.save of old": torch_file({"weight": one}, _use_new_zipfile_serialization=False),
            f"{by} in an array": array_file(boxed(one)),
            f"{by} in arrays": npz_file(labels=boxed(one)),
        }
    return files


def npz_file(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def weights_as(suffix: str) -> Callable[[bytes, Path], object]:
    def load(data: bytes, folder: Path) -> object:
        (folder / f"evil{suffix}").write_bytes(data)
        return tiny.build(folder, weights=str(folder / f"evil{suffix}"))

    return load


def as_checkpoint(data: bytes, folder: Path) -> object:
    path = folder / "checkpoint-000000001.pt"
    path.write_bytes(data)
    write_json(path.with_suffix(".json"), {"step": 1, "sha256": sha256(path)})
    return load_newest(folder)


def as_model(data: bytes, folder: Path) -> object:
    (folder / "model.safetensors").write_bytes(data)
    return load_file(folder / "model.safetensors")


def as_logits(data: bytes, folder: Path) -> object:
    (folder / "logits.npy").write_bytes(data)
    return read_logits(folder / "logits.npy", (1, 1))


def as_features(data: bytes, folder: Path) -> object:
    """Cached ones; the number of them is asked for, as arrays in an archive are read only then."""
    key = hashlib.sha256(json.dumps({"a": 1}, sort_keys=True).encode()).hexdigest()[:16]
    (folder / f"{key}.npy").write_bytes(data)
    write_json(folder / f"{key}.json", {"seconds": 1})
    return predict.cached_features(None, None, None, folder, {"a": 1})[0].shape


def in_store(file: str) -> Callable[[bytes, Path], object]:
    def load(data: bytes, folder: Path) -> object:
        images = folder / "images"
        for name in ("train/a", "train/b"):
            (images / name).mkdir(parents=True)
            (images / name / "0.png").write_bytes(encode(noise(1, (16, 16))))
        store = open_store(open_local(images), folder, 16)
        (store.path / file).write_bytes(data)
        return load_store(store.path)

    return load


def as_list(data: bytes, folder: Path) -> object:
    (folder / "Images/n02085620-Chihuahua").mkdir(parents=True)
    (folder / "Images/n02085620-Chihuahua/1.jpg").write_bytes(b"not looked at")
    (folder / "train_list.mat").write_bytes(data)
    return StanfordDogs(folder, DOGS_COUNTS).examples()


# Where files are read -> how, and what is raised.
LOADERS: dict[str, tuple[Callable[[bytes, Path], object], type[Exception]]] = {
    "weights .pth": (weights_as(".pth"), SetupError),
    "weights .bin": (weights_as(".bin"), SetupError),
    "weights .safetensors": (weights_as(".safetensors"), SetupError),
    "checkpoint": (as_checkpoint, SetupError),
    "a run's model": (as_model, Exception),
    "logits": (as_logits, SetupError),
    "features": (as_features, SetupError),
    "a store's images": (in_store("images.npy"), DamagedStore),
    "a store's rows": (in_store("rows.npz"), DamagedStore),
    "a list of dogs": (as_list, SetupError),
}


@pytest.mark.parametrize("place", LOADERS)
def test_pickles_run_no_code_wherever_files_are_read(place, tmp_path, tally):
    attempts = tally("archives")
    load, error = LOADERS[place]
    marker = tmp_path / "executed"
    files = corpus(marker)
    for number, name in enumerate(sorted(files)[:: tries(1, 4)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with attempts.attempt(f"{name} as {place}"):
            with pytest.raises(error):
                load(files[name], folder)
            assert not marker.exists()


def test_the_pickles_do_run_where_they_are_let(tmp_path):
    """Else the test above would prove nothing."""
    marker = tmp_path / "executed"
    for name, data in corpus(marker).items():
        if not name.startswith("torch "):
            run_it(name, data)
            assert marker.is_dir(), name
            marker.rmdir()


def run_it(name: str, data: bytes) -> None:
    if "torch.save" in name:
        torch.load(io.BytesIO(data), weights_only=False)
    elif "arrays" in name:
        _ = np.load(io.BytesIO(data), allow_pickle=True)["labels"]
    elif "array" in name:
        np.load(io.BytesIO(data), allow_pickle=True)
    else:
        pickle.loads(data)


# -------------------------------------------------------------------------------------- absurd headers


def safetensors(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], start: int, end: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def npy(shape: str, kind: str = "|u1") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(100)


def matlab_bomb() -> bytes:
    """A list whose one compressed element unfolds to 1 GB."""
    packer = zlib.compressobj(9)
    element = struct.pack("<II", 14, 10**9)
    packed = packer.compress(element + bytes(10**6)) + packer.flush(zlib.Z_FULL_FLUSH)
    whole = io.BytesIO()
    scipy.io.savemat(whole, {"x": 1})
    return whole.getvalue()[:128] + struct.pack("<II", 15, len(packed)) + packed


SAFETENSORS = {
    "header of 2^64 bytes": safetensors({}, length=2**64 - 1),
    "header of 1 TB": safetensors({}, length=2**40),
    "header of 90 MB that is not there": safetensors({}, length=90_000_000),
    "header of blanks": safetensors(b" " * 1000),
    "header of a million brackets": safetensors(b"[" * 10**6),
    "header with a tensor of 2^60 numbers": safetensors({"a": tensor([2**30, 2**30], 0, 2**62)}),
    "header whose product overflows": safetensors({"a": tensor([2**33, 2**33], 0, 4)}, bytes(4)),
    "tensor beyond the file": safetensors({"a": tensor([100], 0, 400)}, bytes(4)),
    "tensors that overlap": safetensors({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
    "tensor that ends before it starts": safetensors({"a": tensor([1], 8, 4)}, bytes(12)),
    "cut off": save({"a": torch.zeros(100)})[:-1],
}
ARRAYS = {
    "a shape of 10^15": npy("(10**15,)".replace("10**15", str(10**15))),
    "a shape beyond numbers": npy("(99999999999999999999999,)"),
    "a negative shape": npy("(-1, 3, 16, 16)"),
    "a shape that is code": npy("(__import__('os').mkdir('executed'),)"),
    "numbers of 2 GB each": npy("(1,)", "|V2000000000"),
    "a header of brackets": b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000,
    "arrays of 10^15": (
        lambda b: (zipfile.ZipFile(b, "w").writestr("labels.npy", npy(f"({10**15},)")), b)[1]
    )(io.BytesIO()).getvalue(),
}


@pytest.mark.parametrize("place", ["weights .safetensors", "a run's model"])
def test_absurd_safetensors_are_refused_within_bounds(place, tmp_path, tally):
    attempts, (load, error) = tally("archives"), LOADERS[place]
    for number, (name, data) in enumerate(SAFETENSORS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        with attempts.attempt(f"{name} as {place}"), bounded(), pytest.raises(error):
            load(data, folder)


@pytest.mark.parametrize("place", ["logits", "features", "a store's images", "a store's rows"])
def test_absurd_arrays_are_refused_within_bounds(place, tmp_path, tally, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attempts, (load, error) = tally("archives"), LOADERS[place]
    for number, (name, data) in enumerate(ARRAYS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        with attempts.attempt(f"{name} as {place}"):
            with bounded(), pytest.raises(error):
                load(data, folder)
            assert not (tmp_path / "executed").exists()


def test_an_absurd_list_is_refused_within_bounds(tmp_path, tally):
    with tally("archives").attempt("a MATLAB file of 1 GB"), bounded(), pytest.raises(SetupError):
        as_list(matlab_bomb(), tmp_path)


# --------------------------------------------------------------------------------------- what is called

MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
BUILTINS = ("eval", "exec", "__import__")
CALLS = ("extractall", "extract", "unpack_archive", "read_pickle", "to_pickle", "unsafe_load")
HUBS = ("torch.hub.load", "torch.jit.load", "torch.package", "yaml.load")


def dangers(code: str) -> list[str]:
    """Calls and imports in Python code by which a file that is read could run code or write elsewhere."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        last = called.rpartition(".")[2]
        is_kept_inside = last == "extractall" and options.get("filter") == "'data'"  # a tar's
        if called in BUILTINS or (last in CALLS and not is_kept_inside) or called.startswith(HUBS):
            found.append(called)
        if called == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if called in ("np.load", "numpy.load", "np.lib.format.read_array") and (
            options.get("allow_pickle", "False") != "False" or None in options or len(node.args) > 2
        ):
            found.append("np.load with allow_pickle")
    return found


@pytest.mark.parametrize("folder", ["src", "tools", "bench"])
def test_nothing_unpickles_or_unpacks(folder, tally):
    """numpy's own default is not to unpickle, since 1.16.3."""
    attempts = tally("archives")
    for path in sorted((ROOT / folder).rglob("*.py")):
        with attempts.attempt(path.relative_to(ROOT).as_posix()):
            assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "import torch; torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, map_location='cpu', weights_only=flag)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, 'r', True)",
        "np.load(f, **options)",
        "zipfile.ZipFile(f).extractall(to)",
        "archive.extractall(to, filter='tar')",
        "archive.extract(member)",
        "shutil.unpack_archive(f)",
        "pd.read_pickle(f)",
        "torch.hub.load('a/b', 'c')",
        "eval(text)",
    ],
)
def test_dangers_are_seen(code):
    assert dangers(code)


def test_what_is_safe_is_let_alone():
    code = (
        "model.eval(); np.load(f, 'r'); torch.load(f, weights_only=True); tar.extractall(to, filter='data')"
    )
    assert dangers(code) == []
