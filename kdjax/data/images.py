"""The one reader of image files: bytes to pixels, and what a user is to be told of them."""

import contextlib
import io
import os
import re
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import PIL.Image

from kdjax.errors import UserError

# What a folder is searched for. A file that is named is read by its content, whatever its suffix.
SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".avif", ".jp2",
)  # fmt: skip
EXIF = ("stored", "upright")  # values of `config.data.exif_orientation` and --exif
NOT_TURNED = "EXIF orientation is not applied: boxes refer to the stored pixels"
TURNED = "turned upright by its EXIF orientation: boxes refer to the turned image"
DARK = "less than an eighth of the range of 16 bits is used: the image is read as nearly black"
FIRST = "it has several frames or pages: the first is read"
LARGE = "over 89 million pixels: it takes long and much memory"

_ORIENTATION = 274  # EXIF's tag
_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_LARGE = 89_478_485  # px; above, Pillow warns of decompression bombs
_SEQUENCES = ("GIF", "WEBP", "AVIF", "PNG", "TIFF")  # Pillow's names; a JPEG's second image is a preview
_PLAIN = ("JPEG", "PNG", "BMP", "WEBP")  # of which Pillow's header has the size that OpenCV decodes
_DENSEST = 10_000  # px that a byte of a large image can hold: PNG and GIF end below
_MOST = 2**30  # px; OpenCV reads no more, and no side over 2^20
_DAMAGE = (OSError, SyntaxError)  # what Pillow raises of damaged files
_OPENING, _LISTENING = threading.Lock(), threading.Lock()  # Pillow's limit and stderr belong to the whole process

Item = TypeVar("Item")
Result = TypeVar("Result")


class Facts(NamedTuple):
    """What is known of an image that can be read."""

    size: tuple[int, int]  # height and width, px
    orientation: int  # EXIF's, 1 .. 8; 1 is upright
    notes: tuple[str, ...]  # what a user is to be told


def check_exif(value: str, name: str = "exif_orientation") -> bool:
    """Whether EXIF's orientation is to be applied.

    Raises:
      UserError: the value of the setting is not one of `EXIF`.
    """
    if value not in EXIF:
        raise UserError(f"{name} must be one of {', '.join(EXIF)}, not {value!r}")
    return value == "upright"


def decode(encoded: bytes, *, upright: bool = False) -> np.ndarray | None:
    """Decodes an image to u8[h, w, 3] RGB, also from grey, CMYK or 16 bits; of several frames the first.

    Args:
      encoded: the content of its file.
      upright: apply EXIF's orientation; False: the stored pixels. The orientation of a TIFF is always applied.

    Returns:
      The pixels; None if it cannot be read.
    """
    pixels = _decoded(encoded, _STORED)
    if pixels is not None and pixels.ndim == 2:  # a kind of which OpenCV makes no colours: PFM
        return None
    return turned(pixels, _header(encoded)[0]) if upright and pixels is not None else pixels


