"""The prediction loop: any number of devices gives the same detections, and equal detectors share a program."""

import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as peer

from kdjax.detectors import build
from kdjax.errors import UserError
from kdjax.evals import coco
from kdjax.inference import load, predict
from kdjax.inference.masks import from_canvas
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
            np.testing.assert_allclose(got.scores, wanted.scores, atol=2e-5)


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
    wrongs = (images[0].astype(float), "not float64"), (images[0][..., 0], "u8"), (images[0][:0], "u8"), (7, "not int")
    for wrong, message in wrongs:
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


def test_masks_are_those_of_the_original_image():
    """A detector of masks from images to COCO results: of each image's size, and of its detections."""
    detector = build("rtmdet_ins_pico", 2, widen=0.0625, stacked_convs=1)
    params, stats = detector.init(jax.random.PRNGKey(0))
    noise = np.random.default_rng(1)  # initial weights detect nothing
    params = jax.tree.map(lambda x: x + 0.3 * noise.normal(size=x.shape).astype(np.float32), params)
    variables = (params, stats)
    rng = np.random.default_rng(0)
    originals = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((40, 70), (90, 31), (64, 64))]
    batches = predict.canvases(originals, (64, 64), batch_size=2)
    pairs = predict.predict(detector, variables, batches, category_ids=(3, 9))
    found = [one for _, several in pairs for one in several]
    assert len(found) == 4 and found[3].masks == ()
    run = predict.program(detector)
    for image, one in zip(originals, found, strict=False):
        assert one.masks is not None and len(one.masks) == len(one) > 0
        assert all(tuple(rle["size"]) == image.shape[:2] for rle in one.masks)
        placed, size = predict.on_canvas(image, (64, 64))
        padded = run(variables, placed[None], size[None])
        coarse = np.asarray(padded.masks)[0][np.asarray(padded.valid)[0]]
        want = from_canvas(coarse, (64, 64), tuple(size), image.shape[:2])
        areas = np.array([mask.sum() for mask in want])
        assert np.abs(peer.area(list(one.masks)) - areas).max() <= 2 and areas.max() > 100
        row = coco.to_coco(one, 5)[0]
        assert row["segmentation"] == {"size": list(image.shape[:2]), "counts": one.masks[0]["counts"].decode()}


def test_masks_of_boxes_lie_in_their_boxes():
    sizes = {"image_size": np.array([[16, 12]]), "original_size": np.array([[32, 24]])}
    batch = {"image": np.zeros((1, 16, 16, 3)), **sizes}
    padded = PaddedDetections(
        np.array([[[1.0, 2, 5, 6], [0, 0, 0, 0]]]),
        *(np.array([values]) for values in ([0.9, 0], [1, 0], [True, False])),
        masks=np.ones((1, 2, 28, 28), np.float32),
    )
    [found] = predict.in_originals(batch, padded, masks="box")
    assert peer.toBbox(found.masks[0]).tolist() == [2, 4, 8, 8] and peer.area(found.masks[0]) == 64
