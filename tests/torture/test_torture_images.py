"""Images that are damaged, no images or bombs are named, never stored; all others have the right pixels.

The mutations are drawn by `random.Random(seed)`, not by Hypothesis: a seed repeats each of them, and hundreds
of files go through one child with caps on memory and time.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, noise
from PIL import Image, ImageOps
from torture.attempts import tries
from torture.pictures import (
    bmp,
    bmp_alpha,
    chunk,
    gif,
    png,
    png_header,
    png_of,
    tiff,
    webp,
    webp_canvas,
)

from src.data.sources.trees import FORMATS
from src.data.store import decode, load_store

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, on damaged EXIF
SIZE = 32
A_FOLDER = 500  # mutated files that are decoded by one process
GIGABYTE = 2**30

# ------------------------------------------------------------------------------------------- mutations


@functools.cache
def originals() -> dict[str, bytes]:
    """Whole files of every format that is read, and of one that is not."""
    image = noise(1, (SIZE, SIZE))
    palette, two = image.convert("P"), [image, noise(2, (SIZE, SIZE))]
    more = {"save_all": True, "append_images": two[1:]}
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "JPEG": encode(image, "JPEG"),
        "JPEG progressive": encode(image, "JPEG", progressive=True),
        "JPEG with restarts, EXIF": encode(image, "JPEG", restart_marker_blocks=2, exif=exif),
        "JPEG grey": encode(image.convert("L"), "JPEG", optimize=True),
        "JPEG CMYK": encode(image.convert("CMYK"), "JPEG"),
        "MPO": encode(image, "MPO", **more),
        "PNG": encode(image),
        "PNG palette, transparent": encode(palette, transparency=3),
        "PNG alpha": encode(image.convert("RGBA")),
        "PNG 16 bit": encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)),
        "APNG": encode(image, **more),
        "GIF": encode(palette, "GIF"),
        "GIF animated": encode(image, "GIF", **more),
        "BMP": encode(image, "BMP"),
        "BMP palette": encode(palette, "BMP"),
        "WebP": encode(image, "WEBP"),
        "WebP lossless": encode(image.convert("RGBA"), "WEBP", lossless=True),
        "WebP animated": encode(image, "WEBP", **more),
        "TIFF": encode(image, "TIFF"),
        "TIFF LZW": encode(image, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": encode(image, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF JPEG": encode(image, "TIFF", compression="jpeg"),
        "TIFF fax": encode(image.convert("1"), "TIFF", compression="group4"),
        "PPM": encode(image, "PPM"),
        "ICO": encode(image, "ICO", sizes=[(SIZE, SIZE)]),
    }


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def one_bit(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def head(rng: random.Random, data: bytes) -> bytes:
    """Some bytes of the first 64 become others."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    return bytes(changed)


def region(rng: random.Random, data: bytes) -> bytes:
    """A stretch is overwritten, by chance or by one value."""
    start, n = rng.randrange(len(data)), rng.choice((1, 4, 16, 64, 256))
    value = rng.choice((None, 0, 255))
    new = rng.randbytes(n) if value is None else bytes([value]) * n
    return data[:start] + new + data[start + n :]


def number(rng: random.Random, data: bytes) -> bytes:
    """A number of four bytes becomes an extreme one."""
    start = rng.randrange(len(data))
    value = rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 0x10000))
    return data[:start] + value.to_bytes(4, rng.choice(("little", "big"))) + data[start + 4 :]


def moved(rng: random.Random, data: bytes) -> bytes:
    """A stretch goes, comes twice, or comes elsewhere."""
    a, b = sorted(rng.sample(range(len(data) + 1), 2))
    kind, at = rng.choice(("gone", "twice", "elsewhere")), rng.randrange(len(data))
    if kind == "gone":
        return data[:a] + data[b:]
    return data[:b] + data[a:] if kind == "twice" else data[:at] + data[a:b] + data[at:]


def joined(rng: random.Random, data: bytes) -> bytes:
    """The beginning of one file, the end of another."""
    other = originals()[rng.choice(sorted(originals()))]
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(cut, one_bit, head, region, number, moved, joined),
)


