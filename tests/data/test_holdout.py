"""`config.data.holdout`: a part of the training images on which runs validate."""

import json
import pickle
import shutil

import numpy as np
import pytest

from kdjax import data
from kdjax.errors import UserError
from tests.support.data import opened, settings, small_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = small_folder(tmp_path_factory.mktemp("holdout") / "set", masks=True)
    shutil.copy(root / "images" / "train" / "p5.png", root / "images" / "train" / "copy.png")
    path = root / "annotations" / "instances_train.json"
    truth = json.loads(path.read_text())
    truth["images"].append(truth["images"][5] | {"id": 99, "file_name": "copy.png"})
    path.write_text(json.dumps(truth))
    return root


def names(dataset, role):
    return [image["file_name"] for image in data.ground_truth(dataset, role)["images"]]


def test_a_part_of_the_training_images_is_held_out(root, tmp_path):
    whole = opened(root, tmp_path)
    parts = opened(root, tmp_path, holdout=0.4, masks=True)
    train, val = names(parts, "train"), names(parts, "val")
    assert sorted(train + val) == sorted(names(whole, "train")) and 0 < len(val) < len(train)
    assert ("copy.png" in val) == ("p5.png" in val), "equal images are on one side"
    assert not parts.splits["train"].contents & parts.splits["val"].contents
    smaller = opened(root, tmp_path, holdout=0.2)
    assert {*names(smaller, "val")} < {*val}, "a smaller share holds out a part of them"
    assert names(opened(root, tmp_path, ["val"], holdout=0.4), "val") == val
    prints = {one.fingerprint for one in (whole, parts, smaller)}
    prints |= {one.splits["train"].fingerprint for one in (whole, parts, smaller)}
    assert len(prints) == 6


def test_images_boxes_masks_and_detections_are_those_of_the_names(root, tmp_path):
    """Read by position, by id, in batches and after pickling, as workers get them."""
    file = tmp_path / "found.json"
    truth = data.ground_truth(opened(root, tmp_path), "train")
    entries = [{key: one[key] for key in ("image_id", "category_id", "bbox")} for one in truth["annotations"]]
    file.write_text(json.dumps([one | {"score": 0.5} for one in entries]))
    whole = data.with_found(opened(root, tmp_path, masks=True), file).splits["train"]
    parts = data.with_found(opened(root, tmp_path, holdout=0.4, masks=True), file)
    for split in (*parts.splits.values(), pickle.loads(pickle.dumps(parts.splits["val"]))):
        assert len(split.records) == split.size == len(split.image_ids) == len(split.sizes)
        for position, key in enumerate(split.image_ids):
            one, other = split.records[position], whole.records[whole.image_ids.index(key)]
            assert one["image_id"] == key == other["image_id"]
            np.testing.assert_array_equal(one["image"], other["image"])
            np.testing.assert_array_equal(split.image(key), one["image"])
            np.testing.assert_array_equal(one["boxes"], other["boxes"])
            if split.found is not None:
                np.testing.assert_array_equal(split.found[position], whole.found[whole.image_ids.index(key)])
    assert parts.splits["train"].masks and parts.splits["train"].found and parts.splits["val"].found is None
    batch = next(iter(data.eval_batches(parts, "val", settings(tmp_path), batch_size=parts.splits["val"].size)))
    assert batch["image_id"].tolist() == parts.splits["val"].image_ids


def test_what_is_held_out_is_counted_and_limit_comes_first(root, tmp_path):
    dataset = opened(root, tmp_path, holdout=0.4, limit=9)
    sizes = {role: split.size for role, split in dataset.splits.items()}
    assert sum(sizes.values()) == 9
    assert {*names(dataset, "val")} <= {f"p{i}.png" for i in range(9)}
    told = data.counted(dataset, "train", settings(tmp_path))
    assert told[0].startswith(f"train ('train, without the 0.4 held out'): {sizes['train']} images")
    assert "train: 3 left out: image after the first 9, as limit says" in told
    assert f"train: {sizes['val']} left out: image that is held out to validate on, as holdout says" in told
    assert {one["file"] for split in dataset.splits.values() for one in split.log} == set()


def test_the_validation_split_is_not_needed(root, tmp_path):
    alone = shutil.copytree(root, tmp_path / "alone")
    (alone / "annotations" / "instances_val.json").unlink()
    assert opened(alone, tmp_path, holdout=0.4).splits["val"].size > 0
    scenes = opened("", tmp_path, source="scenes", scenes_train=12, holdout=0.3)
    assert sum(split.size for split in scenes.splits.values()) == 12


@pytest.mark.user_input(
    "Config and flags", "a `holdout` that leaves a part without images", "refused: it must be larger, or 0"
)
def test_a_part_without_images_is_refused(root, tmp_path):
    with pytest.raises(UserError, match=r"^holdout=1e-06 of the 12 images of the split 'train' holds none out"):
        opened(root, tmp_path, holdout=1e-6)
    with pytest.raises(UserError, match=r"leaves none to train on: must be smaller, or 0$"):
        opened(root, tmp_path, holdout=1.0)
