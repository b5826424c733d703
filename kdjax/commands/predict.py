"""`kdjax predict`: images, folders and videos to drawn boxes and COCO results."""

import contextlib
import functools
import mimetypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from kdjax.commands import arguments
from kdjax.data import coco as folders
from kdjax.errors import UserError
from kdjax.evals import coco
from kdjax.files import write_json
from kdjax.inference.model import BATCH
from kdjax.inference.predict import read_image
from kdjax.report import drawing

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_KNOWN = folders.SUFFIXES + VIDEOS


def run(*, paths: list[str], model: str, out: str, threshold: float) -> int:
    """Detects objects and writes the detections.

    Writes `detections.json` (COCO results with a score over 0.001, in pixels of the image), `images.json` (the names of
    the ids in it: COCO's `images` and `categories`) and `drawn/`, the images and videos with their boxes. A file that
    cannot be read is reported on stderr and skipped.

    Args:
      paths: images, videos, and folders of images (with those below them).
      model: see `kdjax.inference.load`.
      out: the folder to write.
      threshold: smallest score of a box that is drawn, 0 .. 1.

    Returns:
      Exit code: 0, or 2 if a file could not be read.

    Raises:
      UserError: before any compute: a path is missing, there is no image, or no such model.
      OSError: a drawn image cannot be written.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold must be a score in 0 .. 1, not {threshold}")
    folder = Path(out).expanduser()
    files = find(paths, folder)
    loaded = arguments.load_model(model)
    arguments.make_folder(out)
    images: list[dict[str, Any]] = []
    sources: list[tuple[Path, Path]] = []
    results: list[dict[str, Any]] = []
    unreadable = 0

    def read() -> Iterator[np.ndarray]:
        nonlocal unreadable
        for file, name in files:
            try:
                for number, image in enumerate(frames(file)):
                    label = f"{file}#{number}" if is_video(file) else str(file)
                    height, width = image.shape[:2]
                    images.append({"id": len(images) + 1, "file_name": label, "width": width, "height": height})
                    sources.append((file, folder / "drawn" / name))
                    yield image
            except UserError as error:
                unreadable += 1
                _warn(str(error))

    moving = any(is_video(file) for file, _ in files)
    with contextlib.ExitStack() as videos:
        write = functools.partial(_write, writers={}, videos=videos)
        stream = loaded.stream(read(), batch_size=BATCH if moving else min(BATCH, len(files)))
        bar = tqdm(stream, desc="predict", total=None if moving else len(files), unit="image")
        for (image, found), (source, target), entry in zip(bar, sources, images, strict=False):
            results += coco.to_coco(found, entry["id"])
            names = found.class_names
            drawn = drawing.draw(image, found.boxes, found.labels, found.scores, names, threshold=threshold, width=None)
            write(source, target, drawn)
    if not images:
        return 2
    categories = [{"id": k, "name": name} for k, name in zip(loaded.category_ids, loaded.class_names, strict=True)]
    write_json(folder / "detections.json", results)
    write_json(folder / "images.json", {"images": images, "categories": categories})
    strong = sum(row["score"] >= threshold for row in results)
    print(f"{out}: {len(images)} images, {strong} objects with a score of at least {threshold:g}")
    return 2 if unreadable else 0


def _write(
    source: Path,
    target: Path,
    drawn: np.ndarray,
    *,
    writers: dict[Path, cv2.VideoWriter],
    videos: contextlib.ExitStack,
) -> None:
    """Writes an image, or the next frame of a video, whose writer `videos` closes at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not is_video(source):
        if not cv2.imwrite(str(target), drawn[:, :, ::-1]):
            raise OSError(f"{target} could not be written: is the disk full?")
        return
    if target not in writers:
        rate = cv2.VideoCapture(str(source)).get(cv2.CAP_PROP_FPS) or 25
        writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*"mp4v"), rate, drawn.shape[1::-1])
        if not writer.isOpened():
            raise OSError(f"{target} could not be written: OpenCV cannot write mp4 here, or the disk is full")
        videos.callback(writer.release)
        writers[target] = writer
    writers[target].write(drawn[:, :, ::-1])


def find(paths: list[str], out: Path) -> list[tuple[Path, str]]:
    """The files to read and the name of each under `drawn/`; files in `out` are left out.

    Args:
      paths: of files, and of folders, which are searched for images and videos.
      out: the folder that is written.

    Returns:
      (file, name) pairs; the names differ from each other.

    Raises:
      UserError: a path is missing, a folder holds nothing to read, or no file is of a supported kind.
    """
    found: list[tuple[Path, Path]] = []
    for path in (Path(text).expanduser() for text in paths):
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if _looks_readable(p) and p.is_file()]
            inside = [p for p in inside if not p.resolve().is_relative_to(out.resolve())]
            if not inside:
                raise UserError(f"{path}: it holds no images ({', '.join(_KNOWN)}) outside of --out")
            found += [(p, p.relative_to(path)) for p in inside]
        elif not path.is_file():
            raise UserError(f"{path}: there is no such file or folder")
        else:
            found.append((path, Path(path.name)))
    if not any(file.suffix.lower() in _KNOWN for file, _ in found):
        raise UserError(_unsupported(found[0][0]))
    taken: set[Path] = set()
    named: list[tuple[Path, str]] = []
    for file, name in found:
        name = name.with_suffix(".mp4" if is_video(file) else ".jpg")
        while name in taken:  # a.png beside a.jpg, or the same name in two folders
            name = name.with_stem(f"{name.stem}_")
        taken.add(name)
        named.append((file, str(name)))
    return named


def _looks_readable(file: Path) -> bool:
    """Whether a file looks like an image or a video; unsupported kinds count, so that they are reported."""
    kind = mimetypes.guess_type(file.name)[0] or ""
    return file.suffix.lower() in _KNOWN or kind.startswith(("image/", "video/"))


def _unsupported(file: Path) -> str:
    return f"{file}: it is neither an image nor a video of a supported kind ({', '.join(_KNOWN)})"


def is_video(file: Path) -> bool:
    """Whether the name is that of a video."""
    return file.suffix.lower() in VIDEOS


def frames(file: Path) -> Iterator[np.ndarray]:
    """The image of a file, or the frames of a video, u8[h, w, 3] RGB.

    Raises:
      UserError: it cannot be read, or only in part.
    """
    if file.suffix.lower() not in _KNOWN:
        raise UserError(_unsupported(file))
    if not is_video(file):
        yield read_image(file, warn=_warn)
        return
    video = cv2.VideoCapture(str(file))
    announced, number = video.get(cv2.CAP_PROP_FRAME_COUNT), 0
    while (frame := video.read())[0]:
        yield np.ascontiguousarray(frame[1][:, :, ::-1])
        number += 1
    video.release()
    if not number:
        raise UserError(f"{file}: OpenCV cannot read it as a video")
    if number < 0.95 * announced:  # OpenCV estimates the number for some kinds
        raise UserError(f"{file}: the video is broken: only {number} of its {announced:.0f} frames can be read")


def _warn(message: str) -> None:
    tqdm.write(f"kdjax: {message}", file=sys.stderr)
