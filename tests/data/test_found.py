"""Files of detections: what is read of them, what is refused with its place, and that they reach the batches."""

import itertools
import json

import numpy as np
import pytest

from kdjax import data
from kdjax.data import transforms
from kdjax.data.found import by_file_name
from kdjax.errors import UserError
from tests.support.data import opened, settings, small_folder

MIXED = dict(mosaic=True, mixup=0.6, cache=6, zoom_out=0.4, iou_crop=0.4, distort=0.5, crop=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("found"))


@pytest.fixture(scope="module")
def dataset(root):
    return opened(root, root, max_boxes=32)


def truth_of(root) -> dict:
    return json.loads((root / "annotations" / "instances_train.json").read_text())


def results(root) -> list[dict]:
    """The objects of the training split as results; scores ascend."""
    objects = truth_of(root)["annotations"]
    keys = ("image_id", "category_id", "bbox")
    return [{key: one[key] for key in keys} | {"score": i / len(objects)} for i, one in enumerate(objects)]


def written(tmp_path, content) -> str:
    path = tmp_path / "found.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def batches(dataset, cfg, count=6):
    loader = data.train_batches(dataset, cfg, batch_size=5, seed=3)
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


@pytest.mark.parametrize(("augment", "workers"), [({}, 0), (MIXED, 0), (MIXED, 2)], ids=["single", "mixed", "workers"])
def test_objects_as_detections_lie_on_the_objects_of_every_batch(root, dataset, tmp_path, augment, workers):
    """The images and objects are those of a run without the file."""
    cfg = settings(root / "cache", root=root, augment=augment, workers=workers)
    found = data.with_found(dataset, written(tmp_path, results(root)))
    seen = 0
    for batch, plain in zip(batches(found, cfg), batches(dataset, cfg), strict=True):
        assert set(batch) - set(plain) == {"found_boxes", "found_labels", "found_scores", "found_valid"}
        for name, value in plain.items():
            np.testing.assert_array_equal(batch[name], value)
        assert batch["found_boxes"].shape == (5, 100, 4) and (np.diff(batch["found_scores"], axis=1) <= 0).all()
        for row in range(5):
            valid, there = batch["valid"][row], batch["found_valid"][row]
            assert valid.sum() == there.sum() and not batch["found_boxes"][row][~there].any()
            sides = [
                np.concatenate([batch[f"{of}boxes"][row], batch[f"{of}labels"][row][:, None]], 1)[chosen]
                for of, chosen in (("", valid), ("found_", there))
            ]
            apart = np.abs(sides[0][:, None] - sides[1][None]).max(-1)
            assert not len(apart) or (apart.min(0).max() < 1e-3 and apart.min(1).max() < 1e-3)
            seen += len(apart)
    assert seen > 30


def test_evaluation_does_not_know_of_detections(root, dataset, tmp_path):
    found = data.with_found(dataset, written(tmp_path, results(root)))
    loader = data.eval_batches(found, "train", settings(root / "cache", root=root), batch_size=4)
    assert not any(name.startswith("found") for name in next(loader))
    loader.close()


def test_the_best_hundred_of_an_image_are_kept(root, dataset, tmp_path):
    one = results(root)[0]
    many = [one | {"score": score} for score in np.linspace(0, 1, 150).tolist()]
    cfg = settings(root / "cache", root=root, augment=dict(crop=False))
    seen = batches(data.with_found(dataset, written(tmp_path, many)), cfg, 3)  # all images
    counts = np.concatenate([batch["found_valid"].sum(1) for batch in seen])
    scores = np.concatenate([batch["found_scores"] for batch in seen])
    assert set(counts) == {0, 100}
    np.testing.assert_allclose(scores[counts > 0][0], np.linspace(0, 1, 150)[:49:-1], rtol=1e-6)


