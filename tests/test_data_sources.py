"""Opening data sets: folders with all that real ones have wrong, prepared TFDS directories, the scenes, the cache."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdjax import data
from kdjax.data import cache, prepare, scenes
from kdjax.evals.voc import voc_metrics
from tests.data_tools import COLOURS, coco_json, paint, read_off, settings, small_folder, write_folder
from tests.shared import SHARED

ROOT = Path(__file__).resolve().parents[1]


def opened(root, tmp_path, **changes):
    return data.open_dataset(settings(tmp_path / "cache", root=root, **changes))


def one_split(root, truth, pixels, **kwargs):
    """A folder whose train and val are the same."""
    return write_folder(root, {"train": truth, "val": truth}, pixels, **kwargs)


def by_image(truth: dict) -> list[dict]:
    """The annotations in the order of their images."""
    place = {image["id"]: position for position, image in enumerate(truth["images"])}
    return sorted(truth["annotations"], key=lambda a: place[a["image_id"]])


def perfect_ap(truth: dict) -> float:
    """pycocotools' AP of the ground truth given back as detections."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = json.loads(json.dumps(truth))
        ground.createIndex()
        found = [
            dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=1.0)
            for a in truth["annotations"]
            if not a["iscrowd"]
        ]
        evaluation = COCOeval(ground, ground.loadRes(found), "bbox")
        evaluation.params.maxDets = [1, 10, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    return float(precision[precision > -1].mean())


# Folders in COCO layout


def test_a_folder_comes_back_as_it_is(tmp_path):
    root = small_folder(tmp_path / "set")
    path = root / "annotations" / "instances_train.json"
    listed = [{"id": 1, "name": "CC BY 4.0", "url": "https://example.org"}, {"id": 2, "name": "", "url": ""}, "?"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"licenses": listed}))
    dataset = opened(root, tmp_path)
    assert dataset.licenses == ("CC BY 4.0, https://example.org",)
    assert dataset.name == "set" and dataset.classes == ("cat", "dog") and dataset.category_ids == (3, 11)
    assert dataset.max_boxes == 8 and {role: s.size for role, s in dataset.splits.items()} == {"train": 11, "val": 3}
    truth = json.loads((root / "annotations" / "instances_train.json").read_text())
    ours = data.ground_truth(dataset, "train")
    assert ours["images"] == truth["images"] and ours["categories"] == truth["categories"]
    filled = [a | {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3]} for a in truth["annotations"]]
    assert ours["annotations"] == filled
    for index, entry in enumerate(truth["images"]):
        example = dataset.splits["train"].records[index]
        path = root / "images" / "train" / entry["file_name"]
        np.testing.assert_array_equal(example["image"], cv2.imread(str(path))[:, :, ::-1])
        mine = [a for a in truth["annotations"] if a["image_id"] == entry["id"]]
        boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]).reshape(-1, 4)
        np.testing.assert_allclose(example["boxes"], boxes, rtol=1e-6)
        assert example["labels"].tolist() == [dataset.category_ids.index(a["category_id"]) for a in mine]
        assert example["image_id"] == entry["id"]
        # Kept as they are on the disk, not encoded anew.
        assert dataset.splits["train"].records.raw(index)["image"] == path.read_bytes()


def test_limit_takes_the_first_images(tmp_path):
    root = small_folder(tmp_path / "set")
    dataset = opened(root, tmp_path, limit=2)
    assert [s.size for s in dataset.splits.values()] == [2, 2]
    truth = data.ground_truth(dataset, "train")
    assert [i["id"] for i in truth["images"]] == [10, 11]
    assert {a["image_id"] for a in truth["annotations"]} == {11}
    assert len(data.ground_truth(dataset, "train", limit=1)["images"]) == 1


