"""Opening splits, limits, and prepared data that is damaged."""

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from kdjax import data
from kdjax.errors import UserError
from tests.support.data import coco_json, opened, paint, settings, small_folder, write_folder


def test_limit_takes_the_first_images(tmp_path):
    root = small_folder(tmp_path / "set")
    dataset = opened(root, tmp_path, limit=2)
    assert [s.size for s in dataset.splits.values()] == [2, 2]
    truth = data.ground_truth(dataset, "train")
    assert [i["id"] for i in truth["images"]] == [10, 11]
    assert {a["image_id"] for a in truth["annotations"]} == {11}
    assert len(data.ground_truth(dataset, "train", limit=1)["images"]) == 1


@pytest.mark.user_input("COCO json", "a category of val that train calls otherwise", "refused with both names")
def test_val_may_not_have_more_categories_than_train(tmp_path):
    image = {"a.png": paint(20, 30, [])}
    train, val = coco_json({"a.png": (20, 30)}, [], [(1, "cat")]), coco_json({"a.png": (20, 30)}, [], [(1, "dog")])
    with pytest.raises(UserError, match="val split: category 1 is 'dog': the train split calls it 'cat'"):
        opened(write_folder(tmp_path / "set", {"train": train, "val": val}, image), tmp_path)


@pytest.mark.user_input(
    "Prepared data",
    "prepared data that is cut off, missing or overwritten",
    "refused: delete FOLDER to have it prepared again",
)
def test_damaged_prepared_data_is_reported(tmp_path):
    root = small_folder(tmp_path / "set", count=3)
    split = opened(root, tmp_path).splits["val"]
    folder, [records] = split.folder, split.folder.rglob("*.array_record*")
    for path in (folder / "meta.json", folder / "truth.json", folder / "log.json", records):
        whole = path.read_bytes()
        for spoil in (lambda path, whole: path.write_bytes(whole[: len(whole) // 2]), lambda path, _: path.unlink()):
            spoil(path, whole)
            # Which of them reads the file depends on the file.
            with pytest.raises(UserError, match=f"is damaged or missing: delete {folder}"):  # noqa: PT012
                dataset = opened(root, tmp_path)
                data.ground_truth(dataset, "val")
                assert dataset.splits["val"].log == []
        path.write_bytes(whole)
    dataset = opened(root, tmp_path)
    assert dataset.splits["val"].size == 3
    # Damaged between its ends: only reading shows it.
    records.write_bytes(whole[:200] + bytes(len(whole) - 400) + whole[-200:])
    with pytest.raises(
        data.Damaged, match=f"{folder}/.* cannot be (read|decoded): delete {folder} to have it prepared again$"
    ):
        [dataset.splits["val"].records[index] for index in range(3)]
    with pytest.raises(data.Damaged):
        [dataset.splits["val"].image(image_id) for image_id in dataset.splits["val"].image_ids]
    with pytest.raises(data.Damaged):  # the loader's threads pass it on
        list(data.eval_batches(dataset, "val", settings(tmp_path), batch_size=2))


@pytest.mark.user_input(
    "Prepared data", "one flipped bit of prepared data", "refused: delete FOLDER; unused bytes of headers alone pass"
)
def test_one_flipped_bit_of_what_is_prepared_is_noticed(tmp_path):
    root = small_folder(tmp_path / "set", count=3)

    def read():
        split = opened(root, tmp_path).splits["val"]
        return (
            split.folder,
            split.truth,
            split.log,
            split.contents,
            [split.image(image_id).tobytes() for image_id in (10, 11, 12)],
        )

    expected = folder, *_ = read()
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert {"meta.json", "truth.json", "log.json", "features.json", "dataset_info.json"} < {p.name for p in paths}
    for path in paths:
        whole, sentences = path.read_bytes(), []
        used = [place for place, value in enumerate(whole) if value]  # records are padded with zeros
        for place in used[:: max(1, len(used) // 7)]:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            try:
                assert read() == expected and "array_record" in path.name, path  # whose headers have unused bytes
            except UserError as error:
                sentences.append(str(error))
        assert sentences and all(text.endswith(f": delete {folder} to have it prepared again") for text in sentences)
        path.write_bytes(whole)
    assert read() == expected


@pytest.mark.user_input("Prepared data", "other images under the same names, with the same json", "read as other data")
@pytest.mark.user_input("Prepared data", "a copy of the folder at another place", "read as the same data")
def test_the_fingerprint_knows_the_pixels(tmp_path):
    """Other images under the same names, with the same json; the place on disk does not matter."""
    root = small_folder(tmp_path / "set", count=3)
    before = opened(root, tmp_path).fingerprint
    shutil.copytree(root, tmp_path / "copy")
    assert opened(tmp_path / "copy", tmp_path).fingerprint == before
    path = root / "images" / "train" / "p1.png"
    assert cv2.imwrite(str(path), cv2.imread(str(path)) + 1)
    assert opened(root, tmp_path).fingerprint != before


@pytest.mark.user_input("Folders and names", "a folder with the val split alone", "read where val alone is asked for")
def test_one_split_opens_without_the_other_and_shares_its_prepared_data(tmp_path):
    root = small_folder(tmp_path / "set", count=5)
    both = opened(root, tmp_path).splits["val"]
    prepared = set((tmp_path / "cache" / "data").iterdir())
    (root / "annotations" / "instances_train.json").unlink()
    dataset = opened(root, tmp_path, ["val"], val_split="val")
    [(role, split)] = dataset.splits.items()
    assert role == "val" and set((tmp_path / "cache" / "data").iterdir()) == prepared
    assert split.folder == both.folder and split.truth == both.truth and dataset.category_ids == (3, 11)
    assert split.image_ids == [10, 11, 12]
    for image_id, name in zip(split.image_ids, ("p0.png", "p1.png", "p2.png"), strict=True):
        expected = cv2.imread(str(root / "images" / "val" / name))[:, :, ::-1]
        np.testing.assert_array_equal(split.image(image_id), expected)
    with pytest.raises(KeyError):
        opened(root, tmp_path, ["val"], limit=2).splits["val"].image(12)
    scenes = opened("", tmp_path, ["val"], source="scenes")
    assert list(scenes.splits) == ["val"] and scenes.splits["val"].size == 3


@pytest.mark.user_input(
    "COCO json", "a val json with fewer categories, in another order", "read: labels follow the train split"
)
def test_labels_follow_the_categories_of_train(tmp_path):
    """A val json that lists fewer categories, or in another order, gets the same labels and truth."""
    pixels, boxes = {"a.png": paint(20, 30, [])}, [(0, 11, [1, 2, 10, 12], {}), (0, 20, [3, 4, 10, 12], {})]
    train = coco_json({"a.png": (20, 30)}, [], [(20, "owl"), (3, "cat"), (11, "dog")])
    val = coco_json({"a.png": (20, 30)}, boxes, [(20, "owl"), (11, "dog")])
    root = write_folder(tmp_path / "set", {"train": train, "val": val}, pixels)
    dataset = opened(root, tmp_path)
    assert dataset.classes == ("cat", "dog", "owl")
    assert dataset.splits["val"].records[0]["labels"].tolist() == [1, 2]
    truth = data.ground_truth(dataset, "val")
    assert [entry["id"] for entry in truth["categories"]] == [3, 11, 20]
    assert [entry["category_id"] for entry in truth["annotations"]] == [11, 20]
    alone = opened(root, tmp_path, ["val"])
    assert alone.classes == ("dog", "owl") and alone.splits["val"].records[0]["labels"].tolist() == [0, 1]


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path / "cache"))
    names = {}
    exec(code.replace("DIR", str(small_folder(tmp_path / "set"))), names)
    assert names["batch"]["image"].shape == (16, 320, 320, 3) and names["image"].shape == (40, 60, 3)
