"""Recognising what a folder holds, images without labels, sizes from headers, names of classes, Roboflow's root."""

import concurrent.futures
import json

import numpy as np
import pytest
from hypothesis import strategies as st

from kdjax import data
from kdjax.data import classes, coco, images
from kdjax.errors import UserError
from tests.data.test_yolo import PIXELS, truth
from tests.fuzz.media import make
from tests.fuzz.runs import fuzz
from tests.support.data import opened, settings, small_folder, write_folder
from tests.support.labels import voc_texts, write_images, write_texts, write_voc, write_yolo


@pytest.mark.user_input(
    "YOLO and VOC folders", "several of COCO's json, data.yaml, xml and txt in one folder", "read: the first of them"
)
def test_what_lies_in_a_folder(tmp_path):
    def seen(root, **changes):
        return data.recognised(settings(tmp_path / "cache", root=root, **changes), ("train", "val"))

    assert seen("") == seen(tmp_path / "nowhere") == seen(tmp_path) == "coco_folder"  # which says what is missing
    both = write_yolo(tmp_path / "both", {"train": truth()}, PIXELS, yaml="")
    assert seen(both) == "yolo_folder"
    write_texts(both / "labels" / "train", voc_texts(truth()), ".xml")
    assert seen(both) == "voc_folder"
    (both / "data.yaml").write_text("names: [cat, dog]\n")
    assert seen(both) == seen(both / "data.yaml") == "yolo_folder"
    write_folder(both, {"train": truth()}, PIXELS)
    assert seen(both) == "coco_folder"
    assert seen(both, train_annotations="labels/train") == "voc_folder"
    assert seen(write_voc(tmp_path / "VOC2007", {"train": truth()}, PIXELS)) == "voc_folder"
    roboflow = small_folder(tmp_path / "roboflow")
    (roboflow / "train").mkdir()
    (roboflow / "annotations" / "instances_train.json").rename(roboflow / "train" / "_annotations.coco.json")
    assert seen(roboflow) == "coco_folder"


def test_a_coco_folder_is_the_same_when_recognised(tmp_path):
    root = small_folder(tmp_path / "set")
    named, recognised = (opened(root, tmp_path, source=source) for source in ("coco_folder", "folder"))
    assert named.fingerprint == recognised.fingerprint and recognised.source == "coco_folder"
    assert named.splits["train"].folder == recognised.splits["train"].folder


