"""`kdjax evaluate`."""

import json
import shutil

import numpy as np
import pytest

from kdjax import cli
from kdjax.commands import arguments
from kdjax.evals import coco
from kdjax.inference import predict as prediction
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
        np.array([[row["image_id"], row["category_id"], *row["bbox"], row["score"]] for row in read(path)])
        for path in (tmp_path / "detections.json", workdir / "detections" / "student.json")
    )
    first, second = columns
    away = np.abs(first[:, None] - second).max(-1)
    assert (away.min(0) < 1e-3).all() and (away.min(1) < 1e-3).all()
    assert read(workdir / "student" / "config.json")["extra"]["category_ids"] == [1, 2, 3, 4, 5, 6]
