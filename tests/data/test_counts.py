"""Nothing is dropped uncounted: what json, names and classes may hold, the sentence for it, and the counts."""

import gzip
import json
import shutil
import unicodedata

import numpy as np
import pytest

from kdjax import data
from kdjax.errors import UserError
from tests.support.data import coco_json, opened, paint, settings, write_folder

SIZES = {"a.png": (40, 50), "b.png": (40, 50)}
BOX = [5, 5, 10, 10]
HIDDEN, SHOWN = "caf\u0065\u0301", "caf\u00e9"  # NFD and NFC of the same word


def folder(tmp_path, change=None, sizes=SIZES):
    truth = coco_json(sizes, [(0, 3, BOX, {}), (1, 11, BOX, {})])
    if change:
        change(truth)
    names = [*sizes, "dir/c.png", HIDDEN + "/" + HIDDEN + ".png"]
    pixels = {name: paint(40, 50, []) + np.uint8(i) for i, name in enumerate(names)}
    (tmp_path / "set" / "images" / "train").mkdir(parents=True, exist_ok=True)
    return write_folder(tmp_path / "set", {"train": truth}, pixels)


def lines(root, tmp_path, **changes):
    return data.counted(opened(root, tmp_path, ["train"], **changes), "train", settings(tmp_path))


@pytest.mark.user_input(
    "COCO json", '`ignore` of 1, true or a text such as "1"', "counted as ignored: a crowd region, for evaluation alone"
)
@pytest.mark.parametrize("value", [1, True, "1", "yes"])
def test_objects_marked_ignore_are_crowd_regions(tmp_path, value):
    root = folder(tmp_path, lambda t: t["annotations"][0].update(ignore=value))
    dataset = opened(root, tmp_path, ["train"])
    assert data.counted(dataset, "train", settings(tmp_path)) == [
        "train ('train'): 2 images, 1 without objects, 1 boxes, at most 1 per image, 1 crowd regions or difficult "
        "objects (used in evaluation only)",
        "train: 1 ignored: marked ignore: taken as a crowd region",
        "train: 1 noted: class without objects: cat",
    ]
    assert [a["iscrowd"] for a in data.ground_truth(dataset, "train")["annotations"]] == [1, 0]
    assert [len(dataset.splits["train"].records[i]["boxes"]) for i in (0, 1)] == [0, 1]


@pytest.mark.user_input("COCO json", '`ignore` of 0, false, null or "0"', "read as an object")
@pytest.mark.parametrize("value", [0, False, None, "0"])
def test_objects_not_marked_ignore_are_objects(tmp_path, value):
    root = folder(tmp_path, lambda t: t["annotations"][0].update(ignore=value))
    assert lines(root, tmp_path) == ["train ('train'): 2 images, 0 without objects, 2 boxes, at most 1 per image"]


@pytest.mark.user_input("COCO json", "an annotation twice", "counted as noted: class and box are those of another one")
@pytest.mark.user_input("Images and videos", "an image twice in a split, or in both, byte for byte", "counted as noted")
def test_repeated_images_and_annotations_are_noted(tmp_path):
    """In one split, which trains and measures twice, and in both, which measures what was learned by heart."""
    boxes = {"a.png": [(5, 5, 15, 15)], "b.png": [(5, 5, 15, 15)], "c.png": [(5, 5, 25, 15)]}
    pixels = {name: paint(40, 50, [*of]) for name, of in boxes.items()}
    train = coco_json(
        dict.fromkeys(("a.png", "b.png"), (40, 50)), [(0, 3, BOX, {}), (1, 11, BOX, {}), (1, 11, BOX, {})]
    )
    val = coco_json(dict.fromkeys(("b.png", "c.png"), (40, 50)), [(0, 3, BOX, {}), (1, 11, BOX, {})])
    root = write_folder(tmp_path / "set", {"train": train, "val": val}, pixels)
    dataset, cfg = opened(root, tmp_path), settings(tmp_path)
    assert data.counted(dataset, "train", cfg)[1:] == [
        "train: 1 noted: class and box are, digit for digit, those of another annotation of the image",
        "train: 1 noted: image that is, byte for byte, another one of the split",
    ]
    assert data.counted(dataset, "val", cfg)[1:] == [
        "val: 1 noted: image that is, byte for byte, also in the training split"
    ]
    told = "val: 1 noted: image that is, byte for byte, also in the training split"
    assert told in data.counted(opened(root, tmp_path, limit=1), "val", cfg)
    assert len(data.counted(opened(root, tmp_path, ["val"]), "val", cfg)) == 1


