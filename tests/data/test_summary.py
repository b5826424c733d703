"""The text of the dry run."""

import json
import re
from pathlib import Path

import pytest

from kdjax import data
from tests.support.data import (
    coco_json,
    one_split,
    opened,
    paint,
    settings,
    write_folder,
)


@pytest.mark.user_input(
    "Folders and names", "file names that lead out of the folder (.., absolute)", "counted as noted, and read"
)
def test_images_outside_the_folder_are_counted(tmp_path):
    names = ("a.png", "../a.png", "../../../c.png", str(tmp_path / "d.png"), "sub/../b.png", "x/../../../../e.png")
    pixels = dict.fromkeys(names, paint(40, 50, []))
    (tmp_path / "set" / "images" / "train" / "x").mkdir(parents=True)
    (tmp_path / "set" / "images" / "train" / "sub").mkdir(parents=True)
    truth = coco_json(dict.fromkeys(names, (40, 50)), [])
    root = write_folder(tmp_path / "set", {"train": truth}, pixels)
    text = data.summary(opened(root, tmp_path, ["train"]), settings(tmp_path, image_size=(48, 64)))
    assert "train: 4 noted: file_name leads out of the folder of images\n" in text
    assert "\n  ../../../c.png: noted, file_name leads out of the folder of images\n" in text


def test_the_summary_names_the_file_with_the_full_list(tmp_path):
    truth = coco_json({"a.png": (40, 50)}, [(0, 3, [60 + i, 5, 10, 10], {}) for i in range(25)])
    dataset = opened(one_split(tmp_path / "set", truth, {"a.png": paint(40, 50, [])}), tmp_path)
    text = data.summary(dataset, settings(tmp_path, image_size=(48, 64)))
    path = re.search(r"and 5 more: full list in (\S+)", text)[1]
    assert len(json.loads(Path(path).read_text())) == 25
