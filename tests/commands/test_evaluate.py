"""`kdjax evaluate`."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from kdjax import cli
from kdjax.commands import arguments, evaluate
from kdjax.data.build import EvalBuilder
from kdjax.evals import coco
from kdjax.inference import masks
from kdjax.inference import predict as prediction
from kdjax.report import evaluation as page
from kdjax.structs import Detections
from tests.support.models import read, refused


@pytest.mark.user_input(
    "Models and exports", "data of other classes than the model's", "refused: the data has 'planet'"
)
@pytest.mark.user_input(
    "Models and exports",
    "data without objects, or with a broken image",
    "refused: have no objects; with the image's name",
)
def test_evaluate_refuses_other_classes_and_broken_images(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prediction, "program", lambda *_, **__: pytest.fail("computed"))
    one = f"--model={made / 'model'}"
    shutil.copytree(made / "data", tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_val.json"
    truth = read(file)
    renamed = [entry | {"name": entry["name"].replace("star", "planet")} for entry in truth["categories"]]
    file.write_text(json.dumps(truth | {"categories": renamed}))
    assert "the data has 'planet'" in refused(capsys, "evaluate", one, f"--data={tmp_path / 'data'}")
    file.write_text(json.dumps(truth | {"annotations": []}))
    assert "have no objects" in refused(capsys, "evaluate", one, f"--data={tmp_path / 'data'}")
    file.write_text(json.dumps(truth))
    (tmp_path / "data" / "images" / "val" / "val_00003.png").write_text("broken")
    assert "val_00003.png: cannot be read" in refused(capsys, "evaluate", one, f"--data={tmp_path / 'data'}")


@pytest.mark.user_input(
    "Models and exports", "unusable boxes in the data to evaluate on", "counted as dropped, with the reason"
)
def test_evaluate_reports_dropped_boxes(made, tmp_path, capsys):
    shutil.copytree(made / "data", tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_val.json"
    truth = read(file)
    first, last = truth["images"][0]["id"], truth["images"][-1]["id"]
    common = {"category_id": truth["categories"][0]["id"], "area": 9, "iscrowd": 0}
    bad = [(first, [1, 1, 0, 3]), (first, [500, 500, 3, 3]), (first, [1, 1, 3, 0]), (last, [1, 1, 0, 3])]
    bad = [common | {"id": 900 + i, "image_id": key, "bbox": bbox} for i, (key, bbox) in enumerate(bad)]
    repaired = common | {"id": 1, "image_id": first, "bbox": [1, 1, 9, 9], "area": -1}
    file.write_text(json.dumps(truth | {"annotations": [repaired, *truth["annotations"], *bad]}))
    arguments.open_data(str(tmp_path / "data"), "val", "", "", 2, "stored")
    [line] = capsys.readouterr().out.splitlines()
    assert line == (
        f"{tmp_path / 'data'}: 2 dropped: box has no extent; 1 dropped: box outside the image; 2 noted: class without "
        "objects: striped, checked"
    )


@pytest.mark.user_input(
    "Models and exports", "data with other category ids than the model's", "read: classes are matched by name"
)
def test_classes_are_matched_by_name(made, tmp_path):
    """The same data with categories in another order gives the same metrics."""
    shutil.copytree(made / "data", tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_val.json"
    truth = read(file)
    file.write_text(json.dumps(truth | {
        "categories": [entry | {"id": 100 - entry["id"]} for entry in truth["categories"]],
        "annotations": [row | {"category_id": 100 - row["category_id"]} for row in truth["annotations"]],
    }))  # fmt: skip
    metrics = []
    for folder in (made / "data", tmp_path / "data"):
        out = tmp_path / folder.parent.name
        assert cli.main(["evaluate", f"--model={made / 'model'}", f"--data={folder}", f"--out={out}"]) == 0
        written = read(out / "evaluation.json")["model"]
        metrics.append({name: entry["AP50"] for name, entry in written["classes"].items()} | written["metrics"])
    assert metrics[0] == pytest.approx(metrics[1])


@pytest.mark.parametrize("what", ["student", "."])
def test_evaluate_gives_the_metrics_of_the_run(finished, tmp_path, what):
    workdir, results = finished
    command = ["evaluate", f"--model={workdir / what}", "--data=scenes", "--limit=10", f"--out={tmp_path}"]
    assert cli.main(command) == 0
    got = read(tmp_path / "evaluation.json")["model"]
    assert got["metrics"] == pytest.approx({name: results["student"][name] for name in coco.METRICS}, abs=1e-6)
    assert {name: got[name] for name in ("params", "flops")} == {
        name: results["student"][name] for name in ("params", "flops")
    }
    # Equal but for rounding, which can swap neighbours.
    columns = (
        np.array([[row["image_id"], row["category_id"], *row["bbox"], row["score"]] for row in read(path)]).T
        for path in (tmp_path / "detections.json", workdir / "detections" / "student.json")
    )
    away = functools.reduce(np.maximum, (np.abs(a[:, None] - b) for a, b in zip(*columns, strict=True)))
    assert (away.min(0) < 1e-3).all() and (away.min(1) < 1e-3).all()
    assert read(workdir / "student" / "config.json")["extra"]["category_ids"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.user_input(
    "Folders and names", "one `--out` for `kdjax predict` and `kdjax evaluate`", "refused: choose another folder"
)
def test_detections_of_two_commands_do_not_mix(made, tmp_path, capsys):
    for name in ("detections.json", "images.json"):
        (tmp_path / name).write_text("[]")
    model = f"--model={made / 'model'}"
    told = refused(capsys, "evaluate", model, f"--data={made / 'data'}", f"--out={tmp_path}")
    assert "is the folder of a `kdjax predict`: choose another folder" in told
    (tmp_path / "evaluation.json").write_text("{}")
    told = refused(capsys, "predict", str(made / "data" / "images" / "val"), model, f"--out={tmp_path}")
    assert "is the folder of a `kdjax evaluate`: choose another folder" in told
    (tmp_path / "images.json").unlink()
    (tmp_path / "detections_against.json").write_text("[]")  # of an earlier evaluation of two models
    assert cli.main(["evaluate", model, f"--data={made / 'data'}", "--limit=2", f"--out={tmp_path}"]) == 0
    assert not (tmp_path / "detections_against.json").exists()


def test_errors_of_masks_are_told_beside_those_of_boxes():
    """One detection has the right box and half of the mask."""
    square = [[0, 0, 40, 0, 40, 40, 0, 40]]
    row = {"image_id": 7, "category_id": 10, "bbox": [0, 0, 40, 40]}
    truth = {
        "images": [{"id": 7, "height": 80, "width": 80, "file_name": "a.png"}],
        "categories": [{"id": 10, "name": "c"}],
        "annotations": [{**row, "id": 1, "segmentation": square, "area": 1600, "iscrowd": 0}],
    }
    mask = np.zeros((80, 80), bool)
    mask[:40, :16] = True
    boxes = np.array([[0, 0, 40, 40.0]])
    found = Detections(boxes, np.array([0.9]), np.zeros(1, int), ("c",), (10,), masks.encoded([mask]))
    with_masks = evaluate.analyse(truth, {7: found})
    assert with_masks["errors"]["localization"] == {"AP50": 0, "count": 0}
    assert with_masks["mask_errors"]["localization"] == {"AP50": 1, "count": 1}
    without = evaluate.analyse(truth, {7: dataclasses.replace(found, masks=None)})
    assert "mask_errors" not in without
    results = {"model": {"path": "a", "params": 1, "flops": 1, **with_masks}}
    assert "error of masks" in evaluate.table(results)
    image = np.zeros((80, 80, 3), np.uint8)
    html = page.page(results, data="d", truth=truth, stream=lambda ids: iter([(7, image)]), kept={"model": {7: found}})
    assert "Error analysis of masks" in html
    both = results | {"other": {"path": "b", "params": 1, "flops": 1, **without}}
    assert "error of masks" not in evaluate.table(both)


@pytest.mark.slow
def test_two_models_share_the_decoded_images(made, monkeypatch):
    """With one canvas each image is read once; with two, once for each. The detections are those of each alone."""
    opened = arguments.open_data(str(made / "data"), "val", "", "", 0, "stored")
    model = arguments.match_classes(arguments.load_model(str(made / "model")), opened)
    shifted = dataclasses.replace(model, variables=jax.tree.map(lambda x: 1.05 * x, model.variables))
    larger = dataclasses.replace(model, image_size=tuple(side + 32 for side in model.image_size))
    alone = evaluate.detect(shifted, opened)
    made_rows, count = EvalBuilder._row, opened.split.size
    read = []
    monkeypatch.setattr(EvalBuilder, "_row", lambda self, index: read.append(index) or made_rows(self, index))
    for models, times in (({"a": model, "b": shifted}, 1), ({"a": larger, "b": shifted}, 2)):
        read.clear()
        found = evaluate.detect_all(models, opened)
        assert sorted(index for index in read if index is not None) == sorted([*range(count)] * times)
        assert list(found["b"]) == list(alone) and any(len(one) for one in alone.values())
        for image, one in alone.items():
            np.testing.assert_array_equal(found["b"][image].boxes, one.boxes)
            np.testing.assert_array_equal(found["b"][image].scores, one.scores)
        assert any(
            len(found["a"][i]) != len(one) or (found["a"][i].scores != one.scores).any() for i, one in alone.items()
        )
