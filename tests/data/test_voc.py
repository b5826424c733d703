"""Folders with VOC's xml: VOCdevkit and plain ones, what is refused, and that nothing is expanded."""

import numpy as np
import pytest

from kdjax import data
from kdjax.data import xml
from kdjax.errors import UserError
from tests.data.test_yolo import BOXES, PIXELS, SIZES, boxes, truth, turned
from tests.fuzz.media import saved
from tests.support.data import coco_json, opened, paint, settings
from tests.support.labels import voc_texts, write_images, write_texts, write_voc


def check_boxes(dataset, prefix="", role="train") -> None:
    names = [*SIZES]
    wanted = [(prefix + names[i], "dog" if c == 11 else "cat", b) for i, c, b, _ in BOXES]
    assert boxes(dataset, role) == wanted


@pytest.mark.user_input("YOLO and VOC folders", "VOC: VOCdevkit or one of its years, with ImageSets", "read")
@pytest.mark.user_input("YOLO and VOC folders", "VOC: several years joined, VOC2007/train+VOC2012/train", "read")
@pytest.mark.user_input(
    "YOLO and VOC folders", "VOC: a split that several years have, or none", "refused with what is there"
)
def test_vocdevkit(tmp_path):
    root = tmp_path / "VOCdevkit"
    later = coco_json({"z.png": (20, 30)}, [(0, 3, [1, 2, 3, 4], {})])
    write_voc(root / "VOC2007", {"train": truth(), "val": truth()}, PIXELS)
    check_boxes(opened(root, tmp_path, source="folder"), "VOC2007/JPEGImages/")
    check_boxes(opened(root / "VOC2007", tmp_path, source="folder"), "JPEGImages/", "val")
    write_voc(root / "VOC2012", {"train": later}, {"z.png": paint(20, 30, [])})
    both = opened(root, tmp_path, source="folder", train_split="2007/train+VOC2012/train")
    assert both.source == "voc_folder" and both.classes == ("cat", "dog") and both.splits["train"].size == 4
    assert boxes(both)[-1] == ("VOC2012/JPEGImages/z.png", "cat", [1, 2, 3, 4])
    with pytest.raises(UserError, match=r"split 'train': it is in VOC2007, VOC2012: write VOC2007/train, or join them"):
        opened(root, tmp_path, source="folder")
    with pytest.raises(UserError, match=r"split 'x': no list ImageSets/Main/x.txt in .*: there are train, val$"):
        opened(root, tmp_path, source="folder", train_split="x")
    file = root / "VOC2007" / "ImageSets" / "Main" / "val.txt"
    file.write_text("a  1\nb -1\n\nc.png\n")
    assert opened(root, tmp_path, ["val"], source="folder").splits["val"].size == 3
    file.write_text("a\nnone\n")
    with pytest.raises(UserError, match=r"Main/val.txt:2: image none is missing in .*/VOC2007/JPEGImages$"):
        opened(root, tmp_path, ["val"], source="folder")
    file.write_text("a\nb\na\n")
    with pytest.raises(UserError, match=r"Main/val.txt:3: image a is listed twice$"):
        opened(root, tmp_path, ["val"], source="folder")
    file.write_text("\n")
    with pytest.raises(UserError, match=r"Main/val.txt: it lists no images$"):
        opened(root, tmp_path, ["val"], source="folder")
    write_images(root / "VOC2007" / "JPEGImages", {"a.bmp": PIXELS["a.png"]})
    file.write_text("a\n")
    with pytest.raises(UserError, match=r"Main/val.txt:1: image a is there as a.bmp, a.png in"):
        opened(root, tmp_path, ["val"], source="folder")


@pytest.mark.user_input(
    "YOLO and VOC folders", "VOC: images and xml in SPLIT, or images/SPLIT and annotations/SPLIT", "read"
)
@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("{}", "{}"),
        ("images/{}", "annotations/{}"),
        ("JPEGImages/{}", "Annotations/{}"),
        ("{}/images", "{}/labels"),
        ("{}", "Annotations/{}"),
    ],
)
def test_plain_layouts(tmp_path, images, labels):
    root = tmp_path / "set"
    for split in ("train", "valid"):
        write_images(root / images.format(split), PIXELS)
        write_texts(root / labels.format(split), voc_texts(truth()), ".xml")
    dataset = opened(root, tmp_path, source="folder")
    assert dataset.source == "voc_folder" and dataset.splits["val"].log == []
    check_boxes(dataset, images.format("train") + "/")
    check_boxes(dataset, images.format("valid") + "/", "val")


