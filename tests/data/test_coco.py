"""Folders in COCO layout: layouts, broken entries, messages."""

import json
import os
import shutil
import struct
import zlib

import cv2
import numpy as np
import pytest

from kdjax import data
from kdjax.data import coco
from kdjax.errors import UserError
from tests.shared import SHARED
from tests.support.data import (
    coco_json,
    one_split,
    opened,
    paint,
    perfect_ap,
    settings,
    small_folder,
    write_folder,
)

CROWD = {"size": [40, 50], "counts": [20, 980, 1000]}
TEXT = {"size": [40, 50], "counts": "d0dn0Xo0"}


def by_image(truth: dict) -> list[dict]:
    """The annotations in the order of their images."""
    place = {image["id"]: position for position, image in enumerate(truth["images"])}
    return sorted(truth["annotations"], key=lambda a: place[a["image_id"]])


@pytest.mark.user_input(
    "COCO json", "annotations without `iscrowd` and `area`", "read as objects with the area of their box"
)
@pytest.mark.user_input("COCO json", "malformed entries under `licenses`", "read without them")
def test_a_folder_is_read_unchanged(tmp_path):
    root = small_folder(tmp_path / "set")
    path = root / "annotations" / "instances_train.json"
    listed = [{"id": 1, "name": "CC BY 4.0", "url": "https://example.org"}, {"id": 2, "name": "", "url": ""}, "?"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"licenses": listed}))
    dataset = opened(root, tmp_path)
    assert dataset.licenses == ("CC BY 4.0, https://example.org",)
    assert dataset.name == "set" and dataset.classes == ("cat", "dog") and dataset.category_ids == (3, 11)
    assert dataset.max_boxes == 8 and {role: s.size for role, s in dataset.splits.items()} == {"train": 11, "val": 3}
    truth = json.loads((root / "annotations" / "instances_train.json").read_text())
    prepared = data.ground_truth(dataset, "train")
    assert prepared["images"] == truth["images"] and prepared["categories"] == truth["categories"]
    filled = [a | {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3]} for a in truth["annotations"]]
    assert prepared["annotations"] == filled
    for index, entry in enumerate(truth["images"]):
        example = dataset.splits["train"].records[index]
        path = root / "images" / "train" / entry["file_name"]
        np.testing.assert_array_equal(example["image"], cv2.imread(str(path))[:, :, ::-1])
        own = [a for a in truth["annotations"] if a["image_id"] == entry["id"]]
        boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]).reshape(-1, 4)
        np.testing.assert_allclose(example["boxes"], boxes, rtol=1e-6)
        assert example["labels"].tolist() == [dataset.category_ids.index(a["category_id"]) for a in own]
        assert example["image_id"] == entry["id"]
        # The bytes are those of the file.
        assert dataset.splits["train"].records.raw(index)["image"] == path.read_bytes()


@pytest.mark.user_input(
    "Folders and names",
    "images in images/SPLIT, SPLIT, images, or a folder of your own",
    "read; your own is named by `data.train_images` and `val_images`",
)
@pytest.mark.parametrize(
    ("images", "changes"),
    [
        ("images/{}", {}),
        ("{}", {}),
        ("images", {}),
        ("elsewhere", {"train_images": "elsewhere", "val_images": "elsewhere"}),
    ],
)
def test_usual_layouts(tmp_path, images, changes):
    truth = coco_json({"a.png": (20, 30)}, [(0, 3, [2, 3, 10, 12], {})])
    root = one_split(tmp_path / "set", truth, {"a.png": paint(20, 30, [(2, 3, 12, 15)])}, images=images)
    dataset = opened(root, tmp_path, **changes)
    assert dataset.splits["val"].records[0]["image"].shape == (20, 30, 3)


