"""YOLO folders: layouts, rows, names of classes, what is refused, and the way from COCO and back."""

import json

import numpy as np
import pytest
from PIL import Image

from kdjax import data
from kdjax.data import coco, images
from kdjax.errors import UserError
from tests.fuzz.media import saved
from tests.shared import SHARED
from tests.support.data import coco_json, opened, paint, settings, small_folder
from tests.support.labels import write_images, write_texts, write_yolo, yolo_lines

SIZES = {"a.png": (40, 60), "b.png": (30, 50), "c.png": (20, 80)}
BOXES = [(0, 3, [6, 8, 12, 20], {}), (0, 11, [30, 4, 24, 30], {}), (1, 11, [5, 6, 10, 15], {})]
PIXELS = {name: paint(*size, []) for name, size in SIZES.items()}


def truth() -> dict:
    return coco_json(SIZES, BOXES)


def boxes(dataset, role="train") -> list[tuple[str, str, list[float]]]:
    """(file, class, bbox) of all objects."""
    said = data.ground_truth(dataset, role)
    files = {image["id"]: image["file_name"] for image in said["images"]}
    names = {category["id"]: category["name"] for category in said["categories"]}
    return [(files[a["image_id"]], names[a["category_id"]], a["bbox"]) for a in said["annotations"]]


def check_boxes(dataset, prefix="", role="train") -> None:
    names = [*SIZES]
    found = boxes(dataset, role)
    assert [(prefix + names[i], "dog" if c == 11 else "cat") for i, c, _, _ in BOXES] == [f[:2] for f in found]
    np.testing.assert_allclose([f[2] for f in found], [b for _, _, b, _ in BOXES], atol=1e-4)


