"""Spoilt images and videos: each is read with its own size and pixels, or named on stderr; nothing is lost silently.

What is right is known from the pixels that were written; of damaged files Pillow and a short reader of PNG say the size
and whether the file is cut or its checksums are wrong. kdjax reads with OpenCV.
"""

import io
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from kdjax import cli
from kdjax.commands import arguments
from kdjax.errors import UserError
from kdjax.structs import Detections
from tests.fuzz.media import FRAMES, damage, make, paint, png, resized, seen_by_pillow, video
from tests.fuzz.runs import LIMIT, end_of, fuzz
from tests.support.data import coco_json, opened

NAMES = ("a", "a b", "\u00e4", "a:b", "a%d", "a1", os.fsdecode(b"a\xff"), "-a", "#")
SUFFIXES = (".jpg", ".png", ".bmp", ".webp", ".tif", ".gif", ".ppm", ".jp2", ".avif", ".PNG")
INSTEAD = (b"", b"no image\n" * 9, b"<!DOCTYPE html><html>404</html>", b'{"images": []}', b"\0" * 999, b"\xff\xd8\xff")


class Blind:
    """A model that remembers what it is given, and finds nothing."""

    category_ids, class_names, exif_orientation = (1,), ("a",), "stored"

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []

    def stream(self, images, *, batch_size):
        for image in images:
            self.images.append(image)
            yield image, Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


def predict(capfd, patched, paths, out: Path, exif: str) -> tuple[int, list[str], dict[str, list[np.ndarray]]]:
    """The exit code, the sentences on stderr, and the images that a model got, by the name in images.json."""
    model = Blind()
    patched.setattr(arguments, "load_model", lambda path: model)
    capfd.readouterr()
    begun = time.monotonic()
    code = cli.main(["predict", "--model=m", f"--out={out}", f"--exif={exif}", "--", *map(str, paths)])
    assert time.monotonic() - begun < LIMIT
    lines = [line.strip() for line in re.split(r"[\r\n]", capfd.readouterr().err) if line.strip()]
    told = [line for line in lines if not line.startswith("predict:")]
    assert all(line.startswith("kdjax: ") for line in told), told
    assert code in (0, 2), told
    found: dict[str, list[np.ndarray]] = {}
    if (out / "images.json").exists():
        entries = json.loads((out / "images.json").read_text())["images"]
        assert len(entries) == len(model.images)
        for entry, image in zip(entries, model.images, strict=True):
            assert image.shape == (entry["height"], entry["width"], 3) and image.dtype == np.uint8
            found.setdefault(re.sub(r"#\d+$", "", entry["file_name"]), []).append(image)
    return code, told, found


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels as a viewer shows them, by EXIF's table."""
    across, down = {
        1: (1, 1), 2: (-1, 1), 3: (-1, -1), 4: (1, -1), 5: (1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1),
    }[orientation]  # fmt: skip
    return (pixels.swapaxes(0, 1) if orientation > 4 else pixels)[::down, ::across]


def close(got: np.ndarray, wanted: np.ndarray, off: float) -> bool:
    return got.shape == wanted.shape and np.abs(got.astype(int) - wanted).mean() <= off


class Subject(NamedTuple):
    """What is given to kdjax, and what must come of it."""

    name: str
    content: bytes | str  # a word: what stands in the place of the file
    wanted: list[np.ndarray] | None  # None: it is damaged, and may be refused
    off: float
    oriented: bool  # its file has an orientation
    moving: bool = False  # its content is that of a video
    several: bool = False  # it has several frames, of which the first is read


def subject(draw, exif: str) -> Subject:
    stem = draw(st.sampled_from(NAMES))
    kind = draw(st.sampled_from(("image",) * 8 + ("video",) * 3 + ("instead",)))
    if kind == "instead":
        content = draw(st.sampled_from((*INSTEAD, "pipe", "folder", "dangling", "circle")))
        return Subject(stem + draw(st.sampled_from((*SUFFIXES, ".avi", ".mp4"))), content, None, 0, False)
    if kind == "video":
        right = draw(st.sampled_from((".avi", ".mp4")))
        (content, frames), suffix = video(right), draw(st.sampled_from((right, right, right, ".mov", ".png", "")))
        sound = draw(st.integers(0, 3)) == 0
        content = content if sound else damage(draw, content)
        sound = sound and suffix not in (".png", "") and stem.isprintable()  # OpenCV needs UTF-8
        return Subject(stem + suffix, content, frames if sound else None, 12, False, True)
    made = make(draw)
    suffix = draw(st.sampled_from((made.suffix, made.suffix, "", *SUFFIXES, ".mp4")))
    spoilt = draw(st.sampled_from(("no", "no", "size", "bytes", "bytes", "bytes")))
    wanted = upright(made.pixels, made.orientation) if exif == "upright" else made.pixels
    content = made.content
    if spoilt == "size":
        content = resized(draw, content, made.pixels)
    elif spoilt == "bytes":
        content = damage(draw, content)
    sound = content == made.content and suffix != ".mp4"
    several = made.suffix == ".gif" and Image.open(io.BytesIO(made.content)).n_frames > 1
    wanted = [wanted] if sound else None
    return Subject(stem + suffix, content, wanted, made.off, made.orientation > 1, several=several)


def place(path: Path, content: bytes | str) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if content == "circle" else "nowhere")


