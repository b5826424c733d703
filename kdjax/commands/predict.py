"""`kdjax predict`: images, folders and videos to drawn boxes and COCO results."""

import collections
import functools
import json
import mimetypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
from tqdm import tqdm

from kdjax import files
from kdjax.commands import arguments
from kdjax.data.images import SUFFIXES, check_file, is_image, listened
from kdjax.errors import UserError, fault, printable
from kdjax.evals import coco
from kdjax.inference.model import BATCH
from kdjax.inference.predict import read_image
from kdjax.report import drawing
from kdjax.structs import Detections

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
JPEG_SIDE = 65_500  # px; the format ends there
NAME_BYTES = 255  # of a file's name, in common file systems
RATES = (0.01, 65_535)  # of an mp4, frames per second
_KNOWN = SUFFIXES + VIDEOS
LABELS = "detections of"  # the beginning of what a json of `kdjax label` says of itself


def run(*, paths: list[str], model: str, out: str, threshold: float, exif: str | None) -> int:
    """Detects objects and writes the detections.

    Writes `detections.json` (COCO results with a score over 0.001, in pixels of the image), `images.json` (the names of
    the ids in it: COCO's `images` and `categories`) and `drawn/`, the images and videos with their boxes. A detector of
    masks adds each `segmentation` (compressed RLE), and its masks are drawn. A file that cannot be read is reported on
    stderr and skipped.

    Args:
      paths: images, videos, and folders of images (with those below them).
      model: see `kdjax.inference.load`.
      out: the folder to write.
      threshold: smallest score of a box that is drawn, 0 .. 1.
      exif: "stored": detect in the stored pixels; "upright": in the images as EXIF's orientation turns them;
        None: as the model was trained.

    What cannot be drawn is reported too, and its detections are written. If the command is interrupted, those so far
    are written.

    Returns:
      Exit code: 0, or 2 if a file could not be read or drawn.

    Raises:
      UserError: before any compute: a path is missing, there is no image, or no such model.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold must be a score in 0 .. 1, not {threshold}")
    folder = Path(out).expanduser()
    if (folder / "evaluation.json").exists():
        raise UserError(f"--out: {out} is the folder of a `kdjax evaluate`: choose another folder")
    found_files = find(paths, folder)
    loaded = arguments.load_model(model)
    arguments.make_folder(out, outputs=("detections.json", "images.json"), folders=("drawn",))
    exif = exif or loaded.exif_orientation
    images: list[dict[str, Any]] = []
    sources: list[tuple[Path, Path]] = []
    results: list[dict[str, Any]] = []
    unreadable, done, drawings = 0, 0, Drawings()
    notes: collections.Counter[str] = collections.Counter()

    def tell(message: str, file: Path) -> None:
        notes[message.removeprefix(f"{file}: ")] += 1
        if notes[message.removeprefix(f"{file}: ")] == 1:  # the others are counted
            _warn(message)

    def read() -> Iterator[np.ndarray]:
        nonlocal unreadable
        for file, name in found_files:
            try:
                for number, image in enumerate(frames(file, exif, functools.partial(tell, file=file))):
                    label = f"{file}#{number}" if is_video(file) else str(file)
                    height, width = image.shape[:2]
                    images.append({"id": len(images) + 1, "file_name": label, "width": width, "height": height})
                    sources.append((file, folder / "drawn" / name))
                    yield image
            except UserError as error:
                unreadable += 1
                _warn(str(error))

    moving = any(is_video(file) for file, _ in found_files)
    try:
        stream = loaded.stream(read(), batch_size=BATCH if moving else min(BATCH, len(found_files)))
        bar = tqdm(stream, desc="predict", total=None if moving else len(found_files), unit="image")
        for (image, found), (source, target), entry in zip(bar, sources, images, strict=False):
            results += coco.to_coco(found, entry["id"])
            done += 1
            drawings.write(source, target, image, found, threshold)
        drawings.close()
        for note, number in notes.items():
            if number > 1:
                _warn(f"{number - 1} more images: {note}")
    finally:  # results first: also those so far, if drawing or computing goes wrong
        if done:
            categories = zip(loaded.category_ids, loaded.class_names, strict=True)
            named = {"images": images[:done], "categories": [{"id": k, "name": name} for k, name in categories]}
            failed: list[str] = []
            for name, content in (("detections.json", results), ("images.json", named)):
                with files.attempt(failed):
                    files.write_json(folder / name, content)
            files.finish(failed)
    if not images:
        return 2
    strong = sum(row["score"] >= threshold for row in results)
    shown = "1 image" if len(images) == 1 else f"{len(images)} images"
    print(f"{out}: {shown}, {strong} {'object' if strong == 1 else 'objects'} with a score of at least {threshold:g}")
    return 2 if unreadable or drawings.failed else 0


class Drawings:
    """The drawn images and videos. What cannot be written is reported, once for each file, and skipped."""

    def __init__(self) -> None:
        self.failed: set[Path] = set()
        self.writers: dict[Path, cv2.VideoWriter] = {}
        self.frames: dict[Path, int] = {}

    def write(self, source: Path, target: Path, image: np.ndarray, found: Detections, threshold: float) -> None:
        """Draws an image, or the next frame of a video.

        Args:
          source: the file that was read.
          target: the file to write.
          image: u8[h, w, 3] RGB.
          found: its detections.
          threshold: smallest score of a box that is drawn.
        """
        if target in self.failed:
            return
        names, masks = found.class_names, found.masks or ()
        drawn = drawing.draw(
            image, found.boxes, found.labels, found.scores, names, masks=masks, threshold=threshold, width=None
        )
        drawn = np.ascontiguousarray(drawn[:, :, ::-1])
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if is_video(source):
                self._frame(source, target, drawn)
            else:
                _write_jpeg(target, drawn)
        except (OSError, UserError) as error:
            self._report(target, f"{source}: its drawing is not written: {error_text(error)}")

    def _frame(self, source: Path, target: Path, drawn: np.ndarray) -> None:
        if target not in self.writers:
            rate = _video(source)[0].get(cv2.CAP_PROP_FPS)
            if not RATES[0] <= rate <= RATES[1]:  # the file does not say, or mp4 has no such rate
                if rate > 0:
                    _warn(f"{source}: drawn with 25 frames per second: mp4 has no rate of {rate:g}")
                rate = 25
            options = (_utf8(target), cv2.VideoWriter.fourcc(*"mp4v"), rate, drawn.shape[1::-1])
            self.writers[target], said = listened(lambda: cv2.VideoWriter(*options))
            self.frames[target] = 0
            if not self.writers[target].isOpened():
                size = f"{drawn.shape[1]:,} x {drawn.shape[0]:,} px with {rate:g} frames per second"
                what = f"OpenCV cannot write a video of {size} as mp4, or the disk is full"
                raise UserError(": ".join([what, *said[:1]]))
        self.writers[target].write(drawn)
        self.frames[target] += 1

    def close(self) -> None:
        """Closes the videos; OpenCV does not say whether it could write them, so their frames are counted."""
        for target, writer in self.writers.items():
            writer.release()
            if target not in self.failed:
                written = int(_video(target)[0].get(cv2.CAP_PROP_FRAME_COUNT))
                if written < self.frames[target]:
                    what = f"only {written} of its {self.frames[target]} frames could be written: is the disk full?"
                    self._report(target, f"{target}: {what}")

    def _report(self, target: Path, message: str) -> None:
        self.failed.add(target)
        _warn(message)


def error_text(error: Exception) -> str:
    """An error in one sentence."""
    return fault(error) or str(error)


def _write_jpeg(target: Path, drawn: np.ndarray) -> None:
    """Writes an image.

    Raises:
      UserError: it is too large for the format.
      OSError: the file cannot be written.
    """
    height, width = drawn.shape[:2]
    if max(height, width) > JPEG_SIDE:
        raise UserError(f"JPEG ends at {JPEG_SIDE:,} px a side, the image has {width:,} x {height:,}")
    encoded, content = cv2.imencode(".jpg", drawn)
    if not encoded:
        raise UserError("OpenCV cannot encode it as JPEG")
    files.write_bytes(target, content.tobytes())


def find(paths: list[str], out: Path) -> list[tuple[Path, str]]:
    """The files to read and the name of each under `drawn/`; files in `out` are left out.

    Args:
      paths: of files, and of folders, which are searched for images and videos, also behind links; what `kdjax predict`
        and `kdjax label` drew in them is left out, and counted on stderr.
      out: the folder that is written.

    Returns:
      (file, name) pairs; the names differ from each other.

    Raises:
      UserError: a path is missing or would be overwritten, a folder holds nothing to read, or no file is of a supported
        kind.
    """
    found: list[tuple[Path, Path]] = []
    for path in (Path(text).expanduser() for text in paths):
        if path.is_dir():
            known = [p for p in sorted(_below(path)) if _looks_readable(p)]
            inside = [p for p in known if not Path(os.path.realpath(p)).is_relative_to(os.path.realpath(out))]
            ours = {p for p in inside if _is_drawn(p)}
            inside = [p for p in inside if p not in ours]
            if not inside:
                where = " outside of --out that kdjax did not draw" if known else ""
                raise UserError(f"{path}: it holds no images or videos ({', '.join(_KNOWN)}){where}")
            if ours:
                _warn(f"{path}: {len(ours)} files that kdjax drew are left out, as {min(ours)}")
            found += [(p, p.relative_to(path)) for p in inside]
        elif not path.exists():
            raise UserError(f"{path}: there is no such file or folder")
        else:
            check_file(path)
            if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out / "drawn")):
                raise UserError(f"{path}: it lies where the drawn images are written: choose another --out")
            found.append((path, Path(path.name)))
    if not any(file.suffix.lower() in _KNOWN or is_image(file) for file, _ in found):
        raise UserError(_unsupported(found[0][0]))
    taken: set[Path] = set()
    named: list[tuple[Path, str]] = []
    for file, name in found:
        suffix, drawn = ".mp4" if is_video(file) else ".jpg", None
        while drawn is None or drawn in taken:  # a.png beside a.jpg, or the same name in two folders
            drawn = name.with_name(_cut(name.stem, NAME_BYTES - len(suffix)) + suffix)
            suffix = f"_{suffix}"
        name = drawn
        taken.add(name)
        named.append((file, str(name)))
    return named


def is_labels(file: Path) -> bool:
    """Whether a file was written by `kdjax label`."""
    try:
        return str(json.loads(file.read_bytes())["info"]["description"]).startswith(LABELS)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _is_drawn(file: Path) -> bool:
    """Whether an image or a video is what `kdjax predict` drew, or the preview of `kdjax label`."""
    folders = [above.parent for above in file.parents if above.name == "drawn"]
    if any((folder / "detections.json").exists() and (folder / "images.json").exists() for folder in folders):
        return True
    return file.suffix == ".png" and is_labels(file.with_suffix(".json"))


def _cut(text: str, size: int) -> str:
    """The beginning of a name, of at most `size` bytes."""
    while len(os.fsencode(text)) > size:
        text = text[:-1]
    return text


def _below(folder: Path) -> Iterator[Path]:
    """What is in a folder and those below it, also behind links; a folder that is reached twice is searched once.

    Raises:
      UserError: one cannot be searched.
    """

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename}: cannot be searched ({error.strerror})") from None

    seen: set[str] = set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(where) in seen:
            folders.clear()
        else:
            seen.add(os.path.realpath(where))
            yield from (Path(where, name) for name in names)


def _looks_readable(file: Path) -> bool:
    """Whether a file looks like an image or a video; those that cannot be read count, so that they are reported."""
    kind = mimetypes.guess_type(file.name)[0]
    if file.suffix.lower() in _KNOWN or (kind or "").startswith(("image/", "video/")):
        return True
    return kind is None and is_image(file)  # the name says nothing


def _unsupported(file: Path) -> str:
    return f"{file}: it is neither an image nor a video of a supported kind ({', '.join(_KNOWN)})"


def is_video(file: Path) -> bool:
    """Whether the name is that of a video."""
    return file.suffix.lower() in VIDEOS


def frames(file: Path, exif: str, warn: Callable[[str], None]) -> Iterator[np.ndarray]:
    """The image of a file, or the frames of a video, u8[h, w, 3] RGB.

    Args:
      file: the image or video.
      exif: see `run`.
      warn: is called with each note on an image, see `read_image`.

    Raises:
      UserError: it cannot be read, or only in part.
    """
    if not is_video(file):
        if file.suffix.lower() not in SUFFIXES and not is_image(file):
            raise UserError(_unsupported(file))
        yield read_image(file, exif=exif, warn=warn)
        return
    check_file(file)
    video, notes = _video(file)
    announced, number, told = video.get(cv2.CAP_PROP_FRAME_COUNT), 0, set[str]()
    while True:
        (more, frame), said = listened(video.read)
        notes = [note for note in dict.fromkeys((*notes, *said)) if note not in told]
        if not more and not number:
            why = notes[:1] if file.stat().st_size else ["it is empty"]
            raise UserError(": ".join([f"{file}: OpenCV cannot read it as a video", *why]))
        for note in notes:  # once for the whole video
            warn(f"{file}: {note}")
        told |= {*notes}
        if not more:
            break
        yield np.ascontiguousarray(frame[:, :, ::-1])
        number += 1
    video.release()
    if number < 0.95 * announced:  # OpenCV estimates the number for some kinds
        raise UserError(f"{file}: the video is broken: only {number} of its {announced:.0f} frames can be read")
    if number < announced:
        warn(f"{file}: its header announces {announced:.0f} frames, {number} can be read")


def _video(file: Path) -> tuple[cv2.VideoCapture, tuple[str, ...]]:
    """A video, and notes on what is printed when it is opened."""
    # By FFmpeg alone: another reader takes a number in the name as that of the first image of a row. In one thread:
    # what several print would come later.
    return listened(lambda: cv2.VideoCapture(_utf8(file), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]))


def _utf8(file: Path) -> str:
    """A path for OpenCV's videos; absolute, because a relative name with a colon would be an address.

    Raises:
      UserError: it is not UTF-8, of which OpenCV crashes.
    """
    path = str(file.absolute())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{file}: its name is not UTF-8, which OpenCV needs of a video: rename it") from None
    return path


def _warn(message: str) -> None:
    tqdm.write(f"kdjax: {printable(message)}", file=sys.stderr)
