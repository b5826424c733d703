"""Prepared TFDS directories with the features of coco/2017 and of voc."""

import contextlib
import io
import json
import shutil
from typing import ClassVar

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from kdjax import data
from kdjax.commands import arguments
from kdjax.data import masks
from kdjax.data.build import Images
from kdjax.errors import UserError
from kdjax.evals.matching import detections_by_image, truth_by_image
from kdjax.evals.voc import voc_metrics
from tests.support.data import (
    COLOURS,
    coco_json,
    opened,
    paint,
    perfect_ap,
    read_off,
    settings,
)


class Coco(tfds.core.GeneratorBasedBuilder):
    """The feature spec of TFDS's coco/2017."""

    NAMES = ("cat", "dog", "owl")
    VERSION = tfds.core.Version("1.1.0")

    def _info(self):
        objects = {
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "id": np.int64,
            "is_crowd": np.bool_,
            "label": tfds.features.ClassLabel(names=list(self.NAMES)),
        }
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 7), "validation": self._generate_examples(100, 4)}

    def _generate_examples(self, first, count):
        for i in range(first, first + count):
            encoded = cv2.imencode(".jpg", np.random.default_rng(i).integers(0, 256, (50, 40, 3)).astype(np.uint8))[1]
            boxes = [
                (0.1 * j, 0.2, 0.1 * j + 0.3, 0.2 + 0.5 * (j != 2)) for j in range(i % 4)
            ]  # the third has no height
            objects = [
                {
                    "area": 77,
                    "bbox": tfds.features.BBox(ymin=y0, xmin=x0, ymax=y1, xmax=x1),
                    "id": 10 * i + j + 1,
                    "is_crowd": j == 1,
                    "label": (i + j) % 3,
                }
                for j, (x0, y0, x1, y1) in enumerate(boxes)
            ]
            record = {"image/filename": f"{i:03}.jpg", "image/id": i, "objects": objects}
            yield record["image/filename"], record | {"image": io.BytesIO(encoded.tobytes())}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        Coco(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_a_directory_is_read(directory, tmp_path):
    dataset = opened(directory, tmp_path, source="tfds")
    assert dataset.classes == Coco.NAMES and dataset.category_ids == (1, 2, 3)
    assert {role: (s.name, s.size) for role, s in dataset.splits.items()} == {"train": ("train", 7), "val": ("val", 4)}
    truth = data.ground_truth(dataset, "train")
    assert sorted(i["id"] for i in truth["images"]) == list(range(7))
    assert {(i["height"], i["width"]) for i in truth["images"]} == {(50, 40)}
    for position, entry in enumerate(truth["images"]):  # in the order of the records
        example = dataset.splits["train"].records[position]
        i = example["image_id"]
        assert i == entry["id"] and entry["file_name"] == f"{i:03}.jpg"
        expected = [[4 * j, 10, 4 * j + 12, 35] for j in range(i % 4) if j not in (1, 2)]
        np.testing.assert_allclose(example["boxes"], np.reshape(expected, (-1, 4)), atol=1e-4)
        own = [a for a in truth["annotations"] if a["image_id"] == i]
        assert [a["iscrowd"] for a in own] == [0, 1][: min(i % 4, 2)]
        assert all(a["category_id"] == (i + a["id"] - 10 * i - 1) % 3 + 1 for a in own)
    assert {(e["action"], e["reason"]) for e in dataset.splits["train"].log} == {("dropped", "box has no extent")}
    assert perfect_ap(truth) == pytest.approx(1)
    assert opened(directory / "coco" / "1.1.0", tmp_path, source="tfds").splits["train"].size == 7


@pytest.mark.user_input(
    "TFDS directories", "`--images` beside a TFDS directory", "refused: a TFDS directory contains its images"
)
def test_evaluate_and_export_read_a_directory(directory, tmp_path, monkeypatch):
    """By the reader of `--data`, with the ground truth that a run has."""
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path))
    found = arguments.open_data(str(directory / "coco" / "1.1.0"), "val", "", "", 0, "stored")
    dataset = opened(directory, tmp_path, source="tfds")
    assert found.truth == data.ground_truth(dataset, "val") and len(found.truth["images"]) == 4
    for image in found.truth["images"]:
        assert found.split.image(image["id"]).shape == (50, 40, 3)
    with pytest.raises(UserError, match="--images: a TFDS directory contains its images"):
        arguments.open_data(str(directory), "val", "", "x", 0, "stored")


