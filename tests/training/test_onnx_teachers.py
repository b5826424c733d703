"""Runs whose teacher is an ONNX file."""

import json
import threading

import cv2
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from kdjax import data
from kdjax.errors import UserError
from kdjax.training import checks, replay
from kdjax.training import config as settings
from kdjax.training.run import run
from kdjax.training.setup import placed, prepare, with_host
from tests.support import onnx_files
from tests.support.runs import one_device, tiny_config

pytest.importorskip("onnx", reason="files are made by onnx")
pytest.importorskip("onnxruntime", reason="teachers in ONNX files need kdjax[export]")


def config_of(folder, file, layout, method, options=None, **changes):
    changes = dict(steps=4, optimizer__warmup=1, twin=False, teacher__layout=layout) | changes
    changes |= {"student__detector": "rtmdet_pico"} if method == "hinton" else {}  # has the rows of the file
    config = tiny_config(folder, teacher=file, method=method, **changes)
    config.data.augment.update(dict(mosaic=False, mixup=0.0))
    config.data.stage2.start = 0
    with config.unlocked():
        config.teacher.options = ConfigDict(options or {})
    return config


def dataset_of(config):
    return data.open_dataset(config.data)


def detector_file(path, names):
    """A file of the layout yolov8 that finds the same objects of these classes in every image."""
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(8, 56, (84, 2)), rng.uniform(4, 30, (84, 2))], 1)
    output = np.concatenate([boxes, rng.uniform(0.02, 0.9, (84, len(names)))], 1).T[None].astype(np.float32)
    facts = {"names": str(dict(enumerate(names)))}
    return onnx_files.constant(path, {"output0": output}, image=["B", 3, 64, 64], facts=facts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.mark.slow
def test_a_backbone_with_nothing_but_a_map_teaches_by_dsi(folder, tmp_path):
    """A whole run; with another file in its place it is not continued."""
    file = onnx_files.backbone(folder / "backbone.onnx", channels=7)
    config = config_of(folder, file, "maps", "dsi", {"mean": 114, "std": 60})
    with one_device():
        results = run(config, tmp_path / "whole")
        rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
        losses = [row["student/dsi/alignment"] for row in rows if "student/dsi/alignment" in row]
        assert results["teacher"] is None and 0 < losses[-1] < 1.5
        assert "The teacher finds no boxes; only its maps are used" in (tmp_path / "whole" / "report.html").read_text()
        assert not [one for one in threading.enumerate() if one.name == "teacher on the host"]
        onnx_files.backbone(folder / "backbone.onnx", channels=8)
        with pytest.raises(UserError, match="belongs to a different run: teacher was"):
            run(config, tmp_path / "whole")


@pytest.mark.slow
def test_a_detector_in_a_file_teaches_with_its_rows_and_is_evaluated(folder, tmp_path):
    names = ["other", *reversed(dataset_of(tiny_config(folder, teacher=None)).classes)]
    config = config_of(folder, detector_file(folder / "d.onnx", names), "yolov8", "hinton", steps=2)
    with one_device():
        results = run(config, tmp_path / "run")
    assert set(results["teacher"]) >= {"AP", "AP50"} and "params" not in results["teacher"]
    found = json.loads((tmp_path / "run" / "detections" / "teacher.json").read_text())
    assert len(found) > 100
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "d.onnx, weights" in card


def test_what_a_file_says_travels_in_the_batch(folder):
    classes = dataset_of(tiny_config(folder, teacher=None)).classes
    config = config_of(folder, detector_file(folder / "b.onnx", classes), "yolov8", "hinton")
    with one_device():
        setup = prepare(config, dataset_of(config))
        [teacher] = setup.teachers
        assert teacher.on_host and teacher.detects
        batch = with_host(setup, checks.first_batch_with_objects(setup))
        said = batch["teacher"]
        assert isinstance(said.rows.logits, np.ndarray) and said.rows.location is None
        shapes = jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), (said, teacher.observer.output))
        assert shapes[0] == shapes[1]
        assert with_host(setup, batch)["teacher"] is said  # it is not computed again
        on_device = placed(setup, batch)["teacher"]
        np.testing.assert_array_equal(on_device.rows.logits, said.rows.logits)