def mutant(seed: int) -> tuple[str, bytes]:
    """What was done to which file, and the file: the same for the same seed. One in 20 is left as it is."""
    rng = random.Random(seed)
    name = rng.choice(sorted(originals()))
    data, done = originals()[name], []
    for _ in range(0 if seed % 20 == 0 else rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(MUTATIONS)
        done.append(change.__name__)
        data = change(rng, data) if data else data
    return f"mutant({seed}): {name}, {' '.join(done) or 'unchanged'}", data


# ------------------------------------------------------------------------------- decoded by one process

CHILD = """
import json, resource, sys
from pathlib import Path
folder, cache, size, memory, seconds = *map(Path, sys.argv[1:3]), *map(int, sys.argv[3:])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
from src import SetupError
from src.data.sources import ImageFolder
from src.data.store import open_store
source, strict = ImageFolder(folder), ""
store = open_store(source, cache, size, skip_bad=True)
try:
    open_store(source, cache, size)
except SetupError as error:
    strict = str(error)
print(json.dumps({"path": str(store.path), "strict": strict}))
"""


class Decoded:
    """What became of files by name: `pixels` (S,S,3) of those stored, the `reasons` of those left out."""

    def __init__(self, folder: Path, size: int, seconds: int = 120, memory: int = 4 * GIGABYTE):
        """Build the store of `folder` in a process with `memory` bytes and `seconds` of one core."""
        command = [sys.executable, "-c", CHILD, str(folder), str(folder.parent / "cache")]
        fakes = folder.parent / "programs"  # what would be started instead of Ghostscript
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{fakes}:{os.environ['PATH']}"}
        self.failure, self.pixels, self.reasons, self.strict = "", {}, {}, ""
        command += [str(size), str(memory), str(seconds)]
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "timeout": 10 * seconds}
        try:
            done = subprocess.run(command, **options)
        except subprocess.TimeoutExpired as error:
            self.failure = str(error)
            return
        if done.returncode:
            self.failure = f"exit {done.returncode}: {done.stderr.decode(errors='replace')[-500:]}"
            return
        said = json.loads(done.stdout)
        store, self.strict = load_store(Path(said["path"])), said["strict"]
        self.pixels = {
            Path(n).stem: p for n, p in zip(store.image_ids_N, store.pictures(slice(None)), strict=True)
        }
        bad = store.manifest["bad_files"]
        self.reasons = {Path(item["image_id"]).stem: item["reason"] for item in bad}
        assert len(self.pixels) + len(self.reasons) == len(list(folder.rglob("*.*")))

    def require_told(self, name: str) -> None:
        """The file is stored, or named with a reason that fits a line."""
        assert not self.failure, self.failure
        assert (name in self.pixels) != (name in self.reasons)
        if name in self.reasons:
            reason = self.reasons[name]
            assert re.fullmatch(r"\w+: \S.*", reason) and len(reason) < 170, reason
            assert not re.search("0x[0-9a-f]{6}", reason), reason  # an address, another each time


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """Two class folders of files with names of images, and one whole image in each."""
    for i, (name, data) in enumerate([*files.items(), *((f"whole{k}", originals()["PNG"]) for k in "ab")]):
        place = folder / "train" / "ab"[i % 2] / f"{name}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return folder


# What is refused beyond what Pillow refuses, in the words of `src.data.store`.
OWN_REASONS = "no image in one|exceed the limit|scans|palette of|bits|strips"


@pytest.mark.parametrize("part", range(tries(20, 1)))
def test_mutated_images_are_named_or_have_pillows_pixels(part, tmp_path, tally):
    """Stored are the pixels that Pillow gives; left out is what Pillow, or a rule of ours, refuses."""
    attempts = tally("bad_images")
    n = tries(A_FOLDER, 250)
    files = {str(seed): mutant(seed) for seed in range(part * n, (part + 1) * n)}
    folder = write_folder(tmp_path / "images", {name: data for name, (_, data) in files.items()})
    decoded = Decoded(folder, SIZE)
    for name, (what, data) in files.items():
        with attempts.attempt(what):
            decoded.require_told(name)
            if name in decoded.pixels:
                assert same(decoded.pixels[name], pillows(data)), "other pixels than Pillow's"
            elif not re.search(OWN_REASONS, decoded.reasons[name]):
                with pytest.raises(Exception):  # noqa: B017, Pillow's plugins raise nearly everything
                    pillows(data)
    with attempts.attempt("strict, which is the default"):
        assert decoded.strict.startswith(f"{len(decoded.reasons)} image(s) of images cannot be read:")
        assert (
            decoded.strict.count("\n  ") == 11 and f"and {len(decoded.reasons) - 10} more" in decoded.strict
        )