@pytest.mark.user_input("COCO json", "an annotation without bbox, or with null", "counted as dropped: bbox is missing")
@pytest.mark.user_input(
    "COCO json", "an annotation with only polygons or RLE", "counted as repaired: bbox is set to the box of the mask"
)
@pytest.mark.user_input("COCO json", "a box with text inside, or turned", "counted as dropped: not four finite numbers")
@pytest.mark.user_input("COCO json", "an area that is a list", "counted as repaired: set to the area of the box")
def test_a_missing_box_is_counted(tmp_path):
    segmentations = [[[6, 5, 15, 5, 15, 15]], {"size": [40, 50], "counts": [100, 50, 1850]}]
    spoilt = [
        *({"bbox": None, "segmentation": one} for one in (None, [], *segmentations)),
        *({"bbox": bbox} for bbox in ([1, 2, "3", 4], [1, 2, 3, 4, 30], "1 2 3 4", {"x": 1})),
        {"bbox": BOX, "area": [100]},
    ]

    def change(truth):
        del truth["annotations"][0]["bbox"]
        truth["annotations"] += [dict(id=10 + i, image_id=10, category_id=3) | one for i, one in enumerate(spoilt)]

    assert lines(folder(tmp_path, change), tmp_path) == [
        "train ('train'): 2 images, 0 without objects, 4 boxes, at most 3 per image, 2 with masks and 2 without",
        "train: 3 dropped: bbox is missing",
        "train: 4 dropped: bbox is not four finite numbers",
        "train: 1 repaired: area is not a number >= 0: set to the area of the box",
        "train: 2 repaired: bbox is missing: set to the box of the mask",
    ]


@pytest.mark.user_input(
    "COCO json", "a class name with a line break or of 5,000 letters", "read: shown in one line, cut to 40 letters"
)
def test_names_of_classes_do_not_break_the_table(tmp_path):
    names = ("red\nish", "r" * 5000)

    def change(truth):
        del truth["annotations"][1]
        for entry, name in zip(truth["categories"], names, strict=True):
            entry["name"] = name

    dataset = opened(one_of_both(folder(tmp_path, change)), tmp_path)
    assert dataset.classes == names
    text = data.summary(dataset, settings(tmp_path))
    assert max(map(len, text.splitlines())) < 120
    assert f"red\\nish{' ' * 32}       1       1       0       0       1       1       0       0\n" in text
    assert f"{'r' * 39}…       0       0       0       0       0       0       0       0\n" in text
    assert f"train: 1 noted: class without objects: {'r' * 39}…\n" in text


def one_of_both(root):
    """The val split is a copy of the train split."""
    shutil.copytree(root / "images" / "train", root / "images" / "val")
    shutil.copy(root / "annotations" / "instances_train.json", root / "annotations" / "instances_val.json")
    return root


@pytest.mark.user_input("COCO json", '`iscrowd` of "1" or "true"', "read as a crowd region")
@pytest.mark.user_input("COCO json", '`iscrowd` of "0", 2 or a list', "counted as repaired: set to 0")
@pytest.mark.parametrize(("value", "taken"), [("1", 1), ("true", 1), ("0", 0), (2, 0), ([], 0)])
def test_iscrowd_as_text_is_read(tmp_path, value, taken):
    [line, told, *_] = lines(folder(tmp_path, lambda t: t["annotations"][0].update(iscrowd=value)), tmp_path)
    assert (", 1 crowd region" in line) == bool(taken)
    assert told == (
        "train: 1 noted: class without objects: cat"
        if taken
        else "train: 1 repaired: iscrowd is neither 0 nor 1: set to 0"
    )


