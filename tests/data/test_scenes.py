"""The generated images."""

import cv2
import numpy as np
import pytest

from kdjax import data
from kdjax.data import scenes
from tests.support.data import opened, perfect_ap


def test_scenes_are_prepared_like_a_folder(tmp_path):
    dataset = opened("", tmp_path, source="scenes", scenes_train=12, scenes_val=5)
    assert dataset.classes == scenes.CLASSES and [s.size for s in dataset.splits.values()] == [12, 5]
    truth = data.ground_truth(dataset, "train")
    count = 0
    for index in range(12):
        image, objects = scenes.render("train", index)
        example = dataset.splits["train"].records[index]
        np.testing.assert_array_equal(example["image"], image)
        assert example["labels"].tolist() == [label for label, _, _ in objects]
        boxes = np.reshape([[x, y, x + w, y + h] for _, (x, y, w, h), _ in objects], (-1, 4))
        np.testing.assert_allclose(example["boxes"], boxes, atol=1e-4)
        assert (boxes >= 0).all() and (boxes <= scenes.SIDE).all()
        count += len(objects)
    assert len(truth["annotations"]) == count > 12 and perfect_ap(truth) == pytest.approx(1)


def test_a_scene_depends_on_split_and_index_only():
    image, objects = scenes.render("val", 3)
    scenes.render("val", 4)
    again, same = scenes.render("val", 3)
    np.testing.assert_array_equal(image, again)
    assert objects == same
    assert not np.array_equal(image, scenes.render("train", 3)[0])


def test_scenes_have_all_classes_and_sizes():
    drawn = [scenes.render("val", index)[1] for index in range(120)]
    labels = [label for objects in drawn for label, _, _ in objects]
    areas = np.array([area for objects in drawn for _, _, area in objects])
    assert set(labels) == set(range(len(scenes.CLASSES)))
    assert min(map(len, drawn)) == 0 and max(map(len, drawn)) >= 4
    assert (areas < 32**2).mean() > 0.2 and (areas > 32**2).mean() > 0.15


def test_the_fingerprint_knows_pixels_not_the_encoder(tmp_path, monkeypatch):
    """A run goes on where another version of the encoder writes other bytes."""
    before, encode = opened("", tmp_path / "a", source="scenes"), cv2.imencode
    monkeypatch.setattr(cv2, "imencode", lambda suffix, image: encode(suffix, image, [cv2.IMWRITE_PNG_COMPRESSION, 9]))
    after = opened("", tmp_path / "b", source="scenes")
    first, second = (each.splits["train"].records.raw(0)["image"] for each in (before, after))
    assert first != second and before.fingerprint == after.fingerprint
    monkeypatch.setattr(cv2, "imencode", lambda suffix, image: encode(suffix, image + 1))
    assert opened("", tmp_path / "c", source="scenes").fingerprint != before.fingerprint