@pytest.mark.user_input("YOLO and VOC folders", "YOLO: data.yaml with folders of images", "read")
@pytest.mark.user_input("YOLO and VOC folders", "YOLO: an image without a .txt", "counted: an image without objects")
@pytest.mark.user_input("YOLO and VOC folders", "YOLO: a .txt without an image", "counted: labels without an image")
@pytest.mark.user_input("YOLO and VOC folders", "a.jpg and a.png with one file of labels", "read for both, and counted")
def test_a_folder_with_data_yaml(tmp_path):
    yaml = "path: .\ntrain: images/train\nval: images/train\nnames:\n  0: cat\n  1: dog\n"
    root = write_yolo(tmp_path / "set", {"train": truth()}, PIXELS, yaml=yaml)
    (root / "labels" / "train" / "c.txt").unlink()
    (root / "labels" / "train" / "spare.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (root / "labels" / "train" / "classes.txt").write_text("cat\ndog\n")
    write_images(root / "images" / "train", {"b.jpg": PIXELS["b.png"], ".hidden.png": PIXELS["b.png"]})
    dataset = opened(root, tmp_path, source="yolo_folder")
    assert dataset.classes == ("cat", "dog") and dataset.category_ids == (1, 2) and dataset.name == "set"
    counts = data.count(dataset, "train", settings(tmp_path / "cache"))
    assert (counts.images, counts.empty, counts.objects) == (4, 1, 4)
    noted = {reason: number for (action, reason), number in counts.other.items() if action == "noted"}
    assert noted == {
        "without a file of labels: taken as an image without objects": 1,
        "labels without an image": 1,
        "its labels are also those of another image with the same name but for the suffix": 1,
    }
    assert [entry["file"] for entry in dataset.splits["train"].log if "an image" in entry["reason"]][-1].endswith(
        "spare.txt"
    )


@pytest.mark.user_input("YOLO and VOC folders", "YOLO: images/SPLIT, SPLIT/images, or all in SPLIT", "read")
@pytest.mark.user_input("YOLO and VOC folders", "YOLO: the split valid for val", "read")
@pytest.mark.user_input(
    "YOLO and VOC folders", "YOLO: names in classes.txt or obj.names instead of a data.yaml", "read"
)
@pytest.mark.parametrize(
    ("images", "labels", "names"),
    [
        ("images/{}", "labels/{}", "classes.txt"),
        ("{}/images", "{}/labels", "obj.names"),
        ("{}", "{}", "labels.names"),
        ("images/{}", "labels/{}", "labels/classes.txt"),
    ],
)
def test_layouts_without_data_yaml(tmp_path, images, labels, names):
    root = write_yolo(
        tmp_path / "set", {"train": truth(), "valid": truth()}, PIXELS, images=images, labels=labels, yaml=""
    )
    (root / names).write_text("cat\ndog\n\n")
    dataset = opened(root, tmp_path, source="folder")
    assert dataset.source == "yolo_folder"
    check_boxes(dataset, images.format("train") + "/")
    check_boxes(dataset, images.format("valid") + "/", "val")


@pytest.mark.user_input("YOLO and VOC folders", "YOLO: Roboflow's ../train/images in data.yaml", "read")
@pytest.mark.user_input("YOLO and VOC folders", "the path of a data.yaml instead of its folder", "read")
def test_roboflow_and_the_yaml_itself(tmp_path):
    yaml = "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\nroboflow:\n  version: 1\n"
    split = {"train": truth(), "valid": truth()}
    root = write_yolo(tmp_path / "set", split, PIXELS, images="{}/images", labels="{}/labels", yaml=yaml)
    check_boxes(opened(root, tmp_path, source="folder"), "train/images/")
    (root / "data.yaml").rename(root / "mine.yml")
    check_boxes(opened(root / "mine.yml", tmp_path, source="folder"), "valid/images/", "val")
    (root / "other.yaml").write_text("names: [x]\n")
    with pytest.raises(UserError, match=r"set: it has mine.yml, other.yaml: name the one to read as root$"):
        opened(root, tmp_path, source="yolo_folder")


@pytest.mark.user_input("YOLO and VOC folders", "YOLO: lists of images, as darknet has", "read")
@pytest.mark.user_input(
    "YOLO and VOC folders", "YOLO: a list with an image twice, or one that is missing", "refused with file and line"
)
def test_lists_of_images(tmp_path):
    root = write_yolo(tmp_path / "set", {"x": truth()}, PIXELS, images="obj", labels="obj", yaml="")
    (root / "obj.names").write_text("cat\ndog\n")
    (root / "train.txt").write_text("obj/a.png\n./obj/b.png\n\n")
    (root / "val.txt").write_text("set/obj/c.png\r\n")
    dataset = opened(root, tmp_path, source="folder")
    assert [len(data.ground_truth(dataset, role)["images"]) for role in ("train", "val")] == [2, 1]
    check_boxes(dataset, "obj/")
    assert dataset.splits["val"].log == []  # the labels of train have images
    (root / "val.txt").write_text("obj/a.png\nobj/none.png\n")
    with pytest.raises(UserError, match=r"val.txt:2: there is no image obj/none.png$"):
        opened(root, tmp_path, source="folder")
    (root / "val.txt").write_text("obj/a.png\n\n./obj/a.png\n")
    with pytest.raises(UserError, match=r"val.txt:3: ./obj/a.png is listed twice, also in line 1$"):
        opened(root, tmp_path, source="folder")


def test_explicit_folders_and_names(tmp_path):
    root = tmp_path / "set"
    write_images(root / "pics" / "sub", PIXELS)
    write_texts(root / "marks" / "sub", yolo_lines(truth()), ".txt")
    changes = dict(val_images="pics", val_annotations="marks", classes=str(tmp_path / "n.txt"))
    (tmp_path / "n.txt").write_text("cat\ndog\nbird\n")
    dataset = opened(root, tmp_path, ["val"], source="folder", **changes)
    check_boxes(dataset, "pics/sub/", "val")
    assert dataset.classes == ("cat", "dog", "bird")
    dataset = opened(root, tmp_path, ["val"], source="yolo_folder", **changes | dict(classes="coco"))
    assert boxes(dataset, "val")[0][1] == "person" and len(dataset.classes) == 80


@pytest.mark.user_input("YOLO and VOC folders", "YOLO: polygons, also beside boxes", "read as masks and their boxes")
def test_polygons_become_masks(tmp_path):
    root = small_folder(tmp_path / "coco", masks=True)
    original = json.loads((root / "annotations" / "instances_train.json").read_text())
    pixels = {f"p{i}.png": paint(40 + i, 60 - i, []) for i in range(11)}
    written = write_yolo(tmp_path / "yolo", {"train": original}, pixels, digits=9)
    label = written / "labels" / "train" / "p0.txt"
    label.write_text("1 0.5 0.5 0.5 0.5\n")
    dataset = opened(written, tmp_path, ["train"], source="folder", masks=True)
    counts = data.count(dataset, "train", settings(tmp_path / "cache"))
    assert (counts.objects, counts.masks) == (len(original["annotations"]) + 1, len(original["annotations"]))
    reference = opened(root, tmp_path, ["train"], masks=True)
    drawn, wanted = dataset.splits["train"].masks, reference.splits["train"].masks
    assert drawn is not None and wanted is not None
    ids = [a["id"] for a in dataset.splits["train"].truth["annotations"] if a.get("segmentation")]
    assert drawn(ids) == wanted([a["id"] for a in sorted_by_name(reference)]) and len(ids) > 10


def sorted_by_name(dataset) -> list[dict]:
    """The annotations in the order of the names of their images."""
    said = dataset.splits["train"].truth
    names = {image["id"]: image["file_name"] for image in said["images"]}
    return sorted(said["annotations"], key=lambda a: names[a["image_id"]])


def check_round_trip(original: dict, root, tmp_path, **changes) -> None:
    """A YOLO folder has the images, classes and boxes of the COCO json from which it was written."""
    known = [c["name"] for c in sorted(original["categories"], key=lambda c: c["id"])]
    dataset = opened(root, tmp_path, ["train"], source="folder", **changes)
    assert dataset.source == "yolo_folder" and list(dataset.classes) == known
    back = data.ground_truth(dataset, "train")
    records, categories, _ = coco.check(original, "original")
    assert sorted(r.file_name for r in records) == [i["file_name"].split("/", 2)[2] for i in back["images"]]
    sizes = {r.file_name: (r.height, r.width) for r in records}
    assert all(sizes[i["file_name"].split("/", 2)[2]] == (i["height"], i["width"]) for i in back["images"])
    ordered = [
        (categories[a["category_id"]], a["bbox"], a["area"], a.get("segmentation"))
        for r in sorted(records, key=lambda r: r.file_name)
        for a in r.annotations
    ]
    assert [name for name, *_ in ordered] == [name for _, name, _ in boxes(dataset)]
    for (_, box, area, mask), entry in zip(ordered, back["annotations"], strict=True):
        np.testing.assert_allclose(entry["bbox"], box, atol=2e-3)
        if mask:
            np.testing.assert_allclose(entry["segmentation"], mask, atol=2e-3)
        else:
            np.testing.assert_allclose(entry["area"], area, rtol=1e-2, atol=1)


@pytest.mark.parametrize("masks", [False, True])
def test_from_coco_to_yolo_and_back(tmp_path, masks):
    folder = small_folder(tmp_path / "coco", masks=masks)
    original = json.loads((folder / "annotations" / "instances_train.json").read_text())
    pixels = {f"p{i}.png": paint(40 + i, 60 - i, []) for i in range(11)}
    check_round_trip(original, write_yolo(tmp_path / "yolo", {"train": original}, pixels), tmp_path)


@pytest.mark.skipif(SHARED is None, reason="needs the team's shared folder")
@pytest.mark.parametrize("name", ["bccd", "coco_mini"])
def test_real_sets_from_coco_to_yolo_and_back(tmp_path, name):
    source = SHARED / "data" / name
    original = json.loads((source / "annotations" / "instances_val.json").read_text())
    kept = {image["id"] for image in original["images"]}
    objects = [a for a in original["annotations"] if a["image_id"] in kept and not a.get("iscrowd")]
    for entry in objects:
        for key in ("segmentation", "area"):  # masks of several parts, which a row cannot hold
            entry.pop(key, None)
    original |= {"annotations": objects}
    (tmp_path / "yolo" / "images").mkdir(parents=True)
    (tmp_path / "yolo" / "images" / "train").symlink_to(source / "images" / "val")
    names = [c["name"] for c in sorted(original["categories"], key=lambda c: c["id"])]
    write_yolo(tmp_path / "yolo", {"train": original}, {}, yaml=f"names: {json.dumps(names)}\n")
    check_round_trip(original, tmp_path / "yolo", tmp_path)


@pytest.mark.user_input(
    "YOLO and VOC folders",
    "YOLO: boxes outside of the image, beyond it, without extent, not finite, or twice",
    "counted as in a COCO json, with file and line",
)
@pytest.mark.user_input("YOLO and VOC folders", "YOLO: empty lines, Windows' line ends, a byte order mark", "read")
def test_defects_are_counted_as_those_of_coco(tmp_path):
    root = write_yolo(tmp_path / "set", {"train": truth()}, PIXELS)
    rows = ["0 0.5 0.5 0.5 0.5", "", "0 1.5 0.5 0.1 0.1", "1 0.9 0.5 0.4 0.2", "0 0.5 0.5 0 0.1", "1 .5 .5 -.2 .1"]
    rows += ["0 nan 0.5 0.1 0.1", "1.0 5e-1 0.5 +.5 0.5", "1 1e300 0.5 0.5 0.5", "0 0.5 0.5 0.5 0.5", "0 0.1 0.1 inf 1"]
    rows += ["0 0.1 0.1 0.2 0.2 nan 0.3", "0 0.1 0.1 0.9 0.9 0.5 0.5"]
    text = "\r\n".join(rows)
    (root / "labels" / "train" / "a.txt").write_text(text, encoding="utf-8-sig", newline="")
    dataset = opened(root, tmp_path, ["train"], source="folder")
    log = [(e["place"].rpartition("/")[2], e["action"], e["reason"]) for e in dataset.splits["train"].log]
    assert sorted(log) == sorted(
        [
            ("a.txt:3", "dropped", "box outside the image"),
            ("a.txt:4", "repaired", "box clipped to the image"),
            ("a.txt:5", "dropped", "box has no extent"),
            ("a.txt:6", "dropped", "box has no extent"),
            ("a.txt:7", "dropped", "bbox is not four finite numbers"),
            ("a.txt:9", "dropped", "bbox is not four finite numbers"),
            ("a.txt:10", "noted", "class and box are, digit for digit, those of another annotation of the image"),
            ("a.txt:11", "dropped", "bbox is not four finite numbers"),
            ("a.txt:12", "dropped", "bbox is not four finite numbers"),
            ("a.txt:13", "without mask", "mask is empty"),
        ]
    )
    assert [f[2] for f in boxes(dataset) if f[0].endswith("a.png")][:2] == [[15, 10, 30, 20], [42, 16, 24, 8]]
    both = opened(root, tmp_path, source="folder", val_split="train")
    line = "  images/train/a.png (labels/train/a.txt:3): dropped, box outside the image\n"
    assert data.summary(both, settings(tmp_path / "cache")).count(line) == 2


ROWS = [
    ("0 0.5 0.5 0.1", "it has 4 values: must have 5, class cx cy w h, or a class and x y of at least 3 points"),
    ("0", "it has 1 value: must have 5"),
    ("0 0.5 0.5 0.1 0.1 0.9", "it has 6 values, the last a confidence: these are predictions"),
    ("0 0.5 0.5 0.1 0.1 0.9 0.4 0.4", "it has 8 values: must have 5"),
    ("cat 0.5 0.5 0.1 0.1", "'cat' is not a number: must be class cx cy w h"),
    ("0,0.5,0.5,0.1,0.1", "'0,0.5,0.5,0.1,0.1' is not a number"),
    ("0 0.5 0.5 0_1 0.1", "'0_1' is not a number"),
    ("1.5 0.5 0.5 0.1 0.1", "the class is 1.5: must be a whole number from 0"),
    ("-1 0.5 0.5 0.1 0.1", "the class is -1: must be a whole number from 0"),
    ("nan 0.5 0.5 0.1 0.1", "the class is nan: must be a whole number from 0"),
    ("2 0.5 0.5 0.1 0.1", "class 2 has no name: there are names of 0 .. 1, cat, dog"),
    ("0 0.5 0.5 0.1 0.1 \udcff", "byte 0xff is not UTF-8: must be in UTF-8"),
]


@pytest.mark.user_input(
    "YOLO and VOC folders",
    "YOLO: a row of too few values, of predictions, with a text, with a class that has no name, not UTF-8",
    "refused with file and line",
)
def test_rows_that_are_refused(tmp_path):
    root = write_yolo(tmp_path / "set", {"train": truth()}, PIXELS)
    for row, sentence in ROWS:
        text = f"\n0 0.5 0.5 0.1 0.1\n{row}\n".encode(errors="surrogateescape")
        (root / "labels" / "train" / "a.txt").write_bytes(text)
        with pytest.raises(UserError) as refused:
            opened(root, tmp_path, ["train"], source="folder")
        assert f"{root}/labels/train/a.txt:3: {sentence}" in str(refused.value)


@pytest.mark.user_input("YOLO and VOC folders", "YOLO: boxes in pixels", "refused: they look like pixels")
def test_boxes_in_pixels_are_refused(tmp_path):
    root = write_yolo(tmp_path / "set", {"train": truth()}, PIXELS)
    for label in (root / "labels" / "train").glob("*.txt"):
        label.write_text("0 30 20 10 10\n")
    with pytest.raises(
        UserError, match=r"set/labels/train/a.txt:1: here and in all other lines there are values over 2"
    ):
        opened(root, tmp_path, ["train"], source="folder")


YAMLS = [
    ("names: [cat, dog\n", r"data.yaml:2: not valid yaml: expected ',' or '\]'"),
    ("", "data.yaml: the file is empty"),
    ("- a\n", "data.yaml:1: must have names of classes and splits"),
    ("nc: 3\nnames: [cat, dog]\n", "data.yaml:1: nc is 3, but names has 2 names"),
    ("names:\n  0: cat\n  2: dog\n", r"data.yaml:3: names has no entry 1: must have 0, 1, … 1"),
    ("names:\n  0: cat\n  0: dog\n", "data.yaml:3: names has 0 twice"),
    ("names:\n  a: cat\n", "data.yaml:2: names has the key 'a': must be 0, 1, …"),
    ("names:\n  - cat\n  - cat\n", "data.yaml:3 has the name 'cat' twice: every class needs a name of its own"),
    ("names: [cat, '']\n", "data.yaml:1 has the name '' for a class"),
    ("names: [cat, [dog]]\n", "data.yaml:1: a name of a class must be text"),
    ("names: &a [*a]\n", "data.yaml:1: (a name of a class must be text|not valid yaml)"),
    ("names: cat\n", "data.yaml:1: names must be a list, or names by number"),
    ("names: [cat, dog]\nnames: [a, b]\n", "data.yaml:2: names appears twice"),
    ("names: [cat]\ntrain: nowhere\n", "data.yaml:2: nowhere is neither a folder of images nor a list"),
    ("names: [cat]\ntrain: https://example.org/x.zip\n", "data.yaml:2: https://example.org/x.zip is neither"),
    ("names: [cat]\nval: images/train\n", "data.yaml: there is no split 'train': it has val"),
    ("names: [cat, dog]\nkpt_shape: 3\n", r"data.yaml:2: kpt_shape must be \[number of keypoints, 2 or 3\]"),
    ("names: [" + "[" * 3000 + "\n", "data.yaml:?[0-9]*: not valid yaml"),
    ("train: images/train\n", "data.yaml: there are no names of classes"),
]


@pytest.mark.user_input(
    "YOLO and VOC folders",
    "a data.yaml that is no yaml, has no names, names twice or with gaps, another `nc`, a split that does not exist",
    "refused with file and line",
)
def test_data_yamls_that_are_refused(tmp_path):
    root = write_yolo(tmp_path / "set", {"train": truth()}, PIXELS)
    for text, sentence in YAMLS:
        (root / "data.yaml").write_text(text)
        with pytest.raises(UserError, match=f"set/{sentence}"):
            opened(root, tmp_path, ["train"], source="yolo_folder")


@pytest.mark.user_input("YOLO and VOC folders", "names of classes as no, 1 and 1.10 in a data.yaml", "read as text")
def test_names_of_classes_are_text(tmp_path):
    root = write_yolo(tmp_path / "set", {"train": truth()}, PIXELS, yaml="names: {0: no, 1: 1.10}\n")
    assert opened(root, tmp_path, ["train"], source="folder").classes == ("no", "1.10")


@pytest.mark.user_input("YOLO and VOC folders", "YOLO: keypoints (`kpt_shape`)", "counted: only their boxes are read")
def test_keypoints_are_left_out(tmp_path):
    root = write_yolo(tmp_path / "set", {"train": truth()}, PIXELS, yaml="names: [cat, dog]\nkpt_shape: [2, 3]\n")
    for label in (root / "labels" / "train").glob("*.txt"):
        rows = label.read_text().splitlines()
        label.write_text("".join(f"{row} 0.1 0.2 2 0.3 0.4 1\n" for row in rows))
    dataset = opened(root, tmp_path, ["train"], source="folder")
    check_boxes(dataset, "images/train/")
    assert data.count(dataset, "train", settings(tmp_path / "cache")).masks == 0
    assert [e["reason"] for e in dataset.splits["train"].log] == ["keypoints are not read: only its box"] * 3
    (root / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(UserError, match=r"a.txt:1: it has 5 values: must have 11, as kpt_shape of the data.yaml says"):
        opened(root, tmp_path, ["train"], source="folder")


@pytest.mark.user_input(
    "YOLO and VOC folders", "a split without images or without any labels", "refused with what was searched"
)
def test_missing_images_labels_and_names(tmp_path):
    root = write_yolo(tmp_path / "set", {"train": truth()}, PIXELS, yaml="")
    with pytest.raises(UserError, match=r"set: there are no names of classes: .*--classes=coco, voc or FILE"):
        opened(root, tmp_path, ["train"], source="yolo_folder")
    with pytest.raises(UserError, match=r"there is no file nowhere: must be coco, voc, or a file"):
        opened(root, tmp_path, ["train"], source="yolo_folder", classes="nowhere")
    with pytest.raises(UserError, match=r"split 'val': no folder of images: searched .*set/images/valid"):
        opened(root, tmp_path, ["val"], source="yolo_folder", classes="voc")
    (root / "images" / "val").mkdir()
    with pytest.raises(UserError, match=r"split 'val': no images in .*images/val"):
        opened(root, tmp_path, ["val"], source="yolo_folder", classes="voc")
    write_images(root / "images" / "val", PIXELS)
    with pytest.raises(UserError, match=r"split 'val': none of its 3 images has labels, a .txt in labels/ or beside"):
        opened(root, tmp_path, ["val"], source="yolo_folder", classes="voc")
    with pytest.raises(UserError, match=r"split 'val': there is no folder of labels .*/nowhere"):
        opened(root, tmp_path, ["val"], source="yolo_folder", classes="voc", val_annotations="nowhere")


def test_prepared_again_when_a_label_changes(tmp_path):
    root = write_yolo(tmp_path / "set", {"train": truth()}, PIXELS)

    def read(**changes):
        dataset = opened(root, tmp_path, ["train"], source="folder", **changes)
        return dataset.splits["train"].folder, dataset.fingerprint

    first = read()
    assert read() == first
    (root / "notes.md").write_text("of no interest")
    assert read() == first
    (root / "labels" / "train" / "c.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    second = read()
    assert second[0] != first[0] and second[1] != first[1]
    (root / "data.yaml").write_text("names: [cat, bird]\n")
    third = read()
    assert third[0] != second[0]
    (tmp_path / "n.txt").write_text("cat\nbird\n")
    assert read(classes=str(tmp_path / "n.txt")) == third
    (root / "labels" / "train" / "d.txt").write_text("1 0.5 0.5 0.2 0.2\n")  # told, so told again
    assert read()[0] != third[0] and read()[1] == third[1]
    (tmp_path / "other").mkdir()
    root = root.rename(tmp_path / "other" / "set")
    assert read()[1] == third[1]


@pytest.mark.user_input("YOLO and VOC folders", "images that EXIF turns", "read as `data.exif_orientation` says")
def test_shares_are_of_the_image_as_it_is_read(tmp_path):
    pixels = paint(40, 60, [])
    root = write_yolo(tmp_path / "set", {"train": coco_json({"a.jpg": (40, 60)}, [(0, 3, [6, 4, 12, 8], {})])}, {})
    (root / "images" / "train").mkdir(parents=True, exist_ok=True)
    content = saved(pixels, "JPEG", **turned(6))
    (root / "images" / "train" / "a.jpg").write_bytes(content)
    stored = opened(root, tmp_path, ["train"], source="folder")
    upright = opened(root, tmp_path, ["train"], source="folder", exif_orientation="upright")
    np.testing.assert_allclose(boxes(stored)[0][2], [6, 4, 12, 8], atol=1e-4)
    np.testing.assert_allclose(boxes(upright)[0][2], [4, 6, 8, 12], atol=1e-4)
    assert images.NOT_TURNED in stored.splits["train"].log[0]["reason"]


def turned(orientation: int) -> dict:
    exif = Image.Exif()
    exif[274] = orientation
    return {"exif": exif.tobytes()}