@pytest.mark.user_input("COCO json", "a box without extent in float32", "counted as dropped, with this reason")
@pytest.mark.user_input(
    "COCO json", "a box of less than a pixel on the canvas", "counted as left out, with this reason"
)
@pytest.mark.user_input(
    "COCO json", "boxes over `max_boxes`, images after `limit`", "counted as left out, with this reason"
)
@pytest.mark.user_input("COCO json", "a class without objects", "counted as noted")
def test_every_object_that_does_not_reach_training_is_counted(tmp_path):
    """Beside what the json's check drops: by float32, by the canvas, by max_boxes, by limit."""

    def change(truth):
        truth["annotations"] += [
            dict(id=10 + i, image_id=10, category_id=3, bbox=bbox)
            for i, bbox in enumerate([[40, 30, 1e-9, 5], [1, 1, 0.3, 5], [2, 2, 3, 3], [0, 0, 30, 30], [99, 1, 2, 2]])
        ]
        truth["annotations"].append(dict(id=20, image_id=11, category_id=3, bbox=[99, 1, 2, 2]))

    root = folder(tmp_path, change)
    dataset = opened(root, tmp_path, ["train"], max_boxes=2, limit=1)
    cfg = settings(tmp_path)
    assert data.counted(dataset, "train", cfg) == [
        "train ('train'): 1 images, 0 without objects, 4 boxes, at most 4 per image",
        "train: 1 dropped: box has no extent in float32",
        "train: 1 dropped: box outside the image",
        "train: 2 left out: box over max_boxes=2 of an image, the smallest first",
        "train: 1 left out: box too small, less than a pixel on the canvas at every scale",
        "train: 1 left out: image after the first 1, as limit says",
        "train: 1 noted: class without objects: dog",
    ]
    stored = dataset.splits["train"].records[0]
    assert len(stored["boxes"]) == 4
    assert data.count(dataset, "train", cfg).dropped == 2


def test_evaluation_tells_of_objects_without_masks(tmp_path):
    def change(truth):
        for entry in truth["annotations"][:drawn]:
            x, y, w, h = entry["bbox"]
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
        for entry in truth["annotations"][drawn:]:
            entry.pop("segmentation", None)

    for drawn, what in ((1, "which metrics of masks ignore"), (0, "no object has one, so there are no metrics")):
        root = folder(tmp_path / str(drawn), change)
        shutil.copytree(root / "images" / "train", root / "images" / "val")
        annotations = root / "annotations"
        shutil.copy(annotations / "instances_train.json", annotations / "instances_val.json")
        dataset, cfg = opened(root, tmp_path), settings(tmp_path)
        objects = data.count(dataset, "val", cfg).objects
        plain = data.counted(dataset, "val", cfg)
        [told] = [line for line in data.counted(dataset, "val", {**cfg, "masks": True}) if line not in plain]
        assert told.startswith(f"val: {objects - drawn} noted: object without mask") and what in told


