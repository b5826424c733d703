"""Boxes on images."""

import dataclasses

import numpy as np
import pytest

from kdjax.inference import masks
from kdjax.report import drawing, pages
from kdjax.structs import Detections
from tests.support.report import examples


def encode(mask):
    [rle] = masks.encoded([mask])
    return rle


GREY = np.full((40, 80, 3), 128, np.uint8)
BOX = np.array([[8.0, 8, 30, 30]])


def test_small_images_grow_and_large_ones_shrink():
    for shape, drawn in {
        (40, 80): (160, 320),
        (300, 400): (300, 400),
        (720, 960): (360, 480),
        (4000, 100): (960, 24),
        (1, 1): (320, 320),
    }.items():
        assert drawing.draw(np.zeros((*shape, 3), np.uint8), [], [], [], []).shape[:2] == drawn
    assert drawing.draw(GREY, BOX, [0], [0.9], ["a"], width=None).shape == GREY.shape


def test_draw_leaves_its_input_alone_and_is_deterministic():
    image = GREY.copy()
    first = drawing.draw(image, BOX, [0], [0.9], ["a"])
    assert (image == GREY).all() and (first == drawing.draw(image, BOX, [0], [0.9], ["a"])).all()
    assert first.dtype == np.uint8 and (first[32, 32:36] == drawing.class_color(0)).all(axis=-1).any()


def test_what_is_under_the_threshold_or_not_finite_is_not_drawn():
    plain = drawing.draw(GREY, [], [], [], ["a"])
    assert (drawing.draw(GREY, BOX, [0], [0.29], ["a"]) == plain).all()
    assert (drawing.draw(GREY, BOX, [0], [np.nan], ["a"]) == plain).all()
    assert (drawing.draw(GREY, BOX * np.nan, [0], [0.9], ["a"]) == plain).all()
    assert (drawing.draw(GREY, BOX, [0], None, ["a"]) != plain).any()


@pytest.mark.parametrize("box", [[-50, -50, 500, 500], [100, 100, 120, 130], [20, 20, 20, 20], [30, 30, 10, 10]])
@pytest.mark.parametrize("outcome", [drawing.CORRECT, drawing.FALSE, drawing.MISSED, None])
def test_odd_boxes_can_be_drawn(box, outcome):
    outcomes = None if outcome is None else [outcome]
    assert drawing.draw(GREY, [box], [7], [1.0], ["a"], outcome=outcomes).shape == (160, 320, 3)


@pytest.mark.user_input(
    "COCO json", "class names that the font of drawings lacks, of 50 letters", "read: drawn as numbers, or shortened"
)
def test_names_that_the_font_lacks_are_shown_as_numbers():
    names = ["café", "Клетка", "細胞", "a\nb", "", "x" * 50]
    shown = [drawing.class_name(i, names) for i in range(-1, 7)]
    assert shown == ["class -1", "café", "Клетка", "class 2", "class 3", "class 4", "x" * 21 + "…", "class 6"]
    drawing.draw(GREY, np.repeat(BOX, 6, 0), range(6), np.ones(6), names)
    assert "細胞 (class 2)" in pages.image_rows([drawing.Example(GREY, BOX, np.array([2]), {})], ["a", "b", "細胞"])


def test_neighbouring_classes_have_colours_far_apart():
    colors = np.array([drawing.class_color(k) for k in range(80)], float)
    assert len(np.unique(colors, axis=0)) == 80
    assert (np.abs(np.diff(colors, axis=0)).sum(axis=1) > 100).all()


def test_wrong_images_are_refused_in_one_sentence():
    for image in (GREY[..., 0], GREY.astype(np.float32), GREY[:0]):
        with pytest.raises(ValueError, match=r"must be uint8\[h, w, 3\] in RGB, not "):
            drawing.draw(image, [], [], [], [])
    with pytest.raises(ValueError, match="1 boxes, 2 labels"):
        drawing.draw(GREY, BOX, [0, 1], [1.0], ["a"])