@pytest.mark.user_input(
    "Folders and names",
    "a json elsewhere, splits of other names",
    "read; named by `data.val_annotations`, `train_split`, `val_split`",
)
def test_explicit_annotations_and_other_split_names(tmp_path):
    truth = coco_json({"a.png": (20, 30)}, [(0, 3, [2, 3, 10, 12], {})])
    root = write_folder(tmp_path / "set", {"fit": truth, "test": truth}, {"a.png": paint(20, 30, [])})
    (root / "other.json").write_text(json.dumps(truth))
    dataset = opened(root, tmp_path, train_split="fit", val_split="test", val_annotations="other.json")
    assert dataset.splits["train"].name == "fit" and dataset.splits["val"].size == 1


@pytest.mark.user_input(
    "Folders and names", "Roboflow's layout, SPLIT/_annotations.coco.json", "read with `data.val_split=valid`"
)
def test_roboflow_layout(tmp_path):
    truth = coco_json({"a.png": (20, 30)}, [(0, 3, [2, 3, 10, 12], {})])
    root = write_folder(tmp_path / "set", {"train": truth, "valid": truth}, {"a.png": paint(20, 30, [])}, images="{}")
    for split in ("train", "valid"):
        shutil.move(root / "annotations" / f"instances_{split}.json", root / split / "_annotations.coco.json")
    assert opened(root, tmp_path, val_split="valid").splits["val"].size == 1


@pytest.mark.user_input("Folders and names", "file names that begin with the split (train/a.png)", "read")
def test_file_names_that_begin_with_the_split(tmp_path):
    truth = coco_json({"train/a.png": (20, 30)}, [])
    root = write_folder(tmp_path / "set", {"train": truth}, {"train/a.png": paint(20, 30, [])}, images="images")
    changes = dict(val_split="train")
    assert opened(root, tmp_path, **changes).splits["train"].size == 1


@pytest.mark.user_input("Folders and names", "a listed file whose name is not UTF-8", "read")
def test_a_file_name_that_is_not_utf8_is_read(tmp_path):
    """As json.dumps writes the name that os.listdir gives."""
    name = os.fsdecode(b"gr\xf6\xdfe.png")
    truth = json.loads(json.dumps(coco_json({"a.png": (20, 30), name: (20, 30)}, [(1, 3, [2, 3, 10, 12], {})])))
    root = write_folder(tmp_path / "set", {"train": truth}, {"a.png": paint(20, 30, [])})
    shutil.copy(root / "images" / "train" / "a.png", root / "images" / "train" / name)
    split = opened(root, tmp_path, ["train"]).splits["train"]
    assert split.truth["images"][1]["file_name"] == name and len(split.records[1]["boxes"]) == 1