def pillows(data: bytes) -> np.ndarray:
    """(S,S,3) of Pillow's own reading, put on white by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.open(io.BytesIO(data)).verify()  # a PNG's checksums; nothing for other formats
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):
        grey = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        return np.asarray(squared(grey.convert("RGB")))
    rgba_HWC = np.asarray(image.convert("RGBA")).astype(float)
    alpha_HW1 = rgba_HWC[..., 3:] / 255
    rgb_HWC = rgba_HWC[..., :3] * alpha_HW1 + 255 * (1 - alpha_HW1)
    return np.asarray(squared(Image.fromarray(rgb_HWC.round().astype(np.uint8)))).reshape(SIZE, SIZE, -1)


def squared(image: Image.Image) -> Image.Image:
    """The central square at the store's size."""
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)


def same(stored_HWC: np.ndarray, expected_HWC: np.ndarray, tolerance: int = 2) -> bool:
    return bool(np.abs(stored_HWC.astype(int) - expected_HWC).max() <= tolerance)


# ------------------------------------------------------------------------------- cut short, bits flipped


@pytest.mark.parametrize("name", [name for name in originals() if name != "ICO"])
def test_a_file_cut_short_anywhere_is_refused_or_lacks_no_pixel(name, tally):
    attempts = tally("bad_images")
    data = originals()[name]
    whole_HWC = decode(data, SIZE)
    step = tries(1, 41)
    for length in range(len(data) % step, len(data), step):
        with attempts.attempt(f"{name}, the first {length} of {len(data)} bytes"):
            assert refused(data[:length]) or (decode(data[:length], SIZE) == whole_HWC).all()


def refused(data: bytes) -> bool:
    try:
        decode(data, SIZE)
    except Exception:  # as the store takes it
        return True
    return False


@pytest.mark.parametrize("mode", ["RGB", "P", "1"])
def test_a_png_with_a_flipped_bit_is_refused_or_has_the_same_pixels(mode, tally):
    """Every chunk has a checksum, which Pillow skips where the pixels are."""
    attempts = tally("bad_images")
    data = encode(noise(1, (SIZE, SIZE), mode))
    whole_HWC = decode(data, SIZE)
    for place in range(0, 8 * len(data), tries(1, 97)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with attempts.attempt(f"{mode}, bit {place}"):
            assert refused(bytes(flipped)) or (decode(bytes(flipped), SIZE) == whole_HWC).all()


# -------------------------------------------------------------------------------------- no images, bombs


def strangers() -> dict[str, bytes]:
    """Files that are no images, or none of a format that is read."""
    image, archive = noise(1, (SIZE, SIZE)), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("image.png", encode(image))
    box = struct.pack(">I", 24)
    return {
        "empty": b"",
        "one-zero": b"\0",
        "zeros": bytes(10_000),
        "text": b"not an image at all",
        "page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "drawing": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "zip": archive.getvalue(),
        "gzip": b"\x1f\x8b\x08" + bytes(60),
        "pdf": encode(image, "PDF"),
        "film-mp4": box + b"ftypisom\0\0\2\0isomiso2" + bytes(500),
        "film-mpeg": b"\0\0\1\xb3\x02\0\x20\x15" + bytes(500),
        "film-avi": b"RIFF" + box + b"AVI LIST" + bytes(500),
        "program": b"\x7fELF" + bytes(500),
        "pickle": b"\x80\x04\x95" + bytes(50),
        "icon": encode(image, "ICO"),
        "targa": encode(image, "TGA"),
        "picture-of-c": encode(image.convert("1"), "XBM"),
        "photoshop": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(500),
        "postscript": encode(image, "EPS"),
        "magic-alone-jpeg": b"\xff\xd8\xff",
        "magic-alone-png": b"\x89PNG\r\n\x1a\n",
        "magic-alone-gif": b"GIF89a",
        "magic-alone-bmp": b"BM",
        "magic-alone-tiff": b"II*\0",
        "magic-alone-webp": b"RIFF\x04\0\0\0WEBP",
        "magic-alone-ppm": b"P6",
    }


def test_what_is_no_image_is_named_and_nothing_is_started(tmp_path, tally):
    """Pillow would hand PostScript to another program."""
    attempts = tally("bad_images")
    (tmp_path / "programs").mkdir()
    for program in ("gs", "gswin64c"):
        (tmp_path / "programs" / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tmp_path / "programs" / program).chmod(0o755)
    decoded = Decoded(write_folder(tmp_path / "images", strangers()), SIZE)
    for name in strangers():
        with attempts.attempt(name):
            decoded.require_told(name)
            assert "is empty" in decoded.reasons[name] if name == "empty" else decoded.reasons[name]
    with attempts.attempt("PostScript"):
        assert not (tmp_path / "started").exists() and "no image in one" in decoded.reasons["postscript"]
        assert same(decoded.pixels["wholea"], pillows(originals()["PNG"]), 0)


HUGE = 2**31 - 1
LARGE = 30_000  # a side of a picture beyond the limit


def scan_bomb() -> bytes:
    """A JPEG of 16 million pixels and one scan that comes 40,000 times, in 33 bytes each: minutes of work."""
    data = encode(Image.new("L", (4096, 4096), 128), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * 40_000 + data[-2:]


@functools.cache
def zeros() -> bytes:
    """100 MB in 100 KB."""
    return zlib.compress(bytes(10**8))


def refused_pngs() -> dict[str, bytes]:
    """PNGs that claim, or unfold to, more than any image; each must be named."""
    row, pixel = np.zeros((1, 1, 1), int), chunk(b"IDAT", zlib.compress(b"\0\0"))
    return {
        "png-claims": png_of(png_header(HUGE, HUGE), pixel),
        "png-claims-a-row": png_of(png_header(HUGE, 1), pixel),
        "png-claims-nothing": png_of(png_header(0, 0), pixel),
        "png-zeros": png_of(png_header(40_000, 40_000, 1), chunk(b"IDAT", zeros())),
        "png-chunk": b"\x89PNG\r\n\x1a\n" + struct.pack(">I", HUGE) + b"IHDR" + bytes(50),
        "png-text": png(row, 8, "grey", chunk(b"zTXt", b"a\0\0" + zeros())),
        "png-text-unicode": png(row, 8, "grey", chunk(b"iTXt", b"a\0\1\0\0\0" + zeros())),
        "png-profile": png(row, 8, "grey", chunk(b"iCCP", b"a\0\0" + zeros())),
        "png-texts": png(row, 8, "grey", *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))] * 100),
    }


