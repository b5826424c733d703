"""The commands on YOLO and VOC folders: the metrics are those of the same data in COCO's layout."""

import json
import shutil

import pytest

from kdjax import cli
from tests.support.labels import voc_texts, write_texts, yolo_lines
from tests.support.models import read, refused


@pytest.fixture(scope="module")
def evaluated(made, tmp_path_factory):
    """The folder of the three layouts, and the metrics on each."""
    folder = tmp_path_factory.mktemp("layouts")
    said = read(made / "data" / "annotations" / "instances_val.json")
    for entry in said["annotations"]:  # VOC's pixels are whole here, and the other two the same
        entry["bbox"] = [float(round(v)) for v in entry["bbox"]]
        entry.pop("segmentation", None)
        entry.pop("area", None)
    shutil.copytree(made / "data", folder / "coco")
    (folder / "coco" / "annotations" / "instances_val.json").write_text(json.dumps(said))
    for layout in ("yolo", "voc"):
        shutil.copytree(made / "data" / "images" / "val", folder / layout / "images" / "val")
    names = [c["name"] for c in sorted(said["categories"], key=lambda c: c["id"])]
    (folder / "names.txt").write_text("\n".join(names))
    write_texts(folder / "yolo" / "labels" / "val", yolo_lines(said, digits=9), ".txt")
    write_texts(folder / "voc" / "annotations" / "val", voc_texts(said), ".xml")
    return folder


def test_evaluate_reads_all_three(made, evaluated, capsys):
    metrics = {}
    for layout in ("coco", "yolo", "voc"):
        out = evaluated / f"out-{layout}"
        flags = [f"--model={made / 'model'}", f"--data={evaluated / layout}", f"--out={out}", "--limit=6"]
        flags += [f"--classes={evaluated / 'names.txt'}"] * (layout != "coco")
        assert cli.main(["evaluate", *flags]) == 0, capsys.readouterr().err
        metrics[layout] = read(out / "evaluation.json")["model"]["metrics"]
    assert metrics["yolo"] == pytest.approx(metrics["coco"], abs=1e-6)
    assert metrics["voc"] == pytest.approx(metrics["coco"], abs=1e-6)


def test_classes_are_needed_or_wrong(made, evaluated, capsys):
    flags = ("evaluate", f"--model={made / 'model'}", f"--data={evaluated / 'yolo'}")
    assert "there are no names of classes: a data.yaml with names" in refused(capsys, *flags)
    assert "class" in refused(capsys, *flags, "--classes=coco")
    assert "there is no file nowhere: must be coco, voc, or a file" in refused(capsys, *flags, "--classes=nowhere")
    told = refused(capsys, "evaluate", flags[1], "--data=scenes", "--classes=coco")
    assert "--data=scenes takes no --split, --annotations, --images or --classes" in told