@pytest.mark.user_input("COCO json", "a box of no or negative width or height", "counted as dropped: box has no extent")
@pytest.mark.user_input("COCO json", "a box outside the image", "counted as dropped: box outside the image")
@pytest.mark.user_input(
    "COCO json", "a box that extends beyond the image", "counted as repaired: clipped for training, kept for evaluation"
)
@pytest.mark.user_input(
    "COCO json",
    "a box of three numbers, with NaN, or 401 digits long",
    "counted as dropped: bbox is not four finite numbers",
)
@pytest.mark.user_input(
    "COCO json", "an annotation id that is 0, twice, or beyond 64 bits", "counted as repaired: it gets another id"
)
@pytest.mark.user_input("COCO json", "a negative area", "counted as repaired: set to the area of the box")
@pytest.mark.user_input("COCO json", "a crowd region with a mask", "read for evaluation, not for training")
@pytest.mark.user_input("COCO json", "an image without width or height", "counted as repaired: taken from the image")
def test_unusable_entries_are_dropped_or_repaired_and_listed(tmp_path):
    good = [5, 5, 10, 10]
    annotations = [
        (0, 3, good, {}),
        (0, 3, [5, 5, 0, 10], {}),  # no extent
        (0, 3, [5, 5, 10, -3], {}),
        (0, 3, [100, 5, 10, 10], {}),  # outside
        (0, 11, [-4, -2, 10, 10], {}),  # extends beyond the image
        (0, 11, [1, 2, 3], {}),  # not a box
        (0, 11, [float("nan"), 2, 3, 4], {}),
        (0, 11, [1, 2, 10**400, 4], {}),
        (0, 3, [6, 5, 10, 10], {"id": 1}),  # id twice
        (0, 3, [7, 5, 10, 10], {"id": 0}),
        (0, 3, [8, 5, 10, 10], {"id": 2**70}),
        (0, 3, [9, 5, 10, 10], {"iscrowd": "0", "area": -1.0}),
        (1, 3, [0, 0, 30, 30], {"iscrowd": 1, "area": 55.5, "segmentation": CROWD}),
    ]
    truth = coco_json({"a.png": (40, 50), "b.png": (40, 50), "c.png": (40, 50)}, annotations)
    del truth["images"][2]["width"]
    root = one_split(tmp_path / "set", truth, dict.fromkeys(("a.png", "b.png", "c.png"), paint(40, 50, [])))
    dataset = opened(root, tmp_path)
    log = dataset.splits["train"].log
    assert [(e["file"], e["annotation"], e["action"], e["reason"].split(":")[0]) for e in log] == [
        ("a.png", 2, "dropped", "box has no extent"),
        ("a.png", 3, "dropped", "box has no extent"),
        ("a.png", 6, "dropped", "bbox is not four finite numbers"),
        ("a.png", 7, "dropped", "bbox is not four finite numbers"),
        ("a.png", 8, "dropped", "bbox is not four finite numbers"),
        ("a.png", 1, "repaired", "annotation id is missing, duplicate or below 1"),
        ("a.png", 0, "repaired", "annotation id is missing, duplicate or below 1"),
        ("a.png", 2**70, "repaired", "annotation id is missing, duplicate or below 1"),
        ("a.png", 12, "repaired", "iscrowd is neither 0 nor 1"),
        ("a.png", 12, "repaired", "area is not a number >= 0"),
        ("a.png", 4, "dropped", "box outside the image"),
        ("a.png", 5, "repaired", "box clipped to the image"),
        ("c.png", None, "repaired", "width and height taken from the image"),
    ]
    prepared = data.ground_truth(dataset, "train")
    ids = [a["id"] for a in prepared["annotations"]]
    assert len(set(ids)) == len(ids) == 7 and min(ids) > 0
    assert prepared["images"][2]["width"] == 50
    # Evaluation uses the json's box and the crowd region, training the visible part and no crowd.
    assert [-4, -2, 10, 10] in [a["bbox"] for a in prepared["annotations"]]
    crowd = [a for a in prepared["annotations"] if a["iscrowd"]]
    assert len(crowd) == 1 and crowd[0]["area"] == 55.5 and crowd[0]["segmentation"] == CROWD
    first, second = (dataset.splits["train"].records[i] for i in (0, 1))
    squares = [[x, 5, x + 10, 15] for x in range(5, 10)]
    np.testing.assert_allclose(first["boxes"], [squares[0], [0, 0, 6, 8], *squares[1:]], rtol=1e-6)
    assert second["boxes"].shape == (0, 4)
    text = data.summary(dataset, settings(tmp_path, image_size=(48, 64)))
    for part in ("3 images, 2 without objects, 6 boxes", "1 crowd region", "canvas 48x64", "2 dropped: box has no"):
        assert part in text, text
    assert "a.png annotation 5: repaired, box clipped to the image" in text


FLAT = [5, 5, 20, 5, 20, 30]
OUTSIDE = "polygon outside the image"
UNUSABLE = {
    "polygon has an odd number of coordinates": [[5, 5, 20, 5, 20]],
    "polygon has fewer than 3 points": [[5, 5, 20, 5], [5, 5]],
    "polygons are not lists in a list, [[x, y, ...]]": FLAT,
    "polygon is not a list of finite numbers": [FLAT, ["a"]],
    OUTSIDE: [[70, 5, 80, 5, 80, 20]],
    "polygon reaches farther outside the image than the image is large": [[5, 5, 1e6, 5, 5, 30]],
    "mask lies outside of its box": [[0.1, 0.1, 2, 0.1, 2, 2]],
    "size of the RLE is not that of the image": {"size": [50, 40], "counts": [20, 980, 1000]},
    "counts of the RLE do not sum to height x width": {"size": [40, 50], "counts": [20, 980]},
    "counts of the RLE cannot be read": {"size": [40, 50], "counts": "x"},
    "counts of the RLE are neither text nor whole numbers": {"size": [40, 50], "counts": [20, 980.5, 999.5]},
    "mask is empty": {"size": [40, 50], "counts": [2000]},
    "mask is empty ": [[5, 5, 10, 10, 15, 15]],
    "mask is empty  ": [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]],
    "segmentation is neither a list of polygons nor an RLE": "5 5 20 5",
}


