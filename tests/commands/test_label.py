"""`kdjax label`: what is sure enough becomes a label, in a file that kdjax trains on."""

import shutil

import cv2
import numpy as np
import pytest

from kdjax import cli, data
from kdjax.evals import tide
from kdjax.evals.matching import Truth
from kdjax.structs import Detections
from kdjax.training import config as settings
from tests.support.models import read, refused, refused_at_the_end


@pytest.fixture(scope="module")
def photos(made, tmp_path_factory):
    """The six scenes without their labels, one in a folder of its own, beside a file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    files = sorted((made / "data" / "images" / "val").iterdir())
    (folder / "more").mkdir()
    for number, file in enumerate(files):
        shutil.copy(file, folder / "more" if number == 3 else folder)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    return folder


def label(photos, out, *flags):
    return cli.main(["label", "--model=quickstart_teacher", f"--data={photos}", f"--out={out}", *flags])


def test_labels_are_written_and_read_back(made, photos, tmp_path, capsys):
    """With thresholds that are chosen on the same images: nearly all objects, and nearly no others."""
    out = tmp_path / "labels.json"
    assert label(photos, out, f"--labelled={made / 'data'}") == 2  # an image could not be read
    told = capsys.readouterr()
    assert "broken.jpg" in told.err and "threshold" in told.out and str(tmp_path / "labels.png") in told.out
    written, truth = read(out), read(made / "data" / "annotations" / "instances_val.json")
    assert {image["file_name"] for image in written["images"]} >= {
        "more/" + sorted(image["file_name"] for image in truth["images"])[3]
    }
    names = {image["id"]: image["file_name"].removeprefix("more/") for image in written["images"]}
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    right = 0
    for row in written["annotations"]:
        x, y, w, h = row["bbox"]
        assert row["area"] == pytest.approx(w * h) and 0 <= x < x + w <= 128 and 0 <= y < y + h <= 128
        same = [
            one
            for one in truth["annotations"]
            if one["image_id"] == ids[names[row["image_id"]]] and one["category_id"] == row["category_id"]
        ]
        right += any(np.abs(np.subtract(one["bbox"], row["bbox"])).max() < 8 for one in same)
    assert right >= 0.8 * len(written["annotations"]) and right >= 0.6 * len(truth["annotations"])
    assert [one["id"] for one in written["annotations"]] == list(range(1, len(written["annotations"]) + 1))
    assert cv2.imread(str(tmp_path / "labels.png")) is not None

    config = settings.base().data
    config.update(source="coco_folder", root=str(photos), train_annotations=str(out), train_images=str(photos))
    config.cache = str(tmp_path / "cache")
    opened = data.open_dataset(config, splits=("train",))
    counts = data.count(opened, "train", config)
    assert opened.splits["train"].size == len(written["images"])
    assert not data.reasons(counts, ("dropped", "repaired")), data.reasons(counts, ("dropped", "repaired"))


def test_the_preview_is_not_labelled(photos, tmp_path, monkeypatch):
    """Also if the folder is named in another way."""
    shutil.copytree(photos / "more", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    for named in ("photos", str(tmp_path / "photos")):
        command = ["label", "--model=quickstart_teacher", f"--data={named}", "--out=photos/labels.json"]
        assert cli.main([*command, "--threshold=0.1"]) == 0 and (tmp_path / "photos" / "labels.png").exists()
    assert len(read(tmp_path / "photos" / "labels.json")["images"]) == 1


def test_a_threshold_for_all_leaves_out_what_is_below(photos, tmp_path):
    low, high = tmp_path / "low.json", tmp_path / "high.json"
    for out, score in ((low, 0.3), (high, 0.7)):
        assert label(photos, out, f"--threshold={score}") == 2
    some, few = read(low)["annotations"], read(high)["annotations"]
    assert (
        len(some) > len(few) > 0 and min(row["score"] for row in few) >= 0.7 > min(row["score"] for row in some) >= 0.3
    )
    assert len(few) == sum(row["score"] >= 0.7 for row in some)
    used = {row["image_id"] for row in few}
    assert {image["id"] for image in read(high)["images"]} == used  # images without labels are left out


def test_the_lowest_score_with_a_precision():
    """The scores 0.9 to 0.5 of which the third and the last are wrong: 2 of 2, 3 of 4, 3 of 5."""
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [60, 60, 70, 70], [40, 0, 50, 10], [80, 80, 90, 90]], float)
    found = Detections(boxes, np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.zeros(5, int), ("a",), (1,))
    truth = Truth(boxes[[0, 1, 3]], np.zeros(3, int), np.zeros(3, bool))
    outcomes = tide.outcomes({1: truth}, {1: found}, 1)
    for precision, score in ((1.0, 0.8), (0.75, 0.6), (0.6, 0.5), (0.0, 0.5)):
        [best] = tide.best_thresholds(outcomes, precision=precision)
        assert best["score"] == pytest.approx(score) and best["precision"] >= precision
    wrong = tide.outcomes(
        {1: truth._replace(boxes=boxes[[1, 3]] + 0.0, labels=np.zeros(2, int), crowd=np.zeros(2, bool))}, {1: found}, 1
    )
    assert tide.best_thresholds(wrong, precision=1.0) == [None]  # the best detection is wrong


@pytest.mark.user_input(
    "Folders and names", "`kdjax label --out` of a file that is there and is not its own", "refused: it is not written"
)
def test_what_cannot_be_labelled_is_refused(made, photos, tmp_path, capsys):
    flags = ["label", f"--model={made / 'model'}", f"--data={photos}", f"--out={tmp_path / 'x.json'}"]
    assert "--threshold, --labelled: give one of them" in refused(capsys, *flags)
    assert "give one of them" in refused(capsys, *flags, "--threshold=0.5", f"--labelled={made / 'data'}")
    assert "--threshold must be in 0 .. 1, not 2" in refused(capsys, *flags, "--threshold=2")
    assert "--precision is measured on labelled data" in refused(capsys, *flags, "--threshold=0.5", "--precision=0.9")
    told = refused(capsys, *flags, f"--labelled={tmp_path / 'nowhere'}")
    assert "--labelled: there is no folder" in told
    assert "--labelled=scenes takes no --split" in refused(capsys, *flags, "--labelled=scenes", "--split=x")
    told = refused(capsys, *flags, "--threshold=0.5", "--split=train")
    assert "--split is for the data of --labelled, which is not given" in told
    truth = tmp_path / "instances.json"
    truth.write_text('{"info": {"description": "mine"}}')
    told = refused(capsys, *flags[:-1], f"--out={truth}", "--threshold=0.5")
    assert "is there, and `kdjax label` did not write it" in told and "mine" in truth.read_text()
    told = refused(capsys, *flags[:-1], f"--out={tmp_path / 'labels.png'}", "--threshold=0.5")
    assert "labels.png is the name of the preview beside the labels: name it labels.json" in told
    (tmp_path / "photo.png").write_text("mine")
    told = refused(capsys, *flags[:-1], f"--out={tmp_path / 'photo.json'}", "--threshold=0.5")
    assert "photo.png, the preview beside" in told and (tmp_path / "photo.png").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    flags[2] = f"--data={tmp_path / 'empty'}"
    assert "holds no images" in refused(capsys, *flags, "--threshold=0.5")
    flags[2] = f"--data={tmp_path / 'nowhere'}"
    assert "there is no folder" in refused(capsys, *flags, "--threshold=0.5")
    flags[1:3] = ["--model=quickstart_teacher", f"--data={photos / 'more'}"]
    assert "no object in 1 images has a score that is high enough" in refused_at_the_end(
        capsys, *flags, "--threshold=1"
    )
    assert not (tmp_path / "x.json").exists()