@pytest.mark.user_input(
    "TFDS directories", "COCO's original json beside the records", "read: its category ids, areas and masks"
)
@pytest.mark.user_input(
    "TFDS directories", "a json of other classes, images or objects than the records", "refused with what differs"
)
def test_the_original_json_gives_category_ids_and_areas(directory, tmp_path):
    ids = {0: 5, 1: 17, 2: 90}
    truth = coco_json(
        {f"{i:03}.jpg": (50, 40) for i in range(100, 104)}, [], [(k, Coco.NAMES[n]) for n, k in ids.items()]
    )
    for entry in truth["images"]:
        entry["id"] += 90
    boxes = {101: [(0, 0)], 102: [(0, 0), (1, 1)], 103: [(0, 0), (1, 1), (2, 0)]}
    for i, objects in boxes.items():
        for j, crowd in objects:
            bbox = [4.0 * j, 10.0, 12.0, 25.0 * (j != 2)]
            entry = dict(
                id=10 * i + j + 1, image_id=i, category_id=ids[(i + j) % 3], bbox=bbox, area=76.54, iscrowd=crowd
            )
            truth["annotations"].append(entry)
    path = tmp_path / "instances_val2017.json"
    path.write_text(json.dumps(truth))
    dataset = opened(directory, tmp_path, source="tfds", val_annotations=str(path))
    assert dataset.category_ids == (5, 17, 90)
    prepared = data.ground_truth(dataset, "val")
    assert {a["area"] for a in prepared["annotations"]} == {76.54} and len(prepared["annotations"]) == 5
    assert {a["category_id"] for a in data.ground_truth(dataset, "train")["annotations"]} <= {5, 17, 90}

    for spoil, words in [
        (lambda t: t["annotations"][0].update(category_id=5), "the objects of image 101 .* differ"),
        (lambda t: t["categories"][0].update(name="dodo"), "must be the classes of"),
        (lambda t: t["images"].pop(0), "image 100 .* is missing"),
    ]:
        other = json.loads(json.dumps(truth))
        spoil(other)
        path.write_text(json.dumps(other))
        with pytest.raises(UserError, match=words):
            opened(directory, tmp_path, source="tfds", val_annotations=str(path))

    # Its masks go with the objects of the same ids.
    for entry in truth["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h - entry["image_id"] % 100, x, y + h]]
    truth["annotations"][0]["segmentation"] = [[1, 2, 3]]
    truth["annotations"].reverse()
    path.write_text(json.dumps(truth))
    both = dict(train_annotations=str(path), val_annotations=str(path), train_split="validation")
    split = opened(directory, tmp_path, source="tfds", masks=True, **both).splits["train"]
    found = {example["image_id"]: example["masks"].shapes for example in map(Images(split).__getitem__, range(4))}
    want = {i: masks.shape([[0, 10, 12, 10, 12, 35 - i % 100, 0, 35]], (50, 40)) for i in (102, 103)}
    assert found == {100: (), 101: (), **{i: (one,) for i, one in want.items()}}
    assert ("without mask", "polygon has an odd number of coordinates") in {
        (e["action"], e["reason"]) for e in split.log
    }


@pytest.mark.user_input(
    "TFDS directories", "a directory or split that does not exist", "refused with the splits that there are"
)
@pytest.mark.user_input("TFDS directories", "records that lack a feature", "refused: the features image/id are missing")
def test_unsuitable_directories_are_refused(directory, tmp_path):
    with pytest.raises(UserError, match="there is no split 'test': it has train, validation"):
        opened(directory, tmp_path, source="tfds", val_split="test")
    with pytest.raises(UserError, match="holds no prepared TFDS directory"):
        opened(tmp_path, tmp_path, source="tfds")
    with pytest.raises(UserError, match="there is no folder"):
        opened(tmp_path / "nowhere", tmp_path, source="tfds")
    other = tmp_path / "other"
    shutil.copytree(directory / "coco" / "1.1.0", other)
    features = json.loads((other / "features.json").read_text())
    del features["featuresDict"]["features"]["image/id"]
    (other / "features.json").write_text(json.dumps(features))
    with pytest.raises(UserError, match="the features image/id are missing"):
        opened(other, tmp_path, source="tfds")


class BadCoco(tfds.core.GeneratorBasedBuilder):
    """The spec of coco/2017 with boxes that TFDS's own feature refuses."""

    VERSION = tfds.core.Version("1.1.0")
    BOXES: ClassVar = {  # y1 x1 y2 x2 of an image of 50 x 40 px (height x width), and the expected action
        (0.2, 0.1, 0.6, 0.5): None,
        (-0.2, 0.1, 0.6, 1.5): "repaired",
        (0.2, 0.1, 0.6, 1.0 + 1e-4): None,  # rounding
        (0.2, 1.1, 0.6, 1.5): "dropped: box outside the image",
        (0.2, 0.5, 0.6, 0.5): "dropped: box has no extent",
        (0.6, 0.1, 0.2, 0.5): "dropped: box has no extent",
        (0.2, float("nan"), 0.6, 0.5): "dropped: bbox is not four finite numbers",
        (0.2, 0.1, float("inf"), 0.5): "dropped: bbox is not four finite numbers",
        (0.3, 0.1, 0.6, 0.5): "dropped: label is not a class",
    }

    def _info(self):
        objects = {
            "area": np.int64,
            "bbox": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            "id": np.int64,
            "is_crowd": np.bool_,
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
        features = {
            "image": tfds.features.Image(),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        encoded = cv2.imencode(".png", np.zeros((50, 40, 3), np.uint8))[1].tobytes()
        objects = [
            {"area": 9, "bbox": np.array(box, np.float32), "id": i, "is_crowd": False, "label": -1 if i == 9 else i % 2}
            for i, box in enumerate(self.BOXES, start=1)
        ]
        yield "a", {"image": io.BytesIO(encoded), "image/filename": "a.png", "image/id": 4, "objects": objects}


@pytest.mark.user_input(
    "TFDS directories", "unusable boxes and labels in the records", "counted as dropped or repaired, with the reason"
)
def test_unusable_objects_are_dropped_or_repaired_and_listed(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        BadCoco(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    dataset = opened(tmp_path / "tfds", tmp_path, source="tfds", val_split="train")
    split = dataset.splits["train"]
    actions = {e["annotation"]: e["action"] + (": " + e["reason"]) * (e["action"] == "dropped") for e in split.log}
    assert [actions.get(i) for i in range(1, 10)] == list(BadCoco.BOXES.values())
    example = split.records[0]
    expected = [[4, 10, 20, 30], [4, 0, 40, 30], [4, 10, 40, 30]]
    np.testing.assert_allclose(example["boxes"], expected, atol=1e-3)
    truth = data.ground_truth(dataset, "train")
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3]
    np.testing.assert_allclose(truth["annotations"][1]["bbox"], [4, -10, 56, 40], atol=1e-4)
    assert "2 dropped: box has no extent" in data.summary(dataset, settings(tmp_path))
    [names] = (tmp_path / "tfds").rglob("*label*.txt")
    names.write_text("cat\n")
    split = opened(tmp_path / "tfds", tmp_path, source="tfds", val_split="train").splits["train"]
    assert [a["id"] for a in split.truth["annotations"]] == [2]
    np.testing.assert_allclose(split.records[0]["boxes"], expected[1:2], atol=1e-3)


class Voc(tfds.core.GeneratorBasedBuilder):
    """The feature spec of TFDS's voc. Image i has i % 4 painted boxes, the second is difficult."""

    NAMES = ("bird", "cat", "dog")
    SPLITS: ClassVar = {
        "2007": {"train": 3, "validation": 2, "test": 4},
        "2012": {"train": 2, "validation": 3, "test": 1},
    }
    VERSION = tfds.core.Version("5.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=year) for year in SPLITS]

    def _info(self):
        label = tfds.features.ClassLabel(names=list(self.NAMES))
        objects = {
            "label": label,
            "bbox": tfds.features.BBoxFeature(),
            "pose": tfds.features.ClassLabel(names=["frontal", "rear"]),
            "is_truncated": np.bool_,
            "is_difficult": np.bool_,
        }
        features = {
            "image": tfds.features.Image(),
            "image/filename": tfds.features.Text(),
            "objects": tfds.features.Sequence(objects),
            "labels": tfds.features.Sequence(label),
            "labels_no_difficult": tfds.features.Sequence(label),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        counts = self.SPLITS[self.builder_config.name]
        return {name: self._generate_examples(name, count) for name, count in counts.items()}

    @staticmethod
    def boxes(index):
        return [(3 + 15 * j, 2 + index, 15 + 15 * j, 30 + index) for j in range(index % 4)]

    def _generate_examples(self, split, count):
        annotated = (self.builder_config.name, split) != ("2012", "test")
        for i in range(1, count + 1):
            image = paint(50, 60, self.boxes(i))
            objects = [
                {
                    "label": (i + j) % 3,
                    # As in VOC's files: pixels count from 1, and the last is included.
                    "bbox": tfds.features.BBox(ymin=(y0 + 1) / 50, xmin=(x0 + 1) / 60, ymax=y1 / 50, xmax=x1 / 60),
                    "pose": 0,
                    "is_truncated": False,
                    "is_difficult": j == 1,
                }
                for j, (x0, y0, x1, y1) in enumerate(self.boxes(i) if annotated else [])
            ]
            encoded = cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()
            record = {"image": io.BytesIO(encoded), "image/filename": f"{i:06}.jpg", "objects": objects}
            yield i, record | {"labels": [], "labels_no_difficult": []}


TRAINVAL = "2007/train+2007/validation+2012/train+2012/validation"


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        for year in Voc.SPLITS:
            Voc(data_dir=str(folder), config=year, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.user_input(
    "TFDS directories",
    "VOC's pixels counted from 1, its difficult objects",
    "read as x1-1 y1-1 x2 y2; difficult ones as crowd regions",
)
def test_voc_of_two_years_is_read(voc, tmp_path):
    dataset = opened(voc, tmp_path, source="tfds", train_split=TRAINVAL, val_split="2007/test")
    assert dataset.name == "voc" and dataset.classes == Voc.NAMES
    assert {role: (s.name, s.size) for role, s in dataset.splits.items()} == {
        "train": (TRAINVAL, 10),
        "val": ("2007/test", 4),
    }
    for role, numbers in (("train", [1, 2, 3, 1, 2, 1, 2, 1, 2, 3]), ("val", [1, 2, 3, 4])):
        split, truth = dataset.splits[role], data.ground_truth(dataset, role)
        assert [image["id"] for image in truth["images"]] == list(range(1, split.size + 1))
        ids = [a["id"] for a in truth["annotations"]]
        assert ids == list(range(1, len(ids) + 1)) and split.log == []
        for position, i in enumerate(numbers):
            example = split.records[position]
            assert example["image_id"] == position + 1 and truth["images"][position]["file_name"] == f"{i:06}.jpg"
            chosen = [j for j in range(i % 4) if j != 1]
            assert example["labels"].tolist() == [(i + j) % 3 for j in chosen]
            for box, j in zip(example["boxes"], chosen, strict=True):
                np.testing.assert_allclose(box, read_off(example["image"], COLOURS[j]), atol=1e-4)
            own = [a for a in truth["annotations"] if a["image_id"] == position + 1]
            assert [a["iscrowd"] for a in own] == [0, 1, 0][: i % 4]
            for a, (x0, y0, x1, y1) in zip(own, Voc.boxes(i), strict=True):
                np.testing.assert_allclose(a["bbox"], [x0, y0, x1 - x0, y1 - y0], atol=1e-4)
                assert a["area"] == pytest.approx((x1 - x0) * (y1 - y0), rel=1e-5)
    truth = data.ground_truth(dataset, "val")
    found = [a | {"score": 1.0} for a in truth["annotations"]]
    objects, detections = truth_by_image(truth), detections_by_image(truth, found)
    assert voc_metrics(objects, detections, len(dataset.classes)) == {"AP50": 1.0, "AP50_11point": 1.0}
    assert perfect_ap(truth) == pytest.approx(1)
    batches = data.train_batches(dataset, settings(tmp_path), batch_size=4, seed=0)
    assert next(batches)["image"].shape == (4, 48, 64, 3)
    batches.close()


@pytest.mark.user_input(
    "TFDS directories", "a split that several directories have", "refused: put a part of the path before it"
)
@pytest.mark.user_input(
    "TFDS directories", "directories whose classes differ", "refused: must have the same classes in the same order"
)
def test_splits_of_several_directories_must_be_named(voc, tmp_path):
    for changes, words in [
        (
            dict(train_split="train"),
            "'train' is ambiguous; it exists in .*put a part of the path before it, as in '2007/train'",
        ),
        (dict(train_split="1999/train"), "no prepared TFDS directory under .* has '1999' in its path"),
        (dict(train_split="2007/train+2012/trainval"), "2012/5.0.0: there is no split 'trainval': it has .*train"),
    ]:
        with pytest.raises(UserError, match=words):
            opened(voc, tmp_path, source="tfds", **{"val_split": "2007/test"} | changes)
    shutil.copytree(voc, tmp_path / "other")
    (tmp_path / "other" / "voc" / "2012" / "5.0.0" / "objects-label.labels.txt").write_text("cat\nbird\ndog\n")
    with pytest.raises(UserError, match="must have the same classes in the same order"):
        opened(tmp_path / "other", tmp_path, source="tfds", train_split=TRAINVAL, val_split="2007/test")
