"""Image files made by hand: bit depths, claims and chunks that no library writes."""

from __future__ import annotations

import struct
import zlib

import numpy as np

ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
CHANNELS = {"grey": 1, "rgb": 3, "palette": 1, "grey alpha": 2, "rgb alpha": 4}
COLOUR_TYPES = {"grey": 0, "rgb": 2, "palette": 3, "grey alpha": 4, "rgb alpha": 6}


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG's chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(header: bytes, *chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def png_header(
    width: int, height: int, depth: int = 8, kind: str = "grey", interlaced: bool = False
) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, COLOUR_TYPES[kind], 0, 0, interlaced)


def png(values_HWC: np.ndarray, depth: int, kind: str, *chunks: bytes, interlaced: bool = False) -> bytes:
    """A PNG of samples (H,W,C) of `depth` bits."""
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    parts = (_scanlines(values_HWC[y::dy, x::dx], depth) for y, x, dy, dx in passes)
    height, width = values_HWC.shape[:2]
    data = chunk(b"IDAT", zlib.compress(b"".join(parts)))
    return png_of(png_header(width, height, depth, kind, interlaced), *chunks, data)


def _scanlines(values_HWC: np.ndarray, depth: int) -> bytes:
    """Each row, packed, after the number of no filter."""
    if not values_HWC.size:
        return b""
    rows_HX = values_HWC.reshape(len(values_HWC), -1)
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows_HX]
    else:
        bits_HXb = (rows_HX[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        packed = [np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes() for bits in bits_HXb]
    return b"".join(b"\0" + row for row in packed)


def tiff(
    values_HWC: np.ndarray, order: str = "<", photometric: int = 1, sample_format: int = 1, **tags
) -> bytes:
    """A TIFF of one strip, uncompressed; `tags` (t256=...) replace those that follow from the samples."""
    height, width, n_channels = values_HWC.shape
    data = values_HWC.astype(values_HWC.dtype.newbyteorder(order)).tobytes()
    entries = {
        256: width,
        257: height,
        258: 8 * values_HWC.itemsize,
        259: 1,
        262: photometric,
        273: 8,
        277: n_channels,
        278: height,
        279: len(data),
        339: sample_format,
        **{int(name[1:]): value for name, value in tags.items()},
    }
    table = struct.pack(f"{order}H", len(entries))
    for tag, value in sorted(entries.items()):
        table += struct.pack(f"{order}HHII", tag, 4, 1, value)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + table + struct.pack(f"{order}I", 0)


def bmp(
    width: int, height: int, data: bytes, bits: int = 24, compression: int = 0, palette: bytes = b""
) -> bytes:
    """A Windows bitmap with the given claims."""
    start = 54 + len(palette)
    head = struct.pack("<2sIHHI", b"BM", (start + len(data)) & 0xFFFFFFFF, 0, 0, start)
    numbers = (40, width, height, 1, bits, compression, len(data), 2835, 2835, len(palette) // 4, 0)
    return head + struct.pack("<IiiHHIIiiII", *numbers) + palette + data


def bmp_alpha(rgba_HWC: np.ndarray) -> bytes:
    """A bitmap whose header has masks for all of four channels."""
    data = rgba_HWC[::-1, :, [2, 1, 0, 3]].astype(np.uint8).tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    numbers = (56, rgba_HWC.shape[1], len(rgba_HWC), 1, 32, 3, len(data), 2835, 2835, 0, 0)
    head = struct.pack("<2sIHHI", b"BM", 70 + len(data), 0, 0, 70)
    return head + struct.pack("<IiiHHIIiiII", *numbers) + masks + data


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    """A RIFF file of WebP's chunks."""
    body = b"".join(k + struct.pack("<I", len(d)) + d + b"\0" * (len(d) % 2) for k, d in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def webp_canvas(width: int, height: int, animated: bool = False) -> tuple[bytes, bytes]:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X", bytes([2 * animated, 0, 0, 0]) + sides


def gif(
    screen: tuple[int, int], frame: tuple[int, int], data: bytes = b"\x02\x02\x44\x01\x00", n: int = 1
) -> bytes:
    """A GIF of red and blue whose frames claim a size; the data fill a frame of 1x1 with red."""
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\xff\0\0\0\0\xff"
    one = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + data
    return head + one * n + b";"