@pytest.mark.user_input(
    "Folders and names",
    "a folder of images without labels",
    "read as images of which nothing is known, by `open_unlabelled`",
)
def test_images_without_labels(tmp_path):
    write_images(tmp_path / "pics" / "sub", PIXELS)
    write_images(tmp_path / "pics", {"z.jpg": PIXELS["a.png"]})
    (tmp_path / "pics" / "notes.txt").write_text("0 0.5 0.5 0.1 0.1")
    cfg = settings(tmp_path / "cache")
    split = data.open_unlabelled(cfg, str(tmp_path / "pics"))
    assert (split.name, split.size, split.labelled, split.log) == ("pics", 4, False, [])
    assert [image["file_name"] for image in split.truth["images"]] == ["sub/a.png", "sub/b.png", "sub/c.png", "z.jpg"]
    assert split.truth["annotations"] == split.truth["categories"] == []
    example = split.records[1]
    np.testing.assert_array_equal(example["image"], PIXELS["b.png"])
    assert example["boxes"].shape == (0, 4) and example["labels"].shape == (0,)
    assert data.open_unlabelled(cfg, str(tmp_path / "pics")).folder == split.folder
    cfg.limit = 2
    assert len(data.open_unlabelled(cfg, str(tmp_path / "pics")).image_ids) == 2
    write_images(tmp_path / "pics", {"y.png": PIXELS["c.png"]})
    assert data.open_unlabelled(settings(tmp_path / "cache"), str(tmp_path / "pics")).size == 5
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"void: it holds no images \(.jpg"):
        data.open_unlabelled(cfg, str(tmp_path / "void"))
    with pytest.raises(UserError, match="there is no folder"):
        data.open_unlabelled(cfg, str(tmp_path / "nowhere"))
    (tmp_path / "pics" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken.png: cannot be read as an image"):
        data.open_unlabelled(settings(tmp_path / "cache"), str(tmp_path / "pics"))


def test_an_empty_labelled_split_is_labelled(tmp_path):
    assert opened(small_folder(tmp_path / "set"), tmp_path).splits["train"].labelled


@fuzz(60)
def test_sizes_from_headers_are_those_of_the_pixels(data):
    import tempfile

    made = make(data.draw)
    upright = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        path = f"{folder}/x{made.suffix}"
        with open(path, "wb") as file:
            file.write(made.content)
        [size] = images.sizes([path], pool, upright=upright)
    assert size == images.read(made.content, path, upright=upright)[1].size


@pytest.mark.user_input("YOLO and VOC folders", "`--classes=coco`, `voc`, or a file of names", "read")
def test_names_of_classes(tmp_path):
    assert len(set(classes.COCO)) == 80 and len(set(classes.VOC)) == 20
    assert (classes.COCO[11], classes.COCO[79], classes.VOC[19]) == ("stop sign", "toothbrush", "tvmonitor")
    (tmp_path / "n.txt").write_text("cat\r\nguinea pig\r\n\r\n", newline="")
    assert classes.read(str(tmp_path / "n.txt")) == ["cat", "guinea pig"]
    (tmp_path / "d.yaml").write_text("names: {1: dog, 0: cat}\n")
    assert classes.read(str(tmp_path / "d.yaml")) == ["cat", "dog"]
    root = dict(id=0, name="all", supercategory="none")
    listed = [root, dict(id=7, name="dog", supercategory="all"), dict(id=3, name="cat", supercategory="all")]
    (tmp_path / "c.json").write_text(json.dumps(dict(images=[], annotations=[], categories=listed)))
    assert classes.read(str(tmp_path / "c.json")) == ["cat", "dog"]
    (tmp_path / "C.JSON").write_bytes((tmp_path / "c.json").read_bytes())
    assert classes.read(str(tmp_path / "C.JSON")) == ["cat", "dog"]
    (tmp_path / "c.txt").write_bytes((tmp_path / "c.json").read_bytes())
    with pytest.raises(UserError, match=r"c.txt holds json: its name must end with .json"):
        classes.read(str(tmp_path / "c.txt"))
    (tmp_path / "c.txt").write_text("[cat]\n[dog]\n")
    assert classes.read(str(tmp_path / "c.txt")) == ["[cat]", "[dog]"]
    (tmp_path / "n.txt").write_text("cat\n\ndog\n")
    with pytest.raises(UserError, match=r"n.txt:2 has the name '' for a class: every class needs a name of its own"):
        classes.read(str(tmp_path / "n.txt"))
    (tmp_path / "n.txt").write_text("caf\u00e9\ncafe\u0301\n")
    with pytest.raises(UserError, match=r"n.txt:2 has the name .* twice"):
        classes.read(str(tmp_path / "n.txt"))


@pytest.mark.user_input("YOLO and VOC folders", "`--classes` for data in COCO's layout or scenes", "refused")
def test_names_of_classes_are_for_data_without_them(tmp_path):
    small_folder(tmp_path / "set")
    for source in ("coco_folder", "folder", "scenes"):
        config = settings(tmp_path / "cache", source=source, root=str(tmp_path / "set"), classes="voc")
        with pytest.raises(UserError, match=r"classes=voc is for data in YOLO's and VOC's layout: .* names its"):
            data.open_dataset(config, splits=("val",))
    assert not (tmp_path / "cache").exists()


@pytest.mark.user_input(
    "COCO json", "Roboflow's root category, which no annotation has", "counted: left out of the classes"
)
def test_the_root_category_of_roboflow_is_left_out(tmp_path):
    folder = small_folder(tmp_path / "set")
    for role in ("train", "val"):
        path = folder / "annotations" / f"instances_{role}.json"
        said = json.loads(path.read_text())
        for category in said["categories"]:
            category["supercategory"] = "animals"
        # Roboflow calls the root as the project, which may be as a class.
        said["categories"].insert(0, dict(id=0, name="animals", supercategory="none"))
        path.write_text(json.dumps(said))
    dataset = opened(folder, tmp_path, source="folder")
    assert dataset.classes == ("cat", "dog") and dataset.category_ids == (3, 11)
    counts = data.count(dataset, "val", settings(tmp_path / "cache"))
    assert counts.other["noted", coco.ROOT] == 1
    assert f"val: 1 noted: {coco.ROOT}" in data.summary(dataset, settings(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("root", "others", "annotated", "left"),
    [
        (dict(id=0, name="a", supercategory="none"), dict(id=1, name="a", supercategory="a"), 1, [1]),
        (dict(id=0, name="a", supercategory="none"), dict(id=1, name="b", supercategory="a"), 0, [0, 1]),
        (dict(id=0, name="a", supercategory="none"), dict(id=1, name="b", supercategory="none"), 1, [0, 1]),
        (dict(id=0, name="a", supercategory="x"), dict(id=1, name="b", supercategory="a"), 1, [0, 1]),
        (dict(id=2, name="a", supercategory="none"), dict(id=1, name="b", supercategory="a"), 1, [2, 1]),
        (dict(id=0, supercategory="none"), dict(id=1, name="b"), 1, [0, 1]),
    ],
)
def test_only_a_root_is_left_out(root, others, annotated, left):
    said = {"annotations": [{"category_id": annotated}], "categories": [root, others]}
    found, removed = coco.without_root(said)
    assert [c["id"] for c in found["categories"]] == left and removed == (len(left) == 1)
