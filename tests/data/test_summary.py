"""The text of the dry run."""

import json
import re
from pathlib import Path

from kdjax import data
from tests.support.data import (
    coco_json,
    one_split,
    opened,
    paint,
    settings,
)


def test_the_summary_names_the_file_with_the_full_list(tmp_path):
    truth = coco_json({"a.png": (40, 50)}, [(0, 3, [60, 5, 10, 10], {})] * 25)
    dataset = opened(one_split(tmp_path / "set", truth, {"a.png": paint(40, 50, [])}), tmp_path)
    text = data.summary(dataset, settings(tmp_path, image_size=(48, 64)))
    path = re.search(r"and 5 more: full list in (\S+)", text)[1]
    assert len(json.loads(Path(path).read_text())) == 25