@pytest.mark.user_input(
    "COCO json",
    "segmentations that cannot be used: an odd number of coordinates, a flat list, an RLE of another size or sum",
    "counted with the reason; the object keeps its box",
)
@pytest.mark.user_input("COCO json", "`segmentation: []`", "read as an object without mask")
def test_segmentations_are_kept_or_counted(tmp_path):
    polygon, parts = [[4, 5, 20, 5.5, 20, 30]], [[4, 5, 20, 5.5, 20, 30], [5, 9, 1, 2], [1, 1, 9, 1, 9, 9]]
    box = [4, 5, 16, 25]
    good = [(0, 3, box, {"segmentation": some}) for some in (polygon, CROWD, TEXT)]
    bad = [(1, 3, box, {"segmentation": some, "note": reason.strip()}) for reason, some in UNUSABLE.items()]
    others = [(0, 3, box, {"segmentation": parts}), (0, 3, box, {"segmentation": []}), (0, 3, box, {})]
    unboxed = [(0, 11, [], {"segmentation": some}) for some in (parts, CROWD, TEXT, [[5, 5]], None)]
    truth = coco_json({"a.png": (40, 50), "b.png": (40, 50)}, [*good, *others, *unboxed, *bad])
    for entry in truth["annotations"]:
        if not entry["bbox"]:
            del entry["bbox"]
    for known in (True, False):
        if not known:
            for image in truth["images"]:
                del image["width"]
        root = one_split(tmp_path / str(known), truth, dict.fromkeys(("a.png", "b.png"), paint(40, 50, [])))
        dataset = opened(root, tmp_path)
        kept = data.ground_truth(dataset, "train")["annotations"]
        assert [a.get("segmentation") for a in kept[:6]] == [polygon, CROWD, TEXT, [parts[0], parts[2]], [], None]
        assert [a["bbox"] for a in kept[6:9]] == [[1, 1, 19, 29], [0, 0, 25, 40], [0, 0, 25, 40]]
        assert len(kept) == 9 + len(bad) and all("segmentation" not in a for a in kept[9:])
        log = dataset.splits["train"].log
        told = {e["annotation"]: e["reason"] for e in log if e["action"] == coco.UNMASKED}
        want = {a["id"]: a["note"] for a in truth["annotations"] if "note" in a}
        if not known:  # where the image ends is not known when the box is compared
            want = {key: reason.replace(OUTSIDE, "mask lies outside of its box") for key, reason in want.items()}
        assert told == want
        assert sum(e["reason"] == coco.BOXED for e in log) == 3
        missing = [e["reason"] for e in log if e["action"] == "dropped"]
        assert missing == [
            "bbox is missing, and its segmentation cannot be used: polygon has fewer than 3 points",
            "bbox is missing",
        ]
        text = data.summary(dataset, settings(tmp_path))
        assert f"7 with masks and {2 + len(bad)} without" in text
        assert "1 without mask: polygon has an odd number of coordinates" in text


def broken(changes):
    """A folder's json after `changes(truth)`."""
    truth = coco_json({"a.png": (40, 50), "b.png": (40, 50)}, [(0, 3, [5, 5, 10, 10], {}), (1, 11, [1, 1, 9, 9], {})])
    changes(truth)
    return truth