def refused_bombs() -> dict[str, bytes]:
    """Files of all formats that do."""
    long_tag = struct.pack("<HHII", 273, 4, 2**31, 8)
    return refused_pngs() | {
        "gif-screen": gif((65535, 65535), (1, 1)),
        "gif-frame": gif((1, 1), (65535, 65535)),
        "bmp-claims": bmp(HUGE, HUGE, bytes(30)),
        "bmp-upside-down": bmp(8, -(2**31), bytes(30)),
        "bmp-runs": bmp(LARGE, LARGE, b"\xff\0" * 50, 8, compression=1, palette=bytes(1024)),
        "bmp-short": bmp(9000, 9000, bytes(300)),
        "webp-canvas": webp(webp_canvas(2**24, 2**24), (b"VP8 ", bytes(30))),
        "webp-film": webp(
            webp_canvas(16383, 16383, animated=True),
            (b"ANIM", bytes(6)),
            *[(b"ANMF", bytes(16) + b"VP8L\x08\0\0\0" + b"\x2f" + bytes(7))] * 50,
        ),
        "webp-lossless": webp((b"VP8L", b"\x2f" + struct.pack("<I", 2**28 - 1) + bytes(9))),
        "tiff-claims": tiff(np.zeros((8, 8, 1), np.uint8), t256=HUGE, t257=HUGE),
        "tiff-strip": tiff(np.zeros((8, 8, 1), np.uint8), t279=HUGE, t273=HUGE),
        "tiff-short": tiff(np.zeros((8, 8, 1), np.uint8), t256=9000, t257=9000),
        "tiff-tiles": tiff(np.zeros((8, 8, 1), np.uint8), t259=5, t322=2**30, t323=2**30, t324=8, t325=64),
        "tiff-one-strip-of-eight": tiff(np.full((8, 8, 1), 200, np.uint8), t278=1),
        "tiff-a-row-too-few": tiff(np.full((8, 8, 1), 200, np.uint8), t257=9),
        "tiff-tag": b"II*\0\x08\0\0\0\x01\0" + long_tag + bytes(4),
        "tiff-zeros": tiff(
            np.frombuffer(zeros(), np.uint8).reshape(1, -1, 1), t256=40_000, t257=40_000, t259=8
        ),
        "ppm-claims": b"P6 999999999 999999999 255\n" + bytes(30),
        "ppm-digits": b"P6 " + b"9" * 100_000 + b" 9 255\n",
        "ppm-text": b"P3 9000 9000 255\n" + b"1 " * 1000,
        "jpeg-claims": encode(noise(1, (SIZE, SIZE)), "JPEG").replace(
            struct.pack(">HH", SIZE, SIZE), b"\xff\xff\xff\xff"
        ),
        "jpeg-scans": scan_bomb(),
    }