def test_a_file_beside_a_detector(folder, tmp_path):
    """Two teachers: one in the step, one on the host."""
    from tests.support.runs import random_teacher

    file = onnx_files.backbone(folder / "second.onnx")
    config = tiny_config(folder, teacher=None, steps=2, optimizer__warmup=1)
    with config.unlocked():
        live = settings.teacher(weights=str(random_teacher(tmp_path)), methods="cwd")
        vision = settings.teacher(weights=str(file), layout="maps", methods="dsi")
        config.teachers = ConfigDict({"live": live, "vision": vision})
    with one_device():
        checks.check_models(config)
        setup = prepare(config, dataset_of(config))
        batch = placed(setup, checks.first_batch_with_objects(setup))
        assert set(batch["teacher"]) == {"live", "vision"}
        checks.check_terms(setup, checks.first_batch_with_objects(setup))
        with config.unlocked():
            config.teachers.both = settings.teacher(mean="live+vision", methods="hinton")
        with pytest.raises(
            UserError, match=r"config\.teachers\.both\.mean: vision is an ONNX file, which runs on the host"
        ):
            checks.check_models(config)


def test_a_cache_holds_what_a_file_says(folder, tmp_path):
    file = onnx_files.backbone(folder / "cached.onnx")
    config = config_of(folder, file, "maps", "dsi", data__views=1, teacher__cache=str(tmp_path / "cache"))
    with one_device():
        setup = prepare(config, dataset_of(config))
        found = replay.ready(setup)
        batches = data.train_batches(
            setup.dataset, config.data, batch_size=8, seed=0, attach=replay.attach(setup, found)
        )
        try:
            batch = next(batches)
        finally:
            batches.close()
        stored = batch.pop("teacher").neck[0]
        np.testing.assert_array_equal(stored, with_host(setup, batch)["teacher"].neck[0])
        onnx_files.backbone(folder / "cached.onnx", channels=6)
        with pytest.raises(UserError, match=r"written for other runs \(the hash of the teacher's weights was"):
            replay.ready(prepare(config, dataset_of(config)))


def test_a_file_gives_the_boxes_of_images_without_labels(folder, tmp_path):
    for number in range(8):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((64, 64, 3), 30 * number, np.uint8))
    classes = dataset_of(tiny_config(folder, teacher=None)).classes
    unlabelled = dict(data__unlabelled=str(tmp_path), data__unlabelled_ratio=0.5, data__unlabelled_score=0.4)
    config = config_of(folder, detector_file(folder / "u.onnx", classes), "yolov8", "hinton", **unlabelled)
    with one_device():
        setup = prepare(config, dataset_of(config))
        batch = checks.first_batch_with_objects(setup)
        more = with_host(setup, batch)["unlabelled"]
        places = setup.dataset.max_boxes
        found = setup.teachers[0].detector.program(None, more["image"], more["image_size"])
        sure = min(int((found.scores[0] >= 0.4).sum()), places)
        assert more["boxes"].shape == (4, places, 4) and more["valid"][0].sum() == sure > 0
        np.testing.assert_array_equal(more["boxes"][0, :sure], found.boxes[0, :sure])
        there = placed(setup, batch)["unlabelled"]
        assert set(there) == {"image", "image_size", "boxes", "labels", "valid", "teacher"}
        np.testing.assert_array_equal(there["boxes"], more["boxes"])
        np.testing.assert_array_equal(there["teacher"].rows.logits, more["teacher"].rows.logits)


def checked(config):
    checks.check_settings(config)
    checks.check_models(config)
    return prepare(config, dataset_of(config))


@pytest.mark.user_input(
    "Config and flags", "settings of a teacher in an ONNX file that contradict each other", "refused, with the setting"
)
def test_settings_that_do_not_fit_are_refused(folder, tmp_path):
    file = onnx_files.backbone(folder / "wrong.onnx")
    classes = dataset_of(tiny_config(folder, teacher=None)).classes
    names = tmp_path / "names.txt"
    names.write_text("\n".join(classes))

    def told(layout="maps", method="dsi", options=None, **changes):
        config = config_of(folder, file, layout, method, options, **changes)
        with pytest.raises(UserError) as caught:
            checked(config)
        return str(caught.value)

    assert "config.teacher.weights: " in told("") and "set config.teacher.layout to run the file as it is" in told("")
    assert told("map").startswith("config.teacher: layout must be one of kdjax, yolox")
    assert told(options={"strid": 8}).startswith("config.teacher: options.strid: there is no such option (did you mean")
    assert told(teacher__detector="yolox_nano").startswith("config.teacher: detector: with a layout, ")
    assert told(teacher__weights=str(tmp_path / "none.onnx")).startswith("config.teacher.weights: there is no file")
    assert told(method="hinton").startswith("config.methods.hinton: teacher: tap 'rows.logits': this model has no such")
    assert "wrong.onnx: output 'features' f32[1, 5, 4, 4] does not fit" in told(
        "yolov8", "hinton", {"classes": str(names)}
    )
    file = detector_file(folder / "wrong.onnx", classes[1:])
    assert f"wrong.onnx: class {classes[0]!r} of the data is unknown to the teacher" in told("yolov8", "hinton")