@pytest.mark.user_input(
    "COCO json",
    "an annotation of an image or category that is not listed",
    "refused: annotation 2: image 99 is not among the images",
)
@pytest.mark.user_input(
    "COCO json", "boxes in fractions of the image", "refused: they look normalised, but must be in pixels"
)
@pytest.mark.user_input("COCO json", "an image or category id twice", "refused: image id 10 appears twice")
@pytest.mark.user_input(
    "COCO json", "an image id that is text or beyond 64 bits", "refused: image id 'x' is not a 64-bit integer"
)
@pytest.mark.user_input("COCO json", "one file listed as two images", "refused: file a.png is listed as two images")
@pytest.mark.user_input(
    "COCO json", "an image without file_name, a category without name", "refused: image 11 has no file_name"
)
@pytest.mark.user_input(
    "COCO json", "width and height exchanged", "refused: with both sizes and that they are exchanged"
)
@pytest.mark.user_input("COCO json", "two classes of one name", "refused: rename one")
@pytest.mark.user_input(
    "COCO json",
    "a json without images, annotations or categories",
    "refused: it lists no images; no list under 'annotations'; no categories",
)
@pytest.mark.user_input(
    "Folders and names", "a listed image that does not exist", "refused: gone.png: no such file in FOLDER"
)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda t: t["annotations"][1].update(image_id=99), "annotation 2: image 99 is not among"),
        (lambda t: t["annotations"][1].update(category_id=4), "annotation 2: category 4 is not among"),
        (lambda t: t["annotations"][0].pop("image_id"), "annotation 1: image None is not among"),
        (
            lambda t: [a.update(bbox=[0.1, 0.2, 0.5, 1]) for a in t["annotations"]],
            "they look normalised",
        ),
        (lambda t: t["images"][1].update(id=10), "image id 10 appears twice"),
        (lambda t: t["images"][1].update(file_name="a.png"), "file a.png is listed as two images"),
        (lambda t: t["images"][1].update(id="x"), "image id 'x' is not a 64-bit integer"),
        (lambda t: t["images"][1].update(id=2**63), "image id 9223372036854775808 is not a 64-bit integer"),
        (lambda t: t["images"][1].pop("file_name"), "image 11 has no file_name"),
        (lambda t: t["images"][1].update(file_name="gone.png"), "gone.png: no such file in"),
        (
            lambda t: t["images"][0].update(width=40, height=50),
            "a.png is listed as 40x50, but is 50x40: width and height are exchanged$",
        ),
        (lambda t: t["categories"][1].update(id=3), "category id 3 appears twice"),
        (lambda t: t["categories"][1].update(name="cat"), "two categories have the name 'cat', 3 and 11: rename one"),
        (lambda t: t["categories"][1].pop("name"), "category 11 has no name"),
        (lambda t: t.pop("annotations"), "list of objects under 'annotations'"),
        (lambda t: t.update(images=[], annotations=[]), "it lists no images"),
        (lambda t: t.update(categories=[], annotations=[]), "it has no categories"),
    ],
)
def test_ambiguous_entries_are_refused(tmp_path, changes, words):
    truth = broken(changes)
    images = dict.fromkeys(("a.png", "b.png"), paint(40, 50, []))
    root = one_split(tmp_path / "set", truth, images) if "images" in truth else tmp_path
    with pytest.raises(UserError, match=words):
        opened(root, tmp_path)
    assert not list((tmp_path / "cache").glob("data/folder*")), "nothing incomplete is left"