@pytest.mark.user_input(
    "COCO json", "a json in which everything is a crowd region or ignored", "refused: objects must have iscrowd: 0"
)
@pytest.mark.user_input(
    "COCO json",
    "a class name that is blank, a number, or half a character",
    "refused: must be text that can be seen, that UTF-8 can hold",
)
@pytest.mark.user_input("COCO json", "class names that differ by spaces or Unicode form alone", "refused: rename one")
@pytest.mark.user_input(
    "COCO json", "a spare category of the same name (Roboflow)", "refused: delete 0, which no annotation has"
)
@pytest.mark.user_input("COCO json", 'an id as 10.0 or "3" in an annotation', "refused: must be the integer 10")
@pytest.mark.user_input("COCO json", "a file_name that is a number", "refused: must be text")
@pytest.mark.user_input(
    "Folders and names", "one file under two names (a.png, ./x/../a.png)", "refused: list each image once"
)
@pytest.mark.user_input(
    "Folders and names", "a file_name with a space before it", "refused: there is a.png: write this name"
)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: [a.update(iscrowd=1) for a in t["annotations"]],
            "all annotations are crowd regions: objects must have iscrowd: 0",
        ),
        (
            lambda t: [a.update(ignore=1) for a in t["annotations"]],
            "all annotations are crowd regions or have ignore: 1: objects must have iscrowd: 0",
        ),
        (
            lambda t: t["categories"][0].update(name=" \u200b"),
            "category 3: its name ' \\u200b' is blank: must be text that can be seen",
        ),
        (lambda t: t["categories"][0].update(name=7), 'category 3: its name is 7: must be text, as "7"'),
        (
            lambda t: t["categories"][0].update(name="r\ud83d"),
            "category 3: its name 'r\\ud83d' has a lone surrogate, half of a character: must be text that UTF-8 can "
            "hold",
        ),
        (
            lambda t: (t["categories"][0].update(name=HIDDEN), t["categories"][1].update(name=SHOWN)),
            f"two categories have the name '{SHOWN}', 3 and 11, in another Unicode form or with spaces around it: "
            "rename one",
        ),
        (
            lambda t: t["categories"][1].update(name="cat "),
            "two categories have the name 'cat ', 3 and 11, in another Unicode form or with spaces around it: rename "
            "one",
        ),
        (
            lambda t: t["categories"].append(dict(id=0, name="cat")),
            "two categories have the name 'cat', 3 and 0: delete 0, which no annotation has",
        ),
        (
            lambda t: t["annotations"][0].update(image_id=10.0),
            "annotation 1: image 10.0 is not among the images: must be the integer 10",
        ),
        (
            lambda t: t["annotations"][0].update(category_id="3"),
            "annotation 1: category '3' is not among the categories: must be the integer 3",
        ),
        (
            lambda t: t["annotations"][0].update(category_id=2),
            "annotation 1: category 2 is not among the categories: they are 3, 11",
        ),
        (lambda t: t["images"][0].update(file_name=7), "image 10: its file_name is 7: must be text"),
        (
            lambda t: t["images"][1].update(file_name="./x/../a.png"),
            "a.png and ./x/../a.png are one file: list each image once",
        ),
        (
            lambda t: t["images"][1].update(file_name=" a.png"),
            " a.png: no such file in FOLDER: there is a.png: write this name",
        ),
        (
            lambda t: t["images"][1].update(file_name="x\\a.png"),
            "x\\a.png: no such file in FOLDER: the name has backslashes",
        ),
    ],
)
def test_what_cannot_be_decided_is_refused_in_one_sentence(tmp_path, change, sentence):
    (tmp_path / "set" / "images" / "train" / "x").mkdir(parents=True)
    root = folder(tmp_path, change)
    folder(tmp_path / "other")  # files of all names
    for name in SIZES:
        (root / "images" / "train" / name).write_bytes(
            (tmp_path / "other" / "set" / "images" / "train" / name).read_bytes()
        )
    with pytest.raises(UserError) as refused:
        opened(root, tmp_path, ["train"])
    assert str(refused.value) == f"instances_train.json: {sentence}".replace("FOLDER", str(root / "images" / "train"))


@pytest.mark.user_input(
    "Folders and names", "backslashes in a file_name", "refused: the name has backslashes: write dir/c.png"
)
def test_backslashes_are_told_from_slashes(tmp_path):
    root = folder(tmp_path, sizes={"a.png": (40, 50), "dir/c.png": (40, 50)})
    path = root / "annotations" / "instances_train.json"
    path.write_text(path.read_text().replace("dir/c", "dir\\\\c"))
    where = root / "images" / "train"
    with pytest.raises(UserError) as refused:
        opened(root, tmp_path, ["train"])
    assert str(refused.value).endswith(
        f"dir\\c.png: no such file in {where}: the name has backslashes: write dir/c.png"
    )