@pytest.mark.user_input("YOLO and VOC folders", "VOC: an image without xml, an xml without image", "counted")
@pytest.mark.user_input("YOLO and VOC folders", "VOC: difficult objects", "read as crowd regions")
@pytest.mark.user_input(
    "YOLO and VOC folders",
    "VOC: boxes of no extent, not finite or outside, no size, another filename, an odd `difficult`",
    "counted with file and line",
)
def test_what_is_counted(tmp_path):
    root = tmp_path / "set"
    write_images(root / "pics", PIXELS)
    texts = voc_texts(coco_json(SIZES, [*BOXES, (1, 3, [1, 1, 5, 5], {"iscrowd": 1})]))
    write_texts(root / "marks", texts, ".xml")
    (root / "marks" / "c.xml").rename(root / "marks" / "spare.xml")

    def thing(box: str, more: str = "") -> str:
        return f"<object><name>cat</name>{more}{box}</object>\n"

    corners = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>".format
    rows = [thing(corners(9, 9, 5, 12)), thing(corners(9, "nan", 12, 12)), thing(corners(90, 5, 99, 9)), thing("")]
    rows += [thing(corners(0, 5, 9, 9)), thing(corners(4, 4, 4, 4), "<difficult>Unspecified</difficult>")]
    rows += [thing(corners(5.5, 5, 9, 9), "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>")]
    text = "<annotation><filename>other.png</filename>\n" + "".join(rows) + "</annotation>"
    (root / "marks" / "a.xml").write_text(text)
    changes = dict(train_images="pics", train_annotations="marks")
    dataset = opened(root, tmp_path, ["train"], source="folder", **changes)
    assert dataset.source == "voc_folder"
    counts = data.count(dataset, "train", settings(tmp_path / "cache"))
    assert (counts.images, counts.empty, counts.objects, counts.crowd) == (3, 1, 4, 1)
    log = [(e.get("place", e["file"]), e["action"], e["reason"]) for e in dataset.splits["train"].log]
    assert sorted(log) == sorted(
        [
            ("pics/c.png", "noted", "without a file of labels: taken as an image without objects"),
            ("marks/spare.xml", "noted", "labels without an image"),
            ("pics/a.png", "noted", "its xml names another file: those with the same name belong together"),
            ("pics/a.png", "noted", "width and height are missing in the xml: taken from the image"),
            ("marks/a.xml:2", "dropped", "box has no extent"),
            ("marks/a.xml:3", "dropped", "bbox is not four finite numbers"),
            ("marks/a.xml:4", "dropped", "box outside the image"),
            ("marks/a.xml:5", "dropped", "bbox is missing"),
            ("marks/a.xml:6", "repaired", "box clipped to the image"),
            ("marks/a.xml:7", "repaired", "difficult is neither 0 nor 1: set to 0"),
        ]
    )
    found = [box for name, _, box in boxes(dataset) if name == "pics/a.png"]
    assert found == [[-1, 4, 10, 5], [3, 3, 1, 1], [4.5, 4, 4.5, 5]]


@pytest.mark.user_input(
    "YOLO and VOC folders", "VOC: a class that `--classes` does not name", "refused with file and line"
)
def test_classes_are_all_names_or_those_given(tmp_path):
    root = tmp_path / "set"
    for split, name in (("train", "dog"), ("val", "cat")):
        write_images(root / split, {"a.png": PIXELS["a.png"]})
        one = coco_json({"a.png": (40, 60)}, [(0, 1, [6, 8, 12, 20], {})], ((1, name),))
        write_texts(root / split, voc_texts(one), ".xml")
    assert opened(root, tmp_path, ["val"], source="folder").classes == ("cat", "dog")
    known = opened(root, tmp_path, source="folder", classes="voc")
    assert len(known.classes) == 20 and [f[1] for f in boxes(known)] == ["dog"]
    (tmp_path / "n.txt").write_text("dog\n")
    with pytest.raises(UserError, match=r"val/a.xml:4: 'cat' is not among the classes: dog$"):
        opened(root, tmp_path, source="folder", classes=str(tmp_path / "n.txt"))


BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
XMLS = [
    ("", "a.xml:1: not valid xml: no element found"),
    ("<annotation>\n<object>\n", "a.xml:3: not valid xml: no element found"),
    ("<annotation>\n</object>\n", "a.xml:2: not valid xml: mismatched tag"),
    ("<html>\n</html>", "a.xml:1: its root is <html>: must be <annotation>"),
    (f"<annotation>\n<object>{BOX}</object></annotation>", "a.xml:2: the object has no name"),
    (f"<annotation>\n<object><name> </name>{BOX}</object></annotation>", "a.xml:2: the object has no name"),
    (
        "<annotation><object><name>x</name>\n<bndbox><xmin>1</xmin></bndbox></object></annotation>",
        "a.xml:2: <bndbox> has no <ymin>",
    ),
    (
        f"<annotation><object><name>x</name>\n{BOX.replace('9', 'nine')}</object></annotation>",
        "a.xml:2: xmax is 'nine': must be a number of pixels",
    ),
    (
        "<annotation>\n\n<size><width>40</width><height>60</height></size></annotation>",
        "a.xml:3: the size is 40x60, but train/a.png is 60x40: width and height are exchanged; if EXIF turns it, ",
    ),
    (
        "<annotation><size><width>30</width><height>60</height></size></annotation>",
        "a.xml:1: the size is 30x60, but train/a.png is 60x40: must be the image that was labelled",
    ),
    (
        '<!DOCTYPE a [\n<!ENTITY b "cc">]>\n<annotation>&b;</annotation>',
        "a.xml:2: it declares an entity: must be xml without any",
    ),
    (
        '<!DOCTYPE a [\n<!ENTITY b SYSTEM "file:///etc/passwd">]>\n<annotation>&b;</annotation>',
        "a.xml:2: it declares an entity: must be xml without any",
    ),
    ("<annotation>\n&b;</annotation>", "a.xml:2: not valid xml: undefined entity"),
    ('<?xml version="1.0" encoding="gbk"?><annotation/>', "a.xml:1: not valid xml: "),
    ("<annotation>" + "<a>" * 200 + "</a>" * 200 + "</annotation>", "a.xml:1: elements are nested over 100 deep"),
]


@pytest.mark.user_input(
    "YOLO and VOC folders",
    "VOC: xml that is empty, cut off, not VOC's, of another image size, with an object without name or corner",
    "refused with file and line",
)
@pytest.mark.user_input(
    "YOLO and VOC folders",
    "VOC: xml with entities, in DTDs or from other files",
    "refused: nothing is expanded or fetched",
)
def test_xml_that_is_refused(tmp_path):
    root = tmp_path / "set"
    write_images(root / "train", PIXELS)
    write_texts(root / "train", voc_texts(truth()), ".xml")
    for text, sentence in XMLS:
        (root / "train" / "a.xml").write_text(text)
        with pytest.raises(UserError) as refused:
            opened(root, tmp_path, ["train"], source="folder")
        assert f"{root}/train/{sentence}" in str(refused.value)


def test_xml_in_other_encodings_is_read():
    text = (
        '<?xml version="1.0" encoding="{}"?>\n<annotation>\n<name>caf\u00e9 &amp; <![CDATA[<x>]]></name></annotation>'
    )
    for encoding in ("utf-8", "utf-16", "iso-8859-1", "utf-8-sig"):
        root = xml.parse(text.format(encoding.removesuffix("-sig")).encode(encoding), "x.xml")
        name = root.get("name")
        assert name is not None and (name.text, name.line) == ("caf\u00e9 & <x>", 3)


def test_a_folder_without_objects_needs_names(tmp_path):
    root = tmp_path / "set"
    write_images(root / "train", PIXELS)
    write_texts(root / "train", voc_texts(coco_json(SIZES, [])), ".xml")
    with pytest.raises(UserError, match=r"set, split 'train': no xml has an object: --classes=coco, voc or FILE names"):
        opened(root, tmp_path, ["train"], source="folder")
    assert opened(root, tmp_path, ["train"], source="folder", classes="voc").splits["train"].size == 3
    for path in (root / "train").glob("*.xml"):
        path.unlink()
    with pytest.raises(UserError, match=r"split 'train': none of its 3 images has an xml"):
        opened(root, tmp_path, ["train"], source="voc_folder")


def test_sizes_follow_exif(tmp_path):
    root = tmp_path / "set"
    (root / "train").mkdir(parents=True)
    (root / "train" / "a.jpg").write_bytes(saved(paint(40, 60, []), "JPEG", **turned(6)))
    one = coco_json({"a.jpg": (60, 40)}, [(0, 3, [6, 8, 12, 20], {})])
    write_texts(root / "train", voc_texts(one), ".xml")
    with pytest.raises(UserError, match=r"a.xml:3: the size is 40x60, but .*--exif=upright"):
        opened(root, tmp_path, ["train"], source="folder")
    upright = opened(root, tmp_path, ["train"], source="folder", exif_orientation="upright")
    np.testing.assert_array_equal(boxes(upright)[0][2], [6, 8, 12, 20])