def test_what_is_read_and_told(root, dataset, tmp_path):
    """Images 0, 4 and 8 have no object; of image 2 one box lies outside."""
    entries = results(root)
    entries[1] = entries[1] | {"bbox": [500, 500, 3, 3]}
    path = written(tmp_path, entries)
    found = data.with_found(dataset, path).splits["train"].found
    assert found.told("training images") == (
        f"{path}: 14 detections; 3 of 11 training images (27%) have none; 1 boxes without an extent inside their "
        "image are left out"
    )
    assert [len(found[i]) for i in range(11)] == [0, 1, 1, 3, 0, 1, 2, 3, 0, 1, 2]
    np.testing.assert_allclose(found[1], [[2, 6, 12, 26, 0, 0]])
    again = data.with_found(dataset, written(tmp_path, results(root))).splits["train"].found
    assert again.sha256 != found.sha256


def test_annotations_are_matched_by_file_name_and_by_class(root, dataset, tmp_path):
    """Other ids, another folder, another order of categories; a crowd region is no detection."""
    truth = truth_of(root)
    truth["categories"] = [dict(id=1, name="dog"), dict(id=2, name="unused"), dict(id=7, name="cat")]
    for image in truth["images"]:
        image |= {"id": image["id"] + 500, "file_name": f"images/train/{image['file_name']}"}
    truth["images"].reverse()
    for i, one in enumerate(truth["annotations"]):
        one |= {"image_id": one["image_id"] + 500, "category_id": {3: 7, 11: 1}[one["category_id"]]}
        one |= {"score": 0.5} if i % 2 else {}
    truth["annotations"].append(truth["annotations"][0] | {"iscrowd": 1})
    by_name = data.with_found(dataset, written(tmp_path, truth)).splits["train"].found
    by_id = data.with_found(dataset, written(tmp_path, results(root))).splits["train"].found
    np.testing.assert_array_equal(by_name.rows[:, :5], by_id.rows[:, :5])
    assert by_name.rows[:, 5].tolist() == [0.5 if i % 2 else 1.0 for i in range(15)]


def test_detections_of_images_beyond_the_limit_are_passed_over(root, tmp_path):
    few = opened(root, root, limit=4)
    found = data.with_found(few, written(tmp_path, results(root))).splits["train"].found
    assert [len(found[i]) for i in range(4)] == [0, 1, 2, 3] and len(found.rows) == 6


WRONG = {
    "not json": ("{", "not valid json"),
    "a number": (3, "must hold a json object in COCO's layout, not a int"),
    "no object": ([3], "entry 0, from 0: it must be an object with image_id, category_id, bbox and score"),
    "unknown image": ({"image_id": 9}, "entry 2, from 0: image 9 is not among the training images"),
    "image as text": ({"image_id": "11"}, "image '11' is not among the training images: must be the integer 11"),
    "unknown category": (
        {"category_id": 4},
        "entry 2, from 0: category 4 is not among those of the data: they are 3, 11",
    ),
    "three numbers": ({"bbox": [1, 2, 3]}, "entry 2, from 0: bbox is not four finite numbers"),
    "not finite": ({"bbox": [1, 2, 3, float("nan")]}, "entry 2, from 0: bbox is not four finite numbers"),
    "per cent": ({"score": 87}, "entry 2, from 0: score is 87: must be in 0 .. 1"),
    "score as text": ({"score": "0.5"}, "entry 2, from 0: score is '0.5': must be in 0 .. 1"),
    "no score": ({"score": None}, "entry 2, from 0: score is None: must be in 0 .. 1"),
    "nothing": ([], "it has no detection of a training image"),
}


@pytest.mark.user_input(
    "Files of detections",
    "no json, or an entry whose image, category, bbox or score is wrong",
    "refused, with the entry",
)
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_list_is_refused_with_its_place(root, dataset, tmp_path, kind):
    content, message = WRONG[kind]
    if isinstance(content, dict):
        entries = results(root)
        entries[2] |= content
        content = entries
    with pytest.raises(UserError) as caught:
        data.with_found(dataset, written(tmp_path, content))
    assert str(caught.value).startswith(str(tmp_path / "found.json")) and message in str(caught.value)