def check_predict(draw, capfd, monkeypatch) -> None:
    exif = draw(st.sampled_from(("stored", "upright")))
    given, alone = subject(draw, exif), draw(st.integers(0, 3)) == 0
    sound = paint(20, 30, 5)
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patched:
        inside, out = Path(folder, "in"), Path(folder, "out")
        inside.mkdir()
        file = inside / given.name
        place(file, given.content)
        if not alone:
            (inside / "b.png").write_bytes(png(sound))
        code, told, found = predict(capfd, patched, [file if alone else inside], out, exif)
        about = [line for line in told if str(file).encode(errors="backslashreplace").decode() in line]
    context = (given.name, given.content[:60], told)
    assert about == told, context
    if not alone:
        assert close(*found.pop(str(inside / "b.png")), sound, 0), context
    images = found.pop(str(file), [])
    assert not found
    assert code == 0 or about, context
    if given.wanted is not None:
        assert code == 0 and len(images) == len(given.wanted), context
        assert all(close(*pair, given.off) for pair in zip(images, given.wanted, strict=True)), context
        assert len(told) == (given.oriented and exif == "stored") + given.several, context
        return
    if given.content == "folder":
        assert not images
        return
    if not isinstance(given.content, bytes):
        assert code == 2 and not images, context
        return
    check_damaged(given, images, code, about)


def check_damaged(given: Subject, images: list[np.ndarray], code: int, about: list[str]) -> None:
    """Of a damaged file that was given to predict: what was read has the size that it says, and nothing is lost."""
    assert isinstance(given.content, bytes)
    size, broken = seen_by_pillow(given.content)
    context = (given.name, given.content[:60], size, broken, [image.shape for image in images], about)
    suffix = Path(given.name).suffix
    if suffix in (".avi", ".mp4", ".mov"):
        assert about or (len(images) == FRAMES if given.moving else images), context
        return
    if not images:
        assert about or (not suffix and size is None), context  # without a suffix it is no image
        return
    assert len(images) == 1
    if size:
        assert images[0].shape[:2] in (size, size[::-1]), context
    if broken:
        assert about, context
    assert code == 0 or "its drawing is not written" in about[-1], context


def check_folder(draw, dry: bool) -> None:
    """The same files as the images of a COCO folder; `dry`: also by the command, which takes a second."""
    exif = draw(st.sampled_from(("stored", "upright")))
    given = subject(draw, exif)
    if not isinstance(given.content, bytes):
        return
    name, sound = "a" + Path(given.name).suffix, paint(20, 30, 5)
    readable = given.wanted is not None and not given.moving
    height, width = given.wanted[0].shape[:2] if given.wanted and readable else (0, 0)  # 0: any
    truth = coco_json({name: (height, width), "b.png": (20, 30)}, [(1, 3, [2, 3, 20, 9], {})])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "set")
        for part in ("annotations", "images"):
            (root / part).mkdir(parents=True)
        for split in ("train", "val"):
            (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))
        (root / "images" / name).write_bytes(given.content)
        (root / "images" / "b.png").write_bytes(png(sound))
        told = None
        try:
            split = opened(root, Path(folder), ["train"], exif_orientation=exif).splits["train"]
            images, notes = [split.records.image(i) for i in range(split.size)], split.log
        except UserError as error:
            told, images, notes = str(error), [], []
        if dry:
            code, sentence = end_of(
                *("train", "--config=supervised/coco_folder", "--config.data.check=True", f"--workdir={folder}/run"),
                *(f"--config.data.root={root}", f"--config.data.cache={folder}/cache2"),
                f"--config.data.exif_orientation={exif}",
            )
            assert (code == 0) == (told is None) and (told is None or told in sentence), (told, sentence)
    if told is not None:
        assert str(root / "images" / name) in told and "\n" not in told, told
        assert not readable, told
        return
    assert len(images) == 2 and close(images[1], sound, 0)
    if given.wanted and readable:
        assert close(images[0], given.wanted[0], given.off), given.name
        return
    size, broken = seen_by_pillow(given.content)
    context = (given.name, given.content[:60], size, broken, images[0].shape, notes)
    assert size is None or images[0].shape[:2] in (size, size[::-1]), context
    assert not broken or any("its decoder says" in note["reason"] for note in notes), context


@fuzz(20)
def test_some_spoilt_images_and_videos(data, capfd, monkeypatch):
    check_predict(data.draw, capfd, monkeypatch)


@fuzz(10)
def test_some_spoilt_images_in_a_folder(data):
    check_folder(data.draw, dry=False)


@pytest.mark.user_input(
    "Images and videos",
    "300 images and videos spoilt at random (`make test-all`)",
    "read as a slow reader reads them, or reported",
)
@pytest.mark.slow
@fuzz(300)
def test_300_spoilt_images_and_videos(data, capfd, monkeypatch):
    check_predict(data.draw, capfd, monkeypatch)


@pytest.mark.user_input(
    "Images and videos",
    "300 images spoilt at random, in a COCO folder (`make test-all`)",
    "read as a slow reader reads them, or refused in one sentence",
)
@pytest.mark.slow
@fuzz(300)
def test_300_spoilt_images_in_a_folder(data):
    check_folder(data.draw, dry=data.draw(st.integers(0, 9)) == 0)
