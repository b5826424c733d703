"""Runs whose teacher is a file of detections: resumption and results; what is refused before anything runs."""

import contextlib
import json
import re

import cv2
import jax
import numpy as np
import pytest

from kdjax import data, weights
from kdjax.errors import UserError
from kdjax.training import checkpoint, checks
from kdjax.training import config as settings
from kdjax.training.run import run
from kdjax.training.setup import placed, prepare, train_batches
from tests.support.data import small_folder
from tests.support.runs import stopped_in_step, tiny_config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder in COCO layout, with detections.json: the training objects, surer and surer."""
    folder = small_folder(tmp_path_factory.mktemp("found") / "data")
    objects = json.loads((folder / "annotations" / "instances_train.json").read_text())["annotations"]
    found = [{key: one[key] for key in ("image_id", "category_id", "bbox")} for one in objects]
    found = [one | {"score": 0.4 + i / 50} for i, one in enumerate(found)]
    (folder / "detections.json").write_text(json.dumps(found))
    return folder


def config_of(folder, root, method="teach_boxes", **changes):
    data_of = dict(data__source="coco_folder", data__root=str(root), steps=8, checkpoint__every=2, log_every=2)
    data_of |= dict(twin=False)
    return tiny_config(folder, teacher=root / "detections.json", method=method, **data_of | changes)


def arrays(workdir) -> dict:
    _, params, stats, _ = weights.load(workdir / "student")
    return checkpoint.flat({"params": params, "stats": stats})


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_has_no_results_of_its_teacher(folder, root, tmp_path, capsys):
    config = config_of(folder, root)
    whole = run(config, tmp_path / "whole")
    assert whole["student"] and not whole["teacher"] and not whole["twin"]
    assert f"{root}/detections.json: 15 detections; 3 of 11 training images (27%) have none" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    for term in ("targets", "soft"):
        assert all(row[f"student/teach_boxes/{term}"] > 0 for row in trained)
    card = (tmp_path / "whole" / "student" / "README.md").read_text()
    assert re.search(r"file of detections, weights `.*detections.json`, hash [0-9a-f]{64}", card)
    with stopped_in_step(5):
        run(config, tmp_path / "resumed")
    assert run(config, tmp_path / "resumed") == whole
    want = arrays(tmp_path / "whole")
    for name, value in arrays(tmp_path / "resumed").items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)
    content = (root / "detections.json").read_text()
    try:
        (root / "detections.json").write_text(content.replace("0.4,", "0.41,").replace("0.4}", "0.41}"))
        with pytest.raises(UserError, match="belongs to a different run: teacher was"):
            run(config, tmp_path / "resumed")
    finally:
        (root / "detections.json").write_text(content)


@pytest.mark.slow
def test_several_teachers_may_have_a_file_among_them(folder, root, teacher_folder):
    config = config_of(folder, root, method="")
    config.teacher.weights = ""
    config.teachers.file = settings.teacher(weights=str(root / "detections.json"), methods="teach_boxes+teach_detr")
    config.teachers.net = settings.teacher(weights="quickstart_teacher", methods="cwd")
    checks.check_settings(config)
    checks.check_models(config)
    setup = prepare(config, data.open_dataset(config.data))
    assert [teacher.observer is None for teacher in setup.teachers] == [True, False]
    loader = data.train_batches(setup.dataset, config.data, batch_size=8, seed=0)
    batch = placed(setup, next(loader))
    loader.close()
    _, metrics = jax.eval_shape(setup.steps["student"], setup.states["student"], setup.variables, batch)
    assert {"file/teach_boxes/soft", "file/teach_detr/loss", "net/cwd/cwd"} <= set(metrics)


def test_a_file_also_teaches_on_images_without_labels(folder, root, tmp_path, capsys):
    """Two of three have detections, of which those from 0.5 on are also the boxes for methods that read some."""
    entries = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    rng = np.random.default_rng(0)
    for number in range(3):
        assert cv2.imwrite(str(tmp_path / f"u{number}.png"), rng.integers(0, 256, (48, 80, 3)).astype(np.uint8))
        entries["images"].append({"id": number, "file_name": f"photos/u{number}.png", "width": 80, "height": 48})
        if number:
            box = {"image_id": number, "category_id": 1, "bbox": [4, 4, 60, 40]}
            entries["annotations"] += [box | {"score": score} for score in (0.4, 0.9)]
    (tmp_path / "found.json").write_text(json.dumps(entries))
    changes = dict(teacher__weights=str(tmp_path / "found.json"), data__unlabelled=str(tmp_path))
    config = config_of(folder, root, **changes)
    setup = prepare(config, data.open_dataset(config.data))
    told = capsys.readouterr().out
    assert "0 detections; 11 of 11 training images (100%) have none" in told
    assert "4 detections; 1 of 3 images without labels (33%) have none" in told
    with contextlib.closing(train_batches(setup)) as batches:
        batch = placed(setup, next(batches))
    more = batch["unlabelled"]
    counts, boxes = np.asarray(more["found_valid"]).sum(1), np.asarray(more["valid"]).sum(1)
    assert not np.asarray(batch["found_valid"]).any() and counts.any() and boxes.any()
    np.testing.assert_array_equal(boxes, (np.asarray(more["found_scores"]) >= 0.5).sum(1))
    _, metrics = jax.eval_shape(setup.steps["student"], setup.states["student"], setup.variables, batch)
    assert {"teach_boxes/targets", "teach_boxes/soft"} <= set(metrics)


@pytest.mark.user_input(
    "Files of detections", "for methods that compare maps or rows", "refused: methods that can use it are named"
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(method="cwd+teach_boxes"),
            "config.methods.cwd: a file of detections has no neck, which it reads of the teacher: methods that can use "
            "a file are teach_boxes, teach_detr",
        ),
        (dict(teacher__detector="rtmdet_pico"), "config.teacher.detector has no effect with a file of detections"),
        (dict(teacher__cache="c"), "config.teacher.cache has no effect with a file of detections"),
        (dict(teacher__weights="none.json"), "config.teacher.weights: there is no file or folder none.json"),
    ],
    ids=["methods", "detector", "cache", "missing"],
)
def test_what_a_file_cannot_do_is_refused_by_the_settings(folder, root, changes, message):
    config = config_of(folder, root, **changes)
    checks.check_settings(config)
    with pytest.raises(UserError, match=re.escape(message)):
        checks.check_models(config)


def test_a_wrong_file_is_refused_with_its_setting_and_place(folder, root, tmp_path):
    (tmp_path / "other.json").write_text('[{"image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 1}]')
    config = config_of(folder, root, teacher__weights=str(tmp_path / "other.json"))
    with pytest.raises(UserError, match=r"^config\.teacher\.weights: .*other\.json: entry 0, from 0: image 1 is not"):
        prepare(config, data.open_dataset(config.data))