@pytest.mark.user_input(
    "Folders and names", "no root, or one that does not exist", "refused: root is empty; there is no folder ROOT"
)
@pytest.mark.user_input(
    "Folders and names", "a split without json or without folder of images", "refused with the paths that were searched"
)
@pytest.mark.user_input(
    "COCO json", "an empty json, one cut off, one nested 100,000 deep", "refused: the file is empty; not valid json"
)
@pytest.mark.user_input("COCO json", "a json with a byte order mark", "read")
@pytest.mark.user_input(
    "Config and flags", "an unknown `data.source`", "refused: must be one of coco_folder, folder, scenes, tfds, …"
)
def test_messages_for_a_wrong_root_json_or_image(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        opened(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UserError, match=r"^root is empty"):
        opened("", tmp_path)
    root = small_folder(tmp_path / "set", count=3)
    with pytest.raises(UserError, match=r"split 'test': no instances json: searched .*instances_test.json"):
        opened(root, tmp_path, val_split="test")
    (root / "annotations" / "instances_test.json").write_text("{}")
    shutil.move(root / "images", root / "moved")
    with pytest.raises(UserError, match="split 'test': no folder of images"):
        opened(root, tmp_path, val_split="test", train_images="moved/train")
    shutil.move(root / "moved", root / "images")
    (root / "annotations" / "instances_test.json").write_text("")
    with pytest.raises(UserError, match=r"instances_test.json: the file is empty"):
        opened(root, tmp_path, val_split="test", val_images="images/val")
    for spoilt in ('{"images": [', "[" * 100_000):
        (root / "annotations" / "instances_test.json").write_text(spoilt)
        with pytest.raises(UserError, match=r"instances_test.json: not valid json"):
            opened(root, tmp_path, val_split="test", val_images="images/val")
    whole = (root / "annotations" / "instances_val.json").read_text()
    (root / "annotations" / "instances_test.json").write_text(whole, encoding="utf-8-sig")
    assert opened(root, tmp_path, val_split="test", val_images="images/val").splits["val"].size == 3
    whole = (root / "images" / "train" / "p1.png").read_bytes()
    huge = bytearray(whole)
    huge[16:24] = struct.pack(">II", 60_000, 60_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    for spoilt in (b"", b"no image", whole[: len(whole) // 2], bytes(huge)):
        (root / "images" / "train" / "p1.png").write_bytes(spoilt)
        with pytest.raises(UserError, match=r"p1.png: cannot be read as an image"):
            opened(root, tmp_path)
    with pytest.raises(
        UserError, match="source must be one of coco_folder, folder, scenes, tfds, voc_folder, yolo_folder, not 'coco'"
    ):
        opened(root, tmp_path, source="coco")


@pytest.mark.user_input(
    "COCO json", "null among the images or annotations", "refused: entry 1 of 'images', from 0, is null"
)
def test_an_entry_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "x.json"
    for entry, text in ((None, "null"), ([1], "[1]"), ("é" * 99, '"' + "\\u00e9" * 6 + "\\u0")):
        for key in ("images", "annotations", "categories"):
            path.write_text(json.dumps({"images": [], "annotations": [], "categories": [], key: [{}, entry]}))
            with pytest.raises(UserError) as refused:
                coco.read(path)
            assert str(refused.value) == f"{path}: entry 1 of '{key}', from 0, is {text}: must be an object with an id"


@pytest.mark.user_input("COCO json", "an integer of 5,000 digits", "refused: it has an integer of over 4300 digits")
def test_an_integer_of_too_many_digits_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"images": [' + "9" * 5000 + "]}")
    with pytest.raises(UserError, match=r"x.json: not usable json: it has an integer of over 4300 digits$"):
        coco.read(tmp_path / "x.json")


@pytest.mark.skipif(SHARED is None, reason="needs the team's shared folder")
@pytest.mark.parametrize("name", ["bccd", "coco_mini", "nuclei"])
def test_real_folders_are_read_completely(name, tmp_path):
    root = SHARED / "data" / name
    dataset = opened(root, tmp_path)
    for role, split in dataset.splits.items():
        original = json.loads((root / "annotations" / f"instances_{role}.json").read_text())
        truth = data.ground_truth(dataset, role)
        assert split.log == [] and split.size == len(split.records) == len(original["images"])
        for prepared, listed in zip(truth["annotations"], by_image(original), strict=True):
            assert prepared == listed
        if role == "val":  # train is the same code, and slow to score
            assert perfect_ap(truth) == pytest.approx(1)
        for index in range(0, split.size, 40):
            example = split.records[index]
            own = [a["bbox"] for a in truth["annotations"] if a["image_id"] == example["image_id"]]
            np.testing.assert_allclose(
                example["boxes"][:, 2:] - example["boxes"][:, :2], np.reshape(own, (-1, 4))[:, 2:], atol=0.01
            )
    assert dataset.splits["train"].size > 10