def test_panels_count_what_they_show():
    empty = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    example = examples(1)[0]
    example = example._replace(detections={"twin": empty, "student": example.detections["student"]})
    truth, twin, student = drawing.panels(example, ["a", "b"])
    assert [panel.name for panel in (truth, twin, student)] == ["ground truth", "twin", "student"]
    assert (twin.correct, twin.false, twin.missed) == (0, 0, 3)
    assert (student.correct, student.false, student.missed) == (2, 0, 1)  # the third has the score 0.1
    assert drawing.summary(truth) == "3 objects" and truth.image.shape == twin.image.shape
    nothing = drawing.panels(drawing.Example(GREY, BOX[:0], empty.labels, {"student": empty}), ["a"])
    assert [drawing.summary(panel) for panel in nothing] == ["no object", "0 correct, 0 false, 0 missed"]


def test_contact_sheet():
    images = [GREY, np.zeros((30, 30, 3), np.uint8), np.zeros((64, 32, 3), np.uint8)]
    boxes, labels = [BOX, np.zeros((0, 4)), BOX / 4], [[0], [], [1]]
    sheet = drawing.contact_sheet(images, boxes, labels, ["a", "b"], 2, width=100)
    assert sheet.shape == (2 * 200 + 8, 2 * 100 + 8, 3) and sheet.dtype == np.uint8
    assert (sheet[:10] == 255).all() and (sheet[60:, 50] != 255).any()
    assert drawing.contact_sheet(images[:1], boxes[:1], labels[:1], ["a"], 4, width=100).shape == (50, 100, 3)
    for bad in (([], [], [], [], 2), (images, boxes, labels, ["a"], 0), (images, boxes[:1], labels, ["a"], 2)):
        with pytest.raises(ValueError, match="contact_sheet"):
            drawing.contact_sheet(*bad)


def test_masks_are_laid_over_the_image():
    """Of any resolution, as COCO's RLE or as bytes, under the colour of the class; without a mask nothing changes."""
    plain = drawing.draw(GREY, BOX, [0], [0.9], ["a"], width=None)
    half = np.zeros((10, 20), np.uint8)
    half[:, 10:] = 255
    fine = np.kron(half, np.ones((8, 8), np.uint8))
    bytes_, text = (drawing.draw(GREY, BOX, [0], [0.9], ["a"], masks=[m], width=None) for m in (half, encode(fine > 0)))
    for drawn in (bytes_, text):
        assert (drawn[:, :30] == plain[:, :30]).all()
        np.testing.assert_allclose(drawn[35, 60], 0.6 * 128 + 0.4 * np.array(drawing.class_color(0)), atol=1.5)
    assert (drawing.draw(GREY, BOX, [0], [0.9], ["a"], masks=[None], width=None) == plain).all()
    assert (drawing.draw(GREY, BOX, [0], [0.2], ["a"], masks=[half], width=None) == GREY).all()
    one = Detections(BOX, np.array([0.9]), np.array([0]), masks=(encode(fine > 0),))
    example = drawing.Example(GREY, BOX, np.array([0]), {"a": one, "b": dataclasses.replace(one, masks=None)})
    _, with_mask, without = drawing.panels(example, ["a"], width=(80, 80))
    assert (with_mask.image != without.image).any()
    far = Detections(BOX + np.array([45.0, 0, 45, 0]), np.array([0.9]), np.array([0]))
    drawn = [
        drawing.panels(drawing.Example(GREY, BOX, np.array([0]), {"a": far}, masks=m), ["a"], width=(80, 80))
        for m in ([half], [None])
    ]
    for own, other in zip(*drawn, strict=True):  # the object's mask is drawn, also where it is missed
        assert (own.image != other.image).any(), own.name
    sheets = [drawing.contact_sheet([GREY], [BOX], [[0]], ["a"], 1, masks=m, width=80) for m in ((), [[half]])]
    assert (sheets[0][35, 60] == 128).all() and (sheets[1][35, 60] == bytes_[35, 60]).all()