def test_a_list_without_scores_or_in_shares_is_refused(root, dataset, tmp_path):
    entries = results(root)
    shares = [one | {"bbox": [0.1, 0.1, 0.5, 0.5]} for one in entries]
    with pytest.raises(UserError, match="all box coordinates are <= 1: they look normalised"):
        data.with_found(dataset, written(tmp_path, shares))
    del entries[0]["score"]
    with pytest.raises(UserError, match="entry 0, from 0: it has no score"):
        data.with_found(dataset, written(tmp_path, entries))
    with pytest.raises(UserError, match=r"missing\.json: cannot be read"):
        data.with_found(dataset, tmp_path / "missing.json")


NAMED = {
    "unknown file": (
        lambda truth: truth["images"][1].update(file_name="other.png"),
        r"entry 0 of 'annotations', from 0: no training image, or more than one, has the file name 'other.png'",
    ),
    "unknown class": (
        lambda truth: truth["categories"][1].update(name="cow"),
        r"entry 2 of 'annotations', from 0: category 'cow' is not among the classes of the data: they are cat, dog",
    ),
    "unknown id": (
        lambda truth: truth["annotations"][3].update(image_id=1),
        "entry 3 of 'annotations', from 0: image 1 is not among the images of the file",
    ),
    "unknown category": (
        lambda truth: truth["annotations"][3].update(category_id=1),
        "entry 3 of 'annotations', from 0: category 1 is not among the categories of the file: they are 3, 11",
    ),
    "score": (
        lambda truth: truth["annotations"][3].update(score=1.5),
        "entry 3 of 'annotations', from 0: score is 1.5",
    ),
    "one image twice": (
        lambda truth: truth["images"][2].update(file_name="a/p1.png"),
        "'a/p1.png' and 'p1.png' would be one training image",
    ),
}


@pytest.mark.parametrize("kind", NAMED)
def test_wrong_annotations_are_refused_with_their_place(root, dataset, tmp_path, kind):
    change, message = NAMED[kind]
    truth = truth_of(root)
    change(truth)
    with pytest.raises(UserError, match=message):
        data.with_found(dataset, written(tmp_path, truth))


@pytest.mark.user_input(
    "Files of detections",
    "a list of results for data whose images have no ids (YOLO, VOC, scenes)",
    "refused; the images of annotations are matched by file name",
)
def test_images_without_ids_need_file_names(tmp_path):
    scenes = data.open_dataset(settings(tmp_path / "cache", source="scenes", root=""), ("train",))
    truth = scenes.splits["train"].truth
    entries = [
        {key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1} for one in truth["annotations"]
    ]
    with pytest.raises(UserError, match="the images of a scenes have none that other programs know"):
        data.with_found(scenes, written(tmp_path, entries))
    found = data.with_found(scenes, written(tmp_path, truth)).splits["train"].found
    assert len(found.rows) == len(entries)


def test_file_names_that_could_be_two_images_are_not_found():
    find = by_file_name(["a/1.jpg", "b/1.jpg", "c/2.jpg", "3.jpg"])
    assert [find(name) for name in ("a/1.jpg", "1.jpg", "d/1.jpg", "2.jpg", "x/c/2.jpg", "d/2.jpg", "x/3.jpg")] == [
        0, None, None, 2, 2, None, 3,
    ]  # fmt: skip
    # The same name in two folders, of which one holds images without labels.
    find = by_file_name(["1.jpg", "2.jpg", "1.jpg", "sub/2.jpg"])
    assert [find(name) for name in ("1.jpg", "x/1.jpg", "2.jpg", "sub/2.jpg", "y/sub/2.jpg")] == [
        None,
        None,
        1,
        3,
        None,
    ]


def test_a_box_of_the_image_stays_one(root, dataset, tmp_path):
    """Boxes are clipped to their image, as ground truth is."""
    one = results(root)[0] | {"bbox": [-5, -5, 500, 500]}
    found = data.with_found(dataset, written(tmp_path, [one])).splits["train"].found
    np.testing.assert_array_equal(found[1][0, :4], [0, 0, 59, 41])
    sample = transforms.Sample(np.zeros((41, 59, 3), np.uint8), found[1][:0, :4], np.zeros(0, np.int32), found=found[1])
    assert transforms.flip(sample).found[0, :4].tolist() == [0, 0, 59, 41]