@pytest.mark.user_input("COCO json", "a json in UTF-16 or UTF-32", "refused: it is UTF-16: must be UTF-8")
@pytest.mark.user_input("COCO json", "a json in Latin-1", "refused: names the byte that is not UTF-8")
@pytest.mark.user_input("COCO json", "a json compressed with gzip", "refused: unpack it")
@pytest.mark.user_input("COCO json", "a json with a value on each line", "refused: must be one object")
@pytest.mark.user_input(
    "COCO json", "a git-lfs pointer or an HTML page instead of a json", "refused: download the file itself"
)
@pytest.mark.parametrize(
    ("packed", "sentence"),
    [
        (lambda text: text.encode("utf-16"), "not valid json: it is UTF-16: must be UTF-8"),
        (lambda text: text.encode("utf-16-le"), "not valid json: it is UTF-16-LE: must be UTF-8"),
        (lambda text: text.encode("utf-32"), "not valid json: it is UTF-32: must be UTF-8"),
        (lambda text: gzip.compress(text.encode()), "it is compressed with gzip: unpack it"),
        (
            lambda text: text.replace("cat", "gr\u00fcn").encode("latin-1"),
            "not valid json: byte 0xfc at AT is not UTF-8: must be UTF-8",
        ),
        (
            lambda text: (text + "\n" + text).encode(),
            "not valid json: it has several values, as one on each line: must be one object",
        ),
        (
            lambda text: b"version https://git-lfs.github.com/spec/v1\n",
            "it is a pointer of git-lfs, not the annotations: download them with `git lfs pull`",
        ),
        (
            lambda text: b"<!DOCTYPE html><html>",
            "it is an HTML or XML page, not annotations: download the file itself, not its page",
        ),
    ],
)
def test_a_json_in_another_form_is_called_so(tmp_path, packed, sentence):
    path = folder(tmp_path) / "annotations" / "instances_train.json"
    text = path.read_text()
    path.write_bytes(packed(text))
    with pytest.raises(UserError) as refused:
        opened(tmp_path / "set", tmp_path, ["train"])
    assert str(refused.value) == f"{path}: {sentence}".replace("AT", str(text.index("cat") + 2))


@pytest.mark.user_input(
    "Folders and names", "a file whose name on disk has another Unicode form (macOS)", "counted as noted, and read"
)
@pytest.mark.user_input("Folders and names", "one file under two Unicode forms", "refused: list each image once")
def test_names_in_another_unicode_form_are_found_and_counted(tmp_path):
    name = f"{HIDDEN}/{HIDDEN}.png"
    root = folder(tmp_path, sizes={"a.png": (40, 50), name: (40, 50)})
    path = root / "annotations" / "instances_train.json"
    truth = json.loads(path.read_text())
    truth["images"][1]["file_name"] = unicodedata.normalize("NFC", name)
    path.write_text(json.dumps(truth))
    assert lines(root, tmp_path)[1:] == ["train: 1 noted: its name on disk is in another Unicode form"]
    truth["images"][0]["file_name"] = name
    path.write_text(json.dumps(truth))
    with pytest.raises(UserError, match=r"are one file: list each image once$"):
        opened(root, tmp_path, ["train"])


@pytest.mark.user_input(
    "COCO json", "a class whose Unicode form differs between train and val", "refused: write both in one form (NFC)"
)
def test_classes_in_another_unicode_form_are_told(tmp_path):
    pixels = dict.fromkeys(SIZES, paint(40, 50, []))
    train, val = (coco_json(SIZES, [(0, 1, BOX, {})], [(1, name)]) for name in (SHOWN, HIDDEN))
    root = write_folder(tmp_path / "set", {"train": train, "val": val}, pixels)
    with pytest.raises(UserError) as refused:
        opened(root, tmp_path)
    assert str(refused.value) == (
        f"val split: category 1 is '{HIDDEN}': the train split calls it '{SHOWN}', in another Unicode form: write both "
        "in one form (NFC)"
    )


@pytest.mark.user_input(
    "COCO json", "the largest annotation id of 64 bits", "read; ids that replace others stay in 64 bits"
)
def test_spare_annotation_ids_stay_in_64_bits(tmp_path):
    def change(truth):
        truth["annotations"][0]["id"] = 2**63 - 1
        truth["annotations"][1]["id"] = 2**63
        truth["annotations"].append(dict(truth["annotations"][1], id=1))

    dataset = opened(folder(tmp_path, change), tmp_path, ["train"])
    assert [a["id"] for a in data.ground_truth(dataset, "train")["annotations"]] == [2**63 - 1, 2, 1]