def _decoded(encoded: bytes, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:  # no bytes, or a header with an impossible size
        return None


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels as EXIF's orientation, 1 .. 8, shows them.

    Example:
      >>> turned(np.array([[1, 2]]), 6).tolist()
      [[1], [2]]
    """
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def read(encoded: bytes, name: str, *, upright: bool = False) -> tuple[np.ndarray, Facts]:
    """Reads an image, as `decode`.

    Args:
      encoded: the content of its file.
      name: of the file, for messages.
      upright: see `decode`.

    Returns:
      The pixels, and facts. Their notes tell of EXIF's orientation, of 16 bits that are hardly used, of a very large
      image, and what a decoder prints, which mostly is damage.

    Raises:
      UserError: it cannot be read, or only in part.
    """
    ((pixels, facts), lines), *_ = heard(lambda item: _read(*item, upright), [(encoded, name)])
    return pixels, facts._replace(notes=facts.notes + lines)


def facts(images: Sequence[tuple[bytes, str]], pool: Executor, *, upright: bool = False) -> list[Facts]:
    """The facts of several images, each given by its content and name, in their order.

    Raises:
      UserError: one cannot be read, or only in part.
    """
    found = heard(lambda item: _read(*item, upright)[1], images, pool)
    return [one._replace(notes=one.notes + lines) for one, lines in found]


def sizes(paths: Sequence[str], pool: Executor, *, upright: bool = False) -> list[tuple[int, int]]:
    """Height and width in pixels of several images, as `facts` finds them; of most kinds only the header is read.

    Raises:
      UserError: one cannot be read.
    """
    return [size for size, _ in heard(lambda path: _size(path, upright), paths, pool)]


def _size(path: str, upright: bool) -> tuple[int, int]:
    try:
        with _opened(Path(path)) as opened:
            if opened.format in _PLAIN:
                turn = upright and opened.getexif().get(_ORIENTATION, 1) in range(5, 9)
                return (opened.width, opened.height) if turn else (opened.height, opened.width)
    except Exception:  # Pillow raises many exception types of damaged files
        pass
    try:
        encoded = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _read(encoded, path, upright)[1].size


def check_file(file: Path) -> None:
    """Checks that there is a file: the content of a pipe or a device may have no end.

    Raises:
      UserError: there is none, or something else.
    """
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{file}: cannot be read: it is a folder, a pipe or a device, where a file must be")


def is_image(file: Path) -> bool:
    """Whether the content of a file begins as that of an image."""
    try:
        check_file(file)
        with _opened(file):
            return True
    except Exception:  # Pillow raises many exception types of damaged files
        return False


def heard(
    work: Callable[[Item], Result], items: Sequence[Item], pool: Executor | None = None
) -> list[tuple[Result, tuple[str, ...]]]:
    """The results of some work, each with the notes that decoders print of it: they tell of damage in no other way."""
    notes: list[tuple[str, ...]] = [()] * len(items)
    with _LISTENING:
        with _stderr() as lines:
            results = list((pool.map if pool else map)(work, items))
        explained: set[str] = set()
        if lines:  # of which? One after the other
            for index, item in enumerate(items):
                with _stderr() as own:
                    work(item)
                notes[index] = tuple(dict.fromkeys(_told(own)))
                explained |= {*notes[index]}
    for line, note in zip(lines, _told(lines), strict=True):
        if note not in explained:  # another thread's
            print(line, file=sys.stderr)
    return list(zip(results, notes, strict=True))


def listened(work: Callable[[], Result]) -> tuple[Result, tuple[str, ...]]:
    """The result of work that cannot be done twice, as reading the next frame, and the notes on what is printed."""
    with _LISTENING, _stderr() as lines:
        result = work()
    return result, tuple(dict.fromkeys(_told(lines)))


def _told(lines: list[str]) -> list[str]:
    """A note on each line that a decoder prints."""
    # Without numbers: times differ, and the same damage of several images is counted together.
    return ["its decoder says: " + re.sub(r"0x[0-9a-f]+|\d+", "N", line) for line in lines]


def _read(encoded: bytes, name: str, upright: bool) -> tuple[np.ndarray, Facts]:
    pixels = None if _inflated(encoded) else decode(encoded)
    if pixels is None or _broken_webp(encoded):
        raise UserError(f"{name}: cannot be read as an image: {_why(encoded)}")
    orientation, several = _header(encoded)
    notes = [FIRST] if several else []
    if orientation != 1:
        notes.append(TURNED if upright else NOT_TURNED)
    if pixels.max() < 32 and _depth(encoded) in (np.uint16, np.int16):
        notes.append(DARK)
    if pixels.shape[0] * pixels.shape[1] > _LARGE:
        notes.append(LARGE)
    if upright:
        pixels = turned(pixels, orientation)
    return pixels, Facts((pixels.shape[0], pixels.shape[1]), orientation, tuple(notes))


def _broken_webp(encoded: bytes) -> bool:
    """Whether it is a WebP whose data end in an error: OpenCV takes some of them, with what it has until then."""
    if encoded[8:12] != b"WEBP":
        return False
    try:
        with _opened(io.BytesIO(encoded)) as opened:
            opened.load()
    except PIL.UnidentifiedImageError:  # Pillow may have no WebP
        return False
    except _DAMAGE:
        return True
    return False


def _depth(encoded: bytes) -> np.dtype | None:
    stored = _decoded(encoded, cv2.IMREAD_UNCHANGED)
    return None if stored is None else stored.dtype


def _opened(file: io.BytesIO | Path) -> PIL.Image.Image:
    """Pillow's view of an image; without its limit of pixels, which is below OpenCV's."""
    with _OPENING:
        limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:
            return PIL.Image.open(file)
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = limit


def _inflated(encoded: bytes) -> bool:
    """Whether a header announces far more pixels than the file can hold: some decoders fill in the rest."""
    try:
        with _opened(io.BytesIO(encoded)) as opened:
            return opened.width * opened.height > max(_LARGE, _DENSEST * len(encoded))
    except Exception:  # Pillow raises many exception types of damaged files
        return False


def _header(encoded: bytes) -> tuple[int, bool]:
    """EXIF's orientation, 1 where there is none or OpenCV applies it; whether there are several frames or pages."""
    orientation, several = 1, False
    try:
        with _opened(io.BytesIO(encoded)) as opened:
            orientation = 1 if opened.format == "TIFF" else opened.getexif().get(_ORIENTATION, 1)
            several = opened.format in _SEQUENCES and getattr(opened, "is_animated", False)
    except Exception:  # Pillow raises many exception types of damaged files
        pass
    return (orientation if orientation in range(1, 9) else 1), several


def _why(encoded: bytes) -> str:
    """Why an image cannot be decoded."""
    if not encoded:
        return "it is empty"
    why = "its content is damaged, or of a kind that OpenCV does not read"
    try:
        with _opened(io.BytesIO(encoded)) as opened:
            width, height = opened.size
            if width * height > _MOST or max(width, height) > 2**20:
                return f"it has {width:,} x {height:,} px: OpenCV reads at most 2^30, and 2^20 a side"
            if _inflated(encoded):
                return f"its header says {width:,} x {height:,} px, which its {len(encoded):,} bytes cannot hold"
            if width * height < _LARGE:
                opened.load()
    except PIL.UnidentifiedImageError:
        why = "it is of no kind that OpenCV reads, or damaged at its beginning"
    except _DAMAGE as error:
        return str(error).rstrip(".") or why
    except Exception:  # Pillow raises many exception types of damaged files
        return why
    depth = _depth(encoded)  # also of what Pillow does not know
    if depth is not None and depth not in (np.uint8, np.uint16):
        return f"its pixels are {depth}: must be integers of 8 or 16 bits"
    return why


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """Collects the lines that the process writes to stderr, also from C, and each of Python's warnings as one."""
    lines: list[str] = []

    def show(message: Warning | str, *_: object, **__: object) -> None:
        os.write(2, f"{' '.join(str(message).split())}\n".encode(errors="replace"))

    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("always")  # Python shows the same warning once
        warnings.showwarning = show
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += filter(None, map(str.strip, file.read().decode(errors="replace").splitlines()))