@pytest.mark.parametrize(
    "images, changes",
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


def test_explicit_annotations_and_other_split_names(tmp_path):
    truth = coco_json({"a.png": (20, 30)}, [(0, 3, [2, 3, 10, 12], {})])
    root = write_folder(tmp_path / "set", {"fit": truth, "test": truth}, {"a.png": paint(20, 30, [])})
    (root / "mine.json").write_text(json.dumps(truth))
    dataset = opened(root, tmp_path, train_split="fit", val_split="test", val_annotations="mine.json")
    assert dataset.splits["train"].name == "fit" and dataset.splits["val"].size == 1


def test_roboflow_layout(tmp_path):
    truth = coco_json({"a.png": (20, 30)}, [(0, 3, [2, 3, 10, 12], {})])
    root = write_folder(tmp_path / "set", {"train": truth, "valid": truth}, {"a.png": paint(20, 30, [])}, images="{}")
    for split in ("train", "valid"):
        shutil.move(root / "annotations" / f"instances_{split}.json", root / split / "_annotations.coco.json")
    assert opened(root, tmp_path, val_split="valid").splits["val"].size == 1


def test_file_names_that_begin_with_the_split(tmp_path):
    truth = coco_json({"train/a.png": (20, 30)}, [])
    root = write_folder(tmp_path / "set", {"train": truth}, {"train/a.png": paint(20, 30, [])}, images="images")
    changes = dict(val_split="train")
    assert opened(root, tmp_path, **changes).splits["train"].size == 1


def test_what_cannot_be_used_is_dropped_or_repaired_and_told(tmp_path):
    good = [5, 5, 10, 10]
    annotations = [
        (0, 3, good, {}),
        (0, 3, [5, 5, 0, 10], {}),  # no extent
        (0, 3, [5, 5, 10, -3], {}),
        (0, 3, [100, 5, 10, 10], {}),  # outside
        (0, 11, [-4, -2, 10, 10], {}),  # sticks out
        (0, 11, [1, 2, 3], {}),  # not a box
        (0, 11, [float("nan"), 2, 3, 4], {}),
        (0, 11, [1, 2, 10**400, 4], {}),
        (0, 3, good, {"id": 1}),  # id twice
        (0, 3, good, {"id": 0}),
        (0, 3, good, {"id": 2**70}),
        (0, 3, good, {"iscrowd": "0", "area": -1.0}),
        (1, 3, [0, 0, 30, 30], {"iscrowd": 1, "area": 55.5, "segmentation": {"size": [40, 50], "counts": "x"}}),
    ]
    truth = coco_json({"a.png": (40, 50), "b.png": (40, 50), "c.png": (40, 50)}, annotations)
    del truth["images"][2]["width"]
    root = one_split(tmp_path / "set", truth, dict.fromkeys(("a.png", "b.png", "c.png"), paint(40, 50, [])))
    dataset = opened(root, tmp_path)
    log = dataset.splits["train"].log
    assert [(e["file"], e["annotation"], e["action"], e["reason"].split(":")[0]) for e in log] == [
        ("a.png", 2, "dropped", "box without extent"),
        ("a.png", 3, "dropped", "box without extent"),
        ("a.png", 6, "dropped", "bbox is not four finite numbers"),
        ("a.png", 7, "dropped", "bbox is not four finite numbers"),
        ("a.png", 8, "dropped", "bbox is not four finite numbers"),
        ("a.png", 1, "repaired", "annotation id missing, double or below 1"),
        ("a.png", 0, "repaired", "annotation id missing, double or below 1"),
        ("a.png", 2**70, "repaired", "annotation id missing, double or below 1"),
        ("a.png", 12, "repaired", "iscrowd is neither 0 nor 1"),
        ("a.png", 12, "repaired", "area is no number of at least 0"),
        ("a.png", 4, "dropped", "box outside the image"),
        ("a.png", 5, "repaired", "box clipped to the image"),
        ("c.png", None, "repaired", "width and height taken from the image"),
    ]
    ours = data.ground_truth(dataset, "train")
    ids = [a["id"] for a in ours["annotations"]]
    assert len(set(ids)) == len(ids) == 7 and min(ids) > 0
    assert ours["images"][2]["width"] == 50
    # Evaluation sees the json's box and the crowd region, training the visible part and no crowd.
    assert [-4, -2, 10, 10] in [a["bbox"] for a in ours["annotations"]]
    crowd = [a for a in ours["annotations"] if a["iscrowd"]]
    assert len(crowd) == 1 and crowd[0]["area"] == 55.5 and crowd[0]["segmentation"]["counts"] == "x"
    first, second = (dataset.splits["train"].records[i] for i in (0, 1))
    square = [5, 5, 15, 15]
    np.testing.assert_allclose(first["boxes"], [square, [0, 0, 6, 8], *[square] * 4])
    assert second["boxes"].shape == (0, 4)
    text = data.summary(dataset, settings(tmp_path, image_size=(48, 64)))
    for part in ("3 images, 2 without objects, 6 boxes", "1 crowd region", "canvas 48x64", "2 dropped: box without"):
        assert part in text, text
    assert "a.png annotation 5: repaired, box clipped to the image" in text


def test_the_dry_run_says_where_the_whole_list_is(tmp_path):
    truth = coco_json({"a.png": (40, 50)}, [(0, 3, [60, 5, 10, 10], {})] * 25)
    dataset = opened(one_split(tmp_path / "set", truth, {"a.png": paint(40, 50, [])}), tmp_path)
    text = data.summary(dataset, settings(tmp_path, image_size=(48, 64)))
    path = re.search(r"and 5 more, all of them in (\S+)", text)[1]
    assert len(json.loads(Path(path).read_text())["train"]) == 25


def broken(changes):
    """A folder's json after `changes(truth)`."""
    truth = coco_json({"a.png": (40, 50), "b.png": (40, 50)}, [(0, 3, [5, 5, 10, 10], {}), (1, 11, [1, 1, 9, 9], {})])
    changes(truth)
    return truth


@pytest.mark.parametrize(
    "changes, words",
    [
        (lambda t: t["annotations"][1].update(image_id=99), "annotation 2 is of image 99"),
        (lambda t: t["annotations"][1].update(category_id=4), "annotation 2 has the category 4"),
        (lambda t: t["annotations"][0].pop("image_id"), "annotation 1 is of image None"),
        (lambda t: [a.update(bbox=[0.1, 0.2, 0.5, 1]) for a in t["annotations"]], "as if they were fractions"),
        (lambda t: t["images"][1].update(id=10), "image id 10 appears twice"),
        (lambda t: t["images"][1].update(file_name="a.png"), "a.png is listed as two images"),
        (lambda t: t["images"][1].update(id="x"), "image id 'x' is not an integer"),
        (lambda t: t["images"][1].update(id=2**63), "image id 9223372036854775808 is not an integer .of 64"),
        (lambda t: t["images"][1].pop("file_name"), "image 11 has no file_name"),
        (lambda t: t["images"][1].update(file_name="gone.png"), "lists gone.png, which is not in"),
        (lambda t: t["images"][0].update(width=40, height=50), "a.png is 50x40.*says 40x50 .EXIF"),
        (lambda t: t["categories"][1].update(id=3), "category id 3 appears twice"),
        (lambda t: t["categories"][1].update(name="cat"), "two categories are called 'cat'"),
        (lambda t: t["categories"][1].pop("name"), "category 11 has no name"),
        (lambda t: t.pop("annotations"), "list of objects under 'annotations'"),
        (lambda t: t.update(images=[], annotations=[]), "lists no images"),
        (lambda t: t.update(categories=[], annotations=[]), "has no categories"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, changes, words):
    truth = broken(changes)
    images = dict.fromkeys(("a.png", "b.png"), paint(40, 50, []))
    root = one_split(tmp_path / "set", truth, images) if "images" in truth else tmp_path
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        opened(root, tmp_path)
    assert not list((tmp_path / "cache").glob("data/folder*")), "nothing half-made stays behind"


def test_messages_for_a_wrong_root_json_or_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        opened(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ValueError, match="config.data.root is empty"):
        opened("", tmp_path)
    root = small_folder(tmp_path / "set", count=3)
    with pytest.raises(FileNotFoundError, match="split 'test' has no instances json: looked for .*instances_test.json"):
        opened(root, tmp_path, val_split="test")
    (root / "annotations" / "instances_test.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="split 'test' has no folder of images"):
        shutil.move(root / "images", root / "moved")
        opened(root, tmp_path, val_split="test", train_images="images/train")
    shutil.move(root / "moved", root / "images")
    for spoilt in ("", '{"images": [', "[" * 100_000):
        (root / "annotations" / "instances_test.json").write_text(spoilt)
        with pytest.raises(ValueError, match="instances_test.json does not parse as json"):
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
        with pytest.raises(ValueError, match="p1.png cannot be read as an image"):
            opened(root, tmp_path)
    with pytest.raises(ValueError, match="source is 'coco', but must be one of coco_folder, scenes, tfds"):
        opened(root, tmp_path, source="coco")


def test_val_may_not_have_more_categories_than_train(tmp_path):
    image = {"a.png": paint(20, 30, [])}
    train, val = coco_json({"a.png": (20, 30)}, [], [(1, "cat")]), coco_json({"a.png": (20, 30)}, [], [(1, "dog")])
    with pytest.raises(ValueError, match="category 1 'dog', which instances_train.json calls 'cat'"):
        opened(write_folder(tmp_path / "set", {"train": train, "val": val}, image), tmp_path)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    from PIL import Image

    folder = tmp_path / "set" / "images"
    folder.mkdir(parents=True)
    colour = np.zeros((40, 50, 3), np.uint8)
    colour[:, :25] = (200, 40, 30)
    Image.fromarray(colour).convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    turned = Image.Exif()
    turned[274] = 6  # 'rotate by 90 degrees'
    Image.fromarray(colour).save(folder / "exif.jpg", exif=turned, quality=95)
    Image.fromarray(colour).convert("L").save(folder / "grey.png")
    Image.fromarray(np.full((40, 50), 40000, np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.dstack([colour, np.full((40, 50), 90, np.uint8)])).save(folder / "alpha.png")
    Image.fromarray(colour).quantize(4).save(folder / "palette.png")
    names = ("cmyk.jpg", "exif.jpg", "grey.png", "deep.png", "alpha.png", "palette.png")
    root = one_split(tmp_path / "set", coco_json(dict.fromkeys(names, (40, 50)), []), {}, images="images")
    dataset = opened(root, tmp_path)
    for index, name in enumerate(names):
        image = dataset.splits["train"].records[index]["image"]
        assert image.shape == (40, 50, 3) and image.dtype == np.uint8, name
        expected = {"grey.png": (87, 87, 87), "deep.png": (156, 156, 156)}.get(name, (200, 40, 30))
        np.testing.assert_allclose(image[20, 5], expected, atol=12, err_msg=name)


# The cache


def test_prepared_once_and_again_when_something_changes(tmp_path):
    root = small_folder(tmp_path / "set", count=3)

    def folders():
        opened(root, tmp_path)
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "data").iterdir() if p.is_dir()}

    first = folders()
    assert len(first) == 1 and folders() == first
    os.utime(root / "images" / "train" / "p1.png", (1, 1))
    second = folders()
    assert len(second) == 2
    path = root / "annotations" / "instances_val.json"
    path.write_text(path.read_text() + "\n")
    third = folders()
    assert len(third) == 3
    shutil.copy(root / "images" / "train" / "p1.png", root / "images" / "train" / "p9.png")
    assert len(folders()) == 4


def test_a_killed_preparation_leaves_nothing_half_usable(tmp_path):
    code = """
import sys, time
from pathlib import Path
from kdjax.data import cache
def write(folder):
    (folder / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
cache.prepared(Path(sys.argv[1]), "set", {"a": 1}, write)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    done = cache.prepared(tmp_path, "set", {"a": 1}, lambda folder: (folder / "whole").write_text("x"))
    assert [p.name for p in done.iterdir()] == ["whole"]
    assert cache.prepared(tmp_path, "set", {"a": 1}, lambda folder: pytest.fail("prepared twice")) == done


def test_damaged_prepared_data_is_named(tmp_path):
    root = small_folder(tmp_path / "set", count=3)
    opened(root, tmp_path)
    [folder] = [p for p in (tmp_path / "cache" / "data").iterdir() if p.is_dir()]
    [records] = folder.rglob("*val.array_record*")
    for path in (folder / "meta.json", folder / "val.json", folder / "log.json", records):
        whole = path.read_bytes()
        for spoil in (lambda path, whole: path.write_bytes(whole[: len(whole) // 2]), lambda path, _: path.unlink()):
            spoil(path, whole)
            with pytest.raises(ValueError, match=f"is damaged or gone; delete {folder}"):
                dataset = opened(root, tmp_path)
                data.ground_truth(dataset, "val")
                assert dataset.splits["val"].log == []
        path.write_bytes(whole)
    dataset = opened(root, tmp_path)
    assert dataset.splits["val"].size == 3
    # Damaged between its ends, which only reading it shows.
    records.write_bytes(whole[:200] + bytes(len(whole) - 400) + whole[-200:])
    with pytest.raises(data.Damaged, match=f"of {folder}/.* cannot be (read|decoded) any more; prepare it anew"):
        [dataset.splits["val"].records[index] for index in range(3)]
    with pytest.raises(data.Damaged):  # the loader's threads hand it on
        list(data.eval_batches(dataset, "val", settings(tmp_path), batch_size=2))


def test_the_cache_goes_where_it_is_told(monkeypatch, tmp_path):
    assert cache.root("x") == Path("x/data")
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path))
    assert cache.root() == tmp_path / "data"
    monkeypatch.delenv("KDJAX_CACHE")
    assert cache.root() == Path.home() / ".cache" / "kdjax" / "data"


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache: cannot write to .*file/data .Not a directory.: choose another"):
        data.open_dataset(settings(tmp_path / "file", source="scenes"))


# Prepared TFDS directories


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
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        Coco(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_a_stock_directory_is_read(stock, tmp_path):
    dataset = opened(stock, tmp_path, source="tfds")
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
        mine = [a for a in truth["annotations"] if a["image_id"] == i]
        assert [a["iscrowd"] for a in mine] == [0, 1][: min(i % 4, 2)]
        assert all(a["category_id"] == (i + a["id"] - 10 * i - 1) % 3 + 1 for a in mine)
    assert {(e["action"], e["reason"]) for e in dataset.splits["train"].log} == {("dropped", "box without extent")}
    assert perfect_ap(truth) == pytest.approx(1)
    assert opened(stock / "coco" / "1.1.0", tmp_path, source="tfds").splits["train"].size == 7


def test_a_stock_directory_is_scored_by_the_original_json(stock, tmp_path):
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
    dataset = opened(stock, tmp_path, source="tfds", val_annotations=str(path))
    assert dataset.category_ids == (5, 17, 90)
    ours = data.ground_truth(dataset, "val")
    assert {a["area"] for a in ours["annotations"]} == {76.54} and len(ours["annotations"]) == 5
    assert {a["category_id"] for a in data.ground_truth(dataset, "train")["annotations"]} <= {5, 17, 90}

    for spoil, words in [
        (lambda t: t["annotations"][0].update(category_id=5), "differ in the objects of image 101"),
        (lambda t: t["categories"][0].update(name="dodo"), "are not the classes of"),
        (lambda t: t["images"].pop(0), "does not list image 100"),
    ]:
        other = json.loads(json.dumps(truth))
        spoil(other)
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=words):
            opened(stock, tmp_path, source="tfds", val_annotations=str(path))


def test_stock_directories_that_do_not_fit_are_refused(stock, tmp_path):
    with pytest.raises(ValueError, match="has no split 'test', only train, validation"):
        opened(stock, tmp_path, source="tfds", val_split="test")
    with pytest.raises(FileNotFoundError, match="holds no prepared TFDS directory"):
        opened(tmp_path, tmp_path, source="tfds")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        opened(tmp_path / "nowhere", tmp_path, source="tfds")
    other = tmp_path / "other"
    shutil.copytree(stock / "coco" / "1.1.0", other)
    features = json.loads((other / "features.json").read_text())
    del features["featuresDict"]["features"]["image/id"]
    (other / "features.json").write_text(json.dumps(features))
    with pytest.raises(ValueError, match="lacks the features image/id"):
        opened(other, tmp_path, source="tfds")


class BadCoco(tfds.core.GeneratorBasedBuilder):
    """The spec of coco/2017 with boxes that TFDS's own feature would not take."""

    VERSION = tfds.core.Version("1.1.0")
    BOXES = {  # y1 x1 y2 x2 of an image of 50 x 40 px (height x width), and what becomes of it
        (0.2, 0.1, 0.6, 0.5): None,
        (-0.2, 0.1, 0.6, 1.5): "repaired",
        (0.2, 0.1, 0.6, 1.0 + 1e-4): None,  # rounding
        (0.2, 1.1, 0.6, 1.5): "dropped: box outside the image",
        (0.2, 0.5, 0.6, 0.5): "dropped: box without extent",
        (0.6, 0.1, 0.2, 0.5): "dropped: box without extent",
        (0.2, float("nan"), 0.6, 0.5): "dropped: bbox is not four finite numbers",
        (0.2, 0.1, float("inf"), 0.5): "dropped: bbox is not four finite numbers",
        (0.3, 0.1, 0.6, 0.5): "dropped: the label is none of the classes",
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


def test_what_cannot_be_used_of_a_stock_directory_is_dropped_or_repaired_and_told(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        BadCoco(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    dataset = opened(tmp_path / "tfds", tmp_path, source="tfds", val_split="train")
    split = dataset.splits["train"]
    said = {e["annotation"]: e["action"] + (": " + e["reason"]) * (e["action"] == "dropped") for e in split.log}
    assert [said.get(i) for i in range(1, 10)] == list(BadCoco.BOXES.values())
    example = split.records[0]
    expected = [[4, 10, 20, 30], [4, 0, 40, 30], [4, 10, 40, 30]]
    np.testing.assert_allclose(example["boxes"], expected, atol=1e-3)
    truth = data.ground_truth(dataset, "train")
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3]
    np.testing.assert_allclose(truth["annotations"][1]["bbox"], [4, -10, 56, 40], atol=1e-4)
    assert "2 dropped: box without extent" in data.summary(dataset, settings(tmp_path))
    [names] = (tmp_path / "tfds").rglob("*label*.txt")
    names.write_text("cat\n")
    split = opened(tmp_path / "tfds", tmp_path, source="tfds", val_split="train").splits["train"]
    assert [a["id"] for a in split.truth["annotations"]] == [2]
    np.testing.assert_allclose(split.records[0]["boxes"], expected[1:2], atol=1e-3)


class Voc(tfds.core.GeneratorBasedBuilder):
    """The feature spec of TFDS's voc. Image i has i % 4 painted boxes, the second is difficult."""

    NAMES = ("bird", "cat", "dog")
    SPLITS = {"2007": {"train": 3, "validation": 2, "test": 4}, "2012": {"train": 2, "validation": 3, "test": 1}}
    VERSION = tfds.core.Version("5.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=year) for year in SPLITS]

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
                    # As in VOC's files: pixels count from 1, and the last is inside.
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
            mine = [a for a in truth["annotations"] if a["image_id"] == position + 1]
            assert [a["iscrowd"] for a in mine] == [0, 1, 0][: i % 4]
            for a, (x0, y0, x1, y1) in zip(mine, Voc.boxes(i), strict=True):
                np.testing.assert_allclose(a["bbox"], [x0, y0, x1 - x0, y1 - y0], atol=1e-4)
                assert a["area"] == pytest.approx((x1 - x0) * (y1 - y0), rel=1e-5)
    truth = data.ground_truth(dataset, "val")
    found = [a | {"score": 1.0} for a in truth["annotations"]]
    assert voc_metrics(truth, found) == {"AP50": 1.0, "AP50_11point": 1.0}
    assert perfect_ap(truth) == pytest.approx(1)
    batches = data.train_batches(dataset, settings(tmp_path), batch_size=4, seed=0)
    assert next(batches)["image"].shape == (4, 48, 64, 3)
    batches.close()


def test_splits_of_several_directories_must_be_named(voc, tmp_path):
    for changes, words in [
        (
            dict(train_split="train"),
            "'train' could be of any of .*put a part of the path before it, as in '2007/train'",
        ),
        (dict(train_split="1999/train"), "no prepared TFDS directory under .* has '1999' in its path"),
        (dict(train_split="2007/train+2012/trainval"), "2012/5.0.0 has no split 'trainval', only .*train"),
    ]:
        with pytest.raises(ValueError, match=words):
            opened(voc, tmp_path, source="tfds", **{"val_split": "2007/test"} | changes)
    shutil.copytree(voc, tmp_path / "other")
    (tmp_path / "other" / "voc" / "2012" / "5.0.0" / "objects-label.labels.txt").write_text("cat\nbird\ndog\n")
    with pytest.raises(ValueError, match="do not have the same classes in the same order"):
        opened(tmp_path / "other", tmp_path, source="tfds", train_split=TRAINVAL, val_split="2007/test")


def test_preparing_needs_tensorflow_and_says_so(tmp_path, capsys):
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("it is installed")
    for arguments, words in [
        (["coco/2017"], "TFDS's builders need TensorFlow: pip install 'kdjax"),
        (["coco/2014"], "invalid choice: 'coco/2014'"),
    ]:
        with pytest.raises(SystemExit):
            prepare.main([f"--data_dir={tmp_path}", *arguments])
        assert words in capsys.readouterr().err


# Scenes


def test_scenes_are_prepared_like_a_folder(tmp_path):
    dataset = opened("", tmp_path, source="scenes", scenes_train=12, scenes_val=5)
    assert dataset.classes == scenes.CLASSES and [s.size for s in dataset.splits.values()] == [12, 5]
    truth = data.ground_truth(dataset, "train")
    seen = 0
    for index in range(12):
        image, objects = scenes.render("train", index)
        example = dataset.splits["train"].records[index]
        np.testing.assert_array_equal(example["image"], image)
        assert example["labels"].tolist() == [label for label, _, _ in objects]
        boxes = np.reshape([[x, y, x + w, y + h] for _, (x, y, w, h), _ in objects], (-1, 4))
        np.testing.assert_allclose(example["boxes"], boxes, atol=1e-4)
        assert (boxes >= 0).all() and (boxes <= scenes.SIDE).all()
        seen += len(objects)
    assert len(truth["annotations"]) == seen > 12 and perfect_ap(truth) == pytest.approx(1)


def test_a_scene_depends_on_split_and_index_alone():
    image, objects = scenes.render("val", 3)
    scenes.render("val", 4)
    again, same = scenes.render("val", 3)
    np.testing.assert_array_equal(image, again)
    assert objects == same
    assert not np.array_equal(image, scenes.render("train", 3)[0])


def test_scenes_hold_what_a_detector_needs_to_learn():
    drawn = [scenes.render("val", index)[1] for index in range(120)]
    labels = [label for objects in drawn for label, _, _ in objects]
    areas = np.array([area for objects in drawn for _, _, area in objects])
    assert set(labels) == set(range(len(scenes.CLASSES)))
    assert min(map(len, drawn)) == 0 and max(map(len, drawn)) >= 4
    assert (areas < 32**2).mean() > 0.2 and (areas > 32**2).mean() > 0.15


# The shared data sets


@pytest.mark.skipif(SHARED is None, reason="needs the team's shared folder")
@pytest.mark.parametrize("name", ["bccd", "coco_mini", "nuclei"])
def test_real_folders_are_read_completely(name, tmp_path):
    root = SHARED / "data" / name
    dataset = opened(root, tmp_path)
    for role, split in dataset.splits.items():
        original = json.loads((root / "annotations" / f"instances_{role}.json").read_text())
        truth = data.ground_truth(dataset, role)
        assert split.log == [] and split.size == len(split.records) == len(original["images"])
        for ours, theirs in zip(truth["annotations"], by_image(original), strict=True):
            assert ours == theirs
        if role == "val":  # train is the same code, and slow to score
            assert perfect_ap(truth) == pytest.approx(1)
        for index in range(0, split.size, 40):
            example = split.records[index]
            mine = [a["bbox"] for a in truth["annotations"] if a["image_id"] == example["image_id"]]
            np.testing.assert_allclose(
                example["boxes"][:, 2:] - example["boxes"][:, :2], np.reshape(mine, (-1, 4))[:, 2:], atol=0.01
            )
    assert dataset.splits["train"].size > 10
