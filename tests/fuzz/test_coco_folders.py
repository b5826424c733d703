"""Spoilt COCO folders: the counts are those of a slow reader, or the folder is refused in one sentence."""

import copy
import json
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from kdjax import data as kd
from kdjax.errors import UserError
from tests.fuzz.runs import fuzz
from tests.support.data import coco_json, opened, paint, settings, write_folder

HEIGHT, WIDTH = 40, 50
NAMES = ("a.png", "b.png", "sub/c.png", "caf\u00e9.png")
VALUES = (None, True, False, 0, 1, -1, 2, 0.5, 3.0, "", " ", "1", "x", [], [1], {}, 2**53 + 1, 2**63, 1e300, "\ud83d")
REFUSED = {"empty", "utf-16", "utf-32", "cut", "missing", "damaged"}


def sound() -> dict:
    boxes = [[2 + 11 * i, 3 + 7 * i, 9, 12] for i in range(3)]
    return coco_json(
        dict.fromkeys(NAMES, (HEIGHT, WIDTH)), [(i, (3, 11)[j % 2], boxes[j], {}) for i in range(4) for j in range(i)]
    )


def spoil(draw, truth: dict) -> None:
    """Changes one place of a json."""
    kind = draw(st.sampled_from(("images", "annotations", "annotations", "annotations", "categories")))
    entry = truth[kind][draw(st.integers(0, len(truth[kind]) - 1))]
    keys = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox", "iscrowd", "ignore", "area"),
        "categories": ("id", "name"),
    }
    key = draw(st.sampled_from(keys[kind]))
    how = draw(st.sampled_from(("value", "value", "remove", "twice", "number")))
    if how == "remove":
        entry.pop(key, None)
    elif how == "twice":
        truth[kind].append(copy.deepcopy(entry))
    elif key == "bbox" and how == "number":
        place = draw(st.integers(0, 3))
        entry["bbox"] = list(entry["bbox"]) if isinstance(entry.get("bbox"), list) else [1, 1, 2, 2]
        entry["bbox"][place : place + 1] = [
            draw(st.sampled_from((-100, -3, 0, 1e-9, 0.3, 60, 1e6, 1e39, float("nan"), "3")))
        ]
    else:
        entry[key] = draw(st.sampled_from(VALUES))


def number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e38


def expected(truth: dict) -> tuple[int, int, int, int] | None:
    """Images, objects, crowd regions and dropped objects as a slow reader counts them; None: it must be refused."""

    def whole(value):
        return type(value) is int and -(2**63) <= value < 2**63

    def unique(values):
        return all(values.count(value) == 1 for value in values)

    images, categories = truth["images"], truth["categories"]
    image_ids, ids = [e.get("id") for e in images], [e.get("id") for e in categories]
    names, labels = [e.get("file_name") for e in images], [e.get("name") for e in categories]
    if not all(map(whole, image_ids + ids)) or not unique(image_ids) or not unique(ids) or not unique(names):
        return None
    if any(name not in NAMES for name in names):
        return None
    if not all(isinstance(label, str) and label.strip() and "\ud83d" not in label for label in labels):
        return None
    if not unique(labels):
        return None
    for e in images:
        sides = [int(e[k]) if number(e.get(k)) and e[k] > 0 else 0 for k in ("height", "width")]
        if all(sides) and sides != [HEIGHT, WIDTH]:
            return None
    objects = crowd = dropped = marked = 0
    for e in truth["annotations"]:
        if not whole(e.get("image_id")) or not whole(e.get("category_id")):
            return None
        if e["image_id"] not in image_ids or e["category_id"] not in ids:
            return None
        iscrowd, ignore = e.get("iscrowd"), e.get("ignore")
        hidden = iscrowd in (1, "1") or ignore not in (None, 0, False, "0")
        marked += hidden
        box = e.get("bbox")
        lost = not (isinstance(box, list) and len(box) == 4 and all(map(number, box))) or min(box[2:]) <= 0
        if not lost:
            for start, length, side in ((box[0], box[2], WIDTH), (box[1], box[3], HEIGHT)):
                low, high = (np.float32(min(max(v, 0), side) / side) for v in (start, start + length))
                lost = lost or not high * np.float32(side) > low * np.float32(side)
        dropped += lost
        crowd += hidden and not lost
        objects += not hidden and not lost
    if truth["annotations"] and marked == len(truth["annotations"]):
        return None
    return len(images), objects, crowd, dropped


def check(data) -> None:
    truth = sound()
    for _ in range(data.draw(st.integers(0, 3))):
        spoil(data.draw, truth)
    whole = data.draw(st.sampled_from(["sound"] * 12 + ["nfd", *sorted(REFUSED)]))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pixels = dict.fromkeys(NAMES, paint(HEIGHT, WIDTH, []))
        root = write_folder(folder / "set", {"train": sound()}, pixels)
        images, path = root / "images" / "train", root / "annotations" / "instances_train.json"
        text = json.dumps(truth)
        content = {
            "empty": b"",
            "utf-16": text.encode("utf-16"),
            "utf-32": text.encode("utf-32"),
            "cut": text[:-9].encode(),
        }
        path.write_bytes(content.get(whole, text.encode()))
        if whole == "missing":
            for name in NAMES:
                (images / name).unlink()
        elif whole == "damaged":
            for name in NAMES:
                (images / name).write_bytes((images / name).read_bytes()[:40])
        elif whole == "nfd":
            (images / NAMES[3]).rename(images / unicodedata.normalize("NFD", NAMES[3]))
        wanted = None if whole in REFUSED else expected(truth)
        told = None
        try:
            dataset = opened(root, folder, ["train"])
            counts = kd.count(dataset, "train", settings(folder))
            kd.summary(dataset, settings(folder)).encode()
        except UserError as error:
            told = str(error)
        assert (told is None) == (wanted is not None), (told, text)
        if told is not None:
            assert "\n" not in told and told, text
            return
        assert (counts.images, counts.objects, counts.crowd, counts.dropped) == wanted, text
        reader = dataset.splits["train"].records
        assert sum(len(reader[i]["boxes"]) for i in range(counts.images)) == counts.objects, text


@fuzz(40)
def test_some_spoilt_folders(data):
    check(data)


@pytest.mark.user_input(
    "COCO json",
    "1000 folders spoilt at random (`make test-all`)",
    "counted as a slow reader counts them, or refused in one sentence",
)
@pytest.mark.slow
@fuzz(1000)
def test_1000_spoilt_folders(data):
    check(data)
