"""The reader of image files: EXIF's orientation, notes, damage."""

import io
import os
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from kdjax.data import images
from kdjax.errors import UserError

QUARTERS = np.zeros((40, 60, 3), np.uint8)
QUARTERS[:20, :30], QUARTERS[:20, 30:], QUARTERS[20:, :30] = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def saved(pixels: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def with_orientation(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return saved(QUARTERS, kind, exif=exif)


@pytest.mark.user_input(
    "Images and videos",
    "EXIF orientations 1 to 8 in JPEG, PNG, WebP and AVIF",
    "read as stored, or turned as Pillow turns them; both are noted",
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_the_orientation_is_applied_or_told_as_pillow_understands_it(kind):
    for orientation in range(1, 9):
        encoded = with_orientation(kind, orientation)
        stored, facts = images.read(encoded, "a")
        assert np.abs(stored.astype(int) - QUARTERS).mean() < 8
        assert facts.size == (40, 60) and facts.orientation == orientation
        assert facts.notes == ((images.NOT_TURNED,) if orientation > 1 else ())
        with Image.open(io.BytesIO(encoded)) as opened:
            expected = np.array(ImageOps.exif_transpose(opened).convert("RGB")).astype(int)
        turned, facts = images.read(encoded, "a", upright=True)
        assert turned.shape == expected.shape and np.abs(turned - expected).mean() < 8
        assert facts.size == expected.shape[:2] and facts.notes == ((images.TURNED,) if orientation > 1 else ())
        np.testing.assert_array_equal(images.decode(encoded, upright=True), turned)


@pytest.mark.user_input("Images and videos", "the orientation of a TIFF", "read: always applied")
def test_a_tiff_is_always_turned_and_never_told():
    for orientation in (3, 6):
        encoded = with_orientation("TIFF", orientation)
        for upright in (False, True):
            pixels, facts = images.read(encoded, "a.tif", upright=upright)
            np.testing.assert_array_equal(pixels, images.turned(QUARTERS, orientation))
            assert facts.orientation == 1 and facts.notes == ()


@pytest.mark.user_input("Images and videos", "16 bits that are hardly used; over 89 million pixels", "counted as noted")
def test_dark_and_large_images_are_noted(monkeypatch):
    dark = cv2.imencode(".png", np.full((9, 9), 4000, np.uint16))[1].tobytes()
    assert images.read(dark, "a")[1].notes == (images.DARK,)
    signed = cv2.imencode(".tif", np.full((9, 9), 200, np.int16))[1].tobytes()
    assert images.read(signed, "a")[1].notes == (images.DARK,)
    assert images.read(saved(np.full((9, 9), 4, np.uint8), "PNG"), "a")[1].notes == ()
    monkeypatch.setattr(images, "_LARGE", 40 * 60 - 1)
    assert images.read(saved(QUARTERS, "PNG"), "a")[1].notes == (images.LARGE,)


@pytest.mark.user_input("Images and videos", "an image over Pillow's limit of pixels", "read, with its orientation")
def test_an_image_over_pillows_limit_keeps_its_orientation(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert images.read(with_orientation("JPEG", 6), "a", upright=True)[1].size == (60, 40)
    assert Image.MAX_IMAGE_PIXELS == 40


@pytest.mark.user_input(
    "Images and videos", "an image cut short, in each of nine formats", "refused with its name and the reason"
)
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("JPEG", "image file is truncated (N bytes not processed)"),
        ("PNG", "image file is truncated"),
        ("WEBP", "could not create decoder object"),
        ("TIFF", "image file is truncated (N bytes not processed)"),
        ("GIF", "image file is truncated (N bytes not processed)"),
        ("BMP", "image file is truncated (N bytes not processed)"),
        ("PPM", "image file is truncated (N bytes not processed)"),
        ("JPEG2000", "broken data stream when reading image file"),
        ("AVIF", "it is of no kind that OpenCV reads, or damaged at its beginning"),
    ],
)
def test_a_truncated_image_is_refused_and_nothing_else_is_printed(kind, why, capfd):
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    encoded = saved(noise, kind)
    with pytest.raises(UserError) as refused:
        images.read(encoded[: len(encoded) * 2 // 3], "x/a")
    told = re.sub(r"\d+ bytes", "N bytes", str(refused.value))
    assert told == f"x/a: cannot be read as an image: {why}"
    assert capfd.readouterr() == ("", "")


@pytest.mark.user_input(
    "Images and videos", "a TIFF of float32 or int32", "refused: its pixels are float32: must be of 8 or 16 bits"
)
@pytest.mark.user_input("Images and videos", "a TIFF of int16 that is nearly black as 8 bits", "counted as noted")
def test_tiffs_of_other_types():
    for kind in (np.float32, np.float64, np.int32):
        encoded = cv2.imencode(".tiff", np.ones((9, 9), kind))[1].tobytes()
        with pytest.raises(UserError) as refused:
            images.read(encoded, "a.tif")
        told = f"its pixels are {np.dtype(kind)}: must be integers of 8 or 16 bits"
        assert str(refused.value) == f"a.tif: cannot be read as an image: {told}"
    dark = cv2.imencode(".tiff", np.full((9, 9), 2000, np.int16))[1].tobytes()
    assert images.read(dark, "a.tif")[1].notes == (images.DARK,)


@pytest.mark.user_input(
    "Images and videos",
    "an empty file, or one that is no image",
    "refused: it is empty; it is of no kind that OpenCV reads",
)
@pytest.mark.user_input(
    "Images and videos", "an image of 60,000 x 60,000 px", "refused: OpenCV reads at most 2^30, and 2^20 a side"
)
def test_no_image_and_an_impossible_size_are_refused():
    for content, why in (
        (b"", "it is empty"),
        (b"no image", "it is of no kind that OpenCV reads, or damaged at its beginning"),
        (
            b"P6 60000 60000 255 ",
            "it has 60,000 x 60,000 px: OpenCV reads at most 2^30, and 2^20 a side",
        ),
        (  # OpenCV would fill in the rest, 2.4 GB
            saved(QUARTERS, "JPEG").replace(struct.pack(">HH", 40, 60), struct.pack(">HH", 20_000, 40_000)),
            "its header says 40,000 x 20,000 px, which its N bytes cannot hold",
        ),
        (  # of which OpenCV makes an image without colours
            saved(QUARTERS[:, :, 0].astype(np.float32), "PPM"),
            "its pixels are float32: must be integers of 8 or 16 bits",
        ),
    ):
        with pytest.raises(UserError) as refused:
            images.read(content, "a")
        told = re.sub(r"\d+ bytes", "N bytes", str(refused.value))
        assert told == f"a: cannot be read as an image: {why}"


def test_damage_that_a_decoder_only_prints_is_noted_with_its_image(capfd):
    """Zeros in the middle of a JPEG: libjpeg guesses the rest and prints a line without a name."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    good = saved(noise, "JPEG")
    half = len(good) // 2
    bad = good[:half] + bytes(40) + good[half + 40 :]
    note = "its decoder says: Corrupt JPEG data: N extraneous bytes before marker N"
    assert images.read(bad, "a")[1].notes == (note,)
    with ThreadPoolExecutor(2) as pool:
        found = images.facts([(good, "a"), (bad, "b"), (good, "c"), (bad, "d")], pool)
    assert [facts.notes for facts in found] == [(), (note,), (), (note,)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.user_input("Images and videos", "a damaged WebP that OpenCV takes", "refused with its name")
def test_a_damaged_webp_that_opencv_takes_is_refused():
    """Its chunk is said to be shorter; OpenCV stops there without a word."""
    encoded = with_orientation("WEBP", 6)
    at = encoded.index(b"VP8 ") + 4
    size = struct.unpack("<I", encoded[at : at + 4])[0]
    damaged = encoded[:at] + struct.pack("<I", size - 9) + encoded[at + 4 :]
    assert images.decode(damaged) is not None
    with pytest.raises(UserError) as refused:
        images.read(damaged, "a")
    assert str(refused.value) == "a: cannot be read as an image: could not create decoder object"


def test_a_note_with_the_time_in_it_is_printed_once_and_only_as_a_note(capfd):
    """OpenCV's own lines begin with the seconds since its start."""
    seconds = iter(range(9))
    note = "its decoder says: [ WARN:N@N.N] cut"
    assert images.heard(lambda _: os.write(2, f"[ WARN:0@1.{next(seconds)}] cut\n".encode()), [5])[0][1] == (note,)
    assert capfd.readouterr().err == ""


@pytest.mark.user_input("Images and videos", "damaged EXIF data", "counted as noted")
def test_damaged_exif_is_noted_with_every_image(capfd):
    """Python shows the same warning of Pillow once, with a line of its code."""
    encoded = saved(QUARTERS, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0")
    with ThreadPoolExecutor(2) as pool:
        found = images.facts([(encoded, "a"), (encoded, "b")], pool)
    note = "its decoder says: Corrupt EXIF data. Expecting to read N bytes but only got N."
    assert [facts.notes for facts in found] == [(note,), (note,)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.user_input("Images and videos", "a pipe or a folder in the place of an image", "refused; nothing waits")
def test_a_pipe_is_no_file_and_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("nowhere")
    for name, why in (
        ("a.png", "it is a folder, a pipe or a device, where a file must be"),
        ("b.png", "No such file or directory"),
    ):
        with pytest.raises(UserError) as refused:
            images.check_file(tmp_path / name)
        assert why in str(refused.value) and str(refused.value).startswith(f"{tmp_path / name}: cannot be read")
        assert not images.is_image(tmp_path / name)


def test_what_others_print_meanwhile_is_printed_afterwards(capfd):
    said = iter(["once"])

    def work(item):
        os.write(2, b"always\n")
        for line in said:
            os.write(2, f"{line}\n".encode())
        return item

    assert images.heard(work, [5]) == [(5, ("its decoder says: always",))]
    sys.stderr.flush()
    assert capfd.readouterr().err == "once\n"


@pytest.mark.user_input("Images and videos", "an image with another suffix or none", "read: known by its content")
def test_images_are_known_by_their_content(tmp_path):
    for name, content, expected in (
        ("a", saved(QUARTERS, "PNG"), True),
        ("b.001", saved(QUARTERS, "GIF"), True),
        ("c.txt", b"text", False),
        ("d", b"", False),
    ):
        (tmp_path / name).write_bytes(content)
        assert images.is_image(tmp_path / name) == expected, name


@pytest.mark.user_input(
    "Config and flags", "another word for `exif_orientation`", "refused: must be one of stored, upright"
)
def test_the_setting_is_checked():
    assert images.check_exif("upright") and not images.check_exif("stored")
    with pytest.raises(UserError, match=r"^exif_orientation must be one of stored, upright, not True$"):
        images.check_exif(True)
