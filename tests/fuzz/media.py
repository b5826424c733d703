"""Images and videos of every kind, their damage, and a second opinion on what was damaged."""

import contextlib
import functools
import io
import re
import struct
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from hypothesis import strategies as st
from PIL import Image

FRAMES, HEIGHT, WIDTH = 12, 48, 64  # of every video
SIDES = (0, 1, 5000, 2**15, 2**16 - 1, 2**20 + 1, 2**31 - 1, 2**31, 2**32 - 1)


class Made(NamedTuple):
    """A sound image."""

    content: bytes
    suffix: str
    pixels: np.ndarray  # u8[h, w, 3] RGB, as stored
    off: float  # mean difference that the format may cause
    orientation: int  # EXIF's


def png(pixels: np.ndarray) -> bytes:
    """A PNG, also of 16 bits in colour, which Pillow does not write."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def saved(pixels, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def paint(height: int, width: int, shift: int) -> np.ndarray:
    """A smooth image, of which no two places look the same."""
    y, x = np.mgrid[:height, :width]
    return np.stack([40 + 150 * y // height, 40 + 150 * x // width, np.full_like(x, 30 + shift)], -1).astype(np.uint8)


def make(draw) -> Made:
    """An image of any kind."""
    height, width = draw(st.sampled_from(((1, 1), (1, 50), (40, 60), (61, 33), (90, 70))))
    rgb = paint(height, width, draw(st.integers(0, 120)))
    grey = rgb[:, :, 0]
    thrice, deep = np.repeat(grey[:, :, None], 3, 2), rgb.astype(np.uint16) * 257
    orientation, exif = draw(st.sampled_from((1, 1, *range(1, 9)))), Image.Exif()
    exif[274] = orientation
    turned = {"exif": exif} if orientation > 1 else {}
    kind = draw(st.sampled_from(("jpeg", "jpeg", "png", "png", "bmp", "webp", "tiff", "gif", "pnm", "other")))
    if kind == "jpeg":
        form = draw(st.sampled_from(("plain", "progressive", "grey", "cmyk", "restarts")))
        pixels = grey if form == "grey" else Image.fromarray(rgb).convert("CMYK") if form == "cmyk" else rgb
        options = {"progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 2}}.get(form, {})
        content = saved(pixels, "JPEG", quality=95, subsampling=0, **options, **turned)
        return Made(content, ".jpg", thrice if form == "grey" else rgb, 6, orientation)
    if kind == "webp":
        lossless = draw(st.booleans())
        content = saved(rgb, "WEBP", lossless=lossless, quality=95, **turned)
        return Made(content, ".webp", rgb, 0 if lossless else 8, orientation)
    if kind == "png":
        alpha = np.dstack([rgb, np.full(grey.shape, 200, np.uint8)])
        palette = Image.fromarray(rgb).quantize(16)
        coloured = np.asarray(palette.convert("RGB"))
        content, pixels = draw(
            st.sampled_from(
                (
                    (saved(rgb, "PNG", **turned), rgb),
                    (saved(grey, "PNG", **turned), thrice),
                    (saved(palette, "PNG", **turned), coloured),
                    (saved(alpha, "PNG", **turned), rgb),
                    (png(deep), rgb),
                    (png(deep[:, :, 0]), thrice),
                )
            )
        )
        return Made(content, ".png", pixels, 0, orientation if b"eXIf" in content else 1)
    if kind == "tiff":
        content, pixels = draw(
            st.sampled_from(
                (
                    (saved(rgb, "TIFF"), rgb),
                    (saved(rgb, "TIFF", compression="tiff_lzw"), rgb),
                    (saved(grey, "TIFF"), thrice),
                    (saved(deep[:, :, 0], "TIFF"), thrice),
                )
            )
        )
        return Made(content, ".tif", pixels, 0, 1)
    if kind == "gif":
        first, *more = (Image.fromarray(np.roll(rgb, i, 1)).quantize(16) for i in range(draw(st.integers(1, 3))))
        content = saved(first, "GIF", save_all=True, append_images=more)
        return Made(content, ".gif", np.asarray(first.convert("RGB")), 0, 1)
    if kind == "bmp":
        content, pixels = draw(st.sampled_from(((saved(rgb, "BMP"), rgb), (saved(grey, "BMP"), thrice))))
        return Made(content, ".bmp", pixels, 0, 1)
    if kind == "pnm":
        text = f"P2 {width} {height} 255\n{' '.join(map(str, grey.ravel()))}\n".encode()
        content, pixels = draw(
            st.sampled_from(((saved(rgb, "PPM"), rgb), (saved(grey, "PPM"), thrice), (text, thrice)))
        )
        return Made(content, ".ppm", pixels, 0, 1)
    content, suffix, off = draw(
        st.sampled_from(((saved(rgb, "JPEG2000"), ".jp2", 0), (saved(rgb, "AVIF", quality=95), ".avif", 8)))
    )
    return Made(content, suffix, rgb, off, 1)


def resized(draw, content: bytes, pixels: np.ndarray) -> bytes:
    """The file with another size in its header; of PNG with the checksum that belongs to it."""
    value = draw(st.sampled_from((*SIDES, pixels.shape[0] // 2, 2 * pixels.shape[1])))
    height, width = pixels.shape[:2]
    old, at = draw(st.sampled_from(((width, 0), (height, 1))))
    both = draw(st.integers(0, 3)) == 0
    if content.startswith(b"\x89PNG"):
        head = bytearray(content[16:29])
        head[4 * at : 4 * at + 4] = struct.pack(">I", value)
        if both:
            head[0:8] = struct.pack(">II", value, value)
        return content[:8] + chunk(b"IHDR", bytes(head)) + content[33:]
    if content.startswith(b"BM"):
        return content[: 18 + 4 * at] + struct.pack("<I", value) + content[22 + 4 * at :]
    if content[:1] == b"P":
        return content.replace(str(old).encode(), str(value).encode(), 2 if both else 1)
    if content.startswith(b"\xff\xd8"):
        sides = next(m.end() for m in re.finditer(rb"\xff[\xc0\xc2]\0[\x0b\x11\x14]\x08", content))
        packed = struct.pack(">H", value % 2**16)
        if both:
            return content[:sides] + 2 * packed + content[sides + 4 :]
        return content[: sides + 2 - 2 * at] + packed + content[sides + 4 - 2 * at :]
    for form in ("<I", "<H", ">I", ">H"):  # the first place where the number is found
        packed = struct.pack(form, old)
        if packed in content:
            return content.replace(packed, struct.pack(form, value % 256 ** len(packed)), 1)
    return content


def damage(draw, content: bytes) -> bytes:
    """The bytes of a file after an accident."""
    how = draw(st.sampled_from(("cut", "cut", "flip", "flip", "flips", "zeros", "insert", "remove", "end", "swap")))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if draw(st.booleans()):  # the headers are short
        at = min(at, draw(st.integers(0, 200)))
    many = draw(st.sampled_from((1, 2, 7, 64, 500)))
    bits = draw(st.integers(1, 255))
    if how == "cut":
        return content[:at]
    if how == "end":
        return content[: -min(many, len(content))]
    if how == "flip":
        return content[:at] + bytes(b ^ bits for b in content[at : at + 1]) + content[at + 1 :]
    if how == "flips":
        return content[:at] + bytes(b ^ bits for b in content[at : at + many]) + content[at + many :]
    if how == "zeros":
        return content[:at] + bytes(min(many, len(content) - at)) + content[at + many :]
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=20)) + content[at:]
    if how == "remove":
        return content[:at] + content[at + many :]
    return content[at:] + content[:at]


@functools.cache
def video(suffix: str) -> tuple[bytes, list[np.ndarray]]:
    frames = [paint(HEIGHT, WIDTH, 10 * i) for i in range(FRAMES)]
    with tempfile.TemporaryDirectory() as folder:
        path, code = Path(folder, f"v{suffix}"), {".avi": "MJPG", ".mp4": "mp4v"}[suffix]
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 5, (WIDTH, HEIGHT))
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
        writer.release()
        return path.read_bytes(), frames


def seen_by_pillow(content: bytes) -> tuple[tuple[int, int] | None, bool]:
    """Height and width that a header says; whether the file is certainly damaged: cut, or with wrong checksums."""
    size, broken = None, content.startswith(b"\x89PNG") and not whole_png(content)
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as f:
        size = f.size[::-1]
        if size[0] * size[1] < 10**7:
            try:
                f.load()
            except OSError as error:
                broken = broken or f.format == "WEBP" or "truncated" in str(error)
    return size, broken


def whole_png(content: bytes) -> bool:
    """Whether all that a PNG needs is there, with right checksums."""
    at, found = 8, []
    while at + 12 <= len(content):
        size = struct.unpack(">I", content[at : at + 4])[0]
        kind, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        if content[at : at + 12 + size] != chunk(kind, data):
            return False
        found.append(kind)
        at += 12 + size
        if kind == b"IEND":
            return b"IDAT" in found
    return False
