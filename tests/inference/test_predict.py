"""The prediction loop: any number of devices gives the same detections, and equal detectors share a program."""

import jax
import numpy as np
import pytest
from PIL import Image

from kdjax.detectors import build
from kdjax.errors import UserError
from kdjax.inference import load, predict
from kdjax.structs import PaddedDetections


@pytest.fixture(scope="module")
def model(made):
    return load(made / "model")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (48 + 16 * i, 96, 3), np.uint8) for i in range(6)]


def test_devices_do_not_change_the_detections(model, images):
    """6 images on 1 device, on 4 (padded to 8) and in two batches of 4 (of which the last is filled up)."""
    expected = model.detect(images)
    assert len(expected) == 6 and min(map(len, expected)) > 5
    assert expected[0].class_names == model.class_names and expected[0].category_ids == model.category_ids
    for found, image in zip(expected, images, strict=True):
        height, width = image.shape[:2]
        assert found.boxes.dtype == np.float64 and found.labels.dtype == np.int32
        assert (found.boxes >= 0).all() and (found.boxes <= [width, height, width, height]).all()
        assert (np.diff(found.scores) <= 0).all()
    for size, devices in ((6, 4), (4, 1)):
        batches = predict.canvases(images, model.image_size, batch_size=size)
        rows = [one for _, found in model.predict(batches, devices=jax.devices()[:devices]) for one in found]
        assert [len(one) for one in rows[6:]] == [0] * (len(rows) - 6)
        for got, wanted in zip(rows[:6], expected, strict=True):
            np.testing.assert_array_equal(got.labels, wanted.labels)
            np.testing.assert_allclose(got.boxes, wanted.boxes, atol=1e-3)
            np.testing.assert_allclose(got.scores, wanted.scores, atol=1e-5)


def test_equal_detectors_share_a_program(model, images):
    model.detect(images)
    again = build(model.detector.name, model.detector.num_classes, **model.detector.options)
    before = predict.traces(again)
    batches = predict.canvases(images, model.image_size, batch_size=6)
    assert len(list(predict.predict(again, model.variables, batches, devices=jax.local_devices()[:6]))) == 1
    assert predict.traces(again) == before > 0


def test_another_preprocessing_compiles_once(model, images):
    device = jax.devices()[:1]
    batch = next(predict.canvases(images, model.image_size, batch_size=2))
    own = predict.program(model.detector, devices=device)(model.variables, batch["image"], batch["image_size"])
    before = predict.traces(model.detector)
    for preprocess, equal in ((model.detector.preprocess, True), (lambda x: model.detector.preprocess(255 - x), False)):
        run = predict.program(model.detector, devices=device, preprocess=preprocess)
        found = run(model.variables, batch["image"], batch["image_size"])
        assert np.allclose(found.scores, own.scores, atol=1e-5) == equal
    assert predict.traces(model.detector) == before + 1


@pytest.mark.user_input("Images and videos", "an array that is not u8[h, w, 3], from Python", "refused with its type")
def test_a_list_an_array_and_a_file_give_the_same(model, images, tmp_path):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    one, [listed], file = model.detect(images[0]), model.detect(images[:1]), model.detect(tmp_path / "a.png")
    for other in (listed, file):
        np.testing.assert_array_equal(one.boxes, other.boxes)
    strong = one[one.scores > one.scores[3]]
    assert len(strong) == 3 and (strong.boxes == one.boxes[:3]).all()
    for wrong, message in ((images[0].astype(float), "not float64"), (images[0][..., 0], "u8"), (7, "not int")):
        with pytest.raises(UserError, match=message):
            model.detect([wrong])


def test_boxes_are_those_of_the_original_image():
    batch = {
        "image_size": np.array([[10, 15], [10, 10]]),
        "original_size": np.array([[20, 30], [0, 0]]),
        "real": np.array([True, False]),
    }
    boxes = np.array([[[1.0, 2, 5, 6], [0, 0, 15, 11], [0, 0, 0, 0]]] * 2)
    padded = PaddedDetections(
        boxes, np.array([[0.9, 0.5, 0]] * 2), np.array([[1, 0, 0]] * 2), np.array([[True, True, False]] * 2)
    )
    first, second = predict.in_originals(batch, padded, ("a", "b"), (3, 9))
    assert first.boxes.tolist() == [[2, 4, 10, 12], [0, 0, 30, 20]]
    assert (first.labels.tolist(), first.category_ids, len(second)) == ([1, 0], (3, 9), 0)