def harmless_bombs() -> dict[str, bytes]:
    """Files that carry much beside their one red pixel, or a large red picture."""
    red_1113 = np.array([[[255, 0, 0]]])
    image, large = Image.new("RGB", (SIZE, SIZE), "red"), Image.new("P", (9000, 9000))
    large.putpalette([255, 0, 0])
    jpeg = encode(image, "JPEG", quality=100, subsampling=0)
    profile = b"".join(
        b"\xff\xe2\xff\xff" + b"ICC_PROFILE\0" + bytes([k, 255]) + bytes(65519) for k in range(1, 256)
    )
    exif = b"\xff\xe1\0\x22Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + bytes(4)
    loop = tiff(np.tile(red_1113, (8, 8, 1)).astype(np.uint8), photometric=2)
    comments = b"\xff\xfe\xff\xff" + bytes(65533)
    return {
        "png-frames": png(red_1113, 8, "rgb", chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
        "png-chunks": png(red_1113, 8, "rgb", *[chunk(b"teSt", b"")] * 20_000),
        "png-large": encode(large),
        "gif-frames": gif((1, 1), (1, 1), n=100_000),
        "jpeg-profile": jpeg[:2] + profile + jpeg[2:],
        "jpeg-comments": jpeg[:2] + comments * 500 + jpeg[2:],
        "jpeg-exif-loop": jpeg[:2] + exif + jpeg[2:],
        "tiff-loop": loop[:-4] + loop[4:8],
        "webp-more": encode(image, "WEBP", lossless=True) + bytes(10**7),
    }


def test_bombs_are_named_within_the_caps_and_what_is_harmless_is_read(tmp_path, tally):
    """One process with 4 GB decodes all of them in seconds; red is the whole of what is shown."""
    attempts = tally("bad_images")
    refused, harmless = refused_bombs(), harmless_bombs()
    decoded = Decoded(write_folder(tmp_path / "images", {**refused, **harmless}), SIZE, seconds=40)
    for name in (*refused, *harmless):
        with attempts.attempt(name):
            decoded.require_told(name)
            if name in refused:
                assert name in decoded.reasons
            else:
                assert same(decoded.pixels[name], np.array([255, 0, 0])), decoded.reasons.get(name)
    shutil.rmtree(tmp_path / "images")


# --------------------------------------------------------------------------------------- the right pixels

RNG = np.random.default_rng(7)
SIDE = 8


def samples(n_channels: int, top: int = 255) -> np.ndarray:
    """(SIDE,SIDE,C) of any values up to `top`, the smallest and the largest among them."""
    values_HWC = RNG.integers(0, top + 1, (SIDE, SIDE, n_channels))
    values_HWC[0, 0], values_HWC[0, 1] = 0, top
    return values_HWC


def shown(rgb_HWC: np.ndarray, alpha_HW1: np.ndarray | float = 1.0, top: int = 255) -> np.ndarray:
    """(H,W,3) from 0 to 255: samples up to `top` (grey ones three times) on white."""
    rgb_HWC = np.broadcast_to(rgb_HWC, (*rgb_HWC.shape[:2], 3)) * (255 / top)
    return rgb_HWC * alpha_HW1 + 255 * (1 - alpha_HW1)


def key(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


Cases = dict[str, tuple[bytes, np.ndarray, float]]  # name -> file, pixels (H,W,3), tolerance


def png_cases() -> Cases:
    """Every colour type at every depth, with and without a transparent value, plain and interlaced."""
    cases: Cases = {}
    for depth in (1, 2, 4, 8, 16):
        top = 2**depth - 1
        grey_HW1, hidden = samples(1, top), top // 3
        grey_HW1[2, 3] = hidden
        seen_HW1 = grey_HW1 != hidden
        plain = png(grey_HW1, depth, "grey"), shown(grey_HW1, top=top), 0.51
        cases[f"PNG grey {depth}"] = plain
        cases[f"PNG grey {depth} interlaced"] = (png(grey_HW1, depth, "grey", interlaced=True), *plain[1:])
        keyed = png(grey_HW1, depth, "grey", key(hidden))
        cases[f"PNG grey {depth} with a transparent value"] = keyed, shown(grey_HW1, seen_HW1, top), 0.51
    for depth in (8, 16):  # Pillow keeps the high byte of 16 bits
        top, tolerance = 2**depth - 1, 0.51 if depth == 8 else 2
        rgb_HWC, grey_HWC, rgba_HWC = samples(3, top), samples(2, top), samples(4, top)
        cases[f"PNG RGB {depth}"] = png(rgb_HWC, depth, "rgb"), shown(rgb_HWC, top=top), tolerance
        alpha_HW1 = grey_HWC[..., 1:] / top
        pixels_HWC = shown(grey_HWC[..., :1], alpha_HW1, top)
        cases[f"PNG grey alpha {depth}"] = png(grey_HWC, depth, "grey alpha"), pixels_HWC, 2
        pixels_HWC = shown(rgba_HWC[..., :3], rgba_HWC[..., 3:] / top, top)
        cases[f"PNG RGB alpha {depth}"] = png(rgba_HWC, depth, "rgb alpha"), pixels_HWC, 2
    rgb_HWC = samples(3)
    rgb_HWC[1, 1:3] = 7, 8, 9
    seen_HW1 = ~(rgb_HWC == (7, 8, 9)).all(axis=2, keepdims=True)
    cases["PNG RGB with a transparent colour"] = (
        png(rgb_HWC, 8, "rgb", key(7, 8, 9)),
        shown(rgb_HWC, seen_HW1),
        0,
    )
    return cases


def palette_cases() -> Cases:
    """PNGs of numbered colours at every depth, opaque and with the alpha of each colour."""
    cases: Cases = {}
    for depth in (1, 2, 4, 8):
        colours_K3, n = RNG.integers(0, 256, (2**depth, 3)), 2**depth
        alphas_K1 = RNG.integers(0, 256, (n, 1))
        alphas_K1[-1] = 255  # as what the chunk does not name
        at_HW1 = samples(1, n - 1)
        palette = chunk(b"PLTE", colours_K3.astype(np.uint8).tobytes())
        alphas = chunk(b"tRNS", alphas_K1[:-1].astype(np.uint8).tobytes())
        at_HW = at_HW1[..., 0]
        cases[f"PNG palette {depth}"] = png(at_HW1, depth, "palette", palette), shown(colours_K3[at_HW]), 0
        pixels_HWC = shown(colours_K3[at_HW], alphas_K1[at_HW] / 255)
        cases[f"PNG palette {depth} alpha"] = png(at_HW1, depth, "palette", palette, alphas), pixels_HWC, 1.01
    return cases


def other_cases() -> Cases:
    """BMP, GIF, TIFF and WebP in the modes that they have."""
    rgb_HWC, grey_HW1, cmyk_HWC = samples(3), samples(1), samples(4)
    rgb, grey = Image.fromarray(rgb_HWC.astype(np.uint8)), Image.fromarray(grey_HW1[..., 0].astype(np.uint8))
    two = Image.fromarray(grey_HW1[..., 0] > 128)
    rgba_HWC = np.concatenate([rgb_HWC, grey_HW1], axis=2)
    rgba = Image.fromarray(rgba_HWC.astype(np.uint8))
    palette = rgb.quantize(16)
    colours_K3 = np.array(palette.getpalette()).reshape(-1, 3)
    at_HW = np.asarray(palette)
    on_white_HWC = shown(rgb_HWC, grey_HW1 / 255)
    ink_HWC = (255 - cmyk_HWC[..., :3]) * (255 - cmyk_HWC[..., 3:]) / 255
    cmyk = Image.fromarray(cmyk_HWC.astype(np.uint8), "CMYK")
    cases: Cases = {
        "grey alpha clear": (encode(Image.new("LA", (SIDE, SIDE), (9, 0))), np.full((SIDE, SIDE, 3), 255), 0),
        "CMYK TIFF": (encode(cmyk, "TIFF"), ink_HWC, 1.01),
        "WebP RGB": (encode(rgb, "WEBP", lossless=True), rgb_HWC, 0),
        "WebP alpha": (encode(rgba, "WEBP", lossless=True, exact=True), on_white_HWC, 1.01),
        "TIFF alpha": (encode(rgba, "TIFF"), on_white_HWC, 1.01),
        "TIFF palette": (encode(palette, "TIFF"), colours_K3[at_HW], 0),
        "TIFF 1 bit": (encode(two, "TIFF"), shown(grey_HW1 > 128, top=1), 0),
        "TIFF fax": (encode(two, "TIFF", compression="group4"), shown(grey_HW1 > 128, top=1), 0),
        "BMP alpha": (bmp_alpha(rgba_HWC), on_white_HWC, 1.01),
        "BMP with an unused byte": (encode(rgba, "BMP"), rgb_HWC, 0),
        "GIF": (encode(palette, "GIF"), colours_K3[at_HW], 0),
        "GIF transparent": (
            encode(palette, "GIF", transparency=5),
            shown(colours_K3[at_HW], (at_HW != 5)[..., None]),
            0,
        ),
        "BMP upside down": (bmp(SIDE, -SIDE, rgb_HWC[..., ::-1].astype(np.uint8).tobytes()), rgb_HWC, 0),
    }  # fmt: skip
    for name, image, pixels_HWC in (
        ("RGB", rgb, rgb_HWC), ("grey", grey, shown(grey_HW1)), ("palette", palette, colours_K3[at_HW]),
        ("1 bit", two, shown(grey_HW1 > 128, top=1)),
    ):  # fmt: skip
        cases[f"BMP {name}"] = encode(image, "BMP"), pixels_HWC, 0
    return cases


def pnm_cases() -> Cases:
    """Netpbm's own depths, in bytes and in words."""
    grey_HW1, deep_HW1 = samples(1), samples(1, 65535)
    two, deep = Image.fromarray(grey_HW1[..., 0] > 128), deep_HW1.astype(">u2").tobytes()
    return {
        "PBM": (encode(two, "PPM"), shown(grey_HW1 > 128, top=1), 0),
        "PGM 16 bit": (b"P5 8 8 65535\n" + deep, shown(deep_HW1, top=65535), 0.51),
        "PGM of other depths": (b"P5 8 8 4095\n" + (deep_HW1 // 16).astype(">u2").tobytes(),
                                shown(deep_HW1 // 16, top=4095), 0.51),
        "PGM in words": (b"P2 8 8 100\n" + b" ".join(b"%d" % v for v in grey_HW1.ravel() % 101),
                         shown(grey_HW1 % 101, top=100), 0.51),
    }  # fmt: skip


def tiff_cases() -> Cases:
    """Ways of packing, byte orders, 16 bits, and white as zero."""
    cases: Cases = {}
    rgb_HWC, grey_HW1, deep_HW1 = samples(3), samples(1), samples(1, 65535)
    rgb, grey = Image.fromarray(rgb_HWC.astype(np.uint8)), Image.fromarray(grey_HW1[..., 0].astype(np.uint8))
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        cases[f"TIFF {compression}"] = encode(rgb, "TIFF", compression=compression), rgb_HWC, 0
        cases[f"TIFF grey {compression}"] = encode(grey, "TIFF", compression=compression), shown(grey_HW1), 0
    for order in "<>":
        short_HW1 = deep_HW1.astype(np.uint16)
        cases[f"TIFF 16 bit {order}"] = tiff(short_HW1, order), shown(deep_HW1, top=65535), 0.51
    negative_HWC = shown(65535 - deep_HW1, top=65535)
    cases["TIFF 16 bit, white is zero"] = tiff(short_HW1, "<", photometric=0), negative_HWC, 0.51
    cases["TIFF 8 bit, white is zero"] = (
        tiff(255 - grey_HW1.astype(np.uint8), photometric=0),
        shown(grey_HW1),
        0,
    )
    return cases


def film_cases() -> Cases:
    """The first frame, in its place, of what moves."""
    frames = [Image.fromarray(samples(3).astype(np.uint8)).quantize(8).convert("RGB") for _ in range(3)]
    more = {"save_all": True, "append_images": frames[1:]}
    first_HWC = np.asarray(frames[0])
    small = [Image.new("P", (SIDE, SIDE), 1) for _ in range(2)]
    for frame, red in zip(small, (1, 2), strict=True):
        frame.putpalette([0, 0, 255, 255, 0, 0, 0, 255, 0])
        frame.paste(red, (2, 2, 5, 5))
    return {
        "animated GIF": (encode(frames[0], "GIF", **more), first_HWC, 0),
        "animated WebP": (encode(frames[0], "WEBP", lossless=True, **more), first_HWC, 0),
        "animated PNG": (encode(frames[0], **more), first_HWC, 0),
        "animated PNG with another picture in front": (
            encode(frames[0], default_image=True, **more),
            first_HWC,
            0,
        ),
        "TIFF of pages": (encode(frames[0], "TIFF", **more), first_HWC, 0),
        "frames of a GIF that are a part": (
            encode(small[0], "GIF", save_all=True, append_images=small[1:]),
            np.full((SIDE, SIDE, 3), (255, 0, 0)),
            0,
        ),
    }


def jpeg_cases() -> Cases:
    """Pictures of four squares, which JPEG keeps but for rounding."""
    colours = np.array([[[200, 30, 60], [10, 220, 90]], [[40, 50, 230], [250, 240, 20]]])
    rgb_HWC = colours.repeat(8, axis=0).repeat(8, axis=1)
    rgb = Image.fromarray(rgb_HWC.astype(np.uint8))
    options = {"format": "JPEG", "quality": 100, "subsampling": 0}
    inks_HWC = np.concatenate([rgb_HWC, rgb_HWC[..., :1] // 2], axis=2)
    ink_HWC = (255 - inks_HWC[..., :3]) * (255 - inks_HWC[..., 3:]) / 255
    cmyk = encode(Image.fromarray(inks_HWC.astype(np.uint8), "CMYK"), **options)
    assert b"Adobe" in cmyk  # which keeps its inks upside down
    grey_HW = np.asarray(rgb.convert("L"))
    return {
        "JPEG": (encode(rgb, **options), rgb_HWC, 3),
        "JPEG progressive": (encode(rgb, progressive=True, **options), rgb_HWC, 3),
        "JPEG RGB": (encode(rgb, keep_rgb=True, **options), rgb_HWC, 3),
        "JPEG grey": (encode(rgb.convert("L"), **options), shown(grey_HW[..., None]), 3),
        "JPEG CMYK of Adobe": (cmyk, ink_HWC, 4),
        "MPO": (
            encode(rgb, "MPO", quality=100, subsampling=0, save_all=True, append_images=[rgb]),
            rgb_HWC,
            3,
        ),
    }


# Orientation -> what turns the stored pixels upright, by the EXIF standard.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
    0: lambda a: a,  # no such orientation
    9: lambda a: a,
}


def turned_cases() -> Cases:
    """Every orientation in every format that has EXIF; alpha and palettes turn as well."""
    cases: Cases = {}
    colours = RNG.integers(0, 256, (2, 2, 3)).repeat(8, axis=0).repeat(8, axis=1)
    image = Image.fromarray(colours.astype(np.uint8))
    clear_HW1 = np.indices((16, 16)).sum(0)[..., None] < 9
    rgba = image.convert("RGBA")
    rgba.putalpha(Image.fromarray((clear_HW1[..., 0] * 255).astype(np.uint8)))
    for orientation, turn in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for format, options in (
            ("JPEG", {"quality": 100, "subsampling": 0}),
            ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
        ):  # fmt: skip
            if options.get("compression") and orientation not in range(1, 9):
                continue  # which libtiff does not write
            data = encode(image, format, exif=exif, **options)
            name = f"{format} {options.get('compression', '')} orientation {orientation}"
            cases[name] = data, turn(colours), 3 if format == "JPEG" else 0
        data = encode(rgba, exif=exif)
        cases[f"PNG alpha orientation {orientation}"] = data, turn(shown(colours, clear_HW1)), 0
        data = encode(image.quantize(4), exif=exif)
        cases[f"PNG palette orientation {orientation}"] = data, turn(colours), 0
    return cases


@pytest.mark.parametrize(
    "cases",
    [png_cases, palette_cases, other_cases, pnm_cases, tiff_cases, film_cases, jpeg_cases, turned_cases],
)
def test_pixels_are_those_that_were_written(cases, tally):
    attempts = tally("image_modes")
    for name, (data, pixels_HWC, tolerance) in cases().items():
        with attempts.attempt(name):
            assert Image.open(io.BytesIO(data)).format in (*FORMATS, "MPO")
            decoded_HWC = decode(data, len(pixels_HWC))
            assert decoded_HWC.shape == pixels_HWC.shape and decoded_HWC.dtype == np.uint8
            assert np.abs(decoded_HWC - pixels_HWC.astype(float)).max() <= tolerance


def meaningless() -> dict[str, bytes]:
    """Pixels that have no colour of their own."""
    grey_HW1 = samples(1, 65535)
    palette = chunk(b"PLTE", bytes(range(12)))
    return {
        "floating point": tiff(grey_HW1.astype(np.float32), sample_format=3),
        "floating point PFM": b"Pf 8 8 -1.0\n" + bytes(256),
        "32 bits": tiff(grey_HW1.astype(np.uint32)),
        "32 bits with a sign": tiff(grey_HW1.astype(np.int32), sample_format=2),
        "16 bits with a sign": tiff(grey_HW1.astype(np.int16), sample_format=2),
        "12 bits": tiff(grey_HW1.astype(np.uint16), t258=12),
        "no palette": png(samples(1, 3), 8, "palette"),
        "outside the palette": png(samples(1, 4), 8, "palette", palette),
        "transparent of 16 bits": png(samples(3, 65535), 16, "rgb", key(1, 2, 3)),
    }


@pytest.mark.parametrize("name", meaningless())
def test_pixels_without_a_meaning_are_refused(name, tally):
    """Instead of black, white or a guess."""
    with tally("image_modes").attempt(name), pytest.raises(ValueError, match="bits|palette"):
        decode(meaningless()[name], SIDE)
