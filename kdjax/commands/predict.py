"""`kdjax predict`: images, folders and videos to drawn boxes and COCO results."""

import contextlib
import io
import mimetypes
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from kdjax.data import coco, records
from kdjax.files import write_json
from kdjax.inference import model as models
from kdjax.report import drawing

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_KNOWN = coco.SUFFIXES + VIDEOS
_ORIENTATION = 274  # EXIF's tag


def run(*, paths: list[str], model: str, out: str, threshold: float) -> int:
    """Detects objects and writes what was found.

    Writes `detections.json` (COCO results with everything over a score of 0.001, in pixels of the image),
    `images.json` (what the ids in it stand for: COCO's `images` and `categories`) and `drawn/`, with the images and
    videos as they are and the boxes on them. A file that cannot be read gets a sentence on stderr; the rest goes on.

    Args:
      paths: images, videos, and folders of images (with those below them).
      model: see `kdjax.inference.model.load`.
      out: the folder to write.
      threshold: smallest score of a box that is drawn, 0 .. 1.

    Returns:
      Exit code: 0, or 2 if anything could not be read.

    Raises:
      ValueError: before any compute: a path is missing, there is no image, or no such model.
      OSError: what was drawn cannot be written.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold={threshold} must be a score in 0 .. 1.")
    folder = Path(out).expanduser()
    files = find(paths, folder)
    loaded = models.load(model)
    models.check_out(out)
    images, names, results, unread = [], [], [], 0

    def read() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal unread
        for file, name in files:
            try:
                for number, image in enumerate(frames(file)):
                    label = f"{file}#{number}" if is_video(file) else str(file)
                    height, width = image.shape[:2]
                    images.append({"id": len(images) + 1, "file_name": label, "width": width, "height": height})
                    names.append((file, name))
                    yield len(images), image
            except ValueError as error:
                unread += 1
                _tell(str(error))

    moving = any(is_video(file) for file, _ in files)
    with contextlib.ExitStack() as videos:
        writers = {}
        found = models.detect(loaded, read(), batch=models.BATCH if moving else min(models.BATCH, len(files)))
        for (image_id, image), rows in tqdm(found, desc="predict", total=None if moving else len(files), unit="image"):
            results += rows
            file, name = names[image_id - 1]
            drawn = draw(image, rows, loaded, threshold)
            target = folder / "drawn" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not is_video(file):
                if not cv2.imwrite(str(target), drawn[:, :, ::-1]):
                    raise OSError(f"{target} could not be written: is the disk full?")
                continue
            if target not in writers:
                rate = cv2.VideoCapture(str(file)).get(cv2.CAP_PROP_FPS) or 25
                size = drawn.shape[1::-1]
                writers[target] = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
                if not writers[target].isOpened():
                    raise OSError(f"{target} could not be written: OpenCV has no mp4 here, or the disk is full.")
                videos.callback(writers[target].release)
            writers[target].write(drawn[:, :, ::-1])
    if not images:
        return 2
    categories = [{"id": k, "name": name} for k, name in zip(loaded.category_ids, loaded.classes, strict=True)]
    write_json(folder / "detections.json", results)
    write_json(folder / "images.json", {"images": images, "categories": categories})
    strong = sum(row["score"] >= threshold for row in results)
    print(f"{out}: {len(images)} images, {strong} objects with a score of at least {threshold:g}")
    return 2 if unread else 0


def find(paths: list[str], out: Path) -> list[tuple[Path, str]]:
    """The files to read, and the name of each under `drawn/`: what lies in `out` is left out.

    Args:
      paths: of files, and of folders, which are searched for images and videos.
      out: the folder that is written.

    Returns:
      (file, name) pairs; the names differ from each other.

    Raises:
      ValueError: a path is missing, a folder holds nothing to read, or no file is of a known kind.
    """
    found: list[tuple[Path, Path]] = []
    for path in (Path(given).expanduser() for given in paths):
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if _is_meant(p) and p.is_file()]
            inside = [p for p in inside if not p.resolve().is_relative_to(out.resolve())]
            if not inside:
                raise ValueError(f"{path} holds no images ({', '.join(_KNOWN)}) outside of --out.")
            found += [(p, p.relative_to(path)) for p in inside]
        elif not path.is_file():
            raise ValueError(f"there is no file or folder {path}.")
        else:
            found.append((path, Path(path.name)))
    if not any(file.suffix.lower() in _KNOWN for file, _ in found):
        raise ValueError(_strange(found[0][0]))
    taken, named = set(), []
    for file, name in found:
        name = name.with_suffix(".mp4" if is_video(file) else ".jpg")
        while name in taken:  # a.png beside a.jpg, or the same name in two folders
            name = name.with_stem(f"{name.stem}_")
        taken.add(name)
        named.append((file, str(name)))
    return named


def _is_meant(file: Path) -> bool:
    """Whether a file of a folder is an image or a video, be it of a kind that cannot be read: that is to be told."""
    kind = mimetypes.guess_type(file.name)[0] or ""
    return file.suffix.lower() in _KNOWN or kind.startswith(("image/", "video/"))


def _strange(file: Path) -> str:
    return f"{file} is neither an image nor a video that is known ({', '.join(_KNOWN)})."


def is_video(file: Path) -> bool:
    """Whether the name is that of a video."""
    return file.suffix.lower() in VIDEOS


def frames(file: Path) -> Iterator[np.ndarray]:
    """The image of a file, or the images of a video, u8[h, w, 3] RGB.

    Raises:
      ValueError: it cannot be read, or only in part; one sentence.
    """
    if file.suffix.lower() not in _KNOWN:
        raise ValueError(_strange(file))
    if not is_video(file):
        yield read_image(file)
        return
    video = cv2.VideoCapture(str(file))
    told, number = video.get(cv2.CAP_PROP_FRAME_COUNT), 0
    while (frame := video.read())[0]:
        yield np.ascontiguousarray(frame[1][:, :, ::-1])
        number += 1
    video.release()
    if not number:
        raise ValueError(f"{file} cannot be read as a video by OpenCV.")
    if number < 0.95 * told:  # of some kinds OpenCV estimates the number
        raise ValueError(f"{file} is broken: only {number} of its {told:.0f} images can be read.")


def read_image(file: Path) -> np.ndarray:
    """u8[h, w, 3] RGB, the stored pixels, as in training and evaluation.

    EXIF's orientation is not applied, but told; and so are 16 bits that are hardly used.

    Raises:
      ValueError: it cannot be read, or only in part; one sentence.
    """
    try:
        encoded = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from None
    orientation = 1
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            opened.load()
            orientation = opened.getexif().get(_ORIENTATION, 1)
    except UnidentifiedImageError:
        pass  # OpenCV reads some kinds that Pillow does not
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises this and that
        raise ValueError(f"{file} is broken: {str(error).rstrip('.')}.") from None
    image = records.decode(encoded)
    if image is None:
        raise ValueError(f"{file} cannot be read as an image{': it is empty' if not encoded else ''}.")
    if orientation != 1:
        _tell(f"{file} is stored turned (EXIF orientation {orientation}): boxes are those of the stored pixels.")
    if image.max() < 32 and cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED).dtype == np.uint16:
        _tell(f"{file} has 16 bits and fills less than an eighth of their range: it is taken for nearly black.")
    return image


def _tell(message: str) -> None:
    tqdm.write(f"kdjax: {message}", file=sys.stderr)


def draw(image: np.ndarray, found: list[dict], model: models.Model, threshold: float) -> np.ndarray:
    """The image u8[h, w, 3] in its own size with the boxes of COCO results that score at least `threshold`."""
    boxes = np.array([row["bbox"] for row in found]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([model.category_ids.index(row["category_id"]) for row in found], int)
    scores = np.array([row["score"] for row in found])
    return drawing.draw(image, boxes, labels, scores, model.classes, threshold=threshold, width=None)
